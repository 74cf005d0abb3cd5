"""Newton-Schulz orthogonalisation for Muon: five steps of an odd quintic that push every singular value near 1."""

from torch import Tensor

from kernels import reference
from kernels.checks import check_float
from kernels.dispatch import Implementation, choose
from kernels.reference import NEWTON_SCHULZ_COEFFICIENTS

IMPLEMENTATIONS = {"newton_schulz": {"reference": Implementation(reference.newton_schulz)}}


def newton_schulz(
    gradients: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ_COEFFICIENTS,
    *,
    impl: str = "auto",
) -> Tensor:
    """Orthogonalise each matrix of gradients (…, m, n) in the dtype given; the result has its shape and dtype.

    Singular values of at least 1e-2 of the largest end in [0.68, 1.14] with the default coefficients.
    Raises ValueError for fewer than two axes or a negative number of steps. Jordan et al. 2024 (Muon).
    """
    check_float("newton_schulz", gradients=gradients)
    if gradients.dim() < 2:
        raise ValueError(f"newton_schulz: gradients must be (…, m, n), got shape {tuple(gradients.shape)}")
    if steps < 0:
        raise ValueError(f"newton_schulz: steps must not be negative, got {steps}")
    return choose("newton_schulz", impl, IMPLEMENTATIONS["newton_schulz"], gradients, steps, coefficients)(
        gradients, steps, coefficients
    )
