"""How weights reach a bundle: the same numbers by every way, what each of them writes, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import NATIVE, TINY, MakeCheckpoint, edit_json
from random_llama import write_random_checkpoint
from support import (
    check_refused,
    read_safetensors,
    read_tensors,
    snapshot,
    split_in_shards,
    trace_once,
    write_safetensors,
    write_tensors,
)

from llama_export._system.content import sha256_of_file
from llama_export.bundle import placement
from llama_export.bundle.bundle import load_bundle
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.cli.main import main
from llama_export.config.settings import ExportConfig
from llama_export.engine.build import build_engine
from llama_export.errors import ConfigError, ExportError
from llama_export.export import embedded, trace
from llama_export.export.export import ExportResult, export_checkpoint
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.locate.prefix import first_layers
from llama_export.parity.stages.causal_validator import CausalValidator
from llama_export.parity.validate import validate_bundle

Capture = pytest.CaptureFixture[str]
WEIGHTS = "model.safetensors"
GRAPHS = ("model.onnx", "model.onnxruntime.onnx")
HEADS = {
    "sequence-classification": ("LlamaForSequenceClassification", {"score.weight": (3, 72)}),
    "question-answering": ("LlamaForQuestionAnswering", {"qa_outputs.weight": (2, 72), "qa_outputs.bias": (2,)}),
}


@pytest.fixture(autouse=True)
def _one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)


def outputs(folder: Path, name: str = "model.onnxruntime.onnx") -> list[bytes]:
    """Every output of a graph on fixed inputs, as bytes."""
    import onnxruntime

    opened = load_bundle(folder)
    session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    ids = np.array([[1, 5, 7, 96, 3]])
    feeds: dict[str, Any] = {"input_ids": ids}
    if opened.task == "causal-lm":
        feeds |= {
            "past_length": np.array([0]),
            "sequence_length": np.array([5]),
            "logits_index": np.arange(5)[None],
        }
    else:
        feeds["attention_mask"] = np.ones_like(ids)
    for value in session.get_inputs():
        if value.name not in feeds:
            shape = [1, opened.config.num_key_value_heads, 8, opened.config.head_dim]
            feeds[value.name] = np.zeros(shape, {"tensor(float16)": np.float16}.get(value.type, np.float32))
    return [array.tobytes() for array in session.run(None, feeds)]


def make_head(folder: Path, task: str) -> None:
    """A random checkpoint with that head: a causal LM whose head is exchanged."""
    architecture, head = HEADS[task]
    write_random_checkpoint(folder, TINY)
    tensors = read_tensors(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    rng = np.random.default_rng(5)
    for name, shape in head.items():
        tensors[name] = ("F32", shape, rng.standard_normal(shape).astype(np.float32).tobytes())
    write_tensors(folder / WEIGHTS, tensors)
    labels = {} if task == "question-answering" else {"id2label": {str(i): f"l{i}" for i in range(3)}}
    edit_json(folder / "config.json", architectures=[architecture], pad_token_id=0, **labels)


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "plain": lambda folder: write_random_checkpoint(folder, TINY),
    "bfloat16": lambda folder: write_random_checkpoint(folder, TINY, dtype="bfloat16"),
    "tied": lambda folder: write_random_checkpoint(folder, {**TINY, "tie_word_embeddings": True}),
    "shards": lambda folder: (write_random_checkpoint(folder, TINY), split_in_shards(folder, 3)),
    **{task: lambda folder, task=task: make_head(folder, task) for task in HEADS},  # type: ignore[misc]
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_way_gives_the_same_outputs(kind: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    CHECKPOINTS[kind](checkpoint)
    before = snapshot(checkpoint)
    nbytes, sizes = load_checkpoint(checkpoint).weight_bytes, sum(f.size for f in load_checkpoint(checkpoint).files)
    found, standard, written, referenced = {}, {}, {}, {}

    def export(way: str, output: Path | None, weights: Any) -> None:
        result = export_checkpoint(checkpoint, output, ExportConfig(weights=weights, force=True))
        folder = output or checkpoint
        written[way], referenced[way] = result.weight_bytes_written, result.weight_bytes_referenced
        found[way] = outputs(folder)
        if load_bundle(folder).dtype == "float32":
            standard[way] = outputs(folder, "model.onnx")

    for weights in ("auto", "link", "copy", "embed"):
        export(weights, tmp_path / weights, weights)
    assert snapshot(checkpoint) == before
    export("in place", None, "auto")
    export("in place, embedded", None, "embed")
    assert {name: entry for name, entry in snapshot(checkpoint).items() if name in before} == before
    assert all(value == found["auto"] for value in found.values()), [
        key for key in found if found[key] != found["auto"]
    ]
    assert all(value == standard["auto"] for value in standard.values()), "other bodies, but the same for every way"
    assert written.pop("auto") in (0, sizes)
    assert written == {"link": 0, "copy": sizes, "embed": 2 * nbytes, "in place": 0, "in place, embedded": 2 * nbytes}
    assert {way for way, count in referenced.items() if count == 0} == {"embed", "in place, embedded"}
    assert set(referenced.values()) == {0, nbytes}


@pytest.mark.parametrize("weights", ["auto", "link", "copy"])
def test_hub_cache_gives_files_and_never_links_to_links(
    weights: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    blob, folder = tmp_path / "models--x" / "blobs" / "b1", tmp_path / "models--x" / "snapshots" / "main"
    blob.parent.mkdir(parents=True)
    folder.mkdir(parents=True)
    shutil.move(checkpoint / WEIGHTS, blob)
    shutil.move(checkpoint / "config.json", folder)
    (folder / WEIGHTS).symlink_to("../../blobs/b1")
    export_checkpoint(folder, tmp_path / "out", ExportConfig(weights=weights))
    placed = (tmp_path / "out" / WEIGHTS).lstat()
    assert not (tmp_path / "out" / WEIGHTS).is_symlink()
    assert (placed.st_ino == blob.stat().st_ino) == (weights == "link")
    assert placed.st_nlink == blob.stat().st_nlink == (2 if weights == "link" else 1)
    assert placed.st_mtime_ns == blob.stat().st_mtime_ns


# ---- what is said -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EOPNOTSUPP, "this file system has no reflinks (Operation not supported)"),
        (errno.EXDEV, "the checkpoint lies on another file system"),
        (errno.EIO, "they cannot be reflinked (Input/output error)"),
    ],
)
def test_auto_says_why_it_copies_and_how_not_to(
    number: int, reason: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint, 3)
    lines: list[str] = []
    seen: list[tuple[str, int, int]] = []
    export_checkpoint(checkpoint, tmp_path / "out", log=lines.append, progress=lambda *step: seen.append(step))
    (line,) = [line for line in lines if "copying" in line]
    assert line == (
        f"export: copying the weights: {reason}; in place (no -o) nothing is written, nor with hard links (--weights link)"
    )
    assert {name for name, done, total in seen if done == total} == {
        path.name for path in checkpoint.glob("*.safetensors")
    }


def test_link_says_who_refuses_its_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    lines: list[str] = []
    export_checkpoint(make_checkpoint(), tmp_path / "out", ExportConfig(weights="link"), log=lines.append)
    (line,) = [line for line in lines if "hard links" in line]
    assert "onnxruntime and TensorRT read them" in line
    assert "onnx (load, checker) and onnx-ir refuse" in line
    with pytest.raises(onnx.checker.ValidationError, match=r"(?i)hard ?link"):  # what the note says, of this version
        onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert outputs(tmp_path / "out")


@pytest.fixture
def other_device(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that is not that of ``tmp_path``."""
    root = Path("/dev/shm")
    if not os.access(root, os.W_OK) or root.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is not a second writable file system here")
    folder = root / f"llama-export-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_across_file_systems_auto_copies_and_link_is_refused_before_the_work(
    make_checkpoint: MakeCheckpoint, other_device: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    lines: list[str] = []
    result = export_checkpoint(checkpoint, other_device / "out", log=lines.append)
    assert result.weight_bytes_written == (checkpoint / WEIGHTS).stat().st_size
    assert any("copying the weights: " in line for line in lines)
    monkeypatch.setattr(trace, "trace_program", lambda *_: pytest.fail("traced before the link was tried"))
    check_refused(
        capsys, other_device, ["export", checkpoint, "-o", other_device / "linked", "--weights", "link"],
        "a hard link is not possible here", str(checkpoint / WEIGHTS), str(other_device), "Invalid cross-device link",
        "both on one file system", "--weights auto", "on the file system of the checkpoint",
    )  # fmt: skip


