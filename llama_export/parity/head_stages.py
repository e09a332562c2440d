"""The stages of a head without a cache, in the order a fault would travel: reference, graph, onnxruntime, 16-bit, engine.

Limits and their reasons are those of :mod:`llama_export.parity.stages`. Every stage sees one text alone, and the same
three texts padded on the right and on the left; what the model says of padding is nobody's business, so positions that
``attention_mask`` leaves out are not compared.

Shapes: B texts, S tokens, K labels, E hidden size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export.bundle import Bundle
from llama_export.engine import check_engine
from llama_export.engine_session import EngineHeadSession, execution_blocker
from llama_export.errors import ConfigError, MissingDependencyError
from llama_export.graph_io import INTERFACES, is_single_text
from llama_export.parity.judge import (
    BY,
    ENGINE_LIMITS,
    ENGINE_WHY,
    FLOAT32_LIMIT,
    FLOAT32_WHY,
    FLOAT64_LIMIT,
    FLOAT64_WHY,
    KERNEL_TOKENS,
    NOISE_WHY,
    NotRun,
    ValidateConfig,
    Validator,
    custom_kernels,
    engine_structure,
    judge,
    noise_share,
    some_layers,
)
from llama_export.parity.metrics import difference
from llama_export.parity.result import Stage, Tolerance
from llama_export.runtime import OnnxRuntimeHeadSession

try:
    import torch

    from llama_export.model.heads import LlamaWithHead
    from llama_export.parity.evaluator import CustomOps, GraphEvaluator
    from llama_export.parity.sessions import to_numpy
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err

_MIN_TEXT = 4
"""Tokens; fewer cannot be padded in three lengths."""
Outputs = Mapping[str, NDArray[Any]]
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], Outputs]
"""input_ids and attention_mask [B, S] -> output name -> tensor."""
Pairs = list[tuple[str, Any, Any]]


@dataclass(frozen=True, slots=True)
class Texts:
    """One padded batch."""

    label: str
    """``alone``, ``right`` or ``left``: where the padding is."""
    input_ids: NDArray[np.int64]
    """[B, S]"""
    attention_mask: NDArray[np.int64]
    """[B, S]"""


class HeadValidator(Validator):
    """Adds the texts, and what the models and onnxruntime make of them.

    Raises:
        ConfigError: the model has too few positions.
    """

    def __init__(self, bundle: Bundle, config: ValidateConfig) -> None:
        super().__init__(bundle, config)
        self.width = min(config.prompt_tokens, self.llama.max_length)
        if self.width < _MIN_TEXT:
            raise ConfigError(
                f"a text of {self.width} tokens is too short to be padded",
                details={"got": self.width, "expected": f"at least {_MIN_TEXT}"},
                hint="the checkpoint's max_position_embeddings is too small to validate",
            )

    def texts(self, width: int, rows: int = 3) -> list[Texts]:
        """One text alone, and up to ``rows`` texts of ``width``, half and one token padded on either side."""
        alone = [self._padded("alone", (width,), width)]
        if rows < 2 or is_single_text(self.llama, self.bundle.task):
            return alone
        lengths = (width, max(1, width // 2), 1)[:rows]
        return [*alone, self._padded("right", lengths, width), self._padded("left", lengths, width)]

    def _padded(self, label: str, lengths: tuple[int, ...], width: int) -> Texts:
        pad = 0 if self.llama.pad_token_id is None else self.llama.pad_token_id
        ids = np.full((len(lengths), width), pad, np.int64)
        mask = np.zeros_like(ids)
        for row, length in enumerate(lengths):
            at = slice(width - length, width) if label == "left" else slice(0, length)
            tokens = np.asarray(self.random_ids(length, self.config.seed + row))
            # Hugging Face's classifier ends a text before the padding token, wherever that comes from.
            ids[row, at] = np.where(tokens == pad, (pad + 1) % self.llama.vocab_size, tokens)
            mask[row, at] = 1
        return Texts(label, ids, mask)

    def compare(self, got: Run, want: Run, batches: list[Texts]) -> Pairs:
        """(output and batch, what was got, what was wanted), attended positions only."""
        pairs: Pairs = []
        for texts in batches:
            found, expected = got(texts.input_ids, texts.attention_mask), want(texts.input_ids, texts.attention_mask)
            for name in INTERFACES[self.bundle.task].outputs:
                per_token = expected[name].ndim >= 2 and expected[name].shape[:2] == texts.input_ids.shape
                keep = texts.attention_mask != 0 if per_token and name != "sentence_embedding" else slice(None)
                pairs.append((f"{name} ({texts.label})", found[name][keep], expected[name][keep]))
        return pairs

    @cached_property
    def reference32(self) -> Run:
        """The reference in float32."""
        return self.reference_run(self.load_reference(torch.float32))

    @cached_property
    def reference64(self) -> Run:
        """The reference in float64: the oracle."""
        return self.reference_run(self.load_reference(torch.float64))

    def reference_run(self, model: LlamaWithHead) -> Run:
        """The reference as a function of texts."""
        names = INTERFACES[self.bundle.task].outputs

        def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
            with torch.no_grad():
                found = model(torch.from_numpy(ids), torch.from_numpy(mask))
            tensors = [found] if isinstance(found, torch.Tensor) else list(found)
            return {name: to_numpy(tensor) for name, tensor in zip(names, tensors, strict=True)}

        return run

    def transformers_run(self, dtype: torch.dtype) -> Run:
        """Hugging Face's model, made anew: length-dependent RoPE remembers earlier calls there."""

        def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
            model = self.transformers_model(dtype)
            with torch.no_grad():
                found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
            if self.bundle.task == "question-answering":
                return {name: to_numpy(found[name]) for name in ("start_logits", "end_logits")}
            if self.bundle.task != "feature-extraction":
                return {"logits": to_numpy(found.logits)}
            hidden_states = to_numpy(found.last_hidden_state)
            last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
            return {"last_hidden_state": hidden_states, "sentence_embedding": hidden_states[np.arange(len(ids)), last]}

        return run

    @property
    def texts_for_transformers(self) -> list[Texts]:
        """What Hugging Face can be asked: rotating by the longest row of a batch, it cannot be asked about padded ones."""
        batches = self.texts(self.width)
        return batches[:1] if self.follows_length else batches

    def evaluator_run(self, evaluator: GraphEvaluator) -> Run:
        """The exported graph as a function of texts."""

        def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
            outputs = evaluator.run({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)})
            return {name: to_numpy(tensor) for name, tensor in outputs.items()}

        return run

    @cached_property
    def onnxruntime_run(self) -> Run:
        """The file that onnxruntime runs."""
        return OnnxRuntimeHeadSession(self.bundle).run


