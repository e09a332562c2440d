"""Feeds damaged files to the real commands and counts what is not handled. Run by hand and by tests/test_mutate.py.

    python scripts/mutate.py [--cases 10000] [--seed 0] [--kinds manifest,config] [--workers 2] [--write]
    python scripts/mutate.py --seed 0 --case 4711 --show      # one case again, with its files and its output

A case is a seed and a number. It copies a tiny bundle, checkpoint, report or saved operation, damages one file
(scripts/mutations.py), and runs a command on it in a forked process. A case is *handled* if the command

* exits with 0, 2 or 3; `report diff` may also exit with 5 (drift), `reproduce` with 1 (still wrong);
* takes at most 10 s of CPU time, 60 s in all, and 1 GB of memory above what the imports take;
* prints at most 1 MB, no traceback, and no character that steers a terminal.

Graphs are damaged with their hashes in the manifest made right, so that the damage gets past the hash check. Most
damaged configs do not change what is exported, so exports share one trace. --write puts the table into docs/security.md.
--escapes N also puts an escape sequence into each N-th string of the JSON files and runs the commands on a terminal.

Exit code: 0 all cases handled, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import escape_fields  # noqa: E402
import mutations  # noqa: E402
from random_llama import write_random_checkpoint  # noqa: E402

from llama_export._system.text import printable  # noqa: E402
from llama_export.cli.main import main as command_line  # noqa: E402

DOCUMENT = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- mutate:begin -->", "<!-- mutate:end -->"
MAX_CPU_SECONDS, MAX_SECONDS, MAX_BYTES, MAX_OUTPUT = 10.0, 60.0, 1 << 30, 1 << 20
"""Limits of one case: CPU time, wall time, memory above the imports', printed characters."""
CONFIG: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 1536, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
FEW = ["--max-new-tokens", "2"]
Mutate = Callable[[random.Random, Path], None]


@dataclass(frozen=True)
class Kind:
    """One kind of file, and what is done with it."""

    base: str
    """The folder that a case copies."""
    files: tuple[str, ...]
    """Which of its files is damaged; one is drawn."""
    mutate: tuple[Mutate, ...]
    """How; one is drawn. A file that is something else altogether (``mutations.replace_file``) is drawn rarely."""
    commands: tuple[tuple[str, ...], ...]
    """One is drawn; ``{}`` is the copied folder."""
    share: int
    """Out of 100 cases."""
    results: tuple[int, ...] = ()
    """Exit codes that are results of the command."""
    stdin: bytes = b""


