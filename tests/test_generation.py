"""Batches through a session: chunks, rows that come and go, what ends a row, stop texts, cancelling."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.llama import RopeConfig
from llama_export.errors import ConfigError, ShapeError, ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.runtime.generation import TokenEvent, generate, generate_steps
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession
from llama_export.runtime.protocol import CacheSession
from llama_export.runtime.sampling_params import SamplingParams
from llama_export.runtime.text import StopStream, TextCodec, TextStream

V = 50
DYNAMIC = RopeConfig(rope_type="dynamic", factor=2.0)


class FakeSession:
    """A session whose cache is the tokens themselves, and whose logits follow from all tokens of a row: whatever is lost,
    mixed up or seen twice changes what comes out."""

    backend, note, dtype = "fake", None, "float32"

    def __init__(self, capacity: int = 64, most_rows: int = 16, rope: RopeConfig | None = None) -> None:
        self.config: Any = SimpleNamespace(vocab_size=V, rope=rope or RopeConfig())
        self.capacity, self._most_rows = capacity, most_rows
        self.rows: list[list[int]] = [[]]
        self.calls: list[tuple[int, int]] = []
        """Shape [M, S] of every step."""
        self.fails_at: int | None = None

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    @property
    def past_length(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int64)

    def most_rows(self, length: int, width: int) -> int:
        return self._most_rows

    def reset(self, batch_size: int | None = None) -> None:
        rows = self.batch_size if batch_size is None else batch_size
        if rows > self._most_rows:
            raise ShapeError(f"this engine does not serve {rows} rows")
        self.rows = [[] for _ in range(rows)]

    def rewind(self, past_length: Sequence[int]) -> None:
        assert all(new <= len(row) for new, row in zip(past_length, self.rows, strict=True))
        self.rows = [row[:new] for new, row in zip(past_length, self.rows, strict=True)]

    def keep_rows(self, rows: Sequence[int]) -> None:
        assert rows
        assert list(rows) == sorted(set(rows))
        self.rows = [self.rows[row] for row in rows]

    def step(self, input_ids: np.ndarray, *, sequence_length: Any = None, logits_index: Any = None) -> np.ndarray:
        m, s = input_ids.shape
        if self.fails_at == len(self.calls):
            raise ToolchainError("the machine is on fire")
        self.calls.append((m, s))
        assert 1 <= m <= self.batch_size
        lengths = [s] * m if sequence_length is None else list(sequence_length)
        assert max(lengths) == s
        assert min(lengths) >= 1
        assert max(len(row) for row in self.rows[:m]) + s <= self.capacity
        out = np.empty((m, 1, V), np.float32)
        for row in range(m):
            self.rows[row].extend(input_ids[row, : lengths[row]].tolist())
            out[row, 0] = fake_logits(self.rows[row])
        return out


def fake_logits(tokens: Sequence[int]) -> np.ndarray:
    return np.random.default_rng([len(tokens), *tokens]).normal(0, 3, V).astype(np.float32)


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """Greedy, from the fake's definition."""
    made: list[int] = []
    while len(made) < count:
        made.append(int(fake_logits([*prompt, *made]).argmax()))
    return made


def prompts_of(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(length).integers(0, V, length).tolist() for length in lengths]


def collect(events: Any, rows: int) -> list[list[TokenEvent]]:
    found: list[list[TokenEvent]] = [[] for _ in range(rows)]
    for event in events:
        found[event.row].append(event)
    return found


def tokens_of(rows: list[list[TokenEvent]]) -> list[list[int]]:
    return [[event.token for event in row] for row in rows]


fits_the_protocol: CacheSession = FakeSession()


# ---- prefill ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 100])
def test_chunks_and_the_order_of_prompts_change_nothing(chunk: int) -> None:
    prompts = prompts_of(3, 21, 1, 8, 16, 9)
    params = SamplingParams(max_new_tokens=5)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        session = FakeSession()
        given_ = [prompts[row] for row in order]
        rows = collect(generate_steps(session, given_, params, prefill_chunk=chunk), 6)
        assert tokens_of(rows) == [expected_tokens(prompt, 5) for prompt in given_]


def test_each_chunk_runs_the_rows_that_still_have_tokens() -> None:
    session = FakeSession()
    events = generate_steps(session, prompts_of(3, 21, 1, 8), SamplingParams(max_new_tokens=2), prefill_chunk=8)
    rows = [event.row for event in events]
    assert session.calls == [(4, 8), (1, 8), (1, 5), (4, 1)]
    # Short prompts get their first tokens before the long one is read; then the order of the prompts.
    assert rows == [0, 2, 3, 1, 0, 1, 2, 3]


