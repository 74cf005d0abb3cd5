"""Causal softmax attention, grouped-query, over whole sequences or over a key/value cache: softmax(q·kᵀ/√D)·v."""

from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import autocast_products, check_device, check_float, check_shape
from nanochat_kernels.dispatch import choose
from nanochat_kernels.operation import Operation


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Attention of q (B, T, H, D) over k and v (B, S, G, D), H a multiple of G; returns (B, T, H, D).

    The queries are the last T tokens of each row's keys. lengths (B,), for a cache: how many of a row's S keys exist;
    all of them when None. Raises ValueError for shapes that do not fit and TypeError for unlike dtypes, which autocast may
    mix. Vaswani et al. 2017; grouped queries Ainslie et al. 2023.
    """
    q, k, v = autocast_products(q, k, v)
    check_float("attention", q=q, k=k, v=v)
    check_shape("attention", "q", q, "B", "T", "H", "D")
    batch, tokens, heads, width = q.shape
    check_shape("attention", "k", k, batch, "S", "G", width)
    check_shape("attention", "v", v, *k.shape)
    if heads % k.size(2):
        raise ValueError(f"attention: {heads} query heads are no multiple of {k.size(2)} key heads")
    if k.size(1) < tokens:
        raise ValueError(f"attention: {tokens} queries need at least as many keys, got {k.size(1)}")
    if lengths is not None:
        check_shape("attention", "lengths", lengths, batch)
        check_device("attention", q=q, lengths=lengths)
    return choose(ATTENTION, impl, q, k, v, lengths)(q, k, v, lengths)


ATTENTION = Operation("attention", attention, reference.attention)
OPERATIONS = (ATTENTION,)
