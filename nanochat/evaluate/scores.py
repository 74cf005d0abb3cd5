"""The scores of several tasks, their mean, and the file that has them as a table."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat.platform.files import write_atomically


class Score(NamedTuple):
    """The accuracy on a task, and that of guessing."""

    task: str
    accuracy: float
    baseline: float

    @property
    def centred(self) -> float:
        """0 for guessing, 1 if everything is right."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


def as_results(scores: Sequence[Score], mean: str) -> dict[str, float]:
    """The accuracies by task, and under the name `mean`, unless it is empty, the mean of the centred ones."""
    results = {score.task: score.accuracy for score in scores}
    return results | ({mean: sum(score.centred for score in scores) / len(scores)} if mean else {})


def write_csv(path: Path, scores: Sequence[Score], others: dict[str, float]) -> None:
    """Write a line for each task, with its accuracy and its centred one, and a line for each other number by its name."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["task", "value", "centred"])
    table.writerows([score.task, f"{score.accuracy:.6f}", f"{score.centred:.6f}"] for score in scores)
    table.writerows([name, f"{value:.6f}", ""] for name, value in others.items())
    write_atomically(path, text.getvalue())
