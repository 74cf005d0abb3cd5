"""Choosing the next token from logits."""

import torch
from torch import Tensor

from nanochat.platform.errors import UserError


class Sampler:
    """Draws one token per row (B,) from logits (B, V); temperature 0 takes the most likely one, top_k None any of all V.

    `draw` fills `noise` with random numbers, and `choose` uses them: of the two, only choose can be replayed from a CUDA graph.
    """

    def __init__(self, rows: int, vocab_size: int, temperature: float, top_k: int | None, device: torch.device):
        self.top_k = top_k if top_k is not None and top_k < vocab_size else None
        self.greedy = temperature < torch.finfo(torch.float32).tiny
        self.temperature = temperature
        self.noise = torch.ones(0 if self.greedy else rows, self.top_k or vocab_size, device=device)

    def draw(self, generator: torch.Generator) -> None:
        """Draw the random numbers of one token for every row."""
        self.noise.exponential_(generator=generator)

    def choose(self, logits: Tensor) -> Tensor:
        """The token of each row: that with the largest share of its exponentially distributed number, which is a fair draw."""
        if self.greedy:
            return logits.argmax(dim=-1)
        # quotients by small temperatures overflow to −inf alone
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is None:
            return (torch.softmax(logits, dim=-1) / self.noise).argmax(dim=-1)
        values, candidates = logits.topk(self.top_k, dim=-1)
        choice = (torch.softmax(values, dim=-1) / self.noise).argmax(dim=-1, keepdim=True)
        return candidates.gather(-1, choice).squeeze(-1)


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token per row (B,) for logits (B, V), as by a Sampler."""
    sampler = Sampler(*logits.shape, temperature, top_k, logits.device)
    sampler.draw(generator)
    return sampler.choose(logits)


def check_sampling(
    prompts: list[list[int]], max_tokens: int, temperature: float, top_k: int | None, samples: int
) -> None:
    """Raises UserError for prompts or settings that cannot be sampled from."""
    if not prompts or not all(prompts):
        raise UserError("generation needs at least one prompt, each with at least one token")
    if max_tokens < 1 or samples < 1:
        raise UserError(f"max_tokens and samples must be at least 1, got {max_tokens} and {samples}")
    if temperature < 0:
        raise UserError(f"temperature must not be negative, got {temperature}; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}; leave it out to sample from the whole vocabulary")
