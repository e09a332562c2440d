"""``llama-export run``: continues prompts, or predicts with a head."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from llama_export._system.text import terminal_text
from llama_export.cli.console import flat_lines, log, print_data, write
from llama_export.cli.options import PATH, ignore_hashes_flag, json_flag, session_options
from llama_export.cli.sampling_options import sampling_options
from llama_export.errors import ConfigError

if TYPE_CHECKING:
    from llama_export.bundle.bundle import Bundle
    from llama_export.runtime.llm import Completion, TextGeneration
    from llama_export.runtime.text import TextCodec


@click.command(short_help="Continue prompts, or predict.")
@click.argument("bundle", type=PATH)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT",
    help="Text to continue, to classify or to embed, or the question; `-` reads standard input. Repeatable: one batch.",
)  # fmt: skip
@click.option(
    "--prompt-file", "prompt_files", multiple=True, type=PATH, metavar="FILE",
    help="A UTF-8 file that holds one prompt. Repeatable; comes after the prompts of --prompt.",
)  # fmt: skip
@click.option("--context", help="Question answering: the text that holds the answer.")
@click.option("--tokens", metavar="1,2,3", help="Token ids instead of --prompt.")
@sampling_options("run")
@session_options
@ignore_hashes_flag
@json_flag
@click.pass_context
def run(
    command: click.Context, /, bundle: Path, prompts: tuple[str, ...], prompt_files: tuple[Path, ...], context: str | None,
    tokens: str | None, session: dict[str, Any], ignore_hashes: bool, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Run BUNDLE: continue prompts, or say what the head makes of a text.

    Text goes to stdout as it is generated; of several prompts, when all are done.
    """
    from llama_export._system.files import is_unicode
    from llama_export.bundle.bundle import load_bundle

    if bool(prompts or prompt_files) == (tokens is not None):
        raise click.UsageError("give either --prompt TEXT (or --prompt-file FILE) or --tokens 1,2,3")
    if prompts.count("-") > 1:
        raise click.UsageError("--prompt - can be given once: standard input is read to its end")
    for flag, text in (*(("--prompt", prompt) for prompt in prompts), ("--context", context)):
        if text is not None and not is_unicode(text):
            raise ConfigError(
                f"{flag} is not UTF-8 text", details={"got": ascii(text)}, hint="check the terminal's encoding"
            )
    prompts = (
        *(_prompt_from_stdin() if prompt == "-" else prompt for prompt in prompts),
        *map(_prompt_from_file, prompt_files),
    )
    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    if opened.task == "causal-lm":
        if context is not None:
            raise ConfigError(
                "a context means nothing to causal-lm", details={"bundle": bundle}, hint="leave --context out"
            )
        sampling["logit_bias"] = dict(map(_token_bias, sampling["logit_bias"]))
        _generate(opened, prompts, tokens, sampling, session, as_json)
        return
    only_generation = [*sampling, "quantize", "max_seq_len"]
    given = [name for name in only_generation if command.get_parameter_source(name) != ParameterSource.DEFAULT]
    if given or len(prompts) > 1:
        raise ConfigError(
            f"{opened.task} takes one text and no settings of generation",
            details={"bundle": bundle, "got": ", ".join(given) or f"{len(prompts)} prompts"},
            hint="give one --prompt, and leave the others out",
        )
    settings = {name: session[name] for name in ("backend", "engine", "threads")}
    _predict(opened, prompts[0] if prompts else None, context, tokens, settings, as_json)


def _prompt_from_stdin() -> str:
    return _prompt_text(sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1), "standard input")


def _prompt_from_file(path: Path) -> str:
    from llama_export._system.files import read_small

    try:
        return _prompt_text(read_small(path, _MAX_PROMPT_BYTES), f"`{path}`")
    except OSError as err:
        raise ConfigError(
            f"prompt file `{path}` cannot be read", details={"reason": err.strerror or err}, hint="check the path"
        ) from err


def _prompt_text(raw: bytes, source: str) -> str:
    """A prompt as it stands, its last line break included.

    Raises:
        ConfigError: empty, too large, or not UTF-8.
    """
    if len(raw) > _MAX_PROMPT_BYTES:
        raise ConfigError(
            f"the prompt from {source} is too large",
            details={"got": f"more than {_MAX_PROMPT_BYTES} bytes"},
            hint="shorten it: a model reads thousands of tokens",
        )
    if not raw:
        raise ConfigError(f"the prompt from {source} is empty", hint="give at least one character")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise ConfigError(
            f"the prompt from {source} is not UTF-8 text",
            details={"got": f"byte {raw[err.start]:#04x} at position {err.start}"},
            hint="convert it to UTF-8",
        ) from err


_MAX_PROMPT_BYTES = 64 << 20


