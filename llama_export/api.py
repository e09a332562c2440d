"""The steps of the command line as Python functions: export, build, quantise, validate.

Role: checks of arguments, and paths in place of opened bundles; the work is done by the modules that each function names.
Heavy packages (torch, onnx, TensorRT) are imported by the function that needs them. ``llama_export`` exports these names.

>>> import llama_export
>>> llama_export.export_checkpoint("path/to/Llama", "bundle")
>>> llama_export.quantize_bundle("bundle", "int4")
>>> llama_export.build_engine("bundle", llama_export.EngineConfig(max_batch=2))
>>> llama_export.validate_bundle("bundle", report="bundle/report").verdict
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_export.bundle import bundle as bundles
from llama_export.bundle.bundle import Bundle
from llama_export.bundle.placement import Progress
from llama_export.config.checks import checked_bool, checked_path, checked_text, wrong_argument
from llama_export.config.settings import VARIANTS, EngineConfig, ExportConfig

if TYPE_CHECKING:
    from llama_export.engine.build import EngineResult
    from llama_export.export.export import ExportResult
    from llama_export.export.quantize import QuantizeResult
    from llama_export.parity.judge import ValidateConfig
    from llama_export.parity.report.result import ParityReport

T = TypeVar("T")


def _quiet(line: str) -> None:
    """The default of ``log``."""


def _still(name: str, done: int, total: int) -> None:
    """The default of ``progress``."""


def load_bundle(bundle: str | Path, *, ignore_hashes: bool = False) -> Bundle:
    """Opens a bundle and checks its files against the manifest.

    Args:
        bundle: folder that an export made.
        ignore_hashes: do not compare contents; missing files are errors all the same.

    Raises:
        ConfigError: not a bundle, or one that this version does not understand.
        ArtifactMismatchError: a file is missing, or is not the one that the manifest describes.
    """
    return bundles.load_bundle(
        checked_path(bundle, "bundle"), ignore_hashes=checked_bool(ignore_hashes, "ignore_hashes")
    )


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path | None = None,
    config: ExportConfig | None = None,
    *,
    log: Callable[[str], None] = _quiet,
    progress: Progress = _still,
) -> ExportResult:
    """Exports a Hugging Face checkpoint to ONNX. Needs the extra ``export``.

    Args:
        checkpoint: folder with ``config.json`` and ``*.safetensors``.
        output: folder to make; None: ``checkpoint`` becomes the bundle, and no weight is written.
        config: settings; default: the checkpoint's own task and dtype.
        log: takes one line per stage.
        progress: takes (file name, bytes done, bytes in all).

    Returns:
        Paths of the bundle and its graph, task, dtype, and what the export took.

    Raises:
        LlamaExportError: nothing is left behind. ConfigError, CheckpointError: the checkpoint or the settings.
            ExportError: the output cannot be written. MissingDependencyError: torch or onnx is not installed.
            ToolchainError: not enough disk or memory.
    """
    folder = checked_path(checkpoint, "checkpoint")
    target = None if output is None else checked_path(output, "output")
    settings = _config(config, ExportConfig)
    from llama_export.export import export

    return export.export_checkpoint(folder, target, settings, log=log, progress=progress)


def quantize_bundle(
    bundle: str | Path | Bundle,
    kind: str = "int4",
    *,
    force: bool = False,
    log: Callable[[str], None] = _quiet,
    progress: Progress = _still,
) -> QuantizeResult:
    """Writes int4 or int8 weights for the CPU beside those of a bundle. Needs the extra ``export``.

    Args:
        bundle: folder of a causal LM, or an opened bundle.
        kind: ``int4`` or ``int8``.
        force: replace weights of the same kind.
        log: takes one line before and one after.
        progress: takes (file name, bytes done, bytes in all).

    Returns:
        Names and sizes of the new files.

    Raises:
        ConfigError: an unknown kind, weights that exist already, or a bundle of another task.
        CheckpointError: a weight that is not finite. ExportError: the folder cannot be written.
        MissingDependencyError: onnx is not installed. ToolchainError: not enough disk.
    """
    if checked_text(kind, "kind") not in VARIANTS:
        raise wrong_argument("kind", kind, " or ".join(VARIANTS))
    force = checked_bool(force, "force")
    folder = bundle.folder if isinstance(bundle, Bundle) else checked_path(bundle, "bundle")
    opened = bundle if isinstance(bundle, Bundle) else bundles.load_bundle(folder, replacing=kind if force else None)
    from llama_export.export import quantize as quantization

    return quantization.quantize_bundle(opened, kind, force=force, log=log, progress=progress)


def build_engine(
    bundle: str | Path | Bundle,
    config: EngineConfig | None = None,
    *,
    log: Callable[[str], None] = _quiet,
    progress: Progress = _still,
) -> EngineResult:
    """Builds a TensorRT engine into a bundle's ``engines`` folder. TensorRT-RTX needs no GPU for it.

    Args:
        bundle: folder that an export made, or an opened bundle.
        config: settings; default: TensorRT-RTX, plugin layers, a cache of at most 4096 tokens, up to 4 rows.
        log: takes one line per stage.
        progress: takes (phase, steps done, steps in all); if it raises, the build is cancelled.

    Returns:
        Path, size and settings of the engine, and what the build took.

    Raises:
        ConfigError: an engine of this name exists. ShapeError: a capacity beyond the model's longest sequence.
        MissingDependencyError: the backend is not installed. EngineBuildError: the backend refused the network.
        ToolchainError: the backend is too old, has no plugin library, or this machine has too little disk or memory.
    """
    opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    settings = _config(config, EngineConfig)
    from llama_export.engine import build as engine

    return engine.build_engine(opened, settings, log=log, progress=progress)


def validate_bundle(
    bundle: str | Path | Bundle,
    config: ValidateConfig | None = None,
    *,
    report: str | Path | None = None,
    log: Callable[[str], None] = _quiet,
) -> ParityReport:
    """Compares a bundle with its checkpoint, stage by stage. Needs the extras ``export`` and ``parity``.

    Args:
        bundle: folder that an export made, or an opened bundle.
        config: settings; default: all stages.
        report: folder for ``parity.html``, ``parity.md``, ``junit.xml`` and ``parity.json``; None: no files.
        log: takes one line per stage.

    Returns:
        The stages, with ``verdict``: ``pass`` or ``fail``. A failed comparison is a result, not an exception.

    Raises:
        ConfigError: not a bundle, or a stage that does not exist.
        MissingDependencyError: torch or onnx is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    folder = None if report is None else checked_path(report, "report")
    from llama_export.parity import judge, validate

    settings = _config(config, judge.ValidateConfig)
    if folder is None:
        return validate.validate_bundle(opened, settings, log=log)
    from llama_export.parity.report.pages import check_plots, write_report

    check_plots()  # before the work
    found = validate.validate_bundle(opened, settings, log=log)
    write_report(found, folder)
    return found


def _config(value: Any, kind: type[T]) -> T:
    """The settings, or the defaults."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise wrong_argument("config", value, kind.__name__)
    return value
