"""Float64 oracles in NumPy, written from the formulas, one scalar at a time where that is clearer.

Imports nothing from ``llama_export``: what is tested against this file cannot be wrong in the same way by construction.
The last function makes the other oracle, Hugging Face's own model with random weights.

Shapes: B batch, S new tokens, C cache capacity, H query heads, G key/value heads, D head_dim,
E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

# Every test that needs an oracle is tiny: a second torch thread only fights with onnxruntime's spinning ones for the
# cores (on 2 cores the tests take 204 s with it and 86 s without).
torch.set_num_threads(1)

Array = NDArray[np.float64]


def rms_norm(x: ArrayLike, weight: ArrayLike, epsilon: float) -> Array:
    """y = x / sqrt(mean(x^2) + epsilon) * w, over the last axis; [.., E], [E] -> [.., E]"""
    x64, w64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    return x64 / np.sqrt((x64**2).sum(-1, keepdims=True) / x64.shape[-1] + epsilon) * w64


def default_frequencies(theta: float, head_dim: int) -> Array:
    """theta_i = theta^(-2i/d) for i = 0 .. d/2 - 1, radians per token."""
    return np.array([float(theta) ** (-2 * i / head_dim) for i in range(head_dim // 2)])


def default_frequencies_float32(theta: float, head_dim: int) -> NDArray[np.float32]:
    """The same, every operation rounded to float32, as 1 / theta^(2i/d): what a checkpoint was trained with."""
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    frequencies: NDArray[np.float32] = np.float32(1.0) / np.power(np.float32(theta), exponents, dtype=np.float32)
    return frequencies


@dataclass(frozen=True)
class Llama3Scaling:
    """The four numbers of Llama 3.1's RoPE scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def llama3_frequencies(theta: float, head_dim: int, scaling: Llama3Scaling) -> Array:
    """Meta's ``apply_scaling``: short wavelengths stay, long ones are divided by ``factor``, with a blend between."""
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    scaled = []
    for frequency in default_frequencies(theta, head_dim):
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            scaled.append(frequency)
        elif wavelength > context / low:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(scaled)


def rotate_half_split(x: ArrayLike, position: float, frequencies: ArrayLike) -> Array:
    """Turns every pair (i, i + d/2) of one vector [d] by the angle position * frequency_i."""
    vector, turned = np.asarray(x, np.float64), np.empty(len(np.asarray(x)), np.float64)
    half = len(vector) // 2
    for i, frequency in enumerate(np.asarray(frequencies, np.float64)):
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        turned[i] = vector[i] * c - vector[i + half] * s
        turned[i + half] = vector[i] * s + vector[i + half] * c
    return turned


