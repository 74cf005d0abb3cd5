"""The options of `nanochat tokenizer train|eval`."""

from dataclasses import dataclass
from typing import Annotated

from nanochat.options.presets import PresetOptions
from nanochat.options.ranges import AtLeast


@dataclass(frozen=True)
class TokenizerTrainOptions(PresetOptions):
    """Train the tokenizer on the pretraining text."""

    vocab_size: int = 65536
    """tokens, the nine special ones included"""
    max_chars: Annotated[int, AtLeast(1)] = 2_000_000_000
    """characters of text to train on at most"""
    doc_cap: Annotated[int, AtLeast(1)] = 10_000
    """characters of each document at most"""


@dataclass(frozen=True)
class TokenizerEvalOptions:
    """Measure bytes per token on several kinds of text."""
