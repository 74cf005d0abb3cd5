"""Head, softcap and loss: cross entropy of softcap·tanh(x·weightᵀ/softcap) against the targets, in float32.

The three matrix products are plain ones, and kernels make one pass over the logits z = x·weightᵀ. With G = dloss/dz of each row,
    dx = f ⊙ (G·weight),   dweight = Gᵀ·(f ⊙ x),
where f is the product of all factors of a row's loss: the loss weight, one over the number of targets, the upstream gradient.
bfloat16 logits whose rows fit on the chip are overwritten with their gradient while the loss is computed, and no kernel reads them
again. The factors that are known by then multiply the gradient before it is rounded, so that in training, where the upstream
gradient is 1, nothing is rounded twice. Other logits are kept, and backward computes f ⊙ G from them.

A second implementation, "fused", is in fused_cross_entropy.py: it stores no logits, and at most 1 GiB of what replaces them.
"""

import torch
from torch import Tensor

from nanochat_kernels import fused_cross_entropy, reference
from nanochat_kernels.checks import (
    autocast_products,
    check_float,
    check_gradient_buffer,
    check_loss_weight,
    check_shape,
    check_targets,
)
from nanochat_kernels.cross_entropy_kernels import (
    fits_on_chip,
    launch_gradient,
    launch_losses,
    launch_on_chip,
)
from nanochat_kernels.dispatch import choose
from nanochat_kernels.linear import add_product, flops, plain_linear, scaled_rows
from nanochat_kernels.operation import (
    BENCHMARK_TOKENS,
    MODEL_WIDTHS,
    MORE_WIDTHS,
    TUNED_WIDTHS,
    VOCABULARY,
    Benchmark,
    Implementation,
    Kernel,
    Operation,
    Trial,
)
from nanochat_kernels.product_configurations import RAGGED_ROWS, SPACE
from nanochat_kernels.reference import SOFTCAP
from nanochat_kernels.softcap_cross_entropy import factor_of, random_logits, reduced, unsupported_reason_for
from nanochat_kernels.triton_helpers import DTYPES, KernelFunction, derivative, differentiable, needs_gradient


