"""Newton-Schulz orthogonalisation for Muon: an odd quintic, a few times, that pushes every singular value near 1.

X = G/(‖G‖ + 1e-7); then A = X·Xᵀ, X ← a·X + (b·A + c·A²)·X for each (a, b, c); the other way round where G is tall.
Inside, 16-bit floats with 11 bits of fraction, since no number passes 4 and float16 is as fast as bfloat16; sums and the
norm in float32 and float64. A and b·A + c·A² are symmetric: half of their tiles are computed.

"gram" iterates on the small matrix R = X·Xᵀ alone. All polynomials of R commute and are symmetric, so with
P = a·I + b·R + c·R² the factor of X so far is Q ← P·Q, and R ← P·R·P; at the end X ← Q·X. A factor Q that is
badly conditioned loses the small singular values, so Q is applied and R made anew after the step where `restarts` says.
For m × 4m matrices and 5 steps this takes 38 m³ multiply-adds where the plain algorithm takes 65 (75 without symmetry).

Jordan et al. 2024 (Muon), Amsel et al. 2025 (Polar Express), You 2025 (coefficients).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_float, check_shape
from kernels.dispatch import Implementation, choose
from kernels.matrix_product import KERNELS as PRODUCT_KERNELS
from kernels.matrix_product import product
from kernels.triton_helpers import DTYPES, cast, cdiv, tl, traced_as, triton, triton_refusal

Coefficients = tuple[tuple[float, float, float], ...]

# of Polar Express for the interval from 1e-3, each step made safe against a norm 5 % too large
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
PARTS = 64  # of a matrix, whose squares are summed apart
LARGEST_CONDITION = 100.0  # of a factor Q, which float16 holds to 2⁻¹¹
WORTH_GRAM = 1.5  # times as long as wide: from there "gram" has fewer operations
ALGORITHMS = ("auto", "standard", "gram")


@triton.jit
def squares_kernel(x, partial, size, BLOCK: tl.constexpr):
    """A share of the sum of the squares of one matrix, in float64: no gradient is too large or too small for it."""
    matrix = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        tile = tl.load(x + matrix * size + at, mask=at < size, other=0.0).to(tl.float64)
        total += tile * tile
    tl.store(partial + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


@triton.jit
def scale_kernel(x, partial, out, size, EPS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of x/(‖x‖ + EPS)."""
    matrix = tl.program_id(1).to(tl.int64)
    norm = tl.sqrt(tl.sum(tl.load(partial + matrix * PARTS + tl.arange(0, PARTS))))
    factor = tl.sqrt(1.0 / (norm + EPS)).to(tl.float32)  # twice its root, which float32 always holds
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(x + matrix * size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + matrix * size + at, cast(tile * factor * factor, out.dtype.element_ty), mask=at < size)


def normalised(x: Tensor, squares: Tensor | None = None) -> Tensor:
    """Each matrix of x (B, m, n), contiguous, divided by its norm, in float16; squares: sums that make the square of it."""
    out, size = torch.empty(x.shape, dtype=torch.float16, device=x.device), x[0].numel()
    if squares is None:
        squares = torch.empty(x.size(0), PARTS, dtype=torch.float64, device=x.device)
        squares_kernel[(PARTS, x.size(0))](x, squares, size, BLOCK=1024)
    scale_kernel[(cdiv(size, 4096), x.size(0))](x, squares, out, size, EPS=reference.NORM_EPS, PARTS=PARTS, BLOCK=4096)
    return out


def gram_of(x: Tensor, tall: bool) -> Tensor:
    """x·xᵀ, or xᵀ·x of a tall x."""
    return product(x, x, x_transposed=tall, y_transposed=not tall, symmetric=True)


def applied(factor: Tensor, x: Tensor, tall: bool, plus: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """plus·x + factor·x, or plus·x + x·factor of a tall x; the factor is symmetric."""
    left, right = (x, factor) if tall else (factor, x)
    return product(left, right, x if plus else None, beta=plus, dtype=dtype)


def together(x: Tensor, y: Tensor) -> Tensor:
    """The product of symmetric matrices that commute."""
    return product(x, y, y_transposed=True, symmetric=True)


def standard(x: Tensor, coefficients: Coefficients, dtype: torch.dtype) -> Tensor:
    tall = x.size(1) > x.size(2)
    for i, (a, b, c) in enumerate(coefficients):
        gram = gram_of(x, tall)
        factor = product(gram, gram, gram, alpha=c, beta=b, y_transposed=True, symmetric=True)
        x = applied(factor, x, tall, a, dtype if i + 1 == len(coefficients) else None)
    return x


def gram(x: Tensor, coefficients: Coefficients, dtype: torch.dtype) -> Tensor:
    tall = x.size(1) > x.size(2)
    ends = (*restarts(coefficients), len(coefficients))
    factor, small = None, gram_of(x, tall)
    for i, (a, b, c) in enumerate(coefficients, 1):
        step = product(small, small, small, alpha=c, beta=b, gamma=a, y_transposed=True, symmetric=True)
        factor = step if factor is None else together(step, factor)
        if i == len(coefficients):
            break
        if i in ends:
            x = applied(factor, x, tall)
            factor, small = None, gram_of(x, tall)
        else:
            small = together(together(step, small), step)
    return applied(factor, x, tall, dtype=dtype)


def conditions(coefficients: Coefficients, ends: Sequence[int]) -> list[float]:
    """Largest over smallest factor that a singular value in [0, 1] can meet, for the steps up to each of `ends`."""
    x = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    found, start = [], 0
    for end in ends:
        factor = torch.ones_like(x)
        for a, b, c in coefficients[start:end]:
            step = a + b * x**2 + c * x**4
            factor, x = factor * step, x * step
        found.append(float(factor.abs().max() / factor.abs().min()))
        start = end
    return found


@lru_cache
def restarts(coefficients: Coefficients) -> tuple[int, ...]:
    """After how many steps "gram" starts anew: the fewest times that keep every condition within LARGEST_CONDITION, where
    they are smallest. Raises ValueError for polynomials that have a zero in [0, 1]."""
    steps = len(coefficients)
    for count in range(steps):
        chosen = min(
            combinations(range(1, steps), count),
            key=lambda inner: max(conditions(coefficients, (*inner, steps))),
        )
        if max(conditions(coefficients, (*chosen, steps))) <= LARGEST_CONDITION:
            return chosen
    raise ValueError(
        f"newton_schulz: algorithm 'gram' needs coefficients whose steps keep the condition of their factors within "
        f"{LARGEST_CONDITION}, got {coefficients}; take algorithm 'standard'"
    )


@torch.library.custom_op("nanochat::newton_schulz", mutates_args=())
def newton_schulz_op(
    gradients: Tensor, coefficients: list[float], algorithm: str, squares: Tensor | None = None
) -> Tensor:
    steps = tuple(tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3))
    if algorithm == "auto":
        algorithm = fastest(gradients.shape[-2:], steps)
    x = gradients.reshape(-1, *gradients.shape[-2:]).contiguous()
    if not x.numel():
        return torch.empty_like(gradients)
    x = normalised(x, squares)
    x = (gram if algorithm == "gram" else standard)(x, steps, gradients.dtype) if steps else x.to(gradients.dtype)
    return x.view(gradients.shape)


