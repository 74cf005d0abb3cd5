"""output_projection in Triton against the reference."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import matrix_product, product_configurations, reference
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_compiled, check_graph_replay, randn
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.output_projection")


@pytest.fixture(autouse=True, scope="module")
def small_products():
    with harness.products_with(harness.PRODUCTS[0]):
        yield


def triton_projection(*arguments):
    return kernels.output_projection(*arguments, impl="triton")


def projection(*arguments):
    """The first result of the fused operation. The second one must be the factors of its rows."""
    y, rstd = triton_projection(*arguments)
    exact = reference.with_rstd(y.double())[1]
    assert rstd.dtype == torch.float32 and rstd.shape == y.shape[:-1] and not rstd.requires_grad
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0.0, equal_nan=True)
    return y


def plain_projection(*arguments):
    return reference.output_projection(*arguments)[0]


def inputs(rows, width, k, dtype, seed=0, layouts=("contiguous",) * 3):
    """Return x, weight and residual."""
    x = randn(*rows, k, dtype=dtype, seed=seed, layout=layouts[0])
    weight = randn(width, k, dtype=dtype, seed=seed + 1, layout=layouts[1]).mul_(k**-0.5)
    return [x, weight, randn(*rows, width, dtype=dtype, seed=seed + 2, layout=layouts[2])]


@harness.property_test
@example(
    rows=[5, 9], width=70, k=40, dtype=torch.bfloat16, layouts=("slice", "transposed", "slice"), has_residual=True,
    parameters=harness.PRODUCTS[0], seed=1,
)  # fmt: skip
@example(
    rows=[9], width=48, k=33, dtype=torch.float16, layouts=("columns",) * 3, has_residual=False,
    parameters=harness.PRODUCTS[1], seed=2,
)  # fmt: skip
@example(
    rows=[6], width=70, k=40, dtype=torch.bfloat16, layouts=("contiguous",) * 3, has_residual=True,
    parameters=harness.PRODUCTS[3], seed=3,
)  # fmt: skip
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    width=st.integers(16, 70),
    k=st.integers(16, 40),
    dtype=harness.dtypes,
    layouts=st.tuples(*[harness.layouts] * 3),
    has_residual=st.booleans(),
    parameters=harness.products,
    seed=harness.seeds,
)
def test_output_projection(rows, width, k, dtype, layouts, has_residual, parameters, seed):
    number = 3 if has_residual else 2
    given_ = inputs(rows, width, k, dtype, seed, layouts)[:number]
    with harness.products_with(parameters):
        check(projection, plain_projection, given_, range(number), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (1, 9), (5, 1), (3, 7)])
def test_narrow_layers(width, k, dtype):
    """The error is within a few units of the largest element: in so few elements the reference's own errors may cancel by chance."""
    given_ = inputs((7,), width, k, dtype)
    dy = randn(7, width, dtype=dtype, seed=9)
    found = harness.evaluate(projection, given_, [dy], [0, 1, 2])
    exact = harness.evaluate(plain_projection, [x.double() for x in given_], [dy.double()], [0, 1, 2])
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max()) <= 2 * torch.finfo(dtype).eps * max(float(b.abs().max()), 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1280] if GPU else [48])
def test_model_widths(width, dtype):
    rows = (2, 1023) if GPU else (2, 17)
    check(projection, plain_projection, inputs(rows, width, width, dtype), [0, 1, 2])


