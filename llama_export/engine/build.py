"""Bundle -> TensorRT engine, and everything that can be said about an engine without a GPU.

Role: ``model.onnx`` goes in with a fixed cache capacity, ``engines/NAME.engine`` and its sidecar ``NAME.json`` come
out. The graph's custom ops become our plugin layers (``ops = plugin``), or their function bodies become TensorRT's own
layers (``native``), or some of each. Needs neither torch nor our op table: the ops are in the file. The graph's inputs
and outputs are those of :mod:`llama_export.export.export`, with C a number.

What is proven here, on any machine:

* the *network* before the build: inputs and outputs, layer counts, that each op's nodes became plugin layers or did not,
  every cache output is the in-place update of its own input at ``past_length``, every attention reads those caches and,
  where it is TensorRT's own, has an explicit mask;
* the *plan* after the build (TensorRT-RTX 1.7, whose serialised graphs are readable text): the names of all inputs and
  outputs in both profiles, shape and dtype of every cache, that it is updated in place, the plugins and their
  attributes, TF32, the GPUs it runs on;
* the *file* later: its hash, the hash of the graph it was built from, its plugin library, and all of the above again.

What is not: the numbers. :mod:`llama_export.runtime.engine_session` runs an engine and has itself not been run on a GPU.

Shapes: B batch, S new tokens, N wanted positions, C kv_cache_capacity, G key/value heads, D head_dim, V vocabulary.

Source: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from llama_export import __version__
from llama_export._system.commit import commit, staging_folder
from llama_export._system.content import sha256_of_file
from llama_export._system.interrupt import deferred, undone
from llama_export._system.process import peak_rss_bytes
from llama_export.bundle.bundle import ENGINES_NAME, Bundle
from llama_export.bundle.destination import json_bytes, unchanged, write_error
from llama_export.bundle.estimate import estimate_build
from llama_export.bundle.graph_check import check_graph
from llama_export.bundle.placement import Progress
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.config.llama import DType, Task
from llama_export.config.settings import CUSTOM_OPS, EngineConfig
from llama_export.engine import plugins
from llama_export.engine.network import check_network
from llama_export.engine.plan import is_readable, read_plan
from llama_export.engine.sidecar import CreatedBy, EngineSidecar, PluginIdentity, Profiles
from llama_export.engine.spec import (
    ATTENTION,
    engine_io,
    engine_name,
    engine_profiles,
    engine_settings,
    max_batch,
    may_decompose,
    plugin_attributes,
    resolve_capacity,
    weight_io,
)
from llama_export.engine.tensorrt import (
    MappedWeights,
    cuda_major,
    ensure_core_library_name,
    execution_blocker,
    gpu_compute_capability,
    load_backend,
    load_onnx,
    message_log,
    plan_writer,
    progress_monitor,
)
from llama_export.engine.weights import (
    bundle_tensors,
    make_weights_inputs,
    network_sha256,
    require_stored_dtype,
    weights_record,
)
from llama_export.errors import ConfigError, EngineBuildError, MissingDependencyError, ToolchainError, numbered
from llama_export.graph.io import INTERFACES
from llama_export.graph.kv_cache import CAPACITY
from llama_export.ops.table import DOMAIN


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
    estimate: Mapping[str, float | int]
    """What was expected before: ``seconds`` (CPU time, imports included), ``ram_bytes``, ``disk_bytes`` (the engine)."""


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
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        config: settings.
        log: receives a line at the start, one per stage, and one at the end.
        progress: receives (phase of the builder, steps done, steps in all). If it raises, the build is cancelled.

    Raises:
        ConfigError: an engine of this name exists and ``config.force`` is off.
        ShapeError: a capacity beyond ``max_position_embeddings``.
        MissingDependencyError: the backend's extra is not installed.
        ToolchainError: the backend is too old, has no GPU to build on, or this machine has not the disk or memory that the
            build needs (:mod:`llama_export.bundle.estimate`); or the plugin library is not
            installed, is not this package's, or does not serve an op of this model.
        ArtifactMismatchError: no export makes such a graph: see :mod:`llama_export.bundle.graph_check`.
        EngineBuildError: the parser or builder refused, or made something else than the config implies. Nothing is left
            behind.
    """
    job = _planned(bundle, config or EngineConfig())
    estimate = estimate_build(bundle, job.config, log)
    start = time.perf_counter()
    log(
        f"build: {job.config.backend} {job.trt.__version__}, {job.config.ops} ops, {bundle.dtype}, "
        f"{bundle.task}, up to {job.capacity} tokens, batch 1..{job.max_batch}, weights {job.config.weights}"
    )
    proto = tensorrt_proto(job.onnx, bundle, job.capacity, job.plugin_ops)
    if job.config.weights == "input":
        make_weights_inputs(job.onnx, proto, job.tensors)
    weights = MappedWeights(bundle.folder, proto)
    network = _checked_network(job, proto, weights)
    log(f"build: parsed {network.layers} layers in {time.perf_counter() - start:.1f} s, network checked")
    if job.library is not None:
        counts = ", ".join(f"{count} {op}" for op, count in network.plugin_layers.items())
        log(f"build: plugin layers: {counts}; library {job.library.version}")
    with engine_staging(job.target) as staged:
        with weights:
            plan = _serialize(job, network, progress, staged)
        seconds = round(time.perf_counter() - start, 3)
        sidecar = _sidecar(job, proto, network, plan, seconds)
        sidecar = _with_plan_facts(staged, sidecar, bundle, job.config.compute_capabilities)
        _check_targets(sidecar, job.config, job.library)
        if copied := sidecar.weights_copied_per_run:
            log(
                f"build: TensorRT brings {', '.join(copied)} into another layout in every run; --weights constant does it once "
                "(a vocabulary that is a multiple of 8 and plugin ops avoid it)"
            )
        write_sidecar(staged, sidecar)
        commit_engine(staged, bundle)
    log(f"build: done in {seconds:.1f} s, {plan.nbytes:,} bytes, {ENGINES_NAME}/{job.target.name}")
    return EngineResult(
        engine=str(job.target),
        backend=job.config.backend,
        ops=job.config.ops,
        plugin_layers=network.plugin_layers,
        weights=job.config.weights,
        bytes=plan.nbytes,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        estimate=estimate.to_json(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is built, from what and with what."""

    bundle: Bundle
    config: EngineConfig
    capacity: int
    """C, tokens."""
    target: Path
    """Where the engine will be."""
    tensors: list[TensorEntry]
    """Weights that stay outside the engine."""
    plugin_ops: frozenset[str]
    """The graph's ops that become plugin layers."""
    library: plugins.PluginLibrary | None
    trt: Any
    """The backend's Python module."""
    onnx: Any

    @property
    def max_batch(self) -> int:
        """Rows."""
        return max_batch(self.bundle, self.config)

    @property
    def profiles(self) -> Profiles:
        """The shapes that each optimization profile allows."""
        return engine_profiles(self.bundle, self.capacity, self.max_batch, self.config.profiles)


class _Network(NamedTuple):
    """A parsed and checked network. It refers to its parser's memory, which must live until it is built."""

    network: Any
    parser: Any
    builder: Any
    messages: Any
    layers: int
    checked_layers: dict[str, int]
    """What of them the sidecar counts."""
    plugin_layers: dict[str, int]
    """op -> layers of our plugins."""


def _planned(bundle: Bundle, config: EngineConfig) -> _Job:
    """Everything that can be refused before a graph is read."""
    capacity = resolve_capacity(bundle.config, config.max_seq_len)
    target = _free_target(bundle, config, capacity)
    tensors = bundle_tensors(bundle) if config.weights != "constant" else []
    if config.weights == "input":
        require_stored_dtype(bundle, tensors)
    trt = load_backend(config.backend)
    _check_buildable(config)
    onnx = load_onnx(config.backend)
    plugin_ops = config.plugin_ops & bundle.ops
    return _Job(
        bundle=bundle, config=config, capacity=capacity, target=target, tensors=tensors, plugin_ops=plugin_ops,
        library=_plugin_library(config) if plugin_ops else None, trt=trt, onnx=onnx,
    )  # fmt: skip


def _checked_network(job: _Job, proto: Any, weights: MappedWeights) -> _Network:
    """The graph parsed by TensorRT and held to the config."""
    messages = message_log(job.trt)
    builder = job.trt.Builder(messages)
    builder.max_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if job.library is not None:
        _load_plugins(job.trt, job.library, job.bundle, job.config)
    network, parser = _parse(job.trt, builder, proto, job.bundle.model_path, weights, messages, job.library)
    inputs = weight_io(job.tensors) if job.config.weights == "input" else ()
    layers, plugin_layers = check_network(job.trt, network, proto, job.bundle, job.capacity, job.plugin_ops, inputs)
    return _Network(network, parser, builder, messages, network.num_layers, layers, plugin_layers)


def _sidecar(job: _Job, proto: Any, network: _Network, plan: Any, seconds: float) -> EngineSidecar:
    """What is known of the engine before its plan was read."""
    bundle, config, library = job.bundle, job.config, job.library
    return EngineSidecar(
        created_by=CreatedBy(llama_export=__version__, onnx=job.onnx.__version__),
        backend=config.backend,
        backend_version=job.trt.__version__,
        ops=config.ops,
        plugin_layers=network.plugin_layers,
        plugin_library=None if library is None else PluginIdentity(**library.identity),  # type: ignore[arg-type]
        onnx_sha256=sha256_of_file(bundle.model_path),
        engine_sha256=plan.sha256,
        bytes=plan.nbytes,
        model=bundle.manifest.to_json()["model"],
        task=cast(Task, bundle.task),
        dtype=cast(DType, bundle.dtype),
        weights=weights_record(config.weights, job.tensors),
        network_sha256=network_sha256(proto) if config.weights == "input" else None,
        max_seq_len=job.capacity,
        kv_cache_capacity=job.capacity if INTERFACES[bundle.task].has_cache else None,
        max_batch=job.max_batch,
        profiles=job.profiles,
        io=engine_io(bundle, job.capacity),
        layers=network.checked_layers,
        settings=engine_settings(bundle, config),
        cuda_major=cuda_major(config.backend),
        compute_capabilities=(),  # these and the three below are read from the plan
        forward_compatible=False,
        weights_copied_per_run=(),
        compiled_graphs_sha256=None,
        build_seconds=seconds,
    )


def _free_target(bundle: Bundle, config: EngineConfig, capacity: int) -> Path:
    """Where the engine will be.

    Raises:
        ConfigError: one is there already, and ``config.force`` is off.
    """
    target = bundle.folder / ENGINES_NAME / engine_name(bundle, config, capacity)
    existing = [path.name for path in (target, target.with_suffix(".json")) if path.exists()]
    if existing and not config.force:
        raise ConfigError(
            f"engine `{target.name}` exists", details={"got": ", ".join(existing)}, hint="pass --force to replace it"
        )
    return target


def _plugin_library(config: EngineConfig) -> plugins.PluginLibrary:
    """The installed library, which has kernels for the GPUs that were asked for."""
    library = plugins.find_library()
    for compute_capability in config.compute_capabilities:
        plugins.check_chip(library, compute_capability)
    return library


def _with_plan_facts(staged: Path, sidecar: EngineSidecar, bundle: Bundle, asked: tuple[str, ...]) -> EngineSidecar:
    """The sidecar with what the plan says of itself.

    Raises:
        EngineBuildError: the plan is not what the sidecar says.
    """
    if not is_readable(sidecar):
        # The plan of another version: what was asked for, else what it was built on.
        return replace(sidecar, compute_capabilities=asked or (gpu_compute_capability(),))
    with staged.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        facts, problems = read_plan(content, sidecar, plugin_attributes(bundle.config, bundle.task))
    if problems:
        raise EngineBuildError(
            "the builder made an engine that is not what the config implies",
            details=numbered("plan", problems),
            hint="this is a bug or an untested TensorRT version: see `llama-export env`",
        )
    return replace(sidecar, **facts)


def _check_targets(sidecar: EngineSidecar, config: EngineConfig, library: plugins.PluginLibrary | None) -> None:
    """The engine is for the GPUs that were asked for, and the plugin library has kernels for them."""
    asked = tuple(sorted(config.compute_capabilities, key=float))
    if asked and sidecar.compute_capabilities != asked:
        raise EngineBuildError(
            "the builder compiled for other GPUs than it was asked for",
            details={"got": ", ".join(sidecar.compute_capabilities), "expected": ", ".join(asked)},
            hint="this is a bug or an untested TensorRT version: see `llama-export env`",
        )
    for compute_capability in sidecar.compute_capabilities if library is not None else ():
        plugins.check_chip(library, compute_capability)  # type: ignore[arg-type]


def tensorrt_proto(onnx: Any, bundle: Bundle, capacity: int, plugin_ops: Collection[str] = ()) -> Any:
    """``model.onnx`` as TensorRT wants it, in memory: C a number, decomposable attention where it is needed.

    A symbolic C fails in the parser (KV_CACHE_UPDATE wants it static; a profile with min = max does not help). Beside
    plugin ops, an op that is to stay native gets another name, function and nodes alike, for which there is no plugin:
    the parser prefers plugins to bodies for the whole graph or not at all.

    Raises:
        ArtifactMismatchError: no export makes such a graph: see :mod:`llama_export.bundle.graph_check`.
    """
    check_graph(bundle, bundle.model_path)
    proto = onnx.load(str(bundle.model_path), load_external_data=False)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CAPACITY:
                dim.dim_value = capacity
    if plugin_ops:
        native = {op: f"{op}Body" for op in CUSTOM_OPS if op not in plugin_ops}
        for node in proto.graph.node:
            if node.domain == DOMAIN:
                node.op_type = native.get(node.op_type, node.op_type)
        for function in proto.functions:
            if function.domain == DOMAIN:
                function.name = native.get(function.name, function.name)
    if may_decompose(bundle.dtype, plugin_ops):
        for function in proto.functions:
            for node in function.node:
                if node.op_type == "Attention":
                    # TensorRT's own attribute; onnx.checker refuses it, so it is never in the file.
                    node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return proto


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
    trt: Any, builder: Any, proto: Any, model_path: Path, weights: MappedWeights, messages: Any,
    library: plugins.PluginLibrary | None,
) -> tuple[Any, Any]:  # fmt: skip
    """(network, parser). The weights are given to the parser where they are mapped; it opens no file."""
    # TensorRT 11 knows no other typing and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, messages)
    if library is not None:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
        plugins.take_library_error(library)  # an earlier parse may have left one
    with deferred():
        parsed = parser.load_model_proto(proto.SerializeToString(), str(model_path.resolve()))
        parsed = parsed and all(parser.load_initializer(*place) for place in weights.addresses())
        parsed = parsed and parser.parse_model_proto()
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refusal = None if library is None else plugins.take_library_error(library)
        if refusal is not None:
            op = next((op for op in CUSTOM_OPS if refusal.startswith(f"{op}:")), ATTENTION)
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


def _serialize(job: _Job, parsed: _Network, progress: Progress, path: Path) -> Any:
    """Builds the plan into a file, as it is serialised: it is never in memory as a whole. Gives its ``nbytes`` and ``sha256``."""
    trt, config, builder, messages = job.trt, job.config, parsed.builder, parsed.messages
    settings = builder.create_builder_config()
    for shapes in job.profiles.values():
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
    if ATTENTION in job.plugin_ops:
        with deferred():
            _check_aliasing(builder, parsed.network, settings, messages)
        settings.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    plan = plan_writer(trt, path)
    try:
        with deferred() as signalled:
            settings.progress_monitor = monitor = progress_monitor(trt, progress, signalled)
            built = builder.build_serialized_network_to_stream(parsed.network, settings, plan)
    finally:
        plan.close()
    for error in (monitor.error, plan.error):
        if error is not None:
            raise error
    if not built:
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
    "Turing": "compute capability 7.5 has no kernels for this: leave it out, or try --dtype float16",
}
"""What TensorRT says -> what to do."""


