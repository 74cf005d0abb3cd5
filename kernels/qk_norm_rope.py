"""Rotary position and QK-norm in one operation: rotate q and k by −θ(position), then RMSNorm over the head.

[x1, x2] → [o1, o2] = [x1·cos + x2·sin, x2·cos − x1·sin] on the two halves of a head, tables of one row a position, then
y = r·o with r = (mean(o²) + eps)^−½. Backward from the result, as in rms_norm: do = r·(dy − y·⟨dy, y⟩/D), turned back.
q, k, the tables and the results are read or written once; kept are y, which attention keeps anyway, and r.
Su et al. 2021 (rotation), Henry et al. 2020 (norm of q and k).
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import check_device, check_float, check_shape
from kernels.configs import Kernel, launch_parameters
from kernels.dispatch import Implementation, choose
from kernels.reference import EPS
from kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    cast,
    cdiv,
    power_of_2,
    rsqrt,
    tl,
    traced_as,
    triton,
    triton_refusal,
    wants_gradient,
)

WIDEST = 1024  # of a head


@triton.jit
def block_of(
    cos, sin, offset, offsets, tokens, positions, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, OFFSETS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """The tokens of this program and all that their heads share: row of the batch, tokens of the whole batch, positions in
    the row (TOKENS,), channels of half a head, which of them exist, and cos and sin (TOKENS, HALF_BLOCK) in float32.

    A position that passes the tables gives NaN, never a stray read.
    """
    blocks = tl.cdiv(tokens, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    all_tokens = (tl.num_programs(0) // blocks).to(tl.int64) * tokens
    t = (tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, HALF_BLOCK)
    inside = (t < tokens)[:, None] & (channel < HALF)[None, :]
    position = t.to(tl.int64) + offset
    if OFFSETS:
        position += tl.load(offsets + batch)
    known = inside & ((position >= 0) & (position < positions))[:, None]
    where = position[:, None] * HALF + channel[None, :]
    c = tl.load(cos + where, mask=known, other=float("nan")).to(tl.float32)
    s = tl.load(sin + where, mask=known, other=float("nan")).to(tl.float32)
    return batch, all_tokens, t, channel, inside, c, s


@triton.jit
def load_heads(
    x, first, heads, x_batch, x_token, x_head, batch, t, channel, inside, HALF: tl.constexpr, HEADS: tl.constexpr
):
    """Both halves of HEADS heads, as they lie: (x1, x2, x1, x2, …), each (TOKENS, HALF_BLOCK).

    All at once, ahead of any store: after one, the compiler must take a load to depend on it.
    """
    loaded = ()
    for i in tl.static_range(HEADS):
        at = x + batch * x_batch + (first + i) * x_head + (t.to(tl.int64) * x_token)[:, None] + channel[None, :]
        mask = inside & (first + i < heads)
        x1 = tl.load(at, mask=mask, other=0.0)
        loaded = loaded + (x1, tl.load(at + HALF, mask=mask, other=0.0))  # noqa: RUF005
    return loaded


@triton.jit
def forward_heads(
    x, out, rstd, first, heads, x_batch, x_token, x_head, batch, tokens, all_tokens, t, channel, inside, c, s,
    EPS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    loaded = load_heads(x, first, heads, x_batch, x_token, x_head, batch, t, channel, inside, HALF, HEADS)
    for i in tl.static_range(HEADS):
        x1, x2 = loaded[2 * i].to(tl.float32), loaded[2 * i + 1].to(tl.float32)
        o1 = tl.where(inside, x1 * c + x2 * s, 0.0)
        o2 = tl.where(inside, x2 * c - x1 * s, 0.0)
        r = rsqrt(tl.sum(o1 * o1 + o2 * o2, axis=1) / (2 * HALF) + EPS)
        row = (batch * tokens + t) * heads + (first + i)  # (TOKENS,) int64
        to = out + row[:, None] * (2 * HALF) + channel[None, :]
        mask = inside & (first + i < heads)
        tl.store(to, cast(o1 * r[:, None], out.dtype.element_ty), mask=mask)
        tl.store(to + HALF, cast(o2 * r[:, None], out.dtype.element_ty), mask=mask)
        if KEEP:  # a head's numbers side by side: 4 bytes of each token apart would be a memory transaction each
            number = (first + i) * all_tokens + batch * tokens + t
            tl.store(rstd + number, r, mask=(t < tokens) & (first + i < heads))


@triton.jit
def backward_heads(
    dy, y, rstd, dx, first, heads, dy_batch, dy_token, dy_head, batch, tokens, all_tokens, t, channel, inside, c, s,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    grads = load_heads(dy, first, heads, dy_batch, dy_token, dy_head, batch, t, channel, inside, HALF, HEADS)
    y_token = heads * 2 * HALF  # y is contiguous
    normed = load_heads(
        y, first, heads, tokens * y_token, y_token, 2 * HALF, batch, t, channel, inside, HALF, HEADS
    )  # fmt: skip
    for i in tl.static_range(HEADS):
        row = (batch * tokens + t) * heads + (first + i)
        number = (first + i) * all_tokens + batch * tokens + t
        r = tl.load(rstd + number, mask=(t < tokens) & (first + i < heads), other=0.0)
        g1, g2 = grads[2 * i].to(tl.float32), grads[2 * i + 1].to(tl.float32)
        y1, y2 = normed[2 * i].to(tl.float32), normed[2 * i + 1].to(tl.float32)
        along = tl.sum(g1 * y1 + g2 * y2, axis=1) / (2 * HALF)
        o1 = r[:, None] * (g1 - y1 * along[:, None])
        o2 = r[:, None] * (g2 - y2 * along[:, None])
        to = dx + row[:, None] * (2 * HALF) + channel[None, :]
        mask = inside & (first + i < heads)
        tl.store(to, cast(o1 * c - o2 * s, dx.dtype.element_ty), mask=mask)
        tl.store(to + HALF, cast(o1 * s + o2 * c, dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["offset"])
def forward_kernel(
    q, k, q_out, k_out, q_rstd, k_rstd, cos, sin, offset, offsets, tokens, positions, q_heads, k_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    EPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, OFFSETS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    batch, all_tokens, t, channel, inside, c, s = block_of(
        cos, sin, offset, offsets, tokens, positions, HALF, HALF_BLOCK, OFFSETS, TOKENS
    )
    q_programs = tl.cdiv(q_heads, HEADS)
    program = tl.program_id(1).to(tl.int64)
    if program < q_programs:
        forward_heads(q, q_out, q_rstd, program * HEADS, q_heads, q_batch, q_token, q_head,
                      batch, tokens, all_tokens, t, channel, inside, c, s, EPS, HALF, HEADS, KEEP)  # fmt: skip
    else:
        forward_heads(k, k_out, k_rstd, (program - q_programs) * HEADS, k_heads, k_batch, k_token, k_head,
                      batch, tokens, all_tokens, t, channel, inside, c, s, EPS, HALF, HEADS, KEEP)  # fmt: skip


@triton.jit(do_not_specialize=["offset"])
def backward_kernel(
    dq_out, dk_out, q_out, k_out, q_rstd, k_rstd, dq, dk, cos, sin, offset, offsets, tokens, positions, q_heads, k_heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, OFFSETS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    batch, all_tokens, t, channel, inside, c, s = block_of(
        cos, sin, offset, offsets, tokens, positions, HALF, HALF_BLOCK, OFFSETS, TOKENS
    )
    q_programs = tl.cdiv(q_heads, HEADS)
    program = tl.program_id(1).to(tl.int64)
    if program < q_programs:
        backward_heads(dq_out, q_out, q_rstd, dq, program * HEADS, q_heads, q_batch, q_token, q_head,
                       batch, tokens, all_tokens, t, channel, inside, c, s, HALF, HEADS)  # fmt: skip
    else:
        backward_heads(dk_out, k_out, k_rstd, dk, (program - q_programs) * HEADS, k_heads, k_batch, k_token, k_head,
                       batch, tokens, all_tokens, t, channel, inside, c, s, HALF, HEADS)  # fmt: skip


def launch(kernel, name: str, q: Tensor, k: Tensor, tensors: tuple, tables: tuple, parameters, **constants) -> None:
    """Both kernels: q and k give the strides, `tensors` the pointers before the tables, `tables` cos to offsets."""
    batch, tokens, q_heads, width = q.shape
    if not q.numel():
        return
    cos, sin, offset, offsets = tables
    parameters = parameters or launch_parameters(name, q.device, q.dtype, width)
    k_heads = k.size(2)
    # the most heads a program that leave no program with fewer: 6 heads are taken by 3 where the table says 5
    heads = max(n for n in range(1, parameters["HEADS"] + 1) if q_heads % n == k_heads % n == 0)
    grid = (batch * cdiv(tokens, parameters["TOKENS"]), cdiv(q_heads, heads) + cdiv(k_heads, heads))
    kernel[grid](
        *tensors, cos, sin, offset, cos if offsets is None else offsets, tokens, cos.size(0), q_heads, k_heads,
        *q.stride()[:3], *k.stride()[:3], HALF=width // 2, HALF_BLOCK=power_of_2(width // 2),
        OFFSETS=offsets is not None, **constants, **(parameters | {"HEADS": heads}),
    )  # fmt: skip


def rstd_shape(x: Tensor, keep: bool) -> tuple[int, ...]:
    """(H, B, T) for x (B, T, H, D), where it is kept."""
    return (x.size(2), x.size(0), x.size(1)) if keep else (0,)


def side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(q: Tensor, k: Tensor, tables: tuple, keep: bool = True, parameters: dict[str, int] | None = None):
    """q and k turned and normalised, and r of both, which is empty without `keep`."""
    q, k = side_by_side(q), side_by_side(k)
    q_out, k_out = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )
    q_rstd, k_rstd = (torch.empty(rstd_shape(x, keep), dtype=torch.float32, device=x.device) for x in (q, k))
    tensors = (q, k, q_out, k_out, q_rstd, k_rstd)
    launch(forward_kernel, "qk_norm_rope_forward", q, k, tensors, tables, parameters, EPS=EPS, KEEP=keep)
    return q_out, k_out, q_rstd, k_rstd


def launch_backward(
    dq_out: Tensor, dk_out: Tensor, kept: tuple, tables: tuple, parameters: dict[str, int] | None = None
):
    dq_out, dk_out = side_by_side(dq_out), side_by_side(dk_out)
    q_out, k_out, q_rstd, k_rstd = kept
    dq, dk = torch.empty_like(q_out), torch.empty_like(k_out)
    tensors = (dq_out, dk_out, q_out, k_out, q_rstd, k_rstd, dq, dk)
    launch(backward_kernel, "qk_norm_rope_backward", dq_out, dk_out, tensors, tables, parameters)
    return dq, dk


@torch.library.custom_op("nanochat::qk_norm_rope", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int, offsets: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(q, k, (cos, sin, offset, offsets), keep)


@torch.library.custom_op("nanochat::qk_norm_rope_backward", mutates_args=())
def backward_op(
    dq_out: Tensor, dk_out: Tensor, q_out: Tensor, k_out: Tensor, q_rstd: Tensor, k_rstd: Tensor,
    cos: Tensor, sin: Tensor, offset: int, offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_backward(dq_out, dk_out, (q_out, k_out, q_rstd, k_rstd), (cos, sin, offset, offsets))


@traced_as(forward_op)
def _(q, k, cos, sin, offset, offsets, keep):
    rstd = (x.new_empty(rstd_shape(x, keep), dtype=torch.float32) for x in (q, k))
    return q.new_empty(q.shape), k.new_empty(k.shape), *rstd


@traced_as(backward_op)
def _(dq_out, dk_out, q_out, k_out, q_rstd, k_rstd, cos, sin, offset, offsets):
    return torch.empty_like(q_out), torch.empty_like(k_out)


def save(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.offset, offsets, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output, cos, sin, offsets)


def gradient(ctx, dq_out, dk_out, *_):
    *kept, cos, sin, offsets = ctx.saved_tensors
    return *backward_op(dq_out, dk_out, *kept, cos, sin, ctx.offset, offsets), None, None, None, None, None


forward_op.register_autograd(gradient, setup_context=save)


def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor) -> tuple[Tensor, Tensor]:
    offset, offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    return forward_op(q, k, cos.contiguous(), sin.contiguous(), offset, offsets, wants_gradient(q, k))[:2]


def refusal(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor) -> str | None:
    if q.size(3) > WIDEST:
        return f"a head of {q.size(3)} is too wide; the kernel takes {WIDEST}"
    if q.size(0) * q.size(1) > GRID_LIMIT:
        return f"{q.size(0) * q.size(1)} tokens pass the {GRID_LIMIT} that one launch can number; split the batch"
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        return "it gives cos and sin no gradient; detach them"
    return triton_refusal(q)


IMPLEMENTATIONS = {
    "qk_norm_rope": {"triton": Implementation(run, refusal), "reference": Implementation(reference.qk_norm_rope)}
}


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor = 0, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate and normalise q (B, T, H, D) and k (B, T, G, D); the results have their shapes and dtypes.

    cos, sin: (positions, D/2). offset: position of the first token, one integer or one a row (B,); those of a tensor are
    not read here: a position outside the tables is an error of the reference and NaN from the kernel.
    Raises ValueError for an odd D, heads that are no multiple of the key heads, tables that do not match or are too
    short, TypeError for unlike dtypes, and KernelRequestError (a ValueError) when the implementation asked for by name
    cannot serve the call. Repeated calls are bitwise equal.
    """
    check_float("qk_norm_rope", q=q, k=k)
    check_shape("qk_norm_rope", "q", q, "B", "T", "H", "D")
    batch, tokens, heads, width = q.shape
    check_shape("qk_norm_rope", "k", k, batch, tokens, "G", width)
    if width % 2 or width == 0:
        raise ValueError(f"qk_norm_rope: the head width must be even to be rotated in halves, got {width}")
    if k.size(2) == 0 or heads % k.size(2):
        raise ValueError(f"qk_norm_rope: {heads} query heads are no multiple of {k.size(2)} key heads")
    check_float("qk_norm_rope", cos=cos, sin=sin)
    check_shape("qk_norm_rope", "cos", cos, "positions", width // 2)
    check_shape("qk_norm_rope", "sin", sin, *cos.shape)
    check_device("qk_norm_rope", q=q, cos=cos)
    if isinstance(offset, Tensor):
        check_shape("qk_norm_rope", "offset", offset, batch)
        check_device("qk_norm_rope", q=q, offset=offset)
        if offset.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"qk_norm_rope: offset must be int32 or int64, got {offset.dtype}")
    elif offset < 0 or offset + tokens > cos.size(0):
        raise ValueError(
            f"qk_norm_rope: positions {offset} to {offset + tokens - 1} pass the {cos.size(0)} rows of the tables"
        )
    arguments = (q, k, cos, sin, offset)
    return choose("qk_norm_rope", impl, IMPLEMENTATIONS["qk_norm_rope"], *arguments)(*arguments)


