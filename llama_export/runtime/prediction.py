"""What a head without a cache says of one text, in words: labels, an answer, an embedding.

Post-processing is that of Hugging Face's pipelines: softmax over classes, sigmoid where several classes may hold, the
bare score for regression; the best answer span inside the context.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export.config.llama import LlamaConfig
from llama_export.errors import ConfigError
from llama_export.runtime.protocol import HeadSession
from llama_export.runtime.text import Encoding

MAX_ANSWER_TOKENS = 15
"""Longest answer, tokens; the default of Hugging Face's pipeline."""
Scores = NDArray[np.float64]


def predict(session: HeadSession, encoding: Encoding, text: str, context: str | None) -> dict[str, Any]:
    """The outputs of one text, and what they mean; the keys of ``run --json`` for the task, timing aside.

    Args:
        session: of the bundle.
        encoding: ``text`` (with ``context`` for question answering) as tokens.
        text: what was asked about.
        context: question answering only: where the answer is to be found.

    Raises:
        ConfigError: a context that is missing or that nobody reads.
        ShapeError: see :meth:`HeadSession.run`.
    """
    if (context is not None) != (session.task == "question-answering"):
        raise ConfigError(
            "question answering needs a question and a context"
            if context is None
            else f"a context means nothing to {session.task}",
            details={"task": session.task},
            hint="--prompt QUESTION --context TEXT" if context is None else "leave --context out",
        )
    outputs = {name: array.astype(np.float64)[0] for name, array in session.run([encoding.ids]).items()}
    found: dict[str, Any] = {"task": session.task, "num_tokens": len(encoding.ids)}
    if session.task == "sequence-classification":
        return found | _classes(outputs["logits"], session.config)
    if session.task == "token-classification":
        rows = [_classes(row, session.config) for row in outputs["logits"]]
        spans = zip(encoding.tokens, encoding.offsets, rows, strict=True)
        tokens = [
            {"token": token, "start": start, "end": end, "text": text[start:end], "label": row["label"], "score": row["score"]}
            for token, (start, end), row in spans
        ]  # fmt: skip
        return found | {"tokens": tokens}
    if session.task == "question-answering":
        return found | _answer(outputs, encoding, context or "")
    return found | {"sentence_embedding": outputs["sentence_embedding"].tolist()}


def _classes(logits: Scores, config: LlamaConfig) -> dict[str, Any]:
    labels = list(config.labels) or [f"LABEL_{index}" for index in range(config.num_labels)]
    if config.problem_type == "regression" or config.num_labels == 1:
        scores = logits
    elif config.problem_type == "multi_label_classification":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = _softmax(logits)
    best = int(scores.argmax())
    named = {label: float(score) for label, score in zip(labels, scores, strict=True)}
    return {"label": labels[best], "score": float(scores[best]), "scores": named, "logits": logits.tolist()}


def _answer(outputs: dict[str, Scores], encoding: Encoding, context: str) -> dict[str, Any]:
    """The span of context tokens with the highest start + end score."""
    inside = np.array([part == 1 for part in encoding.sequence_ids])
    if not inside.any():
        raise ConfigError(
            "the context holds no token",
            details={"context": repr(context[:40])},
            hint="give the text that holds the answer: --context TEXT",
        )
    start, end = (np.where(inside, outputs[f"{name}_logits"], -np.inf) for name in ("start", "end"))
    width = len(encoding.ids)
    span = np.arange(width)
    allowed = (span >= span[:, None]) & (span < span[:, None] + MAX_ANSWER_TOKENS)
    total = np.where(allowed, start[:, None] + end, -np.inf)
    first, last = divmod(int(total.argmax()), width)
    begin, stop = encoding.offsets[first][0], encoding.offsets[last][1]
    score = _softmax(start)[first] * _softmax(end)[last]
    return {"answer": context[begin:stop], "start": begin, "end": stop, "score": float(score)}


def _softmax(scores: Scores) -> Scores:
    weights: Scores = np.exp(scores - scores.max())
    total: float = weights.sum()
    return np.asarray(weights / total)
