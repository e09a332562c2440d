"""Compiles every variant for every chip, without a GPU, and writes what the C++ library embeds.

    python -m kernels.compile --out DIR [--chips 80,89] [--jobs 2]

Into DIR: ``images/*.cubin`` and ``images/*.ptx``; ``kernel_images.S`` that embeds them; ``kernel_table.h`` that lists
them; ``kernel_arguments.h`` with one struct per kernel, whose members are the launch arguments by name;
``variants.json``, the same for Python. Triton's cache makes a second run quick.

What no GPU is needed to see is checked here and stops the build: shared memory beyond the chip's, a parameter list that
is not the table's, scratch memory that the launcher would have to give, tf32 in float32, registers that spill.

Source: cubins are ELF; attributes in ``.nv.info`` (EIATTR_*) as ``cuobjdump -elf`` names them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .table import (
    CHIPS,
    FRAME_LIMIT,
    KERNELS,
    PORTABLE_CHIP,
    SHARED_MEMORY_LIMITS,
    SPLIT_KEYS,
    SPLIT_ROWS,
    TENSORRT_DTYPES,
    TRITON_DTYPES,
    Kernel,
    Variant,
    variants,
)

C_TYPES = {"int32": "int32_t", "float32": "float"}
PTX_TYPES = {"int32": "u32", "float32": "f32"}
"""Type of a parameter in PTX; pointers are u64. Triton writes unsigned for every integer."""
SCRATCH = ("global_scratch", "profile_scratch")
"""Two pointers that Triton 3.9 appends to every kernel; null where their sizes are 0."""


class CompileError(Exception):
    """What was compiled must not be shipped; the message says what, got and expected."""


@dataclass(frozen=True, slots=True)
class Image:
    """Machine code (cubin) or PTX of one variant."""

    variant: Variant
    compute_capability: int
    ptx: bool
    entry: str
    file: str
    """Name in ``images/``."""
    sha256: str
    """Of the file: tells the harness which image the driver was given."""
    bytes: int
    shared: int
    """Bytes of shared memory of one block."""
    num_warps: int
    registers: int
    """Per thread; 0 for PTX."""
    frame: int
    """Local memory per thread, bytes: what spilled; 0 for PTX."""


# ---- one variant, one chip --------------------------------------------------------------------------------------


def compile_variant(variant: Variant, chip: int) -> Any:
    """Triton's compiled kernel: ``asm["cubin"]``, ``asm["ptx"]``, ``metadata``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import attention, rms_norm

    kernel = KERNELS[variant.kernel]
    function = getattr(attention if kernel.has_heads else rms_norm, variant.kernel)
    names = [*(name for name, _ in kernel.arguments), *variant.constexprs]
    if list(function.arg_names) != names:
        raise CompileError(f"{variant.kernel}: arguments {list(function.arg_names)}, the table says {names}")
    model = TRITON_DTYPES[variant.dtype]
    types = {"T*": f"*{model}", "float32*": "*fp32", "int64*": "*i64", "int32": "i32", "float32": "fp32"}
    signature = {name: types[kind] for name, kind in kernel.arguments} | dict.fromkeys(variant.constexprs, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, (name, _) in enumerate(kernel.arguments) if variant.aligned(name)
    }
    constants = {(names.index(name),): value for name, value in variant.constexprs.items()}
    with _without_line_tables():
        return triton.compile(
            ASTSource(function, signature=signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", chip, 32),
            options={
                "num_warps": variant.num_warps,
                "num_stages": variant.num_stages,
                "enable_fp_fusion": True,  # a * b + c rounded once: closer to exact; stated, because the default will change
            },
        )


@contextlib.contextmanager
def _without_line_tables() -> Iterator[None]:
    """They double the size of a cubin, and name files of the machine that built it. Triton asks the environment."""
    before = os.environ.get("TRITON_DISABLE_LINE_INFO")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_DISABLE_LINE_INFO"]
        else:
            os.environ["TRITON_DISABLE_LINE_INFO"] = before


def check_compiled(variant: Variant, chip: int, compiled: Any) -> tuple[int, int]:
    """Refuses what would fail or compute something else on the GPU.

    Returns:
        registers and local memory (bytes) per thread.

    Raises:
        CompileError: what, got, expected.
    """
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    where = f"{variant.name} for compute capability {chip / 10}"
    if metadata.shared > SHARED_MEMORY_LIMITS[chip]:
        raise CompileError(
            f"{where}: {metadata.shared} bytes of shared memory, the chip has {SHARED_MEMORY_LIMITS[chip]}"
        )
    scratch = (metadata.global_scratch_size, metadata.profile_scratch_size)
    if scratch != (0, 0):
        raise CompileError(f"{where}: scratch memory of {scratch} bytes, the launcher gives none")
    got, expected = ptx_parameters(ptx), expected_parameters(KERNELS[variant.kernel])
    if got != expected:
        raise CompileError(f"{where}: the code takes {got}, the launcher passes {expected}")
    if variant.dtype == "float32" and "tf32" in ptx:
        raise CompileError(f"{where}: tf32 in a float32 kernel")
    registers, frame = resource_usage(compiled.asm["cubin"])
    if frame > FRAME_LIMIT:
        raise CompileError(
            f"{where}: {frame} bytes per thread do not fit into registers, at most {FRAME_LIMIT} are taken"
        )
    return registers, frame


def expected_parameters(kernel: Kernel) -> list[str]:
    """PTX types of the launch arguments, the two scratch pointers included."""
    return [PTX_TYPES.get(kind, "u64") for _, kind in kernel.arguments] + ["u64"] * len(SCRATCH)


def ptx_parameters(ptx: str) -> list[str]:
    """Types of the entry's parameters, in order, e.g. ``["u64", "u32", "f32"]``; bits count, so b32 is u32."""
    (parameters,) = re.findall(r"\.entry\s+\w+\(([^)]*)\)", ptx)
    kinds = re.findall(r"\.param\s+\.(\w+)", parameters)
    return [re.sub("^[bs]", "u", kind) for kind in kinds]


_REGISTERS, _FRAME_SIZE = 0x2F, 0x11
"""EIATTR_REGCOUNT, EIATTR_FRAME_SIZE."""


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread, from the ELF section ``.nv.info``."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + index * size) for index in range(count)]
    names = headers[names_index][4]
    found = {_REGISTERS: 0, _FRAME_SIZE: 0}
    for name, _, _, _, offset, length in headers:
        if cubin[names + name : cubin.index(b"\0", names + name)] != b".nv.info":
            continue
        end = offset + length
        while offset < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, offset)
            offset += 4
            if form == 4:  # the value is the size of what follows: (symbol, number) for the two looked for
                if attribute in found:
                    found[attribute] = max(found[attribute], struct.unpack_from("<II", cubin, offset)[1])
                offset += value
    return found[_REGISTERS], found[_FRAME_SIZE]


