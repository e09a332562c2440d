"""Writes a random Llama checkpoint of a given shape, streamed tensor by tensor: memory stays small at any size.

    python benchmarks/random_llama.py build/llama-125m
    python benchmarks/random_llama.py build/small --hidden-size 256 --layers 2 --dtype bfloat16

The default shape has 125 million parameters: hidden 768, 12 layers, 12 heads, 4 key/value heads, MLP 2048,
vocabulary 32000. Weights are normal with the usual 0.02, norms are 1; a seed gives the same bytes every time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_export.config.decoder import count_parameters, expected_tensors
from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import LlamaConfig

_STORED = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}


def write_random_checkpoint(
    folder: Path, config: dict[str, object], *, dtype: str = "float32", seed: int = 0, lively: bool = False
) -> LlamaConfig:
    """Writes ``config.json`` and one ``model.safetensors`` of the given dtype.

    Args:
        lively: weights as large as training leaves them (matrices 1 / sqrt(fan-in), norms around 1, biases around 0),
            so that every part of the model has a say in its result.
    """
    parsed, header = _write_config(folder, config, dtype)
    numpy_dtype = _STORED[dtype][1]
    rng = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        for name, shape in expected_tensors(parsed).items():
            noise = rng.standard_normal(shape, np.float32)
            if name.endswith("norm.weight"):
                values = 1 + np.float32(0.2) * noise if lively else np.ones(shape, np.float32)
            else:
                values = noise * np.float32(shape[-1] ** -0.5 if lively and len(shape) > 1 else 0.2 if lively else 0.02)
            stream.write(values.astype(numpy_dtype).tobytes())
    return parsed


def random_config(rng: np.random.Generator) -> dict[str, object]:
    """A small causal LM of awkward shape: any grouping, any RoPE type, biases or none, embeddings tied or not.

    transformers wants the hidden size to be a multiple of the heads even where ``head_dim`` is given.
    """
    heads = int(rng.choice([2, 3, 4, 6, 8]))
    groups = int(rng.choice([n for n in (1, 2, 3, 4, 6, 8) if heads % n == 0]))
    head_dim = int(rng.choice([8, 16, 32, 64]))
    context, trained = 128, 48
    rope_type = str(rng.choice(["default", "linear", "dynamic", "llama3", "yarn", "longrope"]))
    scaling: dict[str, object] = {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 4.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": trained},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": trained},
        "longrope": {
            "factor": 4.0, "original_max_position_embeddings": trained,
            "short_factor": [1 + 0.05 * i for i in range(head_dim // 2)],
            "long_factor": [1.5 + 0.7 * i for i in range(head_dim // 2)],
        },
    }[rope_type]  # fmt: skip
    return {
        "hidden_size": heads * int(rng.choice([8, 10, 14])), "num_hidden_layers": int(rng.integers(2, 6)),
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim,
        "intermediate_size": int(rng.choice([56, 80, 128])), "vocab_size": int(rng.choice([97, 160, 257])),
        "max_position_embeddings": context if rope_type != "dynamic" else trained, "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
        "tie_word_embeddings": bool(rng.integers(2)), "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)), "hidden_act": str(rng.choice(["silu", "silu", "silu", "gelu_pytorch_tanh"])),
        "rope_parameters": {"rope_type": rope_type, "rope_theta": float(rng.choice([10000.0, 500000.0])), **scaling},
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def write_hollow_checkpoint(folder: Path, config: dict[str, object], *, dtype: str = "bfloat16") -> LlamaConfig:
    """The same with a hole in the place of the weights: 800 GB that take no disk and read as zeros."""
    parsed, header = _write_config(folder, config, dtype)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + count_parameters(parsed) * _STORED[dtype][1].itemsize)
    return parsed


def _write_config(folder: Path, config: dict[str, object], dtype: str) -> tuple[LlamaConfig, bytes]:
    """Writes ``config.json``; gives it parsed, and the header of its safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": dtype, **config}
    parsed = config_from_dict(data)
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    code, numpy_dtype = _STORED[dtype]
    entries: dict[str, object] = {}
    end = 0
    for name, shape in expected_tensors(parsed).items():
        begin, end = end, end + math.prod(shape) * numpy_dtype.itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    return parsed, len(raw).to_bytes(8, "little") + raw


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--max-positions", type=int, default=2048, help="tokens")
    parser.add_argument("--tied", action="store_true", help="tie the output projection to the embedding")
    parser.add_argument("--dtype", choices=sorted(_STORED), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = write_random_checkpoint(
        args.folder,
        {
            "hidden_size": args.hidden_size, "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads, "intermediate_size": args.mlp, "vocab_size": args.vocabulary,
            "max_position_embeddings": args.max_positions, "rms_norm_eps": 1e-5, "tie_word_embeddings": args.tied,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        dtype=args.dtype,
        seed=args.seed,
    )  # fmt: skip
    print(f"{args.folder}: {count_parameters(config):,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()
