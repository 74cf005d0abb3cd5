"""Finds the tensor in which NaN or infinity first appears, when the loss or the gradient norm of a step is not finite."""

import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT


@torch.no_grad()
def offending_tensor(model: GPT, micro: list[Batch], device: torch.device) -> str:
    """The name of the first weight, activation or gradient that is not finite; runs the forward passes of the step again."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name}"
    not_finite: list[str] = []

    def checking(name: str):
        def hook(module, inputs, output) -> None:
            if not not_finite and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                not_finite.append(f"activation {name}")

        return hook

    hooks = [module.register_forward_hook(checking(name or "loss")) for name, module in model.named_modules()]
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
