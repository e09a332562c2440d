"""Global and shared memory of a launch, and the judge of who touches what.

Both keep books: who wrote which bytes, who read them. What a GPU would forgive silently, or punish only now and then, is an
error here:

* an address outside the memory that the launch was given, or not a multiple of the access;
* shared memory read before it was written, or touched while an asynchronous copy into it, or a product that reads it, is on its
  way, or where an mbarrier is;
* a product of shared memory that was written by ordinary means, with no ``fence.proxy.async`` since;
* two warps of a block on the same shared bytes, one of them changing them, without a barrier in between. Triton has warps that
  hold the same values store them side by side, so a store that changes nothing is taken: the verdict is about these data;
* two threads on the same global bytes in one launch, one of them writing: no order is promised between blocks, and within
  a block none is used by these kernels.

Within a warp, instructions are taken to run in order for all its threads.
"""

from __future__ import annotations

import bisect
import copy
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .program import PtxError

__all__ = ["WARP", "Buffer", "GlobalMemory", "SharedMemory", "Traffic"]

Array = NDArray[Any]
WARP = 32
_WORD = 2
"""Bytes of global memory that have one entry in the books."""
_UNWRITTEN = 0xFF
"""All bits set is NaN in every floating-point type."""
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_NOBODY, _SEVERAL = 0, -1
_SECTOR = 32
"""Bytes that a GPU moves between memory and cache at least."""
_BANKS, _BANK_BYTES = 32, 4
_AFTER_BARRIER, _SEVERAL_WARPS = 64, 63


