"""Single PTX instructions, and the checks of the machine that runs them.

The oracles are made from the words of the PTX ISA: Python's integers, exact fractions that are rounded once, torch's
conversions, explicit loops over fragments. Nothing of the package computes what is expected.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("llama_export_plugins", reason="the plugins are not installed: pip install ./plugins")
from llama_export_plugins.ptx import Buffer, GlobalMemory, Program, PtxError, Traffic, launch
from llama_export_plugins.ptx.arithmetic import CONVERSIONS
from ptx_support import Array, Layout, bits_of, each, encoded, k_major, kernel, mn_major, run, small, value_of

EACH = settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
SEEDS = st.integers(0, 2**32 - 1)
LANES = 128
"""Operands that one launch tries."""


# ---- values, their bits, and rounding ---------------------------------------------------------------------------

UNSIGNED = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127)}
"""Bits of the significand, exponents of the smallest and of the largest normal number."""


def width_of(kind: str) -> int:
    """``s32`` -> 32, ``f16x2`` -> 32, ``pred`` -> 1"""
    if kind == "pred":
        return 1
    return math.prod(int(number) for number in re.findall(r"\d+", kind))


def signed(bits: int, width: int) -> int:
    """Two's complement."""
    return bits - (1 << width) if bits >> (width - 1) else bits


def nearest(value: Fraction, kind: str) -> int:
    """Bits of the nearest number, ties to even: IEEE 754's definition. ``value`` is not 0."""
    precision, lowest, highest = FORMATS[kind]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    exponent = max(exponent, lowest)
    count = round(magnitude / Fraction(2) ** (exponent - precision + 1))
    infinity = (highest - lowest + 2) << (precision - 1)
    bits = min(((exponent - lowest) << (precision - 1)) + count, infinity)
    return int(bits | (int(value < 0) << (width_of(kind) - 1)))


def rounded_once(function: Callable[..., Any], kind: str) -> Callable[..., int]:
    """``function`` of bits: exact, then rounded."""

    def on_bits(*operands: int) -> int:
        values = [value_of(item, kind) for item in operands]
        if all(math.isfinite(item) for item in values):
            exact = function(*map(Fraction, values))
            if exact:
                return nearest(exact, kind)
        return bits_of(function(*values), kind)  # zeros with their signs, infinities and NaN are exact in float64

    return on_bits


def in_halves(function: Callable[..., int], half: int) -> Callable[..., int]:
    """The same of two values in one register."""
    mask = (1 << half) - 1

    def on_both(*operands: int) -> int:
        low, high = (function(*(item >> shift & mask for item in operands)) for shift in (0, half))
        return low | high << half

    return on_both


def is_nan(bits: int, kind: str) -> bool:
    return kind in FORMATS and math.isnan(value_of(bits, kind))


def same(got: int, want: int, kind: str) -> bool:
    """Bit for bit, but for the payload of NaN."""
    if kind.endswith("x2"):
        element, half = kind.removesuffix("x2"), width_of(kind) // 2
        mask = (1 << half) - 1
        return same(got & mask, want & mask, element) and same(got >> half, want >> half, element)
    return got == want or (is_nan(got, kind) and is_nan(want, kind))


