"""Inference: a key/value cache, batched decoding of unequal prompts, sampling, and the calculator tool.

B rows are decoded together; each has its own length, so prompts need no alignment. L layers, S slots, G key/value heads.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.calculator import calculate
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer


class KVCache:
    """Keys and values (L, B, S, G, D) in the compute dtype, with the number of tokens each row holds."""

    def __init__(self, config: GPTConfig, rows: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (config.depth, rows, slots, config.n_kv_head, config.head_width)
        # zero, not empty: unused slots are masked, but a masked NaN would still spoil the sum
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used = 0  # longest row, known to the host

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k, v (B, T, G, D) behind each row; returns keys, values up to the longest row and the new lengths."""
        end = self.used + k.size(1)
        if layer == 0:  # all layers of a forward pass store at the same places
            slots = self.lengths[:, None] + torch.arange(k.size(1), device=k.device)  # (B, T)
            self.places = torch.arange(k.size(0), device=k.device)[:, None], slots
            self.ends = self.lengths + k.size(1)
        self.keys[layer][self.places] = k
        self.values[layer][self.places] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end], self.ends

    def advance(self, tokens: Tensor | int, longest: int) -> None:
        """Count tokens as held: after a forward pass through all layers."""
        self.lengths = self.lengths + tokens
        self.used = longest

    def repeat(self, copies: int) -> "KVCache":
        """Each row `copies` times, so that one prefill serves many samples."""
        if copies > 1:
            self.keys, self.values = (t.repeat_interleave(copies, dim=1) for t in (self.keys, self.values))
            self.lengths = self.lengths.repeat_interleave(copies)
        return self


@dataclass
class _Row:
    """What the engine knows of a row while it decodes."""

    done: bool = False
    expression: list[int] | None = None  # tokens since python_start
    forced: deque[int] = field(default_factory=deque)  # a tool's answer, still to be fed


class Engine:
    """Generates from a model with its tokenizer."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.stops = {tokenizer.special("assistant_end"), tokenizer.bos}

    @torch.inference_mode()
    def stream(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        samples: int = 1,
        seed: int = 42,
    ) -> Iterator[tuple[list[int | None], list[bool]]]:
        """One column of tokens at a time for len(prompts)·samples rows (a prompt's samples are neighbours).

        A column holds for each row its token, None once it has ended (by assistant_end or bos, which are not given), and
        whether the token was sampled (False: forced by the tool). temperature 0 takes the most likely token.
        """
        _check_sampling(prompts, max_tokens, temperature, top_k, samples)
        device, model = self.model.device, self.model
        generator = torch.Generator(device=device).manual_seed(seed % 2**63 if seed >= 0 else 2**63 + seed % 2**63)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        room = min(longest + max_tokens, model.cos.size(0))
        if longest >= room:
            raise UserError(f"a prompt of {longest} tokens leaves no room in the {room} positions of the model")
        padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        cache = KVCache(model.config, len(prompts), room, device, model.compute_dtype)
        # Right-padded: what a row's padding writes into its cache lies beyond its length and is overwritten later.
        hidden = model.hidden(padded.to(device), cache)
        cache.advance(lengths.to(device), longest)
        last = hidden[torch.arange(len(prompts), device=device), lengths.to(device) - 1]
        logits = model.logits(last).repeat_interleave(samples, dim=0)
        cache.repeat(samples)
        rows = [_Row() for _ in range(len(prompts) * samples)]
        for step in range(room - longest):
            sampled = sample(logits, temperature, top_k, generator).tolist()
            column = [self._next(row, token) for row, token in zip(rows, sampled, strict=True)]
            yield (
                [None if row.done else token for row, (token, _) in zip(rows, column, strict=True)],
                [not forced for _, forced in column],
            )
            if all(row.done for row in rows) or step == room - longest - 1:
                return
            tokens = torch.tensor([[token] for token, _ in column], device=device)
            hidden = model.hidden(tokens, cache)
            cache.advance(1, cache.used + 1)
            logits = model.logits(hidden[:, -1])

    def generate(self, prompts: list[list[int]], max_tokens: int, **sampling) -> list[list[int]]:
        """The generated tokens of each row, ends and prompts left out; `sampling` as in stream."""
        rows: list[list[int]] = [[] for _ in range(len(prompts) * sampling.get("samples", 1))]
        for tokens, _ in self.stream(prompts, max_tokens, **sampling):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def _next(self, row: _Row, sampled: int) -> tuple[int, bool]:
        """The row's next token and whether it was forced; keeps the state of the tool."""
        special = self.tokenizer.special
        if row.forced:
            return row.forced.popleft(), True
        if row.done or sampled in self.stops:
            row.done = True
            return sampled, False
        if sampled == special("python_start"):
            row.expression = []
        elif sampled == special("python_end") and row.expression is not None:
            result = calculate(self.tokenizer.decode(row.expression))
            if result is not None:
                row.forced.extend([special("output_start"), *self.tokenizer.encode(result), special("output_end")])
            row.expression = None
        elif row.expression is not None:
            row.expression.append(sampled)
        return sampled, False


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token a row (B,) from logits (B, V); the most likely when the temperature is 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.size(-1):
        values, candidates = logits.topk(top_k, dim=-1)
        choice = torch.multinomial(torch.softmax(values / temperature, dim=-1), 1, generator=generator)
        return candidates.gather(-1, choice).squeeze(-1)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator).squeeze(-1)


def _check_sampling(
    prompts: list[list[int]], max_tokens: int, temperature: float, top_k: int | None, samples: int
) -> None:
    if not prompts or not all(prompts):
        raise UserError("generation needs at least one prompt, each with at least one token")
    if max_tokens < 1 or samples < 1:
        raise UserError(f"max_tokens and samples must be at least 1, got {max_tokens} and {samples}")
    if temperature < 0:
        raise UserError(f"temperature must not be negative, got {temperature}; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}; leave it out to sample from the whole vocabulary")
