"""Estimates: the formulas beside what was measured, what this machine is said to have, and what is refused for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import estimates
import pytest
from conftest import MakeCheckpoint
from published_configs import PUBLISHED
from random_llama import write_hollow_checkpoint
from support import check_refused, trace_once

from llama_export.bundle import bundle as bundle_module
from llama_export.bundle import estimate, placement
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.destination import plan_destination
from llama_export.bundle.estimate import (
    BuildWork,
    ExportWork,
    available_memory,
    build_work,
    estimate_build,
    estimate_export,
    export_work,
    free_disk,
)
from llama_export.bundle.manifest import GRAPHS, CacheRecord, GraphRecord, IoRecord, Manifest, WeightRecord
from llama_export.checkpoint.checkpoint import load_checkpoint, read_headers
from llama_export.cli.main import main
from llama_export.config.settings import EngineConfig, ExportConfig, WeightsMode
from llama_export.engine.build import build_engine
from llama_export.errors import ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.graph.io import INTERFACES

Capture = pytest.CaptureFixture[str]
ROWS: list[dict[str, Any]] = json.loads(estimates.newest().read_text(encoding="utf-8"))["rows"]
MACHINE = estimate.available_memory


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``memory.available = bytes``, or None."""
    faked = SimpleNamespace(available=None)
    monkeypatch.setattr(estimate, "available_memory", lambda: faked.available)
    return faked


# ---- the formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["name"]))
def test_formulas_say_what_was_measured(row: dict[str, Any]) -> None:
    found, measured = estimates.estimate_of(row), row["measured"]
    assert found.ram_bytes == pytest.approx(measured["ram_bytes"], rel=0.1)
    assert found.held_bytes == pytest.approx(measured["held_bytes"], rel=0.1)
    if row["name"].startswith("export "):
        assert found.disk_bytes == measured["disk_bytes"]
    else:
        assert found.disk_bytes == pytest.approx(measured["disk_bytes"], rel=0.05, abs=3e6)
    seconds = measured["user_seconds"] + measured["system_seconds"]
    assert seconds / 2 < found.seconds < 2 * seconds


def test_measurements_are_of_every_way_and_of_every_size() -> None:
    names = " ".join(row["name"] for row in ROWS)
    for part in (
        "--weights copy", "--weights link --hash-weights", "--weights embed", "--convert-weights", "--weights input",
        "--profiles 1", "--ops native", "float16", "float32", "bfloat16", "--dtype",
    ):  # fmt: skip
        assert part in names
    sizes = {row["num_parameters"] for row in ROWS}
    assert min(sizes) < 60e6
    assert max(sizes) > 400e9


def test_benchmark_prints_the_table_without_measuring(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["estimates.py", "--table", "--only", "build 1b"])
    estimates.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == sum("build 1b" in row["name"] for row in ROWS)
    assert all(row.startswith("| build 1b") for row in rows)


def test_cost_grows_with_what_is_done() -> None:
    export = ExportWork(layers=32, written_bytes=0, hashed_bytes=0, converts=False)
    for change in ({"written_bytes": 10**9}, {"hashed_bytes": 10**9}):
        assert dataclasses.replace(export, **change).estimate().seconds > export.estimate().seconds
    assert dataclasses.replace(export, converts=True).estimate().ram_bytes > export.estimate().ram_bytes
    build = BuildWork(layers=32, profiles=1, ops="plugin")
    for more in ({"profiles": 2}, {"ops": "native"}, {"engine_weight_bytes": 10**9}, {"layers": 80}):
        other: Any = dataclasses.replace(build, **more).estimate()
        for key in ("disk_bytes", "seconds"):
            assert getattr(other, key) > getattr(build.estimate(), key)
        for key in ("ram_bytes", "held_bytes"):  # profiles are built one after the other
            assert getattr(other, key) >= getattr(build.estimate(), key) + (0 if "profiles" in more else 1)


