"""One layer's attention on onnxruntime: the body that every reader can run, and the one of our own session.

    python benchmarks/attention_body.py
    python benchmarks/attention_body.py --heads 32 --groups 8 --threads 1

Both are bodies of ``LlamaAttention``: ``standard`` costs by the capacity of the cache, ``onnxruntime`` by the tokens in it.
Past and present are one buffer, as in a session. Medians over repeats of 50 ms at least; results of the two are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import llama_export  # noqa: F401 - first of all: it switches onnxruntime's telemetry off

# isort: split
import numpy as np
import onnx
import onnxruntime
from processes import machine

from llama_export.ops import table
from llama_export.ops.table import DOMAIN, OP_SPECS, OPSET_VERSION, Target

CASES = ((1, 512, 129), (1, 8192, 129), (1, 512, 500), (1, 2048, 2000), (1, 8192, 8000), (512, 512, 0), (512, 8192, 0))
"""(new tokens, capacity, tokens in the cache), one row."""


def model(target: Target, heads: int, groups: int, head_dim: int) -> bytes:
    """A graph of one LlamaAttention."""
    spec = OP_SPECS["LlamaAttention"]
    widths = {"query": heads * head_dim, "key": groups * head_dim, "value": groups * head_dim}
    shapes: dict[str, list[Any]] = {name: ["B", "S", width] for name, width in widths.items()}
    shapes |= {name: ["B", "S", head_dim // 2] for name in ("cos", "sin")}
    shapes |= {name: ["B", groups, "C", head_dim] for name in ("past_key", "past_value")}
    shapes["past_length"] = ["B"]
    names = [item.name for item in spec.inputs]
    outputs = [item.name for item in spec.outputs]
    scale = head_dim**-0.5
    node = onnx.helper.make_node(
        spec.op_type,
        names,
        outputs,
        domain=DOMAIN,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        scale=scale,
    )
    kinds = {"past_length": onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [
            onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), shapes[name])
            for name in names
        ],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    imports = [onnx.helper.make_opsetid("", OPSET_VERSION), onnx.helper.make_opsetid(DOMAIN, 1)]
    functions = table.function_protos(target, head_dim)
    content: bytes = onnx.helper.make_model(
        graph, functions=functions, opset_imports=imports, ir_version=11
    ).SerializeToString()
    return content


def runner(session: Any, feeds: dict[str, np.ndarray[Any, Any]]) -> Callable[[], np.ndarray[Any, Any]]:
    """A function that runs the graph once, the cache in place, and gives ``attn_output``."""
    arrays = {name: array.copy() for name, array in feeds.items()}
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("attn_output", "cpu")
    for part in ("key", "value"):
        shared = arrays[f"past_{part}"]
        binding.bind_output(f"present_{part}", "cpu", 0, np.float32, shared.shape, shared.ctypes.data)

    def run() -> np.ndarray[Any, Any]:
        session.run_with_iobinding(binding)
        result: np.ndarray[Any, Any] = binding.get_outputs()[0].numpy()
        return result

    return run


def microseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median of some repeats of 50 ms at least."""
    times = []
    for _ in range(repeats):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 0.05:
            run()
            count += 1
        times.append((time.perf_counter() - start) / count * 1e6)
    return statistics.median(times)


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = args.threads, 3
    sessions = {
        target: onnxruntime.InferenceSession(
            model(target, args.heads, args.groups, args.head_dim), options, providers=["CPUExecutionProvider"]
        )
        for target in table.TARGETS
    }
    rng = np.random.default_rng(0)
    host = machine()
    print(f"{host['cpu']}, {args.threads} threads, load average {host['load_average_1min']}; us a layer\n")
    print("| new tokens | capacity | in the cache | " + " | ".join(table.TARGETS) + " | largest difference |")
    print("|---" * (4 + len(table.TARGETS)) + "|")
    for new, capacity, length in CASES:
        angles = rng.uniform(0, 6, (1, new, args.head_dim // 2)).astype(np.float32)
        feeds = {
            name: rng.standard_normal((1, new, count * args.head_dim), np.float32)
            for name, count in (("query", args.heads), ("key", args.groups), ("value", args.groups))
        }
        feeds |= {"cos": np.cos(angles), "sin": np.sin(angles), "past_length": np.array([length])}
        for part in ("past_key", "past_value"):
            feeds[part] = np.zeros((1, args.groups, capacity, args.head_dim), np.float32)
            feeds[part][:, :, :length] = rng.standard_normal((1, args.groups, length, args.head_dim), np.float32)
        runs = {target: runner(session, feeds) for target, session in sessions.items()}
        left, right = (run().copy() for run in runs.values())
        times = " | ".join(f"{microseconds(run):.0f}" for run in runs.values())
        print(f"| {new} | {capacity} | {length} | {times} | {np.abs(left - right).max():.1g} |")


if __name__ == "__main__":
    main()
