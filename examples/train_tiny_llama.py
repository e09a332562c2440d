#!/usr/bin/env python3
"""Train a tiny but real Llama on the source of Python's standard library.

    python examples/train_tiny_llama.py

That one command, without a download, reads the standard library of the Python
that runs it, trains a byte-level BPE tokenizer of 1,536 entries, trains a
Llama of 1.9 million parameters from scratch on the CPU, measures it on files
it never saw, and writes a Hugging Face folder, ``examples/tiny-llama/``:

    config.json  generation_config.json  model.safetensors
    tokenizer.json  tokenizer_config.json
    training.json  loss_curve.svg  README.md

The checkpoint in this repository took 15.3 minutes on two cores that other work shared;
a second run gave the same file, byte for byte. The number of steps is
fixed, not the time, so a slower machine takes longer and learns the same.

The model exists to be exported. A random checkpoint would also exercise the
exporter, but a trained one has peaked, meaningful output distributions, and
these make "the exported model writes the same text" a claim worth testing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

# --------------------------------------------------------------------------
# What is fixed
# --------------------------------------------------------------------------

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1

CONTEXT = 512  # positions in one training sequence, the leading <s> included
BATCH = 2  # sequences in one step: for so small a model many noisy steps beat few quiet ones
STEPS = 4600  # optimiser steps: about 1.6 passes over the training files
PEAK_LR = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
LOG_EVERY = 20  # steps; each point of the curve is the mean over so many
EVAL_EVERY = 200  # steps between held-out points of the curve
EVAL_WINDOWS = 48  # sequences behind such a point; the final figure uses all

ARCHITECTURE = dict(
    vocab_size=1536,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    # Four heads of 64 make 256, not the 192 of hidden_size. That is on
    # purpose: code that computes head_dim as hidden_size / heads gets this
    # model wrong, visibly.
    head_dim=64,
    intermediate_size=448,
    max_position_embeddings=CONTEXT,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=BOS_ID,
    eos_token_id=EOS_ID,
    initializer_range=0.06,
)

# Folders that hold other people's packages, tests, or tables instead of code.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
# Long literal tables: they teach a model nothing but their own repetition.
SKIPPED_FILES = {"html/entities.py", "locale.py", "re/_casefix.py", "stringprep.py"}
# Files that the build of one Python wrote: they differ between machines and
# hold its paths.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

HELD_OUT_PER_MILLE = 50  # 5 % of the files

# A word or a run of punctuation keeps the one space that follows it. (GPT-2
# does the reverse, and a prompt that ends in a space, such as "def ", then
# ends in a token that the model hardly ever saw there.) Line ends stay with
# the punctuation before them, so "):\n" can be one token; an indentation is
# a token of its own.
SPLIT_PATTERN = r"\w+ ?|[^\w\s]+(?: |\n+)?|\n+| +|\s"

PROMPTS = [
    "def ",
    "import os\n",
    "class ",
    '"""Return ',
    "    def __init__(self, ",
    "for line in ",
    "if __name__ == ",
    "try:\n    ",
]
SAMPLE_TOKENS = 96  # tokens generated for each prompt


class Failure(Exception):
    """A reason to stop, in one sentence for the person at the terminal."""


def say(message: str) -> None:
    """Print one progress line on stderr."""
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------
# Corpus
# --------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Source files by relative path, in path order."""

    train: dict[str, str]
    held_out: dict[str, str]

    def describe(self) -> dict[str, object]:
        """Counts, sizes in bytes and hashes that identify both parts."""

        def part(files: dict[str, str]) -> dict[str, object]:
            data = "".join(files.values()).encode()
            return {
                "files": len(files),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }

        return {
            "source": f"standard library of CPython {platform.python_version()}, *.py, "
            "without tests, tables and files written by the build",
            "hash_of": "the UTF-8 text of the files, in path order, with nothing between them",
            "train": part(self.train),
            "held_out": part(self.held_out),
            "held_out_files": list(self.held_out),
        }


def is_wanted(path: PurePosixPath) -> bool:
    """Whether a file, by its path below the standard library, is training text."""
    if path.suffix != ".py" or str(path) in SKIPPED_FILES:
        return False
    return not any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in path.parts)


def is_held_out(path: str) -> bool:
    """Whether a file is kept from training; its path alone decides."""
    # A hash and not a random draw: one more file in the library then moves no
    # other file from one side to the other.
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def read_corpus(root: Path) -> Corpus:
    """Read the wanted files below `root` and part them."""
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    paths = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    for path in paths:
        if not is_wanted(PurePosixPath(path)):
            continue
        try:
            # From bytes, so that no line end is translated on the way.
            text = (root / path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"The library file {path} cannot be read: {error}.") from error
        if text:
            (held_out if is_held_out(path) else train)[path] = text
    if not train or not held_out:
        raise Failure("This Python has no standard library in source form, so there is nothing to train on.")
    return Corpus(train, held_out)


