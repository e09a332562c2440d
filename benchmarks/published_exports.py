"""Exports every published configuration at full depth, and says what each took.

    python benchmarks/published_exports.py
    python benchmarks/published_exports.py --only Llama-3.2-1B

The weights are holes in a file: the export refers to them and never reads them, so 405 billion parameters need no disk.
Each export is a process of its own, whole: imports, trace, conversion, check, manifest. The result is checked (every
byte of the weights is referred to, onnx's checker passed) and written to ``benchmarks/results/published-exports``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from published_configs import PUBLISHED
from random_llama import write_hollow_checkpoint

from llama_export._system.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "published-exports"


def measure(name: str) -> dict[str, object]:
    """One export in a process of its own; the JSON of ``llama-export export --json`` and the graph's size."""
    data, number = PUBLISHED[name]
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_hollow_checkpoint(checkpoint, data, dtype=data["torch_dtype"])
        command = [sys.executable, "-m", "llama_export", "export", str(checkpoint), "--json"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if (found["num_parameters"], found["weight_bytes_referenced"]) != (number, 2 * number):
            raise SystemExit(f"{name}: {found}")
        graph = (checkpoint / "model.onnx").stat().st_size
    keys = ("dtype", "num_parameters", "weight_bytes_referenced", "seconds", "peak_rss_bytes")
    return {"layers": data["num_hidden_layers"], **{key: found[key] for key in keys}, "graph_bytes": graph}


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="configurations whose name contains it; writes no file"
    )
    args = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    found = {}
    for name in PUBLISHED:
        if args.only in name:
            found[name] = row = measure(name)
            print(f"| {name} | {row['layers']} | {int(str(row['num_parameters'])) / 1e9:.2f} | {row['seconds']:.1f} | "
                  f"{int(str(row['peak_rss_bytes'])) / 1e9:.2f} | {int(str(row['graph_bytes'])) / 1e6:.2f} |", flush=True)  # fmt: skip
    if not args.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        report = {"environment": environment(), "exports": found}
        (RESULTS / f"{day}-cpu-2-cores.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
