"""A bundle: the folder an export makes, its manifest, and the guarantee that its files belong together.

::

    manifest.json            what was exported, from which files (sizes, times, hashes); written last
    config.json, tokenizer   the checkpoint's own
    model.onnx               the graph with standard function bodies; weights point into the safetensors files
    model.onnxruntime.onnx   the same graph for our own onnxruntime session
    *.safetensors            the checkpoint's own files (the very same ones, reflinks, hard links, copies or converted);
                             none in another folder where the ONNX files hold the weights themselves (``embed``)
    model.onnxruntime.int4.onnx, .data    a quantised variant and its weights, made by ``quantize``; and ``int8`` likewise
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
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export import __version__
from llama_export._commit import (
    COMMIT_NAME,
    UnfinishedCommitError,
    commit,
    finish_commit,
    replace_folder,
    staging_folder,
    sync,
)
from llama_export._files import is_plain_name, leads_out, open_regular
from llama_export.checkpoint import (
    INDEX_NAME,
    TOKENIZER_FILES,
    Checkpoint,
    WeightFile,
    check_files,
    read_safetensors_header,
)
from llama_export.config import (
    DTYPES,
    TASKS,
    VARIANTS,
    LlamaConfig,
    RopeConfig,
    WeightsMode,
    config_from_dict,
    load_json_object,
)
from llama_export.errors import ArtifactMismatchError, ConfigError, ExportError, ToolchainError
from llama_export.path_hints import not_a_bundle

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
ONNXRUNTIME_NAME = "model.onnxruntime.onnx"
ENGINES_NAME = "engines"
_GRAPHS = {"standard": MODEL_NAME, "onnxruntime": ONNXRUNTIME_NAME}
_MARKERS = (MODEL_NAME, ONNXRUNTIME_NAME, MANIFEST_NAME, ENGINES_NAME, COMMIT_NAME)
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
    def variants(self) -> tuple[str, ...]:
        """The quantised variants there are, of :data:`VARIANTS`."""
        return tuple(name for name in VARIANTS if name in self.manifest.get("quantized", {}))

    def variant_path(self, variant: str | None) -> Path:
        """The graph of a quantised variant, for our onnxruntime session; of None, that of the weights as they are.

        Raises:
            ConfigError: there is no such variant, or it was not made.
        """
        if variant is None:
            return self.onnxruntime_path
        if variant not in VARIANTS:
            raise ConfigError(
                f"unknown type of quantised weights: {variant}",
                details={"got": variant, "expected": " | ".join(VARIANTS)},
                hint="choose one of these",
            )
        if variant not in self.variants:
            raise ConfigError(
                f"this bundle has no {variant} weights",
                details={"bundle": self.folder, "got": ", ".join(self.variants) or "none", "expected": variant},
                hint=f"make them: llama-export quantize {self.folder} --type {variant}",
            )
        return self.folder / variant_names(variant)[0]

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
    def is_embedded(self) -> bool:
        """The ONNX files hold the weights themselves."""
        return not self.manifest["weights"]

    @property
    def engines(self) -> list[Path]:
        """Engine files that have a sidecar, sorted by name."""
        return sorted(
            path for path in (self.folder / ENGINES_NAME).glob("*.engine") if path.with_suffix(".json").is_file()
        )


def variant_names(variant: str) -> tuple[str, str]:
    """File names of a quantised variant: its graph, its weights."""
    stem = ONNXRUNTIME_NAME.removesuffix(".onnx")
    return f"{stem}.{variant}.onnx", f"{stem}.{variant}.data"


def load_bundle(folder: Path, *, ignore_hashes: bool = False, replacing: str | None = None) -> Bundle:
    """Opens a bundle and checks every file against the manifest. Finishes an export or a build that was killed while its
    files were moved into place.

    Args:
        folder: made by ``llama-export export``.
        ignore_hashes: skip the comparison of contents (missing files are still errors).
        replacing: a quantised variant that is about to be made anew: what is there of it is not looked at, nor listed.

    Raises:
        ConfigError: no manifest here, or one this version does not understand.
        ArtifactMismatchError: a file is missing, lies elsewhere or is not the one the manifest describes; or what was
            interrupted cannot be finished, because the folder is read-only.
    """
    _finish_interrupted(folder)
    if not os.path.lexists(folder / MANIFEST_NAME):
        raise not_a_bundle(folder, MANIFEST_NAME)
    manifest = load_json_object(folder / MANIFEST_NAME)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            "this manifest has another schema version",
            details={"file": folder / MANIFEST_NAME, "got": manifest.get("schema_version"), "expected": SCHEMA_VERSION},
            hint=f"export again with this version ({__version__})",
        )
    try:
        if replacing is not None and "quantized" in manifest:
            kept = {key: value for key, value in dict(manifest["quantized"]).items() if key != replacing}
            manifest = {**manifest, "quantized": kept}
        model = _tuples(manifest["model"])
        config = LlamaConfig(**{**model, "rope": RopeConfig(**_tuples(model["rope"]))})
        _check(manifest["task"] in TASKS, f"task {manifest['task']!r}")
        _check(manifest["dtype"] in DTYPES, f"dtype {manifest['dtype']!r}")
        _check(all(isinstance(token, int) for token in manifest["eos_token_ids"]), "eos_token_ids")
        _check(all(isinstance(entry["name"], str) for entry in manifest["io"]), "io")
        _check(isinstance(manifest["ops"], dict), "ops")
        weights, graphs = list(manifest["weights"]), dict(manifest["functions"])
        for entry in (*weights, *graphs.values()):
            check_plain_name(entry["file"], folder / MANIFEST_NAME)
        _check({target: entry["file"] for target, entry in graphs.items()} == _GRAPHS, "functions")
        _check(manifest["graph_sha256"] == graphs["standard"]["sha256"], "graph_sha256")
        _check(len({entry["file"] for entry in weights}) == len(weights), "weights")
        variants = _checked_variants(manifest)
        made = [entry[key] for entry in variants.values() for key in ("file", "data")]
        _check_places(folder, [*(entry["file"] for entry in (*weights, *graphs.values())), *made])
        for name in (*(entry["file"] for entry in (*weights, *graphs.values())), *made):
            if not os.path.exists(folder / name):
                raise ArtifactMismatchError(
                    f"bundle is incomplete: `{name}` is missing",
                    details={"bundle": folder},
                    hint=_requantize(folder, name.split(".")[-2]) if name in made else "export again",
                )
        if not ignore_hashes:
            _check_config(folder, config)
            for entry in graphs.values():
                _check_hash(folder, entry["file"], entry["sha256"])
            for entry in weights:
                _check_weight_file(folder, entry)
            for variant, entry in variants.items():
                _check_variant(folder, variant, entry, graphs["onnxruntime"]["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as err:
        raise ConfigError(
            f"`{MANIFEST_NAME}` lacks a field or holds a wrong one: {err}",
            details={"file": folder / MANIFEST_NAME},
            hint="export again",
        ) from err
    return Bundle(folder, manifest, config)


def _checked_variants(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The manifest's entry of each quantised variant, by type; none in a bundle that was not quantised."""
    variants = dict(manifest.get("quantized", {}))
    for variant, entry in variants.items():
        _check(variant in VARIANTS and entry["type"] == variant, "quantized")
        _check((entry["file"], entry["data"]) == variant_names(variant), f"quantized.{variant}")
        numbers = ("bits", "block_size", "accuracy_level", "size", "data_size", "data_mtime_ns")
        _check(all(type(entry[key]) is int and entry[key] >= 0 for key in numbers), f"quantized.{variant}")
        hashes = ("sha256", "data_sha256", "source_sha256")
        _check(all(isinstance(entry[key], str) for key in hashes), f"quantized.{variant}")
        _check(isinstance(entry["symmetric"], bool), f"quantized.{variant}")
    return variants


