"""Root-mean-square norm over the last axis: y = x / sqrt(mean(x²) + eps), eps = float32's epsilon, no weight."""

from torch import Tensor

from kernels import reference
from kernels.checks import check_float
from kernels.dispatch import choose

IMPLEMENTATIONS = {"reference": reference.rms_norm}


def rms_norm(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Normalise each row of x (…, C) by its root mean square; the result has x's shape and dtype.

    Raises TypeError when x is not floating point and ValueError when it has no axis or an unknown impl is asked for.
    Zhang and Sennrich 2019, without the gain.
    """
    check_float("rms_norm", x=x)
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one axis, got a scalar")
    return choose("rms_norm", impl, IMPLEMENTATIONS)(x)
