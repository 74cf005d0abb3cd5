"""Attention of normed rows over themselves, from the residual stream to the heads: qkv_projection, then attention, as one operation.

Forward is that of the two. Backward is why they are one: the kernels that compute the gradients of queries, keys and values also
undo QK-norm and rotation, multiply by rstd, and sum what norm's derivative needs, while the gradients are in registers. So the
gradients of q, k and v are not stored, and there is no pass over them. Saved are what the two operations save.
"""

import math
from functools import partial

import torch
from torch import Tensor

from nanochat_kernels.attention import (
    ATTENTION,
    BACKENDS,
    attention,
    attention_forward,
    document_limits,
    torch_unsupported_reason,
)
from nanochat_kernels.attention_launches import KERNELS, key_gradients, query_gradient
from nanochat_kernels.checks import autocast_products, check_integers
from nanochat_kernels.dispatch import choose
from nanochat_kernels.folded_norm import finish, input_gradient, row_rstd
from nanochat_kernels.operation import MODEL_WIDTHS, Benchmark, Implementation, Operation, Trial
from nanochat_kernels.qkv_projection import (
    QKV_PROJECTION,
    benchmark_inputs,
    check,
    inputs,
    joined,
    qkv_projection,
    qkv_projection_forward,
    unsupported_reason,
    weight_gradients,
)
from nanochat_kernels.tracing import opaque
from nanochat_kernels.triton_helpers import KernelFunction, as_rows, derivative, differentiable, needs_gradient


def gradient_shapes(
    dout, dx, x, w_q, w_k, w_v, qkv, out, lse, rstd, head_rstd, cos, sin, starts, ends, offset, needs_dx
):
    return x.new_empty(x.size(0) * x.size(1), qkv.size(2) * qkv.size(3)), x.new_empty(x.shape if needs_dx else 0)


