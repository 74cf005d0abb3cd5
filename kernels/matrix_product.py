"""The one matrix-product kernel of the package. An operation gives it an epilogue, which is applied to each tile of the sums.

out = epilogue(x·y), where x is (M, K) and y (K, N), each also as the transpose of what lies in memory, or a batch of such matrices.
Sums are float32. An epilogue is a `@triton.jit` function that gets a part of a tile and stores the result:

    epilogue(sums, out_ptr, out_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n, WHOLE)

`sums` (BLOCK_M, PART) are the elements from (row, column) on; `first` and `second` are matrices of the result's shape that the
epilogue may read, and `arguments` a tuple of pointers and numbers. The same epilogue serves a product that torch computes
("TORCH": 1 in the launch table, where that is faster): it is then applied in one pass over the stored product.

On sm_80 tiles are read through pointers, one program per tile. On sm_90 the kernel of hopper_product.py takes its place, except for
batches and triangles, which are read through tensor descriptors here, and for few rows, as in decoding: then narrow tiles, and
slices of K, keep all multiprocessors reading the weight.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_kernels.architecture import TRITON_INSTALLED
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.hopper_product import hopper_product, scale_rows_on_hopper
from nanochat_kernels.product_configurations import BY_TORCH, FEWEST_ROWS, UNALIGNED
from nanochat_kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    cast,
    cdiv,
    dot,
    launch,
    multiprocessors,
    power_of_2,
    tl,
    triton,
    triton_unsupported_reason,
)

if TRITON_INSTALLED:
    from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_position(
    t, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, TRIANGLE: tl.constexpr
):  # fmt: skip
    """Return the first row and column of tile t.

    In a triangle, each tile row of the g-th BLOCK_N rows has g + 1 tiles. Otherwise GROUP tile rows are walked together, column by
    column, so that the tiles computed at the same time share what they read.
    """
    if TRIANGLE:
        PER_GROUP: tl.constexpr = BLOCK_N // BLOCK_M
        group = ((tl.sqrt(8.0 * (t // PER_GROUP) + 1.0) - 1.0) * 0.5).to(tl.int32)
        # correct the group by one, because the square root may be rounded up or down
        group = tl.where(PER_GROUP * group * (group + 1) // 2 > t, group - 1, group)
        group = tl.where(PER_GROUP * (group + 1) * (group + 2) // 2 <= t, group + 1, group)
        rest = t - PER_GROUP * group * (group + 1) // 2
        row = group * BLOCK_N + rest // (group + 1) * BLOCK_M
        column = rest % (group + 1) * BLOCK_N
    else:
        across = tl.cdiv(n, BLOCK_N)
        first = t // (GROUP * across) * GROUP
        rows = tl.minimum(tl.cdiv(m, BLOCK_M) - first, GROUP)
        rest = t % (GROUP * across)
        row, column = (first + rest % rows) * BLOCK_M, rest // rows * BLOCK_N
    return row, column


@triton.jit
def block_pointers(x_ptr, stride, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers to ROWS × COLUMNS elements of a matrix from (row, column) on. Only the first offset can exceed 2³¹."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return x_ptr + (tl.cast(row, tl.int64) * stride + column) + ((r * stride)[:, None] + c[None, :])


@triton.jit
def block_mask(row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (row + tl.arange(0, ROWS) < rows)[:, None] & (column + tl.arange(0, COLUMNS) < columns)[None, :]


@triton.jit
def load_block(
    x_ptr, stride, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):
    """Load ROWS × COLUMNS elements of a matrix (rows, columns), zeros outside."""
    if WHOLE:
        block = tl.load(block_pointers(x_ptr, stride, row, column, ROWS, COLUMNS))
    else:
        mask = block_mask(row, column, rows, columns, ROWS, COLUMNS)
        block = tl.load(block_pointers(x_ptr, stride, row, column, ROWS, COLUMNS), mask=mask, other=0.0)
    return block


@triton.jit
def store_block(x_ptr, stride, block, row, column, rows, columns, WHOLE: tl.constexpr):
    """Round a block, and store it into a matrix (rows, columns) without what lies outside."""
    block = cast(block, x_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(block_pointers(x_ptr, stride, row, column, block.shape[0], block.shape[1]), block)
    else:
        mask = block_mask(row, column, rows, columns, block.shape[0], block.shape[1])
        tl.store(block_pointers(x_ptr, stride, row, column, block.shape[0], block.shape[1]), block, mask=mask)


@triton.jit
def load_rows(x_ptr, row, rows, ROWS: tl.constexpr):
    """Load one number for each of ROWS rows from `row` on, 0 outside."""
    r = row + tl.arange(0, ROWS)
    return tl.load(x_ptr + r, mask=r < rows, other=0.0)


@triton.jit
def store_row_sums(x_ptr, sums, row, column, m, n, PART: tl.constexpr):
    """Store the sum of each row of a part into x (parts, M): its rows are numbered by the part's position in the row."""
    r = row + tl.arange(0, sums.shape[0])
    tl.store(x_ptr + tl.cast(column // PART, tl.int64) * m + r, sums, mask=(r < m) & (column < n))


@triton.jit
def halves(tile):
    """Split a tile into the left and the right half of its columns."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def parts_of(tile, PARTS: tl.constexpr):
    """Split a tile into PARTS parts of its columns, from left to right; PARTS is a power of two."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = halves(tile)
        parts = parts_of(left, PARTS // 2) + parts_of(right, PARTS // 2)
    return parts


@triton.jit(do_not_specialize=["tiles", "total"])  # on which no code depends
def product_kernel(
    x_ptr, y_ptr, out_ptr, first_ptr, second_ptr, arguments, tiles, total, m, n, k,
    x_stride, y_stride, out_stride, first_stride, second_stride,
    EPILOGUE: tl.constexpr, X_TRANSPOSED: tl.constexpr, Y_TRANSPOSED: tl.constexpr, TRIANGLE: tl.constexpr,
    BATCH: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Compute out (batch, m, n) in tiles BLOCK_M × BLOCK_N; program p takes tiles p, p + num_programs, ….

    There are `tiles` tiles in each matrix and `total` in the batch. In a batch the matrices lie one after the other: the operands
    are read as one tall matrix, and the epilogue gets pointers to the results and the other matrices of its own matrix.
    SLICE: if not 0, out is (slices, m, n), and each slice the product of so many columns of x and rows of y.
    """
    first_k, last_k = 0, k
    if SLICE:
        first_k = tl.program_id(1) * SLICE
        last_k = tl.minimum(first_k + SLICE, k)
        out_ptr += tl.cast(tl.program_id(1), tl.int64) * m * out_stride
    for index in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        matrix = index // tiles if BATCH else 0
        row, column = tile_position(index % tiles if BATCH else index, m, n, BLOCK_M, BLOCK_N, GROUP, TRIANGLE)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(first_k, last_k, BLOCK_K):
            if X_TRANSPOSED:
                a = load_operand(x_ptr, x_stride, matrix, start, row, k, m, BLOCK_K, BLOCK_M, BATCH, TMA, WHOLE).T
            else:
                a = load_operand(x_ptr, x_stride, matrix, row, start, m, k, BLOCK_M, BLOCK_K, BATCH, TMA, WHOLE)
            if Y_TRANSPOSED:
                b = load_operand(y_ptr, y_stride, matrix, column, start, n, k, BLOCK_N, BLOCK_K, BATCH, TMA, WHOLE).T
            else:
                b = load_operand(y_ptr, y_stride, matrix, start, column, k, n, BLOCK_K, BLOCK_N, BATCH, TMA, WHOLE)
            sums = dot(a, b, sums)
        out, first, second = out_ptr, first_ptr, second_ptr
        if BATCH:
            out += tl.cast(matrix, tl.int64) * m * out_stride
            first += tl.cast(matrix, tl.int64) * m * first_stride
            second += tl.cast(matrix, tl.int64) * m * second_stride
        # a part at a time, because its addresses and what it reads need fewer registers than those of a whole tile
        parts = parts_of(sums, BLOCK_N // PART)
        for i in tl.static_range(BLOCK_N // PART):
            EPILOGUE(
                parts[i], out, out_stride, first, first_stride, second, second_stride, arguments, row,
                column + i * PART, m, n, WHOLE,
            )  # fmt: skip


@triton.jit
def load_operand(
    x_ptr, stride, matrix, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BATCH: tl.constexpr,
    TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load a block of an operand, zeros outside; with TMA x_ptr is a descriptor of the whole batch."""
    if TMA:
        block = x_ptr.load([matrix * rows + row, column] if BATCH else [row, column])
    elif BATCH:
        base = x_ptr + tl.cast(matrix, tl.int64) * rows * stride
        block = load_block(base, stride, row, column, rows, columns, ROWS, COLUMNS, WHOLE)
    else:
        block = load_block(x_ptr, stride, row, column, rows, columns, ROWS, COLUMNS, WHOLE)
    return block


@triton.jit
def epilogue_kernel(
    sums_ptr, out_ptr, first_ptr, second_ptr, arguments, m, n, sums_stride, out_stride, first_stride, second_stride,
    SLICES: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Apply an epilogue to a product that is stored, or to the sum of its slices; out may be the same memory."""
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * PART
    sums = load_block(sums_ptr, sums_stride, row, column, m, n, BLOCK_M, PART, False).to(tl.float32)
    for number in tl.static_range(1, SLICES):
        slice_ptr = sums_ptr + tl.cast(number, tl.int64) * m * sums_stride
        sums += load_block(slice_ptr, sums_stride, row, column, m, n, BLOCK_M, PART, False)
    EPILOGUE(
        sums, out_ptr, out_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n,
        False,
    )  # fmt: skip


@triton.jit
def scale_rows_epilogue(
    sums, out_ptr, out_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the sums, multiplied by a factor for each row if there is one."""
    if arguments[0] is not None:
        sums *= load_rows(arguments[0], row, m, sums.shape[0])[:, None]
    store_block(out_ptr, out_stride, sums, row, column, m, n, WHOLE)


class Epilogue(NamedTuple):
    """The same epilogue for the kernel of this file and for that of hopper_product.py."""

    triton: Any
    gluon: Any = None
    exact: bool = False
    """whether it needs the sums in float32, as exp of them does, also where torch computes the product"""


PASS_ELEMENTS = 2048  # of a tile of epilogue_kernel, which adds slices
SCALE_ROWS = Epilogue(scale_rows_epilogue, scale_rows_on_hopper)


def float32_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x·y in float32, for x (M, K) and y (K, N); on a GPU no copy of them is made."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()


def tile_count(m: int, n: int, block_m: int, block_n: int, triangle: bool) -> int:
    """Return the number of tiles of one matrix."""
    if triangle:
        return sum(i // (block_n // block_m) + 1 for i in range(cdiv(m, block_m)))
    return cdiv(m, block_m) * cdiv(n, block_n)


def product_parameters(
    name: str, x: Tensor, y: Tensor, shape: tuple[int, int, int], part: int | None = None,
    parameters: dict[str, int] | None = None, *, decodes: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Return the launch parameters of a product, from the table of `name` unless given, adjusted to operands x and y.

    shape: (M, N, K). part: the width of the parts if the epilogue requires one, such as that of a head. Operands that no tensor
    descriptor can describe are read through pointers. Products in float32 are left to torch, and those of few rows too, unless
    decodes: then y is a weight (N, K), and the table of `name`_few_rows serves them.
    """
    if parameters is None and x.dim() == 2 and shape[0] < FEWEST_ROWS:
        parameters = BY_TORCH
        if decodes and x.dtype in DTYPES[:2] and min(shape):  # torch serves an empty one
            parameters = launch_parameters(f"{name}_few_rows", x.device, x.dtype, shape)
    if x.dtype not in DTYPES[:2]:
        parameters = parameters if parameters and "TORCH" in parameters else BY_TORCH
    found = dict(parameters or launch_parameters(name, x.device, x.dtype, shape))
    if "STAGES" in found and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] != 9:
        found = dict(BY_TORCH)  # newer GPUs take sm_90's table, but not its instructions
    if "TORCH" in found or "SUMS" in found:
        return found | ({"PART": part} if part else {})
    aligned = described(x) and described(y) and shape[1] % 8 == 0
    if x.dim() == 2 and not aligned and ("STAGES" in found or parameters is None):
        found = dict(UNALIGNED)
    m, n = found["BLOCK_M"], found["BLOCK_N"]
    part_empty = shape[1] % n and not shape[1] % m  # the last column of tiles, unless they are narrower
    if parameters is None and m < n and part_empty:
        found |= {"BLOCK_M": n if "STAGES" in found else m, "BLOCK_N": m}
    if found.get("TMA") and not (described(x) and described(y) and (x.dim() == 2 or shape[2] % found["BLOCK_K"] == 0)):
        found |= {"TMA": 0, "BLOCK_N": min(found["BLOCK_N"], 128), "BLOCK_K": min(found["BLOCK_K"], 32), "PART": 32}
    found["PART"] = part or min(found["PART"], found["BLOCK_N"])
    found["BLOCK_N"] = max(found["BLOCK_N"], found["PART"])
    return found


def unsupported_reason(x: Tensor) -> str | None:
    """Return why no product can take the rows of x (…, C), or None if one can."""
    rows = x.shape[:-1].numel()
    if rows > GRID_LIMIT:
        return f"{rows} rows exceed the {GRID_LIMIT} of one product; split the batch"
    return triton_unsupported_reason(x)


def described(x: Tensor) -> bool:
    """Return whether a tensor descriptor can describe x (rows, columns), or a contiguous batch of such matrices."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(-2) * x.element_size() % 16 == 0
    rows_apart = x.stride(-1) == 1 and x.stride(-2) >= x.size(-1)
    return aligned and rows_apart and x.shape[:-1].numel() <= GRID_LIMIT  # its rows are numbered in int32


def product(
    x: Tensor, y: Tensor, out: Tensor, epilogue: Epilogue, parameters: dict[str, int], arguments: tuple = (),
    first: Tensor | None = None, second: Tensor | None = None, *, x_transposed: bool = False,
    y_transposed: bool = False, triangle: bool = False,
) -> Tensor:  # fmt: skip
    """Compute epilogue(x·y) for x (M, K) and y (K, N), which usually fills out (M, N), and return out.

    x_transposed: x is given as (K, M); y_transposed: y is given as (N, K). All three may be a contiguous batch (B, …) instead. All
    matrices have stride 1 along their rows. first, second: matrices of the result's shape that the epilogue reads, or with the kernel
    of sm_90 one that repeats (see hopper_product). triangle: only the tiles of the lower triangle are computed. parameters: as
    returned by product_parameters. Repeated calls are bitwise equal.
    """
    parameters = dict(parameters)
    m, n = out.shape[-2:]
    if not out.numel():
        return out
    others = [out if t is None else t for t in (first, second)]
    if "TORCH" in parameters:
        # in 16 bits it is faster; but in float16 it may be infinite where the result of the epilogue is not
        multiply = float32_product if epilogue.exact or x.dtype == torch.float16 else torch.mm
        sums = multiply(x.t() if x_transposed else x, y.t() if y_transposed else y)[None]
    elif "SUMS" in parameters:
        sums = sums_of_slices(x, y, out, parameters, x_transposed, y_transposed)
    if "TORCH" in parameters or "SUMS" in parameters:
        part = parameters["PART"]
        block_m = max(1, parameters["BLOCK_M"] if "TORCH" in parameters else PASS_ELEMENTS // part)
        launch(
            epilogue_kernel, (cdiv(m, block_m), cdiv(n, part)), out.device, sums, out, *others, arguments, m, n,
            sums.stride(1), *(t.stride(0) for t in (out, *others)), SLICES=sums.size(0), EPILOGUE=epilogue.triton,
            BLOCK_M=block_m, PART=part, num_warps=parameters["num_warps"],
        )  # fmt: skip
        return out
    if "STAGES" in parameters:
        assert epilogue.gluon and not (x_transposed or triangle or (first is None and second is not None)), epilogue
        extras = [
            t if described(t) else t.clone(memory_format=torch.contiguous_format)
            for t in (first, second)
            if t is not None
        ]
        hopper_product(x, y, out, epilogue.gluon, parameters, arguments, extras, y_transposed)
        return out
    k = x.size(-2 if x_transposed else -1)
    batch = out.size(0) if out.dim() == 3 else 1
    block_m, block_n, block_k = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    whole = m % block_m == 0 and n % block_n == 0 and k % block_k == 0
    tma = parameters.pop("TMA", 0)
    if not tma and (x_transposed or not whole):  # addresses and masks take registers from the sums
        parameters["num_warps"] = max(parameters["num_warps"], block_m * block_n // 2048)
    strides = [t.stride(-2) for t in (x, y, out, *others)]
    if tma:
        x = descriptor(x, *((block_k, block_m) if x_transposed else (block_m, block_k)))
        y = descriptor(y, *((block_n, block_k) if y_transposed else (block_k, block_n)))
    tiles = tile_count(m, n, block_m, block_n, triangle)
    programs, total = parameters.pop("PROGRAMS", 0), tiles * batch
    grid = (min(total, programs * multiprocessors(out.device)) if programs else total,)
    launch(
        product_kernel, grid, out.device, x, y, out, *others, arguments, tiles, total, m, n, k, *strides,
        EPILOGUE=epilogue.triton, X_TRANSPOSED=x_transposed, Y_TRANSPOSED=y_transposed, TRIANGLE=triangle, BATCH=batch > 1,
        WHOLE=whole, TMA=bool(tma), FLATTEN=programs > 0 and not triangle, SLICE=0, **{"GROUP": 1, **parameters},
    )  # fmt: skip
    return out


def sums_of_slices(
    x: Tensor, y: Tensor, out: Tensor, parameters: dict[str, int], x_transposed: bool, y_transposed: bool
) -> Tensor:  # fmt: skip
    """Return the products (slices, M, N), in float32, of at most "SUMS" slices of the columns of x and the rows of y."""
    (m, n), k = out.shape, x.size(0 if x_transposed else 1)
    tile = {name: parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")}
    tile["BLOCK_K"] = min(tile["BLOCK_K"], max(16, power_of_2(k)))
    width = cdiv(cdiv(k, parameters["SUMS"]), tile["BLOCK_K"]) * tile["BLOCK_K"]
    sums = torch.empty(cdiv(k, width), m, n, dtype=torch.float32, device=x.device)
    tiles = tile_count(m, n, tile["BLOCK_M"], tile["BLOCK_N"], False)
    launch(
        product_kernel, (tiles, sums.size(0)), x.device, x, y, sums, sums, sums, (None,), tiles, tiles, m, n, k,
        x.stride(0), y.stride(0), n, n, n, EPILOGUE=scale_rows_epilogue, X_TRANSPOSED=x_transposed,
        Y_TRANSPOSED=y_transposed, TRIANGLE=False, BATCH=False, WHOLE=False, TMA=False, FLATTEN=False, SLICE=width,
        PART=tile["BLOCK_N"], GROUP=1, **tile,
    )  # fmt: skip
    return sums


def descriptor(x: Tensor, rows: int, columns: int):
    matrix = x.view(-1, x.size(2)) if x.dim() == 3 else x
    return TensorDescriptor.from_tensor(matrix, [rows, columns])
