"""Batches of pretraining tokens, with a position from which the same batches come again.

Documents of a rank's row groups are tokenised on threads, begin with bos and form one endless stream; a batch is B rows
of T + 1 of its tokens, each row beginning with the last token of the one before. A position (epoch, row group,
document, token) names the first token of the next batch, so resuming needs no saved buffer.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.data.shards import Shards
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

Position = tuple[int, int, int, int]  # epoch, row group, document in it, token of that
START: Position = (0, -1, 0, 0)  # row group −1: the rank's first
DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Batch:
    """inputs, targets: (B, T) int64, targets −1 where nothing is to be learned; position: where the next one begins."""

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


class TokenStream:
    """A rank's endless stream of tokens."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, rank: int, world_size: int, pool: ThreadPoolExecutor):
        if world_size > len(shards.row_groups):
            raise UserError(
                f"{len(shards.row_groups)} row groups cannot feed {world_size} processes; "
                "use fewer processes or more shards"
            )
        self.shards, self.tokenizer, self.rank, self.world_size, self.pool = shards, tokenizer, rank, world_size, pool

    def documents(self, position: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """(position of its first token, tokens) of each document from a position on, for ever."""
        epoch, row_group, document, token = position
        row_group = self.rank if row_group < 0 else row_group
        while True:
            texts = self.shards.read(row_group)
            for first in range(document, len(texts), DOCUMENTS_AT_ONCE):
                some = texts[first : first + DOCUMENTS_AT_ONCE]
                for index, tokens in enumerate(self.tokenizer.encode_batch(some, self.pool), first):
                    tokens = np.concatenate([[self.tokenizer.bos], tokens]).astype(np.int64)
                    yield (epoch, row_group, index, token), tokens[token:]
                    token = 0
            document = 0
            row_group += self.world_size
            if row_group >= len(self.shards.row_groups):
                epoch, row_group = epoch + 1, self.rank

    def batches(self, rows: int, length: int, position: Position = START) -> Iterator[Batch]:
        """Batches of `rows` × `length` tokens from a position on, for ever."""
        needed = rows * length
        waiting: deque[tuple[Position, np.ndarray]] = deque()
        held = 0
        for where, tokens in self.documents(position):
            waiting.append((where, tokens))
            held += len(tokens)
            while held > needed:  # one token beyond: the last target, and the first input of the next batch
                flat = np.concatenate([tokens for _, tokens in waiting])[: needed + 1]
                consumed = needed
                while len(waiting[0][1]) <= consumed:
                    consumed -= len(waiting.popleft()[1])
                (epoch, row_group, document, token), tokens = waiting[0]
                waiting[0] = ((epoch, row_group, document, token + consumed), tokens[consumed:])
                held -= needed
                flat = torch.from_numpy(flat)
                yield Batch(flat[:-1].view(rows, length), flat[1:].view(rows, length), waiting[0][0])


def reposition(positions: list[Position], world_size: int, rank: int, row_groups: int) -> Position:
    """Where a rank begins when the saved positions come from another number of ranks: after all that was read.

    What was left of the row groups then open is skipped, so that nothing is read twice.
    """
    if len(positions) == world_size:
        return positions[rank]
    epoch, furthest = max((p[0], p[1]) for p in positions)
    row_group = furthest + 1 + (rank - furthest - 1) % world_size
    if row_group >= row_groups:
        return (epoch + 1, rank, 0, 0)
    return (epoch, row_group, 0, 0)


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
