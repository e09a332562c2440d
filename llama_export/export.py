"""Checkpoint -> traced program -> ONNX graph -> bundle. Costs the graph, never the weights.

The stages, in the order of the functions: the reference model is built on torch's ``meta`` device (no storage), traced
by ``torch.export`` with static KV-cache inputs, converted to ONNX with one node per custom op, its initializers
replaced by references into the checkpoint's own safetensors files, the function bodies added, the result checked, and
the bundle written under a temporary name and renamed.

Graph inputs and outputs (B batch, S new tokens, N wanted positions, C cache capacity, G key/value heads, D head_dim,
V vocabulary); symbols in the file: ``batch_size``, ``num_new_tokens``, ``num_logits``, ``kv_cache_capacity``:

===============================  ===========  ============  ==========================================================
``input_ids``                    int64        [B, S]        right-padded
``past_length``                  int64        [B]           valid tokens in the cache; ``past_length + S <= C``
``sequence_length``              int64        [B]           valid new tokens per row, 1..S
``logits_index``                 int64        [B, N]        which of the S positions get logits
``past_key_values.{i}.key``      model dtype  [B, G, C, D]  and ``.value``
``logits``                       float32      [B, N, V]
``present.{i}.key``              model dtype  [B, G, C, D]  and ``.value``; aliases the past tensor when bound to it
===============================  ===========  ============  ==========================================================

The heads without a cache (S is ``num_tokens``, K ``num_labels``, E ``hidden_size``):

===============================  ===========  ============  ==========================================================
``input_ids``                    int64        [B, S]        padded on either side
``attention_mask``               int64        [B, S]        0 where there is padding
``logits``                       float32      [B, K]        sequence-classification; B is 1 without a padding token
``logits``                       float32      [B, S, K]     token-classification
``start_logits``                 float32      [B, S]        and ``end_logits``: question-answering
``last_hidden_state``            float32      [B, S, E]     feature-extraction
``sentence_embedding``           float32      [B, E]        feature-extraction: the last attended token's row
===============================  ===========  ============  ==========================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from llama_export import __version__
from llama_export._content import sha256_of_file
from llama_export._process import collector_paused, peak_rss_bytes
from llama_export.bundle import (
    json_bytes,
    plan_destination,
    staged_bundle,
    stop_token_ids,
    weight_record,
)
from llama_export.checkpoint import Checkpoint, TensorEntry, WeightFile, load_checkpoint, resolve_dtype
from llama_export.config import ExportConfig, LlamaConfig, Task, count_parameters
from llama_export.errors import ExportError, MissingDependencyError
from llama_export.estimate import estimate_export
from llama_export.graph_io import INTERFACES, is_single_text
from llama_export.kv_cache import GRANULARITY, LAYOUT, cache_names
from llama_export.manifest import (
    MANIFEST_NAME,
    MODEL_NAME,
    ONNXRUNTIME_NAME,
    SCHEMA_VERSION,
    CacheRecord,
    GraphRecord,
    IoRecord,
    Manifest,
)
from llama_export.placement import Progress, place_text_files, place_weights

try:
    import onnx
    import onnx_ir as ir
    import torch

    from llama_export import ops
    from llama_export.conversion import plan_conversion, write_conversion
    from llama_export.embedded import ROTARY, check_embeddable, external_initializers, write_embedded
    from llama_export.model import MODEL_CLASSES, LlamaForCausalLM
    from llama_export.model.rope import rope_buffers
    from llama_export.repeat import TRACED_LAYERS, repeat_last_layer
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err

IR_VERSION = 11
"""Of the ONNX file: the first with opset 24; onnxruntime 1.32 and TensorRT-RTX 1.7 read it."""
_REPORT = "the exporter and the installed torch disagree: report it with the output of `llama-export env`"
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What one export did; the keys of ``export --json``."""

    bundle: str
    model: str
    task: str
    dtype: str
    num_parameters: int
    weight_bytes_referenced: int
    """Bytes of the weight files that the graph points to; 0 if it holds its weights."""
    weight_bytes_written: int
    """Bytes of weights that were really written: of files copied or converted, or inside both ONNX files; 0 in place, with
    reflinks and with hard links."""
    seconds: float
    """Wall time of the export, imports excluded."""
    peak_rss_bytes: int
    """Peak resident memory of the whole process so far."""
    estimate: Mapping[str, float | int]
    """What was expected before: ``seconds`` (CPU time, imports included), ``ram_bytes``, ``disk_bytes`` (weights written)."""


