"""sample_tokens in Triton against the reference: the same tokens, and no bit that depends on other rows or on the launch."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from tests.kernels import harness
from tests.kernels.harness import DEVICE, GPU, poisoned, same

FILE = importlib.import_module("nanochat_kernels.sample_tokens")
INF, NAN = float("inf"), float("nan")


def sampled(*arguments, impl="triton"):
    with poisoned():
        return kernels.sample_tokens(*arguments, impl=impl)


def arguments(logits, top_k, temperature=0.8, candidates=None, any_all=None, seed=0):
    """Columns of one tensor, as in the engine, with all candidates as alternatives."""
    rows, generator = len(logits), torch.Generator().manual_seed(seed)
    columns = torch.randint(2**32, (rows, 5), generator=generator).to(DEVICE)
    columns[:, 3] = torch.as_tensor(top_k, device=DEVICE)
    temperatures = columns[:, 4, None].view(torch.float32)[:, 0]
    temperatures[:] = torch.as_tensor(temperature, device=DEVICE)
    candidates = candidates or max(1, int(columns[:, 3].max()))
    any_all = bool((columns[:, 3] == 0).any()) if any_all is None else any_all
    return (
        logits.to(DEVICE), columns[:, :2], columns[:, 2], columns[:, 3], temperatures, candidates, any_all, candidates
    )  # fmt: skip


def random_logits(kind, rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocabulary, generator=generator) * 4
    if kind == "ties":
        x = x.round().clamp(-1, 1) * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0)
    elif kind == "mostly -inf":
        x[torch.rand(x.shape, generator=generator) < 0.9] = -INF
        x[:, vocabulary // 2] = 1.0
    elif kind == "large":
        x *= 1e37
    return x


@harness.property_test
@example(rows=2, vocabulary=2100, kind="normal", candidates=8, any_all=True, temperature=1.0, seed=1)
@example(
    rows=1, vocabulary=300, kind="mostly -inf", candidates=3, any_all=True, temperature=1.0, seed=6
)  # a group of -inf
@example(rows=1, vocabulary=1030, kind="ties", candidates=3, any_all=True, temperature=1.0, seed=2)
@given(
    rows=st.integers(1, 4),
    vocabulary=st.sampled_from((1, 2, 31, 33, 97, 300, 513, *((5000, 65_535, 65_536) if GPU else ()))),
    kind=st.sampled_from(("normal", "ties", "mostly -inf", "large")),
    candidates=st.integers(1, 256 if GPU else 20),
    any_all=st.booleans(),
    temperature=st.sampled_from((1e-38, 0.01, 0.7, 1.0, 1e38)),
    seed=harness.seeds,
)
def test_sample_tokens(rows, vocabulary, kind, candidates, any_all, temperature, seed):
    candidates = min(candidates, vocabulary)
    logits = random_logits(kind, rows, vocabulary, seed)
    top_k = torch.randint(0 if any_all else 1, candidates + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    top_k[:1] *= not any_all
    given_ = arguments(logits, top_k, temperature, candidates, any_all, seed)
    tokens, logprobs = sampled(*given_)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert FILE.judge(given_, (tokens, logprobs)) is None


def test_ties_negative_zero_and_infinity_are_ranked_as_by_a_stable_sort():
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, INF, -INF, 3.0, 3.0, -2.0, -INF, INF, -0.0, 0.0]).repeat(3, 20)
    x[1] = -x[1].roll(5)
    x[2] = -0.0
    tokens, logprobs = sampled(*arguments(x, 1, candidates=200))
    assert torch.equal(tokens[:, 1:].cpu(), x.sort(dim=1, descending=True, stable=True).indices[:, :200])
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    assert same(logprobs[:2], sampled(*arguments(x, 1, candidates=200), impl="reference")[1][:2])
    torch.testing.assert_close(logprobs[2].cpu(), torch.full((201,), 260.0).log().neg())


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("candidates", [1, 3])
def test_nan_comes_first(impl, candidates):
    """Of any sign, so that it shows; the whole vocabulary is no exception."""
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    x[:, 50], x[:, 40], x[1, 40] = NAN, INF, NAN
    x[2, 50] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN whose sign is negative
    tokens, logprobs = sampled(*arguments(x, [candidates, 0, 0], candidates=candidates), impl=impl)
    assert tokens[:, 0].tolist() == [50, 40, 50] and logprobs.isnan().all()
    assert tokens[:, 1:3].tolist() == [[50, 40][:candidates], [40, 50][:candidates], [50, 40][:candidates]]


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rows_whose_largest_logit_is_infinite(impl):
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    x[:2, 45], x[:2, 60], x[2:] = INF, INF, -INF
    tokens, logprobs = sampled(*arguments(x, [2, 0, 2, 0], candidates=3), impl=impl)
    third = [int(row.nan_to_num(posinf=-9.0).argmax()) for row in x[:2]]
    assert tokens.tolist() == [[45, 45, 60, third[0]], [45, 45, 60, third[1]], [0, 0, 1, 2], [0, 0, 1, 2]]
    assert logprobs[2:].isnan().all() and logprobs[:2, :3].isnan().all() and (logprobs[:2, 3] == -INF).all()


@pytest.mark.parametrize("vocabulary", [100, 65_536] if GPU else [100])
def test_a_row_depends_on_nothing_else(vocabulary):
    """Bit for bit: alone or among 70, with more candidates than it needs, and beside rows that draw among all."""
    x = random_logits("normal", 70, vocabulary, 3) / 4
    top_k, temperatures = torch.arange(70) % 5, torch.linspace(0.5, 5.0, 70)
    together = sampled(*arguments(x, top_k, temperatures, candidates=16))
    for i in (0, 1, 2, 33, 44, 65, 69):
        logits, keys, steps, ks, temperature, *_ = arguments(x, top_k, temperatures)
        row = [part[i : i + 1] for part in (logits, keys, steps, ks, temperature)]
        least = max(1, i % 5)
        for candidates, any_all in ((least, i % 5 == 0), (16, True), (64, True)):
            alone = sampled(*row, candidates, any_all, least)
            assert all(same(a[0], b[i, : 1 + least]) for a, b in zip(alone, together, strict=True)), (i, candidates)


def test_launch_parameters_change_no_bit():
    given_ = arguments(random_logits("normal", 2, 700, 4), [0, 5])
    logits, keys, steps, top_k, temperature, candidates, _, alternatives = given_
    expected = sampled(*given_)
    for groups, warps in ((1, 1), (4, 2), (32, 8)):
        found = FILE.launch_groups(logits, keys, steps, temperature, True, {"GROUPS": groups, "num_warps": warps})
        found = FILE.launch_choice(
            logits, keys, steps, top_k, temperature, candidates, alternatives, *found, {"num_warps": warps}
        )
        assert all(map(same, found, expected))


def test_log_probabilities_have_float32s_precision():
    x = random_logits("normal", 1, 1000, 5)
    x[0, 17] = 60.0  # the other terms are tiny
    for logits in (x, torch.zeros(1, 1000), x - 1000.0):
        _, logprobs = sampled(*arguments(logits, 1, candidates=2))
        true = logits.double().log_softmax(1).sort(dim=1, descending=True, stable=True).values[:, [0, 0, 1]]
        torch.testing.assert_close(
            logprobs.cpu().double(), true, rtol=1e-6, atol=1e-6 + 1e-7 * float(logits.abs().max())
        )


def test_logits_that_are_views():
    wide = torch.randn(3, 200, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    for logits in (wide[:, 7:97], wide[:, ::2], wide.t()[:90].t()):
        given_ = arguments(wide[:, :2], 2)
        given_ = logits, *given_[1:]
        assert all(map(same, sampled(*given_), sampled(logits.contiguous(), *given_[1:])))


def test_no_rows():
    tokens, logprobs = sampled(*arguments(torch.zeros(0, 5), [], candidates=2, any_all=False))
    assert tokens.shape == logprobs.shape == (0, 3) and tokens.dtype == torch.int64


def test_the_judge_finds_what_is_wrong():
    given_ = arguments(random_logits("normal", 3, 50, 7), [1, 3, 0], candidates=4)
    tokens, logprobs = sampled(*given_)
    assert FILE.judge(given_, (tokens, logprobs)) is None
    swapped, other, outside = tokens.clone(), tokens.clone(), tokens.clone()
    swapped[1, 2:4] = tokens[1, 2:4].flip(0)
    other[2, 0] = (tokens[2, 0] + 1) % 50
    outside[0, 0] = tokens[0, 2]
    assert FILE.judge(given_, (swapped, logprobs)).startswith("ranked tokens of row 1")
    assert FILE.judge(given_, (other, logprobs)).startswith("chosen token of row 2")
    assert FILE.judge(given_, (outside, logprobs)).startswith("chosen token of row 0")
    assert FILE.judge(given_, (tokens, logprobs * 1.0001)).startswith("log-probabilities of row 0")


def test_wrong_arguments():
    logits, keys, steps, top_k, temperature, *counts = arguments(torch.zeros(3, 5), 2)
    for change, error, message in (
        ((logits.half(), keys, steps, top_k, temperature, *counts), TypeError, "logits must be torch.float32"),
        ((logits[0], keys, steps, top_k, temperature, *counts), ValueError, r"logits must have shape \(R, V\)"),
        ((logits, keys[:2], steps, top_k, temperature, *counts), ValueError, r"keys must have shape \(3, 2\)"),
        ((logits, keys.int(), steps, top_k, temperature, *counts), TypeError, "keys must be torch.int64"),
        ((logits, keys, steps.float(), top_k, temperature, *counts), TypeError, "steps must be int32 or int64"),
        ((logits, keys, steps, top_k[:1], temperature, *counts), ValueError, "top_k must have shape"),
        ((logits, keys, steps, top_k, temperature.double(), *counts), TypeError, "temperature must be torch.float32"),
        ((logits, keys, steps, top_k, temperature, 6, False, 0), ValueError, "candidates must be 1 to 5"),
        ((logits, keys, steps, top_k, temperature, 2, False, 3), ValueError, "alternatives must be 0 to 2"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            kernels.sample_tokens(*change)


def test_calls_that_the_kernels_do_not_take():
    given_ = arguments(torch.zeros(1, 300), 1, candidates=257)
    with pytest.raises(kernels.KernelRequestError, match="at most 256 candidates, got 257"):
        sampled(*given_)
    assert kernels.sample_tokens(*given_)[0].shape == (1, 258)
    given_ = arguments(torch.zeros(1, 2**17 + 1), 1)
    with pytest.raises(kernels.KernelRequestError, match="at most 131,072 tokens, got 131,073"):
        sampled(*given_)
    rows = (
        x[:1].expand(2**16, *x.shape[1:]) if isinstance(x, torch.Tensor) else x for x in arguments(torch.zeros(1, 8), 1)
    )
    with pytest.raises(kernels.KernelRequestError, match="65,536 rows exceed the 65,535 of one launch; split them"):
        sampled(*rows)
    with pytest.raises(kernels.KernelRequestError, match="no gradient"):
        sampled(given_[0].requires_grad_(), *given_[1:])


@pytest.mark.skipif(not GPU, reason="large vocabularies are slow in the interpreter")
@pytest.mark.parametrize(("rows", "vocabulary", "candidates"), [(70, 65_536, 64), (3, 131_072, 256), (2, 65_536, 1)])
def test_large_vocabularies(rows, vocabulary, candidates):
    for kind in ("normal", "ties"):
        given_ = arguments(
            random_logits(kind, rows, vocabulary, 8), torch.arange(rows) % (candidates + 1), 1.0, candidates
        )
        assert FILE.judge(given_, sampled(*given_)) is None


def test_offsets_have_64_bits():
    harness.assert_64_bit_offsets(*FILE.KERNELS)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    harness.check_graph_replay(sampled_on_gpu, list(arguments(random_logits("normal", 4, 3000, 9), [0, 1, 5, 8])), ())


def sampled_on_gpu(*arguments_):
    return kernels.sample_tokens(*arguments_, impl="triton")


def test_other_device():
    harness.check_other_device(sampled_on_gpu, list(arguments(random_logits("normal", 4, 3000, 9), [0, 1, 5, 8])))


PLANTED_FAULTS = {
    "NaN is ranked by its bits": (
        "sample_tokens", "tl.where(x == x, bits, 0x7FFFFFFF)", "bits", "test_nan_comes_first",
    ),
    "negative zero is below zero": (
        "sample_tokens", "(x + 0.0).to(", "x.to(", "test_ties_negative_zero_and_infinity_are_ranked_as_by_a_stable_sort",
    ),
    "all candidates are drawn": (
        "sample_tokens", "(rank < top_k) & (rank < candidates)", "(rank < candidates)",
        "test_ties_negative_zero_and_infinity_are_ranked_as_by_a_stable_sort",
    ),
    "parts are ranked by the least number": (
        "sample_tokens", "order = tl.max(tl.reshape", "order = tl.min(tl.reshape", "test_sample_tokens",
    ),
    "zeros behind the vocabulary are ranked": (
        "sample_tokens", "other=0.0), index < size)", "other=0.0), index >= 0)",
        "test_rows_whose_largest_logit_is_infinite",
    ),
    "scores of groups are not compared": (
        "sample_tokens", " + tl.div_rn(maxima - highest, temperature)", "", "test_sample_tokens",
    ),
    "sums of groups are not scaled": (
        "sample_tokens", "share(maxima, finite_or_0(highest)) * 2.0**15", "2.0**15",
        "test_log_probabilities_have_float32s_precision",
    ),
    "all rows have the sums of the first": (
        "sample_tokens", "tl.load(sums_ptr + row * groups + group", "tl.load(sums_ptr + group",
        "test_a_row_depends_on_nothing_else",
    ),
    "all rows have the step of the first": (
        "sample_tokens", "steps_ptr + row * steps_stride", "steps_ptr", "test_a_row_depends_on_nothing_else",
    ),
    "all rows have the temperature of the first": (
        "sample_tokens", "temperature_ptr + row * temperature_stride", "temperature_ptr",
        "test_a_row_depends_on_nothing_else",
    ),
}  # fmt: skip
