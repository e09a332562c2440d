"""Tensor memory (compute capability 10.0), the products that work on it, and the mbarriers that tell when they are done.

The oracles are loops over rows, lanes and elements, made from the words of the PTX ISA: chapter ``tcgen05`` (addressing, data
path layouts D and F, shapes of ``tcgen05.ld`` / ``st``, matrix and instruction descriptors) and ``mbarrier``. What a GPU may
forgive, or not, is refused: each of those rules is broken here once, in a kernel that keeps all of them otherwise.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_export_plugins", reason="the plugins are not installed: pip install ./plugins")
from llama_export_plugins.ptx import PtxError, Traffic
from ptx_support import Array, Layout, each, encoded, k_major, mn_major, run, small

ROWS, WARP = 128, 32
MBARRIERS = (16, 24)
"""In shared memory; the address of tensor memory is at 0."""
OPERANDS = 1024
"""Where the operands begin in shared memory."""


# ---- pieces of a kernel -----------------------------------------------------------------------------------------


def listed(count: int, first: int = 100) -> str:
    return "{" + ", ".join(f"%r{first + index}" for index in range(count)) + "}"


def opened(columns: int) -> str:
    """As Triton opens it. From here on: %r9 shared memory, %r10 tensor memory, %r11 the warp, %r12 its rows; %p10: warp 0,
    %p12: another."""
    return f"""    mov.b32 %r9, global_smem;
    shr.u32 %r11, %r0, 5;
    shfl.sync.idx.b32 %r11, %r11, 0, 31, -1;
    setp.eq.b32 %p10, %r11, 0;
    setp.ne.b32 %p12, %r11, 0;
    @%p10 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r9], {columns};
    bar.sync 0;
    ld.shared.b32 %r10, [global_smem];
    bar.sync 0;
    @%p10 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    and.b32 %r12, %r11, 3;
    shl.b32 %r12, %r12, 21;
    add.s32 %r12, %r12, %r10;
"""


def closed(columns: int) -> str:
    return f"    bar.sync 0;\n    @%p10 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, {columns};\n"


def filled(nbytes: int, threads: int) -> str:
    """Operands into shared memory; %r1 and %rd20: the first 16 bytes of a thread, there and where they came from."""
    lines = ["    shl.b32 %r1, %r0, 4;", f"    add.s32 %r1, %r1, {OPERANDS};", "    mad.wide.u32 %rd20, %r0, 16, %rd0;"]
    for offset in range(0, nbytes, 16 * threads):
        lines.append(f"    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd20+{offset}];")
        lines.append(f"    st.shared.v4.b32 [%r1+{offset}], {{%r2, %r3, %r4, %r5}};")
    return "\n".join(lines) + "\n"


def stored(columns: int) -> str:
    """All columns, 32 at a time: every warp its rows."""
    lines = []
    for begin in range(0, columns, 32):
        for column in range(begin, begin + 32, 4):
            lines.append(f"    ld.global.v4.b32 {listed(4, 100 + column - begin)}, [%rd21+{4 * column}];")
        lines.append(f"    tcgen05.st.sync.aligned.32x32b.x32.b32 [%r12 + {begin}], {listed(32)};")
    return "\n".join(lines) + "\n"


def loaded(columns: int, first: int = 0) -> str:
    """Some columns into %r100 and on, 128 at most."""
    lines = [
        f"    tcgen05.ld.sync.aligned.32x32b.x32.b32 {listed(32, 100 + begin)}, [%r12 + {first + begin}];"
        for begin in range(0, columns, 32)
    ]
    return "\n".join(lines) + "\n"


def kept(columns: int, first: int = 0) -> str:
    """The same to where the host looks for it."""
    lines = [
        f"    st.global.v4.b32 [%rd22+{4 * (first + begin)}], {listed(4, 100 + begin)};"
        for begin in range(0, columns, 4)
    ]
    return "\n".join(lines) + "\n"


def read_back(columns: int) -> str:
    return "".join(
        loaded(min(128, columns - begin), begin) + LOADED + kept(min(128, columns - begin), begin)
        for begin in range(0, columns, 128)
    )


STORED = "    tcgen05.wait::st.sync.aligned;\n"
LOADED = "    tcgen05.wait::ld.sync.aligned;\n"
FENCE = "    fence.proxy.async.shared::cta;\n"
BARRIER = "    bar.sync 0;\n"


def began(*mbarriers: int) -> str:
    """By one thread of the block, as Triton does it; %p11 is true for it."""
    lines = ["    elect.sync %r13|%p11, -1;", "    and.pred %p11, %p10, %p11;"]
    for where in mbarriers:
        lines += [f"    add.s32 %r14, %r9, {where};", "    @%p11 mbarrier.init.shared::cta.b64 [%r14], 1;"]
    return "\n".join(lines) + "\n"


def ended(*mbarriers: int) -> str:
    lines = ["    bar.sync 0;", "    elect.sync %r13|%p11, -1;", "    and.pred %p11, %p10, %p11;"]
    for where in mbarriers:
        lines += [f"    add.s32 %r14, %r9, {where};", "    @%p11 mbarrier.inval.shared::cta.b64 [%r14];"]
    return "\n".join(lines) + "\n"


def waited(where: int = MBARRIERS[0], phase: int = 0) -> str:
    return f"""    add.s32 %r14, %r9, {where};
    mov.b32 %r15, {phase};
    {{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r14], %r15;
    @!complete bra.uni waitLoop;
    }}
"""


def place(row: int, column: int) -> int:
    """An address: the row in the upper half."""
    return row << 16 | column


def instruction(
    m: int, n: int, a: str = "f16", b: str = "f16", *, a_transposed: bool = False, b_transposed: bool = False
) -> int:
    """An instruction descriptor of ``kind::f16`` with D in float32."""
    kinds = {"f16": 0, "bf16": 1}
    transposed = int(a_transposed) << 15 | int(b_transposed) << 16
    return 1 << 4 | kinds[a] << 7 | kinds[b] << 10 | transposed | n >> 3 << 17 | m >> 4 << 24


def matrix(layout: Layout, begin: int) -> int:
    """A matrix descriptor: that of ``wgmma`` with 0b001 in bits 46 to 48."""
    return layout.descriptor(begin) | 1 << 46


@dataclass(frozen=True, slots=True)
class Product:
    """One ``tcgen05.mma``."""

    d: int
    """Address in tensor memory, from the beginning."""
    a: int | str
    """Matrix descriptor, or the text of an address made from %r21, the beginning of tensor memory."""
    b: int
    instruction: int
    adds: bool = True

    def __str__(self) -> str:
        left = self.a if isinstance(self.a, str) else "%rd30"
        first = "" if isinstance(self.a, str) else f"    mov.b64 %rd30, {self.a};\n"
        return f"""{first}    mov.b64 %rd31, {self.b};
    mov.b32 %r22, {self.instruction};
    add.s32 %r20, %r10, {self.d};
    mov.b32 %r21, %r10;
    mov.pred %p14, {-int(self.adds)};
    @%p13 tcgen05.mma.cta_group::1.kind::f16 [ %r20 + 0 ], {left}, %rd31, %r22, %p14;
"""


def commit(where: int) -> str:
    return f"""    add.s32 %r14, %r9, {where};
    @%p13 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r14];
