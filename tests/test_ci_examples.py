"""The CI files in examples/ci: valid YAML, command lines that exist, and shell steps that give the exit codes they promise."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from test_report import REPORTS, a_report, a_stage

from llama_export.cli.main import cli
from llama_export.parity.report.pages import write_report
from llama_export.parity.report.result import ParityReport

EXAMPLES = Path(__file__).parent.parent / "examples" / "ci"


def github() -> dict[str, Any]:
    data: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text(encoding="utf-8"))
    assert {"push", "pull_request"} == set(data[True])  # YAML 1.1 reads the key `on` so
    job: dict[str, Any] = data["jobs"]["parity"] | {"env": data["env"]}
    return job


def gitlab() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text(encoding="utf-8"))["parity"]
    return job


SCRIPTS = {
    "github": "\n".join(step["run"] for step in github()["steps"] if "run" in step),
    "gitlab": "\n".join(gitlab()["script"]),
}
VARIABLES = {"github": github()["env"], "gitlab": gitlab()["variables"]}


def step(name: str) -> str:
    (found,) = [one["run"] for one in github()["steps"] if one.get("name") == name]
    script: str = found
    return script


@pytest.mark.parametrize("service", SCRIPTS)
def test_every_command_line_is_one_that_the_program_takes(service: str) -> None:
    lines = re.findall(r"llama-export [^;|\n]+", SCRIPTS[service])
    assert [line.split()[1] for line in lines] == ["export", "validate", "report"]
    for line in lines:
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: VARIABLES[service][name[1]], line))[1:]
        command: click.Command = cli
        with click.Context(cli) as context:
            while isinstance(command, click.Group):
                _, found, words = command.resolve_command(context, words)
                assert found is not None
                command = found
            command.make_context(command.name, words)  # parses, and runs nothing


@pytest.mark.parametrize("service", VARIABLES)
def test_what_is_named_exists(service: str) -> None:
    from llama_export.parity.report.result import matches
    from llama_export.parity.stages.causal import STAGES

    assert (EXAMPLES.parent.parent / VARIABLES[service]["CHECKPOINT"] / "config.json").is_file()
    for name in VARIABLES[service]["REQUIRE"].split(","):
        assert any(matches(stage, name) for stage in STAGES)
    project = (EXAMPLES.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", SCRIPTS[service])
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_what_is_published_is_what_validate_writes(tmp_path: Path) -> None:
    written = {path.name for path in write_report(REPORTS["pass"], tmp_path).values()}
    text = "".join(path.read_text(encoding="utf-8") for path in EXAMPLES.iterdir())
    named = set(re.findall(r"(?:report|previous)/([\w.]+\.\w+)", text)) - {"diff.md"}
    assert named == {"parity.md", "parity.json", "junit.xml"}
    assert named < written
    assert gitlab()["artifacts"]["reports"]["junit"] == "report/junit.xml"


def run(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A step as GitHub runs it, with the program of this environment."""
    program = folder / "bin" / "llama-export"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llama_export "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


WORSE = a_report(a_stage(error=3.1e-5), *REPORTS["pass"].stages[1:])


@pytest.mark.parametrize(("new", "code"), [(REPORTS["pass"], 0), (WORSE, 5)], ids=["same", "worse"])
def test_github_shows_the_drift_and_then_fails(new: ParityReport, code: int, tmp_path: Path) -> None:
    write_report(REPORTS["pass"], tmp_path / "previous")
    write_report(new, tmp_path / "report")
    summary = tmp_path / "summary.md"
    for name, expected in (("Report in the summary of the run", 0), ("Drift", code)):
        done = run(step(name), tmp_path, GITHUB_STEP_SUMMARY=str(summary))
        assert done.returncode == expected, done.stderr
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("## ✓ Parity PASS")
    assert ("Parity drift" if code else "Parity without drift") in text


@pytest.mark.parametrize(("new", "code"), [(REPORTS["pass"], 0), (WORSE, 5)], ids=["same", "worse"])
def test_gitlab_compares_merge_requests_with_what_the_default_branch_left(
    new: ParityReport, code: int, tmp_path: Path
) -> None:
    script = gitlab()["script"][-1]
    write_report(REPORTS["pass"], tmp_path / "report")
    assert (
        run(script, tmp_path, CI_COMMIT_BRANCH="", CI_DEFAULT_BRANCH="main").returncode == 0
    )  # nothing to compare with
    assert run(script, tmp_path, CI_COMMIT_BRANCH="main", CI_DEFAULT_BRANCH="main").returncode == 0
    assert (tmp_path / "previous" / "parity.json").is_file()
    write_report(new, tmp_path / "report")
    done = run(script, tmp_path, CI_COMMIT_BRANCH="", CI_DEFAULT_BRANCH="main")
    assert done.returncode == code, done.stderr
    assert (tmp_path / "report" / "diff.md").is_file()
