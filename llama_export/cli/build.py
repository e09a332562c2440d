"""``llama-export build``: a bundle becomes a TensorRT engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from llama_export.cli.console import log, print_data, progress_bar
from llama_export.cli.options import PATH, ignore_estimate_flag, ignore_hashes_flag, json_flag
from llama_export.config.settings import BACKENDS, ENGINE_WEIGHTS, EngineConfig


@click.command(short_help="Build a TensorRT engine from a bundle.")
@click.argument("bundle", type=PATH)
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="tensorrt-rtx", help="Which TensorRT builds the engine."
)
@click.option(
    "--ops",
    default="plugin",
    metavar="plugin|native|OP=native,...",
    help="Attention and norms by our plugin layers, or by TensorRT's own from the ONNX function bodies; or some of each: "
    "LlamaRMSNorm=native,LlamaAddRMSNorm=native.",
)
@click.option(
    "--max-seq-len",
    type=int,
    metavar="TOKENS",
    help="KV-cache capacity.  [default: min(max_position_embeddings, 4096)]",
)
@click.option("--max-batch", type=int, default=4, metavar="ROWS", help="Largest batch.")
@click.option(
    "--weights", type=click.Choice(ENGINE_WEIGHTS), default="constant",
    help="Inside the engine; or taken from BUNDLE's files when it is loaded (input: an engine of a few MB that `refit` gives "
    "to other fine-tunes); or stripped and put back at load (needs a GPU to build).",
)  # fmt: skip
@click.option(
    "--profiles", type=click.Choice(["1", "2"]), default="2",
    help="2: kernels for prefill and for decode. 1: one set, half the size and build time.",
)  # fmt: skip
@click.option(
    "--compute-capability", "compute_capabilities", multiple=True, metavar="MAJOR.MINOR",
    help="GPU to compile for; may be repeated.  [default: one engine for all that TensorRT-RTX supports]",
)  # fmt: skip
@click.option("--tf32", is_flag=True, help="Let float32 matrix products round their inputs to TF32.")
@click.option("--force", is_flag=True, help="Replace an engine of the same name.")
@ignore_estimate_flag
@ignore_hashes_flag
@json_flag
def build(
    bundle: Path, backend: Any, ops: str, max_seq_len: int | None, max_batch: int, weights: Any, profiles: str,
    compute_capabilities: tuple[str, ...], tf32: bool, force: bool, ignore_estimate: bool,
    ignore_hashes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build a TensorRT engine from BUNDLE. Needs no GPU."""
    from llama_export.bundle.bundle import load_bundle
    from llama_export.engine.build import build_engine

    config = EngineConfig(
        backend=backend, ops=ops, max_seq_len=max_seq_len, max_batch=max_batch, weights=weights, profiles=int(profiles),
        compute_capabilities=compute_capabilities, tf32=tf32, force=force,
        ignore_estimate=ignore_estimate,
    )  # fmt: skip
    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    with progress_bar("steps") as progress:
        result = build_engine(opened, config, log=log, progress=progress)
    print_data(dataclasses.asdict(result), as_json, result.engine)
