"""``llama-export inspect``: what a file or folder holds."""

from __future__ import annotations

from pathlib import Path

import click

from llama_export.cli.console import show
from llama_export.cli.options import PATH, json_flag


@click.command(short_help="Show what a file or folder holds.")
@click.argument("path", type=PATH)
@json_flag
def inspect(path: Path, as_json: bool) -> None:
    """Show what a bundle, an engine, a folder of engines, a weight file or a report is made of."""
    if path.suffix == ".engine" or (path.is_dir() and any(path.glob("*.engine"))):
        from llama_export.engine.inspection import describe_engine, print_engine

        show(describe_engine(path), print_engine, as_json)
    elif path.suffix == ".safetensors":
        from llama_export.cli.views import describe_weights, print_weights

        show(describe_weights(path), print_weights, as_json)
    elif path.name == "parity.json" or (path / "parity.json").is_file():
        from llama_export.parity.report.pages import print_summary
        from llama_export.parity.report.reading import report_from_json

        found = report_from_json(path)
        show(found.to_json(), lambda _, console: print_summary(found, console), as_json)
    else:
        from llama_export.cli.views import describe_bundle, print_bundle

        show(describe_bundle(path.parent if path.suffix == ".onnx" else path), print_bundle, as_json)
