"""What exports and builds cost, and what ``llama_export.bundle.estimate`` says before: the proof of its formulas.

    python benchmarks/estimates.py                  # measures everything (some 9 minutes, 6 GB of disk), and the table
    python benchmarks/estimates.py --only "build 1b"  # some of it; writes no file
    python benchmarks/estimates.py --table          # the newest measurement beside today's formulas; measures nothing

Each run is a whole process, imports included: its CPU time and peak resident memory as the kernel reports them to its parent
(``wait4``), and the highest of its memory that is no page of a file, looked at fifty times a second.

* Exports, and builds with weights as inputs, run over *hollow* checkpoints: true headers over a hole in a file.
* Builds with constant weights hold random ones: TensorRT stores equal weights once, and zeros are equal.
* Memory repeats within a percent. CPU time depends on what else the machine does: one run says little.

Everything lies in temporary folders under ``build``. Results: ``benchmarks/results/estimates``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode_speed import MODEL
from processes import log, machine
from published_configs import PUBLISHED
from random_llama import write_hollow_checkpoint, write_random_checkpoint

from llama_export._system.environment import environment
from llama_export.bundle.bundle import load_bundle
from llama_export.bundle.destination import plan_destination
from llama_export.bundle.estimate import BuildWork, Estimate, ExportWork, build_work, export_work
from llama_export.checkpoint.checkpoint import load_checkpoint, resolve_dtype
from llama_export.config.decoder import count_parameters
from llama_export.config.settings import EngineConfig, ExportConfig
from llama_export.export.conversion import plan_conversion

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "estimates"
MODELS: dict[str, Mapping[str, object]] = {
    "50m": {
        **MODEL, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408,
    },
    "125m": MODEL,
    "125m-tied": {**MODEL, "tie_word_embeddings": True},
    "400m": {
        **MODEL, "hidden_size": 1280, "num_hidden_layers": 20, "num_attention_heads": 20, "intermediate_size": 3456,
    },
    "1b": PUBLISHED["meta-llama/Llama-3.2-1B"][0],
    "8b": PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"][0],
    "70b": PUBLISHED["meta-llama/Llama-3.1-70B"][0],
    "405b": PUBLISHED["meta-llama/Llama-3.1-405B"][0],
}  # fmt: skip
SETTINGS: dict[str, Any] = {"dtype": "auto", "weights": "auto", "convert_weights": False, "hash_weights": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One checkpoint, its export, and builds from it."""

    model: str
    stored: str
    hollow: bool = False
    export: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the export that are not the default's; in place if there is none but a dtype."""
    builds: tuple[Mapping[str, Any], ...] = ()
    """Settings of each build."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.stored}{' hollow' if self.hollow else ''}"

    @property
    def in_place(self) -> bool:
        return not set(self.export) - {"dtype"}


PLUGIN, NATIVE = {}, {"ops": "native"}
ONE: Mapping[str, Any] = {"profiles": 1}
MIXED = {"ops": "LlamaAddRMSNorm=native,LlamaRMSNorm=native"}


def as_inputs(*variants: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The same builds with weights as inputs."""
    return tuple({"weights": "input", **variant} for variant in variants)


FOUR = (PLUGIN, ONE, NATIVE, {**NATIVE, **ONE})
CASES = (
    Case(model="125m", stored="float32", hollow=True),
    Case(model="1b", stored="bfloat16", hollow=True, builds=as_inputs(*FOUR, MIXED)),
    Case(model="8b", stored="bfloat16", hollow=True, builds=as_inputs(*FOUR, MIXED)),
    Case(model="70b", stored="bfloat16", hollow=True, builds=as_inputs(PLUGIN, ONE, NATIVE)),
    Case(model="405b", stored="bfloat16", hollow=True),
    Case(model="50m", stored="float32", builds=FOUR),
    Case(model="50m", stored="bfloat16", builds=(PLUGIN, ONE)),
    Case(model="50m", stored="float16", builds=(PLUGIN,)),
    Case(model="125m", stored="float32", builds=(PLUGIN, ONE)),
    Case(model="125m", stored="bfloat16", builds=FOUR),
    Case(model="125m", stored="float16", builds=(PLUGIN, NATIVE)),
    Case(model="400m", stored="bfloat16", builds=(PLUGIN, ONE, NATIVE)),
    Case(model="1b", stored="bfloat16", builds=(PLUGIN, ONE)),
    Case(model="125m", stored="float32", export={"weights": "copy"}),
    Case(model="125m", stored="float32", export={"weights": "link", "hash_weights": True}),
    Case(model="125m", stored="float32", export={"weights": "embed"}, builds=(PLUGIN,)),
    Case(model="125m", stored="float32", export={"convert_weights": True, "dtype": "bfloat16"}),
    Case(model="125m", stored="bfloat16", export={"convert_weights": True, "dtype": "float32"}),
    Case(model="125m", stored="bfloat16", export={"dtype": "float32"}, builds=(PLUGIN,)),
    Case(model="125m", stored="float32", export={"dtype": "bfloat16"}, builds=(PLUGIN,)),
    Case(model="125m-tied", stored="bfloat16", export={"dtype": "float32"}, builds=(PLUGIN,)),
)

