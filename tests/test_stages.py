"""The validation: sound bundles pass, every injected fault fails exactly the stages it should, not-run is never a pass."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracles
import pytest
import torch
from conftest import TINY, MakeCheckpoint
from safetensors.numpy import load_file, save_file

from llama_export._system.content import sha256_of_file
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.config.settings import EngineConfig, ExportConfig
from llama_export.engine.build import build_engine, execution_blocker
from llama_export.engine.plugins import kernels_installed
from llama_export.errors import ConfigError
from llama_export.export.export import export_checkpoint
from llama_export.model import load_reference
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.result import ParityReport, Stage
from llama_export.parity.sessions import reference_session
from llama_export.parity.stages import causal as stages_module
from llama_export.parity.stages.causal import STAGES
from llama_export.parity.validate import validate_bundle

QUICK = ValidateConfig(steps=6, prompt_tokens=14)
ENGINE = {"engine/structure", "engine/execution"}
HASHES = {"bundle/weights"}
KERNELS = {name for name in STAGES if name.startswith(("kernels/", "ops/"))} - {"ops/bodies"}
GPU = set() if torch.cuda.is_available() else {name for name in KERNELS if "/gpu" in name}
TEXT = {"text/onnxruntime", "text/evaluator"}
"""Only with ``--text``: tests/test_text_stages.py."""
NOT_RUNNABLE = ENGINE | HASHES | GPU | TEXT | (set() if kernels_installed() is None else KERNELS)
RUNNABLE = set(STAGES) - NOT_RUNNABLE
WITHOUT_KERNELS = replace(QUICK, stages=("reference", "graph", "ops/bodies", "onnxruntime", "evaluator", "engine"))
"""The interpreter is slow; what the kernel stages find is in tests/plugins/test_stages_plugins.py."""


def verdicts(report: ParityReport, verdict: str) -> set[str]:
    return {stage.name for stage in report.stages if stage.verdict == verdict}


def explain(report: ParityReport) -> str:
    """For the message of a failing test: every stage with its number."""
    return "\n".join(f"{stage.name}: {stage.verdict} {dict(stage.metrics)} {stage.reason}" for stage in report.stages)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random float32 model whose weights are large enough for every fault to show; copied, never modified."""
    folder = tmp_path_factory.mktemp("stages") / "checkpoint"
    oracles.huggingface_llama(folder, seed=9, **TINY)
    export_checkpoint(folder)
    return load_bundle(folder)


# ---- sound bundles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_sound_bundle_passes_and_its_engine_stages_are_not_run(tiny_bundles: dict[str, Bundle], dtype: str) -> None:
    lines: list[str] = []
    report = validate_bundle(tiny_bundles[dtype], QUICK, log=lines.append)
    assert report.verdict == "pass", explain(report)
    assert [stage.name for stage in report.stages] == list(STAGES)
    assert verdicts(report, "pass") == RUNNABLE, explain(report)
    assert verdicts(report, "not-run") == NOT_RUNNABLE
    for stage in report.stages:
        assert stage.reason
        if stage.verdict == "not-run":
            hints = ("llama-export build", "--text", "--hash-weights")
            assert any(hint in stage.reason for hint in hints) or stage.name in KERNELS
            assert not stage.metrics
            continue
        assert stage.tolerance is not None
        assert stage.tolerance.why
        numbers = [value for value in stage.metrics.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers), stage
        assert stage.metrics[stage.tolerance.metric] <= stage.tolerance.value
    assert len(lines) == len(STAGES)
    assert report.model["dtype"] == dtype
    assert report.hashes["graph"] == sha256_of_file(tiny_bundles[dtype].model_path)
    json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_a_checkpoint_with_large_random_weights_passes(sound: Bundle) -> None:
    report = validate_bundle(sound, WITHOUT_KERNELS)
    assert report.verdict == "pass", explain(report)
    assert verdicts(report, "pass") == RUNNABLE - KERNELS
    greedy = next(stage for stage in report.stages if stage.name == "onnxruntime/greedy")
    assert (greedy.metrics["prompts"], greedy.metrics["equal_prompts"], greedy.metrics["tokens"]) == (5, 5, 64)
    decode = next(stage for stage in report.stages if stage.name == "onnxruntime/decode")
    assert len(decode.series["relative maximum per decode step"]) == QUICK.steps


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_shortest_context_and_few_steps_are_enough_for_every_stage(
    make_checkpoint: MakeCheckpoint, steps: int
) -> None:
    folder = make_checkpoint(max_position_embeddings=16)
    export_checkpoint(folder)
    config = ValidateConfig(steps=steps)
    if steps == 1:
        expected = RUNNABLE
    else:
        config, expected = replace(config, stages=WITHOUT_KERNELS.stages), RUNNABLE - KERNELS
    report = validate_bundle(load_bundle(folder), config)
    assert verdicts(report, "pass") == expected, explain(report)


