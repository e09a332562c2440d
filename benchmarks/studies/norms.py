"""RMSNorm: what epsilon does to small inputs, what the order of rounding is worth, and where the norm stands in a layer."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from llama_export.config.llama import LlamaConfig
from llama_export.model import load_reference
from llama_export.model.attention import KeyValue, LayerCache
from llama_export.model.decoder import LlamaDecoderLayer, LlamaModel
from llama_export.model.rms_norm import LlamaRMSNorm
from llama_export.ops import torch_ops
from studies.tiny_llama import CHECKPOINT, LanguageModel, markdown, small_config, streams, train

SIZES = (1e3, 1.0, 1e-2, 1e-3, 1e-4, 1e-5)


def measure() -> dict[str, Any]:
    """Size (RMS) of the input -> RMS of the output with weight 1: exact is size / sqrt(size^2 + epsilon)."""
    direction = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction /= direction.square().mean().sqrt()
    ones = torch.ones(4096)
    found: dict[str, Any] = {}
    for size in (*SIZES, 0.0):
        x = direction * size
        half = x.half()
        found[f"{size:g}"] = {
            "float32, 1e-5": _rms(torch_ops.rms_norm(x.float(), ones, 1e-5)),
            "float32, 1e-6": _rms(torch_ops.rms_norm(x.float(), ones, 1e-6)),
            "float16, 1e-5": _rms(torch_ops.rms_norm(half, ones.half(), 1e-5)),
            "float16 throughout, 1e-5": _rms(_all_in_half(half, 1e-5)),
            "float32, 0": _rms(torch_ops.rms_norm(x.float(), ones, 0.0)),
        }
    return found


def _all_in_half(x: Tensor, epsilon: float) -> Tensor:
    """What a norm computes that squares and averages in float16."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + torch.tensor(epsilon, dtype=torch.float16))


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def table(found: dict[str, Any]) -> str:
    """One row per input size."""
    columns = list(next(iter(found.values())))
    rows = [[size, *(f"{row[column]:.4g}" for column in columns)] for size, row in found.items()]
    return markdown(["RMS of the input", *columns], rows)


def activations(tokens: int = 512) -> dict[str, tuple[Tensor, Tensor]]:
    """Norm's name -> its input and output in tiny-llama on text it never saw, each [S, E]."""
    model = load_reference(CHECKPOINT)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, LlamaRMSNorm):

            def keep(_: Any, __: Any, output: tuple[Tensor, Tensor], name: str = name) -> None:
                normed, x = output
                found[name.removeprefix("model.")] = (x[0], normed[0])

            hooks.append(module.register_forward_hook(keep))
    _, held_out = streams()
    with torch.no_grad():
        model.model(torch.from_numpy(held_out[:tokens]).unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return found


def measure_activations() -> dict[str, Any]:
    """Norm's name -> RMS of single tokens before it (smallest, median, largest) and after it."""
    found = {}
    for name, (x, normed) in activations().items():
        before = x.double().square().mean(-1).sqrt()
        after = normed.double().square().mean(-1).sqrt()
        found[name] = {
            "smallest": float(before.min()), "median": float(before.median()), "largest": float(before.max()),
            "after": float(after.median()),
        }  # fmt: skip
    return found


def activations_table(found: dict[str, Any]) -> str:
    """One row per norm, in the order of the forward pass."""
    rows = [[f"`{name}`", *(f"{value:.3g}" for value in row.values())] for name, row in found.items()]
    return markdown(["norm", "before: smallest token", "median token", "largest token", "after: median token"], rows)


class PostNormLayer(LlamaDecoderLayer):
    """The same parts in the order of the first Transformer: ``x1 = Norm(x + Attention(x))``, ``x2 = Norm(x1 + MLP(x1))``."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        past: LayerCache | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, KeyValue | None]:
        x = hidden_states if residual is None else hidden_states + residual
        attended, present = self.self_attn(x, cos, sin, past, attention_mask)
        x1, _ = self.input_layernorm(attended, x)
        x2, _ = self.post_attention_layernorm(self.mlp(x1), x1)
        return x2, torch.zeros_like(x2), present


LAYERS = 16
SEEDS = (0, 1, 2)
STEPS = 150


def decoder(config: LlamaConfig, layer: type[LlamaDecoderLayer]) -> LlamaModel:
    """A decoder of such layers."""
    found = LlamaModel(config, "sdpa")
    for i in range(config.num_hidden_layers):
        found.layers[i] = layer(config, "sdpa")
    return found


def measure_place() -> dict[str, Any]:
    """Gradients of a fresh 16-layer model by layer, and the held-out loss after 150 steps with and without warm-up."""
    text, _ = streams()
    ids = torch.from_numpy(text[: 8 * 128].reshape(8, 128))
    found: dict[str, Any] = {}
    for name, layer in (("before each block (Llama)", LlamaDecoderLayer), ("after each sum", PostNormLayer)):
        runs: dict[str, list[float]] = {"first": [], "middle": [], "last": [], "no warm-up": [], "warm-up": []}
        for seed in SEEDS:
            model = LanguageModel(decoder(small_config(num_hidden_layers=LAYERS), layer), seed)
            model.loss(ids).backward()
            norms = [float(model.decoder.layers[i].mlp.down_proj.weight.grad.norm()) for i in range(LAYERS)]  # type: ignore[union-attr]
            for place, at in (("first", 0), ("middle", LAYERS // 2), ("last", -1)):
                runs[place].append(norms[at])
            for warmup_name, warmup in (("no warm-up", 0), ("warm-up", 50)):
                model = LanguageModel(decoder(small_config(num_hidden_layers=LAYERS), layer), seed)
                runs[warmup_name].append(train(model, steps=STEPS, seed=seed, learning_rate=3e-3, warmup=warmup))
            print(name, seed, {key: values[-1] for key, values in runs.items()}, flush=True)
        found[name] = {key: {"median": statistics.median(values), "all": values} for key, values in runs.items()}
    return found


def place_table(found: dict[str, Any]) -> str:
    """Medians over seeds."""
    header = [
        "norm",
        "gradient, first layer",
        "middle layer",
        "last layer",
        "loss, no warm-up",
        "loss, 50 steps of warm-up",
    ]
    rows = [
        [name, *(f"{row[key]['median']:.2g}" for key in ("first", "middle", "last")),
         *(f"{row[key]['median']:.2f} ({min(row[key]['all']):.2f}-{max(row[key]['all']):.2f})" for key in ("no warm-up", "warm-up"))]
        for name, row in found.items()
    ]  # fmt: skip
    return markdown(header, rows)
