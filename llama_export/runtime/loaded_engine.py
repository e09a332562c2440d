"""A TensorRT engine on a GPU: contexts, buffers, weights and CUDA graphs. **Not run on a GPU**; tested against a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export._system.process import available_memory
from llama_export.bundle.bundle import Bundle
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.engine import plugins
from llama_export.engine.build import tensorrt_proto
from llama_export.engine.check import check_engine
from llama_export.engine.sidecar import REBUILD, EngineSidecar
from llama_export.engine.spec import engine_io, rebuild_command, weight_io
from llama_export.engine.tensorrt import (
    driver_cuda_version,
    execution_blocker,
    gpu_compute_capability,
    load_backend,
    load_cuda_runtime,
    load_onnx,
    message_log,
)
from llama_export.engine.weights import bundle_tensors
from llama_export.errors import ArtifactMismatchError, ShapeError, ToolchainError, numbered
from llama_export.runtime.buffers import Float32Array


def check_machine(sidecar: EngineSidecar, backend_version: str, engine_path: Path, bundle: Bundle) -> None:
    """The engine against this machine's GPU, driver and TensorRT, before TensorRT loads it.

    Raises:
        ArtifactMismatchError: all differences, and the command that builds one for this machine.
    """
    problems = {}
    gpu = gpu_compute_capability()
    if not sidecar.serves(gpu):
        expected = ", ".join(sidecar.compute_capabilities) + (", or later" if sidecar.forward_compatible else "")
        problems["GPU"] = f"got compute capability {gpu}, the engine was compiled for {expected}"
    if not _loads(sidecar, backend_version):
        problems["TensorRT"] = f"got {sidecar.backend} {backend_version}, the engine needs {sidecar.backend_version}"
    driver = driver_cuda_version()
    if sidecar.cuda_major is not None and driver is not None and driver[0] < sidecar.cuda_major:
        problems["CUDA"] = (
            f"got a driver for CUDA {driver[0]}.{driver[1]}, the engine needs {sidecar.cuda_major}.0 or later"
        )
    if problems:
        raise ArtifactMismatchError(
            "the engine was not built for this machine",
            details={"engine": engine_path, **problems},
            hint=f"build one for it: {rebuild_command(sidecar, bundle.folder)}"
            + ("; a driver is updated with `apt install` or from nvidia.com/drivers" if "CUDA" in problems else ""),
        )


def _loads(sidecar: EngineSidecar, version: str) -> bool:
    """Whether a version of the backend loads the engine: its own, whatever the build number."""
    return version.split(".")[:3] == sidecar.backend_version.split(".")[:3]


class LoadedEngine:
    """An engine that TensorRT has loaded, one execution context and stream, and its tensors' device memory.

    Args:
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        engine_path: made from this bundle by :func:`llama_export.engine.build.build_engine`.
        batch_size: B, most rows of a run.

    Raises:
        ShapeError: more rows than the engine serves.
        ArtifactMismatchError: the file is not an engine of this bundle, or was built with another plugin library.
        ToolchainError: this machine cannot run it, its plugin library is missing or lacks this GPU, or TensorRT cannot
            load it; the reason is attached.
    """

    def __init__(self, bundle: Bundle, engine_path: Path, *, batch_size: int = 1) -> None:
        self._stream: Any = None
        self._context: Any = None
        self._buffers: dict[str, tuple[int, int]] = {}
        """Tensor name -> (device address, bytes)."""
        self._bound: dict[str, tuple[tuple[int, ...] | None, int]] = {}
        """What the execution context knows: tensor name -> shape of an input, device address."""
        self._has_run = False
        """With just these bindings."""
        self._graph: Any = None
        """The CUDA graph of a run with just these bindings."""
        self._is_capturable = True
        self.sidecar = check_engine(bundle, engine_path).sidecar
        check_rows(batch_size, self.sidecar.max_batch)
        if (blocker := execution_blocker(self.sidecar.backend)) is not None:
            raise ToolchainError(
                "this machine cannot run the engine",
                details={"engine": engine_path.name, "reason": blocker},
                hint="run it on a machine with a GPU that the backend supports; `llama-export run` uses the CPU",
            )
        trt, self._cuda = load_backend(self.sidecar.backend), load_cuda_runtime(self.sidecar.backend)
        check_machine(self.sidecar, trt.__version__, engine_path, bundle)
        self._messages = message_log(trt)
        self._runtime = trt.Runtime(self._messages)
        if self.sidecar.plugin_library is not None:
            library = plugins.find_library()
            plugins.check_chip(library, gpu_compute_capability())
            plugins.check_creators(plugins.register_library(trt, library), self.sidecar.plugin_layers, library)
        self._engine = self._runtime.deserialize_cuda_engine(_content(engine_path, self.sidecar))
        self.require(self._engine is not None, "load the engine")
        self._check_io(bundle)
        if self.sidecar.weights.mode == "stripped":
            self._put_weights_back(trt, bundle)
        self._context = self._engine.create_execution_context()
        self.require(self._context is not None, "create an execution context")
        self._stream = self.call("cudaStreamCreate")
        self._profile: str | None = None
        self._weights = [entry.name for entry in self.sidecar.weights.tensors]
        for entry in self.sidecar.weights.tensors:
            self._load_weight(bundle.folder, entry)

    def select_profile(self, name: str) -> None:
        """Chooses the optimization profile of the next run; inputs and outputs must be bound again, weights are."""
        profiles = list(self.sidecar.profiles)
        name = name if name in profiles else profiles[0]
        if name == self._profile:
            return
        self._forget_graph()
        self._bound.clear()
        selected = self._context.set_optimization_profile_async(profiles.index(name), int(self._stream))
        self.require(selected, f"select the {name} profile")
        for weight in self._weights:
            self.bind(weight, self._buffers[weight][0])
        self._profile = name

    def feed(self, name: str, values: NDArray[Any]) -> None:
        """Copies an int64 input to the device and binds it."""
        self.require(self._context is not None, "use an engine that was closed")
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
        self._context = None  # it is bound to what is freed now
        for address, _ in self._buffers.values():
            self._cuda.cudaFree(address)
        self._buffers.clear()
        self._bound.clear()
        if self._stream is not None:
            self._cuda.cudaStreamDestroy(self._stream)
            self._stream = None

    def __del__(self) -> None:
        self.close()

    def _load_weight(self, folder: Path, entry: TensorEntry) -> None:
        """Copies one weight from its file, which is mapped, to the device."""
        file = np.memmap(folder / entry.file, np.uint8, "r")
        host = file[entry.offset : entry.offset + entry.nbytes]
        if host.nbytes != entry.nbytes:
            raise ArtifactMismatchError(
                f"weight file `{entry.file}` became shorter after it was checked",
                details={"weight": entry.name, "got": f"{host.nbytes} bytes", "expected": f"{entry.nbytes} bytes"},
                hint="export again when nothing writes to the checkpoint",
            )
        address = self.address(entry.name, host.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpy", address, host.ctypes.data, host.nbytes, kind)

    def _put_weights_back(self, trt: Any, bundle: Bundle) -> None:
        """Refits a stripped engine from the graph that it was built from."""
        refitter = trt.Refitter(self._engine, self._messages)
        parser = trt.OnnxParserRefitter(refitter, self._messages)
        backend, plugin_ops = self.sidecar.backend, set(self.sidecar.plugin_layers)
        proto = tensorrt_proto(load_onnx(backend), bundle, self.sidecar.max_seq_len, plugin_ops)
        parsed = parser.refit_from_bytes(proto.SerializeToString(), str(bundle.model_path.resolve()))
        self.require(parsed, "read the weights from the graph")
        self.require(refitter.refit_cuda_engine(), "put the weights back into the engine")

    def _check_io(self, bundle: Bundle) -> None:
        """The loaded engine's own word on what the plan's bytes could only suggest."""
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        tensors = engine_io(bundle, self.sidecar.max_seq_len)
        if self.sidecar.weights.mode == "input":
            tensors += weight_io(bundle_tensors(bundle))
        expected = {entry.name: entry.alias_of for entry in tensors}
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


def check_rows(rows: int, most: int) -> None:
    if not 1 <= rows <= most:
        raise ShapeError(
            f"this engine does not serve {rows} rows",
            details={"got": rows, "expected": f"1..{most}"},
            hint="build with a larger --max-batch",
        )


def _content(path: Path, sidecar: EngineSidecar) -> bytes:
    """An engine file, which TensorRT wants in memory as a whole."""
    available = available_memory()
    if available is not None and sidecar.bytes > available:
        raise ToolchainError(
            "the engine does not fit into this machine's memory",
            details={"engine": path, "got": f"{available:,} bytes available", "expected": f"{sidecar.bytes:,} bytes"},
            hint="free some memory, or build an engine that holds no weights: --weights input",
        )
    return path.read_bytes()
