"""The kernels on the CPU, under Triton's interpreter: the very functions that are compiled, with the tiles of the GPU variants.

Role: "kernels in the loop". :func:`kernel_ops` computes the custom ops of an exported graph with them; the library's
harness calls :func:`run_interpreted` for each launch that the C++ code asks for.

How: ``@triton.jit`` chooses between compiler and interpreter when a function is defined, for the whole process, by an
environment variable. A process that has imported torch may need the compiler too, so the choice is made per launch
instead: for its duration every jit function that a kernel can reach is replaced by its interpreted twin.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.experimental.gluon  # the first launch would import it, and must find jit functions, not their twins
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

from . import attention, numerics, rms_norm
from .table import KERNELS, select

_MODULES: tuple[types.ModuleType, ...] = (tl, tl.standard, tl.math, tl.core, numerics, rms_norm, attention)
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class _Twin(InterpretedFunction[Any]):
    """An interpreted function that undoes, after a call from another one, what Triton 3.9 leaves changed in its language."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = _patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()


@cache
def _interpreted(function: Callable[..., Any]) -> _Twin:
    return _Twin(function)


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Swaps jit functions for interpreted ones, in Triton's standard library and in ours, and swaps them back."""
    swapped = [
        (module, name, value)
        for module in _MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    compiled = numerics.INTERPRETED
    for module, name, value in swapped:
        setattr(module, name, _interpreted(value.fn))
    numerics.INTERPRETED = tl.constexpr(True)
    try:
        yield
    finally:
        numerics.INTERPRETED = compiled
        for module, name, value in swapped:
            setattr(module, name, value)


def run_interpreted(
    kernel: str, grid: tuple[int, int, int], arguments: Sequence[Any], constexprs: Mapping[str, int | bool]
) -> None:
    """One launch.

    Args:
        kernel: a name of the table.
        grid: programs in x, y and z.
        arguments: in the order of the table: CPU tensors (where a pointer is meant, its first element), int, float.
        constexprs: of the variant.
    """
    functions = attention if KERNELS[kernel].has_heads else rms_norm
    with _interpreter():
        getattr(functions, kernel)[grid](*arguments, **constexprs)


def kernel_ops() -> dict[str, Callable[..., Any]]:
    """Custom op -> function of the node's input tensors (CPU) and attribute values, in the order of the op table.

    The launches are those of the C++ plugins; the library is not involved. Inputs are not modified.
    """
    return {"LlamaRMSNorm": _rms_norm, "LlamaAddRMSNorm": _add_rms_norm, "LlamaAttention": _attention}


def _rms_norm(hidden_states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[.., E], [E] -> [.., E]"""
    hidden_states, normed = hidden_states.contiguous(), torch.empty(hidden_states.shape, dtype=hidden_states.dtype)
    size = hidden_states.shape[-1]
    variant = select("rms_norm", _DTYPES[hidden_states.dtype], 0)
    arguments = (hidden_states, weight.contiguous(), normed, size, float(epsilon))
    run_interpreted("rms_norm", (hidden_states.numel() // size, 1, 1), arguments, variant.constexprs)
    return normed


def _add_rms_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """[.., E], [.., E], [E] -> (normed sum, sum)"""
    hidden_states, residual = hidden_states.contiguous(), residual.contiguous()
    normed, new_residual = torch.empty_like(hidden_states), torch.empty_like(hidden_states)
    size = hidden_states.shape[-1]
    variant = select("add_rms_norm", _DTYPES[hidden_states.dtype], 0)
    arguments = (hidden_states, residual, weight.contiguous(), normed, new_residual, size, float(epsilon))
    run_interpreted("add_rms_norm", (hidden_states.numel() // size, 1, 1), arguments, variant.constexprs)
    return normed, new_residual


def _attention(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor,
    past_length: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """query [B, S, H*D]; key, value [B, S, G*D], each row of a token dense, tokens any stride apart; as the op table says."""
    (B, S, _), C = query.shape, past_key.shape[2]
    dtype = _DTYPES[query.dtype]
    query, key, value = (_tokens_evenly_apart(tensor) for tensor in (query, key, value))
    rotated_query = torch.empty(B, S, num_heads * head_dim, dtype=query.dtype)
    attn_output = torch.empty_like(rotated_query)
    present_key, present_value = past_key.contiguous().clone(), past_value.contiguous().clone()
    past_length = past_length.contiguous()

    variant = select("rotate_and_append", dtype, head_dim)
    run_interpreted(
        "rotate_and_append",
        (B * S, 1, 1),
        (
            query, key, value, cos.contiguous(), sin.contiguous(), past_length, rotated_query, present_key, present_value,
            S, num_heads, num_kv_heads, C, head_dim, query.stride(1), key.stride(1), value.stride(1),
        ),
        variant.constexprs,
    )  # fmt: skip
    kernel = "attention_decode" if S == 1 else "attention_prefill"
    variant = select(kernel, dtype, head_dim)
    run_interpreted(
        kernel,
        (triton.cdiv(S * (num_heads // num_kv_heads), variant.block_m), num_kv_heads, B),
        (
            rotated_query, present_key, present_value, past_length, attn_output, float(scale),
            S, num_heads, num_kv_heads, C, head_dim,
        ),
        variant.constexprs,
    )  # fmt: skip
    return attn_output, present_key, present_value


def _tokens_evenly_apart(tensor: Tensor) -> Tensor:
    """[B, S, N] with dense rows and one stride from token to token across the batch; copied only where it has none."""
    even = tensor.stride(2) == 1 and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    return tensor if even else tensor.contiguous()
