"""The product kernel: which tiles are computed, the parts that an epilogue gets, operands of any layout, launch parameters."""

import importlib
import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import configs, product_configurations
from nanochat_kernels.triton_helpers import as_rows, cdiv, tl, triton
from tests.kernels import harness
from tests.kernels.harness import DEVICE, GPU, SMALL_TILES, poisoned, randn
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.matrix_product")
HALVES = (torch.bfloat16, torch.float16)
TMA = {
    "BLOCK_M": 128,
    "BLOCK_N": 256,
    "BLOCK_K": 64,
    "PART": 128,
    "GROUP": 1,
    "PROGRAMS": 1,
    "TMA": 1,
    "num_warps": 8,
    "num_stages": 3,
}
tile_position, parts_of, store_block = FILE.tile_position, FILE.parts_of, FILE.store_block
load_block, store_row_sums = FILE.load_block, FILE.store_row_sums


@triton.jit
def positions_kernel(out_ptr, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    row, column = tile_position(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP, False)
    tl.store(out_ptr + 2 * tl.program_id(0), row)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, column)


def positions(m: int, n: int, group: int) -> list[tuple[int, int]]:
    """Return the first row and column of each tile 16 × 32 of a matrix (m, n), in their order."""
    tiles = FILE.tile_count(m, n, 16, 32, False)
    out = torch.full((tiles, 2), -1, device=DEVICE, dtype=torch.int32)
    positions_kernel[(tiles,)](out, m, n, BLOCK_M=16, BLOCK_N=32, GROUP=group)
    return [tuple(position) for position in out.tolist()]


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (16, 32), (17, 33), (80, 100), (150, 40), (30, 200)])
def test_every_tile_is_computed_once(m, n, group):
    found = positions(m, n, group)
    assert sorted(found) == list(itertools.product(range(0, m, 16), range(0, n, 32)))
    assert len(found) == cdiv(m, 16) * cdiv(n, 32)


def test_a_group_of_tile_rows_is_walked_column_by_column():
    """The last group has fewer rows."""
    assert positions(48, 64, 2) == [(0, 0), (16, 0), (0, 32), (16, 32), (32, 0), (32, 32)]
    assert positions(32, 64, 1) == [(0, 0), (0, 32), (16, 0), (16, 32)]


@triton.jit
def parts_kernel(x_ptr, out_ptr, PARTS: tl.constexpr):
    x = tl.load(x_ptr + 32 * tl.arange(0, 4)[:, None] + tl.arange(0, 32)[None, :])
    parts = parts_of(x, PARTS)
    WIDTH: tl.constexpr = 32 // PARTS
    for i in tl.static_range(PARTS):
        tl.store(out_ptr + 32 * tl.arange(0, 4)[:, None] + i * WIDTH + tl.arange(0, WIDTH)[None, :], parts[i])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_are_in_their_order(parts):
    x = randn(4, 32, dtype=torch.float32)
    out = torch.full_like(x, float("nan"))
    parts_kernel[(1,)](x, out, PARTS=parts)
    assert torch.equal(out, x)


