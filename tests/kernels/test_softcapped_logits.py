"""softcapped_logits in Triton against the reference."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import matrix_product, product_configurations
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_graph_replay, randn

FILE = importlib.import_module("nanochat_kernels.softcapped_logits")


@pytest.fixture(autouse=True, scope="module")
def small_products():
    with harness.products_with(harness.PRODUCTS[0]):
        yield


def triton_logits(*arguments):
    return kernels.softcapped_logits(*arguments, impl="triton")


def plain_logits(x, weight, softcap=kernels.SOFTCAP):
    return softcap * torch.tanh((x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32)) / softcap)


def inputs(rows, width, vocab, dtype, seed=0, layouts=("contiguous",) * 2, size=1.0):
    x = randn(*rows, width, dtype=dtype, seed=seed, layout=layouts[0])
    return [x, randn(vocab, width, dtype=dtype, seed=seed + 1, layout=layouts[1]).mul_(size * width**-0.5)]


@harness.property_test
@example(
    rows=[2, 3], width=40, vocab=70, dtype=torch.bfloat16, layouts=("slice", "slice"), size=20.0,
    parameters=harness.SMALL_TILES, seed=1,
)  # fmt: skip
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    width=st.integers(16, 40),
    vocab=st.integers(16, 70),
    dtype=st.sampled_from(DTYPES[:2]),
    layouts=st.tuples(*[harness.layouts] * 2),
    size=st.sampled_from((0.01, 1.0, 20.0)),
    parameters=harness.products,
    seed=harness.seeds,
)
def test_softcapped_logits(rows, width, vocab, dtype, layouts, size, parameters, seed):
    with harness.products_with(parameters):
        check(triton_logits, plain_logits, inputs(rows, width, vocab, dtype, seed, layouts, size))


def test_nothing_is_rounded():
    """Every digit of float32 is right, near 0 and near the softcap, also of sums that 16 bits do not represent."""
    z = torch.cat([torch.logspace(-6, 2.2, 120), -torch.logspace(-6, 2.2, 120), torch.zeros(16)]).to(torch.bfloat16)
    x, weight = torch.ones(1, 16, device=DEVICE, dtype=torch.bfloat16), torch.zeros(256, 16, device=DEVICE)
    weight[:, 3], weight[:, 5] = z.float().to(DEVICE), z.float().to(DEVICE) * 2**-12
    found = triton_logits(x, weight.to(torch.bfloat16))
    exact = 15 * torch.tanh(z.double() * (1 + 2**-12) / 15)
    torch.testing.assert_close(found[0].cpu().double(), exact, rtol=1e-6, atol=0.0)


def test_logits_beyond_the_softcap_and_nan():
    x = torch.eye(16, device=DEVICE, dtype=torch.bfloat16)[:3]
    weight = torch.zeros(16, 16, device=DEVICE, dtype=torch.bfloat16)
    weight[:3, 0], weight[3, 1] = torch.tensor([3e38, -3e38, float("inf")], device=DEVICE), float("nan")
    found = triton_logits(x, weight)
    assert found[0, :3].tolist() == [15.0, -15.0, 15.0]
    assert found[1, 3].isnan()


def test_any_softcap():
    check(lambda *given_: triton_logits(*given_, 30.0), lambda *given_: plain_logits(*given_, 30.0),
          inputs([5], 24, 33, torch.bfloat16, size=40.0))  # fmt: skip


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 200] if GPU else [1, 17])
def test_the_launches_of_the_tables(rows):
    with harness.products_with(None):
        check(triton_logits, plain_logits, inputs([rows], 768 if GPU else 32, 4096 if GPU else 48, torch.bfloat16))


def test_calls_that_the_kernel_does_not_take():
    x, weight = inputs([3], 16, 20, torch.bfloat16)
    with pytest.raises(kernels.KernelRequestError, match="no gradient"):
        triton_logits(x, weight.requires_grad_())
    with pytest.raises(kernels.KernelRequestError, match="bfloat16 or float16"):
        triton_logits(x.float(), weight.detach().float())
    assert kernels.softcapped_logits(x, weight).requires_grad, "auto takes the reference then"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(kernels.KernelRequestError, match="fewer than 2 rows"):
        patch.setattr(FILE, "FEWEST_ROWS", 2)
        triton_logits(x, weight.detach())


def test_wrong_arguments():
    x, weight = inputs([3], 16, 20, torch.bfloat16)
    with pytest.raises(ValueError, match="softcap must be positive and finite, got 0"):
        triton_logits(x, weight, 0.0)
    with pytest.raises(ValueError, match=r"weight must have shape \(V, 16\)"):
        triton_logits(x, weight[:, :8])
    with pytest.raises(TypeError, match="cast one to the other"):
        triton_logits(x, weight.float())


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    with harness.products_with(None):
        check_graph_replay(triton_logits, inputs([3], 64, 100, torch.bfloat16), ())


def test_few_rows_take_the_tables_of_few_rows():
    x, weight = inputs([3], 32, 48, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_product, "FEWEST_ROWS", 256)
        patch.setattr(matrix_product, "launch_parameters", lambda name, *_: {"name": name, **harness.SMALL_TILES})
        found = [
            matrix_product.product_parameters("softcapped_logits", x, weight, (3, 48, 32), decodes=decodes)
            for decodes in (True, False)
        ]
    assert found[0]["name"] == "softcapped_logits_few_rows" and found[1] == product_configurations.BY_TORCH


PLANTED_FAULTS = {
    "softcap's sums are rounded": (
        "softcapped_logits", "y = sums / softcap", "y = sums.to(tl.bfloat16).to(tl.float32) / softcap",
        "test_nothing_is_rounded",
    ),
    "softcap loses small logits": (
        "softcapped_logits", "square < 0.0625, small", "square < 0.0, small", "test_nothing_is_rounded",
    ),
    "softcap is a constant": ("softcapped_logits", "value = softcap *", "value = 15.0 *", "test_any_softcap"),
}  # fmt: skip
