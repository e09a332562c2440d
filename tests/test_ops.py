"""The custom ops: torch contract, eager maths against float64 oracles, bodies against eager, one table for all."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime_operators import reference_evaluator

from llama_export.bundle.bundle import Bundle
from llama_export.ops import table, torch_ops
from llama_export.ops.attention import attention_eager
from llama_export.ops.rms_norm import add_rms_norm_eager, rms_norm_eager
from llama_export.ops.table import DOMAIN, OP_SPECS, OPSET_VERSION, TARGETS, OpSpec, Target
from llama_export.ops.torch_ops import EAGER, FAKE
from llama_export.parity.oracle.evaluator import GraphEvaluator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place of 1.0: the relative error of one rounding."""
UNDERFLOW = 2.0**-25
"""Half of float16's smallest number: the absolute error of one rounding near zero."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- attention cases --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One attention problem; ``past`` holds the valid length of every row."""

    S: int
    H: int
    G: int
    D: int
    C: int
    past: tuple[int, ...]
    layout: str = "contiguous"

    @property
    def tag(self) -> str:
        past = ",".join(map(str, self.past))
        return f"S{self.S}-H{self.H}-G{self.G}-D{self.D}-C{self.C}-past{past}-{self.layout}"

    @property
    def attributes(self) -> dict[str, Any]:
        scale = float(np.float32(1 / math.sqrt(self.D)))
        return {"num_heads": self.H, "num_kv_heads": self.G, "head_dim": self.D, "scale": scale}


CASES = [
    Case(S=1, H=4, G=1, D=16, C=9, past=(0,)),
    Case(S=7, H=4, G=4, D=16, C=16, past=(0, 0, 0)),
    Case(S=1, H=6, G=3, D=64, C=12, past=(5, 0, 11)),
    Case(S=7, H=6, G=2, D=80, C=19, past=(12, 3, 0)),
    Case(S=7, H=2, G=1, D=16, C=7, past=(0,)),
    Case(S=1, H=4, G=2, D=64, C=5, past=(4,)),
    Case(S=7, H=6, G=3, D=16, C=16, past=(2, 9, 0), layout="one projection"),
    Case(S=7, H=4, G=2, D=64, C=16, past=(2, 9, 0), layout="batch second"),
    Case(S=1, H=4, G=2, D=16, C=16, past=(2, 15), layout="token-major cache"),
    Case(S=7, H=4, G=2, D=16, C=16, past=(2, 9), layout="token-major cache"),
]


def attention_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs in the order of the op; the cache is random (and finite) beyond the valid length too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    B, S, H, G, D, C = len(case.past), case.S, case.H, case.G, case.D, case.C
    past_length = torch.tensor(case.past)
    positions = past_length[:, None] + torch.arange(S)
    angles = positions[..., None] * torch.tensor(oracles.default_frequencies(10000, D))
    query, key, value = normal(B, S, H * D), normal(B, S, G * D), normal(B, S, G * D)
    past_key, past_value = normal(B, G, C, D), normal(B, G, C, D)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if case.layout == "one projection":  # three slices of one matrix product
        query, key, value = torch.cat((query, key, value), -1).split((H * D, G * D, G * D), -1)
    elif case.layout == "batch second":
        query, key, value = (item.transpose(0, 1).contiguous().transpose(0, 1) for item in (query, key, value))
    elif case.layout == "token-major cache":
        past_key, past_value = (item.transpose(1, 2).contiguous().transpose(1, 2) for item in (past_key, past_value))
    names = [tensor.name for tensor in OP_SPECS["LlamaAttention"].inputs]
    tensors = (query, key, value, angles.cos().to(wide), angles.sin().to(wide), past_key, past_value, past_length)
    return dict(zip(names, tensors, strict=True))


