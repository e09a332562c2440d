"""How files get into a bundle's folder: where an export may write, staging folders, and the step that makes files visible."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_export._system.commit import UnfinishedCommitError, commit, locked, replace_folder, staging_folder, sync
from llama_export._system.interrupt import undone
from llama_export.bundle.bundle import MARKERS, Bundle, finish_interrupted
from llama_export.bundle.manifest import MANIFEST_NAME, Manifest, QuantizedRecord, read_manifest, variant_names
from llama_export.bundle.placement import link_file
from llama_export.checkpoint.checkpoint import Checkpoint
from llama_export.config.settings import VARIANTS, WeightsMode
from llama_export.errors import ArtifactMismatchError, ConfigError, ExportError, ToolchainError

# ---- where an export goes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a bundle will be written."""

    folder: Path
    in_place: bool
    """The bundle is the checkpoint's own folder; no weight is touched."""
    existing: Path
    """The nearest folder that there is already, on whose file system it will lie."""


def plan_destination(
    checkpoint: Checkpoint,
    output: Path | None,
    *,
    force: bool,
    weights: WeightsMode,
    converts: bool = False,
) -> Destination:
    """Decides and checks the destination before any work is done, from the headers of the weight files alone.

    Whether it has the space: :mod:`llama_export.bundle.estimate`.

    Args:
        checkpoint: what is exported.
        output: folder to make; None: in place.
        force: replace an existing bundle.
        weights: how they get there.
        converts: the weights are to be written in another dtype.

    Raises:
        ConfigError: it exists and ``force`` is off, is not a bundle, or is a folder that must not be written to; or
            weights are to be converted in place.
        ExportError: hard links are asked for and not possible.
    """
    source = checkpoint.folder
    if output is None or output.resolve() == source.resolve():
        if converts:
            raise ConfigError(
                "weights are not converted in place: the checkpoint's own files are never rewritten",
                details={"folder": source},
                hint="write the bundle elsewhere: -o BUNDLE",
            )
        _check_in_place(checkpoint, force)
        return Destination(source, True, source)
    if output.exists() or output.is_symlink():
        if not output.is_dir() or output.is_symlink():
            raise ConfigError(
                f"`{output}` is not a folder", details={"expected": "a folder to be made"}, hint="choose another -o"
            )
        if source.resolve().is_relative_to(output.resolve()):
            raise ConfigError(
                f"`{output}` holds the checkpoint itself",
                details={"checkpoint": source, "expected": "a new or empty folder"},
                hint="choose another -o",
            )
        if any(output.iterdir()):
            if not force:
                raise ConfigError(
                    f"output folder `{output}` exists",
                    details={"expected": "a new or empty folder"},
                    hint="choose another -o, or pass --force",
                )
            if not (output / MANIFEST_NAME).is_file():
                raise ConfigError(
                    f"`{output}` is not a bundle, so --force does not replace it",
                    details={"missing": MANIFEST_NAME},
                    hint="choose another -o, or remove the folder yourself",
                )
    parent = output.resolve().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"`{existing}` is not writable", details={"output": output}, hint="choose another -o")
    if weights == "link":
        _check_links(checkpoint, existing)
    return Destination(output, False, existing)


def _check_links(checkpoint: Checkpoint, folder: Path) -> None:
    """Links one weight file, to be told before the work and not after it that hard links do not get there."""
    with staging_folder(folder) as scratch:
        link_file((checkpoint.folder / checkpoint.files[0].name).resolve(), scratch / "probe")


def _check_in_place(checkpoint: Checkpoint, force: bool) -> None:
    folder = checkpoint.folder
    links = [file.name for file in checkpoint.files if (folder / file.name).is_symlink()]
    if links:
        raise ConfigError(
            "this checkpoint's weights are symbolic links (a hub cache), so it cannot become the bundle itself",
            details={"folder": folder, "got": ", ".join(links[:3])},
            hint="write the bundle elsewhere: -o BUNDLE",
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            "the checkpoint's folder is read-only",
            details={"folder": folder},
            hint="write the bundle elsewhere: -o BUNDLE",
        )
    found = [name for name in MARKERS if (folder / name).exists()]
    if found and not force:
        raise ConfigError(
            f"`{folder}` already holds an export",
            details={"got": ", ".join(found)},
            hint="pass --force to replace it, or -o BUNDLE",
        )


def no_space(where: Path, got: str, expected: str) -> ToolchainError:
    """The error for a full disk."""
    return ToolchainError(
        "no space left",
        details={"where": where, "got": got, "expected": expected},
        hint="free some space, or export in place (without -o), which writes no weights unless they are to be embedded",
    )


