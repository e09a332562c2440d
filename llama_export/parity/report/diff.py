"""Two reports of one model, stage by stage: what changed, and which of it is drift. Judges by the reports alone; no torch.

Drift is what a reader of the new report alone would not see: a check that says less, or worse, than it did before.

* ``verdict``: a stage, or the report, fails that did not fail before.
* ``coverage``: a stage that ran does not run any more, or is gone.
* ``limit``: a stage is held to another metric, to none, or to a limit that grew by more than the factor: its errors
  cannot be compared, or its growth would hide behind the limit's.
* ``error``: the share of its limit that a stage's error uses up grew by more than the factor.

Changed versions, hashes and facts are listed, because they are where a drift comes from; they are none by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llama_export.errors import ConfigError
from llama_export.parity.report.result import ParityReport, Stage, StageVerdict, json_numbers
from llama_export.parity.report.wording import numbers, place_in_words

DIFF_SCHEMA_VERSION = 1
FACTOR = 2.0
"""How many times its former share of the limit an error may use. Another machine or library adds the same roundings in
another order, which moves a share little: other *tokens* move it by 1.13 at most (examples/tiny-llama, 8 seeds,
the stages of onnxruntime and evaluator). The noise floor grants twice its error, and so does this."""
FLOOR = 1e-3
"""Shares of the limit below it count as it. That far inside, an error is the rounding of a few operations, and a change of
their order multiplies it: 1e-12 where the limit is 1e-9."""

DriftKind = Literal["verdict", "coverage", "limit", "error"]


@dataclass(frozen=True, slots=True)
class Drift:
    """Why the new report is worse."""

    kind: DriftKind
    said: str
    """In words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDiff:
    """A stage of either report."""

    name: str
    old_verdict: StageVerdict | None
    """None: not in this report."""
    new_verdict: StageVerdict | None
    old_share: float | None
    """Error over limit; infinite where the error is no number, None where nothing was measured."""
    new_share: float | None
    growth: float | None
    """New over old share, each at least :data:`FLOOR`; None where they cannot be compared."""
    drift: tuple[Drift, ...]
    notes: tuple[str, ...]
    """What changed and is no drift."""

    @property
    def is_same(self) -> bool:
        """Nothing to show."""
        return not self.drift and not self.notes and self.old_share == self.new_share


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportDiff:
    """Everything one comparison found."""

    factor: float
    old: Mapping[str, str]
    """``created_at`` and ``verdict`` of the report."""
    new: Mapping[str, str]
    drift: tuple[Drift, ...]
    """Of the report as a whole."""
    stages: tuple[StageDiff, ...]
    """In the order of the new report; what is only in the old one follows."""
    changes: Mapping[str, Mapping[str, tuple[Any, Any]]]
    """``model``, ``environment``, ``hashes`` and ``report`` -> key -> (old, new), None where a report lacks the key."""

    @property
    def drifted(self) -> bool:
        """Whether anything is drift."""
        return bool(self.drift) or any(stage.drift for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The document of ``docs/parity.md``."""
        data: dict[str, Any] = json_numbers(asdict(self))
        return {"schema_version": DIFF_SCHEMA_VERSION, "drifted": self.drifted, **data}


def diff_reports(old: ParityReport, new: ParityReport, *, factor: float = FACTOR) -> ReportDiff:
    """Compares two reports.

    Args:
        old: the report that is taken as right.
        new: the report that is judged.
        factor: at least 1; see :data:`FACTOR`.

    Raises:
        ConfigError: they are about different models.
    """
    _check_same_model(old, new)
    before = {stage.name: stage for stage in old.stages}
    after = {stage.name: stage for stage in new.stages}
    drift: tuple[Drift, ...] = ()
    if old.verdict == "pass" and new.verdict == "fail":
        missing = f"; required but not run: {', '.join(new.missing)}" if new.missing else ""
        drift = (Drift("verdict", f"it passed before and fails{missing}"),)
    return ReportDiff(
        factor=factor,
        old={"created_at": old.created_at, "verdict": old.verdict},
        new={"created_at": new.created_at, "verdict": new.verdict},
        drift=drift,
        stages=tuple(_stage_diff(name, before.get(name), after.get(name), factor) for name in {**after, **before}),
        changes={
            "model": _changed(old.model, new.model),
            "environment": _changed(old.environment, new.environment),
            "hashes": _changed(old.hashes, new.hashes),
            "report": _changed(
                {"required": list(old.required), "deviations": list(old.deviations)},
                {"required": list(new.required), "deviations": list(new.deviations)},
            ),
        },
    )


def _check_same_model(old: ParityReport, new: ParityReport) -> None:
    """The name is a folder's, and facts that only one of them states are a newer program's."""
    facts = [key for key in old.model if key in new.model and key != "name"]
    differing = [key for key in facts if old.model[key] != new.model[key]]
    if differing:
        shown = {key: f"{old.model[key]!r} in the old report, {new.model[key]!r} in the new" for key in differing[:5]}
        more = {"and": f"{len(differing) - 5} more"} if differing[5:] else {}
        raise ConfigError(
            "the two reports are about different models",
            details={**shown, **more},
            hint="give two reports of one checkpoint, exported for the same task at the same dtype",
        )


def _stage_diff(name: str, old: Stage | None, new: Stage | None, factor: float) -> StageDiff:
    shares = _share(old), _share(new)
    growth = None
    if old and new and "not-run" not in (old.verdict, new.verdict):
        drift, notes = _verdict_change(old, new)
        more, limit_notes = _limit_change(old, new, factor)
        drift, notes = drift + more, notes + limit_notes
        if shares[0] is not None and shares[1] is not None and _metric(old) == _metric(new):
            growth = _growth(shares[0], shares[1])
            if growth > factor:
                drift += (Drift("error", f"its error uses {shares[1]:.3g} of the limit, before {shares[0]:.3g}"),)
    else:
        drift, notes = _coverage_change(old, new)
    return StageDiff(
        name=name,
        old_verdict=old.verdict if old else None,
        new_verdict=new.verdict if new else None,
        old_share=shares[0],
        new_share=shares[1],
        growth=growth,
        drift=drift,
        notes=notes,
    )


Found = tuple[tuple[Drift, ...], tuple[str, ...]]
"""Drift, and what is none."""


def _coverage_change(old: Stage | None, new: Stage | None) -> Found:
    """Of a stage that did not run in both reports."""
    if old and old.verdict != "not-run":
        now = f"does not run now: {new.reason}" if new else "is not in the new report"
        return (Drift("coverage", f"it ran before and {now}"),), ()
    if new and new.verdict == "fail":
        return (Drift("verdict", f"it fails, and had not run before: {_failure(new)}"),), ()
    if new and new.verdict == "pass":
        return (), ("it had not run before" if old else "it is new",)
    if old and new:
        return (), ()
    return (), ("it is new, and does not run" if new else "it is not in the new report, and had not run",)


def _verdict_change(old: Stage, new: Stage) -> Found:
    if old.verdict == new.verdict:
        return (), ()
    if new.verdict == "fail":
        return (Drift("verdict", f"it passed before and fails: {_failure(new)}"),), ()
    return (), ("it failed before",)


def _limit_change(old: Stage, new: Stage, factor: float) -> Found:
    if old.tolerance is None:
        return (), ("it is held to a limit now",) if new.tolerance else ()
    if new.tolerance is None:
        return (Drift("limit", "it is held to no limit any more"),), ()
    if _metric(old) != _metric(new):
        said = f"its limit is on {_metric(new)}, before on {_metric(old)}: the errors cannot be compared"
        return (Drift("limit", said),), ()
    before, now = (_or_infinite(stage.tolerance.value) for stage in (old, new) if stage.tolerance)
    said = f"its limit is {now:.3g}, before {before:.3g}"
    if now > factor * before:
        return (Drift("limit", said),), ()
    return (), (said,) if now != before else ()


def _failure(stage: Stage) -> str:
    place = f" (first divergence: {place_in_words(stage.first_divergence)})" if stage.first_divergence else ""
    return f"{stage.reason}{place}"


def _metric(stage: Stage) -> str | None:
    return stage.tolerance.metric if stage.tolerance else None


def _share(stage: Stage | None) -> float | None:
    share = numbers(stage)[2] if stage and stage.verdict != "not-run" else None
    return None if share is None else _or_infinite(share)


def _growth(old: float, new: float) -> float:
    before, now = max(old, FLOOR), max(new, FLOOR)
    return 1.0 if before == now else now / before  # both may be infinite


def _or_infinite(value: float) -> float:
    """What is no number is larger than any."""
    return math.inf if math.isnan(value) else value


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [*new, *(key for key in old if key not in new)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
