"""onnxruntime sessions: one that owns a static KV cache and updates it in place, one for the heads without a cache.

Shapes: B batch, S new tokens, N wanted positions, C kv_cache_capacity, G key/value heads, D head_dim, V vocabulary.

Each cache tensor is one buffer, bound as ``past_key_values.*`` *and* as ``present.*``. On a CPU, ``model.onnxruntime.onnx``
is run, in float32: its GroupQueryAttention writes S tokens into the buffer, copies nothing, and reads the valid tokens only,
whatever the capacity. On CUDA, where that operator has no float32, ``model.onnx`` is run, in the bundle's dtype: its
TensorScatter writes into the buffer likewise. **CUDA sessions were not run on a GPU**; what could be proven without one is
decision 50 in ``docs/decisions.md``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llama_export._process import available_memory
from llama_export.bundle import Bundle
from llama_export.config import LlamaConfig
from llama_export.errors import ConfigError, ShapeError, ToolchainError
from llama_export.graph_io import INTERFACES, is_single_text
from llama_export.kv_cache import cache_names, cache_shape
from llama_export.runtime.buffers import ONNX_DTYPES, CacheBuffer, CudaBuffer, Float32Array, HostBuffer
from llama_export.runtime.graph import Device, OpenGraph, open_graph

Int64Array = NDArray[np.int64]


MAX_ROWS = 256
"""Rows of one batch: more add memory and, on a CPU, no speed."""
_MEMORY_SHARE = 4
"""A batch may take one in so many bytes of the available memory: the rest is the caller's and the weights'."""
_UNKNOWN_MEMORY = 8 << 30
"""Bytes that are taken as available where the system does not tell."""


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


class OnnxRuntimeSession(CacheRows):
    """Runs a bundle on onnxruntime, batch and capacity fixed when it is made.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        max_seq_len: C, tokens each row can hold.
        batch_size: B, rows.
        threads: of onnxruntime's operators on the CPU; None lets onnxruntime choose (one per core).
        variant: ``int8`` or ``int4``: the bundle's quantised weights; None: its own.
        device: what computes.
        graph: from :func:`open_graph` of the same bundle, variant and device, to be shared by sessions that do not run at
            the same time.

    Raises:
        ConfigError: a task without a cache, or quantised weights on CUDA.
        MissingDependencyError: no onnxruntime.
        ShapeError: a capacity or batch below 1, or a capacity beyond ``max_position_embeddings``.
        ToolchainError: onnxruntime cannot open the graph, has no such device, or the device no memory for the cache; its
            message is attached.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_seq_len: int,
        batch_size: int = 1,
        threads: int | None = None,
        variant: str | None = None,
        device: Device = "cpu",
        graph: OpenGraph | None = None,
    ) -> None:
        if bundle.task != "causal-lm":
            raise ConfigError(
                f"this bundle does not generate text: its task is {bundle.task}",
                details={"bundle": bundle.folder, "got": bundle.task, "expected": "causal-lm"},
                hint="use OnnxRuntimeHeadSession, or `llama-export run BUNDLE --prompt TEXT`",
            )
        limit = bundle.config.max_length
        if not 1 <= max_seq_len <= limit or batch_size < 1:
            raise ShapeError(
                f"a cache of {batch_size} rows of {max_seq_len} tokens is not possible",
                details={"got": f"batch {batch_size}, {max_seq_len} tokens", "expected": f"batch >= 1, 1 to {limit} tokens, the model's longest sequence"},
                hint="choose another --max-seq-len",
            )  # fmt: skip
        self.config = bundle.config
        self.capacity = max_seq_len
        self.dtype = bundle.dtype
        self.backend = f"onnxruntime-{device}"
        self._graph = graph or open_graph(bundle, threads, variant, device)
        self._device = device
        self._cache_dtype = "float32" if device == "cpu" else bundle.dtype
        self.note = self._graph.note
        """What a user must know about precision and speed of this session, if anything."""
        self._binding = self._graph.session.io_binding()
        self._names = list(cache_names(self.config.num_hidden_layers))
        self._buffers: dict[str, CacheBuffer] = {}
        """Graph input name -> the buffer [B, G, C, D] that is both past and present."""
        self._allocate(batch_size)

    def settle(self) -> None:
        """Waits until the session runs as fast as it can: its weights are still being gathered into huge pages after it
        was opened. Nothing else depends on it."""
        self._graph.settle()

    def most_rows(self, length: int, width: int) -> int:
        """See :meth:`CacheRows.most_rows`. A row takes its part of the cache, its logits, and the activations of a step; all
        are float32 on a CPU. Pages of the cache behind the last token are never touched and take no memory."""
        if self._device != "cpu":
            return super().most_rows(length, width)
        config = self.config
        cache = 2 * config.num_hidden_layers * math.prod(cache_shape(config, 1, length))
        activations = width * (6 * config.hidden_size + 3 * config.intermediate_size)
        row_bytes = 4 * (cache + activations + 2 * config.vocab_size)
        memory = available_memory() or _UNKNOWN_MEMORY
        return max(1, min(MAX_ROWS, memory // _MEMORY_SHARE // row_bytes))

    def _allocate(self, rows: int) -> None:
        """New buffers, of zeros: what lies behind the valid tokens must be finite for the standard Attention operator."""
        shape = cache_shape(self.config, rows, self.capacity)
        make = HostBuffer if self._device == "cpu" else partial(CudaBuffer, self._graph.session)
        self._buffers = {past: make(shape, self._cache_dtype) for past, _ in self._names}
        self._bound = slice(0, 0)
        self.past_length = np.zeros(rows, np.int64)

    def reset(self, batch_size: int | None = None) -> None:
        """Forgets all tokens, and may change the number of rows. Old entries stay in the buffers, finite and never seen.

        Raises:
            ShapeError: a batch below 1.
        """
        rows = self.batch_size if batch_size is None else batch_size
        if rows < 1:
            raise ShapeError(
                f"a cache of {rows} rows is not possible",
                details={"got": rows, "expected": "batch >= 1"},
                hint="one row per prompt",
            )
        if rows > next(iter(self._buffers.values())).shape[0]:
            self._allocate(rows)
        else:
            self.past_length = np.zeros(rows, np.int64)

    def _move_rows(self, moves: Sequence[tuple[int, int, int]]) -> None:
        if moves:
            for buffer in self._buffers.values():
                buffer.move_rows(moves)

    def step(
        self,
        input_ids: Sequence[Sequence[int]] | Int64Array,
        *,
        sequence_length: Sequence[int] | Int64Array | None = None,
        logits_index: Sequence[Sequence[int]] | Int64Array | None = None,
    ) -> Float32Array:
        """Appends tokens to the cache: a prefill, a chunk of one, or a decode step.

        Args:
            input_ids: [M, S], right-padded; M <= B: the first M rows, the others stay as they are.
            sequence_length: [M], valid tokens per row, 1..S; default S.
            logits_index: [M, N], positions 0..S-1 that get logits; default the last valid one (N = 1).

        Returns:
            logits [M, N, V], float32.

        Raises:
            ShapeError: more rows than B, a token id outside the vocabulary, or more tokens than the cache can hold.
            ToolchainError: onnxruntime cannot compute the graph; its message is attached.
        """
        ids, lengths, index = checked_step(
            input_ids, sequence_length, logits_index, self.config.vocab_size, self.past_length, self.capacity
        )
        rows, new_tokens = ids.shape
        if self._device == "cpu" and rows > 1 and new_tokens > 1 and self.past_length[:rows].any():
            # onnxruntime's GroupQueryAttention takes several new tokens after a past for one row at a time only.
            widths = np.maximum(lengths, index.max(1) + 1)
            logits = np.concatenate(
                [
                    self._run(row, ids[row : row + 1, : widths[row]], lengths[row : row + 1], index[row : row + 1])
                    for row in range(rows)
                ]
            )
        else:
            logits = self._run(0, ids, lengths, index)
        self.past_length[:rows] += lengths
        return logits

    def _run(self, first: int, ids: Int64Array, lengths: Int64Array, index: Int64Array) -> Float32Array:
        """The graph over the rows from ``first`` on."""
        rows = len(ids)
        self._bind_cache(slice(first, first + rows))
        feeds = {
            "input_ids": np.ascontiguousarray(ids),
            "past_length": self.past_length[first : first + rows],
            "sequence_length": lengths,
            "logits_index": index,
        }
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        self._binding.bind_output("logits", "cpu")
        try:
            self._graph.session.run_with_iobinding(self._binding)
        except Exception as err:
            raise _cannot_run(feeds, err) from err
        logits: Float32Array = self._binding.get_outputs()[-1].numpy()
        return logits

    def _bind_cache(self, rows: slice) -> None:
        """Each buffer's rows as past and as present, unless they are bound already."""
        if rows == self._bound:
            return
        shape = cache_shape(self.config, rows.stop - rows.start, self.capacity)
        dtype = ONNX_DTYPES[self._cache_dtype]
        # The outputs keep the order in which they were bound first: the cache, then the logits.
        for past, present in self._names:
            address = self._buffers[past].address(rows.start)
            self._binding.bind_input(past, self._device, 0, dtype, shape, address)
            self._binding.bind_output(present, self._device, 0, dtype, shape, address)
        self._bound = rows

    def output_addresses(self) -> dict[str, int]:
        """Graph input name of each cache tensor -> the address onnxruntime returned its present tensor at."""
        outputs = self._binding.get_outputs()
        return {name: int(output.data_ptr()) for name, output in zip(self._buffers, outputs, strict=False)}

    @property
    def cache(self) -> dict[str, Float32Array]:
        """Graph input name -> cache tensor of all rows that were ever in use, float32: on a CPU the buffer itself."""
        return {name: buffer.array() for name, buffer in self._buffers.items()}

    def cache_array(self, name: str) -> Float32Array:
        """One cache tensor [B, G, C, D], widened to float32: on a CPU a view. ``name`` is e.g. ``past_key_values.0.key``."""
        return self._buffers[name].array()[: self.batch_size]


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


class OnnxRuntimeHeadSession:
    """Runs a bundle whose task has no cache (classification, question answering, features) on onnxruntime.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        threads: of onnxruntime's operators on the CPU; None lets onnxruntime choose (one per core).
        device: what computes.

    Raises:
        MissingDependencyError: no onnxruntime.
        ConfigError: a causal LM.
        ToolchainError: onnxruntime cannot open the graph, or has no such device; its message is attached.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: Device = "cpu") -> None:
        interface = INTERFACES[bundle.task]
        if interface.has_cache:
            raise ConfigError(
                f"this bundle has a KV cache: its task is {bundle.task}",
                details={"bundle": bundle.folder, "got": bundle.task, "expected": "a task without a cache"},
                hint="use OnnxRuntimeSession",
            )
        self.config, self.task, self.dtype = bundle.config, bundle.task, bundle.dtype
        self._outputs = list(interface.outputs)
        self.backend = f"onnxruntime-{device}"
        graph = open_graph(bundle, threads, device=device)
        self._session = graph.session
        self.note = graph.note
        """What a user must know about precision and speed of this session, if anything."""

    def run(
        self,
        input_ids: Sequence[Sequence[int]] | Int64Array,
        attention_mask: Sequence[Sequence[int]] | Int64Array | None = None,
    ) -> dict[str, Float32Array]:
        """One padded batch.

        Args:
            input_ids: [B, S], padded on either side.
            attention_mask: [B, S], 0 where there is padding; default: no padding.

        Returns:
            Output name -> float32 tensor; names and shapes are in :mod:`llama_export.export`.

        Raises:
            ShapeError: shapes that differ, an empty batch, a token id outside the vocabulary, more tokens than the model
                has positions, or several texts for a classifier without a padding token.
            ToolchainError: onnxruntime cannot compute the graph; its message is attached.
        """  # fmt: skip
        ids, mask = checked_texts(input_ids, attention_mask, self.config, self.task)
        feeds = {"input_ids": ids, "attention_mask": mask}
        try:
            found = self._session.run(self._outputs, feeds)
        except Exception as err:
            raise _cannot_run(feeds, err) from err
        return dict(zip(self._outputs, found, strict=True))


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


def _cannot_run(feeds: Mapping[str, Int64Array], err: Exception) -> ToolchainError:
    hint = "`llama-export validate` names the stage that breaks; else export again"
    if "cuDNN" in str(err):  # the greatest valid position, for the heads that pool
        hint = "pip install 'nvidia-cudnn-cu13~=9.0': onnxruntime computes an operator of this head by cuDNN"
    return ToolchainError(
        "onnxruntime cannot run this bundle",
        details={"inputs": {name: list(array.shape) for name, array in feeds.items()}, "reason": err},
        hint=hint,
    )


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