def build_images(job: tuple[Variant, int, str]) -> list[Image]:
    """Compiles, checks and writes one variant for one chip."""
    variant, chip, folder = job
    compiled = compile_variant(variant, chip)
    registers, frame = check_compiled(variant, chip, compiled)
    code = [(False, f"{variant.name}_sm{chip}.cubin", compiled.asm["cubin"], registers, frame)]
    if chip == PORTABLE_CHIP:
        code.append((True, f"{variant.name}_compute{chip}.ptx", compiled.asm["ptx"].encode() + b"\0", 0, 0))
    images = []
    for ptx, file, content, used, spilled in code:
        (Path(folder) / file).write_bytes(content)
        images.append(
            Image(
                variant, chip, ptx, compiled.metadata.name, file, hashlib.sha256(content).hexdigest(), len(content),
                compiled.metadata.shared, compiled.metadata.num_warps, used, spilled,
            )
        )  # fmt: skip
    return images


# ---- what the library embeds ------------------------------------------------------------------------------------


def struct_name(kernel: str) -> str:
    """``rms_norm`` -> ``RmsNormArguments``"""
    return "".join(word.capitalize() for word in kernel.split("_")) + "Arguments"


def arguments_header() -> str:
    """C++: one struct per kernel. The launcher assigns by name; the order is the table's."""
    parts = [
        "// Generated from kernels/table.py. Launch arguments of each kernel, in the order it was compiled with.",
        "#pragma once",
        '#include "cuda_driver.h"',
        "",
        "namespace llama_export::kernels",
        "{",
    ]
    for kernel in KERNELS.values():
        members = [(name, C_TYPES.get(kind, "CUdeviceptr"), kind) for name, kind in kernel.arguments]
        members += [(name, "CUdeviceptr", "scratch, none") for name in SCRATCH]
        parts += [
            f"struct {struct_name(kernel.name)}",
            "{",
            f'    static constexpr char const* kKernel = "{kernel.name}";',
        ]
        parts += [f"    {c_type} {name}{{}}; //!< {kind}" for name, c_type, kind in members]
        addresses = ", ".join(f"&{name}" for name, _, _ in members)
        parts += [
            f"    void* addresses[{len(members)}]{{}};",
            "    //! What cuLaunchKernel takes: valid as long as this object lives and is not copied.",
            "    void** pointers() noexcept",
            "    {",
            f"        void* const order[] = {{{addresses}}};",
            f"        for (int i = 0; i < {len(members)}; ++i)",
            "        {",
            "            addresses[i] = order[i];",
            "        }",
            "        return addresses;",
            "    }",
            "};",
            "",
        ]
    return "\n".join([*parts, "} // namespace llama_export::kernels", ""])


