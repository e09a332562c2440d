"""Every step of sampling against transformers' own, or against its formula; and what a sampler makes of them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from llama_export.cli.run import run
from llama_export.errors import ConfigError, ToolchainError
from llama_export.runtime import sampling
from llama_export.runtime.sampling import Sampler
from llama_export.runtime.sampling_params import SamplingParams

EACH = settings(deadline=None, derandomize=True, max_examples=200)
V = 40


@st.composite
def logits(draw: st.DrawFn) -> np.ndarray:
    """Float32 [n] of many kinds: smooth, with ties, extreme, with impossible tokens, all but one impossible."""
    n = draw(st.sampled_from([1, 2, 7, V, 500]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = random.normal(0, draw(st.sampled_from([0.01, 1.0, 10.0])), n).astype(np.float32)
    kind = draw(st.sampled_from(["smooth", "ties", "equal", "extreme", "masked", "alone"]))
    if kind == "ties":
        values = np.round(values)
    elif kind == "equal":
        values[:] = values[0]
    elif kind == "extreme":
        values[random.integers(n)] = 3e38
        values[random.integers(n)] = -3e38
    elif kind == "masked":
        values[random.random(n) < 0.5] = -np.inf
        values[random.integers(n)] = 1.5
    elif kind == "alone":
        keep = random.integers(n)
        values[np.arange(n) != keep] = -np.inf
    return values


def scores_of(processor: Any, values: np.ndarray, tokens: list[int] | None = None) -> np.ndarray:
    """What a processor of transformers makes of logits [n], computed in float64."""
    found: torch.Tensor = processor(torch.tensor([tokens or [0]]), torch.from_numpy(values.astype(np.float64))[None])
    return found[0].numpy()


def kept_by(processor: Any, values: np.ndarray) -> np.ndarray:
    found = scores_of(processor, values)
    return np.flatnonzero(np.isfinite(found))


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values.astype(np.float64) - values.max())
    return weights / weights.sum()


def possible(kept: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Without impossible tokens, which a filter may name and no draw takes."""
    return kept[np.isfinite(values[kept])]


# ---- against transformers ---------------------------------------------------------------------------------------


@EACH
@given(logits(), st.floats(1e-6, 1e6))
def test_scale_is_transformers_temperature(values: np.ndarray, temperature: float) -> None:
    want = scores_of(theirs.TemperatureLogitsWarper(temperature), values)
    got = sampling.scale(values, temperature)
    assert got.max() == 0
    np.testing.assert_allclose(got, want - want.max(), rtol=1e-12, atol=1e-9 * np.abs(want[np.isfinite(want)]).max())


@EACH
@given(logits(), st.integers(1, 600))
def test_top_k_keeps_what_transformers_keeps(values: np.ndarray, k: int) -> None:
    got = sampling.top_k(values, k)
    assert (np.diff(got) > 0).all()
    np.testing.assert_array_equal(possible(got, values), kept_by(theirs.TopKLogitsWarper(k), values))


@EACH
@given(logits(), st.one_of(st.floats(1e-300, 1, exclude_max=True), st.sampled_from([0.1, 0.5, 0.9, 0.95, 0.999])))
def test_top_p_keeps_as_much_as_transformers(values: np.ndarray, p: float) -> None:
    """Of equal logits at the border either may stay, and a sum that meets ``p`` to rounding may fall on either side."""
    got, want = sampling.top_p(values, p), kept_by(theirs.TopPLogitsWarper(p), values)
    assert (np.diff(got) > 0).all()
    ours, others = (np.sort(values[kept])[::-1] for kept in (got, want))
    shared = min(len(ours), len(others))
    np.testing.assert_array_equal(ours[:shared], others[:shared])
    border = softmax(values)[got].sum() if len(got) < len(want) else softmax(values)[want].sum()
    assert len(got) == len(want) or abs(border - p) < 1e-12
    # The definition itself: it reaches p, and would not without its last token.
    mass = np.sort(softmax(values)[got])[::-1]
    assert mass.sum() >= p - 1e-12
    assert mass[:-1].sum() < p + 1e-12


def test_top_p_prefers_lower_ids_among_equals() -> None:
    assert sampling.top_p(np.zeros(10, np.float32), 0.45).tolist() == [0, 1, 2, 3, 4]
    assert sampling.top_p(np.zeros(10, np.float32), 1e-300).tolist() == [0]


@EACH
@given(logits(), st.floats(1e-6, 1))
def test_min_p_keeps_what_transformers_keeps(values: np.ndarray, p: float) -> None:
    got, want = sampling.min_p(values, p), kept_by(theirs.MinPLogitsWarper(p), values)
    gap = np.abs(values.astype(np.float64) - values.max() - math.log(p))
    unclear = np.flatnonzero(gap < 1e-12)
    assert set(got) ^ set(want) <= set(unclear)


