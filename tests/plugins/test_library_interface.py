"""What the library shows to TensorRT and to tools: symbols, creators, fields, and every refusal with its sentence."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from library_support import (
    DTYPES,
    PLUGINS,
    Node,
    attention_node,
    masked_attention_node,
    norm_node,
    require_plugins,
    run_python,
    source_abi,
    spec_fields,
)

from llama_export.ops.table import OP_SPECS

require_plugins()

import llama_export_plugins  # noqa: E402
from llama_export_plugins.harness import Field, PluginError, PluginLibrary, run_plugin  # noqa: E402

FLOAT32, FLOAT64, INT8, INT32, CHAR, INT64 = 1, 2, 3, 5, 6, 10
NODES = {
    "LlamaRMSNorm": norm_node("LlamaRMSNorm", torch.float32, 2, 3, 40),
    "LlamaAddRMSNorm": norm_node("LlamaAddRMSNorm", torch.float32, 2, 3, 40),
    "LlamaAttention": attention_node(torch.float32, new_tokens=3, past=(2, 0)),
    "LlamaMaskedAttention": masked_attention_node(torch.float32, mask=[[1, 1, 1], [0, 1, 1]]),
}


@pytest.fixture(scope="module")
def library() -> PluginLibrary:
    return PluginLibrary()


def fields_of(node: Node) -> list[Field]:
    """As the parser gives them."""
    names = [item.name for item in OP_SPECS[node.op].attributes]
    return [Field.from_attribute(name, value) for name, value in zip(names, node.attributes, strict=True)]


def replaced(fields: list[Field], name: str, *others: Field) -> list[Field]:
    """The fields with one of them replaced by any number of others."""
    return [item for field in fields for item in (others if field.name == name else (field,))]


# ---- the file -----------------------------------------------------------------------------------------------------


def test_exports_only_what_tensorrt_and_tools_ask_for() -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", llama_export_plugins.library_path()], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in symbols.stdout.splitlines()} == {
        "getCreators", "getPluginCreators", "setLoggerFinder",
        "llama_export_plugins_abi", "llama_export_plugins_take_error", "llama_export_plugins_version",
    }  # fmt: skip


def test_needs_neither_cuda_nor_tensorrt() -> None:
    headers = subprocess.run(
        ["objdump", "-p", llama_export_plugins.library_path()], capture_output=True, text=True, check=True
    )
    needed = set(re.findall(r"NEEDED\s+(\S+)", headers.stdout))
    assert needed <= {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2", "libpthread.so.0"}


def test_knows_no_driver_function_that_allocates_or_waits() -> None:
    names = set(re.findall(rb"(?<=\0)cu[A-Z]\w+(?=\0)", llama_export_plugins.library_path().read_bytes()))
    assert names == {
        b"cuCtxGetCurrent", b"cuCtxGetDevice", b"cuCtxGetId", b"cuDeviceGetAttribute", b"cuFuncSetAttribute",
        b"cuGetErrorName", b"cuLaunchKernel", b"cuMemcpyDtoDAsync_v2", b"cuMemsetD8Async", b"cuModuleGetFunction",
        b"cuModuleLoadData",
    }  # fmt: skip


def test_says_its_version_and_abi(library: PluginLibrary) -> None:
    project = tomllib.loads((PLUGINS / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert library.version == llama_export_plugins.__version__ == project["version"]
    assert library.abi == llama_export_plugins.ABI


def test_package_imports_without_torch_and_triton() -> None:
    code = """
