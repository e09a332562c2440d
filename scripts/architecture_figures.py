"""Draws the three figures of docs/architecture.md from the code that runs: docs/figures/*.svg.

    python scripts/architecture_figures.py [--folder docs/figures]

architecture.svg     one decoder layer of a traced model: its boxes are the modules that torch.export saw, its arrows the
                     tensors between them, its shapes those of the trace
rms-norm.svg         the activations of the bundled checkpoint before and after each kind of norm, on source code it never saw
rotation.svg         queries and keys of the bundled checkpoint before and after the rotation, pair by pair

Each figure has a function that computes (no drawing) and one that draws (no computing).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_export.config.huggingface import config_from_dict
from llama_export.export.trace import trace_program
from llama_export.model import load_reference
from llama_export.model.rope import LlamaRotaryEmbedding
from llama_export.ops.attention import rotate, split_heads

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
CHECKPOINT = ROOT / "examples" / "tiny-llama"
FOLDER = ROOT / "docs" / "figures"
INK, PAPER = "#1b1f24", "#ffffff"
FILL = {"norm": "#d7e8d0", "linear": "#dbe4f3", "op": "#f6d9b8", "other": "#ececec", "input": "#ffffff"}
QUERY, KEY, RAW = "#b3541e", "#1f5fa8", "#9aa0a6"


# ---------------------------------------------------------------------------------------------------- architecture


@dataclass
class Box:
    """One module or op of the traced model."""

    label: str
    kind: str
    """A key of ``FILL``."""
    detail: str = ""
    """Shape of its weight, if it has one."""


@dataclass
class Graph:
    """Boxes by name, and arrows (from, to) with the shape of the tensor that flows."""

    boxes: dict[str, Box] = field(default_factory=dict)
    arrows: dict[tuple[str, str], str] = field(default_factory=dict)


def llama_graph(config: dict[str, Any], layer: int = 1) -> Graph:
    """The trace of a causal LM, contracted to modules and ops; of the layers, one is kept.

    Args:
        config: ``config.json``; any size, nothing is allocated.
        layer: which layer to keep. The first one differs: it has no residual yet.
    """
    shallow = config_from_dict({**config, "num_hidden_layers": layer + 1})
    program = trace_program(shallow, "bfloat16")
    graph, sources = Graph(), dict[Any, set[tuple[str, str]]]()
    shapes = {name: tuple(parameter.shape) for name, parameter in program.named_parameters()}
    letters = _dimension_letters(program)
    placeholders = {item.arg.name: item for item in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        found = {origin for given in node.all_input_nodes for origin in sources.get(given, set())}
        if node.op == "placeholder":
            name = _input_box(node, placeholders[node.name], layer)
            sources[node] = {(name, _shape(node, letters))} if name else set()
            if name:
                graph.boxes[name] = Box(name, "input")
            continue
        path, box = _box_of(node, shapes)
        if ".layers." in path and f".layers.{layer}" not in path:
            # Of a layer that is left out, the stream of hidden states comes out.
            sources[node] = {origin for origin in found if origin[0] == "model.embed_tokens"}
            continue
        if box is None:
            sources[node] = found  # a view, a size: what goes in comes out
            continue
        graph.boxes.setdefault(path, box)
        for origin, shape in found:
            if origin != path:
                graph.arrows.setdefault((origin, path), shape)
        sources[node] = {(path, _shape(node, letters))}
    _drop_unused(graph)
    return graph


def _dimension_letters(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Symbol -> letter, from the shapes of ``input_ids`` [B, S] and of a cache tensor [B, G, C, D]."""
    tensors = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in tensors if name.startswith("past_key_values")]
    batch, tokens = tensors["input_ids"].shape
    return {
        str(batch): "B",
        str(tokens): "S",
        str(tensors[names[0]].shape[2]): "C",
        str(tensors["logits_index"].shape[1]): "N",
    }


