"""Names of the exported graph's inputs, outputs and dimensions, by task. One place for trace, graph, engine and session.

The causal LM reads and writes a static KV cache, whose tensors :mod:`llama_export.graph.kv_cache` names. The other heads see a
whole padded batch at once and have no cache. Outputs are named as Hugging Face's classes name them.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_export.config.llama import LlamaConfig
from llama_export.graph.kv_cache import CAPACITY, cache_names


@dataclass(frozen=True, slots=True)
class GraphInterface:
    """Inputs and outputs that do not depend on the number of layers."""

    inputs: tuple[str, ...]
    """int64 tensors, in graph order."""
    outputs: tuple[str, ...]
    """float32 tensors, in graph order."""
    dimensions: tuple[str, ...]
    """Symbols of the file."""
    has_cache: bool

    def input_names(self, config: LlamaConfig) -> list[str]:
        """All inputs, the cache's after the others."""
        return [*self.inputs, *(past for past, _ in self._cache_names(config))]

    def output_names(self, config: LlamaConfig) -> list[str]:
        """All outputs, the cache's after the others."""
        return [*self.outputs, *(present for _, present in self._cache_names(config))]

    def _cache_names(self, config: LlamaConfig) -> list[tuple[str, str]]:
        return list(cache_names(config.num_hidden_layers)) if self.has_cache else []


_TEXTS = ("input_ids", "attention_mask")
_TEXT_DIMENSIONS = ("batch_size", "num_tokens")
INTERFACES = {
    "causal-lm": GraphInterface(
        ("input_ids", "past_length", "sequence_length", "logits_index"),
        ("logits",),
        ("batch_size", "num_new_tokens", "num_logits", CAPACITY),
        has_cache=True,
    ),
    "sequence-classification": GraphInterface(_TEXTS, ("logits",), _TEXT_DIMENSIONS, has_cache=False),
    "token-classification": GraphInterface(_TEXTS, ("logits",), _TEXT_DIMENSIONS, has_cache=False),
    "question-answering": GraphInterface(_TEXTS, ("start_logits", "end_logits"), _TEXT_DIMENSIONS, has_cache=False),
    "feature-extraction": GraphInterface(
        _TEXTS, ("last_hidden_state", "sentence_embedding"), _TEXT_DIMENSIONS, has_cache=False
    ),
}
"""Task -> interface."""


def is_single_text(config: LlamaConfig, task: str) -> bool:
    """Whether the graph's batch is fixed at 1: a classifier without a padding token cannot tell where texts end."""
    return task == "sequence-classification" and config.pad_token_id is None
