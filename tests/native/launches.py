"""Launch kernels from a library through Python and the driver of fake_driver.cpp, in place of libcuda.so.1. No GPU is needed.

python -m tests.native.launches entries LIBRARY    every launch of the library's kernels that Python records for its tables
python -m tests.native.launches model LIBRARY      a micro-step and an optimizer step of models
"""

import copy
import ctypes
import importlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nanochat_kernels import ahead, configs, inspect, library
from nanochat_kernels.triton_helpers import Launch

DEVICE = torch.device("cuda", 0)


def with_memory(x):
    """Replace tensors on the meta device by some of their dtype whose address is a multiple of 64, as a GPU's would be."""
    if isinstance(x, Tensor):
        memory = torch.zeros(64, dtype=torch.float64).view(torch.uint8)
        return memory[-memory.data_ptr() % 64 :][:64].view(x.dtype)
    if isinstance(x, tuple):
        return tuple(map(with_memory, x))
    if hasattr(x, "base"):
        x = copy.copy(x)
        x.base = with_memory(x.base)
    return x


def serves(found: library.Library, driver: ctypes.CDLL, launch: Launch) -> bool:
    """Whether the library launches, and the right function."""
    arguments = with_memory(launch.arguments)
    served = found.run(launch.kernel, launch.grid, DEVICE, arguments, launch.constants)
    assert not served or driver.fake_last_symbol().decode() == launch.kernel.__name__, launch.kernel.__name__
    return served


def model_launches(architecture: str, depth: int, rows: int, tokens: int) -> list[Launch]:
    """Record a training step of a model with two layers of the width that a model of some depth has."""
    gpt, micro_step = (importlib.import_module(f"nanochat.{name}") for name in ("gpt", "train.micro_step"))
    config = replace(gpt.GPTConfig.from_depth(depth, 65_536, tokens), depth=2)
    with configs.tables_of(architecture):
        return ahead.launches_of(lambda: micro_step.step_on_meta(config, torch.bfloat16, rows, tokens))


def architectures_of(found: library.Library) -> list[str]:
    """The architectures that a library has code for."""
    first, count = ctypes.POINTER(Entry)(), ctypes.c_size_t()
    assert found.dll.nk_entries(ctypes.byref(first), ctypes.byref(count)) == library.OK
    return sorted({f"sm{first[i].architecture}" for i in range(count.value)})


class Entry(ctypes.Structure):
    """nk_entry"""

    _fields_ = (
        *[(name, ctypes.c_char_p) for name in ("kernel", "dtype", "shape", "flags")],
        ("launch", ctypes.c_int),
        ("architecture", ctypes.c_int),
        ("found", ctypes.c_void_p),
    )


def main(what: str, path: str) -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_set_context.argtypes = (ctypes.c_ulonglong,)
    driver.fake_last_symbol.restype = ctypes.c_char_p
    driver.fake_set_context(1)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    warnings.simplefilter("ignore")
    found = library.Library(Path(path))
    total, missing = 0, []
    for architecture in architectures_of(found):
        found.kernels.clear()
        library.architecture = lambda index, architecture=architecture: architecture
        if what == "entries":
            launches = [launch for _, launch in inspect.recorded(architecture, tuple(sys.argv[3:]))]
        else:
            launches = [
                x for depth, rows, tokens in ((12, 16, 1024), (20, 32, 2048), (26, 16, 2048), (32, 8, 2048))
                for x in model_launches(architecture, depth, rows, tokens)
            ]  # fmt: skip
        total += len(launches)
        missing += [f"{architecture} {x.kernel.__name__}" for x in launches if not serves(found, driver, x)]
    for line in sorted(set(missing)):
        print(f"not served: {line}: {found.compiled.get(line.split()[1])}")
    print(f"served {total - len(missing)} of {total} launches")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main(*sys.argv[1:3])
