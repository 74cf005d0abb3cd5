"""A replayed step begins before the host knows the tokens of the one before: the same tokens, few passes for nothing."""

import pytest
import torch

import nanochat_kernels as kernels
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.decoder import Decoder, Step
from nanochat.inference.engine import Engine
from nanochat.platform.cuda_graphs import Replayed
from tests.nanochat.inference.test_engine import everything, finished, greedily_without_cache
from tests.nanochat.models import perturbed


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return perturbed(GPTConfig(2, 64, 4, 2, tokenizer.vocab_size, 64))


@pytest.fixture
def order(monkeypatch) -> list[str]:
    """What happens: a pass begins ("begin" and its number of rows), or its results are waited for ("wait")."""
    found, begin, wait = [], Decoder.decode, Step.wait

    def decode(self, given, *arguments):
        found.append(f"begin {len(given)}")
        return begin(self, given, *arguments)

    monkeypatch.setattr(Decoder, "decode", decode)
    monkeypatch.setattr(Step, "wait", lambda self: found.append("wait") or wait(self))
    return found


@pytest.fixture
def one_memory(monkeypatch) -> None:
    """A pass overwrites the results of the one before, as CUDA graphs with one pool do."""
    before, decode = [], Decoder.decode

    class Shared(Replayed):
        def __call__(self):
            for x in before:
                x.fill_(7 if x.dtype == torch.int64 else torch.nan)
            before[:] = result = self.work() or ()
            return result

    def copied(*arguments):
        step = decode(*arguments)
        step.on_host = tuple(x.clone() for x in step.on_host)
        return step

    monkeypatch.setattr("nanochat.inference.decoder.Replayed", Shared)
    monkeypatch.setattr(Decoder, "decode", copied)


@pytest.mark.parametrize("leaves", [0, 1, 2, None])
def test_every_row_continues_its_own_tokens(model, tokenizer, one_memory, leaves):
    """Also when a row before it has left, and while the prompt of another is computed in several steps."""
    engine, alone = Engine(model, tokenizer, replay=True), Engine(model, tokenizer, replay=False)
    engine.stops = alone.stops = set()
    given = [([1, 2], 12), ([3], 14), ([4, 5, 6], 16), ([7] * 600, 5)]
    rows = [engine.row(prompt, room, 0.9, seed=n) for n, (prompt, room) in enumerate(given)]
    engine.add(rows[:3])
    for step in range(40):
        if step == 3 and leaves is not None:
            engine.remove(rows[leaves])
        if step == 5:
            engine.add(rows[3:])
        engine.step()
    for n, (prompt, room) in enumerate(given):
        if n != leaves:
            assert everything(rows[n]) == finished(alone, [alone.row(prompt, room, 0.9, seed=n)])[0], n


def test_the_next_step_begins_before_the_host_waits(model, tokenizer, order):
    """And none begins for nothing where it is known that the rows end."""
    engine = Engine(model, tokenizer, replay=True)
    engine.stops = set()
    engine.generate([[1, 2], [3]], 4)
    assert order == [*["begin 2", "begin 2", "wait"], *["begin 2", "wait"] * 2, "wait"]
    order.clear()
    plain = Engine(model, tokenizer, replay=False)
    plain.stops = set()
    plain.generate([[1, 2], [3]], 4)
    assert order == ["begin 2", "wait"] * 4


def test_all_passes_of_a_step_begin_before_the_host_waits(model, tokenizer, monkeypatch, order):
    monkeypatch.setitem(Engine.__init__.__globals__["STEP_ROWS"], "cpu", (4,))
    engine = Engine(model, tokenizer, replay=True)
    engine.stops = set()
    rows = [engine.row([1 + n], 2) for n in range(9)]
    together = finished(engine, rows)
    assert order == ["begin 4", "begin 4", "begin 1", "wait", "wait", "wait"] * 2
    assert together[8] == finished(engine, [engine.row([9], 2)])[0]


