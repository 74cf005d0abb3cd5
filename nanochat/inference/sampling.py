"""Choosing the next token from logits, with random numbers that depend on nothing but the row's own seed and progress."""

import hashlib

import torch
from torch import Tensor

from nanochat.platform.errors import UserError

ALL = 0  # as top_k of a row: sample from the whole vocabulary
_LOW = 0xFFFFFFFF


def choose(
    logits: Tensor, keys: Tensor, steps: Tensor, top_k: Tensor, temperature: Tensor, candidates: int, any_all: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of each row (R,), and the most likely tokens of each row (R, candidates) with their logits, best first.

    logits (R, V) float32; keys (R, 2), steps (R,): what the random numbers are made from; top_k (R,): 1 takes the most likely token,
    ALL any; temperature (R,) float32. candidates: the largest top_k or more; any_all: a row has ALL. Of equal logits the smaller token
    comes first, so that a row's result depends on neither. A token is drawn by the largest logit/temperature + Gumbel noise.
    Gumbel 1954; Maddison et al. 2014.
    """
    tokens = torch.arange(logits.size(1), device=logits.device)
    if candidates == 1:
        ranked = logits.argmax(1, keepdim=True)
    else:
        order = _ordered(logits) << 32 | (logits.size(1) - 1 - tokens)
        ranked = logits.size(1) - 1 - (order.topk(candidates, dim=1).values & _LOW)
    values = logits.gather(1, ranked)
    # differences by small temperatures overflow to −inf alone
    score = (values - values[:, :1]) / temperature[:, None] + _gumbel(keys, steps, ranked)
    outside = torch.arange(candidates, device=logits.device) >= top_k[:, None]
    choice = score.masked_fill(outside, -torch.inf).argmax(1, keepdim=True)
    chosen = ranked.gather(1, choice)[:, 0]
    if any_all:
        score = (logits - values[:, :1]) / temperature[:, None] + _gumbel(keys, steps, tokens[None])
        chosen = torch.where(top_k == ALL, score.argmax(1), chosen)
    return chosen, ranked, values


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of float32 numbers."""
    bits = (x + 0.0).view(torch.int32)  # −0 becomes 0
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()


def _mixed(x: Tensor) -> Tensor:
    """A pseudorandom number below 2³² for each below 2³². Wellons 2018 (lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _LOW
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def _gumbel(keys: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """−ln(−ln u) for a random u in (0, 1) of each row's key (R, 2), step (R,) and tokens (R or 1, n)."""
    row = _mixed(_mixed(_mixed(keys[:, 0]) ^ keys[:, 1]) ^ steps)
    number = _mixed(_mixed(tokens) ^ row[:, None])
    uniform = ((number >> 9).float() + 0.5) * 2.0**-23  # 23 bits: with more, the largest would be rounded to 1
    return -(-uniform.log()).log()


def random_key(seed: int, sample: int, prompt: list[int]) -> tuple[int, int]:
    """Two numbers below 2³² for the random numbers of a prompt's sample: other ones for any other seed, sample or prompt."""
    text = f"{seed} {sample} {prompt}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number & _LOW, number >> 32


def check_sampling(
    prompts: list[list[int]], max_tokens: int, temperature: float, top_k: int | None, samples: int
) -> None:
    """Raises UserError for prompts or settings that cannot be sampled from."""
    if not prompts or not all(prompts):
        raise UserError("generation needs at least one prompt, each with at least one token")
    if max_tokens < 1 or samples < 1:
        raise UserError(f"max_tokens and samples must be at least 1, got {max_tokens} and {samples}")
    if not temperature >= 0:
        raise UserError(f"temperature must not be negative, got {temperature}; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}; leave it out to sample from the whole vocabulary")
