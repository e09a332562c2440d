"""What the kernels are tried on, and the limits of what they may lose: shared by the CPU tests and the GPU suite.

A case is one node of an exported graph. Its result is judged against a float64 oracle: float32 within 1e-5 of the largest
value; 16 bit within 2 x (relative L2) and 4 x (maximum) of what PyTorch's own eager maths loses at that dtype on the same
inputs. Needs PyTorch and NumPy only, so that it also runs where nothing else is installed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracles

from llama_export.ops.attention import attention_eager
from llama_export.ops.masked_attention import masked_attention_eager
from llama_export.ops.rms_norm import add_rms_norm_eager, rms_norm_eager

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32_LIMIT = 1e-5
NOISE_L2, NOISE_MAX = 2.0, 4.0
Ops = Mapping[str, Callable[..., Any]]
EAGER: Ops = {
    "LlamaRMSNorm": rms_norm_eager,
    "LlamaAddRMSNorm": add_rms_norm_eager,
    "LlamaAttention": attention_eager,
    "LlamaMaskedAttention": masked_attention_eager,
}


@dataclass(frozen=True)
class Case:
    """One node: op, inputs and attributes, and what the result must be."""

    name: str
    op: str
    inputs: tuple[Tensor, ...]
    attributes: tuple[float, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The model dtype."""
        return self.inputs[0].dtype

    def oracle(self) -> tuple[Tensor, ...]:
        """The result in float64, by code that shares nothing with the project's."""
        values = [item.double().numpy() if item.is_floating_point() else item.numpy() for item in self.inputs]
        if self.op == "LlamaAttention":
            return tuple(torch.from_numpy(item) for item in oracles.attention(*values, *self.attributes))  # type: ignore[arg-type]
        if self.op == "LlamaMaskedAttention":
            return (torch.from_numpy(oracles.masked_attention(*values, *self.attributes)),)  # type: ignore[arg-type]
        if self.op == "LlamaRMSNorm":
            return (torch.from_numpy(oracles.rms_norm(*values, *self.attributes)),)
        # The sum is rounded to the model dtype before it is normalised: that is part of the op's definition.
        total = (self.inputs[0] + self.inputs[1]).double()
        normed = oracles.rms_norm(total.numpy(), values[2], *self.attributes)
        return torch.from_numpy(normed), total

    def valid(self) -> list[Tensor | slice]:
        """Which elements of each output mean something: of the caches, those below past_length + S."""
        if self.op != "LlamaAttention":
            return [slice(None)] * (2 if self.op == "LlamaAddRMSNorm" else 1)
        past_key, past_length, tokens = self.inputs[5], self.inputs[7], self.inputs[0].shape[1]
        written = torch.arange(past_key.shape[2]) < past_length[:, None] + tokens
        cache = written[:, None, :, None].expand(past_key.shape)
        return [slice(None), cache, cache]


@dataclass(frozen=True)
class Verdict:
    """Error of one output, as a share of what is allowed (1 is the limit)."""

    case: str
    output: int
    error: float
    """float32: largest difference over the largest value; 16 bit: relative L2."""
    allowed_l2: float
    allowed_max: float
    share: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.share <= 1.0


