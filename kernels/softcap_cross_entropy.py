"""Softcap and cross entropy of given logits, loss and gradient in one pass over them.

l = cap·tanh(z/cap) lies in ±cap, so Σ exp(l) needs no running maximum: with w = 1/(1 + exp(2z/cap)),
    e = exp(l) = exp(cap − 2·cap·w),   S = Σ e,   loss = log S − l_target,
    dloss/dz = (e/S − [target])·(1 − tanh²) with 1 − tanh² = 4·w·(1 − w).
Three special-function operations an element, or two and a half where two share a reciprocal, and no division but the row's.
w is rounded to 2⁻²⁵, so l to cap·2⁻²⁴, of which a sum over many logits keeps little; the target's own part is float64.

A row of 16-bit logits (65,536 of them are 128 KiB) stays on the chip between the sum and the gradient, as E = e·w(1−w)
in 16 bits of its own: 6 of exponent and 10 of fraction, because E is positive and its range is known. That adds 3 % to
the rounding of a bfloat16 gradient (a quarter of its unit, in quadrature). So the logits are read once and the gradient
is written once. Rows that do not fit (float32, or wider) are read twice, the second time mostly from the L2 cache.
"""

from math import ceil, e, log2

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_float, check_shape, check_targets
from kernels.configs import Kernel, launch_parameters
from kernels.dispatch import Implementation, choose
from kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    LOG2E,
    as_rows,
    cast,
    cdiv,
    exp2,
    multiprocessors,
    power_of_2,
    prefetch,
    reciprocal,
    tl,
    traced_as,
    triton,
    triton_refusal,
    wants_gradient,
)

LARGEST_CAP = 40.0  # exp(±40) and sums of it are float32 with room to spare
LARGEST_HELD_CAP = 20.0  # exp(±20) spans 58 of the 64 exponents that are held
WIDEST_HELD = 65_536  # 16-bit logits in the registers of one multiprocessor, with as many left to compute with


@triton.jit
def weight_of(z, CAP: tl.constexpr):
    """w = (1 − tanh(z/cap))/2 = 1/(1 + exp(2z/cap))."""
    return reciprocal(1.0 + exp2(z * (2.0 * LOG2E / CAP)))


@triton.jit
def two_weights(z, other, CAP: tl.constexpr):
    """weight_of both, from one reciprocal: 1/a = b/(a·b). Beyond z = 10·cap w no longer falls, so that a·b is finite."""
    a = 1.0 + exp2(tl.minimum(z * (2.0 * LOG2E / CAP), 60.0))
    b = 1.0 + exp2(tl.minimum(other * (2.0 * LOG2E / CAP), 60.0))
    r = reciprocal(a * b)
    return r * b, r * a


@triton.jit
def weights_of(z, CAP: tl.constexpr):
    """w and 1 − w, the latter without cancellation where w is nearly 1."""
    u = exp2(z * (2.0 * LOG2E / CAP))
    w = reciprocal(1.0 + u)
    return w, tl.where(w > 0.75, u * w, 1.0 - w)


@triton.jit
def exponential(w, CAP: tl.constexpr):
    """exp(l)."""
    return exp2(w * (-2.0 * LOG2E * CAP) + LOG2E * CAP)


@triton.jit
def pack(low, high, TOP: tl.constexpr):
    """Numbers from 0 to 2^TOP, two in one integer: exponents TOP−63 to TOP in 6 bits, fractions in 10, rounded."""
    low = tl.maximum(low.to(tl.int32, bitcast=True) - (((64 + TOP) << 23) - (1 << 12)), 0)
    high = tl.maximum(high.to(tl.int32, bitcast=True) - (((64 + TOP) << 23) - (1 << 12)), 0)
    return (low >> 13) | ((high << 3) & -65536)


@triton.jit
def unpack(pair):
    """The numbers times 2^−TOP."""
    low = ((pair << 13) & 0x1FFFE000) | (64 << 23)
    high = ((pair >> 3) & 0x1FFFE000) | (64 << 23)
    both = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return tl.reshape(both, [2 * pair.shape[0]])


@triton.jit
def store_chunk(row, at, width, pair, share, EVEN: tl.constexpr):
    """A chunk of the gradient, from what was held of it."""
    value = cast(unpack(pair) * share, row.dtype.element_ty)
    if EVEN:
        tl.store(row + at, value, eviction_policy="evict_first")
    else:
        tl.store(row + at, value, mask=at < width)


