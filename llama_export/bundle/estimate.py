"""What an export or a build will cost, from ``config.json`` and the headers of the weight files.

Role: between the plans of an export or a build and their work. Nothing here opens a tensor, and nothing is written but a
probe for reflinks, which is removed again.

Each formula is a sum of products, fitted to whole processes on 2 cores of an AMD EPYC with 24 GB (2026-11-27, TensorRT-RTX
1.7, torch 2.13), 50 million to 405 billion parameters: ``benchmarks/results/estimates``. ``python benchmarks/estimates.py``
measures again and prints estimate beside measured; ``tests/test_estimate.py`` holds the formulas to the file: memory within
10 %, engines within 5 %, seconds within a factor of 2.

* Disk is known exactly, so what cannot be written is refused.
* Memory is predicted, so it is only warned about. Half or so of it is pages of files (libraries, mapped weights), which the
  system takes back when it needs them: only the rest, ``held_bytes``, must fit, and a warning needs it to exceed by
  :data:`MARGIN` what is available.
* Seconds are CPU seconds of the whole process, imports included, on a machine like that one. A slow disk adds to them.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from llama_export._system.process import available_memory
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.destination import Destination
from llama_export.bundle.placement import shares_blocks
from llama_export.checkpoint.checkpoint import Checkpoint
from llama_export.checkpoint.safetensors import DTYPE_BYTES
from llama_export.config.decoder import expected_tensors
from llama_export.config.llama import Task
from llama_export.config.settings import EngineConfig, ExportConfig
from llama_export.errors import ToolchainError
from llama_export.graph.io import INTERFACES

MARGIN = 1.1
"""A warning about memory needs so many times what is available; the formulas are within 10 % of what was measured."""
_MB, _GB = 10**6, 10**9
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one command will cost."""

    disk_bytes: int
    """Weights that an export writes, or the engine of a build; the graphs and the sidecar are a few megabytes at most."""
    ram_bytes: int
    """Peak resident memory of the process; what ``peak_rss_bytes`` will be."""
    held_bytes: int
    """The part of it that is no page of a file: it must fit."""
    seconds: float
    """CPU time of the process on a machine like the measured one."""

    def to_json(self) -> dict[str, float | int]:
        """For a result, beside what it really was."""
        return {"seconds": round(self.seconds, 1), "ram_bytes": self.ram_bytes, "disk_bytes": self.disk_bytes}


