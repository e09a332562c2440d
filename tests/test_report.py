"""The report's forms agree with each other, survive hostile content, and never let a pass hide what was not run."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llama_export.parity.report import wording
from llama_export.parity.report.pages import (
    html_from_report,
    junit_from_report,
    markdown_from_report,
    print_summary,
    write_report,
)
from llama_export.parity.report.result import (
    LogitsSample,
    ParityReport,
    Stage,
    Tolerance,
    TopChoices,
    TopLogit,
    WorstElement,
)

HOSTILE = '<script>alert("x")</script> `|` $\\frac$ [red] \x1b[31m \x00 \ud800 <img src=https://evil.example/x>'


def a_stage(name: str = "onnxruntime/prefill", error: float = 3.1e-6, limit: float = 1e-4, **changes: Any) -> Stage:
    facts: dict[str, Any] = {
        "name": name,
        "verdict": "pass" if error <= limit else "fail",
        "reason": f"{name} against the reference.",
        "metrics": {"max_abs": error, "top1": 1.0},
        "tolerance": Tolerance(value=limit, metric="max_abs", why="float32 rounding of 64 terms"),
        "worst": WorstElement(tensor="logits", layer=None, index=(0, 3), got=1.5, want=1.25),
        "seconds": 0.25,
    }
    return Stage(**(facts | changes))


def not_run(name: str = "engine/execution", reason: str = "No GPU on this machine.") -> Stage:
    return Stage(name=name, verdict="not-run", reason=reason)


def a_report(*stages: Stage, required: tuple[str, ...] = (), **changes: Any) -> ParityReport:
    facts: dict[str, Any] = {
        "environment": {"command": "llama-export validate bundle", "python": "3.11"},
        "hashes": {"model.onnx": "sha256 00ff"},
        "model": {"name": "tiny", "rope": {"type": "default"}, "eos_token_ids": (2,)},
        "created_at": "2026-01-02T03:04:05+00:00",
        "deviations": ("RoPE stays in float32.",),
    }
    return ParityReport(stages=stages, required=required, **(facts | changes))


def a_sample(got: tuple[float, ...] = (2.5, -1.0, 0.5), text: str | None = " def\n") -> LogitsSample:
    want = (2.25, -1.0, 0.5)
    sides = [
        tuple(TopLogit(token=t, text=text, logit=v) for t, v in zip((7, 3), side, strict=False)) for side in (got, want)
    ]
    top = TopChoices(position=0, where="end of the prompt", got=sides[0], want=sides[1][::-1])
    return LogitsSample(
        compared=97, positions=(0, 0, 1)[: len(got)], tokens=(7, 3, 5)[: len(got)], got=got, want=want[: len(got)], top=(top,)
    )  # fmt: skip


SERIES = {"max_abs": [1e-6, 0.0, math.nan, 2e-6], "max_abs per layer": [1e-7, 3e-7], "other": [0.0, 0.0], "empty": []}
REPORTS = {
    "pass": a_report(a_stage(series=SERIES), a_stage("onnxruntime/greedy", 0.0, 0.0)),
    "not-run": a_report(a_stage(), not_run()),
    "fail": a_report(a_stage(), a_stage("onnxruntime/decode", 0.5, first_divergence={"layer": 3, "op": "add"})),
    "nan": a_report(a_stage(error=math.nan), a_stage("onnxruntime/cache", math.inf)),
    "missing": a_report(a_stage(), not_run(), required=("onnxruntime", "engine/execution")),
    "only-not-run": a_report(not_run()),
    "zero": a_report(),
    "logits": a_report(
        a_stage(logits=a_sample()), a_stage("onnxruntime/decode", logits=a_sample((math.nan, math.inf, 1e308), None)),
        a_stage("evaluator/float16", logits=a_sample((math.nan,))),
    ),
    "no-tolerance": a_report(a_stage("engine/structure", tolerance=None, worst=None)),
    "hostile": a_report(
        a_stage(HOSTILE, 0.5, reason=HOSTILE, metrics={"max_abs": 0.5, HOSTILE: HOSTILE}, series={HOSTILE: [1.0]},
            first_divergence={HOSTILE: HOSTILE}, logits=a_sample(text=HOSTILE),
        ),
        not_run("engine/" + HOSTILE, HOSTILE),
        required=(HOSTILE + "/required",),
        environment={"command": HOSTILE, HOSTILE: HOSTILE},
        hashes={HOSTILE: HOSTILE},
        model={"name": HOSTILE, HOSTILE: [HOSTILE]},
        deviations=(HOSTILE,),
    ),
}  # fmt: skip
FAILED = {"fail", "nan", "missing", "only-not-run", "zero", "hostile"}
every_report = pytest.mark.parametrize(("tag", "report"), REPORTS.items(), ids=REPORTS)


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = frozenset({"meta", "br", "use"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def printed(report: ParityReport, width: int = 80) -> str:
    stream = io.StringIO()
    print_summary(report, Console(file=stream, width=width))
    return stream.getvalue()


@every_report
def test_every_form_states_the_same_verdict(tag: str, report: ParityReport) -> None:
    assert report.verdict == ("fail" if tag in FAILED else "pass")
    word = report.verdict.upper()
    assert re.search(rf"[✓✗] {word}\b", Page(html_from_report(report)).text)
    assert markdown_from_report(report).splitlines()[0].endswith(f"Parity {word}")
    assert printed(report).splitlines()[-1].startswith(f"{word}: ")
    assert (ET.fromstring(junit_from_report(report)).find(".//failure") is not None) == (word == "FAIL")


@every_report
def test_json_is_strict_and_round_trips(tag: str, report: ParityReport, tmp_path: Path) -> None:
    def refuse(literal: str) -> None:
        pytest.fail(f"{literal} is not JSON")

    path = write_report(report, tmp_path)["json"]
    document = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    if tag != "hostile":
        assert document == json.loads(json.dumps(report.to_json()))
    assert document["schema_version"] == 1
    assert document["verdict"] == report.verdict
    assert len(document["stages"]) == len(report.stages)


def test_non_finite_numbers_are_strings_in_json(tmp_path: Path) -> None:
    report = a_report(a_stage(error=math.nan, series={"max_abs": [math.inf, -math.inf, 1.0]}))
    (stage,) = json.loads(write_report(report, tmp_path)["json"].read_text())["stages"]
    assert stage["metrics"]["max_abs"] == "nan"
    assert stage["series"]["max_abs"] == ["inf", "-inf", 1.0]


@every_report
def test_same_report_gives_the_same_bytes(tag: str, report: ParityReport, tmp_path: Path) -> None:
    first, second = write_report(report, tmp_path / "a"), write_report(report, tmp_path / "b")
    assert {kind: path.name for kind, path in first.items()} == {
        "json": "parity.json",
        "html": "parity.html",
        "markdown": "parity.md",
        "junit": "junit.xml",
    }
    for kind in first:
        assert first[kind].read_bytes() == second[kind].read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(path.name for path in first.values())


@every_report
def test_junit_counts_what_it_holds(tag: str, report: ParityReport) -> None:
    suite = ET.fromstring(junit_from_report(report))[0]
    cases = suite.findall("testcase")
    extra = len(report.missing) or (report.verdict == "fail" and all(s.verdict != "fail" for s in report.stages))
    assert len(cases) == len(report.stages) + extra == int(suite.attrib["tests"])
    assert sum(case.find("failure") is not None for case in cases) == int(suite.attrib["failures"])
    assert sum(case.find("skipped") is not None for case in cases) == int(suite.attrib["skipped"])
    assert int(suite.attrib["skipped"]) == sum(stage.verdict == "not-run" for stage in report.stages)


def test_junit_names_metric_reason_and_requirement() -> None:
    root = ET.fromstring(junit_from_report(REPORTS["fail"]))
    (failure,) = root.iter("failure")
    assert (
        failure.attrib["message"]
        == "onnxruntime/decode against the reference. (max_abs 0.5, limit 0.0001, 5000 x over)"
    )
    assert "logits[0, 3]: got 1.5, want 1.25" in (failure.text or "")
    root = ET.fromstring(junit_from_report(REPORTS["missing"]))
    assert [element.attrib["message"] for element in root.iter("skipped")] == ["No GPU on this machine."]
    assert [element.attrib["message"] for element in root.iter("failure")] == [
        "`engine/execution` is required and did not run"
    ]


@every_report
def test_page_is_well_formed_and_loads_nothing(tag: str, report: ParityReport) -> None:
    source = html_from_report(report)
    page = Page(source)
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        assert not {name for name in attributes if name == "src" or name.startswith("on")}
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", source)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if (attributes.get("href") or "").startswith("#"):
            assert str(attributes["href"])[1:] in ids
    if tag != "hostile":
        assert "http:" not in source
        assert "https:" not in source


def test_hostile_text_is_shown_as_text() -> None:
    report = REPORTS["hostile"]
    page = Page(html_from_report(report))
    assert page.text.count('<script>alert("x")</script>') > 8
    assert "\x1b" not in page.text
    markdown = markdown_from_report(report)
    for line in markdown.splitlines():
        outside_code = re.sub(r"`[^`]*`", "", line)
        assert "<script" not in outside_code
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}
    assert "\x1b" not in printed(report)
    assert "[red]" in printed(report, 400)


@every_report
def test_not_run_stages_and_reasons_are_in_every_form(tag: str, report: ParityReport) -> None:
    if tag == "hostile":
        return
    forms = Page(html_from_report(report)).text, markdown_from_report(report), printed(report)
    count = sum(stage.verdict == "not-run" for stage in report.stages)
    for form in forms:
        for name in report.missing:
            assert name in form
            assert "equired but not run" in form
        for stage in report.stages:
            if stage.verdict == "not-run":
                assert stage.name in form
                assert stage.reason in form
    assert f"{count} not run" in re.sub(r"\s+", " ", forms[0])
    assert f"{count} not run" in forms[1]
    assert f"{count} not run" in forms[2]


def test_page_shows_limits_reasons_plots_and_facts() -> None:
    source = html_from_report(REPORTS["pass"])
    text = Page(source).text
    for expected in (
        "float32 rounding of 64 terms", "32 x inside", "0.031", "exact", "logits[0, 3]: got 1.5, want 1.25",
        "RoPE stays in float32.", "llama-export validate bundle", "sha256 00ff", "type: default", "limit 0.0001",
        "4 steps; largest 2e-06 at step 3; 1 exact (drawn on the floor); 1 not finite (crosses at the top)",
        "2 layers; largest 3e-07 at layer 1",
    ):  # fmt: skip
        assert expected in text
    drawings = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    assert len(drawings) == 4
    assert all('role="img"' in drawing and "aria-label=" in drawing for drawing in drawings)
    assert ["limit 0.0001" in drawing for drawing in drawings] == [False, True, True, False]
    assert not re.search(r"#0(\d)0\1", "".join(drawings))
    assert "<svg" not in html_from_report(REPORTS["zero"])


def test_page_shows_logits_as_points_and_first_choices_side_by_side() -> None:
    source = html_from_report(REPORTS["logits"])
    page = Page(source)
    for expected in (
        "3 of 97 logits", "ring: largest error 0.25 at position 0, token 7", "not drawn: 3 that are not finite, or beyond 1e+300",
        "1 of 97 logits", "not drawn: 1 that", "end of the prompt", '"\N{NO-BREAK SPACE}def\\n"', "other", "got - want",
    ):  # fmt: skip
        assert expected in page.text
    drawings = re.findall(r'<svg[^>]*aria-label="([^"]*)".*?</svg>', source, flags=re.DOTALL)
    assert sum("logits, got over want" in name for name in drawings) == 3
    assert [tag for tag, _ in page.tags].count("table") == 1 + 3
    assert "Logits" not in html_from_report(a_report(not_run()))


def test_markdown_puts_the_verdict_first_and_escapes_cells() -> None:
    lines = markdown_from_report(REPORTS["fail"]).splitlines()
    assert lines[:3] == ["## ✗ Parity FAIL", "", "2 of 2 stages ran; 1 failed. 1 passed, 1 failed, 0 not run."]
    assert "| `onnxruntime/decode` | `max_abs` | 0.5 | 0.0001 | 5000 x over | ✗ FAIL |" in lines
    start = lines.index("|---|---|--:|--:|--:|---|")
    assert all(line.startswith("|") for line in lines[start - 1 : start + 3])
    assert "\n\n\n" not in markdown_from_report(REPORTS["missing"])


@pytest.mark.parametrize(
    ("error", "limit", "words"),
    [
        (1e-6, 1e-4, "100 x inside"),
        (1e-4, 1e-4, "1 x inside"),
        (1.5, 1.0, "1.5 x over"),
        (0.0, 0.0, "exact"),
        (1.0, 0.0, "over"),
        (math.nan, 1.0, "not finite"),
        (math.inf, 1.0, "not finite"),
        (5e-324, 1e3, "1e+300 x inside"),
    ],
)
def test_margin_in_words(error: float, limit: float, words: str) -> None:
    assert wording.margin(a_stage(error=error, limit=limit)) == words


def test_summary_fits_80_columns_without_colour_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    names = ("onnxruntime/chunked-prefill", "graph/float64-bodies")
    stages = [a_stage(names[0], metrics={"max_abs": 1.23e-6}), a_stage(names[1], 1.11e-15, 1e-9)]
    noise = Tolerance(value=2, metric="l2_over_noise_floor", why="noise floor")
    stages.append(a_stage("evaluator/bfloat16", tolerance=noise, metrics={"l2_over_noise_floor": 1.13}))
    shown = printed(a_report(*stages, not_run(reason="No GPU here. " * 12)))
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for expected in (
        *names,
        "1.23e-06",
        "0.0001",
        "81 x inside",
        "9e+05 x inside",
        "verdict",
        "NOT RUN engine/execution",
    ):
        assert expected in shown
    assert shown.count("PASS") == 4
    assert "l2_over_noise_floor" in printed(a_report(*stages), width=120)


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    write_report(REPORTS["pass"], tmp_path)
    paths = write_report(dataclasses.replace(REPORTS["fail"], created_at="2026-01-03T00:00:00+00:00"), tmp_path)
    assert json.loads(paths["json"].read_text())["created_at"] == "2026-01-03T00:00:00+00:00"
    assert len(list(tmp_path.iterdir())) == 4


def test_documented_example_has_the_keys_of_a_report() -> None:
    text = (Path(__file__).parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    documented, written = json.loads(example), REPORTS["not-run"].to_json()
    assert documented.keys() == written.keys()
    for ours, theirs in zip(documented["stages"], written["stages"], strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["tolerance"] or {}).keys() == (theirs["tolerance"] or {}).keys()
        assert (ours["worst"] or {}).keys() == (theirs["worst"] or {}).keys()
    (sample,) = (stage["logits"] for stage in REPORTS["logits"].to_json()["stages"][:1])
    for key in (*sample, *sample["top"][0], *sample["top"][0]["got"][0]):
        assert f"`{key}`" in text
    for ours in documented["stages"]:
        for key in (*ours, *documented):
            assert f"`{key}`" in text


def test_worst_element_shows_the_digits_that_differ() -> None:
    worst = WorstElement(tensor="present.1.key", layer=1, index=(0, 2), got=0.1 + 0.2, want=0.3)
    shown = wording.worst_element(a_stage(worst=worst))
    assert shown == "layer 1, present.1.key[0, 2]: got 0.30000000000000004, want 0.29999999999999999"
