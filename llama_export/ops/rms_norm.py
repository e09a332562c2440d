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

from llama_export.ops.spec import AttributeSpec, OpSpec, TensorSpec


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


_EPSILON = AttributeSpec("epsilon", "float", "added to the mean of squares, inside the root")
_NORM = "normed = RMSNormalization <axis: int = -1, stash_type: int = 1, epsilon: float = @epsilon> ({x}, weight)"
# onnxruntime's own operator for both, in one pass; the outputs between are for training.
_ADD_NORM_BY_ONNXRUNTIME = """
  normed, mean, inverse_root, new_residual =
      com.microsoft.SkipSimplifiedLayerNormalization <epsilon: float = @epsilon> (hidden_states, residual, weight)
"""
_ADD_NORM = "new_residual = Add (hidden_states, residual)\n" + _NORM.format(x="new_residual")

RMS_NORM = OpSpec(
    op_type="LlamaRMSNorm",
    torch_name="rms_norm",
    version=1,
    inputs=(TensorSpec("hidden_states", "T", "[.., E]"), TensorSpec("weight", "T", "[E]")),
    outputs=(TensorSpec("normed", "T", "[.., E]"),),
    attributes=(_EPSILON,),
    eager=rms_norm_eager,
    fake=rms_norm_fake,
    bodies={"standard": _NORM.format(x="hidden_states"), "onnxruntime": _NORM.format(x="hidden_states")},
)

ADD_RMS_NORM = OpSpec(
    op_type="LlamaAddRMSNorm",
    torch_name="add_rms_norm",
    version=1,
    inputs=(
        TensorSpec("hidden_states", "T", "[.., E]"),
        TensorSpec("residual", "T", "[.., E]"),
        TensorSpec("weight", "T", "[E]"),
    ),
    outputs=(TensorSpec("normed", "T", "[.., E]"), TensorSpec("new_residual", "T", "[.., E]")),
    attributes=(_EPSILON,),
    eager=add_rms_norm_eager,
    fake=add_rms_norm_fake,
    bodies={"standard": _ADD_NORM, "onnxruntime": _ADD_NORM_BY_ONNXRUNTIME},
)
