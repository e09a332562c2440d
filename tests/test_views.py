"""``inspect`` of whatever the project makes: a view for people, everything as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import NATIVE

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.engine.build import build_engine
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.pages import write_report
from llama_export.parity.validate import validate_bundle

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine and a report."""
    folder = Path(shutil.copytree(tiny_bundles["bfloat16"].folder, tmp_path_factory.mktemp("views") / "bundle"))
    bundle = load_bundle(folder)
    build_engine(bundle, NATIVE)
    write_report(validate_bundle(bundle, ValidateConfig(stages=("graph/rope",))), folder / "report")
    return folder


def shown(capsys: Capture, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "model.onnx", "model.onnxruntime.onnx"])
def test_a_bundle_is_seen_whole(name: str, folder: Path, capsys: Capture) -> None:
    text = " ".join(shown(capsys, folder / name).split())
    assert "parameters, bfloat16" in text
    assert "2 layers, hidden 72, 6 heads, 2 key/value heads, head_dim 16" in text
    assert f"KV cache {2 * 2 * 2 * 16 * 2} bytes a token" in text
    assert "model.onnxruntime.onnx" in text
    assert "onnxruntime on a CPU" in text
    assert "past_key_values.*.key, .value" in text
    assert "past_key_values.1" not in text
    assert "bfloat16-native" in text


def test_json_of_a_bundle_is_complete(folder: Path, capsys: Capture) -> None:
    data = json.loads(shown(capsys, folder, "--json"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {key: data[key] for key in manifest} == manifest
    assert data["files"]["model.onnx"] == (folder / "model.onnx").stat().st_size


def test_a_weight_file_is_seen_by_its_header(folder: Path, capsys: Capture) -> None:
    text = shown(capsys, folder / "model.safetensors")
    data = json.loads(shown(capsys, folder / "model.safetensors", "--json"))
    assert f"{len(data['tensors'])} tensors" in text
    assert (
        f"float32: {len(data['tensors'])} tensors, {sum(entry['nbytes'] for entry in data['tensors']):,} bytes" in text
    )
    assert "... and" in text
    assert "model.embed_tokens.weight" in text


def test_engines_and_reports_are_seen(folder: Path, capsys: Capture) -> None:
    text = shown(capsys, folder / "engines")
    assert "…" not in text, "names are folded, not cut"
    assert "53 tokens" in " ".join(text.split())
    assert "1 passed" in shown(capsys, folder / "report")
    assert json.loads(shown(capsys, folder / "report" / "parity.json", "--json"))["verdict"] == "pass"
