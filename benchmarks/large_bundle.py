"""An 8-billion-parameter bfloat16 bundle that really runs: written, exported in place, generated with, on a CPU with 24 GB.

    python benchmarks/large_bundle.py                                     # 16 GB below build/, 20 GB free needed
    python benchmarks/large_bundle.py --model meta-llama/Llama-3.2-1B     # smaller; writes no file

The weights are random but real: every byte is on disk and is read. Each step is a whole process, imports included; wall
time, CPU time and peak resident memory are those the kernel reports to the parent. Resident memory counts the mapped
pages of the weight file too, which the kernel takes back when it needs them; what cannot be taken back ("anonymous") is
read by the second process itself.

* ``export``: ``llama-export export`` in place.
* ``run``: ``llama-export run BUNDLE --tokens 1,2,3 --max-new-tokens 4 --json``.
* ``check``: prompt and generated tokens again, all in one prefill, through the project's session: every logit must be
  finite, and every generated token must be the largest logit of its position. The cache and the step by step decode
  thus agree with one pass.

A process that would take all memory is ended by the kernel before any other (``oom_score_adj``).
Results: ``benchmarks/results/large-bundle``. The exit code is 1 if a step failed or the check did.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters import export_command
from processes import Process, log, machine, run_process
from published_configs import PUBLISHED
from random_llama import write_random_checkpoint

from llama_export._system.environment import environment
from llama_export.config.decoder import count_parameters
from llama_export.config.huggingface import config_from_dict

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "large-bundle"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
PROMPT = (1, 2, 3)
NEW_TOKENS = 4
SPACE = 1.25
"""Bytes of free disk for a byte of weights."""


def run_command(bundle: Path) -> list[str]:
    """The step a user would take."""
    tokens = ",".join(map(str, PROMPT))
    options = ["--tokens", tokens, "--max-new-tokens", str(NEW_TOKENS), "--json"]
    return [sys.executable, "-m", "llama_export", "run", str(bundle), *options]


def first_to_go(command: Sequence[str]) -> list[str]:
    """The command as the first that the kernel ends when memory runs out; Linux only."""
    if not Path("/proc/self/oom_score_adj").exists():
        return list(command)
    return ["sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$@"', "sh", *command]


def step(name: str, command: Sequence[str]) -> tuple[dict[str, Any], Any]:
    """(cost of one process, the JSON it printed); the JSON is None if it failed, and the cost says why."""
    log(f"{name}: {' '.join(command[1:])}")
    process = run_process(first_to_go(command))
    if process.exit_code:
        return {**process.cost, "failed": _complaint(process)}, None
    return dict(process.cost), json.loads(process.stdout)


def _complaint(process: Process) -> str:
    if process.exit_code == -9:
        return "killed: the machine's memory is not enough"
    return f"exit code {process.exit_code}: {process.stderr.strip()[-400:]}"


def check_logits(bundle: Path, tokens: list[int]) -> dict[str, Any]:
    """In a process of its own: the logits of the whole sequence in one prefill, against the tokens generated from it."""
    import numpy as np

    from llama_export.bundle.bundle import load_bundle
    from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

    start = time.perf_counter()
    session = OnnxRuntimeSession(load_bundle(bundle), max_seq_len=64)
    opened = time.perf_counter()
    after_open = _resident()
    sequence = [*PROMPT, *tokens]
    where = list(range(len(PROMPT) - 1, len(sequence) - 1))  # the position before each generated token
    logits = session.step([sequence], logits_index=[where])[0]  # [N, V]
    done = time.perf_counter()
    top2 = np.partition(logits, -2, axis=-1)[:, -2:]
    return {
        "logits": list(logits.shape), "nonfinite": int(np.count_nonzero(~np.isfinite(logits))),
        "largest": float(np.abs(logits).max()), "standard_deviation": float(logits.std()),
        "expected_tokens": logits.argmax(-1).tolist(), "smallest_lead": float((top2[:, 1] - top2[:, 0]).min()),
        "open_seconds": round(opened - start, 2), "prefill_seconds": round(done - opened, 2),
        "after_open": after_open, "at_end": _resident(),
    }  # fmt: skip


def _resident() -> dict[str, float]:
    """Gigabytes of this process in memory: its own, and of files it mapped. onnxruntime's arena does not shrink."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name}
    return {key: round(values[f"Rss{key.capitalize()[:4]}"] * 1024 / 1e9, 2) for key in ("anonymous", "file")}


