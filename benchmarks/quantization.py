"""Measures quantised decoding: block size, accuracy level of the products, and products of one input packed into one.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --write        # also puts the tables into docs/quantization.md
    python benchmarks/quantization.py --only int4-b64-a4-packed,int8-b128-a4-packed --turns 9
    python benchmarks/quantization.py --cost --write # what quantising itself takes

The random Llama of 125 million parameters of ``decode_speed.py`` is exported once into ``--work`` and quantised in every
way that is compared. Then the ways take turns (A B C, A B C, ...), each turn in a fresh process: where weights happen to lie
in memory makes one process faster than the next. What is printed is the median of the turns. On a machine that others use too,
a turn that they disturbed is made again, and the result says how much of it was left (Linux).

Two figures a way: decode steps as a user has them, after a prompt of 128; and, with ``--matrices``, the products alone, one
token through every matrix of the model with nothing between them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parent))
from decode_speed import prepare_checkpoint
from processes import in_fresh_process, log, machine, measure_process
from random_llama import write_random_checkpoint

from llama_export.bundle.bundle import load_bundle
from llama_export.config.settings import ExportConfig
from llama_export.export.export import export_checkpoint
from llama_export.export.quantize import DOMAIN, quantize_bundle
from llama_export.export.rounding import SCHEMES, Scheme
from llama_export.runtime.generation import generate
from llama_export.runtime.onnxruntime_graph import OpenGraph
from llama_export.runtime.onnxruntime_session import OnnxRuntimeSession

DOCUMENT = Path(__file__).parent.parent / "docs" / "quantization.md"
RESULTS = Path(__file__).parent / "results" / "quantization"
BLOCK_SIZES, LEVELS = (32, 64, 128), (0, 1, 4)
PROMPT, NEW_TOKENS, STEPS = 128, 96, 64
SLOW = 30.0
"""Tokens a second."""
FOREIGN, TRIES = 0.1, 5
"""A turn during which other programs used more than so much of a core is made again, so many times at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to quantise and to compute."""

    kind: str
    scheme: Scheme

    @property
    def files(self) -> str:
        """Ways that share their files: the accuracy level is an attribute of the graph."""
        return f"{self.kind}-b{self.scheme.block_size}-{'packed' if self.scheme.pack else 'apart'}"

    @property
    def name(self) -> str:
        return f"{self.kind}-b{self.scheme.block_size}-a{self.scheme.accuracy_level}-{'packed' if self.scheme.pack else 'apart'}"


WAYS = {
    way.name: way
    for way in (
        Way(kind=kind, scheme=Scheme(bits=SCHEMES[kind].bits, block_size=size, accuracy_level=level, pack=pack))
        for kind in SCHEMES
        for size in BLOCK_SIZES
        for level in LEVELS
        for pack in (True, False)
    )
}


def prepare(way: Way, checkpoint: Path, work: Path) -> Path:
    """The folder of a bundle that is quantised so; weights are hard links."""
    folder = work / way.files
    if not (folder / "manifest.json").exists():
        export_checkpoint(checkpoint, folder, ExportConfig(weights="link"))
    if way.kind not in load_bundle(folder).variants:
        log(f"quantising {way.files}")
        quantize_bundle(load_bundle(folder), way.kind, scheme=way.scheme)
    return folder


def open_way(folder: Path, way: Way, threads: int, *, matrices: bool) -> Any:
    """An ``InferenceSession`` of the variant at the way's accuracy level, or of its products alone."""
    import onnxruntime

    model = onnx.load(str(load_bundle(folder).variant_path(way.kind)), load_external_data=False)
    for node in model.graph.node:
        for item in node.attribute:
            if item.name == "accuracy_level":
                item.i = way.scheme.accuracy_level
    if matrices:
        model = products_alone(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def products_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every MatMulNBits of a graph, and the Split after it, each fed by an input of its own of one token."""
    nodes = [node for node in model.graph.node if node.op_type in ("MatMulNBits", "Split") and "/" in node.name]
    products = [node for node in nodes if node.domain == DOMAIN]
    produced = {name for node in products for name in node.output}
    nodes = [node for node in nodes if node.domain == DOMAIN or node.input[0] in produced]
    read = {name for node in nodes for name in node.input}
    columns = {node.input[0]: next(item.i for item in node.attribute if item.name == "K") for node in products}
    used = {name for node in nodes for name in node.input}
    results = [name for node in nodes for name in node.output if name not in used]
    graph = onnx.helper.make_graph(
        nodes,
        "products",
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, width])
            for name, width in columns.items()
        ],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in results],
        [item for item in model.graph.initializer if item.name in read],
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _serve(folder: Path, way: Way, threads: int, matrices: bool) -> float:
    """Tokens a second."""
    session = open_way(folder, way, threads, matrices=matrices)
    return _time_matrices(session) if matrices else _time_decode(session, folder)


def _time_decode(session: Any, folder: Path) -> float:
    import onnxruntime

    bundle = load_bundle(folder)
    prompt = np.random.default_rng(0).integers(0, bundle.config.vocab_size, PROMPT).tolist()
    runner = OnnxRuntimeSession(bundle, max_seq_len=PROMPT + NEW_TOKENS, graph=OpenGraph(onnxruntime, session, None))

    def speed(tokens: int) -> float:
        return generate(runner, [prompt], max_new_tokens=tokens).decode_tokens_per_second or 0.0

    first = speed(8)  # the warm-up; of what is that slow it is enough
    return first if first < SLOW else max(speed(NEW_TOKENS) for _ in range(2))


def _time_matrices(session: Any) -> float:
    rng = np.random.default_rng(0)
    feeds = {item.name: rng.standard_normal(item.shape, np.float32) for item in session.get_inputs()}
    times = []
    for _ in range(STEPS + 8):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times[8:])


def run_way(folder: Path, way: Way, threads: int, *, matrices: bool) -> float:
    """Tokens a second in a fresh process.

    Raises:
        RuntimeError: it failed; with its reason.
    """
    return in_fresh_process(_serve, (folder, way, threads, matrices), float)


def foreign_seconds() -> float:
    """CPU seconds that other programs have used so far: all of the machine's, less this process's and its children's."""
    line = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    busy = sum(int(line[at]) for at in (0, 1, 2, 5, 6, 7)) / os.sysconf(
        "SC_CLK_TCK"
    )  # not idle, not waiting for a disk
    return busy - sum(os.times()[:4])


def quiet_turn(folder: Path, way: Way, threads: int, *, matrices: bool) -> tuple[float, float]:
    """Tokens a second of the try that other programs disturbed least, and how many cores those used."""
    tries: list[tuple[float, float]] = []
    while len(tries) < TRIES and (not tries or min(share for share, _ in tries) > FOREIGN):
        start, before = time.perf_counter(), foreign_seconds()
        speed = run_way(folder, way, threads, matrices=matrices)
        tries.append(((foreign_seconds() - before) / (time.perf_counter() - start), speed))
    share, speed = min(tries)
    return speed, share


def table(found: dict[str, list[float]]) -> list[str]:
    """Markdown: a row per type and block size, a column per accuracy level and packing."""
    columns = [(level, pack) for level in LEVELS for pack in ("apart", "packed")]
    lines = [
        "| tokens/s | " + " | ".join(f"level {level}, {pack}" for level, pack in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for kind in SCHEMES:
        for size in BLOCK_SIZES:
            cells = [found.get(f"{kind}-b{size}-a{level}-{pack}") for level, pack in columns]
            shown = ["-" if cell is None else f"{statistics.median(cell):.0f}" for cell in cells]
            lines.append(f"| {kind}, blocks of {size} | " + " | ".join(shown) + " |")
    return lines


LARGE: dict[str, object] = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The shape of Llama-3.2-1B."""


def measure_cost(checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """What ``llama-export quantize`` takes, whole processes, imports included: of the small model and of one of 1.2 billion."""
    large = work / "llama-1.2b"
    if not (large / "model.safetensors").exists():
        write_random_checkpoint(large, LARGE, dtype="bfloat16")
    rows = []
    for name, folder in (("125M float32", checkpoint), ("1.2B bfloat16", large)):
        if not (folder / "manifest.json").exists():
            export_checkpoint(folder)
        for kind in SCHEMES:
            command = [
                sys.executable,
                "-m",
                "llama_export",
                "quantize",
                str(folder),
                "--type",
                kind,
                "--force",
                "--json",
            ]
            cost = measure_process(command)
            data_bytes = load_bundle(folder).manifest.quantized[kind].data_size
            rows.append({"model": name, "type": kind, **cost, "data_bytes": data_bytes})
            log(str(rows[-1]))
    return rows


def cost_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| model | type | s | CPU s | peak GB | MB written |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_rss_gb']:.2f} | {row['data_bytes'] / 1e6:,.0f}"
        lines.append(f"| {row['model']} | {row['type']} | {figures} |")
    return lines


def write_section(path: Path, name: str, lines: list[str]) -> None:
    """Replaces what stands between the two markers of a section."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n{chr(10).join(lines)}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--only", default="", metavar="NAME,...", help="ways, e.g. int4-b32-a4-packed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matrices", action="store_true", help="the products alone")
    parser.add_argument(
        "--write", action="store_true", help=f"put the table into {DOCUMENT.name} and the figures into {RESULTS.name}/"
    )
    parser.add_argument("--cost", action="store_true", help="what quantising takes, instead")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.cost:
        rows = measure_cost(prepare_checkpoint(args.work), args.work)
        print("\n".join(cost_table(rows)))
        if args.write:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / "cost.json").write_text(
                json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
            )
            write_section(DOCUMENT, "cost", cost_table(rows))
        return
    ways = [WAYS[name] for name in args.only.split(",")] if args.only else list(WAYS.values())
    checkpoint = prepare_checkpoint(args.work)
    folders = {way.name: prepare(way, checkpoint, args.work) for way in ways}
    before = machine()
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    disturbed: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(args.turns):
        for way in ways:
            speed, share = quiet_turn(folders[way.name], way, args.threads, matrices=args.matrices)
            found[way.name].append(speed)
            disturbed[way.name].append(round(share, 3))
            log(f"turn {turn + 1} of {args.turns}, {way.name}: {speed:.1f}, others used {share:.2f} cores")
    print("\n".join(table(found)))
    if args.write:
        what = "matrices" if args.matrices else "decode"
        path = RESULTS / f"{what}.json"
        RESULTS.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        facts = {"what": what, "threads": args.threads, "turns": args.turns, "machine": before}
        for key, new in (("tokens_per_second", found), ("cores_used_by_others", disturbed)):
            facts[key] = {**old.get(key, {}), **new}  # with --only, the others stay as they were
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if not args.matrices:
            write_section(DOCUMENT, what, table(facts["tokens_per_second"]))


if __name__ == "__main__":
    main()
