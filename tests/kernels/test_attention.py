"""attention in Triton against the reference: forward, backward, documents, lengths, and decoding.

This file is long because the operation is five kernels, each with and without a bound, lengths and documents.
"""

import importlib
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat.gpt import GPTConfig
from nanochat_kernels import reference
from nanochat_kernels.operation import RunShape
from nanochat_kernels.triton_helpers import recorded_launches
from tests.kernels import harness
from tests.kernels.harness import DEVICE, GPU, SM90, check_compiled, check_graph_replay, randn, same
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.attention")
LAUNCHES = importlib.import_module("nanochat_kernels.attention_launches")
HOPPER = importlib.import_module("nanochat_kernels.hopper_attention")
HALVES = (torch.bfloat16, torch.float16)
# several blocks of queries and keys in a short sequence, because an interpreted program is slow
SMALL = {
    "attention_decode": {"BLOCK_N": 16, "PART": 32, "PARTS": 2, "num_warps": 1, "num_stages": 1},
    "attention_key_gradients": {"BLOCK_M": 32, "BLOCK_N": 16, "GROUP": 2, "num_warps": 1, "num_stages": 1},
}
SMALL_BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 16, "GROUP": 2, "num_warps": 1, "num_stages": 1}
# tokens and head width of whole sequences, which the Gluon kernels take on sm_90; nothing shorter reaches them
WHOLE = [(256, 64), (256, 128)] if GPU else []


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setattr(LAUNCHES, "launch_parameters", lambda name, *_: SMALL.get(name, SMALL_BLOCKS))
            patch.setattr(FILE, "MOST_QUERIES", 6)
        yield


def fused(*arguments, **options):
    return kernels.attention(*arguments, impl="triton", **options)


class Rounded(torch.autograd.Function):
    """Attention that rounds where the kernels must: p and ds to the dtype of the operands of the products that take them."""

    @staticmethod
    def forward(q, k, v, seen):
        scores, share = Rounded.scores(q, k), q.size(2) // k.size(2)
        lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
        p = (scores - lse).exp().masked_fill(~seen, 0.0)
        out = torch.einsum("bhts,bshd->bthd", p.to(q.dtype).float(), v.float().repeat_interleave(share, 2))
        return out.to(q.dtype), lse.squeeze(-1), p

    @staticmethod
    def scores(q, k):
        keys = k.float().repeat_interleave(q.size(2) // k.size(2), 2)
        return torch.einsum("bthd,bshd->bhts", q.float(), keys) / math.sqrt(q.size(3))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[0], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse, _):
        q, k, v, seen, out, p = ctx.saved_tensors
        share, dout = q.size(2) // k.size(2), torch.zeros_like(out).float() if dout is None else dout.float()
        dp = torch.einsum("bthd,bshd->bhts", dout, v.float().repeat_interleave(share, 2))
        delta = (dout * out.float()).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
        ds = (p * (dp - delta[..., None])).masked_fill(~seen, 0.0).to(q.dtype).float()
        dq = torch.einsum("bhts,bshd->bthd", ds, k.float().repeat_interleave(share, 2))
        dk = torch.einsum("bhts,bthd->bshd", ds, q.float()).unflatten(2, (-1, share)).sum(3)
        dv = torch.einsum("bhts,bthd->bshd", p.to(q.dtype).float(), dout).unflatten(2, (-1, share)).sum(3)
        root = math.sqrt(q.size(3))
        return (dq / root).to(q.dtype), (dk / root).to(q.dtype), dv.to(q.dtype), None


@pytest.mark.parametrize("ends", [(0, 4), (3, 6), (0, 3, 100), (5,)])
def test_tokens_outside_of_the_documents_are_documents_too(ends):
    """As in the reference, so that wrong limits read nothing outside of any tensor."""
    q, k, v = inputs(2, 3, 3, 1, 1, 32, torch.float16, 0)
    cu_seqlens = torch.tensor(ends, device=DEVICE)
    found, expected = (
        harness.evaluate(
            partial(kernels.attention, impl=impl),
            [q, k, v, None, cu_seqlens],
            [randn(*q.shape, dtype=q.dtype)],
            [0, 1, 2],
        )
        for impl in ("triton", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)


def plain(q, k, v, lengths=None, cu_seqlens=None):
    """The reference with lse, in float64; in the dtype of the kernels the same with p and ds rounded."""
    if q.dtype == torch.float64:
        return kernels.attention(q, k, v, lengths, cu_seqlens, return_lse=True, impl="reference")
    seen = reference.attention_mask(q, k.size(1), lengths, cu_seqlens)
    seen = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).tril()[None] if seen is None else seen
    return Rounded.apply(q, k, v, seen[:, None])[:2]


def check(*arguments, **options):
    """harness.check, where lse may have the error of exp2 and log2 in the unit for special functions.

    The gradient of a query that sees few keys is a small difference, and its errors are as few numbers.
    """
    harness.check(*arguments, **{"epsilon": 2**-22, "cancellation": 1e-5, "fewest_rows": 32, **options})


def with_bound(bound):
    return lambda *arguments: fused(*arguments, bound=bound, return_lse=True)


def inputs(batch, tokens, keys, groups, share, width, dtype, seed=0):
    """q, k and v, of which the first two are views of one tensor if they have as many tokens, as a projection makes them."""
    q = randn(batch, tokens, groups * share, width, dtype=torch.float32, seed=seed)
    k, v = (randn(batch, keys, groups, width, dtype=torch.float32, seed=seed + i) for i in (1, 2))
    q, k = reference.rms_norm(q), reference.rms_norm(k)
    if tokens == keys:
        qkv = torch.cat([q, k, v], 2).to(dtype)
        return list(qkv.split((groups * share, groups, groups), 2))
    return [x.to(dtype) for x in (q, k, v)]


