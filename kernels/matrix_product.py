"""Batched products of 16-bit matrices, α·x·y + β·plus + γ·I, with half of the work for a symmetric result.

Of a symmetric result (x·xᵀ, b·A + c·A², products of commuting symmetric matrices) only the tiles of the lower triangle are computed.
They are numbered consecutively, so that no program is idle. Each element below the diagonal is stored twice, so that the result is
symmetric bit for bit. Sums are float32. x·xᵀ and xᵀ·x read x without copying or transposing it in memory.
newton_schulz is built from these products; this file does not define an operation of the package.
"""

import itertools

import torch
from torch import Tensor

from nanochat_kernels.architecture import TRITON_INSTALLED
from nanochat_kernels.checks import check_device
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.operation import Kernel
from nanochat_kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    cast,
    cdiv,
    dot,
    launch,
    multiprocessors,
    tl,
    triton,
)

if TRITON_INSTALLED:
    from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_position(t, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Return the first row and column of tile t. In a triangle, each tile row of the g-th BLOCK_N rows has g + 1 tiles."""
    if SYMMETRIC:
        PER_GROUP: tl.constexpr = BLOCK_N // BLOCK_M
        group = ((tl.sqrt(8.0 * (t // PER_GROUP) + 1.0) - 1.0) * 0.5).to(tl.int32)
        # correct the group by one, because the square root may be rounded up or down
        group = tl.where(PER_GROUP * group * (group + 1) // 2 > t, group - 1, group)
        group = tl.where(PER_GROUP * (group + 1) * (group + 2) // 2 <= t, group + 1, group)
        rest = t - PER_GROUP * group * (group + 1) // 2
        row = group * BLOCK_N + rest // (group + 1) * BLOCK_M
        column = rest % (group + 1) * BLOCK_N
    else:
        across = tl.cdiv(columns, BLOCK_N)
        row, column = t // across * BLOCK_M, t % across * BLOCK_N
    return row, column


@triton.jit
def load_tile(
    x_ptr, matrix, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Load ROWS × COLUMNS elements of x (batch, rows, columns), zeros outside; with TMA x_ptr is a descriptor (batch·rows, columns)."""
    if TMA:
        tile = x_ptr.load([matrix * rows + row, column])
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        ptr = x_ptr + matrix.to(tl.int64) * rows * columns + (r * columns)[:, None] + c[None, :]
        if WHOLE:
            tile = tl.load(ptr)
        else:
            tile = tl.load(ptr, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    sums, plus_ptr, out_ptr, row, column, m, n, alpha, beta, gamma,
    SYMMETRIC: tl.constexpr, PLUS: tl.constexpr, DIAGONAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store alpha·sums + beta·plus + gamma·I; of a symmetric result also store the mirror image of what is below the diagonal."""
    r, c = row + tl.arange(0, sums.shape[0]), column + tl.arange(0, sums.shape[1])
    offsets = (r * n)[:, None] + c[None, :]
    mask = (r < m)[:, None] & (c < n)[None, :]
    sums *= alpha
    if PLUS:
        if WHOLE:
            sums += beta * tl.load(plus_ptr + offsets).to(tl.float32)
        else:
            sums += beta * tl.load(plus_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if DIAGONAL:
        sums += tl.where(r[:, None] == c[None, :], gamma, 0.0)
    value = cast(sums, out_ptr.dtype.element_ty)
    if SYMMETRIC:
        mirrored = (c * n)[None, :] + r[:, None]
        if WHOLE and column + sums.shape[1] <= row + 1:  # a mask would split wide stores into single elements
            tl.store(out_ptr + offsets, value)
            tl.store(out_ptr + mirrored, value)
        else:
            below = mask & (c[None, :] <= r[:, None])
            tl.store(out_ptr + offsets, value, mask=below)
            tl.store(out_ptr + mirrored, value, mask=below)  # the diagonal is stored twice, with the same value
    elif WHOLE:
        tl.store(out_ptr + offsets, value)
    else:
        tl.store(out_ptr + offsets, value, mask=mask)


@triton.jit
def halves(tile):
    """Split a tile into the left and the right half of its columns."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def product_kernel(
    x_ptr, y_ptr, plus_ptr, out_ptr, tiles, total, m, n, k, alpha, beta, gamma,
    X_TRANSPOSED: tl.constexpr, Y_TRANSPOSED: tl.constexpr, SYMMETRIC: tl.constexpr, PLUS: tl.constexpr,
    DIAGONAL: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Compute out (batch, m, n) in tiles BLOCK_M × BLOCK_N; program p takes tiles p, p + num_programs, ….

    There are `tiles` tiles in each matrix and `total` in the batch.
    """
    # torch.compile may pass a float as float64
    alpha, beta, gamma = tl.cast(alpha, tl.float32), tl.cast(beta, tl.float32), tl.cast(gamma, tl.float32)
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        matrix = index // tiles
        row, column = tile_position(index % tiles, n, BLOCK_M, BLOCK_N, SYMMETRIC)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            if X_TRANSPOSED:
                a = load_tile(x_ptr, matrix, start, row, k, m, BLOCK_K, BLOCK_M, TMA, WHOLE).T
            else:
                a = load_tile(x_ptr, matrix, row, start, m, k, BLOCK_M, BLOCK_K, TMA, WHOLE)
            if Y_TRANSPOSED:
                b = load_tile(y_ptr, matrix, column, start, n, k, BLOCK_N, BLOCK_K, TMA, WHOLE).T
            else:
                b = load_tile(y_ptr, matrix, start, column, k, n, BLOCK_K, BLOCK_N, TMA, WHOLE)
            sums = dot(a, b, sums)
        base = matrix.to(tl.int64) * m * n
        parts = halves(sums)  # storing one part at a time needs fewer registers for addresses
        if BLOCK_N > 128 or not TMA:  # without TMA the loads need registers for addresses too
            parts = halves(parts[0]) + halves(parts[1])
        for i in tl.static_range(len(parts)):
            left = column + i * (BLOCK_N // len(parts))
            needed = left < row + BLOCK_M if SYMMETRIC else True  # false for a part wholly above the diagonal
            if needed:
                store_tile(
                    parts[i], plus_ptr + base, out_ptr + base, row, left, m, n, alpha, beta, gamma,
                    SYMMETRIC, PLUS, DIAGONAL, WHOLE,
                )  # fmt: skip


def tile_count(m: int, n: int, block_m: int, block_n: int, symmetric: bool) -> int:
    """Return the number of tiles of one matrix."""
    if symmetric:
        return sum(i // (block_n // block_m) + 1 for i in range(cdiv(m, block_m)))
    return cdiv(m, block_m) * cdiv(n, block_n)


def product(
    x: Tensor, y: Tensor, plus: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0,
    x_transposed: bool = False, y_transposed: bool = False, symmetric: bool = False, dtype: torch.dtype | None = None,
    parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return alpha·x·y + beta·plus + gamma·I for x (B, M, K), y (B, K, N), plus (B, M, N).

    x_transposed: x is given as (B, K, M); y_transposed: y is given as (B, N, K). symmetric: the caller guarantees that the result
    is symmetric. dtype: the dtype of the result, by default x's. A matrix may have up to 2³¹ elements; the batch has no limit.
    Repeated calls are bitwise equal. Raises ValueError for mismatched shapes, for tensors that are not contiguous, and for
    tensors whose dtype or device differs from x's.
    """
    batch, m, k = x.shape if not x_transposed else (x.size(0), x.size(2), x.size(1))
    n = y.size(1) if y_transposed else y.size(2)
    check_operands(x, y, plus, (batch, m, n), (batch, n, k) if y_transposed else (batch, k, n))
    out = torch.empty(batch, m, n, dtype=dtype or x.dtype, device=x.device)
    if not out.numel():
        return out
    name = "symmetric_product" if symmetric else "matrix_product"
    parameters = dict(parameters or launch_parameters(name, x.device, x.dtype, (m, n, k)))
    # a descriptor treats the batch as one tall matrix: a tile may run into the rows of the next matrix, but only where the
    # results are masked, not along the summed axis
    aligned = x.size(2) % 8 == y.size(2) % 8 == x.data_ptr() % 16 == y.data_ptr() % 16 == 0
    fits_int32 = batch * max(x.size(1), y.size(1)) <= GRID_LIMIT  # a descriptor's rows are int32
    if parameters["TMA"] and not (aligned and fits_int32 and k % parameters["BLOCK_K"] == 0):
        parameters |= {"TMA": 0, "BLOCK_N": min(parameters["BLOCK_N"], 128), "BLOCK_K": min(parameters["BLOCK_K"], 32)}
    block_m, block_n, block_k = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    whole = m % block_m == 0 and n % block_n == 0 and k % block_k == 0
    if not parameters["TMA"] and (x_transposed or not whole):  # addresses and masks take registers from the sums
        parameters["num_warps"] = max(parameters["num_warps"], block_m * block_n // 2048)
    tiles = tile_count(m, n, block_m, block_n, symmetric)
    programs, total = parameters.pop("PROGRAMS"), tiles * batch
    if parameters["TMA"]:
        x = descriptor(x, *((block_k, block_m) if x_transposed else (block_m, block_k)))
        y = descriptor(y, *((block_n, block_k) if y_transposed else (block_k, block_n)))
    launch(
        product_kernel, (min(total, programs * multiprocessors(out.device)) if programs else total,), out.device,
        x, y, out if plus is None else plus, out, tiles, total, m, n, k, float(alpha), float(beta), float(gamma),
        X_TRANSPOSED=x_transposed, Y_TRANSPOSED=y_transposed, SYMMETRIC=symmetric, PLUS=plus is not None,
        DIAGONAL=gamma != 0.0, WHOLE=whole, FLATTEN=programs > 0 and not symmetric, **parameters,
    )  # fmt: skip
    return out


def check_operands(x: Tensor, y: Tensor, plus: Tensor | None, out_shape: tuple, y_shape: tuple) -> None:
    """Raise ValueError for operands that the kernel would read wrongly."""
    tensors = {"x": x, "y": y} | ({} if plus is None else {"plus": plus})
    check_device("product", **tensors)
    for name, tensor, shape in (("y", y, y_shape), ("plus", plus, out_shape)):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"product: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"product: {name} must be contiguous, got strides {tensor.stride()}")
        if tensor.dtype != x.dtype or tensor.dtype not in DTYPES[:2]:
            raise ValueError(f"product: all must be bfloat16 or all float16, got {name} in {tensor.dtype}")


def descriptor(x: Tensor, rows: int, columns: int):
    return TensorDescriptor.from_tensor(x.view(-1, x.size(2)), [rows, columns])


def launches_of(symmetric: bool):
    """Return Kernel.launches: what newton_schulz launches at its shapes, and at other sizes every transposition and addend."""

    def launches(key, dtype: torch.dtype, device: torch.device):
        m, n, k = key
        batch = max(1, 80 * 1280**2 // (m * n))
        sets = {}

        def normal(*shape: int) -> Tensor:
            return torch.empty(batch, *shape, device=device, dtype=dtype).normal_()

        def add(name: str, x_transposed: bool, y_transposed: bool, plus: bool, gamma: float = 0.0, to=dtype) -> None:
            x, y = normal(*((k, m) if x_transposed else (m, k))), normal(*((n, k) if y_transposed else (k, n)))
            added = normal(m, n) if plus else None
            sets[name] = lambda parameters: product(
                x, y, added, beta=float(plus), gamma=gamma, x_transposed=x_transposed, y_transposed=y_transposed,
                symmetric=symmetric, dtype=to, parameters=parameters,
            )  # fmt: skip

        add("plus", False, symmetric, True)
        add("product", False, symmetric, False)
        if symmetric:
            add("x transposed", True, False, False)
            add("plus, diagonal", False, True, True, 1.5)
        elif dtype == torch.float16:  # newton_schulz computes in float16 and returns the gradient's dtype
            add("plus, to bfloat16", False, False, True, to=torch.bfloat16)
            add("product, to bfloat16", False, False, False, to=torch.bfloat16)
        for x_transposed, y_transposed in TRANSPOSITIONS if key in MORE_KEYS else ():
            name = f"x{'ᵀ' * x_transposed}·y{'ᵀ' * y_transposed}"
            add(name, x_transposed, y_transposed, False)
            add(f"{name}, plus, diagonal", x_transposed, y_transposed, True, 1.5)
        return sets

    return launches


TRANSPOSITIONS = tuple(itertools.product((False, True), repeat=2))
WIDTHS = (256, 768, 1280, 2048)  # the model's matrices are w × w, 4w × w and w × 4w
SYMMETRIC_KEYS = tuple((w, w, k) for w in WIDTHS for k in (w, 4 * w))
KEYS = tuple(key for w in WIDTHS for key in ((w, w, w), (w, 4 * w, w), (4 * w, w, w)))
# whole tiles; ragged tiles with descriptors; ragged tiles without
MORE_KEYS = ((1536, 1536, 1536), (1216, 1216, 1216), (1001, 1001, 1001))
SPACE = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PROGRAMS": programs, "TMA": tma, "num_warps": w, "num_stages": stages}
    for m, n, k, w, stages in (
        (64, 64, 64, 4, 3),
        (64, 128, 64, 4, 3),
        (128, 128, 32, 4, 3),
        (128, 128, 32, 4, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 2),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
    )
    for programs in (0, 1, 2)
    for tma in (0, 1)
)
KERNELS = (
    Kernel("symmetric_product", DTYPES[:2], SYMMETRIC_KEYS, SPACE, launches_of(True), MORE_KEYS),
    Kernel("matrix_product", DTYPES[:2], KEYS, SPACE, launches_of(False), MORE_KEYS),
)