def test_docs_list_the_stages_in_their_order() -> None:
    text = (Path(__file__).parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
    section = text.split("\n## Stages\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`([^`]+)`", row)] == list(STAGES)


# ---- injected faults --------------------------------------------------------------------------------------------


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def scale_attribute(model: onnx.ModelProto, node: str, name: str, factor: float) -> None:
    next(item for item in node_of(model, node).attribute if item.name == name).f *= factor


def swap_weights(model: onnx.ModelProto, left: str, right: str) -> None:
    """Each initializer points at the other's bytes."""
    items = [next(item for item in model.graph.initializer if item.name == name) for name in (left, right)]
    offsets = [next(entry for entry in item.external_data if entry.key == "offset") for item in items]
    offsets[0].value, offsets[1].value = offsets[1].value, offsets[0].value


def insert(model: onnx.ModelProto, consumer: str, slot: int, *nodes: onnx.NodeProto) -> None:
    """The consumer reads the output of the last of the new nodes instead."""
    node = node_of(model, consumer)
    node.input[slot] = nodes[-1].output[0]
    at = list(model.graph.node).index(node)
    for new in reversed(nodes):
        model.graph.node.insert(at, new)


def forget_past_length(model: onnx.ModelProto) -> None:
    """Positions start at 0 in every call."""
    make = onnx.helper.make_node
    insert(
        model, "model/Unsqueeze", 0,
        make("Constant", [], ["fault/zero"], name="fault/Constant", value_int=0),
        make("Mul", ["past_length", "fault/zero"], ["fault/none"], name="fault/Mul"),
    )  # fmt: skip


def length_of_row_0(model: onnx.ModelProto) -> None:
    """One attention takes the first row's length for all rows."""
    make = onnx.helper.make_node
    insert(
        model, "model.layers.0.self_attn/LlamaAttention", 7,
        make("Constant", [], ["fault/first"], name="fault/Constant", value_ints=[0]),
        make("Gather", ["past_length", "fault/first"], ["fault/length"], name="fault/Gather"),
        make("Shape", ["past_length"], ["fault/shape"], name="fault/Shape"),
        make("Expand", ["fault/length", "fault/shape"], ["fault/lengths"], name="fault/Expand"),
    )  # fmt: skip


def wrong_group_count(model: onnx.ModelProto) -> None:
    item = node_of(model, "model.layers.1.self_attn/LlamaAttention").attribute
    next(entry for entry in item if entry.name == "num_kv_heads").i = 3


