"""The compiled kernels on a CPU: the library's own PTX through ``enqueue``, that of the other chips as Triton makes it, and
faults put into the text, each of which has to be found."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Case, attention_case, cases, judge, masked_attention_case, norm_case
from library_support import require_plugins

require_plugins()

from llama_export_plugins.harness import PTX_ONLY, PluginLibrary, enqueue_ops  # noqa: E402
from llama_export_plugins.kernels import compiled, loop  # noqa: E402
from llama_export_plugins.kernels.compile import compile_variant  # noqa: E402
from llama_export_plugins.kernels.launch import ops  # noqa: E402
from llama_export_plugins.kernels.table import CHIPS, PORTABLE_CHIP, variant_named  # noqa: E402
from llama_export_plugins.ptx import PtxError, Traffic  # noqa: E402

LONGEST = "C131072"
"""Eight seconds each; `make kernels` runs them too."""


@functools.cache
def library() -> PluginLibrary:
    """On a GPU that the library has PTX for, and nothing else."""
    found = PluginLibrary(compute_capability=PTX_ONLY)
    if found.variants["portable_chip"] is None:
        pytest.skip("this library was built without PTX: LLAMA_EXPORT_CHIPS")
    return found


def check(case: Case, found_ops: Any) -> None:
    for verdict in judge(case, found_ops[case.op](*case.inputs, *case.attributes)):
        assert verdict.passed, verdict


@pytest.mark.parametrize("case", [case for case in cases() if LONGEST not in case.name], ids=lambda case: case.name)
def test_the_librarys_ptx_against_the_oracle(case: Case) -> None:
    check(case, enqueue_ops(library=library()))


def test_what_runs_is_what_the_library_gave_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def interpreted(*_: Any) -> None:
        raise AssertionError("the source was run")

    monkeypatch.setattr(loop, "run_interpreted", interpreted)
    stand_in = library().stand_in
    assert stand_in is not None
    before = len(stand_in.calls)
    case = norm_case("LlamaRMSNorm", torch.float16, 3, 64)
    check(case, enqueue_ops(library=library()))
    images = [call.details["image"] for call in stand_in.calls[before:] if call.function == "cuLaunchKernel"]
    assert [(image["kernel"], image["ptx"]) for image in images] == [("rms_norm", True)]


FEW = (
    norm_case("LlamaRMSNorm", torch.bfloat16, 5, 2048),
    norm_case("LlamaAddRMSNorm", torch.float32, 3, 100),
    attention_case(torch.bfloat16, [30, 2], 70, 4, 2, 64, 110),
    attention_case(torch.float16, [30], 40, 4, 1, 128, 80),
    attention_case(torch.bfloat16, [200, 130], 1, 8, 2, 128, 210),
    attention_case(torch.float32, [20], 9, 2, 1, 64, 40),
    masked_attention_case(torch.float16, [70, 40], 70, 2, 1, 64),
    masked_attention_case(torch.bfloat16, [9, 4], 9, 4, 2, 80),
)
"""Every kernel, products of both shapes that the newer tensor cores have, blocks that skip their tile's last keys."""


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip != PORTABLE_CHIP])
def test_what_triton_compiles_for_every_other_chip(chip: int) -> None:
    for case in FEW:
        check(case, ops(compiled.run_compiled(chip)))


def test_the_chips_differ_in_their_tensor_cores() -> None:
    """Else the test above would be one test seven times."""
    texts = {chip: _text("attention_prefill_bfloat16_128", chip) for chip in (80, 90, 100)}
    assert "mma.sync" in texts[80]
    assert "wgmma.mma_async" in texts[90]
    assert "tcgen05.mma" in texts[100]


# ---- faults -------------------------------------------------------------------------------------------------------


@functools.cache
def _text(name: str, chip: int) -> str:
    return str(compile_variant(variant_named(name), chip).asm["ptx"])


def outcome(case: Case, name: str, chip: int, text: str) -> str:
    """``right``, ``wrong``, or the sentence of a refusal, of a case with one kernel's text replaced."""
    try:
        run_changed = compiled.run_compiled(chip, instead={name: text})
        results = ops(run_changed)[case.op](*case.inputs, *case.attributes)
    except PtxError as err:
        return str(err)
    return "right" if all(verdict.passed for verdict in judge(case, results)) else "wrong"


DECODE = attention_case(torch.bfloat16, [200, 130], 1, 8, 2, 128, 210)
PREFILL = attention_case(torch.bfloat16, [30], 70, 4, 2, 128, 110)
Edit = Callable[[str], str]


def without(pattern: str, which: int) -> Edit:
    """Drops the occurrence ``which`` of a pattern."""

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text))[which]
        return text[: found.start()] + text[found.end() :]

    return edit


def instead(pattern: str, replacement: str, *, count: int = 1) -> Edit:
    """Replaces the first occurrence of a pattern; with ``count=0`` all."""
    return lambda text: re.sub(pattern, replacement, text, count=count)


