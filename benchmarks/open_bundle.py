"""Time to open a bundle: what ``load_bundle`` checks before every command, warm and cold.

    python benchmarks/open_bundle.py            # 2.5 GB below a temporary folder, a minute
    python benchmarks/open_bundle.py --write    # and the results file

Two bundles, exported in place:

* ``1.2B``: the shapes of Llama 3.2 1B in bfloat16, one file, every byte on disk.
* ``70B``: the shapes of Llama 3.1 70B in bfloat16, 141 GB in 30 files with holes in the place of the weights. Holes are read
  without the disk, so these figures count system calls and hashing, not a disk.

Each is opened by size and header only (a manifest without samples) and with the sample. ``cold`` is measured after the
kernel was asked to drop the file's pages. Results: ``benchmarks/results/open-bundle``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporters import export_command
from processes import log, machine, run_process
from published_configs import PUBLISHED
from random_llama import write_hollow_checkpoint

from llama_export._system.content import sample_blocks
from llama_export._system.environment import environment
from llama_export.bundle.bundle import load_bundle, tensor_regions
from llama_export.bundle.manifest import MANIFEST_NAME
from llama_export.checkpoint.safetensors import read_safetensors_header

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "open-bundle"
SMALL, LARGE, SHARDS, RUNS = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-70B", 30, 9


def fill(path: Path) -> None:
    """Random bytes in the place of the hole."""
    file, tensors = read_safetensors_header(path)
    begin, chunk = min(tensor.offset for tensor in tensors), os.urandom(1 << 24)
    with path.open("r+b") as stream:
        stream.seek(begin)
        while (left := file.size - stream.tell()) > 0:
            stream.write(chunk[:left])


def split(folder: Path) -> None:
    """One file with a hole becomes :data:`SHARDS` files with holes, and an index."""
    whole = folder / "model.safetensors"
    _, tensors = read_safetensors_header(whole)
    share, place = sum(tensor.nbytes for tensor in tensors) / SHARDS, 0
    shards: list[dict[str, Any]] = [{} for _ in range(SHARDS)]
    ends, weight_map = [0] * SHARDS, {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        index = min(int(place / share), SHARDS - 1)
        offsets = [ends[index], ends[index] + tensor.nbytes]
        shards[index][tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        ends[index], place = offsets[1], place + tensor.nbytes
        weight_map[tensor.name] = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
    for index, shard in enumerate(shards):
        raw = json.dumps(shard).encode()
        with (folder / f"model-{index + 1:05}-of-{SHARDS:05}.safetensors").open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + ends[index])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()


def seconds_to_open(folder: Path, *, cold: bool = False) -> float:
    """Of one call."""
    if cold:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    load_bundle(folder)
    return time.perf_counter() - start


def measure(name: str, folder: Path, *, disk: bool) -> Iterator[dict[str, Any]]:
    """Rows of the table for one bundle."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    blocks = size = 0
    for entry in manifest["weights"]:
        file, tensors = read_safetensors_header(folder / entry["file"])
        blocks, size = blocks + len(sample_blocks(tensor_regions(tensors), file.size)), size + file.size
    facts = {"model": name, "files": len(manifest["weights"]), "bytes": size}
    plain = {**manifest, "weights": [{**entry} for entry in manifest["weights"]]}
    for entry in plain["weights"]:
        del entry["sample_sha256"]
    for checked, stated, count in (("headers", plain, 0), ("headers and sample", manifest, blocks)):
        (folder / MANIFEST_NAME).write_text(json.dumps(stated))
        for state in ("warm", "cold") if disk else ("warm",):
            times = [seconds_to_open(folder, cold=state == "cold") for _ in range(RUNS + 1)][1:]
            yield {
                **facts, "checked": checked, "blocks": count, "state": state,
                "median_ms": round(statistics.median(times) * 1e3, 2), "max_ms": round(max(times) * 1e3, 2),
            }  # fmt: skip


def main() -> int:
    """Exit code 0, or 1 if an export failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for label, model in (("1.2B", SMALL), ("70B", LARGE)):
            folder = Path(scratch) / label
            write_hollow_checkpoint(folder, PUBLISHED[model][0])
            fill(folder / "model.safetensors") if label == "1.2B" else split(folder)
            done = run_process([*export_command(folder), "--ignore-estimate"])
            if done.exit_code != 0:
                log(done.complaint)
                return 1
            for row in measure(label, folder, disk=label == "1.2B"):
                rows.append(row)
                print(
                    f"{row['model']:>5} {row['files']:>3} files {row['bytes'] / 1e9:>6.1f} GB  {row['checked']:<18} "
                    f"{row['blocks']:>5} blocks  {row['state']}  median {row['median_ms']:>8.2f} ms  max {row['max_ms']:>8.2f} ms"
                )
    if arguments.write:
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        report = {
            "schema_version": SCHEMA_VERSION, "created_at": created, "machine": machine(), "environment": environment(),
            "runs": RUNS, "rows": rows,
        }  # fmt: skip
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{created[:10]}-cpu-{os.cpu_count()}-cores.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
