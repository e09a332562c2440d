"""A bundle: the folder an export makes, its manifest, and the guarantee that its files belong together.

::

    manifest.json            what was exported, from which files (sizes, times, hashes); written last
    config.json, tokenizer   the checkpoint's own
    model.onnx               the graph with standard function bodies; weights point into the safetensors files
    model.onnxruntime.onnx   the same graph for our own onnxruntime session
    *.safetensors            the checkpoint's own files (the very same ones, reflinks, hard links or copies)
    engines/, report/        made later by ``build`` and ``validate``

Role: written once by :mod:`llama_export.export`, opened by everything after it. Needs neither torch nor onnx.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export import __version__
from llama_export.checkpoint import INDEX_NAME, TOKENIZER_FILES, Checkpoint, WeightFile, read_safetensors_header
from llama_export.config import (
    DTYPES,
    TASKS,
    LlamaConfig,
    RopeConfig,
    WeightsMode,
    config_from_dict,
    load_json_object,
)
from llama_export.errors import ArtifactMismatchError, ConfigError, ExportError, ToolchainError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
ONNXRUNTIME_NAME = "model.onnxruntime.onnx"
ENGINES_NAME = "engines"
_MARKERS = (MODEL_NAME, ONNXRUNTIME_NAME, MANIFEST_NAME, ENGINES_NAME)
Progress = Callable[[str, int, int], None]
"""(file name, bytes done, bytes in all)"""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened and checked bundle."""

    folder: Path
    manifest: Mapping[str, Any]
    config: LlamaConfig

    @property
    def model_path(self) -> Path:
        """The graph with standard bodies."""
        return self.folder / MODEL_NAME

    @property
    def onnxruntime_path(self) -> Path:
        """The graph for our onnxruntime session."""
        return self.folder / ONNXRUNTIME_NAME

    @property
    def task(self) -> str:
        """What the graph computes: one of ``config.TASKS``."""
        return str(self.manifest["task"])

    @property
    def ops(self) -> frozenset[str]:
        """The custom ops of the graph."""
        return frozenset(self.manifest["ops"])

    @property
    def dtype(self) -> str:
        """Compute dtype of the graph."""
        return str(self.manifest["dtype"])

    @property
    def engines(self) -> list[Path]:
        """Engine files that have a sidecar, sorted by name."""
        return sorted(
            path for path in (self.folder / ENGINES_NAME).glob("*.engine") if path.with_suffix(".json").is_file()
        )


def load_bundle(folder: Path, *, ignore_hashes: bool = False) -> Bundle:
    """Opens a bundle and checks every file against the manifest.

    Args:
        folder: made by ``llama-export export``.
        ignore_hashes: skip the comparison of contents (missing files are still errors).

    Raises:
        ConfigError: no manifest here, or one this version does not understand.
        ArtifactMismatchError: a file is missing or is not the one the manifest describes.
    """
    if not (folder / MANIFEST_NAME).is_file():
        is_checkpoint = (folder / "config.json").is_file()
        raise ConfigError(
            f"`{folder}` is not a bundle",
            details={"missing": MANIFEST_NAME},
            hint=f"make one first: llama-export export {folder}"
            if is_checkpoint
            else "give the folder that `llama-export export` made",
        )
    manifest = load_json_object(folder / MANIFEST_NAME)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            "this manifest has another schema version",
            details={"file": folder / MANIFEST_NAME, "got": manifest.get("schema_version"), "expected": SCHEMA_VERSION},
            hint=f"export again with this version ({__version__})",
        )
    try:
        model = _tuples(manifest["model"])
        config = LlamaConfig(**{**model, "rope": RopeConfig(**_tuples(model["rope"]))})
        _check(manifest["task"] in TASKS, f"task {manifest['task']!r}")
        _check(manifest["dtype"] in DTYPES, f"dtype {manifest['dtype']!r}")
        _check(all(isinstance(token, int) for token in manifest["eos_token_ids"]), "eos_token_ids")
        weights, graphs = list(manifest["weights"]), dict(manifest["functions"])
        for entry in (*weights, *graphs.values()):
            check_plain_name(entry["file"], folder / MANIFEST_NAME)
            if not (folder / entry["file"]).is_file():
                raise ArtifactMismatchError(
                    f"bundle is incomplete: `{entry['file']}` is missing",
                    details={"bundle": folder},
                    hint="export again",
                )
        if not ignore_hashes:
            _check_config(folder, config)
            for entry in graphs.values():
                _check_hash(folder, entry["file"], entry["sha256"])
            for entry in weights:
                _check_weight_file(folder, entry)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ConfigError(
            f"`{MANIFEST_NAME}` lacks a field or holds a wrong one: {err}",
            details={"file": folder / MANIFEST_NAME},
            hint="export again",
        ) from err
    return Bundle(folder, manifest, config)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where the configs have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _check(ok: bool, field: str) -> None:
    if not ok:
        raise ValueError(field)


