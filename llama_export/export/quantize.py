"""Weight-only quantisation for onnxruntime on the CPU: a variant of a bundle whose matrices have 4 or 8 bits a weight.

Role: ``llama-export quantize``. From ``model.onnxruntime.onnx`` comes ``model.onnxruntime.int4.onnx`` (or ``int8``): the same
graph with every matrix of the decoder layers and the output projection as ``com.microsoft::MatMulNBits``, over one new file
of packed weights, ``model.onnxruntime.int4.data``. Norms, biases and the embedding stay references into the checkpoint's own
files, which are read and never written; a tied output projection is quantised from the embedding.

Projections that read the same tensor (query, key, value; gate, up) become one product and a ``Split``: one pass of the
kernel over more rows is faster than three over few.

Shapes: N rows (outputs) of a matrix, K columns (inputs), B block size, J = ceil(K / B) blocks of a row.

===========  =======  =====================  =================================================================================
packed       uint8    [N, J, B * bits / 8]   the integer u of each weight; of 4 bits two to a byte, the first one low
scales       float32  [N, J]                 a weight is (u - zero) * scale
zeros        uint8    [N, ceil(J / 2)]       of int4: the integer that stands for 0, two to a byte; of int8 it is always 128
===========  =======  =====================  =================================================================================

A row's last block is filled up with zeros. Every tensor of the data file begins at a multiple of 4096 bytes, so that it can
be mapped. Weights are read, quantised and written some rows at a time: memory does not grow with the model (but where the
graph holds its weights itself, below 2 GiB, it is read whole).

Numerics: all arithmetic is float32, element by element in the order that stands here, and sums over a block are made by
halves (the first half of the block added to the second, until one number is left), so that another implementation gives the
same bits; :mod:`llama_export.parity.stages.quantized` has one. ``round`` takes ties to even.

* int8: scale = m / 127 with m the largest magnitude of the block; u - 128 = round(w * (127 / m)).
* int4: let high and low be the block's largest and smallest value, or 0 if that is larger or smaller. For every c of
  :data:`CANDIDATES`, with r = c / (high - low): zero = round(-low * r), clipped to 0..15, and q = round(w * r), clipped to
  -zero..15 - zero. That candidate is taken, the first of equals, whose rounded block points most in the direction of the
  block: the largest (sum w q) (sum w q) / (sum q q). u is q + zero; scale is sum w q / sum q q, the least squares'.
* A block whose m, or high - low, is below 2^-100 becomes zeros.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits; a search over
scales with the scale of least squares is llama.cpp's idea, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
(make_qx_quants).
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export._system.content import sample_sha256, sha256_of_file
from llama_export._system.files import open_regular
from llama_export._system.process import peak_rss_bytes
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.destination import commit_variant, staged_variant
from llama_export.bundle.estimate import free_disk
from llama_export.bundle.graph_check import check_graph
from llama_export.bundle.manifest import QuantizedRecord, variant_names
from llama_export.bundle.placement import Progress
from llama_export.config.decoder import linear_groups
from llama_export.config.llama import LlamaConfig
from llama_export.errors import CheckpointError, ConfigError, ExportError, MissingDependencyError, ToolchainError
from llama_export.export.rounding import SCHEMES, Float32Array, Scheme, UInt8Array, quantize_rows

try:
    import onnx
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "onnx", "export") from err

DOMAIN = "com.microsoft"
_ALIGNMENT = 4096
_ROWS_BYTES = 4 << 20
"""Read at a time by a thread, as float32."""
_SECONDS = {"int4": 12.0, "int8": 5.0}
"""Wall time for 10^9 weights on two cores: docs/quantization.md."""
_REPORT = "export again; if that does not help, report it with the output of `llama-export env`"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What was made; the keys of ``quantize --json``."""

    bundle: str
    type: str
    bits: int
    block_size: int
    bytes: int
    """Of the data file and the graph."""
    seconds: float
    """Wall time, imports excluded."""
    peak_rss_bytes: int
    """Peak resident memory of the whole process so far."""


