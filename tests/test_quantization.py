"""Quantised variants: every bit is where the specification puts it, files appear together or not at all, faults are found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TINY, MakeCheckpoint, edit_json
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from random_llama import write_random_checkpoint
from support import check_refused, patient, snapshot, split_in_shards, trace_once

from llama_export._system.content import sample_sha256, sha256_of_file
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.bundle.manifest import SCHEMA_VERSION, QuantizedRecord, variant_names
from llama_export.cli.main import main
from llama_export.config.settings import VARIANTS, ExportConfig
from llama_export.errors import ArtifactMismatchError, CheckpointError, ConfigError, ExportError, ToolchainError
from llama_export.export import quantize as quantization
from llama_export.export import rounding
from llama_export.export.export import export_checkpoint
from llama_export.export.quantize import quantize_bundle
from llama_export.export.rounding import CANDIDATES, SCHEMES, Scheme, quantize_rows
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.result import ParityReport
from llama_export.parity.stages import quantized as stages_module
from llama_export.parity.stages.causal import STAGES
from llama_export.parity.stages.quantized import rounded_weight
from llama_export.parity.validate import validate_bundle
from llama_export.runtime.generation import generate
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

Capture = pytest.CaptureFixture[str]
Float32Array = NDArray[np.float32]
F = np.float32
QUICK = ValidateConfig(steps=4, prompt_tokens=14, stages=("quantized-int4", "quantized-int8"))
MATRICES = 7 * TINY["num_hidden_layers"] + 1
PRODUCTS = 4 * TINY["num_hidden_layers"] + 1
"""q, k and v are one; gate and up are one."""


@pytest.fixture(autouse=True)
def _one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random model in which every matrix has a say, with both variants; copied, never modified."""
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    write_random_checkpoint(folder, {**TINY, "intermediate_size": 300}, lively=True, seed=3)
    export_checkpoint(folder)
    for kind in VARIANTS:
        quantize_bundle(load_bundle(folder), kind)
    return load_bundle(folder)


@pytest.fixture
def bundle(quantized: Bundle, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(quantized.folder, tmp_path / "bundle"))


def plain(make_checkpoint: MakeCheckpoint, **config: Any) -> Path:
    """A new bundle without variants."""
    folder = make_checkpoint(**config)
    export_checkpoint(folder)
    return folder


def unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """[.., bytes] -> [.., integers], written from the operator's documentation."""
    if bits == 8:
        return packed.astype(np.int64)
    pairs = np.stack([packed.astype(np.int64) % 16, packed.astype(np.int64) // 16], -1)
    return pairs.reshape(*packed.shape[:-1], -1)


def restored(weight: Float32Array, scheme: Scheme) -> NDArray[np.float64]:
    """What a matrix becomes, from its packed form."""
    rows = quantize_rows(weight, scheme)
    integers = unpacked(rows.packed, scheme.bits)
    blocks = integers.shape[1]
    zeros = np.full(integers.shape[:2], 128) if scheme.bits == 8 else unpacked(rows.zeros, 4)[:, :blocks]
    values = (integers - zeros[..., None]) * rows.scales.astype(np.float64)[..., None]
    return values.reshape(len(weight), -1)[:, : weight.shape[1]]


def one_block(w: Float32Array, bits: int) -> tuple[list[int], float]:
    """q and scale of one block, number by number, from the words of the module."""

    def total(terms: list[Any]) -> Any:
        while len(terms) > 1:
            half = len(terms) // 2
            terms = [F(left + right) for left, right in zip(terms[:half], terms[half:], strict=True)]
        return terms[0]

    if bits == 8:
        m = max(abs(value) for value in w)
        if m < 2.0**-100:
            return [0] * len(w), 0.0
        return [int(np.rint(F(value * F(F(127) / m)))) for value in w], float(F(m / F(127)))
    high, low = max(F(0), *w), min(F(0), *w)
    span = F(high - low)
    if span < 2.0**-100:
        return [0] * len(w), 0.0
    best: tuple[Any, list[int], float] = (-1, [], 0.0)
    for candidate in CANDIDATES:
        ratio = F(F(candidate) / span)
        zero = int(min(15, max(0, np.rint(F(-low * ratio)))))
        q = [int(min(15 - zero, max(-zero, np.rint(F(value * ratio))))) for value in w]
        along, length = total([F(value * F(n)) for value, n in zip(w, q, strict=True)]), total([F(n * n) for n in q])
        score = F(F(along * along) / length)
        if score > best[0]:
            best = (score, q, float(F(along / length)))
    return best[1], best[2]


# ---- the arithmetic ---------------------------------------------------------------------------------------------

values = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 2.0**-101, 2.0**-99, -(2.0**-99), 1e-20, 3e18]),
)
blocks = st.lists(values, min_size=16, max_size=16)


