"""``LlamaMaskedAttention`` and the gradients of all ops: the torch contract, a float64 oracle, the ONNX body."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_export.ops import table, torch_ops
from llama_export.ops.masked_attention import masked_attention_eager
from llama_export.ops.table import DOMAIN, OP_SPECS, OPSET_VERSION, TARGETS, Target

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
MASKS = {
    "none": [[1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0]],
    "nothing": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "not ones": [[0, 7, 1, -1, 0, 2]],
    "one token": [[1], [0]],
}
Arguments = tuple[Any, ...]


def arguments(
    mask: list[list[int]], dtype: torch.dtype, *, H: int = 4, G: int = 2, D: int = 16, grad: bool = False, seed: int = 0
) -> Arguments:
    """All inputs and attributes in the order of the op."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(mask), len(mask[0])

    def normal(width: int) -> torch.Tensor:
        return torch.randn(B, S, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    angles = torch.arange(S)[:, None] * torch.tensor(oracles.default_frequencies(10000, D)).expand(B, 1, D // 2)
    wide = torch.promote_types(dtype, torch.float32)
    scale = float(np.float32(1 / math.sqrt(D)))
    return (
        normal(H * D), normal(G * D), normal(G * D), angles.cos().to(wide), angles.sin().to(wide),
        torch.tensor(mask), H, G, D, scale,
    )  # fmt: skip


def oracle(call: Arguments) -> np.ndarray:
    return oracles.masked_attention(
        *(item.detach().double().numpy() if isinstance(item, torch.Tensor) else item for item in call)
    )


def check(got: Any, call: Arguments, dtype: torch.dtype) -> None:
    """Within what a few roundings of the model dtype and of float32 sums allow."""
    want = oracle(call)
    largest = float(call[2].detach().abs().max())
    unit = UNIT[dtype] + (40 * UNIT[torch.float32] if dtype != torch.float64 else 40 * UNIT[torch.float64])
    error = np.abs(np.asarray(got, np.float64) - want).max()
    # Rounded rotations move a score by about |q||k| * scale * 2u, a softmax weight by as much, relatively.
    spread = float(
        call[0].detach().double().norm(dim=-1).max() * call[1].detach().double().norm(dim=-1).max() * call[9]
    )
    assert error <= largest * unit * (4 + 4 * spread), error


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_eager_is_the_oracle(name: str, dtype: torch.dtype) -> None:
    call = arguments(MASKS[name], dtype)
    got = masked_attention_eager(*call)
    assert got.dtype == dtype
    check(got.double(), call, dtype)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_eager_is_the_oracle_at_any_shape_and_mask(data: st.DataObject) -> None:
    B, S, G, group = (data.draw(st.integers(1, top)) for top in (3, 6, 3, 3))
    row = st.lists(st.integers(0, 1), min_size=S, max_size=S)
    mask = data.draw(st.lists(row, min_size=B, max_size=B))
    call = arguments(mask, torch.float64, H=G * group, G=G, D=2 * data.draw(st.integers(1, 9)))
    np.testing.assert_allclose(masked_attention_eager(*call).numpy(), oracle(call), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["left", "nothing"])
def test_a_query_that_sees_nothing_yields_zero(name: str) -> None:
    call = arguments(MASKS[name], torch.float32)
    got = torch_ops.masked_attention(*call)
    blind = call[5].cumsum(1) == 0
    assert blind.any()
    assert torch.equal(got[blind], torch.zeros_like(got[blind]))
    assert got[~blind].abs().min() > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4], ids=str)
@pytest.mark.parametrize("name", ["left", "right", "holes"])
def test_eager_never_reads_keys_and_values_of_padding(name: str, value: float) -> None:
    call = arguments(MASKS[name], torch.float32)
    poisoned = list(call)
    for index in (1, 2):
        poisoned[index] = call[index].masked_fill((call[5] == 0).unsqueeze(-1), value)
    assert torch.equal(masked_attention_eager(*poisoned), masked_attention_eager(*call))


def test_without_padding_it_is_the_cached_op_on_an_empty_cache() -> None:
    call = arguments(MASKS["none"], torch.float64)
    query, key, value, cos, sin, mask, H, G, D, scale = call
    cache = torch.zeros(1, G, mask.shape[1], D, dtype=torch.float64)
    cached, _, _ = torch_ops.attention(
        query, key, value, cos, sin, cache, cache.clone(), torch.tensor([0]), H, G, D, scale
    )
    assert torch.equal(torch_ops.masked_attention(*call), cached)


