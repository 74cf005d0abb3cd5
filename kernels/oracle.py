"""How far an implementation may be from the truth: the reference in float64 is the oracle, the reference in the dtype of
computation the rival, whose error sets the budget. The tests and the gate judge by this alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RATIO = 1.5


def evaluate(function: Callable, inputs: Sequence, upstream: Sequence[Tensor], wrt: Sequence[int]) -> list[Tensor]:
    """Results, then gradients with respect to the inputs numbered in wrt."""
    inputs = [x.detach().requires_grad_(i in wrt) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, [inputs[i] for i in wrt], list(upstream)) if wrt else []
    return [x.detach() for x in (*outputs, *grads)]


def over_budget(found: Tensor, oracle: Tensor, rival: Tensor, more: float = 0.0) -> str | None:
    """What is wrong with a result, or None.

    1.5 × the rival's error, both as the norm over the tensor, plus what chance adds where a tensor is small: one rounding
    unit of its largest element, one of float32 of its largest row, whose own factor is rounded by that; and `more`.
    """
    if not found.numel():
        return None
    unit = torch.finfo(found.dtype).eps * float(oracle.abs().max())
    rows = oracle.reshape(-1, oracle.shape[-1] if oracle.dim() else 1)
    unit += torch.finfo(torch.float32).eps * float(rows.norm(dim=-1).max())
    error, allowed = float((found.double() - oracle).norm()), float((rival.double() - oracle).norm())
    budget = RATIO * allowed + unit + more
    return None if error <= budget else f"error {error:.3e}, reference {allowed:.3e}, budget {budget:.3e}"
