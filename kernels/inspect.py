"""Compile every launch of every kernel for an architecture, without a GPU, and report registers, spills and shared memory.

The launches are recorded on meta tensors with the parameters of the architecture's table. Triton compiles each of them for a named
target: the assembler reports registers and memory, and the PTX shows which instructions are used. An A100 (sm80) has 163 KiB of
shared memory per block and neither TMA nor wgmma; an H100 (sm90) has 227 KiB and both.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat_kernels import configs, dispatch, library
from nanochat_kernels.operation import Kernel, Key
from nanochat_kernels.triton_helpers import INTERPRETED, TRITON_INSTALLED, Launch, recorded_launches, triton

SHARED_MEMORY_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024}  # bytes per block
LARGE_STAGE = 48 * 1024  # bytes; an A100 has shared memory for three pipeline stages of this size
INSTRUCTIONS = ("mma.sync", "wgmma", "cp.async.bulk", "cp.async.c")
# each version of Triton allots registers a little differently: a few bytes in a few launches do not make a table useless
TABLES_CHECKED_WITH, SPILL_OF_OTHER_VERSIONS = "3.7.", 32  # bytes per thread
NOT_ON_SM80 = ("wgmma", "cp.async.bulk")
META = torch.device("meta")
# the integers that depend on the batch, or on the heads of a model, by the names that kernels give them
BATCH_SIZES = {"rows", "tokens", "all_keys", "positions", "row_heads", "blocks", "tiles", "total", "m", "size", "parts"}


class CannotRun(RuntimeError):
    """What inspect or tune was asked for cannot be done on this machine; the message tells the user why."""


class Place(NamedTuple):
    """The origin of a launch: number `number` of those that a kernel makes with a set of flags, in a dtype, at a shape class.

    any_batch: the launch is changed by for_any_batch.
    """

    kernel: str
    dtype: torch.dtype
    key: Key
    flags: str
    number: int
    any_batch: bool = False


@dataclass(frozen=True)
class Compiled:
    """A compiled launch: registers per thread, spilled and shared bytes, instructions of interest, and defects."""

    kernel: str
    flags: str
    dtype: str
    key: str
    constants: dict[str, Any]
    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    defects: tuple[str, ...]


def record(kernel: Kernel, key: Key, dtype: torch.dtype, parameters: dict[str, int] | None = None) -> dict[str, list]:
    """Return the launches of a kernel for each set of flags, by its name."""
    found = {}
    for flags, run in kernel.launches(key, dtype, META).items():
        with recorded_launches() as launches:
            run(parameters)
        found[flags] = launches
    return found


def specialize(launch: Launch, architecture: str) -> tuple[Any, dict[str, Any]]:
    """Return (Triton source, options) of a launch, specialised for its arguments as Triton does for a real launch."""
    if not TRITON_INSTALLED:
        raise CannotRun("Triton is not installed (pip install triton; it exists for Linux)")
    if INTERPRETED:
        raise CannotRun("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, triton.compiler.make_backend(target_of(architecture))
    # Triton's key of a function lacks the globals of those that it calls, unless they have keys already. Callees first, so that every
    # process finds what another one compiled.
    for function in library.functions_of(kernel, launch.constants).values():
        assert function.cache_key
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments, **launch.constants)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = GluonASTSource if kernel.is_gluon() else triton.compiler.ASTSource
    return source(kernel, signature, constants, attributes), options.__dict__


def target_of(architecture: str):
    return triton.backends.compiler.GPUTarget("cuda", int(architecture.removeprefix("sm")), 32)


def compile_launch(launch: Launch, architecture: str):
    """Return Triton's compiled kernel (asm, metadata), with a cubin also after run_ptx_of. Raises CannotRun or Triton's own error."""
    source, options = specialize(launch, architecture)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = None
        return triton.compile(source, target=target_of(architecture), options=options)


def inspect_launch(launch: Launch, architecture: str, place: Place) -> Compiled:
    """Compile a launch and check the result for spills, shared memory, instructions and pipeline stages."""
    return inspect_code(compile_launch(launch, architecture), launch, architecture, place)


def inspect_code(compiled, launch: Launch, architecture: str, place: Place) -> Compiled:
    """Check what compile_launch returned."""
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spilled = resources(compiled.asm["cubin"])
    defects = []
    if spilled > (0 if triton.__version__.startswith(TABLES_CHECKED_WITH) else SPILL_OF_OTHER_VERSIONS):
        defects.append(f"{spilled} bytes spilled")
    if shared > SHARED_MEMORY_LIMIT[architecture]:
        defects.append(f"{shared} bytes of shared memory; {architecture} has {SHARED_MEMORY_LIMIT[architecture]}")
    if architecture == "sm80":
        defects += [f"{name} does not exist on sm_80" for name in NOT_ON_SM80 if name in ptx]
        stages = compiled.metadata.num_stages
        buffers = stages - 1  # the pipeline keeps the tiles of all stages but one in shared memory
        if stages > 3 and shared >= LARGE_STAGE * buffers:
            defects.append(
                f"{stages} stages of {shared // buffers} bytes; at most 3 fit if a stage has {LARGE_STAGE} bytes or more"
            )
    instructions = tuple(name.removesuffix(".c") for name in INSTRUCTIONS if name in ptx)
    constants = {name: value for name, value in launch.constants.items() if isinstance(value, int)}
    return Compiled(
        launch.kernel.fn.__name__, place.flags, configs.dtype_name(place.dtype), configs.format_key(place.key),
        constants, registers, spilled, shared, instructions, tuple(defects),
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers per thread and the bytes of stack per thread, which these kernels use for spills only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def recorded(
    architecture: str, only: tuple[str, ...] = (), training_only: bool = False
) -> Iterator[tuple[Place, Launch]]:
    """Yield the launches of every kernel, or of those named in `only`, at its shape classes and further shapes.

    training_only: in the dtypes of training and the engine only. Raises LaunchTableError if the table lacks an entry.
    """
    with configs.tables_of(architecture):
        for kernel in dispatch.tunable_kernels():
            if only and kernel.name not in only:
                continue
            for dtype in kernel.training_dtypes if training_only else kernel.dtypes:
                for key in (*kernel.keys, *kernel.more_keys):
                    for flags, launches in record(kernel, key, dtype).items():
                        for number, launch in enumerate(launches):
                            yield Place(kernel.name, dtype, key, flags, number), launch


def places(architecture: str, only: tuple[str, ...] = ()) -> list[Place]:
    """Return where launches are recorded. Of launches that compile to the same code only the first is kept."""
    found: dict[str, Place] = {}
    for place, launch in recorded(architecture, only):
        found.setdefault(code_of(launch, architecture), place)
    return list(found.values())


def code_of(launch: Launch, architecture: str) -> str:
    """Return what the compiled code of a launch depends on."""
    source, options = specialize(launch, architecture)
    return f"{source.hash()} {sorted(options.items(), key=str)}"


def launch_at(place: Place, architecture: str) -> Launch:
    """Record a launch again, in a worker process."""
    kernel = next(kernel for kernel in dispatch.tunable_kernels() if kernel.name == place.kernel)
    with configs.tables_of(architecture):
        launch = record(kernel, place.key, place.dtype)[place.flags][place.number]
    return for_any_batch(launch) if place.any_batch else launch


def for_any_batch(launch: Launch) -> Launch:
    """Return a launch whose code does not rely on sizes that depend on the batch being multiples of 16.

    They are the integers called as in BATCH_SIZES, and those that a product gives its epilogue.
    """

    def general(x, depends: bool):
        if isinstance(x, tuple):
            return tuple(general(part, True) for part in x)
        return x + 8 if depends and isinstance(x, int) and x % 16 == 0 else x  # 8, because 1 would be compiled in

    arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return launch._replace(arguments=tuple(general(x, name in BATCH_SIZES) for name, x in arguments))


def inspect_place(architecture: str, place: Place) -> Compiled:
    return inspect_launch(launch_at(place, architecture), architecture, place)


def on_every_core(function: Callable, *arguments: list) -> Iterator:
    """Yield function(*each) for each of the arguments, as map does, from one process per core."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, *arguments, chunksize=4)


def inspect_all(architecture: str, only: tuple[str, ...] = ()) -> Iterator[Compiled]:
    """Compile every launch of every kernel, or of those named in `only`, in one process per core, and yield the results."""
    jobs = places(architecture, only)
    return on_every_core(inspect_place, [architecture] * len(jobs), jobs)
