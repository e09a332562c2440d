"""The oracle of every tensor: the reference model's own trace, run in float64 with the checkpoint's weights.

Role: what a graph is compared with, tensor by tensor. The trace is made anew from the reference model, here and now; it
shares with the exported graph neither the conversion to ONNX nor the evaluator. A stage of its own shows that it computes
what the reference computes.

Numerics: as :mod:`llama_export.parity.oracle.evaluator`: in float64 everything is float64 (RoPE's frequencies are the float32
ones, widened, and constants are float32 values, as in the graph); at 16 bits, what the model computes in float32 stays float32.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from llama_export.checkpoint.checkpoint import Checkpoint
from llama_export.config.llama import Task, float32_value
from llama_export.export.trace import trace_program
from llama_export.graph.io import INTERFACES
from llama_export.model.loading import read_tensor
from llama_export.model.rope import rope_buffers
from llama_export.ops.table import DOMAIN, OP_SPECS
from llama_export.parity.oracle.evaluator import evaluation_dtype
from llama_export.parity.oracle.lockstep import Step, lockstep

_ROPE = "model.rotary_emb."
_INNER: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "aten.linear.default": ("MatMul", lambda x, weight, bias=None: x @ weight.T),
    "aten.silu.default": ("Sigmoid", torch.sigmoid),
}
"""Operators of the trace that are two nodes of the graph -> the first node and what it computes."""
_SKIPPED = ("_assert_tensor_metadata", "promote_types")
"""Checks and type arithmetic of the tracer; no value depends on them."""


class ReferenceProgram:
    """The traced reference of a checkpoint.

    Args:
        checkpoint: its weights are memory-mapped and converted one at a time.
        task: whose head.
        dtype: the bundle's; the trace holds the casts it implies.
    """

    def __init__(self, checkpoint: Checkpoint, task: Task, dtype: str) -> None:
        self._checkpoint = checkpoint
        config = checkpoint.config
        program = trace_program(config, dtype, task)
        signature = program.graph_signature
        self._constants = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._buffers = rope_buffers(config)
        interface = INTERFACES[task]
        self.outputs = interface.output_names(config)
        """Names of the results, as the graph's."""
        self._nodes = [node for node in program.graph.nodes if node.op == "call_function" and not _is_skipped(node)]
        placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        self._inputs = dict(
            zip(
                [name for name in placeholders if name not in self._constants],
                interface.input_names(config),
                strict=True,
            )
        )
        (end,) = (node for node in program.graph.nodes if node.op == "output")
        self._results = dict(zip((node.name for node in end.args[0]), self.outputs, strict=True))

    def stream(
        self, calls: Sequence[Mapping[str, Tensor]], carry: Mapping[str, str], dtype: torch.dtype
    ) -> Iterator[tuple[str, list[Any]]]:
        """Runs several calls together at a precision.

        Args:
            calls, carry: as for :meth:`llama_export.parity.oracle.evaluator.GraphEvaluator.stream`.
            dtype: float64, float32, float16 or bfloat16.

        Yields:
            (name of the value in the trace, or of the result in the graph; its value in every call).
        """
        steps = [self._step(node, dtype) for node in self._nodes]

        def constant(name: str, _: Step) -> Tensor:
            return self._constant(self._constants[name], dtype)

        return lockstep(steps, calls, carry=carry, constant=constant, outputs=self.outputs)

    def _constant(self, name: str, dtype: torch.dtype) -> Tensor:
        if name.startswith(_ROPE):
            return self._buffers[name.removeprefix(_ROPE)].to(evaluation_dtype(torch.float32, dtype))
        if name == "lm_head.weight" and self._checkpoint.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        return read_tensor(self._checkpoint.folder, self._checkpoint.tensors[name]).to(dtype)

    def _name(self, node: fx.Node) -> str:
        """A value's name here: that of the graph for inputs and results, else the tracer's."""
        return self._results.get(node.name) or self._inputs.get(node.name) or node.name

    def _step(self, node: fx.Node, dtype: torch.dtype) -> Step:
        read, inner = node.all_input_nodes, _inner(node)

        def compute(values: list[Any]) -> Sequence[Any]:
            known = dict(zip(read, values, strict=True))
            arguments = fx.map_arg((node.args, node.kwargs), lambda item: known[item])
            positional, named = _on_cpu(arguments, dtype)
            first = (inner[1](*positional),) if inner else ()
            return (*first, node.target(*positional, **named))  # type: ignore[operator]

        name = self._name(node)
        written = (f"{name}/inner", name) if inner else (name,)
        return Step(node.name, tuple(self._name(item) for item in read), written, compute)

    def names_in(self, graph: onnx.GraphProto) -> dict[str, str]:
        """Value name here -> tensor name in an exported graph.

        The export names a tensor after its module and what the tracer calls the result; the second ``linear`` of a module
        is ``MODULE/linear.1``. Graph outputs have their own names. Tensors that the conversion to ONNX added (named after
        their node) have no counterpart and are left out.
        """
        seen: Counter[str] = Counter()
        found = {}
        for node in self._nodes:
            label = _label(node)
            if label is not None and node.name not in self._results:
                name = f"{_module(node)}/{label}"
                found[node.name] = f"{name}.{seen[name]}" if seen[name] else name
                seen[name] += 1
        makers = {name: node for node in graph.node for name in node.output}
        for node in self._nodes:
            inner, outer = _inner(node), makers.get(found.get(node.name, self._name(node)))
            if inner and outer:
                read = [name for name in outer.input if name in makers]
                found |= {f"{self._name(node)}/inner": name for name in read if makers[name].op_type == inner[0]}
        found |= {name: name for name in self.outputs}
        return {ours: theirs for ours, theirs in found.items() if theirs in makers}


def _inner(node: fx.Node) -> tuple[str, Callable[..., Tensor]] | None:
    """The first of the two graph nodes that one traced operator becomes."""
    if str(node.target) == "aten.linear.default" and len(node.args) < 3:
        return None  # without a bias the product is the result
    return _INNER.get(str(node.target))


def _is_skipped(node: fx.Node) -> bool:
    return any(part in str(node.target) for part in _SKIPPED)


def _on_cpu(arguments: Any, dtype: torch.dtype) -> Any:
    """The tracer's arguments: on the CPU instead of the meta device, floats at the evaluation's dtype."""
    if isinstance(arguments, torch.device):
        return torch.device("cpu")
    if isinstance(arguments, torch.dtype) and arguments.is_floating_point:
        return evaluation_dtype(arguments, dtype)
    if isinstance(arguments, float):
        return float32_value(arguments)  # what a constant of the graph holds
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_on_cpu(item, dtype) for item in arguments)
    if isinstance(arguments, dict):
        return {key: _on_cpu(item, dtype) for key, item in arguments.items()}
    return arguments


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1] if paths else "model"


def _label(node: fx.Node) -> str | None:
    """What a traced value is called after its module: the tracer's word, or the name of our op's output.

    None for the results of an op taken together, which the trace then takes apart.
    """
    taken_apart = node.target is operator.getitem
    maker, slot = (node.args[0], node.args[1]) if taken_apart else (node, 0)
    spec = _SPECS.get(str(getattr(maker, "target", "")))
    if spec is not None:
        return spec.outputs[int(slot)].name if taken_apart or len(spec.outputs) == 1 else None  # type: ignore[arg-type]
    word = re.sub(r"_\d+$", "", node.name)
    return {"to": "_to_copy"}.get(word, word)


_SPECS = {f"{DOMAIN}.{spec.torch_name}.default": spec for spec in OP_SPECS.values()}
"""The tracer's name of our ops -> what they are."""
