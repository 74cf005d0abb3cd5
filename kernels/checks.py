"""What the public functions ask of their arguments before any work, each with a message that names the argument."""

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
