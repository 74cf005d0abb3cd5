"""The passes around the orthogonalisation against their formulas in float64."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.oracle import RATIO
from tests.kernels.harness import DEVICE, DTYPES, dtypes, poisoned, property_test, randn, seeds

ROOM = importlib.import_module("kernels.optimizer_step")
sizes = st.integers(1, 70)


def scalar(value):
    return torch.tensor(value, device=DEVICE)


def agree(operation, in_place, others, results=()):
    """Both implementations change copies of the same tensors; the fused one is as near to float64 as the reference, give or
    take a rounding of the largest number that enters: where terms nearly cancel, one of them may be lucky."""

    def changed(impl, cast):
        copies = [cast(x.clone()) for x in in_place]
        out = operation(copies, [cast(x) if torch.is_tensor(x) and x.dim() else x for x in others], impl)
        return [*copies, *(x for x in (out or ()) if x is not None)]

    with poisoned():
        found = changed("triton", lambda x: x)
    rival = changed("reference", lambda x: x)
    oracle = changed(None, lambda x: x.double())
    largest = max(float(x.abs().max()) for x in (*in_place, *others))
    for a, b, true in zip(found, rival, oracle, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, allowed = float((a.double() - true).norm()), float((b.double() - true).norm())
        unit = torch.finfo(a.dtype).eps * max(largest, float(true.abs().max()))
        assert error <= RATIO * allowed + unit, f"error {error:.3e}, reference {allowed:.3e}"
    return found


@property_test
@given(batch=st.integers(0, 3), m=sizes, n=sizes, dtype=dtypes, clip=st.sampled_from((1.0, 0.3)), seed=seeds)
def test_nesterov_momentum(batch, m, n, dtype, clip, seed):
    gradient = randn(batch, m, n, dtype=torch.float32, seed=seed)
    momentum = randn(batch, m, n, dtype=torch.float32, seed=seed + 1)

    def run(state, others, impl):
        if impl is None:
            return reference.nesterov_momentum(
                others[0], state[0], scalar(clip).double(), scalar(0.9).double(), torch.float64
            )
        return kernels.nesterov_momentum(others[0], state[0], scalar(clip), scalar(0.9), dtype, impl=impl)

    if not batch:
        assert run([momentum], [gradient], "triton")[0].shape == (0, m, n)
        return
    _, direction, squares = agree(run, [momentum], [gradient])
    assert squares.shape == (batch, ROOM.PARTS)
    torch.testing.assert_close(squares.sum(1), direction.double().square().sum((1, 2)), rtol=1e-12, atol=0)


@property_test
@given(rows=st.integers(0, 70), columns=sizes, dtype=dtypes, seed=seeds)
def test_apply_update(rows, columns, dtype, seed):
    weight = randn(rows, columns, dtype=torch.float32, seed=seed)
    update = randn(rows, columns, dtype=dtype, seed=seed + 1)

    def run(state, others, impl):
        if impl is None:
            return reference.apply_update(state[0], others[0], scalar(0.7).double(), 0.02)
        copy = torch.full_like(state[0], float("nan"), dtype=torch.bfloat16)
        kernels.apply_update(state[0], others[0], scalar(0.7), 0.02, copy, impl=impl)
        assert torch.equal(copy, state[0].to(copy.dtype))
        return None

    if rows:
        agree(run, [weight], [update])
    else:
        run([weight], [update], "triton")


@property_test
@example(rows=1, columns=1, clip=1.0, step=1, seed=1)
@given(rows=st.integers(1, 70), columns=sizes, clip=st.sampled_from((1.0, 0.3)), step=st.integers(1, 50), seed=seeds)
def test_adamw(rows, columns, clip, step, seed):
    state = [randn(rows, columns, dtype=torch.float32, seed=seed + i) for i in range(3)]
    gradient = randn(rows, columns, dtype=torch.float32, seed=seed + 3)
    state[2].abs_()

    def run(state, others, impl):
        biases = torch.tensor([1 - 0.8**step, 1 - 0.95**step], device=DEVICE)
        arguments = (scalar(clip), scalar(0.7), biases)
        weight, mean, variance = state
        if impl is None:
            arguments = tuple(x.double() for x in arguments)
            return reference.adamw(weight, others[0], mean, variance, *arguments, 0.01, (0.8, 0.95), 1e-10)
        copy = torch.full_like(weight, float("nan"), dtype=torch.bfloat16)
        kernels.adamw(weight, others[0], mean, variance, *arguments, 0.01, (0.8, 0.95), 1e-10, copy, impl=impl)
        assert torch.equal(copy, weight.to(copy.dtype))
        return None

    agree(run, state, [gradient])


def test_momentum_feeds_newton_schulz():
    """With the sums of squares handed over the result is that without."""
    gradient, momentum = (randn(2, 24, 40, dtype=torch.float32, seed=i) for i in (0, 1))
    direction, squares = kernels.nesterov_momentum(
        gradient, momentum, scalar(1.0), scalar(0.9), torch.bfloat16, impl="triton"
    )
    given_squares = kernels.newton_schulz(direction, squares=squares, impl="triton")
    torch.testing.assert_close(given_squares, kernels.newton_schulz(direction, impl="triton"), rtol=1e-2, atol=1e-3)


def test_bad_input_is_named():
    x = randn(2, 4, 6, dtype=torch.float32)
    one = scalar(1.0)
    cases = [
        (ValueError, "momentum must have shape", lambda: kernels.nesterov_momentum(x, x[:1], one, one, torch.bfloat16)),
        (TypeError, "momentum must be float32", lambda: kernels.nesterov_momentum(x, x.half(), one, one, x.dtype)),
        (TypeError, "mu must be a float32 scalar", lambda: kernels.nesterov_momentum(x, x, one, x, x.dtype)),
        (TypeError, "weight must be float32", lambda: kernels.apply_update(x.half(), x.half(), one, 1.0)),
        (ValueError, "biases must have shape", lambda: kernels.adamw(x, x, x, x, one, one, x, 1.0, (0.8, 0.9), 1e-8)),
        (
            ValueError,
            "contiguous tensors in place",
            lambda: kernels.apply_update(x.mT, x.mT, one, 1.0, impl="triton"),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype):
    gradient, momentum = (randn(3, 300, 200, dtype=torch.float32, seed=i) for i in (0, 1))
    first, second = (
        kernels.nesterov_momentum(gradient, momentum.clone(), scalar(0.5), scalar(0.9), dtype, impl="triton")
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
