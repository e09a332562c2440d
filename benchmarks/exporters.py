"""The exporters that are compared: their commands, what must be installed for each, and the tokenizer one of them wants."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OPTIMUM = "optimum-onnx==0.1.0"
"""Needs an older transformers than the other peers, so it is not in ``requirements.txt``."""
GENAI_BUILDER_NEEDS = ("onnxruntime-genai", "transformers", "torch", "onnx-ir")
"""Distributions that onnxruntime-genai's model builder needs; the first is the peer itself."""


def export_command(checkpoint: Path) -> list[str]:
    """The project's own export, in place."""
    return [sys.executable, "-m", "llama_export", "export", str(checkpoint), "--force"]


def genai_builder_command(
    checkpoint: Path, output: Path, cache: Path, *, python: str = sys.executable, precision: str = "fp32"
) -> list[str]:
    """onnxruntime-genai's model builder, for a CPU."""
    builder = [python, "-m", "onnxruntime_genai.models.builder"]
    return [*builder, "-i", str(checkpoint), "-o", str(output), "-p", precision, "-e", "cpu", "-c", str(cache)]


def optimum_command(python: str, checkpoint: Path, output: Path, *, dtype: str | None = None) -> list[str]:
    """optimum-onnx's exporter, with a key/value cache; without a dtype it writes float32."""
    export = [python, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
    chosen = [] if dtype is None else ["--dtype", dtype]
    return [*export, "--model", str(checkpoint), "--task", "text-generation-with-past", *chosen, str(output)]


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One word per id. Nothing is tokenized here, but onnxruntime-genai's builder wants a tokenizer in the folder."""
    words = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(3, vocabulary))]
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": index, "content": word, "special": True, **no} for index, word in enumerate(words[:3])]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def pinned_requirements() -> dict[str, str]:
    """Distribution -> requirement, as pinned in ``requirements.txt`` beside this file."""
    lines = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    return {line.split("==")[0]: line for line in [*wanted, OPTIMUM] if "==" in line}


def not_installed(distributions: Sequence[str]) -> dict[str, Any]:
    """The result of a peer that is absent, with the pip command that installs the pinned versions."""
    pinned = pinned_requirements()
    command = "pip install " + " ".join(pinned.get(name, name) for name in distributions)
    return {"not_installed": list(distributions), "install": command}


def reason(result: Mapping[str, Any]) -> str:
    """Why a peer has no figures, for a cell of a table."""
    if "not_installed" in result:
        return f"not installed: `{result['install']}`"
    return "failed: " + " ".join(result["failed"].split()).replace("|", "/")


def version(distribution: str) -> str | None:
    """Of a distribution beside this interpreter; None if it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_in(python: str, distribution: str) -> str | None:
    """Version of a distribution in another interpreter's environment; None if it is not there."""
    if python == sys.executable:
        return version(distribution)
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, distribution], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def missing_in(python: str, distributions: Sequence[str]) -> list[str]:
    """Those of the distributions that another interpreter's environment lacks."""
    return [name for name in distributions if version_in(python, name) is None]
