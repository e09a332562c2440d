"""``LlamaAttention``: rotate query and key, append key and value to the static cache, attend over it.

Shapes: B batch, S new tokens, C kv_cache_capacity, H query heads, G key/value heads (H a multiple of G), D head_dim.
Token ``s`` of row ``b`` is at position ``past_length[b] + s``; its key and value are written there. Query ``s`` of row
``b`` sees key ``j`` iff ``j <= past_length[b] + s``: causal, aligned to the end of the valid cache, not to its capacity.

Numerics:
    RoPE rotates halves (pair i with i + D/2) in float32 with the float32 cos and sin it is given, and rounds once to
    the model dtype; the rounded key is what the cache holds. Scores, softmax and the weighted sum accumulate in
    float32 (float64 for float64 inputs), one rounding at the end. ``scale`` multiplies the scores. A query that sees
    no key yields 0. Cache entries at or past ``past_length + S`` never influence the eager result, not even NaN; the
    ONNX bodies multiply them by zero, so for them they must be finite.

Source: https://onnx.ai/onnx/operators/onnx__Attention.html, .../onnx__TensorScatter.html, .../onnx__RotaryEmbedding.html
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_length: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the module; past tensors are not modified, the present ones are new."""
    q_BHSD = rotate(split_heads(query, num_heads), cos, sin)
    k_BGSD = rotate(split_heads(key, num_kv_heads), cos, sin)
    present_key = append(past_key, k_BGSD, past_length)
    present_value = append(past_value, split_heads(value, num_kv_heads), past_length)
    visible = visible_in_cache(past_length, query.shape[1], past_key.shape[2])
    return attend(q_BHSD, present_key, present_value, visible, scale), present_key, present_value


def append(past_BGCD: Tensor, new_BGSD: Tensor, past_length: Tensor) -> Tensor:
    """The cache with row b's new entries written from ``past_length[b]`` on."""
    slots = past_length.unsqueeze(1) + torch.arange(new_BGSD.shape[2], device=past_length.device)  # [B, S]
    return past_BGCD.scatter(2, slots[:, None, :, None].expand_as(new_BGSD), new_BGSD)


def visible_in_cache(past_length: Tensor, new_tokens: int, capacity: int) -> Tensor:
    """int64 [B] -> Bool [B, S, C]: key j is seen by query s of row b iff ``j <= past_length[b] + s``."""
    positions = past_length.unsqueeze(1) + torch.arange(new_tokens, device=past_length.device)
    return torch.arange(capacity, device=past_length.device) <= positions.unsqueeze(-1)


def attend(q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v over the keys that ``visible`` [B, S, C] allows each query -> [B, S, H*D].

    Keys and values that no query of the row sees have no influence, not even as NaN; a query that sees none yields 0.
    """
    B, H, S, D = q_BHSD.shape
    G = k_BGCD.shape[1]
    wide = torch.promote_types(q_BHSD.dtype, torch.float32)
    # The H / G query heads of one group share their key and value head.
    q_BGRSD = q_BHSD.to(wide).view(B, G, H // G, S, D)
    seen = visible.any(1)[:, None, None, :, None]  # [B, 1, 1, C, 1]
    k_BG1CD = k_BGCD.to(wide).unsqueeze(2)
    v_BG1CD = torch.where(seen, v_BGCD.to(wide).unsqueeze(2), 0.0)  # 0 * NaN would be NaN
    visible = visible[:, None, None]  # [B, 1, 1, S, C]
    scores = (q_BGRSD @ k_BG1CD.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    weights = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return merge_heads((weights @ v_BG1CD).reshape(B, H, S, D).to(q_BHSD.dtype))


def attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_length: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of :func:`attention_eager`."""
    return query.new_empty(query.shape), past_key.new_empty(past_key.shape), past_value.new_empty(past_value.shape)


def split_heads(hidden: Tensor, heads: int) -> Tensor:
    """[B, S, heads*D] -> [B, heads, S, D]"""
    return hidden.view(*hidden.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x_BHSD: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H*D]"""
    return x_BHSD.transpose(1, 2).flatten(2)


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: [B, N, S, D] with cos, sin [B, S, D/2]; pair (i, i + D/2) is turned by the angle of frequency i."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x_BNSD.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BNSD.dtype)
