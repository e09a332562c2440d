"""Realistic faults, put into a copy of an exported graph: what a validator must find, and where.

A fault is a mistake that people make when they write or convert a Llama: another rotation, a mask aligned to the wrong
corner, a weight that is transposed. Each is put at a random layer of ``model.onnx``, or into a copy of one weight that the
graph then reads instead of the checkpoint's (reference and artefact read the same files, so a fault *in* the file is the
business of hashes). Whoever injects says where: :class:`Place` is what a report has to name.

The custom op of a layer is changed by writing its function body into the graph in its place, and changing that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper

from llama_export.bundle.bundle import Bundle
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.model.loading import read_tensor
from llama_export.ops.table import DOMAIN
from llama_export.ops.torch_ops import EAGER
from llama_export.parity.locate.locate import place
from llama_export.parity.oracle.evaluator import layer_of

_WEIGHTS = "faulty_weights.bin"


class NotApplicable(Exception):
    """This model has no such part: a bias to drop, heads to group."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fault is: the first tensor it spoils comes from this op of this layer."""

    layer: int | None
    """None: outside the decoder layers."""
    op: str


class Mutant:
    """``model.onnx`` of a bundle's copy, open for changes.

    Args:
        bundle: a copy that may be changed.
        rng: chooses layers, rows, bits.
    """

    def __init__(self, bundle: Bundle, rng: np.random.Generator) -> None:
        self.bundle = bundle
        self.rng = rng
        self.model = onnx.load(str(bundle.model_path), load_external_data=False)
        self.graph = self.model.graph
        self.layer = int(rng.integers(bundle.config.num_hidden_layers))
        self._data = bytearray()

    def save(self) -> None:
        """Writes graph and changed weights."""
        if self._data:
            (self.bundle.folder / _WEIGHTS).write_bytes(self._data)
        self.bundle.model_path.write_bytes(self.model.SerializeToString())

    # ---- nodes ----

    def node(self, name: str) -> onnx.NodeProto:
        """The node of that name; ``{}`` stands for ``model.layers.<the chosen layer>``."""
        name = name.format(f"model.layers.{self.layer}")
        for node in self.graph.node:
            if node.name == name:
                return node
        raise NotApplicable(f"no node {name}")

    def output_of(self, module: str) -> onnx.NodeProto:
        """The node that computes a module's result: its last."""
        module = module.format(f"model.layers.{self.layer}")
        found = [node for node in self.graph.node if node.name.rpartition("/")[0] == module]
        if not found:
            raise NotApplicable(f"no module {module}")
        return found[-1]

    def norm(self, which: str) -> onnx.NodeProto:
        """``input_layernorm`` or ``post_attention_layernorm`` of the chosen layer."""
        return self.output_of(f"{{}}.{which}")

    @property
    def attention(self) -> onnx.NodeProto:
        """The custom op of the chosen layer."""
        return self.output_of("{}.self_attn")

    def insert(self, before: onnx.NodeProto, *new: onnx.NodeProto) -> None:
        """Adds nodes in front of another, in their order."""
        at = next(index for index, node in enumerate(self.graph.node) if node.name == before.name)
        for offset, node in enumerate(new):
            self.graph.node.insert(at + offset, node)

    def change_input(self, node: onnx.NodeProto, slot: int, op: str, *others: str, **attributes: Any) -> None:
        """``node`` reads ``op(what it read, *others)`` instead."""
        made = f"{node.name}/fault.{slot}"
        self.insert(node, helper.make_node(op, [node.input[slot], *others], [made], name=made, **attributes))
        self.node(node.name).input[slot] = made

    def change_output(self, node: onnx.NodeProto, op: str, *others: str, slot: int = 0, **attributes: Any) -> Place:
        """What ``node`` writes is what others read after ``op``, which then is the op at fault."""
        wanted = node.output[slot]
        node.output[slot] = f"{wanted}/right"
        at = next(index for index, item in enumerate(self.graph.node) if item.name == node.name)
        changed = helper.make_node(op, [f"{wanted}/right", *others], [wanted], name=f"{node.name}/fault", **attributes)
        self.graph.node.insert(at + 1, changed)
        return Place(layer_of(node.name), op)

    def constant(self, value: Any, like: str = "float") -> str:
        """A new initializer: ``float`` in the model's dtype as far as it goes, ``float32`` or ``int64``."""
        name = f"fault/{len(self.graph.initializer)}"
        if like == "int64":
            tensor = onnx.numpy_helper.from_array(np.asarray(value, np.int64), name)
        else:
            kind = onnx.TensorProto.FLOAT if like == "float32" else self._elem_type
            array = np.asarray(value, np.float32)
            tensor = helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())
        self.graph.initializer.append(tensor)
        return name

    @property
    def _elem_type(self) -> int:
        return int(getattr(onnx.TensorProto, {"float32": "FLOAT"}.get(self.bundle.dtype, self.bundle.dtype.upper())))

    def attribute(self, node: onnx.NodeProto, name: str) -> Any:
        """The attribute, to be changed."""
        return next(item for item in node.attribute if item.name == name)

    def inline(self, node: onnx.NodeProto) -> Inlined:
        """Writes a custom op's function body into the graph in the place of its node."""
        function = next(item for item in self.model.functions if (item.domain, item.name) == (DOMAIN, node.op_type))
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        names = dict(zip(function.input, node.input, strict=True)) | dict(
            zip(function.output, node.output, strict=True)
        )
        body = []
        for number, inner in enumerate(function.node):
            new = onnx.NodeProto()
            new.CopyFrom(inner)
            new.name = f"{node.name}/{inner.op_type}.{number}"
            for slot, name in enumerate(inner.input):
                new.input[slot] = names.get(name, f"{node.name}/{name}") if name else ""
            for slot, name in enumerate(inner.output):
                new.output[slot] = names.get(name, f"{node.name}/{name}")
            del new.attribute[:]
            for item in inner.attribute:
                value = attributes[item.ref_attr_name] if item.ref_attr_name else helper.get_attribute_value(item)
                new.attribute.append(helper.make_attribute(item.name, value))
            body.append(new)
        self.insert(node, *body)
        self.graph.node.remove(self.node(node.name))
        return Inlined(self, node.name, names)

    # ---- weights ----

    def weight(self, name: str) -> NDArray[np.float32]:
        """An initializer's values; ``{}`` as in :meth:`node`."""
        item = self._initializer(name)
        if item.data_location != onnx.TensorProto.EXTERNAL:
            return np.asarray(onnx.numpy_helper.to_array(item), np.float32).copy()
        where = {entry.key: entry.value for entry in item.external_data}
        dtype = {1: "float32", 10: "float16", 16: "bfloat16"}[item.data_type]
        entry = TensorEntry(
            item.name, dtype, tuple(item.dims), where["location"], int(where["offset"]), int(where["length"])
        )
        values: NDArray[np.float32] = read_tensor(self.bundle.folder, entry).float().numpy().copy()
        return values

    def set_weight(self, name: str, values: NDArray[Any]) -> None:
        """The graph reads these values instead of the checkpoint's, in the dtype the checkpoint stores."""
        item = self._initializer(name)
        if item.data_location != onnx.TensorProto.EXTERNAL:
            item.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values, np.float32), item.name))
            return
        dtype = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}[item.data_type]
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(dtype).contiguous()
        raw = tensor.view(torch.uint8).numpy().tobytes()
        where = {"location": _WEIGHTS, "offset": str(len(self._data)), "length": str(len(raw))}
        self._data += raw + b"\0" * (-len(raw) % 64)
        del item.external_data[:]
        for key, value in where.items():
            entry = item.external_data.add()
            entry.key, entry.value = key, value

    def exchange(self, left: str, right: str) -> None:
        """Two weights of one shape take each other's place."""
        a, b = self.weight(left), self.weight(right)
        if a.shape != b.shape:
            raise NotApplicable("the shapes differ")
        self.set_weight(left, b)
        self.set_weight(right, a)

    def _initializer(self, name: str) -> onnx.TensorProto:
        name = name.format(f"model.layers.{self.layer}")
        for item in self.graph.initializer:
            if item.name == name:
                return item
        raise NotApplicable(f"no weight {name}")

    def projection(self) -> str:
        """One of the seven matrices of the chosen layer, at random."""
        names = [
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        ]
        return "{}." + str(self.rng.choice(names))


