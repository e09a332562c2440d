"""RoPE: a trained model beyond the length it was trained at, and how far float32 angles depend on distance alone."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llama_export.config.huggingface import config_from_dict
from llama_export.model import LlamaForCausalLM, load_reference
from llama_export.model.rope import LlamaRotaryEmbedding
from llama_export.ops.attention import rotate
from studies.tiny_llama import checkpoint_with, markdown, streams

TRAINED = 512
MULTIPLES = (1, 2, 4, 8)
WINDOWS = 24
SCORED = 256
"""Tokens: the last ones of each window, the same for every length."""
HEAD_DIM = 64


def rope_parameters(rope_type: str, factor: float) -> dict[str, Any]:
    """``rope_parameters`` that stretch a model trained at 512 tokens by ``factor``."""
    given: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0}
    if rope_type != "default":
        given["factor"] = float(factor)
    if rope_type in ("llama3", "yarn", "longrope"):
        given["original_max_position_embeddings"] = TRAINED
    if rope_type == "llama3":
        given |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type == "longrope":
        # longrope's factors come from a search per model; without one, those by which a larger base would stretch.
        given["short_factor"] = [1.0] * (HEAD_DIM // 2)
        given["long_factor"] = [factor ** (2 * i / (HEAD_DIM - 2)) for i in range(HEAD_DIM // 2)]
    return given


def perplexity(rope_type: str, factor: float, length: int, folder: Path, windows: int = WINDOWS) -> float:
    """Perplexity of the last 256 tokens of windows of ``length`` tokens, ends being the same for every length."""
    stretched = int(TRAINED * factor) if rope_type in ("llama3", "yarn", "longrope") else TRAINED
    path = checkpoint_with(
        folder / f"{rope_type}-{factor}-{length}",
        rope_parameters=rope_parameters(rope_type, factor), max_position_embeddings=stretched,
    )  # fmt: skip
    model = load_reference(path, attn_implementation="sdpa")
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(type(model))
    _, stream = streams()
    ends = np.linspace(TRAINED * max(MULTIPLES), len(stream), windows, dtype=int)
    total = 0.0
    with torch.no_grad():
        for end in ends:
            # As in training, a window opens with <s>.
            ids = torch.from_numpy(np.insert(stream[end - length + 1 : end], 0, 0)).unsqueeze(0)
            hidden_states = model.model(ids).last_hidden_state[:, -SCORED - 1 : -1]
            total += float(F.cross_entropy(model.lm_head(hidden_states)[0], ids[0, -SCORED:]))
    return math.exp(total / windows)


def measure() -> dict[str, Any]:
    """Type and factor -> perplexity at 1, 2, 4 and 8 times the trained length."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rope_type in ("default", "linear", "dynamic", "llama3", "yarn", "longrope"):
            for name, fixed in (("factor 8", 8.0), ("factor = multiple", None)):
                if rope_type == "default" and fixed is None:
                    continue
                label = rope_type if rope_type == "default" else f"{rope_type}, {name}"
                found[label] = {
                    str(multiple): perplexity(
                        rope_type, fixed or float(multiple), TRAINED * multiple, Path(folder) / label.replace(" ", "-")
                    )
                    for multiple in MULTIPLES
                }
                print(label, found[label], flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Perplexity by type and length."""
    header = ["RoPE", *(f"{TRAINED * multiple} tokens ({multiple}x)" for multiple in MULTIPLES)]
    return markdown(header, [[name, *(f"{value:.1f}" for value in row.values())] for name, row in found.items()])


SHIFTS = (0, 1024, 16384, 131072, 1048576)


def measure_distance() -> dict[str, Any]:
    """Shift of both positions -> largest change of a score q . k, as a share of |q| |k|; in float32 and in float64."""
    config = config_from_dict(
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 128,
            "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
            "head_dim": 128, "max_position_embeddings": 2097152, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        }
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 256, 128, generator=generator, dtype=torch.float64)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        rotary = LlamaRotaryEmbedding(config)
        rotary.set_frequencies(dtype)
        scores = {}
        for shift in SHIFTS:
            positions = torch.arange(256).unsqueeze(0) + shift
            cos, sin = rotary(positions)
            q, k = (rotate(item.to(dtype), cos, sin).double() for item in (query, key))
            scores[shift] = (q @ k.transpose(-1, -2)) / (
                query.norm(dim=-1, keepdim=True) * key.norm(dim=-1).unsqueeze(-2)
            )
        found[str(dtype).removeprefix("torch.")] = {
            str(shift): float((scores[shift] - scores[0]).abs().max()) for shift in SHIFTS[1:]
        }
    return found


def distance_table(found: dict[str, Any]) -> str:
    """One row a dtype."""
    header = ["angles in", *(f"moved by {shift}" for shift in SHIFTS[1:])]
    return markdown(header, [[name, *(f"{value:.1e}" for value in row.values())] for name, row in found.items()])
