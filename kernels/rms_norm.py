"""Root-mean-square norm over the last axis, alone or after a residual addition; no weight.

y = r·x with r = (mean(x²) + eps)^−½, where eps is float32's epsilon. Backward uses the result in place of x:
    dx = r·(dy − y·⟨dy, y⟩/C).
Only y and one number per row are saved. The matrix product after the norm saves y anyway, and x can be freed. Because y is rounded,
the component of dx along the row has an error of one unit of r·dy, which does not matter in rows of 16 or more elements.
A row stays in registers: forward reads x and writes y once; backward reads dy and y and writes dx once.
Zhang and Sennrich 2019, without the gain.
"""

from functools import partial

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import check_float, check_shape, normed_dtype, promoted
from nanochat_kernels.configs import launch_parameters, table_cache
from nanochat_kernels.dispatch import serve
from nanochat_kernels.operation import (
    BENCHMARK_TOKENS,
    MODEL_WIDTHS,
    MORE_WIDTHS,
    Benchmark,
    Implementation,
    Kernel,
    Operation,
    Trial,
)
from nanochat_kernels.plan import Plan, cached_call
from nanochat_kernels.reference import EPS
from nanochat_kernels.tracing import constant_when_traced
from nanochat_kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    KernelFunction,
    as_rows,
    cast,
    cdiv,
    derivative,
    differentiable,
    needs_gradient,
    power_of_2,
    rsqrt,
    tl,
    triton,
    triton_unsupported_reason,
)

WIDEST = 16_384  # elements of a row kept in registers: 16 per thread of a block of 1024
PER_THREAD = 128  # most elements of a tile per thread, for widths that are not in the launch tables
# most elements of a tile: of each element backward keeps two float32 in the 65,536 registers of a multiprocessor, forward one
PER_BLOCK = {"rms_norm_forward": 32_768, "rms_norm_backward": 16_384}


@triton.jit
def forward_kernel(
    x_ptr, update_ptr, total_ptr, y_ptr, rstd_ptr, rows, x_stride, update_stride,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, KEEP_RSTD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=mask, other=0.0)
    offsets = row[:, None] * WIDTH + column
    if ADD:
        update = tl.load(update_ptr + row[:, None] * update_stride + column, mask=mask, other=0.0)
        x = cast(x.to(tl.float32) + update.to(tl.float32), x.dtype)
        tl.store(total_ptr + offsets, x, mask=mask)
    x = x.to(tl.float32)
    rstd = rsqrt(tl.sum(x * x, axis=1) / WIDTH + EPS)
    tl.store(y_ptr + offsets, cast(x * rstd[:, None], y_ptr.dtype.element_ty), mask=mask)
    if KEEP_RSTD:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def backward_kernel(
    dy_ptr, dtotal_ptr, y_ptr, rstd_ptr, dx_ptr, rows, dy_stride, dtotal_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    offsets = row[:, None] * WIDTH + column
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    projection = tl.sum(dy * y, axis=1) / WIDTH
    dx = rstd[:, None] * (dy - y * projection[:, None])
    if ADD:
        dx += tl.load(dtotal_ptr + row[:, None] * dtotal_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, cast(dx, dx_ptr.dtype.element_ty), mask=mask)


def tile(kernel: str, x: Tensor, parameters: dict[str, int] | None) -> dict[str, int]:
    """Return the tile's sizes and the launch parameters, by default those of `fitted`, for rows of x's width and dtype."""
    width = x.size(-1)
    parameters = fitted(kernel, x.device, x.dtype, width) if parameters is None else parameters.items()
    return {"WIDTH": width, "BLOCK": power_of_2(width), **dict(parameters)}


@table_cache
@constant_when_traced
def fitted(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> tuple[tuple[str, int], ...]:
    """Return the table's launch parameters, adjusted to rows that are much wider than the table's class.

    Fewer rows, and then more warps, keep a thread from running out of registers.
    """
    block, parameters = power_of_2(width), launch_parameters(kernel, device, dtype, (width,))
    rows, warps = parameters["ROWS"], parameters["num_warps"]
    limit = 32 * PER_THREAD * 2 // max(dtype.itemsize, 2)
    while rows > 1 and rows * block > min(limit * warps, PER_BLOCK[kernel]):
        rows //= 2
    while warps < 32 and block > limit * warps:
        warps *= 2
    return ("ROWS", rows), ("num_warps", warps)


def forward_plan(
    x: Tensor, update: Tensor | None = None, keep_rstd: bool = True, dtype: torch.dtype | None = None,
    parameters: dict[str, int] | None = None,
) -> Plan:  # fmt: skip
    """Plan the launch that computes (x + update, y, rstd) from x (…, C) and update.

    The sum is None without an update. y has the dtype `dtype`, by default x's. rstd (…) is None unless keep_rstd.
    """
    rows, shape = as_rows(x), tuple(x.shape)
    constants = tile("rms_norm_forward", x, parameters)
    return Plan(
        forward_kernel, (cdiv(rows.size(0), constants["ROWS"]),), x.device, as_rows,
        (
            None if update is None else (shape, x.dtype), (shape, dtype or x.dtype),
            (shape[:-1], torch.float32) if keep_rstd else None,
        ),
        (rows.size(0), rows.stride(0), rows.stride(0) if update is None else as_rows(update).stride(0)),
        dict(EPS=EPS, ADD=update is not None, KEEP_RSTD=keep_rstd, **constants),
    )  # fmt: skip


def backward_plan(
    dy: Tensor, dtotal: Tensor | None, y: Tensor, rstd: Tensor, dtype: torch.dtype | None = None,
    parameters: dict[str, int] | None = None,
) -> Plan:  # fmt: skip
    """Plan the launch that computes dx in `dtype`, by default y's, from dy (…, C), dtotal (the sum's gradient or None), y and rstd."""
    rows = as_rows(dy)
    constants = tile("rms_norm_backward", y, parameters)
    return Plan(
        backward_kernel, (cdiv(rows.size(0), constants["ROWS"]),), y.device, as_rows, ((tuple(y.shape), dtype or y.dtype),),
        (rows.size(0), rows.stride(0), rows.stride(0) if dtotal is None else as_rows(dtotal).stride(0)),
        dict(ADD=dtotal is not None, **constants),
    )  # fmt: skip


class Backward(KernelFunction):
    @staticmethod
    def forward(dy: Tensor, dtotal: Tensor | None, y: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
        return cached_call(backward_plan, dy, dtotal, y, rstd, dtype)(dy, dtotal, y, rstd)[0]


class RMSNorm(KernelFunction):
    @staticmethod
    def forward(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return plan(x, None)[1:]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output[1:] if x is not None])
        ctx.dtype = inputs[1].dtype
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, dy, _):
        return None, None if dy is None else derivative(Backward, dy, None, *ctx.saved_tensors, ctx.dtype)


class AddRMSNorm(KernelFunction):
    @staticmethod
    def forward(plan: Plan, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return plan(x, update)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output[2:] if x is not None])
        ctx.dtype = inputs[1].dtype
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, dtotal, dy, _):
        dx = dtotal if dy is None else derivative(Backward, dy, dtotal, *ctx.saved_tensors, ctx.dtype)
        return (None, *(dx if needed else None for needed in ctx.needs_input_grad[1:]))


