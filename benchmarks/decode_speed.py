"""Measures prefill and decode of llama_export beside its peers: same checkpoint, tokens and threads, one run.

    python benchmarks/decode_speed.py
    python benchmarks/decode_speed.py --model 1.2b --runs 3
    python benchmarks/decode_speed.py --only "llama_export,llama.cpp" --prompt 128 --json results.json

A random Llama checkpoint is written once into ``--work`` and made ready for every engine, at float32 and at 8 and 4 bits
a weight. Then the engines take turns (A B C, A B C, ...), so that a slow minute of the machine hits all alike. Each turn
is a fresh process that loads the model, warms up, and is timed over one prefill of the same prompt and greedy decoding of
the same number of tokens. No engine stops at an end-of-sequence token. Ratios are taken within a turn.

* That all float32 engines compute the same model is checked, not assumed: the first tokens each of them generates are
  compared with those of llama_export. Random weights give near ties, so a late divergence is rounding; it is printed.
  Each engine's 8 and 4 bits are its own; what they cost in quality is in ``docs/quantization.md``.
* A decode step reads every weight once, the embedding aside. What that comes to per second is held against the bandwidth
  with which the same number of threads reads an array much larger than the caches, measured between the turns.
* Memory is what the process holds after its run (``VmRSS``, mapped files included).
* The last table shows llama_export alone at two capacities: a longer cache that is not used must cost nothing.

The exit code is 1 if an engine failed or computes other tokens; a missed target is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from engines import BASELINE, ENGINES, Run, Workload, engine_versions, make_engine, own_engine
from exporters import not_installed, reason, write_tokenizer
from processes import in_fresh_process, log, machine
from random_llama import write_random_checkpoint

from llama_export._system.process import resident_bytes
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.config.decoder import count_parameters
from llama_export.config.llama import LlamaConfig
from llama_export.runtime.bench import cache_bytes, read_bandwidth, step_bytes

SCHEMA_VERSION = 2
MODEL: dict[str, object] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2048, "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LARGE_MODEL: dict[str, object] = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The shape of meta-llama/Llama-3.2-1B with its plain RoPE, which every peer can be given."""
MODELS = {"125m": (MODEL, "float32"), "1.2b": (LARGE_MODEL, "bfloat16")}
"""Name -> config and the dtype the checkpoint is stored in."""
TARGETS = {
    "llama.cpp": {"decode_ratio": 1 / 0.97, "prefill_ratio": 1.0},
    "llama.cpp q8_0": {"decode_ratio": 1.0, "prefill_ratio": 1.0},
    "llama.cpp q4_0": {"decode_ratio": 1 / 0.9, "prefill_ratio": 1.0},
    "onnxruntime-genai": {"decode_ratio": 1 / 1.3},
    "onnxruntime-genai int4": {"decode_ratio": 1.0},
}
"""Peer -> its figure divided by ours, at most."""
BANDWIDTH_TARGET = 0.9
"""Share of the measured bandwidth that float32 decoding should reach."""
MEMORY_TARGET_GB = 0.3
"""Beyond the weights once and the cache."""
PREFIX_TOKENS = 16
"""Generated tokens on which the engines should agree."""


def prepare_checkpoint(work: Path, model: str = "125m") -> Path:
    """Writes the random checkpoint and its tokenizer unless they are there; returns the folder."""
    folder = work / f"llama-{model}"
    done = folder / "tokenizer_config.json"
    if not done.exists():
        config, dtype = MODELS[model]
        write_random_checkpoint(folder, config, dtype=dtype)
        write_tokenizer(folder, int(str(config["vocab_size"])))
    return folder


# --- Decode speed ----------------------------------------------------------------------------------------------------


def _serve(name: str, checkpoint: Path, work: Path, workload: Workload) -> Run:
    """Loads one engine, warms it up, and makes a run."""
    engine = make_engine(name)
    engine.load(checkpoint, work, workload)
    engine.generate(workload)
    before = time.process_time()
    run = engine.generate(workload)
    cpu_seconds = time.process_time() - before
    return replace(run, cpu_seconds=cpu_seconds, resident_gb=(resident_bytes() or 0) / 1e9)


def run_engine(name: str, checkpoint: Path, work: Path, workload: Workload) -> Run:
    """One run in a fresh process.

    Fresh, because where the weights happen to lie in memory makes one process up to a fifth faster than the next, for
    as long as it lives; and a process of its own, because thread pools and libraries of the engines must not meet.

    Raises:
        RuntimeError: the engine failed; with its reason.
    """
    return in_fresh_process(_serve, (name, checkpoint, work, workload), Run)


