"""Decoding with a cache equals decoding without one; rows that share steps and pages are what they are alone; the calculator."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.decoder import Decoder, same_results
from nanochat.inference.engine import Engine
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
    assert rows[:3] == engine.generate([[1, 2, 3]], 8, samples=3, temperature=1.0, seed=1)
    twice = engine.generate([[1, 2, 3], [1, 2, 3]], 8, samples=3, temperature=1.0, seed=1)
    assert twice == engine.generate([[1, 2, 3]], 8, samples=6, temperature=1.0, seed=1)
    parts = [
        engine.generate([[1, 2, 3]], 8, samples=3, temperature=1.0, seed=1, numbers=[number]) for number in (0, 7, 1)
    ]
    assert parts[0] + parts[2] == twice and parts[1] not in (parts[0], parts[2])
    same = engine.generate([[1, 2, 3]], 8, samples=2, temperature=0.0)
    assert same[0] == same[1] == engine.generate([[1, 2, 3]], 8, temperature=0.0)[0]


def everything(row) -> tuple:
    """What a row has generated, with its log-probabilities."""
    return row.finish, [(t.token, t.sampled, t.logprob, t.likely) for t in row.output]


def finished(engine: Engine, rows: list, joining: int = 10**6) -> list[tuple]:
    """Run the engine until the rows have ended; `joining` of them join at a time, every third step."""
    left, steps = list(rows), 0
    while left or engine.busy:
        if steps % 3 == 0 and left:
            engine.add(left[:joining])
            left = left[joining:]
        engine.step()
        steps += 1
    return [everything(row) for row in rows]


SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 5, "seed": 3, "alternatives": 2},
    {"temperature": 1.2, "seed": -4},
    {"temperature": 1.0, "top_k": 300, "seed": 9},
    {"temperature": 0.7, "top_k": 50, "seed": 9, "sample": 2},
)


@pytest.fixture(scope="module")
def wide_model(tokenizer) -> GPT:
    """With widths for which a library takes other code for one row than for many; on a GPU, if there is one."""
    if not torch.cuda.is_available():
        return perturbed(GPTConfig(3, 192, 2, 2, tokenizer.vocab_size, 64))
    return on_gpu(GPTConfig(3, 256, 2, 2, tokenizer.vocab_size, 64))


def on_gpu(config: GPTConfig) -> GPT:
    model = perturbed(config).to("cuda")
    model.compute_dtype = torch.bfloat16
    model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    model.keep_copies()
    return model


@settings(max_examples=12)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 150), st.integers(1, 70), st.sampled_from(SAMPLINGS)),
        min_size=1, max_size=24,
    ),
    joining=st.integers(1, 24), most=st.sampled_from((1, 5, 64)), frozen=st.booleans(), replay=st.booleans(),
)  # fmt: skip
def test_a_row_is_what_it_is_alone(wide_model, tokenizer, requests, joining, most, frozen, replay):
    """Bit for bit: its tokens and log-probabilities, whoever shares its steps, its pages and the beginning of its prompt."""
    common = [5 + number % 90 for number in range(150)]
    prompts = [[*common[:shared], 7 + kind] for kind, shared, _, _ in requests]
    made = [(p, room, sampling) for p, (_, _, room, sampling) in zip(prompts, requests, strict=True)]
    alone = []
    for prompt, room, sampling in made[:6]:
        engine = Engine(wide_model, tokenizer, False)
        alone += finished(engine, [engine.row(prompt, room, **sampling)])
    engine = Engine(wide_model, tokenizer, replay, rows=most, frozen=frozen)
    together = finished(engine, [engine.row(prompt, room, **sampling) for prompt, room, sampling in made], joining)
    assert together[:6] == alone
    free = engine.cache.pages
    assert not free.users and engine.reserved == 0 and len(free.free) + len(free.idle) == free.count


def test_64_rows_are_what_they_are_alone(wide_model, tokenizer):
    """With passes of 64 rows where the products of this device allow it."""
    engine = Engine(wide_model, tokenizer)
    rows = [engine.row([3 + n % 7] * (1 + n), 20, 0.9, 40, seed=n) for n in range(64)]
    together = finished(engine, rows)
    for n in (0, 17, 40, 63):
        engine = Engine(wide_model, tokenizer)
        assert finished(engine, [engine.row([3 + n % 7] * (1 + n), 20, 0.9, 40, seed=n)]) == [together[n]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels of the package compute the products")
def test_a_library_with_other_products_for_many_rows_is_noticed(wide_model, tokenizer, monkeypatch):
    assert same_results(wide_model, 16, 16, 1, 64)
    assert Engine(wide_model, tokenizer).decoder.size_for(9, "rows") == 16
    plain = torch.nn.functional.linear

    def by_halves(x, weight):
        half = x.size(-1) // 2
        if x.size(0) < 64:
            return plain(x, weight)
        return plain(x[..., :half], weight[:, :half]) + plain(x[..., half:], weight[:, half:])

    monkeypatch.setattr("torch.nn.functional.linear", by_halves)
    assert not same_results(wide_model, 16, 64, 1, 64)
    assert Engine(wide_model, tokenizer).decoder.size_for(60, "rows") == 16


def test_log_probabilities_are_those_of_the_model(model, tokenizer):
    engine = Engine(model, tokenizer)
    row = engine.row([1, 2, 3], 12, 0.8, 30, seed=5, alternatives=4)
    finished(engine, [row])
    tokens = [1, 2, 3, *(t.token for t in row.output)]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([tokens]))[0], -1)
    for at, found in enumerate(row.output):
        if found.sampled:
            assert found.logprob == pytest.approx(float(expected[at + 2, found.token]), abs=1e-4)
            best = expected[at + 2].topk(4)
            assert [token for token, _ in found.likely] == best.indices.tolist()
            assert [x for _, x in found.likely] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_beginning_of_prompts_is_computed_once(model, tokenizer, monkeypatch):
    """While a row has it, and for frozen weights also later; a shared page is one page."""
    common = [9] * 200  # three pages of 64 tokens, and 8 tokens
    computed, prefill = [], Decoder.prefill
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, chunks: (computed.extend(len(c[0]) for c in chunks), prefill(self, chunks))
    )
    for frozen in (False, True):
        engine = Engine(model, tokenizer, frozen=frozen)
        computed.clear()
        rows = [engine.row([*common, 10 + n], 3) for n in range(3)]
        engine.add(rows)
        for _ in range(2):
            engine.step()
        assert computed == [64, 64, 64, 8]
        pages = [row.pages for row in rows]
        assert pages[0][:3] == pages[1][:3] == pages[2][:3] and len({p[3] for p in pages}) == 3
        finished(engine, [])
        engine.generate([[*common[:130], 4]], 2)
        assert computed[4:] == ([2] if frozen else [64, 64, 2])


def test_a_long_prompt_does_not_stop_the_others(model, tokenizer):
    """Its chunks are computed between the steps of rows that are decoded."""
    engine = Engine(model, tokenizer)
    short, long = engine.row([1, 2], 30), engine.row([3] * 600, 4)
    engine.stops = set()
    engine.add([short])
    engine.step()
    engine.add([long])
    engine.step()
    assert len(short.output) == 2 and 0 < long.length < 599
    engine.step()
    assert len(short.output) == 3


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_rows_wait_for_memory_and_leave_it(model, tokenizer, monkeypatch, error):
    """Where the device has no more memory, rows take turns; a row that is too large alone is an error."""
    engine = Engine(model, tokenizer)
    plain = engine.cache.extend

    tried = []

    def extend(count):
        tried.append(count)
        if engine.cache.pages.count + count > 20:
            raise error
        plain(count)

    monkeypatch.setattr(engine.cache, "extend", extend)
    rows = [engine.row([n + 1] * 200, 100) for n in range(9)]  # of five pages each
    engine.add(rows)
    engine.step()
    assert len(engine.filling) + len(engine.running) == 4 and engine.waiting
    # first as many as are worth a copy of the cache, then those that are missing alone, and no more before a row has ended
    assert tried == [16, 16, 4, 16, 5]
    engine.step()
    assert len(tried) == 5
    engine.remove(rows[0]), engine.remove(rows[8])
    results = finished(engine, [])
    assert (
        results == [] and all(row.done for row in rows) and [row.finish for row in (rows[0], rows[8])] == [None, None]
    )
    alone = Engine(model, tokenizer)
    assert everything(rows[4]) == finished(alone, [alone.row([5] * 200, 100)])[0]
    monkeypatch.setattr(engine.cache, "extend", lambda count: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    big = Engine(model, tokenizer)
    monkeypatch.setattr(big.cache, "extend", engine.cache.extend)
    with pytest.raises(torch.OutOfMemoryError):
        big.generate([[1]], 3)


def test_memory_is_asked_for_again_after_a_row_has_ended(model, tokenizer, monkeypatch):
    """For a row that needs more pages than there are, of a device that had no more beside the row that ended."""
    engine = Engine(model, tokenizer)
    engine.stops = set()
    plain, page = engine.cache.extend, engine.cache.page

    def extend(count):
        if engine.cache.pages.count + count > 4:
            raise torch.OutOfMemoryError("no more")
        plain(count)

    monkeypatch.setattr(engine.cache, "extend", extend)
    small, large = engine.row([1], 3), engine.row([2] * 3 * page, 3)
    engine.add([small, large])
    engine.step()
    assert engine.full and list(engine.waiting) == [large]
    for _ in range(20):
        engine.step()
    assert small.finish == large.finish == "length"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
@pytest.mark.parametrize("at", [1, 2, 3, 6])
@pytest.mark.parametrize("replay", [True, False])
def test_after_a_step_that_did_not_end_answers_are_right(model, tokenizer, monkeypatch, error, at, replay):
    """As after Ctrl-C in a chat: a page that has a name but was not computed, or results that nobody received."""
    engine, fresh = Engine(model, tokenizer, replay, frozen=True), Engine(model, tokenizer)
    engine.stops = fresh.stops = set()
    plain, calls = model.hidden, []

    def hidden(*arguments):
        calls.append(None)
        if len(calls) == at:
            raise error
        return plain(*arguments)

    prompts = [[9] * 150, [9] * 300, [5, 6]]
    wanted = fresh.generate(prompts, 8, temperature=0.0)
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(model, "hidden", hidden)
        engine.generate(prompts, 8, temperature=0.0)
    assert not engine.busy and engine.reserved == 0 and not engine.cache.pages.users
    assert engine.generate(prompts, 8, temperature=0.0) == wanted


def test_a_pass_that_is_kept_changes_nothing(model, tokenizer):
    """On a CPU a pass is not replayed from a graph, but it has the pages of a graph."""
    kept, plain = (Engine(model, tokenizer, replay) for replay in (True, False))
    for prompts, options in (
        ([[1, 2, 3], [4]], {"samples": 3, "temperature": 0.8, "seed": 5}),
        ([[7, 8], [9] * 300], {"temperature": 0.0}),
        ([[2] * 290, [3]], {"temperature": 1.5, "seed": 7, "top_k": 3}),
    ):
        assert kept.generate(prompts, 9, **options) == plain.generate(prompts, 9, **options)


def test_an_engine_that_is_dropped_is_freed_at_once(model, tokenizer):
    gc.disable()
    try:
        engine = Engine(model, tokenizer, replay=True)
        engine.generate([[1, 2]], 3, temperature=0.0)
        dropped = weakref.ref(engine.cache)
        del engine
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


def test_a_generation_that_nobody_reads_to_its_end_is_removed(model, tokenizer):
    engine = Engine(model, tokenizer)
    engine.stops = set()
    columns = engine.stream([[1, 2], [3] * 100], 50, samples=2)
    next(columns)
    columns.close()
    assert not engine.busy and not engine.cache.pages.users and engine.reserved == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replayed_step_decodes_the_same(tokenizer):
    """With the implementation whose results do not depend on the capacity of the cache, which replay rounds up."""
    model = on_gpu(GPTConfig(2, 256, 2, 1, tokenizer.vocab_size, 512, impl=Implementations(attention="triton")))
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


def test_equal_logits_are_drawn_with_other_numbers_at_each_step_and_for_each_prompt(tokenizer):
    engine = Engine(GPT.create(GPTConfig(1, 32, 1, 1, tokenizer.vocab_size, 64)), tokenizer)
    engine.stops = set()
    engine._next = lambda row, token: _plain(engine, row, token)
    one, other = (engine.generate([[n]], 12, temperature=1.0, seed=3)[0] for n in (1, 2))
    assert len(set(one)) > 6 and one != other


def test_seed_k_and_minus_k_differ(engine):
    drawn = {seed: engine.generate([[1, 2]], 12, temperature=1.0, seed=seed)[0] for seed in (3, -3, 0, 1, -1)}
    assert len({tuple(row) for row in drawn.values()}) == 5


def test_the_smallest_temperatures_take_the_most_likely_token(engine):
    greedy = engine.generate([[1, 2]], 12, temperature=0.0)
    assert engine.generate([[1, 2]], 12, temperature=1e-45, seed=3) == greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[]]}, "at least one token"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"samples": 0}, "samples"),
        ({"prompts": [[1] * 640]}, "leaves none of the model's 640 positions"),
    ],
)
def test_bad_requests(engine, arguments, message):
    given = {"prompts": [[1]], "max_tokens": 4} | arguments
    with pytest.raises(UserError, match=message):
        engine.generate(given.pop("prompts"), given.pop("max_tokens"), **given)
