"""MMLU: questions of 57 subjects, with four choices."""

from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tasks.multiple_choice import LETTERS, Categorical, multiple_choice
from nanochat.tasks.rows import load_rows

SHAPE = {"question": str, "choices": [str], "answer": int}


def check_row(row: dict) -> None:
    """Raise UserError unless the answer is the index of a choice, and each choice has a letter."""
    number = len(row["choices"])
    if not 0 <= row["answer"] < number <= len(LETTERS):
        raise UserError(
            f"the answer is choice {row['answer']} of {number}, wanted one from 0 to {min(number, len(LETTERS)) - 1}"
        )


class MMLU(Categorical):
    """cais/mmlu: question, choices (four), answer (index)."""

    name = "MMLU"

    def __init__(self, paths: Paths, split: str):
        self._rows = load_rows(paths, "mmlu", split, SHAPE, check_row)

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        letters = list(LETTERS[: len(row["choices"])])
        return multiple_choice(row["question"], row["choices"], letters, letters[row["answer"]])
