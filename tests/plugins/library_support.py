"""What the tests of the plugin library share: random nodes, the limits of their results, and builds from changed sources."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_export.ops.table import OP_SPECS
from llama_export.ops.torch_ops import EAGER

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "plugins"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

FLOAT32_LIMIT = 1e-5
"""Largest difference from float64, relative to the largest value."""
NOISE_FACTOR = 2.0
"""16-bit results: relative L2 error, in units of what PyTorch itself loses at that dtype."""


def require_plugins() -> None:
    """Skips a test file where the plugin library or what runs its kernels on a CPU is not installed."""
    for module in ("triton", "llama_export_plugins"):
        pytest.importorskip(module, reason=f"`{module}` is not installed: pip install './plugins[interpreter]'")


@dataclass(frozen=True, slots=True)
class Node:
    """One fused op with its inputs and attribute values."""

    op: str
    inputs: tuple[Tensor, ...]
    attributes: tuple[int | float, ...]

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) of each input."""
        return [(tuple(tensor.shape), tensor.dtype) for tensor in self.inputs]

    def eager(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """PyTorch's result, with all floats at ``dtype`` if given."""
        inputs = [
            tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor for tensor in self.inputs
        ]
        result = EAGER[self.op](*inputs, *self.attributes)
        return result if isinstance(result, tuple) else (result,)


def norm_node(op: str, dtype: torch.dtype, *shape: int, magnitude: float = 1.0, seed: int = 0) -> Node:
    """A norm of random hidden states of ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    count = len(OP_SPECS[op].inputs) - 1
    hidden = [(magnitude * torch.randn(*shape, generator=generator)).to(dtype) for _ in range(count)]
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    return Node(op, (*hidden, weight), (1e-5,))


def attention_node(
    dtype: torch.dtype,
    *,
    new_tokens: int,
    past: tuple[int, ...],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    capacity: int = 24,
    poison: bool = True,
    seed: int = 0,
) -> Node:
    """An attention of ``new_tokens`` per row after ``past`` cached ones.

    Args:
        heads: query heads, key/value heads.
        poison: whether the cache past its valid length is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    batch = len(past)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = (
        random(batch, new_tokens, count * head_dim).to(dtype) for count in (num_heads, num_kv_heads, num_kv_heads)
    )
    angles = 10 * random(batch, new_tokens, head_dim // 2)
    cache = [random(batch, num_kv_heads, capacity, head_dim).to(dtype) for _ in ("key", "value")]
    for row, length in enumerate(past):
        for tensor in cache:
            if poison:
                tensor[row, :, length:] = torch.nan
    inputs = (query, key, value, angles.cos(), angles.sin(), *cache, torch.tensor(past))
    return Node("LlamaAttention", inputs, (num_heads, num_kv_heads, head_dim, float(head_dim) ** -0.5))


def masked_attention_node(
    dtype: torch.dtype,
    *,
    mask: list[list[int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    seed: int = 0,
) -> Node:
    """Attention over a padded batch; keys and values of padding are NaN.

    Args:
        mask: 0 where there is padding.
        heads: query heads, key/value heads.
    """
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.tensor(mask)
    batch, tokens = attention_mask.shape
    query, key, value = (
        torch.randn(batch, tokens, count * head_dim, generator=generator).to(dtype)
        for count in (heads[0], heads[1], heads[1])
    )
    for tensor in (key, value):
        tensor.masked_fill_((attention_mask == 0).unsqueeze(-1), torch.nan)
    angles = 10 * torch.randn(batch, tokens, head_dim // 2, generator=generator)
    inputs = (query, key, value, angles.cos(), angles.sin(), attention_mask)
    return Node("LlamaMaskedAttention", inputs, (*heads, head_dim, float(head_dim) ** -0.5))


def check_outputs(node: Node, got: tuple[Tensor, ...]) -> None:
    """The results of a node against float64, where float64 is finite; elsewhere (poison) nothing may have changed.

    Raises:
        AssertionError: an output is missing, of another shape or dtype, or off by more than the limits.
    """
    want, baseline = node.eager(torch.float64), node.eager()
    assert len(got) == len(want)
    for name, ours, exact, eager in zip(OP_SPECS[node.op].outputs, got, want, baseline, strict=True):
        assert (ours.shape, ours.dtype) == (eager.shape, eager.dtype), name.name
        valid = exact.isfinite()
        assert torch.equal(ours.isfinite(), valid), f"{name.name}: other elements are finite"
        ours64, exact, eager64 = ours.double()[valid], exact[valid], eager.double()[valid]
        if exact.numel() == 0:
            continue
        if ours.dtype == torch.float32:
            error = float((ours64 - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
            assert error <= FLOAT32_LIMIT, f"{name.name}: relative error {error:.1e}"
        else:
            error, noise = (float((x - exact).norm() / exact.norm()) for x in (ours64, eager64))
            assert error <= NOISE_FACTOR * noise, f"{name.name}: relative L2 {error:.1e}, PyTorch's own {noise:.1e}"


def write_generated(folder: Path, chip: int = 89) -> Path:
    """What kernels/compile.py generates, for one chip, with a line of text in the place of each kernel's machine code: the
    stand-in for the driver needs to tell images apart, not to run them, and nothing has to be compiled."""
    from llama_export_plugins import variants as installed
    from llama_export_plugins.kernels import compile as compiler
    from llama_export_plugins.kernels.table import variants

    by_key = {(item.kernel, item.dtype, item.width, item.masked): item for item in variants()}
    (folder / "images").mkdir(parents=True)
    images = []
    for item in installed()["images"]:
        if item["compute_capability"] != chip or item["ptx"]:
            continue
        variant = by_key[item["kernel"], item["dtype"], item["width"], item["masked"]]
        content = f"// in the place of {variant.name}\0".encode()
        (folder / "images" / variant.name).write_bytes(content)
        images.append(
            compiler.Image(
                variant, chip, False, item["entry"], variant.name, hashlib.sha256(content).hexdigest(), len(content),
                item["shared"], item["warps"], item["registers"], item["frame"],
            )
        )  # fmt: skip
    (folder / "kernel_arguments.h").write_text(compiler.arguments_header())
    (folder / "kernel_table.h").write_text(compiler.table_header(images))
    (folder / "kernel_images.S").write_text(compiler.assembly(images, folder / "images"))
    (folder / "variants.json").write_text(compiler.variants_json(images, [chip], "none"))
    return folder


def source_abi() -> int:
    """The ABI number of the sources, where CMakeLists.txt reads it too."""
    text = (PLUGINS / "llama_export_plugins" / "__init__.py").read_text(encoding="utf-8")
    (number,) = re.findall(r"^ABI = (\d+)$", text, re.M)
    return int(number)


def compile_objects(sources: Sequence[Path], generated: Path, folder: Path, extra: Sequence[str] = ()) -> list[Path]:
    """Compiles C++ and assembler files with plain g++, as CMakeLists.txt does, with the headers beside the first and
    ``extra`` options."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-exceptions",
        '-DLLAMA_EXPORT_PLUGINS_VERSION="0.1.0"', f"-DLLAMA_EXPORT_PLUGINS_ABI={source_abi()}",
        f"-I{PLUGINS / 'include'}", f"-I{sources[0].parent}", f"-I{generated}", *extra,
    ]  # fmt: skip

    def compile_one(path: Path) -> Path:
        target = folder / f"{path.name}.o"
        result = subprocess.run(["g++", *flags, "-c", str(path), "-o", str(target)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link_library(objects: Sequence[Path], generated: Path, folder: Path) -> Path:
    """The plugin library of some objects; ``variants.json`` lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libllama_export_plugins.so"
    exports = f"-Wl,--version-script={PLUGINS / 'src' / 'exports.map'}"
    subprocess.run(["g++", "-shared", *map(str, objects), exports, "-ldl", "-o", str(library)], check=True)
    shutil.copy(generated / "variants.json", folder)
    return library


def run_python(code: str, *arguments: object, python: str = sys.executable, **environment: str) -> str:
    """Runs Python code in a process of its own and returns what it printed.

    Raises:
        AssertionError: it failed; with what it printed.
    """
    result = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def spec_fields(op: str) -> Mapping[str, Any]:
    """Attribute -> PluginFieldType that the op table implies."""
    return {item.name: {"int": 5, "float": 1}[item.type] for item in OP_SPECS[op].attributes}
