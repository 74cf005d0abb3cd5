"""The options of `nanochat tokenizer train|eval`."""

from dataclasses import dataclass
from typing import Annotated

from nanochat.options.presets import NewestRun, PresetOptions
from nanochat.options.ranges import AtLeast, Between


@dataclass(frozen=True)
class TokenizerTrainOptions(PresetOptions):
    """Train the tokenizer on the pretraining text."""

    vocab_size: Annotated[int, Between(265, 1_000_000)] = 65536
    """size of the vocabulary, with 256 bytes and nine special tokens"""
    max_chars: Annotated[int, AtLeast(1)] = 2_000_000_000
    """maximum number of characters to train on"""
    doc_cap: Annotated[int, AtLeast(1)] = 10_000
    """maximum number of characters of each document"""


@dataclass(frozen=True)
class TokenizerEvalOptions(NewestRun):
    """Measure bytes per token on several kinds of text."""
