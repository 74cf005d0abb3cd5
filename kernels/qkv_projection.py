"""Queries, keys and values of normed rows, ready for attention: norm, one product, rotation and QK-norm in one pass over x.

The norm is folded into the product of x with the three weights (folded_norm.py). A part of a tile is one head, so that the epilogue
rotates the heads of queries and keys and divides them by their own root mean square, as qk_norm_rope does. Backward makes one pass
over the gradients: it undoes QK-norm and rotation, multiplies by rstd and sums ⟨dz, z⟩ for each row; then the products for dx and
the weights' gradients follow, of which the first closes the folded norm and adds the residual's gradient.

Saved are x, q, k and v, which attention saves anyway, and one factor for each row and each head. Su et al. 2021 (rotation), Henry
et al. 2020 (norm of q and k).
"""

import torch
from torch import Tensor

from nanochat_kernels import matrix_product, reference
from nanochat_kernels.checks import (
    autocast_products,
    check_device,
    check_float,
    check_gradient_buffer,
    check_heads,
    check_offset,
    check_rstd,
    check_shape,
    normed_dtype,
)
from nanochat_kernels.dispatch import choose
from nanochat_kernels.folded_norm import KERNELS as NORM_KERNELS
from nanochat_kernels.folded_norm import input_gradient, norm_backward_launches, row_rstd
from nanochat_kernels.linear import add_product, plain_linear
from nanochat_kernels.matrix_product import product, product_parameters
from nanochat_kernels.operation import DECODED_ROWS, MODEL_WIDTHS, Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.product_configurations import SPACE, few_rows_kernel, more_product_keys, product_keys
from nanochat_kernels.qk_norm_rope import QK_NORM_ROPE, qk_norm_rope, tables
from nanochat_kernels.qkv_projection_kernels import QKV, product_gradient
from nanochat_kernels.reference import EPS
from nanochat_kernels.rms_norm import RMS_NORM, rms_norm
from nanochat_kernels.tracing import opaque
from nanochat_kernels.triton_helpers import (
    DTYPES,
    KernelFunction,
    as_rows,
    derivative,
    differentiable,
    needs_gradient,
)

HEAD_WIDTHS = (32, 64, 128)
WHOLE_TILES = 128  # sequences of a multiple of so many tokens share no tile


def as_one(*matrices: Tensor) -> Tensor | None:
    """Return matrices that lie one after the other in memory as one matrix, without a copy, or None if they do not."""
    first, end = matrices[0], matrices[0].storage_offset()
    for matrix in matrices:
        same = matrix.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and matrix.is_contiguous() and matrix.storage_offset() == end):
            return None
        end += matrix.numel()
    return first.as_strided((sum(m.size(0) for m in matrices), first.size(1)), first.stride(), first.storage_offset())


def joined(*matrices: Tensor) -> Tensor:
    """Return matrices with equally long rows as one, below each other."""
    found = as_one(*matrices)
    return torch.cat(matrices) if found is None else found


