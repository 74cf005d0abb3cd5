"""Causal softmax attention, softmax(q·kᵀ/√D)·v: grouped queries, packed documents, and queries against a key/value cache.

Queries and keys that are normalised over the head have scores of at most √D. With such a bound a constant takes the place of the
running maximum: p = exp(s − constant), summed in float32, and nothing is rescaled. Without a bound the maximum is kept. Results are
divided by the sum of the p as they were rounded for the product with v, so that a query with one key gets exactly its value.

Backward computes dq in a loop over keys, and dk and dv in a loop over queries: seven products where five would do, in return for
a fixed order of all sums. The first loop also computes ⟨dout, out⟩, which the second needs.

Few new tokens against many keys (decoding) split the keys into parts of fixed size, whose sums a second kernel adds. So the result
does not depend on the batch. Milakov & Gimelshein 2018 (online softmax), Dao et al. 2022, Dao 2023 (FlashAttention).
"""

import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat_kernels import reference
from nanochat_kernels.attention_launches import (
    HEAD_WIDTHS,
    KERNELS,
    MOST_QUERIES,
    decode,
    forward,
    in_pages,
    inputs,
    key_gradients,
    query_gradient,
    table_of,
)
from nanochat_kernels.checks import autocast_products, check_float, check_heads, check_integers, check_shape
from nanochat_kernels.dispatch import serve
from nanochat_kernels.operation import DECODED_ROWS, Benchmark, Implementation, Operation, Trial
from nanochat_kernels.tracing import opaque
from nanochat_kernels.triton_helpers import (
    DTYPES,
    GRID_LIMIT,
    KernelFunction,
    cdiv,
    derivative,
    differentiable,
    needs_gradient,
    recording,
    triton_unsupported_reason,
)


def forward_shapes(q, k, v, lengths, starts, bound, keep_lse, pages=None):
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, tokens if keep_lse else 0, dtype=torch.float32)


@opaque(forward_shapes)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, starts: Tensor | None, bound: float | None, keep_lse: bool,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (B, T, H, D) and lse (B, H, T), which is empty unless keep_lse."""
    if starts is None and q.size(1) * (q.size(2) // k.size(2)) <= MOST_QUERIES:
        return decode(q, k, v, lengths, bound, keep_lse, pages=pages)
    return forward(q, k, v, lengths, starts, bound, keep_lse, pages=pages)


def backward_shapes(q, k, v, out, dout, lse, dlse, lengths, starts, ends):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@opaque(backward_shapes)
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, lengths: Tensor | None,
    starts: Tensor | None, ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk and dv. starts, ends (B, T) int32: the first token of each token's document, and the one after its last."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = query_gradient(q, k, v, out, dout, lse, dlse, lengths, starts, dq)
    key_gradients(q, k, v, dout, lse, delta, lengths, ends, dk, dv)
    return dq, dk, dv


def document_limits(cu_seqlens: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return, for each token, the first token of its document and the one after the last (B, T), in int32, within its row."""
    if cu_seqlens is None:
        return None, None
    batch, tokens = q.shape[:2]
    token = torch.arange(batch * tokens, device=q.device, dtype=cu_seqlens.dtype)
    # tokens outside of the documents are documents too, so that no index lies outside
    limits = F.pad(F.pad(cu_seqlens, (1, 0)), (0, 1), value=batch * tokens)
    document = torch.searchsorted(limits, token, right=True)
    row = token - token % tokens if tokens else token
    starts = limits[document - 1].maximum(row) - row
    ends = limits[document].minimum(row + tokens) - row
    return tuple(x.to(torch.int32).view(batch, tokens) for x in (starts, ends))


class Attention(KernelFunction):
    @staticmethod
    def forward(q, k, v, lengths, starts, ends, bound, keep_lse, pages):
        return attention_forward(q, k, v, lengths, starts, bound, keep_lse, pages)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *output)

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 9
        return *derivative(Backward, *ctx.saved_tensors, dout, dlse), *[None] * 6


class Backward(KernelFunction):
    @staticmethod
    def forward(q, k, v, lengths, starts, ends, out, lse, dout, dlse):
        dout = torch.zeros_like(out) if dout is None else dout
        return attention_backward(q, k, v, out, dout, lse, dlse, lengths, starts, ends)


def run(q, k, v, lengths, cu_seqlens, bound, pages, return_lse):
    keep_lse = return_lse or needs_gradient(q, k, v)
    out, lse = differentiable(Attention, q, k, v, lengths, *document_limits(cu_seqlens, q), bound, keep_lse, pages)
    return (out, lse) if return_lse else out


