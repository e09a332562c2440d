"""A bundle's graph, opened by onnxruntime: on the CPU, or on CUDA; where its weights lie, and what it costs to open.

**CUDA was not run on a GPU**; what could be proven without one is in ``docs/decisions.md``, 50.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llama_export._system.files import open_regular
from llama_export._system.process import available_memory, trim_heap
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.graph_check import check_graph
from llama_export.config.decoder import count_parameters
from llama_export.errors import (
    ArtifactMismatchError,
    ConfigError,
    MissingDependencyError,
    ToolchainError,
    install_command,
    numbered,
)

Device = Literal["cpu", "cuda"]


class OpenGraph(NamedTuple):
    """A bundle's graph, opened by onnxruntime."""

    onnxruntime: Any
    """The module."""
    session: Any
    """An ``InferenceSession``."""
    note: str | None
    """What a user must know about its precision and speed, if anything."""
    weights: Sequence[Any] = ()
    """Those that were read into memory: the session uses them where they are."""


def open_graph(
    bundle: Bundle,
    threads: int | None = None,
    variant: str | None = None,
    device: Device = "cpu",
    read_weights: bool = False,
) -> OpenGraph:
    """Opens a bundle's graph: on a CPU one that computes in float32 whatever the weights are stored in.

    16-bit weights are widened once, when the graph is opened, where memory allows: that takes 2.2 times the float32 weights
    for a while, and the float32 weights for good. Else the file stays mapped and each weight is widened in every step:
    an 8B model runs on a machine of 24 GB so, several times slower. Quantised weights are read as they are.

    onnxruntime's arena is off: it grew with every new mix of shapes, and was no faster (``docs/decisions.md``).

    Args:
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        threads: of onnxruntime's operators; None: one per core.
        variant: ``int8`` or ``int4``: the bundle's quantised weights; None: its own.
        device: what computes.
        read_weights: read the weights into memory; by default onnxruntime maps their files. If somebody makes a mapped file
            shorter while the session is open, the system kills the process (SIGBUS), which no program can catch in place.

    Raises:
        ArtifactMismatchError: no export makes such a graph: see :mod:`llama_export.bundle.graph_check`.
        ConfigError: the bundle has no such variant, or it is to run on CUDA.
        MissingDependencyError: no onnxruntime.
        ToolchainError: onnxruntime cannot open the graph, or has no such device; its message is attached.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as err:
        raise MissingDependencyError("onnxruntime", device) from err
    if device == "cuda":
        return _open_on_cuda(onnxruntime, bundle, threads, variant, read_weights)
    path = bundle.onnxruntime_path if variant is None else bundle.variant_path(variant)
    options = _session_options(onnxruntime, threads)
    weights = _weights(onnxruntime, bundle, path, options, read_weights)
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False  # of the arena; one for every shape that ever came
    disabled, note = [], precision_note(bundle.dtype) if variant is None else None
    available = available_memory()
    size = 4 * count_parameters(bundle.config, bundle.task)  # type: ignore[arg-type]
    if variant is None and _is_stored_narrow(bundle) and available is not None and _WIDENING * size > 0.9 * available:
        disabled = ["ConstantFolding"]
        note = (
            f"this bundle runs in float32 on a CPU; widening its weights once takes {_WIDENING * size / 1e9:.0f} GB and "
            f"{available / 1e9:.0f} GB are free, so they are widened in every step, which is slower"
        )
    session = _open(onnxruntime, path, options, ["CPUExecutionProvider"], disabled_optimizers=disabled)
    trim_heap()  # of what packing the weights took for a while
    return OpenGraph(onnxruntime, session, note, weights)


def _weights(onnxruntime: Any, bundle: Bundle, path: Path, options: Any, read: bool) -> list[Any]:
    """Checks a graph; reads its weights for a session of these options, if that is asked for.

    Source: ``SessionOptions.add_external_initializers``, which takes them in place of what the graph names.
    """
    tensors = check_graph(bundle, path)
    if not read:
        return []
    arrays = []
    for tensor in tensors:
        with open_regular(bundle.folder / tensor.file) as stream:
            stream.seek(tensor.offset)
            content = np.fromfile(stream, ONNX_ITEMS[tensor.dtype], math.prod(tensor.shape))
        if content.nbytes != tensor.nbytes:
            raise ArtifactMismatchError(
                f"weight file `{tensor.file}` became shorter while it was read",
                details={"tensor": tensor.name, "got": f"{content.nbytes} bytes", "expected": f"{tensor.nbytes} bytes"},
                hint="export again when nothing writes to the folder",
            )
        arrays.append(content.reshape(tensor.shape))
    values = [
        onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.dtype)
        for array, tensor in zip(arrays, tensors, strict=True)
    ]
    options.add_external_initializers([tensor.name for tensor in tensors], values)
    return [*arrays, *values]


def _open_on_cuda(
    onnxruntime: Any, bundle: Bundle, threads: int | None, variant: str | None, read_weights: bool
) -> OpenGraph:
    """``model.onnx`` on the first GPU, all of its operators."""
    if variant is not None:
        raise ConfigError(
            "quantised weights run on a CPU only",
            details={"got": f"{variant} on CUDA", "bundle": bundle.folder},
            hint="leave --quantize out, or choose the backend `onnxruntime`",
        )
    options = _session_options(onnxruntime, threads)
    weights = _weights(onnxruntime, bundle, bundle.model_path, options, read_weights)
    session = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        onnxruntime.preload_dlls(directory="")  # CUDA's libraries from their own wheels, where those are installed
    if _CUDA in onnxruntime.get_available_providers():
        onnxruntime.set_default_logger_severity(4)  # why CUDA does not start is said below
        try:
            session = _open(
                onnxruntime,
                bundle.model_path,
                options,
                [(_CUDA, _CUDA_OPTIONS), "CPUExecutionProvider"],
            )
        finally:
            onnxruntime.set_default_logger_severity(2)  # onnxruntime's default
    if session is None or _CUDA not in session.get_providers():  # onnxruntime would go on with the CPU
        raise ToolchainError(
            "onnxruntime cannot use CUDA here",
            details={
                "onnxruntime": f"{onnxruntime.__version__}, built for {', '.join(onnxruntime.get_available_providers())}",
                "NVIDIA driver": _driver(),
                **numbered("message", printed.getvalue().splitlines()),
            },
            hint=f"{install_command('cuda')} into an environment without the package `onnxruntime`, on a machine with "
            "an NVIDIA driver; `llama-export env` lists what is installed",
        )
    return OpenGraph(onnxruntime, session, None, weights=weights)


def _driver() -> str:
    """Whether the NVIDIA driver's library can be loaded, or why not."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as err:
        return str(err)
    return "found"


