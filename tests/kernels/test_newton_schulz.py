"""Newton-Schulz against float64 and singular value decompositions."""

import importlib

import pytest
import torch

import nanochat_kernels as kernels
from nanochat_kernels import reference
from nanochat_kernels.newton_schulz_coefficients import COEFFICIENTS, LARGEST_CONDITION, conditions
from nanochat_kernels.operation import RunShape
from tests.kernels import harness
from tests.kernels.gradients import saved
from tests.kernels.harness import DEVICE, GPU, SMALL_TILES, poisoned, randn
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.newton_schulz")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use small tiles in the interpreter, which computes padding too: most of an A100's tile would be padding here.

    They hold a small matrix whole and a large one in parts: test_matrix_product.py is about many tiles, and each takes long.
    """
    if not GPU:
        product = importlib.import_module("nanochat_kernels.matrix_product")
        monkeypatch.setattr(
            product, "launch_parameters", lambda *_: SMALL_TILES | {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64}
        )


def fused(gradients, *arguments, **options):
    return kernels.newton_schulz(gradients, *arguments, **options, impl="triton")


def oracle(gradients, coefficients="model"):
    return reference.newton_schulz(gradients.double(), FILE.coefficients_of(5, coefficients))


def cosine(a, b):
    a, b = a.double().flatten(-2), b.double().flatten(-2)
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def spectra(count):
    """Yield 50 named spectra of `count` singular values: geometric, heavy-tailed, clustered, rank-deficient, random, flat."""
    index = torch.arange(count, dtype=torch.float64)
    for low in torch.logspace(-0.2, -3, 10):
        yield f"geometric to {low:.1e}", low ** (index / max(count - 1, 1))
    for power in torch.linspace(0.1, 1.5, 10):
        yield f"heavy tail {power:.2f}", (index + 1) ** -power
    for level in torch.logspace(-0.1, -2.5, 10):
        yield f"two clusters 1 and {level:.1e}", torch.where(index < count // 4 + 1, 1.0, level)
    for rank in range(1, 11):
        yield f"rank {rank}", (index < rank).double()
    for seed in range(9):
        yield f"random {seed}", torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    yield "flat", torch.ones(count, dtype=torch.float64)


def with_spectrum(values, m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    left = torch.linalg.qr(torch.randn(m, count, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, count, generator=generator, dtype=torch.float64))[0]
    return (left * values) @ right.mT


SHAPES = [(128, 128), (128, 512), (512, 128), (96, 250)] if GPU else [(24, 24), (12, 48), (48, 12)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("m", "n", "dtype"),
    [(*shape, dtype) for i, shape in enumerate(SHAPES) for dtype in (HALVES if GPU else HALVES[i % 2 : i % 2 + 1])],
)
def test_singular_values_and_directions(m, n, dtype):
    """Check 50 spectra: the singular values lie in their band, and the update has the direction of float64's (cosine 0.999).

    A rank-deficient matrix is mostly rounding error; its update must be at least as near to float64's as the reference's is.
    """
    names, values = zip(*spectra(min(m, n)), strict=True)
    matrices = torch.stack([with_spectrum(v, m, n, i) for i, v in enumerate(values)])
    gradients = (matrices * 0.01).to(DEVICE, dtype)
    algorithms = ("standard",) if m == n else ("standard", "gram")
    left, before, right = torch.linalg.svd(gradients.double(), full_matrices=False)
    strong = before >= 1e-2 * before.norm(dim=-1, keepdim=True)
    true = oracle(gradients)
    wanted = cosine(reference.newton_schulz(gradients), true).clamp(max=0.999)
    for algorithm in algorithms:
        out = fused(gradients, algorithm=algorithm)
        assert out.dtype == dtype and out.shape == gradients.shape
        projected = torch.diagonal(left.mT @ out.double() @ right.mT, dim1=-2, dim2=-1)  # in the singular vectors of G
        for name, s, ok, similar, least, size in zip(
            names, projected, strong, cosine(out, true), wanted, torch.linalg.svdvals(out.double()), strict=True
        ):  # fmt: skip
            assert (s[ok] > 0.66).all() and (s[ok] < 1.16).all(), f"{name}, {algorithm}: {s[ok].min()} to {s[ok].max()}"
            assert size.max() < 1.24, f"{name}, {algorithm}: {size.max()}"
            assert similar >= least, f"{name}, {algorithm}: cosine {similar}"


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_other_coefficients(coefficients, algorithm):
    gradients = randn(2, *SHAPES[1], dtype=torch.bfloat16, seed=3)
    out = fused(gradients, 5, coefficients, algorithm)
    assert (cosine(out, oracle(gradients, coefficients)) > 0.9999).all()


@pytest.mark.parametrize(
    ("coefficients", "where", "bound"), [("model", (3,), 58), ("you", (2,), 53), ("polar_express", (2,), 84)]
)
def test_restarts_keep_the_condition(coefficients, where, bound):
    """The condition number of an accumulated factor, computed from its definition on another grid, is within the bound."""
    steps = FILE.coefficients_of(5, coefficients)
    assert FILE.restarts(steps) == where
    for first, last in zip((0, *where), (*where, 5), strict=True):
        x = torch.linspace(0, 1, 34_567, dtype=torch.float64)
        for a, b, c in steps[:first]:
            x = a * x + b * x**3 + c * x**5
        x = x[x > 0]
        y = x
        for a, b, c in steps[first:last]:
            y = a * y + b * y**3 + c * y**5
        assert (y / x).max() / (y / x).min() <= bound


@pytest.mark.timeout(60)
def test_restarts_of_many_steps():
    """All choices would be 2²⁹. No fewer restarts would do."""
    steps = FILE.coefficients_of(30, "polar_express")
    ends = (0, *FILE.restarts(steps), 30)
    between = conditions(steps)
    assert max(between[a][b] for a, b in zip(ends, ends[1:], strict=False)) <= LARGEST_CONDITION
    start = fewest = 0
    while between[start][30] > LARGEST_CONDITION:  # as far as each factor goes
        start = max(end for end in range(start + 1, 30) if between[start][end] <= LARGEST_CONDITION)
        fewest += 1
    assert len(ends) - 2 == fewest
    with pytest.raises(ValueError, match="take algorithm 'standard'"):
        FILE.restarts(16 * ((1.0, -1.5, 0.5),))


def test_one_restart_is_better_than_none():
    """Without restarts geometric spectra lose their small singular directions."""
    values = torch.logspace(0, -2, SHAPES[1][0], dtype=torch.float64)
    gradients = with_spectrum(values, *SHAPES[1])[None].to(DEVICE, torch.float16)
    steps = FILE.coefficients_of(5, "model")
    x = FILE.normalised(gradients)
    true = oracle(gradients)
    restarted = FILE.gram(x, steps, torch.float16)
    before, FILE.restarts = FILE.restarts, lambda _: ()
    try:
        unrestarted = FILE.gram(x, steps, torch.float16)
    finally:
        FILE.restarts = before
    assert (restarted.double() - true).norm() < 0.5 * (unrestarted.double() - true).norm()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_symmetries_of_the_operation(m, n):
    gradients = randn(2, m, n, dtype=torch.float16, seed=1)
    out = fused(gradients)
    rows, batch = torch.randperm(m, generator=torch.Generator().manual_seed(0)), [1, 0]
    assert torch.equal(fused(gradients[batch]), out[batch])
    assert torch.equal(fused(gradients[1]), out[1])
    assert torch.equal(fused(gradients[:, None])[:, 0], out)
    near = {"rtol": 2e-2, "atol": 4e-3}
    torch.testing.assert_close(fused(gradients[:, rows]), out[:, rows], **near)
    torch.testing.assert_close(fused(gradients.mT), out.mT, **near)
    torch.testing.assert_close(fused(gradients * 64), out, **near)
    torch.testing.assert_close(fused(-gradients), -out, rtol=0, atol=0)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_extreme_gradients(m, n):
    """Zeros stay zeros, tiny and huge matrices give finite results, and NaN or infinity makes only its own matrix NaN."""
    good = randn(m, n, dtype=torch.bfloat16, seed=5)
    nan, inf = good.clone(), good.clone()
    nan[m // 2, 1], inf[0, 0] = float("nan"), float("inf")
    rank1 = torch.outer(good[:, 0], good[0])
    out = fused(
        torch.stack([good, nan, torch.zeros_like(good), good * 1e-30, good * 1e30, good * 1e-4, rank1, inf, good])
    )
    assert torch.equal(out[0], out[8]) and out[1].isnan().all() and out[7].isnan().all()
    assert (out[2] == 0).all()
    assert out[3].isfinite().all() and out[3].abs().max() < 1e-15  # because of the 1e-7 in ‖G‖ + 1e-7
    for i in (4, 5):
        assert cosine(out[i], out[0]) > 0.9999
    assert 0.68 < torch.linalg.svdvals(out[6].double())[0] < 1.16


def test_steps_and_coefficients():
    gradients = randn(2, 24, 40, dtype=torch.float16)
    assert torch.equal(fused(gradients, 0), FILE.normalised(gradients))
    triple = (3.4445, -4.7750, 2.0315)
    assert torch.equal(fused(gradients, 3, triple), fused(gradients, 3, [triple] * 3))
    assert FILE.coefficients_of(7, "you")[4:] == 3 * FILE.coefficients_of(5, "you")[4:]
    assert fused(gradients[:0]).shape == (0, 24, 40)
    assert FILE.fastest((64, 64), 5 * (triple,)) == "standard" and FILE.fastest((256, 64), 5 * (triple,)) == "gram"
    assert FILE.fastest((256, 64), 5 * ((1.0, -2.0, 0.5),)) == "standard"  # this polynomial has a zero


def test_bad_input_is_named():
    x = randn(2, 8, 8, dtype=torch.float16)
    cases = [
        ("coefficients must be one of model", lambda: fused(x, 5, "mine")),
        ("one .a, b, c. or one per step", lambda: fused(x, 5, (1.0, 2.0))),
        ("algorithm must be one of auto, standard, gram", lambda: fused(x, 5, "model", "fast")),
        ("take algorithm 'standard'", lambda: fused(x, 5, (1.0, -2.0, 0.5), "gram")),
        ("matrix units take bfloat16 or float16, got torch.float32", lambda: fused(x.float())),
        ("squares must have shape .2, 64.", lambda: fused(x, squares=torch.ones(2, 63, dtype=torch.float64))),
        ("squares is on meta", lambda: fused(x, squares=torch.ones(2, 64, dtype=torch.float64, device="meta"))),
        ("65536 matrices exceed the 65535", lambda: fused(x[:1].expand(2**16, 8, 8))),
        ("more elements than", lambda: fused(x[:1, :1, :1].expand(1, 2**16, 2**15))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="squares must be float64, got torch.float32"):
        fused(x, squares=torch.ones(2, 64, device=DEVICE))


@pytest.mark.parametrize("stride", [1, 2])
def test_known_squares(stride):
    """Each matrix is divided by its own norm, and the squares need not be contiguous."""
    gradients = randn(3, 24, 40, dtype=torch.float16)
    squares = torch.full((3, 64 * stride), float("nan"), dtype=torch.float64, device=DEVICE)[:, ::stride]
    squares.copy_(torch.rand(3, 64, generator=torch.Generator().manual_seed(0)))
    squares *= gradients.double().square().sum((1, 2))[:, None] / squares.sum(1, keepdim=True)
    torch.testing.assert_close(fused(gradients, 1, squares=squares), fused(gradients, 1), rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("layout", ["columns", "slice", "transposed"])
def test_strided_gradients(layout):
    gradients = randn(2, 24, 40, dtype=torch.float16, layout=layout)
    assert torch.equal(fused(gradients, 1), fused(gradients.contiguous(), 1))


def test_the_norm_beyond_one_pass():
    """The norm is right for matrices with more elements than 64 programs sum in one iteration of their loop."""
    x = randn(2, 300, 260, dtype=torch.float16)
    assert x[0].numel() > FILE.PARTS * FILE.KERNELS[0].space[0]["BLOCK"]
    with poisoned():
        found = FILE.normalised(x)
    expected = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=2**-24)


def test_derivatives_raise():
    gradients = randn(2, 16, 24, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="newton_schulz has no derivative"):
        fused(gradients.clone().requires_grad_()).sum().backward()
    harness.check_jvp_raises(fused, [gradients], [0])


def test_vmap():
    harness.check_vmap(lambda gradients: fused(gradients, 1), [randn(2, 16, 24, dtype=torch.float16)], [0])


def test_the_gate_judges_every_matrix():
    shape = RunShape(rows=1, tokens=1, width=16, heads=1, kv_heads=1, vocab=8, depth=3)
    trials = list(FILE.trials(shape, torch.device(DEVICE), torch.float16))
    assert [tuple(trial.inputs[0].shape) for trial in trials] == [(12, 16, 16), (3, 64, 16), (3, 16, 64)]
    for trial in trials[1:]:
        found = fused(*trial.inputs)
        assert trial.judge((found,)) is None
        for i in (0, 2):
            for wrong in (0.0, -1.0, 1.1, float("nan")):
                changed = found.clone()
                changed[i] *= wrong
                assert f"matrix {i}: cosine" in trial.judge((changed,))


def test_the_share_of_one_of_eight_ranks():
    """The matrices are dealt out as in nanochat/optim.py: the busiest of eight ranks has about an eighth of the work."""

    def work(groups):
        return sum(len(x) * min(x.shape[1:]) ** 2 * max(x.shape[1:]) for x in groups)

    whole, one = (FILE.model_matrices(shape, torch.float16, torch.device("meta")) for shape in ("d20", "d20/8"))
    assert sorted(tuple(x.shape) for x in whole) == [(20, 1280, 5120), (20, 5120, 1280), (80, 1280, 1280)]
    assert 1 <= 8 * work(one) / work(whole) <= 1.1


def test_offsets_are_int64():
    assert narrow_offsets("matrix_squares", "matrix_scale") == ""


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 30 GB of GPU memory")
def test_more_than_2_to_31_elements():
    gradients = torch.empty(2100, 1024, 1024, device=DEVICE, dtype=torch.bfloat16).normal_()
    assert torch.equal(fused(gradients)[-2:], fused(gradients[-2:]))


def test_on_another_device():
    harness.check_other_device(fused, [randn(2, 16, 48, dtype=torch.float16)])


def test_registration():
    flat = [number for step in FILE.coefficients_of(2, "model") for number in step]
    for algorithm in ("standard", "gram"):
        torch.library.opcheck(FILE.newton_schulz_op, (randn(2, 16, 48, dtype=torch.bfloat16), flat, algorithm))


def test_compiled():
    gradients = randn(2, 16, 48, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    assert torch.equal(compiled(gradients), fused(gradients))


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    static = randn(4, 256, 1024, dtype=torch.bfloat16)
    fused(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(static)
    static.copy_(randn(4, 256, 1024, dtype=torch.bfloat16, seed=9))
    graph.replay()
    assert torch.equal(out, fused(static))


@pytest.mark.parametrize("name", ["query", "expand", "project"])
def test_gradients_of_a_real_run(name):
    """Gradients of a d4 model (see gradients.py): singular values lie in their band, and the direction is float64's."""
    gradients = saved()[name].to(DEVICE)
    assert gradients.dtype == torch.bfloat16 and gradients.shape[0] * gradients.shape[1] >= 256**2
    if not GPU:  # every eighth row and column for the slow interpreter; the spectrum stays as uneven
        gradients = gradients[::8, ::8]
    left, before, right = torch.linalg.svd(gradients.double(), full_matrices=False)
    strong = before >= 1e-2 * before.norm()
    true = oracle(gradients)
    for algorithm in ("standard", "gram"):
        out = fused(gradients, algorithm=algorithm)
        projected = torch.diagonal(left.mT @ out.double() @ right.mT)[strong]
        assert strong.sum() > 5 and projected.min() > 0.66 and projected.max() < 1.16
        assert cosine(out, true) >= 0.999


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "coefficients exchanged": ("newton_schulz", "alpha=c, beta=b, y_transposed", "alpha=b, beta=c, y_transposed",
     "test_other_coefficients"),
    "no step's own factor": (
        "newton_schulz",
        "small = symmetric_product(symmetric_product(step, small), step)",
        "small = symmetric_product(step, small)", "test_other_coefficients",
    ),
    "restart forgotten": (
        "newton_schulz",
        "            factor, small = None, gram_of(x, tall)\n",
        "            small = gram_of(x, tall)\n", "test_other_coefficients",
    ),
    "norm of the batch, not the matrix": ("newton_schulz", "squares_ptr + matrix * PARTS + tl", "squares_ptr + tl",
     "test_other_coefficients"),
    "squares of the first pass alone": (
        "newton_schulz",
        "tl.range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK)",
        "tl.range(tl.program_id(0) * BLOCK, tl.minimum(size, tl.num_programs(0) * BLOCK), tl.num_programs(0) * BLOCK)",
     "test_the_norm_beyond_one_pass",
    ),
    "squares taken as contiguous": ("newton_schulz", "else squares.contiguous()", "else squares",
     "test_known_squares"),
    "dtype of the squares unchecked": ("newton_schulz", "if squares.dtype != torch.float64:", "if False:",
     "test_bad_input_is_named"),
    "device of the squares unchecked": (
        "newton_schulz",
        '        check_device("newton_schulz", gradients=gradients, squares=squares)\n',
        "", "test_bad_input_is_named",
    ),
    "number of a matrix in int32": ("newton_schulz", "tl.program_id(1).to(tl.int64)", "tl.program_id(1)",
     "test_offsets_are_int64"),
    "the gate judges one matrix": ("newton_schulz", "slice(start, start + chunk)", "slice(start, start + 1)",
     "test_the_gate_judges_every_matrix"),
    "the gate judges no norm": ("newton_schulz", "& ((ratio - 1).abs() <= 0.02)", "",
     "test_the_gate_judges_every_matrix"),
}  # fmt: skip
