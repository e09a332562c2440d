"""The heads without a cache as a user meets them: export by task, `run`, the session, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support import check_refused
from tokenizers import Tokenizer

from llama_export.bundle.bundle import load_bundle
from llama_export.cli.main import main
from llama_export.errors import ConfigError, ShapeError
from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession, OnnxRuntimeSession
from llama_export.runtime.prediction import predict
from llama_export.runtime.text import TextCodec

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama"
VOCABULARY = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).get_vocab_size()
CLASSES = {
    "causal-lm": "LlamaForCausalLM",
    "sequence-classification": "LlamaForSequenceClassification",
    "token-classification": "LlamaForTokenClassification",
    "question-answering": "LlamaForQuestionAnswering",
    "feature-extraction": "LlamaModel",
}
HEADS = [task for task in CLASSES if task != "causal-lm"]
Capture = pytest.CaptureFixture[str]
LABELS = {0: "good", 1: "bad", 2: "ugly"}


def make(folder: Path, task: str, **settings: Any) -> Path:
    """A random checkpoint of one task with a real tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "pad_token_id": 0, "id2label": LABELS, "initializer_range": 0.3, **settings,
        }
    )  # fmt: skip
    getattr(transformers, CLASSES[task])(config).save_pretrained(folder)
    shutil.copy(EXAMPLE / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> exported folder, made by the command line with the task left to it."""
    root = tmp_path_factory.mktemp("heads")
    for task in CLASSES:
        assert main(["export", str(make(root / task, task))]) == 0
    return {task: root / task for task in CLASSES}


def run_json(capsys: Capture, *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def huggingface(folder: Path, task: str) -> Any:
    return getattr(transformers, CLASSES[task]).from_pretrained(folder, attn_implementation="eager").eval()


def test_task_is_that_of_the_checkpoint(bundles: dict[str, Path]) -> None:
    for task, folder in bundles.items():
        bundle = load_bundle(folder)
        assert bundle.task == task
        names = [entry.name for entry in bundle.manifest.io if entry.kind == "input"]
        assert (names == ["input_ids", "attention_mask"]) == (task != "causal-lm")
        assert (bundle.manifest.kv_cache is None) == (task != "causal-lm")
        attention = "LlamaAttention" if task == "causal-lm" else "LlamaMaskedAttention"
        assert set(bundle.manifest.ops) == {"LlamaRMSNorm", "LlamaAddRMSNorm", attention}


# ---- run --------------------------------------------------------------------------------------------------------


def test_a_text_is_classified_as_transformers_does(bundles: dict[str, Path], capsys: Capture) -> None:
    folder = bundles["sequence-classification"]
    data = run_json(capsys, "run", str(folder), "--prompt", "def split(s):")
    assert list(data) == ["task", "num_tokens", "label", "score", "scores", "logits", "seconds", "backend"]
    ids = TextCodec(folder).encode("def split(s):")
    with torch.no_grad():
        want = huggingface(folder, "sequence-classification")(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(data["logits"], want, rtol=1e-5, atol=1e-5)
    assert list(data["scores"]) == list(LABELS.values())
    np.testing.assert_allclose(list(data["scores"].values()), want.softmax(0), atol=1e-5)
    assert data["label"] == LABELS[int(want.argmax())]
    assert data["score"] == max(data["scores"].values())
    assert main(["run", str(folder), "--prompt", "def split(s):"]) == 0
    assert f'label: "{data["label"]}"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({"problem_type": "multi_label_classification"}, lambda logits: 1 / (1 + np.exp(-logits))),
        ({"problem_type": "regression"}, lambda logits: logits),
        ({"id2label": {0: "value"}}, lambda logits: logits),
    ],
    ids=["several classes", "regression", "one value"],
)
def test_scores_follow_the_problem_type(settings: dict[str, Any], scores: Any, tmp_path: Path, capsys: Capture) -> None:
    folder = make(tmp_path / "model", "sequence-classification", **settings)
    assert main(["export", str(folder)]) == 0
    data = run_json(capsys, "run", str(folder), "--prompt", "import os")
    np.testing.assert_allclose(list(data["scores"].values()), scores(np.array(data["logits"])), rtol=1e-6)


def test_every_token_gets_a_label_and_its_place_in_the_text(bundles: dict[str, Path], capsys: Capture) -> None:
    text = "for x in y:"
    data = run_json(capsys, "run", str(bundles["token-classification"]), "--prompt", text)
    assert len(data["tokens"]) == data["num_tokens"] > 3
    for token in data["tokens"]:
        assert set(token) == {"token", "start", "end", "text", "label", "score"}
        assert token["text"] == text[token["start"] : token["end"]]
        assert token["label"] in LABELS.values()
        assert 1 / 3 - 1e-9 < token["score"] <= 1  # token 0 is padding: its embedding is zero
    assert "".join(token["text"] for token in data["tokens"]) == text


def test_an_answer_is_the_best_span_of_the_context(bundles: dict[str, Path], capsys: Capture) -> None:
    folder, context = bundles["question-answering"], "return the name of the file"
    data = run_json(capsys, "run", str(folder), "--prompt", "what is it", "--context", context)
    assert data["answer"] == context[data["start"] : data["end"]]
    encoding = TextCodec(folder).encode_with_offsets("what is it", context)
    with torch.no_grad():
        want = huggingface(folder, "question-answering")(torch.tensor([encoding.ids]))
    inside = [index for index, part in enumerate(encoding.sequence_ids) if part == 1]
    spans = [(first, last) for first in inside for last in inside if first <= last < first + 15]
    first, last = max(spans, key=lambda span: float(want.start_logits[0, span[0]] + want.end_logits[0, span[1]]))
    assert (data["start"], data["end"]) == (encoding.offsets[first][0], encoding.offsets[last][1])
    assert 0 < data["score"] <= 1


def test_an_embedding_is_the_last_tokens_hidden_state(bundles: dict[str, Path], capsys: Capture) -> None:
    folder = bundles["feature-extraction"]
    data = run_json(capsys, "run", str(folder), "--prompt", "class A:")
    ids = TextCodec(folder).encode("class A:")
    with torch.no_grad():
        want = huggingface(folder, "feature-extraction")(torch.tensor([ids])).last_hidden_state[0, -1]
    np.testing.assert_allclose(data["sentence_embedding"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", HEADS)
def test_token_ids_give_the_bare_outputs(task: str, bundles: dict[str, Path], capsys: Capture) -> None:
    data = run_json(capsys, "run", str(bundles[task]), "--tokens", "5,6,7")
    outputs = OnnxRuntimeHeadSession(load_bundle(bundles[task])).run([[5, 6, 7]])
    assert list(data) == ["task", *outputs, "seconds", "backend"]
    for name, array in outputs.items():
        np.testing.assert_allclose(data[name], array[0], rtol=1e-6)


# ---- which head -------------------------------------------------------------------------------------------------


def test_features_of_a_causal_checkpoint_leave_its_head_out_and_say_so(tmp_path: Path, capsys: Capture) -> None:
    folder = make(tmp_path / "model", "causal-lm")
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), "--task", "feature-extraction"]) == 0
    captured = capsys.readouterr()
    assert "1 stored tensors that feature-extraction does not use: lm_head.weight" in captured.err
    got = OnnxRuntimeHeadSession(load_bundle(tmp_path / "out")).run([[5, 6, 7]])["last_hidden_state"]
    with torch.no_grad():
        want = huggingface(folder, "causal-lm").model(torch.tensor([[5, 6, 7]])).last_hidden_state
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "asked"), [("causal-lm", head) for head in HEADS[:3]] + [("feature-extraction", "causal-lm")]
)
def test_a_head_that_is_not_in_the_checkpoint_is_an_error(
    stored: str, asked: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = make(tmp_path / "model", stored)
    missing = {"question-answering": "qa_outputs.weight", "causal-lm": "lm_head.weight"}.get(asked, "score.weight")
    capsys.readouterr()
    check_refused(capsys, tmp_path, ["export", folder, "--task", asked], missing)


def test_a_classifier_without_a_padding_token_takes_one_text_at_a_time(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "sequence-classification", pad_token_id=None)
    assert main(["export", str(folder)]) == 0
    bundle = load_bundle(folder)
    shapes = {entry.name: entry.shape for entry in bundle.manifest.io}
    assert shapes == {"input_ids": (1, "num_tokens"), "attention_mask": (1, "num_tokens"), "logits": (1, 3)}
    session = OnnxRuntimeHeadSession(bundle)
    with torch.no_grad():
        want = huggingface(folder, "sequence-classification")(torch.tensor([[5, 6, 7]])).logits
    np.testing.assert_allclose(session.run([[5, 6, 7]])["logits"], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="names no padding token"):
        session.run([[5, 6], [7, 8]])


# ---- wrong input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        ("question-answering", ["--prompt", "who"], "needs a question and a context"),
        ("question-answering", ["--prompt", "who", "--context", ""], "the context holds no token"),
        ("feature-extraction", ["--prompt", "x", "--context", "y"], "a context means nothing to feature-extraction"),
        ("causal-lm", ["--prompt", "x", "--context", "y"], "a context means nothing to causal-lm"),
        ("token-classification", ["--tokens", "1,99999"], "token id 99999 is outside the vocabulary"),
        (
            "token-classification",
            ["--tokens", ",".join("1" * 65)],
            "the text has 65 tokens, the model has 64 positions",
        ),
    ],
)
def test_what_a_head_cannot_take_is_refused(
    task: str, arguments: list[str], said: str, bundles: dict[str, Path], capsys: Capture
) -> None:
    capsys.readouterr()
    check_refused(capsys, bundles[task], ["run", bundles[task], *arguments], said)


@pytest.mark.parametrize(
    ("ids", "mask"), [([], []), ([[]], [[]]), ([[1, 2]], [[1]]), ([1, 2], [1, 1]), ([[1]], [[1], [1]])]
)
def test_batches_of_the_wrong_shape_are_refused(ids: list[Any], mask: list[Any], bundles: dict[str, Path]) -> None:
    session = OnnxRuntimeHeadSession(load_bundle(bundles["token-classification"]))
    with pytest.raises(ShapeError, match="do not fit"):
        session.run(ids, mask)


def test_each_session_names_the_other_for_its_bundle(bundles: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="does not generate text"):
        OnnxRuntimeSession(load_bundle(bundles["question-answering"]), max_seq_len=8)
    with pytest.raises(ConfigError, match="has a KV cache"):
        OnnxRuntimeHeadSession(load_bundle(bundles["causal-lm"]))


def test_predicted_scores_are_finite_for_extreme_logits(bundles: dict[str, Path]) -> None:
    folder = bundles["sequence-classification"]
    session = OnnxRuntimeHeadSession(load_bundle(folder))
    session.run = lambda ids: {"logits": np.array([[1e4, -1e4, 0.0]], np.float32)}  # type: ignore[method-assign]
    found = predict(session, TextCodec(folder).encode_with_offsets("x"), "x", None)
    assert found["score"] == 1.0
    assert all(math.isfinite(score) for score in found["scores"].values())
