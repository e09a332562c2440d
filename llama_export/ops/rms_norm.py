"""``LlamaRMSNorm`` and ``LlamaAddRMSNorm``: root-mean-square normalisation, alone and after the residual sum.

Numerics:
    Mean of squares, epsilon inside the root, reciprocal root and the product with it in float32 (float64 for float64
    inputs); rounded to the dtype of ``hidden_states`` **before** the multiplication by ``weight``, then once more
    after it. This is the order of Hugging Face's ``LlamaRMSNorm`` and of ONNX ``RMSNormalization`` (stash_type 1).
    The residual sum of ``LlamaAddRMSNorm`` is rounded to the input dtype before it is normalised, and that rounded sum
    is what comes out as ``new_residual``.

Source: https://arxiv.org/abs/1910.07467; https://onnx.ai/onnx/operators/onnx__RMSNormalization.html
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_eager(hidden_states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """[.., E], [E] -> [.., E]"""
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return normed.to(hidden_states.dtype) * weight


def rms_norm_fake(hidden_states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Shape and dtype of ``hidden_states``."""
    return torch.empty_like(hidden_states)


def add_rms_norm_eager(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """[.., E], [.., E], [E] -> (normed sum, sum)"""
    new_residual = hidden_states + residual
    return rms_norm_eager(new_residual, weight, epsilon), new_residual


def add_rms_norm_fake(hidden_states: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Twice the shape and dtype of ``hidden_states``."""
    return torch.empty_like(hidden_states), torch.empty_like(hidden_states)
