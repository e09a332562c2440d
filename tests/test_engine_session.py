"""Sessions over an engine, on stand-ins for TensorRT, CUDA and the GPU: nothing here has run on a GPU."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_stand_ins import FakeDriver, FakeEngine, put_on_gpu

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.cli.main import main
from llama_export.config.llama import TASKS
from llama_export.config.settings import EngineConfig
from llama_export.engine import tensorrt as _tensorrt
from llama_export.engine.build import build_engine
from llama_export.errors import ArtifactMismatchError, ConfigError, ShapeError, ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.runtime.engine_session import EngineHeadSession, EngineSession, execution_blocker
from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession, OnnxRuntimeSession

trt = pytest.importorskip("tensorrt_rtx_bindings")

CAPACITY = 53
HEAD_TABLE = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "onnx_table.py"))
PutOnGpu = Callable[[Bundle, Path], FakeEngine]


@pytest.mark.parametrize(
    ("driver", "backend", "reason"),
    [
        (None, "tensorrt-rtx", "no NVIDIA driver"),
        (FakeDriver(error=100), "tensorrt-rtx", "CUDA error 100"),
        (FakeDriver(9, 0), "tensorrt-rtx", "compute capability 9.0"),
        (FakeDriver(8, 9), "tensorrt-rtx", None),
        (FakeDriver(12, 0), "tensorrt-rtx", None),
        (FakeDriver(9, 0), "tensorrt", "`tensorrt` is not installed"),
    ],
    ids=["no-driver", "no-gpu", "h100", "ada", "blackwell", "no-package"],
)
def test_execution_blocker_says_why(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None, backend: str, reason: str | None
) -> None:
    present = {"tensorrt_rtx_bindings", "cuda"}
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: driver)
    monkeypatch.setattr(_tensorrt.importlib.util, "find_spec", lambda name: name if name in present else None)
    blocker = execution_blocker(backend)
    assert (blocker is None) if reason is None else (reason in str(blocker))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> PutOnGpu:
    """Replaces TensorRT, CUDA and the GPU by stand-ins on the host; gives the stand-in of one engine."""

    return lambda bundle, path: put_on_gpu(monkeypatch, trt, bundle, path)


@pytest.fixture
def fake_gpu(built: dict[str, tuple[Bundle, Path]], on_a_gpu: PutOnGpu) -> FakeEngine:
    return on_a_gpu(*built["float32"])


def test_session_prefills_and_decodes_in_place(built: dict[str, tuple[Bundle, Path]], fake_gpu: FakeEngine) -> None:
    bundle, path = built["float32"]
    session = EngineSession(bundle, path, batch_size=2)
    want = OnnxRuntimeSession(bundle, max_seq_len=CAPACITY, batch_size=2)
    tokens = np.random.default_rng(0).integers(0, bundle.config.vocab_size, (2, 16))
    steps: list[tuple[Any, dict[str, Any]]] = [
        (tokens[:, :7], {"sequence_length": [7, 4], "logits_index": [[0, 3, 6], [0, 1, 3]]}),
        (tokens[:, 7:8], {}),
        (tokens[:, 8:11], {}),
        (tokens[:, 11:12], {}),
    ]
    for ids, arguments in steps:
        np.testing.assert_allclose(session.step(ids, **arguments), want.step(ids, **arguments), atol=1e-5)
    np.testing.assert_array_equal(session.past_length, want.past_length)
    assert fake_gpu.used_profiles == [0, 1, 0, 1]
    cache = session.cache_array("past_key_values.1.value")
    assert cache.shape == (2, 2, CAPACITY, 16)
    assert np.abs(cache[0, :, :12]).min() > 0
    assert not cache[0, :, 12:].any(), "the rest of the cache is still zero"
    session.reset()
    assert session.past_length.tolist() == [0, 0]
    memory = session._loaded._cuda.memory
    session.close()
    assert not memory
    session.reset()
    with pytest.raises(ToolchainError, match="an engine that was closed"):
        session.step([[1], [1]])


def test_decode_steps_are_launched_as_a_graph(built: dict[str, tuple[Bundle, Path]], fake_gpu: FakeEngine) -> None:
    """From the third step on, until rows, profile or memory change; then once more from the beginning."""
    bundle, path = built["float32"]
    session = EngineSession(bundle, path, batch_size=2)
    cuda = fake_gpu.cuda
    assert cuda is not None
    want = OnnxRuntimeSession(bundle, max_seq_len=CAPACITY, batch_size=2)
    tokens = np.random.default_rng(0).integers(0, bundle.config.vocab_size, (2, 24))
    # Columns of a step, rows; how often TensorRT was called, how often a graph was launched, how many there are.
    steps = [
        (4, 2, 1, 0, 0), (1, 2, 2, 0, 0), (1, 2, 3, 1, 1), (1, 2, 3, 2, 1), (1, 2, 3, 3, 1),
        (1, 1, 4, 3, 0), (1, 1, 5, 4, 1), (1, 1, 5, 5, 1),
        (3, 1, 6, 5, 0), (1, 1, 7, 5, 0), (1, 1, 8, 6, 1),
    ]  # fmt: skip
    at = 0
    for width, rows, enqueued, launches, graphs in steps:
        ids = tokens[:rows, at : at + width]
        np.testing.assert_allclose(session.step(ids), want.step(ids), atol=1e-5)
        assert (fake_gpu.enqueued, cuda.launches, len(cuda.graphs)) == (enqueued, launches, graphs)
        at += width
    session.close()
    assert not cuda.graphs


def test_an_engine_that_cannot_be_captured_is_run(built: dict[str, tuple[Bundle, Path]], fake_gpu: FakeEngine) -> None:
    fake_gpu.is_capturable = False
    bundle, path = built["float32"]
    session, want = EngineSession(bundle, path), OnnxRuntimeSession(bundle, max_seq_len=CAPACITY)
    for token in range(6):
        np.testing.assert_allclose(session.step([[token]]), want.step([[token]]), atol=1e-5)
    assert fake_gpu.cuda is not None
    assert fake_gpu.cuda.launches == 0
    assert fake_gpu.enqueued == 7, "one capture was tried"
    assert not fake_gpu.cuda.graphs, "and what came of it was destroyed"


def test_rows_leave_the_batch_and_tokens_are_taken_back(
    built: dict[str, tuple[Bundle, Path]], fake_gpu: FakeEngine
) -> None:
    bundle, path = built["float32"]
    tokens = np.random.default_rng(0).integers(0, bundle.config.vocab_size, (3, 9))
    answers = []
    for session in (EngineSession(bundle, path), OnnxRuntimeSession(bundle, max_seq_len=CAPACITY)):
        session.reset(batch_size=3)
        got = [session.step(tokens[:, :6], sequence_length=[6, 5, 3]), session.step(tokens[:2, 6:7])]
        assert session.past_length.tolist() == [7, 6, 3]
        session.keep_rows([1, 2])
        session.rewind([4, 3])
        got.append(session.step(tokens[1:, 7:8]))
        assert (session.batch_size, session.past_length.tolist()) == (2, [5, 4])
        answers.append(got)
    for left, right in zip(*answers, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    session = EngineSession(bundle, path)
    with pytest.raises(ShapeError, match="does not serve 4 rows"):
        session.reset(batch_size=4)


def test_session_refuses_what_does_not_fit(built: dict[str, tuple[Bundle, Path]], fake_gpu: FakeEngine) -> None:
    bundle, path = built["float32"]
    with pytest.raises(ShapeError, match="does not serve 4 rows"):
        EngineSession(bundle, path, batch_size=4)
    session = EngineSession(bundle, path)
    with pytest.raises(ShapeError, match=f"the cache holds {CAPACITY} tokens, the request needs {CAPACITY + 1}"):
        session.step(np.zeros((1, CAPACITY + 1), np.int64))
    with pytest.raises(ShapeError, match="input_ids"):
        session.step(np.zeros((2, 3), np.int64))
    with pytest.raises(ShapeError, match="logits_index"):
        session.step(np.zeros((1, 3), np.int64), logits_index=np.zeros((1, CAPACITY + 1), np.int64))


def test_session_refuses_an_engine_that_copies_its_cache(
    built: dict[str, tuple[Bundle, Path]], fake_gpu: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_gpu, "get_aliased_input_tensor", lambda name: None)
    with pytest.raises(ArtifactMismatchError, match="does not alias"):
        EngineSession(*built["float32"])


def test_session_without_a_gpu_says_why(built: dict[str, tuple[Bundle, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensorrt, "_load_driver", lambda: None)
    with pytest.raises(ToolchainError, match="cannot run the engine") as caught:
        EngineSession(*built["float32"])
    assert "no NVIDIA driver" in str(caught.value)


# ---- heads without a cache --------------------------------------------------------------------------------------

HEADS = [task for task in TASKS if task != "causal-lm"]


@pytest.fixture(scope="module", params=HEADS)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A head's bundle and an engine of it."""
    folder = tmp_path_factory.mktemp("head") / request.param
    HEAD_TABLE["write_checkpoint"](folder, request.param, "default")
    export_checkpoint(folder)
    bundle = load_bundle(folder)
    return bundle, Path(build_engine(bundle, EngineConfig(ops="native", max_seq_len=32, max_batch=3)).engine)


