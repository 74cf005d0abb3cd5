"""The engine: batched decoding of prompts of unequal length, with the calculator tool.

B rows are decoded together. Each has its own length, so that prompts need no alignment.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nanochat.gpt import GPT
from nanochat.inference.cache import KVCache
from nanochat.inference.calculator import calculate
from nanochat.inference.sampling import check_sampling, sample
from nanochat.platform.errors import UserError
from nanochat.tokenizer.bpe import Tokenizer


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
        check_sampling(prompts, max_tokens, temperature, top_k, samples)
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
