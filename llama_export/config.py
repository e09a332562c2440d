"""What to export and how: the checkpoint's own config, and the settings of an export and of an engine.

Role: the first stage. ``config.json`` goes in, frozen dataclasses come out; nothing here opens a tensor file.
Names are Hugging Face's. The rule is *fail closed*: a key that is neither read nor known to be harmless stops the
export, because a setting dropped in silence is a clean build with wrong numbers.

Source: https://huggingface.co/docs/transformers/model_doc/llama (LlamaConfig), transformers 5.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llama_export.errors import ConfigError

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(DType)
Backend = Literal["tensorrt-rtx", "tensorrt"]
BACKENDS: tuple[str, ...] = get_args(Backend)
WeightsMode = Literal["auto", "link", "copy"]
WEIGHTS_MODES: tuple[str, ...] = get_args(WeightsMode)
CUSTOM_OPS = ("LlamaRMSNorm", "LlamaAddRMSNorm", "LlamaAttention")
"""The graph's ops that an engine computes by a plugin or by TensorRT's own layers; must equal ``ops.OP_SPECS``."""
TASK = "causal-lm"

SUPPORTED_ROPE_TYPES = ("default", "llama3")
_ROPE_KEYS = {
    "default": frozenset[str](),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}

_REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ_KEYS = frozenset(
    (
        *_REQUIRED_KEYS,
        *("model_type", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "partial_rotary_factor"),
        "quantization_config",
    )
)
# Keys that Llama's inference maths never reads. ``pretraining_tp`` only reorders a sum; dropout and losses are
# training; the rest is bookkeeping that transformers writes into every config.
_HARMLESS_KEYS = frozenset(
    (
        *("architectures", "transformers_version", "use_cache", "initializer_range", "attention_dropout"),
        *("pretraining_tp", "id2label", "label2id", "num_labels", "problem_type", "name_or_path", "auto_map"),
        *("output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "output_scores"),
        *("torchscript", "use_bfloat16", "is_encoder_decoder", "is_decoder", "cross_attention_hidden_size"),
        *("add_cross_attention", "tie_encoder_decoder", "finetuning_task", "task_specific_params", "tokenizer_class"),
        *("prefix", "sep_token_id", "decoder_start_token_id", "chunk_size_feed_forward", "pruned_heads"),
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "top_k", "top_p"),
        *("diversity_penalty", "temperature", "typical_p", "repetition_penalty", "length_penalty", "bad_words_ids"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "remove_invalid_values"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "tf_legacy_loss", "classifier_dropout", "unsloth_version", "unsloth_fixed"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, half-split layout (rotate pairs ``i`` and ``i + head_dim / 2``)."""

    rope_type: str = "default"
    """``default`` (https://arxiv.org/abs/2104.09864) or ``llama3`` (frequency-dependent scaling of Llama 3.1)."""
    rope_theta: float = 10000.0
    """Base of the geometric sequence of wavelengths, > 0."""
    factor: float | None = None
    """llama3: long wavelengths are slowed down by this factor, >= 1."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above ``original_max_position_embeddings / low_freq_factor`` are scaled fully."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below ``original_max_position_embeddings / high_freq_factor`` are kept."""
    original_max_position_embeddings: int | None = None
    """llama3: context length of the pre-training, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The facts of a checkpoint that decide its maths. Field names are those of Hugging Face's ``LlamaConfig``."""

    vocab_size: int
    """V, rows of the embedding."""
    hidden_size: int
    """E, width of the residual stream."""
    intermediate_size: int
    """Width of the SwiGLU MLP."""
    num_hidden_layers: int
    """L, decoder layers."""
    num_attention_heads: int
    """H, query heads."""
    num_key_value_heads: int
    """G, key/value heads; H is a multiple of G."""
    head_dim: int
    """D, width of one head; even. H * D need not equal ``hidden_size``."""
    hidden_act: str = "silu"
    """Activation of the MLP's gate."""
    max_position_embeddings: int = 2048
    """Longest sequence the checkpoint was made for, tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean of squares inside the root. Used at float32 precision, as PyTorch does."""
    rope: RopeConfig = RopeConfig()
    """Rotary embedding, from either spelling (``rope_theta`` + ``rope_scaling``, or ``rope_parameters``)."""
    tie_word_embeddings: bool = False
    """The output projection is the embedding matrix."""
    attention_bias: bool = False
    """q, k, v and o projections have a bias."""
    mlp_bias: bool = False
    """gate, up and down projections have a bias."""
    dtype: str | None = None
    """The dtype the config states, if any."""
    bos_token_id: int | None = None
    """First token of a sequence, if the checkpoint names one."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generation."""
    pad_token_id: int | None = None
    """Padding token, if the checkpoint names one."""

    def __post_init__(self) -> None:
        for name in (*_REQUIRED_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check(
                _is_int(getattr(self, name)) and getattr(self, name) > 0, name, getattr(self, name), "an integer >= 1"
            )
        _check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (RoPE rotates pairs)")
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        _check(
            _is_number(self.rms_norm_eps) and self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "a number > 0"
        )
        _check(self.hidden_act == "silu", "hidden_act", self.hidden_act, "silu")
        _check(self.dtype is None or self.dtype in DTYPES, "dtype", self.dtype, " | ".join(DTYPES))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for token in (*self.eos_token_ids, self.bos_token_id, self.pad_token_id):
            # -1 is an old spelling of "no padding token".
            valid = token is None or (_is_int(token) and -1 <= token)
            _check(valid, "bos/eos/pad_token_id", token, "a token id or null")

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head_dim), rounded to float32: the value an ONNX attribute can hold."""
        return float32_value(1.0 / math.sqrt(self.head_dim))

    @property
    def num_parameters(self) -> int:
        """Distinct parameters: a tied output projection is counted once."""
        return sum(math.prod(shape) for shape in expected_tensors(self).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Settings of one export."""

    dtype: str = "auto"
    """Compute dtype of the graph; ``auto`` is the dtype the checkpoint states, else the one it is stored in."""
    weights: WeightsMode = "auto"
    """How the weight files reach another folder: ``auto`` reflinks where the file system can and copies otherwise."""
    force: bool = False
    """Replace an existing bundle."""
    hash_weights: bool = False
    """Record a SHA-256 of every weight file (reads every byte)."""
    allow_config_keys: tuple[str, ...] = ()
    """Unknown ``config.json`` keys the user vouches for."""

    def __post_init__(self) -> None:
        _check(self.weights in WEIGHTS_MODES, "weights", self.weights, " | ".join(WEIGHTS_MODES))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine build."""

    backend: Backend = "tensorrt-rtx"
    """Which TensorRT builds and later runs the engine."""
    ops: str = "plugin"
    """``plugin``: our plugin layers. ``native``: TensorRT's own layers from the ONNX function bodies.
    ``OP=native,...``: these ops native, the others by plugins. Kept in one spelling, sorted."""
    max_seq_len: int | None = None
    """KV-cache capacity in tokens, fixed at build; None: min(max_position_embeddings, 4096)."""
    max_batch: int = 4
    """Largest batch of the prefill and decode profiles, rows."""
    tf32: bool = False
    """Let float32 matrix products round their inputs to TF32 (10 bits). Off: float32 means float32."""
    force: bool = False
    """Replace an engine of the same name."""

    def __post_init__(self) -> None:
        _check(self.backend in BACKENDS, "backend", self.backend, " | ".join(BACKENDS))
        _check(self.max_seq_len is None or self.max_seq_len >= 2, "max_seq_len", self.max_seq_len, "at least 2 tokens")
        _check(1 <= self.max_batch < 2**31, "max_batch", self.max_batch, "at least 1 row, fewer than 2^31")
        native = _native_ops(self.ops)
        spelling = "native" if len(native) == len(CUSTOM_OPS) else ",".join(f"{op}=native" for op in sorted(native))
        object.__setattr__(self, "ops", spelling or "plugin")

    @property
    def plugin_ops(self) -> frozenset[str]:
        """The ops that become plugin layers."""
        return frozenset(CUSTOM_OPS) - _native_ops(self.ops)


def _native_ops(ops: str) -> frozenset[str]:
    """The ops that ``--ops`` leaves to TensorRT's own layers."""
    if ops in ("plugin", "native"):
        return frozenset(CUSTOM_OPS) if ops == "native" else frozenset()
    parts = [part.partition("=") for part in ops.split(",")] if isinstance(ops, str) else []
    if not parts or any(op not in CUSTOM_OPS or how != "native" for op, _, how in parts):
        raise ConfigError(
            f"unknown value for ops: {ops}",
            details={"got": ops, "expected": "plugin | native | OP=native,..."},
            hint="the ops are " + ", ".join(CUSTOM_OPS) + ", for example --ops LlamaRMSNorm=native",
        )
    return frozenset(op for op, _, _ in parts)


