"""What a validation asks a model: a list of calls over one growing cache, the same for every artefact and every oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_export.config.llama import LlamaConfig
from llama_export.graph.kv_cache import cache_names, cache_shape
from llama_export.parity.tensors import to_numpy

Int64Array = NDArray[np.int64]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a model with a cache; see :mod:`llama_export.export.export` for the shapes."""

    label: str
    input_ids: Int64Array
    """[B, S], right-padded."""
    sequence_length: Int64Array
    """[B]"""
    logits_index: Int64Array
    """[B, N]"""


def call(label: str, input_ids: Any, sequence_length: Any = None) -> Call:
    """A call that wants the logits of every position; without lengths no row is padded."""
    ids: Int64Array = np.asarray(input_ids, np.int64)
    rows, tokens = ids.shape
    lengths = np.full(rows, tokens) if sequence_length is None else np.asarray(sequence_length)
    return Call(label, ids, lengths.astype(np.int64), np.tile(np.arange(tokens), (rows, 1)))


@dataclass(frozen=True, slots=True)
class Rows:
    """Token sequences that one batch runs: a padded prefill, then teacher-forced decode steps."""

    ids: tuple[tuple[int, ...], ...]
    """Per row, the prompt and what follows it; every row has as many tokens after its prompt as the others."""
    prompts: tuple[int, ...]
    """Per row, tokens of the prompt."""

    @property
    def steps(self) -> int:
        """Decode steps."""
        return len(self.ids[0]) - self.prompts[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest row: the cache capacity it needs, padding of the prefill included."""
        return max(max(self.prompts), *(len(row) for row in self.ids), 0)

    def row(self, index: int) -> Rows:
        """One row alone."""
        return Rows((self.ids[index],), (self.prompts[index],))

    def calls(self) -> list[Call]:
        """A prefill, then a call per step. Padding is token 0: what it is must not matter."""
        prefill: Int64Array = np.zeros((len(self.ids), max(self.prompts)), np.int64)
        for padded, ids, length in zip(prefill, self.ids, self.prompts, strict=True):
            padded[:length] = ids[:length]
        starts = list(zip(self.ids, self.prompts, strict=True))
        steps = [call(f"step {at}", [[ids[length + at]] for ids, length in starts]) for at in range(self.steps)]
        return [call("prefill", prefill, self.prompts), *steps]


@dataclass(frozen=True, slots=True)
class Run:
    """Calls over one cache."""

    calls: Sequence[Call]
    capacity: int
    """Slots of the cache, tokens."""
    fill: float = 0.0
    """What they hold at first: nothing may depend on it."""


def one_row(ids: Sequence[int], prompt: int) -> Rows:
    """A batch of one."""
    return Rows((tuple(ids),), (prompt,))


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model made of a list of calls."""

    logits: list[Array]
    """Per call, [B, N, V]."""
    cache: dict[str, Array]
    """``past_key_values.{i}.key`` and ``.value`` -> [B, G, C, D] after the last call."""
    sequence_lengths: Int64Array
    """[calls, B]"""

    @classmethod
    def to(cls, calls: Sequence[Call], logits: list[Array], cache: dict[str, Array]) -> Answers:
        """The answers to ``calls``."""
        return cls(logits, cache, np.stack([one.sequence_length for one in calls]))

    def row(self, index: int) -> Answers:
        """One row of the batch, as if it had been alone."""
        at = slice(index, index + 1)
        cache = {name: values[at] for name, values in self.cache.items()}
        return Answers([part[at] for part in self.logits], cache, self.sequence_lengths[:, at])

    def rows(self) -> list[Answers]:
        """Every row alone."""
        return [self.row(index) for index in range(self.sequence_lengths.shape[1])]

    @property
    def tokens(self) -> Array:
        """Logits of the valid tokens of a batch of one, all calls joined: [n, V]."""
        parts = [part[0, :length] for part, length in zip(self.logits, self.sequence_lengths[:, 0], strict=True)]
        joined: Array = np.concatenate(parts)
        return joined

    def valid(self, name: str) -> Array:
        """The valid part of a batch of one's cache tensor: [G, n, D]."""
        part: Array = self.cache[name][0, :, : int(self.sequence_lengths.sum())]
        return part


Pairs = list[tuple[str, Any, Any]]


def logits_pairs(got: Sequence[Answers], want: Sequence[Answers], tokens: slice = slice(None)) -> Pairs:
    """(name, got, want) per row: logits of the valid tokens, or of some of them."""
    both = enumerate(zip(got, want, strict=True))
    return [(f"logits row {row}", left.tokens[tokens], right.tokens[tokens]) for row, (left, right) in both]


def cache_pairs(got: Sequence[Answers], want: Sequence[Answers]) -> Pairs:
    """(name, got, want) per row and cache tensor: the valid part."""
    both = zip(got, want, strict=True)
    return [(name, left.valid(name), right.valid(name)) for left, right in both for name in right.cache]


def graph_inputs(runs: Sequence[Run], config: LlamaConfig, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """All calls of all runs as inputs of the graph: lengths that add up, and for the first of each run an empty cache."""
    inputs: list[dict[str, Tensor]] = []
    for run in runs:
        past_length: Int64Array = np.zeros(len(run.calls[0].input_ids), np.int64)
        shape = cache_shape(config, len(past_length), run.capacity)
        names = [past for past, _ in cache_names(config.num_hidden_layers)]
        empty = {past: torch.full(shape, run.fill, dtype=dtype) for past in names}
        for one in run.calls:
            inputs.append(
                {
                    "input_ids": torch.from_numpy(one.input_ids),
                    "past_length": torch.from_numpy(past_length),
                    "sequence_length": torch.from_numpy(one.sequence_length),
                    "logits_index": torch.from_numpy(one.logits_index),
                    **empty,
                }
            )
            past_length, empty = past_length + one.sequence_length, {}
    return inputs


def collected(runs: Sequence[Run], stream: Iterable[tuple[str, list[Any]]], config: LlamaConfig) -> list[Answers]:
    """What came out of all runs in lockstep: each one's logits and its last cache."""
    past_of = {present: past for past, present in carried(config).items()}
    ends = list(accumulate(len(run.calls) for run in runs))
    logits: list[list[Array]] = [[] for _ in runs]
    caches: list[dict[str, Array]] = [{} for _ in runs]
    for name, values in stream:
        if name == "logits":
            every = [to_numpy(value) for value in values]
            logits = [every[end - len(run.calls) : end] for run, end in zip(runs, ends, strict=True)]
        elif name in past_of:
            for cache, end in zip(caches, ends, strict=True):
                cache[past_of[name]] = to_numpy(values[end - 1])
    return [Answers.to(run.calls, mine, cache) for run, mine, cache in zip(runs, logits, caches, strict=True)]


def carried(config: LlamaConfig) -> Mapping[str, str]:
    """Cache input -> the output of the call before that it is."""
    return dict(cache_names(config.num_hidden_layers))
