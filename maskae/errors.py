"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one clear line that names the thing and the nearest right one; `main` prints it alone and exits with 2."""


def nearest(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the option most like `word`, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