def measure(model: str, layers: int | None, scratch: Path) -> dict[str, Any]:
    """Writes, exports, runs and checks; stops at the first step that fails."""
    config, dtype = dict(PUBLISHED[model][0]), "bfloat16"
    if layers:
        config["num_hidden_layers"] = layers
    needed = count_parameters(config_from_dict({"model_type": "llama", **config})) * 2 * SPACE
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(f"{scratch}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")
    bundle = scratch / "model"
    log(f"write: {model}, random weights")
    start = time.perf_counter()
    parsed = write_random_checkpoint(bundle, config, dtype=dtype)
    os.sync()
    found: dict[str, Any] = {
        "model": model, "dtype": dtype, "num_parameters": count_parameters(parsed), "layers": parsed.num_hidden_layers,
        "weight_bytes": count_parameters(parsed) * 2, "write_seconds": round(time.perf_counter() - start, 1),
        "load_average_1min": round(os.getloadavg()[0], 2), "steps": {},
    }  # fmt: skip
    steps = found["steps"]
    steps["export"], exported = step("export", [*export_command(bundle), "--json"])
    if exported is None:
        return found
    steps["export"]["weight_bytes_written"] = exported["weight_bytes_written"]
    steps["run"], generated = step("run", run_command(bundle))
    if generated is None:
        return found
    (tokens,) = generated["tokens"]
    steps["run"] |= {key: generated[key] for key in ("prefill_seconds", "decode_tokens_per_second")}
    steps["run"]["tokens"] = tokens
    checker = [sys.executable, str(Path(__file__)), "--check", str(bundle), ",".join(map(str, tokens))]
    steps["check"], logits = step("check", checker)
    if logits is not None:
        steps["check"] |= logits
        steps["check"]["same_tokens"] = logits["expected_tokens"] == tokens
    return found


def passed(found: dict[str, Any]) -> bool:
    """Every step ran, all logits are finite, and both ways to compute them chose the same tokens."""
    check = found["steps"].get("check", {})
    return check.get("nonfinite") == 0 and bool(check.get("same_tokens"))


def report_lines(found: dict[str, Any], host: dict[str, Any]) -> list[str]:
    """The report as Markdown."""
    lines = [
        f"{found['model']}, {found['layers']} layers, {found['num_parameters'] / 1e9:.2f} billion random parameters, "
        f"{found['dtype']} ({found['weight_bytes'] / 1e9:.1f} GB), written in {found['write_seconds']:.0f} s; "
        f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB",
        "",
        "| step, whole process | s | CPU s | peak GB, mapped weights included | |",
        "|---|---|---|---|---|",
    ]
    for name, cost in found["steps"].items():
        lines.append(
            f"| {name} | {cost['seconds']:.1f} | {cost['cpu_seconds']:.1f} | {cost['peak_rss_gb']:.2f} | {_note(name, cost)} |"
        )
    return [*lines, "", "passed" if passed(found) else "FAILED"]


def _note(name: str, cost: dict[str, Any]) -> str:
    if "failed" in cost:
        return "failed: " + " ".join(cost["failed"].split()).replace("|", "/")
    if name == "export":
        return f"{cost['weight_bytes_written']} weight bytes written"
    if name == "run":
        speed = cost["decode_tokens_per_second"]  # None if the first token ended the text
        rate = "" if speed is None else f"decode {speed:.2f} tokens/s, "
        return f"prefill {cost['prefill_seconds']:.2f} s, {rate}tokens {cost['tokens']}"
    same = "the same tokens" if cost["same_tokens"] else f"OTHER TOKENS: {cost['expected_tokens']}"
    return (
        f"{cost['nonfinite']} of {' x '.join(map(str, cost['logits']))} logits not finite; {same}; "
        f"opened in {cost['open_seconds']:.1f} s; at the end {cost['at_end']['anonymous']:.1f} GB of its own, {cost['at_end']['file']:.1f} GB mapped"
    )


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PUBLISHED, default=MODEL, metavar="NAME", help=f"default: {MODEL}")
    parser.add_argument("--layers", type=int, metavar="N", help=argparse.SUPPRESS)  # a rehearsal; writes no file
    parser.add_argument("--check", nargs=2, metavar=("BUNDLE", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        bundle, tokens = args.check
        print(json.dumps(check_logits(Path(bundle), [int(token) for token in tokens.split(",")])))
        return 0
    (ROOT / "build").mkdir(exist_ok=True)
    host = machine()
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        found = measure(args.model, args.layers, Path(scratch))
    print("\n".join(report_lines(found, host)))
    if args.model == MODEL and not args.layers:
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        report = {
            "schema_version": SCHEMA_VERSION, "created_at": created, "environment": environment(), "machine": host,
            **found, "passed": passed(found),
        }  # fmt: skip
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{created[:10]}-cpu-{os.cpu_count()}-cores.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(not passed(found))


if __name__ == "__main__":
    raise SystemExit(main())
