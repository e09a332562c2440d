"""The models a checkpoint can hold: the decoder with one head on top, each computing what Hugging Face's class computes.

``forward`` is what is exported: its inputs and outputs are those of the graph. ``loss`` is for fine-tuning and is never
exported; losses and gradients are Hugging Face's.

Shapes: B batch, S tokens, N wanted positions, C kv_cache_capacity, E hidden_size, G key/value heads, D head_dim,
V vocabulary, K ``num_labels``.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_export.config.llama import LlamaConfig
from llama_export.errors import ShapeError
from llama_export.model.attention import KeyValue
from llama_export.model.decoder import KVCache, LlamaDecoderLayer, LlamaModel, attended_length

IGNORE_INDEX = -100
"""A label that does not count, as in PyTorch's cross entropy."""


class LlamaForCausalLM(nn.Module):
    """Tokens and a static KV cache in, logits and the updated cache out.

    ================================  ===========  =================  ==================================================
    input_ids                         int64        [B, S]             right-padded
    past_length                       int64        [B]                valid tokens already in the cache, per row
    sequence_length                   int64        [B]                valid new tokens per row, 1..S
    logits_index                      int64        [B, N]             which of the S positions get logits
    past_key_values                   model dtype  L x 2 x [B,G,C,D]  past_length + S <= C is the caller's duty
    logits                            float32      [B, N, V]
    present_key_values                model dtype  L x 2 x [B,G,C,D]
    ================================  ===========  =================  ==================================================

    ``sequence_length`` is part of every Llama's interface; only the RoPE types whose frequencies follow the row's length
    (dynamic, longrope) read it. Padding needs no mask: the padded positions come after the valid ones, and the next step
    overwrites them in the cache.
    """

    def __init__(self, config: LlamaConfig, attn_implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, attn_implementation)
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
        found = self.model(input_ids, KVCache(past_length, sequence_length, past_key_values))
        logits = self.lm_head(_pick(found.last_hidden_state, logits_index))
        return _widened(logits), found.present_key_values

    def loss(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of each token from the tokens before it, without a cache.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S], usually ``input_ids``; -100 does not count. Token s is predicted at s - 1.
            attention_mask: int64 [B, S].

        Returns:
            The loss (scalar), and the logits [B, S, V].
        """
        hidden_states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = _widened(self.lm_head(hidden_states))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX), logits

    def empty_cache(self, batch_size: int, capacity: int) -> list[KeyValue]:
        """A zeroed cache of L x (key, value), each [B, G, C, D] in the model's dtype."""
        first = cast(LlamaDecoderLayer, self.model.layers[0]).self_attn
        # The layer's own count of heads: under tensor parallelism it is this rank's.
        shape = (batch_size, first.num_kv_heads, capacity, first.head_dim)
        weight = self.model.norm.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.model.layers]


class LlamaForSequenceClassification(nn.Module):
    """A padded batch of texts in, one vector of K class scores each out: ``logits`` float32 [B, K].

    The scores are those of the last token that is not ``pad_token_id``, on whichever side the padding is; whether that
    token is masked does not matter. A checkpoint without a padding token classifies one text at a time, by its last
    token. A text of nothing but padding is scored at its first token.
    """

    def __init__(self, config: LlamaConfig, attn_implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, attn_implementation)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [B, S] twice -> [B, K].

        Raises:
            ShapeError: several texts, and no padding token to tell where they end.
        """
        pad = self.config.pad_token_id
        if pad is None and input_ids.shape[0] != 1:
            raise ShapeError(
                "a batch cannot be classified: the checkpoint names no padding token",
                details={"got": f"{input_ids.shape[0]} texts", "expected": "1, or pad_token_id in config.json"},
                hint="classify one text at a time, or set pad_token_id in config.json",
            )
        hidden_states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        if pad is None:
            pooled = hidden_states[:, -1]
        else:
            last = attended_length((input_ids != pad).to(input_ids.dtype)) - 1
            pooled = _pick(hidden_states, last.clamp(min=0).unsqueeze(1)).squeeze(1)
        return _widened(self.score(pooled))

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of ``problem_type``, or of the one Hugging Face infers, and the logits [B, K].

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S].
            labels: int64 [B] (one class of K), float [B] or [B, K] (regression: mean squared error), or float [B, K]
                of zeros and ones (several classes at once).
        """
        logits = self(input_ids, attention_mask)
        problem = self.config.problem_type
        if problem is None:
            integers = labels.dtype in (torch.int64, torch.int32)
            several = "single_label_classification" if integers else "multi_label_classification"
            problem = "regression" if self.config.num_labels == 1 else several
        if problem == "regression":
            return F.mse_loss(logits, labels.view_as(logits)), logits  # [B] or [B, num_labels] alike
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX), logits
        return F.binary_cross_entropy_with_logits(logits, labels), logits


