"""The PyTorch reference against Hugging Face's Llama (float32) and against the NumPy oracle (float64)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.checkpoint.safetensors import TensorEntry
from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import RopeConfig
from llama_export.model import LlamaForCausalLM, load_reference
from llama_export.model.loading import read_tensor
from llama_export.model.rope import inverse_frequencies

BASE: dict[str, Any] = {
    "hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 100, "vocab_size": 97, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
# wavelengths of theta 10000 at head_dim 16 are 6, 20, 63, ...: short, medium and long ones for a context of 32
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {"rope_parameters": LLAMA3},
    "theta 500000": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "tied": {"tie_word_embeddings": True},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads": {"num_key_value_heads": 6},
    "head_dim from hidden_size": {"head_dim": 12},
    "wide heads": {"head_dim": 32},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
}
PROMPT, STEPS = 13, 6


@dataclass(frozen=True)
class Variant:
    """One random model three times over: Hugging Face's, ours in float32, ours in float64."""

    folder: Path
    theirs: Any
    ours: LlamaForCausalLM
    ours64: LlamaForCausalLM


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    folder = tmp_path_factory.mktemp("variant")
    theirs = oracles.huggingface_llama(folder, seed=3, **{**BASE, **VARIANTS[request.param]})
    return Variant(folder, theirs, load_reference(folder), load_reference(folder, torch.float64))


@pytest.fixture(scope="module")
def model64(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    folder = tmp_path_factory.mktemp("model64")
    oracles.huggingface_llama(folder, seed=4, **{**BASE, "rope_parameters": LLAMA3})
    return load_reference(folder, torch.float64)


def random_ids(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 97, (rows, count)))


def run(
    model: LlamaForCausalLM, ids: torch.Tensor, past: list[int], cache: Any, valid: list[int] | None = None
) -> tuple[torch.Tensor, Any]:
    """Logits of all positions, and the new cache."""
    B, S = ids.shape
    lengths = torch.tensor(valid if valid is not None else [S] * B)
    return model(ids, torch.tensor(past), lengths, torch.arange(S).expand(B, S), cache)


def test_reference_is_hugging_face_on_prefill_and_decode(variant: Variant) -> None:
    from transformers import DynamicCache

    ids = random_ids(1, PROMPT + STEPS)
    cache, their_cache = variant.ours.empty_cache(1, 32), DynamicCache(config=variant.theirs.config)
    pieces = [slice(0, PROMPT), *(slice(at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]
    for piece in pieces:
        want = variant.theirs(input_ids=ids[:, piece], past_key_values=their_cache, use_cache=True).logits
        got, cache = run(variant.ours, ids[:, piece], [piece.start], cache)
        error = float((got - want).abs().max() / want.abs().max())
        assert error < 1e-5, f"tokens {piece.start} to {piece.stop}: {error:.3g} of the largest logit"
        assert torch.equal(got.argmax(-1), want.argmax(-1))
    for layer, (key, value) in enumerate(cache):
        for got, want in ((key, their_cache.layers[layer].keys), (value, their_cache.layers[layer].values)):
            error = float((got[:, :, : PROMPT + STEPS] - want).abs().max() / want.abs().max())
            assert error < 1e-5, f"cache of layer {layer}: {error:.3g}"


def oracle_from(theirs: Any) -> oracles.Llama:
    """The NumPy model with Hugging Face's weights and frequencies; scale and epsilon as float32 attributes hold them."""
    config = theirs.config
    return oracles.Llama(
        weights={name: tensor.double().numpy() for name, tensor in theirs.state_dict().items()},
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        epsilon=float(np.float32(config.rms_norm_eps)),
        frequencies=theirs.model.rotary_emb.inv_freq.double().numpy(),
        scale=float(np.float32(1 / math.sqrt(config.head_dim))),
    )


def test_float64_reference_is_the_independent_oracle(variant: Variant) -> None:
    ids = random_ids(1, 9, seed=1)
    oracle = oracle_from(variant.theirs)
    want = oracle.logits(ids[0].numpy())
    got, cache = run(variant.ours64, ids, [0], variant.ours64.empty_cache(1, 9))
    assert got.dtype == torch.float64
    error = np.abs(got[0].numpy() - want).max() / np.abs(want).max()
    assert error < 1e-10, f"logits: {error:.3g}"
    for layer, (key, _) in enumerate(cache):
        error = np.abs(key[0].numpy() - oracle.keys[layer]).max() / np.abs(oracle.keys[layer]).max()
        assert error < 1e-10, f"keys of layer {layer}: {error:.3g}"


def test_biases_take_part(variant: Variant) -> None:
    """The parity above would not notice a bias of zero: the random ones must matter."""
    biases = [name for name, _ in variant.ours64.named_parameters() if name.endswith("bias")]
    stated = variant.ours64.config
    assert len(biases) == 2 * (4 * stated.attention_bias + 3 * stated.mlp_bias)
    weights = oracle_from(variant.theirs).weights
    assert {name for name in weights if name.endswith("bias")} == set(biases)
    assert all(np.abs(weights[name]).max() > 0.01 for name in biases)


# ---- frequencies ------------------------------------------------------------------------------------------------

LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def hugging_face_frequencies(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = {**BASE, "max_position_embeddings": 131072, "head_dim": head_dim}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**settings, rope_parameters=rope))
    assert rotary.attention_scaling == 1.0
    return rotary.inv_freq


def our_frequencies(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    config = config_from_dict({"model_type": "llama", **BASE, "head_dim": head_dim, "rope_parameters": rope})
    return inverse_frequencies(config.rope, head_dim)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 10000, 100000.0, 500000.0, 1e6, 8e6])
