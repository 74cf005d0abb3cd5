"""What a program of decode_blocks_kernels.py does in each phase.

Rows are computed in blocks of 16, each with the same instructions, so that a row's results do not depend on their number. What another
program has written is read past the first-level cache (.cg), which may hold what stood there before.
"""

from nanochat_kernels.attention_kernels import forward_block, in_page
from nanochat_kernels.matrix_product import halves
from nanochat_kernels.triton_helpers import TRITON_INSTALLED, cast, dot, prefetch, round_both, rsqrt, tl, triton

# rows of a block, and the columns of a unit of work; slices of K, one for each warp
ROWS, SPLIT = map(tl.constexpr, (16, 4)) if TRITON_INSTALLED else (16, 4)


@triton.jit
def weight_of(table_ptr, layer, number, dtype: tl.constexpr):
    """The address of a block's weight, which is a multiple of 16."""
    address = tl.load(table_ptr + layer * 6 + number)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def load_columns(x_ptr, stride, block, rows, column, COLUMNS: tl.constexpr):
    """Load the columns from `column` on of a block of rows; 0 for rows that do not exist."""
    r = tl.arange(0, ROWS) + block * ROWS
    at = x_ptr + (r * stride)[:, None] + (tl.arange(0, COLUMNS) + column)[None, :]
    return tl.load(at, mask=(r < rows)[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def store_columns(x_ptr, stride, value, block, rows, column, COLUMNS: tl.constexpr):
    r = tl.arange(0, ROWS) + block * ROWS
    at = x_ptr + (r * stride)[:, None] + (tl.arange(0, COLUMNS) + column)[None, :]
    tl.store(at, value, mask=(r < rows)[:, None])


@triton.jit
def store_number(x_ptr, stride, value, block, rows, column):
    """Store a number for each row of a block."""
    r = tl.arange(0, ROWS) + block * ROWS
    tl.store(x_ptr + r * stride + column, value, mask=r < rows)


@triton.jit
def load_slices(x_ptr, block, rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load BLOCK_K columns of a block of rows of x (rows, K) as slices (SPLIT, ROWS, BLOCK_K / SPLIT); 0 for rows that do not exist."""
    WIDTH: tl.constexpr = BLOCK_K // SPLIT
    slice_number, r, column = tl.arange(0, SPLIT), tl.arange(0, ROWS) + block * ROWS, tl.arange(0, WIDTH) + start
    at = (slice_number * WIDTH)[:, None, None] + (r * K)[None, :, None] + column[None, None, :]
    return tl.load(x_ptr + at, mask=(r < rows)[None, :, None], other=0.0, cache_modifier=".cg")


@triton.jit
def products(
    x_ptr,
    w_ptr,
    rows,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    APART: tl.constexpr,
):
    """The products (ROWS, COLUMNS) of four blocks of rows of x (rows, K) with rows of a weight (…, K): ROWS of them from w_ptr on, as
    many more that begin APART later, and so on. Blocks that do not exist are 0.

    Each warp adds a slice of every BLOCK_K: one after the other the products of so few columns would take longer than the loads.
    """
    WIDTH: tl.constexpr = BLOCK_K // SPLIT
    column, slice_number = tl.arange(0, COLUMNS), tl.arange(0, SPLIT)
    at = (slice_number * WIDTH)[:, None, None] + ((column % ROWS + column // ROWS * APART) * K)[None, :, None]
    w_ptr += at + tl.arange(0, WIDTH)[None, None, :]
    s0 = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
    s1, s2, s3 = s0, s0, s0
    for start in tl.range(0, K, BLOCK_K):
        w = tl.permute(tl.load(w_ptr + start), [0, 2, 1])
        s0 = dot(load_slices(x_ptr, 0, rows, start, K, BLOCK_K), w, s0)
        if BLOCKS > 1:
            s1 = dot(load_slices(x_ptr, 1, rows, start, K, BLOCK_K), w, s1)
            s2 = dot(load_slices(x_ptr, 2, rows, start, K, BLOCK_K), w, s2)
            s3 = dot(load_slices(x_ptr, 3, rows, start, K, BLOCK_K), w, s3)
    return tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0)


@triton.jit
def prefetch_rows(w_ptr, unit, units, K: tl.constexpr, COLUMNS: tl.constexpr, APART: tl.constexpr):
    """Prefetch what `products` reads of a weight, if there is such a unit."""
    if unit < units:
        column, line = tl.arange(0, COLUMNS), tl.arange(0, 16)
        rows_ptr = w_ptr + ((column % ROWS + column // ROWS * APART) * K)[:, None]
        for start in tl.range(0, K, 512):
            prefetch(rows_ptr + tl.minimum(start + line * 32, K - 32)[None, :])


@triton.jit
def rstd_of(squares_ptr, block, rows, WIDTH: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr):
    """rstd of a block of rows of x, from the sums of squares of 16 columns each (rows, WIDTH / 16)."""
    UNITS: tl.constexpr = WIDTH // ROWS
    r, part = tl.arange(0, ROWS) + block * ROWS, tl.arange(0, PARTS)
    known = (r < rows)[:, None] & (part < UNITS)[None, :]
    squares = tl.load(squares_ptr + (r * UNITS)[:, None] + part[None, :], mask=known, other=0.0, cache_modifier=".cg")
    return rsqrt(tl.sum(squares, 1) / WIDTH + EPS)


@triton.jit
def add_to_rows(
    x_ptr,
    squares_ptr,
    y_ptr,
    w_ptr,
    unit,
    rows,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Add 16 columns of y·weightᵀ to x, and store the sums of their squares."""
    column = unit * ROWS
    sums = products(y_ptr, w_ptr + tl.cast(column, tl.int64) * K, rows, K, BLOCK_K, BLOCKS, ROWS, 0)
    for i in tl.static_range(BLOCKS):
        value = sums[i] + load_columns(x_ptr, WIDTH, i, rows, column, ROWS).to(tl.float32)
        value, as_float = round_both(value, x_ptr.dtype.element_ty)
        store_columns(x_ptr, WIDTH, value, i, rows, column, ROWS)
        store_number(squares_ptr, WIDTH // ROWS, tl.sum(as_float * as_float, 1), i, rows, unit)


@triton.jit
def pairs_of(
    table_ptr,
    layer,
    unit,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """The address of the weight's row for the first of 16 pairs of channels, and whether they are a value's."""
    UNITS: tl.constexpr = HEAD // 2 // ROWS  # of a head
    head = unit // UNITS
    number = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)  # of the weight
    inner = head - tl.where(number > 0, HEADS + (number - 1) * KV_HEADS, 0)
    row = inner * HEAD + unit % UNITS * ROWS
    return weight_of(table_ptr, layer, number, dtype) + tl.cast(row, tl.int64) * WIDTH, number == 2


@triton.jit
def project(
    x_ptr, squares_ptr, table_ptr, layer, qkv_ptr, head_squares_ptr, cos_ptr, sin_ptr, lengths_ptr, unit, rows,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """16 pairs of channels of a head, and the sum of their squares if it is a query's or a key's."""
    HALF: tl.constexpr = HEAD // 2
    UNITS: tl.constexpr = HALF // ROWS  # of a head
    STRIDE: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD
    column = unit // UNITS * HEAD + unit % UNITS * ROWS
    w_ptr, is_value = pairs_of(table_ptr, layer, unit, x_ptr.dtype.element_ty, WIDTH, HEADS, KV_HEADS, HEAD)
    sums = products(x_ptr, w_ptr, rows, WIDTH, BLOCK_K, BLOCKS, 2 * ROWS, HALF)
    for i in tl.static_range(BLOCKS):
        x1, x2 = halves(sums[i])
        rstd = rstd_of(squares_ptr, i, rows, WIDTH, PARTS, EPS)[:, None]
        x1, x2 = x1 * rstd, x2 * rstd
        if not is_value:
            r = tl.arange(0, ROWS) + i * ROWS
            position = tl.maximum(tl.load(lengths_ptr + r, mask=r < rows, other=0), 0)
            at = (position * HALF + unit % UNITS * ROWS)[:, None] + tl.arange(0, ROWS)[None, :]
            c, s = tl.load(cos_ptr + at).to(tl.float32), tl.load(sin_ptr + at).to(tl.float32)
            x1, x2 = x1 * c + x2 * s, x2 * c - x1 * s
            squares = tl.sum(x1 * x1 + x2 * x2, 1)
            store_number(head_squares_ptr, (HEADS + KV_HEADS) * UNITS, squares, i, rows, unit)
        store_columns(qkv_ptr, STRIDE, x1, i, rows, column, ROWS)
        store_columns(qkv_ptr, STRIDE, x2, i, rows, column + HALF, ROWS)


@triton.jit
def project_all(
    x_ptr, squares_ptr, table_ptr, layer, qkv_ptr, head_squares_ptr, cos_ptr, sin_ptr, lengths_ptr, rows,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """This program's share of the phase."""
    for index in tl.range(tl.program_id(0), (HEADS + 2 * KV_HEADS) * (HEAD // 2 // ROWS), tl.num_programs(0)):
        unit = tl.cast(index, tl.int32)
        project(
            x_ptr, squares_ptr, table_ptr, layer, qkv_ptr, head_squares_ptr, cos_ptr, sin_ptr, lengths_ptr, unit, rows,
            WIDTH, HEADS, KV_HEADS, HEAD, BLOCK_K, BLOCKS, PARTS, EPS,
        )  # fmt: skip


@triton.jit
def normed_heads(
    qkv_ptr,
    head_squares_ptr,
    row,
    head,
    count,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    EPS: tl.constexpr,
):
    """The queries or keys (ROWS, HEAD) of `count` heads of a row from `head` on, normed; 0 for the others."""
    UNITS: tl.constexpr = HEAD // 2 // ROWS
    i, unit = tl.arange(0, ROWS), tl.arange(0, UNITS)
    known = (i < count)[:, None]
    at = (row * ((HEADS + KV_HEADS) * UNITS) + (head + i) * UNITS)[:, None] + unit[None, :]
    squares = tl.sum(tl.load(head_squares_ptr + at, mask=known, other=0.0, cache_modifier=".cg"), 1)
    at = (row * ((HEADS + 2 * KV_HEADS) * HEAD) + (head + i) * HEAD)[:, None] + tl.arange(0, HEAD)[None, :]
    value = tl.load(qkv_ptr + at, mask=known, other=0.0, cache_modifier=".cg")
    return value * rsqrt(squares / HEAD + EPS)[:, None]


@triton.jit
def attend(
    qkv_ptr, head_squares_ptr, keys_ptr, values_ptr, pages_ptr, sums_ptr, totals_ptr, length, row, group, part, parts,
    page_stride, token_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, EPS: tl.constexpr,
    PAGE: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Sum over PART keys of a key/value head for the queries that read it, as decode_kernel does."""
    SHARE: tl.constexpr = HEADS // KV_HEADS
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    keys_ptr += tl.cast(group, tl.int64) * head_stride
    values_ptr += tl.cast(group, tl.int64) * head_stride
    keys, begin = length + 1, part * PART
    if PREFETCH:  # what comes first waits for numbers that other programs wrote
        token, line = tl.arange(0, BLOCK_N), tl.arange(0, HEAD // 32)
        for start in tl.range(begin, tl.minimum(begin + PART, keys), BLOCK_N):
            at = tl.minimum(token, keys - 1 - start)[:, None] * token_stride + line[None, :] * 32 + start * token_stride
            prefetch(in_page(keys_ptr, pages_ptr, start, page_stride, token_stride, PAGE) + at)
            prefetch(in_page(values_ptr, pages_ptr, start, page_stride, token_stride, PAGE) + at)
    if begin + PART >= keys:  # the part of the new key and value
        page = tl.load(pages_ptr + length // PAGE).to(tl.int64)
        i, channel = tl.arange(0, ROWS), tl.arange(0, HEAD)
        first = (i == 0)[:, None]
        k = normed_heads(qkv_ptr, head_squares_ptr, row, HEADS + group, 1, HEADS, KV_HEADS, HEAD, EPS)
        at = row * ((HEADS + 2 * KV_HEADS) * HEAD) + (HEADS + KV_HEADS + group) * HEAD + channel
        v = tl.load(qkv_ptr + at[None, :] + 0 * i[:, None], mask=first, other=0.0, cache_modifier=".cg")
        to = page * page_stride + (length % PAGE) * token_stride + channel[None, :] + 0 * i[:, None]
        tl.store(keys_ptr + to, cast(k, dtype), mask=first)
        tl.store(values_ptr + to, cast(v, dtype), mask=first)
        tl.debug_barrier()  # the whole program reads what was stored
    q = cast(normed_heads(qkv_ptr, head_squares_ptr, row, group * SHARE, SHARE, HEADS, KV_HEADS, HEAD, EPS), dtype)
    sums = tl.zeros([ROWS, HEAD], tl.float32)
    rounded = tl.zeros([ROWS], tl.float32)
    unused = tl.zeros([ROWS], tl.float32)
    position = tl.zeros([ROWS], tl.int32) + length
    first_key = tl.zeros([ROWS], tl.int32)
    WITHIN: tl.constexpr = (
        PAGE % PART == 0
    )  # a part lies in one page, whose number need not be loaded again for each block
    k_block_ptr = in_page(keys_ptr, pages_ptr, begin, page_stride, token_stride, PAGE)
    v_block_ptr = in_page(values_ptr, pages_ptr, begin, page_stride, token_stride, PAGE)
    for start in tl.range(begin, tl.minimum(begin + PART, keys), BLOCK_N):
        if not WITHIN:
            k_block_ptr = in_page(keys_ptr, pages_ptr, start, page_stride, token_stride, PAGE)
            v_block_ptr = in_page(values_ptr, pages_ptr, start, page_stride, token_stride, PAGE)
        sums, _, rounded, _ = forward_block(
            sums, unused, rounded, unused, q, k_block_ptr, v_block_ptr, token_stride, token_stride, start, position, keys,
            first_key, SCALE, SHIFT, True, False, False, BLOCK_N, HEAD, True,
        )  # fmt: skip
    i = tl.arange(0, ROWS)
    at = (tl.cast(row, tl.int64) * parts + part) * HEADS + group * SHARE + i
    tl.store(sums_ptr + at[:, None] * HEAD + tl.arange(0, HEAD)[None, :], sums, mask=(i < SHARE)[:, None])
    tl.store(totals_ptr + at, rounded, mask=i < SHARE)


@triton.jit
def combine(
    sums_ptr, totals_ptr, out_ptr, length, row, head, parts, HEADS: tl.constexpr, HEAD: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add the parts of one query, PARTS at a time, in an order that depends on the row's length alone."""
    keys = length + 1
    sums = tl.zeros([HEAD], tl.float32)
    total = tl.cast(0.0, tl.float32)
    for start in tl.range(0, tl.cdiv(keys, PART), PARTS):
        part = start + tl.arange(0, PARTS)
        known = part < tl.cdiv(keys, PART)
        at = (tl.cast(row, tl.int64) * parts + part) * HEADS + head
        more = sums_ptr + at[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
        sums += tl.sum(tl.load(more, mask=known[:, None], other=0.0, cache_modifier=".cg"), 0)
        total += tl.sum(tl.load(totals_ptr + at, mask=known, other=0.0, cache_modifier=".cg"), 0)
    fits = (total >= LEAST * keys.to(tl.float32)) & (total <= MOST)
    factor = tl.where(fits, 1.0 / total, float("nan"))  # scores beyond the bound
    value = sums * tl.where(keys > 0, factor, 0.0)
    at = (row * HEADS + head) * HEAD + tl.arange(0, HEAD)
    tl.store(out_ptr + at, cast(value, out_ptr.dtype.element_ty))