def load_config(folder: Path, allow_keys: Collection[str] = ()) -> LlamaConfig:
    """Reads ``folder/config.json``.

    Raises:
        ConfigError: the file is missing, is not JSON, or states something this package does not compute.
    """
    return config_from_dict(
        load_json_object(folder / "config.json"), source=str(folder / "config.json"), allow_keys=allow_keys
    )


def load_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file the user owns.

    Raises:
        ConfigError: missing, unreadable, not UTF-8, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"`{path.name}` is missing",
            details={"looked in": path.parent},
            hint="a checkpoint is a Hugging Face folder: config.json, *.safetensors, tokenizer.json",
        ) from None
    except (OSError, ValueError, RecursionError) as err:  # ValueError: not UTF-8, not JSON, an integer of 5000 digits
        raise ConfigError(
            f"`{path.name}` cannot be read as JSON",
            details={"file": path, "reason": err},
            hint="restore the file from its source",
        ) from err
    if not isinstance(data, dict):
        raise ConfigError(
            f"`{path.name}` is not a JSON object",
            details={"file": path, "got": type(data).__name__, "expected": "{...}"},
            hint="restore the file from its source",
        )
    return data


def config_from_dict(
    data: Mapping[str, Any], *, source: str = "config.json", allow_keys: Collection[str] = ()
) -> LlamaConfig:
    """A validated :class:`LlamaConfig` from the parsed ``config.json``.

    Args:
        data: the JSON object.
        source: named in errors.
        allow_keys: unknown keys to accept.

    Raises:
        ConfigError: another ``model_type``, an unknown ``rope_type``, a missing size, or a key nobody reads.
    """
    model_type = data.get("model_type")
    if model_type != "llama":
        raise ConfigError(
            f"unsupported model_type: {model_type}",
            details={"file": source, "got": model_type, "expected": "llama"},
            hint="only Llama checkpoints are exported; a model of the same architecture must say so in its config.json",
        )
    missing = [key for key in _REQUIRED_KEYS if data.get(key) is None]
    if missing:
        raise ConfigError(
            f"`config.json` lacks {', '.join(missing)}",
            details={"file": source, "expected": ", ".join(_REQUIRED_KEYS)},
            hint="sizes are never guessed: add them to config.json",
        )
    if data.get("quantization_config") is not None:
        raise ConfigError(
            "quantised checkpoints are not supported",
            details={"file": source, "quantization_config": data["quantization_config"]},
            hint="export the original float32, float16 or bfloat16 checkpoint",
        )
    unknown = sorted(
        key
        for key, value in data.items()
        if key not in _READ_KEYS
        and key not in _HARMLESS_KEYS
        and key not in allow_keys
        and not key.startswith("_")
        and value is not None
    )
    if unknown:
        raise ConfigError(
            f"`config.json` has keys this exporter does not read: {', '.join(unknown)}",
            details={"file": source, "got": {key: data[key] for key in unknown}},
            hint="if they do not change the numbers, say so: "
            + " ".join(f"--allow-config-key {key}" for key in unknown),
        )
    heads = data["num_attention_heads"]
    head_dim = data.get("head_dim")
    if head_dim is None:
        _check(_is_int(heads) and heads > 0, "num_attention_heads", heads, "an integer >= 1")
        _check(_is_int(data["hidden_size"]), "hidden_size", data["hidden_size"], "an integer >= 1")
        head_dim = data["hidden_size"] // heads
    kv_heads = data.get("num_key_value_heads")
    eos = data.get("eos_token_id")
    dtype = data.get("dtype", data.get("torch_dtype"))
    return LlamaConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_hidden_layers=data["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        hidden_act=data.get("hidden_act", "silu"),
        max_position_embeddings=data.get("max_position_embeddings", 2048),
        rms_norm_eps=data.get("rms_norm_eps", 1e-6),
        rope=_rope_from_dict(data, source),
        tie_word_embeddings=data.get("tie_word_embeddings", False),
        attention_bias=data.get("attention_bias", False),
        mlp_bias=data.get("mlp_bias", False),
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
        bos_token_id=data.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=data.get("pad_token_id"),
    )


