"""The shape of the package: imports point one way, heavy packages stay where they belong, errors form one tree."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_export
from llama_export import errors

PACKAGE = Path(llama_export.__file__).parent
FOLDERS = (
    *("_system", "errors", "ops", "config", "checkpoint", "graph", "model", "bundle", "export", "engine"),
    *("runtime", "parity", "api", "cli", "__main__"),
)
"""The pipeline. The README shows the same folders in the same order; each imports from those before it alone."""
MAY_BE_HEAVY = {"ops", "model", "export", "engine", "parity"}
"""Folders whose files may import torch, onnx or TensorRT when they are imported; a production install has none of these."""
HEAVY = {
    "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings",
    "polygraphy", "transformers", "matplotlib", "cuda", "safetensors", "ml_dtypes",
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """``cli``, ``runtime``, ...: the module or package directly below ``llama_export``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST, *, deep: bool) -> Iterator[str]:
    """Full names imported below ``node``; without ``deep``, those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide where a name comes from"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            if deep:
                yield from imports(child, deep=deep)
        elif deep or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(child, deep=deep)


def own_units(path: Path, *, deep: bool) -> set[str]:
    """Folders of this package that a file imports, its own left out."""
    names = [name.split(".") for name in imports(tree(path), deep=deep) if name.split(".")[0] == "llama_export"]
    return {parts[1] for parts in names if len(parts) > 1 and parts[1] in FOLDERS} - {unit_of(path)}


def outside(path: Path, *, deep: bool) -> set[str]:
    """Top-level names of other packages that a file imports."""
    return {name.split(".")[0] for name in imports(tree(path), deep=deep)} - {"llama_export"}


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {unit_of(path) for path in FILES} == {*FOLDERS, "__init__"}


def test_readme_shows_the_folders_in_the_order_of_their_imports() -> None:
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^  (\w+)/ ", text[text.index("## How to read the code") :], re.MULTILINE)
    assert shown == [name for name in FOLDERS if (PACKAGE / name).is_dir()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_folders_import_from_those_before_them(path: Path) -> None:
    if path == PACKAGE / "__init__.py":  # gives public names when they are asked for, and imports nothing at its top
        assert not own_units(path, deep=False)
        return
    before = FOLDERS[: FOLDERS.index(unit_of(path))]
    assert own_units(path, deep=True) <= {*before}


def test_files_do_not_import_in_circles() -> None:
    """Also not inside functions or for type checkers only."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(("llama_export", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        found = set(imports(tree(path), deep=True))
        graph[name] = found | {other.rpartition(".")[0] for other in found}
    edges = {name: {other for other in found if other in graph and other != name} for name, found in graph.items()}
    # A package's __init__ collects its files; only the files themselves are followed from there.
    edges = {name: {other for other in found if not name.startswith(f"{other}.")} for name, found in edges.items()}
    while leaves := [name for name, found in edges.items() if not found]:
        edges = {name: found - set(leaves) for name, found in edges.items() if found}
    edges.pop("llama_export", None)
    assert not edges, f"a circle runs through {sorted(edges)}"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if unit_of(path) not in MAY_BE_HEAVY],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_runtime_install_imports_nothing_heavy_at_module_level(path: Path) -> None:
    assert not outside(path, deep=False) & HEAVY


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").glob("*.py")), ids=lambda path: path.stem)
def test_engine_modules_import_their_libraries_when_they_are_needed(path: Path) -> None:
    assert not outside(path, deep=False) & HEAVY


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.stem)
def test_reference_model_knows_neither_onnx_nor_tensorrt(path: Path) -> None:
    assert not outside(path, deep=True) & (HEAVY - {"torch"})
    assert own_units(path, deep=True) <= {"_system", "config", "checkpoint", "errors", "graph", "ops"}


def test_help_imports_neither_numpy_nor_anything_heavy() -> None:
    code = "import sys, llama_export.cli.main; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name.partition(".")[0] for name in said} & {*HEAVY, "numpy", "jinja2", "tokenizers", "rich"}


