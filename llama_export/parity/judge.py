"""What all stages share: where limits come from, models loaded when a stage first asks, verdicts, the engine's structure.

Two kinds of limit, and no number by hand:

* The *graph* is judged in float64, where only a difference of meaning is larger than 1e-9.
* An *artefact at a dtype* is judged by the noise floor: what transformers' eager model itself loses at that dtype, on the
  same tokens, against the same float64 oracle.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_export._system.content import sha256_of_file
from llama_export._system.process import trim_heap
from llama_export.bundle.bundle import Bundle
from llama_export.checkpoint.checkpoint import Checkpoint, load_checkpoint
from llama_export.config.checks import check_fields, checked_int
from llama_export.config.decoder import count_parameters
from llama_export.config.huggingface import load_json_object
from llama_export.engine.check import check_engine
from llama_export.engine.plugins import find_library, kernels_installed
from llama_export.errors import ConfigError, LlamaExportError, MissingDependencyError, ToolchainError
from llama_export.parity.metrics import Difference
from llama_export.parity.report.result import LogitsSample, Stage, Tolerance
from llama_export.runtime.onnxruntime_graph import OpenGraph, open_graph

try:
    import torch

    from llama_export.export.embedded import differing_weights
    from llama_export.model import load_reference
    from llama_export.model.heads import LlamaWithHead
    from llama_export.parity.oracle.program import ReferenceProgram
    from llama_export.parity.oracle.streamed import streamed_causal_lm, streamed_reference
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err


FLOAT64_LIMIT = 1e-9
FLOAT64_WHY = "float64 rounding is 1e-16 per operation; anything above 1e-9 is a difference of meaning, not of rounding"
NOISE_L2, NOISE_MAX = 2.0, 4.0
NOISE_WHY = (
    "transformers' eager model at this dtype, on this input, against the same float64 reference, is the noise floor: "
    f"at most {NOISE_L2:g} x of it in relative L2 and {NOISE_MAX:g} x in the maximum"
)
TRANSFORMERS_WHY = (
    "transformers computes norms, softmax and RoPE in float32 even when asked for float64: what its own float32 model differs "
    f"from that is the noise floor, and the reference may differ by {NOISE_L2:g} x of it in relative L2, {NOISE_MAX:g} x in the maximum, where of the cache the rounding of float32 cos and sin, which both share, is added to the floor"
)
KERNEL_LAYERS = 3
"""Layers whose ops the kernels compute; those of the others are eager. A larger model gets a sample, spread evenly."""
_RESIDENT_BYTES = 3 << 30
"""Weights of a model in PyTorch, the reference or transformers', are held in memory up to this size."""
KERNEL_TOKENS = 17
"""Longest prompt of the kernel stages, tokens: the interpreter is slow, and 17 is no multiple of any tile."""


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
    text: Path | None = None
    """A UTF-8 file for the stages on a text; None: they do not run."""
    cases: Path | None = None
    """Folder for the operations at fault with their inputs, one folder each; None: they are not saved."""
    checkpoint: Path | None = None
    """What the bundle was exported from, where its weights are embedded; None: it lies in the bundle's own folder."""
    journal: Path | None = None
    """Folder for the report so far, written after each stage (:mod:`llama_export.parity.report.journal`); None: it is not kept."""
    resume: bool = False
    """Take over the stages that ``journal`` holds."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("steps", 1), ("prompt_tokens", 1), ("seed", 0)):
            checked_int(getattr(self, name), name, least=least)


class Validator:
    """What the stages share: models, loaded once when a stage first asks."""

    def __init__(self, bundle: Bundle, config: ValidateConfig) -> None:
        self.bundle = bundle
        self.config = config
        self.llama = bundle.config
        self.folder = checkpoint_folder(bundle, config)
        """Where the checkpoint lies: the bundle's own folder, unless its weights are embedded."""

    @property
    def follows_length(self) -> bool:
        """Whether RoPE's frequencies depend on the length of the row, so that a schedule of calls is part of the result."""
        return self.llama.rope.rope_type in ("dynamic", "longrope")

    def random_ids(self, count: int, seed: int) -> list[int]:
        """Uniform token ids: no special structure that would hide a wrong position or head."""
        return [int(i) for i in np.random.default_rng(seed).integers(0, self.llama.vocab_size, count)]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What the bundle came from."""
        return _open_checkpoint(self.folder, self.bundle.task)

    @cached_property
    def program(self) -> ReferenceProgram:
        """The reference's own trace: the oracle of every tensor."""
        return ReferenceProgram(self.checkpoint, self.checkpoint.task, self.bundle.dtype)

    @cached_property
    def onnxruntime_graph(self) -> OpenGraph:
        """The file that onnxruntime runs, opened once: that takes longer than a run."""
        return open_graph(self.bundle)

    def close_onnxruntime(self) -> None:
        """Gives its memory back; who asks next opens the file again."""
        self.__dict__.pop("onnxruntime_graph", None)
        gc.collect()
        trim_heap()

    def load_reference(self, dtype: torch.dtype) -> LlamaWithHead:
        """The reference at a dtype; a large one reads its weights as it goes."""
        load = streamed_reference if self._is_large(dtype) else load_reference
        return load(self.checkpoint, dtype)

    def _is_large(self, dtype: torch.dtype) -> bool:
        return count_parameters(self.llama) * dtype.itemsize > _RESIDENT_BYTES

    def transformers_model(self, dtype: torch.dtype) -> Any:
        """Hugging Face's eager model from the checkpoint's files; a large causal LM reads its weights as it goes.

        Raises:
            NotRun: transformers refuses the checkpoint, so there is neither a peer nor a noise floor.
        """
        with _quiet_transformers() as transformers:
            make = getattr(transformers, _HUGGING_FACE[self.bundle.task]).from_pretrained
            try:
                if self.bundle.task == "causal-lm" and self._is_large(dtype):
                    return streamed_causal_lm(transformers, self.checkpoint, dtype)
                model = make(self.folder, dtype=dtype, attn_implementation="eager", local_files_only=True)
            except Exception as err:  # it validates configs by rules of its own, and raises what it likes
                raise NotRun(f"transformers {transformers.__version__} does not load this checkpoint: {err}") from err
            return model.eval()

    def transformers_shell(self) -> Any:
        """Hugging Face's bare decoder without weights, for its config and its RoPE."""
        with _quiet_transformers() as transformers, torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
            return transformers.LlamaModel(config)


