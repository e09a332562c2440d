"""How far two tensors are apart. Computed in float64; never skips, never rounds a difference away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama_export.parity.report.result import WorstElement


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The difference of one or several named tensor pairs, taken together."""

    max_abs: float
    """Largest absolute error; infinite when either side holds a NaN or an infinity."""
    largest: float
    """Largest magnitude of the wanted values."""
    l2: float
    """Square root of the sum of squared errors."""
    norm: float
    """The same of the wanted values."""
    nonfinite: int
    """NaN and infinities on either side."""
    worst: WorstElement

    @property
    def relative(self) -> float:
        """``max_abs`` as a share of the largest wanted magnitude: "within 1e-5 of the largest logit"."""
        return _ratio(self.max_abs, self.largest)

    @property
    def relative_l2(self) -> float:
        """Error norm over the norm of the wanted values."""
        return _ratio(self.l2, self.norm)


def difference(pairs: Iterable[tuple[str, ArrayLike, ArrayLike]]) -> Difference:
    """Compares (name, got, want) triples as one quantity.

    Raises:
        ValueError: no pair, an empty tensor, or shapes that differ: never a silent pass.
    """
    found: list[Difference] = [_difference(name, np.asarray(got), np.asarray(want)) for name, got, want in pairs]
    if not found:
        raise ValueError("nothing to compare")
    worst = max(found, key=lambda item: item.max_abs)
    return Difference(
        max_abs=worst.max_abs,
        largest=max(item.largest for item in found),
        l2=float(np.sqrt(sum(item.l2**2 for item in found))),
        norm=float(np.sqrt(sum(item.norm**2 for item in found))),
        nonfinite=sum(item.nonfinite for item in found),
        worst=worst.worst,
    )


def _difference(name: str, got: NDArray[Any], want: NDArray[Any]) -> Difference:
    if got.shape != want.shape or got.size == 0:
        raise ValueError(f"{name}: got shape {list(got.shape)}, expected {list(want.shape)}")
    left, right = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(left) & np.isfinite(right)
    nonfinite = int(finite.size - finite.sum())
    errors = np.where(finite, np.abs(np.where(finite, left, 0.0) - np.where(finite, right, 0.0)), np.inf)
    index = np.unravel_index(int(errors.argmax()), errors.shape)
    kept = np.where(np.isfinite(right), right, 0.0)
    parts = name.split(".")
    return Difference(
        max_abs=float(errors[index]),
        largest=float(np.abs(kept).max()),
        l2=float(np.sqrt((errors**2).sum())),
        norm=float(np.sqrt((kept**2).sum())),
        nonfinite=nonfinite,
        worst=WorstElement(
            tensor=name,
            layer=next((int(part) for part in parts if part.isdigit()), None),
            index=tuple(int(i) for i in index),
            got=float(left[index]),
            want=float(right[index]),
        ),
    )


def _ratio(error: float, scale: float) -> float:
    if error == 0:
        return 0.0
    return error / scale if scale > 0 else float("inf")
