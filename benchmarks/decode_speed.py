"""Measures decode speed and export cost of llama_export beside its peers: same checkpoint, tokens and threads, float32.

    python benchmarks/decode_speed.py
    python benchmarks/decode_speed.py --runs 9 --prompt 512 --json results.json
    python benchmarks/decode_speed.py --only llama_export,llama.cpp --no-export

A random Llama checkpoint of 125 million parameters is written once into ``--work`` and made ready for every engine.
Then the engines take turns (A B C, A B C, ...), so that a slow minute of the machine hits all alike. Each turn is a
fresh process that loads the model, warms up, and is timed over one prefill of the same prompt and greedy decoding of the
same number of tokens. No engine stops at an end-of-sequence token.

That all engines compute the same model is checked, not assumed: the first tokens each of them generates are compared
with those of llama_export. Random weights give near ties, so a late divergence is rounding; it is printed, not hidden.

The second table is the export: wall time and peak resident memory of one whole process, imports included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from exporters import (
    GENAI_BUILDER_NEEDS,
    export_command,
    genai_builder_command,
    missing_in,
    not_installed,
    optimum_command,
    reason,
    version,
    version_in,
    write_tokenizer,
)
from processes import log, machine, measure_process
from random_llama import write_random_checkpoint

SCHEMA_VERSION = 1
MODEL: dict[str, object] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 2048, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BASELINE = "llama_export"
EXPORT_TARGET = {"seconds": 10.0, "peak_rss_gb": 0.9}
"""What one export of this model in place may cost."""
PREFIX_TOKENS = 16
"""Generated tokens on which the engines should agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every engine is asked to do."""

    prompt: tuple[int, ...]
    new_tokens: int
    threads: int
    capacity: int
    """Tokens the key/value cache can hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prefill and its decode."""

    tokens: list[int]
    """New tokens only; the first comes out of the prefill."""
    prefill_seconds: float
    """From the prompt to the first token."""
    decode_seconds: float
    """All later tokens."""
    cpu_seconds: float = 0.0
    """Of all threads of the process, prefill and decode; with one thread other programs hardly change it."""

    @property
    def tokens_per_second(self) -> float:
        return (len(self.tokens) - 1) / self.decode_seconds


class Engine(ABC):
    """One way to run the model. ``prepare`` writes files, in the parent; ``load`` and ``generate`` run in a worker."""

    name: str
    distributions: tuple[str, ...]
    """What must be installed; the first is the engine itself."""
    note = ""
    """How the engine was set up, for the reader of the table."""

    def missing(self) -> list[str]:
        """Distributions that are not installed."""
        return [name for name in self.distributions if version(name) is None]

    @abstractmethod
    def prepare(self, checkpoint: Path, work: Path) -> None:
        """Writes what ``load`` needs; does nothing when it is there."""

    @abstractmethod
    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        """Opens the model."""

    @abstractmethod
    def generate(self, workload: Workload) -> Run:
        """One greedy generation from an empty cache."""


class LlamaExportEngine(Engine):
    """The bundle in the checkpoint's own folder, through the project's session."""

    name = BASELINE
    distributions = ("llama-export", "onnxruntime", "torch", "onnx", "onnxscript")
    note = "onnxruntime, `runtime.generate`; static cache, in place"

    def prepare(self, checkpoint: Path, work: Path) -> None:
        if not (checkpoint / "manifest.json").exists():
            subprocess.run(export_command(checkpoint), check=True, capture_output=True)

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        from llama_export.bundle import load_bundle
        from llama_export.runtime.session import OnnxRuntimeSession

        self.session = OnnxRuntimeSession(
            load_bundle(checkpoint), max_seq_len=workload.capacity, threads=workload.threads
        )

    def generate(self, workload: Workload) -> Run:
        from llama_export.runtime.generation import generate

        made = generate(self.session, [list(workload.prompt)], max_new_tokens=workload.new_tokens)
        return Run(tokens=made.tokens[0], prefill_seconds=made.prefill_seconds, decode_seconds=made.decode_seconds)


class GenAIEngine(Engine):
    """onnxruntime-genai on the model of its own builder."""

    name = "onnxruntime-genai"
    distributions = GENAI_BUILDER_NEEDS
    note = "`og.Generator`; cache shared between past and present"

    def prepare(self, checkpoint: Path, work: Path) -> None:
        folder = work / "onnxruntime-genai"
        if not (folder / "genai_config.json").exists():
            subprocess.run(genai_builder_command(checkpoint, folder, work / "cache"), check=True, capture_output=True)

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(work / "onnxruntime-genai"))
        decoder = {"session_options": {"intra_op_num_threads": workload.threads}}
        # Without an end-of-sequence token the generation never stops early.
        config.overlay(json.dumps({"model": {"eos_token_id": [], "decoder": decoder}}))
        self.model = og.Model(config)

    def generate(self, workload: Workload) -> Run:
        import onnxruntime_genai as og

        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=workload.capacity, do_sample=False, past_present_share_buffer=True)
        generator = og.Generator(self.model, params)
        tokens: list[int] = []
        clock = _Clock()
        generator.append_tokens(np.array([workload.prompt], np.int32))
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        clock.prefill_done()
        for _ in range(workload.new_tokens - 1):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return clock.run(tokens)


class LlamaCppEngine(Engine):
    """llama.cpp on a float32 GGUF file, through llama-cpp-python."""

    name = "llama.cpp"
    distributions = ("llama-cpp-python", "gguf", "safetensors")
    note = "`Llama.eval`, greedy sampler; float32 cache"

    def prepare(self, checkpoint: Path, work: Path) -> None:
        path = work / "llama.gguf"
        if not path.exists():
            write_gguf(checkpoint, path)

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(
            str(work / "llama.gguf"),
            n_ctx=workload.capacity,
            n_batch=512,
            n_threads=workload.threads,
            n_threads_batch=workload.threads,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        self.sampler = llama_cpp.llama_sampler_init_greedy()

    def generate(self, workload: Workload) -> Run:
        import llama_cpp

        def next_token() -> int:
            return int(llama_cpp.llama_sampler_sample(self.sampler, self.llama.ctx, -1))

        self.llama.reset()
        clock = _Clock()
        self.llama.eval(workload.prompt)
        tokens = [next_token()]
        clock.prefill_done()
        for _ in range(workload.new_tokens - 1):
            self.llama.eval(tokens[-1:])
            tokens.append(next_token())
        return clock.run(tokens)


class TransformersEngine(Engine):
    """The reference implementation, eager, as most people run it first."""

    name = "transformers"
    distributions = ("transformers", "torch")
    note = "eager PyTorch, sdpa attention; dynamic cache"

    def prepare(self, checkpoint: Path, work: Path) -> None:
        """Reads the checkpoint as it is."""

    def load(self, checkpoint: Path, work: Path, workload: Workload) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(workload.threads)
        self.model = LlamaForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def generate(self, workload: Workload) -> Run:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)

        def step(ids: Sequence[int]) -> int:
            result = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(result.logits[0, -1].argmax())

        with torch.inference_mode():
            clock = _Clock()
            tokens = [step(workload.prompt)]
            clock.prefill_done()
            for _ in range(workload.new_tokens - 1):
                tokens.append(step(tokens[-1:]))
            return clock.run(tokens)


class _Clock:
    """Times the two phases of one generation."""

    def __init__(self) -> None:
        self.start = self.first = time.perf_counter()

    def prefill_done(self) -> None:
        self.first = time.perf_counter()

    def run(self, tokens: list[int]) -> Run:
        return Run(
            tokens=tokens, prefill_seconds=self.first - self.start, decode_seconds=time.perf_counter() - self.first
        )


ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (LlamaExportEngine, GenAIEngine, LlamaCppEngine, TransformersEngine)
}


# --- The inputs of the engines ---------------------------------------------------------------------------------------


def interleave_rope_pairs(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorders the rows of a query or key projection from Hugging Face's RoPE layout to llama.cpp's.

    A checkpoint rotates rows i and i + D/2 of each head together, llama.cpp rows 2i and 2i + 1.

    Args:
        weight: [heads * D, E].
        heads: query heads for the query, key/value heads for the key.
    """
    E = weight.shape[1]
    return weight.reshape(heads, 2, -1, E).swapaxes(1, 2).reshape(-1, E)


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Writes the checkpoint as a float32 GGUF file without a vocabulary: llama.cpp is driven by token ids."""
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name("random Llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(checkpoint / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():
            value = tensors.get_tensor(name)
            if name.endswith("q_proj.weight"):
                value = interleave_rope_pairs(value, heads)
            elif name.endswith("k_proj.weight"):
                value = interleave_rope_pairs(value, kv_heads)
            writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def prepare_checkpoint(work: Path) -> Path:
    """Writes the random checkpoint and its tokenizer unless they are there; returns the folder."""
    folder = work / "llama-125m"
    done = folder / "tokenizer_config.json"
    if not done.exists():
        write_random_checkpoint(folder, MODEL)
        write_tokenizer(folder, int(str(MODEL["vocab_size"])))
    return folder


# --- Decode speed ----------------------------------------------------------------------------------------------------


def _serve(name: str, checkpoint: Path, work: Path, workload: Workload, connection: Connection) -> None:
    """In a process of its own: loads one engine, warms it up, and sends the Run it then makes, or why there is none."""
    try:
        engine = ENGINES[name]()
        engine.load(checkpoint, work, workload)
        engine.generate(workload)
        before = time.process_time()
        run = engine.generate(workload)
        connection.send(replace(run, cpu_seconds=time.process_time() - before))
    except Exception as err:  # noqa: BLE001 - a peer may raise anything; the parent reports it
        connection.send(f"{type(err).__name__}: {err}")


def run_engine(name: str, checkpoint: Path, work: Path, workload: Workload) -> Run:
    """One run in a fresh process.

    Fresh, because where the weights happen to lie in memory makes one process up to a fifth faster than the next, for
    as long as it lives; and a process of its own, because thread pools and libraries of the engines must not meet.

    Raises:
        RuntimeError: the engine failed; with its reason.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(name, checkpoint, work, workload, theirs))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = None
    process.join()
    if not isinstance(result, Run):
        raise RuntimeError(result or f"the process ended with exit code {process.exitcode}")
    return result


