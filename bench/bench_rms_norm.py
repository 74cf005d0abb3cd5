"""rms_norm and add_rms_norm against eager, torch.compile and Liger-Kernel at the shapes of the models; see bench/suite.py."""

import pytest

from bench.suite import clock, every_case, replay


@pytest.mark.benchmark(timer=clock)
@every_case("rms_norm")
def test_rms_norm(benchmark, operation, shape, mode, impl):
    replay(benchmark, operation, shape, mode, impl)


@pytest.mark.benchmark(timer=clock)
@every_case("add_rms_norm")
def test_add_rms_norm(benchmark, operation, shape, mode, impl):
    replay(benchmark, operation, shape, mode, impl)
