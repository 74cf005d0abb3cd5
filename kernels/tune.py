"""The search for launch parameters: every configuration of a kernel's space on the GPU here, the fastest into the table."""

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch

from kernels import configs, timing
from kernels.configs import Kernel
from kernels.dispatch import tunable_kernels
from kernels.inspect import SHORT, inspect_kernel, run_ptx_of

ROUNDS = 15
COMPILERS = 8  # processes that fill Triton's cache ahead of the timing, each with its own inputs on the GPU


def tune(only: tuple[str, ...] = (), say: Callable[[str], None] = print) -> Iterator[tuple[str, float, dict[str, int]]]:
    """Write the table of this GPU's architecture, kernel by kernel: (what, milliseconds, parameters) as each is found.

    only: names of kernels; all when empty. float16 takes what bfloat16 has: the bytes are the same.
    Raises RuntimeError without a CUDA device, ValueError for a name that is no kernel's.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("launch parameters are measured on a GPU, and there is none here")
    kernels = list(tunable_kernels())
    unknown = set(only) - {kernel.name for kernel in kernels}
    if unknown:
        raise ValueError(
            f"no kernel is called {', '.join(sorted(unknown))}; there are {', '.join(k.name for k in kernels)}"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = configs.architecture(device.index)
    table = configs.table(architecture)
    kernels = [kernel for kernel in kernels if not only or kernel.name in only]
    works = launchable(kernels, architecture, say)
    for kernel in kernels:
        found: dict[str, dict[str, dict[str, int]]] = {}
        for dtype in kernel.dtypes:
            classes = found[str(dtype).removeprefix("torch.")] = {}
            for size in kernel.sizes:
                if dtype == torch.float16:
                    classes[str(size)] = found["bfloat16"][str(size)]
                    continue
                milliseconds, classes[str(size)] = fastest(kernel, size, dtype, device, works[kernel.name, size, dtype])
                yield f"{kernel.name} {SHORT[dtype]} {size}", milliseconds, classes[str(size)]
        table["launch"][kernel.name] = found
        forced = " running sm80's PTX" if architecture == "sm80" and torch.cuda.get_device_capability()[0] > 8 else ""
        table["measured_on"] = torch.cuda.get_device_name() + forced
        table["versions"] = {"torch": torch.__version__, "triton": __import__("triton").__version__}
        table["command"] = "nanochat kernels tune"
        write(architecture, table)


def launchable(kernels: list[Kernel], architecture: str, say) -> dict[tuple, list[dict[str, int]]]:
    """For each kernel, size and dtype the configurations that compile without a fault and can be launched."""
    jobs = [
        (kernel.name, size, dtype, parameters, architecture)
        for kernel in kernels
        for dtype in kernel.dtypes
        for size in kernel.sizes
        for parameters in kernel.space
        if dtype != torch.float16
    ]
    works: dict[tuple, list[dict[str, int]]] = {job[:3]: [] for job in jobs}
    with ProcessPoolExecutor(COMPILERS, multiprocessing.get_context("spawn")) as pool:
        for (name, size, dtype, parameters, _), fault in zip(jobs, pool.map(_try, jobs, chunksize=4), strict=True):
            if fault:
                say(f"{name} {SHORT[dtype]} {size} {parameters}: {fault}")
            else:
                works[name, size, dtype].append(parameters)
    return works


def _try(job: tuple) -> str:
    """What is wrong with a configuration, nothing if it is empty; in a process of its own."""
    name, size, dtype, parameters, architecture = job
    kernel = next(kernel for kernel in tunable_kernels() if kernel.name == name)
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        faults = inspect_kernel(kernel, architecture, size, dtype, parameters).faults
        if not faults:
            if architecture == "sm80" and torch.cuda.get_device_capability(device)[0] > 8:
                run_ptx_of("sm80")
            kernel.example(size, dtype, device)(parameters)
            torch.cuda.synchronize()
    except Exception as error:  # a tile that the compiler refuses
        return f"{type(error).__name__} {str(error)[:80]}"
    return "; ".join(faults)


def fastest(
    kernel: Kernel, size: int, dtype: torch.dtype, device: torch.device, configurations: list[dict[str, int]]
) -> tuple[float, dict[str, int]]:
    """(median milliseconds, parameters) of the fastest configuration."""
    if not configurations:
        raise RuntimeError(f"{kernel.name}: no configuration for {size} {dtype} compiles without a fault")
    run = kernel.example(size, dtype, device)
    variants = {str(n): lambda _, parameters=p: run(parameters) for n, p in enumerate(configurations)}
    times = {name: median(values) for name, values in timing.interleaved(variants, ROUNDS).items()}
    best = min(times, key=times.__getitem__)
    return times[best], configurations[int(best)]


def write(architecture: str, table: dict) -> None:
    """The table, a line for each kernel and dtype, whole or not at all."""
    entries = []
    for kernel, dtypes in table["launch"].items():
        lines = [f"   {json.dumps(dtype)}: {json.dumps(classes)}" for dtype, classes in dtypes.items()]
        entries.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
    rest = [
        f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in table.items()
        if key != "launch"
    ]
    text = "{\n" + ",\n".join([*rest, ' "launch": {\n' + ",\n".join(entries) + "\n }"]) + "\n}\n"
    path = configs.FOLDER / f"{architecture}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
    configs.clear()
