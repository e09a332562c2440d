"""Finds the operation that makes an artefact wrong at a dtype, where float64 shows nothing: in its kernels, its fusions.

First the layer, by bisection: the first k layers are a model of their own (:mod:`llama_export.parity.locate.prefix`), judged as the
whole is. Inside a layer nothing is observed, so that nothing is computed otherwise than in the artefact. Then the operation:
each of the layer's is run alone (:mod:`llama_export.parity.locate.case`) on the oracle's inputs, and must give the oracle's
output. The first that does not is named and saved. Last, the untouched artefact is run once more: what was found must be
there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from llama_export.parity.judge import NOISE_L2, NOISE_MAX
from llama_export.parity.locate.case import (
    Case,
    Runtime,
    Segment,
    SegmentRunner,
    custom_ops_named,
    save_case,
    segment_model,
    segments,
    within,
)
from llama_export.parity.locate.locate import place
from llama_export.parity.metrics import Difference, difference
from llama_export.parity.oracle.evaluator import layer_of
from llama_export.parity.tensors import to_numpy

Inputs = Sequence[Mapping[str, Tensor]]
"""Graph inputs, per call; of the cache, those of the first call alone."""
Stream = Callable[[torch.dtype], Iterable[tuple[str, list[Any]]]]
"""Dtype -> the oracle's (tensor of the graph, value per call), in order."""


def first_failing_layer(passes: Callable[[int], bool], num_layers: int) -> int:
    """Index of the layer that makes the model wrong, by bisection; the whole is known to be wrong.

    Args:
        passes: whether the model of the first k layers is right, 1 <= k < ``num_layers``.
    """
    right, wrong = 0, num_layers
    while wrong - right > 1:
        middle = (right + wrong) // 2
        right, wrong = (middle, wrong) if passes(middle) else (right, middle)
    return wrong - 1


def suspects(graph: onnx.GraphProto, known: Collection[str], layer: int) -> list[Segment]:
    """The operations of a layer; of the first one also those outside the layers, which every prefix has."""
    layers = {layer, None} if layer == 0 else {layer}
    return [segment for segment in segments(graph, known) if layer_of(segment.node.name) in layers]


@dataclass(frozen=True, slots=True)
class Culprit:
    """An operation that is wrong on the oracle's own inputs."""

    segment: Segment
    tensor: str
    call: int
    inputs: Mapping[str, Tensor]
    want: Tensor
    """The oracle's, float64."""
    found: Difference
    limits: tuple[float, float]
    """Relative L2, and the maximum as a share of the largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationSearch:
    """Runs operations of one graph alone.

    Limits are those of every artefact: at most 2 x (relative L2) and 4 x (maximum) what the reference's own trace loses at
    the dtype on its way to the tensor; in float64, ``limit``.
    """

    model: onnx.ModelProto
    folder: Path
    """Where its weights lie."""
    carry: Mapping[str, str]
    """Cache input -> the tensor of the call before that it is."""
    oracle: Stream
    runtime: Runtime
    dtype: torch.dtype
    custom_ops: str = "bodies"
    """See :func:`llama_export.parity.locate.case.custom_ops_named`."""
    limit: float | None = None
    """In place of the noise floor."""

    def culprit(self, candidates: Sequence[Segment], inputs: Inputs, calls: Sequence[int]) -> Culprit | None:
        """The first of the candidates whose result is wrong.

        Args:
            calls: indices of the calls tried.
        """
        wanted = {name for segment in candidates for name in (*segment.inputs, *segment.outputs)}
        wanted |= {self.carry[name] for name in wanted if name in self.carry}
        exact = {name: values for name, values in self.oracle(torch.float64) if name in wanted}
        rounded = exact
        if self.dtype != torch.float64:
            rounded = {name: values for name, values in self.oracle(self.dtype) if name in wanted}

        def value(values: Mapping[str, list[Any]], name: str, call: int) -> Any:
            if name in self.carry and call:
                name, call = self.carry[name], call - 1
            return values[name][call] if name in values else inputs[call][name]

        for segment in candidates:
            runner: SegmentRunner | None = None
            for call in calls:
                # The oracle's value, in the type that it has at this dtype.
                feeds = {
                    name: _tensor(value(exact, name, call)).to(_tensor(value(rounded, name, call)).dtype)
                    for name in segment.inputs
                }
                runner = runner or SegmentRunner(
                    segment_model(self.model, segment, feeds), runtime=self.runtime, dtype=self.dtype,
                    custom_ops=custom_ops_named(self.custom_ops), folder=self.folder,
                )  # fmt: skip
                got = runner.run(feeds)
                for name in segment.outputs:
                    want, limits = exact[name][call], self._limits(name, exact[name], rounded[name], call)
                    found = _compared(name, got[name], want)
                    if not within(found, *limits):
                        return Culprit(segment, name, call, feeds, want, found, limits)
        return None

    def _limits(self, name: str, exact: list[Any], rounded: list[Any], call: int) -> tuple[float, float]:
        """Noise of this call or of all, whichever is larger: a few values can be exact by chance."""
        if self.limit is not None:
            return self.limit, self.limit
        both = list(zip(rounded, exact, strict=True))
        pairs = [(name, to_numpy(left), to_numpy(right)) for left, right in both if left.numel()]
        here, everywhere = _compared(name, *both[call]), difference(pairs)
        least = (
            torch.finfo(self.dtype).eps / 8
        )  # where the reference happens to be exact, half a unit is still rounding
        return (
            NOISE_L2 * max(here.relative_l2, everywhere.relative_l2, least),
            NOISE_MAX * max(here.relative, everywhere.relative, least),
        )

    def save(self, culprit: Culprit, folder: Path, stage: str, call: str) -> None:
        """Writes the operation and its inputs; see :func:`llama_export.parity.locate.case.save_case`."""
        where = place(culprit.segment.node, culprit.tensor)
        case = Case(
            stage=stage, call=call, layer=where["layer"], op=where["op"], node=where["node"], tensor=culprit.tensor,
            runtime=self.runtime, dtype=_name(self.dtype), custom_ops=self.custom_ops,
            inputs={name: _name(tensor.dtype) for name, tensor in culprit.inputs.items()},
            limit_relative_l2=culprit.limits[0], limit_relative_max=culprit.limits[1],
        )  # fmt: skip
        model = segment_model(self.model, culprit.segment, culprit.inputs)
        save_case(folder, case, model, self.folder, culprit.inputs, culprit.want)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _compared(name: str, got: Tensor, want: Any) -> Difference:
    return difference([(name, to_numpy(got), to_numpy(_tensor(want)))])


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
