"""What the stages of a causal LM share: prompts, the oracle's values, the limits, and the artefacts' runs."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_export.bundle.bundle import Bundle
from llama_export.config.decoder import expected_tensors
from llama_export.errors import ConfigError, MissingDependencyError
from llama_export.graph.kv_cache import cache_names
from llama_export.parity.judge import KERNEL_TOKENS, Measured, ValidateConfig
from llama_export.parity.metrics import difference
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

try:
    import torch

    from llama_export.parity.calls import (
        Answers,
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
    from llama_export.parity.oracle.evaluator import GraphEvaluator
    from llama_export.parity.sessions import TransformersSession, answers
    from llama_export.parity.stages.text import TextValidator
except ModuleNotFoundError as err:
    raise MissingDependencyError(err.name or "torch", "export") from err


GREEDY_TOKENS = 64
_MIN_PROMPT = 8
"""Tokens; fewer cannot be cut into chunks and rows of different length."""
_APPENDED = 8
"""Tokens that the stages with a fixed schedule append to the prompt at most, whatever ``--steps`` says."""
PROMPTS = ("def ", "import os\n", "class ", "The ", "    return ")
KERNEL_STEPS = 4
"""Decode steps of the kernel stages."""


class CausalValidator(TextValidator):
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
        self.run = Run(self.rows.calls(), self.capacity)
        """The same, in a cache with room to spare."""
        self.cache_names = [past for past, _ in cache_names(self.llama.num_hidden_layers)]
        self._floors: dict[tuple[Rows, torch.dtype], list[Answers]] = {}
        self.found_wrong: dict[Path, Mapping[str, Any]] = {}
        """Graph file -> where it was found wrong in float64."""
        self._oracles: dict[Rows, Answers] = {}

    def ragged(self, tokens: int, seed: int) -> Rows:
        """Rows of three different lengths, then a few decode steps."""
        prompts = (tokens, max(1, tokens // 2), 1)
        ids = (tuple(self.random_ids(n + 4, self.config.seed + seed + row)) for row, n in enumerate(prompts))
        return Rows(tuple(ids), prompts)

    @cached_property
    def kernel_rows(self) -> Rows:
        """What the kernels run; short, because the interpreter is slow."""
        longest = min(self.prompt, KERNEL_TOKENS)
        prompts = (longest, max(1, longest // 2))
        ids = (tuple(self.random_ids(n + KERNEL_STEPS, self.config.seed + 30 + row)) for row, n in enumerate(prompts))
        return Rows(tuple(ids), prompts)

    def of_prefix(self, bundle: Bundle) -> CausalValidator:
        """The same for the first layers of this bundle."""
        prefix = CausalValidator(bundle, replace(self.config, text=None, cases=None, checkpoint=None))
        tensors = expected_tensors(bundle.config)
        kept = {name: entry for name, entry in self.checkpoint.tensors.items() if name in tensors}
        prefix.checkpoint = replace(self.checkpoint, folder=bundle.folder, config=bundle.config, tensors=kept)
        return prefix

    def oracle(self, rows: Rows) -> Answers:
        """The float64 oracle: the reference's trace."""
        if rows not in self._oracles:
            self._oracles |= self.run_oracle([rows])
        return self._oracles[rows]

    def run_oracle(self, several: Sequence[Rows]) -> dict[Rows, Answers]:
        """The oracle's answers to several rows together: in lockstep every weight is read once for all of them."""
        runs = [Run(rows.calls(), rows.longest) for rows in several]
        inputs = graph_inputs(runs, self.llama, torch.float64)
        stream = self.program.stream(inputs, carried(self.llama), torch.float64)
        return dict(zip(several, collected(runs, stream, self.llama), strict=True))

    def floor(self, rows: Rows, dtype: torch.dtype) -> list[Answers]:
        """transformers' eager model on each row alone: the prompt, then the rest at once, through its own cache.

        A model is loaded once for all rows that will be asked of it. Where RoPE follows the length the schedule is part of
        the result, so there the rest comes token by token, to a model made anew for every row: it remembers the longest
        sequence it has seen.
        """
        if (rows, dtype) not in self._floors:
            model = None
            # In float64 it is compared with the reference alone, on the rows of that one stage.
            together = (rows,) if dtype == torch.float64 else (rows, self.rows, self.kernel_rows)
            for several in dict.fromkeys(together):
                found = []
                for index in range(len(several.ids)):
                    if model is None or self.follows_length:
                        model = self.transformers_model(dtype)
                    row = several.row(index)
                    calls = row.calls()
                    if not self.follows_length:
                        calls = [*calls[:1], call("rest", [row.ids[0][row.prompts[0] :]])]
                    found.append(answers(TransformersSession(model), calls, self.cache_names))
                self._floors[several, dtype] = found
            del model
            gc.collect()
        return self._floors[rows, dtype]

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

    def run_evaluator(self, evaluator: GraphEvaluator, runs: Sequence[Run]) -> list[Answers]:
        """The exported graph's answers, all runs in lockstep."""
        inputs = graph_inputs(runs, self.llama, evaluator.model_dtype)
        return collected(runs, evaluator.stream(inputs, carried(self.llama)), self.llama)

    def run_onnxruntime(self, run: Run) -> Answers:
        """onnxruntime's answers."""
        session = OnnxRuntimeSession(
            self.bundle, max_seq_len=run.capacity, batch_size=len(run.calls[0].input_ids), graph=self.onnxruntime_graph
        )
        if run.fill:
            for array in session.cache.values():
                array[...] = run.fill
        return answers(session, run.calls, self.cache_names)

    @cached_property
    def onnxruntime(self) -> Answers:
        """onnxruntime's answers to what most stages run."""
        return self.run_onnxruntime(self.run)
