"""The head and its cross entropy, fused behind the product, against the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.dispatch import KernelRequestError
from tests.kernels.harness import (
    GPU,
    check,
    check_compiled,
    check_graph_replay,
    dtypes,
    property_test,
    randn,
    seeds,
)


def fused(x, weight, targets, cap=15.0, ignore_index=-1, reduction="mean"):
    return kernels.linear_cross_entropy(x, weight, targets, cap, ignore_index, reduction, impl="triton")


def inputs(rows, width, vocabulary, dtype, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    x, weight = randn(rows, width, dtype=dtype, seed=seed), randn(vocabulary, width, dtype=dtype, seed=seed + 1)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -1
    return [x, weight, targets.to(x.device)]


@property_test
@given(
    rows=st.integers(0, 40), width=st.integers(1, 70), vocabulary=st.integers(1, 300), dtype=dtypes,
    reduction=st.sampled_from(("mean", "none")), ignored=st.sampled_from((0.0, 0.3, 1.0)), seed=seeds,
)  # fmt: skip
def test_loss_and_gradients(rows, width, vocabulary, dtype, reduction, ignored, seed):
    more = (15.0, -1, reduction)
    epsilon = 15.0 * 2**-23  # the cross entropy's own
    given = inputs(rows, width, vocabulary, dtype, seed, ignored)
    check(fused, reference.linear_cross_entropy, [*given, *more], (0, 1), seed, epsilon)


def test_without_gradients():
    given = inputs(9, 32, 100, torch.bfloat16)
    with torch.no_grad():
        found = fused(*given)
    x, weight, targets = given
    assert found.item() == pytest.approx(reference.linear_cross_entropy(x, weight, targets).item(), rel=1e-3)


def test_what_cannot_be_served_is_named():
    given = inputs(4, 16, 30, torch.float32)
    with pytest.raises(KernelRequestError, match="cap of at most 40.0, got 50"):
        fused(*given, 50.0)


def test_compiled():
    check_compiled(fused, inputs(16, 32, 64, torch.bfloat16), (0, 1))


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(fused, inputs(64, 64, 512, torch.bfloat16), (0, 1))
