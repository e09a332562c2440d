"""One validation: the stages of a bundle's task run in order, and reported."""

from __future__ import annotations

import difflib
import shlex
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from llama_export.bundle import Bundle, sha256_of_file
from llama_export.environment import environment
from llama_export.errors import ConfigError, LlamaExportError, MissingDependencyError
from llama_export.graph_io import INTERFACES
from llama_export.parity.case import remove_cases
from llama_export.parity.head_stages import HEAD_STAGES, HeadValidator
from llama_export.parity.judge import NotRun, ValidateConfig, Validator
from llama_export.parity.quantized_stages import quantized_stages
from llama_export.parity.result import ParityReport, Stage, matches
from llama_export.parity.stages import STAGES, CausalValidator
from llama_export.parity.wording import NOT_SELECTED

DEVIATIONS = (
    "RoPE: cos and sin stay float32 and the rotation is rounded once; Hugging Face rounds cos and sin to the model dtype first. "
    "Nothing changes in float32; 16-bit results differ by less than the noise floor.",
    "Logits leave the graph as float32; Hugging Face returns the model dtype.",
)


def validate_bundle(
    bundle: Bundle, config: ValidateConfig | None = None, *, log: Callable[[str], None] = lambda line: None
) -> ParityReport:
    """Runs every selected stage and reports.

    Raises:
        ConfigError, ShapeError: a name in ``stages`` or ``require`` selects nothing; see also :func:`stages_of`.
    """
    config = config or ValidateConfig()
    validator, available = stages_of(bundle, config)
    for selector in (*config.stages, *config.require):
        if not any(matches(name, selector) for name in available):
            raise ConfigError(
                f"no stage `{selector}`",
                details={"got": selector, "expected": ", ".join(available)},
                hint=_nearest(selector, available),
            )
    if config.cases is not None:
        remove_cases(config.cases)
    stages = []
    for name, run in available.items():
        if config.stages and not any(matches(name, selector) for selector in config.stages):
            stages.append(Stage(name=name, verdict="not-run", reason=NOT_SELECTED))
            continue
        for stage in run_stage(name, run, validator):
            log(f"validate: {stage.name}: {stage.verdict} ({stage.seconds:.1f} s)")
            stages.append(stage)
    return ParityReport(
        stages=tuple(stages),
        required=config.require,
        environment={**environment(), "command": _command(bundle, config)},
        hashes={
            "graph": sha256_of_file(bundle.model_path),
            **{path.name: sha256_of_file(path) for path in map(bundle.variant_path, bundle.variants)},
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
