"""An interrupted validation keeps what it had, says that it is not complete, and can be resumed."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from support import heed_ctrl_c

from llama_export.bundle.bundle import Bundle
from llama_export.cli.main import main
from llama_export.errors import ConfigError
from llama_export.parity import validate
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.diff import diff_reports
from llama_export.parity.report.reading import report_from_json
from llama_export.parity.report.result import ParityReport
from llama_export.parity.validate import validate_bundle

Capture = pytest.CaptureFixture[str]
STAGES = ("reference/rope", "graph/rope", "graph/float64-bodies", "onnxruntime/prefill", "onnxruntime/repeat")


def config(folder: Path, **changes: Any) -> ValidateConfig:
    return dataclasses.replace(ValidateConfig(stages=STAGES, journal=folder / "interrupted"), **changes)


def interrupt_before(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    right = validate.run_stage

    def run_stage(name: str, *rest: Any) -> Any:
        if name == stage:
            raise KeyboardInterrupt
        return right(name, *rest)

    monkeypatch.setattr(validate, "run_stage", run_stage)


def without_times(report: ParityReport) -> dict[str, Any]:
    data = report.to_json()
    return {
        **data,
        "created_at": None,
        "stages": [{**stage, "seconds": None} for stage in data["stages"]],
    }


@pytest.fixture
def cut_short(tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a report whose validation was interrupted before its fourth stage."""
    with monkeypatch.context() as patch:
        interrupt_before(patch, "onnxruntime/prefill")
        with pytest.raises(KeyboardInterrupt):
            validate_bundle(tiny_bundles["float32"], config(tmp_path))
    return tmp_path


def test_the_report_so_far_is_on_disk_and_fails(cut_short: Path) -> None:
    report = report_from_json(cut_short / "interrupted")
    assert (report.interrupted, report.verdict) == (True, "fail")
    assert [stage.name for stage in report.stages if stage.verdict == "pass"] == list(STAGES[:3])
    reasons = {stage.name: stage.reason for stage in report.stages if stage.verdict == "not-run"}
    assert "interrupted" in reasons["onnxruntime/prefill"]
    assert "interrupted" not in reasons["onnxruntime/decode"], "it was not selected"


def test_a_resumed_validation_gives_the_report_of_one_that_was_not_interrupted(
    cut_short: Path, tiny_bundles: dict[str, Bundle]
) -> None:
    ran: list[str] = []
    resumed = validate_bundle(
        tiny_bundles["float32"], config(cut_short, resume=True), progress=lambda name, done, total: ran.append(name)
    )
    assert ran == list(STAGES[3:])
    assert without_times(resumed) == without_times(validate_bundle(tiny_bundles["float32"], config(cut_short / "new")))


@pytest.mark.parametrize("changes", [{"seed": 7}, {"steps": 5}])
def test_other_settings_are_not_resumed(
    cut_short: Path, tiny_bundles: dict[str, Bundle], changes: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match="does not match") as caught:
        validate_bundle(tiny_bundles["float32"], config(cut_short, resume=True, **changes))
    (name,) = changes
    assert list(caught.value.details) == [name]


def test_another_bundle_is_not_resumed(cut_short: Path, tiny_bundles: dict[str, Bundle]) -> None:
    with pytest.raises(ConfigError, match="does not match") as caught:
        validate_bundle(tiny_bundles["float16"], config(cut_short, resume=True))
    assert {"graph", "manifest"} <= caught.value.details.keys()


def test_there_must_be_something_to_resume(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no interrupted validation"):
        validate_bundle(tiny_bundles["float32"], config(tmp_path, resume=True))


def test_an_interrupted_report_says_less_than_a_whole_one(cut_short: Path, tiny_bundles: dict[str, Bundle]) -> None:
    whole = validate_bundle(tiny_bundles["float32"], config(cut_short / "new"))
    found = diff_reports(whole, report_from_json(cut_short / "interrupted"))
    assert {drift.kind for stage in found.stages for drift in stage.drift} == {"coverage"}


def test_the_command_line_publishes_what_there_is_and_goes_on(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["validate", str(tiny_bundles["float32"].folder), "--stages", ",".join(STAGES), "--report", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt_before(patch, "onnxruntime/prefill")
        assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    partial = tmp_path / "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interrupted"]
    assert "Interrupted: 3 of " in (partial / "parity.html").read_text(encoding="utf-8")
    assert "Interrupted: 3 of " in (partial / "parity.md").read_text(encoding="utf-8")
    (suite,) = ET.parse(partial / "junit.xml").getroot()
    assert suite.get("failures") == "1"
    assert main([*command, "--resume"]) == 0
    assert "[4/5] onnxruntime/prefill" in capsys.readouterr().err
    assert not partial.exists()
    assert report_from_json(tmp_path).verdict == "pass"


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_validation_loses_one_stage(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, by: signal.Signals
) -> None:
    bundle = str(tiny_bundles["float32"].folder)
    command = [
        sys.executable,
        "-m",
        "llama_export",
        "validate",
        bundle,
        "--stages",
        "graph,onnxruntime",
        "--report",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        assert process.stderr is not None
        seen = [process.stderr.readline() for _ in range(4)]
        time.sleep(0.05)
        process.send_signal(by)
        process.communicate(timeout=60)
    assert process.returncode == (143 if by == signal.SIGTERM else -by)
    done = [line.split("] ")[1].split(":")[0] for line in seen]
    kept = {stage.name for stage in report_from_json(tmp_path / "interrupted").stages if stage.verdict != "not-run"}
    assert set(done[:-1]) <= kept, "the last one may not be saved yet"
    assert json.loads((tmp_path / "interrupted" / "parity.json").read_text())["verdict"] == "fail"
