"""Rows that call the calculator: what it answers is forced, and the model reads it."""

import pytest

from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.engine import Engine
from tests.nanochat.inference.test_engine import finished, greedily_without_cache
from tests.nanochat.models import perturbed


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return perturbed(GPTConfig(2, 64, 4, 2, tokenizer.vocab_size, 64))


class Script(Engine):
    """An engine whose model says what a script says, to watch the tool."""

    def __init__(self, model, tokenizer, script: list[int]):
        super().__init__(model, tokenizer)
        self.script = iter(script)

    def _next(self, row, sampled):
        return super()._next(row, sampled if row.forced else next(self.script))


@pytest.mark.parametrize(("expression", "output"), [("12*3", "36"), ("'reed'.count('e')", "2"), ("import os", None)])
def test_the_tool_answers_and_its_tokens_are_forced(model, tokenizer, expression, output):
    special = tokenizer.special
    call = [special("python_start"), *tokenizer.encode(expression), special("python_end")]
    after = [*tokenizer.encode(" so"), special("assistant_end")]
    engine = Script(model, tokenizer, call + after)
    columns = list(engine.stream([[1]], 60, temperature=0.0))
    tokens = [t for (t,), _ in columns if t is not None]
    sampled = [s for (t,), (s,) in columns if t is not None]
    answer = [special("output_start"), *tokenizer.encode(output), special("output_end")] if output else []
    assert tokens == call + answer + after[:-1]
    assert sampled == [True] * len(call) + [False] * len(answer) + [True] * (len(after) - 1)


def test_a_forced_token_has_no_log_probability(model, tokenizer):
    special = tokenizer.special
    call = [special("python_start"), *tokenizer.encode("2+2"), special("python_end")]
    engine = Script(model, tokenizer, [*call, 7, special("assistant_end")])
    row = engine.row([1], 20, alternatives=1)
    finished(engine, [row])
    assert {token.sampled for token in row.output} == {True, False}
    assert all((token.logprob is None) != token.sampled for token in row.output)


def test_the_model_reads_what_the_tool_forced(model, tokenizer):
    """After a call the next token is what the model says given call and answer."""
    special = tokenizer.special
    call = [special("python_start"), *tokenizer.encode("2+2"), special("python_end")]

    class Then(Script):
        def _next(self, row, sampled):
            return Engine._next(self, row, sampled if row.forced else next(self.script, sampled))

    answer = [special("output_start"), *tokenizer.encode("4"), special("output_end")]
    tokens = Then(model, tokenizer, call).generate([[1]], len(call) + len(answer) + 1, temperature=0.0)[0]
    expected = greedily_without_cache(model, [1, *call, *answer], 1, set())
    assert tokens == [*call, *answer, *expected]


def test_rows_end_alone(model, tokenizer):
    end = tokenizer.special("assistant_end")
    engine = Script(model, tokenizer, [7, 7, 7, end, 7, 7, 7])  # the rows take turns
    assert engine.generate([[1], [2]], 5, temperature=0.0) == [[7, 7, 7, 7, 7], [7]]
