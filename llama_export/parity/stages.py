"""The stages of a validation, in the order a fault would travel: reference, graph, onnxruntime, 16-bit, engine.

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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from llama_export.bundle import Bundle, sha256_of_file
from llama_export.checkpoint import Checkpoint, load_checkpoint
from llama_export.engine import check_engine
from llama_export.engine_session import EngineSession, execution_blocker
from llama_export.environment import environment
from llama_export.errors import ConfigError, LlamaExportError, MissingDependencyError
from llama_export.kv_cache import cache_names
from llama_export.parity.metrics import Difference, difference
from llama_export.parity.result import ParityReport, Stage, Tolerance, matches
from llama_export.plugins import find_library, kernels_installed
from llama_export.runtime import OnnxRuntimeSession, TextCodec, generate

try:
    import torch

    from llama_export.model import LlamaForCausalLM, load_reference
    from llama_export.ops import OP_SPECS
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

FLOAT64_LIMIT = 1e-9
FLOAT64_WHY = "float64 rounding is 1e-16 per operation; anything above 1e-9 is a difference of meaning, not of rounding"
FLOAT32_LIMIT = 1e-5
FLOAT32_WHY = "float32 sums of a few thousand terms taken in another order differ by about 1e-6 of the largest value"
NOISE_L2, NOISE_MAX = 2.0, 4.0
NOISE_WHY = (
    "transformers' eager model at this dtype, on this input, against the same float64 reference, is the noise floor: "
    f"at most {NOISE_L2:g} x of it in relative L2 and {NOISE_MAX:g} x in the maximum"
)
GREEDY_TOKENS = 64
_MIN_PROMPT = 8
"""Tokens; fewer cannot be cut into chunks and rows of different length."""
_APPENDED = 8
"""Tokens that the stages with a fixed schedule append to the prompt at most, whatever ``--steps`` says."""
_KERNEL_PROMPT = 17
"""Longest prompt of the kernel stages, tokens: the interpreter is slow, and 17 is no multiple of any tile."""
_KERNEL_LAYERS = 4
"""Layers whose ops the kernels compute; those of the others are eager. A larger model gets a sample, spread evenly."""
_PROMPTS = ("def ", "import os\n", "class ", "The ", "    return ")
DEVIATIONS = (
    "RoPE: cos and sin stay float32 and the rotation is rounded once; Hugging Face rounds cos and sin to the model dtype first. "
    "Nothing changes in float32; 16-bit results differ by less than the noise floor.",
    "Logits leave the graph as float32; Hugging Face returns the model dtype.",
)


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


def validate_bundle(
    bundle: Bundle, config: ValidateConfig | None = None, *, log: Callable[[str], None] = lambda line: None
) -> ParityReport:
    """Runs every selected stage and reports.

    Raises:
        ConfigError: a name in ``stages`` or ``require`` selects nothing, or the model's context is too short to decode.
    """
    config = config or ValidateConfig()
    validator = Validator(bundle, config)
    for selector in (*config.stages, *config.require):
        if not any(matches(name, selector) for name in STAGES):
            raise ConfigError(
                f"no stage `{selector}`",
                details={"got": selector, "expected": ", ".join(STAGES)},
                hint="a name, or the part before its slash",
            )
    stages = []
    for name, run in STAGES.items():
        if config.stages and not any(matches(name, selector) for selector in config.stages):
            stages.append(Stage(name=name, verdict="not-run", reason="not selected by --stages"))
            continue
        for stage in _run_stage(name, run, validator):
            log(f"validate: {stage.name}: {stage.verdict} ({stage.seconds:.1f} s)")
            stages.append(stage)
    return ParityReport(
        stages=tuple(stages),
        required=config.require,
        environment={**environment(), "command": f"llama-export validate {_name(bundle)} --steps {config.steps}"},
        hashes={
            "graph": sha256_of_file(bundle.model_path),
            **{path.name: sha256_of_file(path) for path in bundle.engines},
        },
        model={
            **bundle.manifest["model"],  # its dtype is what config.json states; the bundle's own may differ
            "name": _name(bundle),
            "task": bundle.manifest["task"],
            "dtype": bundle.dtype,
        },
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        deviations=DEVIATIONS,
    )


def _name(bundle: Bundle) -> str:
    """The folder's own name: a report travels, the path to the bundle does not."""
    return bundle.folder.resolve().name