FAULTS: dict[str, tuple[Case, str, int, Edit, str]] = {
    "no wait for the copies": (
        DECODE, "attention_split_bfloat16_128", 80, without(r"cp\.async\.wait_group[^;]*;", 0), "on its way"
    ),
    "no barrier after the queries are stored": (
        DECODE, "attention_split_bfloat16_128", 80, without(r"bar\.sync[^;]*;", 0), "race"
    ),
    "no barrier within the sum of squares": (
        norm_case("LlamaRMSNorm", torch.bfloat16, 5, 2048), "rms_norm_bfloat16_up_to_2048", 80,
        without(r"bar\.sync[^;]*;", -1), "race"
    ),
    "a store without its mask": (
        norm_case("LlamaRMSNorm", torch.bfloat16, 5, 2000), "rms_norm_bfloat16_up_to_2048", 80,
        instead(r"@%p\d+ (st\.global\.v4)", r"\1", count=0), "leave the launch's memory"
    ),
    "a load without its mask": (
        norm_case("LlamaRMSNorm", torch.bfloat16, 5, 2000), "rms_norm_bfloat16_up_to_2048", 80,
        instead(r"@%p\d+ (ld\.global\.v4)", r"\1", count=0), "leave the launch's memory"
    ),
    "tiles of keys not turned": (
        DECODE, "attention_split_bfloat16_128", 80, instead(r"x4\.trans\.shared", "x4.shared"), "wrong"
    ),
    "another softmax": (DECODE, "attention_split_bfloat16_128", 80, instead("0f3FB8AA3B", "0f3FC8AA3B"), "wrong"),
    "parameters in another order": (
        DECODE, "attention_split_bfloat16_128", 80,
        lambda text: text.replace("[attention_split_param_1]", "[p]").replace("[attention_split_param_2]", "[attention_split_param_1]").replace("[p]", "[attention_split_param_2]"),
        "wrong",
    ),
    "operands of a product swapped in shared memory, 9.0": (
        PREFILL, "attention_prefill_bfloat16_128", 90,
        instead(r"(wgmma\.mma_async\S+ \{[^}]*\}, )(%rd\d+), (%rd\d+)", r"\1\3, \2"), "wrong"
    ),
    "a product not waited for, 9.0": (
        PREFILL, "attention_prefill_bfloat16_128", 90, without(r"wgmma\.wait_group[^;]*;", 0), "was waited for"
    ),
    "another major axis of an operand, 10.0": (
        PREFILL, "attention_prefill_bfloat16_128", 100, instead("136381584", str(136381584 ^ 1 << 16)), "before it was written"
    ),
    "no barrier before a product of other warps' queries, 10.0": (
        PREFILL, "attention_prefill_bfloat16_128", 100, without(r"bar\.sync[^;]*;", 7), "race"
    ),
    "a sum read before its product is done, 10.0": (
        PREFILL, "attention_prefill_bfloat16_128", 100,
        without(r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", 0), "product"
    ),
    "a product never committed, 10.0": (
        PREFILL, "attention_prefill_bfloat16_128", 100, without(r"@%p\d+ tcgen05\.commit[^;]*;", 0), "nothing will ever arrive"
    ),
    "tensor memory not freed, 10.0": (
        PREFILL, "attention_prefill_bfloat16_128", 100, without(r"@%p\d+ tcgen05\.dealloc[^;]*;", 0), "not freed"
    ),
    "an instruction that nobody knows": (
        DECODE, "attention_split_bfloat16_128", 80, instead(r"ex2\.approx\.ftz\.f32", "tanh.approx.f32"), "not understood"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_compiled_code_is_found(fault: str) -> None:
    case, name, chip, edit, expected = FAULTS[fault]
    text = _text(name, chip)
    assert outcome(case, name, chip, text) == "right"
    assert edit(text) != text
    found = outcome(case, name, chip, edit(text))
    assert found != "right"
    assert expected in found, found


# ---- what the compiled code asks of the machine --------------------------------------------------------------------


def traffic_of(case: Case, chip: int, *kernels: str) -> Traffic:
    """Of those launches of a case."""
    found, traffic = compiled.counted_ops(chip, kernels)
    found[case.op](*case.inputs, *case.attributes)
    return traffic


@pytest.mark.parametrize("hidden", [4096, 8192])
@pytest.mark.parametrize(("op", "kernel", "tensors"), [("LlamaRMSNorm", "rms_norm", 2), ("LlamaAddRMSNorm", "add_rms_norm", 4)])  # fmt: skip
def test_norms_move_each_byte_once_and_whole_sectors(op: str, kernel: str, tensors: int, hidden: int) -> None:
    rows = 8
    traffic = traffic_of(norm_case(op, torch.bfloat16, rows, hidden), 90, kernel)
    weights = rows * hidden * 2  # each row reads them, from the cache
    assert sum(traffic.global_bytes.values()) == tensors * rows * hidden * 2 + weights
    assert traffic.sector_use == 1


def test_decode_reads_each_key_and_value_once_for_its_whole_group() -> None:
    past, G, D = 1023, 2, 128
    case = attention_case(torch.bfloat16, [past], 1, 8, G, D, past + 1)
    traffic = traffic_of(case, 90, "attention_split")
    cache = 2 * (past + 1) * G * D * 2
    pieces = 8
    queries, length = pieces * G * 4 * D * 2, 8
    assert traffic.global_bytes["load"] <= cache + queries + pieces * G * 128 * length
    assert traffic.global_bytes["load"] >= cache + queries
    assert traffic.sector_use > 0.95


def test_prefill_multiplies_little_more_than_what_is_seen() -> None:
    S, H, G, D = 256, 8, 2, 128
    traffic = traffic_of(attention_case(torch.bfloat16, [0], S, H, G, D, S), 90, "attention_prefill")
    seen = S * (S + 1) // 2 * H
    assert traffic.multiplications >= 2 * seen * D
    # A tile is 32 tokens by 64 keys here: the diagonal costs half a tile more.
    assert traffic.multiplications <= 2 * seen * D * (1 + (32 + 64) / S)
