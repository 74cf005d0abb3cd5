"""The options of `nanochat evaluate base|chat`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nanochat.options.model import Implementations
from nanochat.options.presets import PresetOptions
from nanochat.options.ranges import AtLeast


@dataclass(frozen=True)
class EvaluateBaseOptions(PresetOptions):
    """Measure bits per byte and CORE of a base model."""

    tokens: Annotated[int, AtLeast(1)] = 20 * 524288
    """tokens of each split that bits per byte are measured on"""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """rows a process takes at once"""
    core_max_per_task: int = 500
    """items of each CORE task at most; negative: all"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    impl: Implementations = field(default_factory=Implementations)


@dataclass(frozen=True)
class ChatTaskOptions:
    """How chat tasks are evaluated."""

    max_per_task: int = -1
    """items of each task at most; negative: all"""
    max_tokens: Annotated[int, AtLeast(1)] = 512
    """tokens generated for an answer at most"""
    rows: Annotated[int, AtLeast(1)] = 64
    """answers generated at once"""


@dataclass(frozen=True)
class EvaluateChatOptions(PresetOptions):
    """Measure a chat model on multiple choice, word problems, code and spelling."""

    stage: Literal["mid", "sft"] = "sft"
    """whose newest checkpoint"""
    tasks: tuple[str, ...] = ()
    """which tasks; all of them when none is given"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    options: Annotated[ChatTaskOptions, tyro.conf.arg(name="")] = field(default_factory=ChatTaskOptions)
    impl: Implementations = field(default_factory=Implementations)
