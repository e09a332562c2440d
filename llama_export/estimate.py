"""What an export or a build will cost, from ``config.json`` and the headers of the weight files; refused if it cannot fit.

Role: between the plans of an export or a build and their work. Nothing here opens a tensor, and nothing is written but a
probe for reflinks, which is removed again.

Each formula is a sum of products, fitted to whole processes on 2 cores of an AMD EPYC with 24 GB (2026-11-27, TensorRT-RTX
1.7, torch 2.13), 50 million to 405 billion parameters: ``benchmarks/results/estimates``. ``python benchmarks/estimates.py``
measures again and prints estimate beside measured; ``tests/test_estimate.py`` holds the formulas to the file: memory within
10 %, engines within 5 %, seconds within a factor of 2.

* Memory is exact enough to refuse on. Half or so of it is pages of files (libraries, mapped weights), which the system takes
  back when it needs them: only the rest, ``held_bytes``, must fit, and a refusal needs it to exceed by :data:`MARGIN` what
  is available.
* Seconds are CPU seconds of the whole process, imports included, on a machine like that one. A slow disk adds to them. Nothing
  is refused for them.

Source: https://docs.kernel.org/filesystems/proc.html#meminfo (MemAvailable),
https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max), https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_export.bundle import Bundle, Destination, shares_blocks
from llama_export.checkpoint import DTYPE_BYTES, Checkpoint, TensorEntry, read_safetensors_header
from llama_export.config import EngineConfig, ExportConfig, Task, expected_tensors
from llama_export.errors import ToolchainError
from llama_export.graph_io import INTERFACES

MARGIN = 1.1
"""A refusal for memory needs so many times what is available; the formulas are within 10 % of what was measured."""
_MB, _GB = 10**6, 10**9


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
        held = 0.335 * _GB + 0.4 * _MB * self.layers + (65 * _MB if self.converts else 0)
        seconds = 4.9 + 0.008 * self.layers + 2.5 * self.written_bytes / _GB + 1.4 * self.hashed_bytes / _GB
        return Estimate(
            disk_bytes=self.written_bytes,
            ram_bytes=round(held + 0.17 * _GB),
            held_bytes=round(held),
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildWork:
    """What decides the cost of an engine. Capacity, batch and the GPUs it is for do not: nothing is run."""

    layers: int
    profiles: int
    ops: str
    """``plugin``: all by plugins; ``native``: none; ``mixed``."""
    engine_weight_bytes: int
    """Inside the engine; 0 where weights are inputs."""
    mapped_bytes: int
    """Weight files that TensorRT's parser maps; 0 where weights are inputs or embedded."""
    embedded_bytes: int
    """Weights inside ``model.onnx``; else 0."""
    largest_cast_bytes: int
    """The largest weight, in the compute dtype, if it is stored in another; else 0."""

    @property
    def engine_bytes(self) -> int:
        """The weights, and for every profile its own kernels and graph, which repeats what lies around constants."""
        base, layer = {
            ("plugin", True): (0.5, 0.585),
            ("plugin", False): (0.6, 0.195),
            ("native", True): (2.2, 0.17),
            ("native", False): (2.1, 0.205),
        }.get((self.ops, self.engine_weight_bytes > 0), (0.6, 1.0))
        return round(self.engine_weight_bytes + self.profiles * (base + layer * self.layers) * _MB)

    def estimate(self) -> Estimate:
        """0.25 GB with the libraries, of which half are their pages; 1.8 MB a layer, with native ops 9.5 MB; and the engine
        twice, for the builder holds its weights and the plan at once.

        Mapped weights count as pages of a file; embedded ones are held twice, as a graph and as what the parser is given;
        a cast of the largest weight is held as well.

        Time: 0.7 s; a profile 0.05 s a layer with plugins, 0.055 s and 4.3 ms times the layers squared without (TensorRT's
        fusion of attention); 6 s a GB of engine, 4 s a GB of embedded weights.
        """
        engine, layers = self.engine_bytes, self.layers
        native = self.ops != "plugin"
        held = 0.125 * _GB + (9.5 if native else 1.8) * _MB * layers + 2 * engine
        held += 2 * self.embedded_bytes + self.largest_cast_bytes
        profile = 0.3 + 0.055 * layers + 0.0043 * layers**2 if native else 0.05 * layers
        seconds = 0.7 + self.profiles * profile + 6 * self.engine_weight_bytes / _GB + 4 * self.embedded_bytes / _GB
        return Estimate(
            disk_bytes=engine,
            ram_bytes=round(held + 0.125 * _GB + self.mapped_bytes),
            held_bytes=round(held),
            seconds=seconds,
        )