# ---- the stages -------------------------------------------------------------------------------------------------


def _said(batches: list[Texts]) -> str:
    """What the texts were, in words."""
    width = batches[0].input_ids.shape[1]
    return f"a text of {width} tokens" + (
        f"; {batches[1].input_ids.shape[0]} texts padded right and left" if batches[1:] else ""
    )


def reference_transformers(v: HeadValidator) -> Stage:
    """The outputs against Hugging Face's class of the task."""
    batches = v.texts_for_transformers
    return judge(
        "reference/transformers", difference(v.compare(v.reference32, v.transformers_run(torch.float32), batches)),
        limit=FLOAT32_LIMIT, why=FLOAT32_WHY, reason=f"reference against transformers in float32: {_said(batches)}",
    )  # fmt: skip


def _graph_stage(name: str, path: Callable[[Bundle], Path], custom_ops: CustomOps, what: str) -> HeadStage:
    def run(v: HeadValidator) -> Stage:
        evaluator = GraphEvaluator(path(v.bundle), dtype=torch.float64, custom_ops=custom_ops)
        batches = v.texts(v.width)
        return judge(
            name, difference(v.compare(v.evaluator_run(evaluator), v.reference64, batches)),
            limit=FLOAT64_LIMIT, why=FLOAT64_WHY,
            reason=f"the graph in float64, custom ops by {what}, against the reference in float64: {_said(batches)}",
        )  # fmt: skip

    return run