# --------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE that loses nothing: no normaliser, all 256 bytes known."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=[BOS, EOS],  # in this order: they get the ids 0 and 1
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, BOS_ID)],
    )
    if (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) != (BOS_ID, EOS_ID):
        raise Failure("The tokenizer gave <s> and </s> other ids than 0 and 1.")
    if tokenizer.get_vocab_size() != ARCHITECTURE["vocab_size"]:
        raise Failure(
            f"The text yields {tokenizer.get_vocab_size()} tokens, "
            f"not the {ARCHITECTURE['vocab_size']} that the model expects."
        )
    return tokenizer


def encode_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Encode documents one after another, each as <s> text </s>, into ids."""
    # A library file may spell "<s>" in a string; there it is text, not a mark.
    tokenizer.encode_special_tokens = True
    try:
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = False
    ids: list[int] = []
    for text, encoding in zip(texts, encoded, strict=True):
        if tokenizer.decode(encoding.ids, skip_special_tokens=False) != text:
            raise Failure(f"The tokenizer does not give back this text: {text[:60]!r}.")
        ids += [BOS_ID, *encoding.ids, EOS_ID]
    return np.asarray(ids, dtype=np.int64)


# --------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------


def pack(stream: np.ndarray, offset: int) -> torch.Tensor:
    """Cut a stream, from `offset` on, into sequences of CONTEXT ids led by <s>.

    Each sequence starts with <s>, also where the cut falls inside a file. The
    model thus always sees <s> at position 0, in training as in use, and
    learns to go on from any point of a file, as a prompt asks it to.
    """
    body = CONTEXT - 1
    count = (len(stream) - offset) // body
    windows = stream[offset : offset + count * body].reshape(count, body)
    return torch.from_numpy(np.insert(windows, 0, BOS_ID, axis=1))


def batches(stream: np.ndarray, generator: np.random.Generator) -> Iterator[torch.Tensor]:
    """Yield shuffled batches (BATCH x CONTEXT ids) for ever."""
    while True:
        # Another offset in each pass puts the cuts elsewhere.
        windows = pack(stream, offset=int(generator.integers(CONTEXT - 1)))
        order = generator.permutation(len(windows))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield windows[torch.from_numpy(order[start : start + BATCH])]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of each next token, in nats, over a batch of sequences."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Mean cross-entropy in nats per token over full sequences."""
    model.eval()
    total = sum(loss_of(model, part).item() * len(part) for part in windows.split(8))
    model.train()
    return total / len(windows)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to PEAK_LR, then half a cosine down to zero."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass
class Curve:
    """Loss in nats per token as [step, loss] points."""

    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


def new_model() -> LlamaForCausalLM:
    """A Llama with random weights, wider than the usual 0.02, which suits large models.

    The embedding is twice as wide again, because every layer reads it through a norm; the two projections that write
    to the residual stream are narrower by the square root of their number, so that the stream does not grow with depth.
    Chosen by short runs: after 500 steps the held-out loss was 4.21 nats per token, against 4.25 with 0.06 throughout.
    """
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    with torch.no_grad():
        model.model.embed_tokens.weight *= 2
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight /= math.sqrt(2 * len(model.model.layers))
    return model


