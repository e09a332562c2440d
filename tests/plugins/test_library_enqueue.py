"""The library's run-time path in numbers, on a CPU: nodes and a whole exported graph through ``enqueue``, against float64;
and what it asks of the CUDA driver, when, and what it says when the driver refuses."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, cases
from library_support import (
    DTYPES,
    Node,
    attention_node,
    check_outputs,
    masked_attention_node,
    norm_node,
    require_plugins,
    run_python,
)
from torch import Tensor

require_plugins()

from llama_export_plugins.harness import Field, PluginError, PluginLibrary, enqueue_ops, run_plugin  # noqa: E402
from llama_export_plugins.kernels.launch import ops  # noqa: E402
from llama_export_plugins.kernels.table import KERNELS, Variant  # noqa: E402

from llama_export.bundle.bundle import Bundle  # noqa: E402
from llama_export.ops.table import OP_SPECS  # noqa: E402
from llama_export.parity.oracle.evaluator import GraphEvaluator  # noqa: E402

LONG_ROW = 2**31 - 1
"""The width of the norm kernels for any hidden size."""
CHIPS = (80, 86, 89, 90, 100, 120, 121)
"""Compute capabilities, times ten, that have machine code of their own."""


@pytest.fixture(scope="module")
def library() -> PluginLibrary:
    return PluginLibrary()


def run(library: PluginLibrary, node: Node, *, aliased: bool = True) -> tuple[Tensor, ...]:
    return run_plugin(library, node.op, node.inputs, node.attributes, aliased=aliased)


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 8), (2, 1, 768), (2, 5, 769), (1, 2, 3, 72)])
@pytest.mark.parametrize("op", ["LlamaRMSNorm", "LlamaAddRMSNorm"])
def test_norms_of_awkward_shapes(library: PluginLibrary, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    node = norm_node(op, dtype, *shape)
    check_outputs(node, run(library, node))


ATTENTIONS: dict[str, dict[str, Any]] = {
    "empty cache": {"new_tokens": 5, "past": (0,)},
    "ragged": {"new_tokens": 3, "past": (0, 21, 7)},
    "decode, ragged": {"new_tokens": 1, "past": (0, 23, 8)},
    "up to the capacity": {"new_tokens": 24, "past": (0, 0)},
    "one head": {"new_tokens": 2, "past": (3,), "heads": (1, 1)},
    "no groups": {"new_tokens": 2, "past": (3,), "heads": (3, 3)},
    "groups of five": {"new_tokens": 9, "past": (3, 1), "heads": (10, 2)},
    "decode, one group of 32": {"new_tokens": 1, "past": (3, 9), "heads": (32, 1)},
    "smallest head": {"new_tokens": 3, "past": (2,), "head_dim": 2},
    "head of 80": {"new_tokens": 3, "past": (2, 4), "head_dim": 80},
    "head of 128": {"new_tokens": 3, "past": (2,), "head_dim": 128},
    "largest head": {"new_tokens": 2, "past": (2,), "head_dim": 256},
}


@pytest.mark.parametrize("aliased", [True, False], ids=["aliased", "not aliased"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_of_awkward_shapes(library: PluginLibrary, case: str, dtype: torch.dtype, aliased: bool) -> None:
    node = attention_node(dtype, **ATTENTIONS[case])
    check_outputs(node, run(library, node, aliased=aliased))


MASKED_ATTENTIONS: dict[str, dict[str, Any]] = {
    "one token": {"mask": [[1]]},
    "no padding": {"mask": [[1] * 9]},
    "padding on the right": {"mask": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8]},
    "padding on the left": {"mask": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]]},
    "nothing but padding": {"mask": [[0] * 5, [1] * 5]},
    "holes": {"mask": [[1, 0, 1, 0, 0, 7, -1]]},
    "one head": {"mask": [[1, 1, 0]], "heads": (1, 1)},
    "groups of five": {"mask": [[0, 1, 1, 1]], "heads": (10, 2)},
    "several tiles": {"mask": [[0] * 3 + [1] * 67, [1] * 70], "heads": (4, 1), "head_dim": 64},
    "smallest head": {"mask": [[1, 1, 0]], "head_dim": 2},
    "head of 80": {"mask": [[1, 1, 0], [0, 1, 1]], "head_dim": 80},
    "head of 128": {"mask": [[1, 1, 1]], "head_dim": 128},
    "largest head": {"mask": [[1, 1]], "head_dim": 256},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MASKED_ATTENTIONS)
def test_masked_attention_of_awkward_shapes(library: PluginLibrary, case: str, dtype: torch.dtype) -> None:
    node = masked_attention_node(dtype, **MASKED_ATTENTIONS[case])
    check_outputs(node, run(library, node))


def test_no_tokens_is_no_work_but_the_cache_is_kept(library: PluginLibrary) -> None:
    assert library.stand_in is not None
    node = attention_node(torch.float32, new_tokens=0, past=(3, 5), poison=False)
    before = len(library.stand_in.launches())
    _, present_key, present_value = run(library, node, aliased=False)
    assert torch.equal(present_key, node.inputs[5])
    assert torch.equal(present_value, node.inputs[6])
    assert len(library.stand_in.launches()) == before


def test_empty_hidden_states_are_no_work(library: PluginLibrary) -> None:
    node = norm_node("LlamaRMSNorm", torch.float32, 0, 3, 16)
    assert run(library, node)[0].shape == (0, 3, 16)


@pytest.mark.parametrize(
    ("dtype", "aliased"), [("float32", True), ("float32", False), ("float16", True), ("bfloat16", True)]
)
def test_whole_graph_prefill_and_ragged_decode(tiny_bundles: dict[str, Bundle], dtype: str, aliased: bool) -> None:
    """Two rows of other lengths, prefill and 3 decode steps; float32 within 1e-5 of eager in float64, 16-bit within twice
    what the eager ops lose in that dtype."""
    path = tiny_bundles[dtype].model_path
    got = greedy_logits(GraphEvaluator(path, custom_ops=enqueue_ops(aliased=aliased)))
    eager = greedy_logits(GraphEvaluator(path))
    exact = greedy_logits(GraphEvaluator(path, dtype=torch.float64))
    for ours, theirs, right in zip(got, eager, exact, strict=True):
        error, noise = (float((item.double() - right).norm() / right.norm()) for item in (ours, theirs))
        assert error <= (1e-5 if dtype == "float32" else 2 * noise), (error, noise)


def greedy_logits(evaluator: GraphEvaluator, capacity: int = 16) -> list[Tensor]:
    """Logits of a ragged prefill and three decode steps with fixed tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (2, 9), generator=generator)
    lengths = torch.tensor([6, 3])
    caches = {
        value.name: torch.zeros(2, 2, capacity, 16)
        for value in evaluator._graph.input
        if value.name.startswith("past_key_values")
    }
    logits, past = [], torch.zeros(2, dtype=torch.int64)
    for step in range(4):
        new = tokens[:, :6] if step == 0 else tokens[:, 5 + step : 6 + step]
        valid = lengths if step == 0 else torch.ones(2, dtype=torch.int64)
        outputs = evaluator.run(
            {
                "input_ids": new,
                "past_length": past,
                "sequence_length": valid,
                "logits_index": (valid - 1)[:, None],
                **caches,
            }
        )
        logits.append(outputs["logits"])
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        past = past + valid
    return logits


