"""Published Llamas of all generations are read as they are and have exactly the published number of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from published_configs import PUBLISHED
from random_llama import write_hollow_checkpoint

from llama_export.bundle.bundle import load_bundle
from llama_export.config.decoder import count_parameters, expected_tensors
from llama_export.config.huggingface import config_from_dict, resolve_task
from llama_export.export.export import export_checkpoint
from llama_export.model import LlamaForCausalLM
from llama_export.model.rope import attention_scaling, rope_buffers

each = pytest.mark.parametrize(("data", "number"), PUBLISHED.values(), ids=PUBLISHED)


@each
def test_number_of_parameters_is_the_published_one(data: dict[str, Any], number: int) -> None:
    config = config_from_dict(data)
    assert count_parameters(config) == count_parameters(config, "causal-lm") == number


@each
def test_number_of_parameters_is_the_textbook_sum(data: dict[str, Any], number: int) -> None:
    hidden, heads, groups = data["hidden_size"], data["num_attention_heads"], data["num_key_value_heads"]
    head_dim = data.get("head_dim", hidden // heads)
    attention = 2 * hidden * heads * head_dim + 2 * hidden * groups * head_dim
    layer = attention + 3 * hidden * data["intermediate_size"] + 2 * hidden
    matrices = 1 if data["tie_word_embeddings"] else 2
    assert matrices * data["vocab_size"] * hidden + data["num_hidden_layers"] * layer + hidden == number


@each
def test_sizes_are_those_stated(data: dict[str, Any], number: int) -> None:
    config = config_from_dict(data)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
        assert getattr(config, key) == data[key]
    assert config.head_dim in (64, 128)
    assert config.dtype == data["torch_dtype"]
    assert config.rope.rope_theta == data.get("rope_theta", 10000.0)
    assert config.max_length == config.max_position_embeddings
    assert resolve_task("auto", config) == "causal-lm"


@each
def test_hugging_face_has_the_same_tensors_and_frequencies(data: dict[str, Any], number: int) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig.from_dict(dict(data))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    config = config_from_dict(data)
    assert {name: tuple(tensor.shape) for name, tensor in model.named_parameters()} == expected_tensors(config)
    assert sum(tensor.numel() for tensor in model.parameters()) == number
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(settings)
    assert torch.equal(rotary.inv_freq, rope_buffers(config)["inv_freq"])
    assert rotary.attention_scaling == attention_scaling(config) == 1.0


@each
def test_reference_is_built_on_the_meta_device(data: dict[str, Any], number: int) -> None:
    config = config_from_dict(data)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(tensor.numel() for tensor in model.parameters()) == number
    assert {name: tuple(tensor.shape) for name, tensor in model.named_parameters()} == expected_tensors(config)


@each
def test_export_refers_to_every_weight(data: dict[str, Any], number: int, tmp_path: Path) -> None:
    """Two layers; benchmarks/published_exports.py does it at full depth."""
    config = write_hollow_checkpoint(tmp_path, {**data, "num_hidden_layers": 2}, dtype=data["torch_dtype"])
    result = export_checkpoint(tmp_path)
    assert result.num_parameters == count_parameters(config)
    assert result.weight_bytes_referenced == 2 * count_parameters(config)
    bundle = load_bundle(tmp_path)
    assert (bundle.task, bundle.dtype) == ("causal-lm", data["torch_dtype"])
    named = {item.name for item in onnx.load(str(bundle.model_path), load_external_data=False).graph.initializer}
    assert set(expected_tensors(config)) <= named
