"""ARC-Easy and ARC-Challenge: questions of school science, with choices."""

from nanochat.platform.paths import Paths
from nanochat.tasks.multiple_choice import Categorical, multiple_choice
from nanochat.tasks.rows import load_rows


class ARC(Categorical):
    """allenai/ai2_arc, subset ARC-Easy or ARC-Challenge: question, choices {text, label}, answerKey."""

    def __init__(self, paths: Paths, subset: str, split: str):
        self.name = subset
        self._rows = load_rows(paths, subset.lower(), split, ("question", "choices", "answerKey"))

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        return multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"])
