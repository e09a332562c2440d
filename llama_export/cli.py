"""The command line: parse, call one library function, print. No logic of its own.

stdout is data, stderr is log and progress. Every command takes ``--json``: one JSON document on stdout, also for an
error. Heavy packages are imported by the command that needs them, so ``--help`` needs none of them.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from llama_export import __version__
from llama_export._process import collector_paused
from llama_export.config import BACKENDS, DTYPES, ENGINE_WEIGHTS, TASKS, WEIGHTS_MODES, EngineConfig, ExportConfig
from llama_export.errors import ConfigError, LlamaExportError, ShapeError, ToolchainError

if TYPE_CHECKING:
    from llama_export.bundle import Bundle

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


@click.group(context_settings=_CONTEXT, epilog=EXIT_CODES)
@click.version_option(__version__, "-V", "--version", prog_name="llama-export")
def cli() -> None:
    """Turn a Llama checkpoint into ONNX and TensorRT engines that are proven to compute what the checkpoint computes."""


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
@_ignore_estimate
@_json_flag
def export(
    checkpoint: Path, output: Path | None, task: str, dtype: str, weights: Any, convert_weights: bool, force: bool,
    hash_weights: bool, allow_config_keys: tuple[str, ...], ignore_estimate: bool, as_json: bool,
) -> None:  # fmt: skip
    """Export CHECKPOINT (a Hugging Face folder) to ONNX, weights by reference."""
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
    _print(dataclasses.asdict(result), as_json, result.bundle)


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
@click.option("--prompt", help="Text to continue, to classify, to embed; or the question.")
@click.option("--context", help="Question answering: the text that holds the answer.")
@click.option("--tokens", metavar="1,2,3", help="Token ids instead of --prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=64, metavar="TOKENS", help="How many tokens to add at most."
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="KV-cache capacity.  [default: what the request needs]",
)
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: one per core]")
@_ignore_hashes
@_json_flag
def run(
    bundle: Path, prompt: str | None, context: str | None, tokens: str | None, max_new_tokens: int, max_seq_len: int | None,
    threads: int | None, ignore_hashes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run BUNDLE on onnxruntime (CPU): continue a prompt, greedily, or say what the head makes of it.

    Text goes to stdout as it is generated.
    """
    from llama_export.bundle import load_bundle

    if (prompt is None) == (tokens is None):
        raise click.UsageError("give either --prompt TEXT or --tokens 1,2,3")
    for flag, text in (("--prompt", prompt), ("--context", context)):
        if text is not None and not _is_unicode(text):
            raise ConfigError(
                f"{flag} is not UTF-8 text", details={"got": ascii(text)}, hint="check the terminal's encoding"
            )
    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    if opened.task == "causal-lm":
        if context is not None:
            raise ConfigError(
                "a context means nothing to causal-lm", details={"bundle": bundle}, hint="leave --context out"
            )
        _generate(opened, prompt, tokens, max_new_tokens, max_seq_len, threads, as_json)
    else:
        _predict(opened, prompt, context, tokens, threads, as_json)


def _predict(
    opened: Bundle, prompt: str | None, context: str | None, tokens: str | None, threads: int | None, as_json: bool
) -> None:
    """One text through a head; token ids give the bare outputs."""
    from llama_export.runtime import OnnxRuntimeHeadSession, TextCodec, predict

    session = OnnxRuntimeHeadSession(opened, threads=threads)
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
    opened: Bundle, prompt: str | None, tokens: str | None, max_new_tokens: int, max_seq_len: int | None,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """One prompt continued; text goes out as it comes."""
    from llama_export.runtime import OnnxRuntimeSession, TextCodec, generate

    codec = TextCodec(opened.folder) if prompt is not None or (opened.folder / "tokenizer.json").is_file() else None
    ids = codec.encode(prompt) if prompt is not None and codec is not None else _token_list(tokens or "")
    if max_seq_len is None:
        max_seq_len = _capacity(len(ids), max_new_tokens, opened.config.max_length)
    session = OnnxRuntimeSession(opened, max_seq_len=max_seq_len, threads=threads)
    if session.note:
        _log(f"run: {session.note}")
    stream = codec.stream() if codec is not None else None

    comma = ""

    def show(_: int, token: int) -> None:
        nonlocal comma
        if not as_json:
            _write(stream.push(token) if stream is not None and prompt is not None else f"{comma}{token}")
            comma = ","

    result = generate(
        session, [ids], max_new_tokens=max_new_tokens, stop_tokens=opened.manifest["eos_token_ids"], on_token=show
    )
    speed = result.decode_tokens_per_second
    if as_json:
        text = codec.decode(result.tokens[0]) if codec is not None else None
        data = {
            "tokens": result.tokens, "text": text, "prefill_seconds": round(result.prefill_seconds, 6),
            "decode_tokens_per_second": None if speed is None else round(speed, 2), "backend": session.backend,
        }  # fmt: skip
        _print(data, True, "")
    else:
        _write((stream.finish() if stream is not None and prompt is not None else "") + "\n")
    rate = "" if speed is None else f", decode {speed:.1f} tokens/s"
    _log(
        f"run: {len(result.tokens[0])} tokens, prefill {result.prefill_seconds * 1000:.0f} ms{rate}, {session.backend}"
    )


