"""Rotary position embedding: the frequencies of a checkpoint and the cos/sin of a batch of positions.

The rotation itself happens inside the attention op, so every RoPE type is the same op with other cos and sin.

Every formula is computed step by step as transformers does, in float32: at position 100,000 one unit in the last place
of a frequency is 0.006 rad, so "the same formula, rounded elsewhere" is already another model.

Shapes: B batch, S tokens, D head_dim. Frequencies are in radians per token.

Sources: RoPE https://arxiv.org/abs/2104.09864 (eq. 15); linear: position interpolation 2306.15595; dynamic: NTK-aware
scaling by the Reddit users bloc97 and emozilla, as in transformers; llama3: Meta's llama-models ``apply_scaling``;
yarn: 2309.00071; longrope: 2402.13753. For all: transformers 5 ``modeling_rope_utils``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llama_export.config.llama import LlamaConfig, RopeConfig, float32_value


def rope_buffers(config: LlamaConfig) -> dict[str, Tensor]:
    """The constants of :class:`LlamaRotaryEmbedding`, each float32 [D/2].

    ``inv_freq`` always. dynamic: those up to ``max_position_embeddings``. longrope: ``inv_freq`` are those up to
    ``original_max_position_embeddings`` and ``long_inv_freq`` those beyond.
    """
    rope, head_dim = config.rope, config.head_dim
    if rope.rope_type == "dynamic":
        # In exact arithmetic the base is rope_theta; transformers computes it in double precision all the same.
        base = _ntk_base(config, config.max_position_embeddings)
        return {"inv_freq": 1.0 / base ** _exponents(head_dim)}
    if rope.rope_type == "longrope":
        divisors = {"inv_freq": rope.short_factor, "long_inv_freq": rope.long_factor}
        turns = rope.rope_theta ** _exponents(head_dim)
        return {name: 1.0 / (torch.tensor(values, dtype=torch.float32) * turns) for name, values in divisors.items()}
    return {"inv_freq": inverse_frequencies(rope, head_dim)}


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Frequencies of the types that know no length: theta_i = rope_theta^(-2i/D) for i = 0 .. D/2 - 1, scaled as
    ``rope_type`` says. float32 [D/2].

    default: as they are. linear: divided by ``factor``, which is the same as dividing positions. llama3, yarn: high
    frequencies as they are, low ones divided by ``factor``, a blend between.
    """
    wavelengths = rope.rope_theta ** _exponents(head_dim)  # over 2 pi, tokens
    if rope.rope_type == "default":
        return 1.0 / wavelengths
    if rope.rope_type == "linear":
        return 1.0 / wavelengths / _given(rope.factor)
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, 1.0 / wavelengths)
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, wavelengths)
    raise ValueError(f"rope_type {rope.rope_type} has no frequencies of its own: they follow the length")


def attention_scaling(config: LlamaConfig) -> float:
    """The factor on cos and sin, so its square on the scores; 1 but for yarn and longrope.

    yarn: 0.1 m ln(factor) + 1 with m = 1, or the ratio of two of them with m = ``mscale`` and ``mscale_all_dim``.
    longrope: sqrt(1 + ln(factor) / ln(original_max_position_embeddings)).
    """
    rope = config.rope
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "yarn":
        factor = _given(rope.factor)
        if rope.mscale is None or rope.mscale_all_dim is None:
            return _yarn_scale(factor, 1.0)
        return _yarn_scale(factor, rope.mscale) / _yarn_scale(factor, rope.mscale_all_dim)
    if rope.rope_type == "longrope":
        context = _given(rope.original_max_position_embeddings)
        factor = config.max_position_embeddings / context if rope.factor is None else rope.factor
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(context))
    return 1.0


def _exponents(head_dim: int) -> Tensor:
    """2i/D, float32 [D/2]."""
    return torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim


def _ntk_base(config: LlamaConfig, length: float) -> float:
    """rope_theta * (factor * length / max_position_embeddings - (factor - 1))^(D/(D - 2))"""
    rope, factor, dim = config.rope, _given(config.rope.factor), config.head_dim
    stretch: float = ((factor * length / config.max_position_embeddings) - (factor - 1)) ** (dim / (dim - 2))
    return rope.rope_theta * stretch


