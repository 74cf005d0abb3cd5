"""Choosing the next token from logits."""

import torch
from torch import Tensor

from nanochat.platform.errors import UserError


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token per row (B,) for logits (B, V); temperature 0 takes the most likely one."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = (
        logits - logits.amax(dim=-1, keepdim=True)
    ) / temperature  # quotients by small temperatures overflow to −inf alone
    if top_k is not None and top_k < logits.size(-1):
        values, candidates = logits.topk(top_k, dim=-1)
        choice = torch.multinomial(torch.softmax(values, dim=-1), 1, generator=generator)
        return candidates.gather(-1, choice).squeeze(-1)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator).squeeze(-1)


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