def _check_config(folder: Path, expected: LlamaConfig) -> None:
    """``config.json`` still states what was exported. Keys that the export accepted are not questioned again."""
    path = folder / "config.json"
    if not path.is_file():
        return
    got = config_from_dict(data := load_json_object(path), source=str(path), allow_keys=data.keys())
    changed = [
        field.name
        for field in dataclasses.fields(LlamaConfig)
        if getattr(got, field.name) != getattr(expected, field.name)
    ]
    if changed:
        raise ArtifactMismatchError(
            "`config.json` changed after the export",
            details={
                "bundle": folder,
                "got": ", ".join(f"{name}: {getattr(got, name)}" for name in changed),
                "expected": ", ".join(f"{name}: {getattr(expected, name)}" for name in changed),
            },
            hint="export again, or undo the change",
        )


def check_plain_name(name: str, source: Path) -> None:
    """Refuses a file name that could leave the bundle's folder.

    Raises:
        ArtifactMismatchError: a path, ``..`` or an absolute name.
    """
    if Path(name).name != name or name in ("", ".", "..") or set(name) & {"\\", "\0"}:
        raise ArtifactMismatchError(
            f"`{source.name}` names a file outside its folder",
            details={"file": source, "got": name, "expected": "a plain file name"},
            hint="do not use bundles from a source you do not trust",
        )


def _check_hash(folder: Path, name: str, expected: str) -> None:
    try:
        got = sha256_of_file(folder / name)
    except OSError as err:
        raise ArtifactMismatchError(
            f"`{name}` cannot be read",
            details={"bundle": folder, "reason": err.strerror or err},
            hint="check its permissions",
        ) from err
    if got != expected:
        raise ArtifactMismatchError(
            f"`{name}` is not the file the manifest describes",
            details={"bundle": folder, "got": f"sha256 {got}", "expected": f"sha256 {expected}"},
            hint="export again, or pass --ignore-hashes if you changed it on purpose",
        )


def _check_weight_file(folder: Path, entry: Mapping[str, Any]) -> None:
    """Size and header always; then the modification time, and where it differs the content hash if there is one."""
    file, _ = read_safetensors_header(folder / entry["file"])
    hint = "export again (the graph takes seconds; nothing is copied in place), or pass --ignore-hashes if you know the file is the same"

    def mismatch(got: object, expected: object) -> ArtifactMismatchError:
        return ArtifactMismatchError(
            f"`{entry['file']}` changed after the export",
            details={"bundle": folder, "got": got, "expected": expected},
            hint=hint,
        )

    if file.size != entry["size"]:
        raise mismatch(f"{file.size} bytes", f"{entry['size']} bytes")
    if file.header_sha256 != entry["header_sha256"]:
        raise mismatch(f"header sha256 {file.header_sha256}", f"header sha256 {entry['header_sha256']}")
    if _same_time(file.mtime_ns, entry["mtime_ns"]):
        return
    if "sha256" in entry:
        _check_hash(folder, entry["file"], entry["sha256"])
    else:
        raise mismatch(f"modified at {file.mtime_ns} ns", f"modified at {entry['mtime_ns']} ns")


