"""This process's memory: what results report of it, what it can still take, and when it is given back.

Source: https://docs.kernel.org/filesystems/proc.html#meminfo (MemAvailable),
https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max), https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path


def peak_rss_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int | None:
    """What this process holds of the memory now, mapped files included; None where the system does not tell (not Linux)."""
    pages = _text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a process can still take: what the kernel says is available, and free swap; at most what the control
    groups of this process leave it. None where the system does not tell (not Linux).

    Args:
        root: of the file system; tests make their own.
    """
    meminfo = _fields(root / "proc/meminfo")
    if "MemAvailable:" not in meminfo:
        return None
    free = (meminfo["MemAvailable:"] + meminfo.get("SwapFree:", 0)) * 1024
    return max(0, min([free, *_left_in_control_groups(root)]))


def _left_in_control_groups(root: Path) -> Iterator[int]:
    """What each control group of this process that limits memory leaves: the limit less what is used, pages of files left out,
    for they are taken back before the limit is felt."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in _CGROUP_FILES:
            continue
        mount, limit_name, usage_name, prefix = _CGROUP_FILES[kind]
        top = root / mount
        # A path out of the mount is of a group that is not visible here.
        group = top if ".." in path.split("/") else top / path.strip("/")
        # In a container the path may be the host's, which is not mounted here: its own group then is at the top.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
            if limit.isdigit() and usage.isdigit():  # "max": no limit
                stat = _fields(folder / "memory.stat")
                pages = sum(stat.get(f"{prefix}{name}", 0) for name in ("active_file", "inactive_file"))
                yield int(limit) - max(0, int(usage) - pages)


_CGROUP_FILES = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""Controllers of a line of ``/proc/self/cgroup`` (none: version 2) -> mount, limit, usage, prefix of sums over children."""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """``name number`` of each line."""
    pairs = (line.split()[:2] for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library can (glibc): it keeps what lies between live blocks."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection in this block, for work that makes millions of small objects and few cycles.

    It took 0.8 of 6 s of a trace of 12 layers, to free 15 MB.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def granule_of_large_arrays() -> int:
    """Bytes that come into memory when one byte of a large zeroed array of numpy is first written.

    numpy asks for huge pages for arrays of 4 MiB and more, which the system grants unless it is set to ``never``.
    Source: https://numpy.org/doc/stable/reference/global_state.html (hugepages)
    """
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return mmap.PAGESIZE
    return mmap.PAGESIZE if "[never]" in setting else _huge_page_bytes() or mmap.PAGESIZE


def _huge_page_bytes() -> int:
    """Size of a huge page; 0 where there are none."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
