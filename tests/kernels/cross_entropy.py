"""Helpers for the tests of both cross entropies."""

import torch

from tests.kernels.harness import DEVICE


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
