"""Proof of the kernels without a GPU: every compiled variant against float64; writes docs/kernels.md. Run by `make kernels`.

    python scripts/kernel_proof.py [--write]

Over the cases of tests/plugins/kernel_cases.py, again and again: the kernels' source under Triton's interpreter, launched from
Python; the same by the plugin library's own `enqueue` against a stand-in for the driver; the library's PTX, executed; and what
Triton compiles for every other chip, executed. Then counts what the compiled code asks of memory and tensor cores. Needs the
plugins (`make plugins`).

Exit code: 0 all passed and every variant was reached; 1 otherwise.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests", "tests/plugins")]

import torch  # noqa: E402
from kernel_cases import (  # noqa: E402
    FLOAT32_LIMIT,
    NOISE_L2,
    NOISE_MAX,
    Case,
    Verdict,
    attention_case,
    cases,
    judge,
    norm_case,
    worst,
)
from llama_export_plugins.harness import PTX_ONLY, enqueue_ops  # noqa: E402
from llama_export_plugins.kernels.compile import compile_variant, resource_usage  # noqa: E402
from llama_export_plugins.kernels.compiled import counted_ops, run_compiled  # noqa: E402
from llama_export_plugins.kernels.launch import Run, ops  # noqa: E402
from llama_export_plugins.kernels.loop import run_interpreted  # noqa: E402
from llama_export_plugins.kernels.table import CHIPS, PORTABLE_CHIP, Variant, select, variant_named, variants  # noqa: E402
from llama_export_plugins.ptx import PtxError  # noqa: E402

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


@dataclass(frozen=True)
class Demand:
    """What a launch has to move and to multiply, at least, from its shapes alone."""

    name: str
    case: Case
    kernels: tuple[str, ...]
    nbytes: int
    multiplications: int


def demands() -> list[Demand]:
    """The shapes of the GPU benchmarks, with fewer rows, in bfloat16."""
    found = []
    for op, kernel, tensors in (("LlamaRMSNorm", "rms_norm", 2), ("LlamaAddRMSNorm", "add_rms_norm", 4)):
        for hidden in (4096, 8192):
            rows = 64
            case = norm_case(op, torch.bfloat16, rows, hidden)
            found.append(Demand(f"{op} [{rows}, {hidden}]", case, (kernel,), (tensors * rows + 1) * hidden * 2, 0))
    H, G, D, C, S = 32, 8, 128, 4096, 512
    decode = attention_case(torch.bfloat16, [C - 1], 1, H, G, D, C)
    found.append(
        Demand(
            f"decode, length {C}", decode, ("attention_split", "attention_combine"),
            (2 * C * G + 2 * H) * D * 2, 2 * C * H * D,
        )
    )  # fmt: skip
    prefill = attention_case(torch.bfloat16, [0], S, H, G, D, S)
    found.append(
        Demand(f"prefill, {S} tokens", prefill, ("attention_prefill",), 2 * S * (H + G) * D * 2, S * (S + 1) * H * D)
    )
    return found


COUNTED_CHIPS = (80, 90, 100, 120)
MULTIPROCESSOR = {80: (2048, 164), 90: (2048, 228), 100: (2048, 228), 120: (1536, 100)}
"""Chip -> (threads, KiB of shared memory) of a multiprocessor; each has 65536 registers. Source: CUDA C++ Programming Guide,
technical specifications per compute capability."""


def traffic_table() -> list[str]:
    """One line per shape, and per chip where they differ."""
    lines = [
        "| bfloat16 | chips | bytes asked for, of the least | whole sectors | passes through shared memory, of the least | products, of the least |",
        "|---|---|---|---|---|---|",
    ]
    for demand in demands():
        chips: dict[str, list[str]] = {}
        for chip in COUNTED_CHIPS:
            counted, found = counted_ops(chip, demand.kernels)
            counted[demand.case.op](*demand.case.inputs, *demand.case.attributes)
            asked = sum(found.global_bytes.values()) / demand.nbytes
            shared = found.shared_passes / found.shared_passes_least if found.shared_passes else 1.0
            products = f"{found.multiplications / demand.multiplications:.2f}" if demand.multiplications else ""
            figures = f"{asked:.2f} | {min(1.0, found.sector_use):.0%} | {shared:.2f} | {products}"
            chips.setdefault(figures, []).append(str(chip / 10))
        lines += [f"| {demand.name} | {', '.join(some)} | {figures} |" for figures, some in chips.items()]
    return lines


def resource_table() -> list[str]:
    """One line per kernel of those shapes and chip: what a program takes, and how many a multiprocessor holds."""
    lines = [
        "| kernel | chip | threads | registers | spilled | shared memory | programs at once, of a multiprocessor |",
        "|---|---|---|---|---|---|---|",
    ]
    norms = [(kernel, width) for kernel in ("rms_norm", "add_rms_norm") for width in (4096, 8192)]
    heads = [(kernel, 128) for kernel in ("attention_split", "attention_combine", "attention_prefill")]
    for kernel, width in [*norms, *heads]:
        variant = select(kernel, "bfloat16", width)
        for chip in COUNTED_CHIPS:
            compiled = compile_variant(variant, chip)
            registers, spilled = resource_usage(compiled.asm["cubin"])
            threads, shared = 32 * variant.num_warps, compiled.metadata.shared
            most_threads, kib = MULTIPROCESSOR[chip]
            at_once = min(
                65536 // (-(-registers // 8) * 8 * threads),  # registers are given in eights
                most_threads // threads,
                kib * 1024 // (shared + 1024),  # 1 KiB of each program is the system's
            )
            lines.append(
                f"| {variant.name} | {chip / 10} | {threads} | {registers} | {spilled} B | {shared / 1024:.0f} KiB | {at_once} |"
            )
    return lines


ORDER = (
    ("barriers", r"bar(?:rier)?\.sync[^;]*;"),
    ("waits", r"(?:cp\.async\.wait_group|wgmma\.wait_group|tcgen05\.wait)[^;]*;"),
    ("commits", r"(?:cp\.async\.commit_group|wgmma\.commit_group|@%p\d+ tcgen05\.commit)[^;]*;"),
    ("fences", r"(?:fence\.proxy\.async|wgmma\.fence)[^;]*;"),
)
"""Statements that compute nothing, and only keep order."""


def order_table() -> list[str]:
    """One line per kernel and chip: of those statements, taken out one at a time, how many are missed."""
    lines = [
        "| kernel | chip | " + " | ".join(what for what, _ in ORDER) + " |",
        "|---|---|" + "---|" * len(ORDER),
    ]
    decode = attention_case(torch.bfloat16, [500, 330], 1, 8, 2, 128, 510)
    prefill = attention_case(torch.bfloat16, [230], 70, 4, 2, 128, 300)
    for name, case, chip in (
        ("attention_split_bfloat16_128", decode, 80),
        ("attention_combine_bfloat16_128", decode, 80),
        ("attention_prefill_bfloat16_128", prefill, 80),
        ("attention_prefill_bfloat16_128", prefill, 90),
        ("attention_prefill_bfloat16_128", prefill, 100),
    ):
        text = compile_variant(variant_named(name), chip).asm["ptx"]
        counts = []
        for _, pattern in ORDER:
            places = [match.span() for match in re.finditer(pattern, text)]
            missed = sum(not _is_right(case, name, chip, text[:begin] + text[end:]) for begin, end in places)
            counts.append(f"{missed} of {len(places)}" if places else "")
        lines.append(f"| {name} | {chip / 10} | " + " | ".join(counts) + " |")
    return lines


def _is_right(case: Case, name: str, chip: int, text: str) -> bool:
    try:
        results = ops(run_compiled(chip, instead={name: text}))[case.op](*case.inputs, *case.attributes)
    except PtxError:
        return False
    return worst(judge(case, results)).passed


def document(by_way: Mapping[str, Worst], by_chip: Mapping[int, Worst], asked: Sequence[str], resources: Sequence[str], order: Sequence[str], reached: int, seconds: float) -> str:  # fmt: skip
    """docs/kernels.md."""
    number = sum(map(len, next(iter(by_way.values())).values()))
    lines = [
        "# The kernels, proven without a GPU",
        "",
        f"Made by `make kernels` (`scripts/kernel_proof.py --write`): {number} cases, {len(by_way) + len(by_chip)} ways, "
        f"{reached} of {len(list(variants()))} compiled variants reached, {seconds / 60:.0f} minutes on 2 CPU cores.",
        "",
        f"The oracle is NumPy in float64 (`tests/oracles.py`). Limits: float32, {FLOAT32_LIMIT:g} of the largest value; 16 bit, "
        f"{NOISE_L2:g} x (relative L2) and {NOISE_MAX:g} x (maximum) what PyTorch's own eager maths loses at that dtype on the same inputs, "
        "which is the noise floor. A share of 1 is the limit. Errors: float32, largest difference over the largest value; 16 bit, relative L2.",
        "",
        "Two things run: the kernels' *source*, under Triton's interpreter; and what the compiler made of it, the *PTX*, instruction by",
        "instruction (`llama_export_plugins.ptx`). The latter also refuses an address outside the launch's memory or not aligned, shared",
        "memory read before it is written or while a copy into it is on its way, two warps on the same bytes without a barrier, two threads",
        "of a launch on the same global bytes, and asynchronous work that nobody waits for: none of these kernels does any of it.",
        "",
        "What this cannot show: the machine code that `ptxas`, or the driver, makes of the PTX, and how fast it is. `make gpu` does;",
        "reports in `../reports/gpu`.",
    ]  # fmt: skip
    for way, found in by_way.items():
        lines += ["", f"## {way}", "", *table(found)]
    lines += [
        "", "## What Triton compiles for each chip, its PTX executed", "",
        "| compute capability | tensor cores by | cases | failed | largest share of the limit | there |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for chip, by_op in by_chip.items():
        verdicts = [verdict for some in by_op.values() for verdict in some]
        largest = worst(verdicts)
        failed = sum(not verdict.passed for verdict in verdicts)
        cores = {90: "`wgmma`, `mma`", 100: "`tcgen05`, `mma`"}.get(chip, "`mma`")
        lines.append(f"| {chip / 10} | {cores} | {len(verdicts)} | {failed} | {largest.share:.2f} | {largest.case} |")
    lines += [
        "", "## What the compiled code asks of the machine", "",
        "Counted, not timed, and each against what the shapes need: every tensor moved once, every seen key multiplied once. What is asked for",
        "twice comes from a cache: every row of a norm reads its weights, every tile of prefill the keys before it. *Whole sectors*: of the 32-byte",
        "sectors that a warp touches, how much it uses. *Passes*: 1 where no two rows of one bank are wanted at a time. Decode multiplies tiles of",
        "16 queries of which a group of 4 fills a quarter; it is bound by memory.",
        "", *asked, "", *resources,
        "", "## What the execution of PTX would notice", "",
        "Statements that only keep order, taken out of the text one at a time: how many are missed, because the launch is refused or its numbers",
        "are wrong. Not every one is needed: the compiler waits once more than it must, or orders what only other shapes use. Not judged:",
        "`wgmma.fence`, and which of several threads passes a fence.",
        "", *order,
    ]  # fmt: skip
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
        "Source: the kernels under Triton's interpreter": run(ops(launch)),
        "Source, by the plugin library's `enqueue`": run(enqueue_ops()),
        "PTX of the library, by its `enqueue`": run(enqueue_ops(compute_capability=PTX_ONLY)),
    }
    compiled: dict[int, Run] = {chip: run_compiled(chip) for chip in CHIPS if chip != PORTABLE_CHIP}
    by_chip = {chip: run(ops(run_chip)) for chip, run_chip in compiled.items()}
    asked = traffic_table()
    text = document(by_way, by_chip, asked, resource_table(), order_table(), len(reached), time.perf_counter() - start)
    print(text)
    if args.write:
        TARGET.write_text(text, encoding="utf-8")
    everything = [*by_way.values(), *by_chip.values()]
    failed = any(not verdict.passed for found in everything for verdicts in found.values() for verdict in verdicts)
    if missing := sorted({variant.name for variant in variants()} - reached):
        print(f"never run: {', '.join(missing)}", file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
