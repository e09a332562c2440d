"""Engines that take their weights as inputs: built for real, read back, given to other checkpoints, bound on a stand-in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import edit_json
from gpu_stand_ins import FakeDriver, FakeEngine, put_on_gpu
from random_llama import write_random_checkpoint
from support import snapshot, split_in_shards

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.config.settings import EngineConfig, ExportConfig
from llama_export.engine import plan as _plan
from llama_export.engine import spec as engine_spec
from llama_export.engine import tensorrt as _tensorrt
from llama_export.engine.build import build_engine
from llama_export.engine.check import check_engine, inspect_engine
from llama_export.engine.refit import refit_engine
from llama_export.engine.spec import rebuild_command
from llama_export.engine.weights import bundle_tensors, make_weights_inputs
from llama_export.errors import ArtifactMismatchError, ConfigError
from llama_export.export.export import export_checkpoint
from llama_export.runtime import loaded_engine
from llama_export.runtime.engine_session import EngineSession
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

trt = pytest.importorskip("tensorrt_rtx_bindings")

CONFIG: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "vocab_size": 128, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
INPUT = EngineConfig(ops="native", max_seq_len=48, max_batch=2, weights="input")


def run_cli(capsys: pytest.CaptureFixture[str], arguments: list[Any]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    capsys.readouterr()
    code = main([str(item) for item in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def make_bundle(folder: Path, seed: int = 0, dtype: str = "float32", shards: int = 1, **changes: Any) -> Bundle:
    write_random_checkpoint(folder, {**CONFIG, **changes}, dtype=dtype, seed=seed, lively=True)
    if shards > 1:
        split_in_shards(folder, shards)
    export_checkpoint(folder)
    return load_bundle(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A bundle with an engine that takes its weights as inputs."""
    bundle = make_bundle(tmp_path_factory.mktemp("weights") / "original")
    return bundle, Path(build_engine(bundle, INPUT).engine)


# ---- what is built ----------------------------------------------------------------------------------------------


def test_every_weight_is_an_input_and_the_sidecar_says_where_it_lies(original: tuple[Bundle, Path]) -> None:
    bundle, path = original
    sidecar, facts = inspect_engine(path), check_engine(bundle, path)
    assert path.name == "float32-native-c48-b2-weights-input.tensorrt-rtx.engine"
    tensors = {entry.name: entry for entry in bundle_tensors(bundle)}
    assert [entry.name for entry in sidecar.weights.tensors] == sorted(tensors)
    for entry in sidecar.weights.tensors:
        assert entry == tensors[entry.name]
    assert sidecar.weights.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert facts.sidecar == sidecar
    assert sidecar.weights.mode == "input"
    assert not facts.not_checked
    assert not sidecar.weights_copied_per_run


@pytest.mark.parametrize("ops", ["plugin", "native"])
def test_engine_holds_none_of_the_weights(ops: str, tmp_path: Path) -> None:
    """The bytes of a weight are in an engine with constant weights, and in none that takes them as inputs."""
    pytest.importorskip("llama_export_plugins") if ops == "plugin" else None
    bundle = make_bundle(tmp_path / "model", num_hidden_layers=1)
    row = (tmp_path / "model" / "model.safetensors").read_bytes()
    norm = next(entry for entry in bundle_tensors(bundle) if entry.name == "model.norm.weight")
    needle = row[norm.offset : norm.offset + norm.nbytes]
    held = {}
    for weights in ("constant", "input"):
        config = EngineConfig(ops=ops, max_seq_len=48, max_batch=2, weights=weights)  # type: ignore[arg-type]
        held[weights] = needle in Path(build_engine(bundle, config).engine).read_bytes()
    assert held == {"constant": True, "input": False}


def test_one_profile_halves_the_engine(original: tuple[Bundle, Path]) -> None:
    bundle, path = original
    single = Path(
        build_engine(
            bundle, EngineConfig(ops="native", max_seq_len=48, max_batch=2, weights="input", profiles=1)
        ).engine
    )
    assert "-p1-" in single.name
    facts = check_engine(bundle, single)
    assert list(facts.sidecar.profiles) == ["prefill"]
    assert facts.sidecar.bytes < 0.7 * path.stat().st_size


