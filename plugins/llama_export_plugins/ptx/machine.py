"""Runs a :class:`Program`: blocks side by side, every register an array over their threads.

Blocks take the same way together and part where a branch sends them different ones. Where threads of one block part, those that
jump wait for the others at their target; a barrier or the end on the way there is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .instructions import decode, smallest_shared_access
from .memory import GlobalMemory, SharedMemory, Traffic
from .operands import Step
from .program import Program, PtxError
from .state import Blocks, initial_registers

__all__ = ["launch"]

_THREADS = 1 << 14
"""That run side by side: enough for NumPy to be busy, few enough for the caches."""


def launch(
    program: Program,
    grid: tuple[int, int, int],
    arguments: Sequence[int | float],
    memory: GlobalMemory,
    shared_bytes: int,
    traffic: Traffic | None = None,
) -> None:
    """One launch.

    Args:
        program: the kernel.
        grid: blocks in x, y, z.
        arguments: one per parameter: an address or an integer; a float where the parameter is f32.
        memory: what it may touch.
        shared_bytes: of dynamic shared memory.
        traffic: counts into it, if given.

    Raises:
        PtxError: an instruction that is not understood, or something a GPU would not forgive (see :mod:`.memory`), with the
            instruction.
    """
    if len(arguments) != len(program.parameters):
        raise PtxError(f"{len(arguments)} arguments, `{program.entry}` takes {len(program.parameters)}")
    if not program.steps:
        program.steps = [decode(program, statement) for statement in program.statements]
    word = smallest_shared_access(program)
    memory.begin_launch(traffic)
    number = grid[0] * grid[1] * grid[2]
    at_once = max(1, _THREADS // program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, number, at_once):
            numbers = np.arange(first, min(first + at_once, number))
            shared = SharedMemory(len(numbers), shared_bytes, word, traffic)
            registers = initial_registers(program, grid, numbers, arguments)
            _run(program.steps, Blocks(program, numbers, registers, memory, shared, traffic))


def _run(steps: Sequence[Step], start: Blocks) -> None:
    waiting = [start]
    while waiting:
        state = waiting.pop()
        while state.at >= 0:
            here = state.at
            while state.rejoin and state.rejoin[-1][0] == here:
                _, state.mask = state.rejoin.pop()
            if any(target == here for target, _ in state.rejoin):
                raise PtxError(f"{state.program.entry}: threads that parted meet in an order that is not understood")
            if here == len(steps):
                raise PtxError(f"{state.program.entry}: the kernel runs past its last statement")
            try:
                decided = steps[here](state)
            except PtxError as err:
                raise PtxError(f"{state.program.entry}: `{state.program.statements[here].text}`: {err}") from None
            if decided is None:
                state.at = here + 1
            elif isinstance(decided, int):
                state.at = decided
            else:
                other = state.select(~decided.chosen)
                other.at = decided.other
                waiting.append(other)
                state = state.select(decided.chosen)
                state.at = decided.target
