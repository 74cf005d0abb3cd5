"""The Triton kernels of softcap and cross entropy: row sums, losses, and the gradient of logits.

l = cap·tanh(z/cap) lies in ±cap, so Σ exp(l) needs no running maximum: with w = 1/(1 + exp(2z/cap)),
    e = exp(l) = exp(cap − 2·cap·w),   S = Σ e,   loss = log S − l_target,
    dloss/dz = (e/S − [target])·(1 − tanh²) with 1 − tanh² = 4·w·(1 − w).
Three special-function operations per element, or two and a half where two share a reciprocal, and no division but the row's.
w is rounded to 2⁻²⁵, so l to cap·2⁻²⁴, of which a sum over many logits keeps little; the target's own part is float64.

on-chip: a row of bfloat16 logits (65,536 of them are 128 KiB) stays in registers between the sum and the gradient, as
E = e·w(1−w) in 16 bits: 6 of exponent and 10 of fraction, because E is positive and its range is known. That adds 3 % to the
rounding of a bfloat16 gradient (a quarter of its unit, in quadrature). So the logits are read once, and the gradient is written
once, over the logits. streamed: the sums from one read; the gradient, with every factor in it, from another.

NaN logits make the sum, the loss and the whole gradient row NaN; infinite ones saturate at ±cap.
"""

from math import ceil, e, log2

import torch
from torch import Tensor

from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.triton_helpers import (
    LOG2E,
    cast,
    cdiv,
    exp2,
    launch,
    multiprocessors,
    power_of_2,
    prefetch,
    reciprocal,
    tl,
    triton,
)

LARGEST_CAP = 40.0  # exp(±40) and sums of it are float32 with room to spare
LARGEST_ON_CHIP_CAP = 20.0  # exp(±20) spans 58 of the 64 exponents that E has
WIDEST_ON_CHIP = 65_536  # 16-bit logits in the registers of one multiprocessor, with as many left to compute with
TARGET_ROWS = 128  # rows per program of the kernel for targets


@triton.jit
def weight_of(z, CAP: tl.constexpr):
    """w = (1 − tanh(z/cap))/2 = 1/(1 + exp(2z/cap))."""
    return reciprocal(1.0 + exp2(z * (2.0 * LOG2E / CAP)))


@triton.jit
def two_weights(z, other, CAP: tl.constexpr):
    """weight_of both, from one reciprocal: 1/a = b/(a·b). Beyond z = 10·cap w no longer falls, so that a·b is finite."""
    # min.f32 of a GPU returns the other operand for NaN
    a = 1.0 + exp2(tl.minimum(z * (2.0 * LOG2E / CAP), 60.0, propagate_nan=tl.PropagateNan.ALL))
    b = 1.0 + exp2(tl.minimum(other * (2.0 * LOG2E / CAP), 60.0, propagate_nan=tl.PropagateNan.ALL))
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
    """Numbers up to 2^TOP, two in one integer: exponents TOP−63 to TOP in 6 bits, fractions in 10, rounded. Smaller ones and,
    as w − w² may be where a reciprocal is a unit too large, negative ones become 0."""
    LEAST: tl.constexpr = ((64 + TOP) << 23) - (1 << 12)
    # a difference first would wrap for negative numbers
    low = tl.maximum(low.to(tl.int32, bitcast=True), LEAST) - LEAST
    high = tl.maximum(high.to(tl.int32, bitcast=True), LEAST) - LEAST
    return (low >> 13) | ((high << 3) & -65536)


@triton.jit
def unpack(pair):
    """The numbers times 2^−TOP."""
    low = ((pair << 13) & 0x1FFFE000) | (64 << 23)
    high = ((pair >> 3) & 0x1FFFE000) | (64 << 23)
    both = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return tl.reshape(both, [2 * pair.shape[0]])


