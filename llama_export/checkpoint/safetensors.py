"""The header of a safetensors file: where every tensor lies, byte by byte.

Source: https://huggingface.co/docs/safetensors. Read here and not by the library, which does not tell byte offsets.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export._system.files import json_from_bytes, open_regular
from llama_export.config.limits import MAX_TENSORS
from llama_export.errors import CheckpointError

DTYPE_OF_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MAX_HEADER_BYTES = 8_000_000
"""The safetensors library allows 100 MB, which parsed would be gigabytes. A Llama of 4,096 layers needs 7 MB, the largest
published one below 0.2 MB."""
_MAX_RANK, _MAX_NAME = 8, 1000
"""Of a tensor, and of its name; a Llama has 2 at most, and names of 50 characters."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    """Name in the file, e.g. ``model.layers.0.mlp.up_proj.weight``."""
    dtype: str
    """float32 | float16 | bfloat16"""
    shape: tuple[int, ...]
    """As stored; linear weights are [out, in]."""
    file: str
    """File name inside the checkpoint folder."""
    offset: int
    """Bytes from the start of the file."""
    nbytes: int
    """Length in bytes."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file."""

    name: str
    size: int
    """Bytes."""
    mtime_ns: int
    header_sha256: str
    """Of the length field and the JSON header: names, dtypes, shapes and offsets of all tensors in it."""


def read_safetensors_header(path: Path) -> tuple[WeightFile, list[TensorEntry]]:
    """The header of one safetensors file, every offset checked against the file's size before use.

    Raises:
        CheckpointError: missing, not a regular file, not safetensors, truncated, or a dtype that is not a float this
            package exports.
    """
    hint = "download the file again: its size or content is not what its header says"
    try:
        with open_regular(path) as stream:
            stat = os.fstat(stream.fileno())
            length_field = stream.read(8)
            if len(length_field) < 8:
                raise _bad_file(path, f"{stat.st_size} bytes", "at least 8 bytes (the header's length)", hint)
            header_bytes = int.from_bytes(length_field, "little")
            if header_bytes > min(stat.st_size - 8, _MAX_HEADER_BYTES):
                raise _bad_file(
                    path,
                    f"a header of {header_bytes} bytes in a file of {stat.st_size}",
                    f"a header that fits the file, of at most {_MAX_HEADER_BYTES} bytes",
                    hint,
                )
            raw = stream.read(header_bytes)
    except FileNotFoundError:
        raise CheckpointError(
            f"weight file `{path.name}` is missing",
            details={"looked in": path.parent},
            hint="download the missing shard",
        ) from None
    except OSError as err:
        raise CheckpointError(
            f"weight file `{path.name}` cannot be read",
            details={"file": path, "reason": err.strerror or err, "expected": "a readable safetensors file"},
            hint="check its permissions, or download it again",
        ) from err
    try:
        if raw[:1] != b"{":
            raise ValueError("it does not begin with {")
        header = json_from_bytes(raw)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors, more than {MAX_TENSORS}")
        base = 8 + header_bytes
        entries = [_entry(path, name, item, base, stat.st_size, hint) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise _bad_file(path, f"a header that is not safetensors JSON ({err!r})", "safetensors", hint) from err
    end = base
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < end:
            raise _bad_file(
                path, f"`{entry.name}` overlapping its neighbour at byte {entry.offset}", "disjoint tensors", hint
            )
        if entry.offset > end:
            raise _bad_file(
                path, f"{entry.offset - end} unused bytes before `{entry.name}`", "tensors without holes", hint
            )
        end = entry.offset + entry.nbytes
    if end != stat.st_size:
        raise _bad_file(path, f"{stat.st_size} bytes", f"{end} bytes: nothing after the last tensor", hint)
    digest = hashlib.sha256(length_field + raw).hexdigest()
    return WeightFile(path.name, stat.st_size, stat.st_mtime_ns, digest), entries


def _entry(path: Path, name: str, item: Mapping[str, Any], base: int, size: int, hint: str) -> TensorEntry:
    if len(name.encode()) > _MAX_NAME:  # half a surrogate pair is a ValueError here
        raise ValueError(f"a tensor's name of {len(name)} characters")
    shape, offsets = item["shape"], item["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > _MAX_RANK or len(offsets) != 2:
        raise ValueError(f"a shape or offsets of `{name}` that are none")
    if not all(type(value) is int and 0 <= value < 2**63 for value in (*shape, *offsets)):
        raise _bad_file(
            path, f"`{name}` with shape {shape} and offsets {offsets}"[:400], "non-negative integers of 63 bits", hint
        )
    shape, (begin, end) = tuple(shape), offsets
    dtype = DTYPE_OF_SAFETENSORS.get(item["dtype"])
    if dtype is None:
        stated = str(item["dtype"])[:40]
        raise CheckpointError(
            f"tensor `{name}` has dtype {stated}",
            details={"file": path, "got": stated, "expected": " | ".join(DTYPE_OF_SAFETENSORS)},
            hint="export the original float checkpoint, not a quantised or integer one",
        )
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise _bad_file(path, f"`{name}` of {end - begin} bytes", f"{nbytes} bytes for {dtype} {list(shape)}", hint)
    if base + end > size:
        raise CheckpointError(
            f"weight file `{path.name}` is truncated",
            details={"file": path, "tensor": name, "got": f"{size} bytes", "expected": f"at least {base + end} bytes"},
            hint=hint,
        )
    return TensorEntry(name, dtype, shape, path.name, base + begin, nbytes)


def _bad_file(path: Path, got: str, expected: str, hint: str) -> CheckpointError:
    return CheckpointError(
        f"`{path.name}` is not a valid safetensors file",
        details={"file": path, "got": got, "expected": expected},
        hint=hint,
    )
