"""The matrix product for sm_90, in Gluon: two groups of warps compute, and another warp loads for both.

With tiles of 128 × 128 (or 64 rows) the groups take turns at the tensor cores: while one computes the sums of its tile, the other
applies the epilogue to its own and stores it, so that the epilogue costs no time unless it takes longer than the sums. Tiles of
256 × 128 or 128 × 256 they share, each computing half of the rows: fewer bytes are loaded for each operation, which saves power, and
where K is large the epilogue matters less. (The "ping-pong" and "cooperative" schedules of CUTLASS.) All reads and writes of
matrices are asynchronous copies through shared memory, also those of the matrices that an epilogue reads: they are loaded while
the sums are computed. matrix_product.py chooses this kernel by the launch table and describes what it computes.

A Gluon epilogue handles PART columns of a tile:

    epilogue(sums, out_desc, first, second, arguments, row, column, m, n)

`first` and `second` are the shared memory with those elements of the two matrices; the result is stored through `first`.
"""

import torch
from torch import Tensor

from nanochat_kernels.architecture import TRITON_INSTALLED
from nanochat_kernels.triton_helpers import cdiv, launch, multiprocessors, tl, triton

if TRITON_INSTALLED:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
else:
    gluon, gl = triton, tl  # stand-ins of triton_helpers.py

SHARED_TILE = 256 * 128  # elements of a tile that both groups share
# registers of a thread: 65,536 of a multiprocessor for three groups of 128 threads, most of them for the two that compute
REGISTERS = 168
COMPUTING = gl.constexpr(240) if TRITON_INSTALLED else 240
LOADING = gl.constexpr(24) if TRITON_INSTALLED else 24