GRAPH = {"graph/float64-eager", "graph/float64-bodies"}
SIXTEEN_BIT = {"evaluator/bfloat16", "evaluator/float16"}
AGAINST_REFERENCE = {
    *("graph/float64-ort-bodies", "onnxruntime/decode", "onnxruntime/cache", "onnxruntime/greedy"),
}
RUNTIME = {name for name in STAGES if name.startswith("onnxruntime/")}
FAULTS: dict[str, tuple[str, Callable[[onnx.ModelProto], None], set[str]]] = {
    "epsilon 1e-5 -> 1.1e-5 in one norm": (
        "model.onnx",
        lambda m: scale_attribute(m, "model.layers.1.input_layernorm/LlamaAddRMSNorm", "epsilon", 1.1),
        GRAPH,
    ),
    "gate and up swapped": (
        "model.onnx",
        lambda m: swap_weights(m, "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        GRAPH | SIXTEEN_BIT,
    ),
    "attention scale x 1.5": (
        "model.onnxruntime.onnx",
        lambda m: scale_attribute(m, "model.layers.0.self_attn/LlamaAttention", "scale", 1.5),
        AGAINST_REFERENCE | {"onnxruntime/prefill"},
    ),
    # Prefill starts at 0 anyway, and every row of a batch is wrong in the same way as the row alone.
    "positions forget past_length": (
        "model.onnxruntime.onnx", forget_past_length, AGAINST_REFERENCE | {"onnxruntime/chunked-prefill"},
    ),
    # One row alone is right: only batches show it.
    "every row takes row 0's length": (
        "model.onnxruntime.onnx", length_of_row_0, {"graph/float64-ort-bodies", "onnxruntime/batch-neighbours"},
    ),
    "a graph onnxruntime cannot run": (
        "model.onnxruntime.onnx", wrong_group_count, RUNTIME | {"graph/float64-ort-bodies"},
    ),
}  # fmt: skip


def copy_with_fault(sound: Bundle, folder: Path, fault: str) -> Path:
    file, inject, _ = FAULTS[fault]
    shutil.copytree(sound.folder, folder)
    model = onnx.load(str(folder / file), load_external_data=False)
    inject(model)
    (folder / file).write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_exactly_the_stages_it_should(sound: Bundle, tmp_path: Path, fault: str) -> None:
    bundle = load_bundle(copy_with_fault(sound, tmp_path / "faulty", fault), ignore_hashes=True)
    report = validate_bundle(bundle, WITHOUT_KERNELS)
    assert verdicts(report, "fail") == FAULTS[fault][2], explain(report)
    assert verdicts(report, "not-run") == ENGINE | HASHES | KERNELS | TEXT, explain(report)
    assert report.verdict == "fail"
    assert report.hashes["graph"] == sha256_of_file(bundle.model_path), "the hash is of what was judged"


def test_a_weight_that_is_not_a_number_fails_every_comparison_of_values(sound: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(sound.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][5, 3] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = validate_bundle(load_bundle(folder, ignore_hashes=True), WITHOUT_KERNELS)
    # the cache holds no logits; and without a finite noise floor there is no 16-bit verdict
    finite = {
        "onnxruntime/cache",
        "onnxruntime/in-place",
        "onnxruntime/repeat",
        "reference/rope",
        "graph/rope",
        "ops/bodies",
    }
    assert verdicts(report, "pass") == finite, explain(report)
    assert verdicts(report, "not-run") == ENGINE | HASHES | SIXTEEN_BIT | KERNELS | TEXT, explain(report)
    assert verdicts(report, "fail") == RUNNABLE - finite - SIXTEEN_BIT - KERNELS
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    errors = {stage["name"]: stage["metrics"].get("error") for stage in document["stages"]}
    assert errors["onnxruntime/prefill"] == "inf"


def test_a_flipped_bit_in_the_shared_weights_is_found_by_the_hash_and_by_nothing_else(
    sound: Bundle, tmp_path: Path
) -> None:
    """Reference and graph read the same byte, and the modification time says nothing."""
    folder = tmp_path / "rotten"
    export_checkpoint(sound.folder, folder, ExportConfig(hash_weights=True))
    config = replace(QUICK, stages=("bundle", "reference/program", "graph/float64-eager", "onnxruntime/prefill"))
    assert verdicts(validate_bundle(load_bundle(folder), config), "fail") == set()
    weights = folder / "model.safetensors"
    before, raw = weights.stat(), bytearray(weights.read_bytes())
    raw[-1000] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    # Opening compares a sample, which holds every byte of tensors as small as these.
    report = validate_bundle(load_bundle(folder, ignore_hashes=True), config)
    assert verdicts(report, "fail") == {"bundle/weights"}, explain(report)
    assert "model.safetensors" in next(stage.reason for stage in report.stages if stage.name == "bundle/weights")


@pytest.mark.parametrize(("dtype", "verdict"), [("float32", "not-run"), ("float16", "fail")])
def test_a_model_that_overflows_float16_has_no_floor_there_and_fails_as_a_float16_bundle(
    sound: Bundle, tmp_path: Path, dtype: str, verdict: str
) -> None:
    """Where transformers itself overflows, the graph cannot be blamed, unless it is what the bundle promises to run."""
    source = tmp_path / "checkpoint"
    source.mkdir()
    shutil.copyfile(sound.folder / "config.json", source / "config.json")
    weights = load_file(sound.folder / "model.safetensors")
    for name in ("gate", "up"):
        weights[f"model.layers.0.mlp.{name}_proj.weight"] *= 400
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    export_checkpoint(source, config=ExportConfig(dtype=dtype))
    report = validate_bundle(load_bundle(source), ValidateConfig(steps=2, prompt_tokens=8, stages=("evaluator",)))
    found = {stage.name: stage for stage in report.stages}
    assert found["evaluator/float16"].verdict == verdict, explain(report)
    assert found["evaluator/bfloat16"].verdict == "pass", explain(report)
    if verdict == "not-run":
        assert "no noise floor" in found["evaluator/float16"].reason


def test_the_command_exits_1_for_a_faulty_bundle_and_0_for_a_sound_one(
    sound: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_with_fault(sound, tmp_path / "faulty", "epsilon 1e-5 -> 1.1e-5 in one norm")
    options = ["--stages", "graph", "--json", "--report"]
    assert main(["validate", str(folder), *options, str(tmp_path / "none")]) == 2, "a changed file is refused first"
    assert not (tmp_path / "none").exists()
    capsys.readouterr()
    assert main(["validate", str(folder), "--ignore-hashes", *options, str(tmp_path / "bad")]) == 1
    bad = json.loads(capsys.readouterr().out)
    assert main(["validate", str(sound.folder), *options, str(tmp_path / "good")]) == 0
    good = json.loads(capsys.readouterr().out)
    for document, verdict, failed, name in ((bad, "fail", GRAPH, "bad"), (good, "pass", set(), "good")):
        assert document["verdict"] == verdict
        assert {stage["name"] for stage in document["stages"] if stage["verdict"] == "fail"} == failed
        assert json.loads((tmp_path / name / "parity.json").read_text(encoding="utf-8")) == document


# ---- engines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_engine(sound: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The sound bundle with one engine of 12 tokens, fewer than the stages use; copied, never modified."""
    pytest.importorskip("tensorrt_rtx_bindings")
    folder = tmp_path_factory.mktemp("engine") / "bundle"
    shutil.copytree(sound.folder, folder)
    build_engine(load_bundle(folder), EngineConfig(ops="native", max_seq_len=12, max_batch=1))
    return load_bundle(folder)


ENGINES_ONLY = ValidateConfig(steps=6, prompt_tokens=14, stages=("engine",))


def engine_stages(report: ParityReport) -> dict[str, Stage]:
    return {stage.name.rsplit("/", 1)[0]: stage for stage in report.stages if stage.name.count("/") == 2}


def test_an_engine_is_checked_here_and_its_execution_is_not_run_without_a_gpu(with_engine: Bundle) -> None:
    blocker = execution_blocker("tensorrt-rtx")
    if blocker is None:
        pytest.skip("this machine runs engines")
    report = validate_bundle(with_engine, ENGINES_ONLY)
    found = engine_stages(report)
    assert {stage.name for stage in found.values()} == {f"{name}/{with_engine.engines[0].stem}" for name in ENGINE}
    assert found["engine/structure"].verdict == "pass", explain(report)
    assert found["engine/execution"].verdict == "not-run"
    assert found["engine/execution"].reason == blocker
    assert report.hashes[with_engine.engines[0].name] == sha256_of_file(with_engine.engines[0])
    assert (report.verdict, report.missing) == ("pass", [])
    for name, missing in (("engine/structure", []), ("engine/execution", ["engine/execution"])):
        required = validate_bundle(with_engine, replace(ENGINES_ONLY, require=(name,)))
        assert required.missing == missing


def test_a_changed_engine_file_fails_its_stages(with_engine: Bundle, tmp_path: Path) -> None:
    shutil.copytree(with_engine.folder, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    data = bytearray(bundle.engines[0].read_bytes())
    data[-1] ^= 1
    bundle.engines[0].write_bytes(data)
    report = validate_bundle(bundle, ENGINES_ONLY)
    ran = [stage for stage in report.stages if stage.name.startswith("engine/")]
    assert [stage.verdict for stage in ran] == ["fail", "fail"], explain(report)
    assert report.verdict == "fail"


@pytest.mark.parametrize(("change", "verdict"), [(1.0, "pass"), (1.001, "fail")])
def test_an_engine_that_runs_is_held_to_the_float64_reference(
    with_engine: Bundle, monkeypatch: pytest.MonkeyPatch, change: float, verdict: str
) -> None:
    """No GPU here: the reference stands in for the engine's session, exact or wrong by a thousandth."""
    model = load_reference(with_engine.folder)
    model.lm_head.weight.mul_(change)
    monkeypatch.setattr(stages_module, "execution_blocker", lambda backend: None)
    monkeypatch.setattr(stages_module, "EngineSession", lambda bundle, path: reference_session(model, max_seq_len=12))
    report = validate_bundle(with_engine, ENGINES_ONLY)
    stage = engine_stages(report)["engine/execution"]
    assert stage.verdict == verdict, explain(report)
    assert stage.reason.startswith("prefill of 11 and 1 decode steps")


# ---- not run ----------------------------------------------------------------------------------------------------


def test_stages_that_are_not_selected_are_not_run_and_say_so(tiny_bundles: dict[str, Bundle]) -> None:
    report = validate_bundle(tiny_bundles["float32"], ValidateConfig(stages=("onnxruntime/in-place", "graph")))
    ran = {name for name in STAGES if name.startswith("graph/")} | {"onnxruntime/in-place"}
    assert verdicts(report, "pass") == ran
    assert verdicts(report, "not-run") == set(STAGES) - ran
    assert {stage.reason for stage in report.stages if stage.verdict == "not-run"} == {"not selected by --stages"}
    assert report.verdict == "pass"


@pytest.mark.parametrize(
    "required", ["engine", "engine/structure", "engine/execution", "reference", "reference/transformers"]
)
def test_a_required_stage_that_did_not_run_fails(tiny_bundles: dict[str, Bundle], required: str) -> None:
    config = ValidateConfig(stages=("onnxruntime/in-place", "engine"), require=("onnxruntime/in-place", required))
    report = validate_bundle(tiny_bundles["float32"], config)
    assert verdicts(report, "pass") == {"onnxruntime/in-place"}
    assert report.verdict == "fail"
    assert report.missing == [required]


def test_the_command_exits_1_when_a_required_stage_did_not_run(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["validate", str(tiny_bundles["float32"].folder), "--report", str(tmp_path / "report"), "--json"]
    argv += ["--stages", "onnxruntime/in-place"]
    assert main([*argv, "--require", "engine/execution"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == ["engine/execution"]
    assert main([*argv, "--require", "onnxruntime/in-place"]) == 0


@pytest.mark.parametrize("option", ["stages", "require"])
@pytest.mark.parametrize("name", ["nothing", "onnx", "onnxruntime/pre", "graph/float64", "ONNXRUNTIME", ""])
def test_an_unknown_stage_name_is_a_config_error_that_lists_the_names(
    tiny_bundles: dict[str, Bundle], option: str, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"no stage `{name}`") as caught:
        validate_bundle(tiny_bundles["float32"], ValidateConfig(**{option: (name,)}))
    assert "onnxruntime/greedy" in caught.value.details["expected"]


@pytest.mark.parametrize("config", [{"steps": 0}, {"steps": 125}, {"prompt_tokens": 7}], ids=str)
def test_steps_that_do_not_fit_the_context_are_a_config_error(
    tiny_bundles: dict[str, Bundle], config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"do not fit a context of 128 tokens|bad value for steps"):
        validate_bundle(tiny_bundles["float32"], ValidateConfig(**config))


def test_without_transformers_its_stages_are_not_run_and_name_the_extra(
    tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = validate_bundle(tiny_bundles["float32"], WITHOUT_KERNELS)
    alone = {name for name in STAGES if name.startswith("graph/")} | {"reference/program"}
    alone |= {"ops/bodies", "onnxruntime/repeat", "onnxruntime/in-place"}
    assert verdicts(report, "pass") == alone, explain(report)
    theirs = set(STAGES) - alone - ENGINE - HASHES - KERNELS - TEXT
    assert verdicts(report, "not-run") == theirs | ENGINE | HASHES | KERNELS | TEXT
    assert all("pip install '.[parity]'" in stage.reason for stage in report.stages if stage.name in theirs)
    assert report.verdict == "pass"


def report_of(*found: str, required: tuple[str, ...] = ()) -> ParityReport:
    stages = tuple(
        Stage(name=f"part/{index}", verdict=verdict, reason="made up")  # type: ignore[arg-type]
        for index, verdict in enumerate(found)
    )
    return ParityReport(stages=stages, required=required, environment={}, hashes={}, model={}, created_at="")


@pytest.mark.parametrize(
    ("found", "required", "verdict"),
    [
        (["pass", "pass"], [], "pass"),
        (["pass", "not-run"], [], "pass"),
        (["pass", "fail"], [], "fail"),
        (["fail", "not-run"], [], "fail"),
        (["not-run", "not-run"], [], "fail"),
        ([], [], "fail"),
        (["pass", "not-run"], ["part/0"], "pass"),
        (["pass", "not-run"], ["part/1"], "fail"),
        (["pass", "not-run"], ["part"], "fail"),
        (["pass"], ["elsewhere"], "fail"),
        (["pass"], ["par"], "fail"),
    ],
    ids=str,
)
def test_not_run_never_counts_as_passed(found: list[str], required: list[str], verdict: str) -> None:
    assert report_of(*found, required=tuple(required)).verdict == verdict
