"""softcap_cross_entropy in Triton against the reference, and the kernels that both cross entropies share."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from tests.kernels import harness
from tests.kernels.cross_entropy import check_weights_that_are_not_finite, target_entries, weights
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_compiled, check_graph_replay, randn

FILE = importlib.import_module("nanochat_kernels.softcap_cross_entropy")
PARTS = importlib.import_module("nanochat_kernels.cross_entropy_kernels")
STEM = "cross_entropy_kernels"
PLANTED_FAULTS = {
    "no mask on the streamed sum": (
        STEM,
        "tl.where(mask, exponential(weight_of(z, CAP), CAP), 0.0)",
        "exponential(weight_of(z, CAP), CAP)",
        "test_softcap_cross_entropy",
    ),
    "ignored rows have a gradient": (
        STEM,
        "== ignore_index, 0.0, 4.0 * factor)",
        "== -7, 0.0, 4.0 * factor)",
        "test_softcap_cross_entropy",
    ),
    "ignored rows have a loss": (STEM, "tl.where(counts, loss, 0.0)", "loss", "test_softcap_cross_entropy"),
    "derivative of the cap dropped": (
        STEM,
        "exponential(w, CAP) * (w * rest) * share",
        "exponential(w, CAP) * share",
        "test_softcap_cross_entropy",
    ),
    "target's one dropped": (STEM, "value = -others /", "value = exact /", "test_softcap_cross_entropy"),
    "1 - w cancels": (
        STEM,
        "tl.where(w > 0.75, u * w, 1.0 - w)",
        "1.0 - w",
        "test_the_derivative_where_tanh_is_nearly_minus_one",
    ),
    "factor of the first row for all": (
        STEM,
        "factor = tl.load(factor_ptr + row * factor_stride)",
        "factor = tl.load(factor_ptr)",
        "test_softcap_cross_entropy",
    ),
    "factor missing at the target": (STEM, "        if FACTOR:\n", "        if False:\n", "test_softcap_cross_entropy"),
    "row stride ignored": (
        STEM,
        "logits_ptr + (row * row_stride + start) + column, mask=mask, other=0.0).to(tl.float32)\n        w, rest",
        "logits_ptr + (row * width + start) + column, mask=mask, other=0.0).to(tl.float32)\n        w, rest",
        "test_logits_of_any_strides",
    ),
    "32-bit rows": (
        STEM,
        "    row = tl.program_id(0).to(tl.int64)\n    column = tl.arange(0, CHUNK)\n    factor",
        "    row = tl.program_id(0)\n    column = tl.arange(0, CHUNK)\n    factor",
        "test_offsets_are_64_bits_wide",
    ),
    "NaN in the target's kernel dropped": (
        STEM,
        "tl.where(others < 0.0, 0.0, others)",
        "tl.where(others > 0.0, others, 0.0)",
        "test_nan_and_infinity",
    ),
    "ignored targets counted": (
        "softcap_cross_entropy",
        "(targets != ignore_index).sum()",
        "(targets != -7).sum()",
        "test_softcap_cross_entropy",
    ),
    "loss weight forgotten": (
        "softcap_cross_entropy",
        "share if loss_weight is None else share * loss_weight",
        "share",
        "test_softcap_cross_entropy",
    ),
}


def loss(logits, targets, *options, **more):
    return kernels.softcap_cross_entropy(logits, targets, *options, **more, impl="triton")


def inputs(rows, vocabulary, dtype, seed=0, layout="contiguous", scale=4.0, ignored=0.3):
    logits = randn(rows, vocabulary, dtype=dtype, seed=seed, layout=layout).mul_(scale)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -1
    return [logits, targets.to(DEVICE)]


@harness.property_test
@example(
    rows=6,
    vocabulary=70,
    dtype=torch.bfloat16,
    layout="slice",
    softcap=15.0,
    reduction="mean",
    scale=4.0,
    weight="row",
    seed=2,  # two of the targets are ignored
)
@example(
    rows=5, vocabulary=1000, dtype=torch.float32, layout="columns", softcap=30.0, reduction="none", scale=30.0, weight=None,
    seed=2,
)  # fmt: skip
@given(
    rows=st.integers(1, 6),
    vocabulary=st.one_of(st.integers(1, 70), st.sampled_from((128, 1000, 1024))),
    dtype=harness.dtypes,
    layout=harness.layouts,
    softcap=st.sampled_from((1.0, kernels.SOFTCAP, 20.0, 30.0)),
    reduction=st.sampled_from(("mean", "none")),
    scale=st.sampled_from((0.1, 4.0, 30.0)),
    weight=st.sampled_from((None, "scalar", "row")),
    seed=harness.seeds,
)
def test_softcap_cross_entropy(rows, vocabulary, dtype, layout, softcap, reduction, scale, weight, seed):
    logits, targets = inputs(rows, vocabulary, dtype, seed, layout, scale)
    given_ = [logits, targets, softcap, -1, reduction, weights(rows, weight, seed)]
    # rounding error of l (see cross_entropy_kernels.py), which few logits do not average out
    resolution = softcap * 2.0**-23
    apart = {1: target_entries(rows, vocabulary, targets)}
    check(loss, reference.softcap_cross_entropy, given_, [0], seed, resolution, apart)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [32_768, 50_257, 65_536, 100_000] if GPU else [5003, 65_536])
def test_production_vocabularies(vocabulary, dtype, reduction):
    rows = 257 if GPU else 2
    logits, targets = inputs(rows, vocabulary, dtype, scale=3.0, ignored=0.3 if GPU else 0.0)
    assert (targets >= 0).any()
    apart = {1: target_entries(rows, vocabulary, targets)}
    check(loss, reference.softcap_cross_entropy, [logits, targets, kernels.SOFTCAP, -1, reduction], [0], apart=apart)


@pytest.mark.parametrize("layout", ["columns", "slice", "transposed"])
def test_logits_of_any_strides(layout):
    check(loss, reference.softcap_cross_entropy, inputs(5, 300, torch.float32, layout=layout), [0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_logits(dtype):
    """With logits at ±softcap the sum of exp(l) reaches its largest and smallest values."""
    logits = torch.tensor([[200.0, -200.0, -200.0], [-200.0, -200.0, -200.0], [60.0, 40.0, -60.0]], device=DEVICE)
    targets = torch.tensor([0, 1, 1], device=DEVICE)
    check(loss, reference.softcap_cross_entropy, [logits.to(dtype), targets, kernels.SOFTCAP, -1, "none"], [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_derivative_where_tanh_is_nearly_minus_one(dtype):
    """Where w = (1 − tanh)/2 is nearly 1, computing 1 − w as a difference would cancel most or all digits."""
    logits = torch.linspace(-60.0, -90.0, 40, device=DEVICE).to(dtype)[None].repeat(2, 1)
    targets = torch.tensor([3, 20], device=DEVICE)
    (found,), (exact,) = (
        torch.autograd.grad(f(x, targets).sum(), x)
        for f, x in (
            (loss, logits.float().requires_grad_()),
            (reference.softcap_cross_entropy, logits.double().requires_grad_()),
        )
    )
    others = ~target_entries(2, 40, targets)
    torch.testing.assert_close(found.double()[others], exact[others], rtol=1e-4, atol=0)


def test_a_float16_gradient_is_rounded_after_the_scale_of_the_loss():
    """A loss scale keeps small gradients from rounding to 0: no entry far above float16's smallest number may be 0."""
    rows, vocabulary = 4, 4096
    logits, targets = inputs(rows, vocabulary, torch.float16, ignored=0.0, scale=1.0)
    (found,) = torch.autograd.grad(loss(logits.requires_grad_(), targets) * 65536.0, logits)
    x = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.softcap_cross_entropy(x, targets) * 65536.0, x)
    assert (exact.abs() > 1e-4).float().mean() > 0.9 and not (found == 0)[exact.abs() > 1e-4].any()
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=1e-7)


