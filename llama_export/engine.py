"""Bundle -> TensorRT engine, and everything that can be said about an engine without a GPU.

Role: ``model.onnx`` goes in with a fixed cache capacity, ``engines/NAME.engine`` and its sidecar ``NAME.json`` come
out. The graph's custom ops become our plugin layers (``ops = plugin``), or their function bodies become TensorRT's own
layers (``native``), or some of each. Needs neither torch nor our op table: the ops are in the file. The graph's inputs
and outputs are those of :mod:`llama_export.export`, with C a number.

What is proven here, on any machine:

* the *network* before the build: inputs and outputs, layer counts, that each op's nodes became plugin layers or did not,
  every cache output is the in-place update of its own input at ``past_length``, every attention reads those caches and,
  where it is TensorRT's own, has an explicit mask;
* the *plan* after the build (TensorRT-RTX 1.7, whose serialised graphs are readable text): the names of all inputs and
  outputs in both profiles, shape and dtype of every cache, that it is updated in place, the plugins and their
  attributes, TF32, the GPUs it runs on;
* the *file* later: its hash, the hash of the graph it was built from, its plugin library, and all of the above again.

What is not: the numbers. :mod:`llama_export.engine_session` runs an engine and has itself not been run on a GPU.

Shapes: B batch, S new tokens, N wanted positions, C kv_cache_capacity, G key/value heads, D head_dim, V vocabulary.

Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export import __version__, plugins
from llama_export._commit import commit, finish_commit, staging_folder
from llama_export._plan import is_readable, read_plan
from llama_export._process import peak_rss_bytes
from llama_export._tensorrt import (
    cuda_major,
    ensure_core_library_name,
    execution_blocker,
    gpu_compute_capability,
    load_backend,
    load_onnx,
    message_log,
    progress_monitor,
)
from llama_export.bundle import (
    ENGINES_NAME,
    Bundle,
    Progress,
    json_bytes,
    sha256_of_file,
    write_atomically,
    write_error,
)
from llama_export.checkpoint import TensorEntry
from llama_export.config import CUSTOM_OPS, EngineConfig, LlamaConfig, float32_value, load_json_object
from llama_export.engine_weights import (
    bundle_tensors,
    make_weights_inputs,
    network_sha256,
    require_stored_dtype,
    weights_record,
)
from llama_export.errors import (
    ArtifactMismatchError,
    ConfigError,
    EngineBuildError,
    MissingDependencyError,
    ShapeError,
    ToolchainError,
)
from llama_export.graph_io import INTERFACES, is_single_text
from llama_export.kv_cache import CAPACITY, cache_names, cache_shape, present_name

__all__ = [
    "DECODE",
    "MAX_LOGITS",
    "PREFILL",
    "EngineFacts",
    "EngineResult",
    "build_engine",
    "check_engine",
    "inspect_engine",
    "installed_plugins",
]

SCHEMA_VERSION = 4
"""Of the sidecar."""
DEFAULT_CAPACITY = 4096
"""Cache capacity in tokens when none is asked for and the model allows more."""
MAX_LOGITS = 256
"""Largest N of the prefill profile. TensorRT reserves [B, N, V] for the largest N, so all of C would cost gigabytes."""
PREFILL, DECODE, TEXTS = "prefill", "decode", "texts"
"""Optimization profiles: the first two of a causal LM, the last of the heads without a cache."""
_DOMAIN = "llama_export"
"""Of the graph's custom ops; must equal ``ops.DOMAIN``."""
_ATTENTION, _MASKED_ATTENTION = "LlamaAttention", "LlamaMaskedAttention"
_ATTENTION_MASK = 5
"""Input of ``LlamaMaskedAttention``."""
_PAST_KEY, _PAST_VALUE, _PAST_LENGTH = 5, 6, 7
_PRESENT_KEY, _PRESENT_VALUE = 1, 2
"""Inputs and outputs of ``LlamaAttention``, in the order of ``ops/attention.py``."""

