"""Compile the kernels of some work side by side, before the work launches them one after the other.

The work runs on the meta device, where its launches are recorded instead of made. Triton then compiles them in threads: its passes and
the assembler need Python's lock hardly at all.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from nanochat_kernels import configs, library
from nanochat_kernels.triton_helpers import Launch, recorded_launches, triton


def launches_of(work: Callable[[], object]) -> list[Launch]:
    """Return the launches of work on meta tensors, with the launch tables in use. auto takes what it takes on a GPU."""
    with recorded_launches() as launches:
        work()
    return launches


def compile_launches_of(work: Callable[[], object], device: torch.device, processes: int) -> None:
    """Compile the launches of work on meta tensors for a CUDA device; what does not compile is left to its launch to report.

    processes: so many processes of this machine do the same and share its processors. With the library of the kernels nothing is
    compiled.
    """
    if library.in_use():
        return
    with configs.tables_of(configs.architecture(device.index)):
        launches = launches_of(work)
    compile_side_by_side(launches, device, processes)


def compile_side_by_side(launches: Iterable[Launch], device: torch.device, processes: int = 1) -> None:
    """Compile recorded launches for a CUDA device in a thread for each processor, or a part of them where others do the same.

    What does not compile, or has no place on the device, is left to its launch to report. Other errors of loading it are raised.
    """

    def load(kernel: object) -> None:
        """Load a compiled kernel and what launches it, which Triton 3.6 compiles in C."""
        kernel = kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel
        if kernel is not None:
            with torch.cuda.device(device), suppress(triton.OutOfResources):
                _ = kernel.run

    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with torch.cuda.device(device), ThreadPoolExecutor(threads) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            compiled = [
                kernel.warmup(*arguments, grid=grid, **constants) for kernel, arguments, constants, grid in launches
            ]
        list(pool.map(load, dict.fromkeys(compiled)))
