"""Llama checkpoints to ONNX and TensorRT engines that are proven to compute what the checkpoint computes.

>>> import llama_export
>>> llm = llama_export.load("build/tiny-llama")
>>> llm.complete(["def "], max_new_tokens=16)[0].text

More in :mod:`llama_export.llm`.
"""

import os
from typing import TYPE_CHECKING, Any

# onnxruntime reads this when it is imported, and every import of it in this package comes after this line. Without it,
# onnxruntime writes a device id and an event database below the user's cache folder and reports to a server. See
# docs/security.md.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from llama_export.llm import LLM, Completion, SamplingParams, load

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """The names of :mod:`llama_export.llm`, imported when one is asked for: the command line's ``--help`` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llama_export import llm

    return getattr(llm, name)
