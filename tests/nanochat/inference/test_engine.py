"""Decoding with a cache equals decoding without one; unequal prompts; samples; the calculator."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import sample
from nanochat.options.model import Implementations
from nanochat.platform.errors import UserError
from tests.nanochat.models import perturbed


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return perturbed(GPTConfig(2, 64, 4, 2, tokenizer.vocab_size, 64))


@pytest.fixture(scope="module")
def engine(model, tokenizer) -> Engine:
    return Engine(model, tokenizer)


def greedily_without_cache(model: GPT, prompt: list[int], count: int, stops: set[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token in stops:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@settings(max_examples=15)
@given(prompts=st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=30), min_size=1, max_size=4))
def test_greedy_with_the_cache_equals_greedy_without(model, tokenizer, prompts):
    engine = Engine(model, tokenizer)
    engine._next = lambda row, token: _plain(engine, row, token)  # the tool forces tokens; here the model alone decides
    answers = engine.generate(prompts, 12, temperature=0.0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == greedily_without_cache(model, prompt, 12, engine.stops)


def _plain(engine, row, token):
    row.done = row.done or token in engine.stops
    return token, False


def test_samples_share_a_prefill_and_differ(engine):
    rows = engine.generate([[1, 2, 3], [4, 5]], 8, samples=3, temperature=1.0, seed=1)
    assert len(rows) == 6
    assert len({row[0] for row in rows[:3]}) > 1  # the first token is drawn for each row
    assert rows == engine.generate([[1, 2, 3], [4, 5]], 8, samples=3, temperature=1.0, seed=1)
    same = engine.generate([[1, 2, 3]], 8, samples=2, temperature=0.0)
    assert same[0] == same[1] == engine.generate([[1, 2, 3]], 8, temperature=0.0)[0]


def test_a_decoder_that_is_kept_for_later_calls_changes_nothing(model, tokenizer):
    """On a CPU its step is not replayed from a graph; its cache returns all positions, and is used again."""
    kept, plain = (Engine(model, tokenizer, replay) for replay in (True, False))
    calls = (
        ([[1, 2, 3], [4]], {"samples": 3, "temperature": 0.8, "seed": 5}),
        ([[7, 8]], {"samples": 6, "temperature": 0.8, "seed": 6}),
        ([[7, 8], [9] * 300], {"temperature": 0.0}),
        ([[2], [3]], {"temperature": 0.0}),
        ([[2] * 290, [3]], {"temperature": 0.0}),
        # as many rows and positions as the call before, but other sampling
        ([[2] * 290, [3]], {"temperature": 0.8, "seed": 7}),
        ([[2] * 290, [3]], {"temperature": 1.5, "seed": 7}),
        ([[2] * 290, [3]], {"temperature": 1.5, "seed": 7, "top_k": 3}),
    )
    decoders = []
    for prompts, options in calls:
        assert kept.generate(prompts, 9, **options) == plain.generate(prompts, 9, **options)
        decoders.append(*kept.kept.values())
    assert decoders[0] is decoders[1] and decoders[2] is not decoders[3] and not plain.kept


def test_a_decoder_that_is_not_kept_is_freed_at_once(model, tokenizer):
    engine = Engine(model, tokenizer, replay=True)
    gc.disable()
    try:
        engine.generate([[1, 2]], 3, temperature=0.0)
        dropped = weakref.ref(*engine.kept.values())
        engine.generate([[1], [2]], 3, temperature=0.0)
        assert dropped() is None
    finally:
        gc.enable()


def test_generations_at_the_same_time_do_not_disturb_each_other(model, tokenizer):
    engine = Engine(model, tokenizer, replay=True)
    alone = [engine.generate([prompt], 9, temperature=0.0) for prompt in ([1, 2], [3])]
    first = engine.stream([[1, 2]], 9, temperature=0.0)
    started = [next(first)[0][0], next(first)[0][0]]
    second = engine.generate([[3]], 9, temperature=0.0)
    rest = [token for (token,), _ in first]
    assert second == alone[1] and [t for t in started + rest if t is not None] == alone[0][0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replayed_step_decodes_the_same(tokenizer):
    """With the implementation whose results do not depend on the capacity of the cache, which replay rounds up."""
    config = GPTConfig(2, 256, 2, 1, tokenizer.vocab_size, 512, impl=Implementations(attention="triton"))
    model = perturbed(config).to("cuda")
    model.compute_dtype = torch.bfloat16
    model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    model.keep_copies()
    replayed, plain = (Engine(model, tokenizer, replay) for replay in (True, False))
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 20, "seed": 3, "samples": 2}) * 2:
        prompts = [[1, 2, 3, 4], [5], list(range(40))]
        assert replayed.generate(prompts, 60, **options) == plain.generate(prompts, 60, **options)


def test_a_long_prompt_takes_no_room_from_others(engine):
    """With 640 positions, a prompt of 630 tokens leaves room for 10, and the others get all of theirs."""
    engine = Engine(engine.model, engine.tokenizer)
    engine.stops = set()
    engine._next = lambda row, token: _plain(engine, row, token)
    long, short = [3] * 630, [[1, 2, 3], [4, 5]]
    alone = [engine.generate([prompt], 40, temperature=0.0)[0] for prompt in [short[0], long, short[1]]]
    together = engine.generate([short[0], long, short[1]], 40, temperature=0.0, samples=2)
    assert [len(row) for row in alone] == [40, 10, 40]
    assert together == [row for row in alone for _ in range(2)]


def test_seed_k_and_minus_k_differ(engine):
    drawn = {seed: engine.generate([[1, 2]], 12, temperature=1.0, seed=seed)[0] for seed in (3, -3, 0, 1, -1)}
    assert len({tuple(row) for row in drawn.values()}) == 5


def test_top_k_and_temperature():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, 1.0, 2, generator).tolist()) == {1, 2}
    assert set(sample(logits, 0.0, None, generator).tolist()) == {1}
    shares = sample(logits, 0.5, None, generator).bincount(minlength=4) / 2000
    torch.testing.assert_close(shares, torch.softmax(logits[0] / 0.5, 0), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-3, 1e38])
@pytest.mark.parametrize("top_k", [None, 2])
def test_extreme_temperatures(temperature, top_k):
    logits = torch.tensor([[-80.0, 3.0, 2.0, 80.0]]).repeat(50, 1)
    found = set(sample(logits, temperature, top_k, torch.Generator().manual_seed(0)).tolist())
    assert found == {3} if temperature < 1 else len(found) == (top_k or 4)


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
    engine = Script(model, tokenizer, [7, 7, 7, end, 7, 9, 7, 9, 7, 9])  # a column's rows take turns; a done row too
    assert engine.generate([[1], [2]], 5, temperature=0.0) == [[7, 7, 7, 7, 7], [7]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[]]}, "at least one token"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"prompts": [[1] * 640]}, "leaves none of the model's 640 positions"),
    ],
)
def test_bad_requests(engine, arguments, message):
    given = {"prompts": [[1]], "max_tokens": 4} | arguments
    with pytest.raises(UserError, match=message):
        engine.generate(given.pop("prompts"), given.pop("max_tokens"), **given)
