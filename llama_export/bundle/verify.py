"""``llama-export verify``: reads every byte of a bundle, compares it with the hashes that are known, and records missing ones.

Role: opening a bundle reads headers and a sample (:mod:`llama_export.bundle.bundle`); this reads the rest. Needs neither torch nor
onnx. A bundle exported before samples were recorded opens after any copy once its hashes are recorded here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llama_export._system.commit import commit, staging_folder
from llama_export._system.content import sample_sha256, sha256_of_file
from llama_export.bundle.bundle import Bundle, check_config, load_bundle, tensor_regions, unreadable
from llama_export.bundle.destination import json_bytes, unchanged, write_error
from llama_export.bundle.manifest import MANIFEST_NAME, Manifest, QuantizedRecord, WeightRecord
from llama_export.bundle.placement import Progress
from llama_export.checkpoint.safetensors import read_safetensors_header
from llama_export.config.huggingface import load_json_object
from llama_export.errors import ArtifactMismatchError, LlamaExportError


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedFile:
    """One file; an entry of ``files`` in ``verify --json``."""

    file: str
    """Path in the bundle."""
    bytes: int
    status: str
    """``same``: every byte is what was recorded. ``changed``: something recorded differs. ``unknown``: every byte was read,
    and no hash of the content is recorded; what is in ``checked`` agrees."""
    checked: tuple[str, ...]
    """What was compared: ``size``, ``header``, ``sample``, ``sha256``, ``fields``."""
    sha256: str | None
    """Of every byte, as read now."""
    problem: str | None = None
    """What differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What was found; the keys of ``verify --json``."""

    bundle: str
    status: str
    """``changed`` if a file is; else ``unknown`` if a file is and its hash was not recorded now; else ``same``."""
    recorded: tuple[str, ...]
    """Files whose hashes were added to the manifest."""
    files: tuple[VerifiedFile, ...]


def verify_bundle(
    folder: Path,
    *,
    record: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda name, done, total: None,
) -> VerifyResult:
    """Hashes every file that the manifest, or the sidecar of an engine, describes.

    Args:
        folder: of the bundle.
        record: add ``sha256`` and ``sample_sha256`` to the manifest where they are missing, unless a file changed.
        log: receives a line where nothing was recorded although it was asked for.
        progress: receives the hashing.

    Raises:
        ConfigError: not a bundle, or a damaged manifest.
        ArtifactMismatchError: a file is missing, or cannot be read; or the bundle was exported again meanwhile.
        ExportError: the manifest cannot be written.
    """
    bundle = load_bundle(folder, ignore_hashes=True)
    manifest = bundle.manifest
    files = [_verify_config(bundle)]
    for graph in manifest.functions.values():
        files.append(_verify_hash(folder, graph.file, graph.sha256, progress))
    weights: dict[str, WeightRecord] = {}
    for entry in manifest.weights:
        found, weights[entry.file] = _verify_weights(folder, entry, progress)
        files.append(found)
    variants: dict[str, QuantizedRecord] = {}
    for kind, made in manifest.quantized.items():
        files.append(_verify_hash(folder, made.file, made.sha256, progress))
        found, variants[kind] = _verify_data(folder, made, manifest, progress)
        files.append(found)
    for engine in bundle.engines:
        stated = load_json_object(engine.with_suffix(".json")).get("engine_sha256")
        files.append(_verify_hash(folder, str(engine.relative_to(folder)), stated, progress))
    changed = [file.file for file in files if file.status == "changed"]
    recorded: tuple[str, ...] = ()
    if record and changed:
        log(f"verify: nothing recorded: {', '.join(changed)} changed")
    elif record:
        recorded = _record(bundle, weights, variants)
    unknown = [file.file for file in files if file.status == "unknown" and file.file not in recorded]
    status = "changed" if changed else "unknown" if unknown else "same"
    return VerifyResult(bundle=str(folder), status=status, recorded=recorded, files=tuple(files))


def _verify_config(bundle: Bundle) -> VerifiedFile:
    """The fields that were exported; the file's bytes are not recorded, since other keys may change."""
    path, problem = bundle.folder / "config.json", None
    try:
        check_config(bundle.folder, bundle.config)
    except LlamaExportError as err:
        problem = "; ".join([err.message, *(f"{key} {value}" for key, value in err.details.items() if key != "bundle")])
    size = path.stat().st_size if path.is_file() else 0
    return VerifiedFile(
        file=path.name, bytes=size, status="changed" if problem else "same", checked=("fields",), sha256=None,
        problem=problem,
    )  # fmt: skip


