"""Measures what quantising costs in quality: perplexity of the bundled checkpoint on text it was never trained on.

    python benchmarks/perplexity.py
    python benchmarks/perplexity.py --write        # also puts the tables into docs/quantization.md
    python benchmarks/perplexity.py --windows 60   # quicker
    build/peers/bin/python benchmarks/perplexity.py --peers --windows 60 --write   # beside the engines of decode_speed.py

The text is the held-out part of the standard library of the Python that runs this (``examples/train_tiny_llama.py`` chooses it
by a hash of each file's path, and trained on the rest), in windows of 512 tokens. Every row is compared with the float32
weights on the same tokens: KL divergence of the next token's distribution in nats, and how often its first choice is the same.

The first table is onnxruntime with a bundle's variants as they are shipped, and with other block sizes. The second is the
choice of a rounding for 4 bits: weights alone are rounded, in PyTorch, everything else is float32.

With ``--peers`` there is one table instead: every engine of ``decode_speed.py``, made ready as it is there, reads the same
token ids, each in a process of its own. Float32 is the same model everywhere, which is checked: the exit code is 1 if the
log-probability of any token of the text differs by more than 0.001 nats from ours, or if an engine failed. What ``--write``
writes then is put into the documents by ``scripts/update_readme.py``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from engines import BASELINE, ENGINES, LlamaCppEngine, Workload, engine_versions, make_engine
from exporters import not_installed, reason
from processes import in_fresh_process, log, machine
from quantization import DOCUMENT, RESULTS, write_section
from train_tiny_llama import encode_stream, pack, read_corpus

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.decoder import count_parameters
from llama_export.export.export import export_checkpoint
from llama_export.export.quantize import quantize_bundle
from llama_export.export.rounding import SCHEMES
from llama_export.model import LlamaForCausalLM, load_reference
from llama_export.parity.calls import call
from llama_export.parity.sessions import reference_session
from llama_export.parity.stages.quantized import rounded_weight
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-llama"
PEER_RESULTS = Path(__file__).parent / "results" / "perplexity"
SAME_MODEL = 1e-3
"""Nats by which two float32 engines may differ on a token of the text; their rounding comes to a tenth, int8 to 0.2."""
Array = NDArray[np.float32]
Logits = Callable[[NDArray[np.int64]], Array]
"""Tokens [n] -> logits [n, V] of a model without a past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One row."""

    perplexity: float
    kl: float
    """Mean, nats."""
    top1: float
    """Share of tokens with the first choice of the float32 weights."""
    largest: float
    """Largest difference in the log-probability of a token of the text, nats."""
    weight_bytes: int = 0
    """Of the matrices."""


def held_out(windows: int) -> NDArray[np.int64]:
    """[W, 512] tokens, evenly over the held-out text."""
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    stream = encode_stream(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), list(corpus.held_out.values()))
    found = pack(stream, 0).numpy()
    kept = np.unique(np.linspace(0, len(found) - 1, min(windows, len(found))).astype(int))
    return np.asarray(found[kept], np.int64)


def log_probabilities(logits: Array) -> Tensor:
    """[n, V]"""
    return torch.tensor(logits, dtype=torch.float64).log_softmax(-1)


def measure(
    found: Iterable[Array], base: Iterable[Array], windows: NDArray[np.int64], weight_bytes: int = 0
) -> Quality:
    """From the logits [n, V] of two models on every window."""
    loss = kl = same = count = largest = 0.0
    for window, *both in zip(windows, found, base, strict=True):
        got, want = (log_probabilities(logits)[:-1] for logits in both)
        following = torch.from_numpy(window[1:, None])
        loss -= float(got.gather(-1, following).sum())
        largest = float(np.maximum(largest, (got - want).gather(-1, following).abs().max()))  # NaN stays NaN
        kl += float((want.exp() * (want - got)).sum())
        same += float((want.argmax(-1) == got.argmax(-1)).sum())
        count += len(following)
    return Quality(
        perplexity=math.exp(loss / count), kl=kl / count, top1=same / count, largest=largest, weight_bytes=weight_bytes
    )


def by_onnxruntime(bundle: Bundle, kind: str | None) -> Logits:
    """The bundle's own session."""
    session = OnnxRuntimeSession(bundle, max_seq_len=bundle.config.max_length, variant=kind)

    def logits(window: NDArray[np.int64]) -> Array:
        session.reset()
        return session.step(window[None], logits_index=call("window", window[None]).logits_index)[0]

    return logits


def by_pytorch(bundle: Bundle, rounding: Callable[[Tensor], Tensor] | None, *, head: bool = True) -> Logits:
    """The reference in float32 with every matrix rounded; without ``head``, all but the output projection."""
    model = cast(LlamaForCausalLM, load_reference(bundle.folder, torch.float32))
    if rounding is not None:
        linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        if not head:
            del linear["lm_head"]
        for module in linear.values():  # the embedding, which the head may be tied to, keeps its own tensor
            module.weight = torch.nn.Parameter(rounding(module.weight.data), requires_grad=False)

    def logits(window: NDArray[np.int64]) -> Array:
        session = reference_session(model, max_seq_len=len(window))
        found: Array = session.step(window[None], logits_index=call("window", window[None]).logits_index)[0]
        return found

    return logits


