"""``llama-export validate``: the parity report of a bundle."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from llama_export.cli.console import log, new_console, print_data, progress_bar
from llama_export.cli.options import PATH, ignore_hashes_flag, json_flag
from llama_export.cli.outcomes import ParityFailed, Terminated
from llama_export.errors import LlamaExportError


@click.command(short_help="Compare a bundle with its checkpoint.")
@click.argument("bundle", type=PATH)
@click.option(
    "--stages",
    default="",
    metavar="NAME,...",
    help="Run only these stages; `onnxruntime` selects onnxruntime/*.  [default: all]",
)
@click.option("--require", default="", metavar="NAME,...", help="Fail if one of these did not run.")
@click.option("--steps", type=click.IntRange(1), default=32, metavar="TOKENS", help="Teacher-forced decode steps.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the random tokens.")
@click.option(
    "--text", type=PATH, metavar="FILE", help="UTF-8 text for text/*: perplexity and KL divergence of its beginning."
)
@click.option("--report", type=PATH, metavar="DIR", help="Where the report goes.  [default: BUNDLE/report]")
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="DIR",
    help="What BUNDLE was exported from, where its weights are embedded and it holds no checkpoint itself.",
)
@click.option("--resume", is_flag=True, help="Go on with a validation that was interrupted.")
@ignore_hashes_flag
@json_flag
def validate(
    bundle: Path, stages: str, require: str, steps: int, seed: int, text: Path | None, report: Path | None,
    checkpoint: Path | None, resume: bool, ignore_hashes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Prove, stage by stage, that BUNDLE computes what the checkpoint computes."""

    from llama_export.bundle.bundle import load_bundle

    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)  # before the imports, which take seconds
    from llama_export.parity.judge import ValidateConfig
    from llama_export.parity.report import journal
    from llama_export.parity.report.pages import check_plots, print_summary, report_folder, write_report
    from llama_export.parity.validate import validate_bundle

    folder = report_folder(bundle) if report is None else report
    config = ValidateConfig(
        stages=_names(stages), require=_names(require), steps=steps, seed=seed, text=text, cases=folder / "operations",
        checkpoint=checkpoint, journal=folder / journal.FOLDER, resume=resume,
    )  # fmt: skip
    check_plots()  # minutes of work must not end without the report
    try:
        with progress_bar("stages") as progress:
            found = validate_bundle(opened, config, log=log, progress=progress)
    except (KeyboardInterrupt, Terminated):
        with contextlib.suppress(LlamaExportError):  # no stage had begun
            journal.publish(folder / journal.FOLDER)
            log(f"validate: what was found so far is in {folder / journal.FOLDER}; --resume goes on")
        raise
    files = write_report(found, folder)
    journal.remove(folder / journal.FOLDER)
    if as_json:
        print_data(found.to_json(), True, "")
    else:
        print_summary(found, new_console())
        click.echo(f"report: {files['html']}")
    if found.verdict != "pass":
        raise ParityFailed


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
