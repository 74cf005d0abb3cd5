"""The launches of attention's kernels, each with its launch parameters; attention.py explains what they compute."""

import math
from functools import partial

import torch
from torch import Tensor

from nanochat_kernels import hopper_attention, hopper_attention_gradient, reference
from nanochat_kernels.attention_gradient_kernels import key_gradients_kernel, query_gradient_kernel
from nanochat_kernels.attention_kernels import combine_kernel, decode_kernel, forward_kernel
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.operation import Kernel
from nanochat_kernels.qk_norm_rope import tables
from nanochat_kernels.reference import EPS
from nanochat_kernels.triton_helpers import DTYPES, cdiv, launch, multiprocessors, power_of_2

HEAD_WIDTHS = (32, 64, 128)
LOG2E = math.log2(math.e)
SHARED_ROWS = 64  # at most, of a step of decoding whose programs share the parts
MOST_QUERIES = 64  # tokens times heads that read one key/value head, for which the keys are split
WIDEST_RANGE = 100.0  # powers of two between the smallest and the largest p that a bound may allow
FLOAT16_TOP, FLOAT16_RANGE = 15.0, 29.0  # p of at most 2¹⁵ and at least 2⁻¹⁴, below which float16 has fewer bits


def as_read(x: Tensor) -> Tensor:
    """Return x with stride 1 along the channels."""
    return x if x.stride(3) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def softmax_constants(bound: float | None, width: int, dtype: torch.dtype) -> dict[str, float | bool]:
    """Return SCALE, SHIFT, LEAST, MOST and BOUNDED of the kernels; BOUNDED is False without a bound or with one that is too wide.

    p = 2^(x − SHIFT) lies in 2^±(bound·log₂e) around 2^−SHIFT. In float16 the largest is 2¹⁵, and a bound is too wide if the smallest
    would be below the normal numbers: a query may have no other keys than those, and they would lose bits.
    """
    scale = LOG2E / math.sqrt(width)
    half = math.inf if bound is None else bound * LOG2E
    shift, least, bounded = 0.0, 2.0**-WIDEST_RANGE, 2 * half <= WIDEST_RANGE
    if dtype == torch.float16 and bounded:
        shift, bounded = half - FLOAT16_TOP, 2 * half <= FLOAT16_RANGE
        least = 2.0 ** (-half - shift - 1)  # half of what the bound allows, because q and k are rounded too
    return {
        "SCALE": scale, "SHIFT": shift if bounded else 0.0, "LEAST": least, "MOST": 2.0**WIDEST_RANGE, "BOUNDED": bounded,
    }  # fmt: skip


