"""The two-layer perceptron with squared ReLU: y = h·w_downᵀ with h = relu(z)² and z = x·w_upᵀ.

Besides x, only h is saved: the derivative of the square is 2·relu(z) = 2·√h, and w_down's gradient needs h anyway. torch computes
the products. relu² is one pass over z in place, and its derivative one pass over the gradient of h in place.
So et al. 2021 (Primer).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import autocast_products, check_float, check_gradient_buffer, check_shape
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.dispatch import choose
from nanochat_kernels.linear import add_product, plain_linear
from nanochat_kernels.operation import Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.triton_helpers import (
    GRID_LIMIT,
    KernelFunction,
    cast,
    cdiv,
    derivative,
    differentiable,
    launch,
    tl,
    triton,
    triton_unsupported_reason,
)


@triton.jit
def relu2_kernel(z_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    relu = tl.where(z < 0.0, 0.0, z)  # tl.maximum would drop NaN on a GPU
    tl.store(z_ptr + offsets, cast(relu * relu, z_ptr.dtype.element_ty), mask=offsets < size)


@triton.jit
def relu2_backward_kernel(dh_ptr, h_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dh = tl.load(dh_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    dz = tl.where(h == 0.0, 0.0, dh * (2.0 * tl.sqrt_rn(h)))  # 0 where relu is 0, even if dh is NaN
    tl.store(dh_ptr + offsets, cast(dz, dh_ptr.dtype.element_ty), mask=offsets < size)


def relu2_(z: Tensor, parameters: dict[str, int] | None = None) -> Tensor:
    """Overwrite a contiguous z with relu(z)² and return it."""
    if z.numel():
        parameters = parameters or launch_parameters("relu2", z.device, z.dtype, (z.numel(),))
        launch(relu2_kernel, (cdiv(z.numel(), parameters["BLOCK"]),), z.device, z, z.numel(), **parameters)
    return z


def relu2_backward_(dh: Tensor, h: Tensor, parameters: dict[str, int] | None = None) -> Tensor:
    """Overwrite dh, the gradient of h, with the gradient of z and return it; both tensors are contiguous."""
    if h.numel():
        parameters = parameters or launch_parameters("relu2_backward", h.device, h.dtype, (h.numel(),))
        grid = (cdiv(h.numel(), parameters["BLOCK"]),)
        launch(relu2_backward_kernel, grid, h.device, dh, h, h.numel(), **parameters)
    return dh


def forward(x: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y (…, C), h (N, F))."""
    h = relu2_(F.linear(x.reshape(-1, x.size(-1)), w_up))
    return F.linear(h, w_down).view(*x.shape[:-1], w_down.size(0)), h


class RELU2MLP(KernelFunction):
    @staticmethod
    def forward(x, w_up, w_down, up_gradient, down_gradient):
        return forward(x, w_up, w_down)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.buffers = inputs[3:]  # not save_for_backward: other calls may add to them before this one's backward
        ctx.save_for_backward(*inputs[:3], output[1])

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None, None
        return *derivative(Backward, dy, *ctx.saved_tensors, *ctx.buffers, ctx.needs_input_grad[:3]), None, None


class Backward(KernelFunction):
    @staticmethod
    def forward(dy, x, w_up, w_down, h, up_gradient, down_gradient, needed):
        dy, rows = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
        dw_up = dw_down = dx = None
        if down_gradient is not None:
            add_product(down_gradient, dy, h)
        elif needed[2]:
            dw_down = dy.t() @ h
        if up_gradient is not None or needed[0] or needed[1]:
            dz = relu2_backward_(dy @ w_down, h)
            if up_gradient is not None:
                add_product(up_gradient, dz, rows)
            elif needed[1]:
                dw_up = dz.t() @ rows
            if needed[0]:
                dx = (dz @ w_up).view(x.shape)
        return dx, dw_up, dw_down


def run(x, w_up, w_down, up_gradient, down_gradient) -> Tensor:
    return differentiable(RELU2MLP, x, w_up, w_down, up_gradient, down_gradient)[0]


def run_reference(x, w_up, w_down, up_gradient=None, down_gradient=None) -> Tensor:
    """reference.relu2_mlp, with products that add the weights' gradients to the buffers that are given."""
    if up_gradient is None and down_gradient is None:
        return reference.relu2_mlp(x, w_up, w_down)
    return plain_linear(F.relu(plain_linear(x, w_up, up_gradient)).square(), w_down, down_gradient)


def unsupported_reason(x: Tensor, w_up: Tensor, *_) -> str | None:
    if x.dtype == torch.float16:
        return "float16 cannot hold relu(z)² for small z, from which the derivative is computed; use bfloat16"
    if x.numel() // max(x.size(-1), 1) * w_up.size(0) > GRID_LIMIT * 128:
        return "the hidden activations have more elements than one launch can number; split the rows"
    return triton_unsupported_reason(x)