def _is_unicode(text: str) -> bool:
    """False if it holds bytes of the command line that are not UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _capacity(prompt: int, new_tokens: int, limit: int) -> int:
    """What the request needs, rounded up to 64 tokens where the model allows."""
    needed = prompt + new_tokens - 1
    if needed > limit:
        raise ShapeError(
            f"prompt and new tokens need {needed} positions, the model has {limit}",
            details={"prompt": f"{prompt} tokens", "max_new_tokens": new_tokens, "longest sequence": limit},
            hint="shorten the prompt, or lower --max-new-tokens",
        )
    return max(1, min(-(-needed // 64) * 64, limit))


def _token_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--tokens is not a list of integers: {text!r}",
            details={"got": repr(text), "expected": "1,2,3"},
            hint="separate token ids by commas, or give text: --prompt TEXT",
        ) from None


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
@_ignore_hashes
@_json_flag
def validate(
    bundle: Path, stages: str, require: str, steps: int, seed: int, text: Path | None, report: Path | None,
    checkpoint: Path | None, ignore_hashes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Prove, stage by stage, that BUNDLE computes what the checkpoint computes."""
    from rich.console import Console

    from llama_export.bundle import load_bundle
    from llama_export.parity.judge import ValidateConfig
    from llama_export.parity.report import print_summary, require_plots, write_report
    from llama_export.parity.validate import validate_bundle

    folder = report if report is not None else bundle / "report"
    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    config = ValidateConfig(
        stages=_names(stages), require=_names(require), steps=steps, seed=seed, text=text, cases=folder / "operations",
        checkpoint=checkpoint,
    )  # fmt: skip
    require_plots()  # minutes of work must not end without the report
    found = validate_bundle(opened, config, log=_log)
    files = write_report(found, folder)
    if as_json:
        _print(found.to_json(), True, "")
    else:
        print_summary(found, Console())
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
    from rich.console import Console

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
        print_diff(found, Console())
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
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads.  [default: one per core]")
@_ignore_hashes
@_json_flag
def bench(
    bundle: Path,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    threads: int | None,
    ignore_hashes: bool,
    as_json: bool,
) -> None:
    """Time prefill and decode of BUNDLE on onnxruntime (CPU): medians over several runs."""
    import numpy as np

    from llama_export.bundle import load_bundle
    from llama_export.runtime import OnnxRuntimeSession, generate

    opened = load_bundle(bundle, ignore_hashes=ignore_hashes)
    capacity = _capacity(prompt_tokens, new_tokens, opened.config.max_length)
    session = OnnxRuntimeSession(opened, max_seq_len=capacity, threads=threads)
    prompt = np.random.default_rng(0).integers(0, opened.config.vocab_size, prompt_tokens).tolist()
    results = [generate(session, [prompt], max_new_tokens=new_tokens) for _ in range(runs + 1)][1:]
    prefill = [result.prefill_seconds for result in results]
    decode = [result.decode_tokens_per_second or 0.0 for result in results]
    data = {
        "backend": session.backend, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs,
        "kv_cache_capacity": capacity, "prefill_seconds": _spread(prefill), "decode_tokens_per_second": _spread(decode),
    }  # fmt: skip
    lines = [
        f"prefill of {prompt_tokens} tokens  median {statistics.median(prefill) * 1000:.1f} ms  ({min(prefill) * 1000:.1f} to {max(prefill) * 1000:.1f})",
        f"decode                 median {statistics.median(decode):.1f} tokens/s  ({min(decode):.1f} to {max(decode):.1f})",
        f"{session.backend}, cache of {capacity} tokens, {runs} runs",
    ]
    _print(data, as_json, "\n".join(lines))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 6), "min": round(min(values), 6), "max": round(max(values), 6)}


@cli.command()
@click.argument("path", type=_PATH)
@_json_flag
def inspect(path: Path, as_json: bool) -> None:
    """Show what a bundle, or an engine file, is made of."""
    if path.suffix == ".engine":
        from rich.console import Console

        from llama_export.inspection import describe_engine, print_engine

        data = describe_engine(path)
        if not as_json:
            print_engine(data, Console())
            return
    else:
        from llama_export.bundle import load_bundle

        opened = load_bundle(path)
        data = {**opened.manifest, "engines": [engine.name for engine in opened.engines]}
    _print(data, as_json, "\n".join(_lines(data)))


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


def _log(line: str) -> None:
    click.echo(line, err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print(data: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False) if as_json else text)


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr while it is a terminal; nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield update


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see :data:`EXIT_CODES`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(ValueError):  # not in the main thread
        # A terminated export must still remove its temporary folder: turn the signal into an exception.
        signal.signal(signal.SIGTERM, _terminate)
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
        err.show()
        _print_error(arguments, err.format_message(), exit_code=2)
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
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
    click.echo(f"{label} {err}", err=True)
    _print_error(arguments, err.message, details=err.details, hint=err.hint, exit_code=err.exit_code)
    return err.exit_code


def _report_bug(err: Exception, arguments: Sequence[str]) -> int:
    traceback.print_exception(err)
    hint = "this is a bug in llama-export: please report it with the output of `llama-export env`"
    click.echo(f"\n{hint}", err=True)
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
        click.echo(json.dumps({"error": error}, indent=2, ensure_ascii=False))


def _terminate(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)