# ---- writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_bundle(destination: Destination) -> Iterator[Path]:
    """A folder to write into. On a clean exit its files become the bundle; on any other exit nothing is left.

    Killed at any moment, there is the old bundle (or none) or the new one: see :mod:`llama_export._system.commit`.
    """
    target = destination.folder
    home = target if destination.in_place else target.resolve().parent
    new_parents = [folder for folder in (home, *home.parents) if not folder.exists()]

    def remove_new_parents() -> None:
        with contextlib.suppress(OSError):  # not empty: the bundle is in it, or another process uses it
            for folder in new_parents:
                folder.rmdir()

    try:
        home.mkdir(parents=True, exist_ok=True)
        with undone(remove_new_parents), staging_folder(home) as staging:
            yield staging
            if destination.in_place:
                # An export's manifest knows no quantised variant: those of the export before it go with that one's.
                stale = [name for variant in VARIANTS for name in variant_names(variant) if (target / name).exists()]
                with locked(target):
                    commit(staging, target, obsolete=stale)
            else:
                with locked(target) if target.is_dir() else contextlib.nullcontext():
                    replace_folder(staging, target)
            for folder in {home, *(folder.parent for folder in new_parents)}:
                sync(folder)
    except OSError as err:
        raise write_error(err, home) from err
    finally:
        remove_new_parents()


@contextlib.contextmanager
def unchanged(bundle: Bundle, staging: Path, *, replacing: str | None = None) -> Iterator[Manifest]:
    """Holds the bundle's lock for a commit and gives the manifest as it is now.

    Args:
        bundle: what was opened before the work.
        staging: the folder that will be committed.
        replacing: see :func:`load_bundle`.

    Raises:
        ArtifactMismatchError: the bundle was exported again since then. ConfigError: its manifest cannot be read any more.
    """
    try:
        with locked(bundle.folder):
            if not staging.is_dir():  # the folder itself was replaced, and the staging folder with it
                raise _replaced(bundle.folder)
            finish_interrupted(bundle.folder)
            current = read_manifest(bundle.folder, replacing=replacing)
            if not current.is_same_export(bundle.manifest):
                raise _replaced(bundle.folder)
            yield current
    except FileNotFoundError as err:
        if staging.is_dir():
            raise
        raise _replaced(bundle.folder) from err


def _replaced(folder: Path) -> ArtifactMismatchError:
    return ArtifactMismatchError(
        "the bundle was exported again while this command ran",
        details={"bundle": folder, "expected": "the graphs and weights that this command began with"},
        hint="run the command again; nothing was written",
    )


@contextlib.contextmanager
def staged_variant(bundle: Bundle) -> Iterator[Path]:
    """A folder to write a quantised variant into, for :func:`commit_variant`; nothing of it stays without that.

    Raises:
        ToolchainError: no space. ArtifactMismatchError: the bundle was replaced. ExportError: any other failure to write.
    """
    folder = bundle.folder
    staging = None
    try:
        with staging_folder(folder) as staging:
            yield staging
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ToolchainError(
                "no space left",
                details={"where": folder, "got": err.strerror or err, "expected": "room for the quantised weights"},
                hint="free some space; the bundle is as it was",
            ) from err
        if isinstance(err, FileNotFoundError) and staging is not None and str(staging) in str(err.filename):
            raise _replaced(folder) from err
        raise write_error(err, folder) from err


def commit_variant(bundle: Bundle, staging: Path, record: QuantizedRecord) -> None:
    """A variant's files and its entry in the manifest appear together. Entries that others made meanwhile stay.

    Raises:
        ArtifactMismatchError: the bundle was exported again meanwhile. OSError: see :func:`llama_export._system.commit.commit`.
    """
    with unchanged(bundle, staging, replacing=record.type) as current:
        (staging / MANIFEST_NAME).write_bytes(json_bytes(current.with_variant(record).to_json()))
        commit(staging, bundle.folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes into a hidden folder beside ``path``, syncs, renames. If this is killed, the next write beside ``path`` removes
    what is left of it.

    Raises:
        ToolchainError: no space. ExportError: any other failure to write.
    """
    try:
        with staging_folder(path.parent) as staging:
            temporary = staging / path.name
            temporary.write_bytes(data)
            sync(temporary)
            os.replace(temporary, path)
        sync(path.parent)
    except OSError as err:
        # The staging folder is not what the user named.
        raise write_error(OSError(err.errno, err.strerror, str(path)), path) from err


def write_error(err: OSError, where: Path) -> ToolchainError | ExportError:
    """A full disk is this machine's fault; anything else names the path and the system's reason."""
    if isinstance(err, UnfinishedCommitError):
        return ExportError(
            "everything is written, but not all of it could be moved into place",
            details={"file": err.filename or where, "reason": err.strerror or err},
            hint="the next command that opens this folder and may write to it moves the rest",
        )
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(where, err.strerror or "disk full", "room for the bundle")
    return ExportError(
        f"cannot write `{err.filename or where}`",
        details={"reason": err.strerror or err},
        hint="check the path and its permissions",
    )


def json_bytes(data: object) -> bytes:
    """Readable, stable JSON with a final newline."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