def drawn(draw: random.Random, kind: str) -> int:
    """Bits of an operand: corner cases, ties, numbers of like size, anything."""
    if kind.endswith("x2"):
        element = kind.removesuffix("x2")
        return drawn(draw, element) | drawn(draw, element) << (width_of(kind) // 2)
    if kind == "pred":
        return draw.getrandbits(1)
    if kind == "amount":
        return draw.choice([*range(70), 255, 256, 1 << 31, (1 << 32) - 1])
    width = width_of(kind)
    top = 1 << (width - 1)
    if kind not in FORMATS:
        corners = [0, 1, 2, 3, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 0x5555555555555555 & (2 * top - 1)]
        return draw.choice([draw.choice(corners), draw.getrandbits(width), draw.getrandbits(width) >> (width // 2)])
    precision = FORMATS[kind][0]
    one, infinity = bits_of(1.0, kind), bits_of(math.inf, kind)
    sign = draw.getrandbits(1) * top
    near = one + (draw.randint(-precision - 2, precision + 2) << (precision - 1))
    few = draw.choice([0, 1, 1 << (precision - 2), (1 << (precision - 1)) - 1, 1 << draw.randrange(precision - 1)])
    return sign | draw.choice([
        draw.choice([0, 1, infinity, infinity - 1, infinity + 1, infinity | 1 << (precision - 2), 1 << (precision - 1)]),
        near | few, near | few, near | draw.getrandbits(precision - 1), draw.getrandbits(width - 1),
    ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """What an instruction computes."""

    opcode: str
    operands: tuple[str, ...]
    """Types; ``amount`` is a u32 such as the distance of a shift."""
    result: str
    compute: Callable[..., int]
    """Bits to bits; higher bits than the result's are cut off."""

    def check(self, cases: Iterable[Sequence[int]]) -> None:
        columns = list(zip(*cases, strict=True))
        widths = [32 if kind == "amount" else width_of(kind) for kind in self.operands]
        inputs: list[Array] = [np.array(column, UNSIGNED[width]) for column, width in zip(columns, widths, strict=True)]
        width = width_of(self.result)
        listed = ", ".join(f"${index}" for index in range(len(inputs)))
        (found,) = each(f"    {self.opcode} $d0, {listed};", *inputs, out=[UNSIGNED[width]])
        for got, *operands in zip(found.tolist(), *columns, strict=True):
            want = self.compute(*operands) & ((1 << width) - 1)
            shown = f"{self.opcode} of {', '.join(map(hex, operands))}: {int(got):#x}, expected {want:#x}"
            assert same(int(got), want, self.result), shown

    def draw(self, seed: int) -> list[list[int]]:
        draw = random.Random(seed)
        return [[drawn(draw, kind) for kind in self.operands] for _ in range(LANES)]


def of_signed(function: Callable[..., int], *kinds: str) -> Callable[..., int]:
    """``function`` of integers as their types see them."""
    return lambda *bits: function(
        *(signed(item, width_of(kind)) if kind[0] == "s" else item for item, kind in zip(bits, kinds, strict=True))
    )


# ---- integers ---------------------------------------------------------------------------------------------------


def quotient(a: int, b: int) -> int:
    """Towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field_of(bits: int, position: int, length: int, *, is_signed: bool) -> int:
    """``bfe``, bit for bit as the ISA writes it."""
    position, length = position & 0xFF, length & 0xFF
    fill = bits >> min(position + length - 1, 31) & 1 if is_signed and length else 0
    found = 0
    for index in range(32):
        inside = index < length and position + index <= 31
        found |= (bits >> (position + index) & 1 if inside else fill) << index
    return found


def integer_rules() -> Iterable[Rule]:
    def rule(opcode: str, operands: str, result: str, function: Callable[..., int]) -> Rule:
        kinds = operands.split()
        return Rule(opcode, tuple(kinds), result, of_signed(function, *("u32" if k == "amount" else k for k in kinds)))

    for kind in ("s32", "u32", "s64", "u64", "s16", "u16"):
        yield rule(f"add.{kind}", f"{kind} {kind}", kind, operator.add)
        yield rule(f"sub.{kind}", f"{kind} {kind}", kind, operator.sub)
        yield rule(f"mul.lo.{kind}", f"{kind} {kind}", kind, operator.mul)
        yield rule(f"mad.lo.{kind}", f"{kind} {kind} {kind}", kind, lambda a, b, c: a * b + c)
        yield rule(f"min.{kind}", f"{kind} {kind}", kind, min)
        yield rule(f"max.{kind}", f"{kind} {kind}", kind, max)
    for kind in ("s16", "s32", "s64"):
        yield rule(f"neg.{kind}", kind, kind, operator.neg)
    for kind in ("b16", "b32", "b64", "pred"):
        yield rule(f"and.{kind}", f"{kind} {kind}", kind, operator.and_)
        yield rule(f"or.{kind}", f"{kind} {kind}", kind, operator.or_)
        yield rule(f"xor.{kind}", f"{kind} {kind}", kind, operator.xor)
        yield rule(f"not.{kind}", kind, kind, operator.invert)
        yield rule(f"mov.{kind}", kind, kind, lambda a: a)
    for kind in ("s32", "u32"):
        wide = f"{kind[0]}64"
        yield rule(f"mul.wide.{kind}", f"{kind} {kind}", wide, operator.mul)
        yield rule(f"mad.wide.{kind}", f"{kind} {kind} {wide}", wide, lambda a, b, c: a * b + c)
    for kind in ("b16", "b32", "b64"):
        yield rule(f"shl.{kind}", f"{kind} amount", kind, lambda a, n: a << min(n, 64))  # the width or more: 0
    for kind in ("u32", "s32", "u64", "s64"):
        yield rule(f"shr.{kind}", f"{kind} amount", kind, lambda a, n: a >> n)  # the width or more: 0, or all signs
    for kind in ("b16", "b32", "b64", "f32"):
        yield rule(f"selp.{kind}", f"{kind} {kind} pred", kind, lambda a, b, chosen: a if chosen else b)


@pytest.mark.parametrize("rule", list(integer_rules()), ids=lambda rule: rule.opcode)
@EACH
@given(seed=SEEDS)
def test_integer_instructions_are_pythons(rule: Rule, seed: int) -> None:
    rule.check(rule.draw(seed))


@pytest.mark.parametrize(
    ("opcode", "function"), [("div.s32", quotient), ("rem.s32", lambda a, b: a - b * quotient(a, b))]
)
@EACH
@given(seed=SEEDS)
def test_division_goes_towards_zero(opcode: str, function: Callable[[int, int], int], seed: int) -> None:
    """And the remainder has the sign of the dividend. A quotient of 2^31 is nobody's: the ISA does not say."""
    rule = Rule(opcode, ("s32", "s32"), "s32", of_signed(function, "s32", "s32"))
    cases = [(a, b) for a, b in rule.draw(seed) if b and (a, b) != (1 << 31, (1 << 32) - 1)]
    rule.check([*cases, (7, 2), (-7 & 0xFFFFFFFF, 2), (7, -2 & 0xFFFFFFFF), (-7 & 0xFFFFFFFF, -2 & 0xFFFFFFFF)])


def test_division_by_zero_is_refused() -> None:
    with pytest.raises(PtxError, match=r"div\.s32.*division by zero"):
        each("    div.s32 $d0, $0, $1;", np.ones(32, np.uint32), np.zeros(32, np.uint32))


@pytest.mark.parametrize("opcode", ["bfe.u32", "bfe.s32"])
@EACH
@given(seed=SEEDS)
def test_a_bit_field_inside_the_register(opcode: str, seed: int) -> None:
    draw = random.Random(seed)
    is_signed = opcode == "bfe.s32"
    rule = Rule(opcode, ("b32", "u32", "u32"), "b32", lambda *bits: field_of(*bits, is_signed=is_signed))
    positions = [draw.randrange(32) for _ in range(LANES)]
    rule.check([(drawn(draw, "b32"), position, draw.randint(1, 32 - position)) for position in positions])


@pytest.mark.parametrize("opcode", ["bfe.u32", "bfe.s32"])
@EACH
@given(seed=SEEDS)
def test_a_bit_field_that_leaves_the_register_or_is_empty(opcode: str, seed: int) -> None:
    draw = random.Random(seed)
    is_signed = opcode == "bfe.s32"
    rule = Rule(opcode, ("b32", "u32", "u32"), "b32", lambda *bits: field_of(*bits, is_signed=is_signed))
    places = [0, 1, 5, 16, 30, 31, 32, 33, 64, 255]
    rule.check([(drawn(draw, "b32"), draw.choice(places), draw.choice(places)) for _ in range(LANES)])


COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "u16", "b16", "s32", "u32", "b32", "s64", "u64", "b64"])
@EACH
@given(seed=SEEDS)
def test_comparisons_of_integers(kind: str, seed: int) -> None:
    for name, function in COMPARISONS.items():
        if kind[0] == "b" and name not in ("eq", "ne"):
            continue
        rule = Rule(f"setp.{name}.{kind}", (kind, kind), "pred", of_signed(function, kind, kind))
        rule.check([*rule.draw(seed), *((item[0], item[0]) for item in rule.draw(seed + 1)[:8])])


@pytest.mark.parametrize("name", COMPARISONS)
@EACH
@given(seed=SEEDS)
def test_comparisons_with_nan_are_false(name: str, seed: int) -> None:
    """``ne`` too: it is an ordered comparison. Both zeros are equal."""

    def compare(a: int, b: int) -> int:
        left, right = value_of(a, "f32"), value_of(b, "f32")
        return not (math.isnan(left) or math.isnan(right)) and COMPARISONS[name](left, right)

    rule = Rule(f"setp.{name}.f32", ("f32", "f32"), "pred", compare)
    corners = [bits_of(item, "f32") for item in (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan)]
    rule.check([*rule.draw(seed), *itertools.product(corners, corners)])


@pytest.mark.parametrize(
    ("instruction", "value", "want"),
    [
        ("add.s32 $d0, $0, -5", 3, -2),
        ("and.b32 $d0, $0, 0xF0", 0xABCD, 0xC0),
        ("sub.s32 $d0, 7, $0", 9, -2),
        ("setp.lt.s32 %p9, $0, -1; selp.b32 $d0, 1, 0, %p9", -2 & 0xFFFFFFFF, 1),
        ("mov.pred %p9, -1; selp.f32 $d0, 0f3F800000, 0fFF800000, %p9", 0, 0x3F800000),
        ("mov.b32 $d0, 0fBF800000", 0, 0xBF800000),
        ("mul.wide.s32 %rd9, $0, -3; cvt.u32.u64 $d0, %rd9", 5, -15),
        ("bfe.u32 $d0, $0, 4, 8", 0xABCDE, 0xCD),
        ("mov.b16 %rs9, -1; cvt.u32.u16 $d0, %rs9", 0, 0xFFFF),
        ("mov.pred %p9, 0; selp.b32 $d0, 5, -6, %p9", 0, -6),
        ("mov.b32 $d0, %ntid.x", 0, 32),
        ("mov.b32 $d0, global_smem", 1, 0),
    ],
)
def test_numbers_among_the_operands(instruction: str, value: int, want: int) -> None:
    (found,) = each(f"    {instruction};", np.full(32, value, np.uint32))
    assert set(found.tolist()) == {want & 0xFFFFFFFF}


@pytest.mark.parametrize(
    ("instruction", "value", "want"),
    [
        ("add.s64 $d0, $0, -1", 0, -1),
        ("mov.b64 $d0, -2", 0, -2),
        ("shl.b64 $d0, $0, 40", 3, 3 << 40),
        ("mul.lo.s64 $d0, $0, -4", 1 << 33, -(1 << 35)),
        ("and.b64 $d0, $0, 0xFFFFFFFF00000000", -1 & (2**64 - 1), 0xFFFFFFFF00000000),
        ("cvt.u32.u64 %r9, $0; mad.wide.s32 $d0, %r9, 4, -8", 1, -4),
        ("setp.lt.s64 %p9, $0, -1; selp.b64 $d0, -7, 7, %p9", -2 & (2**64 - 1), -7),
    ],
)
def test_numbers_of_64_bits_among_the_operands(instruction: str, value: int, want: int) -> None:
    (found,) = each(f"    {instruction};", np.full(32, value, np.uint64), out=[np.uint64])
    assert set(found.tolist()) == {want & (2**64 - 1)}


@EACH
@given(seed=SEEDS)
def test_moves_pack_the_low_half_first(seed: int) -> None:
    draw = np.random.default_rng(seed)
    half = [draw.integers(0, 1 << 16, 32).astype(np.uint16) for _ in range(2)]
    word = [draw.integers(0, 1 << 32, 32).astype(np.uint32) for _ in range(2)]
    (found,) = each("    mov.b32 $d0, {$0, $1};", *half)
    assert found.tolist() == [int(low) | int(high) << 16 for low, high in zip(*half, strict=True)]
    (found,) = each("    mov.b64 $d0, {$0, $1};", *word, out=[np.uint64])
    assert found.tolist() == [int(low) | int(high) << 32 for low, high in zip(*word, strict=True)]


@EACH
@given(seed=SEEDS)
def test_moves_unpack_the_low_half_first(seed: int) -> None:
    """``_`` stands for a half that nobody wants."""
    draw = np.random.default_rng(seed)
    word = draw.integers(0, 1 << 32, 32).astype(np.uint32)
    wide = draw.integers(0, 1 << 64, 32, np.uint64)
    low, high = each("    mov.b32 {$d0, $d1}, $0;", word, out=[np.uint16, np.uint16])
    assert low.tolist() == [item & 0xFFFF for item in word.tolist()]
    assert high.tolist() == [item >> 16 for item in word.tolist()]
    low, high = each("    mov.b64 {$d0, _}, $0;\n    mov.b64 {_, $d1}, $0;", wide, out=[np.uint32, np.uint32])
    assert low.tolist() == [item & 0xFFFFFFFF for item in wide.tolist()]
    assert high.tolist() == [item >> 32 for item in wide.tolist()]


def test_a_half_that_nothing_was_put_into_packs_as_nan() -> None:
    """Compilers pack halves that they never take out again; whoever uses one sees it."""
    (found,) = each("    mov.b32 $d0, {$0, %rs31};", np.arange(32, dtype=np.uint16))
    assert found.tolist() == [0xFFFF0000 | item for item in range(32)]
    (found,) = each("    mov.b64 $d0, {%r400, $0};", np.arange(32, dtype=np.uint32), out=[np.uint64])
    assert found.tolist() == [item << 32 | 0xFFFFFFFF for item in range(32)]


# ---- floating point ---------------------------------------------------------------------------------------------

ARITHMETIC: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "fma.rn": (3, lambda a, b, c: a * b + c),
}


def float_rules() -> Iterable[Rule]:
    for kind, (name, (operands, function)) in itertools.product(FORMATS, ARITHMETIC.items()):
        one = rounded_once(function, kind)
        yield Rule(f"{name}.{kind}", (kind,) * operands, kind, one)
        yield Rule(f"{name}.{kind}x2", (f"{kind}x2",) * operands, f"{kind}x2", in_halves(one, width_of(kind)))
    yield Rule("neg.f32", ("f32",), "f32", lambda a: a ^ 1 << 31)
    yield Rule("abs.f32", ("f32",), "f32", lambda a: a & ~(1 << 31))


@pytest.mark.parametrize("rule", list(float_rules()), ids=lambda rule: rule.opcode)
@EACH
@given(seed=SEEDS)
def test_floating_point_instructions_round_the_exact_result_once(rule: Rule, seed: int) -> None:
    rule.check(rule.draw(seed))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_fused_multiply_add_looks_at_the_last_bit_of_its_addend(kind: str) -> None:
    """The product is halfway between two numbers, or next to that, and what is added tells which is nearer."""
    draw = random.Random(kind)
    precision, lowest, _ = FORMATS[kind]
    one = rounded_once(ARITHMETIC["fma.rn"][1], kind)
    tie_bits = {}
    for _ in range(200_000):  # factors whose product ends in a half of the last place
        a, b = (draw.randrange(1 << (precision - 1), 1 << precision) for _ in range(2))
        extra = (a * b).bit_length() - precision
        if a * b % (1 << extra) == 1 << (extra - 1):
            tie_bits[a, b] = extra
        if len(tie_bits) == 8:
            break
    cases = [(97, 172961)] if kind == "f32" else []  # 2^24 + 1
    scale = Fraction(2) ** (1 - precision)
    operands = []
    for a, b in [*cases, *tie_bits]:
        left, right = (bits_of(float(item * scale), kind) for item in (a, b))
        for step in (1, 2, precision, 2 * precision, -lowest - 1, -lowest + precision - 2):
            operands += [(left, right, bits_of(sign * 2.0**-step, kind)) for sign in (-1, 1)]
        operands.append((left, right, 0))
    assert operands
    Rule(f"fma.rn.{kind}", (kind,) * 3, kind, one).check(operands)
    both = [tuple(low | high << width_of(kind) for low, high in zip(*pair, strict=True)) for pair in
            zip(operands, operands[::-1], strict=True)]  # fmt: skip
    Rule(f"fma.rn.{kind}x2", (f"{kind}x2",) * 3, f"{kind}x2", in_halves(one, width_of(kind))).check(both)


def extreme(bits: Sequence[int], kind: str, largest: bool) -> int:
    """``min`` and ``max``: NaN only if all are; -0 is below +0."""
    numbers = [item for item in bits if not is_nan(item, kind)]
    if not numbers:
        return bits[0]
    ordered = sorted(numbers, key=lambda item: (value_of(item, kind), -(item >> (width_of(kind) - 1))))
    return ordered[-1 if largest else 0]


@pytest.mark.parametrize(("name", "count"), [("min", 2), ("max", 2), ("min", 3), ("max", 3)])
@EACH
@given(seed=SEEDS)
def test_the_extreme_of_some_numbers_leaves_out_nan(name: str, count: int, seed: int) -> None:
    rule = Rule(f"{name}.f32", ("f32",) * count, "f32", lambda *bits: extreme(bits, "f32", name == "max"))
    corners = [bits_of(item, "f32") for item in (1.0, -2.0, math.inf, -math.inf, math.nan)]
    rule.check([*filter(has_one_sign_of_zero, rule.draw(seed)), *itertools.product(corners, repeat=count)])


def has_one_sign_of_zero(bits: Sequence[int]) -> bool:
    return not {0, 1 << 31} <= set(bits)


@pytest.mark.parametrize(("name", "count"), [("min", 2), ("max", 2), ("min", 3), ("max", 3)])
def test_the_extreme_of_two_zeros_knows_their_signs(name: str, count: int) -> None:
    """The ISA: +0.0 > -0.0."""
    rule = Rule(f"{name}.f32", ("f32",) * count, "f32", lambda *bits: extreme(bits, "f32", name == "max"))
    rule.check(itertools.product([0, 1 << 31], repeat=count))


TINY = 2.0**-126
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, TINY, -TINY, TINY / 2, -TINY / 2, 2.0**-149, -(2.0**-149)]


def float32s(values: Iterable[float]) -> Array:
    return np.array(list(values), np.float32)


@EACH
@given(seed=SEEDS)
def test_the_power_of_two_is_near_and_subnormals_are_zero(seed: int) -> None:
    draw = random.Random(seed)
    values = float32s([*SPECIAL, -126.0, 127.0, 128.0, -1.0, *(draw.uniform(-140, 135) for _ in range(LANES))])
    (bits,) = each("    ex2.approx.ftz.f32 $d0, $0;", values.view(np.uint32))
    for value, got in zip(values.tolist(), bits.view(np.float32).tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(got)
            continue
        exact = math.exp2(value) if value < 1000 else math.inf
        if exact < TINY:
            assert got == 0, value
        elif exact >= 2.0**128:
            assert got == math.inf, value
        else:
            assert got == pytest.approx(exact, rel=2**-22), value


@EACH
@given(seed=SEEDS)
def test_the_inverse_square_root_is_near(seed: int) -> None:
    draw = random.Random(seed)
    values = float32s([1.0, 4.0, *(2.0 ** draw.uniform(-126, 127.9) for _ in range(LANES))])
    (bits,) = each("    rsqrt.approx.ftz.f32 $d0, $0;", values.view(np.uint32))
    for value, got in zip(values.tolist(), bits.view(np.float32).tolist(), strict=True):
        assert got == pytest.approx(1 / math.sqrt(value), rel=2**-22.9), value


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0.0, math.inf), (-0.0, -math.inf), (math.inf, 0.0), (-math.inf, math.nan), (-1.0, math.nan), (math.nan, math.nan),
        (TINY / 2, math.inf), (-TINY / 2, -math.inf),
    ],
)  # fmt: skip
def test_the_inverse_square_root_of_what_is_no_positive_number(value: float, want: float) -> None:
    """Subnormal numbers are zeros of their own sign."""
    (bits,) = each("    rsqrt.approx.ftz.f32 $d0, $0;", float32s([value] * 32).view(np.uint32))
    np.testing.assert_array_equal(bits.view(np.float32), float32s([want] * 32))


