"""The command line: parse, call one library function, print. No logic of its own.

stdout is data, stderr is log and progress. Every command takes ``--json``: one JSON document on stdout, also for an
error. Heavy packages are imported by the command that needs them, so ``--help`` needs none of them.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click
from click.core import ParameterSource

from llama_export import __version__
from llama_export._interrupt import interrupts_expected, watched
from llama_export._process import collector_paused
from llama_export._sampling_options import sampling_options
from llama_export._text import printable, printable_json, terminal_text
from llama_export.config import (
    BACKENDS,
    DTYPES,
    ENGINE_WEIGHTS,
    RUNTIME_BACKENDS,
    TASKS,
    VARIANTS,
    WEIGHTS_MODES,
    EngineConfig,
    ExportConfig,
)
from llama_export.errors import ConfigError, LlamaExportError, ShapeError, ToolchainError
from llama_export.path_hints import require_checkpoint_folder

if TYPE_CHECKING:
    from rich.console import Console

    from llama_export.bundle import Bundle
    from llama_export.llm import Completion, TextGeneration
    from llama_export.runtime.text import TextCodec

EXIT_CODES = """\b
Exit codes:
  0  done; for `validate`: every stage that ran passed
  1  `validate`: a stage failed, or a required one did not run; `reproduce`: the operation is still wrong
  2  your input: config, checkpoint, flags, a file that does not match
  3  this machine: a missing package, driver, GPU, disk space or memory
  4  a bug in llama-export
  5  `report diff`: drift; the new report says less, or worse, than the old one
