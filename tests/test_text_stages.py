"""The stages on a text: their numbers against exact arithmetic, sound bundles and faulty ones, and files nobody can use."""

from __future__ import annotations

import json
import math
import re
import shutil
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import oracles
import pytest
import torch
from conftest import TINY, MakeCheckpoint
from numpy.typing import ArrayLike
from support import check_refused
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.config.settings import ExportConfig
from llama_export.errors import ConfigError
from llama_export.export.export import export_checkpoint
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.result import ParityReport, Stage, WorstElement
from llama_export.parity.stages import text as text_stages
from llama_export.parity.stages.text import (
    Scores,
    Text,
    judge_text,
    kl_terms,
    log_softmax,
    perplexity,
    read_text,
    score,
)
from llama_export.parity.validate import validate_bundle

DTYPES = ("float32", "bfloat16", "float16")
WORDS = 300
"""Of the fixture's text: three windows of 99 in a context of 128."""


def write_tokenizer(folder: Path, size: int = 97) -> None:
    """One word a token: ``w0`` .. ``w96``."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def words(count: int, seed: int = 0) -> str:
    return " ".join(f"w{index}" for index in np.random.default_rng(seed).integers(0, 97, count))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """dtype -> a bundle with weights large enough for every fault to show, and a tokenizer; copied, never modified."""
    folder = tmp_path_factory.mktemp("text")
    oracles.huggingface_llama(folder / "checkpoint", seed=9, **TINY)
    write_tokenizer(folder / "checkpoint")
    for dtype in DTYPES:
        export_checkpoint(folder / "checkpoint", folder / dtype, ExportConfig(dtype=dtype))
    return {dtype: load_bundle(folder / dtype) for dtype in DTYPES}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text(words(WORDS), encoding="utf-8")
    return path


def run(bundle: Bundle, text: Path | None) -> tuple[ParityReport, dict[str, Stage]]:
    report = validate_bundle(bundle, ValidateConfig(stages=("text",), text=text))
    return report, {stage.name: stage for stage in report.stages if stage.name.startswith("text/")}


# ---- the numbers ------------------------------------------------------------------------------------------------


def exact_log_softmax(logits: ArrayLike) -> list[Decimal]:
    """In 60 digits, from the definition."""
    exact = [Decimal(float(value)) for value in np.asarray(logits).ravel()]
    total = sum(value.exp() for value in exact)
    return [value - total.ln() for value in exact]


def exact_kl(want: ArrayLike, got: ArrayLike) -> Decimal:
    """sum p (log p - log q) in 60 digits: what cancels leaves enough of them."""
    with localcontext() as context:
        context.prec = 60
        pairs = zip(exact_log_softmax(want), exact_log_softmax(got), strict=True)
        return sum((p.exp() * (p - q) for p, q in pairs), Decimal(0))


@pytest.mark.parametrize("size", [1e-10, 1e-7, 1e-6, 1e-3, 0.1, 1.0, 5.0, 40.0])
def test_kl_is_that_of_exact_arithmetic_however_small(size: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        want = rng.standard_normal(41) * 4
        got = want + size * rng.standard_normal(41)
        terms = kl_terms(log_softmax(want), log_softmax(got))
        assert (terms >= 0).all()
        # log-probabilities of about 10 are right to 2e-15: below 1e-6 that is what limits the digits
        assert terms.sum() == pytest.approx(float(exact_kl(want, got)), rel=max(1e-7, 4e-14 / size))


def test_a_shift_of_all_logits_changes_nothing() -> None:
    want = np.random.default_rng(4).standard_normal(97)
    assert kl_terms(log_softmax(want), log_softmax(want)).sum() == 0
    assert kl_terms(log_softmax(want), log_softmax(want + 1000)).sum() < 1e-25


def test_kl_of_a_small_error_is_half_its_variance() -> None:
    rng = np.random.default_rng(5)
    want, error = rng.standard_normal(500), 1e-6 * rng.standard_normal(500)
    p = np.exp(log_softmax(want))
    variance = p @ error**2 - (p @ error) ** 2
    assert kl_terms(log_softmax(want), log_softmax(want + error)).sum() == pytest.approx(variance / 2, rel=1e-4)


def test_a_probability_that_vanishes_overflows_nothing() -> None:
    want, got = np.array([0.0, 900.0, 1.0]), np.array([900.0, 0.0, 1.0])
    assert kl_terms(log_softmax(want), log_softmax(got)).sum() == pytest.approx(900)


def text_of(ids: list[int]) -> Text:
    return Text("text", np.array([ids[:-1]]), np.array([ids[1:]]))


def test_scores_are_those_of_exact_arithmetic() -> None:
    rng = np.random.default_rng(6)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    want = rng.standard_normal((7, 11)) * 3
    got = (want + 0.3 * rng.standard_normal((7, 11))).astype(np.float32)
    found = score([got], [log_softmax(want)], text_of(ids))
    with localcontext() as context:
        context.prec = 60
        left = [exact_log_softmax(row)[token] for row, token in zip(got, ids[1:], strict=True)]
        right = [exact_log_softmax(row)[token] for row, token in zip(want, ids[1:], strict=True)]
        perplexities = [float((-sum(side, Decimal(0)) / len(side)).exp()) for side in (left, right)]
    exact = [float(exact_kl(*rows)) for rows in zip(want, got, strict=True)]
    np.testing.assert_allclose(found.kl, exact, rtol=1e-12)
    assert perplexity(found.log_likelihood) == pytest.approx(perplexities[0], rel=1e-12)
    assert perplexity(found.oracle_log_likelihood) == pytest.approx(perplexities[1], rel=1e-12)
    assert found.agrees.tolist() == [bool(a.argmax() == b.argmax()) for a, b in zip(got, want, strict=True)]
    assert found.nonfinite == 0
    assert found.worst.index[0] == int(np.argmax(exact))
    position, entry = found.worst.index
    assert found.worst.got == pytest.approx(float(exact_log_softmax(got[position])[entry]), rel=1e-12)


@pytest.mark.parametrize("side", ["got", "want"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_an_infinite_divergence(side: str, value: float) -> None:
    logits = {"got": np.ones((4, 11)), "want": np.ones((4, 11))}
    logits[side][2, 5] = value
    found = score([logits["got"]], [log_softmax(logits["want"])], text_of([1, 2, 3, 5, 7]))
    assert math.isinf(found.kl.mean())
    assert math.isinf(found.kl[2])
    assert found.kl[[0, 1, 3]].sum() == 0
    assert found.nonfinite >= 1
    assert found.agrees.tolist() == [True, True, False, True]
    assert found.worst.index[0] == 2


# ---- the text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "windows", "length"), [(2, 1, 1), (3, 1, 2), (129, 1, 128), (130, 2, 64), (300, 3, 99), (5000, 16, 128)]
)
def test_a_text_is_cut_into_windows_of_equal_length_that_fit_the_context(
    bundles: dict[str, Bundle], tmp_path: Path, count: int, windows: int, length: int
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(count), encoding="utf-8")
    found = read_text(path, bundles["float32"])
    ids = [int(word[1:]) for word in words(count).split()]
    assert found.ids.shape == (windows, length)
    assert found.ids.ravel().tolist() == ids[: windows * length]
    assert found.following.ravel().tolist() == ids[1 : windows * length + 1]
    assert str(found).startswith(f"{windows * length} tokens of text.txt")


def test_a_large_vocabulary_leaves_fewer_tokens(
    bundles: dict[str, Bundle], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_stages, "LOGITS_BYTES", 8 * 97 * 50 + 1)
    assert read_text(text, bundles["float32"]).ids.shape == (1, 50)


def test_a_long_file_is_read_to_a_limit_that_may_cut_a_character(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_stages, "_READ_BYTES", 12)
    path = tmp_path / "text.txt"
    path.write_bytes("w1 w2 w3 wé\xe9 w5".encode())  # byte 12 is the second half of the first é
    assert read_text(path, bundles["float32"]).ids.tolist() == [[1, 2, 3]]


# ---- verdicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_bundle_passes_and_its_perplexity_is_that_of_transformers(
    bundles: dict[str, Bundle], text: Path, dtype: str
) -> None:
    from transformers import LlamaForCausalLM

    report, found = run(bundles[dtype], text)
    assert report.verdict == "pass", found
    model = LlamaForCausalLM.from_pretrained(bundles["float32"].folder, dtype=torch.float32)
    ids = torch.tensor([int(word[1:]) for word in text.read_text(encoding="utf-8").split()])
    with torch.no_grad():
        logits = model(ids[:297].reshape(3, 99)).logits.double().reshape(297, -1)
    want = float(torch.nn.functional.cross_entropy(logits, ids[1:298]).exp())
    for stage in found.values():
        metrics = stage.metrics
        assert stage.tolerance is not None
        assert 0 < float(str(metrics["error"])) < stage.tolerance.value, stage
        assert (metrics["tokens"], metrics["windows"], metrics["nonfinite"]) == (297, 3, 0)
        assert metrics["top1_agreement"] == pytest.approx(1, abs=0.1)
        if dtype == "float32":  # the checkpoint of the others is the rounded one
            assert metrics["oracle_perplexity"] == pytest.approx(want, rel=1e-5)
            assert metrics["perplexity"] == pytest.approx(want, rel=1e-5)
        assert stage.reason.startswith("297 tokens of novel.txt in 3 windows "), stage.reason
    assert "by the graph in " + dtype in found["text/evaluator"].reason


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_windows_longer_than_the_trained_context_pass_where_rope_follows_the_length(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, rope_type: str
) -> None:
    scaling: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "longrope":
        scaling |= {"original_max_position_embeddings": 48, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    positions = 48 if rope_type == "dynamic" else 128
    folder = make_checkpoint(max_position_embeddings=positions, rope_parameters=scaling)
    write_tokenizer(folder)
    export_checkpoint(folder)
    (tmp_path / "text.txt").write_text(words(200), encoding="utf-8")
    report, found = run(load_bundle(folder), tmp_path / "text.txt")
    assert report.verdict == "pass", found
    assert all(int(str(stage.metrics["windows"])) == 2 for stage in found.values())


def scale_logits(path: Path, factor: float) -> None:
    """What a language model head scaled by ``factor`` gives."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["fault/logits" if name == "logits" else name for name in node.output]
    model.graph.node.append(
        onnx.helper.make_node("Constant", [], ["fault/factor"], name="fault/Constant", value_float=factor)
    )
    model.graph.node.append(
        onnx.helper.make_node("Mul", ["fault/logits", "fault/factor"], ["logits"], name="fault/Mul")
    )
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("file", "failed"), [("model.onnxruntime.onnx", "text/onnxruntime"), ("model.onnx", "text/evaluator")]
)
def test_logits_that_are_a_thousandth_too_large_fail_the_stage_of_their_file(
    bundles: dict[str, Bundle], text: Path, tmp_path: Path, file: str, failed: str
) -> None:
    folder = Path(shutil.copytree(bundles["float32"].folder, tmp_path / "faulty"))
    scale_logits(folder / file, 1.001)
    report, found = run(load_bundle(folder, ignore_hashes=True), text)
    assert {name for name, stage in found.items() if stage.verdict == "fail"} == {failed}, found
    assert report.verdict == "fail"
    assert float(str(found[failed].metrics["mean_kl_ratio"])) > 1000
    worst = found[failed].worst
    assert worst is not None
    assert worst.got != worst.want


