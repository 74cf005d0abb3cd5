"""What the suites of the operations share: a case is measured once, all variants in turn, and pytest-benchmark is told
the samples of each as if it had taken them itself."""

from functools import lru_cache

import pytest
import torch

from bench.cases import MODES, MODES_OF, SHAPES, case
from bench.measure import measure

IMPLS = ("triton", "standard", "eager", "compile", "loop", "liger")


class Clock:
    """A timer that stands still until a sample is played to it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: float) -> None:
        self.now += seconds


clock = Clock()


@lru_cache(maxsize=1)  # a case's inputs are gone before the next one's are made
def measured(operation: str, shape: str, mode: str) -> dict[str, dict]:
    return {row["impl"]: row for row in measure(case(operation, shape, mode))}


def every_case(operation: str):
    """Parametrises a test over the operation's shapes, modes and variants."""
    modes = MODES_OF.get(operation, MODES)
    cases = [(operation, s, m, i) for s in SHAPES[operation] for m in modes for i in IMPLS]
    return pytest.mark.parametrize(("operation", "shape", "mode", "impl"), cases, ids="-".join)


def replay(benchmark, operation: str, shape: str, mode: str, impl: str) -> None:
    """Give pytest-benchmark the samples of a variant; extra_info holds the other columns."""
    if not torch.cuda.is_available():
        pytest.skip("the kernels are measured on a GPU")
    row = measured(operation, shape, mode).get(impl)
    if row is None or row["ms"] is None:
        pytest.skip(row["note"] if row else f"{impl} is not installed or has no {operation}")
    benchmark.group = f"{operation} {shape} {mode}"
    samples = iter(row["samples_ms"])
    benchmark.pedantic(lambda: clock.play(next(samples) / 1e3), rounds=len(row["samples_ms"]))
    wanted = ("gbps", "copy_gbps", "percent_of_copy", "ratio_to", "launch_us", "transient_mb", "tflops", "dense_tflops")
    benchmark.extra_info.update({name: row[name] for name in wanted if name in row})
