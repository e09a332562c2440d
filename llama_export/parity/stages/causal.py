"""The stages of a causal LM, in the order a fault would travel: reference, graph, onnxruntime, 16-bit, kernels, engine.

Each stage compares one artefact with an oracle, under a limit whose reason is stated in :mod:`llama_export.parity.judge`:

* ``reference/*``        our PyTorch model against Hugging Face's; its trace, which is the float64 oracle of all that follows
* ``graph/*``            the exported graph in float64: 1e-9, tensor by tensor; and what its results must not depend on
* ``onnxruntime/*``      the file onnxruntime runs, held to the noise floor of float32; and what must not change its results
* ``evaluator/<dtype>``  the graph at 16 bits, held to the noise floor of that dtype
* ``text/*``             both on a text of the user's: KL divergence and perplexity
* ``kernels/*``          the graph with its custom ops computed by the plugins' kernels, on the CPU: under Triton's
                         interpreter, through the plugin library's own ``enqueue``, and by the PTX that it carries
* ``engine/*``           every engine in the bundle: its structure here, its execution where a GPU allows
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from llama_export.bundle.bundle import Bundle
from llama_export.config.settings import EngineConfig
from llama_export.engine.build import build_engine
from llama_export.engine.check import check_engine
from llama_export.engine.sidecar import EngineSidecar
from llama_export.errors import ConfigError, MissingDependencyError
from llama_export.parity.judge import (
    BY,
    FLOAT64_LIMIT,
    NOISE_MAX,
    TRANSFORMERS_WHY,
    Measured,
    NotRun,
    custom_kernels,
    engine_structure,
    judge,
    judge_noise,
    some_layers,
    weight_hashes,
)
from llama_export.parity.metrics import difference
from llama_export.parity.report.result import LogitsSample, Stage, Tolerance
from llama_export.parity.stages.causal_validator import GREEDY_TOKENS, PROMPTS, CausalValidator
from llama_export.parity.stages.logits_sample import decode_sample
from llama_export.runtime.engine_session import EngineSession, execution_blocker
from llama_export.runtime.generation import generate
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession
from llama_export.runtime.text import TextCodec

try:
    import torch

    from llama_export.model import LlamaForCausalLM
    from llama_export.parity.calls import (
        Answers,
        Call,
        Pairs,
        Rows,
        Run,
        cache_pairs,
        call,
        carried,
        collected,
        graph_inputs,
        logits_pairs,
        one_row,
    )
    from llama_export.parity.locate.locate import Trace, tensor_errors
    from llama_export.parity.oracle.evaluator import GraphEvaluator
    from llama_export.parity.sessions import answers, reference_session
    from llama_export.parity.stages.divergence import (
        engine_divergence,
        evaluator_divergence,
        graph_case,
        onnxruntime_divergence,
    )
    from llama_export.parity.stages.invariances import INVARIANCES
    from llama_export.parity.stages.ops import op_stage
    from llama_export.parity.stages.rope import angle_rounding, graph_rope, reference_rope
    from llama_export.parity.stages.text import text_evaluator, text_onnxruntime
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err

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


def _sample(v: CausalValidator, got: Answers, rows: Rows) -> LogitsSample:
    """Logits of the prefill and of every step, for the report."""
    return decode_sample(got.row(0).tokens, v.oracle(rows).row(0).tokens, rows.prompts[0], v.bundle.folder)


def reference_transformers(v: CausalValidator) -> Stage:
    """Logits of a prefill and of every decode step, and the cache, against Hugging Face, both in float64."""
    ours = v.oracle(v.rows).rows()
    theirs, theirs32 = v.floor(v.rows, torch.float64), v.floor(v.rows, torch.float32)
    # Both of theirs turn the keys by the same float32 cos and sin, so their difference does not hold what that costs.
    noise = difference(cache_pairs(theirs32, theirs))
    turned = angle_rounding(v.llama, len(v.rows.ids[0])) * noise.largest
    measured = [
        Measured("logits", difference(logits_pairs(ours, theirs)), difference(logits_pairs(theirs32, theirs))),
        Measured("cache", difference(cache_pairs(ours, theirs)), replace(noise, max_abs=noise.max_abs + turned)),
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
    runs = [Run(calls, v.capacity)]
    inputs = graph_inputs(runs, v.llama, torch.float64)
    (got,) = collected(runs, v.program.stream(inputs, carried(v.llama), torch.float64), v.llama)
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
    name: str, path: Callable[[Bundle], Path], custom_ops: Literal["eager", "bodies"], what: str
) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        calls = _ragged_calls(v)
        inputs = graph_inputs([Run(calls, v.capacity)], v.llama, torch.float64)
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
        place = trace.first_divergence
        stage = judge(
            name, difference(pairs), first_divergence=place, tensors_compared=len(trace.errors),
            series={"largest tensor error per layer": trace.per_layer},
            reason=f"the graph in float64, custom ops by {what}, against the reference's trace in float64: ragged prefill, chunk, decode, cache",
        )  # fmt: skip
        if stage.verdict == "fail" and place is not None:
            place |= graph_case(v, evaluator, calls, custom_ops, place["tensor"], name)
            v.found_wrong[path(v.bundle)] = place
        return stage

    return run


# ---- what results must not depend on ----------------------------------------------------------------------------


def _rows(found: Sequence[Answers]) -> list[Answers]:
    """Every row of every run, alone."""
    return [row for run in found for row in run.rows()]


def _graph_invariance(name: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch.float64, custom_ops="bodies")
        check = INVARIANCES[name](v)
        found = v.run_evaluator(evaluator, [*check.got, *check.want])
        got, want = _rows(found[: len(check.got)]), _rows(found[len(check.got) :])
        pairs = logits_pairs(got, want) + cache_pairs(got, want)
        return judge(
            f"graph/{name}", difference(pairs), reason=f"the graph in float64 by its function bodies: {check.said}"
        )

    return run


def _onnxruntime_invariance(name: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        check = INVARIANCES[name](v)
        got, want = (_rows([v.run_onnxruntime(run) for run in runs]) for runs in (check.got, check.want))
        return judge_noise(
            f"onnxruntime/{name}", v.alike(got, want), dtype="float32", bundle_dtype=v.bundle.dtype,
            reason=f"onnxruntime: {check.said}",
        )  # fmt: skip

    return run


# ---- onnxruntime ------------------------------------------------------------------------------------------------


def _located(run: Callable[[CausalValidator], Stage]) -> Callable[[CausalValidator], Stage]:
    """The stage; where it fails, with the place where onnxruntime goes wrong."""

    def located(v: CausalValidator) -> Stage:
        stage = run(v)
        return stage if stage.verdict == "pass" else replace(stage, first_divergence=_where_onnxruntime_diverges(v))

    return located


def _where_onnxruntime_diverges(v: CausalValidator) -> Mapping[str, Any]:
    """Found once per run. A file that is itself wrong has been found by the graph's stages, whoever runs it."""
    path = v.bundle.onnxruntime_path
    if path not in v.found_wrong:
        v.found_wrong[path] = onnxruntime_divergence(
            v, lambda other, rows: other.run_onnxruntime(Run(rows.calls(), other.capacity)), "onnxruntime"
        )
    return v.found_wrong[path]


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
        logits=_sample(v, v.onnxruntime, v.rows),
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
    chunks = [call(f"chunk at {begin}", [ids[begin:end]]) for begin, end in pieces]
    parts, whole = (v.run_onnxruntime(Run(calls, n)) for calls in (chunks, [call("prefill", [ids[:n]])]))
    return judge_noise(
        "onnxruntime/chunked-prefill", v.alike(parts.rows(), whole.rows()), dtype="float32", bundle_dtype=v.bundle.dtype,
        chunks=[float(end - begin) for begin, end in pieces],
        reason=f"a prefill of {n} in {len(pieces)} chunks against the same in one piece",
    )  # fmt: skip