Profiles = dict[str, dict[str, list[list[int]]]]
"""Profile -> input -> [min, opt, max] shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """What one build did; the keys of ``build --json``."""

    engine: str
    """Path of the engine file."""
    backend: str
    ops: str
    plugin_layers: Mapping[str, int]
    """op -> layers of our plugins; empty for ``native``."""
    weights: str
    """``constant`` | ``input`` | ``stripped``"""
    bytes: int
    """Size of the engine file."""
    seconds: float
    """Wall time of the build, imports excluded."""
    peak_rss_bytes: int
    """Peak resident memory of the whole process so far."""


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
        cached, masked = (self.plugin_layers.get(op, 0) for op in (_ATTENTION, _MASKED_ATTENTION))
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


# ---- build ------------------------------------------------------------------------------------------------------


def build_engine(
    bundle: Bundle,
    config: EngineConfig | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda name, done, total: None,
) -> EngineResult:
    """Builds one engine and writes it and its sidecar into the bundle's ``engines`` folder.

    TensorRT-RTX builds ahead of time on any machine. Full TensorRT times its kernels on the GPU it builds for; that
    path is the same code and has not been run.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        config: settings.
        log: receives a line at the start, one per stage, and one at the end.
        progress: receives (phase of the builder, steps done, steps in all). If it raises, the build is cancelled.

    Raises:
        ConfigError: an engine of this name exists and ``config.force`` is off.
        ShapeError: a capacity beyond ``max_position_embeddings``.
        MissingDependencyError: the backend's extra is not installed.
        ToolchainError: the backend is too old, has no GPU to build on, or the disk is full; or the plugin library is not
            installed, is not this package's, or does not serve an op of this model.
        EngineBuildError: the parser or builder refused, or made something else than the config implies. Nothing is left
            behind.
    """
    config = config or EngineConfig()
    capacity = resolve_capacity(bundle.config, config.max_seq_len)
    target = bundle.folder / ENGINES_NAME / engine_name(bundle, config, capacity)
    existing = [path.name for path in (target, target.with_suffix(".json")) if path.exists()]
    if existing and not config.force:
        raise ConfigError(
            f"engine `{target.name}` exists", details={"got": ", ".join(existing)}, hint="pass --force to replace it"
        )
    tensors = bundle_tensors(bundle) if config.weights != "constant" else []
    if config.weights == "input":
        require_stored_dtype(bundle, tensors)
    trt = load_backend(config.backend)
    _check_buildable(config)
    onnx = load_onnx(config.backend)
    plugin_ops = config.plugin_ops & bundle.ops
    library = plugins.find_library() if plugin_ops else None
    if library is not None:
        for compute_capability in config.compute_capabilities:
            plugins.check_chip(library, compute_capability)

    start = time.perf_counter()
    log(
        f"build: {config.backend} {trt.__version__}, {config.ops} ops, {bundle.dtype}, "
        f"{bundle.task}, up to {capacity} tokens, batch 1..{max_batch(bundle, config)}, weights {config.weights}"
    )
    messages = message_log(trt)
    builder = trt.Builder(messages)
    if library is not None:
        _load_plugins(trt, library, bundle, config)
    proto = tensorrt_proto(onnx, bundle, capacity, plugin_ops)
    if config.weights == "input":
        make_weights_inputs(onnx, proto, tensors)
    # The parser keeps weights by reference into memory that it owns, so it must live as long as the network.
    network, parser = _parse(trt, builder, proto, bundle.model_path, messages, library)
    inputs = weight_io(tensors) if config.weights == "input" else []
    layers, plugin_layers = _check_network(trt, network, proto, bundle, capacity, plugin_ops, inputs)
    log(f"build: parsed {network.num_layers} layers in {time.perf_counter() - start:.1f} s, network checked")
    if library is not None:
        counts = ", ".join(f"{count} {op}" for op, count in plugin_layers.items())
        log(f"build: plugin layers: {counts}; library {library.version}")
    profiles = engine_profiles(bundle, capacity, max_batch(bundle, config), config.profiles)
    plan = _serialize(trt, builder, network, config, plugin_ops, profiles, messages, progress)
    del parser
    seconds = time.perf_counter() - start

    sidecar: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created_by": {"llama_export": __version__, "onnx": onnx.__version__},
        "backend": config.backend,
        "backend_version": trt.__version__,
        "ops": config.ops,
        "plugin_layers": plugin_layers,
        "plugin_library": None if library is None else library.identity,
        "onnx_sha256": sha256_of_file(bundle.model_path),
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
        "bytes": plan.nbytes,
        "model": dict(bundle.manifest["model"]),
        "task": bundle.task,
        "dtype": bundle.dtype,
        "weights": {
            "mode": config.weights,
            "bytes": sum(entry.nbytes for entry in tensors),
            "tensors": weights_record(tensors) if config.weights == "input" else [],
        },
        "network_sha256": network_sha256(proto) if config.weights == "input" else None,
        "max_seq_len": capacity,
        "kv_cache_capacity": capacity if INTERFACES[bundle.task].has_cache else None,
        "max_batch": max_batch(bundle, config),
        "profiles": profiles,
        "io": engine_io(bundle, capacity),
        "layers": layers,
        "settings": {
            "tf32": config.tf32,
            "strongly_typed": True,
            "decomposable_attention": may_decompose(bundle.dtype, plugin_ops),
            "version_compatible": config.version_compatible,
        },
        "cuda_major": cuda_major(config.backend),
        "compute_capabilities": [],
        "forward_compatible": False,
        "weights_copied_per_run": [],
        "compiled_graphs_sha256": None,
        "build_seconds": round(seconds, 3),
    }
    if is_readable(sidecar):
        facts, problems = read_plan(plan, sidecar, plugin_attributes(bundle.config))
        if problems:
            raise EngineBuildError(
                "the builder made an engine that is not what the config implies",
                details=numbered("plan", problems),
                hint="this is a bug or an untested TensorRT version: see `llama-export env`",
            )
        sidecar |= facts
    else:
        sidecar["compute_capabilities"] = [gpu_compute_capability()]
    asked = sorted(config.compute_capabilities, key=float)
    if asked and sidecar["compute_capabilities"] != asked:
        raise EngineBuildError(
            "the builder compiled for other GPUs than it was asked for",
            details={"got": ", ".join(sidecar["compute_capabilities"]), "expected": ", ".join(asked)},
            hint="this is a bug or an untested TensorRT version: see `llama-export env`",
        )
    if library is not None:
        for compute_capability in sidecar["compute_capabilities"]:
            plugins.check_chip(library, compute_capability)
    if copied := sidecar["weights_copied_per_run"]:
        log(
            f"build: TensorRT brings {', '.join(copied)} into another layout in every run; --weights constant does it once "
            "(a vocabulary that is a multiple of 8 and plugin ops avoid it)"
        )
    write_engine(target, plan, sidecar)
    log(f"build: done in {seconds:.1f} s, {plan.nbytes:,} bytes, {ENGINES_NAME}/{target.name}")
    return EngineResult(
        engine=str(target),
        backend=config.backend,
        ops=config.ops,
        plugin_layers=plugin_layers,
        weights=config.weights,
        bytes=plan.nbytes,
        seconds=round(seconds, 3),
        peak_rss_bytes=peak_rss_bytes(),
    )


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
    parts += [flag for flag, on in (("vc", config.version_compatible), ("tf32", config.tf32)) if on]
    return f"{'-'.join(parts)}.{config.backend}.engine"


def engine_io(bundle: Bundle, capacity: int) -> list[dict[str, Any]]:
    """The manifest's inputs and outputs with C a number."""
    return [
        {**entry, "shape": [capacity if dim == CAPACITY else dim for dim in entry["shape"]]}
        for entry in bundle.manifest["io"]
    ]


