"""What a custom op is: one :class:`OpSpec` from which every other description of it is derived.

The torch schema, the ONNX schema, the ONNX function bodies, the translation from torch to ONNX, the evaluator and the
plugin fields all read the same table, so they cannot disagree.

A *target* is a set of function bodies. ``standard`` is right for every reader and is what ``model.onnx`` stores;
``onnxruntime`` is a faster wording for our own onnxruntime session, which may use onnxruntime's own operators, domain
``com.microsoft`` (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md). Bodies are written in ONNX's text syntax
(https://github.com/onnx/onnx/blob/main/docs/Syntax.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

DOMAIN = "llama_export"
OPSET_VERSION = 24
"""Opset of the standard ops in graph and bodies: the first with TensorScatter and Attention's nonpad_kv_seqlen."""
Target = Literal["standard", "onnxruntime"]
TARGETS: tuple[Target, ...] = ("standard", "onnxruntime")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of an op."""

    name: str
    dtype: str
    """``T``: the model dtype (float32, float16, bfloat16), the same for all of them; else float32 or int64."""
    shape: str
    """For readers, e.g. ``[B, S, H*D]``."""
    alias_of: str | None = None
    """Outputs only: the input whose buffer this output may share."""


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute: always written to the node, never defaulted."""

    name: str
    type: Literal["int", "float"]
    doc: str


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One custom op. Inputs are fixed in number and order; a variant that needs another input is another op."""

    op_type: str
    """ONNX op_type in domain ``llama_export`` and plugin name; unique on its own, because parsers ignore the domain."""
    torch_name: str
    """``torch.ops.llama_export.<torch_name>``"""
    version: int
    """Raised when inputs, attributes or numerics change."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    eager: Callable[..., Any]
    """The true result, in PyTorch, on any device and at any float dtype."""
    fake: Callable[..., Any]
    """Shapes and dtypes only, for tracing on the meta device."""
    bodies: Mapping[Target, str]
    """Target -> statements of the ONNX function, in terms of the names above."""

    @property
    def torch_schema(self) -> str:
        """The schema string of the torch op."""
        arguments = [f"Tensor {tensor.name}" for tensor in self.inputs]
        arguments += [f"{attribute.type} {attribute.name}" for attribute in self.attributes]
        returns = ["Tensor"] * len(self.outputs)
        return f"({', '.join(arguments)}) -> {returns[0] if len(returns) == 1 else '(' + ', '.join(returns) + ')'}"

    def onnx_schema(self) -> Any:
        """The ``onnx.defs.OpSchema``; without one the exporter and the checker refuse the node."""
        from onnx.defs import OpSchema

        kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
        types = {"T": "T", "float32": "tensor(float)", "int64": "tensor(int64)"}
        return OpSchema(
            self.op_type,
            DOMAIN,
            self.version,
            inputs=[OpSchema.FormalParameter(tensor.name, types[tensor.dtype]) for tensor in self.inputs],
            outputs=[OpSchema.FormalParameter(tensor.name, types[tensor.dtype]) for tensor in self.outputs],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "the model dtype")],
            attributes=[
                OpSchema.Attribute(item.name, kinds[item.type], item.doc, required=True) for item in self.attributes
            ],
        )

    def function_proto(self, target: Target) -> Any:
        """The ``onnx.FunctionProto`` of one target."""
        from onnx import parser

        attributes = ", ".join(item.name for item in self.attributes)
        inputs = ", ".join(tensor.name for tensor in self.inputs)
        outputs = ", ".join(tensor.name for tensor in self.outputs)
        imports = f'"" : {OPSET_VERSION}' + (', "com.microsoft" : 1' if "com.microsoft." in self.bodies[target] else "")
        return parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: [{imports}]>\n'
            f"{self.op_type} <{attributes}> ({inputs}) => ({outputs})\n{{\n{self.bodies[target]}\n}}"
        )
