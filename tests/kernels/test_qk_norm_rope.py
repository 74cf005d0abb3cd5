"""qk_norm_rope in Triton against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.dispatch import room
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, check, check_compiled, check_graph_replay, randn

ROOM = room("qk_norm_rope")


def rope(q, k, cos, sin, offset=0):
    return kernels.qk_norm_rope(q, k, cos, sin, offset, impl="triton")


def tables(positions: int, width: int, dtype: torch.dtype = torch.float32):
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def inputs(batch, tokens, groups, share, width, dtype, seed=0, layouts=("contiguous", "contiguous"), offset=0, more=0):
    q = randn(batch, tokens, groups * share, width, dtype=dtype, seed=seed, layout=layouts[0])
    k = randn(batch, tokens, groups, width, dtype=dtype, seed=seed + 1, layout=layouts[1])
    return [q, k, *tables(tokens + more, width, dtype), offset]


@harness.property_test
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
    """Forward alone: see test_narrow_rows of rms_norm."""
    check(rope, reference.qk_norm_rope, inputs(2, 3, 1, 2, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128])
def test_model_widths(width, dtype):
    batch, tokens = (4, 1023) if GPU else (1, 17)
    check(rope, reference.qk_norm_rope, inputs(batch, tokens, 2, 5, width, dtype), [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_offset_of_each_row(dtype, index):
    """Decoding: one token a row, each row at a position of its own."""
    given_ = inputs(3, 1, 1, 2, 16, dtype, more=40)
    given_[-1] = torch.tensor([0, 40, 7], device=DEVICE, dtype=index)
    check(rope, reference.qk_norm_rope, given_, [0, 1])


def test_views_of_one_projection():
    """q and k as slices of (B, T, 3, H, D): read where they lie."""
    both = randn(2, 5, 3, 2, 16, dtype=torch.float32)
    check(rope, reference.qk_norm_rope, [both[:, :, 0], both[:, :, 1], *tables(5, 16), 0], [0, 1])


def test_rotation_keeps_norms_and_depends_on_distance():
    q, k = (randn(1, 1, 1, 32, dtype=torch.float32, seed=i) for i in range(2))
    cos, sin = tables(100, 32)

    def score(at, back):
        turned_q, _ = rope(q, k, cos, sin, at)
        _, turned_k = rope(q, k, cos, sin, at - back)
        return float((turned_q * turned_k).sum())

    assert abs(score(10, 7) - score(80, 7)) < 1e-4
    assert abs(score(10, 7) - score(10, 3)) > 1e-3
    torch.testing.assert_close(rope(q, k, cos, sin, 50)[0].square().mean(-1), torch.ones(1, 1, 1, device=DEVICE))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batch(shape):
    q, k = torch.empty(*shape, 4, 8, device=DEVICE), torch.empty(*shape, 2, 8, device=DEVICE)
    check(rope, reference.qk_norm_rope, [q, k, *tables(3, 8), 0], [0, 1])


def test_a_position_outside_the_tables_gives_nan_and_no_stray_read():
    q, k, *_ = inputs(3, 1, 1, 1, 8, torch.float32)
    cos, sin = (table[20:25] for table in tables(200, 8))  # numbers lie before and behind
    out, _ = rope(q, k, cos, sin, torch.tensor([4, 99, -3], device=DEVICE))
    assert out[0].isfinite().all() and out[1:].isnan().all()


@pytest.mark.parametrize("kernel", ROOM.KERNELS, ids=lambda kernel: kernel.name)
def test_every_launch_configuration(kernel):
    q, k, cos, sin, _ = inputs(1, 5, 1, 3, 12, torch.float32)
    expected = reference.qk_norm_rope(q, k, cos, sin)
    kept = ROOM.launch_forward(q, k, (cos, sin, 0, None))
    *_, dq, dk = harness.evaluate(reference.qk_norm_rope, [q, k, cos, sin], [q, k], [0, 1])
    for parameters in kernel.space:
        if kernel.name == "qk_norm_rope_forward":
            found = ROOM.launch_forward(q, k, (cos, sin, 0, None), True, parameters)[:2]
            torch.testing.assert_close(found, expected)
        else:
            found = ROOM.launch_backward(q, k, kept, (cos, sin, 0, None), parameters)
            torch.testing.assert_close(found, (dq, dk))


def test_registration():
    q, k, cos, sin, _ = inputs(2, 3, 1, 2, 8, torch.float32)
    torch.library.opcheck(ROOM.forward_op, (q, k, cos, sin, 0, None, False))
    torch.library.opcheck(ROOM.forward_op, (q.requires_grad_(), k.requires_grad_(), cos, sin, 0, None, True))
    kept = ROOM.launch_forward(q.detach(), k.detach(), (cos, sin, 0, None))
    torch.library.opcheck(ROOM.backward_op, (q.detach(), k.detach(), *kept, cos, sin, 0, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    check_compiled(rope, inputs(2, 3, 1, 2, 16, dtype), [0, 1])


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_graph_replay():
    check_graph_replay(rope, inputs(2, 65, 2, 5, 128, torch.bfloat16), [0, 1])


def test_bad_input():
    q, k, cos, sin, _ = inputs(2, 3, 2, 2, 8, torch.float32)

    def refused(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            kernels.qk_norm_rope(*arguments, **more)

    refused(TypeError, "q must be floating point", q.int(), k.int(), cos, sin)
    refused(TypeError, "k is torch.float16 but q is torch.float32", q, k.half(), cos, sin)
    refused(ValueError, "k is on meta but q on", q, k.to("meta"), cos, sin)
    refused(ValueError, "cos is on meta but q on", q, k, cos.to("meta"), sin.to("meta"))
    refused(ValueError, r"q must have shape \(B, T, H, D\)", q[0], k, cos, sin)
    refused(ValueError, "k must have shape", q, k[:, :2], cos, sin)
    refused(ValueError, "4 query heads are no multiple of 3 key heads", q, torch.cat([k, k[:, :, :1]], 2), cos, sin)
    refused(ValueError, "the head width must be even", q[..., :7], k[..., :7], cos, sin)
    refused(ValueError, r"cos must have shape \(positions, 4\)", q, k, cos[:, :3], sin)
    refused(ValueError, "sin must have shape", q, k, cos, sin[:2])
    refused(ValueError, "positions 1 to 3 pass the 3 rows", q, k, cos, sin, 1)
    refused(ValueError, "offset must have shape", q, k, cos, sin, torch.zeros(3, dtype=torch.int64, device=DEVICE))
    refused(TypeError, "offset must be int32 or int64", q, k, cos, sin, torch.zeros(2, device=DEVICE))
    refused(kernels.KernelRequestError, "float64", q.double(), k.double(), cos, sin, impl="triton")
    refused(kernels.KernelRequestError, "no gradient", q, k, cos.clone().requires_grad_(), sin, impl="triton")
    wide = torch.zeros(1, 1, 1, 2048, device=DEVICE)
    refused(kernels.KernelRequestError, "too wide", wide, wide, *tables(1, 2048), impl="triton")
    many = torch.zeros(1, 1, 1, 2, device=DEVICE).expand(2**31, 1, 1, 2)
    refused(kernels.KernelRequestError, "tokens pass the", many, many, *tables(1, 2), impl="triton")
