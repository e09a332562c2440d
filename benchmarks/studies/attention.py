"""Attention: time and memory of each implementation by length, beside transformers; and what the KV cache saves."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import LlamaConfig
from llama_export.model.attention import ATTENTION_CLASSES
from llama_export.model.rope import LlamaRotaryEmbedding
from studies.tiny_llama import markdown

LENGTHS = (256, 512, 1024, 2048, 4096)
ROUNDS = 3
LAYER = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
"""The attention of Llama-3.2-1B: 32 query heads, 8 key/value heads of 64."""
NAMES = ("eager", "sdpa", "flash_attention_2", "transformers eager", "transformers sdpa")
TRAINING_TO = 2048
"""Tokens: longest backward pass. Eager attention keeps several [H, S, S] arrays for it."""


def attention_call(name: str, length: int) -> Callable[[Tensor], Tensor]:
    """[1, S, E] -> [1, S, E]: one attention layer with random weights, causal, without a cache."""
    config = config_from_dict(LAYER)
    rotary = LlamaRotaryEmbedding(config)
    rotary.set_frequencies()
    cos, sin = rotary(torch.arange(length).unsqueeze(0))
    torch.manual_seed(0)
    ours = ATTENTION_CLASSES["eager" if name.startswith("transformers") else name](config)
    if not name.startswith("transformers"):
        mask = torch.ones(1, length, dtype=torch.int64)
        return lambda hidden_states: ours(hidden_states, cos, sin, None, mask)[0]
    return _transformers_call(name.split()[1], config, ours.state_dict(), cos, sin)


def _transformers_call(
    implementation: str, config: LlamaConfig, weights: dict[str, Tensor], cos: Tensor, sin: Tensor
) -> Callable[[Tensor], Tensor]:
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    fields = {key: value for key, value in LAYER.items() if key not in ("model_type", "architectures")}
    their_config = TheirConfig(**fields)
    their_config._attn_implementation = implementation
    theirs = LlamaAttention(their_config, layer_idx=0)
    theirs.load_state_dict(weights)
    length = cos.shape[1]
    mask = None  # sdpa: causal by a flag
    if implementation == "eager":
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    embeddings = tuple(torch.cat((half, half), dim=-1) for half in (cos, sin))
    return lambda hidden_states: theirs(hidden_states, position_embeddings=embeddings, attention_mask=mask)[0]


def _peak_bytes(run: Callable[[], object]) -> int:
    """How far resident memory rises above where it stands while ``run`` runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def child(name: str) -> None:
    """Measures one implementation in this process; prints JSON."""
    found: dict[str, dict[str, Any]] = {}
    for length in LENGTHS:
        call = attention_call(name, length)
        x = torch.randn(1, length, LAYER["hidden_size"], generator=torch.Generator().manual_seed(1))

        def forward(call: Callable[[Tensor], Tensor] = call, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return call(x)

        def backward(call: Callable[[Tensor], Tensor] = call, x: Tensor = x) -> None:
            call(x.clone().requires_grad_()).square().sum().backward()

        entry: dict[str, Any] = {"sum": float(forward().double().abs().sum())}
        for kind, run in (("forward", forward), ("backward", backward)):
            if kind == "backward" and length > TRAINING_TO:
                continue
            run()
            repeats = 5 if length <= 1024 else 2
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            entry[kind] = {"seconds": statistics.median(seconds), "bytes": _peak_bytes(run)}
        found[str(length)] = entry
    json.dump(found, sys.stdout)


def measure() -> dict[str, Any]:
    """Seconds and peak memory by implementation and length: medians over rounds in which the implementations take turns."""
    # Every larger block is given back at once, so that the high-water mark shows what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", "import sys; from studies.attention import child; child(sys.argv[1])"]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for _ in range(ROUNDS):
        for name in NAMES:
            done = subprocess.run(
                [*command, name],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
                cwd=Path(__file__).parents[1],
            )
            rounds[name].append(json.loads(done.stdout))
    found: dict[str, Any] = {name: {} for name in NAMES}
    for name, several in rounds.items():
        for length in map(str, LENGTHS):
            entry = {}
            for kind in ("forward", "backward"):
                if kind in several[0][length]:
                    entry[kind] = {
                        key: statistics.median(one[length][kind][key] for one in several)
                        for key in ("seconds", "bytes")
                    }
            found[name][length] = entry
            # A benchmark of different results would be worth nothing.
            difference = abs(several[0][length]["sum"] / rounds["eager"][0][length]["sum"] - 1)
            if difference > 1e-5:
                raise SystemExit(f"{name} at {length} tokens computes another result: relative difference {difference}")
    return found


def table(found: dict[str, Any]) -> str:
    """Milliseconds and megabytes, forward alone and with the backward pass."""
    rows = []
    for kind, title in (("forward", "forward"), ("backward", "forward and backward")):
        for name, entries in found.items():
            cells = [
                f"{entry[kind]['seconds'] * 1000:.0f} ms, {entry[kind]['bytes'] / 1e6:.0f} MB"
                if kind in entry
                else "not run"
                for entry in entries.values()
            ]
            rows.append([f"{name}, {title}", *cells])
    return markdown(["implementation", *(f"{length} tokens" for length in LENGTHS)], rows)


CACHE_LENGTHS = (64, 128, 256, 512)


def measure_cache() -> dict[str, Any]:
    """Seconds for the next token of a 125-million-parameter model: from the cache, and by running the whole text again."""
    import tempfile

    from random_llama import write_random_checkpoint

    from llama_export.model import LlamaForCausalLM, load_reference

    shape = {
        **LAYER, "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "rope_theta": 10000.0,
    }  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_random_checkpoint(Path(folder) / "llama", shape)
        model = load_reference(Path(folder) / "llama", attn_implementation="sdpa")
        if not isinstance(model, LlamaForCausalLM):
            raise TypeError(type(model))
        for length in CACHE_LENGTHS:
            ids = torch.randint(0, 32000, (1, length + 1), generator=torch.Generator().manual_seed(length))
            cache, none, last = model.empty_cache(1, length + 1), torch.tensor([0]), torch.tensor([[0]])
            _, cache = model(ids[:, :-1], none, none + length, last, cache)

            def cached(ids: Tensor = ids, n: int = length, cache: Any = cache, last: Tensor = last) -> Tensor:
                return model(ids[:, -1:], torch.tensor([n]), torch.tensor([1]), last, cache)[0]

            def again(ids: Tensor = ids, n: int = length, last: Tensor = last) -> Tensor:
                empty = model.empty_cache(1, n + 1)
                return model(ids, torch.tensor([0]), torch.tensor([n + 1]), last + n, empty)[0]

            error = float((cached() - again()).abs().max() / again().abs().max())
            times: dict[str, list[float]] = {"cached": [], "again": []}
            for _ in range(5):
                for name, run in (("cached", cached), ("again", again)):
                    start = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - start)
            found[str(length)] = {name: statistics.median(values) for name, values in times.items()} | {"error": error}
    return found


