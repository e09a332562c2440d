"""A graph's protobuf message, read field by field and strictly: the reader behind :mod:`llama_export.bundle.graph_check`.

Role: what ``onnx`` would parse, without that package and without a copy of the weights. Two readers of one file must not
understand it differently, so whatever an export does not write is refused: an unknown field, one that stands twice, a name that
is not printable. Nothing here knows what a Llama graph looks like.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

EXTERNAL = 1
"""``TensorProto.DataLocation.EXTERNAL``"""
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""``TensorProto.DataType`` -> bytes of an element."""
_SCALARS = {1: "<f", 6: "<i", 7: "<q", 11: "<d"}
"""``TensorProto.DataType`` -> format of an element whose value matters here."""
_MAX_NAME = 1024
Buffer = Any
"""bytes, or a memory map: both give an integer for an index and bytes for a slice."""


class Refused(Exception):
    """(where, got, expected)"""


# ---- messages ---------------------------------------------------------------------------------------------------

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ONE, _MANY = ((_BYTES,), False), ((_BYTES,), True)
_INT, _FLOAT = ((_VARINT,), False), ((_FIXED32,), False)
_INTS, _FLOATS, _DOUBLES = ((_VARINT, _BYTES), True), ((_FIXED32, _BYTES), True), ((_FIXED64, _BYTES), True)
_PACKED = {_FIXED32: 4, _FIXED64: 8}
"""Bytes of a number in a packed field."""
_Schema = Mapping[int, tuple[tuple[int, ...], bool]]
"""Field number -> wire types that it may have, and whether it may stand more than once."""

_MODEL: _Schema = {
    **{1: _INT, 2: _ONE, 3: _ONE, 4: _ONE, 5: _INT, 6: _ONE},
    **{7: _ONE, 8: _MANY, 14: _MANY, 25: _MANY},  # graph, opset_import, metadata_props, functions
}
_GRAPH: _Schema = {1: _MANY, 2: _ONE, 5: _MANY, 10: _ONE, 11: _MANY, 12: _MANY, 13: _MANY, 16: _MANY}
"""node, name, initializer, doc_string, input, output, value_info, metadata_props"""
_NODE: _Schema = {1: _MANY, 2: _MANY, 3: _ONE, 4: _ONE, 5: _MANY, 6: _ONE, 7: _ONE, 9: _MANY}
"""input, output, name, op_type, attribute, doc_string, domain, metadata_props"""
_ATTRIBUTE: _Schema = {
    **{1: _ONE, 2: _FLOAT, 3: _INT, 4: _ONE, 5: _ONE},  # name, f, i, s, t
    **{7: _FLOATS, 8: _INTS, 9: _MANY, 13: _ONE, 20: _INT, 21: _ONE},  # floats, ints, strings, doc, type, ref_attr_name
}
_TENSOR: _Schema = {
    **{1: _INTS, 2: _INT, 4: _FLOATS, 5: _INTS, 7: _INTS},  # dims, data_type, float_data, int32_data, int64_data
    **{8: _ONE, 9: _ONE, 10: _DOUBLES, 11: _INTS},  # name, raw_data, double_data, uint64_data
    **{12: _ONE, 13: _MANY, 14: _INT, 16: _MANY},  # doc_string, external_data, data_location, metadata_props
}
_FUNCTION: _Schema = {
    **{1: _ONE, 4: _MANY, 5: _MANY, 6: _MANY, 7: _MANY, 8: _ONE, 9: _MANY, 10: _ONE},
    **{
        11: _MANY,
        12: _MANY,
        14: _MANY,
    },  # name, input, output, attribute, node, doc, opset, domain, attribute_proto, ...
}
_ENTRY: _Schema = {1: _ONE, 2: _ONE}
"""key, value"""
_VALUE: _Schema = {1: _ONE, 2: _ONE, 3: _ONE, 4: _MANY}
"""name, type, doc_string, metadata_props"""
_OPSET: _Schema = {1: _ONE, 2: _INT}
"""domain, version"""
_TYPE: _Schema = {1: _ONE, 6: _ONE}
"""tensor_type, denotation"""
_TENSOR_TYPE: _Schema = {1: _INT, 2: _ONE}
"""elem_type, shape"""
_SHAPE: _Schema = {1: _MANY}
"""dim"""
_DIMENSION: _Schema = {1: _INT, 2: _ONE, 3: _ONE}
"""dim_value, dim_param, denotation"""


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """(value, position after it)"""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at
        shift += 7
    raise Refused(f"byte {at}", "a broken number", "a protobuf message")


