"""The pre-normed two-layer perceptron with squared ReLU: y = residual + h·w_downᵀ with h = relu(z)² and z = norm(x)·w_upᵀ.

The norm is folded into the first product (folded_norm.py), whose epilogue also applies relu². The second product's epilogue adds
the residual and sums the squares of the result, for the norm of the next layer. Besides x and a factor for each row, only h is
saved: the derivative of the square is 2·relu(z) = 2·√h, which is applied in the epilogue of h's gradient, and w_down's gradient
needs h anyway. With `recompute`, h is not saved either: backward computes it again by the same product. Since ⟨dz, z⟩ = 2·⟨dh, h⟩,
the epilogue of h's gradient also knows what norm's derivative needs, and the last product's epilogue closes the norm and adds the
residual's gradient. So et al. 2021 (Primer).
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat_kernels import hopper_product, matrix_product, reference
from nanochat_kernels.checks import (
    autocast_products,
    check_float,
    check_gradient_buffer,
    check_residual,
    check_rstd,
    check_shape,
    row_width,
)
from nanochat_kernels.dispatch import choose
from nanochat_kernels.folded_norm import KERNELS as NORM_KERNELS
from nanochat_kernels.folded_norm import (
    add_residual,
    finish,
    input_gradient,
    norm_backward_launches,
    residual_launches,
    row_rstd,
    row_sums,
)
from nanochat_kernels.hopper_product import gl, gluon
from nanochat_kernels.linear import add_product, plain_linear
from nanochat_kernels.matrix_product import (
    Epilogue,
    load_block,
    load_rows,
    product,
    product_parameters,
    store_block,
    store_row_sums,
)
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
from nanochat_kernels.triton_helpers import (
    DTYPES,
    KernelFunction,
    as_rows,
    derivative,
    differentiable,
    tl,
    triton,
)


@triton.jit
def relu2_epilogue(
    sums, h_ptr, h_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store relu(rstd·sums)²."""
    z = sums * load_rows(arguments[0], row, m, sums.shape[0])[:, None]
    relu = tl.where(z < 0.0, 0.0, z)  # tl.maximum would drop NaN on a GPU
    store_block(h_ptr, h_stride, relu * relu, row, column, m, n, WHOLE)


