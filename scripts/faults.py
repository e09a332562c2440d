"""Proves the validator: every kind of fault in random models, and no alarm in healthy ones. Run by `make faults`.

    python scripts/faults.py [--models 12] [--healthy 100] [--seed 0] [--write]

Random causal LMs of awkward shape (any grouping, all RoPE types, biases or none, tied or not, float32, bfloat16, float16).
Each of the first gets every fault of `tests/fault_catalogue.py` that it can have, one at a time, at a random layer, and
is judged by the stages that judge such a fault. The healthy ones go through the stages of `validate` that need no GPU, as
a user would run them; of the slow kernel stages `enqueue`, which launches the same kernels as `interpreter`, at the model's own
dtype. --write puts the tables into docs/faults.md and every single result into reports/faults.json.

Exit code: 0 every fault found, the layer named in 95 %, the op in 90 %, no false alarm; else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from random_llama import random_config, write_random_checkpoint  # noqa: E402

DOCUMENT, RESULTS = ROOT / "docs" / "faults.md", ROOT / "reports" / "faults.json"
DTYPES = ("float32", "bfloat16", "float16")
HEALTHY_SEED = 100_000
"""Where the seeds of the healthy models begin: none of them is a model that got faults."""
LAYER_SHARE, OP_SHARE = 0.95, 0.90


def one_thread() -> None:
    """Models are so small that a second thread only gets in the way of the other process."""
    import torch

    torch.set_num_threads(1)


def random_bundle(folder: Path, seed: int) -> dict[str, Any]:
    """Writes and exports the model of a seed; says what it is."""
    from llama_export.export.export import export_checkpoint

    config, dtype = random_config(np.random.default_rng(seed)), DTYPES[seed % len(DTYPES)]
    write_random_checkpoint(folder, config, dtype=dtype, seed=seed, lively=True)
    export_checkpoint(folder)
    rope: Any = config["rope_parameters"]
    return {
        "seed": seed,
        "dtype": dtype,
        "rope_type": rope["rope_type"],
        "num_hidden_layers": config["num_hidden_layers"],
    }


def with_faults(seed: int) -> list[dict[str, Any]]:
    """Every fault in one model."""
    from fault_runs import run_faults

    from llama_export.bundle.bundle import load_bundle

    with tempfile.TemporaryDirectory() as folder:
        model = random_bundle(Path(folder), seed)
        runs = run_faults(load_bundle(Path(folder)), seed)
        return [
            {**model, **asdict(run), "detected": run.detected, "layer_right": run.layer_right, "op_right": run.op_right}
            for run in runs
        ]


def healthy(seed: int) -> dict[str, Any]:
    """All stages over one healthy model: what failed, and how near the others came."""
    from llama_export.bundle.bundle import load_bundle
    from llama_export.parity.judge import ValidateConfig
    from llama_export.parity.validate import validate_bundle

    with tempfile.TemporaryDirectory() as folder:
        model = random_bundle(Path(folder), seed)
        own = model["dtype"]
        kernels = (f"kernels/enqueue-{own}",)
        config = ValidateConfig(stages=("reference", "graph", "onnxruntime", "evaluator", "ops", *kernels), seed=seed)
        report = validate_bundle(load_bundle(Path(folder)), config)
    shares = {
        stage.name: float(stage.metrics["error"]) / stage.tolerance.value if stage.tolerance.value else float(stage.metrics["error"])
        for stage in report.stages
        if stage.tolerance is not None
    }  # fmt: skip
    return {
        **model,
        "failed": {stage.name: stage.reason for stage in report.stages if stage.verdict == "fail"},
        "not_run": {stage.name: stage.reason for stage in report.stages if stage.verdict == "not-run"},
        "shares": shares,
    }


def in_processes(task: Callable[[int], Any], seeds: Iterable[int], what: str) -> list[Any]:
    """One process per core."""
    seeds, found, start = list(seeds), [], time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=one_thread) as pool:
        for number, result in enumerate(pool.map(task, seeds), start=1):
            found.append(result)
            print(f"{what}: {number} of {len(seeds)} models, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return found


# ---- tables ------------------------------------------------------------------------------------------------------


def percent(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "0 of 0"


def fault_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per kind of fault."""
    lines = ["| fault | injected | detected | layer right | op right |", "|---|--:|--:|--:|--:|"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        ran = [row for row in rows if row["fault"] == fault and row["not_applicable"] is None]
        if ran:
            counts = [sum(row[key] for row in ran) for key in ("detected", "layer_right", "op_right")]
            lines.append(f"| {fault} | {len(ran)} | " + " | ".join(map(str, counts)) + " |")
    return lines


def totals(rows: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the exit code and the first table need."""
    faults = [row for row in rows if row["kind"] != "equivalent" and row["not_applicable"] is None]
    harmless = [row for row in rows if row["kind"] == "equivalent" and row["not_applicable"] is None]
    stages = [name for model in models for name in (*model["shares"], *model["failed"])]
    return {
        "kinds": len({row["fault"] for row in faults}),
        "injected": len(faults),
        **{key: sum(row[key] for row in faults) for key in ("detected", "layer_right", "op_right")},
        "harmless": len(harmless),
        "harmless_reported": sum(row["detected"] for row in harmless),
        "healthy": len(models),
        "false_alarms": sum(bool(model["failed"]) for model in models),
        "healthy_stages": len(stages),
    }


def nearest_table(models: Sequence[dict[str, Any]]) -> list[str]:
    """How much of its limit each stage used up at most, over the healthy models."""
    lines = ["| stage | models | largest share of the limit | median |", "|---|--:|--:|--:|"]
    for name in dict.fromkeys(name for model in models for name in model["shares"]):
        shares = [model["shares"][name] for model in models if name in model["shares"]]
        lines.append(f"| `{name}` | {len(shares)} | {max(shares):.2g} | {np.median(shares):.2g} |")
    return lines


def document(rows: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]], seed: int) -> str:
    """The generated part of docs/faults.md."""
    count = totals(rows, models)
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("meaning", "rounding", "equivalent")}
    by = sorted({row["seed"] for row in rows})
    impossible = sorted(
        {row["fault"] for row in rows} - {row["fault"] for row in rows if row["not_applicable"] is None}
    )
    dtypes = ", ".join(f"{sum(model['dtype'] == dtype for model in models)} {dtype}" for dtype in DTYPES)
    return "\n".join(
        [
            f"Made by `make faults` with seed {seed}: {len(by)} models with faults, {count['healthy']} healthy ones ({dtypes}).",
            "",
            "| | |",
            "|---|---|",
            f"| kinds of fault | {count['kinds']} |",
            f"| detected | {percent(count['detected'], count['injected'])} |",
            f"| layer named right | {percent(count['layer_right'], count['injected'])} |",
            f"| op named right | {percent(count['op_right'], count['injected'])} |",
            f"| changes that change nothing, reported | {count['harmless_reported']} of {count['harmless']} |",
            f"| false alarms | {count['false_alarms']} of {count['healthy']} healthy models, {count['healthy_stages']} stages run |",
            "",
            "### Faults of meaning: the graph in float64",
            "",
            *fault_table(kinds["meaning"]),
            "",
            "### Faults of rounding: each op alone at every dtype",
            "",
            "A function body, or a kernel, serves all layers: the right layer to name is none.",
            "",
            *fault_table(kinds["rounding"]),
            "",
            "### Changes that change nothing",
            "",
            "Listed, and not counted as faults: none of them may be reported.",
            "",
            *fault_table(kinds["equivalent"]),
            "",
            *([f"No model of this run could have: {'; '.join(impossible)}.", ""] if impossible else []),
            "### Healthy models: how near each stage came to its limit",
            "",
            *nearest_table(models),
        ]
    )


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=12, help="models that get every fault")
    parser.add_argument("--healthy", type=int, default=100, help="models without a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write docs/faults.md and reports/faults.json")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.models)
    rows = [row for model in in_processes(with_faults, seeds, "faults") for row in model]
    begin = args.seed + HEALTHY_SEED
    models = in_processes(healthy, range(begin, begin + args.healthy), "healthy")
    text = document(rows, models, args.seed)
    print(text)
    for model in models:
        for name, reason in model["failed"].items():
            print(f"FALSE ALARM: seed {model['seed']}, {name}: {reason}", file=sys.stderr)
    if args.write:
        from llama_export._system.environment import environment

        RESULTS.parent.mkdir(exist_ok=True)
        data = {
            "environment": environment(),
            "seed": args.seed,
            "totals": totals(rows, models),
            "faults": rows,
            "healthy": models,
        }
        RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        head = DOCUMENT.read_text(encoding="utf-8").partition("<!-- matrix:begin -->")[0]
        DOCUMENT.write_text(f"{head}<!-- matrix:begin -->\n{text}\n<!-- matrix:end -->\n", encoding="utf-8")
    count = totals(rows, models)
    enough = (
        count["layer_right"] >= LAYER_SHARE * count["injected"] and count["op_right"] >= OP_SHARE * count["injected"]
    )
    wrong = count["detected"] < count["injected"] or count["harmless_reported"] or count["false_alarms"]
    return 0 if enough and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