import sys
sys.modules.update(torch=None, triton=None, numpy=None)
import llama_export_plugins
print(llama_export_plugins.library_path().is_file(), len(llama_export_plugins.variants()["images"]) > 0)
"""
    assert run_python(code).split() == ["True", "True"]


def test_package_without_its_library_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_export_plugins, "_FOLDER", tmp_path)
    for function in (llama_export_plugins.library_path, llama_export_plugins.variants):
        with pytest.raises(FileNotFoundError, match=r"is incomplete: .* does not exist; hint: pip install"):
            function()


def test_abi_header_equals_the_layouts_that_the_harness_uses() -> None:
    from llama_export_plugins import harness

    sizes = {"_Dims": 72, "_TensorDesc": 88, "_DynamicTensorDesc": 304, "_PluginField": 24, "_FieldCollection": 16}
    assert {name: ctypes.sizeof(getattr(harness, name)) for name in sizes} == sizes


# ---- creators and fields ------------------------------------------------------------------------------------------


def test_creators_are_those_of_the_op_table(library: PluginLibrary) -> None:
    assert set(library.creators) == set(OP_SPECS)
    for op, creator in library.creators.items():
        assert (creator.version, creator.namespace) == (str(OP_SPECS[op].version), "")
        assert dict(creator.fields) == spec_fields(op)
        assert [name for name, _ in creator.fields] == [item.name for item in OP_SPECS[op].attributes]


@pytest.mark.parametrize("op", NODES)
def test_fields_survive_an_engine(library: PluginLibrary, op: str) -> None:
    node = NODES[op]
    built = library.create(op, fields_of(node))
    last = "workspace_bytes" if "Attention" in op else "hidden_size"
    wide = INT64 if "Attention" in op else INT32
    abi = integer("abi", library.abi)
    # Not configured: nothing but the ABI is known yet.
    unknown = Field(last, wide, struct.pack("<q" if wide == INT64 else "<i", -1))
    assert built.serialize() == [*fields_of(node), abi, integer("dtype", -1), unknown]
    tensors = [*node.shapes, *zip(built.output_shapes(node.shapes), [torch.float16] * 3, strict=False)]
    half = [(shape, torch.float16 if dtype == torch.float32 else dtype) for shape, dtype in tensors]
    workspace = built.configure(half, len(node.inputs))
    stored = built.serialize()
    known = integer(last, node.shapes[-1][0][0]) if wide == INT32 else Field(last, wide, struct.pack("<q", workspace))
    assert stored == [*fields_of(node), abi, integer("dtype", 1), known]
    # One object may be configured for several profiles, the largest of which counts.
    built.configure(
        [((0, *shape[1:]), dtype) if len(shape) > 1 else (shape, dtype) for shape, dtype in half], len(node.inputs)
    )
    assert built.serialize() == stored
    copy = built.clone()
    built.destroy()
    assert copy.serialize() == stored
    restored = library.create(op, stored, "runtime")
    assert restored.serialize() == stored
    assert restored.name() == op
    for plugin in (copy, restored):
        plugin.destroy()


@pytest.mark.parametrize("kind", [(INT64, "<q"), (INT8, "<b"), (INT32, "<i")])
def test_integers_of_any_width_are_read(library: PluginLibrary, kind: tuple[int, str]) -> None:
    fields = [
        Field(item.name, kind[0], struct.pack(kind[1], struct.unpack("<i", item.data or b"")[0]))
        if item.type == INT32
        else item
        for item in fields_of(NODES["LlamaAttention"])
    ]
    plugin = library.create("LlamaAttention", fields)
    assert plugin.serialize()[:4] == fields_of(NODES["LlamaAttention"])
    plugin.destroy()


def integer(name: str, value: int) -> Field:
    return Field(name, INT32, struct.pack("<i", value))


def number(name: str, value: float) -> Field:
    return Field(name, FLOAT32, struct.pack("<f", value))


BAD_FIELDS: list[tuple[str, str, tuple[Field, ...], tuple[str, ...]]] = [
    *((op, item.name, (), (f"field `{item.name}` is missing", "hint: ")) for op in OP_SPECS for item in OP_SPECS[op].attributes),
    ("LlamaRMSNorm", "epsilon", (integer("epsilon", 1),), ("`epsilon`", "got int32, expected float32")),
    ("LlamaRMSNorm", "epsilon", (Field("epsilon", CHAR, b"1e-5", 4),), ("`epsilon`", "one value: got 4")),
    ("LlamaRMSNorm", "epsilon", (Field("epsilon", FLOAT32, None),), ("`epsilon`", "one value: got 0")),
    ("LlamaRMSNorm", "epsilon", (Field("epsilon", FLOAT32, bytes(8), 2),), ("`epsilon`", "one value: got 2")),
    ("LlamaRMSNorm", "epsilon", (number("epsilon", 0.0),), ("`epsilon` is out of range: got 0", "between 0 and 1")),
    ("LlamaRMSNorm", "epsilon", (number("epsilon", float("nan")),), ("`epsilon` is out of range: got nan",)),
    ("LlamaRMSNorm", "epsilon", (number("epsilon", 1e-5), number("epsilon", 1e-5)), ("`epsilon` is given twice",)),
    ("LlamaRMSNorm", "epsilon", (number("epsilon", 1e-5), number("eps", 1e-5)), ("got 2 fields, expected 1", "hint: ")),
    ("LlamaAttention", "num_heads", (number("num_heads", 4.0),), ("`num_heads`", "got float32, expected an integer")),
    ("LlamaAttention", "num_heads", (integer("num_heads", 0),), ("`num_heads` is out of range: got 0", "at least 1")),
    ("LlamaAttention", "num_heads", (Field("num_heads", INT64, struct.pack("<q", 1 << 40)),), ("`num_heads`", "got 1.09951163e+12", "a 32-bit integer")),
    ("LlamaAttention", "num_kv_heads", (integer("num_kv_heads", 3),), ("`num_kv_heads`", "got 3", "a divisor of num_heads")),
    ("LlamaAttention", "num_kv_heads", (integer("num_kv_heads", 0),), ("`num_kv_heads`", "got 0", "a divisor of num_heads")),
    ("LlamaAttention", "head_dim", (integer("head_dim", -2),), ("`head_dim`", "got -2", "at least 1")),
    ("LlamaAttention", "scale", (number("scale", float("inf")),), ("`scale`", "got inf", "finite")),
    ("LlamaAttention", "scale", (number("scale", -1.0),), ("`scale`", "got -1", "greater than 0")),
    ("LlamaMaskedAttention", "head_dim", (integer("head_dim", -2),), ("`head_dim`", "got -2", "at least 1")),
    ("LlamaMaskedAttention", "num_kv_heads", (integer("num_kv_heads", 3),), ("`num_kv_heads`", "got 3", "a divisor of num_heads")),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "fields", "parts"), BAD_FIELDS)
def test_bad_fields_are_refused(
    library: PluginLibrary, op: str, name: str, fields: tuple[Field, ...], parts: tuple[str, ...]
) -> None:
    with pytest.raises(PluginError) as caught:
        library.create(op, replaced(fields_of(NODES[op]), name, *fields))
    assert f"{op}: " in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("op", NODES)
def test_an_engine_of_another_abi_is_refused(library: PluginLibrary, op: str) -> None:
    """Whatever else it stores. Engines of ABI 1 to 3 store no number."""
    plugin = library.create(op, fields_of(NODES[op]))
    stored = plugin.serialize()
    plugin.destroy()
    for others, got in (
        ((), "got no ABI number, expected"),
        ((integer("abi", 3),), "got ABI 3, expected"),
        ((integer("abi", library.abi + 1), integer("new field", 1)), f"got ABI {library.abi + 1}, expected"),
        ((number("abi", 4.0),), "field `abi` is of the wrong type"),
    ):
        with pytest.raises(PluginError) as caught:
            library.create(op, replaced(stored, "abi", *others), "runtime")
        assert f"{op}: " in str(caught.value)
        assert got in str(caught.value)
        assert "wrong type" in got or "hint: build the engine again with this library" in str(caught.value)


def test_the_abi_is_the_same_in_both_distributions(library: PluginLibrary) -> None:
    from llama_export.engine import plugins

    assert plugins.ABI == library.abi == source_abi()


def test_a_workspace_that_no_device_has_is_refused(library: PluginLibrary) -> None:
    """By configurePlugin, so that the sentence is about the node."""
    for node in (NODES["LlamaAttention"], NODES["LlamaMaskedAttention"]):
        plugin = library.create(node.op, fields_of(node))
        huge = [((1 << 20, *shape[1:]), dtype) for shape, dtype in node.shapes]
        with pytest.raises(
            PluginError, match=r"configurePlugin returned -1; \w+: the batch is too large for the kernels"
        ):
            plugin.configure([*huge, *[huge[0]] * plugin.num_outputs()], len(huge))
        assert plugin.serialize()[-1].data == struct.pack("<q", -1)
        plugin.destroy()


def test_an_engine_without_its_dtype_is_refused(library: PluginLibrary) -> None:
    fields = [*fields_of(NODES["LlamaRMSNorm"]), integer("abi", library.abi)]
    with pytest.raises(PluginError, match="field `dtype` is missing"):
        library.create("LlamaRMSNorm", fields, "runtime")
    with pytest.raises(PluginError, match="`dtype` is out of range: got 2"):
        library.create("LlamaRMSNorm", [*fields, integer("dtype", 2)], "runtime")


def test_null_field_collections_are_refused(library: PluginLibrary) -> None:
    handle = library.creators["LlamaRMSNorm"].handle
    assert not library.driver.creator_create(handle, None, 0)
    assert "no field collection" in library.messages[-1]


def test_tools_can_take_the_last_error() -> None:
    library = PluginLibrary()
    buffer = ctypes.create_string_buffer(40)
    take = library.library.llama_export_plugins_take_error
    assert take(buffer, 40) == 0
    with pytest.raises(PluginError):
        library.create("LlamaRMSNorm", [])
    assert take(buffer, 40) > 40
    assert buffer.value.startswith(b"LlamaRMSNorm: field `epsilon` is")
    assert take(buffer, 40) == 0


def test_without_a_logger_sentences_go_to_stderr() -> None:
    code = """
