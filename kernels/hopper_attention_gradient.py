"""Attention's backward pass for sm_90, in Gluon, for the calls that hopper_attention.py takes.

As there, two groups of warps compute half of a tile's rows each, and another warp loads for both: 128 queries against blocks of 64
keys for dq, and 128 keys against blocks of 64 queries for dk and dv. attention_gradient_kernels.py has the notation.
"""

from torch import Tensor

from nanochat_kernels.architecture import TRITON_INSTALLED
from nanochat_kernels.hopper_attention import (
    TILE,
    announce_end,
    barriers,
    load_keys,
    load_number,
    next_tile,
    numbers_of_tiles,
    ring,
    rows_of_heads,
    store_number,
    tile_counter,
    tile_of,
)
from nanochat_kernels.hopper_product import COMPUTING, LOADING, REGISTERS, descriptor, gl, gluon, halves
from nanochat_kernels.triton_helpers import LOG2E, exp2, launch, multiprocessors

if TRITON_INSTALLED:
    from nanochat_kernels.hopper_product import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

BLOCK = gl.constexpr(64) if TRITON_INSTALLED else 64  # keys or queries of a step, and rows of a group


@gluon.jit
def place_gradient(
    gradient, y_memory, memory, row, head, factors, position, all_rows, EPS: gl.constexpr,
    PROJECTED: gl.constexpr, NORMED: gl.constexpr,
):  # fmt: skip
    """attention_gradient_kernels.store_gradient: y is in shared memory, and the gradient goes to `memory`."""
    WIDTH: gl.constexpr = gradient.shape[1]
    if PROJECTED:
        rstd_ptr, head_rstd_ptr, cos_ptr, sin_ptr, sums_ptr = factors
        y = y_memory.load(gradient.type.layout).to(gl.float32)
        product = gl.sum(gradient * y, axis=1)
        factor = gl.load(rstd_ptr + row)
        if NORMED:
            head_rstd = gl.load(head_rstd_ptr + (head.to(gl.int64) * all_rows + row))
            factor *= head_rstd
            gradient = (gradient - y * (product / WIDTH)[:, None]) * factor[:, None]
            product *= EPS * head_rstd * head_rstd
            HALF: gl.constexpr = WIDTH // 2
            g1, g2 = halves(gradient)
            rows = gl.convert_layout(position, gl.SliceLayout(1, g1.type.layout))
            table = (
                rows.to(gl.int64)[:, None] * HALF
                + gl.arange(0, HALF, layout=gl.SliceLayout(0, g1.type.layout))[None, :]
            )
            c = gl.load(cos_ptr + table).to(gl.float32)
            s = gl.load(sin_ptr + table).to(gl.float32)
            memory.slice(0, HALF, dim=1).store((g1 * c - g2 * s).to(memory.dtype))
            memory.slice(HALF, HALF, dim=1).store((g1 * s + g2 * c).to(memory.dtype))
        else:
            memory.store((gradient * factor[:, None]).to(memory.dtype))
        gl.store(sums_ptr + (head.to(gl.int64) * all_rows + row), product)
    else:
        memory.store(gradient.to(memory.dtype))


