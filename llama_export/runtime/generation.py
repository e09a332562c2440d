"""Generation: prompts through a session's cache in chunks, then one token per row and step, as a stream of events.

Rows are independent: each has its own settings and random numbers, ends by itself, and leaves the batch when it does.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import numpy as np

from llama_export.errors import ConfigError, ShapeError
from llama_export.runtime.buffers import Float32Array
from llama_export.runtime.protocol import CacheSession
from llama_export.runtime.requests import Int64Array, check_token_ids
from llama_export.runtime.sampling import Sampler, TokenLogprobs, token_logprobs
from llama_export.runtime.sampling_params import SamplingParams
from llama_export.runtime.text import TextCodec

FinishReason = Literal["stop", "length"]
"""``stop``: an end-of-sequence or stop token, or a stop text. ``length``: ``max_new_tokens``. OpenAI's words."""
PREFILL_CHUNK = 512
"""Tokens per row and step of a prefill: enough for matrix products at full speed, and a bound on the memory of one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One new token of one row."""

    row: int
    """Index of its prompt."""
    token: int
    """Its id."""
    text: str
    """What is certain of the row's text since the event before; empty without a tokenizer. A row's pieces join to its text."""
    logprobs: TokenLogprobs | None
    """If they were asked for."""
    finish_reason: FinishReason | None
    """Why the row ends with this token; None: it goes on."""
    stop: str | int | None
    """The stop text or the token that ended the row."""
    seconds: float
    """Of computing since the start of the batch, to this token; the time that the consumer of the events takes is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a batch came to, and how long it took."""

    tokens: list[list[int]]
    """New tokens of each row, without the prompt; an end-of-sequence token is the last of its row."""
    first_token_seconds: float
    """From the prompts to the first token of any row."""
    prefill_seconds: float
    """From the prompts to the first token of every row."""
    decode_seconds: float
    """All later tokens."""
    decode_steps: int
    """Steps of one token per row after the prefill."""

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Steps per second (tokens per second of one row); None without a decode step."""
        return self.decode_steps / self.decode_seconds if self.decode_steps else None


def generate(
    session: CacheSession, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_tokens: Sequence[int] = ()
) -> Generation:
    """Continues every prompt greedily and returns when all are done: what is measured and proven.

    Args:
        session: its cache is reset.
        prompts: token ids, one list per row, of any lengths >= 1.
        max_new_tokens: per row, >= 1.
        stop_tokens: a row ends after one of these.

    Raises:
        ConfigError, ShapeError: see :func:`generate_steps`.
    """
    events = list(
        generate_steps(session, prompts, SamplingParams(max_new_tokens=max_new_tokens), eos_token_ids=stop_tokens)
    )
    rows = [[event for event in events if event.row == row] for row in range(len(prompts))]
    firsts = [row[0].seconds for row in rows]
    return Generation(
        tokens=[[event.token for event in row] for row in rows],
        first_token_seconds=min(firsts),
        prefill_seconds=max(firsts),
        decode_seconds=max(event.seconds for event in events) - max(firsts),
        decode_steps=max(map(len, rows)) - 1,
    )


def generate_steps(
    session: CacheSession,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    eos_token_ids: Collection[int] = (),
    codec: TextCodec | None = None,
    reused_tokens: int = 0,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Generator[TokenEvent]:
    """Continues a batch of prompts, token by token.

    The request is checked and the session made ready at once, computing starts with the first event. Within a step, events come in the order of the
    prompts; a short prompt may get its first token while the chunks of a long one are still being read. Closing the
    generator ends the batch: the session then holds the tokens of ``past_length``, and may be used again.

    Args:
        session: gets as many rows as there are prompts, and forgets what it holds.
        prompts: token ids, one list per row, of any lengths >= 1.
        params: for all rows, or one for each.
        eos_token_ids: end a row, unless its ``ignore_eos`` is set.
        codec: makes text of tokens; needed for stop texts.
        reused_tokens: one prompt only: the session's only row holds so many of its first tokens already, and keeps them.
        prefill_chunk: a longer prompt is read in pieces of so many tokens. Where RoPE follows the length of the sequence,
            pieces would be another model: then every prompt is read at once.

    Raises:
        ConfigError: stop texts without a tokenizer, a bias or stop token outside the vocabulary, or another number of
            ``params`` than of prompts.
        ShapeError: no prompt, an empty one, a token id outside the vocabulary, more rows than the session can serve, or
            prompt plus new tokens beyond the cache's capacity.
        ToolchainError: while events are made: the backend failed, or its logits are not finite.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    check_request(session, prompts, each, codec, reused_tokens)
    rows = [
        _Row(index, prompt, wanted, eos_token_ids, codec)
        for index, (prompt, wanted) in enumerate(zip(prompts, each, strict=True))
    ]
    if session.config.rope.follows_length:
        prefill_chunk = max(map(len, prompts))
    if reused_tokens:
        session.rewind([reused_tokens])
    else:
        session.reset(len(rows))
    return _steps(session, rows, reused_tokens, prefill_chunk)


