"""nesterov_momentum, apply_update and adamw against their formulas in float64."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from nanochat_kernels.operation import RunShape
from nanochat_kernels.oracle import RATIO, over_budget
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, dtypes, poisoned, property_test, randn, seeds
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.optimizer_step")
sizes = st.integers(1, 70)


def scalar(value):
    return torch.tensor(value, device=DEVICE)


def agree(operation, in_place, others, results=()):
    """Run both implementations on copies and check that the fused one is as near to float64 as the reference.

    One rounding of the largest input is allowed on top: where terms nearly cancel, the reference may be more exact by chance.
    """

    def changed(impl, cast):
        copies = [cast(x.clone()) for x in in_place]
        out = operation(copies, [cast(x) if torch.is_tensor(x) and x.dim() else x for x in others], impl)
        return [*copies, *(x for x in (out or ()) if x is not None)]

    with poisoned():
        found = changed("triton", lambda x: x)
    baseline = changed("reference", lambda x: x)
    oracle = changed(None, lambda x: x.double())
    largest = max(float(x.abs().max()) for x in (*in_place, *others))
    for a, b, true in zip(found, baseline, oracle, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, allowed = float((a.double() - true).norm()), float((b.double() - true).norm())
        unit = torch.finfo(a.dtype).eps * max(largest, float(true.abs().max()))
        assert error <= RATIO * allowed + unit, f"error {error:.3e}, reference {allowed:.3e}"
        wrong = over_budget(a, true, b, unit)
        assert not wrong, wrong
    return found


@property_test
@example(batch=3, m=50, n=40, dtype=torch.bfloat16, clip=0.3, seed=1)
@given(batch=st.integers(0, 3), m=sizes, n=sizes, dtype=dtypes, clip=st.sampled_from((1.0, 0.3)), seed=seeds)
def test_nesterov_momentum(batch, m, n, dtype, clip, seed):
    gradient = randn(batch, m, n, dtype=torch.float32, seed=seed)
    momentum = randn(batch, m, n, dtype=torch.float32, seed=seed + 1)
    check_momentum(gradient, momentum, dtype, clip)


def check_momentum(gradient, momentum, dtype, clip=0.3):
    def run(state, others, impl):
        if impl is None:
            return reference.nesterov_momentum(
                others[0], state[0], scalar(clip).double(), scalar(0.9).double(), torch.float64
            )
        return kernels.nesterov_momentum(others[0], state[0], scalar(clip), scalar(0.9), dtype, impl=impl)

    if not len(gradient):
        assert run([momentum], [gradient], "triton")[0].shape == gradient.shape
        return
    _, direction, squares = agree(run, [momentum], [gradient])
    assert squares.shape == (len(gradient), FILE.PARTS)
    torch.testing.assert_close(squares.sum(1), direction.double().square().sum((1, 2)), rtol=1e-12, atol=0)


def test_momentum_beyond_one_pass():
    """The result is right for matrices with more elements than 64 programs take in one iteration of their loop."""
    size = 520, 300
    assert size[0] * size[1] > FILE.PARTS * FILE.BLOCK
    gradient, momentum = (randn(2, *size, dtype=torch.float32, seed=i) for i in (0, 1))
    check_momentum(gradient, momentum, torch.bfloat16)


@property_test
@given(rows=st.integers(0, 70), columns=sizes, dtype=dtypes, copied=dtypes, seed=seeds)
def test_apply_update(rows, columns, dtype, copied, seed):
    weight = randn(rows, columns, dtype=torch.float32, seed=seed)
    update = randn(rows, columns, dtype=dtype, seed=seed + 1)

    def run(state, others, impl):
        if impl is None:
            return reference.apply_update(state[0], others[0], scalar(0.7).double(), 0.02)
        copy = torch.full_like(state[0], float("nan"), dtype=copied)
        kernels.apply_update(state[0], others[0], scalar(0.7), 0.02, copy, impl=impl)
        assert torch.equal(copy, state[0].to(copy.dtype))
        return None

    if rows:
        agree(run, [weight], [update])
    else:
        run([weight], [update], "triton")


@property_test
@example(rows=1, columns=1, clip=1.0, step=1, seed=1, stride=1)
@example(rows=70, columns=40, clip=0.3, step=20, seed=1, stride=3)
@given(
    rows=st.integers(1, 70),
    columns=sizes,
    clip=st.sampled_from((1.0, 0.3)),
    step=st.integers(1, 50),
    seed=seeds,
    stride=st.integers(1, 3),
)
def test_adamw(rows, columns, clip, step, seed, stride):
    """stride: the stride of the biases, the only argument that need not be contiguous."""
    state = [randn(rows, columns, dtype=torch.float32, seed=seed + i) for i in range(3)]
    gradient = randn(rows, columns, dtype=torch.float32, seed=seed + 3)
    state[2].abs_()

    def run(state, others, impl):
        biases = torch.full((2, stride), float("nan"), device=DEVICE)[:, 0]
        biases.copy_(torch.tensor([1 - 0.8**step, 1 - 0.95**step]))
        arguments = (scalar(clip), scalar(0.7), biases)
        weight, mean, variance = state
        if impl is None:
            arguments = tuple(x.double() for x in arguments)
            return reference.adamw(weight, others[0], mean, variance, *arguments, 0.01, (0.8, 0.95), 1e-10)
        copy = torch.full_like(weight, float("nan"), dtype=torch.bfloat16)
        kernels.adamw(weight, others[0], mean, variance, *arguments, 0.01, (0.8, 0.95), 1e-10, copy, impl=impl)
        assert torch.equal(copy, weight.to(copy.dtype))
        return None

    agree(run, state, [gradient])


def adamw(weight, gradient, mean, variance, copy=None, impl="triton"):
    biases = torch.tensor([0.2, 0.05], device=DEVICE)
    rest = (scalar(1.0), scalar(0.7), biases, 0.01, (0.8, 0.95), 1e-10, copy)
    kernels.adamw(weight, gradient, mean, variance, *rest, impl=impl)
    return weight, mean, variance


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_adamw_of_a_gradient_in_16_bits(impl):
    narrow = randn(5, 40, dtype=torch.bfloat16, seed=1)
    state = [[randn(5, 40, dtype=torch.float32, seed=2).abs() for _ in range(3)] for _ in range(2)]
    for gradient, (weight, mean, variance) in zip((narrow, narrow.float()), state, strict=True):
        adamw(weight, gradient, mean, variance, impl=impl)
    assert all(map(torch.equal, *state))


def test_rows_that_were_never_seen_stay():
    """For a row of an embedding that had no gradient yet, 0/(√0 + eps) is 0; without eps it would be NaN."""
    weight, zeros = randn(5, 40, dtype=torch.float32), [torch.zeros(5, 40, device=DEVICE) for _ in range(3)]
    zeros[0][0] = 1.0
    before = weight.clone()
    adamw(weight, *zeros)
    assert torch.equal(weight[1:], before[1:]) and not torch.equal(weight[0], before[0])
    assert not zeros[1][1:].any() and not zeros[2][1:].any()


def momentum_of(gradient, momentum, impl):
    momentum = momentum.clone()
    direction, _ = kernels.nesterov_momentum(gradient, momentum, scalar(0.5), scalar(0.9), torch.bfloat16, impl=impl)
    return direction, momentum


def update_of(weight, update, impl):
    weight, copy = weight.clone(), torch.empty_like(weight, dtype=torch.bfloat16)
    kernels.apply_update(weight, update, scalar(0.7), 0.02, copy, impl=impl)
    return weight, copy


def adamw_of(weight, gradient, mean, variance, impl):
    copy = torch.empty_like(weight, dtype=torch.bfloat16)
    return (*adamw(weight.clone(), gradient, mean.clone(), variance.clone(), copy, impl), copy)


@pytest.mark.parametrize(("operation", "count"), [(momentum_of, 2), (update_of, 2), (adamw_of, 4)])
def test_nan_and_infinity(operation, count):
    given_ = [randn(2, 5, 7, dtype=torch.float32, seed=i).abs_() for i in range(count)]
    harness.check_nonfinite(lambda *x: operation(*x, "triton"), lambda *x: operation(*x, "reference"), given_, [])


def test_momentum_feeds_newton_schulz():
    """newton_schulz gives the same result with momentum's sums of squares as without them."""
    gradient, momentum = (randn(2, 24, 40, dtype=torch.float32, seed=i) for i in (0, 1))
    direction, squares = kernels.nesterov_momentum(
        gradient, momentum, scalar(1.0), scalar(0.9), torch.bfloat16, impl="triton"
    )
    given_squares = kernels.newton_schulz(direction, squares=squares, impl="triton")
    torch.testing.assert_close(given_squares, kernels.newton_schulz(direction, impl="triton"), rtol=1e-2, atol=1e-3)


