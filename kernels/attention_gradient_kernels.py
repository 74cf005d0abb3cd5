"""The Triton kernels of attention's backward pass; attention.py explains what they compute, attention_kernels.py the notation.

With x = q·kᵀ·SCALE and lse in units of log 2: p = 2^(x − lse), dp = dout·vᵀ, ds = p·(dp − delta) with delta = ⟨dout, out⟩ − dlse,
dq = ds·k/√D, dk = dsᵀ·q/√D, dv = pᵀ·dout. Dao 2023 (FlashAttention-2).
"""

from nanochat_kernels.attention_kernels import block_and_head, keys_of_row, load_tile, rows_of, sees
from nanochat_kernels.matrix_product import halves
from nanochat_kernels.triton_helpers import LOG2E, cast, dot, exp2, tl, triton


@triton.jit
def store_gradient(
    ptr, gradient, y, row, mask, head, row_heads, rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr, sums_ptr, position, all_rows,
    EPS: tl.constexpr, PROJECTED: tl.constexpr, NORMED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the gradient of head number `head` of the row_heads heads of each row (int64).

    With PROJECTED it becomes rstd·dz, where y is the head that qkv_projection made of z: QK-norm and rotation are undone if NORMED.
    The head's part of ⟨dz, z⟩ goes to sums (row_heads, all_rows). See qkv_projection_kernels.qkv_backward_kernel.
    """
    if PROJECTED:
        y = y.to(tl.float32)
        product = tl.sum(gradient * y, 1)
        factor = tl.load(rstd_ptr + row, mask=mask, other=0.0)
        if NORMED:
            head_rstd = tl.load(head_rstd_ptr + tl.cast(head, tl.int64) * all_rows + row, mask=mask, other=0.0)
            factor *= head_rstd
            gradient = (gradient - y * (product / WIDTH)[:, None]) * factor[:, None]
            product *= EPS * head_rstd * head_rstd
            HALF: tl.constexpr = WIDTH // 2
            g1, g2 = halves(gradient)
            table = tl.cast(position, tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
            c = tl.load(cos_ptr + table, mask=mask[:, None], other=0.0).to(tl.float32)
            s = tl.load(sin_ptr + table, mask=mask[:, None], other=0.0).to(tl.float32)
            turned = tl.permute(tl.join(g1 * c - g2 * s, g1 * s + g2 * c), [0, 2, 1])
            gradient = tl.reshape(turned, gradient.shape)
        else:
            gradient *= factor[:, None]
        tl.store(sums_ptr + tl.cast(head, tl.int64) * all_rows + row, product, mask=mask)
    ptr += (row * row_heads + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr, cast(gradient, ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def query_gradient_block(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, position, keys, first_key,
    SCALE: tl.constexpr, STARTS: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what a block of keys gives to √D·dq."""
    k = load_tile(k_ptr + tl.cast(start, tl.int64) * k_stride, k_stride, keys - start, BLOCK_N, WIDTH, MASKED)
    v = load_tile(v_ptr + tl.cast(start, tl.int64) * v_stride, v_stride, keys - start, BLOCK_N, WIDTH, MASKED)
    x = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    dp = dot(dout, tl.trans(v), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    ds = exp2(x * SCALE - lse[:, None]) * (dp - delta[:, None])
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        seen = sees(position, key, first_key, STARTS)
        ds = tl.where(seen, ds, 0.0)
    return dot(cast(ds, k_ptr.dtype.element_ty), k, dq)


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, lengths_ptr, starts_ptr, rstd_ptr, head_rstd_ptr, cos_ptr,
    sin_ptr, dq_ptr, delta_ptr, sums_ptr, lengths_stride, tokens, all_keys, heads, share, rows, row_heads, offset,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, d_batch_stride, d_token_stride, d_head_stride,
    SCALE: tl.constexpr, ROOT: tl.constexpr, EPS: tl.constexpr, DLSE: tl.constexpr, LENGTHS: tl.constexpr,
    STARTS: tl.constexpr, PROJECTED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute dq of BLOCK_M queries of a head, and delta = ⟨dout, out⟩ − dlse, which key_gradients_kernel needs."""
    block, head = block_and_head(tl.cdiv(tokens, BLOCK_M), rows * heads, GROUP)
    first_query = (tl.cdiv(tokens, BLOCK_M) - 1 - block) * BLOCK_M
    keys = keys_of_row(lengths_ptr, lengths_stride, head // heads, all_keys, LENGTHS)
    queries_before = keys - tokens
    t = first_query + tl.arange(0, BLOCK_M)
    position = t + queries_before
    known = t < tokens
    zero = tl.cast(0, tl.int32)
    q_ptr = rows_of(q_ptr, head, heads, q_batch_stride, q_token_stride, q_head_stride, first_query)
    dout_ptr = rows_of(dout_ptr, head, heads, d_batch_stride, d_token_stride, d_head_stride, first_query)
    out_stride = heads * WIDTH
    out_ptr = rows_of(out_ptr, head, heads, tl.cast(tokens, tl.int64) * out_stride, out_stride, WIDTH, first_query)
    k_ptr = rows_of(k_ptr, head // share, heads // share, k_batch_stride, k_token_stride, k_head_stride, zero)
    v_ptr = rows_of(v_ptr, head // share, heads // share, v_batch_stride, v_token_stride, v_head_stride, zero)
    q = load_tile(q_ptr, q_token_stride, tokens - first_query, BLOCK_M, WIDTH, True)
    dout = load_tile(dout_ptr, d_token_stride, tokens - first_query, BLOCK_M, WIDTH, True)
    out = load_tile(out_ptr, out_stride, tokens - first_query, BLOCK_M, WIDTH, True)
    statistic = tl.cast(head, tl.int64) * tokens + t
    lse = tl.load(lse_ptr + statistic, mask=known, other=float("inf")) * LOG2E
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + statistic, mask=known, other=0.0)
    tl.store(delta_ptr + statistic, delta, mask=known)
    first_key = tl.zeros([BLOCK_M], tl.int32)
    begin = zero
    row = tl.cast(head // heads, tl.int64) * tokens + t
    if STARTS:
        first_key = tl.load(starts_ptr + row, mask=known, other=0)
        begin = tl.load(starts_ptr + (tl.cast(head // heads, tl.int64) * tokens + first_query))
    end = tl.minimum(first_query + BLOCK_M + queries_before, keys)
    whole_end = begin if STARTS else tl.maximum(first_query + queries_before + 1, 0) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in tl.range(begin, whole_end, BLOCK_N):
        dq = query_gradient_block(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_token_stride, v_token_stride, start, position, keys, first_key,
            SCALE, STARTS, BLOCK_N, WIDTH, False,
        )  # fmt: skip
    for start in tl.range(whole_end, end, BLOCK_N):
        dq = query_gradient_block(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_token_stride, v_token_stride, start, position, keys, first_key,
            SCALE, STARTS, BLOCK_N, WIDTH, True,
        )  # fmt: skip
    store_gradient(
        dq_ptr, dq * ROOT, q, row, known, head % heads, row_heads, rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr, sums_ptr,
        t + offset, tl.cast(rows, tl.int64) * tokens, EPS, PROJECTED, True, WIDTH,
    )  # fmt: skip


@triton.jit
def key_gradients_block(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_stride, dout_stride, start, tokens, key, queries_before, end_query,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries of one head gives to √D·dk and dv."""
    t = start + tl.arange(0, BLOCK_M)
    statistics = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr + tl.cast(start, tl.int64) * q_stride, q_stride, tokens - start, BLOCK_M, WIDTH, True)
    # the probabilities of queries after the last one are 0, because their lse is infinite
    lse = tl.load(lse_ptr + statistics, mask=t < tokens, other=float("inf")) * LOG2E
    x = dot(k, tl.trans(q), tl.zeros([k.shape[0], BLOCK_M], tl.float32))
    p = exp2(x * SCALE - lse[None, :])
    if MASKED:
        seen = (key[:, None] <= (t + queries_before)[None, :]) & (t[None, :] < end_query[:, None])
        p = tl.where(seen, p, 0.0)
    dout = load_tile(
        dout_ptr + tl.cast(start, tl.int64) * dout_stride, dout_stride, tokens - start, BLOCK_M, WIDTH, True
    )
    dv = dot(cast(p, dout_ptr.dtype.element_ty), dout, dv)
    dp = dot(v, tl.trans(dout), tl.zeros([k.shape[0], BLOCK_M], tl.float32))
    delta = tl.load(delta_ptr + statistics, mask=t < tokens, other=0.0)
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(seen, ds, 0.0)  # also where dp is not finite
    return dot(cast(ds, q_ptr.dtype.element_ty), q, dk), dv


@triton.jit
def key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, lengths_ptr, ends_ptr, rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr,
    dk_ptr, dv_ptr, sums_ptr, lengths_stride, tokens, all_keys, heads, share, rows, row_heads, first_head, offset,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, d_batch_stride, d_token_stride, d_head_stride,
    SCALE: tl.constexpr, ROOT: tl.constexpr, EPS: tl.constexpr, LENGTHS: tl.constexpr, ENDS: tl.constexpr,
    PROJECTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of BLOCK_N keys of a key/value head, summed over the `share` query heads that read it.

    first_head: the number of the first key head among the row_heads heads of a row of dk; that of dv follows the key heads.
    """
    groups = heads // share
    block, group = block_and_head(tl.cdiv(all_keys, BLOCK_N), rows * groups, GROUP)
    first_key = block * BLOCK_N  # the first keys are seen by the most queries
    batch = group // groups
    keys = keys_of_row(lengths_ptr, lengths_stride, batch, all_keys, LENGTHS)
    queries_before = keys - tokens
    key = first_key + tl.arange(0, BLOCK_N)
    known = key < all_keys
    k_ptr = rows_of(k_ptr, group, groups, k_batch_stride, k_token_stride, k_head_stride, first_key)
    v_ptr = rows_of(v_ptr, group, groups, v_batch_stride, v_token_stride, v_head_stride, first_key)
    k = load_tile(k_ptr, k_token_stride, keys - first_key, BLOCK_N, WIDTH, True)
    v = load_tile(v_ptr, v_token_stride, keys - first_key, BLOCK_N, WIDTH, True)
    begin = tl.maximum(first_key - queries_before, 0)  # behind the last query for keys that are not valid
    end = tokens
    end_query = tl.full([BLOCK_N], 2147483647, tl.int32)
    if ENDS:
        row = tl.cast(batch, tl.int64) * tokens
        end_query = tl.load(ends_ptr + (row + key), mask=known, other=0)
        end = tl.load(ends_ptr + (row + tl.minimum(first_key + BLOCK_N, tokens) - 1))
        whole_begin = end
    else:
        # from this query on, all see the whole block
        whole_begin = (
            begin + tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - queries_before - begin, 0), BLOCK_M) * BLOCK_M
        )
        whole_begin = tl.minimum(whole_begin, end)
    zero = tl.cast(0, tl.int32)
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for i in tl.range(0, share):
        head = group * share + i
        q_head_ptr = rows_of(q_ptr, head, heads, q_batch_stride, q_token_stride, q_head_stride, zero)
        dout_head_ptr = rows_of(dout_ptr, head, heads, d_batch_stride, d_token_stride, d_head_stride, zero)
        statistics = tl.cast(head, tl.int64) * tokens
        for start in tl.range(begin, whole_begin, BLOCK_M):
            dk, dv = key_gradients_block(
                dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_ptr + statistics, delta_ptr + statistics, q_token_stride,
                d_token_stride, start, tokens, key, queries_before, end_query, SCALE, BLOCK_M, WIDTH, True,
            )  # fmt: skip
        for start in tl.range(whole_begin, end, BLOCK_M):
            dk, dv = key_gradients_block(
                dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_ptr + statistics, delta_ptr + statistics, q_token_stride,
                d_token_stride, start, tokens, key, queries_before, end_query, SCALE, BLOCK_M, WIDTH, False,
            )  # fmt: skip
    row = tl.cast(batch, tl.int64) * all_keys + key
    all_rows = tl.cast(rows, tl.int64) * all_keys
    number = first_head + group % groups
    store_gradient(
        dk_ptr, dk * ROOT, k, row, known, number, row_heads, rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr, sums_ptr,
        key + offset, all_rows, EPS, PROJECTED, True, WIDTH,
    )  # fmt: skip
    store_gradient(
        dv_ptr, dv, v, row, known, number + groups if PROJECTED else number, row_heads, rstd_ptr, head_rstd_ptr, cos_ptr,
        sin_ptr, sums_ptr, key + offset, all_rows, EPS, PROJECTED, False, WIDTH,
    )  # fmt: skip
