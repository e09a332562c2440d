"""One check of a graph's bytes, before TensorRT, onnxruntime or our own evaluator is given the file.

Role: called by whatever opens a graph of a bundle: an onnxruntime session, ``build``, ``refit``, ``quantize``, ``validate``.
Those libraries trust a graph. TensorRT copies a weight from the address that an offset leads to, whether or not that
address is inside the file, and follows a function that calls itself until the stack ends; both are a segmentation fault, or
an engine with this process's memory in it. The manifest's hashes do not help: whoever changes a graph can change them too.

The check needs neither ``onnx`` nor onnxruntime. It reads the protobuf message field by field, skips the weights of a graph
that holds them, and takes about 20 ms for a model of 32 layers. A graph passes if all of this holds:

* **File**: a regular file, no larger than the config implies (:func:`_size_limit`).
* **Message**: well formed, and made only of fields that an export writes. Each field that may stand once stands once, so
  that no two readers understand the file differently. No subgraphs, sparse tensors, sequences of tensors or strings as
  tensors. Names are at most 1024 bytes of printable UTF-8: they reach the terminal in other libraries' messages.
* **Counts**: nodes, initializers, functions, inputs and outputs are no more than the config's layers imply, and the names of
  inputs and outputs are those of :mod:`llama_export.graph_io`.
* **Tensors in the graph**: the dtype is a plain number type, the dimensions are not negative, and the data is as long as
  both imply.
* **Tensors outside the graph**: only initializers. ``location`` is the plain name of a weight file of the manifest, or of the
  data file of the quantised variant that the graph is. ``offset`` and ``length`` are decimal numbers, lie within the file, and
  the length is what dtype and shape imply. In a safetensors file, name, dtype, shape, offset and length are exactly those
  of the file's header.
* **Functions**: all in our own domain, each name once, and no function calls another one: there is no recursion and no
  exponential expansion.
* **Memory before any input is seen**: a library computes at load what follows from constants alone. Such nodes may only be
  operators whose result is no larger than their inputs, or a few with a result that can be computed here and is small
  (:func:`_constant_result`); in sum they may make 8 times the elements of the initializers. An operator that grows its input
  to a constant shape may make at most :data:`_SMALL` elements.

What is not checked: whether the graph computes Llama. That is what ``validate`` is for. And whoever can write to the folder
while a graph is open can still change the file between this check and the library's own reading.

Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_export._files import is_plain_name, leads_out, open_regular
from llama_export.bundle import Bundle, variant_names
from llama_export.checkpoint import TensorEntry, read_safetensors_header
from llama_export.config import VARIANTS, count_parameters
from llama_export.errors import ArtifactMismatchError
from llama_export.graph_io import INTERFACES

DOMAIN = "llama_export"
"""Domain of the custom ops and their functions; must equal ``ops.DOMAIN``."""
_SMALL = 1 << 20
"""Elements that a constant may grow to."""
_FOLDED = 8
"""Elements of all constant results per element of the initializers: an export makes two (a cast and a transposition)."""
_MAX_NAME = 1024
_EXTERNAL = 1
"""``TensorProto.DataLocation.EXTERNAL``"""
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""``TensorProto.DataType`` -> bytes of an element."""
_STORED = {1: "float32", 10: "float16", 16: "bfloat16"}
_PACKED_DTYPES = (1, 2)
"""Of a quantised variant: scales are float32, all else is uint8."""
_SCALARS = {1: "<f", 6: "<i", 7: "<q", 11: "<d"}
"""``TensorProto.DataType`` -> format of an element whose value matters here."""

Buffer = Any
"""bytes, or a memory map: both give an integer for an index and bytes for a slice."""