def softmax(scores: ArrayLike) -> Array:
    """exp(x_i) / sum_j exp(x_j) of one vector."""
    exponentials = np.exp(np.asarray(scores, np.float64) - np.max(scores))
    return exponentials / exponentials.sum()


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cos: ArrayLike,
    sin: ArrayLike,
    past_key: ArrayLike,
    past_value: ArrayLike,
    past_length: ArrayLike,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Rotate, write at ``past_length``, attend causally, by loops over rows, tokens and heads; see the shapes above.

    Only slots 0 .. past_length + s are ever read for token s.
    """
    q, k, v = (np.asarray(item, np.float64) for item in (query, key, value))
    c, s = np.asarray(cos, np.float64), np.asarray(sin, np.float64)
    present_key, present_value = np.array(past_key, np.float64), np.array(past_value, np.float64)
    lengths = np.asarray(past_length)
    B, S, _ = q.shape
    half, group = head_dim // 2, num_heads // num_kv_heads

    def turned(vector: Array, b: int, t: int) -> Array:
        first, second = vector[:half], vector[half:]
        return np.concatenate([first * c[b, t] - second * s[b, t], first * s[b, t] + second * c[b, t]])

    output = np.zeros((B, S, num_heads * head_dim))
    for b in range(B):
        for t in range(S):
            for g in range(num_kv_heads):
                columns = slice(g * head_dim, (g + 1) * head_dim)
                present_key[b, g, lengths[b] + t] = turned(k[b, t, columns], b, t)
                present_value[b, g, lengths[b] + t] = v[b, t, columns]
        for t in range(S):
            visible = int(lengths[b]) + t + 1
            for h in range(num_heads):
                columns = slice(h * head_dim, (h + 1) * head_dim)
                query_vector, g = turned(q[b, t, columns], b, t), h // group
                scores = np.array([query_vector @ present_key[b, g, j] * scale for j in range(visible)])
                output[b, t, columns] = softmax(scores) @ present_value[b, g, :visible]
    return output, present_key, present_value


def masked_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, cos: ArrayLike, sin: ArrayLike, attention_mask: ArrayLike,
    num_heads: int, num_kv_heads: int, head_dim: int, scale: float,
) -> Array:  # fmt: skip
    """Causal attention over a padded batch, one query at a time. Shapes of the op ``LlamaMaskedAttention``.

    The keys of padding are left out of the sum altogether, so it may hold anything.
    """
    query, key, value = (np.asarray(item, np.float64) for item in (query, key, value))
    cos, sin, mask = np.asarray(cos, np.float64), np.asarray(sin, np.float64), np.asarray(attention_mask)
    B, S, _ = query.shape
    half, group = head_dim // 2, num_heads // num_kv_heads

    def turned(x: Array, b: int, s: int) -> Array:
        first, second = x[:half], x[half:]
        return np.concatenate((first * cos[b, s] - second * sin[b, s], first * sin[b, s] + second * cos[b, s]))

    output = np.zeros((B, S, num_heads * head_dim))
    for b in range(B):
        for i in range(S):
            keys = [j for j in range(i + 1) if mask[b, j] != 0]
            if not keys:
                continue
            for h in range(num_heads):
                q = turned(query[b, i, h * head_dim : (h + 1) * head_dim], b, i)
                g = slice((h // group) * head_dim, (h // group + 1) * head_dim)
                weights = softmax([scale * float(q @ turned(key[b, j, g], b, j)) for j in keys])
                output[b, i, h * head_dim : (h + 1) * head_dim] = sum(
                    weight * value[b, j, g] for weight, j in zip(weights, keys, strict=True)
                )
    return output


def silu(x: ArrayLike) -> Array:
    """x * sigmoid(x)"""
    x64 = np.asarray(x, np.float64)
    return x64 / (1 + np.exp(-x64))


def swiglu_mlp(x: ArrayLike, gate: ArrayLike, up: ArrayLike, down: ArrayLike) -> Array:
    """down (silu(gate x) * (up x)); [.., E] with weights [out, in]"""
    x64, w1, w2, w3 = (np.asarray(item, np.float64) for item in (x, gate, up, down))
    return (silu(x64 @ w1.T) * (x64 @ w2.T)) @ w3.T


@dataclass(frozen=True)
class Llama:
    """A whole Llama, for prompts without a cache: every row is computed alone, from position 0 on.

    ``weights`` are float64 arrays by Hugging Face name; a missing bias is zero.
    """

    weights: Mapping[str, Array]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    frequencies: Array
    scale: float
    keys: list[Array] = field(default_factory=list)
    """Filled by :meth:`logits`: rotated keys per layer, [G, S, D]."""

    def linear(self, name: str, x: Array) -> Array:
        """x W^T + b"""
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def self_attention(self, layer: int, x: Array) -> Array:
        """[S, E] -> [S, E]"""
        prefix = f"model.layers.{layer}.self_attn"
        S = len(x)
        q = self.linear(f"{prefix}.q_proj", x).reshape(S, self.num_heads, self.head_dim)
        k = self.linear(f"{prefix}.k_proj", x).reshape(S, self.num_kv_heads, self.head_dim)
        v = self.linear(f"{prefix}.v_proj", x).reshape(S, self.num_kv_heads, self.head_dim)
        rotated = np.array(
            [[rotate_half_split(k[t, g], t, self.frequencies) for t in range(S)] for g in range(self.num_kv_heads)]
        )
        self.keys.append(rotated)
        heads = []
        for h in range(self.num_heads):
            g = h // (self.num_heads // self.num_kv_heads)
            rows = []
            for t in range(S):
                query = rotate_half_split(q[t, h], t, self.frequencies)
                rows.append(softmax(rotated[g, : t + 1] @ query * self.scale) @ v[: t + 1, g])
            heads.append(rows)
        return self.linear(f"{prefix}.o_proj", np.array(heads).transpose(1, 0, 2).reshape(S, -1))

    def mlp(self, layer: int, x: Array) -> Array:
        """[S, E] -> [S, E]"""
        prefix = f"model.layers.{layer}.mlp"
        gate, up = self.linear(f"{prefix}.gate_proj", x), self.linear(f"{prefix}.up_proj", x)
        return self.linear(f"{prefix}.down_proj", silu(gate) * up)

    def norm(self, name: str, x: Array) -> Array:
        """[S, E] -> [S, E]"""
        return rms_norm(x, self.weights[f"{name}.weight"], self.epsilon)

    def block(self, layer: int, x: Array) -> Array:
        """x1 = x + Attention(Norm(x)); x2 = x1 + MLP(Norm(x1))"""
        x1 = x + self.self_attention(layer, self.norm(f"model.layers.{layer}.input_layernorm", x))
        return x1 + self.mlp(layer, self.norm(f"model.layers.{layer}.post_attention_layernorm", x1))

    def block_post_norm(self, layer: int, x: Array) -> Array:
        """The other order, which Llama does not have: x1 = Norm(x + Attention(x)); x2 = Norm(x1 + MLP(x1))"""
        x1 = self.norm(f"model.layers.{layer}.input_layernorm", x + self.self_attention(layer, x))
        return self.norm(f"model.layers.{layer}.post_attention_layernorm", x1 + self.mlp(layer, x1))

    def logits(self, ids: ArrayLike) -> Array:
        """[S] token ids -> [S, V]"""
        x = self.weights["model.embed_tokens.weight"][np.asarray(ids)]
        for layer in range(self.num_layers):
            x = self.block(layer, x)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm("model.norm", x) @ head.T


def huggingface_llama(folder: Path, *, seed: int = 0, dtype: str = "float32", **config: Any) -> Any:
    """A random ``transformers.LlamaForCausalLM`` (eager attention, eval mode), saved into ``folder`` as a checkpoint.

    Every weight is drawn anew so that nothing is special: matrices have 1 / sqrt(fan-in), norms lie around 1 and biases
    around 0, so a norm that is dropped, or two that are swapped, shows.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    settings = LlamaConfig(**config)
    settings._attn_implementation = "eager"
    model = LlamaForCausalLM(settings).eval().requires_grad_(False)
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(tuple(parameter.shape))
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * noise
        elif name.endswith("embed_tokens.weight"):
            values = noise
        else:
            values = noise / math.sqrt(parameter.shape[-1])
        parameter.copy_(torch.from_numpy(values))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model