def onnxruntime_texts(v: HeadValidator) -> Stage:
    """The outputs of every batch against the reference."""
    batches = v.texts(v.width)
    return judge(
        "onnxruntime/texts", difference(v.compare(v.onnxruntime_run, v.reference32, batches)),
        limit=FLOAT32_LIMIT, why=FLOAT32_WHY, reason=f"onnxruntime against the reference: {_said(batches)}",
    )  # fmt: skip


def onnxruntime_rows(v: HeadValidator) -> Stage:
    """A row of a padded batch equals the row alone: no influence of neighbours, nor of padding on the right."""
    batches = v.texts(v.width)
    if not batches[1:]:
        raise NotRun("the checkpoint names no padding token: a batch has one row")

    def rows_alone(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        return _stacked(_row(v.onnxruntime_run, ids, mask, row) for row in range(len(ids)))

    return judge(
        "onnxruntime/rows", difference(v.compare(v.onnxruntime_run, rows_alone, batches[1:])),
        limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        reason="every text of the padded batches against the text alone; right padding cut off, left padding kept, "
        "since positions count from the row's first slot",
    )  # fmt: skip


def _row(run: Run, ids: NDArray[np.int64], mask: NDArray[np.int64], row: int) -> Outputs:
    """One row without its right padding; results per token are put back in their places."""
    width = ids.shape[1]
    end = width - int(mask[row, ::-1].argmax())
    found = run(ids[row : row + 1, :end], mask[row : row + 1, :end])
    padded = {}
    for name, values in found.items():
        # An output [1, S] or [1, S, ..] has a value per token; sentence_embedding's second axis is E whatever it equals.
        per_token = name != "sentence_embedding" and values.ndim >= 2 and values.shape[1] == end
        padding = [(0, 0), (0, width - end), *[(0, 0)] * (values.ndim - 2)]
        padded[name] = np.pad(values, padding) if per_token else values
    return padded


def _stacked(rows: Iterator[Outputs]) -> Outputs:
    every = list(rows)
    return {name: np.concatenate([row[name] for row in every]) for name in every[0]}


def onnxruntime_transformers(v: HeadValidator) -> Stage:
    """The two ends of the chain, directly."""
    batches = v.texts_for_transformers
    return judge(
        "onnxruntime/transformers", difference(v.compare(v.onnxruntime_run, v.transformers_run(torch.float32), batches)),
        limit=FLOAT32_LIMIT, why=FLOAT32_WHY, reason=f"onnxruntime against transformers in float32: {_said(batches)}",
    )  # fmt: skip


def _against_noise(v: HeadValidator, name: str, dtype: str, got: Run, batches: list[Texts], what: str) -> Stage:
    """A 16-bit run against float64, held to what transformers' own model loses at that dtype."""
    torch_dtype = getattr(torch, dtype)
    found = difference(v.compare(got, v.reference64, batches))
    noise = difference(v.compare(v.transformers_run(torch_dtype), v.reference64, batches))
    gc.collect()
    if noise.nonfinite and (not found.nonfinite or dtype != v.bundle.dtype):
        raise NotRun(
            f"transformers' own model gives {noise.nonfinite} values that are not finite in {dtype}: no noise floor"
        )
    error, l2_ratio, max_ratio = noise_share(found, noise)
    return Stage(
        name=name,
        verdict="pass" if found.nonfinite == 0 and error <= 1 else "fail",
        reason=f"{what} in {dtype} against float64: {l2_ratio:.2f} x the noise floor in L2, {max_ratio:.2f} x in the maximum; {_said(batches)}",
        metrics={
            "error": error, "relative_l2": found.relative_l2, "noise_floor_relative_l2": noise.relative_l2, "l2_ratio": l2_ratio,
            "max_abs": found.max_abs, "noise_floor_max_abs": noise.max_abs, "max_ratio": max_ratio, "nonfinite": found.nonfinite,
        },
        tolerance=Tolerance(value=1.0, metric="error", why=NOISE_WHY),
        worst=found.worst,
    )  # fmt: skip


def _noise_stage(dtype: str) -> HeadStage:
    def run(v: HeadValidator) -> Stage:
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=getattr(torch, dtype))
        got = v.evaluator_run(evaluator)
        return _against_noise(v, f"evaluator/{dtype}", dtype, got, v.texts_for_transformers, "the graph")

    return run