class ExternalTensor(NamedTuple):
    """An initializer whose bytes are outside the graph, found to be right."""

    name: str
    dtype: int
    """``onnx.TensorProto.DataType``"""
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def check_graph(bundle: Bundle, path: Path, *, by_header: bool = True) -> list[ExternalTensor]:
    """Refuses a graph that no export of this bundle's config could have made.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`; whether its hashes were compared does not matter.
        path: of one of its graphs.
        by_header: every weight is the tensor of the same name in a file of the manifest. ``validate`` leaves this out: it
            reads weights itself, within their files, and finds a wrong one by its numbers.

    Returns:
        Where the weights are that the graph does not hold.

    Raises:
        ArtifactMismatchError: see the module. CheckpointError: the header of a weight file is damaged.
    """
    try:
        with open_regular(path) as stream:
            size, limit = os.fstat(stream.fileno()).st_size, _size_limit(bundle)
            if not 0 < size <= limit:
                raise _Refused("the file", f"{size} bytes", f"1 to {limit} bytes for this config")
            if size <= 1 << 26:
                return _check(bundle, path, stream.read(size), by_header)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:  # the weights are in it
                return _check(bundle, path, mapped, by_header)
    except _Refused as err:
        where, got, expected = err.args
        raise ArtifactMismatchError(
            f"`{path.name}` is not a graph that an export makes",
            details={"file": path, "where": where, "got": got, "expected": expected},
            hint="export again; do not use bundles from a source you do not trust",
        ) from err
    except OSError as err:
        raise ArtifactMismatchError(
            f"`{path.name}` cannot be read",
            details={"file": path, "reason": err.strerror or err},
            hint="check its permissions, or export again",
        ) from err


class _Refused(Exception):
    """(where, got, expected)"""


def _size_limit(bundle: Bundle) -> int:
    """Bytes: 22 nodes a layer take about 10 kB; weights inside the graph are at most float32, and below 2 GiB."""
    limit = (4 << 20) + (bundle.config.num_hidden_layers << 16)
    if bundle.is_embedded:
        limit += 4 * count_parameters(bundle.config, bundle.task)  # type: ignore[arg-type]
    return min(limit, (1 << 31) - 1)


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
    raise _Refused(f"byte {at}", "a broken number", "a protobuf message")


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
            raise _Refused(
                f"byte {begin}", f"field {number} of wire type {wire} in a {what}", "fields that an export writes"
            )
        if not is_repeated:
            if number in seen:
                raise _Refused(f"byte {begin}", f"field {number} of a {what} twice", "once")
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
            raise _Refused(
                f"byte {begin}", f"field {number} of a {what} with {size} bytes", f"at most {end - at} bytes"
            )
        yield number, at, at + size
        at += size


def _text(data: Buffer, begin: int, end: int) -> str:
    if end - begin > _MAX_NAME:
        raise _Refused(f"byte {begin}", f"a name of {end - begin} bytes", f"at most {_MAX_NAME}")
    raw = data[begin:end]
    try:
        text: str = raw.decode()
    except UnicodeDecodeError:
        raise _Refused(f"byte {begin}", f"a name that is not UTF-8: {raw!r}", "printable UTF-8") from None
    if not text.isprintable():
        raise _Refused(f"byte {begin}", f"the name {text!r}", "printable characters")
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


class _Known(NamedTuple):
    """What is known of a constant."""

    size: int
    """Elements."""
    values: tuple[float, ...] | None = None
    """The elements, where they are few and can be told."""


@dataclass(slots=True)
class _Tensor:
    name: str
    dtype: int
    shape: tuple[int, ...]
    external: dict[str, str]
    known: _Known

    @property
    def nbytes(self) -> int:
        return self.known.size * _ITEM_BYTES[self.dtype]


class _Node(NamedTuple):
    op: str
    """``domain::op_type``, without the domain for standard operators."""
    inputs: list[str]
    outputs: list[str]
    constant: _Known | None
    """Of a Constant."""


class _Function(NamedTuple):
    name: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[_Node]


def _tensor(data: Buffer, at: int, end: int) -> _Tensor:
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
                raise _Refused(f"tensor `{name}`", f"external_data `{key}`", "location, offset, length, each once")
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
    if dtype not in _ITEM_BYTES:
        raise _Refused(where, f"data type {dtype}", f"one of {sorted(_ITEM_BYTES)}")
    if len(dims) > 8 or max(dims, default=0) >= 1 << 63 or (size := math.prod(dims)) >= 1 << 60:
        raise _Refused(where, f"dimensions {dims[:9]}", "at most 8, none negative, fewer than 2^60 elements")
    if (location, bool(external)) not in ((0, False), (_EXTERNAL, True)):
        raise _Refused(where, f"data location {location}, external_data {external}", "both inside, or both outside")
    inline = 0 if raw is None else raw[1] - raw[0]
    if external and (inline or typed_bytes):
        raise _Refused(where, "data inside and outside the graph", "one of them")
    if not external and raw is not None and (typed_bytes or inline != size * _ITEM_BYTES[dtype]):
        raise _Refused(where, f"{inline} bytes", f"{size * _ITEM_BYTES[dtype]} bytes for its dtype and shape {dims}")
    if not external and raw is None and size > typed_bytes:  # a number takes at least a byte
        raise _Refused(where, f"{typed_bytes} bytes of numbers", f"{size} numbers")
    values: tuple[float, ...] | None = None
    if size <= 16 and raw is not None and dtype in _SCALARS:
        values = tuple(item[0] for item in struct.iter_unpack(_SCALARS[dtype], data[raw[0] : raw[1]]))
    elif size <= 16 and len(integers) == size:
        values = tuple(_signed(value) for value in integers)
    return _Tensor(name, dtype, tuple(dims), external, _Known(size, values))


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


