"""Finds where NaN or infinity first appears when a step went wrong."""

import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT


@torch.no_grad()
def offending_tensor(model: GPT, micro: list[Batch], device: torch.device) -> str:
    """The first weight, activation or gradient that is not finite, by its name in the model."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name}"
    found: list[str] = []

    def watch(name: str):
        def hook(module, inputs, output) -> None:
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(f"activation {name}")

        return hook

    hooks = [module.register_forward_hook(watch(name or "loss")) for name, module in model.named_modules()]
    try:
        for batch in micro:
            batch = batch.to(device)
            model(batch.inputs, batch.targets)
            if found:
                return found[0]
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return "not on this rank"
