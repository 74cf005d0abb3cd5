"""Write the launches of cases.py for reference_test.cpp, and check its references without a GPU.

python -m tests.native.references write FILE MANIFEST    the launches that the library with this manifest.json has code for
python -m tests.native.references check LIBRARY FILE     against the kernels under Triton's interpreter; LIBRARY: reference_test.cpp's
"""

import ctypes
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from nanochat_kernels import configs, dispatch, export, library
from nanochat_kernels.triton_helpers import Launch, recorded_launches
from tests.interpreter import quicken
from tests.native.cases import META, OWN, flat, memory, small


class Case(NamedTuple):
    """The launches that one call makes, of which the kernel with this name in the launch tables is the first."""

    kernel: str
    flags: str
    launches: list[Launch]


SHARED = {"second": "first", "rate": "clip"}
"""inputs that the launchers' test data share: each gets a memory of its own, so that one for the other is noticed"""


def apart(launch: Launch) -> Launch:
    """Return a launch with inputs that share no memory."""
    places = {name.removesuffix("_ptr").removesuffix("_desc"): i for i, name in enumerate(launch.kernel.arg_names)}
    given = list(launch.arguments)

    def same(one: str, other: str) -> bool:
        x, y = (memory(given[places[name]]) if name in places else None for name in (one, other))
        return x is not None and y is not None and x.untyped_storage()._cdata == y.untyped_storage()._cdata

    for one, other in SHARED.items():
        if same(one, other) and not same(one, "out"):  # that of what a kernel does not read is any other
            x = given[places[one]]
            base = torch.empty_strided(memory(x).shape, memory(x).stride(), dtype=memory(x).dtype, device=META)
            given[places[one]] = base if isinstance(x, Tensor) else replace(x, base=base)
    return launch._replace(arguments=tuple(given))


def cases(architecture: str) -> Iterator[Case]:
    """Yield the launches of every kernel with every set of its flags, with the launch parameters of an architecture."""
    with configs.tables_of(architecture):
        for kernel in dispatch.tunable_kernels():
            dtype = kernel.training_dtypes[0]
            for shape, runs in OWN.get(kernel.name, partial(small, kernel))(dtype):
                for flags, run in runs.items():
                    with recorded_launches() as launches:
                        run(None)
                    if launches:  # sm_90 leaves some products to torch
                        yield Case(kernel.name, ", ".join(filter(None, (shape, flags))), list(map(apart, launches)))


def described(x: object, numbers: dict[int, int]) -> str:
    """Return an argument in the words of reference.h; numbers: the memories so far, by their addresses."""
    if x is None:
        return "none"
    if isinstance(x, int | float):
        return f"{'integer' if isinstance(x, int) else 'number'} {x!r}"
    base, is_tensor = memory(x), isinstance(x, Tensor)
    shape, strides = x.shape, x.stride() if is_tensor else x.strides
    number = numbers.setdefault(base.untyped_storage()._cdata, len(numbers))
    words = number, base.storage_offset(), library.DTYPES[base.dtype], len(shape), *shape, *strides
    return ("pointer " if is_tensor else "matrix ") + " ".join(map(str, words))


def write(path: Path, manifest: Path) -> None:
    """Write the cases of a library. Raises LookupError if it has all kernels but lacks a launch of a case."""
    lines = []
    for architecture, part in json.loads(manifest.read_text("utf-8"))["architectures"].items():
        names = {entry["kernel"] for entry in part["entries"]}
        for number, case in enumerate(cases(architecture)):
            if case.kernel not in names:
                continue
            numbers, text = {}, []
            for x in case.launches:
                name = library.identity(x.kernel, x.constants, export.fixed_of(x))
                if name not in part["kernels"]:
                    raise LookupError(
                        f"the library has no code for {architecture} {case.kernel} {case.flags}, {x.kernel.__name__}"
                    )
                text.append(f"launch {name} {x.kernel.__name__} {' '.join(map(str, (*x.grid, 1, 1)[:3]))}")
                text += [f"argument {name} {described(given, numbers)}" for name, given in flat(x)]
            sizes = {numbers[x._cdata]: x.nbytes() for x in storages_of(case)}
            head = f'case {architecture.removeprefix("sm")} {number} {case.kernel} "{case.flags}"'
            lines += [
                head,
                f"memories {len(sizes)} " + " ".join(str(sizes[i]) for i in range(len(sizes))),
                *text,
                "end",
            ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


FACTORS = ("rstd", "head_rstd", "cos", "sin", "sums")
"""the tuple `factors` of attention's gradients for sm_90, by the names of those for sm_80"""


def check(path: str, file: str) -> int:
    """Check the C++ references against the kernels under Triton's interpreter; returns how many checks and cases failed."""
    quicken()
    driver = ctypes.CDLL("libcuda.so.1")  # fake_driver.cpp
    driver.fake_set_context.argtypes = (ctypes.c_ulonglong,)
    driver.fake_set_context(1)
    known = {architecture: list(cases(f"sm{architecture}")) for architecture in (80, 90)}
    seen, failed = set(), []

    def compute(architecture: int, number: int, addresses) -> int:
        case = known[architecture][number]
        kind = (
            case.kernel,
            case.flags,
            *((x.kernel.__name__, *(type(given) for _, given in flat(x))) for x in case.launches),
        )
        if kind in seen:  # with other tiles
            return 0
        seen.add(kind)
        memories = [addresses[i] for i in range(len(numbers_of(case)))]
        try:
            if all(isinstance(x.kernel, InterpretedFunction) for x in case.launches):
                interpret(case, memories)
            else:
                interpret_another(case, next(x for x in known[80] if x[:2] == case[:2]), memories)
        except Exception:  # ctypes would go on
            traceback.print_exc()
            failed.append(case)
        return 1

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))
    return ctypes.CDLL(path).check_references(file.encode(), callback(compute)) + len(failed)


