"""The first tensor that is not finite is named, also where a fused operation does not store it."""

import pytest
import torch

import nanochat_kernels as kernels
from nanochat.data.batches import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.diagnose import offending_tensor
from tests.nanochat.models import perturbed

MICRO = [Batch(torch.arange(16).view(2, 8), torch.arange(1, 17).view(2, 8), (0,))]


def offending(model: GPT) -> str:
    return offending_tensor(model, MICRO, torch.device("cpu"))


@pytest.fixture
def model() -> GPT:
    return perturbed(GPTConfig.from_depth(2, 301, 16))


def test_a_weight(model):
    with torch.no_grad():
        model.blocks[1].mlp.project.weight[3, 5] = torch.nan
    assert offending(model) == "weight blocks.1.mlp.project.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.1.attention.key", "activation blocks.1.attention.key"),
        ("blocks.1.mlp.expand", "activation blocks.1.mlp (inside relu2_mlp)"),
        ("blocks.1.mlp.project", "activation blocks.1.mlp (inside relu2_mlp)"),
    ],
)
def test_an_activation_of_finite_weights(model, name, expected):
    """Products with weights so large overflow."""
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(weight.sign() * 3e38)
    assert offending(model) == expected


@pytest.mark.parametrize(("call", "expected"), [(2, "input of blocks.1.mlp"), (3, "activation blocks.1")])
def test_the_stream_between_modules(model, monkeypatch, call, expected):
    calls, add = iter(range(4)), kernels.add_rms_norm

    def add_rms_norm(x, update, impl):
        return add(x * torch.inf if next(calls) == call else x, update, impl=impl)

    monkeypatch.setattr(kernels, "add_rms_norm", add_rms_norm)
    assert offending(model) == expected


def test_the_loss(model, monkeypatch):
    monkeypatch.setattr(kernels, "linear_cross_entropy", lambda *_, **options: torch.tensor(torch.nan))
    assert offending(model) == "activation head (inside linear_cross_entropy)"


def test_a_gradient_or_nothing(model):
    assert offending(model) == "not on this rank"
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.blocks[0].attention.value.weight.grad[0, 0] = torch.inf
    assert offending(model) == "gradient of blocks.0.attention.value.weight"
