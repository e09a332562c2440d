"""How several files become visible together, though a process may be killed, or the power fail, between any two steps.

The new files are written into a hidden *staging* folder on the same file system (:func:`staging_folder`), and synced. What then happens depends on
what is there:

1. Nothing: the staging folder is renamed to its final name, which is one step.
2. A folder that is to be replaced as a whole: the two folders exchange their names (``renameat2``), which is one step.
3. A folder in which some files are replaced (an export in place, an engine and its sidecar), or one as in 2 where the
   file system cannot exchange names: :func:`commit`. The staging folder is renamed to ``.llama-export.commit`` inside
   the folder. That step is the commit: before it the old files count, after it the new ones. Then the files are moved
   out of it to their places, JSON (manifest, sidecar) after what it describes, and it is removed when it is empty.

Whoever opens the folder first calls :func:`finish_commit`, which does what is left of that: a commit that was cut off is
rolled forward, never back. Every step can be done again, or by two processes at once: a file that is no longer in the
commit folder has been moved by the other, and only an empty one is removed. A second commit waits for nobody: the rename
fails as long as the first one's folder has files, and then finishes that one itself.

Nothing here knows what the files mean; :class:`OSError` is all that is raised, and :class:`UnfinishedCommitError` for a
failure after the commit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from llama_export._system.files import read_small
from llama_export._system.interrupt import committing, undone

COMMIT_NAME = ".llama-export.commit"
_OBSOLETE_NAME = ".obsolete"
"""In a commit folder: the names, null-separated, that the new state of the folder does not have."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of linux/fcntl.h and linux/fs.h."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)


@contextlib.contextmanager
def staging_folder(home: Path) -> Iterator[Path]:
    """A new hidden folder in ``home`` to write into; what is left of it at the end is removed.

    What killed processes left in ``home`` is removed first. A folder whose process lives is locked (``flock``): a process
    id would mean nothing to another container that shares the volume. ``home`` is locked for the moment between making
    the folder and locking it.

    Raises:
        OSError: ``home`` cannot be written to.
    """
    staging = home / f".llama-export-{secrets.token_hex(6)}.partial"
    lock = None
    try:  # before the folder is made: a signal may arrive at any line
        with undone(lambda: shutil.rmtree(staging, ignore_errors=True)):
            with locked(home):
                _remove_stale(home)
                staging.mkdir()
                lock = _lock(staging, wait=False)
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_stale(home: Path) -> None:
    for path in home.glob(".llama-export-*.partial"):
        if not re.fullmatch(r"\.llama-export-[0-9a-f]+\.partial", path.name) or not path.is_dir():
            continue
        with contextlib.suppress(OSError):  # in use, removed by another process, or a file system without locks
            lock = _lock(path, wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, after waiting for it; without effect where the system or file system has none.

    Who waited may have waited for a folder that was replaced meanwhile (:func:`replace_folder`): then the lock of the new one
    is taken. A thread that holds the lock must not ask for it again.

    Raises:
        OSError: the folder cannot be opened.
    """
    while True:
        lock = _lock(folder, wait=True)
        try:
            if lock is not None and not _is_at(lock, folder):
                continue
            yield
            return
        finally:
            if lock is not None:
                os.close(lock)


def _is_at(handle: int, folder: Path) -> bool:
    return os.path.samestat(os.fstat(handle), os.stat(folder))


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A handle that holds the lock of a folder until it is closed; None where the system or file system has none.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is off.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # ENOLCK, EOPNOTSUPP
        os.close(handle)
        return None
    return handle


class UnfinishedCommitError(OSError):
    """The new files count, but not all of them could be moved into place."""


def replace_folder(staging: Path, target: Path) -> None:
    """``staging`` becomes ``target``; a folder that was there may be left under the name ``staging``, for removal."""
    sync_folder(staging)
    with committing:
        is_new = not (target.exists() and any(target.iterdir()))
        if is_new:
            os.rename(staging, target)  # over an empty folder too
        done = is_new or exchange(staging, target)
    if not done:
        commit(staging, target, obsolete=set(os.listdir(target)) - set(os.listdir(staging)) - {COMMIT_NAME})


def exchange(left: Path, right: Path) -> bool:
    """Two names change places in one step; False, and nothing done, where system or file system cannot."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None, use_errno=True), "renameat2"):
        return False
    names = os.fsencode(left), os.fsencode(right)
    if library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(right))


def commit(staging: Path, folder: Path, obsolete: Collection[str] = (), unsynced: Collection[str] = ()) -> None:
    """Moves the files of ``staging`` into ``folder``: all of them, or, if cut off before the commit, none.

    Args:
        staging: on the same file system; gone afterwards.
        folder: may hold files of these names, which are replaced, and others, which stay.
        obsolete: names in ``folder`` that do not stay.
        unsynced: names in ``staging`` whose content a power cut may spoil, because a hash beside them tells.

    Raises:
        OSError: nothing is changed. UnfinishedCommitError: whoever opens ``folder`` and may write to it finishes.
    """
    for name in os.listdir(staging):
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
    if obsolete:
        (staging / _OBSOLETE_NAME).write_bytes(b"\0".join(os.fsencode(name) for name in sorted(obsolete)))
    sync_folder(staging, unsynced)
    while True:
        try:
            with committing:
                os.rename(staging, folder / COMMIT_NAME)
            break
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            finish_commit(folder)
    try:
        sync(folder)
        finish_commit(folder)
    except OSError as err:
        raise UnfinishedCommitError(err.errno, err.strerror, err.filename) from err


def finish_commit(folder: Path) -> None:
    """Does what is left of a commit, if there is one.

    Raises:
        OSError: it cannot be done, for example because the file system is read-only.
    """
    pending = folder / COMMIT_NAME
    try:
        is_folder = stat.S_ISDIR(os.lstat(pending).st_mode)
    except OSError:  # none there, or a folder that cannot be looked into
        return
    if not is_folder:
        return
    try:
        names = sorted(os.listdir(pending), key=_order)
    except FileNotFoundError:
        return
    if _OBSOLETE_NAME in names:
        names.remove(_OBSOLETE_NAME)
        _remove_obsolete(folder, pending / _OBSOLETE_NAME)
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            os.replace(pending / name, folder / name)
    sync(folder)
    try:
        os.rmdir(pending)
    except OSError as err:  # another process has removed it, or has made the next commit
        if err.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _order(name: str) -> tuple[bool, bool, str]:
    return name.endswith(".json"), name == "manifest.json", name


def _remove_obsolete(folder: Path, listed: Path) -> None:
    try:
        names = read_small(listed, 1 << 20).split(b"\0")
    except FileNotFoundError:
        return
    for name in names:
        if b"/" in name or name in (b"", b".", b".."):
            continue
        path = folder / os.fsdecode(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    listed.unlink(missing_ok=True)


def sync_folder(folder: Path, unsynced: Collection[str] = ()) -> None:
    """Brings the files of a folder, then their names, to the disk."""
    for path in folder.iterdir():
        if path.name not in unsynced:
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Brings a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:
        if err.errno != errno.EINVAL or not path.is_dir():  # some file systems have nothing to sync in a folder
            raise
    finally:
        os.close(handle)
