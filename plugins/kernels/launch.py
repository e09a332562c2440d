"""The launches of each custom op, in Python: which kernels, with which variant, grid and arguments.

The C++ plugins make the same ones (``src/*_plugin.cpp``). Here they run the kernels without the library: on the CPU under
the interpreter (:mod:`.loop`), and on a GPU, compiled by Triton there and then (:func:`run_on_gpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention, rms_norm
from .table import KERNELS, Variant, is_split, select, split_keys

Run = Callable[[Variant, tuple[int, int, int], Sequence[Any]], None]
"""Launches one variant: grid in x, y, z; arguments in the order of the table, a tensor where a pointer is meant."""
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def kernel_function(kernel: str) -> Any:
    """The jit function of a kernel of the table, as it is now: :mod:`.loop` swaps it for the time of a launch."""
    return getattr(attention if KERNELS[kernel].has_heads else rms_norm, kernel)


def run_on_gpu(variant: Variant, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    """Triton's own launch, on the current CUDA device, with the settings of the ahead-of-time build."""
    kernel_function(variant.kernel)[grid](
        *arguments,
        **variant.constexprs,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        enable_fp_fusion=True,
    )


def ops(run: Run) -> dict[str, Callable[..., Any]]:
    """Custom op -> function of the node's input tensors and attribute values, in the order of the op table.

    Inputs may lie anywhere ``run`` can reach, all on one device; they are not modified.
    """

    def rms_norm_op(hidden_states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[.., E], [E] -> [.., E]"""
        hidden_states = hidden_states.contiguous()
        normed = torch.empty_like(hidden_states)
        size = hidden_states.shape[-1]
        rows = hidden_states.numel() // size
        variant = select("rms_norm", _DTYPES[hidden_states.dtype], size)
        arguments = (hidden_states, weight.contiguous(), normed, rows, size, float(epsilon))
        run(variant, (-(-rows // variant.rows), 1, 1), arguments)
        return normed

    def add_rms_norm_op(
        hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """[.., E], [.., E], [E] -> (normed sum, sum)"""
        hidden_states, residual = hidden_states.contiguous(), residual.contiguous()
        normed, new_residual = torch.empty_like(hidden_states), torch.empty_like(hidden_states)
        size = hidden_states.shape[-1]
        rows = hidden_states.numel() // size
        variant = select("add_rms_norm", _DTYPES[hidden_states.dtype], size)
        arguments = (hidden_states, residual, weight.contiguous(), normed, new_residual, rows, size, float(epsilon))
        run(variant, (-(-rows // variant.rows), 1, 1), arguments)
        return normed, new_residual

    def attention_op(
        query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor,
        past_length: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """query [B, S, H*D]; key, value [B, S, G*D]; each token dense, tokens any stride apart; rest as the op table."""
        (B, S, _), C = query.shape, past_key.shape[2]
        dtype = _DTYPES[query.dtype]
        query, key, value = (_tokens_evenly_apart(tensor) for tensor in (query, key, value))
        rotated_query = query.new_empty(B, S, num_heads * head_dim)
        attn_output = torch.empty_like(rotated_query)
        present_key, present_value = past_key.contiguous().clone(), past_value.contiguous().clone()
        past_length = past_length.contiguous()
        sizes = (S, num_heads, num_kv_heads, C, head_dim)
        strides = (query.stride(1), key.stride(1), value.stride(1))
        run(
            select("rotate_and_append", dtype, head_dim),
            (B * S, 1, 1),
            (
                query, key, value, cos.contiguous(), sin.contiguous(), past_length,
                rotated_query, present_key, present_value, *sizes, *strides,
            ),
        )  # fmt: skip
        group = num_heads // num_kv_heads
        attended = (rotated_query, present_key, present_value, past_length, attn_output)
        if not is_split(S, group):
            variant = select("attention_prefill", dtype, head_dim)
            run(variant, (-(-S * group // variant.rows), num_kv_heads, B), (*attended, float(scale), *sizes))
            return attn_output, present_key, present_value
        keys = split_keys(C)
        pieces = max(1, -(-C // keys))
        partial_output = query.new_empty(B, S, num_heads, pieces, head_dim, dtype=torch.float32)
        partial_softmax = query.new_empty(B, S, num_heads, pieces, 2, dtype=torch.float32)
        variant = select("attention_split", dtype, head_dim)
        run(
            variant,
            (-(-S * group // variant.rows) * pieces, num_kv_heads, B),
            (*attended, partial_output, partial_softmax, float(scale), *sizes, pieces, keys),
        )
        if pieces > 1:
            run(
                select("attention_combine", dtype, head_dim),
                (B * S * num_heads, 1, 1),
                (partial_output, partial_softmax, past_length, attn_output, S, num_heads, C, head_dim, pieces, keys),
            )
        return attn_output, present_key, present_value

    def masked_attention_op(
        query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor,
        num_heads: int, num_kv_heads: int, head_dim: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """query [B, S, H*D]; key, value [B, S, G*D]; attention_mask [B, S]; rest as the op table."""
        B, S, _ = query.shape
        dtype = _DTYPES[query.dtype]
        query, key, value = (_tokens_evenly_apart(tensor) for tensor in (query, key, value))
        rotated_query = query.new_empty(B, S, num_heads * head_dim)
        attn_output = torch.empty_like(rotated_query)
        rotated_key, moved_value = (query.new_empty(B, num_kv_heads, S, head_dim) for _ in range(2))
        # The batch is appended to an empty cache of its own length.
        past_length = torch.zeros(B, dtype=torch.int64, device=query.device)
        run(
            select("rotate_and_append", dtype, head_dim),
            (B * S, 1, 1),
            (
                query, key, value, cos.contiguous(), sin.contiguous(), past_length, rotated_query, rotated_key, moved_value,
                S, num_heads, num_kv_heads, S, head_dim, query.stride(1), key.stride(1), value.stride(1),
            ),
        )  # fmt: skip
        variant = select("attention_padded", dtype, head_dim)
        run(
            variant,
            (-(-S * (num_heads // num_kv_heads) // variant.rows), num_kv_heads, B),
            (
                rotated_query, rotated_key, moved_value, attention_mask.contiguous(), attn_output, float(scale),
                S, num_heads, num_kv_heads, head_dim,
            ),
        )  # fmt: skip
        return attn_output

    return {
        "LlamaRMSNorm": rms_norm_op,
        "LlamaAddRMSNorm": add_rms_norm_op,
        "LlamaAttention": attention_op,
        "LlamaMaskedAttention": masked_attention_op,
    }


def _tokens_evenly_apart(tensor: Tensor) -> Tensor:
    """[B, S, N] with dense rows and one stride from token to token across the batch; copied only where it has none."""
    even = tensor.stride(2) == 1 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if even else tensor.contiguous()
