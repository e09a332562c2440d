"""The causal language model, and how the reference gets a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from llama_export.checkpoint import Checkpoint, TensorEntry, load_checkpoint
from llama_export.config import LlamaConfig
from llama_export.kv_cache import cache_shape
from llama_export.model.decoder import KeyValue, LlamaModel
from llama_export.model.rope import inverse_frequencies


class LlamaForCausalLM(nn.Module):
    """Tokens and a static KV cache in, logits and the updated cache out.

    The inputs and outputs are those of the exported graph:

    ================================  ===========  =================  ==================================================
    input_ids                         int64        [B, S]             right-padded
    past_length                       int64        [B]                valid tokens already in the cache, per row
    sequence_length                   int64        [B]                valid new tokens per row, 1..S
    logits_index                      int64        [B, N]             which of the S positions get logits
    past_key_values                   model dtype  L x 2 x [B,G,C,D]  past_length + S <= C is the caller's duty
    logits                            float32      [B, N, V]
    present_key_values                model dtype  L x 2 x [B,G,C,D]
    ================================  ===========  =================  ==================================================

    ``sequence_length`` is part of every Llama's interface; only RoPE types whose frequencies follow the row's length
    read it, and the types supported so far do not. Padding needs no mask: the padded positions come after the valid
    ones, and the next step overwrites them in the cache.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        past_length: Tensor,
        sequence_length: Tensor,
        logits_index: Tensor,
        past_key_values: list[KeyValue],
    ) -> tuple[Tensor, list[KeyValue]]:
        """See the class; logits are float32, or float64 in a float64 reference."""
        hidden_states, present_key_values = self.model(input_ids, past_length, past_key_values)
        index = logits_index.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
        logits = self.lm_head(torch.gather(hidden_states, 1, index))
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return logits, present_key_values

    def empty_cache(self, batch_size: int, capacity: int) -> list[KeyValue]:
        """A zeroed cache of L x (key, value), each [B, G, C, D] in the model's dtype."""
        shape, weight = cache_shape(self.config, batch_size, capacity), self.model.norm.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(self.config.num_hidden_layers)]


def load_reference(checkpoint: Checkpoint | Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The reference with a checkpoint's weights, in eval mode on the CPU.

    ``inv_freq`` is computed in float32 and then widened with the model in float64, so that all precisions rotate by
    the same angles; in 16-bit models it stays float32.
    """
    if isinstance(checkpoint, Path):
        checkpoint = load_checkpoint(checkpoint)
    config = checkpoint.config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: read_tensor(checkpoint.folder, entry).to(dtype) for name, entry in checkpoint.tensors.items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    rope_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    model.model.rotary_emb.inv_freq = inverse_frequencies(config.rope, config.head_dim).to(rope_dtype)
    return model.eval().requires_grad_(False)


def read_tensor(folder: Path, entry: TensorEntry) -> Tensor:
    """One tensor of the checkpoint, memory-mapped (copy on write) in its stored dtype."""
    dtype = getattr(torch, entry.dtype)
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    end = entry.offset + entry.nbytes
    flat = torch.from_file(str(folder / entry.file), shared=False, size=end, dtype=torch.uint8)[entry.offset : end]
    # A safetensors header has any length, so a tensor may start at an address torch cannot view as its dtype.
    aligned = flat if entry.offset % dtype.itemsize == 0 else flat.clone()
    return aligned.view(dtype).reshape(entry.shape)
