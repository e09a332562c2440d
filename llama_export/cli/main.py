"""The command line: parse, call one library function, print. No logic of its own.

stdout is data, stderr is log and progress. Every command takes ``--json``: one JSON document on stdout, also for an
error. Heavy packages are imported by the command that needs them, so ``--help`` needs none of them.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from llama_export import __version__
from llama_export._system.interrupt import watched
from llama_export.cli.bench import bench
from llama_export.cli.build import build
from llama_export.cli.chat import chat
from llama_export.cli.console import log
from llama_export.cli.env import env
from llama_export.cli.export import export
from llama_export.cli.inspect import inspect
from llama_export.cli.options import CONTEXT
from llama_export.cli.outcomes import (
    EXIT_CODES,
    MACHINE_ERRNOS,
    USER_ERRNOS,
    Drifted,
    ParityFailed,
    Terminated,
    error_from_os,
    print_error,
    report_bug,
    report_error,
    terminate,
)
from llama_export.cli.plugins import plugins
from llama_export.cli.quantize import quantize
from llama_export.cli.refit import refit
from llama_export.cli.report import report
from llama_export.cli.reproduce import reproduce
from llama_export.cli.run import run
from llama_export.cli.validate import validate
from llama_export.cli.verify import verify
from llama_export.errors import ConfigError, LlamaExportError


@click.group(context_settings=CONTEXT, epilog=EXIT_CODES)
@click.version_option(__version__, "-V", "--version", prog_name="llama-export")
def cli() -> None:
    """Turn a Llama checkpoint into ONNX and TensorRT engines that are proven to compute what the checkpoint computes."""
    try:
        os.getcwd()
    except FileNotFoundError as err:
        raise ConfigError(
            "the working directory does not exist any more", hint="change to a folder that exists: cd /"
        ) from err


for command in (
    *(export, quantize, build, refit),
    *(run, chat, bench),
    *(validate, reproduce, report, verify),
    *(inspect, plugins, env),
):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see :data:`EXIT_CODES`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_standard_streams()
    with _sigterm_raises(), watched():
        return _main(arguments)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A terminated export must still remove its temporary folder: the signal becomes an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _open_standard_streams() -> None:
    """Text that a stream cannot hold is escaped; a stream that the caller closed takes everything and keeps nothing."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file that is opened would become stdout
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _main(arguments: list[str]) -> int:
    """:func:`main` once signals and streams are taken care of."""
    try:
        # Not cli.main(): it turns a closed pipe into exit code 1, which here means that parity failed.
        with cli.make_context("llama-export", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except ParityFailed:
        return 1
    except Drifted:
        return 5
    except click.ClickException as err:
        with contextlib.suppress(OSError):
            err.show()
        print_error(arguments, err.format_message(), exit_code=2)
        return 2
    except (click.Abort, KeyboardInterrupt):
        log("interrupted")
        return 128 + signal.SIGINT
    except Terminated:
        log("interrupted")
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`): what any program says that SIGPIPE ended, and never "passed".
        sys.stdout = None
        return 128 + signal.SIGPIPE
    except LlamaExportError as err:
        return report_error(err, arguments)
    except OSError as err:
        if err.errno not in USER_ERRNOS and err.errno not in MACHINE_ERRNOS:
            return report_bug(err, arguments)
        if err.filename is None:
            sys.stdout = None  # what cannot be written to is stdout itself
        return report_error(error_from_os(err), arguments)
    except Exception as err:  # noqa: BLE001 - the last resort that gives bugs their own exit code
        return report_bug(err, arguments)


def entry_point() -> NoReturn:
    """The console script: :func:`main`, then the end of the process without Python's own.

    That would take a second or two, after an export, to take torch's modules apart object by object.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # its reader is gone: nothing is left to say
                stream.flush()
    atexit._run_exitfuncs()  # temporary folders, loggers
    os._exit(code)
