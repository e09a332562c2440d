"""Memory in huge pages: what it holds stays, and it takes no more than before."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_export._system import huge_pages as _huge_pages
from llama_export._system.huge_pages import gather_huge_pages, huge_page_bytes


def kib(name: str, file: str = "/proc/self/smaps_rollup") -> int:
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))


@pytest.fixture
def block() -> mmap.mmap:
    """16 huge pages' worth of memory that nobody has touched."""
    if sys.platform != "linux" or huge_page_bytes() == 0:
        pytest.skip("this kernel has no huge pages")
    return mmap.mmap(-1, 16 * huge_page_bytes(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_contents_stay_and_nothing_is_taken(block: mmap.mmap) -> None:
    array = np.frombuffer(block, np.uint32)
    half = array[: len(array) // 2]
    half[:] = np.arange(len(half), dtype=np.uint32)
    held, huge = kib("Rss"), kib("AnonHugePages")
    if gather_huge_pages() == 0:
        pytest.skip("this kernel cannot collapse pages, or has none left: Linux 6.1 and free memory are needed")
    whole = half.nbytes // huge_page_bytes() - 1  # it may begin within one
    assert kib("AnonHugePages") - huge >= whole * huge_page_bytes() // 1024
    assert kib("Rss") - held < 2048, "the half that was never touched is not there"
    assert (half == np.arange(len(half), dtype=np.uint32)).all()
    assert not array[len(half) :].any()


def test_page_with_a_hole_is_left_alone(block: mmap.mmap) -> None:
    array = np.frombuffer(block, np.uint8)
    array[:: mmap.PAGESIZE] = 1
    begin = int(array.ctypes.data)
    huge = huge_page_bytes()
    assert [*_huge_pages._full_runs(begin, begin + array.nbytes, huge)] == [
        (-(-begin // huge) * huge, (begin + array.nbytes) // huge * huge)
    ]
    hole = -(-begin // huge) * huge + 3 * huge - begin
    block.madvise(mmap.MADV_DONTNEED, hole, mmap.PAGESIZE)
    runs = [*_huge_pages._full_runs(begin, begin + array.nbytes, huge)]
    assert [(start - begin, stop - begin) for start, stop in runs] == [
        (hole - 3 * huge, hole),
        (hole + huge, (begin + array.nbytes) // huge * huge - begin),
    ]


@pytest.mark.parametrize("what", ["platform", "size", "refused"])
def test_where_the_system_cannot(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif what == "size":
        monkeypatch.setattr(_huge_pages, "huge_page_bytes", lambda: 0)
    else:
        monkeypatch.setattr(_huge_pages, "_MADV_COLLAPSE", 9999)  # no kernel knows it
    assert gather_huge_pages() == 0
