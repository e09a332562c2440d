"""TensorRT engine -> numbers: sessions over an engine's device memory. **Not run on a GPU**; tested against a stand-in.

Role: the same interfaces as :mod:`llama_export.runtime.session`, over a file of :mod:`llama_export.engine`. Both sessions
check the engine against its bundle before TensorRT sees it, and again by TensorRT's own word once it is loaded.

Shapes: B batch, S new tokens, N wanted positions, C kv_cache_capacity, G key/value heads, D head_dim, V vocabulary.

Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export import plugins
from llama_export._tensorrt import (
    driver_cuda_version,
    execution_blocker,
    gpu_compute_capability,
    load_backend,
    load_cuda_runtime,
    load_onnx,
    message_log,
)
from llama_export.bundle import Bundle
from llama_export.engine import tensorrt_proto
from llama_export.engine_check import EngineFacts, check_engine, inspect_engine
from llama_export.engine_spec import (
    DECODE,
    MAX_LOGITS,
    PREFILL,
    REBUILD,
    TEXTS,
    engine_io,
    rebuild_command,
    weight_io,
)
from llama_export.engine_weights import bundle_tensors
from llama_export.errors import ArtifactMismatchError, ConfigError, ShapeError, ToolchainError, numbered
from llama_export.graph_io import INTERFACES
from llama_export.kv_cache import cache_names, cache_shape
from llama_export.runtime.buffers import Float32Array, widened
from llama_export.runtime.session import CacheRows, Int64Array, checked_step, checked_texts

__all__ = ["EngineHeadSession", "EngineSession", "execution_blocker"]


def check_machine(facts: EngineFacts, backend_version: str, engine_path: Path, bundle: Bundle) -> None:
    """The engine against this machine's GPU, driver and TensorRT, before TensorRT loads it.

    Raises:
        ArtifactMismatchError: all differences, and the command that builds one for this machine.
    """
    problems = {}
    gpu = gpu_compute_capability()
    served = ", ".join(facts.compute_capabilities)
    later = facts.forward_compatible and float(gpu) > float(facts.compute_capabilities[0])
    if gpu not in facts.compute_capabilities and not later:
        expected = f"{served}, or later" if facts.forward_compatible else served
        problems["GPU"] = f"got compute capability {gpu}, the engine was compiled for {expected}"
    if not _loads(facts, backend_version):
        allowed = " or later" if facts.version_compatible else ""
        problems["TensorRT"] = (
            f"got {facts.backend} {backend_version}, the engine needs {facts.backend_version}{allowed}"
        )
    driver = driver_cuda_version()
    if facts.cuda_major is not None and driver is not None and driver[0] < facts.cuda_major:
        problems["CUDA"] = (
            f"got a driver for CUDA {driver[0]}.{driver[1]}, the engine needs {facts.cuda_major}.0 or later"
        )
    if problems:
        raise ArtifactMismatchError(
            "the engine was not built for this machine",
            details={"engine": engine_path, **problems},
            hint=f"build one for it: {rebuild_command(inspect_engine(engine_path), bundle.folder)}"
            + ("; a driver is updated with `apt install` or from nvidia.com/drivers" if "CUDA" in problems else ""),
        )


def _loads(facts: EngineFacts, version: str) -> bool:
    """Whether a version of the backend loads the engine: its own, or any later one of the same major version if allowed."""
    got, built = (tuple(int(part) for part in text.split(".")[:3]) for text in (version, facts.backend_version))
    return got == built or (facts.version_compatible and got[0] == built[0] and got > built)


class LoadedEngine:
    """An engine that TensorRT has loaded, one execution context and stream, and its tensors' device memory.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        engine_path: made from this bundle by :func:`llama_export.engine.build_engine`.
        batch_size: B, most rows of a run.

    Raises:
        ShapeError: more rows than the engine serves.
        ArtifactMismatchError: the file is not an engine of this bundle, or was built with another plugin library.
        ToolchainError: this machine cannot run it, its plugin library is missing or lacks this GPU, or TensorRT cannot
            load it; the reason is attached.
    """

    def __init__(self, bundle: Bundle, engine_path: Path, *, batch_size: int = 1) -> None:
        self._buffers: dict[str, tuple[int, int]] = {}
        """Tensor name -> (device address, bytes)."""
        self._bound: dict[str, tuple[tuple[int, ...] | None, int]] = {}
        """What the execution context knows: tensor name -> shape of an input, device address."""
        self._has_run = False
        """With just these bindings."""
        self._graph: Any = None
        """The CUDA graph of a run with just these bindings."""
        self._is_capturable = True
        self.facts = check_engine(bundle, engine_path)
        _check_rows(batch_size, self.facts.max_batch)
        if (blocker := execution_blocker(self.facts.backend)) is not None:
            raise ToolchainError(
                "this machine cannot run the engine",
                details={"engine": engine_path.name, "reason": blocker},
                hint="run it on a machine with a GPU that the backend supports; `llama-export run` uses the CPU",
            )
        trt, self._cuda = load_backend(self.facts.backend), load_cuda_runtime(self.facts.backend)
        check_machine(self.facts, trt.__version__, engine_path, bundle)
        self._messages = message_log(trt)
        self._runtime = trt.Runtime(self._messages)
        if self.facts.plugin_library is not None:
            library = plugins.find_library()
            plugins.check_chip(library, gpu_compute_capability())
            plugins.check_creators(plugins.register_library(trt, library), self.facts.plugin_layers, library)
        self._engine = self._runtime.deserialize_cuda_engine(engine_path.read_bytes())
        self.require(self._engine is not None, "load the engine")
        self._check_io(bundle)
        if self.facts.weights == "stripped":
            self._put_weights_back(trt, bundle)
        self._context = self._engine.create_execution_context()
        self.require(self._context is not None, "create an execution context")
        self._stream = self.call("cudaStreamCreate")
        self._profile: str | None = None
        self._weights = [entry["name"] for entry in self.facts.weight_tensors]
        for entry in self.facts.weight_tensors:
            self._load_weight(bundle.folder, entry)

    def select_profile(self, name: str) -> None:
        """Chooses the optimization profile of the next run; inputs and outputs must be bound again, weights are."""
        name = name if name in self.facts.profiles else self.facts.profiles[0]
        if name == self._profile:
            return
        self._forget_graph()
        self._bound.clear()
        selected = self._context.set_optimization_profile_async(self.facts.profiles.index(name), int(self._stream))
        self.require(selected, f"select the {name} profile")
        for weight in self._weights:
            self.bind(weight, self._buffers[weight][0])
        self._profile = name

    def feed(self, name: str, values: NDArray[Any]) -> None:
        """Copies an int64 input to the device and binds it."""
        host = np.ascontiguousarray(values, np.int64)
        address = self.address(name, host.nbytes)
        # Waits for the copy, so the host array may go.
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpy", address, host.ctypes.data, host.nbytes, kind)
        self.bind_input(name, host.shape, address)

    def bind_input(self, name: str, shape: tuple[int, ...], address: int) -> None:
        """Gives an input its shape and its device memory."""
        if self._bound.get(name) != (shape, address):
            self.require(self._context.set_input_shape(name, shape), f"give `{name}` the shape {list(shape)}")
            self._set_address(name, shape, address)

    def bind(self, name: str, address: int) -> None:
        """Gives a tensor its device memory."""
        if self._bound.get(name) != (None, address):
            self._set_address(name, None, address)

    def _set_address(self, name: str, shape: tuple[int, ...] | None, address: int) -> None:
        self._forget_graph()
        self.require(self._context.set_tensor_address(name, address), f"bind `{name}`")
        self._bound[name] = (shape, address)

    def run(self, outputs: dict[str, tuple[int, ...]], *, is_repeated: bool = False) -> dict[str, Float32Array]:
        """Runs what is bound, waits, and copies the named float32 outputs of these shapes to the host.

        Args:
            outputs: name -> shape.
            is_repeated: more runs with the same bindings are likely to follow: the second one is captured as a CUDA graph,
                which the later ones launch, one call instead of one per kernel.
        """
        found = {name: np.empty(shape, np.float32) for name, shape in outputs.items()}
        for name, host in found.items():
            self.bind(name, self.address(name, host.nbytes))
        if is_repeated and self._has_run and self._graph is None and self._is_capturable:
            self._capture()
        if self._graph is not None:
            self.call("cudaGraphLaunch", self._graph, self._stream)
        else:
            self._execute()
        self.call("cudaStreamSynchronize", self._stream)
        self._has_run = True
        for name, host in found.items():
            self.read(name, host)
        return found

    def _execute(self) -> None:
        self.require(self._context.execute_async_v3(int(self._stream)), "run the engine")

    def _capture(self) -> None:
        """Records a run without running it. TensorRT settles what new shapes need in the run before.

        Source: "CUDA Graphs" in https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self._stream, mode)
        recorded = self._context.execute_async_v3(int(self._stream))
        status, graph = self._cuda.cudaStreamEndCapture(self._stream)
        try:
            if recorded and int(status) == 0:
                self._graph = self.call("cudaGraphInstantiate", graph, 0)
            else:  # a layer that waits for the GPU, or allocates: each run is enqueued, as before
                self._cuda.cudaGetLastError()
                self._is_capturable = False
        finally:
            if int(status) == 0:
                self._cuda.cudaGraphDestroy(graph)

    def _forget_graph(self) -> None:
        """Addresses, shapes and profile of a graph are those of its capture."""
        self._has_run = False
        if self._graph is not None:
            self._cuda.cudaGraphExecDestroy(self._graph)
            self._graph = None

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Copies device memory to other device memory."""
        self.call("cudaMemcpy", target, source, nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def read(self, name: str, host: NDArray[Any]) -> None:
        """Copies a tensor's device memory into a host array of its size."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpy", host.ctypes.data, self.address(name, host.nbytes), host.nbytes, kind)

    def address(self, name: str, nbytes: int) -> int:
        """Device memory of at least ``nbytes`` for a tensor, kept from call to call."""
        address, size = self._buffers.get(name, (0, 0))
        if size < nbytes:
            if size:
                self._forget_graph()
                self._bound.pop(name, None)  # new memory may lie where the old was
                self.call("cudaFree", address)
                del self._buffers[name]
            address = int(self.call("cudaMalloc", nbytes))
            self._buffers[name] = (address, nbytes)
        return address

    def call(self, function: str, *arguments: Any) -> Any:
        """A function of the CUDA runtime; its one result, if any."""
        status, *results = getattr(self._cuda, function)(*arguments)
        if int(status) != 0:
            raise ToolchainError(
                f"{function} failed: CUDA error {int(status)}",
                details={"reason": status},
                hint="see that the GPU is free and has enough memory: nvidia-smi",
            )
        return results[0] if results else None

    def require(self, ok: bool, what: str) -> None:
        """Turns TensorRT's refusal into an error with its messages."""
        if not ok:
            raise ToolchainError(
                f"TensorRT could not {what}",
                details=numbered("message", self._messages.lines()),
                hint="see the messages above, and `llama-export env` for the versions",
            )

    def close(self) -> None:
        """Frees the GPU memory of cache and inputs, and the graph; the engine's own goes with the object."""
        self._forget_graph()
        for address, _ in self._buffers.values():
            self._cuda.cudaFree(address)
        self._buffers.clear()
        self._bound.clear()

    def __del__(self) -> None:
        self.close()

    def _load_weight(self, folder: Path, entry: Mapping[str, Any]) -> None:
        """Copies one weight from its file, which is mapped, to the device."""
        file = np.memmap(folder / entry["file"], np.uint8, "r")
        host = file[entry["offset"] : entry["offset"] + entry["nbytes"]]
        address = self.address(entry["name"], host.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpy", address, host.ctypes.data, host.nbytes, kind)

    def _put_weights_back(self, trt: Any, bundle: Bundle) -> None:
        """Refits a stripped engine from the graph that it was built from."""
        refitter = trt.Refitter(self._engine, self._messages)
        parser = trt.OnnxParserRefitter(refitter, self._messages)
        backend, plugin_ops = self.facts.backend, set(self.facts.plugin_layers)
        proto = tensorrt_proto(load_onnx(backend), bundle, self.facts.max_seq_len, plugin_ops)
        parsed = parser.refit_from_bytes(proto.SerializeToString(), str(bundle.model_path.resolve()))
        self.require(parsed, "read the weights from the graph")
        self.require(refitter.refit_cuda_engine(), "put the weights back into the engine")

    def _check_io(self, bundle: Bundle) -> None:
        """The loaded engine's own word on what the plan's bytes could only suggest."""
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        tensors = engine_io(bundle, self.facts.max_seq_len)
        if self.facts.weights == "input":
            tensors += weight_io(bundle_tensors(bundle))
        expected = {entry["name"]: entry["alias_of"] for entry in tensors}
        problems = [f"tensors {sorted(names ^ set(expected))}"] if names != set(expected) else []
        for name, past in expected.items():
            if past is not None and name in names and self._engine.get_aliased_input_tensor(name) != past:
                problems.append(f"`{name}` does not alias `{past}`")
        if problems:
            raise ArtifactMismatchError(
                "the loaded engine is not what its sidecar says",
                details=numbered("difference", problems),
                hint=REBUILD,
            )


class EngineSession(CacheRows):
    """Runs an engine of the causal LM over a cache that stays on the GPU.

    Same interface as :class:`llama_export.runtime.session.OnnxRuntimeSession`. Every cache is one zeroed buffer, bound
    as ``past_key_values.*`` and as ``present.*``. A call with S = N = 1 uses the decode profile, any other prefill; from the
    third decode step in a row on, a CUDA graph of it is launched.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        engine_path: made from this bundle by :func:`llama_export.engine.build_engine`.
        batch_size: B, rows, at most the engine's ``max_batch``.

    Raises:
        ConfigError: a task without a cache.
        ShapeError, ArtifactMismatchError, ToolchainError: see :class:`LoadedEngine`.
    """

    def __init__(self, bundle: Bundle, engine_path: Path, *, batch_size: int = 1) -> None:
        _require_cache(bundle, True)
        self._loaded = LoadedEngine(bundle, engine_path, batch_size=batch_size)
        self.facts = self._loaded.facts
        self.config, self.dtype, self.backend = bundle.config, bundle.dtype, self.facts.backend
        self.capacity = self.facts.max_seq_len
        self.note: str | None = None
        """What a user must know about precision and speed: an engine computes in its bundle's dtype."""
        self._row_bytes = int(np.prod(cache_shape(self.config, 1, self.capacity))) * (
            4 if self.dtype == "float32" else 2
        )
        self._names = list(cache_names(self.config.num_hidden_layers))
        self._zeroed_rows = 0
        self.reset(batch_size)

    def most_rows(self, length: int, width: int) -> int:
        """The engine's ``max_batch``: its memory is taken when it is loaded."""
        return self.facts.max_batch

    def settle(self) -> None:
        """Nothing is left to do once an engine is loaded."""

    def reset(self, batch_size: int | None = None) -> None:
        """Forgets all tokens, and may change the number of rows. Old entries stay in the buffers, finite and never seen.

        Raises:
            ShapeError: more rows than the engine serves.
        """
        rows = self.batch_size if batch_size is None else batch_size
        _check_rows(rows, self.facts.max_batch)
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

    Same interface as :class:`llama_export.runtime.session.OnnxRuntimeHeadSession`, for texts no longer and batches no
    larger than the engine was built for.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        engine_path: made from this bundle by :func:`llama_export.engine.build_engine`.

    Raises:
        ConfigError: a causal LM.
        ArtifactMismatchError, ToolchainError: see :class:`LoadedEngine`.
    """

    def __init__(self, bundle: Bundle, engine_path: Path) -> None:
        _require_cache(bundle, False)
        self._loaded = LoadedEngine(bundle, engine_path)
        self.facts = self._loaded.facts
        self.config, self.task, self.dtype, self.backend = bundle.config, bundle.task, bundle.dtype, self.facts.backend
        self.max_seq_len = self.facts.max_seq_len
        self.note: str | None = None
        """What a user must know about precision and speed: an engine computes in its bundle's dtype."""
        self._output_shapes = {e["name"]: e["shape"] for e in bundle.manifest["io"] if e["kind"] == "output"}

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
            ShapeError: see :meth:`llama_export.runtime.session.OnnxRuntimeHeadSession.run`; more texts or longer ones
                than the engine serves.
            ToolchainError: CUDA or TensorRT failed.
        """
        ids, mask = checked_texts(input_ids, attention_mask, self.config, self.task)
        _check_rows(ids.shape[0], self.facts.max_batch)
        if ids.shape[1] > self.max_seq_len:
            raise ShapeError(
                f"the text has {ids.shape[1]} tokens, the engine serves {self.max_seq_len}",
                details={"got": ids.shape[1], "expected": f"at most {self.max_seq_len}"},
                hint="build with a larger --max-seq-len, or shorten the text",
            )
        self._loaded.select_profile(TEXTS)
        self._loaded.feed("input_ids", ids)
        self._loaded.feed("attention_mask", mask)
        sizes = {"batch_size": ids.shape[0], "num_tokens": ids.shape[1]}
        return self._loaded.run(
            {name: tuple(sizes.get(dim, dim) for dim in shape) for name, shape in self._output_shapes.items()}
        )

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


def _check_rows(rows: int, most: int) -> None:
    if not 1 <= rows <= most:
        raise ShapeError(
            f"this engine does not serve {rows} rows",
            details={"got": rows, "expected": f"1..{most}"},
            hint="build with a larger --max-batch",
        )
