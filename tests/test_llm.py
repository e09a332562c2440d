"""Text in, text out: `load`, `LLM`, and the settings of `llama-export run`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import edit_json
from gpu_stand_ins import FakeDriver
from support import check_refused, heed_ctrl_c
from test_generation import DYNAMIC, FakeSession, Script, byte_codec, expected_tokens, prompts_of

import llama_export
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.config.settings import ExportConfig
from llama_export.engine import tensorrt as _tensorrt
from llama_export.errors import ArtifactMismatchError, ConfigError, ShapeError
from llama_export.export.export import export_checkpoint
from llama_export.runtime import engine_session, llm
from llama_export.runtime.llm import LLM
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession
from llama_export.runtime.opening import open_session
from llama_export.runtime.sampling_params import SamplingParams
from llama_export.runtime.text import TextCodec

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}{{ tail }}"


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the trained checkpoint of the examples, with a chat template."""
    folder = tmp_path_factory.mktemp("llm") / "bundle"
    export_checkpoint(ROOT / "examples/tiny-llama", folder, ExportConfig(weights="copy"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(talking: Path) -> LLM:
    return llama_export.load(talking, threads=1)


def fake(session: FakeSession | None = None, codec: TextCodec | None = None, eos: int = -1) -> tuple[LLM, FakeSession]:
    """A model over a session in numpy; its bundle names an end-of-sequence token."""
    session = session or FakeSession()
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(eos_token_ids=[eos]), folder=Path("/nowhere"))
    return LLM(bundle, session, codec), session


# ---- loading ----------------------------------------------------------------------------------------------------


def test_load_takes_a_path_or_its_name(talking: Path) -> None:
    opened = llama_export.load(str(talking))
    assert isinstance(opened, llama_export.LLM)
    assert opened.session.backend == "onnxruntime-cpu"
    assert opened.session.capacity == opened.bundle.config.max_length == 512, "no more than the model has"
    assert llama_export.load(talking, max_seq_len=64).session.capacity == 64


def test_the_default_capacity_has_a_bound(talking: Path) -> None:
    bundle = load_bundle(talking)
    longer = dataclasses.replace(
        bundle,
        manifest=dataclasses.replace(
            bundle.manifest, model=dataclasses.replace(bundle.config, max_position_embeddings=1 << 17)
        ),
    )
    assert open_session(longer).capacity == 4096


def test_importing_the_package_imports_next_to_nothing() -> None:
    script = (
        "import sys; before = set(sys.modules); import llama_export; "
        "print(*sorted(set(sys.modules) - before)); llama_export.SamplingParams(top_p=0.5); assert 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert imported <= {"llama_export", *sys.stdlib_module_names}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        llama_export.lod  # noqa: B018 - the access is the test
    for name in llama_export.__all__:
        assert getattr(llama_export, name) is not None


def test_the_runtime_needs_neither_torch_nor_onnx_nor_transformers(talking: Path) -> None:
    script = """
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "ml_dtypes", "tensorrt_rtx", "tensorrt"):
    sys.modules[name] = None
import llama_export
llm = llama_export.load(sys.argv[1])
print(repr(llm.complete(["def "], max_new_tokens=4, temperature=0.5, seed=1)[0].text))
print(repr(llm.chat([{"role": "user", "content": "def "}], max_new_tokens=4).result.text))
"""
    done = subprocess.run([sys.executable, "-c", script, str(talking)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_the_example_of_the_documentation_runs(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", str(llm.__doc__), re.MULTILINE)
    assert len(lines) >= 6
    (tmp_path / "build").mkdir()
    (tmp_path / "build/tiny-llama").symlink_to(talking)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    assert names["first"].tokens
    assert names["reply"].finish_reason in ("stop", "length")
    assert capsys.readouterr().out


OPENING: dict[str, tuple[dict[str, Any], str]] = {
    "a backend nobody knows": ({"backend": "cuda"}, "unknown backend: cuda"),
    "an engine on the CPU": ({"backend": "onnxruntime", "engine": "x.engine"}, "runs no engines"),
    "an engine with threads": ({"engine": "x.engine", "threads": 2}, "an engine has no threads"),
    "an engine with two settings": ({"engine": "x.engine", "max_seq_len": 9, "quantize": "int4"}, "no quantize, max_seq_len"),
    "an engine that was not built": ({"backend": "tensorrt-rtx"}, "has no tensorrt-rtx engine"),
    "weights that were not made": ({"quantize": "int8"}, "has no int8 weights"),
    "weights nobody makes": ({"quantize": "int3"}, "int3"),
}  # fmt: skip


@pytest.mark.parametrize("what", OPENING)
def test_what_cannot_be_opened_is_refused(what: str, talking: Path) -> None:
    options, message = OPENING[what]
    with pytest.raises(ConfigError, match=message) as caught:
        llama_export.load(talking, **options)
    assert caught.value.hint


def test_a_bundle_of_another_task_generates_nothing(make_checkpoint: Any) -> None:
    folder = make_checkpoint(architectures=["LlamaModel"])
    export_checkpoint(folder, None, ExportConfig(task="feature-extraction"))
    with pytest.raises(ConfigError, match="does not generate text"):
        llama_export.load(folder)


class Opened:
    """Stands for an engine's session."""

    def __init__(self, bundle: Bundle, path: Path, *, note: str | None = None) -> None:
        self.path, self.note = path, note


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of engines are stand-ins, on a GPU of compute capability 8.9."""
    monkeypatch.setattr(engine_session, "EngineSession", Opened)
    monkeypatch.setattr(engine_session, "execution_blocker", lambda backend: None)
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: FakeDriver(8, 9))


def test_auto_takes_an_engine_that_this_machine_can_run_and_says_so(
    built: dict[str, tuple[Bundle, Path]], on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, engine = built["float32"]
    assert isinstance(open_session(bundle, threads=1), OnnxRuntimeSession), "threads are a CPU's"
    assert isinstance(open_session(bundle, backend="onnxruntime"), OnnxRuntimeSession)
    chosen = open_session(bundle)
    assert chosen.path == engine
    assert chosen.note.startswith(f"auto: using engine {engine.name}, built by llama_export ")
    assert "runs its code on the GPU" in chosen.note
    for settings in ({"backend": "tensorrt-rtx"}, {"engine": engine}):
        named = open_session(bundle, **settings)
        assert (named.path, named.note) == (engine, None), "it was asked for by name"
    monkeypatch.setattr(engine_session, "execution_blocker", lambda backend: "no GPU")
    here = open_session(bundle)
    assert (type(here), here.note) == (OnnxRuntimeSession, None)
    with pytest.raises(ConfigError, match="has no tensorrt engine"):
        open_session(bundle, backend="tensorrt")


ENGINES: dict[str, dict[str, Any]] = {
    "a-small": {"max_seq_len": 53},
    "b-large": {"max_seq_len": 120},
    "c-larger-batch": {"max_seq_len": 120, "max_batch": 8},
    "d-equal": {"max_seq_len": 120, "max_batch": 8},
    "e-another-gpu": {"max_seq_len": 128, "compute_capabilities": ["12.0"]},
    "f-another-backend": {"max_seq_len": 128, "backend": "tensorrt", "compute_capabilities": ["12.0"]},
}
"""Name -> keys of its sidecar. The engine as it was built serves 8.0 and later, 53 tokens, batch 3."""


@pytest.fixture
def several(built: dict[str, tuple[Bundle, Path]], tmp_path: Path) -> Bundle:
    """A bundle with many engines, which are only looked at."""
    bundle, engine = built["float32"]
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "several"))
    for path in (copy / "engines").iterdir():
        path.unlink()
    for name, changes in ENGINES.items():
        shutil.copy(engine, copy / f"engines/{name}.engine")
        shutil.copy(engine.with_suffix(".json"), copy / f"engines/{name}.json")
        edit_json(copy / f"engines/{name}.json", **changes)
    return load_bundle(copy)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "c-larger-batch"),
        ({"request_tokens": 120}, "c-larger-batch"),
        ({"backend": "tensorrt-rtx"}, "c-larger-batch"),
        ({"backend": "tensorrt-rtx", "request_tokens": 128}, "c-larger-batch"),
        ({"backend": "tensorrt"}, "f-another-backend"),
    ],
    ids=str,
)
def test_of_several_engines_the_largest_capacity_on_this_gpu_is_taken(
    several: Bundle, on_a_gpu: None, settings: dict[str, Any], name: str
) -> None:
    """The same bundle raised "which engine?" on a GPU and ran on a CPU elsewhere."""
    assert open_session(several, **settings).path == several.folder / f"engines/{name}.engine"


def test_auto_says_why_no_engine_is_used(several: Bundle, on_a_gpu: None) -> None:
    session = open_session(several, request_tokens=121)
    assert isinstance(session, OnnxRuntimeSession)
    assert session.note == "auto: none of the 6 engines serves 121 tokens on this GPU; using the CPU"


def test_auto_refuses_a_broken_sidecar_where_engines_run(several: Bundle, on_a_gpu: None) -> None:
    edit_json(several.folder / "engines/a-small.json", max_batch="three")
    with pytest.raises(ArtifactMismatchError, match=r"a-small.engine.*max_batch"):
        open_session(several)


# ---- generation -------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_completion(model: LLM) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=0.8, seed=3, logprobs=2)
    with model.generate("import ", params) as generation:
        pieces = list(generation)
    result = generation.result
    (alone,) = model.complete(["import "], params)
    assert "".join(pieces) == result.text == alone.text
    assert len(pieces) == len(result.tokens) == len(result.logprobs or [])
    assert result.finish_reason == ("length" if len(result.tokens) == 24 else "stop")
    assert result.prompt_tokens == len(TextCodec(model.bundle.folder).encode("import "))
    assert result.prefill_seconds > 0
    assert result.decode_tokens_per_second is not None
    assert result.decode_tokens_per_second == pytest.approx((len(pieces) - 1) / result.decode_seconds)


def test_a_batch_of_texts_is_each_alone(model: LLM) -> None:
    prompts = ["def ", "class Point:\n    def __init__(self", "import os\n"]
    params = [SamplingParams(max_new_tokens=n, temperature=0.6, seed=n) for n in (9, 1, 17)]
    together = model.complete(prompts, params, logprobs=1)
    for prompt, wanted, got in zip(prompts, params, together, strict=True):
        (alone,) = model.complete([prompt], wanted)
        assert (got.text, got.tokens, got.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)
        assert len(got.logprobs or []) == len(got.tokens)
    assert together[1].decode_tokens_per_second is None


def test_settings_replace_those_of_params(model: LLM) -> None:
    params = SamplingParams(max_new_tokens=9)
    assert len(model.generate("def ", params, max_new_tokens=3, ignore_eos=True).result.tokens) == 3
    with pytest.raises(ConfigError, match="there is no setting `max_token`") as caught:
        model.generate("def ", max_token=3)  # type: ignore[call-arg]
    assert caught.value.hint == "did you mean `max_new_tokens`?"
    with pytest.raises(ConfigError, match="bad value for top_p"):
        model.generate("def ", top_p=2)


def test_a_stop_text_cuts_the_text(model: LLM) -> None:
    free = model.generate("def ", max_new_tokens=40, ignore_eos=True).result.text
    stop = free[10:13]
    cut = model.generate("def ", max_new_tokens=40, ignore_eos=True, stop=[stop]).result
    assert cut.text == free[: free.index(stop)]
    assert (cut.finish_reason, cut.stop) == ("stop", stop)


def test_chat_words_the_conversation_as_the_template_does(model: LLM) -> None:
    messages = [{"role": "user", "content": "def f"}]
    reply = model.chat(messages, max_new_tokens=5, template={"tail": "assistant: "}).result
    text = "user: def f\nassistant: "
    ids = TextCodec(model.bundle.folder).encode(text, add_special_tokens=False)
    assert reply.prompt_tokens == len(ids)
    assert reply.tokens == model.generate(ids, max_new_tokens=5).result.tokens


def test_without_a_chat_template_chat_says_so(talking: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(talking, tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        llama_export.load(folder, ignore_hashes=True).chat([{"role": "user", "content": "x"}])


def test_without_a_tokenizer_there_are_token_ids(tiny_bundles: dict[str, Bundle]) -> None:
    opened = llama_export.load(tiny_bundles["float32"].folder)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        opened.generate("text")
    generation = opened.generate(np.array([1, 2, 3]), max_new_tokens=3, ignore_eos=True)
    assert list(generation) == ["", "", ""]
    assert len(generation.result.tokens) == 3
    assert generation.result.text == ""


def test_what_is_no_prompt_is_refused() -> None:
    opened, session = fake()
    for refused in (lambda: opened.generate([]), lambda: opened.complete([]), lambda: opened.complete([[1], []])):
        with pytest.raises(ShapeError, match="nothing to continue"):
            refused()
    with pytest.raises(ConfigError, match="prompts are a list"):
        opened.complete("text")
    with pytest.raises(ConfigError, match="bad value for a prompt"):
        opened.generate([1.5])  # type: ignore[list-item]
    assert not session.calls


# ---- what the cache holds already -------------------------------------------------------------------------------


def test_the_common_beginning_is_not_computed_again() -> None:
    opened, session = fake()
    (prompt,) = prompts_of(12)

    def run(tokens: list[int], count: int = 4) -> tuple[int, int]:
        """(tokens reused, tokens of the prompt that were run)"""
        session.calls.clear()
        result = opened.generate(tokens, max_new_tokens=count).result
        assert result.tokens == expected_tokens(tokens, count)
        return result.reused_tokens, session.calls[0][1]

    assert run(prompt) == (0, 12)
    assert run(prompt) == (11, 1), "the last token is always run"
    turn = [*prompt, *expected_tokens(prompt, 4)]
    assert run([*turn, 5, 6]) == (15, 3), "the newest token was never fed to the cache"
    assert run([*prompt[:7], (prompt[7] + 1) % 50, 3]) == (7, 2)
    assert run(prompt[:3]) == (2, 1)
    assert run([(prompt[0] + 1) % 50]) == (0, 1)


def test_after_a_batch_nothing_is_reused() -> None:
    opened, _ = fake()
    prompts = prompts_of(9, 5)
    opened.generate(prompts[0], max_new_tokens=2).result  # noqa: B018 - runs it
    assert [one.reused_tokens for one in opened.complete(prompts, max_new_tokens=2)] == [0, 0]
    assert opened.generate(prompts[0], max_new_tokens=2).result.reused_tokens == 0
    (one,) = opened.complete(prompts[:1], max_new_tokens=2)
    assert (one.reused_tokens, one.tokens) == (8, expected_tokens(prompts[0], 2))


def test_where_rope_follows_the_length_nothing_is_reused() -> None:
    opened, _ = fake(FakeSession(rope=DYNAMIC))
    for _ in range(2):
        assert opened.generate([1, 2, 3], max_new_tokens=2).result.reused_tokens == 0


def test_reuse_gives_the_tokens_of_a_new_model(model: LLM, talking: Path) -> None:
    codec = TextCodec(talking)
    text = "class Stack:\n    def push(self, item):\n"
    first = model.generate(text, max_new_tokens=20, ignore_eos=True).result
    follow = [*codec.encode(text), *first.tokens, *codec.encode("\n    def pop", add_special_tokens=False)]
    reused = model.generate(follow, max_new_tokens=20).result
    assert reused.reused_tokens >= len(codec.encode(text)) + 19
    assert reused.tokens == llama_export.load(talking, threads=1).generate(follow, max_new_tokens=20).result.tokens


@pytest.mark.parametrize("after", range(6))
def test_a_closed_generation_leaves_a_model_that_works(after: int) -> None:
    opened, _ = fake()
    (prompt,) = prompts_of(6)
    with opened.generate(prompt, max_new_tokens=5) as generation:
        for _ in itertools.islice(generation, after):
            pass
    assert generation.result.tokens == expected_tokens(prompt, 5)[:after]
    assert generation.result.finish_reason == ("length" if after == 5 else None)
    again = opened.generate(prompt, max_new_tokens=5).result
    assert again.tokens == expected_tokens(prompt, 5)
    assert again.reused_tokens == (5 if after else 0)


def test_a_failure_leaves_a_model_that_works() -> None:
    opened, session = fake()
    (prompt,) = prompts_of(6)
    session.fails_at = 2
    with pytest.raises(llama_export.runtime.onnxruntime_session.ToolchainError):
        opened.generate(prompt, max_new_tokens=5).result  # noqa: B018 - runs it
    session.fails_at = None
    assert opened.generate(prompt, max_new_tokens=5).result.tokens == expected_tokens(prompt, 5)


def test_a_later_request_ends_an_earlier_one_which_says_so() -> None:
    opened, _ = fake()
    first, second = prompts_of(6, 8)
    early = opened.generate(first, max_new_tokens=5)
    next(early)
    never = opened.generate(second, max_new_tokens=5)
    with pytest.raises(ConfigError, match="ended by a later request"):
        next(early)
    done = opened.generate(second, max_new_tokens=5)
    assert done.result.tokens == expected_tokens(second, 5)
    assert done.result.reused_tokens == 0, "what was never run is not in the cache"
    with pytest.raises(ConfigError, match="ended by a later request"):
        never.result  # noqa: B018 - the access is the test
    with pytest.raises(ShapeError):
        opened.generate([], max_new_tokens=5)
    opened.complete([first, second], max_new_tokens=2)
    assert done.result.tokens == expected_tokens(second, 5), "one that was finished is not touched"


def test_a_refused_request_ends_nothing() -> None:
    opened, _ = fake()
    (prompt,) = prompts_of(6)
    generation = opened.generate(prompt, max_new_tokens=5)
    next(generation)
    with pytest.raises(ShapeError):
        opened.generate([99999])
    assert generation.result.tokens == expected_tokens(prompt, 5)


def test_the_models_own_end_of_text_counts_unless_ignored(tmp_path: Path) -> None:
    codec = byte_codec(tmp_path)
    tokens = codec.encode("ab!c")
    opened, _ = fake(Script(tokens, 300), codec, eos=tokens[2])
    result = opened.generate([0], max_new_tokens=4).result
    assert (result.text, result.finish_reason, result.stop) == ("ab", "stop", tokens[2])
    opened, _ = fake(Script(tokens, 300), codec, eos=tokens[2])
    assert opened.generate([0], max_new_tokens=4, ignore_eos=True).result.text == "ab!c"


# ---- the command line -------------------------------------------------------------------------------------------


def run_json(capsys: Capture, *argv: object) -> dict[str, Any]:
    assert main(["run", *map(str, argv), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_run_prints_one_prompt_as_before_and_more(talking: Path, capsys: Capture) -> None:
    data = run_json(capsys, talking, "--prompt", "def ", "--max-new-tokens", 6, "--logprobs", 2)
    assert list(data) == [
        *("tokens", "text", "prefill_seconds", "decode_tokens_per_second", "backend"),
        *("finish_reason", "logprobs", "seed"),
    ]
    ((*tokens,),) = data["tokens"]
    assert [type(text) for text in data["text"]] == [str]
    assert data["finish_reason"] in (["stop"], ["length"])
    ((*logprobs,),) = data["logprobs"]
    assert [at["token"] for at in logprobs] == tokens
    for at in logprobs:
        assert len(at["top"]) == 2
        assert at["top"][0] == {key: at[key] for key in ("token", "text", "bytes", "logprob")}, (
            "greedy takes the likeliest"
        )
        assert at["logprob"] <= 0
    assert data["seed"] is None


def test_run_prints_several_prompts_one_by_one(talking: Path, capsys: Capture) -> None:
    command = [talking, "--prompt", "def ", "--prompt", "import ", "--max-new-tokens", 5]
    data = run_json(capsys, *command)
    alone = [run_json(capsys, talking, "--prompt", text, "--max-new-tokens", 5) for text in ("def ", "import ")]
    assert data["tokens"] == [one["tokens"][0] for one in alone]
    assert data["text"] == [one["text"][0] for one in alone]
    assert data["finish_reason"] == [one["finish_reason"][0] for one in alone]
    assert main(["run", *map(str, command)]) == 0
    out = capsys.readouterr().out
    assert out == f'prompt: "def "\n{data["text"][0]}\nprompt: "import "\n{data["text"][1]}\n'


def test_run_repeats_what_a_seed_drew(talking: Path, capsys: Capture) -> None:
    command = [talking, "--prompt", "def ", "--temperature", 1.5, "--max-new-tokens", 20]
    first, second = run_json(capsys, *command), run_json(capsys, *command)
    assert first["tokens"] != second["tokens"]
    assert run_json(capsys, *command, "--seed", first["seed"])["tokens"] == first["tokens"]
    assert main(["run", *map(str, command), "--seed", "7"]) == 0
    captured = capsys.readouterr()
    assert captured.err.rstrip().endswith(", seed 7")
    assert captured.out == run_json(capsys, *command, "--seed", 7)["text"][0] + "\n"


FLAGS: dict[str, tuple[list[object], dict[str, Any]]] = {
    "filters": (
        ["--temperature", 0.9, "--top-k", 9, "--top-p", 0.8, "--min-p", 0.05, "--seed", 4],
        {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "seed": 4},
    ),
    "penalties": (
        ["--repetition-penalty", 1.5, "--presence-penalty", 0.5, "--frequency-penalty", 0.25],
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    ),
    "biases": (["--logit-bias", "40=3.5", "--logit-bias", "7=-2"], {"logit_bias": {40: 3.5, 7: -2.0}}),
    "stops": (["--stop", "(", "--stop", "never", "--ignore-eos"], {"stop": ["(", "never"], "ignore_eos": True}),
    "stop tokens": (["--stop-token", 9, "--stop-token", 11], {"stop_token_ids": [9, 11]}),
}


@pytest.mark.parametrize("what", FLAGS)
def test_each_flag_is_its_setting(what: str, talking: Path, model: LLM, capsys: Capture) -> None:
    flags, sampling = FLAGS[what]
    data = run_json(capsys, talking, "--prompt", "def ", "--max-new-tokens", 30, *flags)
    (want,) = model.complete(["def "], max_new_tokens=30, **sampling)
    assert data["tokens"] == [want.tokens]
    assert (data["text"], data["finish_reason"]) == ([want.text], [want.finish_reason])


REFUSALS: dict[str, tuple[list[object], list[str]]] = {
    "a probability above 1": (["--top-p", 1.5], ["bad value for top_p: 1.5", "0 < p <= 1", "--top-p"]),
    "a negative seed": (["--seed", -1], ["bad value for seed: -1", "--seed"]),
    "an empty stop text": (["--stop", ""], ["bad value for stop", "--stop"]),
    "a stop text that is no text": (["--stop", os.fsdecode(b"\xff")], ["bad value for stop", "--stop"]),
    "a bias without a value": (["--logit-bias", "5"], ["--logit-bias is not a token id and a number", "TOKEN=VALUE"]),
    "a bias past the vocabulary": (["--logit-bias", "99999=1"], ["logit_bias names token 99999"]),
    "log-probabilities in text": (["--logprobs", 2], ["--logprobs has no place in plain text", "--json"]),
    "weights that were not made": (["--quantize", "int8"], ["has no int8 weights", "llama-export quantize"]),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_run_refuses(what: str, talking: Path, capsys: Capture) -> None:
    flags, parts = REFUSALS[what]
    check_refused(capsys, talking, ["run", talking, "--prompt", "def ", *flags], *parts)


def test_a_head_takes_one_text_and_no_settings(make_checkpoint: Any, capsys: Capture) -> None:
    folder = make_checkpoint()
    export_checkpoint(folder, None, ExportConfig(task="feature-extraction"))
    for flags, said in ((["--top-k", 3], "top_k"), (["--seed", 0], "seed"), (["--max-seq-len", 9], "max_seq_len")):
        check_refused(capsys, folder, ["run", folder, "--tokens", "1,2", *flags], "no settings of generation", said)
    check_refused(capsys, folder, ["run", folder, "--prompt", "a", "--prompt", "b"], "takes one text", "2 prompts")


def test_ctrl_c_keeps_the_text_so_far(talking: Path) -> None:
    """The first piece is out, then the terminal's signal comes: text, end of line, 130."""
    command = [sys.executable, "-m", "llama_export", "run", str(talking), "--prompt", "def ", "--ignore-eos"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0,
        preexec_fn=heed_ctrl_c,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        begin = process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (begin + rest).endswith("\n")
    assert len((begin + rest).strip()) >= 4
    assert err.strip().endswith("interrupted")
    assert "Traceback" not in err
