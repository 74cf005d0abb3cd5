"""The key/value cache of decoding, in pages. L layers, N pages of P tokens, G key/value heads of width D, B rows of a forward pass."""

import torch
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPTConfig
from nanochat.inference.pages import Pages

PADDING = 0  # the page that rows without a conversation write to


class KVCache:
    """Keys and values (L, N, P, G, D) in the compute dtype. keep: as for Pages.

    On a CPU a head's tokens of a page lie together in memory, as the products of attention there read them.
    """

    def __init__(self, config: GPTConfig, page: int, device: torch.device, dtype: torch.dtype, keep: bool = False):
        self.page, self.heads_first = page, device.type == "cpu"
        # zeros, not empty: attention gives unused positions the weight 0, but 0 times NaN would still be NaN
        shape = (config.depth, 0, page, config.n_kv_head, config.head_width)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        self.keys, self.values = (self._extended(empty, 1) for _ in range(2))
        self.pages = Pages(PADDING + 1, 0, keep)

    def _extended(self, x: Tensor, count: int) -> Tensor:
        """x with `count` more pages, which are zeros."""
        x = x.transpose(2, 3) if self.heads_first else x
        pages = x.size(1)
        # not torch.cat of the old pages and zeros, which needs the memory of the new ones twice
        y = x.new_empty(x.size(0), pages + count, *x.shape[2:])
        y[:, :pages] = x
        y[:, pages:] = 0
        return y.transpose(2, 3) if self.heads_first else y

    def extend(self, count: int) -> None:
        """Add `count` empty pages. Keys and values move to another place. If there is no memory for that, the error that torch raises
        leaves the cache unchanged; see `is_out_of_memory`."""
        self.keys, self.values = [self._extended(x, count) for x in (self.keys, self.values)]
        self.pages.extend(count)

    def clear(self) -> None:
        """Forget what every page holds and who uses it."""
        self.pages = Pages(PADDING + 1, self.pages.count, self.pages.keep)

    def copy(self, source: int, target: int) -> None:
        """Copy the content of a page."""
        for x in (self.keys, self.values):
            x[:, target] = x[:, source]


class CacheRows:
    """Rows of a cache in a forward pass, as `nanochat.gpt.Cache`. pages (B, n): of each row; lengths (B,): tokens before this pass.

    The new tokens of a row must lie in one page. A row whose first page is PADDING has no keys, and its results mean nothing.
    """

    def __init__(self, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor):
        self.keys, self.values, self.lengths = keys, values, lengths
        self.pages, page = pages.to(torch.int32), keys.size(2)
        self.page, self.position = pages.gather(1, (lengths // page)[:, None])[:, 0], lengths % page
        self.places = self.page * page + self.position

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Store k and v (B, T, G, D) behind the tokens of each row; returns keys and values (N, P, G, D), new lengths and pages."""
        keys, values = self.keys[layer], self.values[layer]
        if keys.is_contiguous():
            kernels.cache_append(keys.flatten(0, 1)[None], values.flatten(0, 1)[None], k, v, self.places)
        else:  # the tokens of all pages have no common stride
            at = self.page[:, None], self.position[:, None] + torch.arange(k.size(1), device=k.device)
            keys[at], values[at] = k, v
        if layer == 0:  # the same for all layers of a forward pass
            self.new_lengths = (self.lengths + k.size(1)) * (self.pages[:, 0] != PADDING)
        return keys, values, self.new_lengths, self.pages