def test_a_row_that_joins_waits_for_the_step_that_has_begun(model, tokenizer, order):
    engine = Engine(model, tokenizer, replay=True)
    engine.stops = set()
    first, second = engine.row([1, 2], 6, seed=1), engine.row([3] * 70, 6, seed=2)
    engine.add([first])
    engine.step()
    engine.add([second])
    engine.step()
    assert [len(row.output) for row in (first, second)] == [2, 0]
    finished(engine, [])
    # second's prompt takes no step in which first is not decoded, and no pass is for nothing
    assert order.count("begin 1") + 2 * order.count("begin 2") == 12 and order.count("wait") == 8
    alone = Engine(model, tokenizer)
    alone.stops = set()
    assert [everything(row) for row in (first, second)] == [
        *finished(alone, [alone.row([1, 2], 6, seed=1)]),
        *finished(alone, [alone.row([3] * 70, 6, seed=2)]),
    ]


def test_pages_of_a_row_that_has_left_serve_another(model, tokenizer):
    """Though a step that has begun still writes to them."""
    engine, alone = Engine(model, tokenizer, replay=True, rows=2), Engine(model, tokenizer, replay=False)
    engine.stops = alone.stops = set()
    prompts = [[1, 2, 3], [4] * 62, [5] * 60, [6, 7]]
    rows = [engine.row(prompt, 12, 0.9, seed=n) for n, prompt in enumerate(prompts)]
    engine.add(rows)
    for _ in range(4):
        engine.step()
    engine.remove(rows[1])
    engine.step()
    engine.remove(rows[0])
    finished(engine, [])
    for n in (2, 3):
        assert everything(rows[n]) == finished(alone, [alone.row(prompts[n], 12, 0.9, seed=n)])[0]
    assert not engine.cache.pages.users and engine.reserved == 0


def test_nothing_runs_when_no_row_is_left(model, tokenizer, order):
    """The engine may be dropped then, or the weights may change."""
    engine = Engine(model, tokenizer, replay=True)
    left, row = engine.row([1], 9), engine.row([2], 9)
    engine.add([left])
    engine.step()
    assert order == ["begin 1", "begin 1", "wait"]
    engine.remove(left)
    assert order == ["begin 1", "begin 1", "wait", "wait"] and engine.ahead is None
    engine.add([row])
    order.clear()
    engine.step()
    assert len(row.output) == 1 and order == ["begin 1", "begin 1", "wait"]
    engine.add([left := engine.row([3], 9)])
    engine.step()
    engine.remove(row)
    order.clear()
    engine.step()
    assert len(left.output) == 1 and order == ["begin 1", "begin 1", "wait"], (
        "for row that has left nothing is waited for"
    )


@pytest.mark.parametrize("replay", [True, False])
def test_a_token_that_ends_the_answer(model, tokenizer, order, replay):
    """The step that has begun is for nothing, and no other."""
    engine = Engine(model, tokenizer, replay)
    engine.stops = set()
    tokens = engine.generate([[1, 2]], 20, temperature=0.9, seed=8)[0]
    at = next(n for n, token in enumerate(tokens) if n > 3 and token not in tokens[:n])
    engine.stops = {tokens[at]}
    order.clear()
    row = engine.row([1, 2], 20, 0.9, seed=8)
    finished(engine, [row])
    assert [t.token for t in row.output] == tokens[:at] and row.finish == "stop"
    assert order.count("begin 1") == at + 1 + replay


@pytest.mark.parametrize("replay", [True, False])
def test_tokens_of_the_calculator(model, tokenizer, monkeypatch, replay):
    """The device draws a call, of which the host knows only later; what it forces is read by the steps after it."""
    special = tokenizer.special
    call = [special("python_start"), *tokenizer.encode("2+2"), special("python_end")]
    answer = [special("output_start"), *tokenizer.encode("4"), special("output_end")]
    plain, script = kernels.sample_tokens, torch.tensor(call)

    def scripted(logits, keys, steps, *rest):
        tokens, logarithms = plain(logits, keys, steps, *rest)
        said = script[steps.clamp(max=len(call) - 1)]
        tokens[:, 0] = torch.where(steps < len(call), said, tokens[:, 0])
        return tokens, logarithms

    monkeypatch.setattr(kernels, "sample_tokens", scripted)
    engine = Engine(model, tokenizer, replay)
    engine.stops = set()
    found = engine.generate([[1], [9, 8]], len(call) + len(answer) + 5, temperature=0.0)
    for prompt, tokens in zip(([1], [9, 8]), found, strict=True):
        after = greedily_without_cache(model, [*prompt, *call, *answer], 5, set())
        assert tokens == [*call, *answer, *after]
