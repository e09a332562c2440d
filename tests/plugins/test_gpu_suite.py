"""The GPU suite's own logic, on the CPU: it finds a fault, it says what did not run, and without a GPU it is not green."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import EAGER, cases

pytest.importorskip("triton", reason="`triton` is not installed: pip install './plugins[interpreter]'")
SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_suite.py"
suite: dict[str, Any] = runpy.run_path(str(SCRIPT))


def test_right_results_pass_and_wrong_ones_are_named() -> None:
    rows = suite["run_cases"](EAGER, "cpu")
    assert [row["verdict"] for row in rows] == ["pass"] * sum(1 for _ in cases())
    wrong = {**EAGER, "LlamaRMSNorm": lambda x, weight, epsilon: EAGER["LlamaRMSNorm"](x, weight, epsilon) * 1.01}
    failed = [row for row in suite["run_cases"](wrong, "cpu") if row["verdict"] == "fail"]
    assert failed
    assert all(row["case"].startswith("LlamaRMSNorm") for row in failed)


def test_nan_and_exceptions_are_failures() -> None:
    def broken(*inputs: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    nan = {**EAGER, "LlamaRMSNorm": lambda x, weight, epsilon: x * float("nan"), "LlamaAttention": broken}
    entry = suite["part"]("some part", "cpu", lambda: nan)
    assert entry["verdict"] == "fail"
    whole = ("LlamaAddRMSNorm ", "LlamaMaskedAttention ")
    assert {row["verdict"] for row in entry["rows"] if row["case"].startswith(whole)} == {"pass"}
    assert {row["verdict"] for row in entry["rows"] if not row["case"].startswith(whole)} == {"fail"}


def test_what_cannot_start_is_not_run_and_shown_so() -> None:
    def missing() -> Any:
        raise ImportError("no such package")

    entry = suite["part"]("some part", "cpu", missing)
    report = {
        "verdict": "fail",
        "environment": {"device": "x", "torch": "1", "triton": "2", "created_at": "now"},
        "parts": [entry],
    }
    assert "not run: ImportError: no such package" in suite["markdown"](report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_green() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "not run" in done.stderr