# ---- space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "need"),
    [
        (["--weights", "copy"], lambda c: c.files[0].size),
        (["--weights", "auto"], lambda c: c.files[0].size),
        (["--weights", "embed"], lambda c: 2 * c.weight_bytes),
        (["--dtype", "float16", "--convert-weights"], lambda c: c.weight_bytes // 2),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_space_is_checked_before_the_work_for_every_way(
    options: list[str], need: Callable[..., int], make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checkpoint = make_checkpoint()
    least = need(load_checkpoint(checkpoint))
    monkeypatch.setattr(placement, "_can_reflink", lambda source, folder: False)
    monkeypatch.setattr(trace, "trace_program", lambda *_: pytest.fail("traced before the space was checked"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=least - 1))
    said = check_refused(
        capsys, tmp_path, ["export", checkpoint, "-o", tmp_path / "out", *options], "no space left",
        f"{least - 1} bytes free", "bytes of weights", exit_code=3,
    )  # fmt: skip
    got = int(said.split("expected: ")[1].split()[0])
    assert least <= got <= least + 5000  # a converted file has its header, too
    if "embed" in options:
        check_refused(capsys, tmp_path, ["export", checkpoint, *options], "no space left", exit_code=3)


# ---- embedded ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, ExportResult]]:
    """Compute dtype of bundles of one bfloat16 checkpoint -> (checkpoint, bundle, result); none to be modified."""
    root = tmp_path_factory.mktemp("embedded")
    write_random_checkpoint(root / "checkpoint", TINY, dtype="bfloat16")
    made = {}
    for dtype in ("bfloat16", "float32"):
        config = ExportConfig(weights="embed", dtype=dtype)
        made[dtype] = root / "checkpoint", root / dtype, export_checkpoint(root / "checkpoint", root / dtype, config)
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_embedded_files_stand_alone(
    dtype: str, embedded_bundles: dict[str, tuple[Path, Path, ExportResult]], tmp_path: Path
) -> None:
    """Each file in an empty folder: ``onnx.load``, the full check by path and of the model, a session."""
    import onnxruntime

    checkpoint, bundle, _ = embedded_bundles[dtype]
    assert {path.name for path in bundle.iterdir()} == {*GRAPHS, "manifest.json", "config.json"}
    assert load_bundle(bundle).manifest.weights == ()
    assert load_bundle(bundle).is_embedded
    stored = read_tensors(checkpoint / WEIGHTS)
    for name, computed in zip(GRAPHS, (dtype, "float32"), strict=True):
        path = tmp_path / name
        shutil.copyfile(bundle / name, path)
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path), full_check=True)
        onnx.checker.check_model(model, full_check=True)
        if computed == "float32":
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        held = {item.name: item for item in model.graph.initializer}
        assert set(held) == {*stored, "model.rotary_emb.inv_freq"}
        for tensor, (_, shape, content) in stored.items():
            assert (held[tensor].data_type, list(held[tensor].dims)) == (onnx.TensorProto.BFLOAT16, list(shape))
            assert held[tensor].raw_data == content
        casts = {node.input[0] for node in model.graph.node if node.op_type == "Cast"} & set(stored)
        cast_once = set(stored) - {"model.embed_tokens.weight"}  # of the table, the rows that are looked up
        assert casts == (set() if computed == "bfloat16" else cast_once)


