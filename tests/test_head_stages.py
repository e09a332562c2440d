"""Validation of the heads without a cache: a sound bundle passes, and what a user fears fails the stages it should."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.llama import TASKS
from llama_export.errors import ExportError
from llama_export.export.export import export_checkpoint
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.oracle.evaluator import GraphEvaluator
from llama_export.parity.report.result import ParityReport
from llama_export.parity.stages import heads as head_stages
from llama_export.parity.stages.heads import HEAD_STAGES, HeadValidator
from llama_export.parity.validate import validate_bundle

ROOT = Path(__file__).parent.parent
WRITE_CHECKPOINT = runpy.run_path(str(ROOT / "scripts" / "onnx_table.py"))["write_checkpoint"]
HEADS = [task for task in TASKS if task != "causal-lm"]
# `dynamic` and `longrope` switch at 24 tokens: the texts of 40 and 20 lie on both sides.
CASES = [
    *((task, "default") for task in HEADS),
    ("feature-extraction", "longrope"),
    ("token-classification", "dynamic"),
]
KERNELS = {name for name in HEAD_STAGES if name.startswith(("kernels/", "ops/"))} - {"ops/bodies"}
GPU = set() if torch.cuda.is_available() else {name for name in KERNELS if "/gpu" in name}
ENGINE = {"engine/structure", "engine/execution", "bundle/weights"}
"""Not run: there is no engine, and no content hash."""
WITHOUT_KERNELS = ValidateConfig(
    prompt_tokens=40, stages=tuple(name for name in HEAD_STAGES if name not in KERNELS | ENGINE)
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """``sound(task, rope_type)`` -> a bundle that no test modifies."""
    made: dict[tuple[str, str], Bundle] = {}

    def make(task: str, rope_type: str = "default") -> Bundle:
        if (task, rope_type) not in made:
            folder = tmp_path_factory.mktemp(f"{task}-{rope_type}")
            WRITE_CHECKPOINT(folder, task, rope_type)
            export_checkpoint(folder)
            made[task, rope_type] = load_bundle(folder)
        return made[task, rope_type]

    return make


def verdicts(report: ParityReport, verdict: str) -> set[str]:
    return {stage.name for stage in report.stages if stage.verdict == verdict}


def explain(report: ParityReport) -> str:
    return "\n".join(f"{stage.name}: {stage.verdict}: {stage.reason}" for stage in report.stages)


@pytest.mark.parametrize(("task", "rope_type"), CASES, ids="-".join)
def test_a_sound_head_passes(sound: Callable[..., Bundle], task: str, rope_type: str) -> None:
    report = validate_bundle(sound(task, rope_type), WITHOUT_KERNELS)
    assert report.verdict == "pass", explain(report)
    assert verdicts(report, "pass") == set(HEAD_STAGES) - KERNELS - ENGINE, explain(report)
    assert [stage.name for stage in report.stages] == list(HEAD_STAGES)
    assert report.to_json()["model"]["task"] == task
    (texts,) = (stage for stage in report.stages if stage.name == "onnxruntime/texts")
    assert (texts.logits is not None) == (task in ("sequence-classification", "token-classification"))


def test_a_head_passes_with_its_ops_by_the_kernels(sound: Callable[..., Bundle]) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("llama_export_plugins")
    report = validate_bundle(sound("token-classification"), ValidateConfig(prompt_tokens=9, stages=tuple(KERNELS)))
    assert verdicts(report, "pass") == KERNELS - GPU, explain(report)


def test_a_classifier_without_a_padding_token_is_judged_one_text_at_a_time(tmp_path: Path) -> None:
    from conftest import edit_json

    WRITE_CHECKPOINT(tmp_path, "sequence-classification", "default")
    edit_json(tmp_path / "config.json", pad_token_id=None)
    export_checkpoint(tmp_path)
    report = validate_bundle(load_bundle(tmp_path), WITHOUT_KERNELS)
    assert report.verdict == "pass", explain(report)
    for rows in (stage for stage in report.stages if stage.name.endswith("/rows")):
        assert (rows.verdict, "padding token" in rows.reason) == ("not-run", True)


# ---- faults -----------------------------------------------------------------------------------------------------

GRAPH = {"graph/float64-eager", "graph/float64-bodies"}
SIXTEEN_BIT = {"evaluator/bfloat16", "evaluator/float16"}
RUNTIME = {"graph/float64-ort-bodies", "onnxruntime/texts"}


def node_of(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def scale_attention(model: onnx.ModelProto) -> None:
    (attribute,) = (item for item in node_of(model, "LlamaMaskedAttention").attribute if item.name == "scale")
    attribute.f *= 1.5


def swap_gate_and_up(model: onnx.ModelProto) -> None:
    (names,) = (
        [name, name.replace("gate", "up")]
        for name in (item.name for item in model.graph.initializer)
        if name.endswith("layers.0.mlp.gate_proj.weight")
    )
    for node in model.graph.node:
        for slot, name in enumerate(node.input):
            if name in names:
                node.input[slot] = names[1 - names.index(name)]


def forget_the_mask(model: onnx.ModelProto) -> None:
    """Attention to padding: all ones where the mask was."""
    ones = helper.make_tensor("ones_value", TensorProto.INT64, [1], [1])
    model.graph.node.insert(0, helper.make_node("Shape", ["attention_mask"], ["mask_shape"]))
    model.graph.node.insert(1, helper.make_node("ConstantOfShape", ["mask_shape"], ["all_ones"], value=ones))
    for node in model.graph.node:
        if node.op_type == "LlamaMaskedAttention":
            node.input[:] = ["all_ones" if name == "attention_mask" else name for name in node.input]


def first_row_for_all(model: onnx.ModelProto) -> None:
    """Every row is masked as row 0 is: a text alone is right, a batch is not."""
    index = helper.make_tensor("row_0", TensorProto.INT64, [1], [0])
    model.graph.initializer.append(index)
    model.graph.node.insert(0, helper.make_node("Gather", ["attention_mask", "row_0"], ["mask_0"], axis=0))
    model.graph.node.insert(1, helper.make_node("Shape", ["attention_mask"], ["mask_shape"]))
    model.graph.node.insert(2, helper.make_node("Expand", ["mask_0", "mask_shape"], ["mask_of_0"]))
    for node in model.graph.node:
        if node.op_type == "LlamaMaskedAttention":
            node.input[:] = ["mask_of_0" if name == "attention_mask" else name for name in node.input]


FAULTS: dict[str, tuple[str, Callable[[onnx.ModelProto], None], set[str]]] = {
    "attention scale x 1.5": ("model.onnx", scale_attention, GRAPH | SIXTEEN_BIT),
    "gate and up swapped": ("model.onnx", swap_gate_and_up, GRAPH | SIXTEEN_BIT),
    "gate and up swapped for onnxruntime": ("model.onnxruntime.onnx", swap_gate_and_up, RUNTIME),
    # Left padding is seen; right padding is behind every token that is compared, and causality hides it.
    "padding is attended to": (
        "model.onnxruntime.onnx", forget_the_mask, RUNTIME,
    ),
    "every row takes row 0's mask": ("model.onnxruntime.onnx", first_row_for_all, RUNTIME | {"onnxruntime/rows"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_exactly_the_stages_it_should(sound: Callable[..., Bundle], tmp_path: Path, fault: str) -> None:
    file, inject, expected = FAULTS[fault]
    folder = tmp_path / "faulty"
    shutil.copytree(sound("question-answering").folder, folder)
    model = onnx.load(str(folder / file), load_external_data=False)
    inject(model)
    (folder / file).write_bytes(model.SerializeToString())
    report = validate_bundle(load_bundle(folder, ignore_hashes=True), WITHOUT_KERNELS)
    assert verdicts(report, "fail") == expected, explain(report)
    assert report.verdict == "fail"


def test_an_engine_is_judged_on_texts_it_serves(
    sound: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for the GPU: right numbers pass, wrong ones fail, and no text is longer than the engine takes."""
    bundle = sound("token-classification")
    validator = HeadValidator(bundle, WITHOUT_KERNELS)
    widths: list[int] = []

    def session(error: float) -> Callable[..., Any]:
        def run(ids: Any, mask: Any) -> Any:
            widths.append(ids.shape[1])
            return {name: values + error for name, values in validator.oracle(ids, mask).items()}

        return lambda bundle, path: SimpleNamespace(run=run)

    engine = tmp_path / "some.engine"
    facts = SimpleNamespace(backend="tensorrt-rtx", max_seq_len=12, max_batch=2)
    monkeypatch.setattr(head_stages, "check_engine", lambda bundle, path: SimpleNamespace(sidecar=facts))
    monkeypatch.setattr(head_stages, "execution_blocker", lambda backend: None)
    monkeypatch.setattr(Bundle, "engines", property(lambda self: [engine]))
    for error, verdict in ((0.0, "pass"), (0.01, "fail")):
        monkeypatch.setattr(head_stages, "EngineHeadSession", session(error))
        (stage,) = head_stages.engine_execution(validator)
        assert (stage.name, stage.verdict) == ("engine/execution/some", verdict)
    assert set(widths) == {12}
    monkeypatch.setattr(head_stages, "execution_blocker", lambda backend: "no GPU here")
    (stage,) = head_stages.engine_execution(validator)
    assert (stage.verdict, stage.reason) == ("not-run", "no GPU here")


