"""A bundle is written whole or not at all, and opened only if its files are the ones its manifest describes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BufferedWriter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY, MakeCheckpoint, edit_json
from hypothesis import given
from hypothesis import strategies as st
from random_llama import write_random_checkpoint
from support import (
    check_refused,
    hostile_json,
    json_paths,
    make_special,
    patient,
    read_safetensors,
    refused_or,
    snapshot,
    split_in_shards,
    trace_once,
    with_json_at,
    write_safetensors,
)

from llama_export._system import commit as _commit
from llama_export._system.commit import staging_folder
from llama_export._system.content import sha256_of_file
from llama_export.bundle import bundle as bundle_module
from llama_export.bundle import placement
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.bundle.destination import write_atomically
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.config.settings import ExportConfig
from llama_export.errors import (
    ArtifactMismatchError,
    CheckpointError,
    ConfigError,
    ExportError,
    LlamaExportError,
    ToolchainError,
)
from llama_export.export.export import export_checkpoint
from llama_export.model.loading import read_tensor
from llama_export.runtime.generation import generate
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

Capture = pytest.CaptureFixture[str]
WEIGHTS = "model.safetensors"
GRAPHS = ["model.onnx", "model.onnxruntime.onnx"]
SECOND = 1_000_000_000


@pytest.fixture(autouse=True)
def _one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def crash_process(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Runs beside the other tests of this file: it is the longest part."""
    seed = str(random.SystemRandom().randrange(1 << 32))
    command = [
        sys.executable,
        Path(__file__).with_name("crash_points.py"),
        tiny_checkpoint,
        tmp_path_factory.mktemp("crashes"),
        seed,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def bundle(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    """A bundle that the test may damage; modification times are those of the original."""
    return Path(shutil.copytree(tiny_bundles["float32"].folder, tmp_path / "bundle"))


def greedy(folder: Path) -> list[int]:
    """Three tokens: enough to read every weight."""
    session = OnnxRuntimeSession(load_bundle(folder), max_seq_len=16, threads=1)
    return generate(session, [[1, 5, 7]], max_new_tokens=3).tokens[0]


def set_time(path: Path, mtime_ns: int) -> None:
    os.utime(path, ns=(mtime_ns, mtime_ns))


# ---- how weights get there --------------------------------------------------------------------------------------


def test_in_place_writes_no_weight_byte_and_leaves_the_checkpoint_as_it_was(
    make_checkpoint: MakeCheckpoint, tiny_bundles: dict[str, Bundle]
) -> None:
    checkpoint = make_checkpoint()
    before, inode = snapshot(checkpoint), (checkpoint / WEIGHTS).stat().st_ino
    result = export_checkpoint(checkpoint)
    assert result.weight_bytes_written == 0
    assert result.weight_bytes_referenced == load_checkpoint(checkpoint).weight_bytes
    after = snapshot(checkpoint)
    assert set(after) - set(before) == {*GRAPHS, "manifest.json"}
    assert {name: after[name] for name in before} == before
    assert (checkpoint / WEIGHTS).stat().st_ino == inode
    assert greedy(checkpoint) == greedy(tiny_bundles["float32"].folder)


def test_output_that_is_the_checkpoint_itself_means_in_place(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    inode = (checkpoint / WEIGHTS).stat().st_ino
    result = export_checkpoint(checkpoint, checkpoint / ".." / checkpoint.name)
    assert result.weight_bytes_written == 0
    assert (checkpoint / WEIGHTS).stat().st_ino == inode
    load_bundle(checkpoint)


def test_in_place_refuses_an_existing_export_and_force_replaces_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    export_checkpoint(checkpoint)
    check_refused(
        capsys, tmp_path, ["export", checkpoint, "--dtype", "float16"], f"`{checkpoint}` already holds an export",
        "model.onnx, model.onnxruntime.onnx, manifest.json", "--force", "-o BUNDLE",
    )  # fmt: skip
    export_checkpoint(checkpoint, config=ExportConfig(hash_weights=True, force=True))
    assert load_bundle(checkpoint).manifest.weights[0].sha256 is not None


@pytest.mark.parametrize("leftover", ["model.onnx", "manifest.json", "engines"])
def test_in_place_takes_any_trace_of_an_export_for_one(
    leftover: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / leftover).mkdir()
    check_refused(capsys, tmp_path, ["export", checkpoint], "already holds an export", f"got: {leftover}")


@pytest.mark.parametrize("weights", ["auto", "copy"])
def test_copied_weights_are_files_of_their_own(weights: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = snapshot(tiny_checkpoint)
    seen: list[tuple[str, int, int]] = []
    result = export_checkpoint(
        tiny_checkpoint, tmp_path / "out", ExportConfig(weights=weights), progress=lambda *step: seen.append(step)
    )
    source, target = (tiny_checkpoint / WEIGHTS).stat(), (tmp_path / "out" / WEIGHTS).stat()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tiny_checkpoint / WEIGHTS).read_bytes()
    assert target.st_ino != source.st_ino
    assert target.st_mtime_ns == source.st_mtime_ns
    assert target.st_nlink == 1
    if weights == "copy":
        assert result.weight_bytes_written == source.st_size
        assert seen[-1] == (WEIGHTS, source.st_size, source.st_size)
    assert snapshot(tiny_checkpoint) == before
    assert snapshot(tmp_path / "out").keys() == {*GRAPHS, "manifest.json", "config.json", WEIGHTS}


def test_linked_weights_are_the_same_file(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    result = export_checkpoint(checkpoint, tmp_path / "out", ExportConfig(weights="link"))
    assert result.weight_bytes_written == 0
    assert (tmp_path / "out" / WEIGHTS).stat().st_ino == (checkpoint / WEIGHTS).stat().st_ino
    assert (checkpoint / WEIGHTS).stat().st_nlink == 2
    assert len(greedy(tmp_path / "out")) == 3


def test_impossible_hard_link_is_an_error_with_a_way_out(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    checkpoint = make_checkpoint()
    check_refused(
        capsys, tmp_path, ["export", checkpoint, "-o", tmp_path / "out", "--weights", "link"],
        "a hard link is not possible here", str(checkpoint / WEIGHTS), "cross-device", "--weights auto",
    )  # fmt: skip


def test_sharded_checkpoint_exports_with_its_index(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, tiny_bundles: dict[str, Bundle]
) -> None:
    checkpoint = make_checkpoint()
    shards = split_in_shards(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "out")
    opened = load_bundle(tmp_path / "out")
    assert [entry.file for entry in opened.manifest.weights] == [shard.name for shard in shards]
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert load_checkpoint(tmp_path / "out").config == opened.config
    assert greedy(tmp_path / "out") == greedy(tiny_bundles["float32"].folder)


def test_content_hashes_are_recorded_on_request(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_checkpoint, tmp_path / "out", ExportConfig(hash_weights=True))
    entry = load_bundle(tmp_path / "out").manifest.weights[0]
    assert entry.sha256 == sha256_of_file(tiny_checkpoint / WEIGHTS)
    export_checkpoint(tiny_checkpoint, tmp_path / "plain")
    assert load_bundle(tmp_path / "plain").manifest.weights[0].sha256 is None


def test_tokenizer_files_come_along_and_others_do_not(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "optimizer.pt", "README.md"):
        (checkpoint / name).write_text('{"eos_token_id": [2, 9]}')
    export_checkpoint(checkpoint, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()} - {*GRAPHS, "manifest.json", WEIGHTS}
    assert copied == {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert load_bundle(tmp_path / "out").manifest.eos_token_ids == (2, 9)


@pytest.mark.parametrize("stop", ["2", [2, "3"], [[2]], {"a": 2}, 2.5, True], ids=repr)
def test_stop_token_that_is_none_is_refused(
    stop: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    check_refused(
        capsys,
        tmp_path,
        ["export", checkpoint, "-o", tmp_path / "out"],
        "bad value for eos_token_id",
        f"got:      {stop}",
    )


def test_export_of_vouched_keys_opens_again(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", logit_bias=0)
    export_checkpoint(checkpoint, tmp_path / "out", ExportConfig(allow_config_keys=("logit_bias",)))
    assert load_bundle(tmp_path / "out").config == load_checkpoint(checkpoint, ["logit_bias"]).config


def test_bundle_may_be_moved(tiny_checkpoint: Path, tmp_path: Path, tiny_bundles: dict[str, Bundle]) -> None:
    export_checkpoint(tiny_checkpoint, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert greedy(tmp_path / "moved") == greedy(tiny_bundles["float32"].folder)


# ---- a hub cache ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_snapshot(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """The layout of ~/.cache/huggingface: a snapshot of links to blobs."""
    checkpoint = make_checkpoint()
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        path.rename(blobs / sha256_of_file(path))
    for blob in blobs.iterdir():
        (folder / (WEIGHTS if blob.stat().st_size > 10_000 else "config.json")).symlink_to(f"../../blobs/{blob.name}")
    checkpoint.rmdir()
    return folder


def test_hub_cache_is_not_written_into(hub_snapshot: Path, tmp_path: Path, capsys: Capture) -> None:
    check_refused(
        capsys,
        tmp_path,
        ["export", hub_snapshot],
        "symbolic links (a hub cache)",
        str(hub_snapshot),
        WEIGHTS,
        "-o BUNDLE",
    )


@pytest.mark.parametrize("weights", ["auto", "copy", "link"])
def test_hub_cache_is_exported_into_real_files(
    weights: Any, hub_snapshot: Path, tmp_path: Path, tiny_bundles: dict[str, Bundle]
) -> None:
    export_checkpoint(hub_snapshot, tmp_path / "out", ExportConfig(weights=weights))
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    assert greedy(tmp_path / "out") == greedy(tiny_bundles["float32"].folder)


# ---- where it may be written ------------------------------------------------------------------------------------


def test_output_that_is_a_file_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    (tmp_path / "out").write_text("mine")
    for options in ([], ["--force"]):
        check_refused(
            capsys, tmp_path, ["export", checkpoint, "-o", tmp_path / "out", *options],
            f"`{tmp_path / 'out'}` is not a folder", "a folder to be made", "choose another -o",
        )  # fmt: skip


@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_output_that_is_a_link_is_refused(
    target: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    check_refused(
        capsys,
        tmp_path,
        ["export", checkpoint, "-o", tmp_path / "out", "--force"],
        "is not a folder",
        "choose another -o",
    )


def test_output_below_a_file_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "out"
    check_refused(capsys, tmp_path, ["export", checkpoint, "-o", target], "cannot write", "check the path")


def test_output_whose_name_is_too_long_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    check_refused(
        capsys, tmp_path, ["export", checkpoint, "-o", tmp_path / ("x" * 300)], "File name too long", "x" * 300
    )


def test_folder_with_other_files_is_refused_with_and_without_force(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    command = ["export", checkpoint, "-o", tmp_path / "out"]
    check_refused(
        capsys, tmp_path, command, f"output folder `{tmp_path / 'out'}` exists", "a new or empty folder", "--force"
    )
    check_refused(
        capsys,
        tmp_path,
        [*command, "--force"],
        "is not a bundle, so --force does not replace it",
        "missing: manifest.json",
    )


def test_existing_bundle_is_replaced_only_with_force(
    bundle: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint(seed=1)
    (bundle / "engines").mkdir()
    (bundle / "engines" / "old.engine").write_bytes(b"made from the old graph")
    check_refused(capsys, tmp_path, ["export", checkpoint, "-o", bundle], f"output folder `{bundle}` exists", "--force")
    export_checkpoint(checkpoint, bundle, ExportConfig(force=True))
    assert (bundle / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    assert not (bundle / "engines").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    load_bundle(bundle)


def test_folder_that_holds_the_checkpoint_is_never_replaced(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    inner = bundle / "original"
    inner.mkdir()
    shutil.copy2(bundle / WEIGHTS, inner)
    shutil.copy2(bundle / "config.json", inner)
    check_refused(
        capsys,
        tmp_path,
        ["export", inner, "-o", bundle, "--force"],
        f"`{bundle}` holds the checkpoint itself",
        str(inner),
    )


def test_empty_folder_and_missing_parents_are_accepted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export_checkpoint(tiny_checkpoint, tmp_path / "empty")
    export_checkpoint(tiny_checkpoint, tmp_path / "a" / "b" / "out")
    assert load_bundle(tmp_path / "empty").manifest.graph_sha256 == (
        load_bundle(tmp_path / "a" / "b" / "out").manifest.graph_sha256
    )


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Takes the right to write from a folder, also where tests run as root, for whom modes do not bind."""

    def protect(folder: Path) -> None:
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path) == folder)
        )

    return protect


def test_read_only_parent_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, read_only: Callable[[Path], None]
) -> None:
    checkpoint = make_checkpoint()
    read_only(tmp_path)
    check_refused(
        capsys,
        tmp_path,
        ["export", checkpoint, "-o", tmp_path / "a" / "out"],
        f"`{tmp_path}` is not writable",
        "another -o",
    )


def test_read_only_checkpoint_is_not_exported_in_place(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, read_only: Callable[[Path], None]
) -> None:
    checkpoint = make_checkpoint()
    read_only(checkpoint)
    check_refused(capsys, tmp_path, ["export", checkpoint], "folder is read-only", str(checkpoint), "-o BUNDLE")
    export_checkpoint(checkpoint, tmp_path / "out")
    load_bundle(tmp_path / "out")


# ---- a full disk ------------------------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=0, free=12_345))
    monkeypatch.setattr(placement, "_can_reflink", lambda source, folder: False)
    size = (checkpoint / WEIGHTS).stat().st_size
    check_refused(
        capsys, tmp_path, ["export", checkpoint, "-o", tmp_path / "new" / "out"], "no space left", "12345 bytes free",
        f"{size} bytes of weights", str(tmp_path), "export in place", exit_code=3,
    )  # fmt: skip


def test_little_space_is_enough_where_no_weights_are_copied(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, used=0, free=12_345))
    export_checkpoint(checkpoint, tmp_path / "linked", ExportConfig(weights="link"))
    export_checkpoint(checkpoint)
    monkeypatch.setattr(placement, "_can_reflink", lambda source, folder: True)
    export_checkpoint(checkpoint, tmp_path / "reflinked", ExportConfig(weights="auto"))


class SmallDisk:
    """Files opened through pathlib can take ``budget`` bytes in all; then the disk is full, in the middle of a write."""

    def __init__(self, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = budget
        opened = Path.open
        disk = self

        class File(BufferedWriter):
            def write(self, data: Any) -> int:
                fits = min(len(data), disk.left)
                disk.left -= fits
                super().write(data[:fits])
                if fits < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return fits

        def limited(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return File(opened(path, mode, buffering=0)) if mode == "wb" else opened(path, mode, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "open", limited)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.06, 0.3, 0.95, 0.999])
@pytest.mark.parametrize("output", ["new", "deep", "replace"])
def test_disk_that_fills_up_while_writing_leaves_what_was_there(
    share: float, output: str, bundle: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    needed = sum((bundle / name).stat().st_size for name in [*GRAPHS, "manifest.json", WEIGHTS])
    target = {"new": tmp_path / "out", "deep": tmp_path / "a" / "b" / "out", "replace": bundle}[output]
    checkpoint = make_checkpoint(seed=1)
    SmallDisk(int(share * needed), monkeypatch)
    check_refused(
        capsys, tmp_path, ["export", checkpoint, "-o", target, "--force", "--weights", "copy"], "no space left",
        f"where:    {target.parent}", "No space left on device", "free some space", exit_code=3,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_disk_that_fills_up_in_place_leaves_the_checkpoint_alone(
    share: float, bundle: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    needed = sum((bundle / name).stat().st_size for name in [*GRAPHS, "manifest.json"])
    checkpoint = make_checkpoint()
    SmallDisk(int(share * needed), monkeypatch)
    check_refused(capsys, tmp_path, ["export", checkpoint], "no space left", f"where:    {checkpoint}", exit_code=3)


@pytest.mark.parametrize(
    ("call", "number", "code", "exit_code", "message"),
    [
        ("fsync", errno.ENOSPC, "No space left on device", 3, "no space left"),
        ("fsync", errno.EDQUOT, "quota exceeded", 3, "no space left"),
        ("fsync", errno.EIO, "Input/output error", 2, "cannot write"),
        ("rename", errno.EACCES, "Permission denied", 2, "cannot write"),
    ],
)
def test_failure_at_the_end_leaves_nothing(
    call: str, number: int, code: str, exit_code: int, message: str, make_checkpoint: MakeCheckpoint, tmp_path: Path,
    capsys: Capture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = 0

    def fail(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 or call == "rename":
            raise OSError(number, os.strerror(number), str(args[0]))
        return original(*args)

    original = getattr(os, call)
    monkeypatch.setattr(os, call, fail)
    checkpoint = make_checkpoint()
    place = [["-o", tmp_path / "out"]] if call == "rename" else [["-o", tmp_path / "out"], []]
    for where in place:
        calls = 0
        check_refused(capsys, tmp_path, ["export", checkpoint, *where], message, code, exit_code=exit_code)


def refusal() -> Callable[..., None]:
    """A system call that is not permitted."""

    def fail(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))

    return fail


@pytest.mark.parametrize("can_exchange", [True, False])
def test_bundle_that_cannot_be_replaced_stays(
    can_exchange: bool,
    bundle: Path,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = make_checkpoint(seed=1)
    monkeypatch.setattr(_commit, "exchange", refusal() if can_exchange else lambda left, right: False)
    monkeypatch.setattr(os, "rename", refusal())
    command = ["export", checkpoint, "-o", bundle, "--force"]
    check_refused(capsys, tmp_path, command, "cannot write", "Permission denied")
    load_bundle(bundle)


def test_replacement_is_the_same_where_names_cannot_be_exchanged(
    bundle: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(seed=1)
    (bundle / "engines").mkdir()
    (bundle / "engines" / "old.engine").touch()
    (bundle / "tokenizer.json").write_text("of the old model")
    monkeypatch.setattr(_commit, "exchange", lambda left, right: False)
    export_checkpoint(checkpoint, bundle, ExportConfig(force=True))
    assert snapshot(bundle).keys() == {*GRAPHS, "manifest.json", "config.json", WEIGHTS}
    assert (bundle / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    load_bundle(bundle)


def test_this_file_system_exchanges_names_or_says_that_it_cannot(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    exchanged = _commit.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / ("was-b" if exchanged else "was-a")).exists()
    with pytest.raises(FileNotFoundError):
        _commit.exchange(tmp_path / "a", tmp_path / "missing")


# ---- a commit that was cut off ----------------------------------------------------------------------------------


@pytest.fixture
def cut_off(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export in place over another, whose first file alone was moved: the next cannot be."""
    checkpoint = make_checkpoint()
    export_checkpoint(checkpoint)
    replace = os.replace

    def fail_at_the_second(source: Path, target: Path) -> None:
        if Path(source).name == "model.onnxruntime.onnx":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail_at_the_second)
        with pytest.raises(ExportError, match="everything is written, but not all of it could be moved") as caught:
            export_checkpoint(checkpoint, config=ExportConfig(hash_weights=True, force=True))
    assert caught.value.details["reason"] == "Read-only file system"
    assert sorted(path.name for path in (checkpoint / _commit.COMMIT_NAME).iterdir()) == ["manifest.json", GRAPHS[1]]
    return checkpoint


def test_the_next_to_open_a_folder_finishes_what_was_cut_off(cut_off: Path) -> None:
    assert load_bundle(cut_off).manifest.weights[0].sha256 is not None
    assert not (cut_off / _commit.COMMIT_NAME).exists()


def test_the_next_export_replaces_what_was_cut_off_with_force_only(
    cut_off: Path, tmp_path: Path, capsys: Capture
) -> None:
    check_refused(capsys, tmp_path, ["export", cut_off], "already holds an export", _commit.COMMIT_NAME)
    export_checkpoint(cut_off, config=ExportConfig(force=True))
    assert load_bundle(cut_off).manifest.weights[0].sha256 is None
    assert not (cut_off / _commit.COMMIT_NAME).exists()


def test_read_only_folder_with_a_commit_that_was_cut_off_says_so(
    cut_off: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A really read-only mount, if this is root; else modes."""
    mounted = os.geteuid() == 0 and _mount(tmp_path, "--bind", str(cut_off), str(cut_off)) and _mount(
        tmp_path, "-o", "remount,bind,ro", str(cut_off)
    )  # fmt: skip
    if not mounted and os.geteuid() == 0:
        pytest.skip("root may write everywhere, and may not mount here")
    if not mounted:
        cut_off.chmod(0o555)
    try:
        check_refused(
            capsys, tmp_path, ["inspect", cut_off], "was interrupted while its files were moved into place",
            f"waiting: {cut_off / _commit.COMMIT_NAME}", "Read-only file system" if mounted else "Permission denied",
            "make the folder writable once",
        )  # fmt: skip
    finally:
        if mounted:
            subprocess.run(["umount", cut_off], check=True)
        else:
            cut_off.chmod(0o755)
    load_bundle(cut_off)


def _mount(root: Path, *arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False, cwd=root).returncode == 0


def test_many_processes_finish_and_commit_at_once(tmp_path: Path) -> None:
    """Three writers of pairs and two that only finish, in one folder: a pair is never mixed, and nothing stays behind."""
    script = """
import os, sys
from pathlib import Path
from llama_export._system.commit import commit, finish_commit
folder, name = Path(sys.argv[1]), sys.argv[2]
for number in range(60):
    if name.startswith("reader"):
        finish_commit(folder)
        continue
    staging = folder / f".{name}.partial"
    staging.mkdir()
    for file in ("x.engine", "x.json"):
        (staging / file).write_text(f"{name} {number}")
    commit(staging, folder)
"""
    names = ["writer1", "writer2", "writer3", "reader1", "reader2"]
    running = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, name], stderr=subprocess.PIPE) for name in names
    ]
    for process in running:
        with process:
            assert process.stderr is not None
            log = process.stderr.read()
        assert process.returncode == 0, log.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.json"]
    assert (tmp_path / "x.engine").read_text() == (tmp_path / "x.json").read_text()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc/x"])
def test_hostile_commit_folder_removes_nothing_elsewhere(name: str, bundle: Path, tmp_path: Path) -> None:
    pending = bundle / _commit.COMMIT_NAME
    pending.mkdir()
    (pending / ".obsolete").write_bytes(name.encode() + b"\0../precious")
    (tmp_path / "precious").touch()
    load_bundle(bundle)
    assert not pending.exists()
    assert (tmp_path / "precious").exists()


def test_commit_folder_that_is_a_link_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.onnx").write_bytes(b"foreign")
    (bundle / _commit.COMMIT_NAME).symlink_to(tmp_path / "elsewhere")
    load_bundle(bundle)
    assert (tmp_path / "elsewhere" / "model.onnx").exists()


def test_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, b"old")
    with monkeypatch.context() as patched:
        SmallDisk(3, patched)
        with pytest.raises(ToolchainError, match="no space left"):
            write_atomically(path, b"newer")
    assert snapshot(tmp_path).keys() == {"report.json"}
    assert path.read_bytes() == b"old"
    write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    with pytest.raises(ExportError, match="cannot write") as caught:
        write_atomically(tmp_path / "missing" / "report.json", b"")
    assert caught.value.details == {"reason": "No such file or directory"}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``tiny_disk(bytes)`` -> a file system of that size, which really fills up."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: int) -> Path:
        if os.geteuid() != 0 or not _mount(tmp_path, "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)):
            pytest.skip("a file system can be mounted by root alone")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("free", [0, 8192, 32_768, 65_536, 393_216, 524_288])
@pytest.mark.parametrize("how", ["in-place", "replace", "new"])
def test_disk_that_is_really_full_keeps_the_old_bundle(
    how: str, free: int, bundle: Path, tiny_disk: Callable[[int], Path], tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    disk = tiny_disk(2 << 20)
    shutil.copytree(bundle, disk / "bundle")
    output = {"in-place": None, "replace": disk / "bundle", "new": disk / "out"}[how]
    source = disk / "bundle" if how == "in-place" else make_checkpoint(seed=1)
    (disk / "fill").write_bytes(bytes(shutil.disk_usage(disk).free - free))
    before = snapshot(disk)
    config = ExportConfig(force=True, hash_weights=True, weights="copy")
    fits = free >= {"in-place": 65_536}.get(how, 524_288)
    with contextlib.nullcontext() if fits else pytest.raises(ToolchainError, match="no space left"):
        export_checkpoint(source, output, config)
    assert (snapshot(disk) == before) != fits
    load_bundle(disk / "bundle")


# ---- killed -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crashes(crash_process: subprocess.Popen[str]) -> dict[str, list[dict[str, Any]]]:
    """What :mod:`crash_points` saw. Its seed is random and part of its output: any moment must do."""
    output, log = crash_process.communicate(timeout=600)
    assert crash_process.returncode == 0, f"{crash_process.args}\n{log}"
    found: dict[str, list[dict[str, Any]]] = json.loads(output)
    return found


def test_at_least_fifty_kills_are_tried(crashes: dict[str, list[dict[str, Any]]]) -> None:
    assert len(crashes["moments"]) + len(crashes["changes"]) >= 50


def test_export_killed_at_a_random_moment_leaves_nothing_or_a_whole_bundle(
    crashes: dict[str, list[dict[str, Any]]],
) -> None:
    assert len(crashes["moments"]) == 8
    for crash in crashes["moments"]:
        assert crash["state"] in ("absent", "complete"), crash


@pytest.mark.parametrize(
    ("scenario", "before", "commits"),
    [
        *(("new", "absent", False), ("in-place", "absent", True), ("in-place-over", "old", True)),
        *(("replace", "old", False), ("replace-without-exchange", "old", True)),
        *(("engine", "absent", True), ("engine-over", "old", True)),
    ],
)
def test_killed_between_any_two_changes_there_is_the_old_or_the_new(
    scenario: str, before: str, commits: bool, crashes: dict[str, list[dict[str, Any]]]
) -> None:
    """An export into a new folder, in place, over another; an engine and its sidecar, new and over others."""
    found = [crash for crash in crashes["changes"] if crash["scenario"] == scenario]
    states = [crash["state"] for crash in found]
    first_new = states.index("complete")
    assert states == [before] * first_new + ["complete"] * (len(found) - first_new), found
    assert len(found) >= 8
    assert max(crash["partial"] for crash in found) >= 1  # the kills did land in the middle
    pending = [crash["pending"] for crash in found]
    assert max(pending) == commits
    assert not any(pending[:first_new])  # a commit folder means: the new one counts


def test_killed_export_never_touches_the_checkpoint(crashes: dict[str, list[dict[str, Any]]]) -> None:
    assert all(crash["weights"] for crash in crashes["moments"] + crashes["changes"])


def test_next_export_succeeds_and_removes_what_a_killed_one_left(crashes: dict[str, list[dict[str, Any]]]) -> None:
    for crash in crashes["moments"] + crashes["changes"]:
        assert (crash["next"], crash["next_state"], crash["next_partial"]) == (0, "complete", []), crash


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny layers under 60 MB of embeddings: there is time to kill the copy."""
    folder = tmp_path_factory.mktemp("slow") / "checkpoint"
    config = {**TINY, "vocab_size": 200_000, "tie_word_embeddings": True}
    write_random_checkpoint(folder, {**config, "vocab_size": 97})
    edit_json(folder / "config.json", vocab_size=200_000)
    header, data = read_safetensors(folder / WEIGHTS)
    grown = 200_000 * 72 * 4 - 97 * 72 * 4
    for name, item in header.items():
        begin, end = item["data_offsets"]
        first = name == "model.embed_tokens.weight"
        item["data_offsets"] = [begin if first else begin + grown, end + grown]
    header["model.embed_tokens.weight"]["shape"] = [200_000, 72]
    write_safetensors(folder / WEIGHTS, header, bytes(grown) + data)
    load_checkpoint(folder)
    return folder


def test_terminated_export_leaves_nothing(slow_checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "llama_export",
        "export",
        slow_checkpoint,
        "-o",
        tmp_path / "out",
        "--weights",
        "copy",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob(".llama-export-*.partial")) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            output, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, log
    assert "Traceback" not in log
    assert output == ""
    assert snapshot(tmp_path) == {}


def test_signal_in_the_middle_of_the_copy_leaves_nothing(crashes: dict[str, list[dict[str, Any]]]) -> None:
    assert crashes["polite"] == [
        {"signal": "SIGTERM", "code": 143, "left": []},
        {"signal": "SIGINT", "code": 130, "left": []},
    ]


def test_export_removes_what_dead_processes_left_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A folder is in use while it is locked, whoever's process id is in whose container."""
    (tmp_path / ".llama-export-0123456789ab.partial").mkdir()
    (tmp_path / ".llama-export-0123456789ab.partial" / "model.onnx").touch()
    others = [".llama-export-notes.partial", "llama-export-1.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    program = (
        "import sys; from pathlib import Path; from llama_export._system.commit import staging_folder\n"
        "with staging_folder(Path(sys.argv[1])) as folder: print(folder.name, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive:
        assert alive.stdout is not None
        in_use = alive.stdout.readline().strip()
        (tmp_path / ".llama-export-ba9876543210.partial").mkdir()
        export_checkpoint(tiny_checkpoint, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, in_use, "out"])
        alive.kill()
    export_checkpoint(tiny_checkpoint, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "again", "out"])


def test_threads_that_export_into_one_folder_do_not_meet(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = [pool.submit(_stage, tmp_path, number) for number in range(16)]
        assert sorted(item.result() for item in made) == list(range(16))
    assert not list(tmp_path.iterdir())


def _stage(home: Path, number: int) -> int:
    with staging_folder(home) as folder:
        (folder / "file").write_text(str(number))
        time.sleep(0.01)
        return int((folder / "file").read_text())


# ---- opening ----------------------------------------------------------------------------------------------------


def test_untouched_bundle_opens(tiny_bundles: dict[str, Bundle], tiny_checkpoint: Path) -> None:
    for dtype, opened in tiny_bundles.items():
        assert opened.dtype == dtype
        assert opened.config == load_checkpoint(tiny_checkpoint).config
        assert opened.model_path.name == "model.onnx"
        assert opened.onnxruntime_path.name == "model.onnxruntime.onnx"
        assert opened.engines == []


def test_only_engines_with_a_sidecar_are_listed(bundle: Path) -> None:
    (bundle / "engines").mkdir()
    for name in ("b.engine", "b.json", "a.engine", "a.json", "half.engine"):
        (bundle / "engines" / name).touch()
    assert [path.name for path in load_bundle(bundle).engines] == ["a.engine", "b.engine"]


def test_folder_without_a_manifest_is_no_bundle(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    command = ["run", checkpoint, "--tokens", "1"]
    check_refused(
        capsys,
        tmp_path,
        command,
        f"`{checkpoint}` is not a bundle",
        "missing: manifest.json",
        f"llama-export export {checkpoint}",
    )
    check_refused(capsys, tmp_path, ["inspect", tmp_path / "no"], "no folder", "check the path")


@pytest.mark.parametrize("version", [0, 2, "1", None, ...], ids=str)
def test_other_schema_version_is_refused_not_guessed(
    version: Any, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    edit_json(bundle / "manifest.json", schema_version=version)
    got = None if version is ... else version
    check_refused(
        capsys,
        tmp_path,
        ["inspect", bundle],
        "another schema version",
        f"got:      {got}",
        "expected: 1",
        "export again",
    )


@pytest.mark.parametrize("key", ["model", "dtype", "eos_token_ids", "weights", "functions"])
@pytest.mark.parametrize("value", [..., None, 5, "text", ["text"], {"a": 1}], ids=repr)
def test_manifest_with_a_wrong_field_is_refused(
    key: str, value: Any, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    edit_json(bundle / "manifest.json", **{key: value})
    check_refused(
        capsys, tmp_path, ["inspect", bundle], "`manifest.json` lacks a field or holds a wrong one", "export again"
    )


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\0b", "..\\x"], ids=repr)
@pytest.mark.parametrize("kind", ["weights", "functions"])
def test_manifest_that_names_a_file_outside_is_refused(
    name: str, kind: str, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    entry = manifest["weights"][0] if kind == "weights" else manifest["functions"]["standard"]
    entry["file"] = name
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    for options in ([], ["--ignore-hashes"]):
        check_refused(
            capsys, tmp_path, ["run", bundle, "--tokens", "1", *options], "names a file outside its folder",
            str(bundle / "manifest.json"), "a plain file name", "do not trust",
        )  # fmt: skip


@pytest.mark.parametrize("location", ["../outside", "/etc/hostname", "linked", "pipe", "nothing", "", "a\0b"], ids=repr)
def test_graph_that_points_out_of_the_bundle_is_not_followed(location: str, bundle: Path, tmp_path: Path) -> None:
    """Its hash may be right: whoever made the bundle made both. (onnxruntime checks this by itself.)"""
    (tmp_path / "outside").write_bytes(bytes(16))
    (bundle / "linked").symlink_to(tmp_path / "outside")
    make_special(bundle / "pipe", "pipe")
    entry = TensorEntry("model.norm.weight", "float32", (4,), location, 0, 16)
    with pytest.raises(CheckpointError, match=r"is said to lie in a file|is a symbolic link out"):
        read_tensor(bundle, entry)


@pytest.fixture
def full_bundle(bundle: Path) -> Path:
    """With a tokenizer, an index and an engine."""
    (bundle / "engines").mkdir()
    for name in ("tokenizer.json", "model.safetensors.index.json", "engines/a.engine", "engines/a.json"):
        (bundle / name).write_text("{}")
    return bundle


FILES = [
    *(*GRAPHS, WEIGHTS, "manifest.json", "config.json", "tokenizer.json", "model.safetensors.index.json"),
    *("engines/a.engine", "engines/a.json", "engines"),
]


@pytest.mark.parametrize("name", FILES)
def test_link_out_of_the_bundle_is_refused(name: str, full_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    """Whatever it leads to, and though the hash be right: what lies outside is not the bundle's."""
    (full_bundle / name).rename(tmp_path / "outside")
    (full_bundle / name).symlink_to(tmp_path / "outside")
    for options in ([], ["--ignore-hashes"]):
        check_refused(
            capsys, tmp_path, ["run", full_bundle, "--tokens", "1", *options],
            f"`{Path(name).name}` is a symbolic link out of ", f"got:      {tmp_path / 'outside'}", str(full_bundle / name),
        )  # fmt: skip


def test_bundle_is_no_hub_cache(hub_snapshot: Path, tmp_path: Path) -> None:
    export_checkpoint(hub_snapshot, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if not (hub_snapshot / path.name).exists():
            path.rename(hub_snapshot / path.name)
    with pytest.raises(ArtifactMismatchError, match="is a symbolic link out of its folder"):
        load_bundle(hub_snapshot)


def test_links_that_stay_in_the_bundle_are_followed(full_bundle: Path) -> None:
    (full_bundle / "files").mkdir()
    for name in FILES:
        (full_bundle / name).rename(full_bundle / "files" / Path(name).name)
        (full_bundle / name).symlink_to(full_bundle / "files" / Path(name).name)
        if name.startswith("engines/"):
            (full_bundle / name).unlink()
            (full_bundle / "files" / Path(name).name).rename(full_bundle / name)
    assert [path.name for path in load_bundle(full_bundle).engines] == ["a.engine"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("name", FILES[:-1])
def test_what_is_no_file_is_refused_without_being_opened(
    name: str, kind: str, full_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (full_bundle / name).unlink()
    make_special(full_bundle / name, kind)
    for ignore_hashes in (False, True):
        if ignore_hashes and name == WEIGHTS:
            continue  # nothing reads it then
        with pytest.raises(LlamaExportError) as caught:
            load_bundle(full_bundle, ignore_hashes=ignore_hashes)
        assert f"`{Path(name).name}` " in caught.value.message


@pytest.mark.parametrize("functions", ["none", "one", "swapped", "another"])
def test_manifest_cannot_leave_a_graph_unchecked(functions: str, bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    stated = json.loads((bundle / "manifest.json").read_text())["functions"]
    changed = {
        "none": {},
        "one": {"standard": stated["standard"]},
        "swapped": {"standard": stated["onnxruntime"], "onnxruntime": stated["standard"]},
        "another": {**stated, "onnxruntime": {**stated["onnxruntime"], "file": "config.json"}},
    }[functions]
    edit_json(bundle / "manifest.json", functions=changed)
    check_refused(capsys, tmp_path, ["inspect", bundle], "lacks a field or holds a wrong one: functions")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (lambda text: text.replace('"task"', '"dtype": "float16", "task"'), "key 'dtype' stands twice"),
        (lambda text: text + " " * 16_000_000, "more than the 16000000"),
        (lambda text: "[" * 50_000, "recursion"),
        (lambda text: text.replace("{", "\ufeff{", 1), "BOM"),
    ],
    ids=["key-twice", "huge", "deep", "byte-order-mark"],
)
def test_manifest_that_is_no_sound_json_is_refused(
    raw: Callable[[str], str], reason: str, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(raw(text))
    check_refused(capsys, tmp_path, ["inspect", bundle], "`manifest.json` cannot be read as JSON", reason)


@patient
@given(data=st.data())
def test_hostile_values_in_a_manifest_are_refused_or_harmless(
    data: st.DataObject, tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sound = tiny_bundles["float32"]
    folder = tmp_path_factory.getbasetemp() / "hostile-bundle"
    if not folder.exists():
        shutil.copytree(sound.folder, folder)
    path = data.draw(st.sampled_from(json_paths(sound.manifest.to_json())))
    changed = with_json_at(sound.manifest.to_json(), path, data.draw(hostile_json))
    (folder / "manifest.json").write_text(json.dumps(changed))
    opened = refused_or(lambda: load_bundle(folder))
    if opened is not None:
        assert (opened.config, opened.model_path.name) == (sound.config, "model.onnx")
        assert isinstance(opened.ops, frozenset)
        assert opened.engines == []
        assert isinstance(opened.is_embedded, bool)
    (folder / "manifest.json").write_text(json.dumps(sound.manifest.to_json()))
    assert load_bundle(folder) == replace(sound, folder=folder)


@patient
@given(seed=st.integers(0, 2**32), edits=st.integers(1, 6))
def test_damaged_manifest_is_refused_or_harmless(
    seed: int, edits: int, tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, sound = random.Random(seed), tiny_bundles["float32"]
    folder = tmp_path_factory.getbasetemp() / "damaged-bundle"
    if not folder.exists():
        shutil.copytree(sound.folder, folder)
    raw = bytearray((sound.folder / "manifest.json").read_bytes())
    for _ in range(edits):
        raw[rng.randrange(len(raw))] = rng.choice(b'0123456789"[]{},:-eFBI./ \x00\xff')
    (folder / "manifest.json").write_bytes(raw)
    opened = refused_or(lambda: load_bundle(folder))
    assert opened is None or opened.config == sound.config


@pytest.mark.parametrize("name", [*GRAPHS, WEIGHTS])
def test_missing_file_is_named_also_with_ignore_hashes(
    name: str, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (bundle / name).unlink()
    for options in ([], ["--ignore-hashes"]):
        command = ["run", bundle, "--tokens", "1", *options]
        check_refused(
            capsys, tmp_path, command, f"bundle is incomplete: `{name}` is missing", str(bundle), "export again"
        )


@pytest.mark.parametrize("name", GRAPHS)
def test_edited_graph_is_refused(name: str, bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    expected = sha256_of_file(bundle / name)
    stat, raw = (bundle / name).stat(), bytearray((bundle / name).read_bytes())
    raw[-1] ^= 1
    (bundle / name).write_bytes(raw)
    set_time(bundle / name, stat.st_mtime_ns)
    check_refused(
        capsys, tmp_path, ["inspect", bundle], f"`{name}` is not the file the manifest describes",
        f"expected: sha256 {expected}", f"got:      sha256 {sha256_of_file(bundle / name)}", "--ignore-hashes",
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [["run", "--tokens", "1"], ["bench"], ["build"], ["validate"], ["inspect"]],
    ids=lambda command: command[0],
)
def test_every_command_checks_the_bundle_first(
    command: list[str], bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (bundle / "model.onnx").write_bytes(b"another graph")
    name, *options = command
    check_refused(capsys, tmp_path, [name, bundle, *options], "`model.onnx` is not the file the manifest describes")


def overwrite_last_byte(path: Path) -> None:
    """Another weight, same size, same header."""
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 0x40]))


def test_edited_weights_of_the_same_size_are_refused(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    recorded = (bundle / WEIGHTS).stat().st_mtime_ns
    overwrite_last_byte(bundle / WEIGHTS)
    set_time(bundle / WEIGHTS, recorded + 5 * SECOND)
    check_refused(
        capsys, tmp_path, ["run", bundle, "--tokens", "1"], f"`{WEIGHTS}` changed after the export",
        "got:      sample sha256", "expected: sample sha256", "--ignore-hashes",
    )  # fmt: skip


def forget_samples(folder: Path) -> None:
    """The manifest of a version that recorded none."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["weights"]:
        del entry["sample_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_weights_exchanged_for_a_link_to_others_are_refused(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    (bundle / WEIGHTS).rename(bundle / "theirs")
    overwrite_last_byte(bundle / "theirs")
    (bundle / WEIGHTS).symlink_to("theirs")
    check_refused(capsys, tmp_path, ["run", bundle, "--tokens", "1"], f"`{WEIGHTS}` changed after the export")


def test_edited_weights_open_with_ignore_hashes(bundle: Path) -> None:
    overwrite_last_byte(bundle / WEIGHTS)
    set_time(bundle / WEIGHTS, 0)
    (bundle / "model.onnx").write_bytes(b"changed on purpose")
    assert load_bundle(bundle, ignore_hashes=True).dtype == "float32"
    with pytest.raises(ArtifactMismatchError):
        load_bundle(bundle)


def test_weights_of_another_size_are_refused(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    recorded = (bundle / WEIGHTS).stat()
    with (bundle / WEIGHTS).open("ab") as stream:
        stream.write(b"\0" * 8)
    set_time(bundle / WEIGHTS, recorded.st_mtime_ns)
    check_refused(capsys, tmp_path, ["inspect", bundle], f"{recorded.st_size + 8} bytes", f"{recorded.st_size} bytes")
    with (bundle / WEIGHTS).open("r+b") as stream:
        stream.truncate(recorded.st_size - 8)
    check_refused(capsys, tmp_path, ["inspect", bundle], "truncated", f"{recorded.st_size - 8} bytes")


def test_weights_whose_tensors_are_stored_otherwise_are_refused(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    recorded = (bundle / WEIGHTS).stat()
    header, data = read_safetensors(bundle / WEIGHTS)
    gate, up = header["model.layers.0.mlp.gate_proj.weight"], header["model.layers.0.mlp.up_proj.weight"]
    gate["data_offsets"], up["data_offsets"] = up["data_offsets"], gate["data_offsets"]
    raw = json.dumps(header).encode()
    write_safetensors(bundle / WEIGHTS, raw + b" " * (recorded.st_size - 8 - len(raw) - len(data)), data)
    assert (bundle / WEIGHTS).stat().st_size == recorded.st_size
    set_time(bundle / WEIGHTS, recorded.st_mtime_ns)
    check_refused(capsys, tmp_path, ["inspect", bundle], f"`{WEIGHTS}` changed after the export", "header sha256")


def test_time_cut_to_whole_seconds_is_accepted_and_no_other(bundle: Path) -> None:
    recorded = (bundle / WEIGHTS).stat().st_mtime_ns
    if recorded % SECOND < 2:
        pytest.skip("this file system keeps whole seconds only")
    forget_samples(bundle)
    set_time(bundle / WEIGHTS, recorded - recorded % SECOND)
    load_bundle(bundle)
    for other in (recorded - recorded % SECOND + SECOND, recorded + 1, recorded - recorded % SECOND - 1):
        set_time(bundle / WEIGHTS, other)
        with pytest.raises(ArtifactMismatchError, match="changed after the export") as caught:
            load_bundle(bundle)
        assert caught.value.details["got"] == f"modified at {other} ns"
        assert f"llama-export verify {bundle} --record" in str(caught.value.hint)


def test_content_hash_decides_where_the_time_was_lost(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    export_checkpoint(checkpoint, config=ExportConfig(hash_weights=True))
    forget_samples(checkpoint)
    set_time(checkpoint / WEIGHTS, 0)
    load_bundle(checkpoint)
    overwrite_last_byte(checkpoint / WEIGHTS)
    check_refused(
        capsys, tmp_path, ["inspect", checkpoint], f"`{WEIGHTS}` is not the file the manifest describes",
        f"got:      sha256 {sha256_of_file(checkpoint / WEIGHTS)}",
    )  # fmt: skip


def test_config_edited_after_the_export_is_refused(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    edit_json(bundle / "config.json", rms_norm_eps=1e-6, tie_word_embeddings=True)
    check_refused(
        capsys, tmp_path, ["run", bundle, "--tokens", "1"], "`config.json` changed after the export",
        "rms_norm_eps: 1e-06, tie_word_embeddings: True", "rms_norm_eps: 1e-05, tie_word_embeddings: False",
    )  # fmt: skip
    load_bundle(bundle, ignore_hashes=True)


def test_harmless_edit_of_the_config_is_accepted(bundle: Path) -> None:
    edit_json(bundle / "config.json", _name_or_path="moved", transformers_version="9")
    load_bundle(bundle)


def test_unreadable_file_is_no_bug(
    bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(bundle_module, "sha256_of_file", refuse)
    check_refused(
        capsys, tmp_path, ["inspect", bundle], "`model.onnx` cannot be read", "Permission denied", str(bundle)
    )


def test_config_error_is_raised_for_callers_of_the_library_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_bundle(tmp_path)
    assert caught.value.details == {"missing": "manifest.json", "got": "an empty folder"}
    assert caught.value.exit_code == 2