def numbers_of(case: Case) -> dict[int, int]:
    """Return the numbers of the memories of a case as `write` counts them, by their addresses."""
    numbers: dict[int, int] = {}
    for _, given in (part for x in case.launches for part in flat(x)):
        described(given, numbers)
    return numbers


def interpret(case: Case, memories: list[int]) -> None:
    """Make the launches of a case on memories of the host, given by their addresses."""
    numbers = numbers_of(case)
    for x in case.launches:
        x.kernel[x.grid](*(on_host(given, memories, numbers) for given in x.arguments), **x.constants)


def interpret_another(case: Case, other: Case, memories: list[int]) -> None:
    """Compute the results of a case in Gluon, which has no interpreter, by the launches for sm_80 of the same call."""
    storages = {numbers_of(other)[x._cdata]: x.nbytes() for x in storages_of(other)}
    buffers = [ctypes.create_string_buffer(b"\xff" * max(storages[i], 16)) for i in range(len(storages))]
    others = [ctypes.addressof(buffer) for buffer in buffers]
    to, results = by_role(other, others), by_role(case, memories)
    shared = [role for role in results if role in to and to[role].numel() == results[role].numel()]
    for role in shared:
        to[role].copy_(results[role].reshape(to[role].shape))
    if case.kernel == "qkv_projection" and (0, "arguments.2") not in results:  # cos and sin are one matrix
        first = dict(flat(other.launches[0]))["arguments.6"]  # the position of the first token
        for role, half in zip(("arguments.2", "arguments.3"), results[0, "first"].chunk(2, 1), strict=True):
            to[0, role][first : first + len(half)] = half
    interpret(other, others)
    for role in shared:
        results[role].copy_(to[role].reshape(results[role].shape))
    for role, result in results.items():
        if role in to and role not in shared and result.shape[1:] == to[role].shape[1:]:  # sums of parts of other sizes
            result.zero_()[0] = to[role].sum(0)


def by_role(case: Case, memories: list[int]) -> dict[tuple[int, str], Tensor]:
    """Return the tensors of a case by the number of the launch and the name of the argument."""
    found, numbers = {}, numbers_of(case)
    for i, x in enumerate(case.launches):
        for name, given in flat(x):
            role = name.removesuffix("_ptr").removesuffix("_desc")
            role = FACTORS[int(role[-1])] if role.startswith("factors.") else role
            if memory(given) is not None:
                here = on_host(given, memories, numbers)
                found[i, role] = here if isinstance(here, Tensor) else here.base
    return found


def storages_of(case: Case) -> list[torch.UntypedStorage]:
    """Return the memories of all arguments, again for each argument."""
    tensors = (memory(given) for x in case.launches for _, given in flat(x))
    return [x.untyped_storage() for x in tensors if x is not None]


def on_host(x: object, memories, numbers: dict[int, int]) -> object:
    """Return an argument of a launch with its elements in the memories that the C++ test has filled."""
    if isinstance(x, tuple):
        return tuple(on_host(part, memories, numbers) for part in x)
    base = memory(x)
    if base is None:
        return x
    storage = base.untyped_storage()
    content = (ctypes.c_uint8 * max(storage.nbytes(), 16)).from_address(memories[numbers[storage._cdata]])
    whole = torch.frombuffer(content, dtype=torch.uint8).view(base.dtype)
    here = whole.as_strided(base.shape, base.stride(), base.storage_offset())
    return here if isinstance(x, Tensor) else replace(x, base=here)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(check(*sys.argv[2:4]) and 1)
