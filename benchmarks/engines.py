"""The engines that are compared: what each makes of a checkpoint, and how it is loaded and asked.

Their files lie in one folder, ``work``, and are made once; ours are the bundle in the checkpoint's own folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from exporters import GENAI_BUILDER_NEEDS, export_command, genai_builder_command, version
from numpy.typing import NDArray

from llama_export.checkpoint.checkpoint import load_checkpoint

BASELINE = "llama_export"
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every engine is asked to do."""

    prompt: tuple[int, ...]
    new_tokens: int
    threads: int
    capacity: int
    """Tokens the key/value cache can hold."""
    every_position: bool = False
    """The logits of all of the prompt are wanted, not new tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prefill and its decode."""

    tokens: list[int]
    """New tokens only; the first comes out of the prefill."""
    prefill_seconds: float
    """From the prompt to the first token."""
    decode_seconds: float
    """All later tokens."""
    cpu_seconds: float = 0.0
    """Of all threads of the process, prefill and decode; with one thread other programs hardly change it."""
    resident_gb: float = 0.0
    """What the process holds afterwards, mapped files included."""

    @property
    def tokens_per_second(self) -> float:
        return (len(self.tokens) - 1) / self.decode_seconds


class Engine(ABC):
    """One way to run the model. ``prepare`` writes files, in the parent; the rest runs in a worker.

    Args:
        precision: ``float32``, ``int8`` or ``int4``.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision

    distributions: tuple[str, ...]
    """What must be installed; the first is the engine itself."""
    note = ""
    """How the engine was set up, for the reader of the table."""

    def missing(self) -> list[str]:
        """Distributions that are not installed."""
        return [name for name in self.distributions if version(name) is None]

    @abstractmethod
    def prepare(self, checkpoint: Path, work: Path) -> None:
        """Writes what ``load`` needs; does nothing when it is there."""

    @abstractmethod
    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        """Opens the model."""

    @abstractmethod
    def generate(self, workload: Workload) -> Run:
        """One greedy generation from an empty cache."""

    @abstractmethod
    def logits(self, workload: Workload) -> Logits:
        """[n, V] after each of the prompt's n tokens, from an empty cache; ``every_position`` was set at ``load``."""


class LlamaExportEngine(Engine):
    """The bundle in the checkpoint's own folder, through the project's session."""

    distributions = ("llama-export", "onnxruntime", "torch", "onnx", "onnxscript")
    note = "`llama_export.load`; static cache, in place"

    def prepare(self, checkpoint: Path, work: Path) -> None:
        if not (checkpoint / "manifest.json").exists():
            subprocess.run(export_command(checkpoint), check=True, capture_output=True)
        if self.precision != "float32":
            command = [sys.executable, "-m", "llama_export", "quantize", str(checkpoint), "--type", self.precision]
            subprocess.run([*command, "--force"], check=True, capture_output=True)

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        import llama_export

        self.llm = llama_export.load(
            checkpoint, max_seq_len=workload.capacity, threads=workload.threads,
            quantize=None if self.precision == "float32" else self.precision,
        )  # fmt: skip

    def generate(self, workload: Workload) -> Run:
        from llama_export.runtime.generation import generate

        # Not `llm.complete`: it would find the prompt of the warm-up in the cache and compute its last token only.
        made = generate(self.llm.session, [workload.prompt], max_new_tokens=workload.new_tokens)
        return Run(tokens=made.tokens[0], prefill_seconds=made.prefill_seconds, decode_seconds=made.decode_seconds)

    def logits(self, workload: Workload) -> Logits:
        session = self.llm.session
        session.reset()
        ids = np.array([workload.prompt], np.int64)
        found: Logits = session.step(ids, logits_index=np.arange(ids.size)[None])[0]
        return found