def test_embedded_graph_is_the_graph_by_reference(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Nodes, functions, interface and everything else are the same; only the weights lie elsewhere."""
    export_checkpoint(tiny_checkpoint, tmp_path / "files")
    export_checkpoint(tiny_checkpoint, tmp_path / "one", ExportConfig(weights="embed"))
    for name in GRAPHS:
        models = [onnx.load(str(tmp_path / folder / name), load_external_data=False) for folder in ("files", "one")]
        for model in models:
            weights = [item for item in model.graph.initializer if not item.name.startswith("model.rotary_emb.")]
            for item in weights:
                model.graph.initializer.remove(item)
        assert models[0] == models[1]


def test_embedding_holds_no_more_than_a_block(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_BLOCK_BYTES", 1000)
    checkpoint = load_checkpoint(make_checkpoint())
    entry = checkpoint.tensors["lm_head.weight"]
    blocks = list(embedded.tensor_blocks(checkpoint.folder, entry))
    assert max(map(len, blocks)) == 1000
    assert b"".join(blocks) == read_tensors(checkpoint.folder / WEIGHTS)["lm_head.weight"][2]
    export_checkpoint(checkpoint.folder, tmp_path / "blocks", ExportConfig(weights="embed"))
    monkeypatch.undo()
    trace_once(monkeypatch)
    export_checkpoint(checkpoint.folder, tmp_path / "whole", ExportConfig(weights="embed"))
    for name in GRAPHS:
        assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_gibibytes_are_refused_before_any_work(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tie_word_embeddings=True)
    header, data = read_safetensors(checkpoint / WEIGHTS)
    rows = (1 << 31) // (72 * 4) + 1
    grown = (rows - 97) * 72 * 4
    for name, item in header.items():
        first = name == "model.embed_tokens.weight"
        item["data_offsets"] = [item["data_offsets"][0] + (0 if first else grown), item["data_offsets"][1] + grown]
    header["model.embed_tokens.weight"]["shape"] = [rows, 72]
    write_safetensors(checkpoint / WEIGHTS, header, b"")
    os.truncate(checkpoint / WEIGHTS, (checkpoint / WEIGHTS).stat().st_size + len(data) + grown)  # sparse
    edit_json(checkpoint / "config.json", vocab_size=rows)
    nbytes = load_checkpoint(checkpoint).weight_bytes
    assert nbytes >= 1 << 31
    monkeypatch.setattr(trace, "trace_program", lambda *_: pytest.fail("traced before the size was checked"))
    command = ["export", str(checkpoint), "--weights", "embed"]
    for options in ([], ["-o", str(tmp_path / "out")]):
        assert main([*command, *options]) == 2
        said = capsys.readouterr().err
        for part in (
            "`model.onnx` cannot hold the weights",
            "below 2 GiB",
            f"{nbytes:,} bytes",
            "at most 2,147,483,647 bytes",
        ):
            assert part in said
        for way in ("in place", "auto", "link", "copy", "16-bit"):
            assert way in said.split("hint: ")[1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint", "config.json", WEIGHTS]


@pytest.mark.parametrize("name", GRAPHS)
def test_limit_holds_for_the_whole_of_each_file(
    name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(dtype="bfloat16")
    export_checkpoint(checkpoint, tmp_path / "out", ExportConfig(weights="embed"))
    sizes = {graph: (tmp_path / "out" / graph).stat().st_size for graph in GRAPHS}
    assert sizes["model.onnx"] < sizes["model.onnxruntime.onnx"]  # the casts
    shutil.rmtree(tmp_path / "out")
    command = ["export", checkpoint, "-o", tmp_path / "out", "--weights", "embed"]
    monkeypatch.setattr(embedded, "MAX_BYTES", sizes[name] - 1)
    check_refused(capsys, tmp_path, command, f"`{name}` cannot hold the weights", f"{sizes[name]:,} bytes")
    monkeypatch.setattr(embedded, "MAX_BYTES", sizes["model.onnxruntime.onnx"])
    assert main([str(part) for part in command]) == 0


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, (1 << 31) - 1, 1 << 35])
def test_varint_is_protobufs(value: int) -> None:
    from google.protobuf.internal import encoder

    want: list[bytes] = []
    encoder._EncodeVarint(want.append, value)
    assert embedded._varint(value) == b"".join(want)


def test_embedded_bundle_runs_builds_and_is_inspected(
    embedded_bundles: dict[str, tuple[Path, Path, ExportResult]], tmp_path: Path, capsys: Capture
) -> None:
    checkpoint, bundle, _ = embedded_bundles["float32"]
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    export_checkpoint(checkpoint, tmp_path / "files", ExportConfig(dtype="float32"))
    said = []
    for folder in (copy, tmp_path / "files"):
        assert main(["run", str(folder), "--tokens", "1,5,7", "--max-new-tokens", "4"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["bench", str(copy), "--prompt-tokens", "4", "--new-tokens", "2", "--runs", "1"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(copy)]) == 0
    assert re.search(r"weights +inside the graphs", capsys.readouterr().out)
    engine = Path(build_engine(load_bundle(copy), NATIVE).engine)
    assert load_bundle(copy).engines == [engine]
    plain = Path(build_engine(load_bundle(tmp_path / "files"), NATIVE).engine)
    assert abs(engine.stat().st_size - plain.stat().st_size) < 0.02 * plain.stat().st_size


def test_validate_of_an_embedded_bundle_needs_the_checkpoint(
    embedded_bundles: dict[str, tuple[Path, Path, ExportResult]], make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:  # fmt: skip
    checkpoint, bundle, _ = embedded_bundles["bfloat16"]
    command = ["validate", bundle, "--report", tmp_path / "report"]
    check_refused(
        capsys,
        tmp_path,
        command,
        "weights are embedded",
        str(bundle),
        "*.safetensors",
        f"validate {bundle} --checkpoint DIR",
    )
    other = make_checkpoint(dtype="bfloat16", rms_norm_eps=1e-6)
    check_refused(
        capsys, tmp_path, [*command, "--checkpoint", other], "the checkpoint's config is not that of the bundle", str(other),
        "got:        rms_norm_eps: 1e-06", "expected:   rms_norm_eps: 1e-05", "exported from",
    )  # fmt: skip
    check_refused(capsys, tmp_path, [*command, "--checkpoint", tmp_path / "no"], "no folder")
    plain = tmp_path / "plain"
    export_checkpoint(checkpoint, plain)
    check_refused(
        capsys,
        tmp_path,
        ["validate", plain, "--checkpoint", checkpoint],
        "holds the checkpoint",
        "leave --checkpoint out",
    )


def test_embedded_bundle_is_proven_against_its_checkpoint(
    embedded_bundles: dict[str, tuple[Path, Path, ExportResult]],
) -> None:
    checkpoint, bundle, _ = embedded_bundles["bfloat16"]
    names = ("bundle", "reference/transformers", "graph/float64-eager", "onnxruntime/decode", "evaluator", "ops/bodies")
    config = ValidateConfig(steps=3, prompt_tokens=9, stages=names, require=names, checkpoint=checkpoint)
    report = validate_bundle(load_bundle(bundle), config)
    assert report.verdict == "pass", [(stage.name, stage.reason) for stage in report.stages if stage.verdict == "fail"]
    assert report.environment["command"].endswith("--checkpoint checkpoint")
    (weights,) = [stage for stage in report.stages if stage.name == "bundle/weights"]
    assert weights.metrics["tensors"] == 2 * len(load_checkpoint(checkpoint).tensors)


def test_a_flipped_bit_among_embedded_weights_is_found(
    embedded_bundles: dict[str, tuple[Path, Path, ExportResult]], tmp_path: Path
) -> None:
    checkpoint, bundle, _ = embedded_bundles["bfloat16"]
    content = read_tensors(checkpoint / WEIGHTS)["model.layers.1.mlp.up_proj.weight"][2]
    for name in GRAPHS:
        copy = Path(shutil.copytree(bundle, tmp_path / name))
        raw = bytearray((copy / name).read_bytes())
        raw[raw.index(content) + 1001] ^= 1
        (copy / name).write_bytes(raw)
        opened = load_bundle(copy, ignore_hashes=True)
        report = validate_bundle(opened, ValidateConfig(stages=("bundle/weights",), checkpoint=checkpoint))
        (stage,) = [stage for stage in report.stages if stage.name == "bundle/weights"]
        assert stage.verdict == "fail"
        assert stage.reason == f"not the checkpoint's: {name}: model.layers.1.mlp.up_proj.weight"


def test_in_place_the_embedded_weights_are_held_to_the_files_beside_them(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    export_checkpoint(checkpoint, config=ExportConfig(weights="embed"))
    config = ValidateConfig(stages=("bundle/weights",))
    (first, *_) = validate_bundle(load_bundle(checkpoint), config).stages
    assert (first.name, first.verdict) == ("bundle/weights", "pass")
    raw = bytearray((checkpoint / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (checkpoint / WEIGHTS).write_bytes(raw)
    (first, *_) = validate_bundle(load_bundle(checkpoint), config).stages
    assert (first.name, first.verdict) == ("bundle/weights", "fail")


@pytest.mark.parametrize("way", ["elsewhere", "in place"])
def test_first_layers_of_an_embedded_bundle_are_held_to_the_checkpoint(
    way: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    output = tmp_path / "out" if way == "elsewhere" else None
    export_checkpoint(checkpoint, output, ExportConfig(weights="embed"))
    bundle = load_bundle(output or checkpoint)
    v = CausalValidator(bundle, ValidateConfig(steps=2, prompt_tokens=8, checkpoint=checkpoint if output else None))
    before = snapshot(bundle.folder)
    with first_layers(bundle, 1, checkpoint=v.checkpoint) as prefix:
        inner = v.of_prefix(prefix)
        assert inner.folder == prefix.folder
        measured = inner.measured(inner.onnxruntime, inner.rows, torch.float32)
        assert all(item.share <= 1 for item in measured)
    assert snapshot(bundle.folder) == before


# ---- what is refused --------------------------------------------------------------------------------------------


def test_converting_in_place_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    for output in ([], ["-o", checkpoint]):
        check_refused(
            capsys, tmp_path, ["export", checkpoint, "--dtype", "float16", "--convert-weights", *output],
            "weights are not converted in place", str(checkpoint), "-o BUNDLE",
        )  # fmt: skip


@pytest.mark.parametrize("weights", ["link", "embed"])
def test_converted_weights_are_neither_linked_nor_embedded(weights: Any) -> None:
    with pytest.raises(ConfigError, match="neither linked nor embedded") as caught:
        ExportConfig(weights=weights, convert_weights=True)
    assert f"weights {weights}" in caught.value.details["got"]
    assert ("embed" in str(caught.value.hint)) == (weights == "embed")


def test_unwritten_embedding_is_an_error_not_a_short_file(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(make_checkpoint())
    os.truncate(checkpoint.folder / WEIGHTS, 5000)
    with pytest.raises(ExportError, match="became shorter"):
        list(embedded.tensor_blocks(checkpoint.folder, checkpoint.tensors["lm_head.weight"]))


def test_manifest_of_every_way_lists_the_files_that_the_graph_reads(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    for weights in ("auto", "link", "copy", "embed"):
        export_checkpoint(checkpoint, tmp_path / weights, ExportConfig(weights=weights, hash_weights=True))  # type: ignore[arg-type]
        listed = json.loads((tmp_path / weights / "manifest.json").read_text())["weights"]
        assert [entry["file"] for entry in listed] == ([] if weights == "embed" else [WEIGHTS])
        assert all(entry["sha256"] == sha256_of_file(checkpoint / WEIGHTS) for entry in listed)
