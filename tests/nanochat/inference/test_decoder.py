"""Passes: which sizes serve, how many pages a replayed one has, and that they keep no keys of their own."""

import gc
from dataclasses import replace

import pytest
import torch

import nanochat_kernels as kernels
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.decoder import PREPARED_MEMORY
from nanochat.inference.engine import CHUNKS_AT_ONCE, STEP_ROWS, Engine
from nanochat.options.model import Implementations
from nanochat.platform.cuda_graphs import WARM_UP
from tests.nanochat.models import perturbed


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return perturbed(GPTConfig(2, 64, 4, 2, tokenizer.vocab_size, 64))


def other_for_many(monkeypatch, many: int, place: str) -> None:
    """Let something be computed otherwise where a pass has as many rows or more."""
    name = "attention" if place == "cached values" else "softcapped_logits"
    plain = getattr(kernels, name)

    def attention(q, k, v, lengths, **options):
        if len(q) >= many:
            v = v.clone()
            v[options["pages"][lengths > v.size(1), 0].long()] *= 1.001
        return plain(q, k, v, lengths, **options)

    def head(x, *rest, **options):
        return plain(x, *rest, **options) * (1.001 if len(x) >= many else 1.0)

    monkeypatch.setattr(kernels, name, attention if place == "cached values" else head)


@pytest.mark.parametrize("place", ["cached values", "head"])
def test_a_difference_of_any_part_is_noticed(model, tokenizer, monkeypatch, place):
    other_for_many(monkeypatch, 64, place)
    assert Engine(model, tokenizer).decoder.size_for(60, "rows") == STEP_ROWS[model.device.type][0]


def test_sizes_of_chunks_are_compared(model, tokenizer, monkeypatch):
    first, *_, last = CHUNKS_AT_ONCE[model.device.type]
    other_for_many(monkeypatch, last, "cached values")
    decoder = Engine(model, tokenizer).decoder
    assert first < decoder.size_for(last, "chunks") < last


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("other")],
)  # fmt: skip
def test_a_size_that_there_is_no_memory_to_compare_does_not_serve(model, tokenizer, monkeypatch, error):
    """A step that needs another size for the first time goes on."""
    wanted = Engine(model, tokenizer).generate([[1], [2]] * 10, 3, temperature=0.0)
    monkeypatch.setattr("nanochat.inference.decoder.same_results", lambda *_: (_ for _ in ()).throw(error))
    engine = Engine(model, tokenizer)
    if "other" in str(error):
        with pytest.raises(RuntimeError, match="other"):
            engine.generate([[1], [2]] * 10, 3, temperature=0.0)
        return
    assert engine.generate([[1], [2]] * 10, 3, temperature=0.0) == wanted
    assert engine.decoder.size_for(60, "rows") == STEP_ROWS[model.device.type][0]


def test_a_replayed_pass_has_a_power_of_two_of_pages_and_no_more_than_the_model(model, tokenizer):
    decoder = Engine(model, tokenizer, replay=True).decoder
    decoder.most_pages = 10
    assert [decoder._width(pages) for pages in (0, 1, 2, 3, 5, 8, 9, 10)] == [1, 1, 2, 4, 8, 8, 10, 10]


def tensors() -> list[torch.Tensor]:
    return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]


def test_an_engine_has_no_keys_beside_its_cache(model, tokenizer):
    """However long one of the rows is: memory is what pages take."""
    before = tensors()  # Kept, so that no new tensor has the identity of one of them.
    engine = Engine(model, tokenizer, frozen=True)
    engine.stops = set()
    rows = [engine.row([n + 1] * 5, 8) for n in range(20)] + [engine.row([9] * 600, 8)]
    engine.add(rows)
    while not rows[-1].output:
        engine.step()
    assert engine.cache.pages.count <= 2 * (20 + 10)
    known = set(map(id, before))
    new = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors() if id(x) not in known}
    for x in model.state_dict().values():
        new.pop(x.untyped_storage().data_ptr(), None)
    cache = engine.cache.keys.nbytes + engine.cache.values.nbytes
    assert cache <= sum(new.values()) < 1.1 * cache


@pytest.mark.parametrize("memory", [0.0, 0.5, 1.0])
def test_what_is_prepared_serves_requests(model, tokenizer, monkeypatch, memory):
    """No request makes a pass or lets the cache grow, if there is memory for all rows; answers are those of another engine."""
    prompts = [[n + 1] * (n * 40 + 5) for n in range(12)]
    wanted = Engine(model, tokenizer).generate(prompts, 8, top_k=50)
    engine = Engine(model, tokenizer, replay=True, rows=8)
    engine.generate([[1, 2, 3]], 2)  # a pass that knows the cache as it was
    page, most = engine.cache_bytes(1, 1), 8 * engine.decoder.most_pages
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(memory * most * page / PREPARED_MEMORY) + 1, 0))
    before = engine.cache.pages.count
    engine.decoder.prepare(8, 50)
    assert engine.cache.pages.count == max(int(memory * most), before)
    captured = dict(engine.decoder.passes)
    called = {replayed.warmed_up for replayed, _ in captured.values()}  # without a GPU it is not captured
    assert (not memory or min(called) > WARM_UP > 0) and engine.decoder.serving
    assert engine.generate(prompts, 8, top_k=50) == wanted
    assert (engine.decoder.passes == captured) == (memory == 1.0)


def test_nothing_is_kept_without_graphs(model, tokenizer):
    engine, ran = Engine(model, tokenizer, replay=False), []
    run = engine.decoder._run
    engine.decoder._run = lambda key, *given: ran.append(key[0]) or run(key, *given)
    engine.decoder.prepare(8, 50)
    assert ran == ["prefill", "decode"] and not engine.decoder.passes and not engine.cache.pages.count


def test_an_implementation_that_cannot_run_here_is_told_before_the_first_request(model, tokenizer):
    """One named for a device that lacks it, which `nanochat web` reports at its start."""
    if model.device.type == "cuda":
        pytest.skip("the kernels run here")
    for block in model.blocks:
        block.attention.config = replace(model.config, impl=Implementations(attention="flash"))
    with pytest.raises(kernels.KernelRequestError, match="flash"):
        Engine(model, tokenizer, replay=False).decoder.prepare(8, 50)
