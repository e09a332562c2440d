"""What to export and how: the checkpoint's own config, and the settings of an export and of an engine.

Role: the first stage. ``config.json`` goes in, frozen dataclasses come out; nothing here opens a tensor file.
Names are Hugging Face's. The rule is *fail closed*: a key that is neither read nor known to be harmless stops the
export, because a setting dropped in silence is a clean build with wrong numbers.

Source: https://huggingface.co/docs/transformers/model_doc/llama (LlamaConfig), transformers 5.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from llama_export._arguments import check_fields
from llama_export._files import json_from_bytes, read_small
from llama_export.errors import ConfigError

DType = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(DType)
Task = Literal[
    "causal-lm", "sequence-classification", "token-classification", "question-answering", "feature-extraction"
]
"""Which head sits on the decoder, and so what the graph computes."""
TASKS: tuple[str, ...] = get_args(Task)
TASK = "causal-lm"
Backend = Literal["tensorrt-rtx", "tensorrt"]
BACKENDS: tuple[str, ...] = get_args(Backend)
RuntimeBackend = Literal["auto", "onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]
RUNTIME_BACKENDS: tuple[str, ...] = get_args(RuntimeBackend)
EngineWeights = Literal["constant", "input", "stripped"]
ENGINE_WEIGHTS: tuple[str, ...] = get_args(EngineWeights)
WeightsMode = Literal["auto", "link", "copy", "embed"]
WEIGHTS_MODES: tuple[str, ...] = get_args(WeightsMode)
VARIANTS = ("int4", "int8")
"""Types of quantised weights: see :mod:`llama_export.quantization`."""
CUSTOM_OPS = ("LlamaRMSNorm", "LlamaAddRMSNorm", "LlamaAttention", "LlamaMaskedAttention")
"""The graphs' ops that an engine computes by a plugin or by TensorRT's own layers; must equal ``ops.OP_SPECS``."""

ACTIVATIONS: tuple[str, ...] = (
    *("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "sigmoid", "tanh", "linear", "mish", "hardswish"),
)
"""Values of ``hidden_act``, by Hugging Face's names; must equal ``model.mlp.ACTIVATIONS``."""
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_TASK_OF_ARCHITECTURE: dict[str, Task] = {
    "LlamaForCausalLM": "causal-lm",
    "LLaMAForCausalLM": "causal-lm",
    "LlamaForSequenceClassification": "sequence-classification",
    "LLaMAForSequenceClassification": "sequence-classification",
    "LlamaForTokenClassification": "token-classification",
    "LlamaForQuestionAnswering": "question-answering",
    "LlamaModel": "feature-extraction",
    "LLaMAModel": "feature-extraction",
}
"""The capitals are those of the first checkpoints, before the class had its name."""