def wide_arrays(inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Every input as NumPy, floats in float64: exact, whatever the dtype."""
    return {name: (item.double() if item.is_floating_point() else item).numpy() for name, item in inputs.items()}


def check_attention(
    case: Case, dtype: torch.dtype, got: tuple[Any, Any, Any], inputs: Mapping[str, torch.Tensor]
) -> None:
    """Against the oracle, within a bound that follows from the roundings of the op's docstring.

    A rotated key or query carries one rounding (u) and float32 arithmetic (w). A score then is off by at most
    delta = scale |q| |k| (2u + (D + 8) w), a softmax weight by a factor of e^(2 delta), and the output by one more u.
    """
    arrays = wide_arrays(inputs)
    want, want_key, want_value = oracles.attention(**arrays, **case.attributes)
    output, key, value = (
        np.asarray(item.double() if isinstance(item, torch.Tensor) else item, np.float64) for item in got
    )
    u, w = UNIT[dtype], max(UNIT[torch.float32] if dtype != torch.float64 else 0.0, UNIT[torch.float64])
    np.testing.assert_array_equal(value, want_value, err_msg=f"{case.tag}: values are copied, not computed")
    largest_pair = np.hypot(*np.split(want_key, 2, -1))
    key_bound = np.concatenate([largest_pair, largest_pair], -1) * (u + 4 * w) + UNDERFLOW * (dtype == torch.float16)
    assert (np.abs(key - want_key) <= key_bound).all(), f"{case.tag}: keys off by {np.abs(key - want_key).max():.3g}"

    q_norm = np.linalg.norm(arrays["query"].reshape(len(case.past), case.S, case.H, case.D), axis=-1).max()
    k_norm = np.linalg.norm(want_key, axis=-1).max()
    delta = case.attributes["scale"] * q_norm * k_norm * (2 * u + (case.D + 8) * w)
    largest = np.abs(want_value).max()
    bound = largest * (math.expm1(2 * delta) + (case.C + 8) * w + u)
    error = np.abs(output - want).max()
    assert error <= bound, f"{case.tag} {dtype}: off by {error:.3g}, allowed {bound:.3g}"


# ---- the torch contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.tag)
def test_attention_passes_opcheck(case: Case, dtype: torch.dtype) -> None:
    arguments = (*attention_inputs(case, dtype).values(), *case.attributes.values())
    torch.library.opcheck(torch.ops.llama_export.attention.default, arguments)


NORM_SHAPES = [(1, 1, 8), (3, 7, 72), (1, 768), (5125,)]


def norm_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states, residual, weight"""
    generator = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if strided:
        x = torch.stack((x, x), -1)[..., 0]
        residual = residual.transpose(0, -1).contiguous().transpose(0, -1)
    return x, residual, (1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norms_pass_opcheck(shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    x, residual, weight = norm_inputs(shape, dtype, strided)
    torch.library.opcheck(torch.ops.llama_export.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.llama_export.add_rms_norm.default, (x, residual, weight, 1e-5))


def test_attention_leaves_its_inputs_alone() -> None:
    inputs = attention_inputs(CASES[3], torch.float32)
    before = {name: item.clone() for name, item in inputs.items()}
    torch_ops.attention(*inputs.values(), *CASES[3].attributes.values())
    changed = [name for name, item in inputs.items() if not torch.equal(item, before[name])]
    assert not changed


# ---- eager against the oracles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.tag)
def test_attention_eager_is_the_oracle_up_to_its_roundings(case: Case, dtype: torch.dtype) -> None:
    inputs = attention_inputs(case, dtype, seed=1)
    got = attention_eager(*inputs.values(), **case.attributes)
    assert {item.dtype for item in got} == {dtype}
    check_attention(case, dtype, got, inputs)


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    G, group, B, S = (draw(st.integers(1, top)) for top in (3, 3, 3, 5))
    C = draw(st.integers(S, S + 6))
    past = tuple(draw(st.lists(st.integers(0, C - S), min_size=B, max_size=B)))
    return Case(S=S, H=G * group, G=G, D=2 * draw(st.integers(1, 9)), C=C, past=past)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(attention_cases(), st.sampled_from((*DTYPES, torch.float64)))
def test_attention_eager_is_the_oracle_at_any_shape(case: Case, dtype: torch.dtype) -> None:
    inputs = attention_inputs(case, dtype, seed=2)
    check_attention(case, dtype, attention_eager(*inputs.values(), **case.attributes), inputs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm_eager_is_the_oracle_up_to_two_roundings(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, _, weight = norm_inputs(shape, dtype)
    got = rms_norm_eager(x, weight, 1e-5)
    assert got.dtype == dtype
    want = oracles.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-5)
    w = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    bound = np.abs(want) * (2 * UNIT[dtype] + 16 * w) * 1.01 + 4 * UNDERFLOW * (dtype == torch.float16)
    error = np.abs(got.double().numpy() - want)
    assert (error <= bound).all(), f"off by up to {(error / bound).max():.2f} of the bound"


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.integers(1, 4), max_size=2), st.integers(1, 65), st.sampled_from(DTYPES))
def test_add_rms_norm_is_add_then_rms_norm(lead: list[int], width: int, dtype: torch.dtype) -> None:
    x, residual, weight = norm_inputs((*lead, width), dtype)
    normed, new_residual = torch_ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, x + residual)
    assert torch.equal(normed, torch_ops.rms_norm(x + residual, weight, 1e-5))


EXTREMES = {
    "zeros": lambda x: x * 0,
    "one huge outlier": lambda x: x.index_fill(-1, torch.tensor([5]), 3e4),
    "large rows": lambda x: x * 1e4,
    "tiny rows": lambda x: x * 1e-4,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_rms_norm_of_extreme_rows_stays_finite_and_right(extreme: str, dtype: torch.dtype) -> None:
    x, _, weight = norm_inputs((3, 72), dtype)
    x = EXTREMES[extreme](x)
    got = rms_norm_eager(x, weight, 1e-5).double().numpy()
    want = oracles.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-5)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=2.1 * UNIT[dtype] + 1e-6, atol=2.0**-24)