def heads_of(
    x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, offset: int, offsets: Tensor | None, heads: int,
    kv_heads: int, parameters: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return all heads (B, T, H + 2G, D) of x (B, T, C), for the joined weight, and the rstd (H + G, N) of queries' and keys' heads."""
    rows, positions, width = as_rows(x), cos.size(0), 2 * cos.size(1)
    shape = rows.size(0), weight.size(0), x.size(2)
    parameters = product_parameters("qkv_projection", rows, weight, shape, width, parameters, decodes=True)
    out = torch.empty(*x.shape[:2], heads + 2 * kv_heads, width, dtype=x.dtype, device=x.device)
    head_rstd = torch.empty(heads + kv_heads, shape[0], dtype=torch.float32, device=x.device)
    table = None
    if "STAGES" in parameters and offsets is None and x.size(1) % WHOLE_TILES == 0 and cos.dtype == x.dtype:
        table = torch.cat([cos[offset : offset + x.size(1)], sin[offset : offset + x.size(1)]], 1)
        cos = sin = None
    arguments = (
        rstd, head_rstd, cos, sin, rstd if offsets is None else offsets, None if offsets is None else offsets.stride(0),
        offset, x.size(1), positions, (heads + kv_heads) * width, EPS,
    )  # fmt: skip
    product(rows, weight, out.view(shape[:2]), QKV, parameters, arguments, table, y_transposed=True)
    return out, head_rstd


def forward_shapes(x, w_q, w_k, w_v, rstd, cos, sin, offset, offsets):
    heads, kv_heads = (w.size(0) // (2 * cos.size(1)) for w in (w_q, w_k))
    out = x.new_empty(*x.shape[:2], heads + 2 * kv_heads, 2 * cos.size(1))
    return out, x.new_empty(heads + kv_heads, x.size(0) * x.size(1), dtype=torch.float32)


@opaque(forward_shapes)
def qkv_projection_forward(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, offset: int,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (all heads (B, T, H + 2G, D), the rstd of queries' and keys' heads (H + G, N))."""
    heads, kv_heads = (w.size(0) // (2 * cos.size(1)) for w in (w_q, w_k))
    return heads_of(x, joined(w_q, w_k, w_v), rstd, cos, sin, offset, offsets, heads, kv_heads)


def backward_shapes(dq, dk, dv, dx, x, w_q, w_k, w_v, qkv, rstd, head_rstd, cos, sin, offset, offsets, needs_dx):
    return x.new_empty(x.size(0) * x.size(1), qkv.size(2) * qkv.size(3)), x.new_empty(x.shape if needs_dx else 0)


@opaque(backward_shapes)
def qkv_projection_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor | None, x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor,
    qkv: Tensor, rstd: Tensor, head_rstd: Tensor, cos: Tensor, sin: Tensor, offset: int, offsets: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (the gradient of x·weightᵀ, that of x with the residual's dx added); the second is empty unless needs_dx."""
    dz, coefficient = product_gradient(dq, dk, dv, qkv, rstd, head_rstd, cos, sin, offset, offsets, x.size(2))
    if not needs_dx:
        return dz, x.new_empty(0)
    added, weight = None if dx is None else as_rows(dx), joined(w_q, w_k, w_v)
    whole = input_gradient("qkv_projection_input_gradient", dz, weight, as_rows(x), coefficient, added)
    return dz, whole.view(x.shape)


class QKVProjection(KernelFunction):
    @staticmethod
    def forward(x, w_q, w_k, w_v, cos, sin, offset, offsets, rstd, q_gradient, k_gradient, v_gradient):
        rstd = row_rstd(as_rows(x)) if rstd is None else rstd.reshape(-1).contiguous()
        qkv, head_rstd = qkv_projection_forward(x, w_q, w_k, w_v, rstd, cos, sin, offset, offsets)
        return *qkv.split([w.size(0) // qkv.size(3) for w in (w_q, w_k, w_v)], 2), x.view_as(x), qkv, rstd, head_rstd

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, w_q, w_k, w_v, cos, sin, ctx.offset, offsets, _, *ctx.buffers = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[4:])
        # the buffers are not saved for backward: other calls may add to them before this one's backward
        ctx.save_for_backward(x, w_q, w_k, w_v, *output[4:], cos, sin, offsets)

    @staticmethod
    def backward(ctx, dq, dk, dv, dx, *_):
        needed = ctx.needs_input_grad[:4]
        gradients = derivative(Backward, dq, dk, dv, dx, *ctx.saved_tensors, ctx.offset, *ctx.buffers, needed)
        return *gradients, *[None] * 8


class Backward(KernelFunction):
    @staticmethod
    def forward(
        dq, dk, dv, dx, x, w_q, w_k, w_v, qkv, rstd, head_rstd, cos, sin, offsets, offset, q_gradient, k_gradient,
        v_gradient, needed,
    ):  # fmt: skip
        weights, buffers = (w_q, w_k, w_v), (q_gradient, k_gradient, v_gradient)
        if (dq is None and dk is None and dv is None) or not any(needed):
            return dx if needed[0] else None, None, None, None
        sizes = [w.size(0) // qkv.size(3) for w in weights]
        dq, dk, dv = (
            qkv.new_zeros(*qkv.shape[:2], n, qkv.size(3)) if g is None else g
            for g, n in zip((dq, dk, dv), sizes, strict=True)
        )
        dz, whole = qkv_projection_backward(
            dq, dk, dv, dx, x, *weights, qkv, rstd, head_rstd, cos, sin, offset, offsets, needed[0]
        )
        return whole if needed[0] else None, *weight_gradients(dz, x, weights, buffers, needed[1:])


def weight_gradients(
    dz: Tensor, x: Tensor, weights: tuple[Tensor, ...], buffers: tuple[Tensor | None, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients of the weights, or add them to the buffers that are given. dz: rstd times the gradient of x·weightsᵀ."""
    rows = x.reshape(-1, x.size(2))
    # torch.compile cannot trace where a tensor lies in memory
    together = all(buffer is not None for buffer in buffers) and not torch.compiler.is_compiling()
    one = as_one(*buffers) if together else None
    gradients = [None, None, None]
    if one is not None:
        add_product(one, dz, rows)
    else:
        parts = dz.split([w.size(0) for w in weights], 1)
        for i, (part, buffer) in enumerate(zip(parts, buffers, strict=True)):
            if buffer is not None:
                add_product(buffer, part, rows)
            elif needed[i]:
                gradients[i] = part.t() @ rows
    return gradients


def run(x, w_q, w_k, w_v, cos, sin, offset, rstd, *buffers):
    offset, offsets = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    cos, sin = cos.contiguous(), sin.contiguous()
    q, k, v, same, *_ = differentiable(QKVProjection, x, w_q, w_k, w_v, cos, sin, offset, offsets, rstd, *buffers)
    return q, k, v, same


def run_unfused(x, w_q, w_k, w_v, cos, sin, offset, rstd, *buffers):
    """The same from torch's products, rms_norm and qk_norm_rope: for heads that do not fill the part of a tile."""
    return from_parts(x, (w_q, w_k, w_v), cos, sin, offset, buffers, "triton")


def unfused_unsupported_reason(x, w_q, w_k, w_v, cos, sin, offset, *_) -> str | None:
    q, k = (x[..., :1, None].expand(-1, -1, w.size(0) // (2 * cos.size(1)), 2 * cos.size(1)) for w in (w_q, w_k))
    norm, rope = (part.implementations["triton"].unsupported_reason for part in (RMS_NORM, QK_NORM_ROPE))
    return norm(x) or rope(q, k, cos, sin, offset)


def run_reference(x, w_q, w_k, w_v, cos, sin, offset=0, rstd=None, *buffers):
    """reference.qkv_projection, with products that add the weights' gradients to the buffers that are given."""
    return from_parts(x, (w_q, w_k, w_v), cos, sin, offset, buffers or (None,) * 3, "reference")


def from_parts(x, weights, cos, sin, offset, buffers, impl: str):
    normed, width = rms_norm(x, impl=impl), 2 * cos.size(1)
    products = (plain_linear(normed, w, buffer) for w, buffer in zip(weights, buffers, strict=True))
    q, k, v = (y.unflatten(2, (-1, width)) for y in products)
    return *qk_norm_rope(q, k, cos, sin, offset, impl=impl), v, x


def unsupported_reason(x, w_q, w_k, w_v, cos, sin, *_) -> str | None:
    width = 2 * cos.size(1)
    if width not in HEAD_WIDTHS:
        return f"a head of {width} channels does not fill a part of a tile; the kernel takes {HEAD_WIDTHS}"
    if x.dtype == torch.float32:
        return "the fused product takes bfloat16 or float16"
    if normed_dtype(x) != x.dtype:
        return f"autocast makes the normed heads {normed_dtype(x)}; the kernel stores all heads in {x.dtype}"
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        return "it computes no gradient for cos and sin; detach them"
    if x.dtype == torch.float16 and needs_gradient(x, w_q, w_k, w_v):
        return "float16 cannot hold the gradient of a large x's product, divided by x's size; use bfloat16"
    return matrix_product.unsupported_reason(x)


def qkv_projection(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    offset: int | Tensor = 0,
    rstd: Tensor | None = None,
    q_gradient: Tensor | None = None,
    k_gradient: Tensor | None = None,
    v_gradient: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q (B, T, H, D), k and v (B, T, G, D) of norm(x), q and k rotated and normed, and x itself, for x (B, T, C).

    w_q (H·D, C), w_k and w_v (G·D, C), of which no copy is made if they lie one after the other in memory. cos, sin: (positions,
    D/2). offset: the position of the first token, as an integer or a tensor with one for each row (B,); see qk_norm_rope. rstd
    (B, T): the factor of each row of x, if it is known. The last result is x: used as the residual, its gradient is added
    by the product that computes x's. It must not be changed in place. q, k and v may be views of one tensor.
    q_gradient, k_gradient, v_gradient: contiguous float32 buffers with the weights' shapes. Backward adds the weights' gradients to
    them in place; a weight with a buffer gets no `.grad`. If neither x nor a weight requires a gradient, they stay untouched.
    Repeated calls are bitwise equal. Raises ValueError for mismatched shapes or devices, TypeError for mismatched dtypes
    (autocast may mix them), and KernelRequestError (a ValueError) if the implementation named by impl does not support the call,
    as `triton` does not compute gradients in float16.
    """
    given = x
    x, w_q, w_k, w_v = autocast_products(x, w_q, w_k, w_v)
    check("qkv_projection", x, w_q, w_k, w_v, cos, sin, offset, rstd, q_gradient, k_gradient, v_gradient)
    arguments = (x, w_q, w_k, w_v, cos, sin, offset, rstd, q_gradient, k_gradient, v_gradient)
    *heads, same = choose(QKV_PROJECTION, impl, *arguments)(*arguments)
    return *heads, same if given is x else given


def check(operation, x, w_q, w_k, w_v, cos, sin, offset, rstd, q_gradient, k_gradient, v_gradient) -> None:
    check_float(operation, x=x, w_q=w_q, w_k=w_k, w_v=w_v)
    check_shape(operation, "x", x, "B", "T", "C")
    check_float(operation, cos=cos, sin=sin)
    check_shape(operation, "cos", cos, "positions", "D/2")
    check_shape(operation, "sin", sin, *cos.shape)
    check_device(operation, x=x, cos=cos)
    width = 2 * cos.size(1)
    for name, weight, buffer in (("w_q", w_q, q_gradient), ("w_k", w_k, k_gradient), ("w_v", w_v, v_gradient)):
        check_shape(operation, name, weight, "heads·D", x.size(2))
        check_gradient_buffer(operation, name.replace("w_", "") + "_gradient", weight, buffer)
        if width == 0 or weight.size(0) % width:
            raise ValueError(
                f"{operation}: {name} has {weight.size(0)} rows, which is no multiple of the head width {width}"
            )
    check_shape(operation, "w_v", w_v, *w_k.shape)
    check_heads(operation, w_q.size(0) // width, w_k.size(0) // width)
    check_offset(operation, x, x.size(1), cos.size(0), offset)
    check_rstd(operation, x, rstd)


def inputs(
    batch: int, tokens: int, width: int, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device,
    head_width: int = 128,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return random x, w_q, w_k and w_v with the magnitudes of trained weights, in one memory, cos and sin."""
    x = torch.empty(batch, tokens, width, device=device, dtype=dtype).normal_()
    rows = [heads * head_width, kv_heads * head_width, kv_heads * head_width]
    weight = torch.empty(sum(rows), width, device=device, dtype=dtype).normal_().mul_(width**-0.5)
    return x, *weight.split(rows), *tables(tokens, head_width, dtype, device)


def launches(key, dtype: torch.dtype, device: torch.device):
    rows, n, width = key
    head_width = 128 if n % 384 == 0 else 64
    heads = n // (3 * head_width)
    x, *weights, cos, sin = inputs(1, rows, width, heads, heads, dtype, device, head_width)
    rstd = torch.empty(rows, device=device).uniform_(0.5, 2.0)
    zeros = torch.zeros(1, 3, dtype=torch.int64, device=device)[:, 1]  # a column of a table, as the engine gives it

    def run(offsets: Tensor | None):
        given = x, joined(*weights), rstd, cos, sin, 0, offsets, heads, heads
        return lambda parameters: heads_of(*given, parameters)

    return {"forward": run(None), "offsets": run(zeros)}


def backward_launches(key, dtype: torch.dtype, device: torch.device):
    heads = 1280 // key[0]
    cos, sin = tables(2048, key[0], dtype, device)
    qkv, gradients = (torch.empty(32, 2048, 3 * heads, key[0], device=device, dtype=dtype).normal_() for _ in range(2))
    rstd, head_rstd = (torch.empty(n, 32 * 2048, device=device).uniform_(0.5, 2.0) for n in (1, 2 * heads))
    zeros = torch.zeros(32, dtype=torch.int64, device=device)

    def run(offsets: Tensor | None):
        given = *gradients.split(heads, 2), qkv, rstd[0], head_rstd, cos, sin, 0, offsets, 1280
        return lambda parameters: product_gradient(*given, parameters)

    return {"backward": run(None), "offsets": run(zeros)}


def input_gradient_launches(key, dtype: torch.dtype, device: torch.device):
    dz, x = (torch.empty(key[0], n, device=device, dtype=dtype).normal_() for n in (key[2], key[1]))
    weight = torch.empty(key[2], key[1], device=device, dtype=dtype).normal_().mul_(key[1] ** -0.5)
    return norm_backward_launches("qkv_projection_input_gradient", dz, weight, x)


BACKWARD_SPACE = tuple(
    {"TOKENS": tokens, "HEADS": heads, "num_warps": warps}
    for tokens, warps in ((4, 1), (8, 2), (8, 4), (16, 4), (32, 8))
    for heads in (1, 2, 5)
)
KERNELS = (
    Kernel(
        "qkv_projection", DTYPES[:2], product_keys(3, 1), SPACE, launches,
        ((1000, 384, 96), (1001, 192, 40), *more_product_keys(3, 1)),
    ),
    few_rows_kernel("qkv_projection", 3, 1, launches, slices=True),  # a part is a whole head
    Kernel("qkv_backward", DTYPES[:1], ((64,), (128,)), BACKWARD_SPACE, backward_launches, ((32,),)),
    Kernel(
        "qkv_projection_input_gradient", DTYPES[:1], product_keys(1, 3), SPACE, input_gradient_launches,
        ((1000, 96, 384), (1001, 15, 30), *more_product_keys(1, 3)),
    ),
    *NORM_KERNELS,
)  # fmt: skip


def trials(shape, device: torch.device, dtype: torch.dtype):
    """Training's call, training's with buffers for the weights' gradients, and decoding's: a token in each row at its own position."""
    sizes = shape.width, shape.heads, shape.kv_heads, dtype, device, shape.width // shape.heads
    yield Trial(inputs(shape.rows, shape.tokens, *sizes), (0,), (0, 1, 2, 3))
    given = inputs(1, min(shape.tokens, 1024), *sizes)
    buffers = (torch.empty(w.shape, device=device).normal_() for w in given[1:4])
    yield Trial((*given, 0, None, *buffers), (), (0,), in_place=(8, 9, 10), timed=False)
    x, *weights, cos, sin = inputs(DECODED_ROWS, 1, *sizes)
    cos, sin = tables(shape.tokens, sizes[-1], dtype, device)
    positions = torch.arange(DECODED_ROWS, device=device) % shape.tokens
    yield Trial((x, *weights, cos, sin, positions), (0, 6), (), timed=False)


def elements(arguments: tuple, part: str) -> float:
    x, *weights = arguments[:4]
    rows, heads = x.numel() // x.size(2), sum(w.size(0) for w in weights)
    weight = heads * x.size(2)
    return x.numel() + weight + rows * heads if part == "fwd" else 4 * x.numel() + 4 * rows * heads + 2 * weight


def flops(arguments: tuple, part: str, variant: str) -> float:
    x, *weights = arguments[:4]
    return (2 if part == "fwd" else 4) * x.numel() * sum(w.size(0) for w in weights)


def benchmark_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return inputs and rstd of x, which the MLP before knows."""
    heads = MODEL_WIDTHS[shape] // 128
    given = inputs(32, 2048, 128 * heads, heads, heads, dtype, device)
    return *given, reference.with_rstd(given[0])[1]


QKV_PROJECTION = Operation(
    "qkv_projection", qkv_projection, run_reference,
    {
        "triton": Implementation(run, unsupported_reason),
        "unfused": Implementation(run_unfused, unfused_unsupported_reason),
    },
    KERNELS, trials,
    Benchmark(
        tuple(MODEL_WIDTHS), benchmark_inputs, (0, 1, 2, 3), elements, flops,
        call=lambda function, *given: function(*given[:-1], 0, given[-1]),
    ),
)  # fmt: skip
OPERATIONS = (QKV_PROJECTION,)
