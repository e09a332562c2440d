"""The two TensorRT packages behind one door: import them, hear them, and know whether this machine can run an engine.

``tensorrt-rtx`` builds ahead of time on any machine; ``tensorrt`` times its kernels on the GPU it builds for. Their
Python API is the same. Used by :mod:`llama_export.engine.build` only.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_export._system.interrupt import Deferred, deferred
from llama_export.bundle.placement import Progress
from llama_export.errors import ArtifactMismatchError, MissingDependencyError, ToolchainError, install_command

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
        with deferred():  # an extension module makes an ImportError of whatever interrupts it
            trt = importlib.import_module(name)
    except ModuleNotFoundError as err:
        raise MissingDependencyError(err.name or name, backend) from err
    except (ImportError, OSError) as err:
        raise ToolchainError(
            f"`{name}` cannot load its libraries",
            details={"reason": err},
            hint=install_command(backend),
        ) from err
    if not hasattr(trt.LayerType, "KV_CACHE_UPDATE"):
        raise ToolchainError(
            f"{backend} {trt.__version__} has no KV-cache layer",
            details={"expected": "tensorrt-rtx 1.7 or tensorrt 10.15"},
            hint=install_command(backend).replace("pip install", "pip install --upgrade"),
        )
    return trt


def load_onnx(backend: str) -> Any:
    """The ``onnx`` package, which each backend's extra brings along."""
    try:
        return importlib.import_module("onnx")
    except ModuleNotFoundError as err:
        raise MissingDependencyError("onnx", backend) from err


# ---- the name under which TensorRT-RTX looks for itself -----------------------------------------------------------

_CORE_NAME = "libtensorrt_rtx.so"
"""What the ONNX parser passes to ``dlopen`` when it imports a plugin node."""
_CORE_SYMBOL = "createInferBuilder_INTERNAL"
"""Exported by the core library; used to prove that the name leads to the library that is already loaded."""
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 1, 4, 5, 6, 10, 11, 14
_READ_WRITE = 6