def test_docs_list_the_stages_of_the_heads() -> None:
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    section = text.split("\n## Stages of the heads without a cache\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`([^`]+)`", row)] == list(HEAD_STAGES)


# ---- the operators these graphs bring to the evaluator ------------------------------------------------------------

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
VALUES = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
INTS = np.array([[-7, 5, 0, 3], [2, -2, 9, 1], [4, 4, -1, 6]], np.int64)
OTHER = np.array([[2, 3, 1, 3], [2, 2, -4, 5], [4, 7, 2, -6]], np.int64)
FLAGS = VALUES > 0
OPERATORS: dict[str, tuple[str, list[np.ndarray[Any, Any]], dict[str, Any], int]] = {
    "And": ("And", [FLAGS, INTS > 2], {}, BOOL),
    "Or": ("Or", [FLAGS, INTS > 2], {}, BOOL),
    "Not": ("Not", [FLAGS], {}, BOOL),
    "Equal": ("Equal", [INTS, OTHER], {}, BOOL),
    "Greater": ("Greater", [INTS, OTHER], {}, BOOL),
    "Where": ("Where", [FLAGS, INTS, OTHER], {}, INT),
    "Clip": ("Clip", [VALUES, np.float32(-0.3), np.float32(0.4)], {}, FLOAT),
    "Clip below": ("Clip", [INTS, np.int64(1)], {}, INT),
    "CumSum": ("CumSum", [INTS, np.int64(1)], {}, INT),
    "Div": ("Div", [VALUES, VALUES + 5], {}, FLOAT),
    "Div of integers": ("Div", [INTS, OTHER], {}, INT),
    "Sub": ("Sub", [INTS, OTHER], {}, INT),
    "Pow": ("Pow", [np.abs(VALUES), np.float32(1.7)], {}, FLOAT),
    "Pow with an integer": ("Pow", [VALUES, np.int64(2)], {}, FLOAT),
    "Reciprocal": ("Reciprocal", [VALUES], {}, FLOAT),
    "ReduceMax": ("ReduceMax", [INTS, np.array([1])], {"keepdims": 0}, INT),
    "ReduceMax kept": ("ReduceMax", [VALUES, np.array([0])], {"keepdims": 1}, FLOAT),
    "Gemm": ("Gemm", [VALUES, VALUES, VALUES[0, :3]], {"alpha": 0.5, "beta": 2.0, "transB": 1}, FLOAT),
    "Slice": ("Slice", [VALUES, np.array([1]), np.array([9]), np.array([-1]), np.array([2])], {}, FLOAT),
    "Gelu": ("Gelu", [VALUES], {"approximate": "none"}, FLOAT),
    "Gelu tanh": ("Gelu", [VALUES], {"approximate": "tanh"}, FLOAT),
    "Relu": ("Relu", [VALUES], {}, FLOAT),
    "LeakyRelu": ("LeakyRelu", [VALUES], {"alpha": 0.2}, FLOAT),
    "Tanh": ("Tanh", [VALUES], {}, FLOAT),
    "Mish": ("Mish", [VALUES], {}, FLOAT),
    "HardSwish": ("HardSwish", [VALUES * 4], {}, FLOAT),
}


