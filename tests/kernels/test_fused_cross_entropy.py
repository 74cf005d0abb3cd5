"""linear_cross_entropy as three products, impl="fused", against the reference.

This file is long because the operation has two reductions, a buffer, loss weights and chunks, and because it lists many faults.
"""

import importlib
import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import matrix_product, reference
from nanochat_kernels.dispatch import KernelRequestError
from nanochat_kernels.oracle import over_budget
from tests.kernels import harness
from tests.kernels.cross_entropy import check_weights_that_are_not_finite, target_entries, weights
from tests.kernels.harness import DEVICE, GPU, check, check_compiled, check_graph_replay, randn

FILE = importlib.import_module("nanochat_kernels.fused_cross_entropy")
KERNELS = importlib.import_module("nanochat_kernels.fused_cross_entropy_kernels")
HEAD = importlib.import_module("nanochat_kernels.linear_cross_entropy")
DTYPES = (torch.bfloat16, torch.float32)
EPSILON = kernels.SOFTCAP * 2**-23  # the cross entropy's own
# rows of a chunk of the small matrices below, so that they take several
ROWS = 300 if GPU else 16


@pytest.fixture(autouse=True, scope="module")
def small_products():
    with harness.products_with(harness.PRODUCTS[0]):
        yield


@pytest.fixture
def several_chunks(monkeypatch):
    monkeypatch.setattr(FILE, "chunk_rows", lambda rows, *_: ROWS)


def fused(x, weight, targets, *options, **more):
    return kernels.linear_cross_entropy(x, weight, targets, *options, **more, impl="fused")