def _same_time(got_ns: int, recorded_ns: int) -> bool:
    """Equal, or cut to whole seconds as archives and container layers do."""
    whole_second = 1_000_000_000
    return got_ns == recorded_ns or got_ns == recorded_ns - recorded_ns % whole_second


def manifest_from_export(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    task: str,
    io: Sequence[Mapping[str, Any]],
    ops: Mapping[str, int],
    functions: Mapping[str, Mapping[str, Any]],
    kv_cache: Mapping[str, Any] | None,
    generator: Mapping[str, str],
    weights: Sequence[WeightFile],
    weight_hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest's content; keys are documented in README, section "The bundle"."""
    model = dataclasses.asdict(checkpoint.config)
    return {
        "schema_version": SCHEMA_VERSION,
        "generator": {"llama_export": __version__, **generator},
        "task": task,
        "model": model,
        "dtype": dtype,
        "io": list(io),
        "kv_cache": None if kv_cache is None else dict(kv_cache),
        "rope": model["rope"],
        "eos_token_ids": stop_token_ids(checkpoint),
        "weights": [
            {
                "file": file.name, "size": file.size, "mtime_ns": file.mtime_ns, "header_sha256": file.header_sha256,
                **({"sha256": weight_hashes[file.name]} if file.name in weight_hashes else {}),
            }
            for file in weights
        ],
        "graph_sha256": functions["standard"]["sha256"],
        "functions": {target: dict(facts) for target, facts in functions.items()},
        "ops": dict(ops),
    }  # fmt: skip


def stop_token_ids(checkpoint: Checkpoint) -> list[int]:
    """What ends a generation: ``generation_config.json`` decides where it says so, else ``config.json``."""
    path = checkpoint.folder / "generation_config.json"
    stated = load_json_object(path).get("eos_token_id") if path.is_file() else None
    if stated is None:
        return list(checkpoint.config.eos_token_ids)
    return list(stated) if isinstance(stated, list) else [stated]


# ---- where an export goes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a bundle will be written."""

    folder: Path
    in_place: bool
    """The bundle is the checkpoint's own folder; no weight is touched."""


def plan_destination(checkpoint: Checkpoint, output: Path | None, *, force: bool, weights: WeightsMode) -> Destination:
    """Decides and checks the destination before any work is done.

    Raises:
        ConfigError: it exists and ``force`` is off, is not a bundle, or is a folder that must not be written to.
        ToolchainError: not enough space for the weights.
    """
    source = checkpoint.folder
    if output is None or output.resolve() == source.resolve():
        _check_in_place(checkpoint, force)
        return Destination(source, True)
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
    if weights in ("auto", "copy"):
        need, free = sum(file.size for file in checkpoint.files), shutil.disk_usage(existing).free
        if need > free and not _can_reflink(source / checkpoint.files[0].name, existing):
            raise no_space(existing, f"{free} bytes free", f"{need} bytes of weights")
    return Destination(output, False)


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
    found = [name for name in _MARKERS if (folder / name).exists()]
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
        hint="free some space, or export in place (without -o)",
    )


# ---- writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_bundle(destination: Destination) -> Iterator[Path]:
    """A folder to write into. On a clean exit its files become the bundle; on any other exit nothing is left.

    In place the files are written under temporary names' folder beside the checkpoint's files and renamed one by one,
    the manifest last: without a manifest there is no bundle. Elsewhere one folder is renamed as a whole.
    """
    target = destination.folder
    home = target if destination.in_place else target.resolve().parent
    new_parents = [folder for folder in (home, *home.parents) if not folder.exists()]
    staging = home / f".llama-export-{os.getpid()}.partial"
    try:
        home.mkdir(parents=True, exist_ok=True)
        remove_stale_staging(home)
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        if destination.in_place:
            _move_in(staging, target)
        else:
            _swap_in(staging, target, home)
        _sync(home)
    except OSError as err:
        raise write_error(err, home) from err
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the bundle is in it, or another process uses it
            for folder in new_parents:
                folder.rmdir()


