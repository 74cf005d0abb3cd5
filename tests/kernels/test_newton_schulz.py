"""Newton-Schulz against float64 and singular value decompositions."""

import importlib

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.gradients import saved
from tests.kernels.harness import DEVICE, GPU, SMALL, randn

ROOM = importlib.import_module("kernels.newton_schulz")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter computes whole tiles: an A100's are mostly padding here."""
    if not GPU:
        product = importlib.import_module("kernels.matrix_product")
        monkeypatch.setattr(product, "launch_parameters", lambda *_: SMALL)


def fused(gradients, *arguments, **options):
    return kernels.newton_schulz(gradients, *arguments, **options, impl="triton")


def oracle(gradients, coefficients="model"):
    return reference.newton_schulz(gradients.double(), ROOM.coefficients_of(5, coefficients))


def cosine(a, b):
    a, b = a.double().flatten(-2), b.double().flatten(-2)
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def spectra(count):
    """50 spectra of `count` singular values: flat, geometric, heavy-tailed, clustered, rank-deficient."""
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


@pytest.mark.parametrize(
    ("m", "n", "dtype"),
    [(*shape, dtype) for i, shape in enumerate(SHAPES) for dtype in (HALVES if GPU else HALVES[i % 2 : i % 2 + 1])],
)
def test_singular_values_and_directions(m, n, dtype):
    """50 spectra at once: the band, and the update that the standard algorithm makes in float64 of the same matrix; where
    a rank-deficient matrix is mostly rounding, an update nearer to it than the reference in the same dtype has.
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
        turned = torch.diagonal(left.mT @ out.double() @ right.mT, dim1=-2, dim2=-1)  # in G's own directions
        for name, s, ok, similar, least, size in zip(
            names, turned, strong, cosine(out, true), wanted, torch.linalg.svdvals(out.double()), strict=True
        ):  # fmt: skip
            assert (s[ok] > 0.66).all() and (s[ok] < 1.16).all(), f"{name}, {algorithm}: {s[ok].min()} to {s[ok].max()}"
            assert size.max() < 1.24, f"{name}, {algorithm}: {size.max()}"
            assert similar >= least, f"{name}, {algorithm}: cosine {similar}"


@pytest.mark.parametrize("coefficients", ROOM.COEFFICIENTS)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_other_coefficients(coefficients, algorithm):
    gradients = randn(2, *SHAPES[1], dtype=torch.bfloat16, seed=3)
    out = fused(gradients, 5, coefficients, algorithm)
    assert (cosine(out, oracle(gradients, coefficients)) > 0.9999).all()


@pytest.mark.parametrize(
    ("coefficients", "where", "bound"), [("model", (3,), 58), ("you", (2,), 53), ("polar_express", (2,), 84)]
)
def test_restarts_keep_the_condition(coefficients, where, bound):
    """The condition of an accumulated factor, by its definition on a grid of its own."""
    steps = ROOM.coefficients_of(5, coefficients)
    assert ROOM.restarts(steps) == where
    for first, last in zip((0, *where), (*where, 5), strict=True):
        x = torch.linspace(0, 1, 34_567, dtype=torch.float64)
        for a, b, c in steps[:first]:
            x = a * x + b * x**3 + c * x**5
        x = x[x > 0]
        y = x
        for a, b, c in steps[first:last]:
            y = a * y + b * y**3 + c * y**5
        assert (y / x).max() / (y / x).min() <= bound


def test_one_restart_is_better_than_none():
    """Why there are restarts: geometric spectra lose their small directions without."""
    values = torch.logspace(0, -2, SHAPES[1][0], dtype=torch.float64)
    gradients = with_spectrum(values, *SHAPES[1])[None].to(DEVICE, torch.float16)
    steps = ROOM.coefficients_of(5, "model")
    x = ROOM.normalised(gradients)
    true = oracle(gradients)
    inside = ROOM.gram(x, steps, torch.float16)
    before, ROOM.restarts = ROOM.restarts, lambda _: ()
    try:
        outside = ROOM.gram(x, steps, torch.float16)
    finally:
        ROOM.restarts = before
    assert (inside.double() - true).norm() < 0.5 * (outside.double() - true).norm()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_symmetries_of_the_operation(m, n):
    gradients = randn(3, m, n, dtype=torch.float16, seed=1)
    out = fused(gradients)
    rows, batch = torch.randperm(m, generator=torch.Generator().manual_seed(0)), [2, 0, 1]
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
    """Zeros stay, a tiny or huge matrix is finite, and a NaN or an infinity spoils its own matrix alone, visibly."""
    good = randn(m, n, dtype=torch.bfloat16, seed=5)
    nan, inf = good.clone(), good.clone()
    nan[m // 2, 1], inf[0, 0] = float("nan"), float("inf")
    rank1 = torch.outer(good[:, 0], good[0])
    out = fused(
        torch.stack([good, nan, torch.zeros_like(good), good * 1e-30, good * 1e30, good * 1e-4, rank1, inf, good])
    )
    assert torch.equal(out[0], out[8]) and out[1].isnan().all() and out[7].isnan().all()
    assert (out[2] == 0).all()
    assert out[3].isfinite().all() and out[3].abs().max() < 1e-15  # as ‖G‖ + 1e-7 has it
    for i in (4, 5):
        assert cosine(out[i], out[0]) > 0.9999
    assert 0.68 < torch.linalg.svdvals(out[6].double())[0] < 1.16


def test_steps_and_coefficients():
    gradients = randn(2, 24, 40, dtype=torch.float16)
    assert torch.equal(fused(gradients, 0), ROOM.normalised(gradients))
    triple = (3.4445, -4.7750, 2.0315)
    assert torch.equal(fused(gradients, 3, triple), fused(gradients, 3, [triple] * 3))
    assert ROOM.coefficients_of(7, "you")[4:] == 3 * ROOM.coefficients_of(5, "you")[4:]
    assert fused(gradients[:0]).shape == (0, 24, 40)
    assert ROOM.fastest((64, 64), 5 * (triple,)) == "standard" and ROOM.fastest((256, 64), 5 * (triple,)) == "gram"
    assert ROOM.fastest((256, 64), 5 * ((1.0, -2.0, 0.5),)) == "standard"  # whose polynomial has a zero


def test_bad_input_is_named():
    x = randn(2, 8, 8, dtype=torch.float16)
    cases = [
        ("coefficients must be one of model", lambda: fused(x, 5, "mine")),
        ("one .a, b, c. or one a step", lambda: fused(x, 5, (1.0, 2.0))),
        ("algorithm must be one of auto, standard, gram", lambda: fused(x, 5, "model", "fast")),
        ("take algorithm 'standard'", lambda: fused(x, 5, (1.0, -2.0, 0.5), "gram")),
        ("matrix units take bfloat16 or float16, got torch.float32", lambda: fused(x.float())),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_registration():
    flat = [number for step in ROOM.coefficients_of(5, "model") for number in step]
    for algorithm in ("standard", "gram"):
        torch.library.opcheck(ROOM.newton_schulz_op, (randn(2, 16, 48, dtype=torch.bfloat16), flat, algorithm))


def test_compiled():
    gradients = randn(2, 16, 48, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    assert torch.equal(compiled(gradients), fused(gradients))


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    still = randn(4, 256, 1024, dtype=torch.bfloat16)
    fused(still)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(still)
    still.copy_(randn(4, 256, 1024, dtype=torch.bfloat16, seed=9))
    graph.replay()
    assert torch.equal(out, fused(still))


@pytest.mark.parametrize("name", ["query", "expand", "project"])
def test_gradients_of_a_real_run(name):
    """Of a d4 model's training (gradients.py says how): the band, and the direction that float64 gives."""
    gradients = saved()[name].to(DEVICE)
    assert gradients.dtype == torch.bfloat16 and gradients.shape[0] * gradients.shape[1] >= 256**2
    if not GPU:  # of every eighth row and column, for the interpreter; the spectrum stays as uneven
        gradients = gradients[::8, ::8]
    left, before, right = torch.linalg.svd(gradients.double(), full_matrices=False)
    strong = before >= 1e-2 * before.norm()
    true = oracle(gradients)
    for algorithm in ("standard", "gram"):
        out = fused(gradients, algorithm=algorithm)
        turned = torch.diagonal(left.mT @ out.double() @ right.mT)[strong]
        assert strong.sum() > 5 and turned.min() > 0.66 and turned.max() < 1.16
        assert cosine(out, true) >= 0.999