def _predict(
    opened: Bundle,
    prompt: str | None,
    context: str | None,
    tokens: str | None,
    settings: Mapping[str, Any],
    as_json: bool,
) -> None:
    """One text through a head; token ids give the bare outputs."""
    from llama_export.runtime.opening import open_head_session
    from llama_export.runtime.prediction import predict
    from llama_export.runtime.text import TextCodec

    session = open_head_session(opened, **settings)
    if session.note:
        log(f"run: {session.note}")
    start = time.perf_counter()
    if prompt is None:
        outputs = session.run([_token_list(tokens or "")])
        data = {"task": session.task, **{name: array[0].tolist() for name, array in outputs.items()}}
    else:
        encoding = TextCodec(opened.folder).encode_with_offsets(prompt, context)
        data = predict(session, encoding, prompt, context)
    data |= {"seconds": round(time.perf_counter() - start, 6), "backend": session.backend}
    print_data(data, as_json, "\n".join(flat_lines(data)))


def _generate(
    opened: Bundle, prompts: Sequence[str], tokens: str | None, sampling: Mapping[str, Any], settings: Mapping[str, Any],
    as_json: bool,
) -> None:  # fmt: skip
    """One prompt continued, whose text goes out as it comes; or several as one batch."""
    from llama_export.runtime.llm import LLM
    from llama_export.runtime.opening import open_session, request_capacity
    from llama_export.runtime.sampling_params import SamplingParams
    from llama_export.runtime.text import TextCodec

    params = SamplingParams(**sampling)
    if params.logprobs is not None and not as_json:
        raise ConfigError(
            "--logprobs has no place in plain text", details={"got": f"--logprobs {params.logprobs}"}, hint="add --json"
        )
    if params.temperature > 0 and params.seed is None:
        params = dataclasses.replace(params, seed=secrets.randbits(32))  # so that the run can be repeated
    codec = TextCodec(opened.folder) if prompts or (opened.folder / "tokenizer.json").is_file() else None
    ids = [codec.encode(text) for text in prompts] if codec is not None and prompts else [_token_list(tokens or "")]
    needed = request_capacity(max(map(len, ids)), params.max_new_tokens, opened.config.max_length)
    session = open_session(opened, request_tokens=needed, **settings)
    if session.note:
        log(f"run: {session.note}")
    llm = LLM(opened, session, codec)
    if len(ids) == 1 and not as_json:
        made = [_stream(llm.generate(ids[0], params), as_text=bool(prompts))]
    else:
        made = llm.complete(ids, params)
    prefill = max(one.prefill_seconds for one in made)
    decode = max(one.prefill_seconds + one.decode_seconds for one in made) - prefill
    later = sum(len(one.tokens) - 1 for one in made)
    speed = later / decode if later and decode else None
    if as_json:
        data = {
            "tokens": [one.tokens for one in made], "text": [one.text if codec is not None else None for one in made],
            "prefill_seconds": round(prefill, 6), "decode_tokens_per_second": None if speed is None else round(speed, 2),
            "backend": session.backend, "finish_reason": [one.finish_reason for one in made],
            "logprobs": None if params.logprobs is None else [_logprobs(one, codec) for one in made], "seed": params.seed,
        }  # fmt: skip
        print_data(data, True, "")
    elif len(made) > 1:
        shown = terminal_text if sys.stdout.isatty() else str
        for prompt, one in zip(prompts, made, strict=True):
            click.echo(shown(f"prompt: {json.dumps(prompt, ensure_ascii=False)}\n{one.text}"))
    rate = "" if speed is None else f", decode {speed:.1f} tokens/s"
    seed = "" if params.temperature == 0 else f", seed {params.seed}"
    count = sum(len(one.tokens) for one in made)
    log(f"run: {count} tokens, prefill {prefill * 1000:.0f} ms{rate}, {session.backend}{seed}")


def _stream(generation: TextGeneration, *, as_text: bool) -> Completion:
    """Prints pieces of text, or token ids, as they come; the line is ended whatever happens."""
    comma, shown = "", terminal_text if sys.stdout.isatty() else str
    try:
        for piece in generation:
            write(shown(piece) if as_text else f"{comma}{generation.events[-1].token}")
            comma = ","
    finally:
        write("\n")
    return generation.result


def _logprobs(one: Completion, codec: TextCodec | None) -> list[dict[str, Any]]:
    """Per token, as JSON, with the token's own text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = (None, None) if codec is None else codec.piece_of(token)
        return {"token": token, "text": text, "bytes": None if raw is None else list(raw), "logprob": logprob}

    return [
        {**entry(at.token, at.logprob), "top": [entry(token, logprob) for token, logprob in at.top]}
        for at in one.logprobs or ()
    ]


def _token_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--tokens is not a list of integers: {text!r}",
            details={"got": repr(text), "expected": "1,2,3"},
            hint="separate token ids by commas, or give text: --prompt TEXT",
        ) from None


def _token_bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise ConfigError(
            f"--logit-bias is not a token id and a number: {text!r}",
            details={"got": repr(text), "expected": "TOKEN=VALUE, as in 42=-1.5"},
            hint="one --logit-bias per token",
        ) from None
