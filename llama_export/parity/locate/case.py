"""One operation of a graph with its inputs, on disk: so that a fault can be looked at without the model it was found in.

A *segment* is the smallest part of a graph between tensors that the oracle knows: most often one node, together with the
shape arithmetic that only it reads. A *case* is a segment as an ONNX file of its own, its inputs, and what it should give;
``llama-export reproduce`` runs it again, and so can anything else that reads ONNX and ``.npy`` files.

::

    op.onnx        the segment; its weights lie in weights.bin
    input.N.npy    what it reads
    want.npy       what the oracle says
    case.json      names, dtypes, how it was run, limits
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor

from llama_export._system.files import open_regular, read_small
from llama_export._system.typed import typed
from llama_export.bundle.destination import json_bytes, write_error
from llama_export.config.huggingface import load_json_object
from llama_export.errors import ConfigError, LlamaExportError, ToolchainError
from llama_export.parity.judge import NotRun, custom_kernels
from llama_export.parity.metrics import Difference, difference
from llama_export.parity.oracle.evaluator import CustomOps, GraphEvaluator
from llama_export.parity.sessions import graph_from_proto
from llama_export.parity.tensors import to_numpy

SCHEMA_VERSION = 1
Runtime = Literal["evaluator", "onnxruntime"]
FloatType = Literal["float64", "float32", "float16", "bfloat16"]
InputType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "bool"]
MAX_GRAPH_BYTES = 64_000_000
"""Largest ``op.onnx``: one operation, whose weights lie beside it, has some kB."""
MAX_ARRAY_BYTES = 1_000_000_000
"""Largest input or output. The logits of 128 tokens over 262,144 entries have 0.3 GB in float64."""
_ARRAY_TYPES = ("<f8", "<f4", "<f2", "<i8", "<i4", "|b1")
_WEIGHTS = "weights.bin"
_ELEM_TYPES = {
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """Nodes that compute known tensors from known tensors."""

    nodes: tuple[onnx.NodeProto, ...]
    """In the graph's order; the last one writes ``outputs``."""
    inputs: tuple[str, ...]
    """Known tensors and graph inputs."""
    outputs: tuple[str, ...]
    """Known tensors."""

    @property
    def node(self) -> onnx.NodeProto:
        """The one that writes the outputs."""
        return self.nodes[-1]


def segments(graph: onnx.GraphProto, known: Collection[str]) -> list[Segment]:
    """The graph as parts between known tensors, in its order. What no known tensor needs belongs to none.

    Args:
        known: tensors that the oracle has, graph outputs among them.
    """
    given = {value.name for value in graph.input} | set(known)
    weights = {item.name for item in graph.initializer}
    found = []
    for index, node in enumerate(graph.node):
        outputs = tuple(name for name in node.output if name in known)
        if outputs:
            nodes = [node]
            wanted = set(node.input) - given
            for other in reversed(graph.node[:index]):
                if wanted.intersection(other.output):
                    nodes.insert(0, other)
                    wanted |= set(other.input) - given
            made = {name for other in nodes for name in other.output} - given
            read = dict.fromkeys(name for other in nodes for name in other.input)
            inputs = tuple(name for name in read if name and name not in made | weights)
            found.append(Segment(tuple(nodes), inputs, outputs))
    return found


