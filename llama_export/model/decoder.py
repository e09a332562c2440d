"""One decoder layer, and the stack of them between the embedding and the last norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama_export.config.llama import LlamaConfig
from llama_export.model.attention import ATTENTION_CLASSES, KeyValue, LayerCache
from llama_export.model.mlp import LlamaMLP
from llama_export.model.rms_norm import LlamaRMSNorm
from llama_export.model.rope import LlamaRotaryEmbedding


class KVCache(NamedTuple):
    """The static cache of a whole model, and what one call appends to it."""

    past_length: Tensor
    """int64 [B], valid tokens per row."""
    sequence_length: Tensor
    """int64 [B], valid new tokens per row, 1..S."""
    layers: list[KeyValue]
    """L x (key, value), each [B, G, C, D]."""


class LlamaModelOutput(NamedTuple):
    """What :class:`LlamaModel` computes."""

    last_hidden_state: Tensor
    """[B, S, E], after the last norm."""
    present_key_values: list[KeyValue]
    """The cache with the new tokens; empty without a cache."""
    hidden_states: list[Tensor]
    """If asked for: the embedding, each layer's output but the last one's, ``last_hidden_state``; as in Hugging Face."""


class LlamaDecoderLayer(nn.Module):
    """The pre-norm residual block: ``x1 = x + Attention(Norm(x))``, ``x2 = x1 + MLP(Norm(x1))``.

    Each sum is taken together with the norm that follows it (one pass over memory), so a layer receives its input as
    two summands, ``residual + hidden_states``, and hands its output on the same way. In the first layer there is no
    residual yet: the summand is the embedding alone.
    """

    def __init__(self, config: LlamaConfig, attn_implementation: str = "eager") -> None:
        super().__init__()
        self.self_attn = ATTENTION_CLASSES[attn_implementation](config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        past: LayerCache | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, KeyValue | None]:
        """[B, S, E] twice -> (MLP output, x1, this layer's cache); the layer's output is the sum of the first two."""
        normed, x = self.input_layernorm(hidden_states, residual)
        attn_output, present = self.self_attn(normed, cos, sin, past, attention_mask)
        normed, x1 = self.post_attention_layernorm(attn_output, x)
        return self.mlp(normed), x1, present


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: LlamaConfig, attn_implementation: str = "eager") -> None:
        super().__init__()
        # The gradient of the padding token's embedding is zero, as in Hugging Face.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        layers = (LlamaDecoderLayer(config, attn_implementation) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> LlamaModelOutput:
        """Runs the decoder over new tokens (with a cache) or over a padded batch (without).

        Args:
            input_ids: int64 [B, S].
            cache: token s of row b is at position ``past_length[b] + s``; padding is on the right.
            attention_mask: int64 [B, S], for a batch without a cache. Positions are 0..S-1 whatever it says, as in
                Hugging Face; padding may be on either side. None: no padding.
            output_hidden_states: also return what every layer gets.
        """
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        if cache is not None:
            positions = cache.past_length.unsqueeze(1) + steps
            length = cache.past_length + cache.sequence_length
        else:
            positions = steps.expand_as(input_ids)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            length = attended_length(attention_mask)
        cos, sin = self.rotary_emb(positions, length)

        hidden_states, residual = self.embed_tokens(input_ids), None
        present_key_values, every_hidden_state = [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                every_hidden_state.append(hidden_states if residual is None else hidden_states + residual)
            past = None if cache is None else LayerCache(*cache.layers[i], cache.past_length)
            hidden_states, residual, present = layer(hidden_states, residual, cos, sin, past, attention_mask)
            if present is not None:
                present_key_values.append(present)
        normed, _ = self.norm(hidden_states, residual)
        if output_hidden_states:
            every_hidden_state.append(normed)
        return LlamaModelOutput(normed, present_key_values, every_hidden_state)


def attended_length(attention_mask: Tensor) -> Tensor:
    """int64 [B, S] -> [B]: one more than the index of the last token that is not padding; 0 for a row of padding."""
    steps = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return ((attention_mask != 0) * steps).amax(1)