# ---- roundings for 4 bits ---------------------------------------------------------------------------------------


def in_blocks(weight: Tensor, size: int, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a rounding of blocks [.., B] to a matrix [N, K]."""
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -columns % size))
    return rounding(padded.reshape(len(weight), -1, size)).flatten(1)[:, :columns]


def largest_to_7(w: Tensor) -> Tensor:
    """Symmetric: the largest magnitude is 7 steps."""
    step = w.abs().amax(-1, keepdim=True) / 7
    return (w / step).round().clamp(-8, 7) * step


def largest_to_minus_8(w: Tensor) -> Tensor:
    """llama.cpp's Q4_0 (with a float32 scale): the value of largest magnitude is -8 steps, whatever its sign."""
    step = _extreme(w) / -8
    return (w / step).round().clamp(-8, 7) * step


def symmetric_search(w: Tensor) -> Tensor:
    """Of 17 scales around Q4_0's the one whose block points most in the right direction, then least squares."""
    return _best(w, [((w * (c / _extreme(w))).round().clamp(-8, 7)) for c in np.arange(-9, -6.99, 0.125)])


def smallest_to_largest(w: Tensor) -> Tensor:
    """Asymmetric: 15 steps from the smallest value to the largest, 0 being one of the 16."""
    high, low = w.amax(-1, keepdim=True).clamp(min=0), w.amin(-1, keepdim=True).clamp(max=0)
    step = (high - low) / 15
    zero = (-low / step).round()
    return ((w / step).round() + zero).clamp(0, 15).sub(zero) * step


def _extreme(w: Tensor) -> Tensor:
    high, low = w.amax(-1, keepdim=True), w.amin(-1, keepdim=True)
    return torch.where(high > -low, high, low)


def _best(w: Tensor, candidates: list[Tensor]) -> Tensor:
    best = torch.full_like(w[..., :1], -1)
    found = torch.zeros_like(w)
    for q in candidates:
        along, length = (w * q).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
        score = along * along / length
        found = torch.where(score > best, q * along / length, found)
        best = torch.maximum(best, score)
    return found


def ours(size: int) -> Callable[[Tensor], Tensor]:
    """What :mod:`llama_export.export.quantize` does."""

    def rounding(weight: Tensor) -> Tensor:
        q, scale = rounded_weight(weight, 4, size)
        return (q * scale).flatten(1)[:, : weight.shape[1]]

    return rounding


Q4_0, OURS = "largest magnitude to -8 (llama.cpp's Q4_0)", "asymmetric, best of 8 spans"
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest magnitude to 7": largest_to_7,
    Q4_0: largest_to_minus_8,
    "symmetric, best of 17 scales": symmetric_search,
    "asymmetric, smallest to largest": smallest_to_largest,
}


# ---- beside the peers --------------------------------------------------------------------------------------------


def write_logits(name: str, checkpoint: Path, work: Path, workload: Workload, windows: NDArray[np.int64]) -> Path:
    """The file with an engine's logits [W, n, V]; runs in a process of its own."""
    engine = make_engine(name)
    engine.load(checkpoint, work, workload)
    path = work / f"{name}.npy"
    np.save(path, [engine.logits(replace(workload, prompt=tuple(window.tolist()))) for window in windows])
    return path