def checkpoint_folder(bundle: Bundle, config: ValidateConfig) -> Path:
    """Where the checkpoint lies that a bundle is held to: ``config.checkpoint``, or the bundle's own folder.

    Raises:
        ConfigError: the bundle holds no checkpoint and none is named; it holds one and another is named; or the one that
            is named states another model than the manifest.
        CheckpointError: see :func:`llama_export.checkpoint.checkpoint.load_checkpoint`.
    """
    if config.checkpoint is None:
        if bundle.is_embedded and not any(bundle.folder.glob("*.safetensors")):
            raise ConfigError(
                "this bundle's weights are embedded, and the checkpoint to hold them to is not in its folder",
                details={"bundle": bundle.folder, "missing": "*.safetensors"},
                hint=f"name the folder it was exported from: llama-export validate {bundle.folder} --checkpoint DIR",
            )
        return bundle.folder
    if not bundle.is_embedded:
        raise ConfigError(
            "this bundle holds the checkpoint that it is compared with",
            details={"bundle": bundle.folder, "got": f"--checkpoint {config.checkpoint}", "expected": "no checkpoint"},
            hint="leave --checkpoint out: it is for bundles with embedded weights",
        )
    got = _open_checkpoint(config.checkpoint, bundle.task).config
    changed = [item.name for item in fields(got) if getattr(got, item.name) != getattr(bundle.config, item.name)]
    if changed:
        raise ConfigError(
            "the checkpoint's config is not that of the bundle",
            details={
                "checkpoint": config.checkpoint,
                "got": ", ".join(f"{name}: {getattr(got, name)}" for name in changed),
                "expected": ", ".join(f"{name}: {getattr(bundle.config, name)}" for name in changed),
            },
            hint="name the folder that this bundle was exported from",
        )
    return config.checkpoint