class LlamaForTokenClassification(nn.Module):
    """A padded batch of texts in, K class scores for every token out: ``logits`` float32 [B, S, K]."""

    def __init__(self, config: LlamaConfig, attn_implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, attn_implementation)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=config.token_classification_bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [B, S] twice -> [B, S, K]"""
        hidden_states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return _widened(self.score(self.dropout(hidden_states)))

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy over the tokens whose label (int64 [B, S]) is not -100, and the logits [B, S, K]."""
        logits = self(input_ids, attention_mask)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX), logits


class SpanLogits(NamedTuple):
    """Scores of every token to be the first and the last one of the answer."""

    start_logits: Tensor
    """float32 [B, S]"""
    end_logits: Tensor
    """float32 [B, S]"""


class LlamaForQuestionAnswering(nn.Module):
    """A padded batch of question-and-context texts in, where the answer starts and ends out, as scores per token."""

    def __init__(self, config: LlamaConfig, attn_implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, attn_implementation)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SpanLogits:
        """int64 [B, S] twice -> [B, S] twice"""
        hidden_states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        start_logits, end_logits = _widened(self.qa_outputs(hidden_states)).unbind(-1)
        return SpanLogits(start_logits, end_logits)

    def loss(
        self, input_ids: Tensor, attention_mask: Tensor, start_positions: Tensor, end_positions: Tensor
    ) -> tuple[Tensor, SpanLogits]:
        """Mean of the cross entropies of start and end (int64 [B]; a position beyond the text does not count)."""
        logits = self(input_ids, attention_mask)
        outside = input_ids.shape[1]
        start, end = (
            F.cross_entropy(scores, positions.clamp(0, outside), ignore_index=outside)
            for scores, positions in zip(logits, (start_positions, end_positions), strict=True)
        )
        return (start + end) / 2, logits


class Features(NamedTuple):
    """What the decoder makes of a text."""

    last_hidden_state: Tensor
    """float32 [B, S, E]; rows of padding hold nothing of meaning."""
    sentence_embedding: Tensor
    """float32 [B, E]: the last attended token's row, not normalised."""


class LlamaForFeatureExtraction(nn.Module):
    """A padded batch of texts in, every token's hidden state and one embedding per text (its last token's) out."""

    def __init__(self, config: LlamaConfig, attn_implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, attn_implementation)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Features:
        """int64 [B, S] twice -> [B, S, E], [B, E]"""
        hidden_states = _widened(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)
        last = (attended_length(attention_mask) - 1).clamp(min=0)
        return Features(hidden_states, _pick(hidden_states, last.unsqueeze(1)).squeeze(1))


LlamaWithHead = (
    LlamaForCausalLM
    | LlamaForSequenceClassification
    | LlamaForTokenClassification
    | LlamaForQuestionAnswering
    | LlamaForFeatureExtraction
)
MODEL_CLASSES: dict[str, type[LlamaWithHead]] = {
    "causal-lm": LlamaForCausalLM,
    "sequence-classification": LlamaForSequenceClassification,
    "token-classification": LlamaForTokenClassification,
    "question-answering": LlamaForQuestionAnswering,
    "feature-extraction": LlamaForFeatureExtraction,
}
"""Task -> class."""


def _pick(hidden_states: Tensor, index: Tensor) -> Tensor:
    """[B, S, E], int64 [B, N] -> [B, N, E]"""
    return torch.gather(hidden_states, 1, index.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


def _widened(scores: Tensor) -> Tensor:
    """Results leave the model in float32, or in float64 from a float64 reference."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
