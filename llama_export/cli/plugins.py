"""``llama-export plugins``: lists the plugin library."""

from __future__ import annotations

from typing import Any

import click

from llama_export.cli.console import print_data
from llama_export.cli.options import json_flag
from llama_export.config.settings import BACKENDS


@click.command(short_help="List the plugin library.")
@click.option("--backend", type=click.Choice(BACKENDS), default="tensorrt-rtx", help="Which TensorRT is asked.")
@json_flag
def plugins(backend: Any, as_json: bool) -> None:
    """List the installed plugin library: creators with their fields, chips, kernels."""
    from llama_export.engine.build import installed_plugins

    data = installed_plugins(backend)
    chips = ", ".join(data["chips"])
    portable = f"; PTX from {data['portable_from']} on" if data["portable_from"] else ""
    lines = [
        f"library  {data['library']}",
        f"         version {data['version']}, ABI {data['abi']}, {data['bytes']:,} bytes, sha256 {data['sha256'][:16]}...",
        f"chips    compute capability {chips}{portable}",
        f"kernels  {data['variants']} compiled: "
        + ", ".join(f"{count} {name}" for name, count in data["kernels"].items()),
    ]
    if data["creators"] is None:
        lines.append(f"plugins  not listed: {backend} is not installed")
    for creator in data["creators"] or ():
        fields = ", ".join(f"{name} {kind}" for name, kind in creator["fields"].items())
        lines.append(
            f'plugin   {creator["name"]} version {creator["version"]}, namespace "{creator["namespace"]}": {fields}'
        )
    print_data(data, as_json, "\n".join(lines))
