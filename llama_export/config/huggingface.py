"""``config.json`` -> :class:`LlamaConfig`, and what else it decides: the task, the dtype, the labels.

The rule is *fail closed*: a key that is neither read nor known to be harmless stops the export, because a setting dropped in
silence is a clean build with wrong numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from llama_export._system.files import json_from_bytes, read_small
from llama_export.config.checks import check_value, is_int, is_number
from llama_export.config.keys import FOREIGN_KEYS, HARMLESS_KEYS, OTHER_FAMILIES, READ_KEYS
from llama_export.config.limits import MAX_JSON_BYTES
from llama_export.config.llama import (
    REQUIRED_KEYS,
    ROPE_CONTEXT,
    ROPE_KEYS,
    ROPE_TYPES_WITH_CONTEXT,
    SUPPORTED_ROPE_TYPES,
    TASKS,
    LlamaConfig,
    RopeConfig,
    Task,
)
from llama_export.errors import ConfigError

_TASK_OF_ARCHITECTURE: dict[str, Task] = {
    "LlamaForCausalLM": "causal-lm",
    "LLaMAForCausalLM": "causal-lm",
    "LlamaForSequenceClassification": "sequence-classification",
    "LLaMAForSequenceClassification": "sequence-classification",
    "LlamaForTokenClassification": "token-classification",
    "LlamaForQuestionAnswering": "question-answering",
    "LlamaModel": "feature-extraction",
    "LLaMAModel": "feature-extraction",
}
"""The capitals are those of the first checkpoints, before the class had its name."""


def load_config(folder: Path, allow_keys: Collection[str] = ()) -> LlamaConfig:
    """Reads ``folder/config.json``.

    Raises:
        ConfigError: the file is missing, is not JSON, or states something this package does not compute.
    """
    return config_from_dict(
        load_json_object(folder / "config.json"), source=str(folder / "config.json"), allow_keys=allow_keys
    )


def load_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file that somebody made.

    Raises:
        ConfigError: missing, not a regular file, unreadable, larger than :data:`MAX_JSON_BYTES`, not UTF-8, not JSON, a
            key that stands twice, or not an object.
    """
    try:
        data = json_from_bytes(read_small(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise ConfigError(
            f"`{path.name}` is missing",
            details={"looked in": path.parent},
            hint="a checkpoint is a Hugging Face folder: config.json, *.safetensors, tokenizer.json",
        ) from None
    except (OSError, ValueError, RecursionError) as err:  # ValueError: not UTF-8, not JSON, an integer of 5000 digits
        raise ConfigError(
            f"`{path.name}` cannot be read as JSON",
            details={"file": path, "reason": getattr(err, "strerror", None) or err},
            hint="restore the file from its source",
        ) from err
    if not isinstance(data, dict):
        raise ConfigError(
            f"`{path.name}` is not a JSON object",
            details={"file": path, "got": type(data).__name__, "expected": "{...}"},
            hint="restore the file from its source",
        )
    return data


def config_from_dict(
    data: Mapping[str, Any], *, source: str = "config.json", allow_keys: Collection[str] = ()
) -> LlamaConfig:
    """A validated :class:`LlamaConfig` from the parsed ``config.json``.

    Args:
        data: the JSON object.
        source: named in errors.
        allow_keys: unknown keys to accept.

    Raises:
        ConfigError: another ``model_type``, an unknown ``rope_type``, a missing size, or a key nobody reads.
    """
    _check_model_type(data.get("model_type"), source)
    missing = [key for key in REQUIRED_KEYS if data.get(key) is None]
    if missing:
        raise ConfigError(
            f"`config.json` lacks {', '.join(missing)}",
            details={"file": source, "expected": ", ".join(REQUIRED_KEYS)},
            hint="sizes are never guessed: add them to config.json",
        )
    if data.get("quantization_config") is not None:
        raise ConfigError(
            "quantised checkpoints are not supported",
            details={"file": source, "quantization_config": data["quantization_config"]},
            hint="export the original float32, float16 or bfloat16 checkpoint",
        )
    _check_keys(data, source, allow_keys)
    heads = data["num_attention_heads"]
    head_dim = data.get("head_dim")
    if head_dim is None:
        check_value(is_int(heads) and heads > 0, "num_attention_heads", heads, "an integer >= 1")
        hidden = data["hidden_size"]
        check_value(is_int(hidden), "hidden_size", hidden, "an integer >= 1")
        check_value(
            hidden % heads == 0, "hidden_size", hidden, f"a multiple of num_attention_heads = {heads}, or a head_dim"
        )
        head_dim = hidden // heads
    kv_heads = data.get("num_key_value_heads")
    eos = data.get("eos_token_id")
    num_labels, labels = _labels_from_dict(data, source)
    return LlamaConfig(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_hidden_layers=data["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        hidden_act=data.get("hidden_act", "silu"),
        max_position_embeddings=data.get("max_position_embeddings", 2048),
        rms_norm_eps=data.get("rms_norm_eps", 1e-6),
        rope=_rope_from_dict(data, source),
        tie_word_embeddings=data.get("tie_word_embeddings", False),
        attention_bias=data.get("attention_bias", False),
        mlp_bias=data.get("mlp_bias", False),
        dtype=_dtype_from_dict(data, source),
        bos_token_id=data.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=data.get("pad_token_id"),
        num_labels=num_labels,
        labels=labels,
        problem_type=data.get("problem_type"),
        classifier_dropout=_first(data.get("classifier_dropout"), data.get("hidden_dropout"), 0.1),
        token_classification_bias=data.get("token_classification_bias", True),
        attention_dropout=_first(data.get("attention_dropout"), 0.0),
        architectures=_tuple(data.get("architectures")),
    )


def _check_model_type(model_type: object, source: str) -> None:
    if model_type == "llama":
        return
    known = [name for name in OTHER_FAMILIES if isinstance(model_type, str) and model_type.startswith(name)]
    family = max(known, key=len, default=None)
    raise ConfigError(
        f"unsupported model_type: {model_type}",
        details={"file": source, "got": model_type, "expected": "llama"},
        hint=OTHER_FAMILIES[family] + ("" if family == "mistral" else ": as a Llama it would compute other numbers")
        if family
        else "only Llama checkpoints are exported; a model of the same architecture must say so in its config.json",
    )


def _check_keys(data: Mapping[str, Any], source: str, allow_keys: Collection[str]) -> None:
    """Refuses what is neither read nor known to be harmless; null is "not set"."""
    unknown = sorted(
        key
        for key, value in data.items()
        if key not in READ_KEYS
        and key not in HARMLESS_KEYS
        and key not in allow_keys
        and value is not None
        and not _is_neutral(key, value)
    )
    if unknown:
        reasons = [f"{key} {FOREIGN_KEYS[key][1]}" for key in unknown if key in FOREIGN_KEYS]
        vouch = " ".join(f"--allow-config-key {key}" for key in unknown)
        raise ConfigError(
            f"`config.json` has keys this exporter does not read: {', '.join(unknown)}",
            details={"file": source, "got": {key: data[key] for key in unknown}},
            hint="; ".join([*reasons, f"if they do not change the numbers, say so: {vouch}"]),
        )


def _is_neutral(key: str, value: object) -> bool:
    """A key of another family, with a value that means what Llama does anyway."""
    if key == "layer_types":
        return isinstance(value, list) and all(item == "full_attention" for item in value)
    neutral, _ = FOREIGN_KEYS.get(key, ((), ""))
    return any(type(value) is type(item) and value == item for item in neutral)


def _dtype_from_dict(data: Mapping[str, Any], source: str) -> Any:
    """``dtype``, or ``torch_dtype`` as it was called before transformers 5."""
    found = [
        value.removeprefix("torch.") if isinstance(value, str) else value
        for value in (data.get("dtype"), data.get("torch_dtype"))
        if value is not None
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(
            "`config.json` states its dtype twice",
            details={"file": source, "dtype": data["dtype"], "torch_dtype": data["torch_dtype"]},
            hint="keep dtype and delete torch_dtype",
        )
    return found[0] if found else None


def _labels_from_dict(data: Mapping[str, Any], source: str) -> tuple[Any, Any]:
    """Number of classes and their names. transformers writes ``id2label``, and nothing at all for two unnamed classes."""
    table, number = data.get("id2label"), data.get("num_labels")
    if table is None:
        return _first(number, 2), ()
    expected = 'an object of class number -> name: {"0": "no", "1": "yes"}'
    check_value(isinstance(table, dict) and bool(table), "id2label", table, expected)
    ids = [str(key) for key in table]
    check_value(
        sorted(ids) == sorted(str(i) for i in range(len(ids))), "id2label", table, f"{expected}, numbered from 0"
    )
    if number is not None and number != len(ids):
        raise ConfigError(
            "`config.json` states the number of labels twice",
            details={"file": source, "num_labels": number, "id2label": f"{len(ids)} labels"},
            hint="delete num_labels: transformers takes the length of id2label",
        )
    return len(ids), tuple(table[key] for key in sorted(table, key=int))


def resolve_task(requested: str, config: LlamaConfig) -> Task:
    """``auto`` -> the task of the class the config names; without one a causal LM. Another request is taken as it is.

    Raises:
        ConfigError: not a task, or ``architectures`` names a class that is no Llama of Hugging Face's, or several.
    """
    for task in get_args(Task):
        if requested == task:
            return cast(Task, task)
    check_value(requested == "auto", "task", requested, " | ".join(("auto", *TASKS)))
    known = ", ".join(name for name in _TASK_OF_ARCHITECTURE if name.startswith("Llama"))
    for name in config.architectures:
        if name not in _TASK_OF_ARCHITECTURE:
            raise ConfigError(
                f"unknown architecture: {name}",
                details={"got": ", ".join(config.architectures), "expected": known},
                hint="if the checkpoint is one of these all the same, say what it is for: --task " + " | ".join(TASKS),
            )
    tasks = sorted({_TASK_OF_ARCHITECTURE[name] for name in config.architectures})
    if len(tasks) > 1:
        raise ConfigError(
            "`config.json` names architectures of several tasks",
            details={"got": ", ".join(config.architectures), "expected": f"one of {known}"},
            hint=f"choose one: --task {' | '.join(tasks)}",
        )
    return tasks[0] if tasks else "causal-lm"


def _rope_from_dict(data: Mapping[str, Any], source: str) -> RopeConfig:
    """Both spellings: transformers 5 writes ``rope_parameters``, earlier ones ``rope_theta`` and ``rope_scaling``."""
    holders = ("rope_parameters", "rope_scaling")
    for key in holders:
        check_value(data.get(key) is None or isinstance(data[key], dict), key, data.get(key), "an object or null")
    _check_full_rotation(data, source)
    found = [_rope_from_settings(data[key], data, source) for key in holders if data.get(key)]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(
            "`config.json` states its RoPE settings twice",
            details={"file": source, **{key: data[key] for key in holders}},
            hint="keep one of them",
        )
    return found[0] if found else _rope_from_settings({}, data, source)


def _check_full_rotation(holder: Mapping[str, Any], source: str) -> None:
    value = holder.get("partial_rotary_factor")
    if value is not None and not (is_number(value) and value == 1):
        raise ConfigError(
            "partial_rotary_factor is not part of Llama",
            details={"file": source, "got": value, "expected": "absent or 1.0"},
            hint="Hugging Face's Llama ignores it or fails on it; remove the key if the model was trained without it",
        )


def _rope_from_settings(settings: Mapping[str, Any], data: Mapping[str, Any], source: str) -> RopeConfig:
    """One of the two objects, with what the rest of ``config.json`` adds to it."""
    rope = dict(settings)
    types = [value for value in (rope.pop("rope_type", None), rope.pop("type", None)) if value is not None]
    if len(types) == 2 and types[0] != types[1]:
        raise ConfigError(
            "`config.json` names two RoPE types",
            details={"file": source, "type": types[1], "rope_type": types[0]},
            hint="keep rope_type and delete type",
        )
    rope_type = types[0] if types else "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ConfigError(
            f"unknown rope_type: {rope_type}",
            details={"file": source, "got": rope_type, "expected": " | ".join(SUPPORTED_ROPE_TYPES)},
            hint="a RoPE type that is not implemented is refused: falling back to `default` would give wrong positions",
        )
    theta = _stated_once(rope, data, "rope_theta", source)
    _check_full_rotation(rope, source)
    rope.pop("partial_rotary_factor", None)
    context = _stated_once(rope, data, ROPE_CONTEXT, source) if rope_type in ROPE_TYPES_WITH_CONTEXT else None
    if context is not None:
        rope[ROPE_CONTEXT] = context
    elif data.get(ROPE_CONTEXT) is not None:
        raise ConfigError(
            f"{ROPE_CONTEXT} is not read by rope_type {rope_type}",
            details={"file": source, "got": data[ROPE_CONTEXT], "expected": " | ".join(ROPE_TYPES_WITH_CONTEXT)},
            hint="transformers ignores it: correct rope_type, or delete the key",
        )
    required, optional = ROPE_KEYS[rope_type]
    # An optional setting that is null is not set; but transformers takes a null `truncate` for false.
    rope = {key: value for key, value in rope.items() if value is not None or key in required or key == "truncate"}
    if not required <= set(rope) <= required | optional:
        may = f"; optional: {', '.join(sorted(optional))}" if optional else ""
        raise ConfigError(
            f"RoPE settings do not fit rope_type {rope_type}",
            details={
                "file": source,
                "got": ", ".join(sorted(rope)) or "none",
                "expected": (", ".join(sorted(required)) or "none") + may,
            },
            hint="a setting that would be ignored or guessed is refused: correct config.json",
        )
    if rope_type in ROPE_TYPES_WITH_CONTEXT:
        rope.setdefault(ROPE_CONTEXT, data.get("max_position_embeddings", 2048))
    if "truncate" in rope:
        check_value(isinstance(rope["truncate"], bool), "RoPE truncate", rope["truncate"], "true or false")
    if theta is None and "rope_theta" not in settings and "rope_theta" not in data:
        theta = 10000.0
    check_value(is_number(theta) and theta > 0, "rope_theta", theta, "a number > 0")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in rope.items()}
    return RopeConfig(rope_type=rope_type, rope_theta=float(theta), **values)


def _stated_once(rope: dict[str, Any], data: Mapping[str, Any], key: str, source: str) -> Any:
    """A setting that may stand inside the RoPE settings (it is removed there) or beside them; None: nowhere."""
    inside, beside = rope.pop(key, None), data.get(key)
    if inside is not None and beside is not None and inside != beside:
        raise ConfigError(
            f"`config.json` states {key} twice",
            details={"file": source, key: beside, "inside RoPE": inside},
            hint="keep one of them",
        )
    return inside if inside is not None else beside


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _tuple(value: Any) -> Any:
    """A JSON array or null as a tuple; anything else as it is, to be refused by name."""
    return () if value is None else tuple(value) if isinstance(value, list) else value
