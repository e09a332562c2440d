"""A graph's weights as references into the safetensors files: offset and length, and a Cast where the dtype differs."""

from __future__ import annotations

from collections.abc import Mapping

from llama_export.checkpoint.checkpoint import Checkpoint
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.errors import ExportError, MissingDependencyError
from llama_export.export.trace import REPORT_HINT, values_of

try:
    import onnx_ir as ir

    from llama_export.export.embedded import ROTARY
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err

ONNX_DTYPE = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
_SIXTEEN_BIT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def retype(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Gives every 16-bit value and cast of the graph another float type; float32 values keep theirs."""
    for value in values_of(graph):
        if value.dtype in _SIXTEEN_BIT:
            value.type = ir.TensorType(dtype)  # a clone shares its type objects with the original
    for node in graph:
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and ir.DataType(target.as_int()) in _SIXTEEN_BIT:
            node.attributes["to"] = ir.AttrInt64("to", dtype.value)


def reference_weights(graph: ir.Graph, checkpoint: Checkpoint, dtype: ir.DataType) -> None:
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
            hint=REPORT_HINT,
        )
    order = {node: place for place, node in enumerate(graph)}
    for name, entry in checkpoint.tensors.items():
        value = graph.initializers[name]
        stored = getattr(ir.DataType, ONNX_DTYPE[entry.dtype])
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
