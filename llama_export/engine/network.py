"""The parsed network against the config: the last place where every layer can still be seen.

Role: between the parser and the builder in :mod:`llama_export.engine.build`. Inputs and outputs, layer counts, that each op's
nodes became plugin layers or did not, that every cache output is the in-place update of its own input at
``past_length``, and that every attention reads those caches or is masked by ``attention_mask``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from llama_export.bundle.bundle import Bundle
from llama_export.engine.sidecar import EngineTensor
from llama_export.engine.spec import (
    ATTENTION,
    MASKED_ATTENTION,
    engine_io,
    expected_layers,
    expected_plugin_layers,
    may_decompose,
)
from llama_export.errors import EngineBuildError, numbered
from llama_export.graph.io import INTERFACES
from llama_export.graph.kv_cache import cache_names, present_name
from llama_export.ops import table
from llama_export.ops.table import DOMAIN, TensorSpec


def _index(tensors: tuple[TensorSpec, ...], name: str) -> int:
    return next(index for index, tensor in enumerate(tensors) if tensor.name == name)


_ATTENTION_MASK = _index(table.MASKED_ATTENTION.inputs, "attention_mask")
_PAST_KEY, _PAST_VALUE, _PAST_LENGTH = (
    _index(table.ATTENTION.inputs, name) for name in ("past_key", "past_value", "past_length")
)
_PRESENT_KEY, _PRESENT_VALUE = (_index(table.ATTENTION.outputs, name) for name in ("present_key", "present_value"))
"""Places of the ops' inputs and outputs."""


