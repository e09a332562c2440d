"""Tensor parallelism of the reference: every rank holds some heads and some columns of the MLP, and sums are shared.

A column-parallel projection (q, k, v, gate, up) keeps its rank's rows of the weight and needs no communication. The
row-parallel projection behind it (o, down) keeps the matching columns, and its partial sums are added over all ranks: one
all-reduce each, two per decoder layer. Embedding, norms and the head are whole on every rank.

Source: https://arxiv.org/abs/1909.08053 (Megatron-LM, section 3), whose conjugate operators f and g are
:class:`_CopyToRanks` and :class:`_SumOverRanks`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llama_export.errors import ConfigError
from llama_export.model.attention import LlamaAttention
from llama_export.model.decoder import LlamaDecoderLayer
from llama_export.model.mlp import LlamaMLP

Model = TypeVar("Model", bound=nn.Module)


def tensor_parallel(model: Model, group: dist.ProcessGroup | None = None) -> Model:
    """Splits a model over the ranks of a process group, in place; call it on every rank with the same weights.

    Rank r of W keeps query heads r*H/W .. (r+1)*H/W - 1 with the key/value heads they share, and as many columns of the
    MLP. Inputs and outputs stay those of the whole model, except for the KV cache, which holds the rank's own heads
    (``empty_cache`` makes it so). Gradients of split weights are the rank's part of the whole model's, those of whole
    weights equal it. ``state_dict`` holds the rank's part.

    Args:
        model: a reference model of :mod:`llama_export.model`, with weights.
        group: ranks to split over; None: all of ``torch.distributed``.

    Raises:
        ConfigError: no process group, or heads or MLP columns that do not divide evenly.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "there are no ranks to split over",
            details={"got": "torch.distributed is not initialised"},
            hint="torchrun --nproc-per-node 2 script.py, and torch.distributed.init_process_group('gloo') in the script",
        )
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    layers = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    for layer in layers:
        _check_divisible(layer, world)
    for layer in layers:
        _split_attention(layer.self_attn, rank, world, group)
        _split_mlp(layer.mlp, rank, world, group)
    return model


def _check_divisible(layer: LlamaDecoderLayer, world: int) -> None:
    attention = layer.self_attn
    sizes = {
        "num_key_value_heads": attention.num_kv_heads,
        "num_attention_heads": attention.num_heads,
        "intermediate_size": layer.mlp.gate_proj.out_features,
    }
    for name, size in sizes.items():
        if size % world:
            raise ConfigError(
                f"{name} = {size} cannot be split over {world} ranks",
                details={"got": size, "expected": f"a multiple of {world}"},
                hint="use fewer ranks: key/value heads are not replicated",
            )


def _split_attention(attention: LlamaAttention, rank: int, world: int, group: dist.ProcessGroup | None) -> None:
    attention.num_heads //= world
    attention.num_kv_heads //= world
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, ColumnParallelLinear(getattr(attention, name), rank, world, group))
    attention.o_proj = RowParallelLinear(attention.o_proj, rank, world, group)


def _split_mlp(mlp: LlamaMLP, rank: int, world: int, group: dist.ProcessGroup | None) -> None:
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, ColumnParallelLinear(getattr(mlp, name), rank, world, group))
    mlp.down_proj = RowParallelLinear(mlp.down_proj, rank, world, group)


def _part(tensor: Tensor, axis: int, rank: int, world: int) -> nn.Parameter:
    """The rank's share, with storage of its own."""
    part = tensor.detach().chunk(world, axis)[rank].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=tensor.requires_grad)


class ColumnParallelLinear(nn.Linear):
    """A rank's share of the outputs of a linear layer: [.., in] -> [.., out / W]."""

    def __init__(self, whole: nn.Linear, rank: int, world: int, group: dist.ProcessGroup | None) -> None:
        nn.Module.__init__(self)
        self.group = group
        self.in_features, self.out_features = whole.in_features, whole.out_features // world
        self.weight = _part(whole.weight, 0, rank, world)
        self.register_parameter("bias", None if whole.bias is None else _part(whole.bias, 0, rank, world))

    def forward(self, input: Tensor) -> Tensor:
        """The input is the same on every rank, so its gradient is the sum of the ranks' gradients."""
        copied: Tensor = _CopyToRanks.apply(input, self.group)  # type: ignore[no-untyped-call]
        return F.linear(copied, self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """A linear layer over a rank's share of the inputs: [.., in / W] -> [.., out], summed over all ranks."""

    def __init__(self, whole: nn.Linear, rank: int, world: int, group: dist.ProcessGroup | None) -> None:
        nn.Module.__init__(self)
        self.group = group
        self.in_features, self.out_features = whole.in_features // world, whole.out_features
        self.weight = _part(whole.weight, 1, rank, world)
        self.register_parameter("bias", whole.bias)  # whole on every rank, and added once, after the sum

    def forward(self, input: Tensor) -> Tensor:
        """The sum is the same on every rank."""
        summed: Tensor = _SumOverRanks.apply(F.linear(input, self.weight), self.group)  # type: ignore[no-untyped-call]
        return summed if self.bias is None else summed + self.bias


class _CopyToRanks(torch.autograd.Function):
    """f: forward nothing, backward all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradients[0], ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    """g: forward all-reduce, backward nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
