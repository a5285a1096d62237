"""Shared network pieces in the field's terms. They know no system and no config object."""
