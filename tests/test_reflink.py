"""Reflinks on real file systems: XFS and btrfs in small images, mounted by loop where this machine lets us.

Nothing here passes without having run: a test that cannot mount says in its skip reason what is missing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from conftest import TINY
from random_llama import write_random_checkpoint
from support import check_refused, snapshot, split_in_shards, trace_once

from llama_export.bundle.bundle import load_bundle
from llama_export.config.settings import ExportConfig
from llama_export.export.export import export_checkpoint
from llama_export.runtime.generation import generate
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

Capture = pytest.CaptureFixture[str]
WEIGHTS = "model.safetensors"
SYSTEMS = {
    "xfs": (320 << 20, ["mkfs.xfs", "-q", "-m", "reflink=1"]),
    "btrfs": (128 << 20, ["mkfs.btrfs", "-q"]),
}
"""File system -> the smallest image its mkfs takes, bytes (sparse), and how it is made."""
LARGE = {**TINY, "vocab_size": 20_011}
"""11.5 MB of float32 weights: many blocks, and far more than the graphs."""


@pytest.fixture(autouse=True)
def _one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)


def attempt(*command: object) -> None:
    """Runs a command of the system; what goes wrong is the reason to skip."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"`{' '.join(str(part) for part in command)}` failed: {done.stderr.strip() or done.returncode}")


def missing_to_mount(*tools: str) -> None:
    """Skips, naming what this machine lacks."""
    if os.geteuid() != 0:
        pytest.skip("not root: an image cannot be mounted")
    if lacking := [tool for tool in (*tools, "mount", "umount") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(lacking)}")


@pytest.fixture(scope="module", params=SYSTEMS)
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a fresh file system with reflinks."""
    size, make = SYSTEMS[request.param]
    missing_to_mount(make[0])
    folder = tmp_path_factory.mktemp(request.param)
    image, root = folder / "image", folder / "root"
    root.mkdir()
    with image.open("wb") as stream:
        stream.truncate(size)
    attempt(*make, image)
    attempt("mount", "-o", "loop", image, root)
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)
        image.unlink()


@pytest.fixture
def checkpoint(mounted: Path) -> Iterator[Path]:
    """A checkpoint there; everything is removed afterwards."""
    write_random_checkpoint(mounted / "checkpoint", LARGE)
    os.sync()
    yield mounted / "checkpoint"
    for path in mounted.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


_FIEMAP, _SYNC, _SHARED = 0xC020660B, 1, 0x2000


def extents(path: Path) -> list[tuple[int, int, bool]]:
    """(physical address, length in bytes, shared with another file) of a file's blocks, as the kernel tells (FIEMAP)."""
    room = 200
    with path.open("rb") as stream:
        request = bytearray(struct.pack("=QQLLLL", 0, 1 << 62, _SYNC, 0, room, 0) + bytes(56 * room))
        fcntl.ioctl(stream.fileno(), _FIEMAP, request)
    count = struct.unpack_from("=L", request, 20)[0]
    assert 0 < count < room
    found = [struct.unpack_from("=QQQ16xL", request, 32 + 56 * index) for index in range(count)]
    return [(physical, length, bool(flags & _SHARED)) for _, physical, length, flags in found]


def used(root: Path) -> int:
    """Bytes in use, everything written out."""
    os.sync()
    stat = os.statvfs(root)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def greedy(folder: Path) -> list[int]:
    session = OnnxRuntimeSession(load_bundle(folder), max_seq_len=16, threads=1)
    return generate(session, [[1, 5, 7]], max_new_tokens=3).tokens[0]


@pytest.mark.parametrize("shards", [1, 3])
def test_auto_shares_the_blocks_and_takes_no_space(shards: int, checkpoint: Path, mounted: Path) -> None:
    if shards > 1:
        split_in_shards(checkpoint, shards)
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    before = used(mounted)
    lines: list[str] = []
    result = export_checkpoint(checkpoint, mounted / "out", log=lines.append)
    assert result.weight_bytes_written == 0
    assert result.weight_bytes_referenced > 10_000_000
    assert used(mounted) - before < size / 5  # btrfs keeps its metadata twice
    assert any("share their blocks" in line for line in lines)
    assert not any("copying" in line for line in lines)
    for source in checkpoint.glob("*.safetensors"):
        target = mounted / "out" / source.name
        assert target.stat().st_ino != source.stat().st_ino
        assert target.stat().st_nlink == 1
        assert target.stat().st_mtime_ns == source.stat().st_mtime_ns
        assert extents(target) == extents(source)
        assert all(shared for _, _, shared in extents(target))
    onnx.load(str(mounted / "out" / "model.onnx"))  # a file of its own: no tool refuses it
    assert len(greedy(mounted / "out")) == 3