def assert_taken(q, k, v):
    """Check that on sm_90 the Gluon kernels take the call if it has whole tiles, as tests of WHOLE sizes mean it."""
    if SM90 and q.size(1) % HOPPER.TILE == 0:
        assert HOPPER.takes(q, k, v)


# The errors of a row with few keys are few numbers, so that a norm over few rows is luck. Random draws need many rows, and so a GPU.
few_examples = settings(harness.property_test, max_examples=60, phases=harness.PHASES if GPU else (Phase.explicit,))
bounds = st.sampled_from((None, 1.0))  # in units of √D
sizes = dict(
    batch=st.integers(12, 16), groups=st.integers(1, 2), share=st.integers(1, 3), width=st.sampled_from(FILE.HEAD_WIDTHS[:2]),
    dtype=st.sampled_from(HALVES), bound=bounds, seed=harness.seeds,
)  # fmt: skip


def bound_of(bound, width):
    return bound and bound * math.sqrt(width)


ALIKE = 2**-18
"""The error that lse may have besides where all scores are alike: all queries then make the same roundings, of numbers up to 24,
where float32 has steps of 2⁻¹⁹, and their errors do not average out."""


def narrow_bound(width, dtype):
    """√D, or the widest round bound with which float16 needs no maximum."""
    return min(math.sqrt(width), 10.0) if dtype == torch.float16 else math.sqrt(width)


def cancellation(seen, dtype, others=1e-5):
    """The error that dq of a query may have besides that sees few keys (B, T): the number that multiplies all of its channels is a
    difference, so that the largest of these errors is luck. others: that of all other gradients."""
    few = torch.where(seen <= 3, torch.finfo(dtype).eps, others).to(DEVICE)
    return few[:, :, None, None], others, others


@few_examples
@example(batch=2, tokens=70, groups=2, share=2, width=32, dtype=torch.bfloat16, bound=1.0, seed=1)
@example(batch=1, tokens=49, groups=1, share=3, width=64, dtype=torch.float16, bound=None, seed=2)
@example(batch=3, tokens=1, groups=2, share=1, width=32, dtype=torch.float16, bound=None, seed=3)
@example(batch=1, tokens=66, groups=1, share=1, width=64, dtype=torch.bfloat16, bound=1.0, seed=4)
@given(tokens=st.integers(1, 70), **sizes)
def test_attention(batch, tokens, groups, share, width, dtype, bound, seed):
    given_ = inputs(batch, tokens, tokens, groups, share, width, dtype, seed)
    more = cancellation(torch.arange(1, tokens + 1)[None], dtype)
    check(with_bound(bound_of(bound, width)), plain, given_, [0, 1, 2], seed, cancellation=more)


