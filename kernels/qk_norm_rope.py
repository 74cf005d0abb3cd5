"""Rotary position embedding and QK-norm in one operation: rotate q and k by −θ(position), then apply RMSNorm to each head.

The two halves [x1, x2] of a head become [o1, o2] = [x1·cos + x2·sin, x2·cos − x1·sin], with one row of the tables for each
position; then y = r·o with r = (mean(o²) + eps)^−½. Backward uses the result, as in rms_norm: do = r·(dy − y·⟨dy, y⟩/D), rotated
back. q, k, the tables and the results are read or written once. Only y, which attention saves anyway, and r are saved.
Su et al. 2021 (rotation), Henry et al. 2020 (norm of q and k).
"""

from functools import partial

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import (
    check_device,
    check_float,
    check_heads,
    check_offset,
    check_shape,
    normed_dtype,
    under_autocast,
)
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.dispatch import serve
from nanochat_kernels.operation import DECODED_ROWS, Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.plan import Plan, cached_call
from nanochat_kernels.qk_norm_rope_kernels import backward_kernel, forward_kernel
from nanochat_kernels.reference import EPS, ROPE_BASE
from nanochat_kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    KernelFunction,
    cdiv,
    derivative,
    differentiable,
    needs_gradient,
    power_of_2,
    triton_unsupported_reason,
)

WIDEST = 1024  # channels of a head: one token of that width in 16 warps fills half of a thread's registers
MOST_HEADS = 65_535  # programs on the second axis of a grid
PER_THREAD = 176  # most elements of a tile and its tables per thread, for heads wider than those in the launch tables


