"""Runs the plugin library's own run-time path: the calls TensorRT makes, from createPlugin to enqueue, made from Python.

Without a GPU the library talks to a stand-in for the CUDA driver. It records every call, and a kernel launch runs on host
memory, with the grid, the scalars and the addresses that the C++ code passed. What runs depends on the image that the library
loaded for the pretended GPU: PTX is executed as it stands (:mod:`.ptx`); for a cubin, which nothing here can execute, the Triton
kernel it was made from runs under the interpreter. So host code and compiled code are judged in numbers: a swapped argument, a
grid rounded down, a forgotten copy or barrier shows. What this cannot show: machine code, and TensorRT. With a GPU
(``device="cuda"``) the real driver launches the real kernels, through the same calls.

Every tensor a plugin is given lies between red zones that are checked afterwards; outputs and workspace start as NaN.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llama_export_plugins import library_path
from llama_export_plugins.ptx import Buffer, GlobalMemory, Program, PtxError, launch

__all__ = [
    "PTX_ONLY",
    "CudaStandIn", "DriverCall", "Field", "GuardedBuffer", "Plugin", "PluginError", "PluginLibrary", "PreparedPlugin",
    "enqueue_ops", "run_plugin",
]  # fmt: skip

_TESTING = Path(__file__).resolve().parent / "testing"
_MAX_DIMS = 8
_RED_ZONE_BYTES = 1 << 16
"""Wide, so that a wild write of a faulty kernel launch is found here and not in the allocator."""
_RED = 0xA5
_UNWRITTEN = 0xFF
"""All bits set is NaN in float32, float16 and bfloat16."""

_DATA_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7, torch.int64: 8}
_DTYPES = {code: dtype for dtype, code in _DATA_TYPES.items()}
_FLOAT32_FIELD, _INT32_FIELD = 1, 5
_BUILD, _RUNTIME = 0, 1
_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_DEVICE_ATTRIBUTES_COMPUTE_CAPABILITY = (75, 76)
_DEFAULT_SHARED_BYTES = 48 * 1024
_CUDA_SUCCESS, _CUDA_ERROR_INVALID_VALUE, _CUDA_ERROR_NO_BINARY_FOR_GPU, _CUDA_ERROR_UNKNOWN = 0, 1, 209, 999


PTX_ONLY = (11, 0)
"""A compute capability that the library has no machine code for: it gives the driver PTX."""


class PluginError(RuntimeError):
    """A plugin refused, with the sentence it reported; or it did what TensorRT or CUDA would not have forgiven."""


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT's structures, as in include/tensorrt_plugin_abi.h


class _Dims(ctypes.Structure):
    _fields_ = [("nbDims", ctypes.c_int32), ("d", ctypes.c_int64 * _MAX_DIMS)]


class _TensorDesc(ctypes.Structure):
    _fields_ = [("dims", _Dims), ("type", ctypes.c_int32), ("format", ctypes.c_int32), ("scale", ctypes.c_float)]


class _DynamicTensorDesc(ctypes.Structure):
    _fields_ = [("desc", _TensorDesc), ("min", _Dims), ("max", _Dims), ("opt", _Dims)]


class _PluginField(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class _FieldCollection(ctypes.Structure):
    _fields_ = [("nbFields", ctypes.c_int32), ("fields", ctypes.POINTER(_PluginField))]


def _dims(shape: Sequence[int]) -> _Dims:
    return _Dims(len(shape), (ctypes.c_int64 * _MAX_DIMS)(*shape))


def _tensor_desc(shape: Sequence[int], dtype: torch.dtype) -> _TensorDesc:
    return _TensorDesc(_dims(shape), _DATA_TYPES[dtype], 0, 1.0)


def _dynamic_desc(shape: Sequence[int], dtype: torch.dtype, largest: Sequence[int] | None = None) -> _DynamicTensorDesc:
    """As under an optimization profile that allows this shape and those up to ``largest``: batch and tokens open, down to 1,
    and every other axis on which the two differ."""
    largest = shape if largest is None else largest
    is_open = [_is_open(axis, len(shape), dtype) or largest[axis] != size for axis, size in enumerate(shape)]
    symbolic = [-1 if is_open[axis] else size for axis, size in enumerate(shape)]
    smallest = [min(1, size) if is_open[axis] else size for axis, size in enumerate(shape)]
    return _DynamicTensorDesc(_tensor_desc(symbolic, dtype), _dims(smallest), _dims(largest), _dims(shape))


def _is_open(axis: int, rank: int, dtype: torch.dtype) -> bool:
    if not dtype.is_floating_point:
        return True  # past_length [B], attention_mask [B, S]
    if rank == 1:
        return False  # weight [E]
    return axis == 0 or (axis == 1 and rank == 3)


@dataclass(frozen=True, slots=True)
class Field:
    """A plugin field as it crosses the interface."""

    name: str
    type: int
    """PluginFieldType: 1 float32, 2 float64, 5 int32, 10 int64, ..."""
    data: bytes | None
    length: int = 1

    @classmethod
    def from_attribute(cls, name: str, value: int | float) -> Field:
        """As the ONNX parser passes attributes: INT as int32, FLOAT as float32."""
        if isinstance(value, int):
            return cls(name, _INT32_FIELD, struct.pack("<i", value))
        return cls(name, _FLOAT32_FIELD, struct.pack("<f", value))


def _field_collection(fields: Sequence[Field]) -> tuple[_FieldCollection, list[Any]]:
    """The C structure and what has to live as long as it."""
    buffers = [None if item.data is None else ctypes.create_string_buffer(item.data, len(item.data)) for item in fields]
    array = (_PluginField * len(fields))(
        *(
            _PluginField(item.name.encode(), None if data is None else ctypes.addressof(data), item.type, item.length)
            for item, data in zip(fields, buffers, strict=True)
        )
    )
    return _FieldCollection(len(fields), array), [array, buffers]


def _read_fields(collection: _FieldCollection) -> list[Field]:
    sizes = {0: 2, 1: 4, 2: 8, 3: 1, 4: 2, 5: 4, 6: 1, 7: 72, 8: 0, 9: 2, 10: 8}  # bytes per PluginFieldType
    fields = (collection.fields[index] for index in range(collection.nbFields))
    return [
        Field(
            item.name.decode(),
            item.type,
            ctypes.string_at(item.data, sizes[item.type] * item.length) if item.data else None,
            item.length,
        )
        for item in fields
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class GuardedBuffer:
    """``nbytes`` of memory on a device between two red zones."""

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> None:
        self.name = name
        self.shape, self.dtype = tuple(shape), dtype
        self.nbytes = dtype.itemsize * _product(shape)
        self._bytes = torch.full((self.nbytes + 2 * _RED_ZONE_BYTES,), _RED, dtype=torch.uint8, device=device)
        self._inside.fill_(_UNWRITTEN)

    @classmethod
    def holding(cls, name: str, tensor: Tensor, device: str) -> GuardedBuffer:
        """A dense copy of a tensor."""
        buffer = cls(name, tensor.shape, tensor.dtype, device)
        buffer.tensor.copy_(tensor)
        return buffer

    @property
    def address(self) -> int:
        """Where its first element is: a multiple of 64."""
        return self._bytes.data_ptr() + _RED_ZONE_BYTES

    @property
    def tensor(self) -> Tensor:
        """A view of it."""
        return self._inside.view(self.dtype).view(self.shape)

    @property
    def _inside(self) -> Tensor:
        return self._bytes[_RED_ZONE_BYTES : _RED_ZONE_BYTES + self.nbytes]

    def view_at(self, address: int, dtype: torch.dtype) -> Tensor:
        """What lies from an address inside it to its end, flat."""
        return self._inside[address - self.address :].view(dtype)

    def contains(self, address: int) -> bool:
        """Whether an address points into it; an empty buffer contains its own address."""
        return self.address <= address < self.address + max(self.nbytes, 1)

    def check_red_zones(self) -> None:
        """
        Raises:
            PluginError: a byte beside the buffer was written.
        """
        before, after = self._bytes[:_RED_ZONE_BYTES], self._bytes[_RED_ZONE_BYTES + self.nbytes :]
        for zone, place in ((before, "before"), (after, "after")):
            written = int((zone != _RED).sum())
            if written:
                raise PluginError(f"{written} bytes {place} `{self.name}` {list(self.shape)} were overwritten")


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in for the CUDA driver


@dataclass(frozen=True, slots=True)
class DriverCall:
    """One call of the CUDA driver."""

    function: str
    """e.g. ``cuLaunchKernel``"""
    during: str
    """The plugin function that was running: ``attachToContext``, ``onShapeChange``, ``enqueue``."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """``cuLaunchKernel``: kernel, image, grid, block, shared, stream, arguments; the others: what they were given."""


_Pointer = ctypes.c_void_p
_Out = ctypes.POINTER(ctypes.c_void_p)
_ANSWERS: dict[str, Any] = {  # the members of struct CudaDriver, in its order
    "cuCtxGetCurrent": ctypes.CFUNCTYPE(ctypes.c_int32, _Out),
    "cuCtxGetId": ctypes.CFUNCTYPE(ctypes.c_int32, _Pointer, ctypes.POINTER(ctypes.c_uint64)),
    "cuCtxGetDevice": ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)),
    "cuDeviceGetAttribute": ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_int32
    ),
    "cuModuleLoadData": ctypes.CFUNCTYPE(ctypes.c_int32, _Out, _Pointer),
    "cuModuleGetFunction": ctypes.CFUNCTYPE(ctypes.c_int32, _Out, _Pointer, ctypes.c_char_p),
    "cuFuncSetAttribute": ctypes.CFUNCTYPE(ctypes.c_int32, _Pointer, ctypes.c_int32, ctypes.c_int32),
    "cuLaunchKernel": ctypes.CFUNCTYPE(ctypes.c_int32, _Pointer, *[ctypes.c_uint32] * 7, _Pointer, _Out, _Pointer),
    "cuMemcpyDtoDAsync": ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, _Pointer),
    "cuMemsetD8Async": ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint8, ctypes.c_size_t, _Pointer),
    "cuGetErrorName": ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, _Out),
}


class _Answers(ctypes.Structure):
    _fields_ = [(name, kind) for name, kind in _ANSWERS.items()]


class CudaStandIn:
    """Answers the driver calls of one library: a GPU of a given compute capability whose memory is the host's.

    Args:
        variants: the library's ``variants.json``.
        compute_capability: of the pretended GPU.
    """

    def __init__(self, variants: Mapping[str, Any], compute_capability: tuple[int, int]) -> None:
        self.calls: list[DriverCall] = []
        self.buffers: list[GuardedBuffer] = []
        """The memory that launches and copies may touch."""
        self.during = "nothing"
        self.context = 0x1000
        """The current CUDA context; 0 for none."""
        self.failure: PluginError | Exception | None = None
        """What a callback found wrong, to be raised when the plugin has returned."""
        self.fail_with: dict[str, int] = {}
        """Driver function -> the CUDA error it answers with: for tests."""
        self._compute_capability = compute_capability
        self._signatures: Mapping[str, Sequence[Sequence[str]]] = variants["signatures"]
        self._images = {image["sha256"]: image for image in variants["images"]}
        self._modules: dict[int, Mapping[str, Any]] = {}
        self._programs: dict[str, Program] = {}
        """Of the PTX images, by hash."""
        self._functions: dict[int, Mapping[str, Any]] = {}
        self._shared_limits: dict[int, int] = {}
        self._names: list[Any] = []
        self.answers = _Answers(*(kind(self._guard(name)) for name, kind in _ANSWERS.items()))

    def launches(self) -> list[DriverCall]:
        """The kernel launches so far."""
        return [call for call in self.calls if call.function == "cuLaunchKernel"]

    def _guard(self, name: str) -> Callable[..., int]:
        """An exception must not cross the C++ frames: it is kept, and the plugin sees a CUDA error."""
        answer: Callable[..., int] = getattr(self, f"_{name}")

        def guarded(*arguments: Any) -> int:
            if name in self.fail_with:
                self._record(name)
                return self.fail_with[name]
            try:
                return answer(*arguments)
            except Exception as err:  # noqa: BLE001 - see above
                self.failure = err
                return _CUDA_ERROR_UNKNOWN

        return guarded

    def _record(self, function: str, **details: Any) -> None:
        self.calls.append(DriverCall(function, self.during, details))

    def _cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802 - named as CUDA names it, here and below
        context[0] = self.context
        return _CUDA_SUCCESS

    def _cuCtxGetId(self, context: int, identifier: Any) -> int:  # noqa: N802
        identifier[0] = context
        return _CUDA_SUCCESS

    def _cuCtxGetDevice(self, device: Any) -> int:  # noqa: N802
        device[0] = 0
        return _CUDA_SUCCESS

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        value[0] = self._compute_capability[_DEVICE_ATTRIBUTES_COMPUTE_CAPABILITY.index(attribute)]
        return _CUDA_SUCCESS

    def _cuModuleLoadData(self, module: Any, image: int) -> int:  # noqa: N802
        content = _image_bytes(image)
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._images:
            raise PluginError("cuModuleLoadData was given an image that variants.json does not list")
        found = self._images[digest]
        if found["ptx"]:
            self._programs[digest] = Program.parse(content.rstrip(b"\0").decode())
        self._record("cuModuleLoadData", image=found)
        if not self._runs_here(found):
            return _CUDA_ERROR_NO_BINARY_FOR_GPU
        self._modules[image] = found
        module[0] = image
        return _CUDA_SUCCESS

    def _runs_here(self, image: Mapping[str, Any]) -> bool:
        """CUDA's rule: PTX runs on its chip and later ones; a cubin on its own major version, and from 9.0 up (targets
        with an `a`) on its own chip only."""
        major, minor = self._compute_capability
        chip, device = int(image["compute_capability"]), 10 * major + minor
        if image["ptx"]:
            return chip <= device
        return chip == device if chip >= 90 else chip // 10 == major and chip <= device

    def _cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> int:  # noqa: N802
        image = self._modules[module]
        self._record("cuModuleGetFunction", entry=name.decode())
        if name.decode() != image["entry"]:
            raise PluginError(f"the image has no kernel `{name.decode()}`, its entry is `{image['entry']}`")
        self._functions[module + 1] = image  # any number that is not the module's
        function[0] = module + 1
        return _CUDA_SUCCESS

    def _cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> int:  # noqa: N802
        self._record("cuFuncSetAttribute", kernel=self._functions[function]["kernel"], attribute=attribute, value=value)
        if attribute != _FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            return _CUDA_ERROR_INVALID_VALUE
        self._shared_limits[function] = value
        return _CUDA_SUCCESS

    def _cuLaunchKernel(self, function: int, *geometry_and_rest: Any) -> int:  # noqa: N802
        grid, block = tuple(geometry_and_rest[0:3]), tuple(geometry_and_rest[3:6])
        shared, stream, parameters = geometry_and_rest[6:9]
        image = self._functions[function]
        arguments, described = self._read_arguments(image["kernel"], image["dtype"], parameters)
        self._record(
            "cuLaunchKernel",
            kernel=image["kernel"],
            image=image,
            grid=grid,
            block=block,
            shared=shared,
            stream=stream,
            arguments=described,
        )
        if block != (32 * image["warps"], 1, 1):
            raise PluginError(
                f"`{image['kernel']}` was compiled for {image['warps']} warps, launched with block {block}"
            )
        if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < grid[2] < 2**16):
            raise PluginError(f"`{image['kernel']}`: CUDA refuses grid {grid}")
        if shared != image["shared"] or shared > self._shared_limits.get(function, _DEFAULT_SHARED_BYTES):
            raise PluginError(
                f"`{image['kernel']}` needs {image['shared']} bytes of shared memory, launched with {shared} "
                f"where {self._shared_limits.get(function, _DEFAULT_SHARED_BYTES)} are allowed"
            )
        if image["ptx"]:
            self._run_ptx(image, grid, shared, parameters)
        else:
            from llama_export_plugins.kernels.loop import run_interpreted

            run_interpreted(image["kernel"], grid, arguments, image["constexprs"])
        return _CUDA_SUCCESS

    def _run_ptx(self, image: Mapping[str, Any], grid: tuple[int, int, int], shared: int, parameters: Any) -> None:
        """The kernel reads its parameters as the driver would lay them out: by the types it declares."""
        program = self._programs[image["sha256"]]
        values = [
            _PTX_PARAMETERS[kind].from_address(parameters[index]).value
            for index, kind in enumerate(program.parameters.values())
        ]
        memory = GlobalMemory([Buffer(buffer.name, buffer.address, buffer.nbytes) for buffer in self.buffers])
        try:
            launch(program, grid, values, memory, shared)
        except PtxError as err:
            raise PluginError(f"the compiled kernel is refused: {err}") from err

    def _read_arguments(
        self, kernel: str, model_dtype: str, parameters: Any
    ) -> tuple[list[Any], dict[str, int | float | str]]:
        """Parameters as the kernel's source names them, a pointer as the memory it points to; and by name, a pointer as the
        name of the buffer it points into."""
        arguments: list[Any] = []
        described: dict[str, int | float | str] = {}
        signature = self._signatures[kernel]
        for index, (name, kind) in enumerate(signature):
            if kind.endswith("*"):
                address = ctypes.c_uint64.from_address(parameters[index]).value
                buffer = self._buffer_at(f"argument `{name}` of `{kernel}`", address)
                dtype = _ARGUMENT_DTYPES[model_dtype if kind == "T*" else kind[:-1]]
                if buffer.dtype not in (dtype, torch.uint8):
                    raise PluginError(
                        f"argument `{name}` of `{kernel}` is {kind}, but `{buffer.name}` is {buffer.dtype}"
                    )
                arguments.append(buffer.view_at(address, dtype))
                described[name] = buffer.name
            else:
                value = _SCALARS[kind].from_address(parameters[index]).value
                arguments.append(value)
                described[name] = value
        for index in (len(signature), len(signature) + 1):
            if ctypes.c_uint64.from_address(parameters[index]).value != 0:
                raise PluginError(f"`{kernel}` has no scratch memory, but a pointer to some was passed")
        return arguments, described

    def _buffer_at(self, what: str, address: int) -> GuardedBuffer:
        for buffer in self.buffers:
            if buffer.contains(address):
                return buffer
        raise PluginError(f"{what} points to memory that is no tensor of this plugin: 0x{address:x}")

    def _cuMemcpyDtoDAsync(self, destination: int, source: int, count: int, stream: int | None) -> int:  # noqa: N802
        self._record("cuMemcpyDtoDAsync", bytes=count, stream=stream)
        for what, address in (("destination", destination), ("source", source)):
            self._check_room(f"the {what} of a copy", address, count)
        ctypes.memmove(destination, source, count)
        return _CUDA_SUCCESS

    def _cuMemsetD8Async(self, destination: int, value: int, count: int, stream: int | None) -> int:  # noqa: N802
        self._record("cuMemsetD8Async", bytes=count, value=value, stream=stream)
        self._check_room("the destination of a memset", destination, count)
        ctypes.memset(destination, value, count)
        return _CUDA_SUCCESS

    def _check_room(self, what: str, address: int, count: int) -> None:
        buffer = self._buffer_at(what, address)
        room = buffer.address + buffer.nbytes - address
        if count > room:
            raise PluginError(f"{count} bytes leave {what}, which has {room}")

    def _cuGetErrorName(self, error: int, name: Any) -> int:  # noqa: N802
        text = ctypes.create_string_buffer(f"CUDA_ERROR_{error}".encode())
        self._names.append(text)
        name[0] = ctypes.addressof(text)
        return _CUDA_SUCCESS


_ARGUMENT_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64,
}  # fmt: skip
_SCALARS: dict[str, Any] = {"int32": ctypes.c_int32, "float32": ctypes.c_float}
_PTX_PARAMETERS: dict[str, Any] = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "f32": ctypes.c_float}


def _image_bytes(address: int) -> bytes:
    """A cubin (an ELF file, whose headers tell its length) or PTX (text that ends with NUL)."""
    if ctypes.string_at(address, 4) != b"\x7fELF":
        return ctypes.string_at(address) + b"\0"
    header = ctypes.string_at(address, 64)
    segments_at, sections_at = struct.unpack_from("<QQ", header, 32)
    segment_size, num_segments, section_size, num_sections = struct.unpack_from("<HHHH", header, 54)
    end = max(segments_at + segment_size * num_segments, sections_at + section_size * num_sections)
    no_bits = 8  # a section that takes no room in the file
    for index in range(num_sections):
        kind, _, _, offset, size = struct.unpack(
            "<IQQQQ", ctypes.string_at(address + sections_at + index * section_size + 4, 36)
        )
        end = max(end, offset + (0 if kind == no_bits else size))
    return ctypes.string_at(address, end)


# ---------------------------------------------------------------------------------------------------------------------
# The library and its plugins


_Severity = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p)


@dataclass(frozen=True, slots=True)
class Creator:
    """What a plugin creator says of itself."""

    name: str
    version: str
    namespace: str
    fields: tuple[tuple[str, int], ...]
    """(name, PluginFieldType) of each attribute."""
    handle: int


class PluginLibrary:
    """One plugin library in this process, with a driver of its own: a private copy, so that the library TensorRT loads
    never sees the stand-in.

    Args:
        path: the shared library; default: the installed one. `variants.json` lies beside it.
        compute_capability: of the GPU that the stand-in pretends to be; None: the real driver.
    """

    def __init__(self, path: Path | None = None, *, compute_capability: tuple[int, int] | None = (8, 9)) -> None:
        path = path or library_path()
        self.variants: dict[str, Any] = json.loads((path.parent / "variants.json").read_text(encoding="utf-8"))
        self.messages: list[str] = []
        """What the plugins reported to TensorRT's logger."""
        self.stand_in: CudaStandIn | None = None
        self._driver_path: str | None = None
        # Loaded libraries need their files no more: the loader finds the stand-in again by the path it was loaded from.
        with tempfile.TemporaryDirectory(prefix="llama-export-plugins-") as folder:
            self.library = ctypes.CDLL(shutil.copy(path, folder))
            self.driver = _load_driver(shutil.copy(_TESTING / "libplugin_driver.so", folder))
            if compute_capability is not None:
                self.stand_in = CudaStandIn(self.variants, compute_capability)
                self._driver_path = shutil.copy(_TESTING / "libcuda_stand_in.so", folder)
                ctypes.CDLL(self._driver_path).stand_in_set_answers(ctypes.byref(self.stand_in.answers))
        self._log = _Severity(lambda severity, message: self.messages.append(message.decode()))
        self.library.setLoggerFinder(ctypes.c_void_p(self.driver.driver_logger_finder(self._log)))
        self.library.getCreators.restype = ctypes.POINTER(ctypes.c_void_p)
        self.library.llama_export_plugins_version.restype = ctypes.c_char_p
        self.creators = {creator.name: creator for creator in self._read_creators()}

    @property
    def version(self) -> str:
        """As the library says it."""
        return str(self.library.llama_export_plugins_version().decode())

    @property
    def abi(self) -> int:
        """As the library says it."""
        return int(self.library.llama_export_plugins_abi())

    def _read_creators(self) -> Iterator[Creator]:
        count = ctypes.c_int32()
        handles = self.library.getCreators(ctypes.byref(count))
        for handle in handles[: count.value]:
            if self.driver.creator_kind(handle) != b"PLUGIN CREATOR_V3ONE":
                raise PluginError(f"a creator of an unknown kind: {self.driver.creator_kind(handle)}")
            fields = _read_fields(self.driver.creator_fields(handle).contents)
            yield Creator(
                self.driver.creator_name(handle).decode(),
                self.driver.creator_version(handle).decode(),
                self.driver.creator_namespace(handle).decode(),
                tuple((item.name, item.type) for item in fields),
                handle,
            )

    def create(self, op: str, fields: Sequence[Field], phase: Literal["build", "runtime"] = "build") -> Plugin:
        """createPlugin.

        Raises:
            PluginError: it gave none.
        """
        collection, keep = _field_collection(fields)
        with self.calling("createPlugin"):
            handle = self.driver.creator_create(
                self.creators[op].handle, ctypes.byref(collection), _BUILD if phase == "build" else _RUNTIME
            )
        del keep
        if not handle:
            raise PluginError(f"{op}: createPlugin gave nothing; {self.latest_message()}")
        return Plugin(self, handle)

    def latest_message(self) -> str:
        """The last sentence a plugin reported."""
        return self.messages[-1] if self.messages else "it reported no reason"

    @contextmanager
    def calling(self, function: str) -> Iterator[None]:
        """While a plugin function runs: tells the stand-in, lets the library find it, and raises what it found wrong."""
        previous = os.environ.get("LLAMA_EXPORT_LIBCUDA")
        if self.stand_in is not None:
            self.stand_in.during = function
            os.environ["LLAMA_EXPORT_LIBCUDA"] = str(self._driver_path)
        try:
            yield
        finally:
            if previous is None:
                os.environ.pop("LLAMA_EXPORT_LIBCUDA", None)
            else:
                os.environ["LLAMA_EXPORT_LIBCUDA"] = previous
        if self.stand_in is not None:
            failure, self.stand_in.failure = self.stand_in.failure, None
            if failure is not None:
                raise failure