def one_node(case: str, folder: Path) -> tuple[Path, dict[str, np.ndarray[Any, Any]], onnx.ModelProto]:
    op_type, arrays, attributes, result = OPERATORS[case]
    feeds = {f"in{index}": np.asarray(array) for index, array in enumerate(arrays)}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    node = helper.make_node(op_type, list(feeds), ["out"], **attributes)
    graph = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("out", result, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, str(folder / "one.onnx"))
    return folder / "one.onnx", feeds, model


@pytest.mark.parametrize("case", OPERATORS)
def test_an_operator_equals_onnx_own_reference(case: str, tmp_path: Path) -> None:
    path, feeds, model = one_node(case, tmp_path)
    (want,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    got = GraphEvaluator(path).run({name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})["out"]
    assert got.numpy().dtype == want.dtype
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("op_type", "arrays", "attributes"),
    [
        ("Where", [FLAGS, INTS, VALUES], {}),
        ("Clip", [VALUES, np.int64(0)], {}),
        ("Sub", [INTS, VALUES], {}),
        ("Greater", [INTS, VALUES], {}),
        ("CumSum", [INTS, np.int64(1)], {"exclusive": 1}),
        ("ReduceMax", [INTS], {}),
        ("Slice", [VALUES, np.array([3]), np.array([0]), np.array([0]), np.array([-1])], {}),
    ],
    ids=["where-types", "clip-types", "sub-types", "greater-types", "exclusive", "all-axes", "negative-step"],
)
def test_what_an_operator_does_not_implement_is_an_error(
    op_type: str, arrays: list[Any], attributes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "bad", (op_type, arrays, attributes, FLOAT))
    path, feeds, _ = one_node("bad", tmp_path)
    with pytest.raises(ExportError, match=f"cannot compute {op_type}"):
        GraphEvaluator(path).run({name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
