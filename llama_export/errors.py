"""The errors a user can act on, and the exit code each one gives the command line.

::

    LlamaExportError                 exit 2   the user's input; printed without a traceback
    |-- ConfigError                  exit 2   config.json or flags: unsupported, missing, contradictory
    |-- CheckpointError              exit 2   safetensors files: missing, unexpected, mis-shaped, truncated
    |-- ShapeError                   exit 2   a prompt, batch or length outside what was exported or built
    |-- ExportError                  exit 2   the graph cannot be made or written
    |-- ArtifactMismatchError        exit 2   a bundle, an engine or a library is not the one its manifest describes
    |-- ToolchainError               exit 3   this machine: no GPU, disk full, a library of the wrong version
    |   `-- MissingDependencyError   exit 3   an extra is not installed
    `-- EngineBuildError             exit 3   the parser or builder refused; its messages are attached in full

A failed parity check is a result, not an exception (exit 1). Any other exception is a bug in this package (exit 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama_export._system.text import printable, shortened

MAX_MESSAGE, MAX_VALUE, MAX_VALUES = 2_000, 8_000, 200
"""Longest sentence or hint, and longest value of a detail, characters; most details. Errors quote files that somebody
else made, and a JSON value of 16 MB is no help to a reader. The largest own values, a parser's messages, fit."""


class LlamaExportError(Exception):
    """What went wrong, where, what was found and what was expected, and what to do about it.

    Args:
        message: one sentence, no final stop.
        details: label -> value lines, printed below the sentence in order (file, tensor, got, expected, ...).
        hint: the command, flag or edit that fixes it.

    Long texts are shortened here, and nowhere else; ``str()`` of an error is safe to print.
    """

    exit_code = 2

    def __init__(self, message: str, *, details: Mapping[str, object] | None = None, hint: str | None = None) -> None:
        self.message = shortened(message, MAX_MESSAGE)
        super().__init__(self.message)
        pairs = list((details or {}).items())
        self.details = {shortened(key, 200): shortened(str(value), MAX_VALUE) for key, value in pairs[:MAX_VALUES]}
        if pairs[MAX_VALUES:]:
            self.details["left out"] = f"{len(pairs) - MAX_VALUES} more lines"
        self.hint = None if hint is None else shortened(hint, MAX_MESSAGE)

    def __str__(self) -> str:
        lines = [self.message]
        width = max((len(key) for key in self.details), default=0) + 1
        lines += [f"  {key + ':':<{width}} {value}" for key, value in self.details.items()]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return printable("\n".join(lines))


class ConfigError(LlamaExportError):
    """``config.json`` or a flag asks for something unknown, missing, contradictory or not supported."""


class CheckpointError(LlamaExportError):
    """The checkpoint's tensor files do not hold what its config implies."""


class ShapeError(LlamaExportError):
    """A request (batch, prompt length, token id, capacity) lies outside what the artefact serves."""


class ExportError(LlamaExportError):
    """The graph could not be made, checked or written."""


class ArtifactMismatchError(LlamaExportError):
    """Files of a bundle do not belong together: a hash, a size or a version differs from the manifest."""


class ToolchainError(LlamaExportError):
    """This machine cannot do it: no GPU, no space, a driver or library that is absent or of the wrong version."""

    exit_code = 3


class MissingDependencyError(ToolchainError):
    """A Python package of an optional extra is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"the Python package `{module}` is not installed",
            details={"needed for": f"the `{extra}` extra"},
            hint=install_command(extra),
        )


def install_command(extra: str) -> str:
    """How an extra is installed. The package is on no index yet, so it is installed from a clone of the repository."""
    return f"in a clone of the llama-export repository: pip install '.[{extra}]'"


class EngineBuildError(LlamaExportError):
    """The ONNX parser or the builder refused the network."""

    exit_code = 3


def numbered(label: str, lines: Sequence[str]) -> dict[str, str]:
    """Lines as details of an error: ``message 1``, ``message 2``; a single one without its number."""
    return {label if len(lines) == 1 else f"{label} {index}": line for index, line in enumerate(lines, 1)}
