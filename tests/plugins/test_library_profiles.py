"""Plugins below the largest shapes of their profile, as engines run them: numbers against float64, the size of the workspace,
and refusals beyond the profile. Without numbers, 100,000 sequences of shapes: ``test_library_sanitized.py``."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest
import torch
from library_support import (
    DTYPES,
    Node,
    attention_node,
    check_outputs,
    masked_attention_node,
    norm_node,
    require_plugins,
)

from llama_export.ops.table import OP_SPECS

require_plugins()

from llama_export_plugins.harness import Field, GuardedBuffer, Plugin, PluginError, PluginLibrary, PreparedPlugin  # noqa: E402

HEADS, HEAD_DIM = (4, 2), 16
Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]


@pytest.fixture(scope="module")
def library() -> PluginLibrary:
    return PluginLibrary()


def largest(op: str, batch: int, tokens: int, capacity: int = 0) -> list[tuple[int, ...]]:
    """The largest shapes of an attention's inputs."""
    (heads, kv_heads), half = HEADS, HEAD_DIM // 2
    rows = [
        (batch, tokens, width) for width in (heads * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM, half, half)
    ]
    if op == "LlamaMaskedAttention":
        return [*rows, (batch, tokens)]
    return [*rows, *[(batch, kv_heads, capacity, HEAD_DIM)] * 2, (batch,)]


def memory_of(node: Node) -> list[GuardedBuffer]:
    return [GuardedBuffer.holding(f"input {index}", tensor, "cpu") for index, tensor in enumerate(node.inputs)]


def run_in_turn(library: PluginLibrary, nodes: Sequence[Node], max_shapes: Sequence[Sequence[int]], seed: int) -> None:
    """All nodes and some again, in random order, on one plugin or a clone that takes its place; each against float64."""
    chance = random.Random(seed)
    order = [*nodes, *nodes[:2]]
    chance.shuffle(order)
    prepared = PreparedPlugin(
        library,
        order[0].op,
        memory_of(order[0]),
        order[0].attributes,
        aliased=chance.random() < 0.5,
        max_shapes=max_shapes,
    )
    for node in order:
        prepared.change(memory_of(node), on_clone=chance.random() < 0.3)
        prepared.enqueue()
        prepared.check_red_zones()
        check_outputs(node, tuple(buffer.tensor for buffer in prepared.outputs))
    prepared.destroy()


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_below_the_largest_prefill(library: PluginLibrary, dtype: torch.dtype) -> None:
    """At 1024 keys the cache has more pieces (8) than at the largest, 1100 (5)."""
    shapes = [
        (1, (1000,), 1024), (1, (5, 700), 1024), (1, (1099,), 1100), (2, (900,), 1025), (8, (3, 40), 130), (1, (0,), 1),
        (37, (0, 20), 64), (9, (600,), 1100), (3, (0,), 3),
    ]  # fmt: skip
    nodes = [
        attention_node(
            dtype, new_tokens=tokens, past=past, heads=HEADS, head_dim=HEAD_DIM, capacity=capacity, seed=seed
        )
        for seed, (tokens, past, capacity) in enumerate(shapes)
    ]
    run_in_turn(library, nodes, largest("LlamaAttention", 2, 512, 1100), seed=1)