from llama_export_plugins.harness import PluginError, PluginLibrary
library = PluginLibrary()
library.library.setLoggerFinder(None)
try:
    library.create("LlamaRMSNorm", [])
except PluginError:
    print("refused", flush=True)
    import os
    os.dup2(1, 2)
try:
    library.create("LlamaRMSNorm", [])
except PluginError:
    pass
"""
    assert "llama_export_plugins: LlamaRMSNorm: field `epsilon` is missing" in run_python(code)


# ---- shapes and types ---------------------------------------------------------------------------------------------


def with_shape(node: Node, index: int, *shape: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The node's inputs with one of them of another shape."""
    shapes = node.shapes
    shapes[index] = (shape, shapes[index][1])
    return shapes


ATTENTION = NODES["LlamaAttention"]  # B 2, S 3, H 4, G 2, D 16, C 24
BAD_SHAPES: list[tuple[str, int, tuple[int, ...], str]] = [
    ("LlamaRMSNorm", 1, (41,), "dimension 0 of `weight` does not fit: got 41, expected 40 (hidden_size)"),
    ("LlamaRMSNorm", 1, (1, 40), "`weight` is of the wrong rank: got 2 dimensions, expected 1"),
    ("LlamaAddRMSNorm", 1, (2, 3, 39), "dimension 2 of `residual` does not fit: got 39, expected 40"),
    ("LlamaAttention", 0, (2, 3, 63), "dimension 2 of `query` does not fit: got 63, expected 64 (num_heads * head_dim)"),
    ("LlamaAttention", 0, (6, 64), "`query` is of the wrong rank: got 2 dimensions, expected 3"),
    ("LlamaAttention", 1, (2, 3, 64), "dimension 2 of `key` does not fit: got 64, expected 32 (num_kv_heads * head_dim)"),
    ("LlamaAttention", 2, (2, 3, 64), "dimension 2 of `value` does not fit: got 64, expected 32"),
    ("LlamaAttention", 3, (2, 3, 16), "dimension 2 of `cos` does not fit: got 16, expected 8 (head_dim / 2)"),
    ("LlamaAttention", 4, (2, 3, 4), "dimension 2 of `sin` does not fit: got 4, expected 8"),
    ("LlamaAttention", 5, (2, 4, 24, 16), "dimension 1 of `past_key` does not fit: got 4, expected 2 (num_kv_heads)"),
    ("LlamaAttention", 6, (2, 2, 24, 32), "dimension 3 of `past_value` does not fit: got 32, expected 16 (head_dim)"),
    ("LlamaAttention", 6, (2, 2, 25, 16), "dimension 2 of `past_value` does not fit: got 25, expected 24 (C)"),
    ("LlamaAttention", 7, (2, 1), "`past_length` is of the wrong rank: got 2 dimensions, expected 1"),
    ("LlamaMaskedAttention", 0, (2, 3, 63), "dimension 2 of `query` does not fit: got 63, expected 64 (num_heads * head_dim)"),
    ("LlamaMaskedAttention", 2, (2, 3, 64), "dimension 2 of `value` does not fit: got 64, expected 32"),
    ("LlamaMaskedAttention", 3, (2, 3, 16), "dimension 2 of `cos` does not fit: got 16, expected 8 (head_dim / 2)"),
    ("LlamaMaskedAttention", 5, (2, 3, 1), "`attention_mask` is of the wrong rank: got 3 dimensions, expected 2"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "index", "shape", "sentence"), BAD_SHAPES)
