"""softcap_cross_entropy against eager, torch.compile and Liger-Kernel at the shapes of the models; see bench/suite.py."""

import pytest

from bench.suite import clock, every_case, replay


@pytest.mark.benchmark(timer=clock)
@every_case("softcap_cross_entropy")
def test_softcap_cross_entropy(benchmark, operation, shape, mode, impl):
    replay(benchmark, operation, shape, mode, impl)
