"""Tensor memory of compute capability 10.0: 128 rows of 512 columns of 32 bits in each block, the home of accumulators.

An address has the row in its upper and the column in its lower 16 bits. A matrix of 128 rows has row i in row i; one of 64 has
16 rows at the head of each 32. 16-bit operands lie two to a column.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution, chapter ``tcgen05``: tensor memory, data path layouts D
and F, ``tcgen05.ld`` / ``st``, instruction descriptor, ``mbarrier``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .program import PtxError

if TYPE_CHECKING:
    from .state import Pending

__all__ = ["Instruction", "Product", "Region", "TensorMemory", "matrix_rows"]

Array = NDArray[Any]
ROWS, COLUMNS = 128, 512


@dataclass(frozen=True, slots=True)
class Region:
    """Some columns of some rows."""

    halves: int
    """Bit 2 q + h: rows 32 q + 16 h to 32 q + 16 h + 15."""
    columns: range

    def meets(self, other: Region) -> bool:
        """Whether they have a cell in common."""
        first, last = max(self.columns.start, other.columns.start), min(self.columns.stop, other.columns.stop)
        return first < last and bool(self.halves & other.halves)

    @classmethod
    def of_matrix(cls, address: int, m: int, columns: int) -> Region:
        """Of a matrix of ``m`` rows."""
        row, first = address >> 16, address & 0xFFFF
        upper = 0b10101010 if row // 16 % 2 else 0b01010101
        return cls(0b11111111 if m == ROWS else upper, range(first, first + columns))

    @classmethod
    def of_warp(cls, row: int, half: bool, columns: range) -> Region:
        """Of 32 rows, or of 16, from ``row`` on."""
        return cls((0b1 if half else 0b11) << row // 16, columns)


@dataclass(frozen=True, slots=True)
class Product:
    """One that was issued: it is done when an mbarrier that it arrives on is waited for."""

    work: Pending
    thread: int
    """Of the block, that issued it."""
    writes: Region
    reads: Region
    """A; no columns where it lies in shared memory."""

    def select(self, chosen: Array) -> Product:
        """That of the blocks that a mask [blocks] chooses."""
        return Product(self.work.select(chosen), self.thread, self.writes, self.reads)


@dataclass(slots=True)
class _Mbarrier:
    warp: int
    """That made it."""
    barrier: int
    """The latest before that."""
    phases: int = 0
    """How many were completed."""


class TensorMemory:
    """That of some blocks that run side by side, and the mbarriers that tell when products are done.

    What a GPU would forgive silently is an error here too: a warp that touches what a product is still working on; a product, or
    another warp, that touches what a warp has stored or, to change it, loaded, with no barrier in between or no ``tcgen05.wait``.

    Source of the latter: PTX ISA, ``tcgen05`` memory consistency model: a register that a load fills orders who reads it, not who
    overwrites what was loaded.
    """

    def __init__(self) -> None:
        self.cells: Array = np.empty((0, ROWS, COLUMNS), np.uint32)
        """[blocks, row, column]; no blocks until it is allocated."""
        self.columns = 0
        """Allocated."""
        self._mbarriers: dict[int, _Mbarrier] = {}
        self._open: list[Product] = []
        """Issued and not yet committed."""
        self._committed: list[tuple[int, list[Product]]] = []
        """(address of an mbarrier, products that arrive on it), in order."""
        self._moves: dict[tuple[int, Region, bool], int | None] = {}
        """(warp, region, whether it stores) -> number of the barrier before it was waited for; None: it was not yet."""

    def allocate(self, blocks: int, columns: int) -> int:
        """
        Returns:
            the address.

        Raises:
            PtxError: there is one already: these kernels make one.
        """
        if self.columns:
            raise PtxError("tensor memory is allocated a second time")
        self.cells = np.full((blocks, ROWS, COLUMNS), 0xFFFFFFFF, np.uint32)
        self.columns = columns
        return 0

    def free(self, address: int, columns: int) -> None:
        """
        Raises:
            PtxError: not what was allocated, or still in use.
        """
        if (address, columns) != (0, self.columns):
            raise PtxError(
                f"{columns} columns of tensor memory from {address} are freed, {self.columns} from 0 were allocated"
            )
        if self.pending() or None in self._moves.values():
            raise PtxError("tensor memory is freed while a product or a move works on it")
        self.columns = 0

    def region(self, address: int, columns: int, m: int | None = None) -> tuple[int, int]:
        """(row, column) of an address from which so many columns are used, by a matrix of ``m`` rows or by a warp.

        Raises:
            PtxError: they are not allocated, or no matrix may begin there.
        """
        row, column = address >> 16, address & 0xFFFF
        if m is not None and row not in ((0,) if m == ROWS else (0, 16)):
            raise PtxError(f"a matrix of {m} rows in tensor memory begins at row {row}, which is not understood")
        if column + columns > self.columns or row >= ROWS:
            raise PtxError(
                f"tensor memory at row {row}, columns {column} to {column + columns} of {self.columns} allocated"
            )
        return row, column

    # ---- products

    def issue(self, product: Product, now: int) -> None:
        """A thread issues a product; products run in the order they are issued.

        Args:
            now: number of the latest barrier.

        Raises:
            PtxError: a warp has stored what it works on, or loaded what it writes, and that may not be done yet.
        """
        warp = product.thread // 32
        for (other, region, stores), waited in self._moves.items():
            if region.meets(product.writes) or (stores and region.meets(product.reads)):
                self._refuse_move(other == warp, stores, waited, now)
        self._open.append(product)

    def commit(self, where: int, thread: int, now: int) -> None:
        """What a thread has issued will arrive on an mbarrier.

        Raises:
            PtxError: there is none, or its phase is taken; or another thread has issued it.
        """
        self._mbarrier(where, thread // 32, now)
        if any(address == where for address, _ in self._committed):
            raise PtxError(f"a second arrival on the mbarrier at {where}, and nobody waited for the first")
        if any(product.thread != thread for product in self._open):
            raise PtxError("a thread commits products of another")
        self._committed.append((where, self._open))
        self._open = []

    def arrivals(self, where: int, parity: int, now: int) -> Iterator[Pending]:
        """What has to be done before a phase of an mbarrier is over: nothing, if it is.

        Raises:
            PtxError: there is no such mbarrier, or nothing will arrive.
        """
        mbarrier = self._mbarrier(where, None, now)
        if mbarrier.phases % 2 != parity:
            return
        if all(address != where for address, _ in self._committed):
            raise PtxError("nothing will ever arrive on the mbarrier that is waited for")
        address = None
        while address != where:
            address, products = self._committed.pop(0)
            for product in products:
                yield product.work
            self._mbarriers[address].phases += 1

    def begin_mbarrier(self, where: int, warp: int, now: int) -> None:
        """
        Raises:
            PtxError: there is one.
        """
        if where in self._mbarriers:
            raise PtxError(f"there is an mbarrier at {where} already")
        self._mbarriers[where] = _Mbarrier(warp, now)

    def end_mbarrier(self, where: int) -> None:
        """
        Raises:
            PtxError: there is none, or something will arrive on it.
        """
        if where not in self._mbarriers or any(address == where for address, _ in self._committed):
            raise PtxError(f"no mbarrier at {where}, or one that something will arrive on")
        del self._mbarriers[where]

    def _mbarrier(self, where: int, warp: int | None, now: int) -> _Mbarrier:
        found = self._mbarriers.get(where)
        if found is None:
            raise PtxError(f"there is no mbarrier at {where}")
        if found.barrier == now and found.warp != warp:
            raise PtxError(f"race: the mbarrier at {where} was made by another warp, and no barrier came since")
        return found

    def pending(self) -> bool:
        """Whether some work is on its way."""
        return bool(self._open or self._committed)

    # ---- moves

    def note_move(self, region: Region, *, stores: bool, warps: Array, now: int) -> None:
        """Some warps load or store.

        Raises:
            PtxError: a product that is not done writes it, or reads what is stored; or another warp was there.
        """
        for product in (*self._open, *(item for _, products in self._committed for item in products)):
            if region.meets(product.writes) or (stores and region.meets(product.reads)):
                raise PtxError("a product that was not waited for works on this tensor memory")
        mine = {int(warp) for warp in np.unique(warps)}
        if stores and len(mine) > 1:
            raise PtxError(f"race: warps {sorted(mine)} store to the same tensor memory")
        for (other, there, stored), waited in self._moves.items():
            if there.meets(region) and (stores or stored) and mine != {other}:
                self._refuse_move(False, stored, waited, now)
        self._moves.update({(warp, region, stores): None for warp in mine})

    @staticmethod
    def _refuse_move(is_mine: bool, stored: bool, waited: int | None, now: int) -> None:
        """
        Raises:
            PtxError: a move may not be done yet, for the warp itself or for another.
        """
        if waited is None:
            raise PtxError(f"this tensor memory was moved with no tcgen05.wait::{'st' if stored else 'ld'} since")
        if not is_mine and waited == now:
            raise PtxError("race: another warp was at this tensor memory, and no barrier came since it waited")

    def wait(self, *, stores: bool, now: int) -> None:
        """``tcgen05.wait``, of all warps."""
        for key, waited in self._moves.items():
            if key[2] == stores and waited is None:
                self._moves[key] = now

    def select(self, chosen: Array) -> TensorMemory:
        """That of the blocks that a mask [blocks] chooses."""
        part = TensorMemory()
        part.cells = self.cells[chosen] if len(self.cells) else self.cells
        part.columns = self.columns
        part._mbarriers = {where: replace(item) for where, item in self._mbarriers.items()}
        part._moves = dict(self._moves)
        part._open = [product.select(chosen) for product in self._open]
        part._committed = [
            (where, [product.select(chosen) for product in products]) for where, products in self._committed
        ]
        return part


def matrix_rows(m: int) -> Array:
    """Rows of tensor memory where those of a matrix of 64 or 128 rows lie, int64 [m]."""
    return np.arange(128) if m == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16


@dataclass(frozen=True, slots=True)
class Instruction:
    """What ``tcgen05.mma.kind::f16`` multiplies: D [m, n] (+)= A [m, 16] B [16, n]."""

    m: int
    n: int
    a: str
    b: str
    """``f16`` or ``bf16``"""
    a_transposed: bool
    b_transposed: bool
    """Whether it lies with the rows (A: m, B: n) side by side in shared memory, not with k."""

    @classmethod
    def parse(cls, bits: int) -> Instruction:
        """From the instruction descriptor.

        Raises:
            PtxError: another kind of accumulator, sparsity or negation.
        """
        stray = bits & ~(3 << 4 | 7 << 7 | 7 << 10 | 3 << 15 | 63 << 17 | 31 << 24)
        if bits >> 4 & 3 != 1 or stray:
            raise PtxError(f"instruction descriptor 0x{bits:x} is not understood")
        kinds = {0: "f16", 1: "bf16"}
        a, b = kinds.get(bits >> 7 & 7), kinds.get(bits >> 10 & 7)
        if a is None or b is None:
            raise PtxError(f"operand types of instruction descriptor 0x{bits:x} are not understood")
        m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
        if m not in (64, 128) or not 0 < n <= 256 or n % (8 if m == 64 else 16):
            raise PtxError(f"a product of {m} by {n} is not understood")
        return cls(m, n, a, b, bool(bits >> 15 & 1), bool(bits >> 16 & 1))