"""


def issued(*parts: Product | int, label: str = "issued") -> str:
    """Products and commits (the address of the mbarrier), by one thread of warp 0."""
    texts = [commit(item) if isinstance(item, int) else str(item) for item in parts]
    return f"    @%p12 bra $L_{label};\n    elect.sync %r13|%p13, -1;\n{''.join(texts)}$L_{label}:\n"


def launched(
    body: str,
    image: bytes | Sequence[bytes] = b"",
    cells: Array | None = None,
    *,
    columns: int = 128,
    threads: int = 128,
    traffic: Traffic | None = None,
) -> Array:
    """What ``body`` stores at %rd22, one row for each of 128 threads.

    Args:
        body: finds ``image`` at %rd0, a thread's row of ``cells`` at %rd21.
        image: operands in shared memory, from :data:`OPERANDS`; one for each block where there are several.
        cells: uint32 [128, columns], or [blocks, 128, columns].

    Returns:
        uint32, shape of ``cells``
    """
    images = [image] if isinstance(image, bytes) else image
    room = max(-(-max(map(len, images)) // (16 * threads)) * 16 * threads, 16 * threads)
    several = cells is not None and cells.ndim == 3
    before = np.zeros((len(images), ROWS, columns), np.uint32)
    before[:] = 0 if cells is None else cells
    head = f"""    mov.u32 %r6, %ctaid.x;
    and.b32 %r7, %r0, 127;
    mad.lo.s32 %r8, %r6, 128, %r7;
    mad.wide.u32 %rd21, %r8, {4 * columns}, %rd1;
    mad.wide.u32 %rd22, %r8, {4 * columns}, %rd2;
    mad.wide.u32 %rd0, %r6, {room}, %rd0;
"""
    packed = np.frombuffer(b"".join(item.ljust(room, b"\0") for item in images), np.uint8)
    *_, found = run(
        head + body, packed, before, np.zeros_like(before), threads=threads, grid=(len(images), 1, 1),
        shared_bytes=OPERANDS + room, traffic=traffic,
    )  # fmt: skip
    return found if several else found[0]


def drawn(seed: int, *shape: int) -> Array:
    """Any bits."""
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint32)


def at(*instructions: str) -> str:
    """A message about one of these, which is understood but not allowed."""
    names = "|".join(map(re.escape, instructions))
    return rf"^kernel: (?!.*not understood)[^`]*`[^`]*(?:{names})"


# ---- elect ------------------------------------------------------------------------------------------------------


def test_an_election_whose_winners_name_is_not_wanted() -> None:
    (chosen,) = each("    elect.sync _|$d0, -1;", np.zeros(96, np.uint32), out=[np.bool_])
    assert chosen.reshape(3, WARP).sum(axis=1).tolist() == [1, 1, 1]


def test_an_election_that_is_repeated_chooses_the_same_thread() -> None:
    """A commit stands for the products of the thread that makes it."""
    first, second = each(
        "    elect.sync %r1|$d0, -1;\n    elect.sync %r1|$d1, -1;", np.zeros(64, np.uint32), out=[np.bool_] * 2
    )
    assert (first == second).all()


# ---- allocation, loads and stores -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [32, 64, 128, 256, 512])
def test_tensor_memory_keeps_what_is_stored(columns: int) -> None:
    cells = drawn(1, ROWS, columns)
    body = opened(columns) + stored(columns) + STORED + read_back(columns) + closed(columns)
    np.testing.assert_array_equal(launched(body, cells=cells, columns=columns), cells)


def test_blocks_have_tensor_memory_of_their_own() -> None:
    cells = drawn(2, 3, ROWS, 32)
    body = opened(32) + stored(32) + STORED + BARRIER + read_back(32) + closed(32)
    np.testing.assert_array_equal(launched(body, [b""] * 3, cells, columns=32), cells)


@pytest.mark.parametrize("columns", [0, 16, 48, 96, 1024])
def test_a_number_of_columns_that_is_no_power_of_two_from_32_to_512_is_refused(columns: int) -> None:
    with pytest.raises(PtxError, match=r"tcgen05\.alloc"):
        launched(opened(columns) + closed(columns))


@dataclass(frozen=True, slots=True)
class Move:
    """``tcgen05.ld`` or ``st``: where a lane's registers lie."""

    shape: str
    count: int
    column: int
    row: int = 0
    further: int = 0
    """Of ``16x32bx2``: columns from the first half of the lanes to the second."""

    def cell(self, thread: int, register: int) -> tuple[int, int]:
        warp, lane = thread // WARP % 4, thread % WARP
        if self.shape == "32x32b":
            return WARP * warp + lane, self.column + register
        return WARP * warp + self.row + lane % 16, self.column + (self.further if lane >= 16 else 0) + register

    def text(self, way: str) -> str:
        """With the registers from %r100 on."""
        name = f"tcgen05.{way}.sync.aligned.{self.shape}.x{self.count}.b32"
        operands = [f"[%r16 + {self.column % 8}]", *([str(self.further)] if self.shape == "16x32bx2" else [])]
        operands = [listed(self.count), *operands] if way == "ld" else [*operands, listed(self.count)]
        base = place(self.row, self.column - self.column % 8)
        return f"    add.s32 %r16, %r12, {base};\n    {name} {', '.join(operands)};\n"


MOVES = [
    *(Move("32x32b", count, column) for count, column in [(1, 5), (2, 0), (4, 17), (8, 120), (16, 3), (32, 96), (64, 40)]),
    Move("32x32b", 128, 0),
    *(
        Move("16x32bx2", count, column, row, further)
        for count, column, row, further in [
            (1, 3, 0, 1), (1, 3, 16, 77), (2, 8, 16, 2), (4, 9, 0, 11), (8, 0, 16, 8), (16, 64, 0, 16), (16, 7, 16, 50), (32, 32, 0, 32),
            (32, 1, 16, 64), (64, 0, 16, 64),
        ]
    ),
]  # fmt: skip


def identify(move: Move) -> str:
    return f"{move.shape}.x{move.count}-{move.row}-{move.column}-{move.further}"


@pytest.mark.parametrize("move", MOVES, ids=identify)
def test_a_store_puts_every_register_into_its_cell_and_touches_no_other(move: Move) -> None:
    cells, columns = drawn(3, ROWS, 128), 128
    lines = "".join(f"    mad.lo.s32 %r{100 + register}, %r0, 256, {register + 7};\n" for register in range(move.count))
    body = opened(columns) + stored(columns) + STORED + lines + move.text("st") + STORED + read_back(columns)
    found = launched(body + closed(columns), cells=cells)
    for thread in range(ROWS):
        for register in range(move.count):
            cells[move.cell(thread, register)] = 256 * thread + register + 7
    np.testing.assert_array_equal(found, cells)


@pytest.mark.parametrize("move", [*MOVES, Move("16x32bx2", 8, 16, 16, 3), Move("16x32bx2", 4, 16, 0, 0)], ids=identify)
def test_a_load_gets_every_register_from_its_cell(move: Move) -> None:
    """The halves of the lanes may have columns in common."""
    cells, columns = drawn(4, ROWS, 128), 128
    body = opened(columns) + stored(columns) + STORED + move.text("ld") + LOADED
    body += "".join(
        f"    st.global.b32 [%rd22+{4 * register}], %r{100 + register};\n" for register in range(move.count)
    )
    found = launched(body + closed(columns), cells=cells)
    for thread in range(ROWS):
        want = [cells[move.cell(thread, register)] for register in range(move.count)]
        assert found[thread, : move.count].tolist() == want, thread