def measure_decode(
    names: Sequence[str], checkpoint: Path, work: Path, workload: Workload, runs: int
) -> tuple[dict[str, dict[str, Any]], list[float]]:
    """Name -> ``{"runs": [Run]}`` or ``{"failed": reason}``, and the bandwidth before each turn; the engines take turns."""
    bandwidth = []
    results: dict[str, dict[str, Any]] = {name: {"runs": []} for name in names}
    for name in names:
        log(f"prepare {name}")
        try:
            make_engine(name).prepare(checkpoint, work)
        except Exception as err:  # noqa: BLE001 - one peer that fails must not hide the others
            results[name] = {"failed": f"{type(err).__name__}: {err}"}
    for index in range(runs):
        bandwidth.append(read_bandwidth(workload.threads) / 1e9)
        for name, result in results.items():
            if "failed" in result:
                continue
            log(f"run {index + 1} of {runs}: {name}")
            try:
                result["runs"].append(run_engine(name, checkpoint, work, workload))
            except RuntimeError as err:
                results[name] = {"failed": str(err)}
    return results, bandwidth


def measure_capacities(
    names: Sequence[str], checkpoint: Path, work: Path, workload: Workload, runs: int
) -> dict[str, dict[str, Any]]:
    """Ours at a capacity of 512 and of 8192 tokens, the same 128 tokens in the cache: tokens per second."""
    found = {}
    for name in names:
        speeds: dict[int, list[float]] = {512: [], 8192: []}
        for _ in range(runs):
            for capacity, values in speeds.items():
                short = replace(workload, prompt=workload.prompt[:128], capacity=capacity)
                values.append(run_engine(name, checkpoint, work, short).tokens_per_second)
        ratio = statistics.median(b / a for a, b in zip(speeds[512], speeds[8192], strict=True))
        found[name] = {str(capacity): _spread(values, 2) for capacity, values in speeds.items()}
        found[name]["ratio"] = round(ratio, 3)
    return found


def agreement(tokens: Sequence[int], baseline: Sequence[int]) -> int:
    """Number of leading tokens on which two generations agree."""
    return next((i for i, (a, b) in enumerate(zip(tokens, baseline, strict=True)) if a != b), len(baseline))


# --- Report ----------------------------------------------------------------------------------------------------------


def summarize(results: Mapping[str, Any], bandwidth: Sequence[float], config: LlamaConfig) -> dict[str, Any]:
    """The JSON form of the results: every run, medians, ratios to ours at the same precision, agreement of the tokens."""
    summary: dict[str, Any] = {}
    for name, result in results.items():
        if "runs" not in result:
            summary[name] = result
            continue
        runs: list[Run] = result["runs"]
        speeds = [run.tokens_per_second for run in runs]
        prefills = [run.prefill_seconds for run in runs]
        precision = ENGINES[name][1]
        entry: dict[str, Any] = {
            "note": make_engine(name).note,
            "precision": precision,
            "prefill_seconds": _spread(prefills, 4),
            "decode_tokens_per_second": _spread(speeds, 2),
            "cpu_seconds": _spread([run.cpu_seconds for run in runs], 3),
            "resident_gb": _spread([run.resident_gb for run in runs], 3),
            "runs": [asdict(run) for run in runs],
        }
        if precision == "float32":
            shares = [speed * step_bytes(config, 0) / 1e9 / rate for speed, rate in zip(speeds, bandwidth, strict=True)]
            entry["bandwidth_share"] = round(statistics.median(shares), 3)
        own = results.get(own_engine(name), {}).get("runs")
        if own is not None:
            # Ratio of each round first, then the median: what slows a whole round cancels out.
            entry["decode_ratio"] = round(
                statistics.median(a / b.tokens_per_second for a, b in zip(speeds, own, strict=True)), 3
            )
            entry["prefill_ratio"] = round(
                statistics.median(b.prefill_seconds / a for a, b in zip(prefills, own, strict=True)), 3
            )
            if precision == "float32":
                entry["same_leading_tokens"] = agreement(runs[0].tokens, own[0].tokens)
                entry["same_prefix"] = entry["same_leading_tokens"] >= min(PREFIX_TOKENS, len(own[0].tokens))
        summary[name] = entry
    return summary


