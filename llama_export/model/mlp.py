"""The SwiGLU feed-forward network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llama_export.config import LlamaConfig


class LlamaMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with ``silu(x) = x * sigmoid(x)``.

    Source: https://arxiv.org/abs/2002.05202 (SwiGLU).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]"""
        down: Tensor = self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return down
