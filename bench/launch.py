"""Host time of a call: the public function against the bare launch of its kernel: python -m bench.launch

Both allocate new results each time; rows are few, so that the GPU never makes the host wait. Median of 2,000 calls.
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import torch

import nanochat_kernels as kernels
from bench.measure import need_gpu
from nanochat.platform.errors import UserError
from nanochat_kernels import triton_helpers


def microseconds(call: Callable[[], object], calls: int = 2000) -> float:
    """Median host time of a call, the queue of the GPU emptied now and then."""
    times = []
    for number in range(calls + 100):
        if number % 100 == 0:
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if number >= 100:
            times.append(time.perf_counter() - started)
    return 1e6 * median(times)


def bare(call: Callable[[], object]) -> Callable[[], object]:
    """The launch that a call makes, with the arguments it made: a new result each time, then kernel[grid](…)."""
    noted = []
    launch = triton_helpers.launch

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*arguments, **constants):
                noted.append((self.kernel, grid, arguments, constants))
                self.kernel[grid](*arguments, **constants)

            return run

    for module in list(sys.modules.values()):
        if getattr(module, "launch", None) is launch:
            module.launch = lambda kernel, grid, device, *a, **c: launch(Noted(kernel), grid, device, *a, **c)
    try:
        call()
    finally:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith(kernels.__name__) and hasattr(module, "launch"):
                module.launch = launch
    ((kernel, grid, arguments, constants),) = noted
    shapes = [(x.shape, x.dtype) for x in arguments if isinstance(x, torch.Tensor)][-2:]

    def again():
        for shape, dtype in shapes:  # as the operation does for its results
            torch.empty(shape, dtype=dtype, device="cuda")
        kernel[grid](*arguments, **constants)

    return again


def main() -> None:
    need_gpu()
    x, update = (torch.randn(64, 1280, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(1, 64, 10, 128, device="cuda", dtype=torch.bfloat16)
    tables = [torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    trained = x.clone().requires_grad_()
    calls = {
        "rms_norm": lambda: kernels.rms_norm(x),
        "rms_norm, with a gradient": lambda: kernels.rms_norm(trained),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, update),
        "qk_norm_rope": lambda: kernels.qk_norm_rope(q, q, *tables),
    }
    for name, call in calls.items():
        with torch.set_grad_enabled(name.endswith("gradient")):
            whole, alone = microseconds(call), microseconds(bare(call))
        print(f"{name:26} {whole:6.1f} µs, bare launch {alone:6.1f} µs, {whole - alone:5.1f} µs more")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:  # no GPU here
        sys.exit(f"bench.launch: {error}")
