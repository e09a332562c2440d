"""The harness catches faults of the C++ host code: each is put into a copy of the sources by an exact replacement of text,
compiled, and run; the comparison with float64, the stand-in driver or a red zone has to object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from library_support import (
    PLUGINS,
    Node,
    attention_node,
    check_outputs,
    compile_objects,
    link_library,
    masked_attention_node,
    norm_node,
    require_plugins,
    write_generated,
)

require_plugins()

from llama_export_plugins.harness import PluginError, PluginLibrary, run_plugin  # noqa: E402

PREFILL = attention_node(torch.float32, new_tokens=7, past=(3, 11), heads=(6, 2), head_dim=16)
LONG_PREFILL = attention_node(torch.float32, new_tokens=37, past=(3, 11), heads=(6, 2), head_dim=16, capacity=64)
SPLIT = attention_node(torch.float32, new_tokens=2, past=(3, 290), heads=(6, 2), head_dim=16, capacity=300)
BELOW = attention_node(torch.float32, new_tokens=1, past=(1000,), heads=(6, 2), head_dim=16, capacity=1024)
BELOW_1100 = tuple(tuple(1100 if size == 1024 else size for size in shape) for shape, _ in BELOW.shapes)
DECODE = attention_node(torch.float32, new_tokens=1, past=(3, 11), heads=(6, 2), head_dim=16)
MANY_TOKENS = attention_node(torch.float32, new_tokens=24, past=(0,), heads=(4, 2), head_dim=64)
HALF = attention_node(torch.float16, new_tokens=4, past=(2, 0), head_dim=64)
LARGE_HEAD = attention_node(torch.float32, new_tokens=2, past=(2,), head_dim=256)
MASKED = masked_attention_node(torch.float32, mask=[[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], heads=(6, 2))
MASKED_TILES = masked_attention_node(torch.float32, mask=[[1] * 24], heads=(4, 2), head_dim=64)
NORM = norm_node("LlamaRMSNorm", torch.float32, 2, 5, 72)
ADD_NORM = norm_node("LlamaAddRMSNorm", torch.float32, 2, 5, 72)


class Edit(NamedTuple):
    """A piece of source text and what the fault makes of it."""

    file: str
    text: str
    fault: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong line, and a node that it makes wrong."""

    name: str
    edit: Edit
    node: Node
    aliased: bool = True
    max_shapes: tuple[tuple[int, ...], ...] | None = None
    """The largest shapes of the inputs that the plugin is configured for; None: those of the node."""


