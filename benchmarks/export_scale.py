"""What exporting and building cost at scale, beside the peers: 125 million to 405 billion parameters.

    python benchmarks/export_scale.py --genai-python build/peers/bin/python --optimum-python build/optimum/bin/python
    python benchmarks/export_scale.py --only 125m --runs 3     # writes no file
    python benchmarks/export_scale.py --engines                # TensorRT-RTX engines as well

Each run is a whole process, imports included: wall time, CPU time and peak resident memory as the kernel reports them to
the parent (``wait4``), what is on disk afterwards that was not there before, and what the kernel counted as written.

* The exporters take turns, A B C, A B C, ..., so that a slow minute of the machine hits all alike. A ratio is the
  median of the ratios of each round.
* 125 million (float32) and 1.2 billion parameters (bfloat16) are random checkpoints. They were written just before, so
  everybody reads them from the page cache: a peer, which reads every weight, does not wait for the disk. Every exporter
  is asked for the checkpoint's own dtype (optimum-onnx would widen to float32 by default).
* 8, 70 and 405 billion parameters are *hollow* checkpoints, true headers over a hole in a file. Only ours is measured
  there: it refers to the weights and does not read them. The peers would write them out again.
* Every figure with a target is held against it, met or missed. A peer that fails is listed with the last line it said,
  and what it had cost by then.

Everything lies in temporary folders under ``build`` (8 GB at most). Results: ``benchmarks/results/export-scale``.
The exit code is 1 if one of our own runs failed; a missed target is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode_speed import MODEL
from engines import BASELINE
from exporters import (
    GENAI_BUILDER_NEEDS,
    export_command,
    genai_builder_command,
    missing_in,
    not_installed,
    optimum_command,
    reason,
    version_in,
    write_tokenizer,
)
from processes import Process, log, machine, run_process
from published_configs import PUBLISHED
from random_llama import write_hollow_checkpoint, write_random_checkpoint

from llama_export._system.environment import environment
from llama_export.config.decoder import count_parameters
from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import LlamaConfig

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "export-scale"
GENAI, OPTIMUM = "onnxruntime-genai builder", "optimum-onnx"
SMALL_TENSOR = 1024
"""Bytes. What is smaller stays in the graph by ONNX's own custom (``size_threshold``) and is no weight here."""
FIGURES = ("seconds", "cpu_seconds", "peak_rss_gb")
UNITS = {
    "seconds": "s", "peak_rss_gb": "GB", "weight_bytes_written": "bytes", "engine_bytes": "bytes",
    "genai_seconds_ratio": "x", "genai_memory_ratio": "x",
}  # fmt: skip
"""Figures that may have a target. A ratio is the peer's figure divided by ours, and has to be at least so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint to write."""

    config: Mapping[str, object]
    dtype: str
    hollow: bool = False
    """A hole in the place of the weights."""

    @property
    def weight_bytes(self) -> int:
        return count_parameters(config_from_dict({"model_type": "llama", **self.config})) * self.item_bytes

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def write(self, folder: Path) -> LlamaConfig:
        """The checkpoint; a real one with a tokenizer, for the peers, and on disk, so that no run shares it with us."""
        config = dict(self.config)
        if self.hollow:
            return write_hollow_checkpoint(folder, config, dtype=self.dtype)
        parsed = write_random_checkpoint(folder, config, dtype=self.dtype)
        write_tokenizer(folder, parsed.vocab_size)
        os.sync()
        return parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of results: an export, or the build of an engine."""

    model: str
    targets: Mapping[str, float]
    """Figure -> what it may be on 2 cores."""
    runs: int = 3
    weights: str | None = None
    """Of an engine, ``constant`` or ``input``; None: an export."""
    profiles: int = 2
    """Of an engine: one for prefill and one for decode, or one for both."""

    @property
    def name(self) -> str:
        if self.weights is None:
            return f"export {self.model}"
        return f"engine {self.model}, weights {self.weights}" + (", 1 profile" if self.profiles == 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One exporter."""

    name: str
    absent: Sequence[str]
    """Distributions that are not installed."""
    command: Callable[[Path, Path], list[str]]
    """(checkpoint, output) -> command; ours writes into the checkpoint."""
    runs: int


