"""ARC-Easy and ARC-Challenge: questions of school science, with choices."""

from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.tasks.multiple_choice import Categorical, multiple_choice
from nanochat.tasks.rows import load_rows

SHAPE = {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}


def check_row(row: dict) -> None:
    """Raise UserError unless each choice has a label, and the answer is one of them."""
    texts, labels, answer = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
    if len(texts) != len(labels) or len(set(labels)) != len(labels) or answer not in labels:
        raise UserError(
            f"{len(texts)} choices have the labels {labels} and the answer {answer!r}, wanted a label for each"
        )


class ARC(Categorical):
    """allenai/ai2_arc, subset ARC-Easy or ARC-Challenge: question, choices {text, label}, answerKey."""

    def __init__(self, paths: Paths, subset: str, split: str):
        self.name = subset
        self._rows = load_rows(paths, subset.lower(), split, SHAPE, check_row)

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        return multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"])
