"""Output that nobody reads, or that a stream cannot hold, changes no exit code but 141; logs do not disturb a progress bar."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import NATIVE

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.engine.build import build_engine
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.pages import write_report
from llama_export.parity.validate import validate_bundle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine, and a report."""
    folder = tmp_path_factory.mktemp("output")
    shutil.copytree(tiny_bundles["float32"].folder, folder / "bundle", copy_function=shutil.copy2)
    bundle = load_bundle(folder / "bundle")
    engine = Path(build_engine(bundle, NATIVE).engine)
    for suffix in (".engine", ".json"):
        engine.with_suffix(suffix).rename(folder / "bundle" / "engines" / f"x{suffix}")
    write_report(validate_bundle(bundle, ValidateConfig(stages=("graph/rope",))), folder / "report")
    return folder


COMMANDS = {
    "inspect": ("inspect", "bundle"),
    "inspect engine": ("inspect", "bundle/engines/x.engine"),
    "report diff": ("report", "diff", "report", "report"),
    "validate": ("validate", "bundle", "--stages", "graph/rope", "--report", "new"),
    "bench": ("bench", "bundle", "--prompt-tokens", "8", "--new-tokens", "2", "--runs", "1"),
    "run": ("run", "bundle", "--tokens", "5,9", "--max-new-tokens", "3"),
    "env": ("env",),
}
QUICK = ("inspect engine", "report diff", "env")
every_command = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMMANDS]
)


def shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of shell, in which ``llama-export`` is the command of this tree."""
    command = f'llama-export() {{ {sys.executable} -m llama_export "$@"; }}\n{script}'
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=given, capture_output=True, check=False, timeout=300)


@every_command
def test_a_closed_pipe_is_141(name: str, folder: Path) -> None:
    done = shell(f"llama-export {' '.join(COMMANDS[name])} | true; exit ${{PIPESTATUS[0]}}", folder)
    assert done.returncode in (141, 0), done.stderr  # 0: all of it was in the pipe before the reader went
    gone = shell(
        f"(sleep 0.1; llama-export {' '.join(COMMANDS[name])}) 2>log | exec true; exit ${{PIPESTATUS[0]}}", folder
    )
    assert gone.returncode == 141, (folder / "log").read_text()
    assert "Traceback" not in (folder / "log").read_text()


@every_command
@pytest.mark.parametrize("closed", ["2>/dev/full", "2>&-", ">&-", "2>&- >&-"])
def test_a_stream_that_is_closed_or_full_does_not_stop_the_work(name: str, closed: str, folder: Path) -> None:
    done = shell(f"llama-export {' '.join(COMMANDS[name])} {closed}", folder)
    assert done.returncode == 0, done.stderr


@every_command
def test_a_full_stdout_is_this_machine(name: str, folder: Path) -> None:
    done = shell(f"llama-export {' '.join(COMMANDS[name])} >/dev/full", folder)
    assert done.returncode == 3, done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_text_that_stdout_cannot_hold_is_escaped(environment: dict[str, str], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "report", tmp_path / "größe", copy_function=shutil.copy2)
    plain = shell("llama-export report diff größe größe", tmp_path, **environment)
    assert plain.returncode == 0, plain.stderr
    missing = shell("llama-export inspect größe/kein --json", tmp_path, **environment)
    assert missing.returncode == 2, missing.stderr
    assert "/kein`" in json.loads(missing.stdout)["error"]["message"]


def test_a_working_directory_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell("cd gone && rmdir ../gone && llama-export inspect x", tmp_path)
    assert done.returncode == 2, done.stderr
    assert b"working directory does not exist" in done.stderr


@pytest.mark.parametrize("stated", ["yesterday", "9" * 30])
def test_a_source_date_epoch_that_is_no_time_is_a_sentence(
    stated: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", stated)
    assert main(["validate", str(folder / "bundle"), "--stages", "graph/rope", "--report", str(folder / "dated")]) == 2
    assert "SOURCE_DATE_EPOCH is not a time" in capsys.readouterr().err


def screen(arguments: tuple[str, ...], cwd: Path, columns: int) -> str:
    """What a command writes to a terminal, stdout and stderr alike."""
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover - another process
        os.environ |= {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm"}
        os.chdir(cwd)
        os.execv(sys.executable, [sys.executable, "-m", "llama_export", *arguments])
    written = b""
    while select.select([terminal], [], [], 120)[0]:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        written += block
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, written.decode()
    return written.decode()


def last_screen(written: str) -> list[str]:
    """The lines that stay: what is erased or overwritten in place is left out. Knows the sequences that rich writes."""
    lines: list[str] = [""]
    row = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif part == "\r":
            pass  # the texts that follow are whole lines
        elif part == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", part):
            row = max(0, row - int(part[2:-1] or 1))
        elif not part.startswith("\x1b"):
            lines[row] += part
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("columns", [80, 140])
def test_the_result_of_a_build_stays_on_the_terminal(columns: int, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bundle", tmp_path / "bundle", copy_function=shutil.copy2)
    lines = last_screen(screen(("build", "bundle", "--ops", "native", "--max-seq-len", "40"), tmp_path, columns))
    text = "\n".join(lines)
    assert "build: done in" in text
    assert "━" not in text, "no bar is left"
    assert lines[-1].endswith(".engine")


def test_a_bench_shows_that_it_runs(folder: Path) -> None:
    written = screen(("bench", "bundle", "--prompt-tokens", "8", "--new-tokens", "8", "--runs", "30"), folder, 100)
    assert "━" in written
    assert "━" not in "\n".join(last_screen(written))


def test_arguments_of_the_standard_streams_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of another kind, as a notebook has, is left alone."""
    out: Any = StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["env", "--json"]) == 0
    assert json.loads(out.getvalue())["python"]
