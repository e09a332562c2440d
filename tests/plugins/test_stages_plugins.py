"""The kernel stages of `validate`: they pass for a sound bundle, and a wrong kernel, graph or library fails them."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import oracles
import pytest
import torch

pytest.importorskip("triton", reason="`triton` is not installed: pip install './plugins[interpreter]'")
pytest.importorskip("llama_export_plugins", reason="the plugins are not installed: pip install ./plugins")
from llama_export_plugins import harness
from llama_export_plugins.kernels import loop
from llama_export_plugins.ptx import Program

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.errors import ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.graph.kv_cache import cache_names
from llama_export.ops.torch_ops import EAGER
from llama_export.parity import judge
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.oracle.evaluator import GraphEvaluator
from llama_export.parity.report.result import Stage
from llama_export.parity.stages.ops import DTYPES
from llama_export.parity.validate import validate_bundle

HOW = ("interpreter", "enqueue", "ptx")
"""Those that need no GPU."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("kernels") / "checkpoint"
    oracles.huggingface_llama(
        folder, seed=5, vocab_size=90, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    export_checkpoint(folder)
    return load_bundle(folder)


def run(bundle: Bundle, *names: str) -> dict[str, Stage]:
    report = validate_bundle(bundle, ValidateConfig(steps=2, prompt_tokens=9, stages=names))
    return {stage.name: stage for stage in report.stages if stage.name.startswith(names)}


def test_a_sound_bundle_passes_at_every_dtype(bundle: Bundle) -> None:
    found = run(bundle, *(f"kernels/{how}-{what}" for how in HOW for what in (*DTYPES, "poisoned-cache")))
    assert len(found) == 12
    for name, stage in found.items():
        if name.endswith("poisoned-cache"):
            assert (stage.verdict, stage.metrics["error"]) == ("pass", 0)
            continue
        assert stage.verdict == "pass", (name, stage.reason)
        assert 0 < float(stage.metrics["error"]) <= stage.tolerance.value  # type: ignore[union-attr, arg-type]
        assert stage.metrics["layers"] == [0.0, 1.0]
    # The same kernels on the same values: what the C++ code launches is what Python launches.
    for dtype in DTYPES:
        first, second, _ = (found[f"kernels/{how}-{dtype}"].metrics["error"] for how in HOW)
        assert first == second


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("LlamaRMSNorm", lambda x, weight, epsilon: (x, weight, epsilon * 100)),
        ("LlamaAttention", lambda *items: (*items[:-1], items[-1] * 1.01)),
        ("LlamaAttention", lambda *items: (*items[:3], items[4], items[3], *items[5:])),
        ("LlamaAttention", lambda *items: (*items[:7], items[7] + 1, *items[8:])),
    ],
    ids=["epsilon", "scale", "cos and sin", "position"],
)
def test_a_wrong_kernel_fails(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, how: str, op: str, wrong: Callable[..., Any]
) -> None:
    if how == "interpreter":
        right = loop.kernel_ops()
    else:
        right = harness.enqueue_ops(compute_capability=harness.PTX_ONLY if how == "ptx" else (8, 9))

    def made(**settings: Any) -> dict[str, Callable[..., Any]]:
        return {**right, op: lambda *items: right[op](*wrong(*items))}

    monkeypatch.setattr(harness, "enqueue_ops", made)
    monkeypatch.setattr(loop, "kernel_ops", made)
    name = f"kernels/{how}-float32"
    assert run(bundle, name)[name].verdict == "fail"


def test_wrong_compiled_code_fails_where_it_runs_and_there_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' source is right and the library's PTX is not: one constant of its softmax."""
    parse, changed = Program.parse, []

    def altered(text: str) -> Program:
        changed.append("0f3FB8AA3B" in text)
        return parse(text.replace("0f3FB8AA3B", "0f3FB8AB3B"))

    monkeypatch.setattr(Program, "parse", altered)
    found = run(bundle, "kernels/ptx-float32", "kernels/enqueue-float32")
    assert any(changed)
    assert {name: stage.verdict for name, stage in found.items()} == {
        "kernels/ptx-float32": "fail", "kernels/enqueue-float32": "pass"
    }  # fmt: skip
    assert (found["kernels/ptx-float32"].first_divergence or {})["op"] == "LlamaAttention"


def test_a_race_in_the_compiled_code_is_a_failed_stage_that_says_where(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are right here, where the order of warps is a good one."""
    parse = Program.parse
    monkeypatch.setattr(Program, "parse", lambda text: parse(re.sub(r"bar\.sync[^;]*;", "", text)))
    stages = run(bundle, "kernels/ptx-float32", "ops/ptx")
    assert len(stages) == 2
    for stage in stages.values():
        assert stage.verdict == "fail"
        assert "in Llama" in stage.reason
        assert "race: without a barrier, a warp reads what another wrote" in stage.reason


