"""One decoder layer, and the stack of them between the embedding and the last norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama_export.config import LlamaConfig
from llama_export.model.attention import LlamaAttention
from llama_export.model.mlp import LlamaMLP
from llama_export.model.rms_norm import LlamaRMSNorm
from llama_export.model.rope import LlamaRotaryEmbedding

KeyValue = tuple[Tensor, Tensor]


class LlamaDecoderLayer(nn.Module):
    """The pre-norm residual block: ``x1 = x + Attention(Norm(x))``, ``x2 = x1 + MLP(Norm(x1))``.

    Each sum is taken together with the norm that follows it (one pass over memory), so a layer receives its input as
    two summands, ``residual + hidden_states``, and hands its output on the same way. In the first layer there is no
    residual yet: the summand is the embedding alone.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        past: KeyValue,
        past_length: Tensor,
    ) -> tuple[Tensor, Tensor, KeyValue]:
        """[B, S, E] twice -> (MLP output, x1, this layer's cache); the layer's output is the sum of the first two."""
        normed, x = self.input_layernorm(hidden_states, residual)
        attn_output, present_key, present_value = self.self_attn(normed, cos, sin, *past, past_length)
        normed, x1 = self.post_attention_layernorm(attn_output, x)
        return self.mlp(normed), x1, (present_key, present_value)


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(
        self, input_ids: Tensor, past_length: Tensor, past_key_values: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """int64 [B, S], int64 [B], L x ([B, G, C, D], [B, G, C, D]) -> ([B, S, E], the cache with S tokens more)"""
        positions = past_length.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)
        cos, sin = self.rotary_emb(positions)
        hidden_states, residual = self.embed_tokens(input_ids), None
        present_key_values = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            hidden_states, residual, present = layer(hidden_states, residual, cos, sin, past, past_length)
            present_key_values.append(present)
        normed, _ = self.norm(hidden_states, residual)
        return normed, present_key_values
