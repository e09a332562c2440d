"""Attention: rotate and append, then attend.

* over the static KV cache, many new tokens: :func:`attention_prefill`, a tile of queries per program;
* over the static KV cache, one or a few: :func:`attention_split`, a piece of the cache per program, whose results
  :func:`attention_combine` merges, so that a single row of a long cache occupies the whole GPU;
* over one padded batch whose rotated keys lie in a scratch cache of just its length: :func:`attention_padded`.

Shapes: B batch, S = ``new_tokens``, H = ``num_heads``, G = ``num_kv_heads``, R = H / G query heads per key/value head,
C = ``capacity`` of the cache, D = ``head_dim``. Token s of row b is at position ``past_length[b] + s``.
``HEAD_DIM`` is D padded to a power of two. ``WIDTH`` is D, known to the compiler; variants with ``WIDTH`` = 0 serve any even
D up to HEAD_DIM.

The rows of a tile are (token, head of the group) pairs, so that the R heads of a group read their keys and values once.

Numerics: RoPE in float32 with the float32 cos and sin it is given, one rounding. Scores, softmax (in base 2) and the
weighted sum accumulate in float32; the softmax weights are rounded to the model dtype before they multiply 16-bit values.
Cache entries at or past ``past_length + S`` are never loaded. No atomics: the same launch gives the same bits, and what a
row of the batch gets depends neither on the other rows nor on how many there are. The pieces of the split follow from C
alone, so another capacity may round differently.

Source: RoPE https://arxiv.org/abs/2104.09864; online softmax https://arxiv.org/abs/1805.02867 (algorithm 3);
tiling https://arxiv.org/abs/2307.08691; splitting the cache https://pytorch.org/blog/flash-decoding;
grouped queries https://arxiv.org/abs/2305.13245
"""

import triton
import triton.language as tl

