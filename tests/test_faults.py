"""The validator is worth what it finds: every fault in random models, none in what changes nothing; and the docs say so."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint
from fault_catalogue import EQUIVALENT, FAULTS, KERNELS, ROUNDINGS, NotApplicable, copy_bundle, inject
from fault_runs import FaultRun, run_faults, summary
from random_llama import random_config, write_random_checkpoint
from support import snapshot

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.errors import ConfigError
from llama_export.export.export import export_checkpoint
from llama_export.parity.stages import causal as stages_module

ROOT = Path(__file__).parent.parent
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "faults.py"), run_name="scripts.faults")
# Between them: tied and not, biases and none, grouped heads, float32 and bfloat16, RoPE that follows the length and not.
SEEDS = (1, 3)


def random_bundle(folder: Path, seed: int) -> Bundle:
    dtype = ("float32", "bfloat16", "float16")[seed % 3]
    write_random_checkpoint(folder, random_config(np.random.default_rng(seed)), dtype=dtype, seed=seed, lively=True)
    export_checkpoint(folder)
    return load_bundle(folder)


@pytest.fixture(scope="module", params=SEEDS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[FaultRun]:
    """Every fault in one model, which is left as it was."""
    bundle = random_bundle(tmp_path_factory.mktemp("faults"), request.param)
    before = snapshot(bundle.folder)
    found = list(run_faults(bundle, request.param))
    assert snapshot(bundle.folder) == before
    return found


def test_every_fault_is_found_and_nearly_always_named_right(runs: list[FaultRun]) -> None:
    count = summary(runs)
    missed = [run for run in runs if run.kind != "equivalent" and run.not_applicable is None and not run.detected]
    assert not missed
    assert count["kinds"] >= 40
    wrong = [
        (run.fault, run.injected, run.named) for run in runs if run.detected and not (run.layer_right and run.op_right)
    ]
    assert count["layer_right"] >= 0.95 * count["injected"], wrong
    assert count["op_right"] >= 0.90 * count["injected"], wrong


def test_what_changes_nothing_is_not_reported(runs: list[FaultRun]) -> None:
    assert [run.fault for run in runs if run.kind == "equivalent" and run.detected] == []
    assert summary(runs)["harmless"] >= 4


def test_every_fault_is_tried_once(runs: list[FaultRun]) -> None:
    assert [run.fault for run in runs] == [*FAULTS, *ROUNDINGS, *KERNELS, *EQUIVALENT]


def test_a_blind_validator_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix can fail: with a limit that lets everything through, faults go unnoticed and are counted as such."""
    right = stages_module.judge
    monkeypatch.setattr(stages_module, "judge", lambda *names, **settings: right(*names, **{**settings, "limit": 1e6}))
    count = summary(list(run_faults(random_bundle(tmp_path, 0), 0)))
    assert count["detected"] < 0.5 * count["injected"]


def test_a_head_without_a_cache_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    from llama_export.config.settings import ExportConfig

    export_checkpoint(folder, config=ExportConfig(task="feature-extraction"))
    with pytest.raises(ConfigError, match="causal LM"):
        next(run_faults(load_bundle(folder), 0))


@pytest.mark.parametrize(
    ("fault", "config", "said"),
    [
        ("bias: dropped", {}, "no weight"),
        ("output: tied embedding untied", {}, "not tied"),
        ("output: the embedding's weight where none is tied", {"tie_word_embeddings": True}, "tied"),
        ("attention: query heads grouped by remainder", {"num_key_value_heads": 6}, "groups"),
        ("residual: a layer is skipped", {"num_hidden_layers": 1}, "the last layer"),
        ("weight: that of the next layer", {"num_hidden_layers": 1}, "one layer"),
    ],
)
def test_a_fault_that_a_model_cannot_have_says_why(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, fault: str, config: dict[str, Any], said: str
) -> None:
    folder = make_checkpoint(**config)
    export_checkpoint(folder)
    with pytest.raises(NotApplicable, match=said):
        inject(copy_bundle(load_bundle(folder), tmp_path / "copy"), fault, np.random.default_rng(0))


def test_the_matrix_in_the_docs_is_that_of_the_committed_run() -> None:
    results = json.loads((ROOT / "reports" / "faults.json").read_text(encoding="utf-8"))
    text = SCRIPT["document"](results["faults"], results["healthy"], results["seed"])
    document = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert f"<!-- matrix:begin -->\n{text}\n<!-- matrix:end -->" in document
    count = SCRIPT["totals"](results["faults"], results["healthy"])
    assert count["detected"] == count["injected"]
    assert (count["false_alarms"], count["harmless_reported"]) == (0, 0)
    assert (count["kinds"] >= 40, count["healthy"] >= 100) == (True, True)
    known = {*FAULTS, *ROUNDINGS, *KERNELS, *EQUIVALENT}
    assert {row["fault"] for row in results["faults"]} == known, "run `make faults` again: the faults have changed"
