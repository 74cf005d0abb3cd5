"""What surrounds the orthogonalisation in a step of Muon, and AdamW: each one pass over its tensors, in place.

nesterov_momentum: m ← m + (1 − μ)(g − m) with g = clip·gradient, and the direction g + μ(m − g), with its squares summed.
apply_update: w ← w − factor·rate·u, and a copy of w in another dtype.
adamw: the moments of g, their bias corrected, and w ← w − factor·rate·(m/b₁)/(√(v/b₂) + ε), without decay, copied likewise.
Numbers that change from step to step (clip, μ, rate, b₁, b₂) are float32 scalars on the device, so that a step can be
captured in a CUDA graph once and no step waits for the host.
Jordan et al. 2024 (Muon), Loshchilov and Hutter 2019 (AdamW).
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_float, check_shape
from kernels.dispatch import Implementation, choose
from kernels.newton_schulz import PARTS
from kernels.triton_helpers import cast, cdiv, tl, triton, triton_refusal

BLOCK = 2048


@triton.jit
def momentum_kernel(gradient, momentum, direction, partial, clip, mu, size, BLOCK: tl.constexpr):
    """A share of one matrix."""
    matrix = tl.program_id(1).to(tl.int64)
    c, decay = tl.load(clip), tl.load(mu)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = matrix * size + at
        g = tl.load(gradient + here, mask=at < size, other=0.0).to(tl.float32) * c
        m = tl.load(momentum + here, mask=at < size, other=0.0)
        m += (1.0 - decay) * (g - m)
        tl.store(momentum + here, m, mask=at < size)
        way = cast(g + decay * (m - g), direction.dtype.element_ty)
        tl.store(direction + here, way, mask=at < size)
        wide = way.to(tl.float32).to(tl.float64)
        total += wide * wide
    tl.store(partial + matrix * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


@triton.jit
def update_kernel(weight, update, copy, rate, size, factor, COPY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + at, mask=at < size)
    u = tl.load(update + at, mask=at < size).to(tl.float32)
    w -= u * (factor * tl.load(rate))
    tl.store(weight + at, w, mask=at < size)
    if COPY:
        tl.store(copy + at, cast(w, copy.dtype.element_ty), mask=at < size)


@triton.jit
def adamw_kernel(
    weight, gradient, mean, variance, copy, clip, rate, bias1, bias2, size, factor, new1, new2, eps,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + at, mask=at < size, other=0.0).to(tl.float32) * tl.load(clip)
    m = tl.load(mean + at, mask=at < size, other=0.0)
    v = tl.load(variance + at, mask=at < size, other=0.0)
    m += new1 * (g - m)  # 1 − β, rounded once
    v += new2 * (g * g - v)
    tl.store(mean + at, m, mask=at < size)
    tl.store(variance + at, v, mask=at < size)
    step = (m / tl.load(bias1)) / (tl.sqrt_rn(v / tl.load(bias2)) + eps)
    w = tl.load(weight + at, mask=at < size, other=0.0)
    w -= step * (factor * tl.load(rate))
    tl.store(weight + at, w, mask=at < size)
    if COPY:
        tl.store(copy + at, cast(w, copy.dtype.element_ty), mask=at < size)


def run_momentum(gradient: Tensor, momentum: Tensor, clip: Tensor, mu: Tensor, dtype: torch.dtype):
    direction = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    batch = gradient.size(0)
    partial = torch.empty(batch, PARTS, dtype=torch.float64, device=gradient.device)
    if batch:
        size = gradient[0].numel()
        momentum_kernel[(PARTS, batch)](gradient, momentum, direction, partial, clip, mu, size, BLOCK=BLOCK)
    return direction, partial


def run_update(weight: Tensor, update: Tensor, rate: Tensor, factor: float, copy: Tensor | None = None) -> None:
    if weight.numel():
        update_kernel[(cdiv(weight.numel(), BLOCK),)](
            weight, update, weight if copy is None else copy, rate, weight.numel(), factor, COPY=copy is not None,
            BLOCK=BLOCK,
        )  # fmt: skip


def run_adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, variance: Tensor, clip: Tensor, rate: Tensor, biases: Tensor,
    factor: float, betas: tuple[float, float], eps: float, copy: Tensor | None = None,
) -> None:  # fmt: skip
    if weight.numel():
        adamw_kernel[(cdiv(weight.numel(), BLOCK),)](
            weight, gradient, mean, variance, weight if copy is None else copy, clip, rate, biases, biases[1:],
            weight.numel(), factor, 1 - betas[0], 1 - betas[1], eps, COPY=copy is not None, BLOCK=BLOCK,
        )  # fmt: skip


def refusal(first: Tensor, second: Tensor, *rest) -> str | None:
    tensors = [first, second, *(x for x in rest if isinstance(x, Tensor) and x.dim() > 1)]
    if not all(x.is_contiguous() for x in tensors):
        return "it updates contiguous tensors in place, and one is not"
    return triton_refusal(first)


IMPLEMENTATIONS = {
    "nesterov_momentum": {
        "triton": Implementation(run_momentum, refusal),
        "reference": Implementation(reference.nesterov_momentum),
    },
    "apply_update": {
        "triton": Implementation(run_update, refusal),
        "reference": Implementation(reference.apply_update),
    },
    "adamw": {"triton": Implementation(run_adamw, refusal), "reference": Implementation(reference.adamw)},
}


def nesterov_momentum(
    gradient: Tensor, momentum: Tensor, clip: Tensor, mu: Tensor, dtype: torch.dtype, *, impl: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Update momentum (B, m, n), float32, in place with clip·gradient (B, m, n); returns the direction in `dtype` and, from
    the Triton kernel, the sums of its squares (B, 64) in float64, which newton_schulz takes.

    clip, mu: float32 scalars on the device. Raises TypeError, ValueError or KernelRequestError for what does not fit.
    """
    check_float("nesterov_momentum", gradient=gradient)
    check_shape("nesterov_momentum", "gradient", gradient, "B", "m", "n")
    check_state("nesterov_momentum", gradient, momentum=momentum)
    check_scalars("nesterov_momentum", gradient, clip=clip, mu=mu)
    arguments = (gradient, momentum, clip, mu, dtype)
    implementations = IMPLEMENTATIONS["nesterov_momentum"]
    return choose("nesterov_momentum", impl, implementations, *arguments)(*arguments)