def train_model(model: LlamaForCausalLM, stream: np.ndarray, held_out: np.ndarray, steps: int, seed: int) -> Curve:
    """Train the model in place and return its loss curve."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": gains, "weight_decay": 0.0},  # RMSNorm gains belong near 1, not 0
        ],
        lr=PEAK_LR,
        # Small batches give noisy squared gradients: average them for longer
        # than the 0.95 usual for large language models.
        betas=(0.9, 0.98),
    )
    source = batches(stream, np.random.default_rng(seed))
    # Held-out sequences for the curve, spread evenly over the held-out files.
    probe = pack(held_out, offset=0)
    probe = probe[np.linspace(0, len(probe) - 1, min(EVAL_WINDOWS, len(probe))).astype(int)]

    curve = Curve(train=[], held_out=[(0, mean_loss(model, probe))])
    recent: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, next(source))
        if not torch.isfinite(loss):
            raise Failure(f"The loss is no number any more at step {step}; nothing was written.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())

        done = step + 1
        if done % LOG_EVERY == 0 or done == steps:
            curve.train.append((done, sum(recent) / len(recent)))
            recent.clear()
        if done % EVAL_EVERY == 0 or done == steps:
            curve.held_out.append((done, mean_loss(model, probe)))
            seconds = time.monotonic() - started
            say(
                f"  step {done:5d} of {steps}: train {curve.train[-1][1]:.3f}, "
                f"held out {curve.held_out[-1][1]:.3f} nats per token, "
                f"{done * BATCH * CONTEXT / seconds:,.0f} tokens/s, "
                f"about {seconds / done * (steps - done) / 60:.1f} minutes left"
            )
    return curve


# --------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: np.ndarray, text_bytes: int) -> dict[str, float]:
    """Score each held-out token once, the short last sequence included.

    Sequences do not overlap, so the first tokens of each are predicted from
    little context: the figure is a slight overestimate. The cost of the <s>
    and </s> between files is counted too, against the bytes of the text alone.
    """
    model.eval()
    windows = pack(stream, offset=0)
    rest = torch.from_numpy(np.insert(stream[windows.numel() - len(windows) :], 0, BOS_ID))[None]
    nats = sum(loss_of(model, part, "sum").item() for part in [*windows.split(8), rest])
    return {
        "tokens": len(stream),
        "bytes": text_bytes,
        "nats_per_token": nats / len(stream),
        "perplexity_per_token": math.exp(nats / len(stream)),
        "bits_per_byte": nats / math.log(2) / text_bytes,
    }


@torch.no_grad()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str) -> dict[str, object]:
    """Continue a prompt greedily and tell how much of the continuation is new.

    `distinct_4_grams` is the share of different runs of four tokens among all
    in the first 64 generated: 1 means no repetition, a tight loop nears 0.
    """
    model.eval()
    prompt_ids = tokenizer.encode(prompt).ids
    output = model.generate(
        input_ids=torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=EOS_ID,
    )[0, len(prompt_ids) :].tolist()
    grams = [tuple(output[i : i + 4]) for i in range(min(len(output), 64) - 3)]
    return {
        "prompt": prompt,
        "continuation": tokenizer.decode(output, skip_special_tokens=True),
        "new_tokens": len(output),
        "distinct_4_grams": round(len(set(grams)) / len(grams), 3) if grams else 1.0,
    }


# --------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------


def loss_svg(curve: Curve) -> str:
    """Draw the loss curve as a small SVG (a few kilobytes, no fonts inside)."""
    width, height, left, top, right, bottom = 640, 360, 56, 36, 16, 44
    last = curve.train[-1][0]
    losses = [loss for _, loss in curve.train + curve.held_out]
    low, high = math.floor(min(losses)), math.ceil(max(losses))

    def x(step: float) -> float:
        return round(left + (width - left - right) * step / last, 1)

    def y(loss: float) -> float:
        return round(top + (height - top - bottom) * (high - loss) / (high - low), 1)

    def line(points: list[tuple[int, float]], colour: str) -> str:
        spots = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        return f'<polyline points="{spots}" fill="none" stroke="{colour}" stroke-width="1.8"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12" fill="#333">',
        "<title>Loss of tiny-llama during training</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for loss in range(low, high + 1):
        parts.append(f'<path d="M{left} {y(loss)}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(loss) + 4}" text-anchor="end">{loss}</text>')
    for quarter in range(5):
        step = last * quarter // 4
        parts.append(f'<text x="{x(step)}" y="{height - bottom + 18}" text-anchor="middle">{step}</text>')
    parts += [
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">step</text>',
        f'<text x="{left}" y="20">loss, nats per token</text>',
        f'<text x="{width - 190}" y="20" fill="#1f77b4">training</text>',
        f'<text x="{width - 120}" y="20" fill="#d62728">held-out files</text>',
        line(curve.train, "#1f77b4"),
        line(curve.held_out, "#d62728"),
    ]
    parts += [f'<circle cx="{x(step)}" cy="{y(loss)}" r="2.5" fill="#d62728"/>' for step, loss in curve.held_out]
    return "\n".join([*parts, "</svg>", ""])


def model_card(record: dict, parameters: int) -> str:
    """Write the README.md of the model folder from the training record."""
    train, held_out = record["corpus"]["train"], record["corpus"]["held_out"]
    score = record["held_out"]
    # Show the first prompts as they came out; the record holds all of them.
    samples = "\n\n".join(
        f"```python\n{sample['prompt']}{sample['continuation'].rstrip()}\n```"
        for sample in record["greedy_samples"][:3]
    )
    shape = ARCHITECTURE
    options = "".join(
        f" --{name} {record[name]}" for name, usual in (("steps", STEPS), ("seed", 0)) if record[name] != usual
    )
    return f"""---