@patient
@given(st.lists(blocks, min_size=1, max_size=4), st.sampled_from([4, 8]))
def test_a_block_is_rounded_as_the_words_say_and_as_the_oracle_does(rows: list[list[float]], bits: int) -> None:
    weight = np.array(rows, np.float32)
    with np.errstate(all="ignore"):
        wanted = [one_block(row, bits) for row in weight]
    want = np.array([[n * scale for n in q] for q, scale in wanted])
    assert np.array_equal(restored(weight, Scheme(bits=bits, block_size=16, accuracy_level=4)), want)
    q, scales = rounded_weight(torch.from_numpy(weight), bits, 16)
    assert np.array_equal((q.double() * scales.double()).flatten(1).numpy(), want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [16, 32, 33, 64, 100, 200])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_both_implementations_agree_on_every_bit(bits: int, columns: int, size: int) -> None:
    weight = np.random.default_rng(columns).standard_normal((300, columns), np.float32)
    weight[7] = 0
    weight[8] = 0.25
    weight[9] = np.abs(weight[9]) + 3
    weight[10] = -weight[9]
    q, scales = rounded_weight(torch.from_numpy(weight), bits, size)
    want = (q.double() * scales.double()).flatten(1)[:, :columns].numpy()
    got = restored(weight, Scheme(bits=bits, block_size=size, accuracy_level=4))
    assert np.array_equal(got, want)
    assert not got[7].any()
    step = 1 / 254 if bits == 8 else 1 / 16
    assert np.abs(got - weight).max() <= step * (np.abs(weight).max() * 2) * 1.5


def test_the_search_is_better_than_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    scheme = Scheme(bits=4, block_size=64, accuracy_level=4)
    searched = np.linalg.norm(restored(weight, scheme) - weight)
    monkeypatch.setattr(rounding, "CANDIDATES", (15.0,))
    assert searched < 0.98 * np.linalg.norm(restored(weight, scheme) - weight)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("columns", [64, 72, 200, 192])
def test_onnxruntime_multiplies_by_the_restored_matrix(kind: str, columns: int) -> None:
    """What the packed bytes mean is onnxruntime's to say: its own product, in float32."""
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((24, columns), np.float32), rng.standard_normal((5, columns), np.float32)
    scheme = SCHEMES[kind]
    rows = quantize_rows(weight, scheme)
    inputs = {"b": rows.packed, "s": rows.scales, **({} if scheme.symmetric else {"z": rows.zeros})}
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", K=columns, N=24, bits=scheme.bits,
        block_size=scheme.block_size, accuracy_level=1,
    )  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "one", [value("x", 1, [5, columns])], [value("y", 1, [5, 24])],
        [onnx.numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )  # fmt: skip
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = x @ restored(weight, scheme).T
    assert np.abs(session.run(None, {"x": x})[0] - want).max() < 1e-5 * np.abs(want).max()


# ---- what is made -----------------------------------------------------------------------------------------------


def graph_of(bundle: Bundle, kind: str) -> onnx.GraphProto:
    return onnx.load(str(bundle.variant_path(kind)), load_external_data=False).graph


