"""Drift between two reports: what counts, what does not, what is refused, and that a report survives being read back."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support import check_refused, patient
from test_cli import document, run_without
from test_report import REPORTS, a_report, a_stage, every_report, not_run

from llama_export.cli.main import main
from llama_export.errors import ConfigError
from llama_export.parity.report.diff import FACTOR, FLOOR, ReportDiff, diff_reports
from llama_export.parity.report.pages import markdown_from_diff, print_diff, write_report
from llama_export.parity.report.reading import report_from_json
from llama_export.parity.report.result import ParityReport, Stage, Tolerance

Capture = pytest.CaptureFixture[str]


def drift_of(old: Stage | None, new: Stage | None, **options: Any) -> list[str]:
    """The kinds of drift of one stage between two reports that hold another, unchanged one beside it."""
    before, after = (a_report(a_stage("graph/rope"), *([stage] if stage else [])) for stage in (old, new))
    found = diff_reports(before, after, **options)
    assert found.drifted == bool(found.drift or any(stage.drift for stage in found.stages))
    return [drift.kind for stage in found.stages for drift in stage.drift]


def printed(diff: ReportDiff, width: int = 80) -> str:
    stream = io.StringIO()
    print_diff(diff, Console(file=stream, width=width))
    return stream.getvalue()


# ---- reading a report -------------------------------------------------------------------------------------------


@every_report
def test_a_report_that_is_read_back_is_the_report(tag: str, report: ParityReport, tmp_path: Path) -> None:
    path = write_report(report, tmp_path)["json"]
    for place in (path, tmp_path):
        assert json.loads(json.dumps(report_from_json(place).to_json())) == json.loads(path.read_text("utf-8"))


def test_reader_ignores_keys_it_does_not_know_and_takes_reports_without_logits(tmp_path: Path) -> None:
    path = write_report(REPORTS["not-run"], tmp_path)["json"]
    data = json.loads(path.read_text())
    data["new"] = data["stages"][0]["new"] = {"anything": [1]}
    del data["stages"][0]["logits"]
    path.write_text(json.dumps(data))
    assert json.loads(json.dumps(report_from_json(path).to_json())) == json.loads(
        json.dumps(REPORTS["not-run"].to_json())
    )


def changed(*where: str | int, to: Any) -> Callable[[Any], Any]:
    def change(data: Any) -> Any:
        place = data
        for key in where[:-1]:
            place = place[key]
        place[where[-1]] = to
        return data

    return change


def without(*where: str | int) -> Callable[[Any], Any]:
    def change(data: Any) -> Any:
        place = data
        for key in where[:-1]:
            place = place[key]
        del place[where[-1]]
        return data

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda data: [data], ("no report of llama-export", "the document", "list", "an object")),
        (lambda data: {"stages": []}, ("no report of llama-export", "schema_version", "nothing", "this key")),
        (lambda data: {"error": {"exit_code": 2}}, ("no report of llama-export", "schema_version")),
        (changed("schema_version", to=2), ("of another version", "schema_version", "2", "1")),
        (changed("schema_version", to=True), ("no report of llama-export", "True", "an integer")),
        (without("created_at"), ("created_at", "nothing")),
        (changed("stages", to={}), ("stages", "dict", "an array")),
        (changed("stages", 0, "name", to=7), ("stages[0].name", "7", "a string")),
        (changed("stages", 1, "verdict", to="ok"), ("stages[1].verdict", "'ok'", '"not-run"')),
        (changed("stages", 0, "metrics", "top1", to=None), ("stages[0].metrics.top1", "None", "a number")),
        (changed("stages", 0, "metrics", "top1", to=10**400), ("stages[0].metrics.top1", "64 bits")),
        (changed("stages", 0, "metrics", "max_abs", to=1.0), ("stages[0].metrics.max_abs", "1.0", "at most 0.0001")),
        (changed("stages", 0, "metrics", "max_abs", to="nan"), ("stages[0].metrics.max_abs", "at most 0.0001")),
        (changed("stages", 0, "tolerance", "value", to="big"), ("stages[0].tolerance.value", "'big'", "a number")),
        (changed("stages", 0, "worst", "index", to=[0.5]), ("stages[0].worst.index[0]", "0.5", "an integer")),
        (changed("stages", 0, "series", to={"error": 1}), ("stages[0].series.error", "1", "an array")),
        (changed("stages", 0, "logits", to={"compared": 4}), ("stages[0].logits.positions", "nothing")),
        (changed("stages", 1, "name", to="onnxruntime/prefill"), ("every name once",)),
        (changed("environment", "python", to=3), ("environment.python", "3", "a string")),
        (changed("verdict", to="fail"), ("verdict", '"pass", which is what the stages imply')),
        (changed("created_at", to="x" * 999), None),
    ],
)  # fmt: skip
def test_a_document_that_is_not_a_report_is_refused(
    change: Callable[[Any], Any], parts: tuple[str, ...] | None, tmp_path: Path, capsys: Capture
) -> None:
    path = write_report(REPORTS["not-run"], tmp_path)["json"]
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    if parts is None:
        assert report_from_json(path).created_at == "x" * 999
    else:
        check_refused(capsys, tmp_path, ["report", "diff", path, path], str(path), "got:", "expected:", *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "Expecting value"),
        (b"<html>", "Expecting value"),
        (b'{"schema_version": 1', "delimiter"),
        (b'{"schema_version": NaN}', "NaN is not JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\xff"', "utf-8"),
        (b"[" * 100_000, "recursion"),
        (b"1" * 5000, "digits"),
    ],
)
def test_a_file_that_is_not_json_is_refused(content: bytes, part: str, tmp_path: Path, capsys: Capture) -> None:
    good = write_report(REPORTS["pass"], tmp_path / "good")["json"]
    (tmp_path / "parity.json").write_bytes(content)
    check_refused(capsys, tmp_path, ["report", "diff", good, tmp_path], "cannot be read as JSON", str(tmp_path), part)


def test_no_file_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "parity.json").mkdir(parents=True)
    for name in ("none.json", "empty"):
        check_refused(capsys, tmp_path, ["report", "diff", tmp_path / name, tmp_path], "no report", "parity.json")
    check_refused(capsys, tmp_path, ["report", "diff", tmp_path / "odd", tmp_path], "cannot be read", "directory")


@patient
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    st.data(),
)
def test_anything_in_place_of_a_value_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: Any, data: st.DataObject
) -> None:
    report = json.loads(json.dumps(REPORTS["fail"].to_json()))
    parent, place = None, report
    while isinstance(place, (dict, list)) and place and (parent is None or data.draw(st.booleans())):
        parent, key = place, data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place = place[key]
    parent[key] = value
    path = tmp_path_factory.getbasetemp() / "anything.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    try:
        found = report_from_json(path)
    except ConfigError as refused:
        err = refused
    else:
        assert not diff_reports(found, found).drifted
        return
    assert err.hint
    assert {"file", "got", "expected"} <= err.details.keys()


# ---- what counts as drift ---------------------------------------------------------------------------------------


@every_report
def test_a_report_has_no_drift_against_itself(tag: str, report: ParityReport) -> None:
    found = diff_reports(report, report)
    assert not found.drifted
    assert not any(found.changes.values())
    assert all(stage.is_same for stage in found.stages)
    assert printed(found).startswith(f"NO DRIFT: {len(report.stages)} stages, ")


numbers = st.floats(min_value=0) | st.just(math.nan)


@given(numbers, numbers, numbers, numbers, st.floats(min_value=1, max_value=1e6))
def test_drift_is_one_way_and_a_smaller_factor_finds_no_less(
    old: float, new: float, old_limit: float, new_limit: float, factor: float
) -> None:
    before, after = a_stage(error=old, limit=old_limit), a_stage(error=new, limit=new_limit)
    there, back = set(drift_of(before, after, factor=factor)), set(drift_of(after, before, factor=factor))
    assert not there & back
    assert there <= set(drift_of(before, after, factor=1.0))


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (1e-5, 2e-5, []),  # twice is the factor
        (1e-5, 2.1e-5, ["error"]),
        (2.1e-5, 1e-5, []),
        (1e-15, 1e-7, []),  # a thousandth of the limit: how far inside makes no difference
        (0.0, 1.9e-7, []),
        (0.0, 2.1e-7, ["error"]),
        (1e-5, 1e-3, ["verdict", "error"]),
        (6e-5, 1.1e-4, ["verdict"]),
        (1e-5, math.nan, ["verdict", "error"]),
        (1e-3, 1.9e-3, []),  # failed before, and no worse
        (1e-3, 1e-2, ["error"]),
        (math.nan, math.inf, []),
        (math.nan, 1e-6, []),
    ],
)
def test_an_error_that_grows_beyond_the_factor_is_drift(old: float, new: float, kinds: list[str]) -> None:
    assert drift_of(a_stage(error=old), a_stage(error=new)) == kinds


def test_factor_decides_how_much_growth_is_drift() -> None:
    old, new = a_stage(error=1e-5), a_stage(error=3e-5)
    assert (FACTOR, FLOOR) == (2.0, 1e-3)
    assert drift_of(old, new, factor=1.0) == drift_of(old, new) == ["error"]
    assert drift_of(old, new, factor=3.1) == []


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (a_stage(), None, ["coverage"]),
        (a_stage(), not_run("onnxruntime/prefill"), ["coverage"]),
        (a_stage(error=1.0), not_run("onnxruntime/prefill"), ["coverage"]),  # a failure that nobody sees any more
        (not_run(), None, []),
        (None, not_run(), []),
        (not_run("onnxruntime/prefill"), a_stage(), []),
        (None, a_stage(), []),
        (None, a_stage(error=1.0), ["verdict"]),
        (not_run("onnxruntime/prefill"), a_stage(error=1.0), ["verdict"]),
        (not_run(), not_run(reason="another"), []),
    ],
)
def test_coverage_that_is_lost_is_drift(old: Stage | None, new: Stage | None, kinds: list[str]) -> None:
    assert drift_of(old, new) == kinds


def test_limit_that_hides_an_error_is_drift() -> None:
    stage = a_stage()
    other = Tolerance(value=1e-4, metric="top1", why="")
    assert drift_of(stage, a_stage(limit=1e-3)) == ["limit"]
    assert drift_of(stage, a_stage(limit=1.5e-4)) == []
    assert drift_of(stage, a_stage(limit=1e-5)) == ["error"]  # the same error uses more of less
    assert drift_of(a_stage(error=0.0, limit=0.0), a_stage(error=0.0, limit=1e-9)) == ["limit"]
    assert drift_of(stage, dataclasses.replace(stage, tolerance=None)) == ["limit"]
    assert drift_of(dataclasses.replace(stage, tolerance=None), stage) == []
    changed = dataclasses.replace(stage, tolerance=other, metrics={"top1": 0.0, "max_abs": 1.0})
    assert drift_of(stage, changed) == ["limit"]


def test_report_that_fails_by_a_new_requirement_is_drift() -> None:
    old, new = REPORTS["not-run"], dataclasses.replace(REPORTS["not-run"], required=("engine",))
    found = diff_reports(old, new)
    assert [(drift.kind, drift.said) for drift in found.drift] == [
        ("verdict", "it passed before and fails; required but not run: engine")
    ]
    assert found.drifted
    assert not diff_reports(new, old).drifted


def test_changed_versions_hashes_and_facts_are_listed_and_no_drift() -> None:
    old = REPORTS["pass"]
    new = dataclasses.replace(
        old,
        environment={**old.environment, "python": "3.12", "torch": "2.13"},
        hashes={},
        model={**old.model, "name": "elsewhere", "new_fact": 1},
        created_at="2026-02-01T00:00:00+00:00",
    )
    found = diff_reports(old, new)
    assert not found.drifted
    assert found.changes == {
        "model": {"name": ("tiny", "elsewhere"), "new_fact": (None, 1)},
        "environment": {"python": ("3.11", "3.12"), "torch": (None, "2.13")},
        "hashes": {"model.onnx": ("sha256 00ff", None)},
        "report": {},
    }
    for form in (printed(found), markdown_from_diff(found)):
        assert "environment, python: 3.12; before 3.11" in form
        assert "environment, torch: 2.13; before nothing" in form


def test_reports_about_different_models_are_refused(tmp_path: Path, capsys: Capture) -> None:
    old = a_report(a_stage(), model={"name": "tiny", "dtype": "float32", "hidden_size": 64})
    new = dataclasses.replace(old, model={"name": "tiny", "dtype": "float16", "hidden_size": 64})
    paths = [write_report(report, tmp_path / name)["json"] for name, report in (("old", old), ("new", new))]
    said = check_refused(capsys, tmp_path, ["report", "diff", *paths], "about different models", "dtype:")
    assert "'float32' in the old report, 'float16' in the new" in said
    assert "hidden_size" not in said


# ---- the command ------------------------------------------------------------------------------------------------


def test_exit_code_is_5_for_drift_and_0_without(tmp_path: Path, capsys: Capture) -> None:
    old = write_report(REPORTS["pass"], tmp_path / "old")["json"].parent
    new = write_report(a_report(a_stage(error=3.1e-5), not_run("onnxruntime/greedy")), tmp_path / "new")["json"]
    markdown = tmp_path / "diff.md"
    assert main(["report", "diff", str(old), str(old)]) == 0
    assert capsys.readouterr().out.startswith("NO DRIFT: 2 stages, 2 measured in both reports")
    assert main(["report", "diff", str(old), str(new), "--markdown", str(markdown)]) == 5
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\nDRIFT: 2 of 2 stages, 1 measured in both reports" in captured.out
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith("## ✗ Parity drift\n")
    assert "| `onnxruntime/prefill` | PASS | PASS | 0.031 | 0.31 | 10 | DRIFT |" in text
    assert "- `onnxruntime/greedy`: **coverage**: it ran before and does not run now: No GPU on this machine." in text
    assert main(["report", "diff", str(old), str(new), "--factor", "11", "--json"]) == 5  # the coverage
    data = document(capsys.readouterr().out)
    assert [[drift["kind"] for drift in stage["drift"]] for stage in data["stages"]] == [[], ["coverage"]]
    assert main(["report", "diff", str(new), str(old)]) == 0


def test_documented_keys_of_the_diff_are_those_it_prints(tmp_path: Path, capsys: Capture) -> None:
    path = write_report(REPORTS["nan"], tmp_path)["json"]
    assert main(["report", "diff", str(path), str(path), "--json"]) == 0
    data = document(capsys.readouterr().out)
    text = (Path(__file__).parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
    section = text.split("## Drift")[1]
    for key in (*data, *data["stages"][0], *data["changes"], *data["old"]):
        assert f"`{key}`" in section, key
    assert data["schema_version"] == 1
    assert data["stages"][0]["old_share"] == "inf"


@pytest.mark.parametrize("options", [["--factor", "0.5"], ["--factor", "much"], []])
def test_wrong_usage_of_diff_is_exit_2(options: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main(["report", "diff", str(tmp_path), *([str(tmp_path)] if options else []), *options]) == 2
    assert "Usage: llama-export report diff" in capsys.readouterr().err


def test_markdown_that_cannot_be_written_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = write_report(REPORTS["pass"], tmp_path)["json"]
    check_refused(
        capsys, tmp_path, ["report", "diff", path, path, "--markdown", tmp_path / "none" / "diff.md"], "diff.md"
    )


def test_diff_needs_neither_torch_nor_matplotlib_nor_onnxruntime(tmp_path: Path) -> None:
    heavy = (
        "torch",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnx_ir",
        "transformers",
        "matplotlib",
        "tensorrt",
        "safetensors",
    )
    path = str(write_report(REPORTS["pass"], tmp_path)["json"])
    (found,) = run_without(heavy, ["report", "diff", path, path])
    assert (found[0], found[2], found[3]) == (0, "", [])


def test_diff_fits_80_columns_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    old = a_report(a_stage("engine/execution/float32-plugin-c512-b4.tensorrt-rtx"), a_stage("graph/rope", 1e-15, 1e-9))
    new = a_report(
        a_stage("engine/execution/float32-plugin-c512-b4.tensorrt-rtx", 5e-5), a_stage("graph/rope", 0, 1e-9)
    )
    shown = printed(diff_reports(old, new))
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "its error uses 0.5 of the limit, before 0.031" in " ".join(shown.split())
    assert "DRIFT: 1 of 2 stages" in shown
    assert len(printed(diff_reports(old, new), 20).splitlines()) > 10


def test_hostile_reports_are_shown_as_text() -> None:
    found = diff_reports(a_report(model=REPORTS["hostile"].model), REPORTS["hostile"])
    assert "\x1b" not in printed(found)
    assert "[red]" in printed(found, 400)
    for line in markdown_from_diff(found).splitlines():
        assert "<script" not in re.sub(r"`[^`]*`", "", line)