def weight_io(entries: Sequence[TensorEntry]) -> list[dict[str, Any]]:
    """Inputs that are weights, in the words of :func:`engine_io`."""
    return [
        {"name": entry.name, "kind": "input", "dtype": entry.dtype, "shape": list(entry.shape), "alias_of": None}
        for entry in entries
    ]


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
    layers, has_cache = bundle.config.num_hidden_layers, INTERFACES[bundle.task].has_cache
    native_attentions = 0 if _attention_op(bundle) in plugin_ops else layers
    heads = 0 if bundle.task == "feature-extraction" else 1
    return {
        "KV_CACHE_UPDATE": 2 * native_attentions if has_cache else 0,
        "ROTARY_EMBEDDING": 2 * native_attentions,
        "ATTENTION_INPUT": native_attentions,
        "ATTENTION_OUTPUT": native_attentions,
        "MATRIX_MULTIPLY": 7 * layers + heads,
        "PLUGIN_V3": sum(expected_plugin_layers(bundle, plugin_ops).values()),
    }


def _attention_op(bundle: Bundle) -> str:
    return _ATTENTION if INTERFACES[bundle.task].has_cache else _MASKED_ATTENTION


def expected_plugin_layers(bundle: Bundle, plugin_ops: Collection[str]) -> dict[str, int]:
    """op -> plugin layers: one attention a layer; the first norm has no sum before it, all others have."""
    layers = bundle.config.num_hidden_layers
    counts = {"LlamaAddRMSNorm": 2 * layers, _attention_op(bundle): layers, "LlamaRMSNorm": 1}
    return {op: count for op, count in counts.items() if op in plugin_ops}


