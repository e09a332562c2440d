"""Runs compiled kernels without a GPU: the PTX itself, instruction by instruction, on NumPy arrays.

Triton's interpreter runs the source of a kernel; this runs what the compiler made of it: layouts, swizzled shared memory,
asynchronous copies, barriers, tensor-core fragments, masks, vector widths, the order of the parameters.
"""

from .machine import launch
from .memory import Buffer, GlobalMemory, Traffic
from .program import Program, PtxError

__all__ = ["Buffer", "GlobalMemory", "Program", "PtxError", "Traffic", "launch"]
