"""The first tensor that is not finite is named, also where a fused operation does not store it."""

import pytest
import torch

import nanochat_kernels as kernels
from nanochat.data.batches import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.diagnose import offending_tensor
from tests.nanochat.models import perturbed

INSIDE_ATTENTION = "(inside self_attention or output_projection)"
# long rows: in those of less than 16 tokens torch's attention gives 0 for scores that are all NaN, on a CPU with AVX-512
MICRO = [Batch(torch.arange(128).view(2, 64), torch.arange(1, 129).view(2, 64), (0,))]


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
        ("blocks.1.attention.key", f"activation blocks.1.attention {INSIDE_ATTENTION}"),
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


@pytest.mark.parametrize(
    ("operation", "call", "expected"),
    [
        ("rms_norm", 0, "input of blocks.0"),
        ("output_projection", 1, f"activation blocks.1.attention {INSIDE_ATTENTION}"),
        ("relu2_mlp", 1, "activation blocks.1.mlp (inside relu2_mlp)"),
    ],
)
def test_the_stream_between_modules(model, monkeypatch, operation, call, expected):
    calls, function = iter(range(4)), getattr(kernels, operation)

    def overflowing(*arguments, **options):
        result = function(*arguments, **options)
        if next(calls) != call:
            return result
        return (result[0] * torch.inf, *result[1:]) if isinstance(result, tuple) else result * torch.inf

    monkeypatch.setattr(kernels, operation, overflowing)
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
