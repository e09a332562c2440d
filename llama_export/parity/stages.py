"""The stages of a causal LM, in the order a fault would travel: reference, graph, onnxruntime, 16-bit, kernels, engine.

Each stage compares one artefact with an oracle, under a limit whose reason is stated in :mod:`llama_export.parity.judge`:

* ``reference/*``        our PyTorch model against Hugging Face's; its trace, which is the float64 oracle of all that follows
* ``graph/*``            the exported graph in float64: 1e-9, tensor by tensor; and what its results must not depend on
* ``onnxruntime/*``      the file onnxruntime runs, held to the noise floor of float32; and what must not change its results
* ``evaluator/<dtype>``  the graph at 16 bits, held to the noise floor of that dtype
* ``kernels/*``          the graph with its custom ops computed by the plugins' kernels, on the CPU: under Triton's
                         interpreter, and through the plugin library's own ``enqueue``
* ``engine/*``           every engine in the bundle: its structure here, its execution where a GPU allows
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from llama_export.bundle import Bundle
from llama_export.config import LlamaConfig
from llama_export.engine import check_engine
from llama_export.engine_session import EngineSession, execution_blocker
from llama_export.errors import ConfigError, MissingDependencyError
from llama_export.kv_cache import cache_names
from llama_export.parity.judge import (
    BY,
    FLOAT64_LIMIT,
    KERNEL_TOKENS,
    NOISE_MAX,
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
)
from llama_export.parity.metrics import difference
from llama_export.parity.result import Stage, Tolerance
from llama_export.runtime import OnnxRuntimeSession, TextCodec, generate

try:
    import torch

    from llama_export.model import LlamaForCausalLM
    from llama_export.parity.calls import (
        Answers,
        Call,
        Pairs,
        Rows,
        cache_pairs,
        call,
        carried,
        graph_inputs,
        logits_pairs,
        one_row,
    )
    from llama_export.parity.evaluator import CustomOps, GraphEvaluator
    from llama_export.parity.locate import Trace, tensor_errors
    from llama_export.parity.op_stages import op_stage
    from llama_export.parity.rope_stages import graph_rope, reference_rope
    from llama_export.parity.sessions import TransformersSession, answers, reference_session, to_numpy
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err

GREEDY_TOKENS = 64
_MIN_PROMPT = 8
"""Tokens; fewer cannot be cut into chunks and rows of different length."""
_APPENDED = 8
"""Tokens that the stages with a fixed schedule append to the prompt at most, whatever ``--steps`` says."""
_PROMPTS = ("def ", "import os\n", "class ", "The ", "    return ")
POISON = 1e3
"""What the standard bodies and onnxruntime must tolerate in cache entries nobody sees: they multiply them by zero."""


class CausalValidator(Validator):
    """Adds the token sequences, and what oracle, transformers and onnxruntime make of them."""

    def __init__(self, bundle: Bundle, config: ValidateConfig) -> None:
        super().__init__(bundle, config)
        context = self.llama.max_length
        if (
            config.steps < 1
            or config.prompt_tokens < _MIN_PROMPT
            or context < _MIN_PROMPT + max(config.steps, _APPENDED)
        ):
            raise ConfigError(
                f"a prompt and {config.steps} decode steps do not fit a context of {context} tokens",
                details={
                    "steps": config.steps,
                    "prompt": f"{config.prompt_tokens} tokens, at least {_MIN_PROMPT}",
                    "longest sequence": context,
                },
                hint="choose another --steps",
            )
        appended = max(config.steps, _APPENDED)
        self.prompt = min(config.prompt_tokens, context - appended)
        self.capacity = min(self.prompt + appended + 16, context)
        self.rows = one_row(self.random_ids(self.prompt + config.steps, config.seed), self.prompt)
        """What most stages run."""
        self.cache_names = [past for past, _ in cache_names(self.llama.num_hidden_layers)]
        self._floors: dict[tuple[Rows, torch.dtype], list[Answers]] = {}
        self._oracles: dict[Rows, Answers] = {}

    def ragged(self, tokens: int, seed: int) -> Rows:
        """Rows of three different lengths, then a few decode steps."""
        prompts = (tokens, max(1, tokens // 2), 1)
        ids = (tuple(self.random_ids(n + 4, self.config.seed + seed + row)) for row, n in enumerate(prompts))
        return Rows(tuple(ids), prompts)

    def oracle(self, rows: Rows) -> Answers:
        """The float64 oracle: the reference's trace."""
        if rows not in self._oracles:
            calls = rows.calls()
            inputs = graph_inputs(calls, self.llama, capacity=rows.longest, dtype=torch.float64)
            stream = self.program.stream(inputs, carried(self.llama), torch.float64)
            self._oracles[rows] = collected(calls, stream, self.llama)
        return self._oracles[rows]

    def floor(self, rows: Rows, dtype: torch.dtype) -> list[Answers]:
        """transformers' eager model on each row alone: the prompt, then the rest at once, through its own cache.

        Where RoPE follows the length the schedule is part of the result, so there the rest comes token by token, to a
        model made anew for every row: it remembers the longest sequence it has seen.
        """
        key = (rows, dtype)
        if key not in self._floors:
            model = None
            found = []
            for index in range(len(rows.ids)):
                if model is None or self.follows_length:
                    model = self.transformers_model(dtype)
                row = rows.row(index)
                calls = row.calls()
                if not self.follows_length:
                    calls = [*calls[:1], call("rest", [row.ids[0][row.prompts[0] :]])]
                found.append(answers(TransformersSession(model), calls, self.cache_names))
            self._floors[key] = found
            del model
            gc.collect()
        return self._floors[key]

    def measured(self, got: Answers, rows: Rows, dtype: torch.dtype, tokens: slice = slice(None)) -> list[Measured]:
        """Logits, and cache if all tokens are asked for, of an artefact and of the noise floor, against the oracle."""
        want, floor, mine = self.oracle(rows).rows(), self.floor(rows, dtype), got.rows()
        logits = Measured(
            "logits", difference(logits_pairs(mine, want, tokens)), difference(logits_pairs(floor, want, tokens))
        )
        if tokens != slice(None):
            return [logits]
        return [logits, Measured("cache", difference(cache_pairs(mine, want)), difference(cache_pairs(floor, want)))]

    def alike(self, got: Sequence[Answers], want: Sequence[Answers]) -> list[Measured]:
        """How far two runs of one float32 artefact are apart, beside the noise floor of float32."""
        floor, exact = self.floor(self.rows, torch.float32), self.oracle(self.rows).rows()
        return [
            Measured("logits", difference(logits_pairs(got, want)), difference(logits_pairs(floor, exact))),
            Measured("cache", difference(cache_pairs(got, want)), difference(cache_pairs(floor, exact))),
        ]

    def run_evaluator(
        self, evaluator: GraphEvaluator, calls: Sequence[Call], *, capacity: int, fill: float = 0.0
    ) -> Answers:
        """The exported graph's answers."""
        inputs = graph_inputs(calls, self.llama, capacity=capacity, dtype=evaluator.model_dtype, fill=fill)
        return collected(calls, evaluator.stream(inputs, carried(self.llama)), self.llama)

    def run_onnxruntime(self, calls: Sequence[Call], *, capacity: int | None = None, fill: float = 0.0) -> Answers:
        """onnxruntime's answers."""
        rows = len(calls[0].input_ids)
        session = OnnxRuntimeSession(self.bundle, max_seq_len=capacity or self.capacity, batch_size=rows)
        if fill:
            for value in session.cache.values():
                value.update_inplace(np.full(value.shape(), fill, np.float32))
        return answers(session, calls, self.cache_names)

    @cached_property
    def onnxruntime(self) -> Answers:
        """onnxruntime's answers to what most stages run."""
        return self.run_onnxruntime(self.rows.calls())


