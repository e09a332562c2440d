"""What a serialised engine says of itself, read without a GPU.

TensorRT's own inspector needs a deserialised engine, which needs a driver. But a TensorRT-RTX 1.7 plan holds, in plain
bytes, a table of its inputs and outputs (64-bit length, name; the second profile's with a suffix) and one compiled
graph per profile as text, where a cache in both lists is one buffer, updated in place::

    header {
      inputs={ "input_ids.1" "past_length.1" "logits_index.1" "present.0.key.1" ... }
      outputs={ "__mye17124" "present.0.key.1" ... }
      tf32=0
      hardware_forward_compatibility=1
      accelerators={sm80 }
    descriptors {
      tensor={ alignment=16 dims={ "__mye3606_proxy.1" 2 512 64 } ... name="present.0.key.1" ... type=half }

A weight that is an input has a ``tensor`` line too; ``sub_tensor`` lines are views of it, and a product that names such a
view reads the weight where it lies::

  sub_tensor={ base="lm_head.weight.1" dims={ 768 32000 } name="__mye5788^deref" ... strides={ 1 768 } type=float }
  fully_connected={ name="lm_head/MatMul" output={"logits.1" } input={"__mye5781^deref" "__mye5788^deref" ... } ... }

A plugin layer lies outside these graphs, or within one, but always with a record of its own: tagged strings (64-bit
length twice, text) that give its input tensors, output tensors, name, op type, version, namespace, then each field's
name, type and bytes, and ``V3ONE``. There is one record per layer and profile. The plan does not say that a plugin's
output shares an input's buffer; the plugin does (:mod:`llama_export.engine.build` makes sure of it before the build), and the
plan shows that no copy was put between the two.

The format is undocumented, so only the versions it was seen in are read. Used by :mod:`llama_export.engine.build` only.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.engine.sidecar import EngineSidecar, EngineTensor
from llama_export.graph.kv_cache import present_name
from llama_export.ops.table import ATTENTION, MASKED_ATTENTION

Buffer = Any
"""bytes, or a memory map."""

_READABLE_PLANS = {"tensorrt-rtx": "1.7."}
"""Backend -> version prefix whose plan layout is checked."""
_GRAPH_BEGIN, _GRAPH_TEXT = b"header {\n  version = ", re.compile(rb"header \{\n  version = \d[^\0]*")
_TENSOR_LINE = re.compile(r'^  tensor=\{.*? dims=\{ (.*?) \}.*? name="([^"]*)".* type=(\w+) \}', re.MULTILINE)
_STRING = re.compile(rb"\x13\x80\x01\x00(.{8})\x01\x80\x0c\x80\x01\x00(.{8})", re.DOTALL)
_DIMS = re.compile(rb"\x59\x80\x01\x00\x07\x80\x01\x00(.{4})\x01\x80\x09\x80\x01\x00(.{8})", re.DOTALL)
_FIELD_VALUE = b"\x01\x80\x03\x80\x01\x00"
"""Stands before the 64-bit length and the bytes of a field's value."""
_FIELD_TYPES = {"INT32": "<i", "INT64": "<q", "FP32": "<f"}
_ATTENTION = ATTENTION.op_type
_WITH_WORKSPACE = (_ATTENTION, MASKED_ATTENTION.op_type)
"""Ops whose plugins store ``workspace_bytes``, the scratch memory that TensorRT reserves for a call of the profile."""
_DTYPE_FIELDS = {"float32": 0, "float16": 1, "bfloat16": 7}
"""``nvinfer1::DataType``: what a plugin stores as its field ``dtype``."""
_TYPES = {"float32": "float", "float16": "half", "bfloat16": "bf16"}


def _suffixes(sidecar: EngineSidecar) -> dict[str, str]:
    """Profile -> what the plan appends to the names of its tensors."""
    return {profile: f" [profile {index}]" if index else "" for index, profile in enumerate(sidecar.profiles)}


def is_readable(sidecar: EngineSidecar) -> bool:
    """Whether the layout of this backend and version is known."""
    prefix = _READABLE_PLANS.get(sidecar.backend)
    return prefix is not None and sidecar.backend_version.startswith(prefix)


