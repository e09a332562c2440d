"""The formulas this project started from (RMSNorm, rotary angle, SwiGLU, attention, residual order), one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import oracles
import pytest
import torch

from llama_export.config.llama import LlamaConfig, RopeConfig
from llama_export.model.attention import LayerCache
from llama_export.model.decoder import LlamaDecoderLayer
from llama_export.model.mlp import LlamaMLP
from llama_export.model.rms_norm import LlamaRMSNorm
from llama_export.model.rope import LlamaRotaryEmbedding, inverse_frequencies
from llama_export.ops import torch_ops

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=72, intermediate_size=100, num_hidden_layers=1, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
)  # fmt: skip
Block = tuple[LlamaDecoderLayer, oracles.Llama]
ROUNDING = 1e-12
"""Float64 sums of about 100 terms: 1e-16 each, with room."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _seeded_float64() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def _error(got: torch.Tensor, want: np.ndarray) -> float:
    return float(np.abs(got.detach().numpy() - want).max() / np.abs(want).max())


class TestRMSNorm:
    """y = x / sqrt(1/n sum x_i^2 + epsilon) * w"""

    def test_rms_norm_is_the_formula(self, rng: np.random.Generator) -> None:
        x, weight = rng.standard_normal((3, 5, 72)), rng.standard_normal(72)
        norm = LlamaRMSNorm(72, 1e-5)
        norm.weight.data = torch.from_numpy(weight)
        got, same_x = norm(torch.from_numpy(x))
        assert (error := _error(got, oracles.rms_norm(x, weight, norm.epsilon))) < ROUNDING, error
        assert torch.equal(same_x, torch.from_numpy(x))

    def test_rms_norm_by_hand(self) -> None:
        # mean of squares of (3, 4) is 12.5; with epsilon 12.5 the root is 5
        got = torch_ops.rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 10.0]), 12.5)
        np.testing.assert_allclose(got.numpy(), [0.6, 8.0], rtol=1e-15)

    def test_epsilon_is_inside_the_root(self) -> None:
        epsilon = 1e-2
        got = torch_ops.rms_norm(torch.zeros(4) + 1e-9, torch.ones(4), epsilon)
        np.testing.assert_allclose(got.numpy(), 1e-9 / math.sqrt(1e-18 + epsilon), rtol=1e-12)

    def test_the_mean_is_not_subtracted(self) -> None:
        got = torch_ops.rms_norm(torch.full((8,), 3.0), torch.ones(8), 1e-12)
        np.testing.assert_allclose(got.numpy(), 1.0, rtol=1e-9)


class TestRotaryAngle:
    """theta_i = 10000^(-2i/d); pairs (i, i + d/2) are turned by position * theta_i"""

    @pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 128])
    def test_theta_i_is_10000_to_the_minus_2i_over_d(self, head_dim: int) -> None:
        got = inverse_frequencies(RopeConfig(), head_dim)
        assert got.dtype == torch.float32
        assert got.shape == (head_dim // 2,)
        want = [10000 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
        assert got[0] == 1.0

    def test_cos_and_sin_are_of_position_times_theta_i(self) -> None:
        rotary = LlamaRotaryEmbedding(CONFIG)
        rotary.inv_freq = inverse_frequencies(CONFIG.rope, 16).double()
        positions = torch.tensor([[0, 1, 5, 127]])
        cos, sin = rotary(positions)
        angles = np.array([0, 1, 5, 127])[:, None] * rotary.inv_freq.numpy()
        assert (error := _error(cos[0], np.cos(angles))) < ROUNDING, error
        assert (error := _error(sin[0], np.sin(angles))) < ROUNDING, error

    def _key_after_rotation(self, key: np.ndarray, position: int, head_dim: int, frequencies: np.ndarray) -> np.ndarray:
        """What the attention op writes into the cache is the rotated key."""
        angle = torch.from_numpy(position * frequencies)[None, None]
        cache = torch.zeros(1, 1, position + 1, head_dim)
        vector = torch.from_numpy(key)[None, None]
        length = torch.tensor([position])
        new, rotary, past = (vector, vector, vector), (angle.cos(), angle.sin()), (cache, cache)
        _, present_key, _ = torch_ops.attention(*new, *rotary, *past, length, 1, 1, head_dim, 1.0)
        return present_key[0, 0, position].numpy()

    def test_pairs_i_and_i_plus_half_are_turned(self, rng: np.random.Generator) -> None:
        key, frequencies = rng.standard_normal(16), oracles.default_frequencies(10000, 16)
        got = self._key_after_rotation(key, 11, 16, frequencies)
        want = oracles.rotate_half_split(key, 11, frequencies)
        np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDING)
        # the neighbouring-pairs layout (2i, 2i + 1) is another rotation
        interleaved = oracles.rotate_half_split(np.concatenate([key[::2], key[1::2]]), 11, frequencies)
        assert np.abs(got - interleaved).max() > 0.1

    def test_a_quarter_turn_by_hand(self) -> None:
        # position 1, frequency pi/2: (q_i, q_{i+d/2}) = (1, 0) -> (0, 1), the sign convention of the formula
        got = self._key_after_rotation(np.array([1.0, 2.0, 0.0, 3.0]), 1, 4, np.array([math.pi / 2, 0.0]))
        np.testing.assert_allclose(got, [0.0, 2.0, 1.0, 3.0], atol=1e-15)

    def test_scores_depend_on_the_distance_only(self, rng: np.random.Generator) -> None:
        q, k, frequencies = rng.standard_normal(16), rng.standard_normal(16), oracles.default_frequencies(10000, 16)
        scores = [
            self._key_after_rotation(q, p + 9, 16, frequencies) @ self._key_after_rotation(k, p, 16, frequencies)
            for p in (0, 3, 40)
        ]
        np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-11)


