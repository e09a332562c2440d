"""Products on the tensor cores: ``mma`` of a warp, ``wgmma`` of four (compute capability 9.0), and operands in shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import matrices
from .memory import WARP
from .operands import Step, all_together, group_step, nothing, number_of, registers_of, slot_of, whole_warps
from .program import Program, PtxError, Statement
from .state import Blocks, Pending

__all__ = ["begin_operand", "count", "end_operand", "mma", "wgmma"]

Array = NDArray[Any]


def mma(program: Program, statement: Statement) -> Step | None:
    """``mma``: D = A B + C, 16 x 8 x 16, a warp each."""
    kind = {
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "f16",
    }.get(statement.opcode)
    d, a, b, c = (registers_of(item) for item in statement.operands)
    if kind is None:
        return None

    def step(state: Blocks) -> None:
        whole_warps(state.mask)
        left = matrices.a_fragment([state.warps(slot) for slot in a])
        right = matrices.b_fragment([state.warps(slot) for slot in b])
        product = np.matmul(matrices.floats(left, kind), matrices.floats(right, kind))
        result = matrices.c_fragment([state.warps(slot) for slot in c]) + product
        for slot, value in zip(d, matrices.c_registers(result), strict=True):
            state.put_warps(slot, value)
        count(state, len(product) * 16 * 8 * 16)

    return step


def count(state: Blocks, multiplications: int) -> None:
    """Into the traffic of the launch."""
    if state.traffic is not None:
        state.traffic.multiplications += multiplications


def wgmma(program: Program, statement: Statement) -> Step | None:
    """``wgmma``: D = A B + D, 64 x N x 16, four warps each; A from registers or shared memory.

    Not judged: ``wgmma.fence``, which orders registers that were written before.
    """
    name = statement.opcode
    if name == "wgmma.fence.sync.aligned":
        return nothing(program, statement)
    if name in ("wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned"):
        allowed = number_of(program, statement.operands[-1]) if name.startswith("wgmma.wait") else None
        return group_step(lambda state: state.products, allowed)
    d, left = registers_of(statement.operands[0]), statement.operands[1]
    width = 2 * len(d)
    kind = name.rpartition(".")[2]
    if kind not in ("f16", "bf16") or name != f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind}":
        return None
    in_registers = registers_of(left) if isinstance(left, tuple) else ()
    right, adds = slot_of(statement.operands[2]), slot_of(statement.operands[3])
    sign_a, sign_b, *transposed = [number_of(program, item) for item in statement.operands[4:]]
    if (sign_a, sign_b) != (1, 1) or len(transposed) != (1 if in_registers else 2):
        return None

    def step(state: Blocks) -> None:
        all_together(state)
        b, adding = state.get(right), state.get(adds)
        begin_operand(state, _of_warpgroups(state, b), width, bool(transposed[-1]), tcgen05=False)
        if in_registers:
            a = matrices.a_fragment([state.warps(slot) for slot in in_registers]).reshape(state.shape[0], -1, 64, 16)
        else:
            a = state.get(slot_of(left))
            begin_operand(state, _of_warpgroups(state, a), 64, bool(transposed[0]), tcgen05=False)
        state.take(reads=in_registers, writes=d)
        state.products.add(Pending(multiply, (a, b, adding)))

    def multiply(state: Blocks, product: Pending) -> None:
        a, b, adding = product.arrays
        state.give_back(reads=in_registers, writes=d)
        if in_registers:
            a = a.reshape(-1, 64, 16)
        else:
            a = end_operand(state, _of_warpgroups(state, a), 64, bool(transposed[0]), tcgen05=False)
        b = end_operand(state, _of_warpgroups(state, b), width, bool(transposed[-1]), tcgen05=False).swapaxes(1, 2)
        result = np.matmul(matrices.floats(a, kind), matrices.floats(b, kind)).reshape(-1, 16, width)
        adding = np.broadcast_to(adding, state.shape).reshape(-1, WARP)[:, :1, None]
        if adding.any():
            before = matrices.c_fragment([_unguarded(state, slot) for slot in d])
            result = np.where(adding, before, 0) + result
        for slot, value in zip(d, matrices.c_registers(result), strict=True):
            state.registers[slot] = np.ascontiguousarray(value).reshape(state.shape)
        count(state, len(a) * 64 * width * 16)

    return step


def _unguarded(state: Blocks, slot: int) -> Array:
    """[blocks * warps, 32] of a register that a later product waits for."""
    value = state.registers[slot]
    if value is None:
        raise PtxError("a product adds to a register that nothing was put into")
    return np.ascontiguousarray(np.broadcast_to(value, state.shape)).reshape(-1, WARP)


def _of_warpgroups(state: Blocks, descriptors: Array) -> Array:
    """What the threads of each group of four warps give, [blocks, groups].

    Raises:
        PtxError: not one and the same.
    """
    given = np.broadcast_to(descriptors, state.shape).reshape(state.shape[0], -1, 4 * WARP)
    if (given != given[:, :, :1]).any():
        raise PtxError("the threads of a warpgroup give different matrix descriptors")
    return given[:, :, 0]


def begin_operand(state: Blocks, descriptors: Array, outer: int, transposed: bool, *, tcgen05: bool) -> None:
    """A product of each block and group will read a matrix from shared memory: it must be there by now, and stay.

    Args:
        descriptors: [blocks, groups].
        outer: rows of the matrix (A: m, B: n).
        transposed: whether the rows lie side by side, not k.
        tcgen05: whose descriptors they are.
    """
    for bits in np.unique(descriptors):
        block, _ = np.nonzero(descriptors == bits)
        addresses = _addresses(bits, outer, transposed, tcgen05)
        once = np.unique(block)  # groups of a block may share it
        state.shared.begin_product(np.repeat(once, len(addresses)), np.tile(addresses, len(once)))


def end_operand(state: Blocks, descriptors: Array, outer: int, transposed: bool, *, tcgen05: bool) -> Array:
    """They have read it: uint16 [blocks * groups, outer, 16]. Arguments as :func:`begin_operand`."""
    found = np.empty((*descriptors.shape, outer, 16), np.uint16)
    for bits in np.unique(descriptors):
        block, group = np.nonzero(descriptors == bits)
        addresses = _addresses(bits, outer, transposed, tcgen05)
        once, which = np.unique(block, return_inverse=True)
        read = state.shared.end_product(np.repeat(once, len(addresses)), np.tile(addresses, len(once)))
        found[block, group] = read.reshape(len(once), outer, 16)[which]
    return found.reshape(-1, outer, 16)


def _addresses(bits: int, outer: int, transposed: bool, tcgen05: bool) -> Array:
    return matrices.Descriptor.parse(int(bits), tcgen05=tcgen05).addresses(outer, 16, not transposed).ravel()
