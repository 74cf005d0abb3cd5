"""The products that Newton-Schulz is built of, against float64 and torch.matmul."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import GPU, SMALL, poisoned, property_test, randn, seeds

ROOM = importlib.import_module("kernels.matrix_product")
few = settings(property_test, max_examples=30 if GPU else 15)  # nearly every one is compiled anew
halves = st.sampled_from((torch.bfloat16, torch.float16))


def check_product(x, y, plus, parameters=None, **options):
    """Not further from float64 than torch.baddbmm, whose sums are float32 too and which rounds once as well."""
    left = x.mT if options.get("x_transposed") else x
    right = y.mT if options.get("y_transposed") else y
    alpha, beta, gamma = (
        options.get(name, default) for name, default in (("alpha", 1.0), ("beta", 0.0), ("gamma", 0.0))
    )
    with poisoned():
        found = ROOM.product(x, y, plus, **options, parameters=parameters)
        again = ROOM.product(x, y, plus, **options, parameters=parameters)
    added = torch.zeros_like(found) if plus is None else plus
    eye = gamma * torch.eye(*found.shape[1:], device=x.device)
    true = alpha * (left.double() @ right.double()) + beta * added.double() + eye.double()
    rival = (alpha * (left.float() @ right.float()) + beta * added.float() + eye).to(x.dtype)
    assert torch.equal(found, again)
    error, allowed = float((found.double() - true).norm()), float((rival.double() - true).norm())
    assert error <= 1.02 * allowed + 1e-6 * float(true.norm()), f"error {error:.3e}, torch's {allowed:.3e}"
    if options.get("symmetric"):
        assert torch.equal(found, found.mT)
    return found


sizes = st.integers(1, 2000 if GPU else 40)


@few
@given(
    batch=st.integers(1, 3), m=sizes, n=sizes, k=sizes, dtype=halves, x_transposed=st.booleans(),
    y_transposed=st.booleans(), gamma=st.sampled_from((0.0, 1.5)), seed=seeds,
)  # fmt: skip
def test_product(batch, m, n, k, dtype, x_transposed, y_transposed, gamma, seed):
    x = randn(batch, *((k, m) if x_transposed else (m, k)), dtype=dtype, seed=seed)
    y = randn(batch, *((n, k) if y_transposed else (k, n)), dtype=dtype, seed=seed + 1)
    plus = randn(batch, m, n, dtype=dtype, seed=seed + 2)
    check_product(
        x, y, plus, alpha=0.5, beta=-2.0, gamma=gamma, x_transposed=x_transposed, y_transposed=y_transposed,
        parameters=None if GPU else SMALL,
    )  # fmt: skip


@few
@given(batch=st.integers(1, 3), m=sizes, k=sizes, dtype=halves, tall=st.booleans(), wide=st.booleans(), seed=seeds)
def test_symmetric_products(batch, m, k, dtype, tall, wide, seed):
    """x·xᵀ and xᵀ·x, and b·A + c·A² of it, symmetric bit for bit; tiles as wide as they are high, and twice as wide."""
    parameters = None if GPU else SMALL | {"BM": 16 if wide else 32}
    x = randn(batch, *((k, m) if tall else (m, k)), dtype=dtype, seed=seed) / math.sqrt(k * m)
    gram = check_product(
        x, x, None, parameters, x_transposed=tall, y_transposed=not tall, symmetric=True
    )  # fmt: skip
    check_product(gram, gram, gram, parameters, alpha=2.03, beta=-4.77, gamma=3.4, y_transposed=True, symmetric=True)


@pytest.mark.parametrize(("bm", "bn"), [(16, 16), (16, 32), (32, 64), (16, 64)])
def test_the_triangle_is_covered(bm, bn):
    """Matrices of every number of tiles: all of the result is written."""
    for m in (*range(1, 2 * bn + 2, 7), 4 * bn, 5 * bn + 3):
        x = randn(2, m, 16, dtype=torch.float16, seed=m)
        check_product(x, x, None, SMALL | {"BM": bm, "BN": bn}, y_transposed=True, symmetric=True)


def test_every_launch_configuration_of_the_search():
    x = randn(2, 192, 128, dtype=torch.float16)
    plus = randn(2, 192, 192, dtype=torch.float16)
    for kernel in ROOM.KERNELS:
        symmetric = kernel.name == "symmetric_product"
        for parameters in kernel.space[:: 5 if GPU else len(kernel.space) // 4]:
            if GPU or not parameters["TMA"]:
                added = plus + plus.mT if symmetric else plus
                check_product(x, x, added, parameters, beta=1.0, y_transposed=True, symmetric=symmetric)
