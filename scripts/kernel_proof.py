"""Proof of the kernels without a GPU: every compiled variant against float64; writes docs/kernels.md. Run by `make kernels`.

    python scripts/kernel_proof.py [--write]

Over the cases of tests/plugins/kernel_cases.py, twice: the kernels under Triton's interpreter, launched from Python; and
the plugin library's own `enqueue` against a stand-in for the driver. Needs the plugins (`make plugins`).

Exit code: 0 all passed and every variant was reached; 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests", "tests/plugins")]

from kernel_cases import FLOAT32_LIMIT, NOISE_L2, NOISE_MAX, Verdict, cases, judge, worst  # noqa: E402
from llama_export_plugins.harness import enqueue_ops  # noqa: E402
from llama_export_plugins.kernels.launch import ops  # noqa: E402
from llama_export_plugins.kernels.loop import run_interpreted  # noqa: E402
from llama_export_plugins.kernels.table import Variant, variants  # noqa: E402

TARGET = ROOT / "docs" / "kernels.md"
Worst = dict[tuple[str, str], list[Verdict]]
"""(op, dtype) -> the worst output of every case."""


def run(found_ops: Mapping[str, Any]) -> Worst:
    """Every case through ``found_ops``."""
    found: Worst = defaultdict(list)
    for case in cases():
        verdicts = judge(case, found_ops[case.op](*case.inputs, *case.attributes))
        found[case.op, str(case.dtype).removeprefix("torch.")].append(worst(verdicts))
    return found


def table(found: Worst) -> list[str]:
    """One line per op and dtype, and how many failed."""
    lines = [
        "| op | dtype | cases | failed | largest share of the limit | there | its error |",
        "|---|---|---|---|---|---|---|",
    ]
    for (op, dtype), verdicts in sorted(found.items()):
        largest = worst(verdicts)
        failed = sum(not verdict.passed for verdict in verdicts)
        place = largest.case.removeprefix(f"{op} {dtype} ")
        lines.append(
            f"| {op} | {dtype} | {len(verdicts)} | {failed} | {largest.share:.2f} | {place} | {largest.error:.1e} |"
        )
    return lines


def document(by_way: Mapping[str, Worst], reached: set[str], expected: Sequence[str], seconds: float) -> str:
    """docs/kernels.md."""
    number = sum(map(len, next(iter(by_way.values())).values()))
    lines = [
        "# The kernels, proven without a GPU",
        "",
        f"Made by `make kernels` (`scripts/kernel_proof.py --write`): {number} cases, {len(by_way)} ways, "
        f"{len(reached)} of {len(expected)} compiled variants reached, {seconds:.0f} s on 2 CPU cores.",
        "",
        f"The oracle is NumPy in float64 (`tests/oracles.py`). Limits: float32, {FLOAT32_LIMIT:g} of the largest value; 16 bit, "
        f"{NOISE_L2:g} x (relative L2) and {NOISE_MAX:g} x (maximum) what PyTorch's own eager maths loses at that dtype on the same inputs, "
        "which is the noise floor. A share of 1 is the limit. Errors: float32, largest difference over the largest value; 16 bit, relative L2.",
        "",
        "What this cannot show: the compiled kernels. Those are compared with the same oracles on a GPU by `make gpu`; reports in `../reports/gpu`.",
    ]  # fmt: skip
    for way, found in by_way.items():
        lines += ["", f"## {way}", "", *table(found)]
    return "\n".join([*lines, ""])


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md")
    args = parser.parse_args()
    reached: set[str] = set()

    def launch(variant: Variant, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        reached.add(variant.name)
        run_interpreted(variant.kernel, grid, arguments, variant.constexprs)

    start = time.perf_counter()
    by_way = {
        "Kernels under Triton's interpreter": run(ops(launch)),
        "The plugin library's `enqueue`, its launches under the interpreter": run(enqueue_ops()),
    }
    expected = [variant.name for variant in variants()]
    text = document(by_way, reached, expected, time.perf_counter() - start)
    print(text)
    if args.write:
        TARGET.write_text(text, encoding="utf-8")
    failed = any(not verdict.passed for found in by_way.values() for verdicts in found.values() for verdict in verdicts)
    if missing := sorted(set(expected) - reached):
        print(f"never run: {', '.join(missing)}", file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