ATTENTION, RMS_NORM, MASKED_ATTENTION = "attention_plugin.cpp", "rms_norm_plugin.cpp", "masked_attention_plugin.cpp"
FAULTS = (
    Fault("cos and sin swapped", Edit(ATTENTION, "arguments.cos = deviceAddress(inputs[kCOS]);", "arguments.cos = deviceAddress(inputs[kSIN]);"), PREFILL),
    Fault("key and value swapped", Edit(ATTENTION, "arguments.key = deviceAddress(inputs[kKEY]);", "arguments.key = deviceAddress(inputs[kVALUE]);"), PREFILL),
    Fault("caches swapped when appending", Edit(ATTENTION, "    arguments.rotated_query = parts.at(parts.rotatedQuery);\n    arguments.present_key = deviceAddress(outputs[kPRESENT_KEY]);\n    arguments.present_value = deviceAddress(outputs[kPRESENT_VALUE]);\n    arguments.new_tokens", "    arguments.rotated_query = parts.at(parts.rotatedQuery);\n    arguments.present_key = deviceAddress(outputs[kPRESENT_VALUE]);\n    arguments.present_value = deviceAddress(outputs[kPRESENT_KEY]);\n    arguments.new_tokens"), PREFILL),
    Fault("grid rounded down", Edit(ATTENTION, "ceilDiv(rows, kernel.image->rows)", "rows / kernel.image->rows"), PREFILL),
    Fault("grid rounded down, more than one tile", Edit(ATTENTION, "ceilDiv(rows, kernel.image->rows)", "(rows > kernel.image->rows ? rows / kernel.image->rows : 1)"), LONG_PREFILL),
    Fault("grid without the heads of a group", Edit(ATTENTION, "sizes.newTokens * (mParameters.num_heads / mParameters.num_kv_heads);", "sizes.newTokens;"), MANY_TOKENS),
    Fault("grid for one batch row", Edit(ATTENTION, "pieces, mParameters.num_kv_heads, sizes.batch};", "pieces, mParameters.num_kv_heads, 1};"), PREFILL),
    Fault("grid of tokens of one row", Edit(ATTENTION, "Grid{sizes.batch * sizes.newTokens, 1, 1}", "Grid{sizes.newTokens, 1, 1}"), PREFILL),
    Fault("head counts swapped", Edit(ATTENTION, "    arguments.num_heads = mParameters.num_heads;\n    arguments.num_kv_heads = mParameters.num_kv_heads;\n    arguments.capacity = static_cast<int32_t>(sizes.capacity);\n    arguments.head_dim = mParameters.head_dim;\n    // TensorRT", "    arguments.num_heads = mParameters.num_kv_heads;\n    arguments.num_kv_heads = mParameters.num_heads;\n    arguments.capacity = static_cast<int32_t>(sizes.capacity);\n    arguments.head_dim = mParameters.head_dim;\n    // TensorRT"), PREFILL),
    Fault("one query head too few", Edit(ATTENTION, "    arguments.num_heads = mParameters.num_heads;\n    arguments.num_kv_heads = mParameters.num_kv_heads;\n    arguments.capacity = static_cast<int32_t>(sizes.capacity);\n    arguments.head_dim = mParameters.head_dim;\n    return", "    arguments.num_heads = mParameters.num_heads - mParameters.num_kv_heads;\n    arguments.num_kv_heads = mParameters.num_kv_heads;\n    arguments.capacity = static_cast<int32_t>(sizes.capacity);\n    arguments.head_dim = mParameters.head_dim;\n    return"), PREFILL),
    Fault("stride of the key from the query", Edit(ATTENTION, "arguments.key_stride = mParameters.num_kv_heads", "arguments.key_stride = mParameters.num_heads"), PREFILL),
    Fault("capacity of another axis", Edit(ATTENTION, "query.d[0], query.d[1], cache.d[2]}", "query.d[0], query.d[1], cache.d[1]}"), PREFILL),
    Fault("scale forgotten", Edit(ATTENTION, "arguments.scale = mParameters.scale;", "arguments.scale = 1.0F;"), PREFILL),
    Fault("one tile of a split for a prefill", Edit(ATTENTION, "return {ceilDiv(rows, kernel.image->rows) * pieces", "return {(isSplit(1) ? 1 : 2) * pieces"), LONG_PREFILL),
    Fault("pieces rounded down", Edit(ATTENTION, "ceilDiv(capacity, splitKeys(capacity))", "capacity / splitKeys(capacity)"), SPLIT),
    Fault("pieces of another length", Edit(ATTENTION, "combine.split_keys = split.split_keys;", "combine.split_keys = 2 * split.split_keys;"), SPLIT),
    Fault("pieces not merged", Edit(ATTENTION, "if (pieces == 1)", "if (pieces >= 1)"), SPLIT),
    Fault("one piece of the cache", Edit(ATTENTION, "gridOf(mSplit, sizes, pieces), split", "gridOf(mSplit, sizes, 1), split"), SPLIT),
    Fault("partial results overlap", Edit(ATTENTION, "partialSoftmax = partialOutput + padded(pieces * parameters.head_dim * kFLOAT_BYTES);", "partialSoftmax = partialOutput;"), SPLIT),
    Fault("partial results over the query", Edit(ATTENTION, "partialOutput = padded(sizes.batch * sizes.newTokens * queryWidth * elementBytes);", "partialOutput = 0;"), SPLIT),
    Fault("merged for one head", Edit(ATTENTION, "Grid{sizes.batch * sizes.newTokens * mParameters.num_heads, 1, 1}, combine", "Grid{sizes.batch * sizes.newTokens, 1, 1}, combine"), SPLIT),
    Fault("workspace without the pieces", Edit(ATTENTION, "std::min(largest.newTokens, std::max<int64_t>(1, kernels::kSPLIT_ROWS / group));", "group - group;"), SPLIT),
    Fault("workspace of the largest cache alone", Edit(ATTENTION, "splits = mostSplits(largest.capacity);", "splits = numSplits(largest.capacity);"), BELOW, max_shapes=BELOW_1100),
    Fault("fewer pieces in the workspace than are run", Edit(ATTENTION, "return {mParameters, sizes, splitTokens, numSplits(sizes.capacity), elementSize(type)};", "return {mParameters, sizes, splitTokens, 1, elementSize(type)};"), BELOW, max_shapes=BELOW_1100),
    Fault("bytes of the workspace not noted", Edit("attention_parameters.h", "this->mParameters.workspace_bytes = std::max(this->mParameters.workspace_bytes, bytes);", "static_cast<void>(bytes);"), SPLIT),
    Fault("copy forgotten", Edit(ATTENTION, "if (past == present || bytes == 0)", "if (past == present || bytes != 0)"), PREFILL, aliased=False),
    Fault("value cache not copied", Edit(ATTENTION, "|| !copyCache(cacheBytes, inputs[kPAST_VALUE], outputs[kPRESENT_VALUE], stream))", ")"), PREFILL, aliased=False),
    Fault("half the cache copied", Edit(ATTENTION, "static_cast<size_t>(bytes), stream)", "static_cast<size_t>(bytes / 2), stream)"), PREFILL, aliased=False),
    Fault("copy of float32 size for float16", Edit("plugin_base.h", "type == nvinfer1::DataType::kFLOAT ? 4 : 2", "type == nvinfer1::DataType::kFLOAT ? 4 : 4"), HALF, aliased=False),
    Fault("copy in the wrong direction", Edit(ATTENTION, "driver->memcpyDtoDAsync(deviceAddress(present), deviceAddress(past),", "driver->memcpyDtoDAsync(deviceAddress(past), deviceAddress(present),"), PREFILL, aliased=False),
    Fault("workspace for one row", Edit(ATTENTION, "Sizes const largest{query.d[0], query.d[1]", "Sizes const largest{1, query.d[1]"), LONG_PREFILL),
    Fault("workspace is the output", Edit(ATTENTION, "    parts.start = workspace;", "    parts.start = outputs[kATTN_OUTPUT];"), SPLIT),
    Fault("decode reads the wrong lengths", Edit(ATTENTION, "void const* const pastLength = inputs[kPAST_LENGTH];", "void const* const pastLength = inputs[kCOS];"), DECODE),
    Fault("exact kernel for any head_dim", Edit("kernel_cache.cpp", "(image.masked ? image.width >= request.width : image.width == request.width);", "image.width >= request.width;"), PREFILL),
    Fault("shared memory not asked for", Edit("kernel_cache.cpp", "image.shared > kDEFAULT_SHARED_BYTES)", "image.shared > 2 * kDEFAULT_SHARED_BYTES)"), LARGE_HEAD),
    Fault("threads, not warps", Edit("launch.h", "kTHREADS_PER_WARP * kernel.image->warps", "kernel.image->warps"), NORM),
    Fault("shared memory not passed", Edit("launch.h", "kernel.image->shared, stream", "0, stream"), PREFILL),
    Fault("output not aliased", Edit(ATTENTION, "case kPRESENT_VALUE: return kPAST_VALUE;", "case kPRESENT_VALUE: return kPAST_KEY;"), PREFILL),
    Fault("heads lost in the engine", Edit("attention_parameters.cpp", '{"num_kv_heads", &parameters.num_kv_heads,', '{"num_kv_heads", &parameters.num_heads,'), PREFILL),
    Fault("masked: cos and sin swapped", Edit(MASKED_ATTENTION, "arguments.cos = deviceAddress(inputs[kCOS]);", "arguments.cos = deviceAddress(inputs[kSIN]);"), MASKED),
    Fault("masked: key and value swapped", Edit(MASKED_ATTENTION, "arguments.key = deviceAddress(inputs[kKEY]);", "arguments.key = deviceAddress(inputs[kVALUE]);"), MASKED),
    Fault("masked: rotated key and value swapped", Edit(MASKED_ATTENTION, "arguments.rotated_key = parts.at(parts.key);", "arguments.rotated_key = parts.at(parts.value);"), MASKED),
    Fault("masked: mask of the first row", Edit(MASKED_ATTENTION, "Grid const grid{ceilDiv(rows, mAttend.image->rows), mParameters.num_kv_heads, batch};", "Grid const grid{ceilDiv(rows, mAttend.image->rows), mParameters.num_kv_heads, 1};"), MASKED),
    Fault("masked: positions not cleared", Edit(MASKED_ATTENTION, "clearPastLength(parts, batch, stream) && rotate", "rotate"), MASKED),
    Fault("masked: positions of one row cleared", Edit(MASKED_ATTENTION, "static_cast<size_t>(batch) * sizeof(int64_t), stream)", "sizeof(int64_t), stream)"), MASKED),
    Fault("masked: grid rounded down", Edit(MASKED_ATTENTION, "ceilDiv(rows, mAttend.image->rows)", "(rows > mAttend.image->rows ? rows / mAttend.image->rows : 1)"), MASKED),
    Fault("masked: grid without the heads of a group", Edit(MASKED_ATTENTION, "tokens * (mParameters.num_heads / mParameters.num_kv_heads);", "tokens;"), MASKED_TILES),
    Fault("masked: grid of tokens of one row", Edit(MASKED_ATTENTION, "Grid{batch * tokens, 1, 1}", "Grid{tokens, 1, 1}"), MASKED),
    Fault("masked: capacity of one token", Edit(MASKED_ATTENTION, "arguments.capacity = static_cast<int32_t>(tokens);", "arguments.capacity = 1;"), MASKED),
    Fault("masked: scale forgotten", Edit(MASKED_ATTENTION, "arguments.scale = mParameters.scale;", "arguments.scale = 1.0F;"), MASKED),
    Fault("masked: parts of the workspace overlap", Edit(MASKED_ATTENTION, "value = key + padded(rows * parameters.num_kv_heads);", "value = key;"), MASKED),
    Fault("masked: workspace for one row", Edit(MASKED_ATTENTION, "Workspace(mParameters, query.d[0], query.d[1], elementSize(inputs", "Workspace(mParameters, 1, query.d[1], elementSize(inputs"), MASKED),
    Fault("masked: workspace without the positions", Edit(MASKED_ATTENTION, "bytes = pastLength + padded(batch * static_cast<int64_t>(sizeof(int64_t)));", "bytes = pastLength;"), MASKED),
    Fault("rows of one batch row", Edit(RMS_NORM, "for (int32_t i = 0; i + 1 < dims.nbDims; ++i)", "for (int32_t i = 1; i + 1 < dims.nbDims; ++i)"), NORM),
    Fault("hidden size of another axis", Edit(RMS_NORM, "dims.d[dims.nbDims - 1];", "dims.d[dims.nbDims - 2];"), NORM),
    Fault("epsilon forgotten", Edit(RMS_NORM, "    arguments.epsilon = mParameters.epsilon;\n    return launch(kNAME, mKernel, gridOf(rows), arguments, stream) ? kSUCCESS : kFAILURE;\n}\n\nint32_t AddRmsNormPlugin", "    arguments.epsilon = 1.0e-12F;\n    return launch(kNAME, mKernel, gridOf(rows), arguments, stream) ? kSUCCESS : kFAILURE;\n}\n\nint32_t AddRmsNormPlugin"), norm_node("LlamaRMSNorm", torch.float32, 3, 8, magnitude=1e-3)),
    Fault("outputs swapped", Edit(RMS_NORM, "arguments.new_residual = deviceAddress(outputs[kNEW_RESIDUAL]);", "arguments.new_residual = deviceAddress(outputs[kNORMED]);"), ADD_NORM),
    Fault("residual is the hidden state", Edit(RMS_NORM, "arguments.residual = deviceAddress(inputs[kRESIDUAL]);", "arguments.residual = deviceAddress(inputs[kHIDDEN_STATES]);"), ADD_NORM),
)  # fmt: skip
NODES = {"prefill": PREFILL, "long prefill": LONG_PREFILL, "split": SPLIT, "below": BELOW, "decode": DECODE, "many tokens": MANY_TOKENS, "half": HALF, "large head": LARGE_HEAD,
         "masked": MASKED, "masked tiles": MASKED_TILES, "norm": NORM, "add norm": ADD_NORM}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Build:
    """The unchanged library, and its objects for the changed ones."""

    generated: Path
    objects: dict[str, Path]
    library: Path


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The library from the sources of the repository."""
    folder = tmp_path_factory.mktemp("library")
    generated = write_generated(folder / "generated")
    sources = [*sorted((PLUGINS / "src").glob("*.cpp")), generated / "kernel_images.S"]
    objects = compile_objects(sources, generated, folder / "objects")
    return Build(
        generated, {path.name: item for path, item in zip(sources, objects, strict=True)},
        link_library(objects, generated, folder / "linked"),
    )  # fmt: skip


def faulty_library(build: Build, edit: Edit, folder: Path) -> Path:
    """The library with one edit. Everything that includes an edited header is compiled again."""
    source = folder / "src"
    source.mkdir()
    for path in (PLUGINS / "src").iterdir():
        (source / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    text = (source / edit.file).read_text(encoding="utf-8")
    assert text.count(edit.text) == 1, f"{edit.file} holds {text.count(edit.text)} times: {edit.text}"
    (source / edit.file).write_text(text.replace(edit.text, edit.fault), encoding="utf-8")
    changed = sorted(source.glob("*.cpp")) if edit.file.endswith(".h") else [source / edit.file]
    objects = dict(build.objects)
    for path, item in zip(changed, compile_objects(changed, build.generated, folder / "objects"), strict=True):
        objects[path.name] = item
    return link_library(list(objects.values()), build.generated, folder / "linked")


@pytest.mark.parametrize("aliased", [True, False], ids=["aliased", "not aliased"])
@pytest.mark.parametrize("node", NODES.values(), ids=NODES.keys())
def test_without_a_fault_every_node_is_right(build: Build, node: Node, aliased: bool) -> None:
    check_outputs(
        node, run_plugin(PluginLibrary(build.library), node.op, node.inputs, node.attributes, aliased=aliased)
    )


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault_is_caught(build: Build, fault: Fault, tmp_path: Path) -> None:
    library = PluginLibrary(faulty_library(build, fault.edit, tmp_path))
    with pytest.raises((AssertionError, PluginError)) as caught:
        check_outputs(
            fault.node,
            run_plugin(
                library,
                fault.node.op,
                fault.node.inputs,
                fault.node.attributes,
                aliased=fault.aliased,
                max_shapes=fault.max_shapes,
            ),
        )
    print(f"{fault.name}: {caught.value}")  # pytest -rA shows what caught each


def test_a_library_built_for_other_chips_says_so(build: Build) -> None:
    """It holds code for 8.9 only, and no PTX."""
    library = PluginLibrary(build.library, compute_capability=(12, 0))
    with pytest.raises(
        PluginError, match=r"got compute capability 12.0, .*; hint: rebuild the library without LLAMA_EX"
    ):
        run_plugin(library, NORM.op, NORM.inputs, NORM.attributes)
