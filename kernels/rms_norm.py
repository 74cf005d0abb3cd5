"""Root-mean-square norm over the last axis, alone or after a residual addition; no weight.

y = r·x with r = (mean(x²) + eps)^−½, eps = float32's epsilon. Backward from the result: with y = r·x,
    dx = r·(dy − y·⟨dy, y⟩/C),
so y and one number a row are all that is kept: the product after the norm keeps y anyway, and x need not live. (y is
rounded: the part of dx along the row is right to a unit of r·dy, which in rows of 16 elements and more is no loss.)
A row stays in registers: forward reads x and writes y, backward reads dy and y and writes dx, each once.
Zhang and Sennrich 2019, without the gain.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_float, check_shape
from kernels.configs import Kernel, launch_parameters
from kernels.dispatch import Implementation, choose
from kernels.reference import EPS
from kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    as_rows,
    cast,
    cdiv,
    power_of_2,
    rsqrt,
    tl,
    traced_as,
    triton,
    triton_refusal,
    wants_gradient,
)

WIDEST = 16_384  # elements of a row held in registers: 32 a thread of a block of 512


@triton.jit
def forward_kernel(
    x, update, total, y, rstd, rows, x_stride, update_stride, EPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    tile = tl.load(x + row[:, None] * x_stride + column, mask=inside, other=0.0)
    here = row[:, None] * WIDTH + column
    if ADD:
        more = tl.load(update + row[:, None] * update_stride + column, mask=inside, other=0.0)
        tile = cast(tile.to(tl.float32) + more.to(tl.float32), tile.dtype)
        tl.store(total + here, tile, mask=inside)
    tile = tile.to(tl.float32)
    r = rsqrt(tl.sum(tile * tile, axis=1) / WIDTH + EPS)
    tl.store(y + here, cast(tile * r[:, None], y.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def backward_kernel(
    dy, dtotal, y, rstd, dx, rows, dy_stride, dtotal_stride, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    here = row[:, None] * WIDTH + column
    grad = tl.load(dy + row[:, None] * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = tl.load(y + here, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)
    along = tl.sum(grad * normed, axis=1) / WIDTH
    out = r[:, None] * (grad - normed * along[:, None])
    if ADD:
        out += tl.load(dtotal + row[:, None] * dtotal_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + here, cast(out, dx.dtype.element_ty), mask=inside)


def launch_forward(x: Tensor, update: Tensor | None, keep: bool = True, parameters: dict[str, int] | None = None):
    """(total or None, y, rstd) of rows x (…, C) and update; without `keep` rstd is empty."""
    rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1] if keep else (0,), dtype=torch.float32, device=x.device)
    total = None if update is None else torch.empty_like(y)
    if y.numel():
        width = x.size(-1)
        parameters = parameters or launch_parameters("rms_norm_forward", x.device, x.dtype, width)
        added = rows if update is None else as_rows(update)
        forward_kernel[(cdiv(rows.size(0), parameters["ROWS"]),)](
            rows, added, y if total is None else total, y, rstd, rows.size(0), rows.stride(0), added.stride(0),
            EPS=EPS, WIDTH=width, BLOCK=power_of_2(width), ADD=update is not None, KEEP=keep, **parameters,
        )  # fmt: skip
    return total, y, rstd


def launch_backward(
    dy: Tensor, dtotal: Tensor | None, y: Tensor, rstd: Tensor, parameters: dict[str, int] | None = None
) -> Tensor:
    """dx of dy (…, C) and, after an addition, of what flows into its result."""
    dx, rows = torch.empty(y.shape, dtype=y.dtype, device=y.device), as_rows(dy)
    if dx.numel():
        width = y.size(-1)
        parameters = parameters or launch_parameters("rms_norm_backward", y.device, y.dtype, width)
        more = rows if dtotal is None else as_rows(dtotal)
        backward_kernel[(cdiv(rows.size(0), parameters["ROWS"]),)](
            rows, more, y, rstd, dx, rows.size(0), rows.stride(0), more.stride(0),
            WIDTH=width, BLOCK=power_of_2(width), ADD=dtotal is not None, **parameters,
        )  # fmt: skip
    return dx


@torch.library.custom_op("nanochat::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    _, y, rstd = launch_forward(x, None, keep)
    return y, rstd


@torch.library.custom_op("nanochat::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: Tensor, update: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x, update, keep)


@torch.library.custom_op("nanochat::rms_norm_backward", mutates_args=())
def backward_op(dy: Tensor, dtotal: Tensor | None, y: Tensor, rstd: Tensor) -> Tensor:
    return launch_backward(dy, dtotal, y, rstd)


@traced_as(rms_norm_op)
def _(x, keep):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1] if keep else 0, dtype=torch.float32)


@traced_as(add_rms_norm_op)
def _(x, update, keep):
    rstd = x.new_empty(x.shape[:-1] if keep else 0, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


@traced_as(backward_op)
def _(dy, dtotal, y, rstd):
    return y.new_empty(y.shape)


def save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # a result that nobody used costs no zeros
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(*output[-2:])


def rms_norm_gradient(ctx, dy, _):
    return None if dy is None else backward_op(dy, None, *ctx.saved_tensors), None


def add_rms_norm_gradient(ctx, dtotal, dy, _):
    grad = dtotal if dy is None else backward_op(dy, dtotal, *ctx.saved_tensors)
    return grad, grad, None


rms_norm_op.register_autograd(rms_norm_gradient, setup_context=save)
add_rms_norm_op.register_autograd(add_rms_norm_gradient, setup_context=save)


def refusal(x: Tensor, *_) -> str | None:
    if x.size(-1) > WIDEST:
        return f"a row of {x.size(-1)} elements does not fit in registers; {WIDEST} do"
    if x.numel() // max(x.size(-1), 1) > GRID_LIMIT:
        return f"{x.numel() // x.size(-1)} rows pass the {GRID_LIMIT} that one launch can number; split them"
    return triton_refusal(x)


IMPLEMENTATIONS = {
    "rms_norm": {
        "triton": Implementation(lambda x: rms_norm_op(x, wants_gradient(x))[0], refusal),
        "reference": Implementation(reference.rms_norm),
    },
    "add_rms_norm": {
        "triton": Implementation(lambda x, update: add_rms_norm_op(x, update, wants_gradient(x, update))[:2], refusal),
        "reference": Implementation(reference.add_rms_norm),
    },
}


def rms_norm(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Normalise each row of x (…, C) by its root mean square; the result has x's shape and dtype.

    Raises TypeError when x is not floating point, ValueError when it has no axis, and KernelRequestError (a ValueError)
    when the implementation asked for by name cannot serve the call. Repeated calls are bitwise equal.
    """
    check_float("rms_norm", x=x)
    check_row("rms_norm", x)
    return choose("rms_norm", impl, IMPLEMENTATIONS["rms_norm"], x)(x)


