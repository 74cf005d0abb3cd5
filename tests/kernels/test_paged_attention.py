"""attention with keys in pages: what the same keys give in one piece, and bits that no other row can change."""

import importlib
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nanochat_kernels as kernels
from nanochat_kernels import reference
from tests.kernels import harness
from tests.kernels.harness import DEVICE, GPU, randn

PAGE = 16
LAUNCHES = importlib.import_module("nanochat_kernels.attention_launches")
SMALL = {
    "attention_decode": {"BLOCK_N": 32, "PART": 32, "PARTS": 2, "num_warps": 1, "num_stages": 1},
    "attention_forward": {"BLOCK_M": 32, "BLOCK_N": 32, "GROUP": 2, "num_warps": 1, "num_stages": 1},
}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setattr(LAUNCHES, "launch_parameters", lambda name, *_: SMALL[name])
            patch.setattr(importlib.import_module("nanochat_kernels.attention"), "MOST_QUERIES", 6)
        yield


def inputs(rows, tokens, pages, groups, share, dtype, seed, width=32):
    """q, pages of keys and values in a shuffled memory, the table of each row, and lengths that leave room for the queries."""
    q = reference.rms_norm(randn(rows, tokens, groups * share, width, dtype=torch.float32, seed=seed)).to(dtype)
    k, v = (randn(rows * pages + 3, PAGE, groups, width, dtype=torch.float32, seed=seed + i) for i in (1, 2))
    generator = torch.Generator().manual_seed(seed)
    table = (torch.randperm(rows * pages + 3, generator=generator)[: rows * pages]).view(rows, pages)
    lengths = torch.randint(tokens, pages * PAGE + 1, (rows,), generator=generator)
    return q, reference.rms_norm(k).to(dtype), v.to(dtype), table.to(DEVICE, torch.int32), lengths.to(DEVICE)


def paged(impl, q, k, v, table, lengths, bound=None):
    return kernels.attention(q, k, v, lengths, bound=bound, pages=table, impl=impl)


def in_one_piece(x, table):
    return x[table].flatten(1, 2)


