"""Choose the implementation that serves a call.

On CUDA, impl="auto" takes what the launch table of the device names, which may be the reference. If the table names none, or one
that does not support the call, it takes the first one that does. On other devices it takes the reference. An implementation
requested by name either runs or raises an error: it never falls back to another one.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module

import torch

from nanochat_kernels import configs
from nanochat_kernels.operation import Implementation, Kernel, Operation
from nanochat_kernels.plan import cached_call
from nanochat_kernels.tracing import constant_when_traced
from nanochat_kernels.triton_helpers import recording


class KernelRequestError(ValueError):
    """The implementation requested by name does not exist or does not support the call."""


@lru_cache(maxsize=1)
def operations() -> Mapping[str, Operation]:
    """Return every operation by name, collected from the OPERATIONS of the files in this package."""
    package = import_module(__package__)
    modules = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "__main__")
    records = [
        operation
        for name in modules
        for operation in getattr(import_module(f"{__package__}.{name}"), "OPERATIONS", ())
    ]  # fmt: skip
    return {operation.name: operation for operation in records}


def choose(operation: Operation, impl: str, *arguments) -> Callable:
    """Return the function that computes the operation for these arguments, of which the first is a tensor.

    Raises KernelRequestError if `impl` names an implementation that does not exist or does not support the call.
    """
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
    """Check the arguments, choose an implementation, run it and return its result.

    check(*arguments) raises an error for invalid arguments. The check, the choice and the implementation's plan are cached for
    calls with the same signature (see plan.cached_call).
    """
    return cached_call(checked_choice, operation, impl, check, *arguments)(*arguments)


def checked_choice(operation: Operation, impl: str, check: Callable[..., None], *arguments) -> Callable:
    check(*arguments)
    return choose(operation, impl, *arguments)


def named(operation: Operation, impl: str) -> Implementation:
    """Return the implementation called `impl`. Raises KernelRequestError, which lists the existing ones, if there is none."""
    if impl not in operation.implementations:
        choices = ", ".join(("auto", *operation.implementations, "reference"))
        raise KernelRequestError(f"{operation.name}: impl={impl!r} does not exist; choose one of {choices}")
    return operation.implementations[impl]


def automatic(operation: Operation, *arguments) -> tuple[str, str]:
    """Return the name of the implementation that "auto" takes for these arguments, and the reason."""
    device = arguments[0].device
    if device.type != "cuda" and not (device.type == "meta" and recording()):
        return "reference", "fused kernels run on CUDA devices only"
    preferred, why = preference(operation.name, device.index)
    if preferred == "reference":
        return preferred, why
    for name in dict.fromkeys(([preferred] if preferred else []) + list(operation.implementations)):
        reason = operation.implementations[name].unsupported_reason(*arguments)
        if reason is None:
            return name, why
        why = reason
    return "reference", why


@constant_when_traced
def preference(operation: str, device_index: int | None) -> tuple[str | None, str]:
    """Return the implementation that the launch table of the device names for the operation, or None, and the reason."""
    choice = configs.table(configs.architecture(device_index))["auto"].get(operation)
    return (choice["impl"], choice["why"]) if choice else (None, "not measured: the first implementation")


def describe(operation: Operation) -> tuple[str, str]:
    """Return the implementation that "auto" takes on this machine and the reason, for `kernels list` to print."""
    if not torch.cuda.is_available():
        return "reference", "there is no CUDA device"
    preferred, why = preference(operation.name, torch.cuda.current_device())
    return preferred or next(iter((*operation.implementations, "reference"))), why


def check_request(operation: str, impl: str) -> None:
    """Raise KernelRequestError now if every call with this `impl` would raise it later."""
    if impl not in ("auto", "reference"):
        named(operations()[operation], impl)


def tunable_kernels() -> Iterator[Kernel]:
    """Yield every Triton kernel that has launch parameters once."""
    seen: dict[str, Kernel] = {}
    for operation in operations().values():
        seen |= {kernel.name: kernel for kernel in operation.kernels}
    yield from seen.values()
