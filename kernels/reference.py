"""The specification: every operation in plain PyTorch, in the dtype rules of the model.

Implementations are validated against these functions evaluated in float64. Notation: B batch, T tokens,
C width, H query heads, G key/value heads, D head width, F hidden width, V vocabulary, N = B·T rows.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = torch.finfo(torch.float32).eps
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-7
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SOFTCAP = 15.0  # bound of a logit's absolute value; Gemma Team 2024 (Gemma 2) uses 30
ROPE_BASE = 10000.0  # pair i of a head's D channels turns by position·ROPE_BASE^(−2i/D)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last axis; no weight."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def add_rms_norm(x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """(x + update, rms_norm(x + update)): the residual stream and the input of the next layer."""
    total = x + update
    return total, rms_norm(total)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head of x (B, T, H, D) by −θ; cos and sin broadcast to (B, T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, D) and k (B, T, G, D), then apply RMSNorm to each head."""
    positions = torch.arange(q.size(1), device=q.device)
    if isinstance(offset, Tensor):
        positions = positions + offset[:, None]  # (B, T)
    else:
        positions = (positions + offset)[None]  # (1, T)
    cos, sin = cos[positions].unsqueeze(2).to(q.dtype), sin[positions].unsqueeze(2).to(q.dtype)
    return rms_norm(rotate(q, cos, sin)), rms_norm(rotate(k, cos, sin))


