"""The kernels and the plugin library on a real GPU, against float64 oracles; writes a report. Run by `make gpu`.

    python scripts/gpu_suite.py [--report reports/gpu] [--benchmarks-s 180] [--rehearse]

Over the cases of tests/plugins/kernel_cases.py: the Triton kernels, compiled on the spot; and the plugin library's own
`enqueue`, with the compiled kernels that it carries and the real driver. Then over tiny-llama, exported here: the stages
`kernels/gpu-*` and `ops/gpu` of `validate`, the whole graph with its ops by the library on the GPU; and, where TensorRT-RTX
supports the card and is installed, the engine stages. Last, how fast the library is beside device copies and PyTorch's
attention: gpu_benchmarks.py. What cannot run is written down as "not run" with its reason. Report: `<gpu>-<date>`.

Needs Python 3.11+, torch, triton, numpy (for tiny-llama also the extras `export` and `parity`), and the plugin package:
installed (`pip install ./plugins`), or brought along in build/plugins (`pip install --no-deps --target build/plugins
./plugins` on another machine). No network, no compiler, no pytest. `--rehearse` runs the same code on the CPU, under the
interpreter and a stand-in driver, to show that the suite itself works; its report says so and is not put under reports/gpu.

Exit code: 0 everything that ran passed; 1 something failed; 3 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# build/plugins: a plugin package brought along, made by `pip install --no-deps --target build/plugins ./plugins`.
sys.path[:0] = [str(ROOT / folder) for folder in ("build/plugins", ".", "scripts", "tests", "tests/plugins")]

import torch  # noqa: E402

SCHEMA_VERSION = 1
Ops = Mapping[str, Callable[..., Any]]


def run_cases(ops: Ops, device: str) -> list[dict[str, Any]]:
    """Every case through ``ops``; one row per case, the worst of its outputs. An exception is a failure, not the end."""
    from kernel_cases import cases, judge, worst

    rows = []
    for case in cases():
        try:
            inputs = [tensor.to(device) for tensor in case.inputs]
            result = ops[case.op](*inputs, *case.attributes)
            if device != "cpu":
                torch.cuda.synchronize()
            found = worst(judge(case, result))
            rows.append({"case": case.name, "verdict": "pass" if found.passed else "fail", "share": found.share,
                         "error": found.error, "output": found.output})  # fmt: skip
        except Exception as err:  # noqa: BLE001 - whatever one case raises, the others must still be seen
            rows.append({"case": case.name, "verdict": "fail", "error": f"{type(err).__name__}: {err}"})
    return rows


def part(name: str, device: str, make_ops: Callable[[], Ops]) -> dict[str, Any]:
    """One way of running the cases, as an entry of the report."""
    start = time.perf_counter()
    try:
        ops = make_ops()
    except Exception as err:  # noqa: BLE001 - a part that cannot start is stated, with the reason
        return {"name": name, "verdict": "not-run", "reason": f"{type(err).__name__}: {err}"}
    rows = run_cases(ops, device)
    failed = [row for row in rows if row["verdict"] == "fail"]
    return {
        "name": name,
        "verdict": "fail" if failed else "pass",
        "cases": len(rows),
        "failed": len(failed),
        "largest_share_of_the_limit": max((row.get("share", float("inf")) for row in rows), default=0.0),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }


def triton_ops(rehearse: bool) -> Ops:
    """The kernels, launched by Triton."""
    if rehearse:
        from llama_export_plugins.kernels.loop import kernel_ops

        return kernel_ops()
    from llama_export_plugins.kernels.launch import ops, run_on_gpu

    return ops(run_on_gpu)


def enqueue_ops(rehearse: bool, aliased: bool) -> Ops:
    """The plugins, driven as TensorRT would."""
    from llama_export_plugins import harness

    found: Ops = harness.enqueue_ops(aliased=aliased, device="cpu" if rehearse else "cuda")
    return found


def _run(*command: str) -> dict[str, Any] | None:
    """One command of llama-export; what went wrong, or None."""
    done = subprocess.run(
        [sys.executable, "-m", "llama_export", *command],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if done.returncode == 0:
        return None
    # 3 is this machine's: a package is missing, so nothing was judged.
    verdict = "not-run" if done.returncode == 3 else "fail"
    reason = f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-400:]}"
    return {"verdict": verdict, "reason": reason, "log": (done.stdout + done.stderr)[-4000:]}


def validated_part(name: str, stages: tuple[str, ...], build: bool) -> dict[str, Any]:
    """tiny-llama exported here, and stages of `validate`, all of which must run and pass."""
    start = time.perf_counter()
    bundle, report = ROOT / "build" / "gpu-bundle", ROOT / "build" / "gpu-report"
    chosen = ",".join(stages)
    commands = [["export", str(ROOT / "examples" / "tiny-llama"), "-o", str(bundle), "--force"]]
    commands += [["build", str(bundle)]] if build else []
    commands += [["validate", str(bundle), "--stages", chosen, "--require", chosen, "--report", str(report)]]
    for command in commands:
        if (wrong := _run(*command)) is not None:
            return {"name": name, **wrong}
    found = [stage for stage in json.loads((report / "parity.json").read_text(encoding="utf-8"))["stages"]
             if stage["verdict"] != "not-run"]  # fmt: skip
    rows = [
        {
            "case": stage["name"],
            "verdict": stage["verdict"],
            "share": stage["metrics"]["error"],
            "error": stage["reason"],
        }
        for stage in found
    ]
    return {
        "name": name, "verdict": "pass", "cases": len(rows), "failed": 0,
        "largest_share_of_the_limit": max(row["share"] for row in rows),
        "seconds": round(time.perf_counter() - start, 1), "rows": rows,
    }  # fmt: skip


def graph_part(rehearse: bool) -> dict[str, Any]:
    """The whole exported graph, its custom ops by the library on the GPU, and the ops alone where roundings tell."""
    how = "enqueue" if rehearse else "gpu"
    stages = (*(f"kernels/{how}-{what}" for what in ("float32", "bfloat16", "float16", "poisoned-cache")), f"ops/{how}")
    return validated_part("whole graph, ops by the library", stages, build=False)


def engine_part() -> dict[str, Any]:
    """A plugin engine of tiny-llama built and executed, where this card can run one."""
    from llama_export.runtime.engine_session import execution_blocker

    if (blocker := execution_blocker("tensorrt-rtx")) is not None:
        return {"name": "engine", "verdict": "not-run", "reason": blocker}
    return validated_part("engine", ("engine",), build=True)


def benchmark_part(rehearse: bool, budget_s: float) -> dict[str, Any]:
    """The figures of gpu_benchmarks.py; a failure if a timed result is wrong, not if one is slow."""
    if budget_s <= 0:
        return {"name": "speed, by enqueue", "verdict": "not-run", "reason": "not asked for", "rehearsal": rehearse}
    import gpu_benchmarks

    found: dict[str, Any] = gpu_benchmarks.run(rehearse=rehearse, budget_s=budget_s)
    return found


def environment(rehearse: bool) -> dict[str, Any]:
    """What ran where."""
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "device": "CPU (rehearsal: interpreter and stand-in driver)",
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if not rehearse:
        major, minor = torch.cuda.get_device_capability()
        found |= {"device": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    try:
        import hashlib

        import llama_export_plugins

        library = llama_export_plugins.library_path()
        found |= {
            "plugins": llama_export_plugins.__version__,
            "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        }
    except Exception as err:  # noqa: BLE001 - stated; the parts that need it say so too
        found["plugins"] = f"not usable: {err}"
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report for readers."""
    where = report["environment"]
    lines = [
        f"# GPU suite: {report['verdict']}",
        "",
        f"{where['device']}"
        + (f", compute capability {where['compute_capability']}" if "compute_capability" in where else "")
        + f"; torch {where['torch']}, triton {where['triton']}; {where['created_at']}.",
        "",
        "| part | verdict | cases | failed | largest share of the limit | s |",
        "|---|---|---|---|---|---|",
    ]
    for entry in report["parts"]:
        if entry["verdict"] == "not-run":
            lines.append(f"| {entry['name']} | not run: {entry['reason']} | | | | |")
        else:
            share = entry.get("largest_share_of_the_limit")
            shown = f"{share:.2f}" if share is not None else ""
            lines.append(
                f"| {entry['name']} | {entry['verdict']} | {entry.get('cases', '')} | {entry.get('failed', '')} | {shown} | {entry.get('seconds', '')} |"
            )
    failures = [
        f"- {entry['name']}: {row['case']}: {row.get('error')}"
        for entry in report["parts"]
        for row in entry.get("rows", [])
        if row["verdict"] == "fail"
    ]
    failures += [
        f"- {entry['name']}: {entry['reason']}"
        for entry in report["parts"]
        if entry["verdict"] == "fail" and "reason" in entry
    ]
    text = "\n".join([*lines, *(["", "Failed:", *failures] if failures else []), ""])
    for entry in report["parts"]:
        if "targets_met" in entry:
            import gpu_benchmarks

            text += "\n" + gpu_benchmarks.markdown(entry)
    return text