@few_examples
@example(batch=2, tokens=20, more=30, groups=1, share=2, width=32, dtype=torch.bfloat16, bound=1.0, seed=1)
@example(batch=2, tokens=1, more=80, groups=2, share=2, width=32, dtype=torch.float16, bound=1.0, seed=1)
@example(batch=2, tokens=2, more=70, groups=1, share=3, width=32, dtype=torch.bfloat16, bound=None, seed=3)
@example(batch=1, tokens=30, more=0, groups=2, share=1, width=64, dtype=torch.float16, bound=1.0, seed=4)
@given(tokens=st.integers(1, 30), more=st.integers(0, 60), **sizes)
def test_lengths(batch, tokens, more, groups, share, width, dtype, bound, seed):
    """Chunks of queries, and single ones, against caches that are filled to different lengths, the last ones not at all."""
    keys, short = tokens + more, max(1, batch // 2)
    lengths = torch.randint(tokens, keys + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    lengths = torch.cat([lengths, torch.tensor([keys] + [min(tokens - 1, 3)] * short)]).to(DEVICE)
    given_ = [*inputs(batch + 1 + short, tokens, keys, groups, share, width, dtype, seed), lengths]
    more = cancellation(lengths.cpu()[:, None] + torch.arange(1, tokens + 1) - tokens, dtype)
    check(with_bound(bound_of(bound, width)), plain, given_, [0, 1, 2], seed, cancellation=more)


@few_examples
@example(
    batch=2,
    documents=(7, 7, 30, 50, 70),
    tokens=45,
    groups=1,
    share=2,
    width=32,
    dtype=torch.bfloat16,
    bound=1.0,
    seed=1,
)
@example(
    batch=1, documents=(0, 3, 40, 41), tokens=50, groups=2, share=1, width=64, dtype=torch.float16, bound=None, seed=2
)
@given(documents=st.lists(st.integers(0, 120), max_size=6), tokens=st.integers(7, 60), **sizes)
def test_documents(batch, documents, tokens, groups, share, width, dtype, bound, seed):
    ends = sorted(min(end, batch * tokens) for end in documents)
    cu_seqlens = torch.tensor([0, *ends, batch * tokens], dtype=torch.int32 if seed % 2 else torch.int64, device=DEVICE)
    given_ = [*inputs(batch, tokens, tokens, groups, share, width, dtype, seed), None, cu_seqlens]
    starts, _ = FILE.document_limits(cu_seqlens, given_[0])
    more = cancellation(torch.arange(1, tokens + 1) - starts.cpu(), dtype)
    check(with_bound(bound_of(bound, width)), plain, given_, [0, 1, 2], seed, cancellation=more)


def test_documents_are_those_of_separate_calls():
    q, k, v = inputs(1, 60, 60, 2, 1, 32, torch.bfloat16)
    packed = fused(q, k, v, None, torch.tensor([0, 25, 60], device=DEVICE), bound=math.sqrt(32))
    for part in (slice(0, 25), slice(25, 60)):
        alone = fused(*(x[:, part] for x in (q, k, v)), bound=math.sqrt(32))
        torch.testing.assert_close(packed[:, part], alone, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("tokens", [1, 2047, 2048] if GPU else [33])
@pytest.mark.parametrize("width", FILE.HEAD_WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_model_widths(tokens, width, dtype):
    given_ = inputs(2 if GPU else 1, tokens, tokens, 2, 1, width, dtype, seed=1)
    check(with_bound(math.sqrt(width)), plain, given_, [0, 1, 2])


def ends_by_chunks(q, k, v, dout, few, chunk):
    """out and dq of the last queries, and dk and dv of the first keys, in float64, by chunks of queries that fit in memory."""
    first = [x[:, :few].clone().requires_grad_() for x in (k, v)]
    sums = [torch.zeros(x.shape, dtype=torch.float64, device=DEVICE) for x in first]
    for start in range(0, q.size(1), chunk):
        end = min(start + chunk, q.size(1))
        queries = q[:, start:end].clone().requires_grad_()
        keys, values = (torch.cat([x, of[:, few:end]], 1) for x, of in zip(first, (k, v), strict=True))
        out = plain(queries, keys, values)[0]
        dq, *gradients = torch.autograd.grad(out, (queries, *first), dout[:, start:end])
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    return out[:, -few:].double().detach(), dq[:, -few:].double(), *sums


@pytest.mark.parametrize("bound", [None, 1.0])
def test_long_sequences(bound):
    """The last queries of 32,768 tokens, whose sums have the most terms, and the gradients of the first keys, that have as many."""
    tokens, few, chunk = (32_768, 64, 1024) if GPU else (100, 20, 25)
    q, k, v = inputs(1, tokens, tokens, 1, 1, 128, torch.bfloat16)
    dout = randn(*q.shape, dtype=torch.bfloat16, seed=5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = with_bound(bound_of(bound, 128))(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    exact = ends_by_chunks(*(x.double() for x in (q, k, v, dout)), few, chunk)
    baseline = ends_by_chunks(q, k, v, dout, few, chunk)
    for found, oracle, other in zip(
        (out[:, -few:], dq[:, -few:], dk[:, :few], dv[:, :few]), exact, baseline, strict=True
    ):
        assert (found.double() - oracle).norm() <= 1.5 * (other - oracle).norm()
    exact_lse = plain(q[:, -few:].double(), k.double(), v.double())[1]
    torch.testing.assert_close(lse[..., -few:].double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tokens", "width"), [(50, 32), *WHOLE])
def test_a_later_token_changes_nothing_before_it(tokens, width):
    q, k, v = inputs(1, tokens, tokens, 1, 2, width, torch.bfloat16)
    assert_taken(q, k, v)
    before = fused(q, k, v, bound=math.sqrt(width))
    changed = 2 * tokens // 3
    for x in (q, k, v):
        x[:, changed] = -x[:, changed]
    after = fused(q, k, v, bound=math.sqrt(width))
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("tokens", "width"), [(50, 32), *WHOLE])
def test_extremes_within_the_bound(tokens, width, dtype, is_bounded):
    """All scores at the bound; all at its negative; one key at it among keys at its negative, and one of these alone at the start.

    The bound is √D, but 10 in float16 with D = 128, where √D is too wide.
    """
    bound = narrow_bound(width, dtype)
    unit = torch.zeros(1, tokens, 1, width, device=DEVICE, dtype=dtype)
    unit[..., 0] = math.sqrt(bound * math.sqrt(width))
    mixed = -unit
    mixed[:, 20] *= -1
    v = randn(1, tokens, 1, width, dtype=dtype)
    # where one key has all of the probability, ds is a difference of two sums of D terms, and dk of that key a sum of T such ones
    more = cancellation(torch.arange(1, tokens + 1)[None], dtype, 1e-5 * (tokens / 50) * (width / 32))
    for k in (unit, -unit, mixed):
        assert_taken(unit, k, v)
        run = with_bound(bound if is_bounded else None)
        check(run, plain, [unit, k, v], [0, 1, 2], cancellation=more, epsilon=ALIKE)


@pytest.mark.parametrize(("tokens", "width"), [(20, 64), *WHOLE])
def test_the_first_query_gets_exactly_its_value(tokens, width):
    q, k, v = inputs(2, tokens, tokens, 1, 1, width, torch.bfloat16)
    assert_taken(q, k, v)
    assert torch.equal(fused(q, k, v, bound=math.sqrt(width))[:, 0], v[:, 0])


@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (50, 32), *WHOLE])
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_beyond_the_bound_are_right_or_nan(dtype, tokens, width):
    q, k, v = inputs(1, tokens, max(tokens, 50), 1, 1, width, dtype)
    alike = (q[:, -1:] + 0.1 * k).to(dtype)  # the scores of the last query are all low, and differ
    nans = 0
    for factor in (-20.0, -6.0, -3.0, -2.5, 1.2, 2.5, 6.0, 20.0, 100.0):
        scaled = q * factor, k if factor > 0 else alike, v
        assert_taken(*scaled)
        found, lse = fused(*scaled, bound=narrow_bound(width, dtype), return_lse=True)
        expected, exact = plain(*(x.double() for x in scaled))
        wrong = found.isnan().any(-1, keepdim=True)
        nans += int(wrong.sum())
        assert torch.equal(wrong[..., 0].transpose(1, 2), lse.isnan())
        torch.testing.assert_close(
            found.double(), torch.where(wrong, torch.nan, expected), rtol=0.02, atol=0.02, equal_nan=True
        )
        torch.testing.assert_close(
            lse.double(), exact.masked_fill(lse.isnan(), torch.nan), rtol=1e-5, atol=1e-3, equal_nan=True
        )
    assert nans, "no score was beyond what the sums can hold"


@pytest.mark.parametrize(("tokens", "width"), [*itertools.product((4, 50), (64, 128)), *WHOLE])
@pytest.mark.parametrize("dtype", HALVES)
def test_queries_whose_scores_are_all_low(dtype, tokens, width):
    """All scores near −√D, and different: p of float16 must not lose bits there. With 128 channels its bound is too wide for p, so that
    forward keeps the maximum, on sm_90 too."""
    keys = max(tokens, 50)
    q, k = torch.zeros(1, tokens, 1, width), torch.zeros(1, keys, 1, width)
    q[..., 0], k[..., 0] = 1.0, -1.0
    k += 0.1 * randn(*k.shape, dtype=torch.float32).cpu() / math.sqrt(width)
    q, k = (reference.rms_norm(x).to(DEVICE, dtype) for x in (q, k))
    v = randn(1, keys, 1, width, dtype=dtype)
    assert_taken(q, k, v)
    more = cancellation(torch.arange(1, tokens + 1)[None] + keys - tokens, dtype)
    check(with_bound(math.sqrt(width)), plain, [q, k, v], [0, 1, 2], cancellation=more, epsilon=ALIKE)


def test_the_shift_of_float16():
    """p of the largest score is the largest power of two that float16 holds with some room, that of the smallest a normal number."""
    constants = LAUNCHES.softmax_constants(8.0, 64, torch.float16)
    assert constants["BOUNDED"] and 2 ** (8 * math.log2(math.e) - constants["SHIFT"]) == pytest.approx(2**15)
    assert 2 ** (-8 * math.log2(math.e) - constants["SHIFT"]) > torch.finfo(torch.float16).tiny
    unit = torch.zeros(1, 20, 1, 64, device=DEVICE, dtype=torch.float16)
    unit[..., 0] = 8.0
    check(with_bound(8.0), plain, [unit, unit, randn(1, 20, 1, 64, dtype=torch.float16)], [0, 1, 2])


def test_a_bound_that_is_too_wide_keeps_the_maximum():
    constants = {
        bound: LAUNCHES.softmax_constants(bound, 128, torch.bfloat16)["BOUNDED"] for bound in (None, 11.4, 34.0, 35.0)
    }
    assert constants == {None: False, 11.4: True, 34.0: True, 35.0: False}
    assert [LAUNCHES.softmax_constants(b, 128, torch.float16)["BOUNDED"] for b in (10.0, 11.3)] == [True, False]
    q, k, v = inputs(1, 40, 40, 1, 1, 32, torch.float16)
    check(with_bound(40.0), plain, [4 * q, 4 * k, v], [0, 1, 2])


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (40, 32), *WHOLE])
def test_nan_and_infinity_reach_every_query_that_sees_them(bound, tokens, width):
    keys, query = max(tokens, 60), 5 * tokens // 8
    given_ = inputs(1, tokens, keys, 1, 2, width, torch.bfloat16)
    assert_taken(*given_)
    run = with_bound(bound_of(bound, width))
    seen = torch.arange(tokens, device=DEVICE) + keys - tokens >= 50
    clean = run(*given_)[0]
    for value in (math.nan, math.inf):
        for i in range(3):
            changed = [x.clone() for x in given_]
            changed[i][0, query if i == 0 else 50, 0, 3] = value
            found = run(*changed)[0]
            hit = found.isfinite().logical_not().any(-1)[0, :, 0]
            if i == 0:
                assert bool(hit[query]) and torch.equal(found[0, :query], clean[0, :query])
            elif value != math.inf or i == 2:  # a score of −inf is one that counts for nothing
                assert bool(hit[seen].all())


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_row_does_not_depend_on_the_batch(tokens):
    q, k, v = inputs(3, tokens, 70, 1, 2, 32, torch.bfloat16)
    lengths = torch.tensor([50, 70, 64], device=DEVICE)
    for bound in (None, math.sqrt(32)):
        whole = fused(q, k, v, lengths, bound=bound)
        for row in range(3):
            alone = fused(q[row : row + 1], k[row : row + 1], v[row : row + 1], lengths[row : row + 1], bound=bound)
            assert torch.equal(whole[row : row + 1], alone)
        # nor on the capacity of the cache
        assert torch.equal(fused(q[:1], k[:1, :50], v[:1, :50], lengths[:1], bound=bound), whole[:1])


def test_strides():
    """Keys and values of a cache (S, B, G, D), queries and gradients of any layout, lengths that are every second number."""
    q, k, v = inputs(2, 20, 50, 2, 2, 32, torch.bfloat16)
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    lengths = torch.tensor([40, 1, 50, 1], device=DEVICE)[::2]
    columns = torch.stack([q, q + 1], -1)[..., 0]
    assert columns.stride(-1) == 2
    for given_ in ([q, k, v, lengths], [harness.in_layout(q, "transposed"), k, v, lengths], [columns, k, v, lengths]):
        check(with_bound(math.sqrt(32)), plain, given_, [0, 1, 2])


@pytest.mark.skipif(not GPU, reason="a whole tile of queries is too long for the interpreter")
@pytest.mark.parametrize(("tokens", "width"), WHOLE)
@pytest.mark.parametrize("dtype", HALVES)
def test_strides_of_whole_sequences(tokens, width, dtype):
    """Each of q, k and v in layouts that the Gluon kernels of sm_90 read, and in those for which others must take their place."""
    given_ = inputs(2, tokens, tokens, 2, 1, width, dtype)
    bound = narrow_bound(width, dtype)
    more = cancellation(torch.arange(1, tokens + 1)[None], dtype)
    layouts = {
        "contiguous": torch.clone,
        "wide rows": lambda x: torch.nn.functional.pad(x.flatten(2), (8, 8))[..., 8:-8].unflatten(2, (-1, width)),
        "odd rows": lambda x: torch.nn.functional.pad(x.flatten(2), (0, 4))[..., :-4].unflatten(2, (-1, width)),
        "unaligned": lambda x: torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape),
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "columns": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    }
    for number in range(3):
        for name, laid_out in layouts.items():
            changed = [laid_out(x) if i == number else x for i, x in enumerate(given_)]
            assert torch.equal(changed[number], given_[number])
            if name in ("contiguous", "wide rows"):
                assert_taken(*changed)
            check(with_bound(bound), plain, changed, [0, 1, 2], cancellation=more)


def test_upstream_of_one_result_and_of_any_layout():
    """Of lse alone, of out alone, and of out as a sum gives them: one number, expanded."""
    given_ = inputs(1, 20, 20, 1, 2, 32, torch.bfloat16)
    bounded = with_bound(math.sqrt(32))
    for part, wrt in ((0, [0, 1, 2]), (1, [0, 1])):
        check(lambda *x, part=part: bounded(*x)[part], lambda *x, part=part: plain(*x)[part], given_, wrt)
    leaves = [x.clone().requires_grad_() for x in given_]
    out = fused(*leaves, bound=math.sqrt(32))
    one = torch.ones((), dtype=out.dtype, device=DEVICE)
    columns = torch.ones(*out.shape, 2, dtype=out.dtype, device=DEVICE)[..., 0]
    expected = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    for upstream in (one.expand(out.shape), columns):
        found = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        assert all(map(torch.equal, found, expected))


def test_a_gradient_of_lse_that_is_not_finite_reaches_only_keys_that_are_seen():
    given_ = inputs(1, 20, 20, 1, 2, 32, torch.bfloat16)
    dlse = torch.zeros(1, 2, 20, device=DEVICE)
    dlse[..., 5] = math.nan
    dq, dk, dv = harness.evaluate(with_bound(math.sqrt(32)), given_, [torch.zeros_like(given_[0]), dlse], [0, 1, 2])[2:]
    query = torch.arange(20, device=DEVICE)
    assert torch.equal(dq.isnan().all(-1)[0, :, 0], query == 5) and torch.equal(dq.isnan().any(-1)[0, :, 0], query == 5)
    assert torch.equal(dk.isnan().all(-1)[0, :, 0], query <= 5) and torch.equal(dk.isnan().any(-1)[0, :, 0], query <= 5)
    assert dv.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 0), (2, 0, 5)])
