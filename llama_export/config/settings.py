"""The settings of an export and of an engine, and the choices that the command line offers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from llama_export.config.checks import check_fields, check_value
from llama_export.config.llama import TASKS
from llama_export.errors import ConfigError
from llama_export.ops.table import OP_SPECS

Backend = Literal["tensorrt-rtx", "tensorrt"]
BACKENDS: tuple[str, ...] = get_args(Backend)
RuntimeBackend = Literal["auto", "onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
RUNTIME_BACKENDS: tuple[str, ...] = get_args(RuntimeBackend)
EngineWeights = Literal["constant", "input", "stripped"]
ENGINE_WEIGHTS: tuple[str, ...] = get_args(EngineWeights)
WeightsMode = Literal["auto", "link", "copy", "embed"]
WEIGHTS_MODES: tuple[str, ...] = get_args(WeightsMode)
VARIANTS = ("int4", "int8")
"""Types of quantised weights: see :mod:`llama_export.export.quantize`."""
CUSTOM_OPS = tuple(OP_SPECS)
"""The graphs' ops that an engine computes by a plugin or by TensorRT's own layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Settings of one export."""

    task: str = "auto"
    """What to export; ``auto`` goes by the config's ``architectures``."""
    dtype: str = "auto"
    """Compute dtype of the graph; ``auto`` is the dtype the checkpoint states, else the one it is stored in."""
    weights: WeightsMode = "auto"
    """How the weights reach the bundle: ``auto`` reflinks the files where the file system can and copies them otherwise;
    ``embed`` writes them into the ONNX files, each of which must stay below 2 GiB. In place only ``embed`` means anything."""
    convert_weights: bool = False
    """Write the weight files of another folder in the compute dtype; then ``model.onnx`` needs no casts."""
    force: bool = False
    """Replace an existing bundle."""
    hash_weights: bool = False
    """Record a SHA-256 of every weight file (reads every byte)."""
    allow_config_keys: tuple[str, ...] = ()
    """Unknown ``config.json`` keys the user vouches for."""
    ignore_estimate: bool = False
    """Go on although the disk is too small by the estimate."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_value(self.weights in WEIGHTS_MODES, "weights", self.weights, " | ".join(WEIGHTS_MODES))
        check_value(self.task in ("auto", *TASKS), "task", self.task, " | ".join(("auto", *TASKS)))
        if self.convert_weights and self.weights in ("link", "embed"):
            raise ConfigError(
                "converted weights are new files: they are neither linked nor embedded",
                details={"got": f"convert_weights with weights {self.weights}", "expected": "weights auto or copy"},
                hint="leave --weights out; to embed converted weights, export the converted bundle once more: "
                "llama-export export BUNDLE -o ONE_FILE --weights embed"
                if self.weights == "embed"
                else "leave --weights out",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine build."""

    backend: Backend = "tensorrt-rtx"
    """Which TensorRT builds and later runs the engine."""
    ops: str = "plugin"
    """``plugin``: our plugin layers. ``native``: TensorRT's own layers from the ONNX function bodies.
    ``OP=native,...``: these ops native, the others by plugins. Kept in one spelling, sorted."""
    max_seq_len: int | None = None
    """KV-cache capacity in tokens, fixed at build; None: min(max_position_embeddings, 4096)."""
    max_batch: int = 4
    """Largest batch of the prefill and decode profiles, rows."""
    tf32: bool = False
    """Let float32 matrix products round their inputs to TF32 (10 bits). Off: float32 means float32."""
    weights: EngineWeights = "constant"
    """``constant``: inside the engine. ``input``: bound at load from the bundle's safetensors files, so that the engine
    holds none and serves every fine-tune of the model. ``stripped``: left out, put back at load (needs a GPU to build)."""
    profiles: int = 2
    """Optimization profiles of a causal LM. 2: one for prefill, one for decode. 1: the first serves both, in half the
    build time and half the engine, by kernels chosen for the shapes of a prefill."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to compile for, e.g. ``8.9``; empty: what the backend does by itself, for TensorRT-RTX one engine for all."""
    force: bool = False
    """Replace an engine of the same name."""
    ignore_estimate: bool = False
    """Go on although the disk is too small by the estimate."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_value(self.backend in BACKENDS, "backend", self.backend, " | ".join(BACKENDS))
        check_value(
            self.max_seq_len is None or self.max_seq_len >= 2, "max_seq_len", self.max_seq_len, "at least 2 tokens"
        )
        check_value(1 <= self.max_batch < 2**31, "max_batch", self.max_batch, "at least 1 row, fewer than 2^31")
        check_value(self.weights in ENGINE_WEIGHTS, "weights", self.weights, " | ".join(ENGINE_WEIGHTS))
        check_value(self.profiles in (1, 2), "profiles", self.profiles, "1 | 2")
        for capability in self.compute_capabilities:
            well_formed = re.fullmatch(r"[1-9]\d?\.\d", capability) is not None
            check_value(well_formed, "compute_capability", capability, "major.minor, for example 8.9")
        native = _native_ops(self.ops)
        spelling = "native" if len(native) == len(CUSTOM_OPS) else ",".join(f"{op}=native" for op in sorted(native))
        object.__setattr__(self, "ops", spelling or "plugin")

    @property
    def plugin_ops(self) -> frozenset[str]:
        """The ops that become plugin layers."""
        return frozenset(CUSTOM_OPS) - _native_ops(self.ops)


def _native_ops(ops: str) -> frozenset[str]:
    """The ops that ``--ops`` leaves to TensorRT's own layers."""
    if ops in ("plugin", "native"):
        return frozenset(CUSTOM_OPS) if ops == "native" else frozenset()
    parts = [part.partition("=") for part in ops.split(",")] if isinstance(ops, str) else []
    if not parts or any(op not in CUSTOM_OPS or how != "native" for op, _, how in parts):
        raise ConfigError(
            f"unknown value for ops: {ops}",
            details={"got": ops, "expected": "plugin | native | OP=native,..."},
            hint="the ops are " + ", ".join(CUSTOM_OPS) + ", for example --ops LlamaRMSNorm=native",
        )
    return frozenset(op for op, _, _ in parts)
