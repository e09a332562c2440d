"""The MLP: activations side by side, and a decoder layer split over processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import LlamaConfig
from llama_export.model import load_reference, tensor_parallel
from llama_export.model.decoder import LlamaDecoderLayer, LlamaModel
from llama_export.model.mlp import ACTIVATIONS, LlamaMLP
from llama_export.model.rope import LlamaRotaryEmbedding
from studies.attention import LAYER
from studies.tiny_llama import CHECKPOINT, LanguageModel, markdown, small_config, streams, train

SEEDS = (0, 1, 2)
STEPS = 300
GATED = ("silu", "gelu", "relu", "sigmoid", "linear")
PLAIN = ("silu", "gelu", "relu")


class PlainMLP(nn.Module):
    """``down(act(up(x)))`` with as many parameters as the gated one: half again as wide."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        inner = config.intermediate_size * 3 // 2
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]"""
        down: Tensor = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return down


def measure() -> dict[str, Any]:
    """Held-out loss of equally large models after 300 steps, by activation."""
    found: dict[str, Any] = {}
    for kind, names in (("gated", GATED), ("plain", PLAIN)):
        for name in names:
            losses = []
            for seed in SEEDS:
                config = small_config(hidden_act=name)
                decoder = LlamaModel(config, "sdpa")
                if kind == "plain":
                    for layer in decoder.layers:
                        layer.mlp = PlainMLP(config)  # type: ignore[assignment]
                model = LanguageModel(decoder, seed)
                losses.append(train(model, steps=STEPS, seed=seed, learning_rate=3e-3, warmup=30))
            parameters = sum(parameter.numel() for parameter in model.parameters())
            found[f"{name}, {kind}"] = {"parameters": parameters, "median": statistics.median(losses), "all": losses}
            print(name, kind, found[f"{name}, {kind}"], flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """One row per activation."""
    rows = [
        [name, f"{row['parameters']:,}", f"{row['median']:.3f}", f"{min(row['all']):.3f}-{max(row['all']):.3f}"]
        for name, row in found.items()
    ]
    return markdown(["activation", "parameters", "held-out loss, nats per token", "three seeds"], rows)


def measure_gates(tokens: int = 512) -> dict[str, Any]:
    """Layer -> share of gate values below zero in tiny-llama, and the mean slope of SiLU there (ReLU's is 0)."""
    model = load_reference(CHECKPOINT)
    found: dict[str, Any] = {}
    for i, layer in enumerate(model.model.layers):

        def keep(module: LlamaMLP, inputs: tuple[Tensor], output: Tensor, i: int = i) -> None:
            gate = module.gate_proj(inputs[0]).double()
            sigmoid = torch.sigmoid(gate)
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            below = gate < 0
            found[str(i)] = {"below zero": float(below.double().mean()), "slope": float(slope[below].abs().mean())}

        layer.mlp.register_forward_hook(keep)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        model.model(torch.from_numpy(streams()[1][:tokens]).unsqueeze(0))
    return found


def gates_table(found: dict[str, Any]) -> str:
    """One row per layer."""
    rows = [[layer, f"{row['below zero']:.0%}", f"{row['slope']:.3f}"] for layer, row in found.items()]
    return markdown(["layer", "gate values below zero", "mean size of SiLU's slope there"], rows)


RANKS = (1, 2, 4)
TOKENS = 256


def rank(rank: int, world: int, store: str, result: str) -> None:
    """One rank of :func:`measure_ranks`: the decoder layer of Llama-3.2-1B, split; rank 0 writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    config = config_from_dict(LAYER)
    layer = LlamaDecoderLayer(config, "sdpa").requires_grad_(False)
    rotary = LlamaRotaryEmbedding(config)
    rotary.set_frequencies()
    cos, sin = rotary(torch.arange(TOKENS).unsqueeze(0))
    x, mask = torch.randn(1, TOKENS, config.hidden_size), torch.ones(1, TOKENS, dtype=torch.int64)

    def run() -> Tensor:
        hidden_states, residual, _ = layer(x, None, cos, sin, None, mask)
        return hidden_states + residual

    want = run()
    tensor_parallel(layer)
    sent = 0
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    error = float((run() - want).abs().max() / want.abs().max())
    dist.all_reduce = reduce
    seconds = []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        weights = sum(parameter.numel() * 4 for parameter in layer.parameters())
        found = {
            "seconds": statistics.median(seconds),
            "weight_bytes": weights,
            "reduced_per_token": sent / TOKENS,
            "error": error,
        }
        Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


def measure_ranks() -> dict[str, Any]:
    """Ranks -> time of a layer over 256 tokens with one thread a rank, weights per rank, bytes summed per token, error."""
    found: dict[str, Any] = {}
    command = [
        sys.executable,
        "-c",
        "import sys; from studies.mlp import rank; rank(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for world in RANKS:
            result = Path(folder) / f"{world}.json"
            ranks = [
                subprocess.Popen([*command, str(i), str(world), f"{folder}/store-{world}", str(result)],
                                 cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"})
                for i in range(world)
            ]  # fmt: skip
            if any(process.wait() for process in ranks):
                raise SystemExit(f"a rank of {world} failed")
            found[str(world)] = json.loads(result.read_text())
    return found


def ranks_table(found: dict[str, Any]) -> str:
    """One row per number of processes."""
    first = found["1"]["seconds"]
    rows = [
        [world, f"{row['weight_bytes'] / 1e6:.0f} MB", f"{row['reduced_per_token'] / 1024:.0f} KiB", f"{row['seconds'] * 1000:.0f} ms",
         f"{first / row['seconds']:.2f}", f"{row['error']:.1e}"]
        for world, row in found.items()
    ]  # fmt: skip
    return markdown(
        [
            "processes",
            "weights on each",
            "all-reduced per token",
            "time",
            "speed, one = 1",
            "difference from the whole layer",
        ],
        rows,
    )
