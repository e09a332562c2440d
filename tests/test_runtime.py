"""The onnxruntime session and streamed text."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracles
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from random_llama import write_random_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llama_export._system.process import resident_bytes
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.errors import ConfigError, LlamaExportError, ShapeError, ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.model import load_reference
from llama_export.parity.sessions import reference_session
from llama_export.runtime import onnxruntime_graph as graph_module
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession
from llama_export.runtime.text import TextCodec, TextStream

V = TINY["vocab_size"]
LIMIT = 1e-5


@pytest.fixture(scope="module")
def bundle(tiny_bundles: dict[str, Bundle]) -> Bundle:
    return tiny_bundles["float32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Bundle]:
    """Hugging Face's model and its bundle; random weights large enough that greedy tokens are not near ties."""
    folder = tmp_path_factory.mktemp("runtime") / "checkpoint"
    model = oracles.huggingface_llama(folder, seed=8, **TINY)
    export_checkpoint(folder)
    return model, load_bundle(folder)


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape)


def share(got: np.ndarray, want: np.ndarray) -> float:
    """Error as a share of the largest wanted value."""
    return float(np.abs(got - want).max() / np.abs(want).max())


# ---- in place ---------------------------------------------------------------------------------------------------


def test_present_is_returned_at_the_address_of_past(bundle: Bundle) -> None:
    session = OnnxRuntimeSession(bundle, max_seq_len=16, batch_size=2)
    bound = {name: array.ctypes.data for name, array in session.cache.items()}
    assert len(set(bound.values())) == 2 * TINY["num_hidden_layers"]
    for ids in (random_ids(2, 5), random_ids(2, 1)):
        session.step(ids)
        assert session.output_addresses() == bound
    session.step(random_ids(2, 3))  # row by row
    assert session.output_addresses() == {name: array[1:].ctypes.data for name, array in session.cache.items()}
    session.reset()
    session.step(random_ids(2, 2))
    assert session.output_addresses() == bound


def test_only_in_place_does_what_lies_past_the_valid_length_survive(bundle: Bundle) -> None:
    """A copy of the cache would start from zeros, as the same graph does when past and present are two buffers."""
    session = OnnxRuntimeSession(bundle, max_seq_len=16)
    for array in session.cache.values():
        array[...] = 7
    session.step([[1, 2, 3]])
    session.step([[4]])
    for array in session.cache.values():
        assert (array[:, :, 4:] == 7).all()
        assert not (array[:, :, :4] == 7).any()
    one = np.array([1])
    feeds = {"input_ids": one[None], "past_length": one, "sequence_length": one, "logits_index": one[None] * 0}
    _, *copies = session._graph.session.run(None, {**feeds, **session.cache})
    assert all((array[:, :, 2:] == 0).all() for array in copies)


def test_a_step_changes_its_own_slots_and_nothing_else(bundle: Bundle) -> None:
    session = OnnxRuntimeSession(bundle, max_seq_len=20, batch_size=3)
    session.step(random_ids(3, 6), sequence_length=[6, 2, 4])
    before = {name: session.cache_array(name).copy() for name in session.cache}
    session.step(random_ids(2, 3, seed=1), sequence_length=[3, 1])  # the first two rows
    written, may_be = np.zeros((2, 3, 20), bool)
    written[0, 6:9] = written[1, 2] = True
    may_be[1, 3:5] = True  # padding, which the next step overwrites
    for name, old in before.items():
        changed = (session.cache_array(name) != old).any(-1)  # [B, G, C]
        expected = np.broadcast_to(written[:, None], changed.shape)
        np.testing.assert_array_equal(changed & ~may_be[:, None], expected, err_msg=name)
    assert session.past_length.tolist() == [9, 3, 4]