def tile(kernel: str, q: Tensor, heads: tuple[int, int], parameters: dict[str, int] | None) -> dict[str, int]:
    """Return the launch parameters and the tile's sizes for heads of q's width.

    Without given parameters they come from the table. For heads that are much wider than the table's class, fewer tokens, then
    fewer heads, then more warps keep a thread from running out of registers.
    """
    width = q.size(-1)
    block = 2 * power_of_2(width // 2)
    chosen = parameters or launch_parameters(kernel, q.device, q.dtype, (width,))
    tokens, warps = chosen["TOKENS"], chosen["num_warps"]
    # numbers of heads per program that give all programs equally many: for 6 heads a program takes 3 if the table says 5
    head_counts = [n for n in range(1, chosen["HEADS"] + 1) if heads[0] % n == heads[1] % n == 0]
    if parameters is None:
        limit = 32 * PER_THREAD
        while tokens > 1 and tokens * (head_counts[-1] + 1) * block > limit * warps:
            tokens //= 2
        while len(head_counts) > 1 and tokens * (head_counts[-1] + 1) * block > limit * warps:
            head_counts.pop()
        while warps < 16 and tokens * (head_counts[-1] + 1) * block > limit * warps:
            warps *= 2
    return {
        "HALF": width // 2, "HALF_BLOCK": block // 2, "TOKENS": tokens, "HEADS": head_counts[-1], "num_warps": warps,
    }  # fmt: skip


def as_read(x: Tensor) -> Tensor:
    """Return x with strides that the kernels can read: stride 1 along the channels of q and k, contiguous tables, any offsets."""
    if x.dim() == 4:
        return x if x.stride(-1) == 1 or x.size(-1) <= 1 else x.contiguous()
    return x.contiguous() if x.dim() == 2 else x


def plan_of(
    kernel, name: str, q: Tensor, k: Tensor, heads: tuple[int, int], results: tuple, tables: tuple,
    parameters: dict[str, int] | None, **constants,
) -> Plan:  # fmt: skip
    """Plan a launch of either kernel, with the strides of q and k, the numbers of their heads to compute and (cos, offset, offsets)."""
    batch, tokens = q.shape[:2]
    cos, offset, offsets = tables
    constants |= tile(name, q, heads, parameters)
    programs = sum(cdiv(count, constants["HEADS"]) for count in heads)
    return Plan(
        kernel, (batch * cdiv(tokens, constants["TOKENS"]), programs), q.device, as_read, results,
        (
            offset, 0 if offsets is None else offsets.stride(0), tokens, cos.size(0), *heads,
            *as_read(q).stride()[:3], *as_read(k).stride()[:3],
        ),
        dict(OFFSETS=offsets is not None, **constants),
    )  # fmt: skip


def forward_plan(
    q: Tensor, k: Tensor, cos: Tensor, offset: int = 0, offsets: Tensor | None = None, keep_rstd: bool = True,
    q_dtype: torch.dtype | None = None, k_dtype: torch.dtype | None = None, parameters: dict[str, int] | None = None,
) -> Plan:  # fmt: skip
    """Plan the launch that computes the results for q and k, and the rstd of both, from (q, k, cos, sin, offsets).

    The results have the dtypes q_dtype and k_dtype, by default those of q and k. rstd (H, B, T) is None unless keep_rstd.
    """
    normed = ((tuple(q.shape), q_dtype or q.dtype), (tuple(k.shape), k_dtype or k.dtype))
    rstd = (((x.size(2), *x.shape[:2]), torch.float32) if keep_rstd else None for x in (q, k))
    return plan_of(
        forward_kernel, "qk_norm_rope_forward", q, k, (q.size(2), k.size(2)), (*normed, *rstd), (cos, offset, offsets),
        parameters, EPS=EPS, KEEP_RSTD=keep_rstd,
    )  # fmt: skip


def backward_plan(
    q_out: Tensor, k_out: Tensor, dq_out: Tensor | None, dk_out: Tensor | None, cos: Tensor, offset: int = 0,
    offsets: Tensor | None = None, q_dtype: torch.dtype | None = None, k_dtype: torch.dtype | None = None,
    parameters: dict[str, int] | None = None,
) -> Plan:  # fmt: skip
    """Plan the launch that computes dq and dk from (q_out, k_out, dq_out, dk_out, q_rstd, k_rstd, cos, sin, offsets).

    They have the dtypes q_dtype and k_dtype, by default those of the results. dq or dk is None if dq_out or dk_out is.
    """
    parts = ((dq_out, q_out, q_dtype), (dk_out, k_out, k_dtype))
    heads = tuple(0 if dy is None else y.size(2) for dy, y, _ in parts)
    results = tuple(None if dy is None else (tuple(y.shape), dtype or y.dtype) for dy, y, dtype in parts)
    q, k = (y if dy is None else dy for dy, y, _ in parts)
    return plan_of(
        backward_kernel, "qk_norm_rope_backward", q, k, heads, results, (cos, offset, offsets), parameters
    )  # fmt: skip


class Backward(KernelFunction):
    @staticmethod
    def forward(q_out, k_out, dq_out, dk_out, q_rstd, k_rstd, cos, sin, offset, offsets, q_dtype, k_dtype):
        plan = cached_call(backward_plan, q_out, k_out, dq_out, dk_out, cos, offset, offsets, q_dtype, k_dtype)
        return plan(q_out, k_out, dq_out, dk_out, q_rstd, k_rstd, cos, sin, offsets)


class QKNormRope(KernelFunction):
    @staticmethod
    def forward(plan: Plan, q, k, cos, sin, offset, offsets) -> tuple[Tensor | None, ...]:
        return plan(q, k, cos, sin, offsets)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, q, k, cos, sin, ctx.offset, offsets = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output[2:] if x is not None])
        ctx.dtypes = q.dtype, k.dtype
        ctx.save_for_backward(*output, cos, sin, offsets)

    @staticmethod
    def backward(ctx, dq_out, dk_out, *_):
        wanted = zip((dq_out, dk_out), ctx.needs_input_grad[1:3], strict=True)
        upstream = [dy if needed else None for dy, needed in wanted]
        gradients = None, None
        if any(dy is not None for dy in upstream):
            q_out, k_out, *saved, offsets = ctx.saved_tensors
            gradients = derivative(Backward, q_out, k_out, *upstream, *saved, ctx.offset, offsets, *ctx.dtypes)
        return (None, *gradients, *[None] * 4)


