"""self_attention in Triton against the reference, and against the two operations that it joins."""

import importlib
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from tests.kernels import harness, test_attention
from tests.kernels.harness import DEVICE, GPU, check, check_compiled, check_graph_replay, randn
from tests.kernels.test_attention import small_blocks  # noqa: F401
from tests.kernels.test_qkv_projection import HALVES, TILES, differentiated, inputs

FILE = importlib.import_module("nanochat_kernels.self_attention")


@pytest.fixture(autouse=True, scope="module")
def small_products():
    with harness.products_with(TILES):
        yield


def fused(x, w_q, w_k, w_v, cos, sin, offset=0, rstd=None, cu_seqlens=None):
    return kernels.self_attention(x, w_q, w_k, w_v, cos, sin, rstd, None, None, None, offset, cu_seqlens, impl="triton")


def plain(x, w_q, w_k, w_v, cos, sin, offset=0, rstd=None, cu_seqlens=None):
    """The reference in float64; in the dtype of the kernels, with attention that rounds what its products take."""
    q, k, v, x = kernels.qkv_projection(x, w_q, w_k, w_v, cos, sin, offset, impl="reference")
    return test_attention.plain(q, k, v, None, cu_seqlens)[0], x.view_as(x)


@test_attention.few_examples
@example(
    batch=2, tokens=40, width=40, heads=(4, 2), dtype=torch.bfloat16, adjacent=False, offset=5, documents=(), seed=1
)
@example(
    batch=2, tokens=35, width=33, heads=(3, 1), dtype=torch.float16, adjacent=True, offset=0, documents=(9, 50), seed=2
)
@example(batch=3, tokens=1, width=16, heads=(1, 1), dtype=torch.bfloat16, adjacent=True, offset=1, documents=(), seed=3)
@given(
    batch=st.integers(12, 16),
    tokens=st.integers(1, 40),
    width=st.integers(16, 40),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    dtype=st.sampled_from(HALVES),
    adjacent=st.booleans(),
    offset=st.integers(0, 5),
    documents=st.lists(st.integers(0, 40), max_size=2),
    seed=harness.seeds,
)
def test_self_attention(batch, tokens, width, heads, dtype, adjacent, offset, documents, seed):
    given_ = inputs(batch, tokens, width, *heads, dtype, 32, seed, "contiguous", offset, offset, adjacent)
    ends = sorted(min(end, batch * tokens) for end in documents)
    cu_seqlens = torch.tensor([0, *ends, batch * tokens], device=DEVICE) if documents else None
    test_attention.check(fused, plain, [*given_, None, cu_seqlens], differentiated(dtype), seed)