def test_a_head_session_answers_padded_batches(head: tuple[Bundle, Path], on_a_gpu: PutOnGpu) -> None:
    bundle, path = head
    fake = on_a_gpu(bundle, path)
    session, want = EngineHeadSession(bundle, path), OnnxRuntimeHeadSession(bundle)
    rng = np.random.default_rng(0)
    for shape in ((1, 5), (3, 32), (2, 7)):
        ids = rng.integers(1, bundle.config.vocab_size, shape)
        mask = np.ones_like(ids)
        mask[0, : shape[1] // 2] = 0
        mask[-1, -2:] = 0
        got, expected = session.run(ids, mask), want.run(ids, mask)
        assert list(got) == list(expected)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5)
    np.testing.assert_allclose(*(next(iter(item.run([[4, 5]]).values())) for item in (session, want)), atol=1e-5)
    assert set(fake.used_profiles) == {0}
    memory = session._loaded._cuda.memory
    session.close()
    assert not memory


def test_a_head_session_refuses_what_does_not_fit(head: tuple[Bundle, Path], on_a_gpu: PutOnGpu) -> None:
    bundle, path = head
    on_a_gpu(bundle, path)
    session = EngineHeadSession(bundle, path)
    with pytest.raises(ShapeError, match="the text has 33 tokens, the engine serves 32"):
        session.run(np.ones((1, 33), np.int64))
    with pytest.raises(ShapeError, match="does not serve 4 rows"):
        session.run(np.ones((4, 3), np.int64))
    with pytest.raises(ShapeError, match="outside the vocabulary"):
        session.run([[bundle.config.vocab_size]])
    with pytest.raises(ShapeError, match="do not fit"):
        session.run([[1, 2]], [[1]])
    with pytest.raises(ConfigError, match="has no KV cache") as caught:
        EngineSession(bundle, path)
    assert "EngineHeadSession" in str(caught.value)


