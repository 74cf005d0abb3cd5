"""The Triton kernels of fused_cross_entropy.py, which explains what they compute.

The product's epilogue sees a part of a tile of logits z = x·weightᵀ. With w = 1/(1 + exp(2z/cap)) and e = exp(l) = exp(cap − 2·cap·w)
(cross_entropy_kernels.py) it stores E = e·w·(1 − w), for each row the sum of e without the target's, and the target's z. An element
takes two and a half special-function operations: two neighbours share a reciprocal. One more kernel adds the parts of each row, always
in the same order, and then knows the loss, the row's factor and the target's entry of the gradient.

The target's e is left out of the sums because probabilities near 1 would cancel: S − e is what remains for all other tokens, and
the loss log(S/e) = log(1 + (S − e)/e) and the target's gradient, which contains (S − e)/S, keep their relative precision.
"""

import torch
from torch import Tensor

from nanochat_kernels import hopper_product
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.cross_entropy_kernels import exponential, two_weights
from nanochat_kernels.hopper_product import gl, gluon
from nanochat_kernels.matrix_product import Epilogue, store_block, store_row_sums
from nanochat_kernels.triton_helpers import cast, cdiv, launch, tl, triton

# what w is where exp2's exponent is limited in two_weights: without it a saturated logit has E = 0, as in the reference
LEAST_WEIGHT = tl.constexpr(2.0**-60)


@triton.jit
def exponentials(z, other, CAP):
    """Return (exp(l), E) of two logits."""
    w, v = two_weights(z, other, CAP)
    w, v = w - LEAST_WEIGHT, v - LEAST_WEIGHT
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
    z, other = tl.split(tl.reshape(z, [ROWS, PART // 2, 2]))
    e, f, g, h = exponentials(z, other, CAP)
    if gradient is not None:
        store_block(out_ptr, out_stride, tl.reshape(tl.join(g, h), [ROWS, PART]), row, column, m, n, WHOLE)
    r = row + tl.arange(0, ROWS)
    target = tl.load(targets_ptr + r, mask=r < m, other=-1)
    is_here = (target >= column) & (target < column + PART) & (target < n)
    target = tl.where(is_here, target - column, -1).to(tl.int32)
    left = 2 * tl.arange(0, PART // 2)[None, :]
    is_left, is_right = left == target[:, None], left + 1 == target[:, None]
    target_logits = tl.sum(tl.where(is_left, z, 0.0) + tl.where(is_right, other, 0.0), axis=1)
    tl.store(target_logits_ptr + r, target_logits, mask=is_here)
    e, f = tl.where(is_left, 0.0, e), tl.where(is_right, 0.0, f)
    if not WHOLE:  # beyond the last column an infinity of x times the padding of the weight is NaN
        e, f = tl.where(left < n - column, e, 0.0), tl.where(left + 1 < n - column, f, 0.0)
    store_row_sums(sums_ptr, tl.sum(e + f, axis=1), row, column, m, n, PART)


@gluon.jit
def exponentials_on_hopper(z, out_desc, first, second, arguments, row, column, m, n):
    """exponentials_epilogue for hopper_product.py."""
    sums_ptr, targets_ptr, target_logits_ptr, CAP, gradient, ragged = arguments
    ROWS: gl.constexpr = z.shape[0]
    PART: gl.constexpr = z.shape[1]
    rows_layout: gl.constexpr = gl.SliceLayout(1, z.type.layout)
    part = z
    z, other = gl.split(gl.reshape(z, [ROWS, PART // 2, 2]))
    e, f, g, h = exponentials(z, other, CAP)
    if gradient is not None:
        first.store(gl.reshape(gl.join(g, h), [ROWS, PART]).to(out_desc.dtype))
        hopper_product.store_memory(out_desc, first, row, column)
    r = hopper_product.row_numbers(z, row)
    target = gl.load(targets_ptr + r, mask=r < m, other=-1)
    is_here = (target >= column) & (target < column + PART) & (target < n)
    target = gl.where(is_here, target - column, -1).to(gl.int32)
    left = 2 * gl.arange(0, PART // 2, layout=gl.SliceLayout(0, z.type.layout))[None, :]
    is_left, is_right = left == target[:, None], left + 1 == target[:, None]
    target_logits = gl.sum(gl.where(is_left, z, 0.0) + gl.where(is_right, other, 0.0), axis=1)
    gl.store(target_logits_ptr + r, target_logits, mask=is_here)
    e, f = gl.where(is_left, 0.0, e), gl.where(is_right, 0.0, f)
    if ragged is not None:
        e, f = gl.where(left < n - column, e, 0.0), gl.where(left + 1 < n - column, f, 0.0)
    sums = gl.convert_layout(gl.sum(e + f, axis=1), rows_layout)
    hopper_product.store_row_sums(sums_ptr, sums, part, row, column, m, n)


EXPONENTIALS = Epilogue(exponentials_epilogue, exponentials_on_hopper)


@triton.jit
def rows_kernel(
    sums_ptr, targets_ptr, target_logits_ptr, factor_ptr, losses_ptr, scale_ptr, gradient_ptr, rows, parts, width,
    gradient_stride, factor_stride, ignore_index, CAP: tl.constexpr, GRADIENT: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add up sums (parts, rows) of each row, and compute the losses; with GRADIENT also the target's entry of E and two scales.

    The first scale is a = 4·factor/S. The rows of x are multiplied by the second one, and rounded: it is a times the number by which
    the rounding of the target's entry changed it. Otherwise the target's term, which is most of the weight's gradient, would
    be rounded twice. The other terms are as far off as they are by their own rounding.
    """
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
        scale = tl.where(counts, 4.0 * factor, 0.0) / total
        tl.store(scale_ptr + row, scale.to(tl.float32), mask=mask)
        value = -others * w * rest
        stored = cast(value.to(tl.float32), gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * gradient_stride + target, stored, mask=known & counts)
        stored = stored.to(tl.float32).to(tl.float64)
        scale *= tl.where(known & (stored != 0.0), value / stored, 1.0)
        tl.store(scale_ptr + rows + row, scale.to(tl.float32), mask=mask)


def launch_rows(
    sums: Tensor, targets: Tensor, target_logits: Tensor, factor: Tensor | None, losses: Tensor, exponentials: Tensor,
    cap: float, ignore_index: int, has_gradient: bool, parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Fill losses (N,), and with a gradient put the target's entries into exponentials (N, V). Return two scales (2, N) of the rows.

    The first one multiplies the rows of exponentials·weight, the second one those of x in exponentialsᵀ·x.

    sums (parts, N) and target_logits (N,) come from the product's epilogue. factor: () or (N,), of each row's loss; None stands for 1.
    Without a gradient the result is undefined.
    """
    rows = targets.size(0)
    scales = torch.empty(2, rows if has_gradient else 0, dtype=torch.float32, device=targets.device)
    parameters = parameters or launch_parameters("cross_entropy_rows", sums.device, sums.dtype, (sums.size(0),))
    factor = None if factor is None else factor.to(torch.float32).expand(rows)
    launch(
        rows_kernel, (cdiv(rows, parameters["ROWS"]),), sums.device, sums, targets, target_logits,
        losses if factor is None else factor, losses, scales if has_gradient else losses, exponentials, rows, sums.size(0),
        exponentials.size(1), exponentials.stride(0), 0 if factor is None else factor.stride(0), ignore_index, CAP=cap,
        GRADIENT=has_gradient, FACTOR=factor is not None, **parameters,
    )  # fmt: skip
    return scales
