"""What several test files share: runs of the command line in-process, comparison of folders, handmade safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import socket
import stat
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from llama_export.cli.main import main
from llama_export.errors import LlamaExportError
from llama_export.export import trace

T = TypeVar("T")
Snapshot = dict[str, tuple[object, ...]]
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
"""Hypothesis on a busy machine; fixtures are only read by the tests that use both."""
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1}


def snapshot(folder: Path) -> Snapshot:
    """Everything below a folder: kind, link target, content, size and modification time of files."""
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_dir():
            found[name] = ("folder",)
        else:
            stat = path.stat()
            found[name] = ("file", stat.st_size, stat.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def check_refused(
    capsys: pytest.CaptureFixture[str], root: Path, argv: Sequence[object], *parts: str, exit_code: int = 2
) -> str:
    """Runs the command line: it must stop with ``exit_code``, say every one of ``parts`` and a hint, and change nothing
    below ``root``. Returns what it printed on stderr."""
    before = snapshot(root)
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert code == exit_code, captured.err
    first = captured.err.splitlines()[0]
    assert first.startswith(("error: ", "export: ")), captured.err
    for part in parts:
        assert part in captured.err
    assert "\nhint: " in captured.err
    assert len(captured.err.split("\nhint: ")[1].strip()) > 5
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert snapshot(root) == before
    return captured.err


def check_export_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, *parts: str, options: Sequence[str] = ()
) -> None:
    """``export`` of a bad checkpoint, into another folder and in place."""
    root = checkpoint.parent
    check_refused(capsys, root, ["export", checkpoint, "-o", root / "out", *options], *parts)
    check_refused(capsys, root, ["export", checkpoint, *options], *parts)


def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets exports of one config share one trace, which is most of what a tiny export costs. The graph is read-only."""

    def graph_from_program(program: tuple[Any, ...], config: Any, task: Any) -> Any:
        if program not in _graphs:
            _graphs[program] = _graph_from_program(_trace_program(*program), config, task)
        return _graphs[program]

    monkeypatch.setattr(trace, "trace_program", lambda *arguments: arguments)
    monkeypatch.setattr(trace, "graph_from_program", graph_from_program)


_graphs: dict[Any, Any] = {}
_trace_program, _graph_from_program = trace.trace_program, trace.graph_from_program


def make_special(path: Path, kind: str) -> None:
    """A pipe that nobody writes to, a socket, a device that never ends, or a folder."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(path.parent)  # the path of a socket is short
            listener.bind(path.name)
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        except OSError as err:
            pytest.skip(f"no device can be made here: {err}")
    else:
        path.mkdir()


def refused_or(action: Callable[[], T], limit: int = 4_000_000) -> T | None:
    """What ``action`` returns, or None where it refuses; no other exception, and no more memory than ``limit`` bytes."""
    tracemalloc.start()
    try:
        return action()
    except LlamaExportError as err:
        str(err).encode()  # also with half a surrogate pair in a name
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit, peak


def json_paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, value in items for found in json_paths(value, (*path, key)))]


def with_json_at(data: Any, path: Sequence[Any], value: Any) -> Any:
    """The document with another value in one place."""
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = with_json_at(data[path[0]], path[1:], value)
    return copy


hostile_json = st.recursive(
    st.one_of(
        st.sampled_from([None, True, False, 0, -1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, 1e308, float("inf"), float("nan")]),
        st.sampled_from(["", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "model.onnx", "manifest.json", "1"]),
        st.integers(), st.floats(), st.text(max_size=8),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
"""What may stand where something else is expected."""


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file, as the format describes them."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_safetensors(path: Path, header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> None:
    """A file with any header, true or not; ``length`` overrides the length field."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> None:
    """A valid file of name -> (dtype, shape, content)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        assert len(content) == math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    write_safetensors(path, header, data)


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """The inverse of :func:`write_tensors`."""
    header, data = read_safetensors(path)
    header.pop("__metadata__", None)
    return {name: (item["dtype"], item["shape"], data[slice(*item["data_offsets"])]) for name, item in header.items()}


def split_in_shards(checkpoint: Path, parts: int = 2) -> list[Path]:
    """Rewrites ``model.safetensors`` as numbered shards and an index, as Hugging Face names them."""
    tensors = read_tensors(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names, weight_map, paths = list(tensors), {}, []
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        held = names[len(names) * part // parts : len(names) * (part + 1) // parts]
        write_tensors(checkpoint / file, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file)
        paths.append(checkpoint / file)
    total = sum(len(content) for _, _, content in tensors.values())
    write_index(checkpoint, weight_map, total)
    return paths


def write_index(checkpoint: Path, weight_map: object, total: int = 0) -> None:
    """``model.safetensors.index.json`` with any map."""
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def heed_ctrl_c() -> None:
    """For ``preexec_fn``: a job in the background of a script ignores SIGINT, and so would every program that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
