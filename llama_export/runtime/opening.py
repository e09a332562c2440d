"""A bundle -> a session: which backend, which engine, how many threads and how large a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_export._system.text import printable
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.checks import checked_bool, checked_int, checked_path, checked_text, wrong_argument
from llama_export.config.settings import BACKENDS, RUNTIME_BACKENDS, RuntimeBackend
from llama_export.errors import ConfigError, ShapeError
from llama_export.runtime.onnxruntime_graph import Device
from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession, OnnxRuntimeSession
from llama_export.runtime.protocol import CacheSession, HeadSession
from llama_export.runtime.text import TextCodec

DEFAULT_MAX_SEQ_LEN = 4096
"""Capacity of the cache where none is asked for and the model has more positions, tokens."""
MAX_THREADS = 4096
ONNXRUNTIME_BACKENDS = ("onnxruntime", "onnxruntime-cuda")


def open_session(
    bundle: str | Path | Bundle,
    *,
    backend: RuntimeBackend = "auto",
    engine: str | Path | None = None,
    quantize: str | None = None,
    max_seq_len: int | None = None,
    threads: int | None = None,
    read_weights: bool = False,
    request_tokens: int = 1,
) -> CacheSession:
    """Opens the session that :func:`load` wraps: one row, on the CPU or a GPU. A session serves one thread at a time.

    Args:
        bundle, backend, engine, quantize, max_seq_len, threads, read_weights: see :func:`load`.
        request_tokens: tokens that the caller is going to need. The default of ``max_seq_len`` is at least this, and
            ``auto`` takes no engine of the bundle that holds fewer.

    Raises:
        ConfigError, ArtifactMismatchError, MissingDependencyError, ShapeError, ToolchainError: see :func:`load`.
    """
    opened = opened_bundle(bundle)
    threads, read_weights = _threads(threads), checked_bool(read_weights, "read_weights")
    request_tokens = checked_int(request_tokens, "request_tokens")
    if max_seq_len is not None:
        max_seq_len = checked_int(max_seq_len, "max_seq_len")
    if quantize is not None:
        quantize = checked_text(quantize, "quantize")
    path, note = _chosen_engine(
        opened, backend, engine, request_tokens, quantize=quantize, max_seq_len=max_seq_len, threads=threads,
        read_weights=read_weights or None,
    )  # fmt: skip
    if path is not None:
        from llama_export.runtime.engine_session import EngineSession

        return EngineSession(opened, path, note=note)
    default = min(opened.config.max_length, max(DEFAULT_MAX_SEQ_LEN, request_tokens))
    session = OnnxRuntimeSession(
        opened, max_seq_len=default if max_seq_len is None else max_seq_len, threads=threads, variant=quantize,
        device=_device_of(backend), read_weights=read_weights,
    )  # fmt: skip
    session.note = "; ".join(filter(None, (note, session.note))) or None
    return session


def open_head_session(
    bundle: str | Path | Bundle,
    *,
    backend: RuntimeBackend = "auto",
    engine: str | Path | None = None,
    threads: int | None = None,
    read_weights: bool = False,
) -> HeadSession:
    """Opens the session that :func:`llama_export.load_head` wraps.

    Args:
        bundle, backend, engine, threads, read_weights: see :func:`load`.

    Raises:
        ConfigError, ArtifactMismatchError, MissingDependencyError, ToolchainError: see :func:`load`.
    """
    opened = opened_bundle(bundle)
    threads, read_weights = _threads(threads), checked_bool(read_weights, "read_weights")
    path, note = _chosen_engine(opened, backend, engine, 1, threads=threads, read_weights=read_weights or None)
    if path is not None:
        from llama_export.runtime.engine_session import EngineHeadSession

        return EngineHeadSession(opened, path, note=note)
    session = OnnxRuntimeHeadSession(opened, threads=threads, device=_device_of(backend), read_weights=read_weights)
    session.note = "; ".join(filter(None, (note, session.note))) or None
    return session


def codec_of(bundle: Bundle) -> TextCodec | None:
    """The bundle's tokenizer; None where it has none."""
    return TextCodec(bundle.folder) if (bundle.folder / "tokenizer.json").is_file() else None


def opened_bundle(bundle: str | Path | Bundle, *, ignore_hashes: bool = False) -> Bundle:
    """A bundle, from its folder or as it is.

    Raises:
        ConfigError, ArtifactMismatchError: see :func:`llama_export.bundle.bundle.load_bundle`; an argument of a wrong type.
    """
    if isinstance(bundle, Bundle):
        return bundle
    return load_bundle(checked_path(bundle, "bundle"), ignore_hashes=checked_bool(ignore_hashes, "ignore_hashes"))


