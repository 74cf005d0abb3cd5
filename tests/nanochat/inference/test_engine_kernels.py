"""The engine with the kernels that a GPU takes, which read pages where they lie; interpreted where there is no GPU."""

import pytest
import torch

from nanochat.gpt import GPTConfig
from nanochat.inference import engine as module
from nanochat.inference.cache import KVCache
from nanochat.inference.engine import Engine
from nanochat.options.model import Implementations
from nanochat_kernels import MOST_CANDIDATES, dispatch
from tests.nanochat.models import perturbed

PROMPTS = [[*range(40), 3], [5], [*range(40), 7, 8]]


@pytest.mark.parametrize("heads_first", [True, False])
def test_triton_reads_pages_where_they_lie(tokenizer, monkeypatch, heads_first):
    """In a CPU's order and in a GPU's; a row is what it is alone, and begins as with plain PyTorch's attention."""
    for name, value in (("PAGE", 16), ("STEP_ROWS", (4,)), ("CHUNKS_AT_ONCE", (2,))):
        monkeypatch.setattr(module, name, dict.fromkeys(("cpu", "cuda"), value))
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
