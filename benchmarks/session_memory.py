"""What a session's memory costs and what it is worth: huge pages, onnxruntime's arena, freed memory given back.

    build/peers/bin/python benchmarks/decode_speed.py --runs 1   # makes the model, once
    python benchmarks/session_memory.py build/benchmark/llama-125m
    python benchmarks/session_memory.py build/benchmark/llama-125m --quantize int8 --runs 5

The ways take turns, a fresh process each. It opens the bundle, and three times prefills a prompt and decodes after it;
speeds are the best of the three, as what disturbs only slows. "As shipped" is first. What memory does over many requests
is for ``soak.py`` to tell. In a virtual machine huge pages only help where its host gives it huge pages, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from processes import in_fresh_process, log, machine

import llama_export
from llama_export._system.process import resident_bytes
from llama_export.runtime import onnxruntime_graph as graph
from llama_export.runtime.generation import generate

PROMPT, NEW_TOKENS, CAPACITY = 512, 64, 1024


def _with_arena(onnxruntime: Any, path: Path, options: Any, providers: list[str], **more: Any) -> Any:
    """Opens a graph with onnxruntime's defaults for memory."""
    options.enable_cpu_mem_arena = options.enable_mem_pattern = True
    return onnxruntime.InferenceSession(str(path), options, providers=providers, **more)


WAYS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "huge pages": {},
    "freed memory kept": {"trim_heap": lambda: None},
    "arena": {"_open": _with_arena},
}
"""Name -> what the module of the sessions has instead."""
HUGE_PAGES = "huge pages"
"""With ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``: the C library asks the kernel for huge pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One process."""

    open_seconds: float
    prefill: float
    """Tokens/s."""
    decode: float
    """Tokens/s."""
    resident_mb: float
    huge_mb: float
    """Of it, in huge pages."""


def measure(bundle: str, quantize: str | None, threads: int, way: str) -> Measured:
    """A process's whole life, with one thing as it would be otherwise."""
    rng = np.random.default_rng(0)
    with mock.patch.multiple(graph, **WAYS[way]) if WAYS[way] else contextlib.nullcontext():
        start = time.perf_counter()
        llm = llama_export.load(bundle, backend="onnxruntime", max_seq_len=CAPACITY, threads=threads, quantize=quantize)
        opened = time.perf_counter()
    vocabulary = llm.session.config.vocab_size
    prompt = rng.integers(0, vocabulary, PROMPT).tolist()
    made = [generate(llm.session, [prompt], max_new_tokens=NEW_TOKENS) for _ in range(3)]
    return Measured(
        open_seconds=opened - start, prefill=max(PROMPT / one.prefill_seconds for one in made),
        decode=max((NEW_TOKENS - 1) / one.decode_seconds for one in made),
        resident_mb=(resident_bytes() or 0) / 1e6, huge_mb=_huge_bytes() / 1e6,
    )  # fmt: skip


def _huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, list[Measured]] = {name: [] for name in WAYS}
    print(json.dumps(machine()))
    for turn in range(args.runs):
        for name in WAYS:
            log(f"run {turn + 1} of {args.runs}: {name}")
            tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if name == HUGE_PAGES else {}
            with mock.patch.dict(os.environ, tunables):
                found[name].append(
                    in_fresh_process(measure, (str(args.bundle), args.quantize, args.threads, name), Measured)
                )
    columns = {
        "open s": "open_seconds", "prefill tok/s": "prefill",
        "decode tok/s": "decode", "resident MB": "resident_mb", "in huge pages": "huge_mb",
    }  # fmt: skip
    print(f"\n| medians of {args.runs} | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for name, runs in found.items():
        medians = [statistics.median(getattr(one, field) for one in runs) for field in columns.values()]
        print(f"| {name} | {' | '.join(f'{value:.2f}' if value < 10 else f'{value:.0f}' for value in medians)} |")


if __name__ == "__main__":
    main()