from .numerics import dot, round_to

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = 2^(x * LOG2_E), and powers of two are what the hardware computes."""


@triton.jit
def rotate_and_append(
    query, key, value, cos, sin, past_length, rotated_query, present_key, present_value,
    new_tokens, num_heads, num_kv_heads, capacity, head_dim, query_stride, key_stride, value_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Rotates query and key by their position and writes key and value into the cache.

    query [B, S, H, D], key and value [B, S, G, D], ``*_stride`` elements from token to token; cos, sin [B, S, D/2];
    rotated_query [B, S, H, D], dense; present_key, present_value [B, G, C, D]. A position outside the cache is skipped.
    Grid (B * S, 1, 1): one program per token, ``HEADS`` heads at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    b = token // new_tokens
    position = tl.load(past_length + b) + token % new_tokens
    width = head_dim if WIDTH == 0 else WIDTH
    half = width // 2
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
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Causal attention of S new tokens over a cache that already holds them.

    rotated_query, attn_output [B, S, H, D]; present_key, present_value [B, G, C, D]. Query s of row b sees key j iff
    j <= past_length[b] + s; one that sees nothing yields 0. Grid (ceil(S * R / BLOCK_M), G, B), longest tiles first.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = num_heads // num_kv_heads
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    s = row // group
    past = tl.load(past_length + b)
    last = past + tl.minimum(new_tokens - 1, (first + BLOCK_M - 1) // group)
    keys = tl.minimum(last + 1, capacity).to(tl.int32)  # how many the last row of the tile sees
    seen_by_all = tl.minimum(past + first // group + 1, capacity).to(tl.int32)
    query_row = (b * new_tokens + s) * num_heads + g * group + row % group
    live = row < new_tokens * group
    cache = (b * num_kv_heads + g) * capacity
    _, total, attended = attend(
        rotated_query, present_key, present_value, None, scale, query_row, live, past + s, 0, seen_by_all, keys, cache,
        head_dim, HEAD_DIM, WIDTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store(attn_output, query_row, live, divided(attended, total), head_dim, HEAD_DIM, WIDTH)


@triton.jit
def attention_padded(
    rotated_query, rotated_key, value, attention_mask, attn_output, scale,
    num_tokens, num_heads, num_kv_heads, head_dim,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Causal attention of S = ``num_tokens`` tokens over themselves, tokens whose mask is 0 left out as keys.

    rotated_query, attn_output [B, S, H, D]; rotated_key, value [B, G, S, D]; attention_mask int64 [B, S]. Query i of row b
    sees key j iff j <= i and attention_mask[b, j] != 0; one that sees nothing yields 0. Grid as in
    :func:`attention_prefill`.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = num_heads // num_kv_heads
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    s = row // group
    keys = tl.minimum(num_tokens, (first + BLOCK_M - 1) // group + 1)
    query_row = (b * num_tokens + s) * num_heads + g * group + row % group
    live = row < num_tokens * group
    _, total, attended = attend(
        rotated_query, rotated_key, value, attention_mask + b * num_tokens, scale, query_row, live, s, 0, 0, keys,
        (b * num_kv_heads + g) * num_tokens, head_dim, HEAD_DIM, WIDTH, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store(attn_output, query_row, live, divided(attended, total), head_dim, HEAD_DIM, WIDTH)


@triton.jit
def attention_split(
    rotated_query, present_key, present_value, past_length, attn_output, partial_output, partial_softmax, scale,
    new_tokens, num_heads, num_kv_heads, capacity, head_dim, num_splits, split_keys,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """:func:`attention_prefill` for few new tokens: a program attends over the ``split_keys`` keys of one piece of the cache.

    ``num_splits`` = ceil(C / split_keys). Grid (ceil(S * R / BLOCK_M) * num_splits, G, B). A piece that no query of the tile
    reaches writes nothing; a piece that is the only one writes attn_output; else, for :func:`attention_combine`,
    partial_output float32 [B, S, H, num_splits, D]: the weighted sum, not yet divided; and partial_softmax float32
    [B, S, H, num_splits, 2]: the largest score, in base 2, and the sum of the weights relative to it.
    """
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = num_heads // num_kv_heads
    split = tl.program_id(0) % num_splits
    first = tl.program_id(0) // num_splits * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    s = row // group
    past = tl.load(past_length + b)
    keys = tl.minimum(past + new_tokens, capacity).to(tl.int32)
    begin = split * split_keys
    if (begin < keys) | (num_splits == 1):  # a single piece writes the result even where there is nothing to see
        end = tl.minimum(keys, begin + split_keys)
        seen_by_all = tl.minimum(past + first // group + 1, end).to(tl.int32)
        query_row = (b * new_tokens + s) * num_heads + g * group + row % group
        live = row < new_tokens * group
        maximum, total, attended = attend(
            rotated_query, present_key, present_value, None, scale, query_row, live, past + s, begin, seen_by_all, end,
            (b * num_kv_heads + g) * capacity, head_dim, HEAD_DIM, WIDTH, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if num_splits == 1:
            store(attn_output, query_row, live, divided(attended, total), head_dim, HEAD_DIM, WIDTH)
        else:
            piece = query_row * num_splits + split
            store(partial_output, piece, live, attended, head_dim, HEAD_DIM, WIDTH)
            tl.store(partial_softmax + piece * 2, maximum, mask=live)
            tl.store(partial_softmax + piece * 2 + 1, total, mask=live)


@triton.jit
def attention_combine(
    partial_output, partial_softmax, past_length, attn_output,
    new_tokens, num_heads, capacity, head_dim, num_splits, split_keys,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merges the pieces of :func:`attention_split`, in their order. Grid (B * S * H, 1, 1): one program per query head."""
    query_row = tl.program_id(0).to(tl.int64)
    b = query_row // num_heads // new_tokens
    keys = tl.minimum(tl.load(past_length + b) + new_tokens, capacity).to(tl.int32)
    written = (keys + split_keys - 1) // split_keys
    width = head_dim if WIDTH == 0 else WIDTH
    d = tl.arange(0, HEAD_DIM)
    in_head = d < width
    pieces = tl.arange(0, BLOCK_S)
    base = partial_output + query_row * num_splits * width
    softmax = partial_softmax + query_row * num_splits * 2

    maximum = tl.full([BLOCK_S], -float("inf"), tl.float32)
    for start in range(0, written, BLOCK_S):
        i = start + pieces
        maximum = tl.maximum(maximum, tl.load(softmax + i * 2, mask=i < written, other=-float("inf")))
    largest = tl.max(maximum, 0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)  # nothing was visible: all weights are 0 below
    total = tl.zeros([BLOCK_S], tl.float32)
    attended = tl.zeros([BLOCK_S, HEAD_DIM], tl.float32)
    for start in range(0, written, BLOCK_S):
        i = start + pieces
        live = i < written
        weight = tl.exp2(tl.load(softmax + i * 2, mask=live, other=-float("inf")) - largest)
        total += weight * tl.load(softmax + i * 2 + 1, mask=live, other=0.0)
        sums = tl.load(base + i[:, None] * width + d[None, :], mask=live[:, None] & in_head[None, :], other=0.0)
        attended += weight[:, None] * sums
    total_0d = tl.sum(total, 0)
    result = tl.sum(attended, 0) / tl.where(total_0d == 0.0, 1.0, total_0d)
    tl.store(attn_output + query_row * width + d, round_to(result, attn_output.dtype.element_ty), mask=in_head)


