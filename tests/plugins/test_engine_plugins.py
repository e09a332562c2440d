"""Engines whose attention and norms are our plugin layers: built on the CPU, counted, checked; and every way it is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import oracles
import pytest

pytest.importorskip("llama_export_plugins", reason="the plugins are not installed: pip install ./plugins")
pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'llama-export[tensorrt-rtx]'"
)
import llama_export_plugins

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.config.settings import CUSTOM_OPS, EngineConfig, ExportConfig
from llama_export.engine import plugins
from llama_export.engine.build import build_engine, installed_plugins
from llama_export.engine.check import check_engine, inspect_engine
from llama_export.engine.sidecar import PluginIdentity
from llama_export.errors import ArtifactMismatchError, EngineBuildError, LlamaExportError, ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.ops.table import OP_SPECS
from llama_export.runtime import engine_session, loaded_engine

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
SMALL = EngineConfig(max_seq_len=32, max_batch=2)
ALL = {"LlamaAddRMSNorm": 4, "LlamaAttention": 2, "LlamaRMSNorm": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin-engines") / "checkpoint"
    oracles.huggingface_llama(folder, seed=2, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def bundle(source: Path) -> Bundle:
    export_checkpoint(source)
    return load_bundle(source)


@pytest.fixture(scope="module")
def built(bundle: Bundle) -> Path:
    return Path(build_engine(bundle, SMALL).engine)


@pytest.fixture
def copied(bundle: Bundle, built: Path, tmp_path: Path) -> tuple[Bundle, Path]:
    shutil.copytree(bundle.folder, tmp_path / "copy")
    copy = load_bundle(tmp_path / "copy", ignore_hashes=True)
    return copy, tmp_path / "copy" / "engines" / built.name


# ---- what is built ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_custom_op_is_a_plugin_layer(source: Path, tmp_path: Path, dtype: str) -> None:
    export_checkpoint(source, tmp_path / "bundle", ExportConfig(dtype=dtype))
    made = load_bundle(tmp_path / "bundle")
    before = made.model_path.read_bytes()
    result = build_engine(made, SMALL)
    assert result.ops == "plugin"
    assert result.plugin_layers == ALL
    assert Path(result.engine).name == f"{dtype}-plugin-c32-b2.tensorrt-rtx.engine"
    assert made.model_path.read_bytes() == before, "the ONNX file is the very one onnxruntime's graph comes from"
    facts = check_engine(made, Path(result.engine))
    assert facts.sidecar.plugin_layers == ALL
    assert facts.sidecar.layers["PLUGIN_V3"] == 7
    assert "KV_CACHE_UPDATE" not in facts.sidecar.layers
    assert facts.not_checked == ()
    library = plugins.find_library()
    assert facts.sidecar.plugin_library == PluginIdentity(
        version=library.version, abi=library.abi, sha256=library.sha256
    )


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ("LlamaRMSNorm=native", {"LlamaAddRMSNorm": 4, "LlamaAttention": 2}),
        ("LlamaAttention=native", {"LlamaAddRMSNorm": 4, "LlamaRMSNorm": 1}),
        ("LlamaAddRMSNorm=native,LlamaRMSNorm=native", {"LlamaAttention": 2}),
        ("native", {}),
    ],
)
def test_ops_choose_plugin_or_native(bundle: Bundle, ops: str, expected: dict[str, int]) -> None:
    result = build_engine(bundle, replace(SMALL, ops=ops, force=True))
    assert result.plugin_layers == expected
    facts = check_engine(bundle, Path(result.engine))
    assert facts.sidecar.layers.get("PLUGIN_V3", 0) == sum(expected.values())
    assert facts.sidecar.layers.get("KV_CACHE_UPDATE", 0) == (0 if "LlamaAttention" in expected else 4)
    assert (facts.sidecar.plugin_library is None) == (not expected)


def test_the_table_of_ops_the_library_and_the_engine_agree() -> None:
    assert set(CUSTOM_OPS) == set(OP_SPECS)
    described = installed_plugins("tensorrt-rtx")
    fields = {creator["name"]: creator["fields"] for creator in described["creators"]}
    kinds = {"int": "int32", "float": "float32"}
    assert fields == {op: {item.name: kinds[item.type] for item in spec.attributes} for op, spec in OP_SPECS.items()}
    for creator in described["creators"]:
        assert (creator["version"], creator["namespace"]) == (str(OP_SPECS[creator["name"]].version), "")


# ---- what is refused before the build ---------------------------------------------------------------------------


def edited(bundle: Bundle, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Bundle:
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("engines"))
    model = onnx.load(str(bundle.model_path), load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return load_bundle(folder, ignore_hashes=True)


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def test_a_node_without_its_plugin_is_not_built_in_silence(bundle: Bundle, tmp_path: Path) -> None:
    """The parser expands what it has no creator for: the engine would be right and slow, and nobody would know."""

    def rename_one(model: onnx.ModelProto) -> None:
        function = onnx.FunctionProto()
        function.CopyFrom(next(item for item in model.functions if item.name == "LlamaRMSNorm"))
        function.name = "SomeNorm"
        model.functions.append(function)
        nodes(model, "LlamaRMSNorm")[0].op_type = "SomeNorm"

    with pytest.raises(EngineBuildError, match="LlamaRMSNorm"):
        build_engine(edited(bundle, tmp_path / "edited", rename_one), SMALL)


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: nodes(model, "LlamaAttention")[1].input.__setitem__(5, "past_key_values.0.key"),
        lambda model: nodes(model, "LlamaAttention")[0].input.__setitem__(7, "sequence_length"),
    ],
    ids=["the cache of another layer", "another length"],
)
def test_a_plugin_that_reads_the_wrong_tensor_is_not_built(
    bundle: Bundle, tmp_path: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    with pytest.raises(LlamaExportError) as caught:
        build_engine(edited(bundle, tmp_path / "edited", edit), SMALL)
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "edited").glob("engines/*"))


def test_a_node_the_plugin_refuses_is_named_with_the_reason(bundle: Bundle, tmp_path: Path) -> None:
    def wrong_heads(model: onnx.ModelProto) -> None:
        next(item for item in nodes(model, "LlamaAttention")[0].attribute if item.name == "num_heads").i = 6

    with pytest.raises(EngineBuildError, match="a plugin refused its node") as caught:
        build_engine(edited(bundle, tmp_path / "edited", wrong_heads), SMALL)
    assert caught.value.hint == "--ops LlamaAttention=native"
    assert "num_heads" in caught.value.details["reason"]


def test_a_head_dim_the_library_does_not_serve(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    oracles.huggingface_llama(folder, seed=1, **{**SHAPE, "head_dim": 320})
    export_checkpoint(folder)
    with pytest.raises(ToolchainError, match="does not serve LlamaAttention with head_dim 320") as caught:
        build_engine(load_bundle(folder), SMALL)
    assert caught.value.hint == "--ops LlamaAttention=native"
    assert caught.value.details["expected"] == "even sizes up to 256"


# ---- the library ------------------------------------------------------------------------------------------------


def package(path: Path, version: str = "0.1.0", images: list[dict[str, Any]] | None = None) -> SimpleNamespace:
    """A stand-in for the installed Python package."""
    listed = llama_export_plugins.variants()["images"] if images is None else images
    return SimpleNamespace(__version__=version, library_path=lambda: path, variants=lambda: {"images": listed})


def c_library(folder: Path, source: str) -> Path:
    path = folder / "lib.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)], input=source, text=True, check=True)
    return path


QUERIES = 'extern "C" const char* llama_export_plugins_version() {{ return "{}"; }} extern "C" int llama_export_plugins_abi() {{ return {}; }}'


def missing_file(folder: Path) -> SimpleNamespace:
    return package(folder / "nowhere.so")


def no_shared_object(folder: Path) -> SimpleNamespace:
    (folder / "lib.so").write_text("hello")
    return package(folder / "lib.so")


def cut_short(folder: Path) -> SimpleNamespace:
    (folder / "lib.so").write_bytes(llama_export_plugins.library_path().read_bytes()[:100_000])
    return package(folder / "lib.so")


def other_machine(folder: Path) -> SimpleNamespace:
    content = bytearray(llama_export_plugins.library_path().read_bytes())
    content[18:20] = (243).to_bytes(2, "little")  # RISC-V
    (folder / "lib.so").write_bytes(content)
    return package(folder / "lib.so")


def no_queries(folder: Path) -> SimpleNamespace:
    return package(c_library(folder, "int nothing;"))


def other_abi(folder: Path) -> SimpleNamespace:
    return package(c_library(folder, QUERIES.format("0.1.0", 7)))


def other_version(folder: Path) -> SimpleNamespace:
    return package(c_library(folder, QUERIES.format("0.9.0", plugins.ABI)), version="0.9.0")


def mixed_versions(folder: Path) -> SimpleNamespace:
    return package(c_library(folder, QUERIES.format("0.1.1", plugins.ABI)))


def no_kernels(folder: Path) -> SimpleNamespace:
    return package(llama_export_plugins.library_path(), images=[])


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (missing_file, "file is missing"), (no_shared_object, "is not a shared object"), (cut_short, "is cut short"),
        (other_machine, "is for another machine"), (no_queries, "another ABI"), (other_abi, "ABI 7"),
        (other_version, "of another version"), (mixed_versions, "0.1.1, in the Python package 0.1.0"),
        (no_kernels, "list of kernels cannot be read"),
    ],
)  # fmt: skip
def test_a_wrong_library_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Path], Any], sentence: str
) -> None:
    monkeypatch.setattr(plugins, "_import_package", lambda: broken(tmp_path))
    with pytest.raises(ToolchainError) as caught:
        plugins.find_library()
    assert sentence in str(caught.value)
    assert {"got", "expected"} <= set(caught.value.details)
    assert "--ops native" in str(caught.value.hint)


def test_no_library_at_all(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_export_plugins", None)
    with pytest.raises(ToolchainError, match="not installed") as caught:
        build_engine(bundle, replace(SMALL, force=True))
    assert str(caught.value.hint).startswith("pip install ./plugins")
    assert build_engine(bundle, replace(SMALL, ops="native", force=True)).plugin_layers == {}


def test_a_library_without_code_for_a_chip() -> None:
    library = plugins.find_library()
    for served in ("8.0", "8.7", "8.9", "9.0", "12.1", "13.0"):
        plugins.check_chip(library, served)
    with pytest.raises(ToolchainError, match=r"no kernels for this GPU: compute capability 7\.5"):
        plugins.check_chip(library, "7.5")
    only = replace(library, images=tuple(i for i in library.images if i["compute_capability"] == 89 and not i["ptx"]))
    plugins.check_chip(only, "8.9")
    for lacking in ("8.6", "9.0", "12.0"):
        with pytest.raises(ToolchainError, match="no kernels for this GPU"):
            plugins.check_chip(only, lacking)


def test_without_the_parsers_name_for_its_library_the_process_survives(bundle: Bundle) -> None:
    """In a fresh process, where nothing has loaded anything: a build, not an abort."""
    code = textwrap.dedent(f"""
        from pathlib import Path
        from llama_export.bundle.bundle import load_bundle
        from llama_export.config.settings import EngineConfig
        from llama_export.engine.build import build_engine
        result = build_engine(load_bundle(Path({str(bundle.folder)!r})), EngineConfig(max_seq_len=16, force=True))
        print(sum(result.plugin_layers.values()))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr


