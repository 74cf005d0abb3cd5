"""Launch kernels from the ahead-of-time library instead of compiling them: no compiler, cache or home directory is needed.

use("build/all/libnanochat_kernels.so") makes every launch of this process take its code from there. A launch that the library
has no code for is compiled by Triton as without it, with a warning that says which one. The C interface is native/nanochat_kernels.h.
"""

import ctypes
import hashlib
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels.architecture import architecture, take_code_of_library, triton

OK, BAD_ARGUMENT, UNKNOWN_KERNEL, NO_CONTEXT, NO_CODE = 0, 1, 2, 5, 6  # nk_status
NONE, POINTER, INTEGER, NUMBER, MATRIX = range(5)  # nk_kind
VERSION = 1  # NK_VERSION
DTYPES = {
    torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.float64: 4, torch.bool: 5, torch.uint8: 6, torch.int8: 7,
    torch.int16: 8, torch.int32: 9, torch.int64: 10,
}  # fmt: skip


class LibraryError(RuntimeError):
    """The library cannot be loaded, or the driver cannot launch its code; the message says why."""


class Entry(ctypes.Structure):
    """nk_entry"""

    _fields_ = (
        *[(name, ctypes.c_char_p) for name in ("kernel", "dtype", "shape", "flags")],
        ("launch", ctypes.c_int),
        ("architecture", ctypes.c_int),
        ("found", ctypes.c_void_p),
    )


