"""The mean loss; and bits per byte, which is comparable across tokenizers: Σ nats / (ln 2 · Σ bytes) over targets that stand for
text."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT
from nanochat.platform.distributed import Runtime
from nanochat.platform.errors import UserError


@torch.inference_mode()
def bits_per_byte(model: GPT, batches: Iterable[Batch], token_bytes: np.ndarray, runtime: Runtime) -> float:
    """Bits per byte of a model over the batches of all ranks. Special tokens and ignored targets (−1) do not count.

    token_bytes: int32 (V,), the length of each token in bytes, 0 for special tokens. Raises UserError when there is no text, and when
    the loss is not finite.
    """
    lengths = torch.from_numpy(token_bytes).to(runtime.device)
    nats, count = 0.0, 0
    for batch in batches:
        batch = batch.to(runtime.device)
        losses = model(batch.inputs, batch.targets, reduction="none")
        weight = torch.where(batch.targets >= 0, lengths[batch.targets.clamp(min=0)], 0)
        nats += torch.where(weight > 0, losses, 0.0).cpu().double().sum().item()  # MPS has no float64
        count += int(weight.sum())
    nats, count = runtime.sum([nats, float(count)])
    if not count:
        raise UserError(
            "there is no text to measure bits per byte on: the data do not fill a row of tokens; take more data or shorter rows, or "
            "train with --eval-every -1"
        )
    if not math.isfinite(nats):
        raise UserError(
            f"the loss is {nats} on the text that is measured: the model cannot be used; take an earlier checkpoint"
        )
    return nats / (math.log(2) * count)


@torch.inference_mode()
def mean_loss(model: GPT, batches: Iterable[Batch], runtime: Runtime) -> float:
    """The mean loss in nats over the targets of the batches of all ranks. Raises UserError when there are none."""
    nats, count = 0.0, 0
    for batch in batches:
        batch = batch.to(runtime.device)
        losses = model(batch.inputs, batch.targets, reduction="none")
        nats += losses.cpu().double().sum().item()  # 0 where a target is ignored; MPS has no float64
        count += int((batch.targets >= 0).sum())
    nats, count = runtime.sum([nats, float(count)])
    if not count:
        raise UserError(
            "there is nothing to measure the loss on: no held-out conversation has an answer; take more of them (--eval-rows), or "
            "train with --eval-every -1"
        )
    return nats / count


def unigram_bits_per_byte(
    train: Iterable[Batch], val: Iterable[Batch], token_bytes: np.ndarray, runtime: Runtime
) -> float:
    """Bits per byte on `val` of a model that knows only token frequencies, counted on `train` with one added to each count.

    Both are the batches of all ranks, of which a rank may have none.
    """

    def count(batches: Iterable[Batch]) -> np.ndarray:
        counts = np.zeros(len(token_bytes))
        for batch in batches:
            counts += np.bincount(batch.targets.numpy().ravel(), minlength=len(counts))
        return np.array(runtime.sum(counts.tolist()))

    counts = 1 + count(train)
    nats = -np.log(counts / counts.sum())
    seen = np.where(token_bytes > 0, count(val), 0)
    return float(nats @ seen / (math.log(2) * (token_bytes @ seen)))
