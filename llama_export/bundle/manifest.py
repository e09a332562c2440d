"""``manifest.json`` as types: the only place that reads it and the only place that writes it.

Role: :mod:`llama_export.bundle.bundle` checks the files of a bundle against a :class:`Manifest`. This module checks that the
manifest agrees with itself: types, limits, and the model's sizes against the graph's inputs and outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from llama_export import __version__
from llama_export._system.files import is_plain_name
from llama_export._system.typed import Count, Sha256, typed
from llama_export.config.huggingface import load_json_object
from llama_export.config.llama import DTYPES, TASKS, LlamaConfig, RopeConfig
from llama_export.config.settings import VARIANTS
from llama_export.errors import ArtifactMismatchError, ConfigError
from llama_export.graph.io import INTERFACES

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
ONNXRUNTIME_NAME = "model.onnxruntime.onnx"
GRAPHS = {"standard": MODEL_NAME, "onnxruntime": ONNXRUNTIME_NAME}
"""Kind of function bodies -> graph file."""
MAX_LAYERS = 10_000
"""Decoder layers of a bundle whose inputs and outputs do not depend on their number."""
Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]+$", max_length=200)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRecord:
    """A safetensors file of the bundle."""

    file: str
    size: Count
    """Bytes."""
    mtime_ns: Int64
    """Modification time at the export. Compared only where there is no ``sample_sha256``."""
    header_sha256: Sha256
    """Of the safetensors header and its length field."""
    sha256: Sha256 | None = None
    """Of every byte: ``export --hash-weights`` or ``verify --record``."""
    sample_sha256: Sha256 | None = None
    """Of the blocks of :mod:`llama_export._system.content`. Bundles of version 0.1 and before may lack it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord:
    """An ONNX file of the bundle."""

    file: str
    sha256: Sha256
    dtype: str
    """Compute dtype."""
    readers: str | None = None
    """Which programs the file is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IoRecord:
    """An input or output of the graph."""

    name: str
    kind: Literal["input", "output"]
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[Count | str, ...]
    """Sizes, and symbols of dimensions that a session chooses."""
    alias_of: str | None
    """The input whose memory an output may share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRecord:
    """The KV cache of a causal LM."""

    layout: str
    dtype: str
    granularity: str
    """What a session allocates it for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRecord:
    """A quantised variant: its graph and its weights."""

    type: str
    bits: Count
    block_size: Count
    accuracy_level: Count
    symmetric: bool
    file: str
    size: Count
    """Bytes of the graph."""
    sha256: Sha256
    data: str
    data_size: Count
    """Bytes of the weight file."""
    data_mtime_ns: Int64
    """Compared only where there is no ``data_sample_sha256``."""
    data_sha256: Sha256
    source_sha256: Sha256
    """Of the graph it was made from."""
    data_sample_sha256: Sha256 | None = None
    """Of the blocks of :mod:`llama_export._system.content`, the file taken as one tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was exported, and from which files. Fields stand in the order of the file."""

    schema_version: int
    generator: Mapping[Name, str]
    """Package -> version."""
    task: str
    model: LlamaConfig
    dtype: str
    """Compute dtype of the graph."""
    io: tuple[IoRecord, ...]
    kv_cache: CacheRecord | None
    rope: RopeConfig
    """That of the model."""
    eos_token_ids: tuple[Int64, ...]
    """Tokens that end a generation."""
    weights: tuple[WeightRecord, ...]
    """Empty if the ONNX files hold the weights."""
    graph_sha256: Sha256
    """That of the standard graph."""
    functions: Mapping[str, GraphRecord]
    """Kind of function bodies -> graph."""
    ops: Mapping[Name, Count]
    """Custom op -> version."""
    quantized: Mapping[str, QuantizedRecord] = field(default_factory=dict)
    """Variant -> its files."""

    def __post_init__(self) -> None:
        _check(self.task in TASKS, f"task {self.task!r}")
        _check(self.dtype in DTYPES, f"dtype {self.dtype!r}")
        _check({kind: graph.file for kind, graph in self.functions.items()} == GRAPHS, "functions")
        _check(self.graph_sha256 == self.functions["standard"].sha256, "graph_sha256")
        _check(len({entry.file for entry in self.weights}) == len(self.weights), "weights")
        _check(self.rope == self.model.rope, "rope")
        for variant, made in self.quantized.items():
            _check(variant in VARIANTS and made.type == variant, "quantized")
            _check((made.file, made.data) == variant_names(variant), f"quantized.{variant}")
        self._check_io()

    def _check_io(self) -> None:
        """Inputs and outputs are those of the task, with the model's sizes."""
        interface, layers = INTERFACES[self.task], self.model.num_hidden_layers
        # Before a billion names are made.
        _check(layers <= (len(self.io) if interface.has_cache else MAX_LAYERS), f"num_hidden_layers {layers}")
        _check((self.kv_cache is not None) == interface.has_cache, "kv_cache")
        expected = [("input", name) for name in interface.input_names(self.model)]
        expected += [("output", name) for name in interface.output_names(self.model)]
        _check([(entry.kind, entry.name) for entry in self.io] == expected, "io is not what task and model imply")
        for entry in self.io:
            if entry.name.endswith((".key", ".value")):
                sizes = (self.model.num_key_value_heads, self.model.head_dim)
                _check(len(entry.shape) == 4 and (entry.shape[1], entry.shape[3]) == sizes, f"io {entry.name}")
            elif self.task == "causal-lm" and entry.name == "logits":
                _check(entry.shape[-1:] == (self.model.vocab_size,), "io logits")

    def is_same_export(self, other: Manifest) -> bool:
        """Whether graphs and weights are the same. Quantised variants and hashes added later may differ."""
        if {kind: graph.sha256 for kind, graph in self.functions.items()} != {
            kind: graph.sha256 for kind, graph in other.functions.items()
        } or len(self.weights) != len(other.weights):
            return False
        for mine, theirs in zip(self.weights, other.weights, strict=True):
            if (mine.file, mine.size, mine.header_sha256) != (theirs.file, theirs.size, theirs.header_sha256):
                return False
            samples = (mine.sample_sha256, theirs.sample_sha256)
            if samples[0] != samples[1] if None not in samples else mine.mtime_ns != theirs.mtime_ns:
                return False
        return True

    def to_json(self) -> dict[str, Any]:
        """The content of ``manifest.json``. Fields of later versions that hold nothing are left out."""
        data: dict[str, Any] = json.loads(json.dumps(msgspec.to_builtins(self)))  # tuples become lists
        for entry in (*data["weights"], *data["functions"].values(), *data["quantized"].values()):
            for key in ("sha256", "sample_sha256", "readers", "data_sample_sha256"):
                if key in entry and entry[key] is None:
                    del entry[key]
        if not data["quantized"]:
            del data["quantized"]
        return data

    def with_variant(self, record: QuantizedRecord) -> Manifest:
        """With a quantised variant added or replaced."""
        made = {**self.quantized, record.type: record}
        return replace(self, quantized={name: made[name] for name in VARIANTS if name in made})


