"""Measuring a case: every variant in turn with a copy beside them, so that all numbers come from one state of the GPU."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles

import torch

from bench.cases import Case
from kernels.timing import interleaved, launch_microseconds, transient_bytes
from nanochat.errors import UserError

ROUNDS = 40
COPY_BYTES = 2**31


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise UserError("the kernels are measured on a GPU, and there is none here; kernels inspect needs none")


def header(command: str) -> dict:
    """What a result must say of itself: command, commit, device, versions, and the matrix product's rate here."""
    need_gpu()
    from triton import __version__ as triton_version

    root = Path(__file__).resolve().parents[1]
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    try:
        from importlib.metadata import version

        liger = version("liger_kernel")
    except ImportError:
        liger = None
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median(interleaved({"product": lambda _: a @ b}, 15)["product"])
    return {
        "command": command,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "triton": triton_version,
            "cuda": torch.version.cuda,
            "liger_kernel": liger,
        },
        "product_tflops": 2 * 8192**3 / product / 1e9,
        "rows": [],
    }


def _rates(flops: dict[str, float], variant: str, ms: float) -> dict:
    """TFLOP/s that a variant executes, and what they would be with the operations of the plain algorithm."""
    if not flops:
        return {}
    done = flops.get(variant, flops["dense"])
    return {"flops": done, "tflops": done / ms / 1e9, "dense_tflops": flops["dense"] / ms / 1e9}


def measure(case: Case, rounds: int = ROUNDS) -> Iterator[dict]:
    """A row for each variant: median ms with quartiles, GB/s, percent of the copy, ratios, launch µs, transient bytes.

    A variant that runs out of memory gets a row that says so.
    """
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    working, lost, extra = {}, [], {}
    for name, run in case.variants.items():
        try:
            transient = transient_bytes(run)
            extra[name] = {"launch_us": launch_microseconds(run), "transient_mb": transient / 1e6}
            working[name] = run
        except torch.OutOfMemoryError:
            lost.append(name)
        torch.cuda.empty_cache()
    samples = interleaved({**working, "copy": lambda _: target.copy_(source)}, rounds, case.prepare)
    copy_gbps = 2 * COPY_BYTES / median(samples.pop("copy")) / 1e6
    medians = {name: median(values) for name, values in samples.items()}
    common = {"op": case.operation, "shape": case.shape, "mode": case.mode, "dtype": case.dtype}
    for name, values in samples.items():
        low, _, high = quantiles(values, n=4)
        gbps = case.bytes / medians[name] / 1e6
        yield {
            **common,
            "impl": name,
            "ms": medians[name],
            "quartiles_ms": [low, high],
            "samples_ms": values,
            "bytes": case.bytes,
            "gbps": gbps,
            "copy_gbps": copy_gbps,
            "percent_of_copy": 100 * gbps / copy_gbps,
            "ratio_to": {rival: medians[name] / ms for rival, ms in medians.items() if rival != name},
            **extra[name],
            **_rates(case.flops, name, medians[name]),
        }
    for name in lost:
        yield {**common, "impl": name, "ms": None, "note": "out of memory"}
