"""Checks of arguments where they enter the package: wrong types are refused by a sentence that names the argument.

numpy's integers, floats and paths count as what they stand for. The functions return Python's own type.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import operator
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
    if not isinstance(text, str) or not text or "\0" in text or not _is_file_name(text):
        raise wrong_argument(name, value, "a path: text or pathlib.Path")
    return Path(text)


def _is_file_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def checked_text(value: object, name: str) -> str:
    """A text.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(value, str):
        raise wrong_argument(name, value, "a text")
    return str(value)


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


def check_fields(settings: Any) -> None:
    """Checks the types of the fields of a frozen dataclass of settings, and keeps Python's own types: for ``__post_init__``.

    Understands the annotations bool, int, str, Literal of texts, Path, ``tuple[str, ...]`` (any iterable of texts), each also
    with None. Which values are allowed is for the class to check.

    Raises:
        ConfigError: a field of another type.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        if value is None and type(None) in kinds:
            continue
        (kind,) = (one for one in kinds if one is not type(None))
        object.__setattr__(settings, field.name, _checked_field(value, field.name, kind))


def _checked_field(value: object, name: str, kind: Any) -> object:
    if kind is bool:
        return checked_bool(value, name)
    if kind is Path:
        return checked_path(value, name)
    if kind is int:
        number = whole_number(value)
        if number is None:
            raise wrong_argument(name, value, "an integer")
        return number
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return checked_text(value, name)
    if typing.get_origin(kind) is not tuple:
        raise TypeError(f"no check for {name}: {kind}")
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise wrong_argument(name, value, "texts, for example a list of them")
    return tuple(checked_text(item, name) for item in value)


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite number; an integer beyond the largest float is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_value(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise ConfigError(
            f"bad value for {name}: {got!r}", details={"got": repr(got), "expected": expected}, hint=f"correct {name}"
        )


def check_names(values: object, name: str) -> None:
    valid = isinstance(values, tuple) and all(isinstance(value, str) for value in values)
    check_value(valid, name, values, "names, as text")