def _move_in(staging: Path, target: Path) -> None:
    """Renames the files of an export in place, the manifest last; if that fails half-way, none of them stays."""
    placed: list[Path] = []
    try:
        for name in (ONNXRUNTIME_NAME, MODEL_NAME, MANIFEST_NAME):
            placed.append(target / name)
            os.replace(staging / name, target / name)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise


def _swap_in(staging: Path, target: Path, home: Path) -> None:
    """Renames ``staging`` to ``target``; an existing bundle steps aside first and comes back if that fails."""
    if not (target.exists() and any(target.iterdir())):
        os.rename(staging, target)  # over an empty folder too
        return
    aside = home / f".llama-export-{os.getpid()}.old.partial"
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except BaseException:
        if not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_stale_staging(home: Path) -> None:
    """Removes what exports that were killed left behind: hidden folders of processes that no longer run."""
    for path in home.glob(".llama-export-*.partial"):
        match = re.fullmatch(r"\.llama-export-(\d+)(?:\.old)?\.partial", path.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside ``path`` under a temporary name, syncs, renames.

    Raises:
        ToolchainError: no space. ExportError: any other failure to write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as err:
        raise write_error(err, path) from err
    finally:
        temporary.unlink(missing_ok=True)


def write_error(err: OSError, where: Path) -> ToolchainError | ExportError:
    """A full disk is this machine's fault; anything else names the path and the system's reason."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(where, err.strerror or "disk full", "room for the bundle")
    return ExportError(
        f"cannot write `{err.filename or where}`",
        details={"reason": err.strerror or err},
        hint="check the path and its permissions",
    )


def place_files(
    checkpoint: Checkpoint, staging: Path, weights: WeightsMode, progress: Progress
) -> tuple[list[WeightFile], int]:
    """Brings the checkpoint's files into ``staging``.

    Returns:
        The weight files as they lie there (their modification times may differ), and the weight bytes really written.
    """
    source = checkpoint.folder
    for name in ("config.json", INDEX_NAME, *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    placed, written = [], 0
    for file in checkpoint.files:
        written += _place_weights(source / file.name, staging / file.name, weights, progress)
        placed.append(dataclasses.replace(file, mtime_ns=(staging / file.name).stat().st_mtime_ns))
    return placed, written


def _place_weights(source: Path, target: Path, weights: WeightsMode, progress: Progress) -> int:
    real = source.resolve()
    if weights == "link":
        try:
            os.link(real, target)
        except OSError as err:
            raise ExportError(
                "a hard link is not possible here",
                details={"from": real, "to": target, "reason": err.strerror or err},
                hint="use --weights auto, which copies where it must",
            ) from err
        return 0
    written = 0
    if weights == "copy" or not _reflink(real, target):
        size = real.stat().st_size
        with real.open("rb") as reader, target.open("wb") as writer:
            while block := reader.read(1 << 22):
                writer.write(block)
                written += len(block)
                progress(source.name, written, size)
    shutil.copystat(real, target)
    return written


_FICLONE = 0x40049409
"""ioctl of linux/fs.h: share the extents of another file (btrfs, XFS, bcachefs)."""


def _reflink(source: Path, target: Path) -> bool:
    """Shares the file's blocks instead of copying them; False where the file system cannot."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        return True
    except OSError:
        target.unlink(missing_ok=True)
        return False


def _can_reflink(source: Path, folder: Path) -> bool:
    probe = folder / f".llama-export-{os.getpid()}.reflink"
    try:
        return _reflink(source, probe)
    finally:
        probe.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of_file(path: Path) -> str:
    """Hex digest of the content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_bytes(data: object) -> bytes:
    """Readable, stable JSON with a final newline."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