def _llama3_frequencies(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Keeps short wavelengths, divides long ones by ``factor``, and blends linearly in between."""
    context, factor = _given(rope.original_max_position_embeddings), _given(rope.factor)
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    is_medium = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(is_medium, blended, scaled)


def _yarn_frequencies(rope: RopeConfig, wavelengths: Tensor) -> Tensor:
    """Keeps what turns more than ``beta_fast`` times within the original context, divides by ``factor`` what turns less
    than ``beta_slow`` times, and blends linearly in the index between."""
    factor, context, half = _given(rope.factor), _given(rope.original_max_position_embeddings), len(wavelengths)

    def index_of(turns: float) -> float:
        """i (not an integer) of the frequency that turns so often within the original context."""
        return (2 * half * math.log(context / (turns * 2 * math.pi))) / (2 * math.log(rope.rope_theta))

    first, last = index_of(rope.beta_fast or 32), index_of(rope.beta_slow or 1)
    if rope.truncate is None or rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:
        last += 0.001  # as transformers does, against division by zero
    ramp = torch.clamp((torch.arange(half, dtype=torch.float32) - first) / (last - first), 0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _given(value: float | None) -> float:
    """A setting that the config check has made sure of."""
    if value is None:
        raise ValueError("a RoPE setting passed the config check but is missing")
    return value


class LlamaRotaryEmbedding(nn.Module):
    """Positions -> cos and sin, once per forward pass, for all layers.

    The buffers of :func:`rope_buffers` are registered without values, because a model is built on the meta device;
    :meth:`set_frequencies` fills them in.

    Numerics:
        Angle, cos and sin are computed in the buffers' dtype: float32 whatever the model's dtype, float64 in a float64
        reference, whose buffers are the float32 frequencies widened. Constants are float32 numbers in both, as in the
        graph. Cos and sin are not rounded to the model's dtype before the rotation. Hugging Face rounds them: stated as
        a deviation in the parity report.
        dynamic and longrope: the length that sets the frequencies is the row's own. Hugging Face takes the longest of
        the batch, padding included, and dynamic ones keep those of an earlier, longer call.
    """

    inv_freq: Tensor
    long_inv_freq: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling = float32_value(attention_scaling(config))
        names = ("inv_freq", "long_inv_freq") if config.rope.rope_type == "longrope" else ("inv_freq",)
        for name in names:
            self.register_buffer(name, torch.empty(config.head_dim // 2, dtype=torch.float32), persistent=False)

    def set_frequencies(self, dtype: torch.dtype = torch.float32) -> None:
        """Fills the buffers, on the CPU.

        Args:
            dtype: float32, or float64 in a float64 model, which so rotates by the same angles.
        """
        for name, values in rope_buffers(self.config).items():
            setattr(self, name, values.to(dtype))

    def forward(self, positions: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin of every position's angles.

        Args:
            positions: int64 [B, S].
            length: int64 [B], valid tokens of each row, the new ones included. Read by dynamic and longrope alone.

        Returns:
            cos and sin, [B, S, D/2].
        """
        angles = positions.unsqueeze(-1).to(self.inv_freq.dtype) * self._frequencies(length)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scaling == 1.0 else (cos * self.scaling, sin * self.scaling)

    def _frequencies(self, length: Tensor | None) -> Tensor:
        """int64 [B] -> [B, 1, D/2], or [D/2] for the types that know no length."""
        rope_type = self.config.rope.rope_type
        if rope_type not in ("dynamic", "longrope"):
            return self.inv_freq
        if length is None:
            raise ValueError(f"{rope_type} RoPE needs the length of each row")
        length = length.unsqueeze(-1).unsqueeze(-1)
        if rope_type == "longrope":
            is_long = length > _given(self.config.rope.original_max_position_embeddings)
            return torch.where(is_long, self.long_inv_freq, self.inv_freq)
        is_long = length > self.config.max_position_embeddings
        # Rows within the trained length get a harmless one: for theirs the power could be that of a negative number.
        beyond = torch.where(is_long, length, self.config.max_position_embeddings)
        return torch.where(is_long, self._ntk_frequencies(beyond), self.inv_freq)

    def _ntk_frequencies(self, length: Tensor) -> Tensor:
        """int64 [B, 1, 1], beyond the trained length -> [B, 1, D/2]: ``_ntk_base`` with one length a row."""
        dtype, dim, factor = self.inv_freq.dtype, self.config.head_dim, _given(self.config.rope.factor)
        times, less, theta = map(float32_value, (factor, factor - 1, self.config.rope.rope_theta))
        # torch raises a single float32 number to a power in double precision: with the unrounded exponent a batch of one
        # is bit-equal to Hugging Face's. The graph holds the rounded one, and so must a float64 reference.
        power = dim / (dim - 2) if dtype == torch.float32 else float32_value(dim / (dim - 2))
        stretch = times * length.to(dtype) / self.config.max_position_embeddings - less
        base = theta * stretch**power
        exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=length.device).to(dtype) / dim
        return 1.0 / base**exponents