def unsupported_reason(q, k, v, lengths, cu_seqlens, bound, pages, return_lse) -> str | None:
    if q.size(3) not in HEAD_WIDTHS:
        return f"a head of {q.size(3)} channels; the kernel takes {HEAD_WIDTHS}"
    if q.dtype not in DTYPES[:2]:
        return f"the kernel takes bfloat16 or float16, got {q.dtype}"
    keys = k.size(1) if pages is None else pages.size(1) * k.size(1)
    if q.size(0) * q.size(2) * cdiv(keys, 16) > GRID_LIMIT:
        return (
            f"{q.size(0)} rows of {q.size(2)} heads and {keys} keys may need {q.size(0) * q.size(2) * cdiv(keys, 16)} programs, "
            f"more than the {GRID_LIMIT} of one launch; split the batch"
        )
    if pages is not None and (k.size(1) < 16 or k.size(1) & (k.size(1) - 1)):
        return f"pages of {k.size(1)} keys; the kernel takes powers of two from 16 on"
    if pages is not None and needs_gradient(q, k, v):
        return "keys in pages have no gradient; call it under torch.no_grad()"
    return triton_unsupported_reason(q)


BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy if its rows do not begin at multiples of 16 bytes, which torch's backends read at a time unchecked."""
    if torch.compiler.is_compiling():  # Inductor aligns what it passes on
        return x
    starts = x.storage_offset(), *x.stride()[:-1]  # memory itself begins at such a multiple
    fits = x.stride(-1) == 1 and all(start * x.element_size() % 16 == 0 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def run_torch(backend: SDPBackend, q, k, v, lengths, cu_seqlens, bound, pages, return_lse):
    """torch's attention by one of its backends; on the meta device, which has none, only the result's shape is made."""
    with nullcontext() if q.is_meta else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            *(aligned(x).transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=q.size(2) != k.size(2)
        )
    if out.requires_grad and not torch.compiler.is_compiling():
        out.register_hook(aligned)
    return out.transpose(1, 2)


def torch_unsupported_reason(
    backend: SDPBackend, q, k, v, lengths, cu_seqlens, bound=None, pages=None, return_lse=False
) -> str | None:
    if q.device.type != "cuda" and not (q.is_meta and recording()):
        return f"torch's backends are for CUDA tensors, got one on {q.device}; impl='reference' is torch's attention on any"
    if lengths is not None or cu_seqlens is not None or return_lse or pages is not None:
        return "torch's backends take no lengths, no cu_seqlens and no pages and return no lse"
    if q.size(1) != k.size(1):
        return "torch's backends align the first query with the first key, not the last with the last"
    if q.dtype not in DTYPES[:2]:
        return f"torch's fast backends take bfloat16 or float16, got {q.dtype}"
    if q.size(3) % 8 or q.size(3) > 128:
        return f"torch's fast backends serve heads of at most 128 channels, a multiple of 8, got {q.size(3)}"
    if not q.numel() or q.size(1) == 1:
        return f"torch's fast backends need two tokens or more, got {q.size(0)} rows of {q.size(1)} tokens"
    if backend == SDPBackend.EFFICIENT_ATTENTION and q.size(2) != k.size(2):
        return f"torch's efficient backend takes as many key heads as query heads, got {k.size(2)} and {q.size(2)}"
    return None


def run_reference(q, k, v, lengths=None, cu_seqlens=None, bound=None, pages=None, return_lse=False):
    """reference.attention; bound changes no result."""
    if pages is not None:
        return reference.paged_attention(q, k, v, pages, lengths)
    out = reference.attention(q, k, v, lengths, cu_seqlens)
    return (out, reference.attention_lse(q, k, lengths, cu_seqlens)) if return_lse else out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bound: float | None = None,
    pages: Tensor | None = None,
    *,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the attention (B, T, H, D) of q (B, T, H, D) over k and v (B, S, G, D), where H is a multiple of G.

    The queries are the last T tokens of each row's keys. lengths (B,) int32 or int64: the number of valid keys in each row of a
    key/value cache, from 0 to S; None means all S. A query without keys gets 0. cu_seqlens (documents + 1,) int32 or int64: where
    packed documents begin among the B·T tokens of all rows, 0 first and B·T last; a token attends to no other document.
    bound: a promise that |q·k|/√D never exceeds it, as √D for queries and keys normalised over the head; the kernels then do
    without a maximum, unless it is above 34.6, or in float16 above 10.05, as √128 is. Scores beyond it give the right result or NaN.
    return_lse: return also the logarithm (B, H, T) of each query's sum of exponentials, in float32, −inf without keys.
    pages (B, n) int32 or int64: k and v are (pages, P, G, D), and the key s of row b is k[pages[b, s // P], s % P]. Lengths must be
    given too, and there is neither a gradient nor lse. A row's result depends on nothing but its own n pages up to its length.
    The values of lengths, cu_seqlens and pages are not checked.
    Strided q, k, v and gradients are read as they lie if their last stride is 1. Forward and backward are bitwise repeatable with
    impl="triton", and a row's result does not depend on other rows; torch's backends add dq in any order.
    Raises ValueError for mismatched shapes or devices, TypeError for mismatched dtypes, which autocast may mix, and
    KernelRequestError (a ValueError) if the implementation named by impl does not support the call. Vaswani et al. 2017; grouped
    queries: Ainslie et al. 2023.
    """
    q, k, v = autocast_products(q, k, v)
    return serve(ATTENTION, impl, check, q, k, v, lengths, cu_seqlens, bound, pages, return_lse)


def check(q, k, v, lengths, cu_seqlens, bound, pages, return_lse) -> None:
    check_float("attention", q=q, k=k, v=v)
    check_shape("attention", "q", q, "B", "T", "H", "D")
    batch, tokens, heads, width = q.shape
    check_shape("attention", "k", k, batch if pages is None else "pages", "S" if pages is None else "P", "G", width)
    check_shape("attention", "v", v, *k.shape)
    keys = k.size(1)
    if pages is not None:
        check_shape("attention", "pages", pages, batch, "n")
        check_integers("attention", q, "pages", pages.flatten(), pages.numel())
        if lengths is None or cu_seqlens is not None or return_lse:
            raise ValueError("attention: keys in pages need lengths, and have neither packed documents nor lse")
        keys *= pages.size(1)
    check_heads("attention", heads, k.size(2))
    if keys < tokens:
        raise ValueError(f"attention: {tokens} queries need at least as many keys, got {keys}")
    check_integers("attention", q, "lengths", lengths, batch)
    check_integers("attention", q, "cu_seqlens", cu_seqlens, "documents + 1")
    if cu_seqlens is not None and (lengths is not None or k.size(1) != tokens):
        raise ValueError("attention: packed documents have as many keys as queries, and no lengths")
    if bound is not None and not isinstance(bound, (int, float)):
        raise TypeError(f"attention: bound must be None or a number, got {bound!r}")
    if bound is not None and not bound > 0:
        raise ValueError(f"attention: bound must be positive, got {bound}")


def trials(shape, device: torch.device, dtype: torch.dtype):
    """Training's call, and decoding's: a token in each row against a cache that is filled to a length of its own, in pages.

    Both with the bound of normalised heads, as the model calls it.
    """
    width = shape.width // shape.heads
    sizes = shape.heads, shape.kv_heads, width, dtype, device
    # the gradient of a query that sees one key is 0, the difference of two sums; that of few keys has errors of few numbers
    more = {"row_elements": shape.heads * shape.tokens**2, "cancellation": 1e-5, "fewest_rows": 32}
    bound = math.sqrt(width)
    yield Trial((*inputs(shape.rows, shape.tokens, *sizes), None, None, bound), (0, 1, 2), (0, 1, 2), **more)
    q, k, v = inputs(DECODED_ROWS, shape.tokens, *sizes)
    lengths = torch.randint(1, shape.tokens + 1, (DECODED_ROWS,), device=device)
    page = math.gcd(shape.tokens, 128)
    keys, values = (in_pages(x, page) for x in (k, v))
    yield Trial((q[:, :1], keys, values, lengths, None, bound, table_of(k, page)), (0, 3, 6), (), timed=False)


def elements(arguments: tuple, part: str) -> float:
    q, k, v = arguments[:3]
    return {"fwd": 2, "bwd": 4}[part] * q.numel() + {"fwd": 1, "bwd": 2}[part] * (k.numel() + v.numel())


def flops(arguments: tuple, part: str, variant: str) -> float:
    """Count the scores at and below the diagonal; backward takes five products by the field's convention, our kernels seven."""
    batch, tokens, heads, width = arguments[0].shape
    products = 2 if part == "fwd" else 7 if variant == "triton" else 5
    return products * batch * heads * tokens**2 * width


BENCHMARK_SHAPES = {  # rows, tokens, query heads, key/value heads, channels
    "d20": (32, 2048, 10, 10, 128),
    "512": (128, 512, 10, 10, 128),
    "1024": (64, 1024, 10, 10, 128),
    "4096": (16, 4096, 10, 10, 128),
    "8192": (8, 8192, 10, 10, 128),
    "64-wide": (32, 2048, 20, 20, 64),
    "grouped": (32, 2048, 10, 2, 128),
}


def benchmark_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """Return q, k and v, and the bound of normalised heads, as the model gives it."""
    sizes = BENCHMARK_SHAPES[shape]
    return *inputs(*sizes, dtype, device), None, None, math.sqrt(sizes[-1])


ATTENTION = Operation(
    "attention", attention, run_reference,
    {
        "triton": Implementation(run, unsupported_reason),
        **{
            name: Implementation(partial(run_torch, backend), partial(torch_unsupported_reason, backend))
            for name, backend in BACKENDS.items()
        },
    },
    KERNELS, trials,
    Benchmark(tuple(BENCHMARK_SHAPES), benchmark_inputs, (0, 1, 2), elements, flops),
    fused_by_torch=True,
)  # fmt: skip
OPERATIONS = (ATTENTION,)