@triton.jit
def held_kernel(
    logits, targets, sums, gradient, scale, rows, width, stride, ignore_index, CAP: tl.constexpr, MEAN: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr, TOP: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Rows in CHUNKS of CHUNK columns: S, and e/S·(1 − tanh²)·scale, from one read.

    A row fills the multiprocessor, so no other block works while this one waits. Therefore each chunk of the row before is
    written while the same chunk of this row is read, into the registers that it frees; and what comes AHEAD chunks later is
    called into the L2 cache.
    """
    column, pair = tl.arange(0, CHUNK), tl.arange(0, CHUNK // 2)
    first = tl.program_id(0).to(tl.int64)
    held = ()
    for _ in tl.static_range(CHUNKS):
        held = held + (tl.zeros([CHUNK // 2], tl.int32),)  # noqa: RUF005
    share = 0.0  # ahead of the first row its own place is written, with zeros
    to = gradient + first * width
    nothing = rows >> 31  # 0, which the compiler cannot know
    for index in tl.range(0, rows - tl.program_id(0), tl.num_programs(0)):
        row = first + index
        following = tl.minimum(row + tl.num_programs(0), rows - 1) * stride - CHUNKS * CHUNK
        total = tl.zeros([CHUNK // 8], tl.float32)  # a thread has 8 neighbours
        new = tl.zeros([CHUNK // 2], tl.int32)
        read = ()
        for i in tl.static_range(CHUNKS):
            from_ = logits + row * stride + i * CHUNK + column
            if EVEN:
                z = tl.load(from_, eviction_policy="evict_first")
            else:
                z = tl.load(from_, mask=column < width - i * CHUNK, other=0.0)
            if AHEAD > 0 and EVEN:
                start = row * stride if i + AHEAD < CHUNKS else following
                prefetch(logits + start + (i + AHEAD) * CHUNK + 8 * tl.arange(0, CHUNK // 8))
            # what is written waits for the chunk before to be packed: else all loads would move to the front, and spill
            store_chunk(to + i * CHUNK, column, width - i * CHUNK, held[i] | (new & nothing), share, EVEN)
            z, other = tl.split(tl.reshape(z.to(tl.float32), [CHUNK // 2, 2]))
            w, v = two_weights(z, other, CAP)
            e, f = exponential(w, CAP), exponential(v, CAP)
            if not EVEN:
                e = tl.where(2 * pair < width - i * CHUNK, e, 0.0)
                f = tl.where(2 * pair + 1 < width - i * CHUNK, f, 0.0)
            total += tl.sum(tl.reshape(e + f, [CHUNK // 8, 4]), axis=1)
            new = pack(e * (w - w * w), f * (v - v * v), TOP)
            read = read + (new,)  # noqa: RUF005
        held = read
        total = tl.sum(total)
        tl.store(sums + row, total)
        share = 4.0 * factor_of(row, targets, scale, ignore_index, MEAN) / total * (1 << TOP)
        to = gradient + row * width
    for i in tl.static_range(CHUNKS):
        store_chunk(to + i * CHUNK, column, width - i * CHUNK, held[i], share, EVEN)


@triton.jit
def streamed_kernel(
    logits, targets, sums, gradient, scale, width, stride, ignore_index, CAP: tl.constexpr, MEAN: tl.constexpr,
    GRADIENT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The same for a row a program from two reads; only S without GRADIENT."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, width, CHUNK):
        at = start + column
        z = tl.load(logits + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
        total += tl.where(at < width, exponential(weight_of(z, CAP), CAP), 0.0)
    total = tl.sum(total)
    tl.store(sums + row, total)
    if GRADIENT:
        share = 4.0 * factor_of(row, targets, scale, ignore_index, MEAN) / total
        for start in tl.range(0, width, CHUNK):
            at = start + column
            w, rest = weights_of(tl.load(logits + row * stride + at, mask=at < width, other=0.0).to(tl.float32), CAP)
            value = exponential(w, CAP) * (w * rest) * share
            tl.store(gradient + row * width + at, cast(value, gradient.dtype.element_ty), mask=at < width)


@triton.jit
def factor_of(row, targets, scale, ignore_index, MEAN: tl.constexpr):
    """What the gradient of a row is multiplied by: 0 for an ignored target."""
    factor = 1.0
    if MEAN:
        factor = tl.load(scale)
    return tl.where(tl.load(targets + row) == ignore_index, 0.0, factor)


@triton.jit
def targets_kernel(
    logits, targets, sums, gradient, scale, rows, width, stride, ignore_index, CAP: tl.constexpr, MEAN: tl.constexpr,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the target of a row adds: the loss in place of S, and its own entry of the gradient. Wrong targets give NaN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    target = tl.load(targets + row, mask=here, other=0)
    total = tl.load(sums + row, mask=here, other=1.0)
    known = here & (target >= 0) & (target < width)
    z = tl.load(logits + row * stride + target, mask=known, other=float("nan")).to(tl.float32)
    summed = exponential(weight_of(z, CAP), CAP).to(tl.float64)
    w = 1.0 / (1.0 + tl.exp(z.to(tl.float64) * (2.0 / CAP)))
    rest = 1.0 / (1.0 + tl.exp(z.to(tl.float64) * (-2.0 / CAP)))
    exact = tl.exp(CAP * (rest - w))
    others = tl.maximum(total.to(tl.float64) - summed, 0.0)  # the target's term of S as exact as itself
    counts = target != ignore_index
    loss = tl.log((exact + others) / exact)
    tl.store(sums + row, tl.where(counts, loss, 0.0).to(tl.float32), mask=here)
    if GRADIENT:
        factor = 1.0
        if MEAN:
            factor = tl.load(scale)
        value = -others / (exact + others) * 4.0 * w * rest * factor
        value = cast(value.to(tl.float32), gradient.dtype.element_ty)
        tl.store(gradient + row * width + target, value, mask=known & counts)


@triton.jit
def scale_kernel(gradient, factors, rows, width, factor_stride, CHUNK: tl.constexpr):
    """Multiply each row by its factor, in place; a factor of 1, which is the usual one, costs no pass."""
    column = tl.arange(0, CHUNK)
    first = tl.program_id(0).to(tl.int64)
    for index in tl.range(0, rows - tl.program_id(0), tl.num_programs(0)):
        row = first + index
        factor = tl.load(factors + row * factor_stride)
        if factor != 1.0:
            for start in tl.range(0, width, CHUNK):
                at = start + column
                here = gradient + row * width + at
                value = tl.load(here, mask=at < width).to(tl.float32) * factor
                tl.store(here, cast(value, gradient.dtype.element_ty), mask=at < width)


def chunk_of(width: int, parameters: dict[str, int]) -> int:
    """Columns of a chunk, which a narrow vocabulary does not fill."""
    return min(parameters["CHUNK"], power_of_2(max(width, 16)))


def top_of(cap: float) -> int:
    """The exponent that exp(cap) does not pass."""
    return ceil(cap * log2(e))


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
        fits = logits.element_size() == 2 and width <= WIDEST_HELD and cap <= LARGEST_HELD_CAP
        held = with_gradient and ("PROGRAMS" in parameters if parameters else fits)
        kernel = "softcap_cross_entropy_held" if held else "softcap_cross_entropy_streamed"
        parameters = dict(parameters or launch_parameters(kernel, logits.device, logits.dtype, width))
        tensors, stride = (logits, targets, losses, gradient, scale), logits.stride(0)
        if held:
            chunk = parameters["CHUNK"] = chunk_of(width, parameters)
            parameters["AHEAD"] = min(parameters["AHEAD"], cdiv(width, chunk))  # to the next row, not beyond
            programs = min(rows, multiprocessors(logits.device) * parameters.pop("PROGRAMS"))
            held_kernel[(programs,)](
                *tensors, rows, width, stride, ignore_index, CAP=cap, MEAN=mean,
                CHUNKS=cdiv(width, chunk), EVEN=width % chunk == 0, TOP=top_of(cap), **parameters,
            )  # fmt: skip
        else:
            streamed_kernel[(rows,)](
                *tensors, width, stride, ignore_index, CAP=cap, MEAN=mean, GRADIENT=with_gradient, **parameters
            )
        targets_kernel[(cdiv(rows, 128),)](
            *tensors, rows, width, stride, ignore_index, CAP=cap, MEAN=mean, GRADIENT=with_gradient, ROWS=128
        )
    return losses.sum() * scale if mean else losses, gradient


@torch.library.custom_op("nanochat::softcap_cross_entropy", mutates_args=())
def loss_op(
    logits: Tensor, targets: Tensor, cap: float, ignore_index: int, mean: bool, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return launch(logits, targets, cap, ignore_index, mean, with_gradient)


@torch.library.custom_op("nanochat::scale_rows_", mutates_args={"gradient"})
def scale_rows_op(gradient: Tensor, factors: Tensor) -> None:
    rows, width = gradient.shape
    if gradient.numel():
        factors = factors.expand(rows)
        programs = min(rows, 8 * multiprocessors(gradient.device))
        scale_kernel[(programs,)](gradient, factors, rows, width, factors.stride(0), CHUNK=4096, num_warps=8)


@traced_as(loss_op)
def _(logits, targets, cap, ignore_index, mean, with_gradient):
    loss = logits.new_empty(() if mean else logits.shape[:1], dtype=torch.float32)
    return loss, logits.new_empty(logits.shape if with_gradient else 0)


def keep(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def gradient(ctx, dloss, _):
    saved = None if dloss is None else ctx.saved_tensors[0]
    if saved is not None:
        scale_rows_op(saved, dloss)  # nobody else holds it: autograd refuses a second backward over the same graph
    return saved, None, None, None, None, None


loss_op.register_autograd(gradient, setup_context=keep)


def run(logits: Tensor, targets: Tensor, cap: float, ignore_index: int, reduction: str) -> Tensor:
    return loss_op(logits, targets.contiguous(), cap, ignore_index, reduction == "mean", wants_gradient(logits))[0]


def refusal_of(x: Tensor, rows: int, columns: int, cap: float) -> str | None:
    """Why logits of this size, made of x, cannot be served."""
    if cap > LARGEST_CAP:
        return f"it sums exp(l) without a running maximum, which takes a cap of at most {LARGEST_CAP}, got {cap}"
    if max(rows, columns) > GRID_LIMIT:
        return f"{rows} × {columns} logits pass the {GRID_LIMIT} rows or columns of one launch; split them"
    return triton_refusal(x)


IMPLEMENTATIONS = {
    "softcap_cross_entropy": {
        "triton": Implementation(run, lambda logits, targets, cap, *_: refusal_of(logits, *logits.shape, cap)),
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
    arguments = (logits, targets, float(cap), ignore_index, reduction)
    return choose("softcap_cross_entropy", impl, IMPLEMENTATIONS["softcap_cross_entropy"], *arguments)(*arguments)


TYPES = {"logits": "*T", "targets": "*i64", "sums": "*fp32", "gradient": "*T", "scale": "*fp32"}


def _held_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    types = TYPES | {"rows": "i32", "width": "i32", "stride": "i32", "ignore_index": "i32"}
    chunk = chunk_of(size, parameters)
    chunks = {"CHUNKS": cdiv(size, chunk), "EVEN": size % chunk == 0, "CHUNK": chunk}
    return types, {"CAP": 15.0, "MEAN": True, "TOP": top_of(15.0), **chunks}


def _streamed_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    return TYPES | {"width": "i32", "stride": "i32", "ignore_index": "i32"}, {"CAP": 15.0, "MEAN": True, "GRADIENT": True}  # fmt: skip


def _example(size: int, dtype: torch.dtype, device: torch.device):
    logits = torch.empty(2**30 // size, size, device=device, dtype=dtype).normal_(std=3.0)
    targets = torch.randint(size, (logits.size(0),), device=device)
    return lambda parameters: launch(logits, targets, 15.0, -1, True, True, parameters)


VOCABULARIES = (1024, 32_768, 65_536)
HELD_SPACE = tuple(
    {"CHUNK": 256 * warps, "AHEAD": ahead, "PROGRAMS": programs, "num_warps": warps}
    for warps in (4, 16, 32)
    for ahead in (0, 2, 4)
    for programs in (1, 4, 16)
)  # 256 columns a warp: 8 neighbours a thread, which are loaded at once
STREAMED_SPACE = tuple({"CHUNK": chunk, "num_warps": warps} for chunk in (1024, 4096, 8192) for warps in (4, 8, 16))
KERNELS = (
    Kernel("softcap_cross_entropy_held", held_kernel, VOCABULARIES, DTYPES[:2], HELD_SPACE, _held_arguments, _example),
    Kernel(
        "softcap_cross_entropy_streamed", streamed_kernel, (*VOCABULARIES, 131_072), DTYPES, STREAMED_SPACE,
        _streamed_arguments, _example,
    ),
)  # fmt: skip