def test_a_second_warpgroup_has_the_same_rows() -> None:
    """Warp 4 + w those of warp w: it finds after a barrier what that one stored, and the other way."""
    cells = drawn(5, ROWS, 64)
    half = """    and.b32 %r17, %r11, 4;
    shl.b32 %r17, %r17, 3;
    add.s32 %r16, %r12, %r17;
    mad.wide.u32 %rd23, %r17, 4, %rd21;
    ld.global.v4.b32 {%r100, %r101, %r102, %r103}, [%rd23];
    tcgen05.st.sync.aligned.32x32b.x4.b32 [%r16 + 0], {%r100, %r101, %r102, %r103};
    tcgen05.wait::st.sync.aligned;
    bar.sync 0;
    xor.b32 %r18, %r17, 32;
    add.s32 %r16, %r12, %r18;
    tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r100, %r101, %r102, %r103}, [%r16 + 0];
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd24, %r18, 4, %rd22;
    st.global.v4.b32 [%rd24], {%r100, %r101, %r102, %r103};
"""
    found = launched(opened(64) + half + closed(64), cells=cells, columns=64, threads=256)
    for begin in (0, 32):
        np.testing.assert_array_equal(found[:, begin : begin + 4], cells[:, begin : begin + 4])


@pytest.mark.parametrize("way", ["ld", "st"])
@pytest.mark.parametrize(
    ("change", "form"),
    [
        (f"add.s32 %r12, %r12, {32 << 16}", "32x32b"),
        (f"xor.b32 %r12, %r12, {64 << 16}", "32x32b"),
        (f"add.s32 %r12, %r12, {16 << 16}", "32x32b"),
        (f"xor.b32 %r12, %r12, {32 << 16}", "16x32bx2"),
        (f"add.s32 %r12, %r12, {8 << 16}", "16x32bx2"),
        (f"add.s32 %r12, %r12, {24 << 16}", "16x32bx2"),
        ("add.s32 %r12, %r12, 29", "32x32b"),
        ("add.s32 %r12, %r12, 29", "16x32bx2"),
        ("sub.s32 %r12, %r12, 1", "32x32b"),
        ("add.s32 %r12, %r12, %r0", "32x32b"),
    ],
    ids=[
        "rows of the next warp", "rows of another warp", "half the rows of the next warp", "rows of a neighbour, 16x32bx2",
        "rows from 8", "rows from 24", "columns not allocated", "columns not allocated, 16x32bx2", "no column", "not one address",
    ],
)  # fmt: skip
def test_a_warp_touches_nothing_but_its_own_rows_of_allocated_columns(way: str, change: str, form: str) -> None:
    """Warp w of a warpgroup has rows 32 w to 32 w + 31; all of its threads give the same address."""
    move = Move(form, 4, 0, further=4 if form == "16x32bx2" else 0)
    body = opened(32) + stored(32) + STORED + f"    {change};\n" + move.text(way)
    with pytest.raises(PtxError, match=at(f"tcgen05.{way}")):
        launched(body + LOADED + STORED + closed(32), columns=32)


def test_tensor_memory_is_not_to_be_touched_before_it_is_allocated_or_after_it_is_freed() -> None:
    alloc = "    @%p10 tcgen05.alloc"
    early = opened(32).replace(alloc, "    shl.b32 %r12, %r11, 21;\n" + loaded(32) + alloc)
    with pytest.raises(PtxError, match=at("tcgen05.ld")):
        launched(early + LOADED + closed(32), columns=32)
    with pytest.raises(PtxError, match=at("tcgen05.ld")):
        launched(opened(32) + stored(32) + STORED + closed(32) + BARRIER + loaded(32) + LOADED, columns=32)


# ---- products ---------------------------------------------------------------------------------------------------


def lane_of(m: int, row: int, i: int) -> int:
    """Row of tensor memory of row ``i`` of a matrix: layout D (m = 128), layout F (m = 64: 16 rows at the head of each 32)."""
    return i if m == 128 else i // 16 * 32 + i % 16 + row


def put_values(cells: Array, address: int, values: Array) -> None:
    """float32 [m, n]"""
    row, column = address >> 16, address & 0xFFFF
    for (i, j), value in np.ndenumerate(values):
        cells[lane_of(len(values), row, i), column + j] = struct.unpack("<I", struct.pack("<f", float(value)))[0]


