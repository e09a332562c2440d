"""``tcgen05``: products whose sums live in tensor memory, and the mbarriers that tell when they are done (compute capability 10.0).

One thread of a block issues products; they run in that order, here when somebody waits for an mbarrier that they arrive on.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution, chapters ``tcgen05`` and ``mbarrier``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import matrices
from .memory import WARP
from .operands import Decoder, Step, address_of, all_together, number_of, registers_of, slot_of, whole_warps
from .products import begin_operand, count, end_operand
from .program import Address, Program, PtxError, Statement
from .state import Blocks, Pending
from .tensor_memory import Instruction, Product, Region, matrix_rows

__all__ = ["mbarrier", "tcgen05"]

Array = NDArray[Any]
_MBARRIER_BYTES = 8


def tcgen05(program: Program, statement: Statement) -> Step | None:
    """All of them, each spelled in full."""
    name = statement.opcode
    if name.startswith(("tcgen05.ld.sync.aligned.", "tcgen05.st.sync.aligned.")):
        return _move(program, statement)
    decoder = _DECODERS.get(name)
    return None if decoder is None else decoder(program, statement)


# ---- allocation --------------------------------------------------------------------------------------------------------


def _allocate(program: Program, statement: Statement) -> Step | None:
    target, columns = address_of(statement.operands[0]), number_of(program, statement.operands[1])
    if columns not in (32, 64, 128, 256, 512):
        return None

    def step(state: Blocks) -> None:
        block, thread = _one_warp(state, statement)
        address = state.tensor.allocate(state.shape[0], columns)
        where = state.addresses(target, block, thread).astype(np.int64)
        state.shared.store(block, where, np.full((len(block), 1), address, np.uint32), thread // WARP + 1)

    return step


def _free(program: Program, statement: Statement) -> Step:
    given, columns = slot_of(statement.operands[0]), number_of(program, statement.operands[1])

    def step(state: Blocks) -> None:
        block, thread = _one_warp(state, statement)
        state.tensor.free(_common(state.full(given)[block, thread], "addresses of tensor memory"), columns)

    return step


def _relinquish(program: Program, statement: Statement) -> Step:
    def step(state: Blocks) -> None:
        _one_warp(state, statement)

    return step


def _one_warp(state: Blocks, statement: Statement) -> tuple[Array, Array]:
    """(block, thread) of the one warp of each block that executes a statement.

    Raises:
        PtxError: more, fewer, or a part of one.
    """
    block, thread, _ = state.active(statement.predicate, statement.negated)
    expected = np.repeat(np.arange(state.shape[0]), WARP)
    if not np.array_equal(block, expected) or np.ptp((thread // WARP).reshape(-1, WARP), axis=1).any():
        raise PtxError("one whole warp of each block has to execute this")
    return block, thread


# ---- between registers and tensor memory ----------------------------------------------------------------------------------


def _move(program: Program, statement: Statement) -> Step | None:
    """``tcgen05.ld`` and ``tcgen05.st``: a warp has the 32 rows of its place in its warpgroup.

    ``32x32b``: lane l, register r <-> row l, column r. ``16x32bx2``: lanes 0 to 15 <-> rows 0 to 15; lanes 16 to 31 <-> the
    same rows, as many columns further as the number between address and registers says.
    """
    _, way, _, _, shape, *rest = statement.opcode.split(".")
    operands = statement.operands if way == "ld" else statement.operands[-1:] + statement.operands[:-1]
    slots, address = registers_of(operands[0]), address_of(operands[1])
    if shape not in ("32x32b", "16x32bx2") or rest != [f"x{len(slots)}", "b32"] or address.base is None:
        return None
    if len(slots) not in (1, 2, 4, 8, 16, 32, 64, 128):
        return None
    if len(operands) != (3 if shape == "16x32bx2" else 2):
        return None
    base, offset, width = address.base, address.offset, len(slots)
    further = number_of(program, operands[2]) if shape == "16x32bx2" else 0
    lane = np.arange(WARP)
    row_of, column_of = (lane % 16, lane // 16 * further) if shape == "16x32bx2" else (lane, lane * 0)

    def step(state: Blocks) -> None:
        block, thread, mask = state.active(statement.predicate, statement.negated)
        whole_warps(mask)
        per_block = state.shape[1] // WARP
        given = state.warps(base)
        taking_part = np.ones(len(given), np.bool_) if mask is None else mask.reshape(-1, WARP)[:, 0]
        if (given != given[:, :1]).any():
            raise PtxError("the threads of a warp give different addresses of tensor memory")
        found = np.empty((len(given), WARP, width), np.uint32)
        for bits in np.unique(given[taking_part, 0]):
            chosen = np.flatnonzero((given[:, 0] == bits) & taking_part)
            row, column = state.tensor.region(int(bits) + offset, further + width)
            warps = chosen % per_block
            if (warps % 4 != row // WARP).any() or row % WARP not in ((0, 16) if shape == "16x32bx2" else (0,)):
                raise PtxError(f"a warp touches rows of tensor memory that are not its own: from {row}")
            region = Region.of_warp(row, shape == "16x32bx2", range(column, column + further + width))
            state.tensor.note_move(region, stores=way == "st", warps=warps, now=state.shared.barriers)
            at = (
                (chosen // per_block)[:, None, None],
                (row + row_of)[:, None],
                (column + column_of)[:, None] + np.arange(width),
            )
            if way == "st":
                state.tensor.cells[at] = np.stack([state.warps(slot)[chosen] for slot in slots], axis=-1)
            else:
                found[chosen] = state.tensor.cells[at]
        if way == "ld":
            loaded = found.reshape(*state.shape, width)[block, thread]
            for index, slot in enumerate(slots):
                state.put_of(slot, block, thread, mask, loaded[:, index])

    return step


def _wait(program: Program, statement: Statement) -> Step:
    """``tcgen05.wait``: what was loaded may be overwritten, what was stored may be used. Registers need no wait: whoever reads what
    ``tcgen05.ld`` puts there comes after it."""
    stores = statement.opcode == "tcgen05.wait::st.sync.aligned"

    def step(state: Blocks) -> None:
        all_together(state)
        state.tensor.wait(stores=stores, now=state.shared.barriers)

    return step


# ---- products ----------------------------------------------------------------------------------------------------------


def _multiply(program: Program, statement: Statement) -> Step:
    """``tcgen05.mma``: D (+)= A B, issued by one thread of a block; A from tensor or shared memory, B from shared."""
    target, left, *rest = statement.operands
    target = address_of(target)
    right, described, adds = (slot_of(item) for item in rest)

    def step(state: Blocks) -> None:
        one = _issuer(state, statement)
        if one is None:
            return
        block, thread = one
        d = _common(state.addresses(target, block, thread), "addresses of D")
        instruction = Instruction.parse(_common(state.full(described)[block, thread], "instruction descriptors"))
        state.tensor.region(d, instruction.n, instruction.m)
        reads = Region(0, range(0))
        if isinstance(left, Address):
            a = state.addresses(left, block, thread)
            where = _common(a, "addresses of A")
            state.tensor.region(where, 8, instruction.m)
            reads = Region.of_matrix(where, instruction.m, 8)
        else:
            a = state.full(slot_of(left))[block, thread]
        b, adding = state.full(right)[block, thread], state.full(adds)[block, thread]
        for operand, outer, transposed in in_shared(instruction, a, b):
            begin_operand(state, operand, outer, transposed, tcgen05=True)

        def finish(state: Blocks, work: Pending) -> None:
            multiply(state, instruction, d, *work.arrays)

        product = Product(
            Pending(finish, (a, b, adding)),
            int(thread[0]),
            Region.of_matrix(d, instruction.m, instruction.n),
            reads,
        )
        state.tensor.issue(product, state.shared.barriers)

    def in_shared(instruction: Instruction, a: Array, b: Array) -> Iterator[tuple[Array, int, bool]]:
        """Operands in shared memory: descriptors [blocks, 1], rows, whether those lie side by side."""
        if not isinstance(left, Address):
            yield a[:, None], instruction.m, instruction.a_transposed
        yield b[:, None], instruction.n, instruction.b_transposed

    def multiply(
        state: Blocks, instruction: Instruction, d: int, given_a: Array, given_b: Array, adding: Array
    ) -> None:
        *of_a, b = (end_operand(state, *item, tcgen05=True) for item in in_shared(instruction, given_a, given_b))
        rows = matrix_rows(instruction.m)
        if of_a:
            (a,) = of_a
        else:
            row, column = state.tensor.region(int(given_a[0]), 8)
            packed = state.tensor.cells[:, row + rows[:, None], column + np.arange(8)]
            a = np.ascontiguousarray(packed).view(np.uint16)
        result = np.matmul(matrices.floats(a, instruction.a), matrices.floats(b.swapaxes(1, 2), instruction.b))
        row, column = state.tensor.region(d, instruction.n)
        at = (slice(None), row + rows[:, None], column + np.arange(instruction.n))
        before = np.where(adding[:, None, None], state.tensor.cells[at].view(np.float32), 0)
        state.tensor.cells[at] = (before + result).astype(np.float32).view(np.uint32)
        count(state, len(result) * instruction.m * instruction.n * 16)

    return step


def _issuer(state: Blocks, statement: Statement) -> tuple[Array, Array] | None:
    """(block, thread) of the one thread of each block that executes a statement; None where no block has one.

    Raises:
        PtxError: not one in each, and the same in all.
    """
    block, thread, _ = state.active(statement.predicate, statement.negated)
    if not len(block):
        return None
    if not np.array_equal(block, np.arange(state.shape[0])) or (thread != thread[0]).any():
        raise PtxError("not one thread of each block issues this, which is not understood")
    return block, thread


def _common(values: Array, what: str) -> int:
    """What all blocks have in common.

    Raises:
        PtxError: nothing.
    """
    if (values != values[0]).any():
        raise PtxError(f"blocks with different {what} are not understood")
    return int(values[0])


# ---- mbarriers ---------------------------------------------------------------------------------------------------------


def _commit(program: Program, statement: Statement) -> Step:
    """``tcgen05.commit``: an mbarrier will hear when the products so far are done."""
    address = address_of(statement.operands[0])

    def step(state: Blocks) -> None:
        one = _issuer(state, statement)
        if one is not None:
            where = _common(state.addresses(address, *one), "addresses of an mbarrier")
            state.tensor.commit(where, int(one[1][0]), state.shared.barriers)

    return step


def mbarrier(program: Program, statement: Statement) -> Step | None:
    """Barriers that products arrive on, once a phase. ``try_wait`` does the work that it waits for."""
    if statement.opcode in ("mbarrier.init.shared::cta.b64", "mbarrier.inval.shared::cta.b64"):
        return _begin_or_end(program, statement)
    if statement.opcode != "mbarrier.try_wait.parity.shared::cta.b64":
        return None
    first, second, third = statement.operands
    done, address, parity = slot_of(first), address_of(second), slot_of(third)

    def wait(state: Blocks) -> None:
        all_together(state)
        block, thread, _ = state.active(None, False)
        where = _common(state.addresses(address, block, thread), "addresses of an mbarrier")
        waited_for = _common(state.full(parity)[block, thread], "phases of an mbarrier")
        for work in state.tensor.arrivals(where, waited_for, state.shared.barriers):
            work.finish(state, work)
        state.put(done, np.ones((1, 1), np.bool_))

    return wait


def _begin_or_end(program: Program, statement: Statement) -> Step | None:
    address, begins = address_of(statement.operands[0]), statement.opcode.startswith("mbarrier.init")
    if begins and number_of(program, statement.operands[1]) != 1:
        return None

    def step(state: Blocks) -> None:
        one = _issuer(state, statement)
        if one is None:
            return
        where = _common(state.addresses(address, *one), "addresses of an mbarrier")
        blocks = np.arange(state.shape[0])
        state.shared.hold(blocks, np.full(len(blocks), where, np.int64), _MBARRIER_BYTES, held=begins)
        if begins:
            state.tensor.begin_mbarrier(where, int(one[1][0]) // WARP, state.shared.barriers)
        else:
            state.tensor.end_mbarrier(where)

    return step


_DECODERS: dict[str, Decoder] = {
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": _allocate,
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": _relinquish,
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32": _free,
    "tcgen05.wait::ld.sync.aligned": _wait,
    "tcgen05.wait::st.sync.aligned": _wait,
    "tcgen05.mma.cta_group::1.kind::f16": _multiply,
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64": _commit,
}
"""Those but for loads and stores."""
