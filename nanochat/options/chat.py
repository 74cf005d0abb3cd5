"""The options of `nanochat chat`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nanochat.options.model import Implementations
from nanochat.options.presets import NewestRun
from nanochat.options.ranges import AnyInteger, AtLeast


@dataclass(frozen=True)
class ChatOptions(NewestRun):
    """Chat with a model: type to talk, /clear to start a new conversation, /quit to leave."""

    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
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
