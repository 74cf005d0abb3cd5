"""Causal softmax attention, grouped-query, over whole sequences or over a key/value cache: softmax(q·kᵀ/√D)·v."""

from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import autocast_products, check_device, check_float, check_shape
from nanochat_kernels.dispatch import choose
from nanochat_kernels.operation import Operation


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Return the attention (B, T, H, D) of q (B, T, H, D) over k and v (B, S, G, D), where H is a multiple of G.

    The queries are the last T tokens of each row's keys. lengths (B,): the number of valid keys in each row of a key/value
    cache; None means all S. Raises ValueError for mismatched shapes or devices and TypeError for mismatched dtypes, which
    autocast may mix. Vaswani et al. 2017; grouped queries: Ainslie et al. 2023.
    """
    q, k, v = autocast_products(q, k, v)
    check_float("attention", q=q, k=k, v=v)
    check_shape("attention", "q", q, "B", "T", "H", "D")
    batch, tokens, heads, width = q.shape
    check_shape("attention", "k", k, batch, "S", "G", width)
    check_shape("attention", "v", v, *k.shape)
    if heads % k.size(2):
        raise ValueError(f"attention: {heads} query heads are not a multiple of {k.size(2)} key heads")
    if k.size(1) < tokens:
        raise ValueError(f"attention: {tokens} queries need at least as many keys, got {k.size(1)}")
    if lengths is not None:
        check_shape("attention", "lengths", lengths, batch)
        check_device("attention", q=q, lengths=lengths)
    return choose(ATTENTION, impl, q, k, v, lengths)(q, k, v, lengths)


ATTENTION = Operation("attention", attention, reference.attention)
OPERATIONS = (ATTENTION,)
