"""The command line: exit codes, one JSON document, logs apart from data, and nothing heavy for ``--help``."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint
from support import check_refused, trace_once
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_export import __version__
from llama_export.bundle.bundle import Bundle
from llama_export.cli import views
from llama_export.cli.console import progress_bar
from llama_export.cli.main import main
from llama_export.engine import build as engine
from llama_export.engine.build import EngineResult
from llama_export.export.export import ExportResult
from llama_export.parity import validate
from llama_export.parity.report.result import ParityReport, Stage

Capture = pytest.CaptureFixture[str]
COMMANDS = (
    "export",
    "quantize",
    "build",
    "run",
    "chat",
    "validate",
    "verify",
    "reproduce",
    "report diff",
    "bench",
    "inspect",
    "plugins",
    "refit",
    "env",
)
HEAVY = (
    "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings",
    "polygraphy", "transformers", "matplotlib", "cuda", "numpy", "tokenizers", "rich", "jinja2",
)  # fmt: skip
ANSI = "\x1b["


@pytest.fixture(autouse=True)
def _restore_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def bundle(tiny_bundles: dict[str, Bundle]) -> Path:
    """Never modified."""
    return tiny_bundles["float32"].folder


@pytest.fixture
def text_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a tokenizer of 97 words: ``w0`` .. ``w96``."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    folder = Path(shutil.copytree(bundle, tmp_path / "text"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def document(text: str) -> Any:
    """The one JSON document that a command printed."""
    data, end = json.JSONDecoder().raw_decode(text)
    assert text[end:] == "\n"
    return data


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


# ---- help -------------------------------------------------------------------------------------------------------

BLOCKED = """
import importlib.abc, json, sys
heavy, runs = json.loads(sys.argv[1]), json.loads(sys.argv[2])
asked = []

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import contextlib, io
from llama_export.cli.main import main
found = []
for argv in runs:
    del asked[:]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(argv)
    found.append([code, out.getvalue(), err.getvalue(), list(asked)])