def _types(*names: str) -> dict[str, str]:
    pointers = {name: "*fp32" if name.endswith("rstd") else "*T" for name in (*names, "cos", "sin")}
    numbers = (
        "tokens",
        "positions",
        "q_heads",
        "k_heads",
        "q_batch",
        "q_token",
        "q_head",
        "k_batch",
        "k_token",
        "k_head",
    )
    return pointers | {"offset": "i32", "offsets": "*i64"} | {name: "i32" for name in numbers}


def _forward_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    types = _types("q", "k", "q_out", "k_out", "q_rstd", "k_rstd")
    return types, {"EPS": EPS, "HALF": size // 2, "HALF_BLOCK": power_of_2(size // 2), "OFFSETS": False, "KEEP": True}


def _backward_arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
    types = _types("dq_out", "dk_out", "q_out", "k_out", "q_rstd", "k_rstd", "dq", "dk")
    return types, {"HALF": size // 2, "HALF_BLOCK": power_of_2(size // 2), "OFFSETS": False}


def _inputs(size: int, dtype: torch.dtype, device: torch.device):
    q, k = torch.randn(2, 32, 2048, 1280 // size, size, device=device, dtype=dtype)
    angles = torch.randn(2048, size // 2, device=device)
    return q, k, (angles.cos().to(dtype), angles.sin().to(dtype), 0, None)


def _forward_example(size: int, dtype: torch.dtype, device: torch.device):
    q, k, tables = _inputs(size, dtype, device)
    return lambda parameters: launch_forward(q, k, tables, True, parameters)


def _backward_example(size: int, dtype: torch.dtype, device: torch.device):
    q, k, tables = _inputs(size, dtype, device)
    kept = launch_forward(q, k, tables)
    return lambda parameters: launch_backward(q, k, kept, tables, parameters)


HEAD_WIDTHS = (64, 128)
SPACE = tuple(
    {"TOKENS": tokens, "HEADS": heads, "num_warps": warps}
    for tokens, warps in ((4, 1), (8, 1), (8, 2), (16, 2), (16, 4), (32, 4), (32, 8), (64, 8))
    for heads in (1, 2, 5, 10)
    if tokens * heads <= 160
)
KERNELS = (
    Kernel("qk_norm_rope_forward", forward_kernel, HEAD_WIDTHS, DTYPES, SPACE, _forward_arguments, _forward_example),
    Kernel(
        "qk_norm_rope_backward", backward_kernel, HEAD_WIDTHS, DTYPES, SPACE, _backward_arguments, _backward_example
    ),
)
