"""What a whole process costs, imports included, as the kernel reports it to its parent; and the machine it ran on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
cpu = usage.ru_utime + usage.ru_stime
cost = [time.perf_counter() - start, cpu, usage.ru_maxrss, usage.ru_oublock, os.waitstatus_to_exitcode(status)]
print("\\n" + json.dumps(cost))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One command that has ended."""

    exit_code: int
    """Negative: the number of the signal that ended it."""
    seconds: float
    cpu_seconds: float
    """Of all its threads and of the children it waited for."""
    peak_rss_gb: float
    """Of its largest process; pages of files that it mapped count too."""
    written_bytes: int
    """What it made the kernel write to disk, whatever became of the files."""
    stdout: str
    stderr: str

    @property
    def cost(self) -> dict[str, float]:
        """Name -> figure."""
        keys = ("seconds", "cpu_seconds", "peak_rss_gb")
        return {key: getattr(self, key) for key in keys}

    @property
    def complaint(self) -> str:
        """Last line of its error output that says something, without the colours of a terminal."""
        lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", self.stderr).splitlines()]
        return next((line for line in reversed(lines) if line and not line.startswith("hint:")), "no message")


def run_process(command: Sequence[str]) -> Process:
    """Runs a command to its end, whatever its exit code.

    Linux counts the memory of the process that forks in the peak of its child, even after the child's exec. So a small
    launcher starts the command: this process may be large by now.

    Raises:
        RuntimeError: it cannot be started.
    """
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, *command]
    done = subprocess.run(launcher, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"cannot run {command[0]}: {done.stderr.strip()[-400:]}")
    output, _, last = done.stdout.rstrip("\n").rpartition("\n")
    seconds, cpu, peak, blocks, code = json.loads(last)
    unit = 1 if sys.platform == "darwin" else 1024
    return Process(
        exit_code=code,
        seconds=round(seconds, 2),
        cpu_seconds=round(cpu, 2),
        peak_rss_gb=round(peak * unit / 1e9, 3),
        written_bytes=blocks * 512,
        stdout=output,
        stderr=done.stderr,
    )


def measure_process(command: Sequence[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak resident memory of one whole process, imports included.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    process = run_process(command)
    if process.exit_code:
        said = (process.stderr.strip() or process.stdout.strip())[-400:]
        raise RuntimeError(f"exit code {process.exit_code}: {said}")
    return process.cost


Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], arguments: tuple[Any, ...], kind: type[Result]) -> Result:
    """What a function of a module gives in a new process, of which it has the memory and the thread pools to itself.

    Raises:
        RuntimeError: it failed; with its reason.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(function, arguments, theirs))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = None
    process.join()
    if not isinstance(result, kind):
        raise RuntimeError(result or f"the process ended with exit code {process.exitcode}")
    return result


def _send_result(function: Callable[..., Any], arguments: tuple[Any, ...], connection: Connection) -> None:
    try:
        connection.send(function(*arguments))
    except Exception as err:  # noqa: BLE001 - a peer may raise anything; the parent reports it
        connection.send(f"{type(err).__name__}: {err}")


def machine() -> dict[str, Any]:
    """CPU model, cores, memory and load, as far as this platform tells."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def log(line: str) -> None:
    """Progress; stdout holds only the report."""
    print(line, file=sys.stderr, flush=True)
