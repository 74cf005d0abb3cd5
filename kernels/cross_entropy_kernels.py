"""The Triton kernels of softcap and cross entropy: row sums, losses, and the gradient of the logits.

l = cap·tanh(z/cap) lies in ±cap, so Σ exp(l) needs no running maximum: with w = 1/(1 + exp(2z/cap)),
    e = exp(l) = exp(cap − 2·cap·w),   S = Σ e,   loss = log S − l_target,
    dloss/dz = (e/S − [target])·(1 − tanh²) with 1 − tanh² = 4·w·(1 − w).
An element takes three special-function operations, or two and a half where two elements share a reciprocal; the only division is
one per row. w is rounded to 2⁻²⁵ and l therefore to cap·2⁻²⁴, an error that mostly averages out in a sum over many logits. The
target's own term is computed in float64.

On-chip kernel: a row of bfloat16 logits (65,536 of them are 128 KiB) stays in registers between the sum and the gradient, as
E = e·w(1−w) in 16 bits: 6 bits of exponent and 10 of fraction suffice, because E is positive and its range is known. The packing
adds 3 % to the rounding error of a bfloat16 gradient (a quarter of its unit, in quadrature). The logits are read once, and the
gradient is written over them once. Streamed kernels: one reads the logits for the sums, another reads them again and writes the
gradient multiplied by all factors.

NaN logits make the sum, the loss and the whole row of the gradient NaN; infinite logits saturate at ±cap.
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

LARGEST_CAP = 40.0  # exp(±40) and sums of it are far inside the range of float32
LARGEST_ON_CHIP_CAP = 20.0  # exp(±20) spans 58 of the 64 exponents of E
# 16-bit logits that fill half of a multiprocessor's registers; the kernel computes in the other half
WIDEST_ON_CHIP = 65_536
TARGET_ROWS = 128  # rows per program of targets_kernel


@triton.jit
def weight_of(z, CAP: tl.constexpr):
    """w = (1 − tanh(z/cap))/2 = 1/(1 + exp(2z/cap))."""
    return reciprocal(1.0 + exp2(z * (2.0 * LOG2E / CAP)))


@triton.jit
def two_weights(z, other, CAP):
    """weight_of(z) and weight_of(other) from one reciprocal: 1/a = b/(a·b). exp2's exponent is limited to 60 to keep a·b finite."""
    # without propagate_nan a GPU's min.f32 returns the other operand for NaN
    a = 1.0 + exp2(tl.minimum(z * (2.0 * LOG2E / CAP), 60.0, propagate_nan=tl.PropagateNan.ALL))
    b = 1.0 + exp2(tl.minimum(other * (2.0 * LOG2E / CAP), 60.0, propagate_nan=tl.PropagateNan.ALL))
    r = reciprocal(a * b)
    return r * b, r * a


@triton.jit
def weights_of(z, CAP: tl.constexpr):
    """w and 1 − w, without cancellation where w is nearly 1."""
    u = exp2(z * (2.0 * LOG2E / CAP))
    w = reciprocal(1.0 + u)
    return w, tl.where(w > 0.75, u * w, 1.0 - w)


@triton.jit
def exponential(w, CAP):
    """exp(l), computed from w."""
    return exp2(w * (-2.0 * LOG2E * CAP) + LOG2E * CAP)


@triton.jit
def pack(low, high, TOP: tl.constexpr):
    """Pack two numbers up to 2^TOP into one integer, each with 6 bits of exponent (TOP−63 to TOP) and 10 bits of rounded fraction.

    Smaller numbers become 0. So do negative ones: w − w² is negative where the reciprocal is one unit too large.
    """
    LEAST: tl.constexpr = ((64 + TOP) << 23) - (1 << 12)
    # maximum comes before the difference, which would wrap around for negative numbers
    low = tl.maximum(low.to(tl.int32, bitcast=True), LEAST) - LEAST
    high = tl.maximum(high.to(tl.int32, bitcast=True), LEAST) - LEAST
    return (low >> 13) | ((high << 3) & -65536)


@triton.jit
def unpack(pair):
    """Return the packed numbers times 2^−TOP."""
    low = ((pair << 13) & 0x1FFFE000) | (64 << 23)
    high = ((pair >> 3) & 0x1FFFE000) | (64 << 23)
    both = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return tl.reshape(both, [2 * pair.shape[0]])


