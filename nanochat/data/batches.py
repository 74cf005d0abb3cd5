"""Batches of tokens, and a thread that prepares them while training runs."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs and targets (B, T), int64 on the CPU; a target of −1 is ignored by the loss.

    loss_weight: a factor of the loss of each token, float32 (B, T); None: 1 for all.
    position: where this rank's next batch begins; a checkpoint stores it (nanochat/data/positions.py).
    """

    inputs: Tensor
    targets: Tensor
    position: tuple[int, ...]
    progress: float = 0.0  # share of the data consumed, for streams that end
    loss_weight: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; to CUDA it is copied asynchronously, from pinned memory."""

        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        weight = None if self.loss_weight is None else moved(self.loss_weight)
        return Batch(moved(self.inputs), moved(self.targets), self.position, self.progress, weight)


@contextmanager
def prefetched(batches: Iterator[Batch], depth: int = 4) -> Iterator[Iterator[Batch]]:
    """Give the block the same batches, prepared by a thread that is up to `depth` batches ahead.

    An error of the thread is raised in the block where the failing batch would have come. Leaving the block ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)  # then look at `stop`: nobody may be taking batches any more
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # the consumer raises it, whatever it is
            put(error)

    def consume() -> Iterator[Batch]:
        for item in iter(ready.get, None):
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=produce, name="nanochat-loader", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()
