"""ONNX files that hold their weights: one file each, for models below protobuf's 2 GiB.

Role: ``export --weights embed``. A graph whose weights are references into safetensors files is written with the bytes
themselves in the references' place. They go from file to file in blocks, so that this costs no memory: a protobuf message
is a sequence of fields, each a tag, for text and messages a length, and the content; their order is free.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llama_export.bundle.placement import Progress
from llama_export.checkpoint.checkpoint import Checkpoint
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.errors import ExportError, MissingDependencyError

try:
    import onnx
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "onnx", "export") from err


MAX_BYTES = (1 << 31) - 1
"""The longest protobuf message."""
ROTARY = "model.rotary_emb."
"""Initializers whose names begin so are RoPE's frequencies, in every file; all others are the checkpoint's."""
_BLOCK_BYTES = 1 << 22
_ELEM_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
_LENGTH_DELIMITED = 2
"""Wire type of text, bytes and messages."""


def check_embeddable(nbytes: int, name: str) -> None:
    """Refuses what one protobuf message cannot hold.

    Args:
        nbytes: of the weights, or of the whole file once that is known.
        name: of the ONNX file.

    Raises:
        ExportError: 2 GiB or more.
    """
    if nbytes > MAX_BYTES:
        raise ExportError(
            f"`{name}` cannot hold the weights: an ONNX file must stay below 2 GiB, the limit of protobuf",
            details={"got": f"{nbytes:,} bytes", "expected": f"at most {MAX_BYTES:,} bytes"},
            hint="leave --weights embed out: in place (no -o) nothing is copied, and --weights auto, link or copy put the weights "
            "beside the graph; a 16-bit checkpoint is half the size (--convert-weights)",
        )


def write_embedded(proto: onnx.ModelProto, checkpoint: Checkpoint, path: Path, progress: Progress) -> int:
    """Writes a model with the content of its external weights inside.

    Args:
        proto: its external initializers are the checkpoint's tensors under their stored names; not modified.
        checkpoint: read block by block.
        path: file to make.

    Returns:
        Bytes of weights written.

    Raises:
        ExportError: the file would be 2 GiB or more; nothing is written.
    """
    entries = {entry.name: entry for entry in checkpoint.tensors.values()}
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    weights: list[tuple[bytes, TensorEntry]] = []
    for item in external_initializers(model):
        entry = entries[item.name]
        tensor = onnx.TensorProto(name=item.name, data_type=item.data_type, dims=item.dims).SerializeToString()
        tensor += _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, entry.nbytes)
        begin = _field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(tensor) + entry.nbytes) + tensor
        weights.append((begin, entry))
        model.graph.initializer.remove(item)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    inside = len(graph) + sum(len(begin) + entry.nbytes for begin, entry in weights)
    head = model.SerializeToString() + _field(onnx.ModelProto.GRAPH_FIELD_NUMBER, inside) + graph
    total = len(head) - len(graph) + inside
    check_embeddable(total, path.name)
    with path.open("wb") as writer:
        done = writer.write(head)
        for begin, entry in weights:
            done += writer.write(begin)
            for block in tensor_blocks(checkpoint.folder, entry):
                done += writer.write(block)
                progress(path.name, done, total)
    return sum(entry.nbytes for _, entry in weights)


def external_initializers(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Those whose content lies in another file."""
    return [item for item in proto.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]


def tensor_blocks(folder: Path, entry: TensorEntry) -> Iterator[bytes]:
    """A tensor's content, some megabytes at a time.

    Raises:
        ExportError: the file is shorter than its header said.
    """
    left = entry.nbytes
    with (folder / entry.file).open("rb") as reader:
        reader.seek(entry.offset)
        while left:
            block = reader.read(min(left, _BLOCK_BYTES))
            if not block:
                raise ExportError(
                    f"weight file `{entry.file}` became shorter while it was read",
                    details={"tensor": entry.name, "missing": f"{left} bytes"},
                    hint="export again when nothing writes to the checkpoint",
                )
            left -= len(block)
            yield block


def _field(number: int, nbytes: int) -> bytes:
    """What stands before a field of so many bytes: tag and length."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(nbytes)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def differing_weights(path: Path, checkpoint: Checkpoint) -> list[str]:
    """Stored names of the tensors that an ONNX file does not hold as the checkpoint does, byte for byte; or that only one has.

    Args:
        path: an ONNX file that holds its weights; all of it is read into memory.
        checkpoint: what it was made from.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    entries = {entry.name: entry for entry in checkpoint.tensors.values()}
    held = {item.name: item for item in graph.initializer if not item.name.startswith(ROTARY)}
    both = [name for name in entries if name in held]
    differing = [name for name in both if not _is_same(held[name], entries[name], checkpoint.folder)]
    return sorted(entries.keys() ^ held.keys()) + differing


def _is_same(item: onnx.TensorProto, entry: TensorEntry, folder: Path) -> bool:
    if (item.data_type, tuple(item.dims)) != (_ELEM_TYPES[entry.dtype], entry.shape):
        return False
    content, begin = memoryview(item.raw_data), 0
    if len(content) != entry.nbytes:
        return False
    for block in tensor_blocks(folder, entry):
        if content[begin : begin + len(block)] != block:
            return False
        begin += len(block)
    return True