def plan_rms_norm(x: Tensor) -> Plan:
    return forward_plan(x, None, needs_gradient(x), normed_dtype(x))


def run_rms_norm(plan: Plan, x: Tensor) -> Tensor:
    return differentiable(RMSNorm, plan, x)[0]


def plan_add_rms_norm(x: Tensor, update: Tensor) -> Plan:
    return forward_plan(x, update, needs_gradient(x, update), normed_dtype(x))


def run_add_rms_norm(plan: Plan, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    return differentiable(AddRMSNorm, plan, x, update)[:2]


def unsupported_reason(x: Tensor, *_) -> str | None:
    if x.size(-1) > WIDEST:
        return f"a row of {x.size(-1)} elements does not fit in registers; the kernel takes at most {WIDEST}"
    if x.numel() // max(x.size(-1), 1) > GRID_LIMIT:
        return f"{x.numel() // x.size(-1)} rows exceed the {GRID_LIMIT} of one launch; split them"
    return triton_unsupported_reason(x)


def rms_norm(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Divide each row of x (…, C) by its root mean square; the result has x's shape and dtype.

    Under autocast the result has the dtype of torch's rms_norm, which is float32 on CUDA from torch 2.13 on. Repeated calls are
    bitwise equal. Raises TypeError if x is not floating point, ValueError if x has no elements along its last axis, and
    KernelRequestError (a ValueError) if the implementation named by impl does not support the call.
    """
    return serve(RMS_NORM, impl, check_rms_norm, x)


def add_rms_norm(x: Tensor, update: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Add a residual update and normalise the sum in one pass: returns (x + update, rms_norm(x + update)), both (…, C).

    The norm uses the sum as stored, rounded to x's dtype. Under autocast x and update may have different dtypes, and the results
    have the dtypes of the plain operations. Raises as rms_norm does, ValueError if the shapes or devices of x and update differ,
    and TypeError if their dtypes differ outside autocast.
    """
    return serve(ADD_RMS_NORM, impl, check_add_rms_norm, *promoted(x, update))


def check_rms_norm(x: Tensor) -> None:
    check_float("rms_norm", x=x)
    check_row("rms_norm", x)


def check_add_rms_norm(x: Tensor, update: Tensor) -> None:
    check_float("add_rms_norm", x=x, update=update)
    check_row("add_rms_norm", x)
    check_shape("add_rms_norm", "update", update, *x.shape)


def check_row(operation: str, x: Tensor) -> None:
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"{operation}: x must be (…, C) with C at least 1, got shape {tuple(x.shape)}")


def random_rows(count: int, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.empty(rows, width, device=device, dtype=dtype).normal_() for _ in range(count))


def forward_launches(key, dtype: torch.dtype, device: torch.device):
    x, update = random_rows(2, 65_536, *key, dtype, device)

    def forward(parameters, update=None, keep_rstd=True, result=dtype):
        return forward_plan(x, update, keep_rstd, result, parameters)(x, update)

    return {
        "rstd": forward,
        "no rstd": partial(forward, keep_rstd=False),
        "add, rstd": partial(forward, update=update),
        "add, no rstd": partial(forward, update=update, keep_rstd=False),
        "autocast": partial(forward, update=update, result=torch.float32),
    }


def backward_launches(key, dtype: torch.dtype, device: torch.device):
    y, dy, dtotal = random_rows(3, 65_536, *key, dtype, device)
    rstd = torch.empty(65_536, device=device).uniform_(0.5, 2.0)

    def backward(parameters, dy=dy, dtotal=None, y=y):
        return backward_plan(dy, dtotal, y, rstd, dtype, parameters)(dy, dtotal, y, rstd)

    return {
        "norm": backward,
        "add": partial(backward, dtotal=dtotal),
        "autocast": partial(backward, dy=dy.float(), dtotal=dtotal, y=y.float()),
    }


KEYS = ((256,), (768,), (1280,), (2048,), (8192,))
MORE_KEYS = ((100,), (4096,), (5000,), (WIDEST,), *((width,) for width in MORE_WIDTHS))
SPACE = tuple({"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4, 8) for warps in (1, 2, 4, 8, 16))
KERNELS = (
    Kernel("rms_norm_forward", DTYPES, KEYS, SPACE, forward_launches, MORE_KEYS),
    Kernel("rms_norm_backward", DTYPES, KEYS, SPACE, backward_launches, MORE_KEYS),
)


def trials(inputs: int, shape, device: torch.device, dtype: torch.dtype):
    every = tuple(range(inputs))
    yield Trial(random_rows(inputs, shape.rows * shape.tokens, shape.width, dtype, device), every, every)


def liger():
    """Return Liger-Kernel's RMSNorm, called without a weight."""
    try:
        from liger_kernel.ops import LigerRMSNormFunction
    except ImportError:
        return None
    return lambda x: LigerRMSNormFunction.apply(x, None, EPS, 0.0, "llama", False, None)


def quack():
    """Return QuACK's RMSNorm, written in CuTe for Hopper and newer GPUs."""
    try:
        from quack import rmsnorm
    except ImportError:
        return None
    return lambda x: rmsnorm(x, None, eps=EPS)


def benchmark(inputs: int, passes: dict[str, int], flops: dict[str, int], **baselines) -> Benchmark:
    return Benchmark(
        shapes=tuple(MODEL_WIDTHS),
        inputs=lambda shape, dtype, device: random_rows(inputs, BENCHMARK_TOKENS, MODEL_WIDTHS[shape], dtype, device),
        differentiable=tuple(range(inputs)),
        elements=lambda arguments, part: passes[part] * arguments[0].numel(),
        flops=lambda arguments, part, variant: flops[part] * arguments[0].numel(),
        baselines=baselines,
    )


RMS_NORM = Operation(
    "rms_norm", rms_norm, reference.rms_norm,
    {"triton": Implementation(run_rms_norm, unsupported_reason, plan_rms_norm)}, KERNELS,
    partial(trials, 1), benchmark(1, {"fwd": 2, "bwd": 3}, {"fwd": 3, "bwd": 6}, liger=liger, quack=quack),
)  # fmt: skip
ADD_RMS_NORM = Operation(
    "add_rms_norm", add_rms_norm, reference.add_rms_norm,
    {"triton": Implementation(run_add_rms_norm, unsupported_reason, plan_add_rms_norm)}, KERNELS,
    partial(trials, 2), benchmark(2, {"fwd": 4, "bwd": 4}, {"fwd": 4, "bwd": 7}),
)  # fmt: skip
OPERATIONS = (RMS_NORM, ADD_RMS_NORM)
