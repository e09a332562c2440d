"""The graph evaluator: right in float64 to 1e-9, equal to onnx's own reference, and every injected fault shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import oracles
import pytest
import torch
from conftest import TINY
from onnxruntime_operators import reference_evaluator

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.settings import ExportConfig
from llama_export.errors import ExportError
from llama_export.export.export import export_checkpoint
from llama_export.model import load_reference
from llama_export.ops.attention import attention_eager
from llama_export.ops.torch_ops import EAGER
from llama_export.parity.oracle.evaluator import GraphEvaluator
from llama_export.parity.sessions import TorchSession, evaluator_session, reference_session

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {"rope_parameters": LLAMA3},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
LIMIT = 1e-9
CAPACITY = 20
FILES = ("model.onnx", "model.onnxruntime.onnx")


@dataclass(frozen=True)
class Exported:
    bundle: Bundle
    want: dict[str, np.ndarray]
    """What the float64 reference computes in :func:`scenario`."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Variant -> a random model, exported at float32 (the one with biases: at bfloat16), made once."""
    made: dict[str, Exported] = {}

    def get(variant: str) -> Exported:
        if variant not in made:
            folder = tmp_path_factory.mktemp("evaluator") / "checkpoint"
            oracles.huggingface_llama(folder, seed=5, **{**TINY, **VARIANTS[variant]})
            dtype = "bfloat16" if variant.startswith("biases") else "float32"
            export_checkpoint(folder, config=ExportConfig(dtype=dtype))
            reference = reference_session(load_reference(folder, torch.float64), max_seq_len=CAPACITY, batch_size=2)
            made[variant] = Exported(load_bundle(folder), scenario(reference))
        return made[variant]

    return get


@pytest.fixture(scope="module")
def default(exported: Callable[[str], Exported]) -> Exported:
    return exported("default")


def scenario(session: TorchSession) -> dict[str, np.ndarray]:
    """A ragged prefill, a ragged chunk and two decode steps of two rows; all logits and the caches."""
    ids = np.random.default_rng(1).integers(0, TINY["vocab_size"], (2, 16))
    found = {}
    for name, begin, end, valid in (
        ("prefill", 0, 9, [9, 4]),
        ("chunk", 9, 14, [5, 3]),
        ("0", 14, 15, [1, 1]),
        ("1", 15, 16, [1, 1]),
    ):
        index = np.stack([np.arange(end - begin)] * 2)
        found[f"logits {name}"] = session.step(ids[:, begin:end], sequence_length=valid, logits_index=index)
    for layer in range(TINY["num_hidden_layers"]):
        for part in ("key", "value"):
            found[f"{part} {layer}"] = session.cache_array(f"past_key_values.{layer}.{part}").copy()
    return found


