"""Export: what every ONNX tool sees in the files that the default flags make."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracles
import pytest
import torch
from conftest import TINY, MakeCheckpoint
from random_llama import write_random_checkpoint
from safetensors import safe_open

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.config.settings import ExportConfig
from llama_export.errors import ExportError
from llama_export.export import export as export_module
from llama_export.export.export import ExportResult, export_checkpoint
from llama_export.model import load_reference
from llama_export.model.rms_norm import LlamaRMSNorm
from llama_export.model.rope import inverse_frequencies
from llama_export.ops import table
from llama_export.parity.sessions import reference_session

DTYPES = ("float32", "float16", "bfloat16")
FILES = ("model.onnx", "model.onnxruntime.onnx")
L, H, G, D, V = 2, 6, 2, 16, 97
ELEMENT = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}


@pytest.fixture(scope="session")
def stored_exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ExportResult, Path]]:
    """What the default flags make of checkpoints: ``<dtype>`` stored in it and exported in place; ``-o`` elsewhere."""
    made = {}
    for dtype in DTYPES:
        folder = tmp_path_factory.mktemp(dtype) / "checkpoint"
        write_random_checkpoint(folder, TINY, dtype=dtype)
        if dtype == "bfloat16":
            made["-o"] = export_checkpoint(folder, folder.parent / "bundle"), folder.parent / "bundle"
        made[dtype] = export_checkpoint(folder), folder
    return made


def load_graph(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)


# ---- other tools ------------------------------------------------------------------------------------------------

_OPEN_ALL = """
import json, sys
import onnx, onnxruntime
assert "llama_export" not in sys.modules
found = {}
for path in json.load(sys.stdin):
    model = onnx.load(path)
    assert not any(item.external_data for item in model.graph.initializer), "weights were not read"
    onnx.checker.check_model(path, full_check=True)
    try:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found[path] = "opened"
    except Exception as err:
        found[path] = str(err)
