"""A bundle that was copied opens; a weight that changed is noticed when the bundle is opened, or by ``verify``."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import MakeCheckpoint, edit_json
from hypothesis import given
from hypothesis import strategies as st
from support import check_refused, patient, read_safetensors, snapshot, write_tensors

from llama_export._system.content import BLOCK, STRIDE, sample_blocks, sample_sha256, sha256_of_file
from llama_export.bundle.bundle import Bundle, load_bundle, tensor_regions
from llama_export.bundle.manifest import MANIFEST_NAME, read_manifest
from llama_export.checkpoint.safetensors import read_safetensors_header
from llama_export.cli.main import main
from llama_export.engine.build import commit_engine, engine_staging, write_sidecar
from llama_export.errors import ArtifactMismatchError, ConfigError
from llama_export.export import quantize as quantization
from llama_export.export.quantize import quantize_bundle
from llama_export.parity.locate.case import remove_cases

WEIGHTS = "model.safetensors"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def quantized(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a quantised variant, not to be modified."""
    folder = Path(shutil.copytree(tiny_bundles["float32"].folder, tmp_path_factory.mktemp("copies") / "bundle"))
    quantize_bundle(load_bundle(folder), "int8")
    return folder


@pytest.fixture
def bundle(quantized: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(quantized, tmp_path / "bundle"))


def _without_times(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def _cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)


def _tar(source: Path, target: Path) -> None:
    with tarfile.open(target.with_suffix(".tar"), "w") as archive:
        archive.add(source, target.name, filter=lambda item: item.replace(mtime=0, deep=False))
    with tarfile.open(target.with_suffix(".tar")) as archive:
        archive.extractall(target.parent, filter="data")


def _zip(source: Path, target: Path) -> None:
    with zipfile.ZipFile(target.with_suffix(".zip"), "w") as archive:
        for path in source.iterdir():
            archive.write(path, path.name)
    with zipfile.ZipFile(target.with_suffix(".zip")) as archive:
        archive.extractall(target)


