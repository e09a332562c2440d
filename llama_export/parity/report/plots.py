"""The report's plots, as SVG elements of its page: no scripts, colours from the page's own variables. Needs matplotlib."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from llama_export.errors import MissingDependencyError
from llama_export.parity.report.result import LogitsSample, ParityReport, Stage
from llama_export.parity.report.wording import WORDS, clean, margin, numbers, short

_INKS = {name: f"#0{i}0{i}0{i}" for i, name in enumerate(("ink", "muted", "line", "pass", "fail", "accent"), start=1)}
"""Stand-ins that become CSS variables after drawing, so that plots follow light, dark and print."""
_DRAWABLE = 1e300
"""Magnitudes beyond it overflow while an axis is laid out."""


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as err:
        raise MissingDependencyError("matplotlib", "parity") from err
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    stacked = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for axes in stacked:
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0, labelcolor=_INKS["muted"], labelsize=9)
        axes.set_axisbelow(True)
    return figure, stacked


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
    view, name = re.findall(r'viewBox="[^"]*"', head)[0], html.escape(clean(label))
    return Markup(f'<svg class="plot" role="img" aria-label="{name}" {view}>{body}')


def _slug(stage: Stage) -> str:
    return re.sub("[^a-z0-9]+", "-", stage.name.lower())


def _label(text: str, width: int) -> str:
    """Text for a drawing: its font has no glyphs for everything, ``$`` means mathematics, and it must fit."""
    plain = "".join(char if char.isascii() and char.isprintable() and char != "$" else "?" for char in text)
    return plain if len(plain) <= width else plain[: width - 3] + "..."


def _drawable(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Values on a log axis, with its ends: exact zeros go to the floor, what is not finite to the ceiling."""
    finite = [abs(value) for value in values if math.isfinite(value) and value]
    floor, ceiling = (max(min(finite) / 10, 1e-300), min(max(finite) * 10, 1e300)) if finite else (1e-9, 1.0)
    return [max(abs(value), floor) if math.isfinite(value) else ceiling for value in values], floor, ceiling


def plot_overview(report: ParityReport) -> Markup | None:
    """Error against limit, one bar a stage, names above the bars so that it stays legible on a narrow screen."""
    shown = [stage for stage in report.stages if stage.verdict != "not-run" and margin(stage)]
    if not shown:
        return None
    errors, limits = ([numbers(stage)[part] or 0.0 for stage in shown] for part in (0, 1))
    figure, (axes,) = _figure(6.4, 0.47 * len(shown) + 0.5)
    drawn, floor, ceiling = _drawable([*errors, *limits])
    axes.set_xscale("log")
    for i, stage in enumerate(shown):
        ink = _INKS[stage.verdict]
        fill = {"facecolor": ink} if stage.verdict == "pass" else {"facecolor": "none", "hatch": "////"}
        axes.barh(i, drawn[i] - floor, left=floor, height=0.3, edgecolor=ink, **fill)
        if 0 < limits[i] < math.inf:
            axes.plot([limits[i]] * 2, [i - 0.21, i + 0.21], color=_INKS["ink"], linewidth=2.4, solid_capstyle="butt")
        line = {"transform": axes.get_yaxis_transform(), "y": i - 0.31, "fontsize": 9, "va": "bottom"}
        metric = stage.tolerance.metric if stage.tolerance else ""
        said = f"{_label(metric, 24)} {short(errors[i])}, {margin(stage)}"
        axes.text(x=0, s=f"{WORDS[stage.verdict]}  {_label(stage.name, 34)}", color=_INKS["ink"], **line)
        axes.text(x=1, s=said, color=_INKS["muted"], ha="right", **line)
    axes.set(xlim=(floor, ceiling), ylim=(len(shown) - 0.5, -0.8), yticks=[])
    _log_axis(axes.xaxis)
    return _svg(figure, "overview", f"Error and limit of {len(shown)} stages, logarithmic; the table has the numbers")


def plot_series(stage: Stage) -> list[tuple[Markup, str, str]]:
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
        figure, (axes,) = _figure(5.0, 2.6)
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
        caption, prefix = "; ".join(said), f"series-{_slug(stage)}-{number}"
        plots.append((_svg(figure, prefix, f"{stage.name}, {clean(name)}: {caption}"), clean(name), caption))
    return plots


def plot_logits(stage: Stage) -> tuple[Markup, str] | None:
    """(drawing, what it says in words) of a stage's sampled logits: got over want, and below it the error over want.

    Two panels, because at a rounding's size the error is invisible on the first one.
    """
    sample = stage.logits
    if sample is None or stage.verdict == "not-run":
        return None
    points = zip(sample.positions, sample.tokens, sample.got, sample.want, strict=True)
    finite = [point for point in points if all(abs(value) < _DRAWABLE for value in point[2:])]
    odd = len(sample.got) - len(finite)
    figure, (both, error) = _figure(5.0, 6.0, panels=2)
    first = _first_choices(sample)
    worst = max(finite, key=lambda point: abs(point[2] - point[3]), default=None)
    kinds = (
        ([point for point in finite if point[:2] not in first], "o", 3.0, {"color": _INKS["accent"]}),
        ([point for point in finite if point[:2] in first], "D", 4.0, {"color": _INKS["ink"]}),
        ([worst] if worst else [], "o", 11.0, {"color": _INKS["ink"], "markerfacecolor": "none"}),
    )
    for chosen, marker, size, look in kinds:
        want = [point[3] for point in chosen]
        both.plot(want, [point[2] for point in chosen], marker, markersize=size, **look)
        error.plot(want, [point[2] - point[3] for point in chosen], marker, markersize=size, clip_on=False, **look)
    line = {"color": _INKS["muted"], "linewidth": 1.0, "zorder": 0}
    ends = _limits([value for point in finite for value in point[2:]])
    both.plot(ends, ends, **line)
    error.axhline(0, **line)
    largest = max(abs(worst[2] - worst[3]), 1e-30) if worst else 1.0
    both.set(xlim=ends, ylim=ends)
    error.set(ylim=(-1.2 * largest, 1.2 * largest))
    for axes, name in ((both, "got"), (error, "got - want")):
        axes.set_ylabel(name, color=_INKS["muted"], fontsize=9)
        axes.grid(True, color=_INKS["line"], linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    error.set_xlabel("want", color=_INKS["muted"], fontsize=9)
    said = [f"{len(sample.got):,} of {sample.compared:,} logits, got over want and their difference"]
    said += ["diamonds: what either side puts first at the positions of the tables" if first else ""]
    said += [f"ring: largest error {worst[2] - worst[3]:.3g} at position {worst[0]}, token {worst[1]}"] if worst else []
    said += [f"not drawn: {odd} that are not finite, or beyond {_DRAWABLE:g}"] if odd else []
    caption = "; ".join(filter(None, said))
    return _svg(figure, f"logits-{_slug(stage)}", f"{stage.name}: {caption}"), caption


def _first_choices(sample: LogitsSample) -> set[tuple[int, int]]:
    """(position, token) of what either side puts first."""
    return {(one.position, choice.token) for one in sample.top for choice in (*one.got, *one.want)}


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that shows all values, wide enough to be drawn where they are all the same."""
    low, high = min(values, default=-1.0), max(values, default=1.0)
    margin = max(0.05 * (high - low), 0.01 * max(abs(low), abs(high)), 1e-30)
    return low - margin, high + margin
