"""Puts the parity table of the last `make demo` and the newest speed figures into README.md: its numbers come from commands.

make demo && .venv/bin/python scripts/update_readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def parity_table(report: dict[str, object]) -> str:
    """The stages as a Markdown table."""
    rows = ["| stage | error | limit | verdict |", "|---|---|---|---|"]
    for stage in report["stages"]:  # type: ignore[attr-defined]
        if stage["verdict"] == "not-run":
            rows.append(f"| {stage['name']} | | | not run: {stage['reason']} |")
        else:
            error, limit = stage["metrics"]["error"], stage["tolerance"]["value"]
            rows.append(f"| {stage['name']} | {error:.2g} | {limit:.2g} | {stage['verdict']} |")
    environment = report["environment"]
    rows += [
        "",
        "With " + ", ".join(f"{key} {environment[key]}" for key in ("torch", "onnxruntime", "transformers")) + ".",
    ]  # type: ignore[index]
    return "\n".join(rows)


def figures_table(results: dict[str, Any]) -> str:
    """Speed beside the peers, from the JSON of benchmarks/decode_speed.py."""
    load, versions = results["workload"], results["versions"]
    exports = {name.removesuffix(" builder"): entry for name, entry in results["export"].items() if "seconds" in entry}
    packages = {"llama_export": "onnxruntime", "llama.cpp": "llama-cpp-python"}
    rows = [
        f"| {load['dtype']}, prompt {load['prompt_tokens']}, {load['new_tokens']} new tokens "
        "| prefill s | decode tok/s | export s | export peak GB |",
        "|---|---|---|---|---|",
    ]
    for name, entry in results["decode"].items():
        package = packages.get(name, name)
        label = f"{name} ({package} {versions[package]})" if package != name else f"{name} {versions[name]}"
        export = exports.get(name)
        cost = f"{export['seconds']:.1f} | {export['peak_rss_gb']:.2f}" if export else "- | -"
        prefill, decode = entry["prefill_seconds"]["median"], entry["decode_tokens_per_second"]["median"]
        rows.append(f"| {label} | {prefill:.3f} | {decode:.1f} | {cost} |")
    return "\n".join([*rows, "", f"Medians of {load['runs']} interleaved runs on {results['machine']['cpu']}."])


def main() -> None:
    """Rewrites the sections between the markers."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    report = json.loads((ROOT / "build/report/parity.json").read_text(encoding="utf-8"))
    newest = max((ROOT / "benchmarks/results").glob("*.json"))
    results = json.loads(newest.read_text(encoding="utf-8"))
    for name, section in (("parity", parity_table(report)), ("figures", figures_table(results))):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        whole = f"{begin}\n{section}\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, whole=whole: whole, text, flags=re.DOTALL)  # type: ignore[misc]
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
