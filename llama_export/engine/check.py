"""An engine file against its sidecar, the sidecar against the bundle, and the plan against both; on any machine.

Role: before an engine is loaded, listed as sound by ``validate``, or given to another bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from llama_export._system.commit import finish_commit
from llama_export._system.files import open_regular
from llama_export.bundle.bundle import Bundle
from llama_export.config.settings import EngineConfig
from llama_export.engine import plugins
from llama_export.engine.plan import is_readable, read_plan
from llama_export.engine.sidecar import REBUILD, EngineSidecar, EngineWeightTensors, read_sidecar
from llama_export.engine.spec import (
    ATTENTION,
    MASKED_ATTENTION,
    PREFILL,
    engine_io,
    engine_profiles,
    engine_settings,
    expected_layers,
    expected_plugin_layers,
    max_batch,
    plugin_attributes,
    rebuild_command,
    resolve_capacity,
)
from llama_export.engine.weights import bundle_tensors
from llama_export.errors import ArtifactMismatchError, ConfigError, ShapeError, ToolchainError, numbered
from llama_export.graph.io import INTERFACES


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What :func:`check_engine` found."""

    sidecar: EngineSidecar
    """All of it is true of the engine file, but for what ``not_checked`` names."""
    not_checked: tuple[str, ...]
    """What could not be looked at, and why; empty when everything was."""

    @property
    def metrics(self) -> dict[str, float | int | str]:
        """Flat numbers for a report."""
        sidecar = self.sidecar
        cached, masked = (sidecar.plugin_layers.get(op, 0) for op in (ATTENTION, MASKED_ATTENTION))
        return {
            "bytes": sidecar.bytes,
            "max_seq_len": sidecar.max_seq_len,
            "max_batch": sidecar.max_batch,
            "in_place_cache_updates": sidecar.layers.get("KV_CACHE_UPDATE", 0) + 2 * cached,
            "attention_layers": sidecar.layers.get("ATTENTION_INPUT", 0) + cached + masked,
            "plugin_layers": ", ".join(f"{count} {op}" for op, count in sidecar.plugin_layers.items()) or "none",
            "compute_capabilities": " ".join(sidecar.compute_capabilities)
            + (" and later ones it supports" if sidecar.forward_compatible else ""),
            "weights": sidecar.weights.mode,
            "not_checked": "; ".join(self.not_checked),
        }


def inspect_engine(path: Path) -> EngineSidecar:
    """The sidecar of an engine file, after the file was found to be the one it describes.

    Raises:
        ArtifactMismatchError: no sidecar, a broken one, or another file. ConfigError: a sidecar that is not JSON.
    """
    with contextlib.suppress(OSError):  # a folder that cannot be written to: what is there is checked as it is
        finish_commit(path.parent)
    if not os.path.lexists(path):
        raise ArtifactMismatchError(f"`{path.name}` is missing", details={"folder": path.parent}, hint=REBUILD)
    sidecar = read_sidecar(path)
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            # A file of another size is another file: a terabyte of holes is not read to find that out.
            got = hashlib.file_digest(stream, "sha256").hexdigest() if size == sidecar.bytes else f"of {size} bytes"
    except OSError as err:
        raise ArtifactMismatchError(
            f"`{path.name}` cannot be read",
            details={"folder": path.parent, "reason": err.strerror or err},
            hint=REBUILD,
        ) from err
    if got != sidecar.engine_sha256:
        raise ArtifactMismatchError(
            f"`{path.name}` is not the file its sidecar describes",
            details={
                "got": f"sha256 {got}" if size == sidecar.bytes else f"{size} bytes",
                "expected": f"sha256 {sidecar.engine_sha256}" if size == sidecar.bytes else f"{sidecar.bytes} bytes",
            },
            hint=REBUILD,
        )
    return sidecar


