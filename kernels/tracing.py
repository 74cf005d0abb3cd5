"""What the package tells torch.compile about its functions."""

import functools
from collections.abc import Callable

import torch

NAMESPACE = __package__.replace(".", "_")  # of the operations, in torch.ops


def constant_when_traced(function: Callable) -> Callable:
    """Mark a function that torch.compile calls while it traces a caller, and whose result it keeps as a constant.

    torch.compiler.assume_constant_result does the same, but imports torch._dynamo, which takes every process a second.
    """
    function._dynamo_marked_constant = True
    return function


def opaque(shapes: Callable) -> Callable:
    """Decorate a function of tensors so that torch.compile does not look into it: for products, which it could not fuse anyway.

    `shapes` takes the same arguments and returns empty tensors like the results. The function must not return an argument. It
    has no derivative. In eager mode it is called directly.
    """

    def decorate(function: Callable) -> Callable:
        operation = torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", function, mutates_args=())
        operation.register_fake(shapes)

        @functools.wraps(function)
        def call(*arguments):
            return (operation if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return decorate
