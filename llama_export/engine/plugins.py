"""Finds, loads and checks the library of TensorRT plugins (the distribution ``llama-export-plugins``).

Role: between :mod:`llama_export.engine.tensorrt` and :mod:`llama_export.engine.build`. The library is one shared object that
TensorRT loads into its plugin registry; an engine with plugin layers needs it when it is built and whenever it is
loaded. Everything that could be wrong with it is found here, as an error with exit code 3, *before* TensorRT meets it:
what TensorRT or the dynamic loader does about a bad library is an abort of the process or a sentence without a cause.

It knows nothing about graphs and engines: which layers a network has is :mod:`llama_export.engine.build`'s business.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_export._system.content import sha256_of_file
from llama_export.config.llama import LlamaConfig
from llama_export.config.settings import CUSTOM_OPS
from llama_export.errors import ToolchainError
from llama_export.ops.table import ADD_RMS_NORM, ATTENTION, MASKED_ATTENTION, RMS_NORM

__all__ = [
    "ABI", "NAMESPACE", "PLUGIN_VERSION", "VERSIONS", "Creator", "PluginLibrary", "check_chip", "check_creators",
    "check_served", "describe_library", "find_library", "kernels_installed", "native_hint", "register_library",
    "take_library_error",
]  # fmt: skip

PACKAGE = "llama_export_plugins"
ABI = 4
"""What ``llama_export_plugins_abi()`` must return, and what every plugin layer of an engine stores: the inputs, attributes,
stored fields and workspaces this package knows. Stated here on its own: it is what an installed library is compared with."""
VERSIONS = "0.1."
"""Prefix of the library versions that belong to this package."""
PLUGIN_VERSION = "1"
"""Version of every plugin creator; the ``version`` of the ops in ``llama_export/ops``."""
NAMESPACE = ""
"""Creators in any other namespace are silently missed by the parser when the model holds a function of that name."""
INTERPRETER = "3.9."
"""Prefix of the Triton versions whose interpreter is relied on: 3.6's fails with NumPy 2.5, and each differs inside."""
_INSTALL = "pip install ./plugins, or build an engine without plugin layers: --ops native"
_REINSTALL = "pip install --force-reinstall ./plugins, or build an engine without plugin layers: --ops native"
_ATTENTION, _MASKED_ATTENTION = ATTENTION.op_type, MASKED_ATTENTION.op_type
_KERNELS = {
    RMS_NORM.op_type: ("rms_norm",),
    ADD_RMS_NORM.op_type: ("add_rms_norm",),
    _ATTENTION: ("rotate_and_append", "attention_prefill", "attention_split", "attention_combine"),
    _MASKED_ATTENTION: ("rotate_and_append", "attention_padded"),
}
"""Op -> kernels a plugin launches; names of ``plugins/kernels/table.py``."""
_DTYPE_NAMES = {0: "float32", 1: "float16", 7: "bfloat16"}
"""``nvinfer1::DataType`` -> dtype, should the list of variants give numbers."""
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginLibrary:
    """A library that was found whole, of this version and ABI. It is not yet in TensorRT's registry."""

    path: Path
    version: str
    """Of the library itself, which equals that of the Python package around it."""
    abi: int
    sha256: str
    bytes: int
    """Size of the file."""
    images: tuple[Mapping[str, Any], ...]
    """The compiled kernels: ``kernel``, ``dtype``, ``width`` (head_dim or hidden_size), ``masked``, ``compute_capability``, ``ptx``, ..."""

    @property
    def chips(self) -> tuple[str, ...]:
        """Compute capabilities with a compiled image, e.g. ``8.9``."""
        found = {_capability(image) for image in self.images if not image["ptx"]}
        return tuple(_dotted(item) for item in sorted(found))

    @property
    def portable_from(self) -> str | None:
        """The compute capability from which on the portable PTX serves chips that have no image of their own."""
        found = [_capability(image) for image in self.images if image["ptx"]]
        return _dotted(min(found)) if found else None

    @property
    def identity(self) -> dict[str, str | int]:
        """What an engine's sidecar records of the library it was built with."""
        return {"version": self.version, "abi": self.abi, "sha256": self.sha256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Creator:
    """One plugin creator of the library, as TensorRT sees it."""

    name: str
    version: str
    namespace: str
    fields: Mapping[str, str]
    """Attribute -> type."""


# ---- finding ----------------------------------------------------------------------------------------------------


def find_library() -> PluginLibrary:
    """The installed plugin library.

    Raises:
        ToolchainError: not installed, not whole, for another machine, of another version or ABI.
    """
    package = _import_package()
    path = Path(package.library_path())
    if not path.is_file():
        raise ToolchainError(
            "the plugin library's file is missing",
            details={"got": f"no file `{path}`", "expected": "the shared object of llama-export-plugins"},
            hint=_REINSTALL,
        )
    _check_shared_object(path)
    version, abi = _ask(path)
    if abi != ABI:
        raise ToolchainError(
            "the plugin library has another ABI",
            details={"got": f"ABI {abi} (version {version}) in `{path}`", "expected": f"ABI {ABI}"},
            hint=_REINSTALL,
        )
    if not version.startswith(VERSIONS) or version != package.__version__:
        around = "" if version == package.__version__ else f", in the Python package {package.__version__}"
        raise ToolchainError(
            "the plugin library is of another version",
            details={"got": f"{version}{around}: `{path}`", "expected": f"{VERSIONS}x, the same in both"},
            hint=_REINSTALL,
        )
    try:
        images = tuple({**image, "dtype": _dtype(image["dtype"])} for image in package.variants()["images"])
        if not images or any({"kernel", "width", "compute_capability", "ptx"} - set(image) for image in images):
            raise ValueError("no kernel is listed, or one lacks a key")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ToolchainError(
            "the plugin library's list of kernels cannot be read",
            details={"got": f"{type(err).__name__}: {err}", "expected": f"variants.json beside `{path.name}`"},
            hint=_REINSTALL,
        ) from err
    return PluginLibrary(
        path=path, version=version, abi=abi, sha256=sha256_of_file(path), bytes=path.stat().st_size, images=images
    )


def _import_package() -> Any:
    try:
        return importlib.import_module(PACKAGE)
    except ModuleNotFoundError as err:
        if err.name != PACKAGE:
            raise _broken_package(err) from err
        raise ToolchainError(
            "the plugin library is not installed",
            details={"got": f"no Python package `{PACKAGE}`", "expected": f"llama-export-plugins {VERSIONS}x"},
            hint=_INSTALL,
        ) from err
    except Exception as err:
        raise _broken_package(err) from err


def _broken_package(err: Exception) -> ToolchainError:
    return ToolchainError(
        "the plugin library's Python package cannot be imported",
        details={"got": f"{type(err).__name__}: {err}", "expected": f"llama-export-plugins {VERSIONS}x"},
        hint=_REINSTALL,
    )


_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def _check_shared_object(path: Path) -> None:
    """A 64-bit ELF file for this machine, not cut short: the dynamic loader maps a cut file and dies of SIGBUS."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        problem, expected = "is not a shared object", "a 64-bit ELF file"
    else:
        machine = int.from_bytes(header[18:20], "little")
        sections = int.from_bytes(header[40:48], "little")
        end = sections + int.from_bytes(header[58:60], "little") * int.from_bytes(header[60:62], "little")
        if machine != _ELF_MACHINES.get(platform.machine(), machine):
            problem, expected = f"is for another machine: ELF machine {machine}", platform.machine()
        elif end > size:
            problem, expected = f"is cut short: {size} bytes", f"{end} bytes"
        else:
            return
    raise ToolchainError(
        "the plugin library cannot be loaded",
        details={"got": f"`{path}` {problem}", "expected": expected},
        hint=_REINSTALL,
    )


def _ask(path: Path) -> tuple[str, int]:
    """(version, ABI) by the library's own query functions. Loading it touches neither CUDA nor TensorRT."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as err:
        raise ToolchainError(
            "the plugin library cannot be loaded",
            details={"got": err, "expected": f"`{path}` and what it links to"},
            hint=_REINSTALL,
        ) from err
    try:
        version, abi = library.llama_export_plugins_version, library.llama_export_plugins_abi
    except AttributeError as err:
        raise ToolchainError(
            "the plugin library has another ABI",
            details={"got": err, "expected": f"ABI {ABI}"},
            hint=_REINSTALL,
        ) from err
    version.restype, version.argtypes = ctypes.c_char_p, ()
    abi.restype, abi.argtypes = ctypes.c_int32, ()
    return version().decode(), abi()


def take_library_error(library: PluginLibrary) -> str | None:
    """The latest sentence a plugin had to say; TensorRT-RTX's parser reports only that one failed."""
    try:
        take = ctypes.CDLL(str(library.path)).llama_export_plugins_take_error
    except (OSError, AttributeError):
        return None
    take.restype, take.argtypes = ctypes.c_int32, (ctypes.c_char_p, ctypes.c_int32)
    buffer = ctypes.create_string_buffer(4096)
    return buffer.value.decode("utf-8", "replace") if take(buffer, len(buffer)) > 0 else None


def kernels_installed(*, interpreted: bool = True) -> str | None:
    """Why the plugins' kernels cannot be run in this Python; None if they can.

    Args:
        interpreted: on the CPU, under Triton's interpreter. Else the library's compiled kernels, which need no Triton.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the Python package `{PACKAGE}` is not installed; pip install './plugins[interpreter]'"
    if not interpreted:
        return None
    if importlib.util.find_spec("triton") is None:
        return f"the Python package `triton` is not installed; pip install 'triton=={INTERPRETER}*'"
    found = importlib.metadata.version("triton")
    if not found.startswith(INTERPRETER):
        return f"the interpreter of triton {found} is not the one this was proven with; pip install 'triton=={INTERPRETER}*'"
    return None


# ---- what it serves ---------------------------------------------------------------------------------------------


def check_served(library: PluginLibrary, config: LlamaConfig, dtype: str, ops: Collection[str]) -> None:
    """The library has kernels for these ops at this dtype and head_dim.

    Raises:
        ToolchainError: it has not; the hint is the ``--ops`` that builds without them.
    """
    for op in sorted(ops):
        for kernel in _KERNELS[op]:
            images = [image for image in library.images if image["kernel"] == kernel]
            served = sorted({image["dtype"] for image in images})
            if dtype not in served:
                raise _not_served(op, f"dtype {dtype}", ", ".join(served) or "no kernel", library)
            if op in (_ATTENTION, _MASKED_ATTENTION):
                largest = max(int(image["width"]) for image in images if image["dtype"] == dtype)
                if config.head_dim > largest:
                    raise _not_served(op, f"head_dim {config.head_dim}", f"even sizes up to {largest}", library)


def _not_served(op: str, got: str, expected: str, library: PluginLibrary) -> ToolchainError:
    return ToolchainError(
        f"the plugin library does not serve {op} with {got}",
        details={"got": got, "expected": expected, "library": f"{library.version}, `{library.path}`"},
        hint=native_hint([op]),
    )


def native_hint(ops: Sequence[str]) -> str:
    """The flag that builds these ops from TensorRT's own layers."""
    return f"--ops {','.join(f'{op}=native' for op in sorted(ops))}"


def check_chip(library: PluginLibrary, compute_capability: str) -> None:
    """The library has every kernel for a GPU: an image of its own family, or portable PTX that is not newer.

    Args:
        library: from :func:`find_library`.
        compute_capability: of the GPU, e.g. ``8.9``.

    Raises:
        ToolchainError: a kernel has neither.
    """
    major, minor = map(int, compute_capability.split("."))
    device = 10 * major + minor
    for kernel in sorted({str(image["kernel"]) for image in library.images}):
        images = [image for image in library.images if image["kernel"] == kernel]
        if not any(_runs_on(_capability(image), bool(image["ptx"]), device) for image in images):
            raise ToolchainError(
                f"the plugin library has no kernels for this GPU: compute capability {compute_capability}",
                details={
                    "got": f"`{kernel}` for {', '.join(library.chips) or 'no chip'}",
                    "expected": f"{compute_capability}, or portable PTX that it can run",
                    "library": f"{library.version}, `{library.path}`",
                },
                hint="reinstall the plugins with this chip in their list (plugins/README.md), "
                "or build with --ops native",
            )


def _runs_on(image: int, is_ptx: bool, device: int) -> bool:
    """The rule of ``plugins/src/kernel_cache.cpp``: images from 9.0 on are for exactly their chip (``sm_90a``)."""
    if is_ptx:
        return image <= device
    return image == device if image >= 90 else image // 10 == device // 10 and image <= device


def _capability(image: Mapping[str, Any]) -> int:
    """``8.9`` and ``89`` are 89."""
    return int(str(image["compute_capability"]).replace(".", ""))


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _dtype(value: Any) -> str:
    return _DTYPE_NAMES[value] if isinstance(value, int) else _SHORT_DTYPES.get(str(value), str(value))


# ---- TensorRT's registry ----------------------------------------------------------------------------------------

_registered: dict[str, tuple[PluginLibrary, tuple[Creator, ...]]] = {}
"""Name of the TensorRT module -> what this process has loaded into its registry. It can never be taken out again."""


def register_library(trt: Any, library: PluginLibrary) -> tuple[Creator, ...]:
    """Loads the library into TensorRT's registry, once per process and TensorRT.

    Raises:
        ToolchainError: TensorRT refuses it, or another library was loaded before.
    """
    if (before := _registered.get(trt.__name__)) is not None:
        if before[0].sha256 != library.sha256:
            raise ToolchainError(
                "another plugin library is loaded in this process already",
                details={"got": before[0].path, "expected": library.path},
                hint="start a new process",
            )
        return before[1]
    registry = trt.get_plugin_registry()
    known = {id_of(creator) for creator in registry.all_creators}
    handle = registry.load_library(str(library.path))
    creators = tuple(
        Creator(
            name=creator.name,
            version=creator.plugin_version,
            namespace=creator.plugin_namespace,
            fields={field.name: field.type.name.lower() for field in creator.field_names},
        )
        for creator in registry.all_creators
        if id_of(creator) not in known
    )
    if handle is None or not creators:
        raise ToolchainError(
            "TensorRT does not load the plugin library",
            details={"got": f"no new plugin from `{library.path}`", "expected": ", ".join(CUSTOM_OPS)},
            hint=_REINSTALL,
        )
    _registered[trt.__name__] = (library, creators)
    return creators


def id_of(creator: Any) -> tuple[str, str, str]:
    """What TensorRT's registry tells creators apart by."""
    return creator.name, creator.plugin_version, creator.plugin_namespace


def check_creators(creators: Sequence[Creator], ops: Collection[str], library: PluginLibrary) -> None:
    """Every op has a creator where the parser looks for it.

    Raises:
        ToolchainError: one has not.
    """
    found = {(creator.name, creator.version, creator.namespace) for creator in creators}
    missing = [op for op in sorted(ops) if (op, PLUGIN_VERSION, NAMESPACE) not in found]
    if missing:
        raise ToolchainError(
            f"the plugin library does not serve {', '.join(missing)}",
            details={
                "got": ", ".join(f"{name} version {version}, namespace `{space}`" for name, version, space in found),
                "expected": f'version {PLUGIN_VERSION} in namespace ""',
                "library": f"{library.version}, `{library.path}`",
            },
            hint=native_hint(missing),
        )


def describe_library(library: PluginLibrary, creators: Sequence[Creator] | None) -> dict[str, Any]:
    """What ``llama-export plugins`` prints; ``creators`` is None where no TensorRT is installed to ask."""
    kernels = sorted({str(image["kernel"]) for image in library.images})
    return {
        "library": os.fspath(library.path),
        **library.identity,
        "bytes": library.bytes,
        "chips": list(library.chips),
        "portable_from": library.portable_from,
        "variants": len(library.images),
        "kernels": {kernel: sum(image["kernel"] == kernel for image in library.images) for kernel in kernels},
        "creators": None
        if creators is None
        else [
            {"name": item.name, "version": item.version, "namespace": item.namespace, "fields": dict(item.fields)}
            for item in creators
        ],
    }
