"""softcap_cross_entropy in Triton against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.dispatch import room
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_compiled, check_graph_replay, randn

ROOM = room("softcap_cross_entropy")


def loss(logits, targets, cap=15.0, ignore_index=-1, reduction="mean"):
    return kernels.softcap_cross_entropy(logits, targets, cap, ignore_index, reduction, impl="triton")


def inputs(rows, vocabulary, dtype, seed=0, layout="contiguous", scale=4.0, ignored=0.3):
    logits = randn(rows, vocabulary, dtype=dtype, seed=seed, layout=layout).mul_(scale)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -1
    return [logits, targets.to(DEVICE)]


@harness.property_test
@given(
    rows=st.integers(1, 6),
    vocabulary=st.one_of(st.integers(1, 70), st.sampled_from((128, 1000, 1024))),
    dtype=harness.dtypes,
    layout=harness.layouts,
    cap=st.sampled_from((1.0, 15.0, 20.0, 30.0)),
    reduction=st.sampled_from(("mean", "none")),
    scale=st.sampled_from((0.1, 4.0, 30.0)),
    seed=harness.seeds,
)
def test_softcap_cross_entropy(rows, vocabulary, dtype, layout, cap, reduction, scale, seed):
    given_ = [*inputs(rows, vocabulary, dtype, seed, layout, scale), cap, -1, reduction]
    resolution = cap * 2.0**-23  # of l, as the room's heading says: counts where few logits make the sum
    check(loss, reference.softcap_cross_entropy, given_, [0], seed, resolution)
    with torch.no_grad():  # the kernel without a gradient
        check(loss, reference.softcap_cross_entropy, given_, epsilon=resolution)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [32_768, 50_257, 65_536, 100_000] if GPU else [5003, 65_536])
def test_production_vocabularies(vocabulary, dtype, reduction):
    """More than one chunk, even and ragged, and wider than the row that can be held."""
    given_ = inputs(257 if GPU else 2, vocabulary, dtype, scale=3.0)
    check(loss, reference.softcap_cross_entropy, [*given_, 15.0, -1, reduction], [0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_logits(dtype):
    """At ±cap a sum of exp(l) is all it can be, large or small."""
    logits = torch.tensor([[200.0, -200.0, -200.0], [-200.0, -200.0, -200.0], [60.0, 40.0, -60.0]], device=DEVICE)
    targets = torch.tensor([0, 1, 1], device=DEVICE)
    check(loss, reference.softcap_cross_entropy, [logits.to(dtype), targets, 15.0, -1, "none"], [0])


def test_all_ignored_is_zero():
    logits, targets = inputs(3, 40, torch.float32, ignored=1.0)
    value, grad = harness.evaluate(loss, [logits, targets], [torch.ones((), device=DEVICE)], [0])
    assert value == 0 and not grad.any()


def test_another_ignore_index():
    logits, targets = inputs(6, 40, torch.float32, ignored=0.0)
    check(loss, reference.softcap_cross_entropy, [logits, targets, 15.0, int(targets[2]), "mean"], [0])


def test_a_target_outside_gives_nan_and_no_stray_access():
    logits, _ = inputs(2, 40, torch.bfloat16)
    values = loss(logits, torch.tensor([3, 99], device=DEVICE), reduction="none")
    assert values[0].isfinite() and values[1].isnan()


def test_gradient_sums_to_zero_where_the_cap_does_not_bend():
    """Σ_j dloss/dl_j = 0; with a huge cap l = z."""
    logits, targets = inputs(4, 50, torch.float32, scale=0.5, ignored=0.0)
    _, grad = harness.evaluate(lambda z, t: loss(z, t, 40.0), [logits, targets], [torch.ones((), device=DEVICE)], [0])
    assert grad.sum(1).abs().max() < 1e-3 * grad.abs().max()


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_multiplies_the_loss_multiplies_the_gradient(factor, reduction):
    def scaled(operation):
        return lambda z, t: operation(z, t, reduction=reduction) * factor

    check(scaled(loss), scaled(reference.softcap_cross_entropy), inputs(5, 300, torch.float32), [0])


def test_second_backward_is_refused_not_wrong():
    logits, targets = inputs(3, 40, torch.float32)
    value = loss(logits.requires_grad_(), targets) * 3
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_logits_are_left_alone():
    logits, targets = inputs(3, 40, torch.bfloat16)
    before = logits.clone()
    loss(logits.requires_grad_(), targets).backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("shape", [(0, 8)])
def test_empty_batch(shape):
    given_ = [torch.empty(shape, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)]
    for reduction in ("mean", "none"):
        check(loss, reference.softcap_cross_entropy, [*given_, 15.0, -1, reduction], [0])


@pytest.mark.parametrize("kernel", ROOM.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    dtype = kernel.dtypes[0] if "held" in kernel.name else torch.float32
    logits, targets = inputs(3, 5000, dtype)
    expected = reference.softcap_cross_entropy(logits.float(), targets)
    _, grad = harness.evaluate(reference.softcap_cross_entropy, [logits, targets], [torch.ones((), device=DEVICE)], [0])
    for parameters in kernel.space:
        value, found = ROOM.launch(logits, targets, 15.0, -1, True, True, parameters)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(found, grad)


def test_packed_numbers():
    """16 bits for a number in [0, 2²²]: within 2⁻¹¹ of it down to 2⁻⁴⁰, and no more than 2⁻⁴⁰ for what is smaller."""
    triton, tl = ROOM.triton, ROOM.tl
    pack, unpack = ROOM.pack, ROOM.unpack

    @triton.jit
    def there_and_back(x, y, N: tl.constexpr):
        at = tl.arange(0, N)
        low, high = tl.split(tl.reshape(tl.load(x + at), [N // 2, 2]))
        tl.store(y + at, unpack(pack(low, high, 22)) * 4194304.0)

    exponents = torch.linspace(-60, 22, 1024, dtype=torch.float64)
    x = (2.0**exponents).to(DEVICE, torch.float32)
    y = torch.empty_like(x)
    globals().update(pack=pack, unpack=unpack, tl=tl)
    there_and_back[(1,)](x, y, N=1024)
    large = x >= 2.0**-40
    assert ((y - x).abs() / x)[large].max() <= 2.0**-11 * 1.0001
    assert (y[~large] <= 2.0**-39).all() and y[-1] == 2.0**22


def test_registration():
    logits, targets = inputs(3, 40, torch.float32)
    torch.library.opcheck(ROOM.loss_op, (logits.detach(), targets, 15.0, -1, True, False))
    torch.library.opcheck(ROOM.loss_op, (logits, targets, 15.0, -1, True, True))
    torch.library.opcheck(ROOM.scale_rows_op, (logits.clone(), torch.tensor(2.0, device=DEVICE)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    check_compiled(loss, inputs(4, 64, dtype), [0])


def test_a_deep_model_compiles_in_seconds():
    """Inductor of torch 2.11 wrote out all that led to the loss: more than doubled by each of these additions."""

    def deep(x, targets):
        y = x
        for _ in range(40):
            x, y = kernels.add_rms_norm(x, y, impl="triton")
        return loss(y, targets)

    logits, targets, *_ = inputs(4, 64, torch.float32)
    with torch.compiler.config.patch(force_disable_caches=True):
        assert torch.equal(torch.compile(deep, fullgraph=True)(logits, targets), deep(logits, targets))


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(loss, inputs(64, 65_536, torch.bfloat16), [0])


@pytest.mark.skipif(not GPU, reason="more than 2³¹ elements take 16 GB")
def test_more_than_2_31_elements():
    logits = torch.randn(8, 65_536, device=DEVICE, dtype=torch.bfloat16).repeat(4100, 1)  # 2.15e9
    targets = torch.randint(65_536, (logits.size(0),), device=DEVICE)
    value, grad = harness.evaluate(loss, [logits, targets], [torch.ones((), device=DEVICE)], [0])
    last = logits[-8:].clone(), targets[-8:]
    _, expected = harness.evaluate(loss, last, [torch.full((), 8 / logits.size(0), device=DEVICE)], [0])
    torch.testing.assert_close(grad[-8:], expected, rtol=1e-2, atol=0)
    assert value.isfinite()


def test_bad_input():
    logits, targets = inputs(3, 40, torch.float32)

    def refused(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.softcap_cross_entropy(*arguments, **more)

    refused(TypeError, "logits must be floating point", logits.int(), targets)
    refused(ValueError, r"logits must have shape \(N, V\)", logits[0], targets)
    refused(ValueError, r"targets must have shape \(3\)", logits, targets[:2])
    refused(ValueError, "targets is on meta", logits, targets.to("meta"))
    refused(TypeError, "targets must be int64, got torch.int32", logits, targets.int())
    refused(ValueError, "cap must be positive", logits, targets, 0.0)
    refused(ValueError, "reduction must be 'mean' or 'none', got 'sum'", logits, targets, reduction="sum")
    refused(kernels.KernelRequestError, "a cap of at most 40", logits, targets, 50.0, impl="triton")
    refused(kernels.KernelRequestError, "float64", logits.double(), targets, impl="triton")
    many = torch.zeros(1, 1, device=DEVICE).expand(2**31, 1)
    refused(
        kernels.KernelRequestError, "pass the", many, torch.zeros(1, dtype=torch.int64, device=DEVICE).expand(2**31),
        impl="triton",
    )  # fmt: skip