# ---- formulas ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportWork:
    """What decides the cost of an export. Two layers are traced whatever the model, so its size hardly counts."""

    layers: int
    written_bytes: int
    """Of weights; 0 in place, with reflinks and hard links."""
    hashed_bytes: int
    """Read once more for their SHA-256."""
    converts: bool
    """Weights are written in another dtype."""

    def estimate(self) -> Estimate:
        """0.50 GB with torch, of which 0.17 GB are libraries, and 0.4 MB a layer; the blocks of a conversion, 65 MB.

        Time: the imports and the trace 4.9 s, 8 ms a layer; 2.5 s a GB written, 1.4 s a GB hashed.
        """
        held = 0.326 * _GB + 0.4 * _MB * self.layers + (65 * _MB if self.converts else 0)
        seconds = 4.9 + 0.008 * self.layers + 2.5 * self.written_bytes / _GB + 1.4 * self.hashed_bytes / _GB
        return Estimate(
            disk_bytes=self.written_bytes,
            ram_bytes=round(held + 0.172 * _GB),
            held_bytes=round(held),
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildWork:
    """What decides the cost of an engine. Capacity, batch and the GPUs it is for do not: nothing is run."""

    layers: int
    profiles: int
    ops: str
    """``plugin``: all by plugins; ``mixed``: norms by TensorRT's own layers, attention by a plugin; ``native``: attention by
    TensorRT's own layers."""
    engine_weight_bytes: int = 0
    """Inside the engine; 0 where weights are inputs."""
    mapped_bytes: int = 0
    """Weight files that TensorRT's parser maps; 0 where weights are inputs or embedded."""
    embedded_bytes: int = 0
    """Weights inside ``model.onnx``; else 0."""
    largest_cast_bytes: int = 0
    """The largest weight, in the compute dtype, if it is stored in another; else 0."""

    @property
    def engine_bytes(self) -> int:
        """The weights, and for every profile kernels and a graph of its own, which grows with the layers."""
        base, layer = _ENGINE_MB[self.ops][self.engine_weight_bytes > 0]
        return round(self.engine_weight_bytes + self.profiles * (base + layer * self.layers) * _MB)

    def estimate(self) -> Estimate:
        """0.19 GB, and something for each layer; with constant weights 1.5 x the engine, for the builder holds the weights it was
        given and, while it serialises, those of the plan.

        Pages of files: 0.125 GB of libraries, and what is in memory at the peak of the weights that are mapped, whose pages are
        given back meanwhile. Embedded weights are held twice, as a graph and as what the parser is given; the largest one that is
        cast is held besides.

        Time: 0.7 s; for each profile something a layer, which with TensorRT's own attention grows with the number of layers;
        7 s a GB of weights in the engine, 4 s a GB of embedded ones.
        """
        engine, layers = self.engine_bytes, self.layers
        if self.engine_weight_bytes:
            held = 0.215 * _GB + _HELD_CONSTANT_MB[self.ops] * _MB * layers * self.profiles + 1.48 * engine
        else:
            held = 0.192 * _GB + _HELD_INPUT_MB[self.ops] * _MB * layers
        held += 2 * self.embedded_bytes + self.largest_cast_bytes
        seconds = 0.7 + self.profiles * layers * (_SECONDS[self.ops] + (0.0043 * layers if self.ops == "native" else 0))
        seconds += 7 * self.engine_weight_bytes / _GB + 4 * self.embedded_bytes / _GB
        return Estimate(
            disk_bytes=engine,
            ram_bytes=round(held + 0.125 * _GB + min(0.3 * self.mapped_bytes, 0.45 * _GB)),
            held_bytes=round(held),
            seconds=seconds,
        )


_ENGINE_MB = {
    "plugin": ((0.6, 0.195), (0.5, 0.585)),
    "mixed": ((0.6, 1.0), (0.6, 1.0)),
    "native": ((2.1, 0.205), (2.2, 0.17)),
}
"""Ops -> (weights as inputs, constant weights) -> MB of a profile, besides the weights: of any model, and for each layer."""
_HELD_INPUT_MB = {"plugin": 2.1, "mixed": 7.3, "native": 10.1}
"""Ops -> MB that the builder holds for each layer, where weights are inputs."""
_HELD_CONSTANT_MB = {"plugin": 0.0, "mixed": 2.0, "native": 4.4}
"""Ops -> the same for each layer and profile beside constant weights. ``mixed`` is a guess between the two."""
_SECONDS = {"plugin": 0.05, "mixed": 0.075, "native": 0.07}
"""Ops -> seconds for each layer of a profile."""


# ---- what decides the cost, from headers ------------------------------------------------------------------------


def export_work(
    checkpoint: Checkpoint, destination: Destination, config: ExportConfig, converted_bytes: int | None = None
) -> ExportWork:
    """Of an export that was planned.

    Args:
        checkpoint: as it is stored.
        destination: from :func:`llama_export.bundle.destination.plan_destination`.
        config: settings.
        converted_bytes: size of the weight files in another dtype; None: they are not converted.
    """
    files = sum(file.size for file in checkpoint.files)
    written = 0
    if config.weights == "embed":
        written = 2 * checkpoint.weight_bytes  # each of the two ONNX files holds them
    elif converted_bytes is not None:
        written = converted_bytes
    elif not (destination.in_place or config.weights == "link" or _shares(checkpoint, destination, config)):
        written = files
    hashed = (
        0 if config.weights == "embed" or not config.hash_weights else files if converted_bytes is None else written
    )
    return ExportWork(
        layers=checkpoint.config.num_hidden_layers,
        written_bytes=written,
        hashed_bytes=hashed,
        converts=converted_bytes is not None,
    )


def _shares(checkpoint: Checkpoint, destination: Destination, config: ExportConfig) -> bool:
    return config.weights == "auto" and shares_blocks(checkpoint, destination.existing)


def build_work(bundle: Bundle, config: EngineConfig) -> BuildWork:
    """Of an engine of a bundle. With its weights stripped, which is not measured: what it would be with them.

    Raises:
        CheckpointError: a weight file's header is broken (only where the bundle was opened without a look at it).
    """
    native = bundle.ops - config.plugin_ops
    layers = bundle.config.num_hidden_layers
    profiles = config.profiles if INTERFACES[bundle.task].has_cache else 1
    ops = "native" if any("Attention" in op for op in native) else "mixed" if native else "plugin"
    if config.weights == "input":
        return BuildWork(layers=layers, profiles=profiles, ops=ops)
    shapes = expected_tensors(bundle.config, cast(Task, bundle.task))
    values = {name: math.prod(shape) for name, shape in shapes.items()}
    embedding, stored = values[_EMBEDDING], stored_dtype(bundle)
    inside, largest_cast = sum(values.values()) * DTYPE_BYTES[bundle.dtype], 0
    if stored != bundle.dtype:
        # Rows of the embedding are looked up as they are stored; a tied output projection is a second copy, cast.
        is_tied = bundle.task == "causal-lm" and bundle.config.tie_word_embeddings
        inside += embedding * (DTYPE_BYTES[stored] - (0 if is_tied else DTYPE_BYTES[bundle.dtype]))
        largest_cast = max(values.values()) * DTYPE_BYTES[bundle.dtype]
    return BuildWork(
        layers=layers,
        profiles=profiles,
        ops=ops,
        engine_weight_bytes=inside,
        mapped_bytes=sum(entry.size for entry in bundle.manifest.weights),
        embedded_bytes=bundle.model_path.stat().st_size if bundle.is_embedded else 0,
        largest_cast_bytes=largest_cast,
    )


def stored_dtype(bundle: Bundle) -> str:
    """The dtype of the embedding in the weight files. Where they are embedded it is taken for the compute dtype."""
    embedding = (entry for name, entry in bundle.stored.items() if name.endswith("embed_tokens.weight"))
    return next((entry.dtype for entry in embedding), bundle.dtype)


# ---- what this machine has --------------------------------------------------------------------------------------


def free_disk(folder: Path) -> int | None:
    """Bytes that can be written below a folder that exists; None where the system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return None if usage.free == 0 and usage.total == 0 else usage.free


# ---- refusal ----------------------------------------------------------------------------------------------------


def estimate_export(
    checkpoint: Checkpoint,
    destination: Destination,
    config: ExportConfig,
    converted_bytes: int | None,
    log: Callable[[str], None],
) -> Estimate:
    """Logs what an export will cost, in one line.

    Raises:
        ToolchainError: the disk is too small, and ``config.ignore_estimate`` is off.
    """
    found = export_work(checkpoint, destination, config, converted_bytes).estimate()
    one_device = checkpoint.folder.stat().st_dev == destination.existing.stat().st_dev
    links = " or with --weights link" if one_device else ""  # hard links do not cross file systems
    if config.weights == "embed":
        disk_hint = "leave --weights embed out: in place (no -o) nothing is copied then"
    elif converted_bytes is not None:
        disk_hint = f"leave --convert-weights out: the graph casts, and in place (no -o){links} nothing is copied"
    else:
        disk_hint = f"export in place (without -o){links}: no weights are written then"
    refusal = _refusal(found, destination.existing, "weights", disk_hint)
    _say(f"export: {_line(found)} of weights to write", refusal, config.ignore_estimate, log)
    _warn_of_memory(found, "export", "end what uses the memory", log)
    return found


def estimate_build(bundle: Bundle, config: EngineConfig, log: Callable[[str], None]) -> Estimate:
    """Logs what a build will cost, in one line. A backend or a mode that was never measured is neither refused nor warned about.

    Raises:
        ToolchainError: the disk is too small, and ``config.ignore_estimate`` is off.
    """
    found = build_work(bundle, config).estimate()
    hint = ""
    if config.weights == "constant" and not bundle.is_embedded:
        other = build_work(bundle, dataclasses.replace(config, weights="input")).estimate()
        if other.disk_bytes < found.disk_bytes / 2:  # else it saves nothing: the model is tiny
            hint = f"--weights input needs {_size(other.held_bytes)} and writes an engine of {_size(other.disk_bytes)}"
            if (stored := stored_dtype(bundle)) != bundle.dtype:
                hint += f", once the bundle is exported with --dtype {stored} or --convert-weights"
    is_measured = config.backend == "tensorrt-rtx" and config.weights != "stripped"
    refusal = _refusal(found, bundle.folder, "the engine", hint) if is_measured else None
    note = "" if is_measured else " (not measured for this backend or these weights)"
    _say(f"build: {_line(found)} of engine to write{note}", refusal, config.ignore_estimate, log)
    if is_measured:
        _warn_of_memory(found, "build", hint or "end what uses the memory", log)
    return found


def _line(found: Estimate) -> str:
    pages = found.ram_bytes - found.held_bytes
    memory = f"{_size(found.ram_bytes)} of memory ({_size(pages)} of it pages of files)"
    return f"about {_duration(found.seconds)}, {memory}, {_size(found.disk_bytes)}"


def _refusal(found: Estimate, folder: Path, what: str, hint: str) -> ToolchainError | None:
    """Why the disk cannot hold it; None: it can, or the system does not tell."""
    free = free_disk(folder)
    if free is None or found.disk_bytes <= free:
        return None
    return ToolchainError(
        "no space left",
        details={"where": folder, "got": f"{free} bytes free", "expected": f"{found.disk_bytes} bytes of {what}"},
        hint="; ".join(part for part in ("free some space", hint, "or pass --ignore-estimate") if part),
    )


def _warn_of_memory(found: Estimate, command: str, hint: str, log: Callable[[str], None]) -> None:
    memory = available_memory()
    if memory is not None and found.held_bytes > MARGIN * memory:
        need = _size(found.held_bytes)
        log(f"{command}: warning: about {need} of memory are needed and {_size(memory)} are available; {hint}")


def _say(line: str, refusal: ToolchainError | None, ignore: bool, log: Callable[[str], None]) -> None:
    if refusal is None:
        log(line)
    elif ignore:
        log(f"{line}; warning: {refusal.message}, {refusal.details['got']}: going on for --ignore-estimate")
    else:
        raise refusal


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= 0.1 * size:
            return f"{nbytes / size:.{0 if nbytes >= 9.95 * size else 1}f} {unit}"
    return f"{nbytes} bytes"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