def relu2_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    up_gradient: Tensor | None = None,
    down_gradient: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return relu(x·w_upᵀ)²·w_downᵀ for x (…, C), w_up (F, C), w_down (C, F): a tensor (…, C) in x's dtype.

    up_gradient, down_gradient: contiguous float32 buffers with the weights' shapes. Backward adds the weights' gradients to
    them in place; a weight with a buffer gets no `.grad`. If none of x, w_up and w_down requires a gradient, there is no
    backward and the buffers stay untouched. If w_down alone requires one, the reference leaves up_gradient untouched too.
    Repeated calls are bitwise equal. Raises ValueError for mismatched shapes or devices, TypeError for mismatched dtypes
    (autocast may mix them), and KernelRequestError (a ValueError) if the implementation named by impl does not support the call.
    """
    x, w_up, w_down = autocast_products(x, w_up, w_down)
    check_float("relu2_mlp", x=x, w_up=w_up, w_down=w_down)
    check_shape("relu2_mlp", "w_up", w_up, "F", x.size(-1))
    check_shape("relu2_mlp", "w_down", w_down, x.size(-1), w_up.size(0))
    check_gradient_buffer("relu2_mlp", "up_gradient", w_up, up_gradient)
    check_gradient_buffer("relu2_mlp", "down_gradient", w_down, down_gradient)
    arguments = (x, w_up, w_down, up_gradient, down_gradient)
    return choose(RELU2_MLP, impl, *arguments)(*arguments)


def hidden_launches(key, dtype: torch.dtype, device: torch.device):
    z = torch.empty(*key, device=device, dtype=dtype).normal_()
    return {"forward": lambda parameters: relu2_(z, parameters)}


def backward_launches(key, dtype: torch.dtype, device: torch.device):
    dh, h = (torch.empty(*key, device=device, dtype=dtype).normal_() for _ in range(2))
    h.square_()
    return {"backward": lambda parameters: relu2_backward_(dh, h, parameters)}


RANGED_DTYPES = (torch.bfloat16, torch.float32)
KEYS = ((32_768 * 5120,),)
SPACE = tuple({"BLOCK": block, "num_warps": warps} for block in (1024, 2048, 4096, 8192) for warps in (4, 8))
KERNELS = (
    Kernel("relu2", RANGED_DTYPES, KEYS, SPACE, hidden_launches, ((1000,),)),
    Kernel("relu2_backward", RANGED_DTYPES, KEYS, SPACE, backward_launches, ((1000,),)),
)


def inputs(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random x, w_up and w_down with the magnitudes of trained weights."""
    x, w_up = (torch.empty(n, width, device=device, dtype=dtype).normal_() for n in (tokens, 4 * width))
    w_down = torch.empty(width, 4 * width, device=device, dtype=dtype).normal_()
    return x, w_up.mul_(width**-0.5), w_down.mul_((4 * width) ** -0.5)


def trials(shape, device: torch.device, dtype: torch.dtype):
    rows = shape.rows * shape.tokens
    yield Trial(inputs(rows, shape.width, dtype, device), (0,), (0, 1, 2))
    # as training calls it, with buffers that the weights' gradients are added to
    x, w_up, w_down = inputs(min(rows, 1024), shape.width, dtype, device)
    buffers = (torch.empty(w.shape, device=device).normal_() for w in (w_up, w_down))
    yield Trial((x, w_up, w_down, *buffers), (), (0,), in_place=(3, 4), timed=False)


def elements(arguments: tuple, part: str) -> float:
    x, w_up = arguments[:2]
    hidden = x.numel() // x.size(-1) * w_up.size(0)
    return (
        2 * x.numel() + 4 * hidden + 2 * w_up.numel()
        if part == "fwd"
        else 4 * x.numel() + 7 * hidden + 4 * w_up.numel()
    )


def flops(arguments: tuple, part: str, variant: str) -> float:
    x, w_up = arguments[:2]
    return (4 if part == "fwd" else 8) * x.numel() * w_up.size(0)


TOKENS, MODEL_WIDTHS = 32 * 2048, {"d12": 768, "d20": 1280, "d32": 2048}
RELU2_MLP = Operation(
    "relu2_mlp", relu2_mlp, run_reference, {"triton": Implementation(run, unsupported_reason)}, KERNELS, trials,
    Benchmark(
        tuple(MODEL_WIDTHS), lambda shape, dtype, device: inputs(TOKENS, MODEL_WIDTHS[shape], dtype, device), (0, 1, 2),
        elements, flops,
    ),
)  # fmt: skip
OPERATIONS = (RELU2_MLP,)
