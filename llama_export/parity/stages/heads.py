"""The stages of a head without a cache, in the order a fault would travel: reference, graph, onnxruntime, 16-bit, engine.

Limits and their reasons are those of :mod:`llama_export.parity.stages.causal`. Every stage sees one text alone, and the same
three texts padded on the right and on the left; what the model says of padding is nobody's business, so positions that
``attention_mask`` leaves out are not compared.

Shapes: B texts, S tokens, K labels, E hidden size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_export.bundle.bundle import Bundle
from llama_export.engine.check import check_engine
from llama_export.errors import ConfigError, MissingDependencyError
from llama_export.graph.io import INTERFACES, is_single_text
from llama_export.parity.judge import (
    BY,
    FLOAT64_LIMIT,
    KERNEL_TOKENS,
    TRANSFORMERS_WHY,
    Measured,
    NotRun,
    ValidateConfig,
    Validator,
    custom_kernels,
    engine_structure,
    judge,
    judge_noise,
    some_layers,
    weight_hashes,
)
from llama_export.parity.metrics import difference
from llama_export.parity.report.result import LogitsSample, Stage
from llama_export.parity.stages.logits_sample import labels_sample
from llama_export.runtime.engine_session import EngineHeadSession, execution_blocker
from llama_export.runtime.onnxruntime_session import OnnxRuntimeHeadSession

try:
    import torch

    from llama_export.parity.calls import Pairs
    from llama_export.parity.locate.locate import Trace, tensor_errors
    from llama_export.parity.oracle.evaluator import CustomOps, GraphEvaluator
    from llama_export.parity.stages.ops import op_stage
    from llama_export.parity.stages.rope import graph_rope, reference_rope
    from llama_export.parity.tensors import to_numpy
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err


_MIN_TEXT = 4
"""Tokens; fewer cannot be padded in three lengths."""
Outputs = Mapping[str, NDArray[Any]]
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], Outputs]
"""input_ids and attention_mask [B, S] -> output name -> tensor."""


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
            pairs += self.pairs(found, expected, texts)
        return pairs

    def pairs(self, got: Outputs, want: Outputs, texts: Texts) -> Pairs:
        """The same of one batch."""
        found: Pairs = []
        for name in INTERFACES[self.bundle.task].outputs:
            per_token = want[name].ndim >= 2 and want[name].shape[:2] == texts.input_ids.shape
            keep = texts.attention_mask != 0 if per_token and name != "sentence_embedding" else slice(None)
            found.append((f"{name} ({texts.label})", got[name][keep], want[name][keep]))
        return found

    def oracle(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        """The float64 oracle, the reference's trace, as a function of texts."""
        return self._outputs(self.program.stream([_feeds(ids, mask)], {}, torch.float64))

    def _outputs(self, stream: Iterable[tuple[str, list[Any]]]) -> Outputs:
        return {name: to_numpy(values[0]) for name, values in stream if name in self.program.outputs}

    def reference(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        """The reference itself in float64 as a function of texts."""
        with torch.no_grad():
            found = self._reference64(*_feeds(ids, mask).values())
        tensors = [found] if isinstance(found, torch.Tensor) else list(found)
        return {name: to_numpy(tensor) for name, tensor in zip(self.program.outputs, tensors, strict=True)}

    @cached_property
    def _reference64(self) -> Any:
        return self.load_reference(torch.float64)

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

    def texts_for_transformers(self, batches: list[Texts]) -> list[Texts]:
        """What Hugging Face can be asked: rotating by the longest row of a batch, it cannot be asked about padded ones."""
        return batches[:1] if self.follows_length else batches

    def evaluator_run(self, evaluator: GraphEvaluator) -> Run:
        """The exported graph as a function of texts."""

        def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
            return {name: to_numpy(tensor) for name, tensor in evaluator.run(_feeds(ids, mask)).items()}

        return run

    def measured(self, got: Run, dtype: torch.dtype, batches: list[Texts]) -> list[Measured]:
        """An artefact and the noise floor, both against the oracle; what cannot be asked of transformers has no floor."""
        asked = self.texts_for_transformers(batches)
        noise = difference(self.compare(self.transformers_run(dtype), self.oracle, asked))
        gc.collect()
        return [Measured("outputs", difference(self.compare(got, self.oracle, batches)), noise)]

    @cached_property
    def onnxruntime_run(self) -> Run:
        """The file that onnxruntime runs."""
        return OnnxRuntimeHeadSession(self.bundle).run


def _feeds(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


# ---- the stages -------------------------------------------------------------------------------------------------


def _said(batches: list[Texts]) -> str:
    """What the texts were, in words."""
    width = batches[0].input_ids.shape[1]
    return f"a text of {width} tokens" + (
        f"; {batches[1].input_ids.shape[0]} texts padded right and left" if batches[1:] else ""
    )


def _sample(v: HeadValidator, got: Run, batches: list[Texts]) -> LogitsSample | None:
    """The logits of the heads that choose a label, for the report."""
    if "logits" not in INTERFACES[v.bundle.task].outputs:
        return None
    return labels_sample(v.compare(got, v.oracle, batches), v.llama.labels)


def reference_transformers(v: HeadValidator) -> Stage:
    """The outputs against Hugging Face's class of the task, both in float64."""
    batches = v.texts_for_transformers(v.texts(v.width))
    # In float64 its mask overflows softmax's float32 where a row sees nothing but padding, and NaN spreads from there.
    left = [texts for texts in batches if texts.label == "left"]
    others = [texts for texts in batches if texts.label != "left"]
    theirs, theirs32 = v.transformers_run(torch.float64), v.transformers_run(torch.float32)
    noise = difference(v.compare(theirs32, theirs, others))
    found = difference(v.compare(v.oracle, theirs, others) + v.compare(v.oracle, theirs32, left))
    return judge_noise(
        "reference/transformers", [Measured("outputs", found, noise)], dtype="float64", bundle_dtype="float64",
        why=TRANSFORMERS_WHY, reason=f"reference against transformers in float64 (left padding: in float32), {_said(batches)}",
    )  # fmt: skip


def reference_program(v: HeadValidator) -> Stage:
    """The traced program, which is the oracle, against the reference model itself."""
    batches = v.texts(v.width)
    return judge(
        "reference/program", difference(v.compare(v.oracle, v.reference, batches)),
        reason=f"the reference's trace, the oracle of what follows, against the reference, both in float64: {_said(batches)}",
    )  # fmt: skip


def _graph_stage(name: str, path: Callable[[Bundle], Path], custom_ops: CustomOps, what: str) -> HeadStage:
    def run(v: HeadValidator) -> Stage:
        evaluator = GraphEvaluator(path(v.bundle), dtype=torch.float64, custom_ops=custom_ops)
        batches = v.texts(v.width)
        calls = [_feeds(texts.input_ids, texts.attention_mask) for texts in batches]
        trace = Trace(evaluator.graph, lambda _: FLOAT64_LIMIT)
        both = tensor_errors(
            evaluator.stream(calls), v.program.stream(calls, {}, torch.float64), v.program.names_in(evaluator.graph)
        )
        found: list[dict[str, Any]] = [{} for _ in batches]
        wanted: list[dict[str, Any]] = [{} for _ in batches]
        for tensor, got, want in both:
            trace.add(tensor, got, want)
            if tensor in v.program.outputs:
                for at, values in enumerate(zip(got, want, strict=True)):
                    found[at][tensor], wanted[at][tensor] = map(to_numpy, values)
        pairs = [
            pair for texts, got, want in zip(batches, found, wanted, strict=True) for pair in v.pairs(got, want, texts)
        ]
        return judge(
            name, difference(pairs), first_divergence=trace.first_divergence, tensors_compared=len(trace.errors),
            series={"largest tensor error per layer": trace.per_layer},
            reason=f"the graph in float64, custom ops by {what}, against the reference's trace in float64: {_said(batches)}",
        )  # fmt: skip

    return run


def graph_rows(v: HeadValidator) -> Stage:
    """A row of a padded batch equals the row alone: no influence of neighbours, nor of padding on the right."""
    evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch.float64, custom_ops="bodies")
    batches, run = _padded_batches(v), v.evaluator_run(evaluator)
    return judge(
        "graph/rows", difference(v.compare(run, _rows_alone(run), batches)),
        reason=f"the graph in float64 by its function bodies: {_ROWS}",
    )  # fmt: skip


def onnxruntime_texts(v: HeadValidator) -> Stage:
    """The outputs of every batch."""
    batches = v.texts(v.width)
    return judge_noise(
        "onnxruntime/texts", v.measured(v.onnxruntime_run, torch.float32, batches), dtype="float32", bundle_dtype=v.bundle.dtype,
        logits=_sample(v, v.onnxruntime_run, batches), reason=f"onnxruntime against float64, {_said(batches)}",
    )  # fmt: skip


def onnxruntime_rows(v: HeadValidator) -> Stage:
    """The same for the file that onnxruntime runs."""
    batches = _padded_batches(v)
    found = difference(v.compare(v.onnxruntime_run, _rows_alone(v.onnxruntime_run), batches))
    (floor,) = v.measured(v.onnxruntime_run, torch.float32, v.texts(v.width))
    return judge_noise(
        "onnxruntime/rows", [Measured("outputs", found, floor.noise)], dtype="float32", bundle_dtype=v.bundle.dtype,
        reason=f"onnxruntime: {_ROWS}",
    )  # fmt: skip


def onnxruntime_repeat(v: HeadValidator) -> Stage:
    """The same texts in a new session give the same bits."""
    batches = v.texts(v.width)
    found = difference(v.compare(v.onnxruntime_run, OnnxRuntimeHeadSession(v.bundle).run, batches))
    return judge(
        "onnxruntime/repeat", found, limit=0.0, why="the same machine, the same texts, the same bits",
        reason=f"the same texts in a new session: {_said(batches)}",
    )  # fmt: skip


_ROWS = (
    "every text of the padded batches against the text alone; right padding cut off, left padding kept, since positions "
    "count from the row's first slot"
)


def _padded_batches(v: HeadValidator) -> list[Texts]:
    batches = v.texts(v.width)
    if not batches[1:]:
        raise NotRun("the checkpoint names no padding token: a batch has one row")
    return batches[1:]


def _rows_alone(run: Run) -> Run:
    def alone(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Outputs:
        return _stacked(_row(run, ids, mask, row) for row in range(len(ids)))

    return alone


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


def _noise_stage(dtype: str) -> HeadStage:
    def run(v: HeadValidator) -> Stage:
        torch_dtype = getattr(torch, dtype)
        batches = v.texts_for_transformers(v.texts(v.width))
        got = v.evaluator_run(GraphEvaluator(v.bundle.model_path, dtype=torch_dtype))
        return judge_noise(
            f"evaluator/{dtype}", v.measured(got, torch_dtype, batches), dtype=dtype, bundle_dtype=v.bundle.dtype,
            reason=f"the graph in {dtype} against float64, {_said(batches)}",
        )  # fmt: skip

    return run


def _kernel_stage(how: str, dtype: str) -> HeadStage:
    def run(v: HeadValidator) -> Stage:
        layers, torch_dtype = some_layers(v.llama.num_hidden_layers), getattr(torch, dtype)
        evaluator = GraphEvaluator(
            v.bundle.model_path, dtype=torch_dtype, custom_ops=custom_kernels(how), custom_layers=layers
        )
        batches = v.texts(min(v.width, KERNEL_TOKENS))
        return judge_noise(
            f"kernels/{how}-{dtype}", v.measured(v.evaluator_run(evaluator), torch_dtype, batches),
            dtype=dtype, bundle_dtype=v.bundle.dtype, layers=[float(layer) for layer in layers],
            reason=f"the graph in {dtype} with its ops by {BY[how]}, against float64, {_said(batches)}",
        )  # fmt: skip

    return run


def engine_execution(v: HeadValidator) -> list[Stage]:
    """The texts on the GPU, held to the noise floor of the bundle's dtype."""
    if not v.bundle.engines:
        raise NotRun("no engine in this bundle; make one with `llama-export build`")
    stages = []
    for path in v.bundle.engines:
        name = f"engine/execution/{path.stem}"
        facts = check_engine(v.bundle, path).sidecar
        if (blocker := execution_blocker(facts.backend)) is not None:
            stages.append(Stage(name=name, verdict="not-run", reason=blocker))
            continue
        batches = v.texts(min(v.width, facts.max_seq_len), min(3, facts.max_batch))
        session = EngineHeadSession(v.bundle, path)
        measured = v.measured(session.run, getattr(torch, v.bundle.dtype), batches)
        stages.append(
            judge_noise(
                name, measured, dtype=v.bundle.dtype, bundle_dtype=v.bundle.dtype, logits=_sample(v, session.run, batches),
                reason=f"on the GPU in {v.bundle.dtype} against float64, {_said(batches)}",
            )
        )  # fmt: skip
    return stages


HeadStage = Callable[[HeadValidator], Stage | list[Stage]]
HEAD_STAGES: dict[str, HeadStage] = {
    "bundle/weights": weight_hashes,
    "reference/transformers": reference_transformers,
    "reference/rope": reference_rope,
    "reference/program": reference_program,
    "graph/rope": graph_rope,
    "ops/bodies": op_stage("bodies"),
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
    "graph/rows": graph_rows,
    "onnxruntime/texts": onnxruntime_texts,
    "onnxruntime/rows": onnxruntime_rows,
    "onnxruntime/repeat": onnxruntime_repeat,
    "evaluator/bfloat16": _noise_stage("bfloat16"),
    "evaluator/float16": _noise_stage("float16"),
    **{
        f"kernels/{how}-{dtype}": _kernel_stage(how, dtype)
        for how in BY
        for dtype in ("float32", "bfloat16", "float16")
    },
    **{f"ops/{how}": op_stage(how) for how in BY},
    "engine/structure": engine_structure,
    "engine/execution": engine_execution,
}  # fmt: skip
