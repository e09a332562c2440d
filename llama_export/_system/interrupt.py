"""Ctrl-C and SIGTERM end a command within two seconds, whichever library it is in, and leave nothing behind.

Python runs a signal's handler between two bytecodes of the main thread. Usually that is soon: the handler raises, the
stack unwinds, and staging folders are removed on the way. Two cases need more:

* A callback that C++ code calls (TensorRT's logger, progress monitor and stream writer) cannot raise: the exception is
  lost and the work goes on. :func:`deferred` records the signal instead, and acts on it after the C++ code has returned.
* C++ code may not return for minutes. :func:`watched` starts a thread that sees every signal at once. If the process still
  runs :data:`GRACE_SECONDS` later, the thread undoes what is unfinished (:func:`undone`) and ends the process.

Only the command line uses :func:`watched`; a program that imports this package keeps its own handlers.

Source: https://docs.python.org/3/library/signal.html#execution-of-python-signal-handlers
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

GRACE_SECONDS = 1.0
"""Time that the main thread gets to unwind on its own."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_undo: list[Callable[[], None]] = []
"""What removes the unfinished files of this process; the newest comes last."""
committing = threading.Lock()
"""Held while unfinished files become the finished ones, and while they are removed: never both."""


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """While this block runs, a process that is ended by :func:`watched` calls ``undo``, which must not raise.

    The block removes its files itself when it ends in any other way.
    """
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


class Deferred:
    """The first signal that arrived in a :func:`deferred` block."""

    signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def deferred() -> Iterator[Deferred]:
    """Signals that have a Python handler are recorded in this block and handled at its end.

    Callbacks look at what is yielded and ask the C++ code to stop. Outside the main thread, where no handler ever runs,
    nothing is deferred.
    """
    found = Deferred()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return

    def record(signum: int, frame: FrameType | None) -> None:
        found.signal = found.signal or signum

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, record)
    try:
        yield found
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        if found.signal is not None:
            handled[signal.Signals(found.signal)](found.signal, None)


_awaits_interrupts = 0
"""Blocks of :func:`interrupts_expected` that the main thread is in."""


@contextlib.contextmanager
def interrupts_expected() -> Iterator[None]:
    """In this block Ctrl-C does not end the process: a chat stops its answer. SIGTERM ends it as ever."""
    global _awaits_interrupts
    _awaits_interrupts += 1
    try:
        yield
    finally:
        _awaits_interrupts -= 1


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """The process ends soon after SIGINT or SIGTERM, even if the main thread is stuck in C++ code; with 130 or 143.

    A second signal ends it at once. Needs the main thread; elsewhere, and where a watcher runs already, nothing is watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    hook, sys.unraisablehook = sys.unraisablehook, _raise_again(sys.unraisablehook)
    watcher = threading.Thread(target=_watch, args=(reader,), name="interrupt-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        reader.close()


_repeated = 0
"""Signals that this process sent to itself: the watcher does not count them."""


def _raise_again(hook: Callable[[sys.UnraisableHookArgs], Any]) -> Callable[[sys.UnraisableHookArgs], None]:
    """A hook for exceptions that Python cannot raise. A destructor or a weak reference's callback loses the exception of a
    signal: the signal is sent again when it is over."""

    def lost(what: sys.UnraisableHookArgs) -> None:
        if what.exc_value is None or isinstance(what.exc_value, Exception):
            hook(what)
            return
        number = signal.SIGINT if isinstance(what.exc_value, KeyboardInterrupt) else signal.SIGTERM

        def send() -> None:
            global _repeated
            _repeated += 1
            signal.pthread_kill(threading.main_thread().ident or 0, number)

        threading.Timer(0.02, send).start()

    return lost


def _watch(reader: socket.socket) -> None:
    """Waits for signals; ends the process unless :func:`watched` does so first, by closing the other end."""
    global _repeated
    first: int | None = None
    with contextlib.suppress(TimeoutError):
        while received := reader.recv(1):
            number = received[0]
            if number not in _SIGNALS or (number == signal.SIGINT and _awaits_interrupts):
                continue
            if _repeated:
                _repeated -= 1
                continue
            if first is not None:
                break
            first = number
            reader.settimeout(GRACE_SECONDS)
        else:
            return
    _leave(first or signal.SIGINT)


def _leave(number: int) -> None:
    """Removes what is unfinished and ends the process, without a look at what other threads do."""
    # A commit takes milliseconds, but its disk may be slow. Without the lock nothing is removed: then all that is left is a
    # hidden folder, which the next command removes.
    if committing.acquire(timeout=0.5):
        for undo in reversed(_undo):
            undo()
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)