def check_network(
    trt: Any, network: Any, proto: Any, bundle: Bundle, capacity: int, plugin_ops: Collection[str],
    weight_inputs: Sequence[EngineTensor] = (),
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """The parsed network against the config: the last place where every layer can still be seen.

    Returns:
        Layer type -> count, and op -> count of the plugin layers.

    Raises:
        EngineBuildError: all differences.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    counts = Counter(layer.type.name for layer in layers)
    expected = expected_layers(bundle, plugin_ops)
    problems = [
        f"{counts[name]} layers {name}, expected {count}" for name, count in expected.items() if counts[name] != count
    ]
    plugin_layers, plugin_problems = _plugin_problems(trt, layers, proto, bundle, plugin_ops)
    problems += plugin_problems
    problems += _io_problems(network, [*engine_io(bundle, capacity), *weight_inputs])
    attention_problems = _cache_problems if INTERFACES[bundle.task].has_cache else _mask_problems
    problems += attention_problems(trt, layers, bundle, plugin_ops)
    if problems:
        raise EngineBuildError(
            "the parsed network is not what the config implies",
            details=numbered("network", problems),
            hint="this is a bug or an untested TensorRT version: see `llama-export env`",
        )
    return dict(sorted(counts.items())), plugin_layers


def _plugin_problems(
    trt: Any, layers: Sequence[Any], proto: Any, bundle: Bundle, plugin_ops: Collection[str]
) -> tuple[dict[str, int], list[str]]:
    """Op -> plugin layers, and what is wrong with them. A node that misses its plugin is expanded in silence."""
    nodes = {node.name: node.op_type for node in proto.graph.node if node.domain == DOMAIN}
    found: Counter[str] = Counter()
    problems = []
    for layer in layers:
        if layer.type.name != "PLUGIN_V3":
            continue
        plugin = _plugin_of(trt, layer)
        name = plugin.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name
        found[name] += 1
        if nodes.get(layer.name) != name:
            problems.append(f"plugin layer `{layer.name}` is a {name}, the graph's node a {nodes.get(layer.name)}")
    in_graph = Counter(op for op in nodes.values() if op in plugin_ops)
    for op, count in expected_plugin_layers(bundle, plugin_ops).items():
        if found[op] != count or in_graph[op] != count:
            problems.append(f"{found[op]} plugin layers {op} from {in_graph[op]} nodes, expected {count}")
    problems += [f"{count} plugin layers {op}, expected none" for op, count in found.items() if op not in plugin_ops]
    return dict(sorted(found.items())), problems


def _plugin_of(trt: Any, layer: Any) -> Any:
    layer.__class__ = trt.IPluginV3Layer  # the bindings return the base class
    return layer.plugin


_TYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}


def _io_problems(network: Any, expected: Sequence[EngineTensor]) -> list[str]:
    tensors = [("input", network.get_input(index)) for index in range(network.num_inputs)]
    tensors += [("output", network.get_output(index)) for index in range(network.num_outputs)]
    got = [f"{kind} {t.name} {_TYPE_NAMES.get(t.dtype.name, t.dtype.name)} {list(t.shape)}" for kind, t in tensors]
    want = []
    for entry in expected:
        shape = [dim if isinstance(dim, int) else -1 for dim in entry.shape]
        want.append(f"{entry.kind} {entry.name} {entry.dtype} {shape}")
    return [f"unexpected {item}" for item in got if item not in want] + [
        f"missing {item}" for item in want if item not in got
    ]


# What may lie between a cache and its reader, or between ``past_length`` and the cache: TensorRT's parser casts,
# broadcasts, and multiplies query and key by the root of the scale.
_PASS_THROUGH = ("CAST", "ELEMENTWISE", "SHUFFLE")


# ... and what may stand between ``attention_mask`` and the mask of an attention: logic besides.
_MASK_LOGIC = (*_PASS_THROUGH, "CUMULATIVE", "UNARY", "SQUEEZE", "UNSQUEEZE")


def _tracer(layers: Sequence[Any], through: Collection[str]) -> Callable[[Any], set[str]]:
    """A function: tensor -> names of the tensor and of all it is computed from through layers of these types."""
    producers = {layer.get_output(slot).name: layer for layer in layers for slot in range(layer.num_outputs)}

    def sources(tensor: Any) -> set[str]:
        found: set[str] = set()
        pending = [tensor]
        while pending:
            current = pending.pop()
            if current is None or current.name in found:
                continue
            found.add(current.name)
            producer = producers.get(current.name)
            if producer is not None and producer.type.name in through:
                pending += [producer.get_input(slot) for slot in range(producer.num_inputs)]
        return found

    return sources


def _mask_problems(trt: Any, layers: Sequence[Any], bundle: Bundle, plugin_ops: Collection[str]) -> list[str]:
    """Every attention of a head without a cache is masked by ``attention_mask``."""
    sources = _tracer(layers, _MASK_LOGIC)
    problems = []
    if MASKED_ATTENTION in plugin_ops:
        masks = [
            layer.get_input(_ATTENTION_MASK)
            for layer in layers
            if layer.type.name == "PLUGIN_V3" and layer.num_inputs > _ATTENTION_MASK
        ]
    else:
        masks = []
        for index, layer in enumerate(item for item in layers if item.type.name == "ATTENTION_INPUT"):
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            masks.append(layer.attention.mask)
            if layer.attention.decomposable != may_decompose(bundle.dtype):
                problems.append(f"attention {index}: decomposable is {layer.attention.decomposable}")
    problems += [
        f"attention {index} is not masked by `attention_mask`"
        for index, mask in enumerate(masks)
        if mask is None or "attention_mask" not in sources(mask)
    ]
    missing = bundle.config.num_hidden_layers - len(masks)
    return [*problems, f"{missing} attentions have no mask"] if missing else problems


def _cache_problems(trt: Any, layers: Sequence[Any], bundle: Bundle, plugin_ops: Collection[str]) -> list[str]:
    """Every cache is updated in place from its own input at ``past_length``, and read by its own layer's attention."""
    sources = _tracer(layers, _PASS_THROUGH)
    if ATTENTION in plugin_ops:
        return _plugin_cache_problems(layers, bundle, sources)
    updates, attentions = {}, []
    for layer in layers:
        if layer.type.name == "KV_CACHE_UPDATE":
            updates[layer.get_output(0).name] = layer
        elif layer.type.name == "ATTENTION_INPUT":
            attentions.append(layer)
    problems = []
    for past, present in cache_names(bundle.config.num_hidden_layers):
        layer = updates.get(present)
        if layer is None:
            problems.append(f"`{present}` is not the output of a KV_CACHE_UPDATE layer")
            continue
        if layer.get_input(0).name != past:
            problems.append(f"`{present}` updates `{layer.get_input(0).name}`, expected `{past}`")
        if "past_length" not in sources(layer.get_input(2)):
            problems.append(f"`{present}` is not written at `past_length`")
    for index, layer in enumerate(attentions):
        if not {present_name(index, "key")} <= sources(layer.get_input(1)):
            problems.append(f"attention {index} does not read `{present_name(index, 'key')}`")
        if not {present_name(index, "value")} <= sources(layer.get_input(2)):
            problems.append(f"attention {index} does not read `{present_name(index, 'value')}`")
        layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
        # The parser drops `nonpad_kv_seqlen` and aligns `is_causal` to the wrong corner: only a mask says the truth.
        if layer.attention.mask is None:
            problems.append(f"attention {index} has no mask")
        if layer.attention.decomposable != may_decompose(bundle.dtype):
            problems.append(f"attention {index}: decomposable is {layer.attention.decomposable}")
    return problems


def _plugin_cache_problems(layers: Sequence[Any], bundle: Bundle, sources: Callable[[Any], set[str]]) -> list[str]:
    """The plugin attention of layer i reads and writes the caches of layer i, at ``past_length``."""
    writers = {
        layer.get_output(slot).name: (layer, slot)
        for layer in layers
        if layer.type.name == "PLUGIN_V3"
        for slot in range(layer.num_outputs)
    }
    inputs_of = {_PRESENT_KEY: _PAST_KEY, _PRESENT_VALUE: _PAST_VALUE}
    problems = []
    for index in range(bundle.config.num_hidden_layers):
        key, value = (writers.get(present_name(index, part), (None, None))[0] for part in ("key", "value"))
        if key is not value:
            problems.append(f"attention {index}: key and value are written by different layers")
    for past, present in cache_names(bundle.config.num_hidden_layers):
        layer, slot = writers.get(present, (None, None))
        wanted = _PRESENT_KEY if present.endswith(".key") else _PRESENT_VALUE
        if layer is None or slot != wanted or layer.num_inputs <= _PAST_LENGTH:
            problems.append(f"`{present}` is not output {wanted} of a {ATTENTION} plugin")
            continue
        if layer.get_input(inputs_of[slot]).name != past:
            problems.append(f"`{present}` updates `{layer.get_input(inputs_of[slot]).name}`, expected `{past}`")
        if "past_length" not in sources(layer.get_input(_PAST_LENGTH)):
            problems.append(f"`{present}` is not written at `past_length`")
    return problems