def test_logits_that_are_a_tenth_too_large_fail_at_16_bits(
    bundles: dict[str, Bundle], text: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundles["bfloat16"].folder, tmp_path / "faulty"))
    scale_logits(folder / "model.onnx", 1.1)
    _, found = run(load_bundle(folder, ignore_hashes=True), text)
    assert {name: stage.verdict for name, stage in found.items()} == {
        "text/onnxruntime": "pass", "text/evaluator": "fail",
    }  # fmt: skip


def scores(kl: list[float], nonfinite: int = 0) -> Scores:
    size = len(kl)
    nowhere = WorstElement(tensor="logits", layer=None, index=(0, 0), got=0.0, want=0.0)
    likelihood = np.full(size, -1.0)
    return Scores(np.array(kl), likelihood, likelihood, np.ones(size, np.bool_), nonfinite, nowhere)


@pytest.mark.parametrize(
    ("kl", "floor", "error"),
    [
        ([4.0, 4.0], [1.0, 1.0], 1.0),
        ([4.1, 4.1], [1.0, 1.0], 1.025),
        ([16.0, *[0.0] * 7], [1.0] * 8, 1.0),
        ([17.0, *[0.0] * 7], [1.0] * 8, 17 / 16),
        ([0.0, 0.0], [1.0, 1.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-30, 0.0], [0.0, 0.0], math.inf),
        ([math.inf, 0.0], [1.0, 1.0], math.inf),
    ],
    ids=str,
)
def test_kl_may_be_4_times_the_floor_in_the_mean_and_16_times_in_the_maximum(
    kl: list[float], floor: list[float], error: float
) -> None:
    v: Any = SimpleNamespace(bundle=SimpleNamespace(dtype="float32"), text=text_of([0, *range(len(kl))]))
    found = judge_text("text/x", scores(kl), scores(floor), v, dtype="float32", how="made up")
    assert found.metrics["error"] == pytest.approx(error)
    assert found.verdict == ("pass" if error <= 1 else "fail")


