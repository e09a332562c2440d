"""Several calls in lockstep give what they give one after the other, and nothing is computed or kept that is not needed."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from llama_export.parity.oracle.lockstep import Step, blocks, lockstep

STEPS = [
    Step("weight", ("w",), ("doubled",), lambda v: (v[0] * 2,)),
    Step("project", ("x", "doubled"), ("y",), lambda v: (v[0] * v[1],)),
    Step("size", ("past",), ("n",), lambda v: (len(v[0]),)),
    Step("append", ("past", "y"), ("present",), lambda v: ((*v[0], v[1]),)),
    Step("look", ("present", "n", ""), ("sum", ""), lambda v: (sum(v[0]) + v[1], None)),
    Step("again", ("past", "sum"), ("out",), lambda v: (sum(v[0]) - v[1],)),
]


def test_blocks_keep_a_cache_tensor_from_its_first_reader_to_its_writer_together() -> None:
    assert blocks(STEPS, {"past": "present"}) == [range(0, 1), range(1, 2), range(2, 4), range(4, 5), range(5, 6)]
    assert blocks(STEPS, {}) == [range(i, i + 1) for i in range(6)]


@hypothesis.given(st.lists(st.integers(-9, 9), min_size=1, max_size=5))
def test_calls_in_lockstep_equal_calls_in_turn(inputs: list[int]) -> None:
    reads: list[str] = []

    def constant(name: str, _: Step) -> int:
        reads.append(name)
        return 3

    calls: list[dict[str, Any]] = [{"x": x} for x in inputs]
    calls[0]["past"] = (1,)
    found = dict(lockstep(STEPS, calls, carry={"past": "present"}, constant=constant, outputs=("out", "present")))
    past: tuple[int, ...] = (1,)
    for call, x in enumerate(inputs):
        y = x * 6
        total = sum(past) + y + len(past)
        assert found["y"][call] == y
        assert found["out"][call] == sum(past) - total
        past = (*past, y)
        assert found["present"][call] == past
    assert reads == ["w"], "a weight is read once, whatever the number of calls"
    assert found["doubled"] == [6] * len(inputs)


def test_a_call_that_is_given_a_cache_begins_a_run_of_its_own() -> None:
    """Two runs in one lockstep: each gives what it gives alone, and the weight is read once for both."""
    reads: list[str] = []

    def constant(name: str, _: Step) -> int:
        reads.append(name)
        return 3

    first = [{"x": 1, "past": (5,)}, {"x": 2}]
    second = [{"x": 4, "past": ()}, {"x": 1}, {"x": 7}]
    alone = [dict(lockstep(STEPS, calls, carry={"past": "present"}, constant=constant)) for calls in (first, second)]
    reads.clear()
    both = dict(lockstep(STEPS, [*first, *second], carry={"past": "present"}, constant=constant))
    assert both == {name: alone[0][name] + alone[1][name] for name in both}
    assert reads == ["w"]


def test_what_nobody_defines_is_the_callers_error() -> None:
    def constant(name: str, step: Step) -> int:
        raise KeyError(f"{step.name} reads {name}")

    with pytest.raises(KeyError, match="weight reads w"):
        list(lockstep(STEPS, [{"x": 1, "past": ()}], carry={}, constant=constant))