def table_header(images: list[Image]) -> str:
    """C++: every image, with where it lies in this library."""

    def boolean(value: bool) -> str:
        return "true" if value else "false"

    parts = [
        "// Generated by kernels/compile.py. The compiled kernels and where they lie in this library.",
        "#pragma once",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
    ]
    parts += [
        f'extern "C" __attribute__((visibility("hidden"))) unsigned char const llama_export_image_{index}[];'
        for index in range(len(images))
    ]
    parts += [
        "",
        "namespace llama_export::kernels",
        "{",
        "struct KernelImage",
        "{",
        "    char const* kernel;",
        "    int32_t dtype; //!< nvinfer1::DataType",
        "    int32_t width; //!< attention: head_dim; norms: hidden_size",
        "    bool masked; //!< serves every width up to this one, not this one alone",
        "    int32_t rows; //!< of queries or hidden states, of one program; 0 where the grid does not depend on it",
        "    int32_t compute_capability; //!< times ten",
        "    bool ptx; //!< to be compiled by the driver, for this compute capability or a later one",
        "    char const* entry;",
        "    unsigned char const* begin;",
        "    uint64_t size;",
        "    uint32_t shared; //!< bytes of dynamic shared memory",
        "    uint32_t warps;",
        "};",
        "",
        "inline constexpr KernelImage kImages[] = {",
    ]
    for index, image in enumerate(images):
        variant = image.variant
        fields = [
            f'"{variant.kernel}"', TENSORRT_DTYPES[variant.dtype], variant.width, boolean(variant.masked), variant.rows,
            image.compute_capability, boolean(image.ptx), f'"{image.entry}"', f"llama_export_image_{index}", image.bytes,
            image.shared, image.num_warps,
        ]  # fmt: skip
        parts.append("    {" + ", ".join(map(str, fields)) + "},")
    return "\n".join(
        [
            *parts,
            "};",
            f"inline constexpr size_t kImageCount = {len(images)};",
            "",
            "//! Query rows up to which the cache is split between programs.",
            f"inline constexpr int64_t kSPLIT_ROWS = {SPLIT_ROWS};",
            "",
            "struct SplitKeys",
            "{",
            "    int64_t largestCapacity;",
            "    int64_t keys; //!< of one piece of the cache",
            "};",
            "",
            "inline constexpr SplitKeys kSPLIT_KEYS[] = {",
            *(f"    {{{capacity}, {keys}}}," for capacity, keys in SPLIT_KEYS),
            "};",
            "} // namespace llama_export::kernels",
            "",
        ]
    )


