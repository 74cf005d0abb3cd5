"""The choice of a token: shares, top-k, ties, extreme temperatures, and random numbers that depend on the row alone."""

import pytest
import torch

import nanochat_kernels as kernels
from nanochat.inference.sampling import random_key


def drawn(logits: list[float], temperature: float, top_k: int, draws: int = 2000) -> list[int]:
    """Tokens drawn from the same logits, each step with numbers of its own."""
    keys = torch.tensor([random_key(0, 0, [1])]).repeat(draws, 1)
    numbers = torch.arange(draws)
    found, _ = kernels.sample_tokens(
        torch.tensor([logits]).repeat(draws, 1), keys, numbers, torch.full((draws,), top_k),
        torch.full((draws,), temperature), min(max(top_k, 1), len(logits)), top_k == 0,
    )  # fmt: skip
    return found[:, 0].tolist()


def test_top_k_and_temperature():
    logits = [0.0, 3.0, 2.0, 1.0]
    assert set(drawn(logits, 1.0, 2)) == {1, 2} and set(drawn(logits, 1.0, 1)) == {1}
    for top_k in (0, 4):
        shares = torch.tensor(drawn(logits, 0.5, top_k, 20_000)).bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, torch.softmax(torch.tensor(logits) / 0.5, 0), atol=0.01, rtol=0)


def test_of_equal_logits_the_smaller_token_comes_first():
    """However many candidates there are, because another row may need more."""
    logits = torch.tensor([[1.0, 2.0, -0.5, 2.0, 2.0, float("-inf")]])
    keys, zeros, ones = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    for candidates in (1, 2, 6):
        found, logprobs = kernels.sample_tokens(
            logits, keys, zeros, ones.long(), ones, candidates, alternatives=candidates
        )
        assert found[0].tolist() == [1, 1, 3, 4, 0, 2, 5][: 1 + candidates]
        torch.testing.assert_close(logprobs, logits.log_softmax(1).gather(1, found))


def test_a_key_is_of_seed_sample_and_all_tokens():
    given = [(1, 0, [1, 2]), (1, 0, [1, 3]), (1, 0, [2, 1]), (1, 0, [1]), (1, 0, [12]), (1, 1, [1, 2]), (2, 0, [1, 2])]
    assert len({random_key(*arguments) for arguments in given}) == len(given)
    assert random_key(1, 0, [1, 2]) == random_key(1, 0, [1, 2])


def test_random_numbers_of_rows_are_independent():
    """Of another seed, sample, prompt or step; over many of them each of four equal tokens is drawn as often."""
    keys = torch.tensor([random_key(seed, sample, [seed % 3]) for seed in range(-40, 40) for sample in range(25)])
    zeros = torch.zeros(2000, 4)
    found = [
        kernels.sample_tokens(
            zeros, keys, torch.full((2000,), step), torch.zeros(2000).long(), torch.ones(2000), 1, True
        )[0][:, 0]
        for step in range(2)
    ]
    for tokens in (*found, (found[0] - found[1]) % 4, (found[0] - found[0].roll(1)) % 4):
        counts = tokens.bincount(minlength=4)
        assert ((counts - 500).abs() < 80).all(), counts  # four standard deviations


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e-3, 1e38])
@pytest.mark.parametrize("top_k", [0, 2])
def test_extreme_temperatures(temperature, top_k):
    found = set(drawn([-80.0, 3.0, 2.0, 80.0], temperature, top_k, 50))
    assert found == {3} if temperature < 1 else len(found) == (top_k or 4)
