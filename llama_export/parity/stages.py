"""The stages of a causal LM, in the order a fault would travel: reference, graph, onnxruntime, 16-bit, engine.

Each stage compares one artefact with the one before it, under a limit whose reason is stated:

* ``reference/transformers``  our PyTorch model against Hugging Face's, float32
* ``graph/float64-*``         the exported graph against the reference, both in float64: 1e-9, so a fault of meaning shows
* ``onnxruntime/*``           the file onnxruntime runs against the reference, float32
* ``evaluator/<dtype>``       the graph at 16 bits against float64, held to what PyTorch itself loses at that dtype
* ``kernels/*``               the graph with its custom ops computed by the plugins' kernels, on the CPU: under Triton's
                              interpreter, and through the plugin library's own ``enqueue``
* ``engine/*``                every engine in the bundle: its structure here, its execution where a GPU allows
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from llama_export.bundle import Bundle
from llama_export.engine import check_engine
from llama_export.engine_session import EngineSession, execution_blocker
from llama_export.errors import ConfigError, MissingDependencyError
from llama_export.kv_cache import cache_names
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
from llama_export.runtime import OnnxRuntimeSession, TextCodec, generate

try:
    import torch

    from llama_export.model import LlamaForCausalLM
    from llama_export.parity.evaluator import CustomOps, GraphEvaluator
    from llama_export.parity.sessions import (
        Session,
        TransformersSession,
        evaluator_session,
        reference_session,
        trajectory,
    )
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err

GREEDY_TOKENS = 64
_MIN_PROMPT = 8
"""Tokens; fewer cannot be cut into chunks and rows of different length."""
_APPENDED = 8
"""Tokens that the stages with a fixed schedule append to the prompt at most, whatever ``--steps`` says."""
_PROMPTS = ("def ", "import os\n", "class ", "The ", "    return ")


class CausalValidator(Validator):
    """Adds the token sequences, and what the models and onnxruntime make of them."""

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
        self.ids: list[int] = self.random_ids(self.prompt + config.steps, config.seed)

    @cached_property
    def reference32(self) -> LlamaForCausalLM:
        """The reference in float32."""
        return cast(LlamaForCausalLM, self.load_reference(torch.float32))

    @cached_property
    def reference64(self) -> LlamaForCausalLM:
        """The reference in float64: the oracle."""
        return cast(LlamaForCausalLM, self.load_reference(torch.float64))

    @cached_property
    def want64(self) -> Any:
        """[n, V], logits of the float64 reference over prefill and decode."""
        return trajectory(reference_session(self.reference64, max_seq_len=self.capacity), self.ids, self.prompt)

    @cached_property
    def reference_run(self) -> tuple[Session, Any]:
        """The float32 reference after the whole trajectory, and its logits [n, V]."""
        session = reference_session(self.reference32, max_seq_len=self.capacity)
        return session, trajectory(session, self.ids, self.prompt)

    @cached_property
    def onnxruntime_run(self) -> tuple[Session, Any]:
        """onnxruntime after the whole trajectory, and its logits [n, V]."""
        session = OnnxRuntimeSession(self.bundle, max_seq_len=self.capacity)
        return session, trajectory(session, self.ids, self.prompt)

    @cached_property
    def transformers_run(self) -> tuple[Session, Any]:
        """Hugging Face's model in float32 after the whole trajectory, and its logits [n, V]."""
        session = TransformersSession(self.transformers_model(torch.float32))
        return session, trajectory(session, self.ids, self.prompt)


# ---- the stages -------------------------------------------------------------------------------------------------


def _per_step(got: Any, want: Any, prompt: int, label: str = "error per decode step") -> dict[str, list[float]]:
    """Largest error of each decode step as a share of the largest logit of the whole run."""
    largest = float(np.abs(want).max()) or 1.0
    errors = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max(-1) / largest
    return {label: [float(error) for error in errors[prompt:]]}


