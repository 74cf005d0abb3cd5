"""What the rooms share: Triton itself, whether it is interpreted, and a tensor as rows.

Where Triton is not installed (it has no build for macOS) the rooms still import: their kernels are then plain functions
that nobody launches, because dispatch refuses them.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INSTALLED = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run in NumPy, on CPU tensors
except ImportError:
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
    tl = SimpleNamespace(constexpr=object)
    INSTALLED = INTERPRETED = False

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRID_LIMIT = 2**31 - 1  # programs on the first axis of a grid


def triton_refusal(x: Tensor) -> str | None:
    """Why no Triton kernel can take x here, or None when one can."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    if x.dtype not in DTYPES:
        return f"the Triton kernels take bfloat16, float16 or float32, got {x.dtype}"
    if x.device.type == "cpu" and INTERPRETED:
        return None
    if x.device.type != "cuda":
        return f"the Triton kernels take CUDA tensors, got one on {x.device}; move it, or set TRITON_INTERPRET=1 to debug"
    return None


def as_rows(x: Tensor) -> Tensor:
    """x (…, C) as (rows, C) with neighbouring elements of a row side by side; copies only where strides leave no choice."""
    rows = x.reshape(-1, x.size(-1)) if x.size(-1) else x.new_empty(0, 0)
    return rows if rows.stride(-1) == 1 or rows.size(-1) <= 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