@contextlib.contextmanager
def engine_staging(target: Path) -> Iterator[Path]:
    """Where to write an engine before :func:`commit_engine`; nothing stays of it without one.

    Raises:
        ToolchainError: no space. ExportError: the folder cannot be written to.
    """
    folder = target.parent
    is_new = not folder.exists()

    def remove_new_folder() -> None:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: the engine is in it
                folder.rmdir()

    try:
        folder.mkdir(exist_ok=True)
        with undone(remove_new_folder), staging_folder(folder) as staging:
            yield staging / target.name
    except OSError as err:
        raise write_error(err, folder) from err
    finally:
        remove_new_folder()


def write_sidecar(staged: Path, sidecar: EngineSidecar) -> None:
    """The sidecar beside an engine that :func:`commit_engine` will move into place."""
    staged.with_suffix(".json").write_bytes(json_bytes(sidecar.to_json()))


def commit_engine(staged: Path, bundle: Bundle) -> None:
    """Engine and sidecar appear together, or the old ones stay, whenever this is killed: see :mod:`llama_export._system.commit`.

    The engine is not synced, which would take as long as the build: what a power cut makes of it, its hash tells, and a build
    makes it again.

    Raises:
        ArtifactMismatchError: the bundle was exported again since it was opened.
    """
    with unchanged(bundle, staged.parent):
        commit(staged.parent, staged.parent.parent, unsynced={staged.name})
