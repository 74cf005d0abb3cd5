"""Softcap and cross entropy of given logits, loss and gradient in one pass over them.

l = cap·tanh(z/cap) lies in ±cap, so log Σ exp(l) needs no running maximum: with w = 1/(1 + exp(2z/cap)),
    exp(l − cap) = exp(−2·cap·w) = e,   S = Σ e,   loss = log S + cap − l_target,
    dloss/dz = (e/S − [target])·(1 − tanh²) with 1 − tanh² = 4·w·(1 − w).
Three special-function operations an element, and no division but the row's.

A row of 16-bit logits (65,536 of them are 128 KiB) stays on the chip between the sum and the gradient, as E = e·4w(1−w)
in 16 bits of its own: 6 of exponent and 10 of fraction, because E lies in (0, 1]. Rounding E so adds 3 % to the rounding
of a bfloat16 gradient (a quarter of its unit, in quadrature). So the logits are read once, the gradient is written once.
Rows that do not fit (float32, or wider) are read twice; the second time they are mostly still in the L2 cache.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_device, check_float, check_shape
from kernels.configs import Kernel, launch_parameters
from kernels.dispatch import Implementation, choose
from kernels.triton_helpers import DTYPES, GRID_LIMIT, as_rows, cdiv, power_of_2, tl, triton, triton_refusal

LARGEST_CAP = 40.0  # Σ exp(l − cap) ≥ exp(−80), a normal float32
LARGEST_HELD_CAP = 20.0  # E ≥ 2⁻⁵⁸ before the derivative of a saturated logit, with 2⁻⁶³ the least that is held
WIDEST_HELD = 65_536  # 16-bit logits in the registers of one multiprocessor, with as many left to compute with
LOG2E = 1.4426950408889634


@triton.jit
def weight_of(z, CAP: tl.constexpr):
    """w = (1 − tanh(z/cap))/2 = 1/(1 + exp(2z/cap))."""
    return 1.0 / (1.0 + tl.exp2(z * (2.0 * 1.4426950408889634 / CAP)))


@triton.jit
def exponential(w, CAP: tl.constexpr):
    """exp(l − cap)."""
    return tl.exp2(w * (-2.0 * 1.4426950408889634 * CAP))


@triton.jit
def pack(e):
    """Pairs of numbers in [0, 1] in one integer each: exponents from −63 in 6 bits, fractions in 10, rounded."""
    bits = tl.maximum(e.to(tl.int32, bitcast=True) - ((64 << 23) - (1 << 12)), 0)
    low, high = tl.split(tl.reshape(bits, [bits.shape[0] // 2, 2]))
    return (low >> 13) | ((high << 3) & -65536)


@triton.jit
def unpack(pair):
    low = ((pair & 65535) << 13) + (64 << 23)
    high = ((pair >> 3) & 0x1FFFE000) + (64 << 23)
    both = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return tl.reshape(both, [2 * pair.shape[0]])


@triton.jit
def finish_row(row, z, target, total, factor, losses, gradient, GRADIENT: tl.constexpr, CAP: tl.constexpr):
    """The loss of a row, and over what was stored of its gradient the entry of the target."""
    w = weight_of(z, CAP)
    tl.store(losses + row, tl.where(target < 0, 0.0, tl.log(total) + 2.0 * CAP * w))
    if GRADIENT:
        tl.debug_barrier()  # the row's stores come first
        value = (exponential(w, CAP) / total - 1.0) * (4.0 * w * (1.0 - w)) * factor
        tl.store(gradient + tl.maximum(target, 0), value.to(gradient.dtype.element_ty), mask=target >= 0)


@triton.jit
def target_of(row, targets, logits, scale, ignore_index, width, MEAN: tl.constexpr):
    """Target (−1 when ignored), its logit, and the factor of the row's gradient. A target outside gives NaN."""
    target = tl.load(targets + row)
    factor = 1.0
    if MEAN:
        factor = tl.load(scale)
    factor = tl.where(target == ignore_index, 0.0, factor)
    exists = (target >= 0) & (target < width)
    z = tl.load(logits + tl.where(exists, target, 0)).to(tl.float32)
    z = tl.where(exists | (target == ignore_index), z, float("nan"))
    return tl.where(exists & (target != ignore_index), target, -1), z, factor


