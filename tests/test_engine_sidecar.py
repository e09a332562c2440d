"""Sidecars and engine files that somebody changed: every one is described, or refused in a sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_json
from rich.console import Console
from support import json_paths, make_special, refused_or, with_json_at

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.bundle.destination import json_bytes
from llama_export.cli.main import main
from llama_export.engine.check import check_engine, inspect_engine
from llama_export.engine.inspection import describe_engine, print_engine
from llama_export.engine.refit import refit_engine
from llama_export.engine.sidecar import read_sidecar
from llama_export.errors import ArtifactMismatchError, ConfigError, LlamaExportError, ToolchainError
from llama_export.runtime import loaded_engine

pytest.importorskip("tensorrt_rtx_bindings")


@pytest.fixture
def own(built: dict[str, tuple[Bundle, Path]], tmp_path: Path) -> tuple[Bundle, Path]:
    """A float32 bundle with an engine that the test may spoil."""
    original, path = built["float32"]
    shutil.copytree(original.folder, tmp_path / "bundle")
    return load_bundle(tmp_path / "bundle"), tmp_path / "bundle" / "engines" / path.name


def test_the_dataclass_is_the_file(built: dict[str, tuple[Bundle, Path]]) -> None:
    for _, path in built.values():
        sidecar = read_sidecar(path)
        assert json_bytes(sidecar.to_json()) == path.with_suffix(".json").read_bytes()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a list in place of an object": ({"weights": []}, "`$.weights`"),
    "a text in place of a number": ({"bytes": "4896500"}, "`$.bytes`"),
    "a number beyond 63 bits": ({"max_batch": 1 << 63}, "`$.max_batch`"),
    "a negative number": ({"kv_cache_capacity": -1}, "`$.kv_cache_capacity`"),
    "no rows": ({"max_batch": 0}, "`$.max_batch`"),
    "true in place of a number": ({"max_seq_len": True}, "`$.max_seq_len`"),
    "no profile": ({"profiles": {}}, "`$.profiles`"),
    "a profile of texts": ({"profiles": {"prefill": {"input_ids": ["1"]}}}, "`$.profiles[...][...][0]`"),
    "a version that is none": ({"backend_version": "seven"}, "`$.backend_version`"),
    "a GPU that is none": ({"compute_capabilities": ["1e9"]}, "`$.compute_capabilities[0]`"),
    "no GPU": ({"compute_capabilities": []}, "`$.compute_capabilities`"),
    "a backend nobody has": ({"backend": "cuda"}, "`$.backend`"),
    "a hash that is none": ({"onnx_sha256": "0"}, "`$.onnx_sha256`"),
    "a model without sizes": ({"model": {}}, "num_hidden_layers"),
    "an escape sequence": ({"ops": "\x1b[31m"}, "\\x1b[31m"),
    "half a surrogate pair": ({"task": "\ud800"}, "a string h"),
    "a missing key": ({"settings": ...}, "`settings`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_field_is_named(what: str, own: tuple[Bundle, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Most of these ended with exit code 4 and a traceback."""
    _, path = own
    changes, message = WRONG[what]
    edit_json(path.with_suffix(".json"), **changes)
    assert main(["inspect", str(path)]) == 2
    err = capsys.readouterr().err
    assert re.search("lacks a field or holds a wrong one|cannot be read as JSON", err)
    assert message in err
    assert "Traceback" not in err
    assert "\x1b" not in err


def test_a_deep_document_is_refused(own: tuple[Bundle, Path]) -> None:
    _, path = own
    deep: Any = 1
    for _ in range(300):
        deep = {"a": deep}
    edit_json(path.with_suffix(".json"), model=deep)
    with pytest.raises(ConfigError, match="64 levels"):
        read_sidecar(path)


def test_markup_in_a_name_is_printed_as_it_is(own: tuple[Bundle, Path]) -> None:
    _, path = own
    edit_json(path.with_suffix(".json"), layers={"[/b]": 1, "[red]x": 2}, ops="[/b]")
    text = printed(describe_engine(path))
    assert "[/b]" in text
    assert "[red]x" in text


def printed(data: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_engine(data, Console(file=stream, width=120))
    return stream.getvalue()


# ---- random changes ---------------------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 10**400, 0.5, 1e308, float("inf"), float("nan"), "", "..", "/etc/passwd",
    "a\0b", "\ud800", "\x1b[2J", "[/b]", "x" * 5000, "1", [], {}, [[]], {"": None}, [None] * 100, {"a": {"b": [1]}},
)  # fmt: skip


