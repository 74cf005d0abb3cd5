"""Multiple choice: ARC and MMLU, answered by a letter."""

from nanochat.paths import Paths
from nanochat.tasks.sources import load_rows

LETTERS = "ABCDEFGHIJ"


def multiple_choice(question: str, choices: list[str], letters: list[str], answer: str) -> dict:
    """A conversation whose answer is one letter. Letters follow the choices, so that recalling a choice leads to its letter."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    prompt = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "letters": letters}


class _Categorical:
    kind, baseline = "categorical", 0.25

    def __len__(self) -> int:
        return self._rows.num_rows

    def judge(self, conversation: dict, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


class ARC(_Categorical):
    """allenai/ai2_arc, subset ARC-Easy or ARC-Challenge: question, choices {text, label}, answerKey."""

    def __init__(self, paths: Paths, subset: str, split: str):
        self.name = subset
        self._rows = load_rows(paths, subset.lower(), split, ("question", "choices", "answerKey"))

    def __getitem__(self, index: int) -> dict:
        row = self._rows.slice(index, 1).to_pylist()[0]
        return multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"])


class MMLU(_Categorical):
    """cais/mmlu: question, choices (four), answer (index)."""

    name = "MMLU"

    def __init__(self, paths: Paths, split: str):
        self._rows = load_rows(paths, "mmlu", split, ("question", "choices", "answer"))

    def __getitem__(self, index: int) -> dict:
        row = self._rows.slice(index, 1).to_pylist()[0]
        letters = list(LETTERS[: len(row["choices"])])
        return multiple_choice(row["question"], row["choices"], letters, letters[row["answer"]])
