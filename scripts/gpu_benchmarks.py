"""How fast the plugin library is on this GPU, beside peers measured in the same run. Part of `make gpu`; alone:

    python scripts/gpu_benchmarks.py --out build/gpu_benchmarks.json [--only TEXT] [--budget-s 180] [--rehearse]
    python scripts/gpu_benchmarks.py --readme    # the newest report's figures into plugins/README.md

| what | work counted | peers | target |
|---|---|---|---|
| RMSNorm, add + RMSNorm | bytes of inputs and outputs | device copies that move as many bytes | 0.90 of their bandwidth |
| decode attention | bytes of the cache's valid part, of the new tokens and of the output | device copies; SDPA backends | 0.85 of the copy; no backend faster |
| prefill attention | 4 H D S^2 / 2 operations a row | SDPA backends | no slower than flash; 0.75 of the fastest |

How it is measured. Ours is the library's own `enqueue`, with RoPE and the write into the cache (in place); SDPA is given
rotated tensors and only attends. Everything is captured into CUDA graphs over buffers that together are at least four
times the L2 cache, so that every call finds it cold. A sample is one replay (several milliseconds) divided by its
calls, between two CUDA events; samples of ours and of the peers alternate, so that all see the same clocks. A ratio
compares medians. Of two copies the faster one counts.

Before a case is timed, its result is checked against SDPA or PyTorch's maths, and again after the replays, whose outputs
start as NaN: a wrong result is a failure and has no figures. What cannot run is a row with its reason. A missed target is
no failure of the suite; it is shown as missed.

Exit code: 0 nothing failed; 1 a result is wrong or a plugin refused; 2 usage; 3 no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

ROOT = Path(__file__).resolve().parents[1]
# build/plugins: a plugin package brought along; see gpu_suite.py.
for _folder in ("scripts", ".", "build/plugins"):
    if str(ROOT / _folder) not in sys.path:
        sys.path.insert(0, str(ROOT / _folder))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

if TYPE_CHECKING:
    from llama_export_plugins.harness import GuardedBuffer, PluginLibrary, PreparedPlugin

BUDGET_S = 180.0
COLD_FACTOR = 4
"""Rotated buffers are at least this many times the L2 cache."""
SAMPLES, REHEARSAL_SAMPLES = 25, 2
WARM_REPLAYS = 3
REPLAY_S = 4e-3
"""What a replay should last: far more than the microseconds that launching one costs."""
MAX_CALLS = 256
"""Nodes of a graph, at most."""
MATH_CACHE_BYTES = 512 * 2**20
"""SDPA's math backend repeats keys and values in float32, so it is a peer up to this size of cache only."""
MEMORY_SHARE = 0.9
"""Of the free memory, what a case may need."""
LIMIT, VECTOR_LIMIT = 2.0, 8.0
"""Relative L2 distance from the peer's result, in units of the dtype's eps: of the whole, and of the worst vector (a head's
output or a row). Two right results are about 0.6 apart: each rounds its weights and its output once."""
COPY, DRIVER_COPY = "torch copy_", "cuMemcpyDtoDAsync"
PART = "speed, by enqueue"

Call = Callable[[int], None]
"""Puts one run of something on the stream with this handle."""


class NotRun(Exception):
    """A case or peer cannot run here; the text is the reason."""


class WrongResult(Exception):
    """Ours is not what the peer computed."""


# ---- timing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call, over samples that are each the mean of ``calls`` calls."""

    seconds: float
    """Median."""
    p10: float
    p90: float
    samples: int
    calls: int
    captured: bool
    """Whether a CUDA graph was replayed; else the calls were launched one by one."""


def timing_of(samples: Sequence[float], calls: int, captured: bool) -> Timing:
    """From seconds per call."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(
        seconds=statistics.median(samples), p10=deciles[0], p90=deciles[8], samples=len(samples), calls=calls,
        captured=captured,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Something to be timed: ``run`` launches ``calls`` calls, which take about ``seconds`` together."""

    run: Callable[[], None]
    calls: int
    seconds: float
    captured: bool
    not_captured: str
    """Why it is not."""
    keep: Sequence[Call]
    """The captured calls: they hold the memory that the graph reads and writes."""


class Timer(Protocol):
    """Where things run and how their time is taken."""

    device: str
    l2_bytes: int
    samples: int
    has_graphs: bool

    def free_bytes(self) -> float:
        """Memory that can be allocated."""

    def release(self) -> None:
        """Gives unused memory back."""

    def run(self, calls: Sequence[Call]) -> None:
        """Runs calls one after the other and waits for them."""

    def prepare(self, calls: Sequence[Call]) -> Replay:
        """Warms up the calls, one for each set of rotated buffers, and makes them ready to be timed."""

    def sample(self, replays: Sequence[Replay]) -> list[list[float]]:
        """Alternating samples of each: seconds per call."""


