"""Whatever ``export`` accepts, ``run`` runs: the real commands over head_dim, groups, RoPE types, heads and dtypes.

The oracle is transformers in float32 over the same weights: a CPU session runs 16-bit bundles in float32.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import TINY, MakeCheckpoint
from random_llama import write_random_checkpoint

from llama_export.bundle.bundle import load_bundle
from llama_export.cli.main import main
from llama_export.export.export import export_checkpoint
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.validate import validate_bundle

HEADS = 6
GROUPS = (1, 2, 3, 6)
DTYPES = ("float32", "float16", "bfloat16")
HEAD_DIMS = range(2, 257, 2)
CLASSES = {
    "causal-lm": "LlamaForCausalLM",
    "sequence-classification": "LlamaForSequenceClassification",
    "token-classification": "LlamaForTokenClassification",
    "question-answering": "LlamaForQuestionAnswering",
    "feature-extraction": "LlamaModel",
}
PROMPT = [5, 17, 3, 41, 29]
NEW_TOKENS = 4
Capture = pytest.CaptureFixture[str]


def rope(kind: str, head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` of each type. Sequences here stay below the trained length, so every schedule of calls agrees."""
    trained = {"original_max_position_embeddings": 64}
    more: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 4.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **trained},
        "yarn": {"factor": 4.0, **trained},
        "longrope": {
            "factor": 4.0, **trained,
            "short_factor": [1 + 0.05 * i for i in range(head_dim // 2)],
            "long_factor": [1.5 + 0.7 * i for i in range(head_dim // 2)],
        },
    }  # fmt: skip
    return {"rope_type": kind, "rope_theta": 10000.0, **more[kind]}


ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Case:
    """A model of one layer."""

    head_dim: int
    groups: int
    rope: str
    dtype: str
    task: str = "causal-lm"

    def __str__(self) -> str:
        return f"{self.task}-d{self.head_dim}-g{self.groups}-{self.rope}-{self.dtype}"


def turn(values: tuple[Any, ...], place: int) -> Any:
    return values[place % len(values)]


GRID = [
    # The steps by a fourth and a twelfth of the places make every pair of the short cycles meet.
    Case(head_dim, turn(GROUPS, place // 4 + place + shift), turn(ROPES, place + place // 12 + 2 * shift), dtype)
    for shift, dtype in enumerate(DTYPES)
    for place, head_dim in enumerate(HEAD_DIMS)
]
GRID += [
    Case(turn(tuple(HEAD_DIMS), 37 * place), turn(GROUPS, place + place // 12), kind, dtype, task)
    for place, (task, kind, dtype) in enumerate(itertools.product(list(CLASSES)[1:], ROPES, DTYPES))
]
SAMPLE = [
    *(Case(20, 2, "default", "float32"), Case(2, 6, "llama3", "bfloat16"), Case(10, 1, "yarn", "float16")),
    *(Case(8, 3, "dynamic", "float16"), Case(46, 3, "longrope", "float32"), Case(60, 6, "linear", "bfloat16")),
    *(Case(130, 2, "default", "float16"), Case(256, 1, "default", "bfloat16"), Case(254, 6, "dynamic", "float32")),
    Case(6, 3, "default", "bfloat16", "sequence-classification"),
    Case(14, 1, "longrope", "float16", "token-classification"),
    Case(36, 2, "llama3", "float32", "question-answering"),
    Case(100, 6, "dynamic", "bfloat16", "feature-extraction"),
]


def test_the_grid_holds_every_pair() -> None:
    causal = [case for case in GRID if case.task == "causal-lm"]
    assert {(case.head_dim, case.dtype) for case in causal} == set(itertools.product(HEAD_DIMS, DTYPES))
    assert {(case.rope, case.dtype) for case in causal} == set(itertools.product(ROPES, DTYPES))
    assert {(case.rope, case.groups) for case in causal} == set(itertools.product(ROPES, GROUPS))
    assert {(case.groups, case.head_dim % 8) for case in causal} == set(itertools.product(GROUPS, (0, 2, 4, 6)))
    assert {(case.task, case.rope, case.dtype) for case in GRID} == set(itertools.product(CLASSES, ROPES, DTYPES))


def write_checkpoint(case: Case, folder: Path) -> Any:
    """Saves a random model of transformers; returns it in float32, with the weights that were saved."""
    torch.manual_seed(case.head_dim)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=case.groups, head_dim=case.head_dim, max_position_embeddings=64, pad_token_id=0,
        initializer_range=0.3, rope_parameters=rope(case.rope, case.head_dim), eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    family = getattr(transformers, CLASSES[case.task])
    family(config).to(getattr(torch, case.dtype)).save_pretrained(folder)
    return family.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def check_runs(case: Case, folder: Path, capsys: Capture) -> None:
    """Exports and runs by the command line; outputs are those of transformers."""
    model = write_checkpoint(case, folder)
    assert main(["export", str(folder)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    request = ["run", str(folder), "--tokens", ",".join(map(str, PROMPT)), "--json"]
    if case.task == "causal-lm":
        request += ["--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--logprobs", "1"]
    assert main(request) == 0, capsys.readouterr().err
    got = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        if case.task != "causal-lm":
            outputs = model(torch.tensor([PROMPT]))
            names = [name for name in got if name in outputs]
            assert names
            for name in names:
                np.testing.assert_allclose(got[name], outputs[name][0].numpy(), rtol=2e-4, atol=2e-4)
            return
        (tokens,), (logprobs,) = got["tokens"], got["logprobs"]
        # One forward pass over the whole sequence: the logits that chose each new token.
        logits = model(torch.tensor([PROMPT + tokens[:-1]])).logits[0, len(PROMPT) - 1 :]
    want = logits.log_softmax(-1)
    assert tokens == want.argmax(-1).tolist()
    np.testing.assert_allclose([entry["logprob"] for entry in logprobs], want.max(-1).values, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_sample_of_models_runs(case: Case, tmp_path: Path, capsys: Capture) -> None:
    check_runs(case, tmp_path / "checkpoint", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_model_runs(case: Case, tmp_path: Path, capsys: Capture) -> None:
    check_runs(case, tmp_path / "checkpoint", capsys)


def test_a_body_that_onnxruntime_refuses_fails_the_validation(tmp_path: Path) -> None:
    """The stages of onnxruntime open the session's own file with the session's own code."""
    write_random_checkpoint(tmp_path, {**TINY, "head_dim": 20})
    export_checkpoint(tmp_path)
    write_random_checkpoint(tmp_path / "other", TINY)
    export_checkpoint(tmp_path / "other")
    path = load_bundle(tmp_path).onnxruntime_path
    model = onnx.load(path, load_external_data=False)
    refused = onnx.load(load_bundle(tmp_path / "other").onnxruntime_path, load_external_data=False)
    del model.functions[:]
    model.functions.extend(refused.functions)
    path.write_bytes(model.SerializeToString())
    names = ("onnxruntime/prefill", "onnxruntime/decode", "onnxruntime/in-place")
    report = validate_bundle(load_bundle(tmp_path, ignore_hashes=True), ValidateConfig(stages=names))
    found = {stage.name: stage for stage in report.stages if stage.name in names}
    assert {stage.verdict for stage in found.values()} == {"fail"}
    assert "head_size must be a multiple of 8" in found["onnxruntime/prefill"].reason


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantised_weights_of_an_odd_head_dim_run(
    variant: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    folder = make_checkpoint(head_dim=20)
    assert main(["export", str(folder), "--quantize", variant]) == 0
    capsys.readouterr()
    request = ["run", str(folder), "--tokens", "5,9,11", "--max-new-tokens", "3", "--ignore-eos", "--json"]
    assert main([*request, "--quantize", variant]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"][0]) == 3


def test_ragged_batches_and_chunks_agree_with_lone_rows(make_checkpoint: MakeCheckpoint) -> None:
    """The standard body, whose cost follows the capacity, in the session of several rows."""
    from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

    folder = make_checkpoint(head_dim=20)
    export_checkpoint(folder)
    bundle = load_bundle(folder)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 97, count).tolist() for count in (9, 4, 7)]
    batch = OnnxRuntimeSession(bundle, max_seq_len=24, batch_size=3)
    width = max(map(len, rows))
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    first = batch.step(padded, sequence_length=[len(row) for row in rows])
    chunk = batch.step([[7, 8], [9, 0], [11, 12]], sequence_length=[2, 1, 2])
    for index, row in enumerate(rows):
        alone = OnnxRuntimeSession(bundle, max_seq_len=24)
        np.testing.assert_allclose(first[index], alone.step([row])[0], atol=1e-5)
        for token in [[7, 8], [9], [11, 12]][index]:
            last = alone.step([[token]])[0]
        np.testing.assert_allclose(chunk[index], last, atol=1e-5)
