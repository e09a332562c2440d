"""How a text is continued: the settings, their checks, and the names that every interface gives them.

Role: one table for the Python API, ``run`` and ``chat``. Nothing here needs numpy, so ``--help`` can read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from llama_export._system.files import is_unicode
from llama_export.config.checks import finite_number, nearest_name, whole_number
from llama_export.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a text is continued. The default is greedy: the most likely token, again and again.

    Raises:
        ConfigError: a value out of range; it names the field and the flag of ``llama-export run``.
    """

    max_new_tokens: int = 64
    """At most so many tokens are added, >= 1."""
    temperature: float = 0.0
    """Logits are divided by it, >= 0: below 1 likely tokens become likelier. 0 is greedy; the filters below then change
    nothing, for each keeps the most likely token."""
    top_k: int = 0
    """Keeps the k most likely tokens, and all that tie with the last of them; 0 is off."""
    top_p: float = 1.0
    """Keeps the fewest most likely tokens whose probabilities add up to this, 0 < p <= 1; 1 is off.
    https://arxiv.org/abs/1904.09751"""
    min_p: float = 0.0
    """Keeps tokens at least this share as likely as the most likely one, 0..1; 0 is off.
    https://arxiv.org/abs/2407.01082"""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt or output are divided by it, negative ones multiplied, > 0; 1 is off.
    https://arxiv.org/abs/1909.05858 (section 4.1)"""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before, as OpenAI's API defines it; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the token was generated before; 0 is off."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Token id -> what is added to its logit; -1e9 rules a token out."""
    seed: int | None = None
    """0..2^64 - 1. The same seed draws the same numbers for a row, whatever else is in its batch; None: other numbers
    each time."""
    stop: Sequence[str] = ()
    """Texts, or one text, that end the output, which stops short of the one that comes first."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output, beside the model's own; the token is in ``tokens``, not in the text."""
    ignore_eos: bool = False
    """The model's own end-of-sequence tokens end nothing."""
    logprobs: int | None = None
    """Natural logarithms of the model's own probabilities, before any of the steps above: of each chosen token, and of
    this many most likely ones; None: not computed."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):  # copies: the settings cannot be changed from outside
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            listed = isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping))
            object.__setattr__(self, name, tuple(value) if listed else value)
        for name, least in (("max_new_tokens", 1), ("top_k", 0)):
            self._keep(name, number := whole_number(getattr(self, name)), f"an integer >= {least}")
            _check(number is not None and number >= least, name, getattr(self, name), f"an integer >= {least}")
        for name, expected in _NUMBERS.items():
            self._keep(name, finite_number(getattr(self, name)), expected)
        _check(self.temperature >= 0, "temperature", self.temperature, _NUMBERS["temperature"])
        _check(0 < self.top_p <= 1, "top_p", self.top_p, _NUMBERS["top_p"])
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, _NUMBERS["min_p"])
        penalty = self.repetition_penalty
        _check(penalty > 0, "repetition_penalty", penalty, _NUMBERS["repetition_penalty"])
        self._keep("logit_bias", _biases(self.logit_bias), "token id -> number")
        if self.seed is not None:
            self._keep("seed", number := whole_number(self.seed), "an integer, 0..2^64 - 1, or None")
            _check(number is not None and 0 <= number < 2**64, "seed", number, "an integer, 0..2^64 - 1, or None")
        valid = isinstance(self.stop, tuple) and all(isinstance(text, str) and is_unicode(text) for text in self.stop)
        _check(valid and all(self.stop), "stop", self.stop, "texts of at least one character")
        self._keep("stop_token_ids", _token_ids(self.stop_token_ids), "token ids")
        _check(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")
        if self.logprobs is not None:
            self._keep("logprobs", number := whole_number(self.logprobs), "an integer >= 0, or None")
            _check(number is not None and number >= 0, "logprobs", number, "an integer >= 0, or None")

    def _keep(self, name: str, value: object, expected: str) -> None:
        """Replaces a field by its checked value; None: it was refused."""
        _check(value is not None, name, getattr(self, name), expected)
        object.__setattr__(self, name, value)


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`SamplingParams` as keyword arguments, each of which may be left out."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None


def sampling_with(params: SamplingParams | None, changes: Mapping[str, Any]) -> SamplingParams:
    """``params``, or the defaults, with some fields replaced.

    Raises:
        ConfigError: no such field, or a value out of range; ``params`` is something else.
    """
    if not isinstance(params, SamplingParams | None):
        raise ConfigError(
            f"params is a {type(params).__name__}",
            details={"got": repr(params)[:200], "expected": "SamplingParams"},
            hint="pass params=SamplingParams(...), or the settings as keyword arguments",
        )
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in changes:
        if name not in names:
            near = nearest_name(name, names)
            raise ConfigError(
                f"there is no setting `{name}`",
                details={"got": name, "expected": ", ".join(names)},
                hint=f"did you mean `{near}`?" if near else "use a field of SamplingParams",
            )
    return dataclasses.replace(params or SamplingParams(), **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlag:
    """The command line's option for a field of :class:`SamplingParams`. Its type and ``run``'s default are the field's."""

    help: str
    metavar: str | None = None
    name: str | None = None
    """Without ``--``; None: the field's name with hyphens."""
    least: int | None = None
    """The smallest value that the command line reads."""
    run_default: str | None = None
    """``run``'s default in words, where the field's default does not say it."""
    chat_default: str | None = None
    """``chat``'s default in words; None: ``chat`` has no such option."""


