"""Stand-ins on the host for what a session needs of a GPU: the driver, the CUDA runtime, an engine TensorRT has loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llama_export.bundle.bundle import Bundle
from llama_export.engine import tensorrt as _tensorrt
from llama_export.engine.check import inspect_engine
from llama_export.engine.sidecar import EngineSidecar
from llama_export.engine.spec import weight_io
from llama_export.engine.weights import bundle_tensors, make_weights_inputs
from llama_export.runtime import loaded_engine


class FakeDriver:
    """libcuda with one GPU of a given compute capability, or an error code from ``cuInit``; ``cuda`` is 13000 for CUDA 13."""

    def __init__(self, major: int = 0, minor: int = 0, error: int = 0, cuda: int = 13000) -> None:
        self.values = {75: major, 76: minor}
        self.error, self.cuda = error, cuda

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.cuda
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.error

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.values[attribute]
        return 0


class FakeCuda:
    """The CUDA runtime over host memory."""

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.recorded: list[Callable[[], bool]] | None = None
        """What the stream was given since its capture began; None: it is not captured."""
        self.graphs: list[Any] = []
        """Those that were not destroyed, graphs and what they were made into."""
        self.launches = 0

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        assert (stream, mode, self.recorded) == (7, 1, None)
        self.recorded = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:  # noqa: N802
        recorded, self.recorded = self.recorded, None
        self.graphs.append(recorded)
        return 0, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:  # noqa: N802
        self.graphs.append(tuple(graph))
        return 0, self.graphs[-1]

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:  # noqa: N802
        self.launches += 1
        return (0 if all(work() for work in graph) else 1,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:  # noqa: N802
        self.graphs.remove(graph)
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy  # noqa: N815

    def cudaGetLastError(self) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:  # noqa: N802
        buffer = (ctypes.c_ubyte * nbytes)(*([0xFF] * min(nbytes, 1 << 16)))  # NaN, so that a missing memset shows
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.memory[address]
        return (0,)

    def cudaMemset(self, address: int, value: int, nbytes: int) -> tuple[int]:  # noqa: N802
        ctypes.memset(address, value, nbytes)
        return (0,)

    def cudaMemcpy(self, target: int, source: int, nbytes: int, kind: int) -> tuple[int]:  # noqa: N802
        ctypes.memmove(target, source, nbytes)
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0,)


class FakeEngine:
    """Engine and execution context in one: computes with onnxruntime on what it is bound to, within its profiles."""

    def __init__(self, bundle: Bundle, sidecar: EngineSidecar) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(str(bundle.model_path), load_external_data=False)
        self.weights = {entry.name: entry.shape for entry in sidecar.weights.tensors}
        if self.weights:
            make_weights_inputs(onnx, model, bundle_tensors(bundle))
            source: Any = model.SerializeToString()
        else:
            source = str(bundle.model_path)
        self.session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        self.io, self.profiles = [*sidecar.io, *weight_io(sidecar.weights.tensors)], list(sidecar.profiles.values())
        self.num_io_tensors = len(self.io)
        self.cuda: FakeCuda | None = None
        """The runtime whose stream may be captured."""
        self.is_capturable = True
        self.enqueued = 0
        """Runs that were not launched as a graph, the captured ones included."""
        self.used_profiles: list[int] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def get_tensor_name(self, index: int) -> str:
        return self.io[index].name

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return next((entry.alias_of for entry in self.io if entry.name == name), None)

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.used_profiles.append(index)
        self.shapes.clear()
        self.addresses.clear()
        return stream == 7

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.profiles[self.used_profiles[-1]][name]
        self.shapes[name] = tuple(shape)
        return all(low <= dim <= high for low, dim, high in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.enqueued += 1
        if self.cuda is not None and self.cuda.recorded is not None:
            # A graph keeps shapes and addresses, and reads what is there when it is launched.
            self.cuda.recorded.append(partial(self._compute, dict(self.shapes), dict(self.addresses)))
            return self.is_capturable
        return self._compute(self.shapes, self.addresses)

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> bool:
        shapes = {**shapes, **self.weights}
        inputs = [entry for entry in self.io if entry.kind == "input"]
        feeds = {e.name: array_at(addresses[e.name], shapes[e.name], e.dtype).copy() for e in inputs}
        outputs = [entry for entry in self.io if entry.kind == "output"]
        for entry, value in zip(outputs, self.session.run([e.name for e in outputs], feeds), strict=True):
            if entry.alias_of is not None and addresses[entry.name] != addresses[entry.alias_of]:
                return False
            array_at(addresses[entry.name], value.shape, entry.dtype)[...] = value
        return True


def array_at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    """A view of host memory."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return (
        np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_ubyte)), (nbytes,))
        .view(dtype)
        .reshape(shape)
    )


def put_on_gpu(monkeypatch: pytest.MonkeyPatch, trt: Any, bundle: Bundle, path: Path) -> FakeEngine:
    """Replaces TensorRT, CUDA and the GPU of a session by stand-ins on the host; gives the stand-in of one engine."""
    fake = FakeEngine(bundle, inspect_engine(path))
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: fake if data == path.read_bytes() else None)
    module = SimpleNamespace(ILogger=trt.ILogger, Runtime=lambda log: runtime, __version__=trt.__version__)
    monkeypatch.setattr(loaded_engine, "load_backend", lambda backend: module)

    def load_cuda_runtime(backend: str) -> FakeCuda:
        fake.cuda = FakeCuda()
        return fake.cuda

    monkeypatch.setattr(loaded_engine, "load_cuda_runtime", load_cuda_runtime)
    monkeypatch.setattr(loaded_engine, "execution_blocker", lambda backend: None)
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: FakeDriver(8, 9))
    return fake