def _requantize(folder: Path, variant: str) -> str:
    return f"make it again: llama-export quantize {folder} --type {variant} --force"


def _check_variant(folder: Path, variant: str, entry: Mapping[str, Any], source_sha256: str) -> None:
    """It belongs to this export; its graph by content; its weights by size, and by content where the time differs."""
    hint = _requantize(folder, variant)
    if entry["source_sha256"] != source_sha256:
        raise ArtifactMismatchError(
            f"the {variant} weights are of another export",
            details={
                "bundle": folder,
                "got": f"made from {ONNXRUNTIME_NAME} of sha256 {entry['source_sha256']}",
                "expected": f"sha256 {source_sha256}",
            },
            hint=hint,
        )
    _check_hash(folder, entry["file"], entry["sha256"], hint)
    found = os.stat(folder / entry["data"])
    if found.st_size != entry["data_size"]:
        raise ArtifactMismatchError(
            f"`{entry['data']}` is not the file the manifest describes",
            details={"bundle": folder, "got": f"{found.st_size} bytes", "expected": f"{entry['data_size']} bytes"},
            hint=hint,
        )
    if not _same_time(found.st_mtime_ns, entry["data_mtime_ns"]):
        _check_hash(folder, entry["data"], entry["data_sha256"], hint)


def _finish_interrupted(folder: Path) -> None:
    check_files(folder, (MANIFEST_NAME,), hub_cache=False, error=ArtifactMismatchError)
    inside = [folder] if leads_out(folder / ENGINES_NAME) else [folder, folder / ENGINES_NAME]
    for home in inside:
        try:
            finish_commit(home)
        except OSError as err:
            raise ArtifactMismatchError(
                "an export or a build was interrupted while its files were moved into place, and cannot be finished here",
                details={"waiting": home / COMMIT_NAME, "reason": err.strerror or err},
                hint=f"make the folder writable once and run `llama-export inspect {folder}`",
            ) from err


