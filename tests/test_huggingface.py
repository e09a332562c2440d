"""The reference is transformers' own Llama, in float64: random configs of every task and RoPE type; injected faults.

In float64 two implementations of one formula differ by roundings of 1e-16, so the limits of 1e-9 and 1e-8 leave no room
for another formula. transformers' norm, rotary embedding, softmax and losses are float32 inside whatever the model is:
:func:`in_float64` lifts that. Once, it is left as it is and the limit is that of float32.

``LLAMA_EXPORT_EXAMPLES=200 pytest tests/test_huggingface.py`` runs more examples, with other seeds each time; the line that
begins with ``examples:`` says how to run the same ones again.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from support import patient, write_tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import ACTIVATIONS, PROBLEM_TYPES, SUPPORTED_ROPE_TYPES
from llama_export.errors import ConfigError, ShapeError
from llama_export.model import MODEL_CLASSES, load_reference
from llama_export.model import attention as our_attention
from llama_export.model import heads as our_heads
from llama_export.model.attention import ATTENTION_CLASSES, LlamaSdpaAttention
from llama_export.model.decoder import KVCache
from llama_export.model.rms_norm import LlamaRMSNorm
from llama_export.model.rope import LlamaRotaryEmbedding
from llama_export.parity.metrics import difference

transformers = pytest.importorskip("transformers")
from transformers.models.llama import modeling_llama as theirs_llama  # noqa: E402

Settings = dict[str, Any]
Inside = Callable[[], AbstractContextManager[None]]
CLASSES = {
    "causal-lm": "LlamaForCausalLM",
    "feature-extraction": "LlamaModel",
    "sequence-classification": "LlamaForSequenceClassification",
    "token-classification": "LlamaForTokenClassification",
    "question-answering": "LlamaForQuestionAnswering",
}
COMBINATIONS = [(task, rope_type) for task in CLASSES for rope_type in SUPPORTED_ROPE_TYPES]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest errors, as shares of the largest wanted value of a tensor."""

    result: float
    """Of hidden states, logits and cache."""
    training: float
    """Of losses and gradients."""
    least: float
    """The largest value of a gradient counts as at least this share of the largest of all gradients. A gradient that is
    zero in exact arithmetic, as that of the queries of one token, or nearly so, as behind a softmax of one large score, is
    a difference of large numbers: what is left are roundings of these."""


FLOAT64 = Limits(result=1e-9, training=1e-8, least=1e-4)
FLOAT32 = Limits(result=1e-6, training=1e-6, least=1.0)  # float32 roundings of large gradients reach the small ones

EXAMPLES = int(os.environ.get("LLAMA_EXPORT_EXAMPLES", "40"))
# The same examples every time unless more are asked for: these are to find something new.
SEED = int(
    os.environ.get("LLAMA_EXPORT_SEED", secrets.randbelow(2**32) if "LLAMA_EXPORT_EXAMPLES" in os.environ else 0)
)
EACH = math.ceil(EXAMPLES / len(COMBINATIONS)) + 1
"""Examples per combination of task and RoPE type. One more, because Hypothesis begins with the smallest of all."""

worst: dict[str, float] = {}
"""Kind of result -> the largest error so far, for the line at the end."""
reached: dict[tuple[str, str], set[str]] = {}
"""Combination -> the settings that its examples had."""


@pytest.fixture(scope="module", autouse=True)
def _say_how_to_repeat(request: pytest.FixtureRequest) -> Iterator[None]:
    transformers.logging.set_verbosity_error()  # it has opinions on the configs drawn here
    yield
    transformers.logging.set_verbosity_warning()
    errors = ", ".join(f"{kind} {error:.1e}" for kind, error in sorted(worst.items()))
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print(
            f"\nexamples: LLAMA_EXPORT_EXAMPLES={EXAMPLES} LLAMA_EXPORT_SEED={SEED}; largest errors: {errors or 'none'}"
        )


# ---- examples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A checkpoint and what it is run on. Everything random follows from ``seed``."""

    task: str
    config: Settings
    """``config.json``"""
    lengths: tuple[int, ...]
    """Tokens of each row."""
    more: tuple[int, ...] = ()
    """Tokens of each row's second chunk, before it is decoded token by token; for the cache."""
    side: str = "right"
    """Where the padding is, for a batch without a cache."""
    implementation: str = "eager"
    """Of our attention, for losses and gradients; results are compared for all."""
    float_labels: bool = False
    """Labels of a sequence classifier that names no problem type are floats; values of a single label are [B, 1]."""
    seed: int = 0

    @property
    def rope_type(self) -> str:
        return config_from_dict(self.config).rope.rope_type

    @property
    def follows_length(self) -> bool:
        return config_from_dict(self.config).rope.follows_length

    @property
    def mask(self) -> Tensor:
        """int64 [B, S]"""
        steps, lengths = torch.arange(max(self.lengths)), torch.tensor(self.lengths).unsqueeze(1)
        return ((steps < lengths) if self.side == "right" else (steps >= max(self.lengths) - lengths)).long()

    @property
    def ids(self) -> Tensor:
        """int64 [B, S]; padding holds the padding token if there is one, and may stand in a text, too."""
        mask, vocabulary, pad = self.mask, self.config["vocab_size"], self.config.get("pad_token_id")
        ids = torch.from_numpy(self.rng("ids").integers(0, vocabulary, tuple(mask.shape)))
        if pad is None or pad < 0:
            return ids
        # A text of padding tokens alone is classified by its first token, which may be one that nobody looks at.
        first = mask.argmax(1, keepdim=True)
        ids = ids.scatter(
            1, first, torch.where(ids.gather(1, first) == pad, (pad + 1) % vocabulary, ids.gather(1, first))
        )
        return ids.masked_fill(mask == 0, pad)

    def rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose.encode()])


