"""What a session checks of a request before it computes, and the rows of a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llama_export.config.llama import LlamaConfig
from llama_export.errors import ShapeError
from llama_export.graph.io import is_single_text

Int64Array = NDArray[np.int64]


MAX_ROWS = 256
"""Rows of one batch: more add memory and, on a CPU, no speed."""


class CacheRows(ABC):
    """The rows of a session's cache: how many there are, and the tokens that each holds."""

    past_length: Int64Array
    """[B], valid tokens in each row of the cache."""

    @property
    def batch_size(self) -> int:
        """B, rows in use."""
        return len(self.past_length)

    def rewind(self, past_length: Sequence[int]) -> None:
        """Forgets what follows the first ``past_length[b]`` tokens of each row b.

        Raises:
            ShapeError: another number of rows, or more tokens than a row holds.
        """
        wanted: Int64Array = np.array(past_length, np.int64)
        if wanted.shape != self.past_length.shape or (wanted < 0).any() or (wanted > self.past_length).any():
            raise ShapeError(
                "a cache can only be rewound to tokens that it holds",
                details={"got": wanted.tolist(), "expected": f"at most {self.past_length.tolist()}"},
                hint="one length per row",
            )
        self.past_length = wanted

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Makes row ``rows[i]`` the new row i; what is not named is forgotten.

        Raises:
            ShapeError: no row, one that is not there, or rows that are not in ascending order.
        """
        if not rows or list(rows) != sorted({*rows} & {*range(self.batch_size)}):
            raise ShapeError(
                "these rows cannot be kept",
                details={
                    "got": list(rows),
                    "expected": f"at least one of 0..{self.batch_size - 1}, in ascending order",
                },
                hint="name each row of the batch that goes on",
            )
        # new <= old: nothing is overwritten before it is moved
        self._move_rows([(new, old, int(self.past_length[old])) for new, old in enumerate(rows) if new != old])
        self.past_length = self.past_length[list(rows)]

    def most_rows(self, length: int, width: int) -> int:
        """Rows of a batch that fit into memory at once, at least 1.

        Args:
            length: tokens that a row of the cache comes to hold.
            width: new tokens of a row in the widest step.
        """
        return MAX_ROWS

    @abstractmethod
    def _move_rows(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """For each (new, old, length), in this order: copies the first ``length`` tokens of row ``old`` to row ``new`` in
        every cache tensor."""


def checked_step(
    input_ids: Sequence[Sequence[int]] | Int64Array,
    sequence_length: Sequence[int] | Int64Array | None,
    logits_index: Sequence[Sequence[int]] | Int64Array | None,
    vocab_size: int,
    past_length: Int64Array,
    capacity: int,
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Token ids [M, S], lengths [M] and wanted positions [M, N] as the graph takes them.

    Args:
        input_ids, sequence_length, logits_index: as given to ``step``.
        vocab_size: V.
        past_length: [B], of the session.
        capacity: C, of the session.

    Raises:
        ShapeError: see :meth:`OnnxRuntimeSession.step`.
    """
    ids: Int64Array = np.ascontiguousarray(input_ids, np.int64)
    if ids.ndim != 2 or not 1 <= ids.shape[0] <= len(past_length) or ids.shape[1] < 1:
        raise ShapeError(
            "input_ids has the wrong shape",
            details={"got": list(ids.shape), "expected": f"[1..{len(past_length)}, S >= 1]"},
            hint="one row of token ids per row of the session, right-padded",
        )
    rows, new_tokens = ids.shape
    check_token_ids(ids, vocab_size)
    valid = np.full(rows, new_tokens) if sequence_length is None else np.asarray(sequence_length)
    lengths: Int64Array = np.ascontiguousarray(valid, np.int64)
    if lengths.shape != (rows,) or lengths.min() < 1 or lengths.max() > new_tokens:
        raise ShapeError(
            "sequence_length is out of range",
            details={"got": lengths.tolist(), "expected": f"{rows} values in 1..{new_tokens}"},
            hint="sequence_length counts the valid tokens of each row of input_ids",
        )
    longest = int(past_length[:rows].max()) + new_tokens
    if longest > capacity:
        raise ShapeError(
            f"the cache holds {capacity} tokens, the request needs {longest}",
            details={
                "past_length": past_length[:rows].tolist(),
                "new tokens": new_tokens,
                "kv_cache_capacity": capacity,
            },
            hint="raise --max-seq-len, or shorten the prompt",
        )
    wanted = lengths[:, None] - 1 if logits_index is None else np.asarray(logits_index)
    index: Int64Array = np.ascontiguousarray(wanted, np.int64)
    fits = index.ndim == 2 and index.shape[0] == rows and index.size > 0
    if not fits or index.min() < 0 or index.max() >= new_tokens:
        raise ShapeError(
            "logits_index is out of range",
            details={"got": index.tolist(), "expected": f"[{rows}, N >= 1] of 0..{new_tokens - 1}"},
            hint="logits_index names positions within input_ids, not within the cache",
        )
    return ids, lengths, index


def checked_texts(
    input_ids: Sequence[Sequence[int]] | Int64Array,
    attention_mask: Sequence[Sequence[int]] | Int64Array | None,
    config: LlamaConfig,
    task: str,
) -> tuple[Int64Array, Int64Array]:
    """Token ids and mask [B, S] as the graph of a head takes them; without a mask there is no padding.

    Raises:
        ShapeError: see :meth:`OnnxRuntimeHeadSession.run`.
    """
    ids: Int64Array = np.ascontiguousarray(input_ids, np.int64)
    mask: Int64Array = np.ones_like(ids) if attention_mask is None else np.ascontiguousarray(attention_mask, np.int64)
    if ids.ndim != 2 or 0 in ids.shape or mask.shape != ids.shape:
        raise ShapeError(
            "input_ids and attention_mask do not fit",
            details={"got": f"{list(ids.shape)} and {list(mask.shape)}", "expected": "[B >= 1, S >= 1] twice"},
            hint="one row of token ids per text, padded to one length, and as many 1s and 0s",
        )
    if is_single_text(config, task) and ids.shape[0] != 1:
        raise ShapeError(
            "a batch cannot be classified: the checkpoint names no padding token",
            details={"got": f"{ids.shape[0]} texts", "expected": "1"},
            hint="classify one text at a time, or set pad_token_id in config.json and export again",
        )
    if ids.shape[1] > config.max_length:
        raise ShapeError(
            f"the text has {ids.shape[1]} tokens, the model has {config.max_length} positions",
            details={"got": ids.shape[1], "expected": f"at most {config.max_length}"},
            hint="shorten the text",
        )
    check_token_ids(ids, config.vocab_size)
    return ids, mask


def check_token_ids(ids: Int64Array | Sequence[int], vocab_size: int) -> None:
    """Refuses what an embedding lookup would read out of bounds, and integers that no tensor could hold.

    Raises:
        ShapeError: a negative id, or one at or past the vocabulary's size.
    """
    values = ids if isinstance(ids, np.ndarray) else np.asarray(ids, dtype=object)
    outside = values[((values < 0) | (values >= vocab_size)).astype(bool)]
    if outside.size:
        raise ShapeError(
            f"token id {int(outside[0])} is outside the vocabulary",
            details={"got": int(outside[0]), "expected": f"0..{vocab_size - 1}"},
            hint="is the prompt from another model's tokenizer?",
        )
