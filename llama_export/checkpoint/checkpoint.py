"""A Hugging Face checkpoint folder: where every tensor lies, byte by byte, checked before anything is built on it.

Role: ``config.json`` and ``*.safetensors`` headers go in, a :class:`Checkpoint` comes out. Only headers are read here:
opening a 140 GB checkpoint costs a few megabytes. A safetensors file is 8 bytes of little-endian header length, a JSON
header, then the tensors' bytes; ``data_offsets`` count from the end of the header.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_export._system.files import is_plain_name, leads_out
from llama_export.checkpoint.path_hints import PICKLE_HINT, PICKLES, require_checkpoint_folder
from llama_export.checkpoint.safetensors import TensorEntry, WeightFile, read_safetensors_header
from llama_export.config.decoder import expected_tensors
from llama_export.config.huggingface import load_config, load_json_object, resolve_task
from llama_export.config.limits import MAX_JSON_BYTES, MAX_TENSORS, MAX_TOKENIZER_BYTES, MAX_WEIGHT_FILES
from llama_export.config.llama import DTYPES, LlamaConfig, Task
from llama_export.errors import CheckpointError, ConfigError, LlamaExportError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PREFIXES = ("model.", "transformer.", "")
"""Where Hugging Face's classes keep the decoder: all but two; question answering; a decoder saved without a head."""
_DECODER = re.compile(r"(model\.|transformer\.|)(?:embed_tokens|layers|norm)\..+")
# Old Llama checkpoints stored RoPE's buffers; they follow from the config, and Hugging Face drops them too.
_ROTARY = re.compile(
    r"(?:model\.|transformer\.|)(?:layers\.\d+\.self_attn\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)"
)
_HEADS = ("lm_head.weight", "score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias")
_DROPPED_HEADS: dict[str, tuple[str, ...]] = {
    "causal-lm": (),
    "sequence-classification": ("lm_head.weight",),
    "token-classification": ("lm_head.weight",),
    "question-answering": ("lm_head.weight",),
    "feature-extraction": _HEADS,
}
"""Task -> heads it does not use: that of the pre-training; without a head, all. Any other is an unexpected tensor."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked checkpoint: every tensor the config implies is there once, with the right shape, inside its file."""

    folder: Path
    config: LlamaConfig
    tensors: Mapping[str, TensorEntry]
    """Reference name -> entry; exactly the names of :func:`llama_export.config.decoder.expected_tensors`."""
    files: tuple[WeightFile, ...]
    """All weight files, sorted by name; one may hold only tensors that are not used (a copy of a tied head)."""
    task: Task = "causal-lm"
    """What the checkpoint is opened for; it decides which head belongs to it."""
    dropped: tuple[str, ...] = ()
    """Stored names of tensors that the task does not use, sorted: another head, a tied copy, RoPE's buffers."""

    @property
    def weight_bytes(self) -> int:
        """Sum of all tensors, bytes."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def stored_dtype(self) -> str:
        """The dtype of the embedding, which decides for ``--dtype auto`` when the config states none."""
        return self.tensors["model.embed_tokens.weight"].dtype


def load_checkpoint(folder: Path, allow_config_keys: Collection[str] = (), *, task: str = "auto") -> Checkpoint:
    """Opens a checkpoint folder and checks it against its config.

    Args:
        folder: holds ``config.json`` and ``*.safetensors``. Symbolic links are followed if they stay in the folder, or
            lead from a snapshot of Hugging Face's cache to its blobs.
        allow_config_keys: unknown ``config.json`` keys to accept.
        task: see :func:`llama_export.config.huggingface.resolve_task`.

    Raises:
        ConfigError: see :func:`llama_export.config.huggingface.load_config` and ``resolve_task``.
        CheckpointError: no safetensors, pickles only, a truncated or overlapping file, a file that lies elsewhere, or
            tensors that are missing, unexpected or mis-shaped (both sets are listed); no head for the task.
    """
    require_checkpoint_folder(folder)
    check_files(folder, ("config.json", INDEX_NAME, *TOKENIZER_FILES), hub_cache=True, error=CheckpointError)
    _check_sizes(folder)
    config = load_config(folder, allow_config_keys)
    resolved = resolve_task(task, config)
    names = _weight_file_names(folder)
    check_files(folder, names, hub_cache=True, error=CheckpointError)
    files, entries = read_headers(folder, names)
    tensors, dropped = match_tensors(folder, config, resolved, entries)
    return Checkpoint(folder, config, tensors, tuple(files), resolved, dropped)


def read_headers(folder: Path, names: Iterable[str]) -> tuple[list[WeightFile], dict[str, TensorEntry]]:
    """The headers of some safetensors files: the files, and where each tensor lies, by its stored name.

    Raises:
        CheckpointError: see :func:`llama_export.checkpoint.safetensors.read_safetensors_header`; or a tensor that is
            stored twice, or too many tensors.
    """
    files: list[WeightFile] = []
    entries: dict[str, TensorEntry] = {}
    for name in names:
        file, found = read_safetensors_header(folder / name)
        files.append(file)
        _check_count(len(entries) + len(found), MAX_TENSORS, "tensors", folder)
        for entry in found:
            if entry.name in entries:
                raise CheckpointError(
                    f"tensor `{entry.name}` is stored twice",
                    details={"first": entries[entry.name].file, "second": entry.file},
                    hint="remove the file that does not belong to this checkpoint",
                )
            entries[entry.name] = entry
    return files, entries


def check_files(folder: Path, names: Iterable[str], *, hub_cache: bool, error: type[LlamaExportError]) -> None:
    """Refuses files of a folder that lie elsewhere, or are none. What is not there is not checked.

    Args:
        folder: a checkpoint, a bundle or its engines.
        names: plain names in it.
        hub_cache: allow links to the blobs of Hugging Face's cache.
        error: what is raised.
    """
    for name in names:
        path = folder / name
        if (real := leads_out(path, hub_cache=hub_cache)) is not None:
            raise error(
                f"`{name}` is a symbolic link out of its folder",
                details={"file": path, "got": real, "expected": "a file in the folder" + _OR_BLOB * hub_cache},
                hint="put the file itself there, if you know that it belongs there",
            )
        if name.endswith(".safetensors"):
            continue  # its reader says more
        if os.path.exists(path) and not os.path.isfile(path):
            raise error(
                f"`{name}` is not a regular file",
                details={"file": path, "expected": "a regular file: no folder, pipe, socket or device"},
                hint="restore it from its source, or remove it",
            )


_OR_BLOB = ", or in the blobs of the same Hugging Face cache"


def _check_sizes(folder: Path) -> None:
    """The files that a bundle takes along are small enough to be read whole later."""
    for name in TOKENIZER_FILES:
        limit = MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_JSON_BYTES
        size = os.stat(folder / name).st_size if os.path.exists(folder / name) else 0
        if size > limit:
            raise CheckpointError(
                f"`{name}` is too large",
                details={"file": folder / name, "got": f"{size} bytes", "expected": f"at most {limit} bytes"},
                hint="restore the file from its source",
            )


def _check_count(count: int, limit: int, what: str, where: Path) -> None:
    if count > limit:
        raise CheckpointError(
            f"the checkpoint has too many {what}",
            details={"where": where, "got": f"{count} {what}", "expected": f"at most {limit}"},
            hint="no published Llama comes near this number: do not export a checkpoint from a source you do not trust",
        )


def _weight_file_names(folder: Path) -> list[str]:
    # transformers takes the single file where both exist, and so must what is to equal it.
    if os.path.lexists(folder / SINGLE_NAME):
        return [SINGLE_NAME]
    if os.path.lexists(folder / INDEX_NAME):
        weight_map = load_json_object(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(
                f"`{INDEX_NAME}` has no weight_map",
                details={"file": folder / INDEX_NAME, "expected": '{"weight_map": {tensor: file}}'},
                hint="restore the index from its source",
            )
        _check_count(len(weight_map), MAX_TENSORS, "tensors", folder / INDEX_NAME)
        names = sorted({str(name) for name in weight_map.values()})
        _check_count(len(names), MAX_WEIGHT_FILES, "files", folder / INDEX_NAME)
        unsafe = [name for name in names if not is_plain_name(name)]
        if unsafe:
            raise CheckpointError(
                f"`{INDEX_NAME}` points out of its folder",
                details={"file": folder / INDEX_NAME, "got": _shorten(unsafe), "expected": "plain file names"},
                hint="do not export a checkpoint from a source you do not trust",
            )
        foreign = [name for name in names if not name.endswith(".safetensors")]
        if foreign:
            raise CheckpointError(
                f"`{INDEX_NAME}` names files that are not safetensors",
                details={"file": folder / INDEX_NAME, "got": ", ".join(foreign[:4]), "expected": "*.safetensors"},
                hint="restore the index from its source",
            )
        return names
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            "this checkpoint holds pickle files only",
            details={"folder": folder, "got": ", ".join(pickles[:4]), "expected": "*.safetensors"},
            hint=PICKLE_HINT,
        )
    raise CheckpointError(
        "no weights in this folder",
        details={"folder": folder, "expected": f"{SINGLE_NAME} or {INDEX_NAME}"},
        hint="give the folder that holds config.json and the *.safetensors files",
    )


def match_tensors(
    folder: Path, config: LlamaConfig, task: Task, stored: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """Reference name -> entry, and the stored names that are not used."""
    if config.num_hidden_layers > len(stored):  # before the names of a billion layers are made
        raise CheckpointError(
            "checkpoint does not match its config: fewer tensors than layers",
            details={
                "folder": folder,
                "got": f"{len(stored)} tensors",
                "expected": f"{config.num_hidden_layers} layers",
            },
            hint=f"config.json says num_hidden_layers: {config.num_hidden_layers}",
        )
    rotary = {name for name in stored if _ROTARY.fullmatch(name)}
    expected = expected_tensors(config, task)
    found = _by_reference_name(folder, {name: entry for name, entry in stored.items() if name not in rotary})
    extra = {name for name in found if name not in expected}
    dropped = extra & set(_DROPPED_HEADS[task])
    if task == "causal-lm" and config.tie_word_embeddings and "lm_head.weight" in extra:
        _check_tied_copy(folder, found)
        dropped.add("lm_head.weight")
    extra -= dropped
    missing = [name for name in expected if name not in found]
    mis_shaped = [name for name in expected if name in found and found[name].shape != expected[name]]
    if missing and not extra and not mis_shaped and set(missing) <= set(_HEADS):
        raise _no_head(folder, config, task, missing, found)
    if missing or extra or mis_shaped:
        details: dict[str, object] = {"folder": folder}
        if missing:
            details["missing"] = _shorten(missing)
        if extra:
            details["unexpected"] = _shorten(sorted(found[name].name for name in extra))
        if mis_shaped:
            details["mis-shaped"] = _shorten(
                [
                    f"{found[name].name}: got {list(found[name].shape)}, expected {list(expected[name])}"
                    for name in mis_shaped
                ]
            )
        hint = (
            f"config.json says num_hidden_layers: {config.num_hidden_layers}, hidden_size: {config.hidden_size}, "
            f"tie_word_embeddings: {str(config.tie_word_embeddings).lower()}"
        )
        if set(_HEADS) & {*missing, *mis_shaped, *extra}:
            hint += f", num_labels: {config.num_labels}; the task is {task}: choose another with --task"
        raise CheckpointError(
            f"checkpoint does not match its config: {len(missing)} missing, {len(extra)} unexpected, {len(mis_shaped)} mis-shaped",
            details=details,
            hint=hint,
        )
    return {name: found[name] for name in expected}, tuple(sorted(rotary | dropped))


def _by_reference_name(folder: Path, stored: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The decoder's tensors under ``model.``, whatever they are stored under; all others under their own names."""
    prefixes: dict[str, str] = {}
    for name in sorted(stored):
        if match := _DECODER.fullmatch(name):
            prefixes.setdefault(match[1], name)
    if len(prefixes) > 1:
        raise CheckpointError(
            "the decoder is stored under several prefixes: " + " and ".join(f"`{prefix}`" for prefix in prefixes),
            details={"folder": folder, "got": ", ".join(prefixes.values()), "expected": "one of " + _listed_prefixes()},
            hint="two models are mixed in this folder: save one of them again with save_pretrained(folder)",
        )
    prefix = next(iter(prefixes), "model.")
    return {
        f"model.{name.removeprefix(prefix)}" if _DECODER.fullmatch(name) else name: entry
        for name, entry in stored.items()
    }


