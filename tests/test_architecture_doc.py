"""docs/architecture.md against the committed run and the code: its tables, its drawings, its references; and the studies."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import architecture
import numpy as np
import pytest
import torch
from studies import attention, heads, norms, positions
from studies.tiny_llama import CHECKPOINT, small_config

from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.model import LlamaForCausalLM, load_reference
from llama_export.model.decoder import LlamaDecoderLayer

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
figures = runpy.run_path(str(ROOT / "scripts" / "architecture_figures.py"))


def test_tables_are_those_of_the_newest_run_and_none_is_missing() -> None:
    studies = architecture.newest()["studies"]
    assert list(studies) == list(architecture.STUDIES)
    assert architecture.with_tables(DOCUMENT, studies) == DOCUMENT


def test_figures_that_the_text_quotes_are_those_of_the_run() -> None:
    studies = architecture.newest()["studies"]
    eager, flash = (studies["attention"][name]["4096"]["forward"] for name in ("eager", "flash_attention_2"))
    assert round(eager["seconds"] / flash["seconds"]) == 6
    assert round(eager["bytes"] / flash["bytes"]) == 27
    assert studies["cache-size"]["GPT-3 175B"] == 4608 * 1024
    assert studies["cache-size"]["meta-llama/Llama-3.1-405B"] == 504 * 1024
    assert f"{studies['activations']['layers.0.input_layernorm']['smallest']:.2f}" == "0.08"


def test_figures_and_code_that_it_refers_to_exist() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", DOCUMENT)
    assert sorted(Path(name).name for name in pictures) == sorted(figures["DRAWINGS"])
    for name in pictures:
        assert (ROOT / "docs" / name).read_text(encoding="utf-8").startswith("<?xml")
    for path in re.findall(r"`((?:llama_export|tests|benchmarks|scripts)/[\w./-]+)`", DOCUMENT):
        assert (ROOT / path).exists(), path


def test_one_question_for_every_part_and_an_answer_to_each() -> None:
    questions = re.findall(r"^### ([^\n]+\?)\n\n(.+?)(?=^#|\Z)", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    assert len(questions) == 17
    assert all(len(answer.split()) > 40 for _, answer in questions)


# ---------------------------------------------------------------------------------------------------------- drawings


def test_the_drawn_architecture_is_that_of_the_trace() -> None:
    graph = figures["llama_graph"](json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8")))
    layer = "model.layers.1"
    norm, after = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
    op = f"{layer}.self_attn.llama_export.attention.default"
    wanted = {
        ("input_ids", "model.embed_tokens"), ("input_ids", "model.rotary_emb"), ("model.embed_tokens", norm),
        *((norm, f"{layer}.self_attn.{name}_proj") for name in "qkv"), *((f"{layer}.self_attn.{name}_proj", op) for name in "qkv"),
        ("past_key_values", op), ("model.rotary_emb", op), (op, f"{layer}.self_attn.o_proj"),
        (f"{layer}.self_attn.o_proj", after), (norm, after), (after, f"{layer}.mlp.gate_proj"), (after, f"{layer}.mlp.up_proj"),
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.silu"), (f"{layer}.mlp.silu", f"{layer}.mlp.mul"),
        (f"{layer}.mlp.up_proj", f"{layer}.mlp.mul"), (f"{layer}.mlp.mul", f"{layer}.mlp.down_proj"),
        (f"{layer}.mlp.down_proj", "model.norm"), (after, "model.norm"), ("model.norm", "lm_head"),
    }  # fmt: skip
    assert set(graph.arrows) == wanted
    assert graph.arrows[("past_key_values", op)] == "[B, 2, C, 64]"
    assert graph.boxes[f"{layer}.mlp.down_proj"].detail == "192x448"


def test_the_drawn_rotation_turns_each_pair_by_its_angle() -> None:
    found = figures["rotated_pairs"](tokens=9)
    for name in ("query", "key"):
        before, after = (found[key][:, :32] + 1j * found[key][:, 32:] for key in (name, f"{name}, rotated"))
        exact = np.exp(1j * np.outer(np.arange(9), 10000.0 ** (-np.arange(32) / 32)))
        # The angles are multiples of the float32 frequencies.
        np.testing.assert_allclose(after, before * exact, atol=9 * 2**-24 * np.abs(before).max(), rtol=0)


@pytest.mark.parametrize("name", figures["DRAWINGS"])
def test_every_figure_is_drawn_the_same_twice(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        figures["DRAWINGS"][name](path)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text(encoding="utf-8")
    expected = {
        "architecture.svg": "past_key_values",
        "rms-norm.svg": "after, RMS",
        "rotation.svg": "score by distance",
    }
    assert expected[name] in text


# ----------------------------------------------------------------------------------------------------------- studies


def test_epsilon_study_against_the_formula() -> None:
    for size, row in norms.measure().items():
        for epsilon in (1e-5, 1e-6):
            exact = float(size) / math.sqrt(float(size) ** 2 + epsilon)
            assert row[f"float32, 1e-{5 if epsilon == 1e-5 else 6}"] == pytest.approx(exact, rel=1e-6)
    assert norms.measure()["1000"]["float16 throughout, 1e-5"] == 0  # the square of 1000 is no float16 number
    assert math.isnan(norms.measure()["0"]["float32, 0"])


def test_post_norm_layer_against_its_formula() -> None:
    torch.manual_seed(0)
    layer = norms.PostNormLayer(small_config())
    x, residual = torch.randn(2, 1, 5, 128)
    cos, sin, mask = torch.ones(1, 5, 16), torch.zeros(1, 5, 16), torch.ones(1, 5, dtype=torch.int64)

    def norm(value: torch.Tensor) -> torch.Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    with torch.no_grad():
        x2, rest, _ = layer(x, residual, cos, sin, None, mask)
        x1 = norm(x + residual + layer.self_attn(x + residual, cos, sin, None, mask)[0])
        torch.testing.assert_close(x2 + rest, norm(x1 + layer.mlp(x1)), atol=1e-6, rtol=1e-5)
    assert type(norms.decoder(small_config(), LlamaDecoderLayer).layers[0]) is LlamaDecoderLayer


def test_attention_study_calls_compute_the_same() -> None:
    x = torch.randn(1, 9, attention.LAYER["hidden_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = {name: attention.attention_call(name, 9)(x) for name in attention.NAMES}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, found["eager"], atol=1e-5, rtol=1e-4, msg=name)


def test_peak_memory_is_measured() -> None:
    assert attention._peak_bytes(lambda: torch.ones(64 * 2**20, dtype=torch.uint8)) > 60 * 2**20


def test_rope_study_scores_the_same_tokens_at_every_length(tmp_path: Path) -> None:
    """At the trained length and type it is the checkpoint's own perplexity, roughly, and linear at factor 1 changes nothing."""
    plain = positions.perplexity("default", 8.0, 512, tmp_path / "a", windows=2)
    same = positions.perplexity("linear", 1.0, 512, tmp_path / "b", windows=2)
    assert plain == pytest.approx(same, rel=1e-5)
    assert 5 < plain < 100


