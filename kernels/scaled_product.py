"""Batched products of 16-bit matrices, α·x·y + β·plus + γ·I, with half of the work for a symmetric result.

Of a symmetric result (x·xᵀ, b·A + c·A², products of commuting symmetric matrices) only the tiles of the lower triangle are computed.
Each element below the diagonal is stored twice, so that the result is symmetric bit for bit. x·xᵀ and xᵀ·x read x without copying
or transposing it in memory. newton_schulz is built from these products; this file does not define an operation of the package.
"""

import itertools

import torch
from torch import Tensor

from nanochat_kernels.checks import check_device
from nanochat_kernels.matrix_product import (
    Epilogue,
    block_mask,
    block_pointers,
    load_block,
    product,
    product_parameters,
    store_block,
)
from nanochat_kernels.operation import MORE_WIDTHS, Kernel, Key
from nanochat_kernels.triton_helpers import DTYPES, cast, tl, triton


@triton.jit
def scaled_sums(sums, plus_ptr, stride, arguments, row, column, m, n, WHOLE: tl.constexpr):
    """Return alpha·sums + beta·plus + gamma·I; without plus beta is None, without the diagonal gamma is None."""
    alpha, beta, gamma = arguments
    # torch.compile may pass a float as float64
    sums *= tl.cast(alpha, tl.float32)
    if beta is not None:
        plus = load_block(plus_ptr, stride, row, column, m, n, sums.shape[0], sums.shape[1], WHOLE)
        sums += tl.cast(beta, tl.float32) * plus.to(tl.float32)
    if gamma is not None:
        r, c = row + tl.arange(0, sums.shape[0]), column + tl.arange(0, sums.shape[1])
        sums += tl.where(r[:, None] == c[None, :], tl.cast(gamma, tl.float32), 0.0)
    return sums


@triton.jit
def scaled_epilogue(
    sums, out_ptr, out_stride, plus_ptr, plus_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store alpha·sums + beta·plus + gamma·I."""
    value = scaled_sums(sums, plus_ptr, plus_stride, arguments, row, column, m, n, WHOLE)
    store_block(out_ptr, out_stride, value, row, column, m, n, WHOLE)


@triton.jit
def symmetric_epilogue(
    sums, out_ptr, out_stride, plus_ptr, plus_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store alpha·sums + beta·plus + gamma·I on and below the diagonal, and the mirror image of what is below it."""
    if column < row + sums.shape[0]:  # false for a part wholly above the diagonal
        value = cast(
            scaled_sums(sums, plus_ptr, plus_stride, arguments, row, column, m, n, WHOLE), out_ptr.dtype.element_ty
        )
        r, c = row + tl.arange(0, sums.shape[0]), column + tl.arange(0, sums.shape[1])
        pointers = block_pointers(out_ptr, out_stride, row, column, sums.shape[0], sums.shape[1])
        mirrored = out_ptr + (c * out_stride)[None, :] + r[:, None]
        if WHOLE and column + sums.shape[1] <= row + 1:  # a mask would split wide stores into single elements
            tl.store(pointers, value)
            tl.store(mirrored, value)
        else:
            below = block_mask(row, column, m, n, sums.shape[0], sums.shape[1]) & (c[None, :] <= r[:, None])
            tl.store(pointers, value, mask=below)
            tl.store(mirrored, value, mask=below)  # the diagonal is stored twice, with the same value


def scaled_product(
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
    name = "symmetric_product" if symmetric else "matrix_product"
    return product(
        x, y, out, Epilogue(symmetric_epilogue if symmetric else scaled_epilogue),
        product_parameters(name, x, y, (m, n, k), None, parameters),
        (float(alpha), None if plus is None else float(beta), float(gamma) if gamma else None), plus,
        x_transposed=x_transposed, y_transposed=y_transposed, triangle=symmetric,
    )  # fmt: skip


def check_operands(x: Tensor, y: Tensor, plus: Tensor | None, out_shape: tuple, y_shape: tuple) -> None:
    """Raise ValueError for operands that the kernel would read wrongly."""
    tensors = {"x": x, "y": y} | ({} if plus is None else {"plus": plus})
    check_device("scaled_product", **tensors)
    for name, tensor, shape in (("y", y, y_shape), ("plus", plus, out_shape)):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"scaled_product: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"scaled_product: {name} must be contiguous, got strides {tensor.stride()}")
        if tensor.dtype != x.dtype or tensor.dtype not in DTYPES[:2]:
            raise ValueError(f"scaled_product: all must be bfloat16 or all float16, got {name} in {tensor.dtype}")


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
            options = {
                "beta": float(plus), "gamma": gamma, "x_transposed": x_transposed, "y_transposed": y_transposed,
                "symmetric": symmetric, "dtype": to,
            }  # fmt: skip
            sets[name] = lambda parameters: scaled_product(x, y, added, parameters=parameters, **options)
            if dtype == torch.float16:  # as newton_schulz computes: one of several ranks may have a single matrix
                one = x[:1], y[:1], added if added is None else added[:1]
                sets[f"{name}, one matrix"] = lambda parameters: scaled_product(*one, parameters=parameters, **options)

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


def symmetric_keys(widths: tuple[int, ...]) -> tuple[Key, ...]:
    return tuple((w, w, k) for w in widths for k in (w, 4 * w))


def product_keys(widths: tuple[int, ...]) -> tuple[Key, ...]:
    return tuple(key for w in widths for key in ((w, w, w), (w, 4 * w, w), (4 * w, w, w)))


# whole tiles; ragged tiles with descriptors; ragged tiles without
MORE_KEYS = ((1536, 1536, 1536), (1216, 1216, 1216), (1001, 1001, 1001))
SPACE = tuple(
    {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "PART": n // 4 if n > 128 or not tma else n // 2,
        "GROUP": 1,
        "PROGRAMS": programs,
        "TMA": tma,
        "num_warps": w,
        "num_stages": stages,
    }
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
KERNELS = tuple(
    Kernel(
        name, DTYPES[:2], keys_of(WIDTHS), SPACE, launches, (*MORE_KEYS, *keys_of(MORE_WIDTHS)), trained_in=DTYPES[1:2]
    )
    for name, keys_of, launches in (
        ("symmetric_product", symmetric_keys, launches_of(True)),
        ("matrix_product", product_keys, launches_of(False)),
    )
)  # fmt: skip
