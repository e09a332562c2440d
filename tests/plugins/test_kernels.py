"""The Triton kernels under the interpreter: against float64 oracles, over awkward shapes, between red zones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, Case, attention_case, cases, judge, masked_attention_case, norm_case
from torch import Tensor

pytest.importorskip("triton", reason="`triton` is not installed: pip install './plugins[interpreter]'")
pytest.importorskip("llama_export_plugins", reason="the plugins are not installed: pip install ./plugins")
from llama_export_plugins.kernels import attention, launch, loop, rms_norm, table
from llama_export_plugins.kernels.compile import compile_variant

SOURCE = Path(__file__).parents[2] / "plugins" / "kernels"
RED_ZONE = 64
"""Elements on either side of every buffer; a multiple of 16 bytes, so the alignment stays."""


def guarded(run: Any) -> Any:
    """Runs a launch on copies of its tensors that lie between red zones of NaN (int64: a huge position)."""

    def run_guarded(kernel: str, grid: Any, arguments: Sequence[Any], constexprs: Mapping[str, Any]) -> None:
        copies, written = [], []
        for item in arguments:
            if not isinstance(item, Tensor):
                copies.append(item)
                continue
            span = sum((size - 1) * stride for size, stride in zip(item.shape, item.stride(), strict=True)) + 1
            red = float("nan") if item.is_floating_point() else 1 << 40
            buffer = torch.full((span + 2 * RED_ZONE,), red, dtype=item.dtype)
            inner = buffer.as_strided(item.shape, item.stride(), RED_ZONE)
            inner.copy_(item)
            before = buffer.clone()
            copies.append(buffer[RED_ZONE:].as_strided(item.shape, item.stride(), RED_ZONE))
            written.append((item, inner, buffer, before))
        run(kernel, grid, copies, constexprs)
        for item, inner, buffer, before in written:
            changed, kept = inner.clone(), before.as_strided(item.shape, item.stride(), RED_ZONE)
            inner.copy_(kept)
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)), f"{kernel} wrote beyond a buffer"
            item.copy_(changed)

    return run_guarded


@pytest.fixture(autouse=True, scope="module")
def _red_zones() -> Iterator[None]:
    plain = loop.run_interpreted
    loop.run_interpreted = guarded(plain)
    yield
    loop.run_interpreted = plain


def check(case: Case) -> None:
    untouched = [item.clone() for item in case.inputs]
    results = loop.kernel_ops()[case.op](*case.inputs, *case.attributes)
    for verdict in judge(case, results):
        assert verdict.passed, verdict
    for before, after in zip(untouched, case.inputs, strict=True):
        assert torch.equal(before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8))


def test_the_cases_reach_every_variant() -> None:
    """Nothing is compiled that no case runs."""
    reached = set()
    run_ops = launch.ops(lambda variant, grid, arguments: reached.add(variant.name))
    for case in cases():
        run_ops[case.op](*case.inputs, *case.attributes)
    assert reached == {variant.name for variant in table.variants()}


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_kernel_against_the_oracle(case: Case) -> None:
    check(case)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_attention_of_random_shapes(data: st.DataObject) -> None:
    G = data.draw(st.integers(1, 3))
    H = G * data.draw(st.integers(1, 4))
    D = 2 * data.draw(st.integers(1, 40))
    S = data.draw(st.integers(1, 6))
    C = S + data.draw(st.integers(0, 20))
    past = data.draw(st.lists(st.integers(0, C - S), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    check(attention_case(dtype, past, S, H, G, D, C, fused=data.draw(st.booleans())))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_masked_attention_of_random_shapes(data: st.DataObject) -> None:
    G = data.draw(st.integers(1, 3))
    H = G * data.draw(st.integers(1, 4))
    D = 2 * data.draw(st.integers(1, 40))
    S = data.draw(st.integers(1, 20))
    lengths = data.draw(st.lists(st.integers(0, S), min_size=1, max_size=3))
    side, fused = data.draw(st.sampled_from(("right", "left", "holes"))), data.draw(st.booleans())
    check(masked_attention_case(data.draw(st.sampled_from(DTYPES)), lengths, S, H, G, D, side=side, fused=fused))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_norms_are_bit_equal_to_pytorch(dtype: torch.dtype) -> None:
    """Within one block the sums are in float32 and both round at the same two places."""
    case = norm_case("LlamaAddRMSNorm", dtype, 4, 192)
    got = loop.kernel_ops()[case.op](*case.inputs, *case.attributes)
    from kernel_cases import EAGER

    want = EAGER[case.op](*case.inputs, *case.attributes)
    assert torch.equal(got[1], want[1])
    assert (got[0] != want[0]).float().mean() < 0.01  # a sum taken in another order moves a tie now and then


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_beyond_the_cache_are_dropped_not_written(dtype: torch.dtype) -> None:
    """past_length + S > C is the caller's fault; it must not become a write into other memory."""
    case = attention_case(dtype, [0, 0], 3, 2, 1, 16, 4)
    inputs = [*case.inputs[:7], torch.tensor([3, 4])]
    inputs[5] = torch.zeros_like(inputs[5])
    inputs[6] = torch.zeros_like(inputs[6])
    _, present_key, present_value = loop.kernel_ops()[case.op](*inputs, *case.attributes)
    assert not present_key[1].any()
    assert not present_value[1].any()
    assert torch.equal(present_value[0, 0, 3], inputs[2][0, 0])


