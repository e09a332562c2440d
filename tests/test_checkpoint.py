"""A checkpoint folder is opened only if every tensor its config implies is there, once, whole and of the right shape."""

from __future__ import annotations

import json
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, MakeCheckpoint, edit_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support import (
    check_export_refused,
    check_refused,
    hostile_json,
    json_paths,
    make_special,
    patient,
    read_safetensors,
    read_tensors,
    refused_or,
    split_in_shards,
    with_json_at,
    write_index,
    write_safetensors,
    write_tensors,
)

from llama_export.checkpoint.checkpoint import load_checkpoint, resolve_dtype
from llama_export.checkpoint.safetensors import read_safetensors_header
from llama_export.cli.main import main
from llama_export.config.decoder import count_parameters, expected_tensors
from llama_export.config.huggingface import load_config
from llama_export.errors import CheckpointError, ConfigError

Capture = pytest.CaptureFixture[str]
Tensors = dict[str, tuple[str, list[int], bytes]]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def edit_tensors(make_checkpoint: MakeCheckpoint) -> Callable[..., Path]:
    """``edit_tensors(change, **config)`` -> a checkpoint whose dict of tensors ``change`` has modified."""

    def edit(change: Callable[[Tensors], object], **config: Any) -> Path:
        checkpoint = make_checkpoint(**config)
        tensors = read_tensors(checkpoint / FILE)
        change(tensors)
        write_tensors(checkpoint / FILE, tensors)
        return checkpoint

    return edit


@pytest.fixture
def edit_header(make_checkpoint: MakeCheckpoint) -> Callable[..., Path]:
    """``edit_header(change)`` -> a checkpoint whose safetensors header ``change`` has modified; the data stays."""

    def edit(change: Callable[[dict[str, Any]], object]) -> Path:
        checkpoint = make_checkpoint()
        header, data = read_safetensors(checkpoint / FILE)
        change(header)
        write_safetensors(checkpoint / FILE, header, data)
        return checkpoint

    return edit


# ---- what is read -----------------------------------------------------------------------------------------------


