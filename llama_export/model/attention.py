"""Grouped-query self-attention, over the static KV cache or over one padded batch; three ways to compute it.

Source: https://arxiv.org/abs/1706.03762, https://arxiv.org/abs/2305.13245 (grouped queries); what is computed, and its
numerics, is stated once, in :mod:`llama_export.ops.attention` and :mod:`llama_export.ops.masked_attention`.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from llama_export.config.llama import LlamaConfig
from llama_export.ops import torch_ops
from llama_export.ops.attention import append, merge_heads, rotate, split_heads, visible_in_cache
from llama_export.ops.masked_attention import causal_and_unpadded

KeyValue = tuple[Tensor, Tensor]
"""A layer's cache: key and value, each [B, G, C, D]."""


class LayerCache(NamedTuple):
    """What one layer has to attend to besides the new tokens."""

    key: Tensor
    """[B, G, C, D], rotated."""
    value: Tensor
    """[B, G, C, D]"""
    past_length: Tensor
    """int64 [B], valid tokens per row."""


class LlamaAttention(nn.Module):
    """Project, then rotate + append + attend in one custom op, then project back (``attn_implementation="eager"``)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.softmax_scale
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=bias)

    def forward(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, past: LayerCache | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Self-attention of the new tokens.

        Args:
            hidden_states: [B, S, E].
            cos: [B, S, D/2], of the tokens' positions.
            sin: the same.
            past: the cache to attend to and to append to; None: attend over these S tokens alone.
            attention_mask: int64 [B, S], which tokens are not padding; read without a cache only.

        Returns:
            [B, S, E], and the cache with S tokens more, or None.
        """
        query = self.q_proj(hidden_states)  # [B, S, H*D]
        key = self.k_proj(hidden_states)  # [B, S, G*D]
        value = self.v_proj(hidden_states)  # [B, S, G*D]
        if past is None:
            if attention_mask is None:
                raise ValueError("attention without a cache needs attention_mask [B, S]")
            return self.o_proj(self.attend_masked(query, key, value, cos, sin, attention_mask)), None
        attn_output, present_key, present_value = self.attend_cached(query, key, value, cos, sin, past)
        return self.o_proj(attn_output), (present_key, present_value)

    def attend_cached(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, past: LayerCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The op ``LlamaAttention``: -> attn_output [B, S, H*D], present_key, present_value."""
        found: tuple[Tensor, Tensor, Tensor] = torch_ops.attention(
            query, key, value, cos, sin, *past, self.num_heads, self.num_kv_heads, self.head_dim, self.scale
        )
        return found

    def attend_masked(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """The op ``LlamaMaskedAttention``: -> attn_output [B, S, H*D]."""
        attn_output: Tensor = torch_ops.masked_attention(
            query, key, value, cos, sin, attention_mask, self.num_heads, self.num_kv_heads, self.head_dim, self.scale
        )
        return attn_output


class _PyTorchAttention(LlamaAttention):
    """What the two implementations by PyTorch's kernels share: rotation and cache are the op's, attending is theirs.

    While a program is traced for export they call the ops too: the graph holds the fused op, whoever asked for it.
    """

    def attend_cached(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, past: LayerCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        if torch.compiler.is_exporting():
            return super().attend_cached(query, key, value, cos, sin, past)
        q_BHSD, k_BGSD, v_BGSD = self._rotated_heads(query, key, value, cos, sin)
        present_key = append(past.key, k_BGSD, past.past_length)
        present_value = append(past.value, v_BGSD, past.past_length)
        attended = self._attend_to_cache(q_BHSD, present_key, present_value, past.past_length)
        return merge_heads(attended), present_key, present_value

    def attend_masked(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor
    ) -> Tensor:
        if torch.compiler.is_exporting():
            return super().attend_masked(query, key, value, cos, sin, attention_mask)
        heads = self._rotated_heads(query, key, value, cos, sin)
        return merge_heads(self._attend_to_unpadded(*heads, attention_mask))

    def _rotated_heads(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, S, D], [B, G, S, D], [B, G, S, D]"""
        q_BHSD = rotate(split_heads(query, self.num_heads), cos, sin)
        k_BGSD = rotate(split_heads(key, self.num_kv_heads), cos, sin)
        return q_BHSD, k_BGSD, split_heads(value, self.num_kv_heads)

    def _attend_to_cache(self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, past_length: Tensor) -> Tensor:
        raise NotImplementedError

    def _attend_to_unpadded(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, attention_mask: Tensor) -> Tensor:
        raise NotImplementedError


class LlamaSdpaAttention(_PyTorchAttention):
    """By ``scaled_dot_product_attention`` with an explicit mask; PyTorch picks the kernel.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """

    def _attend_to_cache(self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, past_length: Tensor) -> Tensor:
        return self._sdpa(q_BHSD, k_BGCD, v_BGCD, visible_in_cache(past_length, q_BHSD.shape[2], k_BGCD.shape[2]))

    def _attend_to_unpadded(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, attention_mask: Tensor) -> Tensor:
        return self._sdpa(q_BHSD, k_BGSD, v_BGSD, causal_and_unpadded(attention_mask))

    def _sdpa(self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, visible_BSC: Tensor) -> Tensor:
        # What no query of a row sees may be NaN; a mask hides scores, but 0 * NaN is NaN.
        seen = visible_BSC.any(1)[:, None, :, None]
        k_BGCD, v_BGCD = torch.where(seen, k_BGCD, 0.0), torch.where(seen, v_BGCD, 0.0)
        visible = visible_BSC.unsqueeze(1)
        attended = F.scaled_dot_product_attention(
            q_BHSD, k_BGCD, v_BGCD, attn_mask=visible, scale=self.scale, enable_gqa=True
        )
        return torch.where(visible.any(-1, keepdim=True), attended, 0.0)


class LlamaFlashAttention2(_PyTorchAttention):
    """By the flash algorithm: tiles and a running softmax, the score matrix is never written.

    On a GPU, 16 bits, by the ``flash-attn`` package where it is installed; else by PyTorch's flash backend. Flash
    kernels take no padding mask, so every row is attended alone, over its valid tokens. Padding yields 0 (the other two
    implementations let it look at the tokens before it; nobody reads those rows).

    Source: https://arxiv.org/abs/2307.08691
    """

    def _attend_to_cache(self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, past_length: Tensor) -> Tensor:
        new_tokens = q_BHSD.shape[2]
        rows = [
            self._flash(q_BHSD[b], k_BGCD[b, :, : length + new_tokens], v_BGCD[b, :, : length + new_tokens])
            for b, length in enumerate(past_length.tolist())
        ]
        return torch.stack(rows)

    def _attend_to_unpadded(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, attention_mask: Tensor) -> Tensor:
        rows = []
        for b, mask in enumerate(attention_mask):
            (valid,) = mask.nonzero(as_tuple=True)
            q, k, v = (heads[b].index_select(1, valid) for heads in (q_BHSD, k_BGSD, v_BGSD))
            attended = self._flash(q, k, v) if valid.numel() else q
            rows.append(torch.zeros_like(q_BHSD[b]).index_copy(1, valid, attended))
        return torch.stack(rows)

    def _flash(self, q_HSD: Tensor, k_GTD: Tensor, v_GTD: Tensor) -> Tensor:
        """Causal attention of one row, aligned to the end: query s sees key t iff ``t <= T - S + s``."""
        if q_HSD.is_cuda and q_HSD.dtype in (torch.float16, torch.bfloat16) and importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func  # type: ignore[import-not-found]

            heads_last = (item.transpose(0, 1).unsqueeze(0) for item in (q_HSD, k_GTD, v_GTD))  # [1, S, H, D]
            found: Tensor = flash_attn_func(*heads_last, softmax_scale=self.scale, causal=True)
            return found.squeeze(0).transpose(0, 1)
        group = q_HSD.shape[0] // k_GTD.shape[0]
        k, v = (item.repeat_interleave(group, dim=0).unsqueeze(0) for item in (k_GTD, v_GTD))
        mask = causal_lower_right(q_HSD.shape[1], k_GTD.shape[1])
        q = q_HSD.unsqueeze(
            0
        ).contiguous()  # the kernel wants the last stride to be 1, which a transpose of D = 2 loses
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return attended.squeeze(0)


ATTENTION_CLASSES: dict[str, type[LlamaAttention]] = {
    "eager": LlamaAttention,
    "sdpa": LlamaSdpaAttention,
    "flash_attention_2": LlamaFlashAttention2,
}
"""``attn_implementation`` (Hugging Face's names) -> class. They agree; the exported graph is the same."""
