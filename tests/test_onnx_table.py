"""Every head with every RoPE type on onnxruntime and as an engine with plugin layers; the table of them in the docs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.llama import TASKS
from llama_export.config.settings import EngineConfig
from llama_export.engine.build import build_engine
from llama_export.engine.check import check_engine

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "onnx_table.py"))
Measured = tuple[Bundle, dict[str, float]]
CASES = [(task, rope_type) for task in TASKS for rope_type in SCRIPT["ROPE"]]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One head with one RoPE type, exported and run."""
    folder = tmp_path_factory.mktemp("-".join(request.param))
    found = SCRIPT["measure"](*request.param, folder)
    return load_bundle(folder), found


def test_onnx_equals_the_reference_at_lengths_on_both_sides_of_the_switch(measured: Measured) -> None:
    bundle, found = measured
    task = bundle.task
    assert list(found) == ["no padding", "right"] + ["left"] * (task != "causal-lm")
    assert max(found.values()) <= SCRIPT["LIMIT"], found
    assert max(found.values()) > 0, "nothing was computed twice"


def test_an_engine_with_plugin_layers_is_built(measured: Measured) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    bundle, _ = measured
    built = build_engine(bundle, EngineConfig(max_seq_len=SCRIPT["LONGEST"], max_batch=2))
    attention = "LlamaAttention" if bundle.task == "causal-lm" else "LlamaMaskedAttention"
    layers = bundle.config.num_hidden_layers
    assert built.plugin_layers == {"LlamaRMSNorm": 1, "LlamaAddRMSNorm": 2 * layers, attention: layers}
    facts = check_engine(bundle, Path(built.engine))
    assert facts.not_checked == ()
    assert facts.sidecar.max_seq_len == SCRIPT["LONGEST"]


def test_the_table_in_the_docs_is_whole_and_within_the_limit() -> None:
    text = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z-]+) \| (\w+) \| (.+) \|$", text, flags=re.MULTILINE)
    measured = {(task, rope): cells.split(" | ") for task, rope, cells in rows if rope in SCRIPT["ROPE"]}
    assert set(measured) == set(CASES)
    for (task, _), cells in measured.items():
        assert [cell == "not defined" for cell in cells] == [False, False, task == "causal-lm"]
        assert all(float(cell) <= SCRIPT["LIMIT"] for cell in cells if cell != "not defined")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_frozen_at_the_short_length_would_show(rope_type: str, tmp_path: Path) -> None:
    names = SCRIPT["measure"].__globals__
    load = names["load_reference"]

    def frozen(checkpoint: Any) -> Any:
        model = load(checkpoint)
        model.model.rotary_emb._frequencies = lambda length: model.model.rotary_emb.inv_freq
        return model

    try:
        names["load_reference"] = frozen
        found = SCRIPT["measure"]("token-classification", rope_type, tmp_path)
    finally:
        names["load_reference"] = load
    assert min(found.values()) > 1000 * SCRIPT["LIMIT"], found