def test_entries_point_at_the_bytes_that_safetensors_reads(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    want = load_file(tiny_checkpoint / FILE)
    raw = (tiny_checkpoint / FILE).read_bytes()
    assert list(checkpoint.tensors) == list(expected_tensors(checkpoint.config))
    for name, entry in checkpoint.tensors.items():
        got = np.frombuffer(raw[entry.offset : entry.offset + entry.nbytes], np.float32).reshape(entry.shape)
        np.testing.assert_array_equal(got, want[name])
    assert (
        checkpoint.weight_bytes
        == sum(array.nbytes for array in want.values())
        == 4 * count_parameters(checkpoint.config)
    )


def test_file_that_the_safetensors_library_wrote_is_read(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    arrays = load_file(checkpoint / FILE)
    (checkpoint / FILE).unlink()
    save_file(dict(reversed(arrays.items())), checkpoint / FILE, metadata={"format": "pt"})
    raw = (checkpoint / FILE).read_bytes()
    for name, entry in load_checkpoint(checkpoint).tensors.items():
        assert raw[entry.offset : entry.offset + entry.nbytes] == arrays[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_auto_dtype_is_the_stated_one_else_the_stored_one(dtype: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(dtype=dtype)
    assert load_checkpoint(folder).stored_dtype == dtype
    assert resolve_dtype("auto", load_checkpoint(folder)) == dtype
    edit_json(folder / "config.json", dtype=...)
    assert resolve_dtype("auto", load_checkpoint(folder)) == dtype
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    assert resolve_dtype("auto", load_checkpoint(folder)) == "bfloat16"
    assert resolve_dtype("float16", load_checkpoint(folder)) == "float16"
    with pytest.raises(ConfigError, match="unknown dtype: float64") as caught:
        resolve_dtype("float64", load_checkpoint(folder))
    assert caught.value.details["expected"] == "auto | float32 | float16 | bfloat16"


def test_shards_hold_the_same_tensors_as_one_file(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    whole = read_tensors(folder / FILE)
    shards = split_in_shards(folder, 3)
    checkpoint = load_checkpoint(folder)
    assert [file.name for file in checkpoint.files] == [shard.name for shard in shards]
    assert {entry.file for entry in checkpoint.tensors.values()} == {shard.name for shard in shards}
    for name, entry in checkpoint.tensors.items():
        raw = (folder / entry.file).read_bytes()
        assert raw[entry.offset : entry.offset + entry.nbytes] == whole[name][2]


def test_single_file_is_taken_where_an_index_exists_too_as_transformers_does(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    shutil.copy(folder / FILE, folder / "keep")
    split_in_shards(folder)
    (folder / "keep").rename(folder / FILE)
    assert [file.name for file in load_checkpoint(folder).files] == [FILE]


ROTARY_BUFFERS = [
    *(f"model.layers.{layer}.self_attn.rotary_emb.{name}" for layer in range(2) for name in ("cos_cached", "inv_freq")),
    "model.layers.0.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
]


def test_old_rotary_buffers_are_dropped_and_listed(edit_tensors: Callable[..., Path]) -> None:
    def add(tensors: Tensors) -> None:
        tensors.update(dict.fromkeys(ROTARY_BUFFERS, ("F32", [8], bytes(32))))

    checkpoint = load_checkpoint(edit_tensors(add))
    assert list(checkpoint.tensors) == list(expected_tensors(checkpoint.config))
    assert checkpoint.dropped == tuple(sorted(ROTARY_BUFFERS))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.inv_freq", "rotary_emb.scale", "model.rotary_emb.inv_freq.weight", "masked_bias"]
)
def test_buffer_that_no_llama_has_is_unexpected(name: str, edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    checkpoint = edit_tensors(lambda tensors: tensors.__setitem__(name, ("F32", [8], bytes(32))))
    check_export_refused(capsys, checkpoint, "0 missing, 1 unexpected, 0 mis-shaped", name)


def test_identical_copy_of_a_tied_head_is_accepted_and_left_out(edit_tensors: Callable[..., Path]) -> None:
    folder = edit_tensors(
        lambda tensors: tensors.__setitem__("lm_head.weight", tensors[EMBEDDING]), tie_word_embeddings=True
    )
    checkpoint = load_checkpoint(folder)
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.dropped == ("lm_head.weight",)


def test_shard_that_holds_only_a_tied_copy_still_belongs_to_the_checkpoint(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(tie_word_embeddings=True)
    split_in_shards(folder)
    first = read_tensors(folder / "model-00001-of-00002.safetensors")
    write_tensors(folder / "head.safetensors", {"lm_head.weight": first[EMBEDDING]})
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, {**weight_map, "lm_head.weight": "head.safetensors"})
    # The index goes into the bundle, so every file it names must.
    assert "head.safetensors" in [file.name for file in load_checkpoint(folder).files]


# ---- heads, and where Hugging Face's classes keep the decoder ---------------------------------------------------

CLASSES: dict[str, str] = {
    "causal-lm": "LlamaForCausalLM",
    "sequence-classification": "LlamaForSequenceClassification",
    "token-classification": "LlamaForTokenClassification",
    "question-answering": "LlamaForQuestionAnswering",
    "feature-extraction": "LlamaModel",
}
HEADS: dict[str, Tensors] = {
    "sequence-classification": {"score.weight": ("F32", [2, 72], bytes(576))},
    "token-classification": {"score.weight": ("F32", [2, 72], bytes(576)), "score.bias": ("F32", [2], bytes(8))},
    "question-answering": {
        "qa_outputs.weight": ("F32", [2, 72], bytes(576)), "qa_outputs.bias": ("F32", [2], bytes(8)),
    },
}  # fmt: skip


def with_head(task: str) -> Callable[[Tensors], None]:
    """Puts the head of a task in the place of ``lm_head``."""

    def change(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors.update(HEADS.get(task, {}))

    return change


def under(prefix: str) -> Callable[[Tensors], None]:
    """Renames the decoder's tensors."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    return change


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("task", CLASSES)
def test_what_hugging_face_saves_is_read_whole(task: str, shard_size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(**TINY, id2label={0: "A", 1: "B", 2: "C"})
    model = getattr(transformers, CLASSES[task])(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.task == task
    assert (len(checkpoint.files) > 1) == (shard_size == "40KB")
    assert list(checkpoint.tensors) == list(expected_tensors(checkpoint.config, checkpoint.task))
    want = dict(model.named_parameters())
    assert {entry.name for entry in checkpoint.tensors.values()} == set(want)
    for entry in checkpoint.tensors.values():
        raw = (tmp_path / entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes]
        got = np.frombuffer(raw, np.float32).reshape(entry.shape)
        np.testing.assert_array_equal(got, want[entry.name].detach().numpy())
    assert checkpoint.dropped == ()


@pytest.mark.parametrize("prefix", ["model.", "transformer.", ""], ids=repr)
def test_decoder_is_found_under_every_prefix_of_hugging_face(prefix: str, edit_tensors: Callable[..., Path]) -> None:
    folder = edit_tensors(under(prefix))
    checkpoint = load_checkpoint(folder)
    assert list(checkpoint.tensors) == list(expected_tensors(checkpoint.config))
    assert checkpoint.tensors[EMBEDDING].name == f"{prefix}embed_tokens.weight"
    assert checkpoint.tensors["lm_head.weight"].name == "lm_head.weight"
    assert checkpoint.stored_dtype == "float32"


def test_decoder_under_two_prefixes_is_refused(edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    def mix(tensors: Tensors) -> None:
        tensors["transformer.norm.weight"] = tensors.pop("model.norm.weight")

    check_export_refused(
        capsys, edit_tensors(mix), "the decoder is stored under several prefixes: `model.` and `transformer.`",
        f"{EMBEDDING}, transformer.norm.weight", "one of `model.`, `transformer.`, ``", "save one of them again",
    )  # fmt: skip


def test_foreign_prefix_is_refused(edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    check_export_refused(
        capsys, edit_tensors(under("base_model.model.model.")), "20 missing, 20 unexpected",
        "base_model.model.model.embed_tokens.weight",
    )  # fmt: skip


def test_errors_name_tensors_as_they_are_stored(edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    def change(tensors: Tensors) -> None:
        under("transformer.")(tensors)
        tensors["transformer.norm.weight"] = ("F32", [71], bytes(284))
        tensors["transformer.layers.2.mlp.up_proj.weight"] = ("F32", [3], bytes(12))

    check_export_refused(
        capsys, edit_tensors(change), "unexpected: transformer.layers.2.mlp.up_proj.weight",
        "mis-shaped: transformer.norm.weight: got [71], expected [72]",
    )  # fmt: skip


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering"])
def test_head_of_the_pre_training_is_dropped_and_listed(task: str, edit_tensors: Callable[..., Path]) -> None:
    for tied in (False, True):
        folder = edit_tensors(
            lambda tensors: tensors.update({"lm_head.weight": ("F32", [97, 72], bytes(27936)), **HEADS[task]}),
            name=f"tied-{tied}", tie_word_embeddings=tied, architectures=[CLASSES[task]],
        )  # fmt: skip
        checkpoint = load_checkpoint(folder)
        assert checkpoint.task == task
        assert checkpoint.dropped == ("lm_head.weight",)
        assert set(HEADS[task]) <= set(checkpoint.tensors)


@pytest.mark.parametrize("task", ["causal-lm", *HEADS])
def test_features_are_read_from_a_checkpoint_with_any_head(task: str, edit_tensors: Callable[..., Path]) -> None:
    folder = edit_tensors((lambda tensors: None) if task == "causal-lm" else with_head(task))
    checkpoint = load_checkpoint(folder, task="feature-extraction")
    assert checkpoint.dropped == tuple(sorted(HEADS.get(task, {"lm_head.weight": None})))
    assert all(name.startswith("model.") for name in checkpoint.tensors)


@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("sequence-classification", "score.weight is missing"),
        ("token-classification", "score.weight, score.bias are missing"),
        ("question-answering", "qa_outputs.weight, qa_outputs.bias are missing"),
    ],
)
def test_missing_head_is_refused_never_random(
    task: str, missing: str, make_checkpoint: MakeCheckpoint, edit_tensors: Callable[..., Path]
) -> None:
    tied = make_checkpoint("tied", tie_word_embeddings=True)
    bare = edit_tensors(lambda tensors: tensors.pop("lm_head.weight"), name="bare")
    for folder, base in ((make_checkpoint(), "causal-lm"), (tied, "causal-lm"), (bare, "feature-extraction")):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(folder, task=task)
        assert caught.value.message == f"the checkpoint has no head for {task}: {missing}"
        assert caught.value.hint == f"train it first, or choose --task {base}"


def test_token_classifier_without_its_bias_is_refused(edit_tensors: Callable[..., Path]) -> None:
    folder = edit_tensors(with_head("sequence-classification"))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, task="token-classification")
    assert caught.value.message == "the checkpoint has no head for token-classification: score.bias is missing"
    assert caught.value.details["got"] == "score.weight"
    edit_json(folder / "config.json", token_classification_bias=False)
    assert "score.bias" not in load_checkpoint(folder, task="token-classification").tensors


def test_decoder_alone_is_no_causal_lm(edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        under("")(tensors)

    folder = edit_tensors(change, architectures=["LlamaModel"])
    assert load_checkpoint(folder).task == "feature-extraction"
    with pytest.raises(CheckpointError, match=r"no head for causal-lm: lm_head\.weight is missing") as caught:
        load_checkpoint(folder, task="causal-lm")
    assert caught.value.details["architectures"] == "LlamaModel"
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert load_checkpoint(folder, task="causal-lm").task == "causal-lm"


@pytest.mark.parametrize("task", HEADS)
def test_head_of_another_task_is_unexpected(task: str, edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    checkpoint = edit_tensors(lambda tensors: tensors.update(HEADS[task]))
    check_export_refused(
        capsys, checkpoint, "unexpected: " + ", ".join(sorted(HEADS[task])),
        "num_labels: 2; the task is causal-lm: choose another with --task",
    )  # fmt: skip


def test_head_of_another_number_of_labels_is_refused(edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    checkpoint = edit_tensors(with_head("sequence-classification"), architectures=[CLASSES["sequence-classification"]])
    edit_json(checkpoint / "config.json", num_labels=3)
    check_export_refused(
        capsys, checkpoint, "mis-shaped: score.weight: got [2, 72], expected [3, 72]", "num_labels: 3",
        "the task is sequence-classification",
    )  # fmt: skip


def test_unknown_task_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="bad value for task: 'chat'"):
        load_checkpoint(tiny_checkpoint, task="chat")


# ---- shards, links, dtypes --------------------------------------------------------------------------------------


def linked_to_blobs(checkpoint: Path, hub: Path) -> Path:
    """The layout of ~/.cache/huggingface: ``snapshots/<commit>/<file>`` are links to ``blobs/<hash>``."""
    blobs, snapshot = hub / "models--a--b" / "blobs", hub / "models--a--b" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(checkpoint.iterdir())):
        path.rename(blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    return snapshot


@pytest.mark.parametrize("shards", [1, 3])
def test_hub_cache_is_read_through_its_links(shards: int, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    whole = read_tensors(folder / FILE)
    if shards > 1:
        split_in_shards(folder, shards)
    snapshot = linked_to_blobs(folder, tmp_path / "hub")
    checkpoint = load_checkpoint(snapshot)
    assert len(checkpoint.files) == shards
    assert all(file.name.endswith(".safetensors") and file.size > 1000 for file in checkpoint.files)
    for name, entry in checkpoint.tensors.items():
        raw = (snapshot / entry.file).read_bytes()
        assert raw[entry.offset : entry.offset + entry.nbytes] == whole[name][2]


def test_link_to_a_blob_that_is_gone_is_a_missing_shard(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    split_in_shards(folder)
    snapshot = linked_to_blobs(folder, tmp_path / "hub")
    shard = snapshot / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    with pytest.raises(CheckpointError, match=f"weight file `{shard.name}` is missing"):
        load_checkpoint(snapshot)


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_keeps_its_own_dtype(sharded: bool, edit_tensors: Callable[..., Path]) -> None:
    codes = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}

    def mix(tensors: Tensors) -> None:
        for i, (name, (_, shape, _)) in enumerate(list(tensors.items())):
            code = list(codes)[i % 3]
            tensors[name] = (code, shape, bytes(int(np.prod(shape)) * codes[code][1]))

    folder = edit_tensors(mix, dtype="float32")
    stored = read_tensors(folder / FILE)
    if sharded:
        split_in_shards(folder, 4)
    checkpoint = load_checkpoint(folder)
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"float32", "float16", "bfloat16"}
    for name, entry in checkpoint.tensors.items():
        dtype, width = codes[stored[name][0]]
        assert (entry.dtype, entry.nbytes) == (dtype, int(np.prod(entry.shape)) * width)
    assert checkpoint.weight_bytes == sum(len(content) for _, _, content in stored.values())


# ---- no weights -------------------------------------------------------------------------------------------------


def test_folder_that_does_not_exist_is_refused(tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "nothing" / "here"
    check_refused(capsys, tmp_path, ["export", missing], f"no folder `{missing}`", "hint: check the path")


@pytest.mark.parametrize("name", ["../elsewhere", "./llama", "a/b/c"])
def test_relative_path_is_not_taken_for_a_hub_id(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(capsys, tmp_path, ["export", name], "no folder", "hint: check the path")


def test_hub_id_gets_the_command_that_downloads_it(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(
        capsys, tmp_path, ["export", "meta-llama/Llama-3.2-1B"], "no folder `meta-llama/Llama-3.2-1B`",
        "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B, then export Llama-3.2-1B",
    )  # fmt: skip


def test_file_given_as_checkpoint_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    file = make_checkpoint() / FILE
    check_refused(capsys, tmp_path, ["export", file], f"`{file}` is not a folder", "a Hugging Face checkpoint folder")


def test_folder_without_weights_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / FILE).unlink()
    check_export_refused(capsys, checkpoint, "no weights in this folder", str(checkpoint), FILE, INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt", "weights.pkl"])
def test_pickle_only_checkpoint_is_refused_unopened(
    name: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    (checkpoint / FILE).unlink()
    # Unpickling this raises: it names a function that does not exist.
    (checkpoint / name).write_bytes(b"cno_such_module\nrun\n(tR.")
    check_export_refused(capsys, checkpoint, "holds pickle files only", name, "*.safetensors", "can run code")


# ---- broken files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -4, -1], ids=str)
def test_truncated_file_is_refused(keep: float, make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    size = (checkpoint / FILE).stat().st_size
    rest = int(size * keep) if isinstance(keep, float) else keep % size
    with (checkpoint / FILE).open("r+b") as stream:
        stream.truncate(rest)
    check_export_refused(capsys, checkpoint, str(checkpoint / FILE), str(rest), "download the file again")


@patient
@given(share=st.floats(0, 1, exclude_max=True))
def test_no_cut_goes_unnoticed(share: float, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    raw = (tiny_checkpoint / FILE).read_bytes()
    cut = tmp_path_factory.getbasetemp() / "cut.safetensors"
    cut.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(cut)
    assert str(int(len(raw) * share)) in str(caught.value)
    assert caught.value.hint is not None
    assert "download the file again" in caught.value.hint


def test_truncation_names_the_tensor_and_both_sizes(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    size = (checkpoint / FILE).stat().st_size
    with (checkpoint / FILE).open("r+b") as stream:
        stream.truncate(size - 2)
    check_export_refused(
        capsys, checkpoint, "weight file `model.safetensors` is truncated", "lm_head.weight", f"{size - 2} bytes",
        f"at least {size} bytes",
    )  # fmt: skip


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001], ids=hex)
def test_absurd_header_length_is_refused_without_allocating_it(
    length: int, tiny_checkpoint: Path, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    write_safetensors(checkpoint / FILE, b"{}", bytes(1000), length=length)
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_safetensors_header(checkpoint / FILE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    check_export_refused(
        capsys, checkpoint, f"a header of {length} bytes in a file of 1010", "a header that fits the file"
    )


def test_header_beyond_the_formats_limit_is_refused_though_the_file_is_as_large(
    tmp_path: Path,
) -> None:
    path = tmp_path / "huge.safetensors"
    write_safetensors(path, b"{}", b"", length=100_000_001)
    with path.open("r+b") as stream:
        stream.truncate(200_000_000)  # sparse
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="100000001 bytes in a file of 200000000"):
        read_safetensors_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b"not json", b"[]", b'"text"', b"\xff\xfe", b"{" * 50, b'{"a": 1}', b'{"a": []}', b'{"a": {}}', b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}',
        b'{"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [' + b"9" * 5000 + b", 16]}}",
        b"", b" {}", b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), b"null", b"{}{}", b'{"__metadata__": {"a": 1}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [true, 4], "data_offsets": [false, 16]}}',
        b'{"a": {"dtype": "F32", "shape": {"4": 1}, "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": "06"}}',
        b'{"a": {"dtype": "F32", "shape": [4' + b", 1" * 8 + b'], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [9223372036854775808], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"' + b"a" * 2000 + b'": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    ],
    ids=lambda header: repr(header[:60]),
)  # fmt: skip
def test_header_that_is_not_safetensors_is_refused(
    header: bytes, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    write_safetensors(checkpoint / FILE, header, bytes(16))
    check_export_refused(
        capsys, checkpoint, "`model.safetensors` is not a valid safetensors file", str(checkpoint / FILE), "expected: "
    )


def move(name: str, begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    """Adds to both offsets of a tensor."""

    def change(header: dict[str, Any]) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (move(LAST, -4, -4), [f"`{LAST}` overlapping its neighbour"]),
        (move("lm_head.weight", -(10**9), -(10**9)), ["non-negative integers", "lm_head.weight"]),
        (move("lm_head.weight", 4, 4), ["truncated", "lm_head.weight", "bytes"]),
        (move("lm_head.weight", 0, -4), ["`lm_head.weight` of 27932 bytes", "27936 bytes for float32 [97, 72]"]),
        (move("lm_head.weight", 27936, 0), ["`lm_head.weight` of 0 bytes", "27936 bytes for float32 [97, 72]"]),
        (move("lm_head.weight", 1 << 62, 1 << 62), ["truncated", str((1 << 62) + 27936)[:6]]),
        (move("lm_head.weight", 1 << 70, 1 << 70), ["non-negative integers of 63 bits", "lm_head.weight"]),
        (lambda header: header.pop(LAST), [" unused bytes before ", "tensors without holes"]),
        (lambda header: header.pop("lm_head.weight"), ["nothing after the last tensor", "bytes"]),
    ],
    ids=["overlap", "negative", "past-the-end", "short", "reversed", "huge", "beyond", "hole", "rest"],
)
def test_offsets_that_do_not_tile_the_file_are_refused(
    change: Callable[[dict[str, Any]], object], parts: list[str], edit_header: Callable[..., Path], capsys: Capture
) -> None:
    checkpoint = edit_header(change)
    check_export_refused(capsys, checkpoint, "model.safetensors", str(checkpoint / FILE), *parts)


def test_two_tensors_on_the_same_bytes_are_refused(edit_header: Callable[..., Path], capsys: Capture) -> None:
    up, gate = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"

    def share(header: dict[str, Any]) -> None:
        header[up]["data_offsets"] = header[gate]["data_offsets"]

    check_export_refused(capsys, edit_header(share), "overlapping its neighbour at byte", "disjoint tensors")


@patient
@given(seed=st.integers(0, 2**32), edits=st.integers(1, 6))
def test_damaged_header_is_refused_or_stays_inside_the_file(
    seed: int, edits: int, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    raw = bytearray((tiny_checkpoint / FILE).read_bytes())
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(edits):
        raw[rng.randrange(header_end)] = rng.choice(b'0123456789"[]{},:-eFBI \x00\xff')
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(tiny_checkpoint / "config.json", folder / "config.json")
    (folder / FILE).write_bytes(raw)
    opened = refused_or(lambda: read_safetensors_header(folder / FILE))
    if opened is None:
        return
    file, entries = opened
    assert sum(entry.nbytes for entry in entries) < file.size
    assert all(0 < entry.offset <= entry.offset + entry.nbytes <= file.size for entry in entries)
    whole = refused_or(lambda: load_checkpoint(folder))
    assert whole is None or whole.tensors == load_checkpoint(tiny_checkpoint).tensors


@pytest.mark.parametrize(("dtype", "width"), [("I8", 1), ("I64", 8), ("F64", 8), ("F8_E4M3", 1), ("U8", 1)])
def test_dtype_that_is_not_exported_is_refused(
    dtype: str, width: int, edit_header: Callable[..., Path], capsys: Capture
) -> None:
    def retype(header: dict[str, Any]) -> None:
        begin, end = header[LAST]["data_offsets"]
        header[LAST] = {"dtype": dtype, "shape": [(end - begin) // width], "data_offsets": [begin, end]}

    check_export_refused(
        capsys,
        edit_header(retype),
        f"tensor `{LAST}` has dtype {dtype}",
        "expected: F32 | F16 | BF16",
        "original float",
    )


@patient
@given(data=st.data())
def test_hostile_values_in_header_index_or_config_are_refused_or_harmless(
    data: st.DataObject, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile"
    if not folder.exists():
        shutil.copytree(tiny_checkpoint, folder)
        split_in_shards(folder)
    sound = load_checkpoint(folder)
    shard = folder / sound.files[0].name
    target = data.draw(st.sampled_from([shard, folder / INDEX, folder / "config.json"]))
    before = target.read_bytes()
    header, rest = read_safetensors(target) if target == shard else (json.loads(before), b"")
    path = data.draw(st.sampled_from(json_paths(header)))
    raw = json.dumps(with_json_at(header, path, data.draw(hostile_json))).encode()
    try:
        if target == shard:
            write_safetensors(target, raw, rest)
        else:
            target.write_bytes(raw)
        opened = refused_or(lambda: load_checkpoint(folder))
        if opened is not None:
            assert list(opened.tensors) == list(expected_tensors(opened.config, opened.task))
        if opened is not None and target != folder / "config.json":
            # Free text may go from a header, or be added: the data then begin that much earlier, or later.
            moved = len(target.read_bytes()) - len(before)
            tensors = {
                name: replace(entry, offset=entry.offset - moved) if entry.file == target.name else entry
                for name, entry in opened.tensors.items()
            }
            assert (tensors, opened.config) == (sound.tensors, sound.config)
    finally:
        target.write_bytes(before)


def test_a_header_without_its_free_text_is_as_good(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What the test above once drew: ``__metadata__`` is empty, and everything behind it lies elsewhere."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    sound = load_checkpoint(folder)
    (file,) = (folder / item.name for item in sound.files)
    before = len(file.read_bytes())
    header, rest = read_safetensors(file)
    write_safetensors(file, json.dumps({**header, "__metadata__": {}}).encode(), rest)
    moved = len(file.read_bytes()) - before
    opened = load_checkpoint(folder)
    assert {name: entry.offset - moved for name, entry in opened.tensors.items()} == {
        name: entry.offset for name, entry in sound.tensors.items()
    }


def test_folder_in_place_of_a_shard_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    shard = split_in_shards(checkpoint)[1]
    shard.unlink()
    shard.mkdir()
    check_export_refused(capsys, checkpoint, f"weight file `{shard.name}` cannot be read", "Is a directory", str(shard))


# ---- the index --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/hostname",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "a\0b",
    ],
    ids=repr,
)
def test_index_that_points_out_of_its_folder_is_refused(
    name: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    write_index(checkpoint, {**weight_map, LAST: name})
    check_export_refused(
        capsys, checkpoint, f"`{INDEX}` points out of its folder", "plain file names", str(checkpoint / INDEX),
        name.replace("\0", "\\x00"),
    )  # fmt: skip


def test_half_of_a_surrogate_pair_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    write_index(checkpoint, {**weight_map, LAST: "\ud800.safetensors"})
    check_export_refused(capsys, checkpoint, f"`{INDEX}` cannot be read as JSON", "half of a surrogate pair")
    (checkpoint / INDEX).write_text('{"weight_map": {"\\ud83d\\ude00": "\\ud83d\\ude00.safetensors"}}')
    check_export_refused(capsys, checkpoint, "`\U0001f600.safetensors` is missing")


def test_an_index_of_more_tensors_or_files_than_any_model_has_is_refused_at_once(
    make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    for count, said in ((200_000, "too many tensors"), (20_000, "too many files")):
        write_index(checkpoint, {f"t{number}": f"{number}.safetensors" for number in range(count)})
        start = time.process_time()
        check_export_refused(capsys, checkpoint, said, f"{count}")
        assert time.process_time() - start < 5


def test_a_header_of_more_tensors_than_any_model_has_is_refused_at_once(
    make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    for entries, said in (("{}", "more than 100000"), ("[[[[[[[[0]]]]]]]]", "header of ")):
        raw = ("{" + ",".join(f'"{number}":{entries}' for number in range(500_000)) + "}").encode()
        (checkpoint / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
        start = time.process_time()
        check_export_refused(capsys, checkpoint, "not a valid safetensors file", said)
        assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_of_gigabytes_is_not_taken_along(
    name: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    with (checkpoint / name).open("wb") as stream:
        stream.truncate(2 << 30)
    assert main(["export", str(checkpoint), "-o", str(checkpoint.parent / "out")]) == 2
    assert f"`{name}` is too large" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "pytorch_model.bin"])
def test_index_that_names_another_kind_of_file_is_refused(
    name: str, make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    write_index(checkpoint, {**weight_map, LAST: name})
    check_export_refused(capsys, checkpoint, "not safetensors", f"got:      {name}", "expected: *.safetensors")


@pytest.mark.parametrize("weight_map", [None, {}, [FILE], "x"], ids=repr)
def test_index_without_a_map_is_refused(weight_map: Any, make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    write_index(checkpoint, weight_map)
    check_export_refused(capsys, checkpoint, f"`{INDEX}` has no weight_map", '{"weight_map": {tensor: file}}')


def test_missing_shard_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    shard = split_in_shards(checkpoint)[1]
    shard.unlink()
    check_export_refused(capsys, checkpoint, f"weight file `{shard.name}` is missing", str(checkpoint), "missing shard")


def test_tensor_stored_in_two_shards_is_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    first, second = split_in_shards(checkpoint)
    tensors = read_tensors(first)
    write_tensors(second, {**read_tensors(second), EMBEDDING: tensors[EMBEDDING]})
    check_export_refused(
        capsys, checkpoint, f"tensor `{EMBEDDING}` is stored twice", f"first:  {first.name}", f"second: {second.name}"
    )


# ---- files that are none, or lie elsewhere ----------------------------------------------------------------------


@pytest.fixture
def checkpoint_of_every_file(make_checkpoint: MakeCheckpoint) -> Path:
    """Two shards, an index, a config and a tokenizer."""
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    return checkpoint


SHARD = "model-00002-of-00002.safetensors"
EVERY = ["config.json", INDEX, SHARD, "tokenizer.json"]


@pytest.mark.parametrize("how", ["relative", "absolute", "through-a-link", "dangling", "device"])
@pytest.mark.parametrize("name", EVERY)
def test_link_out_of_the_folder_is_refused(
    name: str, how: str, checkpoint_of_every_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint, secret = checkpoint_of_every_file, tmp_path / "secret"
    (checkpoint / name).rename(secret)
    if how == "through-a-link":
        (checkpoint / "sub").symlink_to(tmp_path)
    target = {
        "relative": "../secret", "absolute": secret, "through-a-link": "sub/secret", "dangling": "../nothing",
        "device": "/dev/zero",
    }[how]  # fmt: skip
    (checkpoint / name).symlink_to(target)
    real = {"dangling": tmp_path / "nothing", "device": "/dev/zero"}.get(how, secret)
    check_export_refused(
        capsys, checkpoint, f"`{name}` is a symbolic link out of its folder", f"got:      {real}",
        "a file in the folder, or in the blobs", "put the file itself there",
    )  # fmt: skip


def test_links_that_stay_in_the_folder_are_followed(checkpoint_of_every_file: Path) -> None:
    whole = load_checkpoint(checkpoint_of_every_file)
    (checkpoint_of_every_file / "files").mkdir()
    for name in EVERY:
        (checkpoint_of_every_file / name).rename(checkpoint_of_every_file / "files" / name)
        (checkpoint_of_every_file / name).symlink_to(f"files/{name}")
    assert load_checkpoint(checkpoint_of_every_file).tensors == whole.tensors


def test_link_that_leads_to_itself_is_refused(checkpoint_of_every_file: Path, capsys: Capture) -> None:
    (checkpoint_of_every_file / SHARD).unlink()
    (checkpoint_of_every_file / SHARD).symlink_to(SHARD)
    check_export_refused(capsys, checkpoint_of_every_file, f"weight file `{SHARD}` cannot be read", "symbolic links")


@pytest.mark.parametrize(
    "where", ["another-cache", "beside-the-blobs", "below-the-blobs", "blob-is-a-link", "no-cache"]
)
def test_hub_cache_has_one_way_out(where: str, checkpoint_of_every_file: Path, tmp_path: Path, capsys: Capture) -> None:
    snapshot = linked_to_blobs(checkpoint_of_every_file, tmp_path / "hub")
    shard, repo = snapshot / SHARD, snapshot.parents[1]
    blob = shard.resolve()
    other = {
        "another-cache": tmp_path / "hub" / "models--c--d" / "blobs" / "x", "beside-the-blobs": repo / "x",
        "below-the-blobs": repo / "blobs" / "sub" / "x",
    }.get(where, tmp_path / "x")  # fmt: skip
    other.parent.mkdir(parents=True, exist_ok=True)
    if where == "no-cache":
        repo.rename(tmp_path / "hub" / "llama")
        shard = tmp_path / "hub" / "llama" / "snapshots" / "0123abcd" / "config.json"
    elif where == "blob-is-a-link":
        blob.rename(other)
        blob.symlink_to(other)
    else:
        blob.rename(other)
        shard.unlink()
        shard.symlink_to(other)
    check_refused(
        capsys, tmp_path, ["export", shard.parent, "-o", tmp_path / "out"],
        f"`{shard.name}` is a symbolic link out of its folder",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
@pytest.mark.parametrize("name", [*EVERY, FILE])
def test_what_is_no_file_is_refused_without_being_opened(
    name: str,
    kind: str,
    checkpoint_of_every_file: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint_of_every_file / name).unlink(missing_ok=True)
    make_special(checkpoint_of_every_file / name, kind)
    parts = [f"`{name}` "] + (["cannot be read"] if name.endswith(".safetensors") else ["is not a regular file"])
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_checkpoint(checkpoint_of_every_file)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_huge_json_is_refused_unread(
    name: str, checkpoint_of_every_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    with (checkpoint_of_every_file / name).open("r+b") as stream:
        stream.truncate(1 << 36)  # sparse
    tracemalloc.start()
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(checkpoint_of_every_file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert f"`{name}` cannot be read as JSON" in str(caught.value)
    assert f"{1 << 36} bytes, more than the 16000000" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' stands twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "key 'weight_map' stands twice"),
        (b'{"weight_map": ' + b"[" * 50_000, "recursion"),
        (b"\xff\xfe{}", "utf-8"),
        (b'{"weight_map": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
    ids=["shard-twice", "map-twice", "deep", "not-utf-8", "long-integer"],
)
def test_index_that_is_no_sound_json_is_refused(
    raw: bytes, reason: str, checkpoint_of_every_file: Path, capsys: Capture
) -> None:
    (checkpoint_of_every_file / INDEX).write_bytes(raw)
    check_export_refused(capsys, checkpoint_of_every_file, f"`{INDEX}` cannot be read as JSON", reason)


def test_config_of_a_billion_layers_is_refused_in_no_time(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", num_hidden_layers=10**9)
    assert refused_or(lambda: load_checkpoint(checkpoint)) is None


def test_names_in_errors_do_not_steer_the_terminal(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    header, rest = read_safetensors(checkpoint / FILE)
    header["\x1b[2J\x9b1m"] = header.pop("model.norm.weight")
    write_safetensors(checkpoint / FILE, header, rest)
    check_export_refused(capsys, checkpoint, "unexpected: \\x1b[2J\\x9b1m")


# ---- the tensors against the config -----------------------------------------------------------------------------


def test_missing_unexpected_and_mis_shaped_tensors_are_all_listed(
    edit_tensors: Callable[..., Path], capsys: Capture
) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = ("F32", [3], bytes(12))
        tensors["model.layers.0.self_attn.q_proj.bias"] = ("F32", [96], bytes(384))
        tensors["model.norm.weight"] = ("F32", [71], bytes(284))

    check_export_refused(
        capsys, edit_tensors(change), "checkpoint does not match its config: 1 missing, 2 unexpected, 1 mis-shaped",
        "missing:    model.layers.1.mlp.up_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight",
        "mis-shaped: model.norm.weight: got [71], expected [72]",
        "num_hidden_layers: 2, hidden_size: 72, tie_word_embeddings: false",
    )  # fmt: skip


def test_more_layers_in_the_config_than_stored_are_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", num_hidden_layers=3)
    check_export_refused(
        capsys, checkpoint, "9 missing, 0 unexpected, 0 mis-shaped", "model.layers.2.input_layernorm.weight",
        "and 3 more", "num_hidden_layers: 3",
    )  # fmt: skip


def test_fewer_layers_in_the_config_than_stored_are_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", num_hidden_layers=1)
    check_export_refused(capsys, checkpoint, "0 missing, 9 unexpected, 0 mis-shaped", "model.layers.1.", "and 3 more")


def test_swapped_key_and_query_heads_are_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", num_key_value_heads=6)
    check_export_refused(
        capsys, checkpoint, "0 missing, 0 unexpected, 4 mis-shaped",
        "model.layers.0.self_attn.k_proj.weight: got [32, 72], expected [96, 72]",
    )  # fmt: skip


def test_missing_biases_are_listed(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", mlp_bias=True)
    check_export_refused(capsys, checkpoint, "6 missing, 0 unexpected", "model.layers.0.mlp.gate_proj.bias")


def test_untied_config_needs_a_stored_head(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    checkpoint = make_checkpoint(tie_word_embeddings=True)
    edit_json(checkpoint / "config.json", tie_word_embeddings=False)
    check_export_refused(
        capsys, checkpoint, "the checkpoint has no head for causal-lm: lm_head.weight is missing", "got:                 no head",
        "tie_word_embeddings: false", "set tie_word_embeddings to true", "--task feature-extraction",
    )  # fmt: skip


@pytest.mark.parametrize("where", [0, 13_000, -1], ids=["first-byte", "middle", "last-byte"])
def test_tied_embeddings_with_a_stored_head_that_differs_are_refused(
    where: int, edit_tensors: Callable[..., Path], capsys: Capture
) -> None:
    def add(tensors: Tensors) -> None:
        dtype, shape, content = tensors[EMBEDDING]
        other = bytearray(content)
        other[where] ^= 1
        tensors["lm_head.weight"] = (dtype, shape, bytes(other))

    checkpoint = edit_tensors(add, tie_word_embeddings=True)
    check_export_refused(
        capsys, checkpoint, "`lm_head.weight` is stored and differs from `model.embed_tokens.weight`", str(checkpoint),
        "set tie_word_embeddings to false",
    )  # fmt: skip


def test_tied_head_of_another_shape_is_refused(edit_tensors: Callable[..., Path], capsys: Capture) -> None:
    checkpoint = edit_tensors(
        lambda tensors: tensors.__setitem__("lm_head.weight", ("F32", [1, 72], bytes(288))), tie_word_embeddings=True
    )
    check_export_refused(capsys, checkpoint, "tie_word_embeddings is true", "differs")


def test_nothing_is_written_while_a_checkpoint_is_opened(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    before = {path.name: path.stat() for path in folder.iterdir()}
    load_checkpoint(folder)
    load_config(folder)
    after = {path.name: path.stat() for path in folder.iterdir()}
    assert {name: (stat.st_size, stat.st_mtime_ns) for name, stat in before.items()} == {
        name: (stat.st_size, stat.st_mtime_ns) for name, stat in after.items()
    }
