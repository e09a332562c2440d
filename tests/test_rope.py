"""The six RoPE types are transformers' own: the same float32 frequencies bit by bit, the same cos and sin.

dynamic and longrope are compared with a fresh instance at batch 1, because transformers takes the longest row of a batch
for all of them and dynamic ones remember an earlier call.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import patient

from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import LlamaConfig
from llama_export.model.rope import LlamaRotaryEmbedding, attention_scaling, inverse_frequencies, rope_buffers

transformers = pytest.importorskip("transformers")
from transformers.models.llama import modeling_llama as theirs  # noqa: E402

Settings = dict[str, Any]
MAX = 64
"""max_position_embeddings"""


def shape(head_dim: int) -> Settings:
    return {
        "vocab_size": 8, "hidden_size": 4 * head_dim, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 4, "head_dim": head_dim, "max_position_embeddings": MAX,
    }  # fmt: skip


def our_config(head_dim: int, rope: Settings) -> LlamaConfig:
    return config_from_dict({"model_type": "llama", **shape(head_dim), "rope_parameters": rope})


def ours(head_dim: int, rope: Settings, dtype: torch.dtype = torch.float32) -> LlamaRotaryEmbedding:
    module = LlamaRotaryEmbedding(our_config(head_dim, rope))
    module.set_frequencies(dtype)
    return module


def hugging_face(head_dim: int, rope: Settings) -> Any:
    """A fresh instance; transformers modifies the dictionary it is given."""
    return theirs.LlamaRotaryEmbedding(transformers.LlamaConfig(**shape(head_dim), rope_parameters=dict(rope)))


def positions(length: int) -> torch.Tensor:
    return torch.arange(length).unsqueeze(0)


# Numbers that people write: a float32 holds them or it does not.
thetas = st.sampled_from([500.0, 10000.0, 123456.7, 500000.0, 1e6, 8e6, 1e10]) | st.floats(2.0, 1e9)
factors = st.sampled_from([1.0, 2, 4.0, 8.0, 1.1, 3.7, 32.0]) | st.floats(1.0, 64.0)
contexts = st.integers(2, 4 * MAX)
amounts = st.floats(0.1, 4.0)


@st.composite
def settings_of(draw: st.DrawFn, rope_type: str, head_dim: int) -> Settings:
    """Settings of one type, optional ones present or not."""
    rope: Settings = {"rope_type": rope_type, "rope_theta": draw(thetas)}
    if rope_type in ("linear", "dynamic", "llama3", "yarn"):
        rope["factor"] = draw(factors)
    if rope_type in ("yarn", "longrope") and draw(st.booleans()):
        rope["original_max_position_embeddings"] = draw(contexts)
    if rope_type == "llama3":
        low = draw(amounts)
        rope |= {
            "low_freq_factor": low,
            "high_freq_factor": low + draw(amounts),
            "original_max_position_embeddings": draw(contexts),
        }
    if rope_type == "yarn":
        rope |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "beta_slow": st.floats(0.1, 4.0),
                    "beta_fast": st.floats(4.0, 64.0),
                    "truncate": st.booleans(),
                },
            )
        )
        rope |= draw(
            st.fixed_dictionaries({})
            | st.fixed_dictionaries({"attention_factor": amounts})
            | st.fixed_dictionaries({"mscale": amounts, "mscale_all_dim": amounts})
        )
    if rope_type == "longrope":
        divisors = st.lists(st.floats(0.5, 50.0), min_size=head_dim // 2, max_size=head_dim // 2)
        rope |= {"short_factor": draw(divisors), "long_factor": draw(divisors)}
        rope |= draw(
            st.fixed_dictionaries({})
            | st.fixed_dictionaries({"attention_factor": amounts})
            | st.fixed_dictionaries({"factor": factors})
        )
    return rope


TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
head_dims = st.sampled_from([4, 6, 16, 64, 80, 128])
dims_and_settings = head_dims.flatmap(
    lambda head_dim: st.tuples(
        st.just(head_dim), st.sampled_from(TYPES).flatmap(lambda name: settings_of(name, head_dim))
    )
)


# ---- float32 ----------------------------------------------------------------------------------------------------


@patient
@given(dims_and_settings)
def test_frequencies_and_scaling_are_bit_equal(case: tuple[int, Settings]) -> None:
    head_dim, rope = case
    config, want = our_config(head_dim, rope), hugging_face(head_dim, rope)
    buffers = rope_buffers(config)
    assert set(buffers) == ({"inv_freq", "long_inv_freq"} if rope["rope_type"] == "longrope" else {"inv_freq"})
    assert all(values.dtype == torch.float32 and values.shape == (head_dim // 2,) for values in buffers.values())
    assert torch.equal(buffers["inv_freq"], want.inv_freq), rope
    assert attention_scaling(config) == want.attention_scaling
    if "long_inv_freq" in buffers:
        want(torch.zeros(1), positions(config.rope.original_max_position_embeddings + 1))
        assert torch.equal(buffers["long_inv_freq"], want.inv_freq), rope


@patient
@given(dims_and_settings, st.integers(1, 4 * MAX + 2))
def test_cos_and_sin_are_those_of_a_fresh_instance(case: tuple[int, Settings], length: int) -> None:
    head_dim, rope = case
    cos, sin = ours(head_dim, rope)(positions(length), torch.tensor([length]))
    want_cos, want_sin = hugging_face(head_dim, rope)(torch.zeros(1), positions(length))
    assert cos.shape == sin.shape == (1, length, head_dim // 2)
    # transformers repeats every angle for the second half of the head.
    for got, want in ((cos, want_cos), (sin, want_sin)):
        np.testing.assert_allclose(got, want[..., : head_dim // 2], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(want[..., : head_dim // 2], want[..., head_dim // 2 :])


@pytest.mark.parametrize("length", [MAX - 1, MAX, MAX + 1, MAX + 2, 4 * MAX, 100_000])
@pytest.mark.parametrize("factor", [2, 2.0, 3.7, 1.0])
@pytest.mark.parametrize("head_dim", [4, 64, 128])
def test_dynamic_switches_beyond_the_longest_position(head_dim: int, factor: float, length: int) -> None:
    rope = {"rope_type": "dynamic", "factor": factor, "rope_theta": 10000.0}
    module, fresh = ours(head_dim, rope), hugging_face(head_dim, rope)
    last = torch.tensor([[length - 1]])
    cos, sin = module(last, torch.tensor([length]))
    want_cos, want_sin = fresh(torch.zeros(1), last)
    assert torch.equal(cos, want_cos[..., : head_dim // 2])
    assert torch.equal(sin, want_sin[..., : head_dim // 2])
    changed = not torch.equal(fresh.inv_freq, module.inv_freq)
    assert changed == (length > MAX)  # with a factor of 1, too


@pytest.mark.parametrize(
    ("length", "is_long"), [(1, False), (31, False), (32, False), (33, True), (64, True), (99, True)]
)
def test_longrope_switches_beyond_the_original_context(length: int, is_long: bool) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 8.0],
    }  # fmt: skip
    module, fresh = ours(6, rope), hugging_face(6, rope)
    cos, _ = module(positions(length), torch.tensor([length]))
    want, _ = fresh(torch.zeros(1), positions(length))
    assert torch.equal(cos, want[..., :3])
    assert torch.equal(fresh.inv_freq, module.long_inv_freq if is_long else module.inv_freq)


@pytest.mark.parametrize("rope_type", TYPES)
def test_rows_of_a_batch_do_not_see_each_other(rope_type: str) -> None:
    rope = EXAMPLES[rope_type]
    module = ours(16, rope)
    lengths = torch.tensor([5, 32, 33, MAX, MAX + 1, 200, 7])
    batch = torch.stack([torch.arange(12) + length - 12 for length in lengths.tolist()]).clamp(min=0)
    cos, sin = module(batch, lengths)
    for row, length in enumerate(lengths.tolist()):
        want_cos, want_sin = hugging_face(16, rope)(torch.zeros(1), torch.tensor([[length - 1]]))
        alone = module(batch[row : row + 1], lengths[row : row + 1])
        for got, single, want in ((cos, alone[0], want_cos), (sin, alone[1], want_sin)):
            np.testing.assert_allclose(got[row], single[0], rtol=0, atol=1e-6)
            np.testing.assert_allclose(got[row, -1], want[0, 0, :8], rtol=0, atol=1e-6)


def test_padding_beyond_the_row_does_not_lengthen_it() -> None:
    module = ours(16, EXAMPLES["dynamic"])
    short, _ = module(positions(20), torch.tensor([20]))
    padded, _ = module(positions(2 * MAX), torch.tensor([20]))
    assert torch.equal(short, padded[:, :20])


def test_types_that_know_no_length_ignore_it() -> None:
    for rope_type in ("default", "linear", "llama3", "yarn"):
        module = ours(16, EXAMPLES[rope_type])
        cos, sin = module(positions(9))
        for length in (1, 9, 10**6):
            again = module(positions(9), torch.tensor([length]))
            assert torch.equal(cos, again[0])
            assert torch.equal(sin, again[1])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_types_that_follow_the_length_ask_for_it(rope_type: str) -> None:
    with pytest.raises(ValueError, match=f"{rope_type} RoPE needs the length of each row"):
        ours(16, EXAMPLES[rope_type])(positions(9))
    with pytest.raises(ValueError, match="they follow the length"):
        inverse_frequencies(our_config(16, EXAMPLES[rope_type]).rope, 16)


EXAMPLES: dict[str, Settings] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.7},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1 + i / 8 for i in range(8)], "long_factor": [2 + i * 1.3 for i in range(8)],
    },
}  # fmt: skip


# ---- float64 ----------------------------------------------------------------------------------------------------


class Double:
    """Within it transformers' forward pass computes in float64: ``.float()``, ``torch.float`` and the default dtype."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        self.patch.setattr(torch, "float", torch.float64)
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)
        self.patch.undo()


