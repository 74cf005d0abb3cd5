"""Products of batched matrices with 16-bit elements: α·x·y + β·plus + γ·I, and only half of the work where it is symmetric.

A symmetric result (x·xᵀ, b·A + c·A², products of commuting symmetric matrices) is computed in the tiles of its lower triangle,
enumerated one after another so that no program is idle, and each element below the diagonal is stored twice: the result
is symmetric bit for bit. Sums are float32. x·xᵀ and xᵀ·x read x as it lies.
The blocks that newton_schulz is built of; not an operation of the package.
"""

import torch
from torch import Tensor

from kernels.configs import Kernel, launch_parameters
from kernels.triton_helpers import (
    DTYPES,
    INSTALLED,
    cast,
    cdiv,
    dot,
    multiprocessors,
    tl,
    triton,
)

if INSTALLED:
    from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_of(t, columns, BM: tl.constexpr, BN: tl.constexpr, SYMMETRIC: tl.constexpr):
    """First row and column of the tile that comes t-th. A triangle goes by groups of BN rows: group g has g + 1 tiles a row."""
    if SYMMETRIC:
        PER_GROUP: tl.constexpr = BN // BM
        group = ((tl.sqrt(8.0 * (t // PER_GROUP) + 1.0) - 1.0) * 0.5).to(tl.int32)
        # a square root that was rounded up or down
        group = tl.where(PER_GROUP * group * (group + 1) // 2 > t, group - 1, group)
        group = tl.where(PER_GROUP * (group + 1) * (group + 2) // 2 <= t, group + 1, group)
        rest = t - PER_GROUP * group * (group + 1) // 2
        row = group * BN + rest // (group + 1) * BM
        column = rest % (group + 1) * BN
    else:
        across = tl.cdiv(columns, BN)
        row, column = t // across * BM, t % across * BN
    return row, column


@triton.jit
def load_tile(
    x, matrix, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """ROWS × COLUMNS elements of x (batch, rows, columns), zeros outside; with TMA x is a descriptor of (batch·rows, columns)."""
    if TMA:
        tile = x.load([matrix * rows + row, column])
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        at = x + matrix.to(tl.int64) * rows * columns + (r * columns)[:, None] + c[None, :]
        if WHOLE:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(
    sums, plus, out, row, column, m, n, alpha, beta, gamma,
    SYMMETRIC: tl.constexpr, PLUS: tl.constexpr, DIAGONAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """alpha·sums + beta·plus + gamma·I to where it belongs; below the diagonal to both places."""
    r, c = row + tl.arange(0, sums.shape[0]), column + tl.arange(0, sums.shape[1])
    at = (r * n)[:, None] + c[None, :]
    inside = (r < m)[:, None] & (c < n)[None, :]
    sums *= alpha
    if PLUS:
        if WHOLE:
            sums += beta * tl.load(plus + at).to(tl.float32)
        else:
            sums += beta * tl.load(plus + at, mask=inside, other=0.0).to(tl.float32)
    if DIAGONAL:
        sums += tl.where(r[:, None] == c[None, :], gamma, 0.0)
    value = cast(sums, out.dtype.element_ty)
    if SYMMETRIC:
        mirrored = (c * n)[None, :] + r[:, None]
        if WHOLE and column + sums.shape[1] <= row + 1:  # no mask of single elements, with which no store is a wide one
            tl.store(out + at, value)
            tl.store(out + mirrored, value)
        else:
            below = inside & (c[None, :] <= r[:, None])
            tl.store(out + at, value, mask=below)
            tl.store(out + mirrored, value, mask=below)  # the diagonal twice, with the same
    elif WHOLE:
        tl.store(out + at, value)
    else:
        tl.store(out + at, value, mask=inside)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def product_kernel(
    x, y, plus, out, tiles, total, m, n, k, alpha, beta, gamma,
    X_TRANSPOSED: tl.constexpr, Y_TRANSPOSED: tl.constexpr, SYMMETRIC: tl.constexpr, PLUS: tl.constexpr,
    DIAGONAL: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """Tiles BM × BN of out (batch, m, n), `tiles` of each matrix and `total` of all, dealt out to the programs in turn."""
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        matrix = index // tiles
        row, column = tile_of(index % tiles, n, BM, BN, SYMMETRIC)
        sums = tl.zeros([BM, BN], tl.float32)
        for start in range(0, k, BK):
            if X_TRANSPOSED:
                a = load_tile(x, matrix, start, row, k, m, BK, BM, TMA, WHOLE).T
            else:
                a = load_tile(x, matrix, row, start, m, k, BM, BK, TMA, WHOLE)
            if Y_TRANSPOSED:
                b = load_tile(y, matrix, column, start, n, k, BN, BK, TMA, WHOLE).T
            else:
                b = load_tile(y, matrix, start, column, k, n, BK, BN, TMA, WHOLE)
            sums = dot(a, b, sums)
        base = matrix.to(tl.int64) * m * n
        parts = halves(sums)  # of which one at a time takes registers for its addresses
        if BN > 128 or not TMA:  # as do those that are loaded from
            parts = halves(parts[0]) + halves(parts[1])
        for i in tl.static_range(len(parts)):
            left = column + i * (BN // len(parts))
            wanted = left < row + BM if SYMMETRIC else True  # not above the diagonal
            if wanted:
                store_tile(
                    parts[i], plus + base, out + base, row, left, m, n, alpha, beta, gamma, SYMMETRIC, PLUS, DIAGONAL, WHOLE
                )  # fmt: skip


def tiles_of(m: int, n: int, tile_m: int, tile_n: int, symmetric: bool) -> int:
    """Tiles of one matrix."""
    if symmetric:
        return sum(i // (tile_n // tile_m) + 1 for i in range(cdiv(m, tile_m)))
    return cdiv(m, tile_m) * cdiv(n, tile_n)


def product(
    x: Tensor, y: Tensor, plus: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0,
    x_transposed: bool = False, y_transposed: bool = False, symmetric: bool = False, dtype: torch.dtype | None = None,
    parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """alpha·x·y + beta·plus + gamma·I for x (B, M, K), y (B, K, N), plus (B, M, N), all contiguous and of one dtype.

    x_transposed: x is given as (B, K, M); y_transposed: y as (B, N, K). symmetric: the caller knows that the result is.
    dtype: of the result, x's by default. Matrices of up to 2³¹ elements, as many as there are. Repeats bit for bit.
    """
    batch, m, k = x.shape if not x_transposed else (x.size(0), x.size(2), x.size(1))
    n = y.size(1) if y_transposed else y.size(2)
    out = torch.empty(batch, m, n, dtype=dtype or x.dtype, device=x.device)
    if not out.numel():
        return out
    name = "symmetric_product" if symmetric else "matrix_product"
    parameters = dict(parameters or launch_parameters(name, x.device, x.dtype, min(m, n)))
    bm, bn, bk = (parameters[name] for name in ("BM", "BN", "BK"))
    tiles = tiles_of(m, n, bm, bn, symmetric)
    programs = parameters.pop("PROGRAMS")
    total = tiles * batch
    # a descriptor sees the matrices one below the other: rows may pass into the next matrix, but not those summed over
    parameters["TMA"] = int(parameters["TMA"] and x.size(2) % 8 == 0 and y.size(2) % 8 == 0 and k % bk == 0)
    whole = m % bm == 0 and n % bn == 0 and k % bk == 0
    if parameters["TMA"]:
        x = descriptor(x, *((bk, bm) if x_transposed else (bm, bk)))
        y = descriptor(y, *((bn, bk) if y_transposed else (bk, bn)))
    product_kernel[(min(total, programs * multiprocessors(out.device)) if programs else total,)](
        x, y, out if plus is None else plus, out, tiles, total, m, n, k, alpha, beta, gamma,
        X_TRANSPOSED=x_transposed, Y_TRANSPOSED=y_transposed, SYMMETRIC=symmetric, PLUS=plus is not None,
        DIAGONAL=gamma != 0.0, WHOLE=whole, FLATTEN=programs > 0 and not symmetric, **parameters,
    )  # fmt: skip
    return out


def descriptor(x: Tensor, rows: int, columns: int):
    return TensorDescriptor.from_tensor(x.view(-1, x.size(2)), [rows, columns])


def _arguments(symmetric: bool):
    def arguments(size: int, dtype: torch.dtype, parameters: dict[str, int]):
        bm, bn, bk = (parameters[name] for name in ("BM", "BN", "BK"))
        x, y = "*T", "*T"
        if parameters["TMA"]:
            x, y = f"tensordesc<T[{bm}, {bk}]>", f"tensordesc<T[{bn if symmetric else bk}, {bk if symmetric else bn}]>"
        types = {"x": x, "y": y, "plus": "*T", "out": "*T"} | {
            name: "i32" for name in ("tiles", "total", "m", "n", "k")
        }
        types |= {name: "fp32" for name in ("alpha", "beta", "gamma")}
        flags = {"X_TRANSPOSED": False, "Y_TRANSPOSED": symmetric, "SYMMETRIC": symmetric, "PLUS": True}
        return types, flags | {
            "DIAGONAL": symmetric,
            "WHOLE": size % bm == size % bn == size % bk == 0,
            "FLATTEN": parameters["PROGRAMS"] > 0 and not symmetric,
        }

    return arguments


def _example(symmetric: bool):
    def example(size: int, dtype: torch.dtype, device: torch.device):
        x = torch.randn(max(1, 80 * 1280**2 // size**2), size, size, device=device).to(dtype)
        flags = {"symmetric": symmetric, "y_transposed": symmetric, "beta": 1.0}
        return lambda parameters: product(x, x, x, **flags, parameters=parameters)

    return example


WIDTHS = (256, 768, 1280, 2048)
SPACE = tuple(
    {"BM": bm, "BN": bn, "BK": bk, "PROGRAMS": programs, "TMA": tma, "num_warps": warps, "num_stages": stages}
    for bm, bn, bk, warps, stages in (
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
KERNELS = tuple(
    Kernel(name, product_kernel, WIDTHS, DTYPES[:2], SPACE, _arguments(symmetric), _example(symmetric))
    for name, symmetric in (("symmetric_product", True), ("matrix_product", False))
)