def attention_mask(
    q: Tensor, keys: int, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor | None:
    """Which of the keys each query of q (B, T, H, D) attends to, (B or 1, T, S), or None for those at its position and before.

    Query t of row b attends to the keys up to lengths[b] − T + t: the queries are the last T tokens of the row's keys.
    lengths=None means all keys for every row. cu_seqlens: where packed documents begin among the B·T tokens, and their end.
    """
    batch, queries = q.shape[:2]
    if lengths is None and cu_seqlens is None and queries == keys:
        return None
    t, s = torch.arange(queries, device=q.device)[:, None], torch.arange(keys, device=q.device)[None]
    last = torch.full((1,), keys, device=q.device) if lengths is None else lengths
    mask = s <= last[:, None, None] - queries + t
    if cu_seqlens is not None:
        token = torch.arange(batch * queries, device=q.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, token, right=True).view(batch, queries)
        mask = mask & (document[:, :, None] == document[:, None])
    return mask


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Causal softmax attention of q (B, T, H, D) over k, v (B, S, G, D), scale D^−½; returns (B, T, H, D).

    attention_mask says what a query attends to. A query without keys has the result 0.
    """
    mask = attention_mask(q, k.size(1), lengths, cu_seqlens)
    # cuDNN takes 10 ms to plan a new shape, and with a cache every token brings a new number of keys
    with nullcontext() if mask is None else sdpa_kernel(WITHOUT_PLANS):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if mask is None else mask.unsqueeze(1),
            is_causal=mask is None,
            enable_gqa=q.size(2) != k.size(2),
        )
    return out.transpose(1, 2)


PAGES_AT_ONCE = 8  # of each row: enough that a chat of a small model is one block, few enough to keep copies small
PRODUCTS_AT_ONCE = 8  # on a CPU: the copies of so many pages stay in its cache


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
    """attention of q (B, T, H, D) over keys and values (pages, P, G, D), of which row b has those that pages[b] (n,) names.

    Every product is of one page, their sums are added page after page, and a page without keys that a query sees changes no bit. So
    all products have the same shapes for any n, and a row's result does not depend on other rows. Between blocks of pages, sums are
    scaled as the maximum of a query grows. Milakov & Gimelshein 2018 (online softmax).
    """
    if q.is_cpu and q.size(0):  # elsewhere the host would wait for the lengths
        pages = pages[:, : -(-int(lengths.max()) // keys.size(1))]
    (_, tokens, heads, width), (page, groups) = q.shape, keys.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    # the queries of each key head as one matrix (B, G, T·share, D)
    q = (q.to(wide) * width**-0.5).unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    last = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)  # the last key that each query sees
    last = last[:, None, :, None].expand(-1, groups, -1, heads // groups).flatten(2)[..., None]
    highest = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, sums = torch.zeros_like(highest), torch.zeros_like(q)
    for first in range(0, pages.size(1), PAGES_AT_ONCE):
        block, left = pages[:, first : first + PAGES_AT_ONCE], lengths - first * page
        queries = q[:, :, :, None].expand(-1, -1, -1, block.size(1), -1)
        scores = page_products(queries, keys, block, left, by_keys=True)  # (B, G, T·share, pages, P)
        key = torch.arange(first * page, (first + block.size(1)) * page, device=q.device).view(-1, page)
        scores = scores.masked_fill(key > last[..., None], -torch.inf)
        higher = torch.maximum(highest, scores.amax((3, 4))[..., None])
        base = higher.nan_to_num(neginf=0.0)  # before the first key that is seen
        p, factor = (scores - base[..., None]).exp(), (highest - base).exp()
        total, sums, highest = total * factor, sums * factor, higher
        of_pages = page_products(p, values, block, left, by_keys=False)
        for p_sums, page_sums in zip(p.sum(-1).unbind(3), of_pages.unbind(3), strict=True):
            total, sums = total + p_sums[..., None], sums + page_sums
    out = (sums / total).masked_fill(total == 0, 0.0).to(values.dtype)
    return out.unflatten(2, (tokens, -1)).transpose(1, 2).flatten(2, 3)


def page_products(x: Tensor, paged: Tensor, pages: Tensor, lengths: Tensor, by_keys: bool) -> Tensor:
    """x (B, G, M, n, ·) times the keys, or else the values, (pages, P, G, D) of the pages (B, n), as (B, G, M, n, ·).

    On a CPU the products with pages behind a row's length are left out, as zeros, and the others are computed PRODUCTS_AT_ONCE at a
    time, so that the shapes of all calls are the same.
    """
    (_, groups, _, count, _), page = x.shape, paged.size(1)
    if not x.is_cpu:
        chosen = [paged.index_select(0, column).to(x.dtype).unbind(2) for column in pages.unbind(1)]
        by_head = [[part.mT if by_keys else part for part in parts] for parts in chosen]
        return torch.stack(
            [torch.stack([torch.bmm(x[:, g, :, i], by_head[i][g]) for g in range(groups)], 1) for i in range(count)], 3
        )
    out = x.new_zeros(*x.shape[:4], page if by_keys else paged.size(3))
    used = (torch.arange(count) * page < lengths[:, None]).nonzero()
    used = torch.cat([used, used[-1:].expand(-len(used) % PRODUCTS_AT_ONCE, 2)])
    for part in used.split(PRODUCTS_AT_ONCE):
        row, i = part.unbind(1)
        chosen = paged.transpose(1, 2).index_select(0, pages[row, i]).to(x.dtype).flatten(0, 1)
        found = torch.bmm(x[row, :, :, i].flatten(0, 1), chosen.mT if by_keys else chosen)
        out[row, :, :, i] = found.unflatten(0, (-1, groups))
    return out


def attention_lse(q: Tensor, k: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The logarithm (B, H, T) of each query's sum of exp(q·k/√D), in float32 or a wider dtype; −inf for a query without keys."""
    mask = attention_mask(q, k.size(1), lengths, cu_seqlens)
    if mask is None:
        mask = torch.ones(k.size(1), k.size(1), dtype=torch.bool, device=q.device).tril()[None]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.size(2) // k.size(2), 2)
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), keys) / q.size(3) ** 0.5
    return scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1)


