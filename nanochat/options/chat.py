"""The options of `nanochat chat` and `nanochat web`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nanochat.options.model import Implementations
from nanochat.options.presets import NewestRun
from nanochat.options.ranges import AnyInteger, AtLeast, Between

NO_PROMPT = "(none)"


@dataclass(frozen=True)
class ChatOptions(NewestRun):
    """Chat with a model: type to talk, /clear to start a new conversation, /quit to leave."""

    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = NO_PROMPT
    """answer only this prompt, without a chat"""
    source: Annotated[Literal["base", "mid", "sft", "rl"], tyro.conf.arg(aliases=["--stage"])] = "sft"
    """training stage whose newest checkpoint is used; --stage, as other commands call it, is the same"""
    temperature: Annotated[float, AtLeast(0)] = 0.6
    """temperature of the sampling; 0 takes the most likely token"""
    top_k: Annotated[int, AtLeast(1)] = 50
    """sample from this many of the most likely tokens"""
    max_tokens: Annotated[int, AtLeast(1)] = 512
    """maximum number of tokens in an answer"""
    seed: Annotated[int, AnyInteger()] = 42
    """seed of the first answer; each answer after it takes the next one"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    impl: Implementations = field(default_factory=Implementations)


@dataclass(frozen=True)
class WebOptions(NewestRun):
    """Serve a chat in the browser, and OpenAI's API, until Ctrl-C or SIGTERM."""

    source: Annotated[Literal["base", "mid", "sft", "rl"], tyro.conf.arg(aliases=["--stage"])] = "sft"
    """training stage whose newest checkpoint is used; --stage, as other commands call it, is the same"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 lets other machines in, and nobody is asked for a password"""
    port: Annotated[int, Between(0, 65_535)] = 8000
    """port to listen on; 0 takes a free one"""
    temperature: Annotated[float, Between(0, 2)] = 0.6
    """temperature of requests that do not say one"""
    top_k: Annotated[int, Between(1, 200)] = 50
    """top-k of requests that do not say one"""
    max_tokens: Annotated[int, Between(1, 4096)] = 512
    """maximum number of tokens in an answer, for requests that do not say one"""
    gpus: Annotated[int, AtLeast(0)] = 0
    """GPUs, of which each has its own copy of the model; 0 takes all"""
    rows: Annotated[int, Between(1, 4096)] = 64
    """answers that a GPU generates at the same time"""
    queue: Annotated[int, AtLeast(0)] = 256
    """answers that may wait for each GPU; more are answered by 429"""
    seconds_to_end: Annotated[float, AtLeast(0)] = 10.0
    """seconds that answers get to come to their end after the first Ctrl-C or SIGTERM; a second one ends at once"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    impl: Implementations = field(default_factory=Implementations)