def test_rows_that_leave_and_tokens_that_are_taken_back_change_nothing_for_the_rest(bundle: Bundle) -> None:
    session = OnnxRuntimeSession(bundle, max_seq_len=20, batch_size=4)
    ids = random_ids(4, 6)
    session.step(ids, sequence_length=[6, 2, 4, 5])
    session.keep_rows([1, 3])
    assert (session.batch_size, session.past_length.tolist()) == (2, [2, 5])
    session.step(random_ids(2, 3, seed=1))
    session.rewind([2, 5])
    got = session.step([[7], [8]])
    for row, (old, token) in enumerate(((1, 7), (3, 8))):
        alone = OnnxRuntimeSession(bundle, max_seq_len=20)
        alone.step(ids[old : old + 1, : [6, 2, 4, 5][old]])
        assert share(got[row : row + 1], alone.step([[token]])) < 1e-5
    session.reset(batch_size=1)
    assert session.past_length.tolist() == [0]
    session.reset(batch_size=5)  # more rows than there were
    assert session.step(random_ids(5, 2)).shape == (5, 1, V)


@pytest.mark.parametrize("lengths", [[4, 3], [-1, 3], [3], [3, 3, 3]])
def test_a_cache_is_rewound_to_what_it_holds(bundle: Bundle, lengths: list[int]) -> None:
    session = OnnxRuntimeSession(bundle, max_seq_len=8, batch_size=2)
    session.step(random_ids(2, 3))
    with pytest.raises(ShapeError, match="rewound"):
        session.rewind(lengths)
    assert session.past_length.tolist() == [3, 3]


@pytest.mark.parametrize("rows", [[], [0, 0], [1, 0], [2], [-1]])
def test_only_rows_that_are_there_are_kept(bundle: Bundle, rows: list[int]) -> None:
    session = OnnxRuntimeSession(bundle, max_seq_len=8, batch_size=2)
    session.step(random_ids(2, 3))
    with pytest.raises(ShapeError, match="kept"):
        session.keep_rows(rows)
    assert session.past_length.tolist() == [3, 3]


def test_a_capacity_that_is_not_reached_takes_no_memory(trained: tuple[Any, Bundle]) -> None:
    _, bundle = trained
    session = OnnxRuntimeSession(bundle, max_seq_len=bundle.config.max_length, batch_size=1024)
    reserved = sum(array.nbytes for array in session.cache.values())
    assert reserved > 32 << 20
    before = resident_bytes()
    session.step(random_ids(1, 4))
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before < reserved / 4


# ---- the same numbers, however the tokens arrive ----------------------------------------------------------------


def test_prefill_chunks_and_decode_are_the_reference(trained: tuple[Any, Bundle]) -> None:
    _, bundle = trained
    ids = random_ids(1, 20)
    reference = reference_session(load_reference(bundle.folder), max_seq_len=24)
    whole = OnnxRuntimeSession(bundle, max_seq_len=24)
    want = reference.step(ids, logits_index=np.arange(20)[None])
    got = whole.step(ids, logits_index=np.arange(20)[None])
    assert share(got, want) < LIMIT, share(got, want)

    parts = OnnxRuntimeSession(bundle, max_seq_len=24)
    edges = [0, 7, 8, 13, *range(14, 21)]
    pieces = [
        parts.step(ids[:, begin:end], logits_index=np.arange(end - begin)[None])
        for begin, end in itertools.pairwise(edges)
    ]
    joined = np.concatenate(pieces, 1)
    assert share(joined, got) < LIMIT, share(joined, got)
    for name in whole.cache:
        error = share(parts.cache_array(name), whole.cache_array(name))
        assert error < LIMIT, f"{name}: {error:.3g}"
        error = share(whole.cache_array(name), reference.cache_array(name))
        assert error < LIMIT, f"{name} against the reference: {error:.3g}"


def test_every_row_of_a_ragged_batch_equals_the_row_alone(trained: tuple[Any, Bundle]) -> None:
    _, bundle = trained
    lengths, ids, more = [9, 4, 1], random_ids(3, 9, seed=2), random_ids(3, 5, seed=3)
    batch = OnnxRuntimeSession(bundle, max_seq_len=20, batch_size=3)
    got = [batch.step(ids, sequence_length=lengths), *(batch.step(more[:, at : at + 1]) for at in range(5))]
    for row, length in enumerate(lengths):
        alone = OnnxRuntimeSession(bundle, max_seq_len=20)
        want = [
            alone.step(ids[row : row + 1, :length]),
            *(alone.step(more[row : row + 1, at : at + 1]) for at in range(5)),
        ]
        for step, (left, right) in enumerate(zip(got, want, strict=True)):
            error = share(left[row], right[0])
            assert error < LIMIT, f"row {row}, step {step}: {error:.3g}"


