"""onnxruntime sessions: one that owns a static KV cache and updates it in place, one for the heads without a cache.

Shapes: B batch, S new tokens, N wanted positions, C kv_cache_capacity, G key/value heads, D head_dim, V vocabulary.

Each cache tensor is one buffer, bound as ``past_key_values.*`` *and* as ``present.*``. On a CPU, ``model.onnxruntime.onnx``
is run, in float32: its GroupQueryAttention writes S tokens into the buffer, copies nothing, and reads the valid tokens only,
whatever the capacity. On CUDA, where that operator has no float32, ``model.onnx`` is run, in the bundle's dtype: its
TensorScatter writes into the buffer likewise. **CUDA sessions were not run on a GPU**; what could be proven without one is
decision 50 in ``docs/decisions.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from llama_export._system.process import available_memory, granule_of_large_arrays
from llama_export.bundle.bundle import Bundle
from llama_export.errors import ConfigError, ShapeError, ToolchainError
from llama_export.graph.io import INTERFACES
from llama_export.graph.kv_cache import cache_names, cache_shape
from llama_export.runtime.buffers import ONNX_DTYPES, CacheBuffer, CudaBuffer, Float32Array, HostBuffer
from llama_export.runtime.onnxruntime_graph import Device, OpenGraph, open_graph
from llama_export.runtime.requests import MAX_ROWS, CacheRows, Int64Array, checked_step, checked_texts

_MEMORY_SHARE = 4
"""A batch may take one in so many bytes of the available memory: the rest is the caller's and the weights'."""
_UNKNOWN_MEMORY = 8 << 30
"""Bytes that are taken as available where the system does not tell."""


class OnnxRuntimeSession(CacheRows):
    """Runs a bundle on onnxruntime, batch and capacity fixed when it is made.

    Args:
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        max_seq_len: C, tokens each row can hold.
        batch_size: B, rows.
        threads: of onnxruntime's operators on the CPU; None lets onnxruntime choose (one per core).
        variant: ``int8`` or ``int4``: the bundle's quantised weights; None: its own.
        device: what computes.
        read_weights: see :func:`~llama_export.runtime.onnxruntime_graph.open_graph`.
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
        read_weights: bool = False,
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
        self._graph = graph or open_graph(bundle, threads, variant, device, read_weights)
        self._device = device
        self._cache_dtype = "float32" if device == "cpu" else bundle.dtype
        self.note = self._graph.note
        """What a user must know about precision and speed of this session, if anything."""
        self._binding = self._graph.session.io_binding()
        self._names = list(cache_names(self.config.num_hidden_layers))
        self._buffers: dict[str, CacheBuffer] = {}
        """Graph input name -> the buffer [B, G, C, D] that is both past and present."""
        self._allocate(batch_size)

    def most_rows(self, length: int, width: int) -> int:
        """See :meth:`CacheRows.most_rows`. On a GPU only :data:`MAX_ROWS` counts."""
        if self._device != "cpu":
            return super().most_rows(length, width)
        memory = available_memory() or _UNKNOWN_MEMORY
        return max(1, min(MAX_ROWS, memory // _MEMORY_SHARE // self.row_bytes(length, width)))

    def row_bytes(self, length: int, width: int) -> int:
        """At most so many bytes of this machine's memory are taken by a row: its cache, logits and activations, in float32.

        The cache of a row is one stretch of ``capacity`` tokens per layer, key or value, and head. Memory comes in granules,
        so a stretch takes up to two of them beside its tokens, and never more than its capacity.

        Args:
            length, width: see :meth:`most_rows`.
        """
        config = self.config
        per_token = 4 * config.head_dim
        stretch = min(self.capacity * per_token, length * per_token + 2 * granule_of_large_arrays())
        stretches = 2 * config.num_hidden_layers * config.num_key_value_heads
        scores = config.num_attention_heads * length
        activations = width * (6 * config.hidden_size + 3 * config.intermediate_size + 2 * scores)
        return stretches * stretch + 4 * (activations + 2 * config.vocab_size)

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


class OnnxRuntimeHeadSession:
    """Runs a bundle whose task has no cache (classification, question answering, features) on onnxruntime.

    Args:
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        threads: of onnxruntime's operators on the CPU; None lets onnxruntime choose (one per core).
        device: what computes.

    Raises:
        MissingDependencyError: no onnxruntime.
        ConfigError: a causal LM.
        ToolchainError: onnxruntime cannot open the graph, or has no such device; its message is attached.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, device: Device = "cpu", read_weights: bool = False
    ) -> None:
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
        self._graph = open_graph(bundle, threads, device=device, read_weights=read_weights)
        self.note = self._graph.note
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
            Output name -> float32 tensor; names and shapes are in :mod:`llama_export.export.export`.

        Raises:
            ShapeError: shapes that differ, an empty batch, a token id outside the vocabulary, more tokens than the model
                has positions, or several texts for a classifier without a padding token.
            ToolchainError: onnxruntime cannot compute the graph; its message is attached.
        """  # fmt: skip
        ids, mask = checked_texts(input_ids, attention_mask, self.config, self.task)
        feeds = {"input_ids": ids, "attention_mask": mask}
        try:
            found = self._graph.session.run(self._outputs, feeds)
        except Exception as err:
            raise _cannot_run(feeds, err) from err
        return dict(zip(self._outputs, found, strict=True))


def _cannot_run(feeds: Mapping[str, Int64Array], err: Exception) -> ToolchainError:
    hint = "`llama-export validate` names the stage that breaks; else export again"
    if "cuDNN" in str(err):  # the greatest valid position, for the heads that pool
        hint = "pip install 'nvidia-cudnn-cu13~=9.0': onnxruntime computes an operator of this head by cuDNN"
    return ToolchainError(
        "onnxruntime cannot run this bundle",
        details={"inputs": {name: list(array.shape) for name, array in feeds.items()}, "reason": err},
        hint=hint,
    )
