"""The Triton kernels of qk_norm_rope.py, which explains what they compute.

A program computes HEADS heads of TOKENS tokens, either of q or of k.
"""

from nanochat_kernels.triton_helpers import cast, rsqrt, tl, triton


@triton.jit
def load_positions(
    cos_ptr, sin_ptr, offset, offsets_ptr, offsets_stride, tokens, positions,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, OFFSETS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Load what all heads of this program's tokens share.

    Returns the row of the batch, the number of tokens in the batch, the tokens' indices in the row (TOKENS,), the channels of half
    a head (HALF_BLOCK,), the mask of tokens and channels, and cos and sin in float32 under that mask. A position outside the
    tables gives NaN without an access outside them.
    """
    blocks = tl.cdiv(tokens, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    all_tokens = (tl.num_programs(0) // blocks).to(tl.int64) * tokens
    t = (tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, HALF_BLOCK)
    mask = (t < tokens)[:, None] & (channel < HALF)[None, :]
    position = t.to(tl.int64) + offset
    if OFFSETS:
        position += tl.load(offsets_ptr + batch * offsets_stride)
    known = mask & ((position >= 0) & (position < positions))[:, None]
    table_offsets = position[:, None] * HALF + channel[None, :]
    c = tl.load(cos_ptr + table_offsets, mask=known, other=float("nan")).to(tl.float32)
    s = tl.load(sin_ptr + table_offsets, mask=known, other=float("nan")).to(tl.float32)
    return batch, all_tokens, t, channel, mask, c, s


@triton.jit
def load_heads(
    x_ptr, first, heads, batch_stride, token_stride, head_stride, batch, t, channel, mask,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Load both halves of HEADS heads in their own dtype: (x1, x2, x1, x2, …), each (TOKENS, HALF_BLOCK).

    All loads come before any store, because the compiler must assume that a load after a store depends on the store.
    """
    loaded = ()
    row_ptr = x_ptr + batch * batch_stride
    for i in tl.static_range(HEADS):
        ptr = row_ptr + (first + i) * head_stride + (t.to(tl.int64) * token_stride)[:, None] + channel[None, :]
        head_mask = mask & (first + i < heads)
        x1 = tl.load(ptr, mask=head_mask, other=0.0)
        loaded = loaded + (x1, tl.load(ptr + HALF, mask=head_mask, other=0.0))  # noqa: RUF005
    return loaded


@triton.jit
def forward_heads(
    x_ptr, y_ptr, rstd_ptr, first, heads, batch_stride, token_stride, head_stride,
    batch, tokens, all_tokens, t, channel, mask, c, s,
    EPS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KEEP_RSTD: tl.constexpr,
):  # fmt: skip
    loaded = load_heads(
        x_ptr, first, heads, batch_stride, token_stride, head_stride, batch, t, channel, mask, HALF, HEADS
    )  # fmt: skip
    for i in tl.static_range(HEADS):
        x1, x2 = loaded[2 * i].to(tl.float32), loaded[2 * i + 1].to(tl.float32)
        o1 = tl.where(mask, x1 * c + x2 * s, 0.0)
        o2 = tl.where(mask, x2 * c - x1 * s, 0.0)
        r = rsqrt(tl.sum(o1 * o1 + o2 * o2, axis=1) / (2 * HALF) + EPS)
        row = (batch * tokens + t) * heads + (first + i)  # (TOKENS,) int64
        ptr = y_ptr + row[:, None] * (2 * HALF) + channel[None, :]
        head_mask = mask & (first + i < heads)
        tl.store(ptr, cast(o1 * r[:, None], y_ptr.dtype.element_ty), mask=head_mask)
        tl.store(ptr + HALF, cast(o2 * r[:, None], y_ptr.dtype.element_ty), mask=head_mask)
        if (
            KEEP_RSTD
        ):  # stored as (H, B, T): in y's order the 4 bytes of each token would take a memory transaction of their own
            offsets = (first + i) * all_tokens + batch * tokens + t
            tl.store(rstd_ptr + offsets, r, mask=(t < tokens) & (first + i < heads))


@triton.jit
def backward_heads(
    dy_ptr, y_ptr, rstd_ptr, dx_ptr, first, heads, batch_stride, token_stride, head_stride,
    batch, tokens, all_tokens, t, channel, mask, c, s, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    gradients = load_heads(
        dy_ptr, first, heads, batch_stride, token_stride, head_stride, batch, t, channel, mask, HALF, HEADS
    )  # fmt: skip
    normed = load_heads(
        y_ptr + batch * tokens * heads * (2 * HALF), first, heads, 0, heads * 2 * HALF, 2 * HALF,
        batch, t, channel, mask, HALF, HEADS,
    )  # fmt: skip
    for i in tl.static_range(HEADS):
        row = (batch * tokens + t) * heads + (first + i)  # (TOKENS,) int64
        offsets = (first + i) * all_tokens + batch * tokens + t
        r = tl.load(rstd_ptr + offsets, mask=(t < tokens) & (first + i < heads), other=0.0)
        g1, g2 = gradients[2 * i].to(tl.float32), gradients[2 * i + 1].to(tl.float32)
        y1, y2 = normed[2 * i].to(tl.float32), normed[2 * i + 1].to(tl.float32)
        projection = tl.sum(g1 * y1 + g2 * y2, axis=1) / (2 * HALF)
        o1 = r[:, None] * (g1 - y1 * projection[:, None])
        o2 = r[:, None] * (g2 - y2 * projection[:, None])
        ptr = dx_ptr + row[:, None] * (2 * HALF) + channel[None, :]
        head_mask = mask & (first + i < heads)
        tl.store(ptr, cast(o1 * c - o2 * s, dx_ptr.dtype.element_ty), mask=head_mask)
        tl.store(ptr + HALF, cast(o1 * s + o2 * c, dx_ptr.dtype.element_ty), mask=head_mask)


@triton.jit(do_not_specialize=["offset"])
def forward_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, offsets_ptr, q_out_ptr, k_out_ptr, q_rstd_ptr, k_rstd_ptr,
    offset, offsets_stride, tokens, positions, q_heads, k_heads,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    EPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, OFFSETS: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEEP_RSTD: tl.constexpr,
):  # fmt: skip
    batch, all_tokens, t, channel, mask, c, s = load_positions(
        cos_ptr, sin_ptr, offset, offsets_ptr, offsets_stride, tokens, positions, HALF, HALF_BLOCK, OFFSETS, TOKENS
    )
    q_programs = tl.cdiv(q_heads, HEADS)
    program = tl.program_id(1).to(tl.int64)
    if program < q_programs:
        forward_heads(
            q_ptr, q_out_ptr, q_rstd_ptr, program * HEADS, q_heads, q_batch_stride, q_token_stride, q_head_stride,
            batch, tokens, all_tokens, t, channel, mask, c, s, EPS, HALF, HEADS, KEEP_RSTD,
        )  # fmt: skip
    else:
        forward_heads(
            k_ptr, k_out_ptr, k_rstd_ptr, (program - q_programs) * HEADS, k_heads,
            k_batch_stride, k_token_stride, k_head_stride,
            batch, tokens, all_tokens, t, channel, mask, c, s, EPS, HALF, HEADS, KEEP_RSTD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["offset"])
def backward_kernel(
    q_out_ptr, k_out_ptr, dq_out_ptr, dk_out_ptr, q_rstd_ptr, k_rstd_ptr, cos_ptr, sin_ptr, offsets_ptr, dq_ptr, dk_ptr,
    offset, offsets_stride, tokens, positions, q_heads, k_heads,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, OFFSETS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The strides are those of dq_out and dk_out."""
    batch, all_tokens, t, channel, mask, c, s = load_positions(
        cos_ptr, sin_ptr, offset, offsets_ptr, offsets_stride, tokens, positions, HALF, HALF_BLOCK, OFFSETS, TOKENS
    )
    q_programs = tl.cdiv(q_heads, HEADS)
    program = tl.program_id(1).to(tl.int64)
    if program < q_programs:
        backward_heads(
            dq_out_ptr, q_out_ptr, q_rstd_ptr, dq_ptr, program * HEADS, q_heads,
            q_batch_stride, q_token_stride, q_head_stride,
            batch, tokens, all_tokens, t, channel, mask, c, s, HALF, HEADS,
        )  # fmt: skip
    else:
        backward_heads(
            dk_out_ptr, k_out_ptr, k_rstd_ptr, dk_ptr, (program - q_programs) * HEADS, k_heads,
            k_batch_stride, k_token_stride, k_head_stride,
            batch, tokens, all_tokens, t, channel, mask, c, s, HALF, HEADS,
        )  # fmt: skip
