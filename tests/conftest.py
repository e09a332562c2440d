"""Fixtures shared by all tests: tiny random checkpoints and the bundles made from them. No network, no GPU."""

from __future__ import annotations

import datetime
import json
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from random_llama import write_random_checkpoint

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.settings import EngineConfig, ExportConfig
from llama_export.engine.build import build_engine
from llama_export.export.export import export_checkpoint

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; the tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Awkward on purpose: G < H, H * D != hidden, nothing a power of two but D, vocabulary odd.
TINY: dict[str, Any] = {
    "hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 100, "vocab_size": 97, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

NATIVE = EngineConfig(ops="native", max_seq_len=53, max_batch=3)
"""Engines with plugin layers: tests/plugins/test_engine_plugins.py."""

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """``make_checkpoint(name="ckpt", dtype="float32", seed=0, **config)`` -> folder of a tiny random checkpoint."""

    def make(name: str = "checkpoint", *, dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
        folder = tmp_path / name
        write_random_checkpoint(folder, {**TINY, **config}, dtype=dtype, seed=seed)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint that no test modifies."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_random_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """dtype -> a bundle of the tiny checkpoint that no test modifies."""
    folder = tmp_path_factory.mktemp("bundles")
    for dtype in ("float32", "float16", "bfloat16"):
        export_checkpoint(tiny_checkpoint, folder / dtype, ExportConfig(dtype=dtype))
    return {dtype: load_bundle(folder / dtype) for dtype in ("float32", "float16", "bfloat16")}


@pytest.fixture(scope="session")
def built(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bundle, Path]]:
    """dtype -> a copy of the bundle with one engine in it, not to be modified."""
    made = {}
    for dtype, bundle in tiny_bundles.items():
        folder = tmp_path_factory.mktemp("built") / dtype
        shutil.copytree(bundle.folder, folder)
        copy = load_bundle(folder)
        made[dtype] = (copy, Path(build_engine(copy, NATIVE).engine))
    return made


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON object in a file; a value of ``...`` deletes the key."""
    data = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is ...:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data), encoding="utf-8")


# ---- tiers ------------------------------------------------------------------------------------------------------
# `make test` runs neither whole grids, which are marked slow, nor long functions; `make test-all` runs those. What a
# function takes is in tests/seconds.json (`make test-seconds` measures it): a case above LONGEST seconds is long; of a
# function whose cases take longer than SHARE seconds together, a sample of about SHARE seconds is not, another each day.

SECONDS = Path(__file__).with_name("seconds.json")
LONGEST, SHARE, LISTED = 8.0, 3.0, 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--day", type=int, default=datetime.date.today().toordinal(), help="Which sample of long test functions runs."
    )
    parser.addoption("--write-seconds", action="store_true", help=f"Write {SECONDS.name}, from a run of all tests.")


def pytest_report_header(config: pytest.Config) -> str:
    return f"sample of long test functions: --day {config.getoption('--day')}"


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seconds: dict[str, float] = json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.is_file() else {}
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            functions.setdefault(_function(item.nodeid), []).append(item)
    for name, cases in functions.items():
        each = seconds.get(name, 0.0)
        kept = 0 if each > LONGEST else len(cases) if each == 0 else max(1, int(SHARE / each))
        if kept < len(cases):
            first = config.getoption("--day")
            sample = {(first + index * len(cases) // kept) % len(cases) for index in range(kept)}
            for index, item in enumerate(cases):
                if index not in sample:
                    item.add_marker(pytest.mark.long)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Mean seconds of a case, its fixtures included, by function; only of functions that take :data:`LISTED` in all."""
    if not config.getoption("--write-seconds"):
        return
    reports = [one for kind in ("passed", "failed", "") for one in terminalreporter.stats.get(kind, ())]
    total: Counter[str] = Counter()
    cases: dict[str, set[str]] = {}
    for report in reports:
        if hasattr(report, "duration"):
            total[_function(report.nodeid)] += report.duration
            cases.setdefault(_function(report.nodeid), set()).add(report.nodeid)
    found = {name: round(total[name] / len(cases[name]), 3) for name in sorted(total) if total[name] >= LISTED}
    SECONDS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