# ---- torch contract and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_masked_attention_passes_opcheck(dtype: torch.dtype, grad: bool) -> None:
    torch.library.opcheck(torch.ops.llama_export.masked_attention.default, arguments(MASKS["left"], dtype, grad=grad))


def test_the_other_ops_pass_opcheck_with_gradients() -> None:
    x, residual, weight = (torch.randn(shape, requires_grad=True) for shape in ((3, 8), (3, 8), (8,)))
    torch.library.opcheck(torch.ops.llama_export.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.llama_export.add_rms_norm.default, (x, residual, weight, 1e-5))
    query, key, value, cos, sin, _, *attributes = arguments(MASKS["right"], torch.float32, grad=True)
    past = [torch.randn(3, 2, 9, 16, requires_grad=True) for _ in range(2)]
    lengths = torch.tensor([0, 2, 3])
    call = (query, key, value, cos, sin, *past, lengths, *attributes)
    torch.library.opcheck(torch.ops.llama_export.attention.default, call)


@pytest.mark.parametrize("name", MASKS)
def test_gradient_of_masked_attention_is_the_numerical_one(name: str) -> None:
    query, key, value, *rest = arguments(MASKS[name], torch.float64, H=2, G=1, D=4, grad=True)
    assert torch.autograd.gradcheck(lambda *qkv: torch_ops.masked_attention(*qkv, *rest), (query, key, value))


def test_gradients_of_the_other_ops_are_the_numerical_ones() -> None:
    double = {"dtype": torch.float64, "requires_grad": True}
    x, residual, weight = (torch.randn(shape, **double) for shape in ((3, 8), (3, 8), (8,)))
    assert torch.autograd.gradcheck(lambda a, w: torch_ops.rms_norm(a, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b, w: torch_ops.add_rms_norm(a, b, w, 1e-5), (x, residual, weight))
    query, key, value, cos, sin, _, *attributes = arguments(MASKS["right"], torch.float64, H=2, G=1, D=4, grad=True)
    past = [torch.randn(3, 1, 9, 4, **double) for _ in range(2)]
    lengths = torch.tensor([0, 2, 3])
    assert torch.autograd.gradcheck(
        lambda q, k, v, *cache: torch_ops.attention(q, k, v, cos, sin, *cache, lengths, *attributes),
        (query, key, value, *past),
    )


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    query, key, value, *rest = arguments(MASKS["right"], torch.float64)
    value.requires_grad_()
    torch_ops.masked_attention(query, key, value, *rest).sum().backward()
    assert value.grad is not None
    assert query.grad is None
    assert key.grad is None


# ---- the ONNX body ----------------------------------------------------------------------------------------------


def model_of(target: Target, H: int, G: int, D: int, scale: float) -> onnx.ModelProto:
    spec = OP_SPECS["LlamaMaskedAttention"]
    widths = {"query": H * D, "key": G * D, "value": G * D, "cos": D // 2, "sin": D // 2}
    make = onnx.helper.make_tensor_value_info
    inputs = [
        make("attention_mask", onnx.TensorProto.INT64, ["B", "S"])
        if item.name == "attention_mask"
        else make(item.name, onnx.TensorProto.FLOAT, ["B", "S", widths[item.name]])
        for item in spec.inputs
    ]
    node = onnx.helper.make_node(
        spec.op_type, [item.name for item in spec.inputs], ["attn_output"], domain=DOMAIN,
        num_heads=H, num_kv_heads=G, head_dim=D, scale=scale,
    )  # fmt: skip
    outputs = [make("attn_output", onnx.TensorProto.FLOAT, ["B", "S", H * D])]
    opsets = [onnx.helper.make_opsetid("", OPSET_VERSION), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph([node], "one node", inputs, outputs)
    model = onnx.helper.make_model(graph, functions=[spec.function_proto(target)], opset_imports=opsets, ir_version=11)
    table.register_onnx_schemas()
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MASKS)
def test_body_on_onnxruntime_is_the_oracle(name: str, target: Target) -> None:
    call = arguments(MASKS[name], torch.float32)
    session = onnxruntime.InferenceSession(model_of(target, *call[6:]).SerializeToString())
    names = [item.name for item in OP_SPECS["LlamaMaskedAttention"].inputs]
    (got,) = session.run(None, {key: item.numpy() for key, item in zip(names, call, strict=False)})
    check(got, call, torch.float32)
    blind = call[5].cumsum(1).numpy() == 0 if name != "not ones" else (call[5] != 0).cumsum(1).numpy() == 0
    assert not got[blind].any(), "a query that sees nothing"
