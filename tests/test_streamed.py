"""A model with its weights on disk, Hugging Face's or the reference, computes what the one in memory computes, bit by bit."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from random_llama import random_config, write_random_checkpoint

from llama_export.bundle.bundle import load_bundle
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.config.llama import TASKS, Task
from llama_export.export.export import export_checkpoint
from llama_export.model import LlamaForCausalLM, load_reference
from llama_export.parity import judge
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.oracle.streamed import streamed_causal_lm, streamed_reference
from llama_export.parity.sessions import reference_session
from llama_export.parity.validate import validate_bundle

transformers = pytest.importorskip("transformers")
WRITE_CHECKPOINT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "onnx_table.py"))["write_checkpoint"]


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


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_so_is_the_reference(tmp_path: Path, task: str, rope_type: str, dtype: torch.dtype) -> None:
    """Every head; float64, whose RoPE frequencies are widened, and bfloat16, whose are not."""
    WRITE_CHECKPOINT(tmp_path, task, rope_type)
    checkpoint = load_checkpoint(tmp_path, task=cast(Task, task))
    calls = [[[5, 3, 8, 1, 7]], [[2, 2]]]
    found: list[list[torch.Tensor]] = []
    for model in (load_reference(checkpoint, dtype), streamed_reference(checkpoint, dtype)):
        with torch.no_grad():
            if isinstance(model, LlamaForCausalLM):
                session = reference_session(model, max_seq_len=8)
                found.append([torch.from_numpy(session.step(ids)) for ids in calls])
            else:
                inputs = [torch.tensor(ids) for ids in calls]
                answers = [model(ids, torch.ones_like(ids)) for ids in inputs]
                found.append([tensor for item in answers for tensor in (item if isinstance(item, tuple) else (item,))])
    for want, got in zip(*found, strict=True):
        assert (got.dtype, torch.equal(got, want)) == (want.dtype, True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_validation_with_streamed_floors_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path, random_config(np.random.default_rng(7)), dtype="bfloat16", seed=7, lively=True)
    export_checkpoint(tmp_path)
    config = ValidateConfig(
        steps=4, prompt_tokens=12,
        stages=("reference/transformers", "reference/program", "onnxruntime/prefill", "evaluator/bfloat16"),
    )  # fmt: skip
    plain = validate_bundle(load_bundle(tmp_path), config)
    monkeypatch.setattr(judge, "_RESIDENT_BYTES", 0)
    streamed = validate_bundle(load_bundle(tmp_path), config)
    assert [(stage.name, stage.metrics) for stage in streamed.stages] == [
        (stage.name, stage.metrics) for stage in plain.stages
    ]
    assert streamed.verdict == "pass"