def test_a_change_of_either_file_leaves_the_other_alone(checkpoint: Path, mounted: Path) -> None:
    export_checkpoint(checkpoint, mounted / "out")
    source, target = checkpoint / WEIGHTS, mounted / "out" / WEIGHTS
    original = source.read_bytes()
    for changed, other in ((target, source), (source, target)):
        content = other.read_bytes()
        with changed.open("r+b") as stream:
            stream.seek(-5, os.SEEK_END)
            stream.write(b"HELLO")
        assert other.read_bytes() == content
        assert changed.read_bytes() != original
    assert not all(shared for _, _, shared in extents(target))


def test_copy_means_copy_also_where_reflinks_are_possible(checkpoint: Path, mounted: Path) -> None:
    size = (checkpoint / WEIGHTS).stat().st_size
    before = used(mounted)
    result = export_checkpoint(checkpoint, mounted / "out", ExportConfig(weights="copy"))
    assert result.weight_bytes_written == size
    assert used(mounted) - before > 0.9 * size
    assert not any(shared for _, _, shared in extents(mounted / "out" / WEIGHTS))


def test_hub_cache_is_reflinked_and_linked_to_its_blobs(checkpoint: Path, mounted: Path) -> None:
    blobs, folder = mounted / "models--x" / "blobs", mounted / "models--x" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for path in list(checkpoint.iterdir()):
        path.rename(blobs / path.name)
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    assert export_checkpoint(folder, mounted / "out").weight_bytes_written == 0
    placed = mounted / "out" / WEIGHTS
    assert not placed.is_symlink()
    assert extents(placed) == extents(blobs / WEIGHTS)
    export_checkpoint(folder, mounted / "linked", ExportConfig(weights="link"))
    assert (mounted / "linked" / WEIGHTS).lstat().st_ino == (blobs / WEIGHTS).stat().st_ino
    assert greedy(mounted / "linked") == greedy(mounted / "out")


def test_a_full_disk_is_no_obstacle_to_a_reflink(checkpoint: Path, mounted: Path, capsys: Capture) -> None:
    """Less space than the weights take: ``auto`` works, ``copy`` says so before it begins."""
    size = (checkpoint / WEIGHTS).stat().st_size
    ballast = mounted / "ballast"
    ballast.mkdir()
    for number in range(1000):
        stat = os.statvfs(mounted)
        free = stat.f_bavail * stat.f_frsize
        if free < size:
            break
        (ballast / str(number)).write_bytes(os.urandom(max(1 << 20, min(64 << 20, free - size))))
        os.sync()
    else:
        pytest.fail("the file system does not fill up")
    command = ["export", checkpoint, "-o", mounted / "copied"]
    check_refused(capsys, checkpoint, [*command, "--weights", "copy"], "no space left", "bytes free", exit_code=3)
    assert not (mounted / "copied").exists()
    assert export_checkpoint(checkpoint, mounted / "out").weight_bytes_written == 0
    assert len(greedy(mounted / "out")) == 3


def test_from_another_file_system_auto_copies_and_link_is_refused(
    mounted: Path, tmp_path: Path, capsys: Capture
) -> None:
    write_random_checkpoint(tmp_path / "checkpoint", TINY)
    if tmp_path.stat().st_dev == mounted.stat().st_dev:
        pytest.skip("the temporary folder lies on the mounted file system")
    lines: list[str] = []
    result = export_checkpoint(tmp_path / "checkpoint", mounted / "out", log=lines.append)
    assert result.weight_bytes_written == (tmp_path / "checkpoint" / WEIGHTS).stat().st_size
    assert any("copying the weights: the checkpoint lies on another file system" in line for line in lines)
    command = ["export", tmp_path / "checkpoint", "-o", mounted / "linked", "--weights", "link"]
    check_refused(capsys, tmp_path, command, "a hard link is not possible here", "cross-device", "--weights auto")
    shutil.rmtree(mounted / "out")


def test_read_only_source_is_exported_elsewhere_only(tmp_path: Path, capsys: Capture) -> None:
    """A read-only mount binds root too, whom modes do not."""
    missing_to_mount()
    write_random_checkpoint(tmp_path / "writable", TINY)
    source = tmp_path / "read-only"
    source.mkdir()
    attempt("mount", "--bind", tmp_path / "writable", source)
    try:
        attempt("mount", "-o", "remount,ro,bind", source)
        before = snapshot(source)
        for options in ([], ["--weights", "embed"]):
            check_refused(
                capsys, tmp_path, ["export", source, *options], "folder is read-only", str(source), "-o BUNDLE"
            )
        found = []
        for weights in ("auto", "copy", "embed"):
            export_checkpoint(source, tmp_path / weights, ExportConfig(weights=weights))  # type: ignore[arg-type]
            found.append(greedy(tmp_path / weights))
        assert found[0] == found[1] == found[2]
        # Another mount of the same file system: the kernel does not link across mounts.
        command = ["export", source, "-o", tmp_path / "linked", "--weights", "link"]
        check_refused(
            capsys, tmp_path, command, "a hard link is not possible here", "under one mount", "--weights auto"
        )
        assert snapshot(source) == before
    finally:
        subprocess.run(["umount", "--lazy", str(source)], check=True)