@EACH
@given(logits(), st.data())
def test_repetition_penalty_is_transformers(values: np.ndarray, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=20))
    penalty = data.draw(st.floats(0.01, 100))
    got = sampling.penalize_repetition(values, np.array(sorted(set(tokens))), penalty)
    want = scores_of(theirs.RepetitionPenaltyLogitsProcessor(penalty), values, tokens)
    np.testing.assert_array_equal(got, want)


@EACH
@given(logits(), st.data())
def test_logit_bias_is_transformers(values: np.ndarray, data: st.DataObject) -> None:
    tokens = st.integers(0, len(values) - 1)
    bias = data.draw(st.dictionaries(tokens, st.floats(-1e9, 1e9, width=32), min_size=1, max_size=9))
    got = sampling.add_bias(values, np.array(list(bias)), np.array(list(bias.values())))
    processor = theirs.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    want = scores_of(processor, values)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)  # their biases are float32


@EACH
@given(logits(), st.data())
def test_presence_and_frequency_are_their_formula(values: np.ndarray, data: st.DataObject) -> None:
    """mu[j] - c[j] * frequency - float(c[j] > 0) * presence: https://platform.openai.com/docs/guides/text-generation"""
    generated = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=20))
    presence, frequency = data.draw(st.floats(-2, 2)), data.draw(st.floats(-2, 2))
    count = [generated.count(token) for token in range(len(values))]
    want = [
        float(value) - count[token] * frequency - float(count[token] > 0) * presence
        for token, value in enumerate(values)
    ]
    tokens = np.array(sorted(set(generated)), np.int64)
    counts = np.array([count[token] for token in tokens], np.int64)
    got = sampling.penalize_counts(values, tokens, counts, presence, frequency)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@EACH
@given(logits(), st.integers(0, 50), st.data())
def test_logprobs_are_the_models_own(values: np.ndarray, count: int, data: st.DataObject) -> None:
    token = data.draw(st.sampled_from(np.flatnonzero(np.isfinite(values)).tolist()))
    want = torch.log_softmax(torch.from_numpy(values).double(), -1).numpy()
    got = sampling.token_logprobs(values, token, count)
    assert got.token == token
    assert got.logprob == pytest.approx(want[token], rel=1e-12, abs=1e-12)
    assert len(got.top) == min(count, len(values))
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))[:count]
    assert [other for other, _ in got.top] == order
    np.testing.assert_allclose([value for _, value in got.top], want[order], rtol=1e-12, atol=1e-12)


# ---- the draw ---------------------------------------------------------------------------------------------------


@EACH
@given(logits(), st.floats(0, 1, exclude_max=True))
def test_a_draw_inverts_the_cumulated_probabilities(values: np.ndarray, uniform: float) -> None:
    index = sampling.draw(values, uniform)
    edges = np.concatenate([[0.0], softmax(values).cumsum()])
    assert edges[index] - 1e-12 <= uniform <= edges[index + 1] + 1e-12
    assert softmax(values)[index] > 0


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1.0, 0.0)])
def test_a_draw_never_takes_the_impossible(uniform: float) -> None:
    for place in range(5):
        values = np.full(5, -np.inf, np.float32)
        values[place] = -3e38
        assert sampling.draw(values, uniform) == place
    inner = np.array([-np.inf, 0, 0.1, -np.inf, -np.inf], np.float32)
    assert sampling.draw(inner, uniform) in (1, 2)


FILTERS: dict[str, Callable[[], Any]] = {
    "temperature": lambda: SamplingParams(temperature=0.7),
    "top_k": lambda: SamplingParams(temperature=1.3, top_k=5),
    "top_p": lambda: SamplingParams(temperature=1.0, top_p=0.8),
    "min_p": lambda: SamplingParams(temperature=1.0, min_p=0.1),
    "all": lambda: SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.05),
}


def transformers_probabilities(params: SamplingParams, values: np.ndarray) -> np.ndarray:
    scores = scores_of(theirs.TemperatureLogitsWarper(params.temperature), values)
    if params.top_k:
        scores = scores_of(theirs.TopKLogitsWarper(params.top_k), scores)
    if params.top_p < 1:
        scores = scores_of(theirs.TopPLogitsWarper(params.top_p), scores)
    if params.min_p:
        scores = scores_of(theirs.MinPLogitsWarper(params.min_p), scores)
    return softmax(scores)


@pytest.mark.parametrize("kind", FILTERS)
def test_tokens_come_as_often_as_transformers_probabilities_say(kind: str) -> None:
    """A chi-square test over 20,000 draws; 1e-4 of all seeds would exceed the bound."""
    values = np.random.default_rng(3).normal(0, 2, V).astype(np.float32)
    params = dataclasses.replace(FILTERS[kind](), seed=11)
    want = transformers_probabilities(params, values)
    sampler, count = Sampler(params), 20_000
    found = np.bincount([sampler.choose(values) for _ in range(count)], minlength=V)
    assert found[want == 0].sum() == 0
    expected = count * want[want > 0]
    merged = expected >= 5
    chi = float((((found[want > 0] - expected) ** 2 / expected)[merged]).sum())
    freedom = int(merged.sum()) - 1
    assert chi < freedom + 3.72 * math.sqrt(2 * freedom) + 10, (chi, freedom)


