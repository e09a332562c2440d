"""``LlamaMaskedAttention``: rotate query and key and attend, causally, over one padded batch. There is no cache.

For the heads that read a whole text at once (classification, question answering, embeddings).

Shapes: B batch, S tokens, H query heads, G key/value heads (H a multiple of G), D head_dim. Query i of row b sees key j
iff ``j <= i`` and ``attention_mask[b, j] != 0``; the padding may be on either side, or anywhere. A query that sees
nothing (left padding) yields 0. A query that is padding itself sees what the rule says; nobody reads its result.

Numerics:
    As in :mod:`llama_export.ops.attention`: rotation in float32, one rounding; scores, softmax and the weighted sum
    accumulate in float32 (float64 for float64 inputs), one rounding at the end. Keys and values of padding never
    influence the eager result, not even NaN; the ONNX bodies multiply them by zero, so for them they must be finite.

Source: https://onnx.ai/onnx/operators/onnx__Attention.html; positions and mask as in transformers ``modeling_llama``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_export.ops.attention import attend, rotate, split_heads


def masked_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    attention_mask: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> Tensor:
    """See the module."""
    q_BHSD = rotate(split_heads(query, num_heads), cos, sin)
    k_BGSD = rotate(split_heads(key, num_kv_heads), cos, sin)
    v_BGSD = split_heads(value, num_kv_heads)
    return attend(q_BHSD, k_BGSD, v_BGSD, causal_and_unpadded(attention_mask), scale)


def causal_and_unpadded(attention_mask: Tensor) -> Tensor:
    """int64 [B, S] -> Bool [B, S, S]: which keys (last axis) a query sees."""
    i = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (i <= i.unsqueeze(1)) & (attention_mask != 0).unsqueeze(1)


def masked_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    attention_mask: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> Tensor:
    """Shape and dtype of :func:`masked_attention_eager`."""
    return query.new_empty(query.shape)
