"""Hugging Face's model and the reference with their weights on disk: each module reads its own when it is called, and forgets them.

Role: oracles and noise floors of a model that does not fit: 1.2 billion parameters are 10 GB in float64. Every call reads all
weights once more, which costs seconds; what is computed is the same, bit by bit.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from llama_export.checkpoint.checkpoint import Checkpoint
from llama_export.model.heads import MODEL_CLASSES, LlamaWithHead
from llama_export.model.loading import read_tensor

Model = TypeVar("Model", bound=nn.Module)


def streamed_causal_lm(transformers: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A ``LlamaForCausalLM`` with eager attention, whose parameters exist only while their module runs.

    Args:
        transformers: the package.
        checkpoint: a causal LM; its config decides how many layers there are.
        dtype: of parameters and computation.
    """
    config = transformers.AutoConfig.from_pretrained(
        checkpoint.folder, local_files_only=True, num_hidden_layers=checkpoint.config.num_hidden_layers
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager")
    # Its frequencies are computed, not read.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return read_as_called(model, checkpoint, dtype)


def streamed_reference(checkpoint: Checkpoint, dtype: torch.dtype) -> LlamaWithHead:
    """What :func:`llama_export.model.load_reference` gives, its parameters there only while their module runs."""
    with torch.device("meta"):
        model = MODEL_CLASSES[checkpoint.task](checkpoint.config, "eager").to(dtype)
    model.model.rotary_emb.set_frequencies(torch.float64 if dtype == torch.float64 else torch.float32)
    return read_as_called(model, checkpoint, dtype)


def read_as_called(model: Model, checkpoint: Checkpoint, dtype: torch.dtype) -> Model:
    """Makes every module of a model on the meta device read its parameters, named as in the checkpoint, before it runs."""
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            _read_when_called(module, name, checkpoint, dtype)
    return model.eval().requires_grad_(False)


def _read_when_called(module: nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    empty = dict(module.named_parameters(recurse=False))

    def read(*_: Any) -> None:
        for part in empty:
            stored = f"{name}.{part}"
            if stored == "lm_head.weight" and checkpoint.config.tie_word_embeddings:
                stored = "model.embed_tokens.weight"
            values = read_tensor(checkpoint.folder, checkpoint.tensors[stored]).to(dtype)
            module.register_parameter(part, nn.Parameter(values, requires_grad=False))

    def forget(*_: Any) -> None:
        for part, nothing in empty.items():
            module.register_parameter(part, nothing)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget)
