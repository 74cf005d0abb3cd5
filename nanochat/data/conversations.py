"""Conversations as batches: mixtures of tasks, packed into one stream or padded to one conversation per row."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nanochat.data.batches import Batch
from nanochat.tokenizer.bpe import Tokenizer
from nanochat.tokenizer.chat_format import render

SHUFFLE_SEED = 42


class Mixture:
    """The rows of several tasks in one shuffled order, the same in every run; a task that is listed twice comes twice."""

    def __init__(self, tasks: Sequence[Sequence[dict]]):
        self.tasks = list(tasks)
        self._order = [(task, index) for task, rows in enumerate(self.tasks) for index in range(len(rows))]
        random.Random(SHUFFLE_SEED).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict:
        task, row = self._order[index]
        return self.tasks[task][row]

    def files(self) -> list[Path]:
        """The files that the rows are made from."""
        return [path for task in self.tasks for path in task.files]

    def sizes(self) -> dict[str, int]:
        """The number of rows of each task, by its name."""
        sizes: dict[str, int] = {}
        for task in self.tasks:
            sizes[task.name] = sizes.get(task.name, 0) + len(task)
        return sizes


class Limited:
    """The first `limit` rows of a task; all of them when it has fewer or the limit is negative."""

    def __init__(self, task: Sequence[dict], limit: int):
        self.task, self.name, self.files = task, task.name, task.files
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
    """One epoch as a stream of tokens that is cut into batches (rows, length), with loss on every token.

    Rank r takes conversations r, r + world_size, … of the mixture, each cut to `length` tokens; tokens at the end that do not
    fill a batch are dropped. position: (conversations that this rank has used up, first unused token of the next one).
    """
    used, skip = position
    needed = rows * length
    buffer: list[int] = []
    pieces: list[int] = []  # how many tokens of each conversation are in the buffer
    # conversations are dealt out one by one, so that the ranks get about equally many tokens
    for index in range(used * world_size + rank, len(mixture), world_size):
        ids, _ = render(tokenizer, mixture[index], length)
        ids, skip = ids[skip:], 0
        buffer += ids
        pieces.append(len(ids))
        while len(buffer) > needed:  # one token more than the inputs: the last target
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
    """One epoch with one conversation per row, padded with assistant_end to the longest; loss where the mask of `render` is 1.

    Rank r takes conversations r, r + world_size, … of the mixture, each cut to length + 1 tokens; those at the end that do not
    fill a batch on every rank are dropped. position: (conversations that this rank has used up,).
    """
    for used in range(position[0], len(mixture) // world_size - rows + 1, rows):
        numbers = range(used, used + rows)
        conversations = [mixture[number * world_size + rank] for number in numbers]
        progress = numbers.stop * world_size / len(mixture)
        yield _padded(conversations, tokenizer, length, (numbers.stop,), progress)


def measured_batches(
    mixture: Mixture, tokenizer: Tokenizer, rows: int, length: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Every conversation of this rank, as padded_batches makes them; the last batch may have fewer rows."""
    mine = range(rank, len(mixture), world_size)
    for first in range(0, len(mine), rows):
        numbers = mine[first : first + rows]
        yield _padded([mixture[number] for number in numbers], tokenizer, length)


def _padded(
    conversations: list[dict], tokenizer: Tokenizer, length: int, position: tuple = (), progress: float = 0.0
) -> Batch:
    rendered = [render(tokenizer, conversation, length + 1) for conversation in conversations]
    width = max(len(ids) for ids, _ in rendered) - 1
    inputs = torch.full((len(rendered), width), tokenizer.special("assistant_end"))
    targets = torch.full((len(rendered), width), -1)
    for row, (ids, mask) in enumerate(rendered):
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], -1)
    return Batch(inputs, targets, position, progress)
