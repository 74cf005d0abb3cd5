"""The engine: continuous batching of rows, which join and leave while others are decoded, with calls of the calculator.

A row is a prompt with its answer. Its keys and values lie in pages of a cache, and what several prompts begin with is kept once. A
step computes some pages of waiting prompts, and then the next token of every row that has its prompt.

A row's tokens and log-probabilities are, bit for bit, those that it has alone on the same device: passes have a fixed number of rows,
attention adds the keys in parts of fixed size, chunks of a prompt begin at the same positions, and random numbers are made from
the row's own seed. Kwon et al. 2023 (pages), Yu et al. 2022 (joining and leaving at every step), Agrawal et al. 2023 (chunks).
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

import nanochat_kernels as kernels
from nanochat.gpt import GPT
from nanochat.inference.cache import KVCache
from nanochat.inference.calculator import calculate
from nanochat.inference.decoder import KEY, LENGTH, PAGES, STEP, TEMPERATURE, TOKEN, TOP_K, Decoder, Step, as_bits
from nanochat.inference.pages import ROOT
from nanochat.inference.sampling import ALL, check_room, check_sampling, random_key
from nanochat.platform.errors import UserError, is_out_of_memory
from nanochat.tokenizer.bpe import Tokenizer

# sizes of a pass over chunks, of which the largest is a step's, and over rows, of which a step may have several
CHUNKS_AT_ONCE = {"cuda": (2, 8, 16, 32), "cpu": (1, 2, 4)}
STEP_ROWS = {"cuda": (64,), "cpu": (16, 64)}
MOST_ROWS = {"cuda": 256, "cpu": 64}
PAGE = {"cuda": 128, "cpu": 64}  # tokens of a page, and of the chunks in which prompts are computed
LEAST_PAGES = 16  # by which the cache grows
ALTERNATIVES = 20  # the most likely tokens of which log-probabilities can be given


class Token(NamedTuple):
    """A token of an answer.

    sampled: False for one that the calculator forced, which has no log-probability. logprob: the natural logarithm of its probability
    at temperature 1. likely: the most likely tokens and their logprobs, best first, if the row asked for them.
    """

    token: int
    sampled: bool
    logprob: float | None
    likely: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """A prompt and the state of its answer. Made by `Engine.row`.

    room: the most tokens that may come. output: tokens that nobody has taken yet. finish: why the answer ended, "stop" for a token
    that ends it and "length" without more room; None while it has not, or when it was removed.
    """

    prompt: list[int]
    room: int
    alternatives: int
    most_pages: int
    numbers: np.ndarray  # what a step is given about the row; see decoder.py
    output: deque[Token] = field(default_factory=deque)
    done: bool = False
    finish: Literal["stop", "length"] | None = None
    pages: list[int] = field(default_factory=list)
    length: int = 0  # tokens in the cache
    step: int = 0  # tokens of the answer
    expression: list[int] | None = None  # tokens since python_start
    forced: deque[int] = field(default_factory=deque)  # tokens of the calculator's answer, which come next


class Engine:
    """Generates text with a model and its tokenizer, for as many rows as are given to it. One thread at a time may call it."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        replay: bool | None = None,
        rows: int | None = None,
        frozen: bool = False,
    ):
        """replay: run each pass from a CUDA graph (None: if the model is on a GPU). rows: the most that are decoded at the same time,
        while others wait (None: MOST_ROWS). frozen: the weights never change, so that what was computed for the beginning of
        a prompt serves later prompts too, as long as its memory is not needed."""
        self.model, self.tokenizer = model, tokenizer
        kind = model.device.type if model.device.type in PAGE else "cpu"
        self.replay = kind == "cuda" if replay is None else replay
        self.cache = KVCache(model.config, PAGE[kind], model.device, model.compute_dtype, keep=frozen)
        self.decoder = Decoder(model, self.cache, STEP_ROWS[kind], CHUNKS_AT_ONCE[kind], self.replay)
        self.rows = MOST_ROWS[kind] if rows is None else rows
        self.stops = {tokenizer.special("assistant_end"), tokenizer.bos}
        self.positions = model.cos.size(0)
        self.waiting: deque[Row] = deque()
        self._begin()

    def row(
        self,
        prompt: list[int],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        sample: int = 0,
        alternatives: int = 0,
    ) -> Row:
        """A row for `add`. temperature 0 takes the most likely token; top_k None samples from the whole vocabulary. Rows with another
        seed, sample or prompt have other random numbers. alternatives: how many of the most likely tokens to tell, at most 20.

        Raises UserError for arguments that cannot be sampled from and for a prompt that fills the model's positions.
        """
        check_sampling([prompt], max_tokens, temperature, top_k, 1)
        check_room(prompt, self.positions)
        if not 0 <= alternatives <= ALTERNATIVES:
            raise UserError(f"log-probabilities of {alternatives} tokens were asked for; it can be 0 to {ALTERNATIVES}")
        numbers = np.zeros(PAGES + self.decoder.most_pages, np.int64)
        numbers[KEY] = random_key(seed, sample, prompt)
        if temperature < torch.finfo(torch.float32).tiny:
            temperature, top_k = 1.0, 1
        numbers[TEMPERATURE] = as_bits(temperature)
        numbers[TOP_K] = ALL if top_k is None or top_k >= self.model.config.vocab_size else top_k
        room = min(max_tokens, self.positions - len(prompt))
        return Row(prompt, room, alternatives, -(-(len(prompt) + room) // self.cache.page), numbers)

    def add(self, rows: list[Row]) -> None:
        """Let the rows join when there is place for them, in this order. `step` fills their `output`."""
        self.waiting.extend(rows)

    def remove(self, row: Row) -> None:
        """End a row and free its memory, if it has not ended yet."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.filling or row in self.running:
            (self.filling if row in self.filling else self.running).remove(row)
            self._release(row)
        row.done = True
        self._settle()

    def cache_bytes(self, rows: int, tokens: int) -> int:
        """Bytes of the keys and values of `rows` rows at a time, if each has `tokens` tokens with its answer and no page is shared."""
        page = self.cache.keys[:, 0].nbytes + self.cache.values[:, 0].nbytes
        return min(rows, self.rows) * -(-min(tokens, self.positions) // self.cache.page) * page

    @property
    def busy(self) -> bool:
        """Whether a row has not ended."""
        return bool(self.waiting or self.filling or self.running)

    @torch.inference_mode()
    def step(self) -> None:
        """Let waiting rows join, compute chunks of their prompts, and decode one token of every row that has its prompt.

        After an error or an interrupt the rows that had joined have ended, and of what was computed nothing is kept, because a page
        may have a name and no content yet: prompts are computed again, and graphs captured again.
        """
        try:
            self._step()
        except BaseException:
            for row in (*self.filling, *self.running):
                row.done, row.pages = True, []
            self._begin()
            self.cache.clear()
            self.decoder.forget()
            raise

    def _begin(self) -> None:
        """Begin without rows that have joined."""
        self.filling: deque[Row] = deque()  # with a part of their prompt
        self.running: list[Row] = []
        self.ahead: tuple[list[Row], Step] | None = None  # rows whose next token is computed already, see _run_ahead
        self.reserved = 0  # pages that the rows which are not waiting may need
        self.full = False  # the device had no memory for more pages, and no row has ended since

    def _step(self) -> None:
        while self.waiting and len(self.filling) + len(self.running) < self.rows and self._reserve(self.waiting[0]):
            self.filling.append(self.waiting.popleft())
        chunks, computed = [], 0
        while self.filling and computed < max(self.decoder.sizes["chunks"]):
            row = self.filling[0]
            if row.length < len(row.prompt) - 1:
                computed += self._fill(row, chunks)
            if row.length == len(row.prompt) - 1:  # the last token is the first one that is decoded
                row.numbers[TOKEN] = row.prompt[-1]
                self.running.append(self.filling.popleft())
        self.decoder.prefill(chunks)
        if self.ahead and not all(row.done for row in self.ahead[0]):
            passes = [self.ahead]
        else:
            passes = [(rows, self._decode(rows)) for rows in self._groups()]
        self.ahead = self._run_ahead(*passes[0]) if len(passes) == 1 else None
        for rows, step in passes:
            self._receive(rows, step)
        for row in [row for row in self.running if row.done]:
            self.running.remove(row)
            self._release(row)
        self._settle()

    def _settle(self) -> None:
        """Let no step run for nothing when no row is left: the engine may be dropped now, or the weights may change."""
        if self.ahead and not self.running:
            self.ahead[1].wait()
            self.ahead = None

    def _groups(self) -> Iterator[list[Row]]:
        """The rows of each pass of a step. A pass has one implementation of sample_tokens: rows that the kernels do not take have
        passes of their own."""
        for beyond in (False, True):
            rows = [row for row in self.running if (row.numbers[TOP_K] > kernels.MOST_CANDIDATES) == beyond]
            size = self.decoder.size_for(len(rows), "rows")
            yield from (rows[first : first + size] for first in range(0, len(rows), size))

    def _run_ahead(self, rows: list[Row], step: Step) -> tuple[list[Row], Step] | None:
        """Begin the step after the one that is computed now, whose tokens only the device knows, so that it need not wait for the host.

        What is computed for a row that ends now is not used, and rows that join meanwhile wait for a step. Nothing is begun where
        other rows need passes before, which take the place of this step's results, or where the calculator decides on a token.
        """
        left = [(place, row) for place, row in enumerate(rows) if not row.done]
        if not self.replay or self.filling or len(left) < len(self.running):
            return None
        left = [(place, row) for place, row in left if row.step + 1 < row.room]
        if not left or any(row.forced for _, row in left):
            return None
        for place, row in left:
            row.numbers[TOKEN] = place
        rows = [row for _, row in left]
        return rows, self._decode(rows, step)

    def _reserve(self, row: Row) -> bool:
        """Whether the cache has as many pages as the row and those before it may need; it grows for that."""
        count = self.cache.pages.count
        missing = self.reserved + row.most_pages - count
        if missing > 0:
            if self.full:
                return False
            if not self._extend(max(missing, count // 2, LEAST_PAGES)) and not self._extend(missing):
                if not self.reserved:
                    raise torch.OutOfMemoryError(
                        f"there is no memory for a row of {row.most_pages * self.cache.page} tokens"
                    )
                self.full = True  # until another row has ended
                return False
            self.decoder.forget()
        self.reserved += row.most_pages
        return True

    def _extend(self, count: int) -> bool:
        """Whether the device had memory for so many more pages."""
        try:
            self.cache.extend(count)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _fill(self, row: Row, chunks: list[tuple]) -> bool:
        """Give the row the next page of its prompt; returns whether it must be computed, and is one of the chunks then."""
        page, pages = self.cache.page, self.cache.pages
        tokens = tuple(row.prompt[row.length : min(row.length + page, len(row.prompt) - 1)])
        before = row.pages[-1] if row.pages else ROOT
        found = pages.find(before, tokens)
        if found is not None and len(tokens) == page:
            self._append(row, pages.share(found))
        else:  # the row will write to the page
            self._append(row, pages.take())
            if found is None:
                chunks.append((tokens, row.length, list(row.pages)))
            else:
                self.decoder.prefill(chunks)  # the page may be one of them
                chunks.clear()
                self.cache.copy(found, row.pages[-1])
            pages.name(row.pages[-1], before, tokens)
        row.length += len(tokens)
        return found is None

    def _append(self, row: Row, page: int) -> None:
        row.numbers[PAGES + len(row.pages)] = page
        row.pages.append(page)

    def _decode(self, rows: list[Row], after: Step | None = None) -> Step:
        """Begin to compute the next token of each of at most as many rows as a pass has, or after a step the one that follows."""
        ahead = after is not None
        for row in rows:
            length = row.length + ahead
            if length == len(row.pages) * self.cache.page:
                self._append(row, self.cache.pages.take())
            row.numbers[LENGTH], row.numbers[STEP] = length, row.step + ahead
        top_k = [int(row.numbers[TOP_K]) for row in rows]
        alternatives = ALTERNATIVES if any(row.alternatives for row in rows) else 0
        pages = max(len(row.pages) for row in rows)
        return self.decoder.decode(
            [row.numbers for row in rows], pages, max(*top_k, 1), ALL in top_k, alternatives, after
        )

    def _receive(self, rows: list[Row], step: Step) -> None:
        """Give the rows their tokens, when they are there."""
        for row, (sampled, *likely), (logprob, *others) in zip(rows, *step.wait(), strict=True):
            if row.done:  # since the step began
                continue
            token, forced = self._next(row, sampled)
            row.length, row.step = row.length + 1, row.step + 1
            if row.done:
                row.finish = "stop"
                continue
            alternatives = list(zip(likely, others, strict=True))[: row.alternatives]
            row.output.append(Token(token, not forced, None if forced else logprob, alternatives))
            row.numbers[TOKEN] = token
            if row.step == row.room:
                row.done, row.finish = True, "length"

    def _release(self, row: Row) -> None:
        self.cache.pages.give_back(row.pages)
        self.reserved -= row.most_pages
        self.full = False
        row.pages = []

    def _next(self, row: Row, sampled: int) -> tuple[int, bool]:
        """The row's next token and whether it was forced; calls the calculator at the end of an expression."""
        special = self.tokenizer.special
        if row.forced:
            return row.forced.popleft(), True
        if sampled in self.stops:
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

    def _rows(self, prompts: list[list[int]], max_tokens: int, samples: int = 1, numbers=None, **sampling) -> list[Row]:
        check_sampling(prompts, max_tokens, sampling.get("temperature", 1.0), sampling.get("top_k"), samples)
        rows, times = [], Counter()  # a prompt that is given twice gets other random numbers the second time
        for prompt, number in zip(prompts, [None] * len(prompts) if numbers is None else numbers, strict=True):
            first = samples * (times[tuple(prompt)] if number is None else number)
            rows += [self.row(prompt, max_tokens, sample=first + more, **sampling) for more in range(samples)]
            times[tuple(prompt)] += 1
        return rows

    def stream(
        self, prompts: list[list[int]], max_tokens: int, **sampling
    ) -> Iterator[tuple[list[int | None], list[bool]]]:
        """Generate up to max_tokens tokens for len(prompts)·samples rows, one token of every row at a time.

        sampling: samples of each prompt, 1 by default, which are adjacent rows; temperature, top_k and seed as in `row`; numbers, one
        for each prompt: the same prompt has the same random numbers in any call with its number, and others with another. Each item is
        (tokens, sampled), with an entry for every row. A token is None once its row has ended: with assistant_end or bos, which are
        not returned, after max_tokens, or where the model has no more positions, however long the other rows are. sampled is False
        for a token that the calculator forced. Errors: those of `row`.
        """
        rows = self._rows(prompts, max_tokens, **sampling)
        self.add(rows)
        try:
            while True:
                while any(not (row.output or row.done) for row in rows):
                    self.step()
                column = [row.output.popleft() if row.output else None for row in rows]
                if not any(column):
                    return
                yield [found and found.token for found in column], [found is None or found.sampled for found in column]
        finally:
            for row in rows:
                self.remove(row)

    def answers(
        self, prompts: list[list[int]], max_tokens: int, rows: int | None = None, **sampling
    ) -> Iterator[tuple[int, list[Token]]]:
        """Each row's number and all of its tokens, as soon as it has ended; arguments, rows and errors as in `stream`.

        rows: the most of them that are generated at the same time, which changes none of them.
        """
        waiting = deque(enumerate(self._rows(prompts, max_tokens, **sampling)))
        left: dict[int, Row] = {}
        try:
            while waiting or left:
                while waiting and (rows is None or len(left) < rows):
                    number, row = waiting.popleft()
                    left[number] = row
                    self.add([row])
                self.step()
                for number in [number for number, row in left.items() if row.done]:
                    yield number, list(left.pop(number).output)
        finally:
            for row in left.values():
                self.remove(row)

    def generate(self, prompts: list[list[int]], max_tokens: int, **sampling) -> list[list[int]]:
        """The generated tokens of each row, without its prompt and the token that ended it; arguments as in `stream`."""
        found = dict(self.answers(prompts, max_tokens, **sampling))
        return [[token.token for token in found[number]] for number in range(len(found))]