def with_rstd(x: Tensor) -> tuple[Tensor, Tensor]:
    """x and the factor (…) by which rms_norm multiplies each row, in float32 or a wider dtype. No gradient flows through it."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return x, (wide.square().mean(-1) + EPS).rsqrt()


def relu2_mlp(x: Tensor, w1: Tensor, w2: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """residual + relu(rms_norm(x)·w1ᵀ)²·w2ᵀ for x (…, C), w1 (F, C), w2 (C, F), and the factors of its rows."""
    y = F.linear(F.relu(F.linear(rms_norm(x), w1)).square(), w2)
    return with_rstd(y if residual is None else residual + y)


def output_projection(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """residual + x·weightᵀ for x (…, K), weight (C, K), and the factors of its rows."""
    y = F.linear(x, weight)
    return with_rstd(y if residual is None else residual + y)


def qkv_projection(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, D), k and v (B, T, G, D) of rms_norm(x) for x (B, T, C); q and k rotated and normalised; D = 2·cos.size(1)."""
    normed, width = rms_norm(x), 2 * cos.size(1)
    q, k, v = (F.linear(normed, w).unflatten(2, (-1, width)) for w in (w_q, w_k, w_v))
    return *qk_norm_rope(q, k, cos, sin, offset), v


def softcapped(z: Tensor, softcap: float) -> Tensor:
    """softcap·tanh(z/softcap), in float32 or a wider dtype."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return softcap * torch.tanh(z / softcap)


def softcapped_logits(x: Tensor, weight: Tensor, softcap: float = SOFTCAP) -> Tensor:
    """softcapped(x·weightᵀ) of x (…, C) and weight (V, C)."""
    return softcapped(x @ weight.t(), softcap)


def softcap_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    softcap: float = SOFTCAP,
    ignore_index: int = -1,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the softcapped logits (N, V) with targets (N,), in float32 or a wider dtype.

    "mean" divides by the number of targets that are not ignored, and is 0 if there are none. loss_weight, () or (N,),
    multiplies the losses before the reduction.
    """
    losses = F.cross_entropy(softcapped(logits, softcap), targets, ignore_index=ignore_index, reduction="none")
    if loss_weight is not None:
        losses = losses * loss_weight
    if reduction == "none":
        return losses
    return losses.sum() / (targets != ignore_index).sum().clamp(min=1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = SOFTCAP,
    ignore_index: int = -1,
    reduction: str = "mean",
    loss_weight: Tensor | None = None,
) -> Tensor:
    """softcap_cross_entropy of the logits x·weightᵀ with x (N, C), weight (V, C)."""
    return softcap_cross_entropy(F.linear(x, weight), targets, softcap, ignore_index, reduction, loss_weight)


def cache_append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    """Store k and v (B, T, G, D) in keys and values (B or 1, S, G, D), in place, from position lengths[b] of row b on."""
    positions = lengths[:, None] + torch.arange(k.size(1), device=k.device)
    row = torch.arange(k.size(0), device=k.device) if keys.size(0) == k.size(0) else torch.zeros_like(lengths)
    at = row[:, None], positions
    keys[at], values[at] = k, v


def newton_schulz(
    gradients: Tensor, coefficients: Sequence[tuple[float, float, float]] = 5 * (NEWTON_SCHULZ_COEFFICIENTS,)
) -> Tensor:
    """Approximate U·Vᵀ for each matrix U·S·Vᵀ of (…, m, n) in its own dtype, with one step for each (a, b, c).

    X = G/(‖G‖ + 1e-7), transposed if it is tall; each step computes A = X·Xᵀ, B = b·A + c·A², X ← a·X + B·X.
    """
    tall = gradients.size(-2) > gradients.size(-1)
    x = gradients.mT if tall else gradients
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + NORM_EPS)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def nesterov_momentum(
    gradient: Tensor, momentum: Tensor, clip: Tensor, mu: Tensor, dtype: torch.dtype
) -> tuple[Tensor, None]:
    """momentum ← (1 − mu)·g + mu·momentum with g = clip·gradient, in place; returns (1 − mu)·g + mu·momentum."""
    gradient = gradient * clip
    momentum.lerp_(gradient.to(momentum.dtype), 1 - mu)
    return gradient.lerp(momentum.to(gradient.dtype), mu).to(dtype), None


