"""One rank of tests/test_tensor_parallel.py: runs a model split over all ranks and saves what it computed.

python tensor_parallel_ranks.py RANK WORLD STORE CHECKPOINT RESULT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.model import LlamaForCausalLM, LlamaForTokenClassification, load_reference, tensor_parallel

IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 0, 0, 0]])
LENGTHS = torch.tensor([6, 3])


def compute(model: Any) -> dict[str, torch.Tensor]:
    """Prefill of a ragged batch, two decode steps, the loss, every gradient, and the cache."""
    found: dict[str, torch.Tensor] = {}
    if isinstance(model, LlamaForCausalLM):
        with torch.no_grad():
            cache, past = model.empty_cache(2, 12), torch.zeros(2, dtype=torch.int64)
            for name, ids, lengths in (("prefill", IDS, LENGTHS), ("decode 1", IDS[:, :1], past + 1), ("decode 2", IDS[:, 1:2], past + 1)):  # fmt: skip
                index = torch.arange(ids.shape[1]).expand(2, -1)
                found[name], cache = model(ids, past, lengths, index, cache)
                past = past + lengths
        for layer, (key, value) in enumerate(cache):
            found[f"cache {layer} key"], found[f"cache {layer} value"] = key, value
        loss, _ = model.requires_grad_().loss(IDS, IDS, (torch.arange(6) < LENGTHS[:, None]).long())
    else:
        mask = (torch.arange(6) < LENGTHS[:, None]).long()
        loss, found["logits"] = model.requires_grad_().loss(IDS, mask, IDS % 3)
    loss.backward()
    found["loss"] = loss
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"gradient {name}"] = parameter.grad
    return {name: tensor.detach() for name, tensor in found.items()}


def main() -> None:
    rank, world, store, checkpoint, result = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    calls = 0
    reduce = dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return reduce(*arguments, **options)

    model = load_reference(load_checkpoint(Path(checkpoint)), torch.float64)
    assert isinstance(model, LlamaForCausalLM | LlamaForTokenClassification)
    tensor_parallel(model)
    dist.all_reduce = counted
    with torch.no_grad():
        model.model(IDS)
    dist.all_reduce = reduce
    torch.save({**compute(model), "all-reduces": torch.tensor(calls)}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
