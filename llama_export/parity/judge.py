"""What all stages share: limits and their reasons, models loaded once, verdicts, and the stage of an engine's structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from llama_export.bundle import Bundle
from llama_export.checkpoint import Checkpoint, load_checkpoint
from llama_export.engine import check_engine
from llama_export.errors import LlamaExportError, MissingDependencyError
from llama_export.parity.metrics import Difference
from llama_export.parity.result import Stage, Tolerance
from llama_export.plugins import find_library, kernels_installed

try:
    import torch

    from llama_export.model import load_reference
    from llama_export.model.heads import LlamaWithHead
    from llama_export.ops import OP_SPECS
    from llama_export.parity.evaluator import CustomOps
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err

FLOAT64_LIMIT = 1e-9
FLOAT64_WHY = "float64 rounding is 1e-16 per operation; anything above 1e-9 is a difference of meaning, not of rounding"
FLOAT32_LIMIT = 1e-5
FLOAT32_WHY = "float32 sums of a few thousand terms taken in another order differ by about 1e-6 of the largest value"
NOISE_L2, NOISE_MAX = 2.0, 4.0
NOISE_WHY = (
    "transformers' eager model at this dtype, on this input, against the same float64 reference, is the noise floor: "
    f"at most {NOISE_L2:g} x of it in relative L2 and {NOISE_MAX:g} x in the maximum"
)
KERNEL_LAYERS = 4
"""Layers whose ops the kernels compute; those of the others are eager. A larger model gets a sample, spread evenly."""
KERNEL_TOKENS = 17
"""Longest prompt of the kernel stages, tokens: the interpreter is slow, and 17 is no multiple of any tile."""
ENGINE_LIMITS = {"float32": FLOAT32_LIMIT, "float16": 1e-2, "bfloat16": 8e-2}
ENGINE_WHY = "8 to 10 units in the last place of the dtype (2^-24, 2^-11, 2^-8), relative to the largest value"


class NotRun(Exception):
    """A stage cannot run here; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateConfig:
    """Settings of one validation."""

    stages: tuple[str, ...] = ()
    """Names or prefixes of the stages to run; empty: all."""
    require: tuple[str, ...] = ()
    """Names or prefixes that must have run, else the verdict is fail."""
    steps: int = 32
    """Teacher-forced decode steps."""
    prompt_tokens: int = 48
    """Length of the prefill, tokens; shortened for tiny contexts."""
    seed: int = 0
    """Of the token sequences."""