@triton.jit
def store_chunk(row_ptr, offsets, width, pair, share, WHOLE: tl.constexpr):
    """Store a chunk of the gradient, computed from its packed numbers."""
    value = cast(unpack(pair) * share, row_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(row_ptr + offsets, value, eviction_policy="evict_first")
    else:
        tl.store(row_ptr + offsets, value, mask=offsets < width)


@triton.jit
def row_share(row, targets_ptr, total, factor, ignore_index):
    """4·factor/S, which multiplies e·w(1−w) to give the gradient; 0 for a row whose target is ignored, or NaN if S is."""
    return tl.where(tl.load(targets_ptr + row) == ignore_index, 0.0, 4.0 * factor) / total


@triton.jit(do_not_specialize=["factor_stride"])  # one factor for all rows, or one for each
def on_chip_kernel(
    logits_ptr, targets_ptr, sums_ptr, factor_ptr, spare_ptr, rows, width, row_stride, factor_stride, ignore_index,
    CAP: tl.constexpr, FACTOR: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, TOP: tl.constexpr,
    CHUNK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute S, and the gradient times the row's factor without the target's own term, from one read of each row in CHUNKS chunks.

    A row fills the registers of a multiprocessor, so that no second block can hide this one's memory latency. Therefore a program
    writes a chunk of the previous row while it reads the same chunk of the current row into the registers that this frees, and
    prefetches the chunk that it reads AHEAD chunks later into the L2 cache. The gradient replaces the logits: a row is written
    after all of it has been read. Before its first row a program writes zeros to a spare row, because a mask for the stores would
    take registers that the row needs.
    """
    column, pair = tl.arange(0, CHUNK), tl.arange(0, CHUNK // 2)
    first = tl.program_id(0).to(tl.int64)
    kept = ()
    for _ in tl.static_range(CHUNKS):
        kept = kept + (tl.zeros([CHUNK // 2], tl.int32),)  # noqa: RUF005
    share = 0.0
    written_ptr = spare_ptr
    zero = rows >> 31  # the compiler does not know that this is 0
    for index in tl.range(0, rows - tl.program_id(0), tl.num_programs(0)):
        row = first + index
        # chunk number CHUNKS counted from here is the first chunk of the next row
        next_row_offset = tl.minimum(row + tl.num_programs(0), rows - 1) * row_stride - CHUNKS * CHUNK
        total = tl.zeros([CHUNK // 8], tl.float32)  # one sum for the 8 neighbouring elements of a thread
        new = tl.zeros([CHUNK // 2], tl.int32)
        read = ()
        for i in tl.static_range(CHUNKS):
            chunk_ptr = logits_ptr + row * row_stride + i * CHUNK + column
            # only the last chunk has a mask: masks for all chunks would take registers that the row needs
            if EVEN or i + 1 < CHUNKS:
                z = tl.load(chunk_ptr, eviction_policy="evict_first")
            else:
                z = tl.load(chunk_ptr, mask=column < width - i * CHUNK, other=0.0)
            if AHEAD > 0 and EVEN:
                start = row * row_stride if i + AHEAD < CHUNKS else next_row_offset
                prefetch(logits_ptr + start + (i + AHEAD) * CHUNK + 8 * tl.arange(0, CHUNK // 8))
            # `new & zero` is 0, but it makes this store wait until the previous chunk is packed; without it the compiler moves
            # all loads to the front, and registers spill
            store_chunk(
                written_ptr + i * CHUNK, column, width - i * CHUNK, kept[i] | (new & zero), share,
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
        written_ptr = logits_ptr + row * row_stride
    for i in tl.static_range(CHUNKS):
        store_chunk(written_ptr + i * CHUNK, column, width - i * CHUNK, kept[i], share, EVEN or i + 1 < CHUNKS)


@triton.jit
def sums_kernel(logits_ptr, sums_ptr, width, row_stride, CAP: tl.constexpr, CHUNK: tl.constexpr):
    """Compute S of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, width, CHUNK):
        mask = start + column < width
        z = tl.load(logits_ptr + (row * row_stride + start) + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, exponential(weight_of(z, CAP), CAP), 0.0)
    tl.store(sums_ptr + row, tl.sum(total))


@triton.jit(do_not_specialize=["factor_stride"])  # one factor for all rows, or one for each
def gradient_kernel(
    logits_ptr, targets_ptr, sums_ptr, factor_ptr, gradient_ptr, width, row_stride, factor_stride, ignore_index,
    CAP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one row per program times the row's factor, without the target's own term."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    factor = tl.load(factor_ptr + row * factor_stride)
    share = row_share(row, targets_ptr, tl.load(sums_ptr + row), factor, ignore_index)
    for start in tl.range(0, width, CHUNK):
        mask = start + column < width
        z = tl.load(logits_ptr + (row * row_stride + start) + column, mask=mask, other=0.0).to(tl.float32)
        w, rest = weights_of(z, CAP)
        value = exponential(w, CAP) * (w * rest) * share
        tl.store(gradient_ptr + (row * width + start) + column, cast(value, gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["factor_stride"])  # one factor for all rows, or one for each
def targets_kernel(
    target_logits_ptr, targets_ptr, sums_ptr, losses_ptr, factor_ptr, gradient_ptr, rows, width, gradient_stride, factor_stride,
    ignore_index, CAP: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the loss of each row and its target's entry of the gradient. A target outside the vocabulary gives NaN."""
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
    # rounding may make the difference negative; tl.maximum would drop NaN
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
        tl.store(gradient_ptr + row * gradient_stride + target, value, mask=known & counts)


def fits_on_chip(logits_dtype: torch.dtype, width: int, cap: float) -> bool:
    """Return whether the gradient can be computed together with the sums.

    float16 lacks the range for that: its gradient is computed in backward, when the scale of the loss is known.
    """
    return logits_dtype == torch.bfloat16 and width <= WIDEST_ON_CHIP and cap <= LARGEST_ON_CHIP_CAP


def on_chip_parameters(logits: Tensor, parameters: dict[str, int] | None) -> dict[str, int]:
    """Return launch parameters, by default the table's, with a chunk that is not wider than the row.

    Rows that the chunk does not divide take the table's parameters for ragged rows and are not prefetched.
    """
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
    """Return (losses (N,), sums (N,)) and overwrite the contiguous logits (N, V) with the gradient of Σ factor·loss.

    factor: () or (N,); None stands for 1. The losses are not multiplied by it.
    """
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
    """Return (losses (N,), sums (N,)) of logits (N, V) with any row stride."""
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
    """Return the gradient (N, V) of Σ factor·loss for a factor () or (N,)."""
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
    """Return each row's logit of its target (N,); for a target outside the vocabulary some other logit."""
    return logits.gather(1, targets.clamp(0, logits.size(1) - 1)[:, None]).squeeze(1)