def plugin_attributes(config: LlamaConfig) -> dict[str, dict[str, int | float]]:
    """op -> field -> value that every plugin layer of the op must carry: its attributes, and what it noted at build."""
    norm = {"epsilon": float32_value(config.rms_norm_eps), "hidden_size": config.hidden_size}
    attention = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "scale": config.softmax_scale,
    }
    return {"LlamaRMSNorm": norm, "LlamaAddRMSNorm": norm, _ATTENTION: attention, _MASKED_ATTENTION: attention}


def may_decompose(dtype: str, plugin_ops: Collection[str] = ()) -> bool:
    """Whether TensorRT's own attention may become MatMul, Softmax, MatMul where it has no fused kernel.

    float32 has none, so there it must. In 16 bit it has one for every head_dim up to 256 (except for a single head with
    max_batch 1), and that keeps scores in float32, which a decomposition need not: better a build that fails than one
    that loses digits in silence.
    """
    return dtype == "float32" and not {_ATTENTION, _MASKED_ATTENTION} & set(plugin_ops)


def tensorrt_proto(onnx: Any, bundle: Bundle, capacity: int, plugin_ops: Collection[str] = ()) -> Any:
    """``model.onnx`` as TensorRT wants it, in memory: C a number, decomposable attention where it is needed.

    A symbolic C fails in the parser (KV_CACHE_UPDATE wants it static; a profile with min = max does not help). Beside
    plugin ops, an op that is to stay native gets another name, function and nodes alike, for which there is no plugin:
    the parser prefers plugins to bodies for the whole graph or not at all.
    """
    proto = onnx.load(str(bundle.model_path), load_external_data=False)
    _check_weight_files(proto, bundle)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CAPACITY:
                dim.dim_value = capacity
    if plugin_ops:
        native = {op: f"{op}Body" for op in CUSTOM_OPS if op not in plugin_ops}
        for node in proto.graph.node:
            if node.domain == _DOMAIN:
                node.op_type = native.get(node.op_type, node.op_type)
        for function in proto.functions:
            if function.domain == _DOMAIN:
                function.name = native.get(function.name, function.name)
    if may_decompose(bundle.dtype, plugin_ops):
        for function in proto.functions:
            for node in function.node:
                if node.op_type == "Attention":
                    # TensorRT's own attribute; onnx.checker refuses it, so it is never in the file.
                    node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return proto


def _check_weight_files(proto: Any, bundle: Bundle) -> None:
    """TensorRT opens whatever file a graph names: only those of the manifest, which are checked, may be named."""
    known = {entry["file"] for entry in bundle.manifest["weights"]}
    named = {
        item.value for tensor in proto.graph.initializer for item in tensor.external_data if item.key == "location"
    }
    if not named <= known:
        raise ArtifactMismatchError(
            "the graph reads files that are not in the manifest",
            details={
                "bundle": bundle.folder,
                "got": ", ".join(sorted(named - known)),
                "expected": ", ".join(sorted(known)),
            },
            hint="export again; do not use bundles from a source you do not trust",
        )


def _check_buildable(config: EngineConfig) -> None:
    """What this machine cannot build is refused before a graph is read."""
    needs_gpu = None
    if config.backend == "tensorrt":
        needs_gpu = ("TensorRT builds on the GPU it builds for", "--backend tensorrt-rtx")
    elif config.weights == "stripped":
        needs_gpu = ("an engine without its weights is built on a GPU", "--weights input needs none")
    if needs_gpu is not None and (blocker := execution_blocker(config.backend)) is not None:
        raise ToolchainError(needs_gpu[0], details={"reason": blocker}, hint=needs_gpu[1])
    if config.backend == "tensorrt" and config.compute_capabilities:
        raise ConfigError(
            "full TensorRT builds for the GPU it runs on",
            details={"got": f"--compute-capability {', '.join(config.compute_capabilities)}"},
            hint="build on that GPU, or use --backend tensorrt-rtx",
        )