def test_where_rope_follows_the_length_a_prompt_is_read_in_one_piece() -> None:
    session = FakeSession(rope=DYNAMIC)
    list(generate_steps(session, prompts_of(21, 3), SamplingParams(max_new_tokens=1), prefill_chunk=8))
    assert session.calls == [(2, 21)]


def test_a_prompt_continues_what_the_cache_holds() -> None:
    session = FakeSession()
    (prompt,) = prompts_of(12)
    params = SamplingParams(max_new_tokens=4)
    list(generate_steps(session, [prompt], params))
    session.calls.clear()
    events = generate_steps(session, [prompt], params, reused_tokens=9, prefill_chunk=2)
    assert tokens_of(collect(events, 1)) == [expected_tokens(prompt, 4)]
    assert session.calls[:2] == [(1, 2), (1, 1)]
    for prompts, reused in (([prompt], 12), ([prompt], -1), ([prompt, prompt], 3)):
        with pytest.raises(ShapeError, match="cannot be reused"):
            generate_steps(session, prompts, params, reused_tokens=reused)


# ---- rows end -------------------------------------------------------------------------------------------------


def test_rows_end_each_by_itself_and_leave_the_batch() -> None:
    session = FakeSession()
    prompts, counts = prompts_of(4, 9, 2, 6, 5), [1, 7, 3, 2, 7]
    params = [SamplingParams(max_new_tokens=count) for count in counts]
    rows = collect(generate_steps(session, prompts, params), 5)
    assert tokens_of(rows) == [expected_tokens(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    assert [shape for shape, _ in itertools.groupby(session.calls[1:])] == [(4, 1), (3, 1), (2, 1)]
    assert [[event.finish_reason for event in row][-1] for row in rows] == ["length"] * 5
    assert all(event.finish_reason is None for row in rows for event in row[:-1])
    assert session.batch_size == 2, "the last rows stay, for prompts that continue them"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=6), st.integers(1, 9))
def test_any_batch_is_its_rows_alone(shapes: list[tuple[int, int]], chunk: int) -> None:
    prompts = [np.random.default_rng(at).integers(0, V, length).tolist() for at, (length, _) in enumerate(shapes)]
    params = [SamplingParams(max_new_tokens=count, temperature=1.0, seed=at) for at, (_, count) in enumerate(shapes)]
    together = collect(generate_steps(FakeSession(), prompts, params, prefill_chunk=chunk), len(shapes))
    for row, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        (alone,) = collect(generate_steps(FakeSession(), [prompt], wanted), 1)
        assert [event.token for event in alone] == [event.token for event in together[row]]


def test_eos_and_stop_tokens_end_a_row_and_say_so() -> None:
    (prompt,) = prompts_of(5)
    made = expected_tokens(prompt, 8)
    eos, stop = made[5], made[2]
    assert len(set(made[:6])) == 6

    def run(**sampling: Any) -> list[TokenEvent]:
        params = SamplingParams(max_new_tokens=8, **sampling)
        return list(generate_steps(FakeSession(), [prompt], params, eos_token_ids=[eos]))

    cases = {5: run(), 2: run(stop_token_ids=[stop]), 7: run(ignore_eos=True)}
    for last, events in cases.items():
        assert [event.token for event in events] == made[: last + 1]
    assert [(events[-1].finish_reason, events[-1].stop) for events in cases.values()] == [
        ("stop", eos), ("stop", stop), ("length", None),
    ]  # fmt: skip
    ended = run(ignore_eos=True, stop_token_ids=[eos])
    assert ended[-1].stop == eos, "a stop token that is named counts"


def test_a_stop_at_the_last_token_allowed_is_a_stop() -> None:
    (prompt,) = prompts_of(5)
    made = expected_tokens(prompt, 3)
    params = SamplingParams(max_new_tokens=3, stop_token_ids=[made[2]])
    (row,) = collect(generate_steps(FakeSession(), [prompt], params), 1)
    assert row[-1].finish_reason == "stop"


def test_logprobs_are_of_the_logits_before_sampling() -> None:
    (prompt,) = prompts_of(5)
    params = SamplingParams(max_new_tokens=4, temperature=2.0, top_k=9, seed=3, logprobs=3, logit_bias={7: 3.0})
    made: list[int] = []
    for event in generate_steps(FakeSession(), [prompt], params):
        want = torch.log_softmax(torch.from_numpy(fake_logits([*prompt, *made])).double(), -1)
        made.append(event.token)
        assert event.logprobs is not None
        assert event.logprobs.logprob == pytest.approx(float(want[event.token]))
        assert [token for token, _ in event.logprobs.top] == want.topk(3).indices.tolist()


