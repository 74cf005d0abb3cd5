"""The word list of the spelling tasks. The hash of a word assigns it to train or test, so that training never spells a tested
word."""

import random
from collections.abc import Sequence

from nanochat.data.splits import digest, in_test
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths

QUOTATION_MARKS = ("", "'", '"')


def spell(word: str) -> str:
    """A word and its letters: see:s,e,e."""
    return f"{word}:{','.join(word)}"


def ask(rng: random.Random, wordings: Sequence[str], **words: str) -> str:
    """One of the wordings with these words, as people type it: with or without quotation marks, capitals, and marks at its ends."""
    question = rng.choice(wordings)
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.5:
        question = question.strip("¿?.")
    quoted = {name: rng.choice(QUOTATION_MARKS).join(("", word, "")) for name, word in words.items()}
    return question.format(**quoted)


class WordTask:
    """A task of `size` rows, generated from the word list; row i depends only on the split and on i.

    Raises UserError when there is no word list, or when it has no words for the split.
    """

    def __init__(self, paths: Paths, split: str, size: int):
        if not paths.words.exists():
            raise UserError(f"the word list {paths.words} does not exist; {paths.get_data}")
        try:
            words = [word.strip() for word in paths.words.read_text("utf-8").split("\n")]
        except UnicodeDecodeError as error:
            raise UserError(f"{paths.words} is no text in UTF-8 ({error}); {paths.get_data}") from error
        for number, word in enumerate(words, 1):
            if word and not word.isalpha():
                raise UserError(
                    f"{paths.words}, line {number}: {word!r} is no word of letters; correct or remove the line"
                )
        self._words = [word for word in words if word and in_test("word", word) == (split == "test")]
        if not self._words:
            raise UserError(f"{paths.words} has no words for the {split} split; it needs some dozens of words")
        self._split, self._size, self.files = split, size, [paths.words]

    def __len__(self) -> int:
        return self._size

    def draw(self, index: int) -> tuple[random.Random, str]:
        """The random number generator of a row, and the row's word."""
        rng = random.Random(digest(self.name, self._split, index))
        return rng, rng.choice(self._words)
