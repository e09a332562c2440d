"""PTX text -> :class:`Program`: the statements of its one kernel, registers numbered, operands resolved.

Only what Triton emits is taken; anything else is refused by name, so that nothing is silently left out.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution (syntax: chapter 4; state spaces: chapter 5).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Address", "Operand", "Program", "PtxError", "Statement", "float32_bits"]


class PtxError(Exception):
    """The text holds something that is not understood, or the kernel did what a GPU would not forgive."""


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``: ``base`` is a register's slot, or None for an offset into shared memory."""

    base: int | None
    offset: int


Operand = int | Address | tuple[int | None, ...]
"""A slot (register or constant); an address; or several slots, None where the kernel takes no interest (``_``)."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One instruction."""

    opcode: str
    """In full, e.g. ``ld.global.v4.b32``."""
    operands: tuple[Operand, ...]
    predicate: int | None
    """Slot of the predicate that guards it."""
    negated: bool
    """Whether it runs where the predicate is false."""
    target: int | None
    """Of a branch: number of the statement."""
    number: int
    """Its place in the program."""
    text: str
    """As it stands, for messages."""


@dataclass(slots=True)
class Program:
    """A kernel, ready to be run.

    A *slot* holds one value per thread: a register, a constant, a parameter or a special register.
    """

    entry: str
    threads: int
    """Of one block (``.reqntid``)."""
    statements: tuple[Statement, ...] = ()
    widths: list[int] = field(default_factory=list)
    """Bits of each slot; 1 for a predicate."""
    constants: dict[int, int] = field(default_factory=dict)
    """Slot -> its bits."""
    parameters: dict[int, str] = field(default_factory=dict)
    """Slot -> PTX type, in order: ``u64``, ``u32``, ``f32``."""
    special: dict[str, int] = field(default_factory=dict)
    """Special register, e.g. ``%tid.x`` -> slot."""
    steps: list[Any] = field(default_factory=list)
    """What executes the statements, once :func:`.launch` has decoded them: a kernel is launched many times."""

    @classmethod
    def parse(cls, text: str) -> Program:
        """
        Args:
            text: one module with one ``.entry``.

        Raises:
            PtxError: what is not understood.
        """
        return _Parser(text).program


_SHARED = "global_smem"
"""Triton's name of dynamic shared memory."""
_SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]$")
_PARAMETERS = {"u64": 64, "u32": 32, "f32": 32}
_REGISTER_WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}
_TYPE_WIDTHS = {
    "pred": 1, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32,
    "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f32x2": 64,
}  # fmt: skip