def _fields(data: Buffer, at: int, end: int, schema: _Schema, what: str) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: (number, value, -1) of an integer, (number, begin, end) of anything else."""
    seen: set[int] = set()
    while at < end:
        begin = at
        key = data[at]
        at += 1
        if key >= 0x80:
            key, at = _varint(data, begin, end)
        number, wire = key >> 3, key & 7
        wires, is_repeated = schema.get(number, ((), False))
        if wire not in wires:
            raise Refused(
                f"byte {begin}", f"field {number} of wire type {wire} in a {what}", "fields that an export writes"
            )
        if not is_repeated:
            if number in seen:
                raise Refused(f"byte {begin}", f"field {number} of a {what} twice", "once")
            seen.add(number)
        if wire == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value, -1
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, end)
        else:
            size = 4 if wire == _FIXED32 else 8
        if size > end - at:
            raise Refused(f"byte {begin}", f"field {number} of a {what} with {size} bytes", f"at most {end - at} bytes")
        yield number, at, at + size
        at += size


def _text(data: Buffer, begin: int, end: int) -> str:
    if end - begin > _MAX_NAME:
        raise Refused(f"byte {begin}", f"a name of {end - begin} bytes", f"at most {_MAX_NAME}")
    raw = data[begin:end]
    try:
        text: str = raw.decode()
    except UnicodeDecodeError:
        raise Refused(f"byte {begin}", f"a name that is not UTF-8: {raw!r}", "printable UTF-8") from None
    if not text.isprintable():
        raise Refused(f"byte {begin}", f"the name {text!r}", "printable characters")
    return text


def _integers(data: Buffer, value: int, end: int) -> list[int]:
    """The integers of one occurrence of a repeated field: a single one, or several packed."""
    if end < 0:
        return [value]
    found, at = [], value
    while at < end:
        number, at = _varint(data, at, end)
        found.append(number)
    return found


# ---- what is read of them ---------------------------------------------------------------------------------------


class Known(NamedTuple):
    """What is known of a constant."""

    size: int
    """Elements."""
    values: tuple[float, ...] | None = None
    """The elements, where they are few and can be told."""


@dataclass(slots=True)
class Tensor:
    name: str
    dtype: int
    shape: tuple[int, ...]
    external: dict[str, str]
    known: Known

    @property
    def nbytes(self) -> int:
        return self.known.size * ITEM_BYTES[self.dtype]


class Node(NamedTuple):
    op: str
    """``domain::op_type``, without the domain for standard operators."""
    inputs: list[str]
    outputs: list[str]
    constant: Known | None
    """Of a Constant."""


class Function(NamedTuple):
    name: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]


class Limits(NamedTuple):
    """How many of each a graph may hold; more are not even read."""

    nodes: int
    tensors: int
    values: int
    """Inputs; and outputs."""


class Graph(NamedTuple):
    """What is read of a model."""

    functions: list[Function]
    nodes: list[Node]
    tensors: list[Tensor]
    inputs: list[str]
    outputs: list[str]


def _tensor(data: Buffer, at: int, end: int) -> Tensor:
    name, dtype, location = "", 0, 0
    dims: list[int] = []
    external: dict[str, str] = {}
    raw: tuple[int, int] | None = None
    typed_bytes, integers = 0, list[int]()
    for number, begin, stop in _fields(data, at, end, _TENSOR, "tensor"):
        if number == 1:
            dims += _integers(data, begin, stop)
        elif number == 2:
            dtype = begin
        elif number == 8:
            name = _text(data, begin, stop)
        elif number == 9:
            raw = begin, stop
        elif number == 13:
            key, value = _entry(data, begin, stop)
            if key in external or key not in ("location", "offset", "length"):
                raise Refused(f"tensor `{name}`", f"external_data `{key}`", "location, offset, length, each once")
            external[key] = value
        elif number == 14:
            location = begin
        elif number in (4, 5, 7, 10, 11):
            typed_bytes += 1 if stop < 0 else stop - begin
            numbers = _integers(data, begin, stop) if number in (5, 7, 11) else []
            integers += numbers[:17] if number == 7 and len(integers) <= 16 else []
        elif number == 16:
            _skipped_entry(data, begin, stop)
    where = f"tensor `{name}`"
    if dtype not in ITEM_BYTES:
        raise Refused(where, f"data type {dtype}", f"one of {sorted(ITEM_BYTES)}")
    if len(dims) > 8 or max(dims, default=0) >= 1 << 63 or (size := math.prod(dims)) >= 1 << 60:
        raise Refused(where, f"dimensions {dims[:9]}", "at most 8, none negative, fewer than 2^60 elements")
    if (location, bool(external)) not in ((0, False), (EXTERNAL, True)):
        raise Refused(where, f"data location {location}, external_data {external}", "both inside, or both outside")
    inline = 0 if raw is None else raw[1] - raw[0]
    if external and (inline or typed_bytes):
        raise Refused(where, "data inside and outside the graph", "one of them")
    if not external and raw is not None and (typed_bytes or inline != size * ITEM_BYTES[dtype]):
        raise Refused(where, f"{inline} bytes", f"{size * ITEM_BYTES[dtype]} bytes for its dtype and shape {dims}")
    if not external and raw is None and size > typed_bytes:  # a number takes at least a byte
        raise Refused(where, f"{typed_bytes} bytes of numbers", f"{size} numbers")
    values: tuple[float, ...] | None = None
    if size <= 16 and raw is not None and dtype in _SCALARS:
        values = tuple(item[0] for item in struct.iter_unpack(_SCALARS[dtype], data[raw[0] : raw[1]]))
    elif size <= 16 and len(integers) == size:
        values = tuple(_signed(value) for value in integers)
    return Tensor(name, dtype, tuple(dims), external, Known(size, values))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _entry(data: Buffer, at: int, end: int) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for number, begin, stop in _fields(data, at, end, _ENTRY, "key and value"):
        texts[number] = _text(data, begin, stop)
    return texts[1], texts[2]


def _skipped_entry(data: Buffer, at: int, end: int) -> None:
    """A key and value of the metadata, which are read by nobody here."""
    for _ in _fields(data, at, end, _ENTRY, "key and value"):
        pass


def _attribute(data: Buffer, at: int, end: int) -> Known | None:
    """What is known of its value."""
    known = None
    for number, begin, stop in _fields(data, at, end, _ATTRIBUTE, "attribute"):
        if number in (1, 21):
            _text(data, begin, stop)
            known = Known(1) if number == 21 else known
        elif number == 2:
            known = Known(1, struct.unpack("<f", data[begin:stop]))
        elif number == 3:
            known = Known(1, (_signed(begin),))
        elif number == 5:
            tensor = _tensor(data, begin, stop)
            if tensor.external:
                raise Refused(f"tensor `{tensor.name}`", "an attribute outside the graph", "inside")
            known = tensor.known
        elif number == 8:
            values = (*(known.values or () if known else ()), *map(_signed, _integers(data, begin, stop)))
            known = Known(len(values), values)
        elif number == 7:
            known = Known((known.size if known else 0) + (stop - begin) // 4)
    return known


def _node(data: Buffer, at: int, end: int) -> Node:
    op = domain = ""
    inputs: list[str] = []
    outputs: list[str] = []
    known = None
    for number, begin, stop in _fields(data, at, end, _NODE, "node"):
        if number == 1:
            inputs.append(_text(data, begin, stop))
        elif number == 2:
            outputs.append(_text(data, begin, stop))
        elif number == 4:
            op = _text(data, begin, stop)
        elif number == 5:
            known = _attribute(data, begin, stop) or known
        elif number == 7:
            domain = _text(data, begin, stop)
        elif number == 3:
            _text(data, begin, stop)
        elif number == 9:
            _skipped_entry(data, begin, stop)
    if domain not in ("", "ai.onnx"):
        op = f"{domain}::{op}"
    return Node(op, inputs, outputs, (known or Known(0)) if op == "Constant" else None)


def _opset(data: Buffer, at: int, end: int) -> None:
    for number, begin, stop in _fields(data, at, end, _OPSET, "opset"):
        if number == 1:
            _text(data, begin, stop)


def _function(data: Buffer, at: int, end: int, types: set[bytes]) -> Function:
    name = domain = ""
    inputs: list[str] = []
    outputs: list[str] = []
    nodes: list[Node] = []
    for number, begin, stop in _fields(data, at, end, _FUNCTION, "function"):
        if number == 1:
            name = _text(data, begin, stop)
        elif number == 10:
            domain = _text(data, begin, stop)
        elif number in (4, 5):
            (inputs if number == 4 else outputs).append(_text(data, begin, stop))
        elif number == 6:
            _text(data, begin, stop)
        elif number == 9:
            _opset(data, begin, stop)
        elif number == 12:
            _value_name(data, begin, stop, types)
        elif number == 14:
            _skipped_entry(data, begin, stop)
        elif number == 7:
            nodes.append(_node(data, begin, stop))
            check_count(nodes, 256, f"nodes of the function `{name}`")
        elif number == 11:
            _attribute(data, begin, stop)
    return Function(f"{domain}::{name}", inputs, outputs, nodes)


def check_count(items: Sized, limit: int, what: str) -> None:
    if len(items) > limit:
        raise Refused(what, f"{len(items)}", f"at most {limit} for this config")


def _value_name(data: Buffer, at: int, end: int, types: set[bytes]) -> str:
    name = ""
    for number, begin, stop in _fields(data, at, end, _VALUE, "value"):
        if number == 1:
            name = _text(data, begin, stop)
        elif number == 2 and (raw := bytes(data[begin:stop])) not in types:
            _check_type(raw)
            types.add(raw)
        elif number == 4:
            _skipped_entry(data, begin, stop)
    return name


def _check_type(raw: bytes) -> None:
    """A tensor's dtype and dimensions; what they are is compared with the manifest by whoever runs the graph."""
    for number, begin, stop in _fields(raw, 0, len(raw), _TYPE, "type"):
        for part, first, last in _fields(raw, begin, stop, _TENSOR_TYPE, "tensor type") if number == 1 else ():
            for _, low, high in _fields(raw, first, last, _SHAPE, "shape") if part == 2 else ():
                for kind, left, right in _fields(raw, low, high, _DIMENSION, "dimension"):
                    if kind == 2:
                        _text(raw, left, right)


