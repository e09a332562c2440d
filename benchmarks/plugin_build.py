"""What the plugin distribution costs: time of `pip install ./plugins` from nothing, sizes, number of compiled kernels.

    python benchmarks/plugin_build.py [--json build/plugin_build.json]

Builds a wheel in an isolated environment, as `pip install ./plugins` does, with an empty Triton cache and then with the
one that it left. Packages come from pip's cache where it has them. Needs a C++17 compiler; no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build_wheel(folder: Path, triton_cache: Path) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT / "plugins"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_CACHE_DIR": str(triton_cache)})
    return time.perf_counter() - start


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "wheel", Path(scratch) / "cache"
        cold, warm = (build_wheel(folder, cache) for _ in range(2))
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            library = next(item for item in archive.infolist() if item.filename.endswith("libllama_export_plugins.so"))
            variants = json.loads(archive.read("llama_export_plugins/variants.json"))
        images = variants["images"]
        found = {
            "cores": os.cpu_count(), "load_average_1min": os.getloadavg()[0], "platform": platform.platform(),
            "triton": variants["triton"], "install_seconds_cold": round(cold, 1), "install_seconds_warm": round(warm, 1),
            "wheel": wheel.name, "wheel_bytes": wheel.stat().st_size, "library_bytes": library.file_size,
            "chips": variants["chips"], "images": len(images), "ptx_images": sum(image["ptx"] for image in images),
            "variants": sum(image["ptx"] for image in images),
            "largest_frame_bytes": max(image["frame"] for image in images),
            "largest_shared_bytes": max(image["shared"] for image in images),
        }  # fmt: skip
    for key, value in found.items():
        print(f"{key}: {value}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
