"""Files of strangers: what they say reaches a terminal escaped and at readable length, and what they are is checked first."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import check_refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import llama_export
from llama_export._system.files import MAX_DEPTH, json_from_bytes
from llama_export._system.text import printable, printable_json, printable_values, shortened, terminal_text
from llama_export.bundle.bundle import Bundle
from llama_export.cli.main import main
from llama_export.errors import MAX_MESSAGE, MAX_VALUE, MAX_VALUES, ConfigError
from llama_export.parity.report.reading import report_from_json
from llama_export.parity.report.wording import prose
from llama_export.runtime import text as text_module
from llama_export.runtime.text import TextCodec

ROOT = Path(llama_export.__file__).parents[1]
Capture = pytest.CaptureFixture[str]


# ---- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x9b2J", "\\x1b[31mred\\x9b2J"),
        ("a\rb\x00\x7f", "a\\rb\\x00\\x7f"),
        ("\ud800", "\\ud800"),
        ("evil\u202etxt.exe\u2066", "evil\\u202etxt.exe\\u2066"),
        ("in\u200bvisible\ufeff\U000e0041", "in\\u200bvisible\\ufeff\\U000e0041"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("é世👩🏽‍🚀 नमस्ते می‌خواهم", "é世👩🏽‍🚀 नमस्ते می‌خواهم"),
    ],
)
def test_printable_text_steers_no_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert str(ConfigError(text, details={text: text}, hint=text)).count(shown.replace("\n", "\n")) == 4
    data = {text: [text, 1]}
    assert json.loads(printable_json(data)) == data, "a reader of JSON gets the same strings"
    assert printable(printable_json(data)) == printable_json(data)


def test_every_character_is_printable_or_escaped() -> None:
    everything = "".join(map(chr, range(0x110000)))
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", printable(everything)) is None
    printable(everything).encode()
    assert terminal_text("a\r\nb") == "a\nb"


def test_names_are_no_markup() -> None:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=80)
    console.print(printable_values(["[/b] [red]x[/red]\x1b["])[0])
    assert console.file.getvalue() == "[/b] [red]x[/red]\\x1b[\n"  # type: ignore[attr-defined]


def test_errors_have_a_readable_length() -> None:
    err = ConfigError(
        "m" * 10**7, details={"k" * 10**6: "v" * 10**7, **dict.fromkeys(map(str, range(10**4)), "x")}, hint="h" * 10**7
    )
    assert len(str(err)) < 2 * (MAX_MESSAGE + MAX_VALUE) + 300 * MAX_VALUES
    assert "characters left out" in err.message
    assert err.details["left out"] == "9801 more lines"
    assert shortened("short", 100) == "short"


def test_a_large_value_in_a_config_gives_a_short_error(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    data = json.loads((folder / "config.json").read_text())
    for key, value in (("new_key", "x" * 10**7), ("hidden_act", "y" * 10**7), ("model_type", ["z" * 10**7])):
        (folder / "config.json").write_text(json.dumps({**data, key: value}))
        for flags in ([], ["--json"]):
            assert main(["export", str(folder), *flags]) == 2
            captured = capsys.readouterr()
            assert len(captured.err) < 30_000
            assert len(captured.out) < 30_000


def test_a_comment_notifies_nobody() -> None:
    assert prose("@team, see #12 and <b>") == "@&#8203;team, see #&#8203;12 and &lt;b&gt;"


# ---- JSON -------------------------------------------------------------------------------------------------------


def test_json_with_half_a_character_or_too_deep_is_refused() -> None:
    assert json_from_bytes(b'"\\ud83d\\ude00 \\\\ud800"') == "😀 \\ud800"
    for raw in (b'"\\ud800"', b'{"\\uDC00": 1}', b'[["\\ude00\\ud83d"]]'):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            json_from_bytes(raw)
    json_from_bytes(b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1))
    with pytest.raises(RecursionError):
        json_from_bytes(b"[" * (MAX_DEPTH + 1) + b"1" + b"]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_reports_are_small_regular_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as stream:
            stream.truncate(1 << 34)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        report_from_json(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_text_for_validation_is_a_regular_file(
    kind: str, tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: Capture
) -> None:
    from llama_export.parity.stages.text import read_text

    folder = with_tokenizer(tiny_bundles["float32"], tmp_path)
    path = tmp_path / "text.txt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_text(path, dataclasses.replace(tiny_bundles["float32"], folder=folder))
    assert "not a regular file" in str(caught.value)


# ---- the tokenizer ----------------------------------------------------------------------------------------------


def with_tokenizer(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle of 97 words ``w0`` .. ``w96``."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "text"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


PADDING = {"direction": "Right", "pad_id": 3, "pad_type_id": 0, "pad_token": "w3", "pad_to_multiple_of": None}
SETTINGS = {
    "a billion pads": {"padding": {**PADDING, "strategy": {"Fixed": 10**9}}},
    "pads to a multiple": {"padding": {**PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 10**9}},
    "truncation": {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}},
    "truncation of a pair": {
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "OnlySecond", "stride": 0}
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_and_truncation_of_the_file_are_switched_off(
    name: str, tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    folder = with_tokenizer(tiny_bundles["float32"], tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, **SETTINGS[name]}))
    codec = TextCodec(folder)
    assert codec.encode("w5 w6 w7") == [5, 6, 7]
    assert codec.encode_with_offsets("w5 w6", "w7").ids == [5, 6, 7]


class _PanicException(BaseException):
    """Like that of pyo3: not an ``Exception``."""


@pytest.mark.parametrize("error", [_PanicException, ValueError, MemoryError])
def test_what_the_tokenizer_library_raises_is_a_sentence(
    error: type[BaseException], tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            def fail(*args: object, **kwargs: object) -> None:
                raise error("index out of bounds")

            return fail

    codec = TextCodec(with_tokenizer(tiny_bundles["float32"], tmp_path))
    codec._tokenizer = Broken()
    stream = codec.stream()
    for call in (
        lambda: codec.encode("w1"),
        lambda: codec.encode_with_offsets("w1"),
        lambda: codec.decode([1]),
        lambda: codec.text_of(1),
        lambda: stream.push(1),
    ):
        with pytest.raises(ConfigError, match="tokenizer fails") as caught:
            call()
        assert "index out of bounds" in caught.value.details["reason"]
        assert caught.value.exit_code == 2


def test_an_interrupt_of_the_tokenizer_stays_one() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text_module._call(interrupted)


PANICS = {
    "while it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "in the normaliser": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAA="}},
    "in the splitter": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "in the template": {
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [], "special_tokens": {}
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_the_tokenizer_library_leaves_the_command_line_with_2(
    name: str, tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: Capture
) -> None:
    folder = with_tokenizer(tiny_bundles["float32"], tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, **PANICS[name]}))
    said = check_refused(capsys, folder, ["run", folder, "--prompt", "w1 w2"], "tokenizer")
    assert "Panic" in said or "Exception" in said


def test_a_tokenizer_of_gigabytes_is_not_read(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    folder = with_tokenizer(tiny_bundles["float32"], tmp_path)
    with (folder / "tokenizer.json").open("wb") as stream:
        stream.truncate(2 << 30)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        TextCodec(folder)
    assert "more than the 128000000" in caught.value.details["reason"]


# ---- onnxruntime's telemetry ------------------------------------------------------------------------------------

CLEAN = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}


def test_onnxruntime_is_imported_after_this_package() -> None:
    """The package switches telemetry off, and onnxruntime looks when it is imported. Tests: conftest.py imports it first."""
    files = [
        path
        for part in ("llama_export", "scripts", "benchmarks", "examples", "plugins")
        for path in (ROOT / part).rglob("*.py")
    ]
    users = [
        path for path in files if re.search(r"^ *(import|from) onnxruntime\b", path.read_text(encoding="utf-8"), re.M)
    ]
    assert len(users) > 4
    for path in users:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = [
            alias.name if isinstance(node, ast.Import) else str(node.module)
            for node in body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        first = next((at for at, name in enumerate(names) if name == "onnxruntime"), len(names))
        assert any(name.partition(".")[0] == "llama_export" for name in names[:first]), path


def test_no_file_and_no_socket_is_made_by_onnxruntime(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    run_at_home(tiny_bundles["float32"].folder, tmp_path, "pass")


@pytest.mark.slow
def test_no_connection_is_made_by_onnxruntime_within_30_s(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Its collector is called 25 s after the start."""
    run_at_home(tiny_bundles["float32"].folder, tmp_path, "import time; time.sleep(30)")


