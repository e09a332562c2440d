"""Where an artefact of a causal LM goes wrong: the layer by prefixes of the model, then the operation, alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_export.errors import LlamaExportError
from llama_export.parity.calls import Answers, Call, Rows, Run, carried, graph_inputs
from llama_export.parity.judge import FLOAT64_LIMIT
from llama_export.parity.locate.case import Runtime, segments
from llama_export.parity.locate.locate import place
from llama_export.parity.locate.prefix import first_layers
from llama_export.parity.locate.search import Culprit, Inputs, OperationSearch, first_failing_layer, suspects
from llama_export.parity.oracle.evaluator import GraphEvaluator, layer_of
from llama_export.parity.stages.causal_validator import CausalValidator

Artefact = Callable[[CausalValidator, Rows], Answers]
"""(what shares a bundle, the whole one or a prefix; rows) -> what its artefact makes of them."""


def layer_of_artefact(v: CausalValidator, artefact: Artefact, rows: Rows, dtype: torch.dtype) -> int:
    """The layer that makes a compiled artefact wrong, by prefixes."""

    def passes(count: int) -> bool:
        with first_layers(v.bundle, count, checkpoint=v.checkpoint) as bundle:
            return is_right(v.of_prefix(bundle), artefact, rows, dtype)

    return first_failing_layer(passes, v.llama.num_hidden_layers)


def is_right(v: CausalValidator, artefact: Artefact, rows: Rows, dtype: torch.dtype) -> bool:
    """Whether an artefact is inside the noise floor; one that cannot even be run is not."""
    try:
        return all(item.share <= 1 for item in v.measured(artefact(v, rows), rows, dtype))
    except (LlamaExportError, ValueError):
        return False


def operation_search(
    v: CausalValidator,
    graph: GraphEvaluator,
    calls: Sequence[Call],
    capacity: int,
    *,
    runtime: Runtime,
    dtype: torch.dtype,
    custom_ops: str,
    limit: float | None = None,
) -> tuple[OperationSearch, list[str], Inputs]:
    """The search in one graph; with the tensors that the oracle knows, and the graph's inputs."""
    names = v.program.names_in(graph.graph)

    def inputs(at: torch.dtype) -> list[dict[str, Tensor]]:
        return graph_inputs([Run(calls, capacity)], v.llama, at)

    def oracle(at: torch.dtype) -> Iterable[tuple[str, list[Any]]]:
        stream = v.program.stream(inputs(at), carried(v.llama), at)
        return ((names[name], values) for name, values in stream if name in names)

    search = OperationSearch(
        model=graph.model, folder=graph.folder, carry=carried(v.llama), oracle=oracle,
        runtime=runtime, dtype=dtype, custom_ops=custom_ops, limit=limit,
    )  # fmt: skip
    return search, list(names.values()), inputs(dtype)


def onnxruntime_divergence(v: CausalValidator, artefact: Artefact, stage: str) -> dict[str, Any]:
    """Where onnxruntime's results leave the noise floor: layer, op, and whether the untouched file shows it again."""
    rows, dtype = v.rows, torch.float32
    layer = layer_of_artefact(v, artefact, rows, dtype)
    graph = GraphEvaluator(v.bundle.onnxruntime_path)
    calls = rows.calls()
    search, known, inputs = operation_search(
        v, graph, calls, rows.longest, runtime="onnxruntime", dtype=dtype, custom_ops="bodies"
    )
    culprit = search.culprit(suspects(graph.graph, known, layer), inputs, _tried(rows))
    found = None if culprit is None else _named(v, search, culprit, calls, stage)
    return _confirmed(v, artefact, rows, dtype, layer, found)


def engine_divergence(
    v: CausalValidator, artefact: Artefact, rows: Rows, dtype: torch.dtype, plugin_ops: Collection[str], stage: str
) -> dict[str, Any]:
    """Where an engine's results leave the noise floor: the layer by engines of the first layers, the op if it is a plugin's.

    An operation that is TensorRT's own exists in the engine alone, fused with its neighbours.
    """
    layer = layer_of_artefact(v, artefact, rows, dtype)
    found = None
    if plugin_ops:
        graph = GraphEvaluator(v.bundle.model_path, dtype=dtype)
        found = evaluator_divergence(v, graph, rows, dtype, "gpu", [layer], stage, only=plugin_ops)
    return _confirmed(v, artefact, rows, dtype, layer, found)


def _confirmed(
    v: CausalValidator, artefact: Artefact, rows: Rows, dtype: torch.dtype, layer: int, found: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What was found in a copy, or the bare layer; and whether the untouched artefact, run once more, is wrong again."""
    place = found or {"layer": layer, "op": None, "node": None, "tensor": None}
    return {**place, "confirmed": "no: the next run was right" if is_right(v, artefact, rows, dtype) else "yes"}


def evaluator_divergence(
    v: CausalValidator,
    graph: GraphEvaluator,
    rows: Rows,
    dtype: torch.dtype,
    custom_ops: str,
    layers: Collection[int],
    stage: str,
    only: Collection[str] = (),
) -> dict[str, Any] | None:
    """Where an evaluation at a dtype leaves the noise floor: every operation of these layers, and those outside, alone.

    Args:
        only: op types; default: all.
    """
    calls = rows.calls()
    search, known, inputs = operation_search(
        v, graph, calls, rows.longest, runtime="evaluator", dtype=dtype, custom_ops=custom_ops
    )
    candidates = [
        item
        for item in segments(graph.graph, known)
        if layer_of(item.node.name) in (*layers, None) and (not only or item.node.op_type in only)
    ]
    culprit = search.culprit(candidates, inputs, _tried(rows))
    return None if culprit is None else _named(v, search, culprit, calls, stage)


def graph_case(
    v: CausalValidator, graph: GraphEvaluator, calls: Sequence[Call], custom_ops: str, tensor: str, stage: str
) -> dict[str, str]:
    """Saves the operation of a graph that computes a tensor wrongly in float64; gives the command that runs it again."""
    if v.config.cases is None:
        return {}
    search, known, inputs = operation_search(
        v, graph, calls, v.capacity, runtime="evaluator", dtype=torch.float64, custom_ops=custom_ops, limit=FLOAT64_LIMIT
    )  # fmt: skip
    candidates = [item for item in segments(graph.graph, known) if tensor in item.outputs]
    culprit = search.culprit(candidates, inputs, range(len(calls)))
    return {} if culprit is None else saved(v.config.cases, search, culprit, stage, calls[culprit.call].label)


def _tried(rows: Rows) -> list[int]:
    """The prefill and the last step."""
    return sorted({0, rows.steps})


def _named(
    v: CausalValidator, search: OperationSearch, culprit: Culprit, calls: Sequence[Call], stage: str
) -> dict[str, Any]:
    call = calls[culprit.call].label
    found = place(culprit.segment.node, culprit.tensor) | {"error": culprit.found.relative}
    return found | saved(v.config.cases, search, culprit, stage, call)


def saved(cases: Path | None, search: OperationSearch, culprit: Culprit, stage: str, call: str) -> dict[str, str]:
    """Writes the operation into the folder for cases, if there is one, and gives the command that runs it again."""
    if cases is None:
        return {}
    folder = cases / stage.replace("/", "-")
    search.save(culprit, folder, stage, call)
    return {"reproduce": shlex.join(["llama-export", "reproduce", str(folder)])}
