"""Writes a :class:`ParityReport` for each of its readers: JSON, a self-contained page, a comment, JUnit, a terminal.
What changed between two of them (:class:`ReportDiff`) goes to a terminal or a comment.

Role: the last step of ``validate``. It judges nothing: verdicts come from :mod:`llama_export.parity.report.result`, and every
form shows the same ones. A stage that did not run is listed as such in each of them. Figures need matplotlib.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_export import __version__
from llama_export._system.files import leads_out
from llama_export._system.text import printable
from llama_export.bundle.destination import json_bytes, write_atomically, write_error
from llama_export.errors import ConfigError
from llama_export.parity.report.diff import ReportDiff, StageDiff
from llama_export.parity.report.plots import plot_logits, plot_overview, plot_series
from llama_export.parity.report.result import ParityReport
from llama_export.parity.report.wording import (
    NOT_SELECTED,
    STYLES,
    SYMBOLS,
    WORDS,
    clean,
    code,
    headline,
    in_words,
    margin,
    not_run_by_reason,
    numbers,
    place_in_words,
    prose,
    quoted,
    short,
    tally,
    tally_of_selected,
    worst_element,
)


def check_plots() -> bool:
    """Whether figures can be drawn: whether matplotlib is installed. A report without figures says how to get them.

    Raises:
        ConfigError: SOURCE_DATE_EPOCH, which matplotlib reads, is not a time; better now than after the work.
    """
    stated = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        datetime.fromtimestamp(int(stated or 0), UTC)
    except (ValueError, OverflowError, OSError) as err:
        raise ConfigError(
            "the environment variable SOURCE_DATE_EPOCH is not a time",
            details={"got": ascii(stated), "expected": "seconds since 1970, as in 1700000000"},
            hint="unset it",
        ) from err
    try:
        return importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # blocked in sys.modules
        return False


def report_folder(bundle: Path) -> Path:
    """Where the report of a bundle goes by default.

    Raises:
        ConfigError: it is a symbolic link out of the bundle.
    """
    folder = bundle / "report"
    for path in (folder, folder / "operations"):
        if (real := leads_out(path)) is not None:
            raise ConfigError(
                f"`{path}` is a symbolic link out of the bundle",
                details={"got": real, "expected": "a folder in the bundle"},
                hint=f"remove the link, or say where the report goes: --report {shlex.quote(real)}",
            )
    return folder


def write_report(report: ParityReport, folder: Path, *, plots: bool = True) -> dict[str, Path]:
    """Writes ``parity.html``, ``parity.md``, ``junit.xml`` and, last, ``parity.json``. Same report, same bytes.

    Args:
        report: what a validation found.
        folder: made if need be; files of an earlier report in it are replaced one by one.
        plots: draw them where matplotlib is installed, which takes a second or more.

    Returns:
        Paths by kind: ``html``, ``markdown``, ``junit``, ``json``.

    Raises:
        ToolchainError: no space. ExportError: any other failure to write.
    """
    files = {
        "html": ("parity.html", html_from_report(report, plots=plots).encode()),
        "markdown": ("parity.md", markdown_from_report(report).encode()),
        "junit": ("junit.xml", junit_from_report(report)),
        "json": ("parity.json", json_bytes(clean(report.to_json()))),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise write_error(err, folder) from err
    for stale in folder.glob(".*.*.partial"):  # left by killed processes of versions that wrote such files
        if _PARTIAL.fullmatch(stale.name):
            stale.unlink(missing_ok=True)
    for name, data in files.values():
        write_atomically(folder / name, data)
    return {kind: folder / name for kind, (name, _) in files.items()}


_PARTIAL = re.compile(r"\.(?:parity\.html|parity\.md|junit\.xml|parity\.json)\.[0-9]+\.partial")


def html_from_report(report: ParityReport, *, plots: bool = True) -> str:
    """One page without scripts or external resources; without figures where matplotlib is not installed."""
    drawings: dict[str, Any] = (
        {
            "overview": None,
            "plots": [],
            "logits": [],
        }
        if not plots or not check_plots()
        else {
            "overview": plot_overview(report),
            "plots": [(stage, *plot) for stage in report.stages for plot in plot_series(stage)],
            "logits": [(stage, *plot) for stage in report.stages if (plot := plot_logits(stage)) is not None],
        }
    )
    return _render("report.html.j2", report, **drawings, version=__version__)


def markdown_from_report(report: ParityReport) -> str:
    """A comment for a pull request: verdict first, then a table, then what failed or did not run."""
    return _render("report.md.j2", report)


def junit_from_report(report: ParityReport) -> bytes:
    """One test case per stage and one failed case per missing requirement. A failed report never reads as green."""
    root = ET.Element("testsuites")
    suite = ET.SubElement(root, "testsuite", name="llama_export.parity", timestamp=report.created_at)

    def case(group: str, name: str, seconds: float = 0.0) -> ET.Element:
        facts = {"classname": f"llama_export.parity.{group}", "name": name, "time": f"{seconds:.3f}"}
        return ET.SubElement(suite, "testcase", facts)

    for stage in report.stages:
        element = case(stage.name.partition("/")[0], stage.name, stage.seconds)
        facts = "\n".join(f"{key}: {in_words(value)}" for key, value in stage.metrics.items())
        if stage.verdict == "fail":
            failure = ET.SubElement(element, "failure", type="parity", message=stage.reason)
            if stage.tolerance:
                error, limit, _ = numbers(stage)
                said = f"{stage.tolerance.metric} {short(error)}, limit {short(limit)}, {margin(stage)}"
                failure.set("message", f"{stage.reason} ({said})")
                facts += f"\nwhy this limit: {stage.tolerance.why}"
            if stage.first_divergence:
                facts += f"\nfirst divergence: {place_in_words(stage.first_divergence)}"
            failure.text = f"{facts}\nworst element: {worst_element(stage) or 'not known'}"
        elif stage.verdict == "not-run":
            ET.SubElement(element, "skipped", message=stage.reason)
        elif facts:
            ET.SubElement(element, "system-out").text = facts
    for name in report.missing:
        message = f"`{name}` is required and did not run"
        ET.SubElement(case("required", f"required: {name}"), "failure", type="required", message=message)
    if report.verdict == "fail" and suite.find("testcase/failure") is None:
        ET.SubElement(case("verdict", "verdict"), "failure", type="verdict", message=headline(report))
    for key, path in {"tests": "testcase", "failures": "testcase/failure", "skipped": "testcase/skipped"}.items():
        suite.set(key, str(len(suite.findall(path))))
    suite.attrib.update(errors="0", time=f"{sum(stage.seconds for stage in report.stages):.3f}")
    for element in root.iter():
        element.attrib.update(clean(element.attrib))
        element.text = clean(element.text)
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def print_summary(report: ParityReport, console: Console) -> None:
    """Prints the table, the reasons of what failed or did not run, and one line with verdict and counts.

    Legible at 80 columns and without colour: every colour only repeats a word.
    """

    def text(plain: str, verdict: str = "") -> Text:
        return Text(printable(clean(plain)), STYLES.get(verdict, ""))

    table = _table(
        console.width,
        {"stage": "name", "metric": "metric", "error": "number", "limit": "number", "margin": "number", "verdict": ""},
    )
    details = Table.grid(padding=(0, 1), pad_edge=False)
    for stage in report.stages:
        if stage.verdict != "not-run":
            error, limit, _ = numbers(stage)
            metric = stage.tolerance.metric if stage.tolerance else ""
            cells = stage.name, metric, short(error), short(limit), margin(stage)
            table.add_row(*(text(cell or "-") for cell in cells), text(WORDS[stage.verdict], stage.verdict))
        if stage.verdict == "fail":
            worst = f"\nworst element: {worst_element(stage)}" if stage.worst else ""
            details.add_row(text(WORDS["fail"], "fail"), text(f"{stage.name}: {stage.reason}{worst}"))
    for reason, names in not_run_by_reason(report).items():
        if reason == NOT_SELECTED:
            continue  # the last line counts them
        details.add_row(text(WORDS["not-run"], "not-run"), text(f"{', '.join(names)}: {reason}"))
    for part in (table, details):
        if part.row_count:
            console.print(part)
    if report.first_divergence:
        console.print(text(f"first divergence: {place_in_words(report.first_divergence)}", "fail"))
    if report.missing:
        console.print(text(f"required but not run: {', '.join(report.missing)}", "fail"))
    console.print(text(f"{WORDS[report.verdict]}: {tally_of_selected(report)}", report.verdict))


def _table(width: int, columns: Mapping[str, str]) -> Table:
    """A table of a terminal. Its names fold where the terminal is narrow; numbers and verdicts never do.

    Args:
        width: of the terminal, columns.
        columns: heading -> ``name``, ``metric`` (a name that folds first), ``number``, or nothing for a word.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    for heading, kind in columns.items():
        if kind in ("name", "metric"):
            most = max(13, width // 6) if kind == "metric" else None
            table.add_column(heading, overflow="fold", min_width=7, max_width=most)
        else:
            table.add_column(heading, justify="right" if kind == "number" else "left", no_wrap=True)
    return table


def print_diff(diff: ReportDiff, console: Console) -> None:
    """Prints the stages whose share of the limit moved, then each drift and note, what else changed, and the outcome.
    A stage that drifted is told once, by its sentence.

    Legible at 80 columns and without colour, as :func:`print_summary` is.
    """

    def text(plain: str, style: str = "") -> Text:
        return Text(printable(clean(plain)), style)

    table = _table(
        console.width,
        {"stage": "name", "before": "", "now": "", "share": "number", "share now": "number", "growth": "number"},
    )
    details = Table.grid(padding=(0, 1), pad_edge=False)
    for stage in diff.stages:
        if not (stage.is_same or stage.drift or stage.notes):  # those are told below, once
            table.add_row(*map(text, _diff_cells(stage)))
    for name, kind, said in _sentences(diff):
        word = text("note", STYLES["not-run"]) if kind == "note" else text("DRIFT", STYLES["fail"])
        details.add_row(word, text(f"{name}: {said}"))
    for change in _other_changes(diff):
        details.add_row(text("changed", STYLES["not-run"]), text(change))
    for part in (table, details):
        if part.row_count:
            console.print(part)
    console.print(text(_outcome(diff), STYLES["fail" if diff.drifted else "pass"]))


def markdown_from_diff(diff: ReportDiff) -> str:
    """The same as a comment for a pull request."""
    changed = [(stage, _diff_cells(stage)) for stage in diff.stages if not stage.is_same]
    facts = {"said": list(_sentences(diff)), "other": list(_other_changes(diff)), "outcome": _outcome(diff)}
    return _environment().get_template("diff.md.j2").render(facts | {"diff": diff, "changed": changed})


def _diff_cells(stage: StageDiff) -> tuple[str, ...]:
    """Name, verdicts, shares of the limit, growth."""
    verdicts = (WORDS[verdict] if verdict else "-" for verdict in (stage.old_verdict, stage.new_verdict))
    numbers = (short(value) or "-" for value in (stage.old_share, stage.new_share, stage.growth))
    return (stage.name, *verdicts, *numbers)


def _sentences(diff: ReportDiff) -> Iterator[tuple[str, str, str]]:
    """(stage, kind of drift or ``note``, what happened), the report's own first."""
    yield from (("report", drift.kind, drift.said) for drift in diff.drift)
    for stage in diff.stages:
        yield from ((stage.name, drift.kind, drift.said) for drift in stage.drift)
        yield from ((stage.name, "note", note) for note in stage.notes)


def _other_changes(diff: ReportDiff) -> Iterator[str]:
    """Where a drift may come from, a line each."""
    for group, changes in diff.changes.items():
        for key, (old, new) in changes.items():
            before, now = ("nothing" if side in (None, [], "") else in_words(side) for side in (old, new))
            yield f"{group}, {key}: {now}; before {before}"


def _outcome(diff: ReportDiff) -> str:
    """One line that says what was compared with what."""
    both = sum(stage.growth is not None for stage in diff.stages)
    drifted = sum(bool(stage.drift) for stage in diff.stages)
    found = f"DRIFT: {drifted} of {len(diff.stages)} stages" if diff.drifted else f"NO DRIFT: {len(diff.stages)} stages"
    return f"{found}, {both} measured in both reports, {diff.old['created_at']} to {diff.new['created_at']}"


def _render(template: str, report: ParityReport, **more: Any) -> str:
    by_verdict = {key: [stage for stage in report.stages if stage.verdict == key] for key in WORDS}
    facts = {
        "report": report, "by_verdict": by_verdict, "not_run": not_run_by_reason(report), "tally": tally(report), "headline": headline(report),
    }  # fmt: skip
    return _environment().get_template(template).render(facts | more)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llama_export.parity.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=clean,
    )
    environment.filters.update(value=in_words, short=short, code=code, prose=prose, quoted=quoted)
    environment.globals.update(
        words=WORDS, symbols=SYMBOLS, numbers=numbers, margin=margin, worst=worst_element, zip=zip
    )
    return environment
