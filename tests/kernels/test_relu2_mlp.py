"""relu2_mlp in Triton against the reference."""

import importlib
import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from tests.kernels import harness
from tests.kernels.harness import DEVICE, GPU, check, check_compiled, check_graph_replay, randn
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.relu2_mlp")
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True, scope="module")
def small_products():
    with harness.products_with(harness.PRODUCTS[0]):
        yield


def triton_mlp(*arguments):
    return kernels.relu2_mlp(*arguments, impl="triton")


def mlp(*arguments):
    """The first result of the fused operation. The second one must be the factors of its rows."""
    y, rstd = triton_mlp(*arguments)
    exact = reference.with_rstd(y.double())[1]
    assert rstd.dtype == torch.float32 and not rstd.requires_grad
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0.0, equal_nan=True)
    return y


def plain_mlp(x, w_up, w_down, residual=None, rstd=None):
    return reference.relu2_mlp(x, w_up, w_down, residual)[0]


def onto_itself(function):
    """The function with x as the residual, the call of the model."""
    return lambda x, *others: function(x, *others, x)


def inputs(rows, width, hidden, dtype, seed=0, layouts=("contiguous",) * 4):
    """Return x, w_up, w_down and a residual."""
    x = randn(*rows, width, dtype=dtype, seed=seed, layout=layouts[0])
    w_up = randn(hidden, width, dtype=dtype, seed=seed + 1, layout=layouts[1]).mul_(width**-0.5)
    w_down = randn(width, hidden, dtype=dtype, seed=seed + 2, layout=layouts[2]).mul_(hidden**-0.5)
    return [x, w_up, w_down, randn(*rows, width, dtype=dtype, seed=seed + 3, layout=layouts[3])]


@harness.property_test
@example(
    rows=[5, 9], width=40, hidden=50, dtype=torch.bfloat16, layouts=("slice", "transposed", "slice", "slice"),
    residual="another", parameters=harness.PRODUCTS[0], seed=1,
)  # fmt: skip
@example(
    rows=[9], width=33, hidden=48, dtype=torch.float32, layouts=("columns",) * 4, residual="x",
    parameters=harness.PRODUCTS[1], seed=2,
)  # fmt: skip
@given(
    rows=st.lists(st.integers(4, 9), min_size=1, max_size=2), width=st.integers(16, 40), hidden=st.integers(16, 50),
    dtype=st.sampled_from(DTYPES), layouts=st.tuples(*[harness.layouts] * 4),
    residual=st.sampled_from(("none", "x", "another")), parameters=harness.products, seed=harness.seeds,
)  # fmt: skip
def test_relu2_mlp(rows, width, hidden, dtype, layouts, residual, parameters, seed):
    """relu² doubles the relative error of a row's factor, which few rows have in common with the reference's."""
    given_ = inputs(rows, width, hidden, dtype, seed, layouts)
    functions, count = {
        "x": ((onto_itself(mlp), onto_itself(plain_mlp)), 3),
        "none": ((mlp, plain_mlp), 3),
        "another": ((mlp, plain_mlp), 4),
    }[residual]
    with harness.products_with(parameters):
        check(*functions, given_[:count], range(count), seed, epsilon=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (1, 9), (5, 1), (3, 7)])
def test_narrow_layers(width, hidden, dtype):
    """The error is within a few units of the largest element: in so few elements the reference's own errors may cancel by chance.

    In rows of one element the two terms of x's gradient, which are as large as rstd, cancel.
    """
    given_ = inputs((7,), width, hidden, dtype)
    dy = randn(7, width, dtype=dtype, seed=9)
    found = harness.evaluate(mlp, given_, [dy], [0, 1, 2])
    exact = harness.evaluate(plain_mlp, [x.double() for x in given_], [dy.double()], [0, 1, 2])
    largest = float(reference.with_rstd(given_[0])[1].max())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max()) <= 4 * torch.finfo(dtype).eps * max(float(b.abs().max()), largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1280] if GPU else [48])
def test_model_widths(width, dtype):
    rows = (2, 1023) if GPU else (2, 7)
    check(onto_itself(mlp), onto_itself(plain_mlp), inputs(rows, width, 4 * width, dtype)[:3], [0, 1, 2])