@pytest.mark.parametrize("tokens", [1023, 1024] if GPU else [18])
@pytest.mark.parametrize(("head_width", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_wider_heads(head_width, dtype, tokens):
    heads, width = ((10, 5), 1280) if GPU else ((2, 1), 32)
    test_attention.check(
        fused, plain, inputs(2, tokens, width, *heads, dtype, head_width, offset=3, more=5), differentiated(dtype)
    )


def test_forward_is_bitwise_that_of_the_two_operations():
    x, *weights, cos, sin, _ = inputs(2, 40, 40, 4, 2, torch.bfloat16)
    found, same = fused(x, *weights, cos, sin)
    q, k, v, _ = kernels.qkv_projection(x, *weights, cos, sin, impl="triton")
    expected = kernels.attention(q, k, v, bound=math.sqrt(32), impl="triton")
    assert torch.equal(found, expected) and torch.equal(same, x)
    parts, _ = kernels.self_attention(x, *weights, cos, sin, impl="parts", qkv_impl="triton", attention_impl="triton")
    assert torch.equal(found, parts)


def test_strided_tables():
    """cos and sin as every second column of one table, and side by side in one."""
    *given_, cos, sin, _ = inputs(2, 40, 40, 4, 2, torch.bfloat16)
    upstream = [randn(2, 40, 4, 32, dtype=torch.bfloat16, seed=4), torch.zeros_like(given_[0])]
    expected = harness.evaluate(fused, [*given_, cos, sin], upstream, [0, 1, 2, 3])
    for tables in (torch.stack([cos, sin], -1).unbind(-1), torch.cat([cos, sin], 1).split(cos.size(1), 1)):
        found = harness.evaluate(fused, [*given_, *tables], upstream, [0, 1, 2, 3])
        assert not tables[0].is_contiguous() and all(map(torch.equal, found, expected))


def test_naming_a_part_takes_the_parts(monkeypatch):
    x, *weights, cos, sin, _ = inputs(1, 20, 40, 2, 1, torch.bfloat16)
    taken = []
    monkeypatch.setattr(FILE, "choose", lambda operation, impl, *_: taken.append(impl) or FILE.run_parts)
    for options in (
        {},
        {"qkv_impl": "triton"},
        {"attention_impl": "triton"},
        {"attention_impl": "triton", "impl": "triton"},
    ):
        kernels.self_attention(x, *weights, cos, sin, **options)
    assert taken == ["auto", "parts", "parts", "triton"]


@pytest.mark.parametrize("impl", ["triton", "parts", "reference"])
@pytest.mark.parametrize("given_buffers", [(0, 1, 2), (1,)])
def test_gradients_are_added_to_buffers(impl, given_buffers):
    x, *weights, cos, sin, _ = inputs(2, 20, 24, 2, 1, torch.bfloat16)
    buffers = [torch.ones(w.shape, device=DEVICE) if i in given_buffers else None for i, w in enumerate(weights)]
    dout = randn(2, 20, 2, 32, dtype=torch.bfloat16, seed=4)
    leaves = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
    expected = torch.autograd.grad(fused(*leaves, cos, sin)[0], leaves, dout)
    held = [w.detach() if i in given_buffers else w for i, w in enumerate(leaves[1:])]
    out, _ = kernels.self_attention(leaves[0], *held, cos, sin, None, *buffers, impl=impl)
    wanted = [leaves[0], *(w for i, w in enumerate(leaves[1:]) if i not in given_buffers)]
    found = iter(torch.autograd.grad(out, wanted, dout))
    for i, gradient in enumerate(expected):
        other = buffers[i - 1] - 1 if i and i - 1 in given_buffers else next(found).float()
        assert (other - gradient.float()).norm() <= 0.01 * gradient.float().norm()


@pytest.mark.parametrize("wrt", [[0], [1], [2, 3]])
def test_only_the_gradients_that_are_asked_for(wrt):
    check(fused, plain, inputs(2, 20, 24, 2, 1, torch.bfloat16), wrt)


def test_results_that_are_not_used():
    x, *rest, _ = inputs(1, 20, 24, 2, 1, torch.bfloat16)
    x = x.requires_grad_()
    out, same = fused(x, *rest)
    (both,) = torch.autograd.grad(out.float().sum() + 2 * same.float().sum(), x)
    out, same = fused(x, *rest)
    (of_out,) = torch.autograd.grad(out.float().sum(), x)
    (of_x,) = torch.autograd.grad(2 * fused(x, *rest)[1].float().sum(), x)
    assert torch.equal(of_x, torch.full_like(x, 2.0))
    torch.testing.assert_close(both.float(), of_out.float() + 2, rtol=0.01, atol=0.01)


def test_heads_as_small_as_epsilon():
    """Then QK-norm's epsilon takes part in the derivative of the norm of x."""
    x, w_q, w_k, w_v, *more = inputs(8, 3, 24, 4, 2, torch.bfloat16)
    check(fused, plain, [x, w_q * 4e-4, w_k * 4e-4, w_v, *more], [0])


def test_rstd_of_x_may_be_given():
    given_ = inputs(2, 20, 24, 2, 1, torch.bfloat16)
    _, rstd = kernels.output_projection(given_[0], torch.eye(24, device=DEVICE, dtype=torch.bfloat16), impl="reference")
    check(fused, plain, [*given_, rstd], [0, 1, 2, 3])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batch(shape):
    x, *weights, cos, sin, offset = inputs(*shape, 24, 2, 1, torch.bfloat16, more=1)
    leaves = [y.clone().requires_grad_() for y in (x, *weights)]
    out, same = fused(*leaves, cos, sin, offset)
    assert out.shape == (*shape, 2, 32)
    gradients = torch.autograd.grad(out.sum() + same.sum(), leaves)
    assert all(not g.any() and g.shape == y.shape for g, y in zip(gradients, leaves, strict=True))


def test_derivatives_that_do_not_exist_raise():
    given_ = inputs(1, 20, 24, 1, 1, torch.bfloat16)
    harness.check_second_derivative_raises(fused, given_, [0, 1, 2, 3])
    harness.check_jvp_raises(fused, given_, [0, 1, 2, 3])


def test_compiled():
    """The kernel that computes rstd is traced, which an interpreted kernel cannot be."""

    def run(x, *others):
        return fused(x, *others, None if GPU else reference.with_rstd(x)[1])

    check_compiled(run, inputs(1, 20, 24, 2, 1, torch.bfloat16), [0, 1, 2, 3], units=2, is_opaque=True)


def test_what_torch_compile_is_told():
    x, *weights, cos, sin, _ = inputs(2, 20, 24, 2, 1, torch.bfloat16)
    out = randn(2, 20, 2, 32, dtype=torch.bfloat16)
    qkv = randn(2, 20, 4, 32, dtype=torch.bfloat16)
    lse, rstd, head_rstd = (torch.ones(*shape, device=DEVICE) for shape in ((2, 2, 20), (40,), (3, 40)))
    saved = qkv, out, lse, rstd, head_rstd, cos, sin, None, None, 0
    for needs_dx in (True, False):
        harness.check_opaque(
            torch.ops.nanochat_kernels.self_attention_backward, out, None, x, *weights, *saved, needs_dx
        )


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    x, *rest = inputs(2, 300, 256, 2, 1, torch.bfloat16, 128)
    check_graph_replay(lambda x: fused(x, *rest), [x], [0])


def test_on_another_device():
    harness.check_other_device(fused, inputs(1, 20, 24, 2, 1, torch.bfloat16), [0, 1, 2, 3])


def test_bad_input():
    given_ = inputs(2, 4, 24, 2, 1, torch.bfloat16)
    x, *weights, cos, sin, _ = given_

    def rejected(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            kernels.self_attention(*arguments, **options)

    rejected(ValueError, r"self_attention: x must have shape \(B, T, C\)", x[0], *weights, cos, sin)
    rejected(ValueError, "self_attention: positions 2 to 5 exceed the 4 rows", x, *weights, cos, sin, offset=2)
    offsets = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    rejected(TypeError, "offset must be an int; rows at positions", x, *weights, cos, sin, offset=offsets)
    rejected(ValueError, "cu_seqlens must have shape", x, *weights, cos, sin, cu_seqlens=offsets[None])
    rejected(
        kernels.KernelRequestError, "bfloat16 or float16", *(y.float() for y in (x, *weights, cos, sin)), impl="triton"
    )


# faults that a test must catch: see test_planted_faults.py
S, G = "self_attention", "attention_gradient_kernels"
PLANTED_FAULTS = {
    "rotated instead of back": (G, "tl.join(g1 * c - g2 * s, g1 * s + g2 * c)", "tl.join(g1 * c + g2 * s, g2 * c - g1 * s)",
     "test_self_attention"),
    "QK-norm's projection forgotten": (G, "(gradient - y * (product / WIDTH)[:, None])", "gradient", "test_self_attention"),
    "rstd of the head of q for k": (G, "tl.cast(head, tl.int64) * all_rows + row, mask=mask, other=0.0)\n            factor",
     "row, mask=mask, other=0.0)\n            factor", "test_self_attention"),
    "rstd of the rows forgotten": (G, "gradient *= factor[:, None]", "gradient *= 1.0", "test_self_attention"),
    "epsilon of QK-norm forgotten": (G, "product *= EPS * head_rstd * head_rstd", "product *= 0.0", "test_heads_as_small_as_epsilon"),
    "values normed like keys": (G, "EPS, PROJECTED, False, WIDTH,", "EPS, PROJECTED, True, WIDTH,", "test_self_attention"),
    "offset of the tables forgotten": (G, "t + offset, tl.cast(rows", "t, tl.cast(rows", "test_self_attention"),
    "values in the place of keys": (G, "number + groups if PROJECTED else number", "number", "test_self_attention"),
    "norm's derivative without the values": (G, "tl.store(sums_ptr + tl.cast(head, tl.int64) * all_rows + row, product, mask=mask)",
     "tl.store(sums_ptr + tl.cast(head, tl.int64) * all_rows + row, product * 0, mask=mask)", "test_self_attention"),
    "the residual's gradient forgotten": (S, "None if dx is None else as_rows(dx)", "None", "test_results_that_are_not_used"),
    "strided tables read as if they were not": (S, "cos, sin = cos.contiguous(), sin.contiguous()", "pass", "test_strided_tables"),
    "no bound": (S, "None, starts, math.sqrt(qkv.size(3)), keep_lse)", "None, starts, None, keep_lse)",
     "test_forward_is_bitwise_that_of_the_two_operations"),
}  # fmt: skip
