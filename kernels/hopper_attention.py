"""Attention's forward pass for sm_90, in Gluon: whole causal sequences of heads with a bound, as training has them.

A tile is 128 queries of one head. Two groups of warps compute 64 of them each, and another warp loads for both, also of the next
tile. Within a group the tensor cores compute the scores of a block of keys and add what the block before it contributes, while
the group computes exponentials; with TURNS the groups also take turns at the tensor cores. Blocks are taken from the diagonal
backwards, so that only the first is masked. attention_kernels.py has the notation, and the same for every other call.
Shah et al. 2024 (FlashAttention-3).
"""

import torch
from torch import Tensor

from nanochat_kernels.architecture import TRITON_INSTALLED
from nanochat_kernels.hopper_product import COMPUTING, LOADING, REGISTERS, descriptor, gl, gluon
from nanochat_kernels.triton_helpers import LN2, exp2, launch, multiprocessors, round_both

if TRITON_INSTALLED:
    from nanochat_kernels.hopper_product import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

TILE = 128  # queries, and keys of a block, of which then only the first is masked


@gluon.jit
def ring(desc, COUNT: gl.constexpr):
    """Return shared memory for COUNT blocks of a matrix."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)  # noqa: RUF005


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return COUNT barriers, each of which waits for so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def tile_of(index, blocks, heads, rows, GROUP: gl.constexpr):
    """Return the block of a tile, of which the last have the most keys and come first, its head, and the row of the batch.

    GROUP heads are worked on together; see attention_kernels.block_and_head.
    """
    first = index // (GROUP * blocks) * GROUP
    size = gl.minimum(rows * heads - first, GROUP)
    within = index % (GROUP * blocks)
    number = first + within % size
    return blocks - 1 - within // size, number % heads, number // heads


@gluon.jit
def next_tile(counter_ptr):
    """Return the number of the tile that this program's loading warp takes after its first, as programs become free for them."""
    return gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)


