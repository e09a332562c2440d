"""Measures what docs/architecture.md says of the model's parts, and puts the tables into it.

    python benchmarks/architecture.py                        # all studies, about 40 minutes on two cores
    python benchmarks/architecture.py --only epsilon cache   # some; the others keep their figures of the newest run
    python benchmarks/architecture.py --write                # no measuring: the newest run's tables into the document

Results go to ``benchmarks/results/architecture``. Needs ``.[cpu,export,parity]``; no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studies import attention, heads, mlp, norms, positions

from llama_export._system.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architecture"
DOCUMENT = ROOT / "docs" / "architecture.md"
STUDIES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "activations": (norms.measure_activations, norms.activations_table),
    "epsilon": (norms.measure, norms.table),
    "place": (norms.measure_place, norms.place_table),
    "rope": (positions.measure, positions.table),
    "distance": (positions.measure_distance, positions.distance_table),
    "mlp": (mlp.measure, mlp.table),
    "gates": (mlp.measure_gates, mlp.gates_table),
    "ranks": (mlp.measure_ranks, mlp.ranks_table),
    "attention": (attention.measure, attention.table),
    "cache": (attention.measure_cache, attention.cache_table),
    "cache-size": (attention.measure_cache_size, attention.cache_size_table),
    "question-answering": (heads.measure, heads.table),
    "languages": (heads.measure_languages, heads.languages_table),
}
"""Name -> (measures, shows); the name is that of the table's marker in the document."""


def newest() -> dict[str, Any]:
    """The newest committed run, or nothing."""
    files = sorted(RESULTS.glob("*.json"))
    found: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8")) if files else {"studies": {}}
    return found


def with_tables(document: str, studies: dict[str, Any]) -> str:
    """The document with every study's table between its markers."""
    for name, found in studies.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = f"{begin}\n{STUDIES[name][1](found)}\n{end}"
        document, count = re.subn(pattern, lambda _, text=text: text, document, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{DOCUMENT.name} has {count} places for the table {name}, not one: {begin} ... {end}")
    return document


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument(
        "--write", action="store_true", help="only put the newest run's tables into docs/architecture.md"
    )
    arguments = parser.parse_args()
    if arguments.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), newest()["studies"]), encoding="utf-8")
        return
    path = RESULTS / f"{datetime.date.today().isoformat()}-cpu-{os.cpu_count()}-cores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        print(f"{name} ...", flush=True)
        measured = STUDIES[name][0]()
        studies = newest()["studies"] | {name: measured}
        record = {"environment": environment(), "studies": {key: studies[key] for key in STUDIES if key in studies}}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(STUDIES[name][1](measured), flush=True)


if __name__ == "__main__":
    main()
