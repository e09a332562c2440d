"""One validation: the stages of a bundle's task run in order, and reported."""

from __future__ import annotations

import difflib
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from llama_export._system.content import sha256_of_file
from llama_export._system.environment import environment
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.graph_check import check_graph
from llama_export.bundle.manifest import MANIFEST_NAME
from llama_export.bundle.placement import Progress
from llama_export.errors import ConfigError, LlamaExportError, MissingDependencyError
from llama_export.graph.io import INTERFACES
from llama_export.parity.judge import NotRun, ValidateConfig, Validator
from llama_export.parity.locate.case import remove_cases
from llama_export.parity.report.journal import Journal, results_of
from llama_export.parity.report.result import ParityReport, Stage, matches
from llama_export.parity.report.wording import NOT_SELECTED
from llama_export.parity.stages.causal import STAGES
from llama_export.parity.stages.causal_validator import CausalValidator
from llama_export.parity.stages.heads import HEAD_STAGES, HeadValidator
from llama_export.parity.stages.quantized import quantized_stages

DEVIATIONS = (
    "RoPE: cos and sin stay float32 and the rotation is rounded once; Hugging Face rounds cos and sin to the model dtype first. "
    "Nothing changes in float32; 16-bit results differ by less than the noise floor.",
    "Logits leave the graph as float32; Hugging Face returns the model dtype.",
)


def validate_bundle(
    bundle: Bundle,
    config: ValidateConfig | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda name, done, total: None,
) -> ParityReport:
    """Runs every selected stage and reports.

    Args:
        bundle: from :func:`llama_export.bundle.bundle.load_bundle`.
        config: settings.
        log: receives a line when a stage has ended.
        progress: receives (name of the stage that starts, stages done, stages in all).

    Raises:
        ArtifactMismatchError: a graph that no export makes: see :mod:`llama_export.bundle.graph_check`.
        ConfigError, ShapeError: a name in ``stages`` or ``require`` selects nothing; ``resume`` does not fit, see
            :meth:`llama_export.parity.report.journal.Journal.finished`; see also :func:`stages_of`.
    """
    config = config or ValidateConfig()
    for path in (bundle.model_path, bundle.onnxruntime_path, *map(bundle.variant_path, bundle.variants)):
        check_graph(bundle, path, by_header=False)
    validator, available = stages_of(bundle, config)
    for selector in (*config.stages, *config.require):
        if not any(matches(name, selector) for name in available):
            raise ConfigError(
                f"no stage `{selector}`",
                details={"got": selector, "expected": ", ".join(available)},
                hint=_nearest(selector, available),
            )
    hashes = {
        "graph": sha256_of_file(bundle.model_path),
        **{path.name: sha256_of_file(path) for path in map(bundle.variant_path, bundle.variants)},
        **{path.name: sha256_of_file(path) for path in bundle.engines},
    }
    journal = None if config.journal is None else Journal(config.journal, _basis(bundle, config, hashes))
    if config.resume and journal is None:
        raise ConfigError("resume needs the folder of a journal", hint="set ValidateConfig.journal")
    finished = journal.finished() if journal is not None and config.resume else []
    if config.cases is not None and not finished:
        remove_cases(config.cases)

    def report(stages: Sequence[Stage], *, interrupted: bool) -> ParityReport:
        return ParityReport(
            stages=tuple(stages),
            required=config.require,
            environment={**environment(), "command": _command(bundle, config)},
            hashes=hashes,
            model={
                **bundle.manifest.to_json()[
                    "model"
                ],  # its dtype is what config.json states; the bundle's own may differ
                "name": _name(bundle),
                "task": bundle.task,
                "dtype": bundle.dtype,
            },
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            deviations=DEVIATIONS,
            interrupted=interrupted,
        )

    selected = [
        name for name in available if not config.stages or any(matches(name, selector) for selector in config.stages)
    ]
    results = {name: results_of(name, finished) for name in selected}
    pending = [name for name in selected if not results[name]]

    def so_far() -> list[Stage]:
        """One entry per stage of the table at least; those still to come did not run."""
        found = []
        for name in available:
            reason = NOT_SELECTED if name not in results else _INTERRUPTED
            found += results.get(name) or [Stage(name=name, verdict="not-run", reason=reason)]
        return found

    if len(pending) < len(selected):
        log(f"validate: {len(selected) - len(pending)} of {len(selected)} stages ran before the interruption")
    for name in pending:
        done = sum(map(bool, results.values()))
        progress(name, done, len(selected))
        if journal is not None:
            journal.save(report(so_far(), interrupted=True))
        results[name] = run_stage(name, available[name], validator)
        for stage in results[name]:
            log(f"validate: [{done + 1}/{len(selected)}] {stage.name}: {stage.verdict} ({stage.seconds:.1f} s)")
    if journal is not None:
        journal.save(report(so_far(), interrupted=True))  # until the report itself is written
    return report(so_far(), interrupted=False)


_INTERRUPTED = "the validation was interrupted before this stage; `llama-export validate --resume` goes on"


def _basis(bundle: Bundle, config: ValidateConfig, hashes: Mapping[str, str]) -> dict[str, str]:
    """What the results of a stage depend on."""
    text = "none" if config.text is None else sha256_of_file(config.text)
    settings = {"steps": config.steps, "prompt tokens": config.prompt_tokens, "seed": config.seed}
    files = {**hashes, "manifest": sha256_of_file(bundle.folder / MANIFEST_NAME), "text": text}
    return {**environment(), **files, **{name: str(value) for name, value in settings.items()}}


def stages_of(
    bundle: Bundle, config: ValidateConfig
) -> tuple[Validator, Mapping[str, Callable[[Any], Stage | list[Stage]]]]:
    """What a bundle's stages share, and name -> stage, by its task.

    Raises:
        ConfigError: the model's longest sequence is too short for ``config``; or its text cannot be used, or means nothing to the task;
            see also :func:`llama_export.parity.judge.checkpoint_folder`.
        ShapeError: the tokenizer is another model's.
    """
    if INTERFACES[bundle.task].has_cache:
        return CausalValidator(bundle, config), {**STAGES, **quantized_stages(bundle)}
    if config.text is not None:
        raise ConfigError(
            f"a text to measure on means nothing to {bundle.task}",
            details={"bundle": bundle.folder, "got": "--text", "expected": "causal-lm, which predicts the next token"},
            hint="leave --text out",
        )
    return HeadValidator(bundle, config), HEAD_STAGES


def _nearest(selector: str, available: Collection[str]) -> str:
    """What a name that selects nothing was meant to be."""
    names = [*available, *dict.fromkeys(name.partition("/")[0] for name in available)]
    found = difflib.get_close_matches(selector.lower(), names, n=1, cutoff=0.5)
    return f"did you mean `{found[0]}`?" if found else "a name, or the part before its slash"


def _name(bundle: Bundle) -> str:
    """The folder's own name: a report travels, the path to the bundle does not."""
    return bundle.folder.resolve().name


def _command(bundle: Bundle, config: ValidateConfig) -> str:
    """What reproduces the report, from the folder that holds the bundle, the text and the checkpoint."""
    seed = ["--seed", str(config.seed)] if config.seed else []
    text = [] if config.text is None else ["--text", config.text.name]
    checkpoint = [] if config.checkpoint is None else ["--checkpoint", config.checkpoint.resolve().name]
    return shlex.join(
        ["llama-export", "validate", _name(bundle), "--steps", str(config.steps), *seed, *text, *checkpoint]
    )


def run_stage(name: str, run: Callable[[Any], Stage | list[Stage]], validator: Validator) -> list[Stage]:
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
