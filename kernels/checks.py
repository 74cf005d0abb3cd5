"""Checks that the public functions run on their arguments before any work; each message names the argument."""

from functools import lru_cache

import torch
from torch import Tensor

from nanochat_kernels.tracing import constant_when_traced

LARGEST = torch.finfo(torch.float32).max


def check_float(operation: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are floating point with one dtype, and ValueError unless all are on one device."""
    check_tensors(operation, **tensors)
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{operation}: {name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; cast one to the other"
            )
    check_device(operation, **tensors)


def check_tensors(operation: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all are tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operation}: {name} must be a tensor, got {tensor!r}")


def row_width(operation: str, x: Tensor) -> int:
    """Return the number of channels C of x (…, C). Raises ValueError if x has no axis."""
    check_tensors(operation, x=x)
    if x.dim() == 0:
        raise ValueError(
            f"{operation}: x must have shape (…, C), got a single number; give it an axis for the channels"
        )
    return x.size(-1)


def check_device(operation: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on the same device."""
    check_tensors(operation, **tensors)
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{operation}: {name} is on {tensor.device} but {first_name} is on {first.device}; move one to the other"
            )


def check_shape(operation: str, name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise ValueError unless the tensor has the expected shape, given as sizes, and as letters where any size is allowed."""
    check_tensors(operation, **{name: tensor})
    wrong = tensor.dim() != len(expected) or any(
        isinstance(want, int) and want != got for want, got in zip(expected, tensor.shape, strict=False)
    )
    if wrong:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(f"{operation}: {name} must have shape ({shape}), got {tuple(tensor.shape)}")


def check_targets(
    operation: str, rows: Tensor, vocabulary: int, targets: Tensor, softcap: float, reduction: str
) -> None:
    """Check the arguments that both cross entropies share: targets (N,), one for each of `rows`, the softcap and the reduction."""
    check_shape(operation, "targets", targets, rows.size(0))
    check_device(operation, rows=rows, targets=targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"{operation}: targets must be int64, got {targets.dtype}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"{operation}: reduction must be 'mean' or 'none', got {reduction!r}")
    if vocabulary == 0 and targets.numel():
        raise ValueError(f"{operation}: the vocabulary is empty, but there are {targets.numel()} targets")
    check_softcap(operation, softcap)


def check_softcap(operation: str, softcap: float) -> None:
    """Raise ValueError unless softcap is a number that float32 holds, above 0."""
    if not isinstance(softcap, (int, float)) or not 0 < softcap <= LARGEST:  # true for NaN too
        raise ValueError(
            f"{operation}: softcap must be positive and finite, got {softcap!r}; one of 1e4 leaves logits almost unchanged"
        )


def check_loss_weight(operation: str, targets: Tensor, loss_weight: Tensor | None) -> None:
    """Raise an error unless loss_weight is None, a float32 scalar or one float32 weight per target, on the targets' device."""
    if loss_weight is None:
        return
    check_device(operation, targets=targets, loss_weight=loss_weight)
    if loss_weight.dtype != torch.float32 or loss_weight.shape not in ((), targets.shape):
        raise TypeError(
            f"{operation}: loss_weight must be float32 of shape () or {tuple(targets.shape)}, got {loss_weight.dtype} of "
            f"shape {tuple(loss_weight.shape)}"
        )


def under_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for x's device; never for the meta device, for which torch raises an error."""
    return isinstance(x, Tensor) and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def normed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of torch's rms_norm(x): x's own, or float32 under autocast on CUDA in the versions of torch that promote it."""
    if not under_autocast(x):
        return x.dtype
    return torch.float32 if _autocast_norms_in_float32(x.device.type) else x.dtype


@lru_cache
@constant_when_traced
def _autocast_norms_in_float32(device_type: str) -> bool:
    """Return whether autocast casts 16-bit inputs of rms_norm to float32: on CUDA torch 2.13 does and torch 2.11 does not."""
    with torch.autocast(device_type, dtype=torch.bfloat16), torch.no_grad():
        one = torch.ones(1, 1, device=device_type, dtype=torch.bfloat16)
        return torch.nn.functional.rms_norm(one, (1,)).dtype == torch.float32


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast the tensors to the widest dtype among them, as torch's addition does; otherwise return them unchanged."""
    if not all(isinstance(x, Tensor) for x in tensors) or not under_autocast(tensors[0]):
        return tensors
    if all(x.dtype == tensors[0].dtype for x in tensors):
        return tensors
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def autocast_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast the tensors to its dtype, as torch's matrix products do; otherwise return them unchanged."""
    if not under_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def check_gradient_buffer(operation: str, name: str, weight: Tensor, gradient: Tensor | None) -> None:
    """Raise an error unless the buffer for a weight's gradient is None or contiguous float32 of the weight's shape and device."""
    if gradient is None:
        return
    check_shape(operation, name, gradient, *weight.shape)
    check_device(operation, weight=weight, **{name: gradient})
    if gradient.dtype != torch.float32 or not gradient.is_contiguous():
        raise TypeError(
            f"{operation}: {name} must be contiguous float32, got {gradient.dtype} with strides {gradient.stride()}"
        )
    if gradient.requires_grad or _begins_where(gradient, weight):
        raise ValueError(
            f"{operation}: {name} must be memory of its own that requires no gradient, as torch.zeros makes, got "
            f"{'a tensor that requires one' if gradient.requires_grad else 'that of the weight'}"
        )


def _begins_where(gradient: Tensor, weight: Tensor) -> bool:
    """Whether two tensors begin at the same place in memory; tensors without memory, as in a trace or under vmap, do not."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or weight.device.type == "meta":
        return False
    return gradient.numel() > 0 and gradient.data_ptr() == weight.data_ptr()


def check_residual(operation: str, x: Tensor, residual: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise an error unless residual is None or has the shape of the result, on x's device and, except under autocast, in its dtype."""
    if residual is None:
        return
    check_shape(operation, "residual", residual, *shape)
    if under_autocast(x):
        check_device(operation, x=x, residual=residual)
    else:
        check_float(operation, x=x, residual=residual)


def check_rstd(operation: str, x: Tensor, rstd: Tensor | None) -> None:
    """Raise an error unless rstd is None or one number for each row of x, in float32 or x's wider dtype, on its device."""
    if rstd is None:
        return
    check_shape(operation, "rstd", rstd, *x.shape[:-1])
    check_device(operation, x=x, rstd=rstd)
    expected = torch.promote_types(x.dtype, torch.float32)
    if rstd.dtype != expected:
        raise TypeError(f"{operation}: rstd must be {expected}, got {rstd.dtype}")


def check_offset(operation: str, x: Tensor, tokens: int, positions: int, offset: int | Tensor) -> None:
    """Raise an error unless offset is an integer, from which on the tables have `tokens` positions, or one integer per row of x."""
    if isinstance(offset, Tensor):
        check_integers(operation, x, "offset", offset, x.size(0))
    elif isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"{operation}: offset must be an int or a tensor of ints, got {offset}")
    elif not 0 <= offset <= positions:
        raise ValueError(f"{operation}: offset must be from 0 to {positions}, the rows of the tables, got {offset}")
    elif offset + tokens > positions:
        raise ValueError(
            f"{operation}: positions {offset} to {offset + tokens - 1} exceed the {positions} rows of the tables; make them longer"
        )


def check_heads(operation: str, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless each key head serves the same number of query heads."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{operation}: {heads} query heads are not a multiple of {kv_heads} key heads; each of these serves as many queries"
        )


def check_integers(operation: str, x: Tensor, name: str, given: Tensor | None, size: int | str) -> None:
    """Raise an error unless the tensor is None or int32 or int64 of shape (size,) on x's device."""
    if given is None:
        return
    check_shape(operation, name, given, size)
    check_device(operation, x=x, **{name: given})
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{operation}: {name} must be int32 or int64, got {given.dtype}")
