"""Softcap and cross entropy of given logits: loss = log Σ exp(l) − l_target with l = softcap·tanh(logits/softcap).

Forward reads the logits once. Backward reads them once more and writes their gradient once, multiplied by all factors, so that a
float16 gradient is rounded after it is multiplied by the loss scale. kernels/cross_entropy_kernels.py explains the mathematics.
"""

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import check_float, check_loss_weight, check_shape, check_targets
from nanochat_kernels.cross_entropy_kernels import LARGEST_CAP, launch_gradient, launch_losses
from nanochat_kernels.dispatch import choose
from nanochat_kernels.operation import Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.reference import SOFTCAP
from nanochat_kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    KernelFunction,
    as_rows,
    derivative,
    differentiable,
    triton_unsupported_reason,
)


class SoftcapCrossEntropy(KernelFunction):
    @staticmethod
    def forward(logits, targets, softcap, ignore_index) -> tuple[Tensor, Tensor]:
        return launch_losses(as_rows(logits), targets, softcap, ignore_index)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.options = inputs[2:]
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    def backward(ctx, dlosses, _):
        if dlosses is None:
            return None, None, None, None
        return derivative(Backward, dlosses, *ctx.saved_tensors, *ctx.options), None, None, None


class Backward(KernelFunction):
    @staticmethod
    def forward(dlosses, logits, targets, sums, softcap, ignore_index) -> Tensor:
        return launch_gradient(as_rows(logits), targets, sums, dlosses, softcap, ignore_index)


def reduced(losses: Tensor, factor: Tensor | None, mean: bool) -> Tensor:
    """Multiply the losses (N,) by a factor () or (N,), and sum them if `mean` is true; factor_of divides by the number of targets."""
    losses = losses if factor is None else losses * factor
    return losses.sum() if mean else losses


