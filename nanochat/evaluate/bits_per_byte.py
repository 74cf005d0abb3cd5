"""Bits per byte: a loss that does not depend on the tokenizer. Σ nats / (ln 2 · Σ bytes) over targets that have bytes."""

import math
from collections.abc import Iterable

import numpy as np
import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT
from nanochat.platform.distributed import Runtime


@torch.inference_mode()
def bits_per_byte(model: GPT, batches: Iterable[Batch], token_bytes: np.ndarray, runtime: Runtime) -> float:
    """Over the batches of all ranks. Special tokens and ignored targets (−1) do not count."""
    lengths = torch.from_numpy(token_bytes).to(runtime.device)
    nats, count = 0.0, 0
    for batch in batches:
        batch = batch.to(runtime.device)
        losses = model(batch.inputs, batch.targets, reduction="none")
        weight = torch.where(batch.targets >= 0, lengths[batch.targets.clamp(min=0)], 0)
        nats += torch.where(weight > 0, losses, 0.0).cpu().double().sum().item()  # MPS has no float64
        count += int(weight.sum())
    nats, count = runtime.sum([nats, float(count)])
    return nats / (math.log(2) * count) if count else math.inf


def unigram_bits_per_byte(train: Iterable[Batch], val: Iterable[Batch], token_bytes: np.ndarray) -> float:
    """Of the model that knows only how often each token is (add-one), counted on train and measured on val."""
    counts = np.ones(len(token_bytes))
    for batch in train:
        counts += np.bincount(batch.targets.numpy().ravel(), minlength=len(counts))
    nats = -np.log(counts / counts.sum())
    seen = np.concatenate([batch.targets.numpy().ravel() for batch in val])
    seen = seen[token_bytes[seen] > 0]
    return float(nats[seen].sum() / (math.log(2) * token_bytes[seen].sum()))