def places(graph: onnx.GraphProto) -> dict[str, dict[str, str]]:
    """Initializer -> where its content lies, of those that lie in another file."""
    return {
        item.name: {part.key: part.value for part in item.external_data}
        for item in graph.initializer
        if item.external_data
    }


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_matrix_is_quantised_and_the_rest_refers_to_the_checkpoint(quantized: Bundle, kind: str) -> None:
    graph = graph_of(quantized, kind)
    counts = {op: sum(node.op_type == op for node in graph.node) for op in ("MatMulNBits", "Split", "Cast")}
    assert counts == {"MatMulNBits": PRODUCTS, "Split": 2 * TINY["num_hidden_layers"], "Cast": counts["Cast"]}
    assert not any(node.op_type == "Transpose" for node in graph.node)
    found = places(graph)
    own = {name for name, place in found.items() if place["location"] == variant_names(kind)[1]}
    others = {name for name in found if name not in own}
    assert others == {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{layer}.{norm}.weight"
        for layer in range(TINY["num_hidden_layers"])
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    assert len(own) == PRODUCTS * (3 if kind == "int4" else 2)
    spans = sorted((int(found[name]["offset"]), int(found[name]["length"])) for name in own)
    assert all(offset % 4096 == 0 for offset, _ in spans)
    assert all(offset + length <= following for (offset, length), (following, _) in zip(spans, spans[1:], strict=False))
    assert sum(spans[-1]) == (quantized.folder / variant_names(kind)[1]).stat().st_size
    names = [node.name for node in graph.node]
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj/MatMulNBits" in names
    assert "lm_head/MatMulNBits" in names
    assert len(set(names)) == len(names)


def test_the_manifest_states_what_was_made(quantized: Bundle) -> None:
    assert quantized.variants == VARIANTS
    for kind in VARIANTS:
        graph, data = variant_names(kind)
        scheme, entry = SCHEMES[kind], quantized.manifest.quantized[kind]
        size = (quantized.folder / data).stat().st_size
        assert entry == QuantizedRecord(
            type=kind, bits=scheme.bits, block_size=scheme.block_size, accuracy_level=4, symmetric=kind == "int8",
            file=graph, size=(quantized.folder / graph).stat().st_size, sha256=sha256_of_file(quantized.folder / graph),
            data=data, data_size=size,
            data_mtime_ns=(quantized.folder / data).stat().st_mtime_ns, data_sha256=sha256_of_file(quantized.folder / data),
            data_sample_sha256=sample_sha256(quantized.folder / data, [(0, size)]),
            source_sha256=sha256_of_file(quantized.onnxruntime_path),
        )  # fmt: skip


def test_the_checkpoint_is_read_and_not_written(make_checkpoint: MakeCheckpoint) -> None:
    folder = plain(make_checkpoint)
    before = snapshot(folder)
    result = quantize_bundle(load_bundle(folder), "int4")
    after = snapshot(folder)
    assert set(after) - set(before) == set(variant_names("int4"))
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: before[name] for name in before if name != "manifest.json"
    }
    assert result.bytes == sum((folder / name).stat().st_size for name in variant_names("int4"))


def test_the_same_checkpoint_gives_the_same_bytes(quantized: Bundle, bundle: Path) -> None:
    for kind in VARIANTS:
        quantize_bundle(load_bundle(bundle), kind, force=True)
        for name in variant_names(kind):
            assert (bundle / name).read_bytes() == (quantized.folder / name).read_bytes()


def greedy(bundle: Bundle, kind: str | None) -> list[int]:
    session = OnnxRuntimeSession(bundle, max_seq_len=32, threads=1, variant=kind)
    return generate(session, [[1, 5, 7, 11]], max_new_tokens=12).tokens[0]


def apart(bundle: Bundle, kind: str) -> float:
    """Relative L2 of a variant's logits from those of the weights as they are."""
    got, want = (
        OnnxRuntimeSession(bundle, max_seq_len=32, threads=1, variant=which).step([[1, 5, 7, 11]])
        for which in (kind, None)
    )
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_stored_dtype_tied_or_not_is_quantised_and_proven(
    make_checkpoint: MakeCheckpoint, dtype: str, tied: bool
) -> None:
    folder = plain(make_checkpoint, dtype=dtype, tie_word_embeddings=tied, attention_bias=tied, mlp_bias=tied)
    for kind in VARIANTS:
        quantize_bundle(load_bundle(folder), kind)
    opened = load_bundle(folder)
    assert apart(opened, "int8") < 0.03
    report = validate_bundle(opened, QUICK)
    assert report.verdict == "pass", explain(report)
    embedding = places(graph_of(opened, "int4"))["model.embed_tokens.weight"]
    assert embedding["location"] == "model.safetensors"