def read_graph(data: Buffer, limits: Limits) -> Graph:
    """Reads a whole model.

    Raises:
        Refused: see the module.
    """
    graph: tuple[int, int] | None = None
    functions: list[Function] = []
    types: set[bytes] = set()  # hundreds of values have the same type
    for number, begin, stop in _fields(data, 0, len(data), _MODEL, "model"):
        if number == 7:
            graph = begin, stop
        elif number == 25:
            functions.append(_function(data, begin, stop, types))
            check_count(functions, 16, "functions")
        elif number == 8:
            _opset(data, begin, stop)
        elif number == 14:
            _skipped_entry(data, begin, stop)
    if graph is None:
        raise Refused("the model", "no graph", "one")
    found = Graph(functions, [], [], [], [])
    for number, begin, stop in _fields(data, *graph, _GRAPH, "graph"):
        if number == 1:
            found.nodes.append(_node(data, begin, stop))
            check_count(found.nodes, limits.nodes, "nodes")
        elif number == 5:
            found.tensors.append(_tensor(data, begin, stop))
            check_count(found.tensors, limits.tensors, "initializers")
        elif number in (11, 12):
            names = found.inputs if number == 11 else found.outputs
            names.append(_value_name(data, begin, stop, types))
            check_count(names, limits.values, "inputs or outputs")
        elif number == 13:
            _value_name(data, begin, stop, types)
        elif number == 16:
            _skipped_entry(data, begin, stop)
    return found
