"""``llama-export bench``: times prefill and decode."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from llama_export.cli.console import new_console, print_data, progress_bar
from llama_export.cli.options import PATH, ignore_hashes_flag, json_flag, session_options


@click.command(short_help="Time prefill and decode.")
@click.argument("bundle", type=PATH)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, metavar="TOKENS", help="Length of the prefill.")
@click.option(
    "--new-tokens", type=click.IntRange(2), default=64, metavar="TOKENS", help="Decode steps per run, plus one."
)
@click.option("--runs", type=click.IntRange(1), default=5, help="Counted runs, after one warm-up.")
@session_options
@ignore_hashes_flag
@json_flag
def bench(
    bundle: Path, prompt_tokens: int, new_tokens: int, runs: int, session: dict[str, Any], ignore_hashes: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Time prefill and decode of BUNDLE; on a CPU beside the bandwidth of the memory."""

    from llama_export.bundle.bundle import load_bundle
    from llama_export.runtime.bench import bench_bundle, print_bench
    from llama_export.runtime.opening import open_session, request_capacity

    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    needed = request_capacity(prompt_tokens, new_tokens, opened.config.max_length)
    with progress_bar("runs") as progress:
        result = bench_bundle(
            opened,
            lambda: open_session(opened, request_tokens=needed, **session),
            prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs, threads=session["threads"],
            quantize=session["quantize"], progress=progress,
        )  # fmt: skip
    if as_json:
        print_data({**dataclasses.asdict(result), "bandwidth_share": result.bandwidth_share}, True, "")
    else:
        print_bench(result, new_console())
