"""What the results of a causal LM must not depend on, as pairs of runs that must give the same.

Each check is asked of the graph in float64 and of onnxruntime. It names runs; who runs them, and how much they may differ,
is the stage's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_export.parity.calls import Run, call
from llama_export.parity.stages.causal_validator import CausalValidator

POISON = 1e3
"""What the standard bodies and onnxruntime must tolerate in cache entries nobody sees: they multiply them by zero."""


@dataclass(frozen=True, slots=True)
class Invariance:
    """Runs whose rows, all together, must equal the rows of others."""

    got: list[Run]
    want: list[Run]
    said: str
    """In words."""


def neighbours(v: CausalValidator) -> Invariance:
    """A padded batch of rows of different length, and every row as it stands there, alone."""
    rows = v.ragged(v.prompt, 10)
    batch = rows.calls()
    alone = [
        [
            replace(
                one, input_ids=one.input_ids[[row]], sequence_length=one.sequence_length[[row]], logits_index=one.logits_index[[row]]
            )
            for one in batch
        ]
        for row in range(len(rows.ids))
    ]  # fmt: skip
    lengths = ", ".join(map(str, rows.prompts))
    return Invariance(
        [Run(batch, v.capacity)],
        [Run(calls, v.capacity) for calls in alone],
        f"rows of {lengths} tokens in one padded batch against each row alone",
    )


def padding(v: CausalValidator) -> Invariance:
    """A row padded with arbitrary tokens, and the same row without padding."""
    length = max(1, v.prompt // 2)
    ids = v.random_ids(v.prompt + 4, v.config.seed + 50)
    rest = [call(f"step {at}", [ids[length + at : length + at + 1]]) for at in range(4)]
    return Invariance(
        [Run([call("prefill", [ids[: v.prompt]], [length]), *rest], v.capacity)],
        [Run([call("prefill", [ids[:length]]), *rest], v.capacity)],
        f"{length} tokens padded to {v.prompt} against the same without padding, prefill and 4 steps",
    )


def poisoned(v: CausalValidator) -> Invariance:
    """Cache entries at or past the valid length hold a large number."""
    calls = v.ragged(v.prompt, 60).calls()
    return Invariance(
        [Run(calls, v.capacity, POISON)],
        [Run(calls, v.capacity)],
        f"cache entries past the valid length hold {POISON:g} against zeros, ragged prefill and 4 steps",
    )


def capacity(v: CausalValidator) -> Invariance:
    """A cache that just holds the tokens, and a larger one."""
    rows = v.ragged(v.prompt, 70)
    least, calls = rows.longest, rows.calls()
    more = min(least + 29, v.llama.max_length)
    return Invariance([Run(calls, least)], [Run(calls, more)], f"a cache of {least} slots against one of {more}")


INVARIANCES: dict[str, Callable[[CausalValidator], Invariance]] = {
    "batch-neighbours": neighbours,
    "padding": padding,
    "poisoned-cache": poisoned,
    "cache-capacity": capacity,
}
