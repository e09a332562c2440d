"""What a process can learn of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_export._system.process import available_memory


def test_available_memory_is_below_the_machine_s() -> None:
    total = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]) * 1024
    assert 0 < (available_memory() or 0) <= total


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"0::/": "", "memory.max": "3000", "memory.current": "1000"}, 2000),
        ({"4:memory:/": "", "memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "1000"}, 4000),
        ({"0::/": "", "memory.max": "max", "memory.current": "1000"}, None),
        ({"0::/": "", "memory.max": "3000"}, None),
        ({}, None),
    ],
    ids=["version 2", "version 1", "no limit", "half of it", "none"],
)
def test_a_control_group_caps_it(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    """A name with a colon is the line of ``/proc/self/cgroup``."""
    free = 1 << 30
    groups = tmp_path / "sys/fs/cgroup"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {free // 1024} kB\n")
    for name, text in files.items():
        path = tmp_path / "proc/self/cgroup" if ":" in name else groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((name if ":" in name else text) + "\n")
    found = available_memory(tmp_path)
    assert found == (free if expected is None else expected)