@EACH
@given(seed=SEEDS)
def test_a_full_range_division_is_near(seed: int) -> None:
    """2 units in the last place, where the ISA states it: a divisor between 2^-126 and 2^126."""
    draw = random.Random(seed)
    a, b = (float32s(draw.choice((-1, 1)) * 2.0 ** draw.uniform(-60, 60) for _ in range(LANES)) for _ in range(2))
    (bits,) = each("    div.full.f32 $d0, $0, $1;", a.view(np.uint32), b.view(np.uint32))
    for left, right, got in zip(a.tolist(), b.tolist(), bits.tolist(), strict=True):
        assert abs(got - nearest(Fraction(left) / Fraction(right), "f32")) <= 2, (left, right)
    corners = [(1.0, 0.0, math.inf), (-1.0, 0.0, -math.inf), (0.0, 0.0, math.nan), (math.inf, 2.0, math.inf)]
    corners += [(math.inf, math.inf, math.nan), (3.0, math.inf, 0.0), (math.nan, 1.0, math.nan)]
    left, right, want = (float32s(column) for column in zip(*corners, strict=True))
    (bits,) = each("    div.full.f32 $d0, $0, $1;", left.view(np.uint32), right.view(np.uint32))
    np.testing.assert_array_equal(bits.view(np.float32), want)


# ---- conversions ------------------------------------------------------------------------------------------------