@triton.jit
def store_chunk(row_ptr, offsets, width, pair, share, WHOLE: tl.constexpr):
    """A chunk of the gradient, from what was kept of it."""
    value = cast(unpack(pair) * share, row_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(row_ptr + offsets, value, eviction_policy="evict_first")
    else:
        tl.store(row_ptr + offsets, value, mask=offsets < width)


@triton.jit
def row_share(row, targets_ptr, total, factor, ignore_index):
    """4·factor/S, which turns e·w(1−w) into the gradient; 0 for a row whose target is ignored, unless S is NaN."""
    return tl.where(tl.load(targets_ptr + row) == ignore_index, 0.0, 4.0 * factor) / total


@triton.jit
def on_chip_kernel(
    logits_ptr, targets_ptr, sums_ptr, factor_ptr, spare_ptr, rows, width, stride, factor_stride, ignore_index,
    CAP: tl.constexpr, FACTOR: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, TOP: tl.constexpr,
    CHUNK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Rows in CHUNKS of CHUNK columns: S and the gradient, times the row's factor, without the target's own term, from one read.

    A row fills the multiprocessor, so no other block works while this one waits. Therefore each chunk of the row before is
    written while the same chunk of this row is read, into the registers that it frees; and what comes AHEAD chunks later is
    prefetched into the L2 cache. The gradient takes the logits' place: a row is written after all of it was read.
    Ahead of its first row a program writes zeros to a spare row, for a mask would take registers that a row does not leave.
    """
    column, pair = tl.arange(0, CHUNK), tl.arange(0, CHUNK // 2)
    first = tl.program_id(0).to(tl.int64)
    kept = ()
    for _ in tl.static_range(CHUNKS):
        kept = kept + (tl.zeros([CHUNK // 2], tl.int32),)  # noqa: RUF005
    share = 0.0
    written_ptr = spare_ptr
    nothing = rows >> 31  # 0, which the compiler cannot know
    for index in tl.range(0, rows - tl.program_id(0), tl.num_programs(0)):
        row = first + index
        following = tl.minimum(row + tl.num_programs(0), rows - 1) * stride - CHUNKS * CHUNK
        total = tl.zeros([CHUNK // 8], tl.float32)  # a thread has 8 neighbours
        new = tl.zeros([CHUNK // 2], tl.int32)
        read = ()
        for i in tl.static_range(CHUNKS):
            chunk_ptr = logits_ptr + row * stride + i * CHUNK + column
            # only the last chunk may need a mask: one for each chunk takes registers that a row does not leave
            if EVEN or i + 1 < CHUNKS:
                z = tl.load(chunk_ptr, eviction_policy="evict_first")
            else:
                z = tl.load(chunk_ptr, mask=column < width - i * CHUNK, other=0.0)
            if AHEAD > 0 and EVEN:
                start = row * stride if i + AHEAD < CHUNKS else following
                prefetch(logits_ptr + start + (i + AHEAD) * CHUNK + 8 * tl.arange(0, CHUNK // 8))
            # what is written waits for the chunk before to be packed: else all loads would move to the front, and spill
            store_chunk(
                written_ptr + i * CHUNK, column, width - i * CHUNK, kept[i] | (new & nothing), share,
                EVEN or i + 1 < CHUNKS,
            )  # fmt: skip
            z, other = tl.split(tl.reshape(z.to(tl.float32), [CHUNK // 2, 2]))
            w, v = two_weights(z, other, CAP)
            e, f = exponential(w, CAP), exponential(v, CAP)
            if not (EVEN or i + 1 < CHUNKS):
                e = tl.where(2 * pair < width - i * CHUNK, e, 0.0)
                f = tl.where(2 * pair + 1 < width - i * CHUNK, f, 0.0)
            total += tl.sum(tl.reshape(e + f, [CHUNK // 8, 4]), axis=1)
            new = pack(e * (w - w * w), f * (v - v * v), TOP)
            read = read + (new,)  # noqa: RUF005
        kept = read
        total = tl.sum(total)
        tl.store(sums_ptr + row, total)
        factor = tl.load(factor_ptr + row * factor_stride) if FACTOR else 1.0
        share = row_share(row, targets_ptr, total, factor, ignore_index) * (1 << TOP)
        written_ptr = logits_ptr + row * stride
    for i in tl.static_range(CHUNKS):
        store_chunk(written_ptr + i * CHUNK, column, width - i * CHUNK, kept[i], share, EVEN or i + 1 < CHUNKS)


@triton.jit
def sums_kernel(logits_ptr, sums_ptr, width, stride, CAP: tl.constexpr, CHUNK: tl.constexpr):
    """S of a row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, width, CHUNK):
        mask = start + column < width
        z = tl.load(logits_ptr + (row * stride + start) + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, exponential(weight_of(z, CAP), CAP), 0.0)
    tl.store(sums_ptr + row, tl.sum(total))


@triton.jit
def gradient_kernel(
    logits_ptr, targets_ptr, sums_ptr, factor_ptr, gradient_ptr, width, stride, factor_stride, ignore_index,
    CAP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of a row per program, times the row's factor, without the target's own term."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    factor = tl.load(factor_ptr + row * factor_stride)
    share = row_share(row, targets_ptr, tl.load(sums_ptr + row), factor, ignore_index)
    for start in tl.range(0, width, CHUNK):
        mask = start + column < width
        z = tl.load(logits_ptr + (row * stride + start) + column, mask=mask, other=0.0).to(tl.float32)
        w, rest = weights_of(z, CAP)
        value = exponential(w, CAP) * (w * rest) * share
        tl.store(gradient_ptr + (row * width + start) + column, cast(value, gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def targets_kernel(
    target_logits_ptr, targets_ptr, sums_ptr, losses_ptr, factor_ptr, gradient_ptr, rows, width, stride, factor_stride,
    ignore_index, CAP: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What the target of a row adds: its loss, and its own entry of the gradient. A target outside of the row gives NaN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    target = tl.load(targets_ptr + row, mask=mask, other=0)
    total = tl.load(sums_ptr + row, mask=mask, other=1.0)
    known = mask & (target >= 0) & (target < width)
    z = tl.load(target_logits_ptr + row, mask=known, other=float("nan")).to(tl.float32)
    summed = exponential(weight_of(z, CAP), CAP).to(tl.float64)
    w = 1.0 / (1.0 + tl.exp(z.to(tl.float64) * (2.0 / CAP)))
    rest = 1.0 / (1.0 + tl.exp(z.to(tl.float64) * (-2.0 / CAP)))
    exact = tl.exp(CAP * (rest - w))
    others = total.to(tl.float64) - summed
    # the target's term of S as exact as itself; not tl.maximum, which drops NaN
    others = tl.where(others < 0.0, 0.0, others)
    counts = target != ignore_index
    if LOSS:
        loss = tl.log((exact + others) / exact)
        tl.store(losses_ptr + row, tl.where(counts, loss, 0.0).to(tl.float32), mask=mask)
    if GRADIENT:
        value = -others / (exact + others) * 4.0 * w * rest
        if FACTOR:
            value *= tl.load(factor_ptr + row * factor_stride, mask=mask, other=0.0)
        value = cast(value.to(tl.float32), gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * stride + target, value, mask=known & counts)


def fits_on_chip(logits_dtype: torch.dtype, width: int, cap: float) -> bool:
    """Whether the gradient can be made together with the sums. float16 has not the range for it: it is made in backward, when
    the scale of the loss is known."""
    return logits_dtype == torch.bfloat16 and width <= WIDEST_ON_CHIP and cap <= LARGEST_ON_CHIP_CAP


def on_chip_parameters(logits: Tensor, parameters: dict[str, int] | None) -> dict[str, int]:
    """Launch parameters with the chunk fitted to the row: not wider than the row, and in ragged rows, which the chunks of the
    table do not divide and for which it has others, nothing prefetched."""
    width = logits.size(1)

    def fitted(found: dict[str, int]) -> dict[str, int]:
        return {**found, "CHUNK": min(found["CHUNK"], power_of_2(max(width, 16)))}

    def of_table(rows: str) -> dict[str, int]:
        return fitted(launch_parameters("cross_entropy_on_chip", logits.device, logits.dtype, (width, rows)))

    found = fitted(parameters) if parameters else of_table("whole")
    if width % found["CHUNK"]:
        found = {**(found if parameters else of_table("ragged")), "AHEAD": 0}
    found["AHEAD"] = min(found["AHEAD"], cdiv(width, found["CHUNK"]))
    return found


def launch_on_chip(
    logits: Tensor, targets: Tensor, factor: Tensor | None, cap: float, ignore_index: int,
    parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(losses (N,), sums (N,)); the gradient of Σ factor·loss, for a factor () or (N,), takes the place of the contiguous logits
    (N, V). The losses are without the factor."""
    rows, width = logits.shape
    sums, losses = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        target_logits = logits_of_targets(logits, targets)
        found = on_chip_parameters(logits, parameters)
        spare = torch.empty(width, dtype=logits.dtype, device=logits.device)
        programs = min(rows, multiprocessors(logits.device) * found.pop("PROGRAMS"))
        factor = None if factor is None else factor.to(torch.float32).expand(rows)
        launch(
            on_chip_kernel, (programs,), logits.device, logits, targets, sums, sums if factor is None else factor, spare,
            rows, width, width, 0 if factor is None else factor.stride(0), ignore_index,
            CAP=cap, FACTOR=factor is not None, CHUNKS=cdiv(width, found["CHUNK"]), EVEN=width % found["CHUNK"] == 0,
            TOP=ceil(cap * log2(e)), **found,
        )  # fmt: skip
        launch_targets(target_logits, targets, sums, losses, factor, logits, cap, ignore_index, width)
    return losses, sums


def launch_losses(
    logits: Tensor, targets: Tensor, cap: float, ignore_index: int, parameters: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """(losses (N,), sums (N,)) of logits (N, V), whose rows may lie apart."""
    rows, width = logits.shape
    sums, losses = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        found = parameters or launch_parameters("cross_entropy_sums", logits.device, logits.dtype, (width,))
        launch(sums_kernel, (rows,), logits.device, logits, sums, width, logits.stride(0), CAP=cap, **found)
        target_logits = logits_of_targets(logits, targets)
        launch_targets(target_logits, targets, sums, losses, None, None, cap, ignore_index, width)
    return losses, sums


def launch_gradient(
    logits: Tensor, targets: Tensor, sums: Tensor, factor: Tensor, cap: float, ignore_index: int,
    parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """The gradient (N, V) of Σ factor·loss, for a factor () or (N,)."""
    rows, width = logits.shape
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows:
        found = parameters or launch_parameters("cross_entropy_gradient", logits.device, logits.dtype, (width,))
        factor = factor.to(torch.float32).expand(rows)
        launch(
            gradient_kernel, (rows,), logits.device, logits, targets, sums, factor, gradient, width, logits.stride(0),
            factor.stride(0), ignore_index, CAP=cap, **found,
        )  # fmt: skip
        target_logits = logits_of_targets(logits, targets)
        launch_targets(target_logits, targets, sums, None, factor, gradient, cap, ignore_index, width)
    return gradient


def launch_targets(
    target_logits: Tensor, targets: Tensor, sums: Tensor, losses: Tensor | None, factor: Tensor | None,
    gradient: Tensor | None, cap: float, ignore_index: int, width: int,
) -> None:  # fmt: skip
    rows = targets.size(0)
    launch(
        targets_kernel, (cdiv(rows, TARGET_ROWS),), targets.device, target_logits, targets, sums,
        sums if losses is None else losses, sums if factor is None else factor, sums if gradient is None else gradient,
        rows, width, width, 0 if factor is None else factor.stride(0), ignore_index, CAP=cap, LOSS=losses is not None,
        GRADIENT=gradient is not None, FACTOR=factor is not None, ROWS=TARGET_ROWS,
    )  # fmt: skip


def logits_of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,); of a target outside of the row any logit."""
    return logits.gather(1, targets.clamp(0, logits.size(1) - 1)[:, None]).squeeze(1)
