"""Head, softcap and loss: cross entropy of cap·tanh(x·Wᵀ/cap) against the targets, in float32.

"triton" is torch's product and the fused cross entropy of its logits, whose gradient takes their place's worth of memory once.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.checks import check_float, check_shape, check_targets
from kernels.dispatch import Implementation, choose
from kernels.softcap_cross_entropy import refusal_of, softcap_cross_entropy


def run(x: Tensor, weight: Tensor, targets: Tensor, cap: float, ignore_index: int, reduction: str) -> Tensor:
    return softcap_cross_entropy(F.linear(x, weight), targets, cap, ignore_index, reduction, impl="triton")


def refusal(x: Tensor, weight: Tensor, targets: Tensor, cap: float, ignore_index: int, reduction: str) -> str | None:
    return refusal_of(x, x.size(0), weight.size(0), cap)


IMPLEMENTATIONS = {
    "linear_cross_entropy": {
        "triton": Implementation(run, refusal),
        "reference": Implementation(reference.linear_cross_entropy),
    }
}


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float = 15.0,
    ignore_index: int = -1,
    reduction: str = "mean",
    *,
    impl: str = "auto",
) -> Tensor:
    """Loss in nats of x (N, C) under weight (V, C) for targets (N,), int64; ignored targets lose 0.

    reduction "mean" gives a float32 scalar, the mean over targets not ignored (0 when all are); "none" gives (N,).
    Raises ValueError for shapes or a reduction that do not fit and TypeError for dtypes.
    """
    check_float("linear_cross_entropy", x=x, weight=weight)
    check_shape("linear_cross_entropy", "x", x, "N", "C")
    check_shape("linear_cross_entropy", "weight", weight, "V", x.size(1))
    check_targets("linear_cross_entropy", x, targets, cap, reduction)
    return choose(
        "linear_cross_entropy",
        impl,
        IMPLEMENTATIONS["linear_cross_entropy"],
        x,
        weight,
        targets,
        cap,
        ignore_index,
        reduction,
    )(x, weight, targets, cap, ignore_index, reduction)
