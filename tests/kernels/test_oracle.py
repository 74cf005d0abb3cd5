"""What judges everything else: an error that it must see, and one that it must allow."""

import pytest
import torch

from nanochat_kernels import oracle
from nanochat_kernels.oracle import over_budget

PLANTED_FAULTS = {
    "oracle ratio 3 in place of 1.5": ("oracle", "RATIO = 1.5", "RATIO = 3.0", "test_at_most_half_as_much_error_again"),
    "one group of all rows": ("oracle", "norms.log2().div(2).floor()", "norms.log2().div(2).floor() * 0",
     "test_small_rows_are_not_hidden_by_large_ones"),
    "groups of one element": ("oracle", "ENOUGH_ELEMENTS = 8, 64, 256", "ENOUGH_ELEMENTS = 1, 1, 1",
     "test_an_error_that_is_small_by_luck_sets_no_budget"),
    "worst element not judged": ("oracle", "largest(values.amax(1)))):", "largest(values.amax(1)) * 0)):",
     "test_one_wrong_element_of_many_is_seen"),
    "entries apart not judged": ("oracle", '((", entries apart", _rows(apart)), ', "(",
     "test_other_entries_are_not_hidden_by_targets"),
    "other entries not judged": ("oracle", ', (", other entries", ~_rows(apart)))', ",)",
     "test_other_entries_are_not_hidden_by_targets"),
    "NaN not looked for": ("oracle", '("NaN", torch.isnan), ', "", "test_what_is_not_finite_stands_where_it_should"),
    "infinities not looked for": ("oracle", '("inf", torch.isposinf), ("-inf", torch.isneginf)', "",
     "test_what_is_not_finite_stands_where_it_should"),
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_error(true: torch.Tensor, relative: float, seed: int = 1) -> torch.Tensor:
    """An error in proportion to each element, far above a rounding of float32."""
    return (true * (1 + relative * normal(*true.shape, seed=seed))).float()


def test_at_most_half_as_much_error_again():
    true = normal(64, 256)
    plain = with_error(true, 1e-3)
    assert over_budget(with_error(true, 1.3e-3, seed=2), true, plain) is None
    wrong = over_budget(with_error(true, 2e-3, seed=2), true, plain)
    assert wrong and "budget" in wrong


def test_small_rows_are_not_hidden_by_large_ones():
    true = normal(64, 256)
    true[32:] *= 1e-4
    found, plain = with_error(true, 1e-3, seed=2), with_error(true, 1e-3)
    assert over_budget(found, true, plain) is None
    found[32:] *= 1.24
    assert "rows of norm up to" in over_budget(found, true, plain)


def test_many_small_rows_are_not_hidden_by_one_large_row():
    true = normal(1001, 32)
    true /= true.norm(dim=1, keepdim=True)  # one group of small rows
    true[:1000] *= 1e-3
    true[1000] *= 1e3
    found, plain = with_error(true, 1e-3, seed=2), with_error(true, 1e-3)
    assert over_budget(found, true, plain) is None
    found[:1000] = 0.0
    assert "rows of norm up to" in over_budget(found, true, plain)


@pytest.mark.parametrize("width", [64, 1280])
def test_groups_of_more_rows(width):
    """Four rows whose error is larger by luck are judged with others, zeros alone, and what is wrong with many rows is noticed."""
    true = normal(400, width)
    true[:4] *= 1e-2
    true[4:8] = 0.0
    found, plain = with_error(true, 1e-3, seed=2), with_error(true, 1e-3)
    found[:4] += 2 * (found[:4] - true[:4])
    assert "rows of norm up to" in over_budget(found, true, plain)
    assert over_budget(found, true, plain, fewest_rows=64) is None
    found[5, 3] = 1e-6
    assert "rows of norm up to 0" in over_budget(found, true, plain, fewest_rows=64)
    # too few rows for a group besides the zeros
    assert "rows of norm up to 0" in over_budget(found[4:20], true[4:20], plain[4:20], fewest_rows=64)
    found = with_error(true, 2e-3, seed=2)
    assert "rows of norm up to" in over_budget(found, true, plain, fewest_rows=64)


def test_an_error_that_is_small_by_luck_sets_no_budget():
    """Two orders of the same float32 sums, in columns of which some nearly cancel."""
    for seed in range(200):
        terms = normal(28, 28, 1, seed=seed).float()
        one, other = (sum(x.unbind()) for x in (terms, terms.flip(0)))
        assert over_budget(one, terms.double().sum(0), other) is None


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_a_few_small_rows_are_judged_by_their_own_size(rows):
    true = normal(1024, 256)
    true[:rows] *= 1e-6
    found, plain = with_error(true, 5e-4, seed=2), with_error(true, 1e-3)
    assert over_budget(found, true, plain) is None
    found[:rows] = 0.0
    assert "rows of norm up to" in over_budget(found, true, plain)


def vocabulary(rows: int = 8, size: int = 65_536) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a cross entropy: about −1 at each target, about 1/size elsewhere."""
    true = (3 * normal(rows, size)).softmax(-1)
    target = torch.zeros(rows, size, dtype=torch.bool)
    target[torch.arange(rows), torch.arange(rows) * 11] = True
    return true - target.double(), target


def test_other_entries_are_not_hidden_by_targets():
    true, target = vocabulary()
    found, plain = with_error(true, 1e-3, seed=2), with_error(true, 1e-3)
    assert over_budget(found, true, plain, apart=target) is None
    others = torch.where(target, found, 1.24 * found)
    assert ", other entries" in over_budget(others, true, plain, apart=target)
    targets = torch.where(target, 1.01 * found, found)
    assert ", entries apart" in over_budget(targets, true, plain, apart=target)


def test_one_wrong_element_of_many_is_seen():
    true = normal(1024, 1024)
    plain = with_error(true, 1e-3)
    found = with_error(true, 1e-3, seed=2)
    assert over_budget(found, true, plain) is None
    found[500, 500] += 0.2
    assert "worst element" in over_budget(found, true, plain)


@pytest.mark.parametrize(
    ("found", "true"),
    [
        (float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0), (1.0, float("inf")),
        (float("-inf"), float("inf")), (float("nan"), float("inf")),
    ],
)  # fmt: skip
def test_what_is_not_finite_stands_where_it_should(found, true):
    a, b = normal(4, 8).float(), normal(4, 8)
    a[2, 3], b[2, 3] = found, true
    assert "in only one of result and oracle, the first at (2, 3)" in over_budget(a, b, b.float())
    a[2, 3] = true
    assert over_budget(a, b, b.float()) is None


def test_a_number_beyond_the_dtype_is_infinite_in_it():
    true = torch.full((2, 4), 1e5, dtype=torch.float64)
    assert over_budget(torch.full((2, 4), torch.inf, dtype=torch.float16), true, true.half()) is None


def test_a_stated_epsilon_is_allowed_and_no_more():
    true = normal(4, 64)
    plain = true.float()
    assert over_budget(plain + 0.9e-3, true, plain, epsilon=1e-3) is None
    assert over_budget(plain + 1.2e-3, true, plain, epsilon=1e-3)
    assert over_budget(plain * 1.0009, true, plain, epsilon=1e-3 * true.abs()) is None


def test_what_is_exactly_zero_stays_zero():
    """Such as the gradient of an ignored row, beside others."""
    true = normal(4, 64)
    true[2] = 0.0
    found = true.float()
    assert over_budget(found, true, true.float()) is None
    found[2, 5] = 1e-10
    assert "rows of norm up to 0" in over_budget(found, true, true.float())


def test_what_the_oracle_rounds_to_zero_may_be_tiny():
    """1 − tanh² is 0 in float64 where a kernel that does not subtract has 1e-26."""
    true = normal(4, 64)
    true[2] = 0.0
    found = true.float()
    found[2, 5] = 1e-26
    assert over_budget(found, true, true.float()) is None


def test_empty_and_scalar_results():
    assert over_budget(torch.empty(0, 3), torch.empty(0, 3).double(), torch.empty(0, 3)) is None
    one = torch.tensor(1.0)
    assert over_budget(one, one.double(), one) is None
    assert over_budget(one + 0.1, one.double(), one)


def test_one_forward_pass_serves_many_upstream_gradients():
    calls = []

    def double(x):
        calls.append(x)
        return 2 * x

    x = normal(3)
    found = oracle.evaluate_each(double, [x], [[torch.ones(3)], [3 * torch.ones(3)]], [0])
    assert len(calls) == 1 and [float(gradients[0]) for _, gradients in found] == [2.0, 6.0]