def read_plan(
    plan: Buffer, sidecar: EngineSidecar, attributes: Mapping[str, Mapping[str, int | float]]
) -> tuple[dict[str, Any], list[str]]:
    """What a plan says of itself, and how that differs from its sidecar.

    Args:
        plan: the engine file's bytes.
        sidecar: what it should be.
        attributes: op -> attribute -> value of every plugin layer of the op.

    Returns:
        ``compute_capabilities``, ``forward_compatible``, ``weights_copied_per_run`` (weights that are inputs and that
        TensorRT brings into another layout in every run, which costs time) and ``compiled_graphs_sha256`` (equal for two
        builds of one network, whose plans differ in the order of a table), and the differences.
    """
    problems = []
    suffixes = _suffixes(sidecar)
    for entry in sidecar.io:
        for profile, suffix in suffixes.items():
            name = (entry.name + suffix).encode()
            if re.search(re.escape(len(name).to_bytes(8, "little") + name), plan) is None:
                problems.append(f"the {profile} profile has no {entry.kind} `{entry.name}`")
    graphs = list(_graph_texts(plan))
    main = [graph for graph in graphs if _line(graph, "tf32")]
    caches = [entry for entry in sidecar.io if entry.alias_of is not None]
    records, copies = _plugin_records(plan) if sidecar.plugin_layers else ([], [])
    problems += _record_problems(records, sidecar, attributes)
    if _ATTENTION in sidecar.plugin_layers:
        problems += [problem for graph in main for problem in _tf32_problems(graph, sidecar)]
        problems += _plugin_cache_problems(records, copies, caches, sidecar)
    elif not caches:
        problems += [problem for graph in main for problem in _tf32_problems(graph, sidecar)]
    else:
        for profile, suffix in suffixes.items():
            marked = f'"{present_name(0, "key")}{suffix}.1"'
            graph = next((text for text in graphs if marked in _line(text, "outputs")), None)
            if graph is None:
                problems.append(f"the {profile} profile has no graph that writes the cache")
            else:
                problems += [f"{profile}: {problem}" for problem in _graph_problems(graph, caches, suffix, sidecar)]
    weights = sidecar.weights.tensors
    problems += _weight_problems(graphs, weights, sidecar)
    targets = {name for graph in main for name in re.findall(r"sm(\d{2,3})", _line(graph, "accelerators"))}
    forward = {_line(graph, "hardware_forward_compatibility") for graph in main}
    if not targets:
        problems.append("the plan names no GPU")
    capabilities = [f"{int(target) // 10}.{int(target) % 10}" for target in sorted(targets, key=int)]
    facts = {
        "compute_capabilities": tuple(capabilities),
        "forward_compatible": forward == {"1"},
        "weights_copied_per_run": _copied_weights(graphs, {entry.name for entry in weights}),
        "compiled_graphs_sha256": hashlib.sha256("\0".join(sorted(graphs)).encode()).hexdigest(),
    }
    return facts, problems


def _graph_texts(plan: Buffer) -> Iterator[str]:
    """The compiled graphs. ``find`` looks through gigabytes of weights twice as fast as a pattern does."""
    at = plan.find(_GRAPH_BEGIN)
    while at >= 0:
        match = _GRAPH_TEXT.match(plan, at)
        if match is not None:
            yield match.group().decode("utf-8", "replace")
        at = plan.find(_GRAPH_BEGIN, at + len(_GRAPH_BEGIN) if match is None else match.end())


# ---- plugin layers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Record:
    """One plugin layer of one profile."""

    op: str
    version: str
    namespace: str
    fields: Mapping[str, int | float]
    before: Sequence[tuple[str, tuple[int, ...]]]
    """The strings that precede the op type, and the dimensions that follow each: tensors, layer name, metadata."""


def _strings(plan: Buffer) -> Iterator[tuple[str, int]]:
    """(text, position after it) of every tagged string."""
    for match in _STRING.finditer(plan):
        length = int.from_bytes(match[1], "little")
        if match[1] == match[2] and length <= 1 << 16:
            yield _bytes(plan, match.end(), match.end() + length).decode("utf-8", "replace"), match.end() + length


def _bytes(plan: Buffer, begin: int, end: int) -> bytes:
    """A copy of a part."""
    return bytes(plan[begin:end])


def _plugin_records(plan: Buffer) -> tuple[list[_Record], list[str]]:
    """Every plugin layer, and the names of the layers that only copy or reformat a tensor."""
    strings = list(_strings(plan))
    records = []
    for last, (text, _) in enumerate(strings):
        if text != "V3ONE":
            continue
        fields: dict[str, int | float] = {}
        at = last - 2
        while at >= 0 and strings[at + 1][0] in _FIELD_TYPES:
            kind, end = strings[at + 1]
            value = _bytes(plan, end, end + len(_FIELD_VALUE) + 16)
            if value.startswith(_FIELD_VALUE):
                fields[strings[at][0]] = struct.unpack_from(_FIELD_TYPES[kind], value, len(_FIELD_VALUE) + 8)[0]
            at -= 2
        # Now strings[at - 1 : at + 2] are op type, version, namespace.
        if at >= 1:
            op, version, namespace = (strings[at - 1 + step][0] for step in range(3))
            begin = max(0, at - 12)
            before = [
                (strings[index][0], _dims(_bytes(plan, strings[index][1], strings[index + 1][1])))
                for index in range(begin, at - 1)
            ]
            records.append(_Record(op, version, namespace, fields, before))
    return records, [text for text, _ in strings if "CopyNode" in text]