def apply_update(
    weight: Tensor, update: Tensor, rate: Tensor, factor: float, copy: Tensor | None = None, *, impl: str = "auto"
) -> None:
    """Subtract factor·rate·update from a float32 weight of the same shape, in place; rate is a scalar on the device.

    copy: of the same shape, takes the new weight in its own dtype.
    """
    check_float("apply_update", update=update)
    check_state("apply_update", update, weight=weight)
    check_scalars("apply_update", weight, rate=rate)
    if copy is not None:
        check_shape("apply_update", "copy", copy, *weight.shape)
    arguments = (weight, update, rate, factor, copy)
    choose("apply_update", impl, IMPLEMENTATIONS["apply_update"], *arguments)(*arguments)


def adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, variance: Tensor, clip: Tensor, rate: Tensor, biases: Tensor,
    factor: float, betas: tuple[float, float], eps: float, copy: Tensor | None = None, *, impl: str = "auto",
) -> None:  # fmt: skip
    """A step of AdamW without decay, in place on float32 weight, mean and variance of the gradient's shape.

    clip, rate: float32 scalars on the device; biases (2,): 1 − β₁ᵗ and 1 − β₂ᵗ there; the learning rate is factor·rate.
    copy: of the weight's shape, takes the new weight in its own dtype.
    """
    check_float("adamw", gradient=gradient)
    check_state("adamw", gradient, weight=weight, mean=mean, variance=variance)
    check_scalars("adamw", gradient, clip=clip, rate=rate)
    check_shape("adamw", "biases", biases, 2)
    if copy is not None:
        check_shape("adamw", "copy", copy, *weight.shape)
    arguments = (weight, gradient, mean, variance, clip, rate, biases, factor, betas, eps, copy)
    choose("adamw", impl, IMPLEMENTATIONS["adamw"], *arguments)(*arguments)


def check_state(operation: str, like: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        check_shape(operation, name, x, *like.shape)
        if x.dtype != torch.float32 or x.device != like.device:
            raise TypeError(f"{operation}: {name} must be float32 on {like.device}, got {x.dtype} on {x.device}")


def check_scalars(operation: str, like: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() or x.dtype != torch.float32 or x.device != like.device:
            raise TypeError(
                f"{operation}: {name} must be a float32 scalar on {like.device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
