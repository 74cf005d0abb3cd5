"""Measure a case: its variants and a copy take turns, so that all numbers come from the same state of the GPU."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

import torch

from bench.cases import Case, disagreement, tensors
from nanochat.platform.errors import UserError
from nanochat.train.timing import milliseconds
from nanochat_kernels import library
from nanochat_kernels.timing import interleaved, launch_microseconds, transient_bytes

ROUNDS = 40
COPY_BYTES = 2**31


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise UserError(
            "the kernels are measured on a GPU, and this machine has none; `nanochat kernels inspect` needs none"
        )


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def header(command: str, on_gpu: bool = True) -> dict:
    """Return the header of a result: command, commit, date, device, versions, and the rate of a matrix product on this GPU."""
    if on_gpu:
        need_gpu()
    root = Path(__file__).resolve().parents[1]
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "command": command,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "library": library.in_use().path.name if library.in_use() else None,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "triton": installed("triton"),
            "cuda": torch.version.cuda,
            **{name: installed(name) for name in ("liger_kernel", "quack-kernels", "helion")},
        },
        "product_tflops": product_tflops() if on_gpu else None,
        "rows": [],
    }


def product_tflops() -> float:
    """Return the rate of a large matrix product in bfloat16 on this GPU, in TFLOP/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = median(interleaved({"product": lambda _: a @ b}, 15)["product"])
    return 2 * 8192**3 / ms / 1e9


def peaks(device: torch.device) -> tuple[float, float]:
    """Return what a copy moves in bytes per second, and what a large matrix product computes in FLOP per second, on this device."""
    if device.type == "cuda":
        source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device=device).normal_()
        target = torch.empty_like(source)
        ms = median(interleaved({"copy": lambda _: target.copy_(source)}, 15)["copy"])
        return 2e3 * COPY_BYTES / ms, 1e12 * product_tflops()
    source, a = torch.randn(2**24), torch.randn(1024, 1024)
    target, product = torch.empty_like(source), torch.empty_like(a)
    copy, multiply = (partial(target.copy_, source), partial(torch.mm, a, a, out=product))
    copy_ms, product_ms = (min(milliseconds(run, 1, device) for _ in range(5)) for run in (copy, multiply))
    return 2e3 * source.nbytes / copy_ms, 2e3 * 1024**3 / product_ms


def check(case: Case) -> tuple[dict[str, str], dict[str, dict]]:
    """Run every variant and compare its results with the reference's, or with the first variant's if the reference cannot run.

    Returns (the reasons for which variants are not timed, launch µs and transient MB of the others), by variant.
    """
    expected, notes, extra = None, {}, {}
    for name in sorted(case.variants, key=lambda name: (name in case.uncompared, name != "eager")):
        run, prepare = case.variants[name], case.prepare.get(name, lambda number: None)
        try:
            for _ in range(2):  # the second call shows whether the first one changed its inputs
                prepare(0)
                results = run(0)
            if name in case.uncompared:
                pass
            elif expected is None:
                expected = [x.cpu() for x in tensors(results)]
            elif wrong := disagreement(results, expected, case.tolerance):
                notes[name] = wrong
                continue
            del results
            extra[name] = {"launch_us": launch_microseconds(run), "transient_mb": transient_bytes(run) / 1e6}
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
        except Exception as error:  # a library may not run on this machine: the other variants are still measured
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        torch.cuda.empty_cache()
    return notes, extra


def measure(case: Case, rounds: int = ROUNDS) -> Iterator[dict]:
    """Yield a row for each variant: median ms with quartiles, GB/s, percent of the copy, ratios, launch µs, transient MB.

    The row of a variant that disagrees with the reference, fails or runs out of memory has a note in place of times.
    """
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    notes, extra = check(case)
    working = {name: run for name, run in case.variants.items() if name in extra}
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
            "ratio_to": {other: medians[name] / ms for other, ms in medians.items() if other != name},
            "flops": case.flops(name),
            "tflops": case.flops(name) / medians[name] / 1e9,
            "dense_tflops": case.flops("eager") / medians[name] / 1e9,
            **extra[name],
        }
    for name, note in notes.items():
        yield {**common, "impl": name, "ms": None, "note": note}
