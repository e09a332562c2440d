"""The same library in the TensorRTs there are: it loads, and each plugin is created and asked for what it is.

TensorRT-RTX is tested where its bindings are installed. The lean runtimes of TensorRT 10.15 and 11 exclude each other, so
each lives in an environment of its own: LLAMA_EXPORT_LEAN_PYTHONS lists their interpreters, separated by colons; for each

    python -m venv DIR && DIR/bin/pip install numpy 'tensorrt-lean-cu13-libs==11.*' 'tensorrt-lean-cu13-bindings==11.*'
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest
from library_support import require_plugins, run_python

require_plugins()

import llama_export_plugins  # noqa: E402

LEAN_PYTHONS = [path for path in os.environ.get("LLAMA_EXPORT_LEAN_PYTHONS", "").split(":") if path]
NO_LEAN = "no lean runtime: LLAMA_EXPORT_LEAN_PYTHONS names none, and `tensorrt_lean_bindings` is not installed"
CREATE_ALL = """
import importlib, json, sys
import numpy as np
trt = importlib.import_module(sys.argv[1])

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        pass

registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[2]) is not None

def integer(name, value):
    return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)

def number(name, value):
    return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)

heads = [integer("num_heads", 8), integer("num_kv_heads", 2), integer("head_dim", 64), number("scale", 0.125)]
found = {}
for op, fields in {
    "LlamaRMSNorm": [number("epsilon", 1e-5)],
    "LlamaAddRMSNorm": [number("epsilon", 1e-5)],
    "LlamaAttention": heads,
    "LlamaMaskedAttention": heads,
}.items():
    creator = registry.get_creator(op, "1", "")
    assert creator is not None, op
    plugin = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    assert plugin is not None, op
    refused = creator.create_plugin("node", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    assert refused is None, op
    # What an engine stores: the ABI number decides before everything else.
    last = integer("hidden_size", 8)
    if op.endswith("Attention"):
        last = trt.PluginField("workspace_bytes", np.array([1 << 40], np.int64), trt.PluginFieldType.INT64)
    stored = [*fields, integer("dtype", 0), last]
    for abi, is_right in ((int(sys.argv[3]), True), (3, False), (None, False)):
        given = stored if abi is None else [*stored, integer("abi", abi)]
        made = creator.create_plugin("node", trt.PluginFieldCollection(given), trt.TensorRTPhase.RUNTIME)
        assert (made is not None) == is_right, (op, abi)
    found[op] = [creator.plugin_version, creator.plugin_namespace, [field.name for field in creator.field_names]]
print(json.dumps({"version": trt.__version__, "creators": found}))
"""
EXPECTED = {
    "LlamaRMSNorm": ["1", "", ["epsilon"]],
    "LlamaAddRMSNorm": ["1", "", ["epsilon"]],
    "LlamaAttention": ["1", "", ["num_heads", "num_kv_heads", "head_dim", "scale"]],
    "LlamaMaskedAttention": ["1", "", ["num_heads", "num_kv_heads", "head_dim", "scale"]],
}


def create_all(module: str, python: str) -> str:
    """Creates every plugin in a process of its own; the version of TensorRT that did."""
    printed = run_python(
        CREATE_ALL, module, llama_export_plugins.library_path(), llama_export_plugins.ABI, python=python
    )
    answer = json.loads(printed.splitlines()[-1])
    assert answer["creators"] == EXPECTED
    return str(answer["version"])


def test_tensorrt_rtx_creates_every_plugin() -> None:
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("`tensorrt_rtx_bindings` is not installed: pip install 'llama-export[tensorrt-rtx]'")
    print(f"TensorRT-RTX {create_all('tensorrt_rtx_bindings', sys.executable)}")


@pytest.mark.parametrize("python", LEAN_PYTHONS or [sys.executable])
def test_tensorrt_lean_creates_every_plugin(python: str) -> None:
    if not LEAN_PYTHONS and importlib.util.find_spec("tensorrt_lean_bindings") is None:
        pytest.skip(NO_LEAN)
    print(f"TensorRT {create_all('tensorrt_lean_bindings', python)}")
