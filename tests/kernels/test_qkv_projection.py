"""qkv_projection in Triton against the reference.

This file is long because the operation joins a norm, three products, a rotation, the norm of heads and a residual's gradient.
"""

import importlib
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from nanochat_kernels.checks import normed_dtype
from tests.kernels import harness
from tests.kernels.harness import DEVICE, GPU, check, check_compiled, check_graph_replay, randn
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.qkv_projection")
LAUNCHES = importlib.import_module("nanochat_kernels.qkv_projection_kernels")
HALVES = (torch.bfloat16, torch.float16)


# several heads to a tile and to a program, because an interpreted program is slow
TILES = None if GPU else harness.SMALL_TILES | {"BLOCK_N": 64, "BLOCK_K": 32}
PRODUCTS = (TILES, *harness.PRODUCTS[1:])


@pytest.fixture(autouse=True, scope="module")
def small_products():
    with harness.products_with(TILES), pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setattr(LAUNCHES, "launch_parameters", lambda *_: {"TOKENS": 8, "HEADS": 2, "num_warps": 1})
        yield


def fused(*arguments):
    return kernels.qkv_projection(*arguments, impl="triton")


def unfused(*arguments):
    return kernels.qkv_projection(*arguments, impl="unfused")


def plain(x, w_q, w_k, w_v, cos, sin, offset=0, rstd=None, *buffers):
    return *reference.qkv_projection(x, w_q, w_k, w_v, cos, sin, offset), x.view_as(x)


def differentiated(dtype: torch.dtype) -> list[int]:
    """The inputs whose gradients the fused product computes."""
    return [0, 1, 2, 3] if dtype == torch.bfloat16 else []


def tables(positions: int, head_width: int, dtype: torch.dtype):
    angles = torch.arange(positions)[:, None] * kernels.ROPE_BASE ** (
        -torch.arange(0, head_width, 2).double() / head_width
    )
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def inputs(
    batch, tokens, width, heads, kv_heads, dtype, head_width=32, seed=0, layout="contiguous", offset=0, more=0, adjacent=True
):  # fmt: skip
    """Return the arguments up to the offset; the weights lie in one memory if they are adjacent."""
    x = randn(batch, tokens, width, dtype=dtype, seed=seed, layout=layout)
    rows = [heads * head_width, kv_heads * head_width, kv_heads * head_width]
    weights = randn(sum(rows), width, dtype=dtype, seed=seed + 1).mul_(width**-0.5).split(rows)
    weights = weights if adjacent else [w.clone() for w in weights]
    return [x, *weights, *tables(tokens + more, head_width, dtype), offset]


@settings(harness.property_test, max_examples=100 if GPU else 8)
@example(
    batch=2, tokens=12, width=40, heads=(4, 2), dtype=torch.bfloat16, layout="slice", adjacent=False, offset=5,
    parameters=PRODUCTS[0], seed=1,
)  # fmt: skip
@example(
    batch=2, tokens=11, width=33, heads=(3, 1), dtype=torch.float16, layout="contiguous", adjacent=True, offset=0,
    parameters=PRODUCTS[1], seed=2,
)  # fmt: skip
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(4, 12),
    width=st.integers(16, 40),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    dtype=st.sampled_from(HALVES),
    layout=harness.layouts,
    adjacent=st.booleans(),
    offset=st.integers(0, 5),
    parameters=st.sampled_from(PRODUCTS),
    seed=harness.seeds,
)
def test_qkv_projection(batch, tokens, width, heads, dtype, layout, adjacent, offset, parameters, seed):
    given_ = inputs(batch, tokens, width, *heads, dtype, 32, seed, layout, offset, offset, adjacent)
    with harness.products_with(parameters):
        check(fused, plain, given_, differentiated(dtype), seed)


