"""The Triton kernels of attention's forward pass; attention.py explains what they compute.

A program computes a block of BLOCK_M queries of one head, or a part of the keys of one key/value head. Scores are in units of log 2:
x = q·kᵀ·SCALE with SCALE = log₂e/√D, so that a probability is one exp2. `queries_before` is the number of keys in front of the
first query: query t stands at position t + queries_before among the keys, and attends to the keys up to its position.
"""

from nanochat_kernels.triton_helpers import LN2, cast, dot, exp2, round_both, tl, triton


@triton.jit
def block_and_head(blocks, heads, GROUP: tl.constexpr):
    """Return the number of this program's block, counted from the one with the most work, and of its head among those of all rows.

    GROUP heads at a time are worked on together, all their heaviest blocks first: few enough that what they read stays in the cache.
    """
    program = tl.program_id(0)
    group = program // (GROUP * blocks)
    first = group * GROUP
    size = tl.minimum(heads - first, GROUP)
    within = program % (GROUP * blocks)
    return within // size, first + within % size


@triton.jit
def rows_of(ptr, head, heads, batch_stride, token_stride, head_stride, start):
    """Return the address of token `start` of a head, numbered among the heads of all rows of the batch."""
    batch = tl.cast(head // heads, tl.int64)
    return (
        ptr
        + batch * batch_stride
        + tl.cast(head % heads, tl.int64) * head_stride
        + tl.cast(start, tl.int64) * token_stride
    )


@triton.jit
def load_tile(ptr, token_stride, tokens, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Load ROWS rows from an address on (ROWS, WIDTH); with MASKED, rows from number `tokens` on are 0."""
    row = tl.arange(0, ROWS)
    offsets = row[:, None] * token_stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(ptr + offsets, mask=row[:, None] < tokens, other=0.0)
    return tl.load(ptr + offsets)


@triton.jit
def keys_of_row(lengths_ptr, lengths_stride, batch, keys, LENGTHS: tl.constexpr):
    """Return the number of valid keys of a row of the batch."""
    if LENGTHS:
        length = tl.load(lengths_ptr + tl.cast(batch, tl.int64) * lengths_stride)
        keys = tl.minimum(tl.maximum(length, 0), keys).to(tl.int32)
    return keys


@triton.jit
def in_page(ptr, page_ptr, start, page_stride, token_stride, PAGE: tl.constexpr):
    """Return the address from which on token `start` is counted, in the page that the row's table at page_ptr names for it.

    Without pages (0) all tokens of the row lie behind `ptr`.
    """
    if PAGE:
        number = start // PAGE
        page = tl.load(page_ptr + tl.cast(number, tl.int64)).to(tl.int64)
        ptr += page * page_stride - tl.cast(number * PAGE, tl.int64) * token_stride
    return ptr


@triton.jit
def sees(position, key, first_key, STARTS: tl.constexpr):
    """Return which keys (N,) each query (M,) sees: those up to its position, and with STARTS from first_key (M,) on."""
    before = position[:, None] - key[None, :]
    if STARTS:  # a negative number is a large one without its sign
        return before.to(tl.uint32, bitcast=True) <= (position - first_key).to(tl.uint32, bitcast=True)[:, None]
    return before >= 0


@triton.jit
def forward_block(
    sums, total, rounded, highest, q, k_ptr, v_ptr, k_stride, v_stride, start, position, keys, first_key,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, BOUNDED: tl.constexpr, KEEP_LSE: tl.constexpr, STARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the sums (BLOCK_M, WIDTH) of p·v, of p (BLOCK_M,) and of p rounded as the product takes it.

    BOUNDED: p = 2^(x − SHIFT). Otherwise p = 2^(x − highest), and what was summed before is scaled when `highest` grows.
    """
    k = load_tile(k_ptr + tl.cast(start, tl.int64) * k_stride, k_stride, keys - start, BLOCK_N, WIDTH, MASKED)
    x = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        seen = sees(position, key, first_key, STARTS)
    if BOUNDED:
        p = exp2(x * SCALE - SHIFT)
        if MASKED:
            p = tl.where(seen, p, 0.0)
    else:
        if MASKED:
            x = tl.where(seen, x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 1) * SCALE)
        # before the first key that is seen, and where all scores are −inf
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        p = exp2(x * SCALE - reference[:, None])
        factor = exp2(highest - reference)
        sums, total, rounded, highest = sums * factor[:, None], total * factor, rounded * factor, higher
    p_rounded, as_float = round_both(p, v_ptr.dtype.element_ty)
    rounded += tl.sum(as_float, 1)
    if KEEP_LSE:
        total += tl.sum(p, 1)
    v = load_tile(v_ptr + tl.cast(start, tl.int64) * v_stride, v_stride, keys - start, BLOCK_N, WIDTH, MASKED)
    return dot(p_rounded, v, sums), total, rounded, highest


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, starts_ptr, pages_ptr, out_ptr, lse_ptr, lengths_stride, tokens, all_keys, heads,
    share, rows,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BOUNDED: tl.constexpr, KEEP_LSE: tl.constexpr,
    LENGTHS: tl.constexpr, STARTS: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute the attention of BLOCK_M queries of a head, and the logarithm of their sums.

    With BOUNDED a sum below LEAST for each key, or above MOST, shows that scores exceed the bound: such a row becomes NaN.
    PAGE: the tokens of a page of keys, of which a row's table has all_keys // PAGE, or 0.
    """
    block, head = block_and_head(tl.cdiv(tokens, BLOCK_M), rows * heads, GROUP)
    first_query = (tl.cdiv(tokens, BLOCK_M) - 1 - block) * BLOCK_M  # the last queries see the most keys
    keys = keys_of_row(lengths_ptr, lengths_stride, head // heads, all_keys, LENGTHS)
    queries_before = keys - tokens
    t = first_query + tl.arange(0, BLOCK_M)
    position = t + queries_before
    q_ptr = rows_of(q_ptr, head, heads, q_batch_stride, q_token_stride, q_head_stride, first_query)
    zero = tl.cast(0, tl.int32)
    k_row_stride = 0 if PAGE else k_batch_stride
    v_row_stride = 0 if PAGE else v_batch_stride
    k_ptr = rows_of(k_ptr, head // share, heads // share, k_row_stride, k_token_stride, k_head_stride, zero)
    v_ptr = rows_of(v_ptr, head // share, heads // share, v_row_stride, v_token_stride, v_head_stride, zero)
    if PAGE:
        pages_ptr += tl.cast(head // heads, tl.int64) * (all_keys // PAGE)
    q = load_tile(q_ptr, q_token_stride, tokens - first_query, BLOCK_M, WIDTH, True)
    first_key = tl.zeros([BLOCK_M], tl.int32)
    begin = zero
    if STARTS:
        row = tl.cast(head // heads, tl.int64) * tokens
        first_key = tl.load(starts_ptr + (row + t), mask=t < tokens, other=0)
        begin = tl.load(starts_ptr + (row + first_query))
    end = tl.minimum(first_query + BLOCK_M + queries_before, keys)
    # the blocks before this one are seen whole by every query of the block
    whole_end = begin if STARTS else tl.maximum(first_query + queries_before + 1, 0) // BLOCK_N * BLOCK_N
    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    rounded = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in tl.range(begin, whole_end, BLOCK_N):
        k_block_ptr = in_page(k_ptr, pages_ptr, start, k_batch_stride, k_token_stride, PAGE)
        v_block_ptr = in_page(v_ptr, pages_ptr, start, v_batch_stride, v_token_stride, PAGE)
        sums, total, rounded, highest = forward_block(
            sums, total, rounded, highest, q, k_block_ptr, v_block_ptr, k_token_stride, v_token_stride, start, position,
            keys, first_key, SCALE, SHIFT, BOUNDED, KEEP_LSE, STARTS, BLOCK_N, WIDTH, False,
        )  # fmt: skip
    for start in tl.range(whole_end, end, BLOCK_N):
        k_block_ptr = in_page(k_ptr, pages_ptr, start, k_batch_stride, k_token_stride, PAGE)
        v_block_ptr = in_page(v_ptr, pages_ptr, start, v_batch_stride, v_token_stride, PAGE)
        sums, total, rounded, highest = forward_block(
            sums, total, rounded, highest, q, k_block_ptr, v_block_ptr, k_token_stride, v_token_stride, start, position,
            keys, first_key, SCALE, SHIFT, BOUNDED, KEEP_LSE, STARTS, BLOCK_N, WIDTH, True,
        )  # fmt: skip
    store_attention(
        out_ptr, lse_ptr, sums, total, rounded, highest, position - first_key + 1, t, head, heads, tokens,
        SHIFT, LEAST, MOST, BOUNDED, KEEP_LSE, WIDTH,
    )  # fmt: skip


@triton.jit
def store_attention(
    out_ptr, lse_ptr, sums, total, rounded, highest, seen, t, head, heads, tokens,
    SHIFT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BOUNDED: tl.constexpr, KEEP_LSE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Divide the sums of queries t of a head and store them as (B, T, H, WIDTH), and lse as (B, H, T). seen: each query's keys."""
    none = seen <= 0  # a query without keys has the result 0 and the logarithm −inf
    factor = 1.0 / tl.where(none, 1.0, rounded)
    if BOUNDED:
        fits = (rounded >= LEAST * seen.to(tl.float32)) & (rounded <= MOST)
        factor = tl.where(fits | none, factor, float("nan"))
    batch = tl.cast(head // heads, tl.int64)
    row = (batch * tokens + t) * heads + head % heads
    ptr = out_ptr + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr, cast(sums * factor[:, None], out_ptr.dtype.element_ty), mask=(t < tokens)[:, None])
    if KEEP_LSE:
        shift = tl.where(none, 0.0, SHIFT if BOUNDED else highest)
        lse = (shift + tl.log2(total)) * LN2
        if BOUNDED:
            lse = tl.where(fits | none, lse, float("nan"))
        tl.store(lse_ptr + (tl.cast(head, tl.int64) * tokens + t), lse, mask=t < tokens)


@triton.jit(do_not_specialize=["all_keys", "rows"])  # a growing cache or another batch must not compile again
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, pages_ptr, sums_ptr, statistics_ptr, lengths_stride, tokens, all_keys, heads, share,
    rows, q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, BOUNDED: tl.constexpr, KEEP_LSE: tl.constexpr, LENGTHS: tl.constexpr,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum over parts of PART keys of the key/value heads, for all tokens·share queries that read them (at most QUERIES).

    Without ROWS a program has one part of a head of a row, or nothing to do where the row ends before, as most have where most rows are
    short. With ROWS, a power of two and no less than `rows`, programs share the parts that there are.

    Query i is that of token i // share and of the head i % share among those that share the keys. Stored are the sums of p·v
    (group of a row, part, query, WIDTH), and for each of these the sum of p, that of p rounded, and the highest score. PAGE: as in
    forward_kernel.
    """
    groups = heads // share
    if ROWS:
        row = tl.arange(0, ROWS)
        length = tl.zeros([ROWS], tl.int32) + all_keys
        if LENGTHS:
            length = tl.load(lengths_ptr + row.to(tl.int64) * lengths_stride, mask=row < rows, other=0)
            length = tl.minimum(tl.maximum(length, 0), all_keys).to(tl.int32)
        parts = tl.where(row < rows, tl.cdiv(length, PART), 0)
        ends = tl.cumsum(parts, 0)
        for item in tl.range(tl.program_id(0), tl.sum(parts, 0) * groups, tl.num_programs(0)):
            number = item // groups  # of the part, counted over the rows
            here = tl.sum((ends <= number).to(tl.int32), 0)
            decode_part(
                q_ptr, k_ptr, v_ptr, pages_ptr, sums_ptr, statistics_ptr, tokens, all_keys, heads, share,
                q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
                v_batch_stride, v_token_stride, v_head_stride,
                here * groups + item % groups, number - tl.sum(tl.where(row < here, parts, 0), 0),
                tl.sum(tl.where(row == here, length, 0), 0),
                SCALE, SHIFT, BOUNDED, KEEP_LSE, PAGE, WIDTH, QUERIES, BLOCK_N, PART,
            )  # fmt: skip
    else:
        group, part = tl.program_id(0), tl.program_id(1)
        keys = keys_of_row(lengths_ptr, lengths_stride, group // groups, all_keys, LENGTHS)
        if part * PART < keys:
            decode_part(
                q_ptr, k_ptr, v_ptr, pages_ptr, sums_ptr, statistics_ptr, tokens, all_keys, heads, share,
                q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
                v_batch_stride, v_token_stride, v_head_stride, group, part, keys,
                SCALE, SHIFT, BOUNDED, KEEP_LSE, PAGE, WIDTH, QUERIES, BLOCK_N, PART,
            )  # fmt: skip


@triton.jit
def decode_part(
    q_ptr, k_ptr, v_ptr, pages_ptr, sums_ptr, statistics_ptr, tokens, all_keys, heads, share,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    v_batch_stride, v_token_stride, v_head_stride, group, part, keys,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, BOUNDED: tl.constexpr, KEEP_LSE: tl.constexpr,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Sum over a part of the keys of a key/value head, `group` among those of all rows, whose row has `keys`."""
    groups = heads // share
    batch = group // groups
    begin = part * PART
    i = tl.arange(0, QUERIES)
    known = i < tokens * share
    position = i // share + keys - tokens
    zero = tl.cast(0, tl.int32)
    q_ptr = rows_of(q_ptr, group * share, heads, q_batch_stride, q_token_stride, q_head_stride, zero)
    offsets = tl.cast(i // share, tl.int64) * q_token_stride + tl.cast(i % share, tl.int64) * q_head_stride
    q = tl.load(q_ptr + offsets[:, None] + tl.arange(0, WIDTH)[None, :], mask=known[:, None], other=0.0)
    k_row_stride = 0 if PAGE else k_batch_stride
    v_row_stride = 0 if PAGE else v_batch_stride
    k_ptr = rows_of(k_ptr, group, groups, k_row_stride, k_token_stride, k_head_stride, zero)
    v_ptr = rows_of(v_ptr, group, groups, v_row_stride, v_token_stride, v_head_stride, zero)
    if PAGE:
        pages_ptr += tl.cast(batch, tl.int64) * (all_keys // PAGE)
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    rounded = tl.zeros([QUERIES], tl.float32)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    first_key = tl.zeros([QUERIES], tl.int32)
    for start in tl.range(begin, tl.minimum(begin + PART, keys), BLOCK_N):
        k_block_ptr = in_page(k_ptr, pages_ptr, start, k_batch_stride, k_token_stride, PAGE)
        v_block_ptr = in_page(v_ptr, pages_ptr, start, v_batch_stride, v_token_stride, PAGE)
        sums, total, rounded, highest = forward_block(
            sums, total, rounded, highest, q, k_block_ptr, v_block_ptr, k_token_stride, v_token_stride, start,
            position, keys, first_key, SCALE, SHIFT, BOUNDED, KEEP_LSE, False, BLOCK_N, WIDTH, True,
        )  # fmt: skip
    row = (tl.cast(group, tl.int64) * tl.cdiv(all_keys, PART) + part) * (tokens * share) + i
    tl.store(sums_ptr + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], sums, mask=known[:, None])
    tl.store(statistics_ptr + row * 3, total, mask=known)
    tl.store(statistics_ptr + row * 3 + 1, rounded, mask=known)
    tl.store(statistics_ptr + row * 3 + 2, highest, mask=known)


@triton.jit(do_not_specialize=["all_keys"])  # a growing cache must not compile again and again
def combine_kernel(
    sums_ptr, statistics_ptr, lengths_ptr, out_ptr, lse_ptr, lengths_stride, tokens, all_keys, heads, share,
    SHIFT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BOUNDED: tl.constexpr, KEEP_LSE: tl.constexpr, LENGTHS: tl.constexpr,
    WIDTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add the parts of one query of decode_kernel, PARTS at a time, in an order that depends on the row's length alone."""
    program = tl.program_id(0)
    queries = tokens * share
    group, i = program // queries, program % queries
    batch = group // (heads // share)
    keys = keys_of_row(lengths_ptr, lengths_stride, batch, all_keys, LENGTHS)
    sums = tl.zeros([1, WIDTH], tl.float32)
    total = tl.zeros([1], tl.float32)
    rounded = tl.zeros([1], tl.float32)
    highest = tl.full([1], float("-inf"), tl.float32)
    for start in tl.range(0, tl.cdiv(keys, PART), PARTS):
        part = start + tl.arange(0, PARTS)
        known = part < tl.cdiv(keys, PART)
        row = (tl.cast(group, tl.int64) * tl.cdiv(all_keys, PART) + part) * queries + i
        more = tl.load(sums_ptr + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=known[:, None], other=0.0)
        more_total = tl.load(statistics_ptr + row * 3, mask=known, other=0.0)
        more_rounded = tl.load(statistics_ptr + row * 3 + 1, mask=known, other=0.0)
        if not BOUNDED:
            scores = tl.load(statistics_ptr + row * 3 + 2, mask=known, other=float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 0))
            reference = tl.where(higher == float("-inf"), 0.0, higher)
            factor, weight = exp2(highest - reference), exp2(scores - reference)
            sums, total, rounded, highest = sums * factor[:, None], total * factor, rounded * factor, higher
            more, more_total, more_rounded = more * weight[:, None], more_total * weight, more_rounded * weight
        sums += tl.sum(more, 0)[None, :]
        total += tl.sum(more_total, 0)
        rounded += tl.sum(more_rounded, 0)
    t = tl.arange(0, 1) + i // share
    store_attention(
        out_ptr, lse_ptr, sums, total, rounded, highest, t + keys - tokens + 1, t, group * share + i % share, heads, tokens,
        SHIFT, LEAST, MOST, BOUNDED, KEEP_LSE, WIDTH,
    )  # fmt: skip
