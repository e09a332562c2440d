"""The README against the repository: what it names exists, and the figures in it come from files made by commands."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llama_export.cli.main import cli

ROOT = Path(__file__).parent.parent
UPDATE = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "examples/ci/README.md",
    "docs/decisions.md",
    "docs/parity.md",
    "docs/onnx.md",
    "docs/architecture.md",
    "docs/quantization.md",
]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b(?=`|\s+#)", README))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_every_command_that_is_shown_exists() -> None:
    named = set(re.findall(r"^llama-export +([a-z]+)", README, flags=re.MULTILINE))
    assert {"export", "build", "run", "validate"} <= named
    assert named <= set(cli.commands)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    here = (ROOT / document).parent
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (here / target.split("#")[0]).exists(), target
    for path in re.findall(r"`((?:docs|examples|tests|benchmarks|scripts)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_speed_figures_are_those_of_the_newest_committed_run() -> None:
    (section,) = re.findall("<!-- figures:begin -->\n(.*?)\n<!-- figures:end -->", README, flags=re.DOTALL)
    figures = UPDATE["newest_figures"]()
    assert set(figures) == {"125m", "1.2b"}
    assert section == UPDATE["figures_table"](figures, UPDATE["newest_perplexity"]())


def test_every_speed_has_a_perplexity_beside_it_and_float32_is_one_model() -> None:
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    (section,) = re.findall("<!-- peers: begin -->\n(.*?)\n<!-- peers: end -->", text, flags=re.DOTALL)
    figures, quality = UPDATE["newest_figures"](), UPDATE["newest_perplexity"]()
    assert section == UPDATE["quality_table"](figures, quality)
    engines = quality["engines"]
    assert set(engines) == {name for results in figures.values() for name in results["decode"]}
    assert [entry["same_model"] for entry in engines.values() if entry["precision"] == "float32"] == [True] * 4


def test_parity_table_names_stages_of_the_validator() -> None:
    from llama_export.parity.stages.causal import STAGES

    (section,) = re.findall("<!-- parity:begin -->(.*?)<!-- parity:end -->", README, flags=re.DOTALL)
    named = re.findall(r"^\| ([\w/-]+) \|", section, flags=re.MULTILINE)
    named.remove("stage")
    assert len(named) >= 10
    assert {name.split("/")[0] for name in named} <= {name.split("/")[0] for name in STAGES}


def test_help_of_every_command_gives_its_options() -> None:
    def words(command: click.Command) -> Iterator[list[str]]:
        if isinstance(command, click.Group):
            yield from ([name, *rest] for name, child in command.commands.items() for rest in words(child))
        else:
            yield []

    for found in words(cli):
        result = CliRunner().invoke(cli, [*found, "--help"])
        assert result.exit_code == 0
        assert "--json" in result.output, found


@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_the_python_block_runs_on_the_bundle_of_the_demo(
    document: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_export.config.settings import ExportConfig
    from llama_export.export.export import export_checkpoint

    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    bundle = tmp_path / "bundle"
    export_checkpoint(ROOT / "examples/tiny-llama", bundle, ExportConfig(weights="copy"))
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace("path/to/Llama", str(bundle)), document, "exec"), names)
    assert capsys.readouterr().out.strip()
    assert "path/to/Llama" in "".join(blocks), "the path that was replaced"
