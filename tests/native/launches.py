"""Launch kernels from a library through Python and the driver of fake_driver.cpp, in place of libcuda.so.1. No GPU is needed.

python -m tests.native.launches entries LIBRARY    every launch of the library's kernels that Python records for its tables
python -m tests.native.launches training LIBRARY   the same in the dtypes of training only
python -m tests.native.launches model LIBRARY      training steps, evaluations and the engine's passes of models
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
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy
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
EVALUATED = ((16, 1024), (49, 333), (160, 102), (1, 77), (409, 40), (3, 32), (1, 7), (2, 1))
TRAINED = {12: ((16, 1024), (32, 333)), 20: ((32, 2048), (32, 1000), (1, 77)), 26: ((16, 2048),), 32: ((8, 2048),)}
TOP_K = (
    1,
    50,
    100,
    200,
    0,
)  # of rows that the engine decodes together: greedy ones, and those that draw among all tokens


def model_launches(architecture: str) -> Iterator[Launch]:
    """Record training steps, evaluations and the engine's passes of models with two layers of the widths that d12, d20, d26 and d32
    have."""
    gpt, micro_step = (importlib.import_module(f"nanochat.{name}") for name in ("gpt", "train.micro_step"))
    for depth, trained in TRAINED.items():
        config = replace(gpt.GPTConfig.from_depth(depth, 65_536, 2048), depth=2)
        steps = product(trained, (False, True))  # in reinforcement learning each token has a weight
        step = partial(micro_step.step_on_meta, config, torch.bfloat16)
        work = [partial(step, *shape, weighted) for shape, weighted in steps]
        work += [partial(evaluate, config, *shape) for shape in EVALUATED]
        work += [partial(generate, config, replay) for replay in (True, False)]
        with configs.tables_of(architecture):
            for run in work:
                yield from ahead.launches_of(run)


def model_on_meta(config):
    with torch.device("meta"):
        return importlib.import_module("nanochat.gpt").GPT(config, torch.bfloat16).to("meta")


@torch.inference_mode()
def evaluate(config, rows: int, tokens: int) -> None:
    """Evaluate a model: the losses of tokens, and logits of some and of all of them."""
    model, inputs = model_on_meta(config), torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    for reduction in ("none", "mean"):
        model(inputs, inputs, reduction)
    hidden = model.hidden(inputs)
    for some in (hidden[0, 1:8], hidden.flatten(0, 1)):
        model.logits(some)


@torch.inference_mode()
def generate(config, replay: bool) -> None:
    """Run the engine's passes of all sizes, with pages for as many tokens as the decoder gives passes of their own. replay: as for the
    engine; without it rows have any number of pages."""
    engine, decoder = (importlib.import_module(f"nanochat.inference.{name}") for name in ("engine", "decoder"))
    model = model_on_meta(config)
    model.keep_copies()
    cache = decoder.KVCache(config, engine.PAGE["cuda"], model.device, model.compute_dtype)
    cache.extend(engine.LEAST_PAGES)

    class Passes(decoder.Decoder):
        def _run(self, *arguments):
            found = super()._run(*arguments)
            # a meta tensor cannot be copied to the host
            return found and tuple(torch.empty_like(x, device="cpu") for x in found)

        def _serves(self, *size) -> bool:
            with mock.patch.object(torch, "equal", lambda *x: True):  # results on the meta device have no values
                return super()._serves(*size)

    passes = Passes(model, cache, engine.STEP_ROWS["cuda"], engine.CHUNKS_AT_ONCE["cuda"], replay)
    some = range(1, passes.most_pages + 1) if replay else (1, 3, 9, 15)
    for pages in sorted({passes._width(count) for count in some}):
        for size in passes.sizes["chunks"]:
            passes.prefill([([0], 0, [0] * pages)] * size)
        for top_k, alternatives in product(TOP_K, (0, engine.ALTERNATIVES)):
            row = numpy.zeros(decoder.PAGES + passes.most_pages, numpy.int64)
            passes.decode([row], pages, max(top_k, 1), top_k == engine.ALL, alternatives)


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


def unlike(launches: Iterator[Launch]) -> Iterator[Launch]:
    """Leave out launches whose arguments differ from those of an earlier one in nothing that code may require."""

    def seen_as(x):
        if isinstance(x, tuple):
            return tuple(map(seen_as, x))
        if isinstance(x, int):
            return x == 1, x % 16 == 0, x >= 2**31
        if isinstance(x, Tensor):
            return x.dtype, x.data_ptr() % 16 == 0
        return (x.base.dtype, *x.block_shape) if hasattr(x, "base") else getattr(x, "value", x)

    found = set()
    for launch in launches:
        key = launch.kernel, *launch.constants.items(), *map(seen_as, launch.arguments)
        if key not in found:
            found.add(key)
            yield launch


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
    for place, launch in inspect.recorded(architecture, training_only=True):
        name = library.identity(launch.kernel, launch.constants, export.fixed_of(launch))
        for general in (launch, inspect.for_any_batch(launch))[: 1 + export.trains(place)]:
            wanted = requirements(general, architecture)
            if wanted not in known.setdefault(name, []):
                known[name].append(wanted)
    found = []
    for launch in unlike(model_launches(architecture)):
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
        if what == "model":
            launches = list(model_launches(architecture))
        else:
            launches = [x for _, x in inspect.recorded(architecture, tuple(sys.argv[3:]), what == "training")]
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
