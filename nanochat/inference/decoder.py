"""One step of decoding for all rows of a cache: the model, the choice of a token, and the cache's growth."""

from functools import partial

import torch
from torch import Tensor

from nanochat.gpt import GPT
from nanochat.inference.cache import KVCache
from nanochat.inference.sampling import Sampler
from nanochat.platform.cuda_graphs import Replayed


def decode(model: GPT, cache: KVCache, sampler: Sampler, given: Tensor) -> Tensor:
    """The tokens (B,) after `given` (2, B): the tokens before, and by how much each row of the cache grows."""
    tokens, grown = given
    hidden = model.hidden(tokens[:, None], cache)
    cache.lengths.add_(grown)
    return sampler.choose(model.logits(hidden[:, -1]))


class Decoder:
    """Decodes the next token of every row, given the one before.

    replay: the step is captured in a CUDA graph and replayed, for which the cache must return all positions. The host then copies
    the tokens to the device, launches one graph and waits for the result.
    """

    def __init__(self, model: GPT, cache: KVCache, sampler: Sampler, replay: bool):
        self.model, self.cache, self.sampler = model, cache, sampler
        self.generator: torch.Generator | None = None  # of the random numbers; for each generation its own
        rows, device = len(cache.lengths), model.device
        self.on_host = torch.zeros(2, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.given = torch.zeros(2, rows, dtype=torch.int64, device=device)  # tokens, and by how much a row grows
        pool = torch.cuda.graph_pool_handle() if replay and device.type == "cuda" else None
        # not a method, which would refer to the decoder: dropping that frees the cache at once
        self.step = Replayed(partial(decode, model, cache, sampler, self.given), pool)

    def __call__(self, tokens: list[int], grown: list[int], longest: int) -> list[int]:
        """The next token of each row. grown: 1 for a row that keeps its token, 0 for one that has ended, whose token is overwritten
        and whose result is not to be used. longest: the largest length of a row after this token.
        """
        self.on_host.copy_(torch.tensor([tokens, grown]))
        self.given.copy_(self.on_host, non_blocking=True)
        self.sampler.draw(self.generator)
        chosen = self.step()
        self.cache.longest = longest
        return chosen.tolist()  # waits for the device, so that the host may write on_host again

    def choose(self, logits: Tensor) -> list[int]:
        """The first token of each row, for logits (B, V)."""
        self.sampler.draw(self.generator)
        return self.sampler.choose(logits).tolist()