@pytest.mark.parametrize("op", ["rms_norm", "attention"])
def test_float64_stays_float64_inside(op: str) -> None:
    """One float32 step anywhere would show as 1e-8."""
    if op == "rms_norm":
        x, _, weight = norm_inputs((3, 72), torch.float64)
        got, want = rms_norm_eager(x, weight, 1e-5), oracles.rms_norm(x.numpy(), weight.numpy(), 1e-5)
    else:
        case = CASES[3]
        inputs = attention_inputs(case, torch.float64)
        got = attention_eager(*inputs.values(), **case.attributes)[0]
        want = oracles.attention(**wide_arrays(inputs), **case.attributes)[0]
    assert got.dtype == torch.float64
    error = np.abs(got.numpy() - want).max()
    assert error < 1e-13, error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_rms_norm_rounds_before_the_weight_as_hugging_face_does(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _, weight = norm_inputs((64, 72), dtype)
    theirs = LlamaRMSNorm(72, eps=1e-5)
    theirs.weight.data = weight
    got = torch_ops.rms_norm(x, weight, 1e-5)
    assert torch.equal(got, theirs(x)), "not bit-equal to Hugging Face's LlamaRMSNorm"
    wide = x.float()
    rounded_once = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.float()).to(dtype)
    differ = int((got != rounded_once).sum())
    assert differ > 100, f"only {differ} elements tell the two orders apart: the test shows nothing"


def test_add_rms_norm_normalises_the_rounded_sum() -> None:
    # 256 + 1 is not a bfloat16: the sum that is normalised must be the 256 that new_residual reports
    x, residual = torch.tensor([256.0, 1.0]).bfloat16(), torch.tensor([1.0, 1.0]).bfloat16()
    normed, new_residual = add_rms_norm_eager(x, residual, torch.ones(2).bfloat16(), 1e-5)
    assert new_residual.tolist() == [256.0, 2.0]
    assert torch.equal(normed, rms_norm_eager(torch.tensor([256.0, 2.0]).bfloat16(), torch.ones(2).bfloat16(), 1e-5))