def put_operand(cells: Array, address: int, bits: Array) -> None:
    """uint16 [m, k]: two to a column, the lower k in the lower half."""
    row, column = address >> 16, address & 0xFFFF
    for i in range(len(bits)):
        for k in range(0, bits.shape[1], 2):
            cells[lane_of(len(bits), row, i), column + k // 2] = int(bits[i, k]) | int(bits[i, k + 1]) << 16


def room_of(layout: Layout, rows: int, k: int) -> int:
    """Bytes, as many as a swizzle's pattern takes or a multiple."""
    end = max(layout.offset(row, column) for row in range(rows) for column in range(k)) + 2
    return -(-end // 1024) * 1024


def exact(a: Array, b: Array) -> Array:
    """a [m, k] times b [n, k], in integers: every order of the sum gives the same."""
    return np.asarray(a.astype(np.int64) @ b.T.astype(np.int64))


PLAIN = k_major(128)


@dataclass(frozen=True, slots=True)
class Case:
    """One product, whole: A [m, 16], B [n, 16]."""

    m: int = 128
    n: int = 32
    a: str = "f16"
    b: str = "f16"
    a_layout: Layout | None = PLAIN
    """None: in tensor memory."""
    b_layout: Layout = PLAIN
    d: int = 0
    """Address."""
    a_at: int = 96
    a_step: int = 0
    """Which 16 of its k are multiplied, where there are more."""
    b_step: int = 0
    adds: bool = True
    columns: int = 128

    def __str__(self) -> str:
        def shown(layout: Layout | None) -> str:
            return "tensor" if layout is None else f"{'k' if layout.k_major else 'mn'}{layout.swizzle}"

        steps = f"-steps {self.a_step} {self.b_step}" if self.a_step or self.b_step else ""
        return (
            f"{self.m}x{self.n}-{self.a}-{self.b}-{shown(self.a_layout)}-{shown(self.b_layout)}-row {self.d >> 16}-"
            f"column {self.d & 0xFFFF}-{'adds' if self.adds else 'overwrites'}{steps}"
        )

    def check(self, blocks: int = 1) -> None:
        images, before, after = zip(*(self.block(seed) for seed in range(blocks)), strict=True)
        a_begin = OPERANDS + 32 * self.a_step
        b_begin = OPERANDS + self.a_room + 32 * self.b_step
        a = f"[ %r21 + {self.a_at + 8 * self.a_step} ]" if self.a_layout is None else matrix(self.a_layout, a_begin)
        if self.a_layout is None and self.d >> 16:
            a = f"[ %r20 + {self.a_at + 8 * self.a_step - (self.d & 0xFFFF)} ]"
        described = instruction(
            self.m, self.n, self.a, self.b, b_transposed=not self.b_layout.k_major,
            a_transposed=self.a_layout is not None and not self.a_layout.k_major,
        )  # fmt: skip
        product = Product(self.d, a, matrix(self.b_layout, b_begin), described, self.adds)
        body = opened(self.columns) + began(MBARRIERS[0]) + filled(len(images[0]), 128) + stored(self.columns) + STORED
        body += FENCE + BARRIER + issued(product, MBARRIERS[0]) + waited() + read_back(self.columns)
        body += ended(MBARRIERS[0]) + closed(self.columns)
        traffic = Traffic()
        found = launched(body, images, np.stack(before), columns=self.columns, traffic=traffic)
        np.testing.assert_array_equal(found, np.stack(after))
        assert traffic.multiplications == blocks * self.m * self.n * 16

    @property
    def k(self) -> int:
        return 16 * (1 + max(self.a_step, self.b_step))

    @property
    def a_room(self) -> int:
        return 0 if self.a_layout is None else room_of(self.a_layout, self.m, self.k)

    def block(self, seed: int) -> tuple[bytes, Array, Array]:
        """Shared memory, tensor memory before and after."""
        a, b, d = (
            small(10 * seed + 1, self.m, self.k),
            small(10 * seed + 2, self.n, self.k),
            small(seed, self.m, self.n),
        )
        image = bytearray(np.random.default_rng(seed).bytes(self.a_room + room_of(self.b_layout, self.n, self.k)))
        self.b_layout.write(image, self.a_room, encoded(b, self.b))
        before = drawn(seed, ROWS, self.columns)
        if self.adds:
            put_values(before, self.d, d)
        if self.a_layout is None:
            put_operand(before, self.d & ~0xFFFF | self.a_at, encoded(a, self.a))
        else:
            self.a_layout.write(image, 0, encoded(a, self.a))
        after = before.copy()
        a, b = a[:, 16 * self.a_step :][:, :16], b[:, 16 * self.b_step :][:, :16]
        put_values(after, self.d, exact(a, b) + (d if self.adds else 0))
        return bytes(image), before, after


BASE, TENSOR = Case(), Case(a_layout=None)
PRODUCTS = [
    BASE,
    replace(BASE, adds=False),
    # shapes and places of D
    *(replace(BASE, n=n) for n in (16, 64)),
    replace(BASE, n=128, d=64, columns=256, b_layout=k_major(32)),
    replace(BASE, n=256, columns=256, b_layout=k_major(0)),
    replace(BASE, d=56),
    replace(BASE, d=56, adds=False),
    *(replace(BASE, m=64, n=n, d=place(row, 24)) for n, row in ((8, 0), (8, 16), (24, 16), (64, 0))),
    replace(BASE, m=64, n=40, d=place(16, 0), adds=False),
    replace(BASE, m=64, n=128, d=place(16, 64), columns=256),
    # types
    *(replace(case, a=a, b=b) for case in (BASE, TENSOR) for a, b in (("bf16", "bf16"), ("f16", "bf16"), ("bf16", "f16"))),
    # layouts in shared memory; each pair has other distances
    *(replace(BASE, a_layout=k_major(a), b_layout=k_major(b)) for a, b in ((64, 32), (32, 64), (0, 128), (128, 0))),
    *(replace(BASE, m=64, a_layout=k_major(swizzle)) for swizzle in (0, 32, 64)),
    *(replace(BASE, a_layout=mn_major(swizzle), n=16) for swizzle in (128, 64, 32, 0)),
    *(replace(BASE, a_layout=mn_major(swizzle), m=64, n=8, d=place(16, 8)) for swizzle in (128, 64, 32, 0)),
    *(replace(BASE, b_layout=mn_major(swizzle), n=n) for swizzle, n in ((128, 128), (64, 64), (32, 32), (32, 64), (0, 32), (128, 64))),
    replace(BASE, a_layout=mn_major(128), b_layout=mn_major(64), a="bf16", b="bf16", n=64),
    replace(BASE, a_layout=mn_major(0), b_layout=mn_major(0), n=48),
    # in the midst of swizzled lines
    *(replace(BASE, a_step=a, b_step=b) for a, b in ((1, 2), (3, 1))),
    replace(BASE, a_layout=k_major(64), b_layout=k_major(64), a_step=1, b_step=1),
    # A in tensor memory
    TENSOR,
    replace(TENSOR, adds=False, d=32, a_at=8),
    replace(TENSOR, a_at=1, d=64),
    replace(TENSOR, a_step=2, b_step=2),
    replace(TENSOR, b_layout=mn_major(128), n=64, d=8),
    replace(TENSOR, m=64, n=64, d=place(0, 16)),
    replace(TENSOR, m=64, n=64, d=place(16, 16)),
    replace(TENSOR, m=64, n=16, d=place(16, 40), a_at=3, b_layout=mn_major(32), adds=False, a="bf16", b="bf16"),
]  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_a_product(case: Case) -> None:
    """Every cell of tensor memory is looked at: D has the sum, nothing else has changed."""
    case.check()


@pytest.mark.parametrize("case", [BASE, replace(TENSOR, m=64, d=place(16, 16))], ids=str)
def test_blocks_multiply_what_is_theirs(case: Case) -> None:
    case.check(blocks=3)


def test_a_product_of_numbers_that_are_no_integers_is_near_the_exact_sum() -> None:
    """Against float64: within the rounding of 17 float32 additions."""
    draw = np.random.default_rng(8)
    a, b = (draw.normal(size=(rows, 16)).astype(np.float16) for rows in (128, 16))
    layout, image = k_major(0), bytearray(1 << 13)
    a_room = room_of(layout, 128, 16)
    layout.write(image, 0, a.view(np.uint16))
    layout.write(image, a_room, b.view(np.uint16))
    product = Product(0, matrix(layout, OPERANDS), matrix(layout, OPERANDS + a_room), instruction(128, 16), adds=False)
    body = opened(32) + began(16) + filled(len(image), 128) + FENCE + BARRIER + issued(product, 16) + waited(16)
    body += f"    tcgen05.ld.sync.aligned.32x32b.x16.b32 {listed(16)}, [%r12 + 0];\n{LOADED}{kept(16)}"
    body += ended(16) + closed(32)
    found = launched(body, bytes(image), columns=32)[:, :16].copy().view(np.float32)
    terms = a.astype(np.float64)[:, None, :] * b.astype(np.float64)[None, :, :]
    assert (np.abs(found - terms.sum(axis=2)) <= 17 * 2.0**-24 * np.abs(terms).sum(axis=2)).all()


# ---- products, commits and mbarriers ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ones:
    """Products whose result is easy to tell: A is all ``a``, B all ``b``, so D gets 16 a b more. D has 16 columns."""

    a: int = 1
    b: int = 1
    m: int = 128

    @property
    def image(self) -> bytes:
        image = bytearray(self.a_room + room_of(k_major(0), 16, 16))
        k_major(0).write(image, 0, encoded(np.full((self.m, 16), self.a), "f16"))
        k_major(0).write(image, self.a_room, encoded(np.full((16, 16), self.b), "f16"))
        return bytes(image)

    @property
    def a_room(self) -> int:
        return room_of(k_major(0), self.m, 16)

    def product(self, d: int, *, adds: bool = True) -> Product:
        a, b = matrix(k_major(0), OPERANDS), matrix(k_major(0), OPERANDS + self.a_room)
        return Product(d, a, b, instruction(self.m, 16), adds)

    def head(self, *mbarriers: int, threads: int = 128) -> str:
        """All of tensor memory is 0."""
        body = opened(64) + began(*mbarriers) + filled(len(self.image), threads)
        return body + stored(64) + STORED + FENCE + BARRIER

    def found(self, body: str, blocks: int = 1) -> Array:
        """float32 [blocks, 128, 64]"""
        found = launched(body, [self.image] * blocks, np.zeros((blocks, ROWS, 64), np.uint32), columns=64)
        return found.view(np.float32)


ONES = Ones(2, 3)
FIRST, SECOND = MBARRIERS


def kept_column(column: int, at_column: int) -> str:
    """One column of tensor memory to where the host looks for it."""
    return f"""    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r40}}, [%r12 + {column}];
    tcgen05.wait::ld.sync.aligned;
    st.global.b32 [%rd22+{4 * at_column}], %r40;
"""


def test_two_products_in_one_commit_run_in_their_order() -> None:
    """The second adds to what the first leaves; one more has a D of its own."""
    body = ONES.head(FIRST)
    body += issued(ONES.product(0, adds=False), ONES.product(0), ONES.product(32), FIRST) + waited(FIRST)
    found = ONES.found(body + read_back(64) + ended(FIRST) + closed(64))
    want = [192.0] * 16 + [0.0] * 16 + [96.0] * 16 + [0.0] * 16
    assert (found == want).all()


def test_two_products_in_one_commit_go_on_along_k() -> None:
    """As Triton multiplies more than 16 k: start addresses further on, A in tensor memory 8 columns further."""
    layout, a, b = k_major(128), small(21, 128, 32), small(22, 32, 32)
    for in_tensor_memory in (False, True):
        cells, image = drawn(23, ROWS, 128), bytearray(room_of(layout, 128, 32) + room_of(layout, 32, 32))
        begin = room_of(layout, 128, 32)
        layout.write(image, 0, encoded(a, "bf16"))
        layout.write(image, begin, encoded(b, "bf16"))
        put_operand(cells, 64, encoded(a, "bf16"))
        described, products = instruction(128, 32, "bf16", "bf16"), []
        for step in range(2):
            left = f"[ %r21 + {64 + 8 * step} ]" if in_tensor_memory else matrix(layout, OPERANDS) + 2 * step
            right = matrix(layout, OPERANDS + begin) + 2 * step
            products.append(Product(16, left, right, described, adds=step > 0))
        body = opened(128) + began(FIRST) + filled(len(image), 128) + stored(128) + STORED + FENCE + BARRIER
        body += issued(*products, FIRST) + waited(FIRST) + read_back(128) + ended(FIRST) + closed(128)
        found = launched(body, bytes(image), cells)
        put_values(cells, 16, exact(a, b))
        np.testing.assert_array_equal(found, cells)


def test_two_matrices_of_64_rows_share_columns() -> None:
    """One in the upper, one in the lower 16 rows of each 32: products on both, at once."""
    ones = Ones(2, 3, m=64)
    body = ones.head(FIRST, SECOND)
    body += issued(ones.product(0), FIRST, ones.product(place(16, 0)), ones.product(place(16, 0)), SECOND)
    upper = (
        "    tcgen05.ld.sync.aligned.16x32bx2.x8.b32 {%r60, %r61, %r62, %r63, %r64, %r65, %r66, %r67}, [%r12 + 0], 8;\n"
    )
    body += waited(FIRST) + upper + LOADED + "    st.global.b32 [%rd22+128], %r67;\n"
    body += waited(SECOND) + loaded(32) + LOADED + kept(32) + ended(FIRST, SECOND) + closed(64)
    found = ones.found(body)[0]
    for row in range(ROWS):
        want = 96.0 if row % 32 < 16 else 192.0
        assert found[row].tolist() == [want] * 16 + [0.0] * 16 + [96.0] + [0.0] * 31, row


def test_two_commits_arrive_on_two_mbarriers() -> None:
    """While the second product is on its way, what the first left may be read."""
    body = ONES.head(FIRST, SECOND)
    body += issued(ONES.product(0), FIRST, ONES.product(16), ONES.product(16), SECOND)
    body += waited(FIRST) + kept_column(15, 0) + waited(SECOND) + kept_column(15, 1) + kept_column(16, 2)
    found = ONES.found(body + ended(FIRST, SECOND) + closed(64))[0]
    assert (found[:, :3] == [96.0, 96.0, 192.0]).all()


def test_a_commit_stands_for_all_products_before_it() -> None:
    """Those of an earlier commit too: who waits for the second may read what the first product left."""
    body = ONES.head(FIRST, SECOND) + issued(ONES.product(0), FIRST, ONES.product(16), SECOND)
    body += waited(SECOND) + kept_column(0, 0) + kept_column(16, 1) + waited(FIRST)
    found = ONES.found(body + ended(FIRST, SECOND) + closed(64))[0]
    assert (found[:, :2] == 96.0).all()


def test_the_phases_of_an_mbarrier_are_0_1_0() -> None:
    body = ONES.head(FIRST)
    for trip, phase in enumerate((0, 1, 0)):
        body += issued(ONES.product(0), FIRST, label=f"trip{trip}") + waited(FIRST, phase)
        body += kept_column(0, trip) + BARRIER
    found = ONES.found(body + ended(FIRST) + closed(64))[0]
    assert (found[:, :3] == [96.0, 192.0, 288.0]).all()


def test_a_phase_that_is_over_is_not_waited_for() -> None:
    """Parity 1 names the phase before the first; and whoever has waited may wait again."""
    body = ONES.head(FIRST) + waited(FIRST, 1) + issued(ONES.product(0), FIRST) + waited(FIRST, 0) + waited(FIRST, 0)
    found = ONES.found(body + kept_column(0, 0) + ended(FIRST) + closed(64))[0]
    assert (found[:, 0] == 96.0).all()


def test_an_mbarrier_begins_anew() -> None:
    """After ``inval`` and ``init`` at the same address: with phase 0."""
    body = ONES.head(FIRST) + issued(ONES.product(0), FIRST) + waited(FIRST) + ended(FIRST) + began(FIRST) + BARRIER
    body += issued(ONES.product(0), FIRST, label="again") + waited(FIRST) + kept_column(0, 0)
    found = ONES.found(body + ended(FIRST) + closed(64))[0]
    assert (found[:, 0] == 192.0).all()


@pytest.mark.parametrize("committed", ["before", "after"])
def test_a_product_on_its_way_follows_its_block_through_a_branch(committed: str) -> None:
    """Blocks with an even number take another way before they wait."""
    body = ONES.head(FIRST) + issued(ONES.product(0), *([FIRST] if committed == "before" else []))
    body += """    mov.b32 %r41, 0;
    and.b32 %r42, %r6, 1;
    setp.ne.b32 %p1, %r42, 0;
    @%p1 bra $L_wait;
    mov.b32 %r41, 1000;
$L_wait:
"""
    body += issued(FIRST, label="committed") if committed == "after" else ""
    body += waited(FIRST) + kept_column(0, 0) + "    st.global.b32 [%rd22+4], %r41;\n"
    found = ONES.found(body + ended(FIRST) + closed(64), blocks=5)
    for block in range(5):
        assert (found[block, :, 0] == 96.0).all()
        assert (found[block, :, 1].copy().view(np.uint32) == (0 if block % 2 else 1000)).all()


def test_blocks_that_have_nothing_to_multiply_skip_product_and_wait() -> None:
    """In the form that Triton gives it; those with an odd number."""
    body = ONES.head(FIRST) + "    and.b32 %r42, %r6, 1;\n    setp.eq.b32 %p2, %r42, 0;\n    not.pred %p3, %p2;\n"
    body += issued(ONES.product(0), FIRST).replace("    @%p12", "    or.pred %p12, %p12, %p3;\n    @%p12")
    wait = (
        waited(FIRST)
        .replace("    {\n", "    {\n    @!%p2 bra.uni skipWait;\n")
        .replace("    }\n", "    skipWait:\n    }\n")
    )
    found = ONES.found(body + wait + kept_column(0, 0) + ended(FIRST) + closed(64), blocks=4)
    for block in range(4):
        assert (found[block, :, 0] == (0.0 if block % 2 else 96.0)).all(), block


def test_blocks_make_as_many_products_as_each_wants() -> None:
    """A loop with other trips in each block; the phase turns with every trip."""
    body = ONES.head(FIRST) + "    mov.b32 %r41, 0;\n    and.b32 %r42, %r6, 3;\n$L_again:\n" + BARRIER
    body += issued(ONES.product(0), FIRST)
    body += waited(FIRST).replace("mov.b32 %r15, 0", "and.b32 %r15, %r41, 1")
    body += f"""    add.s32 %r41, %r41, 1;
    setp.le.s32 %p1, %r41, %r42;
    @%p1 bra $L_again;
{kept_column(0, 0)}"""
    found = ONES.found(body + ended(FIRST) + closed(64), blocks=6)
    for block in range(6):
        assert (found[block, :, 0] == 96.0 * (1 + block % 4)).all(), block


# ---- what is refused: a kernel that keeps all rules, and breaks one ---------------------------------------------

KEPT = "<what was there>"
D, A = range(16), range(32, 40)
"""Columns of the kernel below. Its operands in shared memory begin with B, or with A where that lies there."""
IMAGE = 8192
"""Bytes of its operands, and some more."""


def steps(a: str) -> dict[str, str]:
    """One product, from the beginning to the end; A in ``shared`` or in ``tensor`` memory."""
    product = Ones().product(D.start)
    if a == "tensor":
        product = replace(product, a=f"[ %r21 + {A.start} ]", b=matrix(k_major(0), OPERANDS))
    return {
        "open": opened(64),
        "init": began(*MBARRIERS),
        "fill": filled(IMAGE, 128),
        "store": stored(64),
        "stored": STORED,
        "fence": FENCE,
        "barrier": BARRIER,
        "issue": issued(product, FIRST),
        "wait": waited(FIRST),
        "load": loaded(64),
        "loaded": LOADED,
        "keep": kept(64),
        "inval": ended(*MBARRIERS),
        "close": closed(64),
    }


def outcome(a: str, changes: dict[str, str]) -> Array:
    """Runs it with some steps changed; :data:`KEPT` stands for what a step was."""
    plain = steps(a)
    assert changes.keys() <= plain.keys()
    body = "".join(changes.get(name, KEPT).replace(KEPT, text) for name, text in plain.items())
    cells = np.zeros((ROWS, 64), np.uint32)
    put_operand(cells, A.start, encoded(np.ones((128, 16)), "f16"))
    image = bytearray(IMAGE)
    if a == "shared":
        image[: len(Ones().image)] = Ones().image
    else:
        k_major(0).write(image, 0, encoded(np.ones((16, 16)), "f16"))
    return launched(body, bytes(image), cells, columns=64)


def move(way: str, column: int, count: int, predicate: str = "") -> str:
    """By all warps, or by those that a predicate chooses: some columns from or to %r300 and on."""
    guard = f"@{predicate} " if predicate else ""
    name = f"    {guard}tcgen05.{way}.sync.aligned.32x32b.x{count}.b32"
    address, registers = f"[%r12 + {column}]", listed(count, 300)
    zeros = "".join(f"    mov.b32 %r{300 + index}, 0;\n" for index in range(count))
    return zeros + (f"{name} {registers}, {address};\n" if way == "ld" else f"{name} {address}, {registers};\n")


def warp_is(number: int) -> str:
    return f"    setp.eq.b32 %p9, %r11, {number};\n"


COPY = """    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd20 + 0 ], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
"""
OVERWRITE = "    @%p9 st.shared.b32 [%r1], %r0;\n"


@pytest.mark.parametrize("a", ["shared", "tensor"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"issue": f"{KEPT}{move('st', 48, 16)}{STORED}"},
        {"issue": f"{KEPT}{move('st', D.stop, 16)}{STORED}"},
        {"issue": f"{KEPT}{move('ld', A.start, 8)}{LOADED}"},
        {"issue": f"{KEPT}{move('ld', 48, 16)}{LOADED}"},
        {"wait": f"{KEPT}{move('st', D.start, 16)}{move('st', A.start, 8)}{STORED}"},
        {"wait": f"{KEPT}{BARRIER}    st.shared.b32 [%r1], %r0;\n"},
        {"wait": f"{KEPT}{BARRIER}{COPY}"},
        {"barrier": f"{KEPT}{move('ld', D.start, 16)}{LOADED}{BARRIER}"},
        {"barrier": f"{KEPT}{move('ld', A.start, 8)}{LOADED}"},
        {"barrier": f"{KEPT}{move('st', 48, 16)}{STORED}"},
        {"barrier": f"{KEPT}{move('st', D.start, 16)}{STORED}{BARRIER}"},
        {"wait": f"{KEPT}{waited(FIRST)}"},
        {"inval": f"{KEPT}    @%p11 st.shared.b32 [%r9+{FIRST}], %r0;\n"},
        {"fence": "", "fill": f"{KEPT}{FENCE}"},
        {"fence": f"{BARRIER}{KEPT}"},
        {"fill": f"{KEPT}{COPY}"},
    ],
    ids=[
        "as it is", "other columns stored meanwhile", "the columns beside D stored meanwhile", "A loaded meanwhile",
        "other columns loaded meanwhile", "D and A stored afterwards", "operands overwritten afterwards",
        "operands copied over afterwards", "D loaded before, and a barrier", "A loaded before, no barrier",
        "other columns stored before, no barrier", "D stored before, and a barrier", "waited for twice",
        "a store where an mbarrier was", "the fence right after the stores",
        "a barrier before the fence", "operands copied asynchronously",
    ],
)  # fmt: skip
def test_a_kernel_that_keeps_the_rules_is_not_refused(a: str, changes: dict[str, str]) -> None:
    outcome(a, changes)


def test_the_kernel_that_keeps_the_rules_multiplies() -> None:
    for a in ("shared", "tensor"):
        found = outcome(a, {})
        assert (found[:, D.start : D.stop].copy().view(np.float32) == 16.0).all()
        assert (found[:, A.start : A.stop] == 0x3C003C00).all()
        assert not found[:, D.stop : A.start].any()
        assert not found[:, A.stop :].any()


BROKEN: dict[str, tuple[str, dict[str, str], str]] = {
    "D is read before its product was waited for": ("shared", {"wait": ""}, at("tcgen05.ld")),
    "D is read before its product was committed": ("shared", {"wait": "", "issue": issued(ONES.product(0))}, at("tcgen05.ld")),
    "a part of D is read before its product was waited for": (
        "tensor", {"issue": f"{KEPT}{move('ld', D.stop - 1, 1)}"}, at("tcgen05.ld")
    ),
    "D is stored to while its product is on its way": (
        "shared", {"issue": f"{KEPT}{move('st', D.start, 16)}"}, at("tcgen05.st")
    ),
    "a part of D is stored to while its product is on its way": (
        "tensor", {"issue": f"{KEPT}{move('st', D.stop - 1, 4)}"}, at("tcgen05.st")
    ),
    "A is stored to while its product is on its way": (
        "tensor", {"issue": f"{KEPT}{move('st', A.start, 8)}"}, at("tcgen05.st")
    ),
    "a part of A is stored to while its product is on its way": (
        "tensor", {"issue": f"{KEPT}{move('st', A.stop - 1, 1)}"}, at("tcgen05.st")
    ),
    "A was stored by other warps, no barrier since": (
        "tensor", {"barrier": f"{KEPT}{move('st', A.start, 8)}{STORED}"}, at("tcgen05.mma")
    ),
    "A was stored by warp 3, no barrier since": (
        "tensor", {"barrier": f"{KEPT}{warp_is(3)}{move('st', A.start, 8, '%p9')}{STORED}"}, at("tcgen05.mma")
    ),
    "D was stored by other warps, no barrier since": (
        "shared", {"barrier": f"{KEPT}{move('st', D.start, 16)}{STORED}"}, at("tcgen05.mma")
    ),
    "all was stored by other warps, no barrier since": ("tensor", {"barrier": ""}, at("tcgen05.mma")),
    "A and D were stored, the stores not waited for": ("tensor", {"stored": ""}, at("tcgen05.mma")),
    "D was stored, the store not waited for": ("shared", {"stored": ""}, at("tcgen05.mma")),
    "A was stored, that store not waited for": (
        "tensor", {"stored": f"{KEPT}{move('st', A.start, 8)}"}, at("tcgen05.mma")
    ),
    "the stores of A and D were waited for after the barrier": (
        "tensor", {"stored": "", "barrier": f"{KEPT}{STORED}"}, at("tcgen05.mma")
    ),
    "operands were stored, no fence since": ("shared", {"fence": ""}, at("tcgen05.mma")),
    "B was stored, no fence since": ("tensor", {"fence": ""}, at("tcgen05.mma")),
    "an operand was stored to after the fence": (
        "shared", {"fence": f"{KEPT}    st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};\n"}, at("tcgen05.mma")
    ),
    "operands were copied, no fence since": ("shared", {"fence": f"{KEPT}{COPY}"}, at("tcgen05.mma")),
    "operands were stored, no barrier since": (
        "shared", {"fill": "", "fence": "", "barrier": f"{KEPT}{filled(IMAGE, 128)}{FENCE}"}, at("tcgen05.mma")
    ),
    "B was stored, no barrier since": (
        "tensor", {"fill": "", "fence": "", "barrier": f"{KEPT}{filled(IMAGE, 128)}{FENCE}"}, at("tcgen05.mma")
    ),
    **{
        f"{what} is overwritten by {who} while the product is on its way": (
            a, {"issue": f"{KEPT}{BARRIER}{warp_is(warp)}{OVERWRITE}"}, at("st.shared", "mbarrier.try_wait")
        )
        for what, a in (("A", "shared"), ("B", "tensor"))
        for who, warp in (("warp 0", 0), ("warp 1", 1))
    },
    "operands are copied over while the product is on its way": (
        "shared", {"issue": f"{KEPT}{BARRIER}{COPY}"}, at("cp.async", "mbarrier.try_wait")
    ),
    "D was loaded by all warps, no barrier since": (
        "shared", {"barrier": f"{KEPT}{move('ld', D.start, 16)}{LOADED}"}, at("tcgen05.mma")
    ),
    "D was loaded by warp 3, no barrier since": (
        "shared", {"barrier": f"{KEPT}{warp_is(3)}{move('ld', D.start, 16, '%p9')}{LOADED}"}, at("tcgen05.mma")
    ),
    "tensor memory is not freed": ("shared", {"close": ""}, at("ret")),
    "a product is on its way at the end": (
        "shared", {"wait": "", "load": "", "loaded": "", "keep": ""}, at("ret", "mbarrier.inval", "tcgen05.dealloc")
    ),
    "a product was never committed": (
        "shared", {"wait": "", "load": "", "loaded": "", "keep": "", "issue": issued(ONES.product(0))},
        at("ret", "mbarrier.inval", "tcgen05.dealloc"),
    ),
    "nothing was issued": ("shared", {"issue": ""}, at("mbarrier.try_wait")),
    "nothing was committed": ("shared", {"issue": issued(ONES.product(0))}, at("mbarrier.try_wait")),
    "another mbarrier was committed to": ("shared", {"wait": waited(SECOND)}, at("mbarrier.try_wait")),
    "the next phase is waited for": ("shared", {"wait": f"{KEPT}{waited(FIRST, 1)}"}, at("mbarrier.try_wait")),
    "the mbarrier was not initialised": (
        "shared", {"init": began(SECOND), "inval": ended(SECOND)}, at("tcgen05.commit", "mbarrier.try_wait")
    ),
    "the mbarrier that is waited for is no more": (
        "shared", {"inval": f"{KEPT}{waited(FIRST)}"}, at("mbarrier.try_wait")
    ),
    "an mbarrier is ended that never began": ("shared", {"inval": ended(*MBARRIERS, 32)}, at("mbarrier.inval")),
    "an mbarrier begins where one is": ("shared", {"init": began(FIRST, SECOND, FIRST)}, at("mbarrier.init")),
    "another address is freed": (
        "shared", {"close": f"    add.s32 %r10, %r10, 32;\n{KEPT}"}, at("tcgen05.dealloc")
    ),
    "fewer columns are freed": ("shared", {"close": closed(32)}, at("tcgen05.dealloc")),
    "more columns are freed": ("shared", {"close": closed(128)}, at("tcgen05.dealloc")),
    "tensor memory is freed twice": ("shared", {"close": f"{KEPT}{closed(64)}"}, at("tcgen05.dealloc")),
    "tensor memory is freed by several warps": (
        "shared", {"close": closed(64).replace("@%p10 tcgen05", "tcgen05")}, at("tcgen05.dealloc")
    ),
    "tensor memory is allocated by several warps": (
        "shared", {"open": opened(64).replace("@%p10 tcgen05.alloc", "tcgen05.alloc")}, at("tcgen05.alloc")
    ),
    "an mbarrier lies outside shared memory": ("shared", {"init": began(FIRST, SECOND, 1 << 20)}, at("mbarrier.init")),
    "an mbarrier ends outside shared memory": (
        "shared", {"init": began(FIRST, SECOND, OPERANDS + IMAGE)}, at("mbarrier.init")
    ),
    "an mbarrier is not aligned": ("shared", {"init": began(FIRST, SECOND, 36)}, at("mbarrier.init")),
    "a store hits an mbarrier": (
        "shared", {"init": f"{KEPT}    @%p11 st.shared.b32 [%r9+{FIRST}], %r0;\n"}, at("st.shared")
    ),
    "a store hits the second half of an mbarrier": (
        "shared", {"init": f"{KEPT}{BARRIER}    @%p11 st.shared.b32 [%r9+{FIRST + 4}], %r0;\n"}, at("st.shared")
    ),
    "a store hits an mbarrier and more": (
        "shared", {"barrier": f"{KEPT}    @%p11 st.shared.v4.b32 [%r9+{FIRST}], {{%r2, %r3, %r4, %r5}};\n"}, at("st.shared")
    ),
    "the mbarrier is committed to again before it was waited for": (
        "shared", {"issue": f"{KEPT}{issued(ONES.product(16), FIRST, label='again')}"}, at("tcgen05.commit")
    ),
    "the mbarrier is ended while a product will arrive on it": (
        "shared", {"wait": "", "load": "", "loaded": "", "keep": ""}, at("mbarrier.inval", "ret", "tcgen05.dealloc")
    ),
    "all threads of a warp issue the product": (
        "shared", {"issue": issued(ONES.product(0), FIRST).replace("@%p13 tcgen05.mma", "tcgen05.mma")}, r"tcgen05\.mma"
    ),
}  # fmt: skip
"""What is wrong -> where A lies, the changed steps, the message."""


@pytest.mark.parametrize("wrong", BROKEN)
def test_what_a_gpu_may_not_forgive_is_refused(wrong: str) -> None:
    a, changes, message = BROKEN[wrong]
    with pytest.raises(PtxError, match=message):
        outcome(a, changes)


HALVES = """    and.b32 %r17, %r11, 4;
    shl.b32 %r17, %r17, 3;
    add.s32 %r16, %r12, %r17;
    xor.b32 %r18, %r17, 32;
    add.s32 %r19, %r12, %r18;
    mov.b32 %r100, 1;
"""
"""%r16: this warpgroup's columns, %r19: those of the other."""
OWN_STORE = "    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r16 + 0], {%r100};\n    tcgen05.wait::st.sync.aligned;\n"
OWN_LOAD = "    tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r101}, [%r16 + 0];\n    tcgen05.wait::ld.sync.aligned;\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [(OWN_STORE, OWN_LOAD), (OWN_STORE, OWN_STORE), (OWN_STORE + BARRIER + OWN_LOAD, OWN_STORE)],
    ids=["loads what the other stored", "stores over what the other stored", "stores over what the other loaded"],
)
def test_two_warps_with_the_same_rows_need_a_barrier(first: str, second: str) -> None:
    """Warps w and w + 4: on columns of their own they need none."""
    other = second.replace("%r16", "%r19")
    where = "tcgen05.ld" if second == OWN_LOAD else "tcgen05.st"
    launched(opened(64) + HALVES + first + second + closed(64), columns=64, threads=256)
    launched(opened(64) + HALVES + first + BARRIER + other + closed(64), columns=64, threads=256)
    with pytest.raises(PtxError, match=at(where)):
        launched(opened(64) + HALVES + first + other + closed(64), columns=64, threads=256)