@pytest.mark.parametrize("tokens", [1023, 1024] if GPU else [6])
@pytest.mark.parametrize(("head_width", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_wider_heads(head_width, dtype, tokens):
    heads, width = ((10, 5), 1280) if GPU else ((2, 1), 32)
    check(fused, plain, inputs(2, tokens, width, *heads, dtype, head_width, offset=3, more=5), differentiated(dtype))


@pytest.mark.parametrize(
    ("head_width", "heads", "dtype"),
    [
        (12, (4, 2), torch.float32),
        (12, (1, 1), torch.bfloat16),
        (24, (3, 1), torch.float16),
        (32, (1, 1), torch.float32),
        (32, (4, 2), torch.bfloat16),
    ],
)
def test_unfused(head_width, heads, dtype):
    """Separate operations serve float32 and heads of any even width."""
    check(unfused, plain, inputs(2, 5, 24, *heads, dtype, head_width, offset=2, more=2), [0, 1, 2, 3])


@pytest.mark.parametrize("parameters", harness.PRODUCTS[1:2])
@pytest.mark.parametrize("dtype", HALVES)
def test_offset_of_each_row(dtype, parameters):
    given_ = inputs(3, 2, 24, 4, 2, dtype, more=40)
    offsets = torch.tensor([0, 40, 7], device=DEVICE)
    with harness.products_with(parameters):
        check(fused, plain, [*given_[:-1], offsets], differentiated(dtype))


def test_strided_offsets():
    given_ = inputs(3, 2, 24, 3, 1, torch.bfloat16, more=40)
    every_second = torch.tensor([0, 1, 40, 2, 7, 3], device=DEVICE, dtype=torch.int32)[::2]
    one_for_all = torch.tensor([5], device=DEVICE).expand(3)
    for offsets in (every_second, one_for_all):
        check(fused, plain, [*given_[:-1], offsets], [0, 1, 2, 3])


@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_strided_tables(layout):
    given_ = inputs(2, 5, 24, 3, 1, torch.bfloat16, more=3, offset=2)
    given_[4:6] = [harness.in_layout(table, layout, i) for i, table in enumerate(given_[4:6])]
    check(fused, plain, given_, [0, 1, 2, 3])


@pytest.mark.parametrize("tokens", [1, 2])
def test_decoding(tokens):
    """One token, or two, in each row, without a gradient, at the row's own position."""
    given_ = inputs(3, tokens, 24, 4, 2, torch.bfloat16, more=40)
    given_[-1] = torch.tensor([0, 40, 7], device=DEVICE)
    with torch.no_grad():
        check(fused, plain, given_)


@pytest.mark.parametrize("impl", ["triton", "unfused"])
def test_a_position_outside_of_the_tables_gives_nan_and_no_stray_read(impl):
    given_ = inputs(4, 1, 24, 1, 1, torch.bfloat16)
    cos, sin = (table[20:25] for table in tables(200, 32, torch.bfloat16))  # with other rows in memory around them
    offsets = torch.tensor([4, 5, 99, -3], device=DEVICE)
    leaves = [x.requires_grad_() for x in given_[:4]]
    q, k, v, x = kernels.qkv_projection(*leaves, cos, sin, offsets, impl=impl)
    for heads in (q, k):
        assert heads[0].isfinite().all() and heads[1:].isnan().all()
    assert v.isfinite().all() and torch.equal(x, leaves[0])
    (dx,) = torch.autograd.grad(q[:1].sum() + k.sum(), leaves[0])
    assert dx[0].isfinite().all() and dx[1:].isnan().all()


def test_adjacent_weights_are_not_copied_and_change_nothing():
    x, *weights, cos, sin, _ = inputs(2, 5, 24, 4, 2, torch.bfloat16)
    joined = FILE.joined(*weights)
    assert joined.data_ptr() == weights[0].data_ptr() and torch.equal(joined, torch.cat(weights))
    turned = randn(3, 24, 128, dtype=torch.bfloat16).unbind()  # one after the other, each as its transpose
    assert FILE.as_one(*(w.t() for w in turned)) is None
    apart = [
        weights[::-1],  # in one memory, but not in this order
        [w.clone() for w in weights],
        [weights[0], *[w.t().contiguous().t() for w in weights[1:]]],
        [weights[0], weights[2], weights[1]],
    ]
    for others in apart:
        assert FILE.as_one(*others) is None and torch.equal(FILE.joined(*others), torch.cat(list(others)))
    dy = harness.upstream_of(fused(x, *weights, cos, sin))
    for others in apart[1:3]:
        found, expected = (harness.evaluate(fused, [x, *w, cos, sin], dy, [0, 1, 2, 3]) for w in (others, weights))
        assert all(map(harness.same, found, expected))


@pytest.mark.parametrize("impl", [fused, unfused])
def test_eps_counts_where_heads_are_small(impl):
    """Weights of 1e-4 make heads whose norm is as small as eps: without its term a tenth of dx is wrong."""
    x, *weights, cos, sin, offset = inputs(1, 6, 24, 2, 1, torch.bfloat16)
    check(impl, plain, [x, *(1e-4 * w for w in weights), cos, sin, offset], [0, 1, 2, 3])


def buffers_of(weights, adjacent: bool):
    rows = [w.size(0) for w in weights]
    whole = torch.ones(sum(rows), weights[0].size(1), device=DEVICE)
    return list(whole.split(rows)) if adjacent else [part.clone() for part in whole.split(rows)]


@pytest.mark.parametrize(
    ("impl", "adjacent", "given_buffers"),
    [
        ("triton", True, (0, 1, 2)),
        ("triton", False, (0, 1, 2)),
        ("triton", True, (0,)),
        ("triton", False, (1, 2)),
        ("unfused", True, (0, 1, 2)),
        ("unfused", False, (0,)),
        ("reference", True, (0, 1, 2)),
        ("reference", False, (1, 2)),
    ],
)
def test_gradients_are_added_to_buffers(impl, adjacent, given_buffers):
    """Two calls add to the buffers' contents in float32. A weight with a buffer gets no gradient, another one does."""
    _, *weights, cos, sin, _ = inputs(2, 5, 24, 4, 2, torch.bfloat16)
    buffers = [b if i in given_buffers else None for i, b in enumerate(buffers_of(weights, adjacent))]
    sums = [1.0] * 3
    leaves = [w.requires_grad_() for w in weights]
    for seed in (5, 6):
        x = randn(2, 5, 24, dtype=torch.bfloat16, seed=seed).requires_grad_()
        results = kernels.qkv_projection(x, *leaves, cos, sin, 0, None, *buffers, impl=impl)
        dy = harness.upstream_of(results, seed)
        torch.autograd.backward(results, dy)
        exact = [t.detach().double() for t in (x, *leaves, cos, sin)]
        *_, dx, dq, dk, dv = harness.evaluate(plain, exact, [t.double() for t in dy], [0, 1, 2, 3])
        sums = [a + b for a, b in zip(sums, (dq, dk, dv), strict=True)]
        assert float((x.grad - dx).norm() / dx.norm()) < 0.02
    for leaf, buffer, true in zip(leaves, buffers, sums, strict=True):
        assert (leaf.grad is None) == (buffer is not None)
        found = leaf.grad + 1.0 if buffer is None else buffer
        assert float((found - true).norm() / true.norm()) < 0.01


@pytest.mark.parametrize("impl", ["triton", "unfused"])
def test_buffers_stay_untouched_where_no_input_requires_a_gradient(impl):
    given_ = inputs(2, 5, 24, 1, 1, torch.bfloat16)
    buffers = [b.zero_() for b in buffers_of(given_[1:4], True)]
    assert not any(y.requires_grad for y in kernels.qkv_projection(*given_, None, *buffers, impl=impl)[:3])
    with torch.no_grad():
        leaves = [x.requires_grad_() for x in given_[:4]]
        results = kernels.qkv_projection(*leaves, *given_[4:], None, *buffers, impl=impl)
        assert not any(y.requires_grad for y in results[:3])
    assert not any(b.any() for b in buffers)
    # only the residual is used
    kernels.qkv_projection(*leaves, *given_[4:], None, *buffers, impl=impl)[3].sum().backward()
    assert not any(b.any() for b in buffers) and (leaves[0].grad == 1).all()


@pytest.mark.parametrize("wrt", [[0], [1], [2], [3], [0, 2], [1, 3]])
def test_only_the_gradients_that_are_asked_for(wrt):
    def heads(function):
        return lambda *arguments: function(*arguments)[: 4 if 0 in wrt else 3]

    if 0 in wrt:
        check(heads(fused), heads(plain), inputs(2, 5, 24, 3, 1, torch.bfloat16), wrt)
        return
    # in the reference only the heads of a weight that requires a gradient have one
    x, *weights, cos, sin, _ = inputs(2, 5, 24, 3, 1, torch.bfloat16)
    upstream = harness.upstream_of(plain(x, *weights, cos, sin)[:3])
    found = harness.evaluate(heads(fused), [x, *weights, cos, sin], upstream, wrt)
    expected = harness.evaluate(heads(plain), [x, *weights, cos, sin], upstream, wrt)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("used", [[0], [1], [2], [3], [0, 1], [2, 3]])
def test_results_that_are_not_used(used):
    given_ = inputs(2, 5, 24, 4, 2, torch.bfloat16)

    def gradients(function, given_):
        leaves = [x.clone().requires_grad_() for x in given_[:4]]
        results = function(*leaves, *given_[4:])
        outputs = [results[i] for i in used]
        upstream = [randn(*y.shape, dtype=y.dtype, seed=i) for i, y in enumerate(outputs)]
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    exact = gradients(plain, [x.double() if isinstance(x, torch.Tensor) else x for x in given_])
    for a, b in zip(gradients(fused, given_), exact, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            assert float((a - b).norm() / b.norm()) < 0.01


def test_the_last_result_is_x_and_its_gradient_is_added():
    given_ = inputs(2, 5, 24, 3, 1, torch.bfloat16)
    *_, same = fused(*given_)
    assert torch.equal(same, given_[0]) and same.data_ptr() == given_[0].data_ptr()
    upstream = harness.upstream_of(plain(*given_))
    zero = [*upstream[:3], torch.zeros_like(upstream[3])]
    (whole,) = harness.evaluate(fused, given_, upstream, [0])[4:]
    (without,) = harness.evaluate(fused, given_, zero, [0])[4:]
    torch.testing.assert_close(whole, without + upstream[3], rtol=2e-2, atol=2e-2)
    assert float((whole - without).norm()) > 1.0


@pytest.mark.parametrize("impl", ["triton", "unfused"])
def test_upstream_gradients_of_any_strides(impl):
    """That of a sum is one number with strides 0, and channels may be apart in memory."""
    given_ = inputs(2, 5, 24, 4, 2, torch.bfloat16)
    leaves = [x.requires_grad_() for x in given_[:4]]
    results = kernels.qkv_projection(*leaves, *given_[4:], impl=impl)
    layouts = ("columns", "transposed", "slice", "columns")
    strided = [randn(*y.shape, dtype=y.dtype, seed=3, layout=name) for y, name in zip(results, layouts, strict=True)]
    expand = [torch.tensor(0.5, dtype=y.dtype, device=DEVICE).expand(y.shape) for y in results]
    for upstream in (strided, expand):
        found = torch.autograd.grad(results, leaves, upstream, retain_graph=True)
        expected = torch.autograd.grad(results, leaves, [x.contiguous() for x in upstream], retain_graph=True)
        assert all(map(harness.same, found, expected))


def test_rstd_of_x_may_be_given():
    given_ = inputs(2, 5, 24, 3, 1, torch.bfloat16)
    rstd = FILE.row_rstd(given_[0].flatten(0, 1)).view(2, 5)
    torch.testing.assert_close(rstd, reference.with_rstd(given_[0])[1])
    upstream = harness.upstream_of(plain(*given_))
    a, b = (harness.evaluate(fused, [*given_, r], upstream, [0, 1, 2, 3]) for r in (None, rstd))
    assert all(map(harness.same, a, b))
    strided = torch.stack([rstd, rstd], -1)[..., 0]
    assert all(map(harness.same, b[:4], fused(*given_, strided)))
    _, _, v, _ = fused(*given_, rstd / 2)
    torch.testing.assert_close(v, b[2] / 2)


@pytest.mark.parametrize("impl", ["triton", "unfused"])
def test_heads_have_norm_1_and_scale_is_ignored(impl):
    """q and k of x, of −4·x turned around, and of x with another scale in each weight."""
    x, *weights, cos, sin, _ = inputs(2, 5, 40, 4, 2, torch.float16, more=50)
    x = x + 2 * x.sign()
    q, k, v, _ = kernels.qkv_projection(x, *weights, cos, sin, 45, impl=impl)
    for heads in (q, k):
        squares = heads.double().square().mean(-1)
        torch.testing.assert_close(squares, torch.ones_like(squares), rtol=3e-3, atol=0.0)
    scaled = kernels.qkv_projection(-4 * x, *weights, cos, sin, 45, impl=impl)
    louder = kernels.qkv_projection(x, 8 * weights[0], weights[1] * 2, weights[2] * 2, cos, sin, 45, impl=impl)
    for a, b, c, factor in zip((q, k, v), scaled[:3], louder[:3], (1, 1, 2), strict=True):
        torch.testing.assert_close(-b, a, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(c, factor * a, rtol=2e-3, atol=2e-3)


def test_scores_depend_only_on_the_distance():
    x, *weights, cos, sin, _ = inputs(1, 1, 40, 1, 1, torch.float16, more=100)

    def score(at, back):
        q, *_ = fused(x, *weights, cos, sin, at)
        _, k, *_ = fused(x, *weights, cos, sin, at - back)
        return float((q.double() * k.double()).sum())

    assert abs(score(10, 7) - score(80, 7)) < 0.05
    assert abs(score(10, 7) - score(10, 3)) > 0.2


@pytest.mark.parametrize("parameters", PRODUCTS)
def test_a_large_x_in_float16(parameters):
    """Its product with the weights would overflow, the normed heads do not."""
    x, *others = inputs(2, 5, 24, 1, 1, torch.float16)
    x = x.clamp(-4, 4)
    with harness.products_with(parameters):
        small, large = fused(x, *others), fused(x * 2**13, *(8 * w for w in others[:3]), *others[3:])
    torch.testing.assert_close(large[:2], small[:2], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(large[2], 8 * small[2], rtol=2e-3, atol=2e-3)


def test_float16_has_no_gradients():
    """The gradient of the product is stored divided by x's size: float16 would lose it for a large x, and the weights' gradients."""
    x, *others = inputs(2, 5, 24, 1, 1, torch.float16)
    with pytest.raises(kernels.KernelRequestError, match="float16 cannot hold the gradient"):
        fused(x.requires_grad_(), *others)
    with torch.no_grad():
        fused(x, *others)
    x, found = 4096 * x.detach(), []
    for run, dtype in ((unfused, torch.float16), (plain, torch.float64)):
        w_q, w_k, w_v, cos, sin = (t.to(dtype, copy=True) for t in others[:5])
        v = run(x.to(dtype), w_q, w_k, w_v.requires_grad_(), cos, sin)[2]
        v.backward(torch.full_like(v, 2.0**-13))
        found.append(w_v.grad.double())
    torch.testing.assert_close(*found, rtol=0.01, atol=2.0**-20)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batch(shape, dtype):
    given_ = inputs(1, 3, 24, 4, 2, dtype)
    given_[0] = torch.empty(*shape, 24, device=DEVICE, dtype=dtype)
    check(fused, plain, given_, differentiated(dtype))


def test_auto_falls_back_where_a_part_of_the_unfused_one_does_not_serve():
    """Heads of 64 without a power of two's tile are unfused; neither serves tables that require a gradient."""
    x, *weights, cos, sin, _ = inputs(1, 3, 24, 4, 2, torch.bfloat16)
    given_ = x, *weights, cos.clone().requires_grad_(), sin, 0, None
    for name, implementation in FILE.QKV_PROJECTION.implementations.items():
        assert "no gradient for cos and sin" in implementation.unsupported_reason(*given_), name
    with pytest.raises(kernels.KernelRequestError, match="qkv_projection: impl='unfused' does not support this call"):
        kernels.qkv_projection(*given_[:6], impl="unfused")
    wide = torch.empty(1, 1, 20_000, device="meta")
    assert "20000 elements" in FILE.unfused_unsupported_reason(wide, *[wide.new_empty(64, 20_000)] * 3, cos, sin, 0)


def test_zero_rows_have_no_nan():
    given_ = inputs(1, 3, 24, 4, 2, torch.bfloat16)
    given_[0] = torch.zeros_like(given_[0])
    found = harness.evaluate(fused, given_, harness.upstream_of(plain(*given_)), [0, 1, 2, 3])
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinity(dtype):
    """In x, a weight of q and of v, and in each upstream gradient."""
    harness.check_nonfinite(fused, plain, inputs(1, 3, 24, 1, 1, dtype), differentiated(dtype), only=(0, 1, 3))


def test_autocast():
    """The heads have autocast's dtype and are those of inputs in it; the last result stays what was given, in its own dtype."""
    x, *weights, cos, sin, _ = inputs(2, 5, 24, 4, 2, torch.float32)
    narrow = [t.bfloat16() for t in (x, *weights)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        if normed_dtype(narrow[0]) != torch.bfloat16:
            with pytest.raises(kernels.KernelRequestError, match="autocast makes the normed heads"):
                fused(x, *weights, cos, sin)
            return
        for given_ in ((x, *weights), (x, *narrow[1:]), (narrow[0], *weights)):
            leaves = [t.clone().requires_grad_() for t in given_]
            found, expected = fused(*leaves, cos, sin), plain(*leaves, cos, sin)
            assert [y.dtype for y in found] == [y.dtype for y in expected] and torch.equal(found[3], leaves[0])
            assert all(map(harness.same, found[:3], fused(*narrow, cos, sin)[:3]))
            gradients = torch.autograd.grad(sum(y.float().square().sum() for y in found), leaves)
            expected = torch.autograd.grad(sum(y.float().square().sum() for y in expected), leaves)
            assert [x.dtype for x in gradients] == [x.dtype for x in leaves]
            assert float((gradients[0] - expected[0]).norm() / expected[0].norm()) < 0.02
            assert float((gradients[3] - expected[3]).norm() / expected[3].norm()) < 0.02


def test_derivatives_that_do_not_exist_raise():
    given_ = inputs(1, 3, 24, 1, 1, torch.bfloat16)
    harness.check_second_derivative_raises(fused, given_, [0, 1, 2, 3])
    harness.check_jvp_raises(fused, given_, [0])


def test_vmap():
    given_ = inputs(2, 2, 24, 1, 1, torch.bfloat16, more=4)
    harness.check_vmap(fused, [*given_[:-1], torch.tensor([0, 4], device=DEVICE)], [0, 6], [0, 1, 2, 3])


def test_every_launch_configuration():
    """Of the product, and of the backward kernel with all numbers of heads for a program: 10 and 5 are multiples of each."""
    x, *weights, cos, sin, _ = inputs(1, 6, 16, 10, 5, torch.bfloat16)
    upstream = harness.upstream_of(plain(x, *weights, cos, sin)[:3])
    weight, rstd = FILE.joined(*weights), reference.with_rstd(x)[1].view(-1)
    product, few_rows, backward, *_ = FILE.KERNELS
    expected = torch.cat(reference.qkv_projection(*[t.double() for t in (x, *weights, cos, sin)]), 2)
    for parameters in (*product.space, *few_rows.space):
        small = parameters["BLOCK_M"] <= 64 and not parameters.get("TMA", 1)
        if GPU or small or "TORCH" in parameters:
            found, head_rstd = FILE.heads_of(x, weight, rstd, cos, sin, 0, None, 10, 5, parameters)
            assert float((found - expected).norm() / expected.norm()) < 5e-3, parameters
    given_ = *upstream, found, rstd, head_rstd, cos, sin, 0, None, 16
    true = FILE.product_gradient(*given_, parameters={"TOKENS": 4, "HEADS": 1, "num_warps": 1})
    for parameters in backward.space[:: 1 if GPU else 2]:
        for a, b in zip(FILE.product_gradient(*given_, parameters=parameters), true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_a_program_has_heads_of_one_kind(heads, monkeypatch):
    """A table's number of heads that does not divide both numbers of heads is made smaller."""
    monkeypatch.setattr(LAUNCHES, "launch_parameters", lambda *_: {"TOKENS": 2, "HEADS": 5, "num_warps": 1})
    check(fused, plain, inputs(2, 3, 24, *heads, torch.bfloat16), [0, 1, 2, 3])


def test_offsets_are_int64():
    assert narrow_offsets(*(kernel.name for kernel in FILE.KERNELS[:4])) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_one_token_compiles():
    """Triton makes a constant of an argument that is 1: the kernels must not use methods of tensors on it."""
    code = (
        "import torch\n"
        "from importlib import import_module\n"
        "from nanochat_kernels.inspect import compile_launch\n"
        "from nanochat_kernels.triton_helpers import recorded_launches\n"
        "file, meta = import_module('nanochat_kernels.qkv_projection'), torch.device('meta')\n"
        "x, *weights, cos, sin = file.inputs(3, 1, 32, 1, 1, torch.bfloat16, meta, 32)\n"
        "rstd, offsets = torch.empty(3, device=meta), torch.empty(3, dtype=torch.int64, device=meta)\n"
        "with recorded_launches() as launches:\n"
        "    for given in ((0, None), (0, offsets)):\n"
        "        qkv, kept = file.heads_of(x, file.joined(*weights), rstd, cos, sin, *given, 1, 1)\n"
        "        file.product_gradient(*qkv.split(1, 2), qkv, rstd, kept, cos, sin, *given, 32)\n"
        "for launch in launches:\n"
        "    compile_launch(launch, 'sm80')\n"
        "print(len(launches))\n"
    )
    assert harness.without_interpreter(code).strip() == "8"  # a product of few rows has its epilogue in a pass


@pytest.mark.parametrize("adjacent", [True, False])
def test_compiled(adjacent):
    given_ = inputs(2, 3, 24, 2, 1, torch.bfloat16, adjacent=adjacent)
    if adjacent:
        given_[-1] = torch.tensor([0, 0], device=DEVICE)
    # Inductor adds a product to the sum of gradients in one operation
    check_compiled(with_rstd_of_torch, given_, [0, 1, 2, 3], units=2.0, is_opaque=True)


def with_rstd_of_torch(x, *others):
    """The kernel that computes rstd is traced, which an interpreted kernel cannot be."""
    return fused(x, *others, None if GPU else reference.with_rstd(x)[1])


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_products_are_opaque_to_the_compiler(layout):
    x, *weights, cos, sin, _ = inputs(2, 5, 24, 4, 2, torch.bfloat16, layout=layout)
    rstd, operations = reference.with_rstd(x)[1].view(-1), torch.ops.nanochat_kernels
    qkv, head_rstd = harness.check_opaque(
        operations.qkv_projection_forward, x, *weights, rstd, cos, sin, 0, None
    )  # fmt: skip
    upstream = harness.upstream_of(plain(x, *weights, cos, sin))
    for needs_dx in (False, True):
        saved = x, *weights, qkv, rstd, head_rstd, cos, sin, 0, None, needs_dx
        harness.check_opaque(operations.qkv_projection_backward, *upstream, *saved)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(fused, inputs(2, 64, 256, 4, 2, torch.bfloat16, 64), [0, 1, 2, 3])


def test_another_device():
    harness.check_other_device(fused, inputs(2, 64, 256, 4, 2, torch.bfloat16, 64), [0, 1, 2, 3])


def test_bad_input():
    x, w_q, w_k, w_v, cos, sin, _ = inputs(2, 3, 24, 4, 2, torch.bfloat16, 32)
    buffer = torch.zeros(64, 24, device=DEVICE)

    def raises(error, match, *changed, rest=(), **named):
        given_ = {"x": x, "w_q": w_q, "w_k": w_k, "w_v": w_v, "cos": cos, "sin": sin} | named
        with pytest.raises(error, match=match):
            kernels.qkv_projection(*given_.values(), *rest, **dict(changed))

    raises(ValueError, r"x must have shape \(B, T, C\)", x=x[0])
    raises(TypeError, "w_v is torch.float32 but x is torch.bfloat16", w_v=w_v.float())
    raises(ValueError, "w_k is on meta but x is on", w_k=w_k.to("meta"))
    raises(ValueError, r"w_k must have shape \(heads·D, 24\)", w_k=w_k[:, :23])
    raises(ValueError, "w_q has 127 rows, which is no multiple of the head width 32", w_q=w_q[:127])
    raises(ValueError, r"w_v must have shape \(64, 24\)", w_v=w_v[:32])
    raises(ValueError, "3 query heads are not a multiple of 2 key heads", w_q=w_q[:96])
    raises(ValueError, "4 query heads are not a multiple of 0 key heads", w_k=w_k[:0], w_v=w_v[:0])
    raises(ValueError, "no multiple of the head width 0", cos=cos[:, :0], sin=sin[:, :0])
    raises(ValueError, r"cos must have shape \(positions, D/2\)", cos=cos[0])
    raises(ValueError, r"sin must have shape \(3, 16\)", sin=sin[:2])
    raises(TypeError, "sin is torch.float32 but cos is torch.bfloat16", sin=sin.float())
    raises(ValueError, "cos is on meta but x is on", cos=cos.to("meta"), sin=sin.to("meta"))
    raises(ValueError, "positions 1 to 3 exceed the 3 rows", rest=(1,))
    for offset in (1.5, True, None):
        raises(TypeError, f"offset must be an int or a tensor of ints, got {offset}", rest=(offset,))
    raises(ValueError, r"offset must have shape \(2\)", rest=(torch.zeros(3, dtype=torch.int64, device=DEVICE),))
    raises(TypeError, "offset must be int32 or int64", rest=(torch.zeros(2, device=DEVICE),))
    raises(ValueError, r"rstd must have shape \(2, 3\)", rest=(0, torch.ones(6, device=DEVICE)))
    raises(TypeError, "rstd must be torch.float32, got torch.bfloat16", rest=(0, x[..., 0]))
    raises(ValueError, r"q_gradient must have shape \(128, 24\)", rest=(0, None, buffer))
    raises(TypeError, "k_gradient must be contiguous float32", rest=(0, None, None, buffer.bfloat16()))
    raises(TypeError, "v_gradient must be contiguous float32", rest=(0, None, None, None, buffer.double()))
    error = kernels.KernelRequestError
    fused_only = ("impl", "triton")
    raises(error, "a head of 12 channels does not fill", fused_only, w_q=w_q[:24], w_k=w_k[:24], w_v=w_v[:24],
           cos=cos[:, :6], sin=sin[:, :6])  # fmt: skip
    raises(error, "no gradient for cos and sin", fused_only, cos=cos.clone().requires_grad_())
    wide = {name: t.float() for name, t in (("x", x), ("w_q", w_q), ("w_k", w_k), ("w_v", w_v))}
    raises(error, "the fused product takes bfloat16 or float16", fused_only, **wide)
    raises(error, "float64", fused_only, **{name: t.double() for name, t in wide.items()})
    raises(error, "float64", ("impl", "unfused"), **{name: t.double() for name, t in wide.items()})
    many = torch.zeros(1, 1, 24, device=DEVICE, dtype=torch.bfloat16).expand(2**31, 1, 24)
    raises(error, "rows exceed the 2147483647 of one product", fused_only, x=many)


# faults that a test must catch: see test_planted_faults.py
KERNELS = "qkv_projection_kernels"
PLANTED_FAULTS = {
    "wrong sign in the rotation": (KERNELS, "x1 * c + x2 * s, x2 * c", "x1 * c - x2 * s, x2 * c", "test_qkv_projection"),
    "turned back the wrong way": (KERNELS, "o1 * c - o2 * s", "o1 * c + o2 * s", "test_qkv_projection"),
    "mean over half of the head": (KERNELS, "/ (2 * HALF) + EPS", "/ HALF + EPS", "test_qkv_projection"),
    "values rotated and normed too": (KERNELS, "if column < normed:", "if column < n:", "test_qkv_projection"),
    "keys not normed": (
        "qkv_projection", "positions, (heads + kv_heads) * width, EPS", "positions, heads * width, EPS",
        "test_qkv_projection",
    ),
    "the last key head not normed": (KERNELS, "if column < normed:", "if column + 2 * HALF < normed:",
     "test_qkv_projection"),
    "strides of the tables ignored": ("qkv_projection", "cos, sin = cos.contiguous(), sin.contiguous()", "pass",
     "test_strided_tables"),
    "values taken as normed in backward": (KERNELS, "is_normed = program < q_programs + k_programs",
     "is_normed = program < q_programs + 2 * k_programs", "test_qkv_projection"),
    "rstd ignored in forward": (KERNELS, "factor = load_rows(rstd_ptr, row, m, sums.shape[0])",
     "factor = 0.0 * load_rows(rstd_ptr, row, m, sums.shape[0]) + 1.0", "test_qkv_projection"),
    "rstd ignored in backward": (KERNELS, "(rstd * head_rstd)[:, None]", "head_rstd[:, None]", "test_qkv_projection"),
    "projection of the head's norm dropped": (KERNELS, "factor * (g1 - y1 * projection)", "factor * g1", "test_qkv_projection"),
    "values' part of the row sums dropped": (KERNELS, "EPS * head_rstd * head_rstd, 1.0)", "EPS * head_rstd * head_rstd, 0.0)",
     "test_qkv_projection"),
    "coefficient of the folded norm dropped": (
        "folded_norm", "sums -= x * load_rows(coefficient_ptr", "sums -= 0 * x * load_rows(coefficient_ptr",
        "test_qkv_projection",
    ),
    "gradient of the last result dropped": (
        "qkv_projection", "added, weight = None if dx is None else as_rows(dx)", "added, weight = None",
        "test_the_last_result_is_x_and_its_gradient_is_added",
    ),
    "gradient of the last result dropped where it is the only one": (
        "qkv_projection", "return dx if needed[0] else None, None, None, None", "return None, None, None, None",
        "test_results_that_are_not_used",
    ),
    "a product in float16 rounded to it": ("matrix_product", " or x.dtype == torch.float16", "", "test_a_large_x_in_float16"),
    "float16 has gradients": ("qkv_projection", "x.dtype == torch.float16 and needs_gradient", "False and needs_gradient",
     "test_float16_has_no_gradients"),
    "positions counted over the batch": (KERNELS, "(r % tokens).to(tl.int64) + offset", "r.to(tl.int64) + offset",
     "test_qkv_projection"),
    "offset ignored in forward": (KERNELS, "(r % tokens).to(tl.int64) + offset", "(r % tokens).to(tl.int64)",
     "test_qkv_projection"),
    "offset of the wrong row": (KERNELS, "(r // tokens).to(tl.int64) * offsets_stride", "(r // tokens).to(tl.int64) * 0",
     "test_offset_of_each_row"),
    "stride of the offsets ignored": (KERNELS, "(r // tokens).to(tl.int64) * offsets_stride", "(r // tokens).to(tl.int64)",
     "test_strided_offsets"),
    "position outside read": (KERNELS, "(position >= 0) & (position < positions)", "(position >= 0)",
     "test_a_position_outside_of_the_tables_gives_nan_and_no_stray_read"),
    "a constant that is used as a tensor": (KERNELS, "tl.cast(tokens, tl.int64)", "tokens.to(tl.int64)",
     "test_one_token_compiles"),
    "rstd of a head in 32 bits": (KERNELS, "tl.cast(column // (2 * HALF), tl.int64) * m", "(column // (2 * HALF)) * m",
     "test_offsets_are_int64"),
    "a program with heads of two kinds": ("qkv_projection_kernels", "most = gcd(heads, dk.size(2))", "most = heads",
     "test_a_program_has_heads_of_one_kind"),
    "weights in another order taken as one": (
        "qkv_projection", "and matrix.storage_offset() == end", "", "test_adjacent_weights_are_not_copied_and_change_nothing",
    ),
    "buffers in the wrong order": (
        "qkv_projection", "zip(parts, buffers, strict=True)", "zip(parts, (buffers[0], *buffers[:0:-1]), strict=True)",
        "test_gradients_are_added_to_buffers",
    ),
    "a buffer overwritten": (
        "qkv_projection", "add_product(buffer, part, rows)", "buffer.copy_(part.t() @ rows)",
        "test_gradients_are_added_to_buffers",
    ),
    "channels of upstream gradients taken as contiguous": (
        "qkv_projection_kernels", "x if x.stride(3) == 1 or head_width == 1 else x.contiguous()", "x",
        "test_upstream_gradients_of_any_strides",
    ),
}  # fmt: skip