def by_torch(kind: str) -> Callable[[int], int]:
    """Bits of a float32 -> bits of ``kind``, as torch rounds it."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]

    def convert(bits: int) -> int:
        value = torch.tensor(signed(bits, 32), dtype=torch.int32).view(torch.float32)
        return int(value.to(dtype).view(torch.int16)) & 0xFFFF

    return convert


def both_by_torch(kind: str) -> Callable[[int, int], int]:
    """The first operand goes into the high half."""
    one = by_torch(kind)
    return lambda high, low: one(high) << 16 | one(low)


CONVERSION_RULES = [
    Rule("cvt.s64.s32", ("s32",), "s64", of_signed(lambda a: a, "s32")),
    Rule("cvt.u64.u32", ("u32",), "u64", lambda a: a),
    Rule("cvt.u32.u64", ("u64",), "u32", lambda a: a),
    Rule("cvt.u16.u32", ("u32",), "u16", lambda a: a),
    Rule("cvt.u32.u16", ("u16",), "u32", lambda a: a),
    Rule("cvt.rn.f32.s32", ("s32",), "f32", of_signed(lambda a: nearest(Fraction(a), "f32") if a else 0, "s32")),
    Rule("cvt.f32.f16", ("f16",), "f32", lambda a: bits_of(value_of(a, "f16"), "f32")),
    Rule("cvt.f32.bf16", ("bf16",), "f32", lambda a: a << 16),
    Rule("cvt.rn.f16.f32", ("f32",), "f16", by_torch("f16")),
    Rule("cvt.rn.bf16.f32", ("f32",), "bf16", by_torch("bf16")),
    Rule("cvt.rn.f16x2.f32", ("f32", "f32"), "f16x2", both_by_torch("f16")),
    Rule("cvt.rn.bf16x2.f32", ("f32", "f32"), "bf16x2", both_by_torch("bf16")),
]


def test_every_conversion_has_an_oracle() -> None:
    assert {rule.opcode for rule in CONVERSION_RULES} == {name for name in CONVERSIONS if name.startswith("cvt.")}


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_fused_multiply_add_of_small_factors_is_rounded_once_to_float32(kind: str) -> None:
    """Factors and addend of about 1: their exact sum fits the 64 bits of a long double."""
    draw = np.random.default_rng(3)
    factors = [encoded(draw.uniform(0.5, 2, 256) * draw.choice([-1, 1], 256), kind) for _ in range(2)]
    addend = float32s(draw.uniform(-4, 4, 256))
    (found,) = each(f"    fma.rn.f32.{kind} $d0, $0, $1, $2;", *factors, addend.view(np.uint32))
    a, b = (np.array([value_of(int(bits), kind) for bits in item], np.longdouble) for item in factors)
    np.testing.assert_array_equal(found.view(np.float32), (a * b + addend).astype(np.float32))


@pytest.mark.parametrize("rule", CONVERSION_RULES, ids=lambda rule: rule.opcode)
@EACH
@given(seed=SEEDS)
def test_conversions(rule: Rule, seed: int) -> None:
    rule.check(rule.draw(seed))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@EACH
@given(seed=SEEDS)
def test_rounding_to_16_bits_is_torchs_around_every_tie(kind: str, seed: int) -> None:
    """A number of 16 bits, the middle to the next, and the float32 on either side of both."""
    draw = random.Random(seed)
    infinity = bits_of(math.inf, kind)
    cases = []
    for bits in [0, infinity - 1, *(draw.randrange(infinity) for _ in range(24))]:
        below = Fraction(value_of(bits, kind))
        above = Fraction(value_of(bits + 1, kind)) if bits + 1 < infinity else below + Fraction(2) ** (15 - 10)
        if bits + 1 == infinity and kind == "bf16":
            above = below + Fraction(2) ** (127 - 7)
        middle = nearest((below + above) / 2, "f32")
        exact = bits_of(float(below), "f32")
        cases += [exact, exact + 1, max(exact - 1, 0), middle - 1, middle, middle + 1]
    cases += [bits_of(item, "f32") for item in (math.inf, math.nan, 65519.0, 65520.0, 3.4e38)] + [
        0x7F800001,
        0x7FBFFFFF,
    ]
    cases += [item | 1 << 31 for item in cases]
    Rule(f"cvt.rn.{kind}.f32", ("f32",), kind, by_torch(kind)).check([[item] for item in cases])


# ---- between the threads of a warp ------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16, 31])
def test_a_butterfly_swaps_lanes(distance: int) -> None:
    values = np.random.default_rng(distance).integers(0, 1 << 32, 64).astype(np.uint32)
    (found,) = each(f"    shfl.sync.bfly.b32 $d0, $0, {distance}, 31, -1;", values)
    assert found.tolist() == [int(values[lane // 32 * 32 + (lane % 32 ^ distance)]) for lane in range(64)]


@EACH
@given(seed=SEEDS)
def test_an_indexed_shuffle_reads_the_lane_that_each_names(seed: int) -> None:
    draw = np.random.default_rng(seed)
    values, lanes = draw.integers(0, 1 << 32, 64).astype(np.uint32), draw.integers(0, 32, 64).astype(np.uint32)
    (found,) = each("    shfl.sync.idx.b32 $d0, $0, $1, 31, -1;", values, lanes)
    assert found.tolist() == [int(values[lane // 32 * 32 + lanes[lane]]) for lane in range(64)]
    (found,) = each("    shfl.sync.idx.b32 $d0, $0, 0, 31, -1;", values)
    assert found.tolist() == [int(values[lane // 32 * 32]) for lane in range(64)]


@EACH
@given(seed=SEEDS)
def test_a_reduction_gives_every_thread_the_largest_of_its_warp(seed: int) -> None:
    """NaN only if all are; -0 is below +0."""
    draw = random.Random(seed)
    pool = [bits_of(item, "f32") for item in (0.0, -0.0, -1.0, math.nan, -math.inf)]
    values = [drawn(draw, "f32") for _ in range(32)] + [draw.choice(pool[1:]) for _ in range(32)]
    values += [pool[3]] * 32 + [pool[1]] * 16 + [pool[0]] + [pool[1]] * 15
    (found,) = each("    redux.sync.max.f32 $d0, $0, -1;", np.array(values, np.uint32))
    for begin in range(0, 128, 32):
        want = extreme(values[begin : begin + 32], "f32", largest=True)
        for got in found[begin : begin + 32].tolist():
            assert same(got, want, "f32"), (hex(got), hex(want))


def test_an_election_chooses_one_thread_of_each_warp() -> None:
    """And tells all which."""
    leader, chosen = each("    elect.sync $d0|$d1, -1;", np.zeros(96, np.uint32), out=[np.uint32, np.bool_])
    for warp in range(3):
        (lane,) = np.flatnonzero(chosen[32 * warp : 32 * warp + 32])
        assert set(leader[32 * warp : 32 * warp + 32].tolist()) == {lane}


TILE_FORMS = [(count, transposed) for count in (1, 2, 4) for transposed in ("", ".trans")]


def places_of_rows(seed: int, count: int, warps: int) -> tuple[Array, Array]:
    """(byte where row r of tile i of a warp begins [warps, count, 8], the addresses that its lanes give [warps * 32])"""
    draw = np.random.default_rng(seed)
    places = 16 * draw.permutation(warps * count * 8).reshape(warps, count, 8)
    addresses = np.full((warps, 32), 0xFFF0, np.uint32)  # of the lanes that have no row, which is not looked at
    addresses[:, : 8 * count] = places.reshape(warps, -1)
    return places, addresses.ravel()


def elements_of_a_lane(lane: int, transposed: str) -> list[tuple[int, int]]:
    """(row, column) of the two elements of a tile that a lane holds, the low half first."""
    held = [(lane // 4, 2 * (lane % 4) + element) for element in (0, 1)]
    return [(column, row) for row, column in held] if transposed else held


@pytest.mark.parametrize(("count", "transposed"), TILE_FORMS)
def test_ldmatrix_spreads_the_rows_of_tiles_over_a_warp(count: int, transposed: str) -> None:
    image = np.random.default_rng(1).integers(0, 1 << 16, 1024, np.uint16)
    places, addresses = places_of_rows(2, count, 2)
    listed = ", ".join(f"$d{index}" for index in range(count))
    found = each(
        f"    ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{listed}}}, [$0];",
        addresses, out=[np.uint32] * count, shared=image.tobytes(),
    )  # fmt: skip
    for warp, lane, tile in itertools.product(range(2), range(32), range(count)):
        low, high = (
            int(image[places[warp, tile, row] // 2 + column]) for row, column in elements_of_a_lane(lane, transposed)
        )
        assert found[tile][32 * warp + lane] == low | high << 16, (warp, lane, tile)


@pytest.mark.parametrize(("count", "transposed"), TILE_FORMS)
def test_stmatrix_gathers_the_rows_of_tiles_from_a_warp(count: int, transposed: str) -> None:
    draw = np.random.default_rng(3)
    registers = [draw.integers(0, 1 << 32, 64).astype(np.uint32) for _ in range(count)]
    before = draw.integers(0, 1 << 16, 1024, np.uint16)
    places, addresses = places_of_rows(4, count, 2)
    listed = ", ".join(f"${index + 1}" for index in range(count))
    found = each(
        f"""    stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [$0], {{{listed}}};
    bar.sync 0;
    ld.shared.v4.b32 {{$d0, $d1, $d2, $d3}}, [%r1];
    ld.shared.v4.b32 {{$d4, $d5, $d6, $d7}}, [%r1+1024];""",
        addresses, *registers, out=[np.uint32] * 8, shared=before.tobytes(),
    )  # fmt: skip
    after = np.stack(found, axis=1).reshape(64, 2, 4).swapaxes(0, 1).ravel().view(np.uint16)
    want = before.copy()
    for warp, lane, tile in itertools.product(range(2), range(32), range(count)):
        bits = int(registers[tile][32 * warp + lane])
        for element, (row, column) in enumerate(elements_of_a_lane(lane, transposed)):
            want[places[warp, tile, row] // 2 + column] = bits >> 16 * element & 0xFFFF
    np.testing.assert_array_equal(after, want)


# ---- products ---------------------------------------------------------------------------------------------------


def a_place(lane: int, index: int) -> tuple[int, int]:
    """(row, column) of element a<index> of 16 x 16, as the ISA writes it for m16n8k16."""
    row = lane >> 2 if index < 2 or 4 <= index < 6 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (index & 1) + (0 if index < 4 else 8)


def b_place(lane: int, index: int) -> tuple[int, int]:
    """Of b<index> of 16 x 8."""
    return (lane % 4) * 2 + (index & 1) + (0 if index < 2 else 8), lane >> 2


def c_place(lane: int, index: int) -> tuple[int, int]:
    """Of c<index> of 16 x 8."""
    return (lane >> 2) + (0 if index < 2 else 8), (lane % 4) * 2 + (index & 1)


def registers_of(bits: Array, place: Callable[[int, int], tuple[int, int]], count: int) -> list[Array]:
    """A matrix of 16-bit elements -> ``count`` registers [32]: elements 2 i and 2 i + 1 are halves of register i."""
    return [
        np.array([
            int(bits[place(lane, 2 * index)]) | int(bits[place(lane, 2 * index + 1)]) << 16 for lane in range(32)
        ], np.uint32)
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_multiplies_the_fragments_of_a_warp(kind: str) -> None:
    """Two warps. Small integers, so that every order of the sum gives the same."""
    draw = np.random.default_rng(5)
    per_warp = []
    for _ in range(2):
        a, b, c = (draw.integers(-8, 9, shape) for shape in ((16, 16), (16, 8), (16, 8)))
        addend = [
            np.array([bits_of(float(c[c_place(lane, index)]), "f32") for lane in range(32)], np.uint32)
            for index in range(4)
        ]
        inputs = [*registers_of(encoded(a, kind), a_place, 4), *registers_of(encoded(b, kind), b_place, 2), *addend]
        want = np.zeros((16, 8))
        for row, column in itertools.product(range(16), range(8)):
            want[row, column] = c[row, column] + sum(float(a[row, k]) * float(b[k, column]) for k in range(16))
        per_warp.append((inputs, want))
    both = [np.concatenate(pair) for pair in zip(*(inputs for inputs, _ in per_warp), strict=True)]
    found = each(
        f"    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$d0, $d1, $d2, $d3}, {$0, $1, $2, $3}, {$4, $5}, {$6, $7, $8, $9};",
        *both, out=[np.uint32] * 4,
    )  # fmt: skip
    for warp, lane, index in itertools.product(range(2), range(32), range(4)):
        got = value_of(int(found[index][32 * warp + lane]), "f32")
        assert got == per_warp[warp][1][c_place(lane, index)], (warp, lane, index)


def test_mma_sums_near_the_exact_sum() -> None:
    """Numbers that are no integers, against float64: within the rounding of 17 float32 additions."""
    draw = np.random.default_rng(6)
    a, b = (draw.normal(size=shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    found = each(
        "    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$d0, $d1, $d2, $d3}, {$0, $1, $2, $3}, {$4, $5}, {%r500, %r500, %r500, %r500};".replace("%r500", "0f00000000"),
        *registers_of(a.view(np.uint16), a_place, 4), *registers_of(b.view(np.uint16), b_place, 2), out=[np.uint32] * 4,
    )  # fmt: skip
    for lane, index in itertools.product(range(32), range(4)):
        row, column = c_place(lane, index)
        terms = [float(a[row, k]) * float(b[k, column]) for k in range(16)]
        allowed = 17 * 2**-24 * sum(map(abs, terms))
        assert abs(value_of(int(found[index][lane]), "f32") - math.fsum(terms)) <= allowed


def wgmma(
    kind: str,
    n: int,
    a: Array,
    b: Array,
    a_layout: Layout | None,
    b_layout: Layout,
    *,
    step: int = 0,
    adds: bool = True,
) -> None:
    """Checks one product of each of ``len(a)`` warpgroups: a [groups, 64, k] (from registers: k is 16), b [n, k].

    ``step``: which 16 of a K-major operand's k; a start address in the midst of a swizzled line.
    """
    groups = len(a)
    image, draw = bytearray(), np.random.default_rng(7)
    room = 1 << 15
    image.extend(draw.bytes((groups + 1) * room))  # what is not written is never looked at
    b_layout.write(image, 0, encoded(b, kind))
    if a_layout is not None:
        for group in range(groups):
            a_layout.write(image, (group + 1) * room, encoded(a[group], kind))
    before = draw.integers(-8, 9, (groups, 64, n))
    k = slice(16 * step, 16 * step + 16)

    def d_place(lane: int, index: int) -> tuple[int, int]:
        row, column = c_place(lane, index % 4)
        return row, column + index // 4 * 8

    columns: list[list[Array]] = []
    for group, warp in itertools.product(range(groups), range(4)):
        rows = slice(16 * warp, 16 * warp + 16)
        accumulators = [
            np.array(
                [bits_of(float(before[group][rows][d_place(lane, index)]), "f32") for lane in range(32)], np.uint32
            )
            for index in range(n // 2)
        ]
        left = [np.full(32, a_layout.descriptor((group + 1) * room + 32 * step), np.uint64)] if a_layout else registers_of(
            encoded(a[group][rows][:, k], kind), a_place, 4
        )  # fmt: skip
        columns.append(
            [*accumulators, np.full(32, b_layout.descriptor(32 * step), np.uint64), np.full(32, adds), *left]
        )
    inputs = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    d = ", ".join(f"${index}" for index in range(n // 2))
    b_name, flag, first = (f"${n // 2 + index}" for index in range(3))
    if a_layout is None:
        left_text, flags = (
            "{" + ", ".join(f"${n // 2 + 2 + index}" for index in range(4)) + "}",
            f"{int(not b_layout.k_major)}",
        )
    else:
        left_text, flags = first, f"{int(not a_layout.k_major)}, {int(not b_layout.k_major)}"
    moves = "\n".join(f"    mov.b32 $d{index}, ${index};" for index in range(n // 2))
    found = each(
        f"""    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, {left_text}, {b_name}, {flag}, 1, 1, {flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
{moves}""",
        *inputs, out=[np.uint32] * (n // 2), shared=bytes(image),
    )  # fmt: skip
    want = np.zeros((groups, 64, n))
    for group, row, column in itertools.product(range(groups), range(64), range(n)):
        want[group, row, column] = float(np.dot(a[group][row, k].astype(np.float64), b[column, k].astype(np.float64)))
    want += before if adds else 0
    got = np.zeros_like(want)
    for index in range(n // 2):
        values = found[index].view(np.float32).reshape(groups, 4, 32)
        for group, warp, lane in itertools.product(range(groups), range(4), range(32)):
            row, column = d_place(lane, index)
            got[group, 16 * warp + row, column] = values[group, warp, lane]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wgmma_with_both_operands_in_shared_memory_k_major(kind: str, swizzle: int) -> None:
    wgmma(kind, 16, small(1, 1, 64, 16), small(2, 16, 16), k_major(swizzle), k_major(swizzle))


@pytest.mark.parametrize(("swizzle", "step"), [(128, 1), (128, 2), (128, 3), (64, 1)])
def test_wgmma_begins_in_the_midst_of_a_swizzled_line(swizzle: int, step: int) -> None:
    k = swizzle // 2
    wgmma("f16", 24, small(3, 1, 64, k), small(4, 24, k), k_major(swizzle), k_major(swizzle), step=step)


@pytest.mark.parametrize(("swizzle", "n"), [(128, 128), (64, 64), (32, 32), (32, 64)])
def test_wgmma_with_a_transposed_b(swizzle: int, n: int) -> None:
    """More columns than a line has, so that both distances count."""
    wgmma("bf16", n, small(5, 1, 64, 16), small(6, n, 16), k_major(128), mn_major(swizzle))


def test_wgmma_with_a_transposed_b_that_is_not_swizzled() -> None:
    """The ISA: the leading offset is that of the next 8 k, the stride that of the next 8 columns; swizzled it is the other way."""
    wgmma("f16", 32, small(7, 1, 64, 16), small(8, 32, 16), k_major(0), mn_major(0))


@pytest.mark.parametrize("swizzle", [128, 64, 32])
def test_wgmma_with_a_transposed_a(swizzle: int) -> None:
    wgmma("f16", 8, small(9, 1, 64, 16), small(10, 8, 16), mn_major(swizzle), k_major(swizzle))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("b_layout", [k_major(128), mn_major(64)], ids=["k_major", "transposed"])
def test_wgmma_with_a_in_registers(kind: str, b_layout: Layout) -> None:
    wgmma(kind, 32, small(11, 1, 64, 16), small(12, 32, 16), None, b_layout)


@pytest.mark.parametrize("a_layout", [None, k_major(32)], ids=["registers", "shared"])
def test_wgmma_of_two_warpgroups_that_overwrites(a_layout: Layout | None) -> None:
    """Each has its own A; what D held is left out."""
    wgmma("f16", 8, small(13, 2, 64, 16), small(14, 8, 16), a_layout, k_major(64), adds=False)


def test_a_matrix_descriptor_with_a_base_offset_is_refused() -> None:
    """Bits 49 to 51: a swizzle whose pattern does not begin where addresses say. Not taken, so not to be left out."""
    descriptor = np.full(128, k_major(128).descriptor(0) | 1 << 49, np.uint64)
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r400, %r401, %r402, %r403}, $0, $0, 0, 1, 1, 0, 0;"
    ends = "wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 0;\n    mov.b32 $d0, %r400;"
    with pytest.raises(PtxError, match="descriptor"):
        each(f"    {product}\n    {ends}", descriptor, shared=bytes(1 << 14))


def two_products(*between: str) -> list[Any]:
    """Two groups of one product of ones each, to -1 and added to it; statements before, between and after the waits."""
    layout = k_major(0)
    image = bytearray(1 << 13)
    layout.write(image, 0, encoded(np.ones((64, 16)), "f16"))
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
    first, second = "%r400, %r401, %r402, %r403", "%r404, %r405, %r406, %r407"
    early, middle, late = between
    lines = [
        *(f"    mov.b32 %r{index}, 0fBF800000;" for index in range(400, 408)),
        f"    {product} {{{first}}}, $0, $0, 0, 1, 1, 0, 0;",
        "    wgmma.commit_group.sync.aligned;",
        f"    {product} {{{second}}}, $0, $0, 1, 1, 1, 0, 0;",
        "    wgmma.commit_group.sync.aligned;",
        early,
        "    wgmma.wait_group.sync.aligned 1;",
        middle,
        "    wgmma.wait_group.sync.aligned 0;",
        late,
    ]
    descriptor = np.full(128, layout.descriptor(0), np.uint64)
    return each("\n".join(lines), descriptor, out=[np.uint32] * 2, shared=bytes(image))


def test_wgmma_is_done_when_it_is_waited_for() -> None:
    found = two_products("", "    mov.b32 $d0, %r401;", "    mov.b32 $d1, %r406;")
    assert [set(item.view(np.float32).tolist()) for item in found] == [{16.0}, {15.0}]


@pytest.mark.parametrize(
    "between",
    [
        ("    mov.b32 $d0, %r400;", "", ""),
        ("", "    mov.b32 $d0, %r405;", ""),
        ("    mov.b32 %r400, 0;", "", ""),
        ("", "    mov.b32 %r404, 0;", ""),
    ],
    ids=["read", "read after the wait for the other", "written", "written after the wait for the other"],
)  # fmt: skip
def test_a_register_of_wgmma_is_left_alone_till_it_is_waited_for(between: tuple[str, str, str]) -> None:
    with pytest.raises(PtxError, match=r"a register is (read before|written while)"):
        two_products(*between)


# ---- asynchronous copies ----------------------------------------------------------------------------------------

COPY = """    shl.b32 %r1, %r0, 4;
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    mad.wide.u32 %rd21, %r0, 16, %rd1;
"""
"""Each thread has 16 bytes of the source, of shared memory and of the target."""
READ = """    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1];
    st.global.v4.b32 [%rd21], {%r4, %r5, %r6, %r7};