def _kernel_stage(how: str, dtype: str) -> HeadStage:
    name = f"kernels/{how}-{dtype}"

    def run(v: HeadValidator) -> Stage:
        custom_ops, layers = some_layers(custom_kernels(how), v.llama.num_hidden_layers)
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=getattr(torch, dtype), custom_ops=custom_ops)
        batches = v.texts(min(v.width, KERNEL_TOKENS))
        got = v.evaluator_run(evaluator)
        what = f"the graph with its ops by {BY[how]}"
        if dtype != "float32":
            return _against_noise(v, name, dtype, got, batches[:1] if v.follows_length else batches, what)
        return judge(
            name, difference(v.compare(got, v.reference64, batches)), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
            reason=f"{what} in float32 against the float64 reference: {_said(batches)}",
            layers=[float(layer) for layer in layers],
        )  # fmt: skip

    return run


def engine_execution(v: HeadValidator) -> list[Stage]:
    """The texts on the GPU against the float64 reference."""
    if not v.bundle.engines:
        raise NotRun("no engine in this bundle; make one with `llama-export build`")
    stages = []
    for path in v.bundle.engines:
        name = f"engine/execution/{path.stem}"
        facts = check_engine(v.bundle, path)
        if (blocker := execution_blocker(facts.backend)) is not None:
            stages.append(Stage(name=name, verdict="not-run", reason=blocker))
            continue
        batches = v.texts(min(v.width, facts.max_seq_len), min(3, facts.max_batch))
        found = difference(v.compare(EngineHeadSession(v.bundle, path).run, v.reference64, batches))
        stages.append(
            judge(
                name, found, limit=ENGINE_LIMITS[v.bundle.dtype], why=ENGINE_WHY,
                reason=f"on the GPU against the float64 reference: {_said(batches)}",
            )
        )  # fmt: skip
    return stages


HeadStage = Callable[[HeadValidator], Stage | list[Stage]]
HEAD_STAGES: dict[str, HeadStage] = {
    "reference/transformers": reference_transformers,
    "graph/float64-eager": _graph_stage(
        "graph/float64-eager", lambda bundle: bundle.model_path, "eager", "their eager maths"
    ),
    "graph/float64-bodies": _graph_stage(
        "graph/float64-bodies", lambda bundle: bundle.model_path, "bodies", "the function bodies of model.onnx"
    ),
    "graph/float64-ort-bodies": _graph_stage(
        "graph/float64-ort-bodies", lambda bundle: bundle.onnxruntime_path, "bodies",
        "the function bodies of model.onnxruntime.onnx",
    ),
    "onnxruntime/texts": onnxruntime_texts,
    "onnxruntime/rows": onnxruntime_rows,
    "onnxruntime/transformers": onnxruntime_transformers,
    "evaluator/bfloat16": _noise_stage("bfloat16"),
    "evaluator/float16": _noise_stage("float16"),
    **{
        f"kernels/{how}-{dtype}": _kernel_stage(how, dtype)
        for how in ("interpreter", "enqueue")
        for dtype in ("float32", "bfloat16", "float16")
    },
    "engine/structure": engine_structure,
    "engine/execution": engine_execution,
}  # fmt: skip