def _cache_pairs(validator: CausalValidator, got: Session, want: Session) -> list[tuple[str, Any, Any]]:
    """The valid part of every cache tensor."""
    length = len(validator.ids)
    names = [past for past, _ in cache_names(validator.llama.num_hidden_layers)]
    return [(name, got.cache_array(name)[:, :, :length], want.cache_array(name)[:, :, :length]) for name in names]


def reference_transformers(v: CausalValidator) -> Stage:
    """Logits of a prefill and of every decode step, and the cache, against Hugging Face."""
    (got_session, got), (want_session, want) = v.reference_run, v.transformers_run
    cache = difference(_cache_pairs(v, got_session, want_session))
    logits = difference([("logits", got, want)])
    found = max(logits, cache, key=lambda item: item.relative)
    return judge(
        "reference/transformers", found, limit=FLOAT32_LIMIT, why=FLOAT32_WHY, series=_per_step(got, want, v.prompt),
        reason=f"reference against transformers in float32: prefill of {v.prompt}, {v.config.steps} decode steps, cache",
        logits_error=logits.relative, cache_error=cache.relative,
    )  # fmt: skip


def _graph_stage(
    name: str, path: Callable[[Bundle], Path], custom_ops: CustomOps, what: str
) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        evaluator = GraphEvaluator(path(v.bundle), dtype=torch.float64, custom_ops=custom_ops)
        got = evaluator_session(evaluator, v.llama, max_seq_len=v.capacity, batch_size=2)
        want = reference_session(v.reference64, max_seq_len=v.capacity, batch_size=2)
        pairs: list[tuple[str, Any, Any]] = []
        # Ragged on purpose: rows of different length, a chunk after a prefill, then single tokens.
        lengths = (v.prompt, max(1, v.prompt // 2))
        tokens = np.stack([v.random_ids(v.prompt + 7, v.config.seed + row) for row in range(2)])
        for label, begin, end, valid in (
            ("prefill", 0, v.prompt, lengths),
            ("chunk", v.prompt, v.prompt + 5, (5, 3)),
            ("decode 0", v.prompt + 5, v.prompt + 6, (1, 1)),
            ("decode 1", v.prompt + 6, v.prompt + 7, (1, 1)),
        ):
            index = np.stack([np.arange(end - begin)] * 2)
            logits = [
                session.step(tokens[:, begin:end], sequence_length=valid, logits_index=index) for session in (got, want)
            ]
            pairs.append((f"logits ({label})", logits[0], logits[1]))
        for past, _ in cache_names(v.llama.num_hidden_layers):
            pairs.append((past, got.cache_array(past), want.cache_array(past)))
        return judge(
            name, difference(pairs), limit=FLOAT64_LIMIT, why=FLOAT64_WHY,
            reason=f"the graph in float64, custom ops by {what}, against the reference in float64: ragged prefill, chunk, decode, cache",
        )  # fmt: skip

    return run


def onnxruntime_prefill(v: CausalValidator) -> Stage:
    """All positions of one prefill."""
    (_, got), (_, want) = v.onnxruntime_run, v.reference_run
    return judge(
        "onnxruntime/prefill", difference([("logits", got[: v.prompt], want[: v.prompt])]), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        reason=f"all {v.prompt} positions of a prefill on onnxruntime against the reference",
    )  # fmt: skip


def onnxruntime_decode(v: CausalValidator) -> Stage:
    """Every teacher-forced step."""
    (_, got), (_, want) = v.onnxruntime_run, v.reference_run
    return judge(
        "onnxruntime/decode", difference([("logits", got[v.prompt :], want[v.prompt :])]), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        series=_per_step(got, want, v.prompt), steps=v.config.steps,
        reason=f"{v.config.steps} teacher-forced decode steps on onnxruntime against the reference",
    )  # fmt: skip


def onnxruntime_cache(v: CausalValidator) -> Stage:
    """Keys and values after the last step, and the untouched rest of the buffers."""
    (got, _), (want, _) = v.onnxruntime_run, v.reference_run
    found = difference(_cache_pairs(v, got, want))
    length = len(v.ids)
    names = [past for past, _ in cache_names(v.llama.num_hidden_layers)]
    stray = sum(int(np.count_nonzero(got.cache_array(name)[:, :, length:])) for name in names)
    per_layer = [
        difference(
            [(name, got.cache_array(name)[:, :, :length], want.cache_array(name)[:, :, :length]) for name in pair]
        ).relative
        for pair in zip(names[::2], names[1::2], strict=True)
    ]
    stage = judge(
        "onnxruntime/cache", found, limit=FLOAT32_LIMIT, why=FLOAT32_WHY, entries_written_past_the_end=stray,
        series={"error per layer": per_layer},
        reason=f"keys and values of all layers after {length} tokens against the reference; nothing written past them",
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
    n = v.prompt
    cuts = sorted({0, n // 3, n // 3 + 1, 2 * n // 3, n - 1, n})
    whole, parts = (OnnxRuntimeSession(v.bundle, max_seq_len=v.capacity) for _ in range(2))
    tokens = np.asarray(v.ids[:n])[None]
    want = whole.step(tokens, logits_index=np.arange(n)[None])
    got = np.concatenate(
        [
            parts.step(tokens[:, begin:end], logits_index=np.arange(end - begin)[None])
            for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
        ],
        axis=1,
    )
    names = [past for past, _ in cache_names(v.llama.num_hidden_layers)]
    pairs = [("logits", got, want), *((name, parts.cache_array(name), whole.cache_array(name)) for name in names)]
    return judge(
        "onnxruntime/chunked-prefill", difference(pairs), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        chunks=[float(end - begin) for begin, end in zip(cuts[:-1], cuts[1:], strict=True)],
        reason=f"a prefill of {n} in {len(cuts) - 1} chunks against the same in one piece: logits and cache",
    )  # fmt: skip


def onnxruntime_ragged(v: CausalValidator) -> Stage:
    """Every row of a ragged batch equals the row alone: no influence of neighbours or padding."""
    lengths = (v.prompt, max(1, v.prompt // 2), 1)
    rows = [v.random_ids(v.prompt + 4, v.config.seed + 10 + row) for row in range(len(lengths))]
    batch = OnnxRuntimeSession(v.bundle, max_seq_len=v.capacity, batch_size=len(rows))
    tokens = np.asarray(rows)  # what follows a row's valid length is padding with arbitrary tokens
    got = [batch.step(tokens[:, : v.prompt], sequence_length=lengths)]
    got += [batch.step([[row[length + step]] for row, length in zip(rows, lengths, strict=True)]) for step in range(4)]
    pairs = []
    for row, length in enumerate(lengths):
        alone = OnnxRuntimeSession(v.bundle, max_seq_len=v.capacity)
        want = [alone.step([rows[row][:length]])]
        want += [alone.step([[rows[row][length + step]]]) for step in range(4)]
        pairs += [(f"row {row} step {step}", got[step][row], want[step][0]) for step in range(5)]
    return judge(
        "onnxruntime/ragged-batch", difference(pairs), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        reason=f"rows of {', '.join(map(str, lengths))} tokens in one padded batch, prefill and 4 steps, against each row alone",
    )  # fmt: skip


def onnxruntime_greedy(v: CausalValidator) -> Stage:
    """Greedy tokens are the reference's own first choice at every step."""
    try:
        codec = TextCodec(v.bundle.folder)
        prompts = [codec.encode(text) for text in _PROMPTS]
    except ConfigError:
        prompts = [v.random_ids(4 + row, v.config.seed + 20 + row) for row in range(5)]
    longest = max(map(len, prompts))
    new_tokens = max(1, min(GREEDY_TOKENS, v.llama.max_length - longest))
    capacity = longest + new_tokens
    equal, ties, worst_gap = 0, 0, 0.0
    for prompt in prompts:
        chosen = generate(
            OnnxRuntimeSession(v.bundle, max_seq_len=capacity), [prompt], max_new_tokens=new_tokens
        ).tokens[0]
        reference = reference_session(v.reference32, max_seq_len=capacity)
        if v.follows_length:  # the same calls, since each is rotated by its own length
            logits = trajectory(reference, prompt + chosen[:-1], len(prompt))[len(prompt) - 1 :]
        else:
            index = np.arange(len(prompt) - 1, len(prompt) + new_tokens - 1)[None]
            logits = reference.step([prompt + chosen[:-1]], logits_index=index)[0]
        gaps = (logits.max(-1) - logits[np.arange(new_tokens), chosen]) / np.abs(logits).max()
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)  # a NaN would be smaller than any limit
        equal += int(not gaps.any())
        ties += int(((gaps > 0) & (gaps <= 2 * FLOAT32_LIMIT)).sum())
        worst_gap = max(worst_gap, float(gaps.max()))
    ok = worst_gap <= 2 * FLOAT32_LIMIT
    return Stage(
        name="onnxruntime/greedy",
        verdict="pass" if ok else "fail",
        reason=f"{new_tokens} greedy tokens for {len(prompts)} prompts are the reference's first choice at every step",
        metrics={"error": worst_gap, "equal_prompts": equal, "prompts": len(prompts), "tokens": new_tokens, "near_ties": ties},
        tolerance=Tolerance(
            value=2 * FLOAT32_LIMIT, metric="error",
            why="a token counts as equal when the reference's logits of both choices are closer than twice the float32 limit",
        ),
    )  # fmt: skip


def onnxruntime_in_place(v: CausalValidator) -> Stage:
    """One step writes its tokens' slots of the bound buffers and not one byte more."""
    session = OnnxRuntimeSession(v.bundle, max_seq_len=16)
    session.step([v.ids[:3]])
    before = {name: session.cache_array(name).copy() for name in session.cache}
    addresses = {name: value.data_ptr() for name, value in session.cache.items()}
    session.step([v.ids[3:5]])
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


def onnxruntime_transformers(v: CausalValidator) -> Stage:
    """The two ends of the chain, directly."""
    (_, got), (_, want) = v.onnxruntime_run, v.transformers_run
    return judge(
        "onnxruntime/transformers", difference([("logits", got, want)]), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        series=_per_step(got, want, v.prompt),
        reason=f"onnxruntime against transformers in float32: prefill of {v.prompt} and {v.config.steps} decode steps",
    )  # fmt: skip


def _noise_stage(dtype: str) -> Callable[[CausalValidator], Stage]:
    def run(v: CausalValidator) -> Stage:
        torch_dtype = getattr(torch, dtype)
        model = v.transformers_model(torch_dtype)
        noise_logits = trajectory(TransformersSession(model), v.ids, v.prompt)
        del model
        gc.collect()
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch_dtype)
        got = trajectory(evaluator_session(evaluator, v.llama, max_seq_len=v.capacity), v.ids, v.prompt)
        found, noise = difference([("logits", got, v.want64)]), difference([("logits", noise_logits, v.want64)])
        if noise.nonfinite and (not found.nonfinite or dtype != v.bundle.dtype):
            raise NotRun(
                f"transformers' own model gives {noise.nonfinite} logits that are not finite in {dtype}: no noise floor"
            )
        error, l2_ratio, max_ratio = noise_share(found, noise)
        return Stage(
            name=f"evaluator/{dtype}",
            verdict="pass" if found.nonfinite == 0 and error <= 1 else "fail",
            reason=f"the graph in {dtype} against float64: {l2_ratio:.2f} x the noise floor in L2, {max_ratio:.2f} x in the maximum",
            metrics={
                "error": error, "relative_l2": found.relative_l2, "noise_floor_relative_l2": noise.relative_l2, "l2_ratio": l2_ratio,
                "max_abs": found.max_abs, "noise_floor_max_abs": noise.max_abs, "max_ratio": max_ratio, "nonfinite": found.nonfinite,
            },
            tolerance=Tolerance(value=1.0, metric="error", why=NOISE_WHY),
            worst=found.worst,
            # Not the verdict's metric, so under another name: the limit line of the plots belongs to `error`.
            series=_per_step(got, v.want64, v.prompt, "relative maximum per decode step"),
        )  # fmt: skip

    return run


@dataclass(frozen=True, slots=True)
class _Ragged:
    """What a batch of rows of different length gave: per row the logits [length + steps, V] and the caches, valid part."""

    logits: list[Any]
    cache: list[dict[str, Any]]

    def pairs(self, want: _Ragged) -> tuple[list[tuple[str, Any, Any]], list[tuple[str, Any, Any]]]:
        """(logits, caches) to compare."""
        rows = range(len(self.logits))
        logits = [(f"logits row {row}", self.logits[row], want.logits[row]) for row in rows]
        cache = [(name, self.cache[row][name], want.cache[row][name]) for row in rows for name in self.cache[row]]
        return logits, cache


def _ragged_batch(
    session: Session, v: CausalValidator, rows: Sequence[Sequence[int]], prompts: Sequence[int]
) -> _Ragged:
    """One padded prefill and as many decode steps as the rows have further tokens."""
    longest, steps = max(prompts), len(rows[0]) - prompts[0]
    tokens = np.zeros((len(rows), longest), np.int64)
    for row, ids, length in zip(tokens, rows, prompts, strict=True):
        row[:length] = ids[:length]
    index = np.stack([np.arange(longest)] * len(rows))
    prefill = session.step(tokens, sequence_length=prompts, logits_index=index)
    decoded = [
        session.step([[ids[length + step]] for ids, length in zip(rows, prompts, strict=True)]) for step in range(steps)
    ]
    logits = [
        np.concatenate([prefill[row, :length], *(step[row] for step in decoded)]) for row, length in enumerate(prompts)
    ]
    names = [past for past, _ in cache_names(v.llama.num_hidden_layers)]
    cache = [{name: session.cache_array(name)[row, :, : len(ids)] for name in names} for row, ids in enumerate(rows)]
    return _Ragged(logits, cache)


def _rows_alone(v: CausalValidator, model: Any, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> _Ragged:
    """The same from transformers, one row at a time."""
    names = [past for past, _ in cache_names(v.llama.num_hidden_layers)]
    logits, cache = [], []
    for ids, prompt in zip(rows, prompts, strict=True):
        session = TransformersSession(model)
        logits.append(trajectory(session, ids, prompt))
        cache.append({name: session.cache_array(name)[0] for name in names})
    return _Ragged(logits, cache)


def _kernel_stage(how: str, dtype: str) -> Callable[[CausalValidator], Stage]:
    name = f"kernels/{how}-{dtype}"

    def run(v: CausalValidator) -> Stage:
        kernels = custom_kernels(how)
        longest = min(v.prompt, KERNEL_TOKENS)
        prompts = (longest, max(1, longest // 2))
        rows = [v.random_ids(prompt + _APPENDED, v.config.seed + 30 + row) for row, prompt in enumerate(prompts)]
        capacity = longest + _APPENDED
        custom_ops, layers = some_layers(kernels, v.llama.num_hidden_layers)
        torch_dtype = getattr(torch, dtype)
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch_dtype, custom_ops=custom_ops)
        session = evaluator_session(evaluator, v.llama, max_seq_len=capacity, batch_size=2)
        got = _ragged_batch(session, v, rows, prompts)
        oracle = reference_session(v.reference64, max_seq_len=capacity, batch_size=2)
        want = _ragged_batch(oracle, v, rows, prompts)
        found = [difference(pairs) for pairs in got.pairs(want)]
        schedule = f"rows of {prompts[0]} and {prompts[1]} tokens in one batch, then {_APPENDED} decode steps, logits and cache"
        by = BY[how]
        facts: dict[str, Any] = {
            "layers": [float(layer) for layer in layers],
            "logits_error": found[0].relative,
            "cache_error": found[1].relative,
        }
        if dtype == "float32":
            return judge(
                name, max(found, key=lambda item: (item.nonfinite, item.relative)), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
                reason=f"the graph in float32 with its ops by {by}, against the float64 reference: {schedule}", **facts,
            )  # fmt: skip
        noise = [
            difference(pairs) for pairs in _rows_alone(v, v.transformers_model(torch_dtype), rows, prompts).pairs(want)
        ]
        if any(item.nonfinite for item in noise) and dtype != v.bundle.dtype:
            raise NotRun(f"transformers' own model gives values that are not finite in {dtype}: no noise floor")
        shares = [noise_share(*both) for both in zip(found, noise, strict=True)]
        worse = max(range(2), key=lambda index: shares[index][0])
        error = shares[worse][0]
        return Stage(
            name=name,
            verdict="pass" if error <= 1 and not any(item.nonfinite for item in found) else "fail",
            reason=f"the graph in {dtype} with its ops by {by}, against float64: {shares[0][1]:.2f} x the noise floor in L2 "
            f"for logits, {shares[1][1]:.2f} x for the cache; {schedule}",
            metrics={
                "error": error, "l2_ratio": shares[worse][1], "max_ratio": shares[worse][2],
                "nonfinite": sum(item.nonfinite for item in found), **facts,
            },
            tolerance=Tolerance(value=1.0, metric="error", why=NOISE_WHY),
            worst=found[worse].worst,
        )  # fmt: skip

    return run


def engine_execution(v: CausalValidator) -> list[Stage]:
    """Prefill and decode on the GPU against the noise floor's float64 reference."""
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
        ids = v.ids[: facts.max_seq_len]  # an engine may hold fewer tokens than the other stages use
        prompt = min(v.prompt, len(ids) - 1)
        got, want = trajectory(EngineSession(v.bundle, path), ids, prompt), v.want64[: len(ids)]
        stages.append(
            judge(
                name, difference([("logits", got, want)]), limit=ENGINE_LIMITS[v.bundle.dtype], series=_per_step(got, want, prompt),
                why=ENGINE_WHY,
                reason=f"prefill of {prompt} and {len(ids) - prompt} decode steps on the GPU against the float64 reference",
            )
        )  # fmt: skip
    return stages


def _model(bundle: Bundle) -> Path:
    return bundle.model_path


def _onnxruntime(bundle: Bundle) -> Path:
    return bundle.onnxruntime_path


STAGES: dict[str, Callable[[CausalValidator], Stage | list[Stage]]] = {
    "reference/transformers": reference_transformers,
    "graph/float64-eager": _graph_stage("graph/float64-eager", _model, "eager", "their eager maths"),
    "graph/float64-bodies": _graph_stage("graph/float64-bodies", _model, "bodies", "the function bodies of model.onnx"),
    "graph/float64-ort-bodies": _graph_stage(
        "graph/float64-ort-bodies", _onnxruntime, "bodies", "the function bodies of model.onnxruntime.onnx"
    ),
    "onnxruntime/prefill": onnxruntime_prefill,
    "onnxruntime/chunked-prefill": onnxruntime_chunked,
    "onnxruntime/decode": onnxruntime_decode,
    "onnxruntime/cache": onnxruntime_cache,
    "onnxruntime/greedy": onnxruntime_greedy,
    "onnxruntime/ragged-batch": onnxruntime_ragged,
    "onnxruntime/in-place": onnxruntime_in_place,
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
}