def _open_checkpoint(folder: Path, task: str) -> Checkpoint:
    """Unknown config keys were vouched for at export."""
    path = folder / "config.json"
    allowed = tuple(load_json_object(path)) if path.is_file() else ()
    return load_checkpoint(folder, allowed, task=task)


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """The package; a head that the bare model does not load is no news here.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as err:
        raise MissingDependencyError("transformers", "parity") from err
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield transformers
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
    reason: str,
    limit: float = FLOAT64_LIMIT,
    why: str = FLOAT64_WHY,
    series: Mapping[str, Sequence[float]] | None = None,
    first_divergence: Mapping[str, Any] | None = None,
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
        first_divergence=None if ok else first_divergence,
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """One quantity (the logits, the cache) of an artefact and of the model that sets the noise floor."""

    name: str
    found: Difference
    """The artefact against the float64 oracle."""
    noise: Difference
    """transformers at the same dtype against the same oracle."""

    @property
    def l2_ratio(self) -> float:
        """Relative L2 error over that of the noise floor."""
        return noise_ratio(self.found.relative_l2, self.noise.relative_l2)

    @property
    def max_ratio(self) -> float:
        """Largest error, relative to the largest value, over that of the noise floor."""
        return noise_ratio(self.found.relative, self.noise.relative)

    @property
    def share(self) -> float:
        """How much of its allowance the worse of the two uses up; 1: all of it."""
        if self.found.nonfinite:
            return math.inf
        return max(self.l2_ratio / NOISE_L2, self.max_ratio / NOISE_MAX)


def noise_ratio(error: float, floor: float) -> float:
    """How many times the noise floor an error is; nothing is 0 times anything, and infinitely many times nothing."""
    if error == 0:
        return 0.0
    return error / floor if floor and math.isfinite(error) else math.inf


def judge_noise(
    name: str,
    measured: Sequence[Measured],
    *,
    dtype: str,
    bundle_dtype: str,
    reason: str,
    why: str = NOISE_WHY,
    series: Mapping[str, Sequence[float]] | None = None,
    logits: LogitsSample | None = None,
    **metrics: Any,
) -> Stage:
    """A verdict by the noise floor, on the quantity that uses up most of its allowance.

    Metrics: ``error`` (the share of the allowance, limit 1), and of that quantity error, noise floor, ratio and the
    tolerance that would have been needed, each in relative L2 and in the maximum.

    Raises:
        NotRun: transformers' own model overflows at a dtype that the bundle does not promise to run.
    """
    nonfinite = sum(item.found.nonfinite for item in measured)
    check_floor(sum(item.noise.nonfinite for item in measured), nonfinite, dtype=dtype, bundle_dtype=bundle_dtype)
    worse = max(measured, key=lambda item: item.share)
    shown = sorted(measured, key=lambda item: -item.share)[:2]
    said = "; ".join(
        f"{item.name} {item.l2_ratio:.2f} x the noise floor in L2, {item.max_ratio:.2f} x in the maximum"
        for item in shown
    )
    return Stage(
        name=name,
        verdict="pass" if worse.share <= 1 else "fail",
        reason=f"{reason}: {said}",
        metrics={
            "error": worse.share,
            "relative_l2": worse.found.relative_l2, "noise_floor_relative_l2": worse.noise.relative_l2, "l2_ratio": worse.l2_ratio,
            "relative_max": worse.found.relative, "noise_floor_relative_max": worse.noise.relative, "max_ratio": worse.max_ratio,
            "tolerance_needed_relative_l2": worse.found.relative_l2, "tolerance_needed_relative_max": worse.found.relative,
            "nonfinite": nonfinite,
            **{f"{item.name}_l2_ratio": item.l2_ratio for item in measured},
            **metrics,
        },
        tolerance=Tolerance(value=1.0, metric="error", why=why),
        worst=worse.found.worst,
        series=series or {},
        logits=logits,
    )  # fmt: skip


def check_floor(overflowed: int, nonfinite: int, *, dtype: str, bundle_dtype: str) -> None:
    """A floor that overflows is none: an artefact is blamed only for what its bundle promises to run, and what it did.

    Args:
        overflowed, nonfinite: values that are not finite, of transformers' model and of the artefact.

    Raises:
        NotRun: there is no noise floor.
    """
    if overflowed and (dtype != bundle_dtype or not nonfinite):
        raise NotRun(
            f"transformers' own model gives {overflowed} values that are not finite in {dtype}: no noise floor"
        )


def custom_kernels(how: str) -> Mapping[str, Callable[..., Any]]:
    """Op -> function: see :data:`BY`; tensors go in and come out on the CPU.

    Raises:
        NotRun: the plugins are not installed, or there is no GPU.
        ToolchainError: they are, and cannot be used.
    """
    if (missing := kernels_installed(interpreted=how in ("interpreter", "enqueue"))) is not None:
        raise NotRun(missing)
    if how == "gpu" and not torch.cuda.is_available():
        raise NotRun("no GPU that PyTorch can use on this machine")
    if how in ("enqueue", "ptx", "gpu"):
        find_library()  # a library that is there and not usable is a failure, not a reason to look away
        from llama_export_plugins import harness

        if how != "ptx":
            return _refusing(harness.enqueue_ops(device="cuda" if how == "gpu" else "cpu"))
        if not hasattr(harness, "PTX_ONLY"):
            raise NotRun("the plugins that are installed cannot execute PTX; pip install './plugins' again")
        library = harness.PluginLibrary(compute_capability=harness.PTX_ONLY)
        if library.variants["portable_chip"] is None:
            raise NotRun("the plugin library carries no PTX: it was built with LLAMA_EXPORT_CHIPS and without 80 in it")
        return _refusing(harness.enqueue_ops(library=library))
    from llama_export_plugins.kernels.loop import kernel_ops

    interpreted: Mapping[str, Callable[..., Any]] = kernel_ops()
    return interpreted


def _refusing(functions: Mapping[str, Callable[..., Any]]) -> Mapping[str, Callable[..., Any]]:
    """What the library does wrong beside its numbers (a byte next to a tensor, a race, a refusal) as a sentence of ours: the
    stage has failed then."""
    from llama_export_plugins.harness import PluginError

    def of(op: str) -> Callable[..., Any]:
        def compute(*arguments: Any) -> Any:
            try:
                return functions[op](*arguments)
            except PluginError as err:
                raise ToolchainError(
                    f"the plugin library did what a GPU need not forgive, in {op}",
                    details={"got": err},
                    hint="install the plugins again, or report this with the command that made the report",
                ) from err

        return compute

    return {op: of(op) for op in functions}


BY = {
    "interpreter": "the kernels under Triton's interpreter",
    "enqueue": "the plugin library's enqueue",
    "ptx": "the plugin library's enqueue and its PTX, instruction by instruction on the CPU",
    "gpu": "the plugin library's enqueue and compiled kernels on the GPU",
}
"""How the custom ops are computed -> in words. Only ``gpu`` needs one: launches of ``enqueue`` go to a stand-in for the driver,
which runs the kernels' source under the interpreter; those of ``ptx`` to one that executes the PTX the library hands it."""