_CONTEXT = "original_max_position_embeddings"
_ROPE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor"}), frozenset({_CONTEXT})),
    "yarn": (
        frozenset({"factor"}),
        frozenset({_CONTEXT, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "longrope": (frozenset({"short_factor", "long_factor"}), frozenset({_CONTEXT, "attention_factor", "factor"})),
}
"""rope_type -> the settings it must have, and those it may have, besides ``rope_theta``."""
SUPPORTED_ROPE_TYPES = tuple(_ROPE_KEYS)
_ROPE_TYPES_WITH_CONTEXT = tuple(name for name, (_, optional) in _ROPE_KEYS.items() if _CONTEXT in optional)

_REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ_KEYS = frozenset(
    (
        *_REQUIRED_KEYS,
        *("model_type", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", _CONTEXT),
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "attention_dropout", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "architectures", "quantization_config"),
        *("num_labels", "id2label", "problem_type", "classifier_dropout", "hidden_dropout"),
        "token_classification_bias",
    )
)

_BOOKKEEPING = "a note about the file, its origin or its tools; no model reads it"
_OUTPUT_CHOICE = "selects what a Python call returns, not what is computed"
_GENERATION = "a setting of generation, which `run` and the session take as arguments of their own"
_NOT_OF_A_DECODER = "belongs to the common base of all configurations; Llama's classes do not read it"
_ATTENTION_CHOICE = "selects among implementations of one and the same attention"
_HARMLESS_KEYS: dict[str, str] = {
    "pretraining_tp": "cuts a matrix product into slices and adds them up: the sum in another order, which "
    "transformers 5 no longer does",
    "initializer_range": "spread of the random weights before training",
    "use_cache": "whether a Python call keeps its cache; the graph's cache is an input and an output",
    "label2id": "the inverse of id2label, which is read",
    "auto_map": "names code that runs only with trust_remote_code; exported is Hugging Face's own Llama",
    "is_llama_config": "a flag of nanotron, the trainer of SmolLM, that says: this is a Llama",
    "neftune_noise_alpha": "noise on the embeddings in training",
    "max_sequence_length": "tokens of the training run; the model's limit is max_position_embeddings",
    "tie_last_hidden_states": "which of two tensors a call that asks for all hidden states lists last",
    **dict.fromkeys(
        (
            *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "_auto_class", "torchscript"),
            *("tokenizer_class", "finetuning_task", "task_specific_params", "unsloth_version", "unsloth_fixed"),
            *("use_bfloat16", "transformers.js_config", "model_name"),
        ),
        _BOOKKEEPING,
    ),
    **dict.fromkeys(
        (
            *("output_attentions", "_output_attentions", "output_hidden_states", "output_scores"),
            *("return_dict", "return_dict_in_generate"),
        ),
        _OUTPUT_CHOICE,
    ),
    **dict.fromkeys(
        (
            *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
            *("_attn_implementation_autoset", "_flash_attn_2_enabled"),
            *("_experts_implementation", "_experts_implementation_internal"),
        ),
        _ATTENTION_CHOICE,
    ),
    **dict.fromkeys(
        (
            *("is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "add_cross_attention"),
            *("tie_encoder_decoder", "chunk_size_feed_forward", "pruned_heads", "tf_legacy_loss"),
        ),
        _NOT_OF_A_DECODER,
    ),
    **dict.fromkeys(
        (
            *("prefix", "sep_token_id", "unk_token_id", "decoder_start_token_id", "max_length", "min_length"),
            *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "top_k", "top_p", "diversity_penalty"),
            *("temperature", "typical_p", "repetition_penalty", "length_penalty", "bad_words_ids", "max_new_tokens"),
            *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
            *("remove_invalid_values", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
            *("begin_suppress_tokens", "exponential_decay_length_penalty"),
        ),
        _GENERATION,
    ),
}
"""Key -> why nothing that Llama computes depends on it."""

_SLIDING = "limits how far back attention sees (Mistral, Qwen2, Gemma); Llama sees every earlier token"
_EXPERTS = "routes each token to some of several MLPs (Mixtral, Qwen-MoE, DeepSeek); Llama has one"
_NORMED_HEADS = "normalises queries and keys (Qwen3, OLMo2, Gemma3); Llama does not"
_BIASES = "adds biases; Llama's are named attention_bias and mlp_bias"
_SCALED = "scales activations (Granite, MiniCPM, Cohere, Gemma); Llama does not"
_CAPPED = "caps scores with a tanh (Gemma2); Llama does not"
_QUANTISED = "says that the weights are quantised; export the original float checkpoint"
_FOREIGN_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "sliding_window": ((), _SLIDING),
    "use_sliding_window": ((False,), _SLIDING),
    "max_window_layers": ((), _SLIDING),
    "attention_chunk_size": ((), _SLIDING),
    "layer_types": ((), "gives each layer a kind of attention of its own; every layer of Llama is `full_attention`"),
    "per_layer_config": (({},), "overrides settings in single layers; all layers of Llama are alike"),
    "is_causal": ((True,), "false lets every token see the whole text; the graph's attention is causal"),
    "use_bidirectional_attention": ((False,), "lets every token see the whole text; the graph's attention is causal"),
    "rope_interleaved": ((False,), "rotates pairs (2i, 2i + 1); Llama's rotates pairs (i, i + head_dim / 2)"),
    "rope_traditional": (
        (False,),
        "rotates pairs (2i, 2i + 1), as MLX names it; Llama's rotates (i, i + head_dim / 2)",
    ),
    "use_mrope": ((False,), "gives each token several positions (Qwen2-VL); Llama has one"),
    "no_rope_layers": (([],), "leaves out RoPE in some layers (SmolLM3, Llama 4); Llama has it in all"),
    "no_rope_layer_interval": ((), "leaves out RoPE in some layers (SmolLM3, Llama 4); Llama has it in all"),
    "rotary_pct": ((1, 1.0), "rotates a part of each head (GPT-NeoX); Llama rotates all of it"),
    "attention_multiplier": ((), "replaces the softmax scale 1 / sqrt(head_dim) (Granite)"),
    "query_pre_attn_scalar": ((), "replaces the softmax scale 1 / sqrt(head_dim) (Gemma2)"),
    "embedding_multiplier": ((1, 1.0), _SCALED),
    "residual_multiplier": ((1, 1.0), _SCALED),
    "logits_scaling": ((1, 1.0), _SCALED),
    "logit_scale": ((1, 1.0), _SCALED),
    "scale_emb": ((1, 1.0), _SCALED),
    "scale_depth": ((), _SCALED),
    "dim_model_base": ((), _SCALED),
    "final_logit_softcapping": ((), _CAPPED),
    "attn_logit_softcapping": ((), _CAPPED),
    "use_qk_norm": ((False,), _NORMED_HEADS),
    "qk_norm": ((False,), _NORMED_HEADS),
    "qk_layernorm": ((False,), _NORMED_HEADS),
    "num_local_experts": ((0,), _EXPERTS),
    "num_experts": ((0,), _EXPERTS),
    "num_experts_per_tok": ((0,), _EXPERTS),
    "n_routed_experts": ((0,), _EXPERTS),
    "moe_intermediate_size": ((), _EXPERTS),
    "router_aux_loss_coef": ((), _EXPERTS),
    "bias": ((False,), _BIASES),
    "use_bias": ((False,), _BIASES),
    "use_qkv_bias": ((False,), _BIASES),
    "qkv_bias": ((False,), _BIASES),
    "parallel_attn": ((False,), "adds attention and MLP to the same residual (Falcon); Llama runs one after the other"),
    "use_parallel_residual": (
        (False,),
        "adds attention and MLP to the same residual (GPT-NeoX); Llama runs one after the other",
    ),
    "compression_config": ((), _QUANTISED),
    "quantization": ((), _QUANTISED),
}
"""Key of another family -> the values with which it changes nothing (null always), and what it does there."""

_OTHER_FAMILIES = {
    "mistral": "Mistral is not supported: attention in its checkpoints may be limited to a sliding window, and without one "
    "(sliding_window: null) the arithmetic is Llama's, but this exporter does not read the type",
    "ministral": "Ministral limits attention to a sliding window in some layers",
    "mixtral": "Mixtral routes each token to some of several expert MLPs",
    "qwen2": "Qwen2 has biases on query, key and value alone",
    "qwen2_moe": "Qwen2-MoE has query, key and value biases and expert MLPs",
    "qwen3": "Qwen3 normalises queries and keys in each head",
    "gemma": "Gemma's norm weight is 1 + w, and its embeddings are scaled by sqrt(hidden_size)",
    "phi": "Phi rotates a part of each head and has LayerNorms",
    "phi3": "Phi-3 stores query, key and value (gate and up) as one fused projection",
    "llama4": "Llama 4 has expert MLPs, chunked attention and layers without RoPE",
    "mllama": "Mllama has cross-attention to an image encoder",
    "llava": "LLaVA has an image encoder in front of its language model",
    "olmo": "OLMo has other norms, clipped or at other places",
    "granite": "Granite scales embeddings, attention, residuals and logits",
    "cohere": "Cohere adds attention and MLP to the same residual and scales its logits",
    "smollm3": "SmolLM3 leaves out RoPE in every fourth layer",
    "deepseek": "DeepSeek's own model types have expert MLPs, and from V2 on latent attention",
    "minicpm": "MiniCPM scales embeddings, residuals and logits",
    "gpt": "GPT has LayerNorms and learned or partly rotated positions",
    "falcon": "Falcon has fused projections and LayerNorms",
    "stablelm": "StableLM rotates a part of each head and has LayerNorms",
    "internlm": "InternLM has attention biases or fused projections",
    "baichuan": "Baichuan has fused projections, and ALiBi in place of RoPE at 13B",
    "exaone": "EXAONE names its tensors differently, and EXAONE 4 normalises queries and keys",
    "nemotron": "Nemotron has LayerNorms with 1 + w and rotates a part of each head",
    "glm": "GLM rotates a part of each head in interleaved pairs and has fused projections",
    "chatglm": "ChatGLM rotates a part of each head in interleaved pairs and has fused projections",
}
"""Beginning of ``model_type`` -> how that family differs; the longest that fits counts."""


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
        _check(self.rope_type in SUPPORTED_ROPE_TYPES, "rope_type", self.rope_type, " | ".join(SUPPORTED_ROPE_TYPES))
        theta_valid = _is_number(self.rope_theta) and 0 < self.rope_theta <= MAX_ROPE
        _check(theta_valid, "rope_theta", self.rope_theta, f"a number > 0, at most {MAX_ROPE:g}")
        required, optional = _ROPE_KEYS[self.rope_type]
        if self.rope_type in _ROPE_TYPES_WITH_CONTEXT:
            required |= {_CONTEXT}
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ("rope_type", "rope_theta") or (value is None and name not in required):
                continue
            _check(name in required | optional, f"RoPE {name}", value, f"nothing: {self.rope_type} has no such setting")
            if name == _CONTEXT:
                least = 2 if self.rope_type == "longrope" else 1  # longrope divides by its logarithm
                _check(_is_int(value) and least <= value < 2**63, f"RoPE {name}", value, f"an integer >= {least}")
            elif name in ("short_factor", "long_factor"):
                valid = isinstance(value, tuple) and all(_is_number(item) and 0 < item <= MAX_ROPE for item in value)
                _check(valid, f"RoPE {name}", value, f"a list of numbers > 0, at most {MAX_ROPE:g}")
            elif name == "truncate":
                _check(isinstance(value, bool), f"RoPE {name}", value, "true or false")
            elif name == "factor":
                valid = _is_number(value) and 1 <= value <= MAX_ROPE
                _check(valid, f"RoPE {name}", value, f"a number >= 1, at most {MAX_ROPE:g}")
            else:
                valid = _is_number(value) and 0 < value <= MAX_ROPE
                _check(valid, f"RoPE {name}", value, f"a number > 0, at most {MAX_ROPE:g}")
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            _check(
                self.high_freq_factor > self.low_freq_factor,
                "RoPE high_freq_factor", self.high_freq_factor, f"more than low_freq_factor = {self.low_freq_factor}",
            )  # fmt: skip
        if self.rope_type == "yarn":
            _check(self.rope_theta > 1, "rope_theta", self.rope_theta, "more than 1, for yarn takes its logarithm")
            slow = self.beta_slow or 1
            _check((self.beta_fast or 32) >= slow, "RoPE beta_fast", self.beta_fast, f"at least beta_slow = {slow}")
        _check(
            (self.mscale is None) == (self.mscale_all_dim is None),
            "RoPE mscale", self.mscale, "mscale and mscale_all_dim, or neither: one alone is ignored by transformers",
        )  # fmt: skip
        ignored = "mscale" if self.rope_type == "yarn" else "factor"
        _check(
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
        for name in (*_REQUIRED_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings", "num_labels"):
            value = getattr(self, name)
            limit = {"num_hidden_layers": MAX_LAYERS, "max_position_embeddings": 2**63 - 1}.get(name, MAX_SIZE)
            _check(_is_int(value) and 0 < value <= limit, name, value, f"an integer >= 1, at most {limit}")
        _check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (RoPE rotates pairs)")
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        eps_valid = _is_number(self.rms_norm_eps) and 0 < self.rms_norm_eps <= 1
        _check(eps_valid, "rms_norm_eps", self.rms_norm_eps, "a number > 0, at most 1")
        parameters = " (prelu and xielu have parameters of their own)" if self.hidden_act in ("prelu", "xielu") else ""
        _check(self.hidden_act in ACTIVATIONS, "hidden_act", self.hidden_act, " | ".join(ACTIVATIONS) + parameters)
        _check(self.dtype is None or self.dtype in DTYPES, "dtype", self.dtype, " | ".join(DTYPES))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "token_classification_bias"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            _check(_is_number(value) and 0 <= value <= 1, name, value, "a probability, 0..1")
        eos_count = len(self.eos_token_ids)
        _check(eos_count <= MAX_NAMES, "eos_token_id", f"{eos_count} tokens", f"at most {MAX_NAMES} tokens")
        for token in (*self.eos_token_ids, self.bos_token_id):
            # -1 is an old spelling of "no such token".
            valid = token is None or (_is_int(token) and -1 <= token < 2**63)
            _check(valid, "bos/eos_token_id", token, "a token id or null")
        pad = self.pad_token_id
        _check(
            pad is None or (_is_int(pad) and -1 <= pad < self.vocab_size),
            "pad_token_id",
            pad,
            f"null, -1 or a row of the embedding, 0..{self.vocab_size - 1}",
        )
        _check_names(self.architectures, "architectures")
        count = len(self.architectures)
        _check(count <= MAX_NAMES, "architectures", f"{count} names", f"at most {MAX_NAMES} names")
        _check_names(self.labels, "id2label")
        _check(
            len(self.labels) in (0, self.num_labels), "id2label", self.labels, f"num_labels = {self.num_labels} names"
        )
        _check(
            self.problem_type is None or self.problem_type in PROBLEM_TYPES,
            "problem_type", self.problem_type, " | ".join(PROBLEM_TYPES),
        )  # fmt: skip
        _check(
            self.num_labels > 1 or self.problem_type != "single_label_classification",
            "problem_type", self.problem_type, "regression or multi_label_classification, for there is one label",
        )  # fmt: skip
        for name in ("short_factor", "long_factor"):
            divisors = getattr(self.rope, name)
            count, half = len(divisors or ()), self.head_dim // 2
            _check(
                divisors is None or count == half, f"RoPE {name}", f"{count} numbers", f"head_dim / 2 = {half} numbers"
            )
        if self.rope.rope_type == "dynamic":
            _check(self.head_dim > 2, "head_dim", self.head_dim, "at least 4 (dynamic RoPE divides by head_dim - 2)")
            longest = (self.rope.factor or 1) * float(self.max_position_embeddings)
            _check(longest <= 2**53, "RoPE factor", self.rope.factor, "at most 2^53 / max_position_embeddings")

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head_dim), rounded to float32: the value an ONNX attribute can hold."""
        return float32_value(1.0 / math.sqrt(self.head_dim))

    @property
    def num_parameters(self) -> int:
        """Distinct parameters of the causal LM: a tied output projection is counted once."""
        return count_parameters(self)

    @property
    def max_length(self) -> int:
        """The longest sequence a session or an engine may be made for, tokens: dynamic RoPE goes beyond its training."""
        if self.rope.rope_type == "dynamic" and self.rope.factor is not None:
            return math.floor(self.rope.factor * self.max_position_embeddings)
        return self.max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Settings of one export."""

    task: str = "auto"
    """What to export; ``auto`` goes by the config's ``architectures``."""
    dtype: str = "auto"
    """Compute dtype of the graph; ``auto`` is the dtype the checkpoint states, else the one it is stored in."""
    weights: WeightsMode = "auto"
    """How the weights reach the bundle: ``auto`` reflinks the files where the file system can and copies them otherwise;
    ``embed`` writes them into the ONNX files, each of which must stay below 2 GiB. In place only ``embed`` means anything."""
    convert_weights: bool = False
    """Write the weight files of another folder in the compute dtype; then ``model.onnx`` needs no casts."""
    force: bool = False
    """Replace an existing bundle."""
    hash_weights: bool = False
    """Record a SHA-256 of every weight file (reads every byte)."""
    allow_config_keys: tuple[str, ...] = ()
    """Unknown ``config.json`` keys the user vouches for."""
    ignore_estimate: bool = False
    """Go on although the estimate says that disk or memory do not suffice."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self.weights in WEIGHTS_MODES, "weights", self.weights, " | ".join(WEIGHTS_MODES))
        _check(self.task in ("auto", *TASKS), "task", self.task, " | ".join(("auto", *TASKS)))
        if self.convert_weights and self.weights in ("link", "embed"):
            raise ConfigError(
                "converted weights are new files: they are neither linked nor embedded",
                details={"got": f"convert_weights with weights {self.weights}", "expected": "weights auto or copy"},
                hint="leave --weights out; to embed converted weights, export the converted bundle once more: "
                "llama-export export BUNDLE -o ONE_FILE --weights embed"
                if self.weights == "embed"
                else "leave --weights out",
            )


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
    weights: EngineWeights = "constant"
    """``constant``: inside the engine. ``input``: bound at load from the bundle's safetensors files, so that the engine
    holds none and serves every fine-tune of the model. ``stripped``: left out, put back at load (needs a GPU to build)."""
    profiles: int = 2
    """Optimization profiles of a causal LM. 2: one for prefill, one for decode. 1: the first serves both, in half the
    build time and half the engine, by kernels chosen for the shapes of a prefill."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to compile for, e.g. ``8.9``; empty: what the backend does by itself, for TensorRT-RTX one engine for all."""
    version_compatible: bool = False
    """Let later versions of the backend load the engine."""
    force: bool = False
    """Replace an engine of the same name."""
    ignore_estimate: bool = False
    """Go on although the estimate says that disk or memory do not suffice."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check(self.backend in BACKENDS, "backend", self.backend, " | ".join(BACKENDS))
        _check(self.max_seq_len is None or self.max_seq_len >= 2, "max_seq_len", self.max_seq_len, "at least 2 tokens")
        _check(1 <= self.max_batch < 2**31, "max_batch", self.max_batch, "at least 1 row, fewer than 2^31")
        _check(self.weights in ENGINE_WEIGHTS, "weights", self.weights, " | ".join(ENGINE_WEIGHTS))
        _check(self.profiles in (1, 2), "profiles", self.profiles, "1 | 2")
        for capability in self.compute_capabilities:
            well_formed = re.fullmatch(r"[1-9]\d?\.\d", capability) is not None
            _check(well_formed, "compute_capability", capability, "major.minor, for example 8.9")
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


MAX_JSON_BYTES = 16_000_000
"""Largest config, index, manifest or sidecar: the largest known are below 1 MB, and parsing takes up to 25 times the size
in memory."""
MAX_TOKENIZER_BYTES = 128_000_000
"""Largest ``tokenizer.json``. The largest published one, of Gemma 3, has 33 MB; that of Llama 4 has 28 MB."""
MAX_LAYERS = 4_096
"""Most decoder layers. The deepest published Llama, of 405B parameters, has 126."""
MAX_SIZE = 1 << 24
"""Largest vocabulary, width, number of heads or of labels. The largest published vocabularies have 262,144 entries, and
the MLP of the Llama of 405B parameters is 53,248 wide."""
MAX_WEIGHT_FILES = 10_000
"""Most files in an index. The Llama of 405B parameters has 191."""
MAX_TENSORS = 100_000
"""Most tensors in one checkpoint: 4,096 layers of 12 are 49,152."""
MAX_NAMES = 1_000
"""Most end-of-sequence tokens, and most architectures. Published Llamas have three, and one."""
MAX_ROPE = 1e15
"""Largest number in the RoPE settings. The largest published ``rope_theta`` is 4.6e10 (Llama 3 with 4M tokens of context)."""


def load_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file that somebody made.

    Raises:
        ConfigError: missing, not a regular file, unreadable, larger than :data:`MAX_JSON_BYTES`, not UTF-8, not JSON, a
            key that stands twice, or not an object.
    """
    try:
        data = json_from_bytes(read_small(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise ConfigError(
            f"`{path.name}` is missing",
            details={"looked in": path.parent},
            hint="a checkpoint is a Hugging Face folder: config.json, *.safetensors, tokenizer.json",
        ) from None
    except (OSError, ValueError, RecursionError) as err:  # ValueError: not UTF-8, not JSON, an integer of 5000 digits
        raise ConfigError(
            f"`{path.name}` cannot be read as JSON",
            details={"file": path, "reason": getattr(err, "strerror", None) or err},
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
    _check_model_type(data.get("model_type"), source)
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
    _check_keys(data, source, allow_keys)
    heads = data["num_attention_heads"]
    head_dim = data.get("head_dim")
    if head_dim is None:
        _check(_is_int(heads) and heads > 0, "num_attention_heads", heads, "an integer >= 1")
        hidden = data["hidden_size"]
        _check(_is_int(hidden), "hidden_size", hidden, "an integer >= 1")
        _check(
            hidden % heads == 0, "hidden_size", hidden, f"a multiple of num_attention_heads = {heads}, or a head_dim"
        )
        head_dim = hidden // heads
    kv_heads = data.get("num_key_value_heads")
    eos = data.get("eos_token_id")
    num_labels, labels = _labels_from_dict(data, source)
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
        dtype=_dtype_from_dict(data, source),
        bos_token_id=data.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=data.get("pad_token_id"),
        num_labels=num_labels,
        labels=labels,
        problem_type=data.get("problem_type"),
        classifier_dropout=_first(data.get("classifier_dropout"), data.get("hidden_dropout"), 0.1),
        token_classification_bias=data.get("token_classification_bias", True),
        attention_dropout=_first(data.get("attention_dropout"), 0.0),
        architectures=_tuple(data.get("architectures")),
    )


def _check_model_type(model_type: object, source: str) -> None:
    if model_type == "llama":
        return
    known = [name for name in _OTHER_FAMILIES if isinstance(model_type, str) and model_type.startswith(name)]
    family = max(known, key=len, default=None)
    raise ConfigError(
        f"unsupported model_type: {model_type}",
        details={"file": source, "got": model_type, "expected": "llama"},
        hint=_OTHER_FAMILIES[family] + ("" if family == "mistral" else ": as a Llama it would compute other numbers")
        if family
        else "only Llama checkpoints are exported; a model of the same architecture must say so in its config.json",
    )


def _check_keys(data: Mapping[str, Any], source: str, allow_keys: Collection[str]) -> None:
    """Refuses what is neither read nor known to be harmless; null is "not set"."""
    unknown = sorted(
        key
        for key, value in data.items()
        if key not in _READ_KEYS
        and key not in _HARMLESS_KEYS
        and key not in allow_keys
        and value is not None
        and not _is_neutral(key, value)
    )
    if unknown:
        reasons = [f"{key} {_FOREIGN_KEYS[key][1]}" for key in unknown if key in _FOREIGN_KEYS]
        vouch = " ".join(f"--allow-config-key {key}" for key in unknown)
        raise ConfigError(
            f"`config.json` has keys this exporter does not read: {', '.join(unknown)}",
            details={"file": source, "got": {key: data[key] for key in unknown}},
            hint="; ".join([*reasons, f"if they do not change the numbers, say so: {vouch}"]),
        )


def _is_neutral(key: str, value: object) -> bool:
    """A key of another family, with a value that means what Llama does anyway."""
    if key == "layer_types":
        return isinstance(value, list) and all(item == "full_attention" for item in value)
    neutral, _ = _FOREIGN_KEYS.get(key, ((), ""))
    return any(type(value) is type(item) and value == item for item in neutral)


def _dtype_from_dict(data: Mapping[str, Any], source: str) -> Any:
    """``dtype``, or ``torch_dtype`` as it was called before transformers 5."""
    found = [
        value.removeprefix("torch.") if isinstance(value, str) else value
        for value in (data.get("dtype"), data.get("torch_dtype"))
        if value is not None
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(
            "`config.json` states its dtype twice",
            details={"file": source, "dtype": data["dtype"], "torch_dtype": data["torch_dtype"]},
            hint="keep dtype and delete torch_dtype",
        )
    return found[0] if found else None


def _labels_from_dict(data: Mapping[str, Any], source: str) -> tuple[Any, Any]:
    """Number of classes and their names. transformers writes ``id2label``, and nothing at all for two unnamed classes."""
    table, number = data.get("id2label"), data.get("num_labels")
    if table is None:
        return _first(number, 2), ()
    expected = 'an object of class number -> name: {"0": "no", "1": "yes"}'
    _check(isinstance(table, dict) and bool(table), "id2label", table, expected)
    ids = [str(key) for key in table]
    _check(sorted(ids) == sorted(str(i) for i in range(len(ids))), "id2label", table, f"{expected}, numbered from 0")
    if number is not None and number != len(ids):
        raise ConfigError(
            "`config.json` states the number of labels twice",
            details={"file": source, "num_labels": number, "id2label": f"{len(ids)} labels"},
            hint="delete num_labels: transformers takes the length of id2label",
        )
    return len(ids), tuple(table[key] for key in sorted(table, key=int))


def resolve_task(requested: str, config: LlamaConfig) -> Task:
    """``auto`` -> the task of the class the config names; without one a causal LM. Another request is taken as it is.

    Raises:
        ConfigError: not a task, or ``architectures`` names a class that is no Llama of Hugging Face's, or several.
    """
    for task in get_args(Task):
        if requested == task:
            return cast(Task, task)
    _check(requested == "auto", "task", requested, " | ".join(("auto", *TASKS)))
    known = ", ".join(name for name in _TASK_OF_ARCHITECTURE if name.startswith("Llama"))
    for name in config.architectures:
        if name not in _TASK_OF_ARCHITECTURE:
            raise ConfigError(
                f"unknown architecture: {name}",
                details={"got": ", ".join(config.architectures), "expected": known},
                hint="if the checkpoint is one of these all the same, say what it is for: --task " + " | ".join(TASKS),
            )
    tasks = sorted({_TASK_OF_ARCHITECTURE[name] for name in config.architectures})
    if len(tasks) > 1:
        raise ConfigError(
            "`config.json` names architectures of several tasks",
            details={"got": ", ".join(config.architectures), "expected": f"one of {known}"},
            hint=f"choose one: --task {' | '.join(tasks)}",
        )
    return tasks[0] if tasks else "causal-lm"


def _rope_from_dict(data: Mapping[str, Any], source: str) -> RopeConfig:
    """Both spellings: transformers 5 writes ``rope_parameters``, earlier ones ``rope_theta`` and ``rope_scaling``."""
    holders = ("rope_parameters", "rope_scaling")
    for key in holders:
        _check(data.get(key) is None or isinstance(data[key], dict), key, data.get(key), "an object or null")
    _check_full_rotation(data, source)
    found = [_rope_from_settings(data[key], data, source) for key in holders if data.get(key)]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(
            "`config.json` states its RoPE settings twice",
            details={"file": source, **{key: data[key] for key in holders}},
            hint="keep one of them",
        )
    return found[0] if found else _rope_from_settings({}, data, source)


def _check_full_rotation(holder: Mapping[str, Any], source: str) -> None:
    value = holder.get("partial_rotary_factor")
    if value is not None and not (_is_number(value) and value == 1):
        raise ConfigError(
            "partial_rotary_factor is not part of Llama",
            details={"file": source, "got": value, "expected": "absent or 1.0"},
            hint="Hugging Face's Llama ignores it or fails on it; remove the key if the model was trained without it",
        )


def _rope_from_settings(settings: Mapping[str, Any], data: Mapping[str, Any], source: str) -> RopeConfig:
    """One of the two objects, with what the rest of ``config.json`` adds to it."""
    rope = dict(settings)
    types = [value for value in (rope.pop("rope_type", None), rope.pop("type", None)) if value is not None]
    if len(types) == 2 and types[0] != types[1]:
        raise ConfigError(
            "`config.json` names two RoPE types",
            details={"file": source, "type": types[1], "rope_type": types[0]},
            hint="keep rope_type and delete type",
        )
    rope_type = types[0] if types else "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ConfigError(
            f"unknown rope_type: {rope_type}",
            details={"file": source, "got": rope_type, "expected": " | ".join(SUPPORTED_ROPE_TYPES)},
            hint="a RoPE type that is not implemented is refused: falling back to `default` would give wrong positions",
        )
    theta = _stated_once(rope, data, "rope_theta", source)
    _check_full_rotation(rope, source)
    rope.pop("partial_rotary_factor", None)
    context = _stated_once(rope, data, _CONTEXT, source) if rope_type in _ROPE_TYPES_WITH_CONTEXT else None
    if context is not None:
        rope[_CONTEXT] = context
    elif data.get(_CONTEXT) is not None:
        raise ConfigError(
            f"{_CONTEXT} is not read by rope_type {rope_type}",
            details={"file": source, "got": data[_CONTEXT], "expected": " | ".join(_ROPE_TYPES_WITH_CONTEXT)},
            hint="transformers ignores it: correct rope_type, or delete the key",
        )
    required, optional = _ROPE_KEYS[rope_type]
    # An optional setting that is null is not set; but transformers takes a null `truncate` for false.
    rope = {key: value for key, value in rope.items() if value is not None or key in required or key == "truncate"}
    if not required <= set(rope) <= required | optional:
        may = f"; optional: {', '.join(sorted(optional))}" if optional else ""
        raise ConfigError(
            f"RoPE settings do not fit rope_type {rope_type}",
            details={
                "file": source,
                "got": ", ".join(sorted(rope)) or "none",
                "expected": (", ".join(sorted(required)) or "none") + may,
            },
            hint="a setting that would be ignored or guessed is refused: correct config.json",
        )
    if rope_type in _ROPE_TYPES_WITH_CONTEXT:
        rope.setdefault(_CONTEXT, data.get("max_position_embeddings", 2048))
    if "truncate" in rope:
        _check(isinstance(rope["truncate"], bool), "RoPE truncate", rope["truncate"], "true or false")
    if theta is None and "rope_theta" not in settings and "rope_theta" not in data:
        theta = 10000.0
    _check(_is_number(theta) and theta > 0, "rope_theta", theta, "a number > 0")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in rope.items()}
    return RopeConfig(rope_type=rope_type, rope_theta=float(theta), **values)


def _stated_once(rope: dict[str, Any], data: Mapping[str, Any], key: str, source: str) -> Any:
    """A setting that may stand inside the RoPE settings (it is removed there) or beside them; None: nowhere."""
    inside, beside = rope.pop(key, None), data.get(key)
    if inside is not None and beside is not None and inside != beside:
        raise ConfigError(
            f"`config.json` states {key} twice",
            details={"file": source, key: beside, "inside RoPE": inside},
            hint="keep one of them",
        )
    return inside if inside is not None else beside


def expected_tensors(config: LlamaConfig, task: Task = "causal-lm") -> dict[str, tuple[int, ...]]:
    """Reference name -> shape, in the order of the forward pass. Linear weights are [out, in].

    Reference names start with ``model.`` or are those of a head; a checkpoint may store the decoder under another prefix.
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
    if task == "causal-lm" and not config.tie_word_embeddings:
        linear("lm_head", config.vocab_size, hidden, bias=False)
    elif task == "sequence-classification":
        linear("score", config.num_labels, hidden, bias=False)
    elif task == "token-classification":
        linear("score", config.num_labels, hidden, config.token_classification_bias)
    elif task == "question-answering":
        linear("qa_outputs", 2, hidden, bias=True)
    return tensors


def count_parameters(config: LlamaConfig, task: Task = "causal-lm") -> int:
    """Distinct parameters: a tied output projection is counted once."""
    return sum(math.prod(shape) for shape in expected_tensors(config, task).values())


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


def _check_names(values: object, name: str) -> None:
    valid = isinstance(values, tuple) and all(isinstance(value, str) for value in values)
    _check(valid, name, values, "names, as text")


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _tuple(value: Any) -> Any:
    """A JSON array or null as a tuple; anything else as it is, to be refused by name."""
    return () if value is None else tuple(value) if isinstance(value, list) else value
