"""``llama-export refit``: gives an engine the weights of another checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from llama_export.cli.console import log, print_data
from llama_export.cli.options import PATH, ignore_hashes_flag, json_flag


@click.command(short_help="Give an engine the weights of another bundle.")
@click.argument("engine", type=PATH)
@click.argument("bundle", type=PATH)
@click.option("--force", is_flag=True, help="Replace an engine of the same name.")
@ignore_hashes_flag
@json_flag
def refit(engine: Path, bundle: Path, force: bool, ignore_hashes: bool, as_json: bool) -> None:
    """Give ENGINE, built with --weights input, the weights of BUNDLE: another fine-tune of the same model.

    Writes it into BUNDLE/engines; builds nothing.
    """
    from llama_export.bundle.bundle import load_bundle
    from llama_export.engine.refit import refit_engine

    result = refit_engine(engine, load_bundle(bundle, ignore_hashes=ignore_hashes), force=force, log=log)
    print_data(dataclasses.asdict(result), as_json, result.engine)
