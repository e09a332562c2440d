"""Runs one graph over several calls, operation by operation: every weight is read once, whatever the number of calls.

A validation makes dozens of calls (a prefill, then one decode step after another) whose tokens are known beforehand.
Taken call by call, each needs the whole model again; taken operation by operation, a model of any size costs one weight
at a time. Call c reads the cache that call c - 1 wrote: ``present.0.key`` of one call is ``past_key_values.0.key`` of the
next. So the operations between the first reader of a cache tensor and its writer stay together, as a *block*, and within
a block the calls run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One operation."""

    name: str
    inputs: tuple[str, ...]
    """Names it reads; an empty one is an input that is absent."""
    outputs: tuple[str, ...]
    """Names it writes; an empty one is not wanted."""
    compute: Callable[[list[Any]], Sequence[Any]]
    """Values of ``inputs`` -> values of ``outputs``."""


def lockstep(
    steps: Sequence[Step],
    calls: Sequence[Mapping[str, Any]],
    *,
    carry: Mapping[str, str],
    constant: Callable[[str, Step], Any],
    outputs: Collection[str] = (),
) -> Iterator[tuple[str, list[Any]]]:
    """Computes all steps for all calls.

    Args:
        steps: in an order in which everything is written before it is read.
        calls: input name -> value, per call. A call that is given what ``carry`` names begins a new run: it knows nothing of
            the call before it.
        carry: input -> the name whose value in the call before it is.
        constant: (name, its reader) -> value, for what neither a call nor a step defines; raises if there is none.
        outputs: names the caller wants of the last call; they are not dropped after their last use.

    Yields:
        (name, its value in every call), in the order of the steps, a block at a time.
    """
    done_with = _last_uses(steps, carry)
    shared: dict[str, Any] = {}
    """What does not depend on the call."""
    own: list[dict[str, Any]] = [dict(call) for call in calls]
    for block in blocks(steps, carry):
        read: dict[str, Any] = {}  # this block's weights

        def value(name: str, step: Step, call: int, read: dict[str, Any] = read) -> Any:
            if not name:
                return None
            if name in carry and name not in own[call]:
                return own[call - 1][carry[name]]
            for known in (own[call], shared, read):
                if name in known:
                    return known[name]
            read[name] = constant(name, step)
            return read[name]

        for call in range(len(calls)):
            for index in block:
                step = steps[index]
                invariant = not any(name in own[0] or name in carry for name in step.inputs)
                if invariant and call:
                    continue
                results = step.compute([value(name, step, call) for name in step.inputs])
                into = shared if invariant else own[call]
                into.update((name, item) for name, item in zip(step.outputs, results, strict=True) if name)
        for index in block:
            for name in steps[index].outputs:
                if name:
                    yield name, [shared[name]] * len(calls) if name in shared else [mine[name] for mine in own]
        for name in (name for index in block for name in done_with.get(index, ())):
            for mine in own if name not in outputs else own[:-1]:
                mine.pop(name, None)
            if name not in outputs:
                shared.pop(name, None)


def _last_uses(steps: Sequence[Step], carry: Mapping[str, str]) -> dict[int, list[str]]:
    """Index of a step -> the names nobody reads after it; a name nobody reads at all goes with the step that writes it."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys((*step.inputs, *step.outputs), index))
    for past, present in carry.items():
        if past in last and present in last:
            last[present] = max(last[present], last[past])  # the next call reads it under its other name
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        found.setdefault(index, []).append(name)
    return found


def blocks(steps: Sequence[Step], carry: Mapping[str, str]) -> list[range]:
    """The shortest runs of steps that do not part a cache tensor's first reader from its writer."""
    reader: dict[str, int] = {}
    writer: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in step.inputs:
            reader.setdefault(name, index)
        for name in step.outputs:
            writer[name] = index
    whole = [(reader[past], writer[present]) for past, present in carry.items() if past in reader and present in writer]
    inside = {index for begin, end in whole for index in range(begin + 1, end + 1)}
    starts = [index for index in range(len(steps)) if index not in inside]
    return [range(begin, end) for begin, end in zip(starts, [*starts[1:], len(steps)], strict=True)]
