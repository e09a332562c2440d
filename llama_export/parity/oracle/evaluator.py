"""Runs an exported graph node by node in PyTorch: any float dtype, every tensor observable, weights memory-mapped.

Role: the judge of the *graph*. It executes ``model.onnx`` as written, so a fault of the exporter shows; and it does so
in float64, so the fault shows whatever its size. Custom ops run by their own eager maths, by the function bodies stored
in the file, or by functions the caller supplies.

Fails closed: an operator, an attribute or an input this module does not implement is an error that names the node.

Numerics:
    At ``dtype=None`` every value has the type the file declares. With a wider ``dtype`` all floats have that type. With
    a 16-bit ``dtype`` the weights and the KV cache have it, and what the graph explicitly computes in float32 (RoPE's
    angles, norms, softmax) stays float32. Operators that ONNX defines with a float32 interior (RMSNormalization,
    Attention's softmax) accumulate in at least float32 and round once.

Source: operator definitions at https://onnx.ai/onnx/operators/, opset 24.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor

from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.errors import ExportError
from llama_export.export.embedded import ROTARY
from llama_export.model.loading import read_tensor
from llama_export.ops.table import DOMAIN, OP_SPECS
from llama_export.ops.torch_ops import EAGER
from llama_export.parity.oracle.lockstep import Step, lockstep
from llama_export.parity.oracle.operators import (
    FLOATS,
    ONNXRUNTIME_OPERATORS,
    OPERATORS,
    SIXTEEN_BIT,
    constant_value,
    present_tensor,
)

CustomOps = Literal["eager", "bodies"] | Mapping[str, Callable[..., Any]]
Observer = Callable[[str, Tensor], None]
_OTHERS = {
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.BOOL: torch.bool,
}
_EDITED = "this graph is not as `llama-export export` writes it, or is damaged: export again"
_KEEP_BYTES = 512 << 20
"""Converted weights up to this many bytes stay in memory between runs; beyond it they are read again for each use."""


class GraphEvaluator:
    """One graph at one precision.

    Args:
        model: an ONNX file whose external data lies beside it, or a model in memory.
        folder: where the external data of a model in memory lies.
        dtype: float64, float32, float16 or bfloat16; None keeps the declared types.
        custom_ops: how nodes of our domain are computed: ``eager``, ``bodies``, or op_type -> function of the node's
            input tensors and attribute values, in the order of the op table.
        custom_layers: the decoder layers whose custom ops the functions compute, those of the others being eager; None:
            all. Ops outside the layers count as one of them.
        convert_inputs: floats that are fed become ``dtype``; else they have the type they are to have.
    """

    def __init__(
        self,
        model: Path | onnx.ModelProto,
        *,
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
        custom_ops: CustomOps = "eager",
        custom_layers: Collection[int] | None = None,
        convert_inputs: bool = True,
    ) -> None:
        if isinstance(model, Path):
            folder, model = model.parent, onnx.load(str(model), load_external_data=False)
        self._folder = folder or Path()
        self._model = model
        self._custom_layers = custom_layers
        self._graph = model.graph
        self._functions = {function.name: function for function in model.functions if function.domain == DOMAIN}
        self._custom_ops = custom_ops
        self._dtype = dtype
        self._initializers = {item.name: item for item in self._graph.initializer}
        self._outputs = [value.name for value in self._graph.output]
        self._kept: dict[str, Tensor] = {}
        self._kept_bytes = 0
        self._float_inputs = {
            value.name: FLOATS[value.type.tensor_type.elem_type]
            for value in self._graph.input
            if convert_inputs and value.type.tensor_type.elem_type in FLOATS
        }

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the KV cache and the weights in this evaluation."""
        return self._dtype or next(iter(self._float_inputs.values()), None) or self._declared_dtype()

    def run_op(self, node: onnx.NodeProto, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One custom op of this graph, computed as in a run, on inputs of the caller's."""
        return self._evaluate(node, list(inputs), None)

    @property
    def model(self) -> onnx.ModelProto:
        """What is evaluated, its functions included."""
        return self._model

    @property
    def folder(self) -> Path:
        """Where its external data lies."""
        return self._folder

    @property
    def graph(self) -> onnx.GraphProto:
        """What is evaluated."""
        return self._graph

    def _declared_dtype(self) -> torch.dtype:
        """Of a graph without a cache: what its first custom op returns."""
        (first, *_) = (node.output[0] for node in self._graph.node if node.domain == DOMAIN)
        (dtype,) = (FLOATS[item.type.tensor_type.elem_type] for item in self._graph.value_info if item.name == first)
        return dtype

    def run(self, feeds: Mapping[str, Tensor], observe: Observer | None = None) -> dict[str, Tensor]:
        """Evaluates the graph.

        Args:
            feeds: graph input -> tensor; floats are converted to the evaluation's dtype.
            observe: called with (tensor name, value) for every node output, in order; inside function bodies the name
                is ``node name/tensor name``.

        Returns:
            graph output -> tensor.

        Raises:
            ExportError: an input is missing, or a node uses something this evaluator does not implement.
        """
        found: dict[str, Tensor] = {}
        for name, (value,) in self._stream([feeds], {}, self._outputs, observe):
            if name in self._outputs:
                found[name] = value
        return {name: found[name] if name in found else feeds[name] for name in self._outputs}

    def stream(
        self, calls: Sequence[Mapping[str, Tensor]], carry: Mapping[str, str] | None = None, only: Sequence[str] = ()
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Evaluates several calls together, node by node: see :mod:`llama_export.parity.oracle.lockstep`.

        Args:
            calls: graph inputs, per call; what ``carry`` names is given to those that begin a run of calls.
            carry: graph input -> the graph output of the call before that it is.
            only: compute no more than these tensors need, and ask for no input they do not read; default: everything.

        Yields:
            (tensor name, its value in every call) for every node output, in the graph's order.

        Raises:
            ExportError: see :meth:`run`.
        """
        return self._stream(calls, carry or {}, only or self._outputs, None, bool(only))

    def _stream(
        self,
        calls: Sequence[Mapping[str, Tensor]],
        carry: Mapping[str, str],
        wanted: Sequence[str],
        observe: Observer | None,
        only_wanted: bool = False,
    ) -> Iterator[tuple[str, list[Tensor]]]:
        nodes = list(self._graph.node)
        if only_wanted:
            nodes = needed_nodes(nodes, wanted)
        read = {name for node in nodes for name in node.input}
        inputs = [value.name for value in self._graph.input if not only_wanted or value.name in read]
        for number, feeds in enumerate(calls):
            if missing := [name for name in inputs if name not in feeds and not (number and name in carry)]:
                raise ExportError(
                    "the evaluator lacks graph inputs",
                    details={"missing": ", ".join(missing)},
                    hint="feed every graph input",
                )
        converted = [
            {
                name: tensor.to(self.model_dtype) if name in self._float_inputs else tensor
                for name, tensor in feeds.items()
            }
            for feeds in calls
        ]
        steps = [self._step(node, observe) for node in nodes]
        return lockstep(steps, converted, carry=carry, constant=self._initializer, outputs=wanted)

    def _step(self, node: onnx.NodeProto, observe: Observer | None) -> Step:
        def compute(inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
            results = self._evaluate(node, inputs, observe)
            if observe is not None:
                for name, result in zip(node.output, results, strict=True):
                    if name:
                        observe(name, result)
            return results

        return Step(node.name, tuple(node.input), tuple(node.output), compute)

    def _initializer(self, name: str, reader: Step) -> Tensor:
        if name not in self._initializers:
            raise ExportError(
                f"the graph reads `{name}` before anything defines it", details={"node": reader.name}, hint=_EDITED
            )
        return self._weight(name)

    def _weight(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self._read_initializer(self._initializers[name])
        if self._kept_bytes + tensor.nbytes <= _KEEP_BYTES:
            self._kept[name] = tensor
            self._kept_bytes += tensor.nbytes
        return tensor

    def _read_initializer(self, item: onnx.TensorProto) -> Tensor:
        if item.data_location != onnx.TensorProto.EXTERNAL:
            if item.data_type in FLOATS and item.raw_data and not item.name.startswith(ROTARY):
                weight = torch.frombuffer(bytearray(item.raw_data), dtype=FLOATS[item.data_type]).reshape(*item.dims)
                return weight if self._dtype is None else weight.to(self._dtype)
            array = onnx.numpy_helper.to_array(item)
            if item.data_type not in FLOATS:
                return torch.from_numpy(array.copy())
            declared = FLOATS[item.data_type]  # NumPy's bfloat16 is none of PyTorch's
            return torch.from_numpy(array.astype(np.float64)).to(declared).to(self._float(declared))
        place = {entry.key: entry.value for entry in item.external_data}
        dtype = FLOATS[item.data_type]
        entry = TensorEntry(
            item.name,
            str(dtype).removeprefix("torch."),
            tuple(item.dims),
            place["location"],
            int(place["offset"]),
            int(place["length"]),
        )
        stored = read_tensor(self._folder, entry)
        return stored if self._dtype is None else stored.to(self._dtype)

    def _float(self, declared: torch.dtype) -> torch.dtype:
        return evaluation_dtype(declared, self._dtype)

    def _evaluate(
        self, node: onnx.NodeProto, inputs: list[Tensor | None], observe: Observer | None
    ) -> tuple[Tensor, ...]:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        try:
            if node.domain == DOMAIN:
                result = self._evaluate_custom(node, inputs, attributes, observe)
            elif node.op_type in ("Cast", "CastLike"):
                result = self._cast(node, inputs, **attributes)
            elif node.domain == "" and node.op_type == "Constant":
                value = constant_value(**attributes)
                result = value.to(self._float(value.dtype)) if value.is_floating_point() else value
            elif node.domain == "" and node.op_type in OPERATORS:
                result = OPERATORS[node.op_type](*inputs, **attributes)
            elif node.domain == "com.microsoft" and node.op_type in ONNXRUNTIME_OPERATORS:
                result = ONNXRUNTIME_OPERATORS[node.op_type](*inputs, **attributes)
            else:
                raise ExportError(
                    f"the evaluator does not implement {node.domain or 'ai.onnx'}::{node.op_type}",
                    details={"node": node.name},
                    hint=_EDITED,
                )
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as err:
            raise ExportError(
                f"the evaluator cannot compute {node.op_type}",
                details={
                    "node": node.name,
                    "inputs": [None if item is None else f"{item.dtype} {list(item.shape)}" for item in inputs],
                    "attributes": attributes,
                    "reason": f"{type(err).__name__}: {err}",
                },
                hint=_EDITED,
            ) from err
        return result if isinstance(result, tuple) else (result,)

    def _evaluate_custom(
        self, node: onnx.NodeProto, inputs: list[Tensor | None], attributes: Mapping[str, Any], observe: Observer | None
    ) -> Any:
        if self._custom_ops == "bodies":
            return self._evaluate_body(node, inputs, attributes, observe)
        spec = OP_SPECS[node.op_type]
        if set(attributes) != {item.name for item in spec.attributes}:
            raise ValueError(f"attributes {sorted(attributes)}, expected {[item.name for item in spec.attributes]}")
        compute = EAGER[spec.op_type]
        if not isinstance(self._custom_ops, str) and self._by_custom_op(node):
            compute = self._custom_ops[node.op_type]
        return compute(*inputs, *(attributes[item.name] for item in spec.attributes))

    def _by_custom_op(self, node: onnx.NodeProto) -> bool:
        layer = layer_of(node.name)
        return self._custom_layers is None or layer is None or layer in self._custom_layers

    def _evaluate_body(
        self, node: onnx.NodeProto, inputs: list[Tensor | None], attributes: Mapping[str, Any], observe: Observer | None
    ) -> tuple[Tensor, ...]:
        """Runs the function stored in the file, its attribute references replaced by the node's values."""
        function = self._functions[node.op_type]
        values = {name: item for name, item in zip(function.input, inputs, strict=True) if item is not None}
        for inner in function.node:
            bound = onnx.NodeProto()
            bound.CopyFrom(inner)
            del bound.attribute[:]
            for item in inner.attribute:
                value = attributes[item.ref_attr_name] if item.ref_attr_name else onnx.helper.get_attribute_value(item)
                bound.attribute.append(onnx.helper.make_attribute(item.name, value))
            bound.name = f"{node.name}/{inner.op_type}"
            results = self._evaluate(bound, [values[name] if name else None for name in inner.input], observe)
            for name, result in zip(inner.output, results, strict=True):
                values[name] = result
                if observe is not None:
                    observe(f"{node.name}/{name}", result)
        return tuple(values[name] for name in function.output)

    def _cast(self, node: onnx.NodeProto, inputs: list[Tensor | None], to: int | None = None) -> Tensor:
        source = present_tensor(inputs[0])
        if to is None:
            return source.to(present_tensor(inputs[1]).dtype)
        if node.input[0] in self._initializers and self._dtype is not None:
            return source  # a weight is read at the evaluation's dtype already
        if to in FLOATS:
            return source.to(self._float(FLOATS[to]))
        return source.to(_OTHERS[to])


def evaluation_dtype(declared: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The type, in an evaluation at ``dtype``, of a float that a graph declares as ``declared``, weights and cache aside.

    None: as declared. A 16-bit evaluation keeps what the graph explicitly computes in float32.
    """
    if dtype is None:
        return declared
    if dtype in SIXTEEN_BIT:
        return dtype if declared in SIXTEEN_BIT else torch.float32
    return dtype


def layer_of(node_name: str) -> int | None:
    """``model.layers.3.mlp/Mul`` -> 3; None for what stands outside the decoder layers."""
    found = re.match(r"model\.layers\.(\d+)\.", node_name)
    return int(found[1]) if found else None


def needed_nodes(nodes: Sequence[onnx.NodeProto], wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that compute ``wanted``, in their order."""
    names, kept = set(wanted), []
    for node in reversed(nodes):
        if names.intersection(node.output):
            kept.append(node)
            names.update(node.input)
    return kept[::-1]
