"""The epilogue and the backward kernel of qkv_projection.py, which explains what they compute."""

from math import gcd

import torch
from torch import Tensor

from nanochat_kernels import hopper_product
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.folded_norm import finish
from nanochat_kernels.hopper_product import gl, gluon
from nanochat_kernels.matrix_product import Epilogue, halves, load_rows, store_block
from nanochat_kernels.qk_norm_rope_kernels import load_heads, load_positions
from nanochat_kernels.reference import EPS
from nanochat_kernels.triton_helpers import cast, cdiv, launch, rsqrt, tl, triton


@triton.jit
def qkv_epilogue(
    sums, out_ptr, out_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store one head of the rows: scaled by rstd and, if it is a query's or a key's, rotated, normed, and its own rstd kept.

    The heads of queries and keys are those before column `normed`. A position outside the tables gives NaN.
    """
    rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr, offsets_ptr, offsets_stride, offset, tokens, positions, normed, EPS = (
        arguments
    )
    HALF: tl.constexpr = sums.shape[1] // 2
    x1, x2 = halves(sums)
    factor = load_rows(rstd_ptr, row, m, sums.shape[0])
    if column < normed:
        r = row + tl.arange(0, sums.shape[0])
        position = (r % tokens).to(tl.int64) + offset
        if offsets_stride is not None:
            position += tl.load(offsets_ptr + (r // tokens).to(tl.int64) * offsets_stride, mask=r < m, other=0)
        known = (position >= 0) & (position < positions)
        table = position[:, None] * HALF + tl.arange(0, HALF)[None, :]
        c = tl.load(cos_ptr + table, mask=known[:, None], other=float("nan")).to(tl.float32)
        s = tl.load(sin_ptr + table, mask=known[:, None], other=float("nan")).to(tl.float32)
        o1, o2 = x1 * c + x2 * s, x2 * c - x1 * s
        squares = tl.sum(o1 * o1 + o2 * o2, axis=1) * factor * factor
        head_rstd = rsqrt(squares / (2 * HALF) + EPS)
        tl.store(head_rstd_ptr + tl.cast(column // (2 * HALF), tl.int64) * m + r, head_rstd, mask=r < m)
        x1, x2, factor = o1, o2, factor * head_rstd
    head = tl.permute(tl.join(x1 * factor[:, None], x2 * factor[:, None]), [0, 2, 1])
    store_block(out_ptr, out_stride, tl.reshape(head, [sums.shape[0], 2 * HALF]), row, column, m, n, WHOLE)


@gluon.jit
def qkv_on_hopper(sums, out_desc, first, second, arguments, row, column, m, n):
    """qkv_epilogue for hopper_product.py. Without cos, `first` has the rows' cos in its left half and sin in its right half."""
    rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr, offsets_ptr, offsets_stride, offset, tokens, positions, normed, EPS = (
        arguments
    )
    HALF: gl.constexpr = sums.shape[1] // 2
    x1, x2 = hopper_product.halves(sums)
    factor = hopper_product.load_rows(rstd_ptr, x1, row, m)
    if column < normed:
        r = hopper_product.row_numbers(x1, row)
        if cos_ptr is None:
            c = first.slice(0, HALF, dim=1).load(x1.type.layout).to(gl.float32)
            s = first.slice(HALF, HALF, dim=1).load(x1.type.layout).to(gl.float32)
        else:
            position = (r % tokens).to(gl.int64) + offset
            if offsets_stride is not None:
                position += gl.load(offsets_ptr + (r // tokens).to(gl.int64) * offsets_stride, mask=r < m, other=0)
            known = (position >= 0) & (position < positions)
            table = position[:, None] * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, x1.type.layout))[None, :]
            c = gl.load(cos_ptr + table, mask=known[:, None], other=float("nan")).to(gl.float32)
            s = gl.load(sin_ptr + table, mask=known[:, None], other=float("nan")).to(gl.float32)
        o1, o2 = x1 * c + x2 * s, x2 * c - x1 * s
        squares = gl.sum(o1 * o1 + o2 * o2, axis=1) * factor * factor
        head_rstd = 1.0 / gl.sqrt(squares / (2 * HALF) + EPS)
        gl.store(head_rstd_ptr + (column // (2 * HALF)).to(gl.int64) * m + r, head_rstd, mask=r < m)
        x1, x2, factor = o1, o2, factor * head_rstd
    first.slice(0, HALF, dim=1).store((x1 * factor[:, None]).to(out_desc.dtype))
    first.slice(HALF, HALF, dim=1).store((x2 * factor[:, None]).to(out_desc.dtype))
    hopper_product.store_memory(out_desc, first, row, column)


QKV = Epilogue(qkv_epilogue, qkv_on_hopper)


@triton.jit(do_not_specialize=["offset"])
def qkv_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr, offsets_ptr, dz_ptr, sums_ptr,
    offset, offsets_stride, tokens, positions, q_heads, k_heads,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    EPS: tl.constexpr, HALF: tl.constexpr, OFFSETS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compute rstd·dz for HEADS heads of TOKENS tokens, of q, of k or of v, and their part of each row's ⟨dz, z⟩."""
    batch, all_tokens, t, channel, mask, c, s = load_positions(
        cos_ptr, sin_ptr, offset, offsets_ptr, offsets_stride, tokens, positions, HALF, HALF, OFFSETS, TOKENS
    )
    q_programs, k_programs = q_heads // HEADS, k_heads // HEADS
    program = tl.program_id(1).to(tl.int64)
    row_width = (q_heads + 2 * k_heads) * 2 * HALF
    first = program * HEADS  # number of the first head among all heads of a row
    if program < q_programs:
        gradients = load_heads(
            dq_ptr, first, q_heads, q_batch_stride, q_token_stride, q_head_stride, batch, t, channel, mask, HALF, HEADS
        )
    elif program < q_programs + k_programs:
        gradients = load_heads(
            dk_ptr, first - q_heads, k_heads, k_batch_stride, k_token_stride, k_head_stride, batch, t, channel, mask,
            HALF, HEADS,
        )  # fmt: skip
    else:
        gradients = load_heads(
            dv_ptr, first - q_heads - k_heads, k_heads, v_batch_stride, v_token_stride, v_head_stride, batch, t,
            channel, mask, HALF, HEADS,
        )  # fmt: skip
    row = batch * tokens + t  # (TOKENS,) int64
    results = load_heads(
        qkv_ptr, first, q_heads + 2 * k_heads, tl.cast(tokens, tl.int64) * row_width, row_width, 2 * HALF, batch, t, channel,
        mask, HALF, HEADS,
    )  # fmt: skip
    rstd = tl.load(rstd_ptr + row, mask=t < tokens, other=0.0)
    is_normed = program < q_programs + k_programs
    total = tl.zeros([TOKENS], tl.float32)
    for i in tl.static_range(HEADS):
        g1, g2 = gradients[2 * i].to(tl.float32), gradients[2 * i + 1].to(tl.float32)
        y1, y2 = results[2 * i].to(tl.float32), results[2 * i + 1].to(tl.float32)
        dot = tl.sum(g1 * y1 + g2 * y2, axis=1)
        kept = head_rstd_ptr + (first + i) * all_tokens + row
        head_rstd = tl.load(kept, mask=(t < tokens) & is_normed, other=1.0)
        # a normed head is orthogonal to its gradient but for eps; a value is not
        total += dot * tl.where(is_normed, EPS * head_rstd * head_rstd, 1.0)
        projection, factor = (dot / (2 * HALF))[:, None], (rstd * head_rstd)[:, None]
        o1, o2 = factor * (g1 - y1 * projection), factor * (g2 - y2 * projection)
        x1 = tl.where(is_normed, o1 * c - o2 * s, factor * g1)
        x2 = tl.where(is_normed, o1 * s + o2 * c, factor * g2)
        ptr = dz_ptr + row[:, None] * row_width + (first + i) * (2 * HALF) + channel[None, :]
        tl.store(ptr, cast(x1, dz_ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + HALF, cast(x2, dz_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + program * all_tokens + row, total, mask=t < tokens)


def product_gradient(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, rstd: Tensor, head_rstd: Tensor, cos: Tensor, sin: Tensor,
    offset: int, offsets: Tensor | None, width: int, parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of x·weightᵀ (N, (H + 2G)·D) and the coefficient of x in norm's derivative (N,); width: C."""
    batch, tokens, heads, head_width = dq.shape
    dz = torch.empty(batch * tokens, qkv.size(2) * head_width, dtype=qkv.dtype, device=qkv.device)
    gradients = [x if x.stride(3) == 1 or head_width == 1 else x.contiguous() for x in (dq, dk, dv)]
    parameters = dict(parameters or launch_parameters("qkv_backward", qkv.device, qkv.dtype, (head_width,)))
    # the same number of heads for every program, none of them both of q and of k
    most = gcd(heads, dk.size(2))
    parameters["HEADS"] = max(n for n in range(1, parameters["HEADS"] + 1) if most % n == 0)
    programs = qkv.size(2) // parameters["HEADS"]
    sums = torch.empty(programs, batch * tokens, dtype=torch.float32, device=qkv.device)
    if dz.numel():
        launch(
            qkv_backward_kernel, (batch * cdiv(tokens, parameters["TOKENS"]), programs), qkv.device,
            *gradients, qkv, rstd, head_rstd, cos, sin, rstd if offsets is None else offsets, dz, sums,
            offset, 0 if offsets is None else offsets.stride(0), tokens, cos.size(0), heads, dk.size(2),
            *[stride for x in gradients for stride in x.stride()[:3]],
            EPS=EPS, HALF=head_width // 2, OFFSETS=offsets is not None, **parameters,
        )  # fmt: skip
    return dz, finish(sums, width, rstd)
