"""The library in programs that are not this project's, as plugins/README.md shows: the preload library in each TensorRT
there is, Polygraphy, and the C++ and Triton examples as far as they can be tried without NVIDIA's headers and server."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from library_support import PLUGINS, require_plugins, run_python
from test_library_tensorrt import LEAN_PYTHONS

from llama_export.bundle.bundle import Bundle
from llama_export.engine import plan as _plan
from llama_export.ops.table import OP_SPECS

require_plugins()

import llama_export_plugins  # noqa: E402

README = (PLUGINS / "README.md").read_text(encoding="utf-8")
LOAD = """
import ctypes, importlib, sys
trt = importlib.import_module(sys.argv[1])
ctypes.CDLL(sys.argv[2])
print(*(creator.name for creator in trt.get_plugin_registry().all_creators))
"""


def require_rtx() -> None:
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("`tensorrt_rtx_bindings` is not installed: pip install 'llama-export[tensorrt-rtx]'")


# ---- the preload library ------------------------------------------------------------------------------------------


def test_preload_registers_the_plugins_in_tensorrt_rtx() -> None:
    require_rtx()
    assert set(OP_SPECS) <= set(run_python(LOAD, "tensorrt_rtx_bindings", llama_export_plugins.preload_path()).split())
    plain = run_python(LOAD, "tensorrt_rtx_bindings", llama_export_plugins.library_path()).split()
    assert not set(OP_SPECS) & set(plain)  # why there is a preload library


@pytest.mark.parametrize("python", LEAN_PYTHONS or [sys.executable])
def test_preload_registers_the_plugins_in_tensorrt_lean(python: str) -> None:
    if not LEAN_PYTHONS and importlib.util.find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("no lean runtime: LLAMA_EXPORT_LEAN_PYTHONS names none (test_library_tensorrt.py)")
    printed = run_python(LOAD, "tensorrt_lean_bindings", llama_export_plugins.preload_path(), python=python)
    assert set(OP_SPECS) <= set(printed.split())


def test_preload_without_tensorrt_says_so_and_does_no_harm() -> None:
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print('alive')"
    result = subprocess.run(
        [sys.executable, "-c", code, llama_export_plugins.preload_path()], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "alive\n")
    assert "got a process without TensorRT, expected" in result.stderr
    assert "hint: " in result.stderr


def test_preload_after_the_library_was_loaded_says_so() -> None:
    require_rtx()
    code = """
import ctypes, sys, tensorrt_rtx_bindings as trt
assert trt.get_plugin_registry().load_library(sys.argv[1]) is not None
ctypes.CDLL(sys.argv[2])
"""
    paths = (llama_export_plugins.library_path(), llama_export_plugins.preload_path())
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "did not take" in result.stderr


# ---- Polygraphy ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def polygraphy_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables under which Polygraphy finds the wheels of TensorRT-RTX: they have the module and the library under
    other names than it, and TensorRT-RTX's own parser, ask for."""
    require_rtx()
    pytest.importorskip("polygraphy", reason="`polygraphy` is not installed: pip install 'llama-export[plugins-dev]'")
    folder = tmp_path_factory.mktemp("polygraphy")
    (folder / "tensorrt_rtx").mkdir()
    (folder / "tensorrt_rtx" / "__init__.py").write_text(
        "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
    )
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    (folder / "libtensorrt_rtx.so").symlink_to(Path(spec.origin).parent / "libtensorrt_rtx.so.1")
    return {
        **os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder),
    }  # fmt: skip


