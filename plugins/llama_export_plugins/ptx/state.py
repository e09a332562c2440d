"""Where a launch stands: blocks that have come the same way, their registers, and the asynchronous work on its way."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arithmetic import UNSIGNED, unset
from .memory import WARP, GlobalMemory, SharedMemory, Traffic
from .program import Address, Program, PtxError, float32_bits
from .tensor_memory import TensorMemory

__all__ = ["Blocks", "Groups", "Pending", "initial_registers"]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Pending:
    """Asynchronous work of some blocks: done when it is waited for, the latest moment that the ISA allows. (What it takes from
    registers it takes at once; nobody may change those till then.)"""

    finish: Callable[[Blocks, Pending], None]
    arrays: tuple[Array, ...]
    """What it needs."""
    blocks: Array | None = None
    """Place in the batch of each entry of the arrays; None: the arrays are [blocks or 1, ..]."""

    def select(self, chosen: Array) -> Pending:
        """That of the blocks that a mask [blocks] chooses."""
        if self.blocks is None:
            return Pending(self.finish, tuple(_rows(item, chosen) for item in self.arrays))
        kept = chosen[self.blocks]
        renumbered = np.cumsum(chosen) - 1
        return Pending(self.finish, tuple(item[kept] for item in self.arrays), renumbered[self.blocks[kept]])


class Groups:
    """Asynchronous work in groups that are waited for in the order they were closed (``commit_group``, ``wait_group``)."""

    def __init__(self) -> None:
        self._groups: list[list[Pending]] = [[]]

    def add(self, work: Pending) -> None:
        """To the group that is open."""
        self._groups[-1].append(work)

    def close(self) -> None:
        """Opens the next."""
        self._groups.append([])

    def wait(self, state: Blocks, allowed: int) -> None:
        """Does all but the latest ``allowed`` closed groups."""
        done = max(len(self._groups) - 1 - allowed, 0)
        groups, self._groups = self._groups[:done], self._groups[done:]
        for group in groups:
            for work in group:
                work.finish(state, work)

    def any(self) -> bool:
        """Whether some work is on its way."""
        return any(self._groups)

    def select(self, chosen: Array) -> Groups:
        """Those of the blocks that a mask [blocks] chooses."""
        part = Groups()
        part._groups = [[work.select(chosen) for work in group] for group in self._groups]
        return part


@dataclass(slots=True)
class Blocks:
    """Blocks of one launch that have come the same way."""

    program: Program
    numbers: Array
    """In the grid."""
    registers: list[Any]
    """By slot, unsigned integers or bool; each broadcasts to [blocks, threads]. None: nothing was put into it. Arrays are shared
    and never written to."""
    memory: GlobalMemory
    shared: SharedMemory
    traffic: Traffic | None
    at: int = 0
    """The next statement; -1: the end."""
    copies: Groups = field(default_factory=Groups)
    """cp.async"""
    products: Groups = field(default_factory=Groups)
    """wgmma"""
    tensor: TensorMemory = field(default_factory=TensorMemory)
    read: Counter[int] = field(default_factory=Counter)
    """Slots -> how much asynchronous work reads them."""
    written: Counter[int] = field(default_factory=Counter)
    """The same of what writes them."""
    set_by: dict[int, Array] = field(default_factory=dict)
    """Predicates that only some threads have set, [blocks, threads]: no value of theirs would show it."""
    mask: Array | None = None
    """[blocks, threads]: the threads that go on, where others of their block have jumped ahead; None: all."""
    rejoin: list[tuple[int, Array | None]] = field(default_factory=list)
    """(statement, mask): where those wait, and who goes on from there."""

    @property
    def shape(self) -> tuple[int, int]:
        """[blocks, threads]"""
        return len(self.numbers), self.program.threads

    def get(self, slot: int) -> Array:
        """A register; broadcasts to [blocks, threads].

        Raises:
            PtxError: nothing was put into it, or asynchronous work will put something into it.
        """
        if slot in self.written:
            raise PtxError("a register is read before what will be put into it was waited for")
        value: Array | None = self.registers[slot]
        if value is None:
            raise PtxError("a register is read that nothing was put into")
        setters = self.set_by.get(slot)
        if setters is not None and not (setters if self.mask is None else setters | ~self.mask).all():
            raise PtxError("a predicate is read by threads that put nothing into it")
        return value

    def full(self, slot: int) -> Array:
        """A register as [blocks, threads]; errors as :meth:`get`."""
        return np.broadcast_to(self.get(slot), self.shape)

    def warps(self, slot: int) -> Array:
        """A register as [blocks * warps, 32]."""
        return np.ascontiguousarray(self.full(slot)).reshape(-1, WARP)

    def put(self, slot: int, value: Array) -> None:
        """Into a register, of those threads that go on.

        Raises:
            PtxError: asynchronous work still reads or writes it.
        """
        if slot in self.written or slot in self.read:
            raise PtxError("a register is written while asynchronous work has it")
        if self.mask is None:
            self.set_by.pop(slot, None)
        else:
            if self.program.widths[slot] == 1 and (self.registers[slot] is None or slot in self.set_by):
                self.set_by[slot] = self.set_by.get(slot, np.False_) | self.mask
            value = np.where(self.mask, value, self._before(slot))
        self.registers[slot] = value

    def put_warps(self, slot: int, value: Array) -> None:
        """The same of [blocks * warps, 32]."""
        self.put(slot, np.ascontiguousarray(value).reshape(self.shape))

    def put_of(self, slot: int, block: Array, thread: Array, mask: Array | None, values: Array) -> None:
        """``values`` [N] into a register, of the threads (block, thread) [N]; ``mask`` None: of all, in order."""
        if mask is None:
            self.put(slot, values.reshape(self.shape))
            return
        result = np.array(np.broadcast_to(self._before(slot), self.shape))
        result[block, thread] = values
        self.put(slot, result)

    def _before(self, slot: int) -> Array:
        """What the threads keep that do not write."""
        value: Array | None = self.registers[slot]
        return unset(self.program.widths[slot]) if value is None else value

    def take(self, *, reads: Sequence[int] = (), writes: Sequence[int] = ()) -> None:
        """Asynchronous work has these registers, until it gives them back."""
        self.read.update(reads)
        self.written.update(writes)

    def give_back(self, *, reads: Sequence[int] = (), writes: Sequence[int] = ()) -> None:
        """They are free, but for other work that has them too."""
        self.read = +(self.read - Counter(reads))
        self.written = +(self.written - Counter(writes))

    def active(self, predicate: int | None, negated: bool) -> tuple[Array, Array, Array | None]:
        """(block, thread) of those that execute a statement, and the mask [blocks, threads]; None where all do."""
        if predicate is None:
            mask = self.mask
        else:
            mask = self.full(predicate) ^ negated
            mask = mask if self.mask is None else mask & self.mask
        if mask is None:
            block, thread = np.divmod(np.arange(self.shape[0] * self.shape[1]), self.shape[1])
        else:
            block, thread = np.nonzero(mask)
        return block, thread, mask

    def addresses(self, address: Address, block: Array, thread: Array) -> Array:
        """uint64 of some threads."""
        if address.base is None:
            return np.full(len(block), address.offset, np.uint64)
        base = self.full(address.base)[block, thread].astype(np.uint64)
        return base + np.uint64(address.offset & 0xFFFFFFFFFFFFFFFF)

    def identity(self, block: Array, thread: Array) -> Array:
        """Of a thread in the whole launch, from 1."""
        return self.numbers[block] * self.shape[1] + thread + 1

    def select(self, chosen: Array) -> Blocks:
        """Those that a mask [blocks] chooses. Not while some of their threads wait."""
        part = copy.copy(self)
        part.rejoin, part.read, part.written = [], Counter(self.read), Counter(self.written)
        part.numbers = self.numbers[chosen]
        part.registers = [None if item is None else _rows(item, chosen) for item in self.registers]
        part.set_by = {slot: mask[chosen] for slot, mask in self.set_by.items()}
        part.shared, part.tensor = self.shared.select(chosen), self.tensor.select(chosen)
        part.copies, part.products = self.copies.select(chosen), self.products.select(chosen)
        return part


def _rows(value: Array, chosen: Array) -> Array:
    return value[chosen] if value.shape[0] > 1 else value


def initial_registers(
    program: Program, grid: tuple[int, int, int], numbers: Array, arguments: Sequence[int | float]
) -> list[Any]:
    """Registers before the first statement: constants, parameters, special registers; the others are unset."""
    registers: list[Any] = [None] * len(program.widths)
    x, rest = numbers % grid[0], numbers // grid[0]
    values: dict[str, Array] = {
        "%tid.x": np.arange(program.threads)[None, :], "%tid.y": np.array([[0]]), "%tid.z": np.array([[0]]),
        "%ntid.x": np.array([[program.threads]]), "%ntid.y": np.array([[1]]), "%ntid.z": np.array([[1]]),
        "%ctaid.x": x[:, None], "%ctaid.y": (rest % grid[1])[:, None], "%ctaid.z": (rest // grid[1])[:, None],
        "%nctaid.x": np.array([[grid[0]]]), "%nctaid.y": np.array([[grid[1]]]), "%nctaid.z": np.array([[grid[2]]]),
    }  # fmt: skip
    given = dict(program.constants)
    for (slot, kind), value in zip(program.parameters.items(), arguments, strict=True):
        given[slot] = float32_bits(value) if kind == "f32" else int(value) & ((1 << program.widths[slot]) - 1)
    for name, slot in program.special.items():
        registers[slot] = values[name].astype(UNSIGNED[program.widths[slot]])
    for slot, bits in given.items():
        registers[slot] = np.array([[bits]], np.uint64).astype(UNSIGNED[program.widths[slot]])
    return registers