def test_what_stands_in_the_padding_does_not_matter(trained: tuple[Any, Bundle]) -> None:
    _, bundle = trained
    first, second = (OnnxRuntimeSession(bundle, max_seq_len=12, batch_size=2) for _ in range(2))
    ids = random_ids(2, 6, seed=4)
    other = ids.copy()
    other[0, 4:], other[1, 1:] = 5, 50
    for step, (left, right) in enumerate([(ids, other), (ids[:, :1], ids[:, :1])]):
        lengths = [4, 1] if step == 0 else None
        logits = [session.step(tokens, sequence_length=lengths) for session, tokens in ((first, left), (second, right))]
        np.testing.assert_array_equal(*logits, err_msg=f"step {step}")


def test_a_reset_session_equals_a_new_one(trained: tuple[Any, Bundle]) -> None:
    """What an earlier request left in the buffers is never seen."""
    _, bundle = trained
    used, new = (OnnxRuntimeSession(bundle, max_seq_len=16) for _ in range(2))
    used.step(random_ids(1, 16, seed=5))
    used.reset()
    for ids in (random_ids(1, 3), random_ids(1, 1)):
        error = share(used.step(ids), new.step(ids))
        assert error < 1e-6, error


def test_logits_index_picks_positions(bundle: Bundle) -> None:
    ids = random_ids(2, 5)

    def run(**options: Any) -> np.ndarray:
        return OnnxRuntimeSession(bundle, max_seq_len=8, batch_size=2).step(ids, **options)

    full = run(logits_index=np.arange(5)[None].repeat(2, 0))
    assert full.shape == (2, 5, V)
    picked = run(logits_index=[[4, 0], [2, 2]])
    assert share(picked, np.stack([full[0, [4, 0]], full[1, [2, 2]]])) < 1e-6
    last_valid = run(sequence_length=[5, 2])
    assert last_valid.shape == (2, 1, V)
    assert share(last_valid[:, 0], np.stack([full[0, 4], full[1, 1]])) < 1e-6


# ---- 16 bits ----------------------------------------------------------------------------------------------------


def test_a_16_bit_bundle_runs_in_float32_and_says_so(tiny_bundles: dict[str, Bundle], tiny_checkpoint: Path) -> None:
    want = reference_session(load_reference(tiny_checkpoint), max_seq_len=8).step([[3, 1, 4]])
    for dtype, bundle in tiny_bundles.items():
        session = OnnxRuntimeSession(bundle, max_seq_len=8)
        got = session.step([[3, 1, 4]])
        assert got.dtype == np.float32
        assert {session.cache_array(name).dtype for name in session.cache} == {np.dtype(np.float32)}
        assert share(got, want) < LIMIT, f"{dtype}: {share(got, want):.3g}"
        if dtype == "float32":
            assert session.note is None
        else:
            assert session.note is not None
            assert dtype in session.note
            assert "float32" in session.note