@gluon.jit
def tile_position(t, m, n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """Return the first row and column of tile t; GROUP tile rows are walked together, column by column."""
    across = gl.cdiv(n, BLOCK_N)
    first = t // (GROUP * across) * GROUP
    rows = gl.minimum(gl.cdiv(m, BLOCK_M) - first, GROUP)
    rest = t % (GROUP * across)
    return (first + rest % rows) * BLOCK_M, rest // rows * BLOCK_N


@gluon.jit
def load_tiles(
    x_desc, y_desc, memory, m, n, k, total, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, Y_TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Load the operands of all tiles of this program into the ring of stages."""
    x_ring, y_ring, filled, empty, _, _, _ = memory
    step = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        row, column = tile_position(index, m, n, BLOCK_M, BLOCK_N, GROUP)
        for start in range(0, k, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bar = filled.index(stage)
            mbarrier.expect(bar, x_desc.block_type.nbytes + y_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [row, start], bar, x_ring.index(stage))
            if Y_TRANSPOSED:
                tma.async_copy_global_to_shared(y_desc, [column, start], bar, y_ring.index(stage))
            else:
                tma.async_copy_global_to_shared(y_desc, [start, column], bar, y_ring.index(stage))
            step += 1


@gluon.jit
def load_parts(
    first_desc, second_desc, parts, bar, row, column, period, base: gl.constexpr, COUNT: gl.constexpr,
    EXTRAS: gl.constexpr,
):  # fmt: skip
    """Begin to load COUNT parts of the matrix that an epilogue reads, or one part of each of two."""
    fence_async_shared()  # the memory may have been read and written by ordinary instructions before
    mbarrier.expect(bar, COUNT * EXTRAS * first_desc.block_type.nbytes)
    for i in gl.static_range(COUNT):
        at = [row, column + i * first_desc.block_type.shape[1]] if period is None else [row % period, 0]
        tma.async_copy_global_to_shared(first_desc, at, bar, parts.index(base + i))
    if EXTRAS == 2:
        tma.async_copy_global_to_shared(second_desc, [row, column], bar, parts.index(base + 1))


@gluon.jit
def compute_tiles(
    which: gl.constexpr, descriptors, memory, arguments, m, n, k, total, period, EPILOGUE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    EXTRAS: gl.constexpr, Y_TRANSPOSED: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Compute every second tile of this program, beginning with its first (which = 0) or its second (which = 1).

    If SHARED, both groups compute a half of each tile instead.
    """
    out_desc, first_desc, second_desc = descriptors
    x_ring, y_ring, filled, empty, parts, parts_filled, turns = memory
    PARTS: gl.constexpr = BLOCK_N // PART
    # two matrices are read one part at a time, for which the memory suffices
    AHEAD: gl.constexpr = 1 if EXTRAS == 2 else PARTS
    base: gl.constexpr = which * (parts.type.shape[0] // 2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    parts_bar = parts_filled.index(which)
    steps = gl.cdiv(k, BLOCK_K)
    turn = 0
    TURNS: gl.constexpr = 1 if SHARED else 2
    ROWS: gl.constexpr = BLOCK_M // 2 if SHARED else BLOCK_M
    begin = gl.program_id(0) if SHARED else gl.program_id(0) + which * gl.num_programs(0)
    for index in range(begin, total, TURNS * gl.num_programs(0)):
        row, column = tile_position(index, m, n, BLOCK_M, BLOCK_N, GROUP)
        if SHARED:
            row += which * ROWS
        if EXTRAS > 0:
            load_parts(first_desc, second_desc, parts, parts_bar, row, column, period, base, AHEAD, EXTRAS)
        sums = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        step = turn * steps
        if not SHARED:
            # Only when the other group has seen all stages before may this one look at them: a barrier tells even phases from
            # odd ones, but not how many have passed.
            mbarrier.wait(turns.index(which), (turn & 1) ^ (1 - which))
            step = (2 * turn + which) * steps
        for i in range(steps):
            stage = step % STAGES
            mbarrier.wait(filled.index(stage), step // STAGES & 1)
            y = y_ring.index(stage)
            if Y_TRANSPOSED:
                y = y.permute((1, 0))
            x = x_ring.index(stage)
            if SHARED:
                x = x.slice(which * ROWS, ROWS, dim=0)
            running = warpgroup_mma(x, y, sums, use_acc=i > 0, is_async=True)
            sums = warpgroup_mma_wait(1, (running,))  # the product of the stage before is complete
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
            step += 1
        if not SHARED:
            mbarrier.arrive(turns.index(1 - which), count=1)
        sums = warpgroup_mma_wait(0, (sums,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        split = parts_of(sums, PARTS)
        for i in gl.static_range(PARTS):
            left = column + i * PART
            if EXTRAS > 0 and i >= AHEAD:
                tma.store_wait(0)
                load_parts(first_desc, second_desc, parts, parts_bar, row, left, period, base, AHEAD, EXTRAS)
            if EXTRAS > 0 and i % AHEAD == 0:
                mbarrier.wait(parts_bar, turn * (PARTS // AHEAD) + i // AHEAD & 1)
            first, second = parts.index(base + i % AHEAD), parts.index(base + (1 if EXTRAS == 2 else 0))
            EPILOGUE(split[i], out_desc, first, second, arguments, row, left, m, n)
        tma.store_wait(0)
        turn += 1  # noqa: SIM113


@gluon.jit(do_not_specialize=["total"])
def hopper_kernel(
    x_desc, y_desc, out_desc, first_desc, second_desc, arguments, m, n, k, total, period, EPILOGUE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, EXTRAS: gl.constexpr, Y_TRANSPOSED: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Compute out (m, n) in tiles BLOCK_M × BLOCK_N; program p takes tiles p, p + num_programs, …, of `total`."""
    EACH: gl.constexpr = 2 if EXTRAS == 2 else BLOCK_N // PART
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    y_ring = gl.allocate_shared_memory(y_desc.dtype, [STAGES] + y_desc.block_type.shape, y_desc.layout)  # noqa: RUF005
    parts = gl.allocate_shared_memory(out_desc.dtype, [2 * EACH] + out_desc.block_type.shape, out_desc.layout)  # noqa: RUF005
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 if SHARED else 1)
    parts_filled = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(parts_filled.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()  # the copies see the barriers
    descriptors = (out_desc, first_desc, second_desc)
    memory = (x_ring, y_ring, filled, empty, parts, parts_filled, turns)
    gl.warp_specialize(
        [
            (compute_tiles, (
                0, descriptors, memory, arguments, m, n, k, total, period, EPILOGUE, BLOCK_M, BLOCK_N, BLOCK_K, PART,
                STAGES, GROUP, EXTRAS, Y_TRANSPOSED, SHARED,
            )),
            (compute_tiles, (
                1, descriptors, memory, arguments, m, n, k, total, period, EPILOGUE, BLOCK_M, BLOCK_N, BLOCK_K, PART,
                STAGES, GROUP, EXTRAS, Y_TRANSPOSED, SHARED,
            )),
            (load_tiles, (
                x_desc, y_desc, memory, m, n, k, total, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP, Y_TRANSPOSED,
            )),
        ],
        [4, 1],
        [COMPUTING, LOADING],
    )  # fmt: skip


@gluon.jit
def halves(tile):
    """Split a tile into the left and the right half of its columns."""
    return gl.split(gl.permute(gl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@gluon.jit
def parts_of(tile, PARTS: gl.constexpr):
    """Split a tile into PARTS parts of its columns, from left to right; PARTS is a power of two."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = halves(tile)
        parts = parts_of(left, PARTS // 2) + parts_of(right, PARTS // 2)
    return parts


@gluon.jit
def row_numbers(sums, row):
    """Return the number of each row of a part, in its layout."""
    return row + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, sums.type.layout))


@gluon.jit
def load_rows(x_ptr, sums, row, m):
    """Load one number for each row of a part, 0 outside."""
    r = row_numbers(sums, row)
    return gl.load(x_ptr + r, mask=r < m, other=0.0)


@gluon.jit
def store_row_sums(x_ptr, sums, part, row, column, m, n):
    """Store the sum of each row of a part into x (parts, M): its rows are numbered by the part's position in the row."""
    r = row_numbers(part, row)
    at = x_ptr + (column // part.shape[1]).to(gl.int64) * m + r
    gl.store(at, sums, mask=(r < m) & (column < n))


@gluon.jit
def store_memory(out_desc, memory, row, column):
    """Begin to copy a part of the result from shared memory."""
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], memory)


@gluon.jit
def store_part(part, out_desc, memory, row, column):
    """Round a part and begin to store it through shared memory."""
    memory.store(part.to(out_desc.dtype))
    store_memory(out_desc, memory, row, column)


@gluon.jit
def scale_rows_on_hopper(sums, out_desc, first, second, arguments, row, column, m, n):
    """Store the sums, multiplied by a factor for each row if there is one."""
    if arguments[0] is not None:
        sums *= load_rows(arguments[0], sums, row, m)[:, None]
    store_part(sums, out_desc, first, row, column)


def hopper_product(
    x: Tensor, y: Tensor, out: Tensor, epilogue, parameters: dict[str, int], arguments: tuple, extras: list[Tensor],
    y_transposed: bool,
) -> None:  # fmt: skip
    """Launch the kernel for x (M, K), y (K, N) or (N, K), out (M, N) and extras, up to two matrices of its shape.

    An only extra of another shape (rows, PART) repeats in every part; a tile must not cross the end of its rows.
    """
    block_m, block_n, block_k, part = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PART"))
    shared = block_m * block_n == SHARED_TILE
    total = cdiv(out.size(0), block_m) * cdiv(out.size(1), block_n)
    period = extras[0].size(0) if extras and extras[0].shape != out.shape else None
    launch(
        hopper_kernel, (min(total, multiprocessors(out.device)),), out.device,
        descriptor(x, block_m, block_k),
        descriptor(y, block_n, block_k) if y_transposed else descriptor(y, block_k, block_n),
        *(descriptor(t, block_m // 2 if shared else block_m, part) for t in (out, *extras, out, out)[:3]),
        arguments, *out.shape, x.size(1), total, period, EPILOGUE=epilogue, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        PART=part, STAGES=parameters["STAGES"], GROUP=parameters["GROUP"], EXTRAS=len(extras),
        Y_TRANSPOSED=y_transposed, SHARED=shared, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def descriptor(x: Tensor, rows: int, columns: int):
    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)