"""
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
_PATH = click.Path(path_type=Path)
_json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_ignore_hashes = click.option(
    "--ignore-hashes", is_flag=True, help="Open the bundle although a file differs from the manifest."
)
_ignore_estimate = click.option(
    "--ignore-estimate", is_flag=True, help="Go on although the estimate says that disk or memory do not suffice."
)


def _session_options(function: Callable[..., None]) -> Callable[..., None]:
    """Flags that choose what computes; the command takes them as one dict, ``session``."""
    options = (
        click.option(
            "--backend", type=click.Choice(RUNTIME_BACKENDS), default="auto",
            help="What computes. auto: the engine given or found in BUNDLE that this machine can run, else onnxruntime on the "
            "CPU.",
        ),
        click.option("--engine", type=_PATH, help="TensorRT engine, made by `llama-export build`."),
        click.option("--quantize", type=click.Choice(VARIANTS), help="Weights made by `llama-export quantize` (CPU)."),
        click.option(
            "--max-seq-len", type=click.IntRange(1), metavar="TOKENS",
            help="What onnxruntime's KV cache holds; memory is taken when it is filled.  [default: what the model can, at "
            "most 4096, or what the request needs]",
        ),
        click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: one per core]"),
    )  # fmt: skip

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        session = {name: kwargs.pop(name) for name in ("backend", "engine", "quantize", "max_seq_len", "threads")}
        function(*args, session=session, **kwargs)

    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings=_CONTEXT, epilog=EXIT_CODES)
@click.version_option(__version__, "-V", "--version", prog_name="llama-export")
def cli() -> None:
    """Turn a Llama checkpoint into ONNX and TensorRT engines that are proven to compute what the checkpoint computes."""
    try:
        os.getcwd()
    except FileNotFoundError as err:
        raise ConfigError(
            "the working directory does not exist any more", hint="change to a folder that exists: cd /"
        ) from err


@cli.command()
@click.argument("checkpoint", type=_PATH)
@click.option(
    "-o", "--output", type=_PATH, help="Folder to make.  [default: write into CHECKPOINT, which becomes the bundle]"
)
@click.option(
    "--task",
    type=click.Choice(["auto", *TASKS]),
    default="auto",
    help="Which head; auto: the checkpoint's architecture.",
)
@click.option(
    "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", help="Compute dtype; auto: the checkpoint's own."
)
@click.option(
    "--weights", type=click.Choice(WEIGHTS_MODES), default="auto",
    help="How the weights reach -o: reflinks, or copies where the file system has none (auto); hard links; copies; or inside "
    "the ONNX files (embed, up to 2 GiB, also without -o).",
)  # fmt: skip
@click.option(
    "--convert-weights",
    is_flag=True,
    help="Write the weight files of -o in --dtype, instead of casting in the graph what is stored in another.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--hash-weights", is_flag=True, help="Record a SHA-256 of every weight file (reads every byte).")
@click.option(
    "--allow-config-key",
    "allow_config_keys",
    multiple=True,
    metavar="KEY",
    help="Accept a config.json key that is not read.",
)
@click.option(
    "--quantize", "quantized", multiple=True, type=click.Choice(VARIANTS),
    help="Quantise the weights for the CPU at the end, as `quantize` does; may be repeated.",
)  # fmt: skip
@_ignore_estimate
@_json_flag
def export(
    checkpoint: Path, output: Path | None, task: str, dtype: str, weights: Any, convert_weights: bool, force: bool,
    hash_weights: bool, allow_config_keys: tuple[str, ...], quantized: tuple[str, ...], ignore_estimate: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export CHECKPOINT (a Hugging Face folder) to ONNX, weights by reference."""
    require_checkpoint_folder(checkpoint)  # before the imports, which take seconds
    with collector_paused():  # the imports, too, make many objects and no garbage
        from llama_export.export import export_checkpoint

    config = ExportConfig(
        task=task,
        dtype=dtype,
        weights=weights,
        convert_weights=convert_weights,
        force=force,
        hash_weights=hash_weights,
        allow_config_keys=allow_config_keys,
        ignore_estimate=ignore_estimate,
    )
    with _progress("bytes") as progress:
        result = export_checkpoint(checkpoint, output, config, log=_log, progress=progress)
    data = dataclasses.asdict(result)
    if quantized:
        data["quantized"] = [
            _quantize(Path(result.bundle), kind, force=False, ignore_estimate=ignore_estimate, ignore_hashes=False)
            for kind in dict.fromkeys(quantized)
        ]
    _print(data, as_json, result.bundle)


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--type", "kind", type=click.Choice(VARIANTS), default="int4", help="Bits of a weight.")
@click.option("--force", is_flag=True, help="Replace weights of the same type.")
@_ignore_estimate
@_ignore_hashes
@_json_flag
def quantize(bundle: Path, kind: str, force: bool, ignore_estimate: bool, ignore_hashes: bool, as_json: bool) -> None:
    """Quantise the weights of BUNDLE for the CPU: a graph and a weight file beside the others, which stay as they are."""
    data = _quantize(bundle, kind, force=force, ignore_estimate=ignore_estimate, ignore_hashes=ignore_hashes)
    _print(data, as_json, data["bundle"])


