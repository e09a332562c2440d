"""RMSNorm, alone and after the residual sum. One program normalises ROWS rows of E = ``hidden_size`` elements.

    normed = round(x / sqrt(mean(x^2) + epsilon)) * weight

Rows that fit a program's registers (``HIDDEN_SIZE`` elements, padded to a power of two) are read once, 16 bytes at a time; the
variant for longer ones (``HIDDEN_SIZE`` = 0) reads them twice, ``BLOCK`` elements at a time. So do all where E is no multiple of
16: such rows are loaded element by element, and to hold one would double the registers of the kernel, whichever way it takes,
and halve the programs that a GPU keeps under way.

Numerics: squares, mean, root and quotient in float32; rounded to the model dtype before the weight, and again after it
(the order of Hugging Face and of ONNX RMSNormalization). The residual sum is rounded before it is normalised.

Source: https://arxiv.org/abs/1910.07467
"""

import triton
import triton.language as tl

from .numerics import round_to

UNALIGNED_BLOCK = tl.constexpr(1024)
"""Elements at a time where they are loaded one by one."""


@triton.jit
def rms_norm(
    hidden_states, weight, normed, num_rows, hidden_size, epsilon,
    HIDDEN_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden_states, normed [num_rows, E]; weight [E]. Grid (ceil(num_rows / ROWS), 1, 1)."""
    if hidden_size % 16 == 0:  # told as a product, the compiler knows it, and loads vectors
        size = hidden_size // 16 * 16
        normalise(hidden_states, None, weight, normed, None, num_rows, size, epsilon, HIDDEN_SIZE, ROWS, BLOCK)
    else:
        normalise_unaligned(hidden_states, None, weight, normed, None, num_rows, hidden_size, epsilon, ROWS)


@triton.jit
def add_rms_norm(
    hidden_states, residual, weight, normed, new_residual, num_rows, hidden_size, epsilon,
    HIDDEN_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden_states, residual, normed, new_residual [num_rows, E]; weight [E]. Grid (ceil(num_rows / ROWS), 1, 1).

    new_residual may be the same memory as residual.
    """
    if hidden_size % 16 == 0:
        size = hidden_size // 16 * 16
        normalise(
            hidden_states, residual, weight, normed, new_residual, num_rows, size, epsilon, HIDDEN_SIZE, ROWS, BLOCK
        )
    else:
        normalise_unaligned(hidden_states, residual, weight, normed, new_residual, num_rows, hidden_size, epsilon, ROWS)


@triton.jit
def normalise(
    hidden_states, residual, weight, normed, new_residual, num_rows, hidden_size, epsilon,
    HIDDEN_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of one program; ``residual`` and ``new_residual`` are None where nothing is added."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    if HIDDEN_SIZE == 0:
        normalise_long_row(hidden_states, residual, weight, normed, new_residual, first, hidden_size, epsilon, BLOCK)
    else:
        e = tl.arange(0, HIDDEN_SIZE)
        row = first + tl.arange(0, ROWS)
        live = (row < num_rows)[:, None] & (e < hidden_size)[None, :]
        at = row[:, None] * hidden_size + e[None, :]
        w = tl.load(weight + e, mask=e < hidden_size, other=0.0).to(tl.float32)
        x = summand(hidden_states, residual, at, live)
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / hidden_size + epsilon)
        if new_residual is not None:
            tl.store(new_residual + at, x.to(new_residual.dtype.element_ty), mask=live)  # rounded already
        store_weighted(x * inverse_rms[:, None], w[None, :], normed, at, live)


@triton.jit
def normalise_unaligned(
    hidden_states, residual, weight, normed, new_residual, num_rows, hidden_size, epsilon, ROWS: tl.constexpr
):
    """The rows of one program, one after the other, where E is no multiple of 16."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        normalise_long_row(
            hidden_states, residual, weight, normed, new_residual, row, hidden_size, epsilon, UNALIGNED_BLOCK
        )


@triton.jit
def normalise_long_row(
    hidden_states, residual, weight, normed, new_residual, row, hidden_size, epsilon, BLOCK: tl.constexpr
):
    """One row, twice through it: for the sum of squares, and for the results."""
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden_size, BLOCK):
        e = start + lane
        x = summand(hidden_states, residual, row * hidden_size + e, e < hidden_size)
        squares += x * x
    inverse_rms = tl.rsqrt(tl.sum(squares, 0) / hidden_size + epsilon)
    for start in range(0, hidden_size, BLOCK):
        e = start + lane
        live, at = e < hidden_size, row * hidden_size + e
        x = summand(hidden_states, residual, at, live)
        # Stored in this loop and not in the first, so that new_residual may be the same memory as residual.
        if new_residual is not None:
            tl.store(new_residual + at, x.to(new_residual.dtype.element_ty), mask=live)
        store_weighted(x * inverse_rms, tl.load(weight + e, mask=live, other=0.0).to(tl.float32), normed, at, live)


@triton.jit
def summand(hidden_states, residual, at, live):
    """What is normalised, as float32: hidden_states, or its sum with the residual, rounded to the model dtype."""
    x = tl.load(hidden_states + at, mask=live, other=0.0).to(tl.float32)
    if residual is not None:
        x += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
        x = round_to(x, residual.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def store_weighted(x, weight, normed, at, live):
    """Rounds the normalised x, multiplies by the weight, rounds again and stores."""
    dtype = normed.dtype.element_ty
    y = round_to(x, dtype).to(tl.float32) * weight
    tl.store(normed + at, round_to(y, dtype), mask=live)
