"""The reference and the evaluator behind the same small interface as the runtime's sessions.

So one stage, written once, compares any two of them: prefill, chunks and decode steps are calls of :meth:`step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_export.config.llama import LlamaConfig
from llama_export.errors import MissingDependencyError, ToolchainError
from llama_export.graph.kv_cache import cache_names, cache_shape
from llama_export.model import LlamaForCausalLM
from llama_export.parity.calls import Answers, Call
from llama_export.parity.oracle.evaluator import GraphEvaluator
from llama_export.parity.tensors import to_numpy
from llama_export.runtime.onnxruntime_graph import OpenGraph

Array = NDArray[Any]


class Session(Protocol):
    """A model with a static KV cache. See :class:`llama_export.runtime.onnxruntime_session.OnnxRuntimeSession`."""

    past_length: NDArray[np.int64]

    def step(self, input_ids: Any, *, sequence_length: Any = None, logits_index: Any = None) -> Array:
        """[B, S] token ids -> logits [B, N, V]; the cache grows by ``sequence_length``."""
        ...

    def cache_array(self, name: str) -> Array:
        """One cache tensor [B, G, C, D]."""
        ...


Forward = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Graph inputs -> graph outputs, by name."""


class TorchSession:
    """A cache in torch tensors around any function with the graph's inputs and outputs.

    Args:
        forward: the model.
        config: of the checkpoint.
        dtype: of the cache.
        max_seq_len: C, tokens. batch_size: B, rows.
    """

    def __init__(
        self, forward: Forward, config: LlamaConfig, dtype: torch.dtype, *, max_seq_len: int, batch_size: int = 1
    ) -> None:
        self._forward = forward
        self._names = list(cache_names(config.num_hidden_layers))
        shape = cache_shape(config, batch_size, max_seq_len)
        self._cache = {past: torch.zeros(shape, dtype=dtype) for past, _ in self._names}
        self.past_length: NDArray[np.int64] = np.zeros(batch_size, np.int64)

    def step(self, input_ids: Any, *, sequence_length: Any = None, logits_index: Any = None) -> Array:
        """See :class:`Session`."""
        ids = torch.as_tensor(np.asarray(input_ids), dtype=torch.int64)
        lengths = np.full(ids.shape[0], ids.shape[1]) if sequence_length is None else np.asarray(sequence_length)
        index = lengths[:, None] - 1 if logits_index is None else np.asarray(logits_index)
        outputs = self._forward(
            {
                "input_ids": ids,
                "past_length": torch.from_numpy(self.past_length.copy()),
                "sequence_length": torch.as_tensor(lengths, dtype=torch.int64),
                "logits_index": torch.as_tensor(index, dtype=torch.int64),
                **self._cache,
            }
        )
        self._cache = {past: outputs[present] for past, present in self._names}
        self.past_length += lengths
        return to_numpy(outputs["logits"])

    def cache_array(self, name: str) -> Array:
        """See :class:`Session`."""
        return to_numpy(self._cache[name])


def reference_session(model: LlamaForCausalLM, *, max_seq_len: int, batch_size: int = 1) -> TorchSession:
    """The reference model as a session."""
    names = list(cache_names(model.config.num_hidden_layers))

    def forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = [inputs[past] for past, _ in names]
        past = list(zip(flat[::2], flat[1::2], strict=True))
        with torch.no_grad():
            logits, present = model(
                inputs["input_ids"], inputs["past_length"], inputs["sequence_length"], inputs["logits_index"], past
            )
        tensors = [tensor for pair in present for tensor in pair]
        return {"logits": logits, **{name: tensor for (_, name), tensor in zip(names, tensors, strict=True)}}

    dtype = model.model.norm.weight.dtype
    return TorchSession(forward, model.config, dtype, max_seq_len=max_seq_len, batch_size=batch_size)


def evaluator_session(
    evaluator: GraphEvaluator, config: LlamaConfig, *, max_seq_len: int, batch_size: int = 1
) -> TorchSession:
    """The exported graph as a session."""
    return TorchSession(evaluator.run, config, evaluator.model_dtype, max_seq_len=max_seq_len, batch_size=batch_size)


class TransformersSession:
    """Hugging Face's own model with its own cache: one row, no padding.

    Args:
        model: a ``transformers.LlamaForCausalLM`` in eval mode.
    """

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self.past_length: NDArray[np.int64] = np.zeros(1, np.int64)

    def step(self, input_ids: Any, *, sequence_length: Any = None, logits_index: Any = None) -> Array:
        """See :class:`Session`; rows are whole."""
        ids = torch.as_tensor(np.asarray(input_ids), dtype=torch.int64)
        with torch.no_grad():
            logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits
        self.past_length += ids.shape[1]
        index = [[ids.shape[1] - 1]] if logits_index is None else logits_index
        return to_numpy(logits[:, np.asarray(index)[0]])

    def cache_array(self, name: str) -> Array:
        """[1, G, past_length, D]; ``name`` as in the graph."""
        _, layer, part = name.split(".")
        entry = self._cache.layers[int(layer)]
        return to_numpy(entry.keys if part == "key" else entry.values)


def graph_from_proto(model: onnx.ModelProto, folder: Path, what: str) -> OpenGraph:
    """A graph in memory, opened by onnxruntime on the CPU.

    Args:
        model: its weights may lie in files.
        folder: where these are.
        what: it is, for the error.

    Raises:
        MissingDependencyError: no onnxruntime. ToolchainError: onnxruntime cannot open it.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as err:
        raise MissingDependencyError("onnxruntime", "cpu") from err
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as err:
        raise ToolchainError(
            f"onnxruntime cannot open {what}", details={"reason": err}, hint="see `llama-export env`"
        ) from err
    return OpenGraph(onnxruntime, session, None)


def answers(session: Session, calls: Sequence[Call], names: Sequence[str]) -> Answers:
    """What a session makes of the calls; ``names`` are the cache tensors to keep."""
    logits = [
        session.step(one.input_ids, sequence_length=one.sequence_length, logits_index=one.logits_index) for one in calls
    ]
    return Answers.to(calls, logits, {name: np.array(session.cache_array(name)) for name in names})
