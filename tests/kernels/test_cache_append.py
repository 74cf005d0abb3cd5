"""cache_append in Triton against the reference, which it must equal bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from tests.kernels import harness
from tests.kernels.harness import DEVICE, DTYPES, GPU, randn


def where_of(x):
    """The offset, the shape and the strides of a tensor in its memory."""
    return x.storage_offset(), x.shape, x.stride()


def appended(impl, keys, values, k, v, lengths):
    keys, values = (x.new_empty(0).set_(x.untyped_storage().clone(), *where_of(x)) for x in (keys, values))
    kernels.cache_append(keys, values, k, v, lengths, impl=impl)
    return keys, values


def check(*arguments):
    for found, wanted in zip(appended("triton", *arguments), appended("reference", *arguments), strict=True):
        assert torch.equal(found, wanted)


@harness.property_test
@given(
    rows=st.integers(1, 4), tokens=st.integers(0, 5), heads=st.integers(1, 3), width=st.sampled_from((8, 40, 64)),
    dtype=harness.dtypes, layouts=st.tuples(*[harness.layouts] * 2), index=st.sampled_from((torch.int32, torch.int64)),
    seed=harness.seeds,
)  # fmt: skip
def test_cache_append(rows, tokens, heads, width, dtype, layouts, index, seed):
    keys = randn(rows, 11, heads, width, dtype=dtype, seed=seed)
    values = randn(rows, 13, heads, 2 * width, dtype=dtype, seed=seed + 1)[:, :11, :, :width]  # other strides
    k, v = (randn(rows, tokens, heads, width, dtype=dtype, seed=seed + 2 + i, layout=x) for i, x in enumerate(layouts))
    lengths = torch.randint(0, 12 - tokens, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE, index)
    check(keys, values, k, v, lengths)


def test_views_of_a_cache_and_of_one_product():
    """Every second row of a layer of a cache, and heads that are part of a product's rows."""
    cache = randn(2, 6, 9, 3, 16, dtype=torch.bfloat16)
    k, v = randn(3, 2, 10, 16, dtype=torch.bfloat16, seed=1)[:, :, 4:].split(3, 2)
    lengths = torch.tensor([7, 0, 3, 4, 5, 6], device=DEVICE)[::2]
    before = cache.clone()
    kernels.cache_append(cache[0, ::2], cache[1, ::2], k, v, lengths, impl="triton")
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(cache[0, 2 * row, length : length + 2], k[row])
        assert torch.equal(cache[1, 2 * row, length : length + 2], v[row])
        before[:, 2 * row, length : length + 2] = cache[:, 2 * row, length : length + 2]
    assert torch.equal(cache, before), "nothing else changed"


def test_rows_that_share_one_memory():
    keys, values = (randn(1, 12, 2, 8, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    k, v = (randn(3, 2, 2, 8, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    places = torch.tensor([8, 1, 4], device=DEVICE)
    check(keys, values, k, v, places)
    kernels.cache_append(keys, values, k, v, places, impl="triton")
    for row, place in enumerate(places.tolist()):
        assert torch.equal(keys[0, place : place + 2], k[row]) and torch.equal(values[0, place : place + 2], v[row])


def test_positions_outside_the_cache_are_not_stored():
    keys, values = (torch.zeros(3, 4, 1, 8, device=DEVICE) for _ in range(2))
    k = torch.ones(3, 2, 1, 8, device=DEVICE)
    kernels.cache_append(keys, values, k, k, torch.tensor([3, 9, -1], device=DEVICE), impl="triton")
    assert keys[0, :, 0, 0].tolist() == [0, 0, 0, 1] and keys[1].sum() == 0
    assert values[2, :, 0, 0].tolist() == [1, 0, 0, 0]


def test_wrong_arguments():
    keys, values = (torch.zeros(3, 4, 1, 8, device=DEVICE) for _ in range(2))
    k, lengths = torch.ones(3, 2, 1, 8, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="k must have shape"):
        kernels.cache_append(keys, values, k[:2], k, lengths)
    with pytest.raises(TypeError, match="int32 or int64"):
        kernels.cache_append(keys, values, k, k, lengths.float())
    for impl in ("triton", "reference"):
        with pytest.raises(
            ValueError, match="computes no gradient, but a tensor requires one; call it under torch.no_grad"
        ):
            kernels.cache_append(keys, values, k.clone().requires_grad_(), k, lengths, impl=impl)
    assert not keys.requires_grad
    with pytest.raises(kernels.KernelRequestError, match="65,536 rows exceed the 65,535 of one launch; split them"):
        kernels.cache_append(
            keys[:1], values[:1], *[k[:1].expand(2**16, 2, 1, 8)] * 2, lengths[:1].expand(2**16), impl="triton"
        )
    with pytest.raises(kernels.KernelRequestError, match="next to each other"):
        kernels.cache_append(keys.repeat(1, 1, 1, 2)[..., ::2], values, k, k, lengths, impl="triton")


@pytest.mark.skipif(not GPU, reason="needs 9 GB of GPU memory")
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_more_than_2_to_31_elements(dtype):
    keys = torch.zeros(2, 2**23, 2, 128, device=DEVICE, dtype=dtype)
    k = randn(2, 1, 2, 128, dtype=dtype)
    kernels.cache_append(keys, keys, k, k, torch.tensor([5, 2**23 - 1], device=DEVICE), impl="triton")
    assert torch.equal(keys[1, -1], k[1, 0]) and torch.equal(keys[0, 5], k[0, 0])


PLANTED_FAULTS = {
    "values are stored as keys": (
        "cache_append", "tl.load(v_ptr + from_v", "tl.load(k_ptr + from_k", "test_views_of_a_cache_and_of_one_product",
    ),
    "append stores outside the cache": (
        "cache_append", "& (position + t < positions)", "", "test_positions_outside_the_cache_are_not_stored",
    ),
    "append ignores the row's length": (
        "cache_append", "lengths_ptr + batch * lengths_stride", "lengths_ptr",
        "test_views_of_a_cache_and_of_one_product",
    ),
}  # fmt: skip
