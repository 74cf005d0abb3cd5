"""The word list of the spelling tasks. Words are dealt to train or test by their hash, so that no tested word was ever
spelled in training."""

import random

from nanochat.data.splits import digest, in_test
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths


def spell(word: str) -> str:
    """The letters of a word, separated by commas."""
    return ",".join(word)


class WordTask:
    """`size` rows made from the word list; row i depends only on the split and on i."""

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

    def draw(self, index: int) -> tuple[random.Random, str]:
        """The random numbers of a row, and its word."""
        rng = random.Random(digest(self.name, self._split, index))
        return rng, rng.choice(self._words)