def rows_at_once(session: CacheSession, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> int:
    """How many of these prompts a batch may hold, by the longest of them: what the session serves and memory holds."""
    longest = max(map(len, prompts))
    length = max(len(prompt) + wanted.max_new_tokens - 1 for prompt, wanted in zip(prompts, params, strict=True))
    width = longest if session.config.rope.follows_length else min(longest, PREFILL_CHUNK)
    return session.most_rows(length, width)


class _Row:
    """One prompt on its way."""

    def __init__(
        self, index: int, prompt: Sequence[int], params: SamplingParams, eos_token_ids: Collection[int], codec: TextCodec | None
    ) -> None:  # fmt: skip
        self.index, self.prompt, self.params = index, prompt, params
        self.is_done = False
        self.latest = -1
        """The newest token, which the cache does not hold yet."""
        self._made = 0
        self._sampler = Sampler(params, prompt)
        self._stops = frozenset([*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)])
        self._text = codec.stream(params.stop) if codec is not None else None

    def take(self, logits: Float32Array, seconds: float) -> TokenEvent:
        """The token that follows from logits [V]."""
        token = self._sampler.choose(logits)
        self.latest = token
        self._made += 1
        stop: str | int | None = token if token in self._stops else None
        ends, text = stop is not None or self._made == self.params.max_new_tokens, ""
        if self._text is not None:
            if stop is None:  # a token that ends a text is not part of it
                text = self._text.push(token)
            if ends:
                text += self._text.finish()
            if stop is None:
                stop = self._text.matched
        self.is_done = ends or stop is not None
        count = self.params.logprobs
        return TokenEvent(
            row=self.index, token=token, text=text, stop=stop, seconds=seconds,
            logprobs=None if count is None else token_logprobs(logits, token, count),
            finish_reason="stop" if stop is not None else "length" if self.is_done else None,
        )  # fmt: skip


def _steps(session: CacheSession, rows: list[_Row], reused_tokens: int, prefill_chunk: int) -> Generator[TokenEvent]:
    """Prefill, then decode. ``rows[i]`` is row i of the session; ``spent`` counts the seconds before the running step."""
    # Longest first: the rows that still have tokens are the first ones in every chunk.
    rows = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    spent = 0.0
    for begin in range(reused_tokens, len(rows[0].prompt), prefill_chunk):
        start = time.perf_counter()
        end = begin + prefill_chunk
        ids, lengths = _padded([row.prompt[begin:end] for row in rows if len(row.prompt) > begin])
        logits = session.step(ids, sequence_length=lengths)
        events = [
            row.take(logits[at, -1], spent + time.perf_counter() - start)
            for at, row in enumerate(rows[: len(ids)])
            if len(row.prompt) <= end
        ]
        spent += time.perf_counter() - start
        yield from sorted(events, key=_row_of)
    ids = np.empty((len(rows), 1), np.int64)
    while True:
        start = time.perf_counter()
        if not (rows := _still_running(session, rows)):
            return
        for at, row in enumerate(rows):
            ids[at, 0] = row.latest
        logits = session.step(ids[: len(rows)])
        events = [row.take(logits[at, -1], spent + time.perf_counter() - start) for at, row in enumerate(rows)]
        spent += time.perf_counter() - start
        yield from sorted(events, key=_row_of)


_row_of = attrgetter("row")


def _padded(pieces: Sequence[Sequence[int]]) -> tuple[Int64Array, Int64Array]:
    """Token ids [M, S], right-padded, and lengths [M]."""
    lengths: Int64Array = np.array([len(piece) for piece in pieces], np.int64)
    ids: Int64Array = np.zeros((len(pieces), int(lengths.max())), np.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece
    return ids, lengths


def _still_running(session: CacheSession, rows: list[_Row]) -> list[_Row]:
    """The rows that go on, which the session keeps; where none does, it is left as it is, for a prompt that continues it."""
    left = [at for at, row in enumerate(rows) if not row.is_done]
    if left and len(left) < len(rows):
        session.keep_rows(left)
    return [rows[at] for at in left]


def check_request(
    session: CacheSession,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    codec: TextCodec | None,
    reused_tokens: int = 0,
) -> None:
    """What :func:`generate_steps` checks before anything is computed, the number of rows aside.

    Raises:
        ConfigError, ShapeError: see :func:`generate_steps`.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ShapeError(
            "nothing to continue", details={"prompt lengths": lengths}, hint="every prompt needs at least one token"
        )
    if len(params) != len(prompts):
        raise ConfigError(
            "the number of settings is not that of the prompts",
            details={"got": f"{len(params)} SamplingParams", "expected": f"{len(prompts)}, or one for all"},
            hint="give one SamplingParams per prompt",
        )
    if reused_tokens and not (len(prompts) == 1 and 0 < reused_tokens < lengths[0]):
        raise ShapeError(
            f"{reused_tokens} tokens cannot be reused",
            details={"prompt lengths": lengths, "expected": "one prompt of more tokens than are reused"},
            hint="the last token of a prompt is always run: its logits are the next one's",
        )
    # The last new token is not fed back, so it needs no room in the cache.
    needs = [length + wanted.max_new_tokens - 1 for length, wanted in zip(lengths, params, strict=True)]
    if max(needs) > session.capacity:
        row = needs.index(max(needs))
        raise ShapeError(
            f"prompt and new tokens need a cache of {needs[row]} tokens, this one holds {session.capacity}",
            details={
                "prompt": f"{lengths[row]} tokens",
                "max_new_tokens": params[row].max_new_tokens,
                "kv_cache_capacity": session.capacity,
            },
            hint="raise --max-seq-len (of an engine: build it with more), shorten the prompt, or lower --max-new-tokens",
        )
    vocab_size = session.config.vocab_size
    for prompt, wanted in zip(prompts, params, strict=True):
        check_token_ids(prompt, vocab_size)
        if wanted.stop and codec is None:
            raise ConfigError(
                "stop texts need a tokenizer",
                details={"stop": list(wanted.stop)},
                hint="put the checkpoint's `tokenizer.json` into the bundle, or name tokens: --stop-token ID",
            )
        for name, tokens in (("logit_bias", wanted.logit_bias), ("stop_token_ids", wanted.stop_token_ids)):
            if (token := max(tokens, default=0)) >= vocab_size:
                raise ConfigError(
                    f"{name} names token {token}, which is outside the vocabulary",
                    details={"got": token, "expected": f"0..{vocab_size - 1}"},
                    hint="is it a token of another model?",
                )
