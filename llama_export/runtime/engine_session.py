"""TensorRT engine -> numbers: sessions over an engine's device memory. **Not run on a GPU**; tested against a stand-in.

Role: the same interfaces as :mod:`llama_export.runtime.onnxruntime_session`, over a file of :mod:`llama_export.engine.build`. Both sessions
check the engine against its bundle before TensorRT sees it, and again by TensorRT's own word once it is loaded.

Shapes: B batch, S new tokens, N wanted positions, C kv_cache_capacity, G key/value heads, D head_dim, V vocabulary.

Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_export.bundle.bundle import Bundle
from llama_export.engine.spec import DECODE, MAX_LOGITS, PREFILL, TEXTS
from llama_export.engine.tensorrt import execution_blocker
from llama_export.errors import ConfigError, ShapeError
from llama_export.graph.io import INTERFACES
from llama_export.graph.kv_cache import cache_names, cache_shape
from llama_export.runtime.buffers import Float32Array, widened
from llama_export.runtime.loaded_engine import LoadedEngine, check_rows
from llama_export.runtime.requests import CacheRows, Int64Array, checked_step, checked_texts

__all__ = ["EngineHeadSession", "EngineSession", "execution_blocker"]


class EngineSession(CacheRows):
    """Runs an engine of the causal LM over a cache that stays on the GPU.

    Same interface as :class:`llama_export.runtime.onnxruntime_session.OnnxRuntimeSession`. Every cache is one zeroed buffer, bound
    as ``past_key_values.*`` and as ``present.*``. A call with S = N = 1 uses the decode profile, any other prefill; from the
    third decode step in a row on, a CUDA graph of it is launched.

    Args:
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        engine_path: made from this bundle by :func:`llama_export.engine.build.build_engine`.
        batch_size: B, rows, at most the engine's ``max_batch``.
        note: what a user must know of the choice of this engine. An engine computes in its bundle's dtype, so there is
            nothing to say of its precision.

    Raises:
        ConfigError: a task without a cache.
        ShapeError, ArtifactMismatchError, ToolchainError: see :class:`LoadedEngine`.
    """

    def __init__(self, bundle: Bundle, engine_path: Path, *, batch_size: int = 1, note: str | None = None) -> None:
        _require_cache(bundle, True)
        self._loaded = LoadedEngine(bundle, engine_path, batch_size=batch_size)
        self.sidecar = self._loaded.sidecar
        self.config, self.dtype, self.backend = bundle.config, bundle.dtype, self.sidecar.backend
        self.capacity = self.sidecar.max_seq_len
        self.note = note
        """What a user must know of this session, if anything: see ``note`` of the class."""
        self._row_bytes = int(np.prod(cache_shape(self.config, 1, self.capacity))) * (
            4 if self.dtype == "float32" else 2
        )
        self._names = list(cache_names(self.config.num_hidden_layers))
        self._zeroed_rows = 0
        self.reset(batch_size)

    def most_rows(self, length: int, width: int) -> int:
        """The engine's ``max_batch``: its memory is taken when it is loaded."""
        return self.sidecar.max_batch

    def reset(self, batch_size: int | None = None) -> None:
        """Forgets all tokens, and may change the number of rows. Old entries stay in the buffers, finite and never seen.

        Raises:
            ShapeError: more rows than the engine serves.
        """
        rows = self.batch_size if batch_size is None else batch_size
        check_rows(rows, self.sidecar.max_batch)
        if rows > self._zeroed_rows:
            for past, _ in self._names:
                nbytes = rows * self._row_bytes
                self._loaded.call("cudaMemset", self._loaded.address(past, nbytes), 0, nbytes)
            self._zeroed_rows = rows
        self.past_length = np.zeros(rows, np.int64)

    def _move_rows(self, moves: Sequence[tuple[int, int, int]]) -> None:
        for past, _ in self._names:  # a row is strided by head: it moves as a whole, on the GPU
            begin = self._loaded.address(past, self._row_bytes)
            for new, old, _ in moves:
                self._loaded.move(begin + new * self._row_bytes, begin + old * self._row_bytes, self._row_bytes)

    def step(
        self,
        input_ids: Any,
        *,
        sequence_length: Any = None,
        logits_index: Any = None,
    ) -> Float32Array:
        """Appends tokens to the cache: a prefill, a chunk of one, or a decode step.

        Args:
            input_ids: [M, S], right-padded; M <= B: the first M rows, the others stay as they are.
            sequence_length: [M], valid tokens per row, 1..S; default S.
            logits_index: [M, N], positions 0..S-1 that get logits; default the last valid one (N = 1).

        Returns:
            logits [M, N, V], float32.

        Raises:
            ShapeError: more rows than B, a token id outside the vocabulary, more positions than the profile has, or more
                tokens than the cache can hold.
            ToolchainError: CUDA or TensorRT failed.
        """
        ids, lengths, index = checked_step(
            input_ids, sequence_length, logits_index, self.config.vocab_size, self.past_length, self.capacity
        )
        rows, new_tokens = ids.shape
        most = min(MAX_LOGITS, self.capacity)
        if index.shape[1] > most:
            raise ShapeError(
                "logits_index has the wrong shape",
                details={"got": list(index.shape), "expected": f"[{rows}, 1..{most}]"},
                hint="ask for the logits of a long prompt in chunks",
            )
        is_decode = new_tokens == 1 and index.shape[1] == 1
        self._loaded.select_profile(DECODE if is_decode else PREFILL)
        past_length = self.past_length[:rows]
        feeds = {"input_ids": ids, "past_length": past_length, "sequence_length": lengths, "logits_index": index}
        for name, values in feeds.items():
            self._loaded.feed(name, values)
        shape = cache_shape(self.config, rows, self.capacity)
        for past, present in self._names:
            address = self._loaded.address(past, rows * self._row_bytes)
            self._loaded.bind_input(past, shape, address)
            self._loaded.bind(present, address)
        outputs = {"logits": (*index.shape, self.config.vocab_size)}
        logits = self._loaded.run(outputs, is_repeated=is_decode)["logits"]
        self.past_length[:rows] += lengths
        return logits

    def cache_array(self, name: str) -> Float32Array:
        """A copy of one cache tensor [B, G, C, D] on the host, widened to float32 (exactly)."""
        kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
        host = np.empty(cache_shape(self.config, self.batch_size, self.capacity), kinds[self.dtype])
        self._loaded.read(name, host)
        return widened(host, self.dtype)

    def close(self) -> None:
        """Frees the GPU memory of cache and inputs; the engine's own goes with the object."""
        self._loaded.close()