class GpuTimer:
    """CUDA graphs between CUDA events, on a stream of its own."""

    device = "cuda"
    samples = SAMPLES
    has_graphs = True

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20
        self.stream = torch.cuda.Stream()

    def free_bytes(self) -> float:
        """See :class:`Timer`."""
        return float(torch.cuda.mem_get_info()[0])

    def release(self) -> None:
        """See :class:`Timer`."""
        torch.cuda.empty_cache()

    def run(self, calls: Sequence[Call]) -> None:
        """See :class:`Timer`."""
        torch.cuda.synchronize()  # what the calls read was written on another stream
        with torch.cuda.stream(self.stream):
            self._launch(calls, 1)
        torch.cuda.synchronize()

    def prepare(self, calls: Sequence[Call]) -> Replay:
        """See :class:`Timer`. What cannot be captured is launched call by call, and says so (``captured``)."""
        self.run(calls)  # what loads lazily or plans on first use must do so before the capture
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            start.record(self.stream)
            self._launch(calls, 1)
            end.record(self.stream)
        torch.cuda.synchronize()
        seconds = max(start.elapsed_time(end) * 1e-3, 1e-7)
        passes = max(1, min(round(REPLAY_S / seconds), MAX_CALLS // len(calls)))
        not_captured = ""
        run: Callable[[], None]
        try:
            run = self._capture(calls, passes)
        except Exception as err:  # noqa: BLE001 - whatever forbids the capture, the calls themselves just ran
            not_captured = describe(err)
            self.stream = torch.cuda.Stream()  # the capture may have left the other one unusable
            torch.cuda.synchronize()

            def run() -> None:
                self._launch(calls, passes)

        return Replay(
            run=run, calls=passes * len(calls), seconds=passes * seconds, captured=not not_captured,
            not_captured=not_captured, keep=list(calls),
        )  # fmt: skip

    def _launch(self, calls: Sequence[Call], passes: int) -> None:
        for _ in range(passes):
            for call in calls:
                call(self.stream.cuda_stream)

    def _capture(self, calls: Sequence[Call], passes: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # The outer `stream`: where a capture fails, `graph` leaves its own as the current one.
        with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
            self._launch(calls, passes)
        torch.cuda.synchronize()
        replay: Callable[[], None] = graph.replay
        return replay

    def sample(self, replays: Sequence[Replay]) -> list[list[float]]:
        """See :class:`Timer`."""
        torch.cuda.synchronize()
        events: list[list[tuple[Any, Any]]] = [[] for _ in replays]
        with torch.cuda.stream(self.stream):
            for replay in replays:
                for _ in range(WARM_REPLAYS):
                    replay.run()
            for _ in range(self.samples):
                for replay, pairs in zip(replays, events, strict=True):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record(self.stream)
                    replay.run()
                    end.record(self.stream)
                    pairs.append((start, end))
        torch.cuda.synchronize()
        return [
            [start.elapsed_time(end) * 1e-3 / replay.calls for start, end in pairs]
            for replay, pairs in zip(replays, events, strict=True)
        ]


class RehearsalTimer:
    """The same on the CPU, by the clock on the wall: for trying the code, not for figures."""

    device = "cpu"
    samples = REHEARSAL_SAMPLES
    has_graphs = False
    l2_bytes = 2048
    """So small that tiny tensors are rotated, too."""

    def free_bytes(self) -> float:
        """See :class:`Timer`."""
        return float("inf")

    def release(self) -> None:
        """See :class:`Timer`."""

    def run(self, calls: Sequence[Call]) -> None:
        """See :class:`Timer`."""
        for call in calls:
            call(0)

    def prepare(self, calls: Sequence[Call]) -> Replay:
        """See :class:`Timer`."""
        start = time.perf_counter()
        self.run(calls)
        seconds = time.perf_counter() - start
        return Replay(
            run=lambda: self.run(calls), calls=len(calls), seconds=seconds, captured=False,
            not_captured="a rehearsal has no CUDA graphs", keep=list(calls),
        )  # fmt: skip

    def sample(self, replays: Sequence[Replay]) -> list[list[float]]:
        """See :class:`Timer`."""
        found: list[list[float]] = [[] for _ in replays]
        for _ in range(self.samples):
            for replay, samples in zip(replays, found, strict=True):
                start = time.perf_counter()
                replay.run()
                samples.append((time.perf_counter() - start) / replay.calls)
        return found


# ---- cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a case should reach: ``at_least`` times the speed of ``peer``."""

    peer: Literal["copy", "flash", "fastest backend"]
    at_least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to be timed. Sizes: rows x hidden of a norm; batch, length (tokens seen), H, G, D of an attention."""

    kind: Literal["norm", "decode", "prefill"]
    op: str
    dtype: torch.dtype
    sizes: Mapping[str, int]
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        """As in the report."""
        dtype, sizes = str(self.dtype).removeprefix("torch."), self.sizes
        if self.kind == "norm":
            label = "add + RMSNorm" if self.op == "LlamaAddRMSNorm" else "RMSNorm"
            return f"{label} {dtype} [{sizes['rows']}, {sizes['hidden']}], {_size(self.tensor_bytes)} a tensor"
        if self.kind == "decode":
            return (
                f"decode {dtype} batch {sizes['batch']}, length {sizes['length']}, {_size(self.cache_bytes)} of cache"
            )
        return f"prefill {dtype} batch {sizes['batch']}, length {sizes['length']}"

    @property
    def tensor_bytes(self) -> int:
        """Of a norm's tensors."""
        return self.sizes["rows"] * self.sizes["hidden"] * self.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """Of an attention's valid keys and values."""
        sizes = self.sizes
        return 2 * sizes["batch"] * sizes["G"] * sizes["length"] * sizes["D"] * self.dtype.itemsize

    @property
    def new_tokens(self) -> int:
        """S of an attention."""
        return self.sizes["length"] if self.kind == "prefill" else 1

    @property
    def query_bytes(self) -> int:
        """Of an attention's query, and of its output."""
        return self.sizes["batch"] * self.new_tokens * self.sizes["H"] * self.sizes["D"] * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """What has to cross the memory bus, each byte once: what is read, plus what is written."""
        if self.kind == "norm":
            tensors = 4 if self.op == "LlamaAddRMSNorm" else 2
            return tensors * self.tensor_bytes + self.sizes["hidden"] * self.dtype.itemsize
        sizes = self.sizes
        tokens = sizes["batch"] * self.new_tokens
        new = 2 * tokens * sizes["G"] * sizes["D"] * self.dtype.itemsize
        tables = tokens * sizes["D"] * 4 + sizes["batch"] * 8
        # The cache's valid part is read but for the new keys and values, which are read as inputs and written into it.
        return self.cache_bytes - new + 2 * new + 2 * self.query_bytes + tables

    @property
    def flops(self) -> int:
        """Of the two matrix products of a causal prefill: half of the square."""
        sizes = self.sizes
        return 4 * sizes["batch"] * sizes["H"] * sizes["D"] * sizes["length"] ** 2 // 2

    @property
    def touched_bytes(self) -> int:
        """What ours and every peer that computes the same read and write, at least."""
        return self.bytes if self.kind == "norm" else self.cache_bytes + 2 * self.query_bytes

    @property
    def set_bytes(self) -> int:
        """Memory of one set of buffers, about."""
        if self.kind == "norm":
            return self.bytes
        capacity = rounded_capacity(self.sizes["length"])
        return self.bytes + self.cache_bytes * (capacity - self.sizes["length"]) // self.sizes["length"]

    def rotations(self, l2_bytes: int) -> int:
        """How many sets of buffers are cold when their turn comes again."""
        return -(-COLD_FACTOR * l2_bytes // self.touched_bytes)

    def needed_bytes(self, l2_bytes: int) -> int:
        """Memory of the case with its peers and its check, about."""
        ours = self.rotations(l2_bytes) * self.set_bytes
        copies = max(self.bytes, COLD_FACTOR * l2_bytes)
        if self.kind == "norm":
            return ours + copies + 12 * self.tensor_bytes
        if self.kind == "decode":
            math = 20 * self.cache_bytes if self.cache_bytes <= MATH_CACHE_BYTES else 0
            return ours + copies + math + 2**30
        # Three backends' outputs, and keys and values repeated for each query head.
        return ours + self.rotations(l2_bytes) * 6 * self.query_bytes + 6 * self.query_bytes + 2**30


def rounded_capacity(length: int) -> int:
    """Entries of the cache that a length is given: up to the next multiple of 64."""
    return -(-length // 64) * 64


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count} bytes"


NORM_TARGETS = (Target(peer="copy", at_least=0.90),)
DECODE_TARGETS = (Target(peer="copy", at_least=0.85), Target(peer="fastest backend", at_least=1.0))
PREFILL_TARGETS = (Target(peer="flash", at_least=1.0), Target(peer="fastest backend", at_least=0.75))


def norm_case(op: str, hidden: int, tensor_bytes: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A norm of tensors of this size."""
    rows = tensor_bytes // (hidden * dtype.itemsize)
    return Case(kind="norm", op=op, dtype=dtype, sizes={"rows": rows, "hidden": hidden}, targets=NORM_TARGETS)


def attention_case(
    kind: Literal["decode", "prefill"], batch: int, length: int, dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int, int] = (32, 8, 128),
) -> Case:  # fmt: skip
    """Attention over ``length`` tokens, of which a decode computes the last and a prefill all; ``heads`` is H, G, D."""
    sizes = {"batch": batch, "length": length, "H": heads[0], "G": heads[1], "D": heads[2]}
    targets = DECODE_TARGETS if kind == "decode" else PREFILL_TARGETS
    return Case(kind=kind, op="LlamaAttention", dtype=dtype, sizes=sizes, targets=targets)


def cases(rehearse: bool = False) -> list[Case]:
    """What is measured, in the order in which the time is spent; of a rehearsal, tiny ones."""
    if rehearse:
        tiny = (4, 2, 16)
        return [
            norm_case("LlamaRMSNorm", 64, 2048),
            norm_case("LlamaAddRMSNorm", 64, 2048),
            attention_case("decode", 2, 20, heads=tiny),
            attention_case("prefill", 1, 20, heads=tiny),
            norm_case("LlamaRMSNorm", 64, 2048, torch.float16),
            attention_case("decode", 1, 64, torch.float16, heads=tiny),
            attention_case("prefill", 1, 8, torch.float16, heads=tiny),
        ]
    norms = [
        norm_case(op, hidden, mebibytes * 2**20)
        for op in ("LlamaRMSNorm", "LlamaAddRMSNorm")
        for hidden in (4096, 8192)
        for mebibytes in (64, 256)
    ]
    # Caches of 512 MiB and more; the last is the longest context.
    decodes = [(32, 4096), (64, 8192), (16, 8192), (8, 16384), (8, 32768), (1, 131072)]
    return [
        *norms,
        *(attention_case("decode", batch, length) for batch, length in decodes),
        *(attention_case("prefill", 1, 1024 * thousands) for thousands in (1, 2, 4, 8, 16)),
        norm_case("LlamaRMSNorm", 4096, 64 * 2**20, torch.float16),
        attention_case("decode", 16, 8192, torch.float16),
        attention_case("prefill", 1, 4096, torch.float16),
        # Last: with 2^31 elements, an offset of 32 bits would end all that comes after in a broken CUDA context.
        attention_case("decode", 64, 32768),
    ]


# ---- peers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Something to compare with. Its ways are tried in order: a note on how it differs, and what makes its calls."""

    name: str
    kind: Literal["copy", "backend"]
    ways: Sequence[tuple[str, Callable[[], list[Call]]]]
    moved_bytes: int = 0
    """Of a copy: read plus written."""


def copy_peers(bytes_moved: int, timer: Timer) -> list[Peer]:
    """Device copies that read and write ``bytes_moved`` bytes in all, over cold buffers."""
    half = max(-(-bytes_moved // 2 // 256) * 256, 256)
    pairs: list[tuple[Tensor, Tensor]] = []

    def buffers() -> list[tuple[Tensor, Tensor]]:
        if not pairs:
            for _ in range(-(-COLD_FACTOR * timer.l2_bytes // (2 * half))):
                source = torch.empty(half, dtype=torch.uint8, device=timer.device).random_()
                pairs.append((source, torch.empty_like(source)))
        return pairs

    def by_torch(source: Tensor, destination: Tensor) -> Call:
        return lambda stream: void(destination.copy_(source))

    def by_driver() -> list[Call]:
        if timer.device == "cpu":
            raise NotRun("a rehearsal has no CUDA driver")
        copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2
        copy.restype = ctypes.c_int
        copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]

        def call_of(source: Tensor, destination: Tensor) -> Call:
            def call(stream: int) -> None:
                status = copy(destination.data_ptr(), source.data_ptr(), half, stream)
                if status != 0:
                    raise RuntimeError(f"cuMemcpyDtoDAsync returned {status}")

            return call

        return [call_of(*pair) for pair in buffers()]

    return [
        Peer(
            name=COPY, kind="copy", ways=[("", lambda: [by_torch(*pair) for pair in buffers()])], moved_bytes=2 * half
        ),
        Peer(name=DRIVER_COPY, kind="copy", ways=[("", by_driver)], moved_bytes=2 * half),
    ]


def void(result: object) -> None:
    """Forgets a result."""
    del result


BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


def sdpa_calls(
    backend: str, tensors: Sequence[tuple[Tensor, Tensor, Tensor]], *, is_causal: bool, enable_gqa: bool
) -> list[Call]:
    """scaled_dot_product_attention by one backend, over (query, key, value) of each set of buffers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, BACKENDS[backend])

    def call_of(query: Tensor, key: Tensor, value: Tensor) -> Call:
        kept: list[Tensor] = []  # each set has an output of its own, as ours has

        def call(stream: int) -> None:
            with sdpa_kernel(chosen):
                kept[:] = [
                    F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)
                ]

        return call

    return [call_of(*item) for item in tensors]


@contextmanager
def reasons(found: list[str]) -> Iterator[None]:
    """Collects what PyTorch warns of: why it does not choose a backend."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                text = " ".join(str(warning.message).split("(Triggered internally")[0].split())
                if text and text not in found:
                    found.append(text)


# ---- workloads ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Workload:
    """A case with its memory: one plugin for each set of rotated buffers."""

    plugins: list[PreparedPlugin]
    poison: Callable[[], None]
    """Makes NaN of what the first plugin will write."""
    check: Callable[[], dict[str, Any]]
    """Compares what the first plugin wrote. Raises WrongResult."""
    peers: list[Peer] = field(default_factory=list)


def difference(what: str, got: Tensor, want: Tensor) -> dict[str, Any]:
    """Relative L2 distance of two 16-bit results, of the whole and of the worst vector along the last axis.

    Raises:
        WrongResult: beyond the limits, or not finite.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise WrongResult(f"{what} is {got.dtype} {list(got.shape)}, the peer's result {want.dtype} {list(want.shape)}")
    width = got.shape[-1]
    rows = max(1, 2**24 // width)  # a bounded amount of float32 at a time
    wrong, norm, worst = [], [], []
    for ours, theirs in zip(got.reshape(-1, width).split(rows), want.reshape(-1, width).split(rows), strict=True):
        off = (ours.float() - theirs.float()).square().sum(-1, dtype=torch.float64)
        size = theirs.float().square().sum(-1, dtype=torch.float64)
        wrong.append(off.sum())
        norm.append(size.sum())
        worst.append((off / size.clamp(min=1e-30)).max())
    eps = torch.finfo(got.dtype).eps
    error = float((torch.stack(wrong).sum() / torch.stack(norm).sum().clamp(min=1e-30)).sqrt())
    vector = float(torch.stack(worst).max().sqrt())  # NaN, if there is one
    if not (error <= LIMIT * eps and vector <= VECTOR_LIMIT * eps):
        raise WrongResult(
            f"{what}: relative L2 distance from the peer {error:.2e} (limit {LIMIT * eps:.2e}), "
            f"of the worst vector {vector:.2e} (limit {VECTOR_LIMIT * eps:.2e})"
        )
    return {"what": what, "relative_l2": error, "worst_vector": vector, "limit": LIMIT * eps,
            "vector_limit": VECTOR_LIMIT * eps}  # fmt: skip


def filled(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: str, content: Tensor | None = None
) -> GuardedBuffer:
    """A buffer of normally distributed numbers, or of ``content``."""
    from llama_export_plugins.harness import GuardedBuffer

    buffer = GuardedBuffer(name, shape, dtype, device)
    if content is None:
        buffer.tensor.normal_()
    else:
        buffer.tensor.copy_(content)
    return buffer


def norm_workload(case: Case, library: PluginLibrary, timer: Timer) -> Workload:
    """A norm and the copies."""
    from llama_export_plugins.harness import PreparedPlugin

    shape = (1, case.sizes["rows"], case.sizes["hidden"])
    is_add = case.op == "LlamaAddRMSNorm"
    names = ("hidden_states", "residual") if is_add else ("hidden_states",)
    epsilon = 1e-5
    plugins = []
    for _ in range(case.rotations(timer.l2_bytes)):
        inputs = [filled(name, shape, case.dtype, timer.device) for name in names]
        inputs.append(filled("weight", shape[-1:], case.dtype, timer.device))
        plugins.append(PreparedPlugin(library, case.op, inputs, (epsilon,), device=timer.device))
    first = plugins[0]

    def poison() -> None:
        for buffer in first.outputs:
            buffer.tensor.fill_(float("nan"))

    def check() -> dict[str, Any]:
        states, weight = [buffer.tensor for buffer in first.inputs[:-1]], first.inputs[-1].tensor
        total = states[0] + states[1] if is_add else states[0]
        # As the op is defined: the quotient is rounded, then the product.
        quotient = total.float() * (total.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        found = difference("normed", first.outputs[0].tensor, quotient.to(case.dtype) * weight)
        if is_add:
            difference("new_residual", first.outputs[1].tensor, total)
        return {"against": "PyTorch's maths", **found}

    return Workload(plugins=plugins, poison=poison, check=check, peers=copy_peers(case.bytes, timer))


def rotated(hidden: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """[B, S, N*D] and [B, S, D/2] -> [B, N, S, D]: RoPE by halves, in float32, rounded once."""
    heads = hidden.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(hidden.dtype)


def attention_workload(case: Case, library: PluginLibrary, timer: Timer) -> Workload:
    """Attention in place, the SDPA backends and, of a decode, the copies."""
    from llama_export_plugins.harness import PreparedPlugin

    B, L, H, G, D = (case.sizes[name] for name in ("batch", "length", "H", "G", "D"))
    S, C = case.new_tokens, rounded_capacity(L)
    past = L - S
    device, is_causal = timer.device, case.kind == "prefill"
    positions = torch.arange(past, L, dtype=torch.float64)
    frequencies = 500000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = (positions[:, None] * frequencies).expand(B, S, D // 2)
    plugins = []
    for _ in range(case.rotations(timer.l2_bytes)):
        inputs = [
            filled("query", (B, S, H * D), case.dtype, device),
            filled("key", (B, S, G * D), case.dtype, device),
            filled("value", (B, S, G * D), case.dtype, device),
            filled("cos", (B, S, D // 2), torch.float32, device, angles.cos().float()),
            filled("sin", (B, S, D // 2), torch.float32, device, angles.sin().float()),
            filled("past_key", (B, G, C, D), case.dtype, device),
            filled("past_value", (B, G, C, D), case.dtype, device),
            filled("past_length", (B,), torch.int64, device, torch.full((B,), past)),
        ]
        attributes = (H, G, D, float(D) ** -0.5)
        plugins.append(PreparedPlugin(library, case.op, inputs, attributes, device=device))
    first = plugins[0]
    query, key, value, cos, sin, key_cache, value_cache = (buffer.tensor for buffer in first.inputs[:7])
    output = first.outputs[0].tensor
    kept: list[Tensor] = []

    def poison() -> None:
        output.fill_(float("nan"))
        for cache in (key_cache, value_cache):
            cache[:, :, past:].fill_(float("nan"))

    def check() -> dict[str, Any]:
        difference("present_key", key_cache[:, :, past:L], rotated(key, cos, sin, D))
        difference("present_value", value_cache[:, :, past:L], value.view(B, S, G, D).transpose(1, 2))
        if not kept:
            attended = F.scaled_dot_product_attention(
                rotated(query, cos, sin, D), key_cache[:, :, :L], value_cache[:, :, :L], is_causal=is_causal,
                enable_gqa=True,
            )  # fmt: skip
            kept.append(attended.transpose(1, 2).contiguous())
        return {"against": "SDPA", **difference("attn_output", output.view(B, S, H, D), kept[0])}

    def heads(index: int) -> tuple[Tensor, Tensor, Tensor]:
        """What SDPA attends with; its time does not depend on the rotation, so these are the inputs as they are."""
        inputs = plugins[index].inputs
        q_BHSD = inputs[0].tensor.view(B, S, H, D).transpose(1, 2)
        if case.kind == "decode":
            return q_BHSD, inputs[5].tensor[:, :, :L], inputs[6].tensor[:, :, :L]
        k_BGSD, v_BGSD = (inputs[position].tensor.view(B, S, G, D).transpose(1, 2) for position in (1, 2))
        return q_BHSD, k_BGSD, v_BGSD

    def folded(index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a decode: the query heads of a group as so many queries of its key head, which sees the same keys."""
        _, k_BGLD, v_BGLD = heads(index)
        return plugins[index].inputs[0].tensor.view(B, G, H // G, D), k_BGLD, v_BGLD

    def expanded(index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a prefill: a copy of the keys and values for each query head."""
        q_BHSD, k_BGSD, v_BGSD = heads(index)
        return q_BHSD, k_BGSD.repeat_interleave(H // G, dim=1), v_BGSD.repeat_interleave(H // G, dim=1)

    def sdpa_peer(backend: str) -> Peer:
        indices = range(len(plugins))

        def grouped() -> list[Call]:
            if backend == "math" and case.cache_bytes > MATH_CACHE_BYTES:
                raise NotRun(f"it repeats keys and values in float32; tried up to {_size(MATH_CACHE_BYTES)} of cache")
            return sdpa_calls(backend, [heads(i) for i in indices], is_causal=is_causal, enable_gqa=True)

        def otherwise() -> list[Call]:
            made = folded if case.kind == "decode" else expanded
            return sdpa_calls(backend, [made(i) for i in indices], is_causal=is_causal, enable_gqa=False)

        note = (
            "without enable_gqa: the heads of a group as queries of one head"
            if case.kind == "decode"
            else "without enable_gqa: keys and values repeated beforehand, not timed"
        )
        ways = [("", grouped)] if backend == "math" else [("", grouped), (note, otherwise)]
        return Peer(name=f"SDPA {backend}", kind="backend", ways=ways)

    # The math backend holds all the scores: of a prefill, S x S for each head.
    backends = ("flash", "efficient", "cudnn", "math") if case.kind == "decode" else ("flash", "efficient", "cudnn")
    peers = [sdpa_peer(backend) for backend in backends]
    if case.kind == "decode":
        peers += copy_peers(case.bytes, timer)
    return Workload(plugins=plugins, poison=poison, check=check, peers=peers)


def make_workload(case: Case, library: PluginLibrary, timer: Timer) -> Workload:
    """The memory of a case, with random content."""
    torch.manual_seed(0)
    return (norm_workload if case.kind == "norm" else attention_workload)(case, library, timer)


# ---- one case -----------------------------------------------------------------------------------------------------


def judge(case: Case, ours: float, peers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates, ratios and targets of a case.

    Args:
        ours: seconds of a call.
        peers: rows of the peers: name, kind and, if they ran, seconds and (copies) bytes.
    """
    ran = [peer for peer in peers if "seconds" in peer]
    copies, backends = ([peer for peer in ran if peer["kind"] == kind] for kind in ("copy", "backend"))
    copied = max((peer["bytes"] / peer["seconds"] for peer in copies), default=None)
    best = min(backends or copies, key=lambda peer: float(peer["seconds"]), default=None)
    flash = next((peer for peer in backends if peer["name"] == "SDPA flash"), None)
    ratios = {
        "copy": case.bytes / ours / copied if copied is not None else None,
        "flash": flash["seconds"] / ours if flash is not None else None,
        "fastest backend": min(float(peer["seconds"]) for peer in backends) / ours if backends else None,
    }
    targets = []
    for target in case.targets:
        ratio = ratios[target.peer]
        targets.append({"peer": target.peer, "at_least": target.at_least, "ratio": ratio,
                        "met": None if ratio is None else ratio >= target.at_least})  # fmt: skip
    met = [target["met"] for target in targets]
    found: dict[str, Any] = {
        "bytes": case.bytes,
        "gb_per_s": case.bytes / ours / 1e9,
        "ratio_to_copy": ratios["copy"] if case.kind != "prefill" else None,
        "best_peer": best["name"] if best is not None else None,
        "ratio_to_best_peer": best["seconds"] / ours if best is not None else None,
        "targets": targets,
        "met": False if False in met else None if None in met else True,
    }
    if case.kind == "prefill":
        del found["bytes"], found["gb_per_s"]
        found |= {"flops": case.flops, "tflop_per_s": case.flops / ours / 1e12}
    return found


def describe(error: BaseException) -> str:
    """An exception in one line, with the one that it hides."""
    text = f"{type(error).__name__}: {error}" if not isinstance(error, NotRun) else str(error)
    if error.__context__ is not None and error.__cause__ is None and not isinstance(error, NotRun):
        text += f" (after {type(error.__context__).__name__}: {error.__context__})"
    return " ".join(text.split())[:600]


def prepared_peer(peer: Peer, timer: Timer) -> tuple[Replay | None, dict[str, Any]]:
    """A peer made ready by the first of its ways that works, and its row: why no way did, or how this one differs."""
    row: dict[str, Any] = {"name": peer.name, "kind": peer.kind}
    if peer.kind == "copy":
        row["bytes"] = peer.moved_bytes
    tried: list[str] = []
    for note, make in peer.ways:
        why: list[str] = []
        timer.release()
        try:
            with reasons(why):
                replay = timer.prepare(make())
        except Exception as err:  # noqa: BLE001 - a peer that cannot run is stated, with what it said
            tried.append("; ".join([describe(err), *why])[:1200])
            continue
        if replay.not_captured and timer.has_graphs:
            row["not_captured"] = replay.not_captured
        if note:
            row |= {"note": note, "refused": tried}
        return replay, row
    return None, {**row, "not_run": " | ".join(tried)}


def run_case(case: Case, library: PluginLibrary, timer: Timer, deadline: float) -> dict[str, Any]:
    """Checks a case, times it beside its peers, and checks it again; its row.

    Args:
        deadline: of ``time.monotonic``.
    """
    row: dict[str, Any] = {
        "case": case.name, "kind": case.kind, "op": case.op, "dtype": str(case.dtype).removeprefix("torch."),
        "sizes": dict(case.sizes),
    }  # fmt: skip
    timer.release()
    needed, free = case.needed_bytes(timer.l2_bytes), timer.free_bytes()
    if needed > MEMORY_SHARE * free:
        raise NotRun(f"needs about {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free")
    workload = make_workload(case, library, timer)
    try:
        ours: list[Call] = [plugin.enqueue for plugin in workload.plugins]
        workload.poison()
        timer.run(ours[:1])
        row["check"] = workload.check()
        replay = timer.prepare(ours)
        if timer.has_graphs and not replay.captured:
            raise RuntimeError(f"enqueue could not be captured into a CUDA graph: {replay.not_captured}")
        ready: list[tuple[Replay, dict[str, Any]]] = [(replay, row)]
        peers = []
        for peer in workload.peers:
            peer_replay, entry = prepared_peer(peer, timer)
            peers.append(entry)
            if peer_replay is not None:
                ready.append((peer_replay, entry))
        expected = sum(replay.seconds for replay, _ in ready) * (timer.samples + WARM_REPLAYS)
        if time.monotonic() + expected > deadline:
            raise NotRun(f"out of time: it would have taken {expected:.0f} s more")
        workload.poison()  # if the replays did nothing, the check below sees it
        sampled = timer.sample([replay for replay, _ in ready])
        workload.check()
        for plugin in workload.plugins:
            plugin.check_red_zones()
        for (replay, entry), samples in zip(ready, sampled, strict=True):
            timing = timing_of(samples, replay.calls, replay.captured)
            entry |= {
                "seconds": timing.seconds, "p10": timing.p10, "p90": timing.p90, "samples": timing.samples,
                "calls_per_sample": timing.calls, "captured": timing.captured,
            }  # fmt: skip
            if entry["kind"] == "copy":
                entry["gb_per_s"] = entry["bytes"] / timing.seconds / 1e9
        row |= {"rotated_buffers": len(workload.plugins), **judge(case, row["seconds"], peers), "peers": peers}
    finally:
        for plugin in workload.plugins:
            plugin.destroy()
    return {**row, "verdict": "pass"}


def attempt(case: Case, library: PluginLibrary, timer: Timer, deadline: float) -> dict[str, Any]:
    """A case's row, whatever happens: passed, failed with an error, or not run with a reason."""
    stated = {"case": case.name, "kind": case.kind, "op": case.op, "sizes": dict(case.sizes)}
    if time.monotonic() >= deadline:
        return {**stated, "verdict": "not-run", "reason": "out of time"}
    try:
        row = run_case(case, library, timer, deadline)
    except NotRun as err:
        row = {**stated, "verdict": "not-run", "reason": str(err)}
    except torch.OutOfMemoryError as err:
        row = {**stated, "verdict": "not-run", "reason": describe(err)}
    except Exception as err:  # noqa: BLE001 - whatever one case raises, the others must still be seen
        row = {**stated, "verdict": "fail", "error": describe(err)}
    try:
        gc.collect()
        timer.release()
    except Exception as err:  # noqa: BLE001 - a broken CUDA context: this case's doing, so it is said there
        row = {**row, "verdict": "fail", "error": f"{row.get('error', '')} afterwards: {describe(err)}".strip()}
    return row


# ---- the whole ----------------------------------------------------------------------------------------------------


CLOCK_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def clocks(when: str) -> dict[str, Any]:
    """Clocks (MHz), power (W) and temperature (degrees Celsius) as nvidia-smi says them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCK_FIELDS)}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    # Not by index: CUDA_VISIBLE_DEVICES renumbers.
    command += ["-i", f"GPU-{uuid}"] if uuid is not None else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as err:
        return {"when": when, "not_run": describe(err)}
    values = done.stdout.strip().splitlines()[0].split(",") if done.returncode == 0 and done.stdout.strip() else []
    if len(values) != len(CLOCK_FIELDS):
        return {
            "when": when,
            "not_run": f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}",
        }
    return {"when": when, **{name: value.strip() for name, value in zip(CLOCK_FIELDS, values, strict=True)}}


def run(*, rehearse: bool = False, only: str = "", budget_s: float = BUDGET_S) -> dict[str, Any]:
    """The benchmarks, as a part of the suite's report.

    Args:
        rehearse: on the CPU, tiny, with the stand-in driver.
        only: part of the names of the cases to run.
        budget_s: seconds, after which the remaining cases are not run.
    """
    start = time.monotonic()
    chosen = [case for case in cases(rehearse) if only in case.name]
    try:
        from llama_export_plugins.harness import PluginLibrary

        library = PluginLibrary() if rehearse else PluginLibrary(compute_capability=None)
        timer: Timer = RehearsalTimer() if rehearse else GpuTimer()
        about = versions(rehearse)
        if not chosen:
            raise NotRun(f"no case has `{only}` in its name")
    except Exception as err:  # noqa: BLE001 - a part that cannot start is stated, with the reason
        return {"name": PART, "verdict": "not-run", "reason": describe(err), "rehearsal": rehearse}
    rows: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = [] if rehearse else [clocks("before")]
    for index, case in enumerate(chosen):
        rows.append(attempt(case, library, timer, start + budget_s))
        is_last = index + 1 == len(chosen)
        if not rehearse and (is_last or chosen[index + 1].kind != case.kind):
            seen.append(clocks(f"after {case.name}"))
    return summary(rows, rehearse) | {
        "seconds": round(time.monotonic() - start, 1), "budget_s": budget_s, "l2_bytes": timer.l2_bytes,
        "clocks": seen, "versions": about,
    }  # fmt: skip


def versions(rehearse: bool) -> dict[str, Any]:
    """Of what was measured, beyond the report's own environment."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not rehearse:
        found["cudnn"] = torch.backends.cudnn.version()
        found["driver"] = driver_version()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    return found


def driver_version() -> str:
    """The NVIDIA driver's version, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as err:
        return f"not known: {describe(err)}"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "not known: nvidia-smi says nothing"


def summary(rows: Sequence[Mapping[str, Any]], rehearse: bool) -> dict[str, Any]:
    """The part's verdict and counts. Only a wrong result or an error is a failure; a missed target is counted."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("pass", "fail", "not-run")}
    verdict = "fail" if counts["fail"] else "pass" if counts["pass"] else "not-run"
    entry: dict[str, Any] = {
        "name": PART, "verdict": verdict, "rehearsal": rehearse, "cases": len(rows), "failed": counts["fail"],
        "not_run": counts["not-run"], "targets_met": sum(row.get("met") is True for row in rows),
        "targets_missed": sum(row.get("met") is False for row in rows), "rows": list(rows),
    }  # fmt: skip
    if verdict == "not-run":
        entry["reason"] = "; ".join(dict.fromkeys(str(row["reason"]) for row in rows))
    return entry


# ---- for readers --------------------------------------------------------------------------------------------------

HEADER = [
    "| case | median us | 10-90 % | rate | of the copy | fastest peer | ours against it | target | met |",
    "|---|---|---|---|---|---|---|---|---|",
]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _cells(text: object) -> str:
    """Text that does not end a table's cell."""
    return str(text).replace("|", "/").replace("\n", " ")


def target_text(targets: Sequence[Mapping[str, Any]]) -> str:
    """What should be reached."""
    return ", ".join(f"{target['at_least']:.2f} x {target['peer']}" for target in targets)


def table_row(row: Mapping[str, Any]) -> str:
    """A case as a line of the table; what has no figures says why."""
    if row["verdict"] != "pass":
        why = f"not run: {row['reason']}" if row["verdict"] == "not-run" else f"FAILED: {row['error']}"
        return f"| {row['case']} | {_cells(why)} | | | | | | | |"
    rate = f"{row['tflop_per_s']:.1f} TFLOP/s" if "tflop_per_s" in row else f"{row['gb_per_s']:.0f} GB/s"
    met = {True: "yes", False: "**no**", None: "not judged: its peer did not run"}[row["met"]]
    cells = (
        row["case"], _us(row["seconds"]), f"{_us(row['p10'])}-{_us(row['p90'])}", rate, _times(row["ratio_to_copy"]),
        row["best_peer"] or "none ran", _times(row["ratio_to_best_peer"]), target_text(row["targets"]), met,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def peer_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each peer's time in each case, and below it why a peer did not run."""
    names = list(dict.fromkeys(peer["name"] for row in rows for peer in row.get("peers", [])))
    if not names:
        return []
    lines = [f"| median us | ours | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    notes: dict[str, str] = {}
    for row in rows:
        if row["verdict"] != "pass":
            continue
        found = {peer["name"]: peer for peer in row["peers"]}
        cells = []
        for name in names:
            peer = found.get(name)
            if peer is None:
                cells.append("")
                continue
            if "seconds" not in peer:
                text = f"{name} did not run: {peer['not_run']}"
            elif "note" in peer:
                text = f"{name}: {peer['note']}, as it refused otherwise: {'; '.join(peer['refused'])}"
            elif "not_captured" in peer:
                text = f"{name}: launched call by call, as no graph could capture it: {peer['not_captured']}"
            else:
                text = ""
            mark = f" ({notes.setdefault(text, chr(ord('a') + len(notes) % 26))})" if text else ""
            cells.append((_us(peer["seconds"]) if "seconds" in peer else "not run") + mark)
        lines.append(f"| {row['case']} | {_us(row['seconds'])} | {' | '.join(cells)} |")
    return [*lines, "", *(f"- ({mark}) {_cells(text)}" for text, mark in notes.items())]


def markdown(entry: Mapping[str, Any]) -> str:
    """The part for readers."""
    title = "## Speed" + (
        " (REHEARSAL: a CPU with a stand-in driver, no figures of any GPU)" if entry["rehearsal"] else ""
    )
    if "rows" not in entry:
        return "\n".join([title, "", f"Not run: {entry['reason']}", ""])
    rows = entry["rows"]
    lines = [
        title,
        "",
        f"{entry['targets_met']} of {entry['cases']} cases meet their targets, {entry['targets_missed']} miss, "
        f"{entry['failed']} failed, {entry['not_run']} not run. Ours includes RoPE and the write into the cache. "
        "A ratio above 1 means that ours is faster.",
        "",
        *HEADER,
        *(table_row(row) for row in rows),
        "",
        *peer_lines(rows),
        "",
    ]
    lines += [f"- clocks {_clock_text(found)}" for found in entry.get("clocks", [])]
    return "\n".join([*lines, ""])


def _clock_text(found: Mapping[str, Any]) -> str:
    if "not_run" in found:
        return f"{found['when']}: not known: {_cells(found['not_run'])}"
    return (
        f"{found['when']}: SM {found['clocks.sm']} of {found['clocks.max.sm']} MHz, memory {found['clocks.mem']} of "
        f"{found['clocks.max.mem']} MHz, {found['power.draw']} of {found['power.limit']} W, {found['temperature.gpu']} C"
    )


def newest_report(folder: Path = ROOT / "reports" / "gpu") -> dict[str, Any] | None:
    """The latest report of the suite that has figures of speed, by the time written in it."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found = [report for report in found if speed_part(report).get("rows")]
    return max(found, key=lambda report: str(report["environment"]["created_at"]), default=None)


def speed_part(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a report; empty if it has none."""
    empty: Mapping[str, Any] = {}
    return next((part for part in report["parts"] if part["name"] == PART), empty)


def results_table(report: Mapping[str, Any] | None) -> str:
    """The cases with the figures of a report, or with "not run" where it has none."""
    measured = {row["case"]: row for row in speed_part(report).get("rows", [])} if report is not None else {}
    lines = []
    for case in cases():
        row = measured.get(case.name)
        if row is not None:
            lines.append(table_row(row))
        else:
            targets = [{"peer": target.peer, "at_least": target.at_least} for target in case.targets]
            gap = "not run | " * 6
            lines.append(f"| {case.name} | {gap}{target_text(targets)} | not run |")
    if report is None:
        where = "No report has figures of speed yet."
    else:
        where = f"{report['environment']['device']}, {report['environment']['created_at'][:10]}."
    return "\n".join([*HEADER, *lines, "", where])


BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


def with_results(text: str, report: Mapping[str, Any] | None) -> str:
    """A document with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{results_table(report)}\n{END}{after}"


def is_in_reports(path: Path) -> bool:
    """Whether a path is where only figures of a GPU may lie."""
    return path.resolve().is_relative_to(ROOT / "reports" / "gpu")


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write; the same as Markdown lies beside it")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds; later cases are not run")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, to try the code itself")
    parser.add_argument(
        "--readme", action="store_true", help="only put the newest report's figures into plugins/README.md"
    )
    args = parser.parse_args()
    if args.readme:
        readme = ROOT / "plugins" / "README.md"
        readme.write_text(with_results(readme.read_text(encoding="utf-8"), newest_report()), encoding="utf-8")
        return 0
    if args.out is None:
        parser.error("--out FILE is needed")
    if args.rehearse and is_in_reports(args.out):
        parser.error("a rehearsal's numbers do not go under reports/gpu\nhint: --out build/gpu_benchmarks.json")
    if not args.rehearse and not torch.cuda.is_available():
        print("no usable NVIDIA GPU: not run\nhint: --rehearse tries the code itself on the CPU", file=sys.stderr)
        return 3
    from gpu_suite import environment

    entry = run(rehearse=args.rehearse, only=args.only, budget_s=args.budget_s)
    report = {"rehearsal": args.rehearse, "environment": environment(args.rehearse), "parts": [entry]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(markdown(entry), encoding="utf-8")
    print(markdown(entry))
    return 1 if entry["verdict"] == "fail" else 0


if __name__ == "__main__":
    sys.exit(main())