def test_bad_input_is_named():
    x = randn(2, 4, 6, dtype=torch.float32)
    one, two = scalar(1.0), torch.ones(2, device=DEVICE)
    meta = x.to("meta")

    def nesterov(gradient=x, momentum=x, mu=one, dtype=torch.bfloat16, impl="auto"):
        return kernels.nesterov_momentum(gradient, momentum, one, mu, dtype, impl=impl)

    def step(biases=two, copy=None):
        return kernels.adamw(x, x, x, x, one, one, biases, 1.0, (0.8, 0.9), 1e-8, copy)

    cases = [
        (ValueError, "momentum must have shape", lambda: nesterov(momentum=x[:1])),
        (TypeError, "momentum must be float32", lambda: nesterov(momentum=x.half())),
        (TypeError, "mu must be a float32 scalar", lambda: nesterov(mu=x)),
        (ValueError, "direction must be bfloat16", lambda: nesterov(dtype=torch.float64, impl="triton")),
        (TypeError, "weight must be float32", lambda: kernels.apply_update(x.half(), x.half(), one, 1.0)),
        (ValueError, "copy must have shape", lambda: kernels.apply_update(x, x, one, 1.0, x[:1])),
        (ValueError, "copy is on meta but weight is on", lambda: kernels.apply_update(x, x, one, 1.0, meta)),
        (TypeError, "copy must be floating point", lambda: kernels.apply_update(x, x, one, 1.0, x.int())),
        (ValueError, "float64", lambda: kernels.apply_update(x, x, one, 1.0, x.double(), impl="triton")),
        (ValueError, "float64", lambda: kernels.apply_update(x, x.double(), one, 1.0, impl="triton")),
        (ValueError, "biases must have shape", lambda: step(x)),
        (TypeError, "biases must be float32 on", lambda: step(two.double())),
        (TypeError, "biases must be float32 on", lambda: step(two.to("meta"))),
        (ValueError, "copy is on meta but weight is on", lambda: step(copy=meta)),
        (TypeError, "copy must be floating point", lambda: step(copy=x.int())),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    many = torch.zeros(1, 1, 1, device=DEVICE).expand(2**16, 1, 1)
    with pytest.raises(kernels.KernelRequestError, match="matrices exceed the 65535"):
        nesterov(many, many, impl="triton")
    large = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 2**16, 2**15)
    with pytest.raises(kernels.KernelRequestError, match="more elements than"):
        nesterov(large, large, impl="triton")


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("layout", ["columns", "transposed", "expanded"])
def test_strided_tensors_are_rejected(shape, layout):
    """Every argument must be contiguous: the kernels change tensors in place and cannot work on copies."""
    one = scalar(1.0)
    x = randn(*shape, dtype=torch.float32)
    odd = x.new_zeros(()).expand(shape) if layout == "expanded" else randn(*shape, dtype=x.dtype, layout=layout)
    if odd.is_contiguous():
        return
    calls = []
    for i in (0, 1, 4):
        arguments = [x, x, one, 1.0, x]
        arguments[i] = odd
        calls.append((kernels.apply_update, arguments))
    for i in (0, 1, 2, 3, 10):
        arguments = [x, x, x, x, one, one, torch.ones(2, device=DEVICE), 1.0, (0.8, 0.9), 1e-8, x]
        arguments[i] = odd
        calls.append((kernels.adamw, arguments))
    for i in (0, 1) if len(shape) == 3 else ():
        arguments = [x, x, one, one, torch.bfloat16]
        arguments[i] = odd
        calls.append((kernels.nesterov_momentum, arguments))
    for function, arguments in calls:
        with pytest.raises(kernels.KernelRequestError, match="it takes contiguous tensors"):
            function(*arguments, impl="triton")


