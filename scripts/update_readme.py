"""Puts the parity table of the last `make demo` into README.md, so that the numbers there come from a command.

make demo && .venv/bin/python scripts/update_readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def main() -> None:
    """Rewrites the section between the markers."""
    report = json.loads((ROOT / "build/report/parity.json").read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = "<!-- parity:begin -->", "<!-- parity:end -->"
    section = f"{begin}\n{parity_table(report)}\n{end}"
    readme.write_text(re.sub(f"{begin}.*?{end}", lambda _: section, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
