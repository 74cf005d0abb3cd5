"""Multiple choice: the question as a conversation whose answer is one letter, and how an answer is judged."""

LETTERS = "ABCDEFGHIJ"


def multiple_choice(question: str, choices: list[str], letters: list[str], answer: str) -> dict:
    """A conversation whose answer is one letter. Letters follow the choices, so that recalling a choice leads to its letter."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    prompt = f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "letters": letters}


class Categorical:
    """A task over rows, judged by the letter."""

    kind, baseline = "categorical", 0.25

    def __len__(self) -> int:
        return self._rows.num_rows

    def judge(self, conversation: dict, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]