@gluon.jit
def load_for_queries(
    q_desc, k_desc, v_desc, out_desc, dout_desc, counter_ptr, memory, tokens, blocks, heads, rows, share, total,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Load what compute_query_gradient needs of all tiles of this program."""
    (
        q_tiles, dout_tiles, out_tiles, k_ring, v_ring, numbers, filled, empty, out_empty, k_filled, k_empty, v_filled, v_empty,
    ) = memory  # fmt: skip
    keys_memory = (k_ring, v_ring, k_filled, k_empty, v_filled, v_empty)
    WIDTH: gl.constexpr = q_desc.block_type.shape[1]
    step, turn = 0, 0
    index = gl.program_id(0)
    while index < total:
        block, head, row = tile_of(index, blocks, heads, rows, GROUP)
        for which in gl.static_range(2):
            at = [row * tokens + (2 * block + which) * BLOCK, head * WIDTH]
            bar = filled.index(which)
            mbarrier.wait(empty.index(which), (turn & 1) ^ 1)
            store_number(numbers, which, index)
            mbarrier.expect(bar, 3 * q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, at, bar, q_tiles.index(which))
            tma.async_copy_global_to_shared(dout_desc, at, bar, dout_tiles.index(which))
            mbarrier.wait(out_empty.index(which), (turn & 1) ^ 1)
            tma.async_copy_global_to_shared(out_desc, at, bar, out_tiles.index(which))
        turn += 1
        steps = 2 * block + 2
        step = load_keys(k_desc, v_desc, keys_memory, row * tokens, steps, head // share, step, STAGES)
        index = next_tile(counter_ptr)
    announce_end(numbers, filled, empty, turn)


@gluon.jit
def compute_query_gradient(
    which: gl.constexpr, dq_desc, lse_ptr, dlse_ptr, delta_ptr, factors, memory, tokens, blocks, heads, rows, offset,
    SCALE: gl.constexpr, ROOT: gl.constexpr, EPS: gl.constexpr, DLSE: gl.constexpr, PROJECTED: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Compute dq and delta of the first (which = 0) or second half of the rows of every tile of this program."""
    (
        q_tiles, dout_tiles, out_tiles, k_ring, v_ring, numbers, filled, empty, out_empty, k_filled, k_empty, v_filled, v_empty,
    ) = memory  # fmt: skip
    WIDTH: gl.constexpr = dq_desc.block_type.shape[1]
    DTYPE: gl.constexpr = dq_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q, dout, out = q_tiles.index(which), dout_tiles.index(which), out_tiles.index(which)
    step, turn = 0, 0
    mbarrier.wait(filled.index(which), 0)
    index = load_number(numbers, which)
    while index >= 0:
        block, head, row = tile_of(index, blocks, heads, rows, GROUP)
        first = (2 * block + which) * BLOCK
        t = first + gl.arange(0, BLOCK, layout=row_layout)
        statistic = (row * heads + head).to(gl.int64) * tokens + t
        lse = gl.load(lse_ptr + statistic) * LOG2E
        products = dout.load(o_layout).to(gl.float32) * out.load(o_layout).to(gl.float32)
        delta = gl.convert_layout(gl.sum(products, axis=1), row_layout)
        if DLSE:
            delta -= gl.load(dlse_ptr + statistic)
        gl.store(delta_ptr + statistic, delta)
        if which == 0:  # its queries see no key of the tile's second half
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(k_filled.index(stage), phase)
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_filled.index(stage), phase)
            mbarrier.arrive(v_empty.index(stage), count=1)
            step += 1
        # the block on the diagonal
        stage, phase = step % STAGES, step // STAGES & 1
        x = gl.zeros([BLOCK, BLOCK], gl.float32, s_layout)
        dp = gl.zeros([BLOCK, BLOCK], gl.float32, s_layout)
        mbarrier.wait(k_filled.index(stage), phase)
        x = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), x, use_acc=False, is_async=True)
        mbarrier.wait(v_filled.index(stage), phase)
        dp = warpgroup_mma(dout, v_ring.index(stage).permute((1, 0)), dp, use_acc=False, is_async=True)
        x, dp = warpgroup_mma_wait(0, (x, dp))
        mbarrier.arrive(v_empty.index(stage), count=1)
        key = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
        ds = gl.where(key[None, :] <= t[:, None], exp2(x * SCALE - lse[:, None]) * (dp - delta[:, None]), 0.0).to(DTYPE)
        dq = gl.zeros([BLOCK, WIDTH], gl.float32, o_layout)
        for i in range(2 * block + which):
            now, before = (step + 1) % STAGES, step % STAGES
            phase = (step + 1) // STAGES & 1
            mbarrier.wait(k_filled.index(now), phase)
            x = warpgroup_mma(q, k_ring.index(now).permute((1, 0)), x, use_acc=False, is_async=True)
            mbarrier.wait(v_filled.index(now), phase)
            dp = warpgroup_mma(dout, v_ring.index(now).permute((1, 0)), dp, use_acc=False, is_async=True)
            operand = gl.convert_layout(ds, ds_layout)
            dq = warpgroup_mma(operand, k_ring.index(before), dq, use_acc=i > 0, is_async=True)
            x, dp = warpgroup_mma_wait(1, (x, dp))
            mbarrier.arrive(v_empty.index(now), count=1)
            ds = (exp2(x * SCALE - lse[:, None]) * (dp - delta[:, None])).to(DTYPE)
            dq = warpgroup_mma_wait(0, (dq,))
            mbarrier.arrive(k_empty.index(before), count=1)
            step += 1
        operand = gl.convert_layout(ds, ds_layout)
        dq = warpgroup_mma(operand, k_ring.index(step % STAGES), dq, use_acc=2 * block + which > 0, is_async=True)
        dq = warpgroup_mma_wait(0, (dq,))
        mbarrier.arrive(k_empty.index(step % STAGES), count=1)
        step += 1
        rows_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
        position = first + gl.arange(0, BLOCK, layout=rows_layout)
        number = (row * tokens).to(gl.int64) + position
        place_gradient(
            dq * ROOT, q, out, number, head, factors, position + offset, (rows * tokens).to(gl.int64), EPS, PROJECTED, True,
        )  # fmt: skip
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [row * tokens + first, head * WIDTH], out)
        mbarrier.arrive(empty.index(which), count=1)
        tma.store_wait(0)
        mbarrier.arrive(out_empty.index(which), count=1)
        turn += 1
        mbarrier.wait(filled.index(which), turn & 1)
        index = load_number(numbers, which)


