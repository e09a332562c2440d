"""A graph of two decoder layers -> the graph of any number: the last layer repeated, node for node what a full trace gives.

Role: tracing and converting 126 layers takes half a minute and two layers take a second, and from the second on every
layer is the same but for its number. The first is not: no residual sum precedes its norm, and constants that the
converter makes once and shares lie in it. Tests export models of all heads, RoPE types, activations and dtypes
both ways and compare the files byte by byte.

Names carry the numbers: ``model.layers.1.`` in nodes and tensors, ``past_key_values.1.`` and ``present.1.`` in inputs
and outputs. Repeating layer k as layer i adds i - k to the numbers k and k - 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir as ir

TRACED_LAYERS = 2
"""Layers of a trace that is to be repeated: the first, and one like all others."""
_LAYER = re.compile(r"^(model\.layers|past_key_values|present)\.(\d+)\.")


def repeat_last_layer(model: ir.Model, num_layers: int) -> ir.Model:
    """The same model with ``num_layers`` layers.

    Args:
        model: two layers or more, everything named after its module; not modified.
        num_layers: at least as many as ``model`` has.
    """
    model = model.clone()
    graph = model.graph
    nodes = list(graph)
    numbers = [_layer_of(node.name) for node in nodes]
    last = max(number for number in numbers if number is not None)
    first_place, last_place = numbers.index(last), len(numbers) - 1 - numbers[::-1].index(last)
    body, tail = nodes[first_place : last_place + 1], nodes[last_place + 1 :]

    initializers, inputs = list(graph.initializers.values()), list(graph.inputs)
    values: dict[str | None, ir.Value] = {value.name: value for node in body for value in node.outputs}
    """Name -> value, of everything in the last layer and its twins that another layer may read."""
    new_initializers: list[ir.Value] = []
    after = body[-1]
    for layer in range(last + 1, num_layers):
        step = layer - last
        made = [_twin(value, step) for value in _of_layer(initializers, last)]
        new_initializers += made
        fed = [_twin(value, step) for value in _of_layer(inputs, last)]
        graph.inputs.extend(fed)
        values |= {value.name: value for value in (*made, *fed)}
        for node in body:
            sources = [_source(value, last, step, values) for value in node.inputs]
            outputs = [_twin(value, step) for value in node.outputs]
            values |= {value.name: value for value in outputs}
            attributes = list(node.attributes.values())
            name = _shifted(str(node.name), step)
            twin = ir.Node(node.domain, node.op_type, sources, attributes, outputs=outputs, name=name)
            graph.insert_after(after, twin)
            after = twin
    for node in tail:
        for slot, value in enumerate(node.inputs):
            if value is not None and _layer_of(value.name) == last:
                node.replace_input_with(slot, _source(value, last, num_layers - 1 - last, values))
    graph.outputs.extend(
        values[_shifted(str(value.name), layer - last)]
        for layer in range(last + 1, num_layers)
        for value in _of_layer(list(graph.outputs), last)
    )
    # In the order of the model's parameters, as a trace has them.
    end = 1 + max(place for place, value in enumerate(initializers) if _layer_of(value.name) == last)
    graph.initializers.clear()
    for value in (*initializers[:end], *new_initializers, *initializers[end:]):
        graph.initializers[str(value.name)] = value
    return model


def _layer_of(name: str | None) -> int | None:
    match = _LAYER.match(name or "")
    return None if match is None else int(match[2])


def _of_layer(values: Iterable[ir.Value], layer: int) -> list[ir.Value]:
    return [value for value in values if _layer_of(value.name) == layer]


def _shifted(name: str, step: int) -> str:
    """The name with ``step`` added to its layer's number."""
    return _LAYER.sub(lambda match: f"{match[1]}.{int(match[2]) + step}.", name)


def _twin(value: ir.Value, step: int) -> ir.Value:
    shape = None if value.shape is None else value.shape.copy()
    name = _shifted(str(value.name), step)
    twin = ir.Value(name=name, type=value.type, shape=shape)
    twin.const_value = value.const_value
    return twin


def _source(value: ir.Value | None, last: int, step: int, values: dict[str | None, ir.Value]) -> ir.Value | None:
    """What the twin of a reader of ``value`` reads: the value of its own layer, or of the one before it.

    A value of the layer before that has no twin is a constant that all layers share.
    """
    if value is None:
        return None
    layer, name = _layer_of(value.name), _shifted(str(value.name), step)
    if layer == last:
        return values[name]
    return values.get(name, value) if layer == last - 1 else value