def _published(name: str) -> Mapping[str, object]:
    return PUBLISHED[name][0]


MODELS = {
    "125m-float32": Model(config=MODEL, dtype="float32"),
    "1.2b-bfloat16": Model(config=_published("meta-llama/Llama-3.2-1B"), dtype="bfloat16"),
    "1.2b-bfloat16-hollow": Model(config=_published("meta-llama/Llama-3.2-1B"), dtype="bfloat16", hollow=True),
    "8b-bfloat16": Model(config=_published("meta-llama/Llama-3.1-8B-Instruct"), dtype="bfloat16", hollow=True),
    "70b-bfloat16": Model(config=_published("meta-llama/Llama-3.1-70B"), dtype="bfloat16", hollow=True),
    "405b-bfloat16": Model(config=_published("meta-llama/Llama-3.1-405B"), dtype="bfloat16", hollow=True),
}
EXPORTS = [
    Case(model="125m-float32", runs=5, targets={"seconds": 6.0, "peak_rss_gb": 0.7, "weight_bytes_written": 0}),
    Case(
        model="1.2b-bfloat16", runs=5,
        targets={"seconds": 7.0, "genai_seconds_ratio": 3.0, "genai_memory_ratio": 5.0, "weight_bytes_written": 0},
    ),
    Case(model="8b-bfloat16", targets={"seconds": 12.0, "peak_rss_gb": 0.8, "weight_bytes_written": 0}),
    Case(model="70b-bfloat16", targets={"seconds": 25.0, "peak_rss_gb": 1.0, "weight_bytes_written": 0}),
    Case(model="405b-bfloat16", targets={"seconds": 40.0, "peak_rss_gb": 1.2, "weight_bytes_written": 0}),
]  # fmt: skip
ENGINES = [
    Case(
        model="1.2b-bfloat16", weights="constant",
        targets={"seconds": 15.0, "peak_rss_gb": round(2 * MODELS["1.2b-bfloat16"].weight_bytes / 1e9, 2)},
    ),
    Case(model="1.2b-bfloat16", weights="constant", profiles=1, targets={}),
    Case(
        model="1.2b-bfloat16-hollow", weights="input",
        targets={"seconds": 10.0, "peak_rss_gb": 1.0, "engine_bytes": 20_000_000},
    ),
    Case(model="1.2b-bfloat16-hollow", weights="input", profiles=1, targets={}),
    Case(model="8b-bfloat16", weights="input", targets={"seconds": 30.0, "peak_rss_gb": 2.0}),
    Case(model="70b-bfloat16", weights="input", targets={"seconds": 90.0, "peak_rss_gb": 4.0}),
]  # fmt: skip
"""Only ours: no peer builds an engine."""


def tools(case: Case, genai_python: str, optimum_python: str, runs: int | None) -> list[Tool]:
    """The exporters of a case, ours first; over a hollow checkpoint there is only ours."""
    ours = Tool(
        name=BASELINE, absent=[], command=lambda checkpoint, _: export_command(checkpoint), runs=runs or case.runs
    )
    model = MODELS[case.model]
    if model.hollow:
        return [ours]
    precision = {"float32": "fp32", "bfloat16": "bf16"}[model.dtype]

    def genai(checkpoint: Path, output: Path) -> list[str]:
        cache = output.parent / "cache"
        return genai_builder_command(checkpoint, output, cache, python=genai_python, precision=precision)

    def optimum(checkpoint: Path, output: Path) -> list[str]:
        return optimum_command(optimum_python, checkpoint, output, dtype=precision)

    return [
        ours,
        Tool(name=GENAI, absent=missing_in(genai_python, GENAI_BUILDER_NEEDS), command=genai, runs=runs or 3),
        Tool(name=OPTIMUM, absent=missing_in(optimum_python, [OPTIMUM]), command=optimum, runs=runs or 3),
    ]


