"""Text from files that somebody else made, made safe to print.

Role: below ``errors``. File names, JSON keys, tensor names and a model's output may hold characters that steer a
terminal, hide text or reorder it. Everything that this package prints passes through one of these functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_UNSAFE = re.compile(
    "["
    "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f"  # C0 without tab and newline, DEL, C1: escape sequences, carriage returns
    "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"  # the direction of text: what is read is not what is there
    "\\u200b\\u2060-\\u2064\\ufeff\\U000e0000-\\U000e007f"  # characters without a width: text that nobody sees
    "\\u2028\\u2029"  # line breaks of Unicode
    "\\ud800-\\udfff"  # lone surrogates: no encoding can write them
    "]"
)


def printable(text: str) -> str:
    """``text`` with unsafe characters written as escapes, such as ``\\x1b``. Newlines and tabs stay.

    The zero-width joiner and non-joiner stay too: emoji and several scripts need them.
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def terminal_text(text: str) -> str:
    """A model's output for a terminal: :func:`printable`, and carriage returns are left out."""
    return printable(text.replace("\r", ""))


def printable_json(data: Any) -> str:
    """``data`` as indented JSON in which unsafe characters are JSON escapes: a reader gets the same strings."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return _UNSAFE.sub(lambda found: found[0] if found[0] in "\n\t" else json.dumps(found[0])[1:-1], text)


def shortened(text: str, limit: int) -> str:
    """``text`` of at most about ``limit`` characters: its beginning, a note of how much is left out, and its end."""
    if len(text) <= limit:
        return text
    head, tail = limit * 3 // 4, limit // 4
    return f"{text[:head]} ... ({len(text) - head - tail:,} characters left out) ... {text[len(text) - tail :]}"


def printable_values(data: Any) -> Any:
    """JSON data in which every string, keys included, is printable and inert in rich's markup (``[bold]``)."""
    if isinstance(data, str):
        from rich.markup import escape

        return escape(printable(data))
    if isinstance(data, Mapping):
        return {printable_values(key): printable_values(value) for key, value in data.items()}
    return [printable_values(value) for value in data] if isinstance(data, list | tuple) else data