# ---- what a query may see ---------------------------------------------------------------------------------------


def poison(inputs: Mapping[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    """A copy whose cache holds ``value`` at and past every row's valid length."""
    poisoned = dict(inputs)
    for name in ("past_key", "past_value"):
        cache = inputs[name].clone()
        for row, length in enumerate(inputs["past_length"].tolist()):
            cache[row, :, length:] = value
        poisoned[name] = cache
    return poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.tag)
def test_eager_never_reads_the_cache_past_its_valid_length(case: Case, dtype: torch.dtype, value: float) -> None:
    inputs = attention_inputs(case, dtype)
    clean, got = (attention_eager(*item.values(), **case.attributes) for item in (inputs, poison(inputs, value)))
    assert torch.equal(got[0], clean[0]), f"{case.tag}: {value} past the end changed the output"
    for row, length in enumerate(case.past):
        valid = length + case.S
        assert torch.equal(got[1][row, :, :valid], clean[1][row, :, :valid])
        assert torch.equal(got[2][row, :, :valid], clean[2][row, :, :valid])


def test_a_token_does_not_see_the_tokens_after_it() -> None:
    case = Case(S=5, H=4, G=2, D=16, C=12, past=(3, 0))
    inputs = attention_inputs(case, torch.float32)
    full = attention_eager(*inputs.values(), **case.attributes)[0]
    for cut in range(1, 5):
        changed = {name: item.clone() for name, item in inputs.items()}
        for name in ("query", "key", "value"):
            changed[name][:, cut:] = 77.0
        got = attention_eager(*changed.values(), **case.attributes)[0]
        assert torch.equal(got[:, :cut], full[:, :cut]), f"tokens from {cut} on changed an earlier one"
        assert not torch.equal(got[:, cut:], full[:, cut:])


def test_a_token_sees_all_tokens_before_it_and_itself() -> None:
    """Every visible value has weight > 0: a change of any one of them changes the output."""
    case = Case(S=2, H=2, G=1, D=16, C=8, past=(4,))
    inputs = attention_inputs(case, torch.float64)
    base = attention_eager(*inputs.values(), **case.attributes)[0]
    for slot in range(4):
        changed = {**inputs, "past_value": inputs["past_value"].clone()}
        changed["past_value"][0, 0, slot] += 1
        moved = (attention_eager(*changed.values(), **case.attributes)[0] - base).abs().amin(-1)
        assert (moved > 1e-6).all(), f"slot {slot} is not seen: moved {moved.tolist()}"


EMPTY_ROWS = {
    "mask": (["q", "k", "v", "mask"], {"is_causal": 0}, np.array([[[[False] * 8, [True] + [False] * 7]]])),
    # one valid key for two queries: causality, aligned to the end, puts the first query before the first key
    "valid length": (["q", "k", "v", "", "", "", "n"], {"is_causal": 1}, np.array([1])),
}


@pytest.mark.parametrize("kind", EMPTY_ROWS)
def test_a_query_that_sees_nothing_yields_zero(kind: str, tmp_path: Path) -> None:
    """Our op always sees its own token, so this is asked of the Attention node that its bodies rely on."""
    inputs, attributes, extra = EMPTY_ROWS[kind]
    rng = np.random.default_rng(5)
    feeds = {
        name: rng.standard_normal(shape, np.float32) for name, shape in (("q", (1, 2, 2, 16)), ("k", (1, 1, 8, 16)))
    }
    feeds |= {"v": rng.standard_normal((1, 1, 8, 16), np.float32), inputs[-1]: extra}
    node = onnx.helper.make_node("Attention", inputs, ["out"], scale=0.25, **attributes)
    types = {"mask": onnx.TensorProto.BOOL, "n": onnx.TensorProto.INT64}
    infos = [
        onnx.helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.FLOAT), array.shape)
        for name, array in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, (1, 2, 2, 16))
    graph = onnx.helper.make_graph([node], "one_node", infos, [output])
    opsets = [onnx.helper.make_opsetid("", OPSET_VERSION)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "one.onnx")

    evaluator = GraphEvaluator(tmp_path / "one.onnx")
    ours = evaluator.run({name: torch.from_numpy(array) for name, array in feeds.items()})["out"].numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), providers=["CPUExecutionProvider"])
    for got in (ours, session.run(None, feeds)[0]):
        assert (got[0, :, 0] == 0).all(), got[0, :, 0]
        np.testing.assert_allclose(got[0, :, 1], np.stack([feeds["v"][0, 0, 0]] * 2), rtol=0, atol=1e-6)


