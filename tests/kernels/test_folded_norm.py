"""What the operations with a folded norm share: rstd of rows, and the sums that a product's epilogue keeps for it."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat_kernels import reference
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, SMALL_TILES, poisoned, randn
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.folded_norm")
RSTD, FINISH = FILE.KERNELS
WIDEST = 5001  # more than the 2,048 columns of a block, and no multiple of them


def same_rstd(found, x):
    exact = reference.with_rstd(x.double())[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0, equal_nan=True)


@harness.property_test
@example(rows=20, width=300, dtype=torch.bfloat16, seed=1)
@given(rows=st.integers(1, 20), width=st.integers(1, 300), dtype=harness.dtypes, seed=harness.seeds)
def test_row_rstd(rows, width, dtype, seed):
    x = randn(rows, width, dtype=dtype, seed=seed)
    with poisoned():
        same_rstd(FILE.row_rstd(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart_in_memory(dtype):
    x = randn(7, 40, dtype=dtype)[:, 3:19]
    same_rstd(FILE.row_rstd(x), x)
    one_for_all = randn(1, 16, dtype=dtype).expand(5, 16)
    same_rstd(FILE.row_rstd(one_for_all), one_for_all)


@pytest.mark.parametrize("parameters", RSTD.space)
def test_every_launch_configuration_of_rstd(parameters):
    for shape in ((5, 16), (3, WIDEST)):
        x = randn(*shape, dtype=torch.bfloat16)
        same_rstd(FILE.row_rstd(x, parameters), x)


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = randn(5, 16, dtype=torch.float32)
    x[1], x[2, 3], x[3, 4] = 0.0, float("inf"), float("nan")
    found = FILE.row_rstd(x)
    same_rstd(found, x)
    assert found[1] == reference.EPS**-0.5 and found[2] == 0 and found[3].isnan()


def test_no_rows():
    assert FILE.row_rstd(torch.empty(0, 16, device=DEVICE)).shape == (0,)
    assert FILE.finish(torch.empty(3, 0, device=DEVICE), 16).shape == (0,)


@pytest.mark.parametrize(("parts", "rows"), [(1, 1), (3, 5), (10, 128), (7, 300)])
def test_finish(parts, rows):
    """The sums of parts become rstd, or with rstd given the coefficient r²·sum/C."""
    sums = randn(parts, rows, dtype=torch.float32).square()
    rstd = randn(rows, dtype=torch.float32, seed=1).abs()
    total = sums.double().sum(0) / 96
    with poisoned():
        forward, backward = FILE.finish(sums, 96), FILE.finish(sums, 96, rstd)
    torch.testing.assert_close(forward.double(), (total + reference.EPS).rsqrt(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(backward.double(), rstd.double().square() * total, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "k"), [(16, 64, 32), (19, 37, 20), (33, 70, 16)])
def test_input_gradient(rows, width, k, dtype):
    """dz·weight − c ⊙ x, with and without the residual's gradient, of tiles that are whole or ragged."""
    dz, weight = randn(rows, k, dtype=dtype), randn(k, width, dtype=dtype, seed=1)
    x, dy = randn(rows, width, dtype=dtype, seed=2), randn(rows, width + 6, dtype=dtype, seed=3)[:, 3:-3]
    c = randn(rows, dtype=torch.float32, seed=4)
    exact = dz.double() @ weight.double() - c.double()[:, None] * x.double()
    for parameters in (SMALL_TILES, SMALL_TILES | {"PART": 32, "GROUP": 1}):
        for added in (None, dy):
            true = exact if added is None else exact + added.double()
            with poisoned():
                found = FILE.input_gradient("any", dz, weight, x, c, added, parameters)
            assert found.dtype == dtype
            assert float((found - true).norm() / true.norm()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("has_residual", [False, True])
def test_the_squares_of_a_row_are_those_of_what_is_stored(has_residual):
    """4,097 is no 16-bit number: what is stored is 4,096 or less, and so is rstd's."""
    x, weight = torch.zeros(3, 16, device=DEVICE).bfloat16(), torch.zeros(37, 16, device=DEVICE).bfloat16()
    x[:, 0], weight[:, 0] = 1.0, 4096.0
    x[:, 1], weight[:, 1] = 1.0, 5.0
    y, rstd = FILE.add_residual("any", x, weight, 0 * x.new_ones(3, 37) if has_residual else None, SMALL_TILES)
    assert (y == 4096.0).all() and (rstd == 2.0**-12).all()


@pytest.mark.parametrize("kernel", FILE.KERNELS, ids=lambda kernel: kernel.name)
def test_offsets_are_int64(kernel):
    assert narrow_offsets(kernel.name) == ""


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 10 GB of GPU memory")
def test_more_than_2_to_31_elements():
    x = torch.empty(70_000, 32_768, device=DEVICE, dtype=torch.bfloat16).normal_()
    assert torch.equal(FILE.row_rstd(x)[-5:], FILE.row_rstd(x[-5:].clone()))


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "mean over the padded width": ("folded_norm", "rsqrt(squares / WIDTH + EPS)", "rsqrt(squares / BLOCK + EPS)", "test_row_rstd"),
    "eps dropped": ("folded_norm", "rsqrt(squares / WIDTH + EPS)", "rsqrt(squares / WIDTH)",
     "test_rows_of_zeros_and_rows_that_are_not_finite"),
    "stride of x ignored": ("folded_norm", "row[:, None] * x_stride", "row[:, None] * WIDTH",
     "test_rows_that_lie_apart_in_memory"),
    "only one block of a row": ("folded_norm", "tl.static_range(0, WIDTH, BLOCK)", "tl.static_range(0, BLOCK, BLOCK)",
     "test_every_launch_configuration_of_rstd"),
    "rows numbered in 32 bits": ("folded_norm", "tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS",
     "test_offsets_are_int64"),
    "rstd once instead of squared": ("folded_norm", "value = r * r * (total / WIDTH)", "value = r * (total / WIDTH)",
     "test_finish"),
    "the first part of the sums counted twice": (
        "folded_norm", "tl.cast(start + i, tl.int64) * rows", "tl.cast((start + i) // 2, tl.int64) * rows", "test_finish",
    ),
    "stride of x taken for the residual's gradient": (
        "folded_norm", "load_block(dy_ptr, dy_stride,", "load_block(dy_ptr, x_stride,", "test_input_gradient",
    ),
    "coefficient of the wrong sign": ("folded_norm", "sums -= x * load_rows", "sums += x * load_rows", "test_input_gradient"),
}  # fmt: skip
