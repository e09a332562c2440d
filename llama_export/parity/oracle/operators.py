"""The operators that the evaluator knows, in PyTorch, at any floating-point dtype.

Written from the specifications, and sharing no code with the reference model or the ops' eager bodies: where both agree,
two sources agree.

Sources: https://onnx.ai/onnx/operators (opset 24); for the domain com.microsoft
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

FLOATS = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
}
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def present_tensor(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a required input is absent")
    return tensor


def constant_value(**attributes: Any) -> Tensor:
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
    if axis not in (-1, data.ndim - 1) or stash_type not in FLOATS:
        raise ValueError(f"axis {axis}, stash_type {stash_type}: only the last axis and float types are implemented")
    inside = FLOATS[stash_type]
    if inside not in SIXTEEN_BIT or data.dtype not in SIXTEEN_BIT:
        inside = torch.promote_types(inside, data.dtype)  # a wider evaluation has no narrower interior
    wide = data.to(inside)
    root = torch.sqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
    return (wide / root).to(data.dtype) * scale


def _by_head(data: Tensor, heads: int) -> Tensor:
    """[B, S, N*D] -> [B, N, S, D]"""
    return data.reshape(*data.shape[:2], heads, -1).transpose(1, 2)


def _side_by_side(data: Tensor) -> Tensor:
    """[B, N, S, D] -> [B, S, N*D]"""
    return data.transpose(1, 2).flatten(2)


def _rotary_embedding(
    data: Tensor, cos: Tensor, sin: Tensor, interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0
) -> Tensor:
    """[B, N, S, D], or [B, S, N*D] and ``num_heads`` N, with cos, sin [B, S, D/2]

    interleaved: pairs are (2i, 2i + 1) instead of (i, i + D/2).
    """
    if data.ndim == 3:
        by_head = _by_head(data, num_heads)
        return _side_by_side(_rotary_embedding(by_head, cos, sin, interleaved, num_heads, rotary_embedding_dim))
    if rotary_embedding_dim not in (0, data.shape[-1]):
        raise ValueError(f"{rotary_embedding_dim} of {data.shape[-1]} channels: only a full rotation is implemented")
    first, second = (data[..., 0::2], data[..., 1::2]) if interleaved else data.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # one angle for all heads
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    return torch.stack((real, imaginary), -1).flatten(-2) if interleaved else torch.cat((real, imaginary), dim=-1)


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
    inside = scores.dtype if softmax_precision is None else FLOATS[softmax_precision]
    if inside in SIXTEEN_BIT and query.dtype not in SIXTEEN_BIT:
        inside = scores.dtype  # a wider evaluation has no narrower interior
    softmax = scores.to(inside).softmax(-1).to(wide)
    weights = torch.where(allowed.any(-1, keepdim=True).unsqueeze(1), softmax, 0.0)
    return (weights @ value.to(wide).unsqueeze(2)).reshape(B, H, S, -1).to(query.dtype)


def _skip_simplified_layer_normalization(
    data: Tensor, skip: Tensor, gamma: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[.., E] twice, [E] -> the normed sum, two outputs that nobody reads, the sum."""
    total = data + skip
    unread = data.new_zeros(0)
    return _rms_normalization(total, gamma, epsilon=epsilon), unread, unread, total


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
    q_BHSD = _by_head(query, num_heads)
    present_key, present_value = (
        _tensor_scatter(past, _by_head(new, kv_num_heads), past_length)
        for past, new in ((past_key, key), (past_value, value))
    )
    attended = _attention(
        q_BHSD, present_key, present_value, nonpad_kv_seqlen=past_length + new_tokens, is_causal=1, scale=scale
    )
    return _side_by_side(attended), present_key, present_value


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


OPERATORS: dict[str, Callable[..., Any]] = {
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
ONNXRUNTIME_OPERATORS: dict[str, Callable[..., Any]] = {
    "GroupQueryAttention": _group_query_attention,
    "SkipSimplifiedLayerNormalization": _skip_simplified_layer_normalization,
}
"""Domain ``com.microsoft``."""
