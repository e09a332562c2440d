"""The wheels that are shipped: same bytes from the same inputs, their tag is deserved, and they work where nothing else is.

Built for one chip from Triton's warm cache, which installing the plugins leaves. `make wheels WHEELS=--twice` compares the
whole, from nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from library_support import PLUGINS, ROOT, require_plugins

from llama_export.ops.table import OP_SPECS

for module in ("auditwheel", "scikit_build_core", "setuptools"):
    pytest.importorskip(module, reason=f"`{module}` is not installed: pip install 'llama-export[dev,plugins-dev]'")
require_plugins()

CHIP = "89"
GLIBC = (2, 17)
"""Of the tag."""
LIBRARIES = ("libllama_export_plugins.so", "libllama_export_plugins_preload.so")
"""What programs load: the C library alone is needed. (What only tests load may need any libstdc++.so.6.)"""


def build(folder: Path) -> dict[str, Path]:
    """Distribution -> its wheel."""
    folder.mkdir()
    environment = {"LLAMA_EXPORT_CHIPS": CHIP, "SOURCE_DATE_EPOCH": "1700000000", "TMPDIR": str(folder)}
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_wheels.py", "--out", folder / "dist"],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {path.name.split("-")[0]: path for path in (folder / "dist").glob("*.whl")}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("wheels") / "first")


@pytest.fixture(scope="module")
def wheel(wheels: dict[str, Path]) -> Path:
    return wheels["llama_export_plugins"]


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package folder of the plugins' wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "llama_export_plugins"


def test_two_builds_in_two_folders_are_the_same_bytes(wheels: dict[str, Path], tmp_path: Path) -> None:
    again = build(tmp_path / "a-second-folder")
    assert {path.name for path in again.values()} == {path.name for path in wheels.values()}
    for name, path in wheels.items():
        assert again[name].read_bytes() == path.read_bytes(), name


COMPILE_SOME = """
import sys
from kernels import compile as compiler

first = {}
for variant in compiler.variants():
    if variant.dtype == "float16":
        first.setdefault(variant.kernel, variant)
compiler.variants = lambda: list(first.values())
sys.argv = ["compile", "--out", sys.argv[1], "--chips", "80", "--jobs", "1"]
sys.exit(compiler.main())
"""


def test_kernels_are_the_same_bytes_from_an_empty_cache(tmp_path: Path) -> None:
    """One variant of each kernel, as machine code and PTX; sources, cache and output lie in different folders."""
    found = []
    for seed, name in (("1", "here"), ("2", "in-another-place")):
        folder = tmp_path / name
        shutil.copytree(PLUGINS / "kernels", folder / "sources" / "kernels")
        result = subprocess.run(
            [sys.executable, "-c", COMPILE_SOME, folder / "out"],
            cwd=folder / "sources", capture_output=True, text=True,
            env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        files = [path for path in (folder / "out").rglob("*") if path.is_file()]
        contents = {path.relative_to(folder / "out"): path.read_bytes() for path in files}
        # The only place for a path: which file the assembler is to embed.
        contents[Path("kernel_images.S")] = contents[Path("kernel_images.S")].replace(bytes(folder), b"")
        assert not [path for path, content in contents.items() if str(tmp_path).encode() in content]
        found.append(contents)
    assert len(found[0]) >= 4 + 2 * 4
    assert found[0] == found[1]


def test_holds_what_it_should_and_no_more(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["llama_export_plugins"]) as archive:
        names = set(archive.namelist())
        license_text = next(archive.read(name) for name in names if name.endswith("/licenses/LICENSE"))
        tags = re.findall(r"^Tag: (.*)$", archive.read(next(n for n in names if n.endswith("/WHEEL"))).decode(), re.M)
    assert license_text == (ROOT / "LICENSE").read_bytes()
    assert {
        f"llama_export_plugins/{name}" for name in (*LIBRARIES, "variants.json", "__init__.py", "kernels/table.py")
    } <= names
    assert {Path(name).suffix for name in names if not name.endswith("/")} <= {".py", ".so", ".json", ".typed", ""}
    assert f"py3-none-manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}" in tags
    with zipfile.ZipFile(wheels["llama_export"]) as archive:
        names = set(archive.namelist())
    assert {"llama_export/py.typed", "llama_export/cli/main.py"} <= names
    assert any(name.startswith("llama_export/parity/report/templates/") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"llama_export"}


def test_auditwheel_finds_nothing_newer_than_the_tag(wheel: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True
    ).stdout
    ((major, minor),) = re.findall(
        rf'platform tag: "manylinux_(\d+)_(\d+)_{platform.machine()}"', " ".join(shown.split())
    )
    assert (int(major), int(minor)) <= GLIBC, shown
    assert "requires no external shared libraries" in " ".join(shown.split())


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_libraries_need_the_c_library_alone(unpacked: Path, name: str) -> None:
    printed = subprocess.run(["objdump", "-p", unpacked / name], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED\s+(\S+)", printed)) == {"libc.so.6", "libdl.so.2"}
    assert "RPATH" not in printed
    assert "RUNPATH" not in printed
    (section,) = re.findall(r"Version References:\n(.*?)(?:\n\n|\Z)", printed, re.DOTALL)
    versions = re.findall(r"\d+ ([A-Z]+)_([\d.]+)$", section, re.M)
    assert versions
    for family, version in versions:
        assert family == "GLIBC"
        assert tuple(map(int, version.split(".")[:2])) <= GLIBC


IN_A_CLEAN_PLACE = """
import ctypes, importlib.util, json, sys
import llama_export_plugins as plugins

driver = ctypes.CDLL(str(plugins.library_path().parent / "testing" / "libplugin_driver.so"))
library = ctypes.CDLL(str(plugins.library_path()))
library.llama_export_plugins_version.restype = driver.creator_name.restype = ctypes.c_char_p
library.getCreators.restype = ctypes.POINTER(ctypes.c_void_p)
count = ctypes.c_int32()
creators = library.getCreators(ctypes.byref(count))
print(json.dumps({
    "others": [name for name in ("numpy", "torch", "triton", "tensorrt") if importlib.util.find_spec(name)],
    "package": plugins.__version__, "path": str(plugins.library_path()), "preload": plugins.preload_path().name,
    "version": library.llama_export_plugins_version().decode(),
    "abi": [plugins.ABI, library.llama_export_plugins_abi()],
    "chips": plugins.variants()["chips"],
    "creators": [driver.creator_name(ctypes.c_void_p(creators[i])).decode() for i in range(count.value)],
}))
"""


def test_works_in_an_environment_with_nothing_else(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clean"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", wheel],
        check=True, env=environment,
    )  # fmt: skip
    result = subprocess.run([python, "-I", "-c", IN_A_CLEAN_PLACE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["others"] == []
    assert Path(answer["path"]).is_relative_to(folder)
    assert answer["version"] == answer["package"] == wheel.name.split("-")[1]
    assert answer["abi"][0] == answer["abi"][1]
    assert answer["chips"] == [int(CHIP)]
    assert answer["preload"] == LIBRARIES[1]
    assert set(answer["creators"]) == set(OP_SPECS)