def test_seconds_are_those_of_computing() -> None:
    seconds = []
    for event in generate_steps(FakeSession(), prompts_of(5), SamplingParams(max_new_tokens=3)):
        seconds.append(event.seconds)
        time.sleep(0.2)  # a consumer that takes its time
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 0.2
    result = generate(FakeSession(), prompts_of(5, 9), max_new_tokens=3)
    assert 0 < result.first_token_seconds <= result.prefill_seconds
    assert result.decode_seconds > 0
    assert (result.decode_steps, len(result.tokens)) == (2, 2)


# ---- cancelling and failing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(9))
def test_closing_at_any_point_leaves_a_session_that_works(after: int) -> None:
    session, prompts = FakeSession(), prompts_of(3, 17, 6)
    events = generate_steps(session, prompts, SamplingParams(max_new_tokens=4), prefill_chunk=5)
    for _ in range(after):
        next(events)
    events.close()
    assert list(events) == []
    again = collect(generate_steps(session, prompts[:2], SamplingParams(max_new_tokens=4)), 2)
    assert tokens_of(again) == [expected_tokens(prompt, 4) for prompt in prompts[:2]]


@pytest.mark.parametrize("step", range(4))
def test_a_backend_that_fails_leaves_a_session_that_works(step: int) -> None:
    session, prompts = FakeSession(), prompts_of(3, 9)
    session.fails_at = step
    with pytest.raises(ToolchainError, match="on fire"):
        list(generate_steps(session, prompts, SamplingParams(max_new_tokens=4), prefill_chunk=5))
    session.fails_at = None
    rows = collect(generate_steps(session, prompts, SamplingParams(max_new_tokens=4)), 2)
    assert tokens_of(rows) == [expected_tokens(prompt, 4) for prompt in prompts]


# ---- what is refused, before anything is computed -----------------------------------------------------------------

ONE = SamplingParams(max_new_tokens=2)
REFUSED: dict[str, tuple[list[list[int]], Any, type[Exception], str]] = {
    "no prompt": ([], ONE, ShapeError, "nothing to continue"),
    "an empty prompt": ([[1], []], ONE, ShapeError, "nothing to continue"),
    "too long": ([[1] * 8], ONE, ShapeError, "need a cache of 9 tokens, this one holds 8"),
    "a negative token": ([[1, -1]], ONE, ShapeError, "token id -1 is outside"),
    "a token past the vocabulary": ([[1, V]], ONE, ShapeError, f"token id {V} is outside"),
    "a token past every integer": ([[1, 2**70]], ONE, ShapeError, "is outside"),
    "more rows than there can be": ([[1]] * 5, ONE, ShapeError, "5 rows"),
    "settings for other rows": ([[1], [2]], [ONE], ConfigError, "number of settings"),
    "a stop text without a tokenizer": ([[1]], SamplingParams(stop=["x"]), ConfigError, "need a tokenizer"),
    "a bias past the vocabulary": ([[1]], SamplingParams(logit_bias={V: 1.0}), ConfigError, "logit_bias names token"),
    "a stop token past it": ([[1]], SamplingParams(stop_token_ids=[V]), ConfigError, "stop_token_ids names token"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_request_is_refused_at_once_and_changes_nothing(what: str) -> None:
    prompts, params, error, message = REFUSED[what]
    if isinstance(params, SamplingParams) and params is not ONE:
        params = SamplingParams(max_new_tokens=2, stop=params.stop, logit_bias=params.logit_bias, stop_token_ids=params.stop_token_ids)  # fmt: skip
    session = FakeSession(capacity=8, most_rows=4)
    session.rows = [[1, 2, 3]]
    with pytest.raises(error, match=message):
        generate_steps(session, prompts, params)
    assert session.rows == [[1, 2, 3]]
    assert not session.calls


def test_the_longest_row_is_the_one_that_is_named() -> None:
    params = [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=9)]
    with pytest.raises(ShapeError, match="need a cache of 12 tokens, this one holds 8") as caught:
        generate_steps(FakeSession(capacity=8), [[1] * 5, [1] * 4], params)
    assert caught.value.details == {"prompt": "4 tokens", "max_new_tokens": "9", "kv_cache_capacity": "8"}
    assert "--max-seq-len" in str(caught.value.hint)


# ---- stop texts -------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token per character, or per piece."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.pieces[token] for token in tokens)


def streamed(pieces: Sequence[str], stop: Sequence[str]) -> tuple[list[str], str | None]:
    stream = StopStream(TextStream(Letters(*pieces)), stop)
    out = []
    for token in range(len(pieces)):
        out.append(stream.push(token))
        if stream.matched is not None:
            break
    return [*out, stream.finish()], stream.matched


def first_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """By definition: character by character, the first stop text that is complete, and of several the longest."""
    for end in range(1, len(text) + 1):
        if found := [item for item in stop if text[:end].endswith(item)]:
            matched = max(found, key=len)
            return text[: end - len(matched)], matched
    return text, None


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
)
def test_a_stop_text_is_found_wherever_tokens_end(pieces: list[str], stop: list[str]) -> None:
    out, matched = streamed(pieces, stop)
    assert ("".join(out), matched) == first_stop("".join(pieces), stop)
    # Nothing is out too early: what is out never needs to be taken back, and what is sure is not held.
    for count in range(1, len(out) - 1):
        shown, known = "".join(out[:count]), "".join(pieces[:count])
        if first_stop(known, stop)[1] is None:
            held = known[len(shown) :]
            assert known.startswith(shown)
            assert not held or any(item.startswith(held) for item in stop)


