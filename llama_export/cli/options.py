"""The flags that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llama_export.config.settings import RUNTIME_BACKENDS, VARIANTS

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
PATH = click.Path(path_type=Path)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
ignore_hashes_flag = click.option(
    "--ignore-hashes", is_flag=True, help="Open the bundle although a file differs from the manifest."
)
ignore_estimate_flag = click.option(
    "--ignore-estimate", is_flag=True, help="Go on although the disk is too small by the estimate."
)


def session_options(function: Callable[..., None]) -> Callable[..., None]:
    """Flags that choose what computes; the command takes them as one dict, ``session``."""
    options = (
        click.option(
            "--backend", type=click.Choice(RUNTIME_BACKENDS), default="auto",
            help="What computes. auto: the engine given or found in BUNDLE that this machine can run, else onnxruntime on the "
            "CPU.",
        ),
        click.option("--engine", type=PATH, help="TensorRT engine, made by `llama-export build`."),
        click.option("--quantize", type=click.Choice(VARIANTS), help="Weights made by `llama-export quantize` (CPU)."),
        click.option(
            "--max-seq-len", type=click.IntRange(1), metavar="TOKENS",
            help="What onnxruntime's KV cache holds; memory is taken when it is filled.  [default: what the model can, at "
            "most 4096, or what the request needs]",
        ),
        click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: one per core]"),
    )  # fmt: skip

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        session = {name: kwargs.pop(name) for name in ("backend", "engine", "quantize", "max_seq_len", "threads")}
        function(*args, session=session, **kwargs)

    for option in reversed(options):
        command = option(command)
    return command
