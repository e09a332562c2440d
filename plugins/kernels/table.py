"""The one table of what is compiled: kernels and their launch arguments, variants, tile sizes and chips.

The compiler, the generated C++ (``kernel_arguments.h``, ``kernel_table.h``), the interpreter and the tests read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

CHIPS = (80, 86, 89, 90, 100, 120, 121)
"""Compute capabilities, times ten, that get machine code of their own: A100, RTX 30, RTX 40 and L4, H100 and H200, B200,
RTX 50, GB10. From 90 up Triton uses features of the very chip, so that code runs on no other."""
PORTABLE_CHIP = 80
"""PTX for this one is the fall-back that the driver compiles on any later chip: targets from 90 up are not portable."""
SHARED_MEMORY_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, 121: 101376}
"""Most shared memory of one block, bytes (CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability": 163, 99, 99, 227, 227, 99, 99 KiB)."""
FRAME_LIMIT = 256
"""Most local memory per thread, bytes: what the compiler could not keep in registers (spills) and goes through the cache."""

DTYPES = ("float32", "float16", "bfloat16")
TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TENSORRT_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 7}
"""``nvinfer1::DataType``."""

EXACT_HEAD_DIMS = (64, 128)
"""head_dims with a variant of their own: no masks, vector loads."""
PADDED_HEAD_DIMS = (16, 32, 64, 128, 256)
"""Masked variants: any even head_dim up to this."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of :mod:`.rms_norm` or :mod:`.attention`."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    """(name, type) in launch order: ``T*`` (the model dtype), ``float32*``, ``int64*``, ``int32``, ``float32``."""
    unaligned: frozenset[str] = field(default=frozenset())
    """Arguments that need not be a multiple of 16 (pointers: bytes; sizes: elements) in exact variants."""

    @property
    def has_heads(self) -> bool:
        """Whether there is a variant for each head_dim."""
        return any(name == "head_dim" for name, _ in self.arguments)


def _arguments(text: str) -> tuple[tuple[str, str], ...]:
    """``T* query, key; int32 capacity`` -> (("query", "T*"), ("key", "T*"), ("capacity", "int32"))"""
    found = []
    for part in text.split(";"):
        kind, names = part.strip().split(" ", 1)
        found += [(name.strip(), kind) for name in names.split(",")]
    return tuple(found)


_ATTENTION = _arguments(
    "T* rotated_query, present_key, present_value; int64* past_length; T* attn_output; float32 scale;"
    "int32 new_tokens, num_heads, num_kv_heads, capacity, head_dim"
)
KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("rms_norm", _arguments("T* hidden_states, weight, normed; int32 hidden_size; float32 epsilon")),
        Kernel(
            "add_rms_norm",
            _arguments("T* hidden_states, residual, weight, normed, new_residual; int32 hidden_size; float32 epsilon"),
        ),
        Kernel(
            "rotate_and_append",
            _arguments(
                "T* query, key, value; float32* cos, sin; int64* past_length;"
                "T* rotated_query, present_key, present_value;"
                "int32 new_tokens, num_heads, num_kv_heads, capacity, head_dim, query_stride, key_stride, value_stride"
            ),
        ),
        Kernel("attention_prefill", _ATTENTION),
        Kernel("attention_decode", _ATTENTION),
        Kernel(
            "attention_padded",
            _arguments(
                "T* rotated_query, rotated_key, value; int64* attention_mask; T* attn_output; float32 scale;"
                "int32 num_tokens, num_heads, num_kv_heads, head_dim"
            ),
        ),
    )
}
ALIGNED_SIZES = ("query_stride", "key_stride", "value_stride")
"""int32 arguments that are a multiple of 16 in exact variants, because head_dim is."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel at one dtype and head_dim: compiled once per chip."""

    kernel: str
    dtype: str
    head_dim: int
    """HEAD_DIM; 0 for the norms."""
    masked: bool
    constexprs: dict[str, int | bool]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """File name without the chip, e.g. ``attention_decode_float16_d128``."""
        head = f"_d{self.head_dim}" if self.head_dim else ""
        return f"{self.kernel}_{self.dtype}{head}{'_masked' if self.masked else ''}"

    @property
    def block_m(self) -> int:
        """Query rows of one program; 0 where the grid does not depend on it."""
        return int(self.constexprs.get("BLOCK_M", 0))

    def aligned(self, argument: str) -> bool:
        """Whether the compiler may take an argument for a multiple of 16 (a pointer: of 16 bytes).

        Loads become vectors only then. A norm's hidden_size is any number; a slice of ``past_length`` or of a mask starts
        anywhere.
        """
        kind = dict(KERNELS[self.kernel].arguments)[argument]
        if kind.endswith("*"):
            return argument not in ("past_length", "attention_mask")
        return argument in ALIGNED_SIZES and not self.masked


def variants() -> Iterator[Variant]:
    """All of them."""
    for dtype in DTYPES:
        for norm in ("rms_norm", "add_rms_norm"):
            yield Variant(norm, dtype, 0, False, {"BLOCK": 1024}, num_warps=4, num_stages=2)
        heads = [(head_dim, False) for head_dim in EXACT_HEAD_DIMS] + [
            (head_dim, True) for head_dim in PADDED_HEAD_DIMS
        ]
        for head_dim, masked in heads:
            shape: dict[str, int | bool] = {"HEAD_DIM": head_dim, "MASKED": masked}
            yield Variant(
                "rotate_and_append", dtype, head_dim, masked, {**shape, "HEADS": 8}, num_warps=4, num_stages=2
            )
            for kernel in ("attention_prefill", "attention_decode", "attention_padded"):
                rows, keys, warps = tile(kernel, dtype, head_dim)
                yield Variant(
                    kernel, dtype, head_dim, masked, {**shape, "BLOCK_M": rows, "BLOCK_N": keys}, warps, num_stages=2
                )


def tile(kernel: str, dtype: str, head_dim: int) -> tuple[int, int, int]:
    """(query rows, keys, warps) of one program: as much as registers and the smallest shared memory hold.

    float32 has no tensor cores without tf32, and its operands fill twice the registers: 16 rows, or it spills.
    """
    if dtype == "float32":
        # The mask's registers are what makes the widest heads spill with 4 warps.
        return 16, 16 if head_dim > 128 else 32, 8 if kernel == "attention_padded" and head_dim > 128 else 4
    if kernel == "attention_decode":
        return 16, 32 if head_dim > 128 else 64, 4
    if head_dim > 128:
        return 32, 32, 8
    return 64, 64, 8 if head_dim > 64 else 4


def select(kernel: str, dtype: str, head_dim: int) -> Variant:
    """The variant that serves a head_dim: an exact one if there is one, else the masked one with the least padding.

    Raises:
        LookupError: no variant does.
    """
    fitting = [
        variant
        for variant in variants()
        if variant.kernel == kernel
        and variant.dtype == dtype
        and (variant.head_dim >= head_dim if variant.masked else variant.head_dim in (0, head_dim))
    ]
    if not fitting:
        raise LookupError(f"no variant of {kernel} for {dtype}, head_dim {head_dim}")
    return min(fitting, key=lambda variant: (variant.masked, variant.head_dim))