def polygraphy(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    paths = [path for path in (environment["PYTHONPATH"], os.environ.get("PYTHONPATH")) if path]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip


def tensors_of(bundle: Bundle, kind: str) -> list[dict[str, Any]]:
    """``input`` or ``output`` tensors of the graph: name, dtype, shape."""
    tensors: list[dict[str, Any]] = json.loads((bundle.folder / "manifest.json").read_text(encoding="utf-8"))["io"]
    return [item for item in tensors if item["kind"] == kind]


def convert(
    environment: dict[str, str],
    model: Path,
    engine: Path,
    library: Path,
    inputs: list[dict[str, Any]],
    *more: str,
    capacities: tuple[int, int] = (32, 32),
) -> Any:
    """`polygraphy convert` with one profile: batch 1 to 2, 1 to 32 new tokens, caches from one capacity to another."""

    def shapes(batch: int, tokens: int, capacity: int) -> list[str]:
        sizes = {"batch_size": batch, "num_new_tokens": tokens, "num_logits": 1, "kv_cache_capacity": capacity}
        return [f"{item['name']}:[{','.join(str(sizes.get(size, size)) for size in item['shape'])}]" for item in inputs]

    return polygraphy(
        environment, "convert", model, "--convert-to", "trt", "-o", engine, "--plugins", library,
        "--preview-features", "aliased_plugin_io_10_03", *more,
        "--trt-min-shapes", *shapes(1, 1, capacities[0]), "--trt-opt-shapes", *shapes(1, 16, capacities[1]),
        "--trt-max-shapes", *shapes(2, 32, capacities[1]),
    )  # fmt: skip


def test_polygraphy_builds_an_engine_of_plugin_layers(
    polygraphy_environment: dict[str, str], tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = tiny_bundles["float32"]
    model, engine = bundle.folder / "model.onnx", tmp_path / "plugins.engine"
    flag = ("--onnx-flags", "enable_plugin_override")
    preload, library = llama_export_plugins.preload_path(), llama_export_plugins.library_path()
    made = convert(polygraphy_environment, model, engine, preload, tensors_of(bundle, "input"), *flag)
    assert made.returncode == 0, made.stdout + made.stderr
    content = engine.read_bytes()
    assert b"LlamaAttention" in content
    assert b"LlamaRMSNorm" in content
    # The library itself is only opened by --plugins; the function bodies are parsed, and want a fixed capacity.
    refused = convert(
        polygraphy_environment, model, tmp_path / "none.engine", library, tensors_of(bundle, "input"), *flag
    )
    assert refused.returncode != 0
    assert "KV cache tensor must have a static" in refused.stdout + refused.stderr


def test_polygraphy_builds_an_engine_of_many_capacities(
    polygraphy_environment: dict[str, str], tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """A cache of 1024 keys has more pieces (8) than one of 1100 (5): the engine reserves room for 8."""
    bundle, engine = tiny_bundles["float32"], tmp_path / "plugins.engine"
    made = convert(
        polygraphy_environment, bundle.folder / "model.onnx", engine, llama_export_plugins.preload_path(),
        tensors_of(bundle, "input"), "--onnx-flags", "enable_plugin_override", capacities=(8, 1100),
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    records, _ = _plan._plugin_records(engine.read_bytes())
    stored = [record.fields["workspace_bytes"] for record in records if record.op == "LlamaAttention"]
    config = bundle.config
    heads, group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    pieces = 2 * (16 // group) * heads * 8
    needed = 2 * 32 * heads * config.head_dim * 4 + pieces * (config.head_dim + 2) * 4
    assert len(stored) == config.num_hidden_layers
    assert set(stored) == {-(-needed // 256) * 256}


def test_without_functions_no_parser_flag_is_needed(
    polygraphy_environment: dict[str, str], tiny_bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    """As the README says for trtexec, which has no option for that flag."""
    import onnx

    bundle = tiny_bundles["float32"]
    (snippet,) = re.findall(r"```python\n(import onnx\n.*?)```", README, re.DOTALL)
    for path in bundle.folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    run_python(f"import os, sys; os.chdir(sys.argv[1])\n{snippet}", tmp_path)
    model = tmp_path / "model.plugins.onnx"
    assert not onnx.load(model, load_external_data=False).functions
    engine = tmp_path / "plugins.engine"
    made = convert(
        polygraphy_environment, model, engine, llama_export_plugins.preload_path(), tensors_of(bundle, "input")
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert b"LlamaAttention" in engine.read_bytes()


# ---- examples in the README ---------------------------------------------------------------------------------------

NVINFER_RUNTIME = """
#pragma once
#include <cstddef>
#include <cstdint>
namespace nvinfer1 {
struct ILogger { enum class Severity : int32_t { kERROR = 1, kWARNING = 2 };
                 virtual void log(Severity, char const*) noexcept = 0; virtual ~ILogger() = default; };
struct IPluginRegistry { using PluginLibraryHandle = void*; virtual PluginLibraryHandle loadLibrary(char const*) noexcept = 0; };
struct ICudaEngine { virtual int32_t getNbIOTensors() const noexcept = 0; virtual char const* getIOTensorName(int32_t) const noexcept = 0;
                     virtual ~ICudaEngine() = default; };
struct IRuntime { virtual IPluginRegistry& getPluginRegistry() noexcept = 0;
                  virtual ICudaEngine* deserializeCudaEngine(void const*, std::size_t) noexcept = 0; virtual ~IRuntime() = default; };
IRuntime* createInferRuntime(ILogger&) noexcept;
}
"""
"""The declarations of NVIDIA's header that the example uses."""


def test_the_cpp_example_compiles(tmp_path: Path) -> None:
    (program,) = re.findall(r"```cpp\n(.*?)```", README, re.DOTALL)
    (tmp_path / "NvInferRuntime.h").write_text(NVINFER_RUNTIME)
    (tmp_path / "load.cpp").write_text(program)
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{tmp_path}",
        tmp_path / "load.cpp",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_triton_configuration_names_the_inputs_of_a_bundle(tiny_bundles: dict[str, Bundle]) -> None:
    bundle = tiny_bundles["float32"]
    (config,) = re.findall(r"```\n(name: \"llama\".*?)```", README, re.DOTALL)
    inputs, outputs = re.split(r"^output ", config, flags=re.M)
    for text, kind in ((inputs, "input"), (outputs, "output")):
        expected = {item["name"] for item in tensors_of(bundle, kind) if ".1." not in item["name"]}
        assert set(re.findall(r'\{ name: "([\w.]+)"', text)) == expected
    assert config.count("{") == config.count("}")
    assert config.count("[") == config.count("]")
