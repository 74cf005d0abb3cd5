"""Time every operation that has a benchmark, at its shapes and in its modes: a call until the GPU is done, with its launch.

pytest-benchmark reports host time around a call and a synchronisation. `python -m bench` measures GPU time only, with a cold cache
and baselines that take turns.
"""

import pytest
import torch

from bench.cases import case, measured

CASES = [
    (name, shape, mode)
    for name, operation in measured().items()
    for shape in operation.benchmark.shapes
    for mode in operation.benchmark.modes
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are measured on a GPU")
@pytest.mark.parametrize("impl", ["triton", "compile"])
@pytest.mark.parametrize(("name", "shape", "mode"), CASES, ids="-".join)
def test_kernel(benchmark, name, shape, mode, impl):
    made = case(name, shape, mode, only=(impl,))
    if impl not in made.variants:
        pytest.skip(f"{name} has no {impl}")
    benchmark.group = f"{name} {shape} {mode}"

    def call():
        made.variants[impl](0)
        torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=30, warmup_rounds=3)
    benchmark.extra_info["bytes"] = made.bytes
