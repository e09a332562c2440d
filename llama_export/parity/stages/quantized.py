"""The stages of a bundle's quantised variants: is the rounded model packed right, and is it computed right?

What quantising costs is no fault, so every oracle here is the *rounded* model: the reference's own trace in float64, with each
matrix replaced by its rounded values. They are computed from the checkpoint by :func:`rounded_weight`, a second implementation
of what :mod:`llama_export.export.quantize` specifies; the variant's files are not read for it. Of each variant:

* ``packing``: the variant's graph with its products in float32 (``accuracy_level`` 1, set in memory), held to the noise floor of
  float32. A nibble, a scale, a block or a row in the wrong place is larger by orders of magnitude.
* ``prefill``, ``decode``: the variant as shipped. Its products round their input, too: each block of a row to int8, by the
  block's largest magnitude over 127. What that must cost is measured: the oracle with its products' inputs rounded so, against the
  oracle. That is the noise floor; the limits are the usual ones.
* ``text``: the same on the user's text, by KL.

What quantising itself costs is reported beside, and judged by nobody: KL divergence from the checkpoint's own distribution,
how often the first choice is the same, and perplexity.

Shapes: N rows, K columns of a matrix, B block size, J = ceil(K / B).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from llama_export.bundle.bundle import Bundle
from llama_export.bundle.manifest import QuantizedRecord
from llama_export.errors import MissingDependencyError
from llama_export.export.rounding import CANDIDATES
from llama_export.parity.judge import NOISE_L2, NOISE_MAX, Measured, judge_noise
from llama_export.parity.metrics import difference
from llama_export.parity.report.result import Stage, Tolerance
from llama_export.runtime.onnxruntime_graph import OpenGraph, open_graph
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

try:
    import onnx
    import torch
    from torch import Tensor, fx

    from llama_export.parity.calls import Answers, Run, cache_pairs, carried, collected, graph_inputs, logits_pairs
    from llama_export.parity.oracle.lockstep import Step
    from llama_export.parity.oracle.program import ReferenceProgram
    from llama_export.parity.sessions import answers, graph_from_proto
    from llama_export.parity.stages.causal_validator import CausalValidator
    from llama_export.parity.stages.text import Scores, judge_text, kl_terms, log_softmax, perplexity, score
    from llama_export.parity.tensors import to_numpy
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err


How = Literal["exact", "rounded"]
"""How the oracle's products take their input: as it is, or rounded to int8 by blocks."""
ROUNDED_WHY = (
    "the float64 oracle with the input of each product rounded to int8 by blocks, against the same oracle without, is the noise floor: "
    f"at most {NOISE_L2:g} x of it in relative L2 and {NOISE_MAX:g} x in the maximum"
)
FLOAT32_LEVEL = 1
"""``accuracy_level`` of MatMulNBits at which nothing but the weights is rounded."""
_LINEAR = "aten.linear.default"
_KEPT_BYTES = 1 << 30
"""Of rounded weights that stay in memory between runs; beyond it they are rounded again."""
_ROUND_ROWS = 256
"""Rounded at a time: what it works on stays in the processor's cache."""


# ---- the rounding, once more ------------------------------------------------------------------------------------


def rounded_weight(weight: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """What a matrix becomes by :mod:`llama_export.export.quantize`'s rules; written from them, shares no code.

    Args:
        weight: [N, K], of values that float32 has.
        bits: 4 or 8.
        size: B.

    Returns:
        q, int8 [N, J, B], and scales, float32 [N, J, 1].
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.to(torch.float32), (0, -columns % size))
    integers, scales = [], []
    for part in torch.split(padded.view(rows, -1, size), _ROUND_ROWS):
        q, scale = _rounded_to_4(part) if bits == 4 else _rounded_to_8(part)
        integers.append(q.to(torch.int8))
        scales.append(scale)
    return torch.cat(integers), torch.cat(scales)


def _rounded_to_8(w: Tensor) -> tuple[Tensor, Tensor]:
    largest = w.abs().amax(-1, keepdim=True)
    largest[largest < 2.0**-100] = 0
    steps = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)
    return (w * steps).round(), largest / 127


def _rounded_to_4(w: Tensor) -> tuple[Tensor, Tensor]:
    highest, lowest = w.amax(-1, keepdim=True).clamp(min=0), w.amin(-1, keepdim=True).clamp(max=0)
    span = highest - lowest
    best = torch.full_like(span, -torch.inf)
    chosen, scale = torch.zeros_like(w), torch.zeros_like(span)
    for candidate in CANDIDATES:
        ratio = torch.full_like(span, candidate) / span
        zero = (-lowest * ratio).round().clamp(0, 15)
        q = ((w * ratio).round() + zero).clamp(0, 15) - zero
        along, length = _by_halves(w * q), _by_halves(q * q)
        score = along * along / length
        better = (score > best) & (span >= 2.0**-100)
        best = torch.where(better, score, best)
        chosen, scale = torch.where(better, q, chosen), torch.where(better, along / length, scale)
    return chosen, scale


def _by_halves(terms: Tensor) -> Tensor:
    """[.., B] -> [.., 1]"""
    while terms.shape[-1] > 1:
        first, second = terms.chunk(2, -1)
        terms = first + second
    return terms


def rounded_input(x: Tensor, size: int) -> Tensor:
    """[.., K], each block of ``size`` rounded to whole multiples of its largest magnitude over 127."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % size))
    blocks = padded.reshape(*x.shape[:-1], -1, size)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, (blocks / step).round() * step, 0.0)
    return rounded.flatten(-2)[..., :columns]