language: code
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---

# tiny-llama

A Llama of {parameters:,} parameters, trained from scratch on the source code of
Python's standard library. It is small enough to live in a repository and real
enough to test an exporter with: its text has the look of Python, and it was
measured on files that it never saw.

| | |
|---|---|
| held-out perplexity per token | **{score["perplexity_per_token"]:.2f}** |
| held-out bits per byte | **{score["bits_per_byte"]:.3f}** |
| for comparison, `xz -9` on the same held-out text | {record["xz_bits_per_byte"]:.3f} bits per byte |

## Use

```python
from transformers import AutoTokenizer, LlamaForCausalLM

tokenizer = AutoTokenizer.from_pretrained("examples/tiny-llama")
model = LlamaForCausalLM.from_pretrained("examples/tiny-llama")
prompt = tokenizer("import os\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=96)[0]))
```

## What it writes

Greedy continuations, uncut and unchosen, of `def `, `import os` with a line end, and
`class ` ({SAMPLE_TOKENS} new tokens each). Some names in them are invented.

{samples}

`training.json` holds these and {len(record["greedy_samples"]) - 3} more.

## Architecture

| | |
|---|---|
| hidden size | {shape["hidden_size"]} |
| layers | {shape["num_hidden_layers"]} |
| query heads, key/value heads | {shape["num_attention_heads"]}, {shape["num_key_value_heads"]} |
| head dimension | {shape["head_dim"]} (on purpose not hidden size / heads) |
| feed-forward size | {shape["intermediate_size"]}, SiLU gate |
| vocabulary | {shape["vocab_size"]:,}, byte-level BPE, `<s>` = 0, `</s>` = 1 |
| positions | {shape["max_position_embeddings"]}, RoPE with theta 10000 |
| embeddings | tied: the file has no `lm_head.weight` |
| numbers | float32 |

The tokenizer has no normaliser, so decoding gives back the exact text. A word keeps
the space that *follows* it, so that a prompt may end in one, like `def `.

## Training

Text: {train["files"]} files ({train["bytes"]:,} bytes) of the standard library of CPython
{record["versions"]["python"]}, without tests and tables. Held out, chosen by a hash of the path:
{held_out["files"]} files ({held_out["bytes"]:,} bytes). {record["steps"]:,} steps of AdamW on {record["batch_sequences"]} sequences of
{CONTEXT} tokens, {record["tokens_seen"]:,} tokens in all, {record["passes"]:.2f} passes over the training text,
in {record["wall_seconds"]["total"] / 60:.1f} minutes on {record["threads"]} CPU threads.

![loss over the steps](loss_curve.svg)

To reproduce it:

```sh
python examples/train_tiny_llama.py{options}
```

Another version of Python has another standard library, and another version of PyTorch,
another CPU or another number of threads rounds differently; the weights then
differ too. `training.json` names the versions and the SHA-256 of the text.

## Limits

It completes Python that looks right; it does not know what the code means. It invents
names, repeats itself in long greedy outputs, and past {CONTEXT} positions it was never
trained. It can reproduce passages of its training text. Do not use it to write code.

## Licence