@pytest.mark.parametrize(
    ("vocabulary", "tied", "copied"), [(128, False, []), (97, False, ["lm_head.weight"]), (97, True, ["model.embed_tokens.weight"])]
)  # fmt: skip
def test_a_weight_that_is_copied_in_every_run_is_named(
    vocabulary: int, tied: bool, copied: list[str], tmp_path: Path
) -> None:
    """TensorRT pads a matrix whose rows are no multiple of 8."""
    bundle = make_bundle(tmp_path / "model", dtype="bfloat16", vocab_size=vocabulary, tie_word_embeddings=tied)
    lines: list[str] = []
    result = build_engine(bundle, INPUT, log=lines.append)
    assert inspect_engine(Path(result.engine)).weights_copied_per_run == tuple(copied)
    assert any("another layout in every run" in line for line in lines) == bool(copied)
    check_engine(bundle, Path(result.engine))


def test_plan_that_reads_a_weight_of_another_shape_is_refused(original: tuple[Bundle, Path]) -> None:
    bundle, path = original
    sidecar = inspect_engine(path)
    assert not _plan.read_plan(path.read_bytes(), sidecar, engine_spec.plugin_attributes(bundle.config, bundle.task))[1]
    first, second, third, *others = sidecar.weights.tensors
    wrong = (
        first,
        replace(second, shape=(1, 2)),
        third,
        *others,
        replace(third, name="model.layers.9.mlp.up_proj.weight"),
    )
    sidecar = replace(sidecar, weights=replace(sidecar.weights, tensors=wrong))
    problems = _plan.read_plan(path.read_bytes(), sidecar, engine_spec.plugin_attributes(bundle.config, bundle.task))[1]
    assert len(problems) == 4, "both in both profiles"
    assert "expected float32 [1, 2]" in problems[0]
    assert "`model.layers.9.mlp.up_proj.weight` is none []" in problems[1]


def test_weights_stored_in_another_dtype_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_random_checkpoint(folder, CONFIG, dtype="bfloat16")
    export_checkpoint(folder, config=ExportConfig(dtype="float16"))
    with pytest.raises(ConfigError, match="stored in bfloat16, the engine computes in float16") as caught:
        build_engine(load_bundle(folder), INPUT)
    assert "--dtype bfloat16" in str(caught.value)
    assert not (folder / "engines").exists()


def test_graph_that_points_elsewhere_is_refused(original: tuple[Bundle, Path]) -> None:
    bundle, _ = original
    proto = onnx.load(str(bundle.model_path), load_external_data=False)
    weight = next(item for item in proto.graph.initializer if item.name == "lm_head.weight")
    next(item for item in weight.external_data if item.key == "offset").value = "8"
    with pytest.raises(ArtifactMismatchError, match="does not point to the checkpoint's tensors") as caught:
        make_weights_inputs(onnx, proto, bundle_tensors(bundle))
    assert "lm_head.weight" in str(caught.value)