def _verify_hash(folder: Path, name: str, expected: object, progress: Progress) -> VerifiedFile:
    got = _hash(folder, name, progress)
    problem = None if got == expected else f"sha256 {got}, expected {expected}"
    return VerifiedFile(
        file=name, bytes=(folder / name).stat().st_size, status="changed" if problem else "same", checked=("sha256",),
        sha256=got, problem=problem,
    )  # fmt: skip


def _hash(folder: Path, name: str, progress: Progress) -> str:
    try:
        return sha256_of_file(folder / name, progress)
    except OSError as err:
        raise unreadable(folder, name, err) from err


def _verify_weights(folder: Path, entry: WeightRecord, progress: Progress) -> tuple[VerifiedFile, WeightRecord]:
    """The file, and its record with the hashes that it has now."""
    path = folder / entry.file
    try:
        file, tensors = read_safetensors_header(path)
        sample = sample_sha256(path, tensor_regions(tensors))
    except OSError as err:
        raise unreadable(folder, entry.file, err) from err
    except LlamaExportError as err:
        details = "; ".join(f"{key} {value}" for key, value in err.details.items() if key != "file")
        return VerifiedFile(
            file=entry.file, bytes=path.stat().st_size, status="changed", checked=("header",), sha256=None,
            problem=f"{err.message}; {details}",
        ), entry  # fmt: skip
    sha256 = _hash(folder, entry.file, progress)
    pairs: dict[str, tuple[object, object]] = {
        "size": (file.size, entry.size),
        "header": (file.header_sha256, entry.header_sha256),
        "sample": (sample, entry.sample_sha256),
        "sha256": (sha256, entry.sha256),
    }
    made = replace(entry, mtime_ns=file.mtime_ns, sha256=sha256, sample_sha256=sample)
    return _judged(entry.file, file.size, sha256, pairs), made


def _verify_data(
    folder: Path, made: QuantizedRecord, manifest: Manifest, progress: Progress
) -> tuple[VerifiedFile, QuantizedRecord]:
    """The weights of a variant, and its record with the hashes that they have now."""
    found = (folder / made.data).stat()
    sample = sample_sha256(folder / made.data, [(0, found.st_size)])
    sha256 = _hash(folder, made.data, progress)
    pairs: dict[str, tuple[object, object]] = {
        "size": (found.st_size, made.data_size),
        "source": (manifest.functions["onnxruntime"].sha256, made.source_sha256),
        "sample": (sample, made.data_sample_sha256),
        "sha256": (sha256, made.data_sha256),
    }
    return _judged(made.data, found.st_size, sha256, pairs), replace(made, data_sample_sha256=sample)


def _judged(name: str, size: int, sha256: str, pairs: dict[str, tuple[object, object]]) -> VerifiedFile:
    known = {key: pair for key, pair in pairs.items() if pair[1] is not None}
    wrong = [f"{key} {got}, expected {expected}" for key, (got, expected) in known.items() if got != expected]
    status = "changed" if wrong else "same" if "sha256" in known else "unknown"
    return VerifiedFile(
        file=name, bytes=size, status=status, checked=tuple(known), sha256=sha256, problem="; ".join(wrong) or None
    )


def _record(bundle: Bundle, weights: dict[str, WeightRecord], variants: dict[str, QuantizedRecord]) -> tuple[str, ...]:
    """Writes the records into the manifest as it is now; returns the files whose records changed.

    Raises:
        ArtifactMismatchError: the bundle was exported or quantised again meanwhile. ExportError: the manifest cannot be
            written.
    """
    try:
        with staging_folder(bundle.folder) as staging, unchanged(bundle, staging) as current:
            for kind, made in bundle.manifest.quantized.items():
                if current.quantized.get(kind) not in (made, variants[kind]):
                    raise ArtifactMismatchError(
                        f"the {kind} weights were made again while they were verified",
                        details={"bundle": bundle.folder},
                        hint="run the command again; nothing was written",
                    )
            updated = replace(
                current,
                weights=tuple(weights[entry.file] for entry in current.weights),
                quantized={**current.quantized, **variants},
            )
            changed = [new.file for old, new in zip(current.weights, updated.weights, strict=True) if old != new] + [
                made.data for kind, made in updated.quantized.items() if made != current.quantized[kind]
            ]
            if changed:
                (staging / MANIFEST_NAME).write_bytes(json_bytes(updated.to_json()))
                commit(staging, bundle.folder)
            return tuple(changed)
    except OSError as err:
        raise write_error(err, bundle.folder) from err