def onnxruntime_repeat(v: CausalValidator) -> Stage:
    """The same calls in a new session give the same bits."""
    first = v.onnxruntime
    v.close_onnxruntime()
    again = v.run_onnxruntime(v.run)
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
        prompts = [codec.encode(text) for text in PROMPTS]
    except ConfigError:
        prompts = [v.random_ids(4 + row, v.config.seed + 20 + row) for row in range(5)]
    longest = max(map(len, prompts))
    new_tokens = max(1, min(GREEDY_TOKENS, v.llama.max_length - longest))
    session = OnnxRuntimeSession(v.bundle, max_seq_len=longest + new_tokens, graph=v.onnxruntime_graph)
    noise = v.alike(v.onnxruntime.rows(), v.onnxruntime.rows())[0].noise
    limit = 2 * NOISE_MAX * noise.relative
    choices = [generate(session, [prompt], max_new_tokens=new_tokens).tokens[0] for prompt in prompts]
    # What is chosen is known now, so the oracle reads it at once; where RoPE follows the length, step by step as it was made.
    read = [
        one_row([*prompt, *chosen[:-1]], len(prompt) if v.follows_length else len(prompt) + new_tokens - 1)
        for prompt, chosen in zip(prompts, choices, strict=True)
    ]
    oracle = v.run_oracle(read)  # not kept: so many logits of a large vocabulary are hundreds of MB
    equal, ties, worst_gap = 0, 0, 0.0
    for prompt, chosen, rows in zip(prompts, choices, read, strict=True):
        logits = oracle[rows].row(0).tokens[len(prompt) - 1 :]
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
    session = OnnxRuntimeSession(v.bundle, max_seq_len=16, graph=v.onnxruntime_graph)
    for array in session.cache.values():
        array[...] = 1  # a copy would be made into zeros
    ids = v.rows.ids[0]
    session.step([ids[:3]])
    before = {name: session.cache_array(name).copy() for name in session.cache}
    addresses = {name: array.ctypes.data for name, array in session.cache.items()}
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
    del session
    v.close_onnxruntime()  # the last stage that needs it
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
        (got,) = v.run_evaluator(evaluator, [v.run])
        stage = judge_noise(
            f"evaluator/{dtype}", v.measured(got, v.rows, torch_dtype), dtype=dtype, bundle_dtype=v.bundle.dtype,
            reason=f"the graph in {dtype} against float64",
            series=_per_step(got.row(0), v.oracle(v.rows).row(0), v.prompt),
            logits=_sample(v, got, v.rows),
        )  # fmt: skip
        layers = range(v.llama.num_hidden_layers)
        return _with_operation(v, stage, evaluator, v.rows, torch_dtype, "eager", layers)

    return run


