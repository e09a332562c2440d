"""Puts the figures of commands into README.md: parity of the last `make demo`, sizes of the last `make install-check`, the newest speeds
and perplexities, which docs/quantization.md shows, too.

make demo install-check && .venv/bin/python scripts/update_readme.py

What was not run since `build` was made keeps its old figures.
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


def newest_figures() -> dict[str, dict[str, Any]]:
    """Model -> the newest committed run of benchmarks/decode_speed.py."""
    found = {}
    for path in sorted((ROOT / "benchmarks/results/decode-speed").glob("*.json")):
        found[path.stem.rsplit("-", 1)[1]] = json.loads(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda item: item[1]["num_parameters"]))


def newest_perplexity() -> dict[str, Any]:
    """The newest committed run of ``benchmarks/perplexity.py --peers``."""
    path = max((ROOT / "benchmarks/results/perplexity").glob("*.json"))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def figures_table(figures: dict[str, dict[str, Any]], quality: dict[str, Any]) -> str:
    """Beside the peers: perplexity, of :func:`newest_perplexity`, and speed, a pair of columns per model of :func:`newest_figures`."""
    models = list(figures)
    names = list(dict.fromkeys(name for results in figures.values() for name in results["decode"]))
    rows = [
        "| | perplexity | " + " | ".join(f"{model}: prefill s | decode tok/s" for model in models) + " |",
        "|---" * (2 + 2 * len(models)) + "|",
    ]
    for name in names:
        entry = quality["engines"].get(name, {})
        cells = [f"{entry['perplexity']:.2f}" if "perplexity" in entry else "-"]
        for model in models:
            entry = figures[model]["decode"].get(name, {})
            if "runs" in entry:
                prefill, decode = entry["prefill_seconds"]["median"], entry["decode_tokens_per_second"]["median"]
                cells += [f"{prefill:.2f}", f"{decode:.1f}"]
            else:
                cells += ["-", "-"]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    rows += ["", f"Perplexity: {measured_on(quality)}."]
    for model, results in figures.items():
        load, versions = results["workload"], results["versions"]
        missed = [
            f"{item['what']} {item['found']:.2f} of {item['target']:.2f}"
            for item in results["targets"]
            if not item["met"]
        ]
        rows.append(
            f"{model}: {load['threads']} threads of {results['machine']['cpu']}, which read "
            f"{results['read_bandwidth_gb_per_second']['median']:.0f} GB/s; prompt {load['prompt_tokens']}, "
            f"{load['new_tokens']} new tokens, medians of {load['runs']} interleaved runs. "
            + (f"Missed: {'; '.join(missed)}." if missed else "All targets met.")
        )
    versions = ", ".join(
        f"{name} {versions[name]}"
        for name in ("onnxruntime", "onnxruntime-genai", "llama-cpp-python", "transformers")
        if name in versions
    )
    return "\n".join([*rows, "", f"With {versions}."])


def install_table(results: dict[str, Any]) -> str:
    """What an install takes, from scripts/check_install.py."""
    rows = ["| in an empty environment | packages | MB | at most |", "|---|---|---|---|"]
    names = {"base": "`llama-export`", "cpu": "`llama-export[cpu]`", "plugins": "- and `llama-export-plugins`"}
    for step, name in names.items():
        found, limit = results["installs"][step], results["limits"]["megabytes"][step]
        rows.append(f"| {name} | {len(found['distributions'])} | {found['bytes'] / 1e6:.0f} | {limit} |")
    seconds = results["installs"]["base"]["import_seconds"]
    return "\n".join([
        *rows,
        "",
        f"Of the files, without pip. `import llama_export; llama_export.load` in a fresh interpreter: {seconds['min']:.2f} s (median {seconds['median']:.2f} "
        f"of {len(seconds['runs'])}; at most {results['limits']['import_seconds']}). Python {results['python']}, {results['processor']}.",
    ])  # fmt: skip


def quality_table(figures: dict[str, dict[str, Any]], quality: dict[str, Any]) -> str:
    """For docs/quantization.md: what each engine's weights cost in quality, beside how fast they decode."""
    rows = [
        "| | perplexity | KL, nats | same first choice |" + "".join(f" {model}: tokens/s |" for model in figures),
        "|---" * (4 + len(figures)) + "|",
    ]
    for name, entry in quality["engines"].items():
        cells = ["-"] * 3
        if "perplexity" in entry:
            cells = [f"{entry['perplexity']:.3f}", f"{entry['kl']:.2g}", f"{100 * entry['top1']:.1f} %"]
        for results in figures.values():
            run = results["decode"].get(name, {})
            cells.append(f"{run['decode_tokens_per_second']['median']:.1f}" if "runs" in run else "-")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    largest = max(entry["largest"] for entry in quality["engines"].values() if "same_model" in entry)
    versions = quality["versions"]
    named = ("onnxruntime", "onnxruntime-genai", "llama-cpp-python", "transformers")
    return "\n".join([
        *rows,
        "",
        f"Quality: {measured_on(quality)}. At float32 all compute one model: no token's log-probability is further than {largest:.1g} nats",
        f"from ours (limit {quality['same_model_limit_nats']:g}). With {', '.join(f'{name} {versions[name]}' for name in named if name in versions)}.",
    ])  # fmt: skip


def measured_on(quality: dict[str, Any]) -> str:
    """The model, the text and the day of a perplexity."""
    what = f"`{quality['checkpoint']}` on {quality['windows']} windows of {quality['window_tokens']} held-out tokens"
    return f"{what}, {quality['created_at'][:10]}"


def replace_section(text: str, begin: str, end: str, section: str) -> str:
    """The text with something else between two markers."""
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{section}\n{end}", text, flags=re.DOTALL)


def main() -> None:
    """Rewrites the sections between the markers."""
    readme, document = ROOT / "README.md", ROOT / "docs/quantization.md"
    figures, quality = newest_figures(), newest_perplexity()
    text = readme.read_text(encoding="utf-8")
    sections = {"figures": figures_table(figures, quality)}
    for name, file, table in (
        ("parity", "build/report/parity.json", parity_table),
        ("install", "build/install.json", install_table),
    ):
        if (ROOT / file).is_file():
            sections[name] = table(json.loads((ROOT / file).read_text(encoding="utf-8")))
    for name, section in sections.items():
        text = replace_section(text, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", section)
    readme.write_text(text, encoding="utf-8")
    text = document.read_text(encoding="utf-8")
    text = replace_section(text, "<!-- peers: begin -->", "<!-- peers: end -->", quality_table(figures, quality))
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