# ---- the driver ---------------------------------------------------------------------------------------------------


def calls_of(node: Node, *, aliased: bool = True) -> tuple[PluginLibrary, list[tuple[str, str]]]:
    library = PluginLibrary()
    assert library.stand_in is not None
    run(library, node, aliased=aliased)
    return library, [(call.function, call.during) for call in library.stand_in.calls]


@pytest.mark.parametrize(
    ("new_tokens", "capacity", "attending"),
    [
        (1, 100, ["attention_split"]),  # one piece of the cache
        (1, 200, ["attention_split", "attention_combine"]),
        (8, 200, ["attention_split", "attention_combine"]),  # 16 queries: they are few
        (9, 200, ["attention_prefill"]),
    ],
)
def test_kernels_are_loaded_once_and_before_enqueue(new_tokens: int, capacity: int, attending: list[str]) -> None:
    node = attention_node(torch.float16, new_tokens=new_tokens, past=(2,), heads=(4, 2), head_dim=64, capacity=capacity)
    library, calls = calls_of(node)
    assert library.stand_in is not None
    loads = [("cuModuleLoadData", "attachToContext"), ("cuModuleGetFunction", "attachToContext")] * 4
    launches = [("cuLaunchKernel", "enqueue")] * (1 + len(attending))
    assert [call for call in calls if call[0] != "cuFuncSetAttribute"] == loads + launches
    library.stand_in.calls.clear()
    run(library, node)
    assert [(call.function, call.during) for call in library.stand_in.calls] == launches
    assert [call.details["kernel"] for call in library.stand_in.calls] == ["rotate_and_append", *attending]


