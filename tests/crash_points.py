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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llama_export._system import commit as _commit
from llama_export.bundle.bundle import load_bundle
from llama_export.cli.main import main
from llama_export.engine import build as engine
from llama_export.errors import LlamaExportError
from llama_export.export import export, trace

ORIGINALS = {
    (trace, "trace_program"): trace.trace_program,
    (trace, "graph_from_program"): trace.graph_from_program,
    (export, "model_proto"): export.model_proto,
    (export, "check_model"): export.check_model,
}
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.utime", "exchange")


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

    exchange = _commit.exchange

    def audited_exchange(left: Path, right: Path) -> bool:
        sys.audit("exchange", left)
        return exchange(left, right)

    _commit.exchange = audited_exchange  # Python has no event for it
    sys.addaudithook(hook)


@dataclass(frozen=True)
class Scenario:
    """An export, or the writing of an engine, that is to be killed."""

    name: str
    root: Path
    target: Path
    run: Callable[[], int]
    again: Callable[[], int]
    """The same after a kill, when its own result may be there."""

    def state(self) -> str:
        """``absent``, ``old``, ``complete``, or what is wrong: as the next command finds it."""
        if self.name.startswith("engine"):
            return self._engine_state()
        try:
            bundle = load_bundle(self.target)
        except LlamaExportError as err:
            return "absent" if "is not a bundle" in str(err) or "no folder" in str(err) else f"broken: {err}"
        name = "old" if bundle.dtype == "float16" else "complete"
        there = {path.name for path in self.target.iterdir() if not path.name.endswith(".partial")}
        wanted = {"config.json", "model.safetensors", "model.onnx", "model.onnxruntime.onnx", "manifest.json"}
        if self.name == "in-place-over" or name == "old":
            wanted.add("engines")  # of the old bundle: it goes with it, and stays where only files are replaced
        return name if there == wanted else f"broken: {there}"

    def _engine_state(self) -> str:
        engines = load_bundle(self.target.parents[1]).engines
        if not engines:
            return "absent"
        stated = json.loads(self.target.with_suffix(".json").read_text())["content"]
        there = {path.name for path in self.target.parent.iterdir() if not path.name.endswith(".partial")}
        same = engines == [self.target] and self.target.read_bytes() == stated.encode() * 1000
        return {"old": "old", "new": "complete"}[stated] if same and len(there) == 2 else f"broken: {there}"


def write_engine(target: Path, content: str) -> int:
    """What ``build`` does last."""
    sidecar: Any = SimpleNamespace(
        to_json=lambda: {"content": content}
    )  # what is written of it is all that matters here
    bundle = load_bundle(target.parents[1])
    with engine.engine_staging(target) as staged:
        staged.write_bytes(content.encode() * 1000)
        engine.write_sidecar(staged, sidecar)
        engine.commit_engine(staged, bundle)
    return 0


def made_once(folder: Path, make: Callable[[Path], int]) -> Path:
    """What a scenario starts from."""
    if not folder.exists():
        assert finish(fork(lambda: make(folder))) == 0
    return folder


@contextlib.contextmanager
def scenario(name: str, checkpoint: Path, scratch: Path) -> Iterator[Scenario]:
    """One of :data:`SCENARIOS`, from its beginning."""
    root = scratch / name
    root.mkdir()
    source, out = root / "checkpoint", root / "out"
    in_place, replaces = name.startswith("in-place"), name.startswith("replace")

    def old(folder: Path) -> int:
        """A bundle that differs in every file but the weights, with engines."""
        restore()
        where = [str(folder)] if in_place else [str(checkpoint), "-o", str(folder)]
        if in_place:
            shutil.copytree(checkpoint, folder)
        code = main(["export", *where, "--dtype", "float16", "--hash-weights"])
        (folder / "engines").mkdir()
        return code

    if name == "in-place-over":
        shutil.copytree(made_once(scratch / "old-in-place", old), source)
    else:
        shutil.copytree(checkpoint, source)
    if name.startswith("engine"):
        bundle = made_once(scratch / "bundle", lambda folder: main(["export", str(checkpoint), "-o", str(folder)]))
        shutil.copytree(bundle, out)
        target = out / "engines" / "float32.engine"
        if name == "engine-over":
            write_engine(target, "old")
        made = Scenario(name, root, target, lambda: write_engine(target, "new"), lambda: write_engine(target, "new"))
    else:
        if replaces:
            shutil.copytree(made_once(scratch / "old-bundle", old), out)
        target = source if in_place else out if replaces else root / "new" / "out"
        export_it = ["export", str(source), *([] if in_place else ["-o", str(target), "--weights", "copy"])]
        force = ["--force"] if replaces or name == "in-place-over" else []

        def again() -> int:
            return main([*export_it, *(["--force"] if (target / "manifest.json").exists() else [])])

        made = Scenario(name, root, target, lambda: main([*export_it, *force]), again)
    try:
        yield made
    finally:
        shutil.rmtree(root)


