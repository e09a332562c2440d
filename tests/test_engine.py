"""Engines: built for real on the CPU, their structure proven, faults caught, and the session run on a stand-in.

Nothing here runs an engine: that needs a GPU. What an engine holds is read from the parsed network and from the plan.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import NATIVE
from gpu_stand_ins import FakeDriver
from onnx import helper

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.llama import DTYPES
from llama_export.config.settings import EngineConfig
from llama_export.engine import build as engine
from llama_export.engine import network as engine_network
from llama_export.engine import spec as engine_spec
from llama_export.engine import tensorrt as _tensorrt
from llama_export.engine.build import build_engine
from llama_export.engine.check import check_engine, inspect_engine
from llama_export.errors import (
    ArtifactMismatchError,
    ConfigError,
    EngineBuildError,
    ExportError,
    MissingDependencyError,
    ShapeError,
    ToolchainError,
)

trt = pytest.importorskip("tensorrt_rtx_bindings")

LAYERS, CAPACITY, POSITIONS = 2, 53, 128
SMALL = NATIVE


@pytest.fixture
def bundle(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> Bundle:
    """A float32 bundle of the test's own, without engines."""
    shutil.copytree(tiny_bundles["float32"].folder, tmp_path / "bundle")
    return load_bundle(tmp_path / "bundle")


@pytest.fixture
def own_engine(built: dict[str, tuple[Bundle, Path]], tmp_path: Path) -> tuple[Bundle, Path]:
    """A float32 bundle with an engine that the test may spoil."""
    original, path = built["float32"]
    shutil.copytree(original.folder, tmp_path / "bundle")
    return load_bundle(tmp_path / "bundle"), tmp_path / "bundle" / "engines" / path.name


