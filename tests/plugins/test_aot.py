"""Ahead-of-time compilation: what the PTX and the cubins say, and that the build's own checks refuse what they must."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="`triton` is not installed: pip install './plugins[interpreter]'")
plugins = pytest.importorskip("llama_export_plugins", reason="the plugins are not installed: pip install ./plugins")
from llama_export_plugins.kernels import compile as aot  # noqa: E402
from llama_export_plugins.kernels import table  # noqa: E402

CHIP = 89


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Some variants, for one chip."""
    wanted = ("rms_norm_float16_up_to_1024", "add_rms_norm_bfloat16_up_to_4096", "rms_norm_float32_up_to_any",
              "rotate_and_append_bfloat16_128", "attention_split_float16_64", "attention_split_bfloat16_96",
              "attention_split_float32_64", "attention_prefill_bfloat16_128", "attention_prefill_float32_128",
              "attention_combine_bfloat16_80")  # fmt: skip
    assert set(wanted) <= {variant.name for variant in table.variants()}
    return {
        variant.name: (variant, aot.compile_variant(variant, CHIP))
        for variant in table.variants()
        if variant.name in wanted
    }


def test_loads_are_vectors(compiled: dict[str, Any]) -> None:
    for name, (_, kernel) in compiled.items():
        ptx = kernel.asm["ptx"]
        wide = re.findall(
            r"(?:ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\S+ \[[^]]+\], \[[^]]+\], 0x10)", ptx
        )
        assert wide, f"{name}: no 16-byte load"
        model_scalars = re.findall(r"ld\.global\.b16\b", ptx)
        assert not model_scalars or "norm" in name, f"{name}: {len(model_scalars)} scalar loads"


def test_float32_has_no_tf32(compiled: dict[str, Any]) -> None:
    checked = [name for name in compiled if "float32" in name and "bfloat" not in name]
    assert len(checked) == 3
    for name in checked:
        assert "tf32" not in compiled[name][1].asm["ptx"]


def test_sixteen_bit_attention_uses_tensor_cores(compiled: dict[str, Any]) -> None:
    for name in ("attention_split_float16_64", "attention_split_bfloat16_96", "attention_prefill_bfloat16_128"):
        assert "mma.sync" in compiled[name][1].asm["ptx"]


def test_keys_and_values_are_copied_asynchronously(compiled: dict[str, Any]) -> None:
    """That says nothing about when the kernel waits for them: the next test does."""
    for name in ("attention_split_float16_64", "attention_split_bfloat16_96", "attention_prefill_bfloat16_128"):
        assert "cp.async.cg.shared.global" in compiled[name][1].asm["ptx"]