def test_all_ignored_is_zero():
    logits, targets = inputs(3, 40, torch.float32, ignored=1.1)
    value, grad = harness.evaluate(loss, [logits, targets], [torch.ones((), device=DEVICE)], [0])
    assert value == 0 and not grad.any()


def test_another_ignore_index():
    logits, targets = inputs(6, 40, torch.float32, ignored=0.0)
    check(loss, reference.softcap_cross_entropy, [logits, targets, kernels.SOFTCAP, int(targets[2]), "mean"], [0])


def test_a_target_outside_gives_nan_and_no_stray_access():
    logits, _ = inputs(3, 40, torch.bfloat16)
    values = loss(logits, torch.tensor([3, 99, -5], device=DEVICE), reduction="none")
    assert values[0].isfinite() and values[1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    logits, targets = inputs(4, 50, dtype, ignored=0.0)
    harness.check_nonfinite(loss, reference.softcap_cross_entropy, [logits, targets, kernels.SOFTCAP, -1, "none"], [0])
    targets[2] = -1
    harness.check_nonfinite(loss, reference.softcap_cross_entropy, [logits, targets, kernels.SOFTCAP, -1, "mean"], [0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_weights_that_are_not_finite(dtype):
    logits, targets = inputs(6, 50, dtype, ignored=0.0)
    targets[2] = -1
    check_weights_that_are_not_finite(loss, reference.softcap_cross_entropy, [logits, targets], (0,))


def test_the_gradient_sums_to_zero_if_the_cap_does_not_matter():
    """Σ_j dloss/dl_j = 0, and l ≈ z for logits much smaller than the softcap."""
    logits, targets = inputs(4, 50, torch.float32, scale=0.5, ignored=0.0)
    _, grad = harness.evaluate(lambda z, t: loss(z, t, 40.0), [logits, targets], [torch.ones((), device=DEVICE)], [0])
    assert grad.sum(1).abs().max() < 1e-3 * grad.abs().max()


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_factor_of_the_loss_multiplies_the_gradient(factor, reduction):
    def scaled(operation):
        return lambda z, t: operation(z, t, reduction=reduction) * factor

    check(scaled(loss), scaled(reference.softcap_cross_entropy), inputs(5, 300, torch.float32), [0])


def test_backward_twice_gives_the_same():
    logits, targets = inputs(3, 40, torch.bfloat16)
    value = loss(logits.requires_grad_(), targets) * 3
    first, second = (torch.autograd.grad(value, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_logits_are_not_changed():
    logits, targets = inputs(3, 40, torch.bfloat16)
    before = logits.clone()
    loss(logits.requires_grad_(), targets).backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("shape", [(0, 8)])
def test_empty_batch(shape):
    given_ = [torch.empty(shape, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)]
    for reduction in ("mean", "none"):
        check(loss, reference.softcap_cross_entropy, [*given_, kernels.SOFTCAP, -1, reduction], [0])


@pytest.mark.parametrize("kernel", FILE.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    logits, targets = inputs(3, 5000, torch.float32)
    expected = reference.softcap_cross_entropy(logits, targets, reduction="none")
    _, grad = harness.evaluate(
        lambda z, t: reference.softcap_cross_entropy(z, t, reduction="none"),
        [logits, targets],
        [torch.ones(3, device=DEVICE)],
        [0],
    )
    _, sums = PARTS.launch_losses(logits, targets, kernels.SOFTCAP, -1)
    for parameters in kernel.space:
        if kernel.name == "cross_entropy_sums":
            torch.testing.assert_close(
                PARTS.launch_losses(logits, targets, kernels.SOFTCAP, -1, parameters)[0], expected
            )
        else:
            one = torch.ones((), device=DEVICE)
            torch.testing.assert_close(
                PARTS.launch_gradient(logits, targets, sums, one, kernels.SOFTCAP, -1, parameters), grad
            )


def test_offsets_are_64_bits_wide():
    harness.assert_64_bit_offsets(*FILE.KERNELS)


def test_derivatives_that_do_not_exist_raise():
    given_ = inputs(3, 40, torch.float32)
    harness.check_second_derivative_raises(loss, given_, [0])
    harness.check_jvp_raises(loss, given_, [0])


def test_vmap():
    harness.check_vmap(loss, inputs(3, 40, torch.float32), [0], [0])


def test_autocast():
    logits, targets = inputs(4, 50, torch.bfloat16, ignored=0.0)
    harness.check_autocast(loss, reference.softcap_cross_entropy, [logits, targets], [0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    check_compiled(loss, inputs(4, 64, dtype), [0], units=4)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(loss, inputs(64, 1000, torch.bfloat16), [0])


def test_another_device():
    harness.check_other_device(loss, inputs(64, 1000, torch.bfloat16), [0])


@pytest.mark.skipif(not GPU, reason="needs the memory of a GPU")
def test_more_logits_than_an_int32_can_number():
    logits = torch.zeros(2**15 + 8, 2**16, dtype=torch.bfloat16, device=DEVICE)
    logits[-8:] = randn(8, 2**16, dtype=torch.bfloat16)
    targets = torch.randint(2**16, (logits.size(0),), device=DEVICE)
    last = [logits[-8:].clone(), targets[-8:]]
    value, grad = harness.evaluate(loss, [logits, targets], [torch.ones((), device=DEVICE)], [0])
    _, expected = harness.evaluate(loss, last, [torch.full((), 8 / logits.size(0), device=DEVICE)], [0])
    torch.testing.assert_close(grad[-8:], expected, rtol=1e-2, atol=0)
    assert value.isfinite()


def test_bad_input():
    logits, targets = inputs(3, 40, torch.float32)

    def raises(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.softcap_cross_entropy(*arguments, **more)

    raises(TypeError, "logits must be floating point", logits.int(), targets)
    raises(ValueError, r"logits must have shape \(N, V\)", logits[0], targets)
    raises(ValueError, r"targets must have shape \(3\)", logits, targets[:2])
    raises(ValueError, "targets is on meta", logits, targets.to("meta"))
    raises(TypeError, "targets must be int64, got torch.int32", logits, targets.int())
    raises(ValueError, "softcap must be positive", logits, targets, 0.0)
    raises(ValueError, "softcap must be positive", logits, targets, float("nan"))
    raises(ValueError, "the vocabulary is empty", logits[:, :0], targets)
    raises(ValueError, "reduction must be 'mean' or 'none', got 'sum'", logits, targets, reduction="sum")
    raises(
        TypeError, r"loss_weight must be float32 of shape \(\) or \(3,\)", logits, targets, loss_weight=logits[:, :2]
    )
    raises(TypeError, "got torch.float64", logits, targets, loss_weight=torch.ones(3, device=DEVICE).double())
    raises(kernels.KernelRequestError, "a softcap of at most 40", logits, targets, 50.0, impl="triton")
    raises(kernels.KernelRequestError, "float64", logits.double(), targets, impl="triton")
    many = torch.zeros(1, 1, device=DEVICE).expand(2**31, 1)
    raises(
        kernels.KernelRequestError, "exceed the", many, torch.zeros(1, dtype=torch.int64, device=DEVICE).expand(2**31),
        impl="triton",
    )  # fmt: skip
