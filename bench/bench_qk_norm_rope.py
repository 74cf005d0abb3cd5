"""qk_norm_rope against eager, torch.compile and Liger-Kernel at the shapes of the models; see bench/suite.py."""

import pytest

from bench.suite import clock, every_case, replay


@pytest.mark.benchmark(timer=clock)
@every_case("qk_norm_rope")
def test_qk_norm_rope(benchmark, operation, shape, mode, impl):
    replay(benchmark, operation, shape, mode, impl)
