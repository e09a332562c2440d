"""This process's memory: what results report of it, and how it is given back."""

from __future__ import annotations

import ctypes
import resource
import sys


def peak_rss_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library can (glibc): it keeps what lies between live blocks."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
