"""Between PyTorch and NumPy."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values. NumPy has no bfloat16: 16-bit values are widened, which changes none of them."""
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    array: NDArray[Any] = wide.numpy()
    return array