def test_a_library_without_ptx_has_none_to_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutPtx(harness.PluginLibrary):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.variants["portable_chip"] = None

    monkeypatch.setattr(harness, "PluginLibrary", WithoutPtx)
    stage = run(bundle, "kernels/ptx-float32")["kernels/ptx-float32"]
    assert (stage.verdict, "carries no PTX" in stage.reason) == ("not-run", True)


def test_plugins_from_before_have_no_ptx_to_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(harness, "PTX_ONLY")
    found = run(bundle, "kernels/ptx-float32", "ops/enqueue")
    assert found["ops/enqueue"].verdict == "pass"
    stage = found["kernels/ptx-float32"]
    assert (stage.verdict, "cannot execute PTX" in stage.reason) == ("not-run", True)


def test_a_wrong_graph_fails(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "faulty")
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "LlamaAddRMSNorm")
    node.input[0], node.input[1] = node.input[1], node.input[0]  # a sum either way: not a fault
    attention = next(node for node in model.graph.node if node.op_type == "LlamaAttention")
    next(item for item in attention.attribute if item.name == "scale").f *= 1.5
    (tmp_path / "faulty" / "model.onnx").write_bytes(model.SerializeToString())
    found = run(load_bundle(tmp_path / "faulty", ignore_hashes=True), "kernels/interpreter-float32")
    assert found["kernels/interpreter-float32"].verdict == "fail"


def test_without_triton_the_stages_are_not_run_and_say_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "kernels_installed", lambda **_: "the Python package `triton` is not installed")
    for stage in run(bundle, "kernels").values():
        assert stage.verdict == "not-run"
        assert "triton" in str(stage.reason)


def test_another_triton_is_a_reason_and_no_crash(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter raised in the middle of a validation, on NumPy 2.5."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    stage = run(bundle, "kernels/interpreter-float32")["kernels/interpreter-float32"]
    assert (stage.verdict, "triton 3.6.0" in stage.reason, "3.9" in stage.reason) == ("not-run", True, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_its_stages_are_not_run(bundle: Bundle) -> None:
    found = run(bundle, "kernels/gpu-float32", "kernels/gpu-poisoned-cache", "ops/gpu")
    assert {(stage.verdict, "no GPU" in stage.reason) for stage in found.values()} == {("not-run", True)}


def test_the_gpu_stages_drive_the_real_driver(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from ``enqueue`` is the device alone; here the stand-in answers for it."""
    asked: list[str] = []
    right = harness.enqueue_ops()

    def made(*, device: str) -> dict[str, Callable[..., Any]]:
        asked.append(device)
        return right

    monkeypatch.setattr(harness, "enqueue_ops", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name = "kernels/gpu-float32"
    assert run(bundle, name)[name].verdict == "pass"
    assert asked == ["cuda"]


def test_an_unusable_library_fails_the_enqueue_stages_only(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ToolchainError("the plugin library has another ABI", hint="pip install ./plugins")

    monkeypatch.setattr(judge, "find_library", broken)
    found = run(bundle, "kernels")
    assert {found[f"kernels/enqueue-{dtype}"].verdict for dtype in ("float32", "float16")} == {"fail"}
    assert "another ABI" in str(found["kernels/enqueue-float32"].reason)
    assert found["kernels/interpreter-float32"].verdict == "pass"


def test_a_large_model_gets_a_sample_of_its_layers(bundle: Bundle) -> None:
    assert judge.some_layers(32) == [0, 16, 31]
    assert judge.some_layers(2) == [0, 1]
    seen: list[int] = []

    def kernel(*items: Any) -> Any:
        seen.append(1)
        return EAGER["LlamaAttention"](*items)

    evaluator = GraphEvaluator(
        bundle.model_path,
        custom_ops={**EAGER, "LlamaAttention": kernel},
        custom_layers=[1],
    )
    past = {name: torch.zeros(1, 2, 4, 24) for name, _ in cache_names(2)}
    evaluator.run(
        {
            "input_ids": torch.tensor([[1, 2]]), "past_length": torch.tensor([0]), "sequence_length": torch.tensor([2]),
            "logits_index": torch.tensor([[1]]), **past,
        }
    )  # fmt: skip
    assert len(seen) == 1
