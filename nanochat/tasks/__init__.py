"""Tasks: each is a sequence of conversations to train on; those that can be evaluated also judge completions.

A task has `name`, `files` that its rows are made from, `__len__` and `__getitem__(i) → conversation`. One that can be evaluated also
has `kind` ("categorical" or "generative"), `baseline` (the accuracy of guessing) and `judge(conversation, completion) → bool`. It
may have `conditions()`: what the results have to say about the way in which it judges here, by name.
"""

from nanochat.tasks.arc import ARC
from nanochat.tasks.custom_json import CustomJSON
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.identity import Identity
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.simple_spelling import SimpleSpelling
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.spelling_bee import SpellingBee

__all__ = ["ARC", "GSM8K", "MMLU", "CustomJSON", "HumanEval", "Identity", "SimpleSpelling", "SmolTalk", "SpellingBee"]