def test_derivatives_and_transforms_are_rejected():
    x = randn(2, 4, 6, dtype=torch.float32)
    with pytest.raises(kernels.KernelRequestError, match="no derivative"):
        kernels.apply_update(x.clone(), x.clone().requires_grad_(), scalar(1.0), 1.0, impl="triton")
    with pytest.raises(kernels.KernelRequestError, match="no derivative"):
        torch.vmap(lambda w, u: kernels.apply_update(w, u, scalar(1.0), 1.0, impl="triton"))(x.clone(), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype):
    gradient, momentum = (randn(3, 300, 200, dtype=torch.float32, seed=i) for i in (0, 1))
    first, second = (
        kernels.nesterov_momentum(gradient, momentum.clone(), scalar(0.5), scalar(0.9), dtype, impl="triton")
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_gate_judges_all_results_of_momentum():
    shape = RunShape(rows=1, tokens=1, width=24, heads=1, kv_heads=1, vocab=8, depth=3)
    (trial,) = FILE.momentum_trials(shape, torch.device(DEVICE), torch.bfloat16)
    gradient, momentum, *rest = trial.inputs
    momentum = momentum.clone()
    direction, squares = kernels.nesterov_momentum(gradient, momentum, *rest, impl="triton")
    assert trial.judge((direction, squares, momentum)) is None
    assert trial.judge((momentum, direction)) is None  # the reference sums no squares
    for number, name in ((0, "direction"), (1, "squares"), (2, "momentum")):
        wrong = [direction, squares, momentum]
        wrong[number] = wrong[number].clone()
        wrong[number][2] *= 1.1
        assert f"{name} of matrix 2" in trial.judge(tuple(wrong))


def test_offsets_are_int64():
    assert narrow_offsets("nesterov_momentum", "apply_update", "adamw") == ""


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 50 GB of GPU memory")
def test_more_than_2_to_31_elements():
    shape, last = (2, 33_000, 33_000), slice(-1000, None)
    state = [torch.empty(shape, device=DEVICE).normal_() for _ in range(4)]
    state[3].abs_()
    ends = [x[1, last].clone() for x in state]
    adamw(*state)
    adamw(*ends)
    assert all(torch.equal(x[1, last], end) for x, end in zip(state, ends, strict=True))
    ends = [x[1:, last].clone() for x in state[:2]]
    for momentum, gradient in (state[:2], ends):
        kernels.nesterov_momentum(gradient, momentum, scalar(0.5), scalar(0.9), torch.bfloat16, impl="triton")
    assert torch.equal(state[0][1, last], ends[0][0])
    ends = [x[1, last].clone() for x in state[:2]]
    kernels.apply_update(*state[:2], scalar(0.7), 0.02, impl="triton")
    kernels.apply_update(*ends, scalar(0.7), 0.02, impl="triton")
    assert torch.equal(state[0][1, last], ends[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device():
    given_ = [randn(2, 5, 7, dtype=torch.float32, seed=i) for i in range(2)]
    there = [x.to("cuda:1") for x in given_]
    one = scalar(0.5)
    here = kernels.nesterov_momentum(*given_, one, one, torch.bfloat16, impl="triton")
    other = kernels.nesterov_momentum(*there, one.to("cuda:1"), one.to("cuda:1"), torch.bfloat16, impl="triton")
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip((*here, *given_), (*other, *there), strict=True))


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "momentum not stored": ("optimizer_step", "        tl.store(momentum_ptr + offsets, m, mask=mask)\n", "",
     "test_nesterov_momentum"),
    "Nesterov's look ahead dropped": ("optimizer_step", "g + mu * (m - g)", "m", "test_nesterov_momentum"),
    "clip dropped": (
        "optimizer_step",
        "mask=mask, other=0.0).to(tl.float32) * clip",
        "mask=mask, other=0.0).to(tl.float32)", "test_nesterov_momentum",
    ),
    "second bias of AdamW for the first": ("optimizer_step", "(m / bias1)", "(m / bias2)", "test_adamw"),
    "eps of AdamW dropped": ("optimizer_step", " + tl.cast(eps, tl.float32))", ")",
     "test_rows_that_were_never_seen_stay"),
    "stride of the biases ignored": ("optimizer_step", "biases_ptr + biases_stride)", "biases_ptr + 1)", "test_adamw"),
    "momentum only of the first pass": (
        "optimizer_step",
        "tl.range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK)",
        "tl.range(tl.program_id(0) * BLOCK, tl.minimum(size, tl.num_programs(0) * BLOCK), tl.num_programs(0) * BLOCK)",
     "test_momentum_beyond_one_pass",
    ),
    "squares of the last pass alone": ("optimizer_step", "total += exact * exact", "total = exact * exact",
     "test_momentum_beyond_one_pass"),
    "contiguity not checked": ("optimizer_step", "if not x.is_contiguous():", "if False:",
     "test_strided_tensors_are_rejected"),
    "copy not checked for strides": (
        "optimizer_step",
        "return unsupported_reason(weight, update, copy)",
        "return unsupported_reason(weight, update)", "test_bad_input_is_named",
    ),
    "device of the biases unchecked": ("optimizer_step", '    check_float32("adamw", gradient.device, biases=biases)\n', "",
     "test_bad_input_is_named"),
    "device of the copy unchecked": ("optimizer_step", "        check_device(operation, weight=weight, copy=copy)\n", "",
     "test_bad_input_is_named"),
    "number of an element in int32": (
        "optimizer_step",
        "tl.program_id(0).to(tl.int64) * BLOCK",
        "tl.program_id(0) * BLOCK", "test_offsets_are_int64",
    ),
    "number of a matrix in int32": ("optimizer_step", "tl.program_id(1).to(tl.int64)", "tl.program_id(1)",
     "test_offsets_are_int64"),
    "the gate skips the squares": ("optimizer_step", "if squares is not None:", "if False:",
     "test_the_gate_judges_all_results_of_momentum"),
}  # fmt: skip