def test_two_warps_store_to_the_same_cells_at_once() -> None:
    with pytest.raises(PtxError, match=at("tcgen05.st")):
        launched(opened(64) + HALVES + OWN_STORE.replace("%r16", "%r12") + closed(64), columns=64, threads=256)


# ---- what is refused: descriptors and instructions --------------------------------------------------------------


def described(a: int = 0, b: int = 0, bits: int = 0) -> dict[str, str]:
    """The product with bits of its descriptors turned over."""
    product = ONES.product(0)
    assert isinstance(product.a, int)
    other = replace(product, a=product.a ^ a, b=product.b ^ b, instruction=product.instruction ^ bits)
    return {"issue": issued(other, FIRST)}


STRAY = [14, 15, 30, 31, 46, 47, 48, 49, 50, 51, *range(52, 61), 61]


@pytest.mark.parametrize("bit", STRAY)
@pytest.mark.parametrize("operand", ["a", "b"])
def test_a_matrix_descriptor_with_bits_that_are_not_understood_is_refused(operand: str, bit: int) -> None:
    """14, 15, 30, 31 and 53 to 60 are none, 46 to 48 are 0b001, 49 to 51 a base offset, 52 absolute distances, 61 a swizzle of
    its own."""
    with pytest.raises(PtxError, match=r"tcgen05\.mma"):
        outcome("shared", described(**{operand: 1 << bit}))