def test_another_dtype_than_the_stored_one_shards_and_one_layer(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(num_hidden_layers=1)
    split_in_shards(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "half", ExportConfig(dtype="float16"))
    quantize_bundle(load_bundle(tmp_path / "half"), "int8")
    opened = load_bundle(tmp_path / "half")
    assert apart(opened, "int8") < 0.03


def test_embedded_weights_are_quantised_from_the_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_checkpoint, tmp_path / "inside", ExportConfig(weights="embed"))
    export_checkpoint(tiny_checkpoint, tmp_path / "beside")
    for name in ("inside", "beside"):
        quantize_bundle(load_bundle(tmp_path / name), "int4")
    data = variant_names("int4")[1]
    assert (tmp_path / "inside" / data).read_bytes() == (tmp_path / "beside" / data).read_bytes()
    assert greedy(load_bundle(tmp_path / "inside"), "int4") == greedy(load_bundle(tmp_path / "beside"), "int4")


def test_apart_or_packed_the_model_is_the_same(bundle: Path) -> None:
    packed = greedy(load_bundle(bundle), "int4")
    scheme = Scheme(bits=4, block_size=64, accuracy_level=4, pack=False)
    quantize_bundle(load_bundle(bundle), "int4", scheme=scheme, force=True)
    opened = load_bundle(bundle)
    assert sum(node.op_type == "MatMulNBits" for node in graph_of(opened, "int4").node) == MATRICES
    assert greedy(opened, "int4") == packed


