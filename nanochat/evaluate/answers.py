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

    rows: answers that are generated at the same time. sampling: temperature and top_k as in Engine.stream, with its errors. The
    answers depend on all arguments, and each call of the engine takes the next seed.
    """
    together, at_once = max(1, rows // samples), min(rows, samples)
    for first in range(0, len(prompts), together):
        part = prompts[first : first + together]
        found: list[list[Answer]] = [[] for _ in part]
        for done in range(0, samples, at_once):
            count = min(at_once, samples - done)
            made = [[Answer() for _ in range(count)] for _ in part]
            flat = [answer for answers in made for answer in answers]
            for tokens, sampled in engine.stream(part, max_tokens, samples=count, seed=seed, **sampling):
                for answer, token, chosen in zip(flat, tokens, sampled, strict=True):
                    if token is not None:
                        answer.tokens.append(token)
                        answer.sampled.append(chosen)
            seed += 1
            for answers, more in zip(found, made, strict=True):
                answers += more
        yield from found


def pass_at(k: int, right: int, samples: int) -> float:
    """The chance that one or more of k answers are right, drawn from `samples` answers of which `right` are. Chen et al. 2021."""
    return 1 - comb(samples - right, k) / comb(samples, k)