def results_of(q: Tensor, keep_lse: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    lse = torch.empty(batch, heads, tokens if keep_lse else 0, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def parameters_of(kernel: str, q: Tensor, is_whole: bool, parameters: dict[str, int] | None) -> dict[str, int]:
    """Return the launch parameters, from the table if none are given; is_whole: the kernels for sm_90 can take the call."""
    key = q.size(3), "whole" if is_whole else "any"
    parameters = parameters or launch_parameters(kernel, q.device, q.dtype, key)
    if "STAGES" in parameters and not is_whole:
        raise ValueError(f"{kernel}: {parameters} are for whole sequences on sm_90")
    return parameters


def lengths_arguments(lengths: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """Return what the kernels take as the pointer to the lengths and their stride."""
    return (other, 0) if lengths is None else (lengths, lengths.stride(0))


def page_arguments(
    k: Tensor, pages: Tensor | None, other: Tensor, parameters: dict[str, int]
) -> tuple[int, Tensor, int, dict[str, int]]:
    """Return the number of keys, what the kernels take as the pointer to the pages and as PAGE, and parameters that fit a page."""
    if pages is None:
        return k.size(1), other, 0, parameters
    page = k.size(1)
    return pages.size(1) * page, pages.contiguous(), page, parameters | {"BLOCK_N": min(parameters["BLOCK_N"], page)}


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, starts: Tensor | None, bound: float | None, keep_lse: bool,
    parameters: dict[str, int] | None = None, *, pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention_forward by a program for each block of queries. starts (B, T) int32: the first key of each query's document."""
    q, k, v = as_read(q), as_read(k), as_read(v)
    out, lse = results_of(q, keep_lse)
    batch, tokens, heads, width = q.shape
    constants = softmax_constants(bound, width, q.dtype)
    is_whole = lengths is None and starts is None and constants["BOUNDED"] and hopper_attention.takes(q, k, v)
    parameters = parameters_of("attention_forward", q, is_whole, parameters)
    if "STAGES" in parameters:
        hopper_attention.launch_tiles(q, k, v, out, lse, constants, keep_lse, parameters)
        return out, lse
    lengths_ptr, lengths_stride = lengths_arguments(lengths, q)
    keys, pages_ptr, page, parameters = page_arguments(k, pages, q, parameters)
    if out.numel():
        launch(
            forward_kernel, (batch * heads * cdiv(tokens, parameters["BLOCK_M"]),), q.device,
            q, k, v, lengths_ptr, q if starts is None else starts, pages_ptr, out, lse, lengths_stride, tokens, keys, heads,
            heads // k.size(2), batch, *strides(q, k, v),
            **constants, KEEP_LSE=keep_lse, LENGTHS=lengths is not None,
            STARTS=starts is not None, PAGE=page, WIDTH=width, **parameters,
        )  # fmt: skip
    return out, lse


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, bound: float | None, keep_lse: bool,
    parameters: dict[str, int] | None = None, *, pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention_forward by a program for each part of a row's keys, or for few rows with PROGRAMS as many on each multiprocessor, which
    share the parts; and one for each query that adds the parts."""
    q, k, v = as_read(q), as_read(k), as_read(v)
    out, lse = results_of(q, keep_lse)
    batch, tokens, heads, width = q.shape
    groups, share = k.size(2), heads // k.size(2)
    parameters = dict(parameters or launch_parameters("attention_decode", q.device, q.dtype, (width,)))
    parts_together, programs = parameters.pop("PARTS"), parameters.pop("PROGRAMS", 0)
    programs = programs if batch <= SHARED_ROWS else 0
    keys, pages_ptr, page, parameters = page_arguments(k, pages, q, parameters)
    parts = cdiv(keys, parameters["PART"])
    sums = torch.empty(batch * groups, parts, tokens * share, width, dtype=torch.float32, device=q.device)
    statistics = torch.empty(*sums.shape[:3], 3, dtype=torch.float32, device=q.device)
    lengths_ptr, lengths_stride = lengths_arguments(lengths, q)
    constants = softmax_constants(bound, width, q.dtype)
    flags = {"KEEP_LSE": keep_lse, "LENGTHS": lengths is not None, "WIDTH": width}
    if out.numel():
        grid = batch * groups, parts
        if programs:
            grid = (min(batch * groups * parts, programs * multiprocessors(q.device)),)
        launch(
            decode_kernel, grid, q.device,
            q, k, v, lengths_ptr, pages_ptr, sums, statistics, lengths_stride, tokens, keys, heads, share, batch,
            *strides(q, k, v),
            **{name: value for name, value in constants.items() if name not in ("LEAST", "MOST")}, **flags,
            PAGE=page, QUERIES=max(power_of_2(tokens * share), 16), ROWS=SHARED_ROWS if programs else 0,
            **parameters,
        )  # fmt: skip
        launch(
            combine_kernel, (batch * heads * tokens,), q.device,
            sums, statistics, lengths_ptr, out, lse, lengths_stride, tokens, keys, heads, share,
            **{name: value for name, value in constants.items() if name != "SCALE"}, **flags,
            PART=parameters["PART"], PARTS=parts_together, num_warps=1,
        )  # fmt: skip
    return out, lse


Projection = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]
"""rstd of the rows, rstd of the heads, cos, sin, sums (H + 2G, N), offset; see attention_gradient_kernels.store_gradient"""


def projection_arguments(projection: Projection | None, other: Tensor) -> tuple[tuple[Tensor, ...], Tensor, int]:
    """Return what the kernels take as pointers to rstd, the heads' rstd, cos and sin, as that to the sums, and as the offset."""
    if projection is None:
        return (other,) * 4, other, 0
    *factors, sums, offset = projection
    return tuple(factors), sums, offset


def gradient_constants(width: int, projection: Projection | None) -> dict[str, float | bool]:
    """Return what the kernels of both gradients take besides their sizes."""
    root = 1 / math.sqrt(width)
    return {"SCALE": LOG2E * root, "ROOT": root, "EPS": EPS, "PROJECTED": projection is not None}


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, lengths: Tensor | None,
    starts: Tensor | None, dq: Tensor, projection: Projection | None = None, parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Store the gradient of q in the first heads of dq (B, T, heads, D); return ⟨dout, out⟩ − dlse (B, H, T)."""
    q, k, v, dout = as_read(q), as_read(k), as_read(v), as_read(dout)
    batch, tokens, heads, width = q.shape
    delta = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    is_whole = lengths is None and starts is None and hopper_attention.takes(q, k, v, dout)
    parameters = parameters_of("attention_query_gradient", q, is_whole, parameters)
    lengths_ptr, lengths_stride = lengths_arguments(lengths, q)
    factors, sums, offset = projection_arguments(projection, q)
    if "STAGES" in parameters:
        hopper_attention_gradient.launch_query_gradient(
            q, k, v, out, dout, lse, dlse if dlse is None else dlse.contiguous(), dq, delta, (*factors, sums), offset,
            gradient_constants(width, projection), parameters,
        )  # fmt: skip
        return delta
    if q.numel():
        launch(
            query_gradient_kernel, (batch * heads * cdiv(tokens, parameters["BLOCK_M"]),), q.device,
            q, k, v, out, dout, lse, q if dlse is None else dlse.contiguous(), lengths_ptr, q if starts is None else starts,
            *factors, dq, delta, sums, lengths_stride, tokens, k.size(1), heads, heads // k.size(2), batch, dq.size(2),
            offset, *strides(q, k, v, dout),
            **gradient_constants(width, projection), DLSE=dlse is not None,
            LENGTHS=lengths is not None, STARTS=starts is not None, WIDTH=width, **parameters,
        )  # fmt: skip
    return delta


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, lengths: Tensor | None, ends: Tensor | None,
    dk: Tensor, dv: Tensor, projection: Projection | None = None, parameters: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Store the gradients of k and v (B, S, G, D) in dk and dv. With a projection, both are dq of query_gradient, of all heads."""
    q, k, v, dout = as_read(q), as_read(k), as_read(v), as_read(dout)
    batch, tokens, heads, width = q.shape
    is_whole = lengths is None and ends is None and hopper_attention.takes(q, k, v, dout)
    parameters = parameters_of("attention_key_gradients", q, is_whole, parameters)
    lengths_ptr, lengths_stride = lengths_arguments(lengths, q)
    factors, sums, offset = projection_arguments(projection, q)
    if "STAGES" in parameters:
        hopper_attention_gradient.launch_key_gradients(
            q, k, v, dout, lse, delta, dk, dv, (*factors, sums), offset, gradient_constants(width, projection), parameters
        )  # fmt: skip
        return
    if k.numel():
        launch(
            key_gradients_kernel, (batch * k.size(2) * cdiv(k.size(1), parameters["BLOCK_N"]),), q.device,
            q, k, v, dout, lse, delta, lengths_ptr, q if ends is None else ends, *factors, dk, dv, sums, lengths_stride,
            tokens, k.size(1), heads, heads // k.size(2), batch, dk.size(2), 0 if projection is None else heads, offset,
            *strides(q, k, v, dout),
            **gradient_constants(width, projection), LENGTHS=lengths is not None, ENDS=ends is not None, WIDTH=width,
            **parameters,
        )  # fmt: skip


def inputs(
    batch: int, tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as views of one tensor, q and k normalised over the head."""
    qkv = torch.empty(batch, tokens, heads + 2 * kv_heads, width, device=device, dtype=dtype).normal_()
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    for x in (q, k):
        x.copy_(reference.rms_norm(x))
    return q, k, v


def given_heads(
    key, dtype: torch.dtype, device: torch.device, batch: int = 32, tokens: int = 2048
) -> tuple[Tensor, ...]:
    """Return q, k, v and an upstream gradient at a production shape of a launch table's class."""
    heads = 1280 // key[0]
    q, k, v = inputs(batch, tokens, heads, heads, key[0], dtype, device)
    return q, k, v, torch.empty(q.shape, device=device, dtype=dtype).normal_()


def limits(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return lengths, and starts and ends of documents, that let every query see the keys up to its position."""
    lengths = torch.full((q.size(0),), q.size(1), dtype=torch.int64, device=q.device)
    starts = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    return lengths, starts, starts + q.size(1)


def in_pages(x: Tensor, page: int = 128) -> Tensor:
    """Return the keys or values x (B, S, G, D) as pages (B·S/page, page, G, D)."""
    return x.unflatten(1, (-1, page)).flatten(0, 1)


def table_of(x: Tensor, page: int = 128) -> Tensor:
    """Return the pages (B, S/page) that `in_pages` put the rows of x into."""
    return torch.arange(x.size(0) * x.size(1) // page, dtype=torch.int32, device=x.device).view(x.size(0), -1)


def forward_launches(key, dtype: torch.dtype, device: torch.device):
    q, k, v, _ = given_heads(key, dtype, device)
    bound = math.sqrt(key[0])

    def run(lengths=None, starts=None, bound=bound, keep_lse=True, tokens=2048, pages=None):
        given = q[:, :tokens], *(x[:, :tokens] if pages is None else in_pages(x) for x in (k, v))
        return partial(forward, *given, lengths, starts, bound, keep_lse, pages=pages)

    if key[1] == "whole":
        return {"training": run(), "no lse": run(keep_lse=False)}
    lengths, starts, _ = limits(q)
    return {
        "ragged": run(tokens=2047),
        "ragged, no lse": run(keep_lse=False, tokens=2047),
        "no bound": run(bound=None),
        "prefill": run(lengths, keep_lse=False),
        "prefill, no bound": run(lengths, bound=None, keep_lse=False),
        "prefill, pages": run(lengths, keep_lse=False, pages=table_of(k)),
        "documents": run(starts=starts),
        "documents, no bound": run(starts=starts, bound=None),
    }


def decode_launches(key, dtype: torch.dtype, device: torch.device):
    q, k, v, _ = given_heads(key, dtype, device, 64)
    lengths, *_ = limits(q)
    bound = math.sqrt(key[0])

    def run(tokens=1, bound=bound, lengths=lengths, keep_lse=False, pages=None):
        keys, values = (x if pages is None else in_pages(x) for x in (k, v))
        return lambda parameters: decode(q[:, :tokens], keys, values, lengths, bound, keep_lse, parameters, pages=pages)

    return {
        "one token": run(),
        "one token, pages": run(pages=table_of(k)),
        "no bound": run(bound=None),
        "all keys, lse": run(lengths=None, keep_lse=True),
        "many tokens": run(MOST_QUERIES),
        "many tokens, no bound": run(MOST_QUERIES, None),
        # short sequences, as in evaluation: the most of each QUERIES that are no multiple of 16
        **{f"{tokens} tokens, all keys": run(tokens, lengths=None) for tokens in (15, 31, MOST_QUERIES - 1)},
    }


def backward_launches(which: str, key, dtype: torch.dtype, device: torch.device):
    q, k, v, dout = given_heads(key, dtype, device)
    lengths, starts, ends = limits(q)
    heads = q.size(2)
    # of normalised heads: log T at most, and near log(t) + ½ for random ones
    lse = torch.arange(1, q.size(1) + 1, device=device).log().add(0.5).expand(q.size(0), heads, -1).contiguous()
    delta = torch.empty_like(lse).normal_().mul_(0.1)

    def run(lengths=None, starts=None, ends=None, dlse=None, joint=True, tokens=2048):
        given = [x[:, :tokens] for x in (q, k, v)]
        statistics = [x[..., :tokens].contiguous() for x in (lse, delta)]
        rows, projection = q.size(0) * tokens, None
        if joint:  # with the gradient of the projection
            dq = dk = dv = torch.empty(q.size(0), tokens, 3 * heads, key[0], dtype=dtype, device=device)
            rstd, head_rstd, sums = (torch.ones(*n, rows, device=device) for n in ((), (2 * heads,), (3 * heads,)))
            projection = (rstd, head_rstd, *tables(tokens, key[0], dtype, device), sums, 0)
        else:
            dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=device) for x in given)
        if which == "query":
            more = q[:, :tokens].contiguous(), dout[:, :tokens], statistics[0], dlse, lengths, starts, dq, projection
            return partial(query_gradient, *given, *more)
        return partial(key_gradients, *given, dout[:, :tokens], *statistics, lengths, ends, dk, dv, projection)

    if key[1] == "whole":
        return {"training": run(), "alone": run(joint=False, dlse=delta)}
    return {
        "documents": run(starts=starts, ends=ends),
        "documents, alone": run(starts=starts, ends=ends, joint=False),
        "ragged": run(tokens=2047),
        "ragged, alone": run(joint=False, tokens=2047),
        "lengths": run(lengths, joint=False),
    }


def tiles(*sizes: tuple[int, int, int, int]) -> tuple[dict[str, int], ...]:
    return tuple(
        {"BLOCK_M": m, "BLOCK_N": n, "GROUP": group, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in sizes
        for group in (1, 8)
    )


KEYS = ((64,), (128,))
FORWARD_SPACE = tiles(
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 8, 3), (128, 32, 4, 3),
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
)  # fmt: skip
# the kernels for sm_90
FORWARD_SPACE += tuple(
    {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP": group, "STAGES": 2, "TURNS": turns}
    for group in (8, 16, 32)
    for turns in (0, 1)
)
QUERY_SPACE = tiles(
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 2),
    (128, 32, 8, 3),
)  # fmt: skip
KEYS_SPACE = tiles(
    (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 3), (32, 64, 8, 2),
    (16, 128, 8, 2), (16, 128, 8, 3),
)  # fmt: skip
HOPPER_GRADIENTS = tuple(
    {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP": group, "STAGES": stages} for group in (8, 16, 32) for stages in (2, 3)
)
QUERY_SPACE, KEYS_SPACE = QUERY_SPACE + HOPPER_GRADIENTS, KEYS_SPACE + HOPPER_GRADIENTS
DECODE_SPACE = tuple(
    {"BLOCK_N": n, "PART": part, "PARTS": 16, "num_warps": warps, "num_stages": stages}
    for n, warps, stages in ((32, 2, 3), (64, 4, 3), (64, 2, 4), (128, 4, 2))
    for part in (128, 256, 512)
)
BY_WORD = tuple((*key, word) for word in ("whole", "any") for key in KEYS)
KERNELS = (
    Kernel("attention_forward", DTYPES[:2], BY_WORD, FORWARD_SPACE, forward_launches, ((32, "any"),)),
    Kernel("attention_decode", DTYPES[:2], KEYS, DECODE_SPACE, decode_launches, ((32,),)),
    Kernel(
        "attention_query_gradient",
        DTYPES[:2],
        BY_WORD,
        QUERY_SPACE,
        partial(backward_launches, "query"),
        ((32, "any"),),
    ),
    Kernel(
        "attention_key_gradients", DTYPES[:2], BY_WORD, KEYS_SPACE, partial(backward_launches, "keys"), ((32, "any"),)
    ),
)
