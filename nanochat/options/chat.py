"""The options of `nanochat chat`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nanochat.options.model import Implementations
from nanochat.options.ranges import AtLeast


@dataclass(frozen=True)
class ChatOptions:
    """Chat with a model: type to talk, `clear` to start a new conversation, `quit` to leave."""

    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
    """one prompt; its answer is printed and the command ends"""
    source: Literal["base", "mid", "sft"] = "sft"
    """whose newest checkpoint"""
    temperature: Annotated[float, AtLeast(0)] = 0.6
    """0 takes the most likely token"""
    top_k: Annotated[int, AtLeast(1)] = 50
    """sample from this many likeliest tokens"""
    max_tokens: Annotated[int, AtLeast(1)] = 512
    """tokens of an answer at most"""
    seed: int = 42
    """seed of the sampling"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    impl: Implementations = field(default_factory=Implementations)