def test_a_head_session_refuses_a_causal_lm(built: dict[str, tuple[Bundle, Path]]) -> None:
    with pytest.raises(ConfigError, match="has a KV cache"):
        EngineHeadSession(*built["float32"])


def test_cuda_failures_are_errors(fake_gpu: FakeEngine, built: dict[str, tuple[Bundle, Path]]) -> None:
    session = EngineSession(*built["float32"])
    session._loaded._cuda.cudaStreamSynchronize = lambda stream: (700,)
    with pytest.raises(ToolchainError, match="cudaStreamSynchronize failed: CUDA error 700"):
        session.step([[1]])
    fake_gpu.execute_async_v3 = lambda stream: False  # type: ignore[method-assign]
    with pytest.raises(ToolchainError, match="TensorRT could not run the engine"):
        session.step([[1]])
    assert session.past_length.tolist() == [0], "a step that failed has not happened"


def test_commands_run_an_engine(
    built: dict[str, tuple[Bundle, Path]], fake_gpu: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, path = built["float32"]
    request = ["--tokens", "5,6,7", "--max-new-tokens", "6", "--json"]
    answers = {}
    for settings in (["--engine", path], ["--backend", "tensorrt-rtx"], ["--backend", "onnxruntime"]):
        assert main(["run", str(bundle.folder), *map(str, settings), *request]) == 0
        answers[str(settings[-1])] = json.loads(capsys.readouterr().out)
    assert [answer["backend"] for answer in answers.values()] == ["tensorrt-rtx", "tensorrt-rtx", "onnxruntime-cpu"]
    assert len({str(answer["tokens"]) for answer in answers.values()}) == 1
    assert fake_gpu.cuda is not None
    assert fake_gpu.cuda.launches > 0
    command = [
        "bench",
        str(bundle.folder),
        "--engine",
        str(path),
        "--prompt-tokens",
        "5",
        "--new-tokens",
        "3",
        "--runs",
        "1",
    ]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["backend"], result["kv_cache_capacity"], result["bandwidth_share"]) == (
        "tensorrt-rtx",
        CAPACITY,
        None,
    )
    for refused, code, says in (
        (["--engine", str(path), "--backend", "onnxruntime"], 2, "onnxruntime runs no engines"),
        (["--engine", str(path), "--max-seq-len", "16"], 2, "an engine has no max_seq_len"),
        (["--engine", str(path) + "x"], 2, "hint: "),
        (["--backend", "onnxruntime-cuda"], 3, "onnxruntime cannot use CUDA here"),
        (["--backend", "onnxruntime-cuda", "--quantize", "int8"], 2, "quantised weights run on a CPU only"),
        (["--engine", str(path), "--max-new-tokens", str(CAPACITY)], 2, f"this one holds {CAPACITY}"),
    ):
        assert main(["run", str(bundle.folder), *request, *refused]) == code
        out, err = capsys.readouterr()
        assert says in err
        assert json.loads(out)["error"]["exit_code"] == code


def test_run_takes_an_engine_of_a_head(
    head: tuple[Bundle, Path], on_a_gpu: PutOnGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, path = head
    on_a_gpu(bundle, path)
    answers = []
    for settings in (["--engine", str(path)], ["--backend", "onnxruntime"]):
        assert main(["run", str(bundle.folder), "--tokens", "5,6,7", "--json", *settings]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer.pop("backend") for answer in answers] == ["tensorrt-rtx", "onnxruntime-cpu"]
    for name in set(answers[0]) - {"task", "seconds"}:
        np.testing.assert_allclose(answers[0][name], answers[1][name], atol=1e-4)
