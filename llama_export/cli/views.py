"""What a file or folder of this project is, as a reader wants to see it: a bundle, weights, engines, a report.

Role: the command ``inspect``. Nothing is loaded that computes. For engines, see :mod:`llama_export.engine.inspection`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_export._system.text import printable_values
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.checkpoint.safetensors import DTYPE_BYTES, read_safetensors_header
from llama_export.config.decoder import count_parameters
from llama_export.config.llama import Task
from llama_export.graph.kv_cache import cache_names

if TYPE_CHECKING:
    from rich.console import Console


NAMES_SHOWN = 20
"""Tensors of a weight file that the terminal lists; JSON has all."""
_READERS = {
    "model.onnx": "TensorRT, and ONNX readers of opset 24 that have kernels for its dtype",
    "model.onnxruntime.onnx": "onnxruntime on a CPU",
}
"""For bundles of versions that did not record it."""


def describe_bundle(folder: Path) -> dict[str, Any]:
    """The manifest's keys, and ``engines``, ``files`` (bytes by name), ``parameters``, ``kv_cache_bytes_per_token``.

    Raises:
        ConfigError, ArtifactMismatchError: see :func:`llama_export.bundle.bundle.load_bundle`.
    """
    bundle = load_bundle(folder)
    names = [entry.file for entry in bundle.manifest.functions.values()]
    names += [entry.file for entry in bundle.manifest.weights]
    names += [name for entry in bundle.manifest.quantized.values() for name in (entry.file, entry.data)]
    return {
        **bundle.manifest.to_json(),
        "engines": [engine.name for engine in bundle.engines],
        "files": {name: (bundle.folder / name).stat().st_size for name in names},
        "parameters": count_parameters(bundle.config, cast(Task, bundle.task)),
        "kv_cache_bytes_per_token": _cache_bytes(bundle),
    }


def _cache_bytes(bundle: Bundle) -> int | None:
    """Keys and values of one token in all layers; None for a task without a cache."""
    if bundle.manifest.kv_cache is None:
        return None
    config = bundle.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * DTYPE_BYTES[bundle.dtype]


def print_bundle(data: Mapping[str, Any], console: Console) -> None:
    """:func:`describe_bundle` for a terminal."""
    from rich.table import Table

    data = printable_values(data)
    model, files = data["model"], data["files"]
    facts = Table(show_header=False, box=None, pad_edge=False)
    cache = data["kv_cache_bytes_per_token"]
    rows = {
        "bundle": f"{data['task']}, {data['parameters']:,} parameters, {data['dtype']}",
        "model": f"{model['num_hidden_layers']} layers, hidden {model['hidden_size']}, {model['num_attention_heads']} heads, "
        f"{model['num_key_value_heads']} key/value heads, head_dim {model['head_dim']}, vocabulary {model['vocab_size']}",
        "context": f"{model['max_position_embeddings']} tokens, RoPE {data['rope']['rope_type']}",
        "KV cache": "none" if cache is None else f"{cache:,} bytes a token",
        "weights": ", ".join(entry["file"] for entry in data["weights"]) or "inside the graphs",
        "made by": ", ".join(f"{name} {version}" for name, version in data["generator"].items()),
        "quantised": ", ".join(data.get("quantized", {})) or "none: llama-export quantize makes int4 or int8 weights",
        "engines": ", ".join(data["engines"]) or "none: llama-export build makes one",
    }
    for name, value in rows.items():
        facts.add_row(f"[bold]{name}[/bold]", value)
    console.print(facts)
    table = Table("file", "bytes", "for", box=None, pad_edge=False)
    table.columns[0].overflow, table.columns[1].justify, table.columns[1].no_wrap = "fold", "right", True
    graphs = {entry["file"]: entry for entry in data["functions"].values()}
    for name, size in files.items():
        entry = graphs.get(name)
        stored = "weights" if not name.endswith(".onnx") else "onnxruntime on a CPU, with quantised weights"
        what = stored if entry is None else entry.get("readers") or _READERS.get(name, "")
        table.add_row(name, f"{size:,}", what)
    console.print(table)
    tensors = Table("", "tensor", "dtype", "shape", box=None, pad_edge=False)
    layers = {name for pair in cache_names(model["num_hidden_layers"]) for name in pair}
    for entry in data["io"]:
        if entry["name"] not in layers:
            tensors.add_row(entry["kind"], entry["name"], entry["dtype"], _shape(entry["shape"]))
        elif ".0.key" in entry["name"]:
            label = entry["name"].replace(".0.key", ".*.key, .value")
            tensors.add_row(entry["kind"], label, entry["dtype"], _shape(entry["shape"]))
    console.print(tensors)


def _shape(shape: list[int | str]) -> str:
    return " x ".join(map(str, shape))


def describe_weights(path: Path) -> dict[str, Any]:
    """A safetensors file by its header: ``file``, ``size``, ``tensors`` (name, dtype, shape, offset, nbytes).

    Raises:
        CheckpointError: see :func:`llama_export.checkpoint.safetensors.read_safetensors_header`.
    """
    file, entries = read_safetensors_header(path)
    tensors = [
        {
            "name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape), "offset": entry.offset,
            "nbytes": entry.nbytes,
        }
        for entry in entries
    ]  # fmt: skip
    return {"file": str(path), "size": file.size, "tensors": tensors}


def print_weights(data: Mapping[str, Any], console: Console) -> None:
    """:func:`describe_weights` for a terminal."""
    from rich.table import Table

    data = printable_values(data)
    tensors = data["tensors"]
    count, size = Counter[str](), Counter[str]()
    for entry in tensors:
        count[entry["dtype"]] += 1
        size[entry["dtype"]] += entry["nbytes"]
    console.print(f"{data['file']}: {data['size']:,} bytes, {len(tensors)} tensors")
    for dtype in count:
        console.print(f"  {dtype}: {count[dtype]} tensors, {size[dtype]:,} bytes")
    table = Table("tensor", "dtype", "shape", box=None, pad_edge=False)
    for entry in tensors[:NAMES_SHOWN]:
        table.add_row(entry["name"], entry["dtype"], _shape(entry["shape"]))
    console.print(table)
    if len(tensors) > NAMES_SHOWN:
        console.print(f"... and {len(tensors) - NAMES_SHOWN} more; --json lists all")