def _load_plugins(trt: Any, library: plugins.PluginLibrary, bundle: Bundle, config: EngineConfig) -> None:
    """The library in TensorRT's registry, after all that can be known of it was found right."""
    plugin_ops = config.plugin_ops & bundle.ops
    plugins.check_served(library, bundle.config, bundle.dtype, plugin_ops)
    if config.backend == "tensorrt-rtx":
        ensure_core_library_name()
    plugins.check_creators(plugins.register_library(trt, library), plugin_ops, library)


def installed_plugins(backend: str) -> dict[str, Any]:
    """What ``llama-export plugins`` prints: the installed library, and what TensorRT finds in it.

    Args:
        backend: which TensorRT to ask; where it is not installed, ``creators`` is None.

    Raises:
        ToolchainError: no library, one that is not this package's, or one that TensorRT does not load.
    """
    library = plugins.find_library()
    try:
        trt = load_backend(backend)
    except MissingDependencyError:
        return plugins.describe_library(library, None)
    return plugins.describe_library(library, plugins.register_library(trt, library))


def _parse(
    trt: Any, builder: Any, proto: Any, model_path: Path, messages: Any, library: plugins.PluginLibrary | None
) -> tuple[Any, Any]:
    """(network, parser). The path, not a file at it, tells the parser where the weight files lie."""
    # TensorRT 11 knows no other typing and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, messages)
    if library is not None:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
        plugins.take_library_error(library)  # an earlier parse may have left one
    if not parser.parse(proto.SerializeToString(), str(model_path.resolve())):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refusal = None if library is None else plugins.take_library_error(library)
        if refusal is not None:
            op = next((op for op in CUSTOM_OPS if refusal.startswith(f"{op}:")), _ATTENTION)
            raise EngineBuildError(
                "a plugin refused its node",
                details={"reason": refusal, **numbered("error", [_parser_error(error) for error in errors])},
                hint=plugins.native_hint([op]),
            )
        raise EngineBuildError(
            "TensorRT's parser refused the graph",
            details=numbered("error", [_parser_error(error) for error in errors] or messages.lines()),
            hint="this is a bug or an untested TensorRT version: see `llama-export env`",
        )
    return network, parser


def _parser_error(error: Any) -> str:
    stack = "/".join(error.local_function_stack() or ())
    where = f"{stack}/{error.node_name()}" if stack else error.node_name()
    return f"node {error.node()} `{where}` ({error.node_operator()}), {error.code()}: {error.desc()}"