SCENARIOS = ("new", "in-place", "in-place-over", "replace", "replace-without-exchange", "engine", "engine-over")


def observe(made: Scenario, killed: str) -> dict[str, Any]:
    """What a kill left, and what the next command makes of it."""
    found: dict[str, Any] = {"scenario": made.name, "killed": killed}
    found["partial"] = sum(1 for path in made.root.rglob(".llama-export-*"))
    found["pending"] = sum(1 for path in made.root.rglob(_commit.COMMIT_NAME))
    found["state"] = made.state()
    found["weights"] = (made.root / "checkpoint" / "model.safetensors").read_bytes() == WEIGHTS
    found["next"] = finish(fork(made.again))
    found["next_state"] = made.state()
    found["next_partial"] = [str(path.relative_to(made.root)) for path in made.root.rglob(".llama-export*")]
    return found


def restore() -> None:
    """The next export has a trace of its own."""
    for (module, name), function in ORIGINALS.items():
        setattr(module, name, function)


def random_moments(checkpoint: Path, scratch: Path, rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Killed at random moments: ``count`` whole exports, and ``count`` that share a trace and so mostly write."""
    found: list[dict[str, Any]] = []
    for prepare in (restore, lambda: None):
        duration = 0.0
        for number in range(count + 1):
            with scenario("new", checkpoint, scratch) as made:

                def action(made: Scenario = made, prepare: Callable[[], None] = prepare) -> int:
                    prepare()
                    return made.run()

                start = time.perf_counter()
                pid = fork(action)
                if number == 0:
                    assert finish(pid) == 0
                    duration = time.perf_counter() - start
                    continue
                moment = rng.uniform(0.1, 1.1) * duration
                time.sleep(moment)
                os.kill(pid, signal.SIGKILL)
                code = finish(pid)
                found.append(observe(made, f"{moment:.3f} s ({code})"))
    return found


def every_change(checkpoint: Path, scratch: Path) -> list[dict[str, Any]]:
    """Exports of one cached graph, and writes of an engine, killed before each change of the file system."""
    found = []
    for name in SCENARIOS:

        def run(made: Scenario, number: int) -> int:
            def action() -> int:
                if made.name == "replace-without-exchange":
                    _commit.exchange = lambda left, right: False
                die_before_change(number, made.root)
                return made.run()

            return finish(fork(action))

        with scenario(name, checkpoint, scratch) as made:
            assert run(made, 0) == 0
            changes = (made.root / "changes").read_text().splitlines()
        for number, change in enumerate(changes, start=1):
            with scenario(name, checkpoint, scratch) as made:
                code = run(made, number)
                assert code == -signal.SIGKILL, (code, change)
                found.append(observe(made, f"{number} {change}"))
    return found


def polite_signals(checkpoint: Path, scratch: Path) -> list[dict[str, Any]]:
    """Signals that a program may handle, in the middle of the copy of the weights."""
    found = []
    for by in (signal.SIGTERM, signal.SIGINT):
        with scenario("new", checkpoint, scratch) as made:
            before = sorted(str(path) for path in made.root.rglob("*"))

            def action(by: signal.Signals = by, made: Scenario = made) -> int:
                die_before_change(6, made.root, by)
                return made.run()

            code = finish(fork(action))
            after = sorted(str(path) for path in made.root.rglob("*"))
            found.append({"signal": by.name, "code": code, "left": sorted(set(after) - set(before))})
    return found


def share_one_trace(checkpoint: Path) -> None:
    """Tracing and checking are most of an export's time, and not what is tested here."""
    config = export.load_checkpoint(checkpoint).config
    graph = trace.graph_from_program(trace.trace_program(config, "float32"), config, "causal-lm")
    protos: dict[str, Any] = {}
    make = export.model_proto

    def model_proto(graph: Any, opened: Any, dtype: str, target: Any) -> Any:
        if target not in protos:
            protos[target] = make(graph, opened, dtype, target)
        return protos[target]

    trace.trace_program = lambda *_: None  # type: ignore[assignment, return-value]
    trace.graph_from_program = lambda *_: graph  # type: ignore[assignment]
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