print(json.dumps(found))
"""


def test_onnx_and_onnxruntime_open_every_file(
    stored_exports: dict[str, tuple[ExportResult, Path]], tiny_bundles: dict[str, Bundle]
) -> None:
    """In a process that knows nothing of this package: ``onnx.load``, the full check, a session."""
    folders = [folder for _, folder in stored_exports.values()] + [bundle.folder for bundle in tiny_bundles.values()]
    paths = [str(folder / name) for folder in folders for name in FILES]
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_ALL], input=json.dumps(paths), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(paths)
    for path, result in found.items():
        bundle = load_bundle(Path(path).parent)
        if path.endswith("model.onnx") and bundle.dtype == "bfloat16":
            # onnxruntime's CPU provider has no bfloat16 kernels: the reason there is a second file
            assert "NOT_IMPLEMENTED" in result, f"{path}: {result}"
        else:
            assert result == "opened", f"{path}: {result}"


# ---- the contract -----------------------------------------------------------------------------------------------


def expected_io(dtype: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """(name, element type, shape) of the inputs and the outputs, from the table in the design."""
    int64, model = onnx.TensorProto.INT64, ELEMENT[dtype]
    B, S, N, C = "batch_size", "num_new_tokens", "num_logits", "kv_cache_capacity"
    cache = [(layer, part) for layer in range(L) for part in ("key", "value")]
    inputs = [
        ("input_ids", int64, [B, S]),
        ("past_length", int64, [B]),
        ("sequence_length", int64, [B]),
        ("logits_index", int64, [B, N]),
        *((f"past_key_values.{layer}.{part}", model, [B, G, C, D]) for layer, part in cache),
    ]
    outputs = [
        ("logits", onnx.TensorProto.FLOAT, [B, N, V]),
        *((f"present.{layer}.{part}", model, [B, G, C, D]) for layer, part in cache),
    ]
    return inputs, outputs


def io_of(values: Any) -> list[tuple[Any, ...]]:
    tensors = [(value.name, value.type.tensor_type) for value in values]
    return [
        (name, tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim])
        for name, tensor in tensors
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["stored in it", "cast to it"])
def test_inputs_and_outputs_are_the_contract(
    stored_exports: dict[str, tuple[ExportResult, Path]], tiny_bundles: dict[str, Bundle], dtype: str, source: str
) -> None:
    folder = stored_exports[dtype][1] if source == "stored in it" else tiny_bundles[dtype].folder
    for name, session_dtype in (("model.onnx", dtype), ("model.onnxruntime.onnx", "float32")):
        graph = load_graph(folder / name).graph
        inputs, outputs = expected_io(session_dtype)
        assert io_of(graph.input) == inputs, name
        assert io_of(graph.output) == outputs, name


def test_manifest_describes_the_inputs_and_outputs(tiny_bundles: dict[str, Bundle]) -> None:
    for dtype, bundle in tiny_bundles.items():
        inputs, outputs = expected_io(dtype)
        names = {onnx.TensorProto.INT64: "int64", **{element: name for name, element in ELEMENT.items()}}
        want = [
            {
                "name": name, "kind": kind, "dtype": names[element], "shape": shape,
                "alias_of": name.replace("present", "past_key_values") if name.startswith("present") else None,
            }
            for kind, table in (("input", inputs), ("output", outputs))
            for name, element, shape in table
        ]  # fmt: skip
        assert bundle.manifest.to_json()["io"] == want


def test_result_counts_parameters_and_bytes(stored_exports: dict[str, tuple[ExportResult, Path]]) -> None:
    for dtype, itemsize in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        in_place = stored_exports[dtype][0]
        parameters = sum(np.prod(shape) for shape in _stored_shapes(stored_exports[dtype][1]))
        assert in_place.num_parameters == parameters
        assert in_place.dtype == dtype
        assert in_place.weight_bytes_referenced == parameters * itemsize
        assert in_place.weight_bytes_written == 0
    elsewhere, folder = stored_exports["-o"]
    size = (folder / "model.safetensors").stat().st_size
    assert elsewhere.weight_bytes_written in (0, size)  # 0 where the file system can reflink
    assert Path(elsewhere.model) == folder / "model.onnx"


def _stored_shapes(folder: Path) -> list[list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return [tensors.get_slice(name).get_shape() for name in tensors.keys()]


# ---- weights ----------------------------------------------------------------------------------------------------


def check_initializers(folder: Path, name: str) -> Counter[str]:
    """Every external initializer is the checkpoint's tensor of the same name, byte for byte; counts them by file."""
    files: Counter[str] = Counter()
    stored = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            stored |= {tensor: tensors.get_tensor(tensor) for tensor in tensors.keys()}
    graph = load_graph(folder / name).graph
    external = {item.name: item for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
    assert set(external) == set(stored)
    for tensor, item in external.items():
        place = {entry.key: entry.value for entry in item.external_data}
        assert list(item.dims) == list(stored[tensor].shape)
        assert item.data_type == ELEMENT[str(stored[tensor].dtype).removeprefix("torch.")]
        raw = (folder / place["location"]).read_bytes()
        begin, length = int(place["offset"]), int(place["length"])
        assert raw[begin : begin + length] == stored[tensor].view(torch.uint8).numpy().tobytes(), tensor
        files[place["location"]] += 1
    (embedded,) = [item for item in graph.initializer if item.name not in external]
    assert embedded.name == "model.rotary_emb.inv_freq"
    config = load_bundle(folder).config
    want = inverse_frequencies(config.rope, config.head_dim).numpy()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(embedded), want)
    return files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_initializers_are_the_checkpoints_tensors_byte_for_byte(
    stored_exports: dict[str, tuple[ExportResult, Path]], tiny_bundles: dict[str, Bundle], dtype: str, name: str
) -> None:
    for folder in (stored_exports[dtype][1], stored_exports["-o"][1], tiny_bundles[dtype].folder):
        check_initializers(folder, name)