def variant_names(variant: str) -> tuple[str, str]:
    """File names of a quantised variant: its graph, its weights."""
    stem = ONNXRUNTIME_NAME.removesuffix(".onnx")
    return f"{stem}.{variant}.onnx", f"{stem}.{variant}.data"


def read_manifest(folder: Path, *, replacing: str | None = None) -> Manifest:
    """Reads ``manifest.json``.

    Args:
        folder: of a bundle.
        replacing: a quantised variant whose entry is skipped, whatever it holds.

    Raises:
        ConfigError: it is missing, not JSON, of another schema version, or a field is missing, wrong or contradicts
            another one.
        ArtifactMismatchError: it names a file outside the folder.
    """
    path = folder / MANIFEST_NAME
    data = load_json_object(path)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            "this manifest has another schema version",
            details={"file": path, "got": data.get("schema_version"), "expected": SCHEMA_VERSION},
            hint=f"export again with this version ({__version__})",
        )
    try:
        if replacing is not None and isinstance(data.get("quantized"), dict):
            data["quantized"] = {key: value for key, value in data["quantized"].items() if key != replacing}
        for entry in (*data["weights"], *dict(data["functions"]).values()):
            check_plain_name(entry["file"], path)
        found = typed(data, Manifest)
        # msgspec makes floats of integers in float fields; what is written again must be what was read.
        model = _config(data["model"])
        found = replace(found, model=model, rope=model.rope)
        text = json.dumps(found.to_json(), ensure_ascii=False)
        _check(text.isprintable(), "text that cannot be printed")  # lone surrogates, terminal control characters
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as err:
        raise ConfigError(
            f"`{MANIFEST_NAME}` lacks a field or holds a wrong one: {err}",
            details={"file": path},
            hint="export again",
        ) from err
    except ConfigError as err:  # a model that no checkpoint may have
        raise ConfigError(
            f"`{MANIFEST_NAME}` lacks a field or holds a wrong one: {err.message}",
            details={**err.details, "file": path},
            hint="export again",
        ) from err
    return found


def _config(data: Mapping[str, Any]) -> LlamaConfig:
    facts = _tuples(data)
    return LlamaConfig(**{**facts, "rope": RopeConfig(**_tuples(facts["rope"]))})


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where the configs have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


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
