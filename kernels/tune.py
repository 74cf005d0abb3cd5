"""Search for launch parameters: time every configuration of each kernel on this GPU and write the fastest to the table."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import torch

from nanochat_kernels import configs, inspect, timing
from nanochat_kernels.architecture import architecture, forced_architecture, run_ptx_of, triton
from nanochat_kernels.configs import dtype_name, format_key
from nanochat_kernels.dispatch import tunable_kernels
from nanochat_kernels.operation import Kernel, Key

ROUNDS = 15
COMPILERS = 16  # at most so many processes fill Triton's cache before the timing
COMPILER_BYTES = 4 * 2**30  # of the GPU's memory, for the context and the inputs of each


def tune(only: tuple[str, ...] = (), say: Callable[[str], None] = print) -> Iterator[tuple[str, float, dict[str, int]]]:
    """Write the table of this GPU's architecture, kernel by kernel.

    Yields (kernel, dtype and shape class as one text; milliseconds; parameters) for each entry when it has been found.
    only: the names of the kernels to tune; empty for all. float16 reuses the parameters of bfloat16, because it moves as many
    bytes. Raises inspect.CannotRun without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise inspect.CannotRun("launch parameters are measured on a GPU, and this machine has none")
    device = torch.device("cuda", torch.cuda.current_device())
    name = architecture(device.index)
    table = configs.table(name)
    card = card_here(name)
    kernels = [kernel for kernel in tunable_kernels() if not only or kernel.name in only]
    launchable = launchable_configurations(kernels, name, say)
    for kernel in kernels:
        found: dict[str, dict[str, dict[str, int]]] = {}
        for dtype in kernel.dtypes:
            classes = found[dtype_name(dtype)] = {}
            for key in kernel.keys:
                if dtype == torch.float16 and torch.bfloat16 in kernel.dtypes:
                    classes[format_key(key)] = found["bfloat16"][format_key(key)]
                    continue
                milliseconds, parameters = fastest(kernel, key, dtype, name, launchable[kernel.name, key, dtype], say)
                classes[format_key(key)] = parameters
                yield f"{kernel.name} {dtype_name(dtype)} {format_key(key)}", milliseconds, parameters
        table["launch"][kernel.name] = found
        note_card(table, kernel.name, card)
        table["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
        table["command"] = "nanochat kernels tune"
        write(name, table)


def card_here(architecture: str) -> str:
    """Return the name of this GPU, as a table notes it that was measured with the code of an architecture."""
    forced = " running sm80's PTX" if architecture == "sm80" and torch.cuda.get_device_capability()[0] > 8 else ""
    return torch.cuda.get_device_name() + forced


def note_card(table: dict, kernel: str, card: str) -> None:
    """Write into a table that a kernel's parameters were measured on `card`, which may be another than that of the others."""
    others = table.pop("measured_elsewhere", {}) | {kernel: card}
    if set(others) >= set(table["launch"]) and set(others.values()) == {card}:
        table["measured_on"] = card
    others = {name: other for name, other in others.items() if other != table["measured_on"]}
    if others:
        table["measured_elsewhere"] = others


def launchable_configurations(
    kernels: list[Kernel], name: str, say: Callable[[str], None]
) -> dict[tuple, list[dict[str, int]]]:
    """Return the configurations that compile without a defect and launch, by (kernel name, shape class, dtype).

    Only the first set of flags is tried, because most configurations are too slow for the others to matter; see fastest. A kernel
    with a single configuration is not tried, because there is nothing to choose.
    """
    cases = [
        (kernel, key, dtype)
        for kernel in kernels
        for dtype in kernel.dtypes
        for key in kernel.keys
        if dtype != torch.float16 or torch.bfloat16 not in kernel.dtypes
    ]
    found = {(k.name, key, dtype): list(k.space) if len(k.space) == 1 else [] for k, key, dtype in cases}
    jobs = [
        (kernel.name, key, dtype, parameters, name)
        for kernel, key, dtype in cases
        if len(kernel.space) > 1
        for parameters in kernel.space
        # tensor descriptors are for sm_90 and later, and faster there than pointers
        if is_for(parameters, name)
    ]
    compilers = max(1, min(COMPILERS, os.cpu_count() or 1, torch.cuda.mem_get_info()[0] // COMPILER_BYTES))
    with ProcessPoolExecutor(compilers, multiprocessing.get_context("spawn")) as pool:
        for (kernel, key, dtype, parameters, _), problem in zip(jobs, pool.map(_try, jobs, chunksize=4), strict=True):
            if problem:
                say(f"{kernel} {dtype_name(dtype)} {format_key(key)} {parameters}: {problem}")
            else:
                found[kernel, key, dtype].append(parameters)
    return found


def is_for(parameters: dict[str, int], architecture: str) -> bool:
    """Whether a configuration is for an architecture: with "TMA": 1 or "STAGES" for sm_90 and later, with "TMA": 0 for sm_80.

    torch's product runs as the device's own code, with which another architecture's cannot be compared.
    """
    if "TORCH" in parameters:
        return forced_architecture() is None
    if "TMA" not in parameters and "STAGES" not in parameters:
        return True
    return bool(parameters.get("TMA", 1)) == (architecture != "sm80")


def _try(job: tuple) -> str:
    """Return what is wrong with a configuration, or an empty string. Runs in a process of its own."""
    name, key, dtype, parameters, target = job
    kernel = next(kernel for kernel in tunable_kernels() if kernel.name == name)
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        defects = defects_of(kernel, key, dtype, parameters, target, sets=1)
        if not defects:
            if target == "sm80" and torch.cuda.get_device_capability(device)[0] > 8:
                run_ptx_of("sm80")
            timed(kernel, key, dtype, device)(parameters)
            torch.cuda.synchronize()
    except Exception as error:  # for example a tile that the compiler rejects
        return f"{type(error).__name__} {str(error)[:80]}"
    return "; ".join(defects)


def defects_of(
    kernel: Kernel, key: Key, dtype: torch.dtype, parameters: dict[str, int], target: str, sets: int | None = None
) -> list[str]:
    """Return the defects that inspect finds with these parameters in every set of flags, or in the first `sets` of them."""
    with configs.tables_of(target):
        launches = inspect.record(kernel, key, dtype, parameters)
    defects = []
    for flags, of_flags in list(launches.items())[:sets]:
        for number, launch in enumerate(of_flags):
            found = inspect.inspect_launch(launch, target, inspect.Place(kernel.name, dtype, key, flags, number))
            defects += [f"{flags}: {defect}" for defect in found.defects]
    return defects


def timed(kernel: Kernel, key: Key, dtype: torch.dtype, device: torch.device) -> Callable[[dict[str, int]], Any]:
    """Return the launch with the first set of flags, which the search times for all of them."""
    return next(iter(kernel.launches(key, dtype, device).values()))


def fastest(
    kernel: Kernel,
    key: Key,
    dtype: torch.dtype,
    architecture: str,
    configurations: list[dict[str, int]],
    say: Callable[[str], None] = print,
) -> tuple[float, dict[str, int]]:
    """Return (median milliseconds, parameters) of the fastest configuration that compiles without a defect in every set of flags.

    One entry of the table serves all sets.
    """
    run = timed(kernel, key, dtype, torch.device("cuda", torch.cuda.current_device()))
    variants = {str(n): lambda _, parameters=p: run(parameters) for n, p in enumerate(configurations)}
    samples = timing.sustained(variants, 0.12) if kernel.is_compute_bound else timing.interleaved(variants, ROUNDS)
    times = {name: median(values) for name, values in samples.items()}
    for name in sorted(times, key=times.__getitem__):
        parameters = configurations[int(name)]
        try:
            defects = defects_of(kernel, key, dtype, parameters, architecture) if len(kernel.space) > 1 else []
        except Exception as error:  # another set of flags may not compile
            defects = [f"{type(error).__name__} {str(error)[:80]}"]
        if not defects:
            return times[name], parameters
        say(f"{kernel.name} {dtype_name(dtype)} {format_key(key)} {parameters}: {'; '.join(defects)}")
    raise inspect.CannotRun(f"{kernel.name}: no configuration for {format_key(key)} {dtype} compiles without a defect")


def write(architecture: str, table: dict) -> None:
    """Replace the table's file atomically; the new one has a line for each kernel and dtype."""
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
    configs.replace_file(configs.FOLDER / f"{architecture}.json", text)
    configs.clear()