@pytest.mark.parametrize("chip", table.CHIPS)
@pytest.mark.parametrize(
    ("name", "in_flight", "buffers"),
    [
        # A block of keys and one of values are on their way while the blocks before them are computed with.
        ("attention_split_bfloat16_128", [2, 2], dict.fromkeys(table.CHIPS, 2)),
        # Nothing is on its way: each block waits for all copies. With one buffer the next copy cannot even begin before the
        # block has been read. 9.0 and 10.0 have two, but wait for all copies at the head of the loop too.
        ("attention_prefill_bfloat16_128", [0, 0], {**dict.fromkeys(table.CHIPS, 1), 90: 2, 100: 2}),
    ],
)
def test_which_kernels_load_keys_and_values_ahead(
    name: str, in_flight: list[int], buffers: dict[int, int], chip: int
) -> None:
    """Counted in Triton's GPU code: the copies that a loop leaves unfinished when it starts on a block (``async_wait``), and the
    blocks that shared memory has room for. These are facts of today's tiles and stages; a change of them changes this test."""
    code = aot.compile_variant(table.variant_named(name), chip).asm["ttgir"]
    assert waits_of_loops(code) == in_flight
    rooms = [int(room) for room in re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x64x128xbf16", code)]
    assert rooms == [buffers[chip]] * 4  # keys and values, of two loops: with a mask and without


def waits_of_loops(ttgir: str) -> list[int]:
    """For each loop, how many copies may be unfinished when its first wait is over."""
    found = []
    for loop in re.finditer(r"scf\.for ", ttgir):
        wait = re.search(r"async_wait[^\n]*\{num = (\d+) : i32\}|scf\.yield", ttgir[loop.end() :])
        assert wait is not None
        assert wait[1] is not None, "a loop that waits for no copy"
        found.append(int(wait[1]))
    return found


def test_a_short_row_is_read_once(compiled: dict[str, Any]) -> None:
    """hidden_states, residual and weight: 16 elements a thread of each, as vectors. (That they are, counted:
    ``test_ptx_kernels.py``. A row whose length is no multiple of 16 is read twice, in loops.)"""
    variant, kernel = compiled["add_rms_norm_bfloat16_up_to_4096"]
    vectors = re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"])
    per_thread = 4096 * 2 // 16 // (32 * variant.num_warps)
    assert len(vectors) == 3 * per_thread
    assert backward_branches(compiled["rms_norm_float32_up_to_any"][1].asm["ptx"])


def backward_branches(ptx: str) -> list[str]:
    """The branches to labels that were passed already: loops."""
    passed: set[str] = set()
    found = []
    for line in ptx.splitlines():
        if label := re.match(r"(\$L__BB\S+):", line):
            passed.add(label[1])
        elif (branch := re.search(r"bra(?:\.uni)?\s+(\$L__BB[^;\s]+)", line)) and branch[1] in passed:
            found.append(line)
    return found


def test_norms_leave_room_for_several_programs() -> None:
    """One that reads, one that reduces, one that writes: a single program on a multiprocessor would leave its memory idle."""
    listed = json.loads((plugins.library_path().parent / "variants.json").read_text(encoding="utf-8"))
    norms = [
        image
        for image in listed["images"]
        if "norm" in image["kernel"]
        and image["width"] in (4096, 8192)
        and image["dtype"] != "float32"
        and not image["ptx"]
    ]
    assert norms
    for image in norms:
        granted = -(-image["registers"] // 8) * 8
        at_once = 65536 // (granted * 32 * image["warps"])
        assert at_once >= 2, image


def test_checks_pass_and_registers_are_read(compiled: dict[str, Any]) -> None:
    for variant, kernel in compiled.values():
        registers, frame = aot.check_compiled(variant, CHIP, kernel)
        assert 16 <= registers <= 255
        assert frame <= table.FRAME_LIMIT


@dataclasses.dataclass
class Fake:
    """A compiled kernel with one thing changed."""

    asm: dict[str, Any]
    metadata: Any


def fake(kernel: Any, *, ptx: str | None = None, **metadata: Any) -> Fake:
    changed = type(
        "Metadata",
        (),
        {
            **{
                name: getattr(kernel.metadata, name)
                for name in ("shared", "global_scratch_size", "profile_scratch_size")
            },
            **metadata,
        },
    )
    return Fake({**kernel.asm, "ptx": ptx or kernel.asm["ptx"]}, changed)


def test_a_kernel_that_must_not_ship_is_refused(compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    variant, kernel = compiled["attention_split_float32_64"]
    with pytest.raises(aot.CompileError, match="shared memory"):
        aot.check_compiled(variant, CHIP, fake(kernel, shared=table.SHARED_MEMORY_LIMITS[CHIP] + 1))
    with pytest.raises(aot.CompileError, match="scratch"):
        aot.check_compiled(variant, CHIP, fake(kernel, global_scratch_size=8))
    with pytest.raises(aot.CompileError, match="tf32"):
        aot.check_compiled(variant, CHIP, fake(kernel, ptx=kernel.asm["ptx"] + "// mma.tf32"))
    with pytest.raises(aot.CompileError, match="the launcher passes"):
        aot.check_compiled(variant, CHIP, fake(kernel, ptx=kernel.asm["ptx"].replace(".param .f32", ".param .u32", 1)))
    monkeypatch.setattr(aot, "FRAME_LIMIT", -1)
    with pytest.raises(aot.CompileError, match="registers"):
        aot.check_compiled(variant, CHIP, kernel)


def test_a_table_that_is_not_the_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = table.select("rms_norm", "float32", 512)
    kernel = table.KERNELS["rms_norm"]
    swapped = dataclasses.replace(kernel, arguments=(kernel.arguments[1], kernel.arguments[0], *kernel.arguments[2:]))
    monkeypatch.setitem(aot.KERNELS, "rms_norm", swapped)
    with pytest.raises(aot.CompileError, match="the table says"):
        aot.compile_variant(variant, CHIP)


def test_chips_are_parsed() -> None:
    assert aot.parse_chips("") == list(table.CHIPS)
    assert aot.parse_chips("89,80") == [80, 89]
    for wrong in ("75", "sm_89", "8.9"):
        with pytest.raises(aot.CompileError, match="expected some of"):
            aot.parse_chips(wrong)


def test_generated_arguments_follow_the_table() -> None:
    header = aot.arguments_header()
    for kernel in table.KERNELS.values():
        (order,) = re.findall(rf'kKernel = "{kernel.name}".*?order\[\] = {{([^}}]*)}}', header, flags=re.DOTALL)
        assert [part.strip(" &") for part in order.split(",")] == [name for name, _ in kernel.arguments] + list(
            aot.SCRATCH
        )


def test_the_installed_library_has_every_variant_for_its_chips() -> None:
    document = plugins.variants()
    expected = sum(1 for _ in table.variants())
    for chip in document["chips"]:
        images = [image for image in document["images"] if image["compute_capability"] == chip and not image["ptx"]]
        assert len(images) == expected
    portable = [image for image in document["images"] if image["ptx"]]
    assert len(portable) == (expected if table.PORTABLE_CHIP in document["chips"] else 0)
    assert document["signatures"] == {
        name: [list(item) for item in kernel.arguments] for name, kernel in table.KERNELS.items()
    }


def test_compiling_one_chip_writes_what_the_build_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [variant for variant in table.variants() if variant.kernel == "rms_norm"]
    monkeypatch.setattr(aot, "variants", lambda: iter(few))
    images = aot.write_all(tmp_path, [80, CHIP], jobs=1)
    assert len(images) == len(few) * 3  # two cubins and PTX
    assembly = (tmp_path / "kernel_images.S").read_text()
    for image in images:
        file = tmp_path / "images" / image.file
        assert str(file.resolve()) in assembly
        assert file.stat().st_size == image.bytes
        assert file.read_bytes().endswith(b"\0") or not image.ptx
    document = json.loads((tmp_path / "variants.json").read_text())
    assert document["chips"] == [80, CHIP]
    assert (tmp_path / "kernel_table.h").read_text().count("llama_export_image_") == 2 * len(images)