def test_empty(shape):
    given_ = inputs(*shape, 1, 2, 32, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in given_]
    out = fused(*leaves)
    assert out.shape == given_[0].shape
    for gradient, x in zip(torch.autograd.grad(out.sum(), leaves), given_, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_one_gradient_is_needed(needed):
    check(with_bound(math.sqrt(32)), plain, inputs(1, 20, 20, 1, 2, 32, torch.bfloat16), [needed])


def test_autocast():
    q, k, v = inputs(1, 20, 20, 1, 2, 32, torch.float32)
    harness.check_autocast(lambda *given_: fused(*given_, bound=math.sqrt(32)), reference.attention, [q, k, v], [])


def test_derivatives_that_do_not_exist_raise():
    given_ = inputs(1, 20, 20, 1, 1, 32, torch.bfloat16)
    harness.check_second_derivative_raises(fused, given_, [0, 1, 2])
    harness.check_jvp_raises(fused, given_, [0, 1, 2])


def test_vmap():
    given_ = inputs(1, 20, 20, 1, 2, 32, torch.bfloat16)
    harness.check_vmap(lambda *x: fused(*x, bound=math.sqrt(32)), given_, (0, 1, 2), [0, 1, 2])


@pytest.mark.parametrize("kernel", LAUNCHES.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    q, k, v = inputs(1, 150, 150, 1, 1, 32, torch.bfloat16)
    dout = randn(*q.shape, dtype=torch.bfloat16, seed=5)
    out, lse = plain(q, k, v)
    *_, dq, dk, dv = harness.evaluate(lambda *x: plain(*x)[0], [q, k, v], [dout], [0, 1, 2])
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    for parameters in [p for p in kernel.space if "STAGES" not in p][:: 1 if GPU else 4]:
        if kernel.name == "attention_forward":
            found, expected = LAUNCHES.forward(q, k, v, None, None, 6.0, True, parameters), (out, lse)
        elif kernel.name == "attention_decode":
            found = LAUNCHES.decode(q[:, -3:], k, v, None, 6.0, True, parameters)
            expected = out[:, -3:], lse[..., -3:]
        elif kernel.name == "attention_query_gradient":
            into = torch.empty_like(out)
            found = LAUNCHES.query_gradient(q, k, v, out, dout, lse, None, None, None, into, None, parameters), into
            expected = delta, dq
        else:
            found = torch.empty_like(out), torch.empty_like(out)
            LAUNCHES.key_gradients(q, k, v, dout, lse, delta, None, None, *found, None, parameters)
            expected = dk, dv
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_gate_and_benchmark_call_it_as_the_model_does():
    """With the bound of normalised heads: without it another kernel would be validated and timed."""
    shape, meta = RunShape(2, 80, 256, 2, 1, 512, 2), torch.device("meta")
    operation = FILE.ATTENTION
    calls = [trial.inputs for trial in operation.trials(shape, meta, torch.bfloat16)]
    calls += [operation.benchmark.inputs(name, torch.bfloat16, meta) for name in operation.benchmark.shapes]
    for arguments in calls:
        with recorded_launches() as launches:
            operation.benchmark.call(fused, *arguments)
        assert launches and all(launch.constants["BOUNDED"] for launch in launches)


def test_offsets_are_int64():
    assert narrow_offsets(*(kernel.name for kernel in LAUNCHES.KERNELS)) == ""


GROWING_CACHE = """
import torch
from nanochat_kernels import configs, inspect
from nanochat_kernels.attention_launches import decode
from nanochat_kernels.triton_helpers import recorded_launches
cache = torch.empty(3, 8192, 2, 128, dtype=torch.bfloat16, device="meta")
with configs.tables_of("sm90"), recorded_launches() as launches:
    for keys in (1, 2, 16, 255, 256, 257, 1000, 4000, 4096, 4097):
        decode(cache[:, :1], cache[:, :keys], cache[:, :keys], None, 11.4, False)
print(len({inspect.specialize(launch, "sm90")[0].hash() for launch in launches}))
"""


def test_a_growing_cache_does_not_compile_again():
    """Both kernels once. Triton compiles for numbers that are 1, or multiples of 16, apart."""
    assert harness.without_interpreter(GROWING_CACHE).strip() == "2"


REPEATED_WORK = r"""
import re, sys, torch
from nanochat_kernels import configs, dispatch, inspect
names = ("attention_forward", "attention_query_gradient", "attention_key_gradients")
for kernel in dispatch.tunable_kernels():
    for key in kernel.keys if kernel.name in names else ():
        with configs.tables_of(ARCHITECTURE):
            launch = next(iter(inspect.record(kernel, key, torch.bfloat16).values()))[0]
        if launch.kernel.is_gluon():
            continue  # its layouts are its own
        code = inspect.compile_launch(launch, ARCHITECTURE).asm["ttgir"]
        layouts = re.findall(r"(#mma\d*) = .*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)", code)
        covered = {name: (int(a) * int(m), int(b) * int(n)) for name, a, b, m, n in layouts}
        dots = re.findall(r"(?:tt.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)xf32, (#mma\d*)>", code)
        assert len(dots) >= 3, code
        print({f"{kernel.name} {key}: {x}" for x in dots if covered[x[2]][0] > int(x[0]) or covered[x[2]][1] > int(x[1])} or "")
"""


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_no_product_is_computed_twice(architecture):
    """Triton lets two groups of warps compute the same tile if it has fewer rows than they could take."""
    assert not harness.without_interpreter(REPEATED_WORK.replace("ARCHITECTURE", repr(architecture))).strip()


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 60 GB of GPU memory")
def test_more_than_2_to_31_elements():
    """The last row of a batch whose q, k and v have more together, and gradients of as many."""
    q, k, v = (x.requires_grad_() for x in inputs(70, 2048, 2048, 128, 1, 128, torch.bfloat16))
    out = fused(q, k, v, bound=math.sqrt(128))
    last = [x.detach()[-1:].requires_grad_() for x in (q, k, v)]
    alone = fused(*last, bound=math.sqrt(128))
    assert torch.equal(out[-1:], alone)
    dout = out.detach() * 0.5 + 1
    found = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip(found, torch.autograd.grad(alone, last, dout[-1:]), strict=True):
        assert torch.equal(a[-1:], b)


@pytest.mark.parametrize("tokens", [2, 40])
def test_compiled(tokens):
    given_ = inputs(1, tokens, tokens, 1, 2, 32, torch.bfloat16)
    check_compiled(lambda *x: fused(*x, bound=math.sqrt(32)), given_, [0, 1, 2], is_opaque=True)


def test_what_torch_compile_is_told():
    q, k, v = inputs(2, 40, 40, 1, 2, 32, torch.bfloat16)
    operations = torch.ops.nanochat_kernels
    out, lse = harness.check_opaque(operations.attention_forward, q, k, v, None, None, 6.0, True)
    harness.check_opaque(operations.attention_forward, q, k, v, None, None, 6.0, False)
    harness.check_opaque(operations.attention_backward, q, k, v, out, out, lse, None, None, None, None)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(
        lambda *x: fused(*x, bound=math.sqrt(128)), inputs(2, 300, 300, 2, 1, 128, torch.bfloat16), [0, 1, 2]
    )


def test_on_another_device():
    harness.check_other_device(fused, inputs(1, 40, 40, 1, 2, 32, torch.bfloat16), [0, 1, 2])


@pytest.mark.skipif(not GPU, reason="torch's backends need a GPU")
@pytest.mark.parametrize("impl", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("are_views", [False, True])
def test_backends_of_torch(impl, are_views):
    """Also with views whose rows begin anywhere, which torch's backends would read at addresses that the GPU refuses."""
    given_ = inputs(2, 256, 256, 2, 1 if impl == "efficient" else 2, 64, torch.bfloat16)
    if are_views:
        given_ = [harness.in_layout(x, "strided", number) for number, x in enumerate(given_)]
    found, expected = (
        harness.evaluate(lambda *x, impl=impl: kernels.attention(*x, impl=impl), given_, [given_[0]], [0, 1, 2])
        for impl in (impl, "triton")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_what_is_copied_for_the_backends_of_torch():
    wide = torch.zeros(2, 3, 4, 40, dtype=torch.bfloat16)
    assert all(FILE.aligned(x) is x for x in (wide, wide[:, 1:], wide[..., 8:32], wide.transpose(0, 1)))
    for x in (
        wide[..., 3:35],
        wide[..., :38].clone()[..., :32],
        wide[..., ::2],
        wide.flatten()[1:-39].view(-1, 1, 1, 40),
    ):
        copy = FILE.aligned(x)
        assert copy is not x and copy.is_contiguous() and torch.equal(copy, x)


def test_what_backends_of_torch_do_not_support():
    """An explicit request says what is unsupported, before torch finds no kernel. On a CPU the reasons see stand-ins of tensors."""

    def reason(impl, q, k, *more):
        q, k = (
            SimpleNamespace(
                device=torch.device("cuda"), dtype=torch.bfloat16, size=shape.__getitem__,
                numel=lambda shape=shape: math.prod(shape),
            )
            for shape in (q, k)
        )  # fmt: skip
        return FILE.ATTENTION.implementations[impl].unsupported_reason(q, k, k, *more)

    plain_, grouped = (2, 8, 4, 64), (2, 8, 2, 64)
    for impl in FILE.BACKENDS:
        assert reason(impl, plain_, plain_, None, None) is None
        assert "first query" in reason(impl, (2, 4, 4, 64), plain_, None, None)
        assert "no lengths" in reason(impl, plain_, plain_, None, object())
        found = reason(impl, plain_, grouped, None, None)
        assert "as many key heads" in found if impl == "efficient" else found is None
        assert "rows of 0 tokens" in reason(impl, (2, 0, 4, 64), (2, 0, 4, 64), None, None)
        assert "rows of 1 tokens" in reason(impl, (2, 1, 4, 64), (2, 1, 4, 64), None, None)
        for depth in range(1, 41):  # auto must not choose what torch then refuses
            config = GPTConfig.from_depth(depth, 65536)
            shape = (2, 8, config.n_head, config.head_width)
            assert (reason(impl, shape, shape, None, None) is None) == (config.head_width % 8 == 0), depth


def test_bad_input():
    q, k, v = inputs(2, 4, 6, 2, 1, 32, torch.bfloat16)
    integers = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def rejected(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.attention(*arguments, **more)

    rejected(TypeError, "k is torch.float16 but q is torch.bfloat16", q, k.half(), v)
    rejected(ValueError, r"q must have shape \(B, T, H, D\)", q[0], k, v)
    rejected(ValueError, "k must have shape", q, k[..., :16], v)
    rejected(ValueError, "v must have shape", q, k, v[:, :5])
    rejected(ValueError, "3 query heads are not a multiple of 2", q.repeat(1, 1, 2, 1)[:, :, :3], k, v)
    rejected(ValueError, "4 queries need at least as many keys, got 3", q, k[:, :3], v[:, :3])
    rejected(ValueError, r"lengths must have shape \(2\)", q, k, v, integers[:1])
    rejected(TypeError, "lengths must be int32 or int64", q, k, v, integers.float())
    rejected(ValueError, "lengths is on meta", q, k, v, integers.to("meta"))
    rejected(ValueError, "cu_seqlens must have shape", q, q, q, None, integers[None])
    rejected(TypeError, "cu_seqlens must be int32 or int64", q, q, q, None, integers.float())
    rejected(ValueError, "no lengths", q, q, q, integers, integers)
    rejected(ValueError, "as many keys as queries", q, k, v, None, integers)
    for bound in (torch.tensor(5.0), "high"):
        rejected(TypeError, "bound must be None or a number", q, k, v, bound=bound)
    for bound in (0.0, -1.0, math.nan):
        rejected(ValueError, "bound must be positive", q, k, v, bound=bound)
    wide = q.repeat(1, 1, 1, 8)
    rejected(kernels.KernelRequestError, "a head of 256 channels", wide, wide, wide, impl="triton")
    many = (x[:1, :1, :1].expand(2**20, 1, heads, 32) for x, heads in ((q, 2**12), (k, 1), (v, 1)))
    too_many = (
        "4096 heads and 1 keys may need 4294967296 programs, more than the 2147483647 of one launch; split the batch"
    )
    rejected(kernels.KernelRequestError, too_many, *many, impl="triton")
    rejected(kernels.KernelRequestError, "bfloat16 or float16", *(x.float() for x in (q, k, v)), impl="triton")
    if not GPU:
        rejected(kernels.KernelRequestError, "for CUDA tensors", q, k, v, impl="cudnn")
        assert same(kernels.attention(q, k, v), reference.attention(q, k, v))


# faults that a test must catch: see test_planted_faults.py
K, G, F, L = "attention_kernels", "attention_gradient_kernels", "attention", "attention_launches"
PLANTED_FAULTS = {
    "tokens behind the documents": ("attention", "F.pad(F.pad(cu_seqlens, (1, 0)), (0, 1), value=batch * tokens)",
     "cu_seqlens", "test_tokens_outside_of_the_documents_are_documents_too"),
    "a key after the query is seen": (K, "return before >= 0", "return before >= -1",
     "test_attention"),
    "the block on the diagonal is taken as seen whole": (K, "first_query + queries_before + 1, 0) // BLOCK_N",
     "first_query + queries_before + 1, 0) // BLOCK_N + 1", "test_attention"),
    "positions are those of full caches": (K, "queries_before = keys - tokens", "queries_before = all_keys - tokens",
     "test_lengths"),
    "lengths of the first row for all": (K, "lengths_ptr + tl.cast(batch, tl.int64) * lengths_stride", "lengths_ptr",
     "test_lengths"),
    "stride of the lengths ignored": (K, "tl.cast(batch, tl.int64) * lengths_stride", "batch", "test_strides"),
    "divided by the sum of what was not rounded": (K, "tl.sum(as_float, 1)", "tl.sum(p, 1)",
     "test_the_first_query_gets_exactly_its_value"),
    "lse of what was rounded": (K, "total += tl.sum(p, 1)", "total += tl.sum(as_float, 1)", "test_attention"),
    "what was summed before is not scaled": (K, "sums * factor[:, None], total * factor, rounded * factor, higher\n    p_rounded",
     "sums, total * factor, rounded * factor, higher\n    p_rounded", "test_attention"),
    "keys of the wrong head": (K, "rows_of(k_ptr, head // share, heads // share,", "rows_of(k_ptr, head, heads,", "test_attention"),
    "scores beyond the bound go unseen": (K, "factor = tl.where(fits | none, factor,", "factor = tl.where(fits | ~none, factor,",
     "test_scores_beyond_the_bound_are_right_or_nan"),
    "float16 without its own limit": (L, "2.0 ** (-half - shift - 1)", "2.0 ** -100",
     "test_scores_beyond_the_bound_are_right_or_nan"),
    "float16 without a shift": (L, "bounded = half - FLOAT16_TOP", "bounded = 0.0", "test_the_shift_of_float16"),
    "float16 with too few bits": (L, "FLOAT16_TOP, FLOAT16_RANGE = 15.0, 29.0", "FLOAT16_TOP, FLOAT16_RANGE = 15.0, 33.0",
     "test_queries_whose_scores_are_all_low"),
    "a part is added twice": (K, "tl.cdiv(keys, PART), PARTS)", "tl.cdiv(keys, PART), PARTS - 1)", "test_lengths"),
    "parts past the row's length are added": (K, "known = part < tl.cdiv(keys, PART)", "known = part < parts", "test_lengths"),
    "a document sees the one before": (K, "(position - first_key).to", "position.to", "test_documents"),
    "documents end at the end of the row": (G, "& (t[None, :] < end_query[:, None])", "& (t[None, :] < tokens)", "test_documents"),
    "documents begin in the row before": (F, ".maximum(row) - row", " - row", "test_documents"),
    "delta without the gradient of lse": (G, "delta -= tl.load(dlse_ptr", "delta -= 0 * tl.load(dlse_ptr", "test_attention"),
    "a gradient of out where there is none": (F, "torch.zeros_like(out) if dout is None", "torch.ones_like(out) if dout is None",
     "test_upstream_of_one_result_and_of_any_layout"),
    "expanded gradients read as if next to each other": (L, "as_read(dout)\n    batch, tokens, heads, width = q.shape\n    delta",
     "dout\n    batch, tokens, heads, width = q.shape\n    delta", "test_upstream_of_one_result_and_of_any_layout"),
    "scale of dq forgotten": (G, "dq_ptr, dq * ROOT", "dq_ptr, dq", "test_attention"),
    "gradients of one head in a group": (G, "for i in tl.range(0, share)", "for i in tl.range(0, 1)", "test_attention"),
    "strides of out for its gradient": (G, "rows_of(dout_ptr, head, heads, d_batch_stride, d_token_stride,",
     "rows_of(dout_ptr, head, heads, tl.cast(tokens, tl.int64) * heads * WIDTH, heads * WIDTH,", "test_attention"),
    "keys start one block of queries late": (G, "begin = tl.maximum(first_key - queries_before, 0)",
     "begin = tl.maximum(first_key - queries_before + BLOCK_M, 0)", "test_attention"),
    "a key of the diagonal for all queries": (G, "p = tl.where(seen, p, 0.0)", "p = tl.where(seen, p, p)", "test_attention"),
    "ds of a key that is not seen": (G, "ds = tl.where(seen, ds, 0.0)  # also", "ds = tl.where(seen, ds, ds)  # also",
     "test_a_gradient_of_lse_that_is_not_finite_reaches_only_keys_that_are_seen"),
    "offset of a token in int32": (K, "tl.cast(start, tl.int64) * token_stride", "start * token_stride", "test_offsets_are_int64"),
    "row of the result in int32": (K, "batch = tl.cast(head // heads, tl.int64)\n    row", "batch = head // heads\n    row",
     "test_offsets_are_int64"),
    "columns read as if next to each other": (L, "return x if x.stride(3) == 1 else x.contiguous()", "return x", "test_strides"),
}  # fmt: skip