def _hard_links(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def _touched(seconds: int) -> Callable[[Path, Path], None]:
    def copy(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        for path in target.iterdir():
            os.utime(path, (seconds, seconds))

    return copy


COPIES = {
    "copytree without times": _without_times, "cp -r": _cp, "tar": _tar, "zip": _zip, "hard links": _hard_links,
    "1970": _touched(0), "2100": _touched(4_102_444_800),
}  # fmt: skip


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_copied_bundle_opens(copy: Callable[[Path, Path], None], quantized: Path, tmp_path: Path) -> None:
    copy(quantized, tmp_path / "copy")
    assert load_bundle(tmp_path / "copy").variants == ("int8",)


def flip(path: Path, offset: int) -> None:
    """One bit; size and modification time stay."""
    stat = path.stat()
    with path.open("r+b") as stream:
        stream.seek(offset)
        (value,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([value ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _regions(path: Path) -> list[tuple[int, int]]:
    if path.suffix == ".data":
        return [(0, path.stat().st_size)]
    return tensor_regions(read_safetensors_header(path)[1])


def _verify(folder: Path, capsys: Capture, *options: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["verify", str(folder), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", [WEIGHTS, "model.onnxruntime.int8.data"])
def test_a_bit_in_a_sampled_block_is_noticed_at_open_and_any_other_by_verify(
    name: str, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = bundle / name
    blocks = sample_blocks(_regions(path), path.stat().st_size)
    inside = {position for offset, length in blocks for position in range(offset, offset + length)}
    outside = next(at for at in range(path.stat().st_size // 3, path.stat().st_size) if at not in inside)
    assert main(["verify", str(bundle), "--record"]) == 0
    capsys.readouterr()
    for position in (blocks[0][0], blocks[len(blocks) // 2][0] + 7, blocks[-1][0] + blocks[-1][1] - 1):
        flip(path, position)
        check_refused(capsys, tmp_path, ["inspect", bundle], f"`{name}` changed after the export", "sample sha256")
        flip(path, position)
    flip(path, outside)
    load_bundle(bundle)
    code, found = _verify(bundle, capsys)
    assert (code, found["status"]) == (2, "changed")
    (changed,) = [file for file in found["files"] if file["status"] == "changed"]
    assert changed["file"] == name
    assert changed["problem"].startswith("sha256 ")


@patient
@given(
    sizes=st.lists(st.one_of(st.integers(0, 3 * BLOCK), st.integers(0, 5 * STRIDE)), min_size=1, max_size=20),
    base=st.integers(8, 100_000),
)
def test_every_tensor_has_a_block(sizes: list[int], base: int) -> None:
    regions, end = [], base
    for nbytes in sizes:
        regions.append((end, nbytes))
        end += nbytes
    blocks = sample_blocks(regions, end)
    assert blocks == sample_blocks(list(reversed(regions)), end)
    for offset, nbytes in regions:
        own = [start for start, length in blocks[:-1] if offset <= start and start + length <= offset + nbytes]
        assert bool(own) == bool(nbytes)
        if nbytes > STRIDE:
            assert (own[0], own[-1]) == (offset, offset + nbytes - BLOCK)
            assert all(after - before <= STRIDE for before, after in itertools.pairwise(own))
    assert all(0 < length <= BLOCK and start >= 0 and start + length <= end for start, length in blocks)
    assert len(blocks) <= 2 * len(sizes) + sum(sizes) // STRIDE + 1


@patient
@given(shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=6), data=st.data())
def test_a_changed_tensor_changes_the_sample(
    shapes: list[list[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "sampled.safetensors"
    sizes = [4 * math.prod(shape) for shape in shapes]
    content = [bytes([index + 1]) * size for index, size in enumerate(sizes)]

    def sample() -> str:
        write_tensors(path, {f"t{index}": ("F32", shapes[index], raw) for index, raw in enumerate(content)})
        return sample_sha256(path, _regions(path))

    before, changed = sample(), data.draw(st.integers(0, len(shapes) - 1))
    content[changed] = bytes(255 - value for value in content[changed])
    assert sample() != before


def test_exchanged_tensors_of_one_size_are_noticed(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = bundle / WEIGHTS
    stat, (header, data) = path.stat(), read_safetensors(path)
    gate, up = (header[f"model.layers.0.mlp.{name}_proj.weight"]["data_offsets"] for name in ("gate", "up"))
    raw = bytearray(data)
    raw[slice(*gate)], raw[slice(*up)] = data[slice(*up)], data[slice(*gate)]
    with path.open("r+b") as stream:
        stream.seek(stat.st_size - len(raw))
        stream.write(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    check_refused(capsys, tmp_path, ["inspect", bundle], f"`{WEIGHTS}` changed after the export", "sample sha256")


# ---- verify -----------------------------------------------------------------------------------------------------


def forget_samples(folder: Path) -> None:
    """The manifest of a version that recorded none."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for entry in manifest["weights"]:
        del entry["sample_sha256"]
    for entry in manifest["quantized"].values():
        del entry["data_sample_sha256"]
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_copy_of_an_old_bundle_opens_after_its_hashes_are_recorded(
    bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    forget_samples(bundle)
    os.utime(bundle / WEIGHTS, (0, 0))
    hint = f"llama-export verify {bundle} --record"
    check_refused(capsys, tmp_path, ["inspect", bundle], f"`{WEIGHTS}` changed after the export", "modified at", hint)
    code, found = _verify(bundle, capsys)
    assert (code, found["status"], found["recorded"]) == (0, "unknown", [])
    assert {file["file"]: file["status"] for file in found["files"]}[WEIGHTS] == "unknown"
    code, found = _verify(bundle, capsys, "--record")
    assert (code, found["status"]) == (0, "same")
    assert found["recorded"] == [WEIGHTS, "model.onnxruntime.int8.data"]
    opened = load_bundle(bundle)
    assert opened.manifest.weights[0].sha256 == sha256_of_file(bundle / WEIGHTS)
    before = snapshot(bundle)
    assert _verify(bundle, capsys, "--record")[1]["recorded"] == []
    assert snapshot(bundle) == before


def test_nothing_is_recorded_where_a_file_changed(bundle: Path, capsys: Capture) -> None:
    forget_samples(bundle)
    flip(bundle / "model.onnx", 100)
    before = snapshot(bundle)
    code, found = _verify(bundle, capsys, "--record")
    assert (code, found["status"], found["recorded"]) == (2, "changed", [])
    assert snapshot(bundle) == before
    edit_json(bundle / "config.json", rms_norm_eps=0.5)
    assert {file["file"] for file in _verify(bundle, capsys)[1]["files"] if file["problem"]} == {
        "config.json",
        "model.onnx",
    }


def test_manifest_is_written_as_it_was_read(quantized: Path) -> None:
    raw = (quantized / MANIFEST_NAME).read_text()
    assert json.dumps(read_manifest(quantized).to_json(), indent=2, ensure_ascii=False) + "\n" == raw


# ---- wrong values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("weights", 0, "size"), "379856"),
        (("model", "num_hidden_layers"), 10**9),
        (("model", "num_hidden_layers"), 3),
        (("model", "num_hidden_layers"), 1),
        (("model", "vocab_size"), 10**9),
        (("model", "architectures"), ["\ud800"]),
        (("generator", "torch"), "\ud800"),
        (("generator", "a\x1b[2J"), "1"),
        (("io", 0, "shape"), [[]]),
        (("functions", "standard", "sha256"), "0" * 63),
        (("kv_cache",), None),
        (("ops", "LlamaRMSNorm"), -1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("options", [[], ["--ignore-hashes"]], ids=["hashes", "ignore-hashes"])
def test_wrong_value_in_the_manifest_is_refused(
    path: tuple[Any, ...], value: Any, options: list[str], bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
    check_refused(capsys, tmp_path, ["run", bundle, "--tokens", "1", *options], "manifest.json")


def test_sizes_of_the_config_are_compared_with_ignore_hashes_too(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    edit_json(bundle / "config.json", num_hidden_layers=10**9)
    check_refused(capsys, tmp_path, ["run", bundle, "--tokens", "1", "--ignore-hashes"])


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_of_a_model_without_a_cache_are_those_of_its_weights(
    layers: int, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    folder = make_checkpoint()
    assert main(["export", str(folder), "--task", "feature-extraction"]) == 0
    capsys.readouterr()
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["model"]["num_hidden_layers"] = layers
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    edit_json(folder / "config.json", num_hidden_layers=layers)
    check_refused(capsys, tmp_path, ["inspect", folder], "do not hold the layers")


# ---- commands side by side --------------------------------------------------------------------------------------


def _quantize_when_told(folder: str, kind: str, ready: Any, go: Any, codes: Any) -> None:
    """``quantize`` that stands still when the bundle has been opened."""
    right = quantization.quantize_bundle

    def wait(*args: Any, **kwargs: Any) -> Any:
        ready.release()
        go.wait(60)
        return right(*args, **kwargs)

    quantization.quantize_bundle = wait  # type: ignore[assignment]
    codes.put(main(["quantize", folder, "--type", kind]))


def _side_by_side(folder: Path, kinds: list[str], meanwhile: Callable[[], None]) -> list[int]:
    """Exit codes of ``quantize`` in processes that all open the bundle, then wait for ``meanwhile``."""
    context = multiprocessing.get_context("fork")
    ready, go, codes = context.Semaphore(0), context.Event(), context.Queue()
    processes = [
        context.Process(target=_quantize_when_told, args=(str(folder), kind, ready, go, codes)) for kind in kinds
    ]
    for process in processes:
        process.start()
    assert all(ready.acquire(timeout=60) for _ in processes)
    meanwhile()
    go.set()
    found = [codes.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    return found


def test_two_quantisations_at_once_are_both_recorded(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundles["float32"].folder, tmp_path / "bundle"))
    assert _side_by_side(folder, ["int4", "int8"], lambda: None) == [0, 0]
    assert load_bundle(folder).variants == ("int4", "int8")


@pytest.mark.parametrize("in_place", [False, True])
def test_quantising_a_bundle_that_is_exported_meanwhile_is_refused(
    in_place: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    folder = checkpoint if in_place else tmp_path / "out"
    output = [] if in_place else ["-o", str(folder)]
    assert main(["export", str(checkpoint), *output]) == 0

    def export_again() -> None:
        assert main(["export", str(checkpoint), *output, "--force", "--dtype", "float16"]) == 0

    assert _side_by_side(folder, ["int4"], export_again) == [2]
    opened = load_bundle(folder)
    assert (opened.dtype, opened.variants) == ("float16", ())


def test_weights_that_changed_meanwhile_are_another_export(tiny_bundles: dict[str, Bundle]) -> None:
    manifest = tiny_bundles["float32"].manifest
    (entry,) = manifest.weights
    recorded = replace(manifest, weights=(replace(entry, sha256="0" * 64, mtime_ns=1),))
    assert manifest.is_same_export(recorded)
    assert not manifest.is_same_export(replace(manifest, weights=(replace(entry, sample_sha256="0" * 64),)))
    old = replace(manifest, weights=(replace(entry, sample_sha256=None),))
    assert manifest.is_same_export(old)
    assert not old.is_same_export(replace(old, weights=(replace(entry, sample_sha256=None, mtime_ns=1),)))


def test_a_staging_folder_that_is_gone_is_no_bug(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundles["float32"].folder, tmp_path / "bundle"))
    opened, progress = load_bundle(folder), []

    def replace_bundle(name: str, done: int, total: int) -> None:
        if not progress:
            shutil.copytree(folder, tmp_path / "new", ignore=shutil.ignore_patterns(".*"))
            folder.rename(tmp_path / "old")
            (tmp_path / "new").rename(folder)
        progress.append(done)

    with pytest.raises(ArtifactMismatchError, match="exported again while this command ran"):
        quantize_bundle(opened, "int4", progress=replace_bundle)
    assert load_bundle(folder).variants == ()


def test_engine_of_a_bundle_that_is_exported_meanwhile_is_not_committed(
    tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundles["float32"].folder, tmp_path / "bundle"))
    opened = load_bundle(folder)

    def build() -> None:
        with engine_staging(folder / "engines" / "a.engine") as staged:
            staged.write_bytes(b"engine")
            write_sidecar(staged, cast(Any, SimpleNamespace(to_json=dict)))
            assert main(["export", str(folder), "--force", "--dtype", "float16"]) == 0
            commit_engine(staged, opened)

    with pytest.raises(ArtifactMismatchError, match="exported again while this command ran"):
        build()
    assert not (folder / "engines").exists()


# ---- reports ----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of somebody else's that looks like a report with cases."""
    for name in ("theirs", "operations/theirs"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "case.json").write_text("{}")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["report", "report/operations"])
def test_validate_refuses_a_report_that_is_a_link_out_of_the_bundle(
    name: str, elsewhere: Path, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).symlink_to(elsewhere)
    command = ["validate", bundle, "--stages", "bundle"]
    check_refused(capsys, tmp_path, command, "is a symbolic link out of the bundle", str(elsewhere), "--report")


@pytest.mark.parametrize("cases", [True, False])
def test_report_that_is_asked_for_may_be_a_link_and_nothing_is_removed_behind_it(
    cases: bool, elsewhere: Path, bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "link").symlink_to(elsewhere)
    command = ["validate", bundle, "--stages", "bundle", "--report", tmp_path / "link"]
    if cases:
        check_refused(capsys, tmp_path, command, "cases of an earlier validation are behind it", "theirs")
        return
    shutil.rmtree(elsewhere / "operations")
    (elsewhere / ".parity.html.123.partial").write_text("left by a killed process")
    before = snapshot(elsewhere)
    main([str(argument) for argument in command])
    after = snapshot(elsewhere)
    assert set(after) - set(before) == {"parity.html", "parity.md", "parity.json", "junit.xml"}
    assert set(before) - set(after) == {".parity.html.123.partial"}


def test_case_that_is_a_link_is_left_alone(elsewhere: Path, tmp_path: Path) -> None:
    own = tmp_path / "report" / "operations"
    (own / "own").mkdir(parents=True)
    (own / "own" / "case.json").write_text("{}")
    (own / "link").symlink_to(elsewhere / "theirs")
    remove_cases(own)
    assert [path.name for path in own.iterdir()] == ["link"]
    assert (elsewhere / "theirs" / "case.json").exists()
    (tmp_path / "other").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a symbolic link"):
        remove_cases(tmp_path / "other")