@pytest.mark.slow
def test_attention_at_and_below_a_long_prefill(library: PluginLibrary) -> None:
    nodes = [
        attention_node(
            torch.float32, new_tokens=tokens, past=past, heads=HEADS, head_dim=HEAD_DIM, capacity=capacity, seed=tokens
        )
        for tokens, past, capacity in (
            (512, (0, 300), 8200),
            (1, (8191, 20), 8192),
            (1, (8199,), 8200),
            (5, (77,), 1024),
        )
    ]
    run_in_turn(library, nodes, largest("LlamaAttention", 2, 512, 8200), seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_attention_below_the_largest_batch(library: PluginLibrary, dtype: torch.dtype) -> None:
    masks = [[[1]], [[1, 1, 0], [0, 1, 1]], [[1] * 40], [[0] * 7 + [1] * 20, [1] * 27, [1] * 5 + [0] * 22]]
    nodes = [masked_attention_node(dtype, mask=mask, heads=HEADS, head_dim=HEAD_DIM, seed=len(mask)) for mask in masks]
    run_in_turn(library, nodes, largest("LlamaMaskedAttention", 3, 64), seed=3)


@pytest.mark.parametrize("op", ["LlamaRMSNorm", "LlamaAddRMSNorm"])
def test_norms_below_the_most_rows(library: PluginLibrary, op: str) -> None:
    nodes = [norm_node(op, torch.float16, *shape, 72, seed=len(shape)) for shape in ((1, 1), (3, 7), (2, 16), (1, 30))]
    count = len(nodes[0].inputs) - 1
    run_in_turn(library, nodes, [*[(4, 32, 72)] * count, (72,)], seed=4)


# ---- the workspace ------------------------------------------------------------------------------------------------


def created(library: PluginLibrary, node: Node) -> Plugin:
    names = [item.name for item in OP_SPECS[node.op].attributes]
    fields = [Field.from_attribute(name, value) for name, value in zip(names, node.attributes, strict=True)]
    return library.create(node.op, fields)


def attention_tensors(batch: int, tokens: int, capacity: int, dtype: torch.dtype = torch.float32) -> Shapes:
    """Inputs and outputs."""
    shapes = largest("LlamaAttention", batch, tokens, capacity)
    types = [dtype, dtype, dtype, torch.float32, torch.float32, dtype, dtype, torch.int64, dtype, dtype, dtype]
    return list(zip([*shapes, shapes[0], shapes[5], shapes[6]], types, strict=True))


@pytest.mark.parametrize(("most", "fewer"), [(1100, 1024), (1793, 1024), (8200, 8192), (15873, 8192), (9000, 1024)])
def test_a_workspace_serves_every_shorter_cache(library: PluginLibrary, most: int, fewer: int) -> None:
    plugin = created(library, attention_node(torch.float32, new_tokens=1, past=(0,)))
    assert plugin.configure(attention_tensors(1, 1, most), 8) >= plugin.configure(attention_tensors(1, 1, fewer), 8)
    plugin.destroy()


def test_a_workspace_serves_every_smaller_shape(library: PluginLibrary) -> None:
    """1,200 random profiles, and a random shape within each."""
    chance = random.Random(5)
    plugin = created(library, attention_node(torch.float32, new_tokens=1, past=(0,)))
    for _ in range(1200):
        most = (
            chance.randint(1, 8),
            chance.randint(1, 64),
            chance.choice((1100, 1500, 8200, 12000, chance.randint(1, 20000))),
        )
        fewer = tuple(chance.randint(1, size) for size in most)
        needed = plugin.configure(attention_tensors(*fewer), 8)
        assert plugin.configure(attention_tensors(*most), 8) >= needed, (most, fewer)
    plugin.destroy()


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((3, 8, 1024), torch.float16),
        ((2, 300, 1024), torch.float16),
        ((2, 8, 8193), torch.float16),
        ((2, 8, 1024), torch.float32),
    ],
    ids=["batch", "tokens", "capacity", "dtype"],
)
def test_what_does_not_fit_the_workspace_is_refused(
    library: PluginLibrary, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """By onShapeChange, and by enqueue if its answer is ignored; nothing is launched."""
    node = attention_node(torch.float16, new_tokens=1, past=(0,), capacity=1024)
    plugin = created(library, node)
    within = attention_tensors(2, 8, 1024, torch.float16)
    granted = plugin.configure(within, 8)
    restored = library.create(node.op, plugin.serialize(), "runtime")
    attached = restored.attach()
    attached.shape_change(within, 8)
    beyond = attention_tensors(*sizes, dtype)
    sentence = (
        rf"LlamaAttention: the workspace is too small for these shapes: got {granted} bytes, .* expected at least \d+;"
    )
    with pytest.raises(PluginError, match=rf"onShapeChange returned -1; {sentence}"):
        attached.shape_change(beyond, 8)
    assert library.stand_in is not None
    before = len(library.stand_in.launches())
    addresses = [0x10000 * (index + 1) for index in range(8)]
    with pytest.raises(PluginError, match=rf"enqueue returned -1; {sentence}"):
        attached.enqueue(beyond, addresses, [0x100000, *addresses[5:7]], 0x200000)
    assert len(library.stand_in.launches()) == before
    attached.shape_change(within, 8)  # what fits runs as before
    for item in (attached, restored, plugin):
        item.destroy()


def test_a_plugin_that_was_never_configured_does_not_run(library: PluginLibrary) -> None:
    """Nobody knows how large its workspace is."""
    for node in (
        attention_node(torch.float32, new_tokens=1, past=(0,)),
        masked_attention_node(torch.float32, mask=[[1, 1]]),
    ):
        plugin = created(library, node)
        outputs = zip(plugin.output_shapes(node.shapes), [torch.float32] * 3, strict=False)
        with pytest.raises(
            PluginError, match=rf"{node.op}: these shapes need a workspace .* hint: TensorRT has to call"
        ):
            plugin.shape_change([*node.shapes, *outputs], len(node.inputs))
        plugin.destroy()


def test_a_clone_does_not_keep_the_kernels_of_another_context() -> None:
    """An attached plugin's functions are those of its CUDA context; TensorRT may use a clone of it in another."""
    library = PluginLibrary()
    assert library.stand_in is not None
    node = norm_node("LlamaRMSNorm", torch.float32, 2, 8)
    plugin = created(library, node)
    tensors = [*node.shapes, node.shapes[0]]
    plugin.configure(tensors, 2)
    attached = plugin.attach()
    clone = attached.clone()
    with pytest.raises(PluginError, match="enqueue without loaded kernels"):
        clone.enqueue(tensors, [0x1000, 0x2000], [0x3000], 0)
    library.stand_in.calls.clear()
    library.stand_in.context = 0x2000
    clone.shape_change(tensors, 2)
    assert [call.during for call in library.stand_in.calls if call.function == "cuModuleLoadData"] == ["onShapeChange"]
    for item in (clone, attached, plugin):
        item.destroy()


def test_the_harness_configures_for_the_largest_shapes(library: PluginLibrary) -> None:
    """The harness itself: the workspace is that of the largest shapes, and shapes beyond them are refused."""
    node = attention_node(torch.float32, new_tokens=1, past=(3,), heads=HEADS, head_dim=HEAD_DIM, capacity=64)
    small = PreparedPlugin(library, node.op, memory_of(node), node.attributes)
    large = PreparedPlugin(library, node.op, memory_of(node), node.attributes, max_shapes=largest(node.op, 2, 64, 300))
    assert large.workspace.nbytes > small.workspace.nbytes
    with pytest.raises(PluginError, match=re.escape("the workspace is too small")):
        small.change(memory_of(attention_node(torch.float32, new_tokens=1, past=(3, 4), heads=HEADS, capacity=300)))
    for prepared in (small, large):
        prepared.destroy()