@opaque(gradient_shapes)
def self_attention_backward(
    dout: Tensor, dx: Tensor | None, x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, qkv: Tensor, out: Tensor,
    lse: Tensor, rstd: Tensor, head_rstd: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, ends: Tensor | None,
    offset: int, needs_dx: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (rstd times the gradient of x·weightᵀ, that of x with the residual's dx added); the second is empty unless needs_dx."""
    heads, width = out.shape[2:]
    kv_heads = (qkv.size(2) - heads) // 2
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    dz = torch.empty(qkv.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(qkv.size(2), x.size(0) * x.size(1), dtype=torch.float32, device=x.device)
    projection = rstd, head_rstd, cos, sin, sums, offset
    delta = query_gradient(q, k, v, out, dout, lse, None, None, starts, dz, projection)
    key_gradients(q, k, v, dout, lse, delta, None, ends, dz, dz, projection)
    rows = dz.view(-1, qkv.size(2) * width)
    if not needs_dx:
        return rows, x.new_empty(0)
    coefficient, added = finish(sums, x.size(2), rstd), None if dx is None else as_rows(dx)
    weight = joined(w_q, w_k, w_v)
    whole = input_gradient("qkv_projection_input_gradient", rows, weight, as_rows(x), coefficient, added)
    return rows, whole.view(x.shape)


class SelfAttention(KernelFunction):
    @staticmethod
    def forward(x, w_q, w_k, w_v, cos, sin, starts, ends, rstd, q_gradient, k_gradient, v_gradient, offset, keep_lse):
        rstd = row_rstd(as_rows(x)) if rstd is None else rstd.reshape(-1).contiguous()
        qkv, head_rstd = qkv_projection_forward(x, w_q, w_k, w_v, rstd, cos, sin, offset, None)
        q, k, v = qkv.split([w.size(0) // qkv.size(3) for w in (w_q, w_k, w_v)], 2)
        out, lse = attention_forward(q, k, v, None, starts, math.sqrt(qkv.size(3)), keep_lse)
        return out, x.view_as(x), qkv, lse, rstd, head_rstd

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, w_q, w_k, w_v, cos, sin, starts, ends, _, *ctx.buffers, ctx.offset, _ = inputs
        out, _, qkv, lse, rstd, head_rstd = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        # the buffers are not saved for backward: other calls may add to them before this one's backward
        ctx.save_for_backward(x, w_q, w_k, w_v, qkv, out, lse, rstd, head_rstd, cos, sin, starts, ends)

    @staticmethod
    def backward(ctx, dout, dx, *_):
        needed = ctx.needs_input_grad[:4]
        gradients = derivative(Backward, dout, dx, *ctx.saved_tensors, ctx.offset, *ctx.buffers, needed)
        return *gradients, *[None] * 10


class Backward(KernelFunction):
    @staticmethod
    def forward(
        dout, dx, x, w_q, w_k, w_v, qkv, out, lse, rstd, head_rstd, cos, sin, starts, ends, offset, q_gradient,
        k_gradient, v_gradient, needed,
    ):  # fmt: skip
        if dout is None or not any(needed):
            return dx if needed[0] else None, None, None, None
        weights = w_q, w_k, w_v
        dz, whole = self_attention_backward(
            dout, dx, x, *weights, qkv, out, lse, rstd, head_rstd, cos, sin, starts, ends, offset, needed[0]
        )
        buffers = q_gradient, k_gradient, v_gradient
        return whole if needed[0] else None, *weight_gradients(dz, x, weights, buffers, needed[1:])


def run(x, w_q, w_k, w_v, cos, sin, rstd, q_gradient, k_gradient, v_gradient, offset, cu_seqlens, *_):
    starts, ends = document_limits(cu_seqlens, x)
    cos, sin = cos.contiguous(), sin.contiguous()
    keep_lse = needs_gradient(x, w_q, w_k, w_v)
    buffers = q_gradient, k_gradient, v_gradient
    found = differentiable(SelfAttention, x, w_q, w_k, w_v, cos, sin, starts, ends, rstd, *buffers, offset, keep_lse)
    return found[:2]


def run_parts(
    x, w_q, w_k, w_v, cos, sin, rstd, q_gradient, k_gradient, v_gradient, offset, cu_seqlens, qkv_impl, attention_impl
):  # fmt: skip
    """qkv_projection, then attention, each by an implementation of its own."""
    buffers = q_gradient, k_gradient, v_gradient
    q, k, v, x = qkv_projection(x, w_q, w_k, w_v, cos, sin, offset, rstd, *buffers, impl=qkv_impl)
    return attention(q, k, v, None, cu_seqlens, bound=math.sqrt(q.size(3)), impl=attention_impl), x


def run_backend(backend: str, *arguments):
    """The parts, with attention by one of torch's backends."""
    return run_parts(*arguments[:-1], backend)


def backend_unsupported_reason(
    backend: str, x, w_q, w_k, w_v, cos, sin, rstd, q_gradient, k_gradient, v_gradient, offset, cu_seqlens, *_
):
    width = 2 * cos.size(1)
    q, k = (x[..., :1, None].expand(-1, -1, w.size(0) // width, width) for w in (w_q, w_k))
    return torch_unsupported_reason(BACKENDS[backend], q, k, k, None, cu_seqlens)


def run_reference(
    x, w_q, w_k, w_v, cos, sin, rstd=None, q_gradient=None, k_gradient=None, v_gradient=None, offset=0, cu_seqlens=None, *_
):  # fmt: skip
    """The references of both, with products that add the weights' gradients to the buffers that are given."""
    buffers = q_gradient, k_gradient, v_gradient
    q, k, v, x = QKV_PROJECTION.reference(x, w_q, w_k, w_v, cos, sin, offset, rstd, *buffers)
    return ATTENTION.reference(q, k, v, None, cu_seqlens), x


def self_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor | None = None,
    q_gradient: Tensor | None = None,
    k_gradient: Tensor | None = None,
    v_gradient: Tensor | None = None,
    offset: int = 0,
    cu_seqlens: Tensor | None = None,
    *,
    impl: str = "auto",
    qkv_impl: str = "auto",
    attention_impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the attention (B, T, H, D) of norm(x) over itself, and x itself, for x (B, T, C).

    The arguments are those of qkv_projection, whose heads attend to each other as in attention, cu_seqlens that of attention. All
    tokens of a row are at successive positions, the first at `offset`. qkv_impl, attention_impl: the implementations of the two for
    impl="parts", which "auto" takes if either is named; another impl does not use them. Repeated calls are bitwise equal with
    impl="triton". Raises ValueError for mismatched shapes or devices, TypeError for mismatched dtypes (autocast may mix them), and
    KernelRequestError (a ValueError) if the implementation named by impl does not support the call.
    """
    given = x
    x, w_q, w_k, w_v = autocast_products(x, w_q, w_k, w_v)
    buffers = q_gradient, k_gradient, v_gradient
    if isinstance(offset, Tensor):
        raise TypeError(
            "self_attention: offset must be an int; rows at positions of their own need qkv_projection and attention"
        )
    check("self_attention", x, w_q, w_k, w_v, cos, sin, offset, rstd, *buffers)
    check_integers("self_attention", x, "cu_seqlens", cu_seqlens, "documents + 1")
    if impl == "auto" and (qkv_impl, attention_impl) != ("auto", "auto"):
        impl = "parts"
    arguments = (x, w_q, w_k, w_v, cos, sin, rstd, *buffers, offset, cu_seqlens, qkv_impl, attention_impl)
    out, same = choose(SELF_ATTENTION, impl, *arguments)(*arguments)
    return out, same if given is x else given


def trials(shape, device: torch.device, dtype: torch.dtype):
    """Training's call, and one with buffers for the weights' gradients, as training has them."""
    sizes = shape.width, shape.heads, shape.kv_heads, dtype, device, shape.width // shape.heads
    scores = shape.heads * shape.tokens**2
    yield Trial(inputs(shape.rows, shape.tokens, *sizes), (0,), (0, 1, 2, 3), row_elements=scores)
    given = inputs(1, min(shape.tokens, 1024), *sizes)
    buffers = (torch.empty(w.shape, device=device).normal_() for w in given[1:4])
    yield Trial((*given, None, *buffers), (), (0,), in_place=(7, 8, 9), timed=False, row_elements=scores)


def elements(arguments: tuple, part: str) -> float:
    """Count x and the weights, q, k and v, and out; in backward their gradients too, but those of q, k and v."""
    x, *weights = arguments[:4]
    rows, heads = x.numel() // x.size(2), sum(w.size(0) for w in weights)
    weight, out = heads * x.size(2), rows * weights[0].size(0)
    if part == "fwd":
        return x.numel() + weight + 2 * rows * heads + out
    return 4 * x.numel() + 2 * weight + 4 * rows * heads + 2 * out


def flops(arguments: tuple, part: str, variant: str) -> float:
    """Count the projection's products, and of attention the scores at and below the diagonal."""
    x, *weights = arguments[:4]
    products = 2 if part == "fwd" else 7 if variant == "triton" else 5
    scores = x.size(0) * x.size(1) ** 2 * weights[0].size(0)
    return (2 if part == "fwd" else 4) * x.numel() * sum(w.size(0) for w in weights) + products * scores


SELF_ATTENTION = Operation(
    "self_attention", self_attention, run_reference,
    {
        "triton": Implementation(run, unsupported_reason),
        "parts": Implementation(run_parts),
        **{
            name: Implementation(partial(run_backend, name), partial(backend_unsupported_reason, name))
            for name in BACKENDS
        },
    },
    KERNELS, trials, Benchmark(tuple(MODEL_WIDTHS), benchmark_inputs, (0, 1, 2, 3), elements, flops),
)  # fmt: skip
OPERATIONS = (SELF_ATTENTION,)
