"""The products that Newton-Schulz is built of, against float64 and torch.matmul."""

import importlib
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat_kernels import configs
from nanochat_kernels.oracle import over_budget
from tests.kernels.harness import DEVICE, GPU, SMALL_TILES, poisoned, property_test, randn, seeds, without_interpreter
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.scaled_product")
# nearly every example needs its own compilation
fewer_examples = settings(property_test, max_examples=30 if GPU else 15)
halves = st.sampled_from((torch.bfloat16, torch.float16))


def check_product(x, y, plus, parameters=None, **options):
    """Check that the product is as near to float64 as a float32 product that is rounded once, as torch.baddbmm's is."""
    left = x.mT if options.get("x_transposed") else x
    right = y.mT if options.get("y_transposed") else y
    alpha, beta, gamma = (
        options.get(name, default) for name, default in (("alpha", 1.0), ("beta", 0.0), ("gamma", 0.0))
    )
    with poisoned():
        found = FILE.scaled_product(x, y, plus, **options, parameters=parameters)
        again = FILE.scaled_product(x, y, plus, **options, parameters=parameters)
    added = torch.zeros_like(found) if plus is None else plus
    eye = gamma * torch.eye(*found.shape[1:], device=x.device)
    true = alpha * (left.double() @ right.double()) + beta * added.double() + eye.double()
    baseline = (alpha * (left.float() @ right.float()) + beta * added.float() + eye).to(x.dtype)
    assert torch.equal(found, again)
    error, allowed = float((found.double() - true).norm()), float((baseline.double() - true).norm())
    assert error <= 1.02 * allowed + 1e-6 * float(true.norm()), f"error {error:.3e}, torch's {allowed:.3e}"
    wrong = over_budget(found, true, baseline, 1e-6 * float(true.abs().max()))  # row by row
    assert not wrong, wrong
    if options.get("symmetric"):
        assert torch.equal(found, found.mT)
    return found


sizes = st.integers(1, 2000 if GPU else 40)


@fewer_examples
@example(batch=3, m=33, n=48, k=40, dtype=torch.bfloat16, x_transposed=False, y_transposed=True, gamma=1.5, seed=1)
@example(batch=2, m=48, n=33, k=17, dtype=torch.float16, x_transposed=True, y_transposed=False, gamma=0.0, seed=2)
@given(
    batch=st.integers(1, 3), m=sizes, n=sizes, k=sizes, dtype=halves, x_transposed=st.booleans(),
    y_transposed=st.booleans(), gamma=st.sampled_from((0.0, 1.5)), seed=seeds,
)  # fmt: skip
def test_product(batch, m, n, k, dtype, x_transposed, y_transposed, gamma, seed):
    x = randn(batch, *((k, m) if x_transposed else (m, k)), dtype=dtype, seed=seed)
    y = randn(batch, *((n, k) if y_transposed else (k, n)), dtype=dtype, seed=seed + 1)
    plus = randn(batch, m, n, dtype=dtype, seed=seed + 2)
    check_product(
        x, y, plus, alpha=0.5, beta=-2.0, gamma=gamma, x_transposed=x_transposed, y_transposed=y_transposed,
        parameters=None if GPU else SMALL_TILES,
    )  # fmt: skip


@fewer_examples
@example(batch=3, m=50, k=40, dtype=torch.bfloat16, tall=False, wide=True, seed=1)
@example(batch=2, m=50, k=40, dtype=torch.float16, tall=True, wide=False, seed=2)
@given(batch=st.integers(1, 3), m=sizes, k=sizes, dtype=halves, tall=st.booleans(), wide=st.booleans(), seed=seeds)
def test_symmetric_products(batch, m, k, dtype, tall, wide, seed):
    """x·xᵀ, xᵀ·x and b·A + c·A² are symmetric bit for bit, with square tiles and with tiles twice as wide as high."""
    parameters = None if GPU else SMALL_TILES | {"BLOCK_M": 16 if wide else 32}
    x = randn(batch, *((k, m) if tall else (m, k)), dtype=dtype, seed=seed) / math.sqrt(k * m)
    gram = check_product(
        x, x, None, parameters, x_transposed=tall, y_transposed=not tall, symmetric=True
    )  # fmt: skip
    check_product(gram, gram, gram, parameters, alpha=2.03, beta=-4.77, gamma=3.4, y_transposed=True, symmetric=True)