def judge(case: Case, results: Any) -> list[Verdict]:
    """Each output against the oracle."""
    outputs = [item.cpu() for item in (results if isinstance(results, tuple) else (results,))]
    expected = case.oracle()
    eager = EAGER[case.op](*case.inputs, *case.attributes)
    references = eager if isinstance(eager, tuple) else (eager,)
    verdicts = []
    for index, (got, want, reference, valid) in enumerate(
        zip(outputs, expected, references, case.valid(), strict=True)
    ):
        if got.dtype != case.dtype or got.shape != want.shape:
            raise AssertionError(f"{case.name}: output {index} is {got.dtype} {list(got.shape)}")
        difference, exact = (got.double() - want)[valid], want[valid]
        largest = float(exact.abs().max()) or 1.0
        if case.dtype == torch.float32:
            error = float(difference.abs().max()) / largest
            verdicts.append(Verdict(case.name, index, error, FLOAT32_LIMIT, FLOAT32_LIMIT, error / FLOAT32_LIMIT))
            continue
        noise = (reference.double() - want)[valid]
        # Where eager happens to be exact (a copy, zeros), half a unit in the last place is still rounding.
        unit = torch.finfo(case.dtype).eps / 2
        norm = float(exact.norm()) or 1.0
        allowed_l2 = NOISE_L2 * max(float(noise.norm()) / norm, unit / 4)
        allowed_max = NOISE_MAX * max(float(noise.abs().max()) / largest, unit / 4)
        l2, maximum = float(difference.norm()) / norm, float(difference.abs().max()) / largest
        share = max(l2 / allowed_l2, maximum / allowed_max)
        verdicts.append(Verdict(case.name, index, l2, allowed_l2, allowed_max, share))
    return verdicts


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The one that uses up most of its limit; a NaN is worse than any number."""
    return max(verdicts, key=lambda verdict: math.inf if math.isnan(verdict.share) else verdict.share)


# ---- cases ------------------------------------------------------------------------------------------------------


def norm_case(op: str, dtype: torch.dtype, *shape: int, magnitude: float = 1.0, seed: int = 0) -> Case:
    """A norm of hidden states [.., E] of the given size."""
    generator = torch.Generator().manual_seed(seed)
    states = [(torch.randn(*shape, generator=generator) * magnitude).to(dtype) for _ in range(2)]
    weight = (torch.randn(shape[-1], generator=generator) + 1).to(dtype)
    inputs = (states[0], weight) if op == "LlamaRMSNorm" else (*states, weight)
    return Case(f"{op} {_short(dtype)} {list(shape)} x{magnitude:g}", op, inputs, (1e-5,))


def attention_case(
    dtype: torch.dtype, past: list[int], S: int, H: int, G: int, D: int, C: int,
    *, fused: bool = False, magnitude: float = 1.0, seed: int = 0,
) -> Case:  # fmt: skip
    """Attention with random caches: valid up to ``past``, NaN beyond.

    Args:
        fused: query, key and value are slices of one [B, S, (H + 2G) * D] tensor.
        magnitude: of query and key, so magnitude^2 of the scores.
    """
    generator, B = torch.Generator().manual_seed(seed), len(past)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scales = torch.cat([torch.full(((H + G) * D,), magnitude), torch.ones(G * D)])
    together = (random(B, S, (H + 2 * G) * D) * scales).to(dtype)
    query, key, value = together.split([H * D, G * D, G * D], dim=-1)
    if not fused:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    angles = random(B, S, D // 2) * 3
    caches = [torch.full((B, G, C, D), float("nan"), dtype=dtype) for _ in range(2)]
    for b, length in enumerate(past):
        caches[0][b, :, :length] = (random(G, length, D) * magnitude).to(dtype)
        caches[1][b, :, :length] = random(G, length, D).to(dtype)
    inputs = (query, key, value, angles.cos(), angles.sin(), *caches, torch.tensor(past))
    rows = past if B <= 8 else f"of {B} rows"
    shape = f"past {rows} S{S} H{H} G{G} D{D} C{C}{' fused' if fused else ''} x{magnitude:g}"
    return Case(f"LlamaAttention {_short(dtype)} {shape}", "LlamaAttention", inputs, (H, G, D, float(D) ** -0.5))


def masked_attention_case(
    dtype: torch.dtype, lengths: list[int], S: int, H: int, G: int, D: int,
    *, side: str = "right", fused: bool = False, magnitude: float = 1.0, seed: int = 0,
) -> Case:  # fmt: skip
    """Attention over a padded batch; keys and values of padding are NaN.

    Args:
        lengths: tokens of each row that are not padding.
        side: of the padding: right, left, or holes (every third token as well).
        fused: query, key and value are slices of one [B, S, (H + 2G) * D] tensor.
        magnitude: of query and key, so magnitude^2 of the scores.
    """
    generator, B = torch.Generator().manual_seed(seed), len(lengths)
    scales = torch.cat([torch.full(((H + G) * D,), magnitude), torch.ones(G * D)])
    mask = torch.zeros(B, S, dtype=torch.int64)
    for b, length in enumerate(lengths):
        mask[b, slice(S - length, S) if side == "left" else slice(0, length)] = 1
    if side == "holes":
        mask[:, ::3] = 0
    together = torch.randn(B, S, (H + 2 * G) * D, generator=generator) * scales
    together[..., H * D :].masked_fill_((mask == 0).unsqueeze(-1), float("nan"))
    query, key, value = together.to(dtype).split([H * D, G * D, G * D], dim=-1)
    if not fused:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    angles = torch.randn(B, S, D // 2, generator=generator) * 3
    inputs = (query, key, value, angles.cos(), angles.sin(), mask)
    shape = f"{side} {lengths} S{S} H{H} G{G} D{D}{' fused' if fused else ''} x{magnitude:g}"
    return Case(
        f"LlamaMaskedAttention {_short(dtype)} {shape}", "LlamaMaskedAttention", inputs, (H, G, D, float(D) ** -0.5)
    )


def cases() -> Iterator[Case]:
    """Awkward sizes at every dtype."""
    for dtype in DTYPES:
        for op in ("LlamaRMSNorm", "LlamaAddRMSNorm"):
            for shape in (
                (1, 1, 2),
                (2, 3, 192),
                (5, 300),
                (1, 1, 1024),
                (2, 1025),
                (1, 2, 4096),
                (5, 2048),
                (3, 8000),
                (2, 16384),
                (1, 16400),
            ):
                yield norm_case(op, dtype, *shape)
            yield norm_case(op, dtype, 3, 64, magnitude=200.0)  # squares beyond float16
            yield norm_case(op, dtype, 3, 64, magnitude=1e-3)  # epsilon counts
            yield norm_case(op, dtype, 2, 64, magnitude=0.0)
        for arguments in (
            ([0], 1, 1, 1, 16, 1),  # the smallest: one token into a cache of one
            ([0, 0], 9, 4, 2, 16, 32),
            ([150, 77], 1, 8, 2, 64, 200),  # decode, ragged
            ([0, 59, 13], 5, 6, 2, 64, 64),  # one row ends exactly at the capacity
            ([3], 16, 4, 4, 128, 64),  # no grouping
            ([199], 1, 4, 1, 128, 200),  # the last slot
            ([4, 0], 3, 3, 1, 96, 20),  # head_dim no power of two, three heads per key
            ([2], 2, 2, 1, 80, 7),
            ([1], 2, 2, 1, 256, 10),
            ([0, 7], 1, 20, 1, 64, 9),  # more heads in a group than a decode tile has rows
            ([5], 3, 1, 1, 2, 9),  # head_dim 2: one pair
            ([65], 70, 2, 1, 64, 150),  # several tiles of queries and of keys, over a cache that is not empty
            ([700, 3], 1, 8, 2, 64, 1000),  # eight pieces of the cache, of which one row fills six and the other one
            ([126, 127, 128], 1, 4, 1, 64, 300),  # the last key of a piece, and the first of the next
            ([250], 4, 8, 2, 64, 300),  # few queries: they reach into another piece each
            ([40, 0], 1, 20, 1, 64, 300),  # more heads in a group than a tile has rows, and several pieces
            ([1100], 1, 4, 2, 96, 1300),  # longer pieces
            ([9000], 1, 2, 1, 32, 9001),  # the longest
            ([b % 7 for b in range(256)], 1, 2, 1, 32, 8),  # a large batch
        ):
            yield attention_case(dtype, *arguments)
        yield attention_case(dtype, [2, 0], 3, 4, 2, 64, 8, fused=True)
        yield attention_case(dtype, [2, 0], 1, 4, 2, 48, 8, fused=True)
        # A long context, full. Were all its keys alike their mean would be next to nothing, less than float32 sums can resolve.
        yield attention_case(dtype, [131071], 1, 1, 1, 32, 131072, magnitude=3.0)
        yield attention_case(dtype, [6], 4, 4, 2, 64, 16, magnitude=8.0)  # scores of several hundred
        yield attention_case(dtype, [6], 4, 4, 2, 64, 16, magnitude=0.0)  # all keys weigh the same
        for masked in (
            ([1], 1, 1, 1, 16),  # the smallest: one token
            ([9, 4], 9, 4, 2, 16),
            ([17, 1, 0], 17, 6, 2, 64),  # a row of nothing but padding
            ([5], 5, 4, 4, 128),  # no grouping
            ([7, 3], 7, 3, 1, 96),  # head_dim no power of two, three heads per key
            ([3], 3, 2, 1, 256),
            ([4], 4, 1, 1, 2),  # head_dim 2: one pair
            ([70, 40], 70, 2, 1, 64),  # several tiles of queries and of keys
        ):
            for side in ("right", "left"):
                yield masked_attention_case(dtype, *masked, side=side)
        for head_dim in (
            32,
            64,
            80,
            96,
            128,
            256,
            18,
            66,
            130,
        ):  # every width that has a kernel, and three that are padded
            yield attention_case(dtype, [30], 9, 2, 1, head_dim, 40)
            yield attention_case(dtype, [200, 130], 1, 4, 2, head_dim, 210)
            yield masked_attention_case(dtype, [9, 4], 9, 4, 2, head_dim)
        yield masked_attention_case(dtype, [11, 8], 11, 4, 2, 48, side="holes")
        yield masked_attention_case(dtype, [6, 2], 6, 4, 2, 64, fused=True)
        yield masked_attention_case(dtype, [6], 6, 4, 2, 64, magnitude=8.0)  # scores of several hundred
        yield masked_attention_case(dtype, [6], 6, 4, 2, 64, magnitude=0.0)  # all keys weigh the same


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