# --- Files -----------------------------------------------------------------------------------------------------------


def file_states(folder: Path) -> dict[Path, tuple[int, int, int, int]]:
    """Every file below a folder -> what changes when somebody writes it."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (found.st_ino, found.st_size, found.st_blocks, found.st_mtime_ns) for path, found in stats.items()}


def files_made(before: Mapping[Path, object], folder: Path) -> list[Path]:
    """Files that are new since, or were written."""
    return sorted(path for path, state in file_states(folder).items() if before.get(path) != state)


def bytes_made(files: Sequence[Path]) -> dict[str, int]:
    """What an exporter left on disk: bytes of its graphs, and of weights within them or in files of their own."""
    graph = weights = 0
    for path in files:
        if path.suffix == ".onnx":
            inside = weight_bytes_inside(path)
            graph += path.stat().st_size - inside
            weights += inside
        elif path.suffix != ".json":
            weights += path.stat().st_size
    return {"graph_bytes": graph, "weight_bytes_written": weights}


def weight_bytes_inside(path: Path) -> int:
    """Bytes of the tensors that an ONNX file holds itself, small constants left out."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    tensors = (tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL)
    return sum(size for tensor in tensors if (size := tensor.ByteSize()) >= SMALL_TENSOR)


# --- Measuring -------------------------------------------------------------------------------------------------------


def measure_export(case: Case, found_tools: Sequence[Tool]) -> dict[str, Any]:
    """Tool -> its runs and medians, or why there are none. Round by round; a tool that fails is not tried again."""
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        parsed = MODELS[case.model].write(checkpoint)
        load = round(os.getloadavg()[0], 2)
        results: dict[str, Any] = {tool.name: not_installed(tool.absent) for tool in found_tools if tool.absent}
        for index in range(max(tool.runs for tool in found_tools)):
            for tool in found_tools:
                result = results.setdefault(tool.name, {"runs": []})
                if index < tool.runs and "runs" in result:
                    log(f"{case.name}, run {index + 1} of {tool.runs}: {tool.name}")
                    with tempfile.TemporaryDirectory(dir=scratch) as folder:
                        run, failed = export_once(tool, checkpoint, Path(folder) / "model")
                    os.sync()  # what one exporter wrote must not slow the next one
                    if failed is None:
                        result["runs"].append(run)
                    else:
                        results[tool.name] = {"failed": failed, **run}
    for tool in found_tools:
        results[tool.name]["command"] = shown(tool.command(Path("CHECKPOINT"), Path("OUTPUT/model")))
    summarize(results)
    return {
        **about(case, parsed),
        "load_average_1min": load,
        "tools": {tool.name: results[tool.name] for tool in found_tools},
        "targets": judge(case, results[BASELINE]),
    }


def export_once(tool: Tool, checkpoint: Path, output: Path) -> tuple[dict[str, Any], str | None]:
    """(cost and bytes of one export, None), or (its cost until then, why it failed)."""
    watched = checkpoint if tool.name == BASELINE else output
    before = file_states(watched)
    process = run_process(tool.command(checkpoint, output))
    if process.exit_code:
        return dict(process.cost), complaint(process)
    made = bytes_made(files_made(before, watched))
    return {**process.cost, **made, "kernel_written_bytes": process.written_bytes}, None


def measure_engine(case: Case, runs: int | None) -> dict[str, Any]:
    """The build of an engine from an exported bundle; the export is not counted."""
    count = runs or case.runs
    result: dict[str, Any] = {"runs": []}
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        bundle = Path(scratch) / "model"
        parsed = MODELS[case.model].write(bundle)
        exported = run_process(export_command(bundle))
        if exported.exit_code:
            result = {"failed": f"its export: {complaint(exported)}"}
        load = round(os.getloadavg()[0], 2)
        for index in range(count):
            if "failed" in result:
                break
            log(f"{case.name}, run {index + 1} of {count}")
            process = run_process(build_command(bundle, case))
            if process.exit_code:
                result = {"failed": complaint(process), **process.cost}
            else:
                result["runs"].append({**process.cost, "engine_bytes": json.loads(process.stdout)["bytes"]})
            os.sync()
    result["command"] = shown(build_command(Path("BUNDLE"), case))
    results = {BASELINE: result}
    summarize(results)
    return {**about(case, parsed), "load_average_1min": load, "tools": results, "targets": judge(case, result)}


