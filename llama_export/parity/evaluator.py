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

from llama_export.checkpoint import TensorEntry
from llama_export.embedded import ROTARY
from llama_export.errors import ExportError
from llama_export.model.loading import read_tensor
from llama_export.ops import DOMAIN, OP_SPECS
from llama_export.ops.attention import merge_heads, rotate, split_heads
from llama_export.ops.rms_norm import add_rms_norm_eager, rms_norm_eager
from llama_export.parity.lockstep import Step, lockstep

CustomOps = Literal["eager", "bodies"] | Mapping[str, Callable[..., Any]]
Observer = Callable[[str, Tensor], None]
_FLOATS = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
}
_OTHERS = {
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.BOOL: torch.bool,
}
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
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
            value.name: _FLOATS[value.type.tensor_type.elem_type]
            for value in self._graph.input
            if convert_inputs and value.type.tensor_type.elem_type in _FLOATS
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
        (dtype,) = (_FLOATS[item.type.tensor_type.elem_type] for item in self._graph.value_info if item.name == first)
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
        """Evaluates several calls together, node by node: see :mod:`llama_export.parity.lockstep`.

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
            if item.data_type in _FLOATS and item.raw_data and not item.name.startswith(ROTARY):
                weight = torch.frombuffer(bytearray(item.raw_data), dtype=_FLOATS[item.data_type]).reshape(*item.dims)
                return weight if self._dtype is None else weight.to(self._dtype)
            array = onnx.numpy_helper.to_array(item)
            if item.data_type not in _FLOATS:
                return torch.from_numpy(array.copy())
            declared = _FLOATS[item.data_type]  # NumPy's bfloat16 is none of PyTorch's
            return torch.from_numpy(array.astype(np.float64)).to(declared).to(self._float(declared))
        place = {entry.key: entry.value for entry in item.external_data}
        dtype = _FLOATS[item.data_type]
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
                value = _constant(**attributes)
                result = value.to(self._float(value.dtype)) if value.is_floating_point() else value
            elif node.domain == "" and node.op_type in _OPERATORS:
                result = _OPERATORS[node.op_type](*inputs, **attributes)
            elif node.domain == "com.microsoft" and node.op_type in _ONNXRUNTIME_OPERATORS:
                result = _ONNXRUNTIME_OPERATORS[node.op_type](*inputs, **attributes)
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
        compute = spec.eager
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
        source = _present(inputs[0])
        if to is None:
            return source.to(_present(inputs[1]).dtype)
        if node.input[0] in self._initializers and self._dtype is not None:
            return source  # a weight is read at the evaluation's dtype already
        if to in _FLOATS:
            return source.to(self._float(_FLOATS[to]))
        return source.to(_OTHERS[to])


def evaluation_dtype(declared: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The type, in an evaluation at ``dtype``, of a float that a graph declares as ``declared``, weights and cache aside.

    None: as declared. A 16-bit evaluation keeps what the graph explicitly computes in float32.
    """
    if dtype is None:
        return declared
    if dtype in _SIXTEEN_BIT:
        return dtype if declared in _SIXTEEN_BIT else torch.float32
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


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a required input is absent")
    return tensor


def _constant(**attributes: Any) -> Tensor:
    """Constant: exactly one of value, value_int, value_ints, value_float, value_floats."""
    ((name, value),) = attributes.items()
    if name == "value":
        return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
    dtypes = {
        "value_int": torch.int64,
        "value_ints": torch.int64,
        "value_float": torch.float32,
        "value_floats": torch.float32,
    }
    return torch.tensor(value, dtype=dtypes[name])