def test_shapes_that_do_not_fit_are_refused(
    library: PluginLibrary, op: str, index: int, shape: tuple[int, ...], sentence: str
) -> None:
    plugin = library.create(op, fields_of(NODES[op]))
    with pytest.raises(PluginError, match=r"getOutputShapes returned -1") as caught:
        plugin.output_shapes(with_shape(NODES[op], index, *shape))
    assert f"{op}: {sentence}" in str(caught.value)
    plugin.destroy()


@pytest.mark.parametrize(("index", "shape"), [(5, (2, 4)), (5, (1, 3)), (1, (2, 4, 32)), (3, (2, 2, 8))])
def test_sizes_of_a_batch_are_checked_at_run_time(library: PluginLibrary, index: int, shape: tuple[int, ...]) -> None:
    node = NODES["LlamaMaskedAttention"]
    plugin = library.create(node.op, fields_of(node))
    tensors = [*with_shape(node, index, *shape), ((2, 3, 64), torch.float32)]
    with pytest.raises(PluginError, match=r"onShapeChange returned -1; LlamaMaskedAttention: dimension \d of .* fit"):
        plugin.shape_change(tensors, len(node.inputs))
    plugin.destroy()


@pytest.mark.parametrize(("index", "shape"), [(7, (3,)), (1, (2, 4, 32)), (0, (1, 3, 64)), (3, (2, 2, 8))])
def test_sizes_known_at_run_time_only_are_checked_then(
    library: PluginLibrary, index: int, shape: tuple[int, ...]
) -> None:
    plugin = library.create("LlamaAttention", fields_of(ATTENTION))
    outputs = [((2, 3, 64), torch.float32), *((ATTENTION.shapes[5],) * 2)]
    plugin.output_shapes(with_shape(ATTENTION, index, *shape))  # symbolic: nothing to object to
    with pytest.raises(
        PluginError, match=r"onShapeChange returned -1; LlamaAttention: dimension \d of .* does not fit"
    ):
        plugin.shape_change([*with_shape(ATTENTION, index, *shape), *outputs], 8)
    plugin.destroy()


