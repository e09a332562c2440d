"""The first layers of a model, as a bundle of their own: what a search for a faulty layer runs.

A Llama cut after layer k is a smaller Llama: its last norm reads the two summands that the first norm of layer k + 1 would
have read. So a prefix is opened, run and built into an engine by the code that does so for the whole, with the same
fusions inside each layer, and nothing has to be observed in it but its logits and its cache.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx

from llama_export._system.commit import staging_folder
from llama_export._system.content import sha256_of_file
from llama_export.bundle.bundle import Bundle, load_bundle
from llama_export.bundle.destination import json_bytes, write_error
from llama_export.bundle.manifest import MANIFEST_NAME
from llama_export.checkpoint.checkpoint import INDEX_NAME, TOKENIZER_FILES, Checkpoint
from llama_export.config.huggingface import load_json_object
from llama_export.parity.oracle.evaluator import needed_nodes

_CACHE = re.compile(r"(?:past_key_values|present)\.(\d+)\.(?:key|value)")


@contextmanager
def first_layers(bundle: Bundle, count: int, *, checkpoint: Checkpoint | None = None) -> Iterator[Bundle]:
    """A bundle of the first ``count`` decoder layers with the model's own norm and head; gone after use.

    It lies inside the bundle's folder, so that hard links to the weights are possible; where they are not, the weights are
    copied.

    Args:
        bundle: a causal LM, in whatever state its graphs are: they are cut, not made anew.
        count: 1 to ``num_hidden_layers``.
        checkpoint: what the prefix is held to, if its files may lie elsewhere than in the bundle's folder.

    Raises:
        ToolchainError: no space. ExportError: the folder cannot be written to.
    """
    try:
        with staging_folder(bundle.folder) as staging:  # if this process is killed, a later one removes it
            # A bundle of its own inside: this process holds the lock of the staging folder, and an engine that is built for
            # the prefix takes the lock of its bundle.
            folder = staging / "prefix"
            folder.mkdir()
            _write(bundle, count, folder)
            if checkpoint is not None:
                _add_weights(checkpoint, folder)
            yield load_bundle(folder, ignore_hashes=True)
    except OSError as err:
        raise write_error(err, bundle.folder) from err


def _write(bundle: Bundle, count: int, folder: Path) -> None:
    functions = {}
    files = {path.name for path in bundle.folder.iterdir() if path.is_file()}
    for target, facts in bundle.manifest.functions.items():
        model = onnx.load(str(bundle.folder / facts.file), load_external_data=False)
        cut(model.graph, count)
        (folder / facts.file).write_bytes(model.SerializeToString())
        files.discard(facts.file)
        functions[target] = replace(facts, sha256=sha256_of_file(folder / facts.file))
    manifest = replace(
        bundle.manifest,
        model=replace(bundle.manifest.model, num_hidden_layers=count),
        io=tuple(entry for entry in bundle.manifest.io if _layer(entry.name) < count),
        functions=functions,
        graph_sha256=functions["standard"].sha256,
    )
    config = load_json_object(bundle.folder / "config.json")
    (folder / "config.json").write_bytes(json_bytes({**config, "num_hidden_layers": count}))
    (folder / MANIFEST_NAME).write_bytes(json_bytes(manifest.to_json()))
    for name in files - {"config.json", MANIFEST_NAME}:
        if name in TOKENIZER_FILES or name.endswith(".json"):
            shutil.copyfile(bundle.folder / name, folder / name)
        else:  # weights, and whatever else the graph points into
            _place((bundle.folder / name).resolve(), folder / name)


def _add_weights(checkpoint: Checkpoint, folder: Path) -> None:
    """What a bundle with embedded weights does not hold itself."""
    for name in [*(file.name for file in checkpoint.files), INDEX_NAME]:
        source = checkpoint.folder / name
        if source.exists() and not (folder / name).exists():
            _place(source.resolve(), folder / name)


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def cut(graph: onnx.GraphProto, count: int) -> None:
    """Leaves the first ``count`` layers of a graph, and what stands before and after the layers."""
    ends = [node for node in graph.node if node.name.startswith("model.norm/")]
    follows = [node for node in graph.node if node.name.startswith(f"model.layers.{count}.input_layernorm/")]
    if follows:  # else the whole model is asked for
        begin = follows[0]
        summands = dict(zip(ends[0].input[:2], begin.input[:2], strict=True))
        for node in ends:
            for slot, name in enumerate(node.input):
                node.input[slot] = summands.get(name, name)
    outputs = [value for value in graph.output if _layer(value.name) < count]
    inputs = [value for value in graph.input if _layer(value.name) < count]
    nodes = needed_nodes(graph.node, [value.name for value in outputs])
    read = {name for node in nodes for name in node.input}
    weights = [item for item in graph.initializer if item.name in read]
    kept = [value for value in graph.value_info if value.name in read]
    for field, items in (
        (graph.output, outputs), (graph.input, inputs), (graph.node, nodes), (graph.initializer, weights), (graph.value_info, kept),
    ):  # fmt: skip
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        del field[:]
        field.extend(copies)


def _layer(name: str) -> int:
    """Of a cache tensor; -1 for everything else."""
    found = _CACHE.fullmatch(name)
    return int(found[1]) if found else -1