class LinearCrossEntropy(KernelFunction):
    @staticmethod
    def forward(
        x, weight, targets, factor, softcap, ignore_index, weight_gradient, gradient_now
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (losses (N,), logits (N, V), sums (N,)); if gradient_now, the gradient of Σ factor·loss replaces the logits."""
        logits = scaled_rows("linear_cross_entropy_logits", x, weight, y_transposed=True)
        if gradient_now:
            losses, sums = launch_on_chip(logits, targets, factor, softcap, ignore_index)
        else:
            losses, sums = launch_losses(logits, targets, softcap, ignore_index)
        return losses, logits, sums

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        # the gradient buffer is not in save_for_backward: other calls may add to it before this one's backward
        ctx.options = inputs[4:]
        ctx.save_for_backward(*inputs[:4], *output[1:])

    @staticmethod
    def backward(ctx, dlosses, *_):
        if dlosses is None:
            return (None,) * 8
        return *derivative(Backward, dlosses, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:2]), *(None,) * 6


class Backward(KernelFunction):
    @staticmethod
    def forward(
        dlosses, x, weight, targets, factor, logits, sums, softcap, ignore_index, weight_gradient, gradient_now,
        dx_needed, dw_needed,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        dx = dweight = None
        if gradient_now:
            # what is left to multiply by: the gradient of the logits contains the factor already
            rest = dlosses if factor is None else torch.where(factor == 0, dlosses, dlosses / factor)
            gradient, factor = logits, torch.where(targets == ignore_index, 0.0, rest)
        else:  # launch_gradient multiplies by the factor
            gradient, factor = launch_gradient(logits, targets, sums, dlosses, softcap, ignore_index), None
        if dx_needed:
            dx = scaled_rows("linear_cross_entropy_input_gradient", gradient, weight, factor)
        if weight_gradient is not None or dw_needed:
            rows = x if factor is None else (x * factor[:, None]).to(x.dtype)
            if weight_gradient is not None:
                add_product(weight_gradient, gradient, rows)
            else:
                dweight = gradient.t() @ rows
        return dx, dweight


def run(x, weight, targets, softcap, ignore_index, reduction, loss_weight, weight_gradient) -> Tensor:
    needed = needs_gradient(x, weight)
    gradient_now = needed and fits_on_chip(x.dtype, weight.size(0), softcap)
    targets, mean = targets.contiguous(), reduction == "mean"
    factor = factor_of(targets, ignore_index, mean, loss_weight)
    known = factor if factor is None else factor.detach()
    losses, *_ = differentiable(
        LinearCrossEntropy, x, weight, targets, known, softcap, ignore_index, weight_gradient, gradient_now
    )
    return reduced(losses, factor, mean)


def run_reference(
    x, weight, targets, softcap=SOFTCAP, ignore_index=-1, reduction="mean", loss_weight=None, weight_gradient=None
) -> Tensor:  # fmt: skip
    """reference.linear_cross_entropy, with a product that adds the weight's gradient to the buffer if there is one."""
    logits = plain_linear(x, weight, weight_gradient)
    return reference.softcap_cross_entropy(logits, targets, softcap, ignore_index, reduction, loss_weight)


def unsupported_reason(x, weight, targets, softcap, *_) -> str | None:
    return unsupported_reason_for(x, x.size(0), weight.size(0), softcap)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = SOFTCAP,
    ignore_index: int = -1,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return the loss in nats of the logits x·weightᵀ, for x (N, C), weight (V, C) and int64 targets (N,).

    The loss of a row whose target is ignore_index is 0. reduction "mean" returns a scalar, in float32 or x's wider dtype, the mean
    over the targets that are not ignored, or 0 if all are; "none" returns one loss per row (N,).
    loss_weight: a float32 scalar on the device, or one weight per row (N,). It multiplies the losses before the reduction; the mean
    still divides by the number of targets. NaN and infinite weights make the same elements NaN or infinite as in the reference, but
    some elements of the weight's gradient may be NaN in one of the two and infinite in the other. A bfloat16 gradient overflows for
    weights above about 1e31, the reference's above about 1e38.
    weight_gradient (V, C), contiguous float32: backward adds the weight's gradient to it in place, and weight gets no `.grad`. If
    neither x nor weight requires a gradient, the buffer stays untouched.
    Raises ValueError for mismatched shapes or devices or an unknown reduction, TypeError for mismatched dtypes (autocast may mix
    them), and KernelRequestError (a ValueError) if the implementation named by impl does not support the call. Repeated calls are
    bitwise equal.
    """
    x, weight = autocast_products(x, weight)
    check_float("linear_cross_entropy", x=x, weight=weight)
    check_shape("linear_cross_entropy", "x", x, "N", "C")
    check_shape("linear_cross_entropy", "weight", weight, "V", x.size(1))
    check_targets("linear_cross_entropy", x, weight.size(0), targets, softcap, reduction)
    check_loss_weight("linear_cross_entropy", targets, loss_weight)
    check_gradient_buffer("linear_cross_entropy", "weight_gradient", weight, weight_gradient)
    arguments = (x, weight, targets, float(softcap), ignore_index, reduction, loss_weight, weight_gradient)
    return choose(LINEAR_CROSS_ENTROPY, impl, *arguments)(*arguments)


def on_chip_launches(key, dtype: torch.dtype, device: torch.device):
    logits, targets = random_logits(max(1, 2**30 // key[0]), key[0], dtype, device)
    factor = torch.ones((), device=device)
    return {
        "a factor": lambda parameters: launch_on_chip(logits, targets, factor, SOFTCAP, -1, parameters),
        "no factor": lambda parameters: launch_on_chip(logits, targets, None, SOFTCAP, -1, parameters),
    }


# 256 columns per warp: a thread loads 8 neighbouring elements at once
ON_CHIP_SPACE = tuple(
    {"CHUNK": 256 * warps, "AHEAD": ahead, "PROGRAMS": programs, "num_warps": warps}
    for warps in (4, 8, 16, 32)
    for ahead in (0, 2, 4)
    for programs in (1, 4, 16)
)


def logits_launches(key, dtype: torch.dtype, device: torch.device):
    x, weight = (torch.empty(n, key[2], device=device, dtype=dtype).normal_() for n in key[:2])
    name = "linear_cross_entropy_logits"
    return {"logits": lambda parameters: scaled_rows(name, x, weight, y_transposed=True, parameters=parameters)}


def input_gradient_launches(key, dtype: torch.dtype, device: torch.device):
    gradient = torch.empty(key[0], key[2], device=device, dtype=dtype).normal_()
    weight, factor = (
        torch.empty(key[2], key[1], device=device, dtype=dtype).normal_(),
        torch.ones(key[0], device=device),
    )
    name = "linear_cross_entropy_input_gradient"
    return {
        "a factor": lambda parameters: scaled_rows(name, gradient, weight, factor, parameters=parameters),
        "no factor": lambda parameters: scaled_rows(name, gradient, weight, parameters=parameters),
    }


ROWS = 1024, 16_384
LOGITS, MORE_LOGITS = (
    tuple((rows, VOCABULARY, width) for width in widths for rows in all_rows)
    for widths, all_rows in ((TUNED_WIDTHS, ROWS), ((*MORE_WIDTHS, *MODEL_WIDTHS.values()), (*ROWS, *RAGGED_ROWS)))
)
KERNELS = (
    Kernel(
        "linear_cross_entropy_logits", DTYPES[:2], LOGITS, SPACE, logits_launches,
        ((1000, 384, 96), (1001, 30, 15), *MORE_LOGITS),
    ),
    Kernel(
        "linear_cross_entropy_input_gradient", DTYPES[:2], tuple((m, c, v) for m, v, c in LOGITS), SPACE,
        input_gradient_launches, ((1000, 96, 384), (1001, 15, 30), *((m, c, v) for m, v, c in MORE_LOGITS)),
    ),
    Kernel(
        "cross_entropy_on_chip", (torch.bfloat16,),
        (*((n, "whole") for n in (1024, 32_768, 65_536)), *((n, "ragged") for n in (1023, 4095, 16_383, 65_535))),
        ON_CHIP_SPACE, on_chip_launches, tuple((n, "ragged") for n in (1, 3, 1500, 3000, 5003, 12_000, 46_000, 50_257, 50_304)),
    ),
)  # fmt: skip


def head_inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple:
    x, weight = (torch.empty(n, width, device=device, dtype=dtype).normal_() for n in (rows, vocabulary))
    return x, weight.mul_(3 * width**-0.5), torch.randint(vocabulary, (rows,), device=device)


# most of a row of the gradient of x is one number, the target's entry, times a row of the weight: its error is one number too
TARGET_ROWS = 128


def trials(shape, device: torch.device, dtype: torch.dtype):
    rows = shape.rows * shape.tokens
    inputs = (*head_inputs(rows, shape.width, shape.vocab, dtype, device), SOFTCAP, -1, "none")
    yield Trial(inputs, (0, 2), (0, 1), epsilon=SOFTCAP * 2**-23, timed=False, fewest_rows=TARGET_ROWS)
    # as training calls it, a weighted mean, which cannot be compared in chunks of rows; and with few rows compared, with a buffer that
    # the weight's gradient is added to
    yield Trial((*inputs[:5], "mean", torch.full((), 0.125, device=device)), (), (0, 1), is_loss=True, judged=False)
    rows = min(rows, 1024)
    x, weight, targets = head_inputs(rows, shape.width, shape.vocab, dtype, device)
    loss_weight, buffer = torch.full((), 0.125, device=device), torch.empty(weight.shape, device=device)
    inputs = x, weight, targets, SOFTCAP, -1, "mean", loss_weight, buffer.normal_(std=0.1 / rows)
    more = {"is_loss": True, "epsilon": SOFTCAP * 2**-23, "fewest_rows": TARGET_ROWS}
    yield Trial(inputs, (), (0,), in_place=(7,), timed=False, **more)


def benchmark_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """The call of a training run: a mean, multiplied by the weight of a micro-batch."""
    model, _, rows = shape.partition("/")
    inputs = head_inputs(int(rows or BENCHMARK_TOKENS), MODEL_WIDTHS[model], 65_536, dtype, device)
    return *inputs, SOFTCAP, -1, "mean", torch.full((), 0.125, device=device)


class BareProducts(torch.autograd.Function):
    """The three products of the head and of its gradients, with the logits in place of their gradient."""

    @staticmethod
    def forward(ctx, x, weight, *_) -> Tensor:
        logits = x @ weight.t()
        ctx.save_for_backward(x, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, _) -> tuple:
        x, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ x, *(None,) * 5


def liger():
    """Return Liger-Kernel's product and cross entropy, which work in chunks of rows."""
    try:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None

    def run(x, weight, targets, softcap, ignore_index, reduction, loss_weight):
        apply = LigerFusedLinearCrossEntropyFunction.apply
        return apply(x, weight, targets, None, None, ignore_index, 0.0, 0.0, reduction, softcap)[0] * loss_weight

    return run


def elements(arguments: tuple, part: str) -> float:
    """Count the operands and results of the products, and the logits once for each product that writes or reads them."""
    x, weight = arguments[:2]
    logits = x.size(0) * weight.size(0)
    return x.numel() + weight.numel() + (3 if part == "fwd" else 2) * logits


LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy", linear_cross_entropy, run_reference,
    {
        "triton": Implementation(run, unsupported_reason),
        "fused": Implementation(fused_cross_entropy.run, fused_cross_entropy.unsupported_reason),
    },
    (*KERNELS, *fused_cross_entropy.KERNELS), trials,
    Benchmark(
        (*MODEL_WIDTHS, "d20/8192"), benchmark_inputs, (0, 1), elements, flops, ("fwd", "both"), {"liger": liger},
        {"three products": BareProducts.apply}, is_loss=True,
    ),
)  # fmt: skip
OPERATIONS = (LINEAR_CROSS_ENTROPY,)