def run_at_home(bundle: Path, home: Path, then: str) -> None:
    """Opens a session in a fresh home folder: it makes no file there, and no socket as far as strace can tell."""
    code = (
        f"import llama_export; llm = llama_export.load({str(bundle)!r}); llm.generate([1, 2], max_new_tokens=2); {then}"
    )
    trace = ["strace", "-f", "-qq", "-e", "trace=socket,connect", "-o", str(home / "trace")]
    command = [*(trace if shutil.which("strace") else []), sys.executable, "-c", code]
    (home / "home").mkdir()
    places = {"HOME": home / "home", "XDG_CACHE_HOME": home / "home" / "cache", "XDG_DATA_HOME": home / "home" / "data"}
    environment = {**CLEAN, **{key: str(value) for key, value in places.items()}, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    assert list((home / "home").rglob("*")) == []
    if (home / "trace").exists():
        assert "AF_INET" not in (home / "trace").read_text()


# ---- everything at once -----------------------------------------------------------------------------------------


def mutate(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "mutate.py"), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_damaged_files_are_handled() -> None:
    """A sample of ``test_damaged_files_are_handled_in_numbers``; each JSON file is also tried on a terminal."""
    said = mutate("--cases", "120", "--seed", "5", "--escapes", "40")
    assert "| **all** | 120 |" in said
    runs, shown = map(int, re.findall(r"(\d+) runs on a terminal, (\d+) showed it escaped", said)[0])
    assert runs > 25
    assert shown > 3


@pytest.mark.slow
def test_damaged_files_are_handled_in_numbers() -> None:
    assert "| **all** | 3,000 |" in mutate("--cases", "3000", "--seed", "6", "--escapes", "1")
