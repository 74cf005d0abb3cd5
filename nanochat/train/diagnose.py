"""Finds the tensor in which NaN or infinity first appears, when the loss or the gradient norm of a step is not finite."""

import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT, MLP, Attention


@torch.no_grad()
def offending_tensor(model: GPT, micro: list[Batch], device: torch.device) -> str:
    """The name of the first weight, activation or gradient that is not finite; runs the forward passes of the step again."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name}"
    not_finite: list[str] = []

    def check(name: str, tensors) -> None:
        tensors = [x for x in (tensors if isinstance(tensors, tuple) else (tensors,)) if isinstance(x, torch.Tensor)]
        if not not_finite and not all(torch.isfinite(x).all() for x in tensors):
            not_finite.append(name)

    hooks = []
    for name, module in model.named_modules():
        inputs, output = f"input of {name}", f"activation {activation_name(name, module)}"
        hooks.append(module.register_forward_pre_hook(lambda _, given, name=inputs: check(name, given)))
        hooks.append(module.register_forward_hook(lambda _, __, result, name=output: check(name, result)))
    try:
        for batch in micro:
            batch = batch.to(device)
            model(batch.inputs, batch.targets)
            if not_finite:
                return not_finite[0]
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return "not on this rank"


def activation_name(name: str, module: torch.nn.Module) -> str:
    """The name of a module's result; of a fused operation, whose inner results are not stored, with the operation's name."""
    if isinstance(module, GPT):
        return "head (inside linear_cross_entropy)"
    if isinstance(module, Attention):
        return f"{name} (inside self_attention or output_projection)"
    return f"{name} (inside relu2_mlp)" if isinstance(module, MLP) else name
