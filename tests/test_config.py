"""``config.json`` is read as Hugging Face means it, or refused with the key, the value and what was expected."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, MakeCheckpoint, edit_json
from hypothesis import given
from hypothesis import strategies as st
from support import check_export_refused, patient

from llama_export.checkpoint import load_checkpoint
from llama_export.config import (
    EngineConfig,
    ExportConfig,
    LlamaConfig,
    RopeConfig,
    config_from_dict,
    expected_tensors,
    load_config,
)
from llama_export.errors import ConfigError

Capture = pytest.CaptureFixture[str]
BASE = {"model_type": "llama", **TINY}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FULL = {"rope_type": "llama3", **LLAMA3}


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


@pytest.mark.parametrize("value", ["mistral", "qwen2", "Llama", "llama4", ..., None, 7])
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
        ("hidden_act", "gelu", "silu"),
        ("hidden_act", None, "silu"),
        ("dtype", "float64", "float32 | float16 | bfloat16"),
        ("dtype", ["float32"], "float32 | float16 | bfloat16"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("attention_bias", 1, "true or false"),
        ("mlp_bias", None, "true or false"),
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
    name = "bos/eos/pad_token_id" if key in ("eos_token_id", "bos_token_id") else key
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


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 5], (2, 5)), (None, ()), (-1, (-1,))])
def test_eos_token_may_be_one_id_a_list_or_absent(value: Any, ids: tuple[int, ...]) -> None:
    assert config_from_dict({**BASE, "eos_token_id": value}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float32"}, "float32"),
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


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "Default", "su", 3])
@pytest.mark.parametrize("holder", ["rope_parameters", "rope_scaling"])
def test_unknown_rope_type_is_refused(
    rope_type: Any, holder: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", **{holder: {"rope_type": rope_type, "factor": 4.0}})
    check_export_refused(
        capsys, checkpoint, f"unknown rope_type: {rope_type}", f"got:      {rope_type}", "expected: default | llama3",
        str(checkpoint / "config.json"),
    )  # fmt: skip


def test_rope_type_is_also_read_from_the_oldest_spelling() -> None:
    with pytest.raises(ConfigError, match="unknown rope_type: linear"):
        config_from_dict({**BASE, "rope_scaling": {"type": "linear", "factor": 2.0}})


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
        ({"rope_parameters": {**FULL, "factor": "8"}}, ["bad value for RoPE factor", "'8'", "a number > 0"]),
        ({"rope_parameters": {**FULL, "factor": -8}}, ["bad value for RoPE factor", "-8", "a number > 0"]),
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


def test_bookkeeping_null_and_private_keys_are_accepted() -> None:
    extra = {
        "architectures": ["LlamaForCausalLM"], "transformers_version": "5.0.0", "use_cache": True, "pretraining_tp": 2,
        "attention_dropout": 0.1, "sliding_window": None, "_name_or_path": "x", "id2label": {"0": "A"},
    }  # fmt: skip
    assert config_from_dict({**BASE, **extra}) == config_from_dict(BASE)


def test_quantised_checkpoint_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    check_export_refused(capsys, checkpoint, "quantised checkpoints are not supported", "'bits': 4", "original float32")


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "llama3", "default", "2"])
ROPE_OBJECTS = st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", *LLAMA3]), JSON_VALUES, max_size=6)
KEYS = sorted({*BASE, "rope_theta", "rope_scaling", "rope_parameters", "dtype", "tie_word_embeddings"})


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
        assert config.rope.rope_type in ("default", "llama3")
    assert hint


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
    assert config.num_parameters == total
    assert ("lm_head.weight" in expected_tensors(config)) is not tied


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


@pytest.mark.parametrize("weights", ["embed", "Copy", ""])
def test_unknown_weights_mode_is_refused(weights: Any) -> None:
    with pytest.raises(ConfigError, match="bad value for weights") as caught:
        ExportConfig(weights=weights)
    assert caught.value.details == {"got": repr(weights), "expected": "auto | link | copy"}


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
        ("plugin", "plugin", {"LlamaRMSNorm", "LlamaAddRMSNorm", "LlamaAttention"}),
        ("native", "native", set()),
        ("LlamaRMSNorm=native", "LlamaRMSNorm=native", {"LlamaAddRMSNorm", "LlamaAttention"}),
        (
            "LlamaRMSNorm=native,LlamaAddRMSNorm=native",
            "LlamaAddRMSNorm=native,LlamaRMSNorm=native",
            {"LlamaAttention"},
        ),
        ("LlamaRMSNorm=native,LlamaAddRMSNorm=native,LlamaAttention=native", "native", set()),
    ],
)
def test_ops_have_one_spelling(ops: str, kept: str, plugins: set[str]) -> None:
    config = EngineConfig(ops=ops)
    assert config.ops == kept
    assert config.plugin_ops == plugins