# ---- what decides the cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reflinks", [True, False])
@pytest.mark.parametrize("weights", ["auto", "link", "copy", "embed"])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_bytes_to_write_are_those_that_are_written(
    elsewhere: bool, weights: WeightsMode, reflinks: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trace_once(monkeypatch)
    checkpoint = load_checkpoint(make_checkpoint())
    monkeypatch.setattr(placement, "_can_reflink", lambda source, folder: reflinks)
    output = tmp_path / "out" if elsewhere else None
    destination = plan_destination(checkpoint, output, force=False, weights=weights)
    work = export_work(checkpoint, destination, ExportConfig(weights=weights, hash_weights=True))
    size = checkpoint.files[0].size
    files = size if elsewhere and (weights == "copy" or (weights == "auto" and not reflinks)) else 0
    assert work.written_bytes == (2 * checkpoint.weight_bytes if weights == "embed" else files)
    assert work.hashed_bytes == (0 if weights == "embed" else size)
    assert (work.layers, work.converts) == (2, False)
    if not (elsewhere and weights == "auto" and reflinks):  # this disk may have none
        result = export_checkpoint(checkpoint.folder, output, ExportConfig(weights=weights))
        assert result.weight_bytes_written == work.written_bytes == result.estimate["disk_bytes"]


def test_bytes_of_a_conversion_are_those_of_the_new_files(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_once(monkeypatch)
    config = ExportConfig(dtype="float16", convert_weights=True)
    result = export_checkpoint(make_checkpoint(), tmp_path / "out", config)
    assert result.estimate["disk_bytes"] == result.weight_bytes_written > 2 * result.num_parameters


def hollow_bundle(
    folder: Path, name: str, dtype: str = "bfloat16", compute: str | None = None, **changes: Any
) -> Bundle:
    """What a build looks at before it starts, without an export."""
    config = write_hollow_checkpoint(folder, {**PUBLISHED[name][0], **changes}, dtype=dtype)
    size = (folder / "model.safetensors").stat().st_size
    ops = {"LlamaAddRMSNorm": 1, "LlamaRMSNorm": 1, "LlamaAttention": 1}
    interface, none = INTERFACES["causal-lm"], "0" * 64
    names = [("input", name) for name in interface.input_names(config)]
    names += [("output", name) for name in interface.output_names(config)]
    caches = (1, config.num_key_value_heads, 1, config.head_dim)
    manifest = Manifest(
        schema_version=1, generator={}, task="causal-lm", model=config, dtype=compute or dtype, rope=config.rope,
        io=tuple(
            IoRecord(name=name, kind=kind, dtype=dtype, shape=caches if "." in name else (config.vocab_size,), alias_of=None)
            for kind, name in names
        ),
        kv_cache=CacheRecord(layout="BNSH", dtype=dtype, granularity="linear"), eos_token_ids=(), ops=ops, graph_sha256=none,
        weights=(WeightRecord(file="model.safetensors", size=size, mtime_ns=0, header_sha256=none),),
        functions={kind: GraphRecord(file=file, sha256=none, dtype=dtype) for kind, file in GRAPHS.items()},
    )  # fmt: skip
    return Bundle(folder, manifest, read_headers(folder, ["model.safetensors"])[1])


EIGHT = "meta-llama/Llama-3.1-8B-Instruct"


def test_build_is_measured_by_its_weights_ops_and_profiles(tmp_path: Path) -> None:
    bundle = hollow_bundle(tmp_path, EIGHT)
    work = build_work(bundle, EngineConfig())
    assert work == BuildWork(
        layers=32, profiles=2, ops="plugin", engine_weight_bytes=2 * 8_030_261_248,
        mapped_bytes=(tmp_path / "model.safetensors").stat().st_size,
    )  # fmt: skip
    as_inputs = build_work(bundle, EngineConfig(weights="input", profiles=1, ops="native"))
    assert as_inputs == BuildWork(layers=32, profiles=1, ops="native")
    for ops, kind in (("LlamaRMSNorm=native", "mixed"), ("LlamaAttention=native", "native")):
        work = build_work(bundle, EngineConfig(weights="input", ops=ops))
        assert work == BuildWork(layers=32, profiles=2, ops=kind)
    # An op that the graph does not have makes nothing native.
    masked = build_work(bundle, EngineConfig(weights="input", ops="LlamaMaskedAttention=native"))
    assert masked.ops == "plugin"


@pytest.mark.parametrize("tied", [True, False])
def test_cast_weights_count_in_the_compute_dtype_but_the_embedding_as_it_is_stored(tied: bool, tmp_path: Path) -> None:
    bundle = hollow_bundle(tmp_path, EIGHT, compute="float32", tie_word_embeddings=tied)
    embedding = 128256 * 4096
    parameters = 8_030_261_248 - (embedding if tied else 0)
    work = build_work(bundle, EngineConfig())
    assert work.engine_weight_bytes == 4 * (parameters - (0 if tied else embedding)) + 2 * embedding
    assert work.largest_cast_bytes == 4 * embedding


def test_heads_without_a_cache_have_one_profile(tmp_path: Path) -> None:
    bundle = hollow_bundle(tmp_path, EIGHT)
    interface = INTERFACES["feature-extraction"]
    names = [("input", name) for name in interface.inputs] + [("output", name) for name in interface.outputs]
    io = tuple(IoRecord(name=name, kind=kind, dtype="int64", shape=(), alias_of=None) for kind, name in names)
    headless = dataclasses.replace(bundle.manifest, task="feature-extraction", io=io, kv_cache=None)
    assert build_work(dataclasses.replace(bundle, manifest=headless), EngineConfig(weights="input")).profiles == 1


def test_405b_is_estimated_from_headers_in_less_than_a_second(tmp_path: Path, memory: SimpleNamespace) -> None:
    name = "meta-llama/Llama-3.1-405B"
    bundle = hollow_bundle(tmp_path / "checkpoint", name)
    lines: list[str] = []
    start = time.process_time()
    checkpoint = load_checkpoint(bundle.folder)
    for output in (None, tmp_path / "out"):
        destination = plan_destination(checkpoint, output, force=False, weights="auto")
        config = ExportConfig(ignore_estimate=True)
        found = estimate_export(checkpoint, destination, config, None, lines.append)
    build = estimate_build(bundle, EngineConfig(ignore_estimate=True), lines.append)
    assert time.process_time() - start < 1
    assert found.disk_bytes in (0, (bundle.folder / "model.safetensors").stat().st_size)
    assert build.held_bytes > 1.4 * 811e9
    assert lines[0].startswith("export: about 6 s, 0.5 GB of memory")
    assert lines[0].endswith(", 0 bytes of weights to write")


# ---- what this machine has --------------------------------------------------------------------------------------


def system(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 24000 kB\nMemAvailable:   21000 kB\nSwapTotal: 0 kB\nSwapFree:  0 kB\n"}
FREE = 21_000 * 1024


def test_memory_is_what_the_kernel_says_is_available_and_free_swap(tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, MEMINFO)) == FREE
    swap = MEMINFO["proc/meminfo"].replace("SwapFree:  0", "SwapFree: 500")
    assert available_memory(system(tmp_path, {"proc/meminfo": swap})) == FREE + 500 * 1024


@pytest.mark.parametrize("meminfo", [None, "", "MemTotal: 24000 kB\n", "MemAvailable: much\n", "\x00\xff"])
def test_system_that_does_not_tell_its_memory_has_no_limit(meminfo: str | None, tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, {} if meminfo is None else {"proc/meminfo": meminfo})) is None


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
STAT = "active_file 1000000\ninactive_file 2000000\nanon 3000000\n"
TOTALS = "active_file 1\ntotal_active_file 1000000\ntotal_inactive_file 2000000\n"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, FREE),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "5\n"}, FREE),
        # A container sees its own group at the top, whether its path is hidden or not. Pages of files are taken back.
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "9000000\n", f"{V2}/memory.current": "5000000\n"}, 4_000_000),
        (
            {
                "proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "9000000\n", f"{V2}/memory.current": "5000000\n",
                f"{V2}/memory.stat": STAT,
            },
            7_000_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/docker/abc\n", f"{V2}/memory.max": "9000000\n",
                f"{V2}/memory.current": "5000000\n",
            },
            4_000_000,
        ),
        # Every group above limits, too.
        (
            {
                "proc/self/cgroup": "0::/slice/job\n",
                f"{V2}/slice/job/memory.max": "9000000\n", f"{V2}/slice/job/memory.current": "1000000\n",
                f"{V2}/slice/memory.max": "9500000\n", f"{V2}/slice/memory.current": "7500000\n",
            },
            2_000_000,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/box\n0::/\n",
                f"{V1}/box/memory.limit_in_bytes": "9000000\n", f"{V1}/box/memory.usage_in_bytes": "5000000\n",
                f"{V1}/box/memory.stat": TOTALS, f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "11000000000\n",
            },
            7_000_000,
        ),
        (
            {
                "proc/self/cgroup": "4:hugetlb,memory:/box\n",
                f"{V1}/box/memory.limit_in_bytes": "9000000\n", f"{V1}/box/memory.usage_in_bytes": "9500000\n",
            },
            0,
        ),
        ({"proc/self/cgroup": "nonsense\n4:cpu:/box\n::\n", f"{V1}/box/memory.limit_in_bytes": "1\n"}, FREE),
        ({"proc/self/cgroup": "0::/../../..\n", "memory.max": "1\n", "memory.current": "0\n"}, FREE),
    ],
    ids=[
        "none", "v2-no-limit", "v2-own-root", "v2-page-cache", "v2-path-of-the-host", "v2-parent", "v1", "v1-exceeded",
        "nonsense", "path-out-of-the-mount",
    ],
)  # fmt: skip
def test_control_groups_limit_the_memory(files: dict[str, str], left: int, tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, {**MEMINFO, **files})) == left


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_tells_its_memory() -> None:
    found = MACHINE()
    assert found is not None
    assert 1 << 20 < found < 1 << 50


