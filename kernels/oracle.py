"""How far an implementation may be from the truth.

The reference in float64 is the oracle. The reference in the dtype of the computation is the baseline, and its error sets the
budget. The tests and the gate judge by this alone.

A tensor is judged in groups of similar magnitude, because one norm over all of it would hide any error in its small parts: rows
(of the last axis) whose norms lie within a factor of 4 form a group, and entries that are of another magnitude by nature, such
as the target's own in a vocabulary, are judged apart from the rest. A small group joins the next one of larger magnitude: the
baseline's error in a few elements can be small by luck, most of all where the terms of a sum cancel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RATIO = 1.5
# of a group: the size of so many errors is known well enough; those of one short row may be alike
FEWEST_ROWS, FEWEST_ELEMENTS, ENOUGH_ELEMENTS = 8, 64, 256


def evaluate_each(
    function: Callable, inputs: Sequence, upstreams: Sequence[Sequence[Tensor]], wrt: Sequence[int]
) -> list[list[Tensor]]:
    """For each set of upstream gradients: the results, then the gradients of the inputs numbered in wrt, from one forward pass."""
    inputs = [x.detach().requires_grad_(i in wrt) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = []
    for number, upstream in enumerate(upstreams):
        is_last = number + 1 == len(upstreams)
        gradients = []
        if wrt:
            # a buffer that gradients are added to is a result, and has none
            pairs = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if y.requires_grad]
            ys, dys = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(ys, [inputs[i] for i in wrt], dys, retain_graph=not is_last)
        found.append([x.detach() for x in (*outputs, *gradients)])
    return found


def evaluate(function: Callable, inputs: Sequence, upstream: Sequence[Tensor], wrt: Sequence[int]) -> list[Tensor]:
    """The results, then the gradients of the inputs numbered in wrt."""
    return evaluate_each(function, inputs, [upstream], wrt)[0]


def over_budget(
    found: Tensor, oracle: Tensor, baseline: Tensor, epsilon: float | Tensor = 0.0, apart: Tensor | None = None,
    fewest_rows: int = FEWEST_ROWS,
) -> str | None:  # fmt: skip
    """What is wrong with a result, or None.

    In every group, the norm of the error and the error of the worst element are at most 1.5 × the baseline's, plus what chance
    adds where a group is small: one rounding unit of its largest element, and one of float32 of its largest row, whose own
    factor is rounded by that. NaN and infinities must stand where the oracle has them.

    epsilon: error that each element may have besides, a number or a tensor that broadcasts to the oracle's shape.
    apart: bool mask of elements that are judged in groups of their own. fewest_rows: rows of a group; more than usual where the
    errors of a row are not independent, as those of a sum of few vectors, however many elements a row has.
    """
    if not found.numel():
        return None
    wrong = misplaced(found, oracle)
    if wrong:
        return wrong
    finite = oracle.isfinite() & found.isfinite()
    error = _rows(torch.where(finite, (found.double() - oracle).abs(), 0.0))
    allowed = _rows(torch.where(finite & baseline.isfinite(), (baseline.double() - oracle).abs(), 0.0))
    size = _rows(torch.where(finite, oracle.abs(), 0.0))
    tolerance = _rows(torch.as_tensor(epsilon, dtype=torch.float64, device=oracle.device).expand_as(oracle))
    # where the oracle itself rounds to 0, as 1 − tanh² does
    tolerance = tolerance + torch.finfo(torch.float64).eps * size.max()
    if apart is None:
        return _groups_over_budget("", found.dtype, error, allowed, size, tolerance, fewest_rows)
    for name, mask in ((", entries apart", _rows(apart)), (", other entries", ~_rows(apart))):
        parts = (torch.where(mask, x, 0.0) for x in (error, allowed, size, tolerance))
        wrong = wrong or _groups_over_budget(name, found.dtype, *parts, fewest_rows)
    return wrong


def misplaced(found: Tensor, oracle: Tensor) -> str | None:
    """Where NaN or an infinity stands in only one of the two; a number beyond the dtype of `found` is infinite in it."""
    oracle = oracle.to(found.dtype)
    for name, predicate in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = predicate(found) != predicate(oracle)
        if differs.any():
            first = tuple(int(i) for i in differs.nonzero()[0])
            return f"{int(differs.sum())} elements are {name} in only one of result and oracle, the first at {first}"
    return None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1] if x.dim() else 1)


def _groups_over_budget(
    name: str, dtype: torch.dtype, error: Tensor, allowed: Tensor, size: Tensor, tolerance: Tensor, fewest_rows: int
) -> str | None:
    """over_budget for the errors (rows, C) of a result in `dtype`, of a baseline, and magnitudes of the oracle."""
    norms = size.norm(dim=1)
    exponents = torch.where(norms > 0, norms.log2().div(2).floor(), -torch.inf)
    groups, group_of_row = _joined(exponents, (size > 0).sum(1), fewest_rows)

    def largest(values: Tensor) -> Tensor:
        return values.new_zeros(groups).scatter_reduce_(0, group_of_row, values, "amax")

    def norm(values: Tensor) -> Tensor:
        return values.new_zeros(groups).index_add_(0, group_of_row, values.square().sum(1)).sqrt()

    chance = torch.finfo(dtype).eps * largest(size.amax(1)) + torch.finfo(torch.float32).eps * largest(norms)
    chance = chance + torch.finfo(torch.float32).tiny  # below which float32 is flushed to 0
    for measure, reduce in (("error", norm), ("error of the worst element", lambda values: largest(values.amax(1)))):
        got, reference = reduce(error), reduce(allowed)
        budget = RATIO * reference + chance + reduce(tolerance)
        for group in (got > budget).nonzero().flatten().tolist():
            return (
                f"rows of norm up to {largest(norms)[group]:.3g}{name}: {measure} {got[group]:.3e}, "
                f"reference {reference[group]:.3e}, budget {budget[group]:.3e}"
            )
    return None


def _joined(exponents: Tensor, elements: Tensor, fewest_rows: int) -> tuple[int, Tensor]:
    """(how many groups, the group of each row), of each row's exponent and number of elements that are not 0."""
    more_rows = fewest_rows > FEWEST_ROWS
    found, group_of_row = exponents.unique(return_inverse=True)
    counts = torch.stack([elements, (elements > 0).long()], 1)
    counts = counts.new_zeros(len(found), 2).index_add_(0, group_of_row, counts).tolist()
    joined, group, collected, collected_rows = [], 0, 0, 0
    for count, rows in counts:  # from the smallest exponent up; rows of zeros have a group of their own
        joined.append(group)
        collected, collected_rows = collected + count, collected_rows + rows
        enough_rows = collected >= FEWEST_ELEMENTS and collected_rows >= fewest_rows
        if rows == 0 or enough_rows or (collected >= ENOUGH_ELEMENTS and not more_rows):
            group, collected, collected_rows = group + 1, 0, 0
    zeros = int(not counts[0][1])  # groups of rows of zeros, which come first
    if more_rows and collected and group > zeros:  # too few rows are left for a group
        joined = [min(of, group - 1) for of in joined]
    return group + 1, torch.tensor(joined, device=exponents.device)[group_of_row]