ONNX_ITEMS = {1: np.float32, 2: np.uint8, 10: np.float16, 16: np.uint16}
"""``onnx.TensorProto.DataType`` -> NumPy's type of the same size, for weights as they are stored."""
_CUDA = "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    "use_tf32": "0",  # on by default: float32 products would round their inputs to 10 bits
    "arena_extend_strategy": "kSameAsRequested",  # by default it doubles what it takes
}


def _session_options(onnxruntime: Any, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it would write errors, in colours and with names from the file, to standard error
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _open(onnxruntime: Any, path: Path, options: Any, providers: Sequence[Any], **more: Any) -> Any:
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers, **more)
    except Exception as err:
        raise ToolchainError(
            "onnxruntime cannot open this bundle",
            details={"file": path, "onnxruntime": onnxruntime.__version__, "reason": err},
            hint="see the supported versions in pyproject.toml, extras `cpu` and `cuda`",
        ) from err


_WIDENING = 2.2
"""Peak memory of onnxruntime 1.32's constant folding over the size of the float32 weights it makes (1.2B: 10.8 GB)."""


def _is_stored_narrow(bundle: Bundle) -> bool:
    """Whether the weights take clearly less than four bytes each."""
    stored = sum(entry.size for entry in bundle.manifest.weights) or bundle.onnxruntime_path.stat().st_size
    return bool(stored < 3 * count_parameters(bundle.config, bundle.task))  # type: ignore[arg-type]


def precision_note(dtype: str) -> str | None:
    """What a user must know about a CPU session's precision, if anything."""
    if dtype == "float32":
        return None
    return f"this {dtype} bundle runs in float32 on a CPU: its weights are widened at load"