def assembly(images: list[Image], folder: Path) -> str:
    """Embeds the images as read-only data, aligned for the driver."""
    parts = ['    .section .rodata.kernels, "a", @progbits']
    for index, image in enumerate(images):
        name = f"llama_export_image_{index}"
        parts += [
            "    .balign 64",
            f"    .globl {name}",
            f"    .hidden {name}",
            f"{name}:",
            f'    .incbin "{folder.resolve() / image.file}"',
        ]
    return "\n".join([*parts, '    .section .note.GNU-stack, "", @progbits', ""])


def variants_json(images: list[Image], chips: list[int], triton_version: str) -> str:
    """The images for Python."""
    document = {
        "triton": triton_version,
        "chips": chips,
        "portable_chip": PORTABLE_CHIP if PORTABLE_CHIP in chips else None,
        "signatures": {kernel.name: [list(item) for item in kernel.arguments] for kernel in KERNELS.values()},
        "images": [
            {
                "kernel": image.variant.kernel, "dtype": image.variant.dtype, "width": image.variant.width,
                "masked": image.variant.masked, "constexprs": image.variant.constexprs,
                "compute_capability": image.compute_capability, "ptx": image.ptx, "entry": image.entry,
                "bytes": image.bytes, "shared": image.shared, "warps": image.num_warps, "registers": image.registers,
                "frame": image.frame, "sha256": image.sha256,
            }
            for image in images
        ],
    }  # fmt: skip
    return json.dumps(document, indent=1) + "\n"


def write_all(out: Path, chips: list[int], jobs: int) -> list[Image]:
    """Compiles everything into ``out``.

    Raises:
        CompileError: of the first image that must not be shipped.
    """
    import triton

    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    work = [(variant, chip, str(folder)) for chip in chips for variant in variants()]
    images = [image for found in _run(work, jobs) for image in found]
    (out / "kernel_arguments.h").write_text(arguments_header(), encoding="utf-8")
    (out / "kernel_table.h").write_text(table_header(images), encoding="utf-8")
    (out / "kernel_images.S").write_text(assembly(images, folder), encoding="utf-8")
    (out / "variants.json").write_text(variants_json(images, chips, triton.__version__), encoding="utf-8")
    return images


def _run(work: list[tuple[Variant, int, str]], jobs: int) -> Iterator[list[Image]]:
    if jobs == 1:
        yield from map(build_images, work)
        return
    # Processes, because Triton holds Python's lock; spawned, because forking after LLVM has started threads is unsafe.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(build_images, work, chunksize=4)


def parse_chips(text: str) -> list[int]:
    """``80,89`` -> [80, 89]; empty: all.

    Raises:
        CompileError: a chip that is not in the table.
    """
    chips = sorted({int(part) if part.strip().isdigit() else 0 for part in text.split(",")}) if text else list(CHIPS)
    unknown = [chip for chip in chips if chip not in CHIPS]
    if unknown:
        raise CompileError(f"--chips: got {text!r}, expected some of {','.join(map(str, CHIPS))}")
    return chips


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--chips", default="", help="compute capabilities x 10, comma separated (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        images = write_all(arguments.out, parse_chips(arguments.chips), max(1, arguments.jobs))
    except CompileError as err:
        sys.stderr.write(f"error: {err}\n")
        return 1
    total = sum(image.bytes for image in images)
    sys.stdout.write(f"{len(images)} images, {total:,} bytes, {time.monotonic() - start:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
