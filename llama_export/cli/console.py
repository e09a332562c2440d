"""What commands print: data on stdout, log lines and progress bars on stderr."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import click

from llama_export._system.text import printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console


def show(data: Mapping[str, Any], view: Callable[[Any, Console], None], as_json: bool) -> None:
    """A document, or its view for a terminal."""
    if as_json:
        print_data(data, True, "")
    else:
        view(data, new_console())


def flat_lines(data: Any, prefix: str = "") -> Iterator[str]:
    """Nested data as ``a.b[0].c: value`` lines: grep finds the whole path."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from flat_lines(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        for index, item in enumerate(data):
            yield from flat_lines(item, f"{prefix}[{index}]")
    else:
        yield f"{prefix}: {json.dumps(data, ensure_ascii=False)}"


# ---- output and exit codes --------------------------------------------------------------------------------------


_live: Console | None = None
"""The console of a progress bar that is being shown: lines are printed above it."""


def log(line: str, label: str = "") -> None:
    """A line on stderr, above a progress bar if one is shown. Work goes on if nobody can read it.

    Args:
        label: stands before the line and may hold colours, which a terminal alone is given.
    """
    with contextlib.suppress(OSError):
        line = printable(line)
        if _live is not None:
            _live.print(click.unstyle(label) + line, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(label + line, err=True)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def print_data(data: Any, as_json: bool, text: str) -> None:
    click.echo(json_text(data) if as_json else printable(text))


def json_text(data: Any) -> str:
    """A document for stdout, in ASCII where stdout cannot hold more."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_unicode = codecs.lookup(encoding).name.startswith("utf")
    return printable_json(data) if is_unicode else json.dumps(data, indent=2)


def new_console(*, stderr: bool = False) -> Console:
    """A rich console that treats a closed pipe as every other writer does; rich's own ends the process with 1."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipeConsole(stderr=stderr)


@contextlib.contextmanager
def progress_bar(unit: Literal["bytes", "steps", "stages", "runs"]) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr while it is a terminal; nothing otherwise.

    One bar per name, for work that has several at a time; stages and runs follow each other and share one bar.
    """
    global _live
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeElapsedColumn())
    console = new_console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            key = unit if unit in ("stages", "runs") else name
            if key not in tasks:
                tasks[key] = bars.add_task(name, total=total)
            bars.update(tasks[key], description=name, completed=done, total=total)

        _live = console
        try:
            yield update
        finally:
            _live = None
