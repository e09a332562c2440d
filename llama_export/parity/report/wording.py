"""The words and numbers that every form of a report shares, so that no two forms can say different things. Plain text.

Whatever a report holds (a name from a config, a message of a library) is shown as text: no control character, no markup.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from llama_export.parity.report.result import ParityReport, Stage

WORDS = {"pass": "PASS", "fail": "FAIL", "not-run": "NOT RUN"}
NOT_SELECTED = "not selected by --stages"
"""The reason of a stage that ``--stages`` leaves out."""
SYMBOLS = {"pass": "✓", "fail": "✗", "not-run": "○"}
STYLES = {"pass": "bold green", "fail": "bold red", "not-run": "bold yellow"}
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 forbids or a terminal obeys: control characters, escape sequences, lone surrogates."""


def numbers(stage: Stage) -> tuple[float | None, float | None, float | None]:
    """(error, limit, error over limit: how many times the tolerance would have been needed); None where not known."""
    if stage.tolerance is None:
        return None, None, None
    found, limit = stage.metrics.get(stage.tolerance.metric), stage.tolerance.value
    if not isinstance(found, (int, float)):
        return None, limit, None
    return float(found), limit, found / limit if limit else math.inf if found else 0.0


def margin(stage: Stage) -> str:
    """The ratio in words; an error that is no number is never inside."""
    error, _, ratio = numbers(stage)
    if error is None or ratio is None:
        return ""
    if not math.isfinite(error):
        return "not finite"
    if error == 0:
        return "exact"
    times = ratio if ratio > 1 else 1 / max(ratio, 1e-300)
    text = f"{times:.2g}" if times < 10 else f"{times:.0f}" if times < 1e4 else f"{times:.0e}"
    return "over" if math.isinf(ratio) else f"{text} x {'over' if ratio > 1 else 'inside'}"


def worst_element(stage: Stage) -> str:
    """The element with the largest error, in one line, with as many digits as it takes to tell both sides apart."""
    worst = stage.worst
    if worst is None:
        return ""
    layer = "" if worst.layer is None else f"layer {worst.layer}, "
    index = ", ".join(map(str, worst.index))
    digits = 8 if f"{worst.got:.8g}" != f"{worst.want:.8g}" else 17  # float64 stages differ further down
    return f"{layer}{worst.tensor}[{index}]: got {worst.got:.{digits}g}, want {worst.want:.{digits}g}"


def place_in_words(divergence: Mapping[str, Any]) -> str:
    """Where a fault begins, in one line."""
    return ", ".join(f"{key} {in_words(item)}" for key, item in divergence.items())


def count_by_verdict(report: ParityReport) -> dict[str, int]:
    """How many stages have each verdict."""
    return {verdict: sum(stage.verdict == verdict for stage in report.stages) for verdict in WORDS}


def not_run_by_reason(report: ParityReport) -> dict[str, list[str]]:
    """Reason -> the stages that did not run for it, in their order: one reason is said once."""
    found: dict[str, list[str]] = {}
    for stage in report.stages:
        if stage.verdict == "not-run":
            found.setdefault(stage.reason, []).append(stage.name)
    return found


def tally(report: ParityReport) -> str:
    """The counts in words."""
    counts = count_by_verdict(report)
    return f"{counts['pass']} passed, {counts['fail']} failed, {counts['not-run']} not run"


def tally_of_selected(report: ParityReport) -> str:
    """The counts in words; stages that ``--stages`` left out are counted apart from those that could not run."""
    counts = count_by_verdict(report)
    left_out = sum(stage.verdict == "not-run" and stage.reason == NOT_SELECTED for stage in report.stages)
    more = f", {left_out} not selected" if left_out else ""
    return f"{counts['pass']} passed, {counts['fail']} failed, {counts['not-run'] - left_out} not run{more}"


def headline(report: ParityReport) -> str:
    """One sentence that does not let a pass hide what was not run."""
    counts = count_by_verdict(report)
    ran = counts["pass"] + counts["fail"]
    if report.interrupted:
        return f"Interrupted: {ran} of {len(report.stages)} stages had run; {counts['fail']} of them failed."
    if not ran:
        return "No stage ran, so nothing is proven."
    found = "all that ran passed" if not counts["fail"] else f"{counts['fail']} failed"
    return f"{ran} of {len(report.stages)} stages ran; {found}."


def short(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.3g}"


def in_words(value: object) -> str:
    """A metric, a config value: numbers short, long lists by their length and largest."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(key)}: {in_words(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) > 8 and all(isinstance(item, (int, float)) for item in value):
            return f"{len(value)} values, largest {short(max(value))}"
        return ", ".join(map(in_words, value))
    return str(clean(str(value)))


def quoted(text: str | None) -> str:
    """A token's text with its white space made visible, and kept together; nothing where it has no name."""
    return "" if text is None else json.dumps(clean(text), ensure_ascii=False).replace(" ", "\u00a0")


def clean(value: Any) -> Any:
    """Replaces characters that a file or a terminal cannot take, in keys too."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def code(text: object) -> str:
    """A Markdown code span, inert whatever it holds: nothing in it is markup, a mention or the end of a cell."""
    plain = " ".join(in_words(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else "–"


def prose(text: object) -> str:
    """Markdown text in which nothing is markup, and nothing a mention: after a zero-width space, ``@`` notifies nobody
    and ``#`` links to no issue."""
    plain = html.escape(" ".join(in_words(text).split()), quote=False)
    return re.sub(r"[@#]", r"\g<0>&#8203;", re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain))
