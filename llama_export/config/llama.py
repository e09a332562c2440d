"""The facts of a checkpoint that decide its maths, as frozen dataclasses. Field names are those of Hugging Face's LlamaConfig.

Source: https://huggingface.co/docs/transformers/model_doc/llama, transformers 5.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from dataclasses import dataclass
from typing import Literal, get_args

from llama_export.config.checks import check_names, check_value, is_int, is_number
from llama_export.config.limits import MAX_LAYERS, MAX_NAMES, MAX_ROPE, MAX_SIZE

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(DType)
Task = Literal[
    "causal-lm", "sequence-classification", "token-classification", "question-answering", "feature-extraction"
]
"""Which head sits on the decoder, and so what the graph computes."""
TASKS: tuple[str, ...] = get_args(Task)
TASK = "causal-lm"

ACTIVATIONS: tuple[str, ...] = (
    *("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "sigmoid", "tanh", "linear", "mish", "hardswish"),
)
"""Values of ``hidden_act``, by Hugging Face's names; must equal ``model.mlp.ACTIVATIONS``."""
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

ROPE_CONTEXT = "original_max_position_embeddings"
ROPE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor"}), frozenset({ROPE_CONTEXT})),
    "yarn": (
        frozenset({"factor"}),
        frozenset({ROPE_CONTEXT, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "longrope": (frozenset({"short_factor", "long_factor"}), frozenset({ROPE_CONTEXT, "attention_factor", "factor"})),
}
"""rope_type -> the settings it must have, and those it may have, besides ``rope_theta``."""
SUPPORTED_ROPE_TYPES = tuple(ROPE_KEYS)
ROPE_TYPES_WITH_CONTEXT = tuple(name for name, (_, optional) in ROPE_KEYS.items() if ROPE_CONTEXT in optional)

REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, half-split layout (rotate pairs ``i`` and ``i + head_dim / 2``).

    A setting that the type does not have is None. Defaults are those of transformers.
    """

    rope_type: str = "default"
    """``default`` https://arxiv.org/abs/2104.09864; ``linear`` (position interpolation) 2306.15595; ``dynamic`` (NTK-aware
    base that grows with the length, by the Reddit users bloc97 and emozilla); ``llama3``, frequency-dependent scaling of
    Llama 3.1; ``yarn`` 2309.00071; ``longrope`` 2402.13753."""
    rope_theta: float = 10000.0
    """Base of the geometric sequence of wavelengths, > 0."""
    factor: float | None = None
    """All but default: how many times longer the context becomes, >= 1. longrope: only for its attention factor; None:
    ``max_position_embeddings / original_max_position_embeddings``."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above ``original_max_position_embeddings / low_freq_factor`` are scaled fully."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below ``original_max_position_embeddings / high_freq_factor`` are kept."""
    original_max_position_embeddings: int | None = None
    """llama3, yarn, longrope: context length of the pre-training, tokens. In ``config.json`` it may also stand outside the
    RoPE settings; absent, it is ``max_position_embeddings``."""
    attention_factor: float | None = None
    """yarn, longrope: multiplies cos and sin, > 0. None: inferred, see ``model.rope.attention_scaling``."""
    beta_fast: float | None = None
    """yarn: frequencies with more turns than this within the original context are kept. None: 32."""
    beta_slow: float | None = None
    """yarn: frequencies with fewer turns than this within the original context are divided by ``factor``. None: 1."""
    mscale: float | None = None
    """yarn: numerator of the inferred attention factor (DeepSeek); with ``mscale_all_dim`` or not at all."""
    mscale_all_dim: float | None = None
    """yarn: its denominator."""
    truncate: bool | None = None
    """yarn: the two bounds between kept and divided frequencies are rounded outwards to whole indices. None: true."""
    short_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency up to the original context length, > 0; head_dim / 2 of them."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the same beyond it."""

    def __post_init__(self) -> None:
        check_value(
            self.rope_type in SUPPORTED_ROPE_TYPES, "rope_type", self.rope_type, " | ".join(SUPPORTED_ROPE_TYPES)
        )
        theta_valid = is_number(self.rope_theta) and 0 < self.rope_theta <= MAX_ROPE
        check_value(theta_valid, "rope_theta", self.rope_theta, f"a number > 0, at most {MAX_ROPE:g}")
        required, optional = ROPE_KEYS[self.rope_type]
        if self.rope_type in ROPE_TYPES_WITH_CONTEXT:
            required |= {ROPE_CONTEXT}
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ("rope_type", "rope_theta") or (value is None and name not in required):
                continue
            check_value(
                name in required | optional, f"RoPE {name}", value, f"nothing: {self.rope_type} has no such setting"
            )
            if name == ROPE_CONTEXT:
                least = 2 if self.rope_type == "longrope" else 1  # longrope divides by its logarithm
                check_value(is_int(value) and least <= value < 2**63, f"RoPE {name}", value, f"an integer >= {least}")
            elif name in ("short_factor", "long_factor"):
                valid = isinstance(value, tuple) and all(is_number(item) and 0 < item <= MAX_ROPE for item in value)
                check_value(valid, f"RoPE {name}", value, f"a list of numbers > 0, at most {MAX_ROPE:g}")
            elif name == "truncate":
                check_value(isinstance(value, bool), f"RoPE {name}", value, "true or false")
            elif name == "factor":
                valid = is_number(value) and 1 <= value <= MAX_ROPE
                check_value(valid, f"RoPE {name}", value, f"a number >= 1, at most {MAX_ROPE:g}")
            else:
                valid = is_number(value) and 0 < value <= MAX_ROPE
                check_value(valid, f"RoPE {name}", value, f"a number > 0, at most {MAX_ROPE:g}")
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            check_value(
                self.high_freq_factor > self.low_freq_factor,
                "RoPE high_freq_factor", self.high_freq_factor, f"more than low_freq_factor = {self.low_freq_factor}",
            )  # fmt: skip
        if self.rope_type == "yarn":
            check_value(self.rope_theta > 1, "rope_theta", self.rope_theta, "more than 1, for yarn takes its logarithm")
            slow = self.beta_slow or 1
            check_value(
                (self.beta_fast or 32) >= slow, "RoPE beta_fast", self.beta_fast, f"at least beta_slow = {slow}"
            )
        check_value(
            (self.mscale is None) == (self.mscale_all_dim is None),
            "RoPE mscale", self.mscale, "mscale and mscale_all_dim, or neither: one alone is ignored by transformers",
        )  # fmt: skip
        ignored = "mscale" if self.rope_type == "yarn" else "factor"
        check_value(
            self.attention_factor is None or self.rope_type not in ("yarn", "longrope") or getattr(self, ignored) is None,
            f"RoPE {ignored}", getattr(self, ignored), "nothing beside attention_factor, which transformers takes instead",
        )  # fmt: skip

    @property
    def follows_length(self) -> bool:
        """The frequencies of a row depend on its length, so prefill in one piece and in chunks differ by definition."""
        return self.rope_type in ("dynamic", "longrope")


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
    """Activation of the MLP's gate, one of :data:`ACTIVATIONS`."""
    max_position_embeddings: int = 2048
    """Longest sequence the checkpoint was made for, tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean of squares inside the root. Used at float32 precision, as PyTorch does."""
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
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
    """Padding token, if the checkpoint names one; -1 is an old spelling of "none" that Hugging Face takes literally."""
    num_labels: int = 2
    """K, classes of the two classification heads."""
    labels: tuple[str, ...] = ()
    """Names of the classes, by number; empty if the config has none."""
    problem_type: str | None = None
    """Loss of the sequence classifier, one of :data:`PROBLEM_TYPES`; None: inferred from the labels' dtype."""
    classifier_dropout: float = 0.1
    """Probability, in training, that the token classifier drops an input of its head."""
    token_classification_bias: bool = True
    """The head of the token classifier has a bias."""
    attention_dropout: float = 0.0
    """Probability, in training, that an attention weight is dropped."""
    architectures: tuple[str, ...] = ()
    """Hugging Face classes the checkpoint names; they decide the task where none is asked for."""

    def __post_init__(self) -> None:
        for name in (*REQUIRED_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings", "num_labels"):
            value = getattr(self, name)
            limit = {"num_hidden_layers": MAX_LAYERS, "max_position_embeddings": 2**63 - 1}.get(name, MAX_SIZE)
            check_value(is_int(value) and 0 < value <= limit, name, value, f"an integer >= 1, at most {limit}")
        check_value(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (RoPE rotates pairs)")
        check_value(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        eps_valid = is_number(self.rms_norm_eps) and 0 < self.rms_norm_eps <= 1
        check_value(eps_valid, "rms_norm_eps", self.rms_norm_eps, "a number > 0, at most 1")
        parameters = " (prelu and xielu have parameters of their own)" if self.hidden_act in ("prelu", "xielu") else ""
        check_value(self.hidden_act in ACTIVATIONS, "hidden_act", self.hidden_act, " | ".join(ACTIVATIONS) + parameters)
        check_value(self.dtype is None or self.dtype in DTYPES, "dtype", self.dtype, " | ".join(DTYPES))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "token_classification_bias"):
            check_value(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            check_value(is_number(value) and 0 <= value <= 1, name, value, "a probability, 0..1")
        eos_count = len(self.eos_token_ids)
        check_value(eos_count <= MAX_NAMES, "eos_token_id", f"{eos_count} tokens", f"at most {MAX_NAMES} tokens")
        for token in (*self.eos_token_ids, self.bos_token_id):
            # -1 is an old spelling of "no such token".
            valid = token is None or (is_int(token) and -1 <= token < 2**63)
            check_value(valid, "bos/eos_token_id", token, "a token id or null")
        pad = self.pad_token_id
        check_value(
            pad is None or (is_int(pad) and -1 <= pad < self.vocab_size),
            "pad_token_id",
            pad,
            f"null, -1 or a row of the embedding, 0..{self.vocab_size - 1}",
        )
        check_names(self.architectures, "architectures")
        count = len(self.architectures)
        check_value(count <= MAX_NAMES, "architectures", f"{count} names", f"at most {MAX_NAMES} names")
        check_names(self.labels, "id2label")
        check_value(
            len(self.labels) in (0, self.num_labels), "id2label", self.labels, f"num_labels = {self.num_labels} names"
        )
        check_value(
            self.problem_type is None or self.problem_type in PROBLEM_TYPES,
            "problem_type", self.problem_type, " | ".join(PROBLEM_TYPES),
        )  # fmt: skip
        check_value(
            self.num_labels > 1 or self.problem_type != "single_label_classification",
            "problem_type", self.problem_type, "regression or multi_label_classification, for there is one label",
        )  # fmt: skip
        for name in ("short_factor", "long_factor"):
            divisors = getattr(self.rope, name)
            count, half = len(divisors or ()), self.head_dim // 2
            check_value(
                divisors is None or count == half, f"RoPE {name}", f"{count} numbers", f"head_dim / 2 = {half} numbers"
            )
        if self.rope.rope_type == "dynamic":
            check_value(
                self.head_dim > 2, "head_dim", self.head_dim, "at least 4 (dynamic RoPE divides by head_dim - 2)"
            )
            longest = (self.rope.factor or 1) * float(self.max_position_embeddings)
            check_value(longest <= 2**53, "RoPE factor", self.rope.factor, "at most 2^53 / max_position_embeddings")

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head_dim), rounded to float32: the value an ONNX attribute can hold."""
        return float32_value(1.0 / math.sqrt(self.head_dim))

    @property
    def max_length(self) -> int:
        """The longest sequence a session or an engine may be made for, tokens: dynamic RoPE goes beyond its training."""
        if self.rope.rope_type == "dynamic" and self.rope.factor is not None:
            return math.floor(self.rope.factor * self.max_position_embeddings)
        return self.max_position_embeddings


def float32_value(value: float) -> float:
    """``value`` rounded to float32. ONNX attributes are float32: the reference uses the same number."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
