"""relu2_mlp in Triton against the reference."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from tests.kernels import harness
from tests.kernels.harness import DEVICE, GPU, check, check_compiled, check_graph_replay, randn

FILE = importlib.import_module("nanochat_kernels.relu2_mlp")
DTYPES = FILE.RANGED_DTYPES
PLANTED_FAULTS = {
    "relu2's last block not masked": (
        "relu2_mlp",
        "mask=offsets < size, other=0.0).to(tl.float32)\n    relu",
        "mask=offsets < size - 1, other=0.0).to(tl.float32)\n    relu",
        "test_relu2_mlp",
    ),
    "negative hidden activations squared": ("relu2_mlp", "tl.where(z < 0.0, 0.0, z)", "z", "test_relu2_mlp"),
    "relu2 drops NaN": ("relu2_mlp", "tl.where(z < 0.0, 0.0, z)", "tl.where(z > 0.0, z, 0.0)", "test_nan_and_infinity"),
    "derivative of relu2 without the root": ("relu2_mlp", "2.0 * tl.sqrt_rn(h)", "2.0 * h", "test_relu2_mlp"),
    "gradient of relu2 where relu is 0": (
        "relu2_mlp",
        "tl.where(h == 0.0, 0.0, dh",
        "tl.where(h == 1e30, 0.0, dh",
        "test_nan_and_infinity",
    ),
    "up gradient not added": (
        "relu2_mlp",
        "add_product(up_gradient, dz, rows)",
        "up_gradient.copy_(dz.t() @ rows)",
        "test_gradients_are_added_to_buffers",
    ),
    "32-bit offsets of hidden activations": (
        "relu2_mlp",
        "tl.program_id(0).to(tl.int64) * BLOCK",
        "tl.program_id(0) * BLOCK",
        "test_offsets_are_64_bits_wide",
    ),
    "a weight gradient in 16 bits": (
        "linear",
        "    if x.dtype == gradient.dtype:\n",
        "    if True:\n        gradient += (dy.t() @ x).to(gradient.dtype)\n    elif x.dtype == gradient.dtype:\n",
        "test_a_weight_gradient_is_summed_in_float32",
    ),
}


def mlp(*arguments):
    return kernels.relu2_mlp(*arguments, impl="triton")


def inputs(rows, width, hidden, dtype, seed=0, layouts=("contiguous",) * 3):
    x = randn(*rows, width, dtype=dtype, seed=seed, layout=layouts[0])
    w_up = randn(hidden, width, dtype=dtype, seed=seed + 1, layout=layouts[1]).mul_(width**-0.5)
    w_down = randn(width, hidden, dtype=dtype, seed=seed + 2, layout=layouts[2]).mul_(hidden**-0.5)
    return [x, w_up, w_down]


@harness.property_test
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    width=st.integers(16, 40),
    hidden=st.integers(16, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(harness.layouts, harness.layouts, harness.layouts),
    seed=harness.seeds,
)
def test_relu2_mlp(rows, width, hidden, dtype, layouts, seed):
    check(mlp, reference.relu2_mlp, inputs(rows, width, hidden, dtype, seed, layouts), [0, 1, 2], seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (1, 9), (5, 1), (3, 7)])
def test_narrow_layers(width, hidden, dtype):
    """The error is within a few units of the largest element: in so few elements the reference's own errors may cancel by chance."""
    given_ = inputs((7,), width, hidden, dtype)
    dy = randn(7, width, dtype=dtype, seed=9)
    found = harness.evaluate(mlp, given_, [dy], [0, 1, 2])
    exact = harness.evaluate(reference.relu2_mlp, [x.double() for x in given_], [dy.double()], [0, 1, 2])
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max()) <= 4 * torch.finfo(dtype).eps * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1280] if GPU else [64])
def test_model_widths(width, dtype):
    rows = (2, 1023) if GPU else (2, 17)
    check(mlp, reference.relu2_mlp, inputs(rows, width, 4 * width, dtype), [0, 1, 2])


@pytest.mark.parametrize("wrt", [[0], [1], [2], [0, 2], [1, 2]])
def test_only_the_gradients_that_are_asked_for(wrt):
    check(mlp, reference.relu2_mlp, inputs((5,), 12, 20, torch.float32), wrt)


def test_nan_and_infinity():
    harness.check_nonfinite(mlp, reference.relu2_mlp, inputs((5,), 12, 20, torch.float32), [0, 1, 2])


def test_a_zero_activation_gives_no_gradient_for_any_upstream_gradient():
    x, w_up, w_down = inputs((6,), 8, 16, torch.float32)
    (dx,) = torch.autograd.grad(
        mlp(x.requires_grad_(), -w_up.abs() * x.detach().sign()[0], w_down), x, torch.ones(6, 8, device=DEVICE)
    )
    assert not dx[0].any()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_to_buffers(impl, dtype):
    """Two calls add both gradients to the buffers' contents in float32, and the weights themselves get no gradient."""
    x, w_up, w_down = inputs((40,), 24, 56, dtype)
    up, down = torch.ones(56, 24, device=DEVICE), torch.full((24, 56), -2.0, device=DEVICE)
    exact_up, exact_down = up.double(), down.double()
    weights = [w.requires_grad_() for w in (w_up, w_down)]
    for seed in (5, 6):
        x = randn(40, 24, dtype=dtype, seed=seed).requires_grad_()
        dy = randn(40, 24, dtype=dtype, seed=seed + 10)
        kernels.relu2_mlp(x, *weights, up, down, impl=impl).backward(dy)
        exact = [t.detach().double() for t in (x, w_up, w_down)]
        _, dx, du, dd = harness.evaluate(reference.relu2_mlp, exact, [dy.double()], [0, 1, 2])
        exact_up, exact_down = exact_up + du, exact_down + dd
        torch.testing.assert_close(x.grad, dx.to(dtype), rtol=2e-2, atol=2e-2)
    assert w_up.grad is None and w_down.grad is None
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for found, true in ((up, exact_up), (down, exact_down)):
        assert float((found - true).norm() / true.norm()) < tolerance


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_buffers_stay_untouched_where_no_input_requires_a_gradient(impl):
    x, w_up, w_down = inputs((5,), 12, 20, torch.float32)
    up, down = torch.zeros(20, 12, device=DEVICE), torch.zeros(12, 20, device=DEVICE)
    assert not kernels.relu2_mlp(x, w_up, w_down, up, down, impl=impl).requires_grad
    for i in range(3):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, w_up, w_down))]
        up.zero_(), down.zero_()
        kernels.relu2_mlp(*leaves, up, down, impl=impl).sum().backward()
        # the reference's first product has no backward where its operands require no gradient
        assert down.any() and (up.any() or (impl == "reference" and i == 2))


