"""The stream of pretraining tokens, which can be resumed at any batch.

Threads tokenize the documents of a rank's row groups. Each document begins with bos, and together they form one endless
stream. A batch is B rows of T + 1 tokens of the stream, and each row begins with the last token of the row before. A position
(epoch, row group, document, token) names the first token of the next batch; a checkpoint stores it instead of a buffer.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from nanochat.data.batches import Batch
from nanochat.data.positions import START, TextPosition
from nanochat.data.shards import Shards
from nanochat.platform.errors import UserError
from nanochat.tokenizer.bpe import Tokenizer

DOCUMENTS_AT_ONCE = 64  # given to the threads together


def measured_batches(
    shards: Shards,
    tokenizer: Tokenizer,
    rank: int,
    world_size: int,
    pool: ThreadPoolExecutor,
    rows: int,
    length: int,
    tokens: int,
) -> list[Batch]:
    """A rank's share of the first `tokens` tokens, at least of `length`, in batches of `rows` rows, the last with fewer.

    Every rank reads all of them, and takes every world_size-th row: what is measured does not depend on world_size and rows.
    """
    each = TokenStream(shards, tokenizer, 0, 1, pool).batches(1, length)
    mine = list(islice(each, rank, max(1, tokens // length), world_size))
    parts = [mine[first : first + rows] for first in range(0, len(mine), rows)]
    return [Batch(torch.cat([x.inputs for x in part]), torch.cat([x.targets for x in part]), ()) for part in parts]


class TokenStream:
    """A rank's endless stream of tokens: row groups rank, rank + world_size, … of the shards, again in every epoch.

    Raises UserError when there are fewer row groups than ranks.
    """

    def __init__(self, shards: Shards, tokenizer: Tokenizer, rank: int, world_size: int, pool: ThreadPoolExecutor):
        if world_size > len(shards.row_groups):
            raise UserError(
                f"{len(shards.row_groups)} row groups cannot feed {world_size} processes; "
                "use fewer processes or more shards"
            )
        self.shards, self.tokenizer, self.rank, self.world_size, self.pool = shards, tokenizer, rank, world_size, pool

    def documents(self, position: TextPosition) -> Iterator[tuple[TextPosition, np.ndarray]]:
        """The documents from a position on, without end, as (position of the first token, tokens).

        Raises UserError when no document of this rank has text.
        """
        epoch, row_group, document, token = position
        row_group = self.rank if row_group < 0 else row_group
        mine = range(self.rank, len(self.shards.row_groups), self.world_size)
        without_text = 0  # row groups, one after another
        while True:
            texts = self.shards.read(row_group)
            without_text = 0 if texts else without_text + 1
            if without_text == len(mine):
                raise self.shards.without_text(mine)
            for first in range(document, len(texts), DOCUMENTS_AT_ONCE):
                chunk = texts[first : first + DOCUMENTS_AT_ONCE]
                for index, tokens in enumerate(self.tokenizer.encode_batch(chunk, self.pool), first):
                    tokens = np.concatenate([[self.tokenizer.bos], tokens]).astype(np.int64)
                    yield (epoch, row_group, index, token), tokens[token:]
                    token = 0
            document = 0
            row_group += self.world_size
            if row_group >= len(self.shards.row_groups):
                epoch, row_group = epoch + 1, self.rank

    def batches(self, rows: int, length: int, position: TextPosition = START) -> Iterator[Batch]:
        """Batches of (rows, length) tokens from a position on, without end."""
        needed = rows * length
        waiting: deque[tuple[TextPosition, np.ndarray]] = deque()
        available = 0  # tokens in `waiting`
        for start, tokens in self.documents(position):
            waiting.append((start, tokens))
            available += len(tokens)
            while available > needed:  # one token more: the last target, which is the first input of the next batch
                flat = np.concatenate([tokens for _, tokens in waiting])[: needed + 1].copy()  # of a long document
                consumed = needed
                while len(waiting[0][1]) <= consumed:
                    consumed -= len(waiting.popleft()[1])
                (epoch, row_group, document, token), tokens = waiting[0]
                waiting[0] = ((epoch, row_group, document, token + consumed), tokens[consumed:])
                available -= needed
                flat = torch.from_numpy(flat)
                yield Batch(flat[:-1].view(rows, length), flat[1:].view(rows, length), waiting[0][0])