def cache_table(found: dict[str, Any]) -> str:
    """Milliseconds per token."""
    rows = [
        [
            length, f"{entry['cached'] * 1000:.0f} ms", f"{entry['again'] * 1000:.0f} ms",
            f"{entry['again'] / entry['cached']:.1f}", f"{entry['error']:.1e}",
        ]
        for length, entry in found.items()
    ]  # fmt: skip
    header = ["tokens before", "from the cache", "whole text again", "ratio", "difference of the logits"]
    return markdown(header, rows)


def measure_cache_size() -> dict[str, Any]:
    """Bytes of cache per token at 16 bits, by the shapes that the model itself allocates."""
    from published_configs import PUBLISHED

    from llama_export.model import LlamaForCausalLM

    found = {}
    for name in (
        "huggyllama/llama-7b",
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-70B",
        "meta-llama/Llama-3.1-405B",
    ):
        config = config_from_dict(PUBLISHED[name][0])
        with torch.device("meta"):
            cache = LlamaForCausalLM(config).empty_cache(1, 1)
        found[name] = 2 * sum(key.numel() + value.numel() for key, value in cache)
    # From the papers' sizes: layers x 2 x heads x head size x 2 bytes (arXiv:2005.14165 table 2.1, arXiv:1910.10683 section 3.7).
    found["GPT-3 175B"] = 96 * 2 * 96 * 128 * 2
    found["T5-11B decoder"] = 24 * 2 * 128 * 128 * 2
    return found


def cache_size_table(found: dict[str, Any]) -> str:
    """KiB per token, GiB for a text of 8192."""
    rows = [[name, f"{size / 1024:.0f} KiB", f"{size * 8192 / 2**30:.1f} GiB"] for name, size in found.items()]
    return markdown(["model", "cache per token", "for 8192 tokens"], rows)