print(json.dumps(found))
"""


def run_without(modules: tuple[str, ...], *runs: list[str]) -> list[list[Any]]:
    """(exit code, stdout, stderr, blocked modules asked for) of each run, in one process without ``modules``."""
    done = run_script(BLOCKED, json.dumps(modules), json.dumps(runs))
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads(done.stdout)
    return found


def test_help_and_version_need_no_other_package() -> None:
    runs = [["--help"], ["-h"], ["--version"], *([*command.split(), "--help"] for command in COMMANDS)]
    for argv, (code, out, err, asked) in zip(runs, run_without(HEAVY, *runs), strict=True):
        assert (code, err, asked) == (0, "", []), argv
        assert out == f"llama-export, version {__version__}\n" if argv == ["--version"] else out.startswith("Usage: ")


def test_inspect_and_env_need_no_other_package(bundle: Path) -> None:
    inspected, env = run_without(HEAVY, ["inspect", str(bundle), "--json"], ["env", "--json"])
    assert (inspected[0], inspected[3]) == (0, [])
    assert document(inspected[1])["dtype"] == "float32"
    assert (env[0], env[3]) == (0, [])


def test_missing_package_is_exit_3_with_the_extra_to_install(make_checkpoint: MakeCheckpoint, bundle: Path) -> None:
    checkpoint = make_checkpoint()
    export, run, validate, build = run_without(
        ("torch", "onnxruntime", "tensorrt_rtx_bindings", "tensorrt_rtx"),
        ["export", str(checkpoint)],
        ["run", str(bundle), "--tokens", "1"],
        ["validate", str(bundle)],
        ["build", str(bundle)],
    )
    for (code, out, err, _), module, extra in (
        (export, "torch", "export"),
        (run, "onnxruntime", "cpu"),
        (validate, "torch", "export"),
        (build, "tensorrt_rtx", "tensorrt-rtx"),
    ):
        assert (code, out) == (3, ""), err
        assert f"error: the Python package `{module}" in err
        assert f"hint: in a clone of the llama-export repository: pip install '.[{extra}]'" in err
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


def test_help_lists_commands_and_exit_codes(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^  ([a-z]+)  ", out.split("Commands:")[1], re.MULTILINE) == sorted(
        command.split()[0] for command in COMMANDS
    )
    codes = dict(re.findall(r"^    (\d)  (.+)$", out.split("Exit codes:")[1], re.MULTILINE))
    assert {code: text.split(":")[0] for code, text in codes.items()} == {
        "0": "done; for `validate`", "1": "`validate`", "2": "your input", "3": "this machine", "4": "a bug in llama-export", "5": "`report diff`",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_its_argument_defaults_and_units(command: str, capsys: Capture) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--json" in out
    facts = {
        "export": [
            "CHECKPOINT",
            "[auto|float32|float16|bfloat16]",
            "[auto|link|copy|embed]",
            "[default: auto]",
            "-o, --output",
        ],
        "build": [
            "BUNDLE",
            "[tensorrt-rtx|tensorrt]",
            "[default: tensorrt-rtx]",
            "TOKENS",
            "ROWS",
            "[default: 4]",
            "[default: plugin]",
        ],
        "verify": ["BUNDLE", "--record", "--json"],
        "quantize": ["BUNDLE", "--type [int4|int8]", "[default: int4]", "--force"],
        "chat": ["BUNDLE", "--system TEXT", "--max-new-tokens TOKENS", "--quantize [int4|int8]"],
        "run": ["BUNDLE", "--tokens 1,2,3", "--prompt TEXT", "--max-new-tokens TOKENS", "[default: 64; x>=1]"],
        "validate": [
            "BUNDLE",
            "--steps TOKENS",
            "[default: 32; x>=1]",
            "--require NAME,...",
            "--text FILE",
            "--report DIR",
        ],
        "reproduce": ["CASE", "Exit code 1"],
        "report diff": ["OLD NEW", "--factor TIMES", "[default: 2.0; x>=1]", "--markdown FILE", "exit code 5"],
        "bench": ["BUNDLE", "--prompt-tokens TOKENS", "[default: 128; x>=1]"],
        "inspect": ["PATH"],
        "refit": ["ENGINE BUNDLE", "--weights input", "--force"],
        "plugins": ["[tensorrt-rtx|tensorrt]", "creators"],
        "env": ["versions"],
    }[command]
    for fact in facts:
        assert fact in out


def test_no_command_is_a_usage_error_that_shows_the_help(capsys: Capture) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Commands:" in captured.err


# ---- one JSON document on stdout, logs on stderr ----------------------------------------------------------------


def test_export_prints_the_keys_of_the_contract(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_once(monkeypatch)
    checkpoint = make_checkpoint()
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "out"), "--json", "--weights", "copy"]) == 0
    captured = capsys.readouterr()
    data = document(captured.out)
    assert list(data) == [
        "bundle", "model", "task", "dtype", "num_parameters", "weight_bytes_referenced", "weight_bytes_written",
        "seconds", "peak_rss_bytes", "estimate",
    ]  # fmt: skip
    assert data["bundle"] == str(tmp_path / "out")
    assert data["model"] == str(tmp_path / "out" / "model.onnx")
    assert (data["task"], data["dtype"]) == ("causal-lm", "float32")
    assert data["weight_bytes_referenced"] == 4 * data["num_parameters"]
    assert data["weight_bytes_written"] == (checkpoint / "model.safetensors").stat().st_size
    assert 0 < data["seconds"] < 600
    assert data["peak_rss_bytes"] > 1 << 20
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert lines.pop(0).startswith("export: about ")
    assert lines[0] == f"export: causal-lm, {data['num_parameters']:,} parameters, float32, 2 layers"
    assert lines[1].startswith("export: done in ")
    assert main(["export", str(checkpoint)]) == 0
    assert capsys.readouterr().out == f"{checkpoint}\n"
    assert list(data) == [field.name for field in dataclasses.fields(ExportResult)]


def test_run_prints_the_keys_of_the_contract(bundle: Path, capsys: Capture) -> None:
    assert main(["run", str(bundle), "--tokens", "1,2,3", "--max-new-tokens", "4", "--json"]) == 0
    captured = capsys.readouterr()
    data = document(captured.out)
    keys = [
        "tokens",
        "text",
        "prefill_seconds",
        "decode_tokens_per_second",
        "backend",
        "finish_reason",
        "logprobs",
        "seed",
    ]
    assert list(data) == keys
    ((*tokens,),) = data["tokens"]
    assert 1 <= len(tokens) <= 4  # new tokens only
    assert all(0 <= token < 97 for token in tokens)
    assert data["text"] == [None]
    assert data["backend"] == "onnxruntime-cpu"
    assert data["prefill_seconds"] > 0
    assert captured.err.startswith(f"run: {len(tokens)} tokens, prefill ")
    assert main(["run", str(bundle), "--tokens", "1,2,3", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == ",".join(map(str, tokens)) + "\n"
    assert main(["run", str(bundle), "--tokens", "1,2,3", "--max-new-tokens", "1", "--json"]) == 0
    data = document(capsys.readouterr().out)
    assert data["tokens"] == [tokens[:1]]
    assert data["decode_tokens_per_second"] is None


def test_run_continues_text(text_bundle: Path, capsys: Capture) -> None:
    command = ["run", str(text_bundle), "--max-new-tokens", "5"]
    assert main([*command, "--prompt", "w1 w2 w3", "--json"]) == 0
    data = document(capsys.readouterr().out)
    assert data["text"] == ["".join(f"w{token}" for token in data["tokens"][0])]
    assert main([*command, "--prompt", "w1 w2 w3"]) == 0
    assert capsys.readouterr().out == data["text"][0] + "\n"
    assert main([*command, "--tokens", "1,2,3", "--json"]) == 0
    assert document(capsys.readouterr().out)["tokens"] == data["tokens"]


def test_run_says_that_a_16_bit_bundle_is_widened(tiny_bundles: dict[str, Bundle], capsys: Capture) -> None:
    assert main(["run", str(tiny_bundles["bfloat16"].folder), "--tokens", "1", "--max-new-tokens", "1", "--json"]) == 0
    captured = capsys.readouterr()
    document(captured.out)
    assert "run: this bfloat16 bundle runs in float32 on a CPU" in captured.err


def test_bench_prints_medians(bundle: Path, capsys: Capture) -> None:
    command = ["bench", str(bundle), "--prompt-tokens", "8", "--new-tokens", "3", "--runs", "2", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    data = document(capsys.readouterr().out)
    assert (data["prompt_tokens"], data["new_tokens"], data["runs"]) == (8, 3, 2)
    for key in ("prefill_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
        assert 0 < data[key]["min"] <= data[key]["median"] <= data[key]["max"]
    assert 0 < data["token_seconds_p50"] <= data["token_seconds_p99"]
    manifest = json.loads((bundle / "manifest.json").read_text())["model"]
    stored = (bundle / "model.safetensors").read_bytes()
    weights = (
        len(stored) - 8 - int.from_bytes(stored[:8], "little") - 4 * manifest["vocab_size"] * manifest["hidden_size"]
    )
    cached = 4 * 2 * manifest["num_hidden_layers"] * manifest["num_key_value_heads"] * manifest["head_dim"] * (8 + 1)
    assert data["step_bytes"] == weights + cached
    share = data["decode_tokens_per_second"]["median"] * data["step_bytes"] / data["read_bytes_per_second"]
    assert data["bandwidth_share"] == pytest.approx(share)
    assert 0 < data["resident_bytes"] <= data["peak_rss_bytes"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "time to first token, ms" in captured.out
    assert "2 runs after a warm-up" in captured.out
    assert captured.err == ""


def test_env_prints_versions(capsys: Capture) -> None:
    assert main(["env", "--json"]) == 0
    data = document(capsys.readouterr().out)
    assert data["llama-export"] == __version__
    assert data["python"] == ".".join(map(str, sys.version_info[:3]))
    assert data["numpy"] == importlib.import_module("numpy").__version__
    assert main(["env"]) == 0
    assert f"llama-export: {__version__}\n" in capsys.readouterr().out


def test_build_prints_the_keys_of_the_contract(bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def build(opened: Bundle, config: Any, *, log: Any, progress: Any) -> EngineResult:
        seen.update(dataclasses.asdict(config), bundle=opened.folder)
        log("build: one stage")
        progress("phase", 1, 2)
        return EngineResult(
            engine="x.engine",
            backend=config.backend,
            ops="native",
            plugin_layers={},
            weights=config.weights,
            bytes=5,
            seconds=0.5,
            peak_rss_bytes=7,
            estimate={"seconds": 0.4, "ram_bytes": 6, "disk_bytes": 4},
        )

    monkeypatch.setattr(engine, "build_engine", build)
    options = ["--max-seq-len", "64", "--max-batch", "2", "--tf32", "--force", "--weights", "input", "--profiles", "1"]
    options += ["--compute-capability", "8.9", "--compute-capability", "12.0"]
    options += ["--ignore-estimate"]
    assert main(["build", str(bundle), *options, "--json"]) == 0
    captured = capsys.readouterr()
    assert document(captured.out) == {
        "engine": "x.engine", "backend": "tensorrt-rtx", "ops": "native", "plugin_layers": {}, "weights": "input", "bytes": 5,
        "seconds": 0.5, "peak_rss_bytes": 7, "estimate": {"seconds": 0.4, "ram_bytes": 6, "disk_bytes": 4},
    }  # fmt: skip
    assert captured.err == "build: one stage\n"
    assert seen == {
        "backend": "tensorrt-rtx", "ops": "plugin", "max_seq_len": 64, "max_batch": 2, "tf32": True, "force": True,
        "weights": "input", "profiles": 1, "compute_capabilities": ("8.9", "12.0"),
        "ignore_estimate": True, "bundle": bundle,
    }  # fmt: skip
    assert main(["build", str(bundle)]) == 0
    assert capsys.readouterr().out == "x.engine\n"


def test_a_command_leaves_no_signal_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["env"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_validate_without_matplotlib_has_a_verdict_and_a_page_without_figures(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["validate", str(bundle), "--stages", "onnxruntime/in-place", "--report", str(tmp_path)]) == 0
    page = (tmp_path / "parity.html").read_text()
    assert "No figures: they need matplotlib" in page
    assert "<svg" not in page


def test_validate_prints_the_report_and_says_where_it_is(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ["validate", str(bundle), "--stages", "onnxruntime/in-place", "--report", str(tmp_path / "report")]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    data = document(captured.out)
    assert data["verdict"] == "pass"
    ran = [stage["name"] for stage in data["stages"] if stage["verdict"] != "not-run"]
    assert ran == ["onnxruntime/in-place"]
    assert "validate: [1/1] onnxruntime/in-place: pass" in captured.err
    on_disk = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert on_disk["stages"] == data["stages"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith(f"report: {tmp_path / 'report' / 'parity.html'}")
    assert ANSI not in captured.out


@pytest.mark.parametrize("as_json", [True, False])
def test_failed_parity_is_exit_1_and_no_error(
    as_json: bool, bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ParityReport(
        stages=(Stage(name="graph/float64-eager", verdict="fail", reason="wrong"),), required=(), environment={},
        hashes={"graph": "0"}, model={"name": "tiny", "task": "causal-lm", "dtype": "float32"}, created_at="2026-01-01T00:00:00",
    )  # fmt: skip
    monkeypatch.setattr(validate, "validate_bundle", lambda *args, **kwargs: found)
    options = ["--report", str(tmp_path / "report"), *(["--json"] if as_json else [])]
    assert main(["validate", str(bundle), *options]) == 1
    captured = capsys.readouterr()
    assert "error" not in captured.err
    if as_json:
        assert document(captured.out)["verdict"] == "fail"


# ---- errors -----------------------------------------------------------------------------------------------------


def test_error_with_json_is_a_document_too(tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(tmp_path / "none"), "--json"]) == 2
    captured = capsys.readouterr()
    assert document(captured.out) == {
        "error": {
            "message": f"no folder `{tmp_path / 'none'}`",
            "details": {"expected": "a local checkpoint folder"},
            "hint": "check the path",
            "exit_code": 2,
        }
    }
    assert captured.err == (
        f"error: no folder `{tmp_path / 'none'}`\n  expected: a local checkpoint folder\n\nhint: check the path\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'BUNDLE'"),
        (["run", "b"], "give either --prompt TEXT (or --prompt-file FILE) or --tokens 1,2,3"),
        (
            ["run", "b", "--prompt", "x", "--tokens", "1"],
            "give either --prompt TEXT (or --prompt-file FILE) or --tokens 1,2,3",
        ),
        (["run", "b", "--tokens", "1", "--max-new-tokens", "0"], "0 is not in the range x>=1"),
        (["run", "b", "--tokens", "1", "--max-new-tokens", "many"], "'many' is not a valid integer range"),
        (["run", "b", "--tokens", "1", "--threads", "1000000"], "1000000 is not in the range 1<=x<=4096"),
        (["export", "c", "--dtype", "float64"], "'float64' is not one of 'auto', 'float32', 'float16', 'bfloat16'"),
        (["export", "c", "--weights", "move"], "'move' is not one of 'auto', 'link', 'copy', 'embed'"),
        (["export", "c", "--task", "translation"], "'translation' is not one of 'auto', 'causal-lm'"),
        (["build", "b", "--backend", "onnx"], "'onnx' is not one of 'tensorrt-rtx', 'tensorrt'"),
        (["export", "c", "--gpu"], "No such option"),
        (["plugin"], "No such command"),
    ],
)
def test_wrong_usage_is_exit_2_and_says_what_is_allowed(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: llama-export")
    assert message in captured.err
    assert "--help" in captured.err
    assert main([*arguments, "--json"]) == 2
    error = document(capsys.readouterr().out)["error"]
    assert error["exit_code"] == 2
    if arguments != ["plugin"]:
        assert message in error["message"]


@pytest.mark.parametrize("as_json", [True, False])
def test_unexpected_exception_is_exit_4_with_a_traceback(
    as_json: bool, bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(views, "load_bundle", fail)
    assert main(["inspect", str(bundle), *(["--json"] if as_json else [])]) == 4
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert "ZeroDivisionError: a bug" in captured.err
    assert "please report it with the output of `llama-export env`" in captured.err
    if as_json:
        error = document(captured.out)["error"]
        assert (error["message"], error["exit_code"]) == ("ZeroDivisionError: a bug", 4)
    else:
        assert captured.out == ""


def test_interrupt_is_exit_130(bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(views, "load_bundle", interrupt)
    assert main(["inspect", str(bundle)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_module_returns_its_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama_export", "inspect", tmp_path, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert document(done.stdout)["error"]["details"] == {"missing": "manifest.json", "got": "an empty folder"}
    assert done.stderr.startswith(f"error: `{tmp_path}` is not a bundle\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_behind_stdout_is_exit_3() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llama_export", "env", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 3
    assert done.stderr.startswith("error: cannot access `stdout`: No space left on device\n\nhint: ")


def test_closed_pipe_behind_stdout_is_neither_success_nor_failed_parity(bundle: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llama_export", "inspect", bundle]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# ---- colour -----------------------------------------------------------------------------------------------------


def error_on_a_terminal(**environment: str) -> str:
    """What a terminal gets to see of an error."""
    controller, terminal = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
    command = [sys.executable, "-m", "llama_export", "inspect", "/nowhere"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=env, check=False)
    finally:
        os.close(terminal)
    text = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert (done.returncode, done.stdout) == (2, b"")
    return text.replace("\r\n", "\n")


def test_errors_are_coloured_on_a_terminal_unless_no_color_is_set() -> None:
    plain = "error: no folder `/nowhere`\n  expected: the folder of a bundle\n\nhint: "
    coloured = error_on_a_terminal()
    assert ANSI in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).startswith(plain)
    assert error_on_a_terminal(NO_COLOR="1").startswith(plain)
    assert ANSI not in error_on_a_terminal(NO_COLOR="1")
    assert ANSI in error_on_a_terminal(NO_COLOR="")  # https://no-color.org: only when it is not empty


@pytest.mark.parametrize("argv", [["inspect", "/nowhere"], ["run"], ["--help"], ["env"]], ids=lambda argv: argv[0])
def test_nothing_is_coloured_where_nobody_sees_it(argv: list[str]) -> None:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        main(argv)
    assert ANSI not in out.getvalue() + err.getvalue()


def test_progress_is_shown_on_a_terminal_only(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_bar("bytes") as update:
        update("model.safetensors", 5, 10)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("bytes") as update:
        update("model.safetensors", 5, 10)
        update("model.safetensors", 10, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "model.safetensors" in captured.err


# ---- requests a bundle cannot serve -----------------------------------------------------------------------------


@pytest.mark.parametrize("token", [97, -1, 2**31, 2**63, 10**30])
def test_token_outside_the_vocabulary_is_refused(token: int, bundle: Path, capsys: Capture) -> None:
    check_refused(
        capsys, bundle, ["run", bundle, f"--tokens=1,{token}"], f"token id {token} is outside the vocabulary",
        f"got:      {token}", "expected: 0..96", "another model's tokenizer",
    )  # fmt: skip


@pytest.mark.parametrize("tokens", ["", "1,,2", "1 2", "a", "1.5", "1,2,"])
def test_tokens_that_are_no_list_of_integers_are_refused(tokens: str, bundle: Path, capsys: Capture) -> None:
    check_refused(
        capsys,
        bundle,
        ["run", bundle, "--tokens", tokens],
        f"--tokens is not a list of integers: {tokens!r}",
        "expected: 1,2,3",
    )


def test_prompt_beyond_the_models_positions_is_refused(bundle: Path, capsys: Capture) -> None:
    prompt = ",".join(["1"] * 120)
    check_refused(
        capsys, bundle, ["run", bundle, "--tokens", prompt, "--max-new-tokens", "10"],
        "prompt and new tokens need 129 positions, the model has 128", "prompt:           120 tokens",
        "max_new_tokens:   10", "longest sequence: 128", "lower --max-new-tokens",
    )  # fmt: skip
    assert main(["run", str(bundle), "--tokens", prompt, "--max-new-tokens", "9", "--json"]) == 0
    assert len(document(capsys.readouterr().out)["tokens"][0]) <= 9


def test_prompt_beyond_the_capacity_is_refused(bundle: Path, capsys: Capture) -> None:
    check_refused(
        capsys, bundle, ["run", bundle, "--tokens", "1,2,3,4,5", "--max-seq-len", "8", "--max-new-tokens", "5"],
        "need a cache of 9 tokens, this one holds 8", "prompt:            5 tokens", "kv_cache_capacity: 8", "raise --max-seq-len",
    )  # fmt: skip
    assert main(["run", str(bundle), "--tokens", "1,2,3,4,5", "--max-seq-len", "8", "--max-new-tokens", "4"]) == 0


def test_capacity_beyond_the_models_positions_is_refused(bundle: Path, capsys: Capture) -> None:
    check_refused(
        capsys, bundle, ["run", bundle, "--tokens", "1", "--max-seq-len", "129"], "a cache of 1 rows of 129 tokens",
        "1 to 128 tokens, the model's longest sequence", "another --max-seq-len",
    )  # fmt: skip


def test_bench_beyond_the_models_positions_is_refused(bundle: Path, capsys: Capture) -> None:
    check_refused(capsys, bundle, ["bench", bundle], "need 191 positions, the model has 128", "longest sequence: 128")


def test_prompt_needs_a_tokenizer(bundle: Path, capsys: Capture) -> None:
    check_refused(
        capsys, bundle, ["run", bundle, "--prompt", "w1"], "`tokenizer.json` is missing", str(bundle), "--tokens 1,2,3"
    )


def test_empty_prompt_is_refused(text_bundle: Path, capsys: Capture) -> None:
    check_refused(
        capsys, text_bundle, ["run", text_bundle, "--prompt", ""], "nothing to continue", "prompt lengths: [0]",
        "at least one token",
    )  # fmt: skip


def test_prompt_that_is_not_utf8_is_refused(text_bundle: Path, capsys: Capture) -> None:
    prompt = os.fsdecode(b"w1 \xff")
    check_refused(
        capsys, text_bundle, ["run", text_bundle, "--prompt", prompt], "not UTF-8", r"got: 'w1 \udcff'", "encoding"
    )


def test_text_token_outside_the_models_vocabulary_is_refused(text_bundle: Path, capsys: Capture) -> None:
    data = json.loads((text_bundle / "tokenizer.json").read_text())
    data["model"]["vocab"]["extra"] = 105
    (text_bundle / "tokenizer.json").write_text(json.dumps(data))
    check_refused(
        capsys,
        text_bundle,
        ["run", text_bundle, "--prompt", "w1 extra"],
        "token id 105 is outside the vocabulary",
        "0..96",
    )