def export_checkpoint(
    folder: Path,
    output: Path | None = None,
    config: ExportConfig | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda name, done, total: None,
) -> ExportResult:
    """Exports a Hugging Face checkpoint folder.

    Args:
        folder: holds ``config.json`` and ``*.safetensors``.
        output: folder to make; None writes into ``folder``, which then is the bundle.
        config: settings.
        log: receives one line per stage.
        progress: receives the copying, embedding or converting of weights.

    Raises:
        LlamaExportError: see :mod:`llama_export.errors`; nothing is left behind. ToolchainError: this machine has not the
            disk or memory that it needs.
    """
    config = config or ExportConfig()
    start = time.perf_counter()
    checkpoint = load_checkpoint(folder, config.allow_config_keys, task=config.task)
    dtype = resolve_dtype(config.dtype, checkpoint)
    embed = config.weights == "embed"
    if embed:
        check_embeddable(checkpoint.weight_bytes, MODEL_NAME)
    conversion = plan_conversion(checkpoint, dtype) if config.convert_weights else None
    destination = plan_destination(
        checkpoint,
        output,
        force=config.force,
        weights=config.weights,
        converts=conversion is not None,
    )
    estimate = estimate_export(checkpoint, destination, config, conversion.nbytes if conversion else None, log)
    if conversion is not None:
        checkpoint = conversion.checkpoint
    llama, task = checkpoint.config, checkpoint.task
    num_parameters = count_parameters(llama, task)
    log(f"export: {task}, {num_parameters:,} parameters, {dtype}, {llama.num_hidden_layers} layers")
    if checkpoint.dropped:
        log(f"export: {len(checkpoint.dropped)} stored tensors that {task} does not use: {_listed(checkpoint.dropped)}")

    with collector_paused():
        graph = decoder_graph(llama, dtype, task)
    models = {
        "standard": (MODEL_NAME, dtype, model_proto(graph, checkpoint, dtype, "standard")),
        # onnxruntime's CPU provider has no bfloat16 kernels and computes float16 in float32: its file is float32.
        "onnxruntime": (ONNXRUNTIME_NAME, "float32", model_proto(graph, checkpoint, "float32", "onnxruntime")),
    }
    with staged_bundle(destination) as staging:
        written = 0
        for name, _, proto in models.values():
            check_model(proto)
            if embed:
                written += write_embedded(proto, checkpoint, staging / name, progress)
            else:
                (staging / name).write_bytes(proto.SerializeToString())
        if not destination.in_place:
            place_text_files(checkpoint, staging)
            if conversion is not None:
                written += write_conversion(conversion, staging, progress)
            elif not embed:
                written += place_weights(checkpoint, staging, config.weights, log, progress)
        weights_at = checkpoint.folder if destination.in_place else staging
        files = [] if embed else list(checkpoint.files)
        if not destination.in_place:
            files = [_as_it_lies(file, staging) for file in files]
        standard = models["standard"][2]
        functions = {
            target: GraphRecord(
                file=name,
                sha256=sha256_of_file(staging / name),
                dtype=target_dtype,
                readers=_READERS[target].format(dtype=target_dtype),
            )
            for target, (name, target_dtype, _) in models.items()
        }
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            generator={
                "llama_export": __version__,
                "torch": str(torch.__version__),
                "onnx": onnx.__version__,
                "opset": str(ops.OPSET_VERSION),
            },
            task=task,
            model=llama,
            dtype=dtype,
            io=io_table(standard),
            rope=llama.rope,
            eos_token_ids=tuple(stop_token_ids(checkpoint)),
            ops={op: ops.OP_SPECS[op].version for op in sorted(custom_op_counts(standard))},
            graph_sha256=functions["standard"].sha256,
            functions=functions,
            kv_cache=CacheRecord(layout=LAYOUT, dtype=dtype, granularity=GRANULARITY)
            if INTERFACES[task].has_cache
            else None,
            weights=tuple(weight_record(weights_at / file.name, file, hashes=config.hash_weights) for file in files),
        )
        (staging / MANIFEST_NAME).write_bytes(json_bytes(manifest.to_json()))
    seconds = time.perf_counter() - start
    referenced = 0 if embed else checkpoint.weight_bytes
    log(f"export: done in {seconds:.1f} s after imports, {written:,} weight bytes written, {referenced:,} referenced")
    return ExportResult(
        bundle=str(destination.folder),
        model=str(destination.folder / MODEL_NAME),
        task=task,
        dtype=dtype,
        num_parameters=num_parameters,
        weight_bytes_referenced=referenced,
        weight_bytes_written=written,
        seconds=round(seconds, 3),
        peak_rss_bytes=peak_rss_bytes(),
        estimate=estimate.to_json(),
    )


