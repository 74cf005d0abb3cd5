"""The logits of a softcapped head, softcap·tanh(x·weightᵀ/softcap) in float32, for the few rows that a token is chosen from.

The product's epilogue applies the softcap to the sums before anything is rounded. It computes no gradient: training's loss is
linear_cross_entropy, which stores no logits. Gemma Team 2024 (softcap).
"""

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import autocast_products, check_float, check_shape, check_softcap, row_width
from nanochat_kernels.dispatch import choose
from nanochat_kernels.matrix_product import Epilogue, product, product_parameters, store_block, unsupported_reason
from nanochat_kernels.operation import (
    DECODED_ROWS,
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
from nanochat_kernels.product_configurations import FEW_ROWS_SPACE, FEWEST_ROWS, RAGGED_FEW_ROWS
from nanochat_kernels.tracing import opaque
from nanochat_kernels.triton_helpers import DTYPES, as_rows, exp2, needs_gradient, tl, triton


@triton.jit
def softcap_epilogue(
    sums, out_ptr, out_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store softcap·tanh(sums/softcap), computed as softcap·(1 − 2/(e^(2·sums/softcap) + 1)) where that loses no digits."""
    softcap = tl.cast(arguments[0], tl.float32)
    y = sums / softcap
    large = 1.0 - 2.0 / (exp2(y * 2.8853900817779268) + 1.0)
    square = y * y
    small = y * (
        1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
    )
    value = softcap * tl.where(square < 0.0625, small, large)
    store_block(out_ptr, out_stride, value, row, column, m, n, WHOLE)


SOFTCAPPED = Epilogue(softcap_epilogue)


def logits_shapes(x, weight, softcap):
    return x.new_empty(*x.shape[:-1], weight.size(0), dtype=torch.float32)


@opaque(logits_shapes)
def softcapped_logits_forward(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    return launch_logits(x, weight, softcap)


def launch_logits(x: Tensor, weight: Tensor, softcap: float, parameters: dict[str, int] | None = None) -> Tensor:
    rows, weight = as_rows(x), as_rows(weight)
    shape = rows.size(0), weight.size(0), rows.size(1)
    parameters = product_parameters("softcapped_logits", rows, weight, shape, None, parameters, decodes=True)
    logits = torch.empty(shape[:2], dtype=torch.float32, device=x.device)
    product(rows, weight, logits, SOFTCAPPED, parameters, (float(softcap),), y_transposed=True)
    return logits.view(*x.shape[:-1], weight.size(0))


def unsupported(x: Tensor, weight: Tensor, softcap: float) -> str | None:
    if needs_gradient(x, weight):
        return "it computes no gradient; the loss of the same head is linear_cross_entropy"
    if x.dtype == torch.float32:
        return "the fused product takes bfloat16 or float16"
    if x.shape[:-1].numel() >= FEWEST_ROWS:
        return f"it is for fewer than {FEWEST_ROWS} rows, got {x.shape[:-1].numel()}"
    return unsupported_reason(x)


def softcapped_logits(x: Tensor, weight: Tensor, softcap: float = reference.SOFTCAP, *, impl: str = "auto") -> Tensor:
    """Return softcap·tanh(x·weightᵀ/softcap) (…, V) in float32, for x (…, C) and weight (V, C).

    The reference rounds the product to x's dtype first; the fused implementation rounds nothing. Repeated calls are bitwise equal.
    Raises ValueError for mismatched shapes or devices or a softcap that is not positive and finite, TypeError for mismatched
    dtypes, and KernelRequestError (a ValueError) if the implementation named by impl does not support the call.
    """
    x, weight = autocast_products(x, weight)
    check_float("softcapped_logits", x=x, weight=weight)
    check_shape("softcapped_logits", "weight", weight, "V", row_width("softcapped_logits", x))
    check_softcap("softcapped_logits", softcap)
    return choose(SOFTCAPPED_LOGITS, impl, x, weight, softcap)(x, weight, softcap)


def inputs(rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Return random normed rows, weights whose logits reach the softcap, and the softcap."""
    x = torch.empty(rows, width, device=device, dtype=dtype).normal_()
    weight = torch.empty(vocab, width, device=device, dtype=dtype).normal_()
    return x, weight.mul_(4 * width**-0.5), reference.SOFTCAP


def launches(key, dtype: torch.dtype, device: torch.device):
    given = inputs(key[0], key[2], key[1], dtype, device)
    return {"logits": lambda parameters: launch_logits(*given, parameters)}


KERNELS = (
    Kernel(
        "softcapped_logits_few_rows", DTYPES[:2],
        tuple((rows, VOCABULARY, width) for width in TUNED_WIDTHS for rows in (16, 64)),
        FEW_ROWS_SPACE, launches,
        (
            (9, 1001, 40), (1, 4096, 768), *((16, VOCABULARY, width) for width in MORE_WIDTHS),
            *((rows, VOCABULARY, width) for rows in RAGGED_FEW_ROWS for width in MODEL_WIDTHS.values()),
        ), few_rows=True,
    ),
)  # fmt: skip


def trials(shape, device: torch.device, dtype: torch.dtype):
    yield Trial(inputs(DECODED_ROWS, shape.width, shape.vocab, dtype, device), (0,))


def elements(arguments: tuple, part: str) -> float:
    x, weight, _ = arguments
    return x.numel() + weight.numel() + 2 * x.shape[:-1].numel() * weight.size(0)


def flops(arguments: tuple, part: str, variant: str) -> float:
    return 2 * arguments[0].numel() * arguments[1].size(0)


SOFTCAPPED_LOGITS = Operation(
    "softcapped_logits", softcapped_logits, reference.softcapped_logits, {"triton": Implementation(
        lambda x, weight, softcap: softcapped_logits_forward(x, weight, float(softcap)), unsupported
    )},
    KERNELS, trials,
    Benchmark(
        tuple(MODEL_WIDTHS),
        lambda shape, dtype, device: inputs(DECODED_ROWS, MODEL_WIDTHS[shape], VOCABULARY, dtype, device),
        (), elements, flops, modes=("fwd",),
    ),
)  # fmt: skip
OPERATIONS = (SOFTCAPPED_LOGITS,)
