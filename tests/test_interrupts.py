"""Ctrl-C and SIGTERM end each command within two seconds, with 130 or 143, and leave the old files or the new ones."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import NATIVE, TINY
from fault_catalogue import inject
from random_llama import write_random_checkpoint
from support import heed_ctrl_c

from llama_export._system.interrupt import deferred
from llama_export.bundle.bundle import load_bundle
from llama_export.config.settings import ExportConfig
from llama_export.engine.build import build_engine
from llama_export.engine.check import check_engine
from llama_export.export.export import export_checkpoint
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.pages import write_report
from llama_export.parity.validate import validate_bundle

LATENCY = 2.0
"""Seconds from the signal to the end of the process."""
STARTING = 0.4
"""Seconds in which Python may not have come to our handlers yet: it then ends the process by the signal itself."""
MOMENTS = 20
TRIES = 3
"""A moment is tried again if the process was late: on a busy machine it may not have been given a processor."""
WHOLE_GRAPH = ("graph/float64-bodies", "onnxruntime/prefill", "evaluator/bfloat16")


@dataclass(frozen=True)
class Command:
    """A command line over a copy of the workshop."""

    arguments: tuple[str, ...]
    stdin: str | None = None
    is_complete: Callable[[Path], object] = lambda folder: None
    """Raises if what the command makes is not there as a whole."""


def _new_engine(folder: Path) -> None:
    bundle = load_bundle(folder / "bundle")
    (made,) = (path for path in bundle.engines if "c40" in path.name)
    check_engine(bundle, made)


def _refitted(folder: Path) -> None:
    (made,) = load_bundle(folder / "tune").engines
    check_engine(load_bundle(folder / "tune"), made)


COMMANDS = {
    "export": Command(
        ("export", "checkpoint", "-o", "new/out"), is_complete=lambda at: load_bundle(at / "new" / "out")
    ),
    "export in place": Command(("export", "checkpoint"), is_complete=lambda at: load_bundle(at / "checkpoint")),
    "quantize": Command(
        ("quantize", "bundle"), is_complete=lambda at: load_bundle(at / "bundle").variant_path("int4").stat()
    ),
    "build": Command(("build", "bundle", "--ops", "native", "--max-seq-len", "40"), is_complete=_new_engine),
    "build with plugins": Command(("build", "bundle", "--max-seq-len", "40"), is_complete=_new_engine),
    "refit": Command(("refit", "bundle/engines/input.engine", "tune"), is_complete=_refitted),
    "run": Command(("run", "bundle", "--tokens", "5,9,11", "--max-new-tokens", "100", "--ignore-eos")),
    "validate": Command(("validate", "bundle", "--stages", ",".join(WHOLE_GRAPH))),
    "bench": Command(("bench", "bundle", "--prompt-tokens", "16", "--new-tokens", "64", "--runs", "20")),
    "inspect": Command(("inspect", "bundle")),
    "reproduce": Command(("reproduce", "case")),
    "report diff": Command(("report", "diff", "report", "report")),
    "plugins": Command(("plugins",)),
    "env": Command(("env",)),
    "chat": Command(("chat", "bundle", "--max-new-tokens", "60", "--temperature", "0"), stdin="hello\n" * 20),
}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a bundle with an engine that takes weights, another fine-tune, a report and a saved case."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(Path(__file__).parents[1] / "examples" / "tiny-llama", folder / "checkpoint")
    write_random_checkpoint(folder / "random", TINY, lively=True)
    export_checkpoint(folder / "checkpoint", folder / "bundle", ExportConfig(weights="copy"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    stated = json.loads((folder / "bundle" / "tokenizer_config.json").read_text())
    (folder / "bundle" / "tokenizer_config.json").write_text(json.dumps({**stated, "chat_template": template}))
    built = build_engine(load_bundle(folder / "bundle"), dataclasses.replace(NATIVE, weights="input"))
    for suffix in (".engine", ".json"):
        path = Path(built.engine).with_suffix(suffix)
        path.rename(path.with_name(f"input{suffix}"))
    export_checkpoint(folder / "checkpoint", folder / "tune", ExportConfig(weights="copy"))
    random = Path(export_checkpoint(folder / "random", folder / "faulty", ExportConfig(weights="copy")).bundle)
    write_report(validate_bundle(load_bundle(random), ValidateConfig(stages=("graph/rope",))), folder / "report")
    inject(load_bundle(random), "weight: one exponent bit flipped", np.random.default_rng(1))
    config = ValidateConfig(stages=("graph/float64-bodies",), cases=folder / "cases")
    validate_bundle(load_bundle(random, ignore_hashes=True), config)
    (folder / "cases" / "graph-float64-bodies").rename(folder / "case")
    for name in ("cases", "random", "faulty"):
        shutil.rmtree(folder / name)
    return folder


def start(command: Command, folder: Path) -> subprocess.Popen[str]:
    """The real command, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_export", *command.arguments], cwd=folder, text=True, preexec_fn=heed_ctrl_c,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


