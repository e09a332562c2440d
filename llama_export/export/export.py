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

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from llama_export import __version__
from llama_export._system.content import sha256_of_file
from llama_export._system.process import collector_paused, peak_rss_bytes
from llama_export.bundle.bundle import stop_token_ids, weight_record
from llama_export.bundle.destination import json_bytes, plan_destination, staged_bundle
from llama_export.bundle.estimate import estimate_export
from llama_export.bundle.manifest import (
    MANIFEST_NAME,
    MODEL_NAME,
    ONNXRUNTIME_NAME,
    SCHEMA_VERSION,
    CacheRecord,
    GraphRecord,
    IoRecord,
    Manifest,
)
from llama_export.bundle.placement import Progress, place_text_files, place_weights
from llama_export.checkpoint.checkpoint import Checkpoint, load_checkpoint, resolve_dtype
from llama_export.checkpoint.safetensors import WeightFile
from llama_export.config.decoder import count_parameters
from llama_export.config.settings import ExportConfig
from llama_export.errors import ExportError, MissingDependencyError
from llama_export.export.initializers import ONNX_DTYPE, reference_weights, retype
from llama_export.export.trace import REPORT_HINT, custom_op_counts, decoder_graph
from llama_export.graph.io import INTERFACES
from llama_export.graph.kv_cache import GRANULARITY, LAYOUT, cache_names

try:
    import onnx
    import onnx_ir as ir
    import torch

    from llama_export.export.conversion import plan_conversion, write_conversion
    from llama_export.export.embedded import check_embeddable, external_initializers, write_embedded
    from llama_export.ops.table import OP_SPECS, OPSET_VERSION, Target, function_protos, register_onnx_schemas
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err


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
                "opset": str(OPSET_VERSION),
            },
            task=task,
            model=llama,
            dtype=dtype,
            io=io_table(standard),
            rope=llama.rope,
            eos_token_ids=tuple(stop_token_ids(checkpoint)),
            ops={op: OP_SPECS[op].version for op in sorted(custom_op_counts(standard))},
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


_READERS = {
    "standard": "TensorRT, and ONNX readers of opset 24 that have kernels for {dtype}",
    "onnxruntime": "onnxruntime on a CPU, which computes it in {dtype}",
}
"""Who opens which graph. onnxruntime's CPU provider has no kernels for bfloat16, so it does not open ``standard`` then."""


def model_proto(graph: ir.Model, checkpoint: Checkpoint, dtype: str, target: Target) -> onnx.ModelProto:
    """A complete model of one dtype and target: weights by reference, function bodies added.

    Args:
        graph: from :func:`graph_from_program`; not modified.
        checkpoint: whose files the initializers point into.
        dtype: compute dtype; a weight stored otherwise gets a ``Cast`` after it.
        target: which function bodies.
    """
    model = graph.clone()
    retype(model.graph, getattr(ir.DataType, ONNX_DTYPE[dtype]))
    reference_weights(model.graph, checkpoint, getattr(ir.DataType, ONNX_DTYPE[dtype]))
    proto = ir.to_proto(model)
    del proto.functions[:]
    proto.functions.extend(function_protos(target, checkpoint.config.head_dim))
    return proto


def check_model(proto: onnx.ModelProto) -> None:
    """``onnx.checker`` with full shape inference, on a copy whose weights are inputs: no weight file is opened.

    Raises:
        ExportError: the checker refused the graph.
    """
    register_onnx_schemas()
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for item in external_initializers(copy):
        copy.graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
        copy.graph.initializer.remove(item)
    try:
        onnx.checker.check_model(copy, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportError("onnx.checker refused the exported graph", details={"reason": err}, hint=REPORT_HINT) from err


def io_table(proto: onnx.ModelProto) -> tuple[IoRecord, ...]:
    """Inputs, then outputs: name, dtype, shape (integers and symbols), and what an output may share memory with."""
    aliases = {present: past for past, present in cache_names(len(proto.graph.output) // 2)}  # none without a cache
    records: list[IoRecord] = []
    kinds: tuple[tuple[Literal["input", "output"], Any], ...] = (
        ("input", proto.graph.input),
        ("output", proto.graph.output),
    )
    for kind, values in kinds:
        for value in values:
            tensor = value.type.tensor_type
            records.append(
                IoRecord(
                    name=value.name,
                    kind=kind,
                    dtype=cast(Any, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name),
                    shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim),
                    alias_of=aliases.get(value.name) if kind == "output" else None,
                )
            )
    return tuple(records)
