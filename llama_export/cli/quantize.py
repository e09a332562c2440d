"""``llama-export quantize``: adds int4 or int8 weights to a bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from llama_export.cli.console import log, print_data, progress_bar
from llama_export.cli.options import PATH, ignore_estimate_flag, ignore_hashes_flag, json_flag
from llama_export.config.settings import VARIANTS


@click.command(short_help="Add int4 or int8 weights to a bundle.")
@click.argument("bundle", type=PATH)
@click.option("--type", "kind", type=click.Choice(VARIANTS), default="int4", help="Bits of a weight.")
@click.option("--force", is_flag=True, help="Replace weights of the same type.")
@ignore_estimate_flag
@ignore_hashes_flag
@json_flag
def quantize(bundle: Path, kind: str, force: bool, ignore_estimate: bool, ignore_hashes: bool, as_json: bool) -> None:
    """Quantise the weights of BUNDLE for the CPU: a graph and a weight file beside the others, which stay as they are."""
    data = quantize_with_progress(
        bundle, kind, force=force, ignore_estimate=ignore_estimate, ignore_hashes=ignore_hashes
    )
    print_data(data, as_json, data["bundle"])


def quantize_with_progress(
    bundle: Path, kind: str, *, force: bool, ignore_estimate: bool, ignore_hashes: bool
) -> dict[str, Any]:
    from llama_export.bundle.bundle import load_bundle
    from llama_export.export.quantize import quantize_bundle

    opened = load_bundle(bundle, ignore_hashes=ignore_hashes, replacing=kind if force else None)
    with progress_bar("bytes") as progress:
        result = quantize_bundle(opened, kind, force=force, ignore_estimate=ignore_estimate, log=log, progress=progress)
    return dataclasses.asdict(result)
