"""The public Python API: threads, waves, arguments."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint
from test_generation import FakeSession, expected_tokens, prompts_of
from test_llm import fake

import llama_export
from llama_export.bundle.bundle import Bundle
from llama_export.config.settings import ExportConfig
from llama_export.errors import ConfigError, LlamaExportError
from llama_export.export.export import export_checkpoint
from llama_export.runtime import engine_session
from llama_export.runtime.sampling_params import SAMPLING_FLAGS, SamplingOptions, SamplingParams, flag_of

ROOT = Path(__file__).parent.parent

# ---- threads ----------------------------------------------------------------------------------------------------


def test_eight_threads_get_right_answers_from_complete() -> None:
    model, _ = fake()
    prompts = prompts_of(*range(3, 51))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: model.complete([prompt], max_new_tokens=4)[0].tokens, prompts))
    assert found == [expected_tokens(prompt, 4) for prompt in prompts]


def test_eight_threads_get_right_answers_from_onnxruntime(tiny_bundles: dict[str, Bundle]) -> None:
    folder = tiny_bundles["float32"].folder
    prompts = [[1 + (7 * index + at) % 90 for at in range(2 + index % 9)] for index in range(48)]
    alone = llama_export.load(folder, threads=1)
    want = [alone.complete([prompt], max_new_tokens=12)[0].tokens for prompt in prompts]
    model = llama_export.load(folder, threads=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: model.complete([prompt], max_new_tokens=12)[0].tokens, prompts))
    assert found == want

    def ask(prompt: list[int]) -> list[int] | str:
        try:
            return model.generate(prompt, max_new_tokens=12).result.tokens
        except LlamaExportError as err:
            return err.message

    with ThreadPoolExecutor(8) as pool:
        streamed = list(pool.map(ask, prompts))
    assert all(
        got == tokens or str(got).startswith("one caller at a time") for got, tokens in zip(streamed, want, strict=True)
    )
    assert any(got == tokens for got, tokens in zip(streamed, want, strict=True)), "somebody is served"


def test_eight_streaming_threads_get_right_answers_or_a_sentence() -> None:
    model, _ = fake()

    def ask(prompt: list[int]) -> list[int] | str:
        try:
            return model.generate(prompt, max_new_tokens=4).result.tokens
        except LlamaExportError as err:
            return err.message

    prompts = prompts_of(*range(3, 51))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, prompts))
    for prompt, got in zip(prompts, found, strict=True):
        assert got == expected_tokens(prompt, 4) or str(got).startswith("one caller at a time")


def in_a_thread(action: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(timeout=30)


def test_an_open_stream_refuses_other_threads_until_it_is_closed_or_dropped() -> None:
    model, _ = fake()
    (prompt,) = prompts_of(6)

    def ask() -> list[int]:
        return model.complete([prompt], max_new_tokens=3)[0].tokens

    stream = model.generate(prompt, max_new_tokens=5)
    first = next(stream)
    with pytest.raises(ConfigError, match="one caller at a time: a stream of another thread is open"):
        in_a_thread(ask)
    assert [first, *stream] == [""] * 5, "the refused request ended nothing"
    assert in_a_thread(ask) == expected_tokens(prompt, 3), "it has ended"
    with model.generate(prompt, max_new_tokens=5) as stream:
        next(stream)
    assert in_a_thread(ask) == expected_tokens(prompt, 3), "it was closed"
    stream = model.generate(prompt, max_new_tokens=5)
    next(stream)
    del stream
    gc.collect()
    assert in_a_thread(ask) == expected_tokens(prompt, 3), "nobody holds it"
    left = in_a_thread(lambda: model.generate(prompt, max_new_tokens=5))
    assert model.complete([prompt], max_new_tokens=3)[0].tokens == expected_tokens(prompt, 3), "its thread has ended"
    with pytest.raises(ConfigError, match="ended by a later request"):
        next(left)


def test_threads_share_a_head(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    export_checkpoint(folder, None, ExportConfig(task="feature-extraction"))
    head = llama_export.load_head(folder, threads=1)
    texts = [[[1, 2, length]] for length in range(3, 27)]
    want = [head.run(text)["sentence_embedding"] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: head.run(text)["sentence_embedding"], texts))
    assert all(np.array_equal(a, b) for a, b in zip(found, want, strict=True))
    with pytest.raises(ConfigError, match="bad value for input_ids"):
        head.run([1, 2])  # type: ignore[list-item]


class SharedEngine:
    """An engine with one buffer for its input, as :class:`LoadedEngine` has: another caller's input would be seen."""

    def __init__(self, bundle: Bundle, path: Path) -> None:
        self.sidecar = SimpleNamespace(backend="fake", max_batch=4, max_seq_len=16)
        self._input = np.zeros((1, 1), np.int64)

    def select_profile(self, kind: Any) -> None:
        pass

    def feed(self, name: str, value: np.ndarray) -> None:
        if name == "input_ids":
            self._input = value
        time.sleep(0.002)  # lets other threads in

    def run(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        return {name: self._input for name in shapes}


def test_threads_share_an_engine_of_a_head(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint()
    export_checkpoint(folder, None, ExportConfig(task="feature-extraction"))
    monkeypatch.setattr(engine_session, "LoadedEngine", SharedEngine)
    session = engine_session.EngineHeadSession(llama_export.load_bundle(folder), Path("engine"))
    texts = [[[1, 2, length]] for length in range(3, 27)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: session.run(text)["sentence_embedding"].tolist(), texts))
    assert found == texts


# ---- waves ------------------------------------------------------------------------------------------------------


def test_many_prompts_run_in_waves_and_give_the_same() -> None:
    model, session = fake(FakeSession(most_rows=5))
    prompts = prompts_of(*range(3, 20))
    found = model.complete((prompt for prompt in prompts), max_new_tokens=4)
    assert [one.tokens for one in found] == [expected_tokens(prompt, 4) for prompt in prompts]
    assert max(rows for rows, _ in session.calls) == 5


def test_waves_follow_the_memory(tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_export.runtime import onnxruntime_session as module

    model = llama_export.load(tiny_bundles["float32"].folder, threads=1)
    prompts = [[1 + index % 90, 5, 7] for index in range(12)]
    whole = model.complete(prompts, max_new_tokens=5)
    assert model.session.most_rows(8, 3) <= module.MAX_ROWS
    monkeypatch.setattr(module, "available_memory", lambda: 4 * 3 * model.session.row_bytes(8, 3))
    assert model.session.most_rows(8, 3) == 3
    assert [one.tokens for one in model.complete(prompts, max_new_tokens=5)] == [one.tokens for one in whole]
    monkeypatch.setattr(module, "available_memory", lambda: 1)
    assert model.session.most_rows(8, 3) == 1


def test_a_row_takes_no_more_memory_than_the_rule_says(tmp_path: Path) -> None:
    """In a process of its own, whose session keeps the cache of a batch of 100 rows."""
    export_checkpoint(ROOT / "examples/tiny-llama", tmp_path / "bundle", ExportConfig(weights="copy"))
    script = (
        "import llama_export; from llama_export._system.process import resident_bytes\n"
        f"model = llama_export.load({str(tmp_path / 'bundle')!r}, threads=1)\n"
        "run = lambda rows: model.complete([[1, 2, 3]] * rows, max_new_tokens=20, ignore_eos=True)\n"
        "run(1); before = resident_bytes(); run(100)\n"
        "print(resident_bytes() - before, 100 * model.session.row_bytes(22, 3))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, said = map(int, done.stdout.split())
    assert grown <= said + (16 << 20)
    assert said <= 8 * grown, "a rule that says far too much would make needless batches"


# ---- arguments --------------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "threads": {"threads": 2.5}, "max_seq_len": {"max_seq_len": "5"}, "engine": {"engine": 7},
    "ignore_hashes": {"ignore_hashes": "no"}, "threads that are true": {"threads": True},
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_arguments_of_a_wrong_type_are_named(what: str, tiny_bundles: dict[str, Bundle]) -> None:
    with pytest.raises(ConfigError, match=f"bad value for {what.split()[0]}"):
        llama_export.load(tiny_bundles["float32"].folder, **WRONG[what])
    with pytest.raises(ConfigError, match="bad value for bundle"):
        llama_export.load(3)  # type: ignore[arg-type]


ODD: list[Any] = [
    None, True, 2.5, "5", "", b"x", -1, 0, 10**30, float("nan"), [], {}, object(), np.array([]), np.array([[1, 2]]),
    set(), [None], [[]], [1.5], "\ud800", ["\ud800"], [10**30], [-1], range(3), "a\0b", Path("x"), [True],
]  # fmt: skip
SETTINGS: list[tuple[Any, str]] = [
    (kind, field.name)
    for kind in (SamplingParams, llama_export.ExportConfig, llama_export.EngineConfig, llama_export.ValidateConfig)
    for field in dataclasses.fields(kind)
]


def check_no_raw_error(call: Any) -> None:
    """Each odd value is taken or refused by a sentence with a hint."""
    errors = []
    for value in ODD:
        try:
            call(value)
        except LlamaExportError as err:
            errors.append(err)
    assert errors, "some of them are wrong for every argument"
    assert all(err.message and err.hint for err in errors)


@pytest.mark.parametrize(("kind", "name"), SETTINGS, ids=lambda one: getattr(one, "__name__", one))
def test_settings_of_odd_types_are_taken_or_refused_by_a_sentence(kind: Any, name: str) -> None:
    check_no_raw_error(lambda value: kind(**{name: value}))


def test_calls_with_odd_arguments_end_in_an_answer_or_a_sentence(tiny_bundles: dict[str, Bundle]) -> None:
    folder = tiny_bundles["float32"].folder
    nowhere = folder / "nowhere"
    model = llama_export.load(folder, threads=1)
    for name in ("backend", "engine", "quantize", "max_seq_len", "threads", "read_weights", "ignore_hashes"):
        check_no_raw_error(lambda value, name=name: llama_export.load(folder, **{name: value}))
    for function in (
        llama_export.load, llama_export.load_head, llama_export.load_bundle, llama_export.quantize_bundle,
        llama_export.build_engine, llama_export.validate_bundle, llama_export.export_checkpoint,
    ):  # fmt: skip
        check_no_raw_error(function)
    for function in (llama_export.build_engine, llama_export.validate_bundle):
        check_no_raw_error(lambda value, function=function: function(nowhere, value))
    check_no_raw_error(lambda value: llama_export.export_checkpoint(nowhere, value))
    check_no_raw_error(lambda value: llama_export.export_checkpoint(nowhere, None, value))
    check_no_raw_error(lambda value: llama_export.quantize_bundle(nowhere, value))
    check_no_raw_error(lambda value: llama_export.quantize_bundle(nowhere, force=value))
    check_no_raw_error(lambda value: llama_export.validate_bundle(nowhere, report=value))
    check_no_raw_error(lambda value: model.complete(value, max_new_tokens=2))
    check_no_raw_error(lambda value: model.complete([value], max_new_tokens=2))
    check_no_raw_error(lambda value: model.complete([[1, 2]], value, max_new_tokens=2))
    check_no_raw_error(lambda value: model.generate(value, max_new_tokens=2).result)
    check_no_raw_error(lambda value: model.generate([1, 2], value).close())
    check_no_raw_error(lambda value: model.chat(value).close())


def test_settings_take_numpy_numbers_and_any_iterable_of_texts() -> None:
    engine = llama_export.EngineConfig(max_batch=np.int32(2), compute_capabilities=["8.9"])  # type: ignore[arg-type]
    assert (engine.max_batch, type(engine.max_batch), engine.compute_capabilities) == (2, int, ("8.9",))
    assert llama_export.ValidateConfig(text="a.txt").text == Path("a.txt")  # type: ignore[arg-type]
    for name, value in (("steps", 0), ("prompt_tokens", 0), ("seed", -1)):
        with pytest.raises(ConfigError, match=f"bad value for {name}"):
            llama_export.ValidateConfig(**{name: value})
    with pytest.raises(ConfigError, match="bad value for stages"):
        llama_export.ValidateConfig(stages="onnx/shapes")  # type: ignore[arg-type]


def test_numpy_numbers_are_numbers_and_bytes_are_no_prompt() -> None:
    model, _ = fake()
    params = SamplingParams(max_new_tokens=np.int64(3), top_p=np.float32(0.5), seed=np.uint8(1))  # type: ignore[arg-type]
    assert (params.max_new_tokens, type(params.seed), type(params.top_p)) == (3, int, float)
    assert len(model.complete(iter([np.array([1, 2]), range(3, 5)]), params)) == 2
    for prompt in (b"text", 5, {"a": 1}, ["a"]):
        with pytest.raises(ConfigError, match="bad value for a prompt"):
            model.complete([prompt])  # type: ignore[list-item]


def test_the_typed_keywords_and_the_flags_are_the_fields() -> None:
    hints = typing.get_type_hints(SamplingOptions)
    assert hints == typing.get_type_hints(SamplingParams)
    assert list(SAMPLING_FLAGS) == [field.name for field in dataclasses.fields(SamplingParams)]


def test_run_and_chat_have_the_options_of_the_table() -> None:
    from llama_export.cli.main import cli
    from llama_export.runtime.conversation import DEFAULT_MAX_NEW_TOKENS, DEFAULT_TEMPERATURE

    found = {name: {option.name: option for option in cli.commands[name].params} for name in ("run", "chat")}
    for field in dataclasses.fields(SamplingParams):
        flag, option = SAMPLING_FLAGS[field.name], found["run"][field.name]
        assert option.opts == [flag_of(field.name)]
        assert option.help.startswith(flag.help)
        assert (field.name in found["chat"]) == (flag.chat_default is not None)
        if flag.chat_default is not None:
            chat = found["chat"][field.name]
            assert chat.opts == option.opts
            assert chat.type.name == option.type.name
            assert flag.chat_default in chat.help
    assert str(DEFAULT_TEMPERATURE) in str(SAMPLING_FLAGS["temperature"].chat_default)
    assert SAMPLING_FLAGS["max_new_tokens"].chat_default == str(DEFAULT_MAX_NEW_TOKENS)


def test_run_without_options_has_the_defaults_of_the_fields() -> None:
    from llama_export.cli.main import cli

    options = {option.name: option for option in cli.commands["run"].params}
    given = cli.commands["run"].make_context("run", ["bundle", "--prompt", "a"]).params
    settings = {field.name: given[field.name] for field in dataclasses.fields(SamplingParams)}
    assert SamplingParams(**{**settings, "logit_bias": dict(settings["logit_bias"])}) == SamplingParams()
    assert options["stop"].multiple
    assert options["ignore_eos"].is_flag


@pytest.mark.slow
def test_mypy_and_a_sentence_catch_a_misspelt_setting(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import llama_export\nmodel = llama_export.load('x')\nmodel.generate('a', temprature=1.0)\n"
        "model.complete(['a'], top_k=2.5)\nmodel.generate('a', temperature=1.0, stop=['x'])\n"
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [line.split(":")[1] for line in done.stdout.splitlines() if " error: " in line]
    assert lines == ["3", "4"], done.stdout + done.stderr
    assert 'Unexpected keyword argument "temprature"' in done.stdout
    model, _ = fake()
    with pytest.raises(ConfigError, match="there is no setting `temprature`") as caught:
        model.generate([1, 2], temprature=1.0)  # type: ignore[call-arg]
    assert caught.value.hint == "did you mean `temperature`?"


def test_a_bundle_is_made_by_the_public_functions(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = llama_export.export_checkpoint(str(make_checkpoint()), str(tmp_path / "out"))
    assert llama_export.load_bundle(made.bundle).task == "causal-lm"
    assert llama_export.quantize_bundle(made.bundle, "int8").type == "int8"
    with pytest.raises(ConfigError, match="bad value for config"):
        llama_export.build_engine(made.bundle, {"max_batch": 2})  # type: ignore[arg-type]