@triton.jit
def held_kernel(
    logits, targets, losses, gradient, scale, rows, width, stride, ignore_index, CAP: tl.constexpr, MEAN: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A row at a time, in CHUNKS of CHUNK columns, from the first read to the last write."""
    column = tl.arange(0, CHUNK)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = index.to(tl.int64)
        source, to = logits + row * stride, gradient + row * width
        total = tl.zeros([CHUNK], tl.float32)
        held = ()
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            if EVEN:
                z = tl.load(source + at, eviction_policy="evict_first").to(tl.float32)
            else:
                z = tl.load(source + at, mask=at < width, other=0.0, eviction_policy="evict_first").to(tl.float32)
            w = weight_of(z, CAP)
            e = exponential(w, CAP)
            if not EVEN:
                e = tl.where(at < width, e, 0.0)
            total += e
            held = held + (pack(e * (4.0 * w * (1.0 - w))),)  # noqa: RUF005
        target, z, factor = target_of(row, targets, source, scale, ignore_index, width, MEAN)
        total = tl.sum(total)
        share = factor / total
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            value = (unpack(held[i]) * share).to(gradient.dtype.element_ty)
            tl.store(to + at, value, mask=at < width, eviction_policy="evict_first")
        finish_row(row, z, target, total, factor, losses, to, True, CAP)


@triton.jit
def streamed_kernel(
    logits, targets, losses, gradient, scale, width, stride, ignore_index, CAP: tl.constexpr, MEAN: tl.constexpr,
    GRADIENT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A row a program: its sum, then, when asked, its gradient from a second read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    source, to = logits + row * stride, gradient + row * width
    total = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, width, CHUNK):
        at = start + column
        z = tl.load(source + at, mask=at < width, other=0.0).to(tl.float32)
        total += tl.where(at < width, exponential(weight_of(z, CAP), CAP), 0.0)
    target, z, factor = target_of(row, targets, source, scale, ignore_index, width, MEAN)
    total = tl.sum(total)
    if GRADIENT:
        share = factor / total
        for start in tl.range(0, width, CHUNK):
            at = start + column
            w = weight_of(tl.load(source + at, mask=at < width, other=0.0).to(tl.float32), CAP)
            value = exponential(w, CAP) * (4.0 * w * (1.0 - w)) * share
            tl.store(to + at, value.to(gradient.dtype.element_ty), mask=at < width)
    finish_row(row, z, target, total, factor, losses, to, GRADIENT, CAP)


@triton.jit
def scale_kernel(gradient, factors, rows, width, factor_stride, CHUNK: tl.constexpr):
    """Multiply each row by its factor, in place; a factor of 1, which is the usual one, costs no pass."""
    column = tl.arange(0, CHUNK)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = index.to(tl.int64)
        factor = tl.load(factors + row * factor_stride)
        if factor != 1.0:
            for start in tl.range(0, width, CHUNK):
                at = start + column
                here = gradient + row * width + at
                value = tl.load(here, mask=at < width).to(tl.float32) * factor
                tl.store(here, value.to(gradient.dtype.element_ty), mask=at < width)


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def is_held(logits: Tensor, cap: float) -> bool:
    return logits.element_size() == 2 and logits.size(1) <= WIDEST_HELD and cap <= LARGEST_HELD_CAP


def launch(
    logits: Tensor, targets: Tensor, cap: float, ignore_index: int, mean: bool, with_gradient: bool,
    parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and gradient (an empty tensor without): the gradient for a loss that nothing multiplies afterwards."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    gradient = torch.empty(logits.shape if with_gradient else (0,), dtype=logits.dtype, device=logits.device)
    scale = losses
    if mean:
        scale = 1.0 / (targets != ignore_index).sum().clamp(min=1).to(torch.float32)
    if rows:
        logits = as_rows(logits)
        held = with_gradient and is_held(logits, cap)
        kernel = "softcap_cross_entropy_held" if held else "softcap_cross_entropy_streamed"
        parameters = dict(parameters or launch_parameters(kernel, logits.device, logits.dtype, width))
        tensors = (logits, targets, losses, gradient, scale)
        constants = {"CAP": cap, "MEAN": mean}
        if held:
            chunk = min(parameters.pop("CHUNK"), power_of_2(max(width, 2)))
            programs = min(rows, multiprocessors(logits.device) * parameters.pop("PROGRAMS"))
            held_kernel[(programs,)](
                *tensors, rows, width, logits.stride(0), ignore_index, **constants,
                CHUNKS=cdiv(width, chunk), EVEN=width % chunk == 0, CHUNK=chunk, **parameters,
            )  # fmt: skip
        else:
            streamed_kernel[(rows,)](
                *tensors, width, logits.stride(0), ignore_index, **constants, GRADIENT=with_gradient, **parameters
            )
    return losses.sum() * scale if mean else losses, gradient


@torch.library.custom_op("nanochat::softcap_cross_entropy", mutates_args=())
def loss_and_gradient_op(
    logits: Tensor, targets: Tensor, cap: float, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor]:
    return launch(logits, targets, cap, ignore_index, mean, True)


@torch.library.custom_op("nanochat::softcap_cross_entropy_loss", mutates_args=())
def loss_op(logits: Tensor, targets: Tensor, cap: float, ignore_index: int, mean: bool) -> Tensor:
    return launch(logits, targets, cap, ignore_index, mean, False)[0]


@torch.library.custom_op("nanochat::scale_rows_", mutates_args={"gradient"})
def scale_rows_op(gradient: Tensor, factors: Tensor) -> None:
    rows, width = gradient.shape
    if gradient.numel():
        factors = factors.expand(rows)
        programs = min(rows, 8 * multiprocessors(gradient.device))
        scale_kernel[(programs,)](gradient, factors, rows, width, factors.stride(0), CHUNK=4096, num_warps=8)


@loss_and_gradient_op.register_fake
def _(logits, targets, cap, ignore_index, mean):
    return loss_like(logits, mean), logits.new_empty(logits.shape)


@loss_op.register_fake
def _(logits, targets, cap, ignore_index, mean):
    return loss_like(logits, mean)


def loss_like(logits: Tensor, mean: bool) -> Tensor:
    return logits.new_empty(() if mean else logits.shape[:1], dtype=torch.float32)


def keep(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def gradient(ctx, dloss, _):
    if dloss is None:
        return None, None, None, None, None
    (saved,) = ctx.saved_tensors
    scale_rows_op(saved, dloss)  # nobody else holds it; a second backward over the same graph is refused by autograd
    return saved, None, None, None, None


loss_and_gradient_op.register_autograd(gradient, setup_context=keep)


def run(logits: Tensor, targets: Tensor, cap: float, ignore_index: int, reduction: str) -> Tensor:
    arguments = (logits, targets.contiguous(), float(cap), ignore_index, reduction == "mean")
    if logits.requires_grad and torch.is_grad_enabled():
        return loss_and_gradient_op(*arguments)[0]
    return loss_op(*arguments)


def refusal(logits: Tensor, targets: Tensor, cap: float, ignore_index: int, reduction: str) -> str | None:
    if cap > LARGEST_CAP:
        return f"it sums exp(l − cap) without a running maximum, which takes a cap of at most {LARGEST_CAP}, got {cap}"
    if logits.size(0) > GRID_LIMIT or logits.size(1) > GRID_LIMIT:
        return f"{tuple(logits.shape)} logits pass the {GRID_LIMIT} rows or columns of one launch; split them"
    return triton_refusal(logits)


IMPLEMENTATIONS = {
    "softcap_cross_entropy": {
        "triton": Implementation(run, refusal),
        "reference": Implementation(reference.softcap_cross_entropy),
    }
}


def softcap_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    cap: float = 15.0,
    ignore_index: int = -1,
    reduction: str = "mean",
    *,
    impl: str = "auto",
) -> Tensor:
    """Loss in nats of cap·tanh(logits/cap), logits (N, V), for targets (N,), int64; ignored targets lose 0.

    reduction "mean" gives a float32 scalar, the mean over targets not ignored (0 when all are); "none" gives (N,).
    The Triton kernel makes the gradient together with the loss, when logits ask for one, and keeps it until backward:
    one backward a call (retain_graph and a second one is refused by autograd), no second derivative.
    Targets are not read here: one outside [0, V) is an error of the reference and a NaN from the kernel.
    Raises ValueError for shapes, a cap or a reduction that do not fit, TypeError for dtypes, and KernelRequestError (a
    ValueError) when the implementation asked for by name cannot serve the call. Repeated calls are bitwise equal.
    """
    check_float("softcap_cross_entropy", logits=logits)
    check_shape("softcap_cross_entropy", "logits", logits, "N", "V")
    check_targets("softcap_cross_entropy", logits, targets, cap, reduction)
    arguments = (logits, targets, cap, ignore_index, reduction)
    return choose("softcap_cross_entropy", impl, IMPLEMENTATIONS["softcap_cross_entropy"], *arguments)(*arguments)


def check_targets(operation: str, rows: Tensor, targets: Tensor, cap: float, reduction: str) -> None:
    """What every cross entropy asks of its targets (N,), one for each of `rows`, its cap and its reduction."""
    check_shape(operation, "targets", targets, rows.size(0))
    check_device(operation, rows=rows, targets=targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"{operation}: targets must be int64, got {targets.dtype}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"{operation}: reduction must be 'mean' or 'none', got {reduction!r}")
    if cap <= 0:
        raise ValueError(f"{operation}: cap must be positive, got {cap}")


TYPES = {"logits": "*T", "targets": "*i64", "losses": "*fp32", "gradient": "*T", "scale": "*fp32"}


def _held_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    types = TYPES | {"rows": "i32", "width": "i32", "stride": "i32", "ignore_index": "i32"}
    chunk = min(parameters["CHUNK"], size)
    return types, {"CAP": 15.0, "MEAN": True, "CHUNKS": cdiv(size, chunk), "EVEN": size % chunk == 0, "CHUNK": chunk}


def _streamed_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    types = TYPES | {"width": "i32", "stride": "i32", "ignore_index": "i32"}
    return types, {"CAP": 15.0, "MEAN": True, "GRADIENT": True}


def _example(size: int, dtype: torch.dtype, device: torch.device):
    logits = torch.empty(2**30 // size, size, device=device, dtype=dtype).normal_(std=3.0)
    targets = torch.randint(size, (logits.size(0),), device=device)
    return lambda parameters: launch(logits, targets, 15.0, -1, True, True, parameters)


VOCABULARIES = (1024, 32_768, 65_536)
HELD_SPACE = tuple(
    {"CHUNK": chunk, "STAGES": stages, "PROGRAMS": programs, "num_warps": warps}
    for chunk in (2048, 4096, 8192, 16_384)
    for stages in (1, 2)
    for programs in (1, 2, 4)
    for warps in (8, 16, 32)
)
STREAMED_SPACE = tuple({"CHUNK": chunk, "num_warps": warps} for chunk in (1024, 2048, 4096, 8192) for warps in (4, 8, 16, 32))
KERNELS = (
    Kernel(
        "softcap_cross_entropy_held", held_kernel, VOCABULARIES, DTYPES[:2], HELD_SPACE, _held_arguments, _example
    ),
    Kernel(
        "softcap_cross_entropy_streamed", streamed_kernel, (*VOCABULARIES, 131_072), DTYPES, STREAMED_SPACE,
        _streamed_arguments, _example,
    ),
)  # fmt: skip