# ---- engine files -----------------------------------------------------------------------------------------------


def edit_sidecar(path: Path, **changes: Any) -> None:
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plugin_layers": {**ALL, "LlamaAttention": 1}}, "LlamaAttention"),
        ({"ops": "LlamaRMSNorm=native"}, "PLUGIN_V3"),
        ({"ops": "native"}, "PLUGIN_V3"),
        ({"plugin_library": None}, "plugin_library"),
    ],
    ids=["count", "ops", "native", "library"],
)
def test_a_sidecar_that_lies_about_plugins_is_refused(
    copied: tuple[Bundle, Path], changes: dict[str, Any], message: str
) -> None:
    copy, path = copied
    check_engine(copy, path)
    edit_sidecar(path, **changes)
    with pytest.raises(ArtifactMismatchError, match=message):
        check_engine(copy, path)


def test_a_plan_with_another_attribute_is_refused(copied: tuple[Bundle, Path]) -> None:
    """The engine's own plugin fields, read from the plan: a scale of another model."""
    import struct

    copy, path = copied
    plan, scale = path.read_bytes(), struct.pack("<f", copy.config.softmax_scale)
    assert scale in plan
    path.write_bytes(plan.replace(scale, struct.pack("<f", copy.config.softmax_scale * 2)))
    edit_sidecar(path, engine_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ArtifactMismatchError, match="scale"):
        check_engine(copy, path)