def test_initializers_of_a_sharded_checkpoint_point_into_their_shards(tmp_path: Path) -> None:
    model = oracles.huggingface_llama(tmp_path / "one", **TINY)
    model.save_pretrained(tmp_path / "many", max_shard_size="120KB")
    export_checkpoint(tmp_path / "many")
    files = check_initializers(tmp_path / "many", "model.onnx")
    assert len(files) >= 3, files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_embedding_is_one_initializer(make_checkpoint: MakeCheckpoint, dtype: str) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    export_checkpoint(folder, config=ExportConfig(dtype=dtype))
    check_initializers(folder, "model.onnx")
    graph = load_graph(folder / "model.onnx").graph
    assert "lm_head.weight" not in {item.name for item in graph.initializer}
    readers = [node.name for node in graph.node if "model.embed_tokens.weight" in node.input]
    if dtype == "float32":
        assert readers == ["model.embed_tokens/Gather", "lm_head/Transpose"]
    else:  # the rows that are looked up are cast after the lookup, the projection before
        assert sorted(readers) == ["model.embed_tokens.weight/Cast", "model.embed_tokens/Gather"]
        casts = [node.name for node in graph.node if node.op_type == "Cast" and "embed_tokens" in node.name]
        assert sorted(casts) == ["model.embed_tokens.weight/Cast", "model.embed_tokens/Cast"]


def test_another_dtype_is_one_cast_of_each_weight_or_of_the_rows_looked_up(tiny_bundles: dict[str, Bundle]) -> None:
    for dtype in DTYPES:
        for name, computed in (("model.onnx", dtype), ("model.onnxruntime.onnx", "float32")):
            graph = load_graph(tiny_bundles[dtype].folder / name).graph
            weights = {item.name for item in graph.initializer if item.external_data}
            casts = {node.input[0]: node for node in graph.node if node.op_type == "Cast" and node.input[0] in weights}
            table = {"model.embed_tokens.weight"}
            assert set(casts) == (set() if computed == "float32" else weights - table), (dtype, name)
            for weight, node in casts.items():
                assert [item.i for item in node.attribute] == [ELEMENT[computed]]
                readers = [other.name for other in graph.node if weight in other.input]
                assert readers == [f"{weight}/Cast"]
            if computed != "float32":
                (rows,) = [node for node in graph.node if node.name == "model.embed_tokens/Cast"]
                (gather,) = [node for node in graph.node if "model.embed_tokens.weight" in node.input]
                assert rows.input[0] == gather.output[0] == "model.embed_tokens/embedding/stored"
                assert rows.output[0] == "model.embed_tokens/embedding"


def widened_at_once(nodes: Sequence[onnx.NodeProto], sizes: dict[str, int]) -> int:
    """Elements of cast weights that are alive at a time when nodes run in this order."""
    last = {name: place for place, node in enumerate(nodes) for name in node.input}
    held: dict[str, int] = {}
    most = 0
    for place, node in enumerate(nodes):
        if node.op_type == "Cast" and node.input[0] in sizes:
            held[node.output[0]] = sizes[node.input[0]]
        elif node.op_type == "Transpose" and node.input[0] in held:
            held[node.output[0]] = held[node.input[0]]
        most = max(most, sum(held.values()))
        held = {name: size for name, size in held.items() if last.get(name, -1) > place}
    return most


