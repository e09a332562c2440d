"""Every head with every RoPE type through onnxruntime, against the reference in float32: the table of docs/onnx.md.

    python scripts/onnx_table.py [--write]        # --write puts the table into docs/onnx.md

Each cell is the largest error over all outputs, as a share of the largest value, of one exported graph run at lengths on
both sides of the RoPE type's switch (where it has one): a text without padding, and a batch of texts of different length
padded on the right and on the left. The causal LM has a KV cache instead: a ragged prefill, a chunk, decode steps past the
switch. Weights are random, sizes awkward (6 query heads, 3 key/value heads, hidden size 42, a vocabulary of 101).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.config.llama import TASKS
from llama_export.export.export import export_checkpoint
from llama_export.model import LlamaForCausalLM, load_reference
from llama_export.parity.sessions import reference_session
from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession, OnnxRuntimeSession

LIMIT = 2e-5
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "onnx.md"
SWITCH = 24
"""Tokens: where dynamic and longrope change their frequencies, and what the scaled types were "trained" for."""
LONGEST = 96
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": SWITCH},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SWITCH},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": SWITCH,
        "short_factor": [1 + 0.05 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)],
    },
}  # fmt: skip
CLASSES = {
    "causal-lm": "LlamaForCausalLM",
    "sequence-classification": "LlamaForSequenceClassification",
    "token-classification": "LlamaForTokenClassification",
    "question-answering": "LlamaForQuestionAnswering",
    "feature-extraction": "LlamaModel",
}
COLUMNS = ("no padding", "right", "left")
Pair = tuple[np.ndarray, np.ndarray]


def write_checkpoint(folder: Path, task: str, rope_type: str) -> None:
    """Random weights: matrices of 1 / sqrt(fan-in), norms around 1, biases around 0."""
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=42, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, attention_bias=True, num_labels=3, pad_token_id=0,
        max_position_embeddings=SWITCH if rope_type == "dynamic" else LONGEST,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **ROPE[rope_type]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[task])._from_config(config, attn_implementation="eager")
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.standard_normal(tuple(parameter.shape))
            scaled = 1 + 0.2 * noise if name.endswith("norm.weight") else noise / max(1, parameter.shape[-1]) ** 0.5
            parameter.copy_(torch.from_numpy(scaled))
    model.save_pretrained(folder)


def measure(task: str, rope_type: str, folder: Path) -> dict[str, float]:
    """Column -> error, for one graph exported once."""
    write_checkpoint(folder, task, rope_type)
    export_checkpoint(folder)
    bundle = load_bundle(folder)
    model = load_reference(load_checkpoint(folder))
    compare: Callable[[Bundle, Any, str], Iterator[Pair]]
    compare = _causal_pairs if isinstance(model, LlamaForCausalLM) else _head_pairs
    found = {}
    for column in COLUMNS:
        pairs = list(compare(bundle, model, column))
        if pairs:
            largest = max(float(np.abs(want).max()) for _, want in pairs)
            found[column] = max(float(np.abs(got - want).max()) for got, want in pairs) / largest
    return found


def _texts(column: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask: one text, or three of different length; ids are never the padding token's."""
    rng = np.random.default_rng(width)
    lengths = (width,) if column == "no padding" else (width, max(1, width // 2), 1)
    ids, mask = np.zeros((2, len(lengths), width), np.int64)
    for row, length in enumerate(lengths):
        at = slice(0, length) if column != "left" else slice(width - length, width)
        ids[row, at], mask[row, at] = rng.integers(1, 101, length), 1
    return ids, mask


def _head_pairs(bundle: Bundle, model: Any, column: str) -> Iterator[Pair]:
    """(onnxruntime, reference) for every output, positions of padding left out."""
    session = OnnxRuntimeHeadSession(bundle)
    for width in (SWITCH // 2, SWITCH, SWITCH + 1, 2 * SWITCH + 5):
        ids, mask = _texts(column, width)
        with torch.no_grad():
            want = model(torch.from_numpy(ids), torch.from_numpy(mask))
        wanted = [want] if isinstance(want, torch.Tensor) else list(want)
        for got, tensor in zip(session.run(ids, mask).values(), wanted, strict=True):
            per_token = tensor.ndim >= 2 and tensor.shape[:2] == ids.shape
            keep = mask != 0 if per_token else slice(None)
            yield got[keep], tensor.numpy()[keep]


def _causal_pairs(bundle: Bundle, model: Any, column: str) -> Iterator[Pair]:
    """Logits of a prefill, a chunk and decode steps that cross the switch; a cache is padded on the right only."""
    if column == "left":
        return
    lengths = (SWITCH - 4,) if column == "no padding" else (SWITCH - 4, 7, 1)
    sessions = (
        OnnxRuntimeSession(bundle, max_seq_len=64, batch_size=len(lengths)),
        reference_session(model, max_seq_len=64, batch_size=len(lengths)),
    )
    rng = np.random.default_rng(3)
    for width, valid in (
        (SWITCH - 4, lengths),
        (8, tuple(min(8, 3 + 2 * row) for row in range(len(lengths)))),
        *[(1, None)] * 12,
    ):
        ids = rng.integers(1, 101, (len(lengths), width))
        index = np.arange(width)[None].repeat(len(lengths), 0)
        got, want = (session.step(ids, sequence_length=valid, logits_index=index) for session in sessions)
        keep = index < np.asarray(valid if valid is not None else [1] * len(lengths))[:, None]
        yield got[keep], want[keep]


def table() -> str:
    """Markdown."""
    rows = ["| head | RoPE | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for task in TASKS:
        for rope_type in ROPE:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(task, rope_type, Path(folder))
            cells = [f"{found[column]:.1e}" if column in found else "not defined" for column in COLUMNS]
            rows.append(f"| {task} | {rope_type} | " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    return "\n".join(rows)


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/onnx.md")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    made = table()
    if args.write:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition("<!-- table: begin -->")
        _, _, after = rest.partition("<!-- table: end -->")
        DOCUMENT.write_text(f"{before}<!-- table: begin -->\n{made}\n<!-- table: end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
