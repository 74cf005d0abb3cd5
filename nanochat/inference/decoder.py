"""The forward passes of the engine, each of one shape: a chunk of a prompt, and a step of decoding for a fixed number of rows."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPT
from nanochat.inference.cache import PADDING, CacheRows, KVCache
from nanochat.platform.cuda_graphs import WARM_UP, Replayed
from nanochat.platform.errors import is_out_of_memory

# the columns of what a step is given about each row; the row's pages follow
TOKEN, LENGTH, STEP, KEY, TOP_K, TEMPERATURE, PAGES = 0, 1, 2, slice(3, 5), 5, 6, 7
FEWEST_CANDIDATES = 64  # of a step in which a row draws among several tokens
PREPARED_MEMORY = 0.8  # most of the free memory that `Decoder.prepare` takes


def prefill(model: GPT, keys: Tensor, values: Tensor, given: Tensor, chunk: int) -> None:
    """Store the keys and values of `chunk` tokens of each row. given: these tokens, the row's length before, and its pages."""
    rows = CacheRows(keys, values, given[:, chunk + 1 :], given[:, chunk])
    model.hidden(given[:, :chunk], rows)


def decode(
    model: GPT, keys: Tensor, values: Tensor, given: Tensor, candidates: int, any_all: bool, alternatives: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For each row of `given` the next token and the most likely ones (R, 1 + alternatives), and the natural logarithms of their
    probabilities at temperature 1."""
    rows = CacheRows(keys, values, given[:, PAGES:], given[:, LENGTH])
    logits = model.logits(model.hidden(given[:, TOKEN, None], rows)[:, -1])
    temperature = given[:, TEMPERATURE, None].view(torch.float32)[:, 0]  # of the 64 bits the lower 32, which come first
    return kernels.sample_tokens(
        logits, given[:, KEY], given[:, STEP], given[:, TOP_K], temperature, candidates, any_all, alternatives
    )


@torch.inference_mode()
def same_results(model: GPT, few: int, many: int, tokens: int, page: int) -> bool:
    """Whether a pass over `many` rows of `tokens` tokens has the bits of passes over `few` of them at a time, each row with a page of
    keys and values before: with random numbers, which show a kernel or a library that adds in another order for more rows."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(model.config, page, model.device, model.compute_dtype)
    cache.extend(2 * many)
    for x in (cache.keys, cache.values):
        x.copy_(2 * torch.rand(x.shape[1:], generator=generator) - 1)
    pages = 1 + torch.arange(2 * many, device=model.device).view(many, 2)
    lengths = torch.full((many,), page, device=model.device)
    given = torch.randint(model.config.vocab_size, (many, tokens), generator=generator).to(model.device)

    def results(*part: Tensor) -> Tensor:
        given, pages, lengths = part
        hidden = model.hidden(given, CacheRows(cache.keys, cache.values, pages, lengths))
        return model.logits(hidden[:, -1]) if tokens == 1 else hidden

    parts = zip(*(x.split(few) for x in (given, pages, lengths)), strict=True)
    return torch.equal(results(given, pages, lengths), torch.cat([results(*part) for part in parts]))


@dataclass
class Step:
    """A step of decoding that the device may still compute: the results of `decode`, and their copies on the host."""

    on_device: tuple[Tensor, Tensor]  # valid until the next pass
    on_host: tuple[Tensor, Tensor]
    copied: torch.cuda.Event | None  # None where the results were there at once

    def wait(self) -> tuple[list[list[int]], list[list[float]]]:
        """Wait for the results: of each row the tokens and their log-probabilities."""
        if self.copied:
            self.copied.synchronize()
        tokens, logarithms = (x.tolist() for x in self.on_host)
        return tokens, logarithms


class Decoder:
    """Runs the passes. rows, chunks: the numbers of rows of a step, and of chunks of prompts that are computed together; those that are
    not needed are padded. A row's results do not depend on the others: a size beside the first serves only if `same_results` says so,
    and not where there is no memory to compare.

    replay: each kind of pass is captured in a CUDA graph and replayed, with pages for a power of two of them. The host then copies
    what is given to the device and launches one graph.
    """

    def __init__(self, model: GPT, cache: KVCache, rows: tuple[int, ...], chunks: tuple[int, ...], replay: bool):
        self.model, self.cache, self.replay = model, cache, replay
        self.sizes = {"rows": list(rows), "chunks": list(chunks)}
        self.serving: dict[tuple[str, int], bool] = {}  # sizes of which it is known whether they serve
        self.most_pages = -(-model.cos.size(0) // cache.page)
        self.forget()

    def size_for(self, count: int, kind: Literal["rows", "chunks"]) -> int:
        """The smallest size of a pass that has place for `count` rows or chunks, or else the largest one."""
        sizes = sorted(self.sizes[kind])
        fitting = [n for n in sizes if n >= count]
        return next(n for n in (*fitting, *reversed(sizes)) if self._serves(n, kind))

    def _serves(self, size: int, kind: Literal["rows", "chunks"]) -> bool:
        """Whether a pass of this size has the results of one of the first size."""
        first = self.sizes[kind][0]
        if (kind, size) not in self.serving:
            tokens = 1 if kind == "rows" else self.cache.page
            few, many = sorted((first, size))
            try:
                serves = few == many or same_results(self.model, few, many, tokens, self.cache.page)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                serves = False
            self.serving[kind, size] = serves
        return self.serving[kind, size]

    def forget(self) -> None:
        """Drop the passes, after the cache has moved."""
        on_gpu = self.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.current_stream(self.model.device).synchronize()  # a graph that is dropped may still run
        self.pool = torch.cuda.graph_pool_handle() if self.replay and on_gpu else None
        self.passes: dict[tuple, tuple[Replayed, Tensor]] = {}

    @torch.inference_mode()
    def prepare(self, rows: int, top_k: int) -> None:
        """Let the usual requests of a server not wait for memory or for a graph: take the pages that `rows` rows may need, or most of
        the free memory, and capture all passes over chunks, and those over rows that draw among about top_k tokens. Without graphs
        one pass of each kind shows that they can run at all, such as with an implementation that was asked for by name."""
        row = np.zeros(PAGES + self.most_pages, np.int64)
        row[TEMPERATURE], row[TOP_K] = as_bits(1.0), 1
        if not self.replay:
            self.prefill([([0], 0, [PADDING])])
            self.decode([row], 1, top_k, False, 0).wait()
            return self.forget()
        for kind, sizes in self.sizes.items():
            for size in sizes:
                self._serves(size, kind)  # compares before the memory is taken
        torch.cuda.empty_cache()  # mem_get_info counts what torch has given back
        free = torch.cuda.mem_get_info(self.model.device)[0]
        page = self.cache.keys[:, 0].nbytes + self.cache.values[:, 0].nbytes
        count = min(rows * self.most_pages, int(PREPARED_MEMORY * free) // page) - self.cache.pages.count
        if count > 0:
            self.cache.extend(count)
            self.forget()
        for width in sorted({self._width(pages) for pages in range(1, self.most_pages + 1)}):
            for _ in range(WARM_UP + 1):
                for size in self.sizes["chunks"]:
                    self.prefill([([0], 0, [PADDING] * width)] * size)
                for size in {self.size_for(size, "rows") for size in self.sizes["rows"]}:
                    self.decode([row] * size, width, top_k, False, 0).wait()

    def prefill(self, chunks: list[tuple[list[int], int, list[int]]]) -> None:
        """Store keys and values of chunks: tokens, a page or less, behind the number of tokens that their row has, and the row's pages.

        A chunk may read what the ones before it store.
        """
        most, page = self.size_for(len(chunks), "chunks"), self.cache.page
        for first in range(0, len(chunks), most):
            part = chunks[first : first + most]
            size = self.size_for(len(part), "chunks")
            width = self._width(max(len(pages) for _, _, pages in part))
            given = np.zeros((size, page + 1 + width), np.int64)
            for row, (tokens, length, pages) in zip(given, part, strict=False):
                row[: len(tokens)], row[page], row[page + 1 : page + 1 + len(pages)] = tokens, length, pages
            self._run(("prefill", size, width), given, partial(prefill, chunk=page))

    def decode(
        self,
        given: list[np.ndarray],
        pages: int,
        candidates: int,
        any_all: bool,
        alternatives: int,
        after: Step | None = None,
    ) -> Step:
        """Begin what `decode` does, for at most as many rows as the largest size, of which none has more than `pages` pages.

        after: the pass before, which may still be computed; the TOKEN of each row is then its place there, whose token it continues.
        """
        width, vocabulary = self._width(pages), self.model.config.vocab_size
        candidates = max(candidates, alternatives)
        if candidates > 1:  # few sizes, because each is compiled for seconds and captured
            candidates = min(max(FEWEST_CANDIDATES, 1 << (candidates - 1).bit_length()), vocabulary)
        alternatives = min(alternatives, vocabulary)
        rows = self.size_for(len(given), "rows")
        padded = np.zeros((rows, PAGES + width), np.int64)
        padded[:, TEMPERATURE], padded[:, TOP_K] = as_bits(1.0), 1
        padded[: len(given)] = np.stack(given)[:, : PAGES + width]
        work = partial(decode, candidates=candidates, any_all=any_all, alternatives=alternatives)
        key = "decode", rows, width, candidates, any_all, alternatives
        found = self._run(key, padded, work, after)
        copied = torch.cuda.Event() if self.model.device.type == "cuda" else None
        on_host = tuple(x[: len(given)].to("cpu", non_blocking=copied is not None) for x in found)
        if copied:
            copied.record(torch.cuda.current_stream(self.model.device))
        return Step(found, on_host, copied)

    def _run(
        self, key: tuple, given: np.ndarray, work: partial, after: Step | None = None
    ) -> tuple[Tensor, ...] | None:
        if key not in self.passes:
            on_device = torch.zeros(given.shape, dtype=torch.int64, device=self.model.device)
            # not a method, which would refer to the decoder: dropping that frees the cache at once
            bound = partial(work, self.model, self.cache.keys, self.cache.values, on_device)
            self.passes[key] = Replayed(bound, self.pool), on_device
        step, on_device = self.passes[key]
        on_host = torch.from_numpy(given)
        if on_device.is_cuda:
            on_host = on_host.pin_memory()  # so that the host need not wait for the copy
        on_device.copy_(on_host, non_blocking=on_device.is_cuda)
        if after:
            on_device[:, TOKEN] = after.on_device[0][:, 0][on_device[:, TOKEN]]
        return step()

    def _width(self, pages: int) -> int:
        """The pages of a pass for rows with as many."""
        pages = max(pages, 1)
        return min(1 << (pages - 1).bit_length(), self.most_pages) if self.replay else pages


def as_bits(x: float) -> int:
    """The bits of a float32 number."""
    return int(np.float32(x).view(np.int32))
