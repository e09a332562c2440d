"""Writes a :class:`ParityReport` for each of its readers: JSON, a self-contained page, a comment, JUnit, a terminal.

Role: the last step of ``validate``. It judges nothing: verdicts come from :mod:`llama_export.parity.result`, and every
form shows the same ones. A stage that did not run is listed as such in each of them. Needs matplotlib for the plots.
"""

from __future__ import annotations

import html
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_export import __version__
from llama_export.bundle import json_bytes, write_atomically, write_error
from llama_export.errors import MissingDependencyError
from llama_export.parity.result import ParityReport, Stage

_WORDS = {"pass": "PASS", "fail": "FAIL", "not-run": "NOT RUN"}
_SYMBOLS = {"pass": "✓", "fail": "✗", "not-run": "○"}
_STYLES = {"pass": "bold green", "fail": "bold red", "not-run": "bold yellow"}
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 forbids or a terminal obeys: control characters, escape sequences, lone surrogates."""


def require_plots() -> None:
    """Raises now what :func:`write_report` would raise after the work.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as err:
        raise MissingDependencyError("matplotlib", "parity") from err


def write_report(report: ParityReport, folder: Path) -> dict[str, Path]:
    """Writes ``parity.html``, ``parity.md``, ``junit.xml`` and, last, ``parity.json``. Same report, same bytes.

    Args:
        report: what a validation found.
        folder: made if need be; files of an earlier report in it are replaced one by one.

    Returns:
        Paths by kind: ``html``, ``markdown``, ``junit``, ``json``.

    Raises:
        MissingDependencyError: matplotlib is not installed; nothing is written.
        ToolchainError: no space. ExportError: any other failure to write.
    """
    files = {
        "html": ("parity.html", html_from_report(report).encode()),
        "markdown": ("parity.md", markdown_from_report(report).encode()),
        "junit": ("junit.xml", junit_from_report(report)),
        "json": ("parity.json", json_bytes(_clean(report.to_json()))),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise write_error(err, folder) from err
    for name, data in files.values():
        write_atomically(folder / name, data)
    return {kind: folder / name for kind, (name, _) in files.items()}


def html_from_report(report: ParityReport) -> str:
    """One page without scripts or external resources.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plots = [(stage, *plot) for stage in report.stages for plot in _plot_series(stage)]
    return _render("report.html.j2", report, overview=_plot_overview(report), plots=plots, version=__version__)


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
        facts = "\n".join(f"{key}: {_value(value)}" for key, value in stage.metrics.items())
        if stage.verdict == "fail":
            failure = ET.SubElement(element, "failure", type="parity", message=stage.reason)
            if stage.tolerance:
                error, limit, _ = _numbers(stage)
                said = f"{stage.tolerance.metric} {_short(error)}, limit {_short(limit)}, {_margin(stage)}"
                failure.set("message", f"{stage.reason} ({said})")
                facts += f"\nwhy this limit: {stage.tolerance.why}"
            if stage.first_divergence:
                facts += f"\nfirst divergence: {_place(stage.first_divergence)}"
            failure.text = f"{facts}\nworst element: {_worst(stage) or 'not known'}"
        elif stage.verdict == "not-run":
            ET.SubElement(element, "skipped", message=stage.reason)
        elif facts:
            ET.SubElement(element, "system-out").text = facts
    for name in report.missing:
        message = f"`{name}` is required and did not run"
        ET.SubElement(case("required", f"required: {name}"), "failure", type="required", message=message)
    if report.verdict == "fail" and suite.find("testcase/failure") is None:
        ET.SubElement(case("verdict", "verdict"), "failure", type="verdict", message=_headline(report))
    for key, path in {"tests": "testcase", "failures": "testcase/failure", "skipped": "testcase/skipped"}.items():
        suite.set(key, str(len(suite.findall(path))))
    suite.attrib.update(errors="0", time=f"{sum(stage.seconds for stage in report.stages):.3f}")
    for element in root.iter():
        element.attrib.update(_clean(element.attrib))
        element.text = _clean(element.text)
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def print_summary(report: ParityReport, console: Console) -> None:
    """Prints the table, the reasons of what failed or did not run, and one line with verdict and counts.

    Legible at 80 columns and without colour: every colour only repeats a word.
    """

    def text(plain: str, verdict: str = "") -> Text:
        return Text(_clean(plain), _STYLES.get(verdict, ""))

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    metrics = [stage.tolerance.metric for stage in report.stages if stage.tolerance]
    widths = {"stage": 0, "metric": min(max(map(len, [*metrics, "metric"])), max(13, console.width // 6))}
    widths |= {"error": 8, "limit": 6, "margin": 14, "verdict": 7}
    widths["stage"] = max(console.width - sum(widths.values()) - len(widths) + 1, 7)  # both names fold
    for name, width in widths.items():
        right = name in ("error", "limit", "margin")
        table.add_column(name, overflow="fold", justify="right" if right else "left", max_width=width)
    details = Table.grid(padding=(0, 1), pad_edge=False)
    for stage in report.stages:
        if stage.verdict != "not-run":
            error, limit, _ = _numbers(stage)
            metric = stage.tolerance.metric if stage.tolerance else ""
            cells = stage.name, metric, _short(error), _short(limit), _margin(stage)
            table.add_row(*(text(cell or "-") for cell in cells), text(_WORDS[stage.verdict], stage.verdict))
        if stage.verdict != "pass":
            worst = f"\nworst element: {_worst(stage)}" if stage.worst else ""
            details.add_row(text(_WORDS[stage.verdict], stage.verdict), text(f"{stage.name}: {stage.reason}{worst}"))
    for part in (table, details):
        if part.row_count:
            console.print(part)
    if report.first_divergence:
        console.print(text(f"first divergence: {_place(report.first_divergence)}", "fail"))
    if report.missing:
        console.print(text(f"required but not run: {', '.join(report.missing)}", "fail"))
    console.print(text(f"{_WORDS[report.verdict]}: {_tally(report)}", report.verdict))


# ---- what every form shows --------------------------------------------------------------------------------------


def _numbers(stage: Stage) -> tuple[float | None, float | None, float | None]:
    """(error, limit, error over limit: how many times the tolerance would have been needed); None where not known."""
    if stage.tolerance is None:
        return None, None, None
    found, limit = stage.metrics.get(stage.tolerance.metric), stage.tolerance.value
    if not isinstance(found, (int, float)):
        return None, limit, None
    return float(found), limit, found / limit if limit else math.inf if found else 0.0


def _margin(stage: Stage) -> str:
    """The ratio in words; an error that is no number is never inside."""
    error, _, ratio = _numbers(stage)
    if error is None or ratio is None:
        return ""
    if not math.isfinite(error):
        return "not finite"
    if error == 0:
        return "exact"
    times = ratio if ratio > 1 else 1 / max(ratio, 1e-300)
    text = f"{times:.2g}" if times < 10 else f"{times:.0f}" if times < 1e4 else f"{times:.0e}"
    return "over" if math.isinf(ratio) else f"{text} x {'over' if ratio > 1 else 'inside'}"


def _worst(stage: Stage) -> str:
    worst = stage.worst
    if worst is None:
        return ""
    layer = "" if worst.layer is None else f"layer {worst.layer}, "
    index = ", ".join(map(str, worst.index))
    digits = 8 if f"{worst.got:.8g}" != f"{worst.want:.8g}" else 17  # float64 stages differ further down
    return f"{layer}{worst.tensor}[{index}]: got {worst.got:.{digits}g}, want {worst.want:.{digits}g}"


def _place(divergence: Mapping[str, Any]) -> str:
    """Where a fault begins, in one line."""
    return ", ".join(f"{key} {_value(item)}" for key, item in divergence.items())


def _counts(report: ParityReport) -> dict[str, int]:
    return {verdict: sum(stage.verdict == verdict for stage in report.stages) for verdict in _WORDS}


def _tally(report: ParityReport) -> str:
    counts = _counts(report)
    return f"{counts['pass']} passed, {counts['fail']} failed, {counts['not-run']} not run"


def _headline(report: ParityReport) -> str:
    """One sentence that does not let a pass hide what was not run."""
    counts = _counts(report)
    ran = counts["pass"] + counts["fail"]
    if not ran:
        return "No stage ran, so nothing is proven."
    found = "all that ran passed" if not counts["fail"] else f"{counts['fail']} failed"
    return f"{ran} of {len(report.stages)} stages ran; {found}."


def _render(template: str, report: ParityReport, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("llama_export.parity"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters.update(value=_value, short=_short, code=_code, prose=_prose)
    environment.globals.update(words=_WORDS, symbols=_SYMBOLS, numbers=_numbers, margin=_margin, worst=_worst)
    by_verdict = {key: [stage for stage in report.stages if stage.verdict == key] for key in _WORDS}
    facts = {"report": report, "by_verdict": by_verdict, "tally": _tally(report), "headline": _headline(report)}
    return environment.get_template(template).render(facts | more)


def _short(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.3g}"


def _value(value: object) -> str:
    """A metric, a config value: numbers short, long lists by their length and largest."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_clean(key)}: {_value(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > 8 and all(isinstance(item, (int, float)) for item in value):
            return f"{len(value)} values, largest {_short(max(value))}"
        return ", ".join(map(_value, value))
    return str(_clean(str(value)))


def _clean(value: Any) -> Any:
    """Replaces characters that a file or a terminal cannot take, in keys too."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def _code(text: object) -> str:
    """A Markdown code span, inert whatever it holds: nothing in it is markup, a mention or the end of a cell."""
    plain = " ".join(_value(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else "–"


def _prose(text: object) -> str:
    plain = html.escape(" ".join(_value(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)


# ---- plots ------------------------------------------------------------------------------------------------------

_INKS = {name: f"#0{i}0{i}0{i}" for i, name in enumerate(("ink", "muted", "line", "pass", "fail", "accent"), start=1)}
"""Stand-ins that become CSS variables after drawing, so that plots follow light, dark and print."""


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as err:
        raise MissingDependencyError("matplotlib", "parity") from err
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, labelcolor=_INKS["muted"], labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axis.set_minor_locator(NullLocator())
    axis.grid(True, color=_INKS["line"], linewidth=0.8)


def _svg(figure: Any, prefix: str, label: str) -> Markup:
    """The drawing as an element of the page: CSS colours and fonts, ids of its own, no dates, no name spaces."""
    import matplotlib as mpl

    stream, silent = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(stream, format="svg", transparent=True, metadata=silent)
    head, body = re.split(r"(?<=>)", stream.getvalue().partition("<svg")[2], maxsplit=1)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--sans)", body)
    for name, ink in _INKS.items():
        body = body.replace(ink, f"var(--{name})")
    view, name = re.findall(r'viewBox="[^"]*"', head)[0], html.escape(_clean(label))
    return Markup(f'<svg class="plot" role="img" aria-label="{name}" {view}>{body}')


def _label(text: str, width: int) -> str:
    """Text for a drawing: its font has no glyphs for everything, ``$`` means mathematics, and it must fit."""
    plain = "".join(char if char.isascii() and char.isprintable() and char != "$" else "?" for char in text)
    return plain if len(plain) <= width else plain[: width - 3] + "..."


def _drawable(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Values on a log axis, with its ends: exact zeros go to the floor, what is not finite to the ceiling."""
    finite = [abs(value) for value in values if math.isfinite(value) and value]
    floor, ceiling = (max(min(finite) / 10, 1e-300), min(max(finite) * 10, 1e300)) if finite else (1e-9, 1.0)
    return [max(abs(value), floor) if math.isfinite(value) else ceiling for value in values], floor, ceiling


def _plot_overview(report: ParityReport) -> Markup | None:
    """Error against limit, one bar a stage, names above the bars so that it stays legible on a narrow screen."""
    shown = [stage for stage in report.stages if stage.verdict != "not-run" and _margin(stage)]
    if not shown:
        return None
    errors, limits = ([_numbers(stage)[part] or 0.0 for stage in shown] for part in (0, 1))
    figure, axes = _figure(6.4, 0.47 * len(shown) + 0.5)
    drawn, floor, ceiling = _drawable([*errors, *limits])
    axes.set_xscale("log")
    for i, stage in enumerate(shown):
        ink = _INKS[stage.verdict]
        fill = {"facecolor": ink} if stage.verdict == "pass" else {"facecolor": "none", "hatch": "////"}
        axes.barh(i, drawn[i] - floor, left=floor, height=0.3, edgecolor=ink, **fill)
        if 0 < limits[i] < math.inf:
            axes.plot([limits[i]] * 2, [i - 0.26, i + 0.26], color=_INKS["ink"], linewidth=2.4, solid_capstyle="butt")
        line = {"transform": axes.get_yaxis_transform(), "y": i - 0.31, "fontsize": 9, "va": "bottom"}
        metric = stage.tolerance.metric if stage.tolerance else ""
        said = f"{_label(metric, 24)} {_short(errors[i])}, {_margin(stage)}"
        axes.text(x=0, s=f"{_WORDS[stage.verdict]}  {_label(stage.name, 34)}", color=_INKS["ink"], **line)
        axes.text(x=1, s=said, color=_INKS["muted"], ha="right", **line)
    axes.set(xlim=(floor, ceiling), ylim=(len(shown) - 0.5, -0.8), yticks=[])
    _log_axis(axes.xaxis)
    return _svg(figure, "overview", f"Error and limit of {len(shown)} stages, logarithmic; the table has the numbers")


def _plot_series(stage: Stage) -> list[tuple[Markup, str, str]]:
    """(drawing, name, what it says in words) of each series; bars where the name speaks of layers, else a line.

    The limit is drawn only into a series whose name contains the limit's metric: it means nothing for another one.
    """
    plots = []
    for number, (name, values) in enumerate(item for item in stage.series.items() if item[1]):
        tolerance = stage.tolerance if stage.tolerance and stage.tolerance.metric in name else None
        limits = [tolerance.value] if tolerance and 0 < tolerance.value < math.inf else []
        heights, floor, ceiling = _drawable([*values, *limits])
        odd = [i for i, value in enumerate(values) if not math.isfinite(value)]
        zeros, steps = sum(value == 0 for value in values), range(len(values))
        unit = "layer" if "layer" in name.lower() else "step"
        figure, axes = _figure(5.0, 2.6)
        axes.set_yscale("log")
        if unit == "layer":
            tops = [height - floor for height in heights[: len(values)]]
            axes.bar(steps, tops, bottom=floor, width=0.7, color=_INKS["accent"])
        else:
            line = [math.nan if i in odd else heights[i] for i in steps]  # a gap, not a jump
            axes.plot(steps, line, color=_INKS["accent"], linewidth=1.6, marker="o", markersize=3.2, clip_on=False)
        axes.plot(odd, [ceiling] * len(odd), "x", color=_INKS["fail"], clip_on=False)
        for limit in limits:
            axes.axhline(limit, color=_INKS["ink"], linewidth=1.4, linestyle=(0, (5, 3)))
            place = {"xycoords": axes.get_yaxis_transform(), "xytext": (0, 3), "textcoords": "offset points"}
            axes.annotate(f"limit {limit:.3g}", (1, limit), ha="right", fontsize=9, color=_INKS["ink"], **place)
        axes.set_ylim(floor, ceiling)
        axes.set_xlabel(unit, color=_INKS["muted"], fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _log_axis(axes.yaxis)
        worst = max((i for i in steps if i not in odd), key=lambda i: abs(values[i]), default=None)
        said = [f"{len(values)} {unit}s"]
        said += [f"largest {abs(values[worst]):.3g} at {unit} {worst}"] if worst is not None else []
        said += [f"{zeros} exact (drawn on the floor)"] if zeros else []
        said += [f"{len(odd)} not finite (crosses at the top)"] if odd else []
        caption, prefix = "; ".join(said), f"series-{re.sub('[^a-z0-9]+', '-', stage.name.lower())}-{number}"
        plots.append((_svg(figure, prefix, f"{stage.name}, {_clean(name)}: {caption}"), _clean(name), caption))
    return plots
