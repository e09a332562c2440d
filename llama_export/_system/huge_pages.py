"""Memory that is read from end to end with every token, gathered into huge pages.

A decode step reads every weight once. In pages of 4 KiB a core looks up 256 addresses for each MiB of it, twice over in a
virtual machine, and its prefetchers stop at each page's end; in pages of 2 MiB they do not. A C library's ``malloc`` asks
the kernel for small ones, so they are gathered afterwards: once, in the background.

Source: https://man7.org/linux/man-pages/man2/madvise.2.html (MADV_COLLAPSE, Linux 6.1),
https://docs.kernel.org/admin-guide/mm/transhuge.html, https://docs.kernel.org/admin-guide/mm/pagemap.html
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_MADV_COLLAPSE = 25
_PRESENT = 0x80
"""In the highest of the eight bytes (little endian) that ``pagemap`` has for a page: it is in memory."""
_AT_ONCE = 32 << 20
"""Bytes of one call: other threads' page faults wait for it."""
_GIVE_UP = {errno.EINVAL, errno.ENOSYS, errno.ENOMEM, errno.EPERM}
"""An older kernel, one without huge pages, or none of them left."""


def gather_huge_pages() -> int:
    """Turns this process's own memory into huge pages, where each small page of one is in memory: it takes no more.

    Contents and addresses stay; other threads may go on. Does nothing where the system cannot (not Linux, before 6.1).

    Returns:
        Bytes that lie in huge pages now and were gone through.
    """
    if sys.platform != "linux" or not (huge := huge_page_bytes()):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    gathered = 0
    for begin, end in _own_memory():
        for start, stop in _full_runs(begin, end, huge):
            for at in range(start, stop, _AT_ONCE):
                size = min(_AT_ONCE, stop - at)
                if madvise(at, size, _MADV_COLLAPSE) == 0:
                    gathered += size
                elif ctypes.get_errno() in _GIVE_UP:
                    return gathered
                # Else a page was busy, or is gone by now: the next ones may do.
    return gathered


def huge_page_bytes() -> int:
    """Size of a huge page; 0 where there are none."""
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def granule_of_large_arrays() -> int:
    """Bytes that come into memory when one byte of a large zeroed array of numpy is first written.

    numpy asks for huge pages for arrays of 4 MiB and more, which the system grants unless it is set to ``never``.
    Source: https://numpy.org/doc/stable/reference/global_state.html (hugepages)
    """
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return mmap.PAGESIZE
    return mmap.PAGESIZE if "[never]" in setting else huge_page_bytes() or mmap.PAGESIZE


def _own_memory() -> Iterator[tuple[int, int]]:
    """Addresses of the heap and of anonymous private mappings."""
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        if access.startswith("rw") and access.endswith("p") and inode == "0" and name in ([], ["[heap]"]):
            begin, _, end = span.partition("-")
            yield int(begin, 16), int(end, 16)


def _full_runs(begin: int, end: int, huge: int) -> Iterator[tuple[int, int]]:
    """Where, between two addresses, huge pages could lie of which each small page is in memory."""
    first, last = -(-begin // huge), end // huge
    small = huge // mmap.PAGESIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            full = []
            for number in range(first, last):
                entries = os.pread(pagemap.fileno(), 8 * small, 8 * small * number)
                full.append(len(entries) == 8 * small and min(entries[7::8], default=0) >= _PRESENT)
    except OSError:  # a kernel that does not tell
        return
    at = first
    for is_full, run in itertools.groupby(full):
        count = len(list(run))
        if is_full:
            yield at * huge, (at + count) * huge
        at += count
