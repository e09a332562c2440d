"""Proof without a GPU of the onnxruntime sessions on CUDA: what they ask of CUDA, counted by a stand-in for it.

    python scripts/cuda_session_proof.py BUNDLE... [--json FILE]

Needs onnxruntime-gpu 1.31 or newer with CUDA's libraries (`pip install 'llama-export[cuda]'`), bundles, and `cc`: it compiles
cuda_stand_in.c and runs itself again with that preloaded. Device memory is the host's then, so places, copies and
allocations are real; kernels do nothing, so **numbers and speed are not shown**. Checks marked *control* run on a session
with a fault put into it, or on the other graph, and pass if the fault is found.

Exit code: 0 all as expected; 1 something is not; 3 something is missing here.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llama_export.bundle.bundle import Bundle, load_bundle  # noqa: E402
from llama_export.errors import LlamaExportError, ToolchainError  # noqa: E402
from llama_export.runtime import onnxruntime_graph as graph_module  # noqa: E402
from llama_export.runtime.buffers import ONNX_DTYPES, widened  # noqa: E402
from llama_export.runtime.onnxruntime_graph import open_graph  # noqa: E402
from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession, OnnxRuntimeSession  # noqa: E402

SOURCE = Path(__file__).with_name("cuda_stand_in.c")
ROWS = 2
STEPS = 16
DIMENSIONS = 4
"""Of the largest rank in the graph: a shape has as many integers."""
Counts = dict[str, int]


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    bundle: str
    name: str
    got: str
    expected: str
    passed: bool | None
    """None: a fact to know, not judged."""


class StandIn:
    """The preloaded stand-in's counters; see cuda_stand_in.c."""

    _FIELDS = (
        "host_to_device", "device_to_host", "device_to_device", "copies", "set_bytes", "outside", "kernels", "products", "tf32",
        "allocations", "allocated_bytes", "frees", "pinned_allocations", "pinned_frees", "synchronisations",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        fields = [(name, ctypes.c_long) for name in self._FIELDS]
        self._library.stand_in_counts.restype = type("_Counts", (ctypes.Structure,), {"_fields_": fields})
        self._library.stand_in_kernel.restype = ctypes.c_char_p
        self._memory = ctypes.c_long.in_dll(self._library, "stand_in_memory")

    def count(self, work: Callable[[], Any]) -> Counts:
        """What ``work`` asks of CUDA."""
        before = self._library.stand_in_counts()
        work()
        after = self._library.stand_in_counts()
        return {name: getattr(after, name) - getattr(before, name) for name in self._FIELDS}

    def kernels(self) -> Counter[str]:
        """Kernel, by its mangled name -> launches so far."""
        found, launches, number = Counter[str](), ctypes.c_long(), 0
        while (name := self._library.stand_in_kernel(number, ctypes.byref(launches))) is not None:
            found[name.decode()] += launches.value
            number += 1
        return +found

    @contextmanager
    def memory(self, size: int) -> Iterator[None]:
        """A GPU of ``size`` bytes."""
        whole, self._memory.value = self._memory.value, size
        try:
            yield
        finally:
            self._memory.value = whole


class Proof:
    """The checks of one bundle.

    Args:
        stand_in: preloaded.
        bundle: of any task.
        scratch: a folder for files of onnxruntime.
    """

    def __init__(self, stand_in: StandIn, bundle: Bundle, scratch: Path) -> None:
        self._stand_in, self._bundle, self._scratch = stand_in, bundle, scratch
        self.label = f"{bundle.task} {bundle.dtype}"
        self.checks: list[Check] = []
        self.figures: dict[str, Any] = {"bundle": self.label}

    def run(self) -> None:
        """All checks."""
        self._graph()
        if self._bundle.task == "causal-lm":
            self._placement(lambda: self._stepped(self._session(self._bundle.config.max_length)))
            self._decode()
            self._rows()
            self._memory()
        else:
            self._placement(self._head)
            self._predict()

    def _judge(self, name: str, got: str, expected: str, passed: bool | None) -> None:
        self.checks.append(Check(self.label, name, got, expected, passed))

    def _session(self, capacity: int, rows: int = ROWS) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self._bundle, max_seq_len=capacity, batch_size=rows, device="cuda")

    @staticmethod
    def _stepped(session: OnnxRuntimeSession) -> Any:
        """The onnxruntime session, after a prefill and a decode step of all rows."""
        session.step(np.ones((session.batch_size, 3), np.int64), sequence_length=[3] + [2] * (session.batch_size - 1))
        session.step(np.ones((session.batch_size, 1), np.int64))
        return session._graph.session

    # ---- the graph ---------------------------------------------------------------------------------------------------

    def _graph(self) -> None:
        """Copies that onnxruntime puts into the graph where the next operator runs elsewhere."""
        open_graph(self._bundle, device="cuda")  # or an error: onnxruntime by itself would go on with the CPU
        self._judge("copies in model.onnx", *_no_copies(self._copies(self._bundle.model_path)))
        if self._bundle.onnxruntime_path == self._bundle.model_path or self._bundle.task != "causal-lm":
            return
        got, _, clean = _no_copies(self._copies(self._bundle.onnxruntime_path))
        self._judge("control: in model.onnxruntime.onnx", got, "some: GroupQueryAttention in float32", not clean)

    def _copies(self, path: Path) -> int:
        """Nodes that copy between host and device in a graph as onnxruntime runs it on CUDA."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        target = self._scratch / "optimised.onnx"
        options.optimized_model_filepath = str(target)
        graph_module._open(
            onnxruntime, path, options, [(graph_module._CUDA, graph_module._CUDA_OPTIONS), "CPUExecutionProvider"]
        )
        data = target.read_bytes()
        # A node's operator is field 4, a string; fields hold their length.
        return sum(data.count(b"\x22" + bytes([len(op)]) + op) for op in (b"MemcpyToHost", b"MemcpyFromHost"))

    def _placement(self, run: Callable[[], Any]) -> None:
        """Which operator ran where, by onnxruntime's own profile of a run."""
        usual = graph_module._session_options

        def profiled(onnxruntime: Any, threads: int | None) -> Any:
            options = usual(onnxruntime, threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(self._scratch / "profile")
            return options

        graph_module._session_options = profiled
        try:
            profile = run().end_profiling()
        finally:
            graph_module._session_options = usual
        events = json.loads(Path(profile).read_text(encoding="utf-8"))
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        places = {"CUDAExecutionProvider": Counter[str](), "CPUExecutionProvider": Counter[str]()}
        largest = 0
        for event in nodes:
            facts = event["args"]
            places[facts["provider"]][facts["op_name"]] += 1
            if facts["provider"] == "CPUExecutionProvider":
                largest = max([largest, *(_elements(out) for out in facts["output_type_shape"])])
        cuda, cpu = places.values()
        self.figures["runs on CUDA"], self.figures["runs on the CPU"] = dict(cuda), dict(cpu)
        self._judge(
            "operators on the CPU",
            f"{', '.join(f'{op} ({number})' for op, number in sorted(cpu.items())) or 'none'}, results of at most {largest} "
            f"integers; on CUDA {cuda.total()} of {len(cuda)} kinds",
            f"shape arithmetic only: at most {DIMENSIONS} integers",
            largest <= DIMENSIONS and cuda.total() > 0,
        )

    # ---- a decode step -----------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        longest, layers = self._bundle.config.max_length, self._bundle.config.num_hidden_layers
        found, later, cache_bytes = [], [], []
        for capacity in (longest // 4, longest):
            session = self._session(capacity)
            step = partial(session.step, np.ones((ROWS, 1), np.int64))
            self._fresh(session, capacity)
            session.step(np.ones((ROWS, 3), np.int64))
            for _ in range(3):
                step()
            self._addresses(session, capacity)
            before = self._stand_in.kernels()
            found.append(self._stand_in.count(step))
            launched = self._stand_in.kernels() - before
            later.append(self._stand_in.count(lambda step=step: [step() for _ in range(STEPS)]))  # type: ignore[misc]
            cache_bytes.append(sum(_size(buffer) for buffer in session._buffers.values()))
        small, large = found
        logits, inputs = ROWS * self._bundle.config.vocab_size * 4, 4 * ROWS * 8
        self.figures["decode step"] = {
            f"cache of {size} bytes": counts for size, counts in zip(cache_bytes, found, strict=True)
        }
        self.figures["kernels of a decode step"] = dict(launched)
        self._judge(
            "decode: host to device",
            f"{large['host_to_device']} bytes",
            f"the inputs: at most {inputs}",
            large["host_to_device"] <= inputs,
        )
        self._judge(
            "decode: device to host",
            f"{large['device_to_host']} bytes",
            f"the logits: {logits}",
            large["device_to_host"] == logits,
        )
        self._judge("decode: within the device", *_no_cache_copies(small, large, cache_bytes))
        self._judge("decode: copies out of bounds", str(large["outside"]), "0", large["outside"] == 0)
        names = ("allocations", "frees", "pinned_allocations", "pinned_frees")
        memory = sum(counts[name] for counts in later for name in names)
        self._judge(f"decode: memory taken or freed in {STEPS} steps", f"{memory} times", "0", memory == 0)
        self._judge(
            "decode: the host waits", f"{large['synchronisations']} times", "at most 2", large["synchronisations"] <= 2
        )
        scatters = sum(number for name, number in launched.items() if "TensorScatter" in name)
        self._judge(
            "decode: kernels",
            f"{large['kernels']}, and {large['products']} products; {scatters} write the cache",
            f"as many at both capacities; {2 * layers} write",
            scatters == 2 * layers and all(small[name] == large[name] for name in ("kernels", "products")),
        )
        expanded = sum(number for name, number in launched.items() if "Ungroup" in name)
        self._judge(
            "decode: the whole cache repeated for each query head",
            f"by {expanded} kernels",
            "0 where a step costs by its tokens",
            None,
        )
        self._two_buffers(longest, cache_bytes)
        self._tf32(session)

    def _fresh(self, session: OnnxRuntimeSession, capacity: int) -> None:
        raw = [buffer._bytes.numpy() for buffer in session._buffers.values()]
        self._judge(f"cache at first, C = {capacity}", f"{sum(map(np.count_nonzero, raw))} bytes that are not 0", "0 (fresh memory holds NaN)", not any(map(np.any, raw)))  # fmt: skip

    def _addresses(self, session: OnnxRuntimeSession, capacity: int) -> None:
        returned = session.output_addresses()
        right = sum(session._buffers[name].address(0) == address for name, address in returned.items())
        self._judge(
            f"present where past is, C = {capacity}",
            f"{right} of {len(returned)} tensors",
            f"{2 * self._bundle.config.num_hidden_layers}",
            right == len(returned) == 2 * self._bundle.config.num_hidden_layers,
        )

    def _two_buffers(self, capacity: int, cache_bytes: list[int]) -> None:
        """The fault that the count of copies must find: past and present in two places."""
        session = self._session(capacity)
        other = OnnxRuntimeSession(
            self._bundle, max_seq_len=capacity, batch_size=ROWS, device="cuda", graph=session._graph
        )
        session._bind_cache(slice(0, ROWS))
        shape = next(iter(other._buffers.values())).shape
        for past, present in session._names:
            dtype = ONNX_DTYPES[self._bundle.dtype]
            session._binding.bind_output(present, "cuda", 0, dtype, shape, other._buffers[past].address(0))
        self._stepped(session)
        counts = self._stand_in.count(lambda: session.step(np.ones((ROWS, 1), np.int64)))
        got, _, clean = _no_cache_copies(counts, counts, cache_bytes)
        found = not clean and counts["device_to_device"] >= cache_bytes[-1]
        self._judge("control: past and present in two buffers", got, f"at least the cache: {cache_bytes[-1]}", found)

    def _tf32(self, session: OnnxRuntimeSession) -> None:
        counts = self._stand_in.count(lambda: session.step(np.ones((ROWS, 1), np.int64)))
        self._judge("products rounded to TF32", f"{counts['tf32']} of {counts['products']}", "0", counts["tf32"] == 0)
        if self._bundle.dtype != "float32":
            return
        ours = graph_module._CUDA_OPTIONS
        graph_module._CUDA_OPTIONS = {}
        try:
            usual = self._session(session.capacity)
        finally:
            graph_module._CUDA_OPTIONS = ours
        counts = self._stand_in.count(lambda: usual.step(np.ones((ROWS, 1), np.int64)))
        self._judge(
            "control: with onnxruntime's own settings",
            f"{counts['tf32']} of {counts['products']}",
            "some",
            counts["tf32"] > 0,
        )

    # ---- rows and memory ---------------------------------------------------------------------------------------------

    def _rows(self) -> None:
        """Random bytes in every tensor, and where they are afterwards."""
        rows, kept = 4, [1, 3]
        session = self._session(32, rows)
        session.step(np.ones((rows, 4), np.int64), sequence_length=[4, 2, 3, 4])
        rng, raw = np.random.default_rng(0), {}
        for name, buffer in session._buffers.items():
            raw[name] = rng.integers(0, 0x3C, _size(buffer), np.uint8)  # finite in every dtype
            buffer._bytes.update_inplace(raw[name])
        read = [np.array_equal(session.cache_array(name), self._values(raw[name], rows)) for name in raw]
        self._judge("cache_array", f"{sum(read)} of {len(read)} tensors exact", "all", all(read))

        still = self._stand_in.count(lambda: session.rewind([3, 2, 0, 4]))
        self._judge("rewind", f"{session.past_length.tolist()}, {still['copies']} copies", "[3, 2, 0, 4], 0 copies", still["copies"] == 0 and session.past_length.tolist() == [3, 2, 0, 4])  # fmt: skip
        moved = self._stand_in.count(lambda: session.keep_rows(kept))
        whole = sum(map(len, raw.values()))
        right = [np.array_equal(session.cache_array(name), self._values(raw[name], rows)[kept]) for name in raw]
        self._judge(
            "keep_rows [1, 3] of 4",
            f"{sum(right)} of {len(right)} tensors right, {moved['host_to_device']} bytes each way",
            f"all, the cache once: {whole}",
            all(right) and moved["host_to_device"] == moved["device_to_host"] == whole and moved["outside"] == 0,
        )
        addresses = []
        for width in (2, 1):  # the first rows only
            session.step(np.ones((width, 1), np.int64))
            addresses.append(session.output_addresses() == {n: b.address(0) for n, b in session._buffers.items()})
        still = self._stand_in.count(session.reset)
        self._judge("reset", f"{session.past_length.tolist()}, {still['copies']} copies", "[0, 0], 0 copies", still["copies"] == 0 and not session.past_length.any())  # fmt: skip
        session.reset(rows + 1)
        self._stepped(session)
        addresses.append(session.output_addresses() == {n: b.address(0) for n, b in session._buffers.items()})
        zeros = not any(buffer._bytes.numpy().any() for buffer in session._buffers.values())
        self._judge(
            "steps of fewer rows, reset to more",
            f"in place {addresses}, zeros {zeros}",
            "all true",
            all(addresses) and zeros,
        )

    def _values(self, raw: Any, rows: int) -> Any:
        config = self._bundle.config
        return widened(raw, self._bundle.dtype).reshape(rows, config.num_key_value_heads, -1, config.head_dim)

    def _memory(self) -> None:
        """What a session takes of the GPU before its first step, and a cache that the GPU cannot hold."""
        sessions: list[OnnxRuntimeSession] = []
        capacity = self._bundle.config.max_length
        counts = self._stand_in.count(lambda: sessions.append(self._session(capacity)))
        taken, needed = counts["allocated_bytes"], counts["host_to_device"]
        self.figures["bytes of the GPU"] = {"taken": taken, "weights and cache": needed}
        self._judge(
            "memory of a new session",
            f"{taken} bytes",
            f"weights and cache, {needed}, and at most a tenth or 2 MB more",
            taken <= max(1.1 * needed, needed + (2 << 20)),
        )
        graph = open_graph(self._bundle, device="cuda")
        try:
            with self._stand_in.memory(0):
                OnnxRuntimeSession(self._bundle, max_seq_len=capacity, batch_size=512, device="cuda", graph=graph)
            refusal = "no error"
        except ToolchainError as err:
            refusal = str(err).splitlines()[0]
        self._judge("a cache that the GPU cannot hold", refusal, "a sentence", "does not hold this cache" in refusal)

    # ---- heads -------------------------------------------------------------------------------------------------------

    def _head(self) -> Any:
        session = OnnxRuntimeHeadSession(self._bundle, device="cuda")
        session.run([[1, 2, 3]])
        return session._session

    def _predict(self) -> None:
        session = OnnxRuntimeHeadSession(self._bundle, device="cuda")
        for _ in range(3):
            session.run([[1, 2, 3]])
        outputs: list[Mapping[str, Any]] = []
        counts = self._stand_in.count(lambda: outputs.append(session.run([[1, 2, 3]])))
        size = sum(array.nbytes for array in outputs[0].values())
        self.figures["prediction"] = counts
        self._judge(
            "prediction: host to device",
            f"{counts['host_to_device']} bytes",
            "the inputs: at most 48",
            counts["host_to_device"] <= 48,
        )
        self._judge(
            "prediction: device to host",
            f"{counts['device_to_host']} bytes",
            f"the outputs: {size}",
            counts["device_to_host"] == size,
        )
        self._judge(
            "prediction: memory taken or freed",
            f"{counts['allocations'] + counts['frees']} times",
            "0",
            counts["allocations"] + counts["frees"] == 0,
        )
        self._judge(
            "prediction: kernels",
            f"{counts['kernels']}, and {counts['products']} products",
            "some",
            counts["kernels"] > 0,
        )
        self._judge("products rounded to TF32", f"{counts['tf32']} of {counts['products']}", "0", counts["tf32"] == 0)


def _no_copies(number: int) -> tuple[str, str, bool]:
    return f"{number} nodes", "0", number == 0


def _no_cache_copies(small: Counts, large: Counts, cache_bytes: list[int]) -> tuple[str, str, bool]:
    """Got, expected and verdict of what a step copies within the device, with caches of two sizes."""
    copied = [counts["device_to_device"] for counts in (small, large)]
    got = f"{copied[0]} and {copied[1]} bytes, caches of {cache_bytes[0]} and {cache_bytes[1]}"
    return got, "the same, and less than a quarter of the cache", copied[0] == copied[1] < cache_bytes[0] / 4


def _size(buffer: Any) -> int:
    return int(buffer.shape[0] * buffer._row_bytes)


def _elements(output: Mapping[str, list[int]]) -> int:
    """Elements of an output in a profile, `{dtype: shape}`; what is not an integer tensor counts as many."""
    ((dtype, shape),) = output.items()
    return int(np.prod(shape)) if dtype == "int64" else 1 << 30


def table(checks: list[Check]) -> list[str]:
    """In Markdown."""
    lines = ["| bundle | check | got | expected | |", "|---|---|---|---|---|"]
    for check in checks:
        verdict = {True: "pass", False: "FAIL", None: "-"}[check.passed]
        lines.append(f"| {check.bundle} | {check.name} | {check.got} | {check.expected} | {verdict} |")
    return lines


def prove(stand_in: StandIn, paths: list[Path], target: Path | None) -> int:
    """All bundles; prints the table."""
    import onnxruntime

    onnxruntime.preload_dlls = partial(onnxruntime.preload_dlls, cudnn=False)  # it wants a driver of its own
    proofs = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in paths:
            proof = Proof(stand_in, load_bundle(path), Path(scratch))
            try:
                proof.run()
            except LlamaExportError as err:
                if not proof.checks:  # CUDA does not start here, for no bundle
                    raise
                reason = err.details.get("reason", err) if err.details else err
                proof.checks.append(Check(proof.label, "the rest", " ".join(str(reason).split()), "runs", False))
            proofs.append(proof)
    checks = [check for proof in proofs for check in proof.checks]
    failed = sum(check.passed is False for check in checks)
    print("\n".join(table(checks)))
    print(
        f"\n{len(checks)} checks, {failed} failed; onnxruntime {onnxruntime.__version__}, no GPU: kernels did nothing."
    )
    if target is not None:
        found = {
            "onnxruntime": onnxruntime.__version__,
            "checks": [asdict(check) for check in checks],
            "figures": [proof.figures for proof in proofs],
        }
        target.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


def missing() -> str | None:
    """What this environment lacks, if anything."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        return "onnxruntime is not installed here"
    if not list(Path(found.origin).parent.glob("capi/libonnxruntime_providers_cuda.*")):
        return "the onnxruntime here has no CUDA provider: it is the package for the CPU"
    return None if shutil.which("cc") else "there is no C compiler `cc` here"


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundles", nargs="+", type=Path, metavar="BUNDLE", help="from `llama-export export`, any task and dtype"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the checks and all counts")
    parser.add_argument("--stand-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stand_in is not None:
        try:
            return prove(StandIn(args.stand_in), args.bundles, args.json)
        except LlamaExportError as err:
            print(f"error: {err}", file=sys.stderr)
            return err.exit_code
    if lacking := missing():
        print(
            f"error: {lacking}\n\nhint: pip install 'llama-export[cuda]' into an environment of its own; no GPU is needed",
            file=sys.stderr,
        )
        return 3
    with tempfile.TemporaryDirectory() as folder:
        # The driver's name, so that whoever needs the driver has found it.
        library = Path(folder) / "libcuda.so.1"
        flags = ["-std=gnu11", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-pthread"]
        subprocess.run(["cc", *flags, "-o", str(library), str(SOURCE)], check=True)
        again = [sys.executable, __file__, *sys.argv[1:], "--stand-in", str(library)]
        return subprocess.run(again, env={**os.environ, "LD_PRELOAD": str(library)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