@gluon.jit(do_not_specialize=["blocks", "total"])
def query_gradient_on_hopper(
    q_desc, k_desc, v_desc, out_desc, dout_desc, dq_desc, lse_ptr, dlse_ptr, delta_ptr, counter_ptr, factors, tokens, blocks, heads,
    rows, share, total, offset, SCALE: gl.constexpr, ROOT: gl.constexpr, EPS: gl.constexpr, DLSE: gl.constexpr,
    PROJECTED: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Compute dq and delta in `total` tiles of 128 queries. A program that is free takes the next; counter: 0 at first."""
    q_tiles, dout_tiles, out_tiles = ring(q_desc, 2), ring(dout_desc, 2), ring(out_desc, 2)
    k_ring, v_ring = ring(k_desc, STAGES), ring(v_desc, STAGES)
    filled, empty, out_empty = barriers(2, 1), barriers(2, 1), barriers(2, 1)
    k_filled, k_empty, v_filled, v_empty = (
        barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2),
    )  # fmt: skip
    fence_async_shared()  # the copies see the barriers
    numbers = numbers_of_tiles()
    memory = (
        q_tiles, dout_tiles, out_tiles, k_ring, v_ring, numbers, filled, empty, out_empty, k_filled, k_empty, v_filled, v_empty,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (compute_query_gradient, (
                0, dq_desc, lse_ptr, dlse_ptr, delta_ptr, factors, memory, tokens, blocks, heads, rows, offset, SCALE,
                ROOT, EPS, DLSE, PROJECTED, STAGES, GROUP,
            )),
            (compute_query_gradient, (
                1, dq_desc, lse_ptr, dlse_ptr, delta_ptr, factors, memory, tokens, blocks, heads, rows, offset, SCALE,
                ROOT, EPS, DLSE, PROJECTED, STAGES, GROUP,
            )),
            (load_for_queries, (
                q_desc, k_desc, v_desc, out_desc, dout_desc, counter_ptr, memory, tokens, blocks, heads, rows, share, total,
                STAGES, GROUP,
            )),
        ],
        [4, 1],
        [COMPUTING, LOADING],
    )  # fmt: skip


@gluon.jit
def load_for_keys(
    q_desc, k_desc, v_desc, dout_desc, counter_ptr, memory, tokens, blocks, groups, rows, share, total,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Load what compute_key_gradients needs of all tiles of this program."""
    k_tiles, v_tiles, q_ring, dout_ring, numbers, filled, empty, q_filled, dout_filled, ring_empty = memory
    WIDTH: gl.constexpr = q_desc.block_type.shape[1]
    step, turn = 0, 0
    index = gl.program_id(0)
    while index < total:
        block, group, row = tile_of(index, blocks, groups, rows, GROUP)
        first = 2 * (blocks - 1 - block)
        for which in gl.static_range(2):
            at = [row * tokens + (first + which) * BLOCK, group * WIDTH]
            bar = filled.index(which)
            mbarrier.wait(empty.index(which), (turn & 1) ^ 1)
            store_number(numbers, which, index)
            mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, at, bar, k_tiles.index(which))
            tma.async_copy_global_to_shared(v_desc, at, bar, v_tiles.index(which))
        turn += 1
        for head in range(group * share, (group + 1) * share):
            for start in range(first * BLOCK, tokens, BLOCK):
                stage = step % STAGES
                at = [row * tokens + start, head * WIDTH]
                mbarrier.wait(ring_empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(q_filled.index(stage), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(q_desc, at, q_filled.index(stage), q_ring.index(stage))
                mbarrier.expect(dout_filled.index(stage), dout_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(dout_desc, at, dout_filled.index(stage), dout_ring.index(stage))
                step += 1
        index = next_tile(counter_ptr)
    announce_end(numbers, filled, empty, turn)


@gluon.jit
def compute_key_gradients(
    which: gl.constexpr, dk_desc, dv_desc, lse_ptr, delta_ptr, factors, memory, tokens, blocks, groups, rows, share,
    first_head, offset, SCALE: gl.constexpr, ROOT: gl.constexpr, EPS: gl.constexpr, PROJECTED: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Compute dk and dv of the first (which = 0) or second half of the keys of every tile of this program."""
    k_tiles, v_tiles, q_ring, dout_ring, numbers, filled, empty, q_filled, dout_filled, ring_empty = memory
    WIDTH: gl.constexpr = dk_desc.block_type.shape[1]
    DTYPE: gl.constexpr = dk_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    k, v = k_tiles.index(which), v_tiles.index(which)
    query = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
    step, turn = 0, 0
    mbarrier.wait(filled.index(which), 0)
    index = load_number(numbers, which)
    while index >= 0:
        block, group, row = tile_of(index, blocks, groups, rows, GROUP)
        first = 2 * (blocks - 1 - block)
        first_key = (first + which) * BLOCK
        key = first_key + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, s_layout))
        dk = gl.zeros([BLOCK, WIDTH], gl.float32, o_layout)
        dv = gl.zeros([BLOCK, WIDTH], gl.float32, o_layout)
        for head in range(group * share, (group + 1) * share):
            statistics = (row * groups * share + head) * tokens  # below 2³¹: as many heads would take 256 GiB in q
            for start in range(first * BLOCK, tokens, BLOCK):
                stage, phase = step % STAGES, step // STAGES & 1
                # the sums begin with what is to be subtracted from them, which then takes no registers
                lse = gl.load(lse_ptr + (statistics + start + query))
                x = gl.zeros([BLOCK, BLOCK], gl.float32, s_layout) - (lse * (LOG2E / SCALE))[None, :]
                dp = (
                    gl.zeros([BLOCK, BLOCK], gl.float32, s_layout)
                    - gl.load(delta_ptr + (statistics + start + query))[None, :]
                )
                q, dout = q_ring.index(stage), dout_ring.index(stage)
                mbarrier.wait(q_filled.index(stage), phase)
                x = warpgroup_mma(k, q.permute((1, 0)), x, is_async=True)
                mbarrier.wait(dout_filled.index(stage), phase)
                dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
                x = warpgroup_mma_wait(1, (x,))
                p = exp2(x * SCALE)
                if start < (first + 2) * BLOCK:
                    p = gl.where(key[:, None] <= (start + query)[None, :], p, 0.0)
                operand = gl.convert_layout(p.to(DTYPE), operand_layout)
                dv = warpgroup_mma(operand, dout, dv, is_async=True)
                dp = warpgroup_mma_wait(1, (dp,))
                operand = gl.convert_layout((p * dp).to(DTYPE), operand_layout)
                dk = warpgroup_mma(operand, q, dk, is_async=True)
                dv, dk = warpgroup_mma_wait(0, (dv, dk))
                mbarrier.arrive(ring_empty.index(stage), count=1)
                step += 1
        rows_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
        position = first_key + gl.arange(0, BLOCK, layout=rows_layout)
        number = (row * tokens).to(gl.int64) + position
        all_rows = (rows * tokens).to(gl.int64)
        of_keys, of_values = first_head + group, first_head + group + (groups if PROJECTED else 0)
        place_gradient(dv, v, v, number, of_values, factors, position + offset, all_rows, EPS, PROJECTED, False)
        place_gradient(dk * ROOT, k, k, number, of_keys, factors, position + offset, all_rows, EPS, PROJECTED, True)
        fence_async_shared()
        at = row * tokens + first_key
        tma.async_copy_shared_to_global(dv_desc, [at, of_values * WIDTH], v)
        tma.async_copy_shared_to_global(dk_desc, [at, of_keys * WIDTH], k)
        tma.store_wait(0)
        mbarrier.arrive(empty.index(which), count=1)
        turn += 1
        mbarrier.wait(filled.index(which), turn & 1)
        index = load_number(numbers, which)


@gluon.jit(do_not_specialize=["blocks", "total"])
def key_gradients_on_hopper(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, lse_ptr, delta_ptr, counter_ptr, factors, tokens, blocks, groups,
    rows, share, total, first_head, offset, SCALE: gl.constexpr, ROOT: gl.constexpr, EPS: gl.constexpr, PROJECTED: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Compute dk and dv in `total` tiles of 128 keys. A program that is free takes the next; counter: 0 at first."""
    k_tiles, v_tiles = ring(k_desc, 2), ring(v_desc, 2)
    q_ring, dout_ring = ring(q_desc, STAGES), ring(dout_desc, STAGES)
    filled, empty = barriers(2, 1), barriers(2, 1)
    q_filled, dout_filled, ring_empty = barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()  # the copies see the barriers
    numbers = numbers_of_tiles()
    memory = (k_tiles, v_tiles, q_ring, dout_ring, numbers, filled, empty, q_filled, dout_filled, ring_empty)
    gl.warp_specialize(
        [
            (compute_key_gradients, (
                0, dk_desc, dv_desc, lse_ptr, delta_ptr, factors, memory, tokens, blocks, groups, rows, share,
                first_head, offset, SCALE, ROOT, EPS, PROJECTED, STAGES, GROUP,
            )),
            (compute_key_gradients, (
                1, dk_desc, dv_desc, lse_ptr, delta_ptr, factors, memory, tokens, blocks, groups, rows, share,
                first_head, offset, SCALE, ROOT, EPS, PROJECTED, STAGES, GROUP,
            )),
            (load_for_keys, (
                q_desc, k_desc, v_desc, dout_desc, counter_ptr, memory, tokens, blocks, groups, rows, share, total, STAGES, GROUP,
            )),
        ],
        [4, 1],
        [COMPUTING, LOADING],
    )  # fmt: skip


def launch_query_gradient(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, dq: Tensor, delta: Tensor,
    factors: tuple[Tensor, ...], offset: int, constants: dict[str, float | bool], parameters: dict[str, int],
) -> None:  # fmt: skip
    """Launch the kernel for arguments that hopper_attention takes; factors: rstd, the heads' rstd, cos, sin and the sums."""
    batch, tokens, heads, width = q.shape
    total = batch * heads * (tokens // TILE)
    descriptors = [descriptor(rows_of_heads(x), 64, width) for x in (q, k, v, out, dout, dq)]
    launch(
        query_gradient_on_hopper, (min(total, multiprocessors(q.device)),), q.device, *descriptors, lse,
        lse if dlse is None else dlse, delta, tile_counter(q.device), factors,
        tokens, tokens // TILE, heads, batch, heads // k.size(2), total, offset,
        **constants, DLSE=dlse is not None, STAGES=parameters["STAGES"], GROUP=parameters["GROUP"], num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def launch_key_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    factors: tuple[Tensor, ...], offset: int, constants: dict[str, float | bool], parameters: dict[str, int],
) -> None:  # fmt: skip
    """Launch the kernel for arguments that hopper_attention takes; factors: rstd, the heads' rstd, cos, sin and the sums."""
    batch, tokens, heads, width = q.shape
    total = batch * k.size(2) * (tokens // TILE)
    descriptors = [descriptor(rows_of_heads(x), 64, width) for x in (q, k, v, dout, dk, dv)]
    launch(
        key_gradients_on_hopper, (min(total, multiprocessors(q.device)),), q.device, *descriptors, lse, delta,
        tile_counter(q.device), factors, tokens, tokens // TILE, k.size(2), batch, heads // k.size(2), total,
        heads if constants["PROJECTED"] else 0, offset,
        **constants, STAGES=parameters["STAGES"], GROUP=parameters["GROUP"], num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
