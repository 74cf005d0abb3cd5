"""What the public functions ask of their arguments before any work, each with a message that names the argument."""

import torch
from torch import Tensor


def check_float(operation: str, **tensors: Tensor) -> None:
    """All are floating-point tensors of one dtype on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{operation}: {name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; cast one to the other"
            )
    check_device(operation, **tensors)


def check_device(operation: str, **tensors: Tensor) -> None:
    """All are on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{operation}: {name} is on {tensor.device} but {first_name} on {first.device}; move one to the other"
            )


def check_shape(operation: str, name: str, tensor: Tensor, *expected: int | str) -> None:
    """`expected` holds a size, or the letter of a size that is free."""
    wrong = tensor.dim() != len(expected) or any(
        isinstance(want, int) and want != got for want, got in zip(expected, tensor.shape, strict=False)
    )
    if wrong:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(f"{operation}: {name} must have shape ({shape}), got {tuple(tensor.shape)}")


def check_targets(operation: str, rows: Tensor, targets: Tensor, cap: float, reduction: str) -> None:
    """What every cross entropy asks of its targets (N,), one for each of `rows`, its cap and its reduction."""
    check_shape(operation, "targets", targets, rows.size(0))
    check_device(operation, rows=rows, targets=targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"{operation}: targets must be int64, got {targets.dtype}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"{operation}: reduction must be 'mean' or 'none', got {reduction!r}")
    if cap <= 0:
        raise ValueError(f"{operation}: cap must be positive, got {cap}")
