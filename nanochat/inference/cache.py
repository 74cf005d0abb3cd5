"""The key/value cache of batched decoding. L layers, B rows, S positions, G key/value heads of width D."""

import torch
from torch import Tensor

from nanochat.gpt import GPTConfig


class KVCache:
    """Keys and values (L, B, S, G, D) in the compute dtype, and the number of tokens in each row."""

    def __init__(self, config: GPTConfig, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.depth, rows, capacity, config.n_kv_head, config.head_width)
        # zeros, not empty: attention gives unused positions the weight 0, but 0 times NaN would still be NaN
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest = 0  # the largest length, on the host: reading it from `lengths` would wait for the device

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append k and v (B, T, G, D) to each row of a layer.

        Returns the layer's keys and values (B, longest + T, G, D) and the new lengths (B,).
        """
        end = self.longest + k.size(1)
        if layer == 0:  # all layers of a forward pass store at the same positions
            positions = self.lengths[:, None] + torch.arange(k.size(1), device=k.device)  # (B, T)
            self.indices = torch.arange(k.size(0), device=k.device)[:, None], positions
            self.new_lengths = self.lengths + k.size(1)
        self.keys[layer][self.indices] = k
        self.values[layer][self.indices] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end], self.new_lengths

    def advance(self, tokens: Tensor | int, longest: int) -> None:
        """After a forward pass, add its tokens to the lengths: one number, or (B,); longest: the largest new length."""
        self.lengths = self.lengths + tokens
        self.longest = longest

    def repeat(self, copies: int) -> "KVCache":
        """Repeat each row `copies` times, so that one prefill serves many samples."""
        if copies > 1:
            self.keys, self.values = (t.repeat_interleave(copies, dim=1) for t in (self.keys, self.values))
            self.lengths = self.lengths.repeat_interleave(copies)
        return self