@st.composite
def rope_settings(draw: st.DrawFn, rope_type: str, head_dim: int) -> Settings:
    """One type's settings; contexts are as short as the texts, so that these end on both sides of every switch."""
    # float32 numbers, for in dynamic RoPE the graph computes with them; for the other types any number would do.
    numbers, amounts = st.floats(1.0, 32.0, width=32), st.floats(0.25, 4.0, width=32)
    rope: Settings = {"rope_type": rope_type, "rope_theta": draw(st.sampled_from([10000.0, 500000.0]) | st.floats(4.0, 1e6, width=32))}  # fmt: skip
    if rope_type in ("linear", "dynamic", "llama3", "yarn"):
        rope["factor"] = draw(numbers)
    if rope_type == "llama3" or (rope_type in ("yarn", "longrope") and draw(st.booleans())):
        rope["original_max_position_embeddings"] = draw(st.integers(2, 24))
    if rope_type == "llama3":
        rope["low_freq_factor"] = draw(amounts)
        rope["high_freq_factor"] = rope["low_freq_factor"] + draw(amounts)
    if rope_type == "yarn":
        bounds = {"beta_slow": amounts, "beta_fast": st.floats(4.0, 32.0), "truncate": st.booleans()}
        scales = st.sampled_from([(), ("attention_factor",), ("mscale", "mscale_all_dim")])
        rope |= draw(st.fixed_dictionaries({}, optional=bounds)) | {name: draw(amounts) for name in draw(scales)}
    if rope_type == "longrope":
        divisors = st.lists(st.floats(0.5, 20.0), min_size=head_dim // 2, max_size=head_dim // 2)
        rope |= {"short_factor": draw(divisors), "long_factor": draw(divisors)}
        name = draw(st.sampled_from([None, "attention_factor", "factor"]))
        rope |= {} if name is None else {name: draw(amounts if name == "attention_factor" else numbers)}
    return rope


@st.composite
def configs(draw: st.DrawFn, task: str, rope_type: str) -> Settings:
    """``config.json`` of a tiny model."""
    # dynamic: the graph holds the exponent D / (D - 2) as a float32 number, so the comparison is of one function only
    # where it is one. The other types have no such constant.
    head_dim = draw(st.sampled_from([4, 6, 10, 18] if rope_type == "dynamic" else [4, 2, 6, 8, 12, 16]))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 1, 3]))
    heads = kv_heads * group
    states_head_dim = draw(st.booleans())
    # Hugging Face wants hidden_size to be a multiple of the heads even where head_dim is stated.
    width = draw(st.integers(math.ceil(8 / heads), 64 // heads)) if states_head_dim else head_dim
    config: Settings = {
        "model_type": "llama", "architectures": [CLASSES[task]],
        "vocab_size": draw(st.integers(13, 40)), "hidden_size": heads * width,
        "intermediate_size": draw(st.integers(5, 48)), "num_hidden_layers": draw(st.sampled_from([2, 1, 3])),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": draw(st.integers(4, 24)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 1e-12, 0.1])),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "tie_word_embeddings": draw(st.booleans()), "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans()),
        "pretraining_tp": draw(st.sampled_from([1, 2, 4])),
        "pad_token_id": draw(st.none() | st.integers(0, 12) | st.just(-1)),
    }  # fmt: skip
    if states_head_dim:
        config["head_dim"] = head_dim
    if task in ("sequence-classification", "token-classification"):
        config["num_labels"] = draw(st.integers(1, 4))
    if task == "sequence-classification":
        several = [None, "single_label_classification", "multi_label_classification", "regression"]
        config["problem_type"] = draw(st.sampled_from([name for name in several if config["num_labels"] > 1 or name != several[1]]))  # fmt: skip
    if task == "token-classification":
        config["token_classification_bias"] = draw(st.booleans())
    return config | draw(rope_settings(rope_type, head_dim).flatmap(spellings))


def spellings(rope: Settings) -> st.SearchStrategy[Settings]:
    """``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` of earlier ones."""
    scaling = {"type": rope["rope_type"], **{key: rope[key] for key in rope if key not in ("rope_type", "rope_theta")}}
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
    return st.sampled_from([{"rope_parameters": rope}, old])


@st.composite
def cases(draw: st.DrawFn, task: str, rope_type: str) -> Case:
    config = draw(configs(task, rope_type))
    pad, is_classifier = config["pad_token_id"], task == "sequence-classification"
    rows = draw(st.integers(1, 1 if is_classifier and pad is None else 3))
    chunk = st.tuples(*[st.integers(1, 12)] * rows)
    # A padding token that no text has makes padding on the right the end of the text.
    sides = ["left"] if is_classifier and pad == -1 else ["right", "left"]
    return Case(
        task=task,
        config=config,
        lengths=draw(chunk),
        more=draw(chunk) if task == "causal-lm" else (),
        side=draw(st.sampled_from(sides)),
        implementation=draw(st.sampled_from(tuple(ATTENTION_CLASSES))),
        float_labels=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def settings_reached(case: Case) -> set[str]:
    """What the examples taken together must have had."""
    config = config_from_dict(case.config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sharing = "a head each" if heads == kv_heads else "one key/value head" if kv_heads == 1 else "groups"
    padding = f"padding on the {case.side}" if min(case.lengths) < max(case.lengths) else "no padding"
    found = {
        sharing, padding, case.implementation,
        "rope_parameters" if "rope_parameters" in case.config else "rope_scaling",
        f"head_dim {'is' if config.head_dim * heads == config.hidden_size else 'is not'} hidden_size / heads",
        f"act is {'silu' if config.hidden_act in ('silu', 'swish') else 'another'}",
        f"tied {config.tie_word_embeddings}", f"attention_bias {config.attention_bias}", f"mlp_bias {config.mlp_bias}",
        f"vocabulary {'is' if config.vocab_size % 8 == 0 else 'is not'} a multiple of 8",
        f"pad {'none' if config.pad_token_id is None else 'of old' if config.pad_token_id < 0 else 'stated'}",
        f"eps {config.rms_norm_eps}", f"layers {config.num_hidden_layers}", f"tp {case.config['pretraining_tp']}",
    }  # fmt: skip
    if case.task == "sequence-classification":
        found.add(f"classified {'without' if config.pad_token_id is None else 'with'} a padding token")
    if case.follows_length:
        limit = config.rope.original_max_position_embeddings or config.max_position_embeddings
        totals = [*case.lengths, *(sum(pair) for pair in zip(case.lengths, case.more, strict=False))]
        found |= {f"{case.rope_type} {'beyond' if total > limit else 'within'} its limit" for total in totals}
    return found


# ---- the two models ---------------------------------------------------------------------------------------------


@contextmanager
def in_float64() -> Iterator[None]:
    """Within it every float32 that transformers asks for by name is float64.

    That reaches the norm's ``.to(torch.float32)``, the rotary embedding's ``.float()`` and ``torch.float``, the softmax's
    ``dtype=torch.float32``, the losses' ``.float()``, and dynamic RoPE's quotients of integers (the default dtype). Ours
    runs outside of it. That nothing is left is tested, not assumed.
    """
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def hugging_face(case: Case) -> Any:
    """Their model in float64 with random weights that are float32 numbers; norms and biases are random, too."""
    stated = copy.deepcopy({key: value for key, value in case.config.items() if key != "model_type"})
    config = transformers.LlamaConfig(**stated)  # which modifies the dictionaries that it is given
    config._attn_implementation = "eager"
    model = getattr(transformers, CLASSES[case.task])(config).eval()
    rng = case.rng("weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = rng.standard_normal(tuple(parameter.shape))
            if name.endswith("norm.weight"):
                noise = 1 + 0.2 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif not name.endswith("embed_tokens.weight"):
                noise = noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(noise))
    model.double()
    # Attributes of ONNX nodes are float32 numbers, and the reference computes with these in float64, too. The same
    # function of real numbers, then, is theirs with the same constants.
    for module in model.modules():
        if isinstance(module, theirs_llama.LlamaRMSNorm):
            module.variance_epsilon = float(np.float32(module.variance_epsilon))
        elif isinstance(module, theirs_llama.LlamaAttention):
            module.scaling = float(np.float32(module.scaling))
    return model


def forget(model: Any) -> Any:
    """A fresh rotary embedding, with float32 frequencies: that of dynamic RoPE remembers the longest text it has seen."""
    assert torch.get_default_dtype() == torch.float32, "within in_float64 the frequencies would be other ones"
    rotary = theirs_llama.LlamaRotaryEmbedding(model.config)
    # longrope computes its second set of frequencies on the first call: here, in float32, as the others were.
    rotary(torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64))
    rotary.double()
    rotary.attention_scaling = float(np.float32(rotary.attention_scaling))
    model.base_model.rotary_emb = rotary
    return model


def references(case: Case, model: Any, fault: Callable[[Any], None] = lambda model: None) -> dict[str, Any]:
    """Ours in float64, for each implementation of attention, from a checkpoint with their model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
        weights = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
        write_tensors(
            Path(folder) / "model.safetensors",
            {name: ("F32", values.shape, values.tobytes()) for name, values in weights.items()},
        )
        ours = {
            name: load_reference(Path(folder), torch.float64, attn_implementation=name) for name in ATTENTION_CLASSES
        }
    for reference in ours.values():
        fault(reference)
    return ours


def bare(name: str) -> str:
    """The name of a parameter without that of the decoder, which differs by class."""
    return re.sub(r"^(model|transformer)\.", "", name)


# ---- the comparison ---------------------------------------------------------------------------------------------


def check(limits: Limits, kind: str, what: str, got: Tensor, want: Tensor, *, floor: float = 0.0) -> None:
    """``floor``: the least that counts as the largest wanted value."""
    assert got.dtype == torch.float64, f"{what}: {got.dtype}"
    assert want.dtype == torch.float64 or limits is not FLOAT64, f"{what} of transformers: {want.dtype}"
    found = difference([(what, got.detach(), want.detach())])
    error = found.max_abs / max(found.largest, floor) if found.max_abs else 0.0
    limit = limits.training if kind in ("loss", "gradient") else limits.result
    if limits is FLOAT64 and error <= limit:
        worst[kind] = max(worst.get(kind, 0.0), error)
    assert error <= limit, f"{what}: off by {error:.2g} of the largest value, at {found.worst}"


def compare(
    case: Case, limits: Limits = FLOAT64, inside: Inside = in_float64, fault: Callable[[Any], None] = lambda model: None
) -> None:
    """Results, cache, loss and gradients of both models.

    Args:
        case: what to compare.
        limits: largest errors.
        inside: the context that transformers runs in.
        fault: done to each of our models, to see it found.
    """
    model = hugging_face(case)
    ours = references(case, model, fault)
    compare_without_cache(case, limits, inside, model, ours)
    if case.task == "causal-lm":
        compare_with_cache(case, limits, inside, model, ours)
    compare_losses(case, limits, inside, model, ours[case.implementation])


def compare_without_cache(case: Case, limits: Limits, inside: Inside, model: Any, ours: dict[str, Any]) -> None:
    """Hidden states of every layer, and what the head makes of them, wherever there is no padding."""
    ids, mask = case.ids, case.mask
    found = {}
    with torch.no_grad():
        for name, reference in ours.items():
            states = reference.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
            found[name] = states, our_results(case, reference, ids, mask)
    for rows, count in pieces(case):
        valid = mask[rows, :count] != 0
        forget(model)
        with torch.no_grad(), inside():
            out = model(ids[rows, :count], attention_mask=mask[rows, :count], output_hidden_states=True)
        want_results = their_results(case, out, mask[rows, :count])
        for name, (states, results) in found.items():
            for layer, (got, want) in enumerate(zip(states, out.hidden_states, strict=True)):
                what = f"{name}: hidden states {layer} of rows {rows}"
                check(limits, "hidden states", what, got[rows, :count][valid], want[valid])
            assert set(results) == set(want_results)
            for result, want in want_results.items():
                got = results[result][rows]
                if is_per_token(case, result):
                    got, want = got[:, :count][valid], want[valid]
                check(limits, "logits", f"{name}: {result} of rows {rows}", got, want)


def pieces(case: Case) -> list[tuple[slice, int]]:
    """What of the batch transformers computes at a time, as rows and columns.

    Its dynamic and longrope frequencies are those of the longest row, padding included. Ours are each row's own: the
    oracle is the row alone, up to its last token.
    """
    mask = case.mask
    if not case.follows_length:
        return [(slice(None), mask.shape[1])]
    return [(slice(row, row + 1), int(mask[row].nonzero().max()) + 1) for row in range(len(mask))]


def our_results(case: Case, model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Name -> result. Without a cache, the causal LM computes logits on the way to its loss only."""
    if case.task == "causal-lm":
        return {"logits": model.loss(ids, ids, mask)[1]}
    results = model(ids, mask)
    return {"logits": results} if isinstance(results, Tensor) else results._asdict()


def their_results(case: Case, out: Any, mask: Tensor) -> dict[str, Tensor]:
    if case.task == "question-answering":
        return {"start_logits": out.start_logits, "end_logits": out.end_logits}
    if case.task != "feature-extraction":
        return {"logits": out.logits}
    last = torch.tensor([int(row.nonzero().max()) for row in mask])
    hidden = out.last_hidden_state
    return {"last_hidden_state": hidden, "sentence_embedding": hidden[torch.arange(len(last)), last]}


def is_per_token(case: Case, result: str) -> bool:
    return case.task != "sequence-classification" and result != "sentence_embedding"


def compare_with_cache(case: Case, limits: Limits, inside: Inside, model: Any, ours: dict[str, Any]) -> None:
    """Prefill, a second chunk and two single tokens: logits, hidden states and the whole cache after each.

    Ours is one ragged batch. Theirs is every row alone, which is fresh and has no padding.
    """
    rows = len(case.lengths)
    chunks = [torch.tensor(counts) for counts in (case.lengths, case.more, (1,) * rows, (1,) * rows)]
    rng, vocabulary = case.rng("chunks"), case.config["vocab_size"]
    ids = [torch.from_numpy(rng.integers(0, vocabulary, (rows, int(counts.max())))) for counts in chunks]
    wanted = [
        their_steps(forget(model), [part[row : row + 1, : counts[row]] for part, counts in zip(ids, chunks, strict=True)], inside)
        for row in range(rows)
    ]  # fmt: skip
    capacity = sum(part.shape[1] for part in ids)
    for name, reference in ours.items():
        # What no token has been written to must not count, whatever it holds.
        cache = [tuple(part.fill_(math.nan) for part in layer) for layer in reference.empty_cache(rows, capacity)]
        past = torch.zeros(rows, dtype=torch.int64)
        for step, (part, counts) in enumerate(zip(ids, chunks, strict=True)):
            with torch.no_grad():
                index = torch.arange(part.shape[1]).expand(rows, -1)
                decoded = reference.model(part, KVCache(past, counts, cache), output_hidden_states=True)
                logits, cache = reference(part, past, counts, index, cache)
            past = past + counts
            for row, steps in enumerate(wanted):
                want_logits, want_states, want_cache = steps[step]
                what, count, total = f"{name}: row {row}, step {step}", int(counts[row]), int(past[row])
                check(limits, "logits", f"{what}, logits", logits[row, :count], want_logits[0])
                for layer, (got, want) in enumerate(zip(decoded.hidden_states, want_states, strict=True)):
                    check(limits, "hidden states", f"{what}, hidden states {layer}", got[row, :count], want[0])
                for present in (cache, decoded.present_key_values):
                    for layer, (got_pair, want_pair) in enumerate(zip(present, want_cache, strict=True)):
                        for side, got, want in zip(("key", "value"), got_pair, want_pair, strict=True):
                            check(limits, "cache", f"{what}, {side} of layer {layer}", got[row, :, :total], want[0])


def their_steps(model: Any, parts: list[Tensor], inside: Inside) -> list[tuple[Any, Any, Any]]:
    """Logits, hidden states and cache after each part of one row."""
    cache, steps = transformers.DynamicCache(config=model.config), []
    with torch.no_grad(), inside():
        for part in parts:
            out = model(part, past_key_values=cache, use_cache=True, output_hidden_states=True)
            steps.append((out.logits, out.hidden_states, [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]))  # fmt: skip
    return steps


def compare_losses(case: Case, limits: Limits, inside: Inside, model: Any, reference: Any) -> None:
    """The loss, and the gradient of every parameter."""
    ids, mask, labels = case.ids, case.mask, labels_of(case)
    # A query that sees nothing but padding attends to nothing in ours and in PyTorch's sdpa, which transformers uses by
    # default; to everything in its eager attention. The first token's label and a span's scores feel that.
    model.config._attn_implementation = "sdpa" if case.side == "left" else "eager"
    reference.requires_grad_()
    for rows, columns in batches(case):
        some_ids, some_mask = ids[rows, columns], mask[rows, columns]
        # Labels are one a text or, in the first two axes, one a token.
        some = {
            name: values[rows] if case.task == "sequence-classification" or values.dim() == 1 else values[rows, columns]
            for name, values in labels.items()
        }
        forget(model)
        with inside():
            want = their_loss(case, model, some_ids, some_mask, some)
            their_gradients = gradients(want, model)
        got = our_loss(case, reference, some_ids, some_mask, some)
        if not any_label_counts(case, some, some_ids.shape[1]):  # a mean of nothing
            assert want.isnan()
            assert got.isnan(), f"loss of rows {rows}: {got}, expected NaN"
            continue
        check(limits, "loss", f"loss of rows {rows}", got, want)
        our_gradients = gradients(got, reference)
        assert set(our_gradients) == set(their_gradients), "other parameters"
        floor = limits.least * max(float(gradient.abs().max()) for gradient in their_gradients.values())
        for name, gradient in their_gradients.items():
            check(limits, "gradient", f"gradient of {name}", our_gradients[name], gradient, floor=floor)


def batches(case: Case) -> list[tuple[slice, slice]]:
    """Which rows and columns a loss is taken of: all at once, or the rows one by one without their padding on the right.

    One by one where transformers would lengthen a row by its padding, and where a loss looks at the scores of padding,
    whose queries attend to the text before it, except in flash attention.
    """
    looks = case.task == "question-answering" and case.implementation == "flash_attention_2"
    if case.side == "right" and (case.follows_length or looks):
        return [(slice(row, row + 1), slice(0, length)) for row, length in enumerate(case.lengths)]
    return [(slice(None), slice(None))]


def any_label_counts(case: Case, labels: dict[str, Tensor], width: int) -> bool:
    """``width``: columns of the batch."""
    if case.task == "question-answering":
        # A position beyond the text does not count, and each of the two is a mean of its own.
        return all(bool((at < width).any()) for at in labels.values())
    if case.task == "feature-extraction" or labels["labels"].is_floating_point():
        return True
    counted = labels["labels"][:, 1:] if case.task == "causal-lm" else labels["labels"]
    return bool((counted != -100).any())


def labels_of(case: Case) -> dict[str, Tensor]:
    """Labels by the name that transformers gives them; some of them do not count."""
    rng, mask, config = case.rng("labels"), case.mask, config_from_dict(case.config)
    rows, classes = len(mask), config.num_labels
    ignored = torch.from_numpy(rng.random(tuple(mask.shape)) < 0.2) | (mask == 0)
    if case.task == "causal-lm":
        return {"labels": case.ids.masked_fill(ignored, -100)}
    if case.task == "token-classification":
        return {"labels": torch.from_numpy(rng.integers(0, classes, tuple(mask.shape))).masked_fill(ignored, -100)}
    if case.task == "question-answering":  # before the text, in it, and beyond it
        names = ("start_positions", "end_positions")
        return {name: torch.from_numpy(rng.integers(-2, mask.shape[1] + 3, rows)) for name in names}
    if case.task == "feature-extraction":  # no labels: any function of the result has gradients
        return {"directions": torch.from_numpy(rng.standard_normal((*mask.shape, config.hidden_size)))}
    problem = config.problem_type
    if problem is None and classes > 1:
        problem = "multi_label_classification" if case.float_labels else "single_label_classification"
    if problem == "single_label_classification":
        numbers = torch.from_numpy(rng.integers(0, classes, rows))
        return {"labels": numbers.masked_fill(torch.from_numpy(rng.random(rows) < 0.2), -100)}
    if problem == "multi_label_classification":
        return {"labels": torch.from_numpy(rng.integers(0, 2, (rows, classes)).astype(np.float64))}
    # Values of a single label come as [B] and as [B, 1].
    return {"labels": torch.from_numpy(rng.standard_normal((rows,) if classes == 1 and not case.float_labels else (rows, classes)))}  # fmt: skip


def our_loss(case: Case, model: Any, ids: Tensor, mask: Tensor, labels: dict[str, Tensor]) -> Tensor:
    if case.task == "feature-extraction":
        return features_loss(model(ids, mask).last_hidden_state, mask, labels["directions"])
    loss, _ = model.loss(ids, labels["labels"], mask) if case.task == "causal-lm" else model.loss(ids, mask, **labels)
    assert isinstance(loss, Tensor)
    return loss


def their_loss(case: Case, model: Any, ids: Tensor, mask: Tensor, labels: dict[str, Tensor]) -> Tensor:
    if case.task == "feature-extraction":
        return features_loss(model(ids, attention_mask=mask).last_hidden_state, mask, labels["directions"])
    loss = model(ids, attention_mask=mask, **labels).loss
    assert isinstance(loss, Tensor)
    return loss


def features_loss(hidden_states: Tensor, mask: Tensor, directions: Tensor) -> Tensor:
    return (hidden_states * directions)[mask != 0].sum()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Bare name -> gradient, of zeros for what the loss does not depend on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return {bare(name): gradient for name, gradient in zip(names, found, strict=True)}


# ---- tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "rope_type"), COMBINATIONS)
def test_reference_is_transformers_in_float64(task: str, rope_type: str) -> None:
    examples = reached[task, rope_type] = set()

    @seed(SEED)
    @settings(patient, max_examples=EACH, database=None, print_blob=True, phases=(Phase.generate, Phase.shrink))
    @given(cases(task, rope_type))
    def run(case: Case) -> None:
        examples.update(settings_reached(case))
        compare(case)

    run()


def test_the_examples_reached_every_setting() -> None:
    if set(reached) != set(COMBINATIONS) or EXAMPLES < 40:
        pytest.skip("only some of the examples ran")
    every = {
        "a head each", "one key/value head", "groups", "no padding", "padding on the left", "padding on the right",
        *ATTENTION_CLASSES, "rope_parameters", "rope_scaling", "head_dim is hidden_size / heads",
        "head_dim is not hidden_size / heads", "act is silu", "act is another", "tied True", "tied False",
        "attention_bias True", "attention_bias False", "mlp_bias True", "mlp_bias False",
        "vocabulary is a multiple of 8", "vocabulary is not a multiple of 8", "pad none", "pad stated", "pad of old",
        "eps 1e-05", "eps 1e-06", "eps 1e-12", "eps 0.1", "layers 1", "layers 2", "layers 3", "tp 1", "tp 2", "tp 4",
        "classified with a padding token", "classified without a padding token", "dynamic within its limit", "dynamic beyond its limit",
        "longrope within its limit", "longrope beyond its limit",
    }  # fmt: skip
    assert set().union(*reached.values()) == every


ROPE: dict[str, Settings] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 6,
        "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 8.0],
    },
}  # fmt: skip


