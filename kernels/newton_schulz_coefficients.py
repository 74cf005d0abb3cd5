"""Coefficients (a, b, c) of the Newton-Schulz steps, and the steps after which the Gram algorithm restarts."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from nanochat_kernels import reference

Coefficients = tuple[tuple[float, float, float], ...]

# Polar Express for singular values in [1e-3, 1]; below, each step is rescaled to tolerate a norm that is 5 % too large
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
COEFFICIENTS: dict[str, Coefficients] = {
    "model": (reference.NEWTON_SCHULZ_COEFFICIENTS,),
    "polar_express": tuple((a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in _POLAR_EXPRESS),
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
DEFAULT_STEPS: Coefficients = 5 * COEFFICIENTS["model"]
LARGEST_CONDITION = 100.0  # of a factor Q, which float16 represents to 2⁻¹¹


def coefficients_of(steps: int, coefficients: str | Sequence) -> Coefficients:
    """Return one (a, b, c) per step. Raises ValueError for an unknown name or a triple that does not have three numbers."""
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"newton_schulz: coefficients must be one of {', '.join(COEFFICIENTS)} or numbers, got {coefficients!r}"
            )
        coefficients = COEFFICIENTS[coefficients]
    if isinstance(coefficients, Sequence) and coefficients and not isinstance(coefficients[0], Sequence):
        coefficients = (coefficients,)
    if not isinstance(coefficients, Sequence) or not coefficients or not all(map(is_triple, coefficients)):
        raise ValueError(f"newton_schulz: coefficients must be one (a, b, c) or one per step, got {coefficients!r}")
    triples = tuple(tuple(map(float, step)) for step in coefficients[:steps])
    return triples + (triples[-1:] * (steps - len(triples)))


def is_triple(step: object) -> bool:
    return isinstance(step, Sequence) and len(step) == 3 and all(isinstance(number, (int, float)) for number in step)


def conditions(coefficients: Coefficients) -> list[list[float]]:
    """Return, at [start][end], the ratio of the largest to the smallest factor of the steps between, on singular values in [0, 1]."""
    x = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    found = []
    for start, first in enumerate(coefficients):
        factor, value, row = torch.ones_like(x), x, [1.0] * (start + 1)
        for step in coefficients[start:]:
            factor, value = factor * multiplier(step, value), value * multiplier(step, value)
            row.append(float(factor.abs().max() / factor.abs().min()))
        found.append(row)
        x = x * multiplier(first, x)
    return found


def multiplier(step: tuple[float, float, float], x: torch.Tensor) -> torch.Tensor:
    """Return what a step multiplies the singular values x by."""
    a, b, c = step
    return a + b * x**2 + c * x**4


@lru_cache
def restarts(coefficients: Coefficients) -> tuple[int, ...]:
    """Return the steps after which "gram" restarts: as few as possible with every condition number within LARGEST_CONDITION.

    Among equally many it takes the steps with the smallest condition number. Raises ValueError if there are none, as for
    polynomials with a zero in [0, 1].
    """
    steps, between = len(coefficients), conditions(coefficients)
    # for every end, the largest condition number up to it, and the restarts before it: at first without any
    best = [(between[0][end], ()) for end in range(steps + 1)] if steps else [(1.0, ())]
    for _ in range(steps):
        if best[-1][0] <= LARGEST_CONDITION:
            return best[-1][1]
        best = [
            min(
                ((max(best[start][0], between[start][end]), (*best[start][1], start)) for start in range(1, end)),
                key=lambda found: found[0],
                default=(float("inf"), ()),
            )
            for end in range(steps + 1)
        ]
    raise ValueError(
        f"newton_schulz: algorithm 'gram' needs coefficients that keep the condition number of its factors within "
        f"{LARGEST_CONDITION}, got {coefficients}; take algorithm 'standard'"
    )
