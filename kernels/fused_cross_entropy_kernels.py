"""The Triton kernels of fused_cross_entropy.py, which explains what they compute.

The product's epilogue sees a part of a tile of logits z = x·weightᵀ. With w = 1/(1 + exp(2z/cap)) and e = exp(l) = exp(cap − 2·cap·w)
(cross_entropy_kernels.py) it stores E = e·w·(1 − w), for each row the sum of e without the target's, and the target's z. An element
takes two and a half special-function operations: two neighbours share a reciprocal. One more kernel adds the parts of each row, always
in the same order, and then knows the loss, the row's factor and the target's entry of the gradient.

The target's e is left out of the sums because probabilities near 1 would cancel: S − e is what remains for all other tokens, and
the loss log(S/e) = log(1 + (S − e)/e) and the target's gradient, which contains (S − e)/S, keep their relative precision.

The last kernel adds the targets' terms of the weight's gradient, which are most of it, in float32.
"""

import torch
from torch import Tensor

from nanochat_kernels import hopper_product
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.cross_entropy_kernels import exponential, two_weights
from nanochat_kernels.hopper_product import gl, gluon
from nanochat_kernels.matrix_product import Epilogue, store_block, store_row_sums
from nanochat_kernels.triton_helpers import cast, cdiv, launch, power_of_2, tl, triton


@triton.jit
def exponentials(z, other, CAP):
    """Return (exp(l), E) of two logits."""
    w, v = two_weights(z, other, CAP)
    # what w is where two_weights limits exp2's exponent: without it a saturated logit has E = 0, as in the reference
    LEAST: tl.constexpr = 2.0**-60
    w, v = w - LEAST, v - LEAST
    e, f = exponential(w, CAP), exponential(v, CAP)
    return e, f, e * (w - w * w), f * (v - v * v)