def worst(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest error as a share of the largest value of its tensor."""
    return max(float(np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()) for name in want)


def float64_error(case: Exported, path: Path, custom_ops: Any) -> float:
    """Graph in float64 against the reference in float64."""
    evaluator = GraphEvaluator(path, dtype=torch.float64, custom_ops=custom_ops)
    got = scenario(evaluator_session(evaluator, case.bundle.config, max_seq_len=CAPACITY, batch_size=2))
    assert {array.dtype for array in got.values()} == {np.dtype(np.float64)}
    return worst(got, case.want)


@pytest.mark.parametrize("custom_ops", ["eager", "bodies"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_graph_is_the_float64_reference(
    exported: Callable[[str], Exported], variant: str, file: str, custom_ops: str
) -> None:
    case = exported(variant)
    error = float64_error(case, case.bundle.folder / file, custom_ops)
    assert error <= LIMIT, f"{variant}, {file}, {custom_ops}: {error:.3g}"


# ---- fault injection --------------------------------------------------------------------------------------------


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def attribute_of(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(item for item in node.attribute if item.name == name)


def swap(items: Any, left: int, right: int) -> None:
    items[left], items[right] = items[right], items[left]


def swap_weights(model: onnx.ModelProto, left: str, right: str) -> None:
    """Each initializer points at the other's bytes."""
    first, second = (next(item for item in model.graph.initializer if item.name == name) for name in (left, right))
    places = [[(entry.key, entry.value) for entry in item.external_data] for item in (first, second)]
    for item, place in ((first, places[1]), (second, places[0])):
        del item.external_data[:]
        for key, value in place:
            item.external_data.add(key=key, value=value)


def insert_add_one(model: onnx.ModelProto, consumer: str, slot: int) -> None:
    """One more than what the consumer should read, in an int64 tensor."""
    node = node_of(model, consumer)
    one = onnx.helper.make_node("Constant", [], ["fault/one"], name="fault/Constant", value_int=1)
    add = onnx.helper.make_node("Add", [node.input[slot], "fault/one"], ["fault/sum"], name="fault/Add")
    node.input[slot] = "fault/sum"
    at = list(model.graph.node).index(node)
    model.graph.node.insert(at, add)
    model.graph.node.insert(at, one)


def set_float(model: onnx.ModelProto, name: str, attribute: str, factor: float) -> None:
    attribute_of(node_of(model, name), attribute).f *= factor


ATTENTION = "model.layers.1.self_attn/LlamaAttention"
NORM = "model.layers.1.post_attention_layernorm/LlamaAddRMSNorm"
FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "epsilon 1e-5 -> 1.1e-5": lambda m: set_float(m, NORM, "epsilon", 1.1),
    "first norm's epsilon": lambda m: set_float(m, "model.layers.0.input_layernorm/LlamaRMSNorm", "epsilon", 0.1),
    "scale off by 1e-6": lambda m: set_float(m, ATTENTION, "scale", 1 + 1e-6),
    "past_length off by one": lambda m: insert_add_one(m, ATTENTION, 7),
    "positions off by one": lambda m: insert_add_one(m, "model.rotary_emb/Unsqueeze", 0),
    "cos and sin swapped": lambda m: swap(node_of(m, ATTENTION).input, 3, 4),
    "key and value swapped": lambda m: swap(node_of(m, ATTENTION).input, 1, 2),
    "the other layer's cache": lambda m: node_of(m, ATTENTION).input.__setitem__(5, "past_key_values.0.key"),
    "residual dropped": lambda m: node_of(m, NORM).input.__setitem__(1, "model.embed_tokens/embedding"),
    "norm weights swapped": lambda m: swap_weights(
        m, "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
    ),
    "gate and up swapped": lambda m: swap_weights(
        m, "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    ),
    "silu without x": lambda m: node_of(m, "model.layers.0.mlp/Mul").input.__setitem__(
        0, node_of(m, "model.layers.0.mlp/Mul").input[1]
    ),
    "one frequency off by a unit in the last place": lambda m: nudge_frequency(m),
}


def nudge_frequency(model: onnx.ModelProto) -> None:
    item = next(item for item in model.graph.initializer if item.name == "model.rotary_emb.inv_freq")
    values = onnx.numpy_helper.to_array(item).copy()
    values[3] = np.nextafter(values[3], np.float32(1))
    item.CopyFrom(onnx.numpy_helper.from_array(values, item.name))


def faulty_copy(case: Exported, fault: Callable[[onnx.ModelProto], None], file: str = "model.onnx") -> Path:
    """Beside the original, so that its weights are found."""
    model = onnx.load(str(case.bundle.folder / file), load_external_data=False)
    before = model.SerializeToString()
    fault(model)
    assert model.SerializeToString() != before, "the fault changed nothing"
    path = case.bundle.folder / "faulty.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("custom_ops", ["eager", "bodies"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_meaning_exceeds_the_float64_limit(default: Exported, fault: str, custom_ops: str) -> None:
    error = float64_error(default, faulty_copy(default, FAULTS[fault]), custom_ops)
    assert error > LIMIT, f"{fault}: {error:.3g} would pass"


def body_node(model: onnx.ModelProto, function: str, op_type: str, index: int = 0) -> onnx.NodeProto:
    body = next(item for item in model.functions if item.name == function)
    return [node for node in body.node if node.op_type == op_type][index]


def fix_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    """The body no longer follows the node's attribute."""
    index = next(at for at, item in enumerate(node.attribute) if item.name == name)
    node.attribute[index].CopyFrom(onnx.helper.make_attribute(name, value))


def body_add_one(model: onnx.ModelProto, op_type: str, slot: int) -> None:
    """One more than what a node of LlamaAttention's body should read."""
    body = next(item for item in model.functions if item.name == "LlamaAttention")
    node = body_node(model, "LlamaAttention", op_type)
    add = onnx.helper.make_node("Add", [node.input[slot], "one"], ["fault_sum"])
    node.input[slot] = "fault_sum"
    body.node.insert(list(body.node).index(node), add)


BODY_FAULTS: dict[str, tuple[str, Callable[[onnx.ModelProto], None]]] = {
    "fixed epsilon": (
        "model.onnx", lambda m: fix_attribute(body_node(m, "LlamaAddRMSNorm", "RMSNormalization"), "epsilon", 1.1e-5),
    ),
    "fixed scale": (
        "model.onnx", lambda m: fix_attribute(body_node(m, "LlamaAttention", "Attention"), "scale", 0.2501),
    ),
    "cos and sin swapped": (
        "model.onnx", lambda m: swap(body_node(m, "LlamaAttention", "RotaryEmbedding", 1).input, 1, 2),
    ),
    "key written one slot late": ("model.onnx", lambda m: body_add_one(m, "TensorScatter", 2)),
    "mask shows one token too many": ("model.onnx", lambda m: body_add_one(m, "LessOrEqual", 1)),
    "query not rotated": (
        "model.onnxruntime.onnx",
        lambda m: body_node(m, "LlamaAttention", "GroupQueryAttention").input.__setitem__(0, "query"),
    ),
    "scores twice as large": (
        "model.onnxruntime.onnx",
        lambda m: fix_attribute(body_node(m, "LlamaAttention", "GroupQueryAttention"), "scale", 1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BODY_FAULTS)
def test_a_fault_in_a_body_shows_with_bodies_and_only_there(default: Exported, fault: str) -> None:
    file, inject = BODY_FAULTS[fault]
    path = faulty_copy(default, inject, file)
    error = float64_error(default, path, "bodies")
    assert error > LIMIT, f"{fault}: {error:.3g} would pass"
    assert float64_error(default, path, "eager") <= LIMIT


def test_a_wrong_assignment_of_heads_to_groups_exceeds_the_limit(default: Exported) -> None:
    """Query head h belongs to group h // (H / G), not to h % G."""

    def by_remainder(query: torch.Tensor, *arguments: Any) -> Any:
        H, G, D = arguments[-4:-1]
        B, S, _ = query.shape
        heads = query.view(B, S, H // G, G, D).transpose(2, 3).reshape(B, S, H * D)
        output, key, value = attention_eager(heads, *arguments)
        return output.view(B, S, G, H // G, D).transpose(2, 3).reshape(B, S, H * D), key, value

    eager = dict(EAGER)
    assert float64_error(default, default.bundle.model_path, eager) <= LIMIT
    error = float64_error(default, default.bundle.model_path, {**eager, "LlamaAttention": by_remainder})
    assert error > LIMIT, f"{error:.3g} would pass"


def drop(model: onnx.ModelProto, name: str) -> None:
    """Removes a node of one input and one output."""
    node = node_of(model, name)
    for other in model.graph.node:
        for slot, read in enumerate(other.input):
            if read == node.output[0]:
                other.input[slot] = node.input[0]
    model.graph.node.remove(node)


def test_a_dropped_cast_is_an_error_not_a_promotion(default: Exported) -> None:
    path = faulty_copy(default, lambda model: drop(model, "model.rotary_emb/Cast"))
    with pytest.raises(ExportError, match="cannot compute Mul") as caught:
        float64_error(default, path, "eager")
    assert caught.value.details["node"] == "model.rotary_emb/Mul"
    assert "torch.int64 and torch.float64" in caught.value.details["reason"]


def test_swapped_head_counts_are_an_error_that_names_the_node(default: Exported) -> None:
    def exchange(model: onnx.ModelProto) -> None:
        heads, groups = (attribute_of(node_of(model, ATTENTION), name) for name in ("num_heads", "num_kv_heads"))
        heads.i, groups.i = groups.i, heads.i

    with pytest.raises(ExportError) as caught:
        float64_error(default, faulty_copy(default, exchange), "eager")
    assert caught.value.details["node"] == ATTENTION


# ---- against onnx's own reference -------------------------------------------------------------------------------


def random_feeds(seed: int = 0, capacity: int = 12) -> dict[str, torch.Tensor]:
    """Two ragged rows of four new tokens over a cache that is not empty."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, TINY["num_key_value_heads"], capacity, TINY["head_dim"])
    return {
        "input_ids": torch.randint(0, TINY["vocab_size"], (2, 4), generator=generator),
        "past_length": torch.tensor([5, 0]),
        "sequence_length": torch.tensor([4, 2]),
        "logits_index": torch.tensor([[0, 3], [1, 1]]),
        **{
            f"past_key_values.{layer}.{part}": torch.randn(shape, generator=generator)
            for layer in range(TINY["num_hidden_layers"])
            for part in ("key", "value")
        },
    }


@pytest.mark.parametrize("custom_ops", ["eager", "bodies"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("variant", ["default", "llama3"])
def test_float32_equals_onnx_reference_evaluator(
    exported: Callable[[str], Exported], variant: str, file: str, custom_ops: str
) -> None:
    path = exported(variant).bundle.folder / file
    feeds = random_feeds()
    reference = reference_evaluator(onnx.load(str(path)))
    want = dict(zip(reference.output_names, reference.run(None, {k: v.numpy() for k, v in feeds.items()}), strict=True))
    got = GraphEvaluator(path, custom_ops=custom_ops).run(feeds)
    assert list(got) == reference.output_names
    error = worst({name: tensor.numpy() for name, tensor in got.items()}, want)
    assert error < 2e-6, error


# ---- dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_evaluation_keeps_what_the_graph_computes_in_float32(
    tiny_bundles: dict[str, Bundle], dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    seen: dict[str, torch.dtype] = {}
    evaluator = GraphEvaluator(tiny_bundles[name].model_path, dtype=dtype)
    assert evaluator.model_dtype == dtype
    outputs = evaluator.run(random_feeds(), observe=lambda tensor, value: seen.__setitem__(tensor, value.dtype))
    graph = onnx.load(str(tiny_bundles[name].model_path), load_external_data=False).graph
    (angles,) = {node.input[0] for node in graph.node if node.op_type in ("Cos", "Sin")}
    assert {seen[tensor] for tensor in ("model.rotary_emb/cos", "model.rotary_emb/sin", angles)} == {torch.float32}
    layer = "model.layers.0.self_attn"
    hidden = (
        "model.embed_tokens/embedding",
        f"{layer}.q_proj/linear",
        f"{layer}/attn_output",
        "present.1.key",
        "lm_head/linear",
    )
    assert {seen[tensor] for tensor in hidden} == {dtype}
    assert outputs["logits"].dtype == torch.float32
    assert set(seen.values()) == {torch.float32, torch.int64, dtype}


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_declared_types_and_the_same_override_give_the_same_bits(tiny_bundles: dict[str, Bundle], name: str) -> None:
    """And both equal the reference at that dtype to a few roundings."""
    bundle = tiny_bundles[name]
    dtype = getattr(torch, name)
    declared, override = (GraphEvaluator(bundle.model_path, dtype=item) for item in (None, dtype))
    assert declared.model_dtype == dtype
    left, right = (evaluator.run(random_feeds()) for evaluator in (declared, override))
    for tensor in left:
        assert torch.equal(left[tensor], right[tensor]), tensor
    feeds = random_feeds()
    past = [tensor.to(dtype) for key, tensor in feeds.items() if key.startswith("past_key")]
    model = load_reference(bundle.folder, dtype)
    pairs = list(zip(past[::2], past[1::2], strict=True))
    logits, _ = model(*(feeds[key] for key in ("input_ids", "past_length", "sequence_length", "logits_index")), pairs)
    error = float((left["logits"] - logits).abs().max() / logits.abs().max())
    assert error < 4 * torch.finfo(dtype).eps, error


def test_float64_has_no_float32_value_left(default: Exported) -> None:
    seen: dict[str, torch.dtype] = {}
    for custom_ops in ("eager", "bodies"):
        evaluator = GraphEvaluator(default.bundle.model_path, dtype=torch.float64, custom_ops=custom_ops)
        evaluator.run(random_feeds(), observe=lambda tensor, value: seen.__setitem__(tensor, value.dtype))
    floats = {tensor: dtype for tensor, dtype in seen.items() if dtype not in (torch.int64, torch.bool)}
    assert set(floats.values()) == {torch.float64}, {
        tensor for tensor, dtype in floats.items() if dtype != torch.float64
    }


def test_bfloat16_bodies_agree_with_eager(tiny_bundles: dict[str, Bundle]) -> None:
    path = tiny_bundles["bfloat16"].model_path
    eager, bodies = (GraphEvaluator(path, custom_ops=kind).run(random_feeds()) for kind in ("eager", "bodies"))
    for tensor, value in eager.items():
        assert torch.equal(value, bodies[tensor]), tensor


# ---- observing --------------------------------------------------------------------------------------------------


def test_observe_sees_every_node_output_in_order(default: Exported) -> None:
    seen: list[str] = []
    GraphEvaluator(default.bundle.model_path).run(random_feeds(), observe=lambda name, _: seen.append(name))
    graph = onnx.load(str(default.bundle.model_path), load_external_data=False).graph
    assert seen == [name for node in graph.node for name in node.output if name]


def test_observe_sees_inside_the_bodies_under_the_nodes_name(default: Exported) -> None:
    seen: list[str] = []
    evaluator = GraphEvaluator(default.bundle.model_path, custom_ops="bodies")
    evaluator.run(random_feeds(), observe=lambda name, _: seen.append(name))
    model = onnx.load(str(default.bundle.model_path), load_external_data=False)
    bodies = {function.name: function for function in model.functions}
    expected = []
    for node in model.graph.node:
        if node.domain == "llama_export":
            expected += [f"{node.name}/{name}" for inner in bodies[node.op_type].node for name in inner.output]
        expected += [name for name in node.output if name]
    assert seen == expected
    assert f"{ATTENTION}/query_rope" in seen


def test_a_run_leaves_its_feeds_alone_and_can_be_repeated(default: Exported) -> None:
    feeds, kept = random_feeds(), random_feeds()
    evaluator = GraphEvaluator(default.bundle.model_path, dtype=torch.float32)
    first, second = evaluator.run(feeds), evaluator.run(feeds)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name, tensor in feeds.items():
        assert torch.equal(tensor, kept[name]), f"{name} was modified"


# ---- fails closed -----------------------------------------------------------------------------------------------


def set_op_type(model: onnx.ModelProto, name: str, op_type: str, domain: str = "") -> None:
    node = node_of(model, name)
    node.op_type, node.domain = op_type, domain


def remove_function(model: onnx.ModelProto) -> None:
    model.functions.remove(next(item for item in model.functions if item.name == "LlamaAttention"))


REFUSED: dict[str, tuple[Callable[[onnx.ModelProto], None], str, str]] = {
    "an operator that is not implemented": (
        lambda m: set_op_type(m, "model.layers.0.mlp/Sigmoid", "HardSigmoid"), "model.layers.0.mlp/Sigmoid", "eager",
    ),
    "a known name in another domain": (
        lambda m: set_op_type(m, "model.layers.0.mlp/Sigmoid", "Sigmoid", "com.example"),
        "model.layers.0.mlp/Sigmoid", "eager",
    ),
    "an op of our domain that is not in the table": (
        lambda m: set_op_type(m, ATTENTION, "LlamaOther", "llama_export"), ATTENTION, "eager",
    ),
    "an op without a body": (remove_function, "model.layers.0.self_attn/LlamaAttention", "bodies"),
    "an attribute that is not implemented": (
        lambda m: node_of(m, "model.embed_tokens/Gather").attribute.append(onnx.helper.make_attribute("mode", "clip")),
        "model.embed_tokens/Gather", "eager",
    ),
    "an attribute too many on our op": (
        lambda m: node_of(m, ATTENTION).attribute.append(onnx.helper.make_attribute("softcap", 1.0)),
        ATTENTION, "eager",
    ),
    "an attribute too few on our op": (
        lambda m: node_of(m, ATTENTION).attribute.remove(attribute_of(node_of(m, ATTENTION), "scale")),
        ATTENTION, "bodies",
    ),
    "an input that is left out": (lambda m: node_of(m, ATTENTION).input.pop(), ATTENTION, "eager"),
    "an input that is left empty": (
        lambda m: node_of(m, "model.layers.0.mlp/Mul").input.__setitem__(0, ""), "model.layers.0.mlp/Mul", "eager",
    ),
    "an input that nothing defines": (
        lambda m: node_of(m, "model.layers.0.mlp/Mul").input.__setitem__(0, "nowhere"),
        "model.layers.0.mlp/Mul", "eager",
    ),
    "a cast to a type that is not implemented": (
        lambda m: attribute_of(node_of(m, "model.rotary_emb/Cast"), "to").__setattr__("i", onnx.TensorProto.UINT16),
        "model.rotary_emb/Cast", "eager",
    ),
    "a scatter mode that is not implemented": (
        lambda m: body_node(m, "LlamaAttention", "TensorScatter").attribute[1].__setattr__("s", b"circular"),
        "model.layers.0.self_attn/LlamaAttention/TensorScatter", "bodies",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_evaluator_does_not_implement_is_an_error_that_names_the_node(default: Exported, what: str) -> None:
    inject, node, custom_ops = REFUSED[what]
    path = faulty_copy(default, inject)
    with pytest.raises(ExportError) as caught:
        GraphEvaluator(path, custom_ops=custom_ops).run(random_feeds())
    assert caught.value.details["node"] == node, caught.value


@pytest.mark.parametrize("name", ["input_ids", "sequence_length", "past_key_values.1.value"])
def test_a_graph_input_that_is_missing_is_an_error_that_names_it(default: Exported, name: str) -> None:
    feeds = random_feeds()
    del feeds[name]
    with pytest.raises(ExportError, match="lacks graph inputs") as caught:
        GraphEvaluator(default.bundle.model_path).run(feeds)
    assert caught.value.details["missing"] == name


@pytest.mark.parametrize("custom_ops", ["eager", "bodies"])
def test_writing_past_the_capacity_is_an_error(default: Exported, custom_ops: str) -> None:
    feeds = {**random_feeds(), "past_length": torch.tensor([9, 0])}  # 9 + 4 > 12
    with pytest.raises(ExportError) as caught:
        GraphEvaluator(default.bundle.model_path, custom_ops=custom_ops).run(feeds)
    assert caught.value.details["node"].startswith("model.layers.0.self_attn/LlamaAttention")


@pytest.mark.parametrize("token", [-98, 97])
def test_a_token_outside_the_embedding_is_an_error(default: Exported, token: int) -> None:
    feeds = random_feeds()
    feeds["input_ids"][0, 0] = token
    with pytest.raises(ExportError, match="cannot compute Gather"):
        GraphEvaluator(default.bundle.model_path).run(feeds)


def test_a_mapping_that_lacks_an_op_is_an_error(default: Exported) -> None:
    with pytest.raises(ExportError, match="cannot compute LlamaRMSNorm"):
        GraphEvaluator(default.bundle.model_path, custom_ops={}).run(random_feeds())


def test_weights_beyond_the_budget_are_read_again_with_the_same_result(
    default: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_export.parity.oracle import evaluator as module

    kept = GraphEvaluator(default.bundle.model_path).run(random_feeds())
    monkeypatch.setattr(module, "_KEEP_BYTES", 0)
    frugal = GraphEvaluator(default.bundle.model_path)
    for _ in range(2):
        again = frugal.run(random_feeds())
        assert all(torch.equal(kept[name], again[name]) for name in kept)
