"""How a reference model gets a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llama_export._system.files import is_plain_name
from llama_export.checkpoint.checkpoint import Checkpoint, check_files, load_checkpoint
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.errors import CheckpointError
from llama_export.model.heads import MODEL_CLASSES, LlamaForCausalLM, LlamaWithHead


def load_reference(
    checkpoint: Checkpoint | Path, dtype: torch.dtype = torch.float32, *, attn_implementation: str = "eager"
) -> LlamaWithHead:
    """The reference of the checkpoint's task with its weights, in eval mode, without gradients, on the CPU.

    Weights that need no conversion stay memory-mapped, copy on write: training changes memory, never the file. For
    fine-tuning call ``.train().requires_grad_()``.

    RoPE's frequencies are computed in float32 and then widened with the model in float64, so that all precisions rotate
    by the same angles; in 16-bit models they stay float32.
    """
    if isinstance(checkpoint, Path):
        checkpoint = load_checkpoint(checkpoint)
    config = checkpoint.config
    with torch.device("meta"):
        model = MODEL_CLASSES[checkpoint.task](config, attn_implementation)
    weights = {name: read_tensor(checkpoint.folder, entry).to(dtype) for name, entry in checkpoint.tensors.items()}
    if "lm_head.weight" in model.state_dict() and config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    if isinstance(model, LlamaForCausalLM) and config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # `assign` makes two parameters of one tensor
    model.model.rotary_emb.set_frequencies(torch.float64 if dtype == torch.float64 else torch.float32)
    return model.eval().requires_grad_(False)


def read_tensor(folder: Path, entry: TensorEntry) -> Tensor:
    """One tensor of the checkpoint, memory-mapped (copy on write) in its stored dtype.

    Raises:
        CheckpointError: the entry (of a graph that somebody made) names a file outside the folder, or no file.
    """
    if not is_plain_name(entry.file) or not (folder / entry.file).is_file():
        raise CheckpointError(
            f"tensor `{entry.name}` is said to lie in a file that is none of this folder's",
            details={"folder": folder, "got": entry.file, "expected": "the name of a file in it"},
            hint="do not use models from a source you do not trust",
        )
    check_files(folder, [entry.file], hub_cache=True, error=CheckpointError)
    dtype = getattr(torch, entry.dtype)
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    end = entry.offset + entry.nbytes
    flat = torch.from_file(str(folder / entry.file), shared=False, size=end, dtype=torch.uint8)[entry.offset : end]
    # A safetensors header has any length, so a tensor may start at an address torch cannot view as its dtype.
    aligned = flat if entry.offset % dtype.itemsize == 0 else flat.clone()
    return aligned.view(dtype).reshape(entry.shape)
