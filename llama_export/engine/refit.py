"""An engine with weights as inputs -> the same engine for another checkpoint of the same model, without a build.

Role: such an engine (:mod:`llama_export.engine.weights`) is the machine code of one graph. Another fine-tune has the same
graph over other bytes: what was handed to TensorRT is compared by its digest, then the engine is copied into the
other bundle's ``engines`` with a sidecar that says where *its* weights lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama_export.bundle.bundle import ENGINES_NAME, Bundle
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.config.settings import EngineConfig
from llama_export.engine.build import commit_engine, engine_staging, tensorrt_proto, write_sidecar
from llama_export.engine.check import check_engine, inspect_engine
from llama_export.engine.sidecar import EngineSidecar
from llama_export.engine.spec import rebuild_command
from llama_export.engine.tensorrt import load_onnx
from llama_export.engine.weights import (
    bundle_tensors,
    make_weights_inputs,
    model_differences,
    network_sha256,
    require_stored_dtype,
    weights_record,
)
from llama_export.errors import ArtifactMismatchError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitResult:
    """What one refit did; the keys of ``refit --json``."""

    engine: str
    """Path of the engine file in the bundle that it now serves."""
    bundle: str
    weights: int
    """Tensors that the engine takes from this bundle."""
    weight_bytes: int
    """Their size: what a session loads."""
    bytes: int
    """Size of the engine file."""


def refit_engine(
    engine_path: Path, bundle: Bundle, *, force: bool = False, log: Callable[[str], None] = lambda line: None
) -> RefitResult:
    """Gives an engine the weights of another bundle.

    Args:
        engine_path: built with ``weights = input``, from any bundle.
        bundle: of a checkpoint with the same graph: another fine-tune, or the same one exported again.
        force: replace an engine of the same name in ``bundle``.

    Raises:
        ConfigError: the engine holds its weights; another architecture; an engine of this name exists and ``force`` is off.
        ArtifactMismatchError: the engine or its sidecar is damaged, or its plugin library is not the installed one.
    """
    sidecar = inspect_engine(engine_path)
    mode = sidecar.weights.mode
    if mode != "input":
        raise ConfigError(
            f"`{engine_path.name}` does not take its weights as inputs",
            details={"got": f"weights {mode}", "expected": "weights input"},
            hint="build it with --weights input"
            if mode == "constant"
            else "a stripped engine needs no refit by hand: a session puts the weights of its bundle back",
        )
    _check_same_model(sidecar, engine_path, bundle)
    tensors = bundle_tensors(bundle)
    _check_same_network(sidecar, bundle, tensors)
    target = bundle.folder / ENGINES_NAME / engine_path.name
    is_same = target.exists() and target.samefile(engine_path)
    if target.exists() and not (force or is_same):
        raise ConfigError(
            f"engine `{target.name}` exists", details={"folder": target.parent}, hint="pass --force to replace it"
        )
    refitted = replace(
        sidecar,
        onnx_sha256=bundle.manifest.graph_sha256,
        model=bundle.manifest.to_json()["model"],
        weights=weights_record("input", tensors),
    )
    with engine_staging(target) as staged:
        staged.write_bytes(engine_path.read_bytes())
        write_sidecar(staged, refitted)
        check_engine(bundle, staged)  # before the commit: an engine that is there may be a good one
        commit_engine(staged, bundle)
    log(f"refit: {ENGINES_NAME}/{target.name} takes {len(tensors)} weights from {bundle.folder}")
    return RefitResult(
        engine=str(target),
        bundle=str(bundle.folder),
        weights=len(tensors),
        weight_bytes=refitted.weights.bytes,
        bytes=target.stat().st_size,
    )


def _check_same_model(sidecar: EngineSidecar, engine_path: Path, bundle: Bundle) -> None:
    """Refuses a bundle of another architecture, field by field."""
    differences = [
        line for line in model_differences(sidecar.model, bundle) if line.partition(":")[0] not in _NOT_IN_THE_GRAPH
    ]
    for name, recorded, got in (("task", sidecar.task, bundle.task), ("dtype", sidecar.dtype, bundle.dtype)):
        if recorded != got:
            differences.insert(0, f"{name}: {got}, the engine was built for {recorded}")
    if differences:
        raise ConfigError(
            f"`{engine_path.name}` was built for another architecture than this bundle's",
            details={
                "bundle": bundle.folder,
                **{line.partition(":")[0]: line.partition(": ")[2] for line in differences},
            },
            hint=f"build an engine of this bundle: {rebuild_command(sidecar, bundle.folder)}",
        )


def _check_same_network(sidecar: EngineSidecar, bundle: Bundle, tensors: Sequence[TensorEntry]) -> None:
    """Refuses a bundle whose graph is another one than the engine was built from."""
    settings = EngineConfig(backend=sidecar.backend, ops=sidecar.ops)
    onnx = load_onnx(settings.backend)
    proto = tensorrt_proto(onnx, bundle, sidecar.max_seq_len, settings.plugin_ops & bundle.ops)
    require_stored_dtype(bundle, tensors)
    make_weights_inputs(onnx, proto, tensors)
    if (got := network_sha256(proto)) != sidecar.network_sha256:
        raise ArtifactMismatchError(
            "the bundle's graph is not the one the engine was built from, although the models have the same config",
            details={"got": f"network sha256 {got}", "expected": f"network sha256 {sidecar.network_sha256}"},
            hint="export both with one version of llama-export and torch, then build again: "
            + rebuild_command(sidecar, bundle.folder),
        )


_NOT_IN_THE_GRAPH = ("bos_token_id", "eos_token_ids", "pad_token_id", "dtype", "max_position_embeddings")
"""Facts of a config that may differ between fine-tunes; what they do to a graph, its digest shows."""
