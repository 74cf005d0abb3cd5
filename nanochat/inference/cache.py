"""The key/value cache of batched decoding. L layers, B rows, S slots, G key/value heads of width D."""

import torch
from torch import Tensor

from nanochat.gpt import GPTConfig


class KVCache:
    """Keys and values (L, B, S, G, D) in the compute dtype, and how many tokens each row holds."""

    def __init__(self, config: GPTConfig, rows: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (config.depth, rows, slots, config.n_kv_head, config.head_width)
        # zero, not empty: unused slots are masked, but a masked NaN would still spoil the sum
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used = 0  # longest row, known to the host

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k, v (B, T, G, D) after what each row holds; returns keys and values up to the longest row, and the new lengths."""
        end = self.used + k.size(1)
        if layer == 0:  # all layers of a forward pass store at the same places
            slots = self.lengths[:, None] + torch.arange(k.size(1), device=k.device)  # (B, T)
            self.places = torch.arange(k.size(0), device=k.device)[:, None], slots
            self.ends = self.lengths + k.size(1)
        self.keys[layer][self.places] = k
        self.values[layer][self.places] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end], self.ends

    def advance(self, tokens: Tensor | int, longest: int) -> None:
        """Count the tokens of a forward pass, after its last layer."""
        self.lengths = self.lengths + tokens
        self.used = longest

    def repeat(self, copies: int) -> "KVCache":
        """Repeat each row `copies` times, so that one prefill serves many samples."""
        if copies > 1:
            self.keys, self.values = (t.repeat_interleave(copies, dim=1) for t in (self.keys, self.values))
            self.lengths = self.lengths.repeat_interleave(copies)
        return self
