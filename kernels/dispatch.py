"""Which implementation serves a call.

An operation's file lists its implementations, best first. "auto" takes the first; a named one is taken or refused,
never replaced by another.
"""

from collections.abc import Callable, Mapping
from importlib import import_module


class KernelRequestError(ValueError):
    """An implementation was asked for by name that does not exist or cannot serve the call."""


def choose(operation: str, impl: str, implementations: Mapping[str, Callable]) -> Callable:
    """The implementation that `impl` names. Raises KernelRequestError for a name the operation does not have."""
    if impl == "auto":
        return next(iter(implementations.values()))
    if impl not in implementations:
        raise KernelRequestError(
            f"{operation}: impl={impl!r} does not exist; choose one of auto, {', '.join(implementations)}"
        )
    return implementations[impl]


def check_request(operation: str, impl: str) -> None:
    """Raises KernelRequestError now when a call with this `impl` would later."""
    choose(operation, impl, import_module(f"kernels.{operation}").IMPLEMENTATIONS)
