"""Each statement of a program -> a function that executes it: registers, control, memory, warps. The tensor cores are in
:mod:`.products` and :mod:`.tcgen05`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arithmetic, matrices, products, tcgen05
from .arithmetic import UNSIGNED
from .memory import WARP
from .operands import (
    Decoder,
    Parting,
    Step,
    address_of,
    all_together,
    group_step,
    number_of,
    registers_of,
    slot_of,
    vector_of,
    whole_warps,
)
from .program import Program, PtxError, Statement
from .state import Blocks, Pending

__all__ = ["decode", "smallest_shared_access"]

Array = NDArray[Any]


def decode(program: Program, statement: Statement) -> Step:
    """
    Raises:
        PtxError: the instruction is not understood.
    """
    try:
        guarded = statement.predicate is not None
        if guarded and not statement.opcode.startswith(_GUARDED):
            raise PtxError("a predicate here is not understood")
        step = _DECODERS.get(statement.opcode.split(".")[0], _compute)(program, statement)
    except PtxError as err:
        raise PtxError(f"{program.entry}: `{statement.text}`: {err}") from None
    except ValueError as err:  # too few operands, or too many
        raise PtxError(f"{program.entry}: `{statement.text}`: the operands are not understood") from err
    if step is None:
        raise PtxError(f"{program.entry}: `{statement.text}`: the instruction is not understood")
    return step


_GUARDED = (
    "bra", "ld.global", "ld.shared", "st.global", "st.shared", "cp.async.ca", "cp.async.cg", "mbarrier.init", "mbarrier.inval",
    "tcgen05.alloc", "tcgen05.relinquish_alloc_permit", "tcgen05.dealloc", "tcgen05.ld", "tcgen05.st", "tcgen05.mma",
    "tcgen05.commit",
)  # fmt: skip
"""Instructions whose decoders heed a predicate."""


def smallest_shared_access(program: Program) -> int:
    """Bytes that an access to shared memory has at least; 4 where all have more."""
    smallest = 4
    for statement in program.statements:
        if statement.opcode.startswith(("wgmma.mma_async", "tcgen05.mma")):
            smallest = 2
        elif statement.opcode.startswith(("ld.shared", "st.shared")):
            bits, count = _element(statement.opcode)
            smallest = min(smallest, bits // 8 * count)
    return smallest


# ---- registers to register -----------------------------------------------------------------------------------------


def _compute(program: Program, statement: Statement) -> Step | None:
    function = _function(statement.opcode, len(statement.operands) - 1)
    if function is None:
        return None
    target, *sources = [slot_of(item) for item in statement.operands]

    def step(state: Blocks) -> None:
        state.put(target, function(*[state.get(item) for item in sources]))

    return step


def _function(opcode: str, operands: int) -> Callable[..., Array] | None:
    """Of an instruction; None where there is none of that name that takes so many operands."""
    head, _, kind = opcode.rpartition(".")
    if opcode in arithmetic.CONVERSIONS:
        plain = found = arithmetic.CONVERSIONS[opcode]
    elif opcode in arithmetic.WIDE:
        return arithmetic.widened(opcode) if operands == (2 if head.startswith("mul") else 3) else None
    elif opcode in arithmetic.SHIFTS:
        plain, found = arithmetic.SHIFTS[opcode][1], arithmetic.shifted(opcode)
    elif head.startswith("setp."):
        plain = found = arithmetic.comparison(head.removeprefix("setp."), kind)
    elif head == "selp":
        plain = found = _selected
    elif head in arithmetic.FUNCTIONS and kind in arithmetic.FUNCTIONS[head][1]:
        plain = arithmetic.FUNCTIONS[head][0]
        found = arithmetic.typed(plain, kind)
    else:
        return None
    return found if _takes(plain, operands) else None


def _selected(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def _takes(function: Callable[..., Array], operands: int) -> bool:
    if isinstance(function, np.ufunc):  # one more operand would be written to
        return bool(function.nin == operands)
    try:
        inspect.signature(function).bind(*range(operands))
    except TypeError:
        return False
    return operands > 0


def _move(program: Program, statement: Statement) -> Step | None:
    """``mov``, packing and unpacking included: the low half comes first."""
    target, source = (vector_of(item) for item in statement.operands)
    if (len(target), len(source)) == (1, 1):
        return _compute(program, statement)
    if (len(target), len(source)) == (1, 2):
        return _pack(program, slot_of(statement.operands[0]), registers_of(source))
    if (len(target), len(source)) == (2, 1):
        return _unpack(program, target, slot_of(statement.operands[1]))
    return None


def _pack(program: Program, target: int, source: tuple[int, ...]) -> Step:
    kept, half = UNSIGNED[program.widths[target]], program.widths[target] // 2

    def step(state: Blocks) -> None:
        # The compiler packs halves that were never set, and never takes them out again.
        halves = [arithmetic.unset(half) if state.registers[item] is None else state.get(item) for item in source]
        low, high = (item.astype(kept) for item in halves)
        state.put(target, low | (high << kept(half)))

    return step


def _unpack(program: Program, target: tuple[int | None, ...], source: int) -> Step:
    wide, half = UNSIGNED[program.widths[source]], program.widths[source] // 2

    def step(state: Blocks) -> None:
        for index, slot in enumerate(target):
            if slot is not None:
                state.put(slot, (state.get(source) >> wide(half * index)).astype(UNSIGNED[half]))

    return step


# ---- control ------------------------------------------------------------------------------------------------------


def _branch(program: Program, statement: Statement) -> Step | None:
    here, target, predicate, negated = statement.number, statement.target, statement.predicate, statement.negated
    if target is None or statement.opcode not in ("bra", "bra.uni"):
        return None
    uniform = statement.opcode == "bra.uni"

    def step(state: Blocks) -> int | Parting | None:
        if predicate is None:
            jumping = np.ones((1, 1), np.bool_)
        else:
            jumping = state.get(predicate) ^ negated
        if state.mask is not None:
            jumping = jumping & state.mask
            if (jumping == state.mask).all():
                return target
            if uniform and jumping.any():
                raise PtxError("bra.uni, and not all threads jump")
            return _part(state, jumping, target)
        whole = np.broadcast_to(jumping.all(axis=1), state.shape[:1])
        if whole.all():
            return target
        mixed = jumping.shape[1] > 1 and (jumping.any(axis=1) != jumping.all(axis=1)).any()
        if uniform and mixed:
            raise PtxError("bra.uni, and not all threads jump")
        if whole.any():
            return Parting(whole, target, here if mixed else here + 1)
        return _part(state, jumping, target) if mixed else None

    return step


def _part(state: Blocks, jumping: Array, target: int) -> int | None:
    """Some threads of a block go on, the others wait for them at ``target``."""
    if not jumping.any():
        return None
    state.rejoin.append((target, state.mask))
    going_on = ~np.broadcast_to(jumping, state.shape)
    state.mask = going_on if state.mask is None else going_on & state.mask
    return None


def _return(program: Program, statement: Statement) -> Step | None:
    if statement.opcode != "ret":
        return None

    def step(state: Blocks) -> int:
        all_together(state)
        if state.copies.any() or state.products.any() or state.tensor.pending():
            raise PtxError("the kernel ends while asynchronous work is on its way")
        if state.tensor.columns:
            raise PtxError("the kernel ends and has not freed its tensor memory")
        return -1

    return step


def _barrier(program: Program, statement: Statement) -> Step | None:
    """``bar.sync 0``: all threads of a block."""
    which, *threads = [number_of(program, item) for item in statement.operands]
    if statement.opcode not in ("bar.sync", "barrier.sync") or which != 0 or threads not in ([], [program.threads]):
        return None

    def step(state: Blocks) -> None:
        all_together(state)
        state.shared.barrier()

    return step


def _fence(program: Program, statement: Statement) -> Step | None:
    """``fence.proxy.async``: what threads wrote to shared memory is there for the tensor cores."""
    if statement.opcode != "fence.proxy.async.shared::cta":
        return None

    def step(state: Blocks) -> None:
        all_together(state)
        state.shared.fence()

    return step


# ---- loads and stores ------------------------------------------------------------------------------------------------


def _element(opcode: str) -> tuple[int, int]:
    """(bits, count) of the elements of ``ld.global.v4.b32``.

    Raises:
        PtxError: not understood.
    """
    parts = opcode.split(".")[2:]
    count = int(parts.pop(0)[1:]) if parts and parts[0] in ("v2", "v4") else 1
    if len(parts) != 1 or parts[0] not in ("b16", "b32", "b64"):
        raise PtxError(f"`{opcode}` is not understood")
    return int(parts[0][1:]), count


def _load(program: Program, statement: Statement) -> Step | None:
    space = statement.opcode.split(".")[1]
    if space == "param":
        return _load_parameter(program, statement)
    bits, count = _element(statement.opcode)
    slots, address = vector_of(statement.operands[0]), address_of(statement.operands[1])
    widths = {program.widths[slot] for slot in slots if slot is not None}
    if space not in ("global", "shared") or len(slots) != count or min(widths, default=bits) < bits:
        return None  # a wider register is filled with zeros

    def step(state: Blocks) -> None:
        block, thread, mask = state.active(statement.predicate, statement.negated)
        where = state.addresses(address, block, thread)
        if space == "global":
            found = state.memory.load(where, bits // 8, count, state.identity(block, thread))
        else:
            found = state.shared.load(block, where.astype(np.int64), bits // 8, count, thread // WARP + 1)
        for index, slot in enumerate(slots):
            if slot is not None:
                kept = UNSIGNED[program.widths[slot]]
                state.put_of(slot, block, thread, mask, found[:, index].astype(kept))

    return step


def _load_parameter(program: Program, statement: Statement) -> Step | None:
    target, address = slot_of(statement.operands[0]), address_of(statement.operands[1])
    source, kind = address.base, statement.opcode.removeprefix("ld.param.")
    if address.offset or source not in program.parameters or kind not in ("b32", "b64", "s32"):
        return None
    signed = kind == "s32"
    if program.widths[source] != int(kind[1:]) or (program.widths[target] != int(kind[1:]) and not signed):
        return None

    def step(state: Blocks) -> None:
        value = state.get(source)
        if signed:
            value = value.view(np.int32).astype(np.int64)
        state.put(target, value.astype(UNSIGNED[program.widths[target]]))

    return step


def _store(program: Program, statement: Statement) -> Step | None:
    space = statement.opcode.split(".")[1]
    bits, count = _element(statement.opcode)
    address, slots = address_of(statement.operands[0]), registers_of(statement.operands[1])
    widths = {program.widths[slot] for slot in slots if slot not in program.constants}
    if space not in ("global", "shared") or len(slots) != count or not widths <= {bits}:
        return None

    def step(state: Blocks) -> None:
        block, thread, _ = state.active(statement.predicate, statement.negated)
        where = state.addresses(address, block, thread)
        values = np.stack([state.full(slot)[block, thread].astype(UNSIGNED[bits]) for slot in slots], axis=1)
        if space == "global":
            state.memory.store(where, values, state.identity(block, thread))
        else:
            state.shared.store(block, where.astype(np.int64), values, thread // WARP + 1)

    return step


# ---- asynchronous copies ----------------------------------------------------------------------------------------------


def _copy(program: Program, statement: Statement) -> Step | None:
    """``cp.async`` and its groups."""
    name = statement.opcode
    if name in ("cp.async.commit_group", "cp.async.wait_group"):
        allowed = number_of(program, statement.operands[0]) if name == "cp.async.wait_group" else None
        return group_step(lambda state: state.copies, allowed)
    if name not in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
        return None
    target, source = address_of(statement.operands[0]), address_of(statement.operands[1])
    nbytes = number_of(program, statement.operands[2])
    given = [slot_of(item) for item in statement.operands[3:]]
    if nbytes not in (4, 8, 16):
        return None

    def step(state: Blocks) -> None:
        block, thread, _ = state.active(statement.predicate, statement.negated)
        to = state.addresses(target, block, thread).astype(np.int64)
        read = state.full(given[0])[block, thread] if given else np.full(len(block), nbytes)
        if not np.isin(read, (0, nbytes)).all():
            raise PtxError("a copy of a part of its bytes is not understood")
        state.shared.begin_copy(block, to, nbytes, thread // WARP + 1)
        state.copies.add(Pending(arrive, (thread, to, state.addresses(source, block, thread), read > 0), block))

    def arrive(state: Blocks, copy: Pending) -> None:
        block, (thread, to, where, reads) = copy.blocks, copy.arrays
        values = np.zeros((len(block), nbytes // 4), np.uint32)  # zero where nothing is read
        values[reads] = state.memory.load(where[reads], 4, nbytes // 4, state.identity(block[reads], thread[reads]))
        state.shared.end_copy(block, to, values, thread // WARP + 1)

    return step


# ---- instructions of a warp ----------------------------------------------------------------------------------------------


def _shuffle(program: Program, statement: Statement) -> Step | None:
    """``shfl.sync`` of a whole warp."""
    mode = {"shfl.sync.bfly.b32": "bfly", "shfl.sync.idx.b32": "idx"}.get(statement.opcode)
    target, source, which, clamp, members = statement.operands
    if mode is None or (number_of(program, clamp), number_of(program, members)) != (31, 0xFFFFFFFF):
        return None
    target, source, which = slot_of(target), slot_of(source), slot_of(which)

    def step(state: Blocks) -> None:
        whole_warps(state.mask)
        lanes = state.warps(which).astype(np.int64)
        if mode == "bfly":
            lanes = lanes ^ np.arange(WARP)
        state.put_warps(target, np.take_along_axis(state.warps(source), lanes % WARP, axis=1))

    return step


def _reduce(program: Program, statement: Statement) -> Step | None:
    """``redux.sync.max.f32``: the largest of a warp."""
    target, source, members = (slot_of(item) for item in statement.operands)
    if statement.opcode != "redux.sync.max.f32":
        return None

    def step(state: Blocks) -> None:
        whole_warps(state.mask)
        if (state.get(members) != 0xFFFFFFFF).any():
            raise PtxError("a part of a warp is not understood")
        values = state.warps(source).view(np.float32)
        found = arithmetic.largest(*values.T)[:, None]
        state.put_warps(target, np.broadcast_to(found, values.shape).view(np.uint32))

    return step


def _elect(program: Program, statement: Statement) -> Step | None:
    """``elect.sync``: one thread of a warp, the first."""
    leader, chosen = vector_of(statement.operands[0])
    if statement.opcode != "elect.sync" or chosen is None or number_of(program, statement.operands[1]) != 0xFFFFFFFF:
        return None

    def step(state: Blocks) -> None:
        whole_warps(state.mask)
        if leader is not None:
            state.put(leader, np.zeros((1, 1), np.uint32))
        state.put(chosen, (np.arange(state.shape[1]) % WARP == 0)[None, :])

    return step


def _tiles(program: Program, statement: Statement) -> Step | None:
    """``ldmatrix`` and ``stmatrix``: lane 8 i + r has the address of row r of tile i."""
    parts = statement.opcode.split(".")
    loads = parts[0] == "ldmatrix"
    count, transposed = int(parts[4][1:]) if len(parts) > 4 and parts[4] in ("x1", "x2", "x4") else 0, "trans" in parts
    expected = [parts[0], "sync", "aligned", "m8n8", f"x{count}", *["trans"] * transposed, "shared", "b16"]
    if parts != expected:
        return None
    operands = statement.operands if loads else statement.operands[::-1]
    slots, address = vector_of(operands[0]), address_of(operands[1])
    if len(slots) != count:
        return None

    def step(state: Blocks) -> None:
        all_together(state)
        block, thread, _ = state.active(None, False)
        of_row = thread % WARP < 8 * count
        block, thread = block[of_row], thread[of_row]
        where, warp = state.addresses(address, block, thread).astype(np.int64), thread // WARP + 1
        if loads:
            words = np.ascontiguousarray(state.shared.load(block, where, 4, 4, warp))
            tiles = matrices.tile_registers(words.view(np.uint16).reshape(-1, count, 8, 8), transposed)
            for slot, value in zip(slots, tiles, strict=True):
                if slot is not None:
                    state.put_warps(slot, value)
        else:
            rows = matrices.tile_rows([state.warps(slot) for slot in registers_of(slots)], transposed)
            state.shared.store(block, where, np.ascontiguousarray(rows.reshape(-1, 8)).view(np.uint32), warp)

    return step


_DECODERS: dict[str, Decoder] = {
    "bar": _barrier,
    "barrier": _barrier,
    "bra": _branch,
    "cp": _copy,
    "elect": _elect,
    "fence": _fence,
    "ld": _load,
    "ldmatrix": _tiles,
    "mbarrier": tcgen05.mbarrier,
    "mma": products.mma,
    "mov": _move,
    "redux": _reduce,
    "ret": _return,
    "shfl": _shuffle,
    "st": _store,
    "stmatrix": _tiles,
    "tcgen05": tcgen05.tcgen05,
    "wgmma": products.wgmma,
}
"""First part of an instruction -> its decoder; those that compute registers from registers need none."""
