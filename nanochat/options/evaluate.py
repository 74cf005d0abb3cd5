"""The options of `nanochat evaluate base|chat`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nanochat.options.model import Implementations
from nanochat.options.presets import PresetOptions
from nanochat.options.ranges import AtLeast, Between, OrNegative, SomeOrAll

SAMPLES = "samples"  # the name of the result that has the answers to the sample prompts
NOT_REPORTED = "not_reported"  # the name of the result that says why the report does not get the others
SAMPLE_PROMPTS = ("Hello! Who are you?", "Why is the sky blue?", "How many 'r' are in 'strawberry'?")


@dataclass(frozen=True, kw_only=True)
class OfCheckpoint(PresetOptions):
    """The option that both evaluations share."""

    step: Annotated[int, OrNegative(meaning="the newest")] = -1
    """step of the checkpoint that is evaluated"""

    @property
    def checkpoint(self) -> int | None:
        return None if self.step < 0 else self.step


@dataclass(frozen=True)
class EvaluateBaseOptions(OfCheckpoint):
    """Measure bits per byte and CORE of a base model, or CORE of a model of the transformers library."""

    hf_path: str = ""
    """directory, or name on the Hugging Face hub, of a model for the transformers library, which is evaluated instead"""
    core_tasks: tuple[str, ...] = ()
    """tasks of CORE to evaluate; without any, all"""
    tokens: Annotated[int, AtLeast(1)] = 20 * 524288
    """tokens of each split on which bits per byte are measured"""
    batch_size: Annotated[int, Between(1, 1_000_000)] = 32
    """rows per batch and process"""
    core_max_per_task: Annotated[int, SomeOrAll()] = -1
    """maximum number of items of each CORE task"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    impl: Implementations = field(default_factory=Implementations)

    @property
    def stage(self) -> str:
        """What the section of the report is named after."""
        return "hf" if self.hf_path else "base"


@dataclass(frozen=True)
class ChatTaskOptions:
    """How chat tasks are evaluated."""

    max_per_task: Annotated[int, SomeOrAll()] = -1
    """maximum number of items of each task"""
    max_tokens: Annotated[int, AtLeast(1)] = 512
    """maximum number of tokens in an answer"""
    rows: Annotated[int, Between(1, 1_000_000)] = 64
    """answers generated at the same time"""
    num_samples: Annotated[int, AtLeast(1)] = 1
    """answers to each item, of which one has to be right; more than one need a temperature above 0"""
    temperature: Annotated[float, AtLeast(0)] = 0.0
    """temperature of the sampling; 0 takes the most likely token"""
    top_k: Annotated[int, AtLeast(1)] = 50
    """sample from this many of the most likely tokens"""

    @property
    def conditions(self) -> str:
        """How generated answers were sampled, for the name of a result; empty if one answer was, of the most likely tokens."""
        if self.num_samples > 1:
            return f"any of {self.num_samples}"
        return f"temperature {self.temperature:g}" if self.temperature else ""


@dataclass(frozen=True)
class EvaluateChatOptions(OfCheckpoint):
    """Measure a chat model on multiple choice, word problems, code and spelling."""

    stage: Literal["mid", "sft", "rl"] = "sft"
    """training stage whose checkpoint is evaluated"""
    tasks: tuple[str, ...] = ()
    """tasks to evaluate; without any, all"""
    device: str = "auto"
    """auto, cuda, cpu or mps"""
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    """questions whose answers the report shows"""
    task_options: Annotated[ChatTaskOptions, tyro.conf.arg(name="")] = field(default_factory=ChatTaskOptions)
    impl: Implementations = field(default_factory=Implementations)