class GenAIEngine(Engine):
    """onnxruntime-genai on the model of its own builder."""

    distributions = GENAI_BUILDER_NEEDS
    note = "`og.Generator`; cache shared between past and present"

    def _folder(self, work: Path) -> Path:
        return work / ("onnxruntime-genai" if self.precision == "float32" else f"onnxruntime-genai-{self.precision}")

    def prepare(self, checkpoint: Path, work: Path) -> None:
        folder, precision = self._folder(work), {"float32": "fp32"}.get(self.precision, self.precision)
        if not (folder / "genai_config.json").exists():
            command = genai_builder_command(checkpoint, folder, work / "cache", precision=precision)
            subprocess.run(command, check=True, capture_output=True)

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(self._folder(work)))
        decoder = {"session_options": {"intra_op_num_threads": workload.threads}}
        # Without an end-of-sequence token the generation never stops early.
        config.overlay(json.dumps({"model": {"eos_token_id": [], "decoder": decoder}}))
        self.model = og.Model(config)

    def _generator(self, workload: Workload) -> Any:
        import onnxruntime_genai as og

        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=workload.capacity, do_sample=False, past_present_share_buffer=True)
        return og.Generator(self.model, params)

    def generate(self, workload: Workload) -> Run:
        generator = self._generator(workload)
        tokens: list[int] = []
        clock = _Clock()
        generator.append_tokens(np.array([workload.prompt], np.int32))
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        clock.prefill_done()
        for _ in range(workload.new_tokens - 1):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return clock.run(tokens)

    def logits(self, workload: Workload) -> Logits:
        generator = self._generator(workload)
        generator.append_tokens(np.array([workload.prompt], np.int32))
        # `get_logits` has the last position only.
        return np.array(generator.get_output("logits")[0], np.float32)


class LlamaCppEngine(Engine):
    """llama.cpp on a GGUF file, through llama-cpp-python: float32, q8_0 or q4_0."""

    distributions = ("llama-cpp-python", "gguf", "safetensors")
    note = "`Llama.eval`, greedy sampler; float32 cache"

    def _path(self, work: Path) -> Path:
        return work / {"float32": "llama.gguf", "int8": "llama-q8_0.gguf", "int4": "llama-q4_0.gguf"}[self.precision]

    def prepare(self, checkpoint: Path, work: Path) -> None:
        path = self._path(work)
        if path.exists():
            return
        if self.precision == "float32":
            write_gguf(checkpoint, path)
            return
        import llama_cpp

        LlamaCppEngine("float32").prepare(checkpoint, work)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = {"int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[
            self.precision
        ]
        partial = path.with_suffix(".partial")
        source = LlamaCppEngine("float32")._path(work)
        if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params) != 0:
            raise RuntimeError(f"llama.cpp could not quantise {source}")
        partial.rename(path)

    def matrices(self, work: Path) -> dict[str, list[str]]:
        """Type -> the matrices stored so: llama.cpp's own choice, by tensor and by the length of its rows."""
        import gguf

        found: dict[str, list[str]] = {}
        for tensor in gguf.GGUFReader(str(self._path(work))).tensors:
            if len(tensor.shape) > 1:
                found.setdefault(tensor.tensor_type.name, []).append(tensor.name)
        return found

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(
            str(self._path(work)),
            n_ctx=workload.capacity,
            n_batch=512,
            n_threads=workload.threads,
            n_threads_batch=workload.threads,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            logits_all=workload.every_position,
            verbose=False,
        )
        self.sampler = llama_cpp.llama_sampler_init_greedy()

    def generate(self, workload: Workload) -> Run:
        import llama_cpp

        def next_token() -> int:
            return int(llama_cpp.llama_sampler_sample(self.sampler, self.llama.ctx, -1))

        self.llama.reset()
        clock = _Clock()
        self.llama.eval(workload.prompt)
        tokens = [next_token()]
        clock.prefill_done()
        for _ in range(workload.new_tokens - 1):
            self.llama.eval(tokens[-1:])
            tokens.append(next_token())
        return clock.run(tokens)

    def logits(self, workload: Workload) -> Logits:
        self.llama.reset()
        self.llama.eval(workload.prompt)
        return np.array(self.llama.scores[: len(workload.prompt)])


