"""Llama checkpoints to ONNX and TensorRT engines, with a report that compares each of them with the checkpoint.

>>> import llama_export
>>> llm = llama_export.load("build/tiny-llama")
>>> llm.complete(["def "], max_new_tokens=16)[0].text

Generate: :func:`load`, :class:`LLM`, :class:`SamplingParams`. Heads without a cache: :func:`load_head`,
:class:`HeadModel`. Make bundles and engines: :func:`export_checkpoint`, :func:`quantize_bundle`, :func:`build_engine`,
:func:`validate_bundle`, :func:`load_bundle`. Every error that a user can cause is a :class:`LlamaExportError`.
"""

import os
from typing import TYPE_CHECKING, Any

# onnxruntime reads this when it is imported, and every import of it in this package comes after this line. Without it,
# onnxruntime writes a device id and an event database below the user's cache folder and reports to a server. See
# docs/security.md.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from llama_export.api import build_engine, export_checkpoint, load_bundle, quantize_bundle, validate_bundle
    from llama_export.bundle.bundle import Bundle
    from llama_export.config.settings import EngineConfig, ExportConfig
    from llama_export.engine.build import EngineResult
    from llama_export.errors import (
        ArtifactMismatchError,
        CheckpointError,
        ConfigError,
        EngineBuildError,
        ExportError,
        LlamaExportError,
        MissingDependencyError,
        ShapeError,
        ToolchainError,
    )
    from llama_export.export.export import ExportResult
    from llama_export.export.quantize import QuantizeResult
    from llama_export.parity.judge import ValidateConfig
    from llama_export.parity.report.result import ParityReport
    from llama_export.runtime.generation import TokenEvent
    from llama_export.runtime.head import HeadModel, load_head
    from llama_export.runtime.llm import LLM, Completion, TextGeneration, load
    from llama_export.runtime.opening import open_head_session, open_session
    from llama_export.runtime.protocol import CacheSession, HeadSession
    from llama_export.runtime.sampling import TokenLogprobs
    from llama_export.runtime.sampling_params import SamplingOptions, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "ArtifactMismatchError",
    "Bundle",
    "CacheSession",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "EngineBuildError",
    "EngineConfig",
    "EngineResult",
    "ExportConfig",
    "ExportError",
    "ExportResult",
    "HeadModel",
    "HeadSession",
    "LlamaExportError",
    "MissingDependencyError",
    "ParityReport",
    "QuantizeResult",
    "SamplingOptions",
    "SamplingParams",
    "ShapeError",
    "TextGeneration",
    "TokenEvent",
    "TokenLogprobs",
    "ToolchainError",
    "ValidateConfig",
    "__version__",
    "build_engine",
    "export_checkpoint",
    "load",
    "load_bundle",
    "load_head",
    "open_head_session",
    "open_session",
    "quantize_bundle",
    "validate_bundle",
]
_ERRORS = (
    *("ArtifactMismatchError", "CheckpointError", "ConfigError", "EngineBuildError", "ExportError", "LlamaExportError"),
    *("MissingDependencyError", "ShapeError", "ToolchainError"),
)
_MODULES = {
    **dict.fromkeys(_ERRORS, "errors"),
    **dict.fromkeys(("build_engine", "export_checkpoint", "load_bundle", "quantize_bundle", "validate_bundle"), "api"),
    **dict.fromkeys(("LLM", "Completion", "TextGeneration", "load"), "runtime.llm"),
    **dict.fromkeys(("open_head_session", "open_session"), "runtime.opening"),
    **dict.fromkeys(("HeadModel", "load_head"), "runtime.head"),
    **dict.fromkeys(("SamplingOptions", "SamplingParams"), "runtime.sampling_params"),
    **dict.fromkeys(("EngineConfig", "ExportConfig"), "config.settings"),
    **dict.fromkeys(("CacheSession", "HeadSession"), "runtime.protocol"),
    "Bundle": "bundle.bundle",
    "EngineResult": "engine.build",
    "ExportResult": "export.export",
    "ParityReport": "parity.report.result",
    "QuantizeResult": "export.quantize",
    "TokenEvent": "runtime.generation",
    "TokenLogprobs": "runtime.sampling",
    "ValidateConfig": "parity.judge",
}
"""Public name -> the module that defines it, imported when the name is first used: ``--help`` needs none of them."""


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
