"""``llama-export report``: compares reports."""

from __future__ import annotations

from pathlib import Path

import click

from llama_export.cli.console import new_console, print_data
from llama_export.cli.options import CONTEXT, PATH, json_flag
from llama_export.cli.outcomes import Drifted


@click.group(context_settings=CONTEXT)
def report() -> None:
    """Work with the reports that `validate` writes."""


@report.command()
@click.argument("old", type=PATH)
@click.argument("new", type=PATH)
@click.option(
    "--factor", type=click.FloatRange(1), default=2.0, metavar="TIMES",
    help="Drift is an error that uses more than so many times its former share of the limit.",
)  # fmt: skip
@click.option("--markdown", type=PATH, metavar="FILE", help="Write the result as a comment for a pull request, too.")
@json_flag
def diff(old: Path, new: Path, factor: float, markdown: Path | None, as_json: bool) -> None:
    """Compare two reports of one model, parity.json or its folder: exit code 5 if NEW says less, or worse, than OLD."""

    from llama_export.bundle.destination import write_atomically
    from llama_export.parity.report.diff import diff_reports
    from llama_export.parity.report.pages import markdown_from_diff, print_diff
    from llama_export.parity.report.reading import report_from_json

    found = diff_reports(report_from_json(old), report_from_json(new), factor=factor)
    if markdown is not None:
        write_atomically(markdown, markdown_from_diff(found).encode())
    if as_json:
        print_data(found.to_json(), True, "")
    else:
        print_diff(found, new_console())
    if found.drifted:
        raise Drifted