@pytest.mark.parametrize("wrt", [[0], [1], [2], [3], [0, 2], [1, 2], [0, 3]])
def test_only_the_gradients_that_are_asked_for(wrt):
    check(mlp, plain_mlp, inputs((5,), 12, 20, torch.float32), wrt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_x_as_the_residual_is_the_sum_of_both(dtype):
    """The product of x's gradient adds dy itself: the result is that of a separate addition, or rounded once less."""
    given_, dy = inputs((3, 7), 24, 56, dtype)[:3], randn(3, 7, 24, dtype=dtype, seed=9)
    (whole,) = harness.evaluate(onto_itself(mlp), given_, [dy], [0])[1:]
    dx, dresidual = harness.evaluate(mlp, [*given_, given_[0].clone()], [dy], [0, 3])[1:]
    assert torch.equal(dresidual, dy)
    # a 16-bit dx is rounded before it is added
    torch.testing.assert_close(whole, dx + dy, **({"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rstd_of_x_may_be_given(dtype):
    """It is used and not computed: a factor of half the size gives half of norm(x), and its gradient."""
    x, w_up, w_down, _ = inputs((3, 7), 24, 56, dtype)
    rstd = reference.with_rstd(x)[1]
    dy = randn(3, 7, 24, dtype=dtype, seed=9)
    without, given_ = (harness.evaluate(mlp, [x, w_up, w_down, None, r], [dy], [0, 1, 2]) for r in (None, rstd))
    for a, b in zip(without, given_, strict=True):
        torch.testing.assert_close(a, b)
    strided = torch.stack([rstd, rstd], -1)[..., 0]
    assert not strided.is_contiguous() and harness.same(mlp(x, w_up, w_down, None, strided), given_[0])
    torch.testing.assert_close(mlp(x, w_up, w_down, None, rstd / 2), given_[0] / 4)


@harness.property_test
@given(exponent=st.integers(-6, 6), dtype=st.sampled_from(DTYPES), seed=harness.seeds)
def test_the_branch_ignores_the_scale_of_x(exponent, dtype, seed):
    """Norm ignores it but for eps, which is far below the squares here."""
    x, w_up, w_down, _ = inputs((5,), 24, 40, dtype, seed)
    x = x + 2 * x.sign()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(mlp(2.0**exponent * x, w_up, w_down), mlp(x, w_up, w_down), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    harness.check_nonfinite(mlp, plain_mlp, inputs((5,), 12, 20, dtype), [0, 1, 2, 3])


def test_a_zero_activation_gives_no_gradient_for_any_upstream_gradient():
    x, w_up, w_down, _ = inputs((6,), 8, 16, torch.float32)
    (dx,) = torch.autograd.grad(
        mlp(x.requires_grad_(), -w_up.abs() * x.detach().sign()[0], w_down), x, torch.ones(6, 8, device=DEVICE)
    )
    assert not dx[0].any()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_added_to_buffers(impl, dtype):
    """Two calls add both gradients to the buffers' contents in float32, and the weights themselves get no gradient."""
    _, w_up, w_down, _ = inputs((40,), 24, 56, dtype)
    up, down = torch.ones(56, 24, device=DEVICE), torch.full((24, 56), -2.0, device=DEVICE)
    exact_up, exact_down = up.double(), down.double()
    weights = [w.requires_grad_() for w in (w_up, w_down)]
    for seed in (5, 6):
        x = randn(40, 24, dtype=dtype, seed=seed).requires_grad_()
        dy = randn(40, 24, dtype=dtype, seed=seed + 10)
        kernels.relu2_mlp(x, *weights, x, None, up, down, impl=impl)[0].backward(dy)
        exact = [t.detach().double() for t in (x, w_up, w_down)]
        _, dx, du, dd = harness.evaluate(onto_itself(plain_mlp), exact, [dy.double()], [0, 1, 2])
        exact_up, exact_down = exact_up + du, exact_down + dd
        torch.testing.assert_close(x.grad, dx.to(dtype), rtol=2e-2, atol=2e-2)
    assert w_up.grad is None and w_down.grad is None
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for found, true in ((up, exact_up), (down, exact_down)):
        assert float((found - true).norm() / true.norm()) < tolerance


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_buffers_stay_untouched_where_no_input_requires_a_gradient(impl):
    x, w_up, w_down, _ = inputs((5,), 12, 20, torch.float32)
    up, down = torch.zeros(20, 12, device=DEVICE), torch.zeros(12, 20, device=DEVICE)
    assert not kernels.relu2_mlp(x, w_up, w_down, x, None, up, down, impl=impl)[0].requires_grad
    residual = x.clone().requires_grad_()
    kernels.relu2_mlp(x, w_up, w_down, residual, None, up, down, impl=impl)[0].sum().backward()
    assert not up.any() and not down.any() and bool((residual.grad == 1.0).all())
    for i in range(3):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, w_up, w_down))]
        up.zero_(), down.zero_()
        kernels.relu2_mlp(*leaves, None, None, up, down, impl=impl)[0].sum().backward()
        # the reference's first product has no backward where its operands require no gradient
        assert down.any() and (up.any() or (impl == "reference" and i == 2))
    up.zero_(), down.zero_()
    with torch.no_grad():
        kernels.relu2_mlp(*leaves, x, None, up, down, impl=impl)
    assert not up.any() and not down.any()


def test_one_buffer_alone():
    x, w_up, w_down, _ = inputs((5,), 12, 20, torch.float32)
    dy = randn(5, 12, dtype=torch.float32, seed=9)
    _, du, dd = harness.evaluate(plain_mlp, [x, w_up, w_down], [dy], [1, 2])
    up, down = torch.ones(20, 12, device=DEVICE), torch.ones(12, 20, device=DEVICE)
    for buffers, position in (((up, None), 2), ((None, down), 1)):
        leaves = [x, w_up.clone().requires_grad_(), w_down.clone().requires_grad_()]
        triton_mlp(*leaves, None, None, *buffers)[0].backward(dy)
        torch.testing.assert_close(leaves[position].grad, (None, du, dd)[position])
        assert leaves[3 - position].grad is None
    torch.testing.assert_close((up, down), (1 + du, 1 + dd))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batch(shape, dtype):
    w_up, w_down = (torch.ones(*size, device=DEVICE, dtype=dtype) for size in ((16, 8), (8, 16)))
    x = torch.empty(shape, device=DEVICE, dtype=dtype)
    check(mlp, plain_mlp, [x, w_up, w_down], [0, 1, 2])
    check(onto_itself(mlp), onto_itself(plain_mlp), [x, w_up, w_down], [0, 1, 2])


def test_derivatives_that_do_not_exist_raise():
    given_ = inputs((5,), 12, 20, torch.float32)
    harness.check_second_derivative_raises(mlp, given_, [0, 1, 2, 3])
    harness.check_jvp_raises(mlp, given_, [0])


def test_vmap():
    given_ = inputs((5,), 12, 20, torch.float32)
    harness.check_vmap(lambda *x: triton_mlp(*x)[0], given_, [0], [0, 1, 2])
    harness.check_vmap(lambda *x: triton_mlp(*x)[0], given_, [0, 3], [0, 1, 2, 3])


@pytest.mark.parametrize("mixed", [0, 1, 2, 3, None])
def test_autocast(mixed):
    """The result has the plain operation's dtype, and that of inputs in autocast's dtype: a float32 residual keeps its precision."""
    given_ = inputs((5,), 12, 20, torch.float32)
    given_ = [x.bfloat16() if i == mixed else x for i, x in enumerate(given_)]
    narrow = [x.bfloat16() for x in given_]
    branch = triton_mlp(*narrow[:3])[0]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for function in (lambda f, x: f(*x), lambda f, x: onto_itself(f)(*x[:3]), lambda f, x: f(*x[:3])):
            found, plain = function(mlp, given_), function(plain_mlp, given_)
            assert found.dtype == plain.dtype
            torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-2)
        assert torch.equal(found, branch)
        if given_[3].dtype == torch.float32:
            assert torch.equal(mlp(*given_), given_[3] + branch)
        check_gradients_under_autocast(given_)


def check_gradients_under_autocast(given_):
    dy = randn(5, 12, dtype=torch.float32, seed=9)
    for function, number in ((lambda f: f, 4), (onto_itself, 3)):
        leaves = given_[:number], [x.double() for x in given_[:number]]
        y = function(plain_mlp)(*leaves[0])
        found = harness.evaluate(function(mlp), leaves[0], [dy.to(y.dtype)], range(number))
        with torch.autocast(DEVICE, enabled=False):
            exact = harness.evaluate(function(plain_mlp), leaves[1], [dy.double()], range(number))
        for a, b, x in zip(found[1:], exact[1:], leaves[0], strict=True):
            assert a.dtype == x.dtype and float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize(
    "kernel", [kernel for kernel in FILE.KERNELS if kernel.is_compute_bound], ids=lambda kernel: kernel.name
)
def test_every_launch_configuration(kernel):
    """Only those with small tiles on a CPU, where a large tile takes long."""
    x, w_up, w_down, residual = inputs((40,), 64, 96, torch.bfloat16)
    rstd, h = reference.with_rstd(x)[1], (x @ w_up.t()).relu().square()
    exact = [t.double() for t in (x, w_up, w_down, residual, h, rstd)]
    for parameters in kernel.space:
        if not GPU and ("STAGES" in parameters or parameters.get("TMA") or parameters.get("num_stages", 3) == 4):
            continue
        found = launched(kernel.name, parameters, x, w_up, w_down, residual, h, rstd)
        true = launched_by_torch(kernel.name, *exact)
        assert float((found - true).norm() / true.norm()) < 5e-3, parameters


def launched(name, parameters, x, w_up, w_down, residual, h, rstd):
    if name == "relu2_mlp_up":
        return FILE.up(x, w_up, rstd, parameters)
    if name == "relu2_mlp_down":
        return FILE.add_residual(name, h, w_down, residual, parameters)[0]
    if name == "relu2_mlp_hidden_gradient":
        return FILE.hidden_gradient(residual, w_down, h, rstd, parameters)[0]
    return FILE.input_gradient(name, h, w_up, x, rstd, residual, parameters)


def launched_by_torch(name, x, w_up, w_down, residual, h, rstd):
    if name == "relu2_mlp_up":
        return (rstd[:, None] * (x @ w_up.t())).relu().square()
    if name == "relu2_mlp_down":
        return residual + h @ w_down.t()
    if name == "relu2_mlp_hidden_gradient":
        return rstd[:, None] * 2 * h.sqrt() * (residual @ w_down)
    return h @ w_up - rstd[:, None] * x + residual


def test_offsets_are_int64():
    assert narrow_offsets(*(kernel.name for kernel in FILE.KERNELS)) == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    given_ = inputs((2, 5), 16, 32, dtype)
    # Inductor adds a product to the sum of gradients in one operation
    check_compiled(with_rstd_of_torch, given_, [0, 1, 2, 3], units=2.0, is_opaque=True)
    check_compiled(onto_itself(with_rstd_of_torch), given_[:3], [0, 1, 2], units=2.0, is_opaque=True)


def with_rstd_of_torch(x, w_up, w_down, residual):
    """The kernel that computes rstd is traced, which an interpreted kernel cannot be."""
    return triton_mlp(x, w_up, w_down, residual, None if GPU else reference.with_rstd(x)[1])[0]


def test_products_are_opaque_to_the_compiler():
    """Each has, without running, results of the shapes, strides and dtypes that it returns."""
    x, w_up, w_down, residual = inputs((2, 5), 16, 32, torch.bfloat16, layouts=("transposed", *["contiguous"] * 3))
    rstd, operations = torch.ones(10, device=DEVICE), torch.ops.nanochat_kernels
    *_, h = harness.check_opaque(operations.relu2_mlp_forward, x, w_up, w_down, residual, rstd)
    for needs_dx, is_residual in itertools.product((False, True), repeat=2):
        harness.check_opaque(operations.relu2_mlp_backward, x, x, w_up, w_down, h, rstd, needs_dx, is_residual)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(onto_itself(triton_mlp), inputs((64,), 128, 512, torch.bfloat16)[:3], [0, 1, 2])


def test_another_device():
    harness.check_other_device(triton_mlp, inputs((64,), 128, 512, torch.bfloat16), [0, 1, 2, 3])


def test_bad_input():
    x, w_up, w_down, residual = inputs((5,), 8, 16, torch.float32)
    buffer = torch.zeros(8, 16, device=DEVICE)

    def raises(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.relu2_mlp(*arguments, **more)

    raises(ValueError, r"w_up must have shape \(F, 8\)", x, w_down, w_down)
    raises(ValueError, r"w_down must have shape \(8, 16\)", x, w_up, w_up)
    raises(TypeError, "w_down is torch.float16 but x is torch.float32", x, w_up, w_down.half())
    raises(ValueError, r"residual must have shape \(5, 8\)", x, w_up, w_down, residual[:4])
    raises(TypeError, "residual is torch.bfloat16 but x is torch.float32", x, w_up, w_down, residual.bfloat16())
    raises(ValueError, "residual is on meta but x is on", x, w_up, w_down, residual.to("meta"))
    raises(ValueError, r"rstd must have shape \(5\)", x, w_up, w_down, x, torch.ones(5, 1, device=DEVICE))
    raises(TypeError, "rstd must be torch.float32, got torch.bfloat16", x, w_up, w_down, x, x[:, 0].bfloat16())
    raises(ValueError, r"up_gradient must have shape \(16, 8\)", x, w_up, w_down, x, None, buffer)
    raises(TypeError, "down_gradient must be contiguous float32", x, w_up, w_down, x, None, None, buffer.half())
    raises(TypeError, "contiguous float32, got .* strides", x, w_up, w_down, x, None, buffer.t())
    halves = (x.half(), w_up.half(), w_down.half())
    raises(kernels.KernelRequestError, "float16 cannot hold relu", *halves, impl="triton")
    raises(kernels.KernelRequestError, "a weight without elements", x, w_up[:0], w_down[:, :0], impl="triton")
    raises(kernels.KernelRequestError, "float64", x.double(), w_up.double(), w_down.double(), impl="triton")
    many, one = torch.zeros(1, 1, device=DEVICE).expand(2**31, 1), torch.zeros(1, 1, device=DEVICE)
    raises(kernels.KernelRequestError, "rows exceed the 2147483647 of one product", many, one, one, impl="triton")


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "negative hidden activations squared": ("relu2_mlp", "tl.where(z < 0.0, 0.0, z)", "z", "test_relu2_mlp"),
    "relu2 drops NaN": ("relu2_mlp", "tl.where(z < 0.0, 0.0, z)", "tl.where(z > 0.0, z, 0.0)", "test_nan_and_infinity"),
    "rstd not applied to the hidden activations": (
        "relu2_mlp", "z = sums * load_rows(arguments[0], row, m, sums.shape[0])[:, None]", "z = sums", "test_relu2_mlp",
    ),
    "rstd not applied in backward": (
        "relu2_mlp", "dz * load_rows(rstd_ptr, row, m, dh.shape[0])[:, None]", "dz", "test_relu2_mlp",
    ),
    "derivative of relu2 without the root": ("relu2_mlp", "dz = dh * root", "dz = dh * h", "test_relu2_mlp"),
    "gradient of relu2 where relu is 0": (
        "relu2_mlp", "tl.where(h == 0.0, 0.0, 2.0 * dh)", "2.0 * dh", "test_nan_and_infinity",
    ),
    "row sums of dz and z halved": ("relu2_mlp", "tl.sum(dh * h, axis=1)", "tl.sum(0.5 * dh * h, axis=1)", "test_relu2_mlp"),
    "given rstd ignored": ("relu2_mlp", "if rstd is None else rstd.reshape(-1).contiguous()", "",
     "test_rstd_of_x_may_be_given"),
    "given rstd taken as contiguous": ("relu2_mlp", "rstd.reshape(-1).contiguous()", "rstd", "test_rstd_of_x_may_be_given"),
    "gradient of x as the residual dropped": (
        "relu2_mlp", "residual = upstream if is_residual else None", "residual = None",
        "test_the_gradient_of_x_as_the_residual_is_the_sum_of_both",
    ),
    "gradient of another residual dropped": ("relu2_mlp", "*gradients, dy if needed[3] else None", "*gradients, None",
     "test_relu2_mlp"),
    "rstd of the branch under autocast": ("relu2_mlp", "return reference.with_rstd(residual + y)", "return residual + y, y_rstd",
     "test_autocast"),
    "x as the residual cast under autocast": (
        "relu2_mlp", "    x, w_up, w_down = autocast_products(x, w_up, w_down)\n",
        "    is_residual = residual is x\n    x, w_up, w_down = autocast_products(x, w_up, w_down)\n"
        "    residual = x if is_residual else residual\n", "test_autocast",
    ),
    "up gradient not added": ("relu2_mlp", "add_product(up_gradient, dz, rows)", "up_gradient.copy_(dz.t() @ rows)",
     "test_gradients_are_added_to_buffers"),
    "gradients of weights for the residual alone": ("relu2_mlp", "if not any(needed):", "if False:",
     "test_buffers_stay_untouched_where_no_input_requires_a_gradient"),
    "torch.compile told another shape": ("relu2_mlp", "x.new_empty(x.shape if needs_dx else 0)", "x.new_empty(x.shape)",
     "test_products_are_opaque_to_the_compiler"),
}  # fmt: skip
