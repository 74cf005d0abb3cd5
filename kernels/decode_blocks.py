"""One new token of each row through all blocks of the model, in one launch.

What a token of few rows must wait for is that the weights are read. With a kernel for each operation, each of them pays for its
beginning and its end besides, 200 times a token. Here as many programs as the GPU runs at the same time stay for the whole step, and
wait for each other between the phases of a block. Spector et al. 2025 (one kernel for a forward pass of a language model).

Notation: R rows, L blocks, C channels, H heads and G key/value heads of width D, F hidden channels of the MLP, N pages of P tokens.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_kernels import reference
from nanochat_kernels.attention_launches import softmax_constants
from nanochat_kernels.checks import check_device, check_float, check_integers, check_shape
from nanochat_kernels.configs import launch_parameters
from nanochat_kernels.decode_blocks_kernels import decode_blocks_kernel
from nanochat_kernels.dispatch import choose
from nanochat_kernels.operation import (
    MODEL_WIDTHS,
    MORE_WIDTHS,
    TUNED_WIDTHS,
    Benchmark,
    Implementation,
    Kernel,
    Operation,
    Trial,
)
from nanochat_kernels.reference import EPS
from nanochat_kernels.triton_helpers import (
    DTYPES,
    cdiv,
    launch,
    multiprocessors,
    needs_gradient,
    power_of_2,
    triton_unsupported_reason,
)

Weights = Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
"""of each block: queries (H·D, C), keys and values (G·D, C), attention's projection (C, H·D), the MLP's up (F, C) and down (C, F)"""
ROWS = 64  # of a launch; more take several
COLUMNS = 16  # of a unit of work, and rows of a block
PART, PARTS = (
    128,
    16,
)  # keys of a part, which pages and blocks divide, and parts that are added at a time: the same for any number of rows
PHASES, ATTEND = 6, 2  # of a block


@functools.cache
def addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """The weights' addresses on the device. They are kept, because captured graphs read them."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def block_of(widths: tuple[int, ...], most: int) -> int:
    """The largest power of two that divides all widths, up to `most`."""
    return min(most, math.gcd(*widths) & -math.gcd(*widths))


