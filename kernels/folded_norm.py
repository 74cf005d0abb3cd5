"""RMSNorm folded into the matrix products after it: norm(x)·Wᵀ = r ⊙ (x·Wᵀ), with one factor r = (mean(x²) + eps)^−½ per row.

The normalised x never exists. r (rstd) comes from the product that made x, or from a pass over x. Backward: with g the gradient of
x·Wᵀ, which contains the factor r, and g′ = g·W, the gradient is dx = g′ − c ⊙ x with c = r²·⟨g′, x⟩/C. The operation knows
⟨g′, x⟩ = ⟨g, x·Wᵀ⟩ before it computes g′, so that one product's epilogue closes the norm and adds the residual's gradient.

This file does not define an operation of the package.
"""

from functools import partial

import torch
from torch import Tensor

from nanochat_kernels import hopper_product
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.hopper_product import gl, gluon
from nanochat_kernels.matrix_product import (
    Epilogue,
    load_block,
    load_rows,
    product,
    product_parameters,
    store_block,
    store_row_sums,
)
from nanochat_kernels.operation import MODEL_WIDTHS, MORE_WIDTHS, Kernel
from nanochat_kernels.reference import EPS
from nanochat_kernels.triton_helpers import (
    DTYPES,
    cdiv,
    launch,
    power_of_2,
    round_both,
    rsqrt,
    tl,
    triton,
)


