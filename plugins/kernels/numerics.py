"""The two operations whose arithmetic is not the same under Triton's interpreter as on a GPU: rounding and products.

On a GPU a conversion rounds to nearest even and ``tl.dot`` multiplies 16-bit operands exactly into a float32 sum. The
interpreter (Triton 3.9) truncates float32 to bfloat16 and cannot multiply bfloat16 matrices. ``INTERPRETED`` says which
of the two runs; :mod:`.loop` sets it. Nothing else in the kernels depends on it.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(False)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # bfloat16 is the upper half: add just under half a unit of it, and the last bit that stays decides a tie.
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, total):
    """[M, K] @ [K, N] + total [M, N] in float32: float32 operands as they are (no tf32), 16-bit products exact."""
    if INTERPRETED:
        total += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        total = tl.dot(a, b, acc=total, input_precision="ieee")
    return total