def measure_decode(
    names: Sequence[str], checkpoint: Path, work: Path, workload: Workload, runs: int
) -> dict[str, dict[str, Any]]:
    """Name -> ``{"runs": [Run]}`` or ``{"failed": reason}``; the engines take turns."""
    results: dict[str, dict[str, Any]] = {name: {"runs": []} for name in names}
    for name in names:
        log(f"prepare {name}")
        try:
            ENGINES[name]().prepare(checkpoint, work)
        except Exception as err:  # noqa: BLE001 - one peer that fails must not hide the others
            results[name] = {"failed": f"{type(err).__name__}: {err}"}
    for index in range(runs):
        log(f"run {index + 1} of {runs}")
        for name, result in results.items():
            if "failed" in result:
                continue
            try:
                result["runs"].append(run_engine(name, checkpoint, work, workload))
            except RuntimeError as err:
                results[name] = {"failed": str(err)}
    return results


def agreement(tokens: Sequence[int], baseline: Sequence[int]) -> int:
    """Number of leading tokens on which two generations agree."""
    return next((i for i, (a, b) in enumerate(zip(tokens, baseline, strict=True)) if a != b), len(baseline))


# --- Export cost -----------------------------------------------------------------------------------------------------


def measure_exports(checkpoint: Path, work: Path, runs: int, optimum_python: str) -> dict[str, Any]:
    """Name -> medians of seconds and peak memory, or why there are none; runs are interleaved.

    Args:
        checkpoint: exported in place by llama_export.
        work: where the other exporters write.
        runs: of each exporter.
        optimum_python: interpreter of the environment that holds optimum-onnx.
    """
    genai = genai_builder_command(checkpoint, work / "export-genai", work / "cache")
    optimum = optimum_command(optimum_python, checkpoint, work / "export-optimum")
    tools: dict[str, tuple[list[str], list[str]]] = {
        BASELINE: (LlamaExportEngine().missing(), export_command(checkpoint)),
        "onnxruntime-genai builder": (GenAIEngine().missing(), genai),
        "optimum-onnx": (missing_in(optimum_python, ["optimum-onnx"]), optimum),
    }
    results: dict[str, Any] = {}
    for index in range(runs):
        for name, (absent, command) in tools.items():
            if absent:
                results[name] = not_installed(absent)
                continue
            if "failed" in results.get(name, {}):
                continue
            log(f"export {index + 1} of {runs}: {name}")
            try:
                results.setdefault(name, {"runs": []})["runs"].append(measure_process(command))
            except RuntimeError as err:
                results[name] = {"failed": str(err)}
    for result in results.values():
        if "runs" in result:
            for key in ("seconds", "cpu_seconds", "peak_rss_gb"):
                result[key] = statistics.median(run[key] for run in result["runs"])
    if "seconds" in results[BASELINE]:
        met = all(results[BASELINE][key] <= limit for key, limit in EXPORT_TARGET.items())
        results[BASELINE]["target"] = {**EXPORT_TARGET, "met": met}
    return results


