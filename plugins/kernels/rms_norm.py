"""RMSNorm, alone and after the residual sum. One program normalises one row of E = ``hidden_size`` elements.

    normed = round(x / sqrt(mean(x^2) + epsilon)) * weight

Numerics: squares, mean, root and quotient in float32; rounded to the model dtype before the weight, and again after it
(the order of Hugging Face and of ONNX RMSNormalization). The residual sum is rounded before it is normalised.

Source: https://arxiv.org/abs/1910.07467
"""

import triton
import triton.language as tl

from .numerics import round_to


@triton.jit
def rms_norm(hidden_states, weight, normed, hidden_size, epsilon, BLOCK: tl.constexpr):
    """hidden_states, normed [rows, E]; weight [E]. Grid (rows, 1, 1)."""
    if hidden_size % 16 == 0:  # told as a product, the compiler knows it, and loads vectors
        normalise_row(hidden_states, weight, normed, hidden_size // 16 * 16, epsilon, BLOCK)
    else:
        normalise_row(hidden_states, weight, normed, hidden_size, epsilon, BLOCK)


@triton.jit
def add_rms_norm(hidden_states, residual, weight, normed, new_residual, hidden_size, epsilon, BLOCK: tl.constexpr):
    """hidden_states, residual, normed, new_residual [rows, E]; weight [E]. Grid (rows, 1, 1)."""
    if hidden_size % 16 == 0:
        add_and_normalise_row(
            hidden_states, residual, weight, normed, new_residual, hidden_size // 16 * 16, epsilon, BLOCK
        )
    else:
        add_and_normalise_row(hidden_states, residual, weight, normed, new_residual, hidden_size, epsilon, BLOCK)


@triton.jit
def normalise_row(hidden_states, weight, normed, hidden_size, epsilon, BLOCK: tl.constexpr):
    """One row of :func:`rms_norm`."""
    row = tl.program_id(0).to(tl.int64) * hidden_size
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden_size, BLOCK):
        e = start + lane
        x = tl.load(hidden_states + row + e, mask=e < hidden_size, other=0.0).to(tl.float32)
        squares += x * x
    inverse_rms = tl.rsqrt(tl.sum(squares, 0) / hidden_size + epsilon)
    for start in range(0, hidden_size, BLOCK):
        e = start + lane
        x = tl.load(hidden_states + row + e, mask=e < hidden_size, other=0.0).to(tl.float32)
        scale_by_weight(x * inverse_rms, weight, normed + row, e, hidden_size)


@triton.jit
def add_and_normalise_row(
    hidden_states, residual, weight, normed, new_residual, hidden_size, epsilon, BLOCK: tl.constexpr
):
    """One row of :func:`add_rms_norm`."""
    row = tl.program_id(0).to(tl.int64) * hidden_size
    lane = tl.arange(0, BLOCK)
    dtype = new_residual.dtype.element_ty
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden_size, BLOCK):
        e = start + lane
        x = rounded_sum(hidden_states + row, residual + row, e, hidden_size, dtype)
        squares += x.to(tl.float32) * x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(squares, 0) / hidden_size + epsilon)
    for start in range(0, hidden_size, BLOCK):
        e = start + lane
        x = rounded_sum(hidden_states + row, residual + row, e, hidden_size, dtype)
        # Stored in this loop and not in the first, so that new_residual may be the same memory as residual.
        tl.store(new_residual + row + e, x, mask=e < hidden_size)
        scale_by_weight(x.to(tl.float32) * inverse_rms, weight, normed + row, e, hidden_size)


@triton.jit
def rounded_sum(hidden_states, residual, e, hidden_size, dtype: tl.constexpr):
    """hidden_states + residual at the elements e of one row, added in float32 and rounded to the model dtype."""
    x = tl.load(hidden_states + e, mask=e < hidden_size, other=0.0).to(tl.float32)
    y = tl.load(residual + e, mask=e < hidden_size, other=0.0).to(tl.float32)
    return round_to(x + y, dtype)


@triton.jit
def scale_by_weight(x, weight, normed, e, hidden_size):
    """Rounds the normalised x [BLOCK], multiplies by the weight, rounds again and stores."""
    dtype = normed.dtype.element_ty
    w = tl.load(weight + e, mask=e < hidden_size, other=0.0).to(tl.float32)
    y = round_to(x, dtype).to(tl.float32) * w
    tl.store(normed + e, round_to(y, dtype), mask=e < hidden_size)