def test_memory_is_that_of_some_rows_whatever_the_size_of_a_tensor(make_checkpoint: MakeCheckpoint) -> None:
    """A vocabulary of 40000 x 256 is 41 MB in float32; what grows with it is its scales, 1.6 MB."""
    folder = plain(make_checkpoint, hidden_size=256, vocab_size=40000, head_dim=32)
    opened = load_bundle(folder)
    tracemalloc.start()
    try:
        quantize_bundle(opened, "int4", scheme=Scheme(bits=4, block_size=64, accuracy_level=4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (24 + 14 * (os.cpu_count() or 1)) * 10**6, peak


# ---- requests that are refused ----------------------------------------------------------------------------------


def test_a_variant_that_is_there_is_replaced_on_request_alone(bundle: Path, capsys: Capture) -> None:
    check_refused(
        capsys, bundle.parent, ["quantize", bundle, "--type", "int8"], "this bundle has int8 weights already", "--force"
    )
    assert main(["quantize", str(bundle), "--type", "int8", "--force", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"bundle", "type", "bits", "block_size", "bytes", "seconds", "peak_rss_bytes"}
    assert (data["type"], data["bits"], data["block_size"]) == ("int8", 8, SCHEMES["int8"].block_size)
    assert load_bundle(bundle).variants == VARIANTS


def test_a_variant_that_is_not_there_names_the_command_that_makes_it(tiny_bundles: dict[str, Bundle]) -> None:
    opened = tiny_bundles["float32"]
    assert opened.variants == ()
    assert opened.variant_path(None) == opened.onnxruntime_path
    with pytest.raises(ConfigError) as refused:
        opened.variant_path("int4")
    assert refused.value.hint == f"make them: llama-export quantize {opened.folder} --type int4"
    with pytest.raises(ConfigError, match="int3"):
        opened.variant_path("int3")
    with pytest.raises(ConfigError, match="int3"):
        quantize_bundle(opened, "int3")


def test_other_tasks_are_refused(make_checkpoint: MakeCheckpoint, capsys: Capture) -> None:
    folder = plain(make_checkpoint, architectures=["LlamaModel"])
    check_refused(capsys, folder.parent, ["quantize", folder], "only causal language models", "feature-extraction")


def test_a_full_disk_is_told_before_anything_is_written(
    make_checkpoint: MakeCheckpoint, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain(make_checkpoint)
    monkeypatch.setattr(quantization, "free_disk", lambda path: 1000)
    before = snapshot(folder)
    assert main(["quantize", str(folder)]) == 3
    said = capsys.readouterr().err
    assert "no space left" in said
    assert "1000 bytes free" in said
    assert "--ignore-estimate" in said
    assert snapshot(folder) == before
    assert main(["quantize", str(folder), "--ignore-estimate"]) == 0
    assert load_bundle(folder).variants == ("int4",)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_weight_that_is_not_finite_is_refused_by_name(
    make_checkpoint: MakeCheckpoint, kind: str, value: float
) -> None:
    folder = plain(make_checkpoint)
    opened = load_bundle(folder)
    place = places(onnx.load(str(opened.onnxruntime_path), load_external_data=False).graph)
    name = "model.layers.1.mlp.down_proj.weight"
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(int(place[name]["offset"]) + 4 * 33)
        stream.write(np.float32(value).tobytes())
    before = snapshot(folder)
    with pytest.raises(CheckpointError, match=name):
        quantize_bundle(opened, kind)
    assert snapshot(folder) == before


def test_a_graph_whose_products_are_not_the_configs_is_refused(bundle: Path) -> None:
    opened = load_bundle(bundle)
    model = onnx.load(str(opened.onnxruntime_path), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMul" and "o_proj" in node.name)
    node.op_type = "Mul"
    opened.onnxruntime_path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="not those that its config implies"):
        quantize_bundle(opened, "int4", force=True)


def test_a_failed_write_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = snapshot(bundle)
    monkeypatch.setattr(quantization, "_write_data", full)
    with pytest.raises(ToolchainError, match="no space left"):
        quantize_bundle(load_bundle(bundle), "int4", force=True)
    assert snapshot(bundle) == before


def test_cut_off_at_any_rename_there_is_the_old_variant_or_the_new(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, counted = plain(make_checkpoint), []
    from llama_export._system import commit as _commit

    real = (os.rename, os.replace)
    seen = set()
    for cut in range(8):
        folder = Path(shutil.copytree(source, tmp_path / f"cut{cut}"))
        counted.clear()

        def stepped(which: int, cut: int = cut) -> Callable[..., None]:
            def move(*arguments: Any) -> None:
                counted.append(which)
                if len(counted) > cut:
                    raise KeyboardInterrupt
                real[which](*arguments)

            return move

        with monkeypatch.context() as patch:
            patch.setattr(_commit.os, "rename", stepped(0))
            patch.setattr(_commit.os, "replace", stepped(1))
            try:
                quantize_bundle(load_bundle(folder), "int4")
            except KeyboardInterrupt:
                pass
        opened = load_bundle(folder)  # finishes what was begun
        seen.add(opened.variants)
        if opened.variants:
            greedy(opened, "int4")
        assert not list(folder.glob(".llama-export*"))
    assert seen == {(), ("int4",)}


# ---- what is found when a bundle is opened ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_changed_variant_is_found_and_made_anew(bundle: Path, kind: str, capsys: Capture) -> None:
    graph, data = variant_names(kind)
    for name, change in {
        graph: lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        data: lambda path: path.write_bytes(path.read_bytes()[:-1]),
    }.items():
        change(bundle / name)
        with pytest.raises(ArtifactMismatchError, match=name) as refused:
            load_bundle(bundle)
        command = str(refused.value.hint).partition("llama-export ")[2].split()
        assert main([*command, "--json"]) == 0
        load_bundle(bundle)
    (bundle / data).write_bytes(bytes(byte ^ 1 for byte in (bundle / data).read_bytes()))
    with pytest.raises(ArtifactMismatchError, match="sha256"):
        load_bundle(bundle)
    (bundle / data).unlink()
    with pytest.raises(ArtifactMismatchError, match="is missing") as refused:
        load_bundle(bundle)
    assert f"quantize {bundle} --type {kind} --force" in str(refused.value.hint)
    assert main(["quantize", str(bundle), "--type", kind, "--force"]) == 0
    assert load_bundle(bundle).variants == VARIANTS
    capsys.readouterr()


def test_another_time_with_the_same_content_is_no_change(bundle: Path) -> None:
    os.utime(bundle / variant_names("int4")[1], ns=(1, 1))
    load_bundle(bundle)


def test_a_variant_of_another_export_is_stale(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["quantized"]["int4"]["source_sha256"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactMismatchError, match="int4 weights are of another export"):
        load_bundle(bundle)
    load_bundle(bundle, ignore_hashes=True)


def test_a_new_export_in_place_drops_the_variants_of_the_old_one(bundle: Path) -> None:
    export_checkpoint(bundle, config=ExportConfig(force=True, dtype="float16"))
    opened = load_bundle(bundle)
    assert opened.variants == ()
    assert not any((bundle / name).exists() for kind in VARIANTS for name in variant_names(kind))


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../x"}, {"data": "model.safetensors"}, {"type": "int8"}, {"bits": "4"}, {"data_size": -1}, {"sha256": None},
        {"symmetric": 1}, {"bits": ...},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_says_something_else_is_refused(bundle: Path, change: dict[str, Any]) -> None:
    entry = json.loads((bundle / "manifest.json").read_text())["quantized"]["int4"]
    changed = {key: value for key, value in {**entry, **change}.items() if value is not ...}
    edit_json(bundle / "manifest.json", quantized={"int4": changed})
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        load_bundle(bundle)


@pytest.mark.parametrize("value", [[], 3, None, {"int3": {}}, {"int4": []}, {"int4": {}}], ids=str)
def test_hostile_entries_are_refused(bundle: Path, value: Any) -> None:
    edit_json(bundle / "manifest.json", quantized=value)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        load_bundle(bundle)


def test_links_out_of_the_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    data = bundle / variant_names("int4")[1]
    shutil.move(data, tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactMismatchError, match="symbolic link"):
        load_bundle(bundle)


def test_export_quantises_at_its_end(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    argv = [
        "export",
        make_checkpoint(),
        "-o",
        out,
        "--quantize",
        "int8",
        "--quantize",
        "int4",
        "--quantize",
        "int8",
        "--json",
    ]
    assert main([str(item) for item in argv]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [item["type"] for item in data["quantized"]] == ["int8", "int4"]
    assert load_bundle(out).variants == VARIANTS


# ---- what is measured and written down --------------------------------------------------------------------------


def test_the_document_holds_the_measured_tables_and_the_scheme_that_is_shipped() -> None:
    """Tables are made from the results beside them; `--write` of the two benchmarks makes both anew."""
    import perplexity as quality
    import quantization as speed

    text = speed.DOCUMENT.read_text(encoding="utf-8")
    data = {name: json.loads((speed.RESULTS / f"{name}.json").read_text()) for name in ("perplexity", "decode", "cost")}
    tables = {
        "decode": speed.table(data["decode"]["tokens_per_second"]),
        "cost": speed.cost_table(data["cost"]["rows"]),
    }
    for what in ("shipped", "roundings"):
        rows = {name: quality.Quality(**row) for name, row in data["perplexity"][what].items()}
        tables[what] = quality.table(rows, sizes=what == "shipped")
    for name, lines in tables.items():
        section = text.split(f"<!-- {name}: begin -->\n")[1].split(f"\n<!-- {name}: end -->")[0]
        assert section.splitlines() == lines, f"{name}: run the benchmark with --write"
    shipped = [name for name in data["perplexity"]["shipped"] if name.endswith("as shipped")]
    assert shipped == [f"{kind}, blocks of {SCHEMES[kind].block_size}, as shipped" for kind in ("int8", "int4")]
    assert f"| blocks along a row | {SCHEMES['int4'].block_size} weights" in text
    assert f"| {SCHEMES['int8'].block_size} weights: a float32 scale |" in text


# ---- parity -----------------------------------------------------------------------------------------------------


def explain(report: ParityReport) -> str:
    return "\n".join(f"{item.name}: {item.verdict} {dict(item.metrics)} {item.reason}" for item in report.stages)


def verdicts(report: ParityReport) -> dict[str, str]:
    return {item.name: item.verdict for item in report.stages if item.name.startswith("quantized-")}


def test_a_sound_variant_passes_and_says_what_quantising_costs(quantized: Bundle) -> None:
    report = validate_bundle(quantized, QUICK)
    assert report.verdict == "pass", explain(report)
    wanted = {f"quantized-{kind}/{what}": "pass" for kind in VARIANTS for what in ("packing", "prefill", "decode")}
    wanted |= {f"quantized-{kind}/text": "not-run" for kind in VARIANTS}
    assert verdicts(report) == wanted, explain(report)
    found = {item.name: item for item in report.stages}
    costs = [found[f"quantized-{kind}/decode"].metrics["quantising_mean_kl"] for kind in VARIANTS]
    assert float(costs[0]) > 20 * float(costs[1]) > 0
    for kind in VARIANTS:
        assert variant_names(kind)[0] in report.hashes
        # The noise floor is what products with rounded inputs cost, and that is what onnxruntime's do.
        assert 0.8 < float(found[f"quantized-{kind}/decode"].metrics["l2_ratio"]) < 1.25
        assert float(found[f"quantized-{kind}/packing"].metrics["relative_l2"]) < 2e-6


def test_a_bundle_without_variants_has_no_such_stages(tiny_bundles: dict[str, Bundle]) -> None:
    report = validate_bundle(tiny_bundles["float32"], ValidateConfig(steps=2, prompt_tokens=8, stages=("graph/rope",)))
    assert [item.name for item in report.stages] == list(STAGES)


def data_fault(
    kind: str, product: str, change: Callable[[NDArray[np.uint8], Float32Array, NDArray[np.uint8]], None]
) -> Callable[[Path], None]:
    """Changes packed weights [N, J, bytes], scales [N, J] or zeros [N, bytes] of a product in place."""

    def damage(folder: Path) -> None:
        graph = onnx.load(str(folder / variant_names(kind)[0]), load_external_data=False).graph
        shapes = {item.name: tuple(item.dims) for item in graph.initializer}
        path = folder / variant_names(kind)[1]
        content = bytearray(path.read_bytes())
        arrays = {}
        for label, dtype in ((kind, np.uint8), ("scales", np.float32), ("zeros", np.uint8)):
            place = places(graph).get(f"{product}.{label}")
            arrays[label] = np.zeros(0, dtype)
            if place is not None:
                count = int(place["length"]) // np.dtype(dtype).itemsize
                flat = np.frombuffer(content, dtype, count, int(place["offset"]))
                arrays[label] = flat.reshape(shapes[f"{product}.{label}"])
        change(arrays[kind], arrays["scales"], arrays["zeros"])
        path.write_bytes(content)

    return damage


QKV, DOWN, HEAD = "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.1.mlp.down_proj", "lm_head"


def swap_nibbles(packed: NDArray[np.uint8], *_: Any) -> None:
    packed[:] = packed >> 4 | packed << 4


def shift_a_block(packed: NDArray[np.uint8], *_: Any) -> None:
    packed[:] = np.roll(packed, 1, axis=1)


def shift_a_row(packed: NDArray[np.uint8], *_: Any) -> None:
    packed[:] = np.roll(packed, 1, axis=0)


def transpose(packed: NDArray[np.uint8], *_: Any) -> None:
    square = packed.reshape(-1)[: 48 * 48].reshape(48, 48)
    square[:] = square.T.copy()


def one_scale(_: Any, scales: Float32Array, __: Any) -> None:
    scales[3, 0] *= F(1.01)


def shift_scales(_: Any, scales: Float32Array, __: Any) -> None:
    scales[:] = np.roll(scales.reshape(-1), 1).reshape(scales.shape)


def one_zero(_: Any, __: Any, zeros: NDArray[np.uint8]) -> None:
    zeros[3, 0] ^= 1


def swap_zeros(_: Any, __: Any, zeros: NDArray[np.uint8]) -> None:
    zeros[:] = zeros >> 4 | zeros << 4


def one_weight(packed: NDArray[np.uint8], *_: Any) -> None:
    packed[5, 0, 7] ^= 1


FAULTS = {
    **{
        f"{kind} {what}": data_fault(kind, product, change)
        for kind in VARIANTS
        for what, product, change in (
            ("rows shifted", QKV, shift_a_row),
            ("blocks shifted", DOWN, shift_a_block),
            ("scales shifted", HEAD, shift_scales),
            ("one scale 1 % larger", DOWN, one_scale),
            ("transposed", HEAD, transpose),
            ("one weight a step off", DOWN, one_weight),
        )
    },
    "int4 nibbles swapped": data_fault("int4", HEAD, swap_nibbles),
    "int4 nibbles swapped in one matrix of a layer": data_fault("int4", DOWN, swap_nibbles),
    "int4 one zero a step off": data_fault("int4", QKV, one_zero),
    "int4 zeros swapped": data_fault("int4", DOWN, swap_zeros),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_packing_fault_fails_the_packing_stage(bundle: Path, fault: str) -> None:
    kind = fault[:4]
    sound = (bundle / variant_names(kind)[1]).read_bytes()
    FAULTS[fault](bundle)
    if (bundle / variant_names(kind)[1]).read_bytes() == sound:
        pytest.fail("the fault changed nothing")
    config = ValidateConfig(steps=4, prompt_tokens=14, stages=(f"quantized-{kind}/packing",))
    report = validate_bundle(load_bundle(bundle, ignore_hashes=True), config)
    assert verdicts(report)[f"quantized-{kind}/packing"] == "fail", explain(report)
    assert report.verdict == "fail"


def edit_graph(folder: Path, kind: str, change: Callable[[onnx.NodeProto], None], op: str, part: str) -> None:
    path = folder / variant_names(kind)[0]
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == op and part in node.name:
            change(node)
    path.write_bytes(model.SerializeToString())


def test_outputs_of_a_split_in_another_order_fail(bundle: Path) -> None:
    def swap(node: onnx.NodeProto) -> None:
        outputs = list(node.output)
        node.output[:] = [outputs[1], outputs[0]]

    edit_graph(bundle, "int8", swap, "Split", "layers.1.mlp")
    report = validate_bundle(load_bundle(bundle, ignore_hashes=True), QUICK)
    assert verdicts(report)["quantized-int8/packing"] == "fail", explain(report)
    assert verdicts(report)["quantized-int8/prefill"] == "fail", explain(report)
    assert verdicts(report)["quantized-int4/packing"] == "pass", explain(report)


def test_a_large_fault_fails_what_is_judged_as_shipped_too(bundle: Path) -> None:
    FAULTS["int4 nibbles swapped"](bundle)
    found = verdicts(validate_bundle(load_bundle(bundle, ignore_hashes=True), QUICK))
    assert found["quantized-int4/prefill"] == found["quantized-int4/decode"] == "fail"


def test_a_reference_that_rounds_otherwise_is_seen(quantized: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle does not read the packed file: with another rule of its own it must disagree."""
    monkeypatch.setattr(stages_module, "CANDIDATES", (15.0,))
    report = validate_bundle(quantized, QUICK)
    assert verdicts(report)["quantized-int4/packing"] == "fail", explain(report)
    assert verdicts(report)["quantized-int8/packing"] == "pass", explain(report)


def test_on_a_text_kl_is_judged_and_the_cost_reported(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(__file__).parent.parent / "examples" / "tiny-llama", tmp_path / "tiny"))
    export_checkpoint(folder)
    quantize_bundle(load_bundle(folder), "int4")
    text = tmp_path / "text.py"
    text.write_text((Path(__file__).parent / "support.py").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    report = validate_bundle(load_bundle(folder), ValidateConfig(steps=4, text=text, stages=("quantized-int4/text",)))
    (stage,) = (item for item in report.stages if item.name == "quantized-int4/text")
    assert stage.verdict == "pass", explain(report)
    assert 0 < float(stage.metrics["mean_kl"]) < 0.1 * float(stage.metrics["quantising_mean_kl"])
    assert float(stage.metrics["checkpoint_perplexity"]) != float(stage.metrics["oracle_perplexity"])
    assert 0.5 < float(stage.metrics["quantising_top1_agreement"]) < 1


def test_the_schema_version_stays(quantized: Bundle) -> None:
    """Readers that know nothing of variants open the bundle as before: the key is an addition."""
    assert quantized.manifest.schema_version == SCHEMA_VERSION == 1
