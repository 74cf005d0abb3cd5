"""The reference itself, against formulas written out in float64 and by properties that must hold."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels.dispatch import operations

OPERATIONS = tuple(operations())
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tables(positions: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return angles.cos(), angles.sin()


@given(rows=sizes, width=st.integers(1, 40), scale=st.floats(1, 1e3), seed=seeds)
def test_rms_norm(rows, width, scale, seed):
    x = randn(rows, width, seed=seed)
    x = x + x.sign()  # away from zero, where eps counts
    out = kernels.rms_norm(x)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(kernels.rms_norm(x * scale), out, rtol=1e-5, atol=1e-6)


@given(batch=sizes, tokens=sizes, groups=st.integers(1, 3), share=st.integers(1, 3), half=sizes, seed=seeds)
def test_qk_norm_rope_rotates_by_minus_theta(batch, tokens, groups, share, half, seed):
    q, k = (
        randn(batch, tokens, groups * share, 2 * half, seed=seed),
        randn(batch, tokens, groups, 2 * half, seed=seed + 1),
    )
    cos, sin = tables(tokens + 5, 2 * half)
    out_q, out_k = kernels.qk_norm_rope(q, k, cos, sin, 5)
    for x, out in ((q, out_q), (k, out_k)):
        # rotate the pair (x1, x2), as a complex number, by −θ
        rotated = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, -sin)[5:, None]
        expected = torch.cat([rotated.real, rotated.imag], dim=-1)
        torch.testing.assert_close(expected.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(out, kernels.rms_norm(expected))


def test_qk_norm_rope_offset_of_each_row():
    q, k = randn(2, 3, 2, 8), randn(2, 3, 1, 8, seed=1)
    cos, sin = tables(20, 8)
    both = kernels.qk_norm_rope(q, k, cos, sin, torch.tensor([4, 9]))
    for row, offset in enumerate((4, 9)):
        alone = kernels.qk_norm_rope(q[row : row + 1], k[row : row + 1], cos, sin, offset)
        for a, b in zip(both, alone, strict=True):
            torch.testing.assert_close(a[row : row + 1], b)


def test_scores_depend_only_on_the_distance():
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)
    cos, sin = tables(100, 16)

    def score(at: int, back: int) -> float:
        rotated_q, _ = kernels.qk_norm_rope(q, k, cos, sin, at)
        _, rotated_k = kernels.qk_norm_rope(q, k, cos, sin, at - back)
        return float((rotated_q * rotated_k).sum())

    assert math.isclose(score(10, 7), score(80, 7), rel_tol=1e-6)
    assert not math.isclose(score(10, 7), score(10, 3), rel_tol=1e-3)


@given(
    batch=st.integers(1, 3),
    tokens=sizes,
    more=st.integers(0, 5),
    groups=st.integers(1, 2),
    share=st.integers(1, 3),
    seed=seeds,
)
def test_attention(batch, tokens, more, groups, share, seed):
    heads, width, keys = groups * share, 4, tokens + more
    q = randn(batch, tokens, heads, width, seed=seed)
    k, v = randn(batch, keys, groups, width, seed=seed + 1), randn(batch, keys, groups, width, seed=seed + 2)
    out = kernels.attention(q, k, v)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                seen = more + t + 1
                scores = k[b, :seen, h // share] @ q[b, t, h] / math.sqrt(width)
                expected = torch.softmax(scores, 0) @ v[b, :seen, h // share]
                torch.testing.assert_close(out[b, t, h], expected)


def test_attention_is_causal():
    q, k, v = randn(1, 6, 2, 4), randn(1, 6, 2, 4, seed=1), randn(1, 6, 2, 4, seed=2)
    before = kernels.attention(q, k, v)
    k[:, 4], v[:, 4], q[:, 4] = 7.0, -3.0, 1.0
    after = kernels.attention(q, k, v)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_attention_ignores_keys_beyond_lengths():
    q, k, v = randn(2, 1, 2, 4), randn(2, 7, 2, 4, seed=1), randn(2, 7, 2, 4, seed=2)
    both = kernels.attention(q, k, v, torch.tensor([3, 7]))
    torch.testing.assert_close(both[:1], kernels.attention(q[:1], k[:1, :3], v[:1, :3]))
    torch.testing.assert_close(both[1:], kernels.attention(q[1:], k[1:], v[1:]))


@given(rows=sizes, width=sizes, hidden=sizes, seed=seeds)
def test_relu2_mlp(rows, width, hidden, seed):
    x, w1, w2 = randn(rows, width, seed=seed), randn(hidden, width, seed=seed + 1), randn(width, hidden, seed=seed + 2)
    normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    branch = (normed @ w1.T).clamp(min=0) ** 2 @ w2.T
    for residual, expected in ((None, branch), (x, x + branch), (2 * x, 2 * x + branch)):
        y, rstd = kernels.relu2_mlp(x, w1, w2, residual)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(rstd, (expected.square().mean(-1) + torch.finfo(torch.float32).eps) ** -0.5)


@given(rows=sizes, width=sizes, k=sizes, seed=seeds)
def test_output_projection(rows, width, k, seed):
    x, weight, residual = randn(rows, k, seed=seed), randn(width, k, seed=seed + 1), randn(rows, width, seed=seed + 2)
    for added, expected in ((None, x @ weight.T), (residual, residual + x @ weight.T)):
        y, rstd = kernels.output_projection(x, weight, added)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(rstd, (expected.square().mean(-1) + torch.finfo(torch.float32).eps) ** -0.5)


@given(batch=sizes, tokens=sizes, groups=st.integers(1, 3), share=st.integers(1, 3), half=sizes, seed=seeds)
def test_qkv_projection(batch, tokens, groups, share, half, seed):
    rows = [groups * share * 2 * half, groups * 2 * half, groups * 2 * half]
    x, weights = randn(batch, tokens, 8, seed=seed), [randn(n, 8, seed=seed + n) for n in rows]
    cos, sin = tables(tokens + 5, 2 * half)
    *found, same = kernels.qkv_projection(x, *weights, cos, sin, 5)
    q, k, v = ((kernels.rms_norm(x) @ w.T).view(batch, tokens, -1, 2 * half) for w in weights)
    for a, b in zip(found, (*kernels.qk_norm_rope(q, k, cos, sin, 5), v), strict=True):
        torch.testing.assert_close(a, b)
    assert same is x


@given(rows=sizes, width=sizes, vocabulary=st.integers(2, 30), ignored=st.integers(0, 9), seed=seeds)
def test_linear_cross_entropy(rows, width, vocabulary, ignored, seed):
    x, weight = randn(rows, width, seed=seed), 5 * randn(vocabulary, width, seed=seed + 1)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    targets[:ignored] = -1
    losses = kernels.linear_cross_entropy(x, weight, targets, reduction="none")
    logits = 15 * torch.tanh(x @ weight.T / 15)
    expected = torch.stack(
        [
            row.exp().sum().log() - row[t] if t >= 0 else row.new_zeros(())
            for row, t in zip(logits, targets, strict=True)
        ]
    )
    torch.testing.assert_close(losses, expected)
    mean = kernels.linear_cross_entropy(x, weight, targets)
    valid = int((targets >= 0).sum())
    torch.testing.assert_close(mean, expected.sum() / max(valid, 1))


def test_linear_cross_entropy_of_nothing_is_zero_with_zero_gradients():
    x = randn(3, 4).requires_grad_()
    loss = kernels.linear_cross_entropy(x, randn(5, 4), torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(x.grad, torch.zeros_like(x))


@settings(max_examples=30)
@given(m=st.integers(1, 24), n=st.integers(1, 24), scale=st.floats(1e-3, 1e3), seed=seeds)
def test_newton_schulz_orthogonalises(m, n, scale, seed):
    gradients = randn(3, m, n, seed=seed)
    out = kernels.newton_schulz(gradients)
    before, after = torch.linalg.svdvals(gradients), torch.linalg.svdvals(out)
    strong = before >= 1e-2 * before[:, :1]
    assert ((after >= 0.68) & (after <= 1.14) | ~strong).all()
    torch.testing.assert_close(kernels.newton_schulz(gradients * scale), out, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(kernels.newton_schulz(gradients.mT), out.mT)
    torch.testing.assert_close(kernels.newton_schulz(gradients[1]), out[1])


def test_bad_input_is_named():
    x = randn(4, 6)
    cos, sin = tables(8, 6)
    weight = randn(5, 6, dtype=torch.float32)
    cases = [
        (TypeError, "floating point", lambda: kernels.rms_norm(torch.ones(3, dtype=torch.int64))),
        (ValueError, "C at least 1, got shape", lambda: kernels.rms_norm(torch.tensor(1.0))),
        (ValueError, r"k must have shape \(1, 4, G, 6\)", lambda: kernels.qk_norm_rope(randn(1, 4, 2, 6), x, cos, sin)),
        (ValueError, "even", lambda: kernels.qk_norm_rope(randn(1, 4, 2, 5), randn(1, 4, 2, 5), cos, sin)),
        (ValueError, "not a multiple", lambda: kernels.qk_norm_rope(randn(1, 4, 3, 6), randn(1, 4, 2, 6), cos, sin)),
        (
            ValueError,
            "exceed the 8 rows",
            lambda: kernels.qk_norm_rope(randn(1, 4, 2, 6), randn(1, 4, 2, 6), cos, sin, 5),
        ),
        (TypeError, "cast one", lambda: kernels.relu2_mlp(x, randn(5, 6).float(), randn(6, 5))),
        (ValueError, r"w_down must have shape \(6, 5\)", lambda: kernels.relu2_mlp(x, randn(5, 6), randn(5, 6))),
        (
            ValueError,
            "at least as many keys",
            lambda: kernels.attention(randn(1, 4, 1, 2), randn(1, 3, 1, 2), randn(1, 3, 1, 2)),
        ),
        (TypeError, "int64", lambda: kernels.linear_cross_entropy(x, x, torch.zeros(4))),
        (ValueError, "reduction", lambda: kernels.linear_cross_entropy(x, x, torch.zeros(4).long(), reduction="sum")),
        (ValueError, "steps", lambda: kernels.newton_schulz(x, -1)),
        (ValueError, "must be", lambda: kernels.newton_schulz(x[0])),
        (ValueError, "integer of at least 0, got 2.5", lambda: kernels.newton_schulz(x, 2.5)),
        (ValueError, "one per step, got 3.0", lambda: kernels.newton_schulz(x, 5, 3.0)),
        (ValueError, r"one per step, got \[\(1, 2, 3\), 4\]", lambda: kernels.newton_schulz(x, 5, [(1, 2, 3), 4])),
        (TypeError, "update must be a tensor, got None", lambda: kernels.add_rms_norm(x, None)),
        (TypeError, "lengths must be a tensor, got None", lambda: kernels.cache_append(*[randn(1, 2, 1, 4)] * 4, None)),
        (ValueError, "positive and finite, got None", lambda: kernels.softcapped_logits(x, x, None)),
        (ValueError, "positive and finite, got 1e[+]39", lambda: kernels.softcapped_logits(x, x, 1e39)),
        (ValueError, "got that of the weight", lambda: kernels.linear(x.float(), weight, weight.detach())),
        (TypeError, "linear: x must be a tensor, got None", lambda: kernels.linear(None, x)),
        (TypeError, "rms_norm: x must be a tensor, got 1", lambda: kernels.rms_norm(1)),
        (ValueError, "linear: x must have shape .* got a single number", lambda: kernels.linear(x[0, 0], x)),
        (
            TypeError,
            "loss_weight must be a tensor, got 0.5",
            lambda: kernels.softcap_cross_entropy(x, torch.zeros(4).long(), loss_weight=0.5),
        ),
        (ValueError, "got that of the weight", lambda: kernels.linear(x.float(), weight, weight)),
        (
            ValueError,
            "requires no gradient, .* got a tensor that requires one",
            lambda: kernels.relu2_mlp(
                x.float(), weight, weight.t().contiguous(), None, None, weight.clone().requires_grad_()
            ),
        ),
        (ValueError, "positive and finite, got inf", lambda: kernels.softcapped_logits(x, x, math.inf)),
        (
            ValueError,
            "positive and finite, got inf",
            lambda: kernels.linear_cross_entropy(x, x, torch.zeros(4).long(), math.inf),
        ),
        (
            ValueError,
            "offset must be from 0 to 8, the rows of the tables, got -1",
            lambda: kernels.qk_norm_rope(randn(1, 4, 2, 6), randn(1, 4, 2, 6), cos, sin, -1),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_autocast_casts_floating_point_only():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="x must be floating point, got torch.int64"),
    ):
        kernels.linear(torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="weight must be a tensor, got None"),
    ):
        kernels.linear(torch.ones(2, 4), None)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_can_be_pickled(operation):
    function = getattr(kernels, operation)
    assert pickle.loads(pickle.dumps(function)) is function


def test_vmap_over_nothing():
    x = torch.ones(0, 2, 4, requires_grad=True)
    y = torch.vmap(lambda x: kernels.linear(x, torch.ones(5, 4), torch.zeros(5, 4)))(x)
    assert y.shape == (0, 2, 5) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    assert torch.vmap(lambda x: kernels.newton_schulz(x, impl="triton"))(x.detach().half()).shape == x.shape


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_error_for_an_unknown_implementation_lists_the_existing_ones(operation):
    kernels.check_request(operation, "auto"), kernels.check_request(operation, "reference")
    with pytest.raises(ValueError, match=f"{operation}: impl='fast' does not exist; choose one of auto, .*reference"):
        kernels.check_request(operation, "fast")
