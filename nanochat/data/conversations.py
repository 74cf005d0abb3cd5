"""Conversations as batches: mixtures of tasks, packed into one stream or padded one a row."""

import random
from collections.abc import Iterator, Sequence

import torch

from nanochat.data.batches import Batch
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.tokenizer.chat_format import render

SHUFFLE_SEED = 42


class Mixture:
    """Tasks in one shuffled order; a task listed twice comes twice."""

    def __init__(self, tasks: Sequence[Sequence[dict]]):
        self.tasks = list(tasks)
        self._order = [(task, index) for task, rows in enumerate(self.tasks) for index in range(len(rows))]
        random.Random(SHUFFLE_SEED).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        task, row = self._order[index]
        return self.tasks[task][row]

    def sizes(self) -> dict[str, int]:
        """Rows by the name of their task."""
        sizes: dict[str, int] = {}
        for task in self.tasks:
            sizes[task.name] = sizes.get(task.name, 0) + len(task)
        return sizes


class First:
    """The first `limit` rows of a task; all of them when it has fewer or the limit is negative."""

    def __init__(self, task: Sequence[dict], limit: int):
        self.task, self.name = task, task.name
        self._size = len(task) if limit < 0 else min(limit, len(task))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict:
        return self.task[index]


def packed_batches(
    mixture: Mixture,
    tokenizer: Tokenizer,
    rows: int,
    length: int,
    rank: int = 0,
    world_size: int = 1,
    position: tuple[int, int] = (0, 0),
) -> Iterator[Batch]:
    """One epoch as one stream of tokens cut into (rows, length), loss on all of them; the tail is dropped.

    position: (conversations this rank has used up, first token wanted of the next one).
    """
    used, skip = position
    needed = rows * length
    buffer: list[int] = []
    pieces: list[int] = []  # tokens left of each conversation in the buffer
    for index in range(used * world_size + rank, len(mixture), world_size):
        ids, _ = render(tokenizer, mixture[index], length)
        ids, skip = ids[skip:], 0
        buffer += ids
        pieces.append(len(ids))
        while len(buffer) > needed:
            flat = torch.tensor(buffer[: needed + 1])
            buffer, consumed = buffer[needed:], needed
            while pieces[0] <= consumed:
                consumed -= pieces.pop(0)
                used, position = used + 1, (used + 1, 0)
            pieces[0] -= consumed
            position = (position[0], position[1] + consumed)
            progress = min(1.0, used * world_size / len(mixture))
            yield Batch(flat[:-1].view(rows, length), flat[1:].view(rows, length), position, progress)


def padded_batches(
    mixture: Mixture,
    tokenizer: Tokenizer,
    rows: int,
    length: int,
    rank: int = 0,
    world_size: int = 1,
    position: tuple[int] = (0,),
) -> Iterator[Batch]:
    """One epoch, one conversation a row, padded with assistant_end to the longest; loss where the mask is 1.

    A rank takes rows rank, rank + W, …; what does not fill a batch on every rank is dropped. position:
    (conversations this rank has used up,).
    """
    for used in range(position[0], len(mixture) // world_size - rows + 1, rows):
        numbers = range(used, used + rows)
        rendered = [render(tokenizer, mixture[number * world_size + rank], length + 1) for number in numbers]
        width = max(len(ids) for ids, _ in rendered) - 1
        inputs = torch.full((rows, width), tokenizer.special("assistant_end"))
        targets = torch.full((rows, width), -1)
        for row, (ids, mask) in enumerate(rendered):
            ids, mask = torch.tensor(ids), torch.tensor(mask)
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], -1)
        yield Batch(inputs, targets, (numbers.stop,), numbers.stop * world_size / len(mixture))
