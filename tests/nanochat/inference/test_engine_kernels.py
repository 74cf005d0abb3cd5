"""The engine with the kernels that a GPU takes, which read pages where they lie; interpreted where there is no GPU."""

import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import engine as module
from nanochat.inference.cache import KVCache
from nanochat.inference.engine import Engine
from nanochat.optim import MuonAdamW
from nanochat.options.model import Implementations
from nanochat_kernels import MOST_CANDIDATES, dispatch
from tests.nanochat.models import perturbed

PROMPTS = [[*range(40), 3], [5], [*range(40), 7, 8]]


def smaller_passes(monkeypatch) -> None:
    """Passes and pages that are small enough for the interpreter."""
    for name, value in (("PAGE", 16), ("STEP_ROWS", (4,)), ("CHUNKS_AT_ONCE", (2,))):
        monkeypatch.setattr(module, name, dict.fromkeys(("cpu", "cuda"), value))


@pytest.mark.parametrize("heads_first", [True, False])
def test_triton_reads_pages_where_they_lie(tokenizer, monkeypatch, heads_first):
    """In a CPU's order and in a GPU's; a row is what it is alone, and begins as with plain PyTorch's attention."""
    smaller_passes(monkeypatch)
    monkeypatch.setattr(
        KVCache, "heads_first", property(lambda _: heads_first, lambda *_: None), raising=False
    )  # whatever the device
    found = {}
    for impl in ("triton", "reference"):
        model = perturbed(GPTConfig(1, 64, 2, 1, tokenizer.vocab_size, 64, impl=Implementations(attention=impl)))
        if torch.cuda.is_available():
            model = model.to("cuda")
        model.compute_dtype = torch.bfloat16
        model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
        engine, alone = Engine(model, tokenizer), Engine(model, tokenizer)
        rows = [engine.row(prompt, 4, 0.0, alternatives=1) for prompt in PROMPTS]
        engine.add(rows)
        single = alone.row(PROMPTS[2], 4, 0.0, alternatives=1)
        alone.add([single])
        while engine.busy or alone.busy:
            engine.step(), alone.step()
        assert rows[2].output == single.output and len(single.output) > 1
        found[impl] = [row.output[0] for row in rows]
    for by_kernel, plain in zip(found["triton"], found["reference"], strict=True):
        assert by_kernel.token == plain.token and by_kernel.logprob == pytest.approx(plain.logprob, abs=0.05)


PERIOD = 20  # tokens after which a text repeats: more than a page has


def repeating(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """Texts that repeat PERIOD random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, (rows, PERIOD), generator=generator).repeat(1, -(-tokens // PERIOD))[:, :tokens]


@pytest.fixture(scope="module")
def trained() -> GPT:
    """A model that has learnt to repeat, so that each token depends on one key in another page."""
    model = GPT.create(GPTConfig(1, 64, 2, 1, 64, 64))
    optimizer = MuonAdamW(model)
    for step in range(150):
        tokens = repeating(16, 49, step)
        targets = tokens[:, 1:].clone()
        targets[:, : PERIOD - 1] = -1  # nothing tells these
        model(tokens[:, :-1], targets).backward()
        optimizer.synchronize()
        optimizer.update(1.0, 0.9)
    return model


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("reference", torch.float32), ("reference", torch.bfloat16), ("triton", torch.bfloat16)],
    ids=str,
)
def test_greedy_answers_of_a_trained_model_are_the_references(trained, monkeypatch, attention, dtype):
    """Token for token those of the plain operations in float64 without a cache, for prompts of several pages.

    Only where two tokens are nearly equal may either come: within twice the budget of errors, which is 1.5 times that of the plain
    operations in the engine's dtype. There are few such places.
    """
    smaller_passes(monkeypatch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = Implementations(**{option.name: "reference" for option in fields(Implementations)})

    def model_of(dtype, impl):
        model = GPT.create(replace(trained.config, impl=impl), device, dtype)
        model.load_state_dict(trained.state_dict())
        return model

    engine = Engine(
        model_of(dtype, Implementations(attention=attention)), SimpleNamespace(special=lambda _: -1, bos=-1)
    )
    engine.cache.extend(24)
    random.Random(0).shuffle(engine.cache.pages.free)  # the pages of a row lie anywhere
    texts = [text[:tokens].tolist() for text, tokens in zip(repeating(3, 52, -1), (25, 33, 52), strict=True)]
    answers = engine.generate(texts, 12, temperature=0.0)
    judged = decided = right = 0
    for text, answer in zip(texts, answers, strict=True):
        tokens = torch.tensor([text + answer[:-1]], device=device)
        with torch.inference_mode():
            exact, baseline = (
                model.logits(model.hidden(tokens))[0, len(text) - 1 :].double()
                for model in (model_of(torch.float64, plain), model_of(dtype, plain))
            )
        near = 2 * 1.5 * (baseline - exact).abs().amax(1)
        best, second = exact.topk(2).values.unbind(1)
        for place, token in enumerate(answer):
            assert exact[place, token] >= best[place] - near[place], (len(text), place)
            judged, decided = judged + 1, decided + int(best[place] - second[place] > near[place])
            right += token == (text + answer)[len(text) + place - PERIOD]
    assert judged == 36 and decided >= 0.8 * judged and right >= 0.8 * judged, (judged, decided, right)


def test_a_row_with_more_candidates_than_a_kernel_takes_changes_no_other(tokenizer, monkeypatch):
    """Rows are drawn by one implementation alone and in company: by the kernels, or by the reference for a top-k above theirs."""
    drawn_by = []

    def as_on_a_gpu(operation, *arguments):
        if operation.name != "sample_tokens":
            return automatic(operation, *arguments)
        reason = operation.implementations["triton"].unsupported_reason(*arguments)
        drawn_by.append("reference" if reason else "triton")
        return drawn_by[-1], ""

    automatic = dispatch.automatic
    monkeypatch.setattr(dispatch, "automatic", as_on_a_gpu)
    model = perturbed(GPTConfig(1, 64, 2, 1, tokenizer.vocab_size, 64)).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    settings = [(5, 2), (MOST_CANDIDATES + 1, 2), (None, 0)]

    def generated(chosen: list) -> list:
        engine = Engine(model, tokenizer)
        rows = [engine.row([n + 1], 2, 0.9, k, alternatives=likely) for n, (k, likely) in chosen]
        engine.add(rows)
        while engine.busy:
            engine.step()
        return [list(row.output) for row in rows]

    together = generated(list(enumerate(settings)))
    assert set(drawn_by) == {"triton", "reference"}
    for n, setting in enumerate(settings):
        drawn_by.clear()
        assert generated([(n, setting)]) == [together[n]], setting
        assert set(drawn_by) == {"reference" if (setting[0] or 0) > MOST_CANDIDATES else "triton"}