def reserved() -> Iterable[Any]:
    for bit, what in [
        (0, "sparsity selector"), (1, "sparsity selector"), (2, "sparsity"), (3, "saturation"), (4, "D in float16"), (5, "type of D"),
        (6, "reserved"), (8, "type of A"), (9, "type of A"), (11, "type of B"), (12, "type of B"), (13, "negated A"), (14, "negated B"),
        (23, "reserved"), (29, "reserved"), (30, "shift"), (31, "shift"),
    ]:  # fmt: skip
        yield pytest.param(1 << bit, id=f"{bit} {what}")
    plain = instruction(128, 16)
    for m, n in [(128, 0), (128, 8), (128, 24), (128, 264), (64, 0), (64, 264), (0, 16), (32, 16), (96, 16), (256, 16)]:
        yield pytest.param(plain ^ instruction(m, n), id=f"{m} x {n}")


@pytest.mark.parametrize("bits", list(reserved()))
def test_an_instruction_descriptor_that_is_not_understood_is_refused(bits: int) -> None:
    """Shapes: m is 64 and n a multiple of 8, or m is 128 and n a multiple of 16; to 256."""
    with pytest.raises(PtxError, match=r"tcgen05\.mma"):
        outcome("shared", described(bits=bits))


def test_products_outside_the_allocated_columns_are_refused() -> None:
    for product in (ONES.product(56), replace(ONES.product(0), a="[ %r21 + 60 ]")):
        with pytest.raises(PtxError, match=at("tcgen05.mma")):
            outcome("shared", {"issue": issued(product, FIRST)})


