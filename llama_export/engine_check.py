"""An engine file against its sidecar, the sidecar against the bundle, and the plan against both; on any machine.

Role: before an engine is loaded, listed as sound by ``validate``, or given to another bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export import plugins
from llama_export._commit import finish_commit
from llama_export._plan import is_readable, read_plan
from llama_export.bundle import Bundle
from llama_export.config import EngineConfig, load_json_object
from llama_export.engine_spec import (
    ATTENTION,
    MASKED_ATTENTION,
    PREFILL,
    REBUILD,
    SCHEMA_VERSION,
    engine_io,
    engine_profiles,
    expected_layers,
    expected_plugin_layers,
    max_batch,
    may_decompose,
    plugin_attributes,
    rebuild_command,
    resolve_capacity,
)
from llama_export.engine_weights import bundle_tensors, weights_record
from llama_export.errors import ArtifactMismatchError, ConfigError, ShapeError, ToolchainError, numbered
from llama_export.graph_io import INTERFACES


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What :func:`check_engine` found to be true of an engine file."""

    backend: str
    backend_version: str
    ops: str
    dtype: str
    bytes: int
    task: str
    max_seq_len: int
    """Longest sequence, tokens: C of a causal LM's cache, the longest text of the other heads."""
    max_batch: int
    """Largest B of all profiles."""
    layers: Mapping[str, int]
    """TensorRT layer type -> count in the network, before fusion."""
    plugin_layers: Mapping[str, int]
    """op -> layers of our plugins; empty for ``native``."""
    plugin_library: Mapping[str, Any] | None
    """``version``, ``abi`` and ``sha256`` of the library it was built with; None for ``native``."""
    compute_capabilities: tuple[str, ...]
    """GPUs it was compiled for, e.g. ``8.0``."""
    forward_compatible: bool
    """Later GPUs that the backend supports run it too."""
    tf32: bool
    """Whether float32 products round their inputs to TF32."""
    weights: str
    """``constant`` | ``input`` | ``stripped``: where the weights are."""
    weight_tensors: tuple[Mapping[str, Any], ...]
    """With ``input``, name, dtype, shape, file, offset and nbytes of each; else empty."""
    profiles: tuple[str, ...]
    """Names of the optimization profiles, in the engine's order."""
    version_compatible: bool
    """Later versions of the backend may load it."""
    cuda_major: int | None
    """CUDA version that the backend was made for; None if its packages do not say."""
    not_checked: tuple[str, ...]
    """What could not be looked at, and why; empty when everything was."""

    @property
    def metrics(self) -> dict[str, float | int | str]:
        """Flat numbers for a report."""
        cached, masked = (self.plugin_layers.get(op, 0) for op in (ATTENTION, MASKED_ATTENTION))
        return {
            "bytes": self.bytes,
            "max_seq_len": self.max_seq_len,
            "max_batch": self.max_batch,
            "in_place_cache_updates": self.layers.get("KV_CACHE_UPDATE", 0) + 2 * cached,
            "attention_layers": self.layers.get("ATTENTION_INPUT", 0) + cached + masked,
            "plugin_layers": ", ".join(f"{count} {op}" for op, count in self.plugin_layers.items()) or "none",
            "compute_capabilities": " ".join(self.compute_capabilities)
            + (" and later ones it supports" if self.forward_compatible else ""),
            "weights": self.weights,
            "not_checked": "; ".join(self.not_checked),
        }


def inspect_engine(path: Path) -> dict[str, Any]:
    """The sidecar of an engine file, after the file was found to be the one it describes.

    Raises:
        ArtifactMismatchError: no sidecar, a broken one, or another file.
    """
    sidecar_path = path.with_suffix(".json")
    with contextlib.suppress(OSError):  # a folder that cannot be written to: what is there is checked as it is
        finish_commit(path.parent)
    for needed in (path, sidecar_path):
        if not needed.is_file():
            raise ArtifactMismatchError(f"`{needed.name}` is missing", details={"folder": path.parent}, hint=REBUILD)
    sidecar = load_json_object(sidecar_path)
    if sidecar.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactMismatchError(
            "this engine's sidecar has another schema version",
            details={"file": sidecar_path, "got": sidecar.get("schema_version"), "expected": SCHEMA_VERSION},
            hint=REBUILD,
        )
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != sidecar.get("engine_sha256"):
        raise ArtifactMismatchError(
            f"`{path.name}` is not the file its sidecar describes",
            details={"got": f"sha256 {got}", "expected": f"sha256 {sidecar.get('engine_sha256')}"},
            hint=REBUILD,
        )
    return sidecar


