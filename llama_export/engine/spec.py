"""What an engine of a bundle must be: its name, profiles, inputs and outputs, layers and plugins; nothing here needs TensorRT.

Role: one place for what :mod:`llama_export.engine.build` builds and :mod:`llama_export.engine.check` expects of a file.

Shapes: B batch, S new tokens, N wanted positions, C kv_cache_capacity, G key/value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

from llama_export.bundle.bundle import Bundle
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.config.decoder import decoder_modules, linear_groups, op_counts
from llama_export.config.llama import DType, LlamaConfig, Task
from llama_export.config.settings import CUSTOM_OPS, EngineConfig
from llama_export.engine.plugins import ABI
from llama_export.engine.sidecar import EngineSettings, EngineSidecar, EngineTensor, Profiles
from llama_export.errors import ShapeError
from llama_export.graph.io import INTERFACES, is_single_text
from llama_export.graph.kv_cache import CAPACITY, cache_names, cache_shape
from llama_export.ops import table

DEFAULT_CAPACITY = 4096
"""Cache capacity in tokens when none is asked for and the model allows more."""


MAX_LOGITS = 256
"""Largest N of the prefill profile. TensorRT reserves [B, N, V] for the largest N, so all of C would cost gigabytes."""


PREFILL, DECODE, TEXTS = "prefill", "decode", "texts"
"""Optimization profiles: the first two of a causal LM, the last of the heads without a cache."""


ATTENTION, MASKED_ATTENTION = table.ATTENTION.op_type, table.MASKED_ATTENTION.op_type


def resolve_capacity(config: LlamaConfig, max_seq_len: int | None) -> int:
    """Longest sequence of an engine: what was asked for, else the model's longest up to :data:`DEFAULT_CAPACITY`.

    Raises:
        ShapeError: more than the model's positions.
    """
    limit = config.max_length
    if max_seq_len is not None and max_seq_len > limit:
        raise ShapeError(
            f"the checkpoint has no positions beyond {limit} tokens",
            details={
                "got": f"max_seq_len = {max_seq_len}",
                "expected": f"at most {limit}, the model's longest sequence",
            },
            hint=f"--max-seq-len {limit}",
        )
    return min(limit, DEFAULT_CAPACITY) if max_seq_len is None else max_seq_len


def max_batch(bundle: Bundle, config: EngineConfig) -> int:
    """Largest batch of an engine: 1 where the graph has a fixed one."""
    return 1 if is_single_text(bundle.config, bundle.task) else config.max_batch


def engine_name(bundle: Bundle, config: EngineConfig, capacity: int) -> str:
    """File name that tells engines of one bundle apart: ``float16-plugin-c4096-b4.tensorrt-rtx.engine``.

    ``c`` is the capacity of a cache, ``s`` the longest text of a head without one.
    """
    longest = f"{'c' if INTERFACES[bundle.task].has_cache else 's'}{capacity}"
    native = sorted(set(CUSTOM_OPS) - config.plugin_ops)
    ops = config.ops if config.ops in ("plugin", "native") else f"plugin-without-{'-'.join(native)}"
    parts = [bundle.dtype, ops, longest, f"b{max_batch(bundle, config)}"]
    parts += ["p1"] if config.profiles == 1 and INTERFACES[bundle.task].has_cache else []
    parts += [f"weights-{config.weights}"] if config.weights != "constant" else []
    parts += [f"cc{capability}" for capability in config.compute_capabilities]
    parts += ["tf32"] if config.tf32 else []
    return f"{'-'.join(parts)}.{config.backend}.engine"


def engine_io(bundle: Bundle, capacity: int) -> tuple[EngineTensor, ...]:
    """The manifest's inputs and outputs with C a number."""
    return tuple(
        EngineTensor(
            name=tensor.name,
            kind=tensor.kind,
            dtype=tensor.dtype,
            shape=tuple(capacity if dim == CAPACITY else dim for dim in tensor.shape),
            alias_of=tensor.alias_of,
        )
        for tensor in bundle.manifest.io
    )


def weight_io(entries: Sequence[TensorEntry]) -> tuple[EngineTensor, ...]:
    """Inputs that are weights, in the words of :func:`engine_io`."""
    return tuple(
        EngineTensor(name=entry.name, kind="input", dtype=cast(DType, entry.dtype), shape=entry.shape, alias_of=None)
        for entry in entries
    )


def engine_settings(bundle: Bundle, config: EngineConfig) -> EngineSettings:
    """How an engine of these settings computes."""
    return EngineSettings(
        tf32=config.tf32,
        strongly_typed=True,
        decomposable_attention=may_decompose(bundle.dtype, config.plugin_ops & bundle.ops),
    )