def test_few_weights_are_widened_at_a_time_in_either_order(tmp_path: Path) -> None:
    """As the nodes stand, and as onnxruntime orders them: a few weights of one layer, never those of all layers."""
    import onnxruntime

    sides = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 96,
    }
    layers = 8
    config = {**TINY, **sides, "head_dim": 16, "num_hidden_layers": layers}
    write_random_checkpoint(tmp_path / "model", config, dtype="bfloat16")
    export_checkpoint(tmp_path / "model")
    graph = load_graph(tmp_path / "model" / "model.onnxruntime.onnx").graph
    sizes = {item.name: math.prod(item.dims) for item in graph.initializer}
    layer = 4 * 64 * 64 + 3 * 64 * 128
    assert widened_at_once(graph.node, sizes) < layer
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model" / "ordered.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(tmp_path / "model" / "model.onnxruntime.onnx"), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )  # fmt: skip
    ordered = onnx.load(tmp_path / "model" / "ordered.onnx", load_external_data=False).graph
    assert widened_at_once(ordered.node, sizes) < layer


# ---- nodes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nodes_are_what_the_config_implies_and_named_after_their_module(
    tiny_bundles: dict[str, Bundle], dtype: str, name: str
) -> None:
    model = load_graph(tiny_bundles[dtype].folder / name)
    custom = Counter(node.op_type for node in model.graph.node if node.domain == "llama_export")
    assert custom == {"LlamaRMSNorm": 1, "LlamaAddRMSNorm": 2 * L, "LlamaAttention": L}
    assert Counter(node.op_type for node in model.graph.node)["MatMul"] == 7 * L + 1
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    attention = [f"model.layers.{layer}.self_attn/LlamaAttention" for layer in range(L)]
    for expected in (
        *attention,
        "model.layers.0.input_layernorm/LlamaRMSNorm",
        "model.layers.1.input_layernorm/LlamaAddRMSNorm",
        "model.layers.1.post_attention_layernorm/LlamaAddRMSNorm",
        "model.layers.1.mlp.down_proj/MatMul",
        "model.norm/LlamaAddRMSNorm",
        "lm_head/MatMul",
        "model.rotary_emb/Cos",
    ):
        assert expected in names


def test_every_file_states_its_versions_and_holds_the_bodies_of_its_target(tiny_bundles: dict[str, Bundle]) -> None:
    for bundle in tiny_bundles.values():
        for path, target in ((bundle.model_path, "standard"), (bundle.onnxruntime_path, "onnxruntime")):
            model = load_graph(path)
            assert {item.domain: item.version for item in model.opset_import} == {"": 24, "llama_export": 1}
            assert (model.ir_version, model.producer_name) == (11, "llama_export")
            functions = {function.name: function for function in model.functions}
            assert functions == {proto.name: proto for proto in table.function_protos(target, 16)}


def test_files_hold_no_path_and_no_trace_of_this_machine(
    stored_exports: dict[str, tuple[ExportResult, Path]], tiny_bundles: dict[str, Bundle]
) -> None:
    folders = [folder for _, folder in stored_exports.values()] + [bundle.folder for bundle in tiny_bundles.values()]
    words = {"site-packages", ".py", "/home", "/root", "/tmp", "/work", ":\\", str(Path.home()), str(Path.cwd())}
    user = os.environ.get("USER", "")
    words |= {user} if len(user) > 3 else set()
    for folder in folders:
        for name in FILES:
            data = (folder / name).read_bytes()
            found = [word for word in words | {str(folder), folder.parent.name} if word.encode() in data]
            assert not found, f"{folder / name} holds {found}"
            assert not load_graph(folder / name).metadata_props


# ---- the same again ---------------------------------------------------------------------------------------------


def test_where_the_export_goes_does_not_show_in_the_graph(
    stored_exports: dict[str, tuple[ExportResult, Path]],
) -> None:
    for name in FILES:
        left, right = (stored_exports[key][1] / name for key in ("bfloat16", "-o"))
        assert left.read_bytes() == right.read_bytes(), name