@triton.jit
def row_rstd_kernel(
    x_ptr, rstd_ptr, rows, x_stride, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Compute rstd of each row of x (rows, WIDTH)."""
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    squares = tl.zeros([ROWS], tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        mask = (row < rows)[:, None] & (start + column < WIDTH)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + (start + column), mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    tl.store(rstd_ptr + row, rsqrt(squares / WIDTH + EPS), mask=row < rows)


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(
    sums_ptr, rstd_ptr, out_ptr, rows, parts, EPS: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add up sums (parts, rows) of each row: rstd from sums of squares, or with BACKWARD r²·sum/WIDTH."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, parts, PARTS):
        # one after the other, because the order in which tl.sum adds depends on the alignment of the rows
        for i in tl.static_range(PARTS):
            mask = (row < rows) & (start + i < parts)
            total += tl.load(sums_ptr + tl.cast(start + i, tl.int64) * rows + row, mask=mask, other=0.0)
    if BACKWARD:
        r = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        value = r * r * (total / WIDTH)
    else:
        value = rsqrt(total / WIDTH + EPS)
    tl.store(out_ptr + row, value, mask=row < rows)


@triton.jit
def residual_epilogue(
    sums, out_ptr, out_stride, residual_ptr, residual_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store sums + residual, and for each row of the part the sum of the squares of what is stored.

    With width a part is a whole row, of so many elements, and its rstd is stored.
    """
    squares_ptr, has_residual, width, EPS = arguments
    if has_residual is not None:
        residual = load_block(residual_ptr, residual_stride, row, column, m, n, sums.shape[0], sums.shape[1], WHOLE)
        sums += residual.to(tl.float32)
    store_block(out_ptr, out_stride, sums, row, column, m, n, WHOLE)
    if not WHOLE:  # beyond the last column an infinity of x times the padding of the weight is NaN
        sums = tl.where((column + tl.arange(0, sums.shape[1]) < n)[None, :], sums, 0.0)
    _, value = round_both(sums, out_ptr.dtype.element_ty)
    squares = tl.sum(value * value, axis=1)
    if width is not None:
        squares = rsqrt(squares / width + EPS)
    store_row_sums(squares_ptr, squares, row, column, m, n, sums.shape[1])


@triton.jit
def norm_backward_epilogue(
    sums, out_ptr, out_stride, x_ptr, x_stride, dy_ptr, dy_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store sums − c·x, plus dy, the gradient of the residual, if it is given."""
    coefficient_ptr, has_residual = arguments
    x = load_block(x_ptr, x_stride, row, column, m, n, sums.shape[0], sums.shape[1], WHOLE).to(tl.float32)
    sums -= x * load_rows(coefficient_ptr, row, m, sums.shape[0])[:, None]
    if has_residual is not None:
        sums += load_block(dy_ptr, dy_stride, row, column, m, n, sums.shape[0], sums.shape[1], WHOLE).to(tl.float32)
    store_block(out_ptr, out_stride, sums, row, column, m, n, WHOLE)


@gluon.jit
def residual_on_hopper(sums, out_desc, residual, second, arguments, row, column, m, n):
    """residual_epilogue for hopper_product.py."""
    if arguments[1] is not None:
        sums += residual.load(sums.type.layout).to(gl.float32)
    value, as_float = round_both(sums, out_desc.dtype)
    hopper_product.store_part(value, out_desc, residual, row, column)
    inside = column + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, sums.type.layout)) < n
    value = gl.where(inside[None, :], as_float, 0.0)  # outside, an infinity in x makes NaN
    hopper_product.store_row_sums(arguments[0], gl.sum(value * value, axis=1), sums, row, column, m, n)


@gluon.jit
def norm_backward_on_hopper(sums, out_desc, x, dy, arguments, row, column, m, n):
    """norm_backward_epilogue for hopper_product.py."""
    coefficient = hopper_product.load_rows(arguments[0], sums, row, m)
    sums -= x.load(sums.type.layout).to(gl.float32) * coefficient[:, None]
    if arguments[1] is not None:
        sums += dy.load(sums.type.layout).to(gl.float32)
    hopper_product.store_part(sums, out_desc, x, row, column)


RESIDUAL = Epilogue(residual_epilogue, residual_on_hopper)
NORM_BACKWARD = Epilogue(norm_backward_epilogue, norm_backward_on_hopper)


def row_rstd(x: Tensor, parameters: dict[str, int] | None = None) -> Tensor:
    """Return rstd (N,), in float32, of the rows of x (N, C) with stride 1 along a row."""
    rstd = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    if rstd.numel():
        parameters = parameters or launch_parameters("row_rstd", x.device, x.dtype, (x.size(1),))
        block = min(power_of_2(x.size(1)), 2048)
        launch(
            row_rstd_kernel, (cdiv(x.size(0), parameters["ROWS"]),), x.device, x, rstd, x.size(0), x.stride(0),
            EPS=EPS, WIDTH=x.size(1), BLOCK=block, **parameters,
        )  # fmt: skip
    return rstd


def row_sums(parameters: dict[str, int], rows: int, columns: int, device: torch.device) -> Tensor:
    """Return memory (parts, N) for what store_row_sums stores, with the parts of a product's launch parameters."""
    return torch.empty(cdiv(columns, parameters["PART"]), rows, dtype=torch.float32, device=device)


def finish(
    sums: Tensor, width: int, rstd: Tensor | None = None, parameters: dict[str, int] | None = None
) -> Tensor:  # fmt: skip
    """Add up sums (parts, N). Return rstd (N,) if they are of squares; with rstd, the coefficient of x in norm's derivative."""
    out = torch.empty(sums.size(1), dtype=torch.float32, device=sums.device)
    if out.numel():
        parameters = parameters or launch_parameters("finish_rows", sums.device, sums.dtype, (sums.size(0),))
        launch(
            finish_kernel, (cdiv(sums.size(1), parameters["ROWS"]),), sums.device, sums, out if rstd is None else rstd,
            out, sums.size(1), sums.size(0), EPS=EPS, WIDTH=width, BACKWARD=rstd is not None, **parameters,
        )  # fmt: skip
    return out


def add_residual(
    name: str, x: Tensor, weight: Tensor, residual: Tensor | None, parameters: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y = residual + x·weightᵀ (N, C), and rstd of its rows; name: the product's in the launch tables."""
    shape = x.size(0), weight.size(0), x.size(1)
    parameters = product_parameters(name, x, weight, shape, None, parameters, decodes=True)
    whole_rows = "SUMS" in parameters
    if whole_rows:
        parameters["PART"] = power_of_2(shape[1])
    y, squares = torch.empty(shape[:2], dtype=x.dtype, device=x.device), row_sums(parameters, *shape[:2], x.device)
    arguments = squares, None if residual is None else 1, shape[1] if whole_rows else None, EPS
    product(x, weight, y, RESIDUAL, parameters, arguments, residual, y_transposed=True)
    return y, squares[0] if whole_rows else finish(squares, shape[1])


def input_gradient(
    name: str, dz: Tensor, weight: Tensor, x: Tensor, coefficient: Tensor, dy: Tensor | None,
    parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return dx = dz·weight − coefficient·x (+ dy), (N, C): the gradient of x through the folded norm, and as the residual."""
    shape = dz.size(0), weight.size(1), dz.size(1)
    parameters = product_parameters(name, dz, weight, shape, None, parameters)
    dx = torch.empty(shape[:2], dtype=x.dtype, device=x.device)
    arguments = coefficient, None if dy is None else 1
    return product(dz, weight, dx, NORM_BACKWARD, parameters, arguments, x, dy)


def rstd_launches(key, dtype: torch.dtype, device: torch.device):
    x = torch.empty(32_768, key[0], device=device, dtype=dtype).normal_()
    return {"rstd": lambda parameters: row_rstd(x, parameters)}


def finish_launches(key, dtype: torch.dtype, device: torch.device):
    sums = torch.empty(key[0], 32_768, device=device).uniform_(1.0, 2.0)
    found = {}
    for width in sorted(MODEL_WIDTHS.values(), key=lambda width: width != 1280):  # tune times the first
        found[f"forward, {width} wide"] = partial(finish, sums, width, None)
        found[f"backward, {width} wide"] = partial(finish, sums, width, sums[0])
    return found


def residual_launches(name: str, x: Tensor, weight: Tensor, residual: Tensor):
    """Return Kernel.launches of add_residual."""
    return {
        "residual": lambda parameters: add_residual(name, x, weight, residual, parameters),
        "no residual": lambda parameters: add_residual(name, x, weight, None, parameters),
    }


def norm_backward_launches(name: str, dz: Tensor, weight: Tensor, x: Tensor):
    """Return Kernel.launches of input_gradient."""
    coefficient = torch.empty(x.size(0), device=x.device).uniform_(-0.1, 0.1)
    return {
        "residual": lambda parameters: input_gradient(name, dz, weight, x, coefficient, x, parameters),
        "no residual": lambda parameters: input_gradient(name, dz, weight, x, coefficient, None, parameters),
    }


FINISH_SPACE = tuple({"ROWS": rows, "PARTS": parts, "num_warps": 4} for rows in (32, 64, 128) for parts in (8, 16))
KERNELS = (
    Kernel(
        "row_rstd", DTYPES, ((1280,),), tuple({"ROWS": rows, "num_warps": 4} for rows in (1, 2, 4)), rstd_launches,
        ((768,), (2048,), (96,), (5001,), *((width,) for width in MORE_WIDTHS)),
    ),
    Kernel("finish_rows", DTYPES[2:], ((20,), (80,)), FINISH_SPACE, finish_launches, ((3,),)),
)  # fmt: skip
