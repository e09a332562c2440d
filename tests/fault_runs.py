"""Puts every fault into a bundle's copy and asks the validator: found? where? A validator is worth what it would find."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fault_catalogue import (
    EQUIVALENT,
    FAULTS,
    KERNELS,
    ROUNDINGS,
    NotApplicable,
    Place,
    copy_bundle,
    inject,
    inject_equivalent,
    inject_rounding,
)

from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.errors import ConfigError
from llama_export.graph.io import INTERFACES
from llama_export.parity.judge import ValidateConfig
from llama_export.parity.report.result import Stage
from llama_export.parity.stages.causal import STAGES
from llama_export.parity.stages.causal_validator import CausalValidator
from llama_export.parity.stages.ops import op_stage
from llama_export.parity.validate import run_stage

_STAGES = ("graph/rope", "graph/float64-bodies")
"""What judges a fault of meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRun:
    """One fault in one model."""

    fault: str
    kind: str
    """``meaning`` (judged in float64), ``rounding`` (judged op by op at every dtype) or ``equivalent`` (no fault)."""
    not_applicable: str | None = None
    """Why this model cannot have it."""
    detected_by: tuple[str, ...] = ()
    """Stages that failed."""
    injected: Place | None = None
    named: Place | None = None
    """What the report says; layers of a rounding fault are all, so there only the op counts."""

    @property
    def detected(self) -> bool:
        """Whether any stage failed."""
        return bool(self.detected_by)

    @property
    def layer_right(self) -> bool:
        """Whether the report names the layer."""
        return self.injected is not None and self.named is not None and self.injected.layer == self.named.layer

    @property
    def op_right(self) -> bool:
        """Whether the report names the op."""
        return self.injected is not None and self.named is not None and self.named.op in self.injected.op.split(" or ")


def run_faults(bundle: Bundle, seed: int, log: Callable[[str], None] = lambda line: None) -> Iterator[FaultRun]:
    """Every fault and every harmless change, each in a fresh copy.

    Args:
        bundle: a sound causal LM; not modified.
        seed: chooses layers, rows and bits.

    Raises:
        ConfigError: a head without a cache.
    """
    if not INTERFACES[bundle.task].has_cache:
        raise ConfigError(
            "the faults are those of a causal LM",
            details={"got": bundle.task, "expected": "causal-lm"},
            hint="validate this bundle without --faults",
        )
    sound = _validator(bundle)
    for number, name in enumerate(FAULTS):
        rng = np.random.default_rng([seed, number])
        yield _judged(sound, name, "meaning", partial(inject, name=name, rng=rng), _STAGES)
    for name in ROUNDINGS:
        yield _judged(sound, name, "rounding", partial(inject_rounding, name=name), ("ops/bodies",))
    used = set(bundle.ops)
    for name, functions in KERNELS.items():
        op = name.partition("(")[2].rstrip(")")
        if op not in used:
            yield FaultRun(fault=name, kind="rounding", not_applicable=f"no {op} in this graph")
            continue
        (stage,) = run_stage("ops/kernels", op_stage("kernels", functions), sound)
        yield _result(name, "rounding", Place(None, op), [stage])
    for number, name in enumerate(EQUIVALENT):
        rng = np.random.default_rng([seed, 1000 + number])
        yield _judged(sound, name, "equivalent", partial(inject_equivalent, name=name, rng=rng), _STAGES)


def _validator(bundle: Bundle) -> CausalValidator:
    context = bundle.config.max_length
    prompt = min(16, context - 8)
    if prompt < 8:
        raise ConfigError(
            "the model has too few positions for a fault to show",
            details={"got": context, "expected": "at least 16"},
            hint="choose another checkpoint",
        )
    return CausalValidator(bundle, ValidateConfig(steps=4, prompt_tokens=prompt))


def _judged(
    sound: CausalValidator, name: str, kind: str, change: Callable[[Bundle], Place | None], stages: tuple[str, ...]
) -> FaultRun:
    folder = Path(tempfile.mkdtemp(prefix="llama-export-fault-"))
    try:
        copy = copy_bundle(sound.bundle, folder / "bundle")
        try:
            where = change(copy)
        except NotApplicable as reason:
            return FaultRun(fault=name, kind=kind, not_applicable=str(reason))
        validator = _validator(load_bundle(copy.folder, ignore_hashes=True))
        # The oracle is the checkpoint's, and the copy has the same checkpoint: traced once.
        validator.__dict__["program"] = sound.program
        found = [stage for stage_name in stages for stage in run_stage(stage_name, STAGES[stage_name], validator)]
        return _result(name, kind, where, found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _result(name: str, kind: str, where: Place | None, stages: list[Stage]) -> FaultRun:
    failed = [stage for stage in stages if stage.verdict == "fail"]
    known: list[Any] = [stage.first_divergence for stage in failed if stage.first_divergence]
    return FaultRun(
        fault=name,
        kind=kind,
        detected_by=tuple(stage.name for stage in failed),
        injected=where,
        named=Place(known[0]["layer"], known[0]["op"]) if known else None,
    )


def summary(runs: list[FaultRun]) -> dict[str, Any]:
    """Totals over the faults that could be injected; harmless changes are counted apart."""
    ran = [run for run in runs if run.not_applicable is None]
    faults = [run for run in ran if run.kind != "equivalent"]
    harmless = [run for run in ran if run.kind == "equivalent"]
    return {
        "kinds": len({run.fault for run in faults}),
        "injected": len(faults),
        "detected": sum(run.detected for run in faults),
        "layer_right": sum(run.layer_right for run in faults),
        "op_right": sum(run.op_right for run in faults),
        "harmless": len(harmless),
        "harmless_reported": sum(run.detected for run in harmless),
        "not_applicable": sorted({run.fault for run in runs} - {run.fault for run in ran}),
    }
