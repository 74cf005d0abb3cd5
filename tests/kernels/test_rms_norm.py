"""rms_norm and add_rms_norm in Triton against the reference."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_compiled, check_graph_replay, randn

FILE = importlib.import_module("nanochat_kernels.rms_norm")  # `kernels.rms_norm` is the public function

PLANTED_FAULTS = {
    "eps dropped": ("rms_norm", "/ WIDTH + EPS)", "/ WIDTH)", "test_narrow_rows"),
    "mean over the padded width": ("rms_norm", "axis=1) / WIDTH + EPS", "axis=1) / BLOCK + EPS", "test_rms_norm"),
    "last row of the tile missed": ("rms_norm", "mask = (row < rows)", "mask = (row < rows - 1)", "test_rms_norm"),
    "stride of x ignored": (
        "rms_norm",
        "x_ptr + row[:, None] * x_stride",
        "x_ptr + row[:, None] * WIDTH",
        "test_rms_norm",
    ),
    "stride of the update ignored": (
        "rms_norm",
        "row[:, None] * update_stride",
        "row[:, None] * x_stride",
        "test_add_rms_norm",
    ),
    "stride of dy ignored": (
        "rms_norm",
        "dy_ptr + row[:, None] * dy_stride",
        "dy_ptr + row[:, None] * WIDTH",
        "test_rms_norm",
    ),
    "dtotal with dy's stride": (
        "rms_norm",
        "row[:, None] * dtotal_stride",
        "row[:, None] * dy_stride",
        "test_add_rms_norm",
    ),
    "rows numbered in 32 bits": (
        "rms_norm",
        "row = tl.program_id(0).to(tl.int64) * ROWS",
        "row = tl.program_id(0) * ROWS",
        "test_offsets_are_64_bit",
    ),
    "sum not rounded before the norm": (
        "rms_norm",
        "x = cast(x.to(tl.float32) + update.to(tl.float32), x.dtype)",
        "x = x.to(tl.float32) + update.to(tl.float32)",
        "test_the_stored_sum_is_normalised",
    ),
    "rstd dropped in backward": ("rms_norm", "dx = rstd[:, None] * (dy", "dx = (dy", "test_rms_norm"),
    "projection dropped": ("rms_norm", "(dy - y * projection[:, None])", "dy", "test_rms_norm"),
    "gradient of the sum dropped": (
        "rms_norm",
        "derivative(Backward, dy, dtotal, *ctx",
        "derivative(Backward, dy, None, *ctx",
        "test_add_rms_norm",
    ),
    "one gradient for two inputs": (
        "rms_norm",
        "ctx.needs_input_grad[1:])",
        "(True, False))",
        "test_add_rms_norm",
    ),
    "NaN taken as 0": (
        "rms_norm",
        "    x = x.to(tl.float32)\n",
        "    x = x.to(tl.float32)\n    x = tl.where(x == x, x, 0.0)\n",
        "test_nonfinite_numbers_propagate",
    ),
    "dtype of autocast ignored": (
        "rms_norm",
        "needs_gradient(x, update), normed_dtype(x))",
        "needs_gradient(x, update), torch.float16)",
        "test_add_rms_norm",
    ),
    "second derivative dropped": (
        "rms_norm",
        "else derivative(Backward, dy, None, *ctx",
        "else Backward.forward(dy, None, *ctx",
        "test_derivatives_that_do_not_exist_raise",
    ),
}

widths = st.one_of(st.integers(16, 40), st.sampled_from((64, 100, 128, 257)))


def norm(x):
    return kernels.rms_norm(x, impl="triton")


def add_norm(x, update):
    return kernels.add_rms_norm(x, update, impl="triton")


@harness.property_test
@example(rows=[3, 5], width=40, dtype=torch.bfloat16, layout="slice", seed=1)
@example(rows=[5], width=40, dtype=torch.float32, layout="transposed", seed=2)
@given(
    rows=st.lists(st.integers(1, 5), max_size=2),
    width=widths,
    dtype=harness.dtypes,
    layout=harness.layouts,
    seed=harness.seeds,
)
def test_rms_norm(rows, width, dtype, layout, seed):
    check(norm, reference.rms_norm, [randn(*rows, width, dtype=dtype, seed=seed, layout=layout)], [0], seed)


@harness.property_test
@example(rows=5, width=40, dtype=torch.bfloat16, layouts=("slice", "contiguous"), seed=1)
@given(
    rows=st.integers(1, 5),
    width=widths,
    dtype=harness.dtypes,
    layouts=st.tuples(harness.layouts, harness.layouts),
    seed=harness.seeds,
)
def test_add_rms_norm(rows, width, dtype, layouts, seed):
    x, update = (randn(rows, width, dtype=dtype, seed=seed + i, layout=layouts[i]) for i in range(2))
    check(add_norm, reference.add_rms_norm, [x, update], [0, 1], seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 15])
def test_narrow_rows(width, dtype):
    """Backward has an error of some units of dy only, because most of dy may lie along so short a row (see the top of rms_norm.py)."""
    x = randn(7, width, dtype=dtype)
    check(norm, reference.rms_norm, [x])
    dy = randn(7, width, dtype=dtype, seed=1)
    _, grad = harness.evaluate(norm, [x], [dy], [0])
    _, exact = harness.evaluate(reference.rms_norm, [x.double()], [dy.double()], [0])
    rstd = x.double().square().mean(1, keepdim=True).rsqrt()
    assert ((grad - exact).abs() <= 4 * torch.finfo(dtype).eps * rstd * dy.double().norm(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1280, 2048, 4096] if GPU else [768, 1280])
def test_model_widths(width, dtype):
    rows = 4099 if GPU else 3
    x, update = (randn(rows, width, dtype=dtype, seed=i) for i in range(2))
    check(norm, reference.rms_norm, [x], [0])
    check(add_norm, reference.add_rms_norm, [x, update], [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_small_and_large_rows(scale, dtype):
    """Small rows, for which eps matters, and rows whose squares are near the limit of float16, in which nothing is computed."""
    x = randn(5, 96, dtype=torch.float32).mul(scale).to(dtype)
    check(norm, reference.rms_norm, [x], [0])


def test_ignores_scale_and_gives_no_gradient_along_the_row():
    x = randn(4, 96, dtype=torch.float32)
    torch.testing.assert_close(norm(8 * x), norm(x))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(norm(x), x, x.detach())
    assert grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stored_sum_is_normalised(dtype):
    x, update = (randn(5, 96, dtype=dtype, seed=i) for i in range(2))
    total, y = add_norm(x, update)
    assert torch.equal(total, x + update) and torch.equal(y, norm(total))


def test_zero_rows_stay_zero():
    x = torch.zeros(3, 40, device=DEVICE, requires_grad=True)
    y = norm(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not y.any() and grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batch(shape):
    check(norm, reference.rms_norm, [torch.empty(shape, device=DEVICE)], [0])
    check(add_norm, reference.add_rms_norm, [torch.empty(shape, device=DEVICE)] * 2, [0, 1])


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_only_one_result_of_the_addition_is_used(used):
    x, update = (randn(3, 64, dtype=torch.float32, seed=i) for i in range(2))

    def part(operation):
        def run(*inputs):
            return tuple(out for out, use in zip(operation(*inputs), used, strict=True) if use)

        return run

    check(part(add_norm), part(reference.add_rms_norm), [x, update], [0, 1])


@pytest.mark.parametrize("kernel", FILE.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    """All configurations that tune tries give the right results, with whole and ragged tiles of rows."""
    x, dy = (randn(8 if GPU else 5, 100, dtype=torch.float32, seed=i) for i in range(2))
    _, y, rstd = FILE.forward_plan(x)(x, None)
    _, (expected,) = evaluate_reference(x, dy)
    for parameters in kernel.space:
        if kernel.name == "rms_norm_forward":
            _, found, _ = FILE.forward_plan(x, parameters=parameters)(x, None)
            torch.testing.assert_close(found, reference.rms_norm(x))
        else:
            (found,) = FILE.backward_plan(dy, None, y, rstd, parameters=parameters)(dy, None, y, rstd)
            torch.testing.assert_close(found, expected)


def evaluate_reference(x, dy):
    y, grad = harness.evaluate(reference.rms_norm, [x], [dy], [0])
    return y, (grad,)


def inputs_of(dtype=torch.float32):
    return [randn(3, 40, dtype=dtype, seed=i) for i in range(2)]


def test_nonfinite_numbers_propagate():
    x, update = inputs_of()
    harness.check_nonfinite(norm, reference.rms_norm, [x], [0])
    harness.check_nonfinite(add_norm, reference.add_rms_norm, [x, update], [0, 1])


def test_derivatives_that_do_not_exist_raise():
    x, update = inputs_of()
    harness.check_second_derivative_raises(norm, [x], [0])
    harness.check_second_derivative_raises(add_norm, [x, update], [0, 1])
    harness.check_jvp_raises(norm, [x], [0])
    harness.check_jvp_raises(add_norm, [x, update], [0, 1])


def test_vmap():
    x, update = inputs_of()
    harness.check_vmap(norm, [x], [0], [0])
    harness.check_vmap(add_norm, [x, update], [0, 1], [0, 1])
    harness.check_vmap(add_norm, [x, update], [1], [0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    x, update = inputs_of(dtype)
    harness.check_autocast(norm, reference.rms_norm, [x], [0])
    harness.check_autocast(add_norm, reference.add_rms_norm, [x, update], [0, 1])


def test_expanded_upstream_gradient():
    """The gradient that .sum() passes down has strides of 0."""
    x = randn(5, 96, dtype=torch.float32).requires_grad_()
    grads = [torch.autograd.grad(operation(x).sum(), x)[0] for operation in (norm, reference.rms_norm)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("needed", [0, 1])
def test_gradient_of_one_input(needed):
    check(add_norm, reference.add_rms_norm, inputs_of(), [needed])


@pytest.mark.skipif(not GPU, reason="needs GPUs")
def test_other_device():
    x, update = inputs_of()
    harness.check_other_device(norm, [x], [0])
    harness.check_other_device(add_norm, [x, update], [0, 1])


def test_offsets_are_64_bit():
    harness.assert_64_bit_offsets(*FILE.KERNELS)


@pytest.mark.skipif(not GPU, reason="needs 13 GB of GPU memory")
def test_offsets_beyond_32_bits():
    x = torch.randn(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    y = norm(x)
    assert torch.equal(y[-5:], norm(x[-5:].clone()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    x, update = (randn(3, 64, dtype=dtype, seed=i) for i in range(2))
    check_compiled(norm, [x], [0])
    check_compiled(add_norm, [x, update], [0, 1])


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    x, update = (randn(64, 1280, dtype=torch.bfloat16, seed=i) for i in range(2))
    check_graph_replay(norm, [x], [0])
    check_graph_replay(add_norm, [x, update], [0, 1])


def test_no_grad():
    x = randn(3, 64, dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        assert not norm(x).requires_grad


@pytest.mark.skipif(not GPU, reason="memory is measured on a GPU")
def test_keeps_only_the_result_and_one_number_per_row():
    x = randn(4096, 1280, dtype=torch.bfloat16).requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = norm(x)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 4 * 4096 + 1024


def test_bad_input():
    x = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(TypeError, match="x must be floating point"):
        kernels.rms_norm(torch.zeros(2, 8, dtype=torch.int64))
    for wrong in (torch.tensor(1.0), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"x must be \(…, C\)"):
            kernels.rms_norm(wrong)
    with pytest.raises(ValueError, match="update must have shape"):
        kernels.add_rms_norm(x, torch.zeros(2, 9, device=DEVICE))
    with pytest.raises(TypeError, match="update is torch.float16 but x is torch.float32"):
        kernels.add_rms_norm(x, x.half())
    with pytest.raises(ValueError, match="update is on meta but x is on"):
        kernels.add_rms_norm(x, torch.zeros(2, 8, device="meta"))
    with pytest.raises(kernels.KernelRequestError, match="float64"):
        kernels.rms_norm(x.double(), impl="triton")
    with pytest.raises(kernels.KernelRequestError, match="take CUDA tensors, got one on meta"):
        kernels.rms_norm(torch.zeros(2, 8, device="meta"), impl="triton")
    with pytest.raises(kernels.KernelRequestError, match="20000 elements does not fit"):
        kernels.rms_norm(torch.zeros(1, 20_000, device=DEVICE), impl="triton")
    with pytest.raises(kernels.KernelRequestError, match="rows exceed the"):
        kernels.rms_norm(torch.zeros(1, device=DEVICE).expand(2**31, 1), impl="triton")