def collected(calls: Sequence[Call], stream: Iterable[tuple[str, list[Any]]], config: LlamaConfig) -> Answers:
    """Logits and last cache out of a run in lockstep."""
    past_of = {present: past for past, present in carried(config).items()}
    logits: list[Any] = []
    cache = {}
    for name, values in stream:
        if name == "logits":
            logits = [to_numpy(value) for value in values]
        elif name in past_of:
            cache[past_of[name]] = to_numpy(values[-1])
    return Answers.to(calls, logits, cache)


# ---- the reference ----------------------------------------------------------------------------------------------


def _per_step(
    got: Answers, want: Answers, prompt: int, label: str = "relative maximum per decode step"
) -> dict[str, list[float]]:
    """Largest error of each decode step as a share of the largest logit of the whole run.

    Not the metric of any verdict, so under another name: the limit line of the plots belongs to ``error``.
    """
    left, right = np.asarray(got.tokens, np.float64), np.asarray(want.tokens, np.float64)
    largest = float(np.abs(right).max()) or 1.0
    return {label: [float(error) for error in np.abs(left - right).max(-1)[prompt:] / largest]}


def reference_transformers(v: CausalValidator) -> Stage:
    """Logits of a prefill and of every decode step, and the cache, against Hugging Face, both in float64."""
    ours = v.oracle(v.rows).rows()
    theirs, theirs32 = v.floor(v.rows, torch.float64), v.floor(v.rows, torch.float32)
    measured = [
        Measured("logits", difference(logits_pairs(ours, theirs)), difference(logits_pairs(theirs32, theirs))),
        Measured("cache", difference(cache_pairs(ours, theirs)), difference(cache_pairs(theirs32, theirs))),
    ]
    return judge_noise(
        "reference/transformers", measured, dtype="float64", bundle_dtype="float64", why=TRANSFORMERS_WHY,
        reason=f"reference against transformers in float64, prefill of {v.prompt}, {v.config.steps} decode steps, cache",
        series=_per_step(ours[0], theirs[0], v.prompt),
    )  # fmt: skip


