"""The kernel of decode_blocks.py: all blocks of the model for one new token of each row, in one launch.

As many programs as the GPU runs at the same time share the work of each phase, and wait for each other between phases:
    start      the squares of x
    project    norm, queries, keys and values of 16 pairs of channels of a head, rotated
    attend     QK-norm, and a part of a row's keys for the queries that read a key/value head; the new key and value are stored
    combine    the parts of a query
    add        16 columns of attention's projection, added to x, and the squares of the new x
    up         norm, columns of the MLP's hidden layer, relu²
    down       16 columns of the MLP's result, as in add
While a phase computes, the weights of the next one are prefetched: they depend on nothing, and the memory is never idle.
"""

from nanochat_kernels.decode_blocks_phases import (
    ROWS,
    add_to_rows,
    attend,
    combine,
    load_columns,
    pairs_of,
    prefetch_rows,
    products,
    project_all,
    rstd_of,
    store_columns,
    store_number,
    weight_of,
)
from nanochat_kernels.triton_helpers import _INTERPRETED, cast, tl, triton


@triton.jit
def arrived(counter_ptr):
    """The number of arrivals that this program can see; what those programs wrote before it sees too."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter_ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_all(counter_ptr, arrivals):
    """Wait until all programs have come here; returns how many arrivals the next call has to wait for."""
    arrivals += tl.num_programs(0)
    if not _INTERPRETED:
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release")
        while arrived(counter_ptr) < arrivals:
            pass
        tl.debug_barrier()
    return arrivals


@triton.jit(do_not_specialize=["rows", "layers", "first_layer", "last_layer", "pages_of_row"])
def decode_blocks_kernel(
    given_ptr, x_ptr, table_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, lengths_ptr, pages_ptr, memory_ptr, rounded_ptr,
    counter_ptr, rows, layers, first_layer, last_layer, pages_of_row, parts, layer_stride, page_stride, token_stride, head_stride,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HIDDEN: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, EPS: tl.constexpr,
    PAGE: tl.constexpr, BLOCKS: tl.constexpr, SQUARES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The phases FIRST to LAST of the layers from first_layer to last_layer: 0 is start, which belongs to no layer, 1 project, …, and
    7 project of the next layer, if there is one. UP: columns of a unit of the phase up.

    memory (float32) and rounded: what the phases leave for each other, whose parts lie one after the other.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    MOST_ROWS: tl.constexpr = 16 * BLOCKS
    squares_ptr = memory_ptr
    qkv_ptr = squares_ptr + MOST_ROWS * (WIDTH // 16)
    head_squares_ptr = qkv_ptr + MOST_ROWS * ((HEADS + 2 * KV_HEADS) * HEAD)
    totals_ptr = head_squares_ptr + MOST_ROWS * ((HEADS + KV_HEADS) * (HEAD // 32))
    sums_ptr = totals_ptr + MOST_ROWS * HEADS * tl.cast(parts, tl.int64)
    attended_ptr, hidden_ptr = rounded_ptr, rounded_ptr + MOST_ROWS * (HEADS * HEAD)
    ATTENDED: tl.constexpr = HEADS * HEAD
    TOGETHER: tl.constexpr = FIRST < LAST  # phases, between which all programs wait
    arrivals = tl.cast(0, tl.int32)
    filled, most = rows, parts
    if TOGETHER or FIRST != 2:
        r = tl.arange(0, ROWS * 4)
        lengths = tl.load(lengths_ptr + r, mask=r < rows, other=-1)
        filled = tl.max(tl.where(lengths >= 0, r + 1, 0), 0)  # rows up to the last one that has a conversation
        most = tl.cdiv(tl.max(lengths, 0) + 1, PART).to(tl.int32)
    if FIRST == 0:
        for index in tl.range(program, WIDTH // ROWS, programs):
            unit = tl.cast(index, tl.int32)
            for i in tl.static_range(BLOCKS):
                value = load_columns(given_ptr, WIDTH, i, rows, unit * ROWS, ROWS)
                store_columns(x_ptr, WIDTH, value, i, rows, unit * ROWS, ROWS)
                as_float = value.to(tl.float32)
                store_number(squares_ptr, WIDTH // ROWS, tl.sum(as_float * as_float, 1), i, rows, unit)
        if TOGETHER:
            arrivals = wait_for_all(counter_ptr, arrivals)
    for index in tl.range(first_layer, last_layer):
        layer = tl.cast(index, tl.int32)
        if FIRST <= 1 and LAST >= 1:
            project_all(
                x_ptr, squares_ptr, table_ptr, layer, qkv_ptr, head_squares_ptr, cos_ptr, sin_ptr, lengths_ptr, filled,
                WIDTH, HEADS, KV_HEADS, HEAD, BLOCK_K, BLOCKS, SQUARES, EPS,
            )  # fmt: skip
            if LAST > 1:
                arrivals = wait_for_all(counter_ptr, arrivals)
        if FIRST <= 4 and LAST >= 4:
            w_ptr = weight_of(table_ptr, layer, 3, dtype)
            prefetch_rows(
                w_ptr + tl.cast(program, tl.int64) * (ROWS * ATTENDED), program, WIDTH // ROWS, ATTENDED, ROWS, ROWS
            )
        if FIRST <= 2 and LAST >= 2:
            for at in tl.range(program, filled * KV_HEADS * most, programs):
                unit = tl.cast(at, tl.int32)
                part, group, row = unit % most, unit // most % KV_HEADS, unit // most // KV_HEADS
                length = tl.load(lengths_ptr + row).to(tl.int32)
                if part * PART <= length:
                    attend(
                        qkv_ptr, head_squares_ptr, keys_ptr + tl.cast(layer, tl.int64) * layer_stride,
                        values_ptr + tl.cast(layer, tl.int64) * layer_stride, pages_ptr + row * pages_of_row, sums_ptr, totals_ptr,
                        length, row, group, part, parts, page_stride, token_stride, head_stride,
                        HEADS, KV_HEADS, HEAD, SCALE, SHIFT, EPS, PAGE, PART, BLOCK_N, TOGETHER,
                    )  # fmt: skip
            if LAST > 2:
                arrivals = wait_for_all(counter_ptr, arrivals)
        if FIRST <= 3 and LAST >= 3:
            for at in tl.range(program, filled * HEADS, programs):
                unit = tl.cast(at, tl.int32)
                length = tl.load(lengths_ptr + unit // HEADS).to(tl.int32)
                combine(
                    sums_ptr, totals_ptr, attended_ptr, length, unit // HEADS, unit % HEADS, parts, HEADS, HEAD, LEAST, MOST,
                    PART, PARTS,
                )  # fmt: skip
            if LAST > 3:
                arrivals = wait_for_all(counter_ptr, arrivals)
        if FIRST <= 5 and LAST >= 5:
            w_ptr = weight_of(table_ptr, layer, 4, dtype)
            prefetch_rows(w_ptr + tl.cast(program, tl.int64) * (UP * WIDTH), program, HIDDEN // UP, WIDTH, UP, ROWS)
        if FIRST <= 4 and LAST >= 4:
            w_ptr = weight_of(table_ptr, layer, 3, dtype)
            for at in tl.range(program, WIDTH // ROWS, programs):
                unit = tl.cast(at, tl.int32)
                add_to_rows(x_ptr, squares_ptr, attended_ptr, w_ptr, unit, filled, WIDTH, ATTENDED, BLOCK_K, BLOCKS)
            if LAST > 4:
                arrivals = wait_for_all(counter_ptr, arrivals)
        if FIRST <= 6 and LAST >= 6:
            w_ptr = weight_of(table_ptr, layer, 5, dtype)
            prefetch_rows(
                w_ptr + tl.cast(program, tl.int64) * (ROWS * HIDDEN), program, WIDTH // ROWS, HIDDEN, ROWS, ROWS
            )
        if FIRST <= 5 and LAST >= 5:
            w_ptr = weight_of(table_ptr, layer, 4, dtype)
            for at in tl.range(program, HIDDEN // UP, programs):
                column = tl.cast(at, tl.int32) * UP
                sums = products(
                    x_ptr, w_ptr + tl.cast(column, tl.int64) * WIDTH, filled, WIDTH, BLOCK_K, BLOCKS, UP, ROWS
                )
                for i in tl.static_range(BLOCKS):
                    value = sums[i] * rstd_of(squares_ptr, i, filled, WIDTH, SQUARES, EPS)[:, None]
                    value = tl.where(value > 0.0, value * value, tl.where(value == value, 0.0, value))
                    store_columns(hidden_ptr, HIDDEN, cast(value, dtype), i, filled, column, UP)
            if LAST > 5:
                arrivals = wait_for_all(counter_ptr, arrivals)
        if LAST >= 6 and layer + 1 < layers:
            next_ptr, _ = pairs_of(table_ptr, layer + 1, program, dtype, WIDTH, HEADS, KV_HEADS, HEAD)
            UNITS: tl.constexpr = (HEADS + 2 * KV_HEADS) * (HEAD // 32)
            prefetch_rows(next_ptr, program, UNITS, WIDTH, 2 * ROWS, HEAD // 2)
        if FIRST <= 6 and LAST >= 6:
            w_ptr = weight_of(table_ptr, layer, 5, dtype)
            for at in tl.range(program, WIDTH // ROWS, programs):
                unit = tl.cast(at, tl.int32)
                add_to_rows(x_ptr, squares_ptr, hidden_ptr, w_ptr, unit, filled, WIDTH, HIDDEN, BLOCK_K, BLOCKS)
            if TOGETHER:
                arrivals = wait_for_all(counter_ptr, arrivals)
        if LAST == 7 and layer + 1 < layers:
            project_all(
                x_ptr, squares_ptr, table_ptr, layer + 1, qkv_ptr, head_squares_ptr, cos_ptr, sin_ptr, lengths_ptr, filled,
                WIDTH, HEADS, KV_HEADS, HEAD, BLOCK_K, BLOCKS, SQUARES, EPS,
            )  # fmt: skip
