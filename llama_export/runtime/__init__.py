"""The production runtime: a bundle in, tokens out. Needs numpy, tokenizers and an engine (onnxruntime), nothing else."""

from llama_export.runtime.generation import Generation, TokenEvent, generate, generate_steps
from llama_export.runtime.prediction import predict
from llama_export.runtime.protocol import CacheSession
from llama_export.runtime.sampling import Sampler, TokenLogprobs
from llama_export.runtime.session import OnnxRuntimeHeadSession, OnnxRuntimeSession
from llama_export.runtime.text import TextCodec
from llama_export.sampling_params import SamplingParams

__all__ = [
    "CacheSession",
    "Generation",
    "OnnxRuntimeHeadSession",
    "OnnxRuntimeSession",
    "Sampler",
    "SamplingParams",
    "TextCodec",
    "TokenEvent",
    "TokenLogprobs",
    "generate",
    "generate_steps",
    "predict",
]
