"""The launches that reference_test.cpp checks: those of every kernel with every set of its flags, at small shapes.

A launch is recorded as inspect does it: the arguments, strides and grids are those of Python. The shapes are those of the launch tables
that are small, and those of OWN where a table has none, or where sm_90 leaves the small ones to torch.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nanochat_kernels import (
    attention_launches,
    configs,
    cross_entropy_kernels,
    dispatch,
    folded_norm,
    fused_cross_entropy_kernels,
    inspect,
    qkv_projection_kernels,
    scaled_product,
)
from nanochat_kernels.operation import Kernel
from nanochat_kernels.reference import SOFTCAP
from nanochat_kernels.triton_helpers import Launch, triton

# the package's attributes with these names are functions
rms_norm, qk_norm_rope, cache_append, linear, qkv = (
    importlib.import_module(f"nanochat_kernels.{name}")
    for name in ("rms_norm", "qk_norm_rope", "cache_append", "linear", "qkv_projection")
)
META = torch.device("meta")
SMALL = 1_500_000  # elements
Runs = dict[str, Callable[[dict[str, int] | None], object]]
"""what Kernel.launches returns: functions of launch parameters, by flags"""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def norm_forward(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    for width, rows in ((1280, 77), (100, 80)):
        x, update = empty(rows, width, dtype=dtype), empty(rows, width, dtype=dtype)

        def forward(parameters, x=x, update=None, keep_rstd=True, result=dtype):
            return rms_norm.forward_plan(x, update, keep_rstd, result, parameters)(x, update)

        yield (
            f"{width}",
            {
                "rstd": forward,
                "no rstd": partial(forward, keep_rstd=False),
                "add, rstd": partial(forward, update=update),
                "autocast": partial(forward, update=update, result=torch.float32),
            },
        )


def norm_backward(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    for width, rows in ((1280, 77), (100, 80)):
        dy, dtotal, y, rstd = *(empty(rows, width, dtype=dtype) for _ in range(3)), empty(rows)

        def backward(parameters, dtotal=None, y=y, dy=dy, rstd=rstd):
            return rms_norm.backward_plan(dy, dtotal, y, rstd, dtype, parameters)(dy, dtotal, y, rstd)

        wide = {"y": y.float(), "dy": dy.float()}
        yield (
            f"{width}",
            {
                "norm": backward,
                "add": partial(backward, dtotal=dtotal),
                "autocast": partial(backward, dtotal=dtotal, **wide),
            },
        )


def row_rstd(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    yield from (
        (f"{width}", {"rstd": partial(folded_norm.row_rstd, empty(80, width, dtype=dtype))})
        for width in (1280, 96, 5001)
    )


def finish_rows(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    for parts in (20, 80, 3):
        finish = partial(partial, folded_norm.finish, empty(parts, 1001), 1280)
        yield f"{parts}", {"forward": finish(None), "backward": finish(empty(1001))}


def rope(dtype: torch.dtype, backward: bool) -> Iterator[tuple[str, Runs]]:
    for width, heads in ((128, 10), (96, 13)):
        q, k, dq, dk = (empty(2, 16, heads, width, dtype=dtype) for _ in range(4))
        cos, sin = (empty(64, width // 2, dtype=dtype) for _ in range(2))
        rstd, offsets = empty(heads, 2, 16), empty(2, dtype=torch.int64)

        def forward(parameters, offsets=None, rstd=True, result=dtype, q=q, k=k, cos=cos, sin=sin):
            return qk_norm_rope.forward_plan(q, k, cos, 3, offsets, rstd, result, result, parameters)(
                q, k, cos, sin, offsets
            )

        def back(parameters, dq=dq, dk=dk, offsets=None, q=q, k=k, rstd=rstd, cos=cos, sin=sin):
            plan = qk_norm_rope.backward_plan(q, k, dq, dk, cos, 3, offsets, dtype, dtype, parameters)
            return plan(q, k, dq, dk, rstd, rstd.clone(), cos, sin, offsets)

        wide = {name: x.float() for name, x in (("q", q), ("k", k), ("dq", dq), ("dk", dk))}
        yield f"{width}", {
            "both": back, "offsets": partial(back, offsets=offsets), "dq alone": partial(back, dk=None),
            "dk alone": partial(back, dq=None), "autocast": partial(back, **wide),
        } if backward else {
            "rstd": forward, "no rstd": partial(forward, rstd=False), "offsets, rstd": partial(forward, offsets=offsets),
            "offsets": partial(forward, q=q[:, :1], k=k[:, :1], offsets=offsets, rstd=False),
            "autocast": partial(forward, result=torch.float32),
        }  # fmt: skip


def qkv_projection(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    """Also with the parameters of a large product of whole tiles, because sm_90 leaves small ones to torch."""
    kernel = kernel_named("qkv_projection")
    yield from small(kernel, dtype)
    parameters = configs.launch_parameters(kernel.name, META, dtype, kernel.keys[-1])
    x, weight, rstd = empty(2, 256, 256, dtype=dtype), empty(3 * 2 * 128, 256, dtype=dtype), empty(512)
    cos, sin = (empty(320, 64, dtype=dtype) for _ in range(2))
    offsets = empty(2, dtype=torch.int64)

    def run(offset: int, offsets: Tensor | None):
        return lambda _: qkv.heads_of(x, weight, rstd, cos, sin, offset, offsets, 2, 2, parameters)

    yield "512x768x256", {"forward": run(3, None), "offsets": run(3, offsets)}


def qkv_backward(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    heads, width = 10, 128
    qkv, gradients = (empty(2, 48, 3 * heads, width, dtype=dtype) for _ in range(2))
    rstd, head_rstd, cos, sin = empty(96), empty(2 * heads, 96), *(empty(64, width // 2, dtype=dtype) for _ in range(2))

    def run(offsets: Tensor | None):
        given = *gradients.split(heads, 2), qkv, rstd, head_rstd, cos, sin, 3, offsets, heads * width
        return partial(qkv_projection_kernels.product_gradient, *given)

    yield "", {"backward": run(None), "offsets": run(empty(2, dtype=torch.int64))}


def heads_of(dtype: torch.dtype, width: int, tokens: int, batch: int = 2, heads: int = 3) -> tuple[Tensor, ...]:
    """Return q, k and v (B, T, H, D), which lie side by side in memory, and an upstream gradient."""
    parts = empty(batch, tokens, 3 * heads, width, dtype=dtype).split(heads, 2)
    return *parts, empty(batch, tokens, heads, width, dtype=dtype)


def attention_forward(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    for width in (128, 64):
        q, k, v, _ = heads_of(dtype, width, 384)
        ragged = [x[:, :333] for x in (q, k, v)]
        lengths, starts = empty(2, dtype=torch.int64), empty(2, 384, dtype=torch.int32)
        pages = [q, *(attention_launches.in_pages(x) for x in (k, v))]
        table, bound = empty(2, 3, dtype=torch.int32), math.sqrt(width)
        run = partial(partial, attention_launches.forward)
        yield (
            f"{width}",
            {
                "training": run(q, k, v, None, None, bound, True),
                "no lse": run(q, k, v, None, None, bound, False),
                "ragged": run(*ragged, None, None, bound, True),
                "no bound": run(q, k, v, None, None, None, True),
                "prefill": run(q[:, :100], k, v, lengths, None, bound, False),
                "prefill, no bound": run(q[:, :100], k, v, lengths, None, None, False),
                "prefill, pages": run(q[:, :100], *pages[1:], lengths, None, bound, False, pages=table),
                "documents": run(q, k, v, None, starts, bound, True),
                "documents, no bound": run(q, k, v, None, starts, None, True),
            },
        )


def attention_decode(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    q, k, v, _ = heads_of(dtype, 128, 640)
    lengths, bound = empty(2, dtype=torch.int64), math.sqrt(128)
    pages, table = [attention_launches.in_pages(x) for x in (k, v)], empty(2, 5, dtype=torch.int32)
    run = partial(partial, attention_launches.decode)
    yield (
        "",
        {
            "one token": run(q[:, :1], k, v, lengths, bound, False),
            "one token, pages": run(q[:, :1], *pages, lengths, bound, False, pages=table),
            "no bound": run(q[:, :1], k, v, lengths, None, False),
            "all keys, lse": run(q[:, :1], k, v, None, bound, True),
            "many tokens": run(q[:, :64], k, v, lengths, bound, False),
            "many tokens, no bound": run(q[:, :64], k, v, lengths, None, False),
            "40 tokens, all keys": run(q[:, :40], k, v, None, bound, False),
        },
    )


def attention_gradient(dtype: torch.dtype, of_query: bool) -> Iterator[tuple[str, Runs]]:
    for width in (128, 64):
        q, k, v, dout = heads_of(dtype, width, 384)
        lse, delta, dlse = (empty(2, 3, 384) for _ in range(3))
        tables = [empty(400, width // 2, dtype=dtype) for _ in range(2)]
        starts, ends, lengths = *(empty(2, 384, dtype=torch.int32) for _ in range(2)), empty(2, dtype=torch.int64)

        def run(
            limit=None,
            lengths=None,
            dlse=None,
            joint=True,
            tokens=384,
            given=(q, k, v, dout, lse, delta),
            width=width,
            tables=tables,
        ):
            x, statistics = [x[:, :tokens] for x in given[:4]], [x[..., :tokens].contiguous() for x in given[4:]]
            rows, projection = 2 * tokens, None
            if joint:  # with the gradient of the projection
                to = [empty(2, tokens, 9, width, dtype=dtype)] * 3
                projection = empty(rows), empty(6, rows), *tables, empty(9, rows), 16  # the library has multiples of 16
            else:
                to = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in x[:3]]
            if of_query:
                more = torch.empty_like(x[3]), x[3], statistics[0], dlse, lengths, limit and limit[0], to[0], projection
                return partial(attention_launches.query_gradient, *x[:3], *more)
            return partial(
                attention_launches.key_gradients, *x, *statistics, lengths, limit and limit[1], *to[1:], projection
            )

        yield f"{width}", {
            "training": run(), "alone": run(joint=False, dlse=dlse), "documents": run((starts, ends)),
            "documents, alone": run((starts, ends), joint=False), "ragged": run(tokens=333),
            "ragged, alone": run(joint=False, tokens=333), "lengths": run(lengths=lengths, joint=False),
        }  # fmt: skip


def cross_entropy(dtype: torch.dtype, which: str) -> Iterator[tuple[str, Runs]]:
    for width in (1024, 1023):
        logits, targets, sums, factor = (
            empty(45, width, dtype=dtype),
            empty(45, dtype=torch.int64),
            empty(45),
            empty(45),
        )
        given = logits, targets
        yield (
            f"{width}",
            {
                "on chip": {
                    "a factor": partial(cross_entropy_kernels.launch_on_chip, *given, factor[0], SOFTCAP, -1),
                    "no factor": partial(cross_entropy_kernels.launch_on_chip, *given, None, SOFTCAP, -1),
                },
                "sums": {"losses": partial(cross_entropy_kernels.launch_losses, *given, SOFTCAP, -1)},
                "gradient": {
                    "one factor": partial(cross_entropy_kernels.launch_gradient, *given, sums, factor[0], SOFTCAP, -1),
                    "a factor per row": partial(
                        cross_entropy_kernels.launch_gradient, *given, sums, factor, SOFTCAP, -1
                    ),
                },
            }[which],
        )


def loss_rows(_: torch.dtype) -> Iterator[tuple[str, Runs]]:
    sums, targets, logits, losses, coefficients = (
        empty(3, 272),
        empty(272, dtype=torch.int64),
        *(empty(272) for _ in range(3)),
    )
    gradient, factor = empty(272, 192, dtype=torch.bfloat16), empty(272)

    def run(factor: Tensor | None, coefficients: Tensor | None):
        return partial(
            fused_cross_entropy_kernels.launch_rows,
            sums,
            targets,
            logits,
            factor,
            losses,
            gradient,
            coefficients,
            SOFTCAP,
            -1,
        )

    yield "", {
        "one factor": run(factor[0], coefficients), "no factor": run(None, coefficients), "losses": run(None, None)
    }  # fmt: skip


def target_rows(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    given = empty(48, 1000), empty(80, 1000, dtype=dtype), empty(80, dtype=torch.int64), empty(80)
    yield "", {"targets": partial(fused_cross_entropy_kernels.add_target_rows, *given)}


def append(dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    runs = {"one token": 1, "a prompt": 5}
    yield (
        "",
        {
            name: partial(cache_append.run, *cache_append.inputs(3, tokens, 10, 128, 32, dtype, META))
            for name, tokens in runs.items()
        },
    )


def scaled(symmetric: bool, _: torch.dtype) -> Iterator[tuple[str, Runs]]:
    """Whole tiles, ragged tiles with descriptors on sm_90, and ragged tiles without."""
    name = "symmetric_product" if symmetric else "matrix_product"
    launched = [(False, symmetric, True, 0.0), (False, symmetric, False, 0.0)]  # by newton_schulz
    launched += [(True, False, False, 0.0), (False, True, True, 1.5)] if symmetric else []
    others = [(False, True, True, 1.5), (True, False, False, 0.0)]
    for size, key, batch, dtype, combinations in (
        (256, 256, 2, torch.float16, launched), (496, 1216, 1, torch.float16, others), (509, 1001, 1, torch.float16, others),
    ):  # fmt: skip
        found = configs.launch_parameters(name, META, dtype, (key, key, key))
        x, y, plus = (empty(batch, size, size, dtype=dtype) for _ in range(3))

        def run(x_transposed: bool, y_transposed: bool, adds: bool, gamma: float, given=(x, y, plus), found=found):
            options = {
                "x_transposed": x_transposed,
                "y_transposed": y_transposed,
                "symmetric": symmetric,
                "parameters": found,
            }
            numbers = {"alpha": 0.5, "beta": 2.0 if adds else 0.0, "gamma": gamma}
            return lambda _: scaled_product.scaled_product(*given[:2], given[2] if adds else None, **numbers, **options)

        yield (
            f"{size}",
            {
                f"x{'ᵀ' * x_t}·y{'ᵀ' * y_t}{', plus' * adds}{', diagonal' * bool(gamma)}": run(x_t, y_t, adds, gamma)
                for x_t, y_t, adds, gamma in combinations
            },
        )


def rows_product(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    """With the parameters of a large product of whole tiles, because sm_90 leaves small ones to torch."""
    kernel = kernel_named(name)
    parameters = configs.launch_parameters(name, META, dtype, kernel.keys[-1])
    x, y, factor = empty(256, 320, dtype=dtype), empty(320, 256, dtype=dtype), empty(256)
    run = partial(linear.scaled_rows, name, x, y)
    runs = {"dx": lambda _: run(parameters=parameters)}
    if name == "linear_cross_entropy_input_gradient":
        runs = {"a factor": lambda _: run(factor, parameters=parameters), "no factor": runs["dx"]}
    yield "", runs


def sampling(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    """Of the smallest vocabulary."""
    yield from ((shape, runs) for shape, runs in small(kernel_named(name), dtype) if "1001" in shape)


OWN: dict[str, Callable[[torch.dtype], Iterator[tuple[str, Runs]]]] = {
    "rms_norm_forward": norm_forward, "rms_norm_backward": norm_backward,
    "qk_norm_rope_forward": partial(rope, backward=False), "qk_norm_rope_backward": partial(rope, backward=True),
    "row_rstd": row_rstd, "finish_rows": finish_rows, "qkv_projection": qkv_projection, "qkv_backward": qkv_backward,
    "attention_forward": attention_forward, "attention_decode": attention_decode,
    "attention_query_gradient": partial(attention_gradient, of_query=True),
    "attention_key_gradients": partial(attention_gradient, of_query=False),
    "cross_entropy_on_chip": partial(cross_entropy, which="on chip"), "cross_entropy_sums": partial(cross_entropy, which="sums"),
    "cross_entropy_gradient": partial(cross_entropy, which="gradient"), "cross_entropy_rows": loss_rows,
    "cross_entropy_target_rows": target_rows,
    "cache_append": append, "symmetric_product": partial(scaled, True), "matrix_product": partial(scaled, False),
    **{name: partial(sampling, name) for name in ("sample_tokens_groups", "sample_tokens_choice")},
    **{name: partial(rows_product, name) for name in ("linear_cross_entropy_input_gradient", "output_projection_input_gradient")},
}  # fmt: skip


def kernel_named(name: str) -> Kernel:
    return next(kernel for kernel in dispatch.tunable_kernels() if kernel.name == name)


def memory(x: object) -> Tensor | None:
    """Return an argument that is a tensor, or the tensor of a descriptor."""
    return x if isinstance(x, Tensor) else getattr(x, "base", None)


def elements(launch: Launch) -> int:
    return sum(memory(x).numel() for _, x in flat(launch) if memory(x) is not None)


def small(kernel: Kernel, dtype: torch.dtype) -> Iterator[tuple[str, Runs]]:
    """Yield the shape classes of the launch tables whose launches are small."""
    for key in (*kernel.keys, *kernel.more_keys):
        if (
            max((elements(x) for found in inspect.record(kernel, key, dtype).values() for x in found), default=0)
            < SMALL
        ):
            yield configs.format_key(key), kernel.launches(key, dtype, META)


def flat(launch: Launch) -> Iterator[tuple[str, object]]:
    """Yield the arguments with their names as the library knows them (export.parameters), but tensors of descriptors."""
    for name, given in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        parts = ((f"{name}.{i}", x) for i, x in enumerate(given)) if isinstance(given, tuple) else ((name, given),)
        yield from ((name, x) for name, x in parts if not isinstance(x, triton.language.constexpr))
