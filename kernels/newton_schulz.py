"""Newton-Schulz orthogonalisation for Muon: steps of an odd quintic polynomial that move every singular value close to 1.

X = G/(‖G‖ + 1e-7); then A = X·Xᵀ and X ← a·X + (b·A + c·A²)·X for each (a, b, c). A tall G uses Xᵀ·X and multiplies from the right.
X is stored in float16: no element exceeds 4, and float16 is as fast as bfloat16 with three more bits of fraction. Sums are float32,
and the norm is float64. A and b·A + c·A² are symmetric, so that only half of their tiles are computed.

The algorithm "gram" iterates on the small matrix R = X·Xᵀ only. All polynomials of R commute and are symmetric. With
P = a·I + b·R + c·R² a step updates the accumulated factor Q ← P·Q and R ← P·R·P; at the end X ← Q·X. A badly conditioned Q would
lose the small singular values, so that after the steps given by `restarts` Q is applied and R is computed from X again.
For m × 4m matrices and 5 steps this takes 38 m³ multiply-adds; the standard algorithm takes 65 m³, or 75 m³ without symmetry.

Jordan et al. 2024 (Muon), Amsel et al. 2025 (Polar Express), You 2025 (coefficients).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import check_device, check_float, check_shape
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.dispatch import choose
from nanochat_kernels.newton_schulz_coefficients import DEFAULT_STEPS, Coefficients, coefficients_of, restarts
from nanochat_kernels.operation import Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.scaled_product import KERNELS as PRODUCT_KERNELS
from nanochat_kernels.scaled_product import scaled_product
from nanochat_kernels.timing import Graph
from nanochat_kernels.tracing import NAMESPACE
from nanochat_kernels.triton_helpers import (
    DTYPES,
    KernelFunction,
    cast,
    cdiv,
    differentiable,
    launch,
    tl,
    triton,
    triton_unsupported_reason,
)

PARTS = 64  # programs that sum the squares of one matrix
MOST_MATRICES = 65_535  # programs on the second axis of a grid
LARGEST_MATRIX = 2**31 - 2**20  # elements: they are numbered in int32, by loops that exceed the end by one iteration
WORTH_GRAM = 1.5  # ratio of the sides from which "gram" takes fewer operations
ALGORITHMS = ("auto", "standard", "gram")


@triton.jit
def squares_kernel(x_ptr, squares_ptr, size, BLOCK: tl.constexpr):
    """Sum the squares of every num_programs-th block of one matrix in float64, which no gradient overflows or underflows."""
    matrix = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        element = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + (matrix * size + element), mask=element < size, other=0.0).to(tl.float64)
        total += x * x
    tl.store(squares_ptr + (matrix * tl.num_programs(0) + tl.program_id(0)), tl.sum(total))


@triton.jit
def scale_kernel(x_ptr, squares_ptr, out_ptr, size, EPS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one block of x/(‖x‖ + EPS)."""
    matrix = tl.program_id(1).to(tl.int64)
    norm = tl.sqrt(tl.sum(tl.load(squares_ptr + matrix * PARTS + tl.arange(0, PARTS))))
    factor = tl.sqrt(1.0 / (norm + EPS)).to(
        tl.float32
    )  # x is multiplied by it twice: its square may exceed the range of float32
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offsets, mask = matrix * size + element, element < size
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, cast(x * factor * factor, out_ptr.dtype.element_ty), mask=mask)


def sums_of_squares(x: Tensor, parameters: dict[str, int] | None = None) -> Tensor:
    """Return (B, 64) partial sums in float64 of the squares of each matrix of a contiguous x (B, m, n)."""
    squares, size = torch.empty(x.size(0), PARTS, dtype=torch.float64, device=x.device), x.size(1) * x.size(2)
    parameters = parameters or launch_parameters("matrix_squares", x.device, x.dtype, (size,))
    launch(squares_kernel, (PARTS, x.size(0)), x.device, x, squares, size, **parameters)
    return squares


def normalised(x: Tensor, squares: Tensor | None = None, parameters: dict[str, int] | None = None) -> Tensor:
    """Divide each matrix of a contiguous x (B, m, n) by its norm, in float16; squares: sums_of_squares(x), if already known."""
    out, size = torch.empty(x.shape, dtype=torch.float16, device=x.device), x.size(1) * x.size(2)
    squares = sums_of_squares(x) if squares is None else squares.contiguous()
    parameters = parameters or launch_parameters("matrix_scale", x.device, x.dtype, (size,))
    launch(
        scale_kernel, (cdiv(size, parameters["BLOCK"]), x.size(0)), x.device,
        x, squares, out, size, EPS=reference.NORM_EPS, PARTS=PARTS, **parameters,
    )  # fmt: skip
    return out