class RoundedProgram(ReferenceProgram):
    """The reference's trace with the matrices of a variant; every linear layer of a causal LM has one.

    Args:
        v: whose checkpoint, task and dtype.
        facts: the manifest's entry of the variant.
        how: how products take their input.
        kept: name of a weight -> its rounded values, to be shared by programs of one variant.
    """

    def __init__(
        self, v: CausalValidator, facts: QuantizedRecord, how: How, kept: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(v.checkpoint, v.checkpoint.task, v.bundle.dtype)
        self._bits, self._size = facts.bits, facts.block_size
        self._how = how
        self._kept = kept

    def _step(self, node: fx.Node, dtype: torch.dtype) -> Step:
        step = super()._step(node, dtype)
        if str(node.target) != _LINEAR:
            return step
        read = node.all_input_nodes
        x_at, weight_at = (read.index(cast(fx.Node, item)) for item in node.args[:2])
        last: list[Tensor] = []  # the weight and its rounded values: the calls of one run share them

        def compute(values: list[Any]) -> Sequence[Any]:
            weight = values[weight_at]
            if not last or last[0] is not weight:
                last[:] = [weight, self._rounded(node.name, weight)]
            values = list(values)
            values[weight_at] = last[1]
            if self._how == "rounded":
                values[x_at] = rounded_input(values[x_at], self._size)
            return step.compute(values)

        return replace(step, compute=compute)

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        """[N, K] in the weight's dtype; ``name`` is that of the product."""
        found = self._kept.get(name) or rounded_weight(weight, self._bits, self._size)
        if sum(q.nbytes for q, _ in self._kept.values()) + found[0].nbytes <= _KEPT_BYTES:
            self._kept[name] = found
        q, scales = found
        return (q.to(weight.dtype) * scales.to(weight.dtype)).flatten(1)[:, : weight.shape[1]]


# ---- the stages -------------------------------------------------------------------------------------------------


class _Variant:
    """One variant, and what its oracles and onnxruntime make of the tokens that most stages run."""

    def __init__(self, v: CausalValidator, kind: str) -> None:
        self.v = v
        self.kind = kind
        self.facts = v.bundle.manifest.quantized[kind]
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._programs: dict[How, RoundedProgram] = {}

    def program(self, how: How) -> RoundedProgram:
        """The oracle."""
        if how not in self._programs:
            self._programs[how] = RoundedProgram(self.v, self.facts, how, self._kept)
        return self._programs[how]

    def _oracle(self, how: How) -> Answers:
        run = Run(self.v.rows.calls(), self.v.rows.longest)
        inputs = graph_inputs([run], self.v.llama, torch.float64)
        stream = self.program(how).stream(inputs, carried(self.v.llama), torch.float64)
        return collected([run], stream, self.v.llama)[0]

    @cached_property
    def exact(self) -> Answers:
        """The oracle: weights are rounded, nothing else."""
        return self._oracle("exact")

    @cached_property
    def rounded(self) -> Answers:
        """The noise floor: inputs of products, too."""
        return self._oracle("rounded")

    @cached_property
    def shipped(self) -> Answers:
        """onnxruntime on the file as it is."""
        return self.run(open_graph(self.v.bundle, variant=self.kind))

    def run(self, graph: OpenGraph) -> Answers:
        """onnxruntime's answers."""
        session = OnnxRuntimeSession(self.v.bundle, max_seq_len=self.v.capacity, graph=graph)
        return answers(session, self.v.rows.calls(), self.v.cache_names)

    def measured(self, tokens: slice, *, with_cache: bool) -> list[Measured]:
        """The file as it is and the noise floor, against the oracle."""
        got, noise, want = ([item.row(0)] for item in (self.shipped, self.rounded, self.exact))
        found = [
            Measured("logits", difference(logits_pairs(got, want, tokens)), difference(logits_pairs(noise, want, tokens)))
        ]  # fmt: skip
        if with_cache:
            found.append(Measured("cache", difference(cache_pairs(got, want)), difference(cache_pairs(noise, want))))
        return found

    def cost(self, tokens: slice) -> dict[str, Any]:
        """What rounding the weights does to the distributions of some tokens, against the checkpoint's own; reported."""
        want = log_softmax(self.v.oracle(self.v.rows).row(0).tokens[tokens])
        got = log_softmax(self.exact.row(0).tokens[tokens])
        return {
            "quantising_mean_kl": float(kl_terms(want, got).sum(-1).mean()),
            "quantising_top1_agreement": float((want.argmax(-1) == got.argmax(-1)).mean()),
        }

    def text_windows(self, how: How) -> Iterator[NDArray[Any]]:
        """[n, V] per window of the text, by the oracle."""
        stream = self.program(how).stream(self.v.text_inputs(torch.float64), {}, torch.float64)
        (logits,) = (values for name, values in stream if name == "logits")
        yield from (to_numpy(value)[0] for value in logits)

    def shipped_windows(self) -> Iterator[NDArray[Any]]:
        """[n, V] per window of the text, by onnxruntime."""
        session = OnnxRuntimeSession(self.v.bundle, max_seq_len=self.v.text.ids.shape[1], variant=self.kind)
        for one in self.v.text.calls():
            session.reset()
            yield session.step(one.input_ids, logits_index=one.logits_index)[0]


def float32_graph(bundle: Bundle, kind: str) -> OpenGraph:
    """A variant, opened with the products of its matrices in float32; its file stays as it is.

    Raises:
        MissingDependencyError: no onnxruntime. ToolchainError: onnxruntime cannot open it.
    """
    model = onnx.load(str(bundle.variant_path(kind)), load_external_data=False)
    for node in model.graph.node:
        for item in node.attribute:
            if node.op_type == "MatMulNBits" and item.name == "accuracy_level":
                item.i = FLOAT32_LEVEL
    return graph_from_proto(model, bundle.folder, f"the {kind} weights")


def _packing(x: _Variant) -> Stage:
    v = x.v
    got = x.run(float32_graph(v.bundle, x.kind))
    return judge_noise(
        f"quantized-{x.kind}/packing", v.alike([got.row(0)], [x.exact.row(0)]), dtype="float32", bundle_dtype=v.bundle.dtype,
        reason=f"the {x.kind} weights on onnxruntime, products in float32, against float64 with weights that are rounded from the "
        f"checkpoint anew: prefill of {v.prompt}, {v.config.steps} decode steps, cache",
    )  # fmt: skip


def _prefill(x: _Variant) -> Stage:
    tokens = slice(None, x.v.prompt)
    return judge_noise(
        f"quantized-{x.kind}/prefill", x.measured(tokens, with_cache=False), dtype="int8", bundle_dtype=x.v.bundle.dtype, why=ROUNDED_WHY,
        reason=f"all {x.v.prompt} positions of a prefill with {x.kind} weights on onnxruntime against float64 with the same weights",
        **x.cost(tokens),
    )  # fmt: skip


def _decode(x: _Variant) -> Stage:
    tokens = slice(x.v.prompt, None)
    return judge_noise(
        f"quantized-{x.kind}/decode", x.measured(tokens, with_cache=True), dtype="int8", bundle_dtype=x.v.bundle.dtype, why=ROUNDED_WHY,
        reason=f"{x.v.config.steps} teacher-forced decode steps with {x.kind} weights on onnxruntime, and the cache, against float64 with the same weights",
        **x.cost(tokens),
    )  # fmt: skip


def _text(x: _Variant) -> Stage:
    v, text = x.v, x.v.text
    oracle = [log_softmax(window) for window in x.text_windows("exact")]
    found, noise = (score(windows, oracle, text) for windows in (x.shipped_windows(), x.text_windows("rounded")))
    stage = judge_text(
        f"quantized-{x.kind}/text", found, noise, v, dtype="int8", how=f"with {x.kind} weights on onnxruntime"
    )
    cost = v.text_scores(x.shipped_windows())  # the checkpoint's own distributions are the oracle here
    return replace(
        stage,
        reason=f"{stage.reason}; the checkpoint's own perplexity is {perplexity(cost.oracle_log_likelihood):.2f}",
        tolerance=Tolerance(value=1.0, metric="error", why=_text_why()),
        metrics={**stage.metrics, **_text_cost(cost)},
    )


def _text_why() -> str:
    return f"{ROUNDED_WHY}; KL is quadratic in it, so at most {NOISE_L2**2:g} x its KL in the mean and {NOISE_MAX**2:g} x in the maximum"


def _text_cost(cost: Scores) -> dict[str, float]:
    return {
        "checkpoint_perplexity": perplexity(cost.oracle_log_likelihood),
        "quantising_mean_kl": float(np.mean(cost.kl)),
        "quantising_top1_agreement": float(cost.agrees.mean()),
    }


def quantized_stages(bundle: Bundle) -> dict[str, Callable[[CausalValidator], Stage]]:
    """Name -> stage of every variant that the bundle has; none where it has none."""
    found: dict[str, Callable[[CausalValidator], Stage]] = {}
    for kind in bundle.variants:
        shared: list[_Variant] = []

        def stage(
            judged: Callable[[_Variant], Stage], kind: str = kind, shared: list[_Variant] = shared
        ) -> Callable[[CausalValidator], Stage]:
            def run(v: CausalValidator) -> Stage:
                if not shared:
                    shared.append(_Variant(v, kind))
                return judged(shared[0])

            return run

        judged = {"packing": _packing, "prefill": _prefill, "decode": _decode, "text": _text}
        found |= {f"quantized-{kind}/{what}": stage(function) for what, function in judged.items()}
    return found