def changed(data: Any, rng: random.Random) -> Any:
    """Another value in one to three places, or a key that is gone or new."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(json_paths(data))
        parent, how = path[:-1], rng.randrange(4)
        holder = data
        for key in parent:
            holder = holder[key]
        if how == 0 and path and isinstance(holder, dict):
            data = with_json_at(data, parent, {key: value for key, value in holder.items() if key != path[-1]})
        elif how == 1 and path and isinstance(holder, list):
            data = with_json_at(data, parent, holder + holder)
        else:
            data = with_json_at(data, path, rng.choice(HOSTILE))
    return data


def error_of(action: Callable[[], Any]) -> str | None:
    """What a user is told, if anything; any other exception is a bug."""
    try:
        action()
    except LlamaExportError as err:
        return str(err)
    return None


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_changes_of_a_sidecar_are_refused_or_read(count: int, own: tuple[Bundle, Path]) -> None:
    """By all that reads one. 142 of 1,000 such sidecars were a traceback."""
    bundle, path = own
    sidecar_path, rng, refused, slowest = path.with_suffix(".json"), random.Random(count), 0, 0.0
    original = json.loads(sidecar_path.read_text())
    actions: tuple[Callable[[], Any], ...] = (
        lambda: check_engine(bundle, path),
        lambda: printed(describe_engine(path)),
        lambda: refit_engine(path, bundle),
    )
    for _ in range(count):
        sidecar_path.write_text(json.dumps(changed(original, rng)))
        for action in actions:
            start = time.process_time()
            message = error_of(action)
            refused += message is not None
            assert len(message or "") < 1_000_000
            slowest = max(slowest, time.process_time() - start)
    assert refused > count
    assert slowest < 2
    sidecar_path.write_text(json.dumps(original))
    assert refused_or(lambda: inspect_engine(path), limit=4_000_000) is not None


# ---- engine files -----------------------------------------------------------------------------------------------


def _fit(path: Path) -> None:
    """Makes size and hash of the sidecar those of the file."""
    edit_json(
        path.with_suffix(".json"),
        bytes=path.stat().st_size,
        engine_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


CONTENTS: dict[str, tuple[Callable[[bytes], bytes], bool, str]] = {
    "empty": (lambda raw: b"", False, "is not the file its sidecar describes"),
    "empty, with its hash": (lambda raw: b"", True, "`$.bytes`"),
    "half": (lambda raw: raw[: len(raw) // 2], False, "is not the file its sidecar describes"),
    "half, with its hash": (lambda raw: raw[: len(raw) // 2], True, "is not an engine of this bundle"),
    "text, with its hash": (lambda raw: b"no engine\n", True, "is not an engine of this bundle"),
    "zeros, with their hash": (lambda raw: bytes(1 << 20), True, "is not an engine of this bundle"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_an_engine_file_that_is_none_is_refused(what: str, own: tuple[Bundle, Path]) -> None:
    bundle, path = own
    content, fits, message = CONTENTS[what]
    path.write_bytes(content(path.read_bytes()))
    if fits:
        _fit(path)
    with pytest.raises(ArtifactMismatchError) as caught:
        check_engine(bundle, path)
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_an_engine_that_is_no_file_is_not_waited_for(kind: str, own: tuple[Bundle, Path]) -> None:
    _, path = own
    path.unlink()
    make_special(path, kind)
    with pytest.raises(ArtifactMismatchError, match="cannot be read"):
        inspect_engine(path)


def test_a_terabyte_of_holes_is_not_read(own: tuple[Bundle, Path]) -> None:
    bundle, path = own
    os.truncate(path, 1 << 40)
    start = time.process_time()
    with pytest.raises(ArtifactMismatchError, match="1099511627776 bytes"):
        check_engine(bundle, path)
    assert time.process_time() - start < 1


def test_an_engine_larger_than_memory_is_not_read(own: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = own
    monkeypatch.setattr(loaded_engine, "available_memory", lambda: 1000)
    with pytest.raises(ToolchainError, match="does not fit into this machine's memory"):
        loaded_engine._content(path, inspect_engine(path))


# ---- a folder of engines ----------------------------------------------------------------------------------------


def test_a_folder_of_engines_is_described(own: tuple[Bundle, Path]) -> None:
    """Sound ones by their facts, the others by what is wrong with them."""
    _, path = own
    folder = path.parent
    shutil.copy(path, folder / "alone.engine")
    shutil.copy(path.with_suffix(".json"), folder / "nothing.json")
    shutil.copy(path, folder / "broken.engine")
    (folder / "broken.json").write_text("{}")
    data = describe_engine(folder)
    found = {entry["file"]: entry for entry in data["engines"]}
    assert found.keys() == {path.name, "alone.engine", "nothing.engine", "broken.engine"}
    assert found[path.name]["max_seq_len"] == 53
    assert found["alone.engine"]["problem"] == "`alone.json` is missing"
    assert found["nothing.engine"]["problem"] == "`nothing.engine` is missing"
    assert "schema version" in found["broken.engine"]["problem"]
    text = printed(data)
    assert all(name in text for name in ("alone.engine", "broken:", "53 tokens, batch 3"))
    json.dumps(data)


def test_a_folder_without_engines_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMismatchError, match="holds no engines"):
        describe_engine(tmp_path)