def add_rms_norm(x: Tensor, update: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """A residual addition and the norm of its result in one pass: (x + update, rms_norm(x + update)), both (…, C).

    The sum is rounded to x's dtype before it is normalised, as it is when stored. Raises as rms_norm does, and for
    shapes, dtypes or devices of x and update that differ.
    """
    check_float("add_rms_norm", x=x, update=update)
    check_row("add_rms_norm", x)
    check_shape("add_rms_norm", "update", update, *x.shape)
    return choose("add_rms_norm", impl, IMPLEMENTATIONS["add_rms_norm"], x, update)(x, update)


def check_row(operation: str, x: Tensor) -> None:
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"{operation}: x must be (…, C) with C at least 1, got shape {tuple(x.shape)}")


def _forward_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    pointer = {name: "*T" for name in ("x", "update", "total", "y")}
    types = pointer | {"rstd": "*fp32", "rows": "i32", "x_stride": "i32", "update_stride": "i32"}
    return types, {"EPS": EPS, "WIDTH": size, "BLOCK": power_of_2(size), "ADD": True, "KEEP": True}


def _backward_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    pointer = {name: "*T" for name in ("dy", "dtotal", "y", "dx")}
    types = pointer | {"rstd": "*fp32", "rows": "i32", "dy_stride": "i32", "dtotal_stride": "i32"}
    return types, {"WIDTH": size, "BLOCK": power_of_2(size), "ADD": True}


def _forward_example(size: int, dtype: torch.dtype, device: torch.device):
    x = torch.randn(65_536, size, device=device, dtype=dtype)
    return lambda parameters: launch_forward(x, None, True, parameters)


def _backward_example(size: int, dtype: torch.dtype, device: torch.device):
    x, dy = torch.randn(2, 65_536, size, device=device, dtype=dtype)
    _, y, rstd = launch_forward(x, None)
    return lambda parameters: launch_backward(dy, None, y, rstd, parameters)


WIDTHS = (256, 768, 1280, 2048, 8192)
SPACE = tuple({"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4, 8) for warps in (1, 2, 4, 8, 16))
KERNELS = (
    Kernel("rms_norm_forward", forward_kernel, WIDTHS, DTYPES, SPACE, _forward_arguments, _forward_example),
    Kernel("rms_norm_backward", backward_kernel, WIDTHS, DTYPES, SPACE, _backward_arguments, _backward_example),
)