_JSON = (mutations.mutate_json, mutations.mutate_json, mutations.mutate_json, mutations.mutate_bytes)
_GRAPH = (mutations.mutate_graph, mutations.mutate_graph, mutations.mutate_graph, mutations.mutate_bytes)
# A model's text goes to a pipe as it is, so that only JSON can be checked for what steers a terminal.
_RUN = ("run", "{}", "--tokens", "1,2,3", *FEW)
_ENGINE = "{}/engines/tiny.engine"
KINDS: dict[str, Kind] = {
    "manifest": Kind("bundle", ("manifest.json",), _JSON, (_RUN, (*_RUN, "--ignore-hashes"), ("inspect", "{}")), 15),
    "sidecar": Kind(
        "bundle", ("engines/tiny.json",), _JSON,
        (("inspect", _ENGINE), ("refit", _ENGINE, "{}", "--force"), (*_RUN, "--engine", _ENGINE), ("inspect", "{}")), 14,
    ),
    "config": Kind("checkpoint", ("config.json", "config.json", "config.json", "generation_config.json", "tokenizer_config.json"), _JSON, (("export", "{}", "-o", "{}/out"), ("export", "{}")), 12),
    "index": Kind("sharded", ("model.safetensors.index.json",), _JSON, (("export", "{}", "-o", "{}/out"),), 7),
    "header": Kind(
        "checkpoint", ("model.safetensors",), (mutations.mutate_header,), (("export", "{}", "-o", "{}/out"),), 10
    ),
    "tokenizer": Kind("bundle", ("tokenizer.json",), (*_JSON, mutations.mutate_tokenizer, mutations.mutate_tokenizer), (("run", "{}", "--prompt", "def f(x):", "--json", *FEW),), 12),
    "chat settings": Kind(
        "bundle", ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"), _JSON,
        (("chat", "{}", "--json", *FEW),), 6, stdin=b"hello\n",
    ),
    "chat template": Kind(
        "bundle", ("chat_template.jinja",), (mutations.mutate_template,), (("chat", "{}", "--json", *FEW),), 6, stdin=b"hello\n"
    ),
    "graph": Kind("bundle", ("model.onnxruntime.onnx",), _GRAPH, (_RUN,), 6),
    "graph build": Kind("bundle", ("model.onnx",), _GRAPH, (("build", "{}", "--ops", "native", "--max-seq-len", "32"),), 3),
    "report": Kind(
        "report", ("new.json", "old.json"), _JSON,
        (("report", "diff", "{}/old.json", "{}/new.json"),
         ("report", "diff", "{}/old.json", "{}/new.json", "--markdown", "{}/diff.md")), 5, results=(5,),
    ),
    "case": Kind(
        "case", ("case.json", "case.json", "input.0.npy", "want.npy", "op.onnx", "weights.bin"),
        (mutations.mutate_json, mutations.mutate_bytes), (("reproduce", "{}"),), 4, results=(1,),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one case came to."""

    number: int
    kind: str
    command: str
    code: int
    """Exit code; negative: the signal that ended it."""
    seconds: float
    """CPU time."""
    bytes: int
    """Peak memory above the imports'."""
    fault: str | None
    """Why it counts as not handled."""
    output: str
    """The end of what it printed."""


# ---- what is damaged --------------------------------------------------------------------------------------------


def prepare(root: Path) -> list[str]:
    """Makes the folders that cases copy. Returns the kinds that cannot run here, each with its reason."""
    checkpoint = root / "checkpoint"
    write_random_checkpoint(checkpoint, CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "examples" / "tiny-llama" / name, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (checkpoint / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    _shard(checkpoint, root / "sharded")
    _quietly("export", str(checkpoint), "-o", str(root / "bundle"), "--weights", "copy")
    missing = []
    try:
        _quietly("build", str(root / "bundle"), "--ops", "native", "--weights", "input", "--max-seq-len", "32")
        for path in (root / "bundle" / "engines").iterdir():
            path.rename(path.with_name(f"tiny{path.suffix}"))
    except RuntimeError as err:
        missing = [f"{name}: {err}" for name in ("sidecar", "graph build")]
    _write_reports(root / "report")
    _write_case(root / "case")
    return missing


def _quietly(*argv: str) -> None:
    """Runs a command in a process of its own: this one must stay without threads."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            os._exit(command_line(argv))
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"`llama-export {argv[0]}` ends with {code}")


def _shard(source: Path, target: Path) -> None:
    """The same checkpoint in two files with an index."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    tensors = load_file(source / "model.safetensors")
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, target / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_reports(folder: Path) -> None:
    """Two reports of one model that use every key."""
    from llama_export.parity.report.result import (
        LogitsSample,
        ParityReport,
        Stage,
        Tolerance,
        TopChoices,
        TopLogit,
        WorstElement,
    )

    folder.mkdir()
    for name, error in (("old", 1e-6), ("new", 2e-6)):
        choice = TopLogit(token=3, text="x", logit=1.5)
        top = TopChoices(position=0, where="end of the prompt", got=(choice,), want=(choice,))
        logits = LogitsSample(compared=9, positions=(0, 1), tokens=(3, 4), got=(1.0, 2.0), want=(1.0, 2.0), top=(top,))
        stages = (
            Stage(
                name="onnxruntime/prefill", verdict="pass", reason="compared", metrics={"relative_l2": error, "note": "x", "steps": (1.0, 2.0)},
                tolerance=Tolerance(value=1e-3, metric="relative_l2", why="the noise floor"),
                worst=WorstElement(tensor="logits", layer=None, index=(0, 1), got=1.0, want=float("nan")),
                seconds=1.0, series={"error": (1e-6, 2e-6)}, logits=logits,
            ),
            Stage(name="onnxruntime/decode", verdict="fail", reason="too large", metrics={"relative_l2": 1.0},
                  first_divergence={"layer": 1, "op": "MatMul", "node": "n", "tensor": "t", "error": 0.5}),
            Stage(name="engine/prefill", verdict="not-run", reason="no GPU"),
        )  # fmt: skip
        report = ParityReport(
            stages=stages, required=("onnxruntime",), environment={"command": "validate"}, hashes={"graph": "0" * 64},
            model={"name": "tiny", "layers": 2}, created_at="2026-01-01T00:00:00Z", deviations=("none",),
        )  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(report.to_json()))


def _write_case(folder: Path) -> None:
    """A saved MatMul and its weights, within its limits."""
    import numpy as np
    import onnx
    import torch
    from onnx import helper

    from llama_export.parity.locate.case import Case, Segment, save_case, segment_model

    weights = folder.with_name("case_weights")
    weights.mkdir()
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    (weights / "w.bin").write_bytes(matrix.tobytes())
    stored = onnx.TensorProto(name="w", data_type=1, dims=[3, 4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(matrix.nbytes))):
        stored.external_data.add(key=key, value=value)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    info = [helper.make_tensor_value_info(name, 1, [None, None]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", info[:1], info[1:], initializer=[stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    inputs = {"x": torch.ones(2, 3)}
    case = Case(
        stage="onnxruntime/decode", call="prefill", layer=1, op="MatMul", node="product", tensor="y", runtime="evaluator",
        dtype="float32", custom_ops="bodies", inputs={"x": "float32"}, limit_relative_l2=1e-5, limit_relative_max=1e-5,
    )  # fmt: skip
    own = segment_model(model, Segment((node,), ("x",), ("y",)), inputs)
    save_case(folder, case, own, weights, inputs, inputs["x"] @ torch.from_numpy(matrix))


def share_one_trace(checkpoint: Path) -> None:
    """Replaces tracing and checking, most of an export's time, by the graph of the undamaged checkpoint."""
    from llama_export.export import export, trace

    opened = export.load_checkpoint(checkpoint)
    graph = trace.graph_from_program(trace.trace_program(opened.config, "float32"), opened.config, "causal-lm")
    protos = {target: export.model_proto(graph, opened, "float32", target) for target in ("standard", "onnxruntime")}  # type: ignore[arg-type]
    trace.trace_program = lambda *_: None  # type: ignore[assignment, return-value]
    trace.graph_from_program = lambda *_: graph  # type: ignore[assignment]
    export.model_proto = lambda _graph, _opened, _dtype, target: protos[target]
    export.check_model = lambda _: None


# ---- one case ---------------------------------------------------------------------------------------------------


def draw(seed: int, number: int, kinds: list[str]) -> tuple[str, random.Random]:
    """The kind of a case and its generator: a number means the same case whatever else is run."""
    rng = random.Random(f"{seed}/{number}")
    names = [name for name, kind in KINDS.items() for _ in range(kind.share)]
    name = rng.choice(names)
    return (name if name in kinds else rng.choice(kinds)), rng


def damage(rng: random.Random, kind: Kind, folder: Path) -> str:
    """Damages one file of a copied folder; returns its name."""
    name = rng.choice([name for name in kind.files if (folder / name).exists()])
    path = folder / name
    if rng.random() < 0.03:
        mutations.replace_file(rng, path)
    else:
        mutate = rng.choice(kind.mutate)
        if mutate is mutations.mutate_json and path.suffix != ".json":
            mutate = mutations.mutate_graph if path.suffix == ".onnx" else mutations.mutate_bytes
        mutate(rng, path)
    if path.suffix == ".onnx" and (folder / "manifest.json").exists() and path.is_file() and not path.is_symlink():
        _make_hashes_right(folder, path)
    return name


def _make_hashes_right(folder: Path, path: Path) -> None:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = json.loads((folder / "manifest.json").read_text())
    for target, entry in manifest["functions"].items():
        if entry["file"] == path.name:
            entry["sha256"] = digest
            if target == "standard":
                manifest["graph_sha256"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run_case(root: Path, scratch: Path, seed: int, number: int, kinds: list[str], *, show: bool = False) -> Outcome:
    """Copies, damages and runs; see the module."""
    name, rng = draw(seed, number, kinds)
    kind, folder = KINDS[name], scratch / f"case-{number}"
    shutil.copytree(root / kind.base, folder, symlinks=True)
    damaged = damage(rng, kind, folder)
    argv = rng.choice(kind.commands)
    as_json = "--json" not in argv and rng.random() < 0.4
    return run_command(scratch, number, name, folder, damaged, [*argv, *["--json"] * as_json], show=show)


def check_undamaged(root: Path, kinds: list[str]) -> None:
    """Runs every command on files as they were made: what refuses these would refuse damage for no reason.

    Raises:
        RuntimeError: a command fails, or all commands of a kind need what this machine has not.
    """
    for number, name in enumerate(kinds):
        codes = []
        for argv in KINDS[name].commands:
            folder = root / f"undamaged-{number}"
            shutil.copytree(root / KINDS[name].base, folder, symlinks=True)
            found = run_command(root, number, name, folder, "undamaged", list(argv))
            codes.append(found.code)
            if found.fault or found.code == 2:
                raise RuntimeError(f"undamaged {name}: {found}")
        if set(codes) == {3}:
            raise RuntimeError(f"no command of {name} runs on this machine")


def run_command(
    scratch: Path, number: int, name: str, folder: Path, damaged: str, command: list[str], *, show: bool = False
) -> Outcome:
    """Runs one command on a folder, which is removed."""
    kind = KINDS[name]
    argv = [part.replace("{}", str(folder)) for part in command]
    output, stdin = scratch / f"output-{number}", scratch / f"input-{number}"
    stdin.write_bytes(kind.stdin)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    pid = os.fork()
    if pid == 0:
        _child(argv, stdin, output)
    status, usage = _wait(pid)
    code = os.waitstatus_to_exitcode(status)
    seconds, peak = usage.ru_utime + usage.ru_stime, max(0, usage.ru_maxrss * 1024 - before)
    size = output.stat().st_size
    with output.open("rb") as stream:
        text = stream.read(2 * MAX_OUTPUT).decode("utf-8", "backslashreplace")
    fault = _fault(kind, code, seconds, peak, size, text)
    said = " ".join(argv).replace(str(folder), f"({damaged})")
    if show:
        print(f"{said}\nfiles: {folder}\n{printable(text[-6000:])}")
    else:
        shutil.rmtree(folder)
    output.unlink()
    stdin.unlink()
    tail = printable(text[-1500:])
    return Outcome(number, name, said, code, round(seconds, 2), peak, fault, tail)


def _child(argv: list[str], stdin: Path, output: Path) -> None:
    code = 70
    with contextlib.suppress(BaseException):
        os.setpgid(0, 0)
        for number, (path, flags) in enumerate(((stdin, os.O_RDONLY), (output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))):
            os.dup2(os.open(path, flags), number)
        os.dup2(1, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30),) * 2)  # the machine's other users keep their memory
        resource.setrlimit(resource.RLIMIT_CPU, (int(3 * MAX_CPU_SECONDS),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["NO_COLOR"] = "1"
        try:
            code = command_line(argv)
            sys.stdout.flush()
        except BaseException:  # noqa: BLE001 - a command line that raises is what is looked for
            traceback.print_exc()
    os._exit(code)


def _wait(pid: int) -> tuple[int, resource.struct_rusage]:
    """Waits for a case and ends what it left running."""
    deadline = time.monotonic() + MAX_SECONDS
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status, usage


def _fault(kind: Kind, code: int, seconds: float, peak: int, size: int, text: str) -> str | None:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if code not in (0, 2, 3, *kind.results):
        return f"exit code {code}"
    if "Traceback (most recent call last)" in text:
        return "a traceback"
    if seconds > MAX_CPU_SECONDS:
        return f"{seconds:.0f} s"
    if peak > MAX_BYTES:
        return f"{peak / 1e9:.1f} GB"
    if size > MAX_OUTPUT:
        return f"{size / 1e6:.1f} MB printed"
    if printable(text) != text:
        return "printed what steers a terminal"
    return None


# ---- all cases --------------------------------------------------------------------------------------------------


def run_all(root: Path, seed: int, numbers: list[int], kinds: list[str], workers: int) -> list[Outcome]:
    """The cases, shared among forked workers."""
    pids = []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _work(root, seed, numbers[worker::workers], kinds, root / f"results-{worker}")
                code = 0
            except BaseException:  # noqa: BLE001 - said, and told by the exit code
                traceback.print_exc()
            os._exit(code)
        pids.append(pid)
    for pid in pids:
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError("a worker failed; what it said is above")
    lines = [line for worker in range(workers) for line in (root / f"results-{worker}").read_text().splitlines()]
    return sorted((Outcome(**json.loads(line)) for line in lines), key=lambda outcome: outcome.number)


def _work(root: Path, seed: int, numbers: list[int], kinds: list[str], results: Path) -> None:
    scratch = results.with_suffix(".scratch")
    scratch.mkdir()
    with results.open("w") as stream:
        for number in numbers:
            stream.write(json.dumps(asdict(run_case(root, scratch, seed, number, kinds))) + "\n")
            stream.flush()


def table(outcomes: list[Outcome], seed: int) -> str:
    """Kind by outcome, in Markdown."""
    lines = [
        "| Kind of file | Cases | Ran | Refused (2) | This machine (3) | Not handled | Longest, s | Most memory, MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups = [(name, [item for item in outcomes if item.kind == name]) for name in KINDS]
    for name, group in (*groups, ("**all**", outcomes)):
        if group:
            count = Counter("bad" if item.fault else {2: "2", 3: "3"}.get(item.code, "ran") for item in group)
            figures = (len(group), count["ran"], count["2"], count["3"], count["bad"])
            longest, most = max(item.seconds for item in group), max(item.bytes for item in group) / 1e6
            lines.append(f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} | {longest:.1f} | {most:.0f} |")
    return "\n".join([*lines, "", f"Seed {seed}. `python scripts/mutate.py --seed {seed} --cases {len(outcomes)}`"])


@contextlib.contextmanager
def prepared(kinds: list[str]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """A folder with what cases copy, the kinds that can run here, and why others cannot."""
    scratch = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="llama-export-mutate-", dir=scratch) as folder:
        root = Path(folder)
        missing = prepare(root)
        names = {line.partition(":")[0] for line in missing}
        import_everything()
        share_one_trace(root / "checkpoint")
        able = [name for name in kinds if name not in names]
        check_undamaged(root, able)
        yield root, able, missing


def import_everything() -> None:
    """What the commands import, once and before the forks."""
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import tensorrt_rtx  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--kinds", default=",".join(KINDS), help="run these kinds alone; numbers then mean other cases")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="with --case: print the output and wait before files go")
    parser.add_argument("--escapes", type=int, metavar="N", help="also check each N-th string on a terminal")
    parser.add_argument("--write", action="store_true", help="put the table into docs/security.md")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    with prepared(kinds) as (root, able, missing):
        if args.case is not None:
            outcome = run_case(root, root, args.seed, args.case, able, show=args.show)
            print(json.dumps(asdict(outcome), indent=2))
            if args.show:
                input("Enter removes the files ")
            return int(outcome.fault is not None)
        outcomes = run_all(root, args.seed, list(range(args.cases)), able, args.workers)
        raw: list[str] = []
        if args.escapes:
            runs, shown, raw = escape_fields.check(
                root, {name: KINDS[name] for name in able}, command_line, args.escapes
            )
            print(
                f"escape sequence in one string: {runs} runs on a terminal, {shown} showed it escaped, {len(raw)} raw"
            )
            print("\n".join(raw))
    text = table(outcomes, args.seed)
    print(text)
    for line in missing:
        print(f"not run: {line}")
    bad = [outcome for outcome in outcomes if outcome.fault]
    for outcome in bad:
        print(f"\n{outcome.kind}: {outcome.fault}: {outcome.command}")
        again = f"--seed {args.seed} --case {outcome.number}" + (
            f" --kinds {args.kinds}" if len(kinds) < len(KINDS) else ""
        )
        print(f"  again: python scripts/mutate.py {again}")
        print("  " + "\n  ".join(outcome.output.strip().splitlines()[-4:])[:600])
    print(f"\n{len(bad)} of {len(outcomes)} not handled, {time.monotonic() - started:.0f} s", file=sys.stderr)
    if args.write:
        head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return int(bool(bad or raw))


if __name__ == "__main__":
    sys.exit(main())