"""


def copied(body: str, *, threads: int = 32, shared_bytes: int = 2048) -> tuple[Array, Array]:
    """(source, target) [threads, 4 words]"""
    source = np.arange(1, 4 * threads + 1, dtype=np.uint32).reshape(threads, 4)
    _, target = run(COPY + body, source, np.zeros_like(source), threads=threads, shared_bytes=shared_bytes)
    return source, target


def test_a_copy_arrives_when_its_group_is_waited_for() -> None:
    source, target = copied(
        f"""    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
{READ}"""
    )
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_copy_has_the_size_that_it_says(size: int) -> None:
    """What lies next to it keeps what it was."""
    source, target = copied(
        f"""    st.shared.v4.b32 [%r1], {{-1, -1, -1, -1}};
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], {size:#x};
    cp.async.commit_group;
    cp.async.wait_group 0;
{READ}"""
    )
    want = np.full_like(source, 0xFFFFFFFF)
    want[:, : size // 4] = source[:, : size // 4]
    np.testing.assert_array_equal(target, want)


def test_a_copy_of_no_bytes_fills_with_zeros_and_reads_nothing() -> None:
    """Even threads copy; odd ones have a source far outside of the launch's memory."""
    source, target = copied(
        f"""    and.b32 %r2, %r0, 1;
    setp.ne.b32 %p1, %r2, 0;
    selp.b32 %r3, 0, 16, %p1;
    selp.b64 %rd20, 64, %rd20, %p1;
    st.shared.v4.b32 [%r1], {{-1, -1, -1, -1}};
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10, %r3;
    cp.async.commit_group;
    cp.async.wait_group 0;
{READ}"""
    )
    np.testing.assert_array_equal(target[::2], source[::2])
    assert not target[1::2].any()


def test_a_copy_from_outside_the_memory_is_refused() -> None:
    with pytest.raises(PtxError, match="leave the launch's memory by 16 bytes"):
        copied(
            """    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 16 ], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
"""
        )


def test_a_copy_that_a_predicate_leaves_out_writes_nothing() -> None:
    source, target = copied(
        f"""    st.shared.v4.b32 [%r1], {{7, 7, 7, 7}};
    setp.lt.u32 %p1, %r0, 10;
    @%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
{READ}"""
    )
    np.testing.assert_array_equal(target[:10], source[:10])
    assert (target[10:] == 7).all()


@pytest.mark.parametrize(
    "waited", ["", "    cp.async.commit_group;\n", "    cp.async.commit_group;\n    cp.async.wait_group 1;\n"]
)
def test_a_copy_that_is_on_its_way_is_not_to_be_read(waited: str) -> None:
    with pytest.raises(PtxError, match=r"ld\.shared.*read while an asynchronous copy into it is on its way"):
        copied(f"    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;\n{waited}{READ}")


def test_memory_that_a_copy_is_on_its_way_to_is_not_to_be_written() -> None:
    with pytest.raises(PtxError, match=r"st\.shared.*written while an asynchronous copy into it is on its way"):
        copied("    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;\n    st.shared.b32 [%r1], 1;\n")
    with pytest.raises(PtxError, match="two asynchronous copies to the same shared memory"):
        copied(2 * "    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;\n")


@pytest.mark.parametrize(("allowed", "ready"), [(2, 1), (1, 2), (0, 3)])
def test_waiting_leaves_the_latest_groups_on_their_way(allowed: int, ready: int) -> None:
    """Three groups, one after the other; waiting for all but N makes the first 3 - N visible and no other."""
    copies = "".join(
        f"    cp.async.cg.shared.global [ %r1 + {512 * index} ], [ %rd20 + 0 ], 0x10;\n    cp.async.commit_group;\n"
        for index in range(3)
    )
    for index in range(3):
        body = f"""{copies}    cp.async.wait_group {allowed};
{READ.replace("[%r1]", f"[%r1+{512 * index}]")}    cp.async.wait_group 0;
"""
        if index < ready:
            source, target = copied(body)
            np.testing.assert_array_equal(target, source)
        else:
            with pytest.raises(PtxError, match="on its way"):
                copied(body)


def test_a_copy_is_visible_to_another_warp_only_after_a_barrier() -> None:
    body = """    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
    BARRIER
    xor.b32 %r1, %r1, 512;
"""
    source, target = copied(body.replace("BARRIER", "bar.sync 0;") + READ, threads=64)
    np.testing.assert_array_equal(target, np.roll(source, 32, axis=0))
    with pytest.raises(PtxError, match="race: without a barrier"):
        copied(body.replace("BARRIER", "") + READ, threads=64)


@pytest.mark.parametrize(
    "work",
    [
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10; cp.async.commit_group;",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10; cp.async.commit_group; cp.async.wait_group 1;",
    ],
)
def test_a_kernel_that_ends_before_its_copies_is_refused(work: str) -> None:
    with pytest.raises(PtxError, match="`ret`: the kernel ends while asynchronous work is on its way"):
        copied(f"    {work}\n")


def test_a_kernel_that_ends_before_its_products_is_refused() -> None:
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r400, %r401, %r402, %r403}, $0, $0, 0, 1, 1, 0, 0;"
    body = f"    {product}\n    wgmma.commit_group.sync.aligned;\n    mov.b32 $d0, 0;"
    with pytest.raises(PtxError, match="`ret`: the kernel ends while asynchronous work is on its way"):
        each(body, np.full(128, k_major(128).descriptor(0), np.uint64), shared=bytes(1 << 14))


# ---- what is refused: memory ------------------------------------------------------------------------------------

MINE = "    mad.wide.u32 %rd20, %r0, 4, %rd0;\n    mad.wide.u32 %rd21, %r0, 4, %rd1;\n    shl.b32 %r1, %r0, 2;\n"
"""Each thread has a word of either buffer and of shared memory."""


@pytest.mark.parametrize("instruction", ["ld.global.b32 %r4, [%rd20+4]", "st.global.b32 [%rd20+4], %r0"])
def test_leaving_a_buffer_is_refused(instruction: str) -> None:
    """Though another buffer lies not far behind it. The message has the instruction, the buffer and its size."""
    words = np.zeros(32, np.uint32)
    with pytest.raises(
        PtxError, match=r"1 threads leave the launch's memory by 4 bytes at `buffer0` \+ 128 of 128 bytes"
    ) as err:
        run(f"{MINE}    {instruction};", words, words)
    assert f"kernel: `{instruction}`" in str(err.value)


@pytest.mark.parametrize("instruction", ["ld.global.b32 %r4, [%rd20+-4]", "st.global.b32 [%rd20+-4], %r0"])
def test_an_address_before_every_buffer_is_refused(instruction: str) -> None:
    with pytest.raises(PtxError, match="1 threads leave the launch's memory by 4 bytes at 0x"):
        run(f"{MINE}    {instruction};", np.zeros(32, np.uint32), np.zeros(32, np.uint32))


def test_a_vector_that_leaves_a_buffer_with_its_end_is_refused() -> None:
    body = "    mad.wide.u32 %rd20, %r0, 16, %rd0;\n    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd20];"
    with pytest.raises(PtxError, match="1 threads leave the launch's memory by 16 bytes"):
        run(body, np.zeros(4 * 31 + 2, np.uint32))


def test_a_launch_without_memory_may_touch_none() -> None:
    with pytest.raises(PtxError, match="32 threads leave the launch's memory"):
        run("    mov.b64 %rd20, 4096;\n    ld.global.b32 %r4, [%rd20];")


