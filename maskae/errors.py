"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any


class UserError(Exception):
    """Bad input. The message is one clear line that names the thing and the nearest right one; `main` prints it alone and exits with 2."""


def nearest(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the option most like `word`, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def describe(error: Exception) -> str:
    """The first line of what an exception says, with its kind."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Raises UserError, with the nearest right word, where argument `name` has a value that is not among those known."""
    if value not in known:
        raise UserError(f"unknown {name} '{value}'{nearest(value, known)}; there are {', '.join(known)}")


def check_arguments(name: str, arguments: Iterable[str], function: Callable[..., Any], taken: Iterable[str] = ()) -> None:
    """Raises UserError, with the nearest right word, where one of the arguments called `name` is none of the function's keywords.

    Those in `taken` are given from elsewhere and count as unknown.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY and each.name not in taken]
    for word in arguments:
        if word not in known:
            raise UserError(f"{name} has no argument '{word}'{nearest(word, known)}; there are {', '.join(known)}")


def check_share(name: str, value: float) -> None:
    """Raises UserError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise UserError(f"{name}={value}: must be in [0, 1)")


def check_heads(name: str, width: int, heads: int) -> None:
    """Raises UserError where `heads` do not divide the width called `name`."""
    if width % heads:
        raise UserError(f"{name}={width} is not a multiple of its {heads} heads")