class Validator:
    """What the stages share: models, loaded once when a stage first asks."""

    def __init__(self, bundle: Bundle, config: ValidateConfig) -> None:
        self.bundle = bundle
        self.config = config
        self.llama = bundle.config

    @property
    def follows_length(self) -> bool:
        """Whether RoPE's frequencies depend on the length of the row, so that a schedule of calls is part of the result."""
        return self.llama.rope.rope_type in ("dynamic", "longrope")

    def random_ids(self, count: int, seed: int) -> list[int]:
        """Uniform token ids: no special structure that would hide a wrong position or head."""
        return [int(i) for i in np.random.default_rng(seed).integers(0, self.llama.vocab_size, count)]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The bundle holds the checkpoint it came from; unknown config keys were vouched for at export."""
        allowed = tuple(self._config_keys())
        return load_checkpoint(self.bundle.folder, allowed, task=self.bundle.task)

    def _config_keys(self) -> Iterator[str]:
        from llama_export.config import load_json_object

        yield from load_json_object(self.bundle.folder / "config.json")

    def load_reference(self, dtype: torch.dtype) -> LlamaWithHead:
        """The reference at a dtype."""
        return load_reference(self.checkpoint, dtype)

    def transformers_model(self, dtype: torch.dtype) -> Any:
        """Hugging Face's eager model from the bundle's own files."""
        try:
            import transformers
        except ModuleNotFoundError as err:
            raise MissingDependencyError("transformers", "parity") from err
        transformers.utils.logging.disable_progress_bar()
        before = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # a head that the bare model does not load is no news here
        try:
            return (
                getattr(transformers, _HUGGING_FACE[self.bundle.task])
                .from_pretrained(self.bundle.folder, dtype=dtype, attn_implementation="eager", local_files_only=True)
                .eval()
            )
        finally:
            transformers.utils.logging.set_verbosity(before)


_HUGGING_FACE = {
    "causal-lm": "LlamaForCausalLM",
    "sequence-classification": "LlamaForSequenceClassification",
    "token-classification": "LlamaForTokenClassification",
    "question-answering": "LlamaForQuestionAnswering",
    "feature-extraction": "LlamaModel",
}


# ---- verdicts ------------------------------------------------------------------------------------------------------


def judge(
    name: str,
    found: Difference,
    *,
    limit: float,
    why: str,
    reason: str,
    series: Mapping[str, Sequence[float]] | None = None,
    **metrics: Any,
) -> Stage:
    """A verdict on one relative error."""
    ok = found.nonfinite == 0 and found.relative <= limit
    return Stage(
        name=name,
        verdict="pass" if ok else "fail",
        reason=reason,
        metrics={
            "error": found.relative,
            "max_abs": found.max_abs,
            "largest": found.largest,
            "relative_l2": found.relative_l2,
            "nonfinite": found.nonfinite,
            **metrics,
        },
        tolerance=Tolerance(value=limit, metric="error", why=why),
        worst=found.worst,
        series=series or {},
    )


def noise_share(found: Difference, noise: Difference) -> tuple[float, float, float]:
    """How much of its allowance an error uses up (1: all of it), and its ratios to the noise floor in L2 and maximum."""
    l2_ratio = found.relative_l2 / noise.relative_l2 if noise.relative_l2 else float("inf")
    max_ratio = found.max_abs / noise.max_abs if noise.max_abs else float("inf")
    # One number for the verdict: the share of its own allowance that the worse of the two uses up.
    return max(l2_ratio / NOISE_L2, max_ratio / NOISE_MAX), l2_ratio, max_ratio


def custom_kernels(how: str) -> Mapping[str, Callable[..., Any]]:
    """Op -> function on the CPU: by the plugin library's ``enqueue``, or the kernels under Triton's ``interpreter``.

    Raises:
        NotRun: the plugins are not installed.
        ToolchainError: they are, and cannot be used.
    """
    if (missing := kernels_installed()) is not None:
        raise NotRun(missing)
    if how == "enqueue":
        find_library()  # a library that is there and not usable is a failure, not a reason to look away
        from llama_export_plugins.harness import enqueue_ops

        found: Mapping[str, Callable[..., Any]] = enqueue_ops()
        return found
    from llama_export_plugins.kernels.loop import kernel_ops

    interpreted: Mapping[str, Callable[..., Any]] = kernel_ops()
    return interpreted


BY = {"enqueue": "the plugin library's enqueue", "interpreter": "the kernels under Triton's interpreter"}
"""How the custom ops are computed -> in words."""


def some_layers(kernels: Mapping[str, Callable[..., Any]], num_layers: int) -> tuple[CustomOps, list[int]]:
    """Custom ops that are computed by the kernels in some layers and eagerly in the others, and which layers.

    A graph calls each op in the order of its layers: attention once a layer, LlamaAddRMSNorm twice, LlamaRMSNorm once in all.
    """
    chosen = sorted({round(step * (num_layers - 1) / (KERNEL_LAYERS - 1)) for step in range(KERNEL_LAYERS)})
    per_layer = {"LlamaAttention": 1, "LlamaMaskedAttention": 1, "LlamaAddRMSNorm": 2}
    calls = dict.fromkeys(kernels, 0)

    def counted(op: str) -> Callable[..., Any]:
        def compute(*arguments: Any) -> Any:
            layer = calls[op] // per_layer[op] % num_layers if op in per_layer else chosen[0]
            calls[op] += 1
            return (kernels[op] if layer in chosen else OP_SPECS[op].eager)(*arguments)

        return compute

    return {op: counted(op) for op in kernels}, chosen


def engine_structure(v: Validator) -> list[Stage]:
    """Every engine file against its sidecar, the manifest and the config."""
    if not v.bundle.engines:
        raise NotRun("no engine in this bundle; make one with `llama-export build`")
    stages = []
    for path in v.bundle.engines:
        name = f"engine/structure/{path.stem}"
        try:
            facts = check_engine(v.bundle, path)
        except LlamaExportError as err:
            stages.append(Stage(name=name, verdict="fail", reason=str(err)))
            continue
        stages.append(
            Stage(
                name=name, verdict="pass", metrics={"error": 0, **facts.metrics},
                reason="file hash, graph hash, inputs and outputs, aliases, profiles and layer counts are what the config implies",
                tolerance=Tolerance(value=0, metric="error", why="a structure is either right or wrong"),
            )
        )  # fmt: skip
    return stages
