"""The two-layer perceptron with squared ReLU: y = relu(x·w1ᵀ)²·w2ᵀ."""

from torch import Tensor

from kernels import reference
from kernels.checks import check_float, check_shape
from kernels.dispatch import Implementation, choose

IMPLEMENTATIONS = {"relu2_mlp": {"reference": Implementation(reference.relu2_mlp)}}


def relu2_mlp(x: Tensor, w1: Tensor, w2: Tensor, *, impl: str = "auto") -> Tensor:
    """x (…, C), w1 (F, C), w2 (C, F); returns (…, C) in x's dtype.

    Raises ValueError for shapes that do not fit and TypeError for unlike dtypes. So et al. 2021 (Primer).
    """
    check_float("relu2_mlp", x=x, w1=w1, w2=w2)
    check_shape("relu2_mlp", "w1", w1, "F", x.size(-1))
    check_shape("relu2_mlp", "w2", w2, x.size(-1), w1.size(0))
    return choose("relu2_mlp", impl, IMPLEMENTATIONS["relu2_mlp"], x, w1, w2)(x, w1, w2)
