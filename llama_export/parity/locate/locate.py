"""Names the place where a graph first departs from the oracle: layer, op, tensor.

Both run over the same calls at once, operation by operation; a tensor is compared as soon as both sides have it, and then
dropped, so a model of any size costs a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch

from llama_export.ops.table import OP_SPECS
from llama_export.parity.oracle.evaluator import layer_of

Values = Iterable[tuple[str, list[Any]]]
"""(tensor name, its value in every call), in order of execution."""


def tensor_errors(
    graph: Values, oracle: Values, names: Mapping[str, str]
) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Pairs the two runs: (tensor of the graph, its values, the oracle's), in the graph's order.

    Args:
        names: the oracle's name -> the graph's, for what both have.
    """
    source = ((names[name], values) for name, values in oracle if name in names)
    shared, waiting = set(names.values()), {}
    for name, got in graph:
        if name not in shared:
            continue
        while name not in waiting:
            arrived, values = next(source)
            waiting[arrived] = values
        yield name, got, waiting.pop(name)
    for _ in source:  # an oracle that is not run to its end has no result
        pass


@dataclass
class Trace:
    """What a comparison tensor by tensor saw."""

    graph: onnx.GraphProto
    limit: Callable[[str], float]
    """Tensor -> the largest relative error that is not a divergence."""
    errors: dict[str, float] = field(default_factory=dict)
    """Tensor -> largest error over the calls, as a share of the tensor's largest value."""

    def add(self, name: str, got: list[Any], want: list[Any]) -> None:
        """Compares one tensor over all calls."""
        self.errors[name] = relative_error(got, want)

    @property
    def per_layer(self) -> list[float]:
        """The largest error of each decoder layer's tensors."""
        layers: dict[int, float] = {}
        for node in self.graph.node:
            layer = layer_of(node.name)
            if layer is not None:
                known = [self.errors.get(name, 0.0) for name in node.output]
                layers[layer] = max(layers.get(layer, 0.0), *known, 0.0)
        return [layers[layer] for layer in sorted(layers)]

    @property
    def first_divergence(self) -> dict[str, Any] | None:
        """The first tensor beyond its limit, and the node that computes it."""
        for node in self.graph.node:
            for name in node.output:
                if not self.errors.get(name, 0.0) <= self.limit(name):
                    return place(node, name) | {"error": self.errors[name]}
        return None


def place(node: onnx.NodeProto, tensor: str) -> dict[str, Any]:
    """Layer, op and node of a tensor; an op whose body stands in the graph is that op."""
    parts = [part.partition(".")[0] for part in node.name.split("/")[1:]]
    op = next((part for part in parts if part in OP_SPECS), node.op_type)
    return {"layer": layer_of(node.name), "op": op, "node": node.name, "tensor": tensor}


def relative_error(got: list[Any], want: list[Any]) -> float:
    """Largest difference over the calls as a share of the largest wanted magnitude; infinite for NaN on one side only."""
    error = scale = 0.0
    for left, right in zip(got, want, strict=True):
        if not isinstance(right, torch.Tensor):
            left, right = torch.as_tensor(left), torch.as_tensor(right)
        if left.shape != right.shape:
            return float("inf")
        if right.numel() == 0:
            continue
        left, right = left.double(), right.double()
        finite = torch.isfinite(right)
        if bool((torch.isfinite(left) != finite).any()):
            return float("inf")
        error = max(error, float(torch.where(finite, (left - right).abs(), 0.0).max()))
        scale = max(scale, float(torch.where(finite, right.abs(), 0.0).max()))
    if error == 0:
        return 0.0
    return error / scale if scale else float("inf")