def engine_profiles(bundle: Bundle, capacity: int, max_batch: int, count: int = 2) -> Profiles:
    """Shapes the engine serves: ``prefill`` any S and N (up to :data:`MAX_LOGITS`), ``decode`` S = N = 1; ``texts`` any S.

    With ``count`` 1 there is no ``decode``: ``prefill`` holds its shapes too.
    """
    config = bundle.config
    if not INTERFACES[bundle.task].has_cache:
        texts = [[1, 1], [1, min(capacity, 128)], [max_batch, capacity]]
        return {TEXTS: {name: texts for name in INTERFACES[bundle.task].inputs}}

    def shapes(tokens: Sequence[int], wanted: Sequence[int]) -> dict[str, list[list[int]]]:
        # One row is the common case; the rest of the range stays open.
        batches = (1, 1, max_batch)
        cache = [list(cache_shape(config, batch, capacity)) for batch in batches]
        return {
            "input_ids": [[batch, count] for batch, count in zip(batches, tokens, strict=True)],
            "past_length": [[batch] for batch in batches],
            "sequence_length": [[batch] for batch in batches],
            "logits_index": [[batch, count] for batch, count in zip(batches, wanted, strict=True)],
            **{past: cache for past, _ in cache_names(config.num_hidden_layers)},
        }

    profiles = {
        PREFILL: shapes((1, min(capacity, 128), capacity), (1, 1, min(capacity, MAX_LOGITS))),
        DECODE: shapes((1, 1, 1), (1, 1, 1)),
    }
    return profiles if count == 2 else {PREFILL: profiles[PREFILL]}


def expected_layers(bundle: Bundle, plugin_ops: Collection[str]) -> dict[str, int]:
    """TensorRT layer type -> count that the network must have. No other count is fixed."""
    counts = op_counts(bundle.config, cast(Task, bundle.task))
    native = {op: counts.get(op, 0) for op in (ATTENTION, MASKED_ATTENTION) if op not in plugin_ops}
    attentions = sum(native.values())
    return {
        "KV_CACHE_UPDATE": 2 * native.get(ATTENTION, 0),
        "ROTARY_EMBEDDING": 2 * attentions,
        "ATTENTION_INPUT": attentions,
        "ATTENTION_OUTPUT": attentions,
        "MATRIX_MULTIPLY": sum(map(len, linear_groups(bundle.config, cast(Task, bundle.task)))),
        "PLUGIN_V3": sum(expected_plugin_layers(bundle, plugin_ops).values()),
    }


def expected_plugin_layers(bundle: Bundle, plugin_ops: Collection[str]) -> dict[str, int]:
    """op -> plugin layers."""
    counts = op_counts(bundle.config, cast(Task, bundle.task))
    return {op: count for op, count in counts.items() if op in plugin_ops}


def plugin_attributes(config: LlamaConfig, task: str) -> dict[str, dict[str, int | float]]:
    """op -> field -> value that every plugin layer of the op must carry: the ABI of its library, its attributes, and what it
    noted at build."""
    found: dict[str, dict[str, int | float]] = {}
    for module in decoder_modules(config, cast(Task, task)):
        if module.op is not None:
            noted = {"hidden_size": module.weights["weight"][0]} if module.weights else {}
            found[module.op] = {"abi": ABI, **module.attributes, **noted}
    return found


def may_decompose(dtype: str, plugin_ops: Collection[str] = ()) -> bool:
    """Whether TensorRT's own attention may become MatMul, Softmax, MatMul where it has no fused kernel.

    float32 has none, so there it must. In 16 bit it has one for every head_dim up to 256 (except for a single head with
    max_batch 1), and that keeps scores in float32, which a decomposition need not: better a build that fails than one
    that loses digits in silence.
    """
    return dtype == "float32" and not {ATTENTION, MASKED_ATTENTION} & set(plugin_ops)


def rebuild_command(sidecar: EngineSidecar, bundle: Path) -> str:
    """The command that builds an engine like this one again, for a bundle and for the machine it is given on."""
    words = ["llama-export", "build", str(bundle), "--backend", sidecar.backend, "--ops", sidecar.ops]
    words += ["--max-seq-len", str(sidecar.max_seq_len), "--max-batch", str(sidecar.max_batch)]
    words += ["--weights", sidecar.weights.mode] if sidecar.weights.mode != "constant" else []
    words += ["--profiles", "1"] if set(sidecar.profiles) == {PREFILL} else []
    words += ["--tf32"] if sidecar.settings.tf32 else []
    return shlex.join([*words, "--force"])