@traced_as(newton_schulz_op)
def _(gradients, coefficients, algorithm, squares=None):
    return gradients.new_empty(gradients.shape)


def run(gradients: Tensor, coefficients: Coefficients, algorithm: str, squares: Tensor | None) -> Tensor:
    return newton_schulz_op(gradients, [number for step in coefficients for number in step], algorithm, squares)


def fastest(shape: Sequence[int], coefficients: Coefficients) -> str:
    """The algorithm with fewer operations for matrices of this shape."""
    if max(shape) < WORTH_GRAM * min(shape) or len(coefficients) < 2:
        return "standard"
    try:
        restarts(coefficients)
    except ValueError:
        return "standard"
    return "gram"


def refusal(gradients: Tensor, coefficients: Coefficients, algorithm: str, squares: Tensor | None) -> str | None:
    if gradients.dtype not in DTYPES[:2]:
        return f"the matrix units take bfloat16 or float16, got {gradients.dtype}; cast the gradients"
    if gradients.size(-1) * gradients.size(-2) >= 2**31:
        return f"a matrix of {tuple(gradients.shape[-2:])} has more elements than one launch can number"
    return triton_refusal(gradients)


IMPLEMENTATIONS = {
    "newton_schulz": {
        "triton": Implementation(run, refusal),
        "reference": Implementation(
            lambda gradients, coefficients, *_: reference.newton_schulz(gradients, coefficients)
        ),
    }
}


def newton_schulz(
    gradients: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "model",
    algorithm: str = "auto",
    squares: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Orthogonalise each matrix of gradients (…, m, n); the result has its shape and dtype.

    coefficients: "model", "polar_express", "you", one (a, b, c) or one a step; where there are fewer than `steps`, the last
    is repeated. algorithm: "standard", "gram" or "auto", which takes what has fewer operations for the shape.
    squares (B, 64), float64: sums of squares that together make ‖G‖² of each matrix of (B, m, n), where they are known already.
    With the default, singular values of at least 0.01 ‖G‖ end in [0.68, 1.14], smaller ones below 1.21. A matrix with a
    NaN or an infinity becomes NaN and no other does; one of zeros stays zero. Repeated calls are bitwise equal.
    Raises ValueError for fewer than two axes, negative steps, unknown coefficients or algorithm, TypeError for a dtype that
    is not floating point, and KernelRequestError (a ValueError) when an implementation asked for by name cannot serve.
    """
    check_float("newton_schulz", gradients=gradients)
    if gradients.dim() < 2:
        raise ValueError(f"newton_schulz: gradients must be (…, m, n), got shape {tuple(gradients.shape)}")
    if steps < 0:
        raise ValueError(f"newton_schulz: steps must not be negative, got {steps}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"newton_schulz: algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if squares is not None:
        check_shape("newton_schulz", "squares", squares, gradients.shape[:-2].numel(), PARTS)
    arguments = (gradients, coefficients_of(steps, coefficients), algorithm, squares)
    return choose("newton_schulz", impl, IMPLEMENTATIONS["newton_schulz"], *arguments)(*arguments)


def coefficients_of(steps: int, coefficients: str | Sequence) -> Coefficients:
    """One triple a step."""
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"newton_schulz: coefficients must be one of {', '.join(COEFFICIENTS)} or numbers, got {coefficients!r}"
            )
        coefficients = COEFFICIENTS[coefficients]
    if coefficients and not isinstance(coefficients[0], Sequence):
        coefficients = (coefficients,)
    if not coefficients or any(len(step) != 3 for step in coefficients):
        raise ValueError(f"newton_schulz: coefficients must be one (a, b, c) or one a step, got {coefficients!r}")
    triples = tuple(tuple(map(float, step)) for step in coefficients[:steps])
    return triples + (triples[-1:] * (steps - len(triples)))


KERNELS = PRODUCT_KERNELS
