"""The Gluon product of sm_90: compiled without a GPU, and on a Hopper GPU against float64."""

import importlib

import pytest
import torch

from nanochat_kernels import reference
from nanochat_kernels.linear import scaled_rows
from tests.kernels.harness import DEVICE, SM90, poisoned, randn, without_interpreter

FOLDED = importlib.import_module("nanochat_kernels.folded_norm")
QKV = importlib.import_module("nanochat_kernels.qkv_projection")
SPACE = importlib.import_module("nanochat_kernels.product_configurations").SPACE
CONFIGURATIONS = [parameters for parameters in SPACE if "STAGES" in parameters]
hopper = pytest.mark.skipif(not SM90, reason="the kernel runs on sm_90 only")


COMPILE = """
import torch
from nanochat_kernels import configs, inspect
from nanochat_kernels.dispatch import tunable_kernels

PRODUCTS = (
    "output_projection", "relu2_mlp_up", "relu2_mlp_hidden_gradient", "relu2_mlp_input_gradient", "qkv_projection",
    "cross_entropy_exponentials",
)
with configs.tables_of("sm90"):
    for kernel in tunable_kernels():
        parameters = next((p for p in kernel.space if "STAGES" in p), None) if kernel.name in PRODUCTS else None
        if parameters:
            flags, launches = next(iter(inspect.record(kernel, kernel.keys[1], torch.bfloat16, parameters).items()))
            place = inspect.Place(kernel.name, torch.bfloat16, kernel.keys[1], flags, 0)
            for launch in launches:
                if launch.kernel.fn.__name__ == "hopper_kernel":
                    ptx = inspect.compile_launch(launch, "sm90").asm["ptx"]
                    found = inspect.inspect_launch(launch, "sm90", place)
                    wanted = ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg.inc", "mbarrier.try_wait")
                    print(kernel.name, [x for x in wanted if x not in ptx], found.defects)
"""


def test_it_compiles_to_the_instructions_of_sm_90():
    """Tensor cores of sm_90, asynchronous copies, registers handed between groups of warps; nothing is spilled. Needs no GPU."""
    lines = without_interpreter(COMPILE).splitlines()
    assert len(lines) == 6 and all(line.endswith(" [] ()") for line in lines), lines


# one tile; as many as programs and one more; ragged rows and columns; a sum shorter than a stage, and one that ends inside of a stage
SHAPES = [(64, 128, 64), (1, 8, 8), (300, 200, 24), (257, 136, 1000), (133 * 128, 128, 64), (5000, 1000, 328)]


@hopper
@pytest.mark.parametrize("parameters", CONFIGURATIONS, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_every_configuration(parameters, shape, dtype):
    """Both orders of y, with a factor for each row, and with a residual and the squares of the rows."""
    m, n, k = shape
    x, y, residual = (
        randn(m, k, dtype=dtype),
        randn(n, k, dtype=dtype, seed=1) / k**0.5,
        randn(m, n, dtype=dtype, seed=2),
    )
    factor = randn(m, dtype=torch.float32, seed=3)
    true = x.double() @ y.double().t()
    eps = torch.finfo(dtype).eps
    with poisoned():
        for weight, transposed in ((y, True), (y.t().contiguous(), False)):
            if weight.stride(0) % 8:
                continue  # such a weight is read through pointers
            found = scaled_rows("any", x, weight, factor, y_transposed=transposed, parameters=parameters)
            again = scaled_rows("any", x, weight, factor, y_transposed=transposed, parameters=parameters)
            expected = factor[:, None].double() * true
            assert torch.equal(found, again) and bool(((found - expected).abs() <= eps * (expected.abs() + 1e-2)).all())
        y_found, rstd = FOLDED.add_residual("any", x, y, residual, parameters)
    expected = residual.double() + true
    assert bool(((y_found - expected).abs() <= eps * (expected.abs() + 1e-2)).all())
    torch.testing.assert_close(rstd, (y_found.float().square().mean(1) + FOLDED.EPS).rsqrt(), rtol=1e-5, atol=0)


@hopper
def test_two_matrices_in_an_epilogue():
    """The gradient of the input reads x and the residual's gradient, one part after the other."""
    for m, n, k in SHAPES:
        dz, weight = randn(m, k, dtype=torch.bfloat16), randn(k, n, dtype=torch.bfloat16, seed=1) / k**0.5
        x, dy = (randn(m, n, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
        coefficient = randn(m, dtype=torch.float32, seed=4)
        expected = dz.double() @ weight.double() - coefficient[:, None].double() * x.double() + dy.double()
        for parameters in CONFIGURATIONS:
            with poisoned():
                found = FOLDED.input_gradient("any", dz, weight, x, coefficient, dy, parameters)
            assert bool(((found - expected).abs() <= 2**-7 * (expected.abs() + 1e-1)).all()), (m, n, k, parameters)


@hopper
@pytest.mark.parametrize("head_width", [32, 64, 128])
@pytest.mark.parametrize("parameters", CONFIGURATIONS, ids=lambda p: "-".join(map(str, p.values())))
def test_a_matrix_that_repeats(parameters, head_width):
    """The tables of a rotation, of which every sequence and every head reads the same rows, from an offset on."""
    x, weight = randn(3, 384, 128, dtype=torch.bfloat16), randn(6 * head_width, 128, dtype=torch.bfloat16, seed=1) / 11
    cos, sin = QKV.tables(400, head_width, torch.bfloat16, torch.device(DEVICE))
    rstd = randn(3 * 384, dtype=torch.float32, seed=2).abs()
    with poisoned():
        heads, head_rstd = QKV.heads_of(x, weight, rstd, cos, sin, 7, None, 4, 1, parameters)
    scaled = (x.double() @ weight.double().t() * rstd.double().view(3, 384, 1)).unflatten(2, (6, head_width))
    c, s = (table[7 : 7 + 384].double().view(384, 1, -1) for table in (cos, sin))
    rotated = reference.rotate(scaled[:, :, :5], c, s)
    expected = torch.cat([reference.rms_norm(rotated), scaled[:, :, 5:]], 2)
    assert bool(((heads - expected).abs() <= 2**-7 * (expected.abs() + 1e-2)).all())
    exact = (rotated.square().mean(3) + FOLDED.EPS).rsqrt().flatten(0, 1).t()
    torch.testing.assert_close(head_rstd.double(), exact, rtol=1e-5, atol=0)


@hopper
def test_a_view_inside_a_wider_matrix():
    wide = randn(500, 1024, dtype=torch.bfloat16)
    weight = randn(256, 512, dtype=torch.bfloat16, seed=1)
    view = wide[:, 256:768]
    found = scaled_rows("any", view, weight, y_transposed=True, parameters=CONFIGURATIONS[0])
    assert torch.equal(
        found, scaled_rows("any", view.contiguous(), weight, y_transposed=True, parameters=CONFIGURATIONS[0])
    )
    assert found.device.type == DEVICE