def test_engine_of_another_layout_of_the_same_files_is_refused(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    """The bytes of a sidecar that says another offset would be another weight."""
    bundle, path = original
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    copy = tmp_path / "bundle" / "engines" / path.name
    sidecar = json.loads(copy.with_suffix(".json").read_text())
    sidecar["weights"]["tensors"][3]["offset"] += 4
    copy.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(ArtifactMismatchError, match="not an engine of this bundle") as caught:
        check_engine(load_bundle(tmp_path / "bundle"), copy)
    assert sidecar["weights"]["tensors"][3]["name"] in str(caught.value)


# ---- refit ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Bundle, Path], FakeEngine]:
    """Stand-ins for TensorRT, CUDA and the GPU; the engine's computes with what is bound, weights included."""

    return lambda bundle, path: put_on_gpu(monkeypatch, trt, bundle, path)


def test_refitted_engine_computes_the_other_checkpoint(
    original: tuple[Bundle, Path], tmp_path: Path, on_a_gpu: Callable[[Bundle, Path], FakeEngine]
) -> None:
    """Same engine bytes, other weights, in other files: each session gives its own bundle's logits."""
    bundle, path = original
    other = make_bundle(tmp_path / "fine-tune", seed=7, shards=3)
    result = refit_engine(path, other)
    assert Path(result.engine).read_bytes() == path.read_bytes()
    assert (result.weights, result.weight_bytes) == (30, sum(entry.nbytes for entry in bundle_tensors(other)))
    logits = []
    for opened, engine_path in ((bundle, path), (other, Path(result.engine))):
        fake = on_a_gpu(opened, engine_path)
        session, want = EngineSession(opened, engine_path), OnnxRuntimeSession(opened, max_seq_len=48)
        for ids in ([[5, 6, 7]], [[8]], [[9]]):
            got = session.step(ids)
            np.testing.assert_allclose(got, want.step(ids), atol=2e-5)
        assert fake.used_profiles == [0, 1], "weights are bound again when the profile changes, and only then"
        logits.append(got)
        session.close()
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_refit_in_the_same_bundle_follows_a_new_export(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    """The checkpoint was saved again in shards: the old sidecar no longer fits, the engine does."""
    bundle, path = original
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    split_in_shards(folder)
    export_checkpoint(folder, config=ExportConfig(force=True))
    moved, opened = folder / "engines" / path.name, load_bundle(folder)
    with pytest.raises(ArtifactMismatchError):
        check_engine(opened, moved)
    refit_engine(moved, opened)
    check_engine(opened, moved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 128}, "intermediate_size"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_theta": 500000.0}, "rope"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_another_architecture_is_refused(
    changes: dict[str, Any], said: str, original: tuple[Bundle, Path], tmp_path: Path
) -> None:
    _, path = original
    other = make_bundle(tmp_path / "other", **changes)
    with pytest.raises(ConfigError, match="another architecture") as caught:
        refit_engine(path, other)
    assert said.partition(":")[0] in str(caught.value)
    assert f"llama-export build {other.folder}" in str(caught.value)
    assert not (other.folder / "engines").exists()


def test_facts_that_are_not_in_the_graph_may_differ(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=3, eos_token_id=[2, 5], bos_token_id=3)
    refit_engine(original[1], other)


def test_graph_that_differs_under_the_same_config_is_refused(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=3)
    model = onnx.load(str(other.model_path), load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "LlamaRMSNorm")
    next(item for item in norm.attribute if item.name == "epsilon").f = 1e-3
    other.model_path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactMismatchError, match="not the one the engine was built from"):
        refit_engine(original[1], load_bundle(other.folder, ignore_hashes=True))


def test_refit_never_overwrites_by_accident(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=3)
    refit_engine(original[1], other)
    with pytest.raises(ConfigError, match="exists"):
        refit_engine(original[1], other)
    refit_engine(original[1], other, force=True)


def test_refit_that_is_refused_keeps_the_engine_that_was_there(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=3)
    refit_engine(original[1], other)
    before = snapshot(other.folder)
    damaged = tmp_path / original[1].name
    shutil.copy(original[1], damaged)
    shutil.copy(original[1].with_suffix(".json"), damaged.with_suffix(".json"))
    edit_json(damaged.with_suffix(".json"), kv_cache_capacity=7)
    with pytest.raises(ArtifactMismatchError, match="is not an engine of this bundle"):
        refit_engine(damaged, other, force=True)
    assert snapshot(other.folder) == before


