"""Compares what two commits make of the same checkpoints: ONNX files, engines, and every figure of the parity report.

    python scripts/compare_commits.py OLD [NEW]

Each commit is checked out into a folder of its own (NEW defaults to the working tree) and run by this interpreter on
the bundled checkpoint and on a random one of 125 million parameters. Compared are:

    onnx     SHA-256 of model.onnx and model.onnxruntime.onnx
    engine   the digest of the compiled graphs of a TensorRT-RTX engine with native ops (an engine with plugins depends on
             the installed library, which is one for both commits)
    report   verdict and metrics of each stage of `validate` on the bundled checkpoint. A stage that did not run on one side
             is listed; one that exists on one side only is listed too. Neither counts as a difference.

Exit code: 0 nothing differs, 1 something does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("seconds", "tokens_per_second", "peak_rss", "bytes_per_second")
"""Metrics whose names hold one of these differ from run to run."""


def llama_export(tree: Path, *arguments: str | Path) -> None:
    """Runs one command of a tree; its output is shown only if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llama_export", *map(str, arguments)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: a stage failed, which the report says
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def facts_of_bundle(tree: Path, checkpoint: Path, bundle: Path) -> dict[str, str]:
    """File or engine -> digest."""
    llama_export(tree, "export", checkpoint, "-o", bundle)
    llama_export(tree, "build", bundle, "--ops", "native", "--max-seq-len", "256")
    facts = {
        name: hashlib.sha256((bundle / name).read_bytes()).hexdigest()
        for name in ("model.onnx", "model.onnxruntime.onnx")
    }
    for sidecar in sorted((bundle / "engines").glob("*.json")):
        facts[f"engine {sidecar.stem}"] = json.loads(sidecar.read_text())["compiled_graphs_sha256"]
    return facts


def report_of_bundle(tree: Path, bundle: Path) -> dict[str, dict[str, Any]]:
    """Stage -> verdict and metrics."""
    llama_export(tree, "validate", bundle, "--text", ROOT / "examples" / "train_tiny_llama.py")
    stages = json.loads((bundle / "report" / "parity.json").read_text())["stages"]
    return {stage["name"]: stage for stage in stages}


def compare_facts(label: str, old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Prints both; returns the differences."""
    differences = []
    for name in sorted(old.keys() | new.keys()):
        same = old.get(name) == new.get(name)
        print(f"{'same     ' if same else 'DIFFERENT'}  {label}: {name}  {str(new.get(name))[:16]}")
        if not same:
            differences.append(f"{label}: {name}: {old.get(name)} -> {new.get(name)}")
    return differences


def compare_reports(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    """Prints a line a stage that is not the same, and a summary; returns the differences."""
    differences, same = [], 0
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            print(f"{'only in NEW' if name in new else 'only in OLD'}  report: {name}")
            continue
        verdicts = old[name]["verdict"], new[name]["verdict"]
        if "not-run" in verdicts:
            if verdicts[0] != verdicts[1]:
                print(f"not run on one side  report: {name}: {verdicts[0]} -> {verdicts[1]}")
            continue
        metrics = [
            {k: v for k, v in side[name]["metrics"].items() if not any(t in k for t in TIMED)} for side in (old, new)
        ]
        if verdicts[0] == verdicts[1] and metrics[0] == metrics[1]:
            same += 1
            continue
        changed = {key for key in metrics[0].keys() | metrics[1].keys() if metrics[0].get(key) != metrics[1].get(key)}
        shown = ", ".join(f"{key} {metrics[0].get(key)} -> {metrics[1].get(key)}" for key in sorted(changed))
        print(f"DIFFERENT  report: {name}: {verdicts[0]} -> {verdicts[1]}; {shown}")
        differences.append(f"report: {name}")
    print(f"same       report: {same} stages that ran on both sides")
    return differences


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit")
    parser.add_argument("new", nargs="?", help="commit; the working tree if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-commits-") as scratch:
        work, trees = Path(scratch), []
        for side, commit in (("old", args.old), ("new", args.new)):
            tree = ROOT if commit is None else work / f"{side}-tree"
            if commit is not None:
                tree.mkdir()
                archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
                subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
            trees.append(tree)
        random = work / "random-125m"
        writer = [sys.executable, str(trees[0] / "benchmarks" / "random_llama.py"), str(random)]
        subprocess.run(writer, env={**os.environ, "PYTHONPATH": str(trees[0])}, check=True, capture_output=True)
        differences = []
        for label, checkpoint in (("tiny-llama", ROOT / "examples" / "tiny-llama"), ("125M", random)):
            sides = [
                facts_of_bundle(tree, checkpoint, work / f"{label}-{side}")
                for tree, side in zip(trees, ("old", "new"), strict=True)
            ]
            differences += compare_facts(label, *sides)
        reports = [
            report_of_bundle(tree, work / f"tiny-llama-{side}")
            for tree, side in zip(trees, ("old", "new"), strict=True)
        ]
        differences += compare_reports(*reports)
    print("\nnothing differs" if not differences else "\n" + "\n".join(differences))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
