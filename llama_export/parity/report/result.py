"""What a validation found: stages, metrics, tolerances with reasons, and one verdict. Plain data, no torch.

The JSON form (``report/parity.json``) is specified in ``docs/parity.md``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from llama_export._system.typed import Int64

SCHEMA_VERSION = 1
StageVerdict = Literal["pass", "fail", "not-run"]


class NonFinite(Enum):
    """The numbers that JSON has no literals for, as strings."""

    NAN = "nan"
    INFINITY = "inf"
    MINUS_INFINITY = "-inf"


if TYPE_CHECKING:
    Number = float
    Numbers = Sequence[float]
else:  # what a report in JSON holds in these places; ``reading`` makes floats of it
    Number = Int64 | float | NonFinite
    Numbers = tuple[Number, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The limit a stage is held to."""

    value: Number
    """Largest allowed value of the stage's ``metric``."""
    metric: str
    """The key of ``metrics`` that is compared with ``value``."""
    why: str
    """Where the number comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstElement:
    """The element with the largest error of a stage."""

    tensor: str
    layer: Int64 | None
    index: tuple[Int64, ...]
    got: Number
    want: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogit:
    """One of a position's first choices, on one side."""

    token: Int64
    """Token id, or the index of a label."""
    text: str | None
    """What the token adds to a text, or the label's name; None where the bundle has no names."""
    logit: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class TopChoices:
    """The largest logits of one position on both sides, the largest first."""

    position: Int64
    """Counted along the compared logits, from 0; without a head's padding."""
    where: str
    """In words: ``end of the prompt``, ``decode step 3``, ``largest error``."""
    got: tuple[TopLogit, ...]
    want: tuple[TopLogit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsSample:
    """Some of a stage's logits, to look at. Columns of equal length: one entry is one logit. No verdict depends on it."""

    compared: Int64
    """How many logits the sample was taken from."""
    positions: tuple[Int64, ...]
    tokens: tuple[Int64, ...]
    got: tuple[Number, ...]
    want: tuple[Number, ...]
    top: tuple[TopChoices, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One comparison. A stage that could not run is ``not-run`` with a reason, and never counts as passed."""

    name: str
    """``artefact/what``, e.g. ``onnxruntime/prefill``."""
    verdict: StageVerdict
    reason: str
    """One sentence: what was compared, or why it failed or did not run."""
    metrics: Mapping[str, float | Int64 | str | Numbers] = field(default_factory=dict)
    tolerance: Tolerance | None = None
    worst: WorstElement | None = None
    seconds: Number = 0.0
    series: Mapping[str, Numbers] = field(default_factory=dict)
    """Per-step values for the plots, e.g. the error of each decode step."""
    first_divergence: Mapping[str, Any] | None = None
    """Of a failed stage, where it is known: ``layer``, ``op``, ``node``, ``tensor`` and ``error``."""
    logits: LogitsSample | None = None
    """Of stages that compare logits at a dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """Everything one validation found."""

    stages: tuple[Stage, ...]
    required: tuple[str, ...]
    """Stages (or prefixes) that must have run."""
    environment: Mapping[str, str]
    hashes: Mapping[str, str]
    model: Mapping[str, Any]
    created_at: str
    """UTC, ISO 8601."""
    deviations: tuple[str, ...] = ()
    """Deliberate differences from Hugging Face, in words."""
    interrupted: bool = False
    """The validation did not come to its end, so the verdict is ``fail``."""

    @property
    def first_divergence(self) -> Mapping[str, Any] | None:
        """Where the first failed stage that knows leaves its limit; stages stand in the order a fault travels."""
        known = (stage.first_divergence for stage in self.stages if stage.verdict == "fail")
        return next((place for place in known if place is not None), None)

    @property
    def missing(self) -> list[str]:
        """Required names of which a stage did not run, or that name none: ``engine`` needs all of ``engine/*``."""

        def ran(name: str) -> bool:
            found = [stage.verdict for stage in self.stages if matches(stage.name, name)]
            return bool(found) and "not-run" not in found

        return [name for name in self.required if not ran(name)]

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """``pass`` when something ran, every stage that ran passed, everything required ran, and nothing interrupted it."""
        ran = [stage for stage in self.stages if stage.verdict != "not-run"]
        passed = ran and all(stage.verdict == "pass" for stage in ran) and not self.missing and not self.interrupted
        return "pass" if passed else "fail"

    def to_json(self) -> dict[str, Any]:
        """The document of ``docs/parity.md``; non-finite numbers become strings, because JSON has none."""
        data = dataclasses.asdict(self)
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "missing": self.missing,
            "interrupted": self.interrupted,
            **json_numbers({key: data[key] for key in ("created_at", "model", "required", "stages")}),
            "first_divergence": json_numbers(self.first_divergence),
            **{key: data[key] for key in ("deviations", "environment", "hashes")},
        }


def matches(stage_name: str, selector: str) -> bool:
    """True for the stage's own name and for the part before its slash: ``onnxruntime`` selects ``onnxruntime/prefill``."""
    return stage_name == selector or stage_name.startswith(selector.rstrip("/") + "/")


def json_numbers(value: Any) -> Any:
    """The same, with non-finite numbers as strings and tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: json_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(item) for item in value]
    return value
