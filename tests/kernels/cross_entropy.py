"""What the tests of both cross entropies share."""

import torch

from tests.kernels.harness import DEVICE


def target_entries(rows, vocabulary, targets):
    """The mask of each row's own target, which is of another magnitude than the rest of its gradient."""
    mask = torch.zeros(rows, vocabulary, dtype=torch.bool, device=DEVICE)
    known = targets >= 0
    mask[known.nonzero().flatten(), targets[known]] = True
    return mask


def weights(rows, kind, seed=0):
    """None, a scalar, or a weight per row."""
    if kind is None:
        return None
    made = torch.rand(() if kind == "scalar" else (rows,), generator=torch.Generator().manual_seed(seed)) + 0.25
    return made.to(DEVICE)
