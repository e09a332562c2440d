"""The sample of logits: a fixed rule, even over positions and vocabulary, with the first choices and the largest error in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import patient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_export.bundle.bundle import Bundle
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.stages.logits_sample import SPREAD, TOP_K, decode_sample, labels_sample, logits_sample
from llama_export.parity.validate import validate_bundle
from llama_export.runtime.text import TextCodec


def logits(positions: int, tokens: int, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    want = rng.normal(size=(positions, tokens))
    return (want + rng.normal(size=want.shape) * 1e-6).astype(np.float32), want


@patient
@given(st.integers(1, 60), st.integers(1, 3000), st.integers(0, 5))
def test_sample_is_small_and_holds_first_choices_and_the_largest_error(positions: int, tokens: int, seed: int) -> None:
    got, want = logits(positions, tokens, seed)
    sample = logits_sample(got, want, {0: "first"}, str)
    assert sample == logits_sample(got.copy(), want.copy(), {0: "first"}, str)
    entries = list(zip(sample.positions, sample.tokens, strict=True))
    assert sample.compared == got.size
    assert min(got.size, 200) <= len(entries) <= 400
    assert entries == sorted(set(entries))
    errors = np.abs(got - want)
    worst = np.unravel_index(errors.argmax(), errors.shape)
    assert tuple(map(int, worst)) in entries
    assert sample.top[0].position == 0
    for one in sample.top:
        for side, values in ((one.got, got), (one.want, want)):
            assert [choice.token for choice in side] == np.argsort(-values[one.position], kind="stable")[
                :TOP_K
            ].tolist()
            assert all((one.position, choice.token) in entries for choice in side)
            assert all(choice.logit == values[one.position, choice.token] for choice in side)
    for (row, column), left, right in zip(entries, sample.got, sample.want, strict=True):
        assert (left, right) == (got[row, column], want[row, column])


@pytest.mark.parametrize("tokens", [512, 1536, 32000, 128256])
def test_sample_is_even_over_positions_and_vocabulary(tokens: int) -> None:
    zeros = np.zeros((80, tokens), np.float32)
    sample = logits_sample(zeros, zeros, {}, str)
    for values, size in ((sample.positions, 80), (sample.tokens, tokens)):
        counts = np.histogram(values, bins=8, range=(0, size))[0]
        assert counts.min() >= 0.9 * SPREAD / 8
        assert counts.max() <= 1.1 * SPREAD / 8 + 2 * TOP_K


def test_nan_is_a_first_choice_and_the_largest_error() -> None:
    got, want = logits(9, 700)
    got[4, 123] = math.nan
    sample = logits_sample(got, want, {4: "here"}, str)
    (one,) = sample.top
    assert one.where == "here, largest error"
    assert one.got[0].token == 123
    assert math.isnan(one.got[0].logit)
    got[4, 123] = want[4, 123] = math.inf  # their difference is no number either
    assert logits_sample(got, want, {}, str).top[0].position == 4


def test_decode_sample_shows_the_ends_and_the_middle_with_the_tokenizers_text(tmp_path: Path) -> None:
    got, want = logits(20, 97)
    sample = decode_sample(got, want, 12, tmp_path)
    found = {one.position: one.where for one in sample.top}
    assert {11: "end of the prompt", 12: "decode step 0", 16: "decode step 4", 19: "decode step 7"}.items() <= {
        position: where.split(",")[0] for position, where in found.items()
    }.items()
    assert sum("largest error" in where for where in found.values()) == 1
    assert {choice.text for one in sample.top for choice in one.want} == {None}
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w0"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = decode_sample(got, want, 12, tmp_path)
    assert all(choice.text == f"w{choice.token}" for one in named.top for choice in one.want)
    assert decode_sample(got[:13], want[:13], 12, tmp_path).top[-1].position == 12


def test_labels_sample_joins_all_texts_and_names_labels() -> None:
    pairs = [
        (f"logits ({name})", *logits(rows, 2, seed)) for seed, (name, rows) in enumerate((("alone", 1), ("right", 3)))
    ]
    sample = labels_sample(pairs, ("no", "yes"))
    assert sample.compared == len(sample.got) == 8
    assert {choice.text for choice in sample.top[0].got} == {"no", "yes"}
    assert sample.top[0].where.startswith("first")
    assert labels_sample(pairs[:1], ()).top[0].got[0].text is None


def test_text_of_a_token_keeps_its_leading_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁def": 0, "x": 1, "<s>": 2}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path)
    assert codec.decode([0]) == "def"
    assert [codec.text_of(token) for token in range(3)] == [" def", "x", "<s>"]


def test_stages_at_a_dtype_carry_a_sample_of_prefill_and_decode(tiny_bundles: dict[str, Bundle]) -> None:
    names = ("onnxruntime/decode", "evaluator/float16")
    config = ValidateConfig(stages=(*names, "onnxruntime/in-place"), steps=4, prompt_tokens=8)
    found = {stage.name: stage.logits for stage in validate_bundle(tiny_bundles["float32"], config).stages}
    for name in names:
        sample = found[name]
        assert sample is not None
        assert sample.compared == 12 * 97
        assert {7, 8, 10, 11} <= {one.position for one in sample.top}
        assert max(abs(got - want) for got, want in zip(sample.got, sample.want, strict=True)) < 0.1
    assert found["onnxruntime/in-place"] is None
