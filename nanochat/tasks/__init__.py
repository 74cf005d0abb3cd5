"""Tasks: each a sequence of conversations for training, and a judge of completions for evaluation.

A task has `name`, `__len__`, `__getitem__(i) → conversation`; one that can be evaluated also has `kind`
("categorical" or "generative"), `baseline` (accuracy of guessing) and `judge(conversation, completion) → bool`.
"""

from nanochat.tasks.conversations import Identity, SmolTalk
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.multiple_choice import ARC, MMLU
from nanochat.tasks.spelling import SimpleSpelling, SpellingBee

__all__ = ["ARC", "GSM8K", "MMLU", "HumanEval", "Identity", "SimpleSpelling", "SmolTalk", "SpellingBee"]