@dataclass(slots=True)
class Traffic:
    """What a launch asked of memory and of the tensor cores, counted."""

    global_bytes: dict[str, int] = field(default_factory=lambda: {"load": 0, "store": 0})
    """Asked for by threads."""
    global_sectors: dict[str, int] = field(default_factory=lambda: {"load": 0, "store": 0})
    """Sectors of 32 bytes that warps touched, one instruction at a time: times 32 / global_bytes is 1 where none is half used."""
    shared_passes: int = 0
    """Of warps through the banks of shared memory."""
    shared_passes_least: int = 0
    """What they would be without two rows of one bank at a time."""
    multiplications: int = 0
    """Of the tensor cores; each with an addition, so 2 FLOPs."""

    @property
    def sector_use(self) -> float:
        """Bytes asked for / bytes of the sectors they lie in."""
        return sum(self.global_bytes.values()) / max(1, _SECTOR * sum(self.global_sectors.values()))


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that a launch may touch."""

    name: str
    address: int
    nbytes: int


class GlobalMemory:
    """The host memory behind a launch's pointers.

    Args:
        buffers: those that overlap are taken as one; empty ones are left out.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers: list[Buffer] = []
        for item in sorted((item for item in buffers if item.nbytes), key=lambda item: item.address):
            last = self._buffers[-1] if self._buffers else None
            if last is not None and item.address < last.address + last.nbytes:
                nbytes = max(last.address + last.nbytes, item.address + item.nbytes) - last.address
                name = last.name if item.name == last.name else f"{last.name}+{item.name}"
                self._buffers[-1] = Buffer(name, last.address, nbytes)
            else:
                self._buffers.append(item)
        self._begins = [item.address for item in self._buffers]
        # From a multiple of 16 on, so that an aligned address is a whole number of elements away.
        self._origins = [item.address // 16 * 16 for item in self._buffers]
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (item.address + item.nbytes - origin)).from_address(origin))
            for item, origin in zip(self._buffers, self._origins, strict=True)
        ]
        self._writers: dict[int, Array] = {}
        self._readers: dict[int, Array] = {}
        self._traffic: Traffic | None = None

    def begin_launch(self, traffic: Traffic | None = None) -> None:
        """Launches run one after the other: what one wrote, the next may read.

        Args:
            traffic: counts into it, if given.
        """
        self._traffic = traffic
        self._writers.clear()
        self._readers.clear()

    def load(self, addresses: Array, size: int, count: int, threads: Array) -> Array:
        """
        Args:
            addresses: uint64 [N], of those threads that load.
            size: bytes of one element: 2, 4 or 8.
            count: elements side by side.
            threads: int64 [N], from 1.

        Returns:
            unsigned integers [N, count]
        """
        self._count("load", addresses, size * count, threads)
        found = np.empty((len(addresses), count), _WORDS[size])
        for index, chosen in self._by_buffer(addresses, size * count):
            offsets = (addresses[chosen] - np.uint64(self._origins[index])).astype(np.int64)
            elements = self._bytes[index][: len(self._bytes[index]) // size * size].view(_WORDS[size])
            found[chosen] = elements[offsets[:, None] // size + np.arange(count)]
            self._note_read(index, offsets, size * count, threads[chosen])
        return found

    def store(self, addresses: Array, values: Array, threads: Array) -> None:
        """``values`` [N, count], of the element's size; the rest as :meth:`load`."""
        size, count = values.dtype.itemsize, values.shape[1]
        self._count("store", addresses, size * count, threads)
        for index, chosen in self._by_buffer(addresses, size * count):
            offsets = (addresses[chosen] - np.uint64(self._origins[index])).astype(np.int64)
            self._note_write(index, offsets, size * count, threads[chosen])
            elements = self._bytes[index][: len(self._bytes[index]) // size * size].view(_WORDS[size])
            elements[offsets[:, None] // size + np.arange(count)] = values[chosen]

    def _by_buffer(self, addresses: Array, nbytes: int) -> list[tuple[int, Any]]:
        """(buffer, which of the addresses lie in it)

        Raises:
            PtxError: an address lies in none, or is not a multiple of the access.
        """
        if not len(addresses):
            return []
        if (addresses % np.uint64(nbytes)).any():
            wrong = int(addresses[addresses % np.uint64(nbytes) != 0][0])
            raise PtxError(f"address {self._described(wrong)} is not a multiple of {nbytes} bytes")
        lowest, highest = int(addresses.min()), int(addresses.max())
        index = bisect.bisect_right(self._begins, lowest) - 1
        if index >= 0 and highest + nbytes <= self._begins[index] + self._buffers[index].nbytes:
            return [(index, slice(None))]
        owners = np.searchsorted(np.array(self._begins, np.uint64), addresses, side="right") - 1
        ends = np.array([item.address + item.nbytes for item in self._buffers] or [0], np.uint64)
        outside = (owners < 0) | (addresses + np.uint64(nbytes) > ends[owners])
        if outside.any():
            raise PtxError(
                f"{int(outside.sum())} threads leave the launch's memory by {nbytes} bytes at "
                f"{self._described(int(addresses[outside][0]))}"
            )
        return [(int(owner), owners == owner) for owner in np.unique(owners)]

    def _described(self, address: int) -> str:
        index = bisect.bisect_right(self._begins, address) - 1
        if index < 0:
            return f"0x{address:x}"
        return f"`{self._buffers[index].name}` + {address - self._begins[index]} of {self._buffers[index].nbytes} bytes"

    def _books(self, kept: dict[int, Array], index: int) -> Array:
        if index not in kept:
            kept[index] = np.zeros(-(-len(self._bytes[index]) // _WORD), np.int32)
        return kept[index]

    def _note_read(self, index: int, offsets: Array, nbytes: int, threads: Array) -> None:
        words = offsets[:, None] // _WORD + np.arange(nbytes // _WORD)
        reader = np.broadcast_to(threads[:, None], words.shape).astype(np.int32)
        if index in self._writers:
            writers = self._writers[index][words]
            self._refuse((writers != _NOBODY) & (writers != reader), "reads what another wrote", index, words)
        readers = self._books(self._readers, index)
        before = readers[words]
        readers[words] = np.where((before == _NOBODY) | (before == reader), reader, _SEVERAL)
        shared = readers[words] != reader
        readers[words[shared]] = _SEVERAL

    def _note_write(self, index: int, offsets: Array, nbytes: int, threads: Array) -> None:
        words = offsets[:, None] // _WORD + np.arange(nbytes // _WORD)
        writer = np.broadcast_to(threads[:, None], words.shape).astype(np.int32)
        writers = self._books(self._writers, index)
        before = writers[words]
        self._refuse((before != _NOBODY) & (before != writer), "writes what another wrote", index, words)
        if index in self._readers:
            readers = self._readers[index][words]
            self._refuse((readers != _NOBODY) & (readers != writer), "writes what another read", index, words)
        writers[words] = writer
        self._refuse(writers[words] != writer, "writes what another writes", index, words)

    def _refuse(self, wrong: Array, what: str, index: int, words: Array) -> None:
        if wrong.any():
            place = self._described(self._origins[index] + int(words[wrong][0]) * _WORD)
            raise PtxError(f"race: a thread {what} in this launch, at {place}")

    def _count(self, way: str, addresses: Array, nbytes: int, threads: Array) -> None:
        if self._traffic is None:
            return
        self._traffic.global_bytes[way] += nbytes * len(addresses)
        warps = (threads - 1) // WARP
        sectors = np.unique(np.stack([warps.astype(np.uint64), addresses // np.uint64(_SECTOR)]), axis=1)
        self._traffic.global_sectors[way] += sectors.shape[1]


class SharedMemory:
    """Shared memory of some blocks that run side by side: [blocks, bytes].

    Args:
        blocks: how many.
        nbytes: of one block.
        word: bytes that have one entry in the books: no access of the kernel is smaller.
        traffic: counts into it, if given.
    """

    def __init__(self, blocks: int, nbytes: int, word: int = 2, traffic: Traffic | None = None) -> None:
        self._limit = nbytes
        self._nbytes = -(-nbytes // 16) * 16
        self._word = word
        self._bytes = np.full((blocks, self._nbytes), _UNWRITTEN, np.uint8)
        words = (blocks, self._nbytes // word)
        # A barrier's number * 64 + the warp (from 1) that was there after it; 0: nobody ever.
        self._writes, self._reads = (np.zeros(words, np.int32) for _ in range(2))
        self._in_flight, self._unfenced, self._held = (np.zeros(words, np.bool_) for _ in range(3))
        self._being_read = np.zeros(words, np.int16)
        self._copies = 0
        self._now = _AFTER_BARRIER
        self._traffic = traffic

    def select(self, blocks: Array) -> SharedMemory:
        """That of some of the blocks: a mask or numbers."""
        part = copy.copy(self)
        for name in ("_bytes", "_writes", "_reads", "_in_flight", "_unfenced", "_held", "_being_read"):
            setattr(part, name, getattr(self, name)[blocks])
        return part

    def barrier(self) -> None:
        """All threads of a block have come here."""
        self._now += _AFTER_BARRIER

    @property
    def barriers(self) -> int:
        """How many came so far."""
        return self._now // _AFTER_BARRIER

    def fence(self) -> None:
        """``fence.proxy.async``: products see what was written before."""
        self._unfenced[:] = False

    def load(self, blocks: Array, addresses: Array, size: int, count: int, warps: Array) -> Array:
        """
        Args:
            blocks, addresses, warps: int64 [N], of those threads that load; warps from 1.
            size: bytes of one element: 2, 4 or 8.
            count: elements side by side.

        Returns:
            unsigned integers [N, count]
        """
        at = self._flat(blocks, addresses, size * count)
        words = self._words(at, size * count)
        self._note_read(words, self._now + warps.astype(np.int32)[:, None])
        self._count(blocks, addresses, size * count, warps)
        return self._bytes.view(_WORDS[size]).ravel()[at[:, None] // size + np.arange(count)]

    def begin_product(self, blocks: Array, addresses: Array) -> None:
        """A product sets out to read these 16-bit elements: they must be there by now, and stay till :meth:`end_product`."""
        words = self._flat(blocks, addresses, 2) // self._word
        if self._unfenced.ravel()[words].any():
            raise PtxError("a product reads shared memory that was written with no fence.proxy.async since")
        self._note_read(words, np.int32(self._now + _SEVERAL_WARPS))
        self._being_read.reshape(-1)[words] += 1

    def end_product(self, blocks: Array, addresses: Array) -> Array:
        """It has read them: uint16 [N]."""
        at = self._flat(blocks, addresses, 2)
        self._being_read.reshape(-1)[at // self._word] -= 1
        return self._bytes.view(np.uint16).ravel()[at // 2]

    def store(self, blocks: Array, addresses: Array, values: Array, warps: Array) -> None:
        """``values`` [N, count], of the element's size; the rest as :meth:`load`."""
        size, count = values.dtype.itemsize, values.shape[1]
        at = self._flat(blocks, addresses, size * count)
        words = self._words(at, size * count)
        elements, places = self._bytes.view(_WORDS[size]).reshape(-1), at[:, None] // size + np.arange(count)
        self._note_write(words, warps, (elements[places] != values).any(axis=1))
        self._count(blocks, addresses, size * count, warps)
        elements[places] = values
        if (elements[places] != values).any():
            raise PtxError("race: threads write different values to the same shared memory at once")

    def hold(self, blocks: Array, addresses: Array, nbytes: int, *, held: bool) -> None:
        """These bytes are an mbarrier, or no more: nobody else may touch them."""
        words = self._words(self._flat(blocks, addresses, nbytes), nbytes)
        self._held.reshape(-1)[words] = held

    def begin_copy(self, blocks: Array, addresses: Array, nbytes: int, warps: Array) -> None:
        """An asynchronous copy to these addresses sets out; it counts as a write now, and when it arrives."""
        words = self._words(self._flat(blocks, addresses, nbytes), nbytes)
        if self._copies and self._in_flight.ravel()[words].any():
            raise PtxError("two asynchronous copies to the same shared memory are on their way")
        self._note_write(words, warps, np.ones(len(blocks), np.bool_))
        self._in_flight.reshape(-1)[words] = True
        self._copies += 1

    def end_copy(self, blocks: Array, addresses: Array, values: Array, warps: Array) -> None:
        """It has arrived, with ``values`` [N, count]."""
        nbytes = values.dtype.itemsize * values.shape[1]
        self._in_flight.reshape(-1)[self._words(self._flat(blocks, addresses, nbytes), nbytes)] = False
        self._copies -= 1
        self.store(blocks, addresses, values, warps)

    def _flat(self, blocks: Array, addresses: Array, nbytes: int) -> Array:
        """Byte in the memory of all blocks.

        Raises:
            PtxError: an address is not a block's, or not a multiple of the access.
        """
        if len(addresses) and (int(addresses.min()) < 0 or int(addresses.max()) + nbytes > self._limit):
            raise PtxError(f"{nbytes} bytes at shared address {int(addresses.max())} of {self._limit}")
        if (addresses % nbytes).any():
            raise PtxError(f"shared address {int(addresses[addresses % nbytes != 0][0])} is not a multiple of {nbytes}")
        return blocks * self._nbytes + addresses

    def _words(self, at: Array, nbytes: int) -> Array:
        return at[:, None] // self._word + np.arange(nbytes // self._word)

    def _note_read(self, words: Array, me: Any) -> None:
        """``me``: barrier * 64 + warp, broadcasts to ``words``."""
        self._refuse_busy(words, "read")
        writes = self._writes.ravel()[words]
        if (writes == _NOBODY).any():
            raise PtxError(f"shared memory is read before it was written, at {self._place(words, writes == _NOBODY)}")
        self._refuse((writes >= self._now) & (writes != me), "reads what another wrote", words)
        reads = self._reads.reshape(-1)
        before = reads[words]
        noted = np.where((before < self._now) | (before == me), me, self._now + _SEVERAL_WARPS)
        reads[words] = noted
        lost = reads[words] != noted  # another warp reads it in this very instruction
        reads[words[lost]] = self._now + _SEVERAL_WARPS

    def _note_write(self, words: Array, warps: Array, changes: Array) -> None:
        self._refuse_busy(words, "written")
        if self._being_read.ravel()[words].any():
            raise PtxError("shared memory is written while a product that reads it is on its way")
        writes, reads = self._writes.reshape(-1), self._reads.reshape(-1)
        me = self._now + warps.astype(np.int32)[:, None]
        for noted, what in ((writes[words], "wrote"), (reads[words], "read")):
            self._refuse(
                (noted >= self._now) & (noted != me) & changes[:, None], f"writes over what another {what}", words
            )
        writes[words] = me
        self._unfenced.reshape(-1)[words] = True

    def _refuse_busy(self, words: Array, what: str) -> None:
        if self._copies and self._in_flight.ravel()[words].any():
            raise PtxError(f"shared memory is {what} while an asynchronous copy into it is on its way")
        if self._held.ravel()[words].any():
            raise PtxError(f"shared memory is {what} where an mbarrier is")

    def _place(self, words: Array, wrong: Array) -> int:
        return int(words[wrong][0]) * self._word % self._nbytes

    def _refuse(self, wrong: Array, what: str, words: Array) -> None:
        if wrong.any():
            raise PtxError(f"race: without a barrier, a warp {what} in shared memory, at {self._place(words, wrong)}")

    def _count(self, blocks: Array, addresses: Array, nbytes: int, warps: Array) -> None:
        """Passes through the banks: a warp's access goes 128 bytes at a time, and again for each further row of a bank."""
        if self._traffic is None or not len(addresses):
            return
        at_once = _BANKS * _BANK_BYTES // max(nbytes, _BANK_BYTES)  # threads
        warp = blocks * 64 + warps
        begins = np.flatnonzero(np.r_[True, warp[1:] != warp[:-1]])
        within = np.arange(len(warp)) - np.repeat(begins, np.diff(np.r_[begins, len(warp)]))
        group = warp * WARP + within // at_once
        rows = addresses[:, None] // _BANK_BYTES + np.arange(max(1, nbytes // _BANK_BYTES))
        touched = np.unique(np.stack([np.repeat(group, rows.shape[1]), rows.ravel()]), axis=1)
        banks, rows_of_bank = np.unique(touched[0] * _BANKS + touched[1] % _BANKS, return_counts=True)
        groups, index = np.unique(banks // _BANKS, return_inverse=True)
        passes = np.zeros(len(groups), np.int64)
        np.maximum.at(passes, index, rows_of_bank)
        self._traffic.shared_passes += int(passes.sum())
        self._traffic.shared_passes_least += len(groups)