@dataclass(frozen=True, slots=True)
class Inlined:
    """A custom op as the nodes of its body."""

    mutant: Mutant
    prefix: str
    names: dict[str, str]

    def tensor(self, name: str) -> str:
        """The graph's name of a tensor of the body."""
        return self.names.get(name, f"{self.prefix}/{name}")

    def maker(self, name: str) -> onnx.NodeProto:
        """The node that computes it."""
        return next(node for node in self.mutant.graph.node if self.tensor(name) in node.output)

    def replace(self, name: str, instead: str, *, by: str | None = None) -> None:
        """Readers of one tensor of the body read another; ``by``: only those that compute this one."""
        for node in self.mutant.graph.node:
            if node.name.startswith(self.prefix) and (by is None or self.tensor(by) in node.output):
                for slot, read in enumerate(node.input):
                    if read == self.tensor(name):
                        node.input[slot] = self.tensor(instead)

    def insert(self, before: str, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        """A new node of the body, in front of the one that computes ``before``."""
        new = helper.make_node(
            op, [self.tensor(name) for name in inputs], [self.tensor(output)], name=f"{self.prefix}/{op}.{output}", **attributes
        )  # fmt: skip
        self.mutant.insert(self.maker(before), new)


Inject = Callable[[Mutant], Place]
FAULTS: dict[str, Inject] = {}
"""Name -> puts the fault in, and says where it is."""


def _fault(name: str) -> Callable[[Inject], Inject]:
    def add(inject: Inject) -> Inject:
        FAULTS[name] = inject
        return inject

    return add


def _at(node: onnx.NodeProto) -> Place:
    found = place(node, "")
    return Place(found["layer"], found["op"])


def inject(bundle: Bundle, name: str, rng: np.random.Generator) -> Place:
    """Puts a fault into a bundle's copy; its manifest's hashes are then wrong, as they should be.

    Raises:
        NotApplicable: this model has no such part.
    """
    mutant = Mutant(bundle, rng)
    where = FAULTS[name](mutant)
    mutant.save()
    return where


def copy_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """A copy whose graphs may be changed; weights are hard links where possible, since the faults never touch them."""
    from llama_export.bundle.bundle import load_bundle

    folder.mkdir(parents=True)
    for path in bundle.folder.iterdir():
        if path.is_file():
            if path.suffix == ".safetensors":
                try:
                    os.link(path.resolve(), folder / path.name)
                except OSError:
                    shutil.copy2(path, folder / path.name)
            else:
                (folder / path.name).write_bytes(path.read_bytes())
    return load_bundle(folder, ignore_hashes=True)


# ---- RoPE --------------------------------------------------------------------------------------------------------


def _frequencies(change: Callable[[NDArray[np.float32], Mutant], NDArray[np.float32]]) -> Inject:
    def inject(m: Mutant) -> Place:
        name = "model.rotary_emb.inv_freq"
        m.set_weight(name, change(m.weight(name), m))
        if m.bundle.config.rope.rope_type == "longrope":
            m.set_weight("model.rotary_emb.long_inv_freq", change(m.weight("model.rotary_emb.long_inv_freq"), m))
        readers = [node for node in m.graph.node if name in node.input]
        return _at(readers[0])

    return inject


def _other_base(inv_freq: NDArray[np.float32], m: Mutant) -> NDArray[np.float32]:
    exponents = np.arange(len(inv_freq)) / len(inv_freq)
    changed: NDArray[np.float32] = (inv_freq * 2.0**-exponents).astype(np.float32)
    if len(inv_freq) < 2:
        raise NotApplicable("one frequency: its exponent is 0")
    return changed


def _blended(inv_freq: NDArray[np.float32], m: Mutant) -> NDArray[np.float32]:
    changed = inv_freq.copy()
    changed[len(changed) // 2 :] /= 8
    return changed


def _partial(inv_freq: NDArray[np.float32], m: Mutant) -> NDArray[np.float32]:
    changed = inv_freq.copy()
    changed[(len(changed) + 1) // 2 :] = 0
    return changed


FAULTS["RoPE: another base"] = _frequencies(_other_base)
FAULTS["RoPE: scaled by a factor the config does not name"] = _frequencies(lambda inv_freq, m: inv_freq / np.float32(2))
FAULTS["RoPE: another type (low frequencies divided, as llama3 does)"] = _frequencies(_blended)
FAULTS["RoPE: only half of each head is rotated"] = _frequencies(_partial)


@_fault("RoPE: cos and sin exchanged")
def _(m: Mutant) -> Place:
    node = m.attention
    node.input[3], node.input[4] = node.input[4], node.input[3]
    return _at(node)


@_fault("RoPE: rotated the other way")
def _(m: Mutant) -> Place:
    node = m.attention
    where = _at(node)
    m.change_input(node, 4, "Neg")
    return where


@_fault("RoPE: pairs interleaved (2i, 2i + 1)")
def _(m: Mutant) -> Place:
    where = _at(m.attention)
    if m.bundle.config.head_dim == 2:
        raise NotApplicable("one pair")
    body = m.inline(m.attention)
    for name in ("query_turned", "key_turned"):
        m.attribute(body.maker(name), "interleaved").i = 1
    return where


@_fault("RoPE: keys are not rotated")
def _(m: Mutant) -> Place:
    where = _at(m.attention)
    m.inline(m.attention).replace("key_turned", "key_wide")
    return where


@_fault("RoPE: queries are not rotated")
def _(m: Mutant) -> Place:
    where = _at(m.attention)
    m.inline(m.attention).replace("query_turned", "query_wide")
    return where


def _positions(m: Mutant) -> onnx.NodeProto:
    """What adds past_length and the token's index."""
    return next(node for node in m.graph.node if node.op_type == "Add" and node.name == "model/Add")


@_fault("positions: off by one")
def _(m: Mutant) -> Place:
    return m.change_output(_positions(m), "Add", m.constant([[1]], "int64"))


@_fault("positions: start at 0 in every call")
def _(m: Mutant) -> Place:
    node = _positions(m)
    where = _at(node)
    m.change_input(node, 0, "Mul", m.constant([[0]], "int64"))
    return where


@_fault("positions: those of row 0 for all rows")
def _(m: Mutant) -> Place:
    node = _positions(m)
    where = _at(node)
    first = node.input[0]
    m.insert(
        node,
        helper.make_node("Gather", [first, m.constant([0], "int64")], ["fault/first"], name="fault/Gather", axis=0),
        helper.make_node("Shape", [first], ["fault/shape"], name="fault/Shape"),
        helper.make_node("Expand", ["fault/first", "fault/shape"], ["fault/rows"], name="fault/Expand"),
    )
    m.node(node.name).input[0] = "fault/rows"
    return where


# ---- attention ---------------------------------------------------------------------------------------------------


def _attention(change: Callable[[Mutant, Inlined], None]) -> Inject:
    def inject(m: Mutant) -> Place:
        where = _at(m.attention)
        change(m, m.inline(m.attention))
        return where

    return inject


def _upper_left(m: Mutant, body: Inlined) -> None:
    """Query s sees key j iff j <= s: right in a first prefill, wrong in every later call."""
    body.insert("positions_BS", "Mul", ["past_length_B1", "zero"], "no_past")
    body.replace("past_length_B1", "no_past", by="positions_BS")


def _sees_not_itself(m: Mutant, body: Inlined) -> None:
    body.maker("visible").op_type = "Less"


def _sees_the_next(m: Mutant, body: Inlined) -> None:
    body.insert("visible", "Add", ["positions_B1S1", "one"], "one_more")
    body.replace("positions_B1S1", "one_more", by="visible")


def _not_causal(m: Mutant, body: Inlined) -> None:
    """All keys up to the last new token."""
    body.insert("visible", "Add", ["past_length_B1", "new_tokens"], "end")
    body.insert("visible", "Unsqueeze", ["end", "mask_axes"], "end_wide")
    body.replace("positions_B1S1", "end_wide", by="visible")


def _whole_buffer(m: Mutant, body: Inlined) -> None:
    body.insert("visible", "Add", ["positions_B1S1", "capacity"], "everything")
    body.replace("positions_B1S1", "everything", by="visible")


def _late(m: Mutant, body: Inlined) -> None:
    """Modulo the capacity, as a ring buffer would be."""
    body.insert("present_key", "Add", ["past_length", "one"], "late")
    body.replace("past_length", "late", by="present_key")
    body.replace("past_length", "late", by="present_value")


def _stale(part: str) -> Callable[[Mutant, Inlined], None]:
    def change(m: Mutant, body: Inlined) -> None:
        body.replace(f"present_{part}", f"past_{part}", by="attended_BHSD")

    return change


def _not_written(part: str) -> Callable[[Mutant, Inlined], None]:
    def change(m: Mutant, body: Inlined) -> None:
        maker = body.maker(f"present_{part}")
        maker.op_type = "Identity"
        del maker.input[1:]
        del maker.attribute[:]

    return change


def _exchanged(m: Mutant, body: Inlined) -> None:
    maker = body.maker("attended_BHSD")
    maker.input[1], maker.input[2] = maker.input[2], maker.input[1]


def _grouping(m: Mutant, body: Inlined) -> None:
    """Query head h reads key head h mod G instead of h // (H / G)."""
    config = m.bundle.config
    H, G = config.num_attention_heads, config.num_key_value_heads
    if G in (1, H):
        raise NotApplicable("one group, or as many groups as heads")
    order = [h for g in range(G) for h in range(H) if h % G == g]
    back = list(np.argsort(order))
    for name, index, before in (("query_rope", order, "attended_BHSD"), ("attended_BHSD", back, "attended_BSHD")):
        body.insert(before, "Gather", [name, name], f"{name}_mixed", axis=1)
        body.maker(f"{name}_mixed").input[1] = m.constant(index, "int64")
        reader = body.maker(before)
        reader.input[0] = body.tensor(f"{name}_mixed")


def _heads_not_merged(m: Mutant, body: Inlined) -> None:
    """[B, H, S, D] taken for [B, S, H, D]: the shapes of a reshape do not tell."""
    if m.bundle.config.num_attention_heads == 1:
        raise NotApplicable("one head")
    body.insert("attn_output", "Shape", ["query"], "query_size")
    maker = body.maker("attn_output")
    maker.input[0], maker.input[1] = body.tensor("attended_BHSD"), body.tensor("query_size")


FAULTS |= {
    "attention: causal mask aligned to the upper left": _attention(_upper_left),
    "attention: a token does not see itself": _attention(_sees_not_itself),
    "attention: a token sees the next one": _attention(_sees_the_next),
    "attention: not causal": _attention(_not_causal),
    "attention: the whole buffer is seen": _attention(_whole_buffer),
    "attention: keys and values exchanged": _attention(_exchanged),
    "attention: query heads grouped by remainder": _attention(_grouping),
    "attention: heads merged without transposing": _attention(_heads_not_merged),
    "cache: written one slot late": _attention(_late),
    "cache: stale keys are read": _attention(_stale("key")),
    "cache: stale values are read": _attention(_stale("value")),
    "cache: keys are not written": _attention(_not_written("key")),
    "cache: values are not written": _attention(_not_written("value")),
}


def _scale(factor: Callable[[float], float]) -> Inject:
    def inject(m: Mutant) -> Place:
        item = m.attribute(m.attention, "scale")
        if factor(item.f) == item.f:
            raise NotApplicable("the scale is 1")
        item.f = factor(item.f)
        return _at(m.attention)

    return inject


FAULTS["attention: scale missing"] = _scale(lambda scale: 1.0)
FAULTS["attention: scale applied twice"] = _scale(lambda scale: scale**2)
FAULTS["attention: scale of another head size"] = _scale(lambda scale: scale * 2**-0.5)


@_fault("batch: one row's length for all rows")
def _(m: Mutant) -> Place:
    node = m.attention
    where = _at(node)
    m.insert(
        node,
        helper.make_node("Gather", ["past_length", m.constant([0], "int64")], ["fault/length"], name="fault/Gather"),
        helper.make_node("Shape", ["past_length"], ["fault/shape"], name="fault/Shape"),
        helper.make_node("Expand", ["fault/length", "fault/shape"], ["fault/lengths"], name="fault/Expand"),
    )
    m.node(node.name).input[7] = "fault/lengths"
    return where


@_fault("batch: rows read each other's values")
def _(m: Mutant) -> Place:
    node = m.attention
    where = _at(node)
    m.insert(
        node,
        helper.make_node("Shape", [node.input[2]], ["fault/rows"], name="fault/Shape", start=0, end=1),
        helper.make_node("Squeeze", ["fault/rows", m.constant([0], "int64")], ["fault/count"], name="fault/Squeeze"),
        helper.make_node(
            "Range", [m.constant(0, "int64"), "fault/count", m.constant(1, "int64")], ["fault/up"], name="fault/Range"
        ),
        helper.make_node("Sub", ["fault/count", m.constant(1, "int64")], ["fault/last"], name="fault/Sub"),
        helper.make_node("Sub", ["fault/last", "fault/up"], ["fault/down"], name="fault/Sub.1"),
        helper.make_node("Gather", [node.input[2], "fault/down"], ["fault/values"], name="fault/Gather", axis=0),
    )
    m.node(node.name).input[2] = "fault/values"
    return where


# ---- norms and residuals -----------------------------------------------------------------------------------------

_NORMS = ("input_layernorm", "post_attention_layernorm")


def _norm(change: Callable[[Mutant, onnx.NodeProto], None]) -> Inject:
    def inject(m: Mutant) -> Place:
        node = m.norm(str(m.rng.choice(_NORMS)))
        where = _at(node)
        change(m, node)
        return where

    return inject


def _epsilon(factor: float) -> Callable[[Mutant, onnx.NodeProto], None]:
    def change(m: Mutant, node: onnx.NodeProto) -> None:
        m.attribute(node, "epsilon").f *= factor

    return change


def _own_norm(formula: Callable[[Inlined, str], None]) -> Callable[[Mutant, onnx.NodeProto], None]:
    """Writes the norm as primitive nodes; ``formula`` makes the tensor ``scaled`` that the weight multiplies."""

    def change(m: Mutant, node: onnx.NodeProto) -> None:
        body = m.inline(node)
        source = "new_residual" if "new_residual" in body.names else "hidden_states"
        maker = body.maker("normed")
        epsilon = float(m.attribute(maker, "epsilon").f)
        body.names["epsilon"], body.names["two"] = m.constant(epsilon), m.constant(2.0)
        body.names["axis"] = m.constant([-1], "int64")
        formula(body, source)
        maker = body.maker("normed")
        maker.op_type = "Mul"
        del maker.attribute[:]
        maker.input[0] = body.tensor("scaled")

    return change


def _mean_square(body: Inlined, source: str) -> None:
    body.insert("normed", "Mul", [source, source], "squares")
    body.insert("normed", "ReduceMean", ["squares", "axis"], "mean_square", keepdims=1)


def _epsilon_outside(body: Inlined, source: str) -> None:
    _mean_square(body, source)
    body.insert("normed", "Sqrt", ["mean_square"], "root")
    body.insert("normed", "Add", ["root", "epsilon"], "divisor")
    body.insert("normed", "Div", [source, "divisor"], "scaled")


def _layer_norm(body: Inlined, source: str) -> None:
    body.insert("normed", "ReduceMean", [source, "axis"], "mean", keepdims=1)
    body.insert("normed", "Sub", [source, "mean"], "centred")
    _mean_square(body, "centred")
    body.insert("normed", "Add", ["mean_square", "epsilon"], "inside")
    body.insert("normed", "Sqrt", ["inside"], "divisor")
    body.insert("normed", "Div", ["centred", "divisor"], "scaled")


def _no_root(body: Inlined, source: str) -> None:
    _mean_square(body, source)
    body.insert("normed", "Add", ["mean_square", "epsilon"], "divisor")
    body.insert("normed", "Div", [source, "divisor"], "scaled")


def _no_norm(body: Inlined, source: str) -> None:
    body.insert("normed", "Identity", [source], "scaled")


def _gemma(m: Mutant, node: onnx.NodeProto) -> None:
    slot = len(node.input) - 1
    m.change_input(node, slot, "Add", m.constant([1.0]))


def _no_weight(m: Mutant, node: onnx.NodeProto) -> None:
    slot = len(node.input) - 1
    weight = m.weight(node.input[slot])
    if (weight == 1).all():
        raise NotApplicable("the weight is 1")
    node.input[slot] = m.constant(np.ones_like(weight))


def _other_norm(m: Mutant, node: onnx.NodeProto) -> None:
    slot = len(node.input) - 1
    other = node.input[slot].replace(*(_NORMS if _NORMS[0] in node.input[slot] else _NORMS[::-1]))
    if (m.weight(node.input[slot]) == m.weight(other)).all():
        raise NotApplicable("both weights are the same")
    node.input[slot] = other


FAULTS |= {
    "norm: epsilon 10 x": _norm(_epsilon(10.0)),
    "norm: epsilon 0": _norm(_epsilon(0.0)),
    "norm: epsilon outside the root": _norm(_own_norm(_epsilon_outside)),
    "norm: mean subtracted (LayerNorm)": _norm(_own_norm(_layer_norm)),
    "norm: divided by the mean square, without the root": _norm(_own_norm(_no_root)),
    "norm: missing": _norm(_own_norm(_no_norm)),
    "norm: weight + 1 (Gemma)": _norm(_gemma),
    "norm: weight left out": _norm(_no_weight),
    "norm: the layer's other norm's weight": _norm(_other_norm),
}


def _residual(change: Callable[[Mutant, onnx.NodeProto], None]) -> Inject:
    def inject(m: Mutant) -> Place:
        node = m.norm("post_attention_layernorm")
        where = _at(node)
        change(m, node)
        return where

    return inject


def _residual_missing(m: Mutant, node: onnx.NodeProto) -> None:
    m.change_input(node, 1, "Mul", m.constant([0.0]))


def _residual_twice(m: Mutant, node: onnx.NodeProto) -> None:
    m.change_input(node, 1, "Add", node.input[1])


def _residual_normed(m: Mutant, node: onnx.NodeProto) -> None:
    node.input[1] = m.norm("input_layernorm").output[0]


FAULTS |= {
    "residual: missing": _residual(_residual_missing),
    "residual: added twice": _residual(_residual_twice),
    "residual: taken after the norm": _residual(_residual_normed),
}


@_fault("residual: a layer is skipped")
def _(m: Mutant) -> Place:
    """The next layer's sum takes the input of this one."""
    if m.layer + 1 >= m.bundle.config.num_hidden_layers:
        raise NotApplicable("the last layer")
    this, after = m.norm("post_attention_layernorm"), m.layer + 1
    m.layer = after
    node = m.norm("input_layernorm")
    node.input[1] = this.input[1]
    return _at(node)


# ---- MLP ---------------------------------------------------------------------------------------------------------


@_fault("MLP: gate and up exchanged")
def _(m: Mutant) -> Place:
    nodes = [node for node in m.graph.node if node.name.startswith(f"model.layers.{m.layer}.mlp.")]
    for node in nodes:
        for slot, name in enumerate(node.input):
            if name.startswith("model.layers") and ("gate_proj" in name or "up_proj" in name):
                pair = ("gate_proj", "up_proj") if "gate_proj" in name else ("up_proj", "gate_proj")
                node.input[slot] = name.replace(*pair)
    return _at(m.node("{}.mlp.gate_proj/MatMul"))


@_fault("MLP: another activation")
def _(m: Mutant) -> Place:
    node = next(item for item in m.graph.node if item.name.startswith(f"model.layers.{m.layer}.mlp/"))
    where = _at(node)
    if node.op_type == "Sigmoid":
        m.change_input(node, 0, "Mul", m.constant([1.702]))
        return where
    return m.change_output(node, "Relu")


@_fault("MLP: activation left out")
def _(m: Mutant) -> Place:
    gate = m.output_of("{}.mlp.gate_proj").output[0]
    product = m.output_of("{}.mlp")
    up = m.output_of("{}.mlp.up_proj").output[0]
    where = _at(product)
    product.input[0 if product.input[1] == up else 1] = gate
    return where


# ---- weights -----------------------------------------------------------------------------------------------------


def _matrix(change: Callable[[Mutant, NDArray[np.float32]], NDArray[Any]]) -> Inject:
    def inject(m: Mutant) -> Place:
        module = m.projection()
        m.set_weight(f"{module}.weight", change(m, m.weight(f"{module}.weight")))
        return _at(m.node(f"{module}/MatMul"))

    return inject


def _bit(m: Mutant, weight: NDArray[np.float32]) -> NDArray[Any]:
    """The exponent's top bit of one element that is not zero: the value grows or shrinks by many powers of two."""
    flat = weight.reshape(-1)
    at = int(m.rng.choice(np.flatnonzero(flat)))
    if m.bundle.dtype == "float16":
        half = flat[at : at + 1].astype(np.float16)
        flat[at] = float((half.view(np.uint16) ^ np.uint16(1 << 13)).view(np.float16)[0])
    else:
        flat[at] = float((flat[at : at + 1].view(np.uint32) ^ np.uint32(1 << 25)).view(np.float32)[0])
    return weight


def _nan(m: Mutant, weight: NDArray[np.float32]) -> NDArray[Any]:
    weight[int(m.rng.integers(weight.shape[0])), int(m.rng.integers(weight.shape[1]))] = np.nan
    return weight


def _zero_row(m: Mutant, weight: NDArray[np.float32]) -> NDArray[Any]:
    weight[int(m.rng.integers(weight.shape[0]))] = 0
    return weight


def _eight_bits(m: Mutant, weight: NDArray[np.float32]) -> NDArray[Any]:
    step = np.abs(weight).max() / 127
    rounded: NDArray[Any] = np.round(weight / step) * step
    return rounded


FAULTS |= {
    "weight: transposed": _matrix(lambda m, w: w.reshape(w.shape[::-1]).T),
    "weight: one exponent bit flipped": _matrix(_bit),
    "weight: one NaN": _matrix(_nan),
    "weight: one row of zeros": _matrix(_zero_row),
    "weight: rows in reverse": _matrix(lambda m, w: w[::-1]),
    "weight: rounded to 8 bits": _matrix(_eight_bits),
    "weight: negated": _matrix(lambda m, w: -w),
}


def _neighbour(m: Mutant) -> int:
    layers = m.bundle.config.num_hidden_layers
    if layers < 2:
        raise NotApplicable("one layer")
    return m.layer + 1 if m.layer + 1 < layers else m.layer - 1


@_fault("weight: that of the next layer")
def _(m: Mutant) -> Place:
    module, other = m.projection(), _neighbour(m)
    m.set_weight(f"{module}.weight", m.weight(f"{module.format(f'model.layers.{other}')}.weight"))
    return _at(m.node(f"{module}/MatMul"))


@_fault("weight: exchanged between two layers")
def _(m: Mutant) -> Place:
    module, other = m.projection(), _neighbour(m)
    m.exchange(f"{module}.weight", f"{module.format(f'model.layers.{other}')}.weight")
    m.layer = min(m.layer, other)
    return _at(m.node(f"{module}/MatMul"))


@_fault("weight: keys' and values' projections exchanged")
def _(m: Mutant) -> Place:
    m.exchange("{}.self_attn.k_proj.weight", "{}.self_attn.v_proj.weight")
    return _at(m.node("{}.self_attn.k_proj/MatMul"))


def _bias(change: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Inject:
    def inject(m: Mutant) -> Place:
        module = m.projection()
        m.set_weight(f"{module}.bias", change(m.weight(f"{module}.bias")))
        return _at(m.node(f"{module}/Add"))

    return inject


FAULTS["bias: dropped"] = _bias(np.zeros_like)
FAULTS["bias: added twice"] = _bias(lambda bias: 2 * bias)

# ---- both ends ---------------------------------------------------------------------------------------------------


@_fault("embedding: rows shifted by one")
def _(m: Mutant) -> Place:
    node = m.node("model.embed_tokens/Gather")
    where = _at(node)
    vocabulary = m.bundle.config.vocab_size
    limit = m.constant(vocabulary - 1, "int64")
    m.insert(
        node,
        helper.make_node("Add", [node.input[1], m.constant(1, "int64")], ["fault/next"], name="fault/Add"),
        helper.make_node("Clip", ["fault/next", "", limit], ["fault/ids"], name="fault/Clip"),
    )
    m.node(node.name).input[1] = "fault/ids"
    return where


@_fault("embedding: multiplied by sqrt(hidden size) (Gemma)")
def _(m: Mutant) -> Place:
    scale = m.constant([m.bundle.config.hidden_size**0.5])
    names = {node.name for node in m.graph.node}
    last = "Cast" if "model.embed_tokens/Cast" in names else "Gather"  # the table may be stored in another dtype
    return m.change_output(m.node(f"model.embed_tokens/{last}"), "Mul", scale)


@_fault("output: tied embedding untied")
def _(m: Mutant) -> Place:
    if not m.bundle.config.tie_word_embeddings:
        raise NotApplicable("not tied")
    weight = m.weight("model.embed_tokens.weight")
    node = m.node("lm_head/Transpose")
    node.input[0] = m.constant(m.rng.standard_normal(weight.shape) * weight.std())
    return _at(m.node("lm_head/MatMul"))


@_fault("output: the embedding's weight where none is tied")
def _(m: Mutant) -> Place:
    if m.bundle.config.tie_word_embeddings:
        raise NotApplicable("tied")
    names = {node.name for node in m.graph.node}
    reader = "lm_head.weight/Cast" if "lm_head.weight/Cast" in names else "lm_head/Transpose"
    m.node(reader).input[0] = m.node("model.embed_tokens/Gather").input[0]
    return _at(m.node("lm_head/MatMul"))


@_fault("output: logits of the wrong token")
def _(m: Mutant) -> Place:
    node = next(item for item in m.graph.node if item.op_type == "Unsqueeze" and item.input[0] == "logits_index")
    where = _at(node)
    m.change_input(node, 0, "Mul", m.constant([[0]], "int64"))
    return where


@_fault("output: logits scaled")
def _(m: Mutant) -> Place:
    node = m.node("lm_head/MatMul")
    where = _at(node)
    m.change_input(node, 0, "Mul", m.constant([0.5]))
    return where


@_fault("output: the last norm is missing")
def _(m: Mutant) -> Place:
    node = m.output_of("model.norm")
    where = _at(node)
    _own_norm(_no_norm)(m, node)
    return where


@_fault("a NaN at one position")
def _(m: Mutant) -> Place:
    """Token 3 of every call's product in the MLP."""
    node = m.output_of("{}.mlp")
    wanted = node.output[0]
    node.output[0] = f"{wanted}/right"
    after = m.node("{}.mlp.down_proj/MatMul")
    nan = m.constant([float("nan")])
    m.insert(
        after,
        helper.make_node("Shape", [f"{wanted}/right"], ["fault/size"], name=f"{node.name}/Shape", start=1, end=2),
        helper.make_node("Squeeze", ["fault/size", m.constant([0], "int64")], ["fault/n"], name=f"{node.name}/Squeeze"),
        helper.make_node(
            "Range",
            [m.constant(0, "int64"), "fault/n", m.constant(1, "int64")],
            ["fault/at"],
            name=f"{node.name}/Range",
        ),
        helper.make_node(
            "Unsqueeze", ["fault/at", m.constant([0, 2], "int64")], ["fault/at3"], name=f"{node.name}/Unsqueeze"
        ),
        helper.make_node("Equal", ["fault/at3", m.constant(3, "int64")], ["fault/third"], name=f"{node.name}/Equal"),
        helper.make_node("Where", ["fault/third", nan, f"{wanted}/right"], [wanted], name=f"{node.name}/Where"),
    )
    return Place(m.layer, "Where")


# ---- roundings, which float64 cannot show ------------------------------------------------------------------------

ROUNDINGS: dict[str, Callable[[onnx.FunctionProto], None]] = {}
"""Name -> changes a function body of the graph; the others of the graph are left alone. Judged by ``ops/bodies``."""
ROUNDING_OPS: dict[str, tuple[str, ...]] = {}
"""Name -> the ops whose bodies it changes."""
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {}
"""Name -> op -> a function that computes it wrongly. Judged as ``ops/interpreter`` judges a kernel."""
_NORM_OPS = ("LlamaRMSNorm", "LlamaAddRMSNorm")


def _rounding(name: str, *op_types: str) -> Callable[[Callable[[onnx.FunctionProto], None]], None]:
    def add(change: Callable[[onnx.FunctionProto], None]) -> None:
        ROUNDINGS[name], ROUNDING_OPS[name] = change, op_types

    return add


def inject_rounding(bundle: Bundle, name: str) -> Place:
    """Changes the function bodies of a bundle's copy.

    Raises:
        NotApplicable: the graph has none of the ops.
    """
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    used = {node.op_type for node in model.graph.node}
    changed = [item for item in model.functions if item.name in ROUNDING_OPS[name] and item.name in used]
    if not changed:
        raise NotApplicable("the graph has no such op")
    for function in changed:
        ROUNDINGS[name](function)
    bundle.model_path.write_bytes(model.SerializeToString())
    return Place(None, " or ".join(ROUNDING_OPS[name]))


def _body_node(function: onnx.FunctionProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in function.node if node.op_type == op_type)


@_rounding("rounding: softmax in float16", "LlamaAttention", "LlamaMaskedAttention")
def _(function: onnx.FunctionProto) -> None:
    precision = helper.make_attribute("softmax_precision", onnx.TensorProto.FLOAT16)
    _body_node(function, "Attention").attribute.append(precision)


@_rounding("rounding: the norm's interior in float16", *_NORM_OPS)
def _(function: onnx.FunctionProto) -> None:
    node = _body_node(function, "RMSNormalization")
    next(item for item in node.attribute if item.name == "stash_type").i = onnx.TensorProto.FLOAT16


def _written_out(function: onnx.FunctionProto, *, outside: bool) -> None:
    """The norm in primitive nodes, float32 throughout; the weight is multiplied before the one rounding."""
    norm = _body_node(function, "RMSNormalization")
    source, weight = norm.input
    epsilon = next(item for item in norm.attribute if item.name == "epsilon")
    function.node.remove(norm)
    make = helper.make_node
    constant = make("Constant", [], ["epsilon_0d"])
    constant.attribute.append(
        onnx.AttributeProto(name="value_float", ref_attr_name=epsilon.ref_attr_name, type=onnx.AttributeProto.FLOAT)
    )
    function.node.extend(
        [
            make("Cast", [source], ["wide"], to=onnx.TensorProto.FLOAT),
            make("Cast", [weight], ["weight_wide"], to=onnx.TensorProto.FLOAT),
            make("Constant", [], ["last_axis"], value_ints=[-1]),
            constant,
            make("Cast", ["epsilon_0d"], ["epsilon_wide"], to=onnx.TensorProto.FLOAT),
            make("Mul", ["wide", "wide"], ["squares"]),
            make("ReduceMean", ["squares", "last_axis"], ["mean"], keepdims=1),
            *(
                [make("Sqrt", ["mean"], ["root"]), make("Add", ["root", "epsilon_wide"], ["divisor"])]
                if outside
                else [make("Add", ["mean", "epsilon_wide"], ["inside"]), make("Sqrt", ["inside"], ["divisor"])]
            ),
            make("Div", ["wide", "divisor"], ["scaled"]),
            *(
                [make("CastLike", ["scaled", source], ["narrow"]), make("Mul", ["narrow", weight], ["normed"])]
                if outside
                else [make("Mul", ["scaled", "weight_wide"], ["product"]), make("CastLike", ["product", source], ["normed"])]
            ),
        ]
    )  # fmt: skip


@_rounding("rounding: the weight multiplied before the rounding", *_NORM_OPS)
def _(function: onnx.FunctionProto) -> None:
    _written_out(function, outside=False)


@_rounding("rounding: epsilon outside the root", *_NORM_OPS)
def _(function: onnx.FunctionProto) -> None:
    _written_out(function, outside=True)


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Ten bits of mantissa, as the tensor cores read a float32 operand."""
    if x.dtype != torch.float32:
        return x
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _with(op_type: str, change: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {**EAGER, op_type: change}


def _tf32_attention(op_type: str) -> Callable[..., Any]:
    def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> Any:
        return EAGER[op_type](_tf32(query), _tf32(key), _tf32(value), *others)

    return compute


def _half_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    half = x.half()
    return (half * torch.rsqrt(half.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


def _bfloat_attention(op_type: str) -> Callable[..., Any]:
    """The weighted sum accumulates at 16 bits: what is left of a float32 input are 8 bits."""

    def compute(*items: Any) -> Any:
        found = EAGER[op_type](*items)
        first = found[0] if isinstance(found, tuple) else found
        rounded = first.bfloat16().to(first.dtype)
        return (rounded, *found[1:]) if isinstance(found, tuple) else rounded

    return compute


KERNELS |= {
    f"kernel: products in TF32 ({op_type})": _with(op_type, _tf32_attention(op_type))
    for op_type in ("LlamaAttention", "LlamaMaskedAttention")
}
KERNELS |= {
    f"kernel: result rounded to bfloat16 ({op_type})": _with(op_type, _bfloat_attention(op_type))
    for op_type in ("LlamaAttention", "LlamaMaskedAttention")
}
KERNELS["kernel: squares in float16 (LlamaRMSNorm)"] = _with("LlamaRMSNorm", _half_norm)

# ---- what changes nothing ----------------------------------------------------------------------------------------

EQUIVALENT: dict[str, Callable[[Mutant], None]] = {}
"""Name -> a change of the graph that computes the same: not a fault, and must not be reported as one."""


def _equivalent(name: str) -> Callable[[Callable[[Mutant], None]], None]:
    def add(change: Callable[[Mutant], None]) -> None:
        EQUIVALENT[name] = change

    return add


def inject_equivalent(bundle: Bundle, name: str, rng: np.random.Generator) -> None:
    """Puts a harmless change into a bundle's copy.

    Raises:
        NotApplicable: this model has no such part.
    """
    mutant = Mutant(bundle, rng)
    EQUIVALENT[name](mutant)
    mutant.save()


@_equivalent("the summands of a residual exchanged")
def _(m: Mutant) -> None:
    node = m.norm("post_attention_layernorm")
    node.input[0], node.input[1] = node.input[1], node.input[0]


@_equivalent("the factors of the MLP's product exchanged")
def _(m: Mutant) -> None:
    node = m.output_of("{}.mlp")
    node.input[0], node.input[1] = node.input[1], node.input[0]


@_equivalent("a factor of 2 moved from the scale into the queries' weight")
def _(m: Mutant) -> None:
    m.attribute(m.attention, "scale").f /= 2  # not the other way: half of a small float16 number may not be one
    for part in ("weight", "bias"):
        name = f"{{}}.self_attn.q_proj.{part}"
        try:
            m.set_weight(name, m.weight(name) * 2)
        except NotApplicable:
            continue


@_equivalent("hidden units of the MLP in another order")
def _(m: Mutant) -> None:
    order = m.rng.permutation(m.bundle.config.intermediate_size)
    for name in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
        try:
            m.set_weight(f"{{}}.mlp.{name}", m.weight(f"{{}}.mlp.{name}")[order])
        except NotApplicable:
            continue
    m.set_weight("{}.mlp.down_proj.weight", m.weight("{}.mlp.down_proj.weight")[:, order])


@_equivalent("two query heads of one group exchanged, with their columns of the output")
def _(m: Mutant) -> None:
    config = m.bundle.config
    if config.num_attention_heads == config.num_key_value_heads:
        raise NotApplicable("one query head per group")
    order = np.arange(config.num_attention_heads * config.head_dim).reshape(-1, config.head_dim)
    order[[0, 1]] = order[[1, 0]]
    flat = order.reshape(-1)
    for part in ("weight", "bias"):
        name = f"{{}}.self_attn.q_proj.{part}"
        try:
            m.set_weight(name, m.weight(name)[flat])
        except NotApplicable:
            continue
    m.set_weight("{}.self_attn.o_proj.weight", m.weight("{}.self_attn.o_proj.weight")[:, flat])
