"""The custom ops alone, on inputs that a model rarely gives them: where a rounding in the wrong place is no longer small.

Role: what the graph in float64 cannot show, because there nothing is rounded: a softmax in float16, a norm whose interior
is not float32, products in TF32, a weight that is multiplied before the rounding instead of after it. Each op gets the
sizes and attributes of the model's own, and inputs chosen to tell: tokens as small as the root of epsilon and so large
that their square is no float16 number, scores that softmax must tell apart.

Shapes: B rows, S tokens, E hidden size, H query heads, G key/value heads, D head size, C cache slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import Tensor

from llama_export.config.llama import LlamaConfig
from llama_export.ops.table import OP_SPECS, OpSpec
from llama_export.ops.torch_ops import EAGER
from llama_export.parity.judge import BY, Measured, Validator, custom_kernels, judge_noise
from llama_export.parity.metrics import difference
from llama_export.parity.oracle.evaluator import CustomOps, GraphEvaluator
from llama_export.parity.report.result import Stage
from llama_export.parity.tensors import to_numpy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ORDER_LIMIT = 0.02
"""Share of a 16-bit norm's values that may differ from rounding first and multiplying then: float32 interiors that are
summed in another order fall on the other side of a tie now and then; another order of rounding changes one in four."""
_OFFSET = 50.0
"""Size of the second row's scores."""
OPS_WHY = (
    "PyTorch's own computation of the op at this dtype, on these inputs, against float64, is the noise floor: at most 2 x of "
    "it in relative L2 and 4 x in the maximum"
)


def op_inputs(spec: OpSpec, config: LlamaConfig, epsilon: float, seed: int) -> list[Tensor]:
    """Inputs in float64, in the op's order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if "RMSNorm" in spec.op_type:
        sizes = torch.tensor([1.0, 30.0, 300.0, 1e-2, math.sqrt(max(epsilon, 1e-12))], dtype=torch.float64)
        hidden_states = normal(len(sizes), 8, config.hidden_size) * sizes[:, None, None]
        weight = 1 + 0.2 * normal(config.hidden_size)
        residual = normal(*hidden_states.shape) * sizes[:, None, None]
        return [hidden_states, residual, weight] if spec.op_type == "LlamaAddRMSNorm" else [hidden_states, weight]
    B, S, C, D = 2, 7, 17, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    query, key, past_key = normal(B, S, H, D), normal(B, S, G, D), normal(B, G, C, D)
    angles = torch.rand(B, S, D // 2, generator=generator, dtype=torch.float64) * 6
    # The second row's scores lie around 50 and differ by a few: softmax tells the tokens apart, and eleven bits of such a
    # score do not. Its angles are 0, so that rounding after a rotation does not hide it.
    direction = normal(D)
    direction *= math.sqrt(_OFFSET * math.sqrt(D)) / direction.norm()
    for tensor in (query, key, past_key):
        tensor[1] += direction
    angles[1] = 0
    common = [query.flatten(2), key.flatten(2), normal(B, S, G * D), angles.cos(), angles.sin()]
    if spec.op_type == "LlamaMaskedAttention":
        return [*common, torch.tensor([[0] * 2 + [1] * (S - 2), [1] * S])]
    return [*common, past_key, normal(B, G, C, D), torch.tensor([2, 9])]


def _typed(spec: OpSpec, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    kinds = {"T": dtype, "float32": torch.promote_types(dtype, torch.float32), "int64": torch.int64}
    return [tensor.to(kinds[item.dtype]) for item, tensor in zip(spec.inputs, inputs, strict=True)]


def _measure(v: Validator, evaluator: GraphEvaluator, node: onnx.NodeProto, dtype: str) -> tuple[Measured, float]:
    """One op at one dtype, and how many of its values another order of rounding would explain."""
    spec = OP_SPECS[node.op_type]
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    values = [attributes[item.name] for item in spec.attributes]
    given = _typed(spec, op_inputs(spec, v.llama, float(attributes.get("epsilon", 0.0)), v.config.seed), DTYPES[dtype])
    got = evaluator.run_op(node, given)
    floor = _tuple(EAGER[spec.op_type](*given, *values))
    exact = _tuple(EAGER[spec.op_type](*_typed(spec, given, torch.float64), *values))
    name = f"{spec.op_type} {dtype}"

    def against(found: tuple[Tensor, ...]) -> Any:
        # Every row of a norm has a size of its own: relative to it, or the largest row would hide the others.
        scales = [_row_size(want) if "RMSNorm" in spec.op_type else torch.ones(()) for want in exact]
        triples = zip(spec.outputs, found, exact, scales, strict=True)
        return difference(
            [(f"{item.name} of {name}", to_numpy(left.double() / scale), to_numpy(right / scale)) for item, left, right, scale in triples]
        )  # fmt: skip

    other_order = 0.0
    if "RMSNorm" in spec.op_type and dtype != "float32":
        other_order = float((got[0] != floor[0]).double().mean())
    return Measured(name, against(got), against(floor)), other_order


def _row_size(want: Tensor) -> Tensor:
    return want.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def op_stage(how: str, functions: CustomOps | None = None) -> Callable[[Any], Stage]:
    """``bodies``: the function bodies of ``model.onnx``; ``interpreter``, ``enqueue``, ``ptx``, ``gpu``: the plugins' kernels.

    Args:
        functions: judge these instead.
    """

    def run(v: Validator) -> Stage:
        custom_ops = functions or ("bodies" if how == "bodies" else custom_kernels(how))
        by = BY.get(how, "the function bodies of model.onnx")
        measured, order = [], {}
        for dtype, torch_dtype in DTYPES.items():
            evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch_dtype, custom_ops=custom_ops)
            nodes = {node.op_type: node for node in reversed(evaluator.graph.node) if node.op_type in OP_SPECS}
            for op_type in sorted(nodes):
                one, other_order = _measure(v, evaluator, nodes[op_type], dtype)
                measured.append(one)
                order[f"{op_type}_{dtype}_other_rounding"] = other_order
        worst_order = max(order.values())
        stage = judge_noise(
            f"ops/{how}", measured, dtype=v.bundle.dtype, bundle_dtype=v.bundle.dtype, why=OPS_WHY,
            reason=f"every custom op alone at every dtype by {by}, on inputs where roundings tell", other_rounding=worst_order,
        )  # fmt: skip
        worst = max(measured, key=lambda item: item.share)
        op = worst.name.split()[0]
        if stage.verdict == "pass" and worst_order > ORDER_LIMIT:
            op = max(order, key=lambda key: order[key]).partition("_")[0]
            reason = (
                f"{worst_order:.0%} of {op}'s values are not rounded before the weight is multiplied: {stage.reason}"
            )
            stage = replace(stage, verdict="fail", reason=reason)
        if stage.verdict == "fail":
            place = {"layer": None, "op": op, "node": None, "tensor": stage.worst.tensor if stage.worst else None}
            stage = replace(stage, first_divergence=place)
        return stage

    return run
