"""The PyTorch reference Llama: what a checkpoint computes, in the order of the forward pass.

Read ``rms_norm``, ``rope``, ``attention``, ``mlp``, ``decoder``, ``heads``, ``loading``, ``tensor_parallel``. Nothing here knows of ONNX or
TensorRT; the fused steps are the custom ops of :mod:`llama_export.ops`, whose eager bodies are plain PyTorch.

Shape letters: B batch, S new tokens, N wanted positions, C kv_cache_capacity, E hidden_size, H query heads,
G key/value heads, D head_dim, V vocabulary.
"""

from llama_export.model.heads import (
    MODEL_CLASSES,
    LlamaForCausalLM,
    LlamaForFeatureExtraction,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaWithHead,
)
from llama_export.model.loading import load_reference
from llama_export.model.tensor_parallel import tensor_parallel

__all__ = [
    "MODEL_CLASSES", "LlamaForCausalLM", "LlamaForFeatureExtraction", "LlamaForQuestionAnswering",
    "LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaWithHead", "load_reference",
    "tensor_parallel",
]  # fmt: skip