def some_layers(num_layers: int) -> list[int]:
    """The layers whose custom ops the kernels compute: all of a small model, an even sample of a large one."""
    return sorted({round(step * (num_layers - 1) / (KERNEL_LAYERS - 1)) for step in range(KERNEL_LAYERS)})


def weight_hashes(v: Validator) -> Stage:
    """Every byte of the weight files. The reference reads the same files as the graph, so no comparison of numbers would show a
    flipped bit; and opening a bundle compares a sample of the content only. Weights inside the ONNX files
    are compared with the checkpoint's."""
    if v.bundle.is_embedded:
        return _embedded_weights(v)
    recorded = {entry.file: entry.sha256 for entry in v.bundle.manifest.weights if entry.sha256 is not None}
    if not recorded:
        raise NotRun(
            "the manifest holds no content hashes; make them with `llama-export verify BUNDLE --record` or `export --hash-weights`"
        )
    changed = [name for name, wanted in recorded.items() if sha256_of_file(v.bundle.folder / name) != wanted]
    return Stage(
        name="bundle/weights", verdict="fail" if changed else "pass",
        reason=f"{', '.join(changed)}: the content is not what was exported" if changed else "every byte of every weight file is what was exported",
        metrics={"error": len(changed), "files": len(recorded)},
        tolerance=Tolerance(value=0, metric="error", why="a file is either the same or not"),
    )  # fmt: skip


def _embedded_weights(v: Validator) -> Stage:
    """Every byte of the weights that the two graphs hold."""
    paths = (v.bundle.model_path, v.bundle.onnxruntime_path)
    differing = [f"{path.name}: {name}" for path in paths for name in differing_weights(path, v.checkpoint)]
    shown = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
    return Stage(
        name="bundle/weights", verdict="fail" if differing else "pass",
        reason=f"not the checkpoint's: {shown}" if differing else "every byte of the weights inside both ONNX files is the checkpoint's",
        metrics={"error": len(differing), "tensors": len(paths) * len(v.checkpoint.tensors)},
        tolerance=Tolerance(value=0, metric="error", why="a tensor is either the same or not"),
    )  # fmt: skip


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
