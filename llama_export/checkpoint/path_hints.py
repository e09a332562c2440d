"""What a path that is not a checkpoint or a bundle probably is, and what to do about it.

Role: the sentences for a mistyped path, a hub id, a GGUF file, a LoRA adapter, pickled weights. Looks at names only, so
that commands can check a path before they import heavy packages.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llama_export.errors import CheckpointError, ConfigError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SAFETENSORS = "*.safetensors"


def require_checkpoint_folder(folder: Path) -> None:
    """Refuses a path that cannot be a checkpoint, by names alone. What is in the files is checked later.

    Raises:
        CheckpointError: no such folder, a file, or a folder of another kind.
    """
    if not folder.exists():
        raise CheckpointError(
            f"no folder `{folder}`",
            details={"expected": "a local checkpoint folder"},
            hint=_hint_of_missing(folder),
        )
    if not folder.is_dir():
        hint = _hint_of_file(folder) or "give the folder that holds config.json and the *.safetensors files"
        raise CheckpointError(
            f"`{folder}` is not a folder", details={"expected": "a Hugging Face checkpoint folder"}, hint=hint
        )
    if (folder / "config.json").is_file():
        return
    if (kind := _hint_of_folder(folder)) is not None:
        raise CheckpointError(
            f"`{folder}` is not a checkpoint", details={"missing": "config.json", "got": _shown(folder)}, hint=kind
        )


def not_a_bundle(folder: Path, manifest: str) -> ConfigError:
    """The error for a path without a manifest.

    Args:
        folder: what was given.
        manifest: name of the file that makes a folder a bundle.
    """
    if not os.path.lexists(folder):
        return ConfigError(
            f"no folder `{folder}`",
            details={"expected": "the folder of a bundle"},
            hint=_hint_of_missing(folder, "bundle"),
        )
    if not folder.is_dir():
        hint = _hint_of_file(folder) or "give the folder that `llama-export export` made"
        return ConfigError(f"`{folder}` is not a bundle", details={"got": "a file", "expected": "a folder"}, hint=hint)
    if (folder / "config.json").is_file() and _hint_of_folder(folder) is None:
        hint = f"make one first: llama-export export {folder}"
    else:
        hint = _hint_of_folder(folder) or "give the folder that `llama-export export` made"
    return ConfigError(f"`{folder}` is not a bundle", details={"missing": manifest, "got": _shown(folder)}, hint=hint)


def _hint_of_missing(path: Path, kind: str = "checkpoint") -> str:
    """For a path that does not exist."""
    if _HUB_ID.fullmatch(str(path)) and not path.parent.exists():
        download = f"hf download {path} --local-dir {path.name}"
        after = "then export" if kind == "checkpoint" else "llama-export export"
        return f"a hub id is not downloaded for you: {download}, {after} {path.name}"
    parent = next((folder for folder in path.absolute().parents if folder.exists()), None)
    if parent is not None and parent != path.absolute().parent:
        return f"check the path: it is right up to `{parent}`"
    return "check the path"


def _hint_of_file(path: Path) -> str | None:
    if path.suffix == ".gguf":
        return _GGUF
    if path.suffix == ".engine":
        return f"give the bundle's folder, and the engine by --engine {path}"
    if path.suffix in (".onnx", ".safetensors") or path.name in ("config.json", "manifest.json"):
        return f"give its folder: {path.parent}"
    return None


def _hint_of_folder(folder: Path) -> str | None:
    """For a folder that is something else, where its names tell what."""
    if (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").is_file():
        return _ADAPTER
    if any(folder.glob(_SAFETENSORS)):
        return None
    if any(folder.glob("*.gguf")):
        return _GGUF
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        return PICKLE_HINT
    if (folder / "snapshots").is_dir() and (folder / "blobs").is_dir():
        return f"this is a model of Hugging Face's cache: give one of the folders in {folder / 'snapshots'}"
    return None


def _shown(folder: Path, most: int = 5) -> str:
    """The first names in a folder."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "") or "an empty folder"


_GGUF = (
    "a GGUF file is llama.cpp's format and cannot be exported: download the original safetensors checkpoint, which the "
    "model's page names as its base model"
)
_ADAPTER = (
    "this is a LoRA adapter: merge it into its base model first, in Python with peft: "
    "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(merged)"
)
PICKLE_HINT = (
    "PyTorch pickles (.bin, .pt) can run code when they are opened: convert them once with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
)