def test_a_query_that_sees_nothing_yields_zero() -> None:
    case = attention_case(torch.float32, [0], 1, 2, 1, 16, 4)
    inputs = [*case.inputs[:7], torch.tensor([-3])]
    attn_output, *_ = loop.kernel_ops()[case.op](*inputs, *case.attributes)
    assert torch.equal(attn_output, torch.zeros_like(attn_output))


def test_rows_do_not_see_each_other() -> None:
    together = attention_case(torch.float32, [5, 2, 9], 2, 4, 2, 32, 12)
    attn_output, *_ = loop.kernel_ops()[together.op](*together.inputs, *together.attributes)
    for b in range(3):
        alone = tuple(item[b : b + 1] for item in together.inputs)
        row, *_ = loop.kernel_ops()[together.op](*alone, *together.attributes)
        assert torch.equal(row[0], attn_output[b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_a_row_gets_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype, tokens: int) -> None:
    """Whatever the neighbours are and however long: the pieces of the cache follow from its capacity alone."""
    case = attention_case(dtype, [150, 3, 270], tokens, 4, 2, 64, 300)
    run = loop.kernel_ops()[case.op]
    together = run(*case.inputs, *case.attributes)[0]
    for row in range(3):
        alone = run(*(tensor[row : row + 1] for tensor in case.inputs), *case.attributes)[0]
        assert torch.equal(alone[0], together[row])
    again = run(*case.inputs, *case.attributes)[0]
    assert torch.equal(again, together)


@pytest.mark.parametrize("fault", ["swapped cos and sin", "off by one position", "wrong group", "unscaled"])
def test_the_oracle_catches_a_wrong_kernel_call(fault: str) -> None:
    """The judge itself: a launch with one wrong argument fails the same check."""
    case = attention_case(torch.float32, [5, 2], 3, 4, 2, 32, 12)
    query, key, value, cos, sin, past_key, past_value, past_length = case.inputs
    H, G, D, scale = case.attributes
    if fault == "swapped cos and sin":
        cos, sin = sin, cos
    elif fault == "off by one position":
        past_length = past_length + 1
    elif fault == "wrong group":
        G = 1
        past_key, past_value = past_key[:, :1], past_value[:, :1]
        key, value = key[..., : int(D)], value[..., : int(D)]
    else:
        scale = 1.0
    results = loop.kernel_ops()[case.op](
        query, key, value, cos, sin, past_key, past_value, past_length, int(H), int(G), int(D), scale
    )
    attention_only = judge_first(case, results)
    assert not attention_only


@pytest.mark.parametrize("fault", ["mask ignored", "mask of another row", "mask shifted", "unscaled"])
def test_the_oracle_catches_a_wrong_masked_call(fault: str) -> None:
    case = masked_attention_case(torch.float32, [9, 3], 9, 4, 2, 32, side="left")
    *inputs, mask = case.inputs
    *heads, scale = case.attributes
    inputs[1], inputs[2] = inputs[1].nan_to_num(0.5), inputs[2].nan_to_num(0.5)
    wrong = {"mask ignored": mask * 0 + 1, "mask of another row": mask.flip(0), "mask shifted": mask.roll(1, 1)}
    results = loop.kernel_ops()[case.op](*inputs, wrong.get(fault, mask), *heads, 1.0 if fault == "unscaled" else scale)
    assert not judge(case, results)[0].passed


def judge_first(case: Case, results: Any) -> bool:
    """Whether the attention output passes, whatever the caches are."""
    expected = list(results)
    expected[1:] = [item.to(case.dtype) for item in case.oracle()[1:]]
    return judge(case, tuple(expected))[0].passed


def test_every_kernel_has_the_arguments_of_the_table() -> None:
    for kernel in table.KERNELS.values():
        function = getattr(attention if kernel.has_heads else rms_norm, kernel.name)
        names = [name for name, _ in kernel.arguments]
        assert list(function.arg_names)[: len(names)] == names


@pytest.mark.parametrize("dtype", table.DTYPES)
def test_every_even_head_dim_up_to_256_is_served_by_one_variant(dtype: str) -> None:
    for head_dim in range(2, 257, 2):
        variant = table.select("attention_split", dtype, head_dim)
        assert variant.width >= head_dim
        assert variant.masked == (head_dim not in table.EXACT_HEAD_DIMS[dtype])
        assert variant.width < 2 * head_dim or variant.width == min(table.PADDED_HEAD_DIMS)
    with pytest.raises(LookupError):
        table.select("attention_split", dtype, 258)


def test_the_installed_kernels_are_those_of_the_source_tree() -> None:
    installed = Path(loop.__file__).parent
    for file in SOURCE.glob("*.py"):
        assert (installed / file.name).read_bytes() == file.read_bytes(), f"{file.name}: pip install ./plugins again"


def test_the_interpreter_leaves_the_compiler_usable() -> None:
    """Twins are swapped in for a launch only, also when the launch fails."""
    from triton.runtime.jit import JITFunction

    with pytest.raises(TypeError):
        loop.run_interpreted("rms_norm", (1, 1, 1), (), {})
    assert isinstance(rms_norm.rms_norm, JITFunction)
    assert isinstance(attention.attend, JITFunction)
    loop.kernel_ops()["LlamaRMSNorm"](torch.ones(1, 16), torch.ones(16), 1e-5)
    assert compile_variant(table.select("rms_norm", "float32", 0), 80).asm["cubin"]
