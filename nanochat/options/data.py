"""The options of `nanochat data generate`."""

from dataclasses import dataclass
from typing import Annotated

from nanochat.options.presets import Changed, NamedRun
from nanochat.options.ranges import AnyInteger, Between


@dataclass(frozen=True)
class GenerateOptions(NamedRun):
    """Generate the embedded data: a small closed world as text, conversations and tests."""

    seed: Annotated[int, AnyInteger()] = 1
    """seed of all generated data"""
    shards: Annotated[int, Between(1, 10_000)] = 4
    """shards of pretraining text to train on; one more is for validation"""
    documents: Annotated[int, Between(1, 1_000_000)] = 4096
    """documents per shard"""
    chats: Annotated[int, Between(1, 1_000_000)] = 3000
    """general conversations (SmolTalk's layout)"""
    questions: Annotated[int, Between(1, 1_000_000)] = 10000
    """multiple-choice questions for training (MMLU's layout; a quarter as many in each of ARC's two)"""
    problems: Annotated[int, Between(1, 1_000_000)] = 6000
    """word problems for training (GSM8K's layout)"""
    identity: Annotated[int, Between(1, 1_000_000)] = 300
    """conversations about the model itself"""
    words: Annotated[int, Between(40, 1_000_000)] = 4000
    """words in the word list"""
    tests: Annotated[int, Between(1, 1_000_000)] = 200
    """maximum number of items in each test"""
    changed: Changed = "refuse"
    """what to do if the run's data have files that nanochat did not write: refuse, keep all data as they are, or replace them"""