def test_a_weight_gradient_is_summed_in_float32():
    """Neither the sum of the products, 1023/1024, nor 4096 plus it is a bfloat16 number, and each product is far below its unit."""
    x = torch.ones(1023, 8, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight, buffer = torch.ones(8, 8, device=DEVICE, dtype=torch.bfloat16), torch.full((8, 8), 4096.0, device=DEVICE)
    kernels.linear(x, weight, buffer).backward(torch.full((1023, 8), 2.0**-10, device=DEVICE, dtype=torch.bfloat16))
    assert (buffer == 4096 + 1023 / 1024).all()


def test_linear_equals_torch_s():
    x, w, _ = inputs((2, 5), 12, 20, torch.float32)
    assert torch.equal(kernels.linear(x, w), torch.nn.functional.linear(x, w))
    buffer = torch.zeros(20, 12, device=DEVICE)
    dy = randn(2, 5, 20, dtype=torch.float32, seed=3)
    _, dx, dw = harness.evaluate(reference_linear, [x, w], [dy], [0, 1])
    x.requires_grad_()
    kernels.linear(x, w, buffer).backward(dy)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(buffer, dw)


def reference_linear(x, w):
    return torch.nn.functional.linear(x, w)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_batch(shape):
    w_up, w_down = (torch.ones(*size, device=DEVICE) for size in ((16, 8), (8, 16)))
    check(mlp, reference.relu2_mlp, [torch.empty(shape, device=DEVICE), w_up, w_down], [0, 1, 2])


def test_derivatives_that_do_not_exist_raise():
    given_ = inputs((5,), 12, 20, torch.float32)
    harness.check_second_derivative_raises(mlp, given_, [0, 1, 2])
    harness.check_jvp_raises(mlp, given_, [0])


def test_vmap():
    harness.check_vmap(mlp, inputs((5,), 12, 20, torch.float32), [0], [0, 1, 2])


@pytest.mark.parametrize("mixed", [0, 1, 2, None])
def test_autocast(mixed):
    """The result has the plain operation's dtype and is bitwise that of inputs in autocast's dtype."""
    given_ = inputs((5,), 12, 20, torch.float32)
    given_ = [x.bfloat16() if i == mixed else x for i, x in enumerate(given_)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found, plain = mlp(*given_), reference.relu2_mlp(*given_)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(found, mlp(*(x.bfloat16() for x in given_)))


@pytest.mark.parametrize("kernel", FILE.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    z, dh = (randn(3, 5000, dtype=torch.float32, seed=i) for i in range(2))
    h = z.clamp(min=0).square()
    for parameters in kernel.space:
        if kernel.name == "relu2":
            torch.testing.assert_close(FILE.relu2_(z.clone(), parameters), h)
        else:
            torch.testing.assert_close(FILE.relu2_backward_(dh.clone(), h, parameters), dh * 2 * z.clamp(min=0))


def test_offsets_are_64_bits_wide():
    harness.assert_64_bit_offsets(*FILE.KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    check_compiled(mlp, inputs((5,), 16, 32, dtype), [0, 1, 2])


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(mlp, inputs((64,), 128, 512, torch.bfloat16), [0, 1, 2])


def test_another_device():
    harness.check_other_device(mlp, inputs((64,), 128, 512, torch.bfloat16), [0, 1, 2])


def test_bad_input():
    x, w_up, w_down = inputs((5,), 8, 16, torch.float32)

    def raises(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.relu2_mlp(*arguments, **more)

    raises(ValueError, r"w_up must have shape \(F, 8\)", x, w_down, w_down)
    raises(ValueError, r"w_down must have shape \(8, 16\)", x, w_up, w_up)
    raises(TypeError, "w_down is torch.float16 but x is torch.float32", x, w_up, w_down.half())
    raises(ValueError, r"up_gradient must have shape \(16, 8\)", x, w_up, w_down, torch.zeros(8, 16, device=DEVICE))
    raises(
        TypeError,
        "down_gradient must be contiguous float32",
        x,
        w_up,
        w_down,
        None,
        torch.zeros(8, 16, device=DEVICE).half(),
    )
    raises(TypeError, "contiguous float32, got .* strides", x, w_up, w_down, torch.zeros(8, 16, device=DEVICE).t())
    halves = (x.half(), w_up.half(), w_down.half())
    raises(kernels.KernelRequestError, "float16 cannot hold relu", *halves, impl="triton")
    raises(kernels.KernelRequestError, "float64", x.double(), w_up.double(), w_down.double(), impl="triton")