def _run_stage(name: str, run: Callable[[Validator], Stage | list[Stage]], validator: Validator) -> list[Stage]:
    """A stage that raises what a user can act on has failed; only a stated reason makes it ``not-run``."""
    start = time.perf_counter()
    try:
        result = run(validator)
    except NotRun as reason:
        result = Stage(name=name, verdict="not-run", reason=str(reason))
    except MissingDependencyError as err:
        result = Stage(name=name, verdict="not-run", reason=f"{err.message}; {err.hint}")
    except (LlamaExportError, ValueError) as err:
        result = Stage(name=name, verdict="fail", reason=str(err))
    seconds = round(time.perf_counter() - start, 3)
    return [replace(stage, seconds=seconds) for stage in (result if isinstance(result, list) else [result])]


class Validator:
    """What the stages share: models, loaded once when a stage first asks, and the token sequences."""

    def __init__(self, bundle: Bundle, config: ValidateConfig) -> None:
        self.bundle = bundle
        self.config = config
        self.llama = bundle.config
        context = self.llama.max_position_embeddings
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
                    "max_position_embeddings": context,
                },
                hint="choose another --steps",
            )
        appended = max(config.steps, _APPENDED)
        self.prompt = min(config.prompt_tokens, context - appended)
        self.capacity = min(self.prompt + appended + 16, context)
        self.ids: list[int] = self.random_ids(self.prompt + config.steps, config.seed)

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

    @cached_property
    def reference32(self) -> LlamaForCausalLM:
        """The reference in float32."""
        return cast(LlamaForCausalLM, load_reference(self.checkpoint, torch.float32))

    @cached_property
    def reference64(self) -> LlamaForCausalLM:
        """The reference in float64: the oracle."""
        return cast(LlamaForCausalLM, load_reference(self.checkpoint, torch.float64))

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

    def transformers_model(self, dtype: torch.dtype) -> Any:
        """Hugging Face's eager model from the bundle's own files."""
        try:
            from transformers import LlamaForCausalLM as HuggingFaceLlama
            from transformers.utils import logging
        except ModuleNotFoundError as err:
            raise MissingDependencyError("transformers", "parity") from err
        logging.disable_progress_bar()
        return HuggingFaceLlama.from_pretrained(
            self.bundle.folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()


# ---- the stages -------------------------------------------------------------------------------------------------


def _judge(
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


def _per_step(got: Any, want: Any, prompt: int, label: str = "error per decode step") -> dict[str, list[float]]:
    """Largest error of each decode step as a share of the largest logit of the whole run."""
    largest = float(np.abs(want).max()) or 1.0
    errors = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max(-1) / largest
    return {label: [float(error) for error in errors[prompt:]]}


def _cache_pairs(validator: Validator, got: Session, want: Session) -> list[tuple[str, Any, Any]]:
    """The valid part of every cache tensor."""
    length = len(validator.ids)
    names = [past for past, _ in cache_names(validator.llama.num_hidden_layers)]
    return [(name, got.cache_array(name)[:, :, :length], want.cache_array(name)[:, :, :length]) for name in names]


def reference_transformers(v: Validator) -> Stage:
    """Logits of a prefill and of every decode step, and the cache, against Hugging Face."""
    (got_session, got), (want_session, want) = v.reference_run, v.transformers_run
    cache = difference(_cache_pairs(v, got_session, want_session))
    logits = difference([("logits", got, want)])
    found = max(logits, cache, key=lambda item: item.relative)
    return _judge(
        "reference/transformers", found, limit=FLOAT32_LIMIT, why=FLOAT32_WHY, series=_per_step(got, want, v.prompt),
        reason=f"reference against transformers in float32: prefill of {v.prompt}, {v.config.steps} decode steps, cache",
        logits_error=logits.relative, cache_error=cache.relative,
    )  # fmt: skip


def _graph_stage(
    name: str, path: Callable[[Bundle], Path], custom_ops: CustomOps, what: str
) -> Callable[[Validator], Stage]:
    def run(v: Validator) -> Stage:
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
        return _judge(
            name, difference(pairs), limit=FLOAT64_LIMIT, why=FLOAT64_WHY,
            reason=f"the graph in float64, custom ops by {what}, against the reference in float64: ragged prefill, chunk, decode, cache",
        )  # fmt: skip

    return run


def onnxruntime_prefill(v: Validator) -> Stage:
    """All positions of one prefill."""
    (_, got), (_, want) = v.onnxruntime_run, v.reference_run
    return _judge(
        "onnxruntime/prefill", difference([("logits", got[: v.prompt], want[: v.prompt])]), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        reason=f"all {v.prompt} positions of a prefill on onnxruntime against the reference",
    )  # fmt: skip


def onnxruntime_decode(v: Validator) -> Stage:
    """Every teacher-forced step."""
    (_, got), (_, want) = v.onnxruntime_run, v.reference_run
    return _judge(
        "onnxruntime/decode", difference([("logits", got[v.prompt :], want[v.prompt :])]), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        series=_per_step(got, want, v.prompt), steps=v.config.steps,
        reason=f"{v.config.steps} teacher-forced decode steps on onnxruntime against the reference",
    )  # fmt: skip


def onnxruntime_cache(v: Validator) -> Stage:
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
    stage = _judge(
        "onnxruntime/cache", found, limit=FLOAT32_LIMIT, why=FLOAT32_WHY, entries_written_past_the_end=stray,
        series={"error per layer": per_layer},
        reason=f"keys and values of all layers after {length} tokens against the reference; nothing written past them",
    )  # fmt: skip
    return (
        stage
        if stray == 0
        else replace(stage, verdict="fail", reason=f"{stray} cache entries past the valid length were written")
    )


def onnxruntime_chunked(v: Validator) -> Stage:
    """``prefill(n)`` equals ``prefill(k)`` then chunks and single tokens."""
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
    return _judge(
        "onnxruntime/chunked-prefill", difference(pairs), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        chunks=[float(end - begin) for begin, end in zip(cuts[:-1], cuts[1:], strict=True)],
        reason=f"a prefill of {n} in {len(cuts) - 1} chunks against the same in one piece: logits and cache",
    )  # fmt: skip


def onnxruntime_ragged(v: Validator) -> Stage:
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
    return _judge(
        "onnxruntime/ragged-batch", difference(pairs), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        reason=f"rows of {', '.join(map(str, lengths))} tokens in one padded batch, prefill and 4 steps, against each row alone",
    )  # fmt: skip


def onnxruntime_greedy(v: Validator) -> Stage:
    """Greedy tokens are the reference's own first choice at every step."""
    try:
        codec = TextCodec(v.bundle.folder)
        prompts = [codec.encode(text) for text in _PROMPTS]
    except ConfigError:
        prompts = [v.random_ids(4 + row, v.config.seed + 20 + row) for row in range(5)]
    longest = max(map(len, prompts))
    new_tokens = max(1, min(GREEDY_TOKENS, v.llama.max_position_embeddings - longest))
    capacity = longest + new_tokens
    equal, ties, worst_gap = 0, 0, 0.0
    for prompt in prompts:
        chosen = generate(
            OnnxRuntimeSession(v.bundle, max_seq_len=capacity), [prompt], max_new_tokens=new_tokens
        ).tokens[0]
        reference = reference_session(v.reference32, max_seq_len=capacity)
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


def onnxruntime_in_place(v: Validator) -> Stage:
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


def onnxruntime_transformers(v: Validator) -> Stage:
    """The two ends of the chain, directly."""
    (_, got), (_, want) = v.onnxruntime_run, v.transformers_run
    return _judge(
        "onnxruntime/transformers", difference([("logits", got, want)]), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
        series=_per_step(got, want, v.prompt),
        reason=f"onnxruntime against transformers in float32: prefill of {v.prompt} and {v.config.steps} decode steps",
    )  # fmt: skip


def _noise_share(found: Difference, noise: Difference) -> tuple[float, float, float]:
    """How much of its allowance an error uses up (1: all of it), and its ratios to the noise floor in L2 and maximum."""
    l2_ratio = found.relative_l2 / noise.relative_l2 if noise.relative_l2 else float("inf")
    max_ratio = found.max_abs / noise.max_abs if noise.max_abs else float("inf")
    # One number for the verdict: the share of its own allowance that the worse of the two uses up.
    return max(l2_ratio / NOISE_L2, max_ratio / NOISE_MAX), l2_ratio, max_ratio


def _noise_stage(dtype: str) -> Callable[[Validator], Stage]:
    def run(v: Validator) -> Stage:
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
        error, l2_ratio, max_ratio = _noise_share(found, noise)
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


def _ragged_batch(session: Session, v: Validator, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> _Ragged:
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


def _rows_alone(v: Validator, model: Any, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> _Ragged:
    """The same from transformers, one row at a time."""
    names = [past for past, _ in cache_names(v.llama.num_hidden_layers)]
    logits, cache = [], []
    for ids, prompt in zip(rows, prompts, strict=True):
        session = TransformersSession(model)
        logits.append(trajectory(session, ids, prompt))
        cache.append({name: session.cache_array(name)[0] for name in names})
    return _Ragged(logits, cache)


def _some_layers(kernels: Mapping[str, Callable[..., Any]], num_layers: int) -> tuple[CustomOps, list[int]]:
    """Custom ops that are computed by the kernels in some layers and eagerly in the others, and which layers.

    A graph calls each op in the order of its layers: attention once a layer, LlamaAddRMSNorm twice, LlamaRMSNorm once in all.
    """
    chosen = sorted({round(step * (num_layers - 1) / (_KERNEL_LAYERS - 1)) for step in range(_KERNEL_LAYERS)})
    per_layer = {"LlamaAttention": 1, "LlamaAddRMSNorm": 2}
    calls = dict.fromkeys(kernels, 0)

    def counted(op: str) -> Callable[..., Any]:
        def compute(*arguments: Any) -> Any:
            layer = calls[op] // per_layer[op] % num_layers if op in per_layer else chosen[0]
            calls[op] += 1
            return (kernels[op] if layer in chosen else OP_SPECS[op].eager)(*arguments)

        return compute

    return {op: counted(op) for op in kernels}, chosen


def _kernel_stage(how: str, dtype: str) -> Callable[[Validator], Stage]:
    name = f"kernels/{how}-{dtype}"

    def run(v: Validator) -> Stage:
        if (missing := kernels_installed()) is not None:
            raise NotRun(missing)
        if how == "enqueue":
            find_library()  # a library that is there and not usable is a failure, not a reason to look away
            from llama_export_plugins.harness import enqueue_ops

            kernels = enqueue_ops()
        else:
            from llama_export_plugins.kernels.loop import kernel_ops

            kernels = kernel_ops()
        longest = min(v.prompt, _KERNEL_PROMPT)
        prompts = (longest, max(1, longest // 2))
        rows = [v.random_ids(prompt + _APPENDED, v.config.seed + 30 + row) for row, prompt in enumerate(prompts)]
        capacity = longest + _APPENDED
        custom_ops, layers = _some_layers(kernels, v.llama.num_hidden_layers)
        torch_dtype = getattr(torch, dtype)
        evaluator = GraphEvaluator(v.bundle.model_path, dtype=torch_dtype, custom_ops=custom_ops)
        session = evaluator_session(evaluator, v.llama, max_seq_len=capacity, batch_size=2)
        got = _ragged_batch(session, v, rows, prompts)
        oracle = reference_session(v.reference64, max_seq_len=capacity, batch_size=2)
        want = _ragged_batch(oracle, v, rows, prompts)
        found = [difference(pairs) for pairs in got.pairs(want)]
        schedule = f"rows of {prompts[0]} and {prompts[1]} tokens in one batch, then {_APPENDED} decode steps, logits and cache"
        by = "the plugin library's enqueue" if how == "enqueue" else "the kernels under Triton's interpreter"
        facts: dict[str, Any] = {
            "layers": [float(layer) for layer in layers],
            "logits_error": found[0].relative,
            "cache_error": found[1].relative,
        }
        if dtype == "float32":
            return _judge(
                name, max(found, key=lambda item: (item.nonfinite, item.relative)), limit=FLOAT32_LIMIT, why=FLOAT32_WHY,
                reason=f"the graph in float32 with its ops by {by}, against the float64 reference: {schedule}", **facts,
            )  # fmt: skip
        noise = [
            difference(pairs) for pairs in _rows_alone(v, v.transformers_model(torch_dtype), rows, prompts).pairs(want)
        ]
        if any(item.nonfinite for item in noise) and dtype != v.bundle.dtype:
            raise NotRun(f"transformers' own model gives values that are not finite in {dtype}: no noise floor")
        shares = [_noise_share(*both) for both in zip(found, noise, strict=True)]
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


def engine_execution(v: Validator) -> list[Stage]:
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
        limit = {"float32": FLOAT32_LIMIT, "float16": 1e-2, "bfloat16": 8e-2}[v.bundle.dtype]
        stages.append(
            _judge(
                name, difference([("logits", got, want)]), limit=limit, series=_per_step(got, want, prompt),
                why="8 to 10 units in the last place of the dtype (2^-24, 2^-11, 2^-8), relative to the largest logit",
                reason=f"prefill of {prompt} and {len(ids) - prompt} decode steps on the GPU against the float64 reference",
            )
        )  # fmt: skip
    return stages


def _model(bundle: Bundle) -> Path:
    return bundle.model_path


def _onnxruntime(bundle: Bundle) -> Path:
    return bundle.onnxruntime_path


STAGES: dict[str, Callable[[Validator], Stage | list[Stage]]] = {
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
