"""A validation that is interrupted keeps what it had: the report so far, on disk after each stage.

``REPORT/interrupted/parity.json`` is a report of schema version 1 whose ``interrupted`` is true and whose verdict is
therefore ``fail``. Stages that did not run yet are ``not-run``. Its key ``basis`` holds what the results depend on, so that
``validate --resume`` takes over only results that a new run would give again. A finished validation removes the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_export.bundle.destination import json_bytes, write_atomically, write_error
from llama_export.config.huggingface import load_json_object
from llama_export.errors import ConfigError
from llama_export.parity.report.pages import html_from_report, junit_from_report, markdown_from_report
from llama_export.parity.report.reading import report_from_json
from llama_export.parity.report.result import ParityReport, Stage, matches
from llama_export.parity.report.wording import clean

FOLDER = "interrupted"
"""Name of the journal's folder in the folder of the report."""


@dataclass(frozen=True, slots=True)
class Journal:
    """The report of a validation that has not ended."""

    folder: Path
    basis: Mapping[str, str]
    """What the results depend on: versions, hashes and settings."""

    def save(self, report: ParityReport) -> None:
        """Replaces what is on disk.

        Raises:
            ToolchainError: no space. ExportError: any other failure to write.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise write_error(err, self.folder) from err
        document = {**report.to_json(), "basis": dict(self.basis)}
        write_atomically(self.folder / "parity.json", json_bytes(clean(document)))

    def finished(self) -> list[Stage]:
        """The stages that ran before the interruption.

        Raises:
            ConfigError: nothing was interrupted here; or it judged other files, with other versions or settings.
        """
        file = self.folder / "parity.json"
        if not file.is_file():
            raise ConfigError(
                "there is no interrupted validation to resume",
                details={"missing": file},
                hint="leave --resume out",
            )
        found = load_json_object(file).get("basis")
        before = found if isinstance(found, dict) else {}
        changed = sorted(key for key in before.keys() | self.basis.keys() if before.get(key) != self.basis.get(key))
        if changed:
            raise ConfigError(
                "the interrupted validation does not match this one",
                details={
                    key: f"{before.get(key, 'nothing')} then, {self.basis.get(key, 'nothing')} now" for key in changed
                },
                hint="leave --resume out to start anew",
            )
        return [stage for stage in report_from_json(self.folder).stages if stage.verdict != "not-run"]


def remove(folder: Path) -> None:
    """The validation has ended."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path) -> None:
    """Writes the other forms of a journal's report beside it, without plots: an interrupted process has little time.

    Raises:
        ConfigError: there is no report. ToolchainError, ExportError: see :func:`write_atomically`.
    """
    report = report_from_json(folder)
    write_atomically(folder / "parity.md", markdown_from_report(report).encode())
    write_atomically(folder / "junit.xml", junit_from_report(report))
    write_atomically(folder / "parity.html", html_from_report(report, plots=False).encode())


def results_of(name: str, finished: list[Stage]) -> list[Stage]:
    """What an entry of the stage table gave: one stage of this name, or several whose names go on from it."""
    return [stage for stage in finished if matches(stage.name, name)]
