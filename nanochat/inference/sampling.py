"""What the next token is drawn with: the settings of a request, and random numbers that depend on nothing but the row's own seed."""

import hashlib

from nanochat.platform.errors import UserError

ALL = 0  # as top_k of a row: sample from the whole vocabulary


def random_key(seed: int, sample: int, prompt: list[int]) -> tuple[int, int]:
    """Two numbers below 2³² for the random numbers of a prompt's sample: other ones for any other seed, sample or prompt."""
    text = f"{seed} {sample} {prompt}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number & 0xFFFFFFFF, number >> 32


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


def check_room(prompt: list[int], positions: int) -> None:
    """Raises UserError for a prompt that fills the model's positions."""
    if len(prompt) >= positions:
        raise UserError(
            f"a prompt of {len(prompt)} tokens leaves none of the model's {positions} positions for an answer; shorten it"
        )
