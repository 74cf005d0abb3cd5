"""The projection at the end of attention: y = residual + x·weightᵀ, and rstd of the rows of y for the norm of the next layer.

The product's epilogue adds the residual and sums the squares of the result, so that neither costs a pass over memory. Backward has
nothing to fuse: dx = dy·weight, and the residual's gradient is dy.
"""

import torch
from torch import Tensor

from nanochat_kernels import matrix_product, reference
from nanochat_kernels.checks import (
    autocast_products,
    check_float,
    check_gradient_buffer,
    check_residual,
    check_shape,
    row_width,
)
from nanochat_kernels.dispatch import choose
from nanochat_kernels.folded_norm import KERNELS as NORM_KERNELS
from nanochat_kernels.folded_norm import add_residual, residual_launches
from nanochat_kernels.linear import add_product, flops, plain_linear, scaled_rows
from nanochat_kernels.operation import (
    BENCHMARK_TOKENS,
    DECODED_ROWS,
    MODEL_WIDTHS,
    Benchmark,
    Implementation,
    Kernel,
    Operation,
    Trial,
)
from nanochat_kernels.product_configurations import SPACE, few_rows_kernel, more_product_keys, product_keys
from nanochat_kernels.tracing import opaque
from nanochat_kernels.triton_helpers import DTYPES, KernelFunction, as_rows, derivative, differentiable


def forward_shapes(x, weight, residual):
    shape = *x.shape[:-1], weight.size(0)
    return x.new_empty(shape), x.new_empty(shape[:-1], dtype=torch.float32)


@opaque(forward_shapes)
def output_projection_forward(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return y (…, C) and rstd of its rows (…) for x (…, K)."""
    added = None if residual is None else as_rows(residual)
    y, rstd = add_residual("output_projection", as_rows(x), as_rows(weight), added)
    return y.view(*x.shape[:-1], weight.size(0)), rstd.view(x.shape[:-1])


class OutputProjection(KernelFunction):
    @staticmethod
    def forward(x, weight, residual, weight_gradient):
        return output_projection_forward(x, weight, residual)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, ctx.weight_gradient = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None
        needed = ctx.needs_input_grad
        gradients = derivative(Backward, dy, *ctx.saved_tensors, ctx.weight_gradient, needed[:2])
        return *gradients, dy if needed[2] else None, None


class Backward(KernelFunction):
    @staticmethod
    def forward(dy, x, weight, weight_gradient, needed):
        upstream, rows = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
        dweight = None
        if not any(needed):  # the residual alone requires a gradient
            return None, None
        if weight_gradient is not None:
            add_product(weight_gradient, upstream, rows)
        elif needed[1]:
            dweight = upstream.t() @ rows
        dx = scaled_rows("output_projection_input_gradient", upstream, weight).view(x.shape) if needed[0] else None
        return dx, dweight


def run(x, weight, residual, weight_gradient) -> tuple[Tensor, Tensor]:
    added = residual if residual is not None and residual.dtype == x.dtype else None
    y, rstd = differentiable(OutputProjection, x, weight, added, weight_gradient)
    # under autocast the residual may have another dtype
    return (y, rstd) if added is residual else reference.with_rstd(residual + y)


def run_reference(x, weight, residual=None, weight_gradient=None) -> tuple[Tensor, Tensor]:
    """reference.output_projection, with a product that adds the weight's gradient to the buffer if one is given."""
    y = plain_linear(x, weight, weight_gradient)
    return reference.with_rstd(y if residual is None else residual + y)


def output_projection(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return y = residual + x·weightᵀ for x (…, K), weight (C, K) and residual (…, C), and rstd of its rows.

    y is (…, C) in x's dtype, or under autocast in the residual's if that is wider. rstd (…) is float32 or x's wider dtype: (mean of
    a row's squares + eps)^−½, as the next operation with a folded norm takes it. Gradients do not flow through rstd.
    weight_gradient (C, K), contiguous float32: backward adds the weight's gradient to it in place, and weight gets no `.grad`. If
    neither x nor weight requires a gradient, the buffer stays untouched.
    Repeated calls are bitwise equal. Raises ValueError for mismatched shapes or devices, TypeError for mismatched dtypes (autocast
    may mix them), and KernelRequestError (a ValueError) if the implementation named by impl does not support the call.
    """
    x, weight = autocast_products(x, weight)
    check_float("output_projection", x=x, weight=weight)
    check_shape("output_projection", "weight", weight, "C", row_width("output_projection", x))
    check_residual("output_projection", x, residual, (*x.shape[:-1], weight.size(0)))
    check_gradient_buffer("output_projection", "weight_gradient", weight, weight_gradient)
    arguments = (x, weight, residual, weight_gradient)
    return choose(OUTPUT_PROJECTION, impl, *arguments)(*arguments)


def inputs(rows: int, width: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random x, weight and residual with the magnitudes of trained weights."""
    x, weight, residual = (
        torch.empty(*n, device=device, dtype=dtype).normal_() for n in ((rows, k), (width, k), (rows, width))
    )
    return x, weight.mul_(k**-0.5), residual


def launches(key, dtype: torch.dtype, device: torch.device):
    return residual_launches("output_projection", *inputs(*key, dtype, device))


def input_gradient_launches(key, dtype: torch.dtype, device: torch.device):
    dy, weight, _ = inputs(*key, dtype, device)
    name, transposed = "output_projection_input_gradient", weight.t().contiguous()
    return {"dx": lambda parameters: scaled_rows(name, dy, transposed, parameters=parameters)}


MORE_KEYS = (1000, 96, 192), (1001, 15, 30), *more_product_keys(1, 1)
KERNELS = (
    Kernel("output_projection", DTYPES[:2], product_keys(1, 1), SPACE, launches, MORE_KEYS),
    few_rows_kernel("output_projection", 1, 1, launches, slices=True),
    Kernel(
        "output_projection_input_gradient", DTYPES[:2], product_keys(1, 1), SPACE, input_gradient_launches, MORE_KEYS,
    ),
    *NORM_KERNELS,
)  # fmt: skip


def trials(shape, device: torch.device, dtype: torch.dtype):
    rows = shape.rows * shape.tokens
    yield Trial(inputs(rows, shape.width, shape.width, dtype, device), (0, 2), (0, 1, 2))
    # as training calls it, with a buffer that the weight's gradient is added to
    given = inputs(min(rows, 1024), shape.width, shape.width, dtype, device)
    buffer = torch.empty(shape.width, shape.width, device=device).normal_()
    yield Trial((*given, buffer), (), (0, 2), in_place=(3,), timed=False)
    yield Trial(inputs(DECODED_ROWS, shape.width, shape.width, dtype, device), (0, 2), timed=False)


def elements(arguments: tuple, part: str) -> float:
    x, weight, residual = arguments[:3]
    if part == "fwd":
        return x.numel() + weight.numel() + 2 * residual.numel()
    return 2 * (x.numel() + weight.numel() + residual.numel())


OUTPUT_PROJECTION = Operation(
    "output_projection", output_projection, run_reference,
    {"triton": Implementation(run, lambda x, *_: matrix_product.unsupported_reason(x))},
    KERNELS, trials,
    Benchmark(
        tuple(MODEL_WIDTHS),
        lambda shape, dtype, device: inputs(BENCHMARK_TOKENS, *[MODEL_WIDTHS[shape]] * 2, dtype, device),
        (0, 1, 2), elements, flops,
        # rstd is for the next layer
        call=lambda function, *arguments: function(*arguments)[0],
    ),
)  # fmt: skip
OPERATIONS = (OUTPUT_PROJECTION,)