@pytest.mark.parametrize("head_dim", [1, 15, 258, 512])
def test_a_head_dim_without_a_kernel_is_refused_by_name(library: PluginLibrary, head_dim: int) -> None:
    node = attention_node(torch.float32, new_tokens=1, past=(0,), head_dim=head_dim - head_dim % 2 or 2)
    plugin = library.create("LlamaAttention", replaced(fields_of(node), "head_dim", integer("head_dim", head_dim)))
    with pytest.raises(
        PluginError, match=rf"no kernel serves this head_dim: got {head_dim}, .*--ops LlamaAttention=nat"
    ):
        plugin.output_shapes(node.shapes)
    plugin.destroy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NODES)
def test_one_float_type_for_all_but_rope_and_lengths(library: PluginLibrary, op: str, dtype: torch.dtype) -> None:
    plugin = library.create(op, fields_of(NODES[op]))
    fixed = {"float32": torch.float32, "int64": torch.int64}
    specs = [*OP_SPECS[op].inputs, *OP_SPECS[op].outputs]
    shapes = [shape for shape, _ in NODES[op].shapes] + plugin.output_shapes(NODES[op].shapes)
    tensors = [(shape, fixed.get(spec.dtype, dtype)) for shape, spec in zip(shapes, specs, strict=True)]
    count = len(OP_SPECS[op].inputs)
    assert all(plugin.supports(position, tensors, count) for position in range(len(tensors)))
    for position, (shape, right) in enumerate(tensors):
        for wrong in {*DTYPES, torch.int64} - {right}:
            mixed = [*tensors[:position], (shape, wrong), *tensors[position + 1 :]]
            assert not all(plugin.supports(index, mixed, count) for index in range(len(mixed))), (position, wrong)
    plugin.destroy()


def test_only_the_cache_is_aliased(library: PluginLibrary) -> None:
    for op, node in NODES.items():
        plugin = library.create(op, fields_of(node))
        names = [item.name for item in OP_SPECS[op].inputs]
        expected = [names.index(item.alias_of) if item.alias_of else -1 for item in OP_SPECS[op].outputs]
        assert [plugin.aliased_input(index) for index in range(plugin.num_outputs())] == expected
        plugin.destroy()


def test_misaligned_memory_is_refused(library: PluginLibrary) -> None:
    node = NODES["LlamaRMSNorm"]
    plugin = library.create("LlamaRMSNorm", fields_of(node))
    tensors: list[Any] = [*node.shapes, node.shapes[0]]
    plugin.configure(tensors, 2)
    attached = plugin.attach()
    attached.shape_change(tensors, 2)
    with pytest.raises(PluginError, match=r"`weight` is misaligned: got address 0x1004, expected a multiple of 16"):
        attached.enqueue(tensors, [0x1000, 0x1004], [0x2000], 0)
    for item in (attached, plugin):
        item.destroy()


def test_a_dtype_mix_is_refused_by_run_plugin(library: PluginLibrary) -> None:
    node = NODES["LlamaRMSNorm"]
    with pytest.raises(PluginError, match=r"LlamaRMSNorm does not take torch.float16 \[40\] as tensor 1"):
        run_plugin(library, node.op, (node.inputs[0], node.inputs[1].half()), node.attributes)
