"""All blocks of the model for one token of each row: results, what is stored, and independence of the other rows."""

import importlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanochat_kernels as kernels
from tests.kernels.harness import DEVICE, GPU

FILE = importlib.import_module("nanochat_kernels.decode_blocks")
STEM = "decode_blocks_phases"
PLANTED_FAULTS = {
    "a row reads the position of another": (STEM, "tl.load(lengths_ptr + r, mask=r < rows, other=0), 0)",
     "tl.load(lengths_ptr + 0 * r, mask=r < rows, other=0), 0)", "test_results_and_what_is_stored"),
    "the last key is not seen": (STEM, "keys, begin = length + 1, part * PART", "keys, begin = length, part * PART",
     "test_results_and_what_is_stored"),
    "rows beyond the first block are left out": (STEM, "for i in tl.static_range(BLOCKS):\n        x1",
     "for i in tl.static_range(1):\n        x1", "test_results_and_what_is_stored"),
    "a value is rotated": (STEM, "if not is_value:", "if True:", "test_results_and_what_is_stored"),
    "only the first parts are combined": (STEM, "tl.range(0, tl.cdiv(keys, PART), PARTS)", "tl.range(0, 1, PARTS)",
     "test_more_parts_than_are_added_at_a_time"),
    "scores beyond the bound pass": (STEM, 'tl.where(fits, 1.0 / total, float("nan"))', "1.0 / total",
     "test_scores_beyond_the_bound_are_nan"),
}  # fmt: skip
CHECKED = {"BLOCK_K": 64, "BLOCK_N": 32, "UP": 32, "PROGRAMS": 1, "num_warps": 4, "num_stages": 3}


def made(
    rows: int,
    heads: int = 2,
    kv_heads: int = 2,
    filled: int = 150,
    layers: int = 2,
    dtype=torch.bfloat16,
    head: int = 64,
) -> list:
    torch.manual_seed(rows + filled)
    return list(FILE.inputs(rows, layers, heads * head, heads, kv_heads, filled, dtype, torch.device(DEVICE)))


def copied(arguments: list, dtype: torch.dtype | None = None) -> list:
    """Copies, and with a dtype in that one, the weights too."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype) if dtype and x.is_floating_point() else x.clone()

    x, weights, *others = arguments
    return [copy(x), [tuple(map(copy, block)) for block in weights], *map(copy, others)]


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@given(
    st.sampled_from([1, 3, 16, 17, 33]), st.sampled_from([(2, 2), (2, 1), (1, 1)]), st.sampled_from([0, 1, 127, 128, 200]),
    st.sampled_from([64, 128]),
)  # fmt: skip
@settings(max_examples=4 if GPU else 8)
def test_results_and_what_is_stored(rows, heads, filled, head):
    """Errors against float64 are at most those of plain PyTorch in the same dtype; rows without a conversation change nothing."""
    arguments = made(rows, *heads, filled, head=head)
    plain, exact = copied(arguments), copied(arguments, torch.float64)
    before = [x.clone() for x in arguments[4:6]]
    live = arguments[6] >= 0
    found = FILE.run(*arguments, parameters=CHECKED)[live]
    by_torch, true = FILE.run_reference(*plain)[live], FILE.run_reference(*exact)[live]
    assert error(found, true) <= 1.1 * error(by_torch, true)
    for new, old, of_torch, of_exact in zip(arguments[4:6], before, plain[4:6], exact[4:6], strict=True):
        changed = (of_exact != old.double()).any(-1)
        assert torch.equal((new != old).any(-1), changed)
        assert error(new[changed], of_exact[changed]) <= 1.1 * error(of_torch[changed], of_exact[changed])


@pytest.mark.parametrize("rows", [5, 20])
def test_a_row_is_what_it_is_alone(rows):
    arguments = made(rows, filled=140)
    given, found = copied(arguments), FILE.run(*arguments, parameters=CHECKED)
    for n in (0, rows - 1):
        if arguments[6][n] < 0:
            continue
        x, weights, cos, sin, keys, values, lengths, pages = copied(given)
        alone = FILE.run(x[n : n + 1], weights, cos, sin, keys, values, lengths[n : n + 1], pages[n : n + 1], CHECKED)
        assert torch.equal(alone[0], found[n])
        own = pages[n].long()
        assert torch.equal(keys[:, own], arguments[4][:, own]) and torch.equal(values[:, own], arguments[5][:, own])


def test_more_parts_than_are_added_at_a_time():
    arguments = made(1, 1, 1, 17 * FILE.PART, 1)
    exact = copied(arguments, torch.float64)
    plain = copied(arguments)
    found, true = FILE.run(*arguments, parameters=CHECKED), FILE.run_reference(*exact)
    assert error(found, true) <= 1.1 * error(FILE.run_reference(*plain), true)


def test_scores_beyond_the_bound_are_nan():
    arguments = made(2, 1, 1, 40, 1)
    arguments[4] *= 200.0
    assert FILE.run(*arguments, parameters=CHECKED).isnan().all()


def test_what_is_not_finite_stays_in_its_row():
    arguments = made(3, filled=30)
    arguments[6][1] = 7
    clean = FILE.run(*copied(arguments), parameters=CHECKED)
    arguments[0][1, 5] = torch.nan
    found = FILE.run(*arguments, parameters=CHECKED)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.skipif(not GPU, reason="programs wait for each other on a GPU only")
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_one_launch_has_the_bits_of_a_launch_for_each_phase(rows, monkeypatch):
    arguments = made(rows, 10, 10, 700, 3, head=128)
    apart = copied(arguments)
    together = [FILE.run(*copied(arguments)) for _ in range(20)]
    phases = FILE.launches_of(3, rows, "cpu")
    monkeypatch.setattr(FILE, "launches_of", lambda *_: phases)
    live = arguments[6] >= 0
    expected = FILE.run(*apart)[live]
    assert all(torch.equal(found[live], expected) for found in together)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: [*a[:4], a[4].transpose(2, 3).contiguous().transpose(2, 3), *a[5:]], "must lie alike"),
        (lambda a: [a[0].float(), [tuple(w.float() for w in b) for b in a[1]], *(x.float() for x in a[2:6]), *a[6:]], "takes bfloat16"),
        (lambda a: made(2, 1, 1, 20, 1, head=32), "heads of 32 channels"),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take_is_said(change, reason):
    with pytest.raises(kernels.KernelRequestError, match=reason):
        kernels.decode_blocks(*change(made(2)), impl="triton")


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda x: x[:, :-1], "w_q of block 0 must have shape"),
        (6, lambda x: x[:-1], "lengths"),
        (7, lambda x: x[:-1], "pages must have shape"),
        (5, lambda x: x[:, :-1], "values must have shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(number, change, message):
    arguments = made(3)
    arguments[number] = change(arguments[number])
    with pytest.raises(ValueError, match=re.escape(message) if "(" not in message else message):
        kernels.decode_blocks(*arguments)
