"""The stages on a text: how far an artefact's distribution of the next token is from the oracle's, and its perplexity.

Role: says in the units of a language model what the other stages say of logits, on tokens that mean something to the
model. The text is cut into windows of equal length, each a prefill with no past: what a cache adds is judged elsewhere.

Quantities, all in float64, per token of the text, in nats:

* ``KL(oracle || artefact)``: judged. It is half the variance, under the oracle's distribution, of the error of the logits,
  and so quadratic in it: where the logits may be off by 2 x the noise floor, KL may be 4 x the noise floor's.
* the log-likelihood of the token that follows, hence the perplexity: reported. Its change is of first order in the error
  and of either sign, so its mean is near zero by chance, in the noise floor too: there is no ratio to hold it to.

Shapes: W windows, n tokens each, V vocabulary.
"""

from __future__ import annotations

import codecs
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export._system.files import open_regular
from llama_export.bundle.bundle import Bundle
from llama_export.errors import ConfigError, MissingDependencyError
from llama_export.parity.judge import NOISE_L2, NOISE_MAX, NotRun, ValidateConfig, Validator, check_floor, noise_ratio
from llama_export.parity.report.result import Stage, Tolerance, WorstElement
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession
from llama_export.runtime.requests import check_token_ids
from llama_export.runtime.text import TextCodec

try:
    import torch

    from llama_export.parity.calls import Call, Run, call, graph_inputs
    from llama_export.parity.oracle.evaluator import GraphEvaluator
    from llama_export.parity.sessions import TransformersSession
    from llama_export.parity.tensors import to_numpy
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err


Float64Array = NDArray[np.float64]
WINDOW_TOKENS = 512
"""Longest window: eager attention's scores are quadratic in it."""
TEXT_TOKENS = 2048
"""Tokens scored at most: the noise floor is measured on the same ones, so more would change its ratio little."""
LOGITS_BYTES = 512 << 20
"""Of the oracle's logits, which stay in memory for all stages to share: 2048 tokens of a vocabulary of 32768, 523 of one
of 128256."""
_READ_BYTES = 1 << 18
"""Of the file: 128 for each token that is scored, where four are usual."""
_MEAN_LIMIT, _MAX_LIMIT = NOISE_L2**2, NOISE_MAX**2
KL_WHY = (
    "transformers' eager model at this dtype, on this text, against the same float64 reference, is the noise floor; KL is quadratic in "
    f"the error of the logits, which may be {NOISE_L2:g} x of it, {NOISE_MAX:g} x in the maximum: "
    f"so at most {_MEAN_LIMIT:g} x its KL in the mean and {_MAX_LIMIT:g} x in the maximum"
)


@dataclass(frozen=True, slots=True)
class Text:
    """What a model reads, and what comes next."""

    name: str
    """Of the file, without its folder."""
    ids: NDArray[np.int64]
    """[W, n]"""
    following: NDArray[np.int64]
    """[W, n], the text's token after each."""

    def calls(self) -> list[Call]:
        """A prefill per window."""
        return [call(f"window {index}", window[None]) for index, window in enumerate(self.ids)]

    def __str__(self) -> str:
        windows, length = self.ids.shape
        cut = f" in {windows} windows" if windows > 1 else ""
        return f"{windows * length} tokens of {self.name}{cut}"


