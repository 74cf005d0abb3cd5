"""The word list of the spelling tasks. The hash of a word assigns it to train or test, so that training never spells a tested
word."""

import random

from nanochat.data.splits import digest, in_test
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths


def spell(word: str) -> str:
    """The letters of a word, separated by commas."""
    return ",".join(word)


class WordTask:
    """A task of `size` rows, generated from the word list; row i depends only on the split and on i.

    Raises UserError when there is no word list, or when it has no words for the split.
    """

    def __init__(self, paths: Paths, split: str, size: int):
        if not paths.words.exists():
            raise UserError(f"the word list {paths.words} does not exist; {paths.get_data}")
        words = paths.words.read_text("utf-8").split()
        self._words = [word for word in words if in_test("word", word) == (split == "test")]
        if not self._words:
            raise UserError(f"{paths.words} has no words for the {split} split; it needs some dozens of words")
        self._split, self._size, self.files = split, size, [paths.words]

    def __len__(self) -> int:
        return self._size

    def draw(self, index: int) -> tuple[random.Random, str]:
        """The random number generator of a row, and the row's word."""
        rng = random.Random(digest(self.name, self._split, index))
        return rng, rng.choice(self._words)