def test_default_frequencies_are_hugging_faces_to_the_bit(theta: float, head_dim: int) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    got, want = our_frequencies(rope, head_dim), hugging_face_frequencies(rope, head_dim)
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, want), f"{int((got != want).sum())} of {got.numel()} differ"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"factor": 32.0},
        {"rope_theta": 10000.0},
        {"original_max_position_embeddings": 4096},
        {"high_freq_factor": 2.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_llama3_frequencies_are_hugging_faces_to_the_bit(change: dict[str, Any], head_dim: int) -> None:
    """Llama 3.1's settings first (theta 500000, factor 8, low 1, high 4, original 8192), then 3.2's factor 32."""
    rope = {**LLAMA31, **change}
    got, want = our_frequencies(rope, head_dim), hugging_face_frequencies(rope, head_dim)
    assert torch.equal(got, want), f"{int((got != want).sum())} of {got.numel()} differ"
    assert not torch.equal(got, inverse_frequencies(RopeConfig(rope_theta=rope["rope_theta"]), head_dim))


def test_llama3_frequencies_are_metas_formula() -> None:
    got = our_frequencies(LLAMA31, 128).numpy()
    scaling = oracles.Llama3Scaling(8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(got, oracles.llama3_frequencies(500000.0, 128, scaling), rtol=2e-6)
    plain = oracles.default_frequencies(500000.0, 128)
    ratio = plain / got
    kept, blended, slowed = ratio < 1.0001, (ratio > 1.0001) & (ratio < 7.999), ratio > 7.999
    counts = [int(part.sum()) for part in (kept, blended, slowed)]
    assert counts == [29, 6, 29], counts


def test_float32_frequencies_are_the_formula_rounded_to_float32() -> None:
    want = oracles.default_frequencies_float32(10000.0, 128)
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(), 128).numpy(), want, rtol=2.0**-22)


def test_float64_model_rotates_by_the_float32_frequencies(model64: LlamaForCausalLM) -> None:
    inv_freq = model64.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float64
    assert torch.equal(inv_freq, our_frequencies(LLAMA3, 16).double())


# ---- batch, padding, cache --------------------------------------------------------------------------------------


def test_every_row_of_a_ragged_batch_equals_the_row_alone(model64: LlamaForCausalLM) -> None:
    lengths, ids = [8, 3, 1], random_ids(3, 8, seed=2)
    extra = random_ids(3, 4, seed=3)
    logits, cache = run(model64, ids, [0, 0, 0], model64.empty_cache(3, 16), valid=lengths)
    steps = []
    for step in range(4):
        past = [length + step for length in lengths]
        out, cache = run(model64, extra[:, step : step + 1], past, cache)
        steps.append(out)
    for row, length in enumerate(lengths):
        alone, own = run(model64, ids[row : row + 1, :length], [0], model64.empty_cache(1, 16))
        error = float((logits[row, :length] - alone[0]).abs().max() / alone.abs().max())
        assert error < 1e-12, f"row {row}, prefill: {error:.3g}"
        for step in range(4):
            alone, own = run(model64, extra[row : row + 1, step : step + 1], [length + step], own)
            error = float((steps[step][row] - alone[0]).abs().max() / alone.abs().max())
            assert error < 1e-12, f"row {row}, step {step}: {error:.3g}"


