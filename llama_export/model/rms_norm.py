"""Root-mean-square normalisation, alone and fused with the residual sum before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama_export.config.llama import float32_value
from llama_export.ops import torch_ops


class LlamaRMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis, where ``x = hidden_states + residual``.

    The sum ``x`` is returned as well, because the next residual connection needs it. Without a residual it is
    ``hidden_states`` itself.

    Source: https://arxiv.org/abs/1910.07467; numerics in :mod:`llama_export.ops.rms_norm`.
    """

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = float32_value(epsilon)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[.., E], [.., E] or None -> (y, x), both [.., E]"""
        if residual is None:
            return torch_ops.rms_norm(hidden_states, self.weight, self.epsilon), hidden_states
        normed, x = torch_ops.add_rms_norm(hidden_states, residual, self.weight, self.epsilon)
        return normed, x