def segment_model(model: onnx.ModelProto, segment: Segment, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """A segment as a model; its weights stay where they are.

    Args:
        model: the segment's graph and its functions.
        inputs: examples; their dtypes and ranks become the model's. A float64 one is declared as float32, since only an
            evaluation is in float64.
    """
    read = {name for node in segment.nodes for name in node.input}
    ops = {node.op_type for node in segment.nodes}
    return helper.make_model(
        helper.make_graph(
            segment.nodes, "segment",
            [helper.make_tensor_value_info(name, _declared(inputs[name].dtype), [None] * inputs[name].ndim) for name in segment.inputs],
            [onnx.ValueInfoProto(name=name) for name in segment.outputs],
            initializer=[item for item in model.graph.initializer if item.name in read],
        ),
        opset_imports=model.opset_import, ir_version=model.ir_version,
        functions=[item for item in model.functions if item.name in ops],
    )  # fmt: skip


def _declared(dtype: torch.dtype) -> int:
    return int(_ELEM_TYPES[torch.float32 if dtype == torch.float64 else dtype])


class SegmentRunner:
    """Runs one segment as often as asked.

    Args:
        model: from :func:`segment_model`.
        runtime: what computes it.
        dtype: of the floats: float64, float32, float16, bfloat16; onnxruntime has its own, float32.
        custom_ops: the evaluator's; see :class:`llama_export.parity.oracle.evaluator.GraphEvaluator`.
        folder: where the weights lie.
    """

    def __init__(
        self, model: onnx.ModelProto, *, runtime: Runtime, dtype: torch.dtype, custom_ops: CustomOps, folder: Path
    ) -> None:
        self.run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
        """Input name -> tensor; output name -> tensor."""
        if runtime == "evaluator":
            self.run = GraphEvaluator(
                model, folder=folder, dtype=dtype, custom_ops=custom_ops, convert_inputs=False
            ).run
        else:
            self.run = partial(_run_onnxruntime, graph_from_proto(model, folder, "the operation").session)


def _run_onnxruntime(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [value.name for value in session.get_outputs()]
    feeds = {name: to_numpy(tensor) for name, tensor in inputs.items()}
    return dict(zip(names, map(torch.from_numpy, session.run(names, feeds)), strict=True))


# ---- on disk -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What ``case.json`` says."""

    stage: str
    """Where it was found."""
    call: str
    """The call whose inputs these are, e.g. ``prefill``."""
    layer: int | None
    op: str
    node: str
    tensor: str
    """The output that is wrong."""
    runtime: Runtime
    dtype: FloatType
    custom_ops: str
    """``eager`` or ``bodies``; or how the plugins' kernels run: ``interpreter``, ``enqueue``, ``ptx``, ``gpu``."""
    inputs: Mapping[str, InputType]
    """Input -> dtype; ``input.N.npy`` in this order. 16-bit values are stored widened to float32."""
    limit_relative_l2: float
    limit_relative_max: float
    """What the output may differ from ``want.npy``: relative L2, and the maximum as a share of the largest value."""


def save_case(
    folder: Path, case: Case, model: onnx.ModelProto, weights: Path, inputs: Mapping[str, Tensor], want: Tensor
) -> None:
    """Writes a case, replacing one that lies there.

    Args:
        model: from :func:`segment_model`.
        weights: the folder its weights lie in.

    Raises:
        ToolchainError: no space. ExportError: the folder cannot be written to.
    """
    own = onnx.ModelProto()
    own.CopyFrom(model)
    try:
        if folder.is_symlink():
            folder.unlink()
        if not (folder.parent.is_symlink() or folder.parent.parent.is_symlink()):  # nothing is removed through a link
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _WEIGHTS).open("wb") as stream:
            for item in own.graph.initializer:
                _take_along(item, weights, stream)
        (folder / "op.onnx").write_bytes(own.SerializeToString())
        for number, name in enumerate(case.inputs):
            np.save(folder / f"input.{number}.npy", to_numpy(inputs[name]))
        np.save(folder / "want.npy", to_numpy(want.double()))
        (folder / "case.json").write_bytes(json_bytes({"schema_version": SCHEMA_VERSION, **asdict(case)}))
    except OSError as err:
        raise write_error(err, folder) from err


def remove_cases(folder: Path) -> None:
    """Removes the cases of an earlier validation, and nothing else. Nothing is removed through a symbolic link.

    Args:
        folder: ``operations`` in the folder of the report.

    Raises:
        ConfigError: ``folder`` is a symbolic link; or the report's folder is one, and cases of an earlier validation are in it.
    """
    if folder.is_symlink():
        raise ConfigError(
            f"`{folder}` is a symbolic link",
            details={"got": os.path.realpath(folder), "expected": "a folder that validate makes itself"},
            hint="remove the link, or give another --report DIR",
        )
    cases = [path.parent for path in folder.glob("*/case.json")]
    if cases and folder.parent.is_symlink():
        raise ConfigError(
            f"`{folder.parent}` is a symbolic link, and cases of an earlier validation are behind it",
            details={"got": ", ".join(case.name for case in cases[:4]), "expected": f"no cases in {folder}"},
            hint=f"remove them yourself, or give the folder itself: --report {os.path.realpath(folder.parent)}",
        )
    for case in cases:
        if not case.is_symlink():
            shutil.rmtree(case, ignore_errors=True)


def _take_along(item: onnx.TensorProto, source: Path, stream: BinaryIO) -> None:
    """Copies an initializer's bytes, and points it at the copy."""
    where = {entry.key: entry.value for entry in item.external_data}
    if not where:
        return
    begin, left = stream.tell(), int(where["length"])
    with (source / where["location"]).open("rb") as reader:
        reader.seek(int(where["offset"]))
        while left and (block := reader.read(min(left, 1 << 22))):
            stream.write(block)
            left -= len(block)
    for entry in item.external_data:
        entry.value = {"location": _WEIGHTS, "offset": str(begin)}.get(entry.key, entry.value)


def reproduce_case(folder: Path) -> tuple[Case, Difference, bool]:
    """Runs a saved operation again.

    Args:
        folder: written by :func:`save_case`.

    Returns:
        The case, how far its output is from the oracle's, and whether that is still more than its limit.

    Raises:
        ConfigError: no case there, a damaged one, or one of another version.
        ToolchainError: what it was run with is not here.
    """
    case = _read_case(folder)
    try:
        arrays = [_read_array(folder / f"input.{number}.npy") for number in range(len(case.inputs))]
        want = _read_array(folder / "want.npy")
        model = _read_model(folder)
        kinds = (getattr(torch, name) for name in case.inputs.values())
        inputs = {
            name: torch.from_numpy(array).to(kind) for name, array, kind in zip(case.inputs, arrays, kinds, strict=True)
        }
        dtype, custom_ops = getattr(torch, case.dtype), custom_ops_named(case.custom_ops)
        runner = SegmentRunner(model, runtime=case.runtime, dtype=dtype, custom_ops=custom_ops, folder=folder)
        found = difference([(case.tensor, to_numpy(runner.run(inputs)[case.tensor]), want)])
    except LlamaExportError:
        raise
    except Exception as err:
        raise _damaged(folder, err) from err
    return case, found, not within(found, case.limit_relative_l2, case.limit_relative_max)


def _read_array(path: Path) -> NDArray[Any]:
    """An array of one of the types that cases hold; its size is checked before anything is read.

    Raises:
        OSError: not a regular file. ValueError: not ``.npy``, another type, too large, or cut short.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(stream)
        if dtype.str not in _ARRAY_TYPES or is_fortran:
            raise ValueError(f"{path.name} holds {dtype.str[:40]}, not one of {', '.join(_ARRAY_TYPES)} in C order")
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != size - stream.tell() or nbytes > MAX_ARRAY_BYTES:
            raise ValueError(f"{path.name} has {size} bytes, and its header says {nbytes} of at most {MAX_ARRAY_BYTES}")
        return np.frombuffer(bytearray(stream.read(nbytes)), dtype).reshape(shape)


def _read_model(folder: Path) -> onnx.ModelProto:
    """The graph; every tensor that lies outside it lies in ``weights.bin``, as far as that goes.

    Raises:
        OSError: not a regular file. ValueError: a tensor elsewhere. google.protobuf.message.DecodeError: not a model.
    """
    model = onnx.ModelProto.FromString(read_small(folder / "op.onnx", MAX_GRAPH_BYTES))
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        tensors = [attribute.t, *attribute.tensors, *(item.values for item in attribute.sparse_tensors)]
        if attribute.HasField("g") or len(attribute.graphs) or any(len(tensor.external_data) for tensor in tensors):
            raise ValueError(f"attribute {attribute.name[:100]!r} holds a graph, or a tensor outside the file")
    stored = [item for item in model.graph.initializer if len(item.external_data)]
    if not stored:
        return model
    with open_regular(folder / _WEIGHTS) as stream:
        size = os.fstat(stream.fileno()).st_size
    for item in stored:
        where = {entry.key: entry.value for entry in item.external_data}
        begin, length = int(where["offset"]), int(where["length"])
        if where["location"] != _WEIGHTS or not 0 <= begin <= begin + length <= size:
            raise ValueError(f"{item.name[:100]!r} does not lie in {_WEIGHTS}, which has {size} bytes")
        itemsize = helper.tensor_dtype_to_np_dtype(item.data_type).itemsize
        if min(item.dims, default=1) < 0 or math.prod(item.dims) * itemsize != length:
            raise ValueError(f"{item.name[:100]!r} has dims {list(item.dims)[:8]} and {length} bytes")
    return model


def within(found: Difference, limit_l2: float, limit_max: float) -> bool:
    """Whether an error is inside both limits; what is not finite never is."""
    return found.nonfinite == 0 and found.relative_l2 <= limit_l2 and found.relative <= limit_max


def custom_ops_named(name: str) -> CustomOps:
    """``eager``, ``bodies``, or the functions of a way to run the plugins' kernels.

    Raises:
        ToolchainError: this machine cannot run them.
    """
    if name == "eager":
        return "eager"
    if name == "bodies":
        return "bodies"
    try:
        return custom_kernels(name)
    except NotRun as reason:
        raise ToolchainError(
            "the operation was computed by kernels that cannot run here",
            details={"kernels": name, "reason": reason},
            hint="reproduce it on the machine where it was found",
        ) from reason


def _read_case(folder: Path) -> Case:
    path = folder / "case.json"
    if not path.is_file():
        raise ConfigError(
            f"`{folder}` is not a saved operation",
            details={"missing": path.name},
            hint="give the folder that a failed `llama-export validate` names after `reproduce`",
        )
    data = load_json_object(path)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ConfigError(
            "this operation was saved by another version",
            details={"file": path, "got": version, "expected": SCHEMA_VERSION},
            hint="validate again with this version",
        )
    try:
        return typed(data, Case)
    except ValueError as err:
        raise _damaged(folder, err) from err


def _damaged(folder: Path, err: Exception) -> ConfigError:
    return ConfigError(
        "the saved operation is not complete, or it cannot be run",
        details={"case": folder, "reason": getattr(err, "strerror", None) or f"{type(err).__name__}: {err}"},
        hint="validate again: it is written anew",
    )
