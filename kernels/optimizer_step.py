"""The passes of Muon before and after the orthogonalisation, and AdamW: one pass over the tensors each, in place.

nesterov_momentum: m ← m + (1 − μ)(g − m) with g = clip·gradient; it returns the direction g + μ(m − g) and sums of its squares.
apply_update: w ← w − factor·rate·u, with a copy of w in another dtype.
adamw: updates the moments m and v of g, and w ← w − factor·rate·(m/b₁)/(√(v/b₂) + ε), without decay, with a copy of w.
Numbers that change with every step (clip, μ, rate, b₁, b₂) are float32 scalars on the device, so that one CUDA graph serves all
steps and no step waits for the host. None of these operations has a derivative.
Jordan et al. 2024 (Muon), Loshchilov and Hutter 2019 (AdamW).
"""

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import check_device, check_float, check_shape
from nanochat_kernels.configs import dtype_name, launch_parameters
from nanochat_kernels.dispatch import choose
from nanochat_kernels.newton_schulz import LARGEST_MATRIX, MOST_MATRICES, PARTS
from nanochat_kernels.operation import Implementation, Kernel, Operation, Trial
from nanochat_kernels.oracle import over_budget
from nanochat_kernels.triton_helpers import (
    DTYPES,
    cast,
    cdiv,
    launch,
    needs_gradient,
    tl,
    triton,
    triton_unsupported_reason,
)


@triton.jit(do_not_specialize_on_alignment=["clip_ptr", "mu_ptr"])  # scalars, which may lie side by side in a tensor
def momentum_kernel(
    gradient_ptr, momentum_ptr, direction_ptr, squares_ptr, clip_ptr, mu_ptr, size, BLOCK: tl.constexpr
):
    """Update every num_programs-th block of one matrix of `size` elements."""
    matrix = tl.program_id(1).to(tl.int64)
    clip, mu = tl.load(clip_ptr), tl.load(mu_ptr)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        element = start + tl.arange(0, BLOCK)
        offsets, mask = matrix * size + element, element < size
        g = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * clip
        m = tl.load(momentum_ptr + offsets, mask=mask, other=0.0)
        m += (1.0 - mu) * (g - m)
        tl.store(momentum_ptr + offsets, m, mask=mask)
        direction = cast(g + mu * (m - g), direction_ptr.dtype.element_ty)
        tl.store(direction_ptr + offsets, direction, mask=mask)
        exact = direction.to(tl.float32).to(tl.float64)
        total += exact * exact
    tl.store(squares_ptr + (matrix * tl.num_programs(0) + tl.program_id(0)), tl.sum(total))


