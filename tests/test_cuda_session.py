"""The onnxruntime session on CUDA over a stand-in for its module: no GPU, no onnxruntime-gpu.

What the real provider does with it, over a stand-in for CUDA itself: scripts/cuda_session_proof.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llama_export.bundle.bundle import Bundle
from llama_export.errors import ConfigError, ShapeError, ToolchainError
from llama_export.runtime import onnxruntime_graph as graph_module
from llama_export.runtime import onnxruntime_session as session_module
from llama_export.runtime.buffers import widened as widened_bytes
from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession, OnnxRuntimeSession

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ONNX = {"float32": 1, "float16": 10, "bfloat16": 16}


class FakeValue:
    """An ``OrtValue`` on the GPU, over the host's memory; counts what crosses the bus."""

    crossings = 0

    def __init__(self, shape: list[int], dtype: Any) -> None:
        self._array = np.full(shape, 0xFF, dtype)  # NaN, so that missing zeros show

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def numpy(self) -> np.ndarray[Any, Any]:
        FakeValue.crossings += 1
        return self._array.copy()

    def update_inplace(self, array: np.ndarray[Any, Any]) -> None:
        FakeValue.crossings += 1
        assert (array.shape, array.dtype) == (self._array.shape, self._array.dtype)
        self._array[...] = array


