"""Measures what quantising costs in quality: perplexity of the bundled checkpoint on text it was never trained on.

    python benchmarks/perplexity.py
    python benchmarks/perplexity.py --write        # also puts the tables into docs/quantization.md
    python benchmarks/perplexity.py --windows 60   # quicker

The text is the held-out part of the standard library of the Python that runs this (``examples/train_tiny_llama.py`` chooses it
by a hash of each file's path, and trained on the rest), in windows of 512 tokens. Every row is compared with the float32
weights on the same tokens: KL divergence of the next token's distribution in nats, and how often its first choice is the same.

The first table is onnxruntime with a bundle's variants as they are shipped, and with other block sizes. The second is the
choice of a rounding for 4 bits: weights alone are rounded, in PyTorch, everything else is float32.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from processes import log
from quantization import DOCUMENT, RESULTS, write_section
from train_tiny_llama import encode_stream, pack, read_corpus

from llama_export.bundle import Bundle, load_bundle
from llama_export.export import export_checkpoint
from llama_export.model import LlamaForCausalLM, load_reference
from llama_export.parity.calls import call
from llama_export.parity.quantized_stages import rounded_weight
from llama_export.parity.sessions import reference_session
from llama_export.quantization import SCHEMES, quantize_bundle
from llama_export.runtime import OnnxRuntimeSession

CHECKPOINT = Path(__file__).parent.parent / "examples" / "tiny-llama"
Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Tokens [1, n] -> logits [n, V] of a model without a past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One row."""

    perplexity: float
    kl: float
    """Mean, nats."""
    top1: float
    """Share of tokens with the first choice of the float32 weights."""
    weight_bytes: int
    """Of the matrices."""


def held_out(windows: int) -> NDArray[np.int64]:
    """[W, 512] tokens, evenly over the held-out text."""
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    stream = encode_stream(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")), list(corpus.held_out.values()))
    found = pack(stream, 0).numpy()
    kept = np.unique(np.linspace(0, len(found) - 1, min(windows, len(found))).astype(int))
    return np.asarray(found[kept], np.int64)


def log_probabilities(logits: NDArray[np.float32]) -> Tensor:
    """[n, V]"""
    return torch.from_numpy(logits).double().log_softmax(-1)


def measure(logits: Logits, base: Logits, windows: NDArray[np.int64], weight_bytes: int) -> Quality:
    """Reads every window by both models."""
    loss = kl = same = count = 0.0
    for window in windows:
        got, want = (log_probabilities(model(window[None]))[:-1] for model in (logits, base))
        following = torch.from_numpy(window[1:, None])
        loss -= float(got.gather(-1, following).sum())
        kl += float((want.exp() * (want - got)).sum())
        same += float((want.argmax(-1) == got.argmax(-1)).sum())
        count += len(following)
    return Quality(perplexity=math.exp(loss / count), kl=kl / count, top1=same / count, weight_bytes=weight_bytes)


def by_onnxruntime(bundle: Bundle, kind: str | None) -> Logits:
    """The bundle's own session."""
    session = OnnxRuntimeSession(bundle, max_seq_len=bundle.config.max_length, variant=kind)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        session.reset()
        return session.step(ids, logits_index=call("window", ids).logits_index)[0]

    return logits


def by_pytorch(bundle: Bundle, rounding: Callable[[Tensor], Tensor] | None) -> Logits:
    """The reference in float32 with every matrix rounded."""
    model = cast(LlamaForCausalLM, load_reference(bundle.folder, torch.float32))
    if rounding is not None:
        linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        for module in linear:  # the embedding, which the head may be tied to, keeps its own tensor
            module.weight = torch.nn.Parameter(rounding(module.weight.data), requires_grad=False)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        session = reference_session(model, max_seq_len=ids.shape[1])
        found: NDArray[np.float32] = session.step(ids, logits_index=call("window", ids).logits_index)[0]
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
    """What :mod:`llama_export.quantization` does."""

    def rounding(weight: Tensor) -> Tensor:
        q, scale = rounded_weight(weight, 4, size)
        return (q * scale).flatten(1)[:, : weight.shape[1]]

    return rounding


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest magnitude to 7": largest_to_7,
    "largest magnitude to -8 (llama.cpp's Q4_0)": largest_to_minus_8,
    "symmetric, best of 17 scales": symmetric_search,
    "asymmetric, smallest to largest": smallest_to_largest,
}


# ---- the tables -------------------------------------------------------------------------------------------------


def shipped_rows(folder: Path, windows: NDArray[np.int64]) -> Iterator[tuple[str, Quality]]:
    """By onnxruntime: as shipped, then other block sizes."""
    float32 = by_onnxruntime(load_bundle(folder), None)
    config = load_bundle(folder).config
    matrices = config.num_parameters + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)
    yield "float32", measure(float32, float32, windows, 4 * matrices)
    for kind in ("int8", "int4"):
        sizes = sorted({32, 64, 128} - {SCHEMES[kind].block_size})
        for size in (SCHEMES[kind].block_size, *sizes):
            scheme = replace(SCHEMES[kind], block_size=size)
            quantize_bundle(load_bundle(folder, replacing=kind), kind, scheme=scheme, force=True)
            bundle = load_bundle(folder)
            name = f"{kind}, blocks of {size}" + (", as shipped" if size == SCHEMES[kind].block_size else "")
            data_bytes = int(bundle.manifest["quantized"][kind]["data_size"])
            yield name, measure(by_onnxruntime(bundle, kind), float32, windows, data_bytes)


def rounding_rows(folder: Path, windows: NDArray[np.int64]) -> Iterator[tuple[str, Quality]]:
    """By PyTorch, weights alone rounded."""
    bundle = load_bundle(folder)
    base = by_pytorch(bundle, None)
    for size in (32, 64):
        for name, rounding in ROUNDINGS.items():

            def whole(weight: Tensor, size: int = size, rounding: Callable[[Tensor], Tensor] = rounding) -> Tensor:
                return in_blocks(weight, size, rounding)

            yield f"blocks of {size}: {name}", measure(by_pytorch(bundle, whole), base, windows, 0)
        yield (
            f"blocks of {size}: asymmetric, best of 8 spans",
            measure(by_pytorch(bundle, ours(size)), base, windows, 0),
        )


def table(rows: dict[str, Quality], *, sizes: bool) -> list[str]:
    """Markdown."""
    head = "| weights | perplexity | KL, nats | same first choice |" + (" MB |" if sizes else "")
    lines = [head, "|---|---|---|---|" + ("---|" if sizes else "")]
    for name, row in rows.items():
        size = f" {row.weight_bytes / 1e6:.2f} |" if sizes else ""
        lines.append(f"| {name} | {row.perplexity:.3f} | {row.kl:.2g} | {100 * row.top1:.1f} % |{size}")
    return lines


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=200, help="of 512 tokens")
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables into {DOCUMENT.name} and the figures into results/"
    )
    args = parser.parse_args()
    windows = held_out(args.windows)
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


if __name__ == "__main__":
    main()
