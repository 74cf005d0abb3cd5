"""Named ranges of the host's work, which Nsight Systems and torch.profiler show: stages, steps, layers, operations, optimizer phases.

They are off by default, and then cost a look at a flag. In a CUDA graph nothing of the host's work is left: the kernels of a graph
lie in the ranges of its capture only.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.autograd.profiler import record_function

NOTHING = nullcontext()


class _Recording:
    on = False
    observe: Callable[[str, tuple], None] | None = None


@contextmanager
def recorded(layers: Sequence[nn.Module] = (), observe: Callable[[str, tuple], None] | None = None) -> Iterator[None]:
    """Record ranges while the block runs, also one for each call of these layers, named "layer 0" and so on.

    observe is called with the name and the positional arguments of every operation.
    """
    before = _Recording.on, _Recording.observe
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            for handle in _around_forward(layer, f"layer {number}"):
                hooks.callback(handle.remove)
        _Recording.on, _Recording.observe = True, observe
        try:
            yield
        finally:
            _Recording.on, _Recording.observe = before


def span(name: str) -> AbstractContextManager:
    """A range around a block of the host's work, if ranges are recorded."""
    return _range(name) if _Recording.on else NOTHING


def named(name: str, is_operation: bool = False) -> Callable[[Callable], Callable]:
    """Decorate a function so that each of its calls is a range, if ranges are recorded. torch.compile does not see them.

    is_operation: whether its arguments are observed (see `recorded`).
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            if not _Recording.on or torch.compiler.is_compiling():
                return function(*arguments, **options)
            if is_operation and _Recording.observe:
                _Recording.observe(name, arguments)
            with _range(name):
                return function(*arguments, **options)

        if is_operation:
            call.__module__ = __package__  # whose attribute it is, as pickle wants to know
        return call

    return decorate


@contextmanager
def _range(name: str) -> Iterator[None]:
    import nvtx  # only here: nothing else of the kernels needs it

    with record_function(name), nvtx.annotate(name):
        yield


def _around_forward(module: nn.Module, name: str) -> tuple:
    open_ranges = []

    def before(module, arguments) -> None:
        if not torch.compiler.is_compiling():
            open_ranges.append(_range(name))
            open_ranges[-1].__enter__()

    def after(module, arguments, result) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)
