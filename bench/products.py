"""Time each matrix product of the model, with its epilogue, against torch's product alone: python -m bench.products

Variants are "bare", the product alone by torch; "fused", what the launch table takes; and "pass", torch's product and the epilogue in
one pass over it. They take turns, each running without a pause until the GPU's clock has settled, as in training. Random data.
What limits a product, by Nsight Compute's counters:

    ncu --profile-from-start off --clock-control none --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \\
        python -m bench.products --rows 65536 --profile
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from bench.measure import header, need_gpu
from nanochat.platform.errors import UserError
from nanochat.platform.files import write_json
from nanochat_kernels.dispatch import tunable_kernels
from nanochat_kernels.operation import Kernel, Key
from nanochat_kernels.product_configurations import BY_TORCH
from nanochat_kernels.timing import sustained


@dataclass(frozen=True)
class ProductsConfig:
    """Time the model's matrix products against torch's."""

    only: tuple[str, ...] = ()
    """names of products, as `nanochat kernels inspect` prints them; empty for all"""
    width: tuple[int, ...] = (1280,)
    """widths of the model: 768 for d12, 1280 for d20, 1664 for d26, 2048 for d32"""
    rows: tuple[int, ...] = (8_192, 16_384, 65_536)
    """rows of a micro-batch times its tokens, or of a chunk of the head"""
    seconds: float = 0.4
    """length of a sample, of which the first half is not timed"""
    rounds: int = 5
    """samples of each variant"""
    profile: bool = False
    """launch each variant but "pass" once, between the start and the stop of the CUDA profiler, and time nothing"""
    json: Path | None = None
    """file for every sample"""


def products(config: ProductsConfig) -> list[tuple[Kernel, Key]]:
    """The products to time with their shapes (M, N, K). Raises UserError if there is none."""
    found = [
        (kernel, key)
        for kernel in tunable_kernels()
        for key in (*kernel.keys, *kernel.more_keys)
        if BY_TORCH in kernel.space and (not config.only or kernel.name in config.only)
        if key[0] in config.rows and min(key[1:]) in config.width
    ]
    if not found:
        names = sorted({kernel.name for kernel in tunable_kernels() if BY_TORCH in kernel.space})
        raise UserError(f"no product has these names, widths and rows; the products are {', '.join(names)}")
    return found


def variants_of(kernel: Kernel, key: Key, device: torch.device) -> dict[str, Callable[[int], object]]:
    m, n, k = key
    x, weight = (torch.empty(size, k, device=device, dtype=torch.bfloat16).normal_() for size in (m, n))
    weight.mul_(k**-0.5)
    run = next(iter(kernel.launches(key, torch.bfloat16, device).values()))
    return {
        "bare": lambda _: torch.nn.functional.linear(x, weight),
        "fused": lambda _: run(None),
        "pass": lambda _: run(BY_TORCH),
    }


def measure(kernel: Kernel, key: Key, config: ProductsConfig, device: torch.device) -> dict:
    """Return the samples of each variant in milliseconds, with what they are of."""
    m, n, k = key
    samples = sustained(variants_of(kernel, key, device), config.seconds, config.rounds)
    return {"product": kernel.name, "shape": list(key), "flops": 2 * m * n * k, "samples_ms": samples}


def profile(found: list[tuple[Kernel, Key]], device: torch.device) -> None:
    for kernel, key in found:
        variants = variants_of(kernel, key, device)
        del variants["pass"]
        for run in variants.values():
            run(0)  # compiles
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for run in variants.values():
            run(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main() -> None:
    config = tyro.cli(ProductsConfig)
    need_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    if config.profile:
        return profile(products(config), device)
    result = header(f"python -m bench.products {' '.join(sys.argv[1:])}") | {"rows": []}
    for kernel, key in products(config):
        row = measure(kernel, key, config, device)
        result["rows"].append(row)
        ms = {name: median(samples) for name, samples in row["samples_ms"].items()}
        tflops = {name: row["flops"] / x / 1e9 for name, x in ms.items()}
        print(
            f"{row['product']:36} {'×'.join(map(str, key)):18} bare {ms['bare']:7.3f} ms {tflops['bare']:4.0f} TFLOP/s  "
            f"fused {ms['fused'] / ms['bare']:.3f} ×, {tflops['fused'] / result['product_tflops']:.0%} of the ceiling  "
            f"torch and a pass {ms['pass'] / ms['bare']:.3f} ×",
            flush=True,
        )
    if config.json:
        write_json(config.json, result)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:  # no GPU here
        sys.exit(f"bench.products: {error}")