def test_what_may_be_a_stop_text_is_held_until_it_is_decided() -> None:
    assert streamed(["a\n", "\n", "x"], ["\n\n"]) == (["a", "", ""], "\n\n")
    assert streamed(["a\n", "b", "\n"], ["\n\n"]) == (["a", "\nb", "", "\n"], None)
    assert streamed(["xENDy"], ["END"]) == (["x", ""], "END")
    assert streamed(["ab"], []) == (["ab", ""], None)


def byte_codec(folder: Any, **specials: int) -> TextCodec:
    """Byte-level without merges: token = byte, then special tokens up to V."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextCodec(folder)


class Script(FakeSession):
    """Says a given text, whatever it is asked."""

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        super().__init__(capacity=200)
        self.config = SimpleNamespace(vocab_size=vocab_size, rope=RopeConfig())
        self._tokens, self._prompt = list(tokens), 1

    def step(self, input_ids: np.ndarray, *, sequence_length: Any = None, logits_index: Any = None) -> np.ndarray:
        self.rows[0].extend(input_ids[0].tolist())
        out = np.zeros((1, 1, self.config.vocab_size), np.float32)
        out[0, 0, self._tokens[len(self.rows[0]) - self._prompt]] = 1
        return out


def test_stop_texts_end_a_row_and_cut_its_text(tmp_path: Any) -> None:
    codec = byte_codec(tmp_path, end=1)
    text = "naïve 日本 code\n\ndef more"
    tokens = codec.encode(text)

    def run(**sampling: Any) -> tuple[str, TokenEvent, int]:
        params = SamplingParams(max_new_tokens=len(tokens), **sampling)
        events = list(generate_steps(Script(tokens, 300), [[0]], params, codec=codec, eos_token_ids=[256]))
        assert not [event for event in events if "\ufffd" in event.text]
        return "".join(event.text for event in events), events[-1], len(events)

    whole, last, count = run()
    assert (whole, last.finish_reason, count) == (text, "length", len(tokens))
    cut, last, count = run(stop=["\n\n", "never"])
    assert (cut, last.finish_reason, last.stop) == (text.split("\n\n")[0], "stop", "\n\n")
    assert count == len(codec.encode("naïve 日本 code\n\n"))
    cut, last, _ = run(stop="本")
    assert (cut, last.stop) == ("naïve 日", "本")
    held, last, _ = run(stop=["more and more"])
    assert (held, last.finish_reason) == (text, "length"), "what was held comes out at the end"


def test_the_token_that_ends_a_row_is_not_text(tmp_path: Any) -> None:
    codec = byte_codec(tmp_path)
    tokens = codec.encode("ab!c")
    params = SamplingParams(max_new_tokens=4, stop_token_ids=[tokens[2]])
    events = list(generate_steps(Script(tokens, 300), [[0]], params, codec=codec))
    assert "".join(event.text for event in events) == "ab"
    assert [event.token for event in events] == tokens[:3]


def test_a_stop_text_that_completes_at_the_very_end_counts(tmp_path: Any) -> None:
    codec = byte_codec(tmp_path)
    tokens = codec.encode("ab\n\n")
    params = SamplingParams(max_new_tokens=4, stop=["\n\n"])
    *_, last = generate_steps(Script(tokens, 300), [[0]], params, codec=codec)
    assert (last.finish_reason, last.stop) == ("stop", "\n\n")


@pytest.mark.parametrize("text", ["a\ud83d", "\udcff"])
def test_half_a_surrogate_pair_is_refused(text: str, tmp_path: Any) -> None:
    codec = byte_codec(tmp_path)
    for encode in (codec.encode, codec.encode_with_offsets):
        with pytest.raises(ConfigError, match="is not Unicode") as caught:
            encode(text)
        str(caught.value).encode()
    with pytest.raises(ConfigError, match="is not Unicode"):
        codec.encode_with_offsets("a", text)


# ---- a real model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Bundle]:
    """Hugging Face's model and its bundle; random weights large enough that greedy tokens are not near ties."""
    folder = tmp_path_factory.mktemp("generation") / "checkpoint"
    model = oracles.huggingface_llama(folder, seed=8, **TINY)
    model.generation_config.eos_token_id = None
    export_checkpoint(folder)
    return model, load_bundle(folder)


