"""A bundle of a head without a cache, in Python: classification, question answering, hidden states, embeddings.

>>> import llama_export
>>> head = llama_export.load_head("build/classifier")
>>> head.predict("A fine day")["label"]
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_export.bundle.bundle import Bundle
from llama_export.config.checks import whole_number, wrong_argument
from llama_export.config.settings import RuntimeBackend
from llama_export.runtime.buffers import Float32Array
from llama_export.runtime.opening import codec_of, open_head_session, opened_bundle
from llama_export.runtime.prediction import predict
from llama_export.runtime.protocol import HeadSession
from llama_export.runtime.text import TextCodec

__all__ = ["HeadModel", "load_head"]


def load_head(
    bundle: str | Path | Bundle,
    *,
    backend: RuntimeBackend = "auto",
    engine: str | Path | None = None,
    threads: int | None = None,
    read_weights: bool = False,
    ignore_hashes: bool = False,
) -> HeadModel:
    """Opens a bundle of a classifier, a question answering model or an encoder.

    Args:
        bundle: folder that ``llama-export export`` made, of any task but causal-lm.
        backend: ``auto``, ``onnxruntime``, ``onnxruntime-cuda``, ``tensorrt-rtx`` or ``tensorrt``. ``auto`` takes the
            engine that is named, else the bundle's own engine if this machine can run it and ``threads`` is not given, else
            onnxruntime on the CPU.
        engine: path of an engine; default: the bundle's only engine of the backend.
        threads: CPU threads of onnxruntime; default: one per core.
        read_weights: see :func:`llama_export.load`.
        ignore_hashes: open the bundle although a file differs from its manifest.

    Raises:
        ConfigError: not a bundle, a causal LM, or an argument of a wrong type or value.
        ArtifactMismatchError: a file is not the one that the manifest describes.
        MissingDependencyError: onnxruntime or TensorRT is not installed.
        ToolchainError: this machine cannot run the engine, or the backend cannot open the graph.
    """
    opened = opened_bundle(bundle, ignore_hashes=ignore_hashes)
    session = open_head_session(opened, backend=backend, engine=engine, threads=threads, read_weights=read_weights)
    return HeadModel(opened, session, codec_of(opened))


class HeadModel:
    """A head with its tokenizer; :func:`llama_export.load_head` makes it. Several threads may use it: onnxruntime computes
    their calls side by side, and an engine one after another.

    Args:
        bundle: from :func:`llama_export.load_bundle`.
        session: over this bundle.
        codec: its tokenizer; None: token ids only.
    """

    def __init__(self, bundle: Bundle, session: HeadSession, codec: TextCodec | None) -> None:
        self.bundle = bundle
        self.session = session
        self.codec = codec

    @property
    def task(self) -> str:
        """``sequence-classification``, ``token-classification``, ``question-answering`` or ``feature-extraction``."""
        return self.session.task

    def predict(self, text: str, context: str | None = None) -> dict[str, Any]:
        """What the head says of one text.

        Args:
            text: the text; for question answering, the question.
            context: for question answering only: the text that holds the answer.

        Returns:
            ``task``, ``num_tokens``, and by task: ``label``, ``score``, ``scores``, ``logits``; ``tokens``, each with
            ``label``, ``score`` and its place in the text; ``answer``, ``start``, ``end``, ``score``; or
            ``sentence_embedding``.

        Raises:
            ConfigError: no tokenizer, no text, or a context that is missing or has no use.
            ShapeError: more tokens than the model has positions.
            ToolchainError: the backend failed.
        """
        for name, value in (("text", text), ("context", context)):
            if not isinstance(value, str) and not (name == "context" and value is None):
                raise wrong_argument(name, value, "text")
        codec = self.codec or TextCodec(self.bundle.folder)  # which says what is missing
        encoding = codec.encode_with_offsets(text, context)
        return predict(self.session, encoding, text, context)

    def run(
        self, input_ids: Iterable[Iterable[int]], attention_mask: Iterable[Iterable[int]] | None = None
    ) -> dict[str, Float32Array]:
        """The graph's outputs for a padded batch of token ids. Shapes: B texts, S tokens.

        Args:
            input_ids: [B, S], padded on either side.
            attention_mask: [B, S], 0 where there is padding; default: no padding.

        Returns:
            Output name -> float32 array: ``logits``, ``start_logits`` and ``end_logits``, or ``last_hidden_state`` and
            ``sentence_embedding``, by task.

        Raises:
            ConfigError: something else than rows of integers.
            ShapeError: rows of different lengths, an empty batch, or a token id outside the vocabulary.
            ToolchainError: the backend failed.
        """
        import numpy as np

        ids = _rows(input_ids, "input_ids")
        mask = None if attention_mask is None else np.array(_rows(attention_mask, "attention_mask"), np.int64)
        return self.session.run(ids, mask)


def _rows(value: Iterable[Iterable[int]], name: str) -> list[list[int]]:
    """Rows of one length.

    Raises:
        ConfigError: no rows of integers, or of several lengths.
    """
    expected = "rows of token ids (integers), all of one length"
    if not isinstance(value, Iterable):
        raise wrong_argument(name, value, expected)
    listed = [[*row] if isinstance(row, Iterable) and not isinstance(row, (str, bytes)) else [None] for row in value]
    rows = [[whole_number(item) for item in row] for row in listed]
    if len({len(row) for row in rows}) > 1 or any(item is None for row in rows for item in row):
        raise wrong_argument(name, value, expected)
    return [[item for item in row if item is not None] for row in rows]
