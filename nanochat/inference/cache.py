"""The key/value cache of decoding, in pages. L layers, N pages of P tokens, G key/value heads of width D, B rows of a forward pass."""

import torch
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPTConfig
from nanochat.inference.pages import Pages

PADDING = 0  # the page that rows without a conversation write to


class KVCache:
    """Keys and values (L, N, P, G, D) in the compute dtype. keep: as for Pages."""

    def __init__(self, config: GPTConfig, page: int, device: torch.device, dtype: torch.dtype, keep: bool = False):
        self.page = page
        # zeros, not empty: attention gives unused positions the weight 0, but 0 times NaN would still be NaN
        shape = (config.depth, 1, page, config.n_kv_head, config.head_width)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.pages = Pages(PADDING + 1, 0, keep)

    def extend(self, count: int) -> None:
        """Add `count` empty pages. Keys and values move to another place. Raises torch.OutOfMemoryError, and is then unchanged."""
        old = self.keys, self.values
        shape = (old[0].size(0), count, *old[0].shape[2:])
        new = [torch.cat([x, x.new_zeros(shape)], 1) for x in old]
        self.keys, self.values = new
        self.pages.extend(count)

    def copy(self, source: int, target: int) -> None:
        """Copy the content of a page."""
        for x in (self.keys, self.values):
            x[:, target] = x[:, source]


class CacheRows:
    """Rows of a cache in a forward pass, as `nanochat.gpt.Cache`. pages (B, n): of each row; lengths (B,): tokens before this pass.

    The new tokens of a row must lie in one page. A row whose first page is PADDING has no keys, and its results mean nothing.
    """

    def __init__(self, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor, mirror: "Mirror | None" = None):
        """mirror: that of these rows, which attention then reads in place of the pages."""
        self.keys, self.values, self.lengths, self.mirror = keys, values, lengths, mirror
        self.pages, page = pages.to(torch.int32), keys.size(2)
        self.places = pages.gather(1, (lengths // page)[:, None])[:, 0] * page + lengths % page

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Store k and v (B, T, G, D) behind the tokens of each row; returns keys and values (N, P, G, D), new lengths and pages."""
        keys, values = self.keys[layer], self.values[layer]
        kernels.cache_append(keys.flatten(0, 1)[None], values.flatten(0, 1)[None], k, v, self.places)
        if layer == 0:  # the same for all layers of a forward pass
            self.new_lengths = (self.lengths + k.size(1)) * (self.pages[:, 0] != PADDING)
        if self.mirror is None:
            return keys, values, self.new_lengths, self.pages
        at = torch.arange(len(k), device=k.device), self.lengths // keys.size(1), self.lengths % keys.size(1)
        keys, values = self.mirror.keys[layer], self.mirror.values[layer]
        keys[at], values[at] = k[:, 0], v[:, 0]
        return keys.flatten(0, 1), values.flatten(0, 1), self.new_lengths, self.mirror.table


class Mirror:
    """Copies of the pages of a step's B rows, one behind the other, as (L, B, n, P, G, D); in memory a head's tokens lie together.

    Without a kernel that reads pages where they lie, attention would have to copy all of them for every token. Here a row's pages are
    copied when it joins, and new tokens are stored in both places.
    """

    def __init__(self, cache: KVCache, rows: int):
        self.cache, self.rows = cache, rows
        self._allocate(1)

    def _allocate(self, pages: int) -> None:
        layers, _, page, groups, width = self.cache.keys.shape
        shape = (layers, self.rows, pages, groups, page, width)
        self.keys, self.values = (x.new_zeros(shape).transpose(3, 4) for x in (self.cache.keys, self.cache.values))
        self.table = torch.arange(self.rows * pages, device=self.keys.device).view(self.rows, pages)
        self.held: dict[
            int, tuple[object, int, int]
        ] = {}  # by identity: a row, its place and its length after the last step

    def places(self, rows: list[tuple[object, int, list[int]]]) -> list[int]:
        """The place of each row: an object that stands for it, its length and its pages. A place is the row's own while it stays."""
        longest = max(len(pages) for _, _, pages in rows)
        if longest > self.keys.size(2):
            self._allocate(1 << (longest - 1).bit_length())
        held = {
            id(row): self.held[id(row)] for row, length, _ in rows if self.held.get(id(row), (row, 0, -1))[2] == length
        }
        free = iter(set(range(self.rows)) - {place for _, place, _ in held.values()})
        for row, length, pages in rows:
            if id(row) in held:
                _, place, _ = held[id(row)]
            else:
                place = next(free)
                for mirrored, x in ((self.keys, self.cache.keys), (self.values, self.cache.values)):
                    mirrored[:, place, : len(pages)] = x[:, pages]
            held[id(row)] = row, place, length + 1
        self.held = held
        return [held[id(row)][1] for row, _, _ in rows]
