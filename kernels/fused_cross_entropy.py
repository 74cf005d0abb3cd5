"""linear_cross_entropy in three products: the epilogue of the first one writes what the other two need, and nothing reads logits.

With l = softcap·tanh(z/softcap) of the logits z = x·weightᵀ, S = Σ exp(l) of each row and f the product of all factors of its loss,
    dloss/dz = f·(exp(l)/S − [target])·(1 − (l/softcap)²) = a·E,   a = 4·f/S,   dx = a ⊙ (E·weight),   dweight = Eᵀ·(a ⊙ x),
where E = exp(l)·(1 − (l/softcap)²)/4 except for the target, whose entry is −(S − exp(l))·(1 − (l/softcap)²)/4. Softcapped logits are
bounded, so that E and S need no running maximum. The first product's epilogue stores E before S is known; a small kernel adds up S and
replaces one entry of each row. In dweight, where most rows have few targets, the targets' terms are most of an element, and a ⊙ x is
rounded: they are added in float32 instead, by one program for all rows with the same target, without atomic additions.

The tokens are divided into chunks that keep E within CHUNK_BYTES (see chunk_rows); E is overwritten by the next chunk. The gradients
are therefore computed in forward, and backward multiplies them by the upstream gradient, if that is one number: for reduction "mean".
They are float32 sums for the weight, so that they are rounded once. For "none", forward computes only the losses, and backward E
again.

This file does not define an operation of the package: it is an implementation of linear_cross_entropy.py.
"""

import math
from math import ceil

import torch
from torch import Tensor

from nanochat_kernels.fused_cross_entropy_kernels import EXPONENTIALS, add_target_rows, launch_rows
from nanochat_kernels.linear import scaled_rows
from nanochat_kernels.matrix_product import product, product_parameters
from nanochat_kernels.operation import MODEL_WIDTHS, MORE_WIDTHS, TUNED_WIDTHS, VOCABULARY, Kernel
from nanochat_kernels.product_configurations import SPACE
from nanochat_kernels.reference import SOFTCAP
from nanochat_kernels.softcap_cross_entropy import factor_of, reduced, unsupported_reason_for
from nanochat_kernels.tracing import opaque
from nanochat_kernels.triton_helpers import (
    DTYPES,
    KernelFunction,
    as_rows,
    derivative,
    differentiable,
    multiprocessors,
    needs_gradient,
    tl,
)

CHUNK_BYTES = 2**30  # of E
TILE_ROWS = 256  # all chunks but the last one have a multiple of the rows of the largest tile