def factor_of(targets: Tensor, ignore_index: int, mean: bool, loss_weight: Tensor | None) -> Tensor | None:
    """Return the float32 factor of each row's loss, () or (N,): the loss weight, divided by the number of targets for a mean."""
    if not mean:
        return loss_weight
    share = (targets != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal()
    return share if loss_weight is None else share * loss_weight


def run(logits, targets, softcap, ignore_index, reduction, loss_weight) -> Tensor:
    losses, _ = differentiable(SoftcapCrossEntropy, logits, targets.contiguous(), softcap, ignore_index)
    mean = reduction == "mean"
    return reduced(losses, factor_of(targets, ignore_index, mean, loss_weight), mean)


def unsupported_reason_for(x: Tensor, rows: int, columns: int, softcap: float) -> str | None:
    """Return why the kernels cannot take logits (rows, columns) of x's dtype and device, or None if they can."""
    if softcap > LARGEST_CAP:
        return (
            f"it sums exp(l) without a running maximum, which needs a softcap of at most {LARGEST_CAP}, got {softcap}"
        )
    if max(rows, columns) > GRID_LIMIT:
        return f"{rows} × {columns} logits exceed the {GRID_LIMIT} rows or columns of one launch; split them"
    return triton_unsupported_reason(x)


def unsupported_reason(logits, targets, softcap, *_) -> str | None:
    return unsupported_reason_for(logits, *logits.shape, softcap)


def softcap_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    softcap: float = SOFTCAP,
    ignore_index: int = -1,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return the loss in nats of softcap·tanh(logits/softcap) for logits (N, V) and int64 targets (N,).

    The loss of a row whose target is ignore_index is 0. reduction "mean" returns a float32 scalar, the mean over the targets that
    are not ignored, or 0 if all are; "none" returns one loss per row (N,).
    loss_weight: a float32 scalar on the device, or one weight per row (N,). It multiplies the losses before the reduction; the
    mean still divides by the number of targets. NaN and infinite weights make the same elements NaN or infinite as in the
    reference, but some elements of the gradient may be NaN in one of the two and infinite in the other.
    The values of targets are not checked: one outside [0, V) raises an error in the reference and gives NaN from the kernel.
    Raises ValueError for mismatched shapes, a softcap that is not positive or an unknown reduction, TypeError for a wrong dtype, and
    KernelRequestError (a ValueError) if the implementation named by impl does not support the call. Repeated calls are bitwise
    equal.
    """
    check_float("softcap_cross_entropy", logits=logits)
    check_shape("softcap_cross_entropy", "logits", logits, "N", "V")
    check_targets("softcap_cross_entropy", logits, logits.size(1), targets, softcap, reduction)
    check_loss_weight("softcap_cross_entropy", targets, loss_weight)
    arguments = (logits, targets, float(softcap), ignore_index, reduction, loss_weight)
    return choose(SOFTCAP_CROSS_ENTROPY, impl, *arguments)(*arguments)


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    logits = torch.empty(rows, vocabulary, device=device, dtype=dtype).normal_(std=3.0)
    return logits, torch.randint(vocabulary, (rows,), device=device)


def sums_launches(key, dtype: torch.dtype, device: torch.device):
    logits, targets = random_logits(max(1, 2**30 // key[0]), *key, dtype, device)
    return {"losses": lambda parameters: launch_losses(logits, targets, SOFTCAP, -1, parameters)}


def gradient_launches(key, dtype: torch.dtype, device: torch.device):
    logits, targets = random_logits(max(1, 2**30 // key[0]), *key, dtype, device)
    sums, factor = torch.ones(len(targets), device=device), torch.ones(len(targets), device=device)
    return {
        "one factor": lambda parameters: launch_gradient(logits, targets, sums, factor[0], SOFTCAP, -1, parameters),
        "a factor per row": lambda parameters: launch_gradient(logits, targets, sums, factor, SOFTCAP, -1, parameters),
    }


VOCABULARIES = ((1024,), (32_768,), (65_536,), (131_072,))
RAGGED = ((1,), (3,), (50_257,), (65_535,))
STREAMED_SPACE = tuple({"CHUNK": chunk, "num_warps": warps} for chunk in (1024, 4096, 8192) for warps in (4, 8, 16))
KERNELS = (
    Kernel("cross_entropy_sums", DTYPES, VOCABULARIES, STREAMED_SPACE, sums_launches, RAGGED),
    Kernel("cross_entropy_gradient", DTYPES, VOCABULARIES, STREAMED_SPACE, gradient_launches, RAGGED),
)

LOGITS = 2**30  # logits of a trial at most, 2 GiB in bfloat16; of a larger batch the trial takes fewer rows


def trials(shape, device: torch.device, dtype: torch.dtype):
    rows = min(shape.rows * shape.tokens, max(1, LOGITS // shape.vocab))
    inputs = (*random_logits(rows, shape.vocab, dtype, device), SOFTCAP, -1, "none")
    yield Trial(inputs, (0, 1), (0,), epsilon=SOFTCAP * 2**-23)


def benchmark_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """The call of a training run: a mean, multiplied by the weight of a micro-batch."""
    rows = {"d20": 65_536, "chunk": 8192}[shape]
    weight = torch.full((), 0.125, device=device)
    return *random_logits(rows, 65_536, dtype, device), SOFTCAP, -1, "mean", weight


def liger():
    """Return Liger-Kernel's cross entropy, which overwrites the logits with their gradient."""
    try:
        from liger_kernel.ops import LigerCrossEntropyFunction
    except ImportError:
        return None

    def run(logits, targets, softcap, ignore_index, reduction, loss_weight):
        apply = LigerCrossEntropyFunction.apply
        return apply(logits, targets, None, ignore_index, 0.0, 0.0, reduction, softcap, False)[0] * loss_weight

    return run


SOFTCAP_CROSS_ENTROPY = Operation(
    "softcap_cross_entropy", softcap_cross_entropy, reference.softcap_cross_entropy,
    {"triton": Implementation(run, unsupported_reason)}, KERNELS, trials,
    Benchmark(
        ("d20", "chunk"), benchmark_inputs, (0,),
        elements=lambda arguments, part: arguments[0].numel() * (1 if part == "fwd" else 2),
        flops=lambda arguments, part, variant: arguments[0].numel() * (8 if part == "fwd" else 11),
        baselines={"liger": liger}, is_loss=True,
    ),
)  # fmt: skip
OPERATIONS = (SOFTCAP_CROSS_ENTROPY,)