def run(
    x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, pages: Tensor,
    parameters: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    layers, width, (_, _, page, kv_heads, head) = len(weights), x.size(1), keys.shape
    heads, hidden = weights[0][0].size(0) // head, weights[0][4].size(0)
    parameters = dict(
        parameters or launch_parameters("decode_blocks", x.device, x.dtype, (min(x.size(0), ROWS), width))
    )
    parameters["BLOCK_K"] = block_of((width, heads * head, hidden), parameters["BLOCK_K"])
    parameters["BLOCK_N"] = min(parameters["BLOCK_N"], page)
    parameters["UP"] = block_of((hidden,), parameters["UP"])
    programs = parameters.pop("PROGRAMS") * multiprocessors(x.device)
    constants = softmax_constants(math.sqrt(head), head, x.dtype)
    del constants["BOUNDED"]
    table = addresses(tuple(w.data_ptr() for block in weights for w in block), x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pages, lengths, given = pages.to(torch.int32).contiguous(), lengths.contiguous(), x.contiguous()
    parts = cdiv(pages.size(1) * page, PART)
    for first in range(0, x.size(0), ROWS):
        rows = min(ROWS, x.size(0) - first)
        most, part = COLUMNS if rows <= COLUMNS else ROWS, slice(first, first + rows)
        of_row = (
            width // COLUMNS
            + (heads + 2 * kv_heads) * head
            + (heads + kv_heads) * (head // 32)
            + heads * parts * (1 + head)
        )
        memory = torch.empty(most * of_row, dtype=torch.float32, device=x.device)
        rounded = torch.empty(most * (heads * head + hidden), dtype=x.dtype, device=x.device)
        made = launches_of(layers, rows, x.device.type)
        counters = torch.zeros(len(made), 4, dtype=torch.int32, device=x.device)  # each at a multiple of 16 bytes
        for counter, (first_phase, last_phase, first_layer, last_layer) in zip(counters, made, strict=True):
            alone = first_phase == last_phase == ATTEND  # whose programs need not wait for each other
            launch(
                decode_blocks_kernel, (rows * kv_heads * parts if alone else programs,), x.device,
                given[part], out[part], table, cos, sin, keys, values, lengths[part], pages[part], memory, rounded, counter,
                rows, layers, first_layer, last_layer, pages.size(1), parts, *keys.stride()[:4],
                WIDTH=width, HEADS=heads, KV_HEADS=kv_heads, HEAD=head, HIDDEN=hidden, **constants, EPS=EPS, PAGE=page,
                BLOCKS=most // COLUMNS, SQUARES=power_of_2(width // COLUMNS), FIRST=first_phase, LAST=last_phase,
                PART=PART, PARTS=PARTS, launch_cooperative_grid=not alone, **parameters,
            )  # fmt: skip
    return out


def launches_of(layers: int, rows: int, device: str) -> list[tuple[int, int, int, int]]:
    """(FIRST, LAST, first_layer, last_layer) of each launch of the kernel.

    One for few rows. For many, reading the keys is most of the work, and takes more programs than can wait for each other. The
    interpreter runs one program after the other, which cannot wait either: each phase is a launch there.
    """
    if device == "cpu":
        return [
            (0, 0, 0, 0),
            *((phase, phase, layer, layer + 1) for layer in range(layers) for phase in range(1, PHASES + 1)),
        ]
    if rows <= COLUMNS:
        return [(0, PHASES, 0, layers)]
    later = (((ATTEND, ATTEND, n, n + 1), (ATTEND + 1, PHASES + 1, n, n + 1)) for n in range(layers))
    return [(0, 1, 0, 1), *(launch for pair in later for launch in pair)]


def run_reference(
    x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, pages: Tensor
) -> Tensor:
    live = lengths >= 0
    out, x, lengths, pages = x.clone(), x[live][:, None], lengths[live], pages[live].long()
    page = keys.size(2)
    at = pages.gather(1, (lengths // page)[:, None])[:, 0], lengths % page
    for layer, (w_q, w_k, w_v, w_o, w_up, w_down) in enumerate(weights):
        q, k, v = reference.qkv_projection(x, w_q, w_k, w_v, cos, sin, lengths)
        keys[layer][at], values[layer][at] = k[:, 0], v[:, 0]
        y = reference.paged_attention(q, keys[layer], values[layer], pages, lengths + 1)
        x, _ = reference.output_projection(y.flatten(2), w_o, x)
        x, _ = reference.relu2_mlp(x, w_up, w_down, x)
    out[live] = x[:, 0]
    return out


def unsupported_reason(x, weights, cos, sin, keys, values, lengths, pages) -> str | None:
    page, kv_heads, head = keys.shape[2:]
    heads, widths = weights[0][0].size(0) // head, (x.size(1), weights[0][4].size(0))
    if head not in (64, 128):
        return f"heads of {head} channels; the kernel takes 64 and 128"
    if x.dtype not in DTYPES[:2] or not softmax_constants(math.sqrt(head), head, x.dtype)["BOUNDED"]:
        return f"the kernel takes bfloat16, and float16 where it holds all probabilities, got {x.dtype} with heads of {head}"
    if any(n % 64 for n in widths):
        return f"widths must be multiples of 64, got {widths}"
    if heads // kv_heads > COLUMNS:
        return f"{heads // kv_heads} heads read one key/value head; the kernel takes {COLUMNS}"
    if page < 16 or page & (page - 1):
        return f"pages of {page} keys; the kernel takes powers of two from 16 on"
    if not all(w.is_contiguous() and w.data_ptr() % 16 == 0 for block in weights for w in block):
        return "a weight's rows must lie next to each other, from a multiple of 16 bytes on"
    if keys.stride(4) != 1 or keys.stride() != values.stride() or not (cos.is_contiguous() and sin.is_contiguous()):
        return "keys and values must lie alike, channels of a head next to each other, and the tables of positions be contiguous"
    if needs_gradient(x, keys, values, *(w for block in weights for w in block)):
        return "it computes no gradient; call it under torch.no_grad()"
    return triton_unsupported_reason(x)


def decode_blocks(
    x: Tensor,
    weights: Weights,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    pages: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return the residual stream (R, C) after all blocks, for that before them, x (R, C), of one new token of each row.

    weights: six matrices of each block (see Weights), without gradients, which must stay where they are as long as graphs are replayed
    that were captured from this call. cos, sin (positions, D/2). keys, values (L, N, P, G, D): the cache, to which the new token's are
    added. lengths (R,): integers, the tokens of each row before; −1 for a row without a conversation, for which nothing is stored and
    whose result means nothing. pages (R, n): integers, the pages of each row, one of which has place for the new token.
    A row's result and what is stored depend on no other row, and are bitwise equal in repeated calls.
    The fused implementation needs all multiprocessors of the GPU: no other kernel that waits for this one may run beside it.
    Raises ValueError for mismatched shapes or devices, TypeError for mismatched dtypes, and KernelRequestError (a ValueError) if the
    implementation named by impl does not support the call.
    """
    check(x, weights, cos, sin, keys, values, lengths, pages)
    arguments = x, weights, cos, sin, keys, values, lengths, pages
    return choose(DECODE_BLOCKS, impl, *arguments)(*arguments)


def check(x, weights, cos, sin, keys, values, lengths, pages) -> None:
    name = "decode_blocks"
    check_float(name, x=x, keys=keys, values=values)
    check_shape(name, "x", x, "R", "C")
    check_shape(name, "keys", keys, len(weights), "N", "P", "G", "D")
    check_shape(name, "values", values, *keys.shape)
    kv_width, head = keys.size(3) * keys.size(4), keys.size(4)
    for block, (w_q, w_k, w_v, w_o, w_up, w_down) in enumerate(weights):
        given = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o, "w_up": w_up, "w_down": w_down}
        check_float(name, x=x, **{f"{key} of block {block}": w for key, w in given.items()})
        check_shape(name, f"w_q of block {block}", w_q, "H·D", x.size(1))
        check_shape(name, f"w_up of block {block}", w_up, "F", x.size(1))
        shapes = (kv_width, x.size(1)), (kv_width, x.size(1)), (x.size(1), w_q.size(0)), (x.size(1), w_up.size(0))
        for key, shape in zip(("w_k", "w_v", "w_o", "w_down"), shapes, strict=True):
            check_shape(name, f"{key} of block {block}", given[key], *shape)
        if w_q.size(0) % kv_width or w_q.size(0) != weights[0][0].size(0) or w_up.size(0) != weights[0][4].size(0):
            raise ValueError(
                f"{name}: all blocks must have the same widths, and {keys.size(3)} key/value heads serve a multiple of as many heads; "
                f"block {block} has {w_q.size(0) // head} heads and {w_up.size(0)} hidden channels"
            )
    check_shape(name, "cos", cos, "positions", head // 2)
    check_shape(name, "sin", sin, *cos.shape)
    check_device(name, x=x, cos=cos, sin=sin)
    check_shape(name, "pages", pages, x.size(0), "n")
    check_integers(name, x, "lengths", lengths, x.size(0))
    check_integers(name, x, "pages", pages.flatten(), pages.numel())


def inputs(
    rows: int, layers: int, width: int, heads: int, kv_heads: int, filled: int, dtype: torch.dtype, device: torch.device
) -> tuple:
    """Return random arguments: rows with up to `filled` tokens, and one without a conversation."""
    head, page = width // heads, 128

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_().mul_(shape[-1] ** -0.5)

    shapes = (width, width), *[(kv_heads * head, width)] * 2, (width, width), (4 * width, width), (width, 4 * width)
    weights = tuple(tuple(random(*shape) for shape in shapes) for _ in range(layers))
    pages_of_row = cdiv(filled + 1, page)
    keys, values = (
        torch.empty(layers, 1 + rows * pages_of_row, page, kv_heads, head, device=device, dtype=dtype) for _ in range(2)
    )
    keys.uniform_(-1, 1)  # scores are at most √D
    values.normal_()
    angles = torch.rand(pages_of_row * page, head // 2, device=device) * 6.28
    lengths = filled - torch.arange(rows, device=device) * filled // max(rows, 2)
    if rows > 2:
        lengths[rows // 2] = -1
    pages = 1 + torch.arange(rows * pages_of_row, device=device).view(rows, pages_of_row)
    x = torch.empty(rows, width, device=device, dtype=dtype).normal_()
    return x, weights, angles.cos().to(dtype), angles.sin().to(dtype), keys, values, lengths, pages


def launches(key, dtype: torch.dtype, device: torch.device):
    rows, width = key
    head = 128 if width % 128 == 0 else 64
    given = inputs(rows, 4, width, width // head, width // head, 1000, dtype, device)
    return {"tokens": lambda parameters: run(*given, parameters)}


def configuration(k: int, stages: int, programs: int, n: int, up: int) -> dict[str, int]:
    return {"BLOCK_K": k, "BLOCK_N": n, "UP": up, "PROGRAMS": programs, "num_warps": 4, "num_stages": stages}


SPACE = tuple(
    configuration(k, stages, programs, n, up)
    for k, stages, programs in (
        (256, 4, 1),
        (256, 5, 1),
        (256, 3, 1),
        (128, 6, 1),
        (128, 4, 1),
        (128, 4, 2),
        (128, 3, 2),
    )
    for n in (32, 64)
    for up in (32, 64)
)
KERNELS = (
    Kernel(
        "decode_blocks", DTYPES[:2], tuple((rows, width) for width in TUNED_WIDTHS for rows in (COLUMNS, ROWS)), SPACE, launches,
        tuple((rows, width) for width in MORE_WIDTHS for rows in (1, ROWS)),
    ),
)  # fmt: skip


def trials(shape, device: torch.device, dtype: torch.dtype):
    given = inputs(
        min(shape.rows, 8), min(shape.depth, 2), shape.width, shape.heads, shape.kv_heads, 300, dtype, device
    )
    yield Trial(given, (), (), in_place=(4, 5), timed=False)


def matrix_elements(arguments: tuple) -> int:
    return sum(w.numel() for block in arguments[1] for w in block)


def benchmark_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple:
    heads = MODEL_WIDTHS[shape] // 128
    return inputs(8, 4, 128 * heads, heads, heads, 2000, dtype, device)


DECODE_BLOCKS = Operation(
    "decode_blocks", decode_blocks, run_reference, {"triton": Implementation(run, unsupported_reason)}, KERNELS, trials,
    Benchmark(
        ("d12", "d20", "d26", "d32"), benchmark_inputs, (), lambda arguments, part: matrix_elements(arguments),
        lambda arguments, part, variant: 2 * len(arguments[0]) * matrix_elements(arguments), modes=("fwd",),
    ),
)  # fmt: skip
OPERATIONS = (DECODE_BLOCKS,)
