"""A graph made of a repeated layer is the graph of a full trace, byte for byte."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from random_llama import random_config

from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import TASKS, LlamaConfig, Task
from llama_export.export import trace
from llama_export.export.repeat import TRACED_LAYERS, repeat_last_layer
from llama_export.export.trace import decoder_graph, graph_from_program, trace_program

LAYERS = 5
DTYPES = ("float32", "float16", "bfloat16")
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def bytes_of(model: ir.Model) -> bytes:
    """The file, but for the weights, which are not there yet."""
    for value in model.graph.initializers.values():
        if not value.name.startswith("model.rotary_emb."):
            value.const_value = None
    return ir.to_proto(model).SerializeToString(deterministic=True)


def from_full_trace(config: LlamaConfig, dtype: str, task: Task) -> ir.Model:
    """All layers traced and converted."""
    return graph_from_program(trace_program(config, dtype, task), config, task)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", TASKS)
def test_repeated_layer_equals_the_full_trace(task: Task, seed: int) -> None:
    """All heads and RoPE types, biases, groupings, tied embeddings, dtypes."""
    data = random_config(np.random.default_rng([seed, TASKS.index(task)])) | {"num_hidden_layers": 3 + seed % 3}
    config = config_from_dict({"model_type": "llama", **data})
    dtype = DTYPES[seed % 3]
    assert config.num_hidden_layers > TRACED_LAYERS
    assert bytes_of(decoder_graph(config, dtype, task)) == bytes_of(from_full_trace(config, dtype, task))


@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu6", "leaky_relu", "hardswish", "mish"]
)
def test_constants_that_the_converter_shares_stay_shared(activation: str) -> None:
    """An activation of many operators makes constants once, in the first layer."""
    config = config_from_dict({**CONFIG, "num_hidden_layers": 4, "hidden_act": activation})
    assert bytes_of(decoder_graph(config, "float32", "causal-lm")) == bytes_of(
        from_full_trace(config, "float32", "causal-lm")
    )


def test_any_depth_can_be_repeated_from_any_other() -> None:
    config = config_from_dict(CONFIG)
    whole = bytes_of(from_full_trace(config, "float32", "causal-lm"))
    for traced in range(TRACED_LAYERS, LAYERS + 1):
        shallow = dataclasses.replace(config, num_hidden_layers=traced)
        graph = from_full_trace(shallow, "float32", "causal-lm")
        before = bytes_of(graph.clone())
        assert bytes_of(repeat_last_layer(graph, LAYERS)) == whole
        assert bytes_of(graph) == before


@pytest.mark.parametrize("layers", [1, 2])
def test_a_shallow_model_is_traced_whole(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_dict({**CONFIG, "num_hidden_layers": layers})
    monkeypatch.setattr(trace, "repeat_last_layer", None)
    assert bytes_of(decoder_graph(config, "float32", "causal-lm")) == bytes_of(
        from_full_trace(config, "float32", "causal-lm")
    )


def test_every_name_is_given_once_and_says_where_it_is_from() -> None:
    graph = decoder_graph(config_from_dict(CONFIG), "bfloat16", "causal-lm").graph
    values = [str(value.name) for node in graph for value in node.outputs]
    nodes = [str(node.name) for node in graph]
    assert len(set(values)) == len(values)
    assert len(set(nodes)) == len(nodes)
    outputs = {value.name for value in graph.outputs}
    inner = [name for name in values if name not in outputs]
    assert all(name.startswith(("model", "lm_head")) and "/" in name for name in inner)
    assert "model.layers.4.self_attn/attn_output" in inner
    assert "model.layers.3.mlp.down_proj/linear" in inner