def test_a_16_bit_checkpoint_is_widened_exactly(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(dtype="bfloat16")
    export_checkpoint(folder)
    want = reference_session(load_reference(folder, torch.float32), max_seq_len=8).step([[3, 1, 4]])
    got = OnnxRuntimeSession(load_bundle(folder), max_seq_len=8).step([[3, 1, 4]])
    assert share(got, want) < LIMIT, share(got, want)


# ---- what is refused --------------------------------------------------------------------------------------------

BAD_STEPS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "more rows than the batch": ([[1, 2]] * 3, {}, "input_ids has the wrong shape"),
    "no token": (np.zeros((2, 0), np.int64), {}, "input_ids has the wrong shape"),
    "one axis": ([1, 2], {}, "input_ids has the wrong shape"),
    "a negative token": ([[1, 2], [3, -1]], {}, "token id -1 is outside the vocabulary"),
    "a token past the vocabulary": ([[1, 2], [V, 0]], {}, f"token id {V} is outside the vocabulary"),
    "a length of 0": ([[1, 2], [3, 4]], {"sequence_length": [2, 0]}, "sequence_length is out of range"),
    "a length beyond S": ([[1, 2], [3, 4]], {"sequence_length": [3, 1]}, "sequence_length is out of range"),
    "lengths of another batch": ([[1, 2], [3, 4]], {"sequence_length": [2]}, "sequence_length is out of range"),
    "an index beyond S": ([[1, 2], [3, 4]], {"logits_index": [[2], [0]]}, "logits_index is out of range"),
    "a negative index": ([[1, 2], [3, 4]], {"logits_index": [[0], [-1]]}, "logits_index is out of range"),
    "an index of another batch": ([[1, 2], [3, 4]], {"logits_index": [[0]]}, "logits_index is out of range"),
    "an index without a position": ([[1, 2], [3, 4]], {"logits_index": [[], []]}, "logits_index is out of range"),
    "more than the cache holds": (np.ones((2, 9), np.int64), {}, "the cache holds 8 tokens, the request needs 9"),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_bad_step_is_a_shape_error_and_changes_nothing(bundle: Bundle, what: str) -> None:
    ids, options, message = BAD_STEPS[what]
    session = OnnxRuntimeSession(bundle, max_seq_len=8, batch_size=2)
    with pytest.raises(ShapeError, match=message) as caught:
        session.step(ids, **options)
    assert caught.value.details
    assert session.past_length.tolist() == [0, 0]
    assert all((session.cache_array(name) == 0).all() for name in session.cache)


def test_the_fullest_row_decides_whether_a_step_fits(bundle: Bundle) -> None:
    session = OnnxRuntimeSession(bundle, max_seq_len=8, batch_size=2)
    session.step(random_ids(2, 7), sequence_length=[2, 7])
    session.step(random_ids(2, 1))
    with pytest.raises(ShapeError, match="holds 8 tokens, the request needs 9"):
        session.step(random_ids(2, 1))
    assert session.past_length.tolist() == [3, 8]


@pytest.mark.parametrize(
    ("capacity", "batch"), [(0, 1), (-1, 1), (TINY["max_position_embeddings"] + 1, 1), (8, 0)], ids=str
)
def test_an_impossible_cache_is_a_shape_error(bundle: Bundle, capacity: int, batch: int) -> None:
    with pytest.raises(ShapeError, match="is not possible") as caught:
        OnnxRuntimeSession(bundle, max_seq_len=capacity, batch_size=batch)
    assert str(TINY["max_position_embeddings"]) in caught.value.details["expected"]


def test_a_graph_that_onnxruntime_cannot_open_is_a_toolchain_error(bundle: Bundle, tmp_path: Path) -> None:
    """A sound graph with an operator that this version does not have."""
    broken = dataclasses.replace(bundle, folder=Path(shutil.copytree(bundle.folder, tmp_path / "broken")))
    model = onnx.load(str(broken.onnxruntime_path), load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatMulOfTomorrow"
    broken.onnxruntime_path.write_bytes(model.SerializeToString())
    with pytest.raises(ToolchainError, match="cannot open this bundle") as caught:
        OnnxRuntimeSession(broken, max_seq_len=8)
    assert caught.value.exit_code == 3
    assert str(broken.onnxruntime_path) in caught.value.details["file"]


# ---- text -------------------------------------------------------------------------------------------------------

TEXTS = [
    "plain text, twice  spaced",
    "naïve café, Ünïcödé, e\u0301 combining",
    "😀 👩\u200d👩\u200d👧 🇧🇷",
    "日本語 и кириллица",
    " leading and trailing ",
    "line\nbreaks\tand tabs",
    "\ufffd is a character too",
    "",
]


def byte_level_tokenizer() -> Tokenizer:
    """As Llama 3's: byte-level BPE. Few merges, so most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["def naïve(x): return 'café' # 😀😀 über, plain text"] * 3, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: pieces with U+2581 for a space, single bytes for what has no piece, one leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij", "▁a", "ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte-level": byte_level_tokenizer(), "byte fallback": byte_fallback_tokenizer()}


def stream_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_streamed_pieces_join_to_the_full_text_and_never_split_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    pieces = stream_pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not [piece for piece in pieces if "\ufffd" in piece]


def test_the_test_has_characters_of_several_tokens() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode("日").ids
        assert len(ids) >= 3
        pieces = stream_pieces(tokenizer, ids)
        assert [piece for piece in pieces if piece] == ["日"]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from(sorted(TOKENIZERS)))
def test_any_text_streams_to_itself(text: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    assert "".join(stream_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.integers(0, 260), max_size=40))
def test_any_byte_level_tokens_stream_to_their_text(ids: list[int]) -> None:
    """Models do emit bytes that are no UTF-8."""
    tokenizer = TOKENIZERS["byte-level"]
    assert "".join(stream_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.integers(0, 270), max_size=40))
def test_malformed_bytes_of_a_fallback_tokenizer_stream_without_an_error(ids: list[int]) -> None:
    """``tokenizers.DecodeStream`` raises "Invalid prefix" for, say, ``&``, a stray continuation byte, ``d``."""
    tokenizer = TOKENIZERS["byte fallback"]
    text = "".join(stream_pieces(tokenizer, ids))
    letters = [token for token in ids if 260 <= token < 270]
    assert len([character for character in text if character in "abcdefghij"]) >= len(letters)


def test_a_stray_byte_between_characters_becomes_a_replacement_character() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = [tokenizer.token_to_id(piece) for piece in ("<0x26>", "<0x8E>", "d")]
    assert stream_pieces(tokenizer, ids) == ["&", "", "\ufffdd", ""]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_character_that_never_ends_comes_out_with_finish(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("a日").ids[:-1]
    pieces = stream_pieces(tokenizer, ids)
    assert "".join(pieces[:-1]) == "a"
    assert set(pieces[-1]) == {"\ufffd"}
    assert "".join(pieces) == tokenizer.decode(ids)


def test_special_tokens_are_not_text() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    start, stop = (tokenizer.token_to_id(piece) for piece in ("<s>", "</s>"))
    ids = [start, *tokenizer.encode("café").ids, stop]
    assert "".join(stream_pieces(tokenizer, ids)) == "café"


def test_codec_reads_the_bundles_tokenizer(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path)
    ids = codec.encode("naïve 😀")
    assert codec.decode(ids) == "naïve 😀"
    stream = codec.stream()
    assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == "naïve 😀"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), ("{", "cannot be read"), ("[]", "cannot be read")]
)
def test_a_tokenizer_that_is_missing_or_broken_is_a_config_error(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        TextCodec(tmp_path)
    assert isinstance(caught.value, LlamaExportError)
    assert str(tmp_path) in str(caught.value)


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_memory_cannot_hold_widened_are_widened_as_they_are_used(
    dtype: str, tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits, and a note; a float32 checkpoint has nothing to widen."""
    bundle = tiny_bundles[dtype]
    folder = bundle.folder
    if dtype == "bfloat16":  # stored in 16 bits, too
        folder = bundle.folder.parent / "stored-bfloat16"
        if not folder.exists():
            write_random_checkpoint(folder, TINY, dtype="bfloat16")
            export_checkpoint(folder)
        bundle = load_bundle(folder)
    opened: list[dict[str, Any]] = []
    import onnxruntime

    original = onnxruntime.InferenceSession

    def watched(*arguments: Any, **options: Any) -> Any:
        opened.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    logits, notes = [], []
    for free in (1 << 40, 100_000):
        monkeypatch.setattr(graph_module, "available_memory", lambda free=free: free)
        session = OnnxRuntimeSession(bundle, max_seq_len=16)
        logits.append(session.step([[3, 1, 4]]))
        notes.append(session.note)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)
    narrow = dtype == "bfloat16"
    assert [item["disabled_optimizers"] for item in opened] == [[], ["ConstantFolding"] if narrow else []]
    assert ("widened in every step" in str(notes[1])) == narrow
    assert "widened in every step" not in str(notes[0])