def hugging_face(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


PROMPTS = [np.random.default_rng(20 + n).integers(0, TINY["vocab_size"], n).tolist() for n in (1, 4, 9, 17, 30)]


def test_greedy_tokens_are_hugging_faces(trained: tuple[Any, Bundle]) -> None:
    model, bundle = trained
    session = OnnxRuntimeSession(bundle, max_seq_len=128)
    for prompt in PROMPTS:
        want = hugging_face(model, prompt, 64)
        result = generate(session, [prompt], max_new_tokens=64)
        assert result.tokens == [want], f"prompt of {len(prompt)}"
        assert len(set(want)) > 5, "a constant sequence would show little"
        assert result.decode_steps == 63


def test_one_new_token_needs_no_decode_step(trained: tuple[Any, Bundle]) -> None:
    _, bundle = trained
    result = generate(OnnxRuntimeSession(bundle, max_seq_len=3), [[1, 2, 3]], max_new_tokens=1)
    assert [len(tokens) for tokens in result.tokens] == [1]
    assert (result.decode_steps, result.decode_tokens_per_second) == (0, None)


def test_generation_may_fill_the_cache_but_not_more(trained: tuple[Any, Bundle]) -> None:
    _, bundle = trained
    session = OnnxRuntimeSession(bundle, max_seq_len=8)
    assert len(generate(session, [[1, 2, 3]], max_new_tokens=6).tokens[0]) == 6
    assert session.past_length.tolist() == [8]
    with pytest.raises(ShapeError, match="need a cache of 9 tokens, this one holds 8"):
        generate(session, [[1, 2, 3]], max_new_tokens=7)


def test_generate_stops_rows_where_it_is_told(trained: tuple[Any, Bundle]) -> None:
    _, bundle = trained
    session = OnnxRuntimeSession(bundle, max_seq_len=64)
    free = generate(session, PROMPTS, max_new_tokens=12).tokens
    stop = free[0][3]
    expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in free]
    assert max(map(len, expected)) > len(expected[0]), "no row goes on: choose another seed"
    result = generate(session, PROMPTS, max_new_tokens=12, stop_tokens=[stop])
    assert result.tokens == expected
    assert result.decode_steps == max(map(len, expected)) - 1


def test_penalised_and_biased_tokens_are_hugging_faces(trained: tuple[Any, Bundle]) -> None:
    """Hugging Face's own order: a bias comes before the repetition penalty."""
    model, bundle = trained
    session = OnnxRuntimeSession(bundle, max_seq_len=128)
    bias = {3: 2.5, 11: -4.0, 40: 1.0}
    params = SamplingParams(max_new_tokens=48, repetition_penalty=1.3, logit_bias=bias)
    differ = 0
    for prompt in PROMPTS:
        options = {"repetition_penalty": 1.3, "sequence_bias": [[[token], value] for token, value in bias.items()]}
        want = hugging_face(model, prompt, 48, **options)
        assert [event.token for event in generate_steps(session, [prompt], params)] == want
        differ += want != hugging_face(model, prompt, 48)
    assert differ == len(PROMPTS)


@pytest.mark.parametrize("chunk", [4, 512])
def test_a_batch_of_prompts_gives_what_each_gives_alone(trained: tuple[Any, Bundle], chunk: int) -> None:
    _, bundle = trained
    session = OnnxRuntimeSession(bundle, max_seq_len=64, batch_size=5)
    params = [SamplingParams(max_new_tokens=n, temperature=0.7, seed=n, top_p=0.9) for n in (12, 3, 8, 1, 12)]
    together = tokens_of(collect(generate_steps(session, PROMPTS, params, prefill_chunk=chunk), 5))
    single = OnnxRuntimeSession(bundle, max_seq_len=64)
    for row, (prompt, wanted) in enumerate(zip(PROMPTS, params, strict=True)):
        assert together[row] == [event.token for event in generate_steps(single, [prompt], wanted)], f"row {row}"