def test_operators_of_the_evaluator_share_no_code_with_what_they_judge() -> None:
    assert not own_units(PACKAGE / "parity" / "oracle" / "operators.py", deep=True)


def test_parity_results_and_metrics_need_no_torch() -> None:
    for path in (*(PACKAGE / "parity" / "report").glob("*.py"), PACKAGE / "parity" / "metrics.py"):
        assert not outside(path, deep=False) & HEAVY, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_assert_no_print_no_bare_except(path: Path) -> None:
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), where
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), where
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "breakpoint", "eval", "exec"), where


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_behaviour_comes_from_flags_not_from_the_environment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    read = set(re.findall(r"environ(?:\.get\(|\[)\s*[\"'](\w+)", text)) | set(
        re.findall(r"getenv\(\s*[\"'](\w+)", text)
    )
    # matplotlib reads SOURCE_DATE_EPOCH while it draws: a value that is no time is refused before the work.
    assert read <= ({"SOURCE_DATE_EPOCH"} if path == PACKAGE / "parity" / "report" / "pages.py" else {"NO_COLOR"})
    set_for_others = re.findall(r"\benviron\.setdefault\(", text)
    assert len(set_for_others) == (path == PACKAGE / "__init__.py")  # onnxruntime's telemetry
    assert len(re.findall(r"\benviron\b|\bgetenv\b", text)) == len(read) + len(set_for_others)


# ---- errors -----------------------------------------------------------------------------------------------------


def subclasses(cls: type[errors.LlamaExportError]) -> Iterator[type[errors.LlamaExportError]]:
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


def all_errors() -> list[type[errors.LlamaExportError]]:
    """Every error class, wherever in the package it is defined."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "llama_export."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return [errors.LlamaExportError, *subclasses(errors.LlamaExportError)]


def test_error_tree_in_the_docstring_is_the_tree() -> None:
    lines = re.findall(r"^    ((?:[| ] {3})*)(?:[|`]-- )?(\w+) +exit (\d)", str(errors.__doc__), re.MULTILINE)
    parents: list[str] = []
    drawn = {}
    for line in str(errors.__doc__).splitlines():
        match = re.match(r"    ([|` -]*)(\w+Error) +exit (\d)", line)
        if match:
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            drawn[match[2]] = (parents[depth - 1] if depth else None, int(match[3]))
    actual = {
        cls.__name__: (None if cls is errors.LlamaExportError else cls.__bases__[0].__name__, cls.exit_code)
        for cls in all_errors()
    }
    assert drawn == actual
    assert len(lines) == len(drawn)


def test_all_errors_live_in_one_module_and_are_documented() -> None:
    for cls in all_errors():
        assert cls.__module__ == "llama_export.errors", cls
        assert inspect.getdoc(cls), cls
        assert cls.exit_code in (2, 3), cls


def test_error_text_is_what_where_got_expected_and_a_hint() -> None:
    err = errors.ShapeError("too long", details={"got": 9, "expected": 8}, hint="shorten it")
    assert str(err) == "too long\n  got:      9\n  expected: 8\n\nhint: shorten it"
    assert err.details == {"got": "9", "expected": "8"}
    assert str(errors.ExportError("plain")) == "plain"


def test_missing_dependency_names_the_extra() -> None:
    err = errors.MissingDependencyError("onnxruntime", "cpu")
    assert err.exit_code == 3
    assert err.hint == "in a clone of the llama-export repository: pip install '.[cpu]'"
    assert "`onnxruntime`" in err.message


def test_every_error_that_is_raised_has_a_hint() -> None:
    """The issue's rule, read from the code: each call of an error class passes ``hint`` (MissingDependencyError has its own)."""
    names = {cls.__name__ for cls in all_errors()} - {"MissingDependencyError"}
    without = []
    for path in FILES:
        if unit_of(path) not in ("config", "checkpoint", "bundle", "cli"):
            continue
        for node in ast.walk(tree(path)):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            if called in names and not {"hint", None} & {keyword.arg for keyword in node.keywords}:  # type: ignore[union-attr]
                without.append(f"{path.name}:{node.lineno} {called}")  # type: ignore[union-attr]
    assert not without