# --- Report ----------------------------------------------------------------------------------------------------------


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON form of the decode results: every run, medians, ratios to the baseline, agreement of the tokens."""
    own = results[BASELINE]["runs"] if "runs" in results.get(BASELINE, {}) else None
    summary: dict[str, Any] = {}
    for name, result in results.items():
        if "runs" not in result:
            summary[name] = result
            continue
        runs: list[Run] = result["runs"]
        speeds = [run.tokens_per_second for run in runs]
        prefills = [run.prefill_seconds for run in runs]
        entry: dict[str, Any] = {
            "note": ENGINES[name].note,
            "prefill_seconds": _spread(prefills, 4),
            "decode_tokens_per_second": _spread(speeds, 2),
            "cpu_seconds": _spread([run.cpu_seconds for run in runs], 3),
            "runs": [asdict(run) for run in runs],
        }
        if own is not None:
            # Ratio of each round first, then the median: what slows a whole round cancels out.
            entry["decode_ratio"] = round(
                statistics.median(a / b.tokens_per_second for a, b in zip(speeds, own, strict=True)), 3
            )
            entry["prefill_ratio"] = round(
                statistics.median(b.prefill_seconds / a for a, b in zip(prefills, own, strict=True)), 3
            )
            entry["same_leading_tokens"] = agreement(runs[0].tokens, own[0].tokens)
            entry["same_prefix"] = entry["same_leading_tokens"] >= min(PREFIX_TOKENS, len(own[0].tokens))
        summary[name] = entry
    return summary


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, digits) for key, value in spread.items()}


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    host, load = report["machine"], report["workload"]
    yield (
        f"{report['created_at']}, {host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, "
        f"load average at start {host['load_average_1min']}"
    )
    yield (
        f"{report['num_parameters'] / 1e6:.0f}M parameters, float32, {load['threads']} threads, "
        f"prompt {load['prompt_tokens']}, new tokens {load['new_tokens']}, cache capacity {load['capacity']}, "
        f"{load['runs']} interleaved runs: median (min-max)"
    )
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield ""
    yield (
        "| | prefill s | decode tok/s | decode, ours = 1 | prefill speed, ours = 1 "
        "| CPU s of one run | same leading tokens | |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, result in report["decode"].items():
        if "runs" not in result:
            yield f"| {name} | {reason(result)} | | | | | | |"
            continue
        prefill, decode, cpu = (result[key] for key in ("prefill_seconds", "decode_tokens_per_second", "cpu_seconds"))
        ratios = f"{result['decode_ratio']:.2f} | {result['prefill_ratio']:.2f}" if "decode_ratio" in result else " | "
        same = f"{result['same_leading_tokens']} of {load['new_tokens']}" if "same_leading_tokens" in result else ""
        yield (
            f"| {name} | {prefill['median']:.3f} ({prefill['min']:.3f}-{prefill['max']:.3f}) "
            f"| {decode['median']:.1f} ({decode['min']:.1f}-{decode['max']:.1f}) "
            f"| {ratios} | {cpu['median']:.2f} ({cpu['min']:.2f}-{cpu['max']:.2f}) | {same} | {result['note']} |"
        )
    if report["export"]:
        yield ""
        yield "| export, whole process | s | CPU s | peak GB | |"
        yield "|---|---|---|---|---|"
        for name, result in report["export"].items():
            if "seconds" not in result:
                yield f"| {name} | {reason(result)} | | | |"
                continue
            target = result.get("target")
            verdict = ""
            if target:
                verdict = "met" if target["met"] else "MISSED"
                verdict += f": target {target['seconds']:.0f} s, {target['peak_rss_gb']} GB"
            seconds, cpu = result["seconds"], result["cpu_seconds"]
            yield f"| {name} | {seconds:.1f} | {cpu:.1f} | {result['peak_rss_gb']:.2f} | {verdict} |"


def main() -> int:
    """Command line; see the module. Exit code 1 when an engine failed or computes other tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/benchmark"), help="folder for the models, kept (2.5 GB)"
    )
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs of each engine")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument(
        "--capacity", type=int, help="tokens of the cache; default: what the run needs, rounded up to 256"
    )
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(ENGINES)}")
    parser.add_argument("--no-export", action="store_true", help="skip the export table")
    parser.add_argument("--export-runs", type=int, default=3, help="interleaved runs of each exporter")
    parser.add_argument(
        "--optimum-python", default=sys.executable, help="interpreter with optimum-onnx (needs an older transformers)"
    )
    parser.add_argument("--json", type=Path, help="also write the report with every run to this file")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ENGINES)
    unknown = sorted(set(names) - set(ENGINES))
    capacity = args.capacity or -(-(args.prompt + args.new_tokens) // 256) * 256
    if unknown or min(args.runs, args.prompt, args.threads, args.export_runs) < 1 or args.new_tokens < 2:
        parser.error(
            f"unknown engines: {', '.join(unknown)}" if unknown else "all counts must be >= 1, --new-tokens >= 2"
        )
    if not args.prompt + args.new_tokens <= capacity <= int(str(MODEL["max_position_embeddings"])):
        parser.error(
            f"capacity {capacity} must hold prompt and new tokens, and be at most {MODEL['max_position_embeddings']}"
        )

    host = machine()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = prepare_checkpoint(args.work)
    prompt = np.random.default_rng(1).integers(3, int(str(MODEL["vocab_size"])), args.prompt)
    workload = Workload(
        prompt=tuple(prompt.tolist()), new_tokens=args.new_tokens, threads=args.threads, capacity=capacity
    )
    absent = {name: ENGINES[name]().missing() for name in names}
    results: dict[str, Any] = {name: not_installed(missing) for name, missing in absent.items() if missing}
    results |= measure_decode([name for name in names if not absent[name]], checkpoint, args.work, workload, args.runs)
    from llama_export.checkpoint import load_checkpoint

    packages = dict.fromkeys(item for engine in ENGINES.values() for item in engine.distributions)
    versions = {name: version(name) for name in packages}
    versions["optimum-onnx"] = version_in(args.optimum_python, "optimum-onnx")
    decode = summarize({name: results[name] for name in names})
    export = {} if args.no_export else measure_exports(checkpoint, args.work, args.export_runs, args.optimum_python)
    report = {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": host,
        "versions": {name: version for name, version in versions.items() if version},
        "model": MODEL,
        "num_parameters": load_checkpoint(checkpoint).config.num_parameters,
        "workload": {
            "prompt_tokens": args.prompt, "new_tokens": args.new_tokens, "threads": args.threads, "capacity": capacity,
            "runs": args.runs, "dtype": "float32", "batch_size": 1,
        },
        "decode": decode,
        "export": export,
    }  # fmt: skip
    for line in report_lines(report):
        print(line)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    measured = [*decode.values(), *export.values()]
    return int(any("failed" in item or item.get("same_prefix") is False for item in measured))


if __name__ == "__main__":
    raise SystemExit(main())