# ---- function bodies --------------------------------------------------------------------------------------------


def one_node_model(spec: OpSpec, target: Target, attributes: Mapping[str, Any]) -> onnx.ModelProto:
    """A float32 model of one node of our domain and the bodies of one target; all shapes dynamic."""
    table.register_onnx_schemas()
    kinds = {"T": onnx.TensorProto.FLOAT, "float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    node = onnx.helper.make_node(
        spec.op_type,
        [item.name for item in spec.inputs],
        [item.name for item in spec.outputs],
        domain=DOMAIN,
        **attributes,
    )

    def shape(text: str) -> list[str] | None:
        return None if ".." in text else [f"dim {part}" for part in text.strip("[]").split(", ")]

    graph = onnx.helper.make_graph(
        [node],
        "one_node",
        [onnx.helper.make_tensor_value_info(item.name, kinds[item.dtype], shape(item.shape)) for item in spec.inputs],
        [onnx.helper.make_tensor_value_info(item.name, kinds[item.dtype], None) for item in spec.outputs],
    )
    return onnx.helper.make_model(
        graph,
        functions=table.function_protos(target, 16),
        opset_imports=[onnx.helper.make_opsetid("", OPSET_VERSION), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=11,
    )


def run_in_place(model: onnx.ModelProto) -> Callable[..., list[np.ndarray]]:
    """onnxruntime as our session uses it: past and present are one buffer."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(wanted: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        binding = session.io_binding()
        arrays = {name: np.ascontiguousarray(array).copy() for name, array in feeds.items()}
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        outputs = {}
        for item in session.get_outputs():
            shared = arrays.get(item.name.replace("present", "past"))
            if shared is None:
                binding.bind_output(item.name, "cpu")
            else:
                binding.bind_output(item.name, "cpu", 0, shared.dtype, shared.shape, shared.ctypes.data)
            outputs[item.name] = shared
        session.run_with_iobinding(binding)
        found = zip(outputs, binding.get_outputs(), strict=True)
        results = {name: value.numpy() if outputs[name] is None else outputs[name] for name, value in found}
        return [results[name] for name in (wanted or outputs)]

    return run


RUNNERS = {
    "onnxruntime": run_in_place,
    "onnx reference": lambda model: reference_evaluator(model).run,
}


def run_case(
    run: Any, wanted: Sequence[str] | None, case: Case, target: Target, inputs: Mapping[str, torch.Tensor]
) -> list[np.ndarray]:
    """As the session does: GroupQueryAttention takes several new tokens after a past for one row at a time only."""
    feeds = {name: item.numpy() for name, item in inputs.items()}
    if target != "onnxruntime" or case.S == 1 or not any(case.past):
        return run(wanted, feeds)
    rows = [run(wanted, {name: array[row : row + 1] for name, array in feeds.items()}) for row in range(len(case.past))]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op_type", ["LlamaRMSNorm", "LlamaAddRMSNorm"])
def test_norm_bodies_equal_eager(op_type: str, target: Target, runner: str) -> None:
    spec = OP_SPECS[op_type]
    x, residual, weight = norm_inputs((3, 7, 72), torch.float32)
    tensors = {"hidden_states": x, "residual": residual, "weight": weight}
    inputs = {item.name: tensors[item.name] for item in spec.inputs}
    run = RUNNERS[runner](one_node_model(spec, target, {"epsilon": 1e-3}))
    got = run(None, {name: item.numpy() for name, item in inputs.items()})
    want = EAGER[spec.op_type](*inputs.values(), float(np.float32(1e-3)))
    for name, left, right in zip(spec.outputs, got, want if isinstance(want, tuple) else (want,), strict=True):
        np.testing.assert_allclose(left, right.numpy(), rtol=2e-6, atol=1e-7, err_msg=name.name)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.tag)
def test_attention_bodies_equal_eager(case: Case, target: Target, runner: str) -> None:
    """Ragged ``past_length`` and chunks of several tokens included."""
    spec = OP_SPECS["LlamaAttention"]
    inputs = attention_inputs(case, torch.float32)
    run = RUNNERS[runner](one_node_model(spec, target, case.attributes))
    got = run_case(run, None, case, target, inputs)
    want = attention_eager(*inputs.values(), **case.attributes)
    for name, left, right in zip(spec.outputs, got, want, strict=True):
        error = np.abs(left - right.numpy()).max()
        assert error <= 2e-6 * np.abs(right.numpy()).max(), f"{case.tag} {name.name}: off by {error:.3g}"
    check_attention(case, torch.float32, tuple(got), inputs)


@pytest.mark.parametrize("value", [1e3, -1e3])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.tag)
def test_bodies_do_not_feel_finite_poison_past_the_valid_length(case: Case, target: Target, value: float) -> None:
    spec = OP_SPECS["LlamaAttention"]
    inputs = attention_inputs(case, torch.float32)
    run = RUNNERS["onnxruntime"](one_node_model(spec, target, case.attributes))
    clean, got = (
        run_case(run, ["attn_output"], case, target, feeds)[0] for feeds in (poison(inputs, 0.0), poison(inputs, value))
    )
    error = np.abs(got - clean).max()
    assert error <= 1e-6 * np.abs(clean).max(), f"{case.tag}: {value} past the end moved the output by {error:.3g}"


# ---- one table --------------------------------------------------------------------------------------------------

SPECS = [pytest.param(spec, id=spec.op_type) for spec in OP_SPECS.values()]


@pytest.mark.parametrize("spec", SPECS)
def test_torch_schema_is_the_table(spec: OpSpec) -> None:
    schema = torch_ops.torch_overload(spec)._schema
    assert schema.name == f"{DOMAIN}::{spec.torch_name}"
    kinds = {"int": "int", "float": "float"}
    expected = [(item.name, "Tensor") for item in spec.inputs] + [
        (item.name, kinds[item.type]) for item in spec.attributes
    ]
    assert [(item.name, str(item.type)) for item in schema.arguments] == expected
    assert [str(item.type) for item in schema.returns] == ["Tensor"] * len(spec.outputs)
    assert not any(item.has_default_value() for item in schema.arguments), "a default would be a second source"
    for function in (EAGER[spec.op_type], FAKE[spec.op_type]):
        assert list(inspect.signature(function).parameters) == [name for name, _ in expected], function.__name__


@pytest.mark.parametrize("spec", SPECS)
def test_onnx_schema_is_the_table_and_has_nothing_optional(spec: OpSpec) -> None:
    table.register_onnx_schemas()
    table.register_onnx_schemas()  # a second call is harmless
    schema = onnx.defs.get_schema(spec.op_type, spec.version, DOMAIN)
    types = {"T": "T", "float32": "tensor(float)", "int64": "tensor(int64)"}
    for formal, stated in ((schema.inputs, spec.inputs), (schema.outputs, spec.outputs)):
        assert [(item.name, item.type_str) for item in formal] == [(item.name, types[item.dtype]) for item in stated]
        assert {item.option for item in formal} == {onnx.defs.OpSchema.FormalParameterOption.Single}
    assert (schema.min_input, schema.max_input) == (len(spec.inputs), len(spec.inputs))
    assert (schema.min_output, schema.max_output) == (len(spec.outputs), len(spec.outputs))
    kinds = {"int": onnx.defs.OpSchema.AttrType.INT, "float": onnx.defs.OpSchema.AttrType.FLOAT}
    found = {name: (item.type, item.required) for name, item in schema.attributes.items()}
    assert found == {item.name: (kinds[item.type], True) for item in spec.attributes}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", SPECS)
def test_function_body_is_the_table_and_uses_all_of_it(spec: OpSpec, target: Target) -> None:
    body = spec.function_proto(target)
    assert (body.domain, body.name) == (DOMAIN, spec.op_type)
    assert list(body.input) == [item.name for item in spec.inputs]
    assert list(body.output) == [item.name for item in spec.outputs]
    assert list(body.attribute) == [item.name for item in spec.attributes]
    assert not body.attribute_proto, "a default in the body would be a second source"
    kinds = {"int": onnx.AttributeProto.INT, "float": onnx.AttributeProto.FLOAT}
    used = {item.ref_attr_name: item.type for node in body.node for item in node.attribute if item.ref_attr_name}
    assert used == {item.name: kinds[item.type] for item in spec.attributes}
    read = {name for node in body.node for name in node.input}
    assert {item.name for item in spec.inputs} <= read, "an input the body ignores"
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    casts = {item.i for node in body.node if node.op_type == "Cast" for item in node.attribute}
    assert not casts & floats, "Cast(to=...) fixes the model's type: use CastLike"


def test_aliases_name_an_input_of_the_same_shape_and_type() -> None:
    for spec in OP_SPECS.values():
        inputs = {item.name: item for item in spec.inputs}
        assert not any(item.alias_of for item in spec.inputs)
        for item in spec.outputs:
            if item.alias_of:
                past = inputs[item.alias_of]
                assert (past.dtype, past.shape) == (item.dtype, item.shape), item.name
    attention = OP_SPECS["LlamaAttention"]
    assert [item.alias_of for item in attention.outputs] == [None, "past_key", "past_value"]


def test_standard_bodies_are_standard() -> None:
    """onnxruntime's own operators stand in its own target alone."""
    for spec in OP_SPECS.values():
        assert {node.domain for node in spec.function_proto("standard").node} == {""}
    own = {
        op
        for op, spec in OP_SPECS.items()
        if "com.microsoft" in {n.domain for n in spec.function_proto("onnxruntime").node}
    }
    assert own == {"LlamaAddRMSNorm", "LlamaAttention"}
    # TensorRT's parser drops nonpad_kv_seqlen in silence: the pair with is_causal must never be in the standard body
    standard = OP_SPECS["LlamaAttention"].function_proto("standard")
    (node,) = [node for node in standard.node if node.op_type == "Attention"]
    assert len(node.input) == 4
    assert {item.name: item.i for item in node.attribute if item.name == "is_causal"} == {"is_causal": 0}


@pytest.mark.parametrize("file", ["model_path", "onnxruntime_path"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exported_nodes_have_exactly_the_attributes_of_the_table(
    tiny_bundles: dict[str, Bundle], dtype: str, file: str
) -> None:
    bundle = tiny_bundles[dtype]
    path: Path = getattr(bundle, file)
    model = onnx.load(str(path), load_external_data=False)
    config = bundle.config
    values = {
        "num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "scale": config.softmax_scale, "epsilon": float(np.float32(config.rms_norm_eps)),
    }  # fmt: skip
    seen = set()
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        spec = OP_SPECS[node.op_type]
        seen.add(node.op_type)
        found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        assert found == {item.name: values[item.name] for item in spec.attributes}, node.name
        kinds = {"int": onnx.AttributeProto.INT, "float": onnx.AttributeProto.FLOAT}
        assert {item.name: item.type for item in node.attribute} == {
            item.name: kinds[item.type] for item in spec.attributes
        }
        assert len(node.input) == len(spec.inputs)
        assert all(node.input), f"{node.name} leaves an input out"
        assert len(node.output) == len(spec.outputs)
    assert seen == {"LlamaRMSNorm", "LlamaAddRMSNorm", "LlamaAttention"}
