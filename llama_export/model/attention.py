"""Grouped-query self-attention over the static KV cache."""

from __future__ import annotations

from torch import Tensor, nn

from llama_export import ops
from llama_export.config import LlamaConfig


class LlamaAttention(nn.Module):
    """Project, then rotate + append + attend in one custom op, then project back.

    Source: https://arxiv.org/abs/1706.03762, https://arxiv.org/abs/2305.13245 (grouped queries); the op's maths and
    numerics are in :mod:`llama_export.ops.attention`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, query_width, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, hidden, bias=bias)

    def forward(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor, past_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, E], the cache [B, G, C, D] and its length [B] -> ([B, S, E], present_key, present_value)"""
        attn_output, present_key, present_value = ops.attention(
            self.q_proj(hidden_states),  # [B, S, H*D]
            self.k_proj(hidden_states),  # [B, S, G*D]
            self.v_proj(hidden_states),  # [B, S, G*D]
            cos,
            sin,
            past_key,
            past_value,
            past_length,
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.head_dim,
            self.config.softmax_scale,
        )
        return self.o_proj(attn_output), present_key, present_value