def _edit_sidecar(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    sidecar_path = path.with_suffix(".json")
    sidecar = json.loads(sidecar_path.read_text())
    edit(sidecar)
    sidecar_path.write_text(json.dumps(sidecar))


# ---- what is built ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_and_sidecar_are_what_the_config_implies(built: dict[str, tuple[Bundle, Path]], dtype: str) -> None:
    bundle, path = built[dtype]
    sidecar = inspect_engine(path)
    assert path.name == f"{dtype}-native-c{CAPACITY}-b3.tensorrt-rtx.engine"
    assert sidecar.onnx_sha256 == bundle.manifest.graph_sha256
    assert (sidecar.dtype, sidecar.kv_cache_capacity, sidecar.max_batch) == (dtype, CAPACITY, 3)
    assert asdict(sidecar.settings) == {
        "tf32": False, "strongly_typed": True, "decomposable_attention": dtype == "float32",
    }  # fmt: skip
    assert sidecar.layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert sidecar.layers["ATTENTION_INPUT"] == LAYERS
    assert sidecar.layers["MATRIX_MULTIPLY"] == 7 * LAYERS + 1
    assert sidecar.profiles["prefill"]["input_ids"] == [[1, 1], [1, CAPACITY], [3, CAPACITY]]
    assert sidecar.profiles["decode"]["input_ids"] == [[1, 1], [1, 1], [3, 1]]
    assert sidecar.profiles["decode"]["past_key_values.1.value"][2] == [3, 2, CAPACITY, 16]
    assert sidecar.compute_capabilities == ("8.0",)
    assert sidecar.forward_compatible
    by_name = {entry.name: entry for entry in sidecar.io}
    assert asdict(by_name["present.1.key"]) == {
        "name": "present.1.key", "kind": "output", "dtype": dtype, "shape": ("batch_size", 2, CAPACITY, 16),
        "alias_of": "past_key_values.1.key",
    }  # fmt: skip
    assert "sequence_length" in by_name, "an input that this RoPE type does not read stays an input"
    assert str(bundle.folder) not in path.with_suffix(".json").read_text()
    assert bundle.engines == [path]
    assert sorted(item.name for item in path.parent.iterdir()) == sorted([path.name, path.with_suffix(".json").name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_engine_accepts_what_was_built(built: dict[str, tuple[Bundle, Path]], dtype: str) -> None:
    facts = check_engine(*built[dtype])
    assert facts.not_checked == ()
    assert facts.metrics["in_place_cache_updates"] == 2 * LAYERS
    assert facts.sidecar.bytes == built[dtype][1].stat().st_size


def test_a_log_outlives_its_builder() -> None:
    """TensorRT's registry writes to the process's first log: once that is collected, loading a library crashes."""
    log = weakref.ref(_tensorrt.message_log(trt))
    gc.collect()
    assert log() is not None


def test_result_and_callbacks(bundle: Bundle) -> None:
    lines: list[str] = []
    steps: list[tuple[str, int, int]] = []
    result = build_engine(bundle, SMALL, log=lines.append, progress=lambda *step: steps.append(step))
    assert (result.backend, result.ops, result.plugin_layers) == ("tensorrt-rtx", "native", {})
    assert result.bytes == Path(result.engine).stat().st_size
    assert lines[0].startswith("build: about ")
    assert lines[1].startswith("build: tensorrt-rtx 1.")
    assert lines[-1].startswith("build: done in ")
    assert steps
    assert all(1 <= done <= total for _, done, total in steps)


def test_tf32_is_another_engine_and_is_seen_in_the_plan(own_engine: tuple[Bundle, Path]) -> None:
    bundle, _ = own_engine
    tf32 = Path(build_engine(bundle, EngineConfig(ops="native", max_seq_len=CAPACITY, max_batch=3, tf32=True)).engine)
    check_engine(bundle, tf32)
    _edit_sidecar(tf32, lambda sidecar: sidecar["settings"].update(tf32=False))
    with pytest.raises(ArtifactMismatchError, match="tf32 is 1, expected 0"):
        check_engine(bundle, tf32)


def test_default_capacity_is_the_models_context(bundle: Bundle) -> None:
    assert engine_spec.resolve_capacity(bundle.config, None) == POSITIONS
    with pytest.raises(ShapeError, match=f"no positions beyond {POSITIONS} tokens"):
        build_engine(bundle, EngineConfig(max_seq_len=POSITIONS + 1))


def test_an_existing_engine_is_replaced_only_by_force(own_engine: tuple[Bundle, Path]) -> None:
    bundle, path = own_engine
    before = path.stat().st_mtime_ns
    with pytest.raises(ConfigError, match="exists") as caught:
        build_engine(bundle, SMALL)
    assert "--force" in str(caught.value.hint)
    assert path.stat().st_mtime_ns == before
    build_engine(bundle, EngineConfig(ops="native", max_seq_len=CAPACITY, max_batch=3, force=True))
    check_engine(bundle, path)
    assert path.stat().st_mtime_ns > before


def test_missing_backends_name_their_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, module in (("tensorrt-rtx", "tensorrt_rtx_bindings"), ("tensorrt", "tensorrt")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependencyError) as caught:
            build_engine(bundle, EngineConfig(backend=backend, ops="native"))  # type: ignore[arg-type]
        assert caught.value.hint == f"in a clone of the llama-export repository: pip install '.[{backend}]'"


def test_engine_module_needs_no_torch() -> None:
    code = "import sys, llama_export.engine.build; print([m for m in ('torch', 'onnx', 'llama_export.ops.torch_ops') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_full_tensorrt_needs_a_gpu_and_says_what_it_did_not_check(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX stands in for the module: the two have one API, and this backend's own path is what is tested."""
    monkeypatch.setattr(engine, "load_backend", lambda backend: trt)
    config = EngineConfig(backend="tensorrt", ops="native", max_seq_len=CAPACITY)
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: None)
    with pytest.raises(ToolchainError, match="builds on the GPU it builds for"):
        build_engine(bundle, config)
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: FakeDriver(9, 0))
    monkeypatch.setattr(_tensorrt.importlib.util, "find_spec", lambda name: name)
    path = Path(build_engine(bundle, config).engine)
    facts = check_engine(bundle, path)
    assert (path.suffixes[-2:], facts.sidecar.compute_capabilities) == ([".tensorrt", ".engine"], ("9.0",))
    assert "layout is not known for tensorrt" in facts.not_checked[0]


# ---- faults in the graph ----------------------------------------------------------------------------------------


def _attention_nodes(proto: Any) -> list[Any]:
    return [node for node in proto.graph.node if node.op_type == "LlamaAttention"]


def _swap_key_and_value_caches(proto: Any) -> None:
    node = _attention_nodes(proto)[0]
    node.input[5], node.input[6] = node.input[6], node.input[5]


def _exchange_the_caches_of_two_layers(proto: Any) -> None:
    first, second = _attention_nodes(proto)
    first.input[5], second.input[5] = second.input[5], first.input[5]


def _write_at_sequence_length(proto: Any) -> None:
    _attention_nodes(proto)[1].input[7] = "sequence_length"


def _copy_a_cache_output(proto: Any) -> None:
    node = _attention_nodes(proto)[1]
    name = node.output[2]
    node.output[2] = "copied"
    proto.graph.node.append(helper.make_node("Add", ["copied", "copied"], [name]))


def _attention_body(proto: Any) -> tuple[Any, Any]:
    function = next(function for function in proto.functions if function.name == "LlamaAttention")
    return function, next(node for node in function.node if node.op_type == "Attention")


def _causal_instead_of_a_mask(proto: Any) -> None:
    _, node = _attention_body(proto)
    del node.input[3:]
    next(item for item in node.attribute if item.name == "is_causal").i = 1


def _attend_over_the_old_keys(proto: Any) -> None:
    _, node = _attention_body(proto)
    node.input[1] = "past_key"


def _sum_over_the_old_values(proto: Any) -> None:
    _, node = _attention_body(proto)
    node.input[2] = "past_value"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_swap_key_and_value_caches, "`present.0.key` updates `past_key_values.0.value`"),
        (_exchange_the_caches_of_two_layers, "`present.1.key` updates `past_key_values.0.key`"),
        (_write_at_sequence_length, "`present.1.value` is not written at `past_length`"),
        (_copy_a_cache_output, "present.1.value"),
        (_causal_instead_of_a_mask, "attention 0 has no mask"),
        (_attend_over_the_old_keys, "attention 1 does not read `present.1.key`"),
        (_sum_over_the_old_values, "attention 0 does not read `present.0.value`"),
    ],
    ids=lambda item: item.__name__ if callable(item) else "",
)
def test_a_wrong_structure_is_not_built(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], None], message: str
) -> None:
    right = engine.tensorrt_proto

    def faulty(*arguments: Any) -> Any:
        proto = right(*arguments)
        fault(proto)
        return proto

    monkeypatch.setattr(engine, "tensorrt_proto", faulty)
    with pytest.raises(EngineBuildError) as caught:
        build_engine(bundle, SMALL)
    assert message in str(caught.value)
    assert not (bundle.folder / "engines").exists()