class TestSwiGLU:
    """MLP(x) = W3 (SwiGLU(W1 x) * (W2 x)), SwiGLU(x) = x sigmoid(x)"""

    def test_mlp_is_the_formula(self, rng: np.random.Generator) -> None:
        mlp, x = LlamaMLP(CONFIG), rng.standard_normal((2, 3, 72))
        w1, w2, w3 = (layer.weight.detach().numpy() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        assert (error := _error(mlp(torch.from_numpy(x)), oracles.swiglu_mlp(x, w1, w2, w3))) < ROUNDING, error

    def test_gate_and_up_are_not_interchangeable(self, rng: np.random.Generator) -> None:
        mlp, x = LlamaMLP(CONFIG), rng.standard_normal((2, 3, 72))
        w1, w2, w3 = (layer.weight.detach().numpy() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        assert (error := _error(mlp(torch.from_numpy(x)), oracles.swiglu_mlp(x, w2, w1, w3))) > 1e-3, error


class TestAttention:
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V"""

    def _run(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
        """Without rotation (all angles 0), one head; the cache holds all of k and v but the last token."""
        length, d = k.shape
        cache = [torch.from_numpy(np.concatenate([item[:-1], np.zeros((1, d))])[None, None]) for item in (k, v)]
        flat = [torch.from_numpy(item[None]) for item in (q, k[-1:], v[-1:])]
        cos, sin = torch.ones(1, 1, d // 2), torch.zeros(1, 1, d // 2)
        return torch_ops.attention(*flat, cos, sin, *cache, torch.tensor([length - 1]), 1, 1, d, scale)[0].numpy()[0]

    def test_attention_is_softmax_of_scaled_scores_times_values(self, rng: np.random.Generator) -> None:
        d = 16
        q, k, v = rng.standard_normal((1, d)), rng.standard_normal((9, d)), rng.standard_normal((9, d))
        scores = q @ k.T / np.sqrt(d)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(self._run(q, k, v, 1 / math.sqrt(d)), weights @ v, rtol=0, atol=ROUNDING)

    def test_the_scale_of_a_config_is_one_over_root_of_head_dim(self) -> None:
        # head_dim, not hidden_size / heads: they differ here (16 and 12)
        assert CONFIG.softmax_scale == 0.25

    def test_equal_keys_give_the_mean_of_the_values(self, rng: np.random.Generator) -> None:
        v = rng.standard_normal((5, 4))
        got = self._run(np.ones((1, 4)), np.ones((5, 4)), v, 0.5)
        np.testing.assert_allclose(got[0], v.mean(0), rtol=0, atol=1e-15)


class TestPreNormResidualOrder:
    """x1 = x + Attention(Norm(x)); x2 = x1 + MLP(Norm(x1))"""

    @pytest.fixture
    def block(self, rng: np.random.Generator) -> Block:
        layer = LlamaDecoderLayer(CONFIG)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = torch.from_numpy(1 + 0.3 * rng.standard_normal(72))
        weights = {f"model.layers.0.{name}": item.detach().numpy() for name, item in layer.named_parameters()}
        oracle = oracles.Llama(
            weights=weights, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=16,
            epsilon=layer.input_layernorm.epsilon, frequencies=oracles.default_frequencies(10000, 16), scale=0.25,
        )  # fmt: skip
        return layer, oracle

    def _run(self, layer: LlamaDecoderLayer, x: np.ndarray, split: float) -> np.ndarray:
        """A layer takes its input as two summands and returns its output as two."""
        S = len(x)
        angle = torch.from_numpy(np.arange(S)[:, None] * oracles.default_frequencies(10000, 16))[None]
        past = LayerCache(torch.zeros(1, 2, S, 16), torch.zeros(1, 2, S, 16), torch.zeros(1, dtype=torch.int64))
        total = torch.from_numpy(x)[None]
        residual = None if split == 0 else total * split
        hidden = total if split == 0 else total * (1 - split)
        mlp_out, x1, _ = layer(hidden, residual, angle.cos(), angle.sin(), past, None)
        return (mlp_out + x1)[0].detach().numpy()

    @pytest.mark.parametrize("split", [0, 0.25, 1.5], ids=["first layer", "two summands", "other summands"])
    def test_block_is_the_pre_norm_formula(self, block: Block, split: float, rng: np.random.Generator) -> None:
        layer, oracle = block
        x = rng.standard_normal((6, 72))
        want = oracle.block(0, x)
        error = np.abs(self._run(layer, x, split) - want).max() / np.abs(want).max()
        assert error < ROUNDING, error

    def test_post_norm_order_would_differ(self, block: Block, rng: np.random.Generator) -> None:
        layer, oracle = block
        x = rng.standard_normal((6, 72))
        other = oracle.block_post_norm(0, x)
        error = np.abs(self._run(layer, x, 0) - other).max() / np.abs(other).max()
        assert error > 0.1, error

    def test_the_mlp_reads_x1_not_x(self, block: Block, rng: np.random.Generator) -> None:
        layer, oracle = block
        x = rng.standard_normal((6, 72))
        prefix = "model.layers.0"
        parallel = x + oracle.self_attention(0, oracle.norm(f"{prefix}.input_layernorm", x))
        parallel = parallel + oracle.mlp(0, oracle.norm(f"{prefix}.post_attention_layernorm", x))
        error = np.abs(self._run(layer, x, 0) - parallel).max() / np.abs(parallel).max()
        assert error > 1e-3, error
