"""Fine-tuning for extractive question answering, and what text of other languages costs in tokens."""

from __future__ import annotations

import json
import re
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from llama_export.model import LlamaForQuestionAnswering, load_reference
from studies.tiny_llama import CHECKPOINT, markdown, trainer

STEPS = 400
BATCH = 16
LONGEST = 160
QUESTION = "def "
"""The question: which function does the text define? The answer is its name."""


def examples(files: dict[str, str], tokenizer: Tokenizer, limit: int) -> list[tuple[list[int], int, int]]:
    """(ids of question and context, first and last token of the answer): pieces of source with one ``def`` in them."""
    question = [0, *tokenizer.encode(QUESTION, add_special_tokens=False).ids]
    found = []
    for text in files.values():
        lines = text.splitlines(keepends=True)
        for at in range(0, len(lines) - 12, 12):
            piece = "".join(lines[at : at + 12])
            names = list(re.finditer(r"\bdef (\w+)\(", piece))
            if len(names) != 1:
                continue
            encoded = tokenizer.encode(piece, add_special_tokens=False)
            begin, end = names[0].span(1)
            answer = [i for i, (left, right) in enumerate(encoded.offsets) if left < end and right > begin]
            ids = question + encoded.ids
            if answer and len(ids) <= LONGEST:
                found.append((ids, len(question) + answer[0], len(question) + answer[-1]))
            if len(found) == limit:
                return found
    return found


def batch_of(rows: list[tuple[list[int], int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask [B, S], padded on the right; first and last token of the answers [B]."""
    width = max(len(ids) for ids, _, _ in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for row, (tokens, _, _) in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    return ids, mask, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])


def question_answering_checkpoint(folder: Path) -> Path:
    """tiny-llama's decoder under Hugging Face's names for the task, with a new head."""
    folder.mkdir(parents=True)
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["LlamaForQuestionAnswering"], "tie_word_embeddings": False, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        name.replace("model.", "transformer.", 1): value
        for name, value in load_file(CHECKPOINT / "model.safetensors").items()
        if name != "lm_head.weight"
    }
    rng = np.random.default_rng(0)
    tensors["qa_outputs.weight"] = (0.02 * rng.standard_normal((2, config["hidden_size"]))).astype(np.float32)
    tensors["qa_outputs.bias"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(CHECKPOINT / "tokenizer.json", folder)
    return folder


def exact_match(model: LlamaForQuestionAnswering, rows: list[tuple[list[int], int, int]]) -> float:
    """Share of texts whose best start and best end are both right."""
    right = 0
    with torch.no_grad():
        for at in range(0, len(rows), BATCH):
            ids, mask, start, end = batch_of(rows[at : at + BATCH])
            scores = [item.masked_fill(mask == 0, -torch.inf).argmax(-1) for item in model(ids, mask)]
            right += int(((scores[0] == start) & (scores[1] == end)).sum())
    return right / len(rows)


def measure() -> dict[str, Any]:
    """Exact match on held-out files before and after fine-tuning our class, and after a trip through the disk and ONNX."""
    from llama_export.bundle.bundle import load_bundle
    from llama_export.export.export import export_checkpoint
    from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession

    corpus = trainer().read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    train, held_out = (
        examples(part, tokenizer, limit) for part, limit in ((corpus.train, 6400), (corpus.held_out, 400))
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = question_answering_checkpoint(Path(temporary) / "qa")
        model = load_reference(folder, attn_implementation="sdpa")
        if not isinstance(model, LlamaForQuestionAnswering):
            raise TypeError(type(model))
        before = exact_match(model, held_out)
        model.train().requires_grad_()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        rng, start = np.random.default_rng(0), time.perf_counter()
        for _ in range(STEPS):
            rows = [train[i] for i in rng.integers(0, len(train), BATCH)]
            loss, _ = model.loss(*batch_of(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        model.eval()
        after = exact_match(model, held_out)
        tuned = Path(temporary) / "tuned"
        shutil.copytree(folder, tuned)
        names = {
            name.replace("model.", "transformer.", 1): value.detach().numpy()
            for name, value in model.state_dict().items()
        }
        save_file(names, tuned / "model.safetensors")
        export_checkpoint(tuned)
        session = OnnxRuntimeHeadSession(load_bundle(tuned))
        right = 0
        for ids_list, first, last in held_out:
            ids = np.asarray([ids_list])
            found = session.run(ids, np.ones_like(ids))
            right += int(found["start_logits"].argmax()) == first and int(found["end_logits"].argmax()) == last
    return {
        "train texts": len(train), "held-out texts": len(held_out), "steps": STEPS, "seconds": seconds,
        "before": before, "after": after, "after, onnxruntime": right / len(held_out),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """One row."""
    row = [f"{found['steps']} of {BATCH} texts, {found['seconds']:.0f} s"]
    row += [f"{found[key]:.1%}" for key in ("before", "after", "after, onnxruntime")]
    return markdown(["steps", "exact match before", "after", "after, exported, onnxruntime"], [row])


TEXTS = {
    "Python": "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "English": "The model reads a text from left to right and guesses the next word.",
    "Portuguese": "O modelo lê um texto da esquerda para a direita e adivinha a próxima palavra.",
    "German": "Das Modell liest einen Text von links nach rechts und errät das nächste Wort.",
    "Greek": "Το μοντέλο διαβάζει ένα κείμενο από αριστερά προς τα δεξιά και μαντεύει την επόμενη λέξη.",
    "Japanese": "モデルは文章を左から右へ読み、次の単語を推測します。",
}


def measure_languages() -> dict[str, Any]:
    """Language -> characters, bytes and tokens of one sentence, by the tokenizer that has seen source code alone."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    found = {}
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids) != text:
            raise SystemExit(f"the tokenizer loses something of the {name} text")
        found[name] = {"characters": len(text), "bytes": len(text.encode()), "tokens": len(ids)}
    return found


def languages_table(found: dict[str, Any]) -> str:
    """One row per language."""
    rows = [
        [
            name,
            str(row["characters"]),
            str(row["bytes"]),
            str(row["tokens"]),
            f"{row['tokens'] / row['characters']:.2f}",
        ]
        for name, row in found.items()
    ]
    return markdown(["text", "characters", "bytes", "tokens", "tokens per character"], rows)
