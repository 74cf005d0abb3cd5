"""Which implementation serves a call.

"auto" takes, on CUDA, what the launch table of the device names, else the first implementation that supports the call, and
elsewhere the reference. An implementation asked for by name runs or raises; another never takes its place.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module

import torch

from nanochat_kernels import configs
from nanochat_kernels.operation import Implementation, Kernel, Operation
from nanochat_kernels.plan import planned


class KernelRequestError(ValueError):
    """An implementation was asked for by name that does not exist or does not support the call."""


@lru_cache(maxsize=1)
def operations() -> Mapping[str, Operation]:
    """Every operation by name: what the files of this package list as OPERATIONS."""
    package = import_module(__package__)
    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    records = [
        operation
        for name in modules
        for operation in getattr(import_module(f"{__package__}.{name}"), "OPERATIONS", ())
    ]  # fmt: skip
    return {operation.name: operation for operation in records}


def choose(operation: Operation, impl: str, *arguments) -> Callable:
    """What `impl` names for a call with these arguments, the first of them a tensor. Raises KernelRequestError."""
    if impl == "auto":
        name = automatic(operation, *arguments)[0]
        return operation.reference if name == "reference" else operation.implementations[name].prepared(*arguments)
    if impl == "reference":
        return operation.reference
    implementation = named(operation, impl)
    reason = implementation.unsupported_reason(*arguments)
    if reason:
        raise KernelRequestError(f"{operation.name}: impl={impl!r} does not support this call: {reason}")
    return implementation.prepared(*arguments)


def serve(operation: Operation, impl: str, check: Callable[..., None], *arguments):
    """The result of an operation for these arguments, after check(*arguments) has raised for what is wrong with them.

    The check, the choice and the implementation's plan are remembered for calls that are alike.
    """
    return planned(checked_choice, operation, impl, check, *arguments)(*arguments)


def checked_choice(operation: Operation, impl: str, check: Callable[..., None], *arguments) -> Callable:
    check(*arguments)
    return choose(operation, impl, *arguments)


def named(operation: Operation, impl: str) -> Implementation:
    """The implementation called `impl`. Raises KernelRequestError with those that exist."""
    if impl not in operation.implementations:
        there_are = ", ".join(("auto", *operation.implementations, "reference"))
        raise KernelRequestError(f"{operation.name}: impl={impl!r} does not exist; choose one of {there_are}")
    return operation.implementations[impl]


def automatic(operation: Operation, *arguments) -> tuple[str, str]:
    """The name of what "auto" takes for these arguments, and why."""
    device = arguments[0].device
    if device.type != "cuda":
        return "reference", "fused kernels are for CUDA"
    preferred, why = preference(operation.name, device.index)
    for name in (preferred,) if preferred else operation.implementations:
        if name == "reference":
            return name, why
        reason = operation.implementations[name].unsupported_reason(*arguments)
        if reason is None:
            return name, why
        why = reason
    return "reference", why


@torch.compiler.assume_constant_result
def preference(operation: str, device_index: int | None) -> tuple[str | None, str]:
    """The implementation that the launch table of the device names for the operation (None: it names none), and its reason."""
    choice = configs.table(configs.architecture(device_index))["auto"].get(operation)
    return (choice["impl"], choice["why"]) if choice else (None, "nothing was measured: the first implementation")


def describe(operation: Operation) -> tuple[str, str]:
    """For people: the implementation that "auto" takes on this machine, and why."""
    if not torch.cuda.is_available():
        return "reference", "there is no CUDA device here"
    preferred, why = preference(operation.name, torch.cuda.current_device())
    return preferred or next(iter((*operation.implementations, "reference"))), why


def check_request(operation: str, impl: str) -> None:
    """Raise KernelRequestError now when every call with this `impl` would raise it later."""
    if impl not in ("auto", "reference"):
        named(operations()[operation], impl)


def tunable_kernels() -> Iterator[Kernel]:
    """Every Triton kernel with launch parameters, each once."""
    seen: dict[str, Kernel] = {}
    for operation in operations().values():
        seen |= {kernel.name: kernel for kernel in operation.kernels}
    yield from seen.values()
