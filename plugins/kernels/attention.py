"""Attention in two launches: rotate and append, then attend: over the static KV cache (prefill or decode), or over one
padded batch whose rotated keys lie in a scratch cache of just its length (padded).

Shapes: B batch, S = ``new_tokens``, H = ``num_heads``, G = ``num_kv_heads``, R = H / G query heads per key/value head,
C = ``capacity`` of the cache, D = ``head_dim``. Token s of row b is at position ``past_length[b] + s``.
``HEAD_DIM`` is D padded to a power of two; ``MASKED`` variants serve any even D up to it, the others only D = HEAD_DIM.

Numerics: RoPE in float32 with the float32 cos and sin it is given, one rounding. Scores, softmax and the weighted sum
accumulate in float32; the softmax weights are rounded to the model dtype before they multiply 16-bit values. Cache
entries at or past ``past_length + S`` are never loaded.

Source: RoPE https://arxiv.org/abs/2104.09864; online softmax https://arxiv.org/abs/1805.02867 (algorithm 3);
tiling https://arxiv.org/abs/2307.08691; grouped queries https://arxiv.org/abs/2305.13245
"""

import triton
import triton.language as tl

from .numerics import dot, round_to


@triton.jit
def rotate_and_append(
    query, key, value, cos, sin, past_length, rotated_query, present_key, present_value,
    new_tokens, num_heads, num_kv_heads, capacity, head_dim, query_stride, key_stride, value_stride,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotates query and key by their position and writes key and value into the cache.

    query [B, S, H, D], key and value [B, S, G, D], ``*_stride`` elements from token to token; cos, sin [B, S, D/2];
    rotated_query [B, S, H, D], dense; present_key, present_value [B, G, C, D]. A position outside the cache is skipped.
    Grid (B * S, 1, 1): one program per token, ``HEADS`` heads at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    b = token // new_tokens
    position = tl.load(past_length + b) + token % new_tokens
    half = head_dim // 2 if MASKED else HEAD_DIM // 2
    width = head_dim if MASKED else HEAD_DIM
    i = tl.arange(0, HEAD_DIM // 2)  # pair (i, i + half) turns by the angle of frequency i
    heads = tl.arange(0, HEADS)
    in_half = i < half
    # As a vector: the interpreter cannot combine a scalar condition with a vector of them.
    in_cache = (position + i * 0 >= 0) & (position + i * 0 < capacity)
    cos_i = tl.load(cos + token * half + i, mask=in_half, other=1.0)[None, :]
    sin_i = tl.load(sin + token * half + i, mask=in_half, other=0.0)[None, :]

    for first in range(0, num_heads, HEADS):
        h = (first + heads)[:, None]
        live = (h < num_heads) & in_half[None, :]
        source = query + token * query_stride + h * width + i[None, :]
        target = rotated_query + (token * num_heads + h) * width + i[None, :]
        rotate(source, target, half, cos_i, sin_i, live, live)
    for first in range(0, num_kv_heads, HEADS):
        g = (first + heads)[:, None]
        live = (g < num_kv_heads) & in_half[None, :]
        kept = live & in_cache[None, :]
        slot = ((b * num_kv_heads + g) * capacity + position) * width + i[None, :]
        rotate(key + token * key_stride + g * width + i[None, :], present_key + slot, half, cos_i, sin_i, live, kept)
        source = value + token * value_stride + g * width + i[None, :]
        tl.store(present_value + slot, tl.load(source, mask=live, other=0.0), mask=kept)
        tl.store(present_value + slot + half, tl.load(source + half, mask=live, other=0.0), mask=kept)


@triton.jit
def rotate(source, target, half, cos, sin, live, kept):
    """Turns the pairs (source[i], source[i + half]) of some heads [HEADS, HEAD_DIM / 2] and stores them at target."""
    first = tl.load(source, mask=live, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=live, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target, round_to(first * cos - second * sin, dtype), mask=kept)
    tl.store(target + half, round_to(second * cos + first * sin, dtype), mask=kept)


@triton.jit
def attention_prefill(
    rotated_query, present_key, present_value, past_length, attn_output, scale,
    new_tokens, num_heads, num_kv_heads, capacity, head_dim,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Causal attention of S new tokens over a cache that already holds them.

    rotated_query, attn_output [B, S, H, D]; present_key, present_value [B, G, C, D]. Query s of row b sees key j iff
    j <= past_length[b] + s; one that sees nothing yields 0. Grid (ceil(S * R / BLOCK_M), G, B): the rows of a tile are
    (token, head of the group) pairs, so that the R heads of a group read their key and value once.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = num_heads // num_kv_heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < new_tokens * group
    s = row // group
    h = g * group + row % group
    past = tl.load(past_length + b)
    last = past + tl.minimum(new_tokens - 1, (tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // group)
    keys = tl.minimum(last + 1, capacity).to(tl.int32)  # how many the last row of the tile sees
    cache = (b * num_kv_heads + g) * capacity
    query_row = (b * new_tokens + s) * num_heads + h
    attend(
        rotated_query, present_key, present_value, None, attn_output, scale, query_row, live, past + s, keys, cache,
        head_dim, HEAD_DIM, MASKED, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def attention_padded(
    rotated_query, rotated_key, value, attention_mask, attn_output, scale,
    num_tokens, num_heads, num_kv_heads, head_dim,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Causal attention of S = ``num_tokens`` tokens over themselves, tokens whose mask is 0 left out as keys.

    rotated_query, attn_output [B, S, H, D]; rotated_key, value [B, G, S, D]; attention_mask int64 [B, S]. Query i of row b
    sees key j iff j <= i and attention_mask[b, j] != 0; one that sees nothing yields 0. Grid and tiles as in
    :func:`attention_prefill`.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = num_heads // num_kv_heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = row // group
    last = tl.minimum(num_tokens - 1, (tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // group)
    query_row = (b * num_tokens + s) * num_heads + g * group + row % group
    attend(
        rotated_query, rotated_key, value, attention_mask + b * num_tokens, attn_output, scale, query_row,
        row < num_tokens * group, s, last + 1, (b * num_kv_heads + g) * num_tokens,
        head_dim, HEAD_DIM, MASKED, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def attention_decode(
    rotated_query, present_key, present_value, past_length, attn_output, scale,
    new_tokens, num_heads, num_kv_heads, capacity, head_dim,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """:func:`attention_prefill` for one new token per row (S = 1): the rows of a tile are the heads of one group.

    Every row of a tile is at the same position, so all of them see the same keys. Grid (ceil(R / BLOCK_M), G, B).
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = num_heads // num_kv_heads
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    past = tl.load(past_length + b)
    keys = tl.minimum(past + 1, capacity).to(tl.int32)
    cache = (b * num_kv_heads + g) * capacity
    attend(
        rotated_query, present_key, present_value, None, attn_output, scale, b * num_heads + g * group + r, r < group,
        past + r * 0, keys, cache, head_dim, HEAD_DIM, MASKED, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def attend(
    rotated_query, present_key, present_value, is_key, attn_output, scale, query_row, live, position, keys, cache,
    head_dim, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries over the first ``keys`` cached keys, BLOCK_N at a time, with a running softmax.

    query_row [BLOCK_M]: rows of rotated_query and attn_output, where ``live``; position [BLOCK_M]: the last key each
    query sees; cache: the row of present_key and present_value where this head's keys begin; is_key: int64, 0 for keys that
    nobody sees, or None: all are seen. Keys and values that nobody sees are not loaded.
    """
    d = tl.arange(0, HEAD_DIM)
    width = head_dim if MASKED else HEAD_DIM
    n = tl.arange(0, BLOCK_N)
    in_head = d < width
    q = tl.load(
        rotated_query + query_row[:, None] * width + d[None, :], mask=live[:, None] & in_head[None, :], other=0.0
    )
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, keys, BLOCK_N):
        j = start + n
        slot = (cache + j)[:, None] * width + d[None, :]
        seen = j < keys
        if is_key is not None:
            seen = seen & (tl.load(is_key + j, mask=seen, other=0) != 0)
        readable = seen[:, None] & in_head[None, :]
        k = tl.load(present_key + slot, mask=readable, other=0.0)
        v = tl.load(present_value + slot, mask=readable, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale
        visible = (j[None, :] <= position[:, None]) & seen[None, :]
        scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        # Where nothing was visible yet the maximum is -inf, and -inf - -inf is NaN.
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(scores - reference[:, None])
        shrink = tl.exp(maximum - reference)
        total = total * shrink + tl.sum(weights, 1)
        attended = dot(round_to(weights, v.dtype), v, attended * shrink[:, None])
        maximum = higher
    attended = attended / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        attn_output + query_row[:, None] * width + d[None, :],
        round_to(attended, attn_output.dtype.element_ty),
        mask=live[:, None] & in_head[None, :],
    )
