"""What an engine is made of, for a reader: from its sidecar on any machine, and from the engine itself where one can load it.

Role: behind ``llama-export inspect ENGINE``. Nothing here is checked against a bundle; ``validate`` does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_export._system.text import printable, printable_values
from llama_export.checkpoint.safetensors import DTYPE_BYTES
from llama_export.engine import plugins
from llama_export.engine.check import inspect_engine
from llama_export.engine.sidecar import EngineSidecar, EngineTensor
from llama_export.engine.spec import MAX_LOGITS, rebuild_command
from llama_export.engine.tensorrt import execution_blocker, load_backend, message_log
from llama_export.errors import ArtifactMismatchError, LlamaExportError

if TYPE_CHECKING:
    from rich.console import Console


_ITEM_BYTES = {**DTYPE_BYTES, "int64": 8}


def describe_engine(path: Path) -> dict[str, Any]:
    """An engine's sidecar, its memory, and what TensorRT says of it; or the engines of a folder.

    On a machine that can run the engine, it is loaded, which runs its maker's code on the GPU.

    Args:
        path: of an ``.engine`` file, or of a folder of them.

    Returns:
        Of a file: the sidecar's keys; ``memory`` (bytes on the device, see :func:`device_memory`); ``rebuild`` (the command
        that makes it again); ``loaded``: layers and activation memory by TensorRT's own word, or ``not_run`` and the reason.
        Of a folder: ``engines``, one entry per file (see :func:`_summary`); nothing is loaded.

    Raises:
        ArtifactMismatchError, ConfigError: see :func:`llama_export.engine.check.inspect_engine`; a folder without engines.
    """
    if path.is_dir():
        return {"folder": str(path), "engines": _summaries(path)}
    sidecar = inspect_engine(path)
    return {
        **sidecar.to_json(),
        "memory": device_memory(sidecar),
        "rebuild": rebuild_command(sidecar, path.parent.parent),
        "loaded": _loaded(path, sidecar),
    }


def _summaries(folder: Path) -> list[dict[str, Any]]:
    files = sorted({path.with_suffix(".engine") for pattern in ("*.engine", "*.json") for path in folder.glob(pattern)})
    if not files:
        raise ArtifactMismatchError(
            f"`{folder.name}` holds no engines", details={"folder": folder}, hint="make one: llama-export build BUNDLE"
        )
    return [_summary(path) for path in files]


def _summary(path: Path) -> dict[str, Any]:
    """``file``, and the facts of a sound engine, or the ``problem`` of another one."""
    try:
        sidecar = inspect_engine(path)
    except LlamaExportError as err:
        return {"file": printable(path.name), "problem": printable(err.message)}
    return {
        "file": printable(path.name),
        "backend": f"{sidecar.backend} {sidecar.backend_version}",
        "dtype": sidecar.dtype,
        "task": sidecar.task,
        "ops": sidecar.ops,
        "max_seq_len": sidecar.max_seq_len,
        "max_batch": sidecar.max_batch,
        "compute_capabilities": list(sidecar.compute_capabilities),
        "weights": sidecar.weights.mode,
        "bytes": sidecar.bytes,
    }


def device_memory(sidecar: EngineSidecar) -> dict[str, int]:
    """Bytes that a session keeps on the device, activations aside: TensorRT alone knows those."""
    batch = sidecar.max_batch
    cache = sum(_nbytes(entry, batch) for entry in sidecar.io if entry.alias_of is not None)
    logits = next((entry for entry in sidecar.io if entry.name == "logits"), None)
    wanted = min(MAX_LOGITS, sidecar.max_seq_len) if sidecar.kv_cache_capacity else sidecar.max_seq_len
    return {
        "engine": sidecar.bytes,
        "weights_outside_the_engine": sidecar.weights.bytes,
        "kv_cache_per_row": cache // batch,
        "kv_cache_at_max_batch": cache,
        "largest_logits": 0 if logits is None else _nbytes(logits, batch, wanted),
    }


def _nbytes(entry: EngineTensor, batch: int, other: int = 1) -> int:
    dims = [dim if isinstance(dim, int) else batch if dim == "batch_size" else other for dim in entry.shape]
    return math.prod(dims) * _ITEM_BYTES[entry.dtype]


def _loaded(path: Path, sidecar: EngineSidecar) -> dict[str, Any]:
    """The engine inspector's word. Not run on a GPU yet."""
    blocker = execution_blocker(sidecar.backend)
    if blocker is not None:
        return {"not_run": blocker}
    try:
        trt = load_backend(sidecar.backend)
        messages = message_log(trt)
        if sidecar.plugin_library is not None:
            plugins.register_library(trt, plugins.find_library())
        engine = trt.Runtime(messages).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            return {"not_run": printable("; ".join(messages.lines()))}
        inspector = engine.create_engine_inspector()
        return {
            "activation_bytes": engine.device_memory_size_v2,
            "layers": inspector.get_engine_information(trt.LayerInformationFormat.ONELINE).splitlines(),
        }
    except LlamaExportError as err:
        return {"not_run": printable(err.message)}


