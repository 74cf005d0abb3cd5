"""Spelling: write a word letter by letter, and count a letter in it with the help of Python.

Words are dealt to train or test by the hash of the word, so no tested word was ever spelled in training.
"""

import random

from nanochat.data.world import digest, in_test
from nanochat.errors import UserError
from nanochat.paths import Paths
from nanochat.tasks.gsm8k import final_number

COUNT_QUESTIONS = (
    "How many '{letter}' are in '{word}'?",
    "How often is the letter '{letter}' in '{word}'?",
    "Count the '{letter}' in the word '{word}'.",
    "In '{word}', how many times do you see '{letter}'?",
    "Tell me the number of '{letter}' in '{word}'.",
)
SPELL_QUESTIONS = (
    "Spell the word '{word}'.",
    "How do you spell '{word}'?",
    "Which letters make up '{word}'?",
    "Write '{word}' letter by letter.",
)


def spell(word: str) -> str:
    return ",".join(word)


class _Words:
    """`size` rows made from the word list; row i depends on the split and i alone."""

    def __init__(self, paths: Paths, split: str, size: int):
        if not paths.words.exists():
            raise UserError(f"the word list {paths.words} does not exist; make it with: nanochat data generate")
        listed = paths.words.read_text("utf-8").split()
        self._words = [word for word in listed if in_test("word", word) == (split == "test")]
        if not self._words:
            raise UserError(f"{paths.words} has no words for the {split} split; it needs some dozens of words")
        self._split, self._size = split, size

    def __len__(self) -> int:
        return self._size

    def _draw(self, index: int) -> tuple[random.Random, str]:
        rng = random.Random(digest(self.name, self._split, index))
        return rng, rng.choice(self._words)


class SimpleSpelling(_Words):
    """Spell a word."""

    name = "SimpleSpelling"

    def __getitem__(self, index: int) -> dict:
        rng, word = self._draw(index)
        question = rng.choice(SPELL_QUESTIONS).format(word=word)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": spell(word)}]}


class SpellingBee(_Words):
    """Count a letter: spell the word, ask Python, answer after ####."""

    name, kind, baseline = "SpellingBee", "generative", 0.0

    def __getitem__(self, index: int) -> dict:
        rng, word = self._draw(index)
        # nine in ten letters come from the word, so that the answer is rarely zero
        letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
        count = str(word.count(letter))
        parts = [
            {"type": "text", "text": f"The letters are {spell(word)}. "},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"\n\n#### {count}"},
        ]
        question = rng.choice(COUNT_QUESTIONS).format(letter=letter, word=word)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    def judge(self, conversation: dict, completion: str) -> bool:
        return final_number(completion) == final_number(conversation["messages"][-1]["content"][-1]["text"])
