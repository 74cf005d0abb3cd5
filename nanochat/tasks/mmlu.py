"""MMLU: questions of 57 subjects, with four choices."""

from nanochat.platform.paths import Paths
from nanochat.tasks.multiple_choice import LETTERS, Categorical, multiple_choice
from nanochat.tasks.rows import load_rows


class MMLU(Categorical):
    """cais/mmlu: question, choices (four), answer (index)."""

    name = "MMLU"

    def __init__(self, paths: Paths, split: str):
        self._rows = load_rows(paths, "mmlu", split, ("question", "choices", "answer"))

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        letters = list(LETTERS[: len(row["choices"])])
        return multiple_choice(row["question"], row["choices"], letters, letters[row["answer"]])
