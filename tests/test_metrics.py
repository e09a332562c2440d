"""How far two tensors are apart: hand-computed values, and never a silent pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llama_export.parity.metrics import Difference, difference
from llama_export.parity.report.result import WorstElement


def one(got: Any, want: Any, name: str = "logits") -> Difference:
    return difference([(name, got, want)])


def test_every_number_by_hand() -> None:
    found = one([[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]], [[1.0, 2.5, -3.0], [4.0, 3.0, 6.0]], "past_key_values.7.key")
    assert found.max_abs == 2.0
    assert found.largest == 6.0
    assert found.relative == 2.0 / 6.0
    assert found.l2 == pytest.approx(math.sqrt(0.25 + 4.0), rel=1e-15)
    assert found.norm == pytest.approx(math.sqrt(1 + 6.25 + 9 + 16 + 9 + 36), rel=1e-15)
    assert found.relative_l2 == pytest.approx(math.sqrt(4.25 / 77.25), rel=1e-15)
    assert found.nonfinite == 0
    assert found.worst == WorstElement(tensor="past_key_values.7.key", layer=7, index=(1, 1), got=5.0, want=3.0)


def test_equal_tensors_are_zero_apart() -> None:
    found = one([1.0, -2.0], [1.0, -2.0])
    assert (found.max_abs, found.relative, found.relative_l2, found.nonfinite) == (0.0, 0.0, 0.0, 0)


def test_several_pairs_are_one_quantity() -> None:
    found = difference([("a.0.x", [3.0], [0.0]), ("b.1.x", [1.0, 0.0], [1.0, -4.0]), ("c", [10.0], [10.0])])
    assert found.max_abs == 4.0
    assert found.largest == 10.0, "the largest value of all pairs, not of the worst one"
    assert found.l2 == 5.0
    assert found.norm == pytest.approx(math.sqrt(1 + 16 + 100))
    assert found.worst == WorstElement(tensor="b.1.x", layer=1, index=(1,), got=0.0, want=-4.0)


def test_a_name_without_a_layer_has_none() -> None:
    assert one([1.0], [2.0], "logits").worst.layer is None


def test_the_comparison_is_in_float64() -> None:
    # in float32 the difference of these two is 0; in float16 their square overflows
    assert one(np.array([1.0 + 2.0**-40]), np.array([1.0], np.float32)).max_abs == 2.0**-40
    found = one(np.array([6e4], np.float16), np.array([-6e4], np.float16))
    assert found.max_abs == 2 * float(np.float16(6e4))
    assert math.isfinite(found.l2)
    assert one(np.array([2**40 + 1]), np.array([2**40])).max_abs == 1.0


BAD_PAIRS = {
    "NaN in got": ([1.0, math.nan], [1.0, 2.0], 1),
    "NaN in want": ([1.0, 2.0], [1.0, math.nan], 1),
    "NaN in both": ([1.0, math.nan], [1.0, math.nan], 1),
    "infinity in got": ([1.0, math.inf], [1.0, 2.0], 1),
    "infinity in want": ([1.0, 2.0], [1.0, -math.inf], 1),
    "the same infinity in both": ([1.0, math.inf], [1.0, math.inf], 1),
    "different places": ([math.nan, 2.0, 3.0], [1.0, math.inf, 3.0], 2),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_what_is_not_finite_is_an_infinite_error_and_counted(what: str) -> None:
    got, want, count = BAD_PAIRS[what]
    found = one(got, want)
    assert found.max_abs == found.relative == found.l2 == found.relative_l2 == math.inf
    assert found.nonfinite == count
    assert not (math.isfinite(found.worst.got) and math.isfinite(found.worst.want))
    assert math.isfinite(found.largest)
    assert math.isfinite(found.norm)


def test_one_bad_pair_makes_the_whole_bad() -> None:
    found = difference([("a", [1.0], [1.0]), ("b", [math.nan], [1.0]), ("c", [5.0], [1.0])])
    assert found.max_abs == math.inf
    assert found.nonfinite == 1
    assert found.worst.tensor == "b"


def test_a_zero_want_makes_any_error_infinite() -> None:
    assert one([1e-30], [0.0]).relative == math.inf
    assert one([1e-30], [0.0]).relative_l2 == math.inf
    assert one([0.0, 0.0], [0.0, 0.0]).relative == 0.0


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([1.0, 2.0], [1.0]),
        ([[1.0]], [1.0]),
        ([1.0], 1.0),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros((1, 3)), np.zeros((2, 3))),
    ],
    ids=["length", "rank", "scalar", "transposed", "would broadcast"],
)
def test_shapes_that_differ_raise_and_name_both(got: Any, want: Any) -> None:
    with pytest.raises(ValueError, match=r"logits: got shape \[.*\], expected \[.*\]"):
        one(got, want)


def test_nothing_to_compare_raises() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        difference([])
    with pytest.raises(ValueError, match=r"got shape \[0\]"):
        one([], [])
    with pytest.raises(ValueError, match=r"got shape \[2, 0\]"):
        difference([("a", [1.0], [1.0]), ("b", np.zeros((2, 0)), np.zeros((2, 0)))])
