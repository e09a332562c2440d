"""How a checkpoint's weight and text files get into a bundle's folder: reflinks, hard links or copies.

Role: used by :mod:`llama_export.export.export`, into the staging folder of a new bundle.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llama_export._system.commit import staging_folder
from llama_export.checkpoint.checkpoint import INDEX_NAME, TOKENIZER_FILES, Checkpoint
from llama_export.config.settings import WeightsMode
from llama_export.errors import ExportError

Progress = Callable[[str, int, int], None]
"""(file name, bytes done, bytes in all)"""


def place_text_files(checkpoint: Checkpoint, staging: Path) -> None:
    """Copies the config and what the tokenizer is made of."""
    for name in ("config.json", *TOKENIZER_FILES):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, staging / name)


def place_weights(
    checkpoint: Checkpoint, staging: Path, weights: WeightsMode, log: Callable[[str], None], progress: Progress
) -> int:
    """Brings the checkpoint's weight files, and their index, into ``staging``.

    Args:
        checkpoint: where they come from; symbolic links (a hub cache) are followed to the files themselves.
        staging: an empty folder.
        weights: ``auto``, ``link`` or ``copy``.
        log: told once if ``auto`` has to copy, and who refuses hard links.
        progress: receives the copying.

    Returns:
        The weight bytes really written.

    Raises:
        ExportError: a hard link is not possible.
    """
    source, written, shares_blocks = checkpoint.folder, 0, weights == "auto"
    if (source / INDEX_NAME).is_file():
        shutil.copyfile(source / INDEX_NAME, staging / INDEX_NAME)
    if weights == "link":
        log(f"export: {LINK_NOTE}")
    for file in checkpoint.files:
        real, target = (source / file.name).resolve(), staging / file.name
        if weights == "link":
            link_file(real, target)
            continue
        if shares_blocks and (reason := reflink_file(real, target)):
            shares_blocks = False
            log(f"export: copying the weights: {reason}; in place (no -o) nothing is written{_or_links(real, target)}")
        if not shares_blocks:
            written += _copy(real, target, progress)
        shutil.copystat(real, target)
    if weights == "auto" and shares_blocks:
        log(
            "export: the weights share their blocks with the checkpoint (reflinks); a change of either leaves the other alone"
        )
    return written


LINK_NOTE = (
    "hard links: onnxruntime and TensorRT read them; the Python package onnx (load, checker) and onnx-ir refuse a file of more "
    "than one link, and a change of the checkpoint's files changes the bundle's"
)


def _or_links(source: Path, target: Path) -> str:
    """Hard links as another way, where both lie on one file system."""
    same = source.stat().st_dev == target.parent.stat().st_dev
    return ", nor with hard links (--weights link)" if same else ""


def _copy(source: Path, target: Path, progress: Progress) -> int:
    size, written = source.stat().st_size, 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 22):
            writer.write(block)
            written += len(block)
            progress(target.name, written, size)
    return written


def link_file(source: Path, target: Path) -> None:
    """A hard link.

    Raises:
        ExportError: another file system, one without hard links, or a file of another user.
    """
    try:
        os.link(source, target)
    except OSError as err:
        crosses = err.errno == errno.EXDEV
        raise ExportError(
            "a hard link is not possible here",
            details={
                "from": source,
                "to": target.parent,
                "reason": err.strerror or err,
                **({"expected": "both on one file system, under one mount"} if crosses else {}),
            },
            hint="use --weights auto, which copies where it must"
            + (", or choose -o on the file system of the checkpoint" if crosses else ""),
        ) from err


_FICLONE = 0x40049409
"""ioctl of linux/fs.h: share the extents of another file (btrfs, XFS, bcachefs)."""
_NO_REFLINKS = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)


def reflink_file(source: Path, target: Path) -> str | None:
    """Shares the file's blocks instead of copying them. Returns why it could not; then there is no file."""
    try:
        import fcntl
    except ImportError:
        return "this system has no reflinks"
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        return None
    except OSError as err:
        target.unlink(missing_ok=True)
        if err.errno == errno.EXDEV:
            return "the checkpoint lies on another file system"
        reason = "this file system has no reflinks" if err.errno in _NO_REFLINKS else "they cannot be reflinked"
        return f"{reason} ({err.strerror or err})"


def shares_blocks(checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether weight files can be reflinked into a folder; told by trying the first one."""
    try:
        return _can_reflink(checkpoint.folder / checkpoint.files[0].name, folder)
    except OSError:  # nothing can be written there, which the export will say
        return False


def _can_reflink(source: Path, folder: Path) -> bool:
    with staging_folder(folder) as scratch:
        return reflink_file(source.resolve(), scratch / "probe") is None
