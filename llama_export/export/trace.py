"""The reference model -> an ONNX graph: trace, conversion, and stable names for nodes, values and dimensions."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

from llama_export.config.decoder import op_counts
from llama_export.config.llama import LlamaConfig, Task
from llama_export.errors import ExportError, MissingDependencyError
from llama_export.graph.io import INTERFACES, is_single_text

try:
    import onnx
    import onnx_ir as ir
    import torch

    from llama_export.export.embedded import ROTARY
    from llama_export.export.repeat import TRACED_LAYERS, repeat_last_layer
    from llama_export.model import MODEL_CLASSES, LlamaForCausalLM
    from llama_export.model.rope import rope_buffers
    from llama_export.ops.table import DOMAIN, OP_SPECS, OPSET_VERSION, register_onnx_schemas
    from llama_export.ops.torch_ops import translation_table
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err


IR_VERSION = 11
"""Of the ONNX file: the first with opset 24; onnxruntime 1.32 and TensorRT-RTX 1.7 read it."""
REPORT_HINT = "the exporter and the installed torch disagree: report it with the output of `llama-export env`"
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    register_onnx_schemas()
    with _quiet_exporter():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET_VERSION,
            optimize=False,
            verbose=False,
            custom_translation_table=translation_table(),
            input_names=INTERFACES[task].input_names(config),
            output_names=INTERFACES[task].output_names(config),
        )
    if converted is None:
        raise ExportError("torch.onnx.export returned nothing", hint=REPORT_HINT)
    model: ir.Model = converted.model
    _name_nodes(model.graph)
    _name_values(model.graph)
    _name_dimensions(model.graph, task)
    _share_tied_embedding(model.graph, config)
    for name, values in rope_buffers(config).items():
        frequencies = model.graph.initializers[ROTARY + name]
        frequencies.const_value = ir.Tensor(values.numpy(), name=frequencies.name)
    model.opset_imports[DOMAIN] = 1
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
    for value in values_of(graph):
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
        spec = OP_SPECS.get(node.op_type) if node.domain == DOMAIN else None
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
    for value in values_of(graph):
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and str(dim.value) in renamed:
                value.shape[axis] = ir.SymbolicDim(renamed[str(dim.value)])


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
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


def custom_op_counts(proto: onnx.ModelProto) -> dict[str, int]:
    """op_type -> number of nodes of our domain."""
    return dict(Counter(node.op_type for node in proto.graph.node if node.domain == DOMAIN))


def _check_counts(graph: ir.Graph, config: LlamaConfig, task: Task) -> None:
    got = dict(Counter(node.op_type for node in graph if node.domain == DOMAIN))
    if got != op_counts(config, task):
        raise ExportError(
            "the traced graph does not hold the ops the config implies",
            details={"got": got, "expected": op_counts(config, task)},
            hint="this is a bug or an untested torch version: see `llama-export env`",
        )


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