@harness.property_test
@example(rows=3, tokens=1, pages=4, groups=2, share=2, dtype=torch.bfloat16, bounded=True, seed=1)
@example(rows=3, tokens=9, pages=4, groups=1, share=2, dtype=torch.float16, bounded=False, seed=2)
@example(rows=2, tokens=2, pages=19, groups=2, share=1, dtype=torch.bfloat16, bounded=True, seed=3)
@given(
    rows=st.integers(1, 3), tokens=st.sampled_from((1, 2, 9)), pages=st.integers(1, 4), groups=st.integers(1, 2),
    share=st.integers(1, 2), dtype=st.sampled_from((torch.bfloat16, torch.float16)), bounded=st.booleans(), seed=harness.seeds,
)  # fmt: skip
def test_pages_give_what_one_piece_gives(rows, tokens, pages, groups, share, dtype, bounded, seed):
    q, k, v, table, lengths = inputs(rows, tokens, pages, groups, share, dtype, seed)
    bound = math.sqrt(32) if bounded else None
    with pytest.MonkeyPatch.context() as patch:  # blocks of keys that fit into a page, as with pages
        if not GPU:
            patch.setattr(LAUNCHES, "launch_parameters", lambda name, *_: SMALL[name] | {"BLOCK_N": PAGE})
        whole = [in_one_piece(x, table) for x in (k, v)]
        wanted = kernels.attention(q, *whole, lengths, bound=bound, impl="triton")
    found = paged("triton", q, k, v, table, lengths, bound)
    if GPU:  # the table's blocks may be longer than these pages
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(found, wanted)
    exact = kernels.attention(q.double(), *(x.double() for x in whole), lengths, impl="reference")
    reference_found = paged("reference", q, k, v, table, lengths)
    torch.testing.assert_close(reference_found.double(), exact, rtol=2e-2, atol=2e-2)
    in_float32 = paged("reference", *(x.float() for x in (q, k, v)), table, lengths)
    torch.testing.assert_close(in_float32.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_lengths", [True, False])
@pytest.mark.parametrize(("rows", "tokens", "groups", "share"), [(5, 1, 2, 1), (3, 2, 1, 2), (64, 1, 1, 1)])
def test_programs_that_share_the_parts_change_no_bit(rows, tokens, groups, share, has_lengths):
    """Also with rows without keys, with all keys at the end of the batch, and with lengths that are a column and out of range."""
    pages = 5 if rows < 64 else 3
    q, k, v, table, lengths = inputs(rows, tokens, pages, groups, share, torch.bfloat16, 4)
    lengths[0], lengths[1], lengths[-2], lengths[-1] = tokens, 0, -1, pages * PAGE + 9
    lengths = torch.stack([lengths] * 3, 1)[:, 1]
    parameters = SMALL["attention_decode"] | {"BLOCK_N": PAGE}
    given_ = q, k, v, lengths if has_lengths else None, math.sqrt(32), True
    alone = LAUNCHES.decode(*given_, parameters, pages=table)
    for count in (1, 3):
        together = LAUNCHES.decode(*given_, parameters | {"PROGRAMS": count}, pages=table)
        assert all(map(harness.same, alone, together))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("tokens", [1, 9, 70] if GPU else [1, 9])
def test_a_row_does_not_depend_on_others(impl, tokens):
    """Neither on what they hold, nor on how long they are, nor on its place, nor on the pages that its table has behind its length."""
    q, k, v, table, lengths = inputs(5, tokens, 6, 2, 2, torch.bfloat16, 3)
    lengths[1] = tokens + 5
    kept = -(-(tokens + 5) // PAGE)
    alone = paged(impl, q.roll(2, 0)[:5], k, v, table.roll(2, 0), lengths.roll(2))[3]
    for others in (1.0, -0.5):
        q_, table_, lengths_ = q * others, table.clone(), lengths.clone()
        q_[1] = q[1]
        lengths_[[0, 2, 3, 4]] = tokens + 1
        table_[1, kept:] = 0  # behind the length
        found = paged(impl, q_, k, v, table_[:, :kept].contiguous(), lengths_)[1]
        assert torch.equal(found, alone), (impl, others)


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_reference_has_the_same_bits_wherever_pages_lie(tokens):
    """In any order, with the tokens of a head together, and beside more rows than are multiplied at once."""
    q, k, v, table, lengths = inputs(5, tokens, 4, 2, 2, torch.float32, 6)
    found = paged("reference", q, k, v, table, lengths)
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    elsewhere = [torch.empty_like(x).index_copy_(0, order, x) for x in (k, v)]
    assert torch.equal(found, paged("reference", q, *elsewhere, order[table], lengths))
    together = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    many = [x.repeat(13, *[1] * (x.dim() - 1)) for x in (q, table, lengths)]
    if not GPU:  # where a library may have other products for other strides and more rows
        assert torch.equal(found, paged("reference", q, *together, table, lengths))
        assert torch.equal(found.repeat(13, 1, 1, 1), paged("reference", many[0], *together, *many[1:]))


@pytest.mark.skipif(GPU, reason="compares with what a CPU computes")
@pytest.mark.parametrize(("tokens", "pages"), [(1, 3), (9, 19)])
def test_the_reference_of_other_devices_gives_the_same(monkeypatch, tokens, pages):
    """They multiply whole columns of pages, because the host does not know the lengths."""
    q, k, v, table, lengths = inputs(5, tokens, pages, 2, 2, torch.float32, 8)
    found = paged("reference", q, k, v, table, lengths)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    torch.testing.assert_close(reference.paged_attention(q, k, v, table, lengths), found, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(GPU, reason="a GPU does not know the lengths on the host")
def test_the_reference_multiplies_no_pages_behind_a_row(monkeypatch):
    """One long row among short ones costs its own pages."""
    q, k, v, table, lengths = inputs(5, 1, 20, 1, 1, torch.float32, 7)
    lengths[:] = torch.tensor([20 * PAGE, 1, PAGE, PAGE + 1, 0])
    products, plain = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: products.append(x.size(0)) or plain(x, y))
    paged("reference", q, k, v, table, lengths)
    # pages of the blocks of 8: 8 + 1 + 1 + 2, 8 and 4, each rounded up
    assert products == [reference.PRODUCTS_AT_ONCE] * 2 * (2 + 1 + 1)


def test_a_query_without_keys_has_the_result_0():
    q, k, v, table, lengths = inputs(2, 1, 2, 1, 1, torch.bfloat16, 4)
    lengths[0] = 0
    for impl in ("triton", "reference"):
        found = paged(impl, q, k, v, table, lengths)
        assert found[0].abs().max() == 0 and found[1].abs().max() > 0


def test_wrong_arguments():
    q, k, v, table, lengths = inputs(2, 1, 2, 1, 1, torch.bfloat16, 5)
    with pytest.raises(ValueError, match="need lengths"):
        kernels.attention(q, k, v, pages=table)
    with pytest.raises(ValueError, match="pages must have shape"):
        paged("auto", q, k, v, table[0], lengths)
    with pytest.raises(TypeError, match="pages must be int32 or int64"):
        paged("auto", q, k, v, table.float(), lengths)
    with pytest.raises(ValueError, match="1 queries need at least as many keys, got 0"):
        paged("auto", q, k, v, table[:, :0], lengths)
    for size in (8, 24):
        with pytest.raises(kernels.KernelRequestError, match=f"pages of {size} keys; .* powers of two from 16 on"):
            paged("triton", q, *(x.repeat(1, 2, 1, 1)[:, :size] for x in (k, v)), table, lengths)
    with pytest.raises(kernels.KernelRequestError, match="no gradient"):
        paged("triton", q.clone().requires_grad_(), k, v, table, lengths)


PLANTED_FAULTS = {
    "a part shared by two programs": ("attention_kernels", "(ends <= number)", "(ends < number)",
     "test_programs_that_share_the_parts_change_no_bit"),
    "parts counted from the first row": ("attention_kernels", "number - tl.sum(tl.where(row < here, parts, 0), 0)", "number",
     "test_programs_that_share_the_parts_change_no_bit"),
    "lengths that lie apart": ("attention_kernels", "row.to(tl.int64) * lengths_stride", "row.to(tl.int64)",
     "test_programs_that_share_the_parts_change_no_bit"),
    "more keys than there are": ("attention_kernels", "length = tl.minimum(tl.maximum(length, 0), all_keys)",
     "length = tl.maximum(length, 0)", "test_programs_that_share_the_parts_change_no_bit"),
    "length of another row": ("attention_kernels", "tl.sum(tl.where(row == here, length, 0), 0)", "tl.max(length, 0)",
     "test_programs_that_share_the_parts_change_no_bit"),
    "decoding reads another row's pages": (
        "attention_kernels", "pages_ptr += tl.cast(batch, tl.int64) * (all_keys // PAGE)", "pages_ptr += 0",
        "test_pages_give_what_one_piece_gives",
    ),
    "chunks of queries read another row's pages": (
        "attention_kernels", "pages_ptr += tl.cast(head // heads, tl.int64) * (all_keys // PAGE)", "pages_ptr += 0",
        "test_pages_give_what_one_piece_gives",
    ),
    "blocks of keys reach over the end of a page": (
        "attention_launches", 'parameters | {"BLOCK_N": min(parameters["BLOCK_N"], page)}', "parameters",
        "test_pages_give_what_one_piece_gives",
    ),
    "the reference adds pages by their number in memory": (
        "reference", "index_select(0, pages[row, i])", "index_select(0, 0 * i + 1)",
        "test_pages_give_what_one_piece_gives",
    ),
}  # fmt: skip
