"""Versions and machine facts that decide the numbers: part of every report, and what ``llama-export env`` prints."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from llama_export import __version__

_PACKAGES = (
    *(
        "torch",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "onnxruntime-gpu",
        "transformers",
        "tokenizers",
        "numpy",
    ),
    *("tensorrt-rtx-cu13-libs", "tensorrt", "llama-export-plugins", "triton"),
)


def environment() -> dict[str, str]:
    """Name -> version or description; nothing is imported to find out."""
    return {
        "llama-export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or "unknown"