@triton.jit
def exponentials_epilogue(
    z, out_ptr, out_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store E if there is a gradient, and for each row of the part the sum of exp(l) without the target's, and the target's z."""
    sums_ptr, targets_ptr, target_logits_ptr, CAP, gradient, _ = arguments
    ROWS: tl.constexpr = z.shape[0]
    PART: tl.constexpr = z.shape[1]
    r = row + tl.arange(0, ROWS)
    target = tl.load(targets_ptr + r, mask=r < m, other=-1) - column
    target = tl.where((target >= 0) & (target < PART), target, -1).to(tl.int32)
    z, other = tl.split(tl.reshape(z, [ROWS, PART // 2, 2]))
    e, f, g, h = exponentials(z, other, CAP)
    if gradient is not None:
        store_block(out_ptr, out_stride, tl.reshape(tl.join(g, h), [ROWS, PART]), row, column, m, n, WHOLE)
    left = 2 * tl.arange(0, PART // 2)[None, :]
    if not WHOLE:  # beyond the last column an infinity of x times the padding of the weight is NaN
        e, f = tl.where(left < n - column, e, 0.0), tl.where(left + 1 < n - column, f, 0.0)
    sums = tl.sum(e + f, axis=1)
    if tl.max(target, axis=0) >= 0:  # few parts have a target
        is_left, is_right = left == target[:, None], left + 1 == target[:, None]
        target_logits = tl.sum(tl.where(is_left, z, 0.0) + tl.where(is_right, other, 0.0), axis=1)
        tl.store(target_logits_ptr + r, target_logits, mask=target >= 0)
        sums = tl.sum(tl.where(is_left, 0.0, e) + tl.where(is_right, 0.0, f), axis=1)
    store_row_sums(sums_ptr, sums, row, column, m, n, PART)


@gluon.jit
def exponentials_on_hopper(z, out_desc, first, second, arguments, row, column, m, n):
    """exponentials_epilogue for hopper_product.py."""
    sums_ptr, targets_ptr, target_logits_ptr, CAP, gradient, ragged = arguments
    ROWS: gl.constexpr = z.shape[0]
    PART: gl.constexpr = z.shape[1]
    rows_layout: gl.constexpr = gl.SliceLayout(1, z.type.layout)
    part = z
    z, other = gl.split(gl.reshape(z, [ROWS, PART // 2, 2]))
    r = hopper_product.row_numbers(z, row)
    target = gl.load(targets_ptr + r, mask=r < m, other=-1) - column
    target = gl.where((target >= 0) & (target < PART), target, -1).to(gl.int32)
    e, f, g, h = exponentials(z, other, CAP)
    if gradient is not None:
        first.store(gl.reshape(gl.join(g, h), [ROWS, PART]).to(out_desc.dtype))
        hopper_product.store_memory(out_desc, first, row, column)
    left = 2 * gl.arange(0, PART // 2, layout=gl.SliceLayout(0, z.type.layout))[None, :]
    if ragged is not None:
        e, f = gl.where(left < n - column, e, 0.0), gl.where(left + 1 < n - column, f, 0.0)
    sums = gl.sum(e + f, axis=1)
    if gl.max(target, axis=0) >= 0:  # few parts have a target
        is_left, is_right = left == target[:, None], left + 1 == target[:, None]
        target_logits = gl.sum(gl.where(is_left, z, 0.0) + gl.where(is_right, other, 0.0), axis=1)
        gl.store(target_logits_ptr + r, target_logits, mask=target >= 0)
        sums = gl.sum(gl.where(is_left, 0.0, e) + gl.where(is_right, 0.0, f), axis=1)
    hopper_product.store_row_sums(sums_ptr, gl.convert_layout(sums, rows_layout), part, row, column, m, n)


EXPONENTIALS = Epilogue(exponentials_epilogue, exponentials_on_hopper, exact=True)


@triton.jit(do_not_specialize=["factor_stride"])  # one factor for all rows, or one for each
def rows_kernel(
    sums_ptr, targets_ptr, target_logits_ptr, factor_ptr, losses_ptr, scale_ptr, coefficient_ptr, gradient_ptr, rows,
    parts, width, gradient_stride, factor_stride, ignore_index, CAP: tl.constexpr, GRADIENT: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add up sums (parts, rows) of each row, and compute the losses; with GRADIENT also a = 4·factor/S and the target's entry of E."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    part = tl.arange(0, PARTS)[:, None]
    sums = tl.zeros([PARTS, ROWS], tl.float32)
    for start in tl.range(0, parts, PARTS):
        at = sums_ptr + (start + part).to(tl.int64) * rows + row[None, :]
        sums += tl.load(at, mask=(start + part < parts) & mask[None, :], other=0.0)
    others = tl.sum(sums, axis=0).to(tl.float64)
    target = tl.load(targets_ptr + row, mask=mask, other=0)
    counts = target != ignore_index
    known = mask & (target >= 0) & (target < width)
    # a target outside the vocabulary gives NaN, unless it is ignored
    z = tl.load(target_logits_ptr + row, mask=known, other=float("nan")).to(tl.float64)
    w, rest = 1.0 / (1.0 + tl.exp(z * (2.0 / CAP))), 1.0 / (1.0 + tl.exp(z * (-2.0 / CAP)))
    exact = tl.exp(CAP * (rest - w))
    ratio = others / exact
    loss = tl.where(ratio < 1e-8, ratio, tl.log(1.0 + ratio))  # the sum would round a small ratio
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0).to(tl.float32), mask=mask)
    if GRADIENT:
        factor = tl.load(factor_ptr + row * factor_stride, mask=mask, other=0.0) if FACTOR else 1.0
        total = others + tl.where(known, exact, 0.0)
        scale = tl.where(counts, tl.where(known, 4.0 * factor, float("nan")), 0.0) / total
        tl.store(scale_ptr + row, scale.to(tl.float32), mask=mask)
        value = -others * w * rest
        tl.store(coefficient_ptr + row, tl.where(known & counts, scale * value, 0.0).to(tl.float32), mask=mask)
        value = cast(value.to(tl.float32), gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * gradient_stride + target, value, mask=known & counts)


@triton.jit
def target_rows_kernel(
    sorted_ptr, order_ptr, ends_ptr, x_ptr, coefficient_ptr, gradient_ptr, vocabulary, width, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add coefficient·x of all rows with the same target to the target's row of the gradient (vocabulary, width).

    The targets are sorted: a program whose target differs from the one before adds up all rows with its target, in their order.
    """
    position = tl.program_id(0).to(tl.int64)
    target = tl.load(sorted_ptr + position)
    before = tl.load(sorted_ptr + position - 1, mask=position > 0, other=-1)
    is_first = (position == 0) | (before != target)
    if is_first & (target >= 0) & (target < vocabulary):
        end = tl.load(ends_ptr + position)
        column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(position, end, ROWS):
            at = start + tl.arange(0, ROWS)
            row = tl.load(order_ptr + at, mask=at < end, other=0)
            coefficient = tl.load(coefficient_ptr + row, mask=at < end, other=0.0)
            mask = (at < end)[:, None] & (column < width)[None, :]
            x = tl.load(x_ptr + (row[:, None] * x_stride + column[None, :]), mask=mask, other=0.0)
            sums += x.to(tl.float32) * coefficient[:, None]
        at = gradient_ptr + target * width + column
        value = tl.load(at, mask=column < width, other=0.0) + tl.sum(sums, axis=0)
        tl.store(at, value, mask=column < width)


def launch_rows(
    sums: Tensor, targets: Tensor, target_logits: Tensor, factor: Tensor | None, losses: Tensor, exponentials: Tensor,
    coefficients: Tensor | None, cap: float, ignore_index: int, parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Fill losses (N,), and with a gradient the target's entries of exponentials (N, V) and coefficients (N,). Return a (N,).

    sums (parts, N) and target_logits (N,) come from the product's epilogue. factor: () or (N,), of each row's loss; None stands for 1.
    coefficients: the derivatives of factor·loss by the targets' logits; None if there is no gradient, and no result then.
    """
    rows, has_gradient = targets.size(0), coefficients is not None
    scale = torch.empty(rows if has_gradient else 0, dtype=torch.float32, device=targets.device)
    parameters = parameters or launch_parameters("cross_entropy_rows", sums.device, sums.dtype, (sums.size(0),))
    factor = factor.to(torch.float32).expand(rows) if factor is not None and has_gradient else None
    launch(
        rows_kernel, (cdiv(rows, parameters["ROWS"]),), sums.device, sums, targets, target_logits,
        losses if factor is None else factor, losses, *((scale, coefficients) if has_gradient else (losses, losses)),
        exponentials, rows, sums.size(0), exponentials.size(1), exponentials.stride(0),
        0 if factor is None else factor.stride(0), ignore_index, CAP=cap, GRADIENT=has_gradient, FACTOR=factor is not None,
        **parameters,
    )  # fmt: skip
    return scale


def add_target_rows(
    dweight: Tensor, x: Tensor, targets: Tensor, coefficients: Tensor,
    parameters: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Add coefficients (N,) times the rows of x (N, C) to the targets' rows of dweight (V, C): repeated calls are bitwise equal."""
    if not x.numel():
        return
    sorted_targets, order = torch.sort(targets, stable=True)
    ends = torch.searchsorted(sorted_targets, sorted_targets, right=True)
    parameters = dict(parameters or launch_parameters("cross_entropy_target_rows", x.device, x.dtype, (x.size(1),)))
    parameters["COLUMNS"] = min(parameters["COLUMNS"], power_of_2(max(x.size(1), 16)))
    grid = targets.size(0), cdiv(x.size(1), parameters["COLUMNS"])
    launch(
        target_rows_kernel, grid, x.device, sorted_targets, order, ends, x, coefficients, dweight, *dweight.shape, x.stride(0),
        **parameters,
    )  # fmt: skip