def read_text(path: Path, bundle: Bundle) -> Text:
    """Tokens of the beginning of a file, by the bundle's own tokenizer, in windows of equal length.

    Raises:
        ConfigError: no such file, nothing in it, not UTF-8; or the bundle has no tokenizer.
        ShapeError: the tokenizer gives ids outside the vocabulary.
    """
    try:
        codec = TextCodec(bundle.folder)
    except ConfigError as err:
        raise ConfigError(
            err.message, details=err.details, hint="copy the checkpoint's own into the bundle, or leave --text out"
        ) from err
    ids = np.asarray(codec.encode(_read(path)), np.int64)
    if len(ids) < 2:
        raise _unusable("is too short", path, f"tokens: {len(ids)}", "at least 2, so that one can be predicted")
    check_token_ids(ids, bundle.config.vocab_size)
    total = min(len(ids) - 1, TEXT_TOKENS, max(1, LOGITS_BYTES // (8 * bundle.config.vocab_size)))
    windows = -(-total // min(WINDOW_TOKENS, bundle.config.max_length))
    total -= total % windows
    return Text(path.name, ids[:total].reshape(windows, -1), ids[1 : total + 1].reshape(windows, -1))


def _read(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            data = stream.read(_READ_BYTES)
    except OSError as err:
        raise _unusable("cannot be read", path, err.strerror or err, "UTF-8 text") from err
    try:
        # The last character of a longer file may be cut in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < _READ_BYTES)
    except UnicodeDecodeError as err:
        found = f"byte 0x{data[err.start]:02x} at offset {err.start}"
        raise _unusable("is not UTF-8", path, found, "UTF-8 text") from err
    if not text.strip():
        raise _unusable("is empty", path, f"{len(data)} bytes of white space" if data else "0 bytes", "UTF-8 text")
    return text


def _unusable(what: str, path: Path, got: object, expected: str) -> ConfigError:
    return ConfigError(
        f"the text file {what}",
        details={"file": path, "got": got, "expected": expected},
        hint="--text takes a file like those the model was trained on, or leave it out",
    )


# ---- scores -----------------------------------------------------------------------------------------------------


def log_softmax(logits: NDArray[Any]) -> Float64Array:
    """Natural logarithms of the probabilities over the last axis, [.., V]; NaN beside a logit that is NaN or infinite."""
    with np.errstate(invalid="ignore"):
        shifted = np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True)
        found: Float64Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def kl_terms(want: Float64Array, got: Float64Array) -> Float64Array:
    """What each entry of the vocabulary adds to KL(want || got), from logarithms of probabilities [.., V]; none is negative.

    Numerics: with p wanted, q got and d = log q - log p, a term is p (e^d - 1 - d). Both sides' probabilities sum to 1, so
    the terms sum to sum(p (log p - log q)), in which d of either sign cancels: at float32 d is 1e-6 and KL 1e-12, of
    which that sum would keep three digits, or a wrong sign. Here no term is of first order.
    """
    with np.errstate(invalid="ignore"):
        d = got - want
        p = np.exp(want)
        small = np.abs(d) < 1
        # Elsewhere nothing cancels, and e^d may overflow.
        terms = np.where(small, p * (np.expm1(np.where(small, d, 0.0)) - d), np.exp(got) - p - p * d)
    return np.where(np.isnan(terms), np.inf, np.maximum(terms, 0.0))


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model makes of a text's tokens, beside the oracle; one value for each of the W n."""

    kl: Float64Array
    """nats; infinite where a logit of either side is not finite."""
    log_likelihood: Float64Array
    """Of the text's next token, by the model; nats."""
    oracle_log_likelihood: Float64Array
    """Of the same token, by the oracle."""
    agrees: NDArray[np.bool_]
    """Whether the first choice is the oracle's."""
    nonfinite: int
    """Logits that are not finite, on either side."""
    worst: WorstElement
    """Of the token with the largest KL, the entry that adds most to it, as logarithms of probabilities."""


def score(windows: Iterable[NDArray[Any]], oracle: Iterable[Float64Array], text: Text) -> Scores:
    """Reads a model's logits, a window at a time.

    Args:
        windows: [n, V] each, the model's logits.
        oracle: [n, V] each, the oracle's logarithms of probabilities.
    """
    size = text.ids.size
    kl, likelihood, wanted_likelihood = np.empty(size), np.empty(size), np.empty(size)
    agrees = np.empty(size, np.bool_)
    nonfinite, at, worst = 0, 0, WorstElement(tensor="", layer=None, index=(), got=0.0, want=0.0)
    for window, (logits, wanted, following) in enumerate(zip(windows, oracle, text.following, strict=True)):
        finite = np.isfinite(logits) & np.isfinite(wanted)
        nonfinite += int(finite.size - finite.sum())
        for position, token in enumerate(following):  # one by one: a window's float64 copies would fill the memory
            want, got = wanted[position], log_softmax(logits[position])
            terms = kl_terms(want, got)
            kl[at], likelihood[at], wanted_likelihood[at] = terms.sum(), got[token], want[token]
            agrees[at] = finite[position].all() and got.argmax() == want.argmax()
            if at == 0 or kl[at] > kl[:at].max():
                entry = int(terms.argmax())
                worst = WorstElement(
                    tensor=f"logits of window {window}, as log-probabilities", layer=None, index=(position, entry),
                    got=float(got[entry]), want=float(want[entry]),
                )  # fmt: skip
            at += 1
    return Scores(kl, likelihood, wanted_likelihood, agrees, nonfinite, worst)


def perplexity(log_likelihood: Float64Array) -> float:
    """exp of the mean negative log-likelihood of a text's tokens."""
    with np.errstate(over="ignore"):
        return float(np.exp(-log_likelihood.mean()))


# ---- the stages -------------------------------------------------------------------------------------------------


class TextValidator(Validator):
    """Adds the text, and what the oracle and transformers make of it.

    Raises:
        ConfigError, ShapeError: see :func:`read_text`.
    """

    def __init__(self, bundle: Bundle, config: ValidateConfig) -> None:
        super().__init__(bundle, config)
        self._text = None if config.text is None else read_text(config.text, bundle)
        self._text_floors: dict[torch.dtype, Scores] = {}

    @property
    def text(self) -> Text:
        """The text.

        Raises:
            NotRun: none was given.
        """
        if self._text is None:
            raise NotRun("no text to measure on; give one with `--text FILE`")
        return self._text

    def text_inputs(self, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
        """The graph's inputs per window: a cache of its own each, so that no window sees another."""
        length = self.text.ids.shape[1]
        return graph_inputs([Run([one], length) for one in self.text.calls()], self.llama, dtype)

    @cached_property
    def text_oracle(self) -> list[Float64Array]:
        """[n, V] per window: the float64 oracle's logarithms of probabilities."""
        stream = self.program.stream(self.text_inputs(torch.float64), {}, torch.float64)
        (logits,) = (values for name, values in stream if name == "logits")
        windows = [to_numpy(value)[0] for value in logits]
        for window in windows:
            for row in window:
                row[:] = log_softmax(row)  # in place: LOGITS_BYTES once is enough
        return windows

    def text_floor(self, dtype: torch.dtype) -> Scores:
        """transformers' eager model on the same windows."""
        if dtype not in self._text_floors:
            self._text_floors[dtype] = self.text_scores(self._transformers_windows(dtype))
            gc.collect()
        return self._text_floors[dtype]

    def text_scores(self, windows: Iterable[NDArray[Any]]) -> Scores:
        """Scores a model's logits [n, V] per window; the oracle's come first, so a lazy model is not in memory with it."""
        return score(windows, self.text_oracle, self.text)

    def _transformers_windows(self, dtype: torch.dtype) -> Iterator[NDArray[Any]]:
        model = self.transformers_model(dtype)
        for one in self.text.calls():
            # Windows are of equal length: where RoPE remembers the longest sequence it has seen, that is no other one.
            yield TransformersSession(model).step(one.input_ids, logits_index=one.logits_index)[0]

    def onnxruntime_windows(self) -> Iterator[NDArray[Any]]:
        """[n, V] per window, by the file that onnxruntime runs."""
        session = OnnxRuntimeSession(self.bundle, max_seq_len=self.text.ids.shape[1])
        for one in self.text.calls():
            session.reset()
            yield session.step(one.input_ids, logits_index=one.logits_index)[0]


def judge_text(name: str, found: Scores, noise: Scores, v: TextValidator, *, dtype: str, how: str) -> Stage:
    """A verdict by the noise floor on KL, in the mean and in the maximum.

    Raises:
        NotRun: transformers' own model overflows at a dtype that the bundle does not promise to run.
    """
    check_floor(noise.nonfinite, found.nonfinite, dtype=dtype, bundle_dtype=v.bundle.dtype)
    mean, largest, floor, largest_floor = (
        float(value) for value in (found.kl.mean(), found.kl.max(), noise.kl.mean(), noise.kl.max())
    )
    mean_ratio, max_ratio = noise_ratio(mean, floor), noise_ratio(largest, largest_floor)
    share = max(mean_ratio / _MEAN_LIMIT, max_ratio / _MAX_LIMIT)
    got, want = perplexity(found.log_likelihood), perplexity(found.oracle_log_likelihood)
    windows, length = v.text.ids.shape
    return Stage(
        name=name,
        verdict="pass" if share <= 1 else "fail",
        reason=f"{v.text} {how}: perplexity {got:.2f} (oracle {want:.2f}), mean KL {mean:.2g} nats, {mean_ratio:.2f} x the noise floor",
        metrics={
            "error": share,
            "mean_kl": mean, "noise_floor_mean_kl": floor, "mean_kl_ratio": mean_ratio,
            "max_kl": largest, "noise_floor_max_kl": largest_floor, "max_kl_ratio": max_ratio,
            "perplexity": got, "oracle_perplexity": want, "noise_floor_perplexity": perplexity(noise.log_likelihood),
            "top1_agreement": float(found.agrees.mean()), "noise_floor_top1_agreement": float(noise.agrees.mean()),
            "tokens": windows * length, "windows": windows, "nonfinite": found.nonfinite,
        },
        tolerance=Tolerance(value=1.0, metric="error", why=KL_WHY),
        worst=found.worst,
    )  # fmt: skip


def text_onnxruntime(v: TextValidator) -> Stage:
    """The file onnxruntime runs, in float32."""
    found = v.text_scores(v.onnxruntime_windows())
    noise = v.text_floor(torch.float32)
    return judge_text("text/onnxruntime", found, noise, v, dtype="float32", how="on onnxruntime")


def text_evaluator(v: TextValidator) -> Stage:
    """The graph at the bundle's own dtype: what it promises, and no other."""
    dtype = getattr(torch, v.bundle.dtype)
    evaluator = GraphEvaluator(v.bundle.model_path, dtype=dtype)
    (logits,) = (values for name, values in evaluator.stream(v.text_inputs(dtype)) if name == "logits")
    found = v.text_scores(to_numpy(value)[0] for value in logits)
    noise = v.text_floor(dtype)
    return judge_text("text/evaluator", found, noise, v, dtype=v.bundle.dtype, how=f"by the graph in {v.bundle.dtype}")
