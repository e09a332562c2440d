"""Reads ``parity.json`` back: the inverse of :meth:`ParityReport.to_json`, strict about what ``docs/parity.md`` demands.

A reader of verdicts must not guess: what is not a report of this schema is refused, and so is one whose verdict is not
the one its stages imply.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llama_export.errors import ConfigError
from llama_export.parity.result import (
    SCHEMA_VERSION,
    LogitsSample,
    ParityReport,
    Stage,
    Tolerance,
    TopChoices,
    TopLogit,
    WorstElement,
)

T = TypeVar("T")
_HINT = "give a parity.json that `llama-export validate` wrote, or the folder it lies in"


def report_from_json(path: Path) -> ParityReport:
    """The report in a file, or in ``parity.json`` of a folder.

    Raises:
        ConfigError: no such file, not UTF-8, not strict JSON, not a report, or one of another schema version.
    """
    file = path / "parity.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ConfigError(f"no report `{file}`", details={"expected": "parity.json"}, hint=_HINT) from None
    except (OSError, ValueError, RecursionError) as err:  # ValueError: not UTF-8, not JSON, an integer of 5000 digits
        raise ConfigError(
            f"`{file.name}` cannot be read as JSON",
            details={"file": file, "got": err, "expected": "strict JSON in UTF-8"},
            hint=_HINT,
        ) from err
    try:
        return _report(_Place(data))
    except _Unexpected as err:
        other = isinstance(err, _OtherVersion)
        raise ConfigError(
            f"`{file.name}` is a report of another version" if other else f"`{file.name}` is no report of llama-export",
            details={"file": file, "where": err.where or "the document", "got": err.got, "expected": err.expected},
            hint="make it again with this version of llama-export" if other else _HINT,
        ) from None


class _Unexpected(Exception):
    def __init__(self, where: str, got: object, expected: str) -> None:
        super().__init__(where)
        shown = ascii(got) if isinstance(got, (str, int, float, bool, type(None))) else type(got).__name__
        self.where, self.expected = where, expected
        self.got = shown if len(shown) <= 80 else f"{shown[:77]}..."


class _OtherVersion(_Unexpected):
    """A report, but one whose keys may mean something else."""


class _Place:
    """A value of the document that knows where it stands, for what is said when it is not what it should be."""

    def __init__(self, value: Any, where: str = "") -> None:
        self.value = value
        self.where = where

    def unexpected(self, expected: str) -> _Unexpected:
        return _Unexpected(self.where, self.value, expected)

    def __getitem__(self, key: str) -> _Place:
        where = f"{self.where}.{key}" if self.where else key
        found = self.object()
        if key not in found:
            raise _Unexpected(where, "nothing", "this key")
        return found[key]

    def object(self) -> dict[str, _Place]:
        if not isinstance(self.value, dict):
            raise self.unexpected("an object")
        return {key: _Place(item, f"{self.where}.{key}" if self.where else key) for key, item in self.value.items()}

    def array(self, read: Callable[[_Place], T]) -> tuple[T, ...]:
        if not isinstance(self.value, list):
            raise self.unexpected("an array")
        return tuple(read(_Place(item, f"{self.where}[{index}]")) for index, item in enumerate(self.value))

    def optional(self, read: Callable[[_Place], T]) -> T | None:
        return None if self.value is None else read(self)

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.unexpected("a string")
        return self.value

    def integer(self) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.unexpected("an integer")
        return self.value

    def number(self) -> float:
        if self.value in ("nan", "inf", "-inf"):
            return float(self.value)
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool):
            raise self.unexpected('a number, "nan", "inf" or "-inf"')
        if abs(self.value) > sys.float_info.max:
            raise self.unexpected("a number of 64 bits")
        return self.value  # an integer stays one: a count is no measurement

    def one_of(self, *allowed: str) -> Any:
        if self.value not in allowed:
            raise self.unexpected(" or ".join(map(json.dumps, allowed)))
        return self.value


def _report(data: _Place) -> ParityReport:
    version = data["schema_version"]
    if version.integer() != SCHEMA_VERSION:
        raise _OtherVersion(version.where, version.value, str(SCHEMA_VERSION))
    report = ParityReport(
        stages=data["stages"].array(_stage),
        required=data["required"].array(_Place.text),
        environment=_texts(data["environment"]),
        hashes=_texts(data["hashes"]),
        model={key: item.value for key, item in data["model"].object().items()},
        created_at=data["created_at"].text(),
        deviations=data["deviations"].array(_Place.text),
        interrupted=data.value.get("interrupted", False) is True,
    )
    names = [stage.name for stage in report.stages]
    if len(set(names)) < len(names):
        raise _Unexpected("stages", next(name for name in names if names.count(name) > 1), "every name once")
    stated = data["verdict"]
    if stated.one_of("pass", "fail") != report.verdict:
        raise stated.unexpected(f"{json.dumps(report.verdict)}, which is what the stages imply")
    return report


def _stage(data: _Place) -> Stage:
    stage = Stage(
        name=data["name"].text(),
        verdict=data["verdict"].one_of("pass", "fail", "not-run"),
        reason=data["reason"].text(),
        metrics={key: _metric(item) for key, item in data["metrics"].object().items()},
        tolerance=data["tolerance"].optional(_tolerance),
        worst=data["worst"].optional(_worst),
        seconds=data["seconds"].number(),
        series={key: item.array(_Place.number) for key, item in data["series"].object().items()},
        first_divergence=data["first_divergence"].optional(_divergence),
        logits=_Place(data.object().get("logits", _Place(None)).value, f"{data.where}.logits").optional(_logits),
    )
    if stage.tolerance and stage.verdict == "pass":
        metric = data["metrics"][stage.tolerance.metric]
        if not metric.number() <= stage.tolerance.value:
            raise metric.unexpected(f"at most {stage.tolerance.value:g}, since the stage is a pass")
    return stage


def _metric(data: _Place) -> Any:
    if isinstance(data.value, list):
        return data.array(_Place.number)
    return data.text() if isinstance(data.value, str) and data.value not in ("nan", "inf", "-inf") else data.number()


def _tolerance(data: _Place) -> Tolerance:
    return Tolerance(value=data["value"].number(), metric=data["metric"].text(), why=data["why"].text())


def _worst(data: _Place) -> WorstElement:
    return WorstElement(
        tensor=data["tensor"].text(),
        layer=data["layer"].optional(_Place.integer),
        index=data["index"].array(_Place.integer),
        got=data["got"].number(),
        want=data["want"].number(),
    )


def _divergence(data: _Place) -> Mapping[str, Any]:
    return {key: item.value for key, item in data.object().items()}


def _logits(data: _Place) -> LogitsSample:
    sample = LogitsSample(
        compared=data["compared"].integer(),
        positions=data["positions"].array(_Place.integer),
        tokens=data["tokens"].array(_Place.integer),
        got=data["got"].array(_Place.number),
        want=data["want"].array(_Place.number),
        top=data["top"].array(_top_choices),
    )
    if len({len(column) for column in (sample.positions, sample.tokens, sample.got, sample.want)}) > 1:
        raise _Unexpected(data.where, "columns of different length", "columns of equal length")
    return sample


def _top_choices(data: _Place) -> TopChoices:
    return TopChoices(
        position=data["position"].integer(),
        where=data["where"].text(),
        got=data["got"].array(_top_logit),
        want=data["want"].array(_top_logit),
    )


def _top_logit(data: _Place) -> TopLogit:
    return TopLogit(
        token=data["token"].integer(), text=data["text"].optional(_Place.text), logit=data["logit"].number()
    )


def _texts(data: _Place) -> Mapping[str, str]:
    return {key: item.text() for key, item in data.object().items()}


def _refuse_constant(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")
