"""The engine: batched decoding of prompts of different lengths, with calls of the calculator.

The rows of a batch are decoded together. The cache keeps a length for each row, so that prompts need no left padding.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from nanochat.gpt import GPT
from nanochat.inference.cache import KVCache
from nanochat.inference.calculator import calculate
from nanochat.inference.decoder import Decoder
from nanochat.inference.sampling import Sampler, check_sampling
from nanochat.platform.errors import UserError
from nanochat.tokenizer.bpe import Tokenizer

LEAST_CAPACITY = 256  # positions of a cache that is kept for other calls; more are powers of two


@dataclass
class _Row:
    """The state of a row while it is decoded. room: the most tokens that may come."""

    room: int
    done: bool = False
    expression: list[int] | None = None  # tokens since python_start
    forced: deque[int] = field(default_factory=deque)  # tokens of the calculator's answer, which come next


class Engine:
    """Generates text with a model and its tokenizer."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, replay: bool | None = None):
        """replay: decode by replaying a CUDA graph, which serves later calls with as many rows and the same sampling too (None: if the
        model is on a GPU)."""
        self.model, self.tokenizer = model, tokenizer
        self.replay = model.device.type == "cuda" if replay is None else replay
        self.kept: dict[tuple, Decoder] = {}  # that of the last generation that ended, under what it serves
        self.stops = {tokenizer.special("assistant_end"), tokenizer.bos}
        self.positions = model.cos.size(0)

    @torch.inference_mode()
    def stream(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        samples: int = 1,
        seed: int = 42,
    ) -> Iterator[tuple[list[int | None], list[bool]]]:
        """Generate up to max_tokens tokens for len(prompts)·samples rows, one token of every row at a time.

        Each item is (tokens, sampled), with an entry for every row; the samples of a prompt are adjacent rows. A token is None
        once its row has ended: with assistant_end or bos, which are not returned, after max_tokens, or where the model has no more
        positions, however long the other rows are. sampled is False for a token that the calculator forced. temperature 0 takes
        the most likely token; top_k None samples from the whole vocabulary.
        Raises UserError for arguments that cannot be sampled from and for a prompt that fills the model's positions.
        """
        check_sampling(prompts, max_tokens, temperature, top_k, samples)
        device = self.model.device
        # torch takes seeds below 2**64; the upper half stands for negative ones
        generator = torch.Generator(device=device).manual_seed(seed % 2**63 if seed >= 0 else 2**63 + seed % 2**63)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        if longest >= self.positions:
            raise UserError(
                f"a prompt of {longest} tokens leaves none of the model's {self.positions} positions for an answer; shorten it"
            )
        room = [min(max_tokens, self.positions - len(prompt)) for prompt in prompts]
        capacity = max(len(prompt) + tokens for prompt, tokens in zip(prompts, room, strict=True))
        padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        key = len(prompts) * samples, self._capacity(capacity), temperature, top_k
        decoder = self.kept.pop(key, None) or self._decoder(*key)  # no other generation may use it meanwhile
        decoder.generator = generator
        try:
            yield from self._decode(decoder, prompts, padded, lengths, room, samples)
        finally:
            if self.replay:
                self.kept = {key: decoder}

    def _decode(
        self, decoder: Decoder, prompts: list[list[int]], padded: Tensor, lengths: Tensor, room: list[int], samples: int
    ) -> Iterator[tuple[list[int | None], list[bool]]]:
        """The items of `stream`. padded (prompts, longest), lengths (prompts,): the prompts' tokens, and how many there are."""
        device, model, longest = self.model.device, self.model, padded.size(1)
        # the prompt is computed once for all of its samples
        cache = decoder.cache.every(samples)
        # Padding is on the right: its keys and values lie beyond the row's length in the cache and are overwritten later.
        hidden = model.hidden(padded.to(device), cache)
        cache.advance(lengths.to(device), longest)
        decoder.cache.repeat(samples, longest)
        last = hidden[torch.arange(len(prompts), device=device), lengths.to(device) - 1]
        sampled = decoder.choose(model.logits(last).repeat_interleave(samples, dim=0))
        rows = [_Row(tokens) for tokens in room for _ in range(samples)]
        filled = [len(prompt) for prompt in prompts for _ in range(samples)]  # positions of each row
        for step in count(1):
            column = [self._next(row, token) for row, token in zip(rows, sampled, strict=True)]
            yield (
                [None if row.done else token for row, (token, _) in zip(rows, column, strict=True)],
                [not forced for _, forced in column],
            )
            for row in rows:
                row.done = row.done or step == row.room
            if all(row.done for row in rows):
                return
            grown = [int(not row.done) for row in rows]
            filled = [length + more for length, more in zip(filled, grown, strict=True)]
            sampled = decoder([token for token, _ in column], grown, max(filled))

    def _capacity(self, positions: int) -> int:
        """The positions of a cache for as many: with replay more, so that it serves more calls."""
        return max(LEAST_CAPACITY, 1 << (positions - 1).bit_length()) if self.replay else positions

    def _decoder(self, rows: int, capacity: int, temperature: float, top_k: int | None) -> Decoder:
        self.kept = {}  # its memory is free for the new one
        model = self.model
        cache = KVCache.create(model.config, rows, capacity, model.device, model.compute_dtype, self.replay)
        sampler = Sampler(rows, model.config.vocab_size, temperature, top_k, model.device)
        return Decoder(model, cache, sampler, self.replay)

    def generate(self, prompts: list[list[int]], max_tokens: int, **sampling) -> list[list[int]]:
        """The generated tokens of each row, without its prompt and the token that ended it; `sampling` as in `stream`."""
        rows: list[list[int]] = [[] for _ in range(len(prompts) * sampling.get("samples", 1))]
        for tokens, _ in self.stream(prompts, max_tokens, **sampling):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def _next(self, row: _Row, sampled: int) -> tuple[int, bool]:
        """The row's next token and whether it was forced; calls the calculator at the end of an expression."""
        special = self.tokenizer.special
        if row.forced:
            return row.forced.popleft(), True
        if row.done or sampled in self.stops:
            row.done = True
            return sampled, False
        if sampled == special("python_start"):
            row.expression = []
        elif sampled == special("python_end") and row.expression is not None:
            result = calculate(self.tokenizer.decode(row.expression))
            if result is not None:
                row.forced.extend([special("output_start"), *self.tokenizer.encode(result), special("output_end")])
            row.expression = None
        elif row.expression is not None:
            row.expression.append(sampled)
        return sampled, False