def report_stem(device: str, day: datetime.date) -> str:
    """Name of a report's files: the GPU's, then the date's."""
    return f"{device.split('(')[0].strip().replace(' ', '-').lower()}-{day.isoformat()}"


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report", type=Path, help="folder to write to (default: reports/gpu, of a rehearsal build/gpu-rehearsal)"
    )
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, to try the suite itself")
    parser.add_argument(
        "--benchmarks-s", type=float, default=180.0, help="seconds for the benchmarks, at most; 0 leaves them out"
    )
    args = parser.parse_args()
    if args.rehearse and args.report and args.report.resolve().is_relative_to(ROOT / "reports" / "gpu"):
        parser.error("a rehearsal's numbers do not go under reports/gpu\nhint: --report build/gpu-rehearsal")
    if not args.rehearse and not torch.cuda.is_available():
        print("no usable NVIDIA GPU: not run\nhint: --rehearse tries the suite itself on the CPU", file=sys.stderr)
        return 3
    device = "cpu" if args.rehearse else "cuda"
    parts = [
        part("kernels, compiled by Triton here", device, lambda: triton_ops(args.rehearse)),
        part("library, enqueue, cache aliased", device, lambda: enqueue_ops(args.rehearse, True)),
        part("library, enqueue, cache copied", device, lambda: enqueue_ops(args.rehearse, False)),
        graph_part(args.rehearse),
        engine_part(),
        benchmark_part(args.rehearse, args.benchmarks_s),
    ]
    ran = [entry for entry in parts if entry["verdict"] != "not-run"]
    verdict = "fail" if not ran or any(entry["verdict"] == "fail" for entry in ran) else "pass"
    report = {"schema_version": SCHEMA_VERSION, "verdict": verdict, "rehearsal": args.rehearse,
              "environment": environment(args.rehearse), "parts": parts}  # fmt: skip
    folder = args.report or ROOT / ("build/gpu-rehearsal" if args.rehearse else "reports/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    stem = report_stem(report["environment"]["device"], datetime.date.today())
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    return 0 if verdict == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
