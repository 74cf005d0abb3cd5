"""Compare the host time of a public function with the bare launch of its kernel: python -m bench.launch [--library FILE]

With a libnanochat_kernels.so that CMake built also with launches from it in place of Triton's. All allocate new results in each
call. There are so few rows that the host never waits for the GPU. Medians of 2,000 calls.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import torch
import tyro
from torch import Tensor

import nanochat_kernels as kernels
from bench.measure import header
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat_kernels import library
from nanochat_kernels.architecture import architecture
from nanochat_kernels.configs import tables_of
from nanochat_kernels.triton_helpers import recorded_launches


def microseconds(call: Callable[[], object], calls: int = 2000) -> dict[str, float]:
    """Return the median and the quartiles of the host time of a call in µs; every 100 calls the GPU's queue is drained."""
    times = []
    for number in range(calls + 100):
        if number % 100 == 0:
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if number >= 100:
            times.append(1e6 * (time.perf_counter() - started))
    low, middle, high = quantiles(times, n=4)
    return {"us": middle, "low_us": low, "high_us": high}


def bare(function: Callable, arguments: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the launch that a call makes, without the function around it: it allocates the results and runs kernel[grid](…).

    The launch is recorded on meta tensors. Pointers that are not arguments of the call are results.
    """
    device = arguments[0].device
    without_data = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in arguments]
    with tables_of(architecture(device.index)), recorded_launches() as launches:
        function(*without_data, impl="triton")
    (launch,) = launches
    pointers = [x for x in launch.arguments if isinstance(x, Tensor)]
    numbers = launch.arguments[len(pointers) :]
    known = {id(x): real for x, real in zip(without_data, arguments, strict=True)}
    results = {id(x): (tuple(x.shape), x.dtype) for x in pointers if id(x) not in known}

    def again() -> None:
        tensors = known | {
            key: torch.empty(shape, dtype=dtype, device=device) for key, (shape, dtype) in results.items()
        }
        launch.kernel[launch.grid](*[tensors[id(x)] for x in pointers], *numbers, **launch.constants)

    return again


def main(
    library_path: Annotated[Path | None, tyro.conf.arg(name="library")] = None,
    json: Path | None = None,
) -> None:
    """Time the calls.

    library: libnanochat_kernels.so, or its build folder. json: file for the medians and quartiles.
    """
    found = header(f"python -m bench.launch {' '.join(sys.argv[1:])}".strip())
    x, update = (torch.randn(64, 1280, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, k = (torch.randn(1, 64, 10, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tables = [torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    calls = {
        "rms_norm": (kernels.rms_norm, (x,)),
        "add_rms_norm": (kernels.add_rms_norm, (x, update)),
        "qk_norm_rope": (kernels.qk_norm_rope, (q, k, *tables)),
    }
    for name, (function, arguments) in calls.items():
        with_gradient = (arguments[0].clone().requires_grad_(), *arguments[1:])
        for what, inputs in (("", arguments), (", with a gradient", with_gradient)):
            run = partial(function, *inputs, impl="triton")
            ways = {"function": microseconds(run), "bare launch": microseconds(bare(function, inputs))}
            if library_path:
                library.use(library_path)
                ways["function, library"] = microseconds(run)
                library.use(None)
            found["rows"].append({"call": name + what} | ways)
            print(
                f"{name + what:31} " + ", ".join(f"{way} {times['us']:.1f} µs" for way, times in ways.items()),
                flush=True,
            )
    if json:
        write_json(json, found)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (UserError, library.LibraryError) as error:  # no GPU here, or no library
        sys.exit(f"bench.launch: {error}")