def ensure_core_library_name() -> None:
    """Lets the parser of TensorRT-RTX open its core library by the name without a version.

    Importing a plugin node, the parser calls ``dlopen("libtensorrt_rtx.so")``, but the wheel ships only
    ``libtensorrt_rtx.so.1``; the miss ends in ``std::terminate``, which Python cannot catch. The dynamic loader compares
    a name without a slash with the SONAMEs of what is loaded before it looks at any file. So an empty shared object with
    that SONAME, whose one dependency is the library already in the process, makes the call succeed, with no file written
    beside the wheel and no environment variable.

    Call it after :func:`load_backend` and before a parse. Does nothing where the name is known already, nor off Linux.

    Raises:
        ToolchainError: no such library is loaded, or the loader does not take the stand-in.
    """
    if not sys.platform.startswith("linux"):
        return
    versioned = _loaded_library(_CORE_NAME)
    try:
        if versioned is None:
            raise OSError(f"no {_CORE_NAME}.* is loaded")
        core = ctypes.CDLL(versioned, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        try:
            named = ctypes.CDLL(_CORE_NAME, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            _load_image(empty_shared_object(_CORE_NAME, Path(versioned).name, _ELF_MACHINES[platform.machine()]))
            named = ctypes.CDLL(_CORE_NAME, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        ours, theirs = (ctypes.cast(getattr(item, _CORE_SYMBOL), ctypes.c_void_p).value for item in (core, named))
        if ours != theirs:
            raise OSError(f"`{_CORE_NAME}` names another library than the one that is loaded")
    except (OSError, KeyError, AttributeError) as err:
        raise ToolchainError(
            f"TensorRT-RTX's parser cannot import plugin nodes: it would not find `{_CORE_NAME}`",
            details={"got": err, "expected": f"{_CORE_NAME}.1 from the tensorrt-rtx wheels, on Linux with glibc"},
            hint=f"{install_command('tensorrt-rtx')}; or build an engine without plugin layers: --ops native",
        ) from err


def _loaded_library(stem: str) -> str | None:
    """Path of the library ``stem.N`` that is mapped into this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        found = re.search(rf"^\S+ \S+ \S+ \S+ \S+ +(.*/{re.escape(stem)}\.[0-9]+[0-9.]*)$", maps.read(), re.MULTILINE)
    return None if found is None else found[1]


def _load_image(image: bytes) -> None:
    """Loads a shared object from memory, or from a temporary file where there is no memfd. It stays for good."""
    try:
        handle = os.memfd_create("llama-export", os.MFD_CLOEXEC)
    except OSError:
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(image)
            file.flush()
            ctypes.CDLL(file.name)
        return
    try:
        os.write(handle, image)
        ctypes.CDLL(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def empty_shared_object(soname: str, needed: str, machine: int) -> bytes:
    """A 64-bit little-endian ELF shared object without code: a name, and one dependency.

    Args:
        soname: the name the loader will know it by.
        needed: the library it depends on.
        machine: ``e_machine`` of the header, e.g. 62 for x86-64.

    Source: System V ABI, chapters 4 and 5 (https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html).
    """
    header_size, segment_size, symbol_size, num_segments = 64, 56, 24, 3
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    hash_table = struct.pack("<4I", 1, 1, 0, 0)  # one bucket, one chain entry: only the null symbol
    symbols = bytes(symbol_size)

    hash_at = header_size + num_segments * segment_size
    symbols_at = hash_at + len(hash_table)
    dynamic_at = symbols_at + len(symbols)
    entries = (
        (_DT_SONAME, 1), (_DT_NEEDED, 2 + len(soname)), (_DT_HASH, hash_at), (_DT_SYMTAB, symbols_at),
        (_DT_SYMENT, symbol_size), (_DT_STRTAB, dynamic_at + 8 * 16), (_DT_STRSZ, len(strings)), (_DT_NULL, 0),
    )  # fmt: skip
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    size = dynamic_at + len(dynamic) + len(strings)

    identification = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", identification, 3, machine, 1, 0, header_size, 0, 0,
        header_size, segment_size, num_segments, 0, 0, 0,
    )  # fmt: skip

    def segment(kind: int, flags: int, begin: int, length: int, alignment: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, begin, begin, begin, length, length, alignment)

    # Writable, because the loader stores the dynamic section's real addresses in it; never executable.
    segments = segment(_PT_LOAD, _READ_WRITE, 0, size, 0x10000)
    segments += segment(_PT_DYNAMIC, _READ_WRITE, dynamic_at, len(dynamic), 8)
    segments += segment(_PT_GNU_STACK, _READ_WRITE, 0, 0, 16)
    return header + segments + hash_table + symbols + dynamic + strings


# ---- messages and progress ----------------------------------------------------------------------------------------

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

    log = MessageLog()
    _LOGS.append(log)
    return log


_LOGS: list[Any] = []
"""TensorRT keeps the address of a process's first log, for its registry too, without owning it: none may go."""


# ---- weights in, plan out: neither is ever in this process's memory as a whole ------------------------------------


class MappedWeights:
    """The weight files of a bundle, mapped, for TensorRT's parser to read.

    TensorRT copies a weight once and then reads it again when it serialises the plan; in between its pages are only in the
    way. While this is entered, they are given back ten times a second: what is read again comes from the page cache.

    Args:
        folder: that holds the files.
        proto: whose external initializers will be looked up.
    """

    def __init__(self, folder: Path, proto: Any) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        self._places: dict[str, tuple[str, int, int]] = {}
        for tensor in proto.graph.initializer:
            place = {item.key: item.value for item in tensor.external_data}
            if place:
                self._places[tensor.name] = place["location"], int(place["offset"]), int(place["length"])
        for name in sorted({file for file, _, _ in self._places.values()}):
            with (folder / name).open("rb") as stream:
                self._maps[name] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def addresses(self) -> Iterator[tuple[str, int, int]]:
        """(name, address, bytes) of every external initializer; valid as long as this object.

        Raises:
            ArtifactMismatchError: a place that is not within its file. The graph was checked before
                (:mod:`llama_export.bundle.graph_check`); here an address is made of it, so it is checked again.
        """
        bases = {name: np.frombuffer(mapped, np.uint8).ctypes.data for name, mapped in self._maps.items()}
        for name, (file, offset, length) in self._places.items():
            if min(offset, length) < 0 or offset + length > len(self._maps[file]):
                raise ArtifactMismatchError(
                    f"the weight `{name}` does not lie within its file",
                    details={"file": file, "got": f"{length} bytes from {offset}", "expected": len(self._maps[file])},
                    hint="export again; do not use bundles from a source you do not trust",
                )
            yield name, bases[file] + offset, length

    def __enter__(self) -> MappedWeights:
        if self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._thread = threading.Thread(target=self._release_pages, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _release_pages(self) -> None:
        while not self._stop.wait(0.1):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)


def plan_writer(trt: Any, path: Path) -> Any:
    """A TensorRT stream that writes a plan to a file and hashes it; close it to know ``nbytes`` and ``sha256``.

    A piece is written and hashed by two threads while TensorRT makes the next one. What goes wrong with the file ends the
    build and is kept in ``error``: an exception must not cross TensorRT's C++ frames.
    """

    class PlanWriter(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.nbytes = 0
            self.sha256 = ""
            self.error: BaseException | None = None
            self._stream = path.open("wb", buffering=0)
            self._hash = hashlib.sha256()
            self._workers = concurrent.futures.ThreadPoolExecutor(2)
            self._pending: list[concurrent.futures.Future[None]] = []

        def write(self, data: bytes) -> int:
            if not self._finish_piece():
                return 0
            self._pending = [self._workers.submit(work, data) for work in (self._put, self._hash.update)]
            self.nbytes += len(data)
            return len(data)

        def _put(self, data: bytes) -> None:
            view = memoryview(data)
            while view:
                view = view[self._stream.write(view) :]

        def _finish_piece(self) -> bool:
            try:
                for item in self._pending:
                    item.result()
            except BaseException as err:  # noqa: BLE001 - raised again after TensorRT's frames
                self.error = self.error or err
            self._pending = []
            return self.error is None

        def close(self) -> None:
            self._finish_piece()
            self._workers.shutdown()
            self._stream.close()
            self.sha256 = self._hash.hexdigest()

    return PlanWriter()


def progress_monitor(trt: Any, progress: Progress, signalled: Deferred) -> Any:
    """Forwards the builder's outermost phases. An exception in ``progress``, kept in ``error``, or a signal cancels the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
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
                    self.error = err
            return self.error is None and not signalled

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def cuda_major(backend: str) -> int | None:
    """Major version of the CUDA that the installed libraries of a backend were made for, by the name of their package."""
    pattern = re.compile(rf"{backend}[-_]cu(\d+)(?:[-_]libs)?", re.IGNORECASE)
    names = (distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions())
    found = {int(match[1]) for name in names if (match := pattern.fullmatch(name.replace("_", "-")))}
    return max(found, default=None)


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs, (13, 0); None without a driver."""
    driver = _load_driver()
    version = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


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
            return f"the Python package `{module}` is not installed; {install_command(backend)}"
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