def test_disk_that_does_not_tell_its_space_has_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_disk(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert free_disk(tmp_path / "missing") is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    assert free_disk(tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=5, used=5, free=0))
    assert free_disk(tmp_path) == 0


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_export_without_the_disk_names_what_writes_no_weights(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, command = make_checkpoint(), ["-o", tmp_path / "out"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=0, free=12_345))
    monkeypatch.setattr(placement, "_can_reflink", lambda source, folder: False)
    for options, hint in (
        ([], "export in place (without -o) or with --weights link"),
        (["--weights", "copy"], "export in place (without -o) or with --weights link"),
        (["--weights", "embed"], "leave --weights embed out"),
        (["--convert-weights", "--dtype", "float16"], "leave --convert-weights out"),
    ):
        said = check_refused(
            capsys, tmp_path, ["export", checkpoint, *command, *options], "no space left", "12345 bytes free", hint,
            "or pass --ignore-estimate", exit_code=3,
        )  # fmt: skip
        assert said.count("12345") == 1


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_export_warns_and_goes_on(
    short: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, memory: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trace_once(monkeypatch)
    if short == "memory":
        memory.available = 100_000_000
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=0, free=12_345))
    command = ["export", make_checkpoint(), "-o", tmp_path / "out", "--weights", "copy"]
    assert main([*map(str, command), *(["--ignore-estimate"] if short == "disk" else [])]) == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("export: about 5 s, 0.5 GB of memory")
    if short == "memory":
        assert second == (
            "export: warning: about 0.3 GB of memory are needed and 0.1 GB are available; end what uses the memory"
        )
    else:
        assert "; warning: no space left, 12345 " in first
        assert first.endswith("going on for --ignore-estimate")