class FakeBinding:
    """Keeps what is bound to which address; the logits are zeros."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}
        self.rows = 0

    def bind_input(self, name: str, *where: Any) -> None:
        self.inputs[name] = where

    def bind_cpu_input(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self.rows = len(array)

    def bind_output(self, name: str, *where: Any) -> None:
        self.outputs[name] = where

    def get_outputs(self) -> list[Any]:
        cache = [
            SimpleNamespace(data_ptr=lambda w=where: w[-1]) for name, where in self.outputs.items() if name != "logits"
        ]
        return [*cache, SimpleNamespace(numpy=lambda: np.zeros((self.rows, 1, 97), np.float32))]


class FakeOnnxRuntime:
    """The module, built for ``providers``; sessions get those of them that ``work``."""

    __version__ = "1.31.1"

    def __init__(
        self, providers: tuple[str, ...] = (CUDA, CPU), work: tuple[str, ...] = (CUDA, CPU), room: int = 1 << 30
    ) -> None:
        self._providers, self._work, self._room = providers, work, room
        self.opened: list[tuple[Path, list[Any]]] = []
        self.SessionOptions = SimpleNamespace
        self.log_severity = 2

    def set_default_logger_severity(self, severity: int) -> None:
        self.log_severity = severity

    def preload_dlls(self, directory: str) -> None:
        print("Failed to load libcublas.so.13")

    def get_available_providers(self) -> list[str]:
        return list(self._providers)

    def InferenceSession(self, path: str, options: Any, providers: list[Any]) -> Any:  # noqa: N802
        self.opened.append((Path(path), providers))
        return SimpleNamespace(
            get_providers=lambda: [provider for provider in self._work if provider in self._providers],
            io_binding=FakeBinding,
            run_with_iobinding=lambda binding: None,
            create_ortvalue_from_shape_and_type=self._value,
        )

    def _value(self, shape: list[int], dtype: Any, device: str, number: int) -> FakeValue:
        assert (device, number) == ("cuda", 0)
        if shape[0] > self._room:
            raise RuntimeError("Available memory of 0 is smaller than requested bytes")
        return FakeValue(shape, dtype)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    module = FakeOnnxRuntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


@pytest.mark.parametrize(
    ("providers", "work"),
    [((CPU,), (CPU,)), ((CUDA, CPU), (CPU,))],
    ids=["not built for it", "its libraries are missing"],
)
def test_without_cuda_a_sentence_says_so(
    tiny_bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    providers: Any,
    work: Any,
) -> None:
    module = FakeOnnxRuntime(providers, work)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(graph_module, "_driver", lambda: "libcuda.so.1: cannot open shared object file")
    with pytest.raises(ToolchainError, match="cannot use CUDA here") as caught:
        OnnxRuntimeSession(tiny_bundles["float32"], max_seq_len=16, device="cuda")
    text = str(caught.value)
    assert f"1.31.1, built for {', '.join(providers)}" in text
    assert "Failed to load libcublas.so.13" in text
    assert "libcuda.so.1: cannot open" in text
    assert module.log_severity == 2  # as it was
    assert ".[cuda]" in text
    assert capsys.readouterr().out == ""  # what onnxruntime prints is in the error, not on stdout


def test_quantised_weights_are_refused(tiny_bundles: dict[str, Bundle], fake: FakeOnnxRuntime) -> None:
    with pytest.raises(ConfigError, match="on a CPU only") as caught:
        OnnxRuntimeSession(tiny_bundles["float32"], max_seq_len=16, device="cuda", variant="int8")
    assert "int8 on CUDA" in str(caught.value)
    assert fake.opened == []


def test_a_head_needs_a_bundle_without_a_cache(tiny_bundles: dict[str, Bundle], fake: FakeOnnxRuntime) -> None:
    with pytest.raises(ConfigError, match="KV cache"):
        OnnxRuntimeHeadSession(tiny_bundles["float32"], device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_standard_graph_is_opened_and_the_cache_bound_in_place(
    tiny_bundles: dict[str, Bundle], fake: FakeOnnxRuntime, dtype: str
) -> None:
    bundle = tiny_bundles[dtype]
    session = OnnxRuntimeSession(bundle, max_seq_len=16, batch_size=3, device="cuda")
    ((path, providers),) = fake.opened
    assert path == bundle.model_path
    assert [provider[0] if isinstance(provider, tuple) else provider for provider in providers] == [CUDA, CPU]
    assert providers[0][1]["use_tf32"] == "0"  # float32 means float32
    assert session.backend == "onnxruntime-cuda"
    assert session.note is None
    assert not any(array.any() for array in session.cache.values())

    row = 2 * 16 * 16 * np.dtype(DTYPES[dtype]).itemsize  # G C D
    for tokens in ([[1, 2], [3, 4], [5, 6]], [[7], [8]], [[9]]):  # the first rows: always from the beginning
        assert session.step(tokens).shape == (len(tokens), 1, 97)
        binding, shape = session._binding, [len(tokens), 2, 16, 16]
        for past, present in session._names:
            buffer = session._buffers[past]
            assert [buffer.address(row_) - buffer.address(0) for row_ in range(3)] == [0, row, 2 * row]
            device, number, onnx_dtype, bound, address = binding.inputs[past]
            assert (device, number, onnx_dtype, list(bound), address) == (
                "cuda",
                0,
                ONNX[dtype],
                shape,
                buffer.address(0),
            )
            assert binding.outputs[present] == binding.inputs[past]
        assert session.output_addresses() == {name: buffer.address(0) for name, buffer in session._buffers.items()}
    assert session.past_length.tolist() == [4, 3, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_move_in_one_round_trip_and_are_read_exactly(
    tiny_bundles: dict[str, Bundle], fake: FakeOnnxRuntime, dtype: str
) -> None:
    session = OnnxRuntimeSession(tiny_bundles[dtype], max_seq_len=16, batch_size=4, device="cuda")
    session.step(np.ones((4, 4), np.int64), sequence_length=[4, 2, 3, 1])
    rng, values = np.random.default_rng(0), {}
    for name, buffer in session._buffers.items():
        values[name] = rng.standard_normal(buffer.shape).astype(DTYPES[dtype])
        buffer._bytes.update_inplace(values[name].view(np.uint8).reshape(-1))  # type: ignore[attr-defined]
        np.testing.assert_array_equal(session.cache_array(name), values[name].astype(np.float32))

    before = FakeValue.crossings
    session.keep_rows([0, 1, 2, 3])  # nothing moves
    session.rewind([4, 1, 3, 0])
    assert FakeValue.crossings == before
    session.keep_rows([1, 2, 3])
    assert FakeValue.crossings == before + 2 * len(values)  # each tensor to the host and back, once for three rows
    assert session.past_length.tolist() == [1, 3, 0]
    for name, array in values.items():
        np.testing.assert_array_equal(session.cache_array(name), array[1:].astype(np.float32))
    with pytest.raises(ShapeError, match="kept"):
        session.keep_rows([2, 1])
    session.reset(2)
    assert session.past_length.tolist() == [0, 0]
    session.reset(5)  # more rows than there were: new buffers
    assert all(array.shape[0] == 5 and not array.any() for array in session.cache.values())


def test_a_cache_that_the_gpu_cannot_hold_is_refused(
    tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeOnnxRuntime(room=1000))
    with pytest.raises(ToolchainError, match="does not hold this cache") as caught:
        OnnxRuntimeSession(tiny_bundles["bfloat16"], max_seq_len=16, batch_size=2, device="cuda")
    text = str(caught.value)
    assert "[2, 2, 16, 16] of bfloat16" in text
    assert "smaller than requested" in text
    assert "--max-seq-len" in text


def test_bytes_are_widened_exactly() -> None:
    """All 16-bit patterns that are numbers, and some of float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype in ("float16", "bfloat16"):
        values = bits.view(DTYPES[dtype])
        numbers = ~np.isnan(values.astype(np.float32))
        widened = widened_bytes(bits.view(np.uint8), dtype)
        np.testing.assert_array_equal(widened[numbers], values.astype(np.float32)[numbers])
        assert np.isnan(widened[~numbers]).all()
    floats = np.array([0, -0.0, 1e-45, np.pi, np.inf], np.float32)
    np.testing.assert_array_equal(widened_bytes(floats.view(np.uint8), "float32"), floats)


def test_an_operator_that_needs_cudnn_is_answered_with_its_package() -> None:
    missing = RuntimeError("Name:'model/ReduceMax' cuDNN is unavailable for CUDA Execution Provider")
    error = session_module._cannot_run({"input_ids": np.ones((1, 3), np.int64)}, missing)
    assert "model/ReduceMax" in str(error)
    assert "nvidia-cudnn-cu13" in str(error.hint)
    assert "validate" in str(session_module._cannot_run({}, RuntimeError("else")).hint)
