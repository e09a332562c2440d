"""Kills exports and looks at what is left. Run by ``test_bundle.py`` in a process of its own, which imports torch once
and forks every export that is to die: ``python crash_points.py CHECKPOINT SCRATCH SEED`` prints JSON.

Two ways to die: by SIGKILL at a random moment of a whole export, and by any signal before the n-th operation that
changes the file system (seen by an audit hook), for every n.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_export import export
from llama_export.bundle import load_bundle
from llama_export.cli import main
from llama_export.errors import LlamaExportError

ORIGINALS = {
    name: getattr(export, name) for name in ("trace_program", "graph_from_program", "model_proto", "check_model")
}
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime")


def fork(action: Callable[[], int]) -> int:
    """Starts ``action`` in a child, silently; returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 70
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = action()
        os._exit(code)
    return pid


def finish(pid: int) -> int:
    """Exit code of a child; -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before_change(number: int, root: Path, by: signal.Signals = signal.SIGKILL) -> None:
    """Signals this process before its ``number``-th change below ``root``; with 0, lists them in ``root/changes``."""
    seen = 0
    log = os.open(root / "changes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if number == 0 else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not (writes or event in _CHANGES) or not str(arguments[0]).startswith(str(root)):
            return
        seen += 1
        if log is not None:
            os.write(log, f"{event} {Path(str(arguments[0])).name}\n".encode())
        elif seen == number:
            os.kill(os.getpid(), by)

    sys.addaudithook(hook)


def state(bundle: Path, before: bytes | None) -> str:
    """``absent``, ``old``, ``complete``, or what is wrong."""
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        return "absent"
    if before is not None and manifest.read_bytes() == before:
        name = "old"
    else:
        name = "complete"
    try:
        load_bundle(bundle)
    except LlamaExportError as err:
        return f"broken: {err}"
    return name


@contextlib.contextmanager
def scenario(name: str, checkpoint: Path, root: Path) -> Iterator[tuple[list[str], Path, bytes | None]]:
    """Arguments, where the bundle will be, and the manifest that is there before."""
    root.mkdir()
    source = root / "checkpoint"
    shutil.copytree(checkpoint, source)
    target = source if name == "in-place" else root / "new" / "out" if name == "new" else root / "out"
    arguments = ["export", str(source)] + ([] if name == "in-place" else ["-o", str(target), "--weights", "copy"])
    before = None
    if name == "replace":
        old = root.parent / "old-bundle"
        if not old.exists():
            assert finish(fork(lambda: main(["export", str(source), "-o", str(old), "--hash-weights"]))) == 0
        shutil.copytree(old, target)
        before = (target / "manifest.json").read_bytes()
        arguments.append("--force")
    try:
        yield arguments, target, before
    finally:
        shutil.rmtree(root)


def observe(
    name: str, arguments: list[str], target: Path, root: Path, before: bytes | None, killed: str
) -> dict[str, Any]:
    """What a killed export left, and what the next one makes of it."""
    found: dict[str, Any] = {"scenario": name, "killed": killed, "state": state(target, before)}
    found["weights"] = (root / "checkpoint" / "model.safetensors").read_bytes() == WEIGHTS
    found["partial"] = sum(1 for path in root.rglob(".llama-export-*"))
    # In place, renamed graphs without a manifest count as an export that exists.
    again = [*arguments, *(["--force"] if name == "in-place" and "--force" not in arguments else [])]
    if found["state"] == "complete" and name == "new":
        again.append("--force")
    found["next"] = finish(fork(lambda: main(again)))
    found["next_state"] = state(target, None)
    found["next_partial"] = [str(path.relative_to(root)) for path in root.rglob(".llama-export-*")]
    return found


def whole_export(arguments: list[str]) -> int:
    """With a trace of its own."""
    for name, function in ORIGINALS.items():
        setattr(export, name, function)
    return main(arguments)


def random_moments(checkpoint: Path, scratch: Path, rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Killed at random moments: ``count`` whole exports, and ``count`` that share a trace and so mostly write."""
    found: list[dict[str, Any]] = []
    root = scratch / "random"
    for run in (whole_export, main):
        duration = 0.0
        for number in range(count + 1):
            with scenario("new", checkpoint, root) as (arguments, target, before):
                start = time.perf_counter()
                pid = fork(lambda run=run, arguments=arguments: run(arguments))  # type: ignore[misc]
                if number == 0:
                    assert finish(pid) == 0
                    duration = time.perf_counter() - start
                    continue
                moment = rng.uniform(0.1, 1.1) * duration
                time.sleep(moment)
                os.kill(pid, signal.SIGKILL)
                code = finish(pid)
                found.append(observe("new", arguments, target, root, before, f"{moment:.3f} s ({code})"))
    return found


def every_change(checkpoint: Path, scratch: Path) -> list[dict[str, Any]]:
    """Exports of one cached graph, killed before each change of the file system."""
    found = []
    for name in ("new", "in-place", "replace"):
        root = scratch / name

        def run(number: int, arguments: list[str], root: Path = root) -> int:
            def action() -> int:
                die_before_change(number, root)
                return main(arguments)

            return finish(fork(action))

        with scenario(name, checkpoint, root) as (arguments, _, _):
            assert run(0, arguments) == 0
            changes = (root / "changes").read_text().splitlines()
        for number, change in enumerate(changes, start=1):
            with scenario(name, checkpoint, root) as (arguments, target, before):
                code = run(number, arguments)
                assert code == -signal.SIGKILL, (code, change)
                found.append(observe(name, arguments, target, root, before, f"{number} {change}"))
    return found


def polite_signals(checkpoint: Path, scratch: Path) -> list[dict[str, Any]]:
    """Signals that a program may handle, in the middle of the copy of the weights."""
    found = []
    for by in (signal.SIGTERM, signal.SIGINT):
        with scenario("new", checkpoint, scratch / "polite") as (arguments, _, _):
            before = sorted(str(path) for path in (scratch / "polite").rglob("*"))

            def action(by: signal.Signals = by, arguments: list[str] = arguments) -> int:
                die_before_change(6, scratch / "polite", by)
                try:
                    return main(arguments)
                except SystemExit as exit:
                    return exit.code if isinstance(exit.code, int) else 71

            code = finish(fork(action))
            after = sorted(str(path) for path in (scratch / "polite").rglob("*"))
            found.append({"signal": by.name, "code": code, "left": sorted(set(after) - set(before))})
    return found


def share_one_trace(checkpoint: Path) -> None:
    """Tracing and checking are most of an export's time, and not what is tested here."""
    config = export.load_checkpoint(checkpoint).config
    graph = export.graph_from_program(export.trace_program(config, "float32"), config, "causal-lm")
    protos: dict[str, Any] = {}
    make = export.model_proto

    def model_proto(graph: Any, opened: Any, dtype: str, target: Any) -> Any:
        if target not in protos:
            protos[target] = make(graph, opened, dtype, target)
        return protos[target]

    export.trace_program = lambda *_: None  # type: ignore[assignment, return-value]
    export.graph_from_program = lambda *_: graph  # type: ignore[assignment]
    export.model_proto = model_proto
    export.check_model = lambda proto: None
    opened = export.load_checkpoint(checkpoint)
    for target in ("standard", "onnxruntime"):
        model_proto(graph, opened, "float32", target)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    source, scratch, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    WEIGHTS = (source / "model.safetensors").read_bytes()
    share_one_trace(source)
    moments = random_moments(source, scratch, random.Random(seed), 4)
    changes, polite = every_change(source, scratch), polite_signals(source, scratch)
    print(json.dumps({"moments": moments, "changes": changes, "polite": polite}))
