"""The kernels on the CPU, under Triton's interpreter: the very functions that are compiled, with the tiles of the GPU variants.

Role: "kernels in the loop". :func:`kernel_ops` computes the custom ops of an exported graph with them; the library's
harness calls :func:`run_interpreted` for each launch that the C++ code asks for.

How: ``@triton.jit`` chooses between compiler and interpreter when a function is defined, for the whole process, by an
environment variable. A process that has imported torch may need the compiler too, so the choice is made per launch
instead: for its duration every jit function that a kernel can reach is replaced by its interpreted twin.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

# Imported by the first launch otherwise, which would hand it twins where it insists on jit functions.
import triton.experimental.gluon  # noqa: F401
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

from . import attention, numerics, rms_norm
from .launch import kernel_function, ops
from .table import Variant

_MODULES: tuple[types.ModuleType, ...] = (tl, tl.standard, tl.math, tl.core, numerics, rms_norm, attention)


class _Twin(InterpretedFunction[Any]):
    """An interpreted function that others call. Triton 3.9 would prepare its language anew for each call, which takes most
    of the time, and would leave it so, which breaks the compiler; :func:`_interpreter` does it once for all of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


@cache
def _interpreted(function: Callable[..., Any]) -> _Twin:
    return _Twin(function)


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Swaps jit functions for interpreted ones, in Triton's standard library and in ours, and swaps them back."""
    swapped = [
        (module, name, value)
        for module in _MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    compiled = numerics.INTERPRETED
    # What Triton prepares is what a function's globals name: our kernels name `tl`, the standard library names `core`.
    namesake = types.FunctionType(_interpreter.__wrapped__.__code__, {"tl": tl, "core": tl.core})  # type: ignore[attr-defined]
    scope = _patch_lang(namesake)
    for module, name, value in swapped:
        setattr(module, name, _interpreted(value.fn))
    numerics.INTERPRETED = tl.constexpr(True)
    try:
        yield
    finally:
        numerics.INTERPRETED = compiled
        for module, name, value in swapped:
            setattr(module, name, value)
        scope.restore()


def run_interpreted(
    kernel: str, grid: tuple[int, int, int], arguments: Sequence[Any], constexprs: Mapping[str, int]
) -> None:
    """One launch.

    Args:
        kernel: a name of the table.
        grid: programs in x, y and z.
        arguments: in the order of the table: CPU tensors (where a pointer is meant, its first element), int, float.
        constexprs: of the variant.
    """
    with _interpreter():
        kernel_function(kernel)[grid](*arguments, **constexprs)


def kernel_ops() -> dict[str, Callable[..., Any]]:
    """Custom op -> function of the node's input tensors (CPU) and attribute values, in the order of the op table.

    The launches are those of the C++ plugins; the library is not involved. Inputs are not modified.
    """

    def run(variant: Variant, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        run_interpreted(variant.kernel, grid, arguments, variant.constexprs)

    return ops(run)
