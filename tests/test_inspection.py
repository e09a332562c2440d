"""What `inspect` says of an engine, without a GPU and on stand-ins for one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY
from rich.console import Console

from llama_export.bundle.bundle import Bundle
from llama_export.cli.main import main
from llama_export.engine import inspection
from llama_export.engine.inspection import describe_engine, print_engine

pytest.importorskip("tensorrt_rtx_bindings")

CAPACITY, BATCH = 53, 3


def printed(data: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_engine(data, Console(file=stream, width=120))
    return stream.getvalue()


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_memory_is_what_a_session_allocates(built: dict[str, tuple[Bundle, Path]], dtype: str, item: int) -> None:
    _, path = built[dtype]
    memory = describe_engine(path)["memory"]
    row = 2 * TINY["num_hidden_layers"] * TINY["num_key_value_heads"] * CAPACITY * TINY["head_dim"] * item
    assert memory == {
        "engine": path.stat().st_size, "weights_outside_the_engine": 0, "kv_cache_per_row": row,
        "kv_cache_at_max_batch": BATCH * row, "largest_logits": BATCH * CAPACITY * TINY["vocab_size"] * 4,
    }  # fmt: skip


def test_the_terminal_names_all_that_matters(built: dict[str, tuple[Bundle, Path]]) -> None:
    data = describe_engine(built["float32"][1])
    text = printed(data)
    for part in ("tensorrt-rtx 1.7", "up to 53 tokens, batch 1..3", "8.0 and later", "TF32 off", "KV_CACHE_UPDATE", "MATRIX_MULTIPLY",
                 "prefill", "decode", "3x2x53x16", "present.0.key", "past_key_values.0.key", "kv cache per row", "not read: no NVIDIA"):  # fmt: skip
        assert part in text, part
    assert data["rebuild"] in text.replace("\n", "")


def test_json_holds_the_sidecar_and_the_rest(
    built: dict[str, tuple[Bundle, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = built["float32"][1]
    assert main(["inspect", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {*json.loads(path.with_suffix(".json").read_text()), "memory", "rebuild", "loaded"}
    assert "no NVIDIA driver" in data["loaded"]["not_run"]


def test_where_a_gpu_is_the_engine_speaks_for_itself(
    built: dict[str, tuple[Bundle, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built["float32"][1]
    inspector = SimpleNamespace(
        get_engine_information=lambda form: "Layers:\nfirst\nsecond" if form == "oneline" else ""
    )
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector, device_memory_size_v2=123_000_000)
    module = SimpleNamespace(
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda data: engine),
        LayerInformationFormat=SimpleNamespace(ONELINE="oneline"),
    )
    monkeypatch.setattr(inspection, "execution_blocker", lambda backend: None)
    monkeypatch.setattr(inspection, "load_backend", lambda backend: module)
    monkeypatch.setattr(inspection, "message_log", lambda trt: SimpleNamespace(lines=lambda: ["refused"]))
    data = describe_engine(path)
    assert data["loaded"] == {"activation_bytes": 123_000_000, "layers": ["Layers:", "first", "second"]}
    assert "123.00 MB" in printed(data)
    module.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda data: None)
    assert describe_engine(path)["loaded"] == {"not_run": "refused"}