def _check_network(
    trt: Any, network: Any, proto: Any, bundle: Bundle, capacity: int, plugin_ops: Collection[str],
    weight_inputs: Sequence[Mapping[str, Any]] = (),
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """The parsed network against the config: the last place where every layer can still be seen.

    Returns:
        Layer type -> count, and op -> count of the plugin layers.

    Raises:
        EngineBuildError: all differences.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    counts = Counter(layer.type.name for layer in layers)
    expected = expected_layers(bundle, plugin_ops)
    problems = [
        f"{counts[name]} layers {name}, expected {count}" for name, count in expected.items() if counts[name] != count
    ]
    plugin_layers, plugin_problems = _plugin_problems(trt, layers, proto, bundle, plugin_ops)
    problems += plugin_problems
    problems += _io_problems(network, [*engine_io(bundle, capacity), *weight_inputs])
    attention_problems = _cache_problems if INTERFACES[bundle.task].has_cache else _mask_problems
    problems += attention_problems(trt, layers, bundle, plugin_ops)
    if problems:
        raise EngineBuildError(
            "the parsed network is not what the config implies",
            details=numbered("network", problems),
            hint="this is a bug or an untested TensorRT version: see `llama-export env`",
        )
    return dict(sorted(counts.items())), plugin_layers


def _plugin_problems(
    trt: Any, layers: Sequence[Any], proto: Any, bundle: Bundle, plugin_ops: Collection[str]
) -> tuple[dict[str, int], list[str]]:
    """Op -> plugin layers, and what is wrong with them. A node that misses its plugin is expanded in silence."""
    nodes = {node.name: node.op_type for node in proto.graph.node if node.domain == _DOMAIN}
    found: Counter[str] = Counter()
    problems = []
    for layer in layers:
        if layer.type.name != "PLUGIN_V3":
            continue
        plugin = _plugin_of(trt, layer)
        name = plugin.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name
        found[name] += 1
        if nodes.get(layer.name) != name:
            problems.append(f"plugin layer `{layer.name}` is a {name}, the graph's node a {nodes.get(layer.name)}")
    in_graph = Counter(op for op in nodes.values() if op in plugin_ops)
    for op, count in expected_plugin_layers(bundle, plugin_ops).items():
        if found[op] != count or in_graph[op] != count:
            problems.append(f"{found[op]} plugin layers {op} from {in_graph[op]} nodes, expected {count}")
    problems += [f"{count} plugin layers {op}, expected none" for op, count in found.items() if op not in plugin_ops]
    return dict(sorted(found.items())), problems


def _plugin_of(trt: Any, layer: Any) -> Any:
    layer.__class__ = trt.IPluginV3Layer  # the bindings return the base class
    return layer.plugin


_TYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}


def _io_problems(network: Any, expected: Sequence[Mapping[str, Any]]) -> list[str]:
    tensors = [("input", network.get_input(index)) for index in range(network.num_inputs)]
    tensors += [("output", network.get_output(index)) for index in range(network.num_outputs)]
    got = [f"{kind} {t.name} {_TYPE_NAMES.get(t.dtype.name, t.dtype.name)} {list(t.shape)}" for kind, t in tensors]
    want = []
    for entry in expected:
        shape = [dim if isinstance(dim, int) else -1 for dim in entry["shape"]]
        want.append(f"{entry['kind']} {entry['name']} {entry['dtype']} {shape}")
    return [f"unexpected {item}" for item in got if item not in want] + [
        f"missing {item}" for item in want if item not in got
    ]


# What may lie between a cache and its reader, or between ``past_length`` and the cache: TensorRT's parser casts,
# broadcasts, and multiplies query and key by the root of the scale.
_PASS_THROUGH = ("CAST", "ELEMENTWISE", "SHUFFLE")


# ... and what may stand between ``attention_mask`` and the mask of an attention: logic besides.
_MASK_LOGIC = (*_PASS_THROUGH, "CUMULATIVE", "UNARY", "SQUEEZE", "UNSQUEEZE")


def _tracer(layers: Sequence[Any], through: Collection[str]) -> Callable[[Any], set[str]]:
    """A function: tensor -> names of the tensor and of all it is computed from through layers of these types."""
    producers = {layer.get_output(slot).name: layer for layer in layers for slot in range(layer.num_outputs)}

    def sources(tensor: Any) -> set[str]:
        found: set[str] = set()
        pending = [tensor]
        while pending:
            current = pending.pop()
            if current is None or current.name in found:
                continue
            found.add(current.name)
            producer = producers.get(current.name)
            if producer is not None and producer.type.name in through:
                pending += [producer.get_input(slot) for slot in range(producer.num_inputs)]
        return found

    return sources


def _mask_problems(trt: Any, layers: Sequence[Any], bundle: Bundle, plugin_ops: Collection[str]) -> list[str]:
    """Every attention of a head without a cache is masked by ``attention_mask``."""
    sources = _tracer(layers, _MASK_LOGIC)
    problems = []
    if _MASKED_ATTENTION in plugin_ops:
        masks = [
            layer.get_input(_ATTENTION_MASK)
            for layer in layers
            if layer.type.name == "PLUGIN_V3" and layer.num_inputs > _ATTENTION_MASK
        ]
    else:
        masks = []
        for index, layer in enumerate(item for item in layers if item.type.name == "ATTENTION_INPUT"):
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            masks.append(layer.attention.mask)
            if layer.attention.decomposable != may_decompose(bundle.dtype):
                problems.append(f"attention {index}: decomposable is {layer.attention.decomposable}")
    problems += [
        f"attention {index} is not masked by `attention_mask`"
        for index, mask in enumerate(masks)
        if mask is None or "attention_mask" not in sources(mask)
    ]
    missing = bundle.config.num_hidden_layers - len(masks)
    return [*problems, f"{missing} attentions have no mask"] if missing else problems


def _cache_problems(trt: Any, layers: Sequence[Any], bundle: Bundle, plugin_ops: Collection[str]) -> list[str]:
    """Every cache is updated in place from its own input at ``past_length``, and read by its own layer's attention."""
    sources = _tracer(layers, _PASS_THROUGH)
    if _ATTENTION in plugin_ops:
        return _plugin_cache_problems(layers, bundle, sources)
    updates, attentions = {}, []
    for layer in layers:
        if layer.type.name == "KV_CACHE_UPDATE":
            updates[layer.get_output(0).name] = layer
        elif layer.type.name == "ATTENTION_INPUT":
            attentions.append(layer)
    problems = []
    for past, present in cache_names(bundle.config.num_hidden_layers):
        layer = updates.get(present)
        if layer is None:
            problems.append(f"`{present}` is not the output of a KV_CACHE_UPDATE layer")
            continue
        if layer.get_input(0).name != past:
            problems.append(f"`{present}` updates `{layer.get_input(0).name}`, expected `{past}`")
        if "past_length" not in sources(layer.get_input(2)):
            problems.append(f"`{present}` is not written at `past_length`")
    for index, layer in enumerate(attentions):
        if not {present_name(index, "key")} <= sources(layer.get_input(1)):
            problems.append(f"attention {index} does not read `{present_name(index, 'key')}`")
        if not {present_name(index, "value")} <= sources(layer.get_input(2)):
            problems.append(f"attention {index} does not read `{present_name(index, 'value')}`")
        layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
        # The parser drops `nonpad_kv_seqlen` and aligns `is_causal` to the wrong corner: only a mask says the truth.
        if layer.attention.mask is None:
            problems.append(f"attention {index} has no mask")
        if layer.attention.decomposable != may_decompose(bundle.dtype):
            problems.append(f"attention {index}: decomposable is {layer.attention.decomposable}")
    return problems


def _plugin_cache_problems(layers: Sequence[Any], bundle: Bundle, sources: Callable[[Any], set[str]]) -> list[str]:
    """The plugin attention of layer i reads and writes the caches of layer i, at ``past_length``."""
    writers = {
        layer.get_output(slot).name: (layer, slot)
        for layer in layers
        if layer.type.name == "PLUGIN_V3"
        for slot in range(layer.num_outputs)
    }
    inputs_of = {_PRESENT_KEY: _PAST_KEY, _PRESENT_VALUE: _PAST_VALUE}
    problems = []
    for index in range(bundle.config.num_hidden_layers):
        key, value = (writers.get(present_name(index, part), (None, None))[0] for part in ("key", "value"))
        if key is not value:
            problems.append(f"attention {index}: key and value are written by different layers")
    for past, present in cache_names(bundle.config.num_hidden_layers):
        layer, slot = writers.get(present, (None, None))
        wanted = _PRESENT_KEY if present.endswith(".key") else _PRESENT_VALUE
        if layer is None or slot != wanted or layer.num_inputs <= _PAST_LENGTH:
            problems.append(f"`{present}` is not output {wanted} of a {_ATTENTION} plugin")
            continue
        if layer.get_input(inputs_of[slot]).name != past:
            problems.append(f"`{present}` updates `{layer.get_input(inputs_of[slot]).name}`, expected `{past}`")
        if "past_length" not in sources(layer.get_input(_PAST_LENGTH)):
            problems.append(f"`{present}` is not written at `past_length`")
    return problems


def _serialize(
    trt: Any, builder: Any, network: Any, config: EngineConfig, plugin_ops: Collection[str], profiles: Profiles,
    messages: Any, progress: Progress,
) -> Any:  # fmt: skip
    """The plan, in memory that TensorRT owns."""
    settings = builder.create_builder_config()
    for shapes in profiles.values():
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        if settings.add_optimization_profile(profile) < 0:
            raise EngineBuildError(
                "TensorRT refused an optimization profile",
                details=numbered("message", messages.lines()),
                hint="choose another --max-seq-len or --max-batch",
            )
    # On by default: without this a float32 engine multiplies 10-bit mantissas.
    if config.tf32:
        settings.set_flag(trt.BuilderFlag.TF32)
    else:
        settings.clear_flag(trt.BuilderFlag.TF32)
    _set_targets(trt, settings, config)
    if config.weights == "stripped":
        settings.set_flag(trt.BuilderFlag.STRIP_PLAN)  # implies that it can be refitted
    if config.version_compatible:
        settings.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if _ATTENTION in plugin_ops:
        _check_aliasing(builder, network, settings, messages)
        settings.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    monitor = progress_monitor(trt, progress)
    settings.progress_monitor = monitor
    plan = builder.build_serialized_network(network, settings)
    if monitor.interruption is not None:
        raise monitor.interruption
    if plan is None:
        raise EngineBuildError(
            "TensorRT's builder refused the network",
            details=numbered("message", messages.lines()),
            hint=next(
                (hint for text, hint in _REFUSALS.items() if text in "".join(messages.lines())),
                "see the messages above",
            ),
        )
    return plan


def _set_targets(trt: Any, settings: Any, config: EngineConfig) -> None:
    """The GPUs to compile for; none asked for leaves the backend's own choice."""
    if not config.compute_capabilities:
        return
    known = {name: getattr(trt.ComputeCapability, name) for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    names = [f"SM{capability.replace('.', '')}" for capability in sorted(config.compute_capabilities, key=float)]
    unknown = [
        capability for capability in config.compute_capabilities if f"SM{capability.replace('.', '')}" not in known
    ]
    if unknown:
        served = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in sorted(known, key=lambda name: int(name[2:])))
        raise ConfigError(
            f"{config.backend} {trt.__version__} does not compile for compute capability {', '.join(unknown)}",
            details={"got": ", ".join(unknown), "expected": served},
            hint="choose among these; `nvidia-smi --query-gpu=compute_cap --format=csv` tells a GPU's",
        )
    settings.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        settings.set_compute_capability(known[name], index)


_ALIASING_REFUSED = "Aliased I/O used by plugin"


def _check_aliasing(builder: Any, network: Any, settings: Any, messages: Any) -> None:
    """Asks TensorRT whether the attention plugin shares its cache's buffer: without permission it must be refused.

    The refusal takes milliseconds. TensorRT's Python cannot ask the plugin itself (``get_aliased_input`` of 1.7 takes no
    argument), and the plan does not say.
    """
    plan = builder.build_serialized_network(network, settings)
    refused = any(_ALIASING_REFUSED in line for line in messages.kept)
    if plan is not None or not refused:
        raise EngineBuildError(
            "the attention plugin does not update its cache in place",
            details={
                "got": "no buffer shared between past and present" if plan is not None else messages.lines()[-1],
                "expected": f"`{_ALIASING_REFUSED}` from a build without permission",
            },
            hint="pip install --force-reinstall ./plugins, or --ops LlamaAttention=native",
        )
    messages.kept = [line for line in messages.kept if _ALIASING_REFUSED not in line]


_REFUSALS = {
    "dedicated kernel": "TensorRT has no 16-bit attention kernel for this shape: export with --dtype float32, or build "
    "with --max-batch 2",
    "libnvinfer_lean": "leave --version-compatible out: the lean runtime that such an engine carries is not installed",
    "Turing": "compute capability 7.5 has no kernels for this: leave it out, or try --dtype float16",
}
"""What TensorRT says -> what to do."""


def write_engine(target: Path, plan: Any, sidecar: Mapping[str, Any]) -> None:
    """Both files appear together, or the old ones stay, whenever this is killed: see :mod:`llama_export._commit`."""
    folder = target.parent
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        with staging_folder(folder) as staging:
            write_atomically(staging / target.name, plan)
            write_atomically(staging / target.with_suffix(".json").name, json_bytes(sidecar))
            commit(staging, folder)
    except OSError as err:
        raise write_error(err, folder) from err
    finally:
        if is_new and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def numbered(label: str, lines: Sequence[str]) -> dict[str, str]:
    return {label if len(lines) == 1 else f"{label} {index}": line for index, line in enumerate(lines, 1)}


# ---- check ------------------------------------------------------------------------------------------------------


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


REBUILD = "build again: llama-export build BUNDLE --force"


def rebuild_command(sidecar: Mapping[str, Any], bundle: Path) -> str:
    """The command that builds an engine like this one again, for a bundle and for the machine it is given on."""
    words = ["llama-export", "build", str(bundle), "--backend", sidecar["backend"], "--ops", sidecar["ops"]]
    words += ["--max-seq-len", str(sidecar["max_seq_len"]), "--max-batch", str(sidecar["max_batch"])]
    words += ["--weights", sidecar["weights"]["mode"]] if sidecar["weights"]["mode"] != "constant" else []
    words += ["--profiles", "1"] if set(sidecar["profiles"]) == {PREFILL} else []
    words += ["--tf32"] if sidecar["settings"]["tf32"] else []
    words += ["--version-compatible"] if sidecar["settings"]["version_compatible"] else []
    return shlex.join([*words, "--force"])


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
                hint=REBUILD,
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
        "onnx_sha256": bundle.manifest["graph_sha256"],
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