def check_engine(bundle: Bundle, engine_path: Path) -> EngineFacts:
    """An engine file against its sidecar, the sidecar against the bundle, and the plan against both.

    Raises:
        ArtifactMismatchError: all differences.
    """
    sidecar = inspect_engine(engine_path)
    try:
        problems, not_checked = _sidecar_problems(sidecar, bundle, engine_path), list[str]()
        if not problems and sidecar["plugin_library"] is not None:
            try:
                problems = library_problems(sidecar, plugins.find_library())
            except ToolchainError as err:
                not_checked.append(f"the plugin library: {err.message}")
        if not problems and is_readable(sidecar):
            with engine_path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                plan_facts, problems = read_plan(plan, sidecar, plugin_attributes(bundle.config))
            problems += [
                f"{key}: got {sidecar[key]}, the plan says {value}"
                for key, value in plan_facts.items()
                if sidecar[key] != value
            ]
        elif not problems:
            not_checked.append(
                f"the plan's content: its layout is not known for {sidecar['backend']} {sidecar['backend_version']}"
            )
        if problems:
            raise ArtifactMismatchError(
                f"`{engine_path.name}` is not an engine of this bundle",
                details=numbered("difference", problems),
                hint=f"build again: {rebuild_command(sidecar, bundle.folder)}",
            )
        return EngineFacts(
            backend=sidecar["backend"],
            backend_version=sidecar["backend_version"],
            ops=sidecar["ops"],
            dtype=sidecar["dtype"],
            bytes=sidecar["bytes"],
            task=sidecar["task"],
            max_seq_len=sidecar["max_seq_len"],
            max_batch=sidecar["max_batch"],
            layers=sidecar["layers"],
            plugin_layers=sidecar["plugin_layers"],
            plugin_library=sidecar["plugin_library"],
            compute_capabilities=tuple(sidecar["compute_capabilities"]),
            forward_compatible=sidecar["forward_compatible"],
            tf32=sidecar["settings"]["tf32"],
            weights=sidecar["weights"]["mode"],
            weight_tensors=tuple(sidecar["weights"]["tensors"]),
            profiles=tuple(sidecar["profiles"]),
            version_compatible=sidecar["settings"]["version_compatible"],
            cuda_major=sidecar["cuda_major"],
            not_checked=tuple(not_checked),
        )
    except (ConfigError, ShapeError, KeyError, TypeError, AttributeError, ValueError) as err:
        raise ArtifactMismatchError(
            f"the sidecar of `{engine_path.name}` lacks a field or holds a wrong one: {err}",
            details={"file": engine_path.with_suffix(".json")},
            hint=REBUILD,
        ) from err


def _sidecar_problems(sidecar: Mapping[str, Any], bundle: Bundle, engine_path: Path) -> list[str]:
    """What the sidecar says against what the bundle and the sidecar's own settings imply."""
    capacity = sidecar["max_seq_len"]
    settings = EngineConfig(
        backend=sidecar["backend"],
        ops=sidecar["ops"],
        max_seq_len=capacity,
        max_batch=sidecar["max_batch"],
        tf32=sidecar["settings"]["tf32"],
        weights=sidecar["weights"]["mode"],
        profiles=1 if set(sidecar["profiles"]) == {PREFILL} else 2,
        version_compatible=sidecar["settings"]["version_compatible"],
    )
    plugin_ops = settings.plugin_ops & bundle.ops
    expected: dict[str, object] = {
        "bytes": engine_path.stat().st_size,
        "onnx_sha256": bundle.manifest.graph_sha256,
        "task": bundle.task,
        "dtype": bundle.dtype,
        "max_seq_len": resolve_capacity(bundle.config, capacity),
        "kv_cache_capacity": capacity if INTERFACES[bundle.task].has_cache else None,
        "max_batch": max_batch(bundle, settings),
        "io": engine_io(bundle, capacity),
        "profiles": engine_profiles(bundle, capacity, settings.max_batch, settings.profiles),
        "plugin_layers": expected_plugin_layers(bundle, plugin_ops),
        "settings": {
            "tf32": settings.tf32,
            "strongly_typed": True,
            "decomposable_attention": may_decompose(bundle.dtype, plugin_ops),
            "version_compatible": settings.version_compatible,
        },
    }
    problems = _weights_problems(sidecar["weights"], bundle)
    problems += [
        f"{key}: got {sidecar[key]}, expected {value}" for key, value in expected.items() if sidecar[key] != value
    ]
    library = sidecar["plugin_library"]
    if not plugin_ops and library is not None:
        problems.append(f"plugin_library: got {library}, expected None")
    if plugin_ops and set(library or ()) != {"version", "abi", "sha256"}:
        problems.append(f"plugin_library: got {library}, expected version, abi and sha256")
    counts = expected_layers(bundle, plugin_ops)
    problems += [
        f"{sidecar['layers'].get(name, 0)} layers {name}, expected {count}"
        for name, count in counts.items()
        if sidecar["layers"].get(name, 0) != count
    ]
    return problems


def _weights_problems(recorded: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """Whether the weights that an engine takes as inputs lie where its sidecar says."""
    if recorded["mode"] != "input":
        return []
    expected = {entry["name"]: entry for entry in weights_record(bundle_tensors(bundle))}
    got = {entry["name"]: entry for entry in recorded["tensors"]}
    wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    return (
        [f"weight {wrong[0]}: got {got.get(wrong[0])}, the bundle has {expected.get(wrong[0])}; {len(wrong)} differ"]
        if wrong
        else []
    )


def library_problems(sidecar: Mapping[str, Any], library: plugins.PluginLibrary) -> list[str]:
    """How the plugin library differs from the one the engine was built with."""
    return [
        f"plugin library {key}: got {library.identity[key]}, the engine was built with {value}"
        for key, value in sidecar["plugin_library"].items()
        if library.identity.get(key) != value
    ]