def test_threads_that_a_predicate_leaves_out_touch_nothing() -> None:
    words = np.arange(100, 120, dtype=np.uint32)
    body = f"""{MINE}    setp.lt.u32 %p1, %r0, 20;
    mov.b32 %r4, 7;
    @%p1 ld.global.b32 %r4, [%rd20];
    st.global.b32 [%rd21], %r4;"""
    _, found = run(body, words, np.zeros(32, np.uint32))
    assert found.tolist() == [*range(100, 120), *[7] * 12]
    body = f"""{MINE}    setp.ge.u32 %p1, %r0, 20;
    @!%p1 st.global.b32 [%rd20], %r0;
    st.global.b32 [%rd21], %r0;"""
    assert run(body, words, np.zeros(32, np.uint32))[0].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("instruction", "nbytes"),
    [
        ("ld.global.b32 %r4, [%rd20+2]", 4),
        ("st.global.b32 [%rd20+2], %r0", 4),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd20]", 8),
        ("ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd0+8]", 16),
    ],
)
def test_a_misaligned_global_address_is_refused(instruction: str, nbytes: int) -> None:
    words = np.zeros(64, np.uint32)
    with pytest.raises(PtxError, match=rf"address `buffer0` \+ \d+ of 256 bytes is not a multiple of {nbytes} bytes"):
        run(f"{MINE}    {instruction};", words, words)


@pytest.mark.parametrize("instruction", ["ld.shared.v2.b32 {%r4, %r5}, [%r1]", "st.shared.b64 [%r1], %rd0"])
def test_a_misaligned_shared_address_is_refused(instruction: str) -> None:
    with pytest.raises(PtxError, match="shared address 4 is not a multiple of 8"):
        run(f"{MINE}    {instruction};", np.zeros(2, np.uint32), np.zeros(2, np.uint32), shared_bytes=256)


@pytest.mark.parametrize("instruction", ["ld.shared.b32 %r4, [%r1+16]", "st.shared.b32 [%r1+16], %r0"])
def test_leaving_shared_memory_is_refused(instruction: str) -> None:
    with pytest.raises(PtxError, match="4 bytes at shared address 140 of 128"):
        run(f"{MINE}    {instruction};", np.zeros(2, np.uint32), np.zeros(2, np.uint32), shared_bytes=128)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("", "ld.shared.b32 %r4, [%r1]"),
        ("st.shared.b32 [%r1], %r0;", "ld.shared.b32 %r4, [%r1+128]"),
        ("st.shared.b16 [%r1], 1;", "ld.shared.b32 %r4, [%r1]"),
        ("", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r9]"),
    ],
)
def test_shared_memory_that_nobody_wrote_is_not_to_be_read(written: str, read: str) -> None:
    words = np.zeros(2, np.uint32)
    with pytest.raises(PtxError, match="shared memory is read before it was written, at "):
        run(f"{MINE}    shl.b32 %r9, %r0, 4;\n    {written}\n    {read};", words, words, shared_bytes=512)


def test_what_a_block_left_in_shared_memory_the_next_does_not_find() -> None:
    """Every block has its own, and it begins unwritten."""
    body = f"""{MINE}    mov.u32 %r3, %ctaid.x;
    setp.ne.b32 %p1, %r3, 0;
    @%p1 bra $L_read;
    st.shared.b32 [%r1], %r0;
$L_read:
    ld.shared.b32 %r4, [%r1];"""
    words = np.zeros(2, np.uint32)
    run(body, words, words, shared_bytes=128)
    with pytest.raises(PtxError, match="read before it was written"):
        run(body, words, words, shared_bytes=128, grid=(2, 1, 1))


EXCHANGE = """    st.shared.b32 [%r1], %r0;
    {barrier}
    xor.b32 %r2, %r1, {distance};
    ld.shared.b32 %r4, [%r2];
    {again}
    {after}
    st.global.b32 [%rd21], %r4;
"""


def exchanged(barrier: str, distance: int, again: str = "", after: str = "") -> list[int]:
    """64 threads, each of which reads what another wrote, ``distance`` bytes away."""
    words = np.zeros(64, np.uint32)
    body = MINE + EXCHANGE.format(barrier=barrier, distance=distance, again=again, after=after)
    return run(body, words, words, threads=64, shared_bytes=256)[1].tolist()


def test_reading_what_another_warp_wrote_needs_a_barrier() -> None:
    assert exchanged("bar.sync 0;", 128) == [thread ^ 32 for thread in range(64)]
    with pytest.raises(
        PtxError, match=r"ld\.shared\.b32.*race: without a barrier, a warp reads what another wrote.*at 128"
    ):
        exchanged("", 128)


def test_a_warp_reads_its_own_without_a_barrier() -> None:
    assert exchanged("", 4) == [thread ^ 1 for thread in range(64)]


def test_writing_over_what_another_warp_read_needs_a_barrier() -> None:
    store = "st.shared.b32 [%r1], 77;"
    assert exchanged("bar.sync 0;", 128, "bar.sync 0;", store) == [thread ^ 32 for thread in range(64)]
    with pytest.raises(
        PtxError, match=r"st\.shared\.b32.*race: without a barrier, a warp writes over what another read"
    ):
        exchanged("bar.sync 0;", 128, "", store)


def test_writing_over_what_another_warp_wrote_needs_a_barrier() -> None:
    words = np.zeros(64, np.uint32)
    body = (
        f"{MINE}    st.shared.b32 [%r1], %r0;\n    BARRIER\n    xor.b32 %r2, %r1, 128;\n    st.shared.b32 [%r2], %r0;"
    )
    run(body.replace("BARRIER", "bar.sync 0;"), words, words, threads=64, shared_bytes=256)
    with pytest.raises(PtxError, match="race: without a barrier, a warp writes over what another wrote"):
        run(body.replace("BARRIER", ""), words, words, threads=64, shared_bytes=256)


def test_threads_that_store_different_values_to_one_shared_address_at_once_are_refused() -> None:
    """The same value is taken, also from two warps."""
    words = np.zeros(64, np.uint32)
    run(f"{MINE}    mov.b32 %r2, 0;\n    st.shared.b32 [%r2], 5;", words, words, threads=64, shared_bytes=16)
    with pytest.raises(PtxError, match="race: threads write different values to the same shared memory"):
        run(f"{MINE}    mov.b32 %r2, 0;\n    st.shared.b32 [%r2], %r0;", words, words, threads=64, shared_bytes=16)


@pytest.mark.parametrize("threads", [32, 64])
def test_two_threads_that_write_different_values_to_one_global_address_are_refused(threads: int) -> None:
    with pytest.raises(PtxError, match=r"race: a thread writes what another writes in this launch, at `buffer0` \+ 0"):
        run("    st.global.b32 [%rd0], %r0;", np.zeros(1, np.uint32), threads=threads)


def test_two_blocks_that_write_one_global_address_are_refused() -> None:
    """Also where the second of them runs long after the first."""
    with pytest.raises(PtxError, match="race: a thread writes what another writes"):
        run(f"{MINE}    st.global.b32 [%rd20], %r0;", *[np.zeros(32, np.uint32)] * 2, grid=(2, 1, 1))
    one_each = """    mov.u32 %r3, %ctaid.x;
    and.b32 %r3, %r3, 511;
    shl.b32 %r3, %r3, 5;
    add.s32 %r3, %r3, %r0;
    mad.wide.u32 %rd20, %r3, 4, %rd0;
    st.global.b32 [%rd20], %r0;"""
    words = np.zeros(512 * 32, np.uint32)
    run(one_each, words, grid=(512, 1, 1))
    with pytest.raises(PtxError, match=r"race: a thread writes what another wrote in this launch, at `buffer0` \+ 0"):
        run(one_each, words, grid=(513, 1, 1))


def test_what_another_thread_wrote_in_the_same_launch_is_not_to_be_read() -> None:
    """Not even within a warp. What it wrote itself a thread may read; so may the next launch."""
    own = f"{MINE}    st.global.b32 [%rd20], %r0;\n    ld.global.b32 %r4, [%rd20];\n    st.global.b32 [%rd21], %r4;"
    words = np.zeros(64, np.uint32)
    assert run(own, words[:32], words[:32])[1].tolist() == list(range(32))
    other = f"{MINE}    st.global.b32 [%rd20], %r0;\n    ld.global.b32 %r4, [%rd0];"
    with pytest.raises(PtxError, match=r"ld\.global\.b32.*race: a thread reads what another wrote.*`buffer0` \+ 0"):
        run(other, words[:32], words[:32])
    with pytest.raises(PtxError, match="race: a thread reads what another wrote"):
        run(other, words, words, threads=64)


def test_what_another_thread_read_in_the_same_launch_is_not_to_be_written() -> None:
    body = f"{MINE}    ld.global.b32 %r4, [%rd0];\n    st.global.b32 [%rd20], %r4;"
    with pytest.raises(PtxError, match=r"st\.global\.b32.*race: a thread writes what another read"):
        run(body, np.zeros(32, np.uint32), np.zeros(32, np.uint32))


def test_launches_run_one_after_the_other() -> None:
    """What one wrote the next may read."""
    words = np.arange(64, dtype=np.uint32)
    buffers = [Buffer("words", words.ctypes.data, words.nbytes)]
    memory = GlobalMemory(buffers)
    write = Program.parse(kernel("    mad.wide.u32 %rd20, %r0, 4, %rd0;\n    st.global.b32 [%rd20], 9;", 1))
    read = Program.parse(
        kernel(
            "    mad.wide.u32 %rd20, %r0, 4, %rd0;\n    ld.global.b32 %r4, [%rd0];\n    st.global.b32 [%rd20+128], %r4;",
            1,
        )
    )
    for program in (write, read, write):
        launch(program, (1, 1, 1), [words.ctypes.data], memory, 0)
    assert (words == 9).all()


@pytest.mark.parametrize(
    ("form", "names"),
    [("b16", ["%rs1"]), ("b32", ["%r10"]), ("b64", ["%rd30"]), ("v2.b16", ["%rs1", "%rs2"]), ("v4.b16", ["%rs1", "%rs2", "%rs3", "%rs4"]),
     ("v2.b32", ["%r10", "%r11"]), ("v4.b32", ["%r10", "%r11", "%r12", "%r13"]), ("v2.b64", ["%rd30", "%rd31"])],
)  # fmt: skip
@pytest.mark.parametrize("space", ["global", "shared"])
def test_loads_and_stores_of_every_width(space: str, form: str, names: list[str]) -> None:
    """Through registers, and where asked through shared memory, with an offset in the address."""
    size = int(form[-2:]) // 8 * len(names)
    source = np.frombuffer(np.random.default_rng(8).bytes(32 * size + 16), np.uint16)
    held = names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"
    body = f"""    mad.wide.u32 %rd20, %r0, {size}, %rd0;
    mad.wide.u32 %rd21, %r0, {size}, %rd1;
    mul.lo.s32 %r1, %r0, {size};
    ld.global.{form} {held}, [%rd20+16];
"""
    if space == "shared":
        clear = "".join(f"    mov.b{form[-2:]} {name}, 0;\n" for name in names)
        body += f"    st.shared.{form} [%r1+32], {held};\n{clear}    ld.shared.{form} {held}, [%r1+32];\n"
    body += f"    st.global.{form} [%rd21], {held};"
    _, target = run(body, source, np.zeros(16 * size, np.uint16), shared_bytes=32 * size + 32)
    np.testing.assert_array_equal(target, source[8:])