def test_a_missing_layer_is_counted(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_network.expected_layers
    monkeypatch.setattr(
        engine_network,
        "expected_layers",
        lambda config, plugin_ops: right(config, plugin_ops) | {"KV_CACHE_UPDATE": 5, "PLUGIN_V3": 1},
    )
    with pytest.raises(EngineBuildError) as caught:
        build_engine(bundle, SMALL)
    assert "4 layers KV_CACHE_UPDATE, expected 5" in str(caught.value)
    assert "0 layers PLUGIN_V3, expected 1" in str(caught.value)


def test_an_unexpected_input_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.tensorrt_proto

    def with_another_capacity(module: Any, bundle: Bundle, capacity: int, *rest: Any) -> Any:
        return right(module, bundle, capacity - 1)

    monkeypatch.setattr(engine, "tensorrt_proto", with_another_capacity)
    with pytest.raises(EngineBuildError) as caught:
        build_engine(bundle, SMALL)
    assert f"unexpected input past_key_values.0.key float32 [-1, 2, {CAPACITY - 1}, 16]" in str(caught.value)
    assert f"missing output present.1.value float32 [-1, 2, {CAPACITY}, 16]" in str(caught.value)


def test_parser_errors_are_attached_with_their_node(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CAPACITY", "another symbol")  # so C stays symbolic, which KV_CACHE_UPDATE refuses
    with pytest.raises(EngineBuildError, match="parser refused the graph") as caught:
        build_engine(bundle, SMALL)
    assert "(TensorScatter)" in str(caught.value)
    assert "LlamaAttention" in str(caught.value)


def test_builder_errors_are_attached(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine, engine_network):
        monkeypatch.setattr(module, "may_decompose", lambda dtype, plugin_ops=(): False)  # float32 has no fused kernel
    with pytest.raises(EngineBuildError, match="builder refused the network") as caught:
        build_engine(bundle, SMALL)
    assert "is_decomposable" in str(caught.value)
    assert not (bundle.folder / "engines").exists()


# ---- failures leave nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interrupted_build_leaves_nothing(bundle: Bundle, interruption: type[BaseException]) -> None:
    def stop(name: str, done: int, total: int) -> None:
        raise interruption

    with pytest.raises(interruption):
        build_engine(bundle, SMALL, progress=stop)
    assert not (bundle.folder / "engines").exists()


def test_a_failed_write_leaves_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_at_the_sidecar(staged: Path, sidecar: object) -> None:
        raise ExportError("cannot write")

    monkeypatch.setattr(engine, "write_sidecar", fail_at_the_sidecar)
    with pytest.raises(ExportError):
        build_engine(bundle, SMALL)
    assert not (bundle.folder / "engines").exists()


def test_the_next_build_removes_what_a_killed_one_left(bundle: Bundle) -> None:
    stale = bundle.folder / "engines" / ".llama-export-0123456789ab.partial"
    stale.mkdir(parents=True)
    (stale / "half.engine").write_bytes(b"half")
    assert bundle.engines == []
    build_engine(bundle, SMALL)
    assert not stale.exists()


# ---- checking a file --------------------------------------------------------------------------------------------


def test_a_changed_engine_file_is_refused(own_engine: tuple[Bundle, Path]) -> None:
    bundle, path = own_engine
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactMismatchError, match="is not the file its sidecar describes"):
        check_engine(bundle, path)


def test_an_engine_of_another_dtype_is_refused(
    built: dict[str, tuple[Bundle, Path]], own_engine: tuple[Bundle, Path]
) -> None:
    bundle, _ = own_engine
    with pytest.raises(ArtifactMismatchError, match="onnx_sha256") as caught:
        check_engine(bundle, built["bfloat16"][1])
    assert "dtype: got bfloat16, expected float32" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(kv_cache_capacity=CAPACITY + 1), "kv_cache_capacity: got 54, expected 53"),
        (lambda s: s.update(max_seq_len=CAPACITY + 1), "io: got"),
        (lambda s: s["io"][-1].update(alias_of=None), "io: got"),
        (lambda s: s["profiles"]["prefill"]["input_ids"].pop(), "profiles: got"),
        (lambda s: s["layers"].update(KV_CACHE_UPDATE=3), "3 layers KV_CACHE_UPDATE, expected 4"),
        (lambda s: s.update(compute_capabilities=["9.0"]), "the plan says ['8.0']"),
        (lambda s: s.update(plugin_library="x.so"), "plugin_library"),
        (lambda s: s.update(max_batch="three"), "holds a wrong one"),
        (lambda s: s.pop("io"), "lacks a field"),
        (lambda s: s.update(schema_version=1), "schema version"),
    ],
    ids=["capacity", "longest", "alias", "profile", "layers", "gpu", "plugins", "type", "field", "schema"],
)
def test_a_sidecar_that_lies_is_refused(
    own_engine: tuple[Bundle, Path], edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    bundle, path = own_engine
    _edit_sidecar(path, edit)
    with pytest.raises(ArtifactMismatchError) as caught:
        check_engine(bundle, path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("find", "replace", "message"),
    [
        (b"outputs={", b"outputz={", "no graph that writes the cache"),
        (b" 2 53 16 ", b" 2 54 16 ", "`present.0.key` is float"),
        (b'"present.1.value.1" "', b'"present_1.value.1" "', "`present.1.value` is not updated in place"),
        (b"\x0f\0\0\0\0\0\0\0present.1.value", b"\x0f\0\0\0\0\0\0\0present.9.value", "no output `present.1.value`"),
        (b"accelerators={sm80 }", b"accelerators={sm90 }", "compute_capabilities: got ['8.0'], the plan says ['9.0']"),
    ],
    ids=["graph", "capacity", "in-place", "name", "gpu"],
)
def test_a_plan_that_is_not_what_its_sidecar_says_is_refused(
    own_engine: tuple[Bundle, Path], find: bytes, replace: bytes, message: str
) -> None:
    """The hash is made to fit, so only reading the plan can tell."""
    bundle, path = own_engine
    data = path.read_bytes()
    assert find in data
    path.write_bytes(data.replace(find, replace))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit_sidecar(path, lambda sidecar: sidecar.update(engine_sha256=digest, bytes=path.stat().st_size))
    with pytest.raises(ArtifactMismatchError) as caught:
        check_engine(bundle, path)
    assert message in str(caught.value)


def test_an_unknown_plan_layout_is_said_not_to_be_checked(own_engine: tuple[Bundle, Path]) -> None:
    bundle, path = own_engine
    _edit_sidecar(path, lambda sidecar: sidecar.update(backend_version="1.9.0.1"))
    assert "layout is not known" in check_engine(bundle, path).not_checked[0]


def test_an_engine_of_a_graph_that_is_not_the_manifests_is_refused(bundle: Bundle) -> None:
    proto = onnx.load(bundle.model_path, load_external_data=False)
    proto.doc_string = "changed after the export"
    bundle.model_path.write_bytes(proto.SerializeToString())
    path = Path(build_engine(load_bundle(bundle.folder, ignore_hashes=True), SMALL).engine)
    with pytest.raises(ArtifactMismatchError, match="onnx_sha256"):
        check_engine(bundle, path)


def test_a_missing_sidecar_is_named(own_engine: tuple[Bundle, Path]) -> None:
    bundle, path = own_engine
    path.with_suffix(".json").unlink()
    with pytest.raises(ArtifactMismatchError, match="is missing"):
        check_engine(bundle, path)


def test_proto_for_tensorrt_leaves_the_file_alone(bundle: Bundle) -> None:
    before = bundle.model_path.read_bytes()
    proto = engine.tensorrt_proto(onnx, bundle, CAPACITY)
    assert {dim.dim_value for dim in proto.graph.input[4].type.tensor_type.shape.dim} == {0, 2, CAPACITY, 16}
    assert [item.i for item in _attention_body(proto)[1].attribute if item.name == "TRT_decomposable"] == [1]
    assert bundle.model_path.read_bytes() == before
