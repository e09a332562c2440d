"""Puts an escape sequence into every string of every JSON file, one at a time, and runs the commands on a terminal.

Part of ``scripts/mutate.py --escapes``. The terminal is a pseudo-terminal: what a file says must reach it escaped, while
rich's own colours may pass.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


PAYLOAD = "\x1b]0;owned\x07\x9b2J\u202e"
RAW = (b"\x1b]0;", b"\x07", "\x9b".encode(), "\u202e".encode())
"""What must not arrive."""
ESCAPED = b"\\x1b]0;"
"""How it arrives."""


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all strings and of all keys; a key's path ends with ``...``. Of an array's items the first stands for all."""
    if isinstance(data, str):
        yield path
    elif isinstance(data, dict):
        for key, value in list(data.items())[:40]:
            yield (*path, key, ...)
            yield from places(value, (*path, key))
    elif isinstance(data, list) and data:
        yield from places(data[0], (*path, 0))


def with_payload(data: Any, path: tuple[Any, ...]) -> Any:
    """A copy in which one string, or one key, ends with the payload."""
    data = copy.deepcopy(data)
    holder, is_key = data, path[-1] is ...
    *before, last = path[:-1] if is_key else path
    for step in before:
        holder = holder[step]
    if is_key:
        holder[last + PAYLOAD] = holder.pop(last)
    else:
        holder[last] += PAYLOAD
    return data


def on_terminal(command_line: Callable[[Sequence[str]], int], argv: list[str], stdin: bytes) -> bytes:
    """What a command prints on a pseudo-terminal."""
    end, terminal = os.openpty()
    reader, writer = os.pipe()
    os.write(writer, stdin)
    os.close(writer)
    pid = os.fork()
    if pid == 0:
        os.environ.pop("NO_COLOR", None)
        for number, stream in ((0, reader), (1, terminal), (2, terminal)):
            os.dup2(stream, number)
        code = 70
        try:
            code = command_line(argv)
            sys.stdout.flush()
        finally:
            os._exit(code)
    os.close(reader)
    os.close(terminal)
    printed = b""
    while True:
        try:
            block = os.read(end, 65536)
        except OSError:  # Linux's way to say that all writers are gone
            break
        if not block:
            break
        printed += block
    os.waitpid(pid, 0)
    os.close(end)
    return printed


def check(
    root: Path, kinds: Mapping[str, Any], command_line: Callable[[Sequence[str]], int], every: int
) -> tuple[int, int, list[str]]:
    """Runs every command on every damaged place, or on each ``every``-th.

    Args:
        root: what ``mutate.prepare`` made.
        kinds: name -> ``mutate.Kind``.
        command_line: ``llama_export.cli.main``.

    Returns:
        How many runs, in how many the sequence arrived escaped, and a line for each in which it arrived raw.
    """
    done, shown, raw, number = 0, 0, [], 0
    folder = root / "escaped"
    for kind, file, command in (
        (one, file, command)
        for one in kinds.values()
        for file in dict.fromkeys(file for file in one.files if file.endswith(".json"))
        for command in one.commands
    ):
        data = json.loads((root / kind.base / file).read_text())
        for place in places(data):
            number += 1
            if number % every:
                continue
            shutil.copytree(root / kind.base, folder)
            (folder / file).write_text(json.dumps(with_payload(data, place)))
            printed = on_terminal(command_line, [part.replace("{}", str(folder)) for part in command], kind.stdin)
            done += 1
            shown += ESCAPED in printed
            if any(part in printed for part in RAW):
                raw.append(f"{' '.join(command)}, {file}, {place}: {printed[-300:]!r}")
            shutil.rmtree(folder)
    return done, shown, raw