def _same_type(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """ONNX has no type promotion: a Cast that is missing must not be made up for by PyTorch."""

    def checked(left: Tensor, right: Tensor) -> Tensor:
        if left.dtype != right.dtype:
            raise ValueError(f"operands of {left.dtype} and {right.dtype}")
        return function(left, right)

    return checked


def _shape(data: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(data.shape[start:end], dtype=torch.int64)


def _unsqueeze(data: Tensor, axes: Tensor) -> Tensor:
    rank = data.ndim + axes.numel()
    for axis in sorted(int(axis) % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


def _squeeze(data: Tensor, axes: Tensor | None = None) -> Tensor:
    return data.squeeze() if axes is None else data.squeeze(tuple(int(axis) for axis in axes))


def _reshape(data: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    sizes = [int(size) for size in shape]
    if not allowzero:
        sizes = [data.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return data.reshape(sizes)


def _gather(data: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    size = data.shape[axis]
    if bool(((indices < -size) | (indices >= size)).any()):
        raise IndexError(f"index outside [-{size}, {size - 1}]")
    flat = torch.where(indices < 0, indices + size, indices).reshape(-1)
    picked = data.index_select(axis, flat)
    return picked.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])


def _expand(data: Tensor, shape: Tensor) -> Tensor:
    return data.expand(np.broadcast_shapes(tuple(data.shape), tuple(int(size) for size in shape)))


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _rms_normalization(
    data: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    if axis not in (-1, data.ndim - 1) or stash_type not in _FLOATS:
        raise ValueError(f"axis {axis}, stash_type {stash_type}: only the last axis and float types are implemented")
    inside = _FLOATS[stash_type]
    if inside in _SIXTEEN_BIT and data.dtype in _SIXTEEN_BIT:  # a wider evaluation has no narrower interior
        root = torch.rsqrt(data.to(inside).square().mean(-1, keepdim=True) + epsilon)
        return (data.to(inside) * root).to(data.dtype) * scale
    return rms_norm_eager(data, scale, epsilon)


def _rotary_embedding(
    data: Tensor, cos: Tensor, sin: Tensor, interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0
) -> Tensor:
    """[B, N, S, D], or [B, S, N*D] and ``num_heads`` N, with cos, sin [B, S, D/2]

    interleaved: pairs are (2i, 2i + 1) instead of (i, i + D/2).
    """
    if data.ndim == 3:
        by_head = split_heads(data, num_heads)
        return merge_heads(_rotary_embedding(by_head, cos, sin, interleaved, num_heads, rotary_embedding_dim))
    if rotary_embedding_dim not in (0, data.shape[-1]):
        raise ValueError(f"{rotary_embedding_dim} of {data.shape[-1]} channels: only a full rotation is implemented")
    if not interleaved:
        return rotate(data, cos, sin)
    halves = torch.cat((data[..., 0::2], data[..., 1::2]), dim=-1)
    return torch.stack(rotate(halves, cos, sin).chunk(2, dim=-1), dim=-1).flatten(-2)


def _tensor_scatter(
    past: Tensor, update: Tensor, write_indices: Tensor, axis: int = -2, mode: bytes = b"linear"
) -> Tensor:
    """Writes ``update`` [B, .., S, ..] into a copy of ``past`` from ``write_indices`` [B] on, along ``axis``."""
    if mode != b"linear":
        raise ValueError(f"mode {mode!r}")
    axis = axis % past.ndim
    new_tokens, capacity = update.shape[axis], past.shape[axis]
    if int(write_indices.min()) < 0 or int(write_indices.max()) + new_tokens > capacity:
        raise IndexError(f"{new_tokens} entries from {write_indices.tolist()} on do not fit {capacity}")
    present = past.clone()
    for row in range(past.shape[0]):
        present[row].narrow(axis - 1, int(write_indices[row]), new_tokens).copy_(update[row])
    return present


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    is_causal: int = 0,
    scale: float | None = None,
    softmax_precision: int | None = None,
) -> Tensor:
    """[B, H, S, D], [B, G, C, D] -> [B, H, S, D]; with ``nonpad_kv_seqlen`` [B] causality ends at the valid length."""
    if past_key is not None or past_value is not None or query.ndim != 4:
        raise ValueError("only 4-D inputs without past are implemented")
    wide = torch.promote_types(query.dtype, torch.float32)
    B, H, S, D = query.shape
    G, C = key.shape[1:3]
    allowed = torch.ones(B, 1, S, C, dtype=torch.bool)
    keys, queries = torch.arange(C), torch.arange(S)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError("only a Bool mask is implemented")
        allowed = allowed & mask
    valid = torch.full((B,), C) if nonpad_kv_seqlen is None else nonpad_kv_seqlen
    allowed = allowed & (keys < valid[:, None])[:, None, None]
    if is_causal:
        offset = (valid - S) if nonpad_kv_seqlen is not None else torch.zeros(B, dtype=torch.int64)
        allowed = allowed & (keys <= queries[:, None] + offset[:, None, None])[:, None]
    factor = D**-0.5 if scale is None else scale
    grouped = query.to(wide).reshape(B, G, H // G, S, D)
    scores = grouped @ key.to(wide).unsqueeze(2).transpose(-1, -2) * factor
    scores = scores.masked_fill(~allowed.unsqueeze(1), -torch.inf)
    inside = scores.dtype if softmax_precision is None else _FLOATS[softmax_precision]
    if inside in _SIXTEEN_BIT and query.dtype not in _SIXTEEN_BIT:
        inside = scores.dtype  # a wider evaluation has no narrower interior
    softmax = scores.to(inside).softmax(-1).to(wide)
    weights = torch.where(allowed.any(-1, keepdim=True).unsqueeze(1), softmax, 0.0)
    return (weights @ value.to(wide).unsqueeze(2)).reshape(B, H, S, -1).to(query.dtype)


def _skip_simplified_layer_normalization(
    data: Tensor, skip: Tensor, gamma: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[.., E] twice, [E] -> the normed sum, two outputs that nobody reads, the sum."""
    normed, total = add_rms_norm_eager(data, skip, gamma, epsilon)
    unread = data.new_zeros(0)
    return normed, unread, unread, total


def _group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    last: Tensor,
    longest: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H*D], [B, S, G*D] twice, [B, G, C, D] twice -> attn_output, present_key, present_value.

    Args:
        last: int32 [B], each row's number of tokens, past and new, minus one. longest: int32, that of the longest row.
        num_heads, kv_num_heads: H, G. scale: of the scores.
    """
    new_tokens = query.shape[1]
    if last.dtype != torch.int32 or longest.dtype != torch.int32 or int(longest) != int(last.max()) + 1:
        raise ValueError(f"lengths {last.tolist()} and {longest.tolist()}, {last.dtype} and {longest.dtype}")
    past_length = last.to(torch.int64) + 1 - new_tokens
    q_BHSD = split_heads(query, num_heads)
    present_key, present_value = (
        _tensor_scatter(past, split_heads(new, kv_num_heads), past_length)
        for past, new in ((past_key, key), (past_value, value))
    )
    attended = _attention(
        q_BHSD, present_key, present_value, nonpad_kv_seqlen=past_length + new_tokens, is_causal=1, scale=scale
    )
    return merge_heads(attended), present_key, present_value


def _clip(data: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if any(bound is not None and bound.dtype != data.dtype for bound in (low, high)):
        raise ValueError(f"bounds that are not {data.dtype}")
    return torch.clamp(data, low, high)


def _cum_sum(data: Tensor, axis: Tensor, exclusive: int = 0, reverse: int = 0) -> Tensor:
    if exclusive or reverse:
        raise ValueError("only the inclusive forward sum is implemented")
    return torch.cumsum(data, int(axis), dtype=data.dtype)


def _div(left: Tensor, right: Tensor) -> Tensor:
    return torch.div(left, right) if left.is_floating_point() else torch.div(left, right, rounding_mode="trunc")


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def _pow(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent.to(base.dtype))  # the one operator whose operands may differ in type


def _reduce_max(data: Tensor, axes: Tensor | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    if axes is None or axes.numel() == 0:
        raise ValueError("only reductions over given axes are implemented")
    return torch.amax(data, [int(axis) for axis in axes], keepdim=bool(keepdims))


def _reduce_mean(data: Tensor, axes: Tensor | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    if axes is None or axes.numel() == 0:
        raise ValueError("only reductions over given axes are implemented")
    return torch.mean(data, [int(axis) for axis in axes], keepdim=bool(keepdims))


def _slice(
    data: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    which = list(range(starts.numel())) if axes is None else [int(axis) % data.ndim for axis in axes]
    strides = [1] * len(which) if steps is None else [int(step) for step in steps]
    if min(strides) < 1:
        raise ValueError("only positive steps are implemented")
    index = [slice(None)] * data.ndim
    for axis, start, end, step in zip(which, starts.tolist(), ends.tolist(), strides, strict=True):
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _where(condition: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != right.dtype or condition.dtype != torch.bool:
        raise ValueError(f"a condition of {condition.dtype}, values of {left.dtype} and {right.dtype}")
    return torch.where(condition, left, right)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _same_type(torch.add),
    "And": _same_type(torch.logical_and),
    "Attention": _attention,
    "Clip": _clip,
    "Concat": lambda *tensors, axis: torch.cat(tensors, dim=axis),
    "Cos": torch.cos,
    "CumSum": _cum_sum,
    "Div": _same_type(_div),
    "Equal": _same_type(torch.eq),
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": lambda data, indices, axis=0: torch.gather(data, axis, indices),
    "Gelu": lambda data, approximate=b"none": torch.nn.functional.gelu(data, approximate=approximate.decode()),
    "Gemm": _gemm,
    "Greater": _same_type(torch.gt),
    "HardSwish": torch.nn.functional.hardswish,
    "Identity": lambda data: data,
    "LeakyRelu": lambda data, alpha=0.01: torch.nn.functional.leaky_relu(data, alpha),
    "Less": _same_type(torch.lt),
    "LessOrEqual": _same_type(torch.le),
    "MatMul": torch.matmul,
    "Mish": torch.nn.functional.mish,
    "Mul": _same_type(torch.mul),
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": _same_type(torch.logical_or),
    "Pow": _pow,
    "RMSNormalization": _rms_normalization,
    "Range": _range,
    "Reciprocal": torch.reciprocal,
    "ReduceMax": _reduce_max,
    "ReduceMean": _reduce_mean,
    "Relu": torch.relu,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary_embedding,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": _same_type(torch.sub),
    "Tanh": torch.tanh,
    "TensorScatter": _tensor_scatter,
    "Transpose": lambda data, perm: data.permute(*perm),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
_ONNXRUNTIME_OPERATORS: dict[str, Callable[..., Any]] = {
    "GroupQueryAttention": _group_query_attention,
    "SkipSimplifiedLayerNormalization": _skip_simplified_layer_normalization,
}
"""Domain ``com.microsoft``."""
