"""qk_norm_rope in Triton against the reference."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import plan, reference
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_compiled, check_graph_replay, randn
from tests.kernels.int64 import narrow_offsets

FILE = importlib.import_module("nanochat_kernels.qk_norm_rope")


def rope(q, k, cos, sin, offset=0):
    return kernels.qk_norm_rope(q, k, cos, sin, offset, impl="triton")


def tables(positions: int, width: int, dtype: torch.dtype = torch.float32):
    angles = torch.arange(positions)[:, None] * kernels.ROPE_BASE ** (
        -torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def inputs(batch, tokens, groups, share, width, dtype, seed=0, layouts=("contiguous", "contiguous"), offset=0, more=0):
    q = randn(batch, tokens, groups * share, width, dtype=dtype, seed=seed, layout=layouts[0])
    k = randn(batch, tokens, groups, width, dtype=dtype, seed=seed + 1, layout=layouts[1])
    return [q, k, *tables(tokens + more, width, dtype), offset]


@harness.property_test
@example(
    batch=2,
    tokens=19,
    groups=2,
    share=3,
    width=48,
    dtype=torch.bfloat16,
    layouts=("slice", "transposed"),
    offset=5,
    seed=1,
)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 19),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    width=st.sampled_from((16, 18, 32, 48)),
    dtype=harness.dtypes,
    layouts=st.tuples(harness.layouts, harness.layouts),
    offset=st.integers(0, 5),
    seed=harness.seeds,
)
def test_qk_norm_rope(batch, tokens, groups, share, width, dtype, layouts, offset, seed):
    given_ = inputs(batch, tokens, groups, share, width, dtype, seed, layouts, offset, more=offset)
    check(rope, reference.qk_norm_rope, given_, [0, 1], seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 6])
def test_narrow_heads(width, dtype):
    """Only forward is checked; see test_narrow_rows of test_rms_norm.py."""
    check(rope, reference.qk_norm_rope, inputs(2, 3, 1, 2, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128])
def test_model_widths(width, dtype):
    batch, tokens = (4, 1023) if GPU else (1, 17)
    check(rope, reference.qk_norm_rope, inputs(batch, tokens, 2, 5, width, dtype), [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [256, 1024])
def test_wide_heads(width, dtype):
    """Heads wider than those in the launch tables take smaller tiles."""
    check(rope, reference.qk_norm_rope, inputs(1, 5, 2, 2, width, dtype), [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_offset_of_each_row(dtype, index):
    """The call of decoding: one token in each row, at the row's own position."""
    given_ = inputs(3, 1, 1, 2, 16, dtype, more=40)
    given_[-1] = torch.tensor([0, 40, 7], device=DEVICE, dtype=index)
    check(rope, reference.qk_norm_rope, given_, [0, 1])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_strided_offsets(index):
    given_ = inputs(3, 2, 1, 2, 16, torch.float32, more=40)
    every_second = torch.tensor([0, 1, 40, 2, 7, 3], device=DEVICE, dtype=index)[::2]
    one_for_all = torch.tensor([5], device=DEVICE, dtype=index).expand(3)
    for offset in (every_second, one_for_all):
        check(rope, reference.qk_norm_rope, [*given_[:-1], offset], [0, 1])


def test_tables_that_are_not_contiguous():
    q, k, cos, sin, _ = inputs(2, 5, 1, 2, 16, torch.float32)
    cos = cos.t().contiguous().t()
    sin = torch.stack([sin, sin + 1], -1)[..., 0]
    assert not cos.is_contiguous() and not sin.is_contiguous()
    check(rope, reference.qk_norm_rope, [q, k, cos, sin, 0], [0, 1])


def test_views_of_one_projection():
    """q and k may be slices of one tensor (B, T, 3, H, D)."""
    both = randn(2, 5, 3, 2, 16, dtype=torch.float32)
    check(rope, reference.qk_norm_rope, [both[:, :, 0], both[:, :, 1], *tables(5, 16), 0], [0, 1])


