"""What `llama-export validate` costs at scale: wall time and peak memory of the whole process, and of every stage its seconds.

    python benchmarks/validate_scale.py
    python benchmarks/validate_scale.py --only 125m

Random checkpoints, written into a temporary folder under ``build`` and exported there; neither is counted. Each
validation is a process of its own with the default stages, imports included. The figures are held against targets and
written to ``benchmarks/results/validate-scale``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from decode_speed import MODEL
from processes import machine, measure_process
from published_configs import PUBLISHED
from random_llama import write_random_checkpoint

from llama_export._system.environment import environment
from llama_export.config.decoder import count_parameters
from llama_export.config.huggingface import config_from_dict
from llama_export.export.export import export_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "validate-scale"
MODELS: dict[str, tuple[dict[str, object], str]] = {
    "125m-float32": (MODEL, "float32"),
    "1.2b-bfloat16": (PUBLISHED["meta-llama/Llama-3.2-1B"][0], "bfloat16"),
}
"""Name -> config and dtype."""
TARGETS = {
    "125m-float32": {"seconds": 90.0, "peak_rss_gb": 3.0},
    "1.2b-bfloat16": {"seconds": 600.0, "peak_rss_gb": 12.0},
}
"""What one validation may cost on 2 cores."""


def measure(name: str) -> dict[str, Any]:
    """One validation; its verdict, figures and stages."""
    config, dtype = MODELS[name]
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        bundle, report = Path(scratch) / "model", Path(scratch) / "report"
        parsed = write_random_checkpoint(bundle, config, dtype=dtype)
        export_checkpoint(bundle)
        load = round(os.getloadavg()[0], 2)
        command = [sys.executable, "-m", "llama_export", "validate", str(bundle), "--report", str(report)]
        found = measure_process(command)
        document = json.loads((report / "parity.json").read_text(encoding="utf-8"))
    met = all(found[key] <= limit for key, limit in TARGETS[name].items())
    return {
        "dtype": dtype, "num_parameters": count_parameters(parsed), "verdict": document["verdict"], "load_average_1min": load,
        **found, "target": {**TARGETS[name], "met": met},
        "stages": {stage["name"]: stage["seconds"] for stage in document["stages"] if stage["verdict"] != "not-run"},
    }  # fmt: skip


def check_disk(names: list[str]) -> None:
    """Stops before the first gigabyte is written."""
    needed = max(_weight_bytes(name) for name in names) * 1.2
    free = shutil.disk_usage(ROOT / "build").free
    if free < needed:
        raise SystemExit(f"{ROOT / 'build'}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")


def _weight_bytes(name: str) -> int:
    config, dtype = MODELS[name]
    return count_parameters(config_from_dict({"model_type": "llama", **config})) * (4 if dtype == "float32" else 2)


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains it; writes no file")
    args = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    names = [name for name in MODELS if args.only in name]
    if not names:
        parser.error(f"--only {args.only}: the models are {', '.join(MODELS)}")
    check_disk(names)
    host, found = machine(), {}
    print(
        "| model | verdict | s | target s | peak GB | target GB | load average at start |\n|---|---|---|---|---|---|---|"
    )
    for name in names:
        found[name] = row = measure(name)
        target = row["target"]
        print(f"| {name} | {row['verdict']} | {row['seconds']:.0f} | {target['seconds']:.0f} | {row['peak_rss_gb']:.2f} | "
              f"{target['peak_rss_gb']:.0f} | {row['load_average_1min']} |", flush=True)  # fmt: skip
    for name, row in found.items():
        print(f"\n| {name}: stage | s |\n|---|---|")
        for stage, seconds in sorted(row["stages"].items(), key=lambda item: -item[1]):
            print(f"| {stage} | {seconds:.1f} |")
    if not args.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        report = {"environment": environment(), "machine": host, "validations": found}
        (RESULTS / f"{day}-cpu-2-cores.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