class Matrix(ctypes.Structure):
    """nk_matrix"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 5),
        ("strides", ctypes.c_int64 * 5),
    )


def identity(kernel, constants: dict[str, Any], fixed: tuple = ()) -> str:
    """Return the name by which the library knows a Triton kernel with its constants and options: a hash of all sources and values.

    fixed: the values of the arguments that are tl.constexpr. Triton's own key depends on what was hashed before in the process.
    """
    functions = functions_of(kernel, constants)
    given = [(name, name_of(value) if is_function(value) else value) for name, value in sorted(constants.items())]
    sources = [(name, function.src, fixed_globals(function)) for name, function in sorted(functions.items())]
    text = f"{triton.__version__} {name_of(kernel)} {given} {fixed} {sources}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def functions_of(kernel, constants: dict[str, Any]) -> dict[str, Any]:
    """Return a Triton kernel, the functions among its constants and all that they call, outside of Triton, by name; callers come after
    those that they call."""
    found: dict[str, Any] = {}

    def add(function) -> None:
        name = name_of(function)
        if name not in found and not name.startswith("triton."):
            found[name] = None
            for _, value in globals_of(function):
                if is_function(value):
                    add(value)
            del found[name]
            found[name] = function

    for value in (*constants.values(), kernel):
        if is_function(value):
            add(value)
    return found


def is_function(x) -> bool:
    return hasattr(type(x), "cache_key")  # of the type: to read a key makes it


def name_of(function) -> str:
    return f"{function.fn.__module__}.{function.fn.__qualname__}"


def globals_of(function) -> Iterator[tuple[str, Any]]:
    """Yield the globals that a Triton function uses, and those of modules, by name."""
    scope, names = function.fn.__globals__, sorted(set(names_in(function.fn.__code__)))
    known = [name for name in names if name in scope]
    yield from ((name, scope[name]) for name in known)
    for module in known:
        if isinstance(scope[module], ModuleType):
            yield from ((f"{module}.{n}", getattr(scope[module], n)) for n in names if hasattr(scope[module], n))


def fixed_globals(function) -> list[tuple[str, str]]:
    """Return the globals that are tl.constexpr, which are compiled in."""
    return [(n, repr(x)) for n, x in globals_of(function) if isinstance(x, triton.language.constexpr)]


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the global names and attributes in a function's code and in that of the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


class Library:
    """libnanochat_kernels, loaded with ctypes."""

    def __init__(self, path: Path):
        try:
            self.dll = ctypes.CDLL(str(path))
            self.dll.nk_version.restype = ctypes.c_int
            found = self.dll.nk_version()
        except (OSError, AttributeError) as error:
            raise LibraryError(
                f"{path} is not the library of the kernels ({error}); build it with CMake, see the README"
            ) from error
        if found != VERSION:
            raise LibraryError(
                f"{path} has version {found} of the C interface, wanted {VERSION}; build it again from this source"
            )
        self.path = path
        self.find, self.launch, self.last_error = self.dll.nk_find_id, self.dll.nk_launch, self.dll.nk_last_error
        self.find.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
        self.launch.argtypes = (
            ctypes.c_void_p,
            *[ctypes.c_uint] * 3,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_size_t,
        )
        self.last_error.restype = ctypes.c_char_p
        first, count = ctypes.POINTER(Entry)(), ctypes.c_size_t()
        self.dll.nk_entries(ctypes.byref(first), ctypes.byref(count))
        self.architectures = frozenset(f"sm{first[i].architecture}" for i in range(count.value))
        """those that it has code for"""
        self.kernels: dict[tuple, int | None] = {}
        self.served = 0
        """launches from the library"""
        self.compiled: dict[str, str] = {}
        """kernels of which Triton compiled a launch, and why"""

    def kernel(self, kernel, constants: dict[str, Any], fixed: tuple, device: torch.device) -> int | None:
        """Return the address of the nk_kernel for a launch on a device, or None if the library lacks it."""
        key = (id(kernel), device.index, fixed, *constants.items())
        if key not in self.kernels:
            found = ctypes.c_void_p()
            number = int(architecture(device.index).removeprefix("sm"))
            if self.find(identity(kernel, constants, fixed).encode(), number, ctypes.byref(found)) == UNKNOWN_KERNEL:
                self.warn(kernel.__name__)
            self.kernels[key] = found.value
        return self.kernels[key]

    def run(
        self, kernel, grid: tuple[int, ...], device: torch.device, arguments: tuple, constants: dict[str, Any]
    ) -> bool:
        """Launch a kernel on the current device and stream. Returns False if the library has no code for the launch.

        Raises LibraryError if the driver reports an error.
        """
        if 0 in grid:
            return True
        packed, fixed, alive = pack(arguments)
        found = self.kernel(kernel, constants, fixed, device)
        if found is None:
            return False
        x, y, z = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        count = len(packed) // 16
        status = self.launch(found, x, y, z, stream, packed, count)
        if status == NO_CONTEXT:  # the first call into CUDA of this thread
            torch.cuda.cudart().cudaMemGetInfo(device.index)
            status = self.launch(found, x, y, z, stream, packed, count)
        del alive
        if status in (BAD_ARGUMENT, NO_CODE):
            self.warn(kernel.__name__)
            return False
        if status != OK:
            raise LibraryError(f"{kernel.__name__}: {self.last_error().decode()}")
        self.served += 1
        return True

    def warn(self, name: str) -> None:
        """Say once for each kernel that Triton compiles a launch of it, and why."""
        if name not in self.compiled:
            self.compiled[name] = self.last_error().decode()
            warnings.warn(f"Triton compiles {name}, because of {self.path}: {self.compiled[name]}", stacklevel=4)


def pack(arguments: tuple) -> tuple[bytes, tuple, list[Matrix]]:
    """Return the arguments of a launch as an array of nk_argument, the values of those that are constants, and what must live
    as long as the array."""
    words, fixed, alive = [], [], []

    def add(values: tuple) -> None:
        for x in values:
            if isinstance(x, Tensor):
                words.extend((POINTER, DTYPES.get(x.dtype, 0), x.data_ptr()))
            elif isinstance(x, int):
                words.extend((INTEGER, 0, x))
            elif x is None:
                words.extend((NONE, 0, 0))
            elif isinstance(x, float):
                words.extend((NUMBER, 0, struct.unpack("q", struct.pack("d", x))[0]))
            elif isinstance(x, tuple):
                add(x)
            elif isinstance(x, triton.language.constexpr):
                fixed.append(x.value)
            else:
                base, rank = x.base, len(x.shape)
                matrix = Matrix(base.data_ptr(), DTYPES.get(base.dtype, 0), rank)
                matrix.shape[:rank], matrix.strides[:rank] = x.shape, x.strides
                alive.append(matrix)
                words.extend((MATRIX, 0, ctypes.addressof(matrix)))

    add(arguments)
    return struct.pack("iiq" * (len(words) // 3), *words), tuple(fixed), alive


_library: Library | None = None


def in_use() -> Library | None:
    return _library


def use(path: str | Path | None) -> None:
    """Take the code of every launch from a library, given by its file or the folder it was installed in, or from Triton for None.

    Raises LibraryError if it cannot be loaded.
    """
    global _library
    path = Path(path).absolute() if path else None  # dlopen would look for a bare name elsewhere
    if path and path.is_dir():
        name = "libnanochat_kernels.so"
        folders = (path, path / "lib", path / "lib64")
        path = next((folder / name for folder in folders if (folder / name).is_file()), path / name)
    _library = Library(path) if path else None
    take_code_of_library(_library and _library.architectures)


def run(kernel, grid: tuple[int, ...], device: torch.device, arguments: tuple, constants: dict[str, Any]) -> bool:
    """Launch a kernel from the library that is in use. Returns False if there is none, or if it has no code for the launch."""
    return _library is not None and _library.run(kernel, grid, device, arguments, constants)