def test_estimate_is_said_once_and_stands_in_the_result(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_once(monkeypatch)
    lines: list[str] = []
    result = export_checkpoint(make_checkpoint(), tmp_path / "out", ExportConfig(weights="copy"), log=lines.append)
    size = result.weight_bytes_written
    assert [line for line in lines if "about" in line] == [
        f"export: about 5 s, 0.5 GB of memory (0.2 GB of it pages of files), {size / 1e6:.1f} MB of weights to write"
    ]
    assert set(result.estimate) == {"seconds", "ram_bytes", "disk_bytes"}
    assert json.loads(json.dumps(dataclasses.asdict(result)))["estimate"]["disk_bytes"] == size


def test_8b_engine_on_a_small_machine_is_warned_about_with_weights_as_inputs_as_the_way_out(
    tmp_path: Path, memory: SimpleNamespace
) -> None:
    bundle = hollow_bundle(tmp_path, EIGHT)  # the content is a hole of 16 GB
    memory.available = 21_000_000_000
    lines: list[str] = []
    estimate_build(bundle, EngineConfig(), lines.append)
    assert lines[1] == (
        "build: warning: about 24 GB of memory are needed and 21 GB are available; "
        "--weights input needs 0.3 GB and writes an engine of 14 MB"
    )
    lines.clear()
    estimate_build(bundle, EngineConfig(weights="input"), lines.append)
    assert lines == ["build: about 4 s, 0.4 GB of memory (0.1 GB of it pages of files), 14 MB of engine to write"]


def test_a_warning_needs_more_than_the_formulas_may_be_wrong(tmp_path: Path, memory: SimpleNamespace) -> None:
    bundle = hollow_bundle(tmp_path, EIGHT)
    needed = build_work(bundle, EngineConfig()).estimate().held_bytes
    for available, count in ((int(needed / 1.09), 1), (int(needed / 1.11), 2), (None, 1)):
        memory.available = available
        lines: list[str] = []
        estimate_build(bundle, EngineConfig(), lines.append)
        assert len(lines) == count


def test_hint_for_a_bundle_that_casts_says_how_weights_become_inputs(tmp_path: Path, memory: SimpleNamespace) -> None:
    bundle = hollow_bundle(tmp_path, EIGHT, compute="float32")
    memory.available = 21_000_000_000
    lines: list[str] = []
    estimate_build(bundle, EngineConfig(), lines.append)
    assert lines[1].endswith("once the bundle is exported with --dtype bfloat16 or --convert-weights")


@pytest.mark.parametrize("config", [EngineConfig(backend="tensorrt"), EngineConfig(weights="stripped")])
def test_what_was_never_measured_is_never_warned_about(
    config: EngineConfig, tmp_path: Path, memory: SimpleNamespace
) -> None:
    memory.available = 1000
    lines: list[str] = []
    estimate_build(hollow_bundle(tmp_path, EIGHT), config, lines.append)
    (line,) = lines
    assert line.endswith("(not measured for this backend or these weights)")


def test_engine_that_the_disk_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = hollow_bundle(tmp_path, "meta-llama/Llama-3.2-1B")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=0, free=2_000_000_000))
    with pytest.raises(ToolchainError, match="no space left") as caught:
        estimate_build(bundle, EngineConfig(), lambda line: None)
    assert caught.value.details["got"] == "2000000000 bytes free"
    assert caught.value.details["expected"].endswith(" bytes of the engine")
    assert "--weights input needs 0.2 GB and writes an engine of 7.4 MB" in str(caught.value.hint)


def test_healthy_machine_builds_and_says_what_it_will_take(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    folder = Path(shutil.copytree(tiny_bundles["bfloat16"].folder, tmp_path / "bundle"))
    lines: list[str] = []
    opened = bundle_module.load_bundle(folder)
    build_engine(opened, EngineConfig(ops="native", max_seq_len=32), log=lines.append)
    assert lines[0].startswith("build: about ")
    assert sum("about" in line for line in lines) == 1