@triton.jit
def weighted_epilogue(
    sums, out_ptr, out_stride, first_ptr, first_stride, second_ptr, second_stride, arguments, row, column, m, n,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Store factor·sums + first − second, and the sum of each row of the part."""
    sums_ptr, factor = arguments
    value = factor * sums + load_block(
        first_ptr, first_stride, row, column, m, n, sums.shape[0], sums.shape[1], WHOLE
    ).to(tl.float32)
    value -= load_block(second_ptr, second_stride, row, column, m, n, sums.shape[0], sums.shape[1], WHOLE).to(
        tl.float32
    )
    store_block(out_ptr, out_stride, value, row, column, m, n, WHOLE)
    store_row_sums(sums_ptr, tl.sum(sums, axis=1), row, column, m, n, sums.shape[1])


def in_a_wider_matrix(x, left: int, around: float = float("nan")):
    """The same numbers as the columns from `left` on of a matrix with 22 more."""
    wide = x.new_full((x.size(0), x.size(1) + 22), around)
    return wide[:, left : left + x.size(1)].copy_(x)


@harness.property_test
@example(
    m=40, n=70, k=40, dtype=torch.bfloat16, transposed=(False, False), parameters=harness.PRODUCTS[0], left=3, seed=1
)
@example(m=33, n=48, k=40, dtype=torch.float16, transposed=(True, True), parameters=harness.PRODUCTS[1], left=0, seed=2)
@example(  # whole tiles, but for K
    m=32, n=64, k=40, dtype=torch.float16, transposed=(False, True), parameters=harness.SMALL_TILES, left=8, seed=3
)
@given(
    m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 40), dtype=harness.dtypes,
    transposed=st.tuples(st.booleans(), st.booleans()), parameters=harness.products, left=st.integers(0, 16),
    seed=harness.seeds,
)  # fmt: skip
def test_product(m, n, k, dtype, transposed, parameters, left, seed):
    """Of operands, addends and a result that are columns of wider matrices, each also transposed in memory."""
    shapes = ((k, m) if transposed[0] else (m, k)), ((n, k) if transposed[1] else (k, n)), (m, n), (m, n), (m, n)
    # torch's bfloat16 product on a CPU with AMX multiplies what lies behind a row of odd length by zero
    around = 0.0 if parameters and "TORCH" in parameters and not GPU else float("nan")
    x, y, first, second, out = (
        in_a_wider_matrix(randn(*shape, dtype=dtype, seed=seed + i), (left + 5 * i) % 22, *([around] if i < 2 else []))
        for i, shape in enumerate(shapes)
    )
    parameters = FILE.product_parameters("output_projection", x, y, (m, n, k), None, parameters)
    with poisoned():
        sums = torch.empty(cdiv(n, parameters["PART"]), m, device=DEVICE)
    returned = FILE.product(
        x, y, out, FILE.Epilogue(weighted_epilogue), parameters, (sums, 0.5), first, second, x_transposed=transposed[0],
        y_transposed=transposed[1],
    )  # fmt: skip
    left_, right = x.double(), y.double()
    exact = (left_.t() if transposed[0] else left_) @ (right.t() if transposed[1] else right)
    true = 0.5 * exact + first.double() - second.double()
    assert returned is out
    scale = float(exact.abs().max()) + 8.0
    assert float((out - true).abs().max()) <= 2 * torch.finfo(dtype).eps * scale
    assert float((sums.double().sum(0) - exact.sum(1)).abs().max()) <= n * torch.finfo(dtype).eps * scale
    whole = out.as_strided((m, n + 22), (n + 22, 1), 0)
    assert int(whole.isnan().sum()) == 22 * m, "something beside the result was written"


def test_views_whose_rows_lie_far_apart_are_copied():
    """A block's offsets would overflow."""
    near, far = (torch.empty_strided((128, 64), (stride, 1), device="meta") for stride in (8_000_000, 17_000_000))
    assert as_rows(near) is near and as_rows(far).stride() == (64, 1)


def test_a_product_of_nothing():
    x, out = torch.empty(0, 16, device=DEVICE).bfloat16(), torch.empty(0, 32, device=DEVICE).bfloat16()
    parameters = FILE.product_parameters("any", x, out, (0, 32, 16), None, SMALL_TILES)
    assert FILE.product(x, out.new_empty(16, 32), out, FILE.Epilogue(weighted_epilogue), parameters) is out


@pytest.mark.parametrize("dtype", HALVES)
def test_what_a_descriptor_can_describe(dtype):
    x = torch.empty(16, 48, device=DEVICE, dtype=dtype)
    assert FILE.described(x) and FILE.described(x[:, 8:24]) and FILE.described(x.view(2, 8, 48))
    assert not FILE.described(x[:, 3:19]), "the first element is not at a multiple of 16 bytes"
    assert not FILE.described(x.view(-1)[: 16 * 47].view(16, 47)), "neither are the other rows"
    assert not FILE.described(x.t())
    assert not FILE.described(x[:1, :1].expand(2**31, 1)), "rows are numbered in int32"
    assert not FILE.described(x[:1].expand(16, 48)), "a descriptor's rows may not overlap"


@pytest.mark.parametrize("dtype", HALVES)
def test_parameters_of_operands_without_a_descriptor(dtype):
    """They are read through pointers, in tiles for which the registers suffice, and the parts become smaller."""
    x, y = (torch.empty(128, 64, device=DEVICE, dtype=dtype) for _ in range(2))
    assert FILE.product_parameters("any", x, y, (128, 128, 64), None, TMA) == TMA
    for a, b in ((x[:, 3:19], y), (x, y[:, 3:19])):
        found = FILE.product_parameters("any", a, b, (128, 128, 16), None, TMA)
        assert found == TMA | {"TMA": 0, "BLOCK_N": 128, "BLOCK_K": 32, "PART": 32}
    batch = torch.empty(2, 128, 48, device=DEVICE, dtype=dtype)
    assert FILE.product_parameters("any", batch, batch, (128, 128, 48), None, TMA)["TMA"] == 0, (
        "48 is no multiple of 64"
    )


def test_parameters_with_parts_of_a_given_width():
    x = torch.empty(16, 32, device=DEVICE, dtype=torch.bfloat16)
    found = FILE.product_parameters("any", x, x, (16, 16, 32), 128, SMALL_TILES)
    assert found == SMALL_TILES | {"PART": 128, "BLOCK_N": 128}
    found = FILE.product_parameters("any", x, x, (16, 16, 32), None, SMALL_TILES | {"PART": 64})
    assert found["PART"] == 32, "no part is wider than a tile"
    found = FILE.product_parameters("any", x, x, (16, 16, 32), 64, product_configurations.BY_TORCH)
    assert found == product_configurations.BY_TORCH | {"PART": 64}


def test_products_in_float32_are_torch_s():
    x = torch.empty(16, 32, device=DEVICE)
    assert FILE.product_parameters("any", x, x, (16, 16, 32)) == product_configurations.BY_TORCH
    assert FILE.product_parameters("any", x, x, (16, 16, 32), 64, SMALL_TILES) == product_configurations.BY_TORCH | {
        "PART": 64
    }
    other = product_configurations.BY_TORCH | {"BLOCK_M": 32}
    assert FILE.product_parameters("any", x, x, (16, 16, 32), None, other) == other


def test_parameters_are_copies():
    """Changing what a call got changes no later call."""
    x = torch.empty(16, 32, device=DEVICE, dtype=torch.bfloat16)
    for given_ in (SMALL_TILES, product_configurations.BY_TORCH):
        before = dict(given_)
        FILE.product_parameters("any", x, x, (16, 16, 32), 64, given_).clear()
        assert given_ == before
    first = FILE.product_parameters("output_projection", x, x, (16, 16, 32))
    first.clear()
    assert FILE.product_parameters("output_projection", x, x, (16, 16, 32))


def test_shape_classes():
    assert (
        product_configurations.product_keys(3, 1)[0] == (1024, 3 * 768, 768)
        and len(set(product_configurations.product_keys(3, 1))) == 9
    )


def test_offsets_are_int64():
    """qkv_projection's test inspects its own epilogue; this is the product with the longest list of arguments besides."""
    assert narrow_offsets("relu2_mlp_hidden_gradient") == ""


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 20 GB of GPU memory")
@pytest.mark.parametrize("parameters", [TMA, TMA | {"TMA": 0, "BLOCK_N": 128, "PART": 32, "PROGRAMS": 0}])
def test_more_than_2_to_31_elements(parameters):
    add_residual = importlib.import_module("nanochat_kernels.folded_norm").add_residual
    x = torch.empty(70_000, 32_768, device=DEVICE, dtype=torch.bfloat16).normal_()
    weight = torch.empty(32_768, 32_768, device=DEVICE, dtype=torch.bfloat16).normal_()
    y, rstd = add_residual("any", x, weight, x, parameters)
    last, last_rstd = add_residual("any", x[-200:], weight, x[-200:], parameters)
    assert torch.equal(y[-200:], last) and torch.equal(rstd[-200:], last_rstd)


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_tiles_are_narrower_where_wide_ones_would_leave_one_part_empty(architecture):
    """d26 has 6½ times 256 columns. Launch parameters that are given stay as they are."""
    name = "relu2_mlp_down"
    with configs.tables_of(architecture):
        for width, wide in ((1280, 256), (1664, 128), (2048, 256)):
            x, y = (torch.empty(rows, 4 * width, dtype=torch.bfloat16, device="meta") for rows in (16_384, width))
            shape = x.size(0), width, 4 * width
            assert configs.launch_parameters(name, x.device, x.dtype, shape)["BLOCK_N"] == 256
            assert FILE.product_parameters(name, x, y, shape)["BLOCK_N"] == wide
            assert FILE.product_parameters(name, x, y, shape, None, TMA)["BLOCK_N"] == TMA["BLOCK_N"]


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 50 GB of GPU memory")
@pytest.mark.parametrize("operation", ["relu2_mlp", "qkv_projection", "output_projection", "linear_cross_entropy"])
def test_operations_with_more_than_2_to_31_elements(operation):
    """In a batch whose widest intermediate result has more, the last rows and their gradients are what they are on their own."""
    width, last = 256, 1000

    def weight(rows: int) -> torch.Tensor:
        return randn(rows, width, dtype=torch.bfloat16, seed=rows) * width**-0.5

    square, wide = weight(width), weight(4 * width)
    cos, sin = (randn(1, 64, dtype=torch.bfloat16, seed=seed).expand(2**22, 64) for seed in (1, 2))
    targets = torch.randint(4 * width, (2**22,), device=DEVICE)
    run = {
        "relu2_mlp": lambda x: kernels.relu2_mlp(x, wide, wide.t().contiguous(), x, impl="triton")[0],
        "qkv_projection": lambda x: torch.cat(
            kernels.qkv_projection(x[None], *[square] * 3, cos[: len(x)], sin[: len(x)], impl="triton")[:3], 2
        )[0].flatten(1),
        "output_projection": lambda x: kernels.output_projection(x, square, x, impl="triton")[0],
        "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(
            x, wide, targets[-len(x) :], reduction="none", impl="triton"
        )[:, None],
    }[operation]
    rows = 2**31 // {"qkv_projection": 3 * width, "output_projection": width}.get(operation, 4 * width) + last
    x = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE).normal_()
    results = []
    for batch in (x, x[-last:].clone()):
        batch.requires_grad_()
        out = run(batch)
        results.append((out[-last:].detach(), torch.autograd.grad(out, batch, torch.ones_like(out))[0][-last:]))
        del out
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected.float()).norm() < 2**-7 * expected.float().norm()


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "rows of the last group": (
        "matrix_product", "rows = tl.minimum(tl.cdiv(m, BLOCK_M) - first, GROUP)", "rows = GROUP",
        "test_every_tile_is_computed_once",
    ),
    "a group walked row by row": (
        "matrix_product",
        "row, column = (first + rest % rows) * BLOCK_M, rest // rows * BLOCK_N",
        "row, column = (first + rest // across) * BLOCK_M, rest % across * BLOCK_N",
        "test_a_group_of_tile_rows_is_walked_column_by_column",
    ),
    "halves exchanged": ("matrix_product", "parts = parts_of(left, PARTS // 2) + parts_of(right, PARTS // 2)",
     "parts = parts_of(right, PARTS // 2) + parts_of(left, PARTS // 2)", "test_parts_are_in_their_order"),
    "every part stored at the first one's place": ("matrix_product", "column + i * PART, m, n, WHOLE", "column, m, n, WHOLE",
     "test_product"),
    "last rows not masked": ("matrix_product", "(row + tl.arange(0, ROWS) < rows)[:, None] &", "(tl.arange(0, ROWS) >= 0)[:, None] &",
     "test_product"),
    "last columns not masked": (
        "matrix_product", "& (column + tl.arange(0, COLUMNS) < columns)[None, :]",
        "& (tl.arange(0, COLUMNS) >= 0)[None, :]", "test_product",
    ),
    "stride of y taken for x": (
        "matrix_product", "strides = [t.stride(-2) for t in (x, y, out, *others)]",
        "strides = [t.stride(-2) for t in (y, y, out, *others)]", "test_product",
    ),
    "result taken as contiguous": (
        "matrix_product", "strides = [t.stride(-2) for t in (x, y, out, *others)]",
        "strides = [t.stride(-2) for t in (x, y, out.contiguous(), *others)]", "test_product",
    ),
    "rows of a block in 32 bits": ("matrix_product", "(tl.cast(row, tl.int64) * stride + column)", "(row * stride + column)",
     "test_offsets_are_int64"),
    "unaligned operands described": ("matrix_product", "aligned = x.data_ptr() % 16 == 0 and", "aligned =",
     "test_what_a_descriptor_can_describe"),
    "float32 in the product kernel": ("matrix_product", "if x.dtype not in DTYPES[:2]:", "if False:",
     "test_products_in_float32_are_torch_s"),
}  # fmt: skip
