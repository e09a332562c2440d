"""How a command ends: exit codes, and errors as text and as JSON."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

import click

from llama_export.cli.console import json_text, log
from llama_export.errors import ConfigError, LlamaExportError, ToolchainError

EXIT_CODES = """\b
Exit codes:
  0  done; for `validate`: every stage that ran passed
  1  `validate`: a stage failed, or a required one did not run; `reproduce`: the operation is still wrong
  2  your input: config, checkpoint, flags, a file that does not match
  3  this machine: a missing package, driver, GPU, disk space or memory
  4  a bug in llama-export
  5  `report diff`: drift; the new report says less, or worse, than the old one
"""


class ParityFailed(Exception):
    """A result, not an error: exit code 1."""


class Drifted(Exception):
    """A result, not an error: exit code 5."""


USER_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def error_from_os(err: OSError) -> LlamaExportError:
    """What the system refuses wherever a path of the user's is touched. Any other OSError is a bug."""
    where = "stdout" if err.filename is None else err.filename
    kind = ToolchainError if err.errno in MACHINE_ERRNOS else ConfigError
    hint = "free some space or check the disk" if err.errno in MACHINE_ERRNOS else "check the path and its permissions"
    return kind(f"cannot access `{where}`: {err.strerror}", hint=hint)


def report_error(err: LlamaExportError, arguments: Sequence[str]) -> int:
    # https://no-color.org: any non-empty value
    label = "error:" if os.environ.get("NO_COLOR") else click.style("error:", fg="red", bold=True)
    log(str(err), label + " ")
    print_error(arguments, err.message, details=err.details, hint=err.hint, exit_code=err.exit_code)
    return err.exit_code


def report_bug(err: Exception, arguments: Sequence[str]) -> int:
    hint = "this is a bug in llama-export: please report it with the output of `llama-export env`"
    log(f"{''.join(traceback.format_exception(err))}\n{hint}")
    print_error(arguments, f"{type(err).__name__}: {err}", hint=hint, exit_code=4)
    return 4


def print_error(
    arguments: Sequence[str],
    message: str,
    *,
    exit_code: int,
    details: Mapping[str, str] | None = None,
    hint: str | None = None,
) -> None:
    """With ``--json`` an error is a document on stdout too."""
    if "--json" in arguments and sys.stdout is not None:
        error = {"message": message, "details": details or {}, "hint": hint, "exit_code": exit_code}
        click.echo(json_text({"error": error}))


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, it passes every ``except Exception``."""


def terminate(signum: int, frame: object) -> None:
    raise Terminated
