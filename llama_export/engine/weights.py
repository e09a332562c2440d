"""Weights that lie outside an engine: which tensors they are, and the engine that takes them as inputs.

Role: between :mod:`llama_export.engine.build`, which builds, and :mod:`llama_export.runtime.engine_session`, which binds. An engine
built with ``weights = input`` holds no weight: every one is a network input, read by TensorRT's kernels where and as it
is stored ([out, in]; the product reads it transposed, without a copy, which :mod:`llama_export.engine.plan` checks). So it is
as large as its kernels, builds without a weight in memory, and serves every checkpoint of the same graph:
:func:`refit_engine` gives it to another bundle by writing a new sidecar.

Norms' and biases' vectors and the embedding are inputs as well. What follows from the config (RoPE's frequencies) is
constant, and so part of what two checkpoints must have in common.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from llama_export.bundle.bundle import Bundle
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.config.settings import EngineWeights
from llama_export.engine.sidecar import EngineWeightTensors
from llama_export.errors import ArtifactMismatchError, ConfigError

STORED_NAMES = {"float32": 1, "float16": 10, "bfloat16": 16}
"""dtype -> ``onnx.TensorProto.DataType``."""
_EXTERNAL = 1
"""``onnx.TensorProto.DataLocation.EXTERNAL``"""


def bundle_tensors(bundle: Bundle) -> list[TensorEntry]:
    """Where the weights of a bundle's graph lie, in the order of their names.

    Raises:
        ConfigError: the bundle holds no safetensors files (``--weights embed``).
        CheckpointError: they are not what the config implies.
    """
    if bundle.is_embedded:
        raise ConfigError(
            "this bundle's weights are inside its graph, so no engine can read them from a file",
            details={"bundle": bundle.folder, "expected": "*.safetensors beside the graph"},
            hint="build with --weights constant, or export without --weights embed",
        )
    return sorted(bundle.tensors.values(), key=lambda entry: entry.name)


def require_stored_dtype(bundle: Bundle, entries: Sequence[TensorEntry]) -> None:
    """A weight that is an input is used as it is stored: casting it again in every step would cost more than the step.

    Raises:
        ConfigError: a weight is stored in another dtype than the engine computes in.
    """
    other = [entry for entry in entries if entry.dtype != bundle.dtype]
    if other:
        raise ConfigError(
            f"the checkpoint is stored in {other[0].dtype}, the engine computes in {bundle.dtype}",
            details={
                "tensor": other[0].name,
                "others": len(other) - 1,
                "expected": f"weights stored in {bundle.dtype}",
            },
            hint=f"export with --dtype {other[0].dtype}, or with --convert-weights -o BUNDLE; or build with --weights constant",
        )


def make_weights_inputs(onnx: Any, proto: Any, entries: Sequence[TensorEntry]) -> None:
    """Turns every external initializer of a graph into an input of the same name, dtype and shape, in place.

    Raises:
        ArtifactMismatchError: the graph's initializers are not these tensors.
    """
    external = [item for item in proto.graph.initializer if item.data_location == _EXTERNAL]
    found = {item.name: _place_in_file(item) for item in external}
    expected = {
        entry.name: (STORED_NAMES[entry.dtype], entry.shape, entry.file, entry.offset, entry.nbytes)
        for entry in entries
    }
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ArtifactMismatchError(
            "the graph does not point to the checkpoint's tensors one to one",
            details={
                "got": found.get(wrong[0]),
                "expected": expected.get(wrong[0]),
                "tensor": wrong[0],
                "in all": len(wrong),
            },
            hint="export again",
        )
    kept = [item for item in proto.graph.initializer if item.data_location != _EXTERNAL]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    # By name, so that the network does not depend on the order of a file.
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims))
        for item in sorted(external, key=lambda item: str(item.name))
    )


def _place_in_file(initializer: Any) -> tuple[int, tuple[int, ...], str, int, int]:
    place = {item.key: item.value for item in initializer.external_data}
    return (
        initializer.data_type, tuple(initializer.dims), place["location"], int(place["offset"]), int(place["length"]),
    )  # fmt: skip


def network_sha256(proto: Any) -> str:
    """Digest of all that an engine with weights as inputs is built from: equal for two fine-tunes of one model."""
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def weights_record(mode: EngineWeights, entries: Sequence[TensorEntry]) -> EngineWeightTensors:
    """What the sidecar says of the weights; of ``input`` also where each of them lies."""
    nbytes = sum(entry.nbytes for entry in entries)
    return EngineWeightTensors(mode=mode, bytes=nbytes, tensors=tuple(entries) if mode == "input" else ())


def model_differences(recorded: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """Facts of the config in which a bundle's model differs from the one an engine was built for."""
    got, expected = _flat(bundle.manifest.to_json()["model"]), _flat(recorded)
    return [
        f"{key}: {got.get(key)}, the engine was built for {expected.get(key)}"
        for key in sorted(expected.keys() | got.keys())
        if expected.get(key) != got.get(key)
    ]


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``rope.rope_type`` for what lies in an object of its own."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return found
