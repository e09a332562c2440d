"""``llama-export verify``: compares every byte of a bundle with its hashes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from llama_export.cli.console import log, print_data, progress_bar
from llama_export.cli.options import PATH, json_flag


@click.command(short_help="Compare every byte with the recorded hashes.")
@click.argument("bundle", type=PATH)
@click.option("--record", is_flag=True, help="Add the hashes that BUNDLE/manifest.json lacks, unless a file changed.")
@json_flag
def verify(bundle: Path, record: bool, as_json: bool) -> None:
    """Read every byte of BUNDLE and compare it with the recorded hashes. Exit code 2 if a file changed."""
    from llama_export.bundle.verify import verify_bundle

    with progress_bar("bytes") as progress:
        result = verify_bundle(bundle, record=record, log=log, progress=progress)
    lines = [
        f"{file.status:<8} {file.bytes:>15,}  {file.file}  ({', '.join(file.checked)})"
        + (f": {file.problem}" if file.problem else ", recorded" if file.file in result.recorded else "")
        for file in result.files
    ]
    print_data(dataclasses.asdict(result), as_json, "\n".join(lines))
    if result.status == "unknown":
        log("verify: unknown: no hash of these files is recorded; if they are right, run again with --record")
    if result.status == "changed":
        log("verify: a file is not what was exported: restore it from its source, or export again")
        raise click.exceptions.Exit(2)
