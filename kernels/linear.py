"""Plain products: x·weightᵀ, whose backward can add the weight's gradient to a float32 buffer, and those of other operations.

dx = dy·weight, and weight_gradient += dyᵀ·x: one product reads the 16-bit operands, sums in float32 and adds to the buffer in
place. Autograd would round the product to 16 bits, cast it to float32 and add it in two further passes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels.checks import autocast_products, check_float, check_gradient_buffer, check_shape, row_width
from nanochat_kernels.dispatch import choose
from nanochat_kernels.matrix_product import SCALE_ROWS, float32_product, product, product_parameters
from nanochat_kernels.operation import BENCHMARK_TOKENS, MODEL_WIDTHS, Benchmark, Operation
from nanochat_kernels.triton_helpers import (
    KernelFunction,
    as_rows,
    derivative,
    differentiable,
    triton_unsupported_reason,
)


def add_product(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dyᵀ·x to gradient (F, C) in place, for dy (N, F) and x (N, C); the sums are float32 for any dtype of dy and x."""
    if x.dtype == gradient.dtype:
        gradient.addmm_(dy.t(), x)
    elif x.is_cuda:
        torch.addmm(gradient, dy.t(), x, out_dtype=gradient.dtype, out=gradient)
    else:
        gradient.addmm_(dy.t().to(gradient.dtype), x.to(gradient.dtype))


def scaled_rows(
    name: str, x: Tensor, y: Tensor, factor: Tensor | None = None, *, y_transposed: bool = False,
    parameters: dict[str, int] | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return factor ⊙ (x·y) in x's dtype, for x (M, K), y (K, N) or (N, K), and a float32 factor for each row; rounded once.

    name: the product's in the launch tables. out: memory for the result. Under torch.compile torch computes the product.
    """
    x, y = as_rows(x), as_rows(y)
    if torch.compiler.is_compiling() or triton_unsupported_reason(x):
        return scaled_by_torch(x, y.t() if y_transposed else y, factor, out)
    shape = x.size(0), y.size(0 if y_transposed else 1), x.size(1)
    parameters = product_parameters(name, x, y, shape, None, parameters)
    if "TORCH" in parameters:
        return scaled_by_torch(x, y.t() if y_transposed else y, factor, out)
    out = torch.empty(shape[:2], dtype=x.dtype, device=x.device) if out is None else out
    return product(x, y, out, SCALE_ROWS, parameters, (factor,), y_transposed=y_transposed)


def scaled_by_torch(x: Tensor, y: Tensor, factor: Tensor | None, out: Tensor | None = None) -> Tensor:
    if factor is None:
        return x @ y if out is None else torch.mm(x, y, out=out)
    sums = float32_product(x, y)
    return (sums * factor[:, None]).to(x.dtype) if out is None else torch.mul(sums, factor[:, None], out=out)


class Linear(KernelFunction):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, weight_gradient: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.weight_gradient = inputs[2]  # not save_for_backward: other calls may add to it before this one's backward
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        derivative(AddWeightGradient, dy, x, ctx.weight_gradient)
        dx = derivative(InputGradient, dy, weight) if ctx.needs_input_grad[0] else None
        return dx, None, None


class AddWeightGradient(KernelFunction):
    @staticmethod
    def forward(dy: Tensor, x: Tensor, weight_gradient: Tensor) -> Tensor:
        add_product(weight_gradient, dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1)))
        return dy.new_empty(0)


class InputGradient(KernelFunction):
    @staticmethod
    def forward(dy: Tensor, weight: Tensor) -> Tensor:
        return dy @ weight


def plain_linear(x: Tensor, weight: Tensor, weight_gradient: Tensor | None = None) -> Tensor:
    """Return F.linear(x, weight); with a buffer, backward adds the weight's gradient to it."""
    if weight_gradient is None:
        return F.linear(x, weight)
    x, weight = autocast_products(x, weight)
    return differentiable(Linear, x, weight, weight_gradient)


def linear(x: Tensor, weight: Tensor, weight_gradient: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Return x·weightᵀ for x (…, C) and weight (F, C): a tensor (…, F) in x's dtype.

    weight_gradient (F, C), contiguous float32: backward adds the weight's gradient to it in place, and weight gets no `.grad`.
    If neither x nor weight requires a gradient, the buffer stays untouched. Raises ValueError for mismatched shapes or devices,
    TypeError for mismatched dtypes, and KernelRequestError (a ValueError) for an impl other than "auto" and "reference".
    """
    x, weight = autocast_products(x, weight)
    check_float("linear", x=x, weight=weight)
    check_shape("linear", "weight", weight, "F", row_width("linear", x))
    check_gradient_buffer("linear", "weight_gradient", weight, weight_gradient)
    return choose(LINEAR, impl, x, weight, weight_gradient)(x, weight, weight_gradient)


def inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    width = MODEL_WIDTHS[shape]
    x, weight = (torch.empty(n, width, device=device, dtype=dtype).normal_() for n in (BENCHMARK_TOKENS, width))
    return x, weight.mul_(width**-0.5)


def elements(arguments: tuple, part: str) -> float:
    x, weight = arguments[:2]
    y = x.numel() // x.size(-1) * weight.size(0)
    return x.numel() + weight.numel() + y if part == "fwd" else 2 * (x.numel() + weight.numel() + y)


def flops(arguments: tuple, part: str, variant: str) -> float:
    """Count the product x·weightᵀ of the first two arguments, and in backward the two of its gradients."""
    x, weight = arguments[:2]
    return (2 if part == "fwd" else 4) * x.numel() * weight.size(0)


LINEAR = Operation(
    "linear", linear, plain_linear, benchmark=Benchmark(tuple(MODEL_WIDTHS), inputs, (0, 1), elements, flops)
)
OPERATIONS = (LINEAR,)