# Constants that are float32 numbers, the exponent D / (D - 2) of dynamic too, because those of the graph are.
exact_head_dims = st.sampled_from([4, 6, 10, 18, 34, 66, 130])
float32_factors = st.floats(1.0, 64.0, width=32)


@patient
@given(
    exact_head_dims.flatmap(
        lambda head_dim: st.tuples(
            st.just(head_dim), st.sampled_from(TYPES).flatmap(lambda name: settings_of(name, head_dim))
        )
    ),
    float32_factors,
    st.floats(2.0, 1e9, width=32),
    st.integers(1, 4 * MAX),
)
def test_float64_is_hugging_face_in_double(
    case: tuple[int, Settings], factor: float, theta: float, length: int
) -> None:
    head_dim, rope = case
    rope["rope_theta"] = theta
    if rope["rope_type"] == "dynamic":
        rope["factor"] = factor
    module, want = ours(head_dim, rope, torch.float64), hugging_face(head_dim, rope)
    want(torch.zeros(1), positions(4 * MAX + 1))  # longrope keeps its float32 frequencies from now on
    if rope["rope_type"] == "dynamic":
        want = hugging_face(head_dim, rope)
    want.double()
    want.attention_scaling = float(np.float32(want.attention_scaling))
    with Double():
        want_cos, want_sin = want(torch.zeros(1), positions(length))
    cos, sin = module(positions(length), torch.tensor([length]))
    assert cos.dtype == torch.float64
    assert want_cos.dtype == torch.float64
    np.testing.assert_allclose(cos, want_cos[..., : head_dim // 2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(sin, want_sin[..., : head_dim // 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rope_type", TYPES)
def test_float64_buffers_are_the_float32_ones_widened(rope_type: str) -> None:
    narrow, wide = ours(16, EXAMPLES[rope_type]), ours(16, EXAMPLES[rope_type], torch.float64)
    for name, values in wide.named_buffers():
        assert values.dtype == torch.float64
        assert torch.equal(values, narrow.get_buffer(name).double())


# ---- from the formulas ------------------------------------------------------------------------------------------


def test_linear_divides_positions() -> None:
    cos, _ = ours(16, EXAMPLES["linear"], torch.float64)(positions(4 * 9))
    want, _ = ours(16, EXAMPLES["default"], torch.float64)(positions(9))
    np.testing.assert_allclose(cos[:, ::4], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [65, 100, 256])
def test_dynamic_slows_the_slowest_pair_by_the_interpolation_that_the_length_needs(length: int) -> None:
    # The point of the base's exponent D / (D - 2): the last pair is interpolated, the first one left alone.
    module = ours(16, EXAMPLES["dynamic"], torch.float64)
    got = module._frequencies(torch.tensor([length])).flatten()
    stretch = 3.7 * length / MAX - 2.7
    assert got[0] == 1.0
    assert math.isclose(got[-1], 10000.0 ** (-14 / 16) / stretch, rel_tol=1e-6)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    rope = {**EXAMPLES["yarn"], "original_max_position_embeddings": 4096}
    got = rope_buffers(our_config(128, rope))["inv_freq"].numpy()
    plain = rope_buffers(our_config(128, EXAMPLES["default"]))["inv_freq"].numpy()
    turns = 4096 * plain.astype(np.float64) / (2 * math.pi)
    np.testing.assert_allclose(got[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(got[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    between = (turns > 1.5) & (turns < 25)
    assert ((got > plain / 4) & (got < plain))[between].all()
    assert attention_scaling(our_config(128, rope)) == 0.1 * math.log(4) + 1


def test_yarn_ratio_of_scales_may_cancel() -> None:
    assert attention_scaling(our_config(16, {**EXAMPLES["yarn"], "mscale": 0.7, "mscale_all_dim": 0.7})) == 1.0


def test_longrope_scaling_comes_from_the_ratio_of_contexts() -> None:
    want = math.sqrt(1 + math.log(MAX / 32) / math.log(32))
    assert attention_scaling(our_config(16, EXAMPLES["longrope"])) == want


@pytest.mark.parametrize("rope_type", TYPES)
def test_old_and_new_spellings_rotate_alike(rope_type: str) -> None:
    rope = EXAMPLES[rope_type]
    old = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    spelt = {
        "model_type": "llama", **shape(16), "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": rope_type, **old} if old else None,
    }  # fmt: skip
    assert config_from_dict(spelt) == our_config(16, rope)
    theirs_old = transformers.LlamaConfig(**{key: value for key, value in spelt.items() if key != "model_type"})
    assert torch.equal(
        theirs.LlamaRotaryEmbedding(theirs_old).inv_freq, rope_buffers(config_from_dict(spelt))["inv_freq"]
    )


# ---- the graph --------------------------------------------------------------------------------------------------

STATIC = ["Unsqueeze", "Cast", "Mul", "Cos", "Sin"]
SIMPLE = {
    *STATIC, "Constant", "Greater", "Where", "Div", "Sub", "Pow", "Range", "Reciprocal",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the exporter's, about its own internals
@pytest.mark.parametrize("rope_type", TYPES)
def test_traced_on_the_meta_device_into_simple_operators(rope_type: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    module = ours(16, EXAMPLES[rope_type])
    proto = _graph(module.config)
    operators = [node.op_type for node in proto.graph.node if node.op_type != "Constant"]
    assert set(operators) <= SIMPLE
    if rope_type in ("default", "linear", "llama3"):
        assert operators == STATIC
    if rope_type == "yarn":
        assert operators == [*STATIC, "Mul", "Mul"]
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    for lengths in ([3], [40], [5, 33, 64, 65, 300]):
        batch_positions = torch.stack([torch.arange(4) + max(length - 4, 0) for length in lengths])
        want = module(batch_positions, torch.tensor(lengths))
        feeds = dict(zip(("positions", "length"), (batch_positions.numpy(), np.array(lengths)), strict=True))
        got = session.run(None, {name: feeds[name] for name in inputs})
        for mine, reference in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope_type", TYPES)
def test_float64_reference_is_the_graph_read_in_float64(rope_type: str) -> None:
    # The graph's constants are float32 numbers, and 3.7, 16 / 14 and an attention factor are none.
    module = ours(16, EXAMPLES[rope_type], torch.float64)
    lengths = [5, 33, 64, 65, 300]
    batch_positions = torch.stack([torch.arange(4) + max(length - 4, 0) for length in lengths])
    want = module(batch_positions, torch.tensor(lengths))
    got = _evaluated_in_float64(
        _graph(module.config), {"positions": batch_positions.numpy(), "length": np.array(lengths)}
    )
    for mine, reference in zip(got, want, strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, reference, rtol=0, atol=1e-12)


def _evaluated_in_float64(proto: Any, feeds: dict[str, Any]) -> list[Any]:
    """The operators of :data:`SIMPLE`, with double in the place of float."""
    onnx = pytest.importorskip("onnx")

    def array(tensor: Any) -> Any:
        values = onnx.numpy_helper.to_array(tensor)
        return values.astype(np.float64) if values.dtype == np.float32 else values

    def cast(x: Any, to: int) -> Any:
        return np.asarray(x).astype(np.float64 if to == onnx.TensorProto.FLOAT else np.int64)

    operators = {
        "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(axes)), "Cast": cast, "Mul": np.multiply, "Cos": np.cos,
        "Sin": np.sin, "Greater": np.greater, "Where": np.where, "Div": np.divide, "Sub": np.subtract,
        "Pow": np.power, "Range": np.arange, "Reciprocal": lambda x: 1 / x, "Constant": lambda value: array(value),
    }  # fmt: skip
    assert set(operators) == SIMPLE
    values = {**feeds, **{item.name: array(item) for item in proto.graph.initializer}}
    for node in proto.graph.node:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        values[node.output[0]] = operators[node.op_type](*(values[name] for name in node.input), **attributes)
    return [values[output.name] for output in proto.graph.output]


def _graph(config: LlamaConfig) -> Any:
    """As the exporter makes it: traced and converted on the meta device, then the values put in."""
    onnx = pytest.importorskip("onnx")
    ir = pytest.importorskip("onnx_ir")
    with torch.device("meta"):
        module = LlamaRotaryEmbedding(config)
        batch, tokens = torch.export.Dim("B", min=1), torch.export.Dim("S", min=1)
        shapes = ({0: batch, 1: tokens}, {0: batch})
        example = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    model = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).model
    buffers = rope_buffers(config)
    for name, value in model.graph.initializers.items():
        if name in buffers:
            value.const_value = ir.tensor(buffers[name].numpy(), name=name)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto
