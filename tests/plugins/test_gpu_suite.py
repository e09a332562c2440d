"""The GPU suite's own logic, on the CPU: it finds a fault, it says what did not run, and without a GPU it is not green.
Its benchmarks: rehearsed whole, with wrong results put in, and their CUDA code over a stand-in for torch.cuda."""

from __future__ import annotations

import datetime
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import EAGER, cases
from library_support import require_plugins

require_plugins()
from llama_export_plugins import harness  # noqa: E402 - before the scripts, which look into build/plugins first

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_suite.py"
suite: dict[str, Any] = runpy.run_path(str(SCRIPT))
sys.path.insert(0, str(ROOT / "scripts"))
import gpu_benchmarks as bench  # noqa: E402


def test_right_results_pass_and_wrong_ones_are_named() -> None:
    rows = suite["run_cases"](EAGER, "cpu")
    assert [row["verdict"] for row in rows] == ["pass"] * sum(1 for _ in cases())
    wrong = {**EAGER, "LlamaRMSNorm": lambda x, weight, epsilon: EAGER["LlamaRMSNorm"](x, weight, epsilon) * 1.01}
    failed = [row for row in suite["run_cases"](wrong, "cpu") if row["verdict"] == "fail"]
    assert failed
    assert all(row["case"].startswith("LlamaRMSNorm") for row in failed)


