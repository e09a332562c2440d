"""One tensor of a static KV cache, where it lies: in the host's memory, or in a GPU's.

Shapes: B batch, G key/value heads, C kv_cache_capacity, D head_dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export.errors import ToolchainError

Float32Array = NDArray[np.float32]
ONNX_DTYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
"""``TensorProto.DataType``: NumPy has no bfloat16."""


class CacheBuffer(ABC):
    """One cache tensor [B, G, C, D] of zeros.

    Args:
        shape: [B, G, C, D].
        dtype: of its elements.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self._row_bytes = math.prod(shape[1:]) * (4 if dtype == "float32" else 2)

    @abstractmethod
    def address(self, row: int) -> int:
        """Where a row begins, in the device's memory."""

    @abstractmethod
    def move_rows(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """For each (new, old, length), in this order: copies the first ``length`` tokens of row ``old`` to row ``new``."""

    @abstractmethod
    def array(self) -> Float32Array:
        """All of it in the host's memory."""


class HostBuffer(CacheBuffer):
    """In float32. The system gives memory to the pages of a zeroed array only when they are first written, so a capacity that
    is never reached costs nothing."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(shape, dtype)
        self._array: Float32Array = np.zeros(shape, np.float32)

    def address(self, row: int) -> int:
        return int(self._array.ctypes.data) + row * self._row_bytes

    def move_rows(self, moves: Sequence[tuple[int, int, int]]) -> None:
        for new, old, length in moves:
            self._array[new, :, :length] = self._array[old, :, :length]

    def array(self) -> Float32Array:
        return self._array


class CudaBuffer(CacheBuffer):
    """Bytes on the GPU, from the memory of the session that runs over them.

    Args:
        session: an ``InferenceSession`` on CUDA.
        shape, dtype: see :class:`CacheBuffer`.

    Raises:
        ToolchainError: the GPU has no room for it.
    """

    def __init__(self, session: Any, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(shape, dtype)
        size = shape[0] * self._row_bytes
        try:
            self._bytes = session.create_ortvalue_from_shape_and_type([size], np.uint8, "cuda", 0)
        except Exception as err:
            raise ToolchainError(
                "the GPU's memory does not hold this cache",
                details={
                    "one tensor": f"{list(shape)} of {dtype}, {size / 1e9:.2f} GB; each layer has two",
                    "reason": err,
                },
                hint="fewer prompts at once, or a smaller --max-seq-len",
            ) from err
        self._bytes.update_inplace(np.zeros(size, np.uint8))

    def address(self, row: int) -> int:
        return int(self._bytes.data_ptr()) + row * self._row_bytes

    def move_rows(self, moves: Sequence[tuple[int, int, int]]) -> None:
        # Through the host, once there and back for all of them: onnxruntime copies whole tensors only.
        rows = self._bytes.numpy().reshape(self.shape[0], self._row_bytes)
        for new, old, _ in moves:
            rows[new] = rows[old]
        self._bytes.update_inplace(rows.reshape(-1))

    def array(self) -> Float32Array:
        return widened(self._bytes.numpy(), self.dtype).reshape(self.shape)


def widened(raw: NDArray[Any], dtype: str) -> Float32Array:
    """The float32 values of an array's bytes, exactly.

    Args:
        raw: contiguous, of any type.
        dtype: what its bytes are: float32, float16 or bfloat16.
    """
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)