def test_question_answering_study_marks_the_name(tmp_path: Path) -> None:
    tokenizer = heads.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    filler = "x = 1\n" * 10
    ((ids, first, last),) = heads.examples(
        {"a": f"import os\ndef first_name(x):\n{filler}" + "y\n" * 12}, tokenizer, 10
    )
    assert tokenizer.decode(ids[first : last + 1]).strip() == "first_name"
    folder = heads.question_answering_checkpoint(tmp_path / "qa")
    model = load_reference(load_checkpoint(folder))
    assert isinstance(model, heads.LlamaForQuestionAnswering)
    base: Any = load_reference(CHECKPOINT)
    assert isinstance(base, LlamaForCausalLM)
    torch.testing.assert_close(model.model.layers[3].mlp.down_proj.weight, base.model.layers[3].mlp.down_proj.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
def test_later_tokens_change_nothing_before_them(implementation: str) -> None:
    model = load_reference(CHECKPOINT, attn_implementation=implementation)
    ids = torch.randint(2, 1536, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 25:] = changed[:, 25:].flip(1)
    with torch.no_grad():
        first, second = (model.model(given).last_hidden_state for given in (ids, changed))
    assert torch.equal(first[:, :25], second[:, :25])
    assert not torch.equal(first[:, 25:], second[:, 25:])