def test_without_a_text_the_stages_are_not_run_and_name_the_flag(bundles: dict[str, Bundle]) -> None:
    config = ValidateConfig(stages=("text", "graph/rope"), require=("text",))
    report = validate_bundle(bundles["float32"], config)
    found = {stage.name: stage for stage in report.stages if stage.name.startswith("text/")}
    assert {stage.verdict for stage in found.values()} == {"not-run"}
    assert all("`--text FILE`" in stage.reason for stage in found.values())
    assert (report.verdict, report.missing) == ("fail", ["text"])


def test_the_command_reports_the_files_name_and_not_its_path(
    bundles: dict[str, Bundle], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["validate", str(bundles["float32"].folder), "--stages", "text", "--require", "text", "--json"]
    assert main([*argv, "--text", str(text), "--report", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert document["environment"]["command"].endswith(" --steps 32 --text novel.txt")
    for file in ("parity.json", "parity.html", "parity.md", "junit.xml"):
        written = (tmp_path / "report" / file).read_text(encoding="utf-8")
        assert str(text.parent) not in written
        assert "novel.txt" in written or file == "junit.xml"  # which says nothing of a stage that passed


# ---- texts and names that cannot be used ------------------------------------------------------------------------

UNUSABLE: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "missing": (None, ("cannot be read", "No such file")),
    "empty": (b"", ("is empty", "0 bytes")),
    "white space": (b" \n\t\n", ("is empty", "4 bytes of white space")),
    "one token": (b"w5\n", ("is too short", "tokens: 1", "at least 2")),
    "latin-1": ("w1 caf\xe9 w2".encode("latin-1"), ("is not UTF-8", "byte 0xe9 at offset 6")),
    "cut character": ("w1 w2 é".encode()[:-1], ("is not UTF-8", "byte 0xc3 at offset 6")),
    "utf-16": ("w1 w2".encode("utf-16"), ("is not UTF-8", "at offset 0")),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_text_that_cannot_be_used_is_refused_before_the_work(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    content, parts = UNUSABLE[what]
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    argv = ["validate", bundles["float32"].folder, "--report", tmp_path / "report", "--text", path]
    check_refused(capsys, tmp_path, argv, "the text file", str(path), *parts)


def test_a_folder_is_no_text(bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["validate", bundles["float32"].folder, "--report", tmp_path / "report", "--text", tmp_path]
    check_refused(capsys, tmp_path, argv, "the text file cannot be read", "Is a directory")


@pytest.mark.parametrize("content", [None, b"{"], ids=["missing", "damaged"])
def test_a_bundle_without_a_tokenizer_cannot_read_a_text(
    bundles: dict[str, Bundle], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    folder = Path(shutil.copytree(bundles["float32"].folder, tmp_path / "bundle"))
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    argv = ["validate", folder, "--ignore-hashes", "--text", text]
    said = check_refused(capsys, tmp_path, argv, "`tokenizer.json`", "leave --text out")
    assert "--tokens" not in said


def test_another_models_tokenizer_is_refused(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(bundles["float32"].folder, tmp_path / "bundle"))
    write_tokenizer(folder, size=99)
    (tmp_path / "text.txt").write_text("w1 w98 w2", encoding="utf-8")
    argv = ["validate", folder, "--ignore-hashes", "--text", tmp_path / "text.txt"]
    check_refused(capsys, tmp_path, argv, "token id 98 is outside the vocabulary", "0..96")


def test_a_head_that_predicts_no_token_refuses_a_text(
    make_checkpoint: MakeCheckpoint, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint()
    export_checkpoint(folder, config=ExportConfig(task="feature-extraction"))
    argv = ["validate", folder, "--text", text]
    check_refused(capsys, tmp_path, argv, "means nothing to feature-extraction", "leave --text out")


@pytest.mark.parametrize("option", ["stages", "require"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("onnxruntime/prefil", "onnxruntime/prefill"),
        ("onxruntime", "onnxruntime"),
        ("ONNXRuntime", "onnxruntime"),
        ("engine/struct", "engine/structure"),
        ("kernel", "kernels"),
        ("graph/float64_bodies", "graph/float64-bodies"),
        ("prefill", "onnxruntime/prefill"),
        ("zzz", None),
        ("", None),
    ],
)
def test_a_mistyped_stage_is_answered_with_the_nearest(
    bundles: dict[str, Bundle], option: str, name: str, meant: str | None
) -> None:
    config: dict[str, Any] = {option: (name,)}
    with pytest.raises(ConfigError, match=f"no stage `{re.escape(name)}`") as caught:
        validate_bundle(bundles["float32"], ValidateConfig(**config))
    assert caught.value.hint == (f"did you mean `{meant}`?" if meant else "a name, or the part before its slash")
