"""``llama-export reproduce``: runs one saved operation again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from llama_export.cli.console import flat_lines, print_data
from llama_export.cli.options import PATH, json_flag
from llama_export.cli.outcomes import ParityFailed


@click.command(short_help="Run a saved faulty operation again.")
@click.argument("case", type=PATH)
@json_flag
def reproduce(case: Path, as_json: bool) -> None:
    """Run one operation again that `validate` found at fault, from the inputs it saved in CASE.

    Exit code 1 while it is still wrong.
    """
    from llama_export.parity.locate.case import reproduce_case
    from llama_export.parity.report.result import json_numbers

    saved, found, wrong = reproduce_case(case)
    data = {
        "op": saved.op, "node": saved.node, "layer": saved.layer, "tensor": saved.tensor, "stage": saved.stage, "call": saved.call,
        "runtime": saved.runtime, "dtype": saved.dtype, "custom_ops": saved.custom_ops, "wrong": wrong,
        "relative_l2": found.relative_l2, "limit_relative_l2": saved.limit_relative_l2,
        "relative_max": found.relative, "limit_relative_max": saved.limit_relative_max, "nonfinite": found.nonfinite,
        "worst": dataclasses.asdict(found.worst),
    }  # fmt: skip
    data = json_numbers(data)
    print_data(data, as_json, "\n".join(flat_lines(data)))
    if wrong:
        raise ParityFailed
