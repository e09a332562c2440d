"""``tensor_parallel`` on 2 and 4 processes (gloo, CPU) against the single process: results, cache, loss, gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracles
import pytest
import tensor_parallel_ranks
import torch

from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.errors import ConfigError
from llama_export.model import load_reference, tensor_parallel

SCRIPT = Path(tensor_parallel_ranks.__file__)
SHAPE = {
    "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 8, "vocab_size": 61, "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
LIMIT = 1e-12
"""Relative to the largest value; sums over ranks are taken in another order, in float64."""


def run_ranks(checkpoint: Path, world: int, scratch: Path) -> list[dict[str, torch.Tensor]]:
    """What every rank computed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(world), str(scratch / "store"), str(checkpoint), str(scratch / f"{rank}.pt")],
            stderr=subprocess.PIPE, env=environment, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    return [torch.load(scratch / f"{rank}.pt") for rank in range(world)]


def check_equal(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    error = float((got - want).abs().max()) / max(float(want.abs().max()), 1e-30)
    assert error <= LIMIT, f"{what}: off by {error:.1e}"


SPLIT_AXIS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1, "down_proj": 1}


def gathered(ranks: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """The whole of a quantity: its parts side by side, or the one value that all ranks agree on."""
    parts = [rank[name] for rank in ranks]
    if name.startswith("cache"):
        return torch.cat(parts, 1)
    axis = next((axis for layer, axis in SPLIT_AXIS.items() if f"{layer}." in name), None)
    is_split = axis is not None and not (axis == 1 and name.endswith("bias"))
    if is_split:
        return torch.cat(parts, 0 if axis is None else axis)
    for part in parts[1:]:
        assert torch.equal(part, parts[0]), f"ranks disagree about {name}"
    return parts[0]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_the_single_process(world: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    oracles.huggingface_llama(checkpoint, **SHAPE)
    want = tensor_parallel_ranks.compute(load_reference(load_checkpoint(checkpoint), torch.float64))
    ranks = run_ranks(checkpoint, world, tmp_path)
    for rank in ranks:
        assert int(rank.pop("all-reduces")) == 2 * SHAPE["num_hidden_layers"], "one after attention, one after the MLP"
    assert set(ranks[0]) == set(want)
    for name, tensor in want.items():
        check_equal(gathered(ranks, name), tensor, name)
    local = ranks[0]["gradient model.layers.0.self_attn.q_proj.weight"]
    assert local.shape == (64 // world, 48), "a rank holds its share and no more"


def test_a_head_without_a_cache_is_split_too(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForTokenClassification

    torch.manual_seed(1)
    LlamaForTokenClassification(LlamaConfig(**SHAPE, num_labels=3, pad_token_id=0)).save_pretrained(
        tmp_path / "checkpoint"
    )
    want = tensor_parallel_ranks.compute(load_reference(load_checkpoint(tmp_path / "checkpoint"), torch.float64))
    ranks = run_ranks(tmp_path / "checkpoint", 2, tmp_path)
    for rank in ranks:
        rank.pop("all-reduces")
    for name, tensor in want.items():
        check_equal(gathered(ranks, name), tensor, name)


@pytest.fixture
def single_rank(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_rank_changes_nothing(single_rank: None, tmp_path: Path) -> None:
    oracles.huggingface_llama(tmp_path / "checkpoint", **SHAPE)
    whole, split = (load_reference(load_checkpoint(tmp_path / "checkpoint"), torch.float64) for _ in range(2))
    tensor_parallel(split)
    ids = tensor_parallel_ranks.IDS
    check_equal(split.model(ids).last_hidden_state, whole.model(ids).last_hidden_state, "one rank")


def test_without_a_process_group_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    oracles.huggingface_llama(tmp_path, **SHAPE)
    with pytest.raises(ConfigError, match="no ranks to split over") as refused:
        tensor_parallel(load_reference(load_checkpoint(tmp_path)))
    assert "torchrun" in refused.value.hint


@pytest.mark.parametrize(
    ("change", "world", "said"),
    [
        ({"num_key_value_heads": 1}, 2, "num_key_value_heads = 1 cannot be split over 2 ranks"),
        ({"intermediate_size": 42}, 4, "intermediate_size = 42 cannot be split over 4 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_and_nothing_is_split(
    change: dict[str, int], world: int, said: str, tmp_path: Path, single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracles.huggingface_llama(tmp_path / "checkpoint", **{**SHAPE, **change})
    model = load_reference(load_checkpoint(tmp_path / "checkpoint"))
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: world)
    with pytest.raises(ConfigError, match=said):
        tensor_parallel(model)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before
