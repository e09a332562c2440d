"""Reads ``parity.json`` back: the inverse of :meth:`ParityReport.to_json`, strict about what ``docs/parity.md`` demands.

A reader of verdicts must not guess: what is not a report of this schema is refused, and so is one whose verdict is not
the one its stages imply.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_export._system.files import json_from_bytes, read_small
from llama_export._system.typed import typed
from llama_export.config.limits import MAX_JSON_BYTES
from llama_export.errors import ConfigError
from llama_export.parity.report.result import SCHEMA_VERSION, NonFinite, ParityReport, Stage

_HINT = "give a parity.json that `llama-export validate` wrote, or the folder it lies in"
_OPTIONAL = {"logits", "interrupted"}
"""Keys that a report may lack: earlier versions did not write them."""


def report_from_json(path: Path) -> ParityReport:
    """The report in a file, or in ``parity.json`` of a folder.

    Raises:
        ConfigError: no such file, not a regular file, larger than ``config.MAX_JSON_BYTES``, not UTF-8, not strict JSON,
            not a report, or one of another schema version.
    """
    file = path / "parity.json" if path.is_dir() else path
    try:
        data = json_from_bytes(read_small(file, MAX_JSON_BYTES), strict=True)
    except FileNotFoundError:
        raise ConfigError(f"no report `{file}`", details={"expected": "parity.json"}, hint=_HINT) from None
    except (OSError, ValueError, RecursionError) as err:  # ValueError: not UTF-8, not JSON, an integer of 5000 digits
        raise ConfigError(
            f"`{file.name}` cannot be read as JSON",
            details={"file": file, "got": err, "expected": "strict JSON in UTF-8"},
            hint=_HINT,
        ) from err
    try:
        return _report(data)
    except _Unexpected as err:
        other = err.where == "schema_version" and err.expected == str(SCHEMA_VERSION)
        raise ConfigError(
            f"`{file.name}` is a report of another version" if other else f"`{file.name}` is no report of llama-export",
            details={"file": file, "where": err.where or "the document", "got": err.got, "expected": err.expected},
            hint="make it again with this version of llama-export" if other else _HINT,
        ) from None


class _Unexpected(Exception):
    """A value of the document that is not what it should be; ``...`` where there is none."""

    def __init__(self, where: str, got: object, expected: str) -> None:
        super().__init__(where)
        shown = ascii(got) if isinstance(got, (str, int, float, bool, type(None))) else type(got).__name__
        self.where, self.expected = where, expected
        self.got = "nothing" if got is ... else shown if len(shown) <= 80 else f"{shown[:77]}..."


def _report(data: Any) -> ParityReport:
    if not isinstance(data, dict):
        raise _Unexpected("", data, "an object")
    version = data.get("schema_version", ...)
    if version is ... or type(version) is not int:
        raise _Unexpected("schema_version", version, "this key" if version is ... else "an integer")
    if version != SCHEMA_VERSION:
        raise _Unexpected("schema_version", version, str(SCHEMA_VERSION))
    _check_keys(data, ParityReport, "")
    for index, stage in enumerate(data["stages"] if isinstance(data["stages"], list) else ()):
        if isinstance(stage, dict):
            _check_keys(stage, Stage, f"stages[{index}].")
    try:
        report: ParityReport = _with_floats(typed(data, ParityReport))
    except ValueError as err:
        raise _explained(data, str(err)) from None
    for index, stage in enumerate(report.stages):
        _check_stage(stage, f"stages[{index}]")
    names = [stage.name for stage in report.stages]
    if len(set(names)) < len(names):
        raise _Unexpected("stages", next(name for name in names if names.count(name) > 1), "every name once")
    if (stated := data.get("verdict", ...)) != report.verdict:
        raise _Unexpected("verdict", stated, f"{json.dumps(report.verdict)}, which is what the stages imply")
    return report


def _check_keys(data: Mapping[str, Any], kind: type, prefix: str) -> None:
    """All keys stand in the document, also those whose fields have defaults."""
    for field in dataclasses.fields(kind):
        if field.name not in data and field.name not in _OPTIONAL:
            raise _Unexpected(f"{prefix}{field.name}", ..., "this key")


def _check_stage(stage: Stage, where: str) -> None:
    """What the types do not say."""
    if stage.tolerance and stage.verdict == "pass":
        value, place = stage.metrics.get(stage.tolerance.metric, ...), f"{where}.metrics.{stage.tolerance.metric}"
        if not isinstance(value, (int, float)):
            raise _Unexpected(place, value, "this key" if value is ... else "a number")
        if not value <= stage.tolerance.value:
            expected = f"at most {stage.tolerance.value:g}, since the stage is a pass"
            raise _Unexpected(place, value if value == value else str(value), expected)
    if stage.logits:
        columns = (stage.logits.positions, stage.logits.tokens, stage.logits.got, stage.logits.want)
        if len({len(column) for column in columns}) > 1:
            raise _Unexpected(f"{where}.logits", "columns of different length", "columns of equal length")


def _with_floats(value: Any) -> Any:
    """The same with a float for each of the strings that stand for one."""
    if isinstance(value, NonFinite):
        return float(value.value)
    if isinstance(value, Stage):
        words = {member.value for member in NonFinite}
        metrics = {key: float(item) if item in words else item for key, item in value.metrics.items()}
        value = dataclasses.replace(value, metrics=metrics)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{one.name: _with_floats(getattr(value, one.name)) for one in fields})
    if isinstance(value, Mapping):
        return {key: _with_floats(item) for key, item in value.items()}
    return tuple(map(_with_floats, value)) if isinstance(value, tuple) else value


# ---- what is said of a document that does not fit ---------------------------------------------------------------

_EXPECTED = {"int": "an integer", "str": "a string", "object": "an object", "array": "an array"}
_NUMBER = 'a number, "nan", "inf" or "-inf"'


def _explained(data: Any, message: str) -> _Unexpected:
    """msgspec's message as a place, what stands there and what should: "Expected `int`, got `str` - at `$.stages[0].x`"."""
    said, _, path = message.partition(" - at `$")
    where, value = _value_at(data, re.findall(r"\.\w+|\[\d+\]|\[\.\.\.\]", path), message)
    if missing := re.search(r"missing required field `(\w+)`", said):
        return _Unexpected(f"{where}.{missing[1]}", ..., "this key")
    if where.endswith(".verdict"):
        return _Unexpected(where, value, '"pass" or "fail" or "not-run"')
    if "<=" in said or ">=" in said or "out of range" in said:
        return _Unexpected(where, value, "a number of 64 bits")
    kind = re.search(r"Expected `([^`]+)`", said)
    names = kind[1].split(" | ") if kind else ["float"]  # "Invalid enum value": a string in a number's place
    expected = _NUMBER if "float" in names else " or ".join(_EXPECTED.get(name, name) for name in names)
    return _Unexpected(where, value, expected)


def _value_at(data: Any, steps: list[str], message: str) -> tuple[str, Any]:
    """The place in words and its value. msgspec names no keys of free objects: ``[...]`` is the first key that alone gives
    the same message."""
    where, value = "", data
    for step in steps:
        if step == "[...]":
            key = _first_key(data, value, message)
            step, value = f".{key}", value[key]
        else:
            value = value[int(step[1:-1])] if step[0] == "[" else value[step[1:]]
        where += step
    return where.removeprefix("."), value


def _first_key(data: Any, part: dict[str, Any], message: str) -> str:
    """The first key of ``part``, an object within ``data``, to which the message belongs."""
    everything = dict(part)
    try:
        for key, value in everything.items():
            part.clear()
            part[key] = value
            try:
                typed(data, ParityReport)
            except ValueError as err:
                if str(err) == message:
                    return key
    finally:
        part.clear()
        part.update(everything)
    return next(iter(everything))  # msgspec's message does not depend on the other keys: not reached