The weights and the tokenizer are derived from the source of Python's standard library,
Copyright © Python Software Foundation, under the
[PSF License Version 2](https://docs.python.org/3/license.html).
"""


def rounded(points: list[tuple[int, float]]) -> list[list[float]]:
    """Loss points with four decimals, ready for JSON."""
    return [[step, round(loss, 4)] for step, loss in points]


def to_json(record: dict) -> str:
    """Indented JSON that keeps each [step, loss] point on one line."""
    record = dict(record)
    curves = {name: record.pop(name) for name in ("train_loss", "held_out_loss")}
    head = json.dumps(record, indent=2, ensure_ascii=False).removesuffix("\n}")
    for name, points in curves.items():
        head += f',\n  "{name}": [\n    ' + ",\n    ".join(map(json.dumps, points)) + "\n  ]"
    return head + "\n}\n"


def write_folder(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, record: dict, curve: Curve) -> None:
    """Write all files of the checkpoint into an empty folder."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        # The one name that both transformers 4 and 5 take to mean "use
        # tokenizer.json as it stands".
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        # The "clean up" would drop spaces before punctuation: text would be lost.
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "training.json").write_text(to_json(record), encoding="utf-8")
    (folder / "loss_curve.svg").write_text(loss_svg(curve), encoding="utf-8")
    card = model_card(record, sum(p.numel() for p in model.parameters()))
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_output(output: Path) -> None:
    """Refuse early, before minutes of work, an output that must not be replaced."""
    if output.exists() and not (output / "training.json").is_file():
        raise Failure(f"{output} exists and is no folder of this script; it was left as it is.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"The folder {output.parent} cannot be made: {error}.") from error


# --------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------


def build(output: Path, steps: int, seed: int, threads: int) -> None:
    """Make the whole checkpoint folder, or raise and leave `output` untouched."""
    check_output(output)
    started = time.monotonic()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()

    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    description = corpus.describe()
    say(
        f"Read {len(corpus.train)} training files ({description['train']['bytes']:,} bytes) "
        f"and {len(corpus.held_out)} held-out files ({description['held_out']['bytes']:,} bytes)."
    )

    # The tokenizer, too, learns from the training files alone.
    train_texts, held_out_texts = list(corpus.train.values()), list(corpus.held_out.values())
    tokenizer = train_tokenizer(train_texts)
    stream = encode_stream(tokenizer, train_texts)
    held_out = encode_stream(tokenizer, held_out_texts)
    say(
        f"Trained the tokenizer: {len(stream):,} training tokens, {len(held_out):,} held out, "
        f"{description['train']['bytes'] / len(stream):.2f} bytes per token."
    )
    if len(stream) < CONTEXT * (BATCH + 1) or len(held_out) < CONTEXT:
        raise Failure("The standard library of this Python is too small to train on.")

    model = new_model()
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    say(f"Training {sum(p.numel() for p in model.parameters()):,} parameters on {threads} threads.")
    before_training = time.monotonic()
    curve = train_model(model, stream, held_out, steps, seed)
    training_seconds = time.monotonic() - before_training

    score = evaluate(model, held_out, description["held_out"]["bytes"])
    say(
        f"Held-out files: perplexity {score['perplexity_per_token']:.2f} per token, "
        f"{score['bits_per_byte']:.3f} bits per byte."
    )
    samples = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    packed = lzma.compress("".join(held_out_texts).encode(), preset=9)
    tokens_seen = steps * BATCH * (CONTEXT - 1)
    record = {
        "seed": seed,
        "steps": steps,
        "threads": threads,
        "batch_sequences": BATCH,
        "sequence_tokens": CONTEXT,
        "tokens_seen": tokens_seen,
        "passes": round(tokens_seen / len(stream), 3),
        "optimizer": {
            "name": "AdamW",
            "peak_learning_rate": PEAK_LR,
            "schedule": f"{WARMUP_STEPS} steps of warm-up, then cosine to zero",
            "weight_decay_on_matrices": WEIGHT_DECAY,
            "betas": [0.9, 0.98],
            "clip_norm": CLIP_NORM,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "corpus": {
            **description,
            "train_tokens": len(stream),
            "held_out_tokens": len(held_out),
        },
        "held_out": {key: round(value, 5) for key, value in score.items()},
        "xz_bits_per_byte": round(len(packed) * 8 / score["bytes"], 5),
        "wall_seconds": {
            "training": round(training_seconds, 1),
            "total": round(time.monotonic() - started, 1),
        },
        "greedy_samples": samples,
        "train_loss": rounded(curve.train),
        "held_out_loss": rounded(curve.held_out),
    }

    # Beside the output, so that the rename stays on one file system.
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        write_folder(partial, model, tokenizer, record, curve)
        if output.exists():
            # A folder cannot be renamed over a full one: move the old one
            # aside first, and delete it only once the new one is in place.
            old = output.with_name(f".{output.name}.old-{os.getpid()}")
            output.rename(old)
            partial.rename(output)
            shutil.rmtree(old)
        else:
            partial.rename(output)
    except OSError as error:
        raise Failure(f"The checkpoint could not be written to {output}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    say(f"Wrote {output} ({size / 1e6:.2f} MB) in {(time.monotonic() - started) / 60:.1f} minutes.")


def positive(text: str) -> int:
    """Argument type: a whole number above zero."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def main() -> int:
    """Read the arguments, run, and turn a failure into one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "tiny-llama",
        help="folder to write (default: tiny-llama beside this script)",
    )
    parser.add_argument("--steps", type=positive, default=STEPS, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads for PyTorch (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error("--seed must not be negative")
    try:
        build(arguments.output, arguments.steps, arguments.seed, arguments.threads)
    except Failure as failure:
        say(f"error: {failure}")
        return 1
    except KeyboardInterrupt:
        say("Stopped; nothing was written.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