def _threads(threads: int | None) -> int | None:
    return None if threads is None else checked_int(threads, "threads", most=MAX_THREADS)


def _device_of(backend: RuntimeBackend) -> Device:
    return "cuda" if backend == "onnxruntime-cuda" else "cpu"


def _chosen_engine(
    bundle: Bundle, backend: RuntimeBackend, engine: str | Path | None, request_tokens: int, **of_onnxruntime: Any
) -> tuple[Path | None, str | None]:
    """The engine that these settings mean, or None for onnxruntime; and what to tell the user of the choice."""
    asked = {name: value for name, value in of_onnxruntime.items() if value is not None}
    if checked_text(backend, "backend") not in RUNTIME_BACKENDS:
        raise ConfigError(
            f"unknown backend: {backend}",
            details={"got": backend, "expected": " | ".join(RUNTIME_BACKENDS)},
            hint="choose one of these",
        )
    if engine is not None and backend in ONNXRUNTIME_BACKENDS:
        raise ConfigError(
            "onnxruntime runs no engines",
            details={"engine": engine, "got": f"backend {backend}"},
            hint="leave the engine out, or choose the backend `auto`",
        )
    path, note = checked_path(engine, "engine") if engine is not None else None, None
    if path is not None and not path.name:
        raise wrong_argument("engine", engine, "the path of a file")
    if path is None and backend not in ONNXRUNTIME_BACKENDS and not (backend == "auto" and asked):
        path, note = _engine_of(bundle, backend, request_tokens)
    if path is not None and asked:
        raise ConfigError(
            f"an engine has no {', '.join(asked)}",
            details={"engine": path, "got": ", ".join(f"{name}={value!r}" for name, value in asked.items())},
            hint="capacity and precision are chosen by `llama-export build`; for a CPU choose the backend `onnxruntime`",
        )
    return path, note


def _engine_of(bundle: Bundle, backend: RuntimeBackend, request_tokens: int) -> tuple[Path | None, str | None]:
    """As :func:`_chosen_engine`, by the rule that :func:`open_session` documents."""
    from llama_export.engine.sidecar import read_sidecar
    from llama_export.engine.tensorrt import gpu_compute_capability
    from llama_export.runtime.engine_session import execution_blocker

    is_auto = backend == "auto"
    able = {name for name in BACKENDS if execution_blocker(name) is None}
    if is_auto and not able:
        return None, None
    wanted = able if is_auto else {backend}
    built = [(path, sidecar) for path in bundle.engines if (sidecar := read_sidecar(path)).backend in wanted]
    gpu = gpu_compute_capability() if able else None
    if is_auto:
        fitting = [item for item in built if item[1].max_seq_len >= request_tokens and item[1].serves(str(gpu))]
        if not fitting:
            why = f"auto: none of the {len(built)} engines serves {request_tokens} tokens on this GPU; using the CPU"
            return None, why if built else None
        built = fitting
    if not built:
        raise ConfigError(
            f"this bundle has no {backend} engine",
            details={"bundle": bundle.folder, "got": ", ".join(path.name for path in bundle.engines) or "none"},
            hint=f"make one: llama-export build {bundle.folder} --backend {backend}",
        )
    # bundle.engines is sorted by name, and max() gives the first of equals.
    path, sidecar = max(
        built, key=lambda item: (gpu is not None and item[1].serves(gpu), item[1].max_seq_len, item[1].max_batch)
    )
    note = (
        f"auto: using engine {printable(path.name)}, built by llama_export {sidecar.created_by.llama_export} with {sidecar.backend} "
        f"{sidecar.backend_version}; loading an engine runs its code on the GPU, --backend onnxruntime does not"
    )
    return path, note if is_auto else None


def request_capacity(prompt: int, new_tokens: int, limit: int) -> int:
    """Tokens that the cache must hold: the last one of the output is not kept."""
    needed = prompt + new_tokens - 1
    if needed > limit:
        raise ShapeError(
            f"prompt and new tokens need {needed} positions, the model has {limit}",
            details={"prompt": f"{prompt} tokens", "max_new_tokens": new_tokens, "longest sequence": limit},
            hint="shorten the prompt, or lower --max-new-tokens",
        )
    return max(1, needed)