@triton.jit
def relu2_backward_epilogue(
    dh, dz_ptr, dz_stride, h_ptr, h_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store rstd·dz with dz = 2·√h·dh, and for each row of the part the sum of dz·z = 2·h·dh."""
    rstd_ptr, sums_ptr = arguments
    h = load_block(h_ptr, h_stride, row, column, m, n, dh.shape[0], dh.shape[1], WHOLE)
    root = tl.sqrt_rn(h) if h.dtype == tl.float32 else tl.sqrt(h.to(tl.float32))
    h = h.to(tl.float32)
    dh = tl.where(h == 0.0, 0.0, 2.0 * dh)  # 0 where relu is 0, even if dh is NaN
    dz = dh * root
    store_block(dz_ptr, dz_stride, dz * load_rows(rstd_ptr, row, m, dh.shape[0])[:, None], row, column, m, n, WHOLE)
    store_row_sums(sums_ptr, tl.sum(dh * h, axis=1), row, column, m, n, dh.shape[1])


@gluon.jit
def relu2_on_hopper(sums, out_desc, first, second, arguments, row, column, m, n):
    """relu2_epilogue for hopper_product.py."""
    z = sums * hopper_product.load_rows(arguments[0], sums, row, m)[:, None]
    relu = gl.where(z < 0.0, 0.0, z)
    hopper_product.store_part(relu * relu, out_desc, first, row, column)


@gluon.jit
def relu2_backward_on_hopper(dh, out_desc, h_memory, second, arguments, row, column, m, n):
    """relu2_backward_epilogue for hopper_product.py."""
    h = h_memory.load(dh.type.layout).to(gl.float32)
    dh = gl.where(h == 0.0, 0.0, 2.0 * dh)
    rstd = hopper_product.load_rows(arguments[0], dh, row, m)
    hopper_product.store_part(dh * gl.sqrt(h) * rstd[:, None], out_desc, h_memory, row, column)
    hopper_product.store_row_sums(arguments[1], gl.sum(dh * h, axis=1), dh, row, column, m, n)


RELU2 = Epilogue(relu2_epilogue, relu2_on_hopper)
RELU2_BACKWARD = Epilogue(relu2_backward_epilogue, relu2_backward_on_hopper)


def up(x: Tensor, w_up: Tensor, rstd: Tensor, parameters: dict[str, int] | None = None) -> Tensor:
    """Return h (N, F) for rows x (N, C)."""
    shape = x.size(0), w_up.size(0), x.size(1)
    parameters = product_parameters("relu2_mlp_up", x, w_up, shape, None, parameters, decodes=True)
    h = torch.empty(shape[:2], dtype=x.dtype, device=x.device)
    return product(x, w_up, h, RELU2, parameters, (rstd,), y_transposed=True)


def hidden_gradient(
    dy: Tensor, w_down: Tensor, h: Tensor, rstd: Tensor, parameters: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x·w_upᵀ (N, F) and the coefficient of x in norm's derivative (N,), for dy (N, C)."""
    shape = dy.size(0), h.size(1), dy.size(1)
    parameters = product_parameters("relu2_mlp_hidden_gradient", dy, w_down, shape, None, parameters)
    dz, sums = torch.empty_like(h), row_sums(parameters, *shape[:2], h.device)
    product(dy, w_down, dz, RELU2_BACKWARD, parameters, (rstd, sums), h)
    return dz, finish(sums, shape[2], rstd)


def mlp_forward_shapes(x, w_up, w_down, residual, rstd):
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(rows, w_up.size(0))


@opaque(mlp_forward_shapes)
def relu2_mlp_forward(
    x: Tensor, w_up: Tensor, w_down: Tensor, residual: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y (…, C), rstd of y (…), h (N, F)) for x (…, C) and rstd (N,) of its rows."""
    h = up(as_rows(x), as_rows(w_up), rstd)
    y, y_rstd = add_residual("relu2_mlp_down", h, as_rows(w_down), None if residual is None else as_rows(residual))
    return y.view(x.shape), y_rstd.view(x.shape[:-1]), h


def hidden_shape(x, w_up, rstd):
    return x.new_empty(x.shape[:-1].numel(), w_up.size(0))


@opaque(hidden_shape)
def relu2_mlp_hidden(x: Tensor, w_up: Tensor, rstd: Tensor) -> Tensor:
    """Return h (N, F) again, with the bits of relu2_mlp_forward."""
    return up(as_rows(x), as_rows(w_up), rstd)


def mlp_backward_shapes(dy, x, w_up, w_down, h, rstd, needs_dx, is_residual):
    return torch.empty_like(h), x.new_empty(x.shape if needs_dx else 0)


@opaque(mlp_backward_shapes)
def relu2_mlp_backward(
    dy: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, h: Tensor, rstd: Tensor, needs_dx: bool,
    is_residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (the gradient of x·w_upᵀ (N, F), dx (…, C)); dx is not computed unless needs_dx. is_residual: the residual is x."""
    upstream, rows = as_rows(dy), as_rows(x)
    dz, coefficient = hidden_gradient(upstream, as_rows(w_down), h, rstd)
    dx = x.new_empty(0)
    if needs_dx:
        residual = upstream if is_residual else None
        dx = input_gradient("relu2_mlp_input_gradient", dz, as_rows(w_up), rows, coefficient, residual).view(x.shape)
    return dz, dx


class RELU2MLP(KernelFunction):
    @staticmethod
    def forward(x, w_up, w_down, residual, is_residual, rstd, up_gradient, down_gradient, recompute):
        rstd = row_rstd(as_rows(x)) if rstd is None else rstd.reshape(-1).contiguous()
        return *relu2_mlp_forward(x, w_up, w_down, x if is_residual else residual, rstd), rstd

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, w_up, w_down, _, ctx.is_residual, _, *ctx.buffers, recompute = inputs
        h, rstd = output[2:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        # the buffers are not saved for backward: other calls may add to them before this one's backward
        ctx.save_for_backward(x, w_up, w_down, None if recompute else h, rstd)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        needed = ctx.needs_input_grad
        gradients = derivative(Backward, dy, *ctx.saved_tensors, *ctx.buffers, needed[:3], ctx.is_residual)
        return *gradients, dy if needed[3] else None, *[None] * 5


class Backward(KernelFunction):
    @staticmethod
    def forward(dy, x, w_up, w_down, h, rstd, up_gradient, down_gradient, needed, is_residual):
        dw_up = dw_down = dx = None
        if not any(needed):  # the residual alone requires a gradient
            return dx, dw_up, dw_down
        h = relu2_mlp_hidden(x, w_up, rstd) if h is None else h
        upstream = dy.reshape(-1, dy.size(-1))
        if down_gradient is not None:
            add_product(down_gradient, upstream, h)
        elif needed[2]:
            dw_down = upstream.t() @ h
        if up_gradient is not None or needed[0] or needed[1]:
            dz, dx = relu2_mlp_backward(dy, x, w_up, w_down, h, rstd, needed[0], is_residual)
            rows = x.reshape(-1, x.size(-1))
            if up_gradient is not None:
                add_product(up_gradient, dz, rows)
            elif needed[1]:
                dw_up = dz.t() @ rows
        return dx if needed[0] else None, dw_up, dw_down


def run(x, w_up, w_down, residual, rstd, up_gradient, down_gradient, recompute) -> tuple[Tensor, Tensor]:
    is_residual = residual is x
    added = residual if not is_residual and residual is not None and residual.dtype == x.dtype else None
    rest = rstd, up_gradient, down_gradient, recompute
    y, y_rstd, *_ = differentiable(RELU2MLP, x, w_up, w_down, added, is_residual, *rest)
    if is_residual or added is residual:
        return y, y_rstd
    # under autocast the residual may have another dtype
    return reference.with_rstd(residual + y)


def run_reference(
    x, w_up, w_down, residual=None, rstd=None, up_gradient=None, down_gradient=None, recompute=False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """reference.relu2_mlp, with products that add the weights' gradients to the buffers that are given."""
    if recompute and torch.is_grad_enabled():
        # not as arguments of checkpoint, which forbids that other calls add to them before this one's backward
        again = partial(run_reference, up_gradient=up_gradient, down_gradient=down_gradient)
        return checkpoint(again, x, w_up, w_down, residual, rstd, use_reentrant=False, preserve_rng_state=False)
    if up_gradient is None and down_gradient is None:
        return reference.relu2_mlp(x, w_up, w_down, residual)
    h = torch.nn.functional.relu(plain_linear(reference.rms_norm(x), w_up, up_gradient)).square()
    y = plain_linear(h, w_down, down_gradient)
    return reference.with_rstd(y if residual is None else residual + y)


def unsupported_reason(x: Tensor, w_up: Tensor, *_) -> str | None:
    if not w_up.numel():
        return f"a weight without elements, {tuple(w_up.shape)}"
    if x.dtype == torch.float16:
        return "float16 cannot hold relu(z)² for small z, from which the derivative is computed; use bfloat16"
    return matrix_product.unsupported_reason(x)


def relu2_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    residual: Tensor | None = None,
    rstd: Tensor | None = None,
    up_gradient: Tensor | None = None,
    down_gradient: Tensor | None = None,
    recompute: bool = False,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return residual + relu(norm(x)·w_upᵀ)²·w_downᵀ for x (…, C), w_up (F, C), w_down (C, F), and rstd of its rows.

    The first result is (…, C) in x's dtype, or under autocast in the residual's if that is wider. rstd (…) is float32 or x's wider
    dtype: (mean of a row's squares + eps)^−½, as the next operation with a folded norm takes it. Gradients do not flow through
    rstd. residual (…, C) is usually x itself: pass the same tensor, so that one product computes its whole gradient.
    rstd (…): that of x, if it is known.
    up_gradient, down_gradient: contiguous float32 buffers with the weights' shapes. Backward adds the weights' gradients to them in
    place; a weight with a buffer gets no `.grad`. If none of x, w_up and w_down requires a gradient, the buffers stay untouched. If
    w_down alone requires one, the reference leaves up_gradient untouched too.
    recompute: backward computes relu(z)² again in place of saving it, F numbers a row, which takes one more product and changes no
    bit; the reference computes all of forward again.
    Repeated calls are bitwise equal. Raises ValueError for mismatched shapes or devices, TypeError for mismatched dtypes (autocast
    may mix them), and KernelRequestError (a ValueError) if the implementation named by impl does not support the call.
    """
    x, w_up, w_down = autocast_products(x, w_up, w_down)
    check_float("relu2_mlp", x=x, w_up=w_up, w_down=w_down)
    check_shape("relu2_mlp", "w_up", w_up, "F", row_width("relu2_mlp", x))
    check_shape("relu2_mlp", "w_down", w_down, x.size(-1), w_up.size(0))
    check_residual("relu2_mlp", x, residual, tuple(x.shape))
    check_rstd("relu2_mlp", x, rstd)
    check_gradient_buffer("relu2_mlp", "up_gradient", w_up, up_gradient)
    check_gradient_buffer("relu2_mlp", "down_gradient", w_down, down_gradient)
    arguments = (x, w_up, w_down, residual, rstd, up_gradient, down_gradient, recompute)
    return choose(RELU2_MLP, impl, *arguments)(*arguments)


def up_launches(key, dtype: torch.dtype, device: torch.device):
    x, w_up, _, rstd = production_inputs(key[0], key[2], key[1], dtype, device)
    return {"up": lambda parameters: up(x, w_up, rstd, parameters)}


def down_launches(key, dtype: torch.dtype, device: torch.device):
    x, _, w_down, _ = production_inputs(key[0], key[1], key[2], dtype, device)
    h = torch.empty(key[0], key[2], device=device, dtype=dtype).normal_()
    return residual_launches("relu2_mlp_down", h, w_down, x)


def hidden_gradient_launches(key, dtype: torch.dtype, device: torch.device):
    dy, _, w_down, rstd = production_inputs(key[0], key[2], key[1], dtype, device)
    h = torch.empty(key[0], key[1], device=device, dtype=dtype).normal_().square_()
    return {"hidden gradient": lambda parameters: hidden_gradient(dy, w_down, h, rstd, parameters)}


def input_gradient_launches(key, dtype: torch.dtype, device: torch.device):
    x, w_up, *_ = production_inputs(key[0], key[1], key[2], dtype, device)
    dz = torch.empty(key[0], key[2], device=device, dtype=dtype).normal_()
    return norm_backward_launches("relu2_mlp_input_gradient", dz, w_up, x)


def production_inputs(
    rows: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return x, w_up, w_down and rstd."""
    x, w_up, w_down = inputs(rows, width, hidden, dtype, device)
    return x, w_up, w_down, torch.empty(rows, device=device).uniform_(0.5, 2.0)


def inputs(
    rows: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random x, w_up and w_down with the magnitudes of trained weights."""
    x, w_up = (torch.empty(n, width, device=device, dtype=dtype).normal_() for n in (rows, hidden))
    w_down = torch.empty(width, hidden, device=device, dtype=dtype).normal_()
    return x, w_up.mul_(width**-0.5), w_down.mul_(hidden**-0.5)


UP, DOWN = product_keys(4, 1), product_keys(1, 4)
MORE_UP = (1000, 384, 96), (1001, 30, 15), *more_product_keys(4, 1)
MORE_DOWN = (1000, 96, 384), (1001, 15, 30), *more_product_keys(1, 4)
KERNELS = (
    Kernel("relu2_mlp_up", DTYPES[:1], UP, SPACE, up_launches, MORE_UP),
    Kernel("relu2_mlp_down", DTYPES[:1], DOWN, SPACE, down_launches, MORE_DOWN),
    few_rows_kernel("relu2_mlp_up", 4, 1, up_launches, DTYPES[:1]),
    few_rows_kernel("relu2_mlp_down", 1, 4, down_launches, DTYPES[:1], slices=True),
    Kernel("relu2_mlp_hidden_gradient", DTYPES[:1], UP, SPACE, hidden_gradient_launches, MORE_UP),
    Kernel("relu2_mlp_input_gradient", DTYPES[:1], DOWN, SPACE, input_gradient_launches, MORE_DOWN),
    *NORM_KERNELS,
)


def trials(shape, device: torch.device, dtype: torch.dtype):
    rows = shape.rows * shape.tokens
    yield Trial(inputs(rows, shape.width, 4 * shape.width, dtype, device), (0,), (0, 1, 2))
    # as training calls it, with buffers that the weights' gradients are added to
    x, w_up, w_down = inputs(min(rows, 1024), shape.width, 4 * shape.width, dtype, device)
    buffers = (torch.empty(w.shape, device=device).normal_() for w in (w_up, w_down))
    yield Trial((x, w_up, w_down, None, None, *buffers), (), (0,), in_place=(5, 6), timed=False)
    yield Trial(inputs(DECODED_ROWS, shape.width, 4 * shape.width, dtype, device), (0,), timed=False)


def elements(arguments: tuple, part: str) -> float:
    x, w_up = arguments[:2]
    hidden = x.numel() // x.size(-1) * w_up.size(0)
    if part == "fwd":
        return 3 * x.numel() + 2 * hidden + 2 * w_up.numel()
    return 6 * x.numel() + 5 * hidden + 4 * w_up.numel()


def flops(arguments: tuple, part: str, variant: str) -> float:
    x, w_up = arguments[:2]
    return (4 if part == "fwd" else 8) * x.numel() * w_up.size(0)


def benchmark_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return x, w_up, w_down and rstd of x, which the model's attention knows."""
    given = inputs(BENCHMARK_TOKENS, MODEL_WIDTHS[shape], 4 * MODEL_WIDTHS[shape], dtype, device)
    return *given, reference.with_rstd(given[0])[1]


RELU2_MLP = Operation(
    "relu2_mlp", relu2_mlp, run_reference, {"triton": Implementation(run, unsupported_reason)}, KERNELS, trials,
    Benchmark(
        tuple(MODEL_WIDTHS), benchmark_inputs, (0, 1, 2), elements, flops,
        # the residual is x, and rstd of the result is for the next layer
        call=lambda function, x, w_up, w_down, rstd: function(x, w_up, w_down, x, rstd)[0],
    ),
)  # fmt: skip
OPERATIONS = (RELU2_MLP,)
