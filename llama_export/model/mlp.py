"""The gated feed-forward network; SwiGLU with Llama's own activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_export.config.llama import LlamaConfig


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu,
    "gelu": F.gelu, "gelu_python": F.gelu,
    "gelu_new": _gelu_tanh, "gelu_fast": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu, "relu": F.relu, "relu2": _relu_squared, "relu6": F.relu6, "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "linear": lambda x: x, "mish": F.mish, "hardswish": F.hardswish,
}  # fmt: skip
"""``hidden_act`` -> function, by Hugging Face's names (several spellings of one function are equal in exact arithmetic)."""


class LlamaMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``; Llama's ``act`` is ``silu(x) = x * sigmoid(x)``.

    Source: https://arxiv.org/abs/2002.05202 (SwiGLU).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]"""
        down: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return down
