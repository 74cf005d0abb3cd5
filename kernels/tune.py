"""The search for launch parameters: every configuration of a kernel's space on the GPU here, the fastest into the table."""

import json
from collections.abc import Callable, Iterator
from statistics import median

import torch

from kernels import configs, timing
from kernels.configs import Kernel
from kernels.dispatch import tunable_kernels
from kernels.inspect import SHORT, inspect_kernel

ROUNDS = 15


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
    for kernel in kernels:
        if only and kernel.name not in only:
            continue
        found: dict[str, dict[str, dict[str, int]]] = {}
        for dtype in kernel.dtypes:
            classes = found[str(dtype).removeprefix("torch.")] = {}
            for size in kernel.sizes:
                if dtype == torch.float16:
                    classes[str(size)] = found["bfloat16"][str(size)]
                    continue
                milliseconds, classes[str(size)] = fastest(kernel, architecture, size, dtype, device, say)
                yield f"{kernel.name} {SHORT[dtype]} {size}", milliseconds, classes[str(size)]
        table["launch"][kernel.name] = found
        forced = " running sm80's PTX" if architecture == "sm80" and torch.cuda.get_device_capability()[0] > 8 else ""
        table["measured_on"] = torch.cuda.get_device_name() + forced
        table["versions"] = {"torch": torch.__version__, "triton": __import__("triton").__version__}
        table["command"] = "nanochat kernels tune"
        write(architecture, table)


def fastest(kernel: Kernel, architecture: str, size: int, dtype: torch.dtype, device: torch.device, say):
    """(median milliseconds, parameters) of the fastest configuration without spills."""
    run = kernel.example(size, dtype, device)
    works = {}
    for parameters in kernel.space:
        try:
            run(parameters)
            torch.cuda.synchronize()
            works[json.dumps(parameters)] = parameters
        except Exception as error:  # too much shared memory, a tile the compiler refuses
            say(f"{kernel.name} {SHORT[dtype]} {size} {parameters}: {type(error).__name__} {str(error)[:80]}")
    samples = timing.interleaved(
        {name: lambda _, parameters=parameters: run(parameters) for name, parameters in works.items()}, ROUNDS
    )
    times = {name: median(values) for name, values in samples.items()}
    for name in sorted(times, key=times.__getitem__):
        faults = inspect_kernel(kernel, architecture, size, dtype, works[name]).faults
        if not faults:
            return times[name], works[name]
        say(
            f"{kernel.name} {SHORT[dtype]} {size} {works[name]} would take {times[name]:.4f} ms, but: {'; '.join(faults)}"
        )
    raise RuntimeError(f"{kernel.name}: no configuration for {size} {dtype} compiles without a fault")


def write(architecture: str, table: dict) -> None:
    """The table, a line a configuration, whole or not at all."""
    lines = json.dumps(table, indent=1)
    for entry in {
        json.dumps(p, indent=1): p for d in table["launch"].values() for c in d.values() for p in c.values()
    }.values():
        for depth in (5,):
            spread = json.dumps(entry, indent=1).replace("\n", "\n" + " " * (depth - 1))
            lines = lines.replace(spread, json.dumps(entry))
    path = configs.FOLDER / f"{architecture}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(lines + "\n", "utf-8")
    temporary.replace(path)
    configs.table.cache_clear()
    configs._nearest.cache_clear()
