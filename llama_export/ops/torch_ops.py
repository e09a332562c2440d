"""The custom ops in PyTorch: importing this defines ``torch.ops.llama_export.*``.

The reference model calls the functions below; the exporter turns each call into one ONNX node, whose meaning is the ONNX
function stored in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llama_export.ops.attention import attention_eager, attention_fake
from llama_export.ops.masked_attention import masked_attention_eager, masked_attention_fake
from llama_export.ops.rms_norm import add_rms_norm_eager, add_rms_norm_fake, rms_norm_eager, rms_norm_fake
from llama_export.ops.table import ADD_RMS_NORM, ATTENTION, DOMAIN, MASKED_ATTENTION, OP_SPECS, RMS_NORM, OpSpec

EAGER: dict[str, Callable[..., Any]] = {
    RMS_NORM.op_type: rms_norm_eager,
    ADD_RMS_NORM.op_type: add_rms_norm_eager,
    ATTENTION.op_type: attention_eager,
    MASKED_ATTENTION.op_type: masked_attention_eager,
}
"""Op -> the true result, on any device and at any float dtype."""
FAKE: dict[str, Callable[..., Any]] = {
    RMS_NORM.op_type: rms_norm_fake,
    ADD_RMS_NORM.op_type: add_rms_norm_fake,
    ATTENTION.op_type: attention_fake,
    MASKED_ATTENTION.op_type: masked_attention_fake,
}
"""Op -> shapes and dtypes only, for tracing on the meta device."""


def _define(spec: OpSpec) -> Callable[..., Any]:
    op = torch.library.custom_op(
        f"{DOMAIN}::{spec.torch_name}", EAGER[spec.op_type], mutates_args=(), schema=spec.torch_schema
    )
    op.register_fake(FAKE[spec.op_type])
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
            outputs = EAGER[spec.op_type](*inputs, *ctx.attributes)
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