# ---- samplers ---------------------------------------------------------------------------------------------------


def steps(count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(0, 2, V).astype(np.float32) for _ in range(count)]


def test_the_order_is_the_documented_one() -> None:
    """Bias, repetition, counts: one after the other by the formulas, over prompt and output of a growing row."""
    params = SamplingParams(
        repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={3: 2.0, 5: -4.0}
    )
    prompt = [1, 3, 3, 7]
    sampler, made = Sampler(params, prompt), list[int]()
    for values in steps(60):
        want = values.astype(np.float64)
        for token, bias in params.logit_bias.items():
            want[token] += bias
        for token in {*prompt, *made}:
            want[token] = want[token] * 1.7 if want[token] < 0 else want[token] / 1.7
        for token in set(made):
            want[token] -= 0.4 + 0.3 * made.count(token)
        token = sampler.choose(values)
        assert token == int(want.argmax())
        made.append(token)
    assert len(set(made)) > 10


def test_greedy_is_argmax_and_takes_the_first_of_equals() -> None:
    sampler = Sampler(SamplingParams())
    for values in steps(20):
        assert sampler.choose(values) == int(values.argmax())
    assert sampler.choose(np.array([1, 3, 3], np.float32)) == 1


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-300}], ids=str)
def test_the_narrowest_filter_is_greedy(filters: dict[str, Any]) -> None:
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, **filters}))
    for values in steps(20):
        assert sampler.choose(values) == int(values.argmax())


def test_the_same_seed_draws_the_same_tokens_and_none_draws_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.5, seed=seed))
        return [sampler.choose(values) for values in steps(40)]

    assert tokens(5) == tokens(5)
    assert tokens(2**64 - 1) == tokens(2**64 - 1)
    assert tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


def test_logits_are_left_as_they_are() -> None:
    params = SamplingParams(
        temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=2, presence_penalty=1, logit_bias={1: 1}
    )
    (values,) = steps(1)
    values.flags.writeable = False
    sampler = Sampler(params, [1])
    sampler.choose(values)
    sampling.token_logprobs(values, 1, 5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    values = np.zeros(9, np.float32)
    values[4] = bad
    with pytest.raises(ToolchainError, match="logits are not finite") as caught:
        Sampler(SamplingParams(temperature=temperature)).choose(values)
    assert "token 4" in caught.value.details["got"]
    with pytest.raises(ToolchainError, match="logits are not finite"):
        Sampler(SamplingParams(temperature=temperature)).choose(np.full(9, -np.inf, np.float32))


def test_extreme_values_and_settings_overflow_nowhere() -> None:
    values = np.array([3.4e38, -3.4e38, 3.3e38, 0, -np.inf], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (5e-324, 1e-30, 1.0, 1e30, 1.7e308):
            for more in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 1e-300}, {"repetition_penalty": 1e-30}):
                sampler = Sampler(SamplingParams(temperature=temperature, seed=1, **more), [0, 1])
                for _ in range(5):
                    assert sampler.choose(values) != 4


# ---- settings ---------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in (0, -1, 1.5, True, None)),
    *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, 10**400)),
    *(("top_k", value) for value in (-1, 0.5, None)),
    *(("top_p", value) for value in (0, -0.1, 1.1, math.nan)),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("repetition_penalty", value) for value in (0, -1, math.inf)),
    *(("presence_penalty", value) for value in (math.nan, "x")),
    *(("frequency_penalty", value) for value in (math.inf, None)),
    *(("logit_bias", value) for value in ({-1: 1.0}, {1: math.inf}, {"a": 1}, {1.5: 1}, [1], None)),
    *(("seed", value) for value in (-1, 2**64, 0.5, True)),
    *(("stop", value) for value in ("", [""], [1], None, ["a", ""], ["\ud800"])),
    *(("stop_token_ids", value) for value in ([-1], ["a"], 3, None)),
    *(("ignore_eos", value) for value in (1, None)),
    *(("logprobs", value) for value in (-1, 0.5, True)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_bad_setting_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"bad value for {name}") as caught:
        SamplingParams(**{name: value})
    assert caught.value.details["field"] == name
    assert caught.value.details["expected"]
    (flag,) = [word.rstrip(",") for word in str(caught.value.hint).split() if word.startswith("--")]
    assert flag in {option for parameter in run.params for option in parameter.opts}, "the flag exists"
    str(caught.value).encode()


def test_settings_keep_what_they_were_given() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias, stop_token_ids=[4])
    stop.append("b")
    bias[2] = 1.0
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (("a",), {1: 2.0}, (4,))
    assert SamplingParams(stop="end").stop == ("end",)


def test_every_setting_has_a_flag_with_the_same_default() -> None:
    values = run.make_context("run", ["bundle", "--tokens", "1"]).params
    for field in dataclasses.fields(SamplingParams):
        assert (values[field.name] or None) == (getattr(SamplingParams(), field.name) or None), field.name