class TransformersEngine(Engine):
    """The reference implementation, eager, as most people run it first."""

    distributions = ("transformers", "torch")
    note = "eager PyTorch, sdpa attention; dynamic cache"

    def prepare(self, checkpoint: Path, work: Path) -> None:
        """Reads the checkpoint as it is."""

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(workload.threads)
        self.model = LlamaForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def generate(self, workload: Workload) -> Run:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)

        def step(ids: Sequence[int]) -> int:
            result = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(result.logits[0, -1].argmax())

        with torch.inference_mode():
            clock = _Clock()
            tokens = [step(workload.prompt)]
            clock.prefill_done()
            for _ in range(workload.new_tokens - 1):
                tokens.append(step(tokens[-1:]))
            return clock.run(tokens)

    def logits(self, workload: Workload) -> Logits:
        import torch

        with torch.inference_mode():
            found: Logits = self.model(torch.tensor([workload.prompt])).logits[0].numpy()
        return found


class _Clock:
    """Times the two phases of one generation."""

    def __init__(self) -> None:
        self.start = self.first = time.perf_counter()

    def prefill_done(self) -> None:
        self.first = time.perf_counter()

    def run(self, tokens: list[int]) -> Run:
        return Run(
            tokens=tokens, prefill_seconds=self.first - self.start, decode_seconds=time.perf_counter() - self.first
        )


ENGINES: dict[str, tuple[type[Engine], str]] = {
    BASELINE: (LlamaExportEngine, "float32"),
    "onnxruntime-genai": (GenAIEngine, "float32"),
    "llama.cpp": (LlamaCppEngine, "float32"),
    "transformers": (TransformersEngine, "float32"),
    f"{BASELINE} int8": (LlamaExportEngine, "int8"),
    "llama.cpp q8_0": (LlamaCppEngine, "int8"),
    f"{BASELINE} int4": (LlamaExportEngine, "int4"),
    "onnxruntime-genai int4": (GenAIEngine, "int4"),
    "llama.cpp q4_0": (LlamaCppEngine, "int4"),
}
"""Name -> engine and precision; one of ours comes first in each precision, and the others are compared with it."""


def make_engine(name: str) -> Engine:
    """An engine of the table."""
    kind, precision = ENGINES[name]
    return kind(precision)


def own_engine(name: str) -> str:
    """Ours at the precision of an engine."""
    return next(own for own, (_, precision) in ENGINES.items() if precision == ENGINES[name][1])


def engine_versions() -> dict[str, str]:
    """Of what the engines need, as far as it is installed."""
    packages = dict.fromkeys(item for kind, _ in ENGINES.values() for item in kind.distributions)
    return {name: found for name in packages if (found := version(name))}


# --- The inputs of llama.cpp -----------------------------------------------------------------------------------------


def interleave_rope_pairs(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorders the rows of a query or key projection from Hugging Face's RoPE layout to llama.cpp's.

    A checkpoint rotates rows i and i + D/2 of each head together, llama.cpp rows 2i and 2i + 1.

    Args:
        weight: [heads * D, E].
        heads: query heads for the query, key/value heads for the key.
    """
    E = weight.shape[1]
    return weight.reshape(heads, 2, -1, E).swapaxes(1, 2).reshape(-1, E)


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Writes a checkpoint of plain RoPE, no biases and one file as a float32 GGUF file.

    It has no vocabulary: llama.cpp is driven by token ids.

    Raises:
        ValueError: another kind of RoPE.
    """
    import gguf
    from safetensors import safe_open

    config = load_checkpoint(checkpoint).config
    if config.rope.rope_type != "default":
        raise ValueError(f"the GGUF writer knows plain RoPE alone, not {config.rope.rope_type}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name(checkpoint.name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:  # NumPy has no bfloat16
        for name in tensors.keys():
            value = tensors.get_tensor(name).float().numpy()
            if name.endswith("q_proj.weight"):
                value = interleave_rope_pairs(value, heads)
            elif name.endswith("k_proj.weight"):
                value = interleave_rope_pairs(value, kv_heads)
            writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
