"""A fault that float64 cannot see is found in the artefact: the layer by prefixes, the op alone, and saved to be run again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracles
import pytest
import torch
from fault_catalogue import inject
from onnx import helper
from support import snapshot

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.config.settings import EngineConfig
from llama_export.engine.build import build_engine
from llama_export.engine.check import check_engine
from llama_export.errors import ConfigError
from llama_export.export.export import export_checkpoint
from llama_export.parity.calls import Answers
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.locate.case import SegmentRunner, remove_cases, reproduce_case, segment_model, segments
from llama_export.parity.locate.prefix import first_layers
from llama_export.parity.locate.search import first_failing_layer
from llama_export.parity.oracle.evaluator import GraphEvaluator
from llama_export.parity.report.result import Stage
from llama_export.parity.sessions import evaluator_session
from llama_export.parity.stages import causal as stages_module
from llama_export.parity.stages.causal_validator import CausalValidator
from llama_export.parity.validate import validate_bundle
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

LAYERS = 5


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Five layers, so that a bisection has something to do; copied, never modified."""
    folder = tmp_path_factory.mktemp("search") / "checkpoint"
    oracles.huggingface_llama(
        folder, seed=3, vocab_size=90, hidden_size=48, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    export_checkpoint(folder)
    return load_bundle(folder)


def rounded(bundle: Bundle, folder: Path, node_name: str, file: str = "model.onnxruntime.onnx") -> Bundle:
    """A copy in which one node's result makes a round trip through bfloat16: nothing in float64, much in float32."""
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(str(folder / file), load_external_data=False)
    at, node = next((at, node) for at, node in enumerate(model.graph.node) if node.name == node_name)
    wanted = node.output[0]
    node.output[0] = f"{wanted}/right"
    there = helper.make_node(
        "Cast", [f"{wanted}/right"], [f"{wanted}/16"], name=f"{node_name}/there", to=onnx.TensorProto.BFLOAT16
    )
    back = helper.make_node("Cast", [f"{wanted}/16"], [wanted], name=f"{node_name}/back", to=onnx.TensorProto.FLOAT)
    model.graph.node.insert(at + 1, there)
    model.graph.node.insert(at + 2, back)
    (folder / file).write_bytes(model.SerializeToString())
    return load_bundle(folder, ignore_hashes=True)


def run(bundle: Bundle, *names: str, cases: Path | None = None) -> dict[str, Stage]:
    config = ValidateConfig(steps=4, prompt_tokens=12, stages=names, cases=cases)
    return {stage.name: stage for stage in validate_bundle(bundle, config).stages if stage.verdict != "not-run"}


# ---- prefixes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, LAYERS])
def test_a_prefix_is_the_model_with_fewer_layers(sound: Bundle, count: int) -> None:
    """Against transformers' own model of so many layers, which reads the same weights."""
    transformers = pytest.importorskip("transformers")
    before = snapshot(sound.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        sound.folder, num_hidden_layers=count, attn_implementation="eager"
    )
    ids = torch.tensor([[5, 3, 8, 1, 7]])
    with torch.no_grad():
        want = model(ids).logits.numpy()
    with first_layers(sound, count) as prefix:
        assert prefix.config.num_hidden_layers == count
        session = OnnxRuntimeSession(prefix, max_seq_len=8)
        got = session.step(ids, logits_index=np.arange(5)[None])
        assert len(session.cache) == 2 * count
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert snapshot(sound.folder) == before, "nothing is left behind"


def test_a_prefix_is_left_by_no_exception(sound: Bundle) -> None:
    before = snapshot(sound.folder)
    with pytest.raises(KeyboardInterrupt), first_layers(sound, 2):
        raise KeyboardInterrupt
    assert snapshot(sound.folder) == before


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7, 16, 80])
def test_the_bisection_finds_every_layer(num_layers: int) -> None:
    for faulty in range(num_layers):
        asked: list[int] = []

        def passes(count: int, faulty: int = faulty, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count <= faulty

        assert first_failing_layer(passes, num_layers) == faulty
        assert len(asked) <= max(0, (num_layers - 1).bit_length())
        assert 0 not in asked
        assert num_layers not in asked, "the whole is known to be wrong"


# ---- onnxruntime ------------------------------------------------------------------------------------------------

PLACES = [
    ("model.embed_tokens/Gather", None),
    ("model.layers.0.self_attn.v_proj/MatMul", 0),
    ("model.layers.1.self_attn/LlamaAttention", 1),
    ("model.layers.2.mlp/Mul.1", 2),
    ("model.layers.3.input_layernorm/LlamaAddRMSNorm", 3),
    (f"model.layers.{LAYERS - 1}.mlp.down_proj/MatMul", LAYERS - 1),
    ("lm_head/MatMul", None),
]


@pytest.mark.parametrize(("node", "layer"), PLACES, ids=[node for node, _ in PLACES])
def test_onnxruntime_is_searched_to_the_operation(sound: Bundle, tmp_path: Path, node: str, layer: int | None) -> None:
    bundle = rounded(sound, tmp_path / "faulty", node)
    before = snapshot(bundle.folder)
    found = run(bundle, "graph/float64-ort-bodies", "onnxruntime/prefill", cases=tmp_path / "cases")
    assert found["graph/float64-ort-bodies"].verdict == "pass", "nothing is wrong in float64"
    stage = found["onnxruntime/prefill"]
    assert stage.verdict == "fail"
    place = stage.first_divergence
    assert place is not None
    # What stands in the place of a custom op is called by its name.
    op = node.rpartition("/")[2] if "/Llama" in node else "Cast"
    assert (place["layer"], place["op"]) == (layer, op)
    assert place["node"].startswith(node)
    assert place["confirmed"] == "yes"
    assert place["reproduce"] == f"llama-export reproduce {tmp_path / 'cases' / 'onnxruntime'}"
    assert snapshot(bundle.folder) == before


def test_a_wrong_file_is_named_by_the_graph_stage_and_not_searched_again(
    sound: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sound.folder, tmp_path / "faulty")
    model = onnx.load(str(tmp_path / "faulty" / "model.onnxruntime.onnx"), load_external_data=False)
    node = next(node for node in model.graph.node if node.name == "model.layers.3.self_attn/LlamaAttention")
    next(item for item in node.attribute if item.name == "scale").f *= 1.5
    (tmp_path / "faulty" / "model.onnxruntime.onnx").write_bytes(model.SerializeToString())
    monkeypatch.delattr(stages_module, "onnxruntime_divergence")
    found = run(load_bundle(tmp_path / "faulty", ignore_hashes=True), "graph/float64-ort-bodies", "onnxruntime/prefill")
    assert found["onnxruntime/prefill"].first_divergence == found["graph/float64-ort-bodies"].first_divergence
    assert found["onnxruntime/prefill"].first_divergence is not None
    assert found["onnxruntime/prefill"].first_divergence["layer"] == 3


def test_a_layer_is_named_where_no_operation_alone_is_wrong(sound: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of a fusion: wrong as soon as layer 2 is in the model, right for each of its operations."""
    right = CausalValidator.run_onnxruntime

    def fused(self: CausalValidator, *arguments: Any, **settings: Any) -> Answers:
        found = right(self, *arguments, **settings)
        worse = [part * (1.001 if self.llama.num_hidden_layers > 2 else 1) for part in found.logits]
        return replace(found, logits=worse)

    monkeypatch.setattr(CausalValidator, "run_onnxruntime", fused)
    place = run(sound, "onnxruntime/prefill")["onnxruntime/prefill"].first_divergence
    assert place == {"layer": 2, "op": None, "node": None, "tensor": None, "confirmed": "yes"}


def test_a_fault_that_does_not_come_back_is_not_confirmed(sound: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    right, runs = CausalValidator.run_onnxruntime, []

    def once(self: CausalValidator, *arguments: Any, **settings: Any) -> Answers:
        runs.append(1)
        found = right(self, *arguments, **settings)
        return replace(found, logits=[part * 2 for part in found.logits]) if len(runs) == 1 else found

    monkeypatch.setattr(CausalValidator, "run_onnxruntime", once)
    place = run(sound, "onnxruntime/prefill")["onnxruntime/prefill"].first_divergence
    assert place is not None
    assert place["confirmed"].startswith("no")


# ---- the evaluator and the kernels ------------------------------------------------------------------------------


def test_a_wrong_kernel_is_named_with_its_layer(sound: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_export_plugins")
    from llama_export_plugins.kernels import loop

    right: dict[str, Callable[..., Any]] = loop.kernel_ops()

    def attention(*items: Any) -> Any:
        return right["LlamaAttention"](*items[:-1], items[-1] * 1.02)

    monkeypatch.setattr(loop, "kernel_ops", lambda: {**right, "LlamaAttention": attention})
    name = "kernels/interpreter-float32"
    stage = run(sound, name, cases=tmp_path)[name]
    assert stage.verdict == "fail"
    assert stage.first_divergence is not None
    assert (stage.first_divergence["layer"], stage.first_divergence["op"]) == (0, "LlamaAttention")
    case, _, wrong = reproduce_case(tmp_path / "kernels-interpreter-float32")
    assert (wrong, case.custom_ops) == (True, "interpreter")
    monkeypatch.undo()
    assert not reproduce_case(tmp_path / "kernels-interpreter-float32")[2], "the right kernel passes on the same inputs"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_only_16_bits_lose_is_named(sound: Bundle, tmp_path: Path, dtype: str) -> None:
    """x + 1000 - 1000: nothing in float64."""
    shutil.copytree(sound.folder, tmp_path / "faulty")
    model = onnx.load(str(sound.model_path), load_external_data=False)
    at, node = next((at, node) for at, node in enumerate(model.graph.node) if node.name == "model.layers.1.mlp/Mul.1")
    wanted, prefix = node.output[0], f"{node.name}/fault"
    node.output[0] = f"{wanted}/right"
    for offset, (op, inputs, output) in enumerate(
        [
            ("Constant", [], f"{prefix}/large"),
            ("CastLike", [f"{prefix}/large", f"{wanted}/right"], f"{prefix}/typed"),
            ("Add", [f"{wanted}/right", f"{prefix}/typed"], f"{prefix}/sum"),
            ("Sub", [f"{prefix}/sum", f"{prefix}/typed"], wanted),
        ]
    ):
        attributes = {"value_float": 1000.0} if op == "Constant" else {}
        made = helper.make_node(op, inputs, [output], name=f"{prefix}/{op}", **attributes)
        model.graph.node.insert(at + 1 + offset, made)
    (tmp_path / "faulty" / "model.onnx").write_bytes(model.SerializeToString())
    name = f"evaluator/{dtype}"
    found = run(load_bundle(tmp_path / "faulty", ignore_hashes=True), "graph/float64-eager", name)
    assert found["graph/float64-eager"].verdict == "pass"
    place = found[name].first_divergence
    assert place is not None
    assert (place["layer"], place["op"], place["tensor"]) == (1, "Sub", wanted)


# ---- engines ----------------------------------------------------------------------------------------------------


def test_an_engine_is_searched_by_engines_of_its_first_layers(
    sound: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built by TensorRT-RTX, each with the whole structure checked; what a GPU would compute is made up: wrong from layer 3 on."""
    pytest.importorskip("tensorrt_rtx_bindings")
    shutil.copytree(sound.folder, tmp_path / "built")
    bundle = load_bundle(tmp_path / "built", ignore_hashes=True)
    ops = "native"
    build_engine(bundle, EngineConfig(ops=ops, max_seq_len=24, max_batch=2))
    built: list[tuple[str, int]] = []

    class OnAGpu:
        """The interface of an engine's session over the evaluator."""

        def __init__(self, bundle: Bundle, engine: Path) -> None:
            facts = check_engine(bundle, engine).sidecar
            layers = bundle.config.num_hidden_layers
            built.append((facts.ops, layers))
            evaluator = GraphEvaluator(bundle.model_path, dtype=torch.float32)
            self._right = evaluator_session(evaluator, bundle.config, max_seq_len=facts.max_seq_len)
            self._factor = 1.01 if layers > 3 else 1.0
            self.cache_array = self._right.cache_array

        def step(self, *arguments: Any, **settings: Any) -> Any:
            return self._right.step(*arguments, **settings) * self._factor

        def close(self) -> None:
            pass

    monkeypatch.setattr(stages_module, "EngineSession", OnAGpu)
    monkeypatch.setattr(stages_module, "execution_blocker", lambda backend: None)
    before = snapshot(bundle.folder)
    (stage,) = run(bundle, "engine/execution").values()
    assert (stage.verdict, stage.name.startswith("engine/execution/")) == ("fail", True)
    assert stage.first_divergence == {"layer": 3, "op": None, "node": None, "tensor": None, "confirmed": "yes"}
    assert built == [(ops, LAYERS), (ops, 2), (ops, 3), (ops, 4), (ops, LAYERS)]
    assert snapshot(bundle.folder) == before


# ---- saved operations -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(sound: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operation of a weight with one flipped bit, as the graph stage saved it."""
    folder = tmp_path_factory.mktemp("case")
    shutil.copytree(sound.folder, folder / "faulty")
    where = inject(load_bundle(folder / "faulty"), "weight: one exponent bit flipped", np.random.default_rng(1))
    stage = run(load_bundle(folder / "faulty", ignore_hashes=True), "graph/float64-bodies", cases=folder / "cases")[
        "graph/float64-bodies"
    ]
    assert stage.first_divergence is not None
    assert (stage.first_divergence["layer"], stage.first_divergence["op"]) == (where.layer, where.op)
    shutil.rmtree(folder / "faulty")  # a case needs nothing but itself
    return folder / "cases" / "graph-float64-bodies"


def test_a_saved_operation_is_still_wrong_and_any_tool_can_run_it(
    case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    assert main(["reproduce", str(case), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["wrong"], data["op"], data["runtime"], data["dtype"]) == (True, "MatMul", "evaluator", "float64")
    session = onnxruntime.InferenceSession(str(case / "op.onnx"))
    (name,) = (value.name for value in session.get_inputs())
    (got,) = session.run(None, {name: np.load(case / "input.0.npy").astype(np.float32)})
    want = np.load(case / "want.npy")
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error == pytest.approx(data["relative_max"], rel=1e-3)


def test_a_mended_operation_is_right(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the graph computes becomes what is wanted of it."""
    shutil.copytree(case, tmp_path / "mended")
    model = onnx.load(str(case / "op.onnx"))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)
    np.save(tmp_path / "mended" / "want.npy", np.load(case / "input.0.npy") @ weight.T)
    assert main(["reproduce", str(tmp_path / "mended")]) == 0
    assert "wrong: false" in capsys.readouterr().out


def test_a_validation_removes_the_cases_of_the_one_before(sound: Bundle, case: Path, tmp_path: Path) -> None:
    shutil.copytree(case, tmp_path / "cases" / "graph-float64-bodies")
    (tmp_path / "cases" / "mine").mkdir()
    run(sound, "onnxruntime/in-place", cases=tmp_path / "cases")
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["mine"]


def damage(case: Path, what: str) -> None:
    data = json.loads((case / "case.json").read_text(encoding="utf-8"))
    if what == "version":
        data["schema_version"] = 99
    elif what == "runtime":
        data["runtime"] = "abacus"
    elif what == "key":
        del data["tensor"]
    elif what == "graph":
        (case / "op.onnx").write_bytes(b"\xff\xff not a model")
    elif what == "input":
        (case / "input.0.npy").write_bytes(b"nothing")
    elif what == "want":
        (case / "want.npy").unlink()
    elif what == "archive":
        np.savez(case / "want.npz", x=np.zeros(3))
        (case / "want.npz").rename(case / "want.npy")
    elif what == "pickle":
        np.save(case / "want.npy", np.array([{}], dtype=object), allow_pickle=True)
    elif what == "shape":
        np.save(case / "want.npy", np.zeros((7, 7, 7)))
    elif what == "huge":
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"
        (case / "want.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    elif what in ("pipe", "device"):
        for name in ("input.0.npy", "op.onnx", "weights.bin"):
            (case / name).unlink(missing_ok=True)
            os.mkfifo(case / name) if what == "pipe" else (case / name).symlink_to("/dev/zero")
    elif what == "dtype":
        data["dtype"] = "nn"
    elif what == "location":
        model = onnx.load(str(case / "op.onnx"), load_external_data=False)
        item = model.graph.initializer.add(name="other", data_type=1, dims=[1], data_location=1)
        for key, value in (("location", "case.json"), ("offset", "0"), ("length", "4")):
            item.external_data.add(key=key, value=value)
        (case / "op.onnx").write_bytes(model.SerializeToString())
    (case / "case.json").write_text("{" if what == "json" else json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("what", [
    "version", "runtime", "key", "graph", "input", "want", "json", "archive", "pickle", "shape", "huge", "pipe", "device", "dtype",
    "location",
])  # fmt: skip
def test_a_damaged_case_is_refused(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    shutil.copytree(case, tmp_path / "case")
    damage(tmp_path / "case", what)
    assert main(["reproduce", str(tmp_path / "case")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "\nhint: " in err
    assert "Traceback" not in err


def test_cases_behind_a_link_are_not_removed(case: Path, tmp_path: Path) -> None:
    shutil.copytree(case, tmp_path / "elsewhere" / "case")
    (tmp_path / "operations").symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        remove_cases(tmp_path / "operations")
    assert (tmp_path / "elsewhere" / "case" / "case.json").exists()


def test_a_folder_without_a_case_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(tmp_path)]) == 2
    assert "is not a saved operation" in capsys.readouterr().err


def test_segments_cover_the_graph_and_compute_what_it_computes(sound: Bundle) -> None:
    """Each alone on the values of a whole run gives the values of the whole run, bit by bit."""
    from llama_export.graph.kv_cache import cache_names, cache_shape

    evaluator = GraphEvaluator(sound.model_path, custom_ops="bodies")
    feeds = {
        "input_ids": torch.tensor([[3, 1, 4, 1, 5]]), "past_length": torch.tensor([0]), "sequence_length": torch.tensor([5]),
        "logits_index": torch.tensor([[4]]), **{past: torch.zeros(cache_shape(sound.config, 1, 8)) for past, _ in cache_names(LAYERS)},
    }  # fmt: skip
    values = dict(feeds)
    evaluator.run(feeds, lambda name, value: values.__setitem__(name, value))
    known = [name for node in evaluator.graph.node for name in node.output if name != node.name]
    parts = segments(evaluator.graph, known)
    assert {name for part in parts for name in part.outputs} == set(known)
    for part in parts:
        inputs = {name: values[name] for name in part.inputs}
        runner = SegmentRunner(
            segment_model(evaluator.model, part, inputs), runtime="evaluator", dtype=torch.float32, custom_ops="bodies", folder=sound.folder
        )  # fmt: skip
        for name, got in runner.run(inputs).items():
            assert torch.equal(got, values[name]), name
