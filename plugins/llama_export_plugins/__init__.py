"""TensorRT plugins of llama-export: where the library is, and what it was built from. Needs neither torch nor triton."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["ABI", "__version__", "library_path", "preload_path", "variants"]

__version__ = metadata.version("llama-export-plugins")
ABI = 4
"""An engine runs on the libraries of the number it was built with. The library is compiled with this number (CMakeLists.txt
reads it here): every plugin stores it in the engine, and `llama_export_plugins_abi()` says it."""

_FOLDER = Path(__file__).resolve().parent
_HINT = "pip install ./plugins, from the llama-export repository, builds it"


def library_path() -> Path:
    """The shared library that TensorRT loads.

    Raises:
        FileNotFoundError: the package is there and its library is not.
    """
    return _existing("libllama_export_plugins.so")


def preload_path() -> Path:
    """A small library for programs that only ``dlopen`` a plugin library (Polygraphy, Triton Inference Server): it has the
    TensorRT of the process load :func:`library_path`.

    Raises:
        FileNotFoundError: the package is there and this library is not.
    """
    return _existing("libllama_export_plugins_preload.so")


def variants() -> dict[str, Any]:
    """What the kernels were compiled to: `triton` (version), `chips`, `images` [{kernel, dtype, head_dim, masked,
    constexprs, compute_capability, ptx, entry, bytes, shared, warps, ...}], `signatures` {kernel: [[name, type], ...]}.

    Raises:
        FileNotFoundError: the package is there and its table is not.
    """
    table: dict[str, Any] = json.loads(_existing("variants.json").read_text(encoding="utf-8"))
    return table


def _existing(name: str) -> Path:
    path = _FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"the plugin library is incomplete: {path} does not exist; hint: {_HINT}")
    return path