@triton.jit
def attend(
    rotated_query, present_key, present_value, is_key, scale, query_row, live, position, begin, seen_by_all, end, cache,
    head_dim, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries over the cached keys from ``begin`` to ``end``, BLOCK_N at a time.

    query_row [BLOCK_M]: rows of rotated_query, where ``live``; position [BLOCK_M]: the last key each query sees;
    seen_by_all: every query sees the keys before it, so whole blocks of them need no mask; cache: the row of present_key and
    present_value where this head's keys begin; is_key: int64, 0 for keys that nobody sees, or None: all are seen. Keys and
    values that nobody sees are not loaded.

    Returns the softmax so far: largest score [BLOCK_M] in base 2 (-inf: none), sum of the weights relative to it [BLOCK_M],
    weighted sum [BLOCK_M, HEAD_DIM].
    """
    d = tl.arange(0, HEAD_DIM)
    width = head_dim if WIDTH == 0 else WIDTH
    q_at = query_row[:, None] * width + d[None, :]
    q = tl.load(rotated_query + q_at, mask=live[:, None] & (d < width)[None, :], other=0.0)
    keys, values = present_key + cache * width, present_value + cache * width
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    whole = begin + tl.maximum(seen_by_all - begin, 0) // BLOCK_N * BLOCK_N
    if is_key is None:
        for start in range(begin, whole, BLOCK_N):
            maximum, total, attended = absorb(
                q, keys, values, None, scale, position, start, end, maximum, total, attended,
                head_dim, HEAD_DIM, WIDTH, BLOCK_N, False,
            )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        maximum, total, attended = absorb(
            q, keys, values, is_key, scale, position, start, end, maximum, total, attended,
            head_dim, HEAD_DIM, WIDTH, BLOCK_N, True,
        )  # fmt: skip
    return maximum, total, attended


@triton.jit
def absorb(
    q, keys, values, is_key, scale, position, start, end, maximum, total, attended,
    head_dim, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Takes one block of keys into the running softmax; EDGE: some of its keys some queries do not see."""
    d = tl.arange(0, HEAD_DIM)
    width = head_dim if WIDTH == 0 else WIDTH
    j = start + tl.arange(0, BLOCK_N)
    at = j[:, None] * width + d[None, :]
    seen = j < end
    if EDGE:
        if is_key is not None:
            seen = seen & (tl.load(is_key + j, mask=seen, other=0) != 0)
        readable = seen[:, None] & (d < width)[None, :]
        k = tl.load(keys + at, mask=readable, other=0.0)
        v = tl.load(values + at, mask=readable, other=0.0)
    elif WIDTH == HEAD_DIM:
        k = tl.load(keys + at)
        v = tl.load(values + at)
    else:
        in_head = (d < width)[None, :]
        k = tl.load(keys + at, mask=in_head, other=0.0)
        v = tl.load(values + at, mask=in_head, other=0.0)
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32)) * (scale * LOG2_E)
    if EDGE:
        visible = (j[None, :] <= position[:, None]) & seen[None, :]
        scores = tl.where(visible, scores, -float("inf"))
    higher = tl.maximum(maximum, tl.max(scores, 1))
    reference = higher
    if EDGE:  # where nothing was visible yet the maximum is -inf, and -inf - -inf is NaN
        reference = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(maximum - reference)
    total = total * shrink + tl.sum(weights, 1)
    attended = dot(round_to(weights, v.dtype), v, attended * shrink[:, None])
    return higher, total, attended


@triton.jit
def divided(attended, total):
    """The weighted sum over the sum of the weights; 0 where there are none."""
    return attended / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def store(pointer, row, live, values, head_dim, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rounds values [BLOCK_M, HEAD_DIM] to the pointer's dtype and stores them as rows of D elements."""
    d = tl.arange(0, HEAD_DIM)
    width = head_dim if WIDTH == 0 else WIDTH
    rounded = round_to(values, pointer.dtype.element_ty)
    tl.store(pointer + row[:, None] * width + d[None, :], rounded, mask=live[:, None] & (d < width)[None, :])