def print_engine(data: Mapping[str, Any], console: Console) -> None:
    """The same for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    data = printable_values(data)  # names come from files
    if "engines" in data:
        _print_engines(data, console)
        return
    facts = Table(show_header=False, box=None, pad_edge=False)
    settings, weights, library = data["settings"], data["weights"], data["plugin_library"]
    later = " and later ones it supports" if data["forward_compatible"] else ""
    inputs = f"{len(weights['tensors'])} tensors, {_size(weights['bytes'])}, bound from the bundle when it is loaded"
    rows = {
        "engine": f"{data['backend']} {data['backend_version']}, {data['dtype']}, {data['task']}, ops {data['ops']}",
        "model": f"{data['model']['num_hidden_layers']} layers, hidden {data['model']['hidden_size']}, "
        f"{data['model']['num_attention_heads']} heads, {data['model']['num_key_value_heads']} key/value heads, "
        f"vocabulary {data['model']['vocab_size']}",
        "serves": f"up to {data['max_seq_len']} tokens, batch 1..{data['max_batch']}",
        "GPUs": f"compute capability {', '.join(data['compute_capabilities'])}{later}",
        "plugins": "none" if library is None else f"version {library['version']}, ABI {library['abi']}",
        "weights": inputs if weights["mode"] == "input" else weights["mode"],
        "numerics": f"TF32 {'on' if settings['tf32'] else 'off'}, strongly typed",
        "built": f"in {data['build_seconds']:.1f} s by llama_export {data['created_by']['llama_export']}",
    }
    if data["weights_copied_per_run"]:
        rows["copied"] = f"in every run: {', '.join(data['weights_copied_per_run'])}"
    for name, value in rows.items():
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(facts)

    layers = Table("layer", "count", title="network layers", title_justify="left", box=None)
    plugin_layers = data["plugin_layers"]
    for name, count in sorted(data["layers"].items(), key=lambda item: (-item[1], item[0])):
        layers.add_row(escape(name), str(count))
        if name == "PLUGIN_V3":
            for op, number in plugin_layers.items():
                layers.add_row(escape(f"  {op}"), str(number))
    profiles = Table("profile", "input", "min", "opt", "max", title="profiles", title_justify="left", box=None)
    for profile, shapes in data["profiles"].items():
        for name, bounds in shapes.items():
            if not name.startswith("past_key_values.") or name == "past_key_values.0.key":
                label = name.replace(".0.key", ".*")
                profiles.add_row(
                    escape(profile), escape(label), *("x".join(str(dim) for dim in shape) for shape in bounds)
                )
    tensors = Table(
        "",
        "tensor",
        "dtype",
        "shape",
        "shares",
        title="inputs and outputs (of the cache: layer 0)",
        title_justify="left",
        box=None,
    )
    for entry in data["io"]:
        if ".0." in entry["name"] or not entry["name"].startswith(("past_key_values.", "present.")):
            shape = " x ".join(str(dim) for dim in entry["shape"])
            cells = (entry["kind"], entry["name"], entry["dtype"], shape, entry["alias_of"] or "")
            tensors.add_row(*map(escape, cells))
    memory = Table("memory on the device", "", box=None)
    for name, value in data["memory"].items():
        memory.add_row(name.replace("_", " "), _size(value))
    loaded = data["loaded"]
    memory.add_row("activations", _size(loaded["activation_bytes"]) if "activation_bytes" in loaded else "not read")
    for table in (layers, profiles, tensors, memory):
        console.print()
        console.print(table)
    if "not_run" in loaded:
        console.print(f"\nThe engine itself was not read: {loaded['not_run']}", highlight=False, markup=False)
    else:
        console.print(f"\n{len(loaded['layers'])} layers after fusion; --json lists them", highlight=False)
    console.print(f"again: {data['rebuild']}", highlight=False, markup=False, soft_wrap=True)


def _print_engines(data: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("engine", "backend", "computes", "serves", "GPUs", "size", box=None)
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut is no name
    for engine in data["engines"]:
        if "problem" in engine:
            table.add_row(Text(engine["file"]), Text(f"broken: {engine['problem']}", "red"))
            continue
        table.add_row(
            Text(engine["file"]),
            engine["backend"],  # these are names of a known form
            f"{engine['dtype']}, {engine['task']}, weights {engine['weights']}",
            f"{engine['max_seq_len']} tokens, batch {engine['max_batch']}",
            ", ".join(engine["compute_capabilities"]),
            _size(engine["bytes"]),
        )
    console.print(table)


def _size(nbytes: int) -> str:
    """1.25 GB; powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"
