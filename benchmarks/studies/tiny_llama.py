"""What the studies share: the bundled checkpoint, the text it never saw, and a short training of small models."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import LlamaConfig
from llama_export.model.decoder import LlamaModel

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-llama"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


@cache
def trainer() -> ModuleType:
    """``examples/train_tiny_llama.py``, for its corpus and its tokenization."""
    path = ROOT / "examples" / "train_tiny_llama.py"
    spec = importlib.util.spec_from_file_location("train_tiny_llama", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny_llama"] = module
    spec.loader.exec_module(module)
    return module


@cache
def streams() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the training files and of the held-out files, of the Python that runs this."""
    from tokenizers import Tokenizer

    corpus = trainer().read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    train, held_out = (
        trainer().encode_stream(tokenizer, list(part.values())) for part in (corpus.train, corpus.held_out)
    )
    return train, held_out


def small_config(**changes: Any) -> LlamaConfig:
    """A Llama of 0.8 million parameters over tiny-llama's vocabulary, for short trainings."""
    return config_from_dict(
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1536, "hidden_size": 128,
            "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, **changes,
        }
    )  # fmt: skip


class LanguageModel(nn.Module):
    """A decoder with tied embeddings, any decoder: the studies change one part of it and leave the rest alone."""

    def __init__(self, decoder: LlamaModel, seed: int) -> None:
        super().__init__()
        self.decoder = decoder
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in decoder.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1 if "embed" in name else 0.05, generator=generator)
        decoder.rotary_emb.set_frequencies()

    def loss(self, ids: Tensor) -> Tensor:
        """Nats per token, each from the tokens before it; int64 [B, S] -> scalar."""
        hidden_states = self.decoder(ids).last_hidden_state
        logits = hidden_states @ self.decoder.embed_tokens.weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: LanguageModel, *, steps: int, seed: int, learning_rate: float, warmup: int, length: int = 128
) -> float:
    """AdamW over windows of the training files; the held-out loss at the end, or infinity where it diverged."""
    text, held_out = streams()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, warmup))
        starts = rng.integers(0, len(text) - length, 8)
        loss = model.loss(torch.from_numpy(np.stack([text[at : at + length] for at in starts])))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    probe = held_out[: 64 * length].reshape(64, length)
    with torch.no_grad():
        found = float(model.loss(torch.from_numpy(probe)))
    return found if np.isfinite(found) else float("inf")


def checkpoint_with(folder: Path, **changes: Any) -> Path:
    """tiny-llama with another ``config.json``."""
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    shutil.copyfile(CHECKPOINT / "model.safetensors", folder / "model.safetensors")
    return folder
