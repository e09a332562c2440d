"""The two TensorRT packages behind one door: import them, hear them, and know whether this machine can run an engine.

``tensorrt-rtx`` builds ahead of time on any machine; ``tensorrt`` times its kernels on the GPU it builds for. Their
Python API is the same. Used by :mod:`llama_export.engine` only.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from typing import Any

from llama_export.bundle import Progress
from llama_export.errors import MissingDependencyError, ToolchainError

_MODULES = {"tensorrt-rtx": "tensorrt_rtx_bindings", "tensorrt": "tensorrt"}
_RTX_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""GPUs of a TensorRT-RTX 1.7 engine as built here; 7.5 must be asked for, 9.0 (H100, H200) and 10.x are refused."""


def load_backend(backend: str) -> Any:
    """The TensorRT module of a backend; both have the same Python API.

    Raises:
        MissingDependencyError: not installed. ToolchainError: its libraries do not load, or it has no KV-cache layer.
    """
    name = _MODULES[backend]
    try:
        trt = importlib.import_module(name)
    except ModuleNotFoundError as err:
        raise MissingDependencyError(err.name or name, backend) from err
    except (ImportError, OSError) as err:
        raise ToolchainError(
            f"`{name}` cannot load its libraries",
            details={"reason": err},
            hint=f"pip install 'llama-export[{backend}]'",
        ) from err
    if not hasattr(trt.LayerType, "KV_CACHE_UPDATE"):
        raise ToolchainError(
            f"{backend} {trt.__version__} has no KV-cache layer",
            details={"expected": "tensorrt-rtx 1.7 or tensorrt 10.15"},
            hint=f"pip install --upgrade 'llama-export[{backend}]'",
        )
    return trt


def load_onnx(backend: str) -> Any:
    """The ``onnx`` package, which each backend's extra brings along."""
    try:
        return importlib.import_module("onnx")
    except ModuleNotFoundError as err:
        raise MissingDependencyError("onnx", backend) from err


_ROUTINE = re.compile(r"already exists, the output tensors|has Int64 binding|[Uu]nused|is unused or used only")
"""Warnings that every build gives: bodies repeat per layer, and most RoPE types do not read ``sequence_length``."""


def message_log(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors for the exception that may follow."""

    class MessageLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.WARNING) and not _ROUTINE.search(message):
                self.kept.append(f"{severity.name.lower()}: {message}")

        def lines(self) -> list[str]:
            """All of them, in order."""
            return self.kept or ["none was given"]

    return MessageLog()


def progress_monitor(trt: Any, progress: Progress) -> Any:
    """Forwards the builder's outermost phases; an exception in ``progress`` (or Ctrl-C) cancels the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interruption: BaseException | None = None
            self._steps: dict[str, int] = {}
            self._root: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._root = phase_name
            if parent_phase in (None, self._root):
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                try:
                    progress(phase_name, step + 1, self._steps[phase_name])
                except BaseException as err:  # noqa: BLE001 - it must not cross TensorRT's C++ frames; raised after them
                    self.interruption = err
            return self.interruption is None

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def execution_blocker(backend: str) -> str | None:
    """Why an engine of this backend cannot run on this machine; None if it can. Needs no package."""
    try:
        capability = gpu_compute_capability()
    except ToolchainError as err:
        return err.message
    if backend == "tensorrt-rtx" and capability not in _RTX_COMPUTE_CAPABILITIES:
        supported = ", ".join(_RTX_COMPUTE_CAPABILITIES)
        return f"TensorRT-RTX does not support this GPU: compute capability {capability}, supported: {supported}"
    for module in (_MODULES[backend], "cuda"):
        if importlib.util.find_spec(module) is None:
            return f"the Python package `{module}` is not installed: pip install 'llama-export[{backend}]'"
    return None


def gpu_compute_capability() -> str:
    """``8.9`` for the first GPU.

    Raises:
        ToolchainError: no driver, or no GPU.
    """
    hint = "run this on a machine with an NVIDIA GPU"
    driver = _load_driver()
    if driver is None:
        raise ToolchainError("no NVIDIA driver on this machine: libcuda.so.1 is not found", hint=hint)
    count, device, major, minor = (ctypes.c_int(0) for _ in range(4))
    for function, *arguments in (
        (driver.cuInit, 0),
        (driver.cuDeviceGetCount, ctypes.byref(count)),
        (driver.cuDeviceGet, ctypes.byref(device), 0),
        (driver.cuDeviceGetAttribute, ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device),
        (driver.cuDeviceGetAttribute, ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device),
    ):
        status = function(*arguments)
        if status != 0:
            raise ToolchainError(f"no usable NVIDIA GPU: the driver answers CUDA error {status}", hint=hint)
    return f"{major.value}.{minor.value}"


_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute of cuda.h."""


def _load_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def load_cuda_runtime(backend: str) -> Any:
    """CUDA's runtime API; the package holds the library, so that only the driver must be on the machine."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as err:
        raise MissingDependencyError("cuda.bindings", backend) from err
