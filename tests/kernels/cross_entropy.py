"""Helpers for the tests of both cross entropies."""

import torch

from nanochat_kernels.oracle import misplaced
from tests.kernels.harness import DEVICE, evaluate


def target_entries(rows, vocabulary, targets):
    """Return the mask (rows, vocabulary) of each row's target, where the gradient has another magnitude than elsewhere."""
    mask = torch.zeros(rows, vocabulary, dtype=torch.bool, device=DEVICE)
    known = targets >= 0
    mask[known.nonzero().flatten(), targets[known]] = True
    return mask


def weights(rows, kind, seed=0):
    """Return a loss weight: None, or for kind "scalar" or "row" a random scalar or one weight per row."""
    if kind is None:
        return None
    made = torch.rand(() if kind == "scalar" else (rows,), generator=torch.Generator().manual_seed(seed)) + 0.25
    return made.to(DEVICE)


def check_weights_that_are_not_finite(kernel, reference, inputs, wrt):
    """Check that a loss weight that is NaN or infinite reaches the same elements as in the reference. One target is ignored."""
    rows = len(inputs[-1])
    up = {"mean": torch.ones((), device=DEVICE), "none": torch.ones(rows, device=DEVICE)}
    for value in (torch.nan, torch.inf, -torch.inf):
        for weight in (torch.full((), value), torch.ones(rows).index_fill(0, torch.tensor([1]), value)):
            for reduction, upstream in up.items():
                given = [*inputs, 15.0, -1, reduction, weight.to(DEVICE)]
                found, expected = (evaluate(function, given, [upstream], wrt) for function in (kernel, reference))
                assert not misplaced(found[0], expected[0]), f"{value}, {reduction}: {found[0]}, expected {expected[0]}"
                for a, b in zip(found[1:], expected[1:], strict=True):
                    assert torch.equal(a.isfinite(), b.isfinite()), f"{value}, {reduction}"
