"""What the package tells torch.compile about its functions."""

from collections.abc import Callable


def constant_when_traced(function: Callable) -> Callable:
    """Mark a function that torch.compile calls while it traces a caller, and whose result it keeps as a constant.

    torch.compiler.assume_constant_result does the same, but imports torch._dynamo, which takes every process a second.
    """
    function._dynamo_marked_constant = True
    return function
