"""What calls with alike arguments have in common, worked out once: on a GPU's host it takes longer than a launch does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels import configs
from nanochat_kernels.triton_helpers import launch, recording


@dataclass(frozen=True, eq=False)
class Plan:
    """A launch with everything but its tensors. Call it with the inputs; it allocates the results, launches and returns them.

    The kernel takes pointers to the inputs and to the results, then the numbers. Where an input or a result is None, it gets
    the pointer of the first input, which it must not use.
    """

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    layout: Callable[[Tensor], Tensor]
    """an input → the same numbers as the kernel reads them; called for inputs that are not contiguous"""
    results: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    """shape and dtype of each"""
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        results = [x and torch.empty(x[0], dtype=x[1], device=self.device) for x in self.results]
        if 0 not in self.grid:
            inputs = [x if x is None or x.is_contiguous() else self.layout(x) for x in inputs]
            pointers = [inputs[0] if x is None else x for x in (*inputs, *results)]
            launch(self.kernel, self.grid, self.device, *pointers, *self.numbers, **self.constants)
        return tuple(results)


def planned(make: Callable, *arguments):
    """make(*arguments), remembered for arguments that are alike until the launch tables change.

    Tensors are alike in shape, strides, dtype, device and whether they require a gradient, anything else when it is equal; and
    the modes of autograd and autocast are the same. `make` must look at nothing else, and must not keep a tensor.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or recording():
        return make(*arguments)
    key = (
        make,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        *[
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x
            for x in arguments
        ],
    )  # fmt: skip
    plan = configs.plans.get(key)
    if plan is None:
        plan = make(*arguments)
        if len(configs.plans) >= 4096:
            configs.plans.clear()
        configs.plans[key] = plan
    return plan
