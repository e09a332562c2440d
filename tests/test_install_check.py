"""What `make install-check` decides without an environment; and that README states what it allows."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_install  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_packages_of_every_extra_are_kept_out_of_the_base_install(extra: str) -> None:
    wanted = names(PROJECT["optional-dependencies"][extra])
    assert check_install.unwanted(wanted, base=True) == sorted(map(check_install.normalized, wanted))
    assert check_install.unwanted(wanted, base=False) == (
        [] if extra == "cpu" else sorted(map(check_install.normalized, wanted))
    )


def test_names_are_compared_in_one_spelling() -> None:
    found = ["ONNX_IR", "nvidia_cublas.cu12", "numpy", "Torch", "tokenizers", "torchless"]
    assert check_install.unwanted(found, base=True) == ["nvidia-cublas-cu12", "onnx-ir", "torch"]
    assert check_install.unwanted(names(PROJECT["dependencies"]), base=True) == []


def test_size_counts_files_and_no_links(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "a").write_bytes(b"12345")
    (tmp_path / "folder" / "b").write_bytes(b"678")
    (tmp_path / "outside").write_bytes(bytes(1000))
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "folder" / "lib64").symlink_to(tmp_path / "folder" / "inner")
    assert check_install.size_of(tmp_path / "folder") == (2, 8)


def test_a_failed_check_says_what_was_found_and_expected(capsys: pytest.CaptureFixture[str]) -> None:
    checks = check_install.Checks()
    assert not checks.passed, "nothing checked is nothing passed"
    checks.add("size", True, got="1 MB", expected="2 MB", hint="none")
    assert checks.passed
    checks.add("size", False, got="3 MB", expected="2 MB", hint="look there")
    assert not checks.passed
    printed = capsys.readouterr().out
    assert printed.startswith("ok    size: 1 MB\nFAIL  size\n")
    assert re.search("got: +3 MB\n +expected: 2 MB\n +hint: look there", printed)


def test_readme_states_sizes_and_import_time_within_the_limits() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall("<!-- install:begin -->\n(.*?)\n<!-- install:end -->", readme, flags=re.DOTALL)
    rows = dict(
        zip(
            ("base", "cpu", "plugins"), re.findall(r"^\| .* \| (\d+) \| (\d+) \| (\d+) \|$", section, re.M), strict=True
        )
    )
    for step, limit in check_install.MAX_MEGABYTES.items():
        assert int(rows[step][1]) < limit == int(rows[step][2])
    (seconds,) = re.findall(r"in a fresh interpreter: ([\d.]+) s", section)
    assert float(seconds) < check_install.MAX_IMPORT_SECONDS