def plan(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor) -> Plan:
    offset, offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    # the reference casts the tables to q's dtype, so that under autocast the rotated k is promoted to it
    k_dtype = normed_dtype(k) if k.dtype == q.dtype else torch.promote_types(normed_dtype(k), q.dtype)
    return forward_plan(q, k, cos, offset, offsets, needs_gradient(q, k), normed_dtype(q), k_dtype)


def run(plan: Plan, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor) -> tuple[Tensor, Tensor]:
    offset, offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    return differentiable(QKNormRope, plan, q, k, cos, sin, offset, offsets)[:2]


def unsupported_reason(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor) -> str | None:
    if q.size(3) > WIDEST:
        return f"a head of {q.size(3)} channels is too wide; the kernel takes at most {WIDEST}"
    if q.size(0) * q.size(1) > GRID_LIMIT:
        return f"{q.size(0) * q.size(1)} tokens exceed the {GRID_LIMIT} of one launch; split the batch"
    if q.size(2) + k.size(2) > MOST_HEADS:
        return f"{q.size(2)} and {k.size(2)} heads exceed the {MOST_HEADS} of one launch"
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        return "it computes no gradient for cos and sin; detach them"
    return triton_unsupported_reason(q) or triton_unsupported_reason(k)


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor = 0, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate and normalise q (B, T, H, D) and k (B, T, G, D); the results have their shapes and dtypes.

    cos, sin: (positions, D/2). offset: the position of the first token, as an integer or a tensor with one for each row (B,). The
    values of a tensor are not checked: a position outside the tables gives NaN from the kernel; in the reference it raises an
    error, or counts from the end if it is negative. Under autocast q and k may have different dtypes, and the results have the
    dtypes of the plain operations.
    Raises ValueError for an odd D, for a number of heads that is not a multiple of the key heads and for mismatched or too short
    tables, TypeError for mismatched dtypes, and KernelRequestError (a ValueError) if the implementation named by impl does not
    support the call. Repeated calls are bitwise equal.
    """
    return serve(QK_NORM_ROPE, impl, check, q, k, cos, sin, offset)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor) -> None:
    if under_autocast(q):
        check_float("qk_norm_rope", q=q)
        check_float("qk_norm_rope", k=k)
        check_device("qk_norm_rope", q=q, k=k)
    else:
        check_float("qk_norm_rope", q=q, k=k)
    check_shape("qk_norm_rope", "q", q, "B", "T", "H", "D")
    batch, tokens, heads, width = q.shape
    check_shape("qk_norm_rope", "k", k, batch, tokens, "G", width)
    if width % 2 or width == 0:
        raise ValueError(f"qk_norm_rope: the head width must be even to be rotated in halves, got {width}")
    check_heads("qk_norm_rope", heads, k.size(2))
    check_float("qk_norm_rope", cos=cos, sin=sin)
    check_shape("qk_norm_rope", "cos", cos, "positions", width // 2)
    check_shape("qk_norm_rope", "sin", sin, *cos.shape)
    check_device("qk_norm_rope", q=q, cos=cos)
    check_offset("qk_norm_rope", q, tokens, cos.size(0), offset)


def tables(positions: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin (positions, D/2) for heads of this width."""
    frequencies = ROPE_BASE ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inputs(
    batch: int, tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (torch.empty(batch, tokens, n, width, device=device, dtype=dtype).normal_() for n in (heads, kv_heads))
    return q, k, *tables(tokens, width, dtype, device)


def forward_launches(key, dtype: torch.dtype, device: torch.device):
    width = key[0]
    heads = max(1280 // width, 1)
    q, k, cos, sin = inputs(32, 2048, heads, heads, width, dtype, device)
    zeros = torch.zeros(32, dtype=torch.int64, device=device)

    def forward(parameters, q=q, k=k, offsets=None, keep_rstd=True, result=dtype):
        plan = forward_plan(q, k, cos, 0, offsets, keep_rstd, result, result, parameters)
        return plan(q, k, cos, sin, offsets)

    return {
        "rstd": forward,
        "no rstd": partial(forward, keep_rstd=False),
        "offsets": partial(forward, q=q[:, :1], k=k[:, :1], offsets=zeros, keep_rstd=False),
        "offsets, rstd": partial(forward, offsets=zeros),
        "autocast": partial(forward, result=torch.float32),
    }


def backward_launches(key, dtype: torch.dtype, device: torch.device):
    width = key[0]
    heads = max(1280 // width, 1)
    q_out, k_out, cos, sin = inputs(32, 2048, heads, heads, width, dtype, device)
    dq, dk, *_ = inputs(32, 2048, heads, heads, width, dtype, device)
    rstd = torch.empty(heads, 32, 2048, device=device).uniform_(0.5, 2.0)
    zeros = torch.zeros(32, dtype=torch.int64, device=device)
    wide = [x.float() for x in (q_out, k_out, dq, dk)]

    def backward(parameters, *given, offsets=None):
        plan = backward_plan(*given, cos, 0, offsets, dtype, dtype, parameters)
        return plan(*given, rstd, rstd, cos, sin, offsets)

    return {
        "both": lambda parameters: backward(parameters, q_out, k_out, dq, dk),
        "offsets": lambda parameters: backward(parameters, q_out, k_out, dq, dk, offsets=zeros),
        "dq alone": lambda parameters: backward(parameters, q_out, k_out, dq, None),
        "dk alone": lambda parameters: backward(parameters, q_out, k_out, None, dk),
        "autocast": lambda parameters: backward(parameters, *wide),
    }


KEYS, MORE_KEYS = ((64,), (128,)), ((96,), (512,), (WIDEST,))
SPACE = tuple(
    {"TOKENS": tokens, "HEADS": heads, "num_warps": warps}
    for tokens, warps in ((4, 1), (8, 1), (8, 2), (16, 2), (16, 4), (32, 4), (32, 8), (64, 8))
    for heads in (1, 2, 5, 10)
    if tokens * heads <= 160
)
KERNELS = (
    Kernel("qk_norm_rope_forward", DTYPES, KEYS, SPACE, forward_launches, MORE_KEYS),
    Kernel("qk_norm_rope_backward", DTYPES, KEYS, SPACE, backward_launches, MORE_KEYS),
)


def trials(shape, device: torch.device, dtype: torch.dtype):
    """Training's call, and decoding's: one token in each row, at a position of its own."""
    sizes = shape.heads, shape.kv_heads, shape.width // shape.heads, dtype, device
    yield Trial(inputs(shape.rows, shape.tokens, *sizes), (0, 1), (0, 1))
    q, k, *_ = inputs(DECODED_ROWS, 1, *sizes)
    offsets = torch.randint(shape.tokens, (DECODED_ROWS,), device=device)
    yield Trial((q, k, *tables(shape.tokens, *sizes[2:]), offsets), (0, 1, 4), (0, 1))


def liger():
    """Return Liger-Kernel's rotation followed by its norm; the rotation overwrites its arguments, so that it gets copies."""
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction
    except ImportError:
        return None

    def norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (torch.cat([table, table], -1)[None] for table in (cos, -sin))  # Liger rotates by +θ
        rotated = LigerRopeFunction.apply(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin)
        rows = (x.transpose(1, 2).contiguous() for x in rotated)
        return tuple(LigerRMSNormFunction.apply(x, None, EPS, 0.0, "llama", False, None) for x in rows)

    return norm_rope


MODEL_HEADS = {"d12": 6, "d20": 10, "d26": 13, "d32": 16}  # of 128 channels
QK_NORM_ROPE = Operation(
    "qk_norm_rope", qk_norm_rope, reference.qk_norm_rope, {"triton": Implementation(run, unsupported_reason, plan)}, KERNELS,
    trials,
    Benchmark(
        shapes=tuple(MODEL_HEADS),
        inputs=lambda shape, dtype, device: inputs(32, 2048, *[MODEL_HEADS[shape]] * 2, 128, dtype, device),
        differentiable=(0, 1),
        elements=lambda arguments, part: {"fwd": 2, "bwd": 3}[part] * sum(x.numel() for x in arguments[:2]),
        flops=lambda arguments, part, variant: {"fwd": 6, "bwd": 9}[part] * sum(x.numel() for x in arguments[:2]),
        baselines={"liger": liger},
    ),
)  # fmt: skip
OPERATIONS = (QK_NORM_ROPE,)
