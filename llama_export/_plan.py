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

The format is undocumented, so only the versions it was seen in are read. Used by :mod:`llama_export.engine` only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_export.kv_cache import present_name

Buffer = Any
"""bytes, a memory map, or TensorRT's host memory."""

_READABLE_PLANS = {"tensorrt-rtx": "1.7."}
"""Backend -> version prefix whose plan layout is checked."""
_GRAPH_TEXT = re.compile(rb"header \{\n  version = \d[^\0]*")
_TENSOR_LINE = re.compile(r'^  tensor=\{.*? dims=\{ (.*?) \}.*? name="([^"]*)".* type=(\w+) \}', re.MULTILINE)
_SUFFIXES = {"prefill": "", "decode": " [profile 1]"}
_TYPES = {"float32": "float", "float16": "half", "bfloat16": "bf16"}


def is_readable(sidecar: Mapping[str, Any]) -> bool:
    """Whether the layout of this backend and version is known."""
    prefix = _READABLE_PLANS.get(sidecar["backend"])
    return prefix is not None and sidecar["backend_version"].startswith(prefix)


def read_plan(plan: Buffer, sidecar: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a plan says of itself, and how that differs from its sidecar.

    Returns:
        ``compute_capabilities`` and ``forward_compatible``, and the differences.
    """
    problems = []
    for entry in sidecar["io"]:
        for profile, suffix in _SUFFIXES.items():
            name = (entry["name"] + suffix).encode()
            if re.search(re.escape(len(name).to_bytes(8, "little") + name), plan) is None:
                problems.append(f"the {profile} profile has no {entry['kind']} `{entry['name']}`")
    graphs = [match.group().decode("utf-8", "replace") for match in _GRAPH_TEXT.finditer(plan)]
    caches = [entry for entry in sidecar["io"] if entry["alias_of"] is not None]
    for profile, suffix in _SUFFIXES.items():
        marked = f'"{present_name(0, "key")}{suffix}.1"'
        graph = next((text for text in graphs if marked in _line(text, "outputs")), None)
        if graph is None:
            problems.append(f"the {profile} profile has no graph that writes the cache")
        else:
            problems += [f"{profile}: {problem}" for problem in _graph_problems(graph, caches, suffix, sidecar)]
    main = [graph for graph in graphs if _line(graph, "tf32")]
    targets = {name for graph in main for name in re.findall(r"sm(\d+)", _line(graph, "accelerators"))}
    forward = {_line(graph, "hardware_forward_compatibility") for graph in main}
    if not targets:
        problems.append("the plan names no GPU")
    capabilities = [f"{int(target) // 10}.{int(target) % 10}" for target in sorted(targets, key=int)]
    return {"compute_capabilities": capabilities, "forward_compatible": forward == {"1"}}, problems


def _line(graph: str, key: str) -> str:
    match = re.search(rf"^  {key}=(.*)$", graph, re.MULTILINE)
    return "" if match is None else match[1]


def _graph_problems(
    graph: str, caches: Sequence[Mapping[str, Any]], suffix: str, sidecar: Mapping[str, Any]
) -> list[str]:
    """One compiled graph: TF32, and shape, dtype and place of every cache."""
    problems = []
    tf32 = str(int(sidecar["settings"]["tf32"]))
    if _line(graph, "tf32") != tf32:
        problems.append(f"tf32 is {_line(graph, 'tf32')}, expected {tf32}")
    tensors = {match[2]: (match[1].split(), match[3]) for match in _TENSOR_LINE.finditer(graph)}
    inputs, outputs = (re.findall(r'"([^"]*)"', _line(graph, key)) for key in ("inputs", "outputs"))
    for entry in caches:
        name = f"{entry['name']}{suffix}.1"
        dims, dtype = tensors.get(name, ([], "none"))
        if dims[1:] != [str(dim) for dim in entry["shape"][1:]] or dtype != _TYPES[entry["dtype"]]:
            problems.append(f"`{entry['name']}` is {dtype} {dims}, expected {entry['dtype']} {entry['shape']}")
        if name not in inputs or name not in outputs:
            problems.append(f"`{entry['name']}` is not updated in place")
    return problems