def apply_update(weight: Tensor, update: Tensor, rate: Tensor, factor: float, copy: Tensor | None = None) -> None:
    """weight ← weight − factor·rate·update, in place; `copy`, if given, receives the new weight in its own dtype."""
    weight.sub_(update.to(weight.dtype) * (factor * rate))
    if copy is not None:
        copy.copy_(weight)


def adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, variance: Tensor, clip: Tensor, rate: Tensor, biases: Tensor,
    factor: float, betas: tuple[float, float], eps: float, copy: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of AdamW without decay, in place; `copy`, if given, receives the new weight in its own dtype."""
    gradient = gradient.to(mean.dtype) * clip
    mean.lerp_(gradient, 1 - betas[0])
    variance.lerp_(gradient.square(), 1 - betas[1])
    weight.sub_((mean / biases[0]) / ((variance / biases[1]).sqrt() + eps) * (factor * rate))
    if copy is not None:
        copy.copy_(weight)


def sample_tokens(
    logits: Tensor, keys: Tensor, steps: Tensor, top_k: Tensor, temperature: Tensor, candidates: int, any_all: bool, alternatives: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The next token of each row of logits (R, V) and the most likely ones (R, 1 + alternatives), and their log-probabilities.

    A token is drawn by the largest logit/temperature + Gumbel noise. Of equal logits the smaller token comes first, and NaN before all
    numbers. Gumbel 1954; Maddison et al. 2014.
    """
    size = logits.size(1)
    tokens = torch.arange(size, device=logits.device)
    if candidates == 1:
        ranked = logits.argmax(1, keepdim=True)
    else:
        order = ordered(logits) << 32 | (size - 1 - tokens)
        ranked = size - 1 - (order.topk(candidates, dim=1).values & 0xFFFFFFFF)
    values = logits.gather(1, ranked)
    # differences by small temperatures overflow to −inf alone
    score = (values - values[:, :1]) / temperature[:, None] + gumbel_noise(keys, steps, ranked)
    outside = torch.arange(candidates, device=logits.device) >= top_k[:, None]
    choice = score.masked_fill(outside, -torch.inf).argmax(1, keepdim=True)
    chosen = ranked.gather(1, choice)
    if any_all:
        score = (logits - values[:, :1]) / temperature[:, None] + gumbel_noise(keys, steps, tokens[None])
        from_all = (top_k[:, None] == 0) & ~values[:, :1].isnan()
        chosen = torch.where(from_all, score.argmax(1, keepdim=True), chosen)
    tokens = torch.cat([chosen, ranked[:, :alternatives]], 1)
    return tokens, logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)


def ordered(x: Tensor) -> Tensor:
    """Integers in the order of float32 numbers, of which NaN is the largest."""
    bits = (x + 0.0).view(torch.int32)  # −0 becomes 0
    return torch.where(x.isnan(), 0x7FFFFFFF, bits ^ (bits >> 31 & 0x7FFFFFFF)).long()


def mixed(x: Tensor) -> Tensor:
    """A pseudorandom number below 2³² for each below 2³². Wellons 2018 (lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel_noise(keys: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """−ln(−ln u) for a random u in (0, 1) of each row's key (R, 2), step (R,) and tokens (R or 1, n)."""
    row = mixed(mixed(mixed(keys[:, 0]) ^ keys[:, 1]) ^ steps)
    number = mixed(mixed(tokens) ^ row[:, None])
    uniform = ((number >> 9).float() + 0.5) * 2.0**-23  # 23 bits: with more, the largest would be rounded to 1
    return -(-uniform.log()).log()
