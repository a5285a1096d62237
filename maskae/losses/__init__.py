"""Losses: arrays in, one float32 scalar out."""