def findings(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every figure with a target: what was found, and whether it was met."""
    found = []

    def add(what: str, figure: float, target: float, at_least: bool) -> None:
        met = figure >= target if at_least else figure <= target
        found.append(
            {"what": what, "found": round(figure, 3), "target": round(target, 3), "at_least": at_least, "met": met}
        )

    for name, result in report["decode"].items():
        for ratio, target in TARGETS.get(name, {}).items():
            if ratio in result:  # ours divided by theirs, which is how the targets are said
                what = f"{ratio.split('_')[0]} speed, {own_engine(name)} / {name}"
                add(what, 1 / result[ratio], 1 / target, True)
        if name == BASELINE and "bandwidth_share" in result:
            add("share of the read bandwidth, float32 decode", result["bandwidth_share"], BANDWIDTH_TARGET, True)
        if name == BASELINE and "resident_gb" in result:
            beyond = result["resident_gb"]["median"] - report["weights_and_cache_gb"]
            add("GB beyond the weights once and the cache", beyond, MEMORY_TARGET_GB, False)
    for name, result in report["capacities"].items():
        add(f"decode speed at capacity 8192 / 512, {name}", result["ratio"], 0.9, True)
    return found


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, digits) for key, value in spread.items()}


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    host, load = report["machine"], report["workload"]
    yield (
        f"{report['created_at']}, {host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, "
        f"load average at start {host['load_average_1min']}"
    )
    yield (
        f"{report['num_parameters'] / 1e6:.0f}M parameters, {load['threads']} threads, prompt {load['prompt_tokens']}, "
        f"new tokens {load['new_tokens']}, cache capacity {load['capacity']}, {load['runs']} interleaved runs: "
        f"median (min-max); reads {report['read_bandwidth_gb_per_second']['median']:.1f} GB/s"
    )
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield ""
    yield (
        "| | prefill s | decode tok/s | decode, ours = 1 | prefill speed, ours = 1 | share of bandwidth | resident GB "
        "| same leading tokens | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, result in report["decode"].items():
        if "runs" not in result:
            yield f"| {name} | {reason(result)} | | | | | | | |"
            continue
        prefill, decode = result["prefill_seconds"], result["decode_tokens_per_second"]
        ratios = f"{result['decode_ratio']:.2f} | {result['prefill_ratio']:.2f}" if "decode_ratio" in result else " | "
        share = f"{result['bandwidth_share']:.2f}" if "bandwidth_share" in result else ""
        same = f"{result['same_leading_tokens']} of {load['new_tokens']}" if "same_leading_tokens" in result else ""
        yield (
            f"| {name} | {prefill['median']:.3f} ({prefill['min']:.3f}-{prefill['max']:.3f}) "
            f"| {decode['median']:.1f} ({decode['min']:.1f}-{decode['max']:.1f}) "
            f"| {ratios} | {share} | {result['resident_gb']['median']:.2f} | {same} | {result['note']} |"
        )
    yield ""
    yield "| figure | found | target | |"
    yield "|---|---|---|---|"
    for item in report["targets"]:
        sign, verdict = (">=" if item["at_least"] else "<="), ("met" if item["met"] else "MISSED")
        yield f"| {item['what']} | {item['found']:.2f} | {sign} {item['target']:.2f} | {verdict} |"


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="125m", help="shape of the model")
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmark"), help="folder for the models, kept (4 GB; 1.2b: 25 GB)"
    )
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs of each engine")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(ENGINES)}")
    parser.add_argument("--json", type=Path, help="also write the report with every run to this file")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",")] if args.only else list(ENGINES)
    unknown = sorted(set(names) - set(ENGINES))
    if unknown or min(args.runs, args.prompt, args.threads) < 1 or args.new_tokens < 2:
        parser.error(
            f"unknown engines: {', '.join(unknown)}" if unknown else "all counts must be >= 1, --new-tokens >= 2"
        )
    config, _ = MODELS[args.model]
    capacity = -(-(args.prompt + args.new_tokens) // 256) * 256
    if capacity > int(str(config["max_position_embeddings"])):
        parser.error(
            f"prompt and new tokens need {capacity} positions, the model has {config['max_position_embeddings']}"
        )

    host = machine()
    work = args.work if args.model == "125m" else args.work / args.model
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = prepare_checkpoint(work, args.model)
    prompt = np.random.default_rng(1).integers(3, int(str(config["vocab_size"])), args.prompt)
    workload = Workload(
        prompt=tuple(prompt.tolist()), new_tokens=args.new_tokens, threads=args.threads, capacity=capacity
    )
    absent = {name: make_engine(name).missing() for name in names}
    results: dict[str, Any] = {name: not_installed(missing) for name, missing in absent.items() if missing}
    present = [name for name in names if not absent[name]]
    measured, bandwidth = measure_decode(present, checkpoint, work, workload, args.runs)
    results |= measured
    own = [name for name in present if name.startswith(BASELINE) and "runs" in results[name]]
    # A random model's positions are as good beyond its trained length, which for the small one is below 8192.
    long_enough = int(str(config["max_position_embeddings"])) >= 8192
    parsed = load_checkpoint(checkpoint).config
    report = {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": host,
        "versions": engine_versions(),
        "model": config,
        "num_parameters": count_parameters(parsed),
        "workload": {
            "prompt_tokens": args.prompt, "new_tokens": args.new_tokens, "threads": args.threads, "capacity": capacity,
            "runs": args.runs, "batch_size": 1,
        },
        "read_bandwidth_gb_per_second": _spread(bandwidth, 1),
        "weights_and_cache_gb": round((4 * count_parameters(parsed) + cache_bytes(parsed, capacity)) / 1e9, 3),
        "decode": summarize({name: results[name] for name in names}, bandwidth, parsed),
        "capacities": measure_capacities(own, checkpoint, work, workload, args.runs) if long_enough else {},
    }  # fmt: skip
    report["targets"] = findings(report)
    for line in report_lines(report):
        print(line)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in item or item.get("same_prefix") is False for item in report["decode"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
