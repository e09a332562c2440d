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

Role: written once by :mod:`llama_export.export.export`, opened by everything after it. Needs neither torch nor onnx.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from llama_export._system.commit import COMMIT_NAME, finish_commit
from llama_export._system.content import sample_sha256, sha256_of_file
from llama_export._system.files import leads_out
from llama_export.bundle.manifest import (
    MANIFEST_NAME,
    MODEL_NAME,
    ONNXRUNTIME_NAME,
    Manifest,
    QuantizedRecord,
    WeightRecord,
    read_manifest,
    variant_names,
)
from llama_export.checkpoint.checkpoint import (
    INDEX_NAME,
    TOKENIZER_FILES,
    Checkpoint,
    check_files,
    match_tensors,
    read_headers,
)
from llama_export.checkpoint.path_hints import not_a_bundle
from llama_export.checkpoint.safetensors import TensorEntry, WeightFile, read_safetensors_header
from llama_export.config.huggingface import config_from_dict, load_json_object
from llama_export.config.llama import LlamaConfig, Task
from llama_export.config.settings import VARIANTS
from llama_export.errors import ArtifactMismatchError, ConfigError

ENGINES_NAME = "engines"
MARKERS = (MODEL_NAME, ONNXRUNTIME_NAME, MANIFEST_NAME, ENGINES_NAME, COMMIT_NAME)


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened and checked bundle."""

    folder: Path
    manifest: Manifest
    stored: Mapping[str, TensorEntry]
    """Where each tensor of the weight files lies, by its stored name; empty where the graph holds the weights."""

    @property
    def config(self) -> LlamaConfig:
        """The model's sizes and settings."""
        return self.manifest.model

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Where each weight of the graph lies, by its reference name.

        Raises:
            CheckpointError: the weight files do not hold what the config implies.
        """
        return match_tensors(self.folder, self.config, cast(Task, self.task), dict(self.stored))[0]

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
        return tuple(name for name in VARIANTS if name in self.manifest.quantized)

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
        return self.manifest.task

    @property
    def ops(self) -> frozenset[str]:
        """The custom ops of the graph."""
        return frozenset(self.manifest.ops)

    @property
    def dtype(self) -> str:
        """Compute dtype of the graph."""
        return self.manifest.dtype

    @property
    def is_embedded(self) -> bool:
        """The ONNX files hold the weights themselves."""
        return not self.manifest.weights

    @property
    def engines(self) -> list[Path]:
        """Engine files that have a sidecar, sorted by name."""
        return sorted(
            path for path in (self.folder / ENGINES_NAME).glob("*.engine") if path.with_suffix(".json").is_file()
        )


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
    finish_interrupted(folder)
    if not os.path.lexists(folder / MANIFEST_NAME):
        raise not_a_bundle(folder, MANIFEST_NAME)
    manifest = read_manifest(folder, replacing=replacing)
    exported = [entry.file for entry in manifest.weights] + [entry.file for entry in manifest.functions.values()]
    made = {name: variant for variant in manifest.quantized for name in variant_names(variant)}
    _check_places(folder, [*exported, *made])
    for name in (*exported, *made):
        if not os.path.exists(folder / name):
            raise ArtifactMismatchError(
                f"bundle is incomplete: `{name}` is missing",
                details={"bundle": folder},
                hint=_requantize(folder, made[name]) if name in made else "export again",
            )
    check_config(folder, manifest.model, only=_SIZES if ignore_hashes else None)
    files, stored = read_headers(folder, [entry.file for entry in manifest.weights])
    if not ignore_hashes:
        for graph in manifest.functions.values():
            _check_hash(folder, graph.file, graph.sha256)
        tensors: dict[str, list[TensorEntry]] = {file.name: [] for file in files}
        for tensor in stored.values():
            tensors[tensor.file].append(tensor)
        for entry, file in zip(manifest.weights, files, strict=True):
            _check_weight_file(folder, entry, file, tensors[entry.file])
        layers = {int(found[1]) for name in stored if (found := _LAYER.search(name))}
        if manifest.weights and layers != set(range(manifest.model.num_hidden_layers)):
            raise ArtifactMismatchError(
                "the weight files do not hold the layers that the manifest states",
                details={
                    "bundle": folder,
                    "got": f"{len(layers)} layers",
                    "expected": f"{manifest.model.num_hidden_layers} layers",
                },
                hint="export again",
            )
        for variant, record in manifest.quantized.items():
            _check_variant(folder, variant, record, manifest.functions["onnxruntime"].sha256)
    return Bundle(folder, manifest, stored)


def _requantize(folder: Path, variant: str) -> str:
    return f"make it again: llama-export quantize {folder} --type {variant} --force"


def _check_variant(folder: Path, variant: str, entry: QuantizedRecord, source_sha256: str) -> None:
    """The variant belongs to this export. Its graph is compared by content, its weights by size and by sample."""
    hint = _requantize(folder, variant)
    if entry.source_sha256 != source_sha256:
        raise ArtifactMismatchError(
            f"the {variant} weights are of another export",
            details={
                "bundle": folder,
                "got": f"made from {ONNXRUNTIME_NAME} of sha256 {entry.source_sha256}",
                "expected": f"sha256 {source_sha256}",
            },
            hint=hint,
        )
    _check_hash(folder, entry.file, entry.sha256, hint)
    found = os.stat(folder / entry.data)
    if found.st_size != entry.data_size:
        raise ArtifactMismatchError(
            f"`{entry.data}` is not the file the manifest describes",
            details={"bundle": folder, "got": f"{found.st_size} bytes", "expected": f"{entry.data_size} bytes"},
            hint=hint,
        )
    if entry.data_sample_sha256 is not None:
        _check_sample(folder, entry.data, [(0, entry.data_size)], entry.data_sample_sha256, hint)
    elif not _same_time(found.st_mtime_ns, entry.data_mtime_ns):
        _check_hash(folder, entry.data, entry.data_sha256, hint)


def finish_interrupted(folder: Path) -> None:
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


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
"""Fields that decide the shapes of tensors. No flag skips their check: nothing works where they differ."""


def check_config(folder: Path, expected: LlamaConfig, only: Collection[str] | None = None) -> None:
    """``config.json`` still states what was exported. Keys that the export accepted are not questioned again.

    Args:
        folder: of the bundle; a missing ``config.json`` is accepted.
        expected: the manifest's.
        only: fields to compare; None: all.

    Raises:
        ConfigError: it cannot be read. ArtifactMismatchError: a field differs.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    got = config_from_dict(data := load_json_object(path), source=str(path), allow_keys=data.keys())
    changed = [
        field.name
        for field in dataclasses.fields(LlamaConfig)
        if (only is None or field.name in only) and getattr(got, field.name) != getattr(expected, field.name)
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


def _check_hash(
    folder: Path,
    name: str,
    expected: str,
    hint: str = "export again, or pass --ignore-hashes if you changed it on purpose",
) -> None:
    try:
        got = sha256_of_file(folder / name)
    except OSError as err:
        raise unreadable(folder, name, err) from err
    if got != expected:
        raise ArtifactMismatchError(
            f"`{name}` is not the file the manifest describes",
            details={"bundle": folder, "got": f"sha256 {got}", "expected": f"sha256 {expected}"},
            hint=hint,
        )


def _check_weight_file(folder: Path, entry: WeightRecord, file: WeightFile, tensors: Sequence[TensorEntry]) -> None:
    """Size, header and sample. Where no sample is recorded, the modification time decides, and where that differs the
    content hash if there is one."""
    hint = "export again (the graph takes seconds; nothing is copied in place), or pass --ignore-hashes if you know the file is the same"

    def mismatch(got: object, expected: object, hint: str = hint) -> ArtifactMismatchError:
        return ArtifactMismatchError(
            f"`{entry.file}` changed after the export",
            details={"bundle": folder, "got": got, "expected": expected},
            hint=hint,
        )

    if file.size != entry.size:
        raise mismatch(f"{file.size} bytes", f"{entry.size} bytes")
    if file.header_sha256 != entry.header_sha256:
        raise mismatch(f"header sha256 {file.header_sha256}", f"header sha256 {entry.header_sha256}")
    if entry.sample_sha256 is not None:
        _check_sample(folder, entry.file, tensor_regions(tensors), entry.sample_sha256, hint)
    elif not _same_time(file.mtime_ns, entry.mtime_ns):
        if entry.sha256 is None:
            raise mismatch(
                f"modified at {file.mtime_ns} ns",
                f"modified at {entry.mtime_ns} ns",
                f"if the file is the same, a copy for example, record its content: llama-export verify {folder} --record; "
                "else export again, or pass --ignore-hashes",
            )
        _check_hash(folder, entry.file, entry.sha256)


_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")


def tensor_regions(tensors: Sequence[TensorEntry]) -> list[tuple[int, int]]:
    """Offset and size of each tensor, bytes: the regions of a sample."""
    return [(tensor.offset, tensor.nbytes) for tensor in tensors]


def _check_sample(folder: Path, name: str, regions: Sequence[tuple[int, int]], expected: str, hint: str) -> None:
    try:
        got = sample_sha256(folder / name, regions)
    except OSError as err:
        raise unreadable(folder, name, err) from err
    if got != expected:
        raise ArtifactMismatchError(
            f"`{name}` changed after the export",
            details={"bundle": folder, "got": f"sample sha256 {got}", "expected": f"sample sha256 {expected}"},
            hint=hint,
        )


def unreadable(folder: Path, name: str, err: OSError) -> ArtifactMismatchError:
    """The error for a file of a bundle that the system does not let read."""
    return ArtifactMismatchError(
        f"`{name}` cannot be read",
        details={"bundle": folder, "reason": err.strerror or err},
        hint="check its permissions",
    )


def _same_time(got_ns: int, recorded_ns: int) -> bool:
    """Equal, or cut to whole seconds as archives and container layers do."""
    whole_second = 1_000_000_000
    return got_ns == recorded_ns or got_ns == recorded_ns - recorded_ns % whole_second


def weight_record(path: Path, file: WeightFile, *, hashes: bool) -> WeightRecord:
    """What the manifest states about a weight file.

    Args:
        path: where it lies.
        file: what its reader found, with the modification time to record.
        hashes: hash every byte.
    """
    return WeightRecord(
        file=file.name,
        size=file.size,
        mtime_ns=file.mtime_ns,
        header_sha256=file.header_sha256,
        sha256=sha256_of_file(path) if hashes else None,
        sample_sha256=sample_sha256(path, tensor_regions(read_safetensors_header(path)[1])),
    )


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
