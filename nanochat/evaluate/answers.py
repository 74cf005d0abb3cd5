"""Several answers to each of many prompts, a bounded number of them at a time; and the share of prompts that k answers solve."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import comb

from nanochat.inference.engine import Engine


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and for each whether the model chose it: the calculator's result is forced."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)


def sample_answers(
    engine: Engine, prompts: list[list[int]], samples: int, rows: int, max_tokens: int, seed: int, **sampling
) -> Iterator[list[Answer]]:
    """For each prompt, in order, `samples` answers of up to max_tokens tokens, without the token that ends them.

    rows: answers that are generated at the same time, which changes none of them. sampling: temperature and top_k as in Engine.row,
    with its errors; numbers as in Engine.stream.
    """
    found: list[list[Answer | None]] = [[None] * samples for _ in prompts]
    given = 0  # prompts whose answers have been given
    sampling |= {"samples": samples, "seed": seed}
    for number, tokens in engine.answers(prompts, max_tokens, rows, **sampling) if prompts else ():
        answer = Answer([token.token for token in tokens], [token.sampled for token in tokens])
        found[number // samples][number % samples] = answer
        while given < len(prompts) and None not in found[given]:
            yield found[given]
            given += 1


def pass_at(k: int, right: int, samples: int) -> float:
    """The chance that one or more of k answers are right, drawn from `samples` answers of which `right` are. Chen et al. 2021."""
    return 1 - comb(samples - right, k) / comb(samples, k)
