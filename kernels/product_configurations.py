"""The launch configurations of matrix products that tune tries, and the shape classes of their tables."""

import torch

from nanochat_kernels.operation import MODEL_WIDTHS, MORE_WIDTHS, TUNED_WIDTHS, Kernel, Key
from nanochat_kernels.triton_helpers import DTYPES

ROWS = (1024, 16_384, 65_536)
RAGGED_ROWS = (200, 1001, 16_317, 65_501)  # no multiples of a tile, as in evaluation: a few, and near each class


def product_keys(
    n: int, k: int, all_rows: tuple[int, ...] = ROWS, widths: tuple[int, ...] = TUNED_WIDTHS
) -> tuple[Key, ...]:  # fmt: skip
    """Return the shape classes (M, N, K) of a product with N = n·C and K = k·C for widths C."""
    return tuple((rows, n * width, k * width) for width in widths for rows in all_rows)


def more_product_keys(n: int, k: int) -> tuple[Key, ...]:
    """Return product_keys for the widths without entries in the launch tables, and for ragged rows at the widths of models."""
    return product_keys(n, k, widths=MORE_WIDTHS) + product_keys(n, k, RAGGED_ROWS, tuple(MODEL_WIDTHS.values()))


def configuration(
    m: int, n: int, k: int, part: int, programs: int, tma: int, warps: int, stages: int
) -> dict[str, int]:
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PART": part, "GROUP": 1, "PROGRAMS": programs, "TMA": tma,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


FEW_ROWS = (16, 64)  # classes of decoding: one token for each row of a batch
RAGGED_FEW_ROWS = (15, 77)  # near each class


def few_rows_kernel(
    name: str, n: int, k: int, launches, dtypes: tuple[torch.dtype, ...] = DTYPES[:2], slices: bool = False
) -> Kernel:  # fmt: skip
    """Return the record of the product `name` with few rows, N = n·C and K = k·C; launches: those of `name`.

    slices: the epilogue needs parts that are wider than a tile, and is applied in a pass over the products of slices of K.
    """
    more = ((16, n * 384, k * 384), (9, n * 64, k * 40), (1, n * 384, k * 384))
    more += product_keys(n, k, FEW_ROWS, MORE_WIDTHS) + product_keys(
        n, k, RAGGED_FEW_ROWS, tuple(MODEL_WIDTHS.values())
    )
    space = (*(SLICES_SPACE if slices else FEW_ROWS_SPACE), BY_TORCH)
    return Kernel(f"{name}_few_rows", dtypes, product_keys(n, k, FEW_ROWS), space, launches, more, few_rows=True)


# every element of an unaligned row has an address of its own, which takes registers from the sums
UNALIGNED = configuration(64, 128, 32, 32, 0, 0, 8, 3)
FEWEST_ROWS = 256  # fewer leave most of a large tile empty
BY_TORCH = {"TORCH": 1, "BLOCK_M": 16, "PART": 256, "num_warps": 4}
SPACE = (
    # for sm_90, hopper_product.py
    *(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "PART": 64, "STAGES": stages, "GROUP": group}
        for m, n, stages, groups in (
            (128, 128, 5, (1, 8, 16)),
            (256, 128, 3, (1, 8, 16)),
            (128, 256, 3, (1, 8, 16)),
            (64, 128, 6, (1, 8)),
        )
        for group in groups
    ),
    # for sm_80, matrix_product.py
    *(
        configuration(m, n, k, part, 0, 0, warps, stages) | {"GROUP": group}
        for m, n, k, warps, stages, parts, groups in (
            (128, 256, 64, 8, 3, (64,), (1, 8)),
            (128, 128, 32, 4, 3, (32, 64), (1, 8)),
            (128, 128, 32, 4, 5, (32,), (8,)),
            (64, 128, 32, 4, 4, (64,), (1, 8)),
        )
        for part in parts
        for group in groups
    ),
    BY_TORCH,
)
# The rows of one tile are those of the batch, so that the weight is read once.
FEW_ROWS_SPACE = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PART": n, "num_warps": warps, "num_stages": stages}
    for m, n, k, warps, stages in (
        (16, 16, 256, 2, 4), (16, 16, 128, 2, 6), (16, 16, 256, 4, 4), (16, 32, 256, 4, 4), (16, 32, 128, 4, 6),
        (16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 128, 128, 4, 4), (32, 32, 256, 4, 4), (32, 64, 128, 4, 4),
        (64, 32, 128, 4, 4), (64, 32, 256, 4, 3), (64, 64, 128, 4, 4), (64, 128, 64, 4, 4), (64, 128, 128, 8, 3),
    )
)  # fmt: skip
SLICES_SPACE = tuple(
    parameters | {"SUMS": slices}
    for parameters in FEW_ROWS_SPACE
    for slices in (1, 2, 4, 8)
    if parameters["BLOCK_N"] <= 64
)