def test_nan_and_exceptions_are_failures() -> None:
    def broken(*inputs: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    nan = {**EAGER, "LlamaRMSNorm": lambda x, weight, epsilon: x * float("nan"), "LlamaAttention": broken}
    entry = suite["part"]("some part", "cpu", lambda: nan)
    assert entry["verdict"] == "fail"
    whole = ("LlamaAddRMSNorm ", "LlamaMaskedAttention ")
    assert {row["verdict"] for row in entry["rows"] if row["case"].startswith(whole)} == {"pass"}
    assert {row["verdict"] for row in entry["rows"] if not row["case"].startswith(whole)} == {"fail"}


def test_what_cannot_start_is_not_run_and_shown_so() -> None:
    def missing() -> Any:
        raise ImportError("no such package")

    entry = suite["part"]("some part", "cpu", missing)
    report = {
        "verdict": "fail",
        "environment": {"device": "x", "torch": "1", "triton": "2", "created_at": "now"},
        "parts": [entry],
    }
    assert "not run: ImportError: no such package" in suite["markdown"](report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_green() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "not run" in done.stderr


def test_a_report_is_named_by_gpu_and_date() -> None:
    assert suite["report_stem"]("NVIDIA H200", datetime.date(2026, 11, 27)) == "nvidia-h200-2026-11-27"
    assert suite["report_stem"]("CPU (rehearsal: x)", datetime.date(2026, 1, 2)) == "cpu-2026-01-02"


# ---- benchmarks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed() -> dict[str, Any]:
    return bench.run(rehearse=True)


def tiny_cases(*kinds: str) -> list[bench.Case]:
    """The first rehearsal case of each kind."""
    return [next(case for case in bench.cases(rehearse=True) if case.kind == kind) for kind in kinds]


def attempt(case: bench.Case, timer: bench.Timer | None = None) -> dict[str, Any]:
    deadline = time.monotonic() + 600
    return bench.attempt(case, harness.PluginLibrary(), timer or bench.RehearsalTimer(), deadline)


def test_the_rehearsal_runs_every_case_and_states_every_peer(rehearsed: dict[str, Any]) -> None:
    assert (rehearsed["verdict"], rehearsed["failed"], rehearsed["not_run"]) == ("pass", 0, 0)
    assert rehearsed["seconds"] < 60  # about 7 on two cores
    assert [row["case"] for row in rehearsed["rows"]] == [case.name for case in bench.cases(rehearse=True)]
    for row in rehearsed["rows"]:
        assert 0 < row["p10"] <= row["seconds"] <= row["p90"]
        assert row["rotated_buffers"] >= 2 or row["bytes"] >= 4 * bench.RehearsalTimer.l2_bytes
        assert 0 <= row["check"]["relative_l2"] <= row["check"]["limit"]
        assert isinstance(row["met"], bool)
        assert ("flops" in row) == (row["kind"] == "prefill") != ("bytes" in row)
        names = [peer["name"] for peer in row["peers"]]
        copies = [bench.COPY, bench.DRIVER_COPY] if row["kind"] != "prefill" else []
        backends = {"norm": 0, "decode": 4, "prefill": 3}[row["kind"]]
        assert names == ["SDPA flash", "SDPA efficient", "SDPA cudnn", "SDPA math"][:backends] + copies
        assert all(("seconds" in peer) != bool(peer.get("not_run")) for peer in row["peers"])
    assert {row["dtype"] for row in rehearsed["rows"]} == {"bfloat16", "float16"}


def test_a_rehearsal_is_marked_as_one_and_kept_from_the_reports(
    rehearsed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rehearsed["rehearsal"]
    assert "REHEARSAL" in bench.markdown(rehearsed)
    target = ROOT / "reports" / "gpu" / "rehearsal.json"
    monkeypatch.setattr(sys, "argv", ["gpu_benchmarks.py", "--rehearse", "--out", str(target)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--rehearse", "--report", str(target.parent)])
    with pytest.raises(SystemExit) as ended_too:
        suite["main"]()
    assert (ended.value.code, ended_too.value.code) == (2, 2)
    assert "hint:" in capsys.readouterr().err
    assert not target.exists()


def off_by_3_percent(plugin: Any) -> None:
    plugin.outputs[0].tensor.mul_(1.03)


def wrong_in_one_vector(plugin: Any) -> None:
    plugin.outputs[0].tensor[-1, -1, -16:] *= -1


def nothing_written(plugin: Any) -> None:
    plugin.outputs[0].tensor.fill_(float("nan"))


def cache_not_written(plugin: Any) -> None:
    plugin.outputs[1].tensor.fill_(float("nan"))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("norm", off_by_3_percent), ("norm", wrong_in_one_vector), ("norm", nothing_written),
     ("decode", off_by_3_percent), ("decode", wrong_in_one_vector), ("decode", cache_not_written),
     ("prefill", off_by_3_percent), ("prefill", wrong_in_one_vector)],
)  # fmt: skip
def test_a_wrong_result_is_a_failure_and_is_not_timed(kind: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = harness.PreparedPlugin.enqueue

    def enqueue(self: Any, stream: int = 0) -> None:
        right(self, stream)
        fault(self)

    monkeypatch.setattr(harness.PreparedPlugin, "enqueue", enqueue)
    (case,) = tiny_cases(kind)
    row = attempt(case)
    assert row["verdict"] == "fail"
    assert "WrongResult" in row["error"]
    assert "seconds" not in row
    entry = bench.summary([row], rehearse=True)
    assert (entry["verdict"], entry["failed"]) == ("fail", 1)
    assert "FAILED: WrongResult" in bench.markdown(entry)
    report = {"verdict": "fail", "parts": [entry],
              "environment": {"device": "x", "torch": "1", "triton": "2", "created_at": "now"}}  # fmt: skip
    assert f"- {bench.PART}: {case.name}: WrongResult" in suite["markdown"](report)


def test_replays_that_do_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = harness.PreparedPlugin.enqueue, []

    def enqueue(self: Any, stream: int = 0) -> None:
        calls.append(self)
        if len(calls) == 1:  # the checked run; a launch that escaped the capture would look like this
            right(self, stream)

    monkeypatch.setattr(harness.PreparedPlugin, "enqueue", enqueue)
    for case in tiny_cases("norm", "decode"):
        calls.clear()
        row = attempt(case)
        assert row["verdict"] == "fail", row
        assert "WrongResult" in row["error"]


def test_a_refusal_of_the_plugin_is_a_failure() -> None:
    class Refusing(bench.RehearsalTimer):
        def prepare(self, calls: Sequence[bench.Call]) -> bench.Replay:
            raise harness.PluginError("the kernel was not launched")

    (case,) = tiny_cases("norm")
    row = attempt(case, Refusing())
    assert (row["verdict"], row["error"]) == ("fail", "PluginError: the kernel was not launched")


def test_out_of_time_and_out_of_memory_are_not_run_and_shown_so() -> None:
    entry = bench.run(rehearse=True, budget_s=0)
    assert (entry["verdict"], entry["reason"]) == ("not-run", "out of time")
    assert len(entry["rows"]) == len(bench.cases(rehearse=True))
    assert bench.markdown(entry).count("| not run: out of time |") == len(entry["rows"])

    class Small(bench.RehearsalTimer):
        def free_bytes(self) -> float:
            return 2.0**20

    (case,) = tiny_cases("decode")
    row = attempt(case, Small())
    assert row["verdict"] == "not-run"
    assert "GiB are free" in row["reason"]
    entry = bench.run(rehearse=True, only="no such case")
    assert entry["verdict"] == "not-run"
    assert "no case has `no such case` in its name" in bench.markdown(entry)


def test_ratios_and_targets() -> None:
    norm, decode, prefill = (
        bench.norm_case("LlamaRMSNorm", 4096, 64 * 2**20),
        bench.attention_case("decode", 32, 4096),
        bench.attention_case("prefill", 1, 2048),
    )
    assert norm.sizes["rows"] == 8192
    assert norm.bytes == 2 * 64 * 2**20 + 2 * 4096
    assert bench.norm_case("LlamaAddRMSNorm", 4096, 64 * 2**20).bytes == 4 * 64 * 2**20 + 2 * 4096
    assert decode.cache_bytes == 512 * 2**20
    # The cache, query and output, the new keys and values written, cos and sin, and the lengths.
    assert decode.bytes == decode.cache_bytes + 32 * (2 * 8192 + 2 * 2048 + 2 * 64 * 4 + 8)
    assert prefill.flops == 4 * 32 * 128 * 2048 * 2048 // 2

    copies = [
        {"name": "slow", "kind": "copy", "bytes": norm.bytes, "seconds": 2.0},
        {"name": "quick", "kind": "copy", "bytes": norm.bytes, "seconds": 0.9},
    ]
    found = bench.judge(norm, 1.0, copies)
    assert found["ratio_to_copy"] == pytest.approx(0.9)
    assert (found["best_peer"], found["gb_per_s"], found["met"]) == ("quick", norm.bytes / 1e9, True)
    assert bench.judge(norm, 1.01, copies)["met"] is False

    def peers(**seconds: float) -> list[dict[str, Any]]:
        return [{"name": f"SDPA {name}", "kind": "backend", "seconds": value} for name, value in seconds.items()]

    refused = {"name": "SDPA cudnn", "kind": "backend", "not_run": "no"}
    whole = {"name": "copy", "kind": "copy", "bytes": 2 * decode.bytes, "seconds": 2.0}
    found = bench.judge(decode, 1.0, [*peers(flash=1.5, efficient=1.0), refused, whole])
    assert (found["ratio_to_copy"], found["ratio_to_best_peer"], found["best_peer"]) == (1.0, 1.0, "SDPA efficient")
    assert found["met"] is True
    found = bench.judge(decode, 1.0, [*peers(flash=0.99), whole])
    assert [target["met"] for target in found["targets"]] == [True, False]
    assert found["met"] is False
    found = bench.judge(prefill, 1.0, peers(flash=1.0, cudnn=0.75))
    assert (found["met"], found["tflop_per_s"]) == (True, prefill.flops / 1e12)
    assert bench.judge(prefill, 1.0, peers(flash=0.9, cudnn=0.9))["met"] is False
    # Without its peer a target is not judged, and that is not "met".
    assert bench.judge(prefill, 1.0, [*peers(cudnn=2.0), refused])["met"] is None
    assert bench.judge(prefill, 1.0, peers(cudnn=0.5))["met"] is False
    assert bench.judge(decode, 1.0, [])["best_peer"] is None


def test_the_cases_are_those_that_the_targets_are_about() -> None:
    chosen = bench.cases()
    assert len({case.name for case in chosen}) == len(chosen)
    decodes = [case for case in chosen if case.kind == "decode"]
    assert all(case.cache_bytes >= 512 * 2**20 for case in decodes)
    assert (1, 131072) in [(case.sizes["batch"], case.sizes["length"]) for case in decodes]
    assert {case.sizes["length"] for case in chosen if case.kind == "prefill"} >= {1024 * 2**n for n in range(5)}
    assert {case.kind for case in chosen if case.dtype == torch.float16} == {"norm", "decode", "prefill"}
    for case in chosen:
        for l2_bytes in (50 * 2**20, 126 * 2**20):
            assert case.rotations(l2_bytes) * case.touched_bytes >= 4 * l2_bytes
            assert case.needed_bytes(l2_bytes) < 70 * 2**30


def test_timing_is_the_median_and_the_spread() -> None:
    timing = bench.timing_of([float(n) for n in range(11)], calls=3, captured=True)
    assert (timing.seconds, timing.p10, timing.p90, timing.samples, timing.calls) == (5.0, 1.0, 9.0, 11, 3)


def test_a_peer_takes_the_first_way_that_works_and_says_why() -> None:
    import warnings

    def refuse() -> list[bench.Call]:
        warnings.warn("Flash attention needs Sm80. (Triggered internally at x.cpp:1)", stacklevel=1)
        raise RuntimeError("No available kernel.")

    def work() -> list[bench.Call]:
        return [lambda stream: None]

    timer = bench.RehearsalTimer()
    peer = bench.Peer(name="SDPA flash", kind="backend", ways=[("", refuse), ("keys repeated beforehand", work)])
    replay, row = bench.prepared_peer(peer, timer)
    assert replay is not None
    assert row["note"] == "keys repeated beforehand"
    assert row["refused"] == ["RuntimeError: No available kernel.; Flash attention needs Sm80."]
    replay, row = bench.prepared_peer(bench.Peer(name="x", kind="backend", ways=[("", refuse)]), timer)
    assert replay is None
    assert "Sm80" in row["not_run"]


def test_the_ways_without_grouped_keys_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's backends take grouped keys, so here they are told to refuse them."""
    right = torch.nn.functional.scaled_dot_product_attention
    results: dict[str, list[torch.Tensor]] = {"grouped": [], "otherwise": []}

    def sdpa(*tensors: torch.Tensor, is_causal: bool, enable_gqa: bool) -> torch.Tensor:
        result = right(*tensors, is_causal=is_causal, enable_gqa=enable_gqa)
        results["grouped" if enable_gqa else "otherwise"].append(result)
        return result

    monkeypatch.setattr(bench.F, "scaled_dot_product_attention", sdpa)
    for case in tiny_cases("decode", "prefill"):
        workload = bench.make_workload(case, harness.PluginLibrary(), bench.RehearsalTimer())
        ways = next(peer for peer in workload.peers if peer.name == "SDPA flash").ways
        for found in results.values():
            found.clear()
        for _, make in ways:
            make()[0](0)
        (grouped,), (otherwise,) = results["grouped"], results["otherwise"]
        torch.testing.assert_close(otherwise.reshape(grouped.shape), grouped, rtol=2e-2, atol=2e-2)


def test_the_tables_show_figures_peers_and_what_did_not_run(rehearsed: dict[str, Any]) -> None:
    row = {
        "case": "decode x", "verdict": "pass", "seconds": 2e-3, "p10": 1.9e-3, "p90": 2.1e-3, "gb_per_s": 4000.0,
        "ratio_to_copy": 0.87, "best_peer": "SDPA cudnn", "ratio_to_best_peer": 1.25, "captured": True,
        "targets": [{"peer": "copy", "at_least": 0.85}], "met": True,
        "peers": [{"name": "SDPA cudnn", "seconds": 2.5e-3, "not_captured": "no capture"},
                  {"name": "SDPA flash", "not_run": "no | kernel"}],
    }  # fmt: skip
    rows = [row, {"case": "y", "verdict": "not-run", "reason": "out of time"}, {**row, "case": "z", "met": None}]
    text = bench.markdown(bench.summary(rows, rehearse=False))
    assert (
        "| decode x | 2000.0 | 1900.0-2100.0 | 4000 GB/s | 0.87 x | SDPA cudnn | 1.25 x | 0.85 x copy | yes |" in text
    )
    assert "| y | not run: out of time | | | | | | | |" in text
    assert "| z | 2000.0" in text
    assert "not judged" in text
    assert "| decode x | 2000.0 | 2500.0 (a) | not run (b) |" in text
    assert "- (a) SDPA cudnn: launched call by call, as no graph could capture it: no capture" in text
    assert "- (b) SDPA flash did not run: no / kernel" in text
    table = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(table[:5]) == {10}
    assert "rehearsal has no CUDA driver" in bench.markdown(rehearsed)


def test_results_in_the_readme_are_those_of_the_newest_report() -> None:
    text = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
    assert text == bench.with_results(text, bench.newest_report())
    assert bench.results_table(None).count("| not run |") >= len(bench.cases())
    name = bench.cases()[0].name
    report = {"environment": {"device": "NVIDIA X", "created_at": "2026-12-01T00:00:00"},
              "parts": [{"name": bench.PART, "rows": [{"case": name, "verdict": "fail", "error": "bad"}]}]}  # fmt: skip
    table = bench.results_table(report)
    assert f"| {name} | FAILED: bad |" in table
    assert "NVIDIA X, 2026-12-01." in table


# ---- the CUDA code, over a stand-in for torch.cuda --------------------------------------------------------------


class FakeCuda:
    """What GpuTimer uses of torch.cuda: streams, events on the wall clock, and graphs that record the calls made on their
    stream by `enqueue` and run them on replay. It checks the order of things."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: Any = None
        self.current: Any = "default stream"
        self.handles = iter(range(0x5000, 0x6000))
        self.fail_capture = False
        self.launches_outside, self.replays = 0, 0
        fake = self

        class Stream:
            def __init__(self) -> None:
                self.cuda_stream = next(fake.handles)

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                assert stream is fake.current
                assert fake.capturing is None
                self.at = time.perf_counter()

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.nodes: list[Any] = []

            def replay(self) -> None:
                fake.replays += 1
                for node in self.nodes:
                    node()

        class stream:  # noqa: N801 - named as torch.cuda's
            def __init__(self, chosen: Any) -> None:
                self.chosen = chosen

            def __enter__(self) -> None:
                self.previous, fake.current = fake.current, self.chosen

            def __exit__(self, *args: object) -> None:
                fake.current = self.previous

        class graph:  # noqa: N801
            def __init__(self, cuda_graph: Any, stream: Any) -> None:
                self.cuda_graph, self.stream = cuda_graph, stream

            def __enter__(self) -> None:
                fake.capturing, fake.current = self.cuda_graph, self.stream

            def __exit__(self, *args: object) -> None:
                fake.capturing = None
                if fake.fail_capture:  # PyTorch leaves its stream current here
                    raise RuntimeError("operation not permitted when stream is capturing")

        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "stream": stream, "graph": graph,
            "synchronize": self.synchronize, "empty_cache": lambda: None, "current_device": lambda: 0,
            "mem_get_info": lambda: (2**40, 2**41), "get_device_properties": lambda device: Properties(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def synchronize(self, device: Any = None) -> None:
        assert self.capturing is None, "a wait inside of a capture"

    def launch(self, handle: int, work: Any) -> None:
        """What a kernel launch on a stream does."""
        assert handle == self.current.cuda_stream
        if self.capturing is not None:
            self.capturing.nodes.append(work)
        else:
            self.launches_outside += 1
            work()


class Properties:
    L2_cache_size = 2048
    uuid = "00000000-1111-2222-3333-444444444444"


class TinyGpuTimer(bench.GpuTimer):
    device = "cpu"  # where the stand-in's memory is
    samples = 2


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda(monkeypatch)
    right = harness.PreparedPlugin.enqueue
    monkeypatch.setattr(
        harness.PreparedPlugin, "enqueue", lambda self, stream: fake.launch(stream, lambda: right(self, 0))
    )
    yield fake
    assert fake.current == "default stream"


def test_cuda_graphs_hold_the_calls_of_every_buffer(cuda: FakeCuda) -> None:
    timer, seen = TinyGpuTimer(), []
    calls = [lambda stream, n=n: cuda.launch(stream, lambda: seen.append(n)) for n in range(3)]
    replay = timer.prepare(calls)
    assert cuda.launches_outside == 6  # warmed up, then estimated
    assert replay.captured
    assert replay.calls % 3 == 0
    assert replay.calls <= bench.MAX_CALLS
    seen.clear()
    (samples,) = timer.sample([replay])
    assert cuda.replays == bench.WARM_REPLAYS + 2
    assert seen == [0, 1, 2] * (replay.calls // 3) * cuda.replays
    assert len(samples) == 2
    assert cuda.launches_outside == 6


def test_what_cannot_be_captured_is_launched_call_by_call(cuda: FakeCuda) -> None:
    cuda.fail_capture = True
    timer = TinyGpuTimer()
    before = timer.stream
    replay = timer.prepare([lambda stream: cuda.launch(stream, lambda: None)])
    assert replay.not_captured == "RuntimeError: operation not permitted when stream is capturing"
    assert timer.stream is not before
    assert timer.sample([replay])[0][0] > 0
    assert cuda.launches_outside == 2 + replay.calls * (bench.WARM_REPLAYS + 2)


@pytest.mark.parametrize("kind", ["norm", "decode"])
def test_a_case_through_cuda_graphs(kind: str, cuda: FakeCuda) -> None:
    (case,) = tiny_cases(kind)
    row = attempt(case, TinyGpuTimer())
    assert row["verdict"] == "pass", row
    assert row["captured"]
    assert row["rotated_buffers"] >= 2


def test_an_enqueue_that_cannot_be_captured_is_a_failure(cuda: FakeCuda) -> None:
    cuda.fail_capture = True
    (case,) = tiny_cases("norm")
    row = attempt(case, TinyGpuTimer())
    assert row["verdict"] == "fail"
    assert "could not be captured into a CUDA graph: RuntimeError: operation not permitted" in row["error"]


def test_clocks_are_those_of_the_gpu_in_use_or_not_known(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1980, 3201, 1980, 3201, 210.5, 700.00, 41\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    found = bench.clocks("before")
    assert (found["clocks.sm"], found["temperature.gpu"]) == ("1980", "41")
    assert f"GPU-{Properties.uuid}" in asked[0]

    def missing(command: list[str], **options: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert "FileNotFoundError" in bench.clocks("before")["not_run"]
