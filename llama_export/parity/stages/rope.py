"""Cos and sin alone, at positions no other stage reaches: both sides of every switch, and the model's last position.

A RoPE type whose frequencies follow the length may switch at 8192 tokens; no prompt of a validation is that long. But
cos and sin depend on lengths only, so they are compared at any of them for the price of a few rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llama_export.config.llama import LlamaConfig
from llama_export.graph.io import INTERFACES
from llama_export.model.rope import LlamaRotaryEmbedding
from llama_export.ops.table import OP_SPECS
from llama_export.parity.judge import Validator, judge
from llama_export.parity.metrics import difference
from llama_export.parity.oracle.evaluator import GraphEvaluator
from llama_export.parity.report.result import Stage

_LAST = 3
"""Positions per length: a row of ``length`` tokens is asked about its last ones."""
ULP = 2.0**-23


def lengths(config: LlamaConfig) -> list[int]:
    """Row lengths worth asking about: the shortest, both sides of every length the config names, the longest."""
    named = {config.max_position_embeddings, config.rope.original_max_position_embeddings, config.max_length}
    found = {_LAST, *(around for length in named if length for around in (length - 1, length, length + 1, 2 * length))}
    return sorted(length for length in found if _LAST <= length <= config.max_length)


def _rotary(config: LlamaConfig, dtype: torch.dtype) -> LlamaRotaryEmbedding:
    rotary = LlamaRotaryEmbedding(config)
    rotary.set_frequencies(dtype)
    return rotary


def _positions(length: int) -> Tensor:
    return torch.arange(length - _LAST, length).unsqueeze(0)


def angle_rounding(config: LlamaConfig, length: int) -> float:
    """How far float32 cos and sin are from exact ones, at most, in a row of ``length`` tokens: at position p an angle of up to
    p radians is off by up to p units of 2^-24."""
    positions, lengths = torch.arange(length).unsqueeze(0), torch.tensor([length])
    narrow, exact = (_rotary(config, dtype)(positions, lengths) for dtype in (torch.float32, torch.float64))
    return max(float((left.double() - right).abs().max()) for left, right in zip(narrow, exact, strict=True))


def reference_rope(v: Validator) -> Stage:
    """The reference's cos and sin in float32 against transformers' own, made anew for every length."""
    model = v.transformers_shell()
    ours = _rotary(v.llama, torch.float32)
    pairs = []
    asked = lengths(v.llama)
    for length in asked:
        theirs = type(model.rotary_emb)(model.config)
        with torch.no_grad():
            want = theirs(torch.zeros(1), _positions(length))
            got = ours(_positions(length), torch.tensor([length]))
        half = v.llama.head_dim // 2
        pairs += [
            (f"{name} at length {length}", left.numpy(), right[..., :half].numpy())
            for name, left, right in zip(("cos", "sin"), got, want, strict=True)
        ]
    return judge(
        "reference/rope", difference(pairs), limit=ULP, why="both compute the same float32 operations: one unit in the last place of 1",
        reason=f"cos and sin of the reference against transformers in float32, rows of {', '.join(map(str, asked))} tokens",
        lengths=[float(length) for length in asked],
    )  # fmt: skip


def graph_rope(v: Validator) -> Stage:
    """The graph's cos and sin against the reference's, both in float64."""
    evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch.float64)
    attention = next(
        node for node in evaluator.graph.node if node.op_type in ("LlamaAttention", "LlamaMaskedAttention")
    )
    names = [
        name
        for name, tensor in zip(attention.input, OP_SPECS[attention.op_type].inputs, strict=True)
        if tensor.name in ("cos", "sin")
    ]
    ours = _rotary(v.llama, torch.float64)
    pairs = []
    asked = lengths(v.llama)
    for length in asked:
        if INTERFACES[v.bundle.task].has_cache:
            ids = torch.zeros(1, _LAST, dtype=torch.int64)
            feeds = {
                "input_ids": ids, "past_length": torch.tensor([length - _LAST]), "sequence_length": torch.tensor([_LAST]),
            }  # fmt: skip
            positions = _positions(length)
        else:
            ids = torch.zeros(1, length, dtype=torch.int64)
            feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            positions = torch.arange(length).unsqueeze(0)
        found = dict(evaluator.stream([feeds], only=names))
        want = ours(positions, torch.tensor([length]))
        pairs += [
            (f"{name} at length {length}", np.asarray(found[name][0]), np.asarray(tensor))
            for name, tensor in zip(names, want, strict=True)
        ]
    return judge(
        "graph/rope", difference(pairs),
        reason=f"cos and sin of the graph against the reference's, both in float64, rows of {', '.join(map(str, asked))} tokens",
        lengths=[float(length) for length in asked],
    )  # fmt: skip