@pytest.mark.parametrize("row", [8, 32, 48])
def test_a_matrix_of_64_rows_begins_at_row_0_or_16(row: int) -> None:
    ones = Ones(1, 1, m=64)
    with pytest.raises(PtxError, match=r"tcgen05\.mma"):
        ones.found(
            ones.head(FIRST) + issued(ones.product(place(row, 0)), FIRST) + waited(FIRST) + ended(FIRST) + closed(64)
        )


def test_a_matrix_of_128_rows_begins_at_row_0() -> None:
    with pytest.raises(PtxError, match=r"tcgen05\.mma"):
        outcome("shared", {"issue": issued(ONES.product(place(16, 0)), FIRST)})


MMA = "[ %r1 + 0 ], %rd0, %rd0, %r0, %p1"


@pytest.mark.parametrize(
    "instruction",
    [
        "tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r1], 64",
        "tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r1, 64",
        "tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned",
        f"tcgen05.mma.cta_group::2.kind::f16 {MMA}",
        f"tcgen05.mma.cta_group::1.kind::tf32 {MMA}",
        f"tcgen05.mma.cta_group::1.kind::i8 {MMA}",
        f"tcgen05.mma.ws.cta_group::1.kind::f16 {MMA}",
        f"tcgen05.mma.cta_group::1.kind::f16.collector::a::fill {MMA}",
        f"tcgen05.mma.cta_group::1.kind::f16 {MMA}, 2",
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.b64 [%r1]",
        "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r1], %rs1",
        "tcgen05.ld.sync.aligned.32x32b.x2.pack::16b.b32 {%r1, %r2}, [%r1 + 0]",
        "tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r1}, [%r1 + 0]",
        "tcgen05.ld.sync.aligned.16x128b.x1.b32 {%r1, %r2}, [%r1 + 0]",
        "tcgen05.ld.red.sync.aligned.32x32b.x2.max.f32 {%r1, %r2}, %r3, [%r1 + 0]",
        "tcgen05.ld.sync.aligned.32x32b.x3.b32 {%r1, %r2, %r3}, [%r1 + 0]",
        "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r1, %r2, %r3}, [%r1 + 0]",
        "tcgen05.ld.sync.aligned.16x32bx2.x2.b32 {%r1, %r2}, [%r1 + 0]",
        "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r1, %r2}, [%r1 + 0], 2",
        "tcgen05.st.sync.aligned.32x32b.x2.unpack::16b.b32 [%r1 + 0], {%r1, %r2}",
        "tcgen05.st.sync.aligned.16x32bx2.x2.b32 [%r1 + 0], {%r1, %r2}",
        "tcgen05.cp.cta_group::1.128x256b [%r1], %rd0",
        "tcgen05.shift.cta_group::1.down [%r1]",
        "@%p1 tcgen05.wait::ld.sync.aligned",
        "@%p1 tcgen05.wait::st.sync.aligned",
        "tcgen05.wait::mma.sync.aligned",
        "mbarrier.try_wait.shared::cta.b64 %p1, [%r1], %rd0",
        "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 %p1, [%r1], %r2",
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2, 1000",
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r1], %r2",
        "mbarrier.arrive.shared::cta.b64 %rd1, [%r1]",
        "mbarrier.arrive.expect_tx.shared::cta.b64 %rd1, [%r1], 64",
        "mbarrier.init.shared::cta.b64 [%r1], 2",
        "@%p1 elect.sync %r1|%p2, -1",
        "elect.sync %r1|%p2, 65535",
        "@%p1 fence.proxy.async.shared::cta",
        "fence.proxy.alias",
        "fence.proxy.tensormap::generic.release.gpu",
        "fence.mbarrier_init.release.cluster",
    ],
)  # fmt: skip
def test_an_instruction_that_is_not_understood_is_named(instruction: str) -> None:
    """Before anything runs: here it stands behind a branch that is never taken."""
    body = f"    setp.eq.s32 %p1, 0, 0;\n    @%p1 bra $L_end;\n    {instruction};\n$L_end:"
    with pytest.raises(PtxError, match="not understood") as err:
        run(body)
    assert f"`{instruction}`" in str(err.value)
