"""Launch plans, cached by the signature of the call.

Checking the arguments, choosing an implementation and computing the grid takes the host longer than the launch itself. The
result depends only on shapes, strides, dtypes and devices, so that repeated calls look it up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels import configs
from nanochat_kernels.triton_helpers import launch, recording


@dataclass(frozen=True, eq=False)
class Plan:
    """A kernel launch without its tensors. Calling it with the inputs allocates the results, launches the kernel and returns them.

    The kernel's arguments are pointers to the inputs and results, then the numbers. For an input or result that is None the
    kernel gets the pointer of the first input, which it must not use.
    """

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    layout: Callable[[Tensor], Tensor]
    """input → the same elements with strides that the kernel can read; called for inputs that are not contiguous"""
    results: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    """shape and dtype of each, or None for a result that is not computed"""
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        results = [x and torch.empty(x[0], dtype=x[1], device=self.device) for x in self.results]
        if 0 not in self.grid:
            inputs = [x if x is None or x.is_contiguous() else self.layout(x) for x in inputs]
            pointers = [inputs[0] if x is None else x for x in (*inputs, *results)]
            launch(self.kernel, self.grid, self.device, *pointers, *self.numbers, **self.constants)
        return tuple(results)


def cached_call(make: Callable, *arguments):
    """Return make(*arguments), from the cache if `make` was called with the same signature since the launch tables last changed.

    The signature is the shape, strides, dtype, device and requires_grad of each tensor, the value of each other argument, and the
    modes of autograd and autocast. The result of `make` must depend on nothing else and must not hold a tensor.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or recording():
        return make(*arguments)
    key = (
        make,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        *[
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else (type(x), x)
            for x in arguments
        ],
    )  # fmt: skip
    try:
        plan = configs.plans.get(key)
    except TypeError:
        # an argument that cannot be hashed, such as a list: the check in `make` says what is wrong with it
        return make(*arguments)
    if plan is None:
        plan = make(*arguments)
        if len(configs.plans) >= 4096:
            configs.plans.clear()
        configs.plans[key] = plan
    return plan