# ---- what is refused: instructions ------------------------------------------------------------------------------


SKIP = "    setp.lt.u32 %p1, %r0, 16;\n    @%p1 bra $L_skip;\n"
"""Half of a warp jumps."""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{SKIP}    bar.sync 0;\n$L_skip:", "`bar.sync 0`: some threads of the block are elsewhere"),
        (f"{SKIP}    ret;\n$L_skip:", "`ret`: some threads of the block are elsewhere"),
        ("$L_again:\n    setp.lt.u32 %p1, %r0, 16;\n    @%p1 bra $L_again;", "`ret`: some threads of the block are elsewhere"),
        (f"{SKIP}    bra.uni $L_end;\n$L_skip:\n    mov.b32 %r1, 1;\n$L_end:", "elsewhere"),
        (f"{SKIP}    shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\n$L_skip:", "elsewhere"),
        (f"{SKIP}    shfl.sync.idx.b32 %r1, %r0, 1, 31, -1;\n$L_skip:", "elsewhere"),
        (f"{SKIP}    redux.sync.max.f32 %r1, %r0, -1;\n$L_skip:", "elsewhere"),
        (f"{SKIP}    elect.sync %r1|%p2, -1;\n$L_skip:", "elsewhere"),
        (f"{SKIP}    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%r0];\n$L_skip:", "elsewhere"),
        (
            f"{SKIP}    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%r1, %r2, %r3, %r4}}, {{%r0, %r0, %r0, %r0}}, "
            "{%r0, %r0}, {%r0, %r0, %r0, %r0};\n$L_skip:", "elsewhere"
        ),
    ],
    ids=["barrier", "ret", "loop", "else", "bfly", "idx", "redux", "elect", "ldmatrix", "mma"],
)  # fmt: skip
def test_threads_that_have_parted_do_nothing_that_takes_all_of_them(body: str, message: str) -> None:
    """Neither a barrier nor what a whole warp does together; and they part for nothing but to skip what follows."""
    with pytest.raises(PtxError, match=message):
        run(body, threads=64, shared_bytes=512)


def test_threads_that_skip_some_statements_keep_what_they_had() -> None:
    """A skip in a skip. Of some blocks all threads jump, of others none, of others a few."""
    body = """    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 64, %r0;
    mad.wide.u32 %rd20, %r2, 4, %rd0;
    mad.wide.u32 %rd21, %r2, 4, %rd1;
    mul.lo.s32 %r3, %r1, 20;
    mov.b32 %r4, %r0;
    setp.lt.u32 %p1, %r0, %r3;
    @%p1 bra $L_outer;
    add.s32 %r4, %r4, 100;
    setp.gt.u32 %p2, %r0, 40;
    @!%p2 bra $L_inner;
    add.s32 %r4, %r4, 1000;
$L_inner:
    st.global.b32 [%rd20], 7;
    add.s32 %r4, %r4, 10000;
$L_outer:
    bar.sync 0;
    st.global.b32 [%rd21], %r4;"""
    written, found = run(body, *[np.zeros((5, 64), np.uint32)] * 2, threads=64, grid=(5, 1, 1))
    for block, thread in itertools.product(range(5), range(64)):
        stays = thread >= 20 * block
        assert found[block, thread] == thread + stays * (10100 + 1000 * (thread > 40)), (block, thread)
        assert written[block, thread] == 7 * stays


def test_whole_warps_that_stay_do_what_a_warp_does_together() -> None:
    """While the others skip it."""
    body = f"""{MINE}    mov.b32 %r4, 0;
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $L_skip;
    shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;
$L_skip:
    st.global.b32 [%rd21], %r4;"""
    _, found = run(body, *[np.zeros(64, np.uint32)] * 2, threads=64)
    assert found.tolist() == [0] * 32 + [thread ^ 1 for thread in range(32, 64)]


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.s32 %r1, %r0, %r0", "sqrt.rn.f32 %r1, %r0", "add.sat.s32 %r1, %r0, %r0", "add.rz.f32 %r1, %r0, %r0",
        "max.NaN.f32 %r1, %r0, %r0", "setp.ltu.f32 %p1, %r0, %r0", "setp.lt.and.s32 %p1, %r0, %r0, %p2",
        "atom.global.add.u32 %r1, [%rd0], 1", "ld.global.nc.b32 %r1, [%rd0]", "ld.local.b32 %r1, [%rd0]",
        "ld.global.b8 %r1, [%rd0]", "ld.global.v2.b32 %r1, [%rd0]", "st.global.wt.b32 [%rd0], %r0", "bar.sync 1", "bar.arrive 0, 64",
        "bar.sync 0, 64", "shfl.sync.up.b32 %r1, %r0, 1, 0, -1", "shfl.sync.bfly.b32 %r1, %r0, 1, 15, -1",
        "cvt.rz.f16.f32 %rs1, %r0", "cvt.rn.satfinite.bf16.f32 %rs1, %r0", "mov.b64 {%rs1, %rs2, %rs3, %rs4}, %rd0",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1, %r2, %r3, %r4}, {%r0, %r0}, {%r0}, {%r0, %r0, %r0, %r0}",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1, %r2, %r3, %r4}, %rd0, %rd0, 0, -1, 1, 0, 0",
        "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1, %r2}, %rd0, %rd0, 0, 1, 1, 0, 0",
        "cp.async.bulk.shared.global [%r0], [%rd0], 16", "cp.async.cg.shared.global [ %r0 + 0 ], [ %rd0 + 0 ], 0x20",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r0]", "trap", "exit", "@%p1 add.s32 %r1, %r0, %r0",
        "@%p1 ret",
    ],
)  # fmt: skip
def test_an_instruction_that_is_not_understood_is_named(instruction: str) -> None:
    """Before anything runs: here it stands behind a branch that is never taken."""
    body = f"    setp.eq.s32 %p1, 0, 0;\n    @%p1 bra $L_end;\n    {instruction};\n$L_end:"
    with pytest.raises(PtxError, match="not understood") as err:
        run(body, np.zeros(32, np.uint32))
    assert f"`{instruction}`" in str(err.value)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.s32 %r1, %r300, %r0", "add.s32 %r1, %r0, %r300", "fma.rn.f32 %r1, %r0, %r0, %r300", "mov.b32 %r1, %r300",
        "mov.b64 {%r1, %r2}, %rd300", "selp.b32 %r1, %r300, %r0, %p1", "selp.b32 %r1, %r0, %r0, %p9", "setp.eq.s32 %p1, %r300, 0",
        "cvt.s64.s32 %rd20, %r300", "cvt.rn.bf16x2.f32 %r1, %r300, %r0", "mul.wide.s32 %rd20, %r300, 4", "shl.b32 %r1, %r300, 2",
        "shfl.sync.bfly.b32 %r1, %r300, 1, 31, -1", "@%p9 bra $L_end", "ld.global.b32 %r1, [%rd300]", "st.global.b32 [%rd0], %r300",
        "@%p9 ld.global.b32 %r1, [%rd0]", "min.s64 %rd20, %rd300, 5", "add.f16x2 %r1, %r300, %r0", "add.bf16 %rs1, %rs20, %rs20", "and.pred %p1, %p9, %p9",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1, %r2, %r3, %r4}, {%r0, %r0, %r0, %r300}, {%r0, %r0}, {%r0, %r0, %r0, %r0}",
    ],
)  # fmt: skip
def test_a_register_that_nothing_was_put_into_is_not_to_be_read(instruction: str) -> None:
    with pytest.raises(PtxError, match="nothing was put into") as err:
        run(f"    setp.lt.u32 %p1, %r0, 9;\n    {instruction};\n$L_end:", np.zeros(32, np.uint32))
    assert f"`{instruction}`" in str(err.value)


@pytest.mark.parametrize("instruction", ["add.s32 %r1, %r0", "add.s32 %r1, %r0, %r0, %r0", "mul.f32 %r1, %r0", "neg.s32 %r1, %r0, %r0",
                                         "cvt.s64.s32 %rd20, %r0, %r0", "selp.b32 %r1, %r0, %r0", "fma.rn.f32 %r1, %r0, %r0"])  # fmt: skip
def test_an_instruction_with_too_few_or_too_many_operands_is_refused(instruction: str) -> None:
    with pytest.raises(PtxError, match=re.escape(f"`{instruction}`")):
        run(f"    {instruction};")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_wrong_number_of_arguments_is_refused(count: int) -> None:
    program = Program.parse(kernel("", 2))
    with pytest.raises(PtxError, match=f"{count} arguments, `kernel` takes 2"):
        launch(program, (1, 1, 1), [0] * count, GlobalMemory([]), 0)


# ---- the text ---------------------------------------------------------------------------------------------------


def test_a_program_says_what_it_takes() -> None:
    text = kernel("").replace(
        "kernel(\n\n)", "kernel(\n    .param .u64 .ptr .global .align 1 a,\n    .param .u32 b,\n    .param .f32 c\n)"
    )
    program = Program.parse(text)
    assert (program.entry, list(program.parameters.values()), program.threads) == ("kernel", ["u64", "u32", "f32"], 32)