_LAUNCHER = """
import json, os, subprocess, sys, threading, time
process = subprocess.Popen(sys.argv[1:])
held = 0
def watch():
    global held
    while True:
        try:
            with open(f"/proc/{process.pid}/status") as status:
                lines = dict(line.split(":", 1) for line in status)
            held = max(held, sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024)
        except (OSError, KeyError, ValueError):
            return
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
_, status, usage = os.wait4(process.pid, 0)
cost = [usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024, held, os.waitstatus_to_exitcode(status)]
print("\\n" + json.dumps(cost))
"""


def measure(arguments: list[str]) -> dict[str, Any]:
    """One ``llama-export --json`` in a process of its own: what it said, and what it cost."""
    # A small launcher: Linux counts the memory of the process that forks in the peak of its child.
    command = [sys.executable, "-S", "-c", _LAUNCHER, sys.executable, "-m", "llama_export", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said, _, last = done.stdout.rstrip("\n").rpartition("\n")
    user, system, peak, held, code = json.loads(last) if done.returncode == 0 else (0, 0, 0, 0, 1)
    if code:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return {
        "result": json.loads(said), "ram_bytes": peak, "held_bytes": held,
        "user_seconds": round(user, 2), "system_seconds": round(system, 2),
    }  # fmt: skip


def flags(settings: Mapping[str, Any]) -> list[str]:
    """``{"convert_weights": True, "dtype": "float32"}`` -> ``--convert-weights --dtype float32``."""
    found = []
    for key, value in settings.items():
        found += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def work_of_export(case: Case, checkpoint: Path, output: Path | None) -> ExportWork:
    """What the export's own estimate starts from."""
    config = ExportConfig(**{**SETTINGS, **case.export})
    opened = load_checkpoint(checkpoint)
    size = plan_conversion(opened, resolve_dtype(config.dtype, opened)).nbytes if config.convert_weights else None
    planned = plan_destination(
        opened, output, force=False, weights=config.weights, converts=config.convert_weights
    )  # fmt: skip
    return export_work(opened, planned, config, size)


def rows_of(case: Case, only: str) -> Iterator[dict[str, Any]]:
    """Measures one case."""
    settings = " ".join(["", *flags(case.export)])
    names = [f"export {case.name}{settings}"]
    names += [" ".join([f"build {case.name}{settings}", *flags(build)]) for build in case.builds]
    if not any(only in name for name in names):
        return
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        write = write_hollow_checkpoint if case.hollow else write_random_checkpoint
        parsed = write(checkpoint, dict(MODELS[case.model]), dtype=case.stored)
        output = None if case.in_place else Path(scratch) / "bundle"
        found: ExportWork | BuildWork = work_of_export(case, checkpoint, output)
        target = ["-o", str(output)] if output else []
        ran = measure(["export", str(checkpoint), *target, *flags(case.export)])
        common = {"num_parameters": count_parameters(parsed)}
        yield row(names[0], found, ran, ran["result"]["weight_bytes_written"], **common)
        bundle = output or checkpoint
        for name, build in zip(names[1:], case.builds, strict=True):
            if only in name:
                found = build_work(load_bundle(bundle), EngineConfig(**build))
                ran = measure(["build", str(bundle), "--force", *flags(build)])
                yield row(name, found, ran, ran["result"]["bytes"], **common)


def row(name: str, work: ExportWork | BuildWork, ran: Mapping[str, Any], disk: int, **facts: Any) -> dict[str, Any]:
    """One measurement, and what its estimate starts from."""
    keys = ("ram_bytes", "held_bytes", "user_seconds", "system_seconds")
    measured = {"disk_bytes": disk, **{key: ran[key] for key in keys}}
    return {"name": name, **facts, "work": dataclasses.asdict(work), "measured": measured}


def estimate_of(found: Mapping[str, Any]) -> Estimate:
    """By today's formulas."""
    kind = ExportWork if found["name"].startswith("export ") else BuildWork
    return kind(**found["work"]).estimate()


def line(found: Mapping[str, Any]) -> str:
    """Estimate and measured of one row."""
    estimate, measured = estimate_of(found), found["measured"]
    seconds = measured["user_seconds"] + measured["system_seconds"]
    cells = [
        f"{getattr(estimate, key) / 1e9:.3f} | {measured[key] / 1e9:.3f}"
        for key in ("ram_bytes", "held_bytes", "disk_bytes")
    ]
    worst = max(abs(getattr(estimate, key) / measured[key] - 1) for key in ("ram_bytes", "held_bytes"))
    return f"| {found['name']} | {' | '.join(cells)} | {estimate.seconds:.1f} | {seconds:.1f} | {worst:.1%} |"


def newest() -> Path:
    """The newest result."""
    return max(RESULTS.glob("*.json"))


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains it; writes no file")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    host = machine()
    print(
        "| | memory GB: estimate | measured | of it no pages of files: estimate | measured | disk GB: estimate | measured "
        "| CPU s: estimate | measured | memory off by |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    if args.table:
        rows = json.loads(newest().read_text(encoding="utf-8"))["rows"]
        print("\n".join(line(found) for found in rows if args.only in found["name"]))
        return
    rows = []
    for case in CASES:
        for found in rows_of(case, args.only):
            log(found["name"])
            rows.append(found)
            print(line(found), flush=True)
    if not args.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.UTC)
        report = {
            "created_at": now.isoformat(timespec="seconds"), "environment": environment(), "machine": host, "rows": rows,
        }  # fmt: skip
        path = RESULTS / f"{now.date().isoformat()}-cpu-2-cores.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
