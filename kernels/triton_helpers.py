"""What the rooms share: Triton itself, whether it is interpreted, and a tensor as rows.

Where Triton is not installed (it has no build for macOS) the rooms still import: their kernels are then plain functions
that nobody launches, because dispatch refuses them.
"""

import sys
from collections.abc import Callable
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

# as constants of kernels, whose globals must be constexpr
LOG2E = tl.constexpr(1.4426950408889634) if INSTALLED else 1.4426950408889634
_INTERPRETED = tl.constexpr(INTERPRETED) if INSTALLED else False

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
        return (
            f"the Triton kernels take CUDA tensors, got one on {x.device}; move it, or set TRITON_INTERPRET=1 to debug"
        )
    return None


def traced_as(operation) -> Callable:
    """Register the decorated function as how torch.compile sees an operation of torch.library."""

    def register(fake: Callable) -> Callable:
        def traced(*arguments):
            _spare_inductor(operation._opoverload)
            return fake(*arguments)

        operation.register_fake(traced)
        return traced

    return register


def _spare_inductor(overload) -> None:
    """Before torch 2.13 inductor writes out, at the first call of an operation that it does not know, all that leads to
    it, for a log that nobody reads: 4^layers expressions for a loss (github.com/pytorch/pytorch/issues/185937). It knows it now."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if torch.__version__ < (2, 13) and lowering and overload not in lowering.lowerings:
        tag = torch._library.utils.get_layout_constraint_tag(overload, with_default=True)
        lowering.make_fallback(overload, lowering.tag_to_layout_constraint(tag))


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def as_rows(x: Tensor) -> Tensor:
    """x (…, C) as (rows, C) with neighbouring elements of a row side by side; copies only where strides leave no choice."""
    rows = x.reshape(-1, x.size(-1)) if x.size(-1) else x.new_empty(0, 0)
    return rows if rows.stride(-1) == 1 or rows.size(-1) <= 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in float32 rounded to nearest in `dtype`, also where the interpreter would cut bfloat16 off instead."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + (32767 + ((bits >> 16) & 1))) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, sums):
    """sums + a·b; the interpreter multiplies bfloat16 only as float32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def rsqrt(x):
    """1/√x, both operations rounded to nearest: a whole row is multiplied by it, and its error does not average out."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def exp2(x):
    """2^x in one special-function operation: relative error 2⁻²², results below 2⁻¹²⁶ are 0."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1/x in one special-function operation: within a unit in the last place; 0 for infinity."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def prefetch(at):
    """Call what is at each address into the L2 cache; nothing waits for it."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
