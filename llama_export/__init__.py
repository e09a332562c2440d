"""Llama checkpoints to ONNX and TensorRT engines, with a report that compares each of them with the checkpoint.

>>> import llama_export
>>> llm = llama_export.load("build/tiny-llama")
>>> llm.complete(["def "], max_new_tokens=16)[0].text

Generate: :func:`load`, :class:`LLM`, :class:`SamplingParams`. Heads without a cache: :func:`load_head`,
:class:`HeadModel`. Make bundles and engines: :func:`export_checkpoint`, :func:`quantize_bundle`, :func:`build_engine`,
:func:`validate_bundle`, :func:`load_bundle`. Every error that a user can cause is a :class:`LlamaExportError`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_export.api import build_engine, export_checkpoint, load_bundle, quantize_bundle, validate_bundle
    from llama_export.bundle import Bundle
    from llama_export.config import EngineConfig, ExportConfig
    from llama_export.engine import EngineResult
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
    from llama_export.export import ExportResult
    from llama_export.head import HeadModel, load_head
    from llama_export.llm import LLM, Completion, TextGeneration, load, open_head_session, open_session
    from llama_export.parity.judge import ValidateConfig
    from llama_export.parity.result import ParityReport
    from llama_export.quantization import QuantizeResult
    from llama_export.runtime.generation import TokenEvent
    from llama_export.runtime.protocol import CacheSession, HeadSession
    from llama_export.runtime.sampling import TokenLogprobs
    from llama_export.sampling_params import SamplingOptions, SamplingParams

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
    **dict.fromkeys(("LLM", "Completion", "TextGeneration", "load", "open_head_session", "open_session"), "llm"),
    **dict.fromkeys(("HeadModel", "load_head"), "head"),
    **dict.fromkeys(("SamplingOptions", "SamplingParams"), "sampling_params"),
    **dict.fromkeys(("EngineConfig", "ExportConfig"), "config"),
    **dict.fromkeys(("CacheSession", "HeadSession"), "runtime.protocol"),
    "Bundle": "bundle",
    "EngineResult": "engine",
    "ExportResult": "export",
    "ParityReport": "parity.result",
    "QuantizeResult": "quantization",
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