def _attribute(data: Buffer, at: int, end: int) -> _Known | None:
    """What is known of its value."""
    known = None
    for number, begin, stop in _fields(data, at, end, _ATTRIBUTE, "attribute"):
        if number in (1, 21):
            _text(data, begin, stop)
            known = _Known(1) if number == 21 else known
        elif number == 2:
            known = _Known(1, struct.unpack("<f", data[begin:stop]))
        elif number == 3:
            known = _Known(1, (_signed(begin),))
        elif number == 5:
            tensor = _tensor(data, begin, stop)
            if tensor.external:
                raise _Refused(f"tensor `{tensor.name}`", "an attribute outside the graph", "inside")
            known = tensor.known
        elif number == 8:
            values = (*(known.values or () if known else ()), *map(_signed, _integers(data, begin, stop)))
            known = _Known(len(values), values)
        elif number == 7:
            known = _Known((known.size if known else 0) + (stop - begin) // 4)
    return known


def _node(data: Buffer, at: int, end: int) -> _Node:
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
    return _Node(op, inputs, outputs, (known or _Known(0)) if op == "Constant" else None)


def _opset(data: Buffer, at: int, end: int) -> None:
    for number, begin, stop in _fields(data, at, end, _OPSET, "opset"):
        if number == 1:
            _text(data, begin, stop)


def _function(data: Buffer, at: int, end: int, types: set[bytes]) -> _Function:
    name = domain = ""
    inputs: list[str] = []
    outputs: list[str] = []
    nodes: list[_Node] = []
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
        elif number == 11:
            _attribute(data, begin, stop)
    where = f"function `{name}`"
    if domain != DOMAIN:
        raise _Refused(where, f"domain `{domain}`", f"domain `{DOMAIN}`")
    _count(nodes, 256, f"nodes of {where}")
    for node in nodes:
        if node.op.startswith(f"{DOMAIN}::"):
            raise _Refused(
                where, f"a call of `{node.op}`", "operators only: a function that calls a function may not end"
            )
    return _Function(f"{domain}::{name}", inputs, outputs, nodes)


def _count(items: Sized, limit: int, what: str) -> None:
    if len(items) > limit:
        raise _Refused(what, f"{len(items)}", f"at most {limit} for this config")


# ---- the check --------------------------------------------------------------------------------------------------


def _check(bundle: Bundle, path: Path, data: Buffer, by_header: bool) -> list[ExternalTensor]:
    graph: tuple[int, int] | None = None
    functions: dict[str, _Function] = {}
    types: set[bytes] = set()  # hundreds of values have the same type
    for number, begin, stop in _fields(data, 0, len(data), _MODEL, "model"):
        if number == 7:
            graph = begin, stop
        elif number == 25:
            function = _function(data, begin, stop, types)
            if function.name in functions:
                raise _Refused(f"function `{function.name}`", "twice", "once")
            functions[function.name] = function
            _count(functions, 16, "functions")
        elif number == 8:
            _opset(data, begin, stop)
        elif number == 14:
            _skipped_entry(data, begin, stop)
    if graph is None:
        raise _Refused("the model", "no graph", "one")
    layers = bundle.config.num_hidden_layers
    nodes: list[_Node] = []
    tensors: list[_Tensor] = []
    names: dict[int, list[str]] = {11: [], 12: []}
    for number, begin, stop in _fields(data, *graph, _GRAPH, "graph"):
        if number == 1:
            nodes.append(_node(data, begin, stop))
            _count(nodes, 256 + 64 * layers, "nodes")
        elif number == 5:
            tensors.append(_tensor(data, begin, stop))
            _count(tensors, 64 + 32 * layers, "initializers")
        elif number in names:
            names[number].append(_value_name(data, begin, stop, types))
            _count(names[number], 16 + 2 * layers, "inputs or outputs")
        elif number == 13:
            _value_name(data, begin, stop, types)
        elif number == 16:
            _skipped_entry(data, begin, stop)
    interface = INTERFACES[bundle.task]
    expected = {11: interface.input_names(bundle.config), 12: interface.output_names(bundle.config)}
    for number, kind in ((11, "inputs"), (12, "outputs")):
        if sorted(names[number]) != sorted(expected[number]):
            wrong = sorted({*names[number]} ^ {*expected[number]})
            raise _Refused(
                kind, f"{', '.join(wrong[:4]) or 'one twice'}, missing or unexpected", f"those of {bundle.task}"
            )
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _Refused("initializers", "one name twice", "each name once")
    _check_memory(nodes, {tensor.name: tensor.known for tensor in tensors}, functions)
    return _checked_places(bundle, path, tensors, by_header)


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


def _checked_places(bundle: Bundle, path: Path, tensors: Sequence[_Tensor], by_header: bool) -> list[ExternalTensor]:
    """Every tensor outside the graph lies within its file, and where the header of a safetensors file says."""
    weights = {str(entry["file"]) for entry in bundle.manifest["weights"]}
    packed = {data for graph, data in map(variant_names, VARIANTS) if graph == path.name}
    headers: dict[str, dict[str, TensorEntry]] = {}
    sizes: dict[str, int] = {}
    found: list[ExternalTensor] = []
    for tensor in tensors:
        place, where = tensor.external, f"tensor `{tensor.name}`"
        if not place:
            continue
        if place.keys() != {"location", "offset", "length"}:
            raise _Refused(where, f"external_data {place}", "location, offset and length")
        file, offset, length = place["location"], _decimal(place["offset"], where), _decimal(place["length"], where)
        if not is_plain_name(file) or (by_header and file not in weights | packed):
            raise _Refused(where, f"the file `{file}`", ", ".join(sorted(weights | packed)) or "no file")
        if file in packed and tensor.dtype not in _PACKED_DTYPES:
            raise _Refused(where, f"data type {tensor.dtype} in `{file}`", "uint8 or float32")
        if file not in sizes:
            sizes[file] = _size_of(bundle.folder / file, where)
        if offset + length > sizes[file]:
            raise _Refused(where, f"bytes {offset} to {offset + length}", f"within the {sizes[file]} bytes of `{file}`")
        if length != tensor.nbytes:
            expected = f"{tensor.nbytes} bytes for its dtype and shape {list(tensor.shape)}"
            raise _Refused(where, f"{length} bytes", expected)
        found.append(ExternalTensor(tensor.name, tensor.dtype, tensor.shape, file, offset, length))
        if not by_header or file in packed:
            continue
        if file not in headers:
            headers[file] = {entry.name: entry for entry in read_safetensors_header(bundle.folder / file)[1]}
        entry = headers[file].get(tensor.name)
        dtype = _STORED.get(tensor.dtype, f"data type {tensor.dtype}")
        if entry is None or (dtype, tensor.shape, offset) != (entry.dtype, entry.shape, entry.offset):
            stored = "no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)} at byte {entry.offset}"
            raise _Refused(
                where, f"{dtype} {list(tensor.shape)} at byte {offset}", f"as in the header of `{file}`: {stored}"
            )
    return found


def _size_of(path: Path, where: str) -> int:
    if (real := leads_out(path)) is not None:
        raise _Refused(where, f"a link to `{real}`", "a file in the bundle")
    with open_regular(path) as stream:
        return os.fstat(stream.fileno()).st_size


def _decimal(text: str, where: str) -> int:
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise _Refused(where, f"an offset or length of {text!r}", "a decimal number of at most 18 digits")
    return int(text)


# ---- memory before any input is seen ----------------------------------------------------------------------------

_RESHAPED = ("Cast", "CastLike", "Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten")
"""The same elements in another shape or dtype."""
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Reciprocal", "Sqrt", "Sin", "Cos")
_GROWING = ("ConstantOfShape", "Expand", "Tile", "Pad", "Resize", "Upsample", "OneHot", "Range")
"""The size of the result is in the values of the inputs."""


def _check_memory(nodes: Sequence[_Node], known: dict[str, _Known], functions: Mapping[str, _Function]) -> None:
    limit = _FOLDED * sum(item.size for item in known.values()) + 16 * _SMALL
    bodies: dict[tuple[str, tuple[_Known | None, ...]], tuple[list[_Known | None], int]] = {}

    def visit(nodes: Sequence[_Node], known: dict[str, _Known]) -> int:
        """Enters the results that are constant into ``known``; returns the elements of all of them."""
        made = 0
        for node in nodes:
            inputs = [known.get(name) if name else None for name in node.inputs]
            is_constant = all(item is not None for item, name in zip(inputs, node.inputs, strict=True) if name)
            if node.op.startswith(f"{DOMAIN}::"):
                results, elements = call(node, inputs)
                known |= {name: item for name, item in zip(node.outputs, results, strict=False) if item is not None}
            elif node.constant is not None:
                known |= dict.fromkeys(node.outputs, node.constant)
                elements = node.constant.size
            elif is_constant:
                result = _constant_result(node, [item for item in inputs if item is not None])
                known |= dict.fromkeys(node.outputs, result)
                elements = result.size * len(node.outputs)
            else:
                _check_growth(node, inputs)
                continue
            made += elements
            if made > limit:
                raise _Refused(f"a {node.op}", f"{made} elements made of constants", f"at most {limit}")
        return made

    def call(node: _Node, inputs: list[_Known | None]) -> tuple[list[_Known | None], int]:
        function = functions.get(node.op)
        if function is None:
            raise _Refused(f"a node `{node.op}`", "no such function", ", ".join(functions) or "none")
        key = node.op, tuple(inputs)
        if key not in bodies:
            inner = {name: item for name, item in zip(function.inputs, inputs, strict=False) if item is not None}
            elements = visit(function.nodes, inner)
            bodies[key] = [inner.get(name) for name in function.outputs], elements
        return bodies[key]

    visit(nodes, known)


def _constant_result(node: _Node, inputs: Sequence[_Known]) -> _Known:
    """The result of an operator all of whose inputs are constant."""
    sizes = [item.size for item in inputs]
    if not inputs:
        raise _Refused(f"a {node.op}", "no inputs", "an operator that computes something from an input")
    if node.op in _RESHAPED:
        return inputs[0]
    if node.op in _ELEMENTWISE:
        size = math.prod(sizes)  # an upper limit of what broadcasting makes
        return _small(node, _Known(size), at_least=max(sizes) if min(sizes) <= 1 or len(sizes) == 1 else 0)
    if node.op == "Concat":
        values = [item.values for item in inputs]
        joined = None if None in values or sum(sizes) > 16 else tuple(v for item in values for v in item or ())
        return _small(node, _Known(sum(sizes), joined))
    if node.op == "Range" and all(item.values and len(item.values) == 1 for item in inputs) and len(inputs) == 3:
        start, stop, step = ((item.values or (0,))[0] for item in inputs)
        if step and all(map(math.isfinite, (start, stop, step))):
            return _small(node, _Known(max(0, math.ceil((stop - start) / step))))
    if node.op == "Shape":
        return _Known(8)
    raise _Refused(
        f"a {node.op}", "an operator on constants alone", ", ".join((*_RESHAPED, *_ELEMENTWISE, "Concat, Range, Shape"))
    )


def _small(node: _Node, result: _Known, at_least: int = 0) -> _Known:
    if result.size > max(_SMALL, at_least):
        raise _Refused(f"a {node.op}", f"{result.size} elements made of constants", f"at most {_SMALL}")
    return result


def _check_growth(node: _Node, inputs: Sequence[_Known | None]) -> None:
    """An operator that grows what it reads to a constant shape."""
    if node.op not in _GROWING or node.op == "Range":
        return
    for item in inputs:
        size = math.prod(max(1, abs(value)) for value in item.values) if item is not None and item.values else 1
        if size > _SMALL or (item is not None and item.values is None):
            raise _Refused(f"a {node.op}", "a large or unknown constant as its size", f"at most {_SMALL} elements")
