"""Time a training step of the cpu preset (forward, backward, synchronise, update) and its two halves."""

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.presets import PRESETS

PRESET = PRESETS["cpu"]["train base"]


@pytest.mark.parametrize("part", ["forward_backward", "optimizer", "step"])
def test_step(benchmark, part):
    vocabulary, length = PRESETS["cpu"]["tokenizer train"]["vocab_size"], PRESET["context_length"]
    model = GPT.create(GPTConfig.from_depth(PRESET["depth"], vocabulary, length))
    optimizer = MuonAdamW(model)
    tokens = torch.randint(
        vocabulary, (PRESET["device_batch_size"], length + 1), generator=torch.Generator().manual_seed(0)
    )
    gradients = {}

    def forward_backward() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = gradients[parameter]
        optimizer.synchronize()
        optimizer.update(0.01, 0.9)

    forward_backward()
    gradients = {parameter: torch.randn_like(parameter) for parameter in model.parameters()}
    parts = {"forward_backward": [forward_backward], "optimizer": [update], "step": [forward_backward, update]}[part]
    benchmark.pedantic(lambda: [run() for run in parts], rounds=15, warmup_rounds=2)
    benchmark.extra_info["tokens_per_second"] = tokens[:, 1:].numel() / benchmark.stats["median"]
