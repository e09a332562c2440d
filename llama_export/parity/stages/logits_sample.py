"""A sample of a stage's logits for the report: enough to see agreement and error, few enough to carry. Judges nothing.

Shapes: n positions, V entries of the vocabulary (or labels of a head).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export.errors import ConfigError
from llama_export.parity.report.result import LogitsSample, TopChoices, TopLogit
from llama_export.runtime.text import TextCodec

SPREAD = 320
"""Logits drawn evenly; the shown positions' first choices and the largest error come on top: fewer than 400 in all."""
TOP_K = 5
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples modulo 1 fill an interval evenly however many there are, so no stride can meet the vocabulary's own."""


def logits_sample(
    got: NDArray[Any], want: NDArray[Any], shown: Mapping[int, str], text: Callable[[int], str | None]
) -> LogitsSample:
    """The same entries of both sides, by a fixed rule: the same logits give the same sample.

    Args:
        got: [n, V], the artefact's.
        want: [n, V], the oracle's.
        shown: position -> what it is, in words; the position of the largest error is added.
        text: token id -> what to show for it.
    """
    left, right = np.asarray(got, np.float64), np.asarray(want, np.float64)
    positions, tokens = left.shape
    with np.errstate(invalid="ignore"):  # inf - inf
        errors = np.abs(left - right)
    worst = np.where(np.isfinite(errors), errors, np.inf).argmax()
    at, token = (int(i) for i in np.unravel_index(worst, left.shape))
    places = {at: "largest error"}
    for position, where in shown.items():
        places[position] = f"{where}, {places[position]}" if position in places else where

    def choices(row: NDArray[np.float64]) -> tuple[TopLogit, ...]:
        ids = np.where(np.isnan(row), np.inf, row)  # argmax takes a NaN for the largest, and so would a decoder
        first = np.argsort(-ids, kind="stable")[:TOP_K]
        return tuple(TopLogit(token=int(i), text=text(int(i)), logit=float(row[i])) for i in first)

    top = tuple(
        TopChoices(
            position=position, where=places[position], got=choices(left[position]), want=choices(right[position])
        )
        for position in sorted(places)
    )
    entries = {(at, token)}
    entries |= {(one.position, choice.token) for one in top for choice in (*one.got, *one.want)}
    if left.size <= SPREAD:
        entries |= {(row, column) for row in range(positions) for column in range(tokens)}
    else:
        entries |= {(i * positions // SPREAD, int(i * _GOLDEN % 1 * tokens)) for i in range(SPREAD)}
    rows, columns = zip(*sorted(entries), strict=True)
    return LogitsSample(
        compared=left.size,
        positions=rows,
        tokens=columns,
        got=tuple(left[rows, columns].tolist()),
        want=tuple(right[rows, columns].tolist()),
        top=top,
    )


def decode_sample(got: NDArray[Any], want: NDArray[Any], prompt: int, bundle: Path) -> LogitsSample:
    """The end of the prompt, and the first, middle and last decode step after it.

    Args:
        got: [n, V], the artefact's logits of the prompt's tokens and of every decode step.
        want: [n, V], the oracle's.
        prompt: tokens of the prompt.
        bundle: folder whose tokenizer, if there is one, names the tokens.
    """
    steps = len(got) - prompt
    shown = {prompt - 1: "end of the prompt"}
    shown |= {prompt + step: f"decode step {step}" for step in (0, steps // 2, steps - 1)}
    try:
        return logits_sample(got, want, shown, TextCodec(bundle).text_of)
    except ConfigError:
        return logits_sample(got, want, shown, lambda token: None)


def labels_sample(pairs: Sequence[tuple[str, Any, Any]], labels: Sequence[str]) -> LogitsSample:
    """A head's logits of all its texts, one after another: the first, the middle and the last position.

    Args:
        pairs: (batch, got, want); the tensors are [.., K].
        labels: their K names, or none.
    """
    got, want = (np.concatenate(side) for side in list(zip(*pairs, strict=True))[1:])
    shown = {len(got) // 2: "middle", len(got) - 1: "last", 0: "first"}
    return logits_sample(got, want, shown, lambda token: labels[token] if labels else None)