def quantize_bundle(
    bundle: Bundle,
    kind: str,
    *,
    scheme: Scheme | None = None,
    force: bool = False,
    ignore_estimate: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda name, done, total: None,
) -> QuantizeResult:
    """Makes a quantised variant in a bundle's folder, and enters it into the manifest: both together, or nothing.

    Args:
        bundle: of a causal LM; to replace a variant that is damaged, open it with ``replacing``.
        kind: ``int4`` or ``int8``.
        scheme: another one than :data:`SCHEMES` has, of as many bits; for measurements.
        force: replace the variant.
        ignore_estimate: begin although the disk is said to be too small.
        log: receives one line before and one after.
        progress: receives the writing of the data file.

    Raises:
        ArtifactMismatchError: no export makes such a graph: see :mod:`llama_export.bundle.graph_check`.
        ConfigError: no such type, the variant exists and ``force`` is off, or the task is not causal-lm.
        ExportError: the graph is not as the export writes it, or the folder cannot be written to.
        CheckpointError: a weight is NaN or infinite, or a weight file became shorter.
        ToolchainError: the disk is too small.
    """
    start = time.perf_counter()
    scheme = scheme or _scheme(kind)
    _check_request(bundle, kind, force)
    check_graph(bundle, bundle.onnxruntime_path)
    source_bytes = bundle.onnxruntime_path.read_bytes()
    source = onnx.load_model_from_string(source_bytes)
    plan = plan_quantization(source, bundle.config, kind, scheme)
    _check_disk(bundle, plan, ignore_estimate, log)
    graph_name, data_name = variant_names(kind)
    with staged_variant(bundle) as staging:
        data_sha256 = _write_data(plan, bundle, staging / data_name, progress)
        (staging / graph_name).write_bytes(plan.model.SerializeToString())
        record = QuantizedRecord(
            type=kind, bits=scheme.bits, block_size=scheme.block_size, accuracy_level=scheme.accuracy_level,
            symmetric=scheme.symmetric, file=graph_name, size=(staging / graph_name).stat().st_size,
            sha256=sha256_of_file(staging / graph_name), data=data_name, data_size=plan.nbytes,
            data_mtime_ns=(staging / data_name).stat().st_mtime_ns, data_sha256=data_sha256,
            data_sample_sha256=sample_sha256(staging / data_name, [(0, plan.nbytes)]),
            source_sha256=hashlib.sha256(source_bytes).hexdigest(),
        )  # fmt: skip
        commit_variant(bundle, staging, record)
    seconds = time.perf_counter() - start
    log(f"quantize: {kind}, {plan.weights:,} weights in {plan.nbytes:,} bytes, done in {seconds:.1f} s")
    return QuantizeResult(
        bundle=str(bundle.folder),
        type=kind,
        bits=scheme.bits,
        block_size=scheme.block_size,
        bytes=plan.nbytes + record.size,
        seconds=round(seconds, 3),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _scheme(kind: str) -> Scheme:
    if kind not in SCHEMES:
        raise ConfigError(
            f"unknown type of quantised weights: {kind}",
            details={"got": kind, "expected": " | ".join(SCHEMES)},
            hint="choose one of these",
        )
    return SCHEMES[kind]


def _check_request(bundle: Bundle, kind: str, force: bool) -> None:
    if bundle.task != "causal-lm":
        raise ConfigError(
            f"only causal language models are quantised; the task of this bundle is {bundle.task}",
            details={"bundle": bundle.folder, "got": bundle.task, "expected": "causal-lm"},
            hint="run the bundle as it is",
        )
    if kind in bundle.variants and not force:
        raise ConfigError(
            f"this bundle has {kind} weights already",
            details={"bundle": bundle.folder, "got": bundle.manifest.quantized[kind].file},
            hint="pass --force to make them again",
        )


def _check_disk(bundle: Bundle, plan: Plan, ignore: bool, log: Callable[[str], None]) -> None:
    """Says what it will cost, in one line.

    Raises:
        ToolchainError: the disk cannot hold the data file, and ``ignore`` is off.
    """
    seconds = 0.5 + _SECONDS[plan.kind] * plan.weights / 1e9
    line = f"quantize: about {seconds:.0f} s, {plan.nbytes / 1e6:,.1f} MB to write"
    free = free_disk(bundle.folder)
    if free is None or plan.nbytes <= free:
        log(line)
    elif ignore:
        log(f"{line}; warning: no space left, {free} bytes free: going on for --ignore-estimate")
    else:
        raise ToolchainError(
            "no space left",
            details={"where": bundle.folder, "got": f"{free} bytes free", "expected": f"{plan.nbytes} bytes"},
            hint="free some space, or pass --ignore-estimate",
        )


# ---- the graph --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One weight of the checkpoint that is quantised."""

    node: onnx.NodeProto
    """The product in the source graph."""
    weight: onnx.TensorProto
    """[N, K], stored in the checkpoint's dtype: in its file, or in the graph."""

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        rows, columns = self.weight.dims
        return int(rows), int(columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor lies in the data file."""

    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The byte after it."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One MatMulNBits: a matrix, or several one below the other."""

    parts: Sequence[Matrix]
    packed: Place
    scales: Place
    zeros: Place | None
    """None where zero is the same integer everywhere."""

    @property
    def end(self) -> int:
        """Of the last of them, bytes."""
        return self.zeros.end if self.zeros else self.scales.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be written."""

    kind: str
    scheme: Scheme
    model: onnx.ModelProto
    """The variant; its quantised initializers lie in the data file."""
    products: Sequence[Product]

    @property
    def nbytes(self) -> int:
        """Of the data file."""
        return self.products[-1].end

    @property
    def weights(self) -> int:
        """How many are quantised."""
        return sum(math.prod(part.shape) for product in self.products for part in product.parts)


def plan_quantization(source: onnx.ModelProto, config: LlamaConfig, kind: str, scheme: Scheme) -> Plan:
    """The variant's graph, and where each of its tensors will lie. No weight is read.

    Args:
        source: ``model.onnxruntime.onnx``; not modified.

    Raises:
        ExportError: its products are not those that the config implies.
    """
    groups = _matrices(source.graph, config)
    if not scheme.pack:
        groups = [[matrix] for group in groups for matrix in group]
    products: list[Product] = []
    for group in groups:
        rows, columns = sum(part.shape[0] for part in group), group[0].shape[1]
        blocks = -(-columns // scheme.block_size)
        packed = _place((rows, blocks, scheme.block_size * scheme.bits // 8), 1, products[-1].end if products else 0)
        scales = _place((rows, blocks), 4, packed.end)
        zeros = None if scheme.symmetric else _place((rows, -(-blocks // 2)), 1, scales.end)
        products.append(Product(parts=group, packed=packed, scales=scales, zeros=zeros))
    return Plan(kind=kind, scheme=scheme, model=_variant(source, products, kind, scheme), products=products)


def _place(shape: tuple[int, ...], itemsize: int, after: int) -> Place:
    return Place(shape=shape, offset=-(-after // _ALIGNMENT) * _ALIGNMENT, nbytes=math.prod(shape) * itemsize)


def _matrices(graph: onnx.GraphProto, config: LlamaConfig) -> list[list[Matrix]]:
    """The products by a weight, those that read the same tensor together, in the graph's order.

    A linear layer is ``MatMul(x, Transpose(weight))``, with a ``Cast`` before the transposition where the weight is stored in
    another dtype.
    """
    initializers = {item.name: item for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    groups: dict[str, list[Matrix]] = {}
    for node in graph.node:
        turned = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        if turned is None or turned.op_type != "Transpose":
            continue
        name = turned.input[0]
        if name in makers and makers[name].op_type == "Cast":
            name = makers[name].input[0]
        if name in initializers:
            groups.setdefault(node.input[0], []).append(Matrix(node=node, weight=initializers[name]))
    expected = [[module.matrix for module in group] for group in linear_groups(config)]
    got = [[part.shape for part in group] for group in groups.values()]
    if got != expected:
        raise ExportError(
            "the products of this graph are not those that its config implies",
            details={"got": dict(Counter(map(str, got))), "expected": dict(Counter(map(str, expected)))},
            hint=_REPORT,
        )
    return list(groups.values())


def _variant(source: onnx.ModelProto, products: Sequence[Product], kind: str, scheme: Scheme) -> onnx.ModelProto:
    """The graph with its products replaced; what only they needed is gone."""
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    new_nodes: dict[str, list[onnx.NodeProto]] = {}  # name of the first product of a group -> what stands in its place
    replaced = {part.node.name for product in products for part in product.parts}
    for product in products:
        first = product.parts[0]
        names = [part.node.name.rpartition("/")[0] for part in product.parts]
        # `model.layers.0.self_attn.q_proj` and its siblings: `model.layers.0.self_attn.q_proj+k_proj+v_proj`
        name = "+".join([names[0], *(other.rpartition(".")[2] for other in names[1:])])
        rows, columns = [part.shape[0] for part in product.parts], first.shape[1]
        whole = first.node.output[0] if len(rows) == 1 else f"{name}/packed"
        data_name = variant_names(kind)[1]
        inputs = [first.node.input[0]]
        for label, data_type, place in (
            (kind, onnx.TensorProto.UINT8, product.packed),
            ("scales", onnx.TensorProto.FLOAT, product.scales),
            ("zeros", onnx.TensorProto.UINT8, product.zeros),
        ):
            if place is not None:
                graph.initializer.append(_external(f"{name}.{label}", data_type, place, data_name))
                inputs.append(f"{name}.{label}")
        made = [
            onnx.helper.make_node(
                "MatMulNBits", inputs, [whole], name=f"{name}/MatMulNBits", domain=DOMAIN, K=columns, N=sum(rows),
                bits=scheme.bits, block_size=scheme.block_size, accuracy_level=scheme.accuracy_level,
            )
        ]  # fmt: skip
        if len(rows) > 1:
            sizes = f"{name}/rows"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(rows, np.int64), sizes))
            outputs = [part.node.output[0] for part in product.parts]
            made.append(onnx.helper.make_node("Split", [whole, sizes], outputs, name=f"{name}/Split", axis=-1))
        new_nodes[first.node.name] = made
    nodes = [new for node in graph.node for new in new_nodes.get(node.name, () if node.name in replaced else (node,))]
    _replace(graph.node, _without_readerless(nodes, {value.name for value in graph.output}))
    read = {name for node in graph.node for name in node.input}
    written = {name for node in graph.node for name in node.output}
    _replace(graph.initializer, [item for item in graph.initializer if item.name in read])
    _replace(graph.value_info, [item for item in graph.value_info if item.name in written])
    if all(item.domain != DOMAIN for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return model


def _replace(field: Any, items: Sequence[Any]) -> None:
    """Another content of a repeated field of messages; ``items`` may be of the old one."""
    copies = []
    for item in items:
        copy = type(item)()
        copy.CopyFrom(item)
        copies.append(copy)
    del field[:]
    field.extend(copies)


def _without_readerless(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes on which a result depends, in their order: the transpositions and casts of weights are no more."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]


def _external(name: str, data_type: int, place: Place, file: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=place.shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", place.offset), ("length", place.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


# ---- the data ---------------------------------------------------------------------------------------------------


def _write_data(plan: Plan, bundle: Bundle, path: Path, progress: Progress) -> str:
    """Writes all packed weights and scales; returns the SHA-256 of the file."""
    digest, at = hashlib.sha256(), 0
    with path.open("wb") as writer, ThreadPoolExecutor(os.cpu_count()) as pool:

        def write(data: Any) -> None:
            nonlocal at
            digest.update(data)
            at += writer.write(data)

        def write_at(place: Place, parts: Sequence[NDArray[Any]]) -> None:
            write(bytes(place.offset - at))
            for part in parts:
                write(part.data)

        for product in plan.products:
            scales: list[Float32Array] = []
            zeros: list[UInt8Array] = []
            write(bytes(product.packed.offset - at))
            for part in product.parts:
                for rows in pool.map(lambda read: quantize_rows(read(), plan.scheme), _row_readers(part, bundle)):
                    if not np.isfinite(rows.scales).all():
                        raise _not_finite(part, bundle)
                    write(rows.packed.data)
                    scales.append(rows.scales)
                    zeros.append(rows.zeros)
                    progress(path.name, at, plan.nbytes)
            write_at(product.scales, scales)
            if product.zeros is not None:
                write_at(product.zeros, zeros)
    return digest.hexdigest()


def _not_finite(part: Matrix, bundle: Bundle) -> CheckpointError:
    return CheckpointError(
        f"tensor `{part.weight.name}` holds a NaN or an infinity, which has no 4 or 8 bits",
        details={"bundle": bundle.folder},
        hint="run the bundle as it is, or repair the checkpoint",
    )


def _row_readers(part: Matrix, bundle: Bundle) -> Iterator[Callable[[], Float32Array]]:
    """Functions that read some rows of a weight each, [n, K] as float32; to be called in any thread."""
    rows, columns = part.shape
    step = max(1, _ROWS_BYTES // (4 * columns))
    read = _reader(part.weight, bundle)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)

        def some(begin: int = begin, end: int = end) -> Float32Array:
            return read(begin * columns, end * columns).reshape(end - begin, columns)

        yield some


def _reader(weight: onnx.TensorProto, bundle: Bundle) -> Callable[[int, int], Float32Array]:
    """A function that reads elements begin..end of a weight as float32."""
    itemsize = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}[weight.data_type]
    if weight.data_location != onnx.TensorProto.EXTERNAL:
        content = weight.raw_data
        return lambda begin, end: _widened(content[begin * itemsize : end * itemsize], weight.data_type)
    place = {entry.key: entry.value for entry in weight.external_data}
    path, offset = bundle.folder / place["location"], int(place["offset"])

    def read(begin: int, end: int) -> Float32Array:
        with open_regular(path) as stream:
            stream.seek(offset + begin * itemsize)
            data = stream.read((end - begin) * itemsize)
        if len(data) != (end - begin) * itemsize:
            raise CheckpointError(
                f"weight file `{path.name}` became shorter while it was read",
                details={"tensor": weight.name, "got": f"{len(data)} bytes", "expected": f"{(end - begin) * itemsize}"},
                hint="export again when nothing writes to the checkpoint",
            )
        return _widened(data, weight.data_type)

    return read


def _widened(data: bytes, data_type: int) -> Float32Array:
    """float32, float16 or bfloat16 as float32: exact."""
    if data_type == onnx.TensorProto.BFLOAT16:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    stored = np.float16 if data_type == onnx.TensorProto.FLOAT16 else np.float32
    return np.frombuffer(data, stored).astype(np.float32, copy=False)
