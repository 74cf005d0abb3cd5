"""Small models for tests, a training of three steps, and GPUs that are not there."""

import pytest
import torch

from bench.memory import CARDS
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.options.train import OptimizerOptions
from nanochat.platform.distributed import Runtime
from nanochat_kernels import configs

SMALL = GPTConfig.from_depth(3, 301, 16)  # 301 rows do not divide by 2, nor do 3 matrices of one shape
MOMENTA = (0.85, 0.9, 0.95)


def rows_of(step: int) -> torch.Tensor:
    """The tokens of a step."""
    return torch.randint(301, (8, 17), generator=torch.Generator().manual_seed(step))


def train_three_steps(
    rank: int = 0,
    world_size: int = 1,
    config: OptimizerOptions | None = None,
    device: str = "cpu",
    gradients: list[dict] | None = None,
    backwards: bool = False,
) -> tuple[GPT, MuonAdamW, list[float]]:
    """Three steps, each rank on its share of the rows, whose gradients go into the list. backwards: the rows' order."""
    model = GPT.create(SMALL, device)
    optimizer, norms = MuonAdamW(model, config), []
    for step, momentum in enumerate(MOMENTA):
        rows = rows_of(step)[rank::world_size].to(device)
        rows = rows.flip(0) if backwards else rows
        model(rows[:, :-1], rows[:, 1:]).backward()
        if gradients is not None:
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        norms.append(optimizer.synchronize().item())
        optimizer.update(1.0 - step / 4, momentum)
    return model, optimizer, norms


def perturbed(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose zero matrices are not zero, so that every part counts."""
    model = GPT.create(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def on_card(monkeypatch: pytest.MonkeyPatch, card: str, world_size: int = 1) -> Runtime:
    """The runtime of a process that believes in a GPU; nothing may run on it."""
    architecture, gib = CARDS[card]
    monkeypatch.setattr(Runtime, "memory", int(gib * 2**30))
    monkeypatch.setattr(Runtime, "device_name", card)
    monkeypatch.setattr(Runtime, "gather", lambda runtime, value: [value] * runtime.world_size)
    monkeypatch.setattr(configs, "architecture", lambda index: architecture)
    return Runtime(0, world_size, torch.device("cuda", 0), torch.bfloat16)