# one shape for each ratio of the sides, which decides what the diagonal cuts
@pytest.mark.parametrize(
    ("bm", "bn"), [(16, 16), (16, 32), (32, 64), (16, 64)] if GPU else [(16, 16), (16, 32), (16, 64)]
)
def test_the_triangle_is_covered(bm, bn):
    """All of the result is written for matrices of one to six tiles per side, with and without a ragged last tile."""
    for m in sorted({1, bm, bm + 1, bn - 1, bn, bn + 1, 2 * bn + 1, 3 * bn - bm, 4 * bn, 5 * bn + 3}):
        x = randn(1, m, 16, dtype=torch.float16, seed=m)
        check_product(x, x, None, SMALL_TILES | {"BLOCK_M": bm, "BLOCK_N": bn}, y_transposed=True, symmetric=True)


def test_every_launch_configuration_of_the_search():
    x = randn(2, 192, 128, dtype=torch.float16)
    plus = randn(2, 192, 192, dtype=torch.float16)
    for kernel in FILE.KERNELS:
        symmetric = kernel.name == "symmetric_product"
        for parameters in kernel.space[:: 5 if GPU else len(kernel.space) // 4]:
            if GPU or not parameters["TMA"]:
                added = plus + plus.mT if symmetric else plus
                check_product(x, x, added, parameters, beta=1.0, y_transposed=True, symmetric=symmetric)


def test_nan_and_infinity_reach_their_row_or_column():
    x, y, plus = (randn(2, 40, 40, dtype=torch.float16, seed=i) for i in range(3))
    x[0, 3, 5], y[1, 7, 9], plus[0, 20, 21] = float("nan"), float("inf"), float("nan")
    found = FILE.scaled_product(x, y, plus, beta=1.0, parameters=None if GPU else SMALL_TILES)
    expected = x.float() @ y.float() + plus.float()
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


def test_operands_that_the_kernel_would_misread_are_rejected():
    x, square = (randn(2, 16, n, dtype=torch.float16) for n in (24, 16))
    bad = {
        "y must be contiguous": lambda: FILE.scaled_product(square, x.mT.contiguous().mT),
        "plus must be contiguous": lambda: FILE.scaled_product(square, square, square.mT),
        "plus must have shape": lambda: FILE.scaled_product(square, square, x),
        "y must have shape": lambda: FILE.scaled_product(x, x),
        "got y in torch.bfloat16": lambda: FILE.scaled_product(square, square.bfloat16()),
        "got x in torch.float32": lambda: FILE.scaled_product(square.float(), square.float()),
        "y is on meta": lambda: FILE.scaled_product(square, square.to("meta")),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(not GPU, reason="needs tensor descriptors")
def test_a_view_that_is_not_aligned():
    """A descriptor needs an alignment of 16 bytes; a view without it is read with ordinary loads."""
    base = torch.randn(2 * 128 * 128 + 1, device=DEVICE, dtype=torch.float16)
    x = base[1:].view(2, 128, 128)
    check_product(x, x, None, y_transposed=True, symmetric=True)


@pytest.mark.parametrize("depth", range(2, 42, 2))
def test_model_shapes_take_the_nearest_class(depth, monkeypatch):
    """Each shape of a model takes the class of its kind (square, tall, wide) with the nearest width."""
    name_of = {kernel.name: {configs.format_key(key): {"is": key} for key in kernel.keys} for kernel in FILE.KERNELS}
    table = {"launch": {name: {"float16": classes} for name, classes in name_of.items()}}
    monkeypatch.setattr(configs, "table", lambda _: table)
    w = 64 * depth
    nearest = min(FILE.WIDTHS, key=lambda known: abs(math.log2(known / w)))
    for name, kinds in (
        ("symmetric_product", ((1, 1, 1), (1, 1, 4))),
        ("matrix_product", ((1, 1, 1), (1, 4, 1), (4, 1, 1))),
    ):
        for kind in kinds:
            found = configs.parameters_in("sm80", name, torch.float16, tuple(w * n for n in kind))["is"]
            assert found == tuple(nearest * n for n in kind)


def test_offsets_are_int64():
    assert narrow_offsets("matrix_product", "symmetric_product") == ""


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 20 GB of GPU memory")
def test_more_than_2_to_31_elements():
    """The batch has more than 2³¹ elements, each matrix has fewer."""
    x = torch.empty(2100, 1024, 1024, device=DEVICE, dtype=torch.float16).normal_()
    found = FILE.scaled_product(x, x, x, beta=1.0)
    assert torch.equal(found[-2:], FILE.scaled_product(x[-2:], x[-2:], x[-2:], beta=1.0))
    found = FILE.scaled_product(x, x, x_transposed=True, symmetric=True)
    assert torch.equal(found[-2:], FILE.scaled_product(x[-2:], x[-2:], x_transposed=True, symmetric=True))


def test_a_single_matrix_compiles():
    """A rank may own one matrix of a shape: for sm_90 the product of one matrix and of several take the same path. Needs no GPU."""
    code = """
import torch
from nanochat_kernels import configs, inspect
from nanochat_kernels.scaled_product import scaled_product
from nanochat_kernels.triton_helpers import recorded_launches

for architecture in ("sm80", "sm90"):
    with configs.tables_of(architecture), recorded_launches() as launches:
        x = torch.empty(1, 768, 768, device="meta", dtype=torch.float16)
        scaled_product(x, x, x, beta=1.0, y_transposed=True)
        scaled_product(x, x, y_transposed=True, symmetric=True)
    for launch in launches:
        inspect.compile_launch(launch, architecture)
        print(architecture)
"""
    assert without_interpreter(code).split() == ["sm80", "sm80", "sm90", "sm90"]


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "mirrored tile not stored": (
        "scaled_product",
        "            tl.store(mirrored, value)\n        else",
        "        else", "test_the_triangle_is_covered",
    ),
    "tile row of the triangle wrong": ("matrix_product", "rest // (group + 1) * BLOCK_M", "rest // (group + 2) * BLOCK_M",
     "test_symmetric_products"),
    "diagonal not added": ("scaled_product", "tl.cast(gamma, tl.float32), 0.0)", "0.0, 0.0)", "test_product"),
    "addend without its factor": ("scaled_product", "tl.cast(beta, tl.float32) * plus", "plus", "test_product"),
    "product's last columns not masked": (
        "matrix_product",
        "& (column + tl.arange(0, COLUMNS) < columns)[None, :]",
        "& (tl.arange(0, COLUMNS) >= 0)[None, :]", "test_product",
    ),
    "matrix of the batch confused": ("matrix_product", "tl.cast(matrix, tl.int64) * m * out_stride",
     "tl.cast(matrix, tl.int64) * n * out_stride", "test_product"),
    "base of a result in int32": ("matrix_product", "tl.cast(matrix, tl.int64) * m * out_stride", "matrix * m * out_stride",
     "test_offsets_are_int64"),
    "base of an operand in int32": ("matrix_product", "tl.cast(matrix, tl.int64) * rows * stride", "matrix * rows * stride",
     "test_offsets_are_int64"),
    "operands taken as contiguous": ("scaled_product", "if not tensor.is_contiguous():", "if False:",
     "test_operands_that_the_kernel_would_misread_are_rejected"),
    "nearest class by plain distance": ("configs/__init__", "abs(log2(a) - log2(max(b, 1)))", "abs(a - b)",
     "test_model_shapes_take_the_nearest_class"),
}  # fmt: skip