def test_a_second_export_in_another_process_gives_the_same_bytes(
    tiny_checkpoint: Path, tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """With another hash seed: no set or dictionary order may decide the order of nodes or weights."""
    command = [sys.executable, "-m", "llama_export", "export", str(tiny_checkpoint), "-o", str(tmp_path / "again")]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [*command, "--dtype", "bfloat16"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    for name in FILES:
        first, second = (
            (folder / name).read_bytes() for folder in (tiny_bundles["bfloat16"].folder, tmp_path / "again")
        )
        assert first == second, f"{name}: {len(first)} and {len(second)} bytes"


# ---- dynamic shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("B", "S", "N", "C"), [(1, 1, 1, 1), (1, 1, 1, 9), (3, 5, 2, 9), (1, 5, 5, 5), (2, 1, 3, 2), (7, 7, 7, 7)]
)
@pytest.mark.parametrize("name", FILES)
def test_every_size_runs_and_equals_the_reference(
    tiny_bundles: dict[str, Bundle], tiny_checkpoint: Path, name: str, B: int, S: int, N: int, C: int
) -> None:
    """Also sizes of 1 and sizes that coincide, which a tracer likes to take for constants."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(tiny_bundles["float32"].folder / name), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(B * S * C)
    ids, index = rng.integers(0, V, (B, S)), rng.integers(0, S, (B, N))
    past = {
        f"past_key_values.{layer}.{part}": np.zeros((B, G, C, D), np.float32)
        for layer in range(L)
        for part in ("key", "value")
    }
    zeros = np.zeros(B, np.int64)
    got = session.run(
        ["logits"],
        {"input_ids": ids, "past_length": zeros, "sequence_length": zeros + S, "logits_index": index, **past},
    )[0]
    reference = reference_session(load_reference(tiny_checkpoint), max_seq_len=C, batch_size=B)
    want = reference.step(ids, logits_index=index)
    assert got.shape == (B, N, V)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-5, error


# ---- what is refused --------------------------------------------------------------------------------------------


def assert_nothing_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_graph_that_lost_a_custom_node_is_refused(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decomposed(self: LlamaRMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        x = hidden_states if residual is None else hidden_states + residual
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight, x

    folder = make_checkpoint()
    monkeypatch.setattr(LlamaRMSNorm, "forward", decomposed)
    with pytest.raises(ExportError, match="does not hold the ops the config implies") as caught:
        export_checkpoint(folder)
    assert caught.value.details["got"] == "{'LlamaAttention': 2}"
    assert "'LlamaAddRMSNorm': 4" in caught.value.details["expected"]
    assert_nothing_left(folder)


def test_a_weight_that_the_graph_does_not_use_is_refused(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint()
    full = load_checkpoint(folder)
    extra = dataclasses.replace(full.tensors["model.norm.weight"], name="model.norm.bias")
    fewer = {name: entry for name, entry in full.tensors.items() if name != "lm_head.weight"}
    changed = dataclasses.replace(full, tensors={**fewer, "model.norm.bias": extra})
    monkeypatch.setattr(export_module, "load_checkpoint", lambda *_, **__: changed)
    with pytest.raises(ExportError, match="one to one") as caught:
        export_checkpoint(folder)
    assert caught.value.details["not in the checkpoint"] == "['lm_head.weight']"
    assert caught.value.details["not in the graph"] == "['model.norm.bias']"
    assert_nothing_left(folder)


BREAKAGES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "an input that nothing defines": lambda model: model.graph.node[-1].input.__setitem__(0, "nowhere"),
    "a missing attribute": lambda model: _custom_node(model).attribute.pop(),
    "a missing input": lambda model: _custom_node(model).input.pop(),
    "a declared shape that is wrong": lambda model: (
        model.graph.output[0].type.tensor_type.shape.dim[2].__setattr__("dim_value", 5)
    ),
}


def _custom_node(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "LlamaAttention")


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_graph_that_the_checker_refuses_is_not_written(tiny_bundles: dict[str, Bundle], breakage: str) -> None:
    model = load_graph(tiny_bundles["float32"].model_path)
    export_module.check_model(model)
    BREAKAGES[breakage](model)
    with pytest.raises(ExportError, match=r"onnx\.checker refused"):
        export_module.check_model(model)