def test_engine_with_weights_inside_cannot_be_refitted(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, _ = original
    constant = Path(build_engine(bundle, EngineConfig(ops="native", max_seq_len=48, max_batch=1)).engine)
    with pytest.raises(ConfigError, match="does not take its weights as inputs") as caught:
        refit_engine(constant, bundle)
    assert "--weights input" in str(caught.value)


def test_refit_from_the_command_line(
    original: tuple[Bundle, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_bundle(tmp_path / "other", seed=3)
    code, out, err = run_cli(capsys, ["refit", original[1], other.folder, "--json"])
    assert code == 0
    found = json.loads(out)
    assert found["engine"] == str(other.folder / "engines" / original[1].name)
    assert "takes 30 weights" in err
    code, _, err = run_cli(capsys, ["refit", original[1], other.folder])
    assert code == 2
    assert "--force" in err


# ---- where it runs ----------------------------------------------------------------------------------------------

MACHINES: dict[str, tuple[FakeDriver, str, str]] = {
    "an older GPU": (FakeDriver(7, 5), trt.__version__, "GPU"),
    "another TensorRT": (FakeDriver(8, 9), "1.8.0.7", "TensorRT"),
    "an old driver": (FakeDriver(8, 9, cuda=12080), trt.__version__, "CUDA"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_machine_that_is_not_the_engine_s_is_refused_with_both_sides_and_the_command(
    name: str, original: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, path = original
    driver, version, said = MACHINES[name]
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: driver)
    with pytest.raises(ArtifactMismatchError, match="not built for this machine") as caught:
        loaded_engine.check_machine(check_engine(bundle, path).sidecar, version, path, bundle)
    assert set(caught.value.details) == {"engine", said}
    assert "got" in caught.value.details[said]
    assert "engine" in caught.value.details[said]
    assert rebuild_command(inspect_engine(path), bundle.folder) in str(caught.value)


@pytest.mark.parametrize(
    "driver", [FakeDriver(8, 0), FakeDriver(8, 9), FakeDriver(12, 0, cuda=13010)], ids=["8.0", "8.9", "12.0"]
)
def test_the_engine_s_machines_are_accepted(
    driver: FakeDriver, original: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, path = original
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: driver)
    loaded_engine.check_machine(check_engine(bundle, path).sidecar, trt.__version__, path, bundle)


def test_engine_for_named_gpus_runs_on_those_alone(
    original: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = original
    config = EngineConfig(
        ops="native", max_seq_len=48, max_batch=2, weights="input", compute_capabilities=("12.0", "8.9")
    )
    path = Path(build_engine(bundle, config).engine)
    facts = check_engine(bundle, path).sidecar
    assert facts.compute_capabilities == ("8.9", "12.0")
    assert not facts.forward_compatible
    for major, minor, fits in ((8, 9, True), (12, 0, True), (8, 6, False), (12, 1, False)):
        monkeypatch.setattr(_tensorrt, "_load_driver", lambda gpu=(major, minor): FakeDriver(*gpu))
        if fits:
            loaded_engine.check_machine(facts, trt.__version__, path, bundle)
        else:
            with pytest.raises(ArtifactMismatchError, match=f"{major}.{minor}"):
                loaded_engine.check_machine(facts, trt.__version__, path, bundle)


def test_an_engine_needs_its_version_of_the_backend(original: tuple[Bundle, Path]) -> None:
    sidecar = replace(check_engine(*original).sidecar, backend_version="1.7.1.116")
    versions = ("1.7.1.116", "1.7.1.200", "1.7.2.5", "1.9.0.0", "1.6.9.0", "2.0.0.0")
    assert [version for version in versions if loaded_engine._loads(sidecar, version)] == ["1.7.1.116", "1.7.1.200"]


def test_rebuild_command_is_one_that_the_command_line_takes(
    original: tuple[Bundle, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, path = original
    words = rebuild_command(inspect_engine(path), bundle.folder).split()
    assert words[0] == "llama-export"
    code, _, err = run_cli(capsys, words[1:])
    assert code == 0, err
    check_engine(bundle, path)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--compute-capability", "9.0"], 2, "8.0, 8.6, 8.9, 12.0, 12.1"),
        (["--compute-capability", "sm_90"], 2, "major.minor"),
        (["--weights", "stripped"], 3, "--weights input needs none"),
        (["--backend", "tensorrt", "--compute-capability", "9.0"], 3, "tensorrt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_built_here_is_refused(
    options: list[str], code: int, said: str, original: tuple[Bundle, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = make_bundle(tmp_path / "model")
    got, out, err = run_cli(capsys, ["build", bundle.folder, "--ops", "native", *options])
    assert (got, out) == (code, "")
    assert said in err
    assert not (bundle.folder / "engines").exists()


# ---- the same again ---------------------------------------------------------------------------------------------


def test_two_builds_differ_only_in_the_order_of_a_table(original: tuple[Bundle, Path], tmp_path: Path) -> None:
    """The graph given to TensorRT and the compiled graphs are equal; TensorRT numbers its tensors as they lie in memory."""
    bundle, path = original
    shutil.copytree(bundle.folder, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    again = Path(build_engine(load_bundle(tmp_path / "bundle"), INPUT).engine)
    first, second = (inspect_engine(item).to_json() for item in (path, again))
    assert first["network_sha256"] == second["network_sha256"]
    assert first["compiled_graphs_sha256"] == second["compiled_graphs_sha256"]
    varying = {"engine_sha256", "build_seconds"}
    assert _without(first, varying) == _without(second, varying)


def _without(data: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def test_another_network_has_other_compiled_graphs(original: tuple[Bundle, Path]) -> None:
    bundle, path = original
    other = Path(build_engine(bundle, EngineConfig(ops="native", max_seq_len=40, max_batch=2, weights="input")).engine)
    assert inspect_engine(other).compiled_graphs_sha256 != inspect_engine(path).compiled_graphs_sha256
