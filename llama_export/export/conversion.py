"""A checkpoint's weight files in another dtype, tensor by tensor: the bundle becomes a Hugging Face checkpoint of that dtype.

Role: ``export --convert-weights``. :func:`plan_conversion` reads headers alone and says where every tensor will lie, so
that the graph can point there and the space be checked before a weight is read; :func:`write_conversion` then writes the
files in blocks of a few megabytes, whatever the size of a tensor.

The names of files and tensors, the shards and the files' metadata stay. Every float tensor is converted, also the heads that
the task does not use: the folder is the same checkpoint. RoPE's buffers in old checkpoints keep their bytes: they are
angles, not weights, and rounded ones would turn late positions by something else.

Numerics: one rounding to nearest, ties to even, subnormals included: what PyTorch's ``tensor.to(dtype)`` gives, bit by bit.
NaN stays NaN (its payload is the converter's own; PyTorch's depends on the CPU). A finite value that would become infinite
is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llama_export.bundle.destination import json_bytes
from llama_export.bundle.placement import Progress
from llama_export.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from llama_export.checkpoint.safetensors import (
    DTYPE_BYTES,
    DTYPE_OF_SAFETENSORS,
    TensorEntry,
    WeightFile,
    read_safetensors_header,
)
from llama_export.config.huggingface import load_json_object
from llama_export.errors import CheckpointError, ConfigError, MissingDependencyError

try:
    import ml_dtypes
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "ml_dtypes", "export") from err


_BLOCK_ELEMENTS = 1 << 22
"""Converted at a time: some 50 MB with everything that is derived from them."""
_NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SAFETENSORS_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_SAFETENSORS.items()}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What will be written."""

    checkpoint: Checkpoint
    """As it will be: the new dtypes, offsets, sizes and config; its ``folder`` is the source still. No modification times yet."""
    headers: Mapping[str, bytes]
    """File -> its beginning: the length field and the JSON header, padded to 8 bytes."""
    tensors: Mapping[str, list[tuple[TensorEntry, TensorEntry]]]
    """File -> (as stored, as written) of every tensor in it, in the order of the new file."""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.checkpoint.files)


def plan_conversion(checkpoint: Checkpoint, dtype: str) -> Conversion:
    """Where every tensor will lie, from headers alone.

    Args:
        checkpoint: not modified.
        dtype: float32, float16 or bfloat16.

    Raises:
        ConfigError: all weights have that dtype already.
    """
    stored = {entry.dtype for entry in checkpoint.tensors.values()}
    if stored == {dtype}:
        raise ConfigError(
            f"there is nothing to convert: all weights are stored in {dtype}",
            details={"checkpoint": checkpoint.folder, "got": f"dtype {dtype}", "expected": "another dtype than the stored one"},
            hint="leave --convert-weights out, or choose another --dtype",
        )  # fmt: skip
    headers, tensors, files = {}, {}, []
    for file in checkpoint.files:
        path = checkpoint.folder / file.name
        _, found = read_safetensors_header(path)
        headers[file.name], tensors[file.name] = _new_layout(_metadata(path), found, dtype)
        size = len(headers[file.name]) + sum(new.nbytes for _, new in tensors[file.name])
        files.append(WeightFile(file.name, size, 0, hashlib.sha256(headers[file.name]).hexdigest()))
    moved = {new.name: new for pairs in tensors.values() for _, new in pairs}
    planned = dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(checkpoint.config, dtype=dtype),
        tensors={name: moved[entry.name] for name, entry in checkpoint.tensors.items()},
        files=tuple(files),
    )
    return Conversion(planned, headers, tensors)


def _new_layout(
    metadata: Mapping[str, str], found: list[TensorEntry], dtype: str
) -> tuple[bytes, list[tuple[TensorEntry, TensorEntry]]]:
    """The new file's beginning and (as stored, as written) of its tensors: wide items first, so that all lie aligned."""
    goals = {entry.name: entry.dtype if _is_rotary(entry.name) else dtype for entry in found}
    ordered = sorted(found, key=lambda entry: (-DTYPE_BYTES[goals[entry.name]], entry.offset))
    header: dict[str, Any] = {"__metadata__": metadata}
    sizes, end = [], 0
    for entry in ordered:
        sizes.append(math.prod(entry.shape) * DTYPE_BYTES[goals[entry.name]])
        header[entry.name] = {
            "dtype": _SAFETENSORS_OF_DTYPE[goals[entry.name]],
            "shape": list(entry.shape),
            "data_offsets": [end, end + sizes[-1]],
        }
        end += sizes[-1]
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    begin = len(raw).to_bytes(8, "little") + raw
    pairs, offset = [], len(begin)
    for entry, nbytes in zip(ordered, sizes, strict=True):
        pairs.append((entry, dataclasses.replace(entry, dtype=goals[entry.name], offset=offset, nbytes=nbytes)))
        offset += nbytes
    return begin, pairs