class EngineHeadSession:
    """Runs an engine of a head without a cache: classification, question answering, features.

    Same interface as :class:`llama_export.runtime.onnxruntime_session.OnnxRuntimeHeadSession`, for texts no longer and batches no
    larger than the engine was built for.

    Args:
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        engine_path: made from this bundle by :func:`llama_export.engine.build.build_engine`.
        note: see :class:`EngineSession`.

    Raises:
        ConfigError: a causal LM.
        ArtifactMismatchError, ToolchainError: see :class:`LoadedEngine`.
    """

    def __init__(self, bundle: Bundle, engine_path: Path, *, note: str | None = None) -> None:
        _require_cache(bundle, False)
        self._loaded = LoadedEngine(bundle, engine_path)
        self._lock = threading.Lock()
        """Held while an engine's inputs are set and it runs: the buffers of inputs and outputs are shared."""
        self.sidecar = self._loaded.sidecar
        self.config, self.task, self.dtype, self.backend = (
            bundle.config,
            bundle.task,
            bundle.dtype,
            self.sidecar.backend,
        )
        self.max_seq_len = self.sidecar.max_seq_len
        self.note = note
        """What a user must know of this session, if anything: see ``note`` of the class."""
        self._output_shapes = {e.name: e.shape for e in bundle.manifest.io if e.kind == "output"}

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
            ShapeError: see :meth:`llama_export.runtime.onnxruntime_session.OnnxRuntimeHeadSession.run`; more texts or longer ones
                than the engine serves.
            ToolchainError: CUDA or TensorRT failed.
        """
        ids, mask = checked_texts(input_ids, attention_mask, self.config, self.task)
        check_rows(ids.shape[0], self.sidecar.max_batch)
        if ids.shape[1] > self.max_seq_len:
            raise ShapeError(
                f"the text has {ids.shape[1]} tokens, the engine serves {self.max_seq_len}",
                details={"got": ids.shape[1], "expected": f"at most {self.max_seq_len}"},
                hint="build with a larger --max-seq-len, or shorten the text",
            )
        sizes = {"batch_size": ids.shape[0], "num_tokens": ids.shape[1]}
        shapes = {
            name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
            for name, shape in self._output_shapes.items()
        }
        with self._lock:
            self._loaded.select_profile(TEXTS)
            self._loaded.feed("input_ids", ids)
            self._loaded.feed("attention_mask", mask)
            return self._loaded.run(shapes)

    def close(self) -> None:
        """Frees the GPU memory of inputs and outputs; the engine's own goes with the object."""
        self._loaded.close()


def _require_cache(bundle: Bundle, wanted: bool) -> None:
    if INTERFACES[bundle.task].has_cache != wanted:
        raise ConfigError(
            f"this bundle has {'no' if wanted else 'a'} KV cache: its task is {bundle.task}",
            details={
                "bundle": bundle.folder,
                "got": bundle.task,
                "expected": "causal-lm" if wanted else "a task without a cache",
            },
            hint=f"use {'EngineHeadSession' if wanted else 'EngineSession'}",
        )