# ---- what decides the cost, from headers ------------------------------------------------------------------------


def export_work(
    checkpoint: Checkpoint, destination: Destination, config: ExportConfig, converted_bytes: int | None = None
) -> ExportWork:
    """Of an export that was planned.

    Args:
        checkpoint: as it is stored.
        destination: from :func:`llama_export.bundle.plan_destination`.
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
    hashed = 0 if config.weights == "embed" or not config.hash_weights else files if converted_bytes is None else written
    return ExportWork(
        layers=checkpoint.config.num_hidden_layers,
        written_bytes=written,
        hashed_bytes=hashed,
        converts=converted_bytes is not None,
    )


def _shares(checkpoint: Checkpoint, destination: Destination, config: ExportConfig) -> bool:
    return config.weights == "auto" and shares_blocks(checkpoint, destination.existing)


def build_work(bundle: Bundle, config: EngineConfig) -> BuildWork:
    """Of an engine of a bundle.

    Raises:
        CheckpointError: a weight file's header is broken (only where the bundle was opened without a look at it).
    """
    ops = {op in config.plugin_ops for op in bundle.ops}
    has_cache = INTERFACES[bundle.task].has_cache
    common = {"layers": bundle.config.num_hidden_layers, "profiles": config.profiles if has_cache else 1}
    kind = "plugin" if ops == {True} else "native" if ops == {False} else "mixed"
    if config.weights == "input":
        return BuildWork(
            **common, ops=kind, engine_weight_bytes=0, mapped_bytes=0, embedded_bytes=0, largest_cast_bytes=0
        )
    item = DTYPE_BYTES[bundle.dtype]
    shapes = {name: math.prod(shape) for name, shape in expected_tensors(bundle.config, bundle.task).items()}
    embedding = shapes[_EMBEDDING]
    stored = stored_dtype(bundle)
    inside = sum(shapes.values()) * item
    if stored != bundle.dtype:
        # The rows are looked up as they are stored and cast then; a tied output projection is a second copy.
        inside += embedding * DTYPE_BYTES[stored]
        if bundle.task != "causal-lm" or not bundle.config.tie_word_embeddings:
            inside -= embedding * item
    files = sum(entry["size"] for entry in bundle.manifest["weights"])
    return BuildWork(
        **common,
        ops=kind,
        engine_weight_bytes=inside,
        mapped_bytes=files,
        embedded_bytes=bundle.model_path.stat().st_size if bundle.is_embedded else 0,
        largest_cast_bytes=0 if stored == bundle.dtype else max(shapes.values()) * item,
    )


_EMBEDDING = "model.embed_tokens.weight"


def stored_dtype(bundle: Bundle) -> str:
    """The dtype of the embedding in the weight files; where they are embedded, by the size of the graph."""
    if bundle.is_embedded:
        values = sum(math.prod(shape) for shape in expected_tensors(bundle.config, _task(bundle)).values())
        wide = bundle.model_path.stat().st_size >= 3 * values
        return "float32" if wide else bundle.dtype if bundle.dtype != "float32" else "bfloat16"
    entries: Iterator[TensorEntry] = (
        entry
        for file in bundle.manifest["weights"]
        for entry in read_safetensors_header(bundle.folder / file["file"])[1]
    )
    return next((entry.dtype for entry in entries if entry.name.endswith("embed_tokens.weight")), bundle.dtype)