def test_rotation_keeps_norms_and_depends_on_distance():
    q, k = (randn(1, 1, 1, 32, dtype=torch.float32, seed=i) for i in range(2))
    cos, sin = tables(100, 32)

    def score(at, back):
        rotated_q, _ = rope(q, k, cos, sin, at)
        _, rotated_k = rope(q, k, cos, sin, at - back)
        return float((rotated_q * rotated_k).sum())

    assert abs(score(10, 7) - score(80, 7)) < 1e-4
    assert abs(score(10, 7) - score(10, 3)) > 1e-3
    torch.testing.assert_close(rope(q, k, cos, sin, 50)[0].square().mean(-1), torch.ones(1, 1, 1, device=DEVICE))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batch(shape):
    q, k = torch.empty(*shape, 4, 8, device=DEVICE), torch.empty(*shape, 2, 8, device=DEVICE)
    check(rope, reference.qk_norm_rope, [q, k, *tables(3, 8), 0], [0, 1])


def test_a_position_outside_of_the_tables_gives_nan_and_no_stray_read():
    q, k, *_ = inputs(4, 1, 1, 1, 8, torch.float32)
    cos, sin = (table[20:25] for table in tables(200, 8))  # with other rows in memory before and after them
    out, _ = rope(q, k, cos, sin, torch.tensor([4, 5, 99, -3], device=DEVICE))
    assert out[0].isfinite().all() and out[1:].isnan().all()