@pytest.mark.parametrize(
    ("field", "kind", "wrong", "says"),
    [("abi", "INT32", 3, "'abi': 3"), ("workspace_bytes", "INT64", 0, "LlamaAttention reserves 0 bytes")],
)
def test_a_plan_of_another_abi_or_workspace_is_refused(
    copied: tuple[Bundle, Path], field: str, kind: str, wrong: int, says: str
) -> None:
    """The plan says it itself, whatever its sidecar says: fields of this layout stand before each plugin's last tag."""
    copy, path = copied
    size = 4 if kind == "INT32" else 8
    pattern = rb"(%s[^\xff]{0,40}?%s.{6}%s)" % (field.encode(), kind.encode(), bytes([size, 0, 0, 0, 0, 0, 0, 0]))
    plan, count = re.subn(
        pattern + b".{%d}" % size,
        lambda match: match[1] + wrong.to_bytes(size, "little"),
        path.read_bytes(),
        flags=re.S,
    )
    assert count == 2 * (7 if field == "abi" else 2), "both profiles"
    path.write_bytes(plan)
    edit_sidecar(path, engine_sha256=hashlib.sha256(plan).hexdigest())
    with pytest.raises(ArtifactMismatchError) as caught:
        check_engine(copy, path)
    assert says in str(caught.value)
    assert "build again" in str(caught.value.hint)


def test_inspect_shows_the_plugin_layers(built: Path) -> None:
    sidecar = inspect_engine(built)
    assert sidecar.plugin_layers == ALL
    assert sidecar.ops == "plugin"


def test_an_engine_is_not_loaded_with_another_library(
    copied: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, path = copied
    monkeypatch.setattr(loaded_engine, "execution_blocker", lambda backend: None)
    monkeypatch.setattr(loaded_engine, "gpu_compute_capability", lambda: "8.9")
    found = plugins.find_library()
    monkeypatch.setattr(plugins, "find_library", lambda: replace(found, sha256="0" * 64, abi=9))
    with pytest.raises(LlamaExportError) as caught:
        engine_session.EngineSession(copy, path)
    assert "plugin library" in str(caught.value)
    assert caught.value.hint
