"""``llama-export export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from llama_export._system.process import collector_paused
from llama_export.checkpoint.path_hints import require_checkpoint_folder
from llama_export.cli.console import log, print_data, progress_bar
from llama_export.cli.options import PATH, ignore_estimate_flag, json_flag
from llama_export.cli.quantize import quantize_with_progress
from llama_export.config.llama import DTYPES, TASKS
from llama_export.config.settings import VARIANTS, WEIGHTS_MODES, ExportConfig


@click.command(short_help="Export a checkpoint: make a bundle.")
@click.argument("checkpoint", type=PATH)
@click.option(
    "-o", "--output", type=PATH, help="Folder to make.  [default: write into CHECKPOINT, which becomes the bundle]"
)
@click.option(
    "--task",
    type=click.Choice(["auto", *TASKS]),
    default="auto",
    help="Which head; auto: the checkpoint's architecture.",
)
@click.option(
    "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="Compute dtype; auto: the checkpoint's own."
)
@click.option(
    "--weights", type=click.Choice(WEIGHTS_MODES), default="auto",
    help="How the weights reach -o: reflinks, or copies where the file system has none (auto); hard links; copies; or inside "
    "the ONNX files (embed, up to 2 GiB, also without -o).",
)  # fmt: skip
@click.option(
    "--convert-weights",
    is_flag=True,
    help="Write the weight files of -o in --dtype, instead of casting in the graph what is stored in another.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--hash-weights", is_flag=True, help="Record a SHA-256 of every weight file (reads every byte).")
@click.option(
    "--allow-config-key",
    "allow_config_keys",
    multiple=True,
    metavar="KEY",
    help="Accept a config.json key that is not read.",
)
@click.option(
    "--quantize", "quantized", multiple=True, type=click.Choice(VARIANTS),
    help="Quantise the weights for the CPU at the end, as `quantize` does; may be repeated.",
)  # fmt: skip
@ignore_estimate_flag
@json_flag
def export(
    checkpoint: Path, output: Path | None, task: str, dtype: str, weights: Any, convert_weights: bool, force: bool,
    hash_weights: bool, allow_config_keys: tuple[str, ...], quantized: tuple[str, ...], ignore_estimate: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export CHECKPOINT (a Hugging Face folder) to ONNX, weights by reference."""
    require_checkpoint_folder(checkpoint)  # before the imports, which take seconds
    with collector_paused():  # the imports, too, make many objects and no garbage
        from llama_export.export.export import export_checkpoint

    config = ExportConfig(
        task=task,
        dtype=dtype,
        weights=weights,
        convert_weights=convert_weights,
        force=force,
        hash_weights=hash_weights,
        allow_config_keys=allow_config_keys,
        ignore_estimate=ignore_estimate,
    )
    with progress_bar("bytes") as progress:
        result = export_checkpoint(checkpoint, output, config, log=log, progress=progress)
    data = dataclasses.asdict(result)
    if quantized:
        data["quantized"] = [
            quantize_with_progress(
                Path(result.bundle), kind, force=False, ignore_estimate=ignore_estimate, ignore_hashes=False
            )
            for kind in dict.fromkeys(quantized)
        ]
    print_data(data, as_json, result.bundle)