@pytest.mark.parametrize("wrt", [[0], [1], [2], [0, 2], [1, 2]])
def test_only_the_gradients_that_are_asked_for(wrt):
    check(projection, plain_projection, inputs((5,), 12, 20, torch.float32), wrt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_as_its_own_residual(dtype):
    """Both of its gradients arrive."""

    def onto_itself(function):
        return lambda x, weight: function(x, weight, x)

    x, weight, _ = inputs((2, 7), 24, 24, dtype)
    check(onto_itself(projection), onto_itself(plain_projection), [x, weight], [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_added_before_the_sum_is_rounded(dtype):
    """The product 4096 + 1 is no 16-bit number; with the residual −4096 it is 1, except where torch computes the product."""
    x = torch.ones(3, 16, device=DEVICE, dtype=dtype)
    weight = torch.zeros(32, 16, device=DEVICE, dtype=dtype)
    weight[:, 0], weight[:, 5] = 4096.0, 1.0
    residual = torch.full((3, 32), -4096.0, device=DEVICE, dtype=dtype)
    with harness.products_with(harness.SMALL_TILES):
        assert (projection(x, weight, residual) == 1.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rstd_of_zero_rows(dtype):
    x, weight, _ = inputs((5,), 24, 16, dtype)
    rstd = triton_projection(torch.zeros_like(x), weight)[1]
    torch.testing.assert_close(rstd, torch.full_like(rstd, reference.EPS**-0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    harness.check_nonfinite(projection, plain_projection, inputs((5,), 12, 20, dtype), [0, 1, 2])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_added_to_the_buffer(impl, dtype):
    """Two calls add to the buffer's content in float32, and the weight itself gets no gradient."""
    _, weight, residual = inputs((40,), 24, 56, dtype)
    weight.requires_grad_()
    buffer = torch.full((24, 56), -2.0, device=DEVICE)
    exact = buffer.double()
    for seed in (5, 6):
        x = randn(40, 56, dtype=dtype, seed=seed).requires_grad_()
        dy = randn(40, 24, dtype=dtype, seed=seed + 10)
        kernels.output_projection(x, weight, residual, buffer, impl=impl)[0].backward(dy)
        _, dx, dw = harness.evaluate(plain_projection, [x.double(), weight.double()], [dy.double()], [0, 1])
        exact = exact + dw
        torch.testing.assert_close(x.grad, dx.to(dtype), rtol=2e-2, atol=2e-2)
    assert weight.grad is None and float((buffer - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_the_buffer_stays_untouched_where_no_input_requires_a_gradient(impl):
    given_ = inputs((5,), 12, 20, torch.float32)
    buffer = torch.zeros(12, 20, device=DEVICE)
    assert not kernels.output_projection(*given_, buffer, impl=impl)[0].requires_grad
    residual = given_[2].clone().requires_grad_()
    kernels.output_projection(*given_[:2], residual, buffer, impl=impl)[0].sum().backward()
    assert not buffer.any() and bool((residual.grad == 1.0).all())
    for i in range(2):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(given_)]
        buffer.zero_()
        kernels.output_projection(*leaves, buffer, impl=impl)[0].sum().backward()
        assert buffer.any()
    buffer.zero_()
    with torch.no_grad():
        assert not kernels.output_projection(*leaves, buffer, impl=impl)[0].requires_grad
    assert not buffer.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batch(shape, dtype):
    x, weight = torch.empty(shape, device=DEVICE, dtype=dtype), torch.ones(16, 8, device=DEVICE, dtype=dtype)
    check(projection, plain_projection, [x, weight, x.new_empty(*shape[:-1], 16)], [0, 1, 2])


def test_derivatives_that_do_not_exist_raise():
    given_ = inputs((5,), 12, 20, torch.float32)
    harness.check_second_derivative_raises(projection, given_, [0, 1, 2])
    harness.check_jvp_raises(projection, given_, [0])


def test_vmap():
    harness.check_vmap(lambda *x: triton_projection(*x)[0], inputs((5,), 12, 20, torch.float32), [0, 2], [0, 1, 2])


def test_autocast():
    """Also with inputs of mixed dtypes: a float32 residual keeps its precision, and then so does the result."""
    harness.check_autocast(projection, plain_projection, inputs((9,), 24, 40, torch.float32), [0, 1, 2])
    x, weight, residual = inputs((9,), 24, 40, torch.float32)
    branch = projection(x.bfloat16(), weight.bfloat16())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(projection(x, weight), branch)
        assert torch.equal(projection(x, weight, residual), residual + branch)


def test_every_launch_configuration():
    x, weight, residual = inputs((40,), 96, 64, torch.bfloat16)
    true = residual.double() + x.double() @ weight.double().t()
    for parameters in FILE.KERNELS[0].space:
        if GPU or not ("STAGES" in parameters or parameters.get("TMA") or parameters.get("num_stages", 3) == 4):
            y, rstd = FILE.add_residual("output_projection", x, weight, residual, parameters)
            assert float((y - true).norm() / true.norm()) < 5e-3, parameters
            torch.testing.assert_close(rstd, reference.with_rstd(y)[1])


def test_offsets_are_int64():
    assert narrow_offsets("output_projection") == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    """In compiled code torch computes the input's gradient, so that it does here in eager code too."""
    given_ = inputs((2, 5), 24, 16, dtype)
    with harness.products_with(product_configurations.BY_TORCH):
        # Inductor adds a product to the sum of gradients in one operation
        check_compiled(lambda *x: triton_projection(*x)[0], given_, [0, 1, 2], units=2.0, is_opaque=True)
        check_compiled(lambda *x: triton_projection(*x)[0], given_[:2], [0, 1], units=2.0, is_opaque=True)


def test_the_product_is_opaque_to_the_compiler():
    given_ = inputs((2, 5), 24, 16, torch.bfloat16, layouts=("transposed",) * 3)
    operation = torch.ops.nanochat_kernels.output_projection_forward
    harness.check_opaque(operation, *given_)
    harness.check_opaque(operation, *given_[:2], None)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(lambda *x: triton_projection(*x)[0], inputs((64,), 512, 128, torch.bfloat16), [0, 1, 2])


def test_another_device():
    harness.check_other_device(lambda *x: triton_projection(*x)[0], inputs((64,), 512, 128, torch.bfloat16), [0, 1, 2])


def test_bad_input():
    x, weight, residual = inputs((5,), 16, 8, torch.float32)
    buffer = torch.zeros(16, 8, device=DEVICE)

    def raises(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.output_projection(*arguments, **more)

    raises(ValueError, r"weight must have shape \(C, 8\)", x, weight.t())
    raises(TypeError, "weight is torch.float16 but x is torch.float32", x, weight.half())
    raises(ValueError, "weight is on meta but x is on", x, weight.to("meta"))
    raises(TypeError, "x must be floating point", x.int(), weight.int())
    raises(ValueError, r"residual must have shape \(5, 16\)", x, weight, residual[:4])
    raises(ValueError, r"residual must have shape \(5, 16\)", x, weight, x)
    raises(TypeError, "residual is torch.bfloat16 but x is torch.float32", x, weight, residual.bfloat16())
    raises(ValueError, "residual is on meta but x is on", x, weight, residual.to("meta"))
    raises(ValueError, r"weight_gradient must have shape \(16, 8\)", x, weight, None, buffer[:3])
    raises(TypeError, "weight_gradient must be contiguous float32", x, weight, None, buffer.half())
    raises(TypeError, "contiguous float32, got .* strides", x, weight, None, torch.zeros(8, 16, device=DEVICE).t())
    raises(kernels.KernelRequestError, "float64", x.double(), weight.double(), impl="triton")
    raises(kernels.KernelRequestError, "impl='unfused' does not exist", x, weight, impl="unfused")
    many, one = torch.zeros(1, 1, device=DEVICE).expand(2**31, 1), torch.zeros(1, 1, device=DEVICE)
    raises(kernels.KernelRequestError, "rows exceed the 2147483647 of one product", many, one, impl="triton")


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_to_sum(impl, dtype, monkeypatch):
    monkeypatch.setattr(
        matrix_product, "launch_parameters", lambda *_: harness.SMALL_TILES | {"SUMS": 2}
    )  # as tables have for few rows
    monkeypatch.setattr(matrix_product, "FEWEST_ROWS", 256)
    residual = randn(2, 3, 16, dtype=dtype)
    x, weight = torch.zeros(2, 3, 0, dtype=dtype, device=DEVICE), torch.zeros(16, 0, dtype=dtype, device=DEVICE)
    assert torch.equal(kernels.output_projection(x, weight, residual, impl=impl)[0], residual)
    x, weight = randn(2, 3, 16, dtype=dtype), torch.zeros(0, 16, dtype=dtype, device=DEVICE)
    y, rstd = kernels.output_projection(x, weight, x[..., :0], impl=impl)
    assert y.shape == (2, 3, 0) and rstd.shape[:2] == (2, 3)


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "gradient of the weight for the residual alone": ("output_projection", "if not any(needed):", "if False:",
     "test_the_buffer_stays_untouched_where_no_input_requires_a_gradient"),
    "residual not added": ("folded_norm", "sums += residual.to(tl.float32)", "sums += 0 * residual.to(tl.float32)",
     "test_output_projection"),
    "stride of the residual ignored": ("folded_norm", "residual_ptr, residual_stride, row", "residual_ptr, out_stride, row",
     "test_output_projection"),
    "squares of the sums before they are rounded": (
        "folded_norm", "_, value = round_both(sums, out_ptr.dtype.element_ty)", "value = sums", "test_output_projection",
    ),
    "squares of padding": ("folded_norm", "    if not WHOLE:", "    if False:", "test_nan_and_infinity"),
    "mean over the wrong width": ("folded_norm", "else finish(squares, shape[1])", "else finish(squares, shape[2])",
     "test_output_projection"),
    "a slice of K dropped": (
        "matrix_product", "tl.static_range(1, SLICES)", "tl.static_range(1, SLICES - 1)", "test_output_projection",
    ),
    "a slice of K begins at another's": (
        "matrix_product", "first_k = tl.program_id(1) * SLICE", "first_k = 0", "test_output_projection",
    ),
    "the mean of a whole row over its padding": (
        "folded_norm", "rsqrt(squares / width + EPS)", "rsqrt(squares / sums.shape[1] + EPS)", "test_output_projection",
    ),
    "eps dropped": ("folded_norm", "value = rsqrt(total / WIDTH + EPS)", "value = rsqrt(total / WIDTH)",
     "test_rstd_of_zero_rows"),
    "last part of the row sums dropped": ("folded_norm", "& (start + i < parts)", "& (start + i < parts - 1)",
     "test_output_projection"),
    "last row of the sums dropped": (
        "matrix_product", "mask=(r < m) & (column < n)", "mask=(r < m - 1) & (column < n)", "test_output_projection",
    ),
    "gradient of the residual dropped": ("output_projection", "*gradients, dy if needed[2] else None, None",
     "*gradients, None, None", "test_output_projection"),
    "buffer overwritten": (
        "output_projection", "add_product(weight_gradient, upstream, rows)", "weight_gradient.copy_(upstream.t() @ rows)",
        "test_the_gradient_is_added_to_the_buffer",
    ),
    "rstd of the branch under autocast": (
        "output_projection", "reference.with_rstd(residual + y)", "(residual + y, rstd)", "test_autocast",
    ),
    "part's place in the row sums in 32 bits": (
        "matrix_product", "tl.cast(column // PART, tl.int64) * m", "column // PART * m", "test_offsets_are_int64",
    ),
}  # fmt: skip