def _rope_from_dict(data: Mapping[str, Any], source: str) -> RopeConfig:
    """Both spellings: transformers 5 writes ``rope_parameters``, earlier ones ``rope_theta`` and ``rope_scaling``."""
    for key in ("rope_parameters", "rope_scaling"):
        _check(data.get(key) is None or isinstance(data[key], dict), key, data.get(key), "an object or null")
    new, old = data.get("rope_parameters") or {}, data.get("rope_scaling") or {}
    if new and old and {**new, **old} != new:
        raise ConfigError(
            "`config.json` states its RoPE settings twice",
            details={"file": source, "rope_parameters": new, "rope_scaling": old},
            hint="keep one of them",
        )
    rope = dict(new or old)
    old_type, new_type = rope.pop("type", None), rope.pop("rope_type", None)
    if old_type is not None and new_type is not None and old_type != new_type:
        raise ConfigError(
            "`config.json` names two RoPE types",
            details={"file": source, "type": old_type, "rope_type": new_type},
            hint="keep rope_type and delete type",
        )
    rope_type = new_type or old_type or "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ConfigError(
            f"unknown rope_type: {rope_type}",
            details={"file": source, "got": rope_type, "expected": " | ".join(SUPPORTED_ROPE_TYPES)},
            hint="a RoPE type that is not implemented is refused: falling back to `default` would give wrong positions",
        )
    theta = rope.pop("rope_theta", None)
    if theta is None:
        theta = data.get("rope_theta", 10000.0)
    elif data.get("rope_theta") is not None and data["rope_theta"] != theta:
        raise ConfigError(
            "`config.json` states rope_theta twice",
            details={"file": source, "rope_theta": data["rope_theta"], "inside RoPE": theta},
            hint="keep one of them",
        )
    _check(_is_number(theta) and theta > 0, "rope_theta", theta, "a number > 0")
    for holder in (rope, data):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(
                "partial_rotary_factor is not part of Llama",
                details={"file": source, "got": holder["partial_rotary_factor"], "expected": "absent or 1.0"},
                hint="Hugging Face's Llama ignores it or fails on it; remove the key if the model was trained without it",
            )
    rope.pop("partial_rotary_factor", None)
    expected = _ROPE_KEYS[rope_type]
    if set(rope) != expected:
        raise ConfigError(
            f"RoPE settings do not fit rope_type {rope_type}",
            details={
                "file": source,
                "got": ", ".join(sorted(rope)) or "none",
                "expected": ", ".join(sorted(expected)) or "none",
            },
            hint="a setting that would be ignored or guessed is refused: correct config.json",
        )
    for key, value in rope.items():
        _check(_is_number(value) and value > 0, f"RoPE {key}", value, "a number > 0")
    if rope_type == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        _check(high > low, "RoPE high_freq_factor", high, f"more than low_freq_factor = {low}")
    return RopeConfig(rope_type=rope_type, rope_theta=float(theta), **rope)


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name -> shape, in the order of the forward pass. Linear weights are [out, in].

    A tied output projection is not listed: the checkpoint does not hold it.
    """
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    dim, mlp = config.head_dim, config.intermediate_size
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{name}.bias"] = (rows,)

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        linear(f"{prefix}.self_attn.q_proj", heads * dim, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.k_proj", kv * dim, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.v_proj", kv * dim, hidden, config.attention_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, heads * dim, config.attention_bias)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{prefix}.mlp.gate_proj", mlp, hidden, config.mlp_bias)
        linear(f"{prefix}.mlp.up_proj", mlp, hidden, config.mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, mlp, config.mlp_bias)
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def float32_value(value: float) -> float:
    """``value`` rounded to float32. ONNX attributes are float32: the reference uses the same number."""
    import numpy as np

    return float(np.float32(value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """A finite number; an integer beyond the largest float is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise ConfigError(
            f"bad value for {name}: {got!r}", details={"got": repr(got), "expected": expected}, hint=f"correct {name}"
        )