def reference_program(v: CausalValidator) -> Stage:
    """The traced program, which is the oracle, against the reference model itself."""
    model = cast(LlamaForCausalLM, v.load_reference(torch.float64))
    calls = _ragged_calls(v)
    want = answers(reference_session(model, max_seq_len=v.capacity, batch_size=2), calls, v.cache_names)
    del model
    gc.collect()
    inputs = graph_inputs(calls, v.llama, capacity=v.capacity, dtype=torch.float64)
    got = collected(calls, v.program.stream(inputs, carried(v.llama), torch.float64), v.llama)
    labelled = zip(calls, got.logits, want.logits, strict=True)
    pairs: Pairs = [(f"logits ({one.label})", left, right) for one, left, right in labelled]
    pairs += [(name, got.cache[name], want.cache[name]) for name in v.cache_names]
    return judge(
        "reference/program", difference(pairs),
        reason="the reference's trace, the oracle of what follows, against the reference, both in float64: ragged prefill, chunk, decode, cache",
    )  # fmt: skip


# ---- the graph --------------------------------------------------------------------------------------------------


def _ragged_calls(v: CausalValidator) -> list[Call]:
    """Ragged on purpose: rows of different length, a chunk after a prefill, then single tokens."""
    tokens = np.stack([v.random_ids(v.prompt + 7, v.config.seed + row) for row in range(2)])
    n = v.prompt
    return [
        call("prefill", tokens[:, :n], (n, max(1, n // 2))),
        call("chunk", tokens[:, n : n + 5], (5, 3)),
        call("decode 0", tokens[:, n + 5 : n + 6]),
        call("decode 1", tokens[:, n + 6 :]),
    ]


def _graph_stage(
    name: str, path: Callable[[Bundle], Path], custom_ops: CustomOps, what: str
) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        calls = _ragged_calls(v)
        inputs = graph_inputs(calls, v.llama, capacity=v.capacity, dtype=torch.float64)
        evaluator = GraphEvaluator(path(v.bundle), dtype=torch.float64, custom_ops=custom_ops)
        trace = Trace(evaluator.graph, lambda _: FLOAT64_LIMIT)
        pairs: Pairs = []
        both = tensor_errors(
            evaluator.stream(inputs, carried(v.llama)),
            v.program.stream(inputs, carried(v.llama), torch.float64),
            v.program.names_in(evaluator.graph),
        )
        for tensor, got, want in both:
            trace.add(tensor, got, want)
            if tensor in v.program.outputs:
                labels = (one.label for one in calls)
                pairs += [
                    (f"{tensor} ({label})", left.numpy(), right.numpy())
                    for label, left, right in zip(labels, got, want, strict=True)
                ]
        return judge(
            name, difference(pairs), first_divergence=trace.first_divergence, tensors_compared=len(trace.errors),
            series={"largest tensor error per layer": trace.per_layer},
            reason=f"the graph in float64, custom ops by {what}, against the reference's trace in float64: ragged prefill, chunk, decode, cache",
        )  # fmt: skip

    return run


# ---- what results must not depend on ----------------------------------------------------------------------------

Run = Callable[..., Answers]
"""(calls, capacity=C, fill=x) -> answers."""


def neighbours(v: CausalValidator, run: Run) -> tuple[list[Answers], list[Answers], str]:
    """A padded batch of rows of different length, and every row as it stands there, alone."""
    rows = v.ragged(v.prompt, 10)
    batch = rows.calls()
    alone = [
        run([replace(one, input_ids=one.input_ids[[row]], sequence_length=one.sequence_length[[row]],
                     logits_index=one.logits_index[[row]]) for one in batch], capacity=v.capacity).row(0)
        for row in range(len(rows.ids))
    ]  # fmt: skip
    lengths = ", ".join(map(str, rows.prompts))
    return (
        run(batch, capacity=v.capacity).rows(),
        alone,
        f"rows of {lengths} tokens in one padded batch against each row alone",
    )


def padding(v: CausalValidator, run: Run) -> tuple[list[Answers], list[Answers], str]:
    """A row padded with arbitrary tokens, and the same row without padding."""
    length = max(1, v.prompt // 2)
    ids = v.random_ids(v.prompt + 4, v.config.seed + 50)
    rest = [call(f"step {at}", [ids[length + at : length + at + 1]]) for at in range(4)]
    padded = run([call("prefill", [ids[: v.prompt]], [length]), *rest], capacity=v.capacity)
    bare = run([call("prefill", [ids[:length]]), *rest], capacity=v.capacity)
    return (
        padded.rows(),
        bare.rows(),
        f"{length} tokens padded to {v.prompt} against the same without padding, prefill and 4 steps",
    )


def _poisoned(fill: float) -> Callable[[CausalValidator, Run], tuple[list[Answers], list[Answers], str]]:
    def poisoned(v: CausalValidator, run: Run) -> tuple[list[Answers], list[Answers], str]:
        """Cache entries at or past the valid length hold ``fill``."""
        calls = v.ragged(v.prompt, 60).calls()
        clean, dirty = run(calls, capacity=v.capacity), run(calls, capacity=v.capacity, fill=fill)
        said = f"cache entries past the valid length hold {fill:g} against zeros, ragged prefill and 4 steps"
        return dirty.rows(), clean.rows(), said

    return poisoned


def capacity(v: CausalValidator, run: Run) -> tuple[list[Answers], list[Answers], str]:
    """A cache that just holds the tokens, and a larger one."""
    rows = v.ragged(v.prompt, 70)
    least, calls = rows.longest, rows.calls()
    more = min(least + 29, v.llama.max_length)
    return (
        run(calls, capacity=least).rows(),
        run(calls, capacity=more).rows(),
        f"a cache of {least} slots against one of {more}",
    )


INVARIANCES = {
    "batch-neighbours": neighbours,
    "padding": padding,
    "poisoned-cache": _poisoned(POISON),
    "cache-capacity": capacity,
}
"""Named checks: name -> (validator, artefact) -> (got, want, in words)."""


def _graph_invariance(name: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch.float64, custom_ops="bodies")
        got, want, said = INVARIANCES[name](v, partial(v.run_evaluator, evaluator))
        pairs = logits_pairs(got, want) + cache_pairs(got, want)
        return judge(f"graph/{name}", difference(pairs), reason=f"the graph in float64 by its function bodies: {said}")

    return run


def _onnxruntime_invariance(name: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        got, want, said = INVARIANCES[name](v, v.run_onnxruntime)
        return judge_noise(
            f"onnxruntime/{name}", v.alike(got, want), dtype="float32", bundle_dtype=v.bundle.dtype,
            reason=f"onnxruntime: {said}",
        )  # fmt: skip

    return run


# ---- onnxruntime ------------------------------------------------------------------------------------------------


def onnxruntime_prefill(v: CausalValidator) -> Stage:
    """All positions of one prefill."""
    measured = v.measured(v.onnxruntime, v.rows, torch.float32, slice(0, v.prompt))
    return judge_noise(
        "onnxruntime/prefill", measured, dtype="float32", bundle_dtype=v.bundle.dtype,
        reason=f"all {v.prompt} positions of a prefill on onnxruntime against float64",
    )  # fmt: skip


def onnxruntime_decode(v: CausalValidator) -> Stage:
    """Every teacher-forced step."""
    measured = v.measured(v.onnxruntime, v.rows, torch.float32, slice(v.prompt, None))
    return judge_noise(
        "onnxruntime/decode", measured, dtype="float32", bundle_dtype=v.bundle.dtype, steps=v.config.steps,
        reason=f"{v.config.steps} teacher-forced decode steps on onnxruntime against float64",
        series=_per_step(v.onnxruntime.row(0), v.oracle(v.rows).row(0), v.prompt),
    )  # fmt: skip


def onnxruntime_cache(v: CausalValidator) -> Stage:
    """Keys and values after the last step, and the untouched rest of the buffers."""
    _, cache = v.measured(v.onnxruntime, v.rows, torch.float32)
    got, want = v.onnxruntime.row(0), v.oracle(v.rows).row(0)
    length = len(v.rows.ids[0])
    stray = sum(int(np.count_nonzero(v.onnxruntime.cache[name][:, :, length:])) for name in v.cache_names)
    per_layer = [
        difference([(name, got.valid(name), want.valid(name)) for name in pair]).relative_l2
        for pair in zip(v.cache_names[::2], v.cache_names[1::2], strict=True)
    ]
    stage = judge_noise(
        "onnxruntime/cache", [cache], dtype="float32", bundle_dtype=v.bundle.dtype, entries_written_past_the_end=stray,
        series={"relative L2 of the cache per layer": per_layer},
        reason=f"keys and values of all layers after {length} tokens against float64; nothing written past them",
    )  # fmt: skip
    return (
        stage
        if stray == 0
        else replace(stage, verdict="fail", reason=f"{stray} cache entries past the valid length were written")
    )


def onnxruntime_chunked(v: CausalValidator) -> Stage:
    """``prefill(n)`` equals ``prefill(k)`` then chunks and single tokens."""
    if v.follows_length:
        raise NotRun(
            f"RoPE of type {v.llama.rope.rope_type} rotates each call by the row's length at that call, in transformers too: "
            "chunks are not the same computation as one prefill"
        )
    n, ids = v.prompt, v.rows.ids[0]
    cuts = sorted({0, n // 3, n // 3 + 1, 2 * n // 3, n - 1, n})
    pieces = list(zip(cuts[:-1], cuts[1:], strict=True))
    parts = v.run_onnxruntime([call(f"chunk at {begin}", [ids[begin:end]]) for begin, end in pieces])
    whole = v.run_onnxruntime([call("prefill", [ids[:n]])])
    return judge_noise(
        "onnxruntime/chunked-prefill", v.alike(parts.rows(), whole.rows()), dtype="float32", bundle_dtype=v.bundle.dtype,
        chunks=[float(end - begin) for begin, end in pieces],
        reason=f"a prefill of {n} in {len(pieces)} chunks against the same in one piece",
    )  # fmt: skip


def onnxruntime_repeat(v: CausalValidator) -> Stage:
    """The same calls in a new session give the same bits."""
    again = v.run_onnxruntime(v.rows.calls())
    first = v.onnxruntime
    pairs = [(left, right) for left, right in zip(again.logits, first.logits, strict=True)]
    pairs += [(again.cache[name], first.cache[name]) for name in v.cache_names]
    changed = sum(int((left.view(np.uint32) != right.view(np.uint32)).sum()) for left, right in pairs)
    return Stage(
        name="onnxruntime/repeat",
        verdict="pass" if changed == 0 else "fail",
        reason="the same prefill and decode steps in a new session: every bit of logits and cache",
        metrics={"error": changed, "values": sum(left.size for left, _ in pairs)},
        tolerance=Tolerance(value=0, metric="error", why="the same machine, the same calls, the same bits"),
    )


def onnxruntime_greedy(v: CausalValidator) -> Stage:
    """Greedy tokens are the oracle's own first choice at every step."""
    try:
        codec = TextCodec(v.bundle.folder)
        prompts = [codec.encode(text) for text in _PROMPTS]
    except ConfigError:
        prompts = [v.random_ids(4 + row, v.config.seed + 20 + row) for row in range(5)]
    longest = max(map(len, prompts))
    new_tokens = max(1, min(GREEDY_TOKENS, v.llama.max_length - longest))
    session = OnnxRuntimeSession(v.bundle, max_seq_len=longest + new_tokens)
    noise = v.alike(v.onnxruntime.rows(), v.onnxruntime.rows())[0].noise
    limit = 2 * NOISE_MAX * noise.relative
    equal, ties, worst_gap = 0, 0, 0.0
    for prompt in prompts:
        chosen = generate(session, [prompt], max_new_tokens=new_tokens).tokens[0]
        rows = one_row([*prompt, *chosen[:-1]], len(prompt))
        logits = v.oracle(rows).row(0).tokens[len(prompt) - 1 :]
        gaps = (logits.max(-1) - logits[np.arange(new_tokens), chosen]) / np.abs(logits).max()
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)  # a NaN would be smaller than any limit
        equal += int(not gaps.any())
        ties += int(((gaps > 0) & (gaps <= limit)).sum())
        worst_gap = max(worst_gap, float(gaps.max()))
    return Stage(
        name="onnxruntime/greedy",
        verdict="pass" if math.isfinite(worst_gap) and worst_gap <= limit else "fail",
        reason=f"{new_tokens} greedy tokens for {len(prompts)} prompts are the float64 oracle's first choice at every step",
        metrics={"error": worst_gap, "equal_prompts": equal, "prompts": len(prompts), "tokens": new_tokens, "near_ties": ties},
        tolerance=Tolerance(
            value=limit, metric="error",
            why="a token counts as equal when the oracle's logits of both choices are closer than twice what the noise floor allows one",
        ),
    )  # fmt: skip


def onnxruntime_in_place(v: CausalValidator) -> Stage:
    """One step writes its tokens' slots of the bound buffers and not one byte more."""
    session = OnnxRuntimeSession(v.bundle, max_seq_len=16)
    ids = v.rows.ids[0]
    session.step([ids[:3]])
    before = {name: session.cache_array(name).copy() for name in session.cache}
    addresses = {name: value.data_ptr() for name, value in session.cache.items()}
    session.step([ids[3:5]])
    outputs = session.output_addresses()
    moved = sum(address != outputs[name] for name, address in addresses.items())
    changed = 0
    unwritten = 0
    for name, old in before.items():
        new = session.cache_array(name)
        same = (new == old).all(axis=(0, 1, 3))
        changed += int((~np.delete(same, [3, 4])).sum())
        unwritten += int(same[[3, 4]].sum())
    ok = moved == changed == unwritten == 0
    return Stage(
        name="onnxruntime/in-place",
        verdict="pass" if ok else "fail",
        reason="present is returned at past's address, and a step of 2 tokens changed exactly their 2 slots",
        metrics={"error": moved + changed + unwritten, "buffers_moved": moved, "other_slots_changed": changed, "slots_not_written": unwritten},
        tolerance=Tolerance(value=0, metric="error", why="an address or a slot is either right or wrong"),
    )  # fmt: skip


# ---- lower precision, kernels, engines ---------------------------------------------------------------------------


def _noise_stage(dtype: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        torch_dtype = getattr(torch, dtype)
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch_dtype)
        got = v.run_evaluator(evaluator, v.rows.calls(), capacity=v.capacity)
        return judge_noise(
            f"evaluator/{dtype}", v.measured(got, v.rows, torch_dtype), dtype=dtype, bundle_dtype=v.bundle.dtype,
            reason=f"the graph in {dtype} against float64",
            series=_per_step(got.row(0), v.oracle(v.rows).row(0), v.prompt),
        )  # fmt: skip

    return run


def _kernel_evaluator(v: CausalValidator, how: str, dtype: torch.dtype) -> tuple[GraphEvaluator, list[int]]:
    layers = some_layers(v.llama.num_hidden_layers)
    kernels = custom_kernels(how)
    return GraphEvaluator(v.bundle.model_path, dtype=dtype, custom_ops=kernels, custom_layers=layers), layers


def _kernel_rows(v: CausalValidator) -> Rows:
    """Short: the interpreter is slow."""
    longest = min(v.prompt, KERNEL_TOKENS)
    prompts = (longest, max(1, longest // 2))
    ids = (tuple(v.random_ids(n + _APPENDED, v.config.seed + 30 + row)) for row, n in enumerate(prompts))
    return Rows(tuple(ids), prompts)


def _kernel_stage(how: str, dtype: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        rows, torch_dtype = _kernel_rows(v), getattr(torch, dtype)
        evaluator, layers = _kernel_evaluator(v, how, torch_dtype)
        got = v.run_evaluator(evaluator, rows.calls(), capacity=rows.longest)
        return judge_noise(
            f"kernels/{how}-{dtype}", v.measured(got, rows, torch_dtype), dtype=dtype, bundle_dtype=v.bundle.dtype,
            layers=[float(layer) for layer in layers],
            reason=f"the graph in {dtype} with its ops by {BY[how]}, against float64: "
            f"rows of {rows.prompts[0]} and {rows.prompts[1]} tokens in one batch, then {rows.steps} decode steps",
        )  # fmt: skip

    return run


def _kernel_poisoned(how: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        rows = _kernel_rows(v)
        rows = Rows(tuple(ids[: n + 2] for ids, n in zip(rows.ids, rows.prompts, strict=True)), rows.prompts)
        evaluator, layers = _kernel_evaluator(v, how, torch.float32)
        # The layers that are not the kernels' are eager, and eager attention never lets an unseen NaN through.
        dirty, clean = (
            v.run_evaluator(evaluator, rows.calls(), capacity=rows.longest + 5, fill=fill) for fill in (np.nan, 0.0)
        )
        found = difference(logits_pairs(dirty.rows(), clean.rows()) + cache_pairs(dirty.rows(), clean.rows()))
        return judge(
            f"kernels/{how}-poisoned-cache", found, limit=0.0, why="an entry that is never loaded changes no bit",
            layers=[float(layer) for layer in layers],
            reason=f"{BY[how]} in float32: cache entries past the valid length hold NaN against zeros, prefill and 2 steps",
        )  # fmt: skip

    return run


def engine_execution(v: CausalValidator) -> list[Stage]:
    """Prefill and decode on the GPU, held to the noise floor of the bundle's dtype."""
    if not v.bundle.engines:
        raise NotRun("no engine in this bundle; make one with `llama-export build`")
    stages = []
    for path in v.bundle.engines:
        name = f"engine/execution/{path.stem}"
        facts = check_engine(v.bundle, path)
        blocker = execution_blocker(facts.backend)
        if blocker is not None:
            stages.append(Stage(name=name, verdict="not-run", reason=blocker))
            continue
        ids = v.rows.ids[0][: facts.max_seq_len]  # an engine may hold fewer tokens than the other stages use
        rows = one_row(ids, min(v.prompt, len(ids) - 1))
        got = answers(EngineSession(v.bundle, path), rows.calls(), v.cache_names)
        stages.append(
            judge_noise(
                name, v.measured(got, rows, getattr(torch, v.bundle.dtype)), dtype=v.bundle.dtype, bundle_dtype=v.bundle.dtype,
                series=_per_step(got.row(0), v.oracle(rows).row(0), rows.prompts[0]),
                reason=f"prefill of {rows.prompts[0]} and {rows.steps} decode steps on the GPU in {v.bundle.dtype} against float64",
            )
        )  # fmt: skip
    return stages


def _model(bundle: Bundle) -> Path:
    return bundle.model_path


def _onnxruntime(bundle: Bundle) -> Path:
    return bundle.onnxruntime_path


STAGES: dict[str, Callable[[CausalValidator], Stage | list[Stage]]] = {
    "reference/transformers": reference_transformers,
    "reference/rope": reference_rope,
    "reference/program": reference_program,
    "graph/rope": graph_rope,
    "ops/bodies": op_stage("bodies"),
    "graph/float64-eager": _graph_stage("graph/float64-eager", _model, "eager", "their eager maths"),
    "graph/float64-bodies": _graph_stage("graph/float64-bodies", _model, "bodies", "the function bodies of model.onnx"),
    "graph/float64-ort-bodies": _graph_stage(
        "graph/float64-ort-bodies", _onnxruntime, "bodies", "the function bodies of model.onnxruntime.onnx"
    ),
    **{f"graph/{name}": _graph_invariance(name) for name in INVARIANCES},
    "onnxruntime/prefill": onnxruntime_prefill,
    "onnxruntime/chunked-prefill": onnxruntime_chunked,
    "onnxruntime/decode": onnxruntime_decode,
    "onnxruntime/cache": onnxruntime_cache,
    "onnxruntime/greedy": onnxruntime_greedy,
    **{f"onnxruntime/{name}": _onnxruntime_invariance(name) for name in INVARIANCES},
    "onnxruntime/repeat": onnxruntime_repeat,
    "onnxruntime/in-place": onnxruntime_in_place,
    "evaluator/bfloat16": _noise_stage("bfloat16"),
    "evaluator/float16": _noise_stage("float16"),
    **{
        f"kernels/{how}-{dtype}": _kernel_stage(how, dtype)
        for how in ("interpreter", "enqueue")
        for dtype in ("float32", "bfloat16", "float16")
    },
    **{f"kernels/{how}-poisoned-cache": _kernel_poisoned(how) for how in ("interpreter", "enqueue")},
    **{f"ops/{how}": op_stage(how) for how in ("interpreter", "enqueue")},
    "engine/structure": engine_structure,
    "engine/execution": engine_execution,
}
