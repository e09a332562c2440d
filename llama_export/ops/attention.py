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

from llama_export.ops.spec import AttributeSpec, OpSpec, TensorSpec


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


# Rotation in the type of cos (float32), one rounding back to the model dtype: CastLike follows whatever type the model has.
ROTATE = """
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  keep_rank = Constant <value_ints: ints = [0, 0, -1]> ()
  num_heads_0d = Constant <value_int: int = @num_heads> ()
  num_kv_heads_0d = Constant <value_int: int = @num_kv_heads> ()
  head_dim_0d = Constant <value_int: int = @head_dim> ()
  axis_0 = Constant <value_ints: ints = [0]> ()
  axis_1 = Constant <value_ints: ints = [1]> ()
  copy_axes = Constant <value_ints: ints = [0, 0]> ()
  num_heads_1d = Unsqueeze (num_heads_0d, axis_0)
  num_kv_heads_1d = Unsqueeze (num_kv_heads_0d, axis_0)
  head_dim_1d = Unsqueeze (head_dim_0d, axis_0)
  query_shape = Concat <axis: int = 0> (copy_axes, num_heads_1d, head_dim_1d)
  kv_shape = Concat <axis: int = 0> (copy_axes, num_kv_heads_1d, head_dim_1d)
  query_BSHD = Reshape (query, query_shape)
  key_BSGD = Reshape (key, kv_shape)
  value_BSGD = Reshape (value, kv_shape)
  query_BHSD = Transpose <perm: ints = [0, 2, 1, 3]> (query_BSHD)
  key_BGSD = Transpose <perm: ints = [0, 2, 1, 3]> (key_BSGD)
  value_BGSD = Transpose <perm: ints = [0, 2, 1, 3]> (value_BSGD)
  query_wide = CastLike (query_BHSD, cos)
  key_wide = CastLike (key_BGSD, cos)
  query_turned = RotaryEmbedding <interleaved: int = 0> (query_wide, cos, sin)
  key_turned = RotaryEmbedding <interleaved: int = 0> (key_wide, cos, sin)
  query_rope = CastLike (query_turned, query)
  key_rope = CastLike (key_turned, key)
  new_tokens_1d = Shape <start: int = 1, end: int = 2> (query)
  new_tokens = Squeeze (new_tokens_1d, axis_0)
  new_range = Range (zero, new_tokens, one)
"""
_APPEND = """
  present_key = TensorScatter <axis: int = 2, mode: string = "linear"> (past_key, key_rope, past_length)
  present_value = TensorScatter <axis: int = 2, mode: string = "linear"> (past_value, value_BGSD, past_length)
"""
MERGE_HEADS = """
  attended_BSHD = Transpose <perm: ints = [0, 2, 1, 3]> (attended_BHSD)
  attn_output = Reshape (attended_BSHD, keep_rank)
"""
# Right for every reader: the mask says which cached key each query sees.
_ATTEND_BY_MASK = """
  capacity_1d = Shape <start: int = 2, end: int = 3> (past_key)
  capacity = Squeeze (capacity_1d, axis_0)
  cached_range = Range (zero, capacity, one)
  past_length_B1 = Unsqueeze (past_length, axis_1)
  positions_BS = Add (past_length_B1, new_range)
  mask_axes = Constant <value_ints: ints = [1, 3]> ()
  positions_B1S1 = Unsqueeze (positions_BS, mask_axes)
  visible = LessOrEqual (cached_range, positions_B1S1)
  attended_BHSD = Attention <is_causal: int = 0, scale: float = @scale> (query_rope, present_key, present_value, visible)
"""
# onnxruntime's own operator for all of it: it appends in place where past and present are one buffer, reads the valid
# tokens only, whatever the capacity, and shares a key head among its query heads. It takes B > 1 with S > 1 for empty
# rows only (runtime/session.py). ``last`` counts a row's tokens from 0, ``longest`` is the longest row's number of tokens. S is read
# from cos, which all layers share: onnxruntime then computes the lengths once, not in every layer.
_BY_ONNXRUNTIME = """
  axis_0 = Constant <value_ints: ints = [0]> ()
  one_1d = Constant <value_ints: ints = [1]> ()
  new_tokens = Shape <start: int = 1, end: int = 2> (cos)
  total_length = Add (past_length, new_tokens)
  last_int64 = Sub (total_length, one_1d)
  last = Cast <to: int = 6> (last_int64)
  longest_int64 = ReduceMax <keepdims: int = 0> (total_length, axis_0)
  longest = Cast <to: int = 6> (longest_int64)
  query_rope = RotaryEmbedding
      <interleaved: int = 0, num_heads: int = @num_heads, rotary_embedding_dim: int = @head_dim> (query, cos, sin)
  key_rope = RotaryEmbedding
      <interleaved: int = 0, num_heads: int = @num_kv_heads, rotary_embedding_dim: int = @head_dim> (key, cos, sin)
  attn_output, present_key, present_value = com.microsoft.GroupQueryAttention
      <num_heads: int = @num_heads, kv_num_heads: int = @num_kv_heads, scale: float = @scale>
      (query_rope, key_rope, value, past_key, past_value, last, longest)
"""

ATTENTION_ATTRIBUTES = (
    AttributeSpec("num_heads", "int", "H, query heads"),
    AttributeSpec("num_kv_heads", "int", "G, key/value heads"),
    AttributeSpec("head_dim", "int", "D, width of one head"),
    AttributeSpec("scale", "float", "multiplies the scores, 1 / sqrt(D) in Llama"),
)

ATTENTION = OpSpec(
    op_type="LlamaAttention",
    torch_name="attention",
    version=1,
    inputs=(
        TensorSpec("query", "T", "[B, S, H*D]"),
        TensorSpec("key", "T", "[B, S, G*D]"),
        TensorSpec("value", "T", "[B, S, G*D]"),
        TensorSpec("cos", "float32", "[B, S, D/2]"),
        TensorSpec("sin", "float32", "[B, S, D/2]"),
        TensorSpec("past_key", "T", "[B, G, C, D]"),
        TensorSpec("past_value", "T", "[B, G, C, D]"),
        TensorSpec("past_length", "int64", "[B]"),
    ),
    outputs=(
        TensorSpec("attn_output", "T", "[B, S, H*D]"),
        TensorSpec("present_key", "T", "[B, G, C, D]", alias_of="past_key"),
        TensorSpec("present_value", "T", "[B, G, C, D]", alias_of="past_value"),
    ),
    attributes=ATTENTION_ATTRIBUTES,
    eager=attention_eager,
    fake=attention_fake,
    bodies={
        "standard": ROTATE + _APPEND + _ATTEND_BY_MASK + MERGE_HEADS,
        "onnxruntime": _BY_ONNXRUNTIME,
    },
)
