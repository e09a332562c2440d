"""`bench`: what it counts, on a session whose speed is known."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llama_export.bundle.bundle import Bundle
from llama_export.runtime.bench import BenchResult, Spread, _percentile, bench_bundle, print_bench, read_bandwidth
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession


class Slow(OnnxRuntimeSession):
    """30 ms for a prefill, 10 ms for a token; every tenth token takes 40."""

    steps = 0

    def step(self, input_ids, **arguments):  # type: ignore[no-untyped-def]
        self.steps += 1
        tokens = np.asarray(input_ids).shape[1]
        time.sleep(0.03 if tokens > 1 else 0.04 if self.steps % 10 == 0 else 0.01)
        return super().step(input_ids, **arguments)


@pytest.fixture(scope="module")
def result(tiny_bundles: dict[str, Bundle]) -> BenchResult:
    bundle = tiny_bundles["float32"]
    return bench_bundle(
        bundle, lambda: Slow(bundle, max_seq_len=32, threads=1), prompt_tokens=7, new_tokens=21, runs=2, threads=1
    )


def test_times_are_those_of_the_session(result: BenchResult) -> None:
    """Bounds from below are certain, those from above leave room for a busy machine."""
    assert 0.03 <= result.prefill_seconds.min <= result.prefill_seconds.median < 0.2
    assert result.prefill_tokens_per_second.max == pytest.approx(7 / result.prefill_seconds.min)
    assert 0.01 <= result.token_seconds_p50 < 0.04 <= result.token_seconds_p99
    assert 20 / result.decode_tokens_per_second.median >= 18 * 0.01 + 2 * 0.04
    assert (result.kv_cache_capacity, result.runs, result.backend) == (32, 2, "onnxruntime-cpu")
    assert result.load_seconds > 0


def test_the_share_of_the_bandwidth_is_bytes_over_time(result: BenchResult) -> None:
    assert result.step_bytes is not None
    assert result.read_bytes_per_second is not None
    moved = result.decode_tokens_per_second.median * result.step_bytes
    assert result.bandwidth_share == pytest.approx(moved / result.read_bytes_per_second)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.5, 50), (0.501, 51), (0.99, 99), (0.991, 100), (1.0, 100)]
)
def test_percentiles_are_values_that_were_measured(share: float, expected: int) -> None:
    assert _percentile(range(1, 101), share) == expected


def test_bandwidth_is_that_of_memory() -> None:
    """Between a slow laptop and the fastest server; a sweep of a cache, or of nothing, would be outside."""
    assert 1e9 < read_bandwidth(1, seconds=0.1) < 1e12


def test_the_table_fits_a_terminal(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("w") as stream:
        print_bench(result, Console(file=stream, width=80))
    lines = path.read_text().splitlines()
    assert [line.split(",")[0].split("  ")[0] for line in lines[1:4]] == ["time to first token", "prefill", "decode"]
    assert "21 new" in lines[-1]
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, min=1.0, max=3.0)
