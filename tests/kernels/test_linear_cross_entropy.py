"""linear_cross_entropy in Triton against the reference."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from nanochat_kernels.dispatch import KernelRequestError
from tests.kernels import harness
from tests.kernels.cross_entropy import check_weights_that_are_not_finite, target_entries, weights
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_compiled, check_graph_replay, randn

FILE = importlib.import_module("nanochat_kernels.linear_cross_entropy")
PARTS = importlib.import_module("nanochat_kernels.cross_entropy_kernels")
STEM = "cross_entropy_kernels"
PLANTED_FAULTS = {
    "on-chip derivative of the cap dropped": (STEM, "pack(e * (w - w * w), f", "pack(e, f", "test_loss_and_gradients"),
    "on-chip sum of the last chunk not masked": (STEM, "e = tl.where(2 * pair < width - i * CHUNK, e, 0.0)",
     "e = e", "test_loss_and_gradients"),
    "odd column of the last chunk not masked": (STEM, "f = tl.where(2 * pair + 1 < width - i * CHUNK, f, 0.0)",
     "f = f", "test_loss_and_gradients"),
    "packed row not kept until it is written": (STEM, "        kept = read\n", "", "test_loss_and_gradients"),
    "last row not written": (STEM, "    for i in tl.static_range(CHUNKS):\n        store",
     "    for i in tl.static_range(0):\n        store", "test_loss_and_gradients"),
    "doubled past the first chunk": (STEM, "kept[i] | (new & zero), share,",
     "kept[i] | (new & zero), share * (1 + (i > 0)),", "test_the_gradient_of_the_logits"),
    "last row doubled past the first chunk": (STEM, "kept[i], share, EVEN",
     "kept[i], share * (1 + (i > 0)), EVEN", "test_the_gradient_of_the_logits"),
    "exponent of the packing off by one": (STEM, "(1 << TOP)\n        written",
     "(2 << TOP)\n        written", "test_loss_and_gradients"),
    "packing cut off, not rounded": (STEM, "((64 + TOP) << 23) - (1 << 12)",
     "((64 + TOP) << 23)", "test_packed_numbers"),
    "packing wraps for negative numbers": (STEM, "tl.maximum(low.to(tl.int32, bitcast=True), LEAST) - LEAST",
     "tl.maximum(low.to(tl.int32, bitcast=True) - LEAST, 0)", "test_a_slightly_negative_number_packs_to_nearly_zero"),
    "previous row written to the wrong row": (STEM, "written_ptr = logits_ptr + row * row_stride\n",
     "written_ptr = logits_ptr + first * row_stride\n", "test_loss_and_gradients"),
    "32-bit rows on the chip": (STEM, "    first = tl.program_id(0).to(tl.int64)\n",
     "    first = tl.program_id(0)\n", "test_offsets_are_64_bits_wide"),
    "min drops NaN": (STEM, "60.0, propagate_nan=tl.PropagateNan.ALL))\n    b",
     "60.0))\n    b", "test_offsets_are_64_bits_wide"),
    "factor dropped on the chip": (STEM, "factor = tl.load(factor_ptr + row * factor_stride) if FACTOR else 1.0",
     "factor = 1.0", "test_a_weighted_mean_is_rounded_once"),
    "factor of the first row for all": (STEM, "tl.load(factor_ptr + row * factor_stride) if",
     "tl.load(factor_ptr + first * factor_stride) if", "test_a_weighted_mean_is_rounded_once"),
    "factor applied twice": ("linear_cross_entropy", "torch.where(factor == 0, dlosses, dlosses / factor)",
     "dlosses", "test_a_weighted_mean_is_rounded_once"),
    "a weight of 0 divided by": ("linear_cross_entropy", "torch.where(factor == 0, dlosses, dlosses / factor)",
     "dlosses / factor", "test_a_weighted_mean_is_rounded_once"),
    "weight's gradient without the factor": ("linear_cross_entropy", "(x * factor[:, None]).to(x.dtype)",
     "x", "test_loss_and_gradients"),
    "input's gradient without the factor": ("linear", "(sums * factor[:, None]).to(x.dtype)",
     "sums.to(x.dtype)", "test_loss_and_gradients"),
    "logits read after they are overwritten": (STEM, "launch_targets(target_logits, targets, sums, losses, factor, logits,",
     "launch_targets(logits_of_targets(logits, targets), targets, sums, losses, factor, logits,", "test_loss_and_gradients"),
}  # fmt: skip


def fused(x, weight, targets, *options, **more):
    return kernels.linear_cross_entropy(x, weight, targets, *options, **more, impl="triton")


def inputs(rows, width, vocabulary, dtype, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    x, weight = randn(rows, width, dtype=dtype, seed=seed), randn(vocabulary, width, dtype=dtype, seed=seed + 1)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -1
    return [x, weight, targets.to(x.device)]


@harness.property_test
@example(rows=33, width=54, vocabulary=274, dtype=torch.bfloat16, reduction="mean", ignored=0.3, weight="row", seed=1)
@example(rows=33, width=54, vocabulary=274, dtype=torch.float16, reduction="none", ignored=0.3, weight="row", seed=2)
@example(rows=9, width=30, vocabulary=3, dtype=torch.bfloat16, reduction="mean", ignored=0.3, weight="row", seed=1)
@given(
    rows=st.integers(0, 40), width=st.integers(1, 70), vocabulary=st.integers(1, 300), dtype=harness.dtypes,
    reduction=st.sampled_from(("mean", "none")), ignored=st.sampled_from((0.0, 0.3, 1.1)),
    weight=st.sampled_from((None, "scalar", "row")), seed=harness.seeds,
)  # fmt: skip
def test_loss_and_gradients(rows, width, vocabulary, dtype, reduction, ignored, weight, seed):
    epsilon = kernels.SOFTCAP * 2**-23  # the cross entropy's own
    given_ = inputs(rows, width, vocabulary, dtype, seed, ignored)
    check(
        fused,
        reference.linear_cross_entropy,
        [*given_, kernels.SOFTCAP, -1, reduction, weights(rows, weight, seed)],
        (0, 1),
        seed,
        epsilon,
    )


@pytest.mark.parametrize("weight", ["scalar", "row", "zeros"])
def test_a_weighted_mean_is_rounded_once(weight):
    """The call of a training run: an upstream gradient of 1 and a float32 buffer. The loss weights are not powers of two."""
    rows, vocabulary = (300, 4000) if GPU else (60, 100)
    x, head, targets = inputs(rows, 64, vocabulary, torch.bfloat16)
    factor = (1.0 + torch.rand(() if weight == "scalar" else rows, generator=torch.Generator().manual_seed(3))).to(
        DEVICE
    )
    if weight == "zeros":
        factor[::2] = 0.0

    def gradients(function, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        hidden, buffer = x.to(dtype, copy=True).requires_grad_(), torch.zeros(head.shape, dtype=wide, device=DEVICE)
        function(hidden, head.to(dtype), targets, kernels.SOFTCAP, -1, "mean", factor.to(wide), buffer).backward()
        return hidden.grad, buffer

    true = gradients(FILE.run_reference, torch.float64)
    plain = gradients(FILE.run_reference, torch.bfloat16)
    found = gradients(fused, torch.bfloat16)
    for ours, exact, other in zip(found, true, plain, strict=True):
        wrong = harness.over_budget(ours, exact, other)
        assert not wrong, wrong
        assert (ours - exact).norm() < 1.05 * (other - exact).norm()


@pytest.mark.parametrize("vocabulary", [65_536, 50_257, 32_768, 1024, 65_535, 3, 1] if GPU else [9000, 1024, 33, 1])
def test_the_gradient_of_the_logits(vocabulary):
    """Every element is judged, those of the targets separately, with several rows per program and with even and ragged chunks."""
    rows = 700 if GPU else 7
    logits = randn(rows, vocabulary, dtype=torch.bfloat16).mul_(3.0)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[1] = -1
    exact = logits.double().requires_grad_()
    plain = logits.clone().requires_grad_()
    up = torch.ones(rows, device=DEVICE)
    true = reference.softcap_cross_entropy(exact, targets, reduction="none")
    other = reference.softcap_cross_entropy(plain, targets, reduction="none")
    (true_gradient,), (other_gradient,) = (
        torch.autograd.grad(value, z, up.to(value.dtype)) for value, z in ((true, exact), (other, plain))
    )
    losses, _ = PARTS.launch_on_chip(logits, targets, None, kernels.SOFTCAP, -1, None if GPU else SMALL_CHUNKS)
    assert not harness.over_budget(
        losses[:, None], true.detach()[:, None], other.detach()[:, None], kernels.SOFTCAP * 2**-23
    )
    wrong = harness.over_budget(logits, true_gradient, other_gradient, apart=target_entries(rows, vocabulary, targets))
    assert not wrong, wrong


SMALL_CHUNKS = {"CHUNK": 1024, "AHEAD": 0, "PROGRAMS": 1, "num_warps": 4}


def through_packing(x):
    """Return the numbers of a tensor after packing and unpacking."""
    triton, tl = PARTS.triton, PARTS.tl
    pack, unpack = PARTS.pack, PARTS.unpack

    @triton.jit
    def pack_and_unpack(x_ptr, y_ptr, N: tl.constexpr):
        offsets = tl.arange(0, N)
        low, high = tl.split(tl.reshape(tl.load(x_ptr + offsets), [N // 2, 2]))
        tl.store(y_ptr + offsets, unpack(pack(low, high, 22)) * 4194304.0)

    y = torch.empty_like(x)
    globals().update(pack=pack, unpack=unpack, tl=tl)
    pack_and_unpack[(1,)](x, y, N=len(x))
    return y


def test_packed_numbers():
    """A number in [0, 2²²] packed in 16 bits has a relative error of 2⁻¹¹ down to 2⁻⁴⁰; smaller ones become at most 2⁻³⁹."""
    x = (2.0 ** torch.linspace(-60, 22, 1024, dtype=torch.float64)).to(DEVICE, torch.float32)
    y = through_packing(x)
    large = x >= 2.0**-40
    assert ((y - x).abs() / x)[large].max() <= 2.0**-11 * 1.0001
    assert (y[~large] <= 2.0**-39).all() and y[-1] == 2.0**22


def test_a_slightly_negative_number_packs_to_nearly_zero():
    """w − w² is −1.2e-7 for a w that the reciprocal rounds to one unit above 1; here times exponentials of all sizes."""
    w = torch.nextafter(torch.ones(()), torch.full((), 2.0))
    x = ((w - w * w) * 2.0 ** torch.linspace(-30, 22, 64)).to(DEVICE)
    assert (x < 0).all() and (through_packing(x) <= 2.0**-39).all()


def test_without_gradients():
    given_ = inputs(9, 32, 100, torch.bfloat16)
    with torch.no_grad():
        found = fused(*given_)
    assert found.item() == pytest.approx(reference.linear_cross_entropy(*given_).item(), rel=1e-3)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_s_gradient_is_added_to_a_buffer(impl, dtype):
    """Two calls with different loss weights add their float32 gradients, and the weight itself gets no gradient."""
    buffer = torch.full((50, 24), 3.0, device=DEVICE)
    exact = buffer.double()
    weight = inputs(1, 24, 50, dtype)[1].requires_grad_()
    for seed, scale in ((1, 0.25), (2, 4.0)):
        x, _, targets = inputs(30, 24, 50, dtype, seed)
        loss_weight = torch.full((), scale, device=DEVICE)
        x.requires_grad_()
        kernels.linear_cross_entropy(
            x, weight, targets, loss_weight=loss_weight, weight_gradient=buffer, impl=impl
        ).backward()
        wide = [x.detach().double(), weight.detach().double()]
        _, dx, dw = harness.evaluate(
            reference.linear_cross_entropy,
            [*wide, targets, kernels.SOFTCAP, -1, "mean", loss_weight],
            [torch.ones((), device=DEVICE).double()],
            (0, 1),
        )
        exact = exact + dw
        assert float((x.grad - dx).norm() / dx.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert weight.grad is None
    moved, wanted = buffer.double() - 3.0, exact - 3.0
    assert float((moved - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_the_buffer_stays_untouched_where_no_input_requires_a_gradient(impl):
    x, weight, targets = inputs(9, 16, 60, torch.float32)
    buffer = torch.zeros(60, 16, device=DEVICE)
    loss = kernels.linear_cross_entropy(x, weight, targets, weight_gradient=buffer, impl=impl)
    assert not loss.requires_grad
    for leaf in (x, weight):
        buffer.zero_()
        leaf.requires_grad_()
        kernels.linear_cross_entropy(x, weight, targets, weight_gradient=buffer, impl=impl).backward()
        leaf.requires_grad_(False)
        assert buffer.any() and weight.grad is None


@pytest.mark.parametrize("wrt", [(0,), (1,)])
def test_only_the_gradients_that_are_asked_for(wrt):
    check(fused, reference.linear_cross_entropy, inputs(9, 16, 60, torch.bfloat16), wrt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    given_ = [*inputs(6, 16, 60, dtype, ignored=0.0), kernels.SOFTCAP, -1, "none"]
    harness.check_nonfinite(fused, reference.linear_cross_entropy, given_, [0, 1], only=[0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_weights_that_are_not_finite(dtype):
    x, weight, targets = inputs(6, 16, 60, dtype, ignored=0.0)
    targets[2] = -1
    check_weights_that_are_not_finite(fused, reference.linear_cross_entropy, [x, weight, targets], (0, 1))


def test_the_largest_loss_weights():
    """Where a bfloat16 gradient overflows, as the docstring says."""
    for value, finite in ((1e30, True), (1e37, False)):
        given_ = [*inputs(6, 16, 60, torch.bfloat16), kernels.SOFTCAP, -1, "none", torch.full((), value, device=DEVICE)]
        found = harness.evaluate(fused, given_, [torch.ones(6, device=DEVICE)], (0, 1))
        assert found[0].isfinite().all() and all(x.isfinite().all() == finite for x in found[1:])


def test_nan_upstream_of_an_ignored_row_goes_nowhere():
    x, weight, targets = inputs(6, 16, 60, torch.float32, ignored=0.0)
    targets[2] = -1
    upstream = torch.ones(6, device=DEVICE).index_fill(0, torch.tensor([2], device=DEVICE), torch.nan)
    gradients = []
    for function in (fused, reference.linear_cross_entropy):
        leaves = [x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
        gradients.append(torch.autograd.grad(function(*leaves, targets, kernels.SOFTCAP, -1, "none"), leaves, upstream))
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found.isfinite(), expected.isfinite())


def test_nan_in_any_place_of_the_logits_reaches_the_whole_row():
    """It is put into either element of a pair that shares a reciprocal, in the first and the last chunk; other rows do not change."""
    clean = randn(4, 4096, dtype=torch.bfloat16)
    targets = torch.tensor([5, 6, 7, 8], device=DEVICE)
    for column in (0, 1, 2047, 4095):
        for value, expected in ((float("nan"), True), (float("inf"), False), (float("-inf"), False)):
            logits = clean.clone()
            logits[2, column] = value
            losses, _ = PARTS.launch_on_chip(logits, targets, None, kernels.SOFTCAP, -1, SMALL_CHUNKS)
            assert losses.isnan().tolist() == [False, False, expected, False]
            assert logits.isnan().any(1).tolist() == logits.isnan().all(1).tolist() == [False, False, expected, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_twice_gives_the_same(dtype):
    x, weight, targets = inputs(9, 16, 60, dtype)
    value = fused(x.requires_grad_(), weight, targets) * 3
    first, second = (torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_every_launch_configuration():
    logits = randn(5, 5000, dtype=torch.bfloat16)
    targets = torch.tensor([0, 4999, -1, 7, 8], device=DEVICE)
    x = logits.float().requires_grad_()
    expected = reference.softcap_cross_entropy(x, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    on_chip = next(kernel for kernel in FILE.KERNELS if kernel.name == "cross_entropy_on_chip")
    for parameters in on_chip.space:
        made = logits.clone()
        losses, _ = PARTS.launch_on_chip(made, targets, None, kernels.SOFTCAP, -1, parameters)
        torch.testing.assert_close(losses, expected.detach())
        torch.testing.assert_close(made.float(), gradient, rtol=2e-2, atol=1e-9)


def test_offsets_are_64_bits_wide():
    harness.assert_64_bit_offsets(*FILE.KERNELS)


def test_derivatives_that_do_not_exist_raise():
    for dtype in (torch.float32, torch.bfloat16):
        given_ = inputs(9, 16, 60, dtype)
        harness.check_second_derivative_raises(fused, given_, (0, 1))
        harness.check_jvp_raises(fused, given_, (0,))


def test_vmap():
    harness.check_vmap(fused, inputs(9, 16, 60, torch.float32), [0], (0, 1))


def test_autocast():
    """Inputs of any dtypes give bitwise the float32 loss of inputs in autocast's dtype."""
    x, weight, targets = inputs(9, 16, 60, torch.float32)
    plain = fused(x.bfloat16(), weight.bfloat16(), targets)
    for mixed in ((x, weight), (x.bfloat16(), weight), (x, weight.bfloat16())):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found, other = fused(*mixed, targets), reference.linear_cross_entropy(*mixed, targets)
        assert found.dtype == other.dtype == torch.float32 and torch.equal(found, plain)


@pytest.mark.skipif(not GPU, reason="memory is measured on a GPU")
def test_the_gradient_overwrites_the_logits():
    x, weight, targets = inputs(2048, 64, 65_536, torch.bfloat16)
    x.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(x, weight, targets, weight_gradient=torch.zeros(weight.shape, device=DEVICE)).backward()
    logits = 2 * 2048 * 65_536
    assert torch.cuda.max_memory_allocated() - before < 1.3 * logits


def test_unsupported_arguments_are_named():
    given_ = inputs(4, 16, 30, torch.float32)
    with pytest.raises(KernelRequestError, match=r"softcap of at most 40.0, got 50"):
        fused(*given_, 50.0)
    with pytest.raises(TypeError, match="weight_gradient must be contiguous float32"):
        fused(*given_, weight_gradient=torch.zeros(30, 16, device=DEVICE, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    check_compiled(fused, inputs(16, 32, 64, dtype), (0, 1), units=4)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(fused, inputs(64, 64, 512, torch.bfloat16), (0, 1))


def test_another_device():
    harness.check_other_device(fused, inputs(64, 64, 512, torch.bfloat16), (0, 1))