def _quantize(bundle: Path, kind: str, *, force: bool, ignore_estimate: bool, ignore_hashes: bool) -> dict[str, Any]:
    from llama_export.bundle import load_bundle
    from llama_export.quantization import quantize_bundle

    opened = load_bundle(bundle, ignore_hashes=ignore_hashes, replacing=kind if force else None)
    with _progress("bytes") as progress:
        result = quantize_bundle(
            opened, kind, force=force, ignore_estimate=ignore_estimate, log=_log, progress=progress
        )
    return dataclasses.asdict(result)


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="tensorrt-rtx", help="Which TensorRT builds the engine."
)
@click.option(
    "--ops",
    default="plugin",
    metavar="plugin|native|OP=native,...",
    help="Attention and norms by our plugin layers, or by TensorRT's own from the ONNX function bodies; or some of each: "
    "LlamaRMSNorm=native,LlamaAddRMSNorm=native.",
)
@click.option(
    "--max-seq-len",
    type=int,
    metavar="TOKENS",
    help="KV-cache capacity.  [default: min(max_position_embeddings, 4096)]",
)
@click.option("--max-batch", type=int, default=4, metavar="ROWS", help="Largest batch.")
@click.option(
    "--weights", type=click.Choice(ENGINE_WEIGHTS), default="constant",
    help="Inside the engine; or taken from BUNDLE's files when it is loaded (input: an engine of a few MB that `refit` gives "
    "to other fine-tunes); or stripped and put back at load (needs a GPU to build).",
)  # fmt: skip
@click.option(
    "--profiles", type=click.Choice(["1", "2"]), default="2",
    help="2: kernels for prefill and for decode. 1: one set, half the size and build time.",
)  # fmt: skip
@click.option(
    "--compute-capability", "compute_capabilities", multiple=True, metavar="MAJOR.MINOR",
    help="GPU to compile for; may be repeated.  [default: one engine for all that TensorRT-RTX supports]",
)  # fmt: skip
@click.option("--version-compatible", is_flag=True, help="Let later versions of the backend load the engine.")
@click.option("--tf32", is_flag=True, help="Let float32 matrix products round their inputs to TF32.")
@click.option("--force", is_flag=True, help="Replace an engine of the same name.")
@_ignore_estimate
@_ignore_hashes
@_json_flag
def build(
    bundle: Path, backend: Any, ops: str, max_seq_len: int | None, max_batch: int, weights: Any, profiles: str,
    compute_capabilities: tuple[str, ...], version_compatible: bool, tf32: bool, force: bool, ignore_estimate: bool,
    ignore_hashes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build a TensorRT engine from BUNDLE. Needs no GPU."""
    from llama_export.bundle import load_bundle
    from llama_export.engine import build_engine

    config = EngineConfig(
        backend=backend, ops=ops, max_seq_len=max_seq_len, max_batch=max_batch, weights=weights, profiles=int(profiles),
        compute_capabilities=compute_capabilities, version_compatible=version_compatible, tf32=tf32, force=force,
        ignore_estimate=ignore_estimate,
    )  # fmt: skip
    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    with _progress("steps") as progress:
        result = build_engine(opened, config, log=_log, progress=progress)
    _print(dataclasses.asdict(result), as_json, result.engine)


@cli.command()
@click.argument("engine", type=_PATH)
@click.argument("bundle", type=_PATH)
@click.option("--force", is_flag=True, help="Replace an engine of the same name.")
@_ignore_hashes
@_json_flag
def refit(engine: Path, bundle: Path, force: bool, ignore_hashes: bool, as_json: bool) -> None:
    """Give ENGINE, built with --weights input, the weights of BUNDLE: another fine-tune of the same model.

    Writes it into BUNDLE/engines; builds nothing.
    """
    from llama_export.bundle import load_bundle
    from llama_export.refit import refit_engine

    result = refit_engine(engine, load_bundle(bundle, ignore_hashes=ignore_hashes), force=force, log=_log)
    _print(dataclasses.asdict(result), as_json, result.engine)


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT",
    help="Text to continue, to classify or to embed, or the question; `-` reads standard input. Repeatable: one batch.",
)  # fmt: skip
@click.option(
    "--prompt-file", "prompt_files", multiple=True, type=_PATH, metavar="FILE",
    help="A UTF-8 file that holds one prompt. Repeatable; comes after the prompts of --prompt.",
)  # fmt: skip
@click.option("--context", help="Question answering: the text that holds the answer.")
@click.option("--tokens", metavar="1,2,3", help="Token ids instead of --prompt.")
@sampling_options("run")
@_session_options
@_ignore_hashes
@_json_flag
@click.pass_context
def run(
    command: click.Context, /, bundle: Path, prompts: tuple[str, ...], prompt_files: tuple[Path, ...], context: str | None,
    tokens: str | None, session: dict[str, Any], ignore_hashes: bool, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Run BUNDLE: continue prompts, or say what the head makes of a text.

    Text goes to stdout as it is generated; of several prompts, when all are done.
    """
    from llama_export._files import is_unicode
    from llama_export.bundle import load_bundle

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
    from llama_export._files import read_small

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
    from llama_export.llm import open_head_session
    from llama_export.runtime import TextCodec, predict

    session = open_head_session(opened, **settings)
    if session.note:
        _log(f"run: {session.note}")
    start = time.perf_counter()
    if prompt is None:
        outputs = session.run([_token_list(tokens or "")])
        data = {"task": session.task, **{name: array[0].tolist() for name, array in outputs.items()}}
    else:
        encoding = TextCodec(opened.folder).encode_with_offsets(prompt, context)
        data = predict(session, encoding, prompt, context)
    data |= {"seconds": round(time.perf_counter() - start, 6), "backend": session.backend}
    _print(data, as_json, "\n".join(_lines(data)))


def _generate(
    opened: Bundle, prompts: Sequence[str], tokens: str | None, sampling: Mapping[str, Any], settings: Mapping[str, Any],
    as_json: bool,
) -> None:  # fmt: skip
    """One prompt continued, whose text goes out as it comes; or several as one batch."""
    from llama_export.llm import LLM, open_session
    from llama_export.runtime import TextCodec
    from llama_export.sampling_params import SamplingParams

    params = SamplingParams(**sampling)
    if params.logprobs is not None and not as_json:
        raise ConfigError(
            "--logprobs has no place in plain text", details={"got": f"--logprobs {params.logprobs}"}, hint="add --json"
        )
    if params.temperature > 0 and params.seed is None:
        params = dataclasses.replace(params, seed=secrets.randbits(32))  # so that the run can be repeated
    codec = TextCodec(opened.folder) if prompts or (opened.folder / "tokenizer.json").is_file() else None
    ids = [codec.encode(text) for text in prompts] if codec is not None and prompts else [_token_list(tokens or "")]
    needed = _needed(max(map(len, ids)), params.max_new_tokens, opened.config.max_length)
    session = open_session(opened, request_tokens=needed, **settings)
    if session.note:
        _log(f"run: {session.note}")
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
        _print(data, True, "")
    elif len(made) > 1:
        shown = terminal_text if sys.stdout.isatty() else str
        for prompt, one in zip(prompts, made, strict=True):
            click.echo(shown(f"prompt: {json.dumps(prompt, ensure_ascii=False)}\n{one.text}"))
    rate = "" if speed is None else f", decode {speed:.1f} tokens/s"
    seed = "" if params.temperature == 0 else f", seed {params.seed}"
    count = sum(len(one.tokens) for one in made)
    _log(f"run: {count} tokens, prefill {prefill * 1000:.0f} ms{rate}, {session.backend}{seed}")


def _stream(generation: TextGeneration, *, as_text: bool) -> Completion:
    """Prints pieces of text, or token ids, as they come; the line is ended whatever happens."""
    comma, shown = "", terminal_text if sys.stdout.isatty() else str
    try:
        for piece in generation:
            _write(shown(piece) if as_text else f"{comma}{generation.events[-1].token}")
            comma = ","
    finally:
        _write("\n")
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


def _needed(prompt: int, new_tokens: int, limit: int) -> int:
    """Tokens that the cache must hold: the last one of the output is not kept."""
    needed = prompt + new_tokens - 1
    if needed > limit:
        raise ShapeError(
            f"prompt and new tokens need {needed} positions, the model has {limit}",
            details={"prompt": f"{prompt} tokens", "max_new_tokens": new_tokens, "longest sequence": limit},
            hint="shorten the prompt, or lower --max-new-tokens",
        )
    return max(1, needed)


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


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--system", metavar="TEXT", help="The system message.")
@sampling_options("chat")
@_session_options
@_ignore_hashes
@_json_flag
def chat(
    bundle: Path, system: str | None, session: dict[str, Any], ignore_hashes: bool, as_json: bool, **sampling: Any
) -> None:
    """Have a conversation with BUNDLE, worded as the checkpoint's own chat template says.

    Without a terminal each line of stdin is a message, and each answer goes to stdout.
    """
    from llama_export import terminal_chat

    llm = terminal_chat.open_chat_model(bundle, ignore_hashes=ignore_hashes, **session)
    given = {name: value for name, value in sampling.items() if value is not None}
    conversation = terminal_chat.Conversation(
        llm, system=system, sampling={**terminal_chat.default_sampling(llm.bundle.folder), **given}
    )
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):  # bytes that are no text are refused in words; what cannot be shown is a `?`
            stream.reconfigure(errors=errors)
    if sys.stdin.isatty() and sys.stdout.isatty() and not as_json:
        with interrupts_expected():
            terminal_chat.TerminalChat(conversation, out=sys.stdout, color=terminal_chat.wants_color(sys.stdout)).run()
        return
    if llm.session.note:
        _log(f"chat: {llm.session.note}")
    shown = terminal_text if sys.stdout.isatty() else str
    replies = terminal_chat.answer_lines(
        conversation,
        iter(sys.stdin),
        write=(lambda text: None) if as_json else lambda text: _write(shown(text)),
        log=_log,
    )
    if as_json:
        _print(terminal_chat.document(conversation, replies), True, "")


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option(
    "--stages",
    default="",
    metavar="NAME,...",
    help="Run only these stages; `onnxruntime` selects onnxruntime/*.  [default: all]",
)
@click.option("--require", default="", metavar="NAME,...", help="Fail if one of these did not run.")
@click.option("--steps", type=click.IntRange(1), default=32, metavar="TOKENS", help="Teacher-forced decode steps.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the random tokens.")
@click.option(
    "--text", type=_PATH, metavar="FILE", help="UTF-8 text for text/*: perplexity and KL divergence of its beginning."
)
@click.option("--report", type=_PATH, metavar="DIR", help="Where the report goes.  [default: BUNDLE/report]")
@click.option(
    "--checkpoint",
    type=_PATH,
    metavar="DIR",
    help="What BUNDLE was exported from, where its weights are embedded and it holds no checkpoint itself.",
)
@click.option("--resume", is_flag=True, help="Go on with a validation that was interrupted.")
@_ignore_hashes
@_json_flag
def validate(
    bundle: Path, stages: str, require: str, steps: int, seed: int, text: Path | None, report: Path | None,
    checkpoint: Path | None, resume: bool, ignore_hashes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Prove, stage by stage, that BUNDLE computes what the checkpoint computes."""

    from llama_export.bundle import load_bundle

    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)  # before the imports, which take seconds
    from llama_export.parity import journal
    from llama_export.parity.judge import ValidateConfig
    from llama_export.parity.report import print_summary, report_folder, require_plots, write_report
    from llama_export.parity.validate import validate_bundle

    folder = report_folder(bundle) if report is None else report
    config = ValidateConfig(
        stages=_names(stages), require=_names(require), steps=steps, seed=seed, text=text, cases=folder / "operations",
        checkpoint=checkpoint, journal=folder / journal.FOLDER, resume=resume,
    )  # fmt: skip
    require_plots()  # minutes of work must not end without the report
    try:
        with _progress("stages") as progress:
            found = validate_bundle(opened, config, log=_log, progress=progress)
    except (KeyboardInterrupt, _Terminated):
        with contextlib.suppress(LlamaExportError):  # no stage had begun
            journal.publish(folder / journal.FOLDER)
            _log(f"validate: what was found so far is in {folder / journal.FOLDER}; --resume goes on")
        raise
    files = write_report(found, folder)
    journal.remove(folder / journal.FOLDER)
    if as_json:
        _print(found.to_json(), True, "")
    else:
        print_summary(found, _console())
        click.echo(f"report: {files['html']}")
    if found.verdict != "pass":
        raise _ParityFailed


class _ParityFailed(Exception):
    """A result, not an error: exit code 1."""


@cli.command()
@click.argument("case", type=_PATH)
@_json_flag
def reproduce(case: Path, as_json: bool) -> None:
    """Run one operation again that `validate` found at fault, from the inputs it saved in CASE.

    Exit code 1 while it is still wrong.
    """
    from llama_export.parity.case import reproduce_case
    from llama_export.parity.result import json_numbers

    saved, found, wrong = reproduce_case(case)
    data = {
        "op": saved.op, "node": saved.node, "layer": saved.layer, "tensor": saved.tensor, "stage": saved.stage, "call": saved.call,
        "runtime": saved.runtime, "dtype": saved.dtype, "custom_ops": saved.custom_ops, "wrong": wrong,
        "relative_l2": found.relative_l2, "limit_relative_l2": saved.limit_relative_l2,
        "relative_max": found.relative, "limit_relative_max": saved.limit_relative_max, "nonfinite": found.nonfinite,
        "worst": dataclasses.asdict(found.worst),
    }  # fmt: skip
    data = json_numbers(data)
    _print(data, as_json, "\n".join(_lines(data)))
    if wrong:
        raise _ParityFailed


@cli.group(context_settings=_CONTEXT)
def report() -> None:
    """Work with the reports that `validate` writes."""


@report.command()
@click.argument("old", type=_PATH)
@click.argument("new", type=_PATH)
@click.option(
    "--factor", type=click.FloatRange(1), default=2.0, metavar="TIMES",
    help="Drift is an error that uses more than so many times its former share of the limit.",
)  # fmt: skip
@click.option("--markdown", type=_PATH, metavar="FILE", help="Write the result as a comment for a pull request, too.")
@_json_flag
def diff(old: Path, new: Path, factor: float, markdown: Path | None, as_json: bool) -> None:
    """Compare two reports of one model, parity.json or its folder: exit code 5 if NEW says less, or worse, than OLD."""

    from llama_export.bundle import write_atomically
    from llama_export.parity.diff import diff_reports
    from llama_export.parity.reading import report_from_json
    from llama_export.parity.report import markdown_from_diff, print_diff

    found = diff_reports(report_from_json(old), report_from_json(new), factor=factor)
    if markdown is not None:
        write_atomically(markdown, markdown_from_diff(found).encode())
    if as_json:
        _print(found.to_json(), True, "")
    else:
        print_diff(found, _console())
    if found.drifted:
        raise _Drifted


class _Drifted(Exception):
    """A result, not an error: exit code 5."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, metavar="TOKENS", help="Length of the prefill.")
@click.option(
    "--new-tokens", type=click.IntRange(2), default=64, metavar="TOKENS", help="Decode steps per run, plus one."
)
@click.option("--runs", type=click.IntRange(1), default=5, help="Counted runs, after one warm-up.")
@_session_options
@_ignore_hashes
@_json_flag
def bench(
    bundle: Path, prompt_tokens: int, new_tokens: int, runs: int, session: dict[str, Any], ignore_hashes: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Time prefill and decode of BUNDLE; on a CPU beside the bandwidth of the memory."""

    from llama_export.bundle import load_bundle
    from llama_export.llm import open_session
    from llama_export.runtime.bench import bench_bundle, print_bench

    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    needed = _needed(prompt_tokens, new_tokens, opened.config.max_length)
    with _progress("runs") as progress:
        result = bench_bundle(
            opened,
            lambda: open_session(opened, request_tokens=needed, **session),
            prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs, threads=session["threads"],
            quantize=session["quantize"], progress=progress,
        )  # fmt: skip
    if as_json:
        _print({**dataclasses.asdict(result), "bandwidth_share": result.bandwidth_share}, True, "")
    else:
        print_bench(result, _console())


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--record", is_flag=True, help="Add the hashes that BUNDLE/manifest.json lacks, unless a file changed.")
@_json_flag
def verify(bundle: Path, record: bool, as_json: bool) -> None:
    """Read every byte of BUNDLE and compare it with the recorded hashes. Exit code 2 if a file changed."""
    from llama_export.verify import verify_bundle

    with _progress("bytes") as progress:
        result = verify_bundle(bundle, record=record, log=_log, progress=progress)
    lines = [
        f"{file.status:<8} {file.bytes:>15,}  {file.file}  ({', '.join(file.checked)})"
        + (f": {file.problem}" if file.problem else ", recorded" if file.file in result.recorded else "")
        for file in result.files
    ]
    _print(dataclasses.asdict(result), as_json, "\n".join(lines))
    if result.status == "unknown":
        _log("verify: unknown: no hash of these files is recorded; if they are right, run again with --record")
    if result.status == "changed":
        _log("verify: a file is not what was exported: restore it from its source, or export again")
        raise click.exceptions.Exit(2)


@cli.command()
@click.argument("path", type=_PATH)
@_json_flag
def inspect(path: Path, as_json: bool) -> None:
    """Show what a bundle, an engine, a folder of engines, a weight file or a report is made of."""
    if path.suffix == ".engine" or (path.is_dir() and any(path.glob("*.engine"))):
        from llama_export.inspection import describe_engine, print_engine

        _show(describe_engine(path), print_engine, as_json)
    elif path.suffix == ".safetensors":
        from llama_export.views import describe_weights, print_weights

        _show(describe_weights(path), print_weights, as_json)
    elif path.name == "parity.json" or (path / "parity.json").is_file():
        from llama_export.parity.reading import report_from_json
        from llama_export.parity.report import print_summary

        found = report_from_json(path)
        _show(found.to_json(), lambda _, console: print_summary(found, console), as_json)
    else:
        from llama_export.views import describe_bundle, print_bundle

        _show(describe_bundle(path.parent if path.suffix == ".onnx" else path), print_bundle, as_json)


def _show(data: Mapping[str, Any], view: Callable[[Any, Console], None], as_json: bool) -> None:
    """A document, or its view for a terminal."""
    if as_json:
        _print(data, True, "")
    else:
        view(data, _console())


def _lines(data: Any, prefix: str = "") -> Iterator[str]:
    """Nested data as ``a.b[0].c: value`` lines: grep finds the whole path."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _lines(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        for index, item in enumerate(data):
            yield from _lines(item, f"{prefix}[{index}]")
    else:
        yield f"{prefix}: {json.dumps(data, ensure_ascii=False)}"


@cli.command()
@click.option("--backend", type=click.Choice(BACKENDS), default="tensorrt-rtx", help="Which TensorRT is asked.")
@_json_flag
def plugins(backend: Any, as_json: bool) -> None:
    """List the installed plugin library: creators with their fields, chips, kernels."""
    from llama_export.engine import installed_plugins

    data = installed_plugins(backend)
    chips = ", ".join(data["chips"])
    portable = f"; PTX from {data['portable_from']} on" if data["portable_from"] else ""
    lines = [
        f"library  {data['library']}",
        f"         version {data['version']}, ABI {data['abi']}, {data['bytes']:,} bytes, sha256 {data['sha256'][:16]}...",
        f"chips    compute capability {chips}{portable}",
        f"kernels  {data['variants']} compiled: "
        + ", ".join(f"{count} {name}" for name, count in data["kernels"].items()),
    ]
    if data["creators"] is None:
        lines.append(f"plugins  not listed: {backend} is not installed")
    for creator in data["creators"] or ():
        fields = ", ".join(f"{name} {kind}" for name, kind in creator["fields"].items())
        lines.append(
            f'plugin   {creator["name"]} version {creator["version"]}, namespace "{creator["namespace"]}": {fields}'
        )
    _print(data, as_json, "\n".join(lines))


@cli.command()
@_json_flag
def env(as_json: bool) -> None:
    """Print versions of everything that decides the numbers, for bug reports."""
    from llama_export.environment import environment

    data = environment()
    _print(data, as_json, "\n".join(f"{key}: {value}" for key, value in data.items()))


# ---- output and exit codes --------------------------------------------------------------------------------------


_live: Console | None = None
"""The console of a progress bar that is being shown: lines are printed above it."""


def _log(line: str, label: str = "") -> None:
    """A line on stderr, above a progress bar if one is shown. Work goes on if nobody can read it.

    Args:
        label: stands before the line and may hold colours, which a terminal alone is given.
    """
    with contextlib.suppress(OSError):
        line = printable(line)
        if _live is not None:
            _live.print(click.unstyle(label) + line, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(label + line, err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print(data: Any, as_json: bool, text: str) -> None:
    click.echo(_json(data) if as_json else printable(text))


def _json(data: Any) -> str:
    """A document for stdout, in ASCII where stdout cannot hold more."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_unicode = codecs.lookup(encoding).name.startswith("utf")
    return printable_json(data) if is_unicode else json.dumps(data, indent=2)


def _console(*, stderr: bool = False) -> Console:
    """A rich console that treats a closed pipe as every other writer does; rich's own ends the process with 1."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipeConsole(stderr=stderr)


@contextlib.contextmanager
def _progress(unit: Literal["bytes", "steps", "stages", "runs"]) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr while it is a terminal; nothing otherwise.

    One bar per name, for work that has several at a time; stages and runs follow each other and share one bar.
    """
    global _live
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeElapsedColumn())
    console = _console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            key = unit if unit in ("stages", "runs") else name
            if key not in tasks:
                tasks[key] = bars.add_task(name, total=total)
            bars.update(tasks[key], description=name, completed=done, total=total)

        _live = console
        try:
            yield update
        finally:
            _live = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see :data:`EXIT_CODES`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(ValueError):  # not in the main thread
        # A terminated export must still remove its temporary folder: turn the signal into an exception.
        signal.signal(signal.SIGTERM, _terminate)
    _open_standard_streams()
    with watched():
        return _main(arguments)


def _open_standard_streams() -> None:
    """Text that a stream cannot hold is escaped; a stream that the caller closed takes everything and keeps nothing."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file that is opened would become stdout
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _main(arguments: list[str]) -> int:
    """:func:`main` once signals and streams are taken care of."""
    try:
        # Not cli.main(): it turns a closed pipe into exit code 1, which here means that parity failed.
        with cli.make_context("llama-export", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except _ParityFailed:
        return 1
    except _Drifted:
        return 5
    except click.ClickException as err:
        with contextlib.suppress(OSError):
            err.show()
        _print_error(arguments, err.format_message(), exit_code=2)
        return 2
    except (click.Abort, KeyboardInterrupt):
        _log("interrupted")
        return 128 + signal.SIGINT
    except _Terminated:
        _log("interrupted")
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`): what any program says that SIGPIPE ended, and never "passed".
        sys.stdout = None
        return 128 + signal.SIGPIPE
    except LlamaExportError as err:
        return _report_error(err, arguments)
    except OSError as err:
        if err.errno not in _USER_ERRNOS and err.errno not in _MACHINE_ERRNOS:
            return _report_bug(err, arguments)
        if err.filename is None:
            sys.stdout = None  # what cannot be written to is stdout itself
        return _report_error(_error_from_os(err), arguments)
    except Exception as err:  # noqa: BLE001 - the last resort that gives bugs their own exit code
        return _report_bug(err, arguments)


def entry_point() -> NoReturn:
    """The console script: :func:`main`, then the end of the process without Python's own.

    That would take a second or two, after an export, to take torch's modules apart object by object.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # its reader is gone: nothing is left to say
                stream.flush()
    atexit._run_exitfuncs()  # temporary folders, loggers
    os._exit(code)


_USER_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
_MACHINE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _error_from_os(err: OSError) -> LlamaExportError:
    """What the system refuses wherever a path of the user's is touched. Any other OSError is a bug."""
    where = "stdout" if err.filename is None else err.filename
    kind = ToolchainError if err.errno in _MACHINE_ERRNOS else ConfigError
    hint = "free some space or check the disk" if err.errno in _MACHINE_ERRNOS else "check the path and its permissions"
    return kind(f"cannot access `{where}`: {err.strerror}", hint=hint)


def _report_error(err: LlamaExportError, arguments: Sequence[str]) -> int:
    # https://no-color.org: any non-empty value
    label = "error:" if os.environ.get("NO_COLOR") else click.style("error:", fg="red", bold=True)
    _log(str(err), label + " ")
    _print_error(arguments, err.message, details=err.details, hint=err.hint, exit_code=err.exit_code)
    return err.exit_code


def _report_bug(err: Exception, arguments: Sequence[str]) -> int:
    hint = "this is a bug in llama-export: please report it with the output of `llama-export env`"
    _log(f"{''.join(traceback.format_exception(err))}\n{hint}")
    _print_error(arguments, f"{type(err).__name__}: {err}", hint=hint, exit_code=4)
    return 4


def _print_error(
    arguments: Sequence[str],
    message: str,
    *,
    exit_code: int,
    details: Mapping[str, str] | None = None,
    hint: str | None = None,
) -> None:
    """With ``--json`` an error is a document on stdout too."""
    if "--json" in arguments and sys.stdout is not None:
        error = {"message": message, "details": details or {}, "hint": hint, "exit_code": exit_code}
        click.echo(_json({"error": error}))


class _Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, it passes every ``except Exception``."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated
