"""From logits to a token: each step as a pure function, and one sampler per row. The settings are
:class:`llama_export.runtime.sampling_params.SamplingParams`.

The order is that of transformers' ``generate`` (5.23, ``_get_logits_processor``), and of vLLM:

1. ``logit_bias``: :func:`add_bias`
2. ``repetition_penalty``, on prompt and generated tokens: :func:`penalize_repetition`
3. ``presence_penalty`` and ``frequency_penalty``, on generated tokens: :func:`penalize_counts`; transformers has neither
4. greedy: the largest. Else ``temperature``: :func:`scale`
5. ``top_k``, ``top_p``, ``min_p``: each names the candidates it keeps, and the next one sees those alone
6. :func:`draw`

Shapes: V vocabulary, n candidates (V of them at first). Steps compute in float64, whatever the logits' dtype, so that
neither extreme logits nor a tiny temperature overflow. Nothing sorts the vocabulary: ``top_k`` and ``top_p`` select, in
time O(n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export.errors import ToolchainError
from llama_export.runtime.sampling_params import SamplingParams

Logits = NDArray[np.floating[Any]]
"""[n], float32 as they come from a session or float64 between steps; -inf is "impossible"."""
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What the model itself thought of a token: natural logarithms of probabilities, before any step of sampling."""

    token: int
    """The chosen one."""
    logprob: float
    """Its own."""
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the most likely tokens, likeliest first; the chosen one may be among them."""


class Sampler:
    """Chooses the tokens of one row, and remembers what its penalties need.

    Args:
        params: of the row.
        prompt: token ids; the repetition penalty counts them as seen.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self._params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._bias_tokens: Int64Array = np.array(list(params.logit_bias), np.int64)
        self._bias_values: Float64Array = np.array(list(params.logit_bias.values()), np.float64)
        self._counts_matter = bool(params.presence_penalty or params.frequency_penalty)
        self._remembers = self._counts_matter or params.repetition_penalty != 1
        self._slots: dict[int, int] = {}
        """Distinct token of prompt and output -> its index in the two arrays, which are filled from the left."""
        if self._remembers:
            self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt))}
        room = len(self._slots) + params.max_new_tokens if self._remembers else 0
        self._seen: Int64Array = np.zeros(room, np.int64)
        self._seen[: len(self._slots)] = list(self._slots)
        self._counts: Int64Array = np.zeros(room, np.int64)
        """How often each was generated."""
        filters: tuple[tuple[bool, Callable[[Logits], Indices]], ...] = (
            (params.top_k > 0, partial(top_k, k=params.top_k)),
            (params.top_p < 1, partial(top_p, p=params.top_p)),
            (params.min_p > 0, partial(min_p, p=params.min_p)),
        )
        self._filters = [keep for is_on, keep in filters if is_on]

    def choose(self, logits: Logits) -> int:
        """The next token, from the model's logits [V], which are left as they are.

        Raises:
            ToolchainError: logits that are no numbers.
        """
        params = self._params
        scores = self._adjusted(logits)
        token = int(scores.argmax())
        if not np.isfinite(scores[token]):  # a NaN is the largest for numpy
            raise ToolchainError(
                "the model's logits are not finite",
                details={"got": f"{scores[token]} for token {token}", "expected": "finite numbers"},
                hint="`llama-export validate` names the operation at fault",
            )
        if params.temperature > 0:
            token = self._sampled(scores)
        if self._remembers:
            self._remember(token)
        return token

    def _adjusted(self, logits: Logits) -> Logits:
        """Biases and penalties, where there are any."""
        params, known = self._params, len(self._slots)
        if self._bias_tokens.size:
            logits = add_bias(logits, self._bias_tokens, self._bias_values)
        if params.repetition_penalty != 1:
            logits = penalize_repetition(logits, self._seen[:known], params.repetition_penalty)
        if self._counts_matter:
            seen, counts = self._seen[:known], self._counts[:known]
            logits = penalize_counts(logits, seen, counts, params.presence_penalty, params.frequency_penalty)
        return logits

    def _sampled(self, logits: Logits) -> int:
        scores = scale(logits, self._params.temperature)
        tokens: Indices | None = None  # every one
        for keep in self._filters:
            kept = keep(scores)
            scores = scores[kept]
            tokens = kept if tokens is None else tokens[kept]
        index = draw(scores, self._random.random())
        return index if tokens is None else int(tokens[index])

    def _remember(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        self._seen[slot] = token
        self._counts[slot] += 1


# ---- the steps --------------------------------------------------------------------------------------------------


_BLOCK = 32
"""Logits per block of :func:`top_k`: many enough that few blocks are left to look into."""


def add_bias(logits: Logits, tokens: Int64Array, bias: Float64Array) -> Float64Array:
    """Adds ``bias[i]`` to the logit of ``tokens[i]``; tokens are distinct."""
    found = logits.astype(np.float64)
    found[tokens] += bias
    return found


def penalize_repetition(logits: Logits, tokens: Int64Array, penalty: float) -> Float64Array:
    """Divides the positive logits of ``tokens`` by ``penalty``, and multiplies the negative ones."""
    found = logits.astype(np.float64)
    values = found[tokens]
    found[tokens] = np.where(values < 0, values * penalty, values / penalty)
    return found


def penalize_counts(
    logits: Logits, tokens: Int64Array, counts: Int64Array, presence: float, frequency: float
) -> Float64Array:
    """Subtracts ``presence`` from the logit of each of the distinct ``tokens`` whose count is not 0, and ``frequency``
    times its count."""
    found = logits.astype(np.float64)
    found[tokens] -= presence * (counts > 0) + frequency * counts
    return found


def scale(logits: Logits, temperature: float) -> Float64Array:
    """Divides by ``temperature``, the largest logit taken for 0: the probabilities do not notice, and nothing overflows."""
    found = _below_largest(logits)
    with np.errstate(over="ignore"):  # to -inf, at a temperature near 0
        found /= temperature
    return found


def top_k(logits: Logits, k: int) -> Indices:
    """Indices, ascending, of the ``k`` largest; more where several tie for the last place, as in transformers."""
    n = len(logits)
    able = np.arange(n)
    if k >= n:
        return able
    if n >= k * _BLOCK:
        # In k blocks something is as large as the k-th largest of the blocks' maxima: what is smaller is not among the k.
        maxima = logits[: n - n % _BLOCK].reshape(-1, _BLOCK).max(1)
        able = np.flatnonzero(logits >= np.partition(maxima, -k)[-k])
    values = logits[able]
    kept: Indices = able[values >= np.partition(values, -k)[-k]]
    return kept


def top_p(logits: Logits, p: float) -> Indices:
    """Indices, ascending, of the fewest largest whose probabilities add up to ``p``, 0 < p < 1; at least one. Of equal
    logits at the border, those of lower index stay."""
    probabilities = _weights(logits)
    probabilities /= probabilities.sum()
    # n tokens of (1 - p) / n or less weigh 1 - p at most, and are least likely: the nucleus does without them.
    undecided = probabilities[probabilities >= min((1 - p) / len(logits), probabilities.max())]
    missing = p
    while (half := len(undecided) // 2) > 0:  # the least likely token of the nucleus is in the upper half, or below it
        undecided = np.partition(undecided, half)
        mass = undecided[half:].sum()
        if mass >= missing:
            undecided = undecided[half:]
        else:
            undecided = undecided[:half]
            missing -= mass
    least = undecided[0]
    equal = np.flatnonzero(probabilities == least)
    count = max(1, math.ceil((p - probabilities[probabilities > least].sum()) / least))
    kept = probabilities >= least
    kept[equal[count:]] = False
    return np.flatnonzero(kept)


def min_p(logits: Logits, p: float) -> Indices:
    """Indices, ascending, of those whose probability is at least ``p`` times the largest; 0 < p <= 1."""
    return np.flatnonzero(logits >= logits.max() + np.log(p))


def draw(logits: Logits, uniform: float) -> int:
    """The index at which the cumulated probabilities exceed ``uniform``, of [0, 1); never one of probability 0."""
    edges = _weights(logits)
    np.cumsum(edges, out=edges)
    index = edges.searchsorted(uniform * edges[-1], side="right")
    return int(min(index, edges.searchsorted(edges[-1])))  # the product may round up to the last edge itself


def token_logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """The logarithm of the softmax of the model's logits [V], in float64: of ``token``, and of the ``count`` largest; of
    equal ones, those of lower id."""
    shifted = _below_largest(logits)
    total = float(np.log(_weights(logits).sum()))
    largest = top_k(logits, count) if count else np.arange(0)
    largest = largest[np.argsort(-logits[largest], kind="stable")][:count]
    return TokenLogprobs(
        token=token,
        logprob=float(shifted[token]) - total,
        top=tuple((int(other), float(shifted[other]) - total) for other in largest),
    )


def _weights(logits: Logits) -> Float64Array:
    """Exponentials, the largest 1. In place: at V = 128k a new array costs more in page faults than in arithmetic."""
    found = _below_largest(logits)
    return np.exp(found, out=found)


def _below_largest(logits: Logits) -> Float64Array:
    """The largest taken for 0. In float64: the difference of two float32 may overflow."""
    found = logits.astype(np.float64)
    found -= found.max()
    return found
