"""Helpers for all kernels: importing Triton, launching on the right device, derivatives, and small device functions.

The operations can be imported without Triton, which has no build for macOS. Their kernels are then plain functions, which nothing
launches because dispatch finds them unsupported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nanochat_kernels import library
from nanochat_kernels.architecture import TRITON_INSTALLED
from nanochat_kernels.ranges import span

if TRITON_INSTALLED:
    import triton
    import triton.language as tl

    INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run in NumPy, on CPU tensors
else:
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
    tl = SimpleNamespace(constexpr=object)
    INTERPRETED = False

# a kernel may read only globals that are constexpr
LOG2E = tl.constexpr(1.4426950408889634) if TRITON_INSTALLED else 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453) if TRITON_INSTALLED else 0.6931471805599453
_INTERPRETED = tl.constexpr(INTERPRETED) if TRITON_INSTALLED else False

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRID_LIMIT = 2**31 - 1  # programs on the first axis of a grid


def triton_unsupported_reason(x: Tensor) -> str | None:
    """Return why no Triton kernel can take x, or None if one can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    if x.dtype not in DTYPES:
        return f"the Triton kernels take bfloat16, float16 or float32, got {x.dtype}"
    if x.device.type == "cuda" or (INTERPRETED and x.device.type == "cpu") or (recording() and x.device.type == "meta"):
        return None
    return f"the Triton kernels take CUDA tensors, got one on {x.device}; move it, or set TRITON_INTERPRET=1 to debug"


class Launch(NamedTuple):
    """A recorded launch: the kernel, its positional arguments, its constants and options by name, and its grid."""

    kernel: Any
    arguments: tuple
    constants: dict[str, Any]
    grid: tuple[int, ...]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded launches", default=None)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches on meta tensors inside the block instead of running them. inspect compiles them without a GPU.

    Inside the block the Triton implementations support meta tensors.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def recording() -> bool:
    return _recorded.get() is not None


def launch(kernel, grid: tuple[int, ...], device: torch.device, *arguments, **constants) -> None:
    """Run kernel[grid](*arguments, **constants) on the tensors' device, which need not be the current one.

    On the meta device nothing runs; see recorded_launches. torch.compile traces the launch, so that it is not opaque to Inductor,
    which selects the device itself.
    """
    if device.index is None and device.type == "meta":  # device.type takes longer than device.index
        launches = _recorded.get()
        if launches is not None:
            launches.append(Launch(kernel, arguments, constants, grid))
    elif torch.compiler.is_compiling() or device.index is None:
        kernel[grid](*arguments, **constants)
    elif device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, device, *arguments, **constants)
    elif not library.run(kernel, grid, device, arguments, constants):
        kernel[grid](*arguments, **constants)


class KernelFunction(torch.autograd.Function):
    """Base of the autograd functions that launch kernels. Call a subclass through `differentiable`.

    A subclass defines forward(*arguments), which returns a tensor or a tuple of tensors. If it has a derivative, it also defines
    setup_context and backward, as in torch; backward receives None for a result that was not used. The kernels of a backward pass
    are in a KernelFunction of their own, called through `derivative`, which has no backward: second derivatives raise an error.
    So do derivatives in forward mode. Under vmap the kernels run for one slice after another.
    """

    def __init_subclass__(cls) -> None:
        def vmap(info, in_dims, *arguments):
            return _one_slice_after_another(cls, info.batch_size, in_dims, arguments)

        cls.vmap = staticmethod(vmap)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output) -> None:
        ctx.set_materialize_grads(False)  # else torch allocates zeros for the gradient of an unused result

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "a fused kernel has no second derivative: call the operation with impl='reference', which torch can differentiate twice"
        )


def differentiable(function: type[KernelFunction], *arguments):
    """Return function.apply(*arguments), with less host overhead."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    needed = torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in arguments])
    if not needed and forward_ad._current_level < 0:
        return function.forward(*arguments)
    # Function.apply would first bind default values to arguments, which takes 25 µs
    return super(torch.autograd.Function, function).apply(*arguments)


def derivative(function: type[KernelFunction], *arguments):
    """Call a KernelFunction inside a backward pass. torch.compile traces it without autograd: it has no second derivatives."""
    if torch.compiler.is_compiling():
        return function.forward(*arguments)
    with span(f"{function.__module__.rpartition('.')[2]} backward"):
        return differentiable(function, *arguments)


def _one_slice_after_another(function: type[KernelFunction], batch_size: int, in_dims: tuple, arguments: tuple):
    """The vmap rule of every KernelFunction: returns (results stacked along a new first axis, 0 for each of them)."""
    if batch_size == 0:  # a slice of zeros tells the shapes of the results, and whether they have gradients
        arguments = [
            torch.cat((x, x.new_zeros((*x.shape[:d], 1, *x.shape[d + 1 :]))), d) if isinstance(d, int) else x
            for x, d in zip(arguments, in_dims, strict=True)
        ]
    results = []
    for index in range(max(batch_size, 1)):
        slices = [x.select(d, index) if isinstance(d, int) else x for x, d in zip(arguments, in_dims, strict=True)]
        result = differentiable(function, *slices)
        results.append(result if isinstance(result, tuple) else (result,))
    stacked = tuple(
        None if parts[0] is None else torch.stack(parts)[:batch_size] for parts in zip(*results, strict=True)
    )
    dims = tuple(None if x is None else 0 for x in stacked)
    return (stacked, dims) if isinstance(result, tuple) else (stacked[0], dims[0])


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def needs_gradient(*tensors: Tensor) -> bool:
    """Return whether autograd may need a derivative with respect to any of these tensors."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return True  # inside vmap, requires_grad of the tensor outside is not visible


MOST_BLOCK_ROWS = 256


def as_rows(x: Tensor) -> Tensor:
    """Return x (…, C) as (rows, C) with stride 1 along a row, as a view unless the strides force a copy.

    Rows that lie so far apart that the offset of one from another of the same block exceeds 2³¹ are copied too.
    """
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.size(-1))
    near = rows.stride(0) * MOST_BLOCK_ROWS < 2**31
    return rows if near and (rows.stride(-1) == 1 or rows.size(-1) <= 1) else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round x from float32 to the nearest number in `dtype`. The interpreter's own cast truncates to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + (32767 + ((bits >> 16) & 1))) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def round_both(x, dtype: tl.constexpr):
    """Return x, from float32, rounded to `dtype`, and the same numbers in float32 again.

    Where both are needed the compiler converts one number at a time, in the unit that computes exponentials; this converts pairs.
    """
    if _INTERPRETED or dtype == tl.float32:
        y = cast(x, dtype)
        both = (y, y.to(tl.float32))
    elif dtype == tl.bfloat16:
        both = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;",
            "=&r,=&r,=r,r,r", [x], dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        both = tl.inline_asm_elementwise(
            "{.reg .b16 a, b; cvt.rn.f16x2.f32 $0, $4, $3; mov.b32 {a, b}, $0; cvt.f32.f16 $1, a; cvt.f32.f16 $2, b;}",
            "=&r,=&r,=r,r,r", [x], dtype=(tl.float16, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    return both


@triton.jit
def dot(a, b, sums):
    """sums + a·b. The interpreter cannot multiply bfloat16, so that it gets float32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def rsqrt(x):
    """1/√x with both operations rounded to nearest: it scales a whole row, so that its error would not average out."""
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
def prefetch(ptr):
    """Prefetch the line at each address into the L2 cache, without waiting for it."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
