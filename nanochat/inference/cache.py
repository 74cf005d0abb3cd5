"""The key/value cache of batched decoding. L layers, B rows, S positions, G key/value heads of width D."""

import torch
from torch import Tensor

import nanochat_kernels as kernels
from nanochat.gpt import GPTConfig


class KVCache:
    """Keys and values (L, B, S, G, D) in the compute dtype, and the number of tokens in each row.

    all_positions: `append` returns all S positions, so that a forward pass has the same shapes for every token.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor, all_positions: bool = False):
        self.keys, self.values, self.lengths = keys, values, lengths
        self.longest = 0  # the largest length, on the host: reading it from `lengths` would wait for the device
        self.all_positions = all_positions

    @classmethod
    def create(
        cls,
        config: GPTConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        all_positions: bool = False,
    ) -> "KVCache":
        """An empty cache of `capacity` positions in each row."""
        shape = (config.depth, rows, capacity, config.n_kv_head, config.head_width)
        # zeros, not empty: attention gives unused positions the weight 0, but 0 times NaN would still be NaN
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, torch.zeros(rows, dtype=torch.int64, device=device), all_positions)

    def every(self, step: int) -> "KVCache":
        """The rows 0, step, 2·step, …, emptied, as a cache in the same memory."""
        self.lengths.zero_()
        return KVCache(self.keys[:, ::step], self.values[:, ::step], self.lengths[::step])

    def repeat(self, step: int, longest: int) -> None:
        """Copy each row that `every` gave to the rows up to the next one, so that one prefill serves many samples.

        longest: the largest length of a row.
        """
        for row in range(1, step):
            for x in (self.keys, self.values):
                x[:, row::step, :longest] = x[:, ::step, :longest]
            self.lengths[row::step] = self.lengths[::step]
        self.longest = longest

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append k and v (B, T, G, D) to each row of a layer.

        Returns the layer's keys and values, (B, longest + T, G, D) or all positions, and the new lengths (B,).
        """
        end = self.keys.size(2) if self.all_positions else self.longest + k.size(1)
        if layer == 0:  # the same for all layers of a forward pass
            self.new_lengths = self.lengths + k.size(1)
        kernels.cache_append(self.keys[layer], self.values[layer], k, v, self.lengths)
        return self.keys[layer][:, :end], self.values[layer][:, :end], self.new_lengths

    def advance(self, tokens: Tensor | int, longest: int) -> None:
        """After a forward pass, add its tokens to the lengths: one number, or (B,); longest: the largest new length."""
        self.lengths.add_(tokens)
        self.longest = longest
