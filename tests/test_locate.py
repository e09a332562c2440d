"""The oracle knows every tensor of an exported graph, and a fault is named by the tensor where it begins."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import MakeCheckpoint
from random_llama import random_config, write_random_checkpoint

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.export.export import export_checkpoint
from llama_export.parity.calls import Run, carried, graph_inputs, one_row
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.locate.locate import relative_error, tensor_errors
from llama_export.parity.oracle.evaluator import GraphEvaluator
from llama_export.parity.oracle.program import ReferenceProgram
from llama_export.parity.validate import validate_bundle

GRAPH = ValidateConfig(steps=2, prompt_tokens=14, stages=("graph/float64-eager",))


@pytest.mark.parametrize("seed", range(6))
def test_every_value_the_tracer_named_is_known_and_equal(tmp_path: Path, seed: int) -> None:
    """All RoPE types, biases, activations: no tensor of a layer is left out, none is taken for another."""
    config = write_random_checkpoint(
        tmp_path, random_config(np.random.default_rng(seed)), dtype=("float32", "bfloat16")[seed % 2], seed=seed, lively=True
    )  # fmt: skip
    export_checkpoint(tmp_path)
    bundle = load_bundle(tmp_path)
    program = ReferenceProgram(load_checkpoint(tmp_path), "causal-lm", bundle.dtype)
    evaluator = GraphEvaluator(bundle.model_path, dtype=torch.float64)
    inputs = graph_inputs([Run(one_row(range(40), 34).calls(), 48)], config, torch.float64)
    names = program.names_in(evaluator.graph)
    converter_made = {node.name for node in evaluator.graph.node}  # what torch.onnx added is named after its node
    written = {name for node in evaluator.graph.node for name in node.output}
    unknown = written - set(names.values()) - converter_made
    assert all(name.endswith(("/sym_size_int", "model.norm/new_residual", "/cast", "/stored")) for name in unknown), (
        unknown
    )
    errors = {
        name: relative_error(got, want)
        for name, got, want in tensor_errors(
            evaluator.stream(inputs, carried(config)), program.stream(inputs, carried(config), torch.float64), names
        )
    }
    assert len(errors) == len(names)
    assert max(errors.values()) < 1e-12, errors


def test_relative_error_takes_nan_on_one_side_for_infinite_and_on_both_for_none() -> None:
    one, nan = torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan])
    assert relative_error([one], [one]) == 0
    assert relative_error([one + 0.5], [one]) == 0.25
    assert relative_error([nan], [one]) == relative_error([one], [nan]) == math.inf
    assert relative_error([nan], [nan]) == 0
    assert relative_error([one[:1]], [one]) == math.inf
    assert relative_error([one], [torch.zeros(2)]) == math.inf


@pytest.fixture
def bundle(make_checkpoint: MakeCheckpoint) -> Bundle:
    folder = make_checkpoint(num_hidden_layers=3)
    export_checkpoint(folder)
    return load_bundle(folder)


@pytest.mark.parametrize(
    ("node", "attribute", "op"),
    [
        ("model.layers.1.self_attn/LlamaAttention", "scale", "LlamaAttention"),
        ("model.layers.2.post_attention_layernorm/LlamaAddRMSNorm", "epsilon", "LlamaAddRMSNorm"),
    ],
)
def test_a_fault_is_named_by_layer_op_and_tensor(
    bundle: Bundle, tmp_path: Path, node: str, attribute: str, op: str
) -> None:
    shutil.copytree(bundle.folder, tmp_path / "faulty")
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    (faulty,) = (item for item in model.graph.node if item.name == node)
    next(item for item in faulty.attribute if item.name == attribute).f *= 1.1
    (tmp_path / "faulty" / "model.onnx").write_bytes(model.SerializeToString())
    report = validate_bundle(load_bundle(tmp_path / "faulty", ignore_hashes=True), GRAPH)
    assert report.first_divergence is not None
    found = dict(report.first_divergence)
    assert found.pop("error") > 1e-9
    layer = int(node.split(".")[2])
    assert found == {"layer": layer, "op": op, "node": node, "tensor": faulty.output[0]}


def test_frequencies_that_are_wrong_only_beyond_the_switch_are_found(make_checkpoint: MakeCheckpoint) -> None:
    """No prompt of the validation is as long as the switch: cos and sin alone show it."""
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = make_checkpoint(max_position_embeddings=300, rope_parameters=scaling)
    export_checkpoint(folder)
    sound = validate_bundle(load_bundle(folder), ValidateConfig(steps=2, stages=("graph", "reference/rope")))
    assert sound.verdict == "pass"
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    power = next(node for node in model.graph.node if node.op_type == "Pow")  # of the stretched base
    right, twice = f"{power.output[0]}/right", power.output[0]
    power.output[0] = right
    double = onnx.helper.make_node("Add", [right, right], [twice], name="model.rotary_emb/Add.9")
    model.graph.node.insert(list(model.graph.node).index(power) + 1, double)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    report = validate_bundle(
        load_bundle(folder, ignore_hashes=True), ValidateConfig(steps=2, stages=("graph", "reference/rope"))
    )
    assert {stage.name for stage in report.stages if stage.verdict == "fail"} == {"graph/rope"}
