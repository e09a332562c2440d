"""What the runtime needs of a session: the interfaces that onnxruntime's sessions and the engines' share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llama_export.config.llama import LlamaConfig
from llama_export.runtime.buffers import Float32Array
from llama_export.runtime.requests import Int64Array


class Session(Protocol):
    """An opened bundle."""

    @property
    def config(self) -> LlamaConfig:
        """Of the model."""

    @property
    def backend(self) -> str:
        """What computes, as reports name it."""

    @property
    def note(self) -> str | None:
        """What a user must know about precision and speed, if anything."""

    @property
    def dtype(self) -> str:
        """Of the bundle."""


class HeadSession(Session, Protocol):
    """A classifier, tagger, reader or encoder, without a cache. Shapes: B texts, S tokens."""

    @property
    def task(self) -> str:
        """Of the bundle."""

    def run(
        self, input_ids: Sequence[Sequence[int]] | Int64Array, attention_mask: Int64Array | None = None
    ) -> dict[str, Float32Array]:
        """One padded batch [B, S]; names and shapes of the outputs are in :mod:`llama_export.export.export`.

        Raises:
            ShapeError: texts that the session cannot take.
            ToolchainError: the backend failed.
        """


class CacheSession(Session, Protocol):
    """A causal LM over a KV cache of its own.

    Shapes: B rows, M <= B rows of a call, S new tokens, N wanted positions, V vocabulary.
    """

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""

    @property
    def batch_size(self) -> int:
        """B."""

    @property
    def past_length(self) -> Int64Array:
        """[B], tokens that each row holds; advanced by :meth:`step` once its numbers are there."""

    def reset(self, batch_size: int | None = None) -> None:
        """Forgets all tokens, and may change the number of rows.

        Raises:
            ShapeError: more rows than the session can serve.
        """

    def rewind(self, past_length: Sequence[int]) -> None:
        """Forgets what follows the first ``past_length[b]`` tokens of each row b."""

    def most_rows(self, length: int, width: int) -> int:
        """Rows of a batch that the session serves, and that fit into memory, at once; at least 1.

        Args:
            length: tokens that a row of the cache comes to hold.
            width: new tokens of a row in the widest step.
        """

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Row ``rows[i]`` becomes row i, and the rows not named are dropped; ``rows`` ascends."""

    def step(
        self,
        input_ids: Int64Array,
        *,
        sequence_length: Int64Array | None = None,
        logits_index: Int64Array | None = None,
    ) -> Float32Array:
        """Appends tokens to the first M rows; the others stay as they are.

        Args:
            input_ids: [M, S], right-padded.
            sequence_length: [M], valid tokens per row, 1..S; default S.
            logits_index: [M, N], positions 0..S-1 that get logits; default the last valid one (N = 1).

        Returns:
            logits [M, N, V].

        Raises:
            ShapeError: more rows or tokens than the session holds.
            ToolchainError: the backend failed.
        """
