"""newton_schulz for all matrices of a model against the plain loop and torch.compile; see bench/suite.py."""

import pytest

from bench.suite import clock, every_case, replay


@pytest.mark.benchmark(timer=clock)
@every_case("newton_schulz")
def test_newton_schulz(benchmark, operation, shape, mode, impl):
    replay(benchmark, operation, shape, mode, impl)
