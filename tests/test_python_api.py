"""The public Python API: threads, waves, arguments, hints for paths. All of these fail on the tree before it."""

from __future__ import annotations

import dataclasses
import gc
import io
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint
from support import check_refused
from test_generation import FakeSession, expected_tokens, prompts_of
from test_llm import fake

import llama_export
from llama_export.bundle import Bundle
from llama_export.cli import main
from llama_export.config import ExportConfig
from llama_export.errors import ConfigError, LlamaExportError
from llama_export.export import export_checkpoint
from llama_export.sampling_params import SAMPLING_FLAGS, SamplingOptions, SamplingParams

# ---- threads ----------------------------------------------------------------------------------------------------


def test_eight_threads_get_right_answers_from_complete() -> None:
    model, _ = fake()
    prompts = prompts_of(*range(3, 51))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: model.complete([prompt], max_new_tokens=4)[0].tokens, prompts))
    assert found == [expected_tokens(prompt, 4) for prompt in prompts]


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
        assert got == expected_tokens(prompt, 4) or str(got).startswith("the model is in use")


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
    with pytest.raises(ConfigError, match="in use: a stream of another thread is open"):
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


# ---- waves ------------------------------------------------------------------------------------------------------


def test_many_prompts_run_in_waves_and_give_the_same() -> None:
    model, session = fake(FakeSession(most_rows=5))
    prompts = prompts_of(*range(3, 20))
    found = model.complete((prompt for prompt in prompts), max_new_tokens=4)
    assert [one.tokens for one in found] == [expected_tokens(prompt, 4) for prompt in prompts]
    assert max(rows for rows, _ in session.calls) == 5


def test_waves_follow_the_memory(tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_export.runtime import session as module

    model = llama_export.load(tiny_bundles["float32"].folder, threads=1)
    prompts = [[1 + index % 90, 5, 7] for index in range(12)]
    whole = model.complete(prompts, max_new_tokens=5)
    assert model.session.most_rows(8, 3) <= module.MAX_ROWS
    monkeypatch.setattr(module, "available_memory", lambda: 200_000)
    assert 1 <= model.session.most_rows(8, 3) < 12
    assert [one.tokens for one in model.complete(prompts, max_new_tokens=5)] == [one.tokens for one in whole]
    monkeypatch.setattr(module, "available_memory", lambda: 1)
    assert model.session.most_rows(8, 3) == 1


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


def test_a_bundle_is_made_by_the_public_functions(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = llama_export.export_checkpoint(str(make_checkpoint()), str(tmp_path / "out"))
    assert llama_export.load_bundle(made.bundle).task == "causal-lm"
    assert llama_export.quantize_bundle(made.bundle, "int8").type == "int8"
    with pytest.raises(ConfigError, match="bad value for config"):
        llama_export.build_engine(made.bundle, {"max_batch": 2})  # type: ignore[arg-type]


# ---- the command line -------------------------------------------------------------------------------------------


def test_a_prompt_comes_from_standard_input_and_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_bundles: dict[str, Bundle]
) -> None:
    folder = tiny_bundles["float32"].folder  # it has no tokenizer: the prompts are read before that is noticed
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"\xe9")
    check_refused(capsys, tmp_path, ["run", folder, "--prompt-file", tmp_path / "empty"], "is empty")
    check_refused(capsys, tmp_path, ["run", folder, "--prompt-file", tmp_path / "latin"], "is not UTF-8 text")
    check_refused(capsys, tmp_path, ["run", folder, "--prompt-file", tmp_path], "cannot be read")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    check_refused(capsys, tmp_path, ["run", folder, "--prompt", "-"], "the prompt from standard input is empty")


PATHS = {
    "meta-llama/Llama-3.2-1B": "hf download meta-llama/Llama-3.2-1B",
    "gone/deeper/still": "it is right up to",
    "gguf": "GGUF file is llama.cpp",
    "adapter": "LoRA adapter",
    "pickles": "can run code when they are opened",
}


@pytest.mark.parametrize("command", ["run", "build", "validate", "export"])
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_something_else_gets_a_fitting_sentence(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (("gguf", "x.gguf"), ("adapter", "adapter_config.json"), ("pickles", "pytorch_model.bin")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    prompt = ["--prompt", "a"] if command == "run" else []
    assert main([command, name, *prompt]) == 2
    assert PATHS[name] in capsys.readouterr().err
