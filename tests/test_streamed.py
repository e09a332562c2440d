"""Hugging Face's model with its weights on disk computes what the one in memory computes, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from random_llama import random_config, write_random_checkpoint

from llama_export.bundle import load_bundle
from llama_export.checkpoint import load_checkpoint
from llama_export.export import export_checkpoint
from llama_export.parity import judge
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.streamed import streamed_causal_lm
from llama_export.parity.validate import validate_bundle

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_same_model(tmp_path: Path, seed: int, dtype: torch.dtype) -> None:
    """Tied and not, biases and none, every call after the first too; afterwards no weight is left."""
    config = random_config(np.random.default_rng(seed))
    write_random_checkpoint(tmp_path, config, dtype=("float32", "bfloat16")[seed % 2], seed=seed, lively=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager").eval()
    streamed = streamed_causal_lm(transformers, load_checkpoint(tmp_path), dtype)
    for ids in ([[5, 3, 8, 1, 7]], [[2, 2]]):
        with torch.no_grad():
            want, got = whole(torch.tensor(ids)).logits, streamed(torch.tensor(ids)).logits
        assert (got.dtype, torch.equal(got, want)) == (want.dtype, True)
    assert {parameter.device.type for parameter in streamed.parameters()} == {"meta"}


def test_a_validation_with_streamed_floors_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path, random_config(np.random.default_rng(7)), dtype="bfloat16", seed=7, lively=True)
    export_checkpoint(tmp_path)
    config = ValidateConfig(
        steps=4, prompt_tokens=12, stages=("reference/transformers", "onnxruntime/prefill", "evaluator/bfloat16")
    )
    plain = validate_bundle(load_bundle(tmp_path), config)
    monkeypatch.setattr(judge, "_RESIDENT_BYTES", 0)
    streamed = validate_bundle(load_bundle(tmp_path), config)
    assert [(stage.name, stage.metrics) for stage in streamed.stages] == [
        (stage.name, stage.metrics) for stage in plain.stages
    ]
    assert streamed.verdict == "pass"
