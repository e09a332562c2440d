"""The compiled kernels on the CPU: Triton compiles a variant for a chip, and its PTX runs instruction by instruction.

The PTX is what ``ptxas`` makes a cubin from, so this covers every chip the library has machine code for; the one text that the
library itself carries runs through its own ``enqueue`` (:mod:`llama_export_plugins.harness`). No GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

from llama_export_plugins.ptx import Buffer, GlobalMemory, Program, Traffic, launch
from torch import Tensor

from .compile import SCRATCH, compile_variant
from .launch import Run, ops
from .table import KERNELS, Variant, variant_named


@cache
def _program(name: str, chip: int) -> tuple[Program, int]:
    """The kernel and its bytes of shared memory. By name: a variant holds a dictionary, which no cache takes."""
    compiled = compile_variant(variant_named(name), chip)
    return Program.parse(compiled.asm["ptx"]), compiled.metadata.shared


def run_compiled(chip: int, traffic: Traffic | None = None, instead: Mapping[str, str] | None = None) -> Run:
    """Launches for :func:`.launch.ops`.

    Args:
        chip: compute capability times ten.
        traffic: counts into it what the launches ask of memory and tensor cores, if given.
        instead: variant -> PTX to run in the place of its own, for those who put faults into it.
    """
    changed = {name: Program.parse(text) for name, text in (instead or {}).items()}

    def run(variant: Variant, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        program, shared = _program(variant.name, chip)
        program = changed.get(variant.name, program)
        buffers, values = [], []
        for (name, _), item in zip(KERNELS[variant.kernel].arguments, arguments, strict=True):
            values.append(item.data_ptr() if isinstance(item, Tensor) else item)
            if isinstance(item, Tensor):
                buffers.append(Buffer(name, item.data_ptr(), _span(item)))
        launch(program, grid, [*values, *(0 for _ in SCRATCH)], GlobalMemory(buffers), shared, traffic)

    return run


def counted_ops(chip: int, kernels: Collection[str]) -> tuple[dict[str, Callable[..., Any]], Traffic]:
    """:func:`.launch.ops` by the compiled kernels, and what launches of some of them ask of the machine so far."""
    traffic = Traffic()
    counting, other = run_compiled(chip, traffic), run_compiled(chip)

    def run(variant: Variant, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        (counting if variant.kernel in kernels else other)(variant, grid, arguments)

    return ops(run), traffic


def _span(tensor: Tensor) -> int:
    """Bytes from its first element to its last, whatever its strides."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