def _shape(node: Any, letters: dict[str, str]) -> str:
    value = node.meta.get("val")
    while isinstance(value, tuple | list):
        value = value[0]
    return "[" + ", ".join(letters.get(str(size), str(size)) for size in value.shape) + "]" if value is not None else ""


def _input_box(node: Any, spec: Any, layer: int) -> str | None:
    if spec.kind != torch.export.graph_signature.InputKind.USER_INPUT:
        return None
    if node.name.startswith("past_key_values"):
        return "past_key_values" if node.name.startswith(f"past_key_values_{layer}_") else None
    return str(node.name)


def _box_of(node: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[str, Box | None]:
    """The box of a traced node: its module, if that is a leaf, else the node itself, if it computes."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", None
    path, kind = stack[-1][0], str(stack[-1][1]).rsplit(".", 1)[-1]
    if kind in ("Linear", "Embedding"):
        weight = "x".join(map(str, shapes.get(f"{path}.weight", ())))
        return path, Box(path.rsplit(".", 1)[-1], "linear", weight)
    if kind == "LlamaRMSNorm":
        name = path.rsplit(".", 1)[-1]
        op = "RMSNorm" if "add" not in str(node.target) else "x + y, RMSNorm"
        return path, Box(name, "norm", op)
    if kind == "LlamaRotaryEmbedding":
        return path, Box("rotary_emb", "other", "cos, sin")
    target = str(node.target)
    if target.startswith("llama_export"):
        return f"{path}.{target}", Box("LlamaAttention", "op", "rotate, append, attend")
    if kind == "LlamaMLP" and node.op == "call_function":
        name = target.removeprefix("aten.").split(".")[0]
        return f"{path}.{name}", Box(name, "other")
    return path, None


def _drop_unused(graph: Graph) -> None:
    """Integer inputs only steer; what they steer is said in the text."""
    for name in ("past_length", "sequence_length", "logits_index"):
        graph.boxes.pop(name, None)
    graph.arrows = {pair: shape for pair, shape in graph.arrows.items() if set(pair) <= set(graph.boxes)}


def levels(graph: Graph) -> dict[str, int]:
    """Box -> length of the longest path that leads to it."""
    found: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in found:
            before = [origin for origin, to in graph.arrows if to == name]
            found[name] = 1 + max(map(level, before)) if before else 0
        return found[name]

    for name in graph.boxes:
        level(name)
    # Boxes beside the stream (cache, RoPE) stand in the row above their first reader.
    for name in graph.boxes:
        readers = [found[to] for origin, to in graph.arrows if origin == name]
        if readers and ".layers." not in name and name not in ("input_ids", "model.embed_tokens"):
            found[name] = min(readers) - 1
    return found


def half_width(box: Box, output: str) -> float:
    """Of a drawn box, in units of the axes: as wide as its longest line."""
    return 0.03 + 0.0425 * max(len(text) for text in (box.label, box.detail, output))


def _route(
    start: tuple[float, float], end: tuple[float, float], widths: list[float], is_next_row: bool
) -> list[tuple[float, float]]:
    """The corners of an arrow between two boxes: straight to the next row, around what stands between to a later one."""
    (x0, y0), (x1, y1) = start, end
    half = 0.38  # of a box's height
    if is_next_row:
        return [(x0, y0 - half), (x1, y1 + half)]
    if x0 == x1:  # a residual connection
        lane = x0 - 2.05
        return [(x0 - widths[0], y0), (lane, y0), (lane, y1), (x1 - widths[1] - 0.1, y1)]
    if y0 == 0:  # from the top, out and down
        side = 1 if x1 > x0 else -1
        return [(x0 + side * widths[0], y0), (x1, y0), (x1, y1 + half)]
    side = 1 if x0 > x1 else -1
    return [(x0, y0 - half), (x0, y1), (x1 + side * (widths[1] + 0.1), y1)]


def draw_architecture(path: Path) -> None:
    """``architecture.svg``."""
    from published_configs import PUBLISHED

    name = "meta-llama/Llama-3.1-8B-Instruct"
    graph = llama_graph(PUBLISHED[name][0])
    place = levels(graph)
    rows: dict[int, list[str]] = {}
    for box in sorted(graph.boxes, key=lambda box: ".layers." in box):  # in the order of the trace, the stream last
        rows.setdefault(place[box], []).append(box)
    at = {
        box: ((2.0 if len(row) == 2 else 3.0) * (i - (len(row) - 1) / 2), -1.15 * level)
        for level, row in rows.items()
        for i, box in enumerate(row)
    }
    outputs = {origin: shape for (origin, _), shape in graph.arrows.items()}
    figure, axes = _figure(9.5, 11.5)
    for origin, to in graph.arrows:
        widths = [half_width(graph.boxes[name], outputs.get(name, "")) for name in (origin, to)]
        points = _route(at[origin], at[to], widths, place[to] - place[origin] == 1)
        axes.plot(*zip(*points[:-1], strict=True), color=INK, lw=0.9, zorder=1)
        axes.annotate(
            "", xy=points[-1], xytext=points[-2], arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9}, zorder=1
        )
    for box_name, (x, y) in at.items():
        box = graph.boxes[box_name]
        text = "\n".join(part for part in (box.label, box.detail, outputs.get(box_name, "")) if part)
        style = {"boxstyle": "round,pad=0.3", "fc": FILL[box.kind], "ec": INK, "lw": 0.8}
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color=INK, bbox=style, zorder=3)
    inside = [y for box_name, (_, y) in at.items() if ".layers." in box_name]
    low, high = min(inside) - 0.55, max(inside) + 0.55
    width = max(abs(x) for x, _ in at.values()) + 1.5
    axes.add_patch(_rectangle(-width, low, 2 * width, high - low))
    layers = PUBLISHED[name][0]["num_hidden_layers"]
    axes.text(width - 0.1, low + 0.08, f"one of {layers} layers", ha="right", va="bottom", fontsize=8, color=INK)
    axes.set_xlim(-width - 0.2, width + 0.2)
    axes.set_ylim(min(y for _, y in at.values()) - 0.6, 0.6)
    axes.axis("off")
    axes.set_title(f"{name.split('/')[1]}: the traced model, module by module", fontsize=10, color=INK)
    _save(figure, path)


# -------------------------------------------------------------------------------------------------------- RMSNorm


def draw_rms_norm(path: Path) -> None:
    """``rms-norm.svg``: how the activations are spread before and after four of the norms."""
    from studies.norms import activations

    found = activations()
    names = list(found)
    chosen = [names[0], names[1], names[len(names) // 2], names[-1]]
    figure, rows = _figure(9, 4.6, rows=2, columns=len(chosen))
    for column, name in enumerate(chosen):
        x, normed = (tensor.double().flatten().numpy() for tensor in found[name])
        for row, (values, colour, title) in enumerate(((x, RAW, "before"), (normed, KEY, "after"))):
            axes = rows[row][column]
            limit = float(np.quantile(np.abs(values), 0.999))
            axes.hist(values, bins=np.linspace(-limit, limit, 61), color=colour, density=True)
            rms = float(np.sqrt(np.mean(values**2)))
            axes.set_title(
                f"{name}\n{title}, RMS {rms:.2g}" if row == 0 else f"{title}, RMS {rms:.2g}", fontsize=8, color=INK
            )
            axes.tick_params(labelsize=7)
            axes.set_yticks([])
    figure.suptitle(
        "tiny-llama, 512 tokens of held-out source: activations before and after RMSNorm", fontsize=10, color=INK
    )
    figure.tight_layout()
    _save(figure, path)


# ------------------------------------------------------------------------------------------------------- rotation


def rotated_pairs(layer: int = 0, tokens: int = 24) -> dict[str, np.ndarray]:
    """One head's query and key of the bundled checkpoint, as projected and as rotated: each [S, D], float64.

    The same token stands at every position, so that nothing but the rotation differs from position to position.
    """
    model = load_reference(CHECKPOINT, torch.float64)
    rotary = LlamaRotaryEmbedding(model.config)
    rotary.set_frequencies(torch.float64)
    decoder = model.model
    block = decoder.layers[layer]
    ids = torch.full((1, tokens), 300)
    with torch.no_grad():
        normed, _ = block.input_layernorm(decoder.embed_tokens(ids))  # type: ignore[operator]
        query = split_heads(block.self_attn.q_proj(normed), model.config.num_attention_heads)  # type: ignore[union-attr]
        key = split_heads(block.self_attn.k_proj(normed), model.config.num_key_value_heads)  # type: ignore[union-attr]
        cos, sin = rotary(torch.arange(tokens).unsqueeze(0))
        found = {
            "query": query,
            "key": key,
            "query, rotated": rotate(query, cos, sin),
            "key, rotated": rotate(key, cos, sin),
        }
    return {name: tensor[0, 0].numpy() for name, tensor in found.items()}


def draw_rotation(path: Path) -> None:
    """``rotation.svg``: three pairs (i, i + D/2) in the plane, and the score by distance."""
    found = rotated_pairs()
    tokens, dim = found["query"].shape
    figure, axes = _figure(9, 3.0, columns=4)
    for plot, pair in zip(axes[0][:3], (0, dim // 8, dim // 4), strict=True):
        for name, colour in (("query", QUERY), ("key", KEY)):
            before, after = found[name], found[f"{name}, rotated"]
            plot.scatter(
                after[:, pair], after[:, pair + dim // 2], s=6 + 1.2 * np.arange(tokens), color=colour, alpha=0.55, lw=0
            )
            plot.annotate(
                "", xy=(before[0, pair], before[0, pair + dim // 2]), xytext=(0, 0),
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2},
            )  # fmt: skip
        radius = 1.15 * max(float(np.hypot(found[n][0, pair], found[n][0, pair + dim // 2])) for n in ("query", "key"))
        plot.set_xlim(-radius, radius)
        plot.set_ylim(-radius, radius)
        plot.set_aspect("equal")
        degrees = np.degrees(10000.0 ** (-2 * pair / dim))
        plot.set_title(
            f"dimensions {pair} and {pair + dim // 2}\n{degrees:.2g} degrees a position", fontsize=8, color=INK
        )
        plot.tick_params(labelsize=7)
    scores = found["query, rotated"] @ found["key, rotated"].T / dim**0.5
    last = axes[0][3]
    for m, colour in ((tokens - 1, QUERY), (tokens // 2, KEY)):
        last.plot(m - np.arange(m + 1), scores[m, : m + 1], color=colour, marker="o", ms=3 if m < tokens - 1 else 5,
                  lw=1, alpha=0.7, label=f"query at {m}")  # fmt: skip
    last.set_title("score by distance", fontsize=8, color=INK)
    last.legend(fontsize=6, frameon=False)
    last.tick_params(labelsize=7)
    figure.suptitle(
        "tiny-llama, layer 0, head 0: arrows as projected, dots rotated (larger: later position)",
        fontsize=10,
        color=INK,
    )
    figure.tight_layout()
    _save(figure, path)


# -------------------------------------------------------------------------------------------------------- drawing


def _figure(width: float, height: float, rows: int = 0, columns: int = 0) -> tuple[Any, Any]:
    """A figure and its axes: one, or a grid [rows][columns]. The same bytes for the same content."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "llama_export", "svg.fonttype": "none", "font.family": "DejaVu Sans"})
    if not columns:
        return pyplot.subplots(figsize=(width, height), facecolor=PAPER)
    return pyplot.subplots(max(rows, 1), columns, figsize=(width, height), facecolor=PAPER, squeeze=False)


def _rectangle(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, ec="#57606a", ls="--", lw=0.9)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    pyplot.close(figure)


DRAWINGS = {"architecture.svg": draw_architecture, "rms-norm.svg": draw_rms_norm, "rotation.svg": draw_rotation}


def main(names: Iterable[str] = DRAWINGS) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        DRAWINGS[name](folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