class _Parser:
    """Reads one text."""

    def __init__(self, text: str) -> None:
        lines = re.sub(r"//[^\n]*", "", text)
        head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", lines)
        if head is None or lines.count(".entry") != 1:
            raise PtxError(f"{lines.count('.entry')} kernels in the text, expected one `.entry`")
        entry, declared, directives = head.groups()
        threads = re.search(r"\.reqntid\s+(\d+)\s*(?!,)(?:\s|$)", directives)
        if threads is None:
            raise PtxError(f"`{entry}` does not say how many threads a block has (.reqntid, in one dimension)")
        if int(threads[1]) % 32:
            raise PtxError(f"`{entry}` has blocks of {threads[1]} threads, which are no whole warps")
        parameters = re.findall(r"\.param\s+\.(\w+)(?:\s+\.ptr[^,]*?)?\s+([\w$]+)\s*(?:,|$)", declared.strip())
        if len(parameters) != declared.count(".param") or not {kind for kind, _ in parameters} <= set(_PARAMETERS):
            raise PtxError(f"not all of these parameters of `{entry}` are understood: {' '.join(declared.split())}")
        self.program = Program(entry, int(threads[1]))
        self._slots: dict[str, int] = {}
        for kind, name in parameters:
            self.program.parameters[self._new_slot(name, _PARAMETERS[kind])] = kind
        body = lines[head.end() : self._end_of_body(lines, head.end())]
        self._labels: dict[str, int] = {}
        pieces = list(self._split(body))
        self.program.statements = tuple(self._statement(number, *piece) for number, piece in enumerate(pieces))

    @staticmethod
    def _end_of_body(text: str, begin: int) -> int:
        depth = 1
        for match in re.finditer(r"[{}]", text[begin:]):
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return begin + match.start()
        raise PtxError("the kernel has no end")

    def _split(self, body: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Statements with their scopes, innermost first; registers and labels are declared on the way."""
        scopes, count, opened, end = ("",), 0, 0, 0
        for match in re.finditer(r"\s*(\.loc[^\n]*|\.pragma[^;]*;|[\w$]+:|[{}]|[^;{}]*(?:\{[^}]*\}[^;{}]*)*;)", body):
            piece, end = match[1], match.end()
            if piece == "{":
                opened += 1
                scopes = (f"/{opened}", *scopes)
            elif piece == "}":
                scopes = scopes[1:]
            elif piece.endswith(":"):
                self._labels[piece[:-1] + scopes[0]] = count
            elif piece.startswith(".reg"):
                self._declare(piece, scopes[0])
            elif not piece.startswith((".pragma", ".loc")):
                yield " ".join(piece[:-1].split()), scopes
                count += 1
        if body[end:].strip():
            raise PtxError(f"`{body[end:].strip()}` is not understood")

    def _declare(self, piece: str, scope: str) -> None:
        """``.reg .b32 %r<100>;`` or ``.reg .pred complete;``"""
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+([%\w]+?)(?:<(\d+)>)?;", piece)
        if match is None or match[1] not in _REGISTER_WIDTHS:
            raise PtxError(f"`{piece}` is not understood")
        kind, name, count = match.groups()
        for each in [name] if count is None else [f"{name}{index}" for index in range(int(count))]:
            self._new_slot(each + scope, _REGISTER_WIDTHS[kind])

    def _new_slot(self, name: str, width: int) -> int:
        self._slots[name] = len(self.program.widths)
        self.program.widths.append(width)
        return self._slots[name]

    def _statement(self, number: int, text: str, scopes: tuple[str, ...]) -> Statement:
        place = f"`{text}`"
        match = re.fullmatch(r"(?:@(!?[%\w]+) )?([\w.:]+) ?(.*)", text)
        if match is None:
            raise PtxError(f"{place} is not understood")
        guard, opcode, rest = match.groups()
        operands: tuple[Operand, ...] = ()
        target = None
        if opcode.split(".")[0] == "bra":
            target = _visible(self._labels, rest, scopes)
            if target is None:
                raise PtxError(f"{place}: no such label")
        else:
            width = self._immediate_width(opcode)
            operands = tuple(
                self._operand(item, 64 if (opcode[:8], index) == ("mad.wide", 3) else width, place, scopes)
                for index, item in enumerate(_operands(rest))
            )
        predicate = None if guard is None else self._slot(guard.removeprefix("!"), 1, place, scopes)
        return Statement(opcode, operands, predicate, guard is not None and guard[0] == "!", target, number, text)

    @staticmethod
    def _immediate_width(opcode: str) -> int:
        """Bits of a number among the operands. Types of results come first, those of operands last."""
        parts = opcode.split(".")
        if parts[0] in ("shl", "shr", "bfe", "shfl", "bar", "barrier", "cp", "redux"):
            return 32  # how far, where, how many: 32 bits whatever is shifted
        return next((_TYPE_WIDTHS[part] for part in reversed(parts) if part in _TYPE_WIDTHS), 32)

    def _operand(self, text: str, width: int, place: str, scopes: tuple[str, ...]) -> Operand:
        if text.startswith("{") or "|" in text:  # `a|b`: two results
            names = [name.strip() for name in re.split(r"[,|]", text.strip("{}"))]
            return tuple(None if name == "_" else self._slot(name, width, place, scopes) for name in names)
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            if base == _SHARED:
                return Address(None, int(offset or 0))
            return Address(self._slot(base, width, place, scopes), int(offset or 0))
        return self._slot(text, width, place, scopes)

    def _slot(self, text: str, width: int, place: str, scopes: tuple[str, ...]) -> int:
        """Of a register, a parameter, a special register or a constant."""
        declared = _visible(self._slots, text, scopes)
        if declared is not None:
            return declared
        if _SPECIAL.match(text):
            self.program.special[text] = self._new_slot(text, 32)
            return self._slots[text]
        bits = _constant(text, width)
        if bits is None:
            raise PtxError(f"{place}: `{text}` is no operand that is understood")
        name = f"{bits}:{width}"
        if name not in self._slots:
            self.program.constants[self._new_slot(name, width)] = bits
        return self._slots[name]


def _visible(names: Mapping[str, int], name: str, scopes: tuple[str, ...]) -> int | None:
    """What a name stands for, seen from inside these scopes."""
    return next((names[name + scope] for scope in scopes if name + scope in names), None)


def _constant(text: str, width: int) -> int | None:
    """The bits of a number; None for what is none."""
    if text == _SHARED:
        return 0  # shared memory begins at address 0 of its own space
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return int(match[1], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        return int(text, 0) & ((1 << width) - 1)
    return None


def _operands(text: str) -> Iterator[str]:
    """Separated by commas, but for those in braces."""
    for match in re.finditer(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        yield match[0]


def float32_bits(value: float) -> int:
    """The bits of a float32 parameter."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