def gram_of(x: Tensor, tall: bool) -> Tensor:
    """Return x·xᵀ, or xᵀ·x for a tall x."""
    return scaled_product(x, x, x_transposed=tall, y_transposed=not tall, symmetric=True)


def apply_factor(factor: Tensor, x: Tensor, tall: bool, plus: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """Return plus·x + factor·x, or plus·x + x·factor for a tall x; the factor is symmetric."""
    left, right = (x, factor) if tall else (factor, x)
    return scaled_product(left, right, x if plus else None, beta=plus, dtype=dtype)


def symmetric_product(x: Tensor, y: Tensor) -> Tensor:
    """Return the product of two symmetric matrices that commute; it is symmetric as well."""
    return scaled_product(x, y, y_transposed=True, symmetric=True)


def standard(x: Tensor, coefficients: Coefficients, dtype: torch.dtype) -> Tensor:
    tall = x.size(1) > x.size(2)
    for i, (a, b, c) in enumerate(coefficients):
        gram = gram_of(x, tall)
        factor = scaled_product(gram, gram, gram, alpha=c, beta=b, y_transposed=True, symmetric=True)
        x = apply_factor(factor, x, tall, a, dtype if i + 1 == len(coefficients) else None)
    return x


def gram(x: Tensor, coefficients: Coefficients, dtype: torch.dtype) -> Tensor:
    tall = x.size(1) > x.size(2)
    ends = (*restarts(coefficients), len(coefficients))
    factor, small = None, gram_of(x, tall)
    for i, (a, b, c) in enumerate(coefficients, 1):
        step = scaled_product(small, small, small, alpha=c, beta=b, gamma=a, y_transposed=True, symmetric=True)
        factor = step if factor is None else symmetric_product(step, factor)
        if i == len(coefficients):
            break
        if i in ends:
            x = apply_factor(factor, x, tall)
            factor, small = None, gram_of(x, tall)
        else:
            small = symmetric_product(symmetric_product(step, small), step)
    return apply_factor(factor, x, tall, dtype=dtype)


def orthogonalise(
    gradients: Tensor, coefficients: Coefficients, algorithm: str, squares: Tensor | None = None
) -> Tensor:  # fmt: skip
    if algorithm == "auto":
        algorithm = fastest(gradients.shape[-2:], coefficients)
    x = gradients.reshape(-1, *gradients.shape[-2:]).contiguous()
    if not x.numel():
        return torch.empty(gradients.shape, dtype=gradients.dtype, device=gradients.device)
    x = normalised(x, squares)
    compute = gram if algorithm == "gram" else standard
    x = compute(x, coefficients, gradients.dtype) if coefficients else x.to(gradients.dtype)
    return x.view(gradients.shape)


class NewtonSchulz(KernelFunction):
    forward = staticmethod(orthogonalise)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "newton_schulz has no derivative: call it with impl='reference', which torch can differentiate"
        )