def _is_rotary(name: str) -> bool:
    """A checkpoint that was opened holds no other tensor of such a name: see ``checkpoint._ROTARY``."""
    return "rotary_emb." in name


def _metadata(path: Path) -> dict[str, str]:
    """Of a file whose header was read before; transformers wants to see what made it."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header.get("__metadata__") or {"format": "pt"}


def write_conversion(conversion: Conversion, staging: Path, progress: Progress) -> int:
    """Writes the weight files, and ``config.json`` and the index, which state the dtype and the size.

    Returns:
        Bytes of weight files written.

    Raises:
        CheckpointError: a finite value would become infinite.
    """
    planned = conversion.checkpoint
    folder, dtype = planned.folder, planned.config.dtype
    for file in planned.files:
        with (staging / file.name).open("wb") as writer:
            done = writer.write(conversion.headers[file.name])
            for old, new in conversion.tensors[file.name]:
                for block in _converted(folder, old, new.dtype):
                    done += writer.write(block)
                    progress(file.name, done, file.size)
    config = load_json_object(folder / "config.json")
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = dtype
    (staging / "config.json").write_bytes(json_bytes(config))
    if planned.files[0].name != SINGLE_NAME:  # else an index, if there is one, is not read
        index = load_json_object(folder / INDEX_NAME)
        total = sum(new.nbytes for pairs in conversion.tensors.values() for _, new in pairs)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        (staging / INDEX_NAME).write_bytes(json_bytes(index))
    return conversion.nbytes


def _converted(folder: Path, entry: TensorEntry, dtype: str) -> Iterator[bytes]:
    """A tensor's content, block by block.

    Raises:
        CheckpointError: a finite value became infinite; all of the tensor is counted first.
    """
    lost, largest = 0, 0.0
    with (folder / entry.file).open("rb") as reader:
        reader.seek(entry.offset)
        left = math.prod(entry.shape)
        while left:
            block = _read_block(reader, entry, min(left, _BLOCK_ELEMENTS))
            left -= block.size
            converted = convert(block, dtype)
            overflowed = np.isinf(converted) & np.isfinite(block)
            if overflowed.any():
                lost += int(overflowed.sum())
                largest = max(largest, float(np.abs(block[overflowed]).max()))
            if not lost:
                yield converted.tobytes()
    if lost:
        limit = float(ml_dtypes.finfo(_NUMPY[dtype]).max)
        raise CheckpointError(
            f"tensor `{entry.name}` does not fit {dtype}: {lost} finite {'value' if lost == 1 else 'values'} would become infinite",
            details={
                "file": folder / entry.file,
                "got": f"magnitudes up to {largest:.6g} ({entry.dtype})",
                "expected": f"at most {limit:.6g}, the largest {dtype}",
            },
            hint="choose --dtype bfloat16 or float32" if dtype == "float16" else "choose --dtype float32",
        )


def _read_block(reader: BinaryIO, entry: TensorEntry, count: int) -> NDArray[Any]:
    data = reader.read(count * DTYPE_BYTES[entry.dtype])
    if len(data) != count * DTYPE_BYTES[entry.dtype]:
        raise CheckpointError(
            f"weight file `{entry.file}` became shorter while it was read",
            details={"tensor": entry.name, "got": f"{len(data)} bytes", "expected": f"{count * DTYPE_BYTES[entry.dtype]}"},
            hint="export again when nothing writes to the checkpoint",
        )  # fmt: skip
    return np.frombuffer(data, _NUMPY[entry.dtype])


def convert(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Another float dtype, rounded once to nearest, ties to even; too large becomes infinite, as in PyTorch.

    Args:
        values: [N], float32, float16 or ml_dtypes' bfloat16.
        dtype: float32, float16 or bfloat16.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        converted: NDArray[Any] = values.astype(_NUMPY[dtype], copy=False)
    return converted
