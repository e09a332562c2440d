"""One check of a graph's bytes, before TensorRT, onnxruntime or our own evaluator is given the file.

Role: called by whatever opens a graph of a bundle: an onnxruntime session, ``build``, ``refit``, ``quantize``, ``validate``.
Those libraries trust a graph. TensorRT copies a weight from the address that an offset leads to, whether or not that
address is inside the file, and follows a function that calls itself until the stack ends; both are a segmentation fault, or
an engine with this process's memory in it. The manifest's hashes do not help: whoever changes a graph can change them too.

The check needs neither ``onnx`` nor onnxruntime. It reads the bytes strictly (:mod:`llama_export.graph.onnx_bytes`), skips the
weights of a graph that holds them, and takes about 30 ms for a model of 80 layers. A graph passes if all of this holds:

* **File**: a regular file, no larger than the config implies (:func:`_size_limit`).
* **Message**: well formed, and made only of fields that an export writes. Each field that may stand once stands once, so
  that no two readers understand the file differently. No subgraphs, sparse tensors, sequences of tensors or strings as
  tensors. Names are at most 1024 bytes of printable UTF-8: they reach the terminal in other libraries' messages.
* **Counts**: nodes, initializers, functions, inputs and outputs are no more than the config's layers imply, and the names of
  inputs and outputs are those of :mod:`llama_export.graph.io`.
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
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_export._system.files import is_plain_name, leads_out, open_regular
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.manifest import variant_names
from llama_export.config.decoder import count_parameters
from llama_export.config.settings import VARIANTS
from llama_export.errors import ArtifactMismatchError
from llama_export.graph.io import INTERFACES
from llama_export.graph.onnx_bytes import Buffer, Function, Known, Limits, Node, Refused, Tensor, read_graph
from llama_export.ops.table import DOMAIN

_SMALL = 1 << 20
"""Elements that a constant may grow to."""
_FOLDED = 8
"""Elements of all constant results per element of the initializers: an export makes two (a cast and a transposition)."""
_READ_AT_ONCE = 1 << 26
"""Bytes; a larger graph holds its weights, and is mapped."""
_STORED = {1: "float32", 10: "float16", 16: "bfloat16"}
_PACKED_DTYPES = (1, 2)
"""Of a quantised variant: scales are float32, all else is uint8."""


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
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`; whether its hashes were compared does not matter.
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
                raise Refused("the file", f"{size} bytes", f"1 to {limit} bytes for this config")
            if size <= _READ_AT_ONCE:
                return _check(bundle, path, stream.read(size), by_header)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:  # the weights are in it
                return _check(bundle, path, mapped, by_header)
    except Refused as err:
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


def _size_limit(bundle: Bundle) -> int:
    """Bytes: 22 nodes a layer take about 10 kB; weights inside the graph are at most float32, and below 2 GiB."""
    limit = (4 << 20) + (bundle.config.num_hidden_layers << 16)
    if bundle.is_embedded:
        limit += 4 * count_parameters(bundle.config, bundle.task)  # type: ignore[arg-type]
    return min(limit, (1 << 31) - 1)


# ---- the check --------------------------------------------------------------------------------------------------


def _check(bundle: Bundle, path: Path, data: Buffer, by_header: bool) -> list[ExternalTensor]:
    layers = bundle.config.num_hidden_layers
    graph = read_graph(data, Limits(nodes=256 + 64 * layers, tensors=64 + 32 * layers, values=16 + 2 * layers))
    functions = _checked_functions(graph.functions)
    interface = INTERFACES[bundle.task]
    for kind, names, expected in (
        ("inputs", graph.inputs, interface.input_names(bundle.config)),
        ("outputs", graph.outputs, interface.output_names(bundle.config)),
    ):
        if sorted(names) != sorted(expected):
            wrong = ", ".join(sorted({*names} ^ {*expected})[:4]) or "one twice"
            raise Refused(kind, f"{wrong}, missing or unexpected", f"those of {bundle.task}")
    if len({tensor.name for tensor in graph.tensors}) < len(graph.tensors):
        raise Refused("initializers", "one name twice", "each name once")
    _check_memory(graph.nodes, {tensor.name: tensor.known for tensor in graph.tensors}, functions)
    return _checked_places(bundle, path, graph.tensors, by_header)


def _checked_functions(functions: Sequence[Function]) -> dict[str, Function]:
    """The functions by name: ours alone, and none calls another."""
    found: dict[str, Function] = {}
    for function in functions:
        where = f"function `{function.name}`"
        if not function.name.startswith(f"{DOMAIN}::"):
            raise Refused(where, "another domain", f"domain `{DOMAIN}`")
        if function.name in found:
            raise Refused(where, "twice", "once")
        for node in function.nodes:
            if node.op.startswith(f"{DOMAIN}::"):
                raise Refused(where, f"a call of `{node.op}`", "operators only: calls of functions may never end")
        found[function.name] = function
    return found


def _checked_places(bundle: Bundle, path: Path, tensors: Sequence[Tensor], by_header: bool) -> list[ExternalTensor]:
    """Every tensor outside the graph lies within its file, and where the header of a safetensors file says."""
    weights = {entry.file for entry in bundle.manifest.weights}
    packed = {data for graph, data in map(variant_names, VARIANTS) if graph == path.name}
    sizes: dict[str, int] = {}
    found: list[ExternalTensor] = []
    for tensor in tensors:
        place, where = tensor.external, f"tensor `{tensor.name}`"
        if not place:
            continue
        if place.keys() != {"location", "offset", "length"}:
            raise Refused(where, f"external_data {place}", "location, offset and length")
        file, offset, length = place["location"], _decimal(place["offset"], where), _decimal(place["length"], where)
        if not is_plain_name(file) or (by_header and file not in weights | packed):
            raise Refused(where, f"the file `{file}`", ", ".join(sorted(weights | packed)) or "no file")
        if file in packed and tensor.dtype not in _PACKED_DTYPES:
            raise Refused(where, f"data type {tensor.dtype} in `{file}`", "uint8 or float32")
        if file not in sizes:
            sizes[file] = _size_of(bundle.folder / file, where)
        if offset + length > sizes[file]:
            raise Refused(where, f"bytes {offset} to {offset + length}", f"within the {sizes[file]} bytes of `{file}`")
        if length != tensor.nbytes:
            expected = f"{tensor.nbytes} bytes for its dtype and shape {list(tensor.shape)}"
            raise Refused(where, f"{length} bytes", expected)
        found.append(ExternalTensor(tensor.name, tensor.dtype, tensor.shape, file, offset, length))
        if not by_header or file in packed:
            continue
        entry = bundle.stored.get(tensor.name)
        dtype = _STORED.get(tensor.dtype, f"data type {tensor.dtype}")
        if entry is None or (file, dtype, tensor.shape, offset) != (entry.file, entry.dtype, entry.shape, entry.offset):
            stored = "no such tensor" if entry is None else f"{entry.dtype} {list(entry.shape)} at byte {entry.offset}"
            raise Refused(
                where, f"{dtype} {list(tensor.shape)} at byte {offset}", f"as in the header of `{file}`: {stored}"
            )
    return found


def _size_of(path: Path, where: str) -> int:
    if (real := leads_out(path)) is not None:
        raise Refused(where, f"a link to `{real}`", "a file in the bundle")
    with open_regular(path) as stream:
        return os.fstat(stream.fileno()).st_size


def _decimal(text: str, where: str) -> int:
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise Refused(where, f"an offset or length of {text!r}", "a decimal number of at most 18 digits")
    return int(text)


# ---- memory before any input is seen ----------------------------------------------------------------------------

_RESHAPED = ("Cast", "CastLike", "Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten")
"""The same elements in another shape or dtype."""
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Reciprocal", "Sqrt", "Sin", "Cos")
_GROWING = ("ConstantOfShape", "Expand", "Tile", "Pad", "Resize", "Upsample", "OneHot", "Range")
"""The size of the result is in the values of the inputs."""


def _check_memory(nodes: Sequence[Node], known: dict[str, Known], functions: Mapping[str, Function]) -> None:
    limit = _FOLDED * sum(item.size for item in known.values()) + 16 * _SMALL
    bodies: dict[tuple[str, tuple[Known | None, ...]], tuple[list[Known | None], int]] = {}

    def visit(nodes: Sequence[Node], known: dict[str, Known]) -> int:
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
                raise Refused(f"a {node.op}", f"{made} elements made of constants", f"at most {limit}")
        return made

    def call(node: Node, inputs: list[Known | None]) -> tuple[list[Known | None], int]:
        function = functions.get(node.op)
        if function is None:
            raise Refused(f"a node `{node.op}`", "no such function", ", ".join(functions) or "none")
        key = node.op, tuple(inputs)
        if key not in bodies:
            inner = {name: item for name, item in zip(function.inputs, inputs, strict=False) if item is not None}
            elements = visit(function.nodes, inner)
            bodies[key] = [inner.get(name) for name in function.outputs], elements
        return bodies[key]

    visit(nodes, known)


def _constant_result(node: Node, inputs: Sequence[Known]) -> Known:
    """The result of an operator all of whose inputs are constant."""
    sizes = [item.size for item in inputs]
    if not inputs:
        raise Refused(f"a {node.op}", "no inputs", "an operator that computes something from an input")
    if node.op in _RESHAPED:
        return inputs[0]
    if node.op in _ELEMENTWISE:
        size = math.prod(sizes)  # an upper limit of what broadcasting makes
        return _small(node, Known(size), at_least=max(sizes) if min(sizes) <= 1 or len(sizes) == 1 else 0)
    if node.op == "Concat":
        values = [item.values for item in inputs]
        joined = None if None in values or sum(sizes) > 16 else tuple(v for item in values for v in item or ())
        return _small(node, Known(sum(sizes), joined))
    if node.op == "Range" and all(item.values and len(item.values) == 1 for item in inputs) and len(inputs) == 3:
        start, stop, step = ((item.values or (0,))[0] for item in inputs)
        if step and all(map(math.isfinite, (start, stop, step))):
            return _small(node, Known(max(0, math.ceil((stop - start) / step))))
    if node.op == "Shape":
        return Known(8)
    raise Refused(
        f"a {node.op}", "an operator on constants alone", ", ".join((*_RESHAPED, *_ELEMENTWISE, "Concat, Range, Shape"))
    )


def _small(node: Node, result: Known, at_least: int = 0) -> Known:
    if result.size > max(_SMALL, at_least):
        raise Refused(f"a {node.op}", f"{result.size} elements made of constants", f"at most {_SMALL}")
    return result


def _check_growth(node: Node, inputs: Sequence[Known | None]) -> None:
    """An operator that grows what it reads to a constant shape."""
    if node.op not in _GROWING or node.op == "Range":
        return
    for item in inputs:
        size = math.prod(max(1, abs(value)) for value in item.values) if item is not None and item.values else 1
        if size > _SMALL or (item is not None and item.values is None):
            raise Refused(f"a {node.op}", "a large or unknown constant as its size", f"at most {_SMALL} elements")