def build_command(bundle: Path, case: Case) -> list[str]:
    """``llama-export build``; constant weights are its default."""
    weights = [] if case.weights == "constant" else ["--weights", str(case.weights)]
    profiles = ["--profiles", "1"] if case.profiles == 1 else []
    return [sys.executable, "-m", "llama_export", "build", str(bundle), *weights, *profiles, "--force", "--json"]


def complaint(process: Process) -> str:
    """Exit code and last words of a process that failed."""
    said = process.complaint
    if process.stdout.strip().startswith("{"):  # ours, with --json
        said = json.loads(process.stdout).get("error", {}).get("message", said)
    return f"exit code {process.exit_code}: {said[:400]}"


def about(case: Case, parsed: LlamaConfig) -> dict[str, Any]:
    """What was measured."""
    model = MODELS[case.model]
    return {
        "dtype": model.dtype, "num_parameters": count_parameters(parsed), "layers": parsed.num_hidden_layers,
        "weight_bytes": count_parameters(parsed) * model.item_bytes, "weights": "a hole in a file" if model.hollow else "random, in the page cache",
    }  # fmt: skip


def shown(command: Sequence[str]) -> str:
    """A command as a reader would type it."""
    return " ".join(["python", *command[1:]])


def summarize(results: Mapping[str, Any]) -> None:
    """Adds the medians, and the ratios of each tool to ours: of each round first, so that a slow round cancels out."""
    own = results[BASELINE].get("runs", [])
    for name, result in results.items():
        runs = result.get("runs", [])
        for key in runs[0] if runs else ():
            result[key] = statistics.median(run[key] for run in runs)
        rounds = list(zip(runs, own, strict=False))  # we may have more runs than a peer
        if rounds and name != BASELINE:
            for key in FIGURES:
                ratio = statistics.median(run[key] / mine[key] for run, mine in rounds)
                result[f"{key}_ratio"] = round(ratio, 2)
    genai = results.get(GENAI, {})
    for figure, key in (("genai_seconds_ratio", "seconds_ratio"), ("genai_memory_ratio", "peak_rss_gb_ratio")):
        if key in genai:
            results[BASELINE][figure] = genai[key]