def _listed_prefixes() -> str:
    return ", ".join(f"`{prefix}`" for prefix in _PREFIXES)


def _no_head(
    folder: Path, config: LlamaConfig, task: Task, missing: list[str], found: Mapping[str, TensorEntry]
) -> CheckpointError:
    """Everything is there but the head: never a random one in its place."""
    if task == "causal-lm":
        hint = "if the head is the embedding matrix, set tie_word_embeddings to true; for hidden states alone choose --task feature-extraction"
    else:
        base = "causal-lm" if "lm_head.weight" in found or config.tie_word_embeddings else "feature-extraction"
        hint = f"train it first, or choose --task {base}"
    return CheckpointError(
        f"the checkpoint has no head for {task}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
        details={
            "folder": folder,
            "got": ", ".join(name for name in _HEADS if name in found) or "no head",
            "architectures": ", ".join(config.architectures) or "none named",
            "tie_word_embeddings": str(config.tie_word_embeddings).lower(),
        },
        hint=hint,
    )


def _check_tied_copy(folder: Path, found: Mapping[str, TensorEntry]) -> None:
    """A stored ``lm_head.weight`` beside tied embeddings is accepted only as a byte-for-byte copy."""
    head, embedding = found["lm_head.weight"], found.get("model.embed_tokens.weight")
    same = embedding is not None and (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same and embedding is not None:
        with (folder / head.file).open("rb") as left, (folder / embedding.file).open("rb") as right:
            left.seek(head.offset)
            right.seek(embedding.offset)
            remaining = head.nbytes
            while same and remaining:
                size = min(remaining, 1 << 20)
                same = left.read(size) == right.read(size)
                remaining -= size
    if not same:
        raise CheckpointError(
            "tie_word_embeddings is true, but `lm_head.weight` is stored and differs from `model.embed_tokens.weight`",
            details={"folder": folder},
            hint="if the head was trained on its own, set tie_word_embeddings to false in config.json; else delete the tensor",
        )


def _shorten(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def resolve_dtype(requested: str, checkpoint: Checkpoint) -> str:
    """``auto`` -> the dtype the config states, else the stored one.

    Raises:
        ConfigError: not one of ``auto``, float32, float16, bfloat16.
    """
    if requested == "auto":
        return checkpoint.config.dtype or checkpoint.stored_dtype
    if requested not in DTYPES:
        raise ConfigError(
            f"unknown dtype: {requested}",
            details={"got": requested, "expected": "auto | " + " | ".join(DTYPES)},
            hint="choose one of them",
        )
    return requested