@torch.library.custom_op(f"{NAMESPACE}::newton_schulz", mutates_args=())
def newton_schulz_op(
    gradients: Tensor, coefficients: list[float], algorithm: str, squares: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The operation under torch.compile. It may be opaque, because fusing its products with other operations gains nothing."""
    steps = tuple(tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3))
    return orthogonalise(gradients, steps, algorithm, squares)


@newton_schulz_op.register_fake
def _(gradients, coefficients, algorithm, squares=None):
    return gradients.new_empty(gradients.shape)


def run(gradients: Tensor, coefficients: Coefficients, algorithm: str, squares: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return newton_schulz_op(gradients, [number for step in coefficients for number in step], algorithm, squares)
    return differentiable(NewtonSchulz, gradients, coefficients, algorithm, squares)


def run_reference(gradients: Tensor, coefficients: Coefficients = DEFAULT_STEPS, *_) -> Tensor:
    """reference.newton_schulz, which has one algorithm and computes the norm itself."""
    return reference.newton_schulz(gradients, coefficients)


def fastest(shape: Sequence[int], coefficients: Coefficients) -> str:
    """Return the algorithm with fewer operations for matrices of this shape."""
    if max(shape) < WORTH_GRAM * min(shape) or len(coefficients) < 2:
        return "standard"
    try:
        restarts(coefficients)
    except ValueError:
        return "standard"
    return "gram"


def unsupported_reason(
    gradients: Tensor, coefficients: Coefficients, algorithm: str, squares: Tensor | None
) -> str | None:  # fmt: skip
    if gradients.dtype not in DTYPES[:2]:
        return f"the matrix units take bfloat16 or float16, got {gradients.dtype}; cast the gradients"
    if gradients.size(-1) * gradients.size(-2) > LARGEST_MATRIX:
        return f"a matrix of {tuple(gradients.shape[-2:])} has more elements than one launch can number"
    if gradients.shape[:-2].numel() > MOST_MATRICES:
        return f"{gradients.shape[:-2].numel()} matrices exceed the {MOST_MATRICES} of one launch; split them"
    return triton_unsupported_reason(gradients)


def newton_schulz(
    gradients: Tensor,
    steps: int = 5,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "model",
    algorithm: str = "auto",
    squares: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Orthogonalise each matrix of gradients (…, m, n); the result has the same shape and dtype.

    coefficients: "model", "polar_express", "you", one (a, b, c), or one (a, b, c) per step; if there are fewer than `steps`, the
    last is repeated. algorithm: "standard", "gram", or "auto", which takes the one with fewer operations for the shape. squares (B,
    64), float64: partial sums of the squares of each matrix of (B, m, n), if they are already known. With the default coefficients,
    singular values of at least 0.01 ‖G‖ end in [0.68, 1.14] and smaller ones below 1.21. A matrix with a NaN or an infinity becomes
    NaN and changes no other matrix; a matrix of zeros stays zero. Repeated calls are bitwise equal. Raises ValueError for fewer
    than two axes, negative steps, unknown coefficients, an unknown algorithm, and "gram" with coefficients whose factors float16
    cannot hold, TypeError for a dtype that is not floating point, and KernelRequestError (a ValueError) if the implementation named
    by impl does not support the call. The fused kernels have no derivative and raise RuntimeError in backward.
    """
    check_float("newton_schulz", gradients=gradients)
    if gradients.dim() < 2:
        raise ValueError(f"newton_schulz: gradients must be (…, m, n), got shape {tuple(gradients.shape)}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"newton_schulz: steps must be an integer of at least 0, got {steps!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"newton_schulz: algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if squares is not None:
        check_shape("newton_schulz", "squares", squares, gradients.shape[:-2].numel(), PARTS)
        check_device("newton_schulz", gradients=gradients, squares=squares)
        if squares.dtype != torch.float64:
            raise TypeError(f"newton_schulz: squares must be float64, got {squares.dtype}")
    arguments = (gradients, coefficients_of(steps, coefficients), algorithm, squares)
    return choose(NEWTON_SCHULZ, impl, *arguments)(*arguments)


def matrices(key, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(4, 1, *key, device=device, dtype=dtype).normal_()


def squares_launches(key, dtype: torch.dtype, device: torch.device):
    return {"squares": partial(sums_of_squares, matrices(key, dtype, device))}


def scale_launches(key, dtype: torch.dtype, device: torch.device):
    x = matrices(key, dtype, device)
    squares = torch.ones(4, PARTS, device=device, dtype=torch.float64)
    return {"scale": lambda parameters: normalised(x, squares, parameters)}


SIZES = ((1280 * 1280,),)  # elements of a matrix
KERNELS = (
    Kernel(
        "matrix_squares", DTYPES[:2], SIZES, ({"BLOCK": 1024, "num_warps": 4},), squares_launches, ((1001,),)
    ),
    Kernel("matrix_scale", DTYPES[:2], SIZES, ({"BLOCK": 4096, "num_warps": 4},), scale_launches, ((1001,),)),
    *PRODUCT_KERNELS,
)  # fmt: skip


def judge(gradients: Tensor, results: tuple[Tensor, ...]) -> str | None:
    """Compare every matrix with the one that the reference gives in float64, by direction and by norm."""
    found, chunk = results[0], max(1, 2**26 // gradients[0].numel())
    for start in range(0, len(gradients), chunk):
        part = slice(start, start + chunk)
        true, given = reference.newton_schulz(gradients[part].double()).flatten(1), found[part].double().flatten(1)
        cosine = torch.nn.functional.cosine_similarity(true, given, dim=1)
        ratio = given.norm(dim=1) / true.norm(dim=1)
        wrong = ~((cosine >= 0.999) & ((ratio - 1).abs() <= 0.02))  # NaN is wrong
        for i in wrong.nonzero().flatten().tolist()[:1]:
            return (
                f"matrix {start + i}: cosine {cosine[i]:.4f} and norm {ratio[i]:.3f} × that of float64; "
                "expected at least 0.999 and 0.98 to 1.02"
            )
    return None


def one_by_one(gradients: Tensor, *_) -> Tensor:
    """The reference of each matrix (m, n) of gradients (B, m, n), one after the other, as the plain optimizer computes it."""
    return torch.stack([reference.newton_schulz(matrix) for matrix in gradients])


def trials(shape, device: torch.device, dtype: torch.dtype):
    """All matrices of the model: four square ones in each layer, one four times as high and one four times as wide."""
    half, w = dtype if dtype in DTYPES[:2] else torch.bfloat16, shape.width
    for count, m, n in ((4 * shape.depth, w, w), (shape.depth, 4 * w, w), (shape.depth, w, 4 * w)):
        gradients = torch.empty(count, m, n, device=device, dtype=half).normal_()
        yield Trial((gradients,), (0,), judge=partial(judge, gradients), timed_reference=one_by_one)


def model_matrices(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return all matrices of a model ("d20") by shape, or those that the busiest of eight ranks orthogonalises ("d20/8")."""
    depth, _, ranks = shape[1:].partition("/")
    w, ranks = 64 * int(depth), int(ranks or 1)
    work, counts = [0] * ranks, []
    # the matrices of a shape are dealt out evenly; those left over go to the ranks with the least work so far
    for count, m, n in ((int(depth), w, 4 * w), (int(depth), 4 * w, w), (4 * int(depth), w, w)):
        least = sorted(range(ranks), key=lambda rank: (work[rank], rank))[: count % ranks]
        counts.append(([count // ranks + (rank in least) for rank in range(ranks)], m, n))
        work = [done + mine * w * m * n for done, mine in zip(work, counts[-1][0], strict=True)]
    busiest = max(range(ranks), key=work.__getitem__)
    return tuple(torch.empty(c[busiest], m, n, device=device, dtype=dtype).normal_() for c, m, n in counts)


def flops(groups: tuple[Tensor, ...], part: str, variant: str) -> float:
    """Count a variant's operations: "standard" computes half of the symmetric products, "triton" and "graph" take the Gram algorithm
    for matrices that are not square, and all others compute the plain products."""
    total = 0.0
    for x in groups:
        m, n = sorted(x.shape[1:])
        each = 5 * (4 * m * m * n + 2 * m**3)
        if variant == "standard" or (variant in ("triton", "graph") and m == n):
            each = 5 * (3 * m * m * n + m**3)
        elif variant in ("triton", "graph"):  # two of R, fourteen small products, two of Q·X
            each = 2 * m * m * n + 14 * m**3 + 4 * m * m * n
        total += x.size(0) * each
    return total


def variants(groups: tuple[Tensor, ...]):
    """Return the variants to measure.

    The fused operation: "triton"; "graph", replayed from a CUDA graph as in training; "standard", with the standard algorithm. The
    reference: "eager", one matrix after the other; "compile", compiled and batched; "compile_graph", the same from a CUDA graph;
    "loop", compiled, one matrix after the other.
    """
    torch._dynamo.reset()  # else torch.compile stops compiling a function at its eighth shape
    compiled = torch.compile(reference.newton_schulz, dynamic=False)

    def fused(_=0):
        return [newton_schulz(x, impl="triton") for x in groups]

    def batched(_=0):
        return [compiled(x) for x in groups]

    return {
        "triton": fused,
        "graph": partial(Graph(fused), 0),
        "standard": lambda: [newton_schulz(x, algorithm="standard", impl="triton") for x in groups],
        "eager": lambda: [[reference.newton_schulz(matrix) for matrix in x] for x in groups],
        "compile": batched,
        "compile_graph": partial(Graph(batched), 0),
        "loop": lambda: [[compiled(matrix) for matrix in x] for x in groups],
    }


NEWTON_SCHULZ = Operation(
    "newton_schulz", newton_schulz, run_reference, {"triton": Implementation(run, unsupported_reason)}, KERNELS, trials,
    Benchmark(
        shapes=("d4", "d12", "d20", "d20/8", "d32"),
        inputs=model_matrices,
        differentiable=(),
        elements=lambda groups, part: 2 * sum(x.numel() for x in groups),
        flops=flops,
        modes=("fwd",),
        variants=variants,
    ),
)  # fmt: skip
OPERATIONS = (NEWTON_SCHULZ,)