def _dims(tail: bytes) -> tuple[int, ...]:
    """The last dimensions in what follows a tensor's name; a number below zero is one of the profile's."""
    found = list(_DIMS.finditer(tail))
    if not found:
        return ()
    rank = int.from_bytes(found[-1][1], "little")
    values = tail[found[-1].end() : found[-1].end() + 8 * rank]
    return struct.unpack(f"<{rank}q", values) if len(values) == 8 * rank else ()


def _record_problems(
    records: Sequence[_Record], sidecar: EngineSidecar, attributes: Mapping[str, Mapping[str, int | float]]
) -> list[str]:
    """Which plugins the plan calls, how often, and with which attributes."""
    counts = Counter(record.op for record in records)
    profiles = len(sidecar.profiles)
    expected = {op: count * profiles for op, count in sidecar.plugin_layers.items()}
    problems = [
        f"{counts[op]} plugin layers {op} in {profiles} profiles, expected {expected.get(op, 0)}"
        for op in sorted({*counts, *expected})
        if counts[op] != expected.get(op, 0)
    ]
    for record in records:
        got = dict(record.fields)
        want = {**attributes.get(record.op, {}), "dtype": _DTYPE_FIELDS[sidecar.dtype]}
        if record.op in _WITH_WORKSPACE and record.op in attributes:
            workspace, least = got.pop("workspace_bytes", None), _query_bytes(record, sidecar, attributes[record.op])
            if workspace is None or workspace < least:
                problems.append(f"plugin {record.op} reserves {workspace} bytes, its rotated query alone needs {least}")
        if got != want:
            problems.append(f"plugin {record.op} has {got}, expected {want}")
        if (record.version, record.namespace) != ("1", ""):
            problems.append(f"plugin {record.op} is version {record.version} in namespace `{record.namespace}`")
    return list(dict.fromkeys(problems))


def _query_bytes(record: _Record, sidecar: EngineSidecar, attributes: Mapping[str, int | float]) -> int:
    """Bytes of the largest rotated query of the record's profile, which the plugin's workspace holds among other things."""
    suffixes = _suffixes(sidecar)
    named = [
        profile for profile, suffix in suffixes.items() if suffix and any(n.endswith(suffix) for n, _ in record.before)
    ]
    batch, tokens = sidecar.profiles[named[0] if named else next(iter(suffixes))]["input_ids"][-1]
    itemsize = 4 if sidecar.dtype == "float32" else 2
    return int(batch * tokens * attributes["num_heads"] * attributes["head_dim"] * itemsize)


def _plugin_cache_problems(
    records: Sequence[_Record], copies: Sequence[str], caches: Sequence[EngineTensor], sidecar: EngineSidecar
) -> list[str]:
    """Every cache goes into and comes out of its own layer's plugin, with its shape, and nothing copies it."""
    problems = [f"`{copy}` copies a cache" for copy in copies if "past_key_values." in copy or "present." in copy]
    # The last strings before the op type: inputs 5 to 7, the three outputs, the layer's name, metadata.
    written = {record.before[-3][0]: record.before[-8:] for record in records if len(record.before) >= 8}
    by_name = {entry.name: entry for entry in caches}
    for profile, suffix in _suffixes(sidecar).items():
        for layer in range(sidecar.plugin_layers[_ATTENTION]):
            names = [present_name(layer, part) for part in ("key", "value")]
            found = written.get(names[1] + suffix)
            if found is None:
                problems.append(f"the {profile} profile has no plugin that writes `{names[1]}`")
                continue
            past_key, past_value, past_length, _, present_key, present_value = found[:6]
            if "past_length" not in past_length[0]:
                problems.append(f"{profile}: layer {layer} is written at `{past_length[0]}`")
            for past, present, name in zip((past_key, past_value), (present_key, present_value), names, strict=True):
                entry = by_name[name]
                if (past[0], present[0]) != (f"{entry.alias_of}{suffix}", name + suffix):
                    problems.append(f"{profile}: `{present[0]}` updates `{past[0]}`, expected `{entry.alias_of}`")
                for tensor, dims in (past, present):
                    if dims[1:] != entry.shape[1:]:
                        problems.append(f"{profile}: `{tensor}` is {list(dims)}, expected {list(entry.shape)}")
    return problems


