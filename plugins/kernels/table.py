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

EXACT_HEAD_DIMS = {"float32": (64, 128), "float16": (32, 64, 80, 96, 128, 256), "bfloat16": (32, 64, 80, 96, 128, 256)}
"""head_dims with variants of their own: vector loads, and masks only where one is no power of two."""
PADDED_HEAD_DIMS = (64, 128, 256)
"""Masked variants: any even head_dim up to this."""
ROW_LENGTHS = (256, 1024, 2048, 4096, 8192, 16384)
"""Longest hidden_size of each norm variant whose program holds a row in registers."""
LONG_ROW = 2**31 - 1
"""The width of the norm variant that serves any hidden_size."""
SPLIT_KEYS = ((1024, 128), (8192, 256), (2**31 - 1, 512))
"""(largest capacity, keys of one piece of the cache): enough pieces to occupy a GPU with one row of a short cache, few enough that
what they write is about 1 % of what they read of a long one. A function of the capacity alone: a row of the batch must not
round otherwise because of its neighbours."""
SPLIT_ROWS = 16
"""Query rows (new tokens x heads of a group) up to which the cache is split; more fill the GPU by themselves. The smallest
tile of the tensor cores."""


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


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "rms_norm", _arguments("T* hidden_states, weight, normed; int32 num_rows, hidden_size; float32 epsilon")
        ),
        Kernel(
            "add_rms_norm",
            _arguments(
                "T* hidden_states, residual, weight, normed, new_residual; int32 num_rows, hidden_size; float32 epsilon"
            ),
        ),
        Kernel(
            "rotate_and_append",
            _arguments(
                "T* query, key, value; float32* cos, sin; int64* past_length;"
                "T* rotated_query, present_key, present_value;"
                "int32 new_tokens, num_heads, num_kv_heads, capacity, head_dim, query_stride, key_stride, value_stride"
            ),
        ),
        Kernel(
            "attention_prefill",
            _arguments(
                "T* rotated_query, present_key, present_value; int64* past_length; T* attn_output; float32 scale;"
                "int32 new_tokens, num_heads, num_kv_heads, capacity, head_dim"
            ),
        ),
        Kernel(
            "attention_split",
            _arguments(
                "T* rotated_query, present_key, present_value; int64* past_length; T* attn_output;"
                "float32* partial_output, partial_softmax; float32 scale;"
                "int32 new_tokens, num_heads, num_kv_heads, capacity, head_dim, num_splits, split_keys"
            ),
        ),
        Kernel(
            "attention_combine",
            _arguments(
                "float32* partial_output, partial_softmax; int64* past_length; T* attn_output;"
                "int32 new_tokens, num_heads, capacity, head_dim, num_splits, split_keys"
            ),
        ),
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
    """One kernel at one dtype and width: compiled once per chip."""

    kernel: str
    dtype: str
    width: int
    """Attention: head_dim. Norms: hidden_size."""
    masked: bool
    """Whether it serves every (attention: even) width up to this one, or this one alone."""
    constexprs: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """File name without the chip, e.g. ``attention_split_float16_128``, or ``.._up_to_128`` of a masked one."""
        width = "any" if self.width == LONG_ROW else self.width
        return f"{self.kernel}_{self.dtype}{'_up_to' if self.masked else ''}_{width}"

    @property
    def rows(self) -> int:
        """Rows of one program: of queries, or of hidden states; 0 where the grid does not depend on it."""
        return int(self.constexprs.get("BLOCK_M", self.constexprs.get("ROWS", 0)))

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
            for length in ROW_LENGTHS:
                rows = max(1, 1024 // length)  # short rows: several, so that every thread has 16 bytes to load
                shape = {"HIDDEN_SIZE": length, "ROWS": rows, "BLOCK": 0}
                yield Variant(norm, dtype, length, True, shape, num_warps=min(16, max(4, length // 512)), num_stages=1)
            long_row = {"HIDDEN_SIZE": 0, "ROWS": 1, "BLOCK": 4096}
            yield Variant(norm, dtype, LONG_ROW, True, long_row, num_warps=8, num_stages=2)
        heads = [(head_dim, False) for head_dim in EXACT_HEAD_DIMS[dtype]]
        heads += [(head_dim, True) for head_dim in PADDED_HEAD_DIMS]
        for head_dim, masked in heads:
            padded = 1 << (head_dim - 1).bit_length()
            head: dict[str, int] = {"HEAD_DIM": padded, "WIDTH": 0 if masked else head_dim}
            turn = {**head, "HEADS": 8}
            yield Variant("rotate_and_append", dtype, head_dim, masked, turn, num_warps=4, num_stages=2)
            for kernel in ("attention_prefill", "attention_split", "attention_padded"):
                rows, keys, warps, stages = tile(kernel, dtype, padded, masked)
                blocks = {**head, "BLOCK_M": rows, "BLOCK_N": keys}
                yield Variant(kernel, dtype, head_dim, masked, blocks, warps, stages)
            pieces = {
                **head,
                "BLOCK_S": 8192 // padded,
            }  # 32 float32 a thread: their loads are all on their way at once
            yield Variant("attention_combine", dtype, head_dim, masked, pieces, num_warps=8, num_stages=1)


def variant_named(name: str) -> Variant:
    """The variant of a name."""
    return next(variant for variant in variants() if variant.name == name)


def tile(kernel: str, dtype: str, head_dim: int, masked: bool) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) of one program: as much as registers and the smallest shared memory hold.

    float32 has no tensor cores without tf32, and its operands fill twice the registers: 16 rows, or it spills.
    """
    if dtype == "float32":
        return 16, 16 if head_dim > 128 else 32, 8 if head_dim > 64 else 4, 2
    if kernel == "attention_split":  # limited by memory: more blocks of keys on their way
        return SPLIT_ROWS, 32 if head_dim > (64 if masked else 128) else 64, 4, 3
    if head_dim > 128:
        return 32, 32, 8, 2
    if kernel == "attention_prefill" and not masked:  # the mask's addresses take the registers of half the rows
        return 128, 64, 8, 2
    return 64, 64, 8 if head_dim > 64 else 4, 2


def select(kernel: str, dtype: str, width: int) -> Variant:
    """The variant that serves a head_dim or hidden_size: an exact one if there is one, else the one with the least padding.

    Raises:
        LookupError: no variant does.
    """
    fitting = [
        variant
        for variant in variants()
        if variant.kernel == kernel
        and variant.dtype == dtype
        and (variant.width >= width if variant.masked else variant.width == width)
    ]
    if not fitting:
        raise LookupError(f"no variant of {kernel} for {dtype}, {width} wide")
    return min(fitting, key=lambda variant: (variant.masked, variant.width))


def split_keys(capacity: int) -> int:
    """Keys of one piece of a cache."""
    return next(keys for largest, keys in SPLIT_KEYS if capacity <= largest)


def is_split(new_tokens: int, group: int) -> bool:
    """Whether the cache is split between programs.

    Args:
        new_tokens: S.
        group: R, query heads per key/value head.
    """
    return new_tokens == 1 or new_tokens * group <= SPLIT_ROWS
