"""Launch kernels from a library through Python and the driver of fake_driver.cpp, in place of libcuda.so.1. No GPU is needed.

python -m tests.native.launches entries LIBRARY    every launch of the library's kernels that Python records for its tables
python -m tests.native.launches model LIBRARY      training steps and evaluations of models
python -m tests.native.launches uncovered          the same without a library: which of these launches one would lack, if it were built
"""

import copy
import ctypes
import importlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from nanochat_kernels import ahead, configs, export, inspect, library
from nanochat_kernels.architecture import ARCHITECTURES
from nanochat_kernels.triton_helpers import Launch, triton

DEVICE = torch.device("cuda", 0)
STREAM = 0x7000


def with_memory(x):
    """Replace tensors on the meta device by some of their dtype, as far from a multiple of 64 bytes as on a GPU."""
    if isinstance(x, Tensor):
        memory = torch.zeros(64, dtype=torch.float64).view(torch.uint8)
        return memory[(x.data_ptr() - memory.data_ptr()) % 64 :][:64].view(x.dtype)
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
    if served:
        found = driver.fake_last_symbol().decode(), tuple(driver.fake_last_sizes()[:3]), driver.fake_last_stream()
        wanted = launch.kernel.__name__, (*launch.grid, 1, 1)[:3], STREAM
        assert found == wanted, f"the driver was asked for {found}, wanted {wanted}"
    return served


def check_constants(found: library.Library, launch: Launch) -> None:
    """Check that the value of a constant among the arguments chooses the kernel: the library has none for another one."""

    def changed(x):
        if isinstance(x, tuple):
            return tuple(map(changed, x))
        return triton.language.constexpr(x.value + 1) if isinstance(x, triton.language.constexpr) else x

    other = with_memory(changed(launch.arguments))
    assert not found.run(launch.kernel, launch.grid, DEVICE, other, launch.constants), launch.kernel.__name__


# (rows, tokens), and for evaluation, which pads rows to the longest only
EVALUATED = ((16, 1024), (49, 333), (160, 102), (1, 77))
TRAINED = {12: ((16, 1024), (32, 333)), 20: ((32, 2048), (32, 1000), (1, 77)), 26: ((16, 2048),), 32: ((8, 2048),)}


def model_launches(architecture: str) -> Iterator[Launch]:
    """Record training steps and evaluations of models with two layers of the widths that d12, d20, d26 and d32 have."""
    gpt, micro_step = (importlib.import_module(f"nanochat.{name}") for name in ("gpt", "train.micro_step"))

    @torch.inference_mode()
    def evaluate(config, rows: int, tokens: int) -> None:
        with torch.device("meta"):
            model, inputs = gpt.GPT(config, torch.bfloat16).to("meta"), torch.zeros(rows, tokens, dtype=torch.int64)
        hidden = model.hidden(inputs)
        for some in (hidden[0, 1:8], hidden.flatten(0, 1)):
            model.logits(some)

    for depth, trained in TRAINED.items():
        config = replace(gpt.GPTConfig.from_depth(depth, 65_536, 2048), depth=2)
        work = [partial(micro_step.step_on_meta, config, torch.bfloat16, *shape) for shape in trained]
        work += [partial(evaluate, config, *shape) for shape in EVALUATED]
        with configs.tables_of(architecture):
            for run in work:
                yield from ahead.launches_of(run)


def requirements(launch: Launch, architecture: str) -> dict[tuple[int, ...], tuple]:
    """Return (type, value if it is compiled in, whether it is divisible by 16) of each argument, by its place."""
    source, _ = inspect.specialize(launch, architecture)
    return {
        path: (kind, repr(source.constants[path]) if kind == "constexpr" else None, bool(source.attrs.get(path)))
        for path, kind in types_of(tuple(source.signature.values()))
    }


def types_of(signature, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    if isinstance(signature, tuple):
        for number, part in enumerate(signature):
            yield from types_of(part, (*path, number))
    else:
        yield path, signature


def fits(wanted: dict, given: dict) -> bool:
    """Whether code with these requirements takes arguments that are so."""
    return all(
        given[path] == (kind, value, True)
        or (given[path][:2] == (kind, value) and not divisible)
        or ((kind, given[path][1]) in (("i32", "1"), ("i64", "1")) and not divisible)
        for path, (kind, value, divisible) in wanted.items()
    )


def uncovered(architecture: str) -> list[str]:
    """Return the launches of models that a library would have no code for."""
    known: dict[str, list[dict]] = {}
    for place, launch in inspect.recorded(architecture):
        name = library.identity(launch.kernel, launch.constants, export.fixed_of(launch))
        for general in (launch, inspect.for_any_batch(launch))[: 1 + export.trains(place)]:
            wanted = requirements(general, architecture)
            if wanted not in known.setdefault(name, []):
                known[name].append(wanted)
    found = []
    for launch in model_launches(architecture):
        name = library.identity(launch.kernel, launch.constants, export.fixed_of(launch))
        given = requirements(launch, architecture)
        if not any(fits(wanted, given) for wanted in known.get(name, ())):
            found.append(f"{architecture} {launch.kernel.__name__} {launch.constants} {given}")
    return found


def main(what: str, path: str = "") -> None:
    if what == "uncovered":
        lines = [line for architecture in ARCHITECTURES for line in uncovered(architecture)]
        print("\n".join(lines) or "all launches are covered")
        sys.exit(bool(lines))
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_set_context.argtypes = (ctypes.c_ulonglong,)
    driver.fake_last_symbol.restype, driver.fake_last_stream.restype = ctypes.c_char_p, ctypes.c_void_p
    driver.fake_last_sizes.restype = ctypes.POINTER(ctypes.c_uint)
    torch._C._cuda_getCurrentRawStream = lambda index: STREAM
    # the first call into CUDA of a thread makes the context
    torch.cuda.cudart = lambda: SimpleNamespace(cudaMemGetInfo=lambda index: driver.fake_set_context(1))
    warnings.simplefilter("ignore")
    found = library.Library(Path(path))
    total, missing = 0, []
    for architecture in sorted(found.architectures):
        found.kernels.clear()
        library.architecture = lambda index, architecture=architecture: architecture
        if what == "entries":
            launches = [launch for _, launch in inspect.recorded(architecture, tuple(sys.argv[3:]))]
        else:
            launches = list(model_launches(architecture))
        total += len(launches)
        missing += [f"{architecture} {x.kernel.__name__}" for x in launches if not serves(found, driver, x)]
        for launch in [x for x in launches if export.fixed_of(x)][:1]:
            check_constants(found, launch)
    for line in sorted(set(missing)):
        print(f"not served: {line}: {found.compiled.get(line.split()[1])}")
    print(f"served {total - len(missing)} of {total} launches")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main(*sys.argv[1:3])
