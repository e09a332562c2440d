"""``--convert-weights``: PyTorch's cast, bit by bit, into files that make the bundle a checkpoint of the new dtype."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import TINY, MakeCheckpoint, edit_json
from hypothesis import given
from hypothesis import strategies as st
from random_llama import write_random_checkpoint
from safetensors.torch import load_file
from support import (
    check_refused,
    patient,
    read_safetensors,
    read_tensors,
    snapshot,
    split_in_shards,
    trace_once,
    write_tensors,
)

from llama_export.bundle.bundle import load_bundle
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.config.settings import ExportConfig
from llama_export.errors import CheckpointError, ConfigError
from llama_export.export import conversion
from llama_export.export.conversion import convert, plan_conversion
from llama_export.export.export import export_checkpoint
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.validate import validate_bundle

Capture = pytest.CaptureFixture[str]
WEIGHTS = "model.safetensors"
DTYPES = ("float32", "float16", "bfloat16")
PAIRS = [(source, target) for source in DTYPES for target in DTYPES if source != target]
NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BITS: dict[str, Any] = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


@pytest.fixture(autouse=True)
def _one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)


# ---- numbers ----------------------------------------------------------------------------------------------------


def check_equals_torch(bits: np.ndarray, source: str, target: str) -> None:
    """Bit-equal, signs of zeros included; NaN gives NaN."""
    values = np.ascontiguousarray(bits, BITS[source])
    stored = torch.from_numpy(values.view(f"i{values.itemsize}").copy()).view(getattr(torch, source))
    want = stored.to(getattr(torch, target))
    got = torch.from_numpy(convert(values.view(NUMPY[source]), target).view(f"i{BITS[target]().itemsize}").copy())
    nan = stored.isnan()
    assert torch.equal(nan, want.isnan())
    assert torch.equal(nan, got.view(want.dtype).isnan())
    integers = torch.int32 if target == "float32" else torch.int16
    assert torch.equal(got[~nan], want.view(integers)[~nan])


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] != "float32"])
def test_every_16_bit_value_becomes_what_torch_makes_of_it(source: str, target: str) -> None:
    check_equals_torch(np.arange(1 << 16), source, target)


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_every_tie_of_float32_and_its_neighbours_round_as_in_torch(target: str) -> None:
    """Halfway between any two neighbours, subnormals and the largest too, and one float32 to either side of it."""
    every = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[target]).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    with np.errstate(over="ignore"):
        halfway = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
        largest = finite[-1].astype(np.float64) * (2 if target == "float16" else 1)
        beyond = np.linspace(finite[-1], largest, 4099).astype(np.float32)
    for values in (halfway, finite, beyond, -beyond):
        for step in (-1, 0, 1):
            check_equals_torch(values.view(np.uint32) + np.uint32(step & 0xFFFFFFFF), "float32", target)


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=100))
@patient
def test_any_float32_becomes_what_torch_makes_of_it(bits: list[int]) -> None:
    for target in ("float16", "bfloat16"):
        check_equals_torch(np.array(bits, np.uint32), "float32", target)


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
@patient
def test_special_floats_become_what_torch_makes_of_them(values: list[float]) -> None:
    """Hypothesis favours NaN, infinities, zeros, subnormals and limits."""
    for target in ("float16", "bfloat16"):
        check_equals_torch(np.array(values, np.float32).view(np.uint32), "float32", target)


# ---- files ------------------------------------------------------------------------------------------------------


def converted(checkpoint: Path, output: Path, dtype: str, **options: Any) -> Any:
    return export_checkpoint(checkpoint, output, ExportConfig(dtype=dtype, convert_weights=True, **options))


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("shards", [1, 3])
def test_bundle_is_the_checkpoint_that_torch_would_have_cast(
    source: str, target: str, shards: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(dtype=source)
    if shards > 1:
        split_in_shards(checkpoint, shards)
    before = snapshot(checkpoint)
    result = converted(checkpoint, tmp_path / "out", target)
    assert snapshot(checkpoint) == before
    old, new = sorted(checkpoint.glob("*.safetensors")), sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in new] == [path.name for path in old]
    total = 0
    for left, right in zip(old, new, strict=True):
        was, now = load_file(left), load_file(right)
        assert set(now) == set(was)
        for name, tensor in now.items():
            assert tensor.dtype == getattr(torch, target)
            assert torch.equal(tensor, was[name].to(tensor.dtype)), name
            total += tensor.nbytes
        header, _ = read_safetensors(right)
        assert header["__metadata__"] == {"format": "pt"}
        assert int.from_bytes(right.read_bytes()[:8], "little") % 8 == 0
    assert result.weight_bytes_referenced == total
    assert result.weight_bytes_written == sum(path.stat().st_size for path in new)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.is_file() == (shards > 1)
    if shards > 1:
        data, origin = (json.loads((folder / index.name).read_text()) for folder in (index.parent, checkpoint))
        assert data["metadata"]["total_size"] == total
        assert data["weight_map"] == origin["weight_map"]
    opened = load_checkpoint(tmp_path / "out")
    assert (opened.config.dtype, opened.stored_dtype) == (target, target)
    assert load_bundle(tmp_path / "out").config == opened.config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_graph_has_no_cast_and_equals_that_of_a_checkpoint_stored_so(
    dtype: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    converted(checkpoint, tmp_path / "out", dtype)
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    weights = {item.name for item in graph.initializer if item.external_data}
    assert len(weights) == len(load_checkpoint(checkpoint).tensors)
    assert not [node for node in graph.node if node.op_type == "Cast" and node.input[0] in weights]
    again = tmp_path / "again"
    export_checkpoint(tmp_path / "out", again)
    for name in ("model.onnx", "model.onnxruntime.onnx"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_transformers_loads_the_bundle_as_the_cast_original(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    split_in_shards(checkpoint)
    converted(checkpoint, tmp_path / "out", "bfloat16")
    kwargs: dict[str, Any] = {"local_files_only": True, "attn_implementation": "eager"}
    got = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", **kwargs)
    want = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, **kwargs)
    assert got.dtype == got.config.dtype == torch.bfloat16
    left, right = got.state_dict(), want.state_dict()
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    ids = torch.tensor([[1, 5, 7]])
    assert torch.equal(got(ids).logits, want(ids).logits)


@pytest.mark.parametrize(
    ("stated", "want"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_config_states_the_new_dtype_where_it_stated_the_old(
    stated: dict[str, str], want: dict[str, str], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", **{"dtype": ..., "torch_dtype": ..., **stated})
    converted(checkpoint, tmp_path / "out", "bfloat16")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "out"))
    assert after == {**before, **want}
    load_bundle(tmp_path / "out")


def test_stated_dtype_decides_what_auto_converts_to(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    edit_json(checkpoint / "config.json", torch_dtype="float16", dtype=...)
    assert converted(checkpoint, tmp_path / "out", "auto").dtype == "float16"
    assert load_checkpoint(tmp_path / "out").stored_dtype == "float16"


def test_heads_and_copies_are_converted_and_rope_buffers_keep_their_bytes(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tie_word_embeddings=True)
    tensors = read_tensors(checkpoint / WEIGHTS)
    buffer = np.linspace(0, 1, 7).astype(np.float32).tobytes()  # an odd number: what follows must stay aligned
    first = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [7], buffer)}
    odd = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    write_tensors(checkpoint / WEIGHTS, {**tensors, **odd, **first})
    assert len(load_checkpoint(checkpoint).dropped) == 2
    converted(checkpoint, tmp_path / "out", "float16")
    found = read_tensors(tmp_path / "out" / WEIGHTS)
    assert found["model.layers.0.self_attn.rotary_emb.inv_freq"] == ("F32", [7], buffer)
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert found["lm_head.weight"][0] == "F16"
    assert set(found) == {*tensors, *odd, *first}
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == found.keys()  # every tensor lies where its dtype may
    load_checkpoint(tmp_path / "out")


def test_a_mixed_checkpoint_becomes_one_dtype(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    tensors = read_tensors(checkpoint / WEIGHTS)
    kept = np.full(72, 0.5, np.float16).tobytes()
    write_tensors(checkpoint / WEIGHTS, {**tensors, "model.norm.weight": ("F16", [72], kept)})
    converted(checkpoint, tmp_path / "out", "float16")
    found = read_tensors(tmp_path / "out" / WEIGHTS)
    assert {dtype for dtype, _, _ in found.values()} == {"F16"}
    assert found["model.norm.weight"][2] == kept


def test_blocks_of_any_size_give_the_same_file(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint()
    converted(checkpoint, tmp_path / "whole", "bfloat16")
    monkeypatch.setattr(conversion, "_BLOCK_ELEMENTS", 101)
    seen: list[tuple[str, int, int]] = []
    config = ExportConfig(dtype="bfloat16", convert_weights=True)
    export_checkpoint(checkpoint, tmp_path / "blocks", config, progress=lambda *step: seen.append(step))
    raw = (tmp_path / "blocks" / WEIGHTS).read_bytes()
    assert raw == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert seen[-1] == (WEIGHTS, len(raw), len(raw))
    assert len(seen) > 900


def test_converted_bundle_is_proven(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    converted(make_checkpoint(), tmp_path / "out", "bfloat16", hash_weights=True)
    names = ("bundle", "reference/transformers", "graph/float64-eager", "onnxruntime/decode", "evaluator/bfloat16")
    config = ValidateConfig(steps=3, prompt_tokens=9, stages=names, require=names)
    report = validate_bundle(load_bundle(tmp_path / "out"), config)
    assert report.verdict == "pass", [(stage.name, stage.reason) for stage in report.stages if stage.verdict == "fail"]


# ---- what is refused --------------------------------------------------------------------------------------------


def test_same_dtype_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = make_checkpoint(dtype="float16")
    check_refused(
        capsys, tmp_path, ["export", checkpoint, "-o", tmp_path / "out", "--convert-weights"],
        "nothing to convert: all weights are stored in float16", str(checkpoint), "leave --convert-weights out",
    )  # fmt: skip
    with pytest.raises(ConfigError):
        plan_conversion(load_checkpoint(checkpoint), "float16")


@pytest.mark.parametrize("block", [1 << 22, 50])
@pytest.mark.parametrize(
    ("source", "target", "limit"),
    [("float32", "float16", "65504"), ("bfloat16", "float16", "65504"), ("float32", "bfloat16", "3.38953e+38")],
)
def test_finite_values_that_would_become_infinite_are_named(
    source: str, target: str, limit: str, block: int, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(conversion, "_BLOCK_ELEMENTS", block)
    checkpoint = make_checkpoint(dtype=source)
    tensors = read_tensors(checkpoint / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, content = tensors[name]
    values = np.frombuffer(content, NUMPY[source]).copy()
    values[[3, 4, 5, -1]] = [np.inf, np.nan, -np.inf, 1.0]
    write_tensors(checkpoint / WEIGHTS, {**tensors, name: (dtype, shape, values.tobytes())})
    converted(checkpoint, tmp_path / "first", target)  # what is not finite stays so, and is no overflow
    kept = np.frombuffer(read_tensors(tmp_path / "first" / WEIGHTS)[name][2], NUMPY[target])[3:6].astype(np.float32)
    np.testing.assert_array_equal(kept, [np.inf, np.nan, -np.inf])
    largest = np.array(1e5 if target == "float16" else 3.4e38, NUMPY[source])
    values[[7, 200, -1]] = [
        -largest,
        largest / 2 if target == "float16" else 1,
        70000 if target == "float16" else largest,
    ]
    count = int((np.abs(values.astype(np.float64)) >= (65520 if target == "float16" else 3.3961775e38)).sum()) - 2
    write_tensors(checkpoint / WEIGHTS, {**tensors, name: (dtype, shape, values.tobytes())})
    check_refused(
        capsys, tmp_path, ["export", checkpoint, "-o", tmp_path / "out", "--dtype", target, "--convert-weights"],
        f"tensor `{name}` does not fit {target}: {count} finite values would become infinite", str(checkpoint / WEIGHTS),
        f"magnitudes up to {float(largest):.6g} ({source})", f"at most {limit}", "choose --dtype",
    )  # fmt: skip


def test_largest_value_that_fits_is_accepted(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    tensors = read_tensors(checkpoint / WEIGHTS)
    values = np.full(72, np.nextafter(np.float32(65520), np.float32(0)), np.float32)
    write_tensors(checkpoint / WEIGHTS, {**tensors, "model.norm.weight": ("F32", [72], values.tobytes())})
    converted(checkpoint, tmp_path / "out", "float16")
    assert set(np.frombuffer(read_tensors(tmp_path / "out" / WEIGHTS)["model.norm.weight"][2], np.float16)) == {65504}
    values[5] = 65520  # halfway to the value that would follow: rounds up
    write_tensors(checkpoint / WEIGHTS, {**tensors, "model.norm.weight": ("F32", [72], values.tobytes())})
    with pytest.raises(CheckpointError, match="1 finite value would"):
        converted(checkpoint, tmp_path / "again", "float16")


_PEAK = """
import resource, sys
from pathlib import Path
from llama_export.checkpoint.checkpoint import load_checkpoint
from llama_export.export.conversion import plan_conversion, write_conversion
plan = plan_conversion(load_checkpoint(Path(sys.argv[1])), "float16")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_conversion(plan, Path(sys.argv[2]), lambda *step: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    """A tensor of 400 MB, sparse, costs the same few blocks as any other."""
    rows = 1_400_000
    write_random_checkpoint(tmp_path / "checkpoint", {**TINY, "tie_word_embeddings": True})
    path = tmp_path / "checkpoint" / WEIGHTS
    header, data = read_safetensors(path)
    header = {
        "__metadata__": {"format": "pt"},
        **{name: item for name, item in header.items() if name != "__metadata__"},
    }
    grown = (rows - 97) * 72 * 4
    for name, item in header.items():
        if name != "__metadata__":
            first = name == "model.embed_tokens.weight"
            item["data_offsets"] = [item["data_offsets"][0] + (0 if first else grown), item["data_offsets"][1] + grown]
    header["model.embed_tokens.weight"]["shape"] = [rows, 72]
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + grown + len(data))
    edit_json(tmp_path / "checkpoint" / "config.json", vocab_size=rows)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / WEIGHTS).stat().st_size > 200_000_000
    assert int(done.stdout) < 120_000, "KiB"
