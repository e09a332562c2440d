"""How fast a bundle runs here, and how close that is to what the memory allows.

A decode step reads every weight once, so its speed is bounded by the bandwidth of the memory. Both are measured in one go.
Source: S. Williams, A. Waterman, D. Patterson, Roofline (https://doi.org/10.1145/1498765.1498785).
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_export._system.process import peak_rss_bytes, resident_bytes
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.placement import Progress
from llama_export.config.decoder import count_parameters
from llama_export.config.llama import LlamaConfig
from llama_export.graph.kv_cache import cache_shape
from llama_export.runtime.generation import generate_steps
from llama_export.runtime.protocol import CacheSession
from llama_export.runtime.sampling_params import SamplingParams

_SWEPT_BYTES = 512 << 20
"""Of the array whose reading is timed: far beyond any cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over several runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """One bundle, measured."""

    backend: str
    quantize: str | None
    """Type of the quantised weights; None: the bundle's own."""
    threads: int
    """That computed, on a CPU."""
    prompt_tokens: int
    new_tokens: int
    """Per run; the first comes out of the prefill."""
    runs: int
    """Counted; one more was made before them, to warm up."""
    kv_cache_capacity: int
    """Tokens."""
    load_seconds: float
    """To open the session."""
    prefill_seconds: Spread
    """From the prompt to the first token: the time to first token."""
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    token_seconds_p50: float
    """Of one decode step, over all runs."""
    token_seconds_p99: float
    resident_bytes: int | None
    """Of the process after the runs, mapped files included; None where the system does not tell."""
    peak_rss_bytes: int
    """Of the process, opening the session included."""
    step_bytes: int | None
    """Weights and cache that one decode step reads, at the middle of a run; None for a GPU."""
    read_bytes_per_second: float | None
    """Bandwidth of the memory for as many threads; None for a GPU."""

    @property
    def bandwidth_share(self) -> float | None:
        """Of the measured bandwidth that decoding reached; None for a GPU."""
        if self.step_bytes is None or self.read_bytes_per_second is None:
            return None
        return self.decode_tokens_per_second.median * self.step_bytes / self.read_bytes_per_second