def judge(case: Case, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each figure with a target: both numbers, and met or not; a failure has no figures and meets nothing."""
    verdicts = []
    for figure, target in case.targets.items():
        found = result.get(figure) if "failed" not in result else None
        at_least = figure.endswith("_ratio")
        met = found is not None and (found >= target if at_least else found <= target)
        verdicts.append({"figure": figure, "target": target, "at_least": at_least, "found": found, "met": met})
    return verdicts


# --- Report ----------------------------------------------------------------------------------------------------------


def case_lines(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """One case as rows of the first table."""
    for tool, result in row["tools"].items():
        if "runs" not in result:
            cost = f"{result['seconds']:.1f} | | {result['peak_rss_gb']:.2f}" if "seconds" in result else "| |"
            yield f"| {name} | {tool} | {cost} | | | | | {reason(result)} |"
            continue
        runs = [run["seconds"] for run in result["runs"]]
        weights = f"{result['weight_bytes_written'] / 1e6:.0f}" if "weight_bytes_written" in result else ""
        size = result.get("graph_bytes", result.get("engine_bytes", 0)) / 1e6
        ratios = "1.00 | 1.00"
        if tool != BASELINE:
            has = "seconds_ratio" in result
            ratios = f"{result['seconds_ratio']:.2f} | {result['peak_rss_gb_ratio']:.2f}" if has else " | "
        yield (
            f"| {name} | {tool} | {result['seconds']:.1f} ({min(runs):.1f}-{max(runs):.1f}) | {result['cpu_seconds']:.1f} "
            f"| {result['peak_rss_gb']:.2f} | {weights} | {size:.2f} | {ratios} | {len(runs)} |"
        )


def target_lines(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """One case as rows of the second table."""
    for item in row["targets"]:
        unit, sign = UNITS[item["figure"]], ">=" if item["at_least"] else "<="
        digits = 0 if unit == "bytes" else 2
        found = "not measured" if item["found"] is None else f"{item['found']:,.{digits}f} {unit}"
        verdict = "met" if item["met"] else "MISSED"
        yield f"| {name} | {item['figure']} | {found} | {sign} {item['target']:,.{digits}f} {unit} | {verdict} |"


def check_disk(cases: Sequence[Case]) -> None:
    """Stops before the first gigabyte is written. A peer or an engine holds the weights again, the embedding twice."""
    real = [MODELS[case.model].weight_bytes for case in cases if not MODELS[case.model].hollow]
    needed = max(3 * max(real, default=0), 1e9)
    free = shutil.disk_usage(ROOT / "build").free
    if free < needed:
        raise SystemExit(f"{ROOT / 'build'}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", action="store_true", help="TensorRT-RTX engines as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it; writes no file")
    parser.add_argument("--runs", type=int, metavar="N", help="of everything; default: 5 of ours up to 1.2b, else 3")
    parser.add_argument("--genai-python", default=sys.executable, help="interpreter with onnxruntime-genai")
    parser.add_argument(
        "--optimum-python", default=sys.executable, help="interpreter with optimum-onnx (needs an older transformers)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help=argparse.SUPPRESS)  # a rehearsal; writes no file
    args = parser.parse_args()
    if min(args.runs or 1, args.layers or 1) < 1:
        parser.error("all counts must be >= 1")
    for python in (args.genai_python, args.optimum_python):
        if shutil.which(python) is None:
            parser.error(f"{python}: no such interpreter")
    if args.layers:
        for name, model in MODELS.items():
            config = {**model.config, "num_hidden_layers": args.layers}
            MODELS[name] = Model(config=config, dtype=model.dtype, hollow=model.hollow)
    known = EXPORTS + ENGINES if args.engines else EXPORTS
    cases = [case for case in known if args.only in case.name]
    if not cases:
        hint = "" if args.engines else "; --engines has more"
        parser.error(f"--only {args.only}: the cases are {', '.join(repr(case.name) for case in known)}{hint}")
    (ROOT / "build").mkdir(exist_ok=True)
    check_disk(cases)
    host, found = machine(), {}
    print(
        "| | | s: median (min-max) | CPU s | peak GB | weight MB written | graph or engine MB | time, ours = 1 | memory, ours = 1 | runs |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for case in cases:
        if case.weights is None:
            row = measure_export(case, tools(case, args.genai_python, args.optimum_python, args.runs))
        else:
            row = measure_engine(case, args.runs)
        found[case.name] = row
        print("\n".join(case_lines(case.name, row)), flush=True)
    print("\n| | figure | found | target | |\n|---|---|---|---|---|")
    for name, row in found.items():
        print("\n".join(target_lines(name, row)))
    if not args.only and not args.layers:
        report = {
            "schema_version": SCHEMA_VERSION,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "machine": host,
            "peers": peer_versions(args.genai_python, args.optimum_python),
            "cases": found,
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{report['created_at'][:10]}-cpu-{os.cpu_count()}-cores.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any("failed" in row["tools"][BASELINE] for row in found.values()))


def peer_versions(genai_python: str, optimum_python: str) -> dict[str, dict[str, str | None]]:
    """Peer -> versions of what decides its figures, in its own environment."""
    shared = ("torch", "transformers", "onnx")
    return {
        GENAI: {name: version_in(genai_python, name) for name in dict.fromkeys((*GENAI_BUILDER_NEEDS, *shared))},
        OPTIMUM: {name: version_in(optimum_python, name) for name in (OPTIMUM, "optimum", *shared)},
    }


if __name__ == "__main__":
    raise SystemExit(main())