def _with_operation(
    v: CausalValidator,
    stage: Stage,
    evaluator: GraphEvaluator,
    rows: Rows,
    dtype: torch.dtype,
    how: str,
    layers: Collection[int],
) -> Stage:
    """A failed stage with the operation that is at fault."""
    if stage.verdict == "pass":
        return stage
    found = evaluator_divergence(v, evaluator, rows, dtype, how, layers, stage.name)
    return replace(stage, first_divergence=found)


def _kernel_evaluator(v: CausalValidator, how: str, dtype: torch.dtype, layers: Collection[int]) -> GraphEvaluator:
    return GraphEvaluator(v.bundle.model_path, dtype=dtype, custom_ops=custom_kernels(how), custom_layers=layers)


def _kernel_stage(how: str, dtype: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        rows, torch_dtype = v.kernel_rows, getattr(torch, dtype)
        layers = some_layers(v.llama.num_hidden_layers)
        evaluator = _kernel_evaluator(v, how, torch_dtype, layers)
        (got,) = v.run_evaluator(evaluator, [Run(rows.calls(), rows.longest)])
        stage = judge_noise(
            f"kernels/{how}-{dtype}", v.measured(got, rows, torch_dtype), dtype=dtype, bundle_dtype=v.bundle.dtype,
            layers=[float(layer) for layer in layers],
            reason=f"the graph in {dtype} with its ops by {BY[how]}, against float64: "
            f"rows of {rows.prompts[0]} and {rows.prompts[1]} tokens in one batch, then {rows.steps} decode steps",
        )  # fmt: skip
        return _with_operation(v, stage, evaluator, rows, torch_dtype, how, layers)

    return run


def _kernel_poisoned(how: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        calls, capacity = v.kernel_rows.calls()[:3], v.kernel_rows.longest
        # One entry that is loaded spoils everything, so two layers tell as much as all; those that are not the kernels' are
        # eager, and eager attention never lets an unseen NaN through.
        layers = sorted({0, v.llama.num_hidden_layers - 1})
        evaluator = _kernel_evaluator(v, how, torch.float32, layers)
        dirty, clean = v.run_evaluator(evaluator, [Run(calls, capacity, fill) for fill in (np.nan, 0.0)])
        found = difference(logits_pairs(dirty.rows(), clean.rows()) + cache_pairs(dirty.rows(), clean.rows()))
        return judge(
            f"kernels/{how}-poisoned-cache", found, limit=0.0, why="an entry that is never loaded changes no bit",
            layers=[float(layer) for layer in layers],
            reason=f"{BY[how]} in float32: cache entries past the valid length hold NaN against zeros, prefill and 2 steps",
        )  # fmt: skip

    return run


def _engine_artefact(
    v: CausalValidator, path: Path, facts: EngineSidecar
) -> Callable[[CausalValidator, Rows], Answers]:
    """Runs the engine; of a prefix, one that is built in the same way first."""
    config = EngineConfig(
        backend=facts.backend, ops=facts.ops, max_seq_len=facts.max_seq_len, max_batch=facts.max_batch, tf32=facts.settings.tf32
    )  # fmt: skip

    def run(which: CausalValidator, rows: Rows) -> Answers:
        engine = path if which is v else Path(build_engine(which.bundle, config).engine)
        return answers(EngineSession(which.bundle, engine), rows.calls(), which.cache_names)

    return run


def engine_execution(v: CausalValidator) -> list[Stage]:
    """Prefill and decode on the GPU, held to the noise floor of the bundle's dtype."""
    if not v.bundle.engines:
        raise NotRun("no engine in this bundle; make one with `llama-export build`")
    stages = []
    for path in v.bundle.engines:
        name = f"engine/execution/{path.stem}"
        facts = check_engine(v.bundle, path).sidecar
        blocker = execution_blocker(facts.backend)
        if blocker is not None:
            stages.append(Stage(name=name, verdict="not-run", reason=blocker))
            continue
        ids = v.rows.ids[0][: facts.max_seq_len]  # an engine may hold fewer tokens than the other stages use
        rows = one_row(ids, min(v.prompt, len(ids) - 1))
        dtype = getattr(torch, v.bundle.dtype)
        artefact = _engine_artefact(v, path, facts)
        got = artefact(v, rows)
        stage = judge_noise(
            name, v.measured(got, rows, dtype), dtype=v.bundle.dtype, bundle_dtype=v.bundle.dtype,
            series=_per_step(got.row(0), v.oracle(rows).row(0), rows.prompts[0]),
            logits=_sample(v, got, rows),
            reason=f"prefill of {rows.prompts[0]} and {rows.steps} decode steps on the GPU in {v.bundle.dtype} against float64",
        )  # fmt: skip
        if stage.verdict == "fail":
            found = engine_divergence(v, artefact, rows, dtype, facts.plugin_layers, name)
            stage = replace(stage, first_divergence=found)
        stages.append(stage)
    return stages


def _model(bundle: Bundle) -> Path:
    return bundle.model_path


def _onnxruntime(bundle: Bundle) -> Path:
    return bundle.onnxruntime_path


STAGES: dict[str, Callable[[CausalValidator], Stage | list[Stage]]] = {
    "bundle/weights": weight_hashes,
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
    "onnxruntime/prefill": _located(onnxruntime_prefill),
    "onnxruntime/chunked-prefill": _located(onnxruntime_chunked),
    "onnxruntime/decode": _located(onnxruntime_decode),
    "onnxruntime/cache": _located(onnxruntime_cache),
    "onnxruntime/greedy": _located(onnxruntime_greedy),
    **{f"onnxruntime/{name}": _located(_onnxruntime_invariance(name)) for name in INVARIANCES},
    "onnxruntime/repeat": onnxruntime_repeat,
    "onnxruntime/in-place": onnxruntime_in_place,
    "evaluator/bfloat16": _noise_stage("bfloat16"),
    "evaluator/float16": _noise_stage("float16"),
    "text/onnxruntime": text_onnxruntime,
    "text/evaluator": text_evaluator,
    **{
        f"kernels/{how}-{dtype}": _kernel_stage(how, dtype)
        for how in BY
        for dtype in ("float32", "bfloat16", "float16")
    },
    **{f"kernels/{how}-poisoned-cache": _kernel_poisoned(how) for how in BY},
    **{f"ops/{how}": op_stage(how) for how in BY},
    "engine/structure": engine_structure,
    "engine/execution": engine_execution,
}