def test_another_context_loads_its_own_kernels() -> None:
    node = norm_node("LlamaRMSNorm", torch.float32, 2, 8)
    library, first = calls_of(node)
    assert library.stand_in is not None
    library.stand_in.context = 0x2000
    run(library, node)
    loads = [call.function for call in library.stand_in.calls].count("cuModuleLoadData")
    assert loads == 2 * [function for function, _ in first].count("cuModuleLoadData")


def test_cache_is_copied_only_where_it_is_not_aliased() -> None:
    node = attention_node(torch.float16, new_tokens=2, past=(2, 1))
    assert "cuMemcpyDtoDAsync" not in [function for function, _ in calls_of(node)[1]]
    library, calls = calls_of(node, aliased=False)
    assert library.stand_in is not None
    assert [call for call in calls if call[0] == "cuMemcpyDtoDAsync"] == [("cuMemcpyDtoDAsync", "enqueue")] * 2
    sizes = {call.details["bytes"] for call in library.stand_in.calls if call.function == "cuMemcpyDtoDAsync"}
    assert sizes == {node.inputs[5].nbytes}


def test_launches_are_what_the_kernels_expect() -> None:
    node = attention_node(torch.float32, new_tokens=7, past=(3, 11), heads=(6, 2), head_dim=16)
    library, _ = calls_of(node)
    assert library.stand_in is not None
    append, attend = library.stand_in.launches()
    sizes = {"new_tokens": 7, "num_heads": 6, "num_kv_heads": 2, "capacity": 24, "head_dim": 16}
    assert append.details["grid"] == (14, 1, 1)
    assert append.details["arguments"] == {
        "query": "input 0", "key": "input 1", "value": "input 2", "cos": "input 3", "sin": "input 4",
        "past_length": "input 7", "rotated_query": "workspace", "present_key": "input 5", "present_value": "input 6",
        **sizes, "query_stride": 96, "key_stride": 32, "value_stride": 32,
    }  # fmt: skip
    rows = attend.details["image"]["constexprs"]["BLOCK_M"]
    assert attend.details["grid"] == (-(-7 * 3 // rows), 2, 2)
    assert attend.details["arguments"] == {
        "rotated_query": "workspace", "present_key": "input 5", "present_value": "input 6", "past_length": "input 7",
        "attn_output": "output 0", "scale": 0.25, **sizes,
    }  # fmt: skip


@pytest.mark.parametrize("case", [case for case in cases() if case.dtype == torch.float16], ids=lambda case: case.name)
def test_launches_are_those_of_tritons_own_launcher(library: PluginLibrary, case: Case) -> None:
    """Same kernels, variants, grids and scalars, in the same order, as the launches in Python make; block and shared memory as
    compiled, which the stand-in requires of every launch."""
    assert library.stand_in is not None
    expected = []

    def record(variant: Variant, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        named = zip((name for name, _ in KERNELS[variant.kernel].arguments), arguments, strict=True)
        scalars = {name: value for name, value in named if not isinstance(value, Tensor)}
        expected.append((variant.kernel, variant.width, variant.masked, grid, pytest.approx(scalars)))

    # Dense, as TensorRT hands them over; `contiguous` leaves the stride of a single token as it was.
    dense = [tensor.clone(memory_format=torch.contiguous_format) for tensor in case.inputs]
    ops(record)[case.op](*dense, *case.attributes)
    library.stand_in.calls.clear()
    run_plugin(library, case.op, dense, case.attributes)
    launched = []
    for details in (call.details for call in library.stand_in.launches()):
        scalars = {name: value for name, value in details["arguments"].items() if not isinstance(value, str)}
        image = details["image"]
        launched.append((details["kernel"], image["width"], image["masked"], details["grid"], scalars))
    assert launched == expected


@pytest.mark.parametrize(("capacity", "keys", "pieces"), [(1024, 128, 8), (1030, 256, 5), (8193, 512, 17)])
def test_launches_of_a_split_cache(capacity: int, keys: int, pieces: int) -> None:
    """The pieces follow from the capacity; their results go through the workspace, part after part."""
    node = attention_node(torch.float32, new_tokens=2, past=(3, 700), heads=(6, 2), head_dim=16, capacity=capacity)
    library, _ = calls_of(node)
    assert library.stand_in is not None
    _, split, combine = library.stand_in.launches()
    assert split.details["grid"] == (pieces, 2, 2)
    assert combine.details["grid"] == (2 * 2 * 6, 1, 1)
    for launch in (split, combine):
        assert launch.details["arguments"].items() >= {
            "partial_output": "workspace", "partial_softmax": "workspace", "attn_output": "output 0",
            "past_length": "input 7", "new_tokens": 2, "num_heads": 6, "capacity": capacity, "head_dim": 16,
            "num_splits": pieces, "split_keys": keys,
        }.items()  # fmt: skip


def test_much_shared_memory_is_asked_for() -> None:
    node = attention_node(torch.float32, new_tokens=2, past=(2,), head_dim=256)
    library, _ = calls_of(node)
    assert library.stand_in is not None
    asked = {
        call.details["kernel"]: call.details["value"]
        for call in library.stand_in.calls
        if call.function == "cuFuncSetAttribute"
    }
    needed = {
        image["kernel"]: image["shared"]
        for image in library.variants["images"]
        if image["compute_capability"] == 89
        and image["dtype"] == "float32"
        and image["width"] == 256
        and image["kernel"] != "attention_padded"
    }
    assert asked == {kernel: shared for kernel, shared in needed.items() if shared > 48 * 1024}
    assert asked, "no kernel of this test needs more than 48 KiB; choose another"


Prepare = Callable[[PluginLibrary], None]


def failing(function: str, error: int) -> Prepare:
    def prepare(library: PluginLibrary) -> None:
        assert library.stand_in is not None
        library.stand_in.fail_with[function] = error

    return prepare


def without_context(library: PluginLibrary) -> None:
    assert library.stand_in is not None
    library.stand_in.context = 0


@pytest.mark.parametrize(
    ("prepare", "parts"),
    [
        (without_context, ("onShapeChange", "no CUDA context is current on this thread; hint: ")),
        (failing("cuCtxGetDevice", 3), ("onShapeChange", "cannot say which GPU this is: CUDA_ERROR_3 (3)")),
        (failing("cuModuleLoadData", 222), ("onShapeChange", "refuses kernel `rotate_and_append` compiled for sm_89: CUDA_ERROR_222 (222); hint: update the NVIDIA driver")),
        (failing("cuModuleGetFunction", 500), ("onShapeChange", "kernel `rotate_and_append` cannot be used", "CUDA_ERROR_500 (500)")),
        (failing("cuLaunchKernel", 700), ("enqueue", "kernel `rotate_and_append` was not launched: CUDA_ERROR_700 (700); grid 4 x 1 x 1")),
        (failing("cuMemcpyDtoDAsync", 700), ("enqueue", "the KV cache was not copied to its output: CUDA_ERROR_700 (700)")),
    ],
    ids=["no context", "no device", "module refused", "function missing", "launch refused", "copy refused"],
)  # fmt: skip
def test_driver_failures_are_sentences(prepare: Prepare, parts: tuple[str, ...]) -> None:
    library = PluginLibrary()
    prepare(library)
    with pytest.raises(PluginError) as caught:
        run(library, attention_node(torch.float32, new_tokens=2, past=(1, 0)), aliased=False)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("libcuda", ["libcuda-that-is-not-there.so", "libc.so.6"])
def test_without_a_driver_plugins_build_and_refuse_to_run(libcuda: str) -> None:
    """In a process of its own: no stand-in, and no driver or one that is none."""
    code = """
import sys, torch
from llama_export_plugins.harness import Field, PluginError, PluginLibrary
library = PluginLibrary(compute_capability=None)
plugin = library.create("LlamaRMSNorm", [Field.from_attribute("epsilon", 1e-5)])
tensors = [((2, 8), torch.float32), ((8,), torch.float32), ((2, 8), torch.float32)]
plugin.configure(tensors, 2)
attached = plugin.attach()
try:
    attached.enqueue(tensors, [4096, 4096], [4096], 0)
except PluginError as err:
    print(err)
try:
    attached.shape_change(tensors, 2)
except PluginError as err:
    print(err)
"""
    enqueue, shape_change = run_python(code, LLAMA_EXPORT_LIBCUDA=libcuda).splitlines()
    assert "enqueue without loaded kernels" in enqueue
    expected = "it lacks `cuCtxGetCurrent`; hint: " if libcuda == "libc.so.6" else "no CUDA driver: got `"
    assert expected in shape_change


def test_a_driver_that_cannot_tell_contexts_apart_is_refused(tmp_path: Path) -> None:
    """cuCtxGetId, of CUDA 12: without it a context at the address of a destroyed one would get that one's kernels."""
    names = (
        "cuCtxGetCurrent cuCtxGetDevice cuDeviceGetAttribute cuModuleLoadData cuModuleGetFunction cuFuncSetAttribute "
        "cuLaunchKernel cuMemcpyDtoDAsync_v2 cuMemsetD8Async cuGetErrorName"
    ).split()
    source = "\n".join(f'extern "C" int {name}() {{ return 999; }}' for name in names)
    library = tmp_path / "libcuda-of-cuda-11.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", library], input=source, text=True, check=True)
    code = """
import torch
from llama_export_plugins.harness import Field, PluginError, PluginLibrary
library = PluginLibrary(compute_capability=None)
plugin = library.create("LlamaRMSNorm", [Field.from_attribute("epsilon", 1e-5)])
try:
    plugin.shape_change([((2, 8), torch.float32), ((8,), torch.float32), ((2, 8), torch.float32)], 2)
except PluginError as err:
    print(err)
"""
    said = run_python(code, LLAMA_EXPORT_LIBCUDA=str(library))
    assert "it lacks `cuCtxGetId`; hint: install a driver for CUDA 12 or later" in said


# ---- which kernel on which chip -----------------------------------------------------------------------------------


def chosen_images(compute_capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> list[dict[str, Any]]:
    """What attachToContext loads on a GPU."""
    library = PluginLibrary(compute_capability=compute_capability)
    assert library.stand_in is not None
    node = attention_node(dtype, new_tokens=1, past=(1,), head_dim=head_dim)
    names = [item.name for item in OP_SPECS[node.op].attributes]
    fields = [Field.from_attribute(name, value) for name, value in zip(names, node.attributes, strict=True)]
    plugin = library.create(node.op, fields)
    plugin.configure([*node.shapes, node.shapes[0], *node.shapes[5:7]], 8)
    attached = plugin.attach()
    for item in (plugin, attached):
        item.destroy()
    return [call.details["image"] for call in library.stand_in.calls if call.function == "cuModuleLoadData"]


@pytest.mark.parametrize(
    ("device", "chip", "ptx"),
    [
        ((8, 0), 80, False), ((8, 6), 86, False), ((8, 7), 86, False), ((8, 9), 89, False), ((9, 0), 90, False),
        ((10, 0), 100, False), ((10, 3), 80, True), ((11, 0), 80, True), ((12, 0), 120, False), ((12, 1), 121, False),
        ((13, 0), 80, True),
    ],
)  # fmt: skip
def test_every_gpu_gets_code_that_runs_on_it(device: tuple[int, int], chip: int, ptx: bool) -> None:
    if not set(CHIPS) <= set(PluginLibrary().variants["chips"]):
        pytest.skip("this library was built for fewer chips: LLAMA_EXPORT_CHIPS")
    images = chosen_images(device, torch.float16, 64)
    assert [image["kernel"] for image in images] == [
        "rotate_and_append", "attention_prefill", "attention_split", "attention_combine"
    ]  # fmt: skip

    assert {(image["compute_capability"], image["ptx"]) for image in images} == {(chip, ptx)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "padded", "masked"),
    [(2, 64, True), (18, 64, True), (64, 64, False), (66, 128, True), (82, 128, True), (128, 128, False),
     (130, 256, True), (254, 256, True)],
)  # fmt: skip
def test_every_head_dim_gets_the_least_padding(dtype: torch.dtype, head_dim: int, padded: int, masked: bool) -> None:
    for image in chosen_images((8, 9), dtype, head_dim):
        assert (image["width"], image["masked"]) == (padded, masked)
        assert image["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("head_dim", [32, 80, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_usual_head_dims_have_kernels_of_their_own(dtype: torch.dtype, head_dim: int) -> None:
    for image in chosen_images((8, 9), dtype, head_dim):
        assert (image["width"], image["masked"]) == (head_dim, False)


@pytest.mark.parametrize(
    ("hidden_size", "width"),
    [(1, 256), (256, 256), (257, 1024), (2048, 2048), (4096, 4096), (5120, 8192), (16384, 16384), (16385, LONG_ROW)],
)
def test_every_hidden_size_gets_the_shortest_row_that_holds_it(hidden_size: int, width: int) -> None:
    library, _ = calls_of(norm_node("LlamaAddRMSNorm", torch.bfloat16, 3, hidden_size))
    assert library.stand_in is not None
    (launch,) = library.stand_in.launches()
    assert launch.details["image"]["width"] == width
    assert launch.details["grid"] == (-(-3 // max(1, 1024 // width)), 1, 1)
    loads = [call.during for call in library.stand_in.calls if call.function == "cuModuleLoadData"]
    assert loads == ["attachToContext"]  # the engine has stored the hidden size: nothing is left for the first call


def test_a_gpu_older_than_every_kernel_is_named() -> None:
    library = PluginLibrary(compute_capability=(7, 5))
    with pytest.raises(PluginError) as caught:
        run(library, norm_node("LlamaRMSNorm", torch.float32, 2, 8))
    for part in (
        "no kernel `rms_norm`",
        "got compute capability 7.5",
        "expected 8.0 or later",
        "hint: build the engine with --ops native",
    ):
        assert part in str(caught.value)


def test_library_of_other_images_than_its_table_is_caught(tmp_path: Path) -> None:
    """The harness itself: variants.json of another build must not pass for this library's."""
    import json
    import shutil

    from llama_export_plugins import library_path

    shutil.copy(library_path(), tmp_path)
    table = PluginLibrary().variants
    table["images"] = table["images"][:1]
    (tmp_path / "variants.json").write_text(json.dumps(table))
    library = PluginLibrary(tmp_path / library_path().name)
    with pytest.raises(PluginError, match=r"an image that variants.json does not list"):
        run(library, attention_node(torch.float32, new_tokens=1, past=(0,)))