def example(task: str, rope_type: str = "default", **changes: Any) -> Case:
    """A ragged batch in which everything takes part; rows end on both sides of the limits of dynamic and longrope."""
    config = {
        "model_type": "llama", "architectures": [CLASSES[task]], "vocab_size": 29, "hidden_size": 16,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 6, "max_position_embeddings": 6, "rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True,
        "hidden_act": "gelu", "pad_token_id": 5, "num_labels": 3, "rope_parameters": ROPE[rope_type],
    }  # fmt: skip
    fields = {name: changes.pop(name) for name in tuple(changes) if name in Case.__dataclass_fields__}
    more = {"more": (2, 4, 1)} if task == "causal-lm" else {}
    return Case(**{"task": task, "config": config | changes, "lengths": (7, 3, 6), "seed": 1, **more, **fields})


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_every_activation_is_theirs(hidden_act: str) -> None:
    compare(example("token-classification", hidden_act=hidden_act))


def test_float32_inside_transformers_is_as_near_as_float32_is() -> None:
    """transformers as it is. This is the test that would notice if :func:`in_float64` changed what it computes."""
    for task, rope_type in COMBINATIONS:
        compare(example(task, rope_type), FLOAT32, nullcontext)


class _Dtypes(TorchDispatchMode):
    """Collects the float dtypes of everything that PyTorch computes within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and item.is_floating_point():
                self.found.add(item.dtype)
        return result


@pytest.mark.parametrize(("task", "rope_type"), COMBINATIONS)
def test_nothing_inside_transformers_is_float32(task: str, rope_type: str) -> None:
    case = example(task, rope_type)
    model = hugging_face(case)
    states, losses = {}, {}
    for name, inside, dtypes in (("as it is", nullcontext, {torch.float32, torch.float64}), ("float64", in_float64, {torch.float64})):  # fmt: skip
        forget(model)
        with inside(), _Dtypes() as seen:
            states[name] = model(case.ids, attention_mask=case.mask, output_hidden_states=True).hidden_states
            losses[name] = their_loss(case, model, case.ids, case.mask, labels_of(case))
            gradients(losses[name], model)
        assert seen.found == dtypes
    assert all(float((wide - narrow).abs().max().detach()) > 1e-12 for wide, narrow in zip(states["float64"][1:], states["as it is"][1:], strict=True))  # fmt: skip
    assert float((losses["float64"] - losses["as it is"]).abs().detach()) > 1e-12
    assert torch.float32 != torch.float64
    assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.get_default_dtype() == torch.float32


def test_several_texts_without_a_padding_token_are_an_error_in_both() -> None:
    case = example("sequence-classification", pad_token_id=None)
    model = hugging_face(case)
    for reference in references(case, model).values():
        with pytest.raises(ShapeError, match="names no padding token"):
            reference(case.ids, case.mask)
    with pytest.raises(ValueError, match="no padding token is defined"):
        model(case.ids, attention_mask=case.mask)
    compare(replace(case, lengths=(7,)))


def test_pretraining_tp_is_accepted_and_without_effect() -> None:
    for task in CLASSES:
        config = example(task).config
        assert config_from_dict({**config, "pretraining_tp": 4}) == config_from_dict(config)
        compare(example(task, pretraining_tp=4))


@pytest.mark.parametrize("float_labels", [False, True])
@pytest.mark.parametrize("problem_type", [None, *PROBLEM_TYPES])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_every_loss_of_a_classifier_is_theirs(num_labels: int, problem_type: str | None, float_labels: bool) -> None:
    case = example(
        "sequence-classification", num_labels=num_labels, problem_type=problem_type, float_labels=float_labels
    )
    if num_labels == 1 and problem_type == "single_label_classification":
        with pytest.raises(ConfigError, match="bad value for problem_type"):
            config_from_dict(case.config)
        return
    compare(case)


def test_a_tied_head_is_one_parameter_with_the_embedding() -> None:
    compare(example("causal-lm", tie_word_embeddings=True))
    compare(example("causal-lm", tie_word_embeddings=True, pad_token_id=None))


def test_heads_of_two_channels() -> None:
    compare(example("causal-lm", head_dim=2))


# ---- injected faults --------------------------------------------------------------------------------------------


def layers(model: Any) -> Iterator[Any]:
    yield from model.model.layers


def _epsilon(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.epsilon *= 1.01


def _scale_of_hidden_size(model: Any) -> None:
    for layer in layers(model):
        layer.self_attn.scale = 1 / math.sqrt(model.config.hidden_size / model.config.num_attention_heads)


def _no_bias(name: str, model: Any) -> None:
    module = list(layers(model))[-1].get_submodule(name)
    module.bias = nn.Parameter(torch.zeros_like(module.bias), requires_grad=False)


def _norms_exchanged(model: Any) -> None:
    for layer in layers(model):
        layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


def _another_gelu(model: Any) -> None:
    for layer in layers(model):
        layer.mlp.act_fn = partial(nn.functional.gelu, approximate="tanh")


def _float32_angles(model: Any) -> None:
    model.model.rotary_emb.set_frequencies(torch.float32)


def _head_of_its_own(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _start_and_end_exchanged(model: Any) -> None:
    for parameter in (model.qa_outputs.weight, model.qa_outputs.bias):
        parameter.copy_(parameter.flip(0))


def _padding_token_trained(model: Any) -> None:
    model.model.embed_tokens.padding_idx = None


def _unscaled_rotation(model: Any) -> None:
    model.model.rotary_emb.scaling = 1.0


def _frequencies_of_another_type(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = 10000.0 ** -(torch.arange(len(rotary.inv_freq)).double() / len(rotary.inv_freq))


MODEL_FAULTS: dict[str, tuple[Case, Callable[[Any], None]]] = {
    "epsilon": (example("feature-extraction"), _epsilon),
    "softmax scale of another head_dim": (example("causal-lm"), _scale_of_hidden_size),
    **{
        f"{name} without its bias": (example("token-classification"), partial(_no_bias, name))
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    },
    "norms exchanged": (example("feature-extraction"), _norms_exchanged),
    "another gelu": (example("feature-extraction"), _another_gelu),
    "angles in float32": (example("causal-lm"), _float32_angles),
    **{
        f"{rope_type} taken for default": (example("feature-extraction", rope_type), _frequencies_of_another_type)
        for rope_type in ("linear", "llama3", "yarn", "longrope")
    },
    "yarn without its factor on cos and sin": (example("feature-extraction", "yarn"), _unscaled_rotation),
    "longrope without its factor on cos and sin": (
        example("feature-extraction", "longrope", max_position_embeddings=24), _unscaled_rotation,
    ),
    "a tied head trained on its own": (example("causal-lm", tie_word_embeddings=True), _head_of_its_own),
    "start and end exchanged": (example("question-answering"), _start_and_end_exchanged),
    "gradient of the padding token": (example("causal-lm", side="left"), _padding_token_trained),
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_a_fault_in_the_model_is_found(name: str) -> None:
    case, fault = MODEL_FAULTS[name]
    compare(case)
    with pytest.raises(AssertionError, match=r"off by|other parameters"):
        compare(case, fault=fault)


def _rotate_neighbours(patch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin, first, second = cos.unsqueeze(1), sin.unsqueeze(1), x[..., ::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)

    patch.setattr(our_attention, "rotate", rotate)


def _rotate_backwards(patch: pytest.MonkeyPatch) -> None:
    right = our_attention.rotate
    patch.setattr(our_attention, "rotate", lambda x, cos, sin: right(x, cos, -sin))


def _repeat_heads_in_turn(patch: pytest.MonkeyPatch) -> None:
    right = LlamaSdpaAttention._sdpa

    def sdpa(self: LlamaSdpaAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return right(self, q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), visible)

    patch.setattr(LlamaSdpaAttention, "_sdpa", sdpa)


def _see_the_next_token(patch: pytest.MonkeyPatch) -> None:
    right = our_attention.visible_in_cache
    patch.setattr(our_attention, "visible_in_cache", lambda past, *sizes: right(past + 1, *sizes))


def _see_padding(patch: pytest.MonkeyPatch) -> None:
    right = our_attention.causal_and_unpadded
    patch.setattr(our_attention, "causal_and_unpadded", lambda mask: right(torch.ones_like(mask)))


def _positions_of_the_chunk(patch: pytest.MonkeyPatch) -> None:
    right = LlamaRotaryEmbedding.forward
    patch.setattr(LlamaRotaryEmbedding, "forward", lambda self, at, length=None: right(self, at - at[:, :1], length))


def _another_length(change: Callable[[Tensor], Tensor], patch: pytest.MonkeyPatch) -> None:
    right = LlamaRotaryEmbedding._frequencies
    patch.setattr(LlamaRotaryEmbedding, "_frequencies", lambda self, length: right(self, change(length)))


def _another_end(change: Callable[[Tensor, Tensor], Tensor], patch: pytest.MonkeyPatch) -> None:
    right = our_heads.attended_length
    patch.setattr(our_heads, "attended_length", lambda mask: change(right(mask), mask))


def _other_labels(task: str, change: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
    """``change`` is given the arguments of ``loss`` after ``input_ids``."""
    right = MODEL_CLASSES[task].loss
    patch.setattr(MODEL_CLASSES[task], "loss", lambda self, ids, *given, **named: right(self, ids, *change(*given, **named)))  # fmt: skip


def _counted(labels: Tensor) -> Tensor:
    return labels.masked_fill(labels == -100, 0)


CODE_FAULTS: dict[str, tuple[Case, Callable[[pytest.MonkeyPatch], None]]] = {
    "rotation of neighbours": (example("causal-lm"), _rotate_neighbours),
    "rotation backwards": (example("causal-lm"), _rotate_backwards),
    "key/value heads in turn": (example("causal-lm"), _repeat_heads_in_turn),
    "a query sees the next token": (example("causal-lm"), _see_the_next_token),
    "a query sees padding": (example("token-classification", side="left"), _see_padding),
    "positions begin again with each chunk": (example("causal-lm"), _positions_of_the_chunk),
    **{
        f"{rope_type} switches one token {when}": (
            example("causal-lm", rope_type), partial(_another_length, lambda length, by=by: length + by),
        )
        for rope_type in ("dynamic", "longrope") for when, by in (("early", 1), ("late", -1))
    },
    **{
        f"{rope_type} by the longest row": (
            example("causal-lm", rope_type), partial(_another_length, lambda length: length.max().expand_as(length)),
        )
        for rope_type in ("dynamic", "longrope")
    },
    "class scores of the token before the last": (
        example("sequence-classification"), partial(_another_end, lambda length, mask: length - 1),
    ),
    "embedding of the last column": (
        example("feature-extraction"), partial(_another_end, lambda length, mask: torch.full_like(length, mask.shape[1])),
    ),
    "labels not shifted": (
        example("causal-lm"), partial(_other_labels, "causal-lm", lambda labels, mask: (labels.roll(1, 1), mask)),
    ),
    "labels of -100 count in the causal LM": (
        example("causal-lm"), partial(_other_labels, "causal-lm", lambda labels, mask: (_counted(labels), mask)),
    ),
    "labels of -100 count in the token classifier": (
        example("token-classification"),
        partial(_other_labels, "token-classification", lambda mask, labels: (mask, _counted(labels))),
    ),
    "answers beyond the text count": (
        example("question-answering"),
        partial(
            _other_labels, "question-answering",
            lambda mask, start_positions, end_positions: (
                mask, *(at.clamp(max=mask.shape[1] - 1) for at in (start_positions, end_positions)),
            ),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE_FAULTS)
def test_a_fault_in_the_code_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, fault = CODE_FAULTS[name]
    compare(case)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="off by"):
        compare(case)
