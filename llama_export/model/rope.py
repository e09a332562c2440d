"""Rotary position embedding: the frequencies of a checkpoint and the cos/sin of a batch of positions.

The rotation itself happens inside the attention op, so every RoPE type is the same op with other cos and sin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llama_export.config import LlamaConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """theta_i = rope_theta^(-2i/D) for i = 0 .. D/2 - 1, scaled as ``rope_type`` says. float32 [D/2], radians per token.

    Computed step by step as Hugging Face does, in float32: at position 100,000 one unit in the last place of a
    frequency is 0.006 rad, so "the same formula, rounded elsewhere" is already another model.

    Source: https://arxiv.org/abs/2104.09864 (eq. 15); llama3: transformers ``modeling_rope_utils`` and Meta's
    llama-models ``apply_scaling``.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    inv_freq = 1.0 / (rope.rope_theta**exponents)
    if rope.rope_type == "default":
        return inv_freq
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, inv_freq)
    raise ValueError(f"rope_type {rope.rope_type} passed the config check but has no formula")


def _llama3_frequencies(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Keeps short wavelengths, divides long ones by ``factor``, and blends linearly in between."""
    context, factor = rope.original_max_position_embeddings, rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if context is None or factor is None or low is None or high is None:
        raise ValueError(
            "llama3 RoPE needs factor, low_freq_factor, high_freq_factor, original_max_position_embeddings"
        )
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    is_medium = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(is_medium, blended, scaled)


class LlamaRotaryEmbedding(nn.Module):
    """Positions -> cos and sin, once per forward pass, for all layers.

    Numerics:
        The angle ``position * inv_freq``, cos and sin are float32 whatever the model's dtype (float64 in a float64
        reference), and are not rounded to the model's dtype before the rotation. Hugging Face rounds them: stated as a
        deviation in the parity report.
    """

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # Values are set after construction (see heads.py): on the meta device there is nothing to compute with.
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2, dtype=torch.float32), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, S] -> cos, sin [B, S, D/2]"""
        angles = positions.unsqueeze(-1).to(self.inv_freq.dtype) * self.inv_freq
        return angles.cos(), angles.sin()
