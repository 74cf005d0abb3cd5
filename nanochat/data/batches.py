"""Batches of tokens, and a thread that makes them ahead of training."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """inputs and targets (B, T) int64, with target −1 where nothing is to be learned.

    position: where the next batch of this rank begins, which a checkpoint keeps (nanochat/data/positions.py).
    """

    inputs: Tensor
    targets: Tensor
    position: tuple[int, ...]
    progress: float = 0.0  # share of the data consumed, for streams that end

    def to(self, device: torch.device) -> "Batch":
        """On the device; asynchronously from pinned memory on CUDA."""
        if device.type == "cuda":
            moved = [t.pin_memory().to(device, non_blocking=True) for t in (self.inputs, self.targets)]
        else:
            moved = [t.to(device) for t in (self.inputs, self.targets)]
        return Batch(*moved, self.position, self.progress)


@contextmanager
def prefetched(batches: Iterator[Batch], depth: int = 4) -> Iterator[Iterator[Batch]]:
    """The same batches, made ahead by a thread. An error there is raised here; leaving the block ends the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # handed over, whatever it is
            put(error)

    def consume() -> Iterator[Batch]:
        while (item := ready.get()) is not None:
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
