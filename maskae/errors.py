"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class UserError(Exception):
    """Bad input. The message is one clear line that names the thing and the nearest right one; `main` prints it alone and exits with 2."""


def nearest(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the option most like `word`, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Raises UserError, with the nearest right word, where argument `name` has a value that is not among those known."""
    if value not in known:
        raise UserError(f"unknown {name} '{value}'{nearest(value, known)}; there are {', '.join(known)}")


def check_heads(name: str, width: int, heads: int) -> None:
    """Raises UserError where `heads` do not divide the width called `name`."""
    if width % heads:
        raise UserError(f"{name}={width} is not a multiple of its {heads} heads")