def chunk_rows(rows: int, width: int, itemsize: int, tiles: tuple[int, int, int] = (1, 1, 1)) -> int:
    """Return the rows of a chunk: at most CHUNK_BYTES of E, and so many that the product for dx keeps all multiprocessors busy.

    tiles: the rows of one of its tiles, how many lie side by side, and how many are computed at the same time. Their rounds are
    counted, and each chunk as a quarter of one: it reads and writes the weight's gradient.
    """
    most = max(1, CHUNK_BYTES // max(1, width * itemsize))
    if rows <= most:
        return max(rows, 1)
    most = max(most // TILE_ROWS * TILE_ROWS, min(most, TILE_ROWS))
    height, across, at_once = tiles

    def rounds(step: int) -> float:
        chunks = *[step] * (rows // step), rows % step
        return sum(ceil(ceil(chunk / height) * across / at_once) for chunk in chunks) + ceil(rows / step) / 4

    return min(range(most, most // 2, -TILE_ROWS), key=lambda step: (rounds(step), step))


def input_gradient_tiles(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Return the tiles of the product for the gradient of x (N, C), for chunk_rows."""
    shape = x.size(0), x.size(1), weight.size(0)
    found = product_parameters("linear_cross_entropy_input_gradient", x, weight, shape)
    if "BLOCK_N" not in found:  # torch's product
        return 1, 1, 1
    return found["BLOCK_M"], ceil(x.size(1) / found["BLOCK_N"]), multiprocessors(x.device)


def matrix(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a matrix whose rows begin at multiples of 16 bytes, as tensor descriptors require."""
    return torch.empty(rows, ceil(width / 8) * 8, dtype=dtype, device=device)[:, :width]


def exponentials(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, out: Tensor, has_gradient: bool,
    parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill out (N, V) with E if there is a gradient. Return the sums (parts, N) of exp(l) without the target's, and its logits (N,)."""
    shape = x.size(0), weight.size(0), x.size(1)
    parameters = product_parameters("cross_entropy_exponentials", x, weight, shape, None, parameters)
    part = parameters["PART"]
    sums = torch.empty(ceil(shape[1] / part), shape[0], dtype=torch.float32, device=x.device)
    target_logits = torch.empty(shape[0], dtype=torch.float32, device=x.device)
    # numbers that the kernel knows when it is compiled; None leaves out what is not needed
    cap, gradient, ragged = tl.constexpr(softcap), 1 if has_gradient else None, 1 if shape[1] % part else None
    arguments = sums, targets, target_logits, cap, gradient, ragged
    product(x, weight, out, EXPONENTIALS, parameters, arguments, y_transposed=True)
    return sums, target_logits


def add_chunk(dweight: Tensor, exponentials: Tensor, rows: Tensor, is_first: bool) -> None:
    """Add exponentialsᵀ·rows to dweight (V, C) in float32; the first chunk's product overwrites it."""
    if exponentials.is_cuda and rows.dtype != torch.float32:
        if is_first:
            torch.mm(exponentials.t(), rows, out_dtype=torch.float32, out=dweight)
        else:
            torch.addmm(dweight, exponentials.t(), rows, out_dtype=torch.float32, out=dweight)
    elif is_first:
        torch.mm(exponentials.t().float(), rows.float(), out=dweight)
    else:
        dweight.addmm_(exponentials.t().float(), rows.float())


def result_shapes(x, weight, targets, factor, softcap, ignore_index, needs_dx, needs_dw):
    losses = x.new_empty(x.size(0), dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)
    return losses, dx, x.new_empty(weight.shape if needs_dw else 0, dtype=torch.float32)


@opaque(result_shapes)
def linear_cross_entropy_chunks(
    x: Tensor, weight: Tensor, targets: Tensor, factor: Tensor | None, softcap: float, ignore_index: int, needs_dx: bool,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (losses (N,), dx (N, C), dweight (V, C) in float32): the gradients of Σ factor·loss, empty where they are not needed.

    factor: () or (N,); None stands for 1. The losses are not multiplied by it.
    """
    losses, dx, dweight = result_shapes(x, weight, targets, factor, softcap, ignore_index, needs_dx, needs_dw)
    x, weight, rows, has_gradient = as_rows(x), as_rows(weight), x.size(0), needs_dx or needs_dw
    if not rows:
        return losses, dx, dweight.zero_()
    tiles = input_gradient_tiles(x, weight) if needs_dx else (1, 1, 1)
    step = chunk_rows(rows, weight.size(0), x.element_size(), tiles)
    memory = matrix(step, weight.size(0), x.dtype, x.device)
    coefficients = torch.empty_like(losses) if has_gradient else None
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        values, part, wanted = memory[: chunk.stop - start], x[chunk], targets[chunk]
        sums, target_logits = exponentials(part, weight, wanted, softcap, values, has_gradient)
        factors = factor if factor is None or factor.dim() == 0 else factor[chunk]
        known = coefficients[chunk] if has_gradient else None
        scale = launch_rows(sums, wanted, target_logits, factors, losses[chunk], values, known, softcap, ignore_index)
        if needs_dx:
            scaled_rows("linear_cross_entropy_input_gradient", values, weight, scale, out=dx[chunk])
        if needs_dw:
            values.scatter_(1, wanted.clamp(0, weight.size(0) - 1)[:, None], 0.0)
            scaled = torch.empty(part.shape, dtype=x.dtype, device=x.device)
            add_chunk(dweight, values, torch.mul(part, scale[:, None], out=scaled), start == 0)
    if needs_dw:
        add_target_rows(dweight, x, targets, coefficients)
    return losses, dx, dweight


class MeanLoss(KernelFunction):
    @staticmethod
    def forward(
        x, weight, targets, factor, softcap, ignore_index, weight_gradient, needs_dx, needs_dw
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (Σ factor·loss, losses (N,), and the gradients of that sum)."""
        found = linear_cross_entropy_chunks(x, weight, targets, factor, softcap, ignore_index, needs_dx, needs_dw)
        return reduced(found[0], factor, True), *found

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        _, weight, targets, factor, _, ignore_index, weight_gradient, *needed = inputs
        # the buffer is not saved for backward: other calls may add to it before this one's backward
        ctx.options = ignore_index, weight_gradient, weight.dtype, factor.dim(), *needed
        ctx.save_for_backward(targets, *output[1:])

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 9
        dx, dweight, dfactor = derivative(MeanLossBackward, dloss, *ctx.saved_tensors, *ctx.options)
        return dx, dweight, None, dfactor if ctx.needs_input_grad[3] else None, *(None,) * 5


class MeanLossBackward(KernelFunction):
    @staticmethod
    def forward(
        dloss, targets, losses, dx, dweight, ignore_index, weight_gradient, dtype, factor_dim, needs_dx, needs_dw
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Multiply the gradients by dloss; an upstream gradient that is not finite does not reach ignored rows."""
        counts = targets != ignore_index
        scaled = None
        if needs_dx:
            scale = torch.where(counts, dloss, 0.0)[:, None]
            scaled = torch.mul(dx, scale, out=torch.empty_like(dx))
        dfactor = losses * dloss
        dfactor = dfactor if factor_dim else dfactor.sum()
        added = None
        if needs_dw:
            added = add_gradient(dweight, torch.where(counts.any(), dloss, 0.0), weight_gradient, dtype)
        return scaled, added, dfactor


def add_gradient(dweight: Tensor, scale: Tensor, weight_gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Add scale·dweight to the buffer and return None, or return it in `dtype` if there is no buffer."""
    if weight_gradient is None:
        return torch.mul(dweight, scale, out=torch.empty_like(dweight, dtype=dtype))
    weight_gradient.addcmul_(dweight, scale)
    return None


class Losses(KernelFunction):
    @staticmethod
    def forward(x, weight, targets, softcap, ignore_index, weight_gradient, needs_dx, needs_dw) -> Tensor:
        return linear_cross_entropy_chunks(x, weight, targets, None, softcap, ignore_index, False, False)[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.options = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx, dlosses):
        if dlosses is None:
            return (None,) * 8
        return *derivative(LossesBackward, dlosses, *ctx.saved_tensors, *ctx.options), *(None,) * 6


class LossesBackward(KernelFunction):
    @staticmethod
    def forward(
        dlosses, x, weight, targets, softcap, ignore_index, weight_gradient, needs_dx, needs_dw
    ) -> tuple[Tensor | None, Tensor | None]:
        _, dx, dweight = linear_cross_entropy_chunks(
            x, weight, targets, dlosses, softcap, ignore_index, needs_dx, needs_dw
        )
        added = None
        if needs_dw:
            added = dweight.to(weight.dtype) if weight_gradient is None else None
            if weight_gradient is not None:
                weight_gradient.add_(dweight)
        return dx if needs_dx else None, added


def run(x, weight, targets, softcap, ignore_index, reduction, loss_weight, weight_gradient) -> Tensor:
    targets, mean = targets.contiguous(), reduction == "mean"
    needed = needs_gradient(x, weight)
    traced = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    needs_dx = needed and (traced or x.requires_grad)
    needs_dw = needed and (traced or weight.requires_grad or weight_gradient is not None)
    factor = factor_of(targets, ignore_index, mean, loss_weight)
    options = softcap, ignore_index, weight_gradient, needs_dx, needs_dw
    if mean:
        return differentiable(MeanLoss, x, weight, targets, factor, *options)[0]
    return reduced(differentiable(Losses, x, weight, targets, *options), factor, False)


def unsupported_reason(x, weight, targets, softcap, *_) -> str | None:
    if x.dtype == torch.float16:
        return "float16 cannot hold exp(l) of softcapped logits and their sums; use bfloat16"
    return unsupported_reason_for(x, x.size(0), weight.size(0), softcap)


def exponentials_launches(key, dtype: torch.dtype, device: torch.device):
    x, weight = (torch.empty(n, key[2], device=device, dtype=dtype).normal_() for n in key[:2])
    weight.mul_(3 * key[2] ** -0.5)
    targets, out = torch.randint(key[1], key[:1], device=device), matrix(*key[:2], dtype, device)
    return {
        "gradient": lambda parameters: exponentials(x, weight, targets, SOFTCAP, out, True, parameters),
        "losses": lambda parameters: exponentials(x, weight, targets, SOFTCAP, out, False, parameters),
    }


def rows_launches(key, dtype: torch.dtype, device: torch.device):
    rows, width = 8192, 64 * key[0]
    sums, losses = torch.ones(key[0], rows, device=device), torch.empty(rows, device=device)
    targets, values = torch.randint(width, (rows,), device=device), matrix(rows, width, torch.bfloat16, device)

    def run(factor: Tensor | None, coefficients: Tensor | None):
        given = sums, targets, losses, factor, torch.empty_like(losses), values, coefficients
        return lambda parameters: launch_rows(*given, SOFTCAP, -1, parameters)

    return {"a factor": run(losses[0], losses), "no factor": run(None, losses), "losses": run(None, None)}


def target_rows_launches(key, dtype: torch.dtype, device: torch.device):
    rows = 65_536
    x, coefficients = torch.empty(rows, *key, device=device, dtype=dtype).normal_(), torch.ones(rows, device=device)
    # like words of a text: the n-th most frequent one has about 1/n of the occurrences of the first
    targets = (torch.rand(rows, device=device) * math.log(VOCABULARY)).exp().long().clamp(max=VOCABULARY - 1)
    dweight = torch.zeros(VOCABULARY, *key, device=device)
    return {"targets": lambda parameters: add_target_rows(dweight, x, targets, coefficients, parameters)}


CHUNKS = tuple((rows, VOCABULARY, width) for width in TUNED_WIDTHS for rows in (1024, 8192))
MORE_CHUNKS = tuple((8192, VOCABULARY, width) for width in MORE_WIDTHS)
MORE_CHUNKS += tuple((rows, VOCABULARY, width) for width in MODEL_WIDTHS.values() for rows in (200, 1001, 8101))
KERNELS = (
    Kernel(
        "cross_entropy_exponentials", DTYPES[:1], CHUNKS, SPACE, exponentials_launches,
        ((1000, 384, 96), (1000, 392, 96), (1001, 30, 15), *MORE_CHUNKS),
    ),
    Kernel(
        "cross_entropy_rows", DTYPES[2:], ((256,), (1024,)),
        tuple({"ROWS": rows, "PARTS": parts, "num_warps": 4} for rows in (16, 32, 64) for parts in (8, 16, 32)),
        rows_launches, ((3,),),
    ),
    Kernel(
        "cross_entropy_target_rows", (torch.bfloat16, torch.float32), tuple((width,) for width in TUNED_WIDTHS),
        tuple(
            {"ROWS": rows, "COLUMNS": columns, "num_warps": 4} for rows in (4, 8, 16) for columns in (256, 512)
        ),
        target_rows_launches, ((15,), (1000,), *((width,) for width in MORE_WIDTHS)),
    ),
)  # fmt: skip
