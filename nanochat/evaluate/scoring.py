"""Logits at chosen positions of many sequences, in padded batches; the head is applied at those positions only."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from nanochat.gpt import GPT

TOKENS_AT_ONCE = 16384  # a batch of 8 rows at a context of 2048


@torch.inference_mode()
def logits_at(
    model: GPT, sequences: list[list[int]], spans: list[tuple[int, int]], advance: Callable | None = None
) -> Iterator[Tensor]:
    """For each sequence, in order, the float32 logits (end − start, V) that predict its tokens start … end − 1.

    A sequence that is longer than the model's context is cut to its last tokens. start must be at least 1. advance: called with
    the number of sequences after each batch.
    """
    context = model.config.context_length
    work = iter(zip(sequences, spans, strict=True))
    while batch := list(islice(work, max(1, TOKENS_AT_ONCE // context))):
        cut = [(s[max(0, len(s) - context) :], max(0, len(s) - context), span) for s, span in batch]
        width = max(len(tokens) for tokens, _, _ in cut)
        inputs = torch.zeros(len(cut), width, dtype=torch.int64)
        for row, (tokens, _, _) in enumerate(cut):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
        hidden = model.hidden(inputs.to(model.device))  # padding is on the right, where causal attention ignores it
        for row, (_, removed, (start, end)) in enumerate(cut):
            yield model.logits(hidden[row, max(start - 1 - removed, 0) : max(end - 1 - removed, 0)])
        if advance:
            advance(len(batch))
