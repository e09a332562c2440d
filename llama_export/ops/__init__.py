"""The fused ops of the exported graph, in domain ``llama_export``: one table, :data:`OP_SPECS`.

Importing this package defines ``torch.ops.llama_export.*``. The reference model calls the functions below; the
exporter turns each call into one ONNX node, whose meaning is the ONNX function stored in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llama_export.ops.attention import ATTENTION
from llama_export.ops.masked_attention import MASKED_ATTENTION
from llama_export.ops.rms_norm import ADD_RMS_NORM, RMS_NORM
from llama_export.ops.spec import DOMAIN, OPSET_VERSION, TARGETS, OpSpec, Target

__all__ = [
    "DOMAIN", "OPSET_VERSION", "OP_SPECS", "TARGETS", "OpSpec", "Target",
    "add_rms_norm", "attention", "function_protos", "masked_attention", "register_onnx_schemas", "rms_norm", "torch_overload",
    "translation_table",
]  # fmt: skip

OP_SPECS: dict[str, OpSpec] = {spec.op_type: spec for spec in (RMS_NORM, ADD_RMS_NORM, ATTENTION, MASKED_ATTENTION)}


def _define(spec: OpSpec) -> Callable[..., Any]:
    op = torch.library.custom_op(f"{DOMAIN}::{spec.torch_name}", spec.eager, mutates_args=(), schema=spec.torch_schema)
    op.register_fake(spec.fake)
    op.register_autograd(_gradients_of(spec), setup_context=_keep_inputs)
    return op


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(item for item in inputs if isinstance(item, torch.Tensor)))
    ctx.attributes = [item for item in inputs if not isinstance(item, torch.Tensor)]


def _gradients_of(spec: OpSpec) -> Callable[..., Any]:
    """The op's backward pass: the eager maths again, this time recorded, and differentiated.

    One definition of each op, so its gradient cannot disagree with it; costs a second forward, as checkpointing does.
    """

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[: len(spec.inputs)]
        with torch.enable_grad():
            inputs = [item.detach().requires_grad_(want) for item, want in zip(ctx.saved_tensors, wanted, strict=True)]
            outputs = spec.eager(*inputs, *ctx.attributes)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [item for item in inputs if item.requires_grad],
                [gradient for _, gradient in pairs],
                allow_unused=True,
            )
        results = iter(found)
        return (*(next(results) if want else None for want in wanted), *(None for _ in ctx.attributes))

    return backward


rms_norm = _define(RMS_NORM)
add_rms_norm = _define(ADD_RMS_NORM)
attention = _define(ATTENTION)
masked_attention = _define(MASKED_ATTENTION)


def torch_overload(spec: OpSpec) -> Any:
    """``torch.ops.llama_export.<name>.default``"""
    return getattr(getattr(torch.ops, DOMAIN), spec.torch_name).default


def register_onnx_schemas() -> None:
    """Makes the ops known to the ``onnx`` package of this process; safe to call again."""
    import onnx.defs

    for spec in OP_SPECS.values():
        if not onnx.defs.has(spec.op_type, DOMAIN):
            onnx.defs.register_schema(spec.onnx_schema())


def translation_table() -> dict[Any, Callable[..., Any]]:
    """torch overload -> function that emits the ONNX node, for ``torch.onnx.export``."""
    import onnxscript

    opset = onnxscript.values.Opset(DOMAIN, 1)

    def translate(spec: OpSpec) -> Callable[..., Any]:
        def emit(*arguments: Any) -> Any:
            tensors, values = arguments[: len(spec.inputs)], arguments[len(spec.inputs) :]
            attributes = {item.name: value for item, value in zip(spec.attributes, values, strict=True)}
            return getattr(opset, spec.op_type)(*tensors, **attributes)

        return emit

    return {torch_overload(spec): translate(spec) for spec in OP_SPECS.values()}


def function_protos(target: Target, head_dim: int) -> list[Any]:
    """The ``onnx.FunctionProto`` of every op for one target.

    onnxruntime's own attention operator takes a ``head_dim`` that is a multiple of 8 only. For any other the op keeps its
    standard body, whose cost grows with the capacity of the cache.
    """
    standard = {ATTENTION.op_type} if head_dim % 8 else set()
    return [spec.function_proto("standard" if name in standard else target) for name, spec in OP_SPECS.items()]