def peer_rows(work: Path, windows: NDArray[np.int64], threads: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every engine of ``decode_speed.py``, ours at float32 first: a :class:`Quality`, or why there is none."""
    checkpoint = Path(shutil.copytree(CHECKPOINT, work / "checkpoint"))
    workload = Workload(prompt=(), new_tokens=0, threads=threads, capacity=windows.shape[1], every_position=True)
    base: Array | None = None
    for name, (_, precision) in ENGINES.items():
        engine = make_engine(name)
        if missing := engine.missing():
            yield name, not_installed(missing)
            continue
        try:
            engine.prepare(checkpoint, work)
            path = in_fresh_process(write_logits, (name, checkpoint, work, workload, windows), Path)
        except Exception as err:  # noqa: BLE001 - one peer that fails must not hide the others
            yield name, {"failed": f"{type(err).__name__}: {err}"}
            if name == BASELINE:
                return
            continue
        found: Array = np.load(path)
        base = found if base is None else base
        path.unlink()
        quality = asdict(measure(found, base, windows))
        row = {"precision": precision, **{key: quality[key] for key in ("perplexity", "kl", "top1", "largest")}}
        if precision == "float32":
            row["same_model"] = row["largest"] <= SAME_MODEL
        if isinstance(engine, LlamaCppEngine):
            row["matrices"] = engine.matrices(work)
        yield name, row


def peer_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| | perplexity | KL, nats | same first choice | largest difference, nats |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "perplexity" in row:
            figures = f"{row['perplexity']:.3f} | {row['kl']:.2g} | {100 * row['top1']:.1f} % | {row['largest']:.2g}"
            note = " **another model**" if row.get("same_model") is False else ""
            lines.append(f"| {name} | {figures}{note} |")
        else:
            lines.append(f"| {name} | {reason(row)} | | | |")
    return lines


def compare_peers(windows: NDArray[np.int64], threads: int, *, write: bool) -> int:
    """Measures, prints, writes; gives the exit code."""
    report: dict[str, Any] = {
        "schema_version": 1,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": engine_versions(),
        "checkpoint": "examples/tiny-llama",
        "windows": len(windows),
        "window_tokens": windows.shape[1],
        "same_model_limit_nats": SAME_MODEL,
        "engines": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, row in peer_rows(Path(folder), windows, threads):
            report["engines"][name] = row
            log(f"{name}: {row['perplexity']:.3f}" if "perplexity" in row else f"{name}: {reason(row)}")
    print("\n".join(peer_table(report["engines"])))
    if write:
        PEER_RESULTS.mkdir(parents=True, exist_ok=True)
        path = PEER_RESULTS / f"{report['created_at'][:10]}-cpu-{report['machine']['cores']}-cores.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in row or row.get("same_model") is False for row in report["engines"].values()))


# ---- the tables -------------------------------------------------------------------------------------------------


def shipped_rows(folder: Path, windows: NDArray[np.int64]) -> Iterator[tuple[str, Quality]]:
    """By onnxruntime: as shipped, then other block sizes."""
    float32 = by_onnxruntime(load_bundle(folder), None)

    def compared(model: Logits, weight_bytes: int) -> Quality:
        return measure(map(model, windows), map(float32, windows), windows, weight_bytes)

    config = load_bundle(folder).config
    matrices = count_parameters(config) + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)
    yield "float32", compared(float32, 4 * matrices)
    for kind in ("int8", "int4"):
        sizes = sorted({32, 64, 128} - {SCHEMES[kind].block_size})
        for size in (SCHEMES[kind].block_size, *sizes):
            scheme = replace(SCHEMES[kind], block_size=size)
            quantize_bundle(load_bundle(folder, replacing=kind), kind, scheme=scheme, force=True)
            bundle = load_bundle(folder)
            name = f"{kind}, blocks of {size}" + (", as shipped" if size == SCHEMES[kind].block_size else "")
            data_bytes = int(bundle.manifest.quantized[kind].data_size)
            yield name, compared(by_onnxruntime(bundle, kind), data_bytes)


def rounding_rows(folder: Path, windows: NDArray[np.int64]) -> Iterator[tuple[str, Quality]]:
    """By PyTorch, weights alone rounded."""
    bundle = load_bundle(folder)
    base = by_pytorch(bundle, None)

    def compared(rounding: Callable[[Tensor], Tensor], *, head: bool = True) -> Quality:
        return measure(map(by_pytorch(bundle, rounding, head=head), windows), map(base, windows), windows)

    for size in (32, 64):
        common = {name: partial(in_blocks, size=size, rounding=rounding) for name, rounding in ROUNDINGS.items()}
        for name, whole in {**common, OURS: ours(size)}.items():
            yield f"blocks of {size}: {name}", compared(whole)
            if (size, name) in ((32, Q4_0), (64, OURS)):
                yield f"blocks of {size}: the same, but the output projection in float32", compared(whole, head=False)


def table(rows: dict[str, Quality], *, sizes: bool) -> list[str]:
    """Markdown."""
    head = "| weights | perplexity | KL, nats | same first choice |" + (" MB |" if sizes else "")
    lines = [head, "|---|---|---|---|" + ("---|" if sizes else "")]
    for name, row in rows.items():
        size = f" {row.weight_bytes / 1e6:.2f} |" if sizes else ""
        lines.append(f"| {name} | {row.perplexity:.3f} | {row.kl:.2g} | {100 * row.top1:.1f} % |{size}")
    return lines


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=200, help="of 512 tokens")
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables into {DOCUMENT.name} and the figures into results/"
    )
    parser.add_argument("--peers", action="store_true", help="the engines of decode_speed.py instead")
    parser.add_argument("--threads", type=int, default=2, help="of each engine, with --peers")
    args = parser.parse_args()
    windows = held_out(args.windows)
    if args.peers:
        return compare_peers(windows, args.threads, write=args.write)
    found: dict[str, dict[str, Quality]] = {"shipped": {}, "roundings": {}}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(CHECKPOINT, Path(folder) / "bundle"))
        export_checkpoint(bundle)
        for what, rows in (("shipped", shipped_rows), ("roundings", rounding_rows)):
            for name, row in rows(bundle, windows):
                found[what][name] = row
                log(f"{name}: {row}")
    lines = {what: table(rows, sizes=what == "shipped") for what, rows in found.items()}
    for text in lines.values():
        print("\n".join(text), end="\n\n")
    if args.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = {
            "windows": len(windows), "tokens": int(windows.size), "python": platform.python_version(),
            **{what: {name: asdict(row) for name, row in rows.items()} for what, rows in found.items()},
        }  # fmt: skip
        (RESULTS / "perplexity.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        for what, text in lines.items():
            write_section(DOCUMENT, what, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
