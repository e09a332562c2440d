"""The production runtime: a bundle in, tokens out. Needs numpy, tokenizers and an engine (onnxruntime), nothing else."""

from llama_export.runtime.generation import Generation, generate
from llama_export.runtime.prediction import predict
from llama_export.runtime.session import OnnxRuntimeHeadSession, OnnxRuntimeSession
from llama_export.runtime.text import TextCodec

__all__ = ["Generation", "OnnxRuntimeHeadSession", "OnnxRuntimeSession", "TextCodec", "generate", "predict"]