# ---- weights that are inputs ------------------------------------------------------------------------------------

_VIEW_LINE = re.compile(r'^  sub_tensor=\{ base="([^"]*)".*? name="([^"]*)"', re.MULTILINE)
_STEP_LINE = re.compile(r'^  (\w+)=\{ name="?([^" ]*)"? .*?\b(?:args|input_args|input)=\{(.*?)\}', re.MULTILINE)
_READERS = ("fully_connected", "custom_layer", "runtime_fusion", "function")
"""Steps that compute: products, plugins, and kernels that TensorRT wrote for a group of layers."""
_KERNEL = re.compile(r"__myl_((?:[A-Z][a-z0-9]*)+)")
_ONLY_MOVES = {"Move", "Conc", "Tran", "Resh", "Cast", "Slic"}
"""Words in the name of a kernel that moves data and computes nothing."""
_PROFILE = re.compile(r"( \[profile \d+\])?\.1$")
"""What the plan appends to a tensor's name."""


def _weight_problems(graphs: Sequence[str], weights: Sequence[TensorEntry], sidecar: EngineSidecar) -> list[str]:
    """Every weight is an input of every profile, with its shape and dtype."""
    if not weights:
        return []
    inputs = {name for graph in graphs for name in re.findall(r'"([^"]*)"', _line(graph, "inputs"))}
    tensors = {
        match[2]: (match[1].split(), match[3]) for graph in graphs for match in _TENSOR_LINE.finditer(graph)
        if match[2] in inputs
    }  # fmt: skip
    problems = []
    for profile, suffix in _suffixes(sidecar).items():
        for entry in weights:
            dims, dtype = tensors.get(f"{entry.name}{suffix}.1", ([], "none"))
            if dims != [str(dim) for dim in entry.shape] or dtype != _TYPES[entry.dtype]:
                expected = f"{entry.dtype} {list(entry.shape)}"
                problems.append(f"{profile}: weight `{entry.name}` is {dtype} {dims}, expected {expected}")
    return problems


def _copied_weights(graphs: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    """Weights that a step reads which only moves data, sorted."""
    copied = set()
    for graph in graphs if names else ():
        views = {match[2]: match[1] for match in _VIEW_LINE.finditer(graph)}
        for kind, step, arguments in _STEP_LINE.findall(graph):
            kernel = _KERNEL.match(step)
            words = set(re.findall(r"[A-Z][a-z0-9]*", kernel[1])) if kernel else {"computes"}
            if kind in _READERS and words - _ONLY_MOVES:
                continue
            read = (views.get(name, name) for name in re.findall(r'"([^"]*)"', arguments))
            copied |= {name for name in (_PROFILE.sub("", item) for item in read) if name in names}
    return tuple(sorted(copied))


# ---- graphs in text ---------------------------------------------------------------------------------------------


def _line(graph: str, key: str) -> str:
    match = re.search(rf"^  {key}=(.*)$", graph, re.MULTILINE)
    return "" if match is None else match[1]


def _graph_problems(graph: str, caches: Sequence[EngineTensor], suffix: str, sidecar: EngineSidecar) -> list[str]:
    """One compiled graph: TF32, and shape, dtype and place of every cache."""
    problems = _tf32_problems(graph, sidecar)
    tensors = {match[2]: (match[1].split(), match[3]) for match in _TENSOR_LINE.finditer(graph)}
    inputs, outputs = (re.findall(r'"([^"]*)"', _line(graph, key)) for key in ("inputs", "outputs"))
    for entry in caches:
        name = f"{entry.name}{suffix}.1"
        dims, dtype = tensors.get(name, ([], "none"))
        if dims[1:] != [str(dim) for dim in entry.shape[1:]] or dtype != _TYPES[entry.dtype]:
            problems.append(f"`{entry.name}` is {dtype} {dims}, expected {entry.dtype} {list(entry.shape)}")
        if name not in inputs or name not in outputs:
            problems.append(f"`{entry.name}` is not updated in place")
    return problems


def _tf32_problems(graph: str, sidecar: EngineSidecar) -> list[str]:
    tf32 = str(int(sidecar.settings.tf32))
    return [] if _line(graph, "tf32") == tf32 else [f"tf32 is {_line(graph, 'tf32')}, expected {tf32}"]