class Plugin:
    """One plugin object; its methods are TensorRT's calls. ``destroy`` it when done."""

    def __init__(self, library: PluginLibrary, handle: int) -> None:
        self._library, self._driver, self._handle = library, library.driver, handle

    def destroy(self) -> None:
        """Deletes it, as TensorRT does."""
        self._driver.plugin_destroy(self._handle)
        self._handle = 0

    def clone(self) -> Plugin:
        """An independent copy."""
        return Plugin(self._library, self._driver.plugin_clone(self._handle))

    def name(self) -> str:
        """The op."""
        return str(self._driver.plugin_name(self._handle).decode())

    def num_outputs(self) -> int:
        """How many outputs it has."""
        return int(self._driver.plugin_num_outputs(self._handle))

    def output_types(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """getOutputDataTypes."""
        count = self.num_outputs()
        given, types = (
            (ctypes.c_int32 * len(inputs))(*(_DATA_TYPES[item] for item in inputs)),
            (ctypes.c_int32 * count)(),
        )
        self._expect_success(
            "getOutputDataTypes", self._driver.plugin_output_types(self._handle, given, len(inputs), types, count)
        )
        return [_DTYPES[code] for code in types]

    def output_shapes(self, inputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[tuple[int, ...]]:
        """getOutputShapes, given (shape, dtype) of each input; batch and tokens are symbolic to the plugin."""
        count = self.num_outputs()
        shapes = (_Dims * count)()
        descs = (_DynamicTensorDesc * len(inputs))(*(_dynamic_desc(shape, dtype) for shape, dtype in inputs))
        with self._library.calling("getOutputShapes"):
            status = self._driver.plugin_output_shapes(self._handle, descs, len(inputs), shapes, count)
        self._expect_success("getOutputShapes", status)
        return [tuple(dims.d[: dims.nbDims]) for dims in shapes]

    def aliased_input(self, output: int) -> int:
        """The input whose memory an output shares; -1 for none."""
        if self._driver.plugin_build_interface_version(self._handle) < 2:
            return -1
        return int(self._driver.plugin_aliased_input(self._handle, output))

    def supports(self, position: int, tensors: Sequence[tuple[Sequence[int], torch.dtype]], num_inputs: int) -> bool:
        """supportsFormatCombination, given (shape, dtype) of inputs and outputs."""
        descs = (_DynamicTensorDesc * len(tensors))(*(_dynamic_desc(shape, dtype) for shape, dtype in tensors))
        return bool(self._driver.plugin_supports(self._handle, position, descs, num_inputs, len(tensors) - num_inputs))

    def configure(
        self,
        tensors: Sequence[tuple[Sequence[int], torch.dtype]],
        num_inputs: int,
        largest: Sequence[Sequence[int]] | None = None,
    ) -> int:
        """configurePlugin and getWorkspaceSize, for a profile whose largest shapes are ``largest``; default: these.

        Returns:
            bytes of workspace that TensorRT would lend to every call of the profile.
        """
        most = [shape for shape, _ in tensors] if largest is None else largest
        pairs = zip(tensors, most, strict=True)
        descs = (_DynamicTensorDesc * len(tensors))(
            *(_dynamic_desc(shape, dtype, limit) for (shape, dtype), limit in pairs)
        )
        num_outputs = len(tensors) - num_inputs
        with self._library.calling("configurePlugin"):
            status = self._driver.plugin_configure(self._handle, descs, num_inputs, num_outputs)
        self._expect_success("configurePlugin", status)
        return int(self._driver.plugin_workspace_bytes(self._handle, descs, num_inputs, num_outputs))

    def serialize(self) -> list[Field]:
        """getFieldsToSerialize: what an engine stores of it."""
        return _read_fields(self._driver.plugin_serialize(self._handle).contents)

    def attach(self) -> Plugin:
        """attachToContext: the copy that an execution context runs."""
        with self._library.calling("attachToContext"):
            handle = self._driver.plugin_attach(self._handle)
        if not handle:
            raise PluginError(f"{self.name()}: attachToContext gave nothing; {self._library.latest_message()}")
        return Plugin(self._library, handle)

    def shape_change(self, tensors: Sequence[tuple[Sequence[int], torch.dtype]], num_inputs: int) -> None:
        """onShapeChange."""
        descs = (_TensorDesc * len(tensors))(*(_tensor_desc(shape, dtype) for shape, dtype in tensors))
        with self._library.calling("onShapeChange"):
            status = self._driver.plugin_shape_change(self._handle, descs, num_inputs, len(tensors) - num_inputs)
        self._expect_success("onShapeChange", status)

    def enqueue(
        self,
        tensors: Sequence[tuple[Sequence[int], torch.dtype]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int = 0,
    ) -> None:
        """enqueue, given (shape, dtype) of inputs and outputs, their addresses, and a CUDA stream."""
        descs = (_TensorDesc * len(tensors))(*(_tensor_desc(shape, dtype) for shape, dtype in tensors))
        with self._library.calling("enqueue"):
            status = self._driver.plugin_enqueue(
                self._handle,
                descs,
                len(inputs),
                (ctypes.c_void_p * len(inputs))(*inputs),
                (ctypes.c_void_p * len(outputs))(*outputs),
                workspace,
                stream,
            )
        self._expect_success("enqueue", status)

    def _expect_success(self, function: str, status: int) -> None:
        if status != 0:
            raise PluginError(f"{self.name()}: {function} returned {status}; {self._library.latest_message()}")


def _load_driver(path: str) -> Any:
    """The C functions of testing/plugin_driver.cpp, with their types."""
    driver = ctypes.CDLL(path)
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    collection = ctypes.POINTER(_FieldCollection)
    for name, result, *arguments in (
        ("driver_logger_finder", pointer, _Severity),
        ("creator_name", ctypes.c_char_p, pointer),
        ("creator_version", ctypes.c_char_p, pointer),
        ("creator_namespace", ctypes.c_char_p, pointer),
        ("creator_kind", ctypes.c_char_p, pointer),
        ("creator_fields", collection, pointer),
        ("creator_create", pointer, pointer, pointer, number),
        ("plugin_destroy", None, pointer),
        ("plugin_clone", pointer, pointer),
        ("plugin_name", ctypes.c_char_p, pointer),
        ("plugin_build_interface_version", number, pointer),
        ("plugin_num_outputs", number, pointer),
        ("plugin_output_types", number, pointer, pointer, number, pointer, number),
        ("plugin_output_shapes", number, pointer, pointer, number, pointer, number),
        ("plugin_aliased_input", number, pointer, number),
        ("plugin_supports", ctypes.c_bool, pointer, number, pointer, number, number),
        ("plugin_configure", number, pointer, pointer, number, number),
        ("plugin_workspace_bytes", ctypes.c_size_t, pointer, pointer, number, number),
        ("plugin_serialize", collection, pointer),
        ("plugin_attach", pointer, pointer),
        ("plugin_shape_change", number, pointer, pointer, number, number),
        ("plugin_enqueue", number, pointer, pointer, number, pointer, pointer, pointer, pointer),
    ):
        function = getattr(driver, name)
        function.restype, function.argtypes = result, arguments
    return driver


# ---------------------------------------------------------------------------------------------------------------------
# One node, as an engine would run it


class PreparedPlugin:
    """One node, ready to run: its plugin built from attributes, stored and restored as an engine does, attached, told its
    shapes, and given memory. ``enqueue`` then allocates nothing, so that it can be timed and captured into a CUDA graph.
    :meth:`change` runs other shapes on the same plugin, with the same workspace.

    Args:
        library: on the real driver if ``device`` is a GPU, else on the stand-in.
        op: plugin name.
        inputs: in the order of the op table, in memory of ``device``; an aliased one is written.
        attributes: values in the order of the plugin's fields; int or float as in the ONNX node.
        aliased: whether outputs that may share an input's memory do; else they have their own.
        device: where the tensors that the plugin sees are.
        max_shapes: the largest shapes of the inputs that the plugin is configured for, and that its workspace is for;
            default: those of ``inputs``.

    Raises:
        PluginError: the plugin refused.
    """

    def __init__(
        self,
        library: PluginLibrary,
        op: str,
        inputs: Sequence[GuardedBuffer],
        attributes: Sequence[int | float],
        *,
        aliased: bool = True,
        device: str = "cpu",
        max_shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if device != "cpu":
            # A context must be current before TensorRT's calls; PyTorch makes its own on first use.
            torch.cuda.synchronize(device)
        self._library, self._is_aliased, self._device = library, aliased, device
        names = [name for name, _ in library.creators[op].fields]
        fields = [Field.from_attribute(name, value) for name, value in zip(names, attributes, strict=True)]
        given = [(buffer.shape, buffer.dtype) for buffer in inputs]

        # Build: what the parser and the builder ask.
        built = library.create(op, fields, "build")
        output_types = built.output_types([dtype for _, dtype in given])
        self._tensors = [*given, *zip(built.output_shapes(given), output_types, strict=True)]
        limits: list[Sequence[int]] | None = None
        if max_shapes is not None:
            largest = [(shape, dtype) for shape, (_, dtype) in zip(max_shapes, given, strict=True)]
            limits = [*max_shapes, *built.output_shapes(largest)]
        self._aliases = [built.aliased_input(index) for index in range(built.num_outputs())]
        for position in range(len(self._tensors)):
            if not built.supports(position, self._tensors, len(given)):
                shape, dtype = self._tensors[position]
                raise PluginError(f"{op} does not take {dtype} {list(shape)} as tensor {position}")
        configured = built.clone()
        built.destroy()
        workspace_bytes = configured.configure(self._tensors, len(given), limits)
        stored = configured.serialize()

        # Run time: the engine recreates the plugin from what it stored, and a context runs a copy of it.
        self._restored = library.create(op, stored, "runtime")
        configured.destroy()
        self._attached = self._restored.attach()
        self.workspace = GuardedBuffer("workspace", [workspace_bytes], torch.uint8, device)
        self.inputs: tuple[GuardedBuffer, ...] = ()
        self.outputs: tuple[GuardedBuffer, ...] = ()
        self.change(inputs)

    def change(self, inputs: Sequence[GuardedBuffer], *, on_clone: bool = False) -> None:
        """Other inputs, of other shapes perhaps, for the following calls: what TensorRT says between two calls of one
        execution context. The workspace stays as it is, with what the calls before left in it.

        Args:
            inputs: as for the class.
            on_clone: whether a clone takes the place of the plugin first.

        Raises:
            PluginError: the plugin refused.
        """
        if on_clone:
            replaced, self._attached = self._attached, self._attached.clone()
            replaced.destroy()
        given = [(buffer.shape, buffer.dtype) for buffer in inputs]
        output_types = self._restored.output_types([dtype for _, dtype in given])
        outputs = list(zip(self._restored.output_shapes(given), output_types, strict=True))
        self._tensors = [*given, *outputs]
        self._attached.shape_change(self._tensors, len(given))
        self.inputs = tuple(inputs)
        self.outputs = tuple(
            inputs[alias]
            if self._is_aliased and alias >= 0
            else GuardedBuffer(f"output {index}", shape, dtype, self._device)
            for index, (alias, (shape, dtype)) in enumerate(zip(self._aliases, outputs, strict=True))
        )
        self._input_addresses = [buffer.address for buffer in self.inputs]
        self._output_addresses = [buffer.address for buffer in self.outputs]

    @property
    def buffers(self) -> tuple[GuardedBuffer, ...]:
        """All the memory that it may touch."""
        return (*self.inputs, *self.outputs, self.workspace)

    def enqueue(self, stream: int = 0) -> None:
        """Puts the node on a CUDA stream, given by its handle (``torch.cuda.Stream.cuda_stream``); does not wait.

        Raises:
            PluginError: the plugin refused, or broke a rule of TensorRT or CUDA.
        """
        if self._library.stand_in is not None:
            self._library.stand_in.buffers = list(self.buffers)
        self._attached.enqueue(
            self._tensors, self._input_addresses, self._output_addresses, self.workspace.address, stream
        )

    def check_red_zones(self) -> None:
        """
        Raises:
            PluginError: a byte beside a tensor was written.
        """
        for buffer in self.buffers:
            buffer.check_red_zones()

    def destroy(self) -> None:
        """Deletes the plugin; what was enqueued must have finished."""
        self._attached.destroy()
        self._restored.destroy()


def run_plugin(
    library: PluginLibrary,
    op: str,
    inputs: Sequence[Tensor],
    attributes: Sequence[int | float],
    *,
    aliased: bool = True,
    device: str = "cpu",
    max_shapes: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, ...]:
    """Runs one node once, as an engine would.

    Args:
        library: on the real driver if ``device`` is a GPU, else on the stand-in.
        op: plugin name.
        inputs: in the order of the op table; not modified.
        attributes: values in the order of the plugin's fields; int or float as in the ONNX node.
        aliased: whether outputs that may share an input's memory do; else they have their own.
        device: where the tensors that the plugin sees are.
        max_shapes: the largest shapes of the inputs that the plugin is configured for; default: those of ``inputs``.

    Returns:
        its outputs, on the device of the inputs.

    Raises:
        PluginError: the plugin refused, or broke a rule of TensorRT or CUDA.
    """
    memory = [GuardedBuffer.holding(f"input {index}", tensor, device) for index, tensor in enumerate(inputs)]
    prepared = PreparedPlugin(library, op, memory, attributes, aliased=aliased, device=device, max_shapes=max_shapes)
    prepared.enqueue(torch.cuda.current_stream().cuda_stream if device != "cpu" else 0)
    if device != "cpu":
        torch.cuda.synchronize()
    prepared.destroy()
    prepared.check_red_zones()
    for index, tensor in enumerate(inputs):
        if memory[index] not in prepared.outputs and not _same_bytes(memory[index].tensor, tensor):
            raise PluginError(f"{op} wrote to its input {index}")
    return tuple(buffer.tensor.to(inputs[0].device) for buffer in prepared.outputs)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8).cpu(), b.contiguous().view(torch.uint8).cpu())


def enqueue_ops(
    *,
    aliased: bool = True,
    compute_capability: tuple[int, int] = (8, 9),
    device: str = "cpu",
    library: PluginLibrary | None = None,
) -> dict[str, Callable[..., Any]]:
    """The fused ops, each computed by the plugin library's own ``enqueue``.

    Fits ``GraphEvaluator(..., custom_ops=enqueue_ops())``: op -> function of the node's input tensors, then its attribute
    values, in the order of the op table; one tensor, or a tuple.

    Args:
        aliased: whether present tensors share the memory of past ones inside the call (the caller's are never modified).
        compute_capability: of the pretended GPU; picks the kernels' variants.
        device: ``cpu`` for the stand-in, else the GPU to run on.
        library: the library to use; default: the installed one.
    """
    if library is None:
        library = PluginLibrary(compute_capability=compute_capability if device == "cpu" else None)

    def computed_by(op: str) -> Callable[..., Any]:
        num_attributes = len(library.creators[op].fields)

        def compute(*arguments: Any) -> Any:
            tensors, attributes = arguments[:-num_attributes], arguments[-num_attributes:]
            outputs = run_plugin(library, op, tensors, attributes, aliased=aliased, device=device)
            return outputs[0] if len(outputs) == 1 else outputs

        return compute

    return {op: computed_by(op) for op in library.creators}
