"""``config.json`` is read as Hugging Face means it, or refused with the key, the value and what was expected."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, MakeCheckpoint, edit_json
from hypothesis import given
from hypothesis import strategies as st
from support import check_export_refused, patient

from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.cli.main import main
from llama_export.config.decoder import (
    count_parameters,
    decoder_modules,
    expected_tensors,
    linear_groups,
    op_counts,
)
from llama_export.config.huggingface import config_from_dict, load_config, resolve_task
from llama_export.config.keys import FOREIGN_KEYS, HARMLESS_KEYS, READ_KEYS
from llama_export.config.llama import ACTIVATIONS, SUPPORTED_ROPE_TYPES, TASKS, LlamaConfig, RopeConfig, Task
from llama_export.config.settings import CUSTOM_OPS, EngineConfig, ExportConfig
from llama_export.errors import ConfigError
from llama_export.graph.io import INTERFACES
from llama_export.model import MODEL_CLASSES, mlp
from llama_export.ops.table import ATTENTION

Capture = pytest.CaptureFixture[str]
CLASSES = {
    "causal-lm": "LlamaForCausalLM",
    "sequence-classification": "LlamaForSequenceClassification",
    "token-classification": "LlamaForTokenClassification",
    "question-answering": "LlamaForQuestionAnswering",
    "feature-extraction": "LlamaModel",
}
BASE = {"model_type": "llama", **TINY}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FULL = {"rope_type": "llama3", **LLAMA3}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
NAMES_IN_ERRORS = {
    "bos_token_id": "bos/eos_token_id", "eos_token_id": "bos/eos_token_id", "hidden_dropout": "classifier_dropout",
}  # fmt: skip


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


# ---- the file ---------------------------------------------------------------------------------------------------


def test_missing_config_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / "config.json").unlink()
    check_export_refused(capsys, checkpoint, "`config.json` is missing", str(checkpoint), "*.safetensors")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["cannot be read as JSON"]),
        (b'{"model_type": "llama",', ["cannot be read as JSON", "line 1 column"]),
        (b'{"model_type": "\xff\xfe"}', ["cannot be read as JSON", "utf-8"]),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", ["cannot be read as JSON", "4300 digits"]),
        (b"[" * 100_000, ["cannot be read as JSON", "recursion"]),
        (b"[1, 2]", ["is not a JSON object", "list", "{...}"]),
        (b"null", ["is not a JSON object", "NoneType", "{...}"]),
    ],
    ids=["empty", "cut", "not-utf8", "endless-integer", "nested", "list", "null"],
)
def test_config_that_is_no_json_object_is_refused(
    content: bytes, parts: list[str], make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / "config.json").write_bytes(content)
    check_export_refused(capsys, checkpoint, "`config.json`", str(checkpoint / "config.json"), *parts)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
@pytest.mark.parametrize("value", [..., None], ids=["absent", "null"])
def test_missing_size_is_refused_not_guessed(
    key: str, value: Any, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", **{key: value})
    file = str(checkpoint / "config.json")
    check_export_refused(capsys, checkpoint, f"`config.json` lacks {key}", file, "never guessed")


@pytest.mark.parametrize(
    ("value", "difference"),
    [
        ("mixtral", "some of several expert MLPs"),
        ("qwen2", "biases on query, key and value"),
        ("qwen2_moe", "biases and expert MLPs"),
        ("qwen3", "normalises queries and keys"),
        ("gemma3_text", "norm weight is 1 + w"),
        ("phi", "LayerNorms"),
        ("phi3", "one fused projection"),
        ("llama4", "chunked attention"),
    ],
)
def test_known_family_is_refused_with_its_difference(
    value: str, difference: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", model_type=value)
    check_export_refused(
        capsys, checkpoint, f"unsupported model_type: {value}", "expected: llama", difference,
        "as a Llama it would compute other numbers",
    )  # fmt: skip


@pytest.mark.parametrize("value", ["mistral", "mistral3"])
def test_mistral_without_a_window_is_refused_for_a_reason_that_is_true(
    value: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", model_type=value, sliding_window=None)
    check_export_refused(
        capsys, checkpoint, f"unsupported model_type: {value}", "(sliding_window: null) the arithmetic is Llama's"
    )
    assert main(["export", str(checkpoint)]) == 2
    assert "would compute other numbers" not in capsys.readouterr().err


@pytest.mark.parametrize("value", ["Llama", "bert", "", ..., None, 7, ["llama"]])
def test_another_model_type_is_refused(value: Any, make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", model_type=value)
    got = None if value is ... else value
    check_export_refused(capsys, checkpoint, f"unsupported model_type: {got}", "got:      ", "expected: llama")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("vocab_size", 0, "an integer >= 1"),
        ("vocab_size", -97, "an integer >= 1"),
        ("vocab_size", 10**9, "an integer >= 1, at most 16777216"),
        ("num_hidden_layers", 10**9, "an integer >= 1, at most 4096"),
        ("rms_norm_eps", 10**300, "a number > 0, at most 1"),
        ("eos_token_id", 10**100, "a token id or null"),
        ("hidden_size", "72", "an integer >= 1"),
        ("intermediate_size", 100.0, "an integer >= 1"),
        ("num_hidden_layers", True, "an integer >= 1"),
        ("num_attention_heads", [6], "an integer >= 1"),
        ("max_position_embeddings", None, "an integer >= 1"),
        ("head_dim", 15, "an even number"),
        ("num_key_value_heads", 4, "a divisor of num_attention_heads = 6"),
        ("num_key_value_heads", 0, "an integer >= 1"),
        ("rms_norm_eps", 0, "a number > 0"),
        ("rms_norm_eps", float("nan"), "a number > 0"),
        ("rms_norm_eps", "1e-5", "a number > 0"),
        ("rms_norm_eps", 10**400, "a number > 0"),
        ("hidden_act", "swiglu", "silu | swish | gelu | "),
        ("hidden_act", None, "silu | swish | gelu | "),
        ("hidden_act", ["silu"], "silu | swish | gelu | "),
        ("hidden_act", "prelu", f"{' | '.join(ACTIVATIONS)} (prelu and xielu have parameters of their own)"),
        ("hidden_act", "xielu", f"{' | '.join(ACTIVATIONS)} (prelu and xielu have parameters of their own)"),
        ("dtype", "float64", "float32 | float16 | bfloat16"),
        ("dtype", ["float32"], "float32 | float16 | bfloat16"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("attention_bias", 1, "true or false"),
        ("mlp_bias", None, "true or false"),
        ("attention_dropout", 1.5, "a probability, 0..1"),
        ("attention_dropout", "0.1", "a probability, 0..1"),
        ("classifier_dropout", -0.1, "a probability, 0..1"),
        ("hidden_dropout", 2, "a probability, 0..1"),
        ("token_classification_bias", 1, "true or false"),
        ("num_labels", 0, "an integer >= 1"),
        ("num_labels", "3", "an integer >= 1"),
        ("id2label", {}, 'an object of class number -> name: {"0": "no", "1": "yes"}'),
        ("id2label", ["a", "b"], "an object of class number -> name"),
        ("id2label", {"a": "no", "b": "yes"}, 'an object of class number -> name: {"0": "no", "1": "yes"}, numbered from 0'),
        ("id2label", {"0": "a", "2": "b"}, 'an object of class number -> name: {"0": "no", "1": "yes"}, numbered from 0'),
        ("id2label", {"0": "a", "1": 7}, "names, as text"),
        ("problem_type", "classification", "regression | single_label_classification | multi_label_classification"),
        ("architectures", "LlamaForCausalLM", "names, as text"),
        ("architectures", [1], "names, as text"),
        ("pad_token_id", 97, "null, -1 or a row of the embedding, 0..96"),
        ("pad_token_id", -2, "null, -1 or a row of the embedding, 0..96"),
        ("pad_token_id", "0", "null, -1 or a row of the embedding, 0..96"),
        ("pad_token_id", [0], "null, -1 or a row of the embedding, 0..96"),
        ("max_position_embeddings", 1 << 63, "an integer >= 1"),
        ("eos_token_id", "2", "a token id or null"),
        ("eos_token_id", [2, 3.5], "a token id or null"),
        ("bos_token_id", -2, "a token id or null"),
        ("rope_theta", 0, "a number > 0"),
        ("rope_theta", 10**400, "a number > 0"),
        ("rope_scaling", "llama3", "an object or null"),
        ("rope_parameters", [1], "an object or null"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_value_is_refused_with_the_value_and_what_is_expected(
    key: str, value: Any, expected: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", **{key: value})
    name = NAMES_IN_ERRORS.get(key, key)
    check_export_refused(capsys, checkpoint, f"bad value for {name}", f"expected: {expected}", "got:      ")


def test_sizes_default_as_in_hugging_face() -> None:
    optional = ("head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    config = config_from_dict(without(BASE, *optional))
    assert config.head_dim == 72 // 6
    assert config.num_key_value_heads == 6
    assert config.max_position_embeddings == 2048
    assert config.rms_norm_eps == 1e-6
    assert config.rope == RopeConfig(rope_type="default", rope_theta=10000.0)
    assert not config.tie_word_embeddings
    assert not config.attention_bias
    assert not config.mlp_bias
    assert config.eos_token_ids == (2,)


def test_lists_in_a_config_have_a_sane_length() -> None:
    for key, value in (("eos_token_id", [1] * 10_000), ("architectures", ["LlamaForCausalLM"] * 10_000)):
        with pytest.raises(ConfigError, match="10000 ") as caught:
            config_from_dict({**BASE, key: value})
        assert "at most 1000 " in caught.value.details["expected"]


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 5], (2, 5)), (None, ()), (-1, (-1,))])
def test_eos_token_may_be_one_id_a_list_or_absent(value: Any, ids: tuple[int, ...]) -> None:
    assert config_from_dict({**BASE, "eos_token_id": value}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({}, None),
    ],
)
def test_stated_dtype_is_read_from_both_spellings(keys: dict[str, str], dtype: str | None) -> None:
    assert config_from_dict({**BASE, **keys}).dtype == dtype


def test_config_that_transformers_writes_is_read_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    transformers.LlamaConfig(
        **TINY | {"max_position_embeddings": 512}, rope_parameters=rope, tie_word_embeddings=True, dtype="bfloat16"
    ).save_pretrained(tmp_path)
    got = load_config(tmp_path)
    assert got == LlamaConfig(
        **without(TINY, "eos_token_id") | {"max_position_embeddings": 512}, eos_token_ids=(2,),
        tie_word_embeddings=True, dtype="bfloat16", rope=RopeConfig(rope_type="llama3", rope_theta=500000.0, **LLAMA3),
    )  # fmt: skip


# ---- RoPE -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope_type", ["proportional", "ntk", "mrope", "Default", "su", "", 3, ["linear"]])
@pytest.mark.parametrize("holder", ["rope_parameters", "rope_scaling"])
def test_unknown_rope_type_is_refused(
    rope_type: Any, holder: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", **{holder: {"rope_type": rope_type, "factor": 4.0}})
    check_export_refused(
        capsys, checkpoint, f"unknown rope_type: {rope_type}", f"got:      {rope_type}",
        "expected: default | linear | dynamic | llama3 | yarn | longrope",
        str(checkpoint / "config.json"),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{"factor": 2.0}, {"factor": 2, "rope_theta": 10000}], ids=str)
def test_rope_type_is_also_read_from_the_oldest_spelling(settings: dict[str, Any]) -> None:
    config = config_from_dict({**BASE, "rope_scaling": {"type": "linear", **settings}})
    assert config.rope == RopeConfig(rope_type="linear", factor=2.0)
    both = {"type": "linear", "rope_type": "linear", **settings}
    assert config_from_dict({**BASE, "rope_scaling": both}) == config


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
            ["rope_type default", "got:      factor", "expected: none"],
        ),
        ({"rope_scaling": {"factor": 8.0}}, ["rope_type default", "got:      factor"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            ["rope_type llama3", "got:      factor", "low_freq_factor"],
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["got:      none", "original_max_position_embeddings"]),
        ({"rope_parameters": {**FULL, "beta_fast": 32}}, ["beta_fast", "expected: factor, high_freq_factor"]),
        ({"rope_parameters": {**FULL, "factor": "8"}}, ["bad value for RoPE factor", "'8'", "a number >= 1"]),
        ({"rope_parameters": {**FULL, "factor": -8}}, ["bad value for RoPE factor", "-8", "a number >= 1"]),
        ({"rope_parameters": {**FULL, "factor": None}}, ["bad value for RoPE factor", "None", "a number >= 1"]),
        ({"rope_parameters": {**FULL, "low_freq_factor": 0}}, ["bad value for RoPE low_freq_factor", "a number > 0"]),
        ({"rope_parameters": {**FULL, "original_max_position_embeddings": 64.0}}, ["64.0", "an integer >= 1"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_type linear", "got:      none", "expected: factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["bad value for RoPE factor: 0.5", "a number >= 1"]),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.0}},
            ["rope_type linear", "got:      attention_factor, factor", "expected: factor\n"],
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
            ["rope_type dynamic", "original_max_position_embeddings", "would be ignored or guessed"],
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.9}}, ["bad value for RoPE factor: 0.9", "a number >= 1"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e15}}, ["RoPE factor", "2^53 / max_position_embeddings"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e300}}, ["RoPE factor", "at most 1e+15"]),
        ({"rope_scaling": {"type": "linear", "factor": 10**100}}, ["RoPE factor", "at most 1e+15"]),
        ({"rope_theta": 10**100}, ["rope_theta", "at most 1e+15"]),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
            ["head_dim: 2", "at least 4 (dynamic RoPE divides by head_dim - 2)"],
        ),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_type yarn", "got:      none", "optional: attention_factor, beta_f"]),
        ({"rope_scaling": {**YARN, "low_freq_factor": 1.0}}, ["rope_type yarn", "low_freq_factor", "expected: factor;"]),
        ({"rope_scaling": {**YARN, "factor": None}}, ["bad value for RoPE factor: None", "a number >= 1"]),
        ({"rope_scaling": {**YARN, "beta_fast": 0}}, ["bad value for RoPE beta_fast: 0", "a number > 0"]),
        ({"rope_scaling": {**YARN, "beta_fast": 2, "beta_slow": 3}}, ["beta_fast: 2", "at least beta_slow = 3"]),
        ({"rope_scaling": {**YARN, "beta_slow": 33}}, ["RoPE beta_fast: None", "at least beta_slow = 33"]),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, ["RoPE attention_factor: 0", "a number > 0"]),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, ["RoPE mscale: 1.0", "one alone is ignored by transformers"]),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, ["RoPE mscale: None", "one alone is ignored"]),
        (
            {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.2}},
            ["RoPE mscale: 1.0", "nothing beside attention_factor, which transformers takes instead"],
        ),
        ({"rope_scaling": {**YARN, "truncate": None}}, ["RoPE truncate: None", "true or false"]),
        ({"rope_scaling": {**YARN, "truncate": 0}}, ["RoPE truncate: 0", "true or false"]),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, ["rope_theta: 1.0", "more than 1, for yarn takes its logarithm"]),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
            ["states original_max_position_embeddings twice", "32", "inside RoPE:", "64"],
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "original_max_position_embeddings": 64},
            ["original_max_position_embeddings is not read by rope_type linear", "64", "llama3 | yarn | longrope"],
        ),
        ({"original_max_position_embeddings": 64}, ["is not read by rope_type default", "transformers ignores it"]),
        ({"rope_scaling": without(LONGROPE, "long_factor")}, ["rope_type longrope", "expected: long_factor, short_f"]),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}}, ["short_factor", "7 numbers", "head_dim / 2 = 8"]),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 16}}, ["long_factor", "16 numbers", "head_dim / 2 = 8"]),
        ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 8}}, ["RoPE long_factor", "a list of numbers > 0"]),
        ({"rope_scaling": {**LONGROPE, "long_factor": "1"}}, ["RoPE long_factor: '1'", "a list of numbers > 0"]),
        ({"rope_scaling": {**LONGROPE, "short_factor": None}}, ["RoPE short_factor: None", "a list of numbers > 0"]),
        ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, ["embeddings: 1", "an integer >= 2"]),
        (
            {"rope_scaling": {**LONGROPE, "factor": 2.0, "attention_factor": 1.2}},
            ["RoPE factor: 2.0", "nothing beside attention_factor, which transformers takes instead"],
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_type default", "full_attention"]),
        ({"rope_parameters": {**FULL, "high_freq_factor": 1.0}}, ["1.0", "more than low_freq_factor = 1.0"]),
        ({"rope_scaling": {"type": "llama3", "rope_type": "default"}}, ["two RoPE types", "llama3", "default"]),
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}},
            ["rope_theta twice", "10000.0", "500000.0"],
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": FULL},
            ["states its RoPE settings twice", "'default'", "'llama3'"],
        ),
        (
            {"rope_parameters": {**FULL, "rope_theta": 500000.0}, "rope_scaling": FULL},
            ["states its RoPE settings twice"],  # of the two, transformers takes rope_scaling: theta 10000
        ),
        ({"rope_parameters": {"rope_theta": None}}, ["bad value for rope_theta: None", "a number > 0"]),
        ({"rope_theta": None}, ["bad value for rope_theta: None", "a number > 0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "absent or 1.0"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor", "0.25", "absent or 1.0"]),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_rope_setting_that_would_be_ignored_or_guessed_is_refused(
    keys: dict[str, Any], parts: list[str], make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", **keys)
    check_export_refused(capsys, checkpoint, *parts)


@patient
@given(
    theta=st.floats(1.0, 1e9),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.1, 2.0),
    band=st.floats(0.1, 8.0),
    context=st.integers(1, 1 << 20),
    with_type_key=st.booleans(),
)
def test_both_spellings_of_llama3_give_the_same_config(
    theta: float, factor: float, low: float, band: float, context: int, with_type_key: bool
) -> None:
    settings = {
        "factor": factor, "low_freq_factor": low, "high_freq_factor": low + band,
        "original_max_position_embeddings": context,
    }  # fmt: skip
    name = "type" if with_type_key else "rope_type"
    old = config_from_dict({**BASE, "rope_theta": theta, "rope_scaling": {name: "llama3", **settings}})
    new = config_from_dict({**BASE, "rope_parameters": {"rope_type": "llama3", "rope_theta": theta, **settings}})
    assert old == new
    assert old.rope == RopeConfig(rope_type="llama3", rope_theta=theta, **settings)


def test_both_spellings_of_the_default_give_the_same_config() -> None:
    old = config_from_dict({**BASE, "rope_theta": 5000, "rope_scaling": None})
    new = config_from_dict({**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    both = config_from_dict({**BASE, "rope_theta": 5000.0, "rope_parameters": {"rope_theta": 5000.0}})
    whole = config_from_dict({**BASE, "rope_theta": 5000.0, "partial_rotary_factor": 1.0})
    assert old == new == both == whole
    assert old.rope.rope_theta == 5000.0


def test_rope_settings_stated_twice_are_accepted_when_they_agree() -> None:
    data = {**BASE, "rope_theta": 1e5, "rope_scaling": FULL}
    assert config_from_dict({**data, "rope_parameters": {**FULL, "rope_theta": 1e5}}) == config_from_dict(data)
    named_otherwise = {"type": "llama3", **LLAMA3, "rope_theta": 1e5}
    assert config_from_dict({**data, "rope_parameters": named_otherwise}) == config_from_dict(data)


@pytest.mark.parametrize(
    "empty", [None, {}, {"type": "default"}, {"rope_type": "default"}, {"rope_type": None}], ids=str
)
@pytest.mark.parametrize("holder", ["rope_scaling", "rope_parameters"])
def test_empty_rope_settings_are_the_default(holder: str, empty: Any) -> None:
    assert config_from_dict({**BASE, "rope_theta": 5e5, holder: empty}).rope == RopeConfig(rope_theta=5e5)


@pytest.mark.parametrize("settings", [without(FULL, "original_max_position_embeddings"), YARN, LONGROPE], ids=str)
def test_original_context_comes_from_inside_beside_or_the_longest_position(settings: dict[str, Any]) -> None:
    key = "original_max_position_embeddings"
    inside = config_from_dict({**BASE, "rope_scaling": {**settings, key: 48}}).rope
    beside = config_from_dict({**BASE, "rope_scaling": settings, key: 48}).rope
    both = config_from_dict({**BASE, "rope_scaling": {**settings, key: 48}, key: 48}).rope
    assert inside == beside == both
    assert inside.original_max_position_embeddings == 48
    nowhere = config_from_dict({**BASE, "rope_scaling": settings}).rope
    assert nowhere.original_max_position_embeddings == BASE["max_position_embeddings"]


def test_optional_rope_settings_that_are_null_are_not_set() -> None:
    nulls = dict.fromkeys(["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
    data = {**BASE, "rope_scaling": YARN}
    assert config_from_dict({**BASE, "rope_scaling": {**YARN, **nulls}}) == config_from_dict(data)
    assert config_from_dict({**BASE, "rope_scaling": {**LONGROPE, "factor": None}}).rope.factor is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "su"}, "bad value for rope_type: 'su'"),
        ({"rope_theta": "1"}, "bad value for rope_theta: '1'"),
        ({"factor": 2.0}, "bad value for RoPE factor: 2.0"),
        ({"rope_type": "linear"}, "bad value for RoPE factor: None"),
        ({"rope_type": "llama3", "factor": 2.0}, "bad value for RoPE low_freq_factor: None"),
        ({"rope_type": "yarn", "factor": 2.0}, "bad value for RoPE original_max_position_embeddings: None"),
    ],
    ids=str,
)
def test_rope_config_checks_itself(fields: dict[str, Any], message: str) -> None:
    # A manifest is read without config.json.
    with pytest.raises(ConfigError) as caught:
        RopeConfig(**fields)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("rope", "follows", "longest"),
    [
        ({}, False, 128),
        ({"type": "linear", "factor": 4.0}, False, 128),
        ({"type": "dynamic", "factor": 1.0}, True, 128),
        ({"type": "dynamic", "factor": 2.999}, True, 383),
        (FULL, False, 128),
        (YARN, False, 128),
        (LONGROPE, True, 128),
    ],
    ids=str,
)
def test_only_dynamic_rope_reaches_beyond_the_longest_position(
    rope: dict[str, Any], follows: bool, longest: int
) -> None:
    config = config_from_dict({**BASE, "rope_scaling": rope})
    assert config.rope.follows_length is follows
    assert config.max_length == longest


# ---- keys nobody reads ------------------------------------------------------------------------------------------


def test_unknown_key_is_refused_and_named(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", sliding_window=4096, logit_scale=0.5)
    check_export_refused(
        capsys, checkpoint, "keys this exporter does not read: logit_scale, sliding_window", "4096", "0.5",
        "--allow-config-key logit_scale --allow-config-key sliding_window",
    )  # fmt: skip
    check_export_refused(
        capsys, checkpoint, "does not read: logit_scale\n", options=["--allow-config-key", "sliding_window"]
    )


def test_unknown_key_the_user_vouches_for_is_accepted(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    plain = load_checkpoint(checkpoint).config
    edit_json(checkpoint / "config.json", sliding_window=4096, logit_scale=0.5)
    assert load_checkpoint(checkpoint, ["sliding_window", "logit_scale"]).config == plain


def test_vouching_for_a_key_does_not_silence_a_setting_that_is_read() -> None:
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        config_from_dict({**BASE, "partial_rotary_factor": 0.5}, allow_keys=["partial_rotary_factor"])


def test_harmless_keys_change_nothing_and_each_has_a_reason() -> None:
    extra = {
        "transformers_version": "5.0.0", "use_cache": True, "pretraining_tp": 2, "sliding_window": None,
        "_name_or_path": "x", "label2id": {"A": 0}, "initializer_range": 0.1, "temperature": 0.7,
    }  # fmt: skip
    assert config_from_dict({**BASE, **extra}) == config_from_dict(BASE)
    assert config_from_dict({**BASE, **dict.fromkeys(HARMLESS_KEYS, 1)}) == config_from_dict(BASE)
    assert all(len(reason) > 20 for reason in HARMLESS_KEYS.values())


def test_no_key_is_in_two_tables() -> None:
    assert not set(HARMLESS_KEYS) & READ_KEYS
    assert not set(FOREIGN_KEYS) & READ_KEYS
    assert not set(FOREIGN_KEYS) & set(HARMLESS_KEYS)


def test_every_key_that_transformers_writes_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**TINY)
    assert set(config.to_dict()) <= READ_KEYS | set(HARMLESS_KEYS)
    assert {field.name for field in dataclasses.fields(config)} <= READ_KEYS | set(HARMLESS_KEYS)


@pytest.mark.parametrize("key", sorted(FOREIGN_KEYS))
def test_key_of_another_family_is_refused_with_what_it_does_there(key: str) -> None:
    neutral, reason = FOREIGN_KEYS[key]
    for value in (*neutral, None):
        assert config_from_dict({**BASE, key: value}) == config_from_dict(BASE)
    for value in (0.5, "yes", [3], True if True not in neutral else False):
        with pytest.raises(ConfigError, match=f"keys this exporter does not read: {key}\n") as caught:
            config_from_dict({**BASE, key: value})
        assert caught.value.hint is not None
        assert caught.value.hint.startswith(f"{key} {reason}; if they do not change the numbers, say so: ")
        assert config_from_dict({**BASE, key: value}, allow_keys=[key]) == config_from_dict(BASE)


def test_false_is_not_taken_for_the_number_zero() -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        config_from_dict({**BASE, "num_experts": False})


def test_layers_of_full_attention_are_what_llama_has() -> None:
    assert config_from_dict({**BASE, "layer_types": ["full_attention"] * 2}) == config_from_dict(BASE)
    with pytest.raises(ConfigError, match="layer_types"):
        config_from_dict({**BASE, "layer_types": ["full_attention", "sliding_attention"]})


def test_private_key_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not read: _rope_type_labels"):
        config_from_dict({**BASE, "_rope_type_labels": ["x"]})


def test_quantised_checkpoint_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    check_export_refused(capsys, checkpoint, "quantised checkpoints are not supported", "'bits': 4", "original float32")


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "llama3", "default", "2"])
ROPE_KEYS = sorted({"type", *(field.name for field in dataclasses.fields(RopeConfig))})
ROPE_VALUES = JSON_VALUES | st.sampled_from([2.0, 64, *SUPPORTED_ROPE_TYPES]) | st.just([1.5] * 8)
ROPE_OBJECTS = st.dictionaries(st.sampled_from(ROPE_KEYS), ROPE_VALUES, max_size=6)
KEYS = sorted(READ_KEYS)


@patient
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON_VALUES | st.lists(JSON_VALUES, max_size=2) | ROPE_OBJECTS, max_size=3)
)
def test_any_json_values_give_a_config_or_a_config_error(changes: dict[str, Any]) -> None:
    try:
        config = config_from_dict(json.loads(json.dumps({**BASE, **changes})))
    except ConfigError as refused:
        hint = refused.hint
    else:
        hint = "none needed"
        assert config.head_dim % 2 == 0
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert config.rope.rope_type in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
        assert config.max_length >= config.max_position_embeddings
    assert hint


# ---- tasks and labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["LlamaForCausalLM"], "causal-lm"),
        (["LLaMAForCausalLM"], "causal-lm"),
        (["LlamaForSequenceClassification"], "sequence-classification"),
        (["LlamaForTokenClassification"], "token-classification"),
        (["LlamaForQuestionAnswering"], "question-answering"),
        (["LlamaModel"], "feature-extraction"),
        (["LlamaForCausalLM", "LLaMAForCausalLM"], "causal-lm"),
        ([], "causal-lm"),
        (None, "causal-lm"),
    ],
    ids=str,
)
def test_auto_task_goes_by_the_architecture(architectures: list[str] | None, task: str) -> None:
    config = config_from_dict({**BASE, "architectures": architectures})
    assert config.architectures == tuple(architectures or ())
    assert resolve_task("auto", config) == task
    for asked in TASKS:
        assert resolve_task(asked, config) == asked


def test_every_llama_class_of_transformers_has_a_task() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    for name in set(modeling.__all__) - {"LlamaPreTrainedModel"}:
        assert resolve_task("auto", config_from_dict({**BASE, "architectures": [name]})) in TASKS


def test_unknown_architecture_is_refused_unless_a_task_is_asked_for(
    make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint(architectures=["LlamaForRewardModel"])
    check_export_refused(
        capsys, checkpoint, "unknown architecture: LlamaForRewardModel", "LlamaForCausalLM, LlamaForSequenceClass",
        "--task causal-lm | sequence-classification",
    )  # fmt: skip
    assert load_checkpoint(checkpoint, task="causal-lm").task == "causal-lm"


def test_architectures_of_several_tasks_are_refused() -> None:
    config = config_from_dict({**BASE, "architectures": ["LlamaModel", "LlamaForCausalLM"]})
    with pytest.raises(ConfigError, match="names architectures of several tasks") as caught:
        resolve_task("auto", config)
    assert caught.value.hint == "choose one: --task causal-lm | feature-extraction"


@pytest.mark.parametrize("task", ["text-generation", "", "Auto"])
def test_unknown_task_is_refused(task: str) -> None:
    expected = (
        "auto | causal-lm | sequence-classification | token-classification | question-answering | feature-extraction"
    )
    for refuse in (lambda: ExportConfig(task=task), lambda: resolve_task(task, config_from_dict(BASE))):
        with pytest.raises(ConfigError, match="bad value for task") as caught:
            refuse()
        assert caught.value.details == {"got": repr(task), "expected": expected}


@pytest.mark.parametrize(
    ("keys", "number", "labels"),
    [
        ({}, 2, ()),
        ({"num_labels": 5}, 5, ()),
        ({"num_labels": None, "id2label": None}, 2, ()),
        ({"id2label": {"0": "A"}}, 1, ("A",)),
        ({"id2label": {"1": "yes", "0": "no"}, "label2id": {"no": 0, "yes": 1}}, 2, ("no", "yes")),
        ({"id2label": {str(i): f"L{i}" for i in (10, *range(10))}}, 11, tuple(f"L{i}" for i in range(11))),
        ({"id2label": {"0": "A", "1": "B", "2": "C"}, "num_labels": 3}, 3, ("A", "B", "C")),
    ],
    ids=str,
)
def test_labels_are_those_of_hugging_face(keys: dict[str, Any], number: int, labels: tuple[str, ...]) -> None:
    config = config_from_dict({**BASE, **keys})
    assert (config.num_labels, config.labels) == (number, labels)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(**TINY, **{key: value for key, value in keys.items() if value is not None})
    assert theirs.num_labels == number
    assert not labels or tuple(theirs.id2label[i] for i in range(number)) == labels


def test_number_of_labels_stated_twice_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", num_labels=2, id2label={"0": "A", "1": "B", "2": "C"})
    check_export_refused(
        capsys, checkpoint, "states the number of labels twice", "num_labels: 2", "id2label:   3 labels",
        "delete num_labels",
    )  # fmt: skip


def test_single_label_classification_of_one_label_is_refused_as_in_hugging_face() -> None:
    with pytest.raises(ConfigError, match="bad value for problem_type") as caught:
        config_from_dict({**BASE, "num_labels": 1, "problem_type": "single_label_classification"})
    assert caught.value.details["expected"].startswith("regression or multi_label_classification")


def test_names_and_number_of_labels_must_fit_in_a_manifest_too() -> None:
    with pytest.raises(ConfigError, match="bad value for id2label") as caught:
        dataclasses.replace(config_from_dict(BASE), labels=("A", "B", "C"))
    assert caught.value.details["expected"] == "num_labels = 2 names"


@pytest.mark.parametrize(
    ("keys", "dropout"),
    [
        ({}, 0.1),
        ({"classifier_dropout": 0.0}, 0.0),
        ({"hidden_dropout": 0.3}, 0.3),
        ({"classifier_dropout": None, "hidden_dropout": 0.3}, 0.3),
        ({"classifier_dropout": 0.2, "hidden_dropout": 0.3}, 0.2),
    ],
    ids=str,
)
def test_classifier_dropout_is_that_of_hugging_face(keys: dict[str, Any], dropout: float) -> None:
    assert config_from_dict({**BASE, **keys}).classifier_dropout == dropout
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForTokenClassification(transformers.LlamaConfig(**TINY, **keys))
    assert model.dropout.p == dropout


@pytest.mark.parametrize("pad", [None, -1, 0, 96])
def test_padding_token_may_be_absent_old_or_a_row_of_the_embedding(pad: int | None) -> None:
    assert config_from_dict({**BASE, "pad_token_id": pad}).pad_token_id == pad


def test_attention_dropout_that_is_null_is_none() -> None:
    assert config_from_dict({**BASE, "attention_dropout": None}).attention_dropout == 0.0
    assert config_from_dict({**BASE, "attention_dropout": 0.25}).attention_dropout == 0.25


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_hugging_face(name: str) -> None:
    activations = pytest.importorskip("transformers.activations")
    assert config_from_dict({**BASE, "hidden_act": name}).hidden_act == name
    assert name in activations.ACT2FN


def test_activations_are_those_of_the_model() -> None:
    assert set(ACTIVATIONS) == set(mlp.ACTIVATIONS)


def test_hidden_size_that_does_not_divide_needs_a_head_dim() -> None:
    with pytest.raises(ConfigError, match="bad value for hidden_size: 73") as caught:
        config_from_dict({**without(BASE, "head_dim"), "hidden_size": 73})
    assert caught.value.details["expected"] == "a multiple of num_attention_heads = 6, or a head_dim"
    assert config_from_dict({**BASE, "hidden_size": 73}).head_dim == 16


def test_two_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="states its dtype twice") as caught:
        config_from_dict({**BASE, "dtype": "float16", "torch_dtype": "bfloat16"})
    assert caught.value.details["dtype"] == "float16"
    assert caught.value.details["torch_dtype"] == "bfloat16"


# ---- what follows from a config ---------------------------------------------------------------------------------


@patient
@given(
    layers=st.integers(1, 5), groups=st.integers(1, 4), per_group=st.integers(1, 4), half=st.integers(1, 32),
    hidden=st.integers(1, 300), mlp=st.integers(1, 300), vocab=st.integers(1, 500), tied=st.booleans(),
    attention_bias=st.booleans(), mlp_bias=st.booleans(),
)  # fmt: skip
def test_parameter_count_is_the_sum_of_the_textbook_terms(
    layers: int, groups: int, per_group: int, half: int, hidden: int, mlp: int, vocab: int, tied: bool,
    attention_bias: bool, mlp_bias: bool,
) -> None:  # fmt: skip
    heads, dim = groups * per_group, 2 * half
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=dim, tie_word_embeddings=tied,
        attention_bias=attention_bias, mlp_bias=mlp_bias,
    )  # fmt: skip
    attention = 2 * hidden * heads * dim + 2 * hidden * groups * dim
    attention += (heads * dim + 2 * groups * dim + hidden) if attention_bias else 0
    feed_forward = 3 * hidden * mlp + ((2 * mlp + hidden) if mlp_bias else 0)
    total = (1 if tied else 2) * vocab * hidden + hidden + layers * (attention + feed_forward + 2 * hidden)
    assert count_parameters(config) == total
    assert ("lm_head.weight" in expected_tensors(config)) is not tied


@pytest.mark.parametrize(
    ("task", "keys", "head"),
    [
        ("causal-lm", {}, {"lm_head.weight": (97, 72)}),
        ("causal-lm", {"tie_word_embeddings": True}, {}),
        ("sequence-classification", {"num_labels": 3}, {"score.weight": (3, 72)}),
        ("token-classification", {"num_labels": 3}, {"score.weight": (3, 72), "score.bias": (3,)}),
        ("token-classification", {"token_classification_bias": False}, {"score.weight": (2, 72)}),
        ("question-answering", {"num_labels": 3}, {"qa_outputs.weight": (2, 72), "qa_outputs.bias": (2,)}),
        ("feature-extraction", {}, {}),
    ],
    ids=str,
)
def test_tensors_are_the_parameters_of_hugging_face(
    task: Task, keys: dict[str, Any], head: dict[str, tuple[int, ...]]
) -> None:
    config = config_from_dict({**BASE, **keys})
    tensors = expected_tensors(config, task)
    assert {name: shape for name, shape in tensors.items() if not name.startswith("model.")} == head
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, CLASSES[task])(transformers.LlamaConfig(**TINY, **keys))
    want = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    prefix = {"question-answering": "transformer.", "feature-extraction": ""}.get(task, "model.")
    assert {name.replace("model.", prefix, 1): shape for name, shape in tensors.items()} == want
    assert count_parameters(config, task) == sum(math.prod(shape) for shape in want.values())


@pytest.mark.parametrize("task", TASKS)
def test_modules_are_those_of_the_reference_model(task: Task) -> None:
    """The linear layers by name and shape, and the ops that the task needs."""
    config = config_from_dict({**BASE, "num_labels": 3, "pad_token_id": 0})
    with torch.device("meta"):
        model = MODEL_CLASSES[task](config)
    described = {module.name: module for module in decoder_modules(config, task)}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name: module.matrix for name, module in described.items() if module.matrix} == {
        name: tuple(module.weight.shape) for name, module in linears.items()
    }
    assert [module.matrix for module in linear_groups(config, task)[0]] == [(96, 72), (32, 72), (32, 72)]
    assert (ATTENTION.op_type in op_counts(config, task)) == INTERFACES[task].has_cache


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_softmax_scale_is_a_float32_number(head_dim: int) -> None:
    config = dataclasses.replace(config_from_dict(BASE), head_dim=head_dim)
    assert config.softmax_scale == float(np.float32(config.softmax_scale))
    assert math.isclose(config.softmax_scale, head_dim**-0.5, rel_tol=2**-24)


def test_configs_are_frozen() -> None:
    for config in (config_from_dict(BASE), RopeConfig(), ExportConfig(), EngineConfig()):
        field = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, "changed")


@pytest.mark.parametrize("weights", ["move", "Copy", ""])
def test_unknown_weights_mode_is_refused(weights: Any) -> None:
    with pytest.raises(ConfigError, match="bad value for weights") as caught:
        ExportConfig(weights=weights)
    assert caught.value.details == {"got": repr(weights), "expected": "auto | link | copy | embed"}


@pytest.mark.parametrize(
    ("settings", "got", "expected"),
    [
        ({"backend": "onnx"}, "'onnx'", "tensorrt-rtx | tensorrt"),
        ({"max_seq_len": 1}, "1", "at least 2 tokens"),
        ({"max_batch": 0}, "0", "at least 1 row, fewer than 2^31"),
        ({"max_batch": 2**31}, "2147483648", "at least 1 row, fewer than 2^31"),
        ({"ops": "fast"}, "fast", "plugin | native | OP=native,..."),
        ({"ops": "LlamaRMSNorm"}, "LlamaRMSNorm", "plugin | native | OP=native,..."),
        ({"ops": "LlamaRMSNorm=plugin"}, "LlamaRMSNorm=plugin", "plugin | native | OP=native,..."),
        ({"ops": "Softmax=native"}, "Softmax=native", "plugin | native | OP=native,..."),
        ({"ops": ""}, "", "plugin | native | OP=native,..."),
    ],
)
def test_bad_engine_setting_is_refused(settings: dict[str, Any], got: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)
    assert caught.value.details == {"got": got, "expected": expected}
    assert caught.value.hint


@pytest.mark.parametrize(
    ("ops", "kept", "plugins"),
    [
        ("plugin", "plugin", {"LlamaRMSNorm", "LlamaAddRMSNorm", "LlamaAttention", "LlamaMaskedAttention"}),
        ("native", "native", set()),
        ("LlamaRMSNorm=native", "LlamaRMSNorm=native", {"LlamaAddRMSNorm", "LlamaAttention", "LlamaMaskedAttention"}),
        (
            "LlamaRMSNorm=native,LlamaAddRMSNorm=native",
            "LlamaAddRMSNorm=native,LlamaRMSNorm=native",
            {"LlamaAttention", "LlamaMaskedAttention"},
        ),
        (
            "LlamaRMSNorm=native,LlamaAddRMSNorm=native,LlamaAttention=native",
            "LlamaAddRMSNorm=native,LlamaAttention=native,LlamaRMSNorm=native",
            {"LlamaMaskedAttention"},
        ),
        (",".join(f"{op}=native" for op in CUSTOM_OPS), "native", set()),
    ],
)
def test_ops_have_one_spelling(ops: str, kept: str, plugins: set[str]) -> None:
    config = EngineConfig(ops=ops)
    assert config.ops == kept
    assert config.plugin_ops == plugins