def seconds_of(command: Command, workshop: Path, scratch: Path) -> float:
    """How long the command takes if it is left alone."""
    shutil.copytree(workshop, scratch)
    begin = time.perf_counter()
    process = start(command, scratch)
    _, log = process.communicate(command.stdin, timeout=300)
    assert process.returncode in (0, 1), log
    command.is_complete(scratch)
    shutil.rmtree(scratch)
    return time.perf_counter() - begin


def interrupt(command: Command, folder: Path, after: float, by: signal.Signals) -> float:
    """Signals the command once; checks all but the latency, which is returned."""
    process = start(command, folder)
    begin = time.perf_counter()
    assert process.stdin is not None
    process.stdin.write(command.stdin or "")
    process.stdin.close()
    process.stdin = None
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(by)
    signalled = time.perf_counter()
    try:
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    latency = time.perf_counter() - signalled
    context = f"{command.arguments} {by.name} after {signalled - begin:.2f} s: {process.returncode}\n{log}"
    if process.returncode in (0, 1):  # it had finished, or came to its end before it saw the signal
        command.is_complete(folder)
    elif process.returncode == -by:
        assert after < STARTING, context
    else:
        assert process.returncode == 128 + by, context
        assert "Traceback" not in log, context
        assert "CUDA" not in log, context
    hidden = [path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]
    assert hidden == [], context
    return latency


def check_moment(command: Command, workshop: Path, scratch: Path, after: float, by: signal.Signals) -> None:
    """One interruption of a fresh copy; what is left is as it was, or as the command makes it."""
    for _ in range(TRIES):
        shutil.copytree(workshop, scratch)
        latency = interrupt(command, scratch, after, by)
        new = {str(path.relative_to(scratch)) for path in scratch.rglob("*")}
        old = {str(path.relative_to(workshop)) for path in workshop.rglob("*")}
        report = {name for name in new if name.startswith("bundle/report")}
        if new - report != old:
            command.is_complete(scratch)
        load_bundle(scratch / "bundle")
        shutil.rmtree(scratch)
        if latency <= LATENCY:
            return
    raise AssertionError(
        f"{command.arguments}: {by.name} after {after:.2f} s took {latency:.1f} s, and as long {TRIES} times"
    )


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(("name", "moments"), [("build", 3), ("export", 2), ("validate", 2)])
def test_a_command_ends_when_it_is_told_to(name: str, moments: int, workshop: Path, tmp_path: Path) -> None:
    command = COMMANDS[name]
    duration = seconds_of(command, workshop, tmp_path / "whole")
    for index in range(moments):
        check_moment(
            command, workshop, tmp_path / "cut", duration * (index + 0.8) / (moments + 0.5), SIGNALS[index % 2]
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_at_every_moment(name: str, workshop: Path, tmp_path: Path) -> None:
    command = COMMANDS[name]
    duration = seconds_of(command, workshop, tmp_path / "whole")
    for index in range(MOMENTS):
        after = duration * (index + 0.5) / MOMENTS
        check_moment(command, workshop, tmp_path / "cut", after, SIGNALS[index % 2])


def test_a_deferred_signal_is_handled_when_the_block_ends() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), deferred() as signalled:  # noqa: PT012 - what follows the signal must run
        signal.raise_signal(signal.SIGINT)
        reached = bool(signalled)
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_a_destructor_loses_is_raised_again(tmp_path: Path) -> None:
    program = """
import signal, time
from llama_export._system.interrupt import watched
class Lost:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)
with watched():
    try:
        Lost()
        time.sleep(30)
    except KeyboardInterrupt:
        print("raised", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "raised\n", "")


def test_a_process_that_c_code_holds_is_ended(tmp_path: Path) -> None:
    """The main thread never comes back to Python; what is unfinished is removed all the same."""
    program = """
import ctypes, pathlib, sys
from llama_export._system.commit import staging_folder
from llama_export._system.interrupt import watched
with watched(), staging_folder(pathlib.Path(sys.argv[1])) as staging:
    (staging / "half").write_text("half")
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
    ctypes.CDLL(None).sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, lambda *_: None)\n" + program, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        begin = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
    assert (process.returncode, log) == (130, "interrupted\n")
    assert time.perf_counter() - begin < 10
    assert list(tmp_path.iterdir()) == []
