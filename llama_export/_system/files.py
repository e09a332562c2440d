"""Files that somebody else made: read only if they are regular files, of a sane size, that lie where they are said to lie.

Role: below ``config``, ``checkpoint`` and ``bundle``, which put what is raised here into the project's own words. A
folder's author may be hostile: names lead elsewhere, a "file" is a pipe that is never written to or a device whose mere
opening has effects, JSON is huge, deep, or says a thing twice.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

_KINDS = (
    *((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")),
    *((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")),
)


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading, and nothing but a regular file: a pipe would wait, a device might do something.

    Raises:
        OSError: missing, not permitted, not a regular file, or a name that no file can have.
    """
    try:
        _check_kind(path, os.stat(path).st_mode)
        # Between two looks a name can become another thing: without O_NONBLOCK a pipe would wait here.
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except ValueError as err:  # a null byte, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have this name", repr(path)) from err
    try:
        _check_kind(path, os.fstat(stream.fileno()).st_mode)
    except OSError:
        stream.close()
        raise
    return stream


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "not a file")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def read_small(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; of a larger one nothing is read.

    Raises:
        OSError: see :func:`open_regular`; or it is larger.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, more than the {limit} that are read of such a file", str(path))
        return stream.read(size)


MAX_DEPTH = 64
"""Deepest nesting of JSON; the documents that are read here have 10 levels at most."""


def json_from_bytes(raw: bytes, *, strict: bool = False) -> Any:
    """Parses JSON that says everything once.

    Args:
        strict: refuse ``NaN`` and ``Infinity``, which Python reads and JSON does not have.

    Raises:
        ValueError: not UTF-8, not JSON, a key that stands twice in one object, or a string with a lone surrogate
            (``"\\ud800"``), which no file and no terminal can hold. RecursionError: nested too deep.
    """
    text = raw.decode("utf-8")
    data = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant if strict else None)
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [part for item in level if isinstance(item, dict | list) for part in _parts(item)]
    if level:
        raise RecursionError(f"nested deeper than {MAX_DEPTH} levels")
    if _SURROGATE.search(text) and not is_unicode(json.dumps(data, ensure_ascii=False)):
        raise ValueError("a string holds half of a surrogate pair, which is no character")
    return data


def _parts(item: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _refuse_constant(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that is half of a character; most stand in pairs."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:100]!r} stands twice in one object")
    return found


def is_unicode(text: str) -> bool:
    """False if it holds lone surrogates, which UTF-8 has not: half of a character, or a byte of the command line that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain_name(name: str) -> bool:
    """A file's name and nothing else: no path, no ``..``, nothing a terminal or a file system would read as more."""
    return Path(name).name == name and name not in ("", ".", "..") and "\\" not in name and name.isprintable()


def leads_out(path: Path, *, hub_cache: bool = False) -> str | None:
    """Where a path really lies, if that is outside its folder; None if it lies inside, or is not there.

    Args:
        path: may be a symbolic link; links that stay in the folder are nobody's business.
        hub_cache: allow one way out, that of Hugging Face's cache: from ``models--x/snapshots/<commit>/`` to a file
            directly in the same ``models--x/blobs/``.
    """
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    if real.is_relative_to(folder):
        return None
    if hub_cache and real.parent in _blobs(folder):
        return None
    return str(real)


def _blobs(folder: Path) -> list[Path]:
    """``models--x/snapshots/<commit>``, or a folder in it -> ``models--x/blobs``."""
    return [
        parent.parent / "blobs"
        for parent in folder.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