@gluon.jit
def numbers_of_tiles():
    """Return shared memory for the number of each group's tile."""
    return gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def store_number(numbers, which: gl.constexpr, index):
    """Tell a group which tile comes next, in front of the arrival at the barrier that the group waits for."""
    numbers.index(which).store(gl.full([1], index, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def load_number(numbers, which: gl.constexpr):
    """Return the number that store_number left, or −1 after the last tile."""
    return gl.max(numbers.index(which).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def announce_end(numbers, filled, empty, turn):
    """Tell both groups that no tile comes next."""
    for which in gl.static_range(2):
        mbarrier.wait(empty.index(which), (turn & 1) ^ 1)
        store_number(numbers, which, -1)
        mbarrier.arrive(filled.index(which), count=1)


@gluon.jit
def load_keys(k_desc, v_desc, memory, first_row, steps, head, step, STAGES: gl.constexpr):
    """Load the first `steps` blocks of keys and values of a head, from the last to the first; return the number of the next step."""
    k_ring, v_ring, k_filled, k_empty, v_filled, v_empty = memory
    ROWS: gl.constexpr = k_desc.block_type.shape[0]
    WIDTH: gl.constexpr = k_desc.block_type.shape[1]
    for i in range(steps):
        stage, phase = step % STAGES, (step // STAGES & 1) ^ 1
        at = [first_row + (steps - 1 - i) * ROWS, head * WIDTH]
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_filled.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, at, k_filled.index(stage), k_ring.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_filled.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, at, v_filled.index(stage), v_ring.index(stage))
        step += 1
    return step


@gluon.jit
def load_blocks(
    q_desc, k_desc, v_desc, counter_ptr, memory, tokens, blocks, heads, rows, share, total, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Load the queries, keys and values of all tiles of this program."""
    q_tiles, k_ring, v_ring, _, numbers, q_filled, q_empty, k_filled, k_empty, v_filled, v_empty, _ = memory
    keys_memory = (k_ring, v_ring, k_filled, k_empty, v_filled, v_empty)
    HALF: gl.constexpr = q_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[0]
    WIDTH: gl.constexpr = q_desc.block_type.shape[1]
    step, turn = 0, 0
    index = gl.program_id(0)
    while index < total:
        block, head, row = tile_of(index, blocks, heads, rows, GROUP)
        for which in gl.static_range(2):
            mbarrier.wait(q_empty.index(which), (turn & 1) ^ 1)
            store_number(numbers, which, index)
            bar = q_filled.index(which)
            mbarrier.expect(bar, q_desc.block_type.nbytes)
            at = [row * tokens + block * (2 * HALF) + which * HALF, head * WIDTH]
            tma.async_copy_global_to_shared(q_desc, at, bar, q_tiles.index(which))
        turn += 1
        steps = (block + 1) * (2 * HALF) // BLOCK_N
        step = load_keys(k_desc, v_desc, keys_memory, row * tokens, steps, head // share, step, STAGES)
        index = next_tile(counter_ptr)
    announce_end(numbers, q_filled, q_empty, turn)


@gluon.jit
def rounded_probabilities(x, total, rounded, SCALE: gl.constexpr, SHIFT: gl.constexpr, DTYPE: gl.constexpr):
    """Return p of a block's scores as the operand of the product with v, and the sums of p and of p rounded with it."""
    p = exp2(x * SCALE - SHIFT)
    p_rounded, as_float = round_both(p, DTYPE)
    total += gl.sum(p, axis=1)
    rounded += gl.sum(as_float, axis=1)
    return p_rounded, total, rounded


@gluon.jit
def compute_rows(
    which: gl.constexpr, out_desc, lse_ptr, memory, tokens, blocks, heads, rows, SCALE: gl.constexpr,
    SHIFT: gl.constexpr, LEAST: gl.constexpr, MOST: gl.constexpr, KEEP_LSE: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Compute the first (which = 0) or second half of the rows of every tile of this program."""
    q_tiles, k_ring, v_ring, out_tiles, numbers, q_filled, q_empty, k_filled, k_empty, v_filled, v_empty, turns = memory
    HALF: gl.constexpr = out_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = k_ring.type.shape[1]
    WIDTH: gl.constexpr = out_desc.block_type.shape[1]
    DTYPE: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = q_tiles.index(which)
    step, turn, taken = 0, 0, 0
    mbarrier.wait(q_filled.index(which), 0)
    index = load_number(numbers, which)
    while index >= 0:
        block, head, row = tile_of(index, blocks, heads, rows, GROUP)
        first = block * (2 * HALF) + which * HALF
        steps = (block + 1) * (2 * HALF) // BLOCK_N
        t = first + gl.arange(0, HALF, layout=row_layout)
        # the block on the diagonal
        stage = step % STAGES
        mbarrier.wait(k_filled.index(stage), step // STAGES & 1)
        x = gl.zeros([HALF, BLOCK_N], gl.float32, s_layout)
        x = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), x, use_acc=False, is_async=True)
        x = warpgroup_mma_wait(0, (x,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        key = (steps - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
        x = gl.where(key[None, :] <= t[:, None], x, float("-inf"))
        total = gl.zeros([HALF], gl.float32, row_layout)
        rounded = gl.zeros([HALF], gl.float32, row_layout)
        p, total, rounded = rounded_probabilities(x, total, rounded, SCALE, SHIFT, DTYPE)
        sums = gl.zeros([HALF, WIDTH], gl.float32, o_layout)
        for i in range(1, steps):
            now, before = (step + 1) % STAGES, step % STAGES
            mbarrier.wait(k_filled.index(now), (step + 1) // STAGES & 1)
            if TURNS:
                mbarrier.wait(turns.index(which), (taken & 1) ^ (1 - which))
            x = gl.zeros([HALF, BLOCK_N], gl.float32, s_layout)
            x = warpgroup_mma(q, k_ring.index(now).permute((1, 0)), x, use_acc=False, is_async=True)
            mbarrier.wait(v_filled.index(before), step // STAGES & 1)
            operand = gl.convert_layout(p, p_layout)
            sums = warpgroup_mma(operand, v_ring.index(before), sums, use_acc=i > 1, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index(1 - which), count=1)
                taken += 1
            x = warpgroup_mma_wait(1, (x,))
            mbarrier.arrive(k_empty.index(now), count=1)
            p, total, rounded = rounded_probabilities(x, total, rounded, SCALE, SHIFT, DTYPE)
            sums = warpgroup_mma_wait(0, (sums,))
            mbarrier.arrive(v_empty.index(before), count=1)
            step += 1
        mbarrier.arrive(q_empty.index(which), count=1)
        stage = step % STAGES
        mbarrier.wait(v_filled.index(stage), step // STAGES & 1)
        operand = gl.convert_layout(p, p_layout)
        sums = warpgroup_mma(operand, v_ring.index(stage), sums, use_acc=steps > 1, is_async=True)
        sums = warpgroup_mma_wait(0, (sums,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
        seen = (t + 1).to(gl.float32)
        fits = (rounded >= LEAST * seen) & (rounded <= MOST)
        factor = gl.where(fits, 1.0 / rounded, float("nan"))
        tma.store_wait(0)  # of the tile before
        out = out_tiles.index(which)
        out.store((sums * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]).to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row * tokens + first, head * WIDTH], out)
        if KEEP_LSE:
            lse = gl.where(fits, (SHIFT + gl.log2(total)) * LN2, float("nan"))
            gl.store(lse_ptr + ((row * heads + head).to(gl.int64) * tokens + t), lse)
        turn += 1
        mbarrier.wait(q_filled.index(which), turn & 1)
        index = load_number(numbers, which)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["blocks", "total"])
def hopper_attention_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, counter_ptr, tokens, blocks, heads, rows, share, total, SCALE: gl.constexpr,
    SHIFT: gl.constexpr, LEAST: gl.constexpr, MOST: gl.constexpr, KEEP_LSE: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Compute the attention of whole sequences in `total` tiles. A program that is free takes the next; counter: 0 at first."""
    q_tiles, out_tiles, k_ring, v_ring = ring(q_desc, 2), ring(out_desc, 2), ring(k_desc, STAGES), ring(v_desc, STAGES)
    q_filled, q_empty, turns = barriers(2, 1), barriers(2, 1), barriers(2, 1)
    k_filled, k_empty, v_filled, v_empty = (
        barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2),
    )  # fmt: skip
    fence_async_shared()  # the copies see the barriers
    numbers = numbers_of_tiles()
    memory = (
        q_tiles, k_ring, v_ring, out_tiles, numbers, q_filled, q_empty, k_filled, k_empty, v_filled, v_empty, turns,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (compute_rows, (
                0, out_desc, lse_ptr, memory, tokens, blocks, heads, rows, SCALE, SHIFT, LEAST, MOST, KEEP_LSE,
                STAGES, GROUP, TURNS,
            )),
            (compute_rows, (
                1, out_desc, lse_ptr, memory, tokens, blocks, heads, rows, SCALE, SHIFT, LEAST, MOST, KEEP_LSE,
                STAGES, GROUP, TURNS,
            )),
            (load_blocks, (
                q_desc, k_desc, v_desc, counter_ptr, memory, tokens, blocks, heads, rows, share, total, STAGES, GROUP,
            )),
        ],
        [4, 1],
        [COMPUTING, LOADING],
    )  # fmt: skip


def takes(q: Tensor, *others: Tensor) -> bool:
    """Return whether the kernels for sm_90 can read heads (B, T, …, D): whole tiles, heads side by side, rows without gaps."""
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    tokens, width = q.size(1), q.size(3)
    return q.size(0) > 0 and tokens > 0 and tokens % TILE == 0 and width in (64, 128) and all(
        x.size(1) == tokens and x.stride(3) == 1 and x.stride(2) == width and (x.size(0) == 1 or x.stride(0) == tokens * x.stride(1))
        and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in (q, *others)
    )  # fmt: skip


def launch_tiles(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, constants: dict[str, float], keep_lse: bool,
    parameters: dict[str, int],
) -> None:  # fmt: skip
    """Launch the kernel for q (B, T, H, D), k and v (B, T, G, D) that it takes; stores out (B, T, H, D) and lse (B, H, T)."""
    batch, tokens, heads, width = q.shape
    blocks = tokens // TILE
    total = batch * heads * blocks
    block_n = parameters["BLOCK_N"]
    constants = {name: value for name, value in constants.items() if name != "BOUNDED"}
    launch(
        hopper_attention_kernel, (min(total, multiprocessors(q.device)),), q.device,
        descriptor(rows_of_heads(q), TILE // 2, width), descriptor(rows_of_heads(k), block_n, width),
        descriptor(rows_of_heads(v), block_n, width), descriptor(rows_of_heads(out), TILE // 2, width), lse,
        tile_counter(q.device), tokens, blocks, heads, batch, heads // k.size(2), total, **constants, KEEP_LSE=keep_lse,
        STAGES=parameters["STAGES"], GROUP=parameters["GROUP"], TURNS=parameters["TURNS"], num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def tile_counter(device: torch.device) -> Tensor:
    """Return what the programs of a launch count their tiles with."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def rows_of_heads(x: Tensor) -> Tensor:
    """Return x (B, T, H, D) as a matrix (B·T, H·D), without a copy."""
    return torch.as_strided(x, (x.size(0) * x.size(1), x.size(2) * x.size(3)), (x.stride(1), 1))