def test_zero_heads_have_no_nan():
    q, k, cos, sin, _ = inputs(1, 3, 1, 2, 16, torch.float32)
    check(rope, reference.qk_norm_rope, [torch.zeros_like(q), torch.zeros_like(k), cos, sin, 0], [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype):
    harness.check_nonfinite(rope, reference.qk_norm_rope, inputs(2, 5, 1, 2, 16, dtype), [0, 1])


def test_autocast():
    q, k, cos, sin, _ = inputs(2, 5, 1, 2, 16, torch.float32)
    harness.check_autocast(
        lambda q, k: rope(q, k, cos, sin), lambda q, k: reference.qk_norm_rope(q, k, cos, sin), [q, k], [0, 1]
    )


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradient_that_is_needed(needed, monkeypatch):
    """Backward computes only q's or k's heads if the other input needs no gradient or the other result is not used."""
    both = inputs(2, 3, 1, 4, 16, torch.float32)
    grids, launch = [], plan.launch
    monkeypatch.setattr(
        plan, "launch", lambda kernel, grid, *a, **b: grids.append(grid) or launch(kernel, grid, *a, **b)
    )

    def gradient(function, requires, uses):
        leaves = [x.clone().requires_grad_(i in requires) if i < 2 else x for i, x in enumerate(both)]
        results = function(*leaves)
        # in the reference k's result requires no gradient if only q does
        outputs = [results[i] for i in uses if results[i].requires_grad]
        grids.clear()
        upstream = [torch.full_like(x, 0.5) + x.detach().flip(-1) for x in outputs]
        return torch.autograd.grad(outputs, [leaves[i] for i in requires if requires == uses or i == needed], upstream)

    alone = []
    for requires, uses in (([needed], [0, 1]), ([0, 1], [needed])):
        expected = gradient(reference.qk_norm_rope, requires, uses)
        torch.testing.assert_close(gradient(rope, requires, uses), expected)
        alone += [programs for _, programs in grids]
    gradient(rope, [0, 1], [0, 1])
    assert alone[0] == alone[1] < grids[0][1] and len(alone) == 2 and len(grids) == 1
    q, k, *rest = (x.clone().requires_grad_() if i < 2 else x for i, x in enumerate(both))
    unused = torch.autograd.grad(rope(q, k, *rest)[needed].sum(), (k, q)[needed], allow_unused=True)
    assert unused == (None,)


def test_derivatives_that_do_not_exist_raise():
    harness.check_second_derivative_raises(rope, inputs(2, 3, 1, 2, 16, torch.float32), [0, 1])
    harness.check_jvp_raises(rope, inputs(2, 3, 1, 2, 16, torch.float32), [0, 1])


def test_vmap():
    given_ = inputs(2, 3, 1, 2, 16, torch.float32, more=4)
    harness.check_vmap(rope, given_, (0, 1), [0, 1])
    harness.check_vmap(rope, [*given_[:-1], torch.tensor([0, 4], device=DEVICE)], (0, 1, 4), [0, 1])


@pytest.mark.parametrize("kernel", FILE.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    q, k, cos, sin, _ = inputs(1, 5, 1, 3, 12, torch.float32)
    expected = reference.qk_norm_rope(q, k, cos, sin)
    q_out, k_out, *rstd = FILE.forward_plan(q, k, cos)(q, k, cos, sin, None)
    *_, dq, dk = harness.evaluate(reference.qk_norm_rope, [q, k, cos, sin], [q, k], [0, 1])
    for parameters in kernel.space:
        if kernel.name == "qk_norm_rope_forward":
            found = FILE.forward_plan(q, k, cos, parameters=parameters)(q, k, cos, sin, None)[:2]
            torch.testing.assert_close(found, expected)
        else:
            given_ = q_out, k_out, q, k
            found = FILE.backward_plan(*given_, cos, parameters=parameters)(*given_, *rstd, cos, sin, None)
            torch.testing.assert_close(found, (dq, dk))


@pytest.mark.parametrize("width", [64, 96, 128, 256, 512, 1024])
def test_tiles_fit_in_registers(width):
    """Wide heads take smaller tiles, and every program has equally many heads."""
    q = torch.empty(1, 1, 10, width, device=DEVICE, dtype=torch.bfloat16)
    for kernel in FILE.KERNELS:
        tile = FILE.tile(kernel.name, q, (10, 5), None)
        elements = tile["TOKENS"] * (tile["HEADS"] + 1) * 2 * tile["HALF_BLOCK"]  # of heads and of the tables
        assert 5 % tile["HEADS"] == 0 and elements <= 32 * FILE.PER_THREAD * tile["num_warps"]


def test_offsets_are_int64():
    assert narrow_offsets(*(kernel.name for kernel in FILE.KERNELS)) == ""


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 70e9, reason="needs 40 GB of GPU memory")
def test_more_than_2_to_31_elements():
    """Each of the batch's two rows has more, so that the offset of the second row exceeds 2³¹ too."""
    tokens, last = 70_000, 64
    q, k = (torch.empty(2, tokens, n, 128, device=DEVICE, dtype=torch.bfloat16).normal_() for n in (256, 1))
    cos, sin = tables(tokens, 128, torch.bfloat16)
    q.requires_grad_()
    end = q.detach()[:, -last:].clone().requires_grad_()
    out, _ = rope(q, k, cos, sin)
    expected, _ = rope(end, k[:, -last:], cos, sin, tokens - last)
    assert torch.equal(out[:, -last:], expected)
    dq = torch.autograd.grad(out, q, out.detach() * 0.5 + 1)[0]
    assert torch.equal(dq[:, -last:], torch.autograd.grad(expected, end, expected.detach() * 0.5 + 1)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    check_compiled(rope, inputs(2, 3, 1, 2, 16, dtype), [0, 1])


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(rope, inputs(2, 65, 2, 5, 128, torch.bfloat16), [0, 1])


def test_on_another_device():
    harness.check_other_device(rope, inputs(2, 5, 1, 2, 16, torch.float32), [0, 1])


def test_bad_input():
    q, k, cos, sin, _ = inputs(2, 3, 2, 2, 8, torch.float32)

    def rejected(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.qk_norm_rope(*arguments, **more)

    rejected(TypeError, "q must be floating point", q.int(), k.int(), cos, sin)
    rejected(TypeError, "k is torch.float16 but q is torch.float32", q, k.half(), cos, sin)
    rejected(ValueError, "k is on meta but q is on", q, k.to("meta"), cos, sin)
    rejected(ValueError, "cos is on meta but q is on", q, k, cos.to("meta"), sin.to("meta"))
    rejected(ValueError, r"q must have shape \(B, T, H, D\)", q[0], k, cos, sin)
    rejected(ValueError, "k must have shape", q, k[:, :2], cos, sin)
    rejected(ValueError, "4 query heads are not a multiple of 3 key heads", q, torch.cat([k, k[:, :, :1]], 2), cos, sin)
    rejected(ValueError, "the head width must be even", q[..., :7], k[..., :7], cos, sin)
    rejected(ValueError, r"cos must have shape \(positions, 4\)", q, k, cos[:, :3], sin)
    rejected(ValueError, "sin must have shape", q, k, cos, sin[:2])
    rejected(ValueError, "positions 1 to 3 exceed the 3 rows", q, k, cos, sin, 1)
    for offset in (1.5, True, None):
        rejected(TypeError, f"offset must be an int or a tensor of ints, got {offset}", q, k, cos, sin, offset)
    rejected(ValueError, "offset must have shape", q, k, cos, sin, torch.zeros(3, dtype=torch.int64, device=DEVICE))
    rejected(TypeError, "offset must be int32 or int64", q, k, cos, sin, torch.zeros(2, device=DEVICE))
    rejected(kernels.KernelRequestError, "float64", q.double(), k.double(), cos, sin, impl="triton")
    rejected(kernels.KernelRequestError, "no gradient", q, k, cos.clone().requires_grad_(), sin, impl="triton")
    wide = torch.zeros(1, 1, 1, 2048, device=DEVICE)
    rejected(kernels.KernelRequestError, "too wide", wide, wide, *tables(1, 2048), impl="triton")
    many = torch.zeros(1, 1, 1, 2, device=DEVICE).expand(2**31, 1, 1, 2)
    rejected(kernels.KernelRequestError, "tokens exceed the", many, many, *tables(1, 2), impl="triton")
    many = torch.zeros(1, 1, 1, 2, device=DEVICE).expand(1, 1, 2**16, 2)
    rejected(kernels.KernelRequestError, "heads exceed the", many, many, *tables(1, 2), impl="triton")


# faults that a test must catch: see test_planted_faults.py
PLANTED_FAULTS = {
    "wrong sign in the rotation": ("qk_norm_rope_kernels", "x1 * c + x2 * s", "x1 * c - x2 * s", "test_qk_norm_rope"),
    "turned back the wrong way": ("qk_norm_rope_kernels", "cast(o1 * c - o2 * s", "cast(o1 * c + o2 * s",
     "test_qk_norm_rope"),
    "halves exchanged": ("qk_norm_rope_kernels", "tl.store(ptr + HALF, cast(o2 * r", "tl.store(ptr + HALF, cast(o1 * r",
     "test_qk_norm_rope"),
    "mean over half of the head": ("qk_norm_rope_kernels", "/ (2 * HALF) + EPS", "/ HALF + EPS", "test_qk_norm_rope"),
    "offset ignored": ("qk_norm_rope_kernels", "position = t.to(tl.int64) + offset", "position = t.to(tl.int64)",
     "test_qk_norm_rope"),
    "offset of the wrong row": (
        "qk_norm_rope_kernels",
        "tl.load(offsets_ptr + batch * offsets_stride)",
        "tl.load(offsets_ptr)", "test_offset_of_each_row",
    ),
    "stride of the offsets ignored": ("qk_norm_rope_kernels", "batch * offsets_stride", "batch",
     "test_strided_offsets"),
    "last tile of tokens not masked": (
        "qk_norm_rope_kernels",
        "(t < tokens)[:, None] & (channel",
        "(t < TOKENS)[:, None] & (channel", "test_qk_norm_rope",
    ),
    "head stride of q for k": (
        "qk_norm_rope_kernels",
        "k_batch_stride, k_token_stride, k_head_stride,\n            batch",
        "k_batch_stride, k_token_stride, q_head_stride,\n            batch", "test_qk_norm_rope",
    ),
    "position outside read": ("qk_norm_rope_kernels", "(position >= 0) & (position < positions)", "(position >= 0)",
     "test_a_position_outside_of_the_tables_gives_nan_and_no_stray_read"),
    "strides of y for dy": (
        "qk_norm_rope",
        '"qk_norm_rope_backward", q, k,',
        '"qk_norm_rope_backward", q_out, k_out,', "test_qk_norm_rope",
    ),
    "tables taken as contiguous": ("qk_norm_rope", "return x.contiguous() if x.dim() == 2 else x", "return x",
     "test_tables_that_are_not_contiguous"),
    "row of the batch in int32": ("qk_norm_rope_kernels", "(tl.program_id(0) // blocks).to(tl.int64)", "(tl.program_id(0) // blocks)",
     "test_offsets_are_int64"),
    "stride of a token in int32": ("qk_norm_rope_kernels", "t.to(tl.int64) * token_stride", "t * token_stride",
     "test_offsets_are_int64"),
    "position in int32": ("qk_norm_rope_kernels", "position = t.to(tl.int64) + offset", "position = t + offset",
     "test_offsets_are_int64"),
    "heads numbered in int32": ("qk_norm_rope_kernels", "program = tl.program_id(1).to(tl.int64)", "program = tl.program_id(1)",
     "test_offsets_are_int64"),
    "a gradient that nobody needs": (
        "qk_norm_rope",
        "[dy if needed else None for dy, needed in",
        "[dy for dy, needed in", "test_only_the_gradient_that_is_needed",
    ),
    "k in q's dtype under autocast": ("qk_norm_rope", "normed_dtype(q), k_dtype)", "normed_dtype(q), normed_dtype(q))",
     "test_autocast"),
}  # fmt: skip