SAMPLING_FLAGS: dict[str, SamplingFlag] = {
    "max_new_tokens": SamplingFlag(help="Generate at most this many tokens.", metavar="TOKENS", least=1, chat_default="1024"),
    "temperature": SamplingFlag(
        help="0: take the likeliest token. Above 0: draw at random.",
        chat_default="generation_config.json's, else 0.7",
    ),
    "top_k": SamplingFlag(
        help="Draw from this many of the likeliest tokens; 0: from all.", metavar="TOKENS",
        chat_default="generation_config.json's, else 0",
    ),
    "top_p": SamplingFlag(
        help="Draw from the fewest likeliest tokens whose probabilities reach this sum.",
        chat_default="generation_config.json's, else 1",
    ),
    "min_p": SamplingFlag(
        help="Draw from tokens at least this share as likely as the likeliest.",
        chat_default="generation_config.json's, else 0",
    ),
    "repetition_penalty": SamplingFlag(
        help="Above 1: make tokens of prompt and output less likely.",
        chat_default="generation_config.json's, else 1",
    ),
    "presence_penalty": SamplingFlag(help="Subtract this from the logits of tokens in the output."),
    "frequency_penalty": SamplingFlag(help="Subtract this for each time that a token is in the output."),
    "logit_bias": SamplingFlag(help="Add VALUE to the logit of a token. Repeatable.", metavar="TOKEN=VALUE"),
    "seed": SamplingFlag(
        help="Seed of the random draws.", run_default="another one each time", chat_default="another one each time"
    ),
    "stop": SamplingFlag(help="End before this text. Repeatable.", metavar="TEXT"),
    "stop_token_ids": SamplingFlag(help="End at this token. Repeatable.", metavar="ID", name="stop-token"),
    "ignore_eos": SamplingFlag(help="Continue after the model's end-of-sequence token."),
    "logprobs": SamplingFlag(help="With --json: log-probabilities of each token and of the N likeliest.", metavar="N"),
}  # fmt: skip
"""Field -> its option, in the order of ``--help``."""

_NUMBERS = {
    "temperature": "a number >= 0",
    "top_p": "a probability, 0 < p <= 1",
    "min_p": "a share, 0..1",
    "repetition_penalty": "a number > 0",
    "presence_penalty": "a number",
    "frequency_penalty": "a number",
}


def _biases(value: object) -> dict[int, float] | None:
    if not isinstance(value, Mapping):
        return None
    found = {whole_number(token): finite_number(bias) for token, bias in value.items()}
    return found if all(t is not None and t >= 0 and bias is not None for t, bias in found.items()) else None  # type: ignore[return-value]


def _token_ids(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, tuple):
        return None
    found = [whole_number(token) for token in value]
    return tuple(found) if all(token is not None and token >= 0 for token in found) else None  # type: ignore[arg-type]


def flag_of(field: str) -> str:
    """The option of ``llama-export run`` that sets a field."""
    return f"--{SAMPLING_FLAGS[field].name or field.replace('_', '-')}"


def _check(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise ConfigError(
            f"bad value for {name}: {repr(got)[:200]}",
            details={"field": name, "got": repr(got)[:200], "expected": expected},
            hint=f"correct it: {flag_of(name)} on the command line, {name} in SamplingParams",
        )