def _as_it_lies(file: WeightFile, folder: Path) -> WeightFile:
    """With the modification time it has there; a copy's may differ from the original's."""
    return dataclasses.replace(file, mtime_ns=(folder / file.name).stat().st_mtime_ns)


def _listed(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def decoder_graph(config: LlamaConfig, dtype: str, task: Task) -> ir.Model:
    """The ONNX graph of a model of any depth, from a trace of its first layers; no weights yet.

    Raises:
        ExportError: see :func:`graph_from_program`.
    """
    shallow = dataclasses.replace(config, num_hidden_layers=min(config.num_hidden_layers, TRACED_LAYERS))
    graph = graph_from_program(trace_program(shallow, dtype, task), shallow, task)
    if shallow.num_hidden_layers == config.num_hidden_layers:
        return graph
    graph = repeat_last_layer(graph, config.num_hidden_layers)
    _check_counts(graph.graph, config, task)
    return graph


def trace_program(config: LlamaConfig, dtype: str, task: Task = "causal-lm") -> torch.export.ExportedProgram:
    """Traces the reference; batch, tokens, wanted positions and capacity are symbols.

    Built on the meta device: no tensor of the model has storage.
    """
    # Sizes differ from each other and from 1, so that no two dimensions are taken for the same or for a constant.
    batch, tokens, wanted, capacity = 1 if is_single_text(config, task) else 2, 7, 3, 16
    B, S, N, C = (torch.export.Dim(name, min=1) for name in ("B", "S", "N", "C"))
    with torch.device("meta"):
        model = MODEL_CLASSES[task](config).to(getattr(torch, dtype)).eval()
        model.model.rotary_emb.float()  # frequencies stay float32 in 16-bit models
        input_ids = torch.zeros(batch, tokens, dtype=torch.int64)
        arguments: tuple[Any, ...]
        shapes: tuple[Any, ...]
        if isinstance(model, LlamaForCausalLM):
            lengths = torch.zeros(batch, dtype=torch.int64)
            index = torch.zeros(batch, wanted, dtype=torch.int64)
            arguments = (input_ids, lengths, lengths.clone(), index, model.empty_cache(batch, capacity))
            cache = [({0: B, 2: C}, {0: B, 2: C}) for _ in range(config.num_hidden_layers)]
            shapes = ({0: B, 1: S}, {0: B}, {0: B}, {0: B, 1: N}, cache)
        else:
            arguments = (input_ids, input_ids.clone())
            text = {1: S} if is_single_text(config, task) else {0: B, 1: S}
            shapes = (text, text)
    return torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)