def inputs(rows, width, vocabulary, dtype, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    x, weight = randn(rows, width, dtype=dtype, seed=seed), randn(vocabulary, width, dtype=dtype, seed=seed + 1)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -1
    return [x, weight, targets.to(x.device)]


def of_logits(function):
    """The operation on logits (N, V): their product with the identity is exact, and x's gradient is that of the logits."""

    def run(logits, targets, *options):
        return function(logits, torch.eye(logits.size(1), dtype=logits.dtype, device=DEVICE), targets, *options)

    return run


@harness.property_test
@example(
    rows=33, width=30, vocabulary=150, dtype=torch.bfloat16, reduction="mean", ignored=0.3, weight="row", chunk=16,
    parameters=harness.PRODUCTS[0], seed=1,
)  # fmt: skip
@example(
    rows=33, width=32, vocabulary=160, dtype=torch.bfloat16, reduction="none", ignored=0.3, weight="row", chunk=20,
    parameters=harness.PRODUCTS[1], seed=2,
)  # fmt: skip
@example(
    rows=9, width=30, vocabulary=3, dtype=torch.float32, reduction="mean", ignored=0.3, weight="scalar", chunk=9,
    parameters=harness.PRODUCTS[2], seed=1,
)  # fmt: skip
@example(
    rows=1, width=16, vocabulary=40, dtype=torch.bfloat16, reduction="mean", ignored=0.0, weight=None, chunk=1,
    parameters=harness.PRODUCTS[0], seed=3,
)  # fmt: skip
@given(
    rows=st.integers(0, 40), width=st.integers(1, 40), vocabulary=st.integers(1, 170), dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(("mean", "none")), ignored=st.sampled_from((0.0, 0.3, 1.1)),
    weight=st.sampled_from((None, "scalar", "row")), chunk=st.integers(9, 40), parameters=harness.products, seed=harness.seeds,
)  # fmt: skip
def test_loss_and_gradients(rows, width, vocabulary, dtype, reduction, ignored, weight, chunk, parameters, seed):
    given_ = [*inputs(rows, width, vocabulary, dtype, seed, ignored), kernels.SOFTCAP, -1, reduction]
    with pytest.MonkeyPatch.context() as patch, harness.products_with(parameters):
        patch.setattr(FILE, "chunk_rows", lambda *_: chunk)
        check(
            fused, reference.linear_cross_entropy, [*given_, weights(rows, weight, seed)], (0, 1), seed, EPSILON
        )  # fmt: skip


@pytest.mark.parametrize("vocabulary", [8192, 5001, 30] if GPU else [96, 118, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_logits(dtype, vocabulary, several_chunks):
    """Every element is judged, those of the targets separately. The reference does not have to round these logits."""
    rows = 300 if GPU else 20
    logits = randn(rows, vocabulary, dtype=dtype).mul_(3.0)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[1] = -1
    apart = {1: target_entries(rows, vocabulary, targets)}
    plain = of_logits(reference.linear_cross_entropy)
    given_ = [logits, targets, kernels.SOFTCAP, -1, "none"]
    check(of_logits(fused), plain, given_, (0,), epsilon=EPSILON, apart=apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_logits(dtype):
    """With logits at ±softcap the sum of exp(l) reaches its largest and smallest values. Their gradient is 0."""
    logits = torch.tensor([[200.0, -200.0, -200.0], [-200.0, -200.0, -200.0], [60.0, 40.0, -60.0]], device=DEVICE)
    logits = torch.nn.functional.pad(logits, (0, 29), value=-150.0).to(dtype)
    targets = torch.tensor([0, 1, 1], device=DEVICE)
    plain = of_logits(reference.linear_cross_entropy)
    check(of_logits(fused), plain, [logits, targets, kernels.SOFTCAP, -1, "none"], (0,), epsilon=EPSILON)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_activations_have_no_gradient(dtype):
    x, weight, targets = inputs(9, 16, 60, dtype)
    found = harness.evaluate(fused, [1e6 * x, 1e6 * weight, targets], [torch.ones((), device=DEVICE)], (0, 1))
    true = reference.linear_cross_entropy(1e6 * x.double(), 1e6 * weight.double(), targets)
    assert abs(found[0] - true) <= 4 * EPSILON and not found[1].any() and not found[2].any()


@pytest.mark.parametrize("softcap", [1.0, 15.0, 40.0])
def test_probabilities_near_one_keep_their_precision(softcap):
    """The loss is about exp(−1.9·softcap), and so is the target's gradient: the difference of 1 and p would be 0 even in float64."""
    logits = torch.full((5, 32), -2.0 * softcap, device=DEVICE) + 0.01 * randn(5, 32, dtype=torch.float32)
    targets = torch.tensor([0, 31, 16, 15, 7], device=DEVICE)
    rows = torch.arange(5, device=DEVICE)
    logits[rows, targets] = 2.0 * softcap
    found = harness.evaluate(
        of_logits(fused), [logits, targets, softcap, -1, "none"], [torch.ones(5, device=DEVICE)], (0,)
    )
    z = logits.double() / softcap
    ratios = (softcap * (z.tanh() - z[rows, targets].tanh()[:, None])).exp()
    others = torch.where(target_entries(5, 32, targets), 0.0, ratios).sum(1)
    torch.testing.assert_close(found[0].double(), others.log1p(), rtol=1e-4, atol=0.0)
    gradient = -others / (1.0 + others) / z[rows, targets].cosh().square()
    torch.testing.assert_close(found[1][rows, targets].double(), gradient, rtol=1e-4, atol=0.0)


def in_dtype(function, x, head, targets, factor, dtype):
    """Return the loss, x's gradient and a buffer, as training calls the operation, from inputs in a dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    hidden, buffer = x.to(dtype, copy=True).requires_grad_(), torch.zeros(head.shape, dtype=wide, device=DEVICE)
    loss = function(hidden, head.to(dtype), targets, kernels.SOFTCAP, -1, "mean", factor.to(wide), buffer)
    loss.backward()
    return loss.detach(), hidden.grad, buffer


@pytest.mark.parametrize("weight", ["scalar", "row", "zeros"])
def test_a_weighted_mean_as_in_training(weight, several_chunks):
    """An upstream gradient of 1 and a float32 buffer; the loss is that of exact products within the rounding of float32."""
    rows, vocabulary = (300, 4000) if GPU else (60, 100)
    x, head, targets = inputs(rows, 64, vocabulary, torch.bfloat16)
    factor = 1.0 + torch.rand(() if weight == "scalar" else rows, generator=torch.Generator().manual_seed(3))
    factor = factor.to(DEVICE)
    if weight == "zeros":
        factor[::2] = 0.0
    given_ = x, head, targets, factor
    true, plain = (in_dtype(HEAD.run_reference, *given_, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = in_dtype(fused, *given_, torch.bfloat16)
    assert abs(found[0] - true[0]) <= EPSILON
    for ours, exact, other in zip(found[1:], true[1:], plain[1:], strict=True):
        wrong = over_budget(ours, exact, other)
        assert not wrong, wrong
        assert (ours - exact).norm() < 1.05 * (other - exact).norm()


@pytest.mark.parametrize("wrt", [(0,), (1,)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_that_are_asked_for(reduction, wrt):
    given_ = [*inputs(9, 16, 60, torch.bfloat16), kernels.SOFTCAP, -1, reduction]
    check(fused, reference.linear_cross_entropy, given_, wrt, epsilon=EPSILON)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_s_gradient_is_added_to_a_buffer(dtype, reduction, several_chunks):
    """Two forwards and then both backwards, with upstream gradients other than 1; the second forward must not see the first."""
    buffer = torch.full((50, 24), 3.0, device=DEVICE)
    exact, losses = buffer.double(), []
    weight = inputs(1, 24, 50, dtype)[1].requires_grad_()
    for seed, scale in ((1, 0.25), (2, -3.0)):
        x, _, targets = inputs(33, 24, 50, dtype, seed)
        options = kernels.SOFTCAP, -1, reduction
        losses.append(scale * fused(x.requires_grad_(), weight, targets, *options, weight_gradient=buffer).sum())
        assert (buffer == 3.0).all()  # backward adds, not forward
        wide = [x.detach().double(), weight.detach().double()]
        upstream = torch.full((() if reduction == "mean" else (33,)), scale, device=DEVICE, dtype=torch.float64)
        exact = (
            exact + harness.evaluate(reference.linear_cross_entropy, [*wide, targets, *options], [upstream], (1,))[1]
        )
    for loss in losses:
        loss.backward()
    assert weight.grad is None
    moved, wanted = buffer.double() - 3.0, exact - 3.0
    assert float((moved - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_buffer_stays_untouched_where_no_input_requires_a_gradient(reduction):
    x, weight, targets = inputs(9, 16, 60, torch.float32)
    buffer, scale = torch.zeros(60, 16, device=DEVICE), torch.ones((), device=DEVICE, requires_grad=True)
    options = kernels.SOFTCAP, -1, reduction
    assert not fused(x, weight, targets, *options, weight_gradient=buffer).requires_grad
    fused(x, weight, targets, *options, scale, buffer).sum().backward()
    assert not buffer.any() and scale.grad.isfinite()
    for leaf in (x, weight):
        buffer.zero_()
        leaf.requires_grad_()
        fused(x, weight, targets, *options, weight_gradient=buffer).sum().backward()
        leaf.requires_grad_(False)
        assert buffer.any() and weight.grad is None
        with torch.no_grad():
            fused(x, weight, targets, *options, weight_gradient=buffer.zero_())
        assert not buffer.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["scalar", "row"])
def test_the_gradient_of_the_loss_weight(kind, reduction):
    given_ = [*inputs(9, 16, 60, torch.float32), kernels.SOFTCAP, -1, reduction, weights(9, kind)]
    upstream = torch.full(() if reduction == "mean" else (9,), 0.5, device=DEVICE)
    found, expected = (
        harness.evaluate(function, given_, [upstream], (0, 6)) for function in (fused, reference.linear_cross_entropy)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, -2.5])
def test_an_upstream_gradient_multiplies_both_gradients(factor):
    given_, one = inputs(9, 16, 60, torch.float32), torch.ones((), device=DEVICE)
    (_, *once), (_, *scaled) = (harness.evaluate(fused, given_, [f * one], (0, 1)) for f in (1.0, factor))
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(b, factor * a)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_gives_the_same(reduction):
    x, weight, targets = inputs(9, 16, 60, torch.bfloat16)
    value = 3 * fused(x.requires_grad_(), weight.requires_grad_(), targets, reduction=reduction).sum()
    first, second = (torch.autograd.grad(value, (x, weight), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_change_no_loss_and_no_gradient_of_x(monkeypatch, reduction):
    given_ = [*inputs(3 * ROWS - 1, 16, 60, torch.bfloat16), kernels.SOFTCAP, -1, reduction]
    upstream = [torch.ones(() if reduction == "mean" else 3 * ROWS - 1, device=DEVICE)]
    whole = harness.evaluate(fused, given_, upstream, (0, 1))
    monkeypatch.setattr(FILE, "chunk_rows", lambda *_: ROWS)
    parts = harness.evaluate(fused, given_, upstream, (0, 1))
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[2], parts[2], rtol=2e-2, atol=1e-3)


@given(
    rows=st.integers(0, 2**18), width=st.sampled_from((1, 300, 50_257, 65_536, 2**21)), itemsize=st.sampled_from((2, 4))
)
@example(rows=65_536, width=65_536, itemsize=2)
def test_chunks_are_as_few_as_fit(rows, width, itemsize):
    step = FILE.chunk_rows(rows, width, itemsize)
    assert step >= 1 and (step == 1 or step * width * itemsize <= FILE.CHUNK_BYTES)
    largest = max(1, FILE.CHUNK_BYTES // (width * itemsize))
    if step < rows:
        assert step % FILE.TILE_ROWS == 0 or step < FILE.TILE_ROWS
        # as many as chunks of the largest size that is a multiple of the tile's rows
        largest = largest // FILE.TILE_ROWS * FILE.TILE_ROWS or largest
        assert -(-rows // step) == -(-rows // largest)


def test_chunks_of_the_model():
    """At most a gibibyte of E; tiles of the gradient of x, d12's to d32's on an H100, in as few rounds as 65,536 rows need."""
    assert FILE.chunk_rows(65_536, 65_536, 2) == 8192 and FILE.chunk_rows(65_536, 50_304, 2) == 9472
    tiles = (256, 6, 132), (128, 5, 132), (256, 13, 132), (128, 8, 132)
    assert [FILE.chunk_rows(65_536, 65_536, 2, x) for x in tiles] == [5632, 6656, 7680, 8192]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_ignored_is_zero(reduction):
    x, weight, targets = inputs(9, 16, 60, torch.bfloat16, ignored=1.1)
    shape = () if reduction == "mean" else (9,)
    for value in (1.0, torch.inf, torch.nan):
        given_ = [x, weight, targets, kernels.SOFTCAP, -1, reduction]
        found = harness.evaluate(fused, given_, [torch.full(shape, value, device=DEVICE)], (0, 1))
        assert not any(t.any() for t in found)


def test_another_ignore_index():
    """It is a token of the vocabulary, so that the target's logit of an ignored row is known."""
    x, weight, targets = inputs(9, 16, 60, torch.float32, ignored=0.0)
    given_ = [x, weight, targets, kernels.SOFTCAP, int(targets[2]), "mean"]
    check(fused, reference.linear_cross_entropy, given_, (0, 1), epsilon=EPSILON)


def test_chunks_fill_rounds_of_the_input_gradient(monkeypatch):
    calls = []
    monkeypatch.setattr(FILE, "chunk_rows", lambda *given: calls.append(given[3][:2]) or 16)
    x, weight, targets = inputs(9, 40, 60, torch.bfloat16)
    with harness.products_with(harness.SMALL_TILES):
        fused(x.requires_grad_(), weight, targets)
        fused(x.detach(), weight.requires_grad_(), targets)
    assert calls == [(harness.SMALL_TILES["BLOCK_M"], 2), (1, 1)]


def test_a_target_outside_gives_nan_and_no_stray_access():
    """In the loss, and in the gradients of its row and of the weight."""
    x, weight, _ = inputs(3, 16, 40, torch.bfloat16)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with harness.poisoned():
        values = fused(x, weight, torch.tensor([3, 40, -5], device=DEVICE), reduction="none")
        dx, dweight = torch.autograd.grad(values, (x, weight), torch.ones_like(values))
    assert values[0].isfinite() and values[1:].isnan().all()
    assert dx[0].isfinite().all() and dx[1:].isnan().all() and dweight.isnan().all()


def test_a_target_outside_writes_nothing():
    targets = torch.tensor([3, 40, -5], device=DEVICE)
    ones, losses, around = (
        torch.ones(1, 3, device=DEVICE),
        torch.empty(3, device=DEVICE),
        torch.zeros(3, 64, device=DEVICE),
    )
    KERNELS.launch_rows(
        ones, targets, ones[0], None, losses, around[:, :40], torch.empty_like(losses), kernels.SOFTCAP, -1
    )
    assert around.nonzero().tolist() == [[0, 3]]
    around = torch.zeros(56, 16, device=DEVICE)
    KERNELS.add_target_rows(around[8:48], torch.ones(3, 16, device=DEVICE), targets, torch.ones(3, device=DEVICE))
    assert around.any(1).nonzero().tolist() == [[8 + 3]]


@pytest.mark.parametrize("parameters", harness.PRODUCTS)
def test_losses_are_those_of_logits_in_float32(parameters):
    """Also where torch computes the product, as of few rows."""
    x, weight, targets = inputs(9, 32, 80, torch.bfloat16, ignored=0.0)
    with harness.products_with(parameters):
        found = fused(x, weight, targets, reduction="none")
    exact = reference.linear_cross_entropy(x.double(), weight.double(), targets, reduction="none")
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    given_ = [*inputs(6, 16, 60, dtype, ignored=0.0), kernels.SOFTCAP, -1, "none"]
    harness.check_nonfinite(fused, reference.linear_cross_entropy, given_, [0, 1], only=[0, 1])
    given_[-1] = "mean"
    harness.check_nonfinite(fused, reference.linear_cross_entropy, given_, [0, 1], only=[0, 1])


def losses_of(logits, targets):
    """Return the losses of logits (N, V) that may be infinite, of which a product with the identity would make NaN."""
    (rows, width), part = logits.shape, 16
    sums, target_logits = torch.empty(width // part, rows, device=DEVICE), torch.empty(rows, device=DEVICE)
    arguments = sums, targets, target_logits, KERNELS.tl.constexpr(kernels.SOFTCAP), None, None
    KERNELS.launch(
        matrix_product.epilogue_kernel, (1, width // part), logits.device, logits, *[logits] * 3, arguments, rows, width,
        *[width] * 4, SLICES=1, EPILOGUE=KERNELS.EXPONENTIALS.triton, BLOCK_M=16, PART=part,
    )  # fmt: skip
    losses = torch.empty(rows, device=DEVICE)
    KERNELS.launch_rows(sums, targets, target_logits, None, losses, logits, None, kernels.SOFTCAP, -1)
    return losses


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite(value):
    """It is put into either element of a pair that shares a reciprocal, and into a target; NaN reaches its row, infinity saturates."""
    clean, targets = randn(4, 64, dtype=torch.float32), torch.tensor([5, 6, 7, 8], device=DEVICE)
    for column in (0, 1, 7, 31, 63):
        logits = clean.clone()
        logits[2, column] = value
        expected = reference.softcap_cross_entropy(logits, targets, reduction="none")
        torch.testing.assert_close(losses_of(logits, targets), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_weights_that_are_not_finite(dtype):
    x, weight, targets = inputs(6, 16, 60, dtype, ignored=0.0)
    targets[2] = -1
    check_weights_that_are_not_finite(fused, reference.linear_cross_entropy, [x, weight, targets], (0, 1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_upstream_gradient_that_is_not_finite_does_not_reach_ignored_rows(reduction):
    x, weight, targets = inputs(6, 16, 60, torch.float32, ignored=0.0)
    targets[2] = -1
    upstream = torch.full((), torch.nan, device=DEVICE)
    if reduction == "none":
        upstream = torch.ones(6, device=DEVICE).index_fill(0, torch.tensor([2], device=DEVICE), torch.nan)
    given_ = [x, weight, targets, kernels.SOFTCAP, -1, reduction]
    found, expected = (
        harness.evaluate(function, given_, [upstream], (0, 1)) for function in (fused, reference.linear_cross_entropy)
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("kernel", FILE.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    """Only those with small tiles on a CPU, where a large tile takes long."""
    x, weight, targets = inputs(40, 64, 200, torch.bfloat16)
    targets[:20] = targets[-1]
    true = reference.linear_cross_entropy(x.double(), weight.double(), targets, reduction="none")
    values, losses = FILE.matrix(40, 200, x.dtype, DEVICE), torch.empty(40, device=DEVICE)
    expected = torch.zeros(200, 64, device=DEVICE).index_add_(0, targets.clamp(min=0), x.float())
    for parameters in kernel.space:
        if not GPU and ("STAGES" in parameters or parameters.get("num_stages", 3) == 4):
            continue
        if kernel.name == "cross_entropy_target_rows":
            dweight, ones = torch.zeros(200, 64, device=DEVICE), torch.ones(40, device=DEVICE)
            FILE.add_target_rows(dweight, x, targets, ones, parameters)
            torch.testing.assert_close(dweight[1:], expected[1:])
            continue
        product, rows = (parameters, None) if kernel.is_compute_bound else (harness.SMALL_TILES, parameters)
        sums = FILE.exponentials(x, weight, targets, kernels.SOFTCAP, values, True, product)
        FILE.launch_rows(sums[0], targets, sums[1], None, losses, values, losses.clone(), kernels.SOFTCAP, -1, rows)
        assert (losses - true).abs().max() < (0.2 if "TORCH" in product else 1e-4), parameters
        assert values.isfinite().all()


def test_many_rows_with_one_target():
    """More than one step of the sum over them takes. The others are ignored, or have a target alone."""
    x, weight, targets = inputs(60, 16, 40, torch.float32, ignored=0.5)
    targets[::2], targets[1] = 7, 39
    check(fused, reference.linear_cross_entropy, [x, weight, targets], (0, 1), epsilon=EPSILON)


def test_many_parts():
    """More parts of each row than one step of the sum takes, with a number of rows that is no multiple of the program's."""
    x, weight, targets = inputs(5, 16, 9000 if GPU else 600, torch.bfloat16)
    check(fused, reference.linear_cross_entropy, [x, weight, targets], (0, 1), epsilon=EPSILON)


def test_offsets_are_64_bits_wide():
    harness.assert_64_bit_offsets(*FILE.KERNELS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_that_do_not_exist_raise(reduction):
    given_ = [*inputs(9, 16, 60, torch.float32), kernels.SOFTCAP, -1, reduction]
    harness.check_second_derivative_raises(fused, given_, (0, 1))
    harness.check_jvp_raises(fused, given_, (0,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap(reduction):
    given_ = [*inputs(9, 16, 60, torch.float32), kernels.SOFTCAP, -1, reduction]
    harness.check_vmap(lambda x, weight, targets: fused(x, weight, targets, *given_[3:]), given_[:3], [0], (0, 1))


def test_autocast():
    """Inputs of any dtypes give bitwise the float32 loss of inputs in autocast's dtype, and gradients in their own dtypes."""
    x, weight, targets = inputs(9, 16, 60, torch.float32)
    plain = fused(x.bfloat16(), weight.bfloat16(), targets)
    for mixed in ((x, weight), (x.bfloat16(), weight), (x, weight.bfloat16())):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found, other = fused(*mixed, targets), reference.linear_cross_entropy(*mixed, targets)
        assert found.dtype == other.dtype == torch.float32 and torch.equal(found, plain)
    one = torch.ones((), device=DEVICE)
    exact = harness.evaluate(
        reference.linear_cross_entropy, [x.double(), weight.double(), targets], [one.double()], (0, 1)
    )
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = harness.evaluate(fused, [x, weight.bfloat16(), targets], [one], (0, 1))
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.bfloat16]
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    given_ = [*inputs(16, 32, 64, torch.bfloat16), kernels.SOFTCAP, -1, reduction]
    check_compiled(fused, given_, (0, 1), units=4, is_opaque=True)


def test_the_products_are_opaque_to_the_compiler():
    """They have, without running, results of the shapes, strides and dtypes that they return."""
    x, weight, targets = inputs(9, 16, 60, torch.bfloat16)
    operation, factor = torch.ops.nanochat_kernels.linear_cross_entropy_chunks, torch.ones((), device=DEVICE)
    for needed in itertools.product((False, True), repeat=2):
        harness.check_opaque(operation, x, weight, targets, factor, kernels.SOFTCAP, -1, *needed)
    harness.check_opaque(operation, x.t().contiguous().t(), weight, targets, None, kernels.SOFTCAP, -1, True, True)
    harness.check_opaque(operation, x[:0], weight, targets[:0], None, kernels.SOFTCAP, -1, True, True)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_graph_replay(reduction, several_chunks):
    check_graph_replay(fused, [*inputs(640, 64, 512, torch.bfloat16), kernels.SOFTCAP, -1, reduction], (0, 1))


@pytest.mark.skipif(not GPU, reason="memory is measured on a GPU")
def test_one_chunk_of_exponentials_is_all_that_grows_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(FILE, "CHUNK_BYTES", 2**26)
    x, weight, targets = inputs(4096, 64, 65_536, torch.bfloat16)
    buffer = torch.zeros(weight.shape, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(x.requires_grad_(), weight, targets, weight_gradient=buffer).backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * (2**26 + 4 * weight.numel())


def test_another_device():
    harness.check_other_device(fused, inputs(64, 64, 512, torch.bfloat16), (0, 1))


def test_unsupported_arguments_are_named():
    given_ = inputs(4, 16, 30, torch.float32)
    with pytest.raises(KernelRequestError, match=r"softcap of at most 40.0, got 50"):
        fused(*given_, 50.0)
    with pytest.raises(KernelRequestError, match="float16 cannot hold"):
        fused(given_[0].half(), given_[1].half(), given_[2])
    with pytest.raises(TypeError, match="weight_gradient must be contiguous float32"):
        fused(*given_, weight_gradient=torch.zeros(30, 16, device=DEVICE, dtype=torch.float16))


# faults that a test must catch: see test_planted_faults.py
STEM, OPERATION = "fused_cross_entropy_kernels", "fused_cross_entropy"
PLANTED_FAULTS = {
    "derivative of the cap dropped": (STEM, "e * (w - w * w), f *", "e, f *", "test_the_gradient_of_the_logits"),
    "derivative of the cap dropped in odd columns": (STEM, "f * (v - v * v)", "f", "test_the_gradient_of_the_logits"),
    "saturated logits have a gradient": (STEM, "w, v = w - LEAST, v - LEAST", "w, v = w, v",
     "test_huge_activations_have_no_gradient"),
    "the target's term summed with the others": (STEM, "sums = tl.sum(tl.where(is_left, 0.0, e) + tl.where(is_right, 0.0, f), axis=1)",
     "pass", "test_loss_and_gradients"),
    "the target's term summed in odd columns": (STEM, "tl.where(is_right, 0.0, f)", "f", "test_the_gradient_of_the_logits"),
    "sums of columns beyond the last": (STEM, "tl.where(left < n - column, e, 0.0)", "e", "test_loss_and_gradients"),
    "sums of odd columns beyond the last": (STEM, "tl.where(left + 1 < n - column, f, 0.0)", "f",
     "test_a_weighted_mean_as_in_training"),
    "target's logit of the wrong neighbour": (STEM, "tl.where(is_right, other, 0.0)", "tl.where(is_right, z, 0.0)",
     "test_loss_and_gradients"),
    "target outside has a finite loss": (STEM, 'other=float("nan")).to(tl.float64)', "other=0.0).to(tl.float64)",
     "test_a_target_outside_gives_nan_and_no_stray_access"),
    "only the first parts added up": (STEM, "for start in tl.range(0, parts, PARTS)", "for start in tl.range(0, PARTS, PARTS)",
     "test_many_parts"),
    "parts of other rows": (STEM, "(start + part).to(tl.int64) * rows", "(start + part).to(tl.int64) * ROWS",
     "test_loss_and_gradients"),
    "a target outside is written": (STEM, "value, mask=known & counts)", "value, mask=mask & counts)",
     "test_a_target_outside_writes_nothing"),
    "a target outside has a row of the weight": (STEM, "(target >= 0) & (target < vocabulary):", "(target >= 0):",
     "test_a_target_outside_writes_nothing"),
    "logits of few rows rounded": (STEM, "exponentials_on_hopper, exact=True)", "exponentials_on_hopper)",
     "test_losses_are_those_of_logits_in_float32"),
    "32-bit rows": (STEM, "(start + part).to(tl.int64) * rows", "(start + part) * rows", "test_offsets_are_64_bits_wide"),
    "32-bit rows of targets": (STEM, "    position = tl.program_id(0).to(tl.int64)",
     "    position = tl.program_id(0)", "test_offsets_are_64_bits_wide"),
    "only the first rows with a target": (STEM, "in tl.range(position, end, ROWS)", "in tl.range(position, position + 1, ROWS)",
     "test_many_rows_with_one_target"),
    "last row with a target dropped": (STEM, "end = tl.load(ends_ptr + position)", "end = tl.load(ends_ptr + position) - 1",
     "test_loss_and_gradients"),
    "each row of a target begins again": (STEM, "is_first = (position == 0) | (before != target)",
     "is_first = position >= 0", "test_many_rows_with_one_target"),
    "targets' terms replace the others": (STEM, "value = tl.load(at, mask=column < width, other=0.0) + tl.sum(sums, axis=0)",
     "value = tl.sum(sums, axis=0)", "test_loss_and_gradients"),
    "targets' terms twice in the weight's gradient": (OPERATION,
     "            values.scatter_(1, wanted.clamp(0, weight.size(0) - 1)[:, None], 0.0)\n", "", "test_loss_and_gradients"),
    "targets' terms dropped": (OPERATION, "add_target_rows(dweight, x, targets, coefficients)", "pass",
     "test_loss_and_gradients"),
    "small losses rounded": (STEM, "tl.where(ratio < 1e-8, ratio, tl.log(1.0 + ratio))", "tl.log(1.0 + ratio)",
     "test_probabilities_near_one_keep_their_precision"),
    "ignored rows have a loss": (STEM, "tl.where(counts, loss, 0.0)", "loss", "test_loss_and_gradients"),
    "ignored rows have a gradient": (STEM, "scale = tl.where(counts, ", "scale = tl.where(mask, ",
     "test_another_ignore_index"),
    "the target's own probability dropped": (STEM, "total = others + tl.where(known, exact, 0.0)", "total = others",
     "test_loss_and_gradients"),
    "the target's entry from rounded sums": (STEM, "value = -others * w * rest", "value = (exact - total) * w * rest",
     "test_probabilities_near_one_keep_their_precision"),
    "the target's entry without the cap's derivative": (STEM, "value = -others * w * rest", "value = -others * 0.25",
     "test_loss_and_gradients"),
    "factor of the first row for all": (STEM, "tl.load(factor_ptr + row * factor_stride, mask=mask, other=0.0) if",
     "tl.load(factor_ptr + row * 0, mask=mask, other=0.0) if", "test_loss_and_gradients"),
    "factor of the first chunk for all": (OPERATION, "else factor[chunk]", "else factor[: chunk.stop - start]",
     "test_loss_and_gradients"),
    "targets of the first chunk for all": (OPERATION, "x[chunk], targets[chunk]", "x[chunk], targets[: chunk.stop - start]",
     "test_loss_and_gradients"),
    "each chunk replaces the weight's gradient": (OPERATION, "out=scaled), start == 0)", "out=scaled), True)",
     "test_loss_and_gradients"),
    "weight's gradient added to undefined memory": (OPERATION, "out=scaled), start == 0)", "out=scaled), False)",
     "test_loss_and_gradients"),
    "weight's gradient without the rows' scale": (OPERATION, "torch.mul(part, scale[:, None], out=scaled)", "part",
     "test_loss_and_gradients"),
    "forward adds to the buffer": (OPERATION, "        return reduced(found[0], factor, True), *found",
     "        _ = weight_gradient is not None and weight_gradient.add_(1.0)\n"
     "        return reduced(found[0], factor, True), *found", "test_the_weight_s_gradient_is_added_to_a_buffer"),
    "upstream gradient dropped for the buffer": (OPERATION, "weight_gradient.addcmul_(dweight, scale)",
     "weight_gradient.add_(dweight)", "test_the_weight_s_gradient_is_added_to_a_buffer"),
    "buffer overwritten": (OPERATION, "weight_gradient.add_(dweight)", "weight_gradient.copy_(dweight)",
     "test_the_weight_s_gradient_is_added_to_a_buffer"),
    "the buffer changed in place of nothing": (OPERATION, "needs_dw = needed and (", "needs_dw = (",
     "test_the_buffer_stays_untouched_where_no_input_requires_a_gradient"),
    "saved gradient scaled in place": (OPERATION, "torch.mul(dx, scale, out=torch.empty_like(dx))", "dx.mul_(scale)",
     "test_backward_twice_gives_the_same"),
    "upstream NaN reaches ignored rows": (OPERATION, "torch.where(counts, dloss, 0.0)[:, None]",
     "torch.where(counts | True, dloss, 0.0)[:, None]",
     "test_an_upstream_gradient_that_is_not_finite_does_not_reach_ignored_rows"),
    "upstream NaN with all rows ignored": (OPERATION, "torch.where(counts.any(), dloss, 0.0)", "dloss",
     "test_all_ignored_is_zero"),
    "gradient of the loss weight dropped": (OPERATION, "dfactor if ctx.needs_input_grad[3] else None", "None",
     "test_the_gradient_of_the_loss_weight"),
    "chunk too large": (OPERATION, "most = max(1, CHUNK_BYTES //", "most = 1 + max(1, CHUNK_BYTES //",
     "test_chunks_are_as_few_as_fit"),
    "more chunks than needed": (OPERATION, "+ ceil(rows / step) / 4", "", "test_chunks_are_as_few_as_fit"),
    "rounds of the input gradient not counted": (OPERATION, "input_gradient_tiles(x, weight) if needs_dx else (1, 1, 1)", "(1, 1, 1)",
     "test_chunks_fill_rounds_of_the_input_gradient"),
    "an unfinished round of tiles not counted": (OPERATION, "* across / at_once)", "* across) / at_once",
     "test_chunks_of_the_model"),
    "every part taken for one without a target": (STEM, "if tl.max(target, axis=0) >= 0:", "if tl.max(target, axis=0) > 0:",
     "test_loss_and_gradients"),
    "torch.compile told another shape": (OPERATION, "@opaque(result_shapes)",
     "@opaque(lambda *given: result_shapes(*given[:-1], True))", "test_the_products_are_opaque_to_the_compiler"),
    "float16 taken": (OPERATION, "if x.dtype == torch.float16", "if False", "test_unsupported_arguments_are_named"),
}  # fmt: skip
