"""Rotary position and QK-norm in one operation: rotate q and k by −θ(position), then RMSNorm over the head.

[x1, x2] → [x1·cos + x2·sin, −x1·sin + x2·cos] on the two halves of a head, tables of one row a position.
"""

from torch import Tensor

from kernels import reference
from kernels.checks import check_float, check_shape
from kernels.dispatch import choose

IMPLEMENTATIONS = {"reference": reference.qk_norm_rope}


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int | Tensor = 0, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate and normalise q (B, T, H, D) and k (B, T, G, D); the results have their shapes and dtypes.

    cos, sin: (positions, D/2). offset: position of the first token, one integer or one a row (B,).
    Raises ValueError for an odd D, heads that are no multiple of the key heads, tables that do not match or are too
    short, and TypeError for unlike dtypes. Su et al. 2021 (rotation), Henry et al. 2020 (norm of q and k).
    """
    check_float("qk_norm_rope", q=q, k=k)
    check_shape("qk_norm_rope", "q", q, "B", "T", "H", "D")
    batch, tokens, heads, width = q.shape
    check_shape("qk_norm_rope", "k", k, batch, tokens, "G", width)
    if width % 2:
        raise ValueError(f"qk_norm_rope: the head width must be even to be rotated in halves, got {width}")
    if heads % k.size(2):
        raise ValueError(f"qk_norm_rope: {heads} query heads are no multiple of {k.size(2)} key heads")
    check_shape("qk_norm_rope", "cos", cos, "positions", width // 2)
    check_shape("qk_norm_rope", "sin", sin, *cos.shape)
    if isinstance(offset, Tensor):
        check_shape("qk_norm_rope", "offset", offset, batch)
    elif offset < 0 or offset + tokens > cos.size(0):
        raise ValueError(
            f"qk_norm_rope: positions {offset} to {offset + tokens - 1} pass the {cos.size(0)} rows of the tables"
        )
    return choose("qk_norm_rope", impl, IMPLEMENTATIONS)(q, k, cos, sin, offset)