@triton.jit(do_not_specialize_on_alignment=["rate_ptr"])
def update_kernel(weight_ptr, update_ptr, copy_ptr, rate_ptr, size, factor, COPY: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    w = tl.load(weight_ptr + offsets, mask=mask)
    u = tl.load(update_ptr + offsets, mask=mask).to(tl.float32)
    w -= u * (tl.cast(factor, tl.float32) * tl.load(rate_ptr))  # torch.compile may pass a float as float64
    tl.store(weight_ptr + offsets, w, mask=mask)
    if COPY:
        tl.store(copy_ptr + offsets, cast(w, copy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["clip_ptr", "rate_ptr", "biases_ptr"])
def adamw_kernel(
    weight_ptr, gradient_ptr, mean_ptr, variance_ptr, copy_ptr, clip_ptr, rate_ptr, biases_ptr, biases_stride,
    size, factor, new1, new2, eps, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """new1 and new2 are 1 − β₁ and 1 − β₂, computed in float64 on the host."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    g = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * tl.load(clip_ptr)
    m = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
    v = tl.load(variance_ptr + offsets, mask=mask, other=0.0)
    m += tl.cast(new1, tl.float32) * (g - m)
    v += tl.cast(new2, tl.float32) * (g * g - v)
    tl.store(mean_ptr + offsets, m, mask=mask)
    tl.store(variance_ptr + offsets, v, mask=mask)
    bias1, bias2 = tl.load(biases_ptr), tl.load(biases_ptr + biases_stride)
    step = (m / bias1) / (tl.sqrt_rn(v / bias2) + tl.cast(eps, tl.float32))
    w = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    w -= step * (tl.cast(factor, tl.float32) * tl.load(rate_ptr))
    tl.store(weight_ptr + offsets, w, mask=mask)
    if COPY:
        tl.store(copy_ptr + offsets, cast(w, copy_ptr.dtype.element_ty), mask=mask)


def run_momentum(
    gradient: Tensor, momentum: Tensor, clip: Tensor, mu: Tensor, dtype: torch.dtype,
    parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    direction = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    batch = gradient.size(0)
    squares = torch.empty(batch, PARTS, dtype=torch.float64, device=gradient.device)
    if batch:
        size = gradient.size(1) * gradient.size(2)
        parameters = parameters or launch_parameters("nesterov_momentum", gradient.device, momentum.dtype, (size,))
        launch(
            momentum_kernel, (PARTS, batch), gradient.device,
            gradient, momentum, direction, squares, clip, mu, size, **parameters,
        )  # fmt: skip
    return direction, squares


def run_update(
    weight: Tensor, update: Tensor, rate: Tensor, factor: float, copy: Tensor | None = None,
    parameters: dict[str, int] | None = None,
) -> None:  # fmt: skip
    if weight.numel():
        parameters = parameters or launch_parameters("apply_update", weight.device, weight.dtype, (weight.numel(),))
        launch(
            update_kernel, (cdiv(weight.numel(), parameters["BLOCK"]),), weight.device,
            weight, update, weight if copy is None else copy, rate, weight.numel(), factor,
            COPY=copy is not None, **parameters,
        )  # fmt: skip


def run_adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, variance: Tensor, clip: Tensor, rate: Tensor, biases: Tensor,
    factor: float, betas: tuple[float, float], eps: float, copy: Tensor | None = None,
    parameters: dict[str, int] | None = None,
) -> None:  # fmt: skip
    if weight.numel():
        parameters = parameters or launch_parameters("adamw", weight.device, weight.dtype, (weight.numel(),))
        launch(
            adamw_kernel, (cdiv(weight.numel(), parameters["BLOCK"]),), weight.device,
            weight, gradient, mean, variance, weight if copy is None else copy, clip, rate, biases, biases.stride(0),
            weight.numel(), factor, 1 - betas[0], 1 - betas[1], eps, COPY=copy is not None, **parameters,
        )  # fmt: skip


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Return why no kernel can take these tensors, or None if one can. Those that it changes in place are among them."""
    tensors = [x for x in tensors if x is not None]
    if needs_gradient(*tensors):
        return "it has no derivative and no rule for torch.func; call it under torch.no_grad()"
    for x in tensors:
        if not x.is_contiguous():
            return f"it takes contiguous tensors, got one of shape {tuple(x.shape)} with strides {x.stride()}"
    return next(filter(None, map(triton_unsupported_reason, tensors)), None)


def momentum_unsupported_reason(gradient: Tensor, momentum: Tensor, clip, mu, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"the direction must be bfloat16, float16 or float32, not {dtype}"
    if gradient.size(0) > MOST_MATRICES:
        return f"{gradient.size(0)} matrices exceed the {MOST_MATRICES} of one launch; split them"
    if gradient.size(1) * gradient.size(2) > LARGEST_MATRIX:
        return f"a matrix of {tuple(gradient.shape[1:])} has more elements than one launch can number"
    return unsupported_reason(gradient, momentum)


def update_unsupported_reason(weight: Tensor, update: Tensor, rate, factor, copy: Tensor | None) -> str | None:
    return unsupported_reason(weight, update, copy)


def adamw_unsupported_reason(weight, gradient, mean, variance, clip, rate, biases, factor, betas, eps, copy):
    return unsupported_reason(weight, gradient, mean, variance, copy)


def nesterov_momentum(
    gradient: Tensor, momentum: Tensor, clip: Tensor, mu: Tensor, dtype: torch.dtype, *, impl: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Update the float32 momentum (B, m, n) in place with clip·gradient (B, m, n), and return (direction, squares).

    The direction has the dtype `dtype`. squares (B, 64), float64, are partial sums of the direction's squares for newton_schulz;
    the reference returns None for them. clip, mu: float32 scalars on the device. Raises TypeError for a wrong dtype or device,
    ValueError for mismatched shapes, and KernelRequestError (a ValueError) if the implementation named by impl does not support
    the call.
    """
    check_float("nesterov_momentum", gradient=gradient)
    check_shape("nesterov_momentum", "gradient", gradient, "B", "m", "n")
    check_state("nesterov_momentum", gradient, momentum=momentum)
    check_scalars("nesterov_momentum", gradient, clip=clip, mu=mu)
    arguments = (gradient, momentum, clip, mu, dtype)
    return choose(NESTEROV_MOMENTUM, impl, *arguments)(*arguments)


def apply_update(
    weight: Tensor, update: Tensor, rate: Tensor, factor: float, copy: Tensor | None = None, *, impl: str = "auto"
) -> None:
    """Subtract factor·rate·update from a float32 weight of the same shape, in place.

    rate: a float32 scalar on the device. copy: a tensor of the same shape that receives the new weight in its own dtype. Raises as
    nesterov_momentum does.
    """
    check_float("apply_update", update=update)
    check_state("apply_update", update, weight=weight)
    check_scalars("apply_update", weight, rate=rate)
    check_copy("apply_update", weight, copy)
    arguments = (weight, update, rate, factor, copy)
    choose(APPLY_UPDATE, impl, *arguments)(*arguments)


def adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, variance: Tensor, clip: Tensor, rate: Tensor, biases: Tensor,
    factor: float, betas: tuple[float, float], eps: float, copy: Tensor | None = None, *, impl: str = "auto",
) -> None:  # fmt: skip
    """Make one step of AdamW without decay, in place on float32 weight, mean and variance of the gradient's shape.

    clip, rate: float32 scalars on the device; the learning rate is factor·rate. biases (2,): 1 − β₁ᵗ and 1 − β₂ᵗ, float32 on the
    device. copy: a tensor of the weight's shape that receives the new weight in its own dtype. Raises as nesterov_momentum does.
    """
    check_float("adamw", gradient=gradient)
    check_state("adamw", gradient, weight=weight, mean=mean, variance=variance)
    check_scalars("adamw", gradient, clip=clip, rate=rate)
    check_shape("adamw", "biases", biases, 2)
    check_float32("adamw", gradient.device, biases=biases)
    check_copy("adamw", weight, copy)
    arguments = (weight, gradient, mean, variance, clip, rate, biases, factor, betas, eps, copy)
    choose(ADAMW, impl, *arguments)(*arguments)


def check_float32(operation: str, device: torch.device, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != torch.float32 or x.device != device:
            raise TypeError(f"{operation}: {name} must be float32 on {device}, got {x.dtype} on {x.device}")


def check_state(operation: str, like: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        check_shape(operation, name, x, *like.shape)
    check_float32(operation, like.device, **tensors)


def check_copy(operation: str, weight: Tensor, copy: Tensor | None) -> None:
    if copy is not None:
        check_float(operation, copy=copy)
        check_shape(operation, "copy", copy, *weight.shape)
        check_device(operation, weight=weight, copy=copy)


def check_scalars(operation: str, like: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() or x.dtype != torch.float32 or x.device != like.device:
            raise TypeError(
                f"{operation}: {name} must be a float32 scalar on {like.device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )


def normal(count: int, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(shape, device=device, dtype=dtype).normal_() for _ in range(count)]


def momentum_launches(key, dtype: torch.dtype, device: torch.device):
    gradient, momentum = normal(2, 4, 1, *key, device=device, dtype=dtype)
    one = torch.ones((), device=device)
    return {
        f"{dtype_name(x.dtype)} to {dtype_name(to)}": lambda parameters, x=x, to=to: run_momentum(
            x, momentum, one * 0.5, one * 0.9, to, parameters
        )
        for x, to in ((gradient, torch.bfloat16), (gradient, torch.float16), (gradient, dtype), (gradient.bfloat16(), dtype))
    }  # fmt: skip


def name_of(name: str, x: Tensor, copy: Tensor | None) -> str:
    return f"{dtype_name(x.dtype)} {name}, " + ("no copy" if copy is None else f"{dtype_name(copy.dtype)} copy")


def update_launches(key, dtype: torch.dtype, device: torch.device):
    weight, update = normal(2, *key, device=device, dtype=dtype)
    one = torch.ones((), device=device)
    return {
        name_of("update", u, c): lambda parameters, u=u, c=c: run_update(
            weight, u, one, 0.02, c, parameters
        )
        for u in (update.bfloat16(), update.half(), update)
        for c in (None, update.bfloat16(), update.half(), update.clone())
    }  # fmt: skip


def adamw_launches(key, dtype: torch.dtype, device: torch.device):
    weight, gradient, mean, variance = normal(4, *key, device=device, dtype=dtype)
    one, biases = torch.ones((), device=device), torch.ones(2, device=device)
    return {
        name_of("gradient", g, c): lambda parameters, g=g, c=c: run_adamw(
            weight, g, mean, variance.abs_(), one, one, biases, 0.01, (0.8, 0.95), 1e-10, c, parameters
        )
        for g in (gradient, gradient.bfloat16())
        for c in (None, gradient.bfloat16(), gradient.half(), gradient.clone())
    }  # fmt: skip


BLOCK = 2048  # elements; the last bits of the float64 sums of squares depend on it
MOMENTUM_KERNEL, UPDATE_KERNEL, ADAMW_KERNEL = (
    Kernel(name, (torch.float32,), ((1280 * 1280,),), ({"BLOCK": BLOCK, "num_warps": warps},), launches, ((1001,),))
    for name, launches, warps in (
        # num_warps=8: with 4 warps each thread spills 8 bytes on sm90
        ("nesterov_momentum", momentum_launches, 8),
        ("apply_update", update_launches, 4),
        ("adamw", adamw_launches, 4),
    )
)


def random_matrices(count: int, shape, device: torch.device) -> tuple[Tensor, ...]:
    """Tensors of up to four matrices: enough for the gate to see one confused with another, and little memory."""
    return normal(count, min(shape.depth, 4), shape.width, shape.width, device=device)


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype of directions and of copies of weights, where the computation is in `dtype`."""
    return dtype if dtype in DTYPES[:2] else torch.bfloat16


def momentum_trials(shape, device: torch.device, dtype: torch.dtype):
    gradient, momentum = random_matrices(2, shape, device)
    one, dtype = torch.ones((), device=device), narrow(dtype)
    before = momentum.clone()

    def judge(results: tuple[Tensor, ...]) -> str | None:
        """The direction, the momentum and the sums of squares, which the reference does not make, a matrix after the other."""
        by_dtype = {x.dtype: x for x in results if x is not None}
        direction, new_momentum, squares = by_dtype[dtype], by_dtype[torch.float32], by_dtype.get(torch.float64)
        for i in range(len(gradient)):
            found = direction[i], new_momentum[i]
            states = [before[i].double(), before[i].clone()]
            scalars = [(0.5 * one).double(), (0.9 * one).double()], [0.5 * one, 0.9 * one]
            oracle, baseline = (
                (reference.nesterov_momentum(gradient[i].to(m.dtype), m, *s, to)[0], m)
                for m, s, to in zip(states, scalars, (torch.float64, dtype), strict=True)
            )
            for name, *tensors in zip(("direction", "momentum"), found, oracle, baseline, strict=True):
                wrong = over_budget(*tensors)
                if wrong:
                    return f"{name} of matrix {i}: {wrong}"
            if squares is not None:
                norm = direction[i].double().square().sum()
                if not abs(squares[i].sum() - norm) <= 1e-9 * norm:
                    return f"squares of matrix {i} sum to {float(squares[i].sum())}, those of the direction to {float(norm)}"
        return None

    yield Trial((gradient, momentum, 0.5 * one, 0.9 * one, dtype), (0, 1), (), (1,), judge=judge)


def update_trials(shape, device: torch.device, dtype: torch.dtype):
    weight, update = random_matrices(2, shape, device)
    rate, copy = torch.ones((), device=device), torch.zeros_like(weight, dtype=narrow(dtype))
    yield Trial((weight, update.to(narrow(dtype)), rate, 0.02, copy), (0, 1, 4), (), (0, 4))


def adamw_trials(shape, device: torch.device, dtype: torch.dtype):
    weight, gradient, mean, variance = random_matrices(4, shape, device)
    one, biases = torch.ones((), device=device), torch.tensor([0.2, 0.05], device=device)
    state, copy = (weight, gradient, mean, variance.abs_()), torch.zeros_like(weight, dtype=narrow(dtype))
    yield Trial((*state, one, one, biases, 0.01, (0.8, 0.95), 1e-10, copy), (0, 1, 2, 3, 10), (), (0, 2, 3, 10))


NESTEROV_MOMENTUM = Operation(
    "nesterov_momentum", nesterov_momentum, reference.nesterov_momentum,
    {"triton": Implementation(run_momentum, momentum_unsupported_reason)}, (MOMENTUM_KERNEL,), momentum_trials,
)  # fmt: skip
APPLY_UPDATE = Operation(
    "apply_update", apply_update, reference.apply_update,
    {"triton": Implementation(run_update, update_unsupported_reason)}, (UPDATE_KERNEL,), update_trials,
)  # fmt: skip
ADAMW = Operation(
    "adamw", adamw, reference.adamw,
    {"triton": Implementation(run_adamw, adamw_unsupported_reason)}, (ADAMW_KERNEL,), adamw_trials,
)  # fmt: skip
OPERATIONS = (NESTEROV_MOMENTUM, APPLY_UPDATE, ADAMW)
