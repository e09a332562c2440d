"""What decoders have in common: the kinds of operands, the kinds of steps, and who has to be there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from .memory import WARP
from .program import Address, Operand, Program, PtxError, Statement
from .state import Blocks, Groups

__all__ = [
    "Decoder", "Parting", "Step", "address_of", "all_together", "group_step", "nothing", "number_of", "registers_of", "slot_of",
    "vector_of", "whole_warps",
]  # fmt: skip

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Parting:
    """Some blocks go one way, the others another."""

    chosen: Array
    """Mask [blocks]."""
    target: int
    """Where they go."""
    other: int
    """Where the others go."""


Step = Callable[[Blocks], int | Parting | None]
"""Executes a statement. None: on to the next; a number: on to that one, -1 is the end."""
Decoder = Callable[[Program, Statement], Step | None]
"""A statement -> its step; None, or PtxError, where it is not understood."""


def slot_of(operand: Operand) -> int:
    """A single register or constant."""
    if not isinstance(operand, int):
        raise PtxError("an operand is not a register")
    return operand


def vector_of(operand: Operand) -> tuple[int | None, ...]:
    """Registers in braces, or one without."""
    if isinstance(operand, Address):
        raise PtxError("an operand is not a register")
    return operand if isinstance(operand, tuple) else (operand,)


def registers_of(operand: Operand) -> tuple[int, ...]:
    """The same, all of them meant."""
    found = vector_of(operand)
    if None in found:
        raise PtxError("an operand is left out")
    return found  # type: ignore[return-value]


def address_of(operand: Operand) -> Address:
    """In brackets."""
    if not isinstance(operand, Address):
        raise PtxError("an operand is not an address")
    return operand


def number_of(program: Program, operand: Operand) -> int:
    """A constant."""
    slot = slot_of(operand)
    if slot not in program.constants:
        raise PtxError("an operand is not a constant")
    return program.constants[slot]


def all_together(state: Blocks) -> None:
    """
    Raises:
        PtxError: some threads wait where they jumped to.
    """
    if state.mask is not None:
        raise PtxError("some threads of the block are elsewhere")


def whole_warps(mask: Array | None) -> None:
    """
    Args:
        mask: [blocks, threads], of those that execute a statement; None: all.

    Raises:
        PtxError: some threads of a warp do, others do not.
    """
    if mask is not None:
        warps = mask.reshape(-1, WARP)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise PtxError("some threads of the warp are elsewhere")


def group_step(groups: Callable[[Blocks], Groups], allowed: int | None) -> Step:
    """``commit_group`` of some asynchronous work; with ``allowed``, ``wait_group`` of all but so many groups."""

    def step(state: Blocks) -> None:
        all_together(state)  # a group is a thread's own; these kernels have them in step
        if allowed is None:
            groups(state).close()
        else:
            groups(state).wait(state, allowed)

    return step


def nothing(program: Program, statement: Statement) -> Step:
    """Order that is kept here anyway, or is not judged."""
    return lambda state: None
