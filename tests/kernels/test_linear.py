"""linear, whose backward adds the weight's gradient to a buffer."""

import torch

import nanochat_kernels as kernels
from tests.kernels import harness
from tests.kernels.harness import DEVICE, randn

PLANTED_FAULTS = {
    "a weight gradient in 16 bits": (
        "linear",
        "    if x.dtype == gradient.dtype:\n",
        "    if True:\n        gradient += (dy.t() @ x).to(gradient.dtype)\n    elif x.dtype == gradient.dtype:\n",
        "test_a_weight_gradient_is_summed_in_float32",
    ),
}


def test_a_weight_gradient_is_summed_in_float32():
    """Neither the sum of the products, 1023/1024, nor 4096 plus it is a bfloat16 number, and each product is far below its unit."""
    x = torch.ones(1023, 8, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight, buffer = torch.ones(8, 8, device=DEVICE, dtype=torch.bfloat16), torch.full((8, 8), 4096.0, device=DEVICE)
    kernels.linear(x, weight, buffer).backward(torch.full((1023, 8), 2.0**-10, device=DEVICE, dtype=torch.bfloat16))
    assert (buffer == 4096 + 1023 / 1024).all()


def test_linear_equals_torch_s():
    x, w = randn(2, 5, 12, dtype=torch.float32), randn(20, 12, dtype=torch.float32, seed=1)
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