def _check_places(folder: Path, names: Sequence[str]) -> None:
    """No file that is read lies outside the bundle, whatever links are in it."""
    text = ("config.json", INDEX_NAME, *TOKENIZER_FILES)
    engines = folder / ENGINES_NAME
    if (real := leads_out(engines)) is not None:
        raise ArtifactMismatchError(
            f"`{ENGINES_NAME}` is a symbolic link out of the bundle",
            details={"folder": engines, "got": real, "expected": "a folder in the bundle"},
            hint="put the folder itself there, if you know that it belongs there",
        )
    check_files(folder, (*names, *text), hub_cache=False, error=ArtifactMismatchError)
    built = [path.name for pattern in ("*.engine", "*.json") for path in engines.glob(pattern)]
    check_files(engines, sorted(built), hub_cache=False, error=ArtifactMismatchError)


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
        ArtifactMismatchError: a path, ``..``, an absolute name, or one that cannot be printed.
    """
    if not is_plain_name(name):
        raise ArtifactMismatchError(
            f"`{source.name}` names a file outside its folder",
            details={"file": source, "got": name, "expected": "a plain file name"},
            hint="do not use bundles from a source you do not trust",
        )


def _check_hash(
    folder: Path,
    name: str,
    expected: str,
    hint: str = "export again, or pass --ignore-hashes if you changed it on purpose",
) -> None:
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
            hint=hint,
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
    tokens = stated if isinstance(stated, list) else [stated]
    if not all(type(token) is int for token in tokens):
        raise ConfigError(
            "bad value for eos_token_id",
            details={"file": path, "got": str(stated)[:200], "expected": "a token id, or a list of them"},
            hint="restore the file from its source",
        )
    return list(tokens)


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

    Whether it has the space: :mod:`llama_export.estimate`.

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
        _link((checkpoint.folder / checkpoint.files[0].name).resolve(), scratch / "probe")


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
        hint="free some space, or export in place (without -o), which writes no weights unless they are to be embedded",
    )


# ---- writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_bundle(destination: Destination) -> Iterator[Path]:
    """A folder to write into. On a clean exit its files become the bundle; on any other exit nothing is left.

    Killed at any moment, there is the old bundle (or none) or the new one: see :mod:`llama_export._commit`.
    """
    target = destination.folder
    home = target if destination.in_place else target.resolve().parent
    new_parents = [folder for folder in (home, *home.parents) if not folder.exists()]
    try:
        home.mkdir(parents=True, exist_ok=True)
        with staging_folder(home) as staging:
            yield staging
            if destination.in_place:
                # An export's manifest knows no quantised variant: those of the export before it go with that one's.
                stale = [name for variant in VARIANTS for name in variant_names(variant) if (target / name).exists()]
                commit(staging, target, obsolete=stale)
            else:
                replace_folder(staging, target)
            for folder in {home, *(folder.parent for folder in new_parents)}:
                sync(folder)
    except OSError as err:
        raise write_error(err, home) from err
    finally:
        with contextlib.suppress(OSError):  # not empty: the bundle is in it, or another process uses it
            for folder in new_parents:
                folder.rmdir()


@contextlib.contextmanager
def staged_variant(folder: Path) -> Iterator[Path]:
    """A folder to write a quantised variant and the new manifest into; its files replace those of ``folder`` together.

    Raises:
        ToolchainError: no space. ExportError: any other failure to write.
    """
    try:
        with staging_folder(folder) as staging:
            yield staging
            commit(staging, folder)
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ToolchainError(
                "no space left",
                details={"where": folder, "got": err.strerror or err, "expected": "room for the quantised weights"},
                hint="free some space; the bundle is as it was",
            ) from err
        raise write_error(err, folder) from err


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
        sync(path.parent)
    except OSError as err:
        raise write_error(err, path) from err
    finally:
        with contextlib.suppress(OSError):  # it may be the folder that is at fault
            temporary.unlink()


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
            _link(real, target)
            continue
        if shares_blocks and (reason := _reflink(real, target)):
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


def _or_links(source: Path, target: Path) -> str:
    """Hard links as another way, where both lie on one file system."""
    same = source.stat().st_dev == target.parent.stat().st_dev
    return ", nor with hard links (--weights link)" if same else ""


LINK_NOTE = (
    "hard links: onnxruntime and TensorRT read them; the Python package onnx (load, checker) and onnx-ir refuse a file of more "
    "than one link, and a change of the checkpoint's files changes the bundle's"
)


def _copy(source: Path, target: Path, progress: Progress) -> int:
    size, written = source.stat().st_size, 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(1 << 22):
            writer.write(block)
            written += len(block)
            progress(target.name, written, size)
    return written


def _link(source: Path, target: Path) -> None:
    """
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


def _reflink(source: Path, target: Path) -> str | None:
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
        return _reflink(source.resolve(), scratch / "probe") is None


def sha256_of_file(path: Path) -> str:
    """Hex digest of the content of a regular file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_bytes(data: object) -> bytes:
    """Readable, stable JSON with a final newline."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