def graph_from_program(program: torch.export.ExportedProgram, config: LlamaConfig, task: Task) -> ir.Model:
    """The ONNX graph of a traced program: one node per custom op, nodes named after their module, no weights yet.

    Raises:
        ExportError: the counts of custom nodes or the weights are not what the config implies.
    """
    ops.register_onnx_schemas()
    with _quiet_exporter():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=ops.OPSET_VERSION,
            optimize=False,
            verbose=False,
            custom_translation_table=ops.translation_table(),
            input_names=INTERFACES[task].input_names(config),
            output_names=INTERFACES[task].output_names(config),
        )
    if converted is None:
        raise ExportError("torch.onnx.export returned nothing", hint=_REPORT)
    model: ir.Model = converted.model
    _name_nodes(model.graph)
    _name_values(model.graph)
    _name_dimensions(model.graph, task)
    _share_tied_embedding(model.graph, config)
    for name, values in rope_buffers(config).items():
        frequencies = model.graph.initializers[ROTARY + name]
        frequencies.const_value = ir.Tensor(values.numpy(), name=frequencies.name)
    model.opset_imports[ops.DOMAIN] = 1
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "llama_export", None, None
    _check_counts(model.graph, config, task)
    return model


def _name_nodes(graph: ir.Graph) -> None:
    """``model.layers.1.self_attn/LlamaAttention`` instead of ``node_attention_1__2``; drops the local file paths."""
    taken: Counter[str] = Counter()
    for node in graph:
        # The exporter's scope list ends with the traced operator's own name.
        scopes = str(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [scope for scope in _parse_scopes(scopes)[:-1] if scope and not scope.startswith("_empty_nn_module")]
        base = f"{modules[-1] if modules else 'model'}/{node.op_type}"
        node.name = f"{base}.{taken[base]}" if taken[base] else base
        taken[base] += 1
        node.metadata_props.clear()
        node.doc_string = None
    for value in _values(graph):
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    graph.name, graph.doc_string = "llama", None


def _name_values(graph: ir.Graph) -> None:
    """``model.layers.1.mlp/silu`` instead of ``silu_1``: the module, and what the tracer calls the result.

    The results of our ops have the names of the op's outputs; what the conversion to ONNX added is named after its node.
    Inputs and outputs of the graph keep the names of the contract.
    """
    taken: Counter[str] = Counter()
    outputs = set(graph.outputs)
    for node in graph:
        spec = ops.OP_SPECS.get(node.op_type) if node.domain == ops.DOMAIN else None
        for slot, value in enumerate(node.outputs):
            if value in outputs:
                continue
            traced = _NUMBERED.sub("", value.name or "")
            if spec is None and traced == _CONVERTER_VALUE:
                value.name = node.name
                continue
            name = f"{str(node.name).partition('/')[0]}/{traced if spec is None else spec.outputs[slot].name}"
            value.name = f"{name}.{taken[name]}" if taken[name] else name
            taken[name] += 1


_NUMBERED = re.compile(r"_\d+$")
_CONVERTER_VALUE = "val"
"""What ``torch.onnx`` calls a value, before its number, that no operator of the trace has computed."""


def _parse_scopes(text: str) -> list[str]:
    import ast

    return [str(scope) for scope in ast.literal_eval(text)]


def _name_dimensions(graph: ir.Graph, task: Task) -> None:
    """Replaces the tracer's symbols (``s17``) by the names of the contract, everywhere in the graph."""
    inputs = {value.name: value.shape for value in graph.inputs}
    symbols = list(inputs["input_ids"])
    if INTERFACES[task].has_cache:
        cache = next(shape for name, shape in inputs.items() if name.startswith("past_key_values."))
        symbols += [inputs["logits_index"][1], cache[2]]
    names = zip(symbols, INTERFACES[task].dimensions, strict=True)
    renamed = {str(symbol.value): name for symbol, name in names if isinstance(symbol, ir.SymbolicDim)}
    for value in _values(graph):
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and str(dim.value) in renamed:
                value.shape[axis] = ir.SymbolicDim(renamed[str(dim.value)])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _share_tied_embedding(graph: ir.Graph, config: LlamaConfig) -> None:
    """A tied output projection appears under one of its two names; the checkpoint holds the embedding's."""
    if config.tie_word_embeddings and _LM_HEAD in graph.initializers:
        value = graph.initializers.pop(_LM_HEAD)
        value.name = _EMBEDDING
        graph.register_initializer(value)


def expected_op_counts(config: LlamaConfig, task: Task) -> dict[str, int]:
    """Custom nodes the graph must hold: the first norm has no residual before it, all others do."""
    layers = config.num_hidden_layers
    attention = "LlamaAttention" if INTERFACES[task].has_cache else "LlamaMaskedAttention"
    return {"LlamaRMSNorm": 1, "LlamaAddRMSNorm": 2 * layers, attention: layers}


def custom_op_counts(proto: onnx.ModelProto) -> dict[str, int]:
    """op_type -> number of nodes of our domain."""
    return dict(Counter(node.op_type for node in proto.graph.node if node.domain == ops.DOMAIN))


def _check_counts(graph: ir.Graph, config: LlamaConfig, task: Task) -> None:
    got = dict(Counter(node.op_type for node in graph if node.domain == ops.DOMAIN))
    if got != expected_op_counts(config, task):
        raise ExportError(
            "the traced graph does not hold the ops the config implies",
            details={"got": got, "expected": expected_op_counts(config, task)},
            hint="this is a bug or an untested torch version: see `llama-export env`",
        )


_READERS = {
    "standard": "TensorRT, and ONNX readers of opset 24 that have kernels for {dtype}",
    "onnxruntime": "onnxruntime on a CPU, which computes it in {dtype}",
}
"""Who opens which graph. onnxruntime's CPU provider has no kernels for bfloat16, so it does not open ``standard`` then."""


def model_proto(graph: ir.Model, checkpoint: Checkpoint, dtype: str, target: ops.Target) -> onnx.ModelProto:
    """A complete model of one dtype and target: weights by reference, function bodies added.

    Args:
        graph: from :func:`graph_from_program`; not modified.
        checkpoint: whose files the initializers point into.
        dtype: compute dtype; a weight stored otherwise gets a ``Cast`` after it.
        target: which function bodies.
    """
    model = graph.clone()
    _retype(model.graph, getattr(ir.DataType, _ONNX_DTYPE[dtype]))
    _reference_weights(model.graph, checkpoint, getattr(ir.DataType, _ONNX_DTYPE[dtype]))
    proto = ir.to_proto(model)
    del proto.functions[:]
    proto.functions.extend(ops.function_protos(target, checkpoint.config.head_dim))
    return proto


_ONNX_DTYPE = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
_SIXTEEN_BIT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _retype(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Gives every 16-bit value and cast of the graph another float type; float32 values keep theirs."""
    for value in _values(graph):
        if value.dtype in _SIXTEEN_BIT:
            value.type = ir.TensorType(dtype)  # a clone shares its type objects with the original
    for node in graph:
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and ir.DataType(target.as_int()) in _SIXTEEN_BIT:
            node.attributes["to"] = ir.AttrInt64("to", dtype.value)


def _reference_weights(graph: ir.Graph, checkpoint: Checkpoint, dtype: ir.DataType) -> None:
    """Points every weight initializer into its safetensors file, under the name it has there.

    Raises:
        ExportError: the graph's weights are not exactly the checkpoint's.
    """
    weights = {name for name in graph.initializers if not name.startswith(ROTARY)}
    if weights != set(checkpoint.tensors):
        raise ExportError(
            "the traced graph does not use the checkpoint's tensors one to one",
            details={
                "not in the checkpoint": sorted(weights - set(checkpoint.tensors)),
                "not in the graph": sorted(set(checkpoint.tensors) - weights),
            },
            hint=_REPORT,
        )
    order = {node: place for place, node in enumerate(graph)}
    for name, entry in checkpoint.tensors.items():
        value = graph.initializers[name]
        stored = getattr(ir.DataType, _ONNX_DTYPE[entry.dtype])
        del graph.initializers[name]
        if stored == dtype:
            value.name, value.const_value = entry.name, _external(entry, stored)
            graph.register_initializer(value)
            continue
        source = ir.Value(
            name=entry.name,
            type=ir.TensorType(stored),
            shape=ir.Shape(entry.shape),
            const_value=_external(entry, stored),
        )
        graph.register_initializer(source)
        for reader in value.consumers():
            if reader.op_type == "Gather" and reader.inputs[0] is value:
                _cast_rows(graph, reader, source, dtype)
        if value.consumers():
            cast = _cast(source, f"{entry.name}/cast", dtype, f"{entry.name}/Cast")
            graph.insert_before(_place_of_cast(value, order), cast)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])


def _cast(source: ir.Value, name: str, dtype: ir.DataType, node_name: str) -> ir.Node:
    node = ir.node("Cast", [source], attributes={"to": dtype.value}, name=node_name)
    output = node.outputs[0]
    output.name, output.type = name, ir.TensorType(dtype)
    output.shape = None if source.shape is None else source.shape.copy()
    return node


def _cast_rows(graph: ir.Graph, gather: ir.Node, source: ir.Value, dtype: ir.DataType) -> None:
    """Casts the rows that a lookup takes, not the table: 4 GB in every step of a model with 128256 x 8192 entries."""
    rows = gather.outputs[0]
    name, readers = str(rows.name), list(rows.uses())
    gather.replace_input_with(0, source)
    rows.name, rows.type = f"{name}/stored", source.type
    cast = _cast(rows, name, dtype, f"{str(gather.name).partition('/')[0]}/Cast")
    graph.insert_after(gather, cast)
    for use in readers:
        use.node.replace_input_with(use.idx, cast.outputs[0])


def _place_of_cast(value: ir.Value, order: Mapping[ir.Node, int]) -> ir.Node:
    """The node that the cast of a weight stands before, so that few widened weights are alive at a time.

    Whoever runs the nodes as they stand wants it just before its first reader. onnxruntime orders them anew: of a product's
    two factors it first computes all that leads to the one whose node stands later. Where that is the weight, the cast of
    every ``down_proj`` runs before anything else. So the cast stands before the node that makes the other factor.
    """
    reader = min(value.consumers(), key=order.__getitem__)
    product = reader
    if reader.op_type == "Transpose":
        (product,) = reader.outputs[0].consumers()
    factor = product.inputs[0].producer() if product.op_type == "MatMul" and product.inputs[0] is not None else None
    return reader if factor is None else factor


def _external(entry: TensorEntry, dtype: ir.DataType) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        entry.file, entry.offset, entry.nbytes, dtype, shape=ir.Shape(entry.shape), name=entry.name, base_dir=""
    )


def check_model(proto: onnx.ModelProto) -> None:
    """``onnx.checker`` with full shape inference, on a copy whose weights are inputs: no weight file is opened.

    Raises:
        ExportError: the checker refused the graph.
    """
    ops.register_onnx_schemas()
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for item in external_initializers(copy):
        copy.graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
        copy.graph.initializer.remove(item)
    try:
        onnx.checker.check_model(copy, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportError("onnx.checker refused the exported graph", details={"reason": err}, hint=_REPORT) from err


def io_table(proto: onnx.ModelProto) -> tuple[IoRecord, ...]:
    """Inputs, then outputs: name, dtype, shape (integers and symbols), and what an output may share memory with."""
    aliases = {present: past for past, present in cache_names(len(proto.graph.output) // 2)}  # none without a cache
    table: list[IoRecord] = []
    kinds: tuple[tuple[Literal["input", "output"], Any], ...] = (
        ("input", proto.graph.input),
        ("output", proto.graph.output),
    )
    for kind, values in kinds:
        for value in values:
            tensor = value.type.tensor_type
            table.append(
                IoRecord(
                    name=value.name,
                    kind=kind,
                    dtype=cast(Any, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name),
                    shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim),
                    alias_of=aliases.get(value.name) if kind == "output" else None,
                )
            )
    return tuple(table)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs one warning per missing optional package and warns about its own internals."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