def check_engine(bundle: Bundle, engine_path: Path) -> EngineFacts:
    """An engine file against its sidecar, the sidecar against the bundle, and the plan against both.

    Raises:
        ArtifactMismatchError: all differences. ConfigError: a sidecar that is not JSON.
    """
    sidecar = inspect_engine(engine_path)
    try:
        problems, not_checked = _sidecar_problems(sidecar, bundle), list[str]()
    except (ConfigError, ShapeError) as err:
        raise ArtifactMismatchError(
            f"the sidecar of `{engine_path.name}` holds a setting that no engine has: {err.message}",
            details={"file": engine_path.with_suffix(".json"), **err.details},
            hint=REBUILD,
        ) from err
    if not problems and sidecar.plugin_library is not None:
        try:
            problems = library_problems(sidecar, plugins.find_library())
        except ToolchainError as err:
            not_checked.append(f"the plugin library: {err.message}")
    if not problems and is_readable(sidecar):
        with engine_path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            plan_facts, problems = read_plan(plan, sidecar, plugin_attributes(bundle.config, bundle.task))
        problems += [
            f"{key}: got {_shown(getattr(sidecar, key))}, the plan says {_shown(value)}"
            for key, value in plan_facts.items()
            if getattr(sidecar, key) != value
        ]
    elif not problems:
        not_checked.append(
            f"the plan's content: its layout is not known for {sidecar.backend} {sidecar.backend_version}"
        )
    if problems:
        raise ArtifactMismatchError(
            f"`{engine_path.name}` is not an engine of this bundle",
            details=numbered("difference", problems),
            hint=f"build again: {rebuild_command(sidecar, bundle.folder)}",
        )
    return EngineFacts(sidecar=sidecar, not_checked=tuple(not_checked))


def _shown(value: object) -> object:
    """As the file has it: a list in place of a tuple."""
    return list(value) if isinstance(value, tuple) else value


def _sidecar_problems(sidecar: EngineSidecar, bundle: Bundle) -> list[str]:
    """What the sidecar says against what the bundle and the sidecar's own settings imply."""
    settings = EngineConfig(
        backend=sidecar.backend,
        ops=sidecar.ops,
        max_seq_len=sidecar.max_seq_len,
        max_batch=sidecar.max_batch,
        tf32=sidecar.settings.tf32,
        weights=sidecar.weights.mode,
        profiles=1 if set(sidecar.profiles) == {PREFILL} else 2,
    )
    plugin_ops, capacity = settings.plugin_ops & bundle.ops, resolve_capacity(bundle.config, sidecar.max_seq_len)
    expected: dict[str, object] = {
        "onnx_sha256": bundle.manifest.graph_sha256,
        "task": bundle.task,
        "dtype": bundle.dtype,
        "kv_cache_capacity": capacity if INTERFACES[bundle.task].has_cache else None,
        "max_batch": max_batch(bundle, settings),
        "io": engine_io(bundle, capacity),
        "profiles": engine_profiles(bundle, capacity, settings.max_batch, settings.profiles),
        "plugin_layers": expected_plugin_layers(bundle, plugin_ops),
        "settings": engine_settings(bundle, settings),
    }
    problems = _weights_problems(sidecar.weights, bundle)
    problems += [
        f"{key}: got {getattr(sidecar, key)}, expected {value}"
        for key, value in expected.items()
        if getattr(sidecar, key) != value
    ]
    if bool(plugin_ops) != (sidecar.plugin_library is not None):
        problems.append(f"plugin_library: got {sidecar.plugin_library}, expected {'one' if plugin_ops else 'none'}")
    problems += [
        f"{sidecar.layers.get(name, 0)} layers {name}, expected {count}"
        for name, count in expected_layers(bundle, plugin_ops).items()
        if sidecar.layers.get(name, 0) != count
    ]
    return problems


def _weights_problems(recorded: EngineWeightTensors, bundle: Bundle) -> list[str]:
    """Whether the weights that an engine takes as inputs lie where its sidecar says."""
    if recorded.mode != "input":
        return []
    expected = {entry.name: entry for entry in bundle_tensors(bundle)}
    got = {entry.name: entry for entry in recorded.tensors}
    wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    return (
        [f"weight {wrong[0]}: got {got.get(wrong[0])}, the bundle has {expected.get(wrong[0])}; {len(wrong)} differ"]
        if wrong
        else []
    )


def library_problems(sidecar: EngineSidecar, library: plugins.PluginLibrary) -> list[str]:
    """How the plugin library differs from the one the engine was built with; none for an engine without plugin layers."""
    built_with = sidecar.plugin_library
    return [
        f"plugin library {key}: got {library.identity[key]}, the engine was built with {value}"
        for key, value in ({} if built_with is None else dataclasses.asdict(built_with)).items()
        if library.identity.get(key) != value
    ]