def bench_bundle(
    bundle: Bundle,
    make_session: Callable[[], CacheSession],
    *,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    threads: int | None = None,
    quantize: str | None = None,
    progress: Progress = lambda name, done, total: None,
) -> BenchResult:
    """Times a prefill of random tokens and the greedy decode after it, several times, after one run to warm up.

    Args:
        bundle: a causal LM.
        make_session: opens a session of it, of one row that holds prompt and new tokens.
        prompt_tokens: >= 1. new_tokens: >= 2. runs: >= 1.
        threads: of the session; None: one per core.
        quantize: type of the session's weights.
        progress: receives (what runs, runs done, runs in all).

    Raises:
        ShapeError: the session holds fewer tokens. ToolchainError: its backend failed.
    """
    start = time.perf_counter()
    session = make_session()
    load_seconds = time.perf_counter() - start
    prompt = np.random.default_rng(0).integers(0, bundle.config.vocab_size, prompt_tokens).tolist()
    params = SamplingParams(max_new_tokens=new_tokens)
    firsts: list[float] = []
    steps: list[list[float]] = []
    for index in range(runs + 1):
        progress("timing" if index else "warming up", index, runs + 1)
        seconds = [event.seconds for event in generate_steps(session, [prompt], params)]
        firsts.append(seconds[0])
        steps.append([after - before for before, after in zip(seconds[:-1], seconds[1:], strict=True)])
    del firsts[0], steps[0]
    each = sorted(step for run in steps for step in run)
    used_threads = threads or os.cpu_count() or 1
    resident = resident_bytes()
    on_cpu = session.backend == "onnxruntime-cpu"
    quantized = None if quantize is None else bundle.manifest.quantized[quantize].data_size
    return BenchResult(
        backend=session.backend, quantize=quantize, threads=used_threads, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, runs=runs, kv_cache_capacity=session.capacity, load_seconds=load_seconds,
        prefill_seconds=Spread.of(firsts),
        prefill_tokens_per_second=Spread.of([prompt_tokens / first for first in firsts]),
        decode_tokens_per_second=Spread.of([len(run) / sum(run) for run in steps]),
        token_seconds_p50=_percentile(each, 0.5), token_seconds_p99=_percentile(each, 0.99),
        resident_bytes=resident, peak_rss_bytes=max(peak_rss_bytes(), resident or 0),  # the kernel counts the two apart
        step_bytes=step_bytes(bundle.config, prompt_tokens + new_tokens // 2, quantized) if on_cpu else None,
        read_bytes_per_second=read_bandwidth(used_threads) if on_cpu else None,
    )  # fmt: skip


def step_bytes(config: LlamaConfig, length: int, weight_bytes: int | None = None) -> int:
    """Bytes that a decode step of a CPU session reads after ``length`` tokens: cache and weights, each once.

    Args:
        config: of the model.
        length: tokens in the cache.
        weight_bytes: of quantised weights; None: float32, all of them, but of an embedding one row, unless it is the output
            matrix too.
    """
    if weight_bytes is None:
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        weight_bytes = 4 * (count_parameters(config) - embedding)
    return weight_bytes + cache_bytes(config, length)


def cache_bytes(config: LlamaConfig, length: int) -> int:
    """Of one row of ``length`` tokens, float32."""
    return 4 * 2 * config.num_hidden_layers * math.prod(cache_shape(config, 1, length))


def read_bandwidth(threads: int, seconds: float = 1.0) -> float:
    """Bytes per second with which ``threads`` threads read an array that no cache holds; the best of some sweeps."""
    array = np.ones(_SWEPT_BYTES // 4, np.float32)
    parts = np.array_split(array, threads)
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        workers = [threading.Thread(target=part.max) for part in parts]  # NumPy lets go of Python's lock
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, array.nbytes / (time.perf_counter() - start))
    return best


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def print_bench(result: BenchResult, console: Any) -> None:
    """The result as a table.

    Args:
        console: a ``rich.console.Console``.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "median", "min", "max"):
        table.add_column(heading, justify="left" if not heading else "right")

    def row(name: str, spread: Spread, unit: str, scale: float = 1.0, digits: int = 1) -> None:
        table.add_row(
            f"{name}, {unit}", *(f"{scale * value:,.{digits}f}" for value in (spread.median, spread.min, spread.max))
        )

    row("time to first token", result.prefill_seconds, "ms", 1000)
    row("prefill", result.prefill_tokens_per_second, "tokens/s", digits=0)
    row("decode", result.decode_tokens_per_second, "tokens/s")
    console.print(table)
    weights = "" if result.quantize is None else f", {result.quantize} weights"
    console.print(
        f"one token  p50 {1000 * result.token_seconds_p50:.2f} ms, p99 {1000 * result.token_seconds_p99:.2f} ms",
        highlight=False,
    )
    held = "" if result.resident_bytes is None else f"{result.resident_bytes / 1e9:.2f} GB resident, "
    console.print(
        f"memory     {held}peak {result.peak_rss_bytes / 1e9:.2f} GB; opened in {result.load_seconds:.1f} s",
        highlight=False,
    )
    if (
        result.bandwidth_share is not None
        and result.step_bytes is not None
        and result.read_bytes_per_second is not None
    ):
        console.print(
            f"bandwidth  {100 * result.bandwidth_share:.0f} % of {result.read_bytes_per_second / 1e9:.1f} GB/s read by "
            f"{result.threads} threads, {result.step_bytes / 1e6:,.0f} MB per token",
            highlight=False,
        )
    console.print(
        f"{result.backend}{weights}, {result.threads} threads, prompt of {result.prompt_tokens} tokens, {result.new_tokens} "
        f"new, cache of {result.kv_cache_capacity}, {result.runs} runs after a warm-up",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
