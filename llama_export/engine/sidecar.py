"""The sidecar of an engine, ``NAME.json`` beside ``NAME.engine``: what was built, from what, and for which machines.

Role: written by :mod:`llama_export.engine.build` and :mod:`llama_export.engine.refit`, read by everything that looks at an engine. The
dataclasses below are the file's format: their fields are its keys, in this order. A file with a missing key or a value of
another type or outside its limits is refused as a whole. Whether it describes the engine file, and the bundle, is for
:mod:`llama_export.engine.check`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from llama_export._system.typed import Count, Sha256, typed
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.config.huggingface import load_json_object
from llama_export.config.llama import DType, Task
from llama_export.config.settings import Backend, EngineWeights
from llama_export.errors import ArtifactMismatchError

SCHEMA_VERSION: Final = 4
REBUILD = "build again: llama-export build BUNDLE --force"
Positive = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}\.[0-9]{1,6}([.+-][0-9A-Za-z]{1,20}){0,4}$")]
Capability = Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]?\.[0-9]$")]
Profiles = dict[str, dict[str, list[list[int]]]]
"""Profile -> input -> [min, opt, max] shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTensor:
    """An input or output of an engine."""

    name: str
    kind: Literal["input", "output"]
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[Count | str, ...]
    """Sizes; the name of a dimension where it varies."""
    alias_of: str | None
    """Of an output: the input whose memory it updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWeightTensors:
    """Where an engine's weights are."""

    mode: EngineWeights
    bytes: Count
    """Size of those outside the engine."""
    tensors: tuple[TensorEntry, ...]
    """With ``input``, all of them, by name; else none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine computes."""

    tf32: bool
    """Float32 products round their inputs to TF32."""
    strongly_typed: bool
    decomposable_attention: bool
    """TensorRT's own attention may become separate products and a softmax."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginIdentity:
    """The plugin library that an engine was built with."""

    version: str
    abi: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedBy:
    """Versions of the packages that built an engine."""

    llama_export: str
    onnx: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The facts that ``model`` must hold, because they are shown."""

    num_hidden_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    vocab_size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSidecar:
    """All that is recorded of an engine."""

    schema_version: Literal[4] = SCHEMA_VERSION
    created_by: CreatedBy
    backend: Backend
    backend_version: Version
    ops: str
    """As :class:`llama_export.config.settings.EngineConfig` spells it."""
    plugin_layers: dict[str, Count]
    """op -> layers of our plugins; empty for ``native``."""
    plugin_library: PluginIdentity | None
    """None for ``native``."""
    onnx_sha256: Sha256
    engine_sha256: Sha256
    bytes: Positive
    """Size of the engine file."""
    model: dict[str, Any]
    """The config, as the manifest has it."""
    task: Task
    dtype: DType
    weights: EngineWeightTensors
    network_sha256: Sha256 | None
    """With weights as inputs: digest of all that the engine is built from."""
    max_seq_len: Positive
    """Longest sequence in tokens: C of a causal LM's cache, the longest text of the other heads."""
    kv_cache_capacity: Positive | None
    max_batch: Positive
    """Largest B of all profiles."""
    profiles: Annotated[Profiles, msgspec.Meta(min_length=1)]
    io: tuple[EngineTensor, ...]
    layers: dict[str, Count]
    """TensorRT layer type -> count in the network, before fusion."""
    settings: EngineSettings
    cuda_major: Count | None
    """CUDA version that the backend was made for; None if its packages do not say."""
    compute_capabilities: Annotated[tuple[Capability, ...], msgspec.Meta(min_length=1)]
    """GPUs it was compiled for, e.g. ``8.0``."""
    forward_compatible: bool
    """Later GPUs that the backend supports run it too."""
    weights_copied_per_run: tuple[str, ...]
    """Weights as inputs that TensorRT brings into another layout in every run."""
    compiled_graphs_sha256: Sha256 | None
    """Equal for two builds of one network; None where the plan could not be read."""
    build_seconds: float

    def serves(self, compute_capability: str) -> bool:
        """Whether it runs on GPUs of this compute capability, as far as it was compiled for them."""
        later = self.forward_compatible and float(compute_capability) > float(self.compute_capabilities[0])
        return later or compute_capability in self.compute_capabilities

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return dataclasses.asdict(self)


def read_sidecar(engine_path: Path) -> EngineSidecar:
    """The sidecar of an engine file. The engine itself is not opened.

    Raises:
        ArtifactMismatchError: no sidecar, one of another schema version, or one that is not complete and typed.
        ConfigError: the file is not JSON.
    """
    path = engine_path.with_suffix(".json")
    if not path.is_file():
        raise ArtifactMismatchError(f"`{path.name}` is missing", details={"folder": path.parent}, hint=REBUILD)
    data = load_json_object(path)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactMismatchError(
            "this engine's sidecar has another schema version",
            details={"file": path, "got": data.get("schema_version"), "expected": SCHEMA_VERSION},
            hint=REBUILD,
        )
    try:
        _check_texts(data)
        sidecar = typed(data, EngineSidecar)
        typed(sidecar.model, ModelSizes)
    except ValueError as err:
        raise ArtifactMismatchError(
            f"the sidecar of `{engine_path.name}` lacks a field or holds a wrong one: {err}",
            details={"file": path},
            hint=REBUILD,
        ) from err
    return sidecar


def _check_texts(data: object) -> None:
    """All texts of a sidecar are names, which are printable. JSON that is nested deeply was refused before.

    Raises:
        ValueError: one that is not printable.
    """
    if isinstance(data, str) and not data.isprintable():
        raise ValueError(f"the text {data[:100]!r}")
    for item in (*data.keys(), *data.values()) if isinstance(data, dict) else data if isinstance(data, list) else ():
        _check_texts(item)
