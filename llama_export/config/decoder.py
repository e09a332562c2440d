"""What a Llama is made of, module by module, in the order of the forward pass: the only place that says so.

From it follow the tensors of a checkpoint, the custom ops of a graph, the layers of an engine, what its plugins carry, and
the matrices that quantisation rounds. A norm of queries and keys is one more module with an op; a bias of one projection
is one more weight; a matrix that is stored as several tensors has several weights; a window is an attribute.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llama_export.config.llama import LlamaConfig, Task, float32_value
from llama_export.ops.table import ADD_RMS_NORM, ATTENTION, MASKED_ATTENTION, RMS_NORM


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One module with weights, or one custom op."""

    name: str
    """Hugging Face's path, e.g. ``model.layers.0.self_attn.q_proj``."""
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Last part of a stored tensor's name -> shape. A tied projection stores nothing."""
    matrix: tuple[int, int] | None = None
    """A linear layer's [out, in], whatever tensors hold it."""
    reads: str | None = None
    """A linear layer's input: the name of the module that makes it."""
    op: str | None = None
    """The custom op that computes it; None: operators of ONNX itself."""
    attributes: Mapping[str, int | float] = field(default_factory=dict)
    """What the custom op's node carries: attribute -> value."""


def decoder_modules(config: LlamaConfig, task: Task = "causal-lm") -> Iterator[Module]:
    """The modules of a checkpoint that is opened for a task, in the order of the forward pass.

    Names start with ``model.`` or are those of a head; a checkpoint may store the decoder under another prefix.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = ATTENTION if task == "causal-lm" else MASKED_ATTENTION  # the one task with a cache

    def linear(name: str, rows: int, columns: int, reads: str, *, bias: bool) -> Module:
        weights = {"weight": (rows, columns), **({"bias": (rows,)} if bias else {})}
        return Module(name=name, weights=weights, matrix=(rows, columns), reads=reads)

    def norm(name: str, op: str) -> Module:
        epsilon = float32_value(config.rms_norm_eps)
        return Module(name=name, weights={"weight": (hidden,)}, op=op, attributes={"epsilon": epsilon})

    yield Module(name="model.embed_tokens", weights={"weight": (config.vocab_size, hidden)})
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        # The residual is added inside the norm that follows it; before the first norm there is none.
        first = norm(f"{at}.input_layernorm", (ADD_RMS_NORM if layer else RMS_NORM).op_type)
        yield first
        yield linear(f"{at}.self_attn.q_proj", query, hidden, first.name, bias=config.attention_bias)
        yield linear(f"{at}.self_attn.k_proj", kv, hidden, first.name, bias=config.attention_bias)
        yield linear(f"{at}.self_attn.v_proj", kv, hidden, first.name, bias=config.attention_bias)
        yield Module(
            name=f"{at}.self_attn",
            op=attention.op_type,
            attributes={
                "num_heads": config.num_attention_heads,
                "num_kv_heads": config.num_key_value_heads,
                "head_dim": config.head_dim,
                "scale": config.softmax_scale,
            },
        )
        yield linear(f"{at}.self_attn.o_proj", hidden, query, f"{at}.self_attn", bias=config.attention_bias)
        second = norm(f"{at}.post_attention_layernorm", ADD_RMS_NORM.op_type)
        yield second
        yield linear(f"{at}.mlp.gate_proj", inner, hidden, second.name, bias=config.mlp_bias)
        yield linear(f"{at}.mlp.up_proj", inner, hidden, second.name, bias=config.mlp_bias)
        yield linear(f"{at}.mlp.down_proj", hidden, inner, f"{at}.mlp.act_fn", bias=config.mlp_bias)
    last = norm("model.norm", ADD_RMS_NORM.op_type)
    yield last
    if task == "causal-lm":
        head = linear("lm_head", config.vocab_size, hidden, last.name, bias=False)
        tied = Module(name=head.name, matrix=head.matrix, reads=head.reads)  # its matrix is the embedding's
        yield tied if config.tie_word_embeddings else head
    elif task == "sequence-classification":
        yield linear("score", config.num_labels, hidden, last.name, bias=False)
    elif task == "token-classification":
        yield linear("score", config.num_labels, hidden, last.name, bias=config.token_classification_bias)
    elif task == "question-answering":
        yield linear("qa_outputs", 2, hidden, last.name, bias=True)


def expected_tensors(config: LlamaConfig, task: Task = "causal-lm") -> dict[str, tuple[int, ...]]:
    """Reference name -> shape of every stored tensor. Linear weights are [out, in]."""
    return {
        f"{module.name}.{part}": shape
        for module in decoder_modules(config, task)
        for part, shape in module.weights.items()
    }


def count_parameters(config: LlamaConfig, task: Task = "causal-lm") -> int:
    """Distinct parameters: a tied output projection is counted once."""
    return sum(math.prod(shape) for shape in expected_tensors(config, task).values())


def op_counts(config: LlamaConfig, task: Task = "causal-lm") -> dict[str, int]:
    """Custom op -> number of its nodes in the graph."""
    return dict(Counter(module.op for module in decoder_modules(config, task) if module.op is not None))


def linear_groups(config: LlamaConfig, task: Task = "causal-lm") -> list[list[Module]]:
    """The linear layers; those that multiply one tensor together."""
    layers = (module for module in decoder_modules(config, task) if module.matrix is not None)
    return [list(group) for _, group in itertools.groupby(layers, key=lambda module: module.reads)]
