"""Store new keys and values in a key/value cache, each row's behind the tokens that it has: one launch for both.

Notation: B rows, S positions of the cache, T new tokens, G key/value heads of width D. Rows may share one memory of S positions.
"""

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.checks import check_float, check_integers, check_shape, check_tensors
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.dispatch import choose
from nanochat_kernels.operation import DECODED_ROWS, Benchmark, Implementation, Kernel, Operation, Trial
from nanochat_kernels.triton_helpers import (
    DTYPES,
    cdiv,
    launch,
    power_of_2,
    tl,
    triton,
    triton_unsupported_reason,
)


@triton.jit
def cache_append_kernel(
    keys_ptr, values_ptr, k_ptr, v_ptr, lengths_ptr, lengths_stride, tokens, positions, heads,
    keys_batch_stride, keys_token_stride, keys_head_stride, values_batch_stride, values_token_stride, values_head_stride,
    k_batch_stride, k_token_stride, k_head_stride, v_batch_stride, v_token_stride, v_head_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy ROWS heads of tokens of one row of the batch."""
    batch = tl.program_id(1).to(tl.int64)
    position = tl.load(lengths_ptr + batch * lengths_stride)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, head, channel = (number // heads).to(tl.int64), (number % heads).to(tl.int64), tl.arange(0, BLOCK)
    inside = (number < tokens * heads) & (position + t >= 0) & (position + t < positions)
    mask = inside[:, None] & (channel < WIDTH)[None, :]
    from_k = batch * k_batch_stride + t * k_token_stride + head * k_head_stride
    from_v = batch * v_batch_stride + t * v_token_stride + head * v_head_stride
    to_keys = batch * keys_batch_stride + (position + t) * keys_token_stride + head * keys_head_stride
    to_values = batch * values_batch_stride + (position + t) * values_token_stride + head * values_head_stride
    k = tl.load(k_ptr + from_k[:, None] + channel[None, :], mask=mask)
    v = tl.load(v_ptr + from_v[:, None] + channel[None, :], mask=mask)
    tl.store(keys_ptr + to_keys[:, None] + channel[None, :], k, mask=mask)
    tl.store(values_ptr + to_values[:, None] + channel[None, :], v, mask=mask)


def run(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor, parameters: dict[str, int] | None = None
) -> None:  # fmt: skip
    batch, tokens, heads, width = k.shape
    parameters = dict(parameters or launch_parameters("cache_append", k.device, k.dtype, (width,)))
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    if k.numel():
        launch(
            cache_append_kernel, (cdiv(tokens * heads, parameters["ROWS"]), batch), k.device,
            keys, values, k, v, lengths, lengths.stride(0), tokens, keys.size(1), heads,
            *[stride for x in (keys, values) for stride in (x.stride(0) if x.size(0) == batch else 0, *x.stride()[1:3])],
            *[stride for x in (k, v) for stride in x.stride()[:3]],
            WIDTH=width, BLOCK=power_of_2(width), **parameters,
        )  # fmt: skip


def unsupported_reason(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> str | None:
    if keys.stride(3) != 1 or values.stride(3) != 1:
        return "the channels of a head must lie next to each other in the cache"
    if k.size(0) > 65_535:
        return f"{k.size(0):,} rows exceed the 65,535 of one launch; split them"
    return triton_unsupported_reason(k)


def cache_append(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, impl: str = "auto"
) -> None:  # fmt: skip
    """Store k and v (B, T, G, D) in keys and values (B, S, G, D) at the positions lengths[b], lengths[b] + 1, … of row b.

    keys and values may also be (1, S, G, D), one memory for all rows, in which lengths says where each row's tokens belong: of two
    rows with the same place either one is stored.
    lengths (B,): integers. The caller makes sure that all positions lie inside the cache: the fused implementation stores nothing
    outside it; the reference raises an error past its end, and counts a negative position from there. There is no gradient.
    Raises ValueError for mismatched shapes or devices and for tensors that require a gradient, TypeError for mismatched dtypes, and
    KernelRequestError (a ValueError) if the implementation named by impl does not support the call.
    """
    check_float("cache_append", keys=keys, values=values, k=k, v=v)
    check_tensors("cache_append", lengths=lengths)
    check_shape("cache_append", "keys", keys, "B or 1", "S", "G", "D")
    check_shape("cache_append", "values", values, *keys.shape)
    check_shape("cache_append", "k", k, "B" if keys.size(0) == 1 else keys.size(0), "T", *keys.shape[2:])
    check_shape("cache_append", "v", v, *k.shape)
    check_integers("cache_append", k, "lengths", lengths, k.size(0))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (keys, values, k, v)):
        raise ValueError(
            "cache_append: it computes no gradient, but a tensor requires one; call it under torch.no_grad()"
        )
    choose(CACHE_APPEND, impl, keys, values, k, v, lengths)(keys, values, k, v, lengths)


def inputs(
    rows: int, tokens: int, heads: int, width: int, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return a cache of which each row is filled to another length, and views of new heads."""
    keys, values = (torch.empty(rows, positions, heads, width, device=device, dtype=dtype).normal_() for _ in range(2))
    k, v = torch.empty(rows, tokens, 2 * heads, width, device=device, dtype=dtype).normal_().split(heads, 2)
    lengths = torch.arange(rows, device=device) % (positions - tokens + 1)
    return keys, values, k, v, lengths


def launches(key, dtype: torch.dtype, device: torch.device):
    given = {
        name: inputs(64, tokens, 1280 // key[0], key[0], 256, dtype, device)
        for name, tokens in (("one token", 1), ("a prompt", 128))
    }
    return {name: lambda parameters, x=x: run(*x, parameters) for name, x in given.items()}


SPACE = tuple({"ROWS": rows, "num_warps": 4} for rows in (4, 8, 16))
KERNELS = (Kernel("cache_append", DTYPES, ((64,), (128,)), SPACE, launches, ((40,),)),)


def trials(shape, device: torch.device, dtype: torch.dtype):
    sizes = shape.kv_heads, shape.width // shape.heads
    given = inputs(DECODED_ROWS, 1, *sizes, 256, dtype, device)
    yield Trial(given, tuple(range(5)), in_place=(0, 1))


CACHE_APPEND = Operation(
    "cache_append", cache_append, reference.cache_append, {"triton": Implementation(run, unsupported_reason)}, KERNELS, trials,
    Benchmark(
        ("d12", "d20", "d26", "d32"),
        lambda shape, dtype, device: inputs(64, 1, {"d12": 6, "d20": 10, "d26": 13, "d32": 16}[shape], 128, 2048, dtype, device),
        (), lambda arguments, part: 4 * arguments[2].numel(), lambda arguments, part, variant: 0, modes=("fwd",),
    ),
)  # fmt: skip
OPERATIONS = (CACHE_APPEND,)