def test_padding_tokens_change_nothing_but_their_own_rows(model64: LlamaForCausalLM) -> None:
    ids, lengths = random_ids(2, 8, seed=5), [5, 2]
    other = ids.clone()
    other[0, 5:], other[1, 2:] = 1, 96
    first, second = (run(model64, item, [0, 0], model64.empty_cache(2, 12), valid=lengths) for item in (ids, other))
    for row, length in enumerate(lengths):
        assert torch.equal(first[0][row, :length], second[0][row, :length])
        assert not torch.equal(first[0][row, length:], second[0][row, length:])
    # the next step overwrites what the padding left in the cache
    steps = [run(model64, random_ids(2, 1, seed=6), lengths, cache)[0] for _, cache in (first, second)]
    assert torch.equal(*steps)


def test_chunks_equal_one_prefill(model64: LlamaForCausalLM) -> None:
    ids = random_ids(1, 12, seed=7)
    whole, whole_cache = run(model64, ids, [0], model64.empty_cache(1, 12))
    cache, parts = model64.empty_cache(1, 12), []
    for begin, end in ((0, 5), (5, 6), (6, 11), (11, 12)):
        logits, cache = run(model64, ids[:, begin:end], [begin], cache)
        parts.append(logits)
    error = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())
    assert error < 1e-12, error
    for (key, value), (want_key, want_value) in zip(cache, whole_cache, strict=True):
        assert float((key - want_key).abs().max()) < 1e-12
        assert float((value - want_value).abs().max()) < 1e-12


def test_present_differs_from_past_in_the_new_slots_only(model64: LlamaForCausalLM) -> None:
    past = [(torch.randn_like(key), torch.randn_like(value)) for key, value in model64.empty_cache(2, 10)]
    kept = [(key.clone(), value.clone()) for key, value in past]
    _, present = run(model64, random_ids(2, 3, seed=8), [1, 6], past)
    written = torch.zeros(2, 10, dtype=torch.bool)
    written[0, 1:4] = written[1, 6:9] = True
    for before, after, untouched in zip(past, present, kept, strict=True):
        for old, new, copy in zip(before, after, untouched, strict=True):
            assert torch.equal(old, copy), "the past tensor was modified"
            assert new.shape == old.shape == (2, 2, 10, 16)
            changed = (new != old).any(-1)  # [B, G, C]
            assert torch.equal(changed, written[:, None].expand_as(changed))


def test_logits_index_picks_positions_in_any_order(model64: LlamaForCausalLM) -> None:
    ids = random_ids(2, 6, seed=9)
    cache, lengths = model64.empty_cache(2, 6), torch.tensor([6, 6])
    full, _ = run(model64, ids, [0, 0], cache)
    index = torch.tensor([[5, 0, 5], [2, 3, 1]])
    got, _ = model64(ids, torch.tensor([0, 0]), lengths, index, cache)
    for row in range(2):
        torch.testing.assert_close(got[row], full[row, index[row]], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_logits_are_float32_and_the_cache_has_the_model_dtype(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    model = load_reference(tiny_checkpoint, dtype)
    logits, present = run(model, random_ids(1, 4), [0], model.empty_cache(1, 8))
    assert logits.dtype == torch.float32
    assert {tensor.dtype for pair in present for tensor in pair} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_are_one_tensor(make_checkpoint: Any) -> None:
    model = load_reference(make_checkpoint(tie_word_embeddings=True))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# ---- reading weights --------------------------------------------------------------------------------------------


def test_read_tensor_maps_any_alignment(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for lead in range(5):
        (tmp_path / "weights").write_bytes(b"x" * lead + values.tobytes())
        got = read_tensor(tmp_path, TensorEntry("w", "float32", (3, 4), "weights", lead, 48))
        assert torch.equal(got, torch.from_numpy(values)), f"offset {lead}"
    empty = read_tensor(tmp_path, TensorEntry("w", "float32", (0, 4), "weights", 0, 0))
    assert empty.shape == (0, 4)


def test_an_odd_safetensors_header_gives_the_same_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The format allows any header length, so tensors may start at any byte."""
    raw = (tiny_checkpoint / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size])).encode()
    header += b" " * (1 - len(header) % 2 + 2)  # 8 + an odd length
    assert len(header) % 2 == 1
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    odd, even = load_reference(load_checkpoint(tmp_path)), load_reference(tiny_checkpoint)
    for (name, left), (_, right) in zip(odd.named_parameters(), even.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_changing_a_loaded_weight_leaves_the_file_alone(make_checkpoint: Any) -> None:
    folder = make_checkpoint()
    before = (folder / "model.safetensors").read_bytes()
    model = load_reference(folder)
    model.lm_head.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
