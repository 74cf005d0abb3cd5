"""Which implementation serves a call.

A room lists the implementations of its operations, best first. "auto" takes what the launch table of this device names,
else the first that can serve the call. A named one is taken or refused, never replaced by another.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch

from kernels import configs

ROOMS = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "qk_norm_rope": "qk_norm_rope",
    "attention": "attention",
    "relu2_mlp": "relu2_mlp",
    "linear_cross_entropy": "linear_cross_entropy",
    "softcap_cross_entropy": "softcap_cross_entropy",
    "newton_schulz": "newton_schulz",
    "nesterov_momentum": "optimizer_step",
    "apply_update": "optimizer_step",
    "adamw": "optimizer_step",
}


class KernelRequestError(ValueError):
    """An implementation was asked for by name that does not exist or cannot serve the call."""


@dataclass(frozen=True)
class Implementation:
    """run takes the checked arguments of the operation; refusal, given the same, says why it cannot, or None."""

    run: Callable
    refusal: Callable[..., str | None] = lambda *arguments: None


Implementations = Mapping[str, Implementation]


def choose(operation: str, impl: str, implementations: Implementations, *arguments) -> Callable:
    """What `impl` names for a call with these arguments, the first a tensor. Raises KernelRequestError."""
    if impl == "auto":
        return implementations[automatic(operation, implementations, *arguments)[0]].run
    if impl not in implementations:
        raise KernelRequestError(
            f"{operation}: impl={impl!r} does not exist; choose one of auto, {', '.join(implementations)}"
        )
    refusal = implementations[impl].refusal(*arguments)
    if refusal:
        raise KernelRequestError(f"{operation}: impl={impl!r} cannot serve this call: {refusal}")
    return implementations[impl].run


def automatic(operation: str, implementations: Implementations, *arguments) -> tuple[str, str]:
    """The name of what "auto" takes, and why."""
    if arguments[0].device.type != "cuda":
        return "reference", "fused kernels are for CUDA"
    named, why = preferred(operation, arguments[0].device.index)
    order = [named] if named else list(implementations)
    for name in order:
        refusal = implementations[name].refusal(*arguments)
        if refusal is None:
            return name, why
        why = refusal
    return "reference", why


@torch.compiler.assume_constant_result
def preferred(operation: str, device_index: int | None) -> tuple[str | None, str]:
    """What the gate or else the launch table of the device names for the operation (None: nothing), and its reason."""
    if operation in configs.choices:
        return configs.choices[operation]
    table = configs.table(configs.architecture(device_index))
    choice = table["auto"].get(operation)
    return (choice["impl"], choice["why"]) if choice else (None, "nothing was measured: the first that it has")


def describe(operation: str) -> tuple[tuple[str, ...], str, str]:
    """For people: the implementations of an operation, the one that "auto" takes on this machine, and why."""
    implementations = room(operation).IMPLEMENTATIONS[operation]
    if not torch.cuda.is_available():
        return tuple(implementations), "reference", "there is no CUDA device here"
    named, why = preferred(operation, torch.cuda.current_device())
    return tuple(implementations), named or next(iter(implementations)), why


def check_request(operation: str, impl: str) -> None:
    """Raises KernelRequestError now when every call with this `impl` would later."""
    implementations = room(operation).IMPLEMENTATIONS[operation]
    if impl != "auto" and impl not in implementations:
        choose(operation, impl, implementations)


def room(operation: str):
    """The module that holds the operation."""
    return import_module(f"kernels.{ROOMS[operation]}")


def tunable_kernels() -> Iterator["configs.Kernel"]:
    """Every Triton kernel with launch parameters, room by room."""
    for name in dict.fromkeys(ROOMS.values()):
        yield from getattr(import_module(f"kernels.{name}"), "KERNELS", ())
