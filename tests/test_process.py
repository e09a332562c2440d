"""What a process can learn of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_export import _process
from llama_export._process import available_memory_bytes


def test_available_memory_is_below_the_machine_s() -> None:
    total = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]) * 1024
    assert 0 < (available_memory_bytes() or 0) <= total


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "3000", "memory.current": "1000"}, 2000),
        ({"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "1000"}, 4000),
        ({"memory.max": "max", "memory.current": "1000"}, None),
        ({"memory.max": "3000"}, None),
        ({}, None),
    ],
    ids=["version 2", "version 1", "no limit", "half of it", "none"],
)
def test_a_control_group_caps_it(
    files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_process, "_GROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    found = available_memory_bytes()
    assert found is not None
    assert (found == expected) if expected is not None else found > 1 << 24
