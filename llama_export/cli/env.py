"""``llama-export env``: versions, for bug reports."""

from __future__ import annotations

import click

from llama_export.cli.console import print_data
from llama_export.cli.options import json_flag


@click.command(short_help="Print versions, for bug reports.")
@json_flag
def env(as_json: bool) -> None:
    """Print versions of everything that decides the numbers, for bug reports."""
    from llama_export._system.environment import environment

    data = environment()
    print_data(data, as_json, "\n".join(f"{key}: {value}" for key, value in data.items()))
