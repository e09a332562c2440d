"""Greedy generation: one prefill of the prompts, then one token per row and step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from llama_export.errors import ShapeError
from llama_export.runtime.session import OnnxRuntimeSession, check_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was generated, and how long it took."""

    tokens: list[list[int]]
    """New tokens of each row, without the prompt; an end-of-sequence token is the last of its row."""
    prefill_seconds: float
    """From the prompt to the first token."""
    decode_seconds: float
    """All later tokens."""
    decode_steps: int
    """Steps of one token per row after the prefill."""

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Steps per second (tokens per second of one row); None without a decode step."""
        return self.decode_steps / self.decode_seconds if self.decode_steps else None


def generate(
    session: OnnxRuntimeSession,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> Generation:
    """Continues every prompt with the most likely token, again and again.

    Args:
        session: its cache is reset; its batch must be ``len(prompts)``.
        prompts: token ids, one list per row, of any lengths >= 1.
        max_new_tokens: per row, >= 1.
        stop_tokens: a row ends after one of these.
        on_token: called with (row, token) as soon as a token is known.

    Raises:
        ShapeError: an empty prompt, a token id outside the vocabulary, or prompt plus new tokens beyond the cache's
            capacity.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1 or max_new_tokens < 1:
        raise ShapeError(
            "nothing to continue",
            details={"prompt lengths": lengths, "max_new_tokens": max_new_tokens},
            hint="every prompt needs at least one token, and --max-new-tokens at least 1",
        )
    # The last new token is not fed back, so it needs no room in the cache.
    needed = max(lengths) + max_new_tokens - 1
    if needed > session.capacity:
        raise ShapeError(
            f"prompt and new tokens need a cache of {needed} tokens, this one holds {session.capacity}",
            details={
                "prompt": f"{max(lengths)} tokens",
                "max_new_tokens": max_new_tokens,
                "kv_cache_capacity": session.capacity,
            },
            hint="raise --max-seq-len, shorten the prompt, or lower --max-new-tokens",
        )
    for prompt in prompts:
        check_token_ids(prompt, session.config.vocab_size)
    session.reset()
    padded = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    tokens: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))

    def take(logits: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = logits[:, -1].argmax(-1)
        for row in sorted(running):
            token = int(chosen[row])
            tokens[row].append(token)
            on_token(row, token)
            if token in stop_tokens or len(tokens[row]) == max_new_tokens:
                running.discard(row)
        return chosen

    start = time.perf_counter()
    latest = take(session.step(padded, sequence_length=lengths))
    first_done = time.perf_counter()
    steps = 0
    while running:
        latest = take(session.step(latest[:, None]))
        steps += 1
    done = time.perf_counter()
    return Generation(
        tokens=tokens, prefill_seconds=first_done - start, decode_seconds=done - first_done, decode_steps=steps
    )