def test_parameters_of_every_type_arrive() -> None:
    body = """    ld.param.b64 %rd0, [a];
    ld.param.b32 %r1, [b];
    ld.param.b32 %r2, [c];
    ld.param.s32 %rd9, [b];
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    st.global.v2.b32 [%rd20], {%r1, %r2};
    st.global.b64 [%rd20+8], %rd9;"""
    text = kernel(body).replace(
        "kernel(\n\n)", "kernel(\n    .param .u64 .ptr .global .align 1 a,\n    .param .u32 b,\n    .param .f32 c\n)"
    )
    words = np.zeros((32, 4), np.uint32)
    launch(
        Program.parse(text), (1, 1, 1), [words.ctypes.data, -5, 1.5], GlobalMemory([Buffer("words", words.ctypes.data, words.nbytes)]), 0
    )  # fmt: skip
    assert (words == [-5 & 0xFFFFFFFF, 0x3FC00000, -5 & 0xFFFFFFFF, 0xFFFFFFFF]).all()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (".visible .entry kernel(", ".visible .func kernel(", "0 kernels in the text"),
        ("mov.u32 %r0, %tid.x;", "mov.u32 %r0, %tid.x; // .entry", None),
        (".version 8.8", ".visible .entry other() .reqntid 32 { ret; }", "2 kernels in the text"),
        (".reqntid 32", "", r"`kernel` does not say how many threads a block has \(\.reqntid, in one dimension\)"),
        ("    ret;\n}", "    ret;\n", "the kernel has no end"),
        ("    ret;", "    bra.uni $L_nowhere;\n    ret;", r"`bra\.uni \$L_nowhere`: no such label"),
        ("    ret;", "    add.s32 %r1, %r0, %q7;\n    ret;", "`add.s32 %r1, %r0, %q7`: `%q7` is no operand"),
        ("    ret;", "    add.s32 %r1, %r0, %r9999;\n    ret;", "`%r9999` is no operand"),
        ("    ret;", "    mov.u32 %r1, %laneid;\n    ret;", "`%laneid` is no operand"),
        ("    ret;", "    ld.shared.b32 %r1, [other_smem];\n    ret;", "`other_smem` is no operand"),
        ("    ret;", "    mov.b64 %rd1, 0d3FF0000000000000;\n    ret;", "`0d3FF0000000000000` is no operand"),
        ("    ret;", "    mov.b32 {%r1, %q7}, %rd0;\n    ret;", "`%q7` is no operand"),
        ("    ret;", "    @%p99 bra $L_end;\n$L_end:\n    ret;", "%p99"),
        (".reg .pred %p<16>;", ".reg .f64 %fd<16>;", r"f64"),
        ("kernel(\n\n)", "kernel(\n    .param .u8 flag\n)", "u8"),
        ("kernel(\n\n)", "kernel(\n    .param .align 8 .b8 blob[16]\n)", "blob"),
    ],
)  # fmt: skip
def test_a_text_that_is_not_understood_is_refused_by_name(before: str, after: str, message: str | None) -> None:
    """Never left out silently, never an accident of the parser's. None: it is understood."""
    text = kernel("")
    assert before in text
    changed = text.replace(before, after)
    if message is None:
        Program.parse(changed)
        return
    with pytest.raises(PtxError, match=message):
        Program.parse(changed)


def test_a_name_in_braces_hides_the_one_outside() -> None:
    body = f"""{MINE}    mov.b32 %r4, 5;
    {{
    .reg .b32 %r<6>;
    .reg .pred done;
    mov.b32 %r4, 6;
    setp.eq.b32 done, %r4, 6;
    @done bra $L_end;
    mov.b32 %r5, 7;
$L_end:
    }}
    {{
    .reg .pred done;
    setp.eq.b32 done, %r4, 5;
    @!done bra $L_end;
    add.s32 %r4, %r4, 10;
$L_end:
    }}
    st.global.b32 [%rd21], %r4;"""
    _, found = run(body, *[np.zeros(32, np.uint32)] * 2)
    assert found.tolist() == [15] * 32


# ---- blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [5, 400])
def test_blocks_with_different_trip_counts_get_their_own_results(blocks: int) -> None:
    """Each trip goes through shared memory and barriers; some blocks make none. More blocks than run side by side, too."""
    trips = np.random.default_rng(9).integers(0, 6, blocks).astype(np.uint32)
    trips[0] = 0
    body = """    mov.u32 %r1, %ctaid.x;
    mad.wide.u32 %rd20, %r1, 4, %rd0;
    ld.global.b32 %r2, [%rd20];
    shl.b32 %r3, %r0, 2;
    xor.b32 %r4, %r3, 128;
    mov.b32 %r5, %r0;
    mov.b32 %r6, 0;
    setp.eq.s32 %p1, %r2, 0;
    @%p1 bra $L_done;
$L_loop:
    bar.sync 0;
    st.shared.b32 [%r3], %r5;
    bar.sync 0;
    ld.shared.b32 %r7, [%r4];
    mad.lo.s32 %r5, %r7, 3, %r6;
    add.s32 %r6, %r6, 1;
    setp.lt.s32 %p2, %r6, %r2;
    @%p2 bra $L_loop;
$L_done:
    mad.lo.s32 %r8, %r1, 64, %r0;
    mad.wide.u32 %rd21, %r8, 4, %rd1;
    st.global.b32 [%rd21], %r5;"""
    target = np.zeros((blocks, 64), np.uint32)
    _, found = run(body, trips, target, threads=64, grid=(blocks, 1, 1), shared_bytes=256)
    for block in range(blocks):
        values = list(range(64))
        for trip in range(int(trips[block])):
            values = [values[thread ^ 32] * 3 + trip for thread in range(64)]
        assert found[block].tolist() == values, block


def test_a_copy_on_its_way_follows_its_block_through_a_branch() -> None:
    """Blocks with an even number take another way before they wait."""
    body = """    mov.u32 %r1, %ctaid.x;
    shl.b32 %r2, %r0, 2;
    mad.lo.s32 %r3, %r1, 32, %r0;
    mad.wide.u32 %rd20, %r3, 4, %rd0;
    mad.wide.u32 %rd21, %r3, 4, %rd1;
    mov.b32 %r4, 0;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd20 + 0 ], 0x4;
    cp.async.commit_group;
    and.b32 %r5, %r1, 1;
    setp.ne.b32 %p1, %r5, 0;
    @%p1 bra $L_wait;
    mov.b32 %r4, 1000;
$L_wait:
    cp.async.wait_group 0;
    ld.shared.b32 %r6, [%r2];
    add.s32 %r6, %r6, %r4;
    st.global.b32 [%rd21], %r6;"""
    source = np.arange(7 * 32, dtype=np.uint32).reshape(7, 32)
    _, found = run(body, source, np.zeros_like(source), grid=(7, 1, 1), shared_bytes=128)
    for block in range(7):
        assert found[block].tolist() == [int(item) + (0 if block % 2 else 1000) for item in source[block]]


def test_blocks_know_their_place_in_the_grid() -> None:
    """In three dimensions; more blocks than run side by side."""
    grid = (3, 5, 40)
    body = """    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %ctaid.z;
    mov.u32 %r4, %nctaid.x;
    mov.u32 %r5, %nctaid.y;
    mad.lo.s32 %r6, %r3, %r5, %r2;
    mad.lo.s32 %r6, %r6, %r4, %r1;
    mad.lo.s32 %r6, %r6, 32, %r0;
    mad.wide.u32 %rd20, %r6, 16, %rd0;
    mov.u32 %r7, %nctaid.z;
    st.global.v4.b32 [%rd20], {%r1, %r2, %r3, %r7};"""
    (found,) = run(body, np.zeros((40, 5, 3, 32, 4), np.uint32), grid=grid)
    for z, y, x in itertools.product(range(40), range(5), range(3)):
        assert (found[z, y, x] == [x, y, z, 40]).all()


# ---- traffic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "sectors", "use"), [(4, 4, 1.0), (8, 8, 1 / 2), (32, 32, 1 / 8), (128, 32, 1 / 8)], ids=str
)
@pytest.mark.parametrize("way", ["load", "store"])
def test_traffic_counts_the_bytes_and_the_sectors_of_a_warp(way: str, stride: int, sectors: int, use: float) -> None:
    """4 bytes a thread, two warps."""
    traffic = Traffic()
    instruction = {"load": "ld.global.b32 %r4, [%rd20]", "store": "st.global.b32 [%rd20], %r0"}[way]
    other = {"load": "store", "store": "load"}[way]
    body = f"    mad.wide.u32 %rd20, %r0, {stride}, %rd0;\n    {instruction};"
    run(body, np.zeros(16 * stride, np.uint32), threads=64, traffic=traffic)
    assert (traffic.global_bytes[way], traffic.global_bytes[other]) == (256, 0)
    assert (traffic.global_sectors[way], traffic.global_sectors[other]) == (2 * sectors, 0)
    assert traffic.sector_use == use


def test_traffic_counts_vectors_and_only_threads_that_take_part() -> None:
    traffic = Traffic()
    body = """    mad.wide.u32 %rd20, %r0, 16, %rd0;
    setp.lt.u32 %p1, %r0, 6;
    @%p1 ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd20];"""
    run(body, np.zeros(32, np.uint32), traffic=traffic)
    assert traffic.global_bytes == {"load": 96, "store": 0}
    assert traffic.global_sectors == {"load": 3, "store": 0}


@pytest.mark.parametrize(
    ("address", "instruction", "passes", "least"),
    [
        ("shl.b32 %r1, %r0, 2", "st.shared.b32 [%r1], %r0", 1, 1),
        ("shl.b32 %r1, %r0, 3", "st.shared.b32 [%r1], %r0", 2, 1),
        ("shl.b32 %r1, %r0, 7", "st.shared.b32 [%r1], %r0", 32, 1),
        ("mul.lo.s32 %r1, %r0, 132", "st.shared.b32 [%r1], %r0", 1, 1),
        ("mov.b32 %r1, 64", "st.shared.b32 [%r1], 1", 1, 1),
        ("shl.b32 %r1, %r0, 1", "st.shared.b16 [%r1], 1", 1, 1),
        ("shl.b32 %r1, %r0, 4", "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0}", 4, 4),
        ("shl.b32 %r1, %r0, 7", "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0}", 32, 4),
        ("shl.b32 %r1, %r0, 3", "st.shared.v2.b32 [%r1], {%r0, %r0}", 2, 2),
    ],
)
def test_traffic_counts_the_conflicts_of_banks(address: str, instruction: str, passes: int, least: int) -> None:
    """Two warps that do the same."""
    traffic = Traffic()
    body = f"    and.b32 %r0, %r0, 31;\n    {address};\n    {instruction};"
    run(body, threads=64, shared_bytes=4352, traffic=traffic)
    assert (traffic.shared_passes, traffic.shared_passes_least) == (2 * passes, 2 * least)


@pytest.mark.parametrize(("shift", "passes"), [(4, 4), (7, 32)])
def test_traffic_counts_the_conflicts_of_ldmatrix(shift: int, passes: int) -> None:
    """Rows side by side, and rows of 128 bytes that are not swizzled: each tile 8 times over the same banks."""
    counted = []
    for instruction in ("", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [$0];"):
        traffic = Traffic()
        each(
            f"    mov.b32 $d0, $0;\n    {instruction}",
            np.arange(32, dtype=np.uint32) << shift,
            shared=bytes(4096),
            traffic=traffic,
        )
        counted.append((traffic.shared_passes, traffic.shared_passes_least))
    assert (counted[1][0] - counted[0][0], counted[1][1] - counted[0][1]) == (passes, 4)


def test_traffic_counts_the_multiplications_of_tensor_cores() -> None:
    """16 x 8 x 16 for each warp; 64 x N x 16 for each warpgroup."""
    traffic = Traffic()
    body = """    mov.b32 %r1, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r4, %r5, %r6, %r7}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r1, %r1, %r1, %r1};"""
    run(body, threads=64, grid=(3, 1, 1), traffic=traffic)
    assert traffic.multiplications == 3 * 2 * 16 * 8 * 16
    traffic, layout = Traffic(), k_major(0)
    each(
        """    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r400, %r401, %r402, %r403}, $0, $0, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mov.b32 $d0, %r400;""",
        np.full(256, layout.descriptor(0), np.uint64), shared=bytes(1 << 13), traffic=traffic,
    )  # fmt: skip
    assert traffic.multiplications == 2 * 64 * 8 * 16


def test_no_traffic_counts_nothing() -> None:
    assert Traffic().sector_use == 0
