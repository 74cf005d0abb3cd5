"""Logits at chosen positions of many sequences, in padded batches; the head is applied at those positions only."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from nanochat.gpt import GPT
from nanochat.platform.distributed import Runtime

TOKENS_AT_ONCE = 16384  # padding included
FEWEST_IN_GROUP, MOST_IN_GROUP, GROUPS = 16, 256, 16  # of items that one process evaluates together


def groups_of(count: int, runtime: Runtime) -> list[range]:
    """The items of this process, of so many that all processes share, in groups that are the same for any number of processes. Only
    items of a group may share a batch, because what is beside a sequence in its batch can change the last bits of its logits."""
    size = max(FEWEST_IN_GROUP, min(MOST_IN_GROUP, -(-count // GROUPS)))
    return [range(n, min(n + size, count)) for n in range(size * runtime.rank, count, size * runtime.world_size)]


@torch.inference_mode()
def logits_at(
    model: GPT, sequences: list[list[int]], spans: list[tuple[int, int]], advance: Callable | None = None
) -> Iterator[Tensor]:
    """For each sequence, in order, the float32 logits (end − start, V) that predict its tokens start … end − 1.

    A sequence that is longer than the model has positions is cut to its last tokens. start must be at least 1. advance: called with
    the number of sequences after each batch.
    """
    positions = model.positions
    cut = (
        (tokens[max(0, len(tokens) - positions) :], max(0, len(tokens) - positions), span)
        for tokens, span in zip(sequences, spans, strict=True)
    )
    for batch in _batches(cut):
        width = max(len(tokens) for tokens, _, _ in batch)
        inputs = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, (tokens, _, _) in enumerate(batch):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
        hidden = model.hidden(inputs.to(model.device))  # padding is on the right, where causal attention ignores it
        for row, (_, removed, (start, end)) in enumerate(batch):
            yield model.logits(hidden[row, max(start - 1 - removed, 0) : max(end - 1 - removed, 0)])
        if advance:
            advance(len(batch))


def _batches(work: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Items in order, as many together as fit when each is padded to the longest, at least one. The first of an item: its tokens."""
    batch, width = [], 0
    for item in work:
        wider = max(width, len(item[0]))
        if batch and (len(batch) + 1) * wider > TOKENS_AT_ONCE:
            yield batch
            batch, wider = [], len(item[0])
        batch.append(item)
        width = wider
    if batch:
        yield batch
