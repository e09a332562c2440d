"""Checks of arguments where they enter the package: wrong types are refused by a sentence that names the argument.

numpy's integers, floats and paths count as what they stand for. The functions return Python's own type.
"""

from __future__ import annotations

import difflib
import numbers
import operator
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from llama_export.errors import ConfigError


def checked_path(value: object, name: str) -> Path:
    """A path, from text or an ``os.PathLike`` of text.

    Raises:
        ConfigError: anything else.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str) or "\0" in text:
        raise wrong_argument(name, value, "a path: text or pathlib.Path")
    return Path(text)


def checked_int(value: object, name: str, *, least: int = 1, most: int | None = None) -> int:
    """An integer of at least ``least`` and at most ``most``.

    Raises:
        ConfigError: another type (a bool, a float, text), or out of range.
    """
    number = whole_number(value)
    if number is None or number < least or (most is not None and number > most):
        raise wrong_argument(name, value, f"an integer >= {least}" if most is None else f"an integer, {least}..{most}")
    return number


def checked_bool(value: object, name: str) -> bool:
    """True or false.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(value, bool):
        raise wrong_argument(name, value, "True or False")
    return value


def whole_number(value: object) -> int | None:
    """An ``int``, or an integer of numpy or torch, as an ``int``; None for anything else, bools included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def finite_number(value: object) -> int | float | None:
    """A finite real number that a float can hold, as an ``int`` or a ``float``; None for anything else, bools included."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not abs(number) <= sys.float_info.max:
        return None
    return int(value) if isinstance(value, numbers.Integral) else number


def wrong_argument(name: str, got: object, expected: str, hint: str | None = None) -> ConfigError:
    """The error for an argument of another type or value."""
    shown = repr(got)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return ConfigError(
        f"bad value for {name}: {shown}",
        details={"argument": name, "got": f"{shown}, a {type(got).__name__}", "expected": expected},
        hint=hint or f"correct the argument {name}",
    )


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be; None where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
